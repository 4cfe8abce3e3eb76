//! Weights from queries: what they are, what they do to codes, and that they depend on the positions in the cache alone.

mod common;

use candle_core::{DType, Device, Result, Tensor};
use candle_pq_attn::ops;
use candle_pq_attn::{Codebook, PqAttention, PqConfig, PqKvCache, Tail};
use common::*;
use proptest::prelude::{any, prop, proptest, ProptestConfig};

/// Weighted, with clusters and without.
fn configs() -> [PqConfig; 2] {
    [with_tail(), PqConfig { query_weights: true, ..small() }]
}

/// Queries that look at some elements, as at the other of their rotary pairs, more than at others.
fn queries(rng: &mut Rng, dims: &[usize; 4], dtype: DType) -> Result<Tensor> {
    let sizes: Vec<f32> = (0..dims[3]).map(|i| [4.0, 1.0, 0.0, 0.25, 2.0][i % (dims[3] / 2).max(1) % 5]).collect();
    let queries = rng.tensor(dims, DType::F32).broadcast_mul(&Tensor::new(sizes, &Device::Cpu)?)?;
    queries.to_dtype(dtype)
}

/// Attends to positions `from` to `to` as a chunk of a prompt.
fn read(attn: &PqAttention, [q, k, v]: [&Tensor; 3], from: usize, to: usize, cache: &mut PqKvCache) -> Result<()> {
    let part = |x: &Tensor| x.narrow(2, from, to - from);
    attn.forward(&part(q)?, &part(k)?, &part(v)?, cache).map(drop)
}

fn bits_of(tensor: Option<&Tensor>) -> Option<Vec<u64>> {
    tensor.map(|tensor| numbers(tensor).into_iter().map(f64::to_bits).collect())
}

#[track_caller]
fn assert_same_index(a: &mut PqKvCache, b: &mut PqKvCache, what: &str) -> Result<()> {
    a.build_index()?;
    b.build_index()?;
    assert_eq!((a.len(), a.memory()), (b.len(), b.memory()), "{what}");
    assert_same_bits(&a.codes()?, &b.codes()?, what);
    let (a, b) = (a.codebook(), b.codebook());
    assert_eq!(a.is_some(), b.is_some(), "{what}");
    if let (Some(a), Some(b)) = (a, b) {
        assert_same_bits(&a.centroids()?, &b.centroids()?, what);
        assert_eq!(bits_of(a.weights()), bits_of(b.weights()), "{what}");
        assert_eq!(bits_of(a.coarse()), bits_of(b.coarse()), "{what}");
    }
    Ok(())
}

/// Roots of mean squares over a group's queries at 32 positions of each doubling from 128 on and every fourth before, as one
/// with the other of a rotary pair, with one query more that looks at everything.
#[test]
fn weights_are_roots_of_mean_squares() -> Result<()> {
    let mut rng = Rng(1);
    for (b, h, h_kv, d, n, dtype) in [
        (2, 6, 2, 16, 300, DType::F32),
        (1, 3, 3, 7, 90, DType::F16),
        (1, 4, 1, 1, 50, DType::BF16),
        (1, 2, 2, 20, 1100, DType::BF16),
    ] {
        let config = PqConfig { pq_dim: 1, query_weights: true, ..small() };
        let attn = PqAttention::new(config, 0.25)?;
        let q = queries(&mut rng, &[b, h, n, d], dtype)?;
        let (k, v) = (rng.tensor(&[b, h_kv, n, d], dtype), rng.tensor(&[b, h_kv, n, d], dtype));
        let mut cache = attn.new_cache([b, h_kv, d], 0, dtype, &Device::Cpu)?;
        read(&attn, [&q, &k, &v], 0, n, &mut cache)?;
        cache.build_index()?;
        let got = numbers(cache.codebook().and_then(Codebook::weights).expect("weights"));
        let q = numbers(&q);
        for kv in 0..b * h_kv {
            let group = h / h_kv;
            let of_doubling = |from: usize| (from..2 * from).step_by(from / 32);
            let sampled = (0..128).step_by(4).chain([128, 256, 512, 1024].into_iter().flat_map(of_doubling));
            let sampled: Vec<usize> = sampled.filter(|t| *t < n).collect();
            let sampled = &sampled;
            let rows = (kv * group..(kv + 1) * group).flat_map(|head| sampled.iter().map(move |t| head * n + t));
            let rows: Vec<_> = rows.map(|at| row(&q, at, d)).collect();
            let mean: Vec<f64> =
                (0..d).map(|i| rows.iter().map(|q| q[i] * q[i]).sum::<f64>() / rows.len() as f64).collect();
            let all = mean.iter().sum::<f64>() / d as f64;
            let count = sampled.len() as f64;
            let gap = d.div_ceil(2);
            let want: Vec<f64> = (0..d)
                .map(|i| {
                    let other = if i < d / 2 {
                        i + gap
                    } else if i >= gap {
                        i - gap
                    } else {
                        i
                    };
                    (((mean[i] + mean[other]) / 2.0 + all / count) / (all + all / count)).sqrt()
                })
                .collect();
            assert_close(row(&got, kv, d), &want, 1e-6, &format!("{d} {dtype:?}"));
        }
    }
    Ok(())
}

