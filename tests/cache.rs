//! The cache and the attention on it: growth, going back, prefill and decode against naive references.

mod common;

use candle_core::{DType, Device, Result, Tensor};
use candle_pq_attn::ops::{self, ClusterSums, Selected};
use candle_pq_attn::{Codebook, DecodeGraph, Heavy, Metric, PqAttention, PqConfig, PqKvCache, Selection, Tail};
use common::*;
use proptest::prelude::*;

fn append(cache: &mut PqKvCache, keys: &Tensor, values: &Tensor, from: usize, to: usize) -> Result<()> {
    cache.append(&keys.narrow(2, from, to - from)?, &values.narrow(2, from, to - from)?)
}

fn assert_same_cache(a: &mut PqKvCache, b: &mut PqKvCache, what: &str) -> Result<()> {
    a.build_index()?;
    b.build_index()?;
    assert_eq!((a.len(), a.memory()), (b.len(), b.memory()), "{what}");
    assert_same_bits(&a.keys()?, &b.keys()?, what);
    assert_same_bits(&a.values()?, &b.values()?, what);
    assert_same_bits(&a.codes()?, &b.codes()?, what);
    match (a.codebook(), b.codebook()) {
        (Some(a), Some(b)) => assert_same_bits(&a.centroids()?, &b.centroids()?, what),
        (a, b) => assert_eq!(a.is_some(), b.is_some(), "{what}"),
    }
    assert_eq!(a.clusters().is_some(), a.codebook().is_some() && a.config().tail == Tail::ClusterMeans, "{what}");
    if let (Some(a), Some(b)) = (a.clusters(), b.clusters()) {
        assert_same_bits(&a.sums, &b.sums, what);
        assert_same_bits(&a.counts, &b.counts, what);
    }
    if let (Some(a), Some(b)) = (a.coarse_codes()?, b.coarse_codes()?) {
        assert_same_bits(&a, &b, what);
    }
    Ok(())
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 24, failure_persistence: None, ..ProptestConfig::default() })]

    /// Appending in any pieces, from any capacity, gives the same cache to the bit.
    #[test]
    fn append_in_pieces_equals_append_all(
        seed in any::<u64>(), cuts in prop::collection::vec(1usize..400, 0..6), capacity in 0usize..500,
        kind in 0usize..3, dtype in 0usize..3,
    ) {
        let n = 400;
        let mut rng = Rng(seed);
        let config = [small(), PqConfig { metric: Metric::InnerProduct, ..small() }, with_tail()][kind].clone();
        let attn = PqAttention::new(config, 0.25).unwrap();
        let (keys, values) = (rng.tensor(&[2, 2, n, 16], DTYPES[dtype]), rng.tensor(&[2, 2, n, 16], DTYPES[dtype]));
        let cache = |capacity| attn.new_cache([2, 2, 16], capacity, DTYPES[dtype], &Device::Cpu).unwrap();
        let (mut whole, mut pieces, mut singles) = (cache(n), cache(capacity), cache(0));
        append(&mut whole, &keys, &values, 0, n).unwrap();
        let mut cuts = cuts;
        cuts.extend([0, n]);
        cuts.sort();
        cuts.windows(2).try_for_each(|cut| append(&mut pieces, &keys, &values, cut[0], cut[1])).unwrap();
        (0..n).try_for_each(|t| append(&mut singles, &keys, &values, t, t + 1)).unwrap();
        assert_same_cache(&mut whole, &mut pieces, "in pieces").unwrap();
        assert_same_cache(&mut whole, &mut singles, "one by one").unwrap();
    }

    /// What was appended and truncated leaves no trace, whether or not the index was built in between.
    #[test]
    fn truncate_equals_never_having_appended(
        seed in any::<u64>(), kept in 0usize..300, dropped in 1usize..300, build in any::<bool>(), tail in any::<bool>(),
    ) {
        let mut rng = Rng(seed);
        let attn = PqAttention::new(if tail { with_tail() } else { small() }, 0.25).unwrap();
        let (keys, values) = (rng.tensor(&[1, 2, 600, 16], DType::F32), rng.tensor(&[1, 2, 600, 16], DType::F32));
        let cache = || attn.new_cache([1, 2, 16], 0, DType::F32, &Device::Cpu).unwrap();
        let (mut a, mut b) = (cache(), cache());
        append(&mut a, &keys, &values, 0, kept).unwrap();
        append(&mut a, &values, &keys, kept, kept + dropped).unwrap();
        if build {
            a.build_index().unwrap();
        }
        a.truncate(kept).unwrap();
        append(&mut a, &keys, &values, kept, kept + 50).unwrap();
        append(&mut b, &keys, &values, 0, kept + 50).unwrap();
        assert_same_cache(&mut a, &mut b, "truncated").unwrap();
        a.reset().unwrap();
        append(&mut a, &keys, &values, 0, kept + 50).unwrap();
        assert_same_cache(&mut a, &mut b, "reset").unwrap();
    }

    /// Whatever was appended, truncated, built and decoded before: a step sees the keys there are, and no other.
    #[test]
    fn a_step_depends_on_the_keys_alone(
        seed in any::<u64>(), history in prop::collection::vec((0usize..120, 0usize..100, any::<bool>()), 0..6),
        recent in 0usize..30, n in 60usize..300, tail in any::<bool>(), window in 0usize..20,
    ) {
        let mut rng = Rng(seed);
        let config = PqConfig { window, ..if tail { with_tail() } else { small() } };
        let attn = PqAttention::new(config.clone(), 0.25).unwrap();
        let (keys, values) = (rng.tensor(&[1, 2, n + 1, 16], DType::F32), rng.tensor(&[1, 2, n + 1, 16], DType::F32));
        let query = rng.tensor(&[1, 4, 1, 16], DType::F32);
        // Handed in: when a codebook is trained does depend on the steps before.
        let codebook = Codebook::train(&rng.tensor(&[1, 2, 100, 16], DType::F32), &config).unwrap();
        let last = |x: &Tensor| x.narrow(2, n, 1).unwrap();
        let step = |history: &[(usize, usize, bool)]| -> Result<(Tensor, PqKvCache)> {
            let mut cache = attn.new_cache([1, 2, 16], 0, DType::F32, &Device::Cpu)?;
            cache.set_codebook(codebook.clone())?;
            let mut kept = 0; // keys that the history leaves as they are to be
            for &(other, truncated, decode) in history {
                let more = (n - kept).min(other);
                append(&mut cache, &keys, &values, kept, kept + more)?;
                append(&mut cache, &values, &keys, 0, other.min(n))?;
                match decode {
                    true => attn.forward(&query, &last(&values), &last(&keys), &mut cache).map(drop)?,
                    false => cache.build_index()?,
                }
                kept = (kept + more).saturating_sub(truncated);
                cache.truncate(kept)?;
            }
            // Built shortly before, or not at all.
            if !history.is_empty() {
                let built = kept.max(n - recent);
                append(&mut cache, &keys, &values, kept, built)?;
                cache.build_index()?;
                kept = built;
            }
            append(&mut cache, &keys, &values, kept, n)?;
            Ok((attn.forward(&query, &last(&keys), &last(&values), &mut cache)?, cache))
        };
        let ((a, mut with), (b, mut without)) = (step(&history).unwrap(), step(&[]).unwrap());
        assert_same_bits(&a, &b, "step");
        assert_same_cache(&mut with, &mut without, "cache").unwrap();
    }

    /// A list of all positions, in any order, is dense attention.
    #[test]
    fn listing_all_positions_in_any_order_is_dense(seed in any::<u64>(), n in 1usize..700, per_head in any::<bool>()) {
        let mut rng = Rng(seed);
        let query = rng.tensor(&[2, 6, 1, 20], DType::F32);
        let (keys, values) = (rng.tensor(&[2, 2, n, 20], DType::F32), rng.tensor(&[2, 2, n, 20], DType::F32));
        let lists = if per_head { 6 } else { 2 };
        let mut indices = vec![];
        for _ in 0..2 * lists {
            let mut order: Vec<u32> = (0..n as u32).collect();
            (1..n).for_each(|i| order.swap(i, rng.below(i + 1)));
            indices.extend(order);
        }
        let selected = Selected {
            indices: Tensor::from_vec(indices, (2, lists, n), &Device::Cpu).unwrap(),
            lens: Tensor::full(n as u32, (2, lists), &Device::Cpu).unwrap(),
            weights: Tensor::ones((2, lists, n), DType::F32, &Device::Cpu).unwrap(),
        };
        let sparse = ops::sparse_attend(&query, &keys, &values, &selected, 0.3).unwrap();
        let dense = ops::dense_attend(&query, &keys, &values, 0.3).unwrap();
        assert_close(&numbers(&sparse.out), &numbers(&dense.out), 2e-6, "output");
        assert_close(&numbers(&sparse.lse), &numbers(&dense.lse), 2e-6, "lse");
    }
}

