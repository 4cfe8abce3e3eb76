use candle_core::{CudaDevice, CudaStorage, DType, Layout, Result};

use super::{Plan, OP};
use crate::cuda::{self, u32_of, Kernel, Module, Params, Step};

/// `kernels/topk.cu`
#[repr(C)]
#[derive(Clone, Copy)]
struct TopK {
    step: Step,
    offset: u64,
    stride: u64,
    k: u32,
    parts: u32,
    rows_per_length: u32,
}

const THREADS: u32 = 1024;

/// Scores of a block whose threads keep them in registers; fewer would not pay for a row's blocks to wait for each other.
const KEPT_SCORES: usize = 32 * THREADS as usize;

/// The most blocks a row.
const MAX_PARTS: usize = 64;

/// Words of a row's workspace: `Workspace` in `kernels/topk.cu`.
const WORKSPACE: usize = 3 * 2048 + 2 * MAX_PARTS + 64;

pub(super) fn run(plan: &Plan, scores: &CudaStorage, layout: &Layout) -> Result<CudaStorage> {
    let (_, device) = cuda::kind(scores);
    let kernel = Kernels::new(plan, device)?;
    let mut positions = cuda::output(device, (plan.rows, plan.k), DType::U32)?;
    let mut workspace = match kernel.workspace_len() {
        0 => None,
        len => Some(cuda::output(device, len, DType::U32)?),
    };
    let (offset, stride) = (layout.start_offset(), layout.stride()[0]);
    let step = Step::of_candidates(plan.n, plan.k);
    kernel.run(step, None, (scores, offset, stride), plan.rows, workspace.as_mut(), &mut positions)?;
    Ok(positions)
}

/// The launch of a plan.
pub(crate) struct Kernels {
    kernel: Kernel,
    rows: usize,
    k: usize,
    parts: usize,
}

impl Kernels {
    pub(crate) fn new(plan: &Plan, device: &CudaDevice) -> Result<Self> {
        let gpu = cuda::prepare(device)?;
        // One block a multiprocessor, so that all of them run at once.
        let parts = (gpu.multiprocessors / plan.rows.max(1)).min(plan.n.div_ceil(KEPT_SCORES)).clamp(1, MAX_PARTS);
        Ok(Self { kernel: Kernel::new(device, Module::TopK, "topk")?, rows: plan.rows, k: plan.k, parts })
    }

    /// Words of the workspace; 0 where none is needed.
    pub(crate) fn workspace_len(&self) -> usize {
        if self.parts == 1 {
            0
        } else {
            self.rows * WORKSPACE
        }
    }

    /// Selects among the candidates of `step`, of sequences of `lens`, each with `rows_per_length` rows; the plan has at
    /// least as many scores a row, and at least as large a k.
    pub(crate) fn run(
        &self,
        step: Step,
        lens: Option<&CudaStorage>,
        (scores, offset, stride): (&CudaStorage, usize, usize),
        rows_per_length: usize,
        workspace: Option<&mut CudaStorage>,
        positions: &mut CudaStorage,
    ) -> Result<()> {
        if self.k == 0 {
            return Ok(());
        }
        let params = Params(TopK {
            step,
            offset: offset as u64,
            stride: stride as u64,
            k: u32_of(OP, "k", self.k)?,
            parts: u32_of(OP, "parts", self.parts)?,
            rows_per_length: u32_of(OP, "rows", rows_per_length)?,
        });
        let launch = self.kernel.launch().input(scores)?.input_or_null(lens)?;
        let grid = [self.rows * self.parts, 1, 1];
        match workspace {
            Some(workspace) => {
                cuda::clear(workspace, self.workspace_len())?;
                launch.output(workspace)?.output(positions)?.value(&params).run_cooperatively(grid, THREADS, 0)
            }
            None => launch.output_or_null(None)?.output(positions)?.value(&params).run(grid, THREADS, 0),
        }
    }
}
