use candle_core::{CudaStorage, DType, Result};

use super::{Coarse, Plan, OP};
use crate::cuda::{self, u32_of, DeviceView, Kernel, Module, Params, Step};

/// `kernels/score.cu`
#[repr(C)]
#[derive(Clone, Copy)]
struct Score {
    query: DeviceView<4>,
    codes: DeviceView<4>,
    centroids: DeviceView<5>,
    clusters: DeviceView<4>,
    coarse: DeviceView<5>,
    step: Step,
    row: u64,
    h_kv: u32,
    group: u32,
    parts: u32,
    pq_dim: u32,
    pq_len: u32,
    n_centroids: u32,
    n_clusters: u32,
}

const LUT_THREADS: usize = 128;
const SCORE_THREADS: usize = 512;

/// The most heads a table entry serves: one 16-byte look-up.
const MAX_LANES: usize = 4;

/// The most code bytes that a thread loads at once.
const MAX_CODE_BYTES: usize = 16;

/// Keys of a block, at least: fewer would not pay for the copy of its tables.
const MIN_KEYS: usize = 4 * SCORE_THREADS;

pub(super) fn run(
    plan: &Plan,
    coarse: Option<&Coarse>,
    query: &CudaStorage,
    codes: &CudaStorage,
    centroids: &CudaStorage,
) -> Result<CudaStorage> {
    let (_, device) = cuda::kind(query);
    let kernels = Kernels::new(plan, query)?;
    let ([b, h, ..], n) = (plan.query.dims, plan.codes.dims[2]);
    let mut tables = cuda::output(device, kernels.tables_len(), DType::F32)?;
    let mut scores = cuda::output(device, (b, h, n), DType::F32)?;
    let step = Step::of_candidates(n, 0);
    kernels.run(step, None, [query, codes, centroids], coarse, &mut tables, &mut scores)?;
    Ok(scores)
}

/// Both launches of a plan.
pub(crate) struct Kernels {
    lut: Kernel,
    score: Kernel,
    params: Score,
    tables_len: usize,
    tables: usize,
    blocks: usize,
    shared_bytes: usize,
}

impl Kernels {
    pub(crate) fn new(plan: &Plan, query: &CudaStorage) -> Result<Self> {
        let (dtype, device) = cuda::kind(query);
        let gpu = cuda::prepare(device)?;
        let [_, h_kv, n, pq_dim] = plan.codes.dims;
        let [b, _, _, n_centroids, pq_len] = plan.centroids.dims;
        let n_clusters = plan.coarse.as_ref().map_or(0, |coarse| coarse.centroids.dims[3]);
        let entries = pq_dim * n_centroids + n_clusters;
        let table_bytes = |lanes: usize| lanes * entries * size_of::<f32>();
        let mut lanes = plan.group.next_power_of_two().min(MAX_LANES);
        while lanes > 1 && table_bytes(lanes) > gpu.shared_bytes {
            lanes /= 2;
        }
        let is_shared = table_bytes(lanes) <= gpu.shared_bytes;
        let (place, bytes) = if is_shared { ("", code_bytes(plan, MAX_CODE_BYTES)) } else { ("_global", 1) };
        let parts = plan.group.div_ceil(lanes);
        let tables = b * h_kv * parts;
        let params = Score {
            query: plan.query.device(),
            codes: plan.codes.device(),
            centroids: plan.centroids.device(),
            clusters: plan.coarse.as_ref().map_or(DeviceView::NONE, |coarse| coarse.codes.device()),
            coarse: plan.coarse.as_ref().map_or(DeviceView::NONE, |coarse| coarse.centroids.device()),
            step: Step::of_candidates(n, 0),
            row: n as u64,
            h_kv: u32_of(OP, "h_kv", h_kv)?,
            group: u32_of(OP, "group", plan.group)?,
            parts: u32_of(OP, "parts", parts)?,
            pq_dim: u32_of(OP, "pq_dim", pq_dim)?,
            pq_len: u32_of(OP, "pq_len", pq_len)?,
            n_centroids: u32_of(OP, "n_centroids", n_centroids)?,
            n_clusters: u32_of(OP, "n_clusters", n_clusters)?,
        };
        Ok(Self {
            lut: Kernel::new(device, Module::Score, format!("score_lut_{}_h{lanes}", cuda::suffix(dtype)))?,
            score: Kernel::new(device, Module::Score, format!("score_h{lanes}_x{bytes}{place}"))?,
            params,
            tables_len: tables * lanes * entries,
            tables,
            // Two blocks a multiprocessor.
            blocks: (2 * gpu.multiprocessors).div_ceil(tables.max(1)).min(n.div_ceil(MIN_KEYS)),
            shared_bytes: if is_shared { table_bytes(lanes) } else { 0 },
        })
    }

    /// Elements of the tables.
    pub(crate) fn tables_len(&self) -> usize {
        self.tables_len
    }

    /// Scores the candidates of `step`, of sequences of `lens`, from their codes, of which the plan has at least as many.
    pub(crate) fn run(
        &self,
        step: Step,
        lens: Option<&CudaStorage>,
        [query, codes, centroids]: [&CudaStorage; 3],
        coarse: Option<&Coarse>,
        tables: &mut CudaStorage,
        scores: &mut CudaStorage,
    ) -> Result<()> {
        if self.blocks == 0 {
            return Ok(());
        }
        let guards =
            coarse.map(|coarse| (coarse.codes.storage_and_layout().0, coarse.centroids.storage_and_layout().0));
        let (clusters, coarse) = match &guards {
            None => (None, None),
            Some((codes, centroids)) => (Some(cuda::storage_of(OP, codes)?), Some(cuda::storage_of(OP, centroids)?)),
        };
        let params = Params(Score { step, ..self.params });
        let Score { n_centroids, n_clusters, pq_dim, .. } = self.params;
        let tiles = (n_centroids.max(n_clusters) as usize).div_ceil(LUT_THREADS);
        let subspaces = pq_dim as usize + usize::from(n_clusters > 0);
        let launch = self.lut.launch().input(query)?.input(centroids)?.input_or_null(coarse)?.output(tables)?;
        launch.value(&params).run([tiles, subspaces, self.tables], LUT_THREADS as u32, 0)?;
        let launch = self.score.launch().input(codes)?.input_or_null(clusters)?.input(tables)?.input_or_null(lens)?;
        launch.output(scores)?.value(&params).run(
            [self.blocks, self.tables, 1],
            SCORE_THREADS as u32,
            self.shared_bytes,
        )
    }
}

/// The most code bytes, a power of two up to `most`, that can be loaded at once: every key's codes start at a multiple of them.
pub(crate) fn code_bytes(plan: &Plan, most: usize) -> usize {
    let DeviceView { offset, strides: [b, h, key, _] } = plan.codes.device();
    let pq_dim = plan.codes.dims[3] as u64;
    1 << (offset | b | h | key | pq_dim | most as u64).trailing_zeros()
}
