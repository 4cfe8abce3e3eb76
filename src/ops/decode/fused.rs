//! Steps over indexes in three launches: that of [`begin_step`], and the two of `kernels/decode.cu`, whose scores stay where they
//! are made.

use candle_core::{CudaDevice, CudaStorage, DType, Layout, Result, Tensor};

use super::workspace::Buffers;
use super::{score, Plan, SelectionPlan, Sequences, View, OP};
use crate::cuda::{self, u32_of, Addresses, DeviceView, Gpu, Kernel, Module, Params, Step};
use crate::ops::begin_step::{self, Appending, Source, Tables, MAX_SEQUENCES, SUBSPACES};
use crate::ops::PAGE;

/// `kernels/decode/layout.cuh`
#[repr(C)]
#[derive(Clone, Copy)]
struct Sequence {
    /// Of the query, of the first [`tensors`], and of the length; until a launch, bytes from the beginnings of their storages.
    addresses: [u64; ADDRESSES],
    query_stride: u64,
    key_stride: u64,
    prefix_stride: u64,
    codes_stride: u64,
    clusters_stride: u64,
    room_before: u64,
    lists_before: u64,
    room: u32,
    per_warp: u32,
    capacity: u32,
    ahead: u32,
    shared: u32,
    splits: u32,
    first_block: u32,
}

/// `kernels/decode/layout.cuh`
#[repr(C)]
#[derive(Clone, Copy)]
struct Decode {
    step: Step,
    n_sequences: u32,
    first_sequence: u32,
    h: u32,
    h_kv: u32,
    group: u32,
    bundles: u32,
    splits: u32,
    histogram_at: u32,
    shared_chunks: u32,
    head_dim: u32,
    pq_dim: u32,
    n_centroids: u32,
    n_clusters: u32,
    has_tail: u32,
    scale: f32,
    sequences: [Sequence; MAX_SEQUENCES],
}

/// Tensors of a cache that a sequence has addresses of, beside the query and the length; and all with those of its tables.
const OF_SEQUENCE: usize = 10;
const ADDRESSES: usize = OF_SEQUENCE + 2;
const TENSORS: usize = OF_SEQUENCE + 2;

/// Of a block of `search`.
const THREADS: usize = 512;
const WARPS: usize = THREADS / 32;

/// Keys that a warp takes at a time, of one page.
const CHUNK: usize = PAGE;

/// Bytes of a row of the tables, which has SUBSPACES subspaces.
const ROW_BYTES: usize = 128;

/// The most heads of a bundle: one 16-byte look-up.
const MAX_HEADS: usize = 4;

/// Shared memory that a block has beside what the launch asks for, at most.
const STATIC_BYTES: usize = 2 << 10;

const MAX_SPLITS: usize = 64;
const MAX_CLUSTERS: usize = 256;
const MAX_GROUP: usize = 64;

/// The most bundles of a sequence: they are a grid's second dimension.
const MAX_BUNDLES: usize = 65_535;

/// The most units of a launch's tables: `divide` in `kernels/make_tables.cuh` is exact below.
const MAX_UNITS: usize = 1 << 21;

/// Bins of a row's histogram and of a query head's, and words of a `Search`: bins, ranks of two words, shifts and
/// some numbers.
const ROW_BINS: usize = 4096;
const HEAD_BINS: usize = 2048;
const SEARCH_WORDS: usize = 4096 + 2 * 1024 + MAX_GROUP + 8;

/// The launches of a step.
pub(super) struct Fused {
    search: Kernel,
    attend: Kernel,
    shape: Shape,
    launches: Vec<Together>,
}

/// Sequences that are launched together.
struct Together {
    params: Decode,
    members: Vec<Member>,
}

/// A sequence of a step.
#[derive(Clone, Copy)]
struct Member {
    /// The cache that it is of, and roughly its length.
    cache: usize,
    len: usize,
    sequence: Sequence,
    source: Source,
}

