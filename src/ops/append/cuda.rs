use candle_core::{bail, Result};

use super::{New, Plan, OP};
use crate::cuda::{self, u32_of, Addresses, DeviceView, Kernel, Module, Params};

/// `kernels/append.cu`
#[repr(C)]
#[derive(Clone, Copy)]
struct Sequence {
    keys: u64,
    values: u64,
    cached_keys: u64,
    cached_values: u64,
    len: u64,
    arrived: u64,
    /// 0 without pages.
    pages: u64,
    key_strides: [u64; 3],
    value_strides: [u64; 3],
    cached_stride: u64,
    capacity: u64,
}

/// `kernels/append.cu`
#[repr(C)]
#[derive(Clone, Copy)]
struct Append {
    sequences: [Sequence; MAX_SEQUENCES],
    added: u64,
    h_kv: u32,
    head_dim: u32,
}

const THREADS: usize = 256;

/// The most sequences of a launch.
const MAX_SEQUENCES: usize = 16;

/// Bytes that a thread copies at once, where every row allows it.
const PIECE: usize = 16;

pub(super) fn run(plans: &[Plan], new: &[&New]) -> Result<()> {
    let tensors: Vec<_> =
        new.iter().flat_map(|new| [Some(new.cache), Some(&new.keys), Some(&new.values), new.pages]).collect();
    let (storages, places) = cuda::lock(&tensors);
    let storages = storages.iter().map(|storage| cuda::storage_of(OP, storage)).collect::<Result<Vec<_>>>()?;
    let Some((dtype, device)) = storages.first().map(|storage| cuda::kind(storage)) else { return Ok(()) };
    let gpu = cuda::prepare(device)?;
    let stream = device.cuda_stream();
    let mut addresses = Addresses::new(&stream);
    let starts = storages.iter().map(|storage| addresses.of(storage)).collect::<Result<Vec<_>>>()?;
    let size = dtype.size_in_bytes();
    let mut sequences = Vec::new();
    for ((plan, new), places) in plans.iter().zip(new).zip(places.chunks(4)) {
        let &[Some(cache), Some(keys), Some(values), pages] = places else { bail!("{OP}: a tensor has no storage") };
        let pages = pages.map_or(0, |place| starts[place]);
        let starts = [starts[cache], starts[keys], starts[values], pages];
        for b in 0..plan.keys.dims[0] {
            sequences.push(Sequence::new(plan, new, starts, addresses.of(new.lens.storage())?, size, b));
        }
    }
    let [added, head_dim, h_kv] = plans[0].sizes();
    let width = if plans.iter().all(|plan| is_aligned(plan, PIECE / size)) { PIECE / size } else { 1 };
    let kernel = Kernel::new(device, Module::Append, format!("append_{size}_x{width}"))?;
    let pieces = added * h_kv * head_dim / width;
    for together in sequences.chunks(MAX_SEQUENCES) {
        let mut all = [together[0]; MAX_SEQUENCES];
        all[..together.len()].copy_from_slice(together);
        let params = Params(Append {
            sequences: all,
            added: u64::from(u32_of(OP, "keys", added)?),
            h_kv: u32_of(OP, "h_kv", h_kv)?,
            head_dim: u32_of(OP, "head_dim", head_dim)?,
        });
        let grid = [pieces.div_ceil(THREADS).min(8 * gpu.multiprocessors), together.len(), 2];
        kernel.launch().value(&params).run(grid, THREADS as u32, 0)?;
    }
    Ok(())
}

impl Sequence {
    /// The `b`-th of a cache; `starts` are addresses of the storages of cache, keys, values and pages.
    fn new(plan: &Plan, new: &New, [cache, keys, values, pages]: [u64; 4], lens: u64, size: usize, b: usize) -> Self {
        let [which, batch, cached_stride, ..] = plan.cache.strides;
        let cached = plan.cache.device().starting_at(3, new.first);
        let address = |start: u64, element: u64| start.wrapping_add(element.wrapping_mul(size as u64));
        let at = |view: DeviceView<4>| view.offset + b as u64 * view.strides[0];
        let cached_at = |i: usize| cached.offset.wrapping_add((i * which + b * batch) as u64);
        let count_at = |i: usize| lens + (i * size_of::<u32>()) as u64;
        let ([_, key_strides @ ..], [_, value_strides @ ..]) =
            (plan.keys.device().strides, plan.values.device().strides);
        Self {
            keys: address(keys, at(plan.keys.device())),
            values: address(values, at(plan.values.device())),
            cached_keys: address(cache, cached_at(0)),
            cached_values: address(cache, cached_at(1)),
            len: count_at(b),
            arrived: count_at(new.lens.appended_at(b)),
            key_strides,
            value_strides,
            cached_stride: cached_stride as u64,
            capacity: new.capacity as u64,
            pages,
        }
    }
}

/// Whether rows can be read and written in pieces of `width` elements.
fn is_aligned(plan: &Plan, width: usize) -> bool {
    let DeviceView { offset, strides } = plan.cache.device();
    let cache = strides[..4].iter().fold(offset, |all, stride| all | stride);
    [plan.keys.device(), plan.values.device()].iter().all(|DeviceView { offset, strides: [b, h, row, element] }| {
        *element == 1 && (cache | offset | b | h | row | plan.keys.dims[3] as u64).is_multiple_of(width as u64)
    })
}
