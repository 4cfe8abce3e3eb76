//! Every op against a naive f64 reference, over odd shapes, layouts and dtypes.

mod common;

use candle_core::{DType, Device, Result, Tensor};
use candle_pq_attn::ops::{self, Attended, ClusterSums, Geometry, KmeansOptions, Selected, PADDING};
use candle_pq_attn::{Codebook, Metric};
use common::*;

/// `(b, h, h_kv, n, head_dim)`: MHA, GQA of even, odd and large groups, MQA; head_dims off every vector width; n around
/// the kernels' blocks.
const SHAPES: [(usize, usize, usize, usize, usize); 8] = [
    (1, 4, 4, 33, 64),
    (2, 9, 3, 255, 64),
    (1, 8, 2, 256, 128),
    (3, 5, 1, 257, 80),
    (1, 6, 2, 1, 48),
    (2, 2, 2, 129, 7),
    (1, 16, 1, 64, 256),
    (1, 22, 2, 2100, 32),
];

#[test]
fn encode_finds_the_nearest_centroid() -> Result<()> {
    let mut rng = Rng(1);
    for (b, _, h_kv, n, d) in SHAPES {
        for (pq_dim, bits) in [(1, 8), (d, 1), (if d % 4 == 0 { d / 4 } else { 1 }, 5)] {
            let (len, c) = (d / pq_dim, 1 << bits);
            for (dtype, strides) in DTYPES.into_iter().zip(STRIDES.into_iter().cycle().skip(rng.below(4))) {
                for ip in [false, true] {
                    let columns = len + usize::from(ip);
                    let keys = rng.tensor(&[b, h_kv, n, d], dtype);
                    let centroids = rng.tensor(&[b, h_kv, pq_dim, c, columns], DType::F32);
                    let phi = (rng.tensor(&[b, h_kv, pq_dim], DType::F32).abs()? * len as f64)?;
                    let phi = ip.then_some(&phi);
                    let codes = ops::encode(&lay_out(&keys, strides)?, &lay_out(&centroids, strides)?, phi)?;
                    assert_eq!(codes.dims(), [b, h_kv, n, pq_dim]);
                    check_codes(&keys, &centroids, phi, &codes, len);
                }
            }
        }
    }
    Ok(())
}

/// No centroid is closer than the chosen one, but for rounding.
fn check_codes(keys: &Tensor, centroids: &Tensor, phi: Option<&Tensor>, codes: &Tensor, len: usize) {
    let [.., n, d] = keys.dims()[..] else { panic!("rank 4") };
    let [.., pq_dim, c, columns] = centroids.dims()[..] else { panic!("rank 5") };
    let (keys, centroids, codes) = (numbers(keys), numbers(centroids), integers(codes));
    let phi = phi.map(numbers);
    for (i, &code) in codes.iter().enumerate() {
        let (t, m) = (i / pq_dim, i % pq_dim);
        let subspace = t / n * pq_dim + m;
        let mut x = keys[t * d + m * len..][..len].to_vec();
        if let Some(phi) = &phi {
            let norm: f64 = x.iter().map(|x| x * x).sum();
            x.push((phi[subspace] - norm).max(0.0).sqrt());
        }
        let distance = |code: usize| {
            let centroid = row(&centroids, subspace * c + code, columns);
            x.iter().zip(centroid).map(|(x, y)| (x - y).powi(2)).sum::<f64>()
        };
        let best = (0..c).map(distance).fold(f64::INFINITY, f64::min);
        let got = distance(code as usize);
        assert!(got <= best + 1e-5 * (1.0 + best), "key {t} subspace {m}: {got}, the nearest is at {best}");
    }
}

#[test]
fn encode_breaks_ties_downwards() -> Result<()> {
    // Centroids 1 and 3 are the same, and 0 and 2 mirror images around the key.
    let centroids = Tensor::new(&[1f32, 5., -1., 5.], &Device::Cpu)?.reshape((1, 1, 1, 4, 1))?;
    let keys = Tensor::new(&[0f32, 5., 4.9, f32::NAN, f32::INFINITY], &Device::Cpu)?.reshape((1, 1, 5, 1))?;
    assert_eq!(integers(&ops::encode(&keys, &centroids, None)?), [0, 1, 1, 0, 0]);
    Ok(())
}

