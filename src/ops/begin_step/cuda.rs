use candle_core::{CudaDevice, CudaStorage, DType, Result, Tensor};

use super::{Appending, Due, Indexed, New, Plan, Plans, Sizes, OP};
use crate::cuda::{self, u32_of, Addresses, Kernel, Module, Params};

/// `kernels/begin_step.cu`
#[repr(C)]
#[derive(Clone, Copy)]
pub(crate) struct Sequence {
    /// Of the keys, and of [`tensors_of`] in their order, of which the first is that of the values; then of what there is in
    /// [`Lens`](crate::cuda::Lens): the length, the counts of blocks that know it and that met, and what they leave each other.
    addresses: [u64; TENSORS + 5],
    /// Between heads, and between elements.
    new_key_strides: [u64; 2],
    new_value_strides: [u64; 2],
    key_stride: u64,
    codes_stride: u64,
    clusters_stride: u64,
    capacity: u64,
}

/// What the tables of a sequence are made of: `kernels/make_tables.cuh`.
#[repr(C)]
#[derive(Clone, Copy)]
pub(crate) struct Source {
    /// Of the query, of the centroids and of those of the clusters.
    pub(crate) addresses: [u64; 3],
    pub(crate) query_stride: u64,
}

/// `kernels/begin_step.cu`
#[repr(C)]
#[derive(Clone, Copy)]
struct BeginStep {
    init_offset: u64,
    block: u32,
    n_sequences: u32,
    n_sources: u32,
    h_kv: u32,
    group: u32,
    bundles: u32,
    heads: u32,
    head_dim: u32,
    pq_dim: u32,
    pq_len: u32,
    n_centroids: u32,
    n_clusters: u32,
    sources: [Source; MAX_SEQUENCES],
    sequences: [Sequence; MAX_SEQUENCES],
}

const TENSORS: usize = 13;

/// The most sequences of a launch.
pub(crate) const MAX_SEQUENCES: usize = 16;

const THREADS: usize = 512;

/// Keys of a block of threads, parts of the clusters, and floats of centroids, as in `kernels/begin_step.cu`.
const GROUP: usize = 32;
const SLICES: usize = 8;
const TILE: usize = 8192;

/// Subspaces, centroids or clusters, and warps of a unit of the tables: `kernels/tables.cuh`.
pub(crate) const SUBSPACES: usize = 8;
const OF_UNIT: usize = 64;
const UNIT_WARPS: usize = THREADS / 32;

/// The tables that a step looks up.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) struct Tables {
    pub(crate) h_kv: usize,
    pub(crate) group: usize,
    /// Heads of a bundle, whose numbers lie side by side, and bundles of a KV head.
    pub(crate) heads: usize,
    pub(crate) bundles: usize,
    pub(crate) head_dim: usize,
    pub(crate) pq_dim: usize,
    pub(crate) n_centroids: usize,
    pub(crate) n_clusters: usize,
}

impl Tables {
    /// None, of caches of these sizes.
    fn of(Sizes { append: [_, head_dim, h_kv], index: [pq_dim, n_centroids, _, n_clusters] }: Sizes) -> Self {
        Self { h_kv, group: 0, heads: 0, bundles: 0, head_dim, pq_dim, n_centroids, n_clusters }
    }

    /// Units of a bundle.
    fn units(&self) -> usize {
        self.pq_dim / SUBSPACES * self.n_centroids.div_ceil(OF_UNIT) + self.n_clusters.div_ceil(OF_UNIT)
    }

    /// Units of so many sequences.
    pub(crate) fn all_units(&self, sequences: usize) -> usize {
        self.units() * self.h_kv * self.bundles * sequences
    }

    /// Floats of a sequence's tables, and of their bounds.
    pub(crate) fn lens(&self) -> [usize; 2] {
        let heads = self.h_kv * self.bundles * self.heads;
        [heads * (self.pq_dim * self.n_centroids + self.n_clusters), heads * self.units() * 2 * UNIT_WARPS]
    }
}

/// What is appended, on its way to launches.
pub(crate) struct Launches {
    /// Of all caches, one after the other.
    sequences: Vec<Sequence>,
    sizes: Sizes,
    due: Due,
    is_indexed: bool,
}

/// The tensors of all caches, for [`cuda::lock`].
pub(crate) fn tensors<'a>(appending: &'a Appending) -> Vec<Option<&'a Tensor>> {
    appending.new.iter().flat_map(tensors_of).collect()
}

