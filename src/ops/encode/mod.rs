//! Product quantization of keys: the nearest centroid of each sub-vector.

mod cpu;
#[cfg(feature = "cuda")]
mod cuda;
pub(crate) use cpu::{augmentation, nearest, Tile, TILE};
#[cfg(feature = "cuda")]
pub(crate) use cuda::{nearest_kernel, THREADS};

#[cfg(feature = "cuda")]
use candle_core::{bail, CudaStorage, InplaceOp3};
use candle_core::{CpuStorage, CustomOp3, DType, Layout, Result, Shape, Tensor};

use super::arg::{with_unit_rows, Arg, View};
#[cfg(feature = "cuda")]
use super::score::Coarse;
use super::MAX_HEAD_DIM;

const OP: &str = "encode";

/// Encodes each key as the indices of its nearest centroids, one a subspace.
///
/// `codes[t][m] = argmin_c |x - centroid[m][c]|²` with `x` the `m`-th of `pq_dim` equal pieces of key `t` (Jégou et
/// al., *Product Quantization for Nearest Neighbor Search*, 2011). With `phi` (the inner-product metric) `x` gets one
/// more coordinate, `sqrt(max(phi - |x|², 0))`, after which the nearest centroid is the one of the largest inner
/// product with queries in expectation (the augmentation of Bachrach et al., *Speeding Up the Xbox Recommender System*,
/// 2014).
///
/// # Shapes
/// - `keys`: `[b, h_kv, n, head_dim]`, f32, f16 or bf16, any strides
/// - `centroids`: `[b, h_kv, pq_dim, n_centroids, pq_len]` f32, `pq_len = head_dim / pq_dim`, 2 to 256 centroids (a
///   power of two); with `phi` the last dimension is `pq_len + 1`
/// - `phi`: `[b, h_kv, pq_dim]` f32, the largest `|x|²` of each subspace at training
/// - returns codes `[b, h_kv, n, pq_dim]` u8
///
/// # Errors
/// Shapes or dtypes other than these, or `head_dim` above 256.
///
/// # Numerics
/// Distances are sums of squared differences in f32, in the order of the coordinates and without fused multiply-add.
/// Ties go to the lower index. A sub-vector that is no finite
/// distance from any centroid, such as one that holds NaN, gets code 0.
///
/// ```
/// use candle_core::{Device, Tensor};
/// use candle_pq_attn::ops::encode;
///
/// // Two subspaces of one element, two centroids in each.
/// let centroids = Tensor::new(&[0f32, 1., 10., 20.], &Device::Cpu)?.reshape((1, 1, 2, 2, 1))?;
/// let keys = Tensor::new(&[[[[0.2f32, 19.], [0.9, 11.]]]], &Device::Cpu)?;
/// assert_eq!(encode(&keys, &centroids, None)?.flatten_to(2)?.to_vec2::<u8>()?, [[0, 1], [1, 0]]);
/// # candle_core::Result::Ok(())
/// ```
pub fn encode(keys: &Tensor, centroids: &Tensor, phi: Option<&Tensor>) -> Result<Tensor> {
    let (keys, centroids) = (with_unit_rows(keys)?, with_unit_rows(centroids)?);
    let plan = Plan::new(&keys, &centroids, phi)?;
    // Without phi the op still takes three tensors; this one is not read.
    keys.apply_op3_no_bwd(&centroids, phi.unwrap_or(&centroids), &Encode { plan })
}

/// As [`encode`], but writes to `codes`, `[b, h_kv, n, pq_dim]` of any strides, in place: a view into a cache.
#[cfg(feature = "cuda")]
pub(crate) fn encode_into(codes: &Tensor, keys: &Tensor, centroids: &Tensor, options: EncodeOptions) -> Result<()> {
    let plan = IntoPlan::new(codes, keys, centroids, options)?;
    codes.inplace_op3(keys, centroids, &EncodeInto { plan, options })
}