#[test]
fn score_sums_the_table_entries() -> Result<()> {
    let mut rng = Rng(2);
    for (b, h, h_kv, n, d) in SHAPES {
        for (pq_dim, bits) in [(1, 8), (d, 1), (if d % 4 == 0 { d / 4 } else { 1 }, 5)] {
            let (len, c) = (d / pq_dim, 1usize << bits);
            for (dtype, strides) in DTYPES.into_iter().zip(STRIDES.into_iter().cycle().skip(rng.below(4))) {
                let query = rng.tensor(&[b, h, 1, d], dtype);
                let centroids = rng.tensor(&[b, h_kv, pq_dim, c, len], DType::F32);
                let codes: Vec<u8> = (0..b * h_kv * n * pq_dim).map(|_| rng.below(c) as u8).collect();
                let codes = Tensor::from_vec(codes, (b, h_kv, n, pq_dim), &Device::Cpu)?;
                let scores =
                    ops::score(&lay_out(&query, strides)?, &lay_out(&codes, strides)?, &lay_out(&centroids, strides)?)?;
                assert_eq!(scores.dims(), [b, h, n]);
                let (query, codes, centroids) = (numbers(&query), integers(&codes), numbers(&centroids));
                let group = h / h_kv;
                let want: Vec<f64> = (0..b * h * n)
                    .map(|i| {
                        let (bh, t) = (i / n, i % n);
                        let kv = bh / h * h_kv + bh % h / group;
                        let subspace = |m: usize| {
                            let code = codes[(kv * n + t) * pq_dim + m] as usize;
                            let centroid = row(&centroids, (kv * pq_dim + m) * c + code, len);
                            let query = &row(&query, bh, d)[m * len..];
                            query.iter().zip(centroid).map(|(q, x)| q * x).sum::<f64>()
                        };
                        (0..pq_dim).map(subspace).sum()
                    })
                    .collect();
                assert_close(&numbers(&scores), &want, 1e-6, "scores");
            }
        }
    }
    Ok(())
}

/// Positions of the k largest, ascending: NaN last, ties to the lower position.
fn naive_topk(scores: &[f32], k: usize) -> Vec<u32> {
    let mut order: Vec<usize> = (0..scores.len()).collect();
    let rank = |x: f32| if x.is_nan() { f64::NEG_INFINITY } else { f64::from(x).max(-1e300) };
    order.sort_by(|&a, &b| rank(scores[b]).partial_cmp(&rank(scores[a])).unwrap().then(a.cmp(&b)));
    order.truncate(k);
    order.sort();
    order.into_iter().map(|t| t as u32).collect()
}

#[test]
fn topk_is_exact() -> Result<()> {
    let mut rng = Rng(3);
    type Draw = fn(&mut Rng, usize) -> f32;
    let shapes: [(&str, Draw); 7] = [
        ("random", |rng, _| rng.normal()),
        ("mass ties", |rng, _| rng.below(5) as f32),
        ("all equal", |_, _| 1.5),
        ("ascending", |_, t| t as f32),
        ("descending", |_, t| -(t as f32)),
        ("zeros of both signs", |rng, _| if rng.below(2) == 0 { 0.0 } else { -0.0 }),
        ("infinities and NaN", |rng, _| {
            [f32::NAN, f32::INFINITY, f32::NEG_INFINITY, 0.5, -f32::NAN, f32::MIN_POSITIVE][rng.below(6)]
        }),
    ];
    for (name, draw) in shapes {
        for n in [1, 2, 255, 256, 257, 1000, 5000] {
            let rows: Vec<Vec<f32>> = (0..3).map(|_| (0..n).map(|t| draw(&mut rng, t)).collect()).collect();
            let scores = Tensor::new(rows.clone(), &Device::Cpu)?;
            for k in [0, 1, 7, 255, 256, n / 2, n - 1, n, n + 3] {
                for strides in [Strides::Contiguous, Strides::Capacity, Strides::LastDim] {
                    let got = ops::topk(&lay_out(&scores, strides)?, k)?;
                    assert_eq!(got.dims(), [3, k.min(n)]);
                    let want: Vec<u32> = rows.iter().flat_map(|row| naive_topk(row, k)).collect();
                    assert_eq!(integers(&got), want, "{name}, n {n}, k {k}, {strides:?}");
                }
            }
        }
    }
    let empty = Tensor::zeros((2, 3, 0), DType::F32, &Device::Cpu)?;
    assert_eq!(ops::topk(&empty, 4)?.dims(), [2, 3, 0]);
    assert_eq!(ops::topk(&Tensor::new(&[3f32, 9., 4.], &Device::Cpu)?, 2)?.to_vec1::<u32>()?, [1, 2]);
    Ok(())
}

