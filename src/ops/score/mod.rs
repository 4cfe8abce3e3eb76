//! PQ scores: query-key inner products estimated from the codes alone.

mod cpu;
#[cfg(feature = "cuda")]
mod cuda;
#[cfg(feature = "cuda")]
pub(super) use cuda::Kernels;

#[cfg(feature = "cuda")]
use candle_core::CudaStorage;
use candle_core::{CpuStorage, CustomOp3, DType, Layout, Result, Shape, Tensor};

use super::arg::{with_unit_rows, Arg, View};
use super::encode::check_centroids;
use super::MAX_HEAD_DIM;

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
pub fn score(query: &Tensor, codes: &Tensor, centroids: &Tensor) -> Result<Tensor> {
    let (query, codes) = (with_unit_rows(query)?, with_unit_rows(codes)?);
    let centroids = with_unit_rows(centroids)?;
    let plan = Plan::new(&query, &codes, &centroids)?;
    query.apply_op3_no_bwd(&codes, &centroids, &Score { plan })
}

/// A checked call of [`score`].
pub(crate) struct Plan {
    pub(crate) query: View<4>,
    pub(crate) codes: View<4>,
    pub(crate) centroids: View<5>,
    pub(crate) group: usize,
}

impl Plan {
    pub(super) fn new(query: &Tensor, codes: &Tensor, centroids: &Tensor) -> Result<Self> {
        let (query_arg, codes_arg) = (Arg::new(OP, "query", query), Arg::new(OP, "codes", codes));
        let centroids_arg = Arg::new(OP, "centroids", centroids);
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
        Ok(Self { query, codes, centroids, group: h / h_kv })
    }
}

struct Score {
    plan: Plan,
}

impl CustomOp3 for Score {
    fn name(&self) -> &'static str {
        OP
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
        let scores = cpu::run(&self.plan, query, codes, centroids)?;
        Ok((CpuStorage::F32(scores), (b, h, self.plan.codes.dims[2]).into()))
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
        let [b, h, ..] = self.plan.query.dims;
        let scores = cuda::run(&self.plan, query, codes, centroids)?;
        Ok((scores, (b, h, self.plan.codes.dims[2]).into()))
    }
}
