//! Several sequences in one step.

mod common;
#[path = "common/packed.rs"]
mod scenario;

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::Arc;

use candle_core::{bail, DType, Device, Result, Tensor};
use candle_pq_attn::{PqAttention, PqKvCache};
use common::{assert_same_bits, integers, numbers, with_tail, Rng};

#[test]
fn sequences_that_come_and_go_equal_the_same_alone() -> Result<()> {
    scenario::equal_the_same_alone(&Device::Cpu, &[DType::F32, DType::BF16])
}

/// The last of three fails, when the first has filled a block and trained and the second has read its prompt.
#[test]
fn a_step_that_fails_leaves_all_caches_as_they_were() -> Result<()> {
    let fails = Arc::new(AtomicBool::new(false));
    let attn = PqAttention::new(with_tail(), 0.25)?;
    // A prefill that is cheap, and fails on command for the third sequence, of seven keys.
    let of_closure = fails.clone();
    let failing =
        attn.clone().with_prefill(move |q, k, _, _| match k.dims()[2] == 7 && of_closure.load(Ordering::Relaxed) {
            true => bail!("no prefill today"),
            false => Ok(q.clone()),
        });
    let mut rng = Rng(5);
    // What the first step of decoding does depends on the length: it trains, or only fills a block.
    for len in [100, 149, 250] {
        let mut caches = Vec::new();
        for len in [len, 40, 0] {
            let mut cache = attn.new_cache([1, 2, 16], 0, DType::F32, &Device::Cpu)?;
            if len > 0 {
                let [q, kv] = [4, 2].map(|heads| rng.tensor(&[1, heads, len, 16], DType::F32));
                attn.forward(&q, &kv, &kv, &mut cache)?;
            }
            caches.push(cache);
        }
        let counts = [1, 30, 7];
        let [q, kv] = [4, 2].map(|heads| rng.tensor(&[1, heads, counts.iter().sum(), 16], DType::F32));
        let mut step = || failing.forward_packed(&q, &kv, &kv, caches.iter_mut().zip(counts));
        fails.store(true, Ordering::Relaxed);
        let first = step().expect_err("the third fails").to_string();
        assert!(first.contains("no prefill today"), "{first}");
        let before = caches.iter().map(seen).collect::<Result<Vec<_>>>()?;
        assert_eq!(caches.iter().map(PqKvCache::len).collect::<Vec<_>>(), [len, 40, 0]);
        assert!(caches[0].codebook().is_none(), "what the step trained is forgotten");

        // With an index that was there before.
        caches[0].build_index()?;
        let indexed = seen(&caches[0])?;
        let mut step = || failing.forward_packed(&q, &kv, &kv, caches.iter_mut().zip(counts));
        assert!(step().is_err());
        assert!(seen(&caches[0])? == indexed && seen(&caches[1])? == before[1] && seen(&caches[2])? == before[2]);

        // And then the step itself.
        fails.store(false, Ordering::Relaxed);
        let mut alone = Vec::new();
        for (cache, first, count) in [(0, 0, 1), (1, 1, 30), (2, 31, 7)] {
            let mut cache = caches[cache].fork()?;
            let of = |tensor: &Tensor| tensor.narrow(2, first, count);
            alone.push(failing.forward(&of(&q)?, &of(&kv)?, &of(&kv)?, &mut cache)?);
        }
        let got = failing.forward_packed(&q, &kv, &kv, caches.iter_mut().zip(counts))?;
        assert_same_bits(&got, &Tensor::cat(&alone, 2)?, "after steps that failed");
    }
    Ok(())
}

/// One sequence's budget is an error before any of them takes the step.
#[test]
fn a_budget_is_a_sequences_own() -> Result<()> {
    let attn = PqAttention::new(with_tail(), 0.25)?;
    let mut rng = Rng(6);
    let mut new = || -> Result<PqKvCache> {
        let mut cache = attn.new_cache([1, 2, 16], 256, DType::F32, &Device::Cpu)?;
        let [q, kv] = [4, 2].map(|heads| rng.tensor(&[1, heads, 256, 16], DType::F32));
        attn.forward(&q, &kv, &kv, &mut cache)?;
        Ok(cache)
    };
    let (mut free, mut bound) = (new()?, new()?);
    bound.set_max_bytes(86_000)?;
    let [q, kv] = [4, 2].map(|heads| Rng(7).tensor(&[1, heads, 9, 16], DType::F32));
    let error = attn.forward_packed(&q, &kv, &kv, [(&mut free, 1), (&mut bound, 8)]).expect_err("no room").to_string();
    assert!(error.starts_with("PqKvCache: max_bytes: expected 264 keys to take at most 86000 bytes"), "{error}");
    assert_eq!((free.len(), bound.len(), bound.capacity()), (256, 256, 256));
    let (q, kv) = (q.narrow(2, 0, 3)?, kv.narrow(2, 0, 3)?);
    attn.forward_packed(&q, &kv, &kv, [(&mut free, 1), (&mut bound, 2)])?;
    assert_eq!((free.len(), bound.len()), (257, 258));
    Ok(())
}

/// NaN and infinities of one sequence do not reach another.
#[test]
fn what_is_not_finite_stays_in_its_sequence() -> Result<()> {
    let attn = PqAttention::new(with_tail(), 0.25)?;
    let mut rng = Rng(8);
    let [q, kv] = [4, 2].map(|heads| rng.tensor(&[1, heads, 300, 16], DType::F32));
    let new = || -> Result<PqKvCache> {
        let mut cache = attn.new_cache([1, 2, 16], 0, DType::F32, &Device::Cpu)?;
        attn.forward(&q, &kv, &kv, &mut cache)?;
        Ok(cache)
    };
    let (mut sane, mut ill, mut alone) = (new()?, new()?, new()?);
    let one = |heads: usize| Rng(9).tensor(&[1, heads, 1, 16], DType::F32);
    let (q, kv, nan) = (one(4), one(2), (one(2) * f64::NAN)?);
    let pack = |a, b| Tensor::cat(&[a, b], 2);
    for _ in 0..20 {
        let (q2, kv2) = (pack(&q, &q)?, pack(&kv, &nan)?);
        let out = attn.forward_packed(&q2, &kv2, &kv2, [(&mut sane, 1), (&mut ill, 1)])?;
        assert_same_bits(&out.narrow(2, 0, 1)?, &attn.forward(&q, &kv, &kv, &mut alone)?, "beside NaN");
    }
    Ok(())
}

type Seen = (usize, Vec<f64>, Vec<u32>, Option<(Vec<f64>, Vec<u32>)>);

fn seen(cache: &PqKvCache) -> Result<Seen> {
    let clusters = cache.clusters().map(|clusters| (numbers(&clusters.sums), integers(&clusters.counts)));
    Ok((cache.len(), numbers(&cache.keys()?), integers(&cache.codes()?), clusters))
}
