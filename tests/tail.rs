//! Residual codes and the tail: each op against a naive f64 reference, and decode steps with both.

mod common;

use candle_core::{DType, Device, Result, Tensor};
use candle_pq_attn::ops::{self, Attended, ClusterSums, Selected};
use candle_pq_attn::{Codebook, Heavy, PqAttention, PqConfig, PqKvCache, Selection, Tail};
use common::*;

/// `(b, h, h_kv, n, head_dim)`: MHA, GQA of even and odd groups, MQA; n around the kernels' blocks.
const SHAPES: [(usize, usize, usize, usize, usize); 6] = [
    (1, 4, 4, 33, 64),
    (2, 9, 3, 255, 24),
    (3, 5, 1, 257, 80),
    (1, 6, 2, 1, 48),
    (2, 2, 2, 4097, 7),
    (1, 22, 2, 9000, 16),
];

fn random_codes(rng: &mut Rng, dims: &[usize], limit: usize) -> Result<Tensor> {
    let codes: Vec<u8> = (0..dims.iter().product()).map(|_| rng.below(limit) as u8).collect();
    Tensor::from_vec(codes, dims, &Device::Cpu)
}

#[test]
fn residual_score_is_of_the_reconstructed_key() -> Result<()> {
    let mut rng = Rng(1);
    for (b, h, h_kv, n, d) in SHAPES {
        for (pq_dim, c, clusters) in [(1, 256, 2), (d, 2, 256), (if d % 4 == 0 { d / 4 } else { 1 }, 32, 64)] {
            for (dtype, strides) in DTYPES.into_iter().zip(STRIDES.into_iter().cycle().skip(rng.below(4))) {
                let query = rng.tensor(&[b, h, 1, d], dtype);
                let centroids = rng.tensor(&[b, h_kv, pq_dim, c, d / pq_dim], DType::F32);
                let coarse = (rng.tensor(&[b, h_kv, clusters, d], DType::F32) * 3.0)?;
                let codes = random_codes(&mut rng, &[b, h_kv, n, pq_dim], c)?;
                let coarse_codes = random_codes(&mut rng, &[b, h_kv, n], clusters)?;
                let scores = ops::residual_score(
                    &lay_out(&query, strides)?,
                    &lay_out(&codes, strides)?,
                    &lay_out(&centroids, strides)?,
                    &lay_out(&coarse_codes, strides)?,
                    &lay_out(&coarse, strides)?,
                )?;
                assert_eq!(scores.dims(), [b, h, n]);
                let (query, centroids, coarse) = (numbers(&query), numbers(&centroids), numbers(&coarse));
                let (codes, coarse_codes) = (integers(&codes), integers(&coarse_codes));
                let want: Vec<f64> = (0..b * h * n)
                    .map(|i| {
                        let (bh, t) = (i / n, i % n);
                        let kv = bh / h * h_kv + bh % h / (h / h_kv);
                        let mut key = row(&coarse, kv * clusters + coarse_codes[kv * n + t] as usize, d).to_vec();
                        for (m, key) in key.chunks_mut(d / pq_dim).enumerate() {
                            let code = codes[(kv * n + t) * pq_dim + m] as usize;
                            let residual = row(&centroids, (kv * pq_dim + m) * c + code, d / pq_dim);
                            key.iter_mut().zip(residual).for_each(|(x, r)| *x += r);
                        }
                        row(&query, bh, d).iter().zip(&key).map(|(q, k)| q * k).sum()
                    })
                    .collect();
                assert_close(&numbers(&scores), &want, 1e-6, "scores");
            }
        }
    }
    Ok(())
}

