//! A step over an index in the two launches of `kernels/decode.cu`, whose scores stay where they are made.

use candle_core::{CudaDevice, CudaStorage, DType, Result, Tensor};

use super::workspace::Buffers;
use super::{Plan, SelectionPlan, View, OP};
use crate::cache::Index;
use crate::cuda::{self, u32_of, DeviceView, Gpu, Kernel, Module, Params, Step};

/// `kernels/decode/layout.cuh`
#[repr(C)]
#[derive(Clone, Copy)]
struct Decode {
    query: DeviceView<4>,
    keys: DeviceView<4>,
    values: DeviceView<4>,
    prefix_keys: DeviceView<4>,
    prefix_values: DeviceView<4>,
    codes: DeviceView<3>,
    clusters: DeviceView<3>,
    centroids: DeviceView<5>,
    coarse: DeviceView<4>,
    sums: DeviceView<4>,
    counts: DeviceView<3>,
    step: Step,
    room: u64,
    h: u32,
    h_kv: u32,
    group: u32,
    bundles: u32,
    splits: u32,
    per_warp: u32,
    histogram_at: u32,
    shared_chunks: u32,
    head_dim: u32,
    pq_dim: u32,
    pq_len: u32,
    n_centroids: u32,
    n_clusters: u32,
    has_tail: u32,
    shared: u32,
    scale: f32,
}

const THREADS: usize = 512;
const WARPS: usize = THREADS / 32;

/// Keys that a warp takes at a time.
const CHUNK: usize = 128;

/// Subspaces of a row of the tables, and its bytes.
const SUBSPACES: usize = 8;
const ROW_BYTES: usize = 128;

/// The most heads of a bundle: one 16-byte look-up.
const MAX_HEADS: usize = 4;

/// Shared memory that a block has beside what the launch asks for, at most.
const STATIC_BYTES: usize = 7 << 10;

const MAX_SPLITS: usize = 64;
const MAX_CLUSTERS: usize = 256;
const MAX_GROUP: usize = 64;

/// The most blocks of a grid's second dimension.
const MAX_LISTS: usize = 65_535;

/// Bins of a row's histogram and of a query head's, and words of a `Search`: bins, ranks of two words, shifts and
/// some numbers.
const ROW_BINS: usize = 4096;
const HEAD_BINS: usize = 2048;
const SEARCH_WORDS: usize = 4096 + 2 * 256 + MAX_GROUP + 8;

/// A step's launches.
pub(super) struct Fused {
    search: Kernel,
    attend: Kernel,
    params: Params<Decode>,
    /// (batch element, KV head) pairs
    rows: usize,
    by_kv: bool,
    lists: usize,
    bundles: usize,
    heads: usize,
    splits: usize,
    entries: usize,
    room: usize,
    /// Keys of a list that the blocks have room for together.
    list_room: usize,
    /// The head dimension that the kernel was compiled for.
    padded_dim: usize,
    shared_bytes: usize,
}