/// What `fast_scan` selects, against top-k of the scores.
#[track_caller]
fn check_fast_scan(query: &Tensor, codes: &Tensor, centroids: &Tensor, what: &str) -> Result<()> {
    let n = codes.dim(2)?;
    let packed = ops::pack_codes(codes)?;
    let scores = ops::score(query, codes, centroids)?;
    for k in [0, 1, 2, 31, 32, n / 20, n / 3, n.saturating_sub(1), n, n + 5] {
        let got = ops::fast_scan(query, &packed, n, centroids, k)?;
        let want = ops::topk(&scores, k)?;
        assert_eq!(got.dims(), want.dims());
        assert!(integers(&got) == integers(&want), "{what}, n {n}, k {k}");
    }
    Ok(())
}

fn random_codes(rng: &mut Rng, dims: [usize; 4], n_centroids: usize) -> Result<Tensor> {
    let codes: Vec<u8> = (0..dims.iter().product()).map(|_| rng.below(n_centroids) as u8).collect();
    Tensor::from_vec(codes, &dims, &Device::Cpu)
}

#[test]
fn fast_scan_is_topk_of_the_scores() -> Result<()> {
    let mut rng = Rng(12);
    for (b, h, h_kv, n, d) in SHAPES.into_iter().chain([(1, 2, 1, 0, 8), (1, 1, 1, 10_000, 64)]) {
        for (pq_dim, bits) in [(1, 4), (d, 4), (d, 1), (if d % 4 == 0 { d / 4 } else { 1 }, 3)] {
            for (dtype, strides) in DTYPES.into_iter().zip(STRIDES.into_iter().cycle().skip(rng.below(4))) {
                let query = lay_out(&rng.tensor(&[b, h, 1, d], dtype), strides)?;
                let centroids = rng.tensor(&[b, h_kv, pq_dim, 1 << bits, d / pq_dim], DType::F32);
                let codes = lay_out(&random_codes(&mut rng, [b, h_kv, n, pq_dim], 1 << bits)?, strides)?;
                check_fast_scan(&query, &codes, &lay_out(&centroids, strides)?, "random")?;
            }
        }
    }
    Ok(())
}

/// Where rounded tables tell little or nothing.
#[test]
fn fast_scan_is_exact_on_odd_data() -> Result<()> {
    let mut rng = Rng(13);
    for (n, pq_dim) in [(37, 3), (1000, 8), (3001, 7)] {
        let codes = random_codes(&mut rng, [1, 1, n, pq_dim], 16)?;
        let centroids = rng.tensor(&[1, 1, pq_dim, 16, 1], DType::F32);
        let whole = (&centroids * 2.0)?.round()?;
        let same_codes = codes.narrow(2, 0, 1)?.expand((1, 1, n, pq_dim))?;
        let query =
            |x: &[f32]| Tensor::new(x.repeat(pq_dim)[..pq_dim].to_vec(), &Device::Cpu)?.reshape((1, 1, 1, pq_dim));
        check_fast_scan(&query(&[1.0])?, &same_codes, &centroids, "one key many times")?;
        check_fast_scan(&query(&[0.0])?, &codes, &centroids, "all scores 0")?;
        check_fast_scan(&query(&[1.0, -0.0])?, &codes, &whole, "mass ties")?;
        for x in [1e-44, 1e-30, 1e30, 1e38, f32::MAX, f32::INFINITY, f32::NAN] {
            check_fast_scan(&query(&[x])?, &codes, &centroids, &format!("query {x}"))?;
            check_fast_scan(&query(&[x, 1.0])?, &codes, &centroids, &format!("query {x}, 1"))?;
            check_fast_scan(&query(&[-x, 1.0, x])?, &codes, &centroids, &format!("query {}, 1, {x}", -x))?;
        }
        // Large terms that cancel: the scores are the roundings of the additions.
        check_fast_scan(&query(&[1.0])?, &codes, &(centroids + 1e6)?, "far from 0")?;
    }
    Ok(())
}

