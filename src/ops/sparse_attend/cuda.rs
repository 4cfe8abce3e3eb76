use candle_core::{CudaStorage, DType, Result};

use super::{Attended, Plan, Selected};
use crate::cuda::{self, u32_of, DeviceView, Kernel, Module, Params, Step};
use crate::ops::arg::View;

/// `kernels/sparse_attend.cu`
#[repr(C)]
#[derive(Clone, Copy)]
struct Attend {
    query: DeviceView<4>,
    keys: DeviceView<4>,
    values: DeviceView<4>,
    indices: DeviceView<3>,
    list_lens: DeviceView<2>,
    weights: DeviceView<3>,
    tail_out: DeviceView<4>,
    tail_lse: DeviceView<2>,
    step: Step,
    h: u32,
    h_kv: u32,
    head_dim: u32,
    lists: u32,
    heads_per_list: u32,
    list_len: u32,
    runs: u32,
    scale: f32,
}

const THREADS: usize = 128;

/// Elements a thread takes at once.
const CHUNK: usize = 8;

/// Positions of a run, at least.
const MIN_RUN: usize = 64;

pub(super) fn run(
    plan: &Plan,
    selected: Option<&Selected>,
    tail: Option<&Attended>,
    query: &CudaStorage,
    keys: &CudaStorage,
    values: &CudaStorage,
) -> Result<(CudaStorage, CudaStorage)> {
    let (dtype, device) = cuda::kind(query);
    let kernels = Kernels::new(plan, query)?;
    let ([b, h, _, head_dim], [_, _, n, _]) = (plan.query.dims, plan.keys.dims);
    let mut partials = cuda::output(device, kernels.partials_len(), DType::F32)?;
    let mut stats = cuda::output(device, kernels.stats_len(), DType::F32)?;
    let mut out = cuda::output(device, (b, h, 1, head_dim), dtype)?;
    let mut lse = cuda::output(device, (b, h), DType::F32)?;
    let guards = selected.map(|selected| {
        [&selected.indices, &selected.lens, &selected.weights].map(|tensor| tensor.storage_and_layout().0)
    });
    let lists = match &guards {
        None => None,
        Some([indices, lens, weights]) => {
            let [indices, lens, weights] = [indices, lens, weights].map(|guard| cuda::storage_of(plan.op, guard));
            Some([indices?, lens?, weights?])
        }
    };
    let guards = tail.map(|tail| [&tail.out, &tail.lse].map(|tensor| tensor.storage_and_layout().0));
    let tail = match &guards {
        None => None,
        Some([out, lse]) => Some([cuda::storage_of(plan.op, out)?, cuda::storage_of(plan.op, lse)?]),
    };
    let (step, tensors) = (Step::of_candidates(n, 0), [query, keys, values]);
    kernels.run(step, None, tensors, lists, tail, [&mut partials, &mut stats, &mut out, &mut lse])?;
    Ok((out, lse))
}

/// Both launches of a plan.
pub(crate) struct Kernels {
    attend: Kernel,
    merge: Kernel,
    params: Attend,
    grid: [usize; 3],
}

impl Kernels {
    pub(crate) fn new(plan: &Plan, query: &CudaStorage) -> Result<Self> {
        let op = plan.op;
        let (dtype, device) = cuda::kind(query);
        let gpu = cuda::prepare(device)?;
        let ([b, h, _, head_dim], [_, h_kv, n, _]) = (plan.query.dims, plan.keys.dims);
        let heads_per_list = plan.heads_per_list();
        let lists = h / heads_per_list;
        let (name, heads, blocks) = variant(plan, dtype);
        let bundles = heads_per_list.div_ceil(heads);
        // As many blocks as run at once, so that all end together.
        let list_len = plan.lists.map_or(n, |lists| lists.indices.dims[2]);
        let wanted = (blocks * gpu.multiprocessors / (b * lists * bundles).max(1)).max(1);
        let runs = list_len.div_ceil(MIN_RUN).clamp(1, wanted);
        let params = Attend {
            query: plan.query.device(),
            keys: plan.keys.device(),
            values: plan.values.device(),
            indices: plan.lists.map_or(DeviceView::NONE, |lists| lists.indices.device()),
            list_lens: plan.lists.map_or(DeviceView::NONE, |lists| lists.lens.device()),
            weights: plan.lists.map_or(DeviceView::NONE, |lists| lists.weights.device()),
            tail_out: plan.tail.map_or(DeviceView::NONE, |(out, _)| out.device()),
            tail_lse: plan.tail.map_or(DeviceView::NONE, |(_, lse)| lse.device()),
            step: Step::of_candidates(n, 0),
            h: u32_of(op, "h", h)?,
            h_kv: u32_of(op, "h_kv", h_kv)?,
            head_dim: u32_of(op, "head_dim", head_dim)?,
            lists: u32_of(op, "lists", lists)?,
            heads_per_list: u32_of(op, "group", heads_per_list)?,
            list_len: u32_of(op, "list", plan.lists.map_or(0, |lists| lists.indices.dims[2]))?,
            runs: u32_of(op, "runs", runs)?,
            scale: plan.scale,
        };
        Ok(Self {
            attend: Kernel::new(device, Module::SparseAttend, name)?,
            merge: Kernel::new(device, Module::SparseAttend, format!("attend_merge_{}", cuda::suffix(dtype)))?,
            params,
            grid: [runs, lists * bundles, b],
        })
    }