impl Fused {
    /// None where the kernels do not suit: for strides and sizes that they do not read, tables that do not fit.
    pub(super) fn new(plan: &Plan, dtype: DType, device: &CudaDevice) -> Result<Option<Self>> {
        let gpu = cuda::prepare(device)?;
        let Some(selection) = &plan.selection else { return Ok(None) };
        let shape = Shape::new(plan, selection);
        if !shape.suits(plan, selection, &gpu) {
            return Ok(None);
        }
        let Shape { b, h, h_kv, group, capacity, head_dim, pq_dim, n_centroids, n_clusters, .. } = shape;
        let init_offset = plan.step.init_offset;
        let heads = shape.heads();
        let (rows, bundles) = (b * h_kv, group.div_ceil(heads));
        let name = if shape.by_kv { "_by_kv" } else { "" };
        let padded_dim = head_dim.next_power_of_two().max(64);
        let teams = if shape.by_kv { rows } else { rows * bundles };
        // A block a multiprocessor, where each has keys for all of its warps.
        let splits = (gpu.multiprocessors / teams).min(capacity.div_ceil(CHUNK * WARPS)).clamp(1, MAX_SPLITS);
        let room = capacity.next_multiple_of(CHUNK);
        let list_room = capacity.next_multiple_of(CHUNK * WARPS * splits);
        let shared = shape.shared(list_room / splits, bundles, &gpu);
        let coarse = selection.score.coarse.as_ref();
        let tail = selection.tail.as_ref();
        let [cb, ch, _, cc, ce] = coarse.map_or([0; 5], |coarse| coarse.centroids.device().strides);
        let params = Decode {
            query: plan.attend.query.device(),
            keys: plan.attend.keys.device().starting_at(2, plan.shared),
            values: plan.attend.values.device().starting_at(2, plan.shared),
            prefix_keys: plan.prefix.map_or(DeviceView::NONE, |[keys, _]| keys.device()),
            prefix_values: plan.prefix.map_or(DeviceView::NONE, |[_, values]| values.device()),
            codes: from_first_position(selection.score.codes.device(), init_offset),
            clusters: coarse.map_or(DeviceView::NONE, |coarse| from_first_position(coarse.codes.device(), init_offset)),
            centroids: selection.score.centroids.device(),
            coarse: coarse.map_or(DeviceView::NONE, |coarse| DeviceView {
                offset: coarse.centroids.device().offset,
                strides: [cb, ch, cc, ce],
            }),
            sums: tail.map_or(DeviceView::NONE, |tail| tail.sums.device()),
            counts: tail.map_or(DeviceView::NONE, |tail| tail.counts.device()),
            step: plan.step,
            room: room as u64,
            h: u32_of(OP, "h", h)?,
            h_kv: u32_of(OP, "h_kv", h_kv)?,
            group: u32_of(OP, "group", group)?,
            bundles: u32_of(OP, "group", bundles)?,
            splits: u32_of(OP, "splits", splits)?,
            per_warp: u32_of(OP, "capacity", list_room / (WARPS * splits))?,
            histogram_at: u32_of(OP, "pq_dim", shared.histogram_at)?,
            shared_chunks: u32_of(OP, "capacity", shared.chunks)?,
            head_dim: u32_of(OP, "head_dim", head_dim)?,
            pq_dim: u32_of(OP, "pq_dim", pq_dim)?,
            pq_len: u32_of(OP, "pq_len", head_dim / pq_dim)?,
            n_centroids: u32_of(OP, "n_centroids", n_centroids)?,
            n_clusters: u32_of(OP, "n_clusters", n_clusters)?,
            has_tail: u32::from(tail.is_some()),
            shared: u32_of(OP, "capacity", plan.shared)?,
            scale: plan.attend.scale,
        };
        u32_of(OP, "capacity", capacity.next_multiple_of(CHUNK * WARPS * MAX_SPLITS))?;
        let suffix = cuda::suffix(dtype);
        let kernel = |name: String| Kernel::new(device, Module::Decode, name);
        Ok(Some(Self {
            search: kernel(format!("decode_search_{suffix}_h{heads}{name}"))?,
            attend: kernel(format!("decode_attend_{suffix}_d{padded_dim}_h{heads}{name}"))?,
            params: Params(params),
            rows,
            by_kv: shape.by_kv,
            lists: if shape.by_kv { rows } else { b * h },
            bundles,
            heads,
            splits,
            entries: pq_dim * n_centroids + n_clusters,
            room,
            list_room,
            padded_dim,
            shared_bytes: shared.bytes,
        }))
    }