impl Launches {
    /// `starts` are addresses of the storages of [`tensors`], where there are any.
    pub(crate) fn new<'a>(
        appending: &'a Appending,
        plans: &Plans,
        starts: &[Option<u64>],
        addresses: &mut Addresses<'a>,
    ) -> Result<Self> {
        let mut sequences = Vec::new();
        for ((plan, new), starts) in plans.each.iter().zip(&appending.new).zip(starts.chunks(TENSORS)) {
            let lens = addresses.of(new.0.lens.storage())?;
            let key_bytes = new.0.cache.dtype().size_in_bytes();
            for b in 0..plan.append.keys.dims[0] {
                sequences.push(Sequence::new(plan, new, starts, lens, key_bytes, b));
            }
        }
        Ok(Self { sequences, sizes: plans.sizes, due: appending.due, is_indexed: appending.has_index() })
    }
}

/// Appends alone, in as many launches as it takes.
pub(super) fn run(appending: &Appending, plans: &Plans) -> Result<()> {
    let (storages, places) = cuda::lock(&tensors(appending));
    let storages = storages.iter().map(|storage| cuda::storage_of(OP, storage)).collect::<Result<Vec<_>>>()?;
    let Some((dtype, device)) = storages.first().map(|storage| cuda::kind(storage)) else { return Ok(()) };
    let stream = device.cuda_stream();
    let mut addresses = Addresses::new(&stream);
    let starts = storages.iter().map(|storage| addresses.of(storage)).collect::<Result<Vec<_>>>()?;
    let starts: Vec<_> = places.iter().map(|place| place.map(|place| starts[place])).collect();
    let launches = Launches::new(appending, plans, &starts, &mut addresses)?;
    for i in 0..launches.sequences.len().div_ceil(MAX_SEQUENCES) {
        launch(device, dtype, Some((&launches, i)), None)?;
    }
    Ok(())
}

/// The `i`-th launch of what is appended, the tables of some sequences, or both.
pub(crate) fn launch(
    device: &CudaDevice,
    dtype: DType,
    appended: Option<(&Launches, usize)>,
    tables: Option<(Tables, &[Source], [&mut CudaStorage; 2])>,
) -> Result<()> {
    let gpu = cuda::prepare(device)?;
    let kernel = Kernel::new(device, Module::BeginStep, format!("begin_step_{}", cuda::suffix(dtype)))?;
    let (together, sizes, due) = match appended {
        Some((all, i)) => (all.sequences.chunks(MAX_SEQUENCES).nth(i).unwrap_or_default(), all.sizes, all.due),
        None => Default::default(),
    };
    let is_indexed = appended.is_some_and(|(all, _)| all.is_indexed);
    let (tables, sources, outputs) = match tables {
        Some((tables, sources, outputs)) => (tables, sources, outputs.map(Some)),
        None => (Tables::of(sizes), Default::default(), [None, None]),
    };
    let Tables { h_kv, group, heads, bundles, head_dim, pq_dim, n_centroids, n_clusters } = tables;
    let mut params = BeginStep {
        init_offset: due.init_offset as u64,
        // More keys than a length can count are never due.
        block: u32::try_from(due.block).unwrap_or(u32::MAX),
        n_sequences: u32_of(OP, "sequences", together.len())?,
        n_sources: u32_of(OP, "sequences", sources.len())?,
        h_kv: u32_of(OP, "h_kv", h_kv)?,
        group: u32_of(OP, "group", group)?,
        bundles: u32_of(OP, "bundles", bundles)?,
        heads: u32_of(OP, "heads", heads)?,
        head_dim: u32_of(OP, "head_dim", head_dim)?,
        pq_dim: u32_of(OP, "pq_dim", pq_dim)?,
        pq_len: u32_of(OP, "pq_len", head_dim.checked_div(pq_dim).unwrap_or(0))?,
        n_centroids: u32_of(OP, "n_centroids", n_centroids)?,
        n_clusters: u32_of(OP, "n_clusters", n_clusters)?,
        sources: [Source::NONE; MAX_SEQUENCES],
        sequences: [Sequence::NONE; MAX_SEQUENCES],
    };
    params.sequences[..together.len()].copy_from_slice(together);
    params.sources[..sources.len()].copy_from_slice(sources);
    // A block on each multiprocessor, as far as there is something to do: those that append beside those that make tables.
    let appending = (2 * h_kv * head_dim * together.len()).div_ceil(THREADS).min(gpu.multiprocessors);
    let making = if sources.is_empty() { 0 } else { tables.all_units(sources.len()) };
    let (mut blocks, mut shared) = (appending + making, TILE);
    if is_indexed {
        // As many parts as there can be at a time.
        blocks = blocks.max(due.block.div_ceil(GROUP).min(2) * pq_dim.max(SLICES) * h_kv * together.len());
        // Behind the tile are a group's keys, as far apart as `stride_of` in the kernel says.
        let [_, _, columns, _] = sizes.index;
        let longest = if n_clusters > 0 { head_dim.max(columns) } else { columns };
        shared += GROUP * (longest.next_multiple_of(4) | 4);
    }
    let [tables, bounds] = outputs;
    let params = Params(params);
    let launch = kernel.launch().output_or_null(tables)?.output_or_null(bounds)?.value(&params);
    let (grid, shared) = ([blocks.min(gpu.multiprocessors), 1, 1], shared * size_of::<f32>());
    match is_indexed {
        true => launch.run_cooperatively(grid, THREADS as u32, shared),
        false => launch.run(grid, THREADS as u32, shared),
    }
}