/// What [`encode_into`] may be given beyond keys and centroids.
#[cfg(feature = "cuda")]
#[derive(Clone, Copy)]
pub(crate) struct EncodeOptions<'a> {
    /// As in [`encode`].
    pub(crate) phi: Option<&'a Tensor>,
    /// `[b, h_kv, head_dim]` f32, without gaps: the elements of keys are multiplied by them first.
    pub(crate) weights: Option<&'a Tensor>,
    /// The codes are of what the centroids of the keys' clusters leave of them.
    pub(crate) coarse: Option<&'a Coarse>,
}

/// A checked call of [`encode_into`].
#[cfg(feature = "cuda")]
pub(crate) struct IntoPlan {
    pub(crate) encode: Plan,
    pub(crate) codes: View<4>,
    /// Codes and centroids of clusters.
    pub(crate) coarse: Option<(View<3>, View<4>)>,
    pub(crate) weights: Option<View<3>>,
}

#[cfg(feature = "cuda")]
impl IntoPlan {
    pub(crate) fn new(codes: &Tensor, keys: &Tensor, centroids: &Tensor, options: EncodeOptions) -> Result<Self> {
        let EncodeOptions { phi, weights, coarse } = options;
        let encode = Plan::new(keys, centroids, phi)?;
        let codes = Arg::new(OP, "codes", codes);
        let [b, h_kv, n, head_dim] = encode.keys.dims;
        codes.is(DType::U8)?;
        codes.has_dims(&[b, h_kv, n, encode.centroids.dims[2]])?;
        let coarse = match coarse {
            None => None,
            Some(coarse) => {
                let (codes, centroids) =
                    (Arg::new(OP, "coarse_codes", &coarse.codes), Arg::new(OP, "coarse_centroids", &coarse.centroids));
                codes.is(DType::U8)?;
                codes.has_dims(&[b, h_kv, n])?;
                centroids.is(DType::F32)?;
                let view: View<4> = centroids.view("[b, h_kv, n_clusters, head_dim]")?;
                centroids.has_dims(&[b, h_kv, view.dims[2], head_dim])?;
                Some((codes.view("[b, h_kv, n]")?, view))
            }
        };
        let weights = optional("weights", weights, [b, h_kv, head_dim], "[b, h_kv, head_dim]")?;
        Ok(Self { encode, codes: codes.view("[b, h_kv, n, pq_dim]")?, coarse, weights })
    }
}

#[cfg(feature = "cuda")]
struct EncodeInto<'a> {
    plan: IntoPlan,
    options: EncodeOptions<'a>,
}

#[cfg(feature = "cuda")]
impl InplaceOp3 for EncodeInto<'_> {
    fn name(&self) -> &'static str {
        OP
    }

    fn cpu_fwd(
        &self,
        _: &mut CpuStorage,
        _: &Layout,
        _: &CpuStorage,
        _: &Layout,
        _: &CpuStorage,
        _: &Layout,
    ) -> Result<()> {
        bail!("{OP}: expected tensors on a GPU, got CPU tensors")
    }

    fn cuda_fwd(
        &self,
        codes: &mut CudaStorage,
        _: &Layout,
        keys: &CudaStorage,
        _: &Layout,
        centroids: &CudaStorage,
        _: &Layout,
    ) -> Result<()> {
        let (EncodeOptions { phi, weights, coarse }, plan) = (self.options, &self.plan);
        let phi = phi.map(|phi| phi.storage_and_layout().0);
        let phi = match &phi {
            None => centroids, // not read
            Some(phi) => crate::cuda::storage_of(OP, phi)?,
        };
        let guards =
            coarse.map(|coarse| (coarse.codes.storage_and_layout().0, coarse.centroids.storage_and_layout().0));
        let coarse = match (&guards, &plan.coarse) {
            (Some((codes, centroids)), Some((codes_view, centroids_view))) => Some(cuda::CoarseInput {
                codes: crate::cuda::storage_of(OP, codes)?,
                codes_view,
                centroids: crate::cuda::storage_of(OP, centroids)?,
                centroids_view,
            }),
            _ => None,
        };
        let weights = weights.map(|weights| weights.storage_and_layout().0);
        let weights = match (&weights, &plan.weights) {
            (Some(weights), Some(view)) => Some((crate::cuda::storage_of(OP, weights)?, view)),
            _ => None,
        };
        cuda::launch(&plan.encode, [keys, centroids, phi], weights, coarse, (&plan.codes, codes))
    }
}