    /// Writes the output.
    pub(super) fn run(
        &self,
        lens: &CudaStorage,
        [query, keys, values]: [&CudaStorage; 3],
        prefix: Option<&[Tensor; 2]>,
        index: &Index,
        buffers: &mut Buffers,
        out: &mut CudaStorage,
    ) -> Result<()> {
        let (_, device) = cuda::kind(query);
        let Self { rows, lists, bundles, heads, splits, params, .. } = self;
        let (all_bundles, all_heads) = (rows * bundles, rows * bundles * heads);
        let guards = [&index.codes, &index.centroids].map(|tensor| tensor.storage_and_layout().0);
        let [codes, centroids] = guards.each_ref().map(|guard| cuda::storage_of(OP, guard));
        let (coarse, sums) = (index.coarse.as_ref(), index.clusters.as_ref());
        let guards =
            [coarse.map(|x| &x.codes), coarse.map(|x| &x.centroids), sums.map(|x| &x.sums), sums.map(|x| &x.counts)]
                .map(|tensor| tensor.map(|tensor| tensor.storage_and_layout().0));
        let [clusters, coarse, sums, counts] =
            guards.each_ref().map(|guard| guard.as_ref().map(|guard| cuda::storage_of(OP, guard)).transpose());
        let (codes, centroids, clusters, coarse, sums, counts) =
            (codes?, centroids?, clusters?, coarse?, sums?, counts?);

        let tables = buffers.tables.of(device, all_heads * self.entries, DType::F32)?;
        let scores = buffers.scores.of(device, all_heads * self.room, DType::F32)?;
        let stats = buffers.mass_stats.of(device, 2 * all_heads * MAX_SPLITS, DType::F32)?;
        let searches = buffers.searches.zeroed(device, lists * SEARCH_WORDS, DType::U32)?;

        let mut masses = match self.by_kv {
            true => Some(buffers.mass.of(device, rows * self.room, DType::F32)?),
            false => None,
        };
        let listed = buffers.list_lens.of(device, 2 * lists * splits * WARPS, DType::U32)?;
        let lists = buffers.indices.of(device, lists * self.list_room, DType::U32)?;
        let tail = buffers.tail_masses.of(device, all_heads * splits * MAX_CLUSTERS, DType::U32)?;
        let launch = self.search.launch().input(query)?.input(codes)?.input_or_null(clusters)?.input(centroids)?;
        let launch = launch.input_or_null(coarse)?.input(lens)?.output(tables)?.output(scores)?;
        let launch = launch.output_or_null(masses.as_deref_mut())?.output(stats)?.output(searches)?;
        let launch = launch.output(lists)?.output(listed)?.output(tail)?.value(params);
        let grid = [*splits, if self.by_kv { *rows } else { all_bundles }, 1];
        match splits {
            1 => launch.run(grid, THREADS as u32, self.shared_bytes)?,
            _ => launch.run_cooperatively(grid, THREADS as u32, self.shared_bytes)?,
        }

        let partials = buffers.partials.of(device, all_heads * splits * self.padded_dim, DType::F32)?;
        let partial_stats = buffers.attend_stats.of(device, 2 * all_heads * splits, DType::F32)?;
        let arrived = buffers.arrived.zeroed(device, all_bundles, DType::U32)?;
        // Keys and values share a storage.
        let prefix = prefix.map(|[keys, _]| keys.storage_and_layout().0);
        let prefix = prefix.as_ref().map(|prefix| cuda::storage_of(OP, prefix)).transpose()?.unwrap_or(keys);
        let launch = self.attend.launch().input(query)?.input(keys)?.input(values)?.input(prefix)?;
        let launch = launch.input_or_null(clusters)?;
        let launch = launch.input(scores)?.input_or_null(masses.as_deref())?.input(lens)?;
        let launch = launch.output(searches)?.input(lists)?;
        let launch = launch.input(listed)?.input_or_null(sums)?.input_or_null(counts)?.input(tail)?;
        let launch = launch.output(partials)?.output(partial_stats)?.output(arrived)?;
        let launch = launch.output(out)?.value(params);
        launch.run([*splits, all_bundles, 1], if self.padded_dim > 128 { 256 } else { 512 }, 0)
    }
}

/// The shared memory of a block that searches.
struct Shared {
    histogram_at: usize,
    /// Chunks of scores.
    chunks: usize,
    bytes: usize,
}

/// The sizes that a step is made of.
struct Shape {
    b: usize,
    h: usize,
    h_kv: usize,
    group: usize,
    capacity: usize,
    head_dim: usize,
    pq_dim: usize,
    n_centroids: usize,
    n_clusters: usize,
    by_kv: bool,
}

