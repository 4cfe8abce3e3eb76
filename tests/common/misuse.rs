//! Bad input: the error that each gives, and that nothing else happens.

mod common;

use candle_core::{DType, Device, Result, Tensor};
use candle_pq_attn::ops::{self, Attended, ClusterSums, Geometry, KmeansOptions, Selected};
use candle_pq_attn::{Codebook, Heavy, Metric, PqAttention, PqConfig, PqKvCache, Tail};
use common::*;

fn zeros(dims: &[usize], dtype: DType) -> Tensor {
    Tensor::zeros(dims, dtype, &Device::Cpu).unwrap()
}

fn f32s(dims: &[usize]) -> Tensor {
    zeros(dims, DType::F32)
}

fn u32s(numbers: &[u32], dims: &[usize]) -> Tensor {
    Tensor::from_slice(numbers, dims, &Device::Cpu).unwrap()
}

/// Checks the first line of each error: what follows is a backtrace, where one is captured.
#[track_caller]
fn assert_errors(table: Vec<(Result<()>, &str)>) {
    for (result, expected) in table {
        let error = result.expect_err(expected).to_string();
        assert_eq!(error.lines().next().unwrap(), expected);
    }
}

#[test]
fn encode() {
    let encode = |keys: &[usize], dtype, centroids: &[usize], phi: Option<&[usize]>| {
        ops::encode(&zeros(keys, dtype), &f32s(centroids), phi.map(f32s).as_ref()).map(drop)
    };
    assert_errors(vec![
        (
            encode(&[2, 5, 8], DType::F32, &[1, 2, 2, 4, 4], None),
            "encode: keys: expected [b, h_kv, n, head_dim], got [2, 5, 8]",
        ),
        (
            encode(&[1, 2, 5, 8], DType::F64, &[1, 2, 2, 4, 4], None),
            "encode: keys: expected dtype f32, f16, bf16, got f64",
        ),
        (
            encode(&[1, 2, 5, 8], DType::F32, &[2, 2, 4, 4], None),
            "encode: centroids: expected [b, h_kv, pq_dim, n_centroids, pq_len], got [2, 2, 4, 4]",
        ),
        (
            encode(&[1, 2, 5, 8], DType::F32, &[1, 2, 3, 4, 2], None),
            "encode: centroids: expected a pq_dim that divides head_dim 8, got 3",
        ),
        (
            encode(&[1, 2, 5, 8], DType::F32, &[1, 2, 0, 4, 2], None),
            "encode: centroids: expected a pq_dim that divides head_dim 8, got 0",
        ),
        (
            encode(&[1, 2, 5, 8], DType::F32, &[1, 2, 2, 5, 4], None),
            "encode: centroids: expected 2, 4, 8, ... or 256 centroids, got 5",
        ),
        (
            encode(&[1, 2, 5, 8], DType::F32, &[1, 2, 2, 512, 4], None),
            "encode: centroids: expected 2, 4, 8, ... or 256 centroids, got 512",
        ),
        (
            encode(&[1, 2, 5, 8], DType::F32, &[1, 3, 2, 4, 4], None),
            "encode: centroids: expected shape [1, 2, 2, 4, 4], got [1, 3, 2, 4, 4]",
        ),
        (
            encode(&[1, 2, 5, 8], DType::F32, &[1, 2, 2, 4, 4], Some(&[1, 2, 2])),
            "encode: centroids: expected shape [1, 2, 2, 4, 5], got [1, 2, 2, 4, 4]",
        ),
        (
            encode(&[1, 2, 5, 8], DType::F32, &[1, 2, 2, 4, 5], Some(&[1, 2])),
            "encode: phi: expected shape [1, 2, 2], got [1, 2]",
        ),
        (
            encode(&[1, 2, 5, 260], DType::F32, &[1, 2, 2, 4, 130], None),
            "encode: keys: expected a head_dim of 1 to 256, got 260",
        ),
        (
            encode(&[1, 2, 5, 0], DType::F32, &[1, 2, 2, 4, 0], None),
            "encode: keys: expected a head_dim of 1 to 256, got 0",
        ),
    ]);
}