/// Codes are those of keys multiplied by the weights, scores those of what the codes stand for, divided by them.
#[test]
fn codes_are_of_weighted_keys_and_scores_of_keys() -> Result<()> {
    let mut rng = Rng(2);
    let (b, h_kv, n, d) = (2, 3, 5000, 16);
    for (config, dtype) in configs().into_iter().flat_map(|config| DTYPES.map(|dtype| (config.clone(), dtype))) {
        let keys = rng.tensor(&[b, h_kv, n, d], dtype);
        let weights: Vec<f32> = (0..b * h_kv * d).map(|_| rng.normal().abs() + 0.01).collect();
        let weights = Tensor::from_vec(weights, (b, h_kv, d), &Device::Cpu)?;
        let weighted = keys.to_dtype(DType::F32)?.broadcast_mul(&weights.unsqueeze(2)?)?;
        let codebook = Codebook::train_weighted(&lay_out(&keys, Strides::Capacity)?, Some(&weights), &config)?;
        let reference = Codebook::train(&weighted, &config)?;
        let (codes, clusters) = codebook.encode(&lay_out(&keys, Strides::Transposed)?)?;
        let (want, want_clusters) = reference.encode(&weighted)?;
        assert_same_bits(&codes, &want, "codes");
        assert_eq!(clusters.as_ref().map(integers), want_clusters.as_ref().map(integers));
        let unweighted = Codebook::train(&keys, &config)?.encode(&keys)?.0;
        assert_ne!(integers(&codes), integers(&unweighted), "weights change codes");

        let query = rng.tensor(&[b, h_kv, 1, d], DType::F32);
        let less = query.broadcast_div(&weights.unsqueeze(2)?)?;
        let score = |query: &Tensor, codebook: &Codebook| match (&clusters, codebook.coarse()) {
            (Some(clusters), Some(coarse)) => {
                ops::residual_score(query, &codes, &codebook.centroids()?, clusters, coarse)
            }
            _ => ops::score(query, &codes, &codebook.centroids()?),
        };
        assert_close(&numbers(&score(&query, &codebook)?), &numbers(&score(&less, &reference)?), 1e-5, "scores");
        assert_eq!(bits_of(codebook.weights()), bits_of(Some(&weights)));
        assert!(codebook.bytes() > 2 * reference.bytes());
    }
    Ok(())
}

/// Without queries, and with queries that say nothing, there is nothing to weigh by.
#[test]
fn keys_without_queries_are_not_weighted() -> Result<()> {
    let mut rng = Rng(3);
    for config in configs() {
        let attn = PqAttention::new(config.clone(), 0.25)?;
        let off = PqAttention::new(PqConfig { query_weights: false, ..config }, 0.25)?;
        let [q, k, v] = [4, 2, 2].map(|heads| rng.tensor(&[1, heads, 300, 16], DType::F32));
        let cache = |attn: &PqAttention| attn.new_cache([1, 2, 16], 0, DType::F32, &Device::Cpu);
        let (mut appended, mut silent, mut unweighted) = (cache(&attn)?, cache(&attn)?, cache(&off)?);
        appended.append(&k, &v)?;
        read(&attn, [&q.zeros_like()?, &k, &v], 0, 300, &mut silent)?;
        read(&off, [&q, &k, &v], 0, 300, &mut unweighted)?;
        for cache in [&mut appended, &mut silent, &mut unweighted] {
            cache.build_index()?;
        }
        let weights = |cache: &PqKvCache| cache.codebook().and_then(Codebook::weights).map(numbers);
        assert_eq!((weights(&appended), weights(&unweighted)), (None, None));
        assert_eq!(weights(&silent), Some(vec![1.0; 32]));
        assert_same_bits(&appended.codes()?, &unweighted.codes()?, "without queries");
        assert_same_bits(&silent.codes()?, &unweighted.codes()?, "with silent ones");
    }
    Ok(())
}

