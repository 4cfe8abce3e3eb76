use candle_core::{CudaStorage, DType, Result};

use super::{Geometry, Lists, Plan, DENSE_OP, OP};
use crate::cuda::{self, u32_of, DeviceView, Kernel, Params};

/// `kernels/indices_and_weights.cu`
#[repr(C)]
#[derive(Clone, Copy)]
struct List {
    heavy: DeviceView<3>,
    n: u64,
    sink: u64,
    window_start: u64,
    init_offset: u64,
    lists: u32,
    k: u32,
    list_len: u32,
}

/// `kernels/indices_and_weights.cu`
#[repr(C)]
#[derive(Clone, Copy)]
struct DenseWeights {
    indices: DeviceView<3>,
    lens: DeviceView<2>,
    weights: DeviceView<3>,
    n: u64,
    h: u32,
    lists: u32,
    list_len: u32,
}

const THREADS: usize = 256;

/// Positions of a block of `dense_weights`.
const SEGMENT: usize = 8192;

pub(super) struct Output {
    pub(super) indices: CudaStorage,
    pub(super) lens: CudaStorage,
    pub(super) weights: CudaStorage,
}

/// As on the CPU, but heavy keys are not checked: what is at or beyond the window is passed over, and so never a
/// position beyond `n`.
pub(super) fn run(plan: &Plan, heavy: &CudaStorage) -> Result<Output> {
    let (_, device) = cuda::kind(heavy);
    cuda::prepare(device)?;
    let Geometry { n, sink, window, init_offset } = plan.geometry;
    let ([b, lists, k], list_len) = (plan.heavy.dims, plan.list_len);
    let sink = sink.min(n);
    let params = Params(List {
        heavy: plan.heavy.device(),
        n: n as u64,
        sink: sink as u64,
        window_start: n.saturating_sub(window).max(sink) as u64,
        init_offset: init_offset as u64,
        lists: u32_of(OP, "lists", lists)?,
        k: u32_of(OP, "k", k)?,
        list_len: u32_of(OP, "list", list_len)?,
    });
    let mut indices = cuda::output(device, (b, lists, list_len), DType::U32)?;
    let mut weights = cuda::output(device, (b, lists, list_len), DType::F32)?;
    let mut lens = cuda::output(device, (b, lists), DType::U32)?;
    let kernel = Kernel::new(device, &cuda::INDICES_AND_WEIGHTS, "indices_and_weights")?;
    kernel.launch().input(heavy)?.output(&mut indices)?.output(&mut weights)?.output(&mut lens)?.value(&params).run(
        [list_len.div_ceil(THREADS).max(1), b * lists, 1],
        THREADS as u32,
        0,
    )?;
    Ok(Output { indices, lens, weights })
}

/// As on the CPU, but positions at or beyond `n` are passed over.
pub(super) fn scatter(
    lists: &Lists,
    h: usize,
    n: usize,
    indices: &CudaStorage,
    lens: &CudaStorage,
    weights: &CudaStorage,
) -> Result<CudaStorage> {
    let (_, device) = cuda::kind(indices);
    cuda::prepare(device)?;
    let [b, count, list_len] = lists.indices.dims;
    let params = Params(DenseWeights {
        indices: lists.indices.device(),
        lens: lists.lens.device(),
        weights: lists.weights.device(),
        n: n as u64,
        h: u32_of(DENSE_OP, "h", h)?,
        lists: u32_of(DENSE_OP, "lists", count)?,
        list_len: u32_of(DENSE_OP, "list", list_len)?,
    });
    let mut dense = cuda::output(device, (b, h, n), DType::F32)?;
    let kernel = Kernel::new(device, &cuda::INDICES_AND_WEIGHTS, "dense_weights")?;
    let launch = kernel.launch().input(indices)?.input(lens)?.input(weights)?.output(&mut dense)?.value(&params);
    launch.run([n.div_ceil(SEGMENT), b * h, 1], THREADS as u32, 0)?;
    Ok(dense)
}