impl Fused {
    /// A step of every sequence of some caches. None where the kernels do not suit: for strides and sizes that they do not
    /// read, tables that do not fit, or caches that differ in more than their lengths.
    pub(super) fn new(plans: &[Plan], caches: &[Sequences], dtype: DType, device: &CudaDevice) -> Result<Option<Self>> {
        let gpu = cuda::prepare(device)?;
        let mut shape = None;
        let mut members = Vec::new();
        for (i, (plan, cache)) in plans.iter().zip(caches).enumerate() {
            let Some(selection) = &plan.selection else { return Ok(None) };
            let own = Shape::new(plan, selection);
            if !own.suits(plan, selection, &gpu) || *shape.get_or_insert(own) != own {
                return Ok(None);
            }
            for b in 0..plan.attend.query.dims[0] {
                let sequence = Sequence::new(plan, selection, cache.ahead, dtype, b)?;
                let source = source_of(&selection.score, dtype, b);
                members.push(Member { cache: i, len: cache.len, sequence, source });
            }
        }
        let (Some(shape), Some(plan)) = (shape, plans.first()) else { return Ok(None) };
        let (heads, suffix, name) = (shape.heads(), cuda::suffix(dtype), if shape.by_kv { "_by_kv" } else { "" });
        let kernel = |name: String| Kernel::new(device, Module::Decode, name);
        let together = |(i, members): (usize, &[Member])| {
            let params = shape.params(plan, i * MAX_SEQUENCES, members, &gpu)?;
            Ok(Together { params, members: members.to_vec() })
        };
        let launches = members.chunks(MAX_SEQUENCES).enumerate().map(together).collect::<Result<Vec<_>>>()?;
        Ok(Some(Self {
            search: kernel(format!("decode_search_h{heads}{name}"))?,
            attend: kernel(format!("decode_attend_{suffix}_d{}_h{heads}{name}", shape.padded_dim()))?,
            shape,
            launches,
        }))
    }

    /// Writes the output, `[caches, b, h, head_dim]`.
    pub(super) fn run(
        &self,
        query: &Tensor,
        caches: &[Sequences],
        appending: Option<&(&Appending, begin_step::Plans)>,
        buffers: &mut Buffers,
        out: &mut CudaStorage,
    ) -> Result<()> {
        let device = query.device().as_cuda_device()?;
        let stream = device.cuda_stream();
        let mut all = vec![Some(query)];
        all.extend(caches.iter().flat_map(tensors));
        let of_caches = all.len();
        all.extend(appending.iter().flat_map(|(appending, _)| begin_step::tensors(appending)));
        let (storages, places) = cuda::lock(&all);
        let mut addresses = Addresses::new(&stream);
        let of_storages = storages.iter().map(|storage| addresses.of(cuda::storage_of(OP, storage)?));
        let of_storages = of_storages.collect::<Result<Vec<_>>>()?;
        let starts: Vec<_> = places.into_iter().map(|place| place.map(|place| of_storages[place])).collect();
        let (starts, of_new) = starts.split_at(of_caches);
        let (of_query, starts) = (starts[0].unwrap_or(0), &starts[1..]);
        let of_lens = caches.iter().map(|cache| addresses.of(cache.lens.storage())).collect::<Result<Vec<_>>>()?;
        let appended = match appending {
            None => None,
            Some((appending, plans)) => Some(begin_step::Launches::new(appending, plans, of_new, &mut addresses)?),
        };
        for (i, Together { params, members }) in self.launches.iter().enumerate() {
            let (mut params, mut sources) = (*params, Vec::new());
            for (sequence, member) in params.sequences.iter_mut().zip(members) {
                let mut source = member.source;
                let [query, tensors @ .., len] = &mut sequence.addresses;
                let [query_of_tables, made_of @ ..] = &mut source.addresses;
                for (address, start) in tensors.iter_mut().chain(made_of).zip(&starts[member.cache * TENSORS..]) {
                    *address = start.map_or(0, |start| address.wrapping_add(start));
                }
                *query = query.wrapping_add(of_query);
                *query_of_tables = query_of_tables.wrapping_add(of_query);
                *len = len.wrapping_add(of_lens[member.cache]);
                sources.push(source);
            }
            let appended = appended.as_ref().map(|all| (all, i));
            self.launch(&Params(params), &sources, appended, device, buffers, out)?;
        }
        Ok(())
    }

