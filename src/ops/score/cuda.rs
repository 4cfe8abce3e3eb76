use candle_core::{CudaStorage, DType, Result};

use super::{Plan, OP};
use crate::cuda::{self, u32_of, DeviceView, Kernel, Params};

/// `kernels/score.cu`
#[repr(C)]
#[derive(Clone, Copy)]
struct Score {
    query: DeviceView<4>,
    codes: DeviceView<4>,
    centroids: DeviceView<5>,
    n: u64,
    keys_per_block: u64,
    h_kv: u32,
    group: u32,
    parts: u32,
    pq_dim: u32,
    pq_len: u32,
    n_centroids: u32,
}

const LUT_THREADS: usize = 128;
const SCORE_THREADS: usize = 512;

/// The most heads a table entry serves: one 16-byte look-up.
const MAX_LANES: usize = 4;

/// Keys of a block, at least: fewer would not pay for the copy of its tables.
const MIN_KEYS: usize = 4 * SCORE_THREADS;

pub(super) fn run(
    plan: &Plan,
    query: &CudaStorage,
    codes: &CudaStorage,
    centroids: &CudaStorage,
) -> Result<CudaStorage> {
    let (dtype, device) = cuda::kind(query);
    let gpu = cuda::prepare(device)?;
    let [b, h, ..] = plan.query.dims;
    let [_, h_kv, n, pq_dim] = plan.codes.dims;
    let [_, _, _, n_centroids, pq_len] = plan.centroids.dims;
    let table_bytes = |lanes: usize| lanes * pq_dim * n_centroids * size_of::<f32>();
    let mut lanes = plan.group.next_power_of_two().min(MAX_LANES);
    while lanes > 1 && table_bytes(lanes) > gpu.shared_bytes {
        lanes /= 2;
    }
    let shared = table_bytes(lanes) <= gpu.shared_bytes;
    let (parts, bytes) = (plan.group.div_ceil(lanes), if shared { code_bytes(plan) } else { 1 });
    let tables = b * h_kv * parts;
    // Two blocks a multiprocessor, of as many keys each.
    let blocks = (2 * gpu.multiprocessors).div_ceil(tables.max(1)).min(n.div_ceil(MIN_KEYS)).max(1);
    let keys_per_block = n.div_ceil(blocks);
    let params = Params(Score {
        query: plan.query.device(),
        codes: plan.codes.device(),
        centroids: plan.centroids.device(),
        n: n as u64,
        keys_per_block: keys_per_block as u64,
        h_kv: u32_of(OP, "h_kv", h_kv)?,
        group: u32_of(OP, "group", plan.group)?,
        parts: u32_of(OP, "parts", parts)?,
        pq_dim: u32_of(OP, "pq_dim", pq_dim)?,
        pq_len: u32_of(OP, "pq_len", pq_len)?,
        n_centroids: u32_of(OP, "n_centroids", n_centroids)?,
    });
    let mut scores = cuda::output(device, (b, h, n), DType::F32)?;
    if n == 0 {
        return Ok(scores);
    }
    let lut = Kernel::new(device, &cuda::SCORE, format!("score_lut_{}_h{lanes}", cuda::suffix(dtype)))?;
    let mut luts = cuda::output(device, (tables, pq_dim, n_centroids, lanes), DType::F32)?;
    lut.launch().input(query)?.input(centroids)?.output(&mut luts)?.value(&params).run(
        [n_centroids.div_ceil(LUT_THREADS), pq_dim, tables],
        LUT_THREADS as u32,
        0,
    )?;
    let place = if shared { "" } else { "_global" };
    let score = Kernel::new(device, &cuda::SCORE, format!("score_h{lanes}_x{bytes}{place}"))?;
    score.launch().input(codes)?.input(&luts)?.output(&mut scores)?.value(&params).run(
        [n.div_ceil(keys_per_block), tables, 1],
        SCORE_THREADS as u32,
        if shared { table_bytes(lanes) } else { 0 },
    )?;
    Ok(scores)
}

/// The most code bytes, up to 16, that can be loaded at once: every key's codes start at a multiple of them.
fn code_bytes(plan: &Plan) -> usize {
    let DeviceView { offset, strides: [b, h, key, _] } = plan.codes.device();
    let pq_dim = plan.codes.dims[3] as u64;
    1 << (offset | b | h | key | pq_dim | 16).trailing_zeros()
}