#[test]
fn score() {
    let score = |query: &[usize], codes: &[usize], dtype, centroids: &[usize]| {
        ops::score(&f32s(query), &zeros(codes, dtype), &f32s(centroids)).map(drop)
    };
    // The bad code is the very last one.
    let mut codes = vec![7u8; 20];
    codes[19] = 9;
    let nine = Tensor::from_vec(codes, (1, 2, 5, 2), &Device::Cpu).unwrap();
    assert_errors(vec![
        (
            score(&[1, 4, 2, 8], &[1, 2, 5, 2], DType::U8, &[1, 2, 2, 4, 4]),
            "score: query: expected shape [1, 4, 1, 8], got [1, 4, 2, 8]",
        ),
        (score(&[1, 4, 1, 8], &[1, 2, 5, 2], DType::U32, &[1, 2, 2, 4, 4]), "score: codes: expected dtype u8, got u32"),
        (
            score(&[1, 4, 1, 8], &[1, 3, 5, 2], DType::U8, &[1, 3, 2, 4, 4]),
            "score: codes: expected an h_kv that divides h 4, got 3",
        ),
        (
            score(&[1, 4, 1, 8], &[1, 0, 5, 2], DType::U8, &[1, 0, 2, 4, 4]),
            "score: codes: expected an h_kv that divides h 4, got 0",
        ),
        (
            score(&[1, 0, 1, 8], &[1, 2, 5, 2], DType::U8, &[1, 2, 2, 4, 4]),
            "score: codes: expected an h_kv that divides h 0, got 2",
        ),
        (
            score(&[1, 4, 1, 8], &[2, 2, 5, 2], DType::U8, &[1, 2, 2, 4, 4]),
            "score: codes: expected shape [1, 2, 5, 2], got [2, 2, 5, 2]",
        ),
        (
            score(&[1, 4, 1, 8], &[1, 2, 5, 2], DType::U8, &[1, 2, 2, 4, 5]),
            "score: centroids: expected shape [1, 2, 2, 4, 4], got [1, 2, 2, 4, 5]",
        ),
        (
            ops::score(&f32s(&[1, 4, 1, 8]), &nine, &f32s(&[1, 2, 2, 8, 4])).map(drop),
            "score: codes: expected codes below n_centroids 8, got 9",
        ),
    ]);
}

#[test]
fn fast_scan() {
    let scan = |query: &[usize], packed: &[usize], dtype, n, centroids: &[usize]| {
        ops::fast_scan(&f32s(query), &zeros(packed, dtype), n, &f32s(centroids), 1).map(drop)
    };
    let (query, packed, byte, centroids): (&[usize], &[usize], _, &[usize]) =
        (&[1, 4, 1, 8], &[1, 2, 3, 1, 32], DType::U8, &[1, 2, 2, 16, 4]);
    // The bad code is the very last one.
    let mut codes = vec![7u8; 20];
    codes[19] = 16;
    let sixteen = Tensor::from_vec(codes.clone(), (1, 2, 5, 2), &Device::Cpu).unwrap();
    codes[19] = 9;
    let nine = ops::pack_codes(&Tensor::from_vec(codes, (1, 2, 5, 2), &Device::Cpu).unwrap()).unwrap();
    assert_errors(vec![
        (ops::pack_codes(&f32s(&[1, 2, 5, 2])).map(drop), "pack_codes: codes: expected dtype u8, got f32"),
        (
            ops::pack_codes(&zeros(&[2, 5, 2], byte)).map(drop),
            "pack_codes: codes: expected [b, h_kv, n, pq_dim], got [2, 5, 2]",
        ),
        (ops::pack_codes(&sixteen).map(drop), "pack_codes: codes: expected codes below 16, got 16"),
        (
            scan(&[1, 4, 2, 8], packed, byte, 96, centroids),
            "fast_scan: query: expected shape [1, 4, 1, 8], got [1, 4, 2, 8]",
        ),
        (
            scan(&[1, 4, 1, 0], packed, byte, 96, &[1, 2, 2, 16, 0]),
            "fast_scan: query: expected a head_dim of 1 to 256, got 0",
        ),
        (
            scan(query, packed, byte, 96, &[1, 3, 2, 16, 4]),
            "fast_scan: centroids: expected an h_kv that divides h 4, got 3",
        ),
        (
            scan(query, packed, byte, 96, &[1, 2, 2, 32, 4]),
            "fast_scan: centroids: expected 2, 4, 8 or 16 centroids, got 32",
        ),
        (
            scan(query, packed, byte, 96, &[1, 2, 3, 16, 4]),
            "fast_scan: centroids: expected a pq_dim that divides head_dim 8, got 3",
        ),
        (
            scan(query, packed, byte, 96, &[1, 2, 2, 16, 5]),
            "fast_scan: centroids: expected shape [1, 2, 2, 16, 4], got [1, 2, 2, 16, 5]",
        ),
        (scan(query, packed, DType::U32, 96, centroids), "fast_scan: packed: expected dtype u8, got u32"),
        (
            scan(query, &[2, 3, 1, 32], byte, 96, centroids),
            "fast_scan: packed: expected [b, h_kv, blocks, rows, 32], got [2, 3, 1, 32]",
        ),
        (
            scan(query, packed, byte, 64, centroids),
            "fast_scan: packed: expected shape [1, 2, 2, 1, 32], got [1, 2, 3, 1, 32]",
        ),
        (scan(query, packed, byte, 1 << 32, centroids), "fast_scan: n: expected at most u32::MAX keys, got 4294967296"),
        (
            ops::fast_scan(&f32s(query), &nine, 5, &f32s(&[1, 2, 2, 8, 4]), 1).map(drop),
            "fast_scan: packed: expected codes below n_centroids 8, got 9",
        ),
    ]);
}

