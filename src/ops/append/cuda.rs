use candle_core::{CudaStorage, Result};

use super::{Plan, OP};
use crate::cuda::{self, u32_of, DeviceView, Kernel, Module, Params};

/// `kernels/append.cu`
#[repr(C)]
#[derive(Clone, Copy)]
struct Append {
    keys: DeviceView<4>,
    values: DeviceView<4>,
    cache: DeviceView<5>,
    capacity: u64,
    added: u64,
    b: u32,
    h_kv: u32,
    head_dim: u32,
}

const THREADS: usize = 256;

/// Bytes that a thread copies at once, where every row allows it.
const PIECE: usize = 16;

pub(super) fn run(
    plan: &Plan,
    cache: &mut CudaStorage,
    lens: &mut CudaStorage,
    keys: &CudaStorage,
    values: &CudaStorage,
) -> Result<()> {
    let (dtype, device) = cuda::kind(keys);
    let device = &device.clone();
    let gpu = cuda::prepare(device)?;
    let [_, b, h_kv, capacity, head_dim] = plan.cache.dims;
    let added = plan.keys.dims[2];
    let size = dtype.size_in_bytes();
    let width = if is_aligned(plan, PIECE / size) { PIECE / size } else { 1 };
    let params = Params(Append {
        keys: plan.keys.device(),
        values: plan.values.device(),
        cache: plan.cache.device().starting_at(3, plan.first),
        capacity: (plan.first + capacity) as u64,
        added: u64::from(u32_of(OP, "keys", added)?),
        b: u32_of(OP, "b", b)?,
        h_kv: u32_of(OP, "h_kv", h_kv)?,
        head_dim: u32_of(OP, "head_dim", head_dim)?,
    });
    let kernel = Kernel::new(device, Module::Append, format!("append_{size}_x{width}"))?;
    let pieces = added * h_kv * head_dim / width;
    let grid = [pieces.div_ceil(THREADS).min(8 * gpu.multiprocessors), b, 2];
    let launch = kernel.launch().input(keys)?.input(values)?.output(cache)?.output(lens)?.value(&params);
    launch.run(grid, THREADS as u32, 0)
}

/// Whether rows can be read and written in pieces of `width` elements.
fn is_aligned(plan: &Plan, width: usize) -> bool {
    let DeviceView { offset, strides } = plan.cache.device();
    let cache = strides[..4].iter().fold(offset, |all, stride| all | stride);
    [plan.keys.device(), plan.values.device()].iter().all(|DeviceView { offset, strides: [b, h, row, element] }| {
        *element == 1 && (cache | offset | b | h | row | plan.keys.dims[3] as u64).is_multiple_of(width as u64)
    })
}