#[test]
fn codes_are_packed_by_blocks() -> Result<()> {
    let mut rng = Rng(14);
    let codes = random_codes(&mut rng, [2, 3, 75, 5], 16)?;
    let packed = ops::pack_codes(&codes)?;
    assert_eq!(packed.dims(), [2, 3, 3, 3, 32]);
    let (bytes, numbers) = (integers(&packed), integers(&codes));
    for (i, byte) in bytes.iter().enumerate() {
        let (key, row, block, pair) = (i % 32, i / 32 % 3, i / 96 % 3, i / 288);
        let code = |m: usize| match block * 32 + key {
            t if t < 75 && m < 5 => numbers[(pair * 75 + t) * 5 + m],
            _ => 0,
        };
        assert_eq!(*byte, code(2 * row) | code(2 * row + 1) << 4);
    }
    // A block depends on its own keys alone.
    assert_same_bits(&packed.narrow(2, 1, 2)?, &ops::pack_codes(&codes.narrow(2, 32, 43)?)?, "later blocks");
    // Blocks in a larger buffer are scanned in place.
    let (query, centroids) = (rng.tensor(&[2, 3, 1, 10], DType::F32), rng.tensor(&[2, 3, 5, 16, 2], DType::F32));
    let want = integers(&ops::fast_scan(&query, &packed, 75, &centroids, 9)?);
    let room = Tensor::full(255u8, (2, 3, 8, 3, 32), &Device::Cpu)?;
    room.slice_set(&packed, 2, 4)?;
    for packed in [room.narrow(2, 4, 3)?, lay_out(&packed, Strides::LastDim)?] {
        assert_eq!(integers(&ops::fast_scan(&query, &packed, 75, &centroids, 9)?), want);
    }
    Ok(())
}

#[test]
fn group_mass_sums_the_softmax_of_a_group() -> Result<()> {
    let mut rng = Rng(4);
    for (b, h, h_kv, n, _) in SHAPES {
        for (scale, strides) in [(0.3, Strides::Contiguous), (-2.0, Strides::Capacity), (1.0, Strides::LastDim)] {
            let scores = (rng.tensor(&[b, h, n], DType::F32) * 8.0)?;
            let mass = ops::group_mass(&lay_out(&scores, strides)?, h_kv, scale)?;
            assert_eq!(mass.dims(), [b, h_kv, n]);
            let (scores, group) = (numbers(&scores), h / h_kv);
            let mut want = vec![0.0; b * h_kv * n];
            for head in 0..b * h {
                let products: Vec<f64> = row(&scores, head, n).iter().map(|x| x * f64::from(scale)).collect();
                let largest = products.iter().copied().fold(f64::NEG_INFINITY, f64::max);
                let sum: f64 = products.iter().map(|x| (x - largest).exp()).sum();
                let out = &mut want[head / group * n..][..n];
                out.iter_mut().zip(products).for_each(|(out, x)| *out += (x - largest).exp() / sum);
            }
            assert_close(&numbers(&mass), &want, 1e-6, "mass");
        }
    }
    Ok(())
}

#[test]
fn causal_softmax_masks_and_normalises() -> Result<()> {
    let mut rng = Rng(5);
    for (b, h_kv, group, queries, first) in [(1, 1, 1, 1, 0), (2, 3, 3, 5, 0), (1, 2, 4, 17, 40)] {
        let (n, scale) = (first + queries, -0.7f32);
        let scores = rng.tensor(&[b, h_kv, group * queries, n], DType::F32);
        let want: Vec<f64> = (0..b * h_kv * group * queries)
            .flat_map(|r| {
                let visible = first + r % queries + 1;
                let numbers = numbers(&scores);
                let exp: Vec<f64> = row(&numbers, r, n).iter().map(|x| (x * f64::from(scale)).exp()).collect();
                let sum: f64 = exp[..visible].iter().sum();
                exp.into_iter().enumerate().map(move |(t, x)| if t < visible { x / sum } else { 0.0 })
            })
            .collect();
        ops::causal_softmax(&scores, first, queries, scale)?;
        assert_close(&numbers(&scores), &want, 1e-6, "probabilities");
    }
    Ok(())
}

