//! Exact top-k of the PQ scores of 4-bit codes, most of which are never computed: the fast scan of a CPU.

mod cpu;
mod simd;
mod tables;

use candle_core::{bail, CpuStorage, CustomOp1, CustomOp3, DType, Layout, Result, Shape, Tensor};

use super::arg::{with_unit_rows, Arg, View};
use super::encode::check_centroids;
use super::MAX_HEAD_DIM;

/// Keys of a packed block.
const BLOCK: usize = 32;

/// The most centroids that a 4-bit code names.
const MAX_CENTROIDS: usize = 16;

/// Packs codes below 16 for [`fast_scan`], two in a byte, in blocks of 32 keys.
///
/// Byte `i` of a block's row `r` holds subspaces `2 r` (low half) and `2 r + 1` (high half) of the block's key `i`; what
/// is not there is 0. A block depends on its own keys alone: as keys come, pack from the last full block on.
///
/// # Shapes
/// - `codes`: `[b, h_kv, n, pq_dim]` u8
/// - returns `[b, h_kv, ceil(n / 32), ceil(pq_dim / 2), 32]` u8
///
/// # Errors
/// Another shape or dtype, a code above 15, or a tensor that is not on a CPU.
pub fn pack_codes(codes: &Tensor) -> Result<Tensor> {
    let codes = with_unit_rows(codes)?;
    let arg = Arg::new("pack_codes", "codes", &codes);
    arg.is(DType::U8)?;
    let view = arg.view("[b, h_kv, n, pq_dim]")?;
    codes.apply_op1_no_bwd(&Pack { view })
}

struct Pack {
    view: View<4>,
}

impl CustomOp1 for Pack {
    fn name(&self) -> &'static str {
        "pack_codes"
    }

    fn cpu_fwd(&self, codes: &CpuStorage, _: &Layout) -> Result<(CpuStorage, Shape)> {
        let [b, h_kv, n, pq_dim] = self.view.dims;
        let shape = [b, h_kv, n.div_ceil(BLOCK), pq_dim.div_ceil(2), BLOCK];
        Ok((CpuStorage::U8(cpu::pack(&self.view, codes)?), shape.as_slice().into()))
    }
}

/// Positions of the `k` largest scores of each query head, ascending: to the bit what [`topk`](super::topk()) of
/// [`score`](super::score()) gives, in a fraction of the time.
///
/// The tables are rounded down to bytes, so that a vector register holds one and a shuffle looks up 16 to 64 keys at a
/// time (André et al., *Cache locality is not enough: High-Performance Nearest Neighbor Search with Product
/// Quantization Fast Scan*, 2015). What the rounding may hide is bounded, so the rounded sums tell which keys are
/// among the k for sure and which may be; the scores of the latter, and no others, are computed.
///
/// Where the scores of very many keys are as good as equal, or one is not finite, all are computed: slower than `score`.
///
/// # Shapes
/// - `query`: `[b, h, 1, head_dim]`, f32, f16 or bf16
/// - `packed`: the codes of `n` keys by [`pack_codes`], `h` a multiple of its `h_kv`
/// - `centroids`: `[b, h_kv, pq_dim, n_centroids, pq_len]` f32, 2 to 16 centroids (a power of two), any strides
/// - returns positions `[b, h, min(k, n)]` u32
///
/// # Errors
/// Shapes or dtypes other than these, a code that is no centroid's index, more than `u32::MAX` keys, or tensors that
/// are not on a CPU.
///
/// ```
/// use candle_core::{DType, Device, Tensor};
/// use candle_pq_attn::ops::{fast_scan, pack_codes, score, topk};
///
/// let random = |dims: &[usize]| Tensor::randn(0f32, 1., dims, &Device::Cpu);
/// let (query, centroids) = (random(&[1, 2, 1, 64])?, random(&[1, 1, 16, 16, 4])?);
/// let codes = Tensor::rand(0f32, 16., (1, 1, 1000, 16), &Device::Cpu)?.to_dtype(DType::U8)?;
/// let positions = fast_scan(&query, &pack_codes(&codes)?, 1000, &centroids, 10)?;
/// let slowly = topk(&score(&query, &codes, &centroids)?, 10)?;
/// assert_eq!(positions.to_vec3::<u32>()?, slowly.to_vec3::<u32>()?);
/// # candle_core::Result::Ok(())
/// ```
pub fn fast_scan(query: &Tensor, packed: &Tensor, n: usize, centroids: &Tensor, k: usize) -> Result<Tensor> {
    let (query, packed, centroids) = (with_unit_rows(query)?, with_unit_rows(packed)?, with_unit_rows(centroids)?);
    let plan = Plan::new(&query, &packed, n, &centroids, k)?;
    // The blocks of a head must follow each other without a gap; heads may be apart, as in a cache with room.
    let adjacent = [plan.packed.dims[3] * BLOCK, BLOCK, 1];
    let packed = if plan.packed.strides[2..] == adjacent { packed } else { packed.contiguous()? };
    let plan = Plan::new(&query, &packed, n, &centroids, k)?;
    query.apply_op3_no_bwd(&packed, &centroids, &FastScan { plan })
}