    /// The launches of some sequences, to which `appended` is appended.
    fn launch(
        &self,
        params: &Params<Decode>,
        sources: &[Source],
        appended: Option<(&begin_step::Launches, usize)>,
        device: &CudaDevice,
        buffers: &mut Buffers,
        out: &mut CudaStorage,
    ) -> Result<()> {
        let (shape, Params(decode)) = (&self.shape, params);
        let (n, splits) = (decode.n_sequences as usize, decode.splits as usize);
        let (bundles, lists) = (n * shape.h_kv * shape.bundles(), n * shape.lists());
        let (heads, padded_dim) = (bundles * shape.heads(), shape.padded_dim());
        let (mut room, mut list_room, mut blocks) = (0, 0, 0);
        for sequence in &decode.sequences[..n] {
            room += sequence.room as usize;
            list_room += shape.lists() * sequence.list_room();
            blocks += shape.teams() * sequence.splits as usize;
        }

        let made = shape.tables();
        let [tables, bounds] = made.lens();
        let tables = buffers.tables.of(device, n * tables, DType::F32)?;
        let bounds = buffers.bounds.of(device, n * bounds, DType::F32)?;
        let (dtype, _) = cuda::kind(out);
        begin_step::launch(device, dtype, appended, Some((made, sources, [&mut *tables, &mut *bounds])))?;

        let scores = buffers.scores.of(device, room * heads / n, DType::F32)?;
        let mut masses = match shape.by_kv {
            true => Some(buffers.mass.of(device, room * shape.h_kv, DType::F32)?),
            false => None,
        };
        let stats = buffers.mass_stats.of(device, 2 * heads * MAX_SPLITS, DType::F32)?;
        let searches = buffers.searches.zeroed(device, lists * SEARCH_WORDS, DType::U32)?;
        let listed = buffers.list_lens.of(device, 2 * lists * splits * WARPS, DType::U32)?;
        let lists = buffers.indices.of(device, list_room, DType::U32)?;
        let tail = buffers.tail_masses.of(device, heads * splits * MAX_CLUSTERS, DType::U32)?;
        let launch =
            self.search.launch().input(tables)?.input(bounds)?.output(scores)?.output_or_null(masses.as_deref_mut())?;
        let launch = launch.output(stats)?.output(searches)?.output(lists)?.output(listed)?.output(tail)?;
        let launch = launch.value(params);
        let shared = decode.histogram_at as usize
            + shape.histogram_bytes()
            + decode.shared_chunks as usize * shape.chunk_bytes();
        match splits {
            1 => launch.run([blocks, 1, 1], THREADS as u32, shared)?,
            _ => launch.run_cooperatively([blocks, 1, 1], THREADS as u32, shared)?,
        }

        let partials = buffers.partials.of(device, heads * splits * padded_dim, DType::F32)?;
        let partial_stats = buffers.attend_stats.of(device, 2 * heads * splits, DType::F32)?;
        let arrived = buffers.arrived.zeroed(device, bundles, DType::U32)?;
        let launch = self.attend.launch().input(scores)?.input_or_null(masses.as_deref())?.output(searches)?;
        let launch = launch.input(lists)?.input(listed)?.input(tail)?;
        let launch = launch.output(partials)?.output(partial_stats)?.output(arrived)?.output(out)?.value(params);
        launch.run([splits, bundles / n, n], if padded_dim > 128 { 256 } else { 512 }, 0)
    }
}

/// What the launches of a step over one cache follow from: layouts and dtypes of the query and of the cache's tensors.
pub(super) fn forms<'a>(query: &'a Tensor, cache: &'a Sequences) -> impl Iterator<Item = Option<(&'a Layout, DType)>> {
    let all = std::iter::once(Some(query)).chain(tensors(cache));
    all.map(|tensor| tensor.map(|tensor| (tensor.layout(), tensor.dtype())))
}

/// The tensors of a cache: in the order of `Sequence` in `kernels/decode/layout.cuh`, and then what tables are made of.
fn tensors<'a>(cache: &'a Sequences) -> [Option<&'a Tensor>; TENSORS] {
    let (index, prefix) = (cache.index.as_ref(), cache.prefix.as_ref());
    let coarse = index.and_then(|index| index.coarse.as_ref());
    let clusters = index.and_then(|index| index.clusters.as_ref());
    [
        Some(&cache.keys),
        Some(&cache.values),
        prefix.map(|[keys, _]| keys),
        prefix.map(|[_, values]| values),
        index.map(|index| &index.codes),
        coarse.map(|coarse| &coarse.codes),
        clusters.map(|clusters| &clusters.sums),
        clusters.map(|clusters| &clusters.counts),
        cache.pages.as_ref().map(|[kv, _]| kv),
        cache.pages.as_ref().map(|[_, codes]| codes),
        index.map(|index| &index.centroids),
        coarse.map(|coarse| &coarse.centroids),
    ]
}

impl Sequence {
    const NONE: Self = Self {
        addresses: [0; ADDRESSES],
        query_stride: 0,
        key_stride: 0,
        prefix_stride: 0,
        codes_stride: 0,
        clusters_stride: 0,
        room_before: 0,
        lists_before: 0,
        room: 0,
        per_warp: 0,
        capacity: 0,
        ahead: 0,
        shared: 0,
        splits: 0,
        first_block: 0,
    };