/// To the bit: the cluster's entry first, then those of the subspaces, each summed from its first coordinate on.
#[test]
fn residual_score_sums_in_the_documented_order() -> Result<()> {
    let (mut rng, n, d, pq_dim) = (Rng(2), 300, 20, 10);
    let query = (rng.tensor(&[1, 3, 1, d], DType::F32) * 9.0)?;
    let centroids = rng.tensor(&[1, 1, pq_dim, 16, 2], DType::F32);
    let coarse = (rng.tensor(&[1, 1, 8, d], DType::F32) * 7.0)?;
    let (codes, coarse_codes) =
        (random_codes(&mut rng, &[1, 1, n, pq_dim], 16)?, random_codes(&mut rng, &[1, 1, n], 8)?);
    let got = ops::residual_score(&query, &codes, &centroids, &coarse_codes, &coarse)?;
    let floats = |x: &Tensor| x.flatten_all()?.to_vec1::<f32>();
    let (q, c, l) = (floats(&query)?, floats(&centroids)?, floats(&coarse)?);
    let (codes, clusters) = (integers(&codes), integers(&coarse_codes));
    let dot = |q: &[f32], x: &[f32]| q.iter().zip(x).fold(0f32, |sum, (q, x)| sum + q * x);
    for (i, got) in floats(&got)?.into_iter().enumerate() {
        let (q, t) = (&q[i / n * d..][..d], i % n);
        let mut want = dot(q, &l[clusters[t] as usize * d..][..d]);
        for m in 0..pq_dim {
            want += dot(&q[2 * m..][..2], &c[(m * 16 + codes[t * pq_dim + m] as usize) * 2..][..2]);
        }
        assert_eq!(got.to_bits(), want.to_bits(), "score {i}: {got}, expected {want}");
    }
    Ok(())
}

/// The mean value of each cluster, None without keys: `[b * h_kv][n_clusters]`.
type Means = Vec<Vec<Option<Vec<f64>>>>;

/// The op's sums and counts, and naive means.
fn clusters_of(values: &Tensor, codes: &Tensor, n_clusters: usize) -> Result<(ClusterSums, Means)> {
    let [b, h_kv, n, d] = values.dims()[..] else { panic!("rank 4") };
    let empty = ClusterSums::empty([b, h_kv, n_clusters, d], &Device::Cpu)?;
    let sums = ops::cluster_sums(values, codes, &empty)?;
    let (values, codes) = (numbers(values), integers(codes));
    let mean = |head: usize, c: usize| {
        let members: Vec<usize> = (head * n..(head + 1) * n).filter(|&t| codes[t] as usize == c).collect();
        let mean = |j| members.iter().map(|t| values[t * d + j]).sum::<f64>() / members.len() as f64;
        (!members.is_empty()).then(|| (0..d).map(mean).collect())
    };
    let means = (0..b * h_kv).map(|head| (0..n_clusters).map(|c| mean(head, c)).collect()).collect();
    Ok((sums, means))
}

#[test]
fn cluster_sums_sum_the_values_of_each_cluster() -> Result<()> {
    let mut rng = Rng(3);
    for (b, _, h_kv, n, d) in SHAPES {
        for (dtype, strides) in DTYPES.into_iter().zip(STRIDES.into_iter().cycle().skip(rng.below(4))) {
            let n_clusters = [1, 5, 64, 256][rng.below(4)];
            let values = rng.tensor(&[b, h_kv, n, d], dtype);
            let codes = random_codes(&mut rng, &[b, h_kv, n], n_clusters)?;
            let (_, means) = clusters_of(&values, &codes, n_clusters)?;
            let (values, codes) = (lay_out(&values, strides)?, lay_out(&codes, strides)?);
            let (whole, _) = clusters_of(&values, &codes, n_clusters)?;
            let (sums, counts) = (numbers(&whole.sums), integers(&whole.counts));
            assert_eq!(counts.iter().sum::<u32>() as usize, b * h_kv * n);
            for (i, mean) in means.into_iter().flatten().enumerate() {
                let count = f64::from(counts[i]);
                assert_eq!(mean.is_some(), count > 0.0);
                let got: Vec<f64> = row(&sums, i, d).iter().map(|sum| sum / count.max(1.0)).collect();
                assert_close(&got, &mean.unwrap_or(vec![0.0; d]), 1e-5, "mean");
            }
            // However the keys are cut.
            let cut = rng.below(n + 1);
            let mut pieces = ClusterSums::empty([b, h_kv, n_clusters, d], &Device::Cpu)?;
            for (start, len) in [(0, cut), (cut, n - cut)] {
                pieces = ops::cluster_sums(&values.narrow(2, start, len)?, &codes.narrow(2, start, len)?, &pieces)?;
            }
            assert_same_bits(&pieces.sums, &whole.sums, "sums in pieces");
            assert_same_bits(&pieces.counts, &whole.counts, "counts in pieces");
        }
    }
    Ok(())
}

