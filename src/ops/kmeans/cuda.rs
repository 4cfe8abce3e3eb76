use candle_core::{CudaStorage, DType, Result};

use super::{Plan, OP};
use crate::config::Metric;
use crate::cuda::{self, u32_of, DeviceView, Kernel, Module, Params};
use crate::ops::encode::{nearest_kernel, THREADS};

/// `kernels/kmeans.cu`
#[repr(C)]
#[derive(Clone, Copy)]
struct Kmeans {
    keys: DeviceView<4>,
    n: u64,
    samples: u64,
    seed: u64,
    h_kv: u32,
    pq_dim: u32,
    pq_len: u32,
    n_centroids: u32,
    augmented: u32,
}

/// Returns the centroids and each subspace's `phi`, which nothing is written to with the Euclidean metric.
pub(super) fn run(plan: &Plan, keys: &CudaStorage) -> Result<(CudaStorage, CudaStorage)> {
    let (dtype, device) = cuda::kind(keys);
    cuda::prepare(device)?;
    let [b, h_kv, n, _] = plan.keys.dims;
    let options = &plan.options;
    let params = Params(Kmeans {
        keys: plan.keys.device(),
        n: n as u64,
        // Numbers of samples are kept as u32.
        samples: u64::from(u32_of(OP, "samples", plan.samples)?),
        seed: options.seed,
        h_kv: u32_of(OP, "h_kv", h_kv)?,
        pq_dim: u32_of(OP, "pq_dim", options.pq_dim)?,
        pq_len: u32_of(OP, "pq_len", plan.pq_len)?,
        n_centroids: u32_of(OP, "n_centroids", plan.n_centroids)?,
        augmented: u32::from(options.metric == Metric::InnerProduct),
    });
    let kernel = |name: &str| Kernel::new(device, Module::Kmeans, name.replace("{}", cuda::suffix(dtype)));
    let subspaces = b * h_kv * options.pq_dim;
    let mut phi = cuda::output(device, subspaces, DType::F32)?;
    if options.metric == Metric::InnerProduct {
        let largest_norm = kernel("kmeans_phi_{}")?;
        largest_norm.launch().input(keys)?.output(&mut phi)?.value(&params).run([subspaces, 1, 1], 256, 0)?;
    }
    let mut centroids = cuda::output(device, (subspaces, plan.n_centroids, plan.columns), DType::F32)?;
    let mut random = cuda::output(device, subspaces, DType::I64)?;
    let draw = kernel("kmeans_draw_{}")?;
    draw.launch().input(keys)?.input(&phi)?.output(&mut centroids)?.output(&mut random)?.value(&params).run(
        [subspaces, 1, 1],
        32,
        0,
    )?;

    let (len, tile) = nearest_kernel(plan.pq_len, plan.samples);
    let (assign, update) = (kernel(&format!("kmeans_assign_{{}}_len{len}"))?, kernel("kmeans_update_{}")?);
    let mut codes = cuda::output(device, (subspaces, plan.samples), DType::U8)?;
    let mut sorted = cuda::output(device, (subspaces, plan.samples), DType::U32)?;
    for _ in 0..options.iters {
        assign.launch().input(keys)?.input(&centroids)?.input(&phi)?.output(&mut codes)?.value(&params).run(
            [plan.samples.div_ceil(tile), subspaces, 1],
            THREADS,
            0,
        )?;
        update
            .launch()
            .input(keys)?
            .input(&phi)?
            .input(&codes)?
            .output(&mut sorted)?
            .output(&mut centroids)?
            .output(&mut random)?
            .value(&params)
            .run([subspaces, 1, 1], 1024, 0)?;
    }
    Ok((centroids, phi))
}