#[test]
fn indices_are_the_union_of_sink_heavy_and_window() -> Result<()> {
    let mut rng = Rng(6);
    for _ in 0..400 {
        let n = 1 + rng.below(60);
        let (sink, window, init_offset) = (rng.below(n + 9), rng.below(n + 9), rng.below(n));
        let (b, lists, k) = (1 + rng.below(2), 1 + rng.below(3), rng.below(n - init_offset + 1));
        let heavy: Vec<u32> = (0..b * lists)
            .flat_map(|_| {
                let scores: Vec<f32> = (0..n - init_offset).map(|_| rng.normal()).collect();
                naive_topk(&scores, k)
            })
            .collect();
        let geometry = Geometry { n, sink, window, init_offset };
        let selected =
            ops::indices_and_weights(&Tensor::from_vec(heavy.clone(), (b, lists, k), &Device::Cpu)?, geometry)?;
        let list_len = selected.indices.dim(2)?;
        assert_eq!(list_len, n.min(sink + k + window));
        let (indices, lens) = (integers(&selected.indices), integers(&selected.lens));
        let weights = numbers(&selected.weights);
        let dense = numbers(&ops::dense_weights(&selected, 2 * lists, n)?);
        let twice = Selected {
            indices: Tensor::cat(&[&selected.indices, &selected.indices], 2)?,
            weights: Tensor::cat(&[&selected.weights, &selected.weights], 2)?,
            lens: Tensor::full(2 * list_len as u32, (b, lists), &Device::Cpu)?,
        };
        let doubled: Vec<f64> = dense.iter().map(|weight| 2.0 * weight).collect();
        assert_eq!(numbers(&ops::dense_weights(&twice, 2 * lists, n)?), doubled, "listed twice");
        for list in 0..b * lists {
            let heavy: Vec<usize> = heavy[list * k..][..k].iter().map(|&t| init_offset + t as usize).collect();
            let want: Vec<usize> = (0..n).filter(|t| *t < sink || t + window >= n || heavy.contains(t)).collect();
            assert_eq!(lens[list] as usize, want.len(), "{geometry:?}");
            for (i, &index) in indices[list * list_len..][..list_len].iter().enumerate() {
                let expected = want.get(i).map_or(PADDING, |&t| t as u32);
                assert_eq!(index, expected, "{geometry:?}, list {list}, entry {i}");
                assert_eq!(weights[list * list_len + i], f64::from(u8::from(i < want.len())));
            }
            for head in [2 * list, 2 * list + 1] {
                for (t, &weight) in row(&dense, head, n).iter().enumerate() {
                    assert_eq!(weight, f64::from(u8::from(want.contains(&t))), "{geometry:?}, head {head}, key {t}");
                }
            }
        }
    }
    Ok(())
}

#[test]
fn sparse_attend_is_attention_over_the_list() -> Result<()> {
    let mut rng = Rng(7);
    for (b, h, h_kv, n, d) in SHAPES {
        for (i, dtype) in DTYPES.into_iter().enumerate() {
            for (lists, l) in [(h, 40), (h_kv, 300), (h, 0), (h_kv, 1)] {
                let strides = STRIDES[(i + l) % 4];
                let query = rng.tensor(&[b, h, 1, d], dtype);
                let (keys, values) = (rng.tensor(&[b, h_kv, n, d], dtype), rng.tensor(&[b, h_kv, n, d], dtype));
                let selected = random_lists(&mut rng, b, lists, n, l)?;
                let attended = ops::sparse_attend(
                    &query,
                    &lay_out(&keys, strides)?,
                    &lay_out(&values, STRIDES[(i + l + 1) % 4])?,
                    &selected,
                    0.3,
                )?;
                assert_eq!((attended.out.dims(), attended.out.dtype()), (&[b, h, 1, d][..], dtype));
                check_attended(&attended, [&query, &keys, &values], 0.3, |bh| listed(&selected, bh, h));
            }
        }
    }
    Ok(())
}

#[test]
fn dense_attend_is_attention_over_all_keys() -> Result<()> {
    let mut rng = Rng(8);
    for (b, h, h_kv, n, d) in SHAPES {
        for (dtype, strides) in DTYPES.into_iter().zip(STRIDES) {
            let query = rng.tensor(&[b, h, 1, d], dtype);
            let (keys, values) = (rng.tensor(&[b, h_kv, n, d], dtype), rng.tensor(&[b, h_kv, n, d], dtype));
            let attended = ops::dense_attend(
                &lay_out(&query, strides)?,
                &lay_out(&keys, strides)?,
                &lay_out(&values, strides)?,
                -0.5,
            )?;
            check_attended(&attended, [&query, &keys, &values], -0.5, |_| (0..n).map(|t| (t, 1.0)).collect());
        }
    }
    Ok(())
}