#[test]
fn tail_attends_to_what_is_not_listed() -> Result<()> {
    let mut rng = Rng(4);
    for (b, h, h_kv, n, d) in SHAPES {
        for (case, (lists, init_offset)) in [(h, 0), (h_kv, 5), (h, 300)].into_iter().enumerate() {
            let (n_clusters, strides) = ([3, 256, 64][case], STRIDES[rng.below(4)]);
            let scores = (rng.tensor(&[b, h, n], DType::F32) * 6.0)?;
            let codes = random_codes(&mut rng, &[b, h_kv, n], n_clusters)?;
            let values = (rng.tensor(&[b, h_kv, n, d], DType::F32) + 1.0)?;
            // Means of half the keys, so that some clusters have none.
            let half = |x: &Tensor| x.narrow(2, 0, n.div_ceil(2));
            let (clusters, means) = clusters_of(&half(&values)?, &half(&codes)?.contiguous()?, n_clusters)?;
            // Positions before the candidates and behind them are nobody's business here.
            let selected = random_lists(&mut rng, b, lists, init_offset + n + 9, n.min(700))?;
            let scale = [0.5f32, -0.25, 1.0][case];
            let tail = ops::tail_attend(
                &lay_out(&scores, strides)?,
                &lay_out(&codes, strides)?,
                &ClusterSums { sums: lay_out(&clusters.sums, strides)?, counts: lay_out(&clusters.counts, strides)? },
                &selected,
                init_offset,
                scale,
            )?;
            assert_eq!((tail.out.dims(), tail.out.dtype()), (&[b, h, 1, d][..], DType::F32));
            let (scores, codes) = (numbers(&scores), integers(&codes));
            for bh in 0..b * h {
                let kv = bh / h * h_kv + bh % h / (h / h_kv);
                let listed = listed(&selected, bh, h).into_iter();
                let listed: Vec<usize> = listed.filter_map(|(t, _)| t.checked_sub(init_offset)).collect();
                let codes = &codes[kv * n..][..n];
                let scores = row(&scores, bh, n);
                let (want, lse) = attend_to_means(scores, codes, &means[kv], &listed, f64::from(scale), d);
                assert_close(row(&numbers(&tail.out), bh, d), &want, 1e-5, "output");
                assert_close(&[numbers(&tail.lse)[bh]], &[lse], 1e-5, "lse");
            }
        }
    }
    Ok(())
}

/// One KV head of a query head, four clusters of a value each; `listed` are candidates.
fn small_tail(scores: &[f32], codes: &[u8], counts: [u32; 4], listed: &[u32]) -> Result<Attended> {
    let n = scores.len();
    let values = Tensor::new(&[[1f32, -1.], [2., 0.], [4., 8.], [-8., 3.]], &Device::Cpu)?;
    let counts = Tensor::new(&counts, &Device::Cpu)?;
    let sums = values.broadcast_mul(&counts.to_dtype(DType::F32)?.unsqueeze(1)?)?;
    let clusters = ClusterSums { sums: sums.reshape((1, 1, 4, 2))?, counts: counts.reshape((1, 1, 4))? };
    let l = listed.len();
    let selected = Selected {
        indices: Tensor::from_slice(listed, (1, 1, l), &Device::Cpu)?,
        lens: Tensor::new(&[[l as u32]], &Device::Cpu)?,
        weights: Tensor::ones((1, 1, l), DType::F32, &Device::Cpu)?,
    };
    let (scores, codes) =
        (Tensor::from_slice(scores, (1, 1, n), &Device::Cpu)?, Tensor::from_slice(codes, (1, 1, n), &Device::Cpu)?);
    ops::tail_attend(&scores, &codes, &clusters, &selected, 0, 1.0)
}

