//! Sequences that come and go in packed steps, each beside the same one alone.

use candle_core::{DType, Device, Result, Tensor};
use candle_pq_attn::{PagePool, PqAttention, PqConfig, PqKvCache};

use super::common::{assert_same_bits, small, with_tail, Rng};

const H_KV: usize = 2;
const H: usize = 6;
const D: usize = 16;

/// A sequence of a batch, and the same one alone.
struct Pair {
    packed: PqKvCache,
    alone: PqKvCache,
}

/// Random schedules: a sequence decodes, reads a chunk of a prompt or rests; some end, and their place is taken by a new
/// one, or by a fork of another. The packed ones are caches of their own or of a pool.
pub fn equal_the_same_alone(device: &Device, dtypes: &[DType]) -> Result<()> {
    for (seed, config) in [small(), with_tail()].into_iter().enumerate() {
        for &dtype in dtypes {
            for is_paged in [false, true] {
                schedule(config.clone(), is_paged, dtype, device, 41 + seed as u64)?;
            }
        }
    }
    Ok(())
}

fn schedule(config: PqConfig, is_paged: bool, dtype: DType, device: &Device, seed: u64) -> Result<()> {
    let (attn, mut rng) = (PqAttention::new(config.clone(), 0.25)?, Rng(seed));
    let pool = PagePool::new(config, [1, H_KV, D], 400, dtype, device)?;
    let new = || attn.new_cache([1, H_KV, D], 0, dtype, device);
    let mut pairs = Vec::new();
    for _ in 0..5 {
        let packed = if is_paged { pool.new_cache()? } else { new()? };
        pairs.push(Pair { packed, alone: new()? });
    }
    let mut longest = 0;
    for step in 0..120 {
        let place = rng.below(pairs.len());
        match rng.below(12) {
            // As a server reuses a slot: with its memory, or with new.
            0 => {
                pairs[place].packed.reset()?;
                pairs[place].alone = new()?;
            }
            1 => {
                let of = rng.below(pairs.len());
                let (packed, alone) = (pairs[of].packed.fork()?, pairs[of].alone.fork()?);
                pairs[place] = Pair { packed, alone };
            }
            _ => {}
        }
        let mut counts = Vec::new();
        for pair in &pairs {
            counts.push(match (pair.packed.len(), rng.below(10)) {
                (0, _) => 20 + rng.below(150),
                (_, 0) => 0,
                (_, 1) => 2 + rng.below(30),
                _ => 1,
            });
        }
        let s: usize = counts.iter().sum();
        if s == 0 {
            continue;
        }
        let mut draw = |heads| rng.tensor(&[1, heads, s, D], dtype).to_device(device);
        let (q, k, v) = (draw(H)?, draw(H_KV)?, draw(H_KV)?);
        let sequences = pairs.iter_mut().zip(&counts).filter(|(_, count)| **count > 0);
        let got = attn.forward_packed(&q, &k, &v, sequences.map(|(pair, count)| (&mut pair.packed, *count)))?;
        assert_eq!((got.dims(), got.dtype()), (q.dims(), dtype));
        let mut first = 0;
        for (pair, count) in pairs.iter_mut().zip(counts).filter(|(_, count)| *count > 0) {
            let of = |tensor: &Tensor| tensor.narrow(2, first, count);
            let want = attn.forward(&of(&q)?, &of(&k)?, &of(&v)?, &mut pair.alone)?;
            assert_eq!(pair.packed.len(), pair.alone.len());
            assert_same_bits(&of(&got)?, &want, &format!("step {step}: {count} positions at {first}"));
            longest = longest.max(pair.alone.len());
            first += count;
        }
    }
    drop(pairs);
    assert_eq!(pool.free_pages(), 400);
    assert!(longest > 300 && !attn.config().is_dense(longest), "no sequence grew long enough to be sparse: {longest}");
    Ok(())
}