fn check_attended(
    attended: &ops::Attended,
    [query, keys, values]: [&Tensor; 3],
    scale: f64,
    list: impl Fn(usize) -> Vec<(usize, f64)>,
) {
    let [_, h, _, d] = query.dims()[..] else { panic!("rank 4") };
    let [_, h_kv, n, _] = keys.dims()[..] else { panic!("rank 4") };
    let (q, k, v) = (numbers(query), numbers(keys), numbers(values));
    let out = numbers(&attended.out);
    for (bh, lse) in numbers(&attended.lse).into_iter().enumerate() {
        let kv = bh / h * h_kv + bh % h / (h / h_kv);
        let (want, want_lse) = attend(row(&q, bh, d), row(&k, kv, n * d), row(&v, kv, n * d), &list(bh), scale);
        assert_close(row(&out, bh, d), &want, rounding(query.dtype()), "output");
        assert_close(&[lse], &[want_lse], 1e-5, "lse");
    }
}

#[test]
fn kmeans_is_deterministic_and_converges() -> Result<()> {
    let mut rng = Rng(9);
    let keys = rng.tensor(&[2, 2, 700, 24], DType::F32);
    for metric in [Metric::Euclidean, Metric::InnerProduct] {
        let train = |iters, seed| {
            let options = KmeansOptions { pq_dim: 6, pq_bits: 5, iters, metric, max_keys: 10_000, seed };
            ops::kmeans(&keys, &options)
        };
        let (a, phi) = train(4, 1)?;
        assert_eq!(a.dims(), [2, 2, 6, 32, 4 + usize::from(phi.is_some())]);
        assert_same_bits(&a, &train(4, 1)?.0, "same seed");
        assert_ne!(numbers(&a), numbers(&train(4, 2)?.0), "another seed");
        if let Some(phi) = &phi {
            let norms = keys.reshape((2, 2, 700, 6, 4))?.sqr()?.sum(4)?.max(2)?;
            assert_close(&numbers(phi), &numbers(&norms), 1e-6, "phi");
        }
        let error = |iters| -> Result<f64> {
            let (centroids, phi) = train(iters, 1)?;
            Ok(quantization_error(&keys, &centroids, &ops::encode(&keys, &centroids, phi.as_ref())?))
        };
        let errors = [error(0)?, error(1)?, error(4)?, error(16)?];
        assert!(errors[3] < 0.9 * errors[0], "{errors:?}");
        if metric == Metric::Euclidean {
            assert!(errors.is_sorted_by(|a, b| a >= b), "Lloyd's algorithm never loses: {errors:?}");
        }
    }
    Ok(())
}

/// Mean squared distance of the keys from their reconstructions.
fn quantization_error(keys: &Tensor, centroids: &Tensor, codes: &Tensor) -> f64 {
    let [.., n, d] = keys.dims()[..] else { panic!("rank 4") };
    let [.., pq_dim, c, columns] = centroids.dims()[..] else { panic!("rank 5") };
    let (keys, centroids, codes) = (numbers(keys), numbers(centroids), integers(codes));
    let len = d / pq_dim;
    let square = |(i, x): (usize, &f64)| {
        let (t, m, j) = (i / d, i % d / len, i % len);
        (x - centroids[((t / n * pq_dim + m) * c + codes[t * pq_dim + m] as usize) * columns + j]).powi(2)
    };
    keys.iter().enumerate().map(square).sum::<f64>() / keys.len() as f64
}

