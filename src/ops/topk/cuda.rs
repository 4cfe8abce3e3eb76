use candle_core::{CudaStorage, DType, Layout, Result};

use super::{Plan, OP};
use crate::cuda::{self, u32_of, Kernel};

const THREADS: u32 = 1024;

/// Scores of a block whose threads keep them in registers.
const KEPT_SCORES: usize = 32 * THREADS as usize;

/// Scores of a block, at least: fewer would not pay for the blocks of a row to wait for each other.
const MIN_SCORES: usize = KEPT_SCORES;

/// The most blocks a row.
const MAX_PARTS: usize = 64;

/// Words of a row's workspace: `Workspace` in `kernels/topk.cu`.
const WORKSPACE: usize = 3 * 2048 + 2 * MAX_PARTS + 64;

pub(super) fn run(plan: &Plan, scores: &CudaStorage, layout: &Layout) -> Result<CudaStorage> {
    let (_, device) = cuda::kind(scores);
    let gpu = cuda::prepare(device)?;
    let mut positions = cuda::output(device, (plan.rows, plan.k), DType::U32)?;
    if plan.k == 0 || plan.rows == 0 {
        return Ok(positions);
    }
    // One block a multiprocessor, so that all of them run at once.
    let parts = (gpu.multiprocessors / plan.rows).min(plan.n.div_ceil(MIN_SCORES)).clamp(1, MAX_PARTS);
    let (offset, stride) = (layout.start_offset() as u64, layout.stride()[0] as u64);
    let (n, k) = (u32_of(OP, "n", plan.n)?, u32_of(OP, "k", plan.k)?);
    let blocks = u32_of(OP, "parts", parts)?;
    let topk = Kernel::new(device, &cuda::TOPK, if plan.n <= parts * KEPT_SCORES { "topk_kept" } else { "topk" })?;
    let launch = topk.launch().input(scores)?;
    if parts == 1 {
        let launch = launch.null().output(&mut positions)?;
        launch.value(&offset).value(&stride).value(&n).value(&k).value(&blocks).run([plan.rows, 1, 1], THREADS, 0)?;
        return Ok(positions);
    }
    let mut workspace = cuda::zeros(device, plan.rows * WORKSPACE, DType::U32)?;
    let launch = launch.output(&mut workspace)?.output(&mut positions)?;
    launch
        .value(&offset)
        .value(&stride)
        .value(&n)
        .value(&k)
        .value(&blocks)
        .run_cooperatively([plan.rows * parts, 1, 1], THREADS)?;
    Ok(positions)
}
