use candle_core::{CudaStorage, Result, Tensor};

use super::{ClusterSums, Due, EncodeOptions, Plan, OP};
use crate::cuda::{self, storage_of, u32_of, DeviceView, Kernel, Module, Params, Step};

/// `kernels/index_block.cu`
#[repr(C)]
#[derive(Clone, Copy)]
struct IndexBlock {
    keys: DeviceView<4>,
    values: DeviceView<4>,
    codes: DeviceView<4>,
    clusters: DeviceView<3>,
    centroids: DeviceView<5>,
    coarse: DeviceView<4>,
    phi: DeviceView<3>,
    weights: DeviceView<3>,
    step: Step,
    block: u64,
    b: u32,
    h_kv: u32,
    head_dim: u32,
    pq_dim: u32,
    pq_len: u32,
    n_centroids: u32,
    n_clusters: u32,
    augmented: u32,
}

const THREADS: usize = 128;
const WARPS: usize = THREADS / 32;

/// Blocks of threads a multiprocessor: idle ones cost time too.
const BLOCKS: usize = 2;

pub(super) fn run(
    plan: &Plan,
    codes: &Tensor,
    [keys, values]: [&Tensor; 2],
    centroids: &Tensor,
    options: EncodeOptions,
    clusters: Option<&ClusterSums>,
    due: Due,
) -> Result<()> {
    let EncodeOptions { phi, weights, coarse } = options;
    let (into, encode) = (&plan.into, &plan.into.encode);
    let [b, h_kv, capacity, head_dim] = encode.keys.dims;
    let [_, _, pq_dim, n_centroids, _] = encode.centroids.dims;
    let (of_clusters, of_coarse) =
        into.coarse.as_ref().map_or((DeviceView::NONE, DeviceView::NONE), |(codes, coarse)| {
            (codes.device().starting_at(2, due.first), coarse.device())
        });
    let values_view =
        plan.sums.as_ref().map_or(DeviceView::NONE, |sums| sums.values.device().starting_at(2, due.first));
    let params = Params(IndexBlock {
        keys: encode.keys.device().starting_at(2, due.first),
        values: values_view,
        codes: into.codes.device().starting_at(2, due.first),
        clusters: of_clusters,
        centroids: encode.centroids.device(),
        coarse: of_coarse,
        phi: encode.phi.map_or(DeviceView::NONE, |phi| phi.device()),
        weights: into.weights.map_or(DeviceView::NONE, |weights| weights.device()),
        step: Step { init_offset: due.init_offset as u64, ..Step::of_candidates(due.first + capacity, 0) },
        block: due.block as u64,
        b: u32_of(OP, "b", b)?,
        h_kv: u32_of(OP, "h_kv", h_kv)?,
        head_dim: u32_of(OP, "head_dim", head_dim)?,
        pq_dim: u32_of(OP, "pq_dim", pq_dim)?,
        pq_len: u32_of(OP, "pq_len", encode.pq_len)?,
        n_centroids: u32_of(OP, "n_centroids", n_centroids)?,
        n_clusters: u32_of(OP, "n_clusters", into.coarse.map_or(0, |(_, centroids)| centroids.dims[2]))?,
        augmented: u32::from(phi.is_some()),
    });
    let sums = clusters.filter(|_| plan.sums.is_some());
    // Keys and values share a storage.
    let guards = [codes, keys, centroids].map(|tensor| tensor.storage_and_layout().0);
    let others = [
        phi,
        weights,
        coarse.map(|coarse| &coarse.codes),
        coarse.map(|coarse| &coarse.centroids),
        sums.map(|clusters| &clusters.sums),
        sums.map(|clusters| &clusters.counts),
    ]
    .map(|tensor| tensor.map(|tensor| tensor.storage_and_layout().0));
    let of_values = values.storage_and_layout().0;
    let [codes, keys, centroids] = guards.each_ref().map(|guard| storage_of(OP, guard));
    let (codes, keys, centroids, values) = (codes?, keys?, centroids?, storage_of(OP, &of_values)?);
    let others = others.each_ref().map(|guard| guard.as_ref().map(|guard| storage_of(OP, guard)).transpose());
    let [phi, weights, clusters, coarse, sums, counts]: [Result<Option<&CudaStorage>>; 6] = others;

    let (dtype, device) = cuda::kind(keys);
    let device = &device.clone();
    let gpu = cuda::prepare(device)?;
    let kernel = Kernel::new(device, Module::IndexBlock, format!("index_block_{}", cuda::suffix(dtype)))?;
    let launch = kernel.launch().input(keys)?.input(values)?.input(centroids)?;
    let launch = launch.input_or_null(phi?)?.input_or_null(weights?)?.input_or_null(coarse?)?;
    let launch = launch.output(due.lens.storage_mut())?.updated(codes)?.updated_or_null(clusters?)?;
    let launch = launch.updated_or_null(sums?)?.updated_or_null(counts?)?.value(&params);
    let blocks = due.block.div_ceil(WARPS).min((BLOCKS * gpu.multiprocessors).div_ceil(b * h_kv));
    launch.run([blocks, b * h_kv, 1], THREADS as u32, 0)
}
