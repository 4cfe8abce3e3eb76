use candle_core::{CudaDevice, CudaStorage, DType, Result, Tensor};

use super::{Plan, Selected, OP};
use crate::cuda::{self, u32_of, DeviceView, Kernel, Module, Params, Step};

/// `kernels/tail_attend.cu`
#[repr(C)]
#[derive(Clone, Copy)]
struct TailAttend {
    scores: DeviceView<3>,
    codes: DeviceView<4>,
    indices: DeviceView<3>,
    list_lens: DeviceView<2>,
    weights: DeviceView<3>,
    sums: DeviceView<4>,
    counts: DeviceView<3>,
    step: Step,
    h: u32,
    h_kv: u32,
    lists: u32,
    list_len: u32,
    n_clusters: u32,
    head_dim: u32,
    tiles: u32,
    scale: f32,
}

const THREADS: u32 = 256;
const ATTEND_THREADS: u32 = 1024;

/// Candidates of a tile.
const TILE: usize = 4096;

/// Blocks a multiprocessor, of all heads together.
const BLOCKS: usize = 8;

/// Returns outputs and LSEs.
pub(super) fn run(
    plan: &Plan,
    counts: &Tensor,
    selected: &Selected,
    [scores, codes, sums]: [&CudaStorage; 3],
) -> Result<(CudaStorage, CudaStorage)> {
    let (_, device) = cuda::kind(scores);
    let kernels = Kernels::new(plan, device)?;
    let ([b, h, n], head_dim) = (plan.scores.dims, plan.sums.dims[3]);
    let mut masses = cuda::output(device, kernels.masses_len(), DType::F32)?;
    let mut shifts = cuda::output(device, kernels.shifts_len(), DType::F32)?;
    let mut out = cuda::output(device, (b, h, 1, head_dim), DType::F32)?;
    let mut lse = cuda::output(device, (b, h), DType::F32)?;
    let guards = [counts, &selected.indices, &selected.lens, &selected.weights];
    let guards = guards.map(|tensor| tensor.storage_and_layout().0);
    let [counts, indices, list_lens, weights] = [&guards[0], &guards[1], &guards[2], &guards[3]];
    let lists = [cuda::storage_of(OP, indices)?, cuda::storage_of(OP, list_lens)?, cuda::storage_of(OP, weights)?];
    kernels.run(
        Step { init_offset: plan.init_offset as u64, ..Step::of_candidates(n.saturating_add(plan.init_offset), 0) },
        None,
        [scores, codes],
        lists,
        [sums, cuda::storage_of(OP, counts)?],
        [&mut masses, &mut shifts, &mut out, &mut lse],
    )?;
    Ok((out, lse))
}

/// Both launches of a plan.
pub(crate) struct Kernels {
    masses: Kernel,
    attend: Kernel,
    params: TailAttend,
    rows: usize,
    blocks: usize,
}

impl Kernels {
    pub(crate) fn new(plan: &Plan, device: &CudaDevice) -> Result<Self> {
        let gpu = cuda::prepare(device)?;
        let ([b, h, n], [_, h_kv, n_clusters, head_dim]) = (plan.scores.dims, plan.sums.dims);
        let tiles = n.div_ceil(TILE);
        let [_, lists, list_len] = plan.lists.indices.dims;
        let params = TailAttend {
            scores: plan.scores.device(),
            codes: plan.codes.device(),
            indices: plan.lists.indices.device(),
            list_lens: plan.lists.lens.device(),
            weights: plan.lists.weights.device(),
            sums: plan.sums.device(),
            counts: plan.counts.device(),
            step: Step::of_candidates(n, 0),
            h: u32_of(OP, "h", h)?,
            h_kv: u32_of(OP, "h_kv", h_kv)?,
            lists: u32_of(OP, "lists", lists)?,
            list_len: u32_of(OP, "list", list_len)?,
            n_clusters: u32_of(OP, "n_clusters", n_clusters)?,
            head_dim: u32_of(OP, "head_dim", head_dim)?,
            tiles: u32_of(OP, "tiles", tiles)?,
            scale: plan.scale,
        };
        Ok(Self {
            masses: Kernel::new(device, Module::TailAttend, "tail_masses")?,
            attend: Kernel::new(device, Module::TailAttend, "tail_attend")?,
            params,
            rows: b * h,
            blocks: tiles.min((BLOCKS * gpu.multiprocessors).div_ceil((b * h).max(1))),
        })
    }

    /// Floats of the clusters' masses in each tile.
    pub(crate) fn masses_len(&self) -> usize {
        self.shifts_len() * self.params.n_clusters as usize
    }

    /// Floats of the tiles' shifts.
    pub(crate) fn shifts_len(&self) -> usize {
        self.rows * self.params.tiles as usize
    }

    /// Attends to the candidates of `step`, of sequences of `lens`, that `lists` (indices, lens, weights) do not name; the
    /// plan has at least as many.
    pub(crate) fn run(
        &self,
        step: Step,
        lens: Option<&CudaStorage>,
        [scores, codes]: [&CudaStorage; 2],
        [indices, list_lens, weights]: [&CudaStorage; 3],
        [sums, counts]: [&CudaStorage; 2],
        [masses, shifts, out, lse]: [&mut CudaStorage; 4],
    ) -> Result<()> {
        let params = Params(TailAttend { step, ..self.params });
        let launch = self.masses.launch().input(scores)?.input(codes)?.input(indices)?.input(list_lens)?;
        let launch = launch.input(weights)?.input_or_null(lens)?.output(masses)?.output(shifts)?.value(&params);
        launch.run([self.blocks, self.rows, 1], THREADS, 0)?;
        let launch = self.attend.launch().input(masses)?.input(shifts)?.input(sums)?.input(counts)?;
        let launch = launch.input_or_null(lens)?.output(out)?.output(lse)?.value(&params);
        launch.run([self.rows, 1, 1], ATTEND_THREADS, 0)
    }
}