/// What weights are for: queries that look at a few elements only.
#[test]
fn weights_bring_a_step_closer_to_dense() -> Result<()> {
    let mut rng = Rng(4);
    let n = 1500;
    let q = queries(&mut rng, &[1, 4, n, 16], DType::F32)?;
    let (k, v) = (rng.tensor(&[1, 2, n, 16], DType::F32), rng.tensor(&[1, 2, n, 16], DType::F32));
    for config in configs() {
        let error = |config: PqConfig| -> Result<f64> {
            let attn = PqAttention::new(config, 0.25)?;
            let mut cache = attn.new_cache([1, 2, 16], 0, DType::F32, &Device::Cpu)?;
            read(&attn, [&q, &k, &v], 0, n - 200, &mut cache)?;
            let mut sum = 0.0;
            for t in n - 200..n {
                let part = |x: &Tensor| x.narrow(2, t, 1);
                let out = attn.forward(&part(&q)?, &part(&k)?, &part(&v)?, &mut cache)?;
                let dense = ops::dense_attend(&part(&q)?, &cache.keys()?, &cache.values()?, 0.25)?.out;
                sum += numbers(&(out - dense)?.sqr()?.sum_all()?)[0];
            }
            Ok(sum.sqrt())
        };
        let (with, without) = (error(config.clone())?, error(PqConfig { query_weights: false, ..config })?);
        assert!(with < 0.9 * without, "{with} with weights, {without} without");
    }
    Ok(())
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 24, failure_persistence: None, ..ProptestConfig::default() })]

    /// A prompt in chunks is a prompt, to the bit; and what was appended and truncated leaves no trace in the weights.
    #[test]
    fn the_weights_depend_on_the_positions_alone(
        seed in any::<u64>(), chunks in prop::collection::vec(2usize..90, 0..8), dropped in 2usize..200,
        build in any::<bool>(), kind in 0usize..2, dtype in 0usize..3,
    ) {
        let (n, dtype) = (300, DTYPES[dtype]);
        let mut rng = Rng(seed);
        let attn = PqAttention::new(configs()[kind].clone(), 0.25).unwrap();
        let [q, other] = [(); 2].map(|()| queries(&mut rng, &[2, 4, n, 16], dtype).unwrap());
        let (k, v) = (rng.tensor(&[2, 2, n, 16], dtype), rng.tensor(&[2, 2, n, 16], dtype));
        let cache = || attn.new_cache([2, 2, 16], 0, dtype, &Device::Cpu).unwrap();
        let (mut whole, mut cut) = (cache(), cache());
        read(&attn, [&q, &k, &v], 0, n, &mut whole).unwrap();
        let mut at = 0;
        for chunk in chunks.into_iter().chain([n]) {
            // No chunk of one, which would be a decode step.
            let end = if at + chunk + 1 >= n { n } else { at + chunk };
            if at < end {
                read(&attn, [&q, &k, &v], at, end, &mut cut).unwrap();
                let dropped = dropped.min(n - 1);
                read(&attn, [&other, &v, &k], 0, dropped, &mut cut).unwrap();
                if build {
                    cut.build_index().unwrap();
                }
                cut.truncate(end).unwrap();
            }
            at = end;
        }
        let (mut one, mut other) = (whole, cut);
        assert_same_index(&mut one, &mut other, "in chunks").unwrap();
        assert!(one.codebook().and_then(Codebook::weights).is_some());
        one.reset().unwrap();
        one.append(&k, &v).unwrap();
        one.build_index().unwrap();
        assert!(one.codebook().and_then(Codebook::weights).is_none(), "forgotten");
    }
}