    /// The `b`-th sequence of a cache, which has no place in a launch yet.
    fn new(plan: &Plan, selection: &SelectionPlan, ahead: usize, dtype: DType, b: usize) -> Result<Self> {
        let (attend, score, tail) = (&plan.attend, &selection.score, selection.tail.as_ref());
        let (key_bytes, capacity) = (dtype.size_in_bytes(), plan.capacity);
        u32_of(OP, "capacity", capacity.next_multiple_of(CHUNK * WARPS * MAX_SPLITS))?;
        let coarse = score.coarse.as_ref();
        let codes = from_first_position(score.codes.device(), plan.step.init_offset);
        let clusters =
            coarse.map_or(DeviceView::NONE, |coarse| from_first_position(coarse.codes.device(), plan.step.init_offset));
        let [prefix_keys, prefix_values] =
            plan.prefix.map_or([DeviceView::NONE; 2], |prefix| prefix.map(|x| x.device()));
        let (query, keys) = (attend.query.device(), attend.keys.device().starting_at(2, plan.shared));
        Ok(Self {
            addresses: [
                bytes_to(query, b, key_bytes),
                bytes_to(keys, b, key_bytes),
                bytes_to(attend.values.device().starting_at(2, plan.shared), b, key_bytes),
                bytes_to(prefix_keys, b, key_bytes),
                bytes_to(prefix_values, b, key_bytes),
                bytes_to(codes, b, 1),
                bytes_to(clusters, b, 1),
                tail.map_or(0, |tail| bytes_to(tail.sums.device(), b, size_of::<f32>())),
                tail.map_or(0, |tail| bytes_to(tail.counts.device(), b, size_of::<u32>())),
                0, // pages serve all sequences of a cache
                0,
                (b * size_of::<u32>()) as u64,
            ],
            query_stride: query.strides[1],
            key_stride: keys.strides[1],
            prefix_stride: prefix_keys.strides[1],
            codes_stride: codes.strides[1],
            clusters_stride: clusters.strides[1],
            room: u32_of(OP, "capacity", capacity.next_multiple_of(CHUNK))?,
            capacity: u32_of(OP, "capacity", capacity)?,
            ahead: u32_of(OP, "ahead", ahead)?,
            shared: u32_of(OP, "capacity", plan.shared)?,
            ..Self::NONE
        })
    }

    /// Positions of a list.
    fn list_room(&self) -> usize {
        self.per_warp as usize * WARPS * self.splits as usize
    }
}

/// What the tables of a cache's `b`-th sequence are made of.
fn source_of(score: &score::Plan, dtype: DType, b: usize) -> Source {
    let (query, floats) = (score.query.device(), size_of::<f32>());
    Source {
        addresses: [
            bytes_to(query, b, dtype.size_in_bytes()),
            bytes_to(score.centroids.device(), b, floats),
            score.coarse.as_ref().map_or(0, |coarse| bytes_to(coarse.centroids.device(), b, floats)),
        ],
        query_stride: query.strides[1],
    }
}

/// Where the `b`-th of what lies along the first dimension begins, in bytes.
fn bytes_to<const N: usize>(view: DeviceView<N>, b: usize, element: usize) -> u64 {
    (b as u64).wrapping_mul(view.strides[0]).wrapping_add(view.offset).wrapping_mul(element as u64)
}

/// Shares `blocks` among sequences of so many keys, of which each can use as many as its second number says: as even as whole
/// blocks allow. Those of equal lengths have equally many.
fn share(mut blocks: usize, sequences: &[(usize, usize)]) -> Vec<usize> {
    let mut shares = vec![1; sequences.len()];
    blocks = blocks.saturating_sub(shares.len());
    loop {
        // Who has the most keys a block, and could have another one.
        let needy = |i: &usize| shares[*i] < sequences[*i].1;
        let load = |i: usize| sequences[i].0 as f64 / shares[i] as f64;
        let most = (0..shares.len()).filter(needy).map(load).fold(0.0, f64::max);
        let of_most: Vec<_> = (0..shares.len()).filter(needy).filter(|i| load(*i) == most).collect();
        if of_most.is_empty() || of_most.len() > blocks {
            return shares;
        }
        blocks -= of_most.len();
        of_most.into_iter().for_each(|i| shares[i] += 1);
    }
}