#[test]
fn selection() {
    let geometry = |n| Geometry { n, sink: 1, window: 1, init_offset: 2 };
    let list = |heavy: &[u32], n| ops::indices_and_weights(&u32s(heavy, &[1, 1, heavy.len()]), geometry(n)).map(drop);
    let selected = |index, len| Selected {
        indices: u32s(&[0, index], &[1, 1, 2]),
        lens: u32s(&[len], &[1, 1]),
        weights: f32s(&[1, 1, 2]).ones_like().unwrap(),
    };
    assert_errors(vec![
        (ops::topk(&zeros(&[2, 3], DType::F16), 1).map(drop), "topk: scores: expected dtype f32, got f16"),
        (ops::topk(&f32s(&[]), 1).map(drop), "topk: scores: expected [..., n], got []"),
        (ops::group_mass(&f32s(&[1, 4, 5]), 3, 1.0).map(drop), "group_mass: h_kv: expected a divisor of h 4, got 3"),
        (ops::group_mass(&f32s(&[1, 4, 5]), 0, 1.0).map(drop), "group_mass: h_kv: expected a divisor of h 4, got 0"),
        (
            ops::group_mass(&f32s(&[1, 4, 5]), 2, f32::NAN).map(drop),
            "group_mass: scale: expected a finite number, got NaN",
        ),
        (ops::group_mass(&f32s(&[4, 5]), 2, 1.0).map(drop), "group_mass: scores: expected [b, h, n], got [4, 5]"),
        (list(&[1, 8], 10), "indices_and_weights: heavy: expected positions below n 10, got 2 + 8"),
        (list(&[3, 3], 10), "indices_and_weights: heavy: expected ascending positions, got 3 after 3"),
        (
            ops::indices_and_weights(&f32s(&[1, 1, 2]), geometry(10)).map(drop),
            "indices_and_weights: heavy: expected dtype u32, got f32",
        ),
        (list(&[0], 0), "indices_and_weights: heavy: expected no positions for n 0, got 1 a list"),
        (list(&[], 1 << 33), "indices_and_weights: n: expected at most u32::MAX keys, got 8589934592"),
        (
            ops::dense_weights(&selected(9, 2), 1, 9).map(drop),
            "dense_weights: indices: expected positions below n 9, got 9",
        ),
        (
            ops::dense_weights(&selected(2, 3), 1, 9).map(drop),
            "dense_weights: lens: expected at most 2 positions, got 3",
        ),
        (
            ops::dense_weights(&Selected { lens: u32s(&[1, 1], &[1, 2]), ..selected(2, 2) }, 1, 9).map(drop),
            "dense_weights: lens: expected shape [1, 1], got [1, 2]",
        ),
    ]);
}

#[test]
fn attend() {
    let selected = |indices: &[u32], lists: usize| {
        let l = indices.len() / lists;
        Selected {
            indices: u32s(indices, &[1, lists, l]),
            lens: Tensor::full(l as u32, (1, lists), &Device::Cpu).unwrap(),
            weights: f32s(&[1, lists, l]).ones_like().unwrap(),
        }
    };
    let attend = |query: &[usize], keys: &[usize], values: &[usize], dtype, selected: &Selected, scale| {
        ops::sparse_attend(&f32s(query), &zeros(keys, dtype), &zeros(values, dtype), selected, scale).map(drop)
    };
    let (q, k, f) = (&[1, 4, 1, 8], &[1, 2, 5, 8], DType::F32);
    let good = selected(&[0, 1, 2, 3], 2);
    let softmax = |dims: &[usize], first, queries| ops::causal_softmax(&f32s(dims), first, queries, 1.0);
    assert_errors(vec![
        (attend(q, k, k, DType::BF16, &good, 1.0), "sparse_attend: keys: expected dtype f32, got bf16"),
        (
            attend(q, &[1, 2, 5, 9], k, f, &good, 1.0),
            "sparse_attend: keys: expected shape [1, 2, 5, 8], got [1, 2, 5, 9]",
        ),
        (
            attend(q, k, &[1, 2, 4, 8], f, &good, 1.0),
            "sparse_attend: values: expected shape [1, 2, 5, 8], got [1, 2, 4, 8]",
        ),
        (
            attend(q, &[1, 3, 5, 8], &[1, 3, 5, 8], f, &good, 1.0),
            "sparse_attend: keys: expected an h_kv that divides h 4, got 3",
        ),
        (
            attend(q, k, k, f, &selected(&[0, 1, 2], 3), 1.0),
            "sparse_attend: indices: expected shape [1, 4 or 2, 1], got [1, 3, 1]",
        ),
        (
            attend(q, k, k, f, &selected(&[0, 1, 2, 5], 2), 1.0),
            "sparse_attend: indices: expected positions below n 5, got 5",
        ),
        (attend(q, k, k, f, &good, f32::INFINITY), "sparse_attend: scale: expected a finite number, got inf"),
        (
            ops::dense_attend(&f32s(q), &f32s(k), &f32s(&[2, 5, 8]), 1.0).map(drop),
            "dense_attend: values: expected shape [1, 2, 5, 8], got [2, 5, 8]",
        ),
        (
            ops::dense_attend(&f32s(&[1, 0, 1, 8]), &f32s(k), &f32s(k), 1.0).map(drop),
            "dense_attend: keys: expected an h_kv that divides h 0, got 2",
        ),
        (softmax(&[1, 1, 6, 9], 6, 4), "causal_softmax: queries: expected a divisor of 6 rows, got 4"),
        (softmax(&[1, 1, 6, 9], 7, 3), "causal_softmax: first: expected at most 9 keys minus 3 queries, got 7"),
    ]);
}

