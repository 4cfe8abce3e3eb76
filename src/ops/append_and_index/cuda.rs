use candle_core::{Result, Tensor};

use super::{Due, Indexed, New, Plan, Sizes, OP};
use crate::cuda::{self, u32_of, Addresses, Kernel, Module, Params};

/// `kernels/append_and_index.cu`
#[repr(C)]
#[derive(Clone, Copy)]
struct Sequence {
    /// Of [`tensors`], in this order; then of what there is in [`Lens`](crate::cuda::Lens): the length, the counts of blocks that
    /// are done and that met, and what they leave each other.
    addresses: [u64; TENSORS + 4],
    /// Between heads, and between elements.
    new_key_strides: [u64; 2],
    new_value_strides: [u64; 2],
    key_stride: u64,
    codes_stride: u64,
    clusters_stride: u64,
    capacity: u64,
}

/// `kernels/append_and_index.cu`
#[repr(C)]
#[derive(Clone, Copy)]
struct AppendAndIndex {
    sequences: [Sequence; MAX_SEQUENCES],
    init_offset: u64,
    block: u64,
    n_sequences: u32,
    h_kv: u32,
    head_dim: u32,
    pq_dim: u32,
    pq_len: u32,
    n_centroids: u32,
    n_clusters: u32,
}

const TENSORS: usize = 14;

/// The most sequences of a launch.
const MAX_SEQUENCES: usize = 16;

const THREADS: usize = 512;

/// Keys of a block of threads, parts of the clusters, and floats of centroids, as in `kernels/append_and_index.cu`.
const GROUP: usize = 32;
const SLICES: usize = 8;
const TILE: usize = 8192;

pub(super) fn run(plans: &[Plan], new: &[(New, Option<Indexed>)], sizes: Sizes, due: Due) -> Result<()> {
    let of_all: Vec<_> = plans.iter().zip(new).flat_map(|(plan, new)| tensors(plan, new)).collect();
    let (storages, places) = cuda::lock(&of_all);
    let storages = storages.iter().map(|storage| cuda::storage_of(OP, storage)).collect::<Result<Vec<_>>>()?;
    let Some(Some(keys)) = places.first() else { return Ok(()) };
    let (dtype, device) = cuda::kind(storages[*keys]);
    let gpu = cuda::prepare(device)?;
    let stream = device.cuda_stream();
    let mut addresses = Addresses::new(&stream);
    let starts = storages.iter().map(|storage| addresses.of(storage)).collect::<Result<Vec<_>>>()?;
    let mut sequences = Vec::new();
    for ((plan, new), places) in plans.iter().zip(new).zip(places.chunks(TENSORS)) {
        let starts: Vec<_> = places.iter().map(|place| place.map_or(0, |place| starts[place])).collect();
        let lens = addresses.of(new.0.lens.storage())?;
        for b in 0..plan.append.keys.dims[0] {
            sequences.push(Sequence::new(plan, new, &starts, lens, dtype.size_in_bytes(), b));
        }
    }
    let Sizes { append: [_, head_dim, h_kv], index: [pq_dim, n_centroids, columns, n_clusters] } = sizes;
    // Behind the tile are a group's keys, as far apart as `stride_of` in the kernel says.
    let longest = if n_clusters > 0 { head_dim.max(columns) } else { columns };
    let shared_bytes = (TILE + GROUP * (longest.next_multiple_of(4) | 4)) * size_of::<f32>();
    let kernel = Kernel::new(device, Module::AppendAndIndex, format!("append_and_index_{}", cuda::suffix(dtype)))?;
    for together in sequences.chunks(MAX_SEQUENCES) {
        let mut all = [together[0]; MAX_SEQUENCES];
        all[..together.len()].copy_from_slice(together);
        let params = Params(AppendAndIndex {
            sequences: all,
            init_offset: due.init_offset as u64,
            block: due.block as u64,
            n_sequences: u32_of(OP, "sequences", together.len())?,
            h_kv: u32_of(OP, "h_kv", h_kv)?,
            head_dim: u32_of(OP, "head_dim", head_dim)?,
            pq_dim: u32_of(OP, "pq_dim", pq_dim)?,
            pq_len: u32_of(OP, "pq_len", head_dim / pq_dim)?,
            n_centroids: u32_of(OP, "n_centroids", n_centroids)?,
            n_clusters: u32_of(OP, "n_clusters", n_clusters)?,
        });
        // As many parts as there can be at a time, but one on each multiprocessor.
        let parts = due.block.div_ceil(GROUP).min(2) * pq_dim.max(SLICES) * h_kv * together.len();
        let blocks = parts.min(gpu.multiprocessors);
        kernel.launch().value(&params).run_cooperatively([blocks, 1, 1], THREADS as u32, shared_bytes)?;
    }
    Ok(())
}

/// The tensors of a cache, in the order of `Sequence` in `kernels/append_and_index.cu`.
fn tensors<'a>(plan: &'a Plan, (new, index): &'a (New, Option<Indexed>)) -> [Option<&'a Tensor>; TENSORS] {
    let [keys, values] = &plan.kv;
    let (index, encoder) = (index.as_ref(), index.as_ref().map(|index| &index.encoder));
    let clusters = index.and_then(|index| index.clusters);
    [
        Some(keys),
        Some(values),
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
    /// The `b`-th of a cache; `starts` are addresses of the storages of its tensors.
    fn new(plan: &Plan, new: &(New, Option<Indexed>), starts: &[u64], lens: u64, key_bytes: usize, b: usize) -> Self {
        let Plan { append, kv: [keys, _], index } = plan;
        let mut addresses = [0; TENSORS + 4];
        for (i, (tensor, start)) in tensors(plan, new).into_iter().zip(starts).enumerate() {
            let Some(layout) = tensor.map(Tensor::layout) else { continue };
            // Those along positions as if they began with position 0.
            let before = if i < 4 { new.0.first * layout.stride()[2] } else { 0 };
            let element = match i {
                0 | 1 | 4 | 5 => key_bytes,
                2 | 3 => size_of::<u8>(),
                _ => size_of::<u32>(),
            };
            // Pages serve all sequences of a cache.
            let of_sequence = if i < TENSORS - 2 { b * layout.stride()[0] } else { 0 };
            let at = (layout.start_offset() + of_sequence).wrapping_sub(before);
            addresses[i] = start.wrapping_add(at.wrapping_mul(element) as u64);
        }
        let (counts, h_kv) = (new.0.lens, append.keys.dims[1]);
        let at = [b, counts.appended_at(b), counts.met_at(b), counts.nearest_at(b, h_kv)];
        addresses[TENSORS..].copy_from_slice(&at.map(|at| lens + (at * size_of::<u32>()) as u64));
        let strides = |[_, head, _, element]: [usize; 4]| [head as u64, element as u64];
        Self {
            addresses,
            new_key_strides: strides(append.keys.strides),
            new_value_strides: strides(append.values.strides),
            key_stride: keys.stride()[1] as u64,
            codes_stride: index.as_ref().map_or(0, |into| into.codes.strides[1]) as u64,
            clusters_stride: index.as_ref().and_then(|into| into.coarse).map_or(0, |(codes, _)| codes.strides[1])
                as u64,
            capacity: new.0.capacity as u64,
        }
    }
}