/// Prefill, whole and in chunks of any size, is causal attention; so is a dense decode.
#[test]
fn prefill_is_causal_attention() -> Result<()> {
    let mut rng = Rng(1);
    for (b, h, h_kv, d, n) in [(1, 4, 4, 64, 70), (2, 9, 3, 32, 65), (1, 5, 1, 7, 130), (1, 2, 2, 256, 20)] {
        for dtype in DTYPES {
            let query = rng.tensor(&[b, n, h, d], dtype).transpose(1, 2)?;
            let (keys, values) = (
                rng.tensor(&[b, n, h_kv, d], dtype).transpose(1, 2)?,
                rng.tensor(&[b, n, h_kv, d], dtype).transpose(1, 2)?,
            );
            let (q, k, v) = (numbers(&query), numbers(&keys), numbers(&values));
            let want: Vec<f64> = (0..b * h * n)
                .flat_map(|i| {
                    let (bh, t) = (i / n, i % n);
                    let kv = bh / h * h_kv + bh % h / (h / h_kv);
                    let visible: Vec<_> = (0..=t).map(|t| (t, 1.0)).collect();
                    attend(row(&q, i, d), row(&k, kv, n * d), row(&v, kv, n * d), &visible, 0.2).0
                })
                .collect();
            let attn =
                PqAttention::new(PqConfig { pq_dim: 1, coarse: 0, tail: Tail::None, ..PqConfig::default() }, 0.2)?;
            for chunks in [vec![n], vec![1; n], vec![3, n - 4, 1], vec![n / 2, n - n / 2]] {
                let mut cache = attn.new_cache([b, h_kv, d], 0, dtype, &Device::Cpu)?;
                let mut outs = vec![];
                for s in chunks {
                    let part = |x: &Tensor| x.narrow(2, cache.len(), s);
                    let (q, k, v) = (part(&query)?, part(&keys)?, part(&values)?);
                    outs.push(attn.forward(&q, &k, &v, &mut cache)?);
                }
                let got = Tensor::cat(&outs, 2)?;
                assert_eq!((got.dims(), got.dtype()), (&[b, h, n, d][..], dtype));
                assert_close(&numbers(&got), &want, rounding(dtype), "prefill");
            }
        }
    }
    Ok(())
}