#[test]
fn residual_score() {
    let score = |coarse_codes: &[usize], dtype, coarse: &[usize]| {
        let (query, codes, centroids) = (f32s(&[1, 4, 1, 8]), zeros(&[1, 2, 5, 2], DType::U8), f32s(&[1, 2, 2, 4, 4]));
        ops::residual_score(&query, &codes, &centroids, &zeros(coarse_codes, dtype), &f32s(coarse)).map(drop)
    };
    let eight = Tensor::full(8u8, (1, 2, 5), &Device::Cpu).unwrap();
    let (query, codes, centroids) = (f32s(&[1, 4, 1, 8]), zeros(&[1, 2, 5, 2], DType::U8), f32s(&[1, 2, 2, 4, 4]));
    let good: &[usize] = &[1, 2, 5];
    assert_errors(vec![
        (
            score(&[1, 2, 4], DType::U8, &[1, 2, 8, 8]),
            "residual_score: coarse_codes: expected shape [1, 2, 5], got [1, 2, 4]",
        ),
        (score(good, DType::U32, &[1, 2, 8, 8]), "residual_score: coarse_codes: expected dtype u8, got u32"),
        (
            score(good, DType::U8, &[1, 8, 8]),
            "residual_score: coarse_centroids: expected [b, h_kv, n_clusters, head_dim], got [1, 8, 8]",
        ),
        (
            score(good, DType::U8, &[1, 2, 7, 8]),
            "residual_score: coarse_centroids: expected 2, 4, 8, ... or 256 centroids, got 7",
        ),
        (
            score(good, DType::U8, &[1, 2, 8, 4]),
            "residual_score: coarse_centroids: expected shape [1, 2, 8, 8], got [1, 2, 8, 4]",
        ),
        (
            ops::residual_score(&query, &codes, &centroids, &eight, &f32s(&[1, 2, 8, 8])).map(drop),
            "residual_score: coarse_codes: expected codes below n_centroids 8, got 8",
        ),
        (
            ops::residual_score(&query, &codes, &f32s(&[1, 2, 2, 4, 5]), &eight, &f32s(&[1, 2, 8, 8])).map(drop),
            "residual_score: centroids: expected shape [1, 2, 2, 4, 4], got [1, 2, 2, 4, 5]",
        ),
    ]);
}