impl Source {
    const NONE: Self = Self { addresses: [0; 3], query_stride: 0 };
}

/// The tensors of a cache: keys and values, and then in the order of `Sequence` in `kernels/begin_step.cu`.
fn tensors_of<'a>((new, index): &'a (New, Option<Indexed>)) -> [Option<&'a Tensor>; TENSORS] {
    let (index, encoder) = (index.as_ref(), index.as_ref().map(|index| &index.encoder));
    let clusters = index.and_then(|index| index.clusters);
    [
        Some(new.cache),
        index.map(|index| &index.codes),
        index.and_then(|index| index.coarse_codes.as_ref()),
        Some(&new.keys),
        Some(&new.values),
        encoder.map(|encoder| encoder.centroids),
        encoder.and_then(|encoder| encoder.phi),
        encoder.and_then(|encoder| encoder.weights),
        encoder.and_then(|encoder| encoder.coarse),
        clusters.map(|clusters| &clusters.sums),
        clusters.map(|clusters| &clusters.counts),
        new.pages,
        index.and_then(|index| index.pages),
    ]
}

impl Sequence {
    const NONE: Self = Self {
        addresses: [0; TENSORS + 5],
        new_key_strides: [0; 2],
        new_value_strides: [0; 2],
        key_stride: 0,
        codes_stride: 0,
        clusters_stride: 0,
        capacity: 0,
    };

    /// The `b`-th of a cache; `starts` are addresses of the storages of its tensors.
    fn new(
        plan: &Plan,
        new: &(New, Option<Indexed>),
        starts: &[Option<u64>],
        lens: u64,
        key_bytes: usize,
        b: usize,
    ) -> Self {
        let Plan { append, index } = plan;
        let [which, batch, key_stride, ..] = append.cache.strides;
        let mut addresses = [0; TENSORS + 5];
        for (i, (tensor, start)) in tensors_of(new).into_iter().zip(starts).enumerate() {
            let (Some(layout), Some(start)) = (tensor.map(Tensor::layout), start) else { continue };
            // Those along positions as if they began with position 0.
            let (of_sequence, before, element) = match i {
                0 => (b * batch, new.0.first * append.cache.strides[3], key_bytes),
                1 | 2 => (b * layout.stride()[0], new.0.first * layout.stride()[2], size_of::<u8>()),
                3 | 4 => (b * layout.stride()[0], 0, key_bytes),
                // Pages serve all sequences of a cache.
                _ if i >= TENSORS - 2 => (0, 0, size_of::<u32>()),
                _ => (b * layout.stride()[0], 0, size_of::<u32>()),
            };
            let address = |at: usize| {
                start.wrapping_add((layout.start_offset() + at).wrapping_sub(before).wrapping_mul(element) as u64)
            };
            addresses[i + 1] = address(of_sequence);
            if i == 0 {
                addresses[..2].copy_from_slice(&[address(of_sequence), address(of_sequence + which)]);
            }
        }
        let (counts, h_kv) = (new.0.lens, append.keys.dims[1]);
        let at = [b, counts.appended_at(b), counts.met_at(b), counts.nearest_at(b, h_kv)];
        addresses[TENSORS + 1..].copy_from_slice(&at.map(|at| lens + (at * size_of::<u32>()) as u64));
        let strides = |[_, head, _, element]: [usize; 4]| [head as u64, element as u64];
        Self {
            addresses,
            new_key_strides: strides(append.keys.strides),
            new_value_strides: strides(append.values.strides),
            key_stride: key_stride as u64,
            codes_stride: index.as_ref().map_or(0, |into| into.codes.strides[1]) as u64,
            clusters_stride: index.as_ref().and_then(|into| into.coarse).map_or(0, |(codes, _)| codes.strides[1])
                as u64,
            capacity: new.0.capacity as u64,
        }
    }
}