/// Every decode step attends to sink, window and the keys whose reconstructions score best, and its codes are those of
/// the codebook, whatever was encoded when.
#[test]
fn decode_attends_to_what_scores_best() -> Result<()> {
    let mut rng = Rng(2);
    for selection in [Selection::PerQueryHead, Selection::PerKvHead] {
        // Offsets: after the sink, inside it, behind it, and so far behind that there are no candidates at first.
        for (metric, init_offset, window) in [
            (Metric::Euclidean, None, 8),
            (Metric::InnerProduct, Some(0), 8),
            (Metric::Euclidean, Some(9), 0),
            (Metric::Euclidean, Some(40), 30),
        ] {
            let config = PqConfig { selection, metric, init_offset, window, ..small() };
            let (b, h, h_kv, d, scale) = (2, 6, 2, 16, 0.4);
            let attn = PqAttention::new(config.clone(), scale)?;
            let mut cache = attn.new_cache([b, h_kv, d], 0, DType::F32, &Device::Cpu)?;
            for step in 0..150 {
                let (query, key) = (rng.tensor(&[b, h, 1, d], DType::F32), rng.tensor(&[b, h_kv, 1, d], DType::F32));
                let out = attn.forward(&query, &key, &rng.tensor(&[b, h_kv, 1, d], DType::F32), &mut cache)?;
                let n = step + 1;
                assert_eq!(cache.len(), n);
                let dense: Vec<_> = (0..n).map(|t| (t, 1.0)).collect();
                let attended = match config.is_dense(n) {
                    true => vec![dense; b * h],
                    false => naive_selection(&config, &query, &cache, scale)?,
                };
                let (q, k, v) = (numbers(&query), numbers(&cache.keys()?), numbers(&cache.values()?));
                for (bh, attended) in attended.iter().enumerate() {
                    let kv = bh / (h / h_kv);
                    let (k, v) = (row(&k, kv, n * d), row(&v, kv, n * d));
                    let (want, _) = attend(row(&q, bh, d), k, v, attended, f64::from(scale));
                    assert_close(row(&numbers(&out), bh, d), &want, 1e-5, "decode");
                    let listed = attended.len();
                    assert!(listed <= config.attended(n), "{listed} attended of {n}");
                }
            }
        }
    }
    Ok(())
}

fn naive_selection(config: &PqConfig, query: &Tensor, cache: &PqKvCache, scale: f32) -> Result<Vec<Vec<(usize, f64)>>> {
    let ([b, h_kv, _], n) = (cache.dims(), cache.len());
    let (h, range) = (query.dim(1)?, config.candidates(n));
    let codebook = cache.codebook().expect("a codebook");
    let start = config.init_offset();
    let codes = cache.codes()?;
    let keys = cache.keys()?.narrow(2, start, codes.dim(2)?)?;
    assert_same_bits(&codes, &codebook.encode(&keys)?.0, "codes");
    assert!(start + codes.dim(2)? >= range.end, "every candidate has codes");
    // Their own scores, which tests/ops.rs compares with a reference: near-ties then fall as they fall there.
    let candidates = codes.narrow(2, range.start - start, range.len())?;
    let scores = ops::score(query, &candidates, &codebook.centroids()?)?;
    let ranking = match config.selection {
        Selection::PerQueryHead => scores,
        Selection::PerKvHead => ops::group_mass(&scores, h_kv, scale)?,
    };
    let lists = ranking.dim(1)?;
    let ranking = numbers(&ranking);
    Ok((0..b * h)
        .map(|bh| {
            let ranking = row(&ranking, bh / h * lists + bh % h * lists / h, range.len());
            let mut order: Vec<usize> = (0..range.len()).collect();
            order.sort_by(|&a, &b| ranking[b].total_cmp(&ranking[a]).then(a.cmp(&b)));
            let heavy: Vec<usize> = order.iter().take(config.heavy.count(n)).map(|i| range.start + i).collect();
            let attended = (0..n).filter(|t| *t < config.sink || t + config.window >= n || heavy.contains(t));
            attended.map(|t| (t, 1.0)).collect()
        })
        .collect())
}