#[test]
fn tail() {
    let clusters = |dims: [usize; 4]| ClusterSums::empty(dims, &Device::Cpu).unwrap();
    let good = || clusters([1, 2, 8, 6]);
    let sum = |values: &[usize], codes: &Tensor, before: &ClusterSums| {
        ops::cluster_sums(&f32s(values), codes, before).map(drop)
    };
    let selected = |lists| Selected {
        indices: u32s(&vec![1; lists], &[1, lists, 1]),
        lens: u32s(&vec![1; lists], &[1, lists]),
        weights: f32s(&[1, lists, 1]).ones_like().unwrap(),
    };
    let tail = |scores: &[usize], codes: &Tensor, clusters: &ClusterSums, lists, scale| {
        ops::tail_attend(&f32s(scores), codes, clusters, &selected(lists), 0, scale).map(drop)
    };
    let codes = zeros(&[1, 2, 5], DType::U8);
    let nine = Tensor::full(9u8, (1, 2, 5), &Device::Cpu).unwrap();
    let (v, s) = (&[1, 2, 5, 6], &[1, 4, 5]);
    let attended = |out: &[usize], dtype, lse: &[usize]| Attended { out: zeros(out, dtype), lse: f32s(lse) };
    let merge = |a: Attended, b: Attended| a.merge(&b).map(drop);
    let some = || attended(&[1, 4, 1, 6], DType::F32, &[1, 4]);
    let with = |tail: Attended| {
        let (q, kv) = (f32s(&[1, 4, 1, 6]), f32s(&[1, 2, 5, 6]));
        ops::sparse_attend_with_tail(&q, &kv, &kv, &selected(2), &tail, 1.0).map(drop)
    };
    assert_errors(vec![
        (
            sum(v, &zeros(&[1, 2, 4], DType::U8), &good()),
            "cluster_sums: codes: expected shape [1, 2, 5], got [1, 2, 4]",
        ),
        (sum(v, &nine, &good()), "cluster_sums: codes: expected codes below n_centroids 8, got 9"),
        (sum(v, &codes, &clusters([1, 3, 8, 6])), "cluster_sums: sums: expected shape [1, 2, 8, 6], got [1, 3, 8, 6]"),
        (
            sum(v, &codes, &clusters([1, 2, 8, 7])),
            "cluster_sums: values: expected shape [1, 2, 5, 7], got [1, 2, 5, 6]",
        ),
        (sum(v, &codes, &clusters([1, 2, 300, 6])), "cluster_sums: sums: expected 1 to 256 clusters, got 300"),
        (
            sum(v, &codes, &ClusterSums { counts: f32s(&[1, 2, 8]), ..good() }),
            "cluster_sums: counts: expected dtype u32, got f32",
        ),
        (tail(&[4, 5], &codes, &good(), 4, 1.0), "tail_attend: scores: expected [b, h, n], got [4, 5]"),
        (tail(&[1, 4, 6], &codes, &good(), 4, 1.0), "tail_attend: codes: expected shape [1, 2, 6], got [1, 2, 5]"),
        (tail(&[1, 3, 5], &codes, &good(), 3, 1.0), "tail_attend: codes: expected an h_kv that divides h 3, got 2"),
        (tail(s, &nine, &good(), 4, 1.0), "tail_attend: codes: expected codes below n_centroids 8, got 9"),
        (
            tail(s, &codes, &ClusterSums { counts: zeros(&[1, 2, 9], DType::U32), ..good() }, 4, 1.0),
            "tail_attend: counts: expected shape [1, 2, 8], got [1, 2, 9]",
        ),
        (tail(s, &codes, &good(), 3, 1.0), "tail_attend: indices: expected shape [1, 4 or 2, 1], got [1, 3, 1]"),
        (tail(s, &codes, &good(), 2, f32::NAN), "tail_attend: scale: expected a finite number, got NaN"),
        (
            with(attended(&[1, 4, 1, 6], DType::BF16, &[1, 4])),
            "sparse_attend_with_tail: tail.out: expected dtype f32, got bf16",
        ),
        (
            with(attended(&[1, 4, 1, 5], DType::F32, &[1, 4])),
            "sparse_attend_with_tail: tail.out: expected shape [1, 4, 1, 6], got [1, 4, 1, 5]",
        ),
        (
            with(attended(&[1, 4, 1, 6], DType::F32, &[4])),
            "sparse_attend_with_tail: tail.lse: expected shape [1, 4], got [4]",
        ),
        (merge(some(), attended(&[1, 4, 1, 6], DType::F16, &[1, 4])), "merge: out: expected dtype f32, got f16"),
        (
            merge(some(), attended(&[1, 4, 1, 7], DType::F32, &[1, 4])),
            "merge: out: expected shape [1, 4, 1, 6], got [1, 4, 1, 7]",
        ),
        (
            merge(attended(&[1, 4, 1, 6], DType::F32, &[4]), attended(&[1, 4, 1, 6], DType::F32, &[4])),
            "merge: lse: expected shape [1, 4], got [4]",
        ),
        (
            merge(attended(&[4, 6], DType::F32, &[4]), attended(&[4, 6], DType::F32, &[4])),
            "merge: out: expected [b, h, 1, head_dim], got [4, 6]",
        ),
    ]);
}