/// Weights stay as they are from one training to the next, whatever queries come.
#[test]
fn weights_are_frozen_until_the_next_training() -> Result<()> {
    let mut rng = Rng(5);
    let attn = PqAttention::new(PqConfig { refresh: 0.5, ..with_tail() }, 0.25)?;
    let (first, second) = (queries(&mut rng, &[1, 4, 100, 16], DType::F32)?, rng.tensor(&[1, 4, 100, 16], DType::F32));
    let kv = rng.tensor(&[1, 2, 100, 16], DType::F32);
    let mut cache = attn.new_cache([1, 2, 16], 0, DType::F32, &Device::Cpu)?;
    let weights = |cache: &PqKvCache| bits_of(cache.codebook().and_then(Codebook::weights)).expect("weights");
    read(&attn, [&first, &kv, &kv], 0, 100, &mut cache)?;
    cache.build_index()?;
    let before = weights(&cache);
    read(&attn, [&second, &kv, &kv], 0, 30, &mut cache)?;
    cache.build_index()?;
    assert_eq!(weights(&cache), before, "not yet half as many more");
    read(&attn, [&second, &kv, &kv], 30, 60, &mut cache)?;
    cache.build_index()?;
    assert_ne!(weights(&cache), before, "trained again");
    Ok(())
}

/// A failed prefill leaves no queries behind.
#[test]
fn a_failed_prefill_is_forgotten() -> Result<()> {
    let mut rng = Rng(6);
    let attn = PqAttention::new(with_tail(), 0.25)?;
    let failing = attn.clone().with_prefill(|_, _, values, _| values.narrow(2, 0, 1));
    let [q, k, v] = [4, 2, 2].map(|heads| rng.tensor(&[1, heads, 100, 16], DType::F32));
    let mut cache = attn.new_cache([1, 2, 16], 0, DType::F32, &Device::Cpu)?;
    read(&attn, [&q, &k, &v], 0, 50, &mut cache)?;
    let before = cache.memory();
    assert!(read(&failing, [&q, &k, &v], 50, 100, &mut cache).is_err());
    assert_eq!(cache.memory(), before);
    read(&attn, [&q, &k, &v], 50, 100, &mut cache)?;
    // Of 25 positions now rather than 13.
    assert_eq!(cache.memory().index_bytes - before.index_bytes, 12 * 2 * 8 * 4);
    Ok(())
}

#[test]
fn weights_survive_a_file() -> Result<()> {
    let mut rng = Rng(7);
    let keys = rng.tensor(&[1, 2, 300, 16], DType::F32);
    let weights = (rng.tensor(&[1, 2, 16], DType::F32).abs()? + 0.1)?;
    for config in configs() {
        let name = format!("candle-pq-attn-weights-{}-{}.safetensors", std::process::id(), config.coarse);
        let path = std::env::temp_dir().join(name);
        let codebook = Codebook::train_weighted(&keys, Some(&weights), &config)?;
        codebook.save(&path)?;
        let loaded = Codebook::load(&path, &Device::Cpu);
        // The same with a weight of 0.
        let mut tensors = candle_core::safetensors::load(&path, &Device::Cpu)?;
        tensors.insert("weights".to_string(), weights.zeros_like()?);
        candle_core::safetensors::save(&tensors, &path)?;
        let zero = Codebook::load(&path, &Device::Cpu);
        std::fs::remove_file(&path)?;
        let loaded = loaded?;
        assert_eq!((bits_of(loaded.weights()), loaded.bytes()), (bits_of(Some(&weights)), codebook.bytes()));
        assert_same_bits(&loaded.centroids()?, &codebook.centroids()?, "centroids");
        assert_eq!(bits_of(loaded.coarse()), bits_of(codebook.coarse()));
        assert_same_bits(&loaded.encode(&keys)?.0, &codebook.encode(&keys)?.0, "codes");
        let error = zero.expect_err("a weight of 0").to_string();
        let expected = format!("Codebook: {}: weights: expected positive finite numbers, got 0", path.display());
        assert_eq!(error, expected);
        // Handed in, it stays, weights and all.
        let mut cache = PqKvCache::new(config.clone(), [1, 2, 16], 0, DType::F32, &Device::Cpu)?;
        cache.set_codebook(loaded)?;
        cache.append(&keys, &keys)?;
        cache.build_index()?;
        assert_same_bits(&cache.codes()?, &codebook.encode(&keys.narrow(2, 3, 296)?)?.0, "codes of a cache");
        assert_eq!(cache.clusters().is_some(), config.tail == Tail::ClusterMeans);
    }
    Ok(())
}