#[test]
fn kmeans_finds_clusters_and_survives_odd_data() -> Result<()> {
    let options =
        KmeansOptions { pq_dim: 1, pq_bits: 2, iters: 12, metric: Metric::Euclidean, max_keys: 4096, seed: 3 };
    // As many keys as centroids: each is its own centroid.
    let keys = Tensor::new(&[[0f32, 1.], [9., 1.], [0., 5.], [-4., 2.]], &Device::Cpu)?.reshape((1, 1, 4, 2))?;
    for dtype in DTYPES {
        let keys = keys.to_dtype(dtype)?;
        let (centroids, _) = ops::kmeans(&keys, &options)?;
        assert_eq!(quantization_error(&keys, &centroids, &ops::encode(&keys, &centroids, None)?), 0.0);
    }
    // All keys equal: three centroids are always empty and are drawn anew from the keys.
    let (centroids, _) = ops::kmeans(&Tensor::full(2.5f32, (1, 1, 50, 2), &Device::Cpu)?, &options)?;
    assert!(numbers(&centroids).iter().all(|&x| x == 2.5));
    // A key that is not a number is nobody's neighbour and harms no other cluster than the first.
    let poisoned = Tensor::cat(&[&keys, &keys, &Tensor::full(f32::NAN, (1, 1, 1, 2), &Device::Cpu)?], 2)?;
    ops::kmeans(&poisoned, &options)?;
    // Sampling: with every other key dropped the codebook is that of the rest.
    let all = Rng(4).tensor(&[1, 1, 64, 2], DType::F32);
    let half = all.reshape((1, 1, 32, 4))?.narrow(3, 0, 2)?;
    let sampled = ops::kmeans(&all, &KmeansOptions { max_keys: 32, ..options })?.0;
    assert_same_bits(&sampled, &ops::kmeans(&half, &options)?.0, "sampled keys");
    Ok(())
}

/// One round by hand: each centroid becomes the mean of the keys it was nearest to.
#[test]
fn kmeans_moves_centroids_to_means() -> Result<()> {
    let keys = Rng(11).tensor(&[1, 1, 37, 6], DType::F32); // not a multiple of the kernel's tiles
    let keys = Tensor::cat(&[&keys.narrow(3, 0, 3)?, &keys.narrow(3, 0, 3)?], 3)?;
    let train = |iters| {
        let options =
            KmeansOptions { pq_dim: 2, pq_bits: 2, iters, metric: Metric::Euclidean, max_keys: 4096, seed: 0 };
        ops::kmeans(&keys, &options).map(|(centroids, _)| centroids)
    };
    let start = train(0)?;
    let (codes, got) = (integers(&ops::encode(&keys, &start, None)?), numbers(&train(1)?));
    let (start, keys) = (numbers(&start), numbers(&keys));
    assert_ne!(start[..12], start[12..], "equal subspaces draw differently");
    for m in 0..2 {
        for c in 0..4u32 {
            let members: Vec<usize> = (0..37).filter(|t| codes[t * 2 + m] == c).collect();
            let mean = |j| members.iter().map(|t| keys[t * 6 + m * 3 + j]).sum::<f64>() / members.len() as f64;
            let want: Vec<f64> = (0..3).map(mean).collect();
            assert!(!members.is_empty(), "a centroid starts on a key");
            assert_close(row(&got, m * 4 + c as usize, 3), &want, 1e-6, "mean");
        }
    }
    Ok(())
}

/// Scores of negative infinity weigh nothing, also where a whole block of keys has no other.
#[test]
fn infinitely_unlikely_keys_weigh_nothing() -> Result<()> {
    let keys = [vec![f32::NEG_INFINITY; 300], vec![0.5f32; 300]].concat();
    let keys = Tensor::from_vec(keys, (1, 1, 600, 1), &Device::Cpu)?;
    let query = Tensor::ones((1, 1, 1, 1), DType::F32, &Device::Cpu)?;
    let attended = ops::dense_attend(&query, &keys, &keys.ones_like()?, 1.0)?;
    assert_close(&numbers(&attended.out), &[1.0], 1e-6, "output");
    assert_close(&numbers(&attended.lse), &[0.5 + 300f64.ln()], 1e-6, "lse");
    let none = ops::dense_attend(&query, &keys.narrow(2, 0, 300)?, &keys.narrow(2, 0, 300)?.ones_like()?, 1.0)?;
    assert_eq!((numbers(&none.out)[0], numbers(&none.lse)[0]), (0.0, f64::NEG_INFINITY));
    Ok(())
}

/// The kernels own no padding: what lies beyond the keys in use does not matter.
#[test]
fn unused_capacity_may_hold_anything() -> Result<()> {
    let mut rng = Rng(10);
    let keys = rng.tensor(&[1, 2, 300, 16], DType::F32);
    let options = KmeansOptions { pq_dim: 4, pq_bits: 4, iters: 3, metric: Metric::Euclidean, max_keys: 4096, seed: 0 };
    let poisoned = lay_out(&keys, Strides::Capacity)?;
    let (centroids, _) = ops::kmeans(&keys, &options)?;
    assert_same_bits(&centroids, &ops::kmeans(&poisoned, &options)?.0, "centroids");
    let codes = ops::encode(&keys, &centroids, None)?;
    assert_same_bits(&codes, &ops::encode(&poisoned, &centroids, None)?, "codes");
    let query = rng.tensor(&[1, 4, 1, 16], DType::F32);
    let scores = ops::score(&query, &codes, &centroids)?;
    let poisoned_codes = lay_out(&codes, Strides::Capacity)?;
    assert_same_bits(&scores, &ops::score(&query, &poisoned_codes, &centroids)?, "scores");
    Ok(())
}