#[test]
fn kmeans() {
    let kmeans = |n, pq_dim, pq_bits, max_keys| {
        let options = KmeansOptions { pq_dim, pq_bits, iters: 1, metric: Metric::Euclidean, max_keys, seed: 0 };
        ops::kmeans(&f32s(&[1, 2, n, 8]), &options).map(drop)
    };
    // Columns of 2: with phi, of pq_len 1.
    let with_coarse = |phi, coarse| Codebook::new(f32s(&[1, 2, 4, 16, 2]), phi)?.with_coarse(coarse).map(drop);
    let with_weights = |phi, weights, coarse: Option<Tensor>| {
        let weighted = Codebook::new(f32s(&[1, 2, 4, 16, 2]), phi)?.with_weights(weights)?;
        coarse.map(|coarse| weighted.with_coarse(coarse)).transpose().map(drop)
    };
    let train =
        |config: PqConfig, weights| Codebook::train_weighted(&f32s(&[1, 2, 40, 8]), Some(&weights), &config).map(drop);
    let full = |x: f32, d: usize| Tensor::full(x, (1, 2, d), &Device::Cpu).expect("a tensor");
    assert_errors(vec![
        (kmeans(20, 3, 2, 99), "kmeans: pq_dim: expected a divisor of head_dim 8, got 3"),
        (kmeans(20, 2, 0, 99), "kmeans: pq_bits: expected 1 to 8, got 0"),
        (kmeans(20, 2, 9, 99), "kmeans: pq_bits: expected 1 to 8, got 9"),
        (
            kmeans(20, 2, 5, 99),
            "kmeans: keys: expected at least n_centroids 32 keys to train on, got 20 (n 20, max_keys 99)",
        ),
        (
            kmeans(40, 2, 5, 30),
            "kmeans: keys: expected at least n_centroids 32 keys to train on, got 30 (n 40, max_keys 30)",
        ),
        (
            Codebook::new(f32s(&[1, 2, 4]), None).map(drop),
            "Codebook: centroids: expected [b, h_kv, pq_dim, n_centroids, pq_len], got [1, 2, 4]",
        ),
        (
            Codebook::new(f32s(&[1, 2, 0, 16, 1]), None).map(drop),
            "Codebook: centroids: expected a pq_dim of at least 1, got [1, 2, 0, 16, 1]",
        ),
        (
            Codebook::new(f32s(&[1, 2, 4, 16, 1]), Some(f32s(&[1, 2, 4]))).map(drop),
            "Codebook: centroids: expected a pq_len of at least 1, got [1, 2, 4, 16, 1]",
        ),
        (
            Codebook::new(f32s(&[1, 2, 4, 16, 3]), Some(f32s(&[1, 2]))).map(drop),
            "Codebook: phi: expected [1, 2, 4] f32, got [1, 2] f32",
        ),
        (
            with_coarse(None, f32s(&[1, 2, 8, 7])),
            "Codebook: coarse: expected [1, 2, 2, 4, 8, ... or 256, 8], got [1, 2, 8, 7]",
        ),
        (
            with_coarse(None, f32s(&[1, 2, 9, 8])),
            "Codebook: coarse: expected [1, 2, 2, 4, 8, ... or 256, 8], got [1, 2, 9, 8]",
        ),
        (with_coarse(None, zeros(&[1, 2, 8, 8], DType::F16)), "Codebook: coarse: expected dtype f32, got f16"),
        (
            with_coarse(Some(f32s(&[1, 2, 4])), f32s(&[1, 2, 8, 4])),
            "Codebook: coarse: expected centroids of the Euclidean metric, got InnerProduct",
        ),
        (train(small(), f32s(&[1, 2, 4])), "Codebook: weights: expected [1, 2, 8] f32, got [1, 2, 4] f32"),
        (
            Codebook::new(f32s(&[1, 2, 4, 16, 2]), None)
                .and_then(|codebook| codebook.with_weights(full(1.0, 8)))
                .and_then(|codebook| codebook.encode(&f32s(&[1, 1, 5, 8])))
                .map(drop),
            "Codebook: keys: expected [1, 2, n, 8], got [1, 1, 5, 8]",
        ),
        (
            train(PqConfig { coarse: 3, ..small() }, full(1.0, 8)),
            "PqConfig: coarse: expected 0, 2, 4, 8, ... or 256 clusters, got 3",
        ),
        (
            train(PqConfig { coarse: usize::MAX, ..small() }, full(1.0, 8)),
            "PqConfig: coarse: expected 0, 2, 4, 8, ... or 256 clusters, got 18446744073709551615",
        ),
        (train(PqConfig { pq_bits: 64, ..small() }, full(1.0, 8)), "PqConfig: pq_bits: expected 1 to 8, got 64"),
        (train(small(), full(0.0, 8)), "Codebook: weights: expected positive finite numbers, got 0"),
        (
            train(PqConfig { metric: Metric::InnerProduct, ..small() }, full(1.0, 8)),
            "Codebook: weights: expected centroids of the Euclidean metric, got InnerProduct",
        ),
        (with_weights(None, f32s(&[1, 2, 4]), None), "Codebook: weights: expected [1, 2, 8] f32, got [1, 2, 4] f32"),
        (
            with_weights(None, zeros(&[1, 2, 8], DType::BF16), None),
            "Codebook: weights: expected [1, 2, 8] f32, got [1, 2, 8] bf16",
        ),
        (
            with_weights(Some(f32s(&[1, 2, 4])), full(1.0, 4), None),
            "Codebook: weights: expected centroids of the Euclidean metric, got InnerProduct",
        ),
        (with_weights(None, full(-1.0, 8), None), "Codebook: weights: expected positive finite numbers, got -1"),
        (with_weights(None, full(f32::NAN, 8), None), "Codebook: weights: expected positive finite numbers, got NaN"),
        (
            with_weights(None, full(f32::INFINITY, 8), None),
            "Codebook: weights: expected positive finite numbers, got inf",
        ),
        (
            with_weights(None, full(2.0, 8), Some(f32s(&[1, 2, 8, 8]))),
            "Codebook: coarse: expected a codebook that gets its weights afterwards, got one that has some",
        ),
    ]);
}