impl Shape {
    fn new(plan: &Plan, selection: &SelectionPlan) -> Self {
        let ([b, h, _, head_dim], [_, h_kv, room, _]) = (plan.attend.query.dims, plan.attend.keys.dims);
        let capacity = plan.shared + room;
        let [_, _, pq_dim, n_centroids, _] = selection.score.centroids.dims;
        let n_clusters = selection.score.coarse.as_ref().map_or(0, |coarse| coarse.centroids.dims[3]);
        let by_kv = selection.mass.is_some();
        Self { b, h, h_kv, group: h / h_kv, capacity, head_dim, pq_dim, n_centroids, n_clusters, by_kv }
    }

    /// Heads of a bundle.
    fn heads(&self) -> usize {
        self.group.next_power_of_two().min(MAX_HEADS)
    }

    /// The histogram of a block, or its histograms.
    fn histogram_bytes(&self) -> usize {
        size_of::<u32>() * if self.by_kv { ROW_BINS } else { self.heads() * HEAD_BINS }
    }

    /// Where the histogram of a block lies: behind the tables, and what later takes their place.
    fn histogram_at(&self) -> usize {
        let tables = (self.pq_dim / SUBSPACES * self.n_centroids + self.n_clusters) * ROW_BYTES;
        let heads = if self.by_kv { self.group } else { self.heads() };
        tables.max(heads * MAX_CLUSTERS * size_of::<u32>())
    }

    /// What a block that searches `keys` has in shared memory.
    fn shared(&self, keys: usize, bundles: usize, gpu: &Gpu) -> Shared {
        let (histogram_at, chunk_bytes) = (self.histogram_at(), CHUNK * self.heads() * size_of::<f32>());
        let others = histogram_at + self.histogram_bytes();
        let wanted = keys / CHUNK * if self.by_kv { bundles } else { 1 };
        let chunks = ((gpu.shared_bytes - STATIC_BYTES - others) / chunk_bytes).min(wanted);
        Shared { histogram_at, chunks, bytes: others + chunks * chunk_bytes }
    }

    fn suits(&self, plan: &Plan, selection: &SelectionPlan, gpu: &Gpu) -> bool {
        let attend = &plan.attend;
        let mut rows = vec![attend.keys.device(), attend.values.device()];
        rows.extend(plan.prefix.iter().flatten().map(View::device));
        let coarse = selection.score.coarse.as_ref();
        let (centroids, codes) = (selection.score.centroids.device(), selection.score.codes.device());
        let codes = from_first_position(codes, plan.step.init_offset);
        let clusters = coarse.map(|coarse| from_first_position(coarse.codes.device(), plan.step.init_offset));
        self.pq_dim.is_multiple_of(SUBSPACES)
            && (self.head_dim / self.pq_dim).is_multiple_of(4)
            && self.head_dim.is_multiple_of(8)
            && self.group <= MAX_GROUP
            && self.b * self.h <= MAX_LISTS
            && self.histogram_at() + self.histogram_bytes() + STATIC_BYTES <= gpu.shared_bytes
            && attend.scale > 0.0
            && attend.scale.is_finite()
            && rows.iter().all(|view| is_aligned(view, 8))
            && is_aligned(&centroids, 4)
            && coarse.is_none_or(|coarse| is_aligned(&coarse.centroids.device(), 4))
            && codes.strides[2] == self.pq_dim as u64
            && (codes.offset | codes.strides[0] | codes.strides[1]).is_multiple_of(16)
            && clusters.is_none_or(|view| {
                view.strides[2] == 1 && (view.offset | view.strides[0] | view.strides[1]).is_multiple_of(4)
            })
            && selection.tail.as_ref().is_none_or(|tail| is_aligned(&tail.sums.device(), 4))
    }
}

/// Whether rows of adjacent elements start at multiples of `width`.
fn is_aligned<const N: usize>(view: &DeviceView<N>, width: u64) -> bool {
    let all = view.strides[..N - 1].iter().fold(view.offset, |all, stride| all | stride);
    view.strides[N - 1] == 1 && all.is_multiple_of(width)
}

/// Of codes that start at position `init_offset`: as if they started at position 0.
fn from_first_position(view: DeviceView<4>, init_offset: u64) -> DeviceView<3> {
    let [b, h, position, _] = view.strides;
    DeviceView { offset: view.offset.wrapping_sub(init_offset * position), strides: [b, h, position] }
}
