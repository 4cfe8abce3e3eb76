use candle_core::op::BackpropOp;
use candle_core::{CudaDevice, CudaStorage, DType, Result, Storage, Tensor};

use super::{Plan, Selected, OP};
use crate::cuda::{self, u32_of, DeviceView, Kernel, Module, Params, Step};
use crate::ops::{indices_and_weights, score};

/// `kernels/select.cu`
#[repr(C)]
#[derive(Clone, Copy)]
struct Select {
    query: DeviceView<4>,
    codes: DeviceView<4>,
    centroids: DeviceView<5>,
    step: Step,
    candidates: u64,
    h: u32,
    group: u32,
    runs: u32,
    pq_dim: u32,
    pq_len: u32,
    n_centroids: u32,
    list_len: u32,
    share: u32,
    key_stride: u32,
    room: u32,
}

const THREADS: u32 = 512;

/// Candidates of a block, the most blocks a list, floats of products in shared memory, and finalists of a run beyond those that are
/// selected, as in `kernels/select.cu`.
const RUN: usize = 16 * THREADS as usize;
const MAX_RUNS: usize = 64;
const TILE: usize = 9216;
const SLACK: usize = 512;

/// Shared memory that a block has beside what the launch asks for, at most.
const STATIC_BYTES: usize = 12 << 10;

/// The most code bytes that a thread loads at once: more take more registers than it has.
const MAX_CODE_BYTES: usize = 4;

/// Numbers that blocks leave each other, 256 MB; single launches need fewer where there are many lists.
const MAX_NUMBERS: usize = 1 << 26;

/// Keys that are certain to be left of all runs, at most: with more, and with half of the candidates, single launches are faster.
const MAX_FINALISTS: usize = 16_384;

pub(super) fn run(plan: &Plan, inputs: [&Tensor; 3], is_dense: bool) -> Result<Option<(Selected, Option<Tensor>)>> {
    let [query, ..] = inputs;
    if !query.device().is_cuda() {
        return Ok(None);
    }
    let device = query.device().as_cuda_device()?;
    let Some(selector) = Selector::new(&plan.score, &plan.lists, plan.k, query.dtype(), device)? else {
        return Ok(None);
    };
    let ([b, h, ..], candidates) = (plan.score.query.dims, plan.score.codes.dims[2]);
    let geometry = plan.lists.geometry;
    let step = Step::of_geometry(geometry, plan.k);
    let lists = [b, h, plan.lists.list_len];
    cuda::with_counts(device, |arrived| {
        let mut indices = cuda::output(device, lists.as_slice(), DType::U32)?;
        let mut lens = cuda::output(device, (b, h), DType::U32)?;
        let mut weights = cuda::output(device, lists.as_slice(), DType::F32)?;
        let mut dense = is_dense.then(|| cuda::output(device, (b, h, geometry.n), DType::F32)).transpose()?;
        let mut finalists = cuda::output(device, selector.finalists_len(), DType::U32)?;
        {
            let (storages, places) = cuda::lock(&inputs.map(Some));
            let storages = storages.iter().map(|storage| cuda::storage_of(OP, storage)).collect::<Result<Vec<_>>>()?;
            let of = |place: Option<usize>| storages[place.unwrap_or(0)];
            let inputs = [of(places[0]), of(places[1]), of(places[2])];
            let outputs = [&mut indices, &mut lens, &mut weights];
            selector.run((step, candidates), None, inputs, [&mut finalists, arrived], outputs, dense.as_mut())?;
        }
        let tensor = |storage, dims: &[usize]| {
            Tensor::from_storage(Storage::Cuda(storage), dims.to_vec(), BackpropOp::none(), false)
        };
        let dense = dense.map(|dense| tensor(dense, &[b, h, geometry.n]));
        let (indices, weights) = (tensor(indices, &lists), tensor(weights, &lists));
        Ok((Selected { indices, lens: tensor(lens, &[b, h]), weights }, dense))
    })
}

/// The launch of a plan.
pub(crate) struct Selector {
    kernel: Kernel,
    params: Select,
    rows: usize,
    runs: usize,
    finalists_len: usize,
    shared_bytes: usize,
}