/// A prompt, an answer, another prompt: keys are encoded in blocks, and the codebook grows with the sequence.
#[test]
fn index_follows_the_sequence() -> Result<()> {
    let mut rng = Rng(3);
    let attn = PqAttention::new(PqConfig { max_train_keys: 200, refresh: 0.5, ..small() }, 0.25)?;
    let mut cache = attn.new_cache([1, 1, 16], 0, DType::F32, &Device::Cpu)?;
    let mut step = |cache: &mut PqKvCache, s| {
        let mut random = || rng.tensor(&[1, 1, s, 16], DType::F32);
        attn.forward(&random(), &random(), &random(), cache)
    };
    step(&mut cache, 60)?;
    assert!(cache.codebook().is_none(), "prefill builds no index");
    step(&mut cache, 1)?;
    // Every code is that of its key under the codebook of now.
    let encoded = |cache: &PqKvCache| {
        let codes = cache.codes()?;
        let keys = cache.keys()?.narrow(2, 3, codes.dim(2)?)?;
        assert_same_bits(&codes, &cache.codebook().expect("a codebook").encode(&keys)?.0, "codes");
        Ok::<_, candle_core::Error>(codes.dim(2)? + 3)
    };
    // Blocks of the window's length, from position 3 on.
    assert_eq!(encoded(&cache)?, 3 + 7 * 8);
    for n in 62..=3 + 8 * 8 - 1 {
        step(&mut cache, 1)?;
        assert_eq!((cache.len(), encoded(&cache)?), (n, 59), "no block is full");
        assert!(n - 8 <= 59, "nothing left the window without a code");
    }
    step(&mut cache, 1)?;
    assert_eq!(encoded(&cache)?, 67, "a block at once");
    // Trained on the 58 keys from position 3 on, and again on 87 of them, half as many more.
    let centroids = |cache: &PqKvCache| numbers(&cache.codebook().expect("a codebook").centroids().expect("a view"));
    let first = centroids(&cache);
    step(&mut cache, 21)?;
    step(&mut cache, 1)?;
    assert_eq!((cache.len(), centroids(&cache) == first), (89, true), "not yet half as many more");
    step(&mut cache, 1)?;
    let second = centroids(&cache);
    assert_ne!(first, second, "trained again");
    step(&mut cache, 500)?;
    step(&mut cache, 1)?;
    let third = centroids(&cache);
    assert_ne!(second, third, "also when there are more than it trains on");
    step(&mut cache, 250)?;
    step(&mut cache, 1)?;
    assert_eq!(third, centroids(&cache), "not yet half as many more");
    cache.truncate(700)?;
    assert_eq!(third, centroids(&cache), "all that it was trained on is there");
    step(&mut cache, 30)?;
    step(&mut cache, 1)?;
    assert_eq!(encoded(&cache)?, 3 + 91 * 8, "encoded behind what was kept");
    cache.truncate(590)?;
    assert!(cache.codebook().is_none(), "trained on keys that are gone");
    Ok(())
}

#[test]
fn capacity_doubles_and_memory_is_what_is_used() -> Result<()> {
    let attn = PqAttention::new(small(), 0.25)?;
    let mut cache = attn.new_cache([2, 3, 16], 0, DType::BF16, &Device::Cpu)?;
    let key = Rng(6).tensor(&[2, 3, 1, 16], DType::BF16);
    let mut capacities = vec![];
    for _ in 0..2000 {
        cache.append(&key, &key)?;
        capacities.push(cache.capacity());
    }
    capacities.dedup();
    assert_eq!(capacities, [256, 512, 1024, 2048]);
    assert_eq!((cache.memory().kv_bytes, cache.memory().index_bytes), (2 * 2 * 3 * 16 * 2000 * 2, 0));
    cache.build_index()?;
    let (codes, codebook) = (2 * 3 * 249 * 8 * 4, 2 * 3 * 16 * 16 * 4); // 249 full blocks of 8
    assert_eq!(cache.memory().index_bytes, codes + codebook);

    let attn = PqAttention::new(with_tail(), 0.25)?;
    let mut cache = attn.new_cache([2, 3, 16], 0, DType::BF16, &Device::Cpu)?;
    (0..2000).try_for_each(|_| cache.append(&key, &key))?;
    assert_eq!(cache.memory().index_bytes, 0);
    cache.build_index()?;
    let (coarse_codes, coarse, sums, counts) =
        (2 * 3 * 249 * 8, 2 * 3 * 32 * 16 * 4, 2 * 3 * 32 * 16 * 4, 2 * 3 * 32 * 4);
    assert_eq!(cache.memory().index_bytes, codes + codebook + coarse_codes + coarse + sums + counts);
    Ok(())
}