#[test]
fn tail_is_finite_and_right_at_the_extremes() -> Result<()> {
    #[track_caller]
    fn check(tail: Result<Attended>, out: [f64; 2], lse: f64, what: &str) -> Result<()> {
        let tail = tail?;
        assert_close(&numbers(&tail.out), &out, 1e-6, what);
        assert_close(&numbers(&tail.lse), &[lse], 1e-6, what);
        Ok(())
    }
    let (codes, counts, infinite) = ([0, 1, 0, 1], [2, 2, 0, 5], f64::NEG_INFINITY);
    for shift in [0f32, 1e4, -1e4] {
        let scores = [shift; 4];
        let lse = |keys: f64| f64::from(shift) + keys.ln();
        check(small_tail(&scores, &codes, counts, &[]), [1.5, -0.5], lse(4.0), "identical keys")?;
        check(small_tail(&scores, &codes, counts, &[0, 2]), [2.0, 0.0], lse(2.0), "a whole cluster listed")?;
        check(small_tail(&scores, &codes, counts, &[0, 1, 2, 3]), [0.0, 0.0], infinite, "all listed")?;
        check(small_tail(&scores, &[2, 2, 2, 3], counts, &[]), [-8.0, 3.0], lse(1.0), "a cluster that counts no keys")?;
        check(small_tail(&scores, &[2; 4], counts, &[]), [0.0, 0.0], infinite, "no cluster that counts a key")?;
    }
    let huge = [0.0, 3e38, 0.0, 0.0];
    check(small_tail(&huge, &codes, counts, &[]), [2.0, 0.0], 3e38, "a huge key")?;
    check(small_tail(&huge, &codes, counts, &[1]), [4.0 / 3.0, -2.0 / 3.0], 3f64.ln(), "a huge key, listed")?;
    let unlikely = [0.0, f32::NEG_INFINITY, 0.0, f32::NEG_INFINITY];
    check(small_tail(&unlikely, &codes, counts, &[]), [1.0, -1.0], 2f64.ln(), "infinitely unlikely keys")?;
    check(small_tail(&unlikely, &codes, counts, &[0, 2]), [0.0, 0.0], infinite, "nothing but those")?;
    let broken = [0.0, f32::NAN, 0.0, f32::NAN];
    check(small_tail(&broken, &codes, counts, &[]), [1.0, -1.0], 2f64.ln(), "NaN")?;
    check(small_tail(&broken, &codes, counts, &[0, 2]), [0.0, 0.0], infinite, "nothing but NaN")?;
    check(small_tail(&[f32::INFINITY, 0.0], &codes[..2], counts, &[]), [0.0, 0.0], infinite, "infinity")?;
    check(small_tail(&[], &[], counts, &[]), [0.0, 0.0], infinite, "no candidates")
}