impl Selector {
    /// For at most the candidates, `k` and list length of the plans; None where single launches do better, or alone can.
    pub(crate) fn new(
        plan: &score::Plan,
        lists: &indices_and_weights::Plan,
        k: usize,
        dtype: DType,
        device: &CudaDevice,
    ) -> Result<Option<Self>> {
        let gpu = cuda::prepare(device)?;
        let [b, h, ..] = plan.query.dims;
        let (n, [_, _, pq_dim, n_centroids, pq_len]) = (plan.codes.dims[2], plan.centroids.dims);
        let (rows, runs) = (b * h, n.div_ceil(RUN).max(1));
        let shared_bytes = (TILE + pq_dim * n_centroids) * size_of::<f32>();
        let is_few = runs <= MAX_RUNS && runs.saturating_mul(k) <= MAX_FINALISTS.min(n / 2);
        let room = k + SLACK;
        let finalists_len = rows.saturating_mul(runs).saturating_mul(1 + 2 * room);
        let fits =
            shared_bytes + STATIC_BYTES <= gpu.shared_bytes && rows <= cuda::MAX_COUNTS && finalists_len <= MAX_NUMBERS;
        let share = lists.geometry.n.div_ceil(runs).checked_next_multiple_of(4).map(u32::try_from);
        // Positions are counted by all threads of a block at once.
        let is_counted = lists.geometry.n <= u32::MAX as usize - THREADS as usize;
        let suits = plan.coarse.is_none() && is_few && fits && is_counted && rows > 0;
        let (Ok(key_stride), Some(Ok(share)), true) = (u32::try_from(plan.codes.strides[2]), share, suits) else {
            return Ok(None);
        };
        let params = Select {
            query: plan.query.device(),
            codes: plan.codes.device(),
            centroids: plan.centroids.device(),
            step: Step::of_candidates(n, k),
            candidates: n as u64,
            h: u32_of(OP, "h", h)?,
            group: u32_of(OP, "group", plan.group)?,
            runs: u32_of(OP, "runs", runs)?,
            pq_dim: u32_of(OP, "pq_dim", pq_dim)?,
            pq_len: u32_of(OP, "pq_len", pq_len)?,
            n_centroids: u32_of(OP, "n_centroids", n_centroids)?,
            list_len: u32_of(OP, "list", lists.list_len)?,
            key_stride,
            share,
            room: room as u32,
        };
        let (bytes, suffix) = (score::code_bytes(plan, MAX_CODE_BYTES), cuda::suffix(dtype));
        Ok(Some(Self {
            kernel: Kernel::new(device, Module::Select, format!("select_{suffix}_x{bytes}"))?,
            params,
            rows,
            runs,
            finalists_len,
            shared_bytes,
        }))
    }

    /// Numbers that blocks leave each other: for each list and run a count, and two for each finalist.
    pub(crate) fn finalists_len(&self) -> usize {
        self.finalists_len
    }

    /// Lists, of each of which the blocks are counted.
    pub(crate) fn lists(&self) -> usize {
        self.rows
    }

    /// Selects of the candidates of `step`, of sequences of `lens`, or else of so many.
    pub(crate) fn run(
        &self,
        (step, candidates): (Step, usize),
        lens: Option<&CudaStorage>,
        [query, codes, centroids]: [&CudaStorage; 3],
        [finalists, arrived]: [&mut CudaStorage; 2],
        [indices, list_lens, weights]: [&mut CudaStorage; 3],
        dense: Option<&mut CudaStorage>,
    ) -> Result<()> {
        let params = Params(Select { step, candidates: candidates as u64, ..self.params });
        let launch = self.kernel.launch().input(query)?.input(codes)?.input(centroids)?.input_or_null(lens)?;
        let launch = launch.output(finalists)?.output(arrived)?.output(indices)?.output(weights)?.output(list_lens)?;
        let launch = launch.output_or_null(dense)?.value(&params);
        launch.run([self.runs, self.rows, 1], THREADS, self.shared_bytes)
    }
}