/// The sizes that the steps of all caches have in common.
#[derive(Clone, Copy, PartialEq, Eq)]
struct Shape {
    h: usize,
    h_kv: usize,
    head_dim: usize,
    pq_dim: usize,
    n_centroids: usize,
    n_clusters: usize,
    by_kv: bool,
    has_tail: bool,
}

impl Shape {
    fn new(plan: &Plan, selection: &SelectionPlan) -> Self {
        let ([_, h, _, head_dim], [_, h_kv, ..]) = (plan.attend.query.dims, plan.attend.keys.dims);
        let [_, _, pq_dim, n_centroids, _] = selection.score.centroids.dims;
        let n_clusters = selection.score.coarse.as_ref().map_or(0, |coarse| coarse.centroids.dims[3]);
        let (by_kv, has_tail) = (selection.mass.is_some(), selection.tail.is_some());
        Self { h, h_kv, head_dim, pq_dim, n_centroids, n_clusters, by_kv, has_tail }
    }

    fn group(&self) -> usize {
        self.h / self.h_kv
    }

    /// Heads of a bundle.
    fn heads(&self) -> usize {
        self.group().next_power_of_two().min(MAX_HEADS)
    }

    /// Bundles of a KV head.
    fn bundles(&self) -> usize {
        self.group().div_ceil(self.heads())
    }

    /// Lists of a sequence.
    fn lists(&self) -> usize {
        if self.by_kv {
            self.h_kv
        } else {
            self.h
        }
    }

    /// Teams of blocks of a sequence.
    fn teams(&self) -> usize {
        if self.by_kv {
            self.h_kv
        } else {
            self.h_kv * self.bundles()
        }
    }

    fn tables(&self) -> Tables {
        let &Self { h_kv, head_dim, pq_dim, n_centroids, n_clusters, .. } = self;
        let (group, heads, bundles) = (self.group(), self.heads(), self.bundles());
        Tables { h_kv, group, heads, bundles, head_dim, pq_dim, n_centroids, n_clusters }
    }

    /// The head dimension that the kernel was compiled for.
    fn padded_dim(&self) -> usize {
        self.head_dim.next_power_of_two().max(64)
    }

    /// The histogram of a block, or its histograms.
    fn histogram_bytes(&self) -> usize {
        size_of::<u32>() * if self.by_kv { ROW_BINS } else { self.heads() * HEAD_BINS }
    }

    /// Where the histogram of a block lies: behind the tables, and what later takes their place.
    fn histogram_at(&self) -> usize {
        let tables = (self.pq_dim / SUBSPACES * self.n_centroids + self.n_clusters) * ROW_BYTES;
        let heads = self.heads() * if self.by_kv { self.bundles() } else { 1 };
        tables.max(heads * MAX_CLUSTERS * size_of::<u32>())
    }

    /// Scores of a chunk of keys.
    fn chunk_bytes(&self) -> usize {
        CHUNK * self.heads() * size_of::<f32>()
    }

    /// The parameters of a launch of some sequences, of which `first` are launched before.
    fn params(&self, plan: &Plan, first: usize, members: &[Member], gpu: &Gpu) -> Result<Decode> {
        let bundles = self.bundles();
        // A block a multiprocessor, where each has keys for all of its warps.
        let useful = |sequence: &Sequence| (sequence.capacity as usize).div_ceil(CHUNK * WARPS).clamp(1, MAX_SPLITS);
        let wanted: Vec<_> = members.iter().map(|member| (member.len, useful(&member.sequence))).collect();
        let shares = share(gpu.multiprocessors / self.teams(), &wanted);
        let mut decode = Decode {
            step: plan.step,
            n_sequences: members.len() as u32,
            first_sequence: u32_of(OP, "b", first)?,
            h: u32_of(OP, "h", self.h)?,
            h_kv: u32_of(OP, "h_kv", self.h_kv)?,
            group: u32_of(OP, "group", self.group())?,
            bundles: u32_of(OP, "group", bundles)?,
            splits: 1,
            histogram_at: u32_of(OP, "pq_dim", self.histogram_at())?,
            shared_chunks: 0,
            head_dim: u32_of(OP, "head_dim", self.head_dim)?,
            pq_dim: u32_of(OP, "pq_dim", self.pq_dim)?,
            n_centroids: u32_of(OP, "n_centroids", self.n_centroids)?,
            n_clusters: u32_of(OP, "n_clusters", self.n_clusters)?,
            has_tail: u32::from(self.has_tail),
            scale: plan.attend.scale,
            sequences: [Sequence::NONE; MAX_SEQUENCES],
        };
        let (mut room_before, mut lists_before, mut first_block, mut chunks) = (0, 0, 0, 0);
        for ((to, Member { sequence: from, .. }), splits) in decode.sequences.iter_mut().zip(members).zip(shares) {
            let list_room = (from.capacity as usize).next_multiple_of(CHUNK * WARPS * splits);
            *to = Sequence {
                room_before,
                lists_before,
                first_block: u32_of(OP, "b", first_block)?,
                splits: splits as u32,
                per_warp: u32_of(OP, "capacity", list_room / (WARPS * splits))?,
                ..*from
            };
            room_before += u64::from(from.room);
            lists_before += (self.lists() * list_room) as u64;
            first_block += self.teams() * splits;
            chunks = chunks.max(list_room / splits / CHUNK * if self.by_kv { bundles } else { 1 });
            decode.splits = decode.splits.max(splits as u32);
        }
        let others = self.histogram_at() + self.histogram_bytes() + STATIC_BYTES;
        let available = gpu.shared_bytes.saturating_sub(others) / self.chunk_bytes();
        decode.shared_chunks = u32_of(OP, "capacity", chunks.min(available))?;
        Ok(decode)
    }

