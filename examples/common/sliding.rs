//! Exact attention to the last few keys, for layers that have a sliding window.

use candle_core::{DType, Result, Tensor};
use candle_nn::ops::softmax_last_dim;
use candle_pq_attn::PqKvCache;

/// Queries at a time, so that the scores of a long prompt are never held at once.
const BLOCK: usize = 512;

/// Appends `k` and `v`, `[1, h_kv, s, head_dim]`, to the cache, and returns what the queries `[1, h, s, head_dim]` get
/// from the last `window` keys up to their own.
///
/// The cache keeps the keys that have left the window: only then can it go back.
pub fn attend(q: &Tensor, k: &Tensor, v: &Tensor, cache: &mut PqKvCache, window: usize, scale: f32) -> Result<Tensor> {
    cache.append(k, v)?;
    let ([_, kv_heads, head_dim], n) = (cache.dims(), cache.len());
    let (_, heads, s, _) = q.dims4()?;
    let blocks = (0..s).step_by(BLOCK).map(|start| {
        let queries = BLOCK.min(s - start);
        // Positions of the block's first query, of the first key that it sees, and behind the last key that any sees.
        let query = n - s + start;
        let (first, end) = ((query + 1).saturating_sub(window), query + queries);
        let seen = |all: Tensor| all.narrow(2, first, end - first)?.to_dtype(DType::F32)?.contiguous();
        let (keys, values) = (seen(cache.keys()?)?, seen(cache.values()?)?);
        let q = q.narrow(2, start, queries)?.to_dtype(DType::F32)?;
        let q = q.reshape((1, kv_heads, heads / kv_heads * queries, head_dim))?;
        let scores = (q.matmul(&keys.t()?)? * f64::from(scale))?;
        let mut scores = scores.reshape((1, heads, queries, end - first))?;
        if queries > 1 {
            // One query sees all of these keys.
            let hidden = (query..end).flat_map(|query| {
                (first..end).map(move |key| if key > query || key + window <= query { f32::NEG_INFINITY } else { 0. })
            });
            let mask = Tensor::from_iter(hidden, q.device())?.reshape((queries, end - first))?;
            scores = scores.broadcast_add(&mask)?;
        }
        let weights = softmax_last_dim(&scores)?.reshape((1, kv_heads, (), end - first))?;
        weights.matmul(&values)?.reshape((1, heads, queries, head_dim))
    });
    Tensor::cat(&blocks.collect::<Result<Vec<_>>>()?, 2)?.to_dtype(q.dtype())
}

#[cfg(test)]
mod tests {
    use super::*;
    use candle_core::Device;
    use candle_pq_attn::PqConfig;

    #[test]
    fn a_prompt_in_blocks_equals_its_tokens_one_by_one() -> Result<()> {
        let (heads, kv_heads, head_dim, n, window) = (4, 2, 8, BLOCK + 30, 50);
        let random = |heads| Tensor::randn(0f32, 1., (1, heads, n, head_dim), &Device::Cpu);
        let (q, k, v) = (random(heads)?, random(kv_heads)?, random(kv_heads)?);
        let cache = || PqKvCache::new(PqConfig::default(), [1, kv_heads, head_dim], n, DType::F32, &Device::Cpu);
        let (mut at_once, mut by_token) = (cache()?, cache()?);
        let prompt = attend(&q, &k, &v, &mut at_once, window, 0.5)?;
        for position in 0..n {
            let at = |all: &Tensor| all.narrow(2, position, 1);
            let token = attend(&at(&q)?, &at(&k)?, &at(&v)?, &mut by_token, window, 0.5)?;
            let off = (at(&prompt)? - token)?.abs()?.max_all()?.to_scalar::<f32>()?;
            assert!(off < 1e-5, "position {position}: off by {off}");
        }
        Ok(())
    }
}
