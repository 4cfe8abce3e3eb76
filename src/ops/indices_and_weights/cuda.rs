use candle_core::{CudaStorage, DType, Result};

use super::{Lists, Plan, DENSE_OP, OP};
use crate::cuda::{self, u32_of, DeviceView, Kernel, Module, Params, Step};

/// `kernels/indices_and_weights.cu`
#[repr(C)]
#[derive(Clone, Copy)]
struct List {
    heavy: DeviceView<3>,
    step: Step,
    lists: u32,
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

pub(super) fn run(plan: &Plan, heavy: &CudaStorage) -> Result<Output> {
    let (_, device) = cuda::kind(heavy);
    let [b, lists, k] = plan.heavy.dims;
    let step = Step::of_geometry(plan.geometry, k);
    let mut out = Output {
        indices: cuda::output(device, (b, lists, plan.list_len), DType::U32)?,
        lens: cuda::output(device, (b, lists), DType::U32)?,
        weights: cuda::output(device, (b, lists, plan.list_len), DType::F32)?,
    };
    launch(plan, step, None, heavy, [&mut out.indices, &mut out.lens, &mut out.weights])?;
    Ok(out)
}

/// Lists the keys of `step`, of sequences of `lens`, for at most the keys and list length of the plan.
///
/// As on the CPU, but heavy keys are not checked: what is at or beyond the window is passed over, and so never a position
/// beyond the sequence.
pub(crate) fn launch(
    plan: &Plan,
    step: Step,
    lens: Option<&CudaStorage>,
    heavy: &CudaStorage,
    [indices, list_lens, weights]: [&mut CudaStorage; 3],
) -> Result<()> {
    let (_, device) = cuda::kind(heavy);
    cuda::prepare(device)?;
    let ([b, lists, _], list_len) = (plan.heavy.dims, plan.list_len);
    let params = Params(List {
        heavy: plan.heavy.device(),
        step,
        lists: u32_of(OP, "lists", lists)?,
        list_len: u32_of(OP, "list", list_len)?,
    });
    let kernel = Kernel::new(device, Module::IndicesAndWeights, "indices_and_weights")?;
    let launch = kernel.launch().input(heavy)?.input_or_null(lens)?;
    launch.output(indices)?.output(weights)?.output(list_lens)?.value(&params).run(
        [list_len.div_ceil(THREADS).max(1), b * lists, 1],
        THREADS as u32,
        0,
    )
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
    let kernel = Kernel::new(device, Module::IndicesAndWeights, "dense_weights")?;
    let launch = kernel.launch().input(indices)?.input(lens)?.input(weights)?.output(&mut dense)?.value(&params);
    launch.run([n.div_ceil(SEGMENT), b * h, 1], THREADS as u32, 0)?;
    Ok(dense)
}