    fn suits(&self, plan: &Plan, selection: &SelectionPlan, gpu: &Gpu) -> bool {
        let (attend, score, tail) = (&plan.attend, &selection.score, selection.tail.as_ref());
        let coarse = score.coarse.as_ref();
        let keys = attend.keys.device();
        let prefix = plan.prefix.map(|prefix| prefix.map(|view| view.device()));
        let codes = from_first_position(score.codes.device(), plan.step.init_offset);
        let clusters = coarse.map(|coarse| from_first_position(coarse.codes.device(), plan.step.init_offset));
        let are_rows = |view: &DeviceView<4>, like: &DeviceView<4>| {
            is_aligned(view, 8) && view.strides[1..] == like.strides[1..] && view.strides[2] == self.head_dim as u64
        };
        self.pq_dim.is_multiple_of(SUBSPACES)
            && (self.head_dim / self.pq_dim).is_multiple_of(4)
            && self.head_dim.is_multiple_of(8)
            && self.group() <= MAX_GROUP
            && self.h_kv * self.bundles() <= MAX_BUNDLES
            && self.tables().all_units(MAX_SEQUENCES) <= MAX_UNITS
            && self.histogram_at() + self.histogram_bytes() + STATIC_BYTES <= gpu.shared_bytes
            && attend.scale > 0.0
            && attend.scale.is_finite()
            && attend.query.strides[3] == 1
            && are_rows(&keys, &keys)
            && are_rows(&attend.values.device(), &keys)
            && prefix.is_none_or(|[keys, values]| are_rows(&keys, &keys) && are_rows(&values, &keys))
            && is_whole(&score.centroids)
            && coarse.is_none_or(|coarse| is_whole(&coarse.centroids))
            && tail.is_none_or(|tail| is_whole(&tail.sums) && is_whole(&tail.counts))
            && codes.strides[2] == self.pq_dim as u64
            && (codes.offset | codes.strides[0] | codes.strides[1]).is_multiple_of(16)
            && clusters.is_none_or(|view| {
                view.strides[2] == 1 && (view.offset | view.strides[0] | view.strides[1]).is_multiple_of(4)
            })
    }
}

/// Whether rows of adjacent elements start at multiples of `width`.
fn is_aligned<const N: usize>(view: &DeviceView<N>, width: u64) -> bool {
    let all = view.strides[..N - 1].iter().fold(view.offset, |all, stride| all | stride);
    view.strides[N - 1] == 1 && all.is_multiple_of(width)
}

/// Whether elements follow each other without a gap, from a multiple of four on.
fn is_whole<const N: usize>(view: &View<N>) -> bool {
    let whole = View::contiguous(view.dims);
    let is_like = |dim: usize| view.dims[dim] == 1 || view.strides[dim] == whole.strides[dim];
    (0..N).all(is_like) && view.device().offset.is_multiple_of(4)
}

/// Of codes that start at position `init_offset`: as if they started at position 0.
fn from_first_position(view: DeviceView<4>, init_offset: u64) -> DeviceView<3> {
    let [b, h, position, _] = view.strides;
    DeviceView { offset: view.offset.wrapping_sub(init_offset * position), strides: [b, h, position] }
}
