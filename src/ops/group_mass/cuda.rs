use candle_core::{CudaStorage, DType, Result};

use super::{Plan, OP};
use crate::cuda::{self, u32_of, DeviceView, Kernel, Params};

/// `kernels/group_mass.cu`
#[repr(C)]
#[derive(Clone, Copy)]
struct GroupMass {
    scores: DeviceView<3>,
    n: u64,
    h: u32,
    group: u32,
    runs: u32,
    scale: f32,
}

const THREADS: u32 = 256;

/// Scores of a block of the first launch, keys of one of the second.
const RUN: usize = 4096;
const TILE: usize = 1024;

pub(super) fn run(plan: &Plan, scores: &CudaStorage) -> Result<CudaStorage> {
    let (_, device) = cuda::kind(scores);
    cuda::prepare(device)?;
    let [b, h, n] = plan.scores.dims;
    let runs = n.div_ceil(RUN);
    let params = Params(GroupMass {
        scores: plan.scores.device(),
        n: n as u64,
        h: u32_of(OP, "h", h)?,
        group: u32_of(OP, "group", h / plan.h_kv)?,
        runs: u32_of(OP, "runs", runs)?,
        scale: plan.scale,
    });
    let mut stats = cuda::output(device, (b, h, runs, 2), DType::F32)?;
    let find_stats = Kernel::new(device, &cuda::GROUP_MASS, "group_mass_stats")?;
    find_stats.launch().input(scores)?.output(&mut stats)?.value(&params).run([runs, b * h, 1], THREADS, 0)?;
    let mut mass = cuda::output(device, (b, plan.h_kv, n), DType::F32)?;
    let add_up = Kernel::new(device, &cuda::GROUP_MASS, "group_mass")?;
    let launch = add_up.launch().input(scores)?.input(&stats)?.output(&mut mass)?.value(&params);
    launch.run([n.div_ceil(TILE), b * plan.h_kv, 1], THREADS, 0)?;
    Ok(mass)
}