const OP: &str = "fast_scan";

/// A checked call of [`fast_scan`].
struct Plan {
    query: View<4>,
    packed: View<5>,
    centroids: View<5>,
    group: usize,
    n: usize,
    k: usize,
}

impl Plan {
    fn new(query: &Tensor, packed: &Tensor, n: usize, centroids: &Tensor, k: usize) -> Result<Self> {
        let (query_arg, packed_arg) = (Arg::new(OP, "query", query), Arg::new(OP, "packed", packed));
        let centroids_arg = Arg::new(OP, "centroids", centroids);
        query_arg.is_float()?;
        packed_arg.is(DType::U8)?;
        centroids_arg.is(DType::F32)?;
        let query: View<4> = query_arg.view("[b, h, 1, head_dim]")?;
        let packed: View<5> = packed_arg.view("[b, h_kv, blocks, rows, 32]")?;
        let centroids: View<5> = centroids_arg.view("[b, h_kv, pq_dim, n_centroids, pq_len]")?;
        let [b, h, _, head_dim] = query.dims;
        let [_, h_kv, pq_dim, n_centroids, _] = centroids.dims;
        query_arg.has_dims(&[b, h, 1, head_dim])?;
        if head_dim == 0 || head_dim > MAX_HEAD_DIM {
            return query_arg.fail("a head_dim of 1 to 256", format_args!("{head_dim}"));
        }
        if h == 0 || h_kv == 0 || !h.is_multiple_of(h_kv) {
            return centroids_arg.fail(&format!("an h_kv that divides h {h}"), format_args!("{h_kv}"));
        }
        check_centroids(&centroids_arg, pq_dim, n_centroids, head_dim)?;
        if n_centroids > MAX_CENTROIDS {
            return centroids_arg.fail("2, 4, 8 or 16 centroids", format_args!("{n_centroids}"));
        }
        centroids_arg.has_dims(&[b, h_kv, pq_dim, n_centroids, head_dim / pq_dim])?;
        if u32::try_from(n).is_err() {
            bail!("{OP}: n: expected at most u32::MAX keys, got {n}");
        }
        packed_arg.has_dims(&[b, h_kv, n.div_ceil(BLOCK), pq_dim.div_ceil(2), BLOCK])?;
        Ok(Self { query, packed, centroids, group: h / h_kv, n, k: k.min(n) })
    }
}

struct FastScan {
    plan: Plan,
}

impl CustomOp3 for FastScan {
    fn name(&self) -> &'static str {
        OP
    }

    fn cpu_fwd(
        &self,
        query: &CpuStorage,
        _: &Layout,
        packed: &CpuStorage,
        _: &Layout,
        centroids: &CpuStorage,
        _: &Layout,
    ) -> Result<(CpuStorage, Shape)> {
        let [b, h, ..] = self.plan.query.dims;
        let positions = cpu::run(&self.plan, query, packed, centroids)?;
        Ok((CpuStorage::U32(positions), (b, h, self.plan.k).into()))
    }
}