/// A key that is no number costs its cluster, not the output of the steps that do not attend to it.
#[test]
fn one_broken_key_does_not_break_the_tail() -> Result<()> {
    let mut rng = Rng(12);
    for (broken, selection) in [f32::NEG_INFINITY, f32::NAN]
        .into_iter()
        .flat_map(|x| [Selection::PerQueryHead, Selection::PerKvHead].map(|selection| (x, selection)))
    {
        let attn = PqAttention::new(PqConfig { selection, query_weights: false, ..with_tail() }, 0.25)?;
        let mut cache = attn.new_cache([1, 1, 16], 0, DType::F32, &Device::Cpu)?;
        let (keys, values) = (rng.tensor(&[1, 1, 300, 16], DType::F32), rng.tensor(&[1, 1, 300, 16], DType::F32));
        // Of the latest, which are trained on.
        let key = Tensor::full(broken, (1, 1, 1, 16), &Device::Cpu)?;
        keys.slice_set(&key, 2, 280)?;
        cache.append(&keys, &values)?;
        let one = rng.tensor(&[1, 1, 1, 16], DType::F32);
        let query = rng.tensor(&[1, 2, 1, 16], DType::F32).abs()?;
        let out = attn.forward(&query, &one, &one, &mut cache)?;
        assert!(numbers(&out).iter().all(|x| x.is_finite()), "{broken} {selection:?}: {out}");
    }
    Ok(())
}

/// In a half type too the result is rounded once: it is that of the same numbers as f32, rounded.
#[test]
fn a_tail_merges_before_rounding() -> Result<()> {
    let mut rng = Rng(5);
    for (b, h, h_kv, n, d) in SHAPES {
        for (i, dtype) in DTYPES.into_iter().enumerate() {
            for lists in [h, h_kv] {
                let query = rng.tensor(&[b, h, 1, d], dtype);
                let (keys, values) = (rng.tensor(&[b, h_kv, n, d], dtype), rng.tensor(&[b, h_kv, n, d], dtype));
                let selected = random_lists(&mut rng, b, lists, n, 40)?;
                // Some heads without a tail.
                let nothing: Vec<f32> = (0..b * h)
                    .map(|_| if rng.below(3) == 0 { f32::NEG_INFINITY } else { rng.normal() + 3.0 })
                    .collect();
                let lse = Tensor::from_vec(nothing, (b, h), &Device::Cpu)?;
                let tail = Attended { out: rng.tensor(&[b, h, 1, d], DType::F32), lse };
                let laid_out =
                    Attended { out: lay_out(&tail.out, STRIDES[i])?, lse: lay_out(&tail.lse, STRIDES[i + 1])? };
                let got = ops::sparse_attend_with_tail(&query, &keys, &values, &selected, &laid_out, 0.3)?;
                assert_eq!(got.out.dtype(), dtype);

                let wide = |x: &Tensor| x.to_dtype(DType::F32);
                let (q, k, v) = (wide(&query)?, wide(&keys)?, wide(&values)?);
                let exact = ops::sparse_attend_with_tail(&q, &k, &v, &selected, &tail, 0.3)?;
                assert_same_bits(&got.out, &exact.out.to_dtype(dtype)?, "rounded once");
                assert_same_bits(&got.lse, &exact.lse, "lse");

                let (q, k, v) = (numbers(&query), numbers(&keys), numbers(&values));
                let (out, tail_out, tail_lse) = (numbers(&exact.out), numbers(&tail.out), numbers(&tail.lse));
                for (bh, lse) in numbers(&exact.lse).into_iter().enumerate() {
                    let kv = bh / h * h_kv + bh % h / (h / h_kv);
                    let (k, v) = (row(&k, kv, n * d), row(&v, kv, n * d));
                    let sparse = attend(row(&q, bh, d), k, v, &listed(&selected, bh, h), 0.3);
                    let tail = (row(&tail_out, bh, d).to_vec(), tail_lse[bh]);
                    let (want, want_lse) = merge(&sparse, &tail);
                    if want_lse > f64::NEG_INFINITY {
                        assert_close(row(&out, bh, d), &want, 1e-5, "output");
                    }
                    assert_close(&[lse], &[want_lse], 1e-5, "lse");
                }
                // The function for two results does the same.
                let merged = ops::sparse_attend(&wide(&query)?, &wide(&keys)?, &wide(&values)?, &selected, 0.3)?;
                let merged = merged.merge(&tail)?;
                let something = exact.lse.ne(f32::NEG_INFINITY)?.to_dtype(DType::F32)?.unsqueeze(2)?.unsqueeze(3)?;
                let masked = |x: &Tensor| x.broadcast_mul(&something).map(|x| numbers(&x));
                assert_close(&masked(&merged.out)?, &masked(&exact.out)?, 1e-6, "merge");
                assert_close(&numbers(&merged.lse), &numbers(&exact.lse), 1e-6, "lse of merge");
            }
        }
    }
    Ok(())
}

