use candle_core::{CudaStorage, Result};

use super::{Plan, OP};
use crate::cuda::{self, u32_of, DeviceView, Kernel, Module, Params};

/// `kernels/cluster_sums.cu`
#[repr(C)]
#[derive(Clone, Copy)]
struct ClusterSums {
    values: DeviceView<4>,
    codes: DeviceView<4>,
    n: u64,
    h_kv: u32,
    head_dim: u32,
    n_clusters: u32,
}

const THREADS: u32 = 256;

/// Clusters of a block that sums values.
const SLICE: usize = 16;

/// Keys of a block that counts.
const COUNTED: usize = 16_384;

fn params(plan: &Plan) -> Result<ClusterSums> {
    let [_, h_kv, n, head_dim] = plan.values.dims;
    Ok(ClusterSums {
        values: plan.values.device(),
        codes: plan.codes.device(),
        n: n as u64,
        h_kv: u32_of(OP, "h_kv", h_kv)?,
        head_dim: u32_of(OP, "head_dim", head_dim)?,
        n_clusters: u32_of(OP, "n_clusters", plan.n_clusters)?,
    })
}

/// Adds the values of the plan's keys to `sums`.
pub(super) fn add_values(plan: &Plan, values: &CudaStorage, codes: &CudaStorage, sums: &mut CudaStorage) -> Result<()> {
    let (dtype, device) = cuda::kind(values);
    let params = Params(params(plan)?);
    let kernel = Kernel::new(device, Module::ClusterSums, format!("cluster_sums_{}", cuda::suffix(dtype)))?;
    let launch = kernel.launch().input(values)?.input(codes)?;
    let [b, h_kv, ..] = plan.values.dims;
    launch.output(sums)?.value(&params).run([plan.n_clusters.div_ceil(SLICE), b * h_kv, 1], THREADS, 0)
}

/// Adds the same keys to `counts`.
pub(super) fn count(plan: &Plan, codes: &CudaStorage, counts: &mut CudaStorage) -> Result<()> {
    let (_, device) = cuda::kind(codes);
    let params = Params(params(plan)?);
    let kernel = Kernel::new(device, Module::ClusterSums, "cluster_counts")?;
    let launch = kernel.launch().input(codes)?;
    let [b, h_kv, ..] = plan.values.dims;
    let blocks = (params.0.n as usize).div_ceil(COUNTED);
    launch.output(counts)?.value(&params).run([blocks, b * h_kv, 1], THREADS, 0)
}
