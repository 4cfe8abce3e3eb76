use candle_core::{Result, Tensor};

use super::{Due, Indexed, Plan, OP};
use crate::cuda::{self, u32_of, Addresses, Kernel, Module, Params};

/// `kernels/index_block.cu`
#[repr(C)]
#[derive(Clone, Copy)]
struct Sequence {
    /// Of [`tensors`], in this order; then of the length, and of the counts of blocks that are done.
    addresses: [u64; TENSORS + 2],
    key_stride: u64,
    codes_stride: u64,
    clusters_stride: u64,
    capacity: u64,
}

/// `kernels/index_block.cu`
#[repr(C)]
#[derive(Clone, Copy)]
struct IndexBlock {
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

const TENSORS: usize = 12;

/// The most sequences of a launch.
const MAX_SEQUENCES: usize = 16;

const THREADS: usize = 256;

/// Keys of a part, which a block of threads takes at a time.
const KEYS: usize = 5;

/// Shared memory for tiles of centroids: `TILES * TILE` floats in `kernels/index_block.cu`.
const SHARED_BYTES: usize = 4 * THREADS * (16 + 4) * size_of::<f32>();

pub(super) fn run(plans: &[Plan], caches: &[Indexed], due: Due) -> Result<()> {
    let (storages, places) = cuda::lock(&caches.iter().flat_map(tensors).collect::<Vec<_>>());
    let storages = storages.iter().map(|storage| cuda::storage_of(OP, storage)).collect::<Result<Vec<_>>>()?;
    let Some(Some(keys)) = places.first() else { return Ok(()) };
    let (dtype, device) = cuda::kind(storages[*keys]);
    let gpu = cuda::prepare(device)?;
    let stream = device.cuda_stream();
    let mut addresses = Addresses::new(&stream);
    let starts = storages.iter().map(|storage| addresses.of(storage)).collect::<Result<Vec<_>>>()?;
    let mut sequences = Vec::new();
    for ((plan, cache), places) in plans.iter().zip(caches).zip(places.chunks(TENSORS)) {
        let starts: Vec<_> = places.iter().map(|place| place.map_or(0, |place| starts[place])).collect();
        let lens = addresses.of(cache.lens.storage())?;
        for b in 0..plan.into.encode.keys.dims[0] {
            sequences.push(Sequence::new(plan, cache, &starts, lens, dtype.size_in_bytes(), b));
        }
    }
    let [h_kv, head_dim, pq_dim, n_centroids, _, n_clusters] = plans[0].sizes();
    let kernel = Kernel::new(device, Module::IndexBlock, format!("index_block_{}", cuda::suffix(dtype)))?;
    for together in sequences.chunks(MAX_SEQUENCES) {
        let mut all = [together[0]; MAX_SEQUENCES];
        all[..together.len()].copy_from_slice(together);
        let params = Params(IndexBlock {
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
        // As many parts as there can be, but one on each multiprocessor: two would wait for each other while others are idle.
        let parts = due.block.div_ceil(KEYS).saturating_mul(h_kv * together.len());
        let blocks = parts.min(gpu.multiprocessors);
        kernel.launch().value(&params).run([blocks, 1, 1], THREADS as u32, SHARED_BYTES)?;
    }
    Ok(())
}

/// The tensors of a cache, in the order of `Sequence` in `kernels/index_block.cu`.
fn tensors<'a>(cache: &'a Indexed) -> [Option<&'a Tensor>; TENSORS] {
    let [keys, values] = &cache.kv;
    let encoder = &cache.encoder;
    let (sums, counts) = cache.clusters.map(|clusters| (&clusters.sums, &clusters.counts)).unzip();
    [
        Some(keys),
        Some(values),
        Some(&cache.codes),
        cache.coarse_codes.as_ref(),
        Some(encoder.centroids),
        encoder.phi,
        encoder.weights,
        encoder.coarse,
        sums,
        counts,
        cache.pages.map(|[kv, _]| kv),
        cache.pages.map(|[_, codes]| codes),
    ]
}

impl Sequence {
    /// The `b`-th of a cache; `starts` are addresses of the storages of its tensors.
    fn new(plan: &Plan, cache: &Indexed, starts: &[u64], lens: u64, key_bytes: usize, b: usize) -> Self {
        let mut addresses = [0; TENSORS + 2];
        for (i, (tensor, start)) in tensors(cache).into_iter().zip(starts).enumerate() {
            let Some(layout) = tensor.map(Tensor::layout) else { continue };
            // Those along positions as if they began with position 0.
            let before = if i < 4 { cache.first * layout.stride()[2] } else { 0 };
            let element = match i {
                0 | 1 => key_bytes,
                2 | 3 => size_of::<u8>(),
                _ => size_of::<u32>(),
            };
            // Pages serve all sequences of a cache.
            let of_sequence = if i < TENSORS - 2 { b * layout.stride()[0] } else { 0 };
            let at = (layout.start_offset() + of_sequence).wrapping_sub(before);
            addresses[i] = start.wrapping_add(at.wrapping_mul(element) as u64);
        }
        let h_kv = plan.into.encode.keys.dims[1];
        addresses[TENSORS] = lens + (b * size_of::<u32>()) as u64;
        addresses[TENSORS + 1] = lens + (cache.lens.indexed_at(b, h_kv) * size_of::<u32>()) as u64;
        Self {
            addresses,
            key_stride: plan.into.encode.keys.strides[1] as u64,
            codes_stride: plan.into.codes.strides[1] as u64,
            clusters_stride: plan.into.coarse.map_or(0, |(codes, _)| codes.strides[1]) as u64,
            capacity: cache.capacity as u64,
        }
    }
}