#[test]
fn config() {
    let check = |config: PqConfig| config.validate(64);
    let base = PqConfig::default;
    let heavy = |text: &str| text.parse::<Heavy>().map(drop);
    assert_errors(vec![
        (base().validate(0), "PqConfig: head_dim: expected 1 to 256, got 0"),
        (base().validate(512), "PqConfig: head_dim: expected 1 to 256, got 512"),
        (check(PqConfig { pq_dim: 24, ..base() }), "PqConfig: pq_dim: expected a divisor of head_dim 64, got 24"),
        (check(PqConfig { pq_bits: 9, ..base() }), "PqConfig: pq_bits: expected 1 to 8, got 9"),
        (check(PqConfig { refresh: 0.0, ..base() }), "PqConfig: refresh: expected a share above 0, got 0"),
        (check(PqConfig { refresh: f64::NAN, ..base() }), "PqConfig: refresh: expected a share above 0, got NaN"),
        (
            check(PqConfig { max_train_keys: 255, ..base() }),
            "PqConfig: max_train_keys: expected at least 256 (2^pq_bits), got 255",
        ),
        (
            check(PqConfig { coarse: 512, ..base() }),
            "PqConfig: coarse: expected 0, 2, 4, 8, ... or 256 clusters, got 512",
        ),
        (check(PqConfig { coarse: 1, ..base() }), "PqConfig: coarse: expected 0, 2, 4, 8, ... or 256 clusters, got 1"),
        (
            check(PqConfig { coarse: 256, pq_bits: 4, max_train_keys: 255, ..base() }),
            "PqConfig: max_train_keys: expected at least 256 (coarse), got 255",
        ),
        (
            check(PqConfig { coarse: 64, metric: Metric::InnerProduct, ..base() }),
            "PqConfig: metric: expected Euclidean with coarse clusters, got InnerProduct",
        ),
        (
            check(PqConfig { coarse: 0, tail: Tail::None, metric: Metric::InnerProduct, ..base() }),
            "PqConfig: query_weights: expected false with the metric InnerProduct, got true",
        ),
        (
            check(PqConfig { coarse: 0, ..base() }),
            "PqConfig: coarse: expected at least 2 clusters with a tail of cluster means, got 0",
        ),
        (check(PqConfig { heavy: Heavy::Keys(0), ..base() }), "PqConfig: heavy: expected at least 1 key, got 0"),
        (
            check(PqConfig { heavy: Heavy::Fraction(f64::NAN), ..base() }),
            "PqConfig: heavy: expected a share above 0% and at most 100%, got NaN%",
        ),
        (heavy("0%"), "PqConfig: heavy: expected a share above 0% and at most 100%, got 0%"),
        (heavy("150%"), "PqConfig: heavy: expected a share above 0% and at most 100%, got 150%"),
        (heavy("many"), "PqConfig: heavy: expected a number of keys such as 512 or a share such as 2%, got \"many\""),
        (heavy("-3"), "PqConfig: heavy: expected a number of keys such as 512 or a share such as 2%, got \"-3\""),
    ]);
}