/// Counted to the byte: what an index with everything takes, and keys and codes up to the capacity.
#[test]
fn a_budget_is_all_that_is_reserved() -> Result<()> {
    let inner_product = PqConfig { metric: Metric::InnerProduct, ..small() };
    for (config, dtype) in [(small(), DType::F32), (with_tail(), DType::BF16), (inner_product, DType::F16)] {
        let attn = PqAttention::new(config.clone(), 0.25)?;
        let mut rng = Rng(3);
        let (keys, q) = (rng.tensor(&[2, 2, 400, 16], dtype), rng.tensor(&[2, 4, 400, 16], dtype));
        let run = |cache: &mut PqKvCache, from: usize, to: usize| {
            let [q, kv] = [&q, &keys].map(|tensor| tensor.narrow(2, from, to - from));
            let kv = kv?;
            attn.forward(&q?, &kv, &kv, cache)
        };
        // What 400 keys take where there is room for no more; 400 is a multiple of 16.
        let mut full = attn.new_cache([2, 2, 16], 400, dtype, &Device::Cpu)?;
        run(&mut full, 0, 400)?;
        full.build_index()?;
        let fixed = full.codebook().map_or(0, Codebook::bytes) + full.clusters().map_or(0, ClusterSums::bytes);
        let key = config.pq_dim + usize::from(config.coarse > 0);
        let bytes = full.memory().kv_bytes + 2 * 2 * 400 * key + fixed;

        assert!(full.set_max_bytes(bytes - 1).is_err());
        let mut cache = attn.new_cache([2, 2, 16], 0, dtype, &Device::Cpu)?;
        cache.set_max_bytes(bytes)?;
        run(&mut cache, 0, 100)?;
        assert_eq!(cache.capacity(), 256);
        run(&mut cache, 100, 300)?;
        assert_eq!(cache.capacity(), 400, "what is left, not the double");
        let before = (cache.len(), cache.memory(), numbers(&cache.keys()?));
        assert!(run(&mut cache, 0, 101).is_err());
        assert_eq!((cache.len(), cache.memory(), numbers(&cache.keys()?)), before);
        // It goes on as if nothing had been asked of it.
        run(&mut cache, 300, 399)?;
        let last = run(&mut cache, 399, 400)?;
        let mut free = attn.new_cache([2, 2, 16], 400, dtype, &Device::Cpu)?;
        for (from, to) in [(0, 100), (100, 300), (300, 399)] {
            run(&mut free, from, to)?;
        }
        assert_same_bits(&last, &run(&mut free, 399, 400)?, "last step");
    }
    Ok(())
}

/// Through trainings, blocks and the first sparse step, and with another run after a part was taken back.
#[test]
fn a_run_is_its_steps() -> Result<()> {
    let by_kv_head = PqConfig { selection: Selection::PerKvHead, ..with_tail() };
    for (config, dtype) in [(small(), DType::F32), (with_tail(), DType::BF16), (by_kv_head, DType::F32)] {
        let attn = PqAttention::new(config, 0.25)?;
        let mut rng = Rng(11);
        let [q, kv] = [6, 2].map(|heads| rng.tensor(&[2, heads, 200, 16], dtype));
        let new = || attn.new_cache([2, 2, 16], 0, dtype, &Device::Cpu);
        let (runs, steps) = (&mut new()?, &mut new()?);
        let at = |from: usize, s: usize| Ok::<_, candle_core::Error>((q.narrow(2, from, s)?, kv.narrow(2, from, s)?));
        let (prompt, prompt_kv) = at(0, 40)?;
        attn.forward(&prompt, &prompt_kv, &prompt_kv, runs)?;
        attn.forward(&prompt, &prompt_kv, &prompt_kv, steps)?;
        let mut position = 40;
        for s in [1, 2, 8, 3, 5, 7, 4, 6, 8, 8, 8, 2, 8, 8, 8].into_iter().cycle().take(20) {
            let (run, run_kv) = at(position, s)?;
            let got = attn.forward_run(&run, &run_kv, &run_kv, runs)?;
            let want: Result<Vec<_>> = (position..position + s)
                .map(|position| at(position, 1).and_then(|(q, kv)| attn.forward(&q, &kv, &kv, steps)))
                .collect();
            assert_same_bits(&got, &Tensor::cat(&want?, 2)?, &format!("{s} from {position} on"));
            // A part of them is accepted.
            position += s.div_ceil(2) + s % 3 / 2;
            runs.truncate(position)?;
            steps.truncate(position)?;
            assert_same_cache(runs, steps, "after a part was taken back")?;
        }
    }
    Ok(())
}

#[test]
fn a_run_that_fails_leaves_the_cache_as_it_was() -> Result<()> {
    let attn = PqAttention::new(with_tail(), 0.25)?;
    let mut rng = Rng(12);
    let [q, kv] = [4, 2].map(|heads| rng.tensor(&[1, heads, 300, 16], DType::F32));
    let run = |cache: &mut PqKvCache, from, s| {
        let (q, kv) = (q.narrow(2, from, s)?, kv.narrow(2, from, s)?);
        attn.forward_run(&q, &kv, &kv, cache)
    };
    let new = || -> Result<PqKvCache> {
        let mut cache = attn.new_cache([1, 2, 16], 256, DType::F32, &Device::Cpu)?;
        let kv = kv.narrow(2, 0, 250)?;
        attn.forward(&q.narrow(2, 0, 250)?, &kv, &kv, &mut cache)?;
        cache.build_index()?;
        Ok(cache)
    };
    // No room for the seventh: none of them is begun.
    let (mut cache, mut other) = (new()?, new()?);
    cache.set_max_bytes(85_000)?;
    let error = run(&mut cache, 250, 8).expect_err("no room").to_string();
    assert!(error.starts_with("PqKvCache: max_bytes: expected 258 keys to take at most 85000 bytes"), "{error}");
    assert_eq!(cache.capacity(), other.capacity());
    assert_same_cache(&mut cache, &mut other, "after a run that failed")?;
    assert_same_bits(&run(&mut cache, 250, 6)?, &run(&mut other, 250, 6)?, "a run that fits");
    Ok(())
}

