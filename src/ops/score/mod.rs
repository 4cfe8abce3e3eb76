//! PQ scores: query-key inner products estimated from the codes alone.

pub(super) mod cpu;
#[cfg(feature = "cuda")]
mod cuda;
#[cfg(feature = "cuda")]
pub(super) use cuda::{code_bytes, Kernels};

#[cfg(feature = "cuda")]
use candle_core::{bail, CudaStorage};
use candle_core::{CpuStorage, CustomOp3, DType, Layout, Result, Shape, Tensor};

use super::arg::{with_unit_rows, Arg, View};
use super::encode::check_centroids;
use super::{Places, MAX_HEAD_DIM};

const OP: &str = "score";

/// Scores every key from its codes: `score[t] = Σ_m LUT[m][codes[t][m]]`, `LUT[m][c] = query_m · centroid[m][c]`.
///
/// This is the asymmetric distance computation of product quantization (Jégou et al., 2011) for inner products: an
/// estimate of `query · key`, unscaled, at `pq_dim` table look-ups a key.
///
/// # Shapes
/// - `query`: `[b, h, 1, head_dim]`, f32, f16 or bf16
/// - `codes`: `[b, h_kv, n, pq_dim]` u8, `h` a multiple of `h_kv`; pass a view to score some keys only
/// - `centroids`: `[b, h_kv, pq_dim, n_centroids, pq_len]` f32, any strides
/// - returns scores `[b, h, n]` f32
///
/// # Errors
/// Shapes or dtypes other than these, or a code that is no centroid's index.
///
/// # Numerics
/// f32, table entries and then subspaces summed in ascending order, without fused multiply-add.
///
/// ```
/// use candle_core::{Device, Tensor};
/// use candle_pq_attn::ops::score;
///
/// let centroids = Tensor::new(&[0f32, 1., 10., 20.], &Device::Cpu)?.reshape((1, 1, 2, 2, 1))?;
/// let codes = Tensor::new(&[[[[0u8, 1], [1, 0]]]], &Device::Cpu)?; // of keys near [0, 20] and [1, 10]
/// let query = Tensor::new(&[[[[2f32, 1.]]]], &Device::Cpu)?;
/// assert_eq!(score(&query, &codes, &centroids)?.flatten_all()?.to_vec1::<f32>()?, [20., 12.]);
/// # candle_core::Result::Ok(())
/// ```
pub fn score(query: &Tensor, codes: &Tensor, centroids: &Tensor) -> Result<Tensor> {
    run(OP, query, codes, centroids, None, None)
}

/// What a [`Plan`] of a call without clusters says of the same tensors.
pub(super) fn of_plan(plan: Plan, [query, codes, centroids]: [&Tensor; 3]) -> Result<Tensor> {
    query.apply_op3_no_bwd(codes, centroids, &Score { plan, coarse: None, places: None })
}

/// As [`score`] or [`residual_score`], of the keys at `places` where there are any: on a CPU.
pub(crate) fn score_candidates(
    query: &Tensor,
    codes: &Tensor,
    centroids: &Tensor,
    coarse: Option<&Coarse>,
    places: Option<&Places>,
) -> Result<Tensor> {
    run(OP, query, codes, centroids, coarse.cloned(), places)
}

/// Scores keys whose codes are of residuals: `score[t] = q · coarse[c(t)] + Σ_m LUT[m][codes[t][m]]`, `c(t)` the
/// cluster of key `t`; otherwise as [`score`].
///
/// The coarse term is one more look-up, in a table of the whole query's products.
///
/// # Shapes
/// - `coarse_codes`: `[b, h_kv, n]` u8, the cluster of each key
/// - `coarse_centroids`: `[b, h_kv, n_clusters, head_dim]` f32, 2 to 256 clusters (a power of two)
///
/// # Errors
/// As [`score`], for these too.
///
/// # Numerics
/// The coarse term is the first of the sum.
///
/// ```
/// use candle_core::{Device, Tensor};
/// use candle_pq_attn::ops::residual_score;
///
/// let coarse = Tensor::new(&[[[[100f32, 0.], [0., 0.]]]], &Device::Cpu)?; // clusters at [100, 0] and [0, 0]
/// let clusters = Tensor::new(&[[[0u8, 1]]], &Device::Cpu)?;
/// let centroids = Tensor::new(&[0f32, 1., 10., 20.], &Device::Cpu)?.reshape((1, 1, 2, 2, 1))?;
/// let codes = Tensor::new(&[[[[0u8, 1], [1, 0]]]], &Device::Cpu)?; // of keys near [100, 20] and [1, 10]
/// let query = Tensor::new(&[[[[2f32, 1.]]]], &Device::Cpu)?;
/// let scores = residual_score(&query, &codes, &centroids, &clusters, &coarse)?;
/// assert_eq!(scores.flatten_all()?.to_vec1::<f32>()?, [220., 12.]);
/// # candle_core::Result::Ok(())
/// ```
pub fn residual_score(
    query: &Tensor,
    codes: &Tensor,
    centroids: &Tensor,
    coarse_codes: &Tensor,
    coarse_centroids: &Tensor,
) -> Result<Tensor> {
    let coarse = Coarse { codes: with_unit_rows(coarse_codes)?, centroids: with_unit_rows(coarse_centroids)? };
    run("residual_score", query, codes, centroids, Some(coarse), None)
}

fn run(
    op: &'static str,
    query: &Tensor,
    codes: &Tensor,
    centroids: &Tensor,
    coarse: Option<Coarse>,
    places: Option<&Places>,
) -> Result<Tensor> {
    let (query, codes) = (with_unit_rows(query)?, with_unit_rows(codes)?);
    let centroids = with_unit_rows(centroids)?;
    let plan = Plan::new(op, &query, &codes, &centroids, coarse.as_ref())?;
    query.apply_op3_no_bwd(&codes, &centroids, &Score { plan, coarse, places })
}

