use candle_core::{CudaDevice, CudaStorage, DType, Result};

use super::{Plan, OP};
use crate::cuda::{self, u32_of, DeviceView, Kernel, Module, Params, Step};

/// `kernels/group_mass.cu`
#[repr(C)]
#[derive(Clone, Copy)]
struct GroupMass {
    scores: DeviceView<3>,
    step: Step,
    row: u64,
    h: u32,
    group: u32,
    runs: u32,
    scale: f32,
}

const THREADS: u32 = 256;

/// Scores of a run, keys of a tile.
const RUN: usize = 4096;
const TILE: usize = 1024;

/// Blocks a multiprocessor, of all rows together.
const BLOCKS: usize = 8;

pub(super) fn run(plan: &Plan, scores: &CudaStorage) -> Result<CudaStorage> {
    let (_, device) = cuda::kind(scores);
    let kernels = Kernels::new(plan, device)?;
    let [b, _, n] = plan.scores.dims;
    let mut stats = cuda::output(device, kernels.stats_len(), DType::F32)?;
    let mut mass = cuda::output(device, (b, plan.h_kv, n), DType::F32)?;
    kernels.run(Step::of_candidates(n, 0), None, scores, &mut stats, &mut mass)?;
    Ok(mass)
}

/// Both launches of a plan.
pub(crate) struct Kernels {
    stats: Kernel,
    mass: Kernel,
    params: GroupMass,
    rows: usize,
    mass_rows: usize,
    multiprocessors: usize,
}

impl Kernels {
    pub(crate) fn new(plan: &Plan, device: &CudaDevice) -> Result<Self> {
        let gpu = cuda::prepare(device)?;
        let [b, h, n] = plan.scores.dims;
        let params = GroupMass {
            scores: plan.scores.device(),
            step: Step::of_candidates(n, 0),
            row: n as u64,
            h: u32_of(OP, "h", h)?,
            group: u32_of(OP, "group", h / plan.h_kv)?,
            runs: u32_of(OP, "runs", n.div_ceil(RUN))?,
            scale: plan.scale,
        };
        Ok(Self {
            stats: Kernel::new(device, Module::GroupMass, "group_mass_stats")?,
            mass: Kernel::new(device, Module::GroupMass, "group_mass")?,
            params,
            rows: b * h,
            mass_rows: b * plan.h_kv,
            multiprocessors: gpu.multiprocessors,
        })
    }

    /// Floats of the statistics.
    pub(crate) fn stats_len(&self) -> usize {
        2 * self.rows * self.params.runs as usize
    }

    /// The mass of the candidates of `step`, of sequences of `lens`; the plan has at least as many scores a row.
    pub(crate) fn run(
        &self,
        step: Step,
        lens: Option<&CudaStorage>,
        scores: &CudaStorage,
        stats: &mut CudaStorage,
        mass: &mut CudaStorage,
    ) -> Result<()> {
        let params = Params(GroupMass { step, ..self.params });
        let n = self.params.row as usize;
        let blocks = |pieces: usize, rows: usize| pieces.min((BLOCKS * self.multiprocessors).div_ceil(rows.max(1)));
        let launch = self.stats.launch().input(scores)?.input_or_null(lens)?.output(stats)?.value(&params);
        launch.run([blocks(n.div_ceil(RUN), self.rows), self.rows, 1], THREADS, 0)?;
        let launch = self.mass.launch().input(scores)?.input(stats)?.input_or_null(lens)?.output(mass)?.value(&params);
        launch.run([blocks(n.div_ceil(TILE), self.mass_rows), self.mass_rows, 1], THREADS, 0)
    }
}