#[test]
fn cache_and_attention_stay_as_they_were() -> Result<()> {
    let config = PqConfig {
        pq_dim: 4,
        pq_bits: 4,
        heavy: Heavy::Keys(8),
        window: 4,
        coarse: 0,
        tail: Tail::None,
        ..PqConfig::default()
    };
    let attn = PqAttention::new(config.clone(), 0.25)?;
    let mut rng = Rng(1);
    let mut cache = attn.new_cache([1, 2, 16], 0, DType::F32, &Device::Cpu)?;
    let first = rng.tensor(&[1, 2, 100, 16], DType::F32);
    cache.append(&first, &first)?;
    cache.build_index()?;
    let state = |cache: &PqKvCache| -> Result<_> {
        Ok((numbers(&cache.keys()?), numbers(&cache.values()?), integers(&cache.codes()?), cache.len(), cache.memory()))
    };
    let before = state(&cache)?;

    let (q, kv) = (f32s(&[1, 4, 1, 16]), f32s(&[1, 2, 1, 16]));
    let wide = f32s(&[1, 2, 2, 16]);
    let mut forward = |q: &Tensor, k: &Tensor, v: &Tensor| attn.forward(q, k, v, &mut cache).map(drop);
    let table = vec![
        (
            forward(&f32s(&[1, 3, 1, 16]), &kv, &kv),
            "PqAttention: query: expected [1, a multiple of 2, s >= 1, 16], got [1, 3, 1, 16]",
        ),
        (
            forward(&f32s(&[1, 4, 0, 16]), &kv, &kv),
            "PqAttention: query: expected [1, a multiple of 2, s >= 1, 16], got [1, 4, 0, 16]",
        ),
        (forward(&q, &wide, &wide), "PqAttention: keys: expected s = 1 as the query, got 2"),
        (forward(&q, &kv, &wide), "PqKvCache: values: expected as many as keys (1), got 2"),
        (forward(&q, &f32s(&[1, 3, 1, 16]), &kv), "PqKvCache: keys: expected [1, 2, s, 16], got [1, 3, 1, 16]"),
        (forward(&q, &zeros(&[1, 2, 1, 16], DType::F16), &kv), "PqKvCache: keys: expected dtype f32, got f16"),
        (
            forward(&zeros(&[1, 4, 1, 16], DType::BF16), &kv, &kv),
            "PqAttention: query: expected dtype f32 as the cache, got bf16",
        ),
    ];
    assert_errors(table);
    assert_eq!(state(&cache)?, before);

    // Of blocks of 5 from position 4 on, 19 have codes; key 103 is the last of another.
    let mut cache = attn.new_cache([1, 2, 16], 200, DType::F32, &Device::Cpu)?;
    cache.append(&first, &first)?;
    cache.advance(3)?;
    assert_eq!((cache.len(), cache.codebook().is_none()), (103, true), "without a codebook nothing is to be encoded");
    cache.truncate(100)?;
    cache.build_index()?;
    cache.append(&first.narrow(2, 0, 4)?, &first.narrow(2, 0, 4)?)?;
    let open = state(&cache)?;
    cache.advance(0)?;
    assert_errors(vec![
        (cache.advance(1), "PqKvCache: advance: expected codes up to key 104, got 99: call build_index first"),
        (cache.advance(97), "PqKvCache: advance: expected at most 96 steps for 104 keys of 200, got 97"),
    ]);
    assert_eq!(state(&cache)?, open);
    cache.build_index()?;
    cache.advance(5)?;
    assert_eq!((cache.len(), cache.codes()?.dim(2)?), (109, 105));
    cache.truncate(100)?;
    assert_eq!(state(&cache)?, before);

    let other = PqAttention::new(PqConfig { sink: 5, ..config.clone() }, 0.25)?;
    let error = other.forward(&q, &kv, &kv, &mut cache).expect_err("another config").to_string();
    assert!(error.starts_with("PqAttention: cache: expected one made with this attention's config, got PqConfig"));
    assert_errors(vec![
        (
            cache.reserve(usize::MAX),
            "PqKvCache: capacity: expected keys and values of less than 9223372036854775807 bytes, got 18446744073709551615 of [1, 2, 16]",
        ),
        (
            cache.reserve(isize::MAX as usize / 200),
            "PqKvCache: capacity: expected keys and values of less than 9223372036854775807 bytes, got 46116860184273979 of [1, 2, 16]",
        ),
        (cache.truncate(101), "PqKvCache: truncate: expected at most the 100 keys there are, got 101"),
        (
            cache.set_codebook(Codebook::new(f32s(&[1, 2, 4, 32, 4]), None)?),
            "PqKvCache: codebook: expected [b, h_kv, pq_dim, n_centroids] [1, 2, 4, 16] of pq_len 4, got [1, 2, 4, 32] of 4",
        ),
        (
            cache.set_codebook(Codebook::new(f32s(&[1, 2, 4, 16, 5]), Some(f32s(&[1, 2, 4])))?),
            "PqKvCache: codebook: expected metric Euclidean, got InnerProduct",
        ),
        (
            cache.set_codebook(Codebook::new(f32s(&[1, 2, 4, 16, 4]), None)?.with_coarse(f32s(&[1, 2, 8, 16]))?),
            "PqKvCache: codebook: expected 0 coarse clusters, got 8",
        ),
        (attn.new_cache([0, 2, 16], 0, DType::F32, &Device::Cpu).map(drop), "PqKvCache: expected at least one sequence and one KV head, got batch 0, h_kv 2"),
        (attn.new_cache([1, 2, 18], 0, DType::F32, &Device::Cpu).map(drop), "PqConfig: pq_dim: expected a divisor of head_dim 18, got 4"),
        (attn.new_cache([1, 2, 16], 0, DType::F64, &Device::Cpu).map(drop), "PqKvCache: dtype: expected f32, f16 or bf16, got f64"),
        (PqAttention::new(config, f32::NAN).map(drop), "PqAttention: scale: expected a positive finite number, got NaN"),
    ]);
    assert_eq!(state(&cache)?, before);
    Ok(())
}