#[test]
fn merging_with_nothing_changes_no_bit() -> Result<()> {
    let mut rng = Rng(6);
    for dtype in DTYPES {
        let some = Attended { out: rng.tensor(&[2, 3, 1, 5], dtype), lse: rng.tensor(&[2, 3], DType::F32) };
        let negative = Attended { out: some.out.affine(0.0, -0.0)?, lse: (&some.lse - 1e4)? };
        let none =
            Attended { out: some.out.zeros_like()?, lse: Tensor::full(f32::NEG_INFINITY, (2, 3), &Device::Cpu)? };
        for some in [&some, &negative, &none] {
            for merged in [some.merge(&none)?, none.merge(some)?] {
                assert_same_bits(&merged.out, &some.out, "output");
                assert_same_bits(&merged.lse, &some.lse, "lse");
            }
        }
        let twice = some.merge(&some)?;
        assert_close(&numbers(&twice.out), &numbers(&some.out), rounding(dtype), "twice the same");
        assert_close(&numbers(&twice.lse), &numbers(&(&some.lse + 2f64.ln())?), 1e-6, "lse of twice the same");
    }
    // An LSE of 1e4 does not overflow, and outweighs everything.
    let out = Tensor::ones((1, 1, 1, 2), DType::F32, &Device::Cpu)?;
    let large = Attended { out: out.clone(), lse: Tensor::new(&[[1e4f32]], &Device::Cpu)? };
    let small = Attended { out: (out * 5.0)?, lse: Tensor::new(&[[-1e4f32]], &Device::Cpu)? };
    let merged = small.merge(&large)?;
    assert_eq!((numbers(&merged.out), numbers(&merged.lse)), (vec![1.0, 1.0], vec![1e4]));
    Ok(())
}

/// With all candidates listed a tail changes no bit.
#[test]
fn nothing_unlisted_is_no_tail() -> Result<()> {
    let (mut rng, n, offset) = (Rng(7), 300, 4);
    let query = rng.tensor(&[1, 4, 1, 16], DType::BF16);
    let (keys, values) = (rng.tensor(&[1, 2, n, 16], DType::BF16), rng.tensor(&[1, 2, n, 16], DType::BF16));
    let all: Vec<u32> = (0..2).flat_map(|_| 0..n as u32).collect();
    let selected = Selected {
        indices: Tensor::from_vec(all, (1, 2, n), &Device::Cpu)?,
        lens: Tensor::new(&[[n as u32, n as u32]], &Device::Cpu)?,
        weights: Tensor::ones((1, 2, n), DType::F32, &Device::Cpu)?,
    };
    let codes = random_codes(&mut rng, &[1, 2, n], 8)?;
    let (clusters, _) = clusters_of(&values, &codes, 8)?;
    let candidates = n - offset;
    let scores = rng.tensor(&[1, 4, candidates], DType::F32);
    let tail = ops::tail_attend(&scores, &codes.narrow(2, offset, candidates)?, &clusters, &selected, offset, 0.5)?;
    let with = ops::sparse_attend_with_tail(&query, &keys, &values, &selected, &tail, 0.25)?;
    let without = ops::sparse_attend(&query, &keys, &values, &selected, 0.25)?;
    assert_same_bits(&with.out, &without.out, "output");
    assert_same_bits(&with.lse, &without.lse, "lse");
    Ok(())
}