/// Codes and sums too, where the call made the cache grow, trained a codebook, or filled a block before it failed.
#[test]
fn a_call_that_fails_leaves_the_index_as_it_was() -> Result<()> {
    let attn = PqAttention::new(with_tail(), 0.25)?;
    let failing = attn.clone().with_prefill(|_, _, _, _| candle_core::bail!("no prefill today"));
    let mut rng = Rng(13);
    for (len, s) in [(250, 20), (256, 2), (100, 90)] {
        let [q, kv] = [4, 2].map(|heads| rng.tensor(&[1, heads, len + s, 16], DType::F32));
        let mut cache = attn.new_cache([1, 2, 16], 256, DType::F32, &Device::Cpu)?;
        let at = |tensor: &Tensor, from: usize, to: usize| tensor.narrow(2, from, to - from);
        attn.forward(&at(&q, 0, len)?, &at(&kv, 0, len)?, &at(&kv, 0, len)?, &mut cache)?;
        cache.build_index()?;
        let index = |cache: &PqKvCache| -> Result<_> {
            let clusters = cache.clusters().map(|clusters| (numbers(&clusters.sums), integers(&clusters.counts)));
            Ok((integers(&cache.codes()?), clusters, cache.memory()))
        };
        let before = index(&cache)?;
        let (q, kv) = (at(&q, len, len + s)?, at(&kv, len, len + s)?);
        assert!(failing.forward(&q, &kv, &kv, &mut cache).is_err());
        assert!(index(&cache)? == before, "{s} keys after {len}");
        // A run that fails at its end, having trained on the way.
        let mut graph = DecodeGraph::new(|_: &Tensor, _: &Tensor, caches: &mut [PqKvCache]| {
            attn.forward_run(&q, &kv, &kv, &mut caches[0])?;
            caches[0].build_index()?;
            candle_core::bail!("no step today")
        });
        let caches = std::slice::from_mut(&mut cache);
        assert!(graph.step(&Tensor::zeros(1, DType::U32, &Device::Cpu)?, caches).is_err());
        assert!(index(&cache)? == before, "a run of {s} keys after {len}");
    }
    Ok(())
}

/// Views of a cache are keys like any others.
#[test]
fn a_cache_takes_its_own_keys() -> Result<()> {
    let keys = Rng(13).tensor(&[1, 2, 100, 16], DType::F32);
    for h_kv in [1, 2] {
        let mut cache = PqKvCache::new(small(), [1, h_kv, 16], 160, DType::F32, &Device::Cpu)?;
        let keys = keys.narrow(1, 0, h_kv)?;
        cache.append(&keys, &keys)?;
        let own = cache.keys()?.narrow(2, 30, 50)?;
        cache.append(&own, &cache.values()?.narrow(2, 0, 50)?)?;
        let want = |from| Tensor::cat(&[&keys, &keys.narrow(2, from, 50)?], 2);
        assert_same_bits(&cache.keys()?, &want(30)?, "keys");
        assert_same_bits(&cache.values()?, &want(0)?, "values");
    }
    Ok(())
}

/// Where a sparse decode would differ, `forward_dense` does not; and neither is tracked for a backward pass.
#[test]
fn forward_dense_is_dense() -> Result<()> {
    let mut rng = Rng(7);
    let attn = PqAttention::new(small(), 0.25)?;
    let mut cache = attn.new_cache([1, 2, 16], 0, DType::F32, &Device::Cpu)?;
    let prompt = rng.tensor(&[1, 2, 300, 16], DType::F32);
    cache.append(&prompt, &prompt)?;
    let (query, kv) = (rng.tensor(&[1, 4, 1, 16], DType::F32), rng.tensor(&[1, 2, 1, 16], DType::F32));
    let query = candle_core::Var::from_tensor(&(query * 4.0)?)?;
    let dense = attn.forward_dense(&query, &kv, &kv, &mut cache)?;
    let want = ops::dense_attend(&query, &cache.keys()?, &cache.values()?, 0.25)?;
    assert_same_bits(&dense, &want.out, "dense");
    cache.truncate(300)?;
    let sparse = attn.forward(&query, &kv, &kv, &mut cache)?;
    assert_ne!(numbers(&sparse), numbers(&dense));
    assert!(!dense.track_op() && !sparse.track_op());
    Ok(())
}

/// A function handed in takes the place of prefill alone, sees the whole cache, and cannot return nonsense.
#[test]
fn prefill_may_be_handed_in() -> Result<()> {
    let mut rng = Rng(8);
    let inputs = [4, 2, 2].map(|heads| rng.tensor(&[1, heads, 20, 16], DType::F32));
    let attn = PqAttention::new(small(), 0.25)?;
    let mine = attn.clone().with_prefill(|q, k, v, scale| {
        assert_eq!((q.dims(), k.dims(), v.dims(), scale), (&[1, 4, 8, 16][..], &[1, 2, 20, 16][..], k.dims(), 0.25));
        q.affine(2.0, 0.0)
    });
    let part = |x: &Tensor, from, s| x.narrow(2, from, s);
    let mut cache = mine.new_cache([1, 2, 16], 0, DType::F32, &Device::Cpu)?;
    cache.append(&part(&inputs[1], 0, 12)?, &part(&inputs[2], 0, 12)?)?;
    let query = part(&inputs[0], 12, 8)?;
    let out = mine.forward(&query, &part(&inputs[1], 12, 8)?, &part(&inputs[2], 12, 8)?, &mut cache)?;
    assert_same_bits(&out, &query.affine(2.0, 0.0)?, "prefill");
    let one = [4, 2, 2].map(|heads| rng.tensor(&[1, heads, 1, 16], DType::F32));
    let decoded = mine.forward(&one[0], &one[1], &one[2], &mut cache)?;
    cache.truncate(20)?;
    assert_same_bits(&decoded, &attn.forward(&one[0], &one[1], &one[2], &mut cache)?, "decode");

    let bad = attn.with_prefill(|_, _, values, _| Ok(values.clone()));
    let before = cache.len();
    let error = bad.forward(&inputs[0], &inputs[1], &inputs[2], &mut cache).expect_err("another shape").to_string();
    let expected =
        "PqAttention: prefill function: expected a result of ([1, 4, 20, 16], F32), got ([1, 2, 41, 16], F32)";
    assert_eq!(error.lines().next(), Some(expected));
    assert_eq!(cache.len(), before, "undone");
    Ok(())
}