/// The clusters of [`residual_score`].
#[derive(Clone)]
pub(crate) struct Coarse {
    pub(crate) codes: Tensor,
    pub(crate) centroids: Tensor,
}

/// A checked call of [`score`] or [`residual_score`].
pub(crate) struct Plan {
    pub(crate) op: &'static str,
    pub(crate) query: View<4>,
    pub(crate) codes: View<4>,
    pub(crate) centroids: View<5>,
    pub(crate) coarse: Option<CoarsePlan>,
    pub(crate) group: usize,
}

/// The clusters as one more subspace, as long as the key.
pub(crate) struct CoarsePlan {
    /// `[b, h_kv, n, 1]`
    pub(crate) codes: View<4>,
    /// `[b, h_kv, 1, n_clusters, head_dim]`
    pub(crate) centroids: View<5>,
}

impl Plan {
    pub(super) fn new(
        op: &'static str,
        query: &Tensor,
        codes: &Tensor,
        centroids: &Tensor,
        coarse: Option<&Coarse>,
    ) -> Result<Self> {
        let (query_arg, codes_arg) = (Arg::new(op, "query", query), Arg::new(op, "codes", codes));
        let centroids_arg = Arg::new(op, "centroids", centroids);
        query_arg.is_float()?;
        codes_arg.is(DType::U8)?;
        centroids_arg.is(DType::F32)?;
        let query: View<4> = query_arg.view("[b, h, 1, head_dim]")?;
        let codes: View<4> = codes_arg.view("[b, h_kv, n, pq_dim]")?;
        let centroids: View<5> = centroids_arg.view("[b, h_kv, pq_dim, n_centroids, pq_len]")?;
        let [b, h, _, head_dim] = query.dims;
        let [_, h_kv, n, pq_dim] = codes.dims;
        query_arg.has_dims(&[b, h, 1, head_dim])?;
        if head_dim == 0 || head_dim > MAX_HEAD_DIM {
            return query_arg.fail("a head_dim of 1 to 256", format_args!("{head_dim}"));
        }
        codes_arg.has_dims(&[b, h_kv, n, pq_dim])?;
        if h == 0 || h_kv == 0 || !h.is_multiple_of(h_kv) {
            return codes_arg.fail(&format!("an h_kv that divides h {h}"), format_args!("{h_kv}"));
        }
        check_centroids(&centroids_arg, pq_dim, centroids.dims[3], head_dim)?;
        centroids_arg.has_dims(&[b, h_kv, pq_dim, centroids.dims[3], head_dim / pq_dim])?;
        let coarse = coarse.map(|coarse| CoarsePlan::new(op, coarse, [b, h_kv, n, head_dim])).transpose()?;
        Ok(Self { op, query, codes, centroids, coarse, group: h / h_kv })
    }
}

impl CoarsePlan {
    fn new(op: &'static str, coarse: &Coarse, [b, h_kv, n, head_dim]: [usize; 4]) -> Result<Self> {
        let codes_arg = Arg::new(op, "coarse_codes", &coarse.codes);
        codes_arg.is(DType::U8)?;
        codes_arg.has_dims(&[b, h_kv, n])?;
        let arg = Arg::new(op, "coarse_centroids", &coarse.centroids);
        arg.is(DType::F32)?;
        let [_, _, n_clusters, _] = arg.view::<4>("[b, h_kv, n_clusters, head_dim]")?.dims;
        check_centroids(&arg, 1, n_clusters, head_dim)?;
        arg.has_dims(&[b, h_kv, n_clusters, head_dim])?;
        let (codes, centroids) = (coarse.codes.unsqueeze(3)?, coarse.centroids.unsqueeze(2)?);
        Ok(Self {
            codes: Arg::new(op, "coarse_codes", &codes).view("[b, h_kv, n, 1]")?,
            centroids: Arg::new(op, "coarse_centroids", &centroids).view("[b, h_kv, 1, n_clusters, head_dim]")?,
        })
    }
}

struct Score<'a> {
    plan: Plan,
    coarse: Option<Coarse>,
    places: Option<&'a Places>,
}

impl Score<'_> {
    /// Keys that are scored.
    fn n(&self) -> usize {
        self.places.map_or(self.plan.codes.dims[2], |places| places.n)
    }
}

impl CustomOp3 for Score<'_> {
    fn name(&self) -> &'static str {
        self.plan.op
    }

    fn cpu_fwd(
        &self,
        query: &CpuStorage,
        _: &Layout,
        codes: &CpuStorage,
        _: &Layout,
        centroids: &CpuStorage,
        _: &Layout,
    ) -> Result<(CpuStorage, Shape)> {
        let [b, h, ..] = self.plan.query.dims;
        let scores = cpu::run(self, query, codes, centroids)?;
        Ok((CpuStorage::F32(scores), (b, h, self.n()).into()))
    }

    #[cfg(feature = "cuda")]
    fn cuda_fwd(
        &self,
        query: &CudaStorage,
        _: &Layout,
        codes: &CudaStorage,
        _: &Layout,
        centroids: &CudaStorage,
        _: &Layout,
    ) -> Result<(CudaStorage, Shape)> {
        if self.places.is_some() {
            bail!("{}: codes: expected them in one piece on a GPU, got pages", self.plan.op);
        }
        let [b, h, ..] = self.plan.query.dims;
        let scores = cuda::run(&self.plan, self.coarse.as_ref(), query, codes, centroids)?;
        Ok((scores, (b, h, self.plan.codes.dims[2]).into()))
    }
}