/// Every step attends exactly to sink, heavy keys and window, and to the rest by the means of the clusters.
#[test]
fn decode_attends_to_the_tail() -> Result<()> {
    let mut rng = Rng(8);
    for (dtype, selection, init_offset, window) in [
        (DType::F32, Selection::PerQueryHead, None, 8),
        (DType::F32, Selection::PerKvHead, Some(0), 8),
        (DType::BF16, Selection::PerQueryHead, Some(9), 0),
        (DType::F16, Selection::PerKvHead, Some(40), 30),
    ] {
        let config = PqConfig { selection, init_offset, window, ..with_tail() };
        let (b, h, h_kv, d, scale) = (2, 6, 2, 16, 0.4);
        let attn = PqAttention::new(config.clone(), scale)?;
        let mut cache = attn.new_cache([b, h_kv, d], 0, dtype, &Device::Cpu)?;
        let mut tails = 0;
        for step in 0..150 {
            let (query, key) = (rng.tensor(&[b, h, 1, d], dtype), rng.tensor(&[b, h_kv, 1, d], dtype));
            let value = (rng.tensor(&[b, h_kv, 1, d], dtype) + 0.5)?;
            let out = attn.forward(&query, &key, &value, &mut cache)?;
            if config.is_dense(step + 1) {
                continue;
            }
            let want = naive_decode(&config, &query, &cache, scale)?;
            assert_close(&numbers(&out), &want, rounding(dtype), "decode");
            tails += 1;
        }
        assert!(tails > 50, "{tails} steps with a tail");
    }
    Ok(())
}

fn naive_decode(config: &PqConfig, query: &Tensor, cache: &PqKvCache, scale: f32) -> Result<Vec<f64>> {
    let ([b, h_kv, d], n, h) = (cache.dims(), cache.len(), query.dim(1)?);
    let (start, range) = (config.init_offset(), config.candidates(n));
    let codebook = cache.codebook().expect("a codebook");
    let (codes, coarse_codes) = (cache.codes()?, cache.coarse_codes()?.expect("coarse codes"));
    let (want, want_coarse) = codebook.encode(&cache.keys()?.narrow(2, start, codes.dim(2)?)?)?;
    assert_same_bits(&codes, &want, "codes");
    assert_same_bits(&coarse_codes, &want_coarse.expect("coarse codes"), "coarse codes");
    // Of the keys that have codes: full blocks of them, from the first on.
    let block = config.window.max(1);
    let summed = (n - start) / block * block;
    assert_eq!(coarse_codes.dim(2)?, summed);
    let (_, means) = clusters_of(&cache.values()?.narrow(2, start, summed)?, &coarse_codes, config.coarse)?;
    let of_candidates = |codes: &Tensor| codes.narrow(2, range.start - start, range.len());
    let (codes, coarse_codes) = (of_candidates(&codes)?, of_candidates(&coarse_codes)?);
    let coarse = codebook.coarse().expect("clusters");
    let scores = ops::residual_score(query, &codes, &codebook.centroids()?, &coarse_codes, coarse)?;
    let ranking = match config.selection {
        Selection::PerQueryHead => scores.clone(),
        Selection::PerKvHead => ops::group_mass(&scores, h_kv, scale)?,
    };
    let (lists, ranking, scores, clusters) =
        (ranking.dim(1)?, numbers(&ranking), numbers(&scores), integers(&coarse_codes));
    let (q, k, v) = (numbers(query), numbers(&cache.keys()?), numbers(&cache.values()?));
    let candidates = range.len();
    let head = |bh: usize| {
        let kv = bh / (h / h_kv);
        let ranking = row(&ranking, bh / h * lists + bh % h * lists / h, candidates);
        let mut order: Vec<usize> = (0..candidates).collect();
        order.sort_by(|&a, &b| ranking[b].total_cmp(&ranking[a]).then(a.cmp(&b)));
        let heavy: Vec<usize> = order.iter().take(config.heavy.count(n)).map(|i| range.start + i).collect();
        let attended = (0..n).filter(|t| *t < config.sink || t + config.window >= n || heavy.contains(t));
        let attended: Vec<_> = attended.map(|t| (t, 1.0)).collect();
        let listed: Vec<usize> = attended.iter().filter_map(|(t, _)| t.checked_sub(range.start)).collect();
        let (clusters, scores) = (&clusters[kv * candidates..][..candidates], row(&scores, bh, candidates));
        let tail = attend_to_means(scores, clusters, &means[kv], &listed, f64::from(scale), d);
        let (k, v) = (row(&k, kv, n * d), row(&v, kv, n * d));
        merge(&attend(row(&q, bh, d), k, v, &attended, f64::from(scale)), &tail).0
    };
    Ok((0..b * h).flat_map(head).collect())
}