/// An empty view may begin behind the end of its memory.
#[test]
fn empty_views_may_begin_anywhere() -> Result<()> {
    let empty = |dims: &[usize], dtype: DType| {
        let larger: Vec<_> = dims.iter().map(|dim| dim + 1).collect();
        let larger = Tensor::zeros(larger, dtype, &Device::Cpu)?;
        dims.iter().enumerate().try_fold(larger, |tensor, (dim, len)| tensor.narrow(dim, 1, *len))
    };
    // No sequence, no KV head, no key.
    for [b, h_kv, n] in [[0, 2, 40], [2, 0, 40], [2, 2, 0], [1, 1, 0], [0, 0, 0]] {
        let (h, lists) = (2 * h_kv, [b, h_kv, 3]);
        let f32s = |dims: &[usize]| empty(dims, DType::F32);
        let (query, keys) = (f32s(&[b, h, 1, 8])?, f32s(&[b, h_kv, n, 8])?);
        let (codes, clusters) = (empty(&[b, h_kv, n, 4], DType::U8)?, empty(&[b, h_kv, n], DType::U8)?);
        let (centroids, coarse) = (f32s(&[b, h_kv, 4, 16, 2])?, f32s(&[b, h_kv, 4, 8])?);
        let (scores, positions) = (f32s(&[b, h, n])?, empty(&lists, DType::U32)?);
        let selected =
            Selected { indices: positions.clone(), lens: empty(&lists[..2], DType::U32)?, weights: f32s(&lists)? };
        let sums = ClusterSums { sums: coarse.clone(), counts: empty(&[b, h_kv, 4], DType::U32)? };
        let attended = Attended { out: query.clone(), lse: f32s(&[b, h])? };
        let options =
            KmeansOptions { pq_dim: 4, pq_bits: 1, iters: 2, metric: Metric::Euclidean, max_keys: 40, seed: 0 };
        let geometry = Geometry { n, sink: 1, window: 1, init_offset: 1 };
        let codebook = Codebook::new(centroids.clone(), None).and_then(|codebook| codebook.with_coarse(coarse.clone()));

        assert_eq!(attended.merge(&attended)?.out.dims(), query.dims());
        // An error or nothing, as with any other empty tensor; no panic.
        let _ = ops::causal_softmax(&f32s(&[b, h_kv, 0, n])?, 0, 1, 1.0);
        let _ = ops::causal_softmax(&f32s(&[b, h_kv, 6, n])?, 0, 3, 1.0);
        let _ = ops::kmeans(&keys, &options);
        let _ = ops::encode(&keys, &centroids, None);
        let _ = ops::score(&query, &codes, &centroids);
        let _ = ops::residual_score(&query, &codes, &centroids, &clusters, &coarse);
        let _ = ops::pack_codes(&codes).and_then(|packed| ops::fast_scan(&query, &packed, n, &centroids, 3));
        let packed = empty(&[b, h_kv, n.div_ceil(32), 1, 32], DType::U8)?;
        let _ = ops::fast_scan(&query, &packed, n, &f32s(&[b, h_kv, 2, 8, 4])?, 3);
        let _ = ops::topk(&scores, 3);
        let _ = ops::group_mass(&scores, h_kv, 1.0);
        let _ = ops::indices_and_weights(&positions, geometry);
        let _ = ops::dense_weights(&selected, h, n);
        let _ = ops::dense_attend(&query, &keys, &keys, 1.0);
        let _ = ops::sparse_attend(&query, &keys, &keys, &selected, 1.0);
        let _ = ops::sparse_attend_with_tail(&query, &keys, &keys, &selected, &attended, 1.0);
        let _ = ops::cluster_sums(&keys, &clusters, &sums);
        let _ = ops::tail_attend(&scores, &clusters, &sums, &selected, 1, 1.0);
        let _ = codebook.and_then(|codebook| codebook.with_weights(f32s(&[b, h_kv, 8])?)?.encode(&keys));
    }
    Ok(())
}