/// A checked call of [`encode`].
pub(crate) struct Plan {
    pub(crate) keys: View<4>,
    pub(crate) centroids: View<5>,
    pub(crate) phi: Option<View<3>>,
    pub(crate) pq_len: usize,
}

impl Plan {
    fn new(keys: &Tensor, centroids: &Tensor, phi: Option<&Tensor>) -> Result<Self> {
        let (keys_arg, centroids_arg) = (Arg::new(OP, "keys", keys), Arg::new(OP, "centroids", centroids));
        keys_arg.is_float()?;
        centroids_arg.is(DType::F32)?;
        let keys: View<4> = keys_arg.view("[b, h_kv, n, head_dim]")?;
        let centroids: View<5> = centroids_arg.view("[b, h_kv, pq_dim, n_centroids, pq_len]")?;
        let [b, h_kv, _, head_dim] = keys.dims;
        let [_, _, pq_dim, n_centroids, _] = centroids.dims;
        if head_dim == 0 || head_dim > MAX_HEAD_DIM {
            return keys_arg.fail("a head_dim of 1 to 256", format_args!("{head_dim}"));
        }
        check_centroids(&centroids_arg, pq_dim, n_centroids, head_dim)?;
        let pq_len = head_dim / pq_dim;
        let columns = pq_len + usize::from(phi.is_some());
        centroids_arg.has_dims(&[b, h_kv, pq_dim, n_centroids, columns])?;
        let phi = optional("phi", phi, [b, h_kv, pq_dim], "[b, h_kv, pq_dim]")?;
        Ok(Self { keys, centroids, phi, pq_len })
    }
}

/// An f32 argument that there may be; `shape` says its dimensions in words.
fn optional<const N: usize>(
    name: &'static str,
    tensor: Option<&Tensor>,
    dims: [usize; N],
    shape: &str,
) -> Result<Option<View<N>>> {
    let Some(tensor) = tensor else { return Ok(None) };
    let arg = Arg::new(OP, name, tensor);
    arg.is(DType::F32)?;
    arg.has_dims(&dims)?;
    arg.view(shape).map(Some)
}

/// Fails unless `pq_dim` divides `head_dim` and `n_centroids` fits a `pq_bits` of 1 to 8.
pub(crate) fn check_centroids(arg: &Arg, pq_dim: usize, n_centroids: usize, head_dim: usize) -> Result<()> {
    if pq_dim == 0 || !head_dim.is_multiple_of(pq_dim) {
        return arg.fail(&format!("a pq_dim that divides head_dim {head_dim}"), format_args!("{pq_dim}"));
    }
    if !(2..=256).contains(&n_centroids) || !n_centroids.is_power_of_two() {
        return arg.fail("2, 4, 8, ... or 256 centroids", format_args!("{n_centroids}"));
    }
    Ok(())
}

struct Encode {
    plan: Plan,
}

impl CustomOp3 for Encode {
    fn name(&self) -> &'static str {
        OP
    }

    fn cpu_fwd(
        &self,
        keys: &CpuStorage,
        _: &Layout,
        centroids: &CpuStorage,
        _: &Layout,
        phi: &CpuStorage,
        _: &Layout,
    ) -> Result<(CpuStorage, Shape)> {
        let [b, h_kv, n, _] = self.plan.keys.dims;
        let codes = cpu::run(&self.plan, keys, centroids, phi)?;
        Ok((CpuStorage::U8(codes), (b, h_kv, n, self.plan.centroids.dims[2]).into()))
    }

    #[cfg(feature = "cuda")]
    fn cuda_fwd(
        &self,
        keys: &CudaStorage,
        _: &Layout,
        centroids: &CudaStorage,
        _: &Layout,
        phi: &CudaStorage,
        _: &Layout,
    ) -> Result<(CudaStorage, Shape)> {
        let [b, h_kv, n, _] = self.plan.keys.dims;
        let codes = cuda::run(&self.plan, keys, centroids, phi)?;
        Ok((codes, (b, h_kv, n, self.plan.centroids.dims[2]).into()))
    }
}