    fn partial_rows(&self) -> usize {
        self.grid[2] * self.params.h as usize * self.params.runs as usize
    }

    /// Floats of the partial results.
    pub(crate) fn partials_len(&self) -> usize {
        self.partial_rows() * self.params.head_dim as usize
    }

    /// Floats of their shifts and sums.
    pub(crate) fn stats_len(&self) -> usize {
        self.partial_rows() * 2
    }

    /// Attends to the positions of `lists` (indices, lens, weights), or to all of sequences of `lens`, of which the plan
    /// has at least as many, and adds the `tail` (output, LSE).
    pub(crate) fn run(
        &self,
        step: Step,
        lens: Option<&CudaStorage>,
        [query, keys, values]: [&CudaStorage; 3],
        lists: Option<[&CudaStorage; 3]>,
        tail: Option<[&CudaStorage; 2]>,
        [partials, stats, out, lse]: [&mut CudaStorage; 4],
    ) -> Result<()> {
        let params = Params(Attend { step, ..self.params });
        let [indices, list_lens, weights] = lists.map_or([None; 3], |lists| lists.map(Some));
        let launch = self.attend.launch().input(query)?.input(keys)?.input(values)?;
        let launch = launch.input_or_null(indices)?.input_or_null(list_lens)?.input_or_null(weights)?;
        let launch = launch.input_or_null(lens)?.output(partials)?.output(stats)?.value(&params);
        launch.run(self.grid, THREADS as u32, 0)?;
        let launch = self.merge.launch().input(partials)?.input(stats)?.input_or_null(list_lens)?;
        let [tail_out, tail_lse] = tail.map_or([None; 2], |tail| tail.map(Some));
        let launch = launch.input_or_null(lens)?.input_or_null(tail_out)?.input_or_null(tail_lse)?;
        let launch = launch.output(out)?.output(lse)?.value(&params);
        launch.run([self.grid[2] * self.params.h as usize, 1, 1], THREADS as u32, 0)
    }
}

/// Which kernel to take, the heads it serves at once, and the blocks of it that a multiprocessor has registers for.
fn variant(plan: &Plan, dtype: DType) -> (String, usize, usize) {
    const MMA_HEADS: usize = 8;
    let (suffix, head_dim) = (cuda::suffix(dtype), plan.query.dims[3]);
    let aligned = [&plan.query, &plan.keys, &plan.values].into_iter().all(aligned_rows);
    if !aligned {
        let heads = if plan.heads_per_list() == 1 { 1 } else { 4 };
        return (format!("attend_{suffix}_any_h{heads}"), heads, 3);
    }
    if dtype == DType::F32 {
        let heads = plan.heads_per_list().next_power_of_two().min(8);
        let lanes = (head_dim / CHUNK).next_power_of_two().max(8);
        let blocks = [4, 4, 3, 2][heads.trailing_zeros() as usize];
        return (format!("attend_f32_d{}_h{heads}", lanes * CHUNK), heads, blocks);
    }
    let (shape, blocks) = match head_dim {
        0..=64 => (64, 4),
        65..=96 => (96, 3),
        97..=128 => (128, 3),
        _ => (256, 2),
    };
    (format!("attend_{suffix}_mma_d{shape}"), MMA_HEADS, blocks)
}

/// Whether every row starts at a multiple of a chunk, and ends at one.
fn aligned_rows(view: &View<4>) -> bool {
    let DeviceView { offset, strides: [b, h, row, _] } = view.device();
    let [.., head_dim] = view.dims;
    (offset | b | h | row | head_dim as u64).is_multiple_of(CHUNK as u64)
}
