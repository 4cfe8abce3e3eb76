use candle_core::{CudaStorage, DType, Result};

use super::{Plan, OP};
use crate::cuda::{self, u32_of, DeviceView, Kernel, Module, Params};
use crate::ops::arg::View;

/// `kernels/encode.cu`
#[repr(C)]
#[derive(Clone, Copy)]
struct Encode {
    keys: DeviceView<4>,
    centroids: DeviceView<5>,
    phi: DeviceView<3>,
    weights: DeviceView<3>,
    codes: DeviceView<4>,
    clusters: DeviceView<3>,
    coarse: DeviceView<4>,
    n: u64,
    h_kv: u32,
    pq_dim: u32,
    pq_len: u32,
    n_centroids: u32,
    augmented: u32,
}

/// Threads of a block of the kernels of `kernels/nearest.cuh`.
pub(crate) const THREADS: u32 = 128;

/// Keys of which each has a block of threads for its sub-vector.
const FEW: usize = 4;

/// Shared memory for centroids that such a block may have.
const STAGED_BYTES: usize = 32 << 10;

/// Which of those kernels to take: the length it is compiled for, 0 for any, and the sub-vectors that a block covers.
///
/// With less to do than a block of threads has hands, a warp a sub-vector is sooner done.
pub(crate) fn nearest_kernel(pq_len: usize, n: usize) -> (usize, usize) {
    match pq_len {
        2 | 4 | 8 | 16 if n >= 128 => (pq_len, 256),
        32 | 64 | 80 | 96 | 128 if n >= 128 => (pq_len, 128),
        _ => (0, 4),
    }
}

pub(super) fn run(plan: &Plan, keys: &CudaStorage, centroids: &CudaStorage, phi: &CudaStorage) -> Result<CudaStorage> {
    let (_, device) = cuda::kind(keys);
    let [b, h_kv, n, _] = plan.keys.dims;
    let dims = [b, h_kv, n, plan.centroids.dims[2]];
    let mut codes = cuda::output(device, dims.as_slice(), DType::U8)?;
    launch(plan, [keys, centroids, phi], None, None, (&View::contiguous(dims), &mut codes))?;
    Ok(codes)
}

/// The clusters of keys, and their centroids.
pub(super) struct CoarseInput<'a> {
    pub(super) codes: &'a CudaStorage,
    pub(super) codes_view: &'a View<3>,
    pub(super) centroids: &'a CudaStorage,
    pub(super) centroids_view: &'a View<4>,
}

/// Writes the codes of the plan's keys to `codes`.
pub(super) fn launch(
    plan: &Plan,
    [keys, centroids, phi]: [&CudaStorage; 3],
    weights: Option<(&CudaStorage, &View<3>)>,
    coarse: Option<CoarseInput>,
    (codes_view, codes): (&View<4>, &mut CudaStorage),
) -> Result<()> {
    let (dtype, device) = cuda::kind(keys);
    cuda::prepare(device)?;
    let [b, h_kv, n, _] = plan.keys.dims;
    let [_, _, pq_dim, n_centroids, _] = plan.centroids.dims;
    let params = Params(Encode {
        keys: plan.keys.device(),
        centroids: plan.centroids.device(),
        phi: plan.phi.map_or(DeviceView::NONE, |phi| phi.device()),
        weights: weights.map_or(DeviceView::NONE, |(_, view)| view.device()),
        codes: codes_view.device(),
        clusters: coarse.as_ref().map_or(DeviceView::NONE, |coarse| coarse.codes_view.device()),
        coarse: coarse.as_ref().map_or(DeviceView::NONE, |coarse| coarse.centroids_view.device()),
        n: n as u64,
        h_kv: u32_of(OP, "h_kv", h_kv)?,
        pq_dim: u32_of(OP, "pq_dim", pq_dim)?,
        pq_len: u32_of(OP, "pq_len", plan.pq_len)?,
        n_centroids: u32_of(OP, "n_centroids", n_centroids)?,
        augmented: u32::from(plan.phi.is_some()),
    });
    let (name, tile, shared) = match nearest_kernel(plan.pq_len, n) {
        _ if n <= FEW => {
            // Rows as far apart as in `nearest_by_warp`.
            let columns = plan.pq_len + usize::from(plan.phi.is_some());
            let bytes = n_centroids * (columns | 4) * size_of::<f32>();
            let is_staged = columns.is_multiple_of(4) && bytes <= STAGED_BYTES;
            ("few".to_string(), 1, if is_staged { bytes } else { 0 })
        }
        (len, tile) => (format!("len{len}"), tile, 0),
    };
    let kernel = Kernel::new(device, Module::Encode, format!("encode_{}_{name}", cuda::suffix(dtype)))?;
    let launch = kernel.launch().input(keys)?.input(centroids)?.input(phi)?;
    let launch = launch.input_or_null(weights.map(|(weights, _)| weights))?;
    let launch = launch.input_or_null(coarse.as_ref().map(|coarse| coarse.codes))?;
    let launch = launch.input_or_null(coarse.as_ref().map(|coarse| coarse.centroids))?;
    launch.output(codes)?.value(&params).run([n.div_ceil(tile), pq_dim, b * h_kv], THREADS, shared)
}