#[test]
fn results_do_not_depend_on_the_number_of_threads() -> Result<()> {
    let mut rng = Rng(4);
    let attn = PqAttention::new(with_tail(), 0.25)?;
    // Candidates of more than a block.
    let inputs: Vec<_> =
        [5000, 1].into_iter().map(|s| [6, 2, 2].map(|heads| rng.tensor(&[1, heads, s, 16], DType::F32))).collect();
    let run = || -> Result<Vec<Tensor>> {
        let mut cache = attn.new_cache([1, 2, 16], 0, DType::F32, &Device::Cpu)?;
        let [_, k, v] = &inputs[0];
        cache.append(k, v)?;
        let [query, k, v] = &inputs[1];
        let mut outs = vec![attn.forward(query, k, v, &mut cache)?];
        outs.push(cache.codebook().expect("a codebook").centroids()?);
        outs.push(cache.codes()?);
        outs.push(cache.coarse_codes()?.expect("coarse codes"));
        outs.push(cache.clusters().expect("clusters").sums.clone());
        let dense = ops::dense_attend(query, &cache.keys()?, &cache.values()?, 0.25)?;
        outs.extend([dense.out, dense.lse]);
        Ok(outs)
    };
    let pool = |threads| rayon::ThreadPoolBuilder::new().num_threads(threads).build().expect("a thread pool");
    let (one, many) = (pool(1).install(run)?, pool(5).install(run)?);
    for (one, many) in one.iter().zip(&many) {
        assert_same_bits(one, many, "threads");
    }
    Ok(())
}

#[test]
fn codebook_survives_a_file() -> Result<()> {
    let keys = Rng(5).tensor(&[1, 2, 300, 16], DType::F32);
    for config in [small(), PqConfig { metric: Metric::InnerProduct, ..small() }, with_tail()] {
        let (metric, coarse) = (config.metric, config.coarse);
        let codebook = Codebook::train(&keys, &config)?;
        let name = format!("candle-pq-attn-{}-{metric:?}-{coarse}.safetensors", std::process::id());
        let path = std::env::temp_dir().join(name);
        codebook.save(&path)?;
        let loaded = Codebook::load(&path, &Device::Cpu);
        std::fs::remove_file(&path)?;
        let loaded = loaded?;
        assert_eq!((loaded.dims(), loaded.metric(), loaded.bytes()), (codebook.dims(), metric, codebook.bytes()));
        let ((codes, clusters), (loaded_codes, loaded_clusters)) = (codebook.encode(&keys)?, loaded.encode(&keys)?);
        assert_same_bits(&codes, &loaded_codes, "codes");
        assert_eq!(clusters.as_ref().map(integers), loaded_clusters.as_ref().map(integers));
        assert_eq!(clusters.is_some(), coarse > 0);
        // A codebook that was handed in is kept: it is not the cache's to train.
        let mut cache = PqKvCache::new(config, [1, 2, 16], 0, DType::F32, &Device::Cpu)?;
        cache.set_codebook(loaded)?;
        cache.append(&keys, &keys)?;
        cache.build_index()?;
        cache.truncate(0)?;
        cache.reset()?;
        cache.append(&keys, &keys)?;
        cache.build_index()?;
        assert_same_bits(&cache.codebook().expect("kept").centroids()?, &codebook.centroids()?, "centroids");
        assert_same_bits(&cache.codes()?, &codebook.encode(&keys.narrow(2, 3, 296)?)?.0, "codes");
        let other = Codebook::train(&keys.narrow(2, 100, 100)?, cache.config())?;
        cache.set_codebook(other.clone())?;
        cache.build_index()?;
        assert_same_bits(&cache.codes()?, &other.encode(&keys.narrow(2, 3, 296)?)?.0, "codes of the new codebook");
    }
    Ok(())
}