/// Clusters of one key each lose nothing: then the tail is the rest of dense attention.
#[test]
fn a_cluster_a_key_is_dense_attention() -> Result<()> {
    let mut rng = Rng(9);
    // The keys of the window have codes too, and clusters of their own.
    let config = PqConfig { sink: 2, window: 64, heavy: Heavy::Keys(1), coarse: 128, ..with_tail() };
    let (sink, window, n, d) = (config.sink, config.window, 2 + 128 + 10, 16);
    assert!(!config.is_dense(n));
    let (keys, values) = (rng.tensor(&[1, 2, n, d], DType::F32), rng.tensor(&[1, 2, n, d], DType::F32));
    let query = rng.tensor(&[1, 6, 1, d], DType::F32);
    let attn = PqAttention::new(config.clone(), 0.5)?;
    let mut cache = attn.new_cache([1, 2, d], 0, DType::F32, &Device::Cpu)?;
    let residuals = Tensor::zeros((1, 2, config.pq_dim, 16, d / config.pq_dim), DType::F32, &Device::Cpu)?;
    cache.set_codebook(Codebook::new(residuals, None)?.with_coarse(keys.narrow(2, sink, 128)?.contiguous()?)?)?;
    let part = |x: &Tensor, from, len| x.narrow(2, from, len);
    cache.append(&part(&keys, 0, n - 1)?, &part(&values, 0, n - 1)?)?;
    let got = attn.forward(&query, &part(&keys, n - 1, 1)?, &part(&values, n - 1, 1)?, &mut cache)?;
    assert_eq!(config.attended(n), sink + 1 + window);
    let dense = ops::dense_attend(&query, &keys, &values, 0.5)?;
    assert_close(&numbers(&got), &numbers(&dense.out), 2e-6, "output");
    Ok(())
}

/// What the tail is for: values that have something in common.
#[test]
fn a_tail_is_closer_to_dense() -> Result<()> {
    let mut rng = Rng(10);
    let (keys, values) =
        (rng.tensor(&[1, 2, 1000, 16], DType::F32), (rng.tensor(&[1, 2, 1000, 16], DType::F32) + 1.0)?);
    let query = rng.tensor(&[1, 4, 1, 16], DType::F32);
    let error = |config: PqConfig| -> Result<f64> {
        let attn = PqAttention::new(config, 0.25)?;
        let mut cache = attn.new_cache([1, 2, 16], 0, DType::F32, &Device::Cpu)?;
        cache.append(&keys.narrow(2, 0, 999)?, &values.narrow(2, 0, 999)?)?;
        let out = attn.forward(&query, &keys.narrow(2, 999, 1)?, &values.narrow(2, 999, 1)?, &mut cache)?;
        let dense = ops::dense_attend(&query, &keys, &values, 0.25)?.out;
        Ok(numbers(&(out - dense)?.sqr()?.sum_all()?)[0].sqrt())
    };
    let (with, without) = (error(with_tail())?, error(PqConfig { tail: Tail::None, ..with_tail() })?);
    assert!(with < 0.3 * without, "{with} with a tail, {without} without");
    Ok(())
}