/// Clusters and residuals come from one sample of the keys, as k-means takes it.
#[test]
fn clusters_and_residuals_are_of_the_same_sample() -> Result<()> {
    let all = Rng(9).tensor(&[2, 2, 200, 16], DType::BF16);
    let config = PqConfig { max_train_keys: 100, ..with_tail() };
    let half = all.reshape((2, 2, 100, 32))?.narrow(3, 0, 16)?;
    // A view with gaps between the heads, as a cache's keys are.
    let (a, b) = (Codebook::train(&lay_out(&all, Strides::Capacity)?, &config)?, Codebook::train(&half, &config)?);
    assert_same_bits(a.coarse().expect("clusters"), b.coarse().expect("clusters"), "clusters");
    assert_same_bits(&a.centroids()?, &b.centroids()?, "centroids");
    // Cut into blocks, to residuals that are what the clusters leave.
    let many = Rng(10).tensor(&[1, 2, 9000, 16], DType::BF16);
    let codebook = Codebook::train(&many, &config)?;
    let (codes, clusters) = codebook.encode(&many)?;
    let clusters = clusters.expect("clusters");
    let coarse = codebook.coarse().expect("clusters");
    let (keys, centers) = (numbers(&many), numbers(coarse));
    let residuals: Vec<f32> = integers(&clusters)
        .into_iter()
        .enumerate()
        .flat_map(|(t, c)| {
            let centroid = row(&centers, t / 9000 * 32 + c as usize, 16);
            row(&keys, t, 16).iter().zip(centroid).map(|(x, y)| *x as f32 - *y as f32).collect::<Vec<_>>()
        })
        .collect();
    let residuals = Tensor::from_vec(residuals, (1, 2, 9000, 16), &Device::Cpu)?;
    assert_same_bits(&codes, &ops::encode(&residuals, &codebook.centroids()?, None)?, "codes");
    assert_same_bits(&clusters, &ops::encode(&many, &coarse.unsqueeze(2)?, None)?.squeeze(3)?, "clusters");
    assert_eq!(codebook.encode(&many.narrow(2, 0, 0)?)?.0.dims(), [1, 2, 0, 4]);
    Ok(())
}

#[test]
fn config_survives_serde() -> std::result::Result<(), Box<dyn std::error::Error>> {
    let config = PqConfig { init_offset: Some(7), heavy: Heavy::Keys(9), metric: Metric::InnerProduct, ..small() };
    assert_eq!(serde_json::from_str::<PqConfig>(&serde_json::to_string(&config)?)?, config);
    assert_eq!(serde_json::from_str::<PqConfig>(&serde_json::to_string(&with_tail())?)?, with_tail());
    assert_eq!(serde_json::from_str::<PqConfig>("{}")?, PqConfig::default());
    let plain = serde_json::from_str::<PqConfig>(r#"{"coarse": 0, "tail": "none"}"#)?;
    assert_eq!((plain.coarse, plain.tail), (0, Tail::None));
    assert_eq!(serde_json::from_str::<PqConfig>(r#"{"tail": "cluster_means"}"#)?.tail, Tail::ClusterMeans);
    assert_eq!(serde_json::from_str::<PqConfig>(r#"{"heavy": {"fraction": 0.5}}"#)?.heavy, Heavy::Fraction(0.5));
    assert!(serde_json::from_str::<PqConfig>(r#"{"heavvy": 5}"#).is_err());
    for (text, heavy) in [("512", Heavy::Keys(512)), (" 2.5% ", Heavy::Fraction(0.025)), ("100%", Heavy::Fraction(1.0))]
    {
        assert_eq!(text.parse::<Heavy>()?, heavy);
        assert_eq!(heavy.to_string().parse::<Heavy>()?, heavy);
    }
    Ok(())
}

/// `n <= max(sink + heavy + window, heavy + init_offset + 1 + n_centroids)`, and the budget is never overdrawn.
#[test]
fn fallback_follows_the_formula() {
    let config = small(); // 3 + 12 + 8 against 12 + 3 + 1 + 16
    assert!(config.is_dense(32) && !config.is_dense(33));
    let coarse = PqConfig { coarse: 64, ..small() }; // 12 + 3 + 1 + 64
    assert!(coarse.is_dense(80) && !coarse.is_dense(81));
    let wide = PqConfig { window: 100, ..small() }; // 3 + 12 + 100
    assert!(wide.is_dense(115) && !wide.is_dense(116));
    for n in 0..300 {
        assert_eq!(config.attended(n), if n <= 32 { n } else { 23 });
        assert!(PqConfig { heavy: Heavy::Fraction(1.0), ..small() }.is_dense(n));
    }
    let all = PqConfig { sink: usize::MAX, window: usize::MAX, heavy: Heavy::Keys(usize::MAX), ..small() };
    assert!(all.is_dense(1 << 40) && all.attended(100) == 100);
    // No config is valid with these, but asking costs nothing.
    for beyond in [PqConfig { coarse: usize::MAX, ..small() }, PqConfig { pq_bits: 64, ..small() }] {
        assert!(beyond.is_dense(1 << 40));
    }
    for percent in 1..=100 {
        let heavy: Heavy = format!("{percent}%").parse().expect("a share");
        assert_eq!((heavy.count(100), heavy.count(10_000)), (percent, 100 * percent));
        assert_eq!(heavy.to_string(), format!("{percent}%"));
    }
    assert_eq!((Heavy::Fraction(0.001).count(1500), Heavy::Fraction(0.02).count(51)), (2, 2));
    let late = PqConfig { init_offset: Some(40), window: 30, ..small() };
    assert_eq!((late.attended(70), late.candidates(75)), (3 + 30, 40..45));
}
