//! Bad input: the error that each gives, and that nothing else happens. The same table for every device.

use candle_core::{DType, Device, Result, Tensor};
use candle_pq_attn::ops::{self, Attended, ClusterSums, Geometry, KmeansOptions, Selected};
use candle_pq_attn::{
    load_caches, save_caches, Codebook, DecodeGraph, Heavy, KvCache, Metric, PagePool, PqAttention, PqConfig,
    PqKvCache, Tail,
};

use super::common::*;

/// Where the tensors of a table are.
#[derive(Clone, Copy)]
pub struct On<'a> {
    pub device: &'a Device,
}

impl On<'_> {
    fn zeros(self, dims: &[usize], dtype: DType) -> Tensor {
        Tensor::zeros(dims, dtype, self.device).unwrap()
    }

    fn f32s(self, dims: &[usize]) -> Tensor {
        self.zeros(dims, DType::F32)
    }

    fn u32s(self, numbers: &[u32], dims: &[usize]) -> Tensor {
        Tensor::from_slice(numbers, dims, self.device).unwrap()
    }

    /// Checks the first line of each error: what follows is a backtrace, where one is captured.
    ///
    /// What is in tensors a GPU does not read back: there it is no error.
    #[track_caller]
    fn assert_errors(self, table: Vec<(Result<()>, &str)>) {
        const OF_NUMBERS: [&str; 4] =
            ["codes below", "positions below n", "ascending positions", "at most 2 positions"];
        let is_seen = |expected: &str| self.device.is_cpu() || !OF_NUMBERS.iter().any(|part| expected.contains(part));
        for (result, expected) in table.into_iter().filter(|(_, expected)| is_seen(expected)) {
            assert_eq!(first_line(&result.expect_err(expected)), expected);
        }
    }
}

/// All tables.
pub fn all(on: On) -> Result<()> {
    encode(on)?;
    score(on)?;
    fast_scan(on)?;
    selection(on)?;
    attend(on)?;
    residual_score(on)?;
    tail(on)?;
    kmeans(on)?;
    config(on)?;
    cache_and_attention(on)?;
    prefill_and_budget(on)?;
    full_cache(on)?;
    pages(on)?;
    packed(on)?;
    drop_in(on)?;
    files(on)?;
    graph(on)
}

fn first_line(error: &candle_core::Error) -> String {
    error.to_string().lines().next().unwrap_or_default().to_string()
}

fn encode(on: On) -> Result<()> {
    let encode = |keys: &[usize], dtype, centroids: &[usize], phi: Option<&[usize]>| {
        ops::encode(&on.zeros(keys, dtype), &on.f32s(centroids), phi.map(|dims| on.f32s(dims)).as_ref()).map(drop)
    };
    on.assert_errors(vec![
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
    Ok(())
}

fn score(on: On) -> Result<()> {
    let score = |query: &[usize], codes: &[usize], dtype, centroids: &[usize]| {
        ops::score(&on.f32s(query), &on.zeros(codes, dtype), &on.f32s(centroids)).map(drop)
    };
    // The bad code is the very last one.
    let mut codes = vec![7u8; 20];
    codes[19] = 9;
    let nine = Tensor::from_vec(codes, (1, 2, 5, 2), on.device).unwrap();
    on.assert_errors(vec![
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
            ops::score(&on.f32s(&[1, 4, 1, 8]), &nine, &on.f32s(&[1, 2, 2, 8, 4])).map(drop),
            "score: codes: expected codes below n_centroids 8, got 9",
        ),
    ]);
    Ok(())
}

fn fast_scan(on: On) -> Result<()> {
    if !on.device.is_cpu() {
        return Ok(()); // an op of CPUs
    }
    let scan = |query: &[usize], packed: &[usize], dtype, n, centroids: &[usize]| {
        ops::fast_scan(&on.f32s(query), &on.zeros(packed, dtype), n, &on.f32s(centroids), 1).map(drop)
    };
    let (query, packed, byte, centroids): (&[usize], &[usize], _, &[usize]) =
        (&[1, 4, 1, 8], &[1, 2, 3, 1, 32], DType::U8, &[1, 2, 2, 16, 4]);
    // The bad code is the very last one.
    let mut codes = vec![7u8; 20];
    codes[19] = 16;
    let sixteen = Tensor::from_vec(codes.clone(), (1, 2, 5, 2), on.device).unwrap();
    codes[19] = 9;
    let nine = ops::pack_codes(&Tensor::from_vec(codes, (1, 2, 5, 2), on.device).unwrap()).unwrap();
    on.assert_errors(vec![
        (ops::pack_codes(&on.f32s(&[1, 2, 5, 2])).map(drop), "pack_codes: codes: expected dtype u8, got f32"),
        (
            ops::pack_codes(&on.zeros(&[2, 5, 2], byte)).map(drop),
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
            ops::fast_scan(&on.f32s(query), &nine, 5, &on.f32s(&[1, 2, 2, 8, 4]), 1).map(drop),
            "fast_scan: packed: expected codes below n_centroids 8, got 9",
        ),
    ]);
    Ok(())
}

fn selection(on: On) -> Result<()> {
    let geometry = |n| Geometry { n, sink: 1, window: 1, init_offset: 2 };
    let list =
        |heavy: &[u32], n| ops::indices_and_weights(&on.u32s(heavy, &[1, 1, heavy.len()]), geometry(n)).map(drop);
    let select = |query: &[usize], candidates, n| {
        let (codes, centroids) = (on.zeros(&[1, 2, candidates, 4], DType::U8), on.f32s(&[1, 2, 4, 16, 4]));
        let geometry = Geometry { n, sink: 1, window: 1, init_offset: 4 };
        ops::select_dense(&on.f32s(query), &codes, &centroids, 3, geometry).map(drop)
    };
    let selected = |index, len| Selected {
        indices: on.u32s(&[0, index], &[1, 1, 2]),
        lens: on.u32s(&[len], &[1, 1]),
        weights: on.f32s(&[1, 1, 2]).ones_like().unwrap(),
    };
    on.assert_errors(vec![
        (ops::topk(&on.zeros(&[2, 3], DType::F16), 1).map(drop), "topk: scores: expected dtype f32, got f16"),
        (ops::topk(&on.f32s(&[]), 1).map(drop), "topk: scores: expected [..., n], got []"),
        (ops::group_mass(&on.f32s(&[1, 4, 5]), 3, 1.0).map(drop), "group_mass: h_kv: expected a divisor of h 4, got 3"),
        (ops::group_mass(&on.f32s(&[1, 4, 5]), 0, 1.0).map(drop), "group_mass: h_kv: expected a divisor of h 4, got 0"),
        (
            ops::group_mass(&on.f32s(&[1, 4, 5]), 2, f32::NAN).map(drop),
            "group_mass: scale: expected a finite number, got NaN",
        ),
        (
            ops::group_mass(&on.f32s(&[1, 0, 5]), usize::MAX, 1.0).map(drop),
            "group_mass: h_kv: expected a divisor of h 0, got 18446744073709551615",
        ),
        (ops::group_mass(&on.f32s(&[4, 5]), 2, 1.0).map(drop), "group_mass: scores: expected [b, h, n], got [4, 5]"),
        (list(&[1, 8], 10), "indices_and_weights: heavy: expected positions below n 10, got 2 + 8"),
        (list(&[3, 3], 10), "indices_and_weights: heavy: expected ascending positions, got 3 after 3"),
        (
            ops::indices_and_weights(&on.f32s(&[1, 1, 2]), geometry(10)).map(drop),
            "indices_and_weights: heavy: expected dtype u32, got f32",
        ),
        (list(&[0], 0), "indices_and_weights: heavy: expected no positions for n 0, got 1 a list"),
        (
            ops::indices_and_weights(&on.zeros(&[1 << 40, 1, 0], DType::U32), Geometry { sink: 1 << 31, ..geometry(1 << 31) })
                .map(drop),
            "indices_and_weights: n: expected a result of less than 9223372036854775807 bytes, got [1099511627776, 1, 2147483648] numbers",
        ),
        (
            ops::dense_weights(&selected(2, 2), 1, usize::MAX).map(drop),
            "dense_weights: n: expected a result of less than 9223372036854775807 bytes, got [1, 1, 18446744073709551615] numbers",
        ),
        (
            ops::dense_weights(&Selected { indices: on.f32s(&[1, 1, 2]), ..selected(2, 2) }, 1, 9).map(drop),
            "dense_weights: indices: expected dtype u32, got f32",
        ),
        (
            ops::dense_weights(&Selected { lens: on.u32s(&[], &[1, 0]), indices: on.u32s(&[], &[1, 0, 2]), weights: on.f32s(&[1, 0, 2]) }, 1, 9).map(drop),
            "dense_weights: h: expected a multiple of 0 lists, got 1",
        ),
        (select(&[1, 4, 1, 16], 6, 9), "select: codes: expected at most the 9 keys (n) from init_offset 4 on, got 6"),
        (select(&[1, 3, 1, 16], 5, 9), "select: codes: expected an h_kv that divides h 3, got 2"),
        (select(&[1, 4, 16], 5, 9), "select: query: expected [b, h, 1, head_dim], got [1, 4, 16]"),
        (select(&[1, 4, 1, 16], 5, 1 << 33), "select: n: expected at most u32::MAX keys, got 8589934592"),
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
            ops::dense_weights(&Selected { lens: on.u32s(&[1, 1], &[1, 2]), ..selected(2, 2) }, 1, 9).map(drop),
            "dense_weights: lens: expected shape [1, 1], got [1, 2]",
        ),
    ]);
    Ok(())
}

fn attend(on: On) -> Result<()> {
    let selected = |indices: &[u32], lists: usize| {
        let l = indices.len() / lists;
        Selected {
            indices: on.u32s(indices, &[1, lists, l]),
            lens: Tensor::full(l as u32, (1, lists), on.device).unwrap(),
            weights: on.f32s(&[1, lists, l]).ones_like().unwrap(),
        }
    };
    let attend = |query: &[usize], keys: &[usize], values: &[usize], dtype, selected: &Selected, scale| {
        ops::sparse_attend(&on.f32s(query), &on.zeros(keys, dtype), &on.zeros(values, dtype), selected, scale).map(drop)
    };
    let (q, k, f) = (&[1, 4, 1, 8], &[1, 2, 5, 8], DType::F32);
    let good = selected(&[0, 1, 2, 3], 2);
    let softmax = |dims: &[usize], first, queries| ops::causal_softmax(&on.f32s(dims), first, queries, 1.0);
    on.assert_errors(vec![
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
            ops::dense_attend(&on.f32s(q), &on.f32s(k), &on.f32s(&[2, 5, 8]), 1.0).map(drop),
            "dense_attend: values: expected shape [1, 2, 5, 8], got [2, 5, 8]",
        ),
        (
            ops::dense_attend(&on.f32s(&[1, 0, 1, 8]), &on.f32s(k), &on.f32s(k), 1.0).map(drop),
            "dense_attend: keys: expected an h_kv that divides h 0, got 2",
        ),
        (
            ops::causal_softmax(&on.f32s(&[1, 1, 6, 9]).t().unwrap(), 0, 3, 1.0),
            "causal_softmax: scores: expected a contiguous tensor, got strides [54, 54, 1, 9]",
        ),
        (
            ops::causal_softmax(&on.f32s(&[6, 9]), 0, 3, 1.0),
            "causal_softmax: scores: expected [b, h_kv, group * queries, n], got [6, 9]",
        ),
        (
            ops::causal_softmax(&on.zeros(&[1, 1, 6, 9], DType::BF16), 0, 3, 1.0),
            "causal_softmax: scores: expected dtype f32, got bf16",
        ),
        (
            ops::causal_softmax(&on.f32s(&[1, 1, 6, 9]), 0, 3, f32::NAN),
            "causal_softmax: scale: expected a finite number, got NaN",
        ),
        (
            softmax(&[1, 1, 6, 9], usize::MAX, 3),
            "causal_softmax: first: expected at most 9 keys minus 3 queries, got 18446744073709551615",
        ),
        (softmax(&[1, 1, 6, 9], 6, 4), "causal_softmax: queries: expected a divisor of 6 rows, got 4"),
        (softmax(&[1, 1, 6, 9], 7, 3), "causal_softmax: first: expected at most 9 keys minus 3 queries, got 7"),
    ]);
    Ok(())
}

fn residual_score(on: On) -> Result<()> {
    let score = |coarse_codes: &[usize], dtype, coarse: &[usize]| {
        let (query, codes, centroids) =
            (on.f32s(&[1, 4, 1, 8]), on.zeros(&[1, 2, 5, 2], DType::U8), on.f32s(&[1, 2, 2, 4, 4]));
        ops::residual_score(&query, &codes, &centroids, &on.zeros(coarse_codes, dtype), &on.f32s(coarse)).map(drop)
    };
    let eight = Tensor::full(8u8, (1, 2, 5), on.device).unwrap();
    let (query, codes, centroids) =
        (on.f32s(&[1, 4, 1, 8]), on.zeros(&[1, 2, 5, 2], DType::U8), on.f32s(&[1, 2, 2, 4, 4]));
    let good: &[usize] = &[1, 2, 5];
    on.assert_errors(vec![
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
            ops::residual_score(&query, &codes, &centroids, &eight, &on.f32s(&[1, 2, 8, 8])).map(drop),
            "residual_score: coarse_codes: expected codes below n_centroids 8, got 8",
        ),
        (
            ops::residual_score(&query, &codes, &on.f32s(&[1, 2, 2, 4, 5]), &eight, &on.f32s(&[1, 2, 8, 8])).map(drop),
            "residual_score: centroids: expected shape [1, 2, 2, 4, 4], got [1, 2, 2, 4, 5]",
        ),
    ]);
    Ok(())
}

fn tail(on: On) -> Result<()> {
    let clusters = |dims: [usize; 4]| ClusterSums::empty(dims, on.device).unwrap();
    let good = || clusters([1, 2, 8, 6]);
    let sum = |values: &[usize], codes: &Tensor, before: &ClusterSums| {
        ops::cluster_sums(&on.f32s(values), codes, before).map(drop)
    };
    let selected = |lists| Selected {
        indices: on.u32s(&vec![1; lists], &[1, lists, 1]),
        lens: on.u32s(&vec![1; lists], &[1, lists]),
        weights: on.f32s(&[1, lists, 1]).ones_like().unwrap(),
    };
    let tail = |scores: &[usize], codes: &Tensor, clusters: &ClusterSums, lists, scale| {
        ops::tail_attend(&on.f32s(scores), codes, clusters, &selected(lists), 0, scale).map(drop)
    };
    let codes = on.zeros(&[1, 2, 5], DType::U8);
    let nine = Tensor::full(9u8, (1, 2, 5), on.device).unwrap();
    let (v, s) = (&[1, 2, 5, 6], &[1, 4, 5]);
    let attended = |out: &[usize], dtype, lse: &[usize]| Attended { out: on.zeros(out, dtype), lse: on.f32s(lse) };
    let merge = |a: Attended, b: Attended| a.merge(&b).map(drop);
    let some = || attended(&[1, 4, 1, 6], DType::F32, &[1, 4]);
    let with = |tail: Attended| {
        let (q, kv) = (on.f32s(&[1, 4, 1, 6]), on.f32s(&[1, 2, 5, 6]));
        ops::sparse_attend_with_tail(&q, &kv, &kv, &selected(2), &tail, 1.0).map(drop)
    };
    on.assert_errors(vec![
        (
            sum(v, &on.zeros(&[1, 2, 4], DType::U8), &good()),
            "cluster_sums: codes: expected shape [1, 2, 5], got [1, 2, 4]",
        ),
        (sum(v, &nine, &good()), "cluster_sums: codes: expected codes below n_centroids 8, got 9"),
        (sum(v, &codes, &clusters([1, 3, 8, 6])), "cluster_sums: sums: expected shape [1, 2, 8, 6], got [1, 3, 8, 6]"),
        (
            sum(v, &codes, &clusters([1, 2, 8, 7])),
            "cluster_sums: values: expected shape [1, 2, 5, 7], got [1, 2, 5, 6]",
        ),
        (
            ClusterSums::empty([usize::MAX, 2, 0, 6], on.device).map(drop),
            "ClusterSums: expected sums of less than 9223372036854775807 bytes, got [18446744073709551615, 2, 0, 6] numbers",
        ),
        (
            sum(&[1, 2, 5, 300], &codes, &clusters([1, 2, 8, 300])),
            "cluster_sums: sums: expected a head_dim of 1 to 256, got 300",
        ),
        (sum(v, &on.zeros(&[1, 2, 5], DType::U32), &good()), "cluster_sums: codes: expected dtype u8, got u32"),
        (sum(v, &codes, &clusters([1, 2, 300, 6])), "cluster_sums: sums: expected 1 to 256 clusters, got 300"),
        (
            sum(v, &codes, &ClusterSums { counts: on.f32s(&[1, 2, 8]), ..good() }),
            "cluster_sums: counts: expected dtype u32, got f32",
        ),
        (tail(&[4, 5], &codes, &good(), 4, 1.0), "tail_attend: scores: expected [b, h, n], got [4, 5]"),
        (tail(&[1, 4, 6], &codes, &good(), 4, 1.0), "tail_attend: codes: expected shape [1, 2, 6], got [1, 2, 5]"),
        (tail(&[1, 3, 5], &codes, &good(), 3, 1.0), "tail_attend: codes: expected an h_kv that divides h 3, got 2"),
        (tail(s, &nine, &good(), 4, 1.0), "tail_attend: codes: expected codes below n_centroids 8, got 9"),
        (
            tail(s, &codes, &ClusterSums { counts: on.zeros(&[1, 2, 9], DType::U32), ..good() }, 4, 1.0),
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
    Ok(())
}

fn kmeans(on: On) -> Result<()> {
    let kmeans = |n, pq_dim, pq_bits, max_keys| {
        let options = KmeansOptions { pq_dim, pq_bits, iters: 1, metric: Metric::Euclidean, max_keys, seed: 0 };
        ops::kmeans(&on.f32s(&[1, 2, n, 8]), &options).map(drop)
    };
    // Columns of 2: with phi, of pq_len 1.
    let with_coarse = |phi, coarse| Codebook::new(on.f32s(&[1, 2, 4, 16, 2]), phi)?.with_coarse(coarse).map(drop);
    let with_weights = |phi, weights, coarse: Option<Tensor>| {
        let weighted = Codebook::new(on.f32s(&[1, 2, 4, 16, 2]), phi)?.with_weights(weights)?;
        coarse.map(|coarse| weighted.with_coarse(coarse)).transpose().map(drop)
    };
    let train = |config: PqConfig, weights| {
        Codebook::train_weighted(&on.f32s(&[1, 2, 40, 8]), Some(&weights), &config).map(drop)
    };
    let full = |x: f32, d: usize| Tensor::full(x, (1, 2, d), on.device).expect("a tensor");
    on.assert_errors(vec![
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
            Codebook::train(&on.f32s(&[2, 40, 8]), &small()).map(drop),
            "Codebook: keys: expected [b, h_kv, n, head_dim], got [2, 40, 8]",
        ),
        (
            Codebook::train(&on.f32s(&[1, 2, 40, 9]), &small()).map(drop),
            "PqConfig: pq_dim: expected a divisor of head_dim 9, got 4",
        ),
        (
            Codebook::train(&on.f32s(&[1, 2, 0, 8]), &with_tail()).map(drop),
            "Codebook: keys: expected at least 32 (n_centroids, coarse), got 0",
        ),
        (
            Codebook::train_weighted(&on.zeros(&[1, 2, 40, 8], DType::F64), Some(&full(1.0, 8)), &small()).map(drop),
            "Codebook: keys: expected dtype f32, f16 or bf16, got f64",
        ),
        (
            Codebook::new(on.f32s(&[1, 2, 4, 3, 2]), None).map(drop),
            "Codebook: centroids: expected 2, 4, 8, ... or 256 centroids, got 3",
        ),
        (
            Codebook::new(on.zeros(&[1, 2, 4, 4, 2], DType::F16), None).map(drop),
            "Codebook: centroids: expected dtype f32, got f16",
        ),
        (
            Codebook::new(on.f32s(&[1, 2, 4, 16, 65]), None).map(drop),
            "Codebook: centroids: expected a head_dim (pq_dim times pq_len) of 1 to 256, got [1, 2, 4, 16, 65]",
        ),
        (
            Codebook::new(on.f32s(&[1, 2, 4]), None).map(drop),
            "Codebook: centroids: expected [b, h_kv, pq_dim, n_centroids, pq_len], got [1, 2, 4]",
        ),
        (
            Codebook::new(on.f32s(&[1, 2, 0, 16, 1]), None).map(drop),
            "Codebook: centroids: expected a pq_dim of at least 1, got [1, 2, 0, 16, 1]",
        ),
        (
            Codebook::new(on.f32s(&[1, 2, 4, 16, 1]), Some(on.f32s(&[1, 2, 4]))).map(drop),
            "Codebook: centroids: expected a pq_len of at least 1, got [1, 2, 4, 16, 1]",
        ),
        (
            Codebook::new(on.f32s(&[1, 2, 4, 16, 3]), Some(on.f32s(&[1, 2]))).map(drop),
            "Codebook: phi: expected [1, 2, 4] f32, got [1, 2] f32",
        ),
        (
            with_coarse(None, on.f32s(&[1, 2, 8, 7])),
            "Codebook: coarse: expected [1, 2, 2, 4, 8, ... or 256, 8], got [1, 2, 8, 7]",
        ),
        (
            with_coarse(None, on.f32s(&[1, 2, 9, 8])),
            "Codebook: coarse: expected [1, 2, 2, 4, 8, ... or 256, 8], got [1, 2, 9, 8]",
        ),
        (with_coarse(None, on.zeros(&[1, 2, 8, 8], DType::F16)), "Codebook: coarse: expected dtype f32, got f16"),
        (
            with_coarse(Some(on.f32s(&[1, 2, 4])), on.f32s(&[1, 2, 8, 4])),
            "Codebook: coarse: expected centroids of the Euclidean metric, got InnerProduct",
        ),
        (train(small(), on.f32s(&[1, 2, 4])), "Codebook: weights: expected [1, 2, 8] f32, got [1, 2, 4] f32"),
        (
            Codebook::new(on.f32s(&[1, 2, 4, 16, 2]), None)
                .and_then(|codebook| codebook.with_weights(full(1.0, 8)))
                .and_then(|codebook| codebook.encode(&on.f32s(&[1, 1, 5, 8])))
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
        (with_weights(None, on.f32s(&[1, 2, 4]), None), "Codebook: weights: expected [1, 2, 8] f32, got [1, 2, 4] f32"),
        (
            with_weights(None, on.zeros(&[1, 2, 8], DType::BF16), None),
            "Codebook: weights: expected [1, 2, 8] f32, got [1, 2, 8] bf16",
        ),
        (
            with_weights(Some(on.f32s(&[1, 2, 4])), full(1.0, 4), None),
            "Codebook: weights: expected centroids of the Euclidean metric, got InnerProduct",
        ),
        (with_weights(None, full(-1.0, 8), None), "Codebook: weights: expected positive finite numbers, got -1"),
        (with_weights(None, full(f32::NAN, 8), None), "Codebook: weights: expected positive finite numbers, got NaN"),
        (
            with_weights(None, full(f32::INFINITY, 8), None),
            "Codebook: weights: expected positive finite numbers, got inf",
        ),
        (
            with_weights(None, full(2.0, 8), Some(on.f32s(&[1, 2, 8, 8]))),
            "Codebook: coarse: expected a codebook that gets its weights afterwards, got one that has some",
        ),
    ]);
    Ok(())
}

fn config(on: On) -> Result<()> {
    let check = |config: PqConfig| config.validate(64);
    let base = PqConfig::default;
    let heavy = |text: &str| text.parse::<Heavy>().map(drop);
    on.assert_errors(vec![
        (base().validate(0), "PqConfig: head_dim: expected 1 to 256, got 0"),
        (base().validate(512), "PqConfig: head_dim: expected 1 to 256, got 512"),
        (check(PqConfig { pq_dim: 24, ..base() }), "PqConfig: pq_dim: expected a divisor of head_dim 64, got 24"),
        (check(PqConfig { pq_bits: 9, ..base() }), "PqConfig: pq_bits: expected 1 to 8, got 9"),
        (check(PqConfig { refresh: 0.0, ..base() }), "PqConfig: refresh: expected a finite share above 0, got 0"),
        (
            check(PqConfig { refresh: f64::INFINITY, ..base() }),
            "PqConfig: refresh: expected a finite share above 0, got inf",
        ),
        (
            check(PqConfig { refresh: f64::NAN, ..base() }),
            "PqConfig: refresh: expected a finite share above 0, got NaN",
        ),
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
    Ok(())
}

fn cache_and_attention(on: On) -> Result<()> {
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
    let mut cache = attn.new_cache([1, 2, 16], 0, DType::F32, on.device)?;
    let first = rng.tensor(&[1, 2, 100, 16], DType::F32).to_device(on.device)?;
    cache.append(&first, &first)?;
    cache.build_index()?;
    let state = |cache: &PqKvCache| -> Result<_> {
        Ok((numbers(&cache.keys()?), numbers(&cache.values()?), integers(&cache.codes()?), cache.len(), cache.memory()))
    };
    let before = state(&cache)?;

    let (q, kv) = (on.f32s(&[1, 4, 1, 16]), on.f32s(&[1, 2, 1, 16]));
    let wide = on.f32s(&[1, 2, 2, 16]);
    let mut forward = |q: &Tensor, k: &Tensor, v: &Tensor| attn.forward(q, k, v, &mut cache).map(drop);
    let table = vec![
        (
            forward(&on.f32s(&[1, 3, 1, 16]), &kv, &kv),
            "PqAttention: query: expected [1, a multiple of 2, s >= 1, 16], got [1, 3, 1, 16]",
        ),
        (
            forward(&on.f32s(&[1, 4, 0, 16]), &kv, &kv),
            "PqAttention: query: expected [1, a multiple of 2, s >= 1, 16], got [1, 4, 0, 16]",
        ),
        (forward(&q, &wide, &wide), "PqAttention: keys: expected s = 1 as the query, got 2"),
        (forward(&q, &kv, &wide), "PqKvCache: values: expected as many as keys (1), got 2"),
        (forward(&q, &on.f32s(&[1, 3, 1, 16]), &kv), "PqKvCache: keys: expected [1, 2, s, 16], got [1, 3, 1, 16]"),
        (forward(&q, &on.zeros(&[1, 2, 1, 16], DType::F16), &kv), "PqKvCache: keys: expected dtype f32, got f16"),
        (
            forward(&on.zeros(&[1, 4, 1, 16], DType::BF16), &kv, &kv),
            "PqAttention: query: expected dtype f32 as the cache, got bf16",
        ),
    ];
    on.assert_errors(table);
    assert_eq!(state(&cache)?, before);

    // Of blocks of 4 from position 4 on, 24 have codes; key 103 is the last of another.
    let mut cache = attn.new_cache([1, 2, 16], 200, DType::F32, on.device)?;
    cache.append(&first, &first)?;
    cache.advance(3)?;
    assert_eq!((cache.len(), cache.codebook().is_none()), (103, true), "without a codebook nothing is to be encoded");
    cache.truncate(100)?;
    cache.build_index()?;
    cache.append(&first.narrow(2, 0, 4)?, &first.narrow(2, 0, 4)?)?;
    let open = state(&cache)?;
    cache.advance(0)?;
    on.assert_errors(vec![
        (cache.advance(1), "PqKvCache: advance: expected codes up to key 104, got 100: call build_index first"),
        (cache.advance(97), "PqKvCache: advance: expected at most 96 steps for 104 keys of 200, got 97"),
    ]);
    assert_eq!(state(&cache)?, open);
    cache.build_index()?;
    cache.advance(5)?;
    assert_eq!((cache.len(), cache.codes()?.dim(2)?), (109, 104));
    cache.truncate(100)?;
    assert_eq!(state(&cache)?, before);

    let other = PqAttention::new(PqConfig { sink: 5, ..config.clone() }, 0.25)?;
    let error = other.forward(&q, &kv, &kv, &mut cache).expect_err("another config").to_string();
    assert!(error.starts_with("PqAttention: cache: expected one made with this attention's config, got PqConfig"));
    on.assert_errors(vec![
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
            cache.set_codebook(Codebook::new(on.f32s(&[1, 2, 4, 32, 4]), None)?),
            "PqKvCache: codebook: expected [b, h_kv, pq_dim, n_centroids] [1, 2, 4, 16] of pq_len 4, got [1, 2, 4, 32] of 4",
        ),
        (
            cache.set_codebook(Codebook::new(on.f32s(&[1, 2, 4, 16, 5]), Some(on.f32s(&[1, 2, 4])))?),
            "PqKvCache: codebook: expected metric Euclidean, got InnerProduct",
        ),
        (
            cache.set_codebook(Codebook::new(on.f32s(&[1, 2, 4, 16, 4]), None)?.with_coarse(on.f32s(&[1, 2, 8, 16]))?),
            "PqKvCache: codebook: expected 0 coarse clusters, got 8",
        ),
        (
            attn.new_cache([1 << 40, 1 << 40, 16], 0, DType::F32, on.device).map(drop),
            "PqKvCache: capacity: expected keys and values of less than 9223372036854775807 bytes, got 0 of [1099511627776, 1099511627776, 16]",
        ),
        (
            attn.new_cache([1, 2, 16], usize::MAX, DType::F32, on.device).map(drop),
            "PqKvCache: capacity: expected keys and values of less than 9223372036854775807 bytes, got 18446744073709551615 of [1, 2, 16]",
        ),
        (
            attn.new_cache([1, 2, 16], 100, DType::F16, on.device)?.set_max_bytes(16 << 10),
            "PqKvCache: max_bytes: expected at least 17920, which its capacity of 100 takes, got 16384",
        ),
        (attn.new_cache([0, 2, 16], 0, DType::F32, on.device).map(drop), "PqKvCache: expected at least one sequence and one KV head, got batch 0, h_kv 2"),
        (attn.new_cache([1, 2, 18], 0, DType::F32, on.device).map(drop), "PqConfig: pq_dim: expected a divisor of head_dim 18, got 4"),
        (attn.new_cache([1, 2, 16], 0, DType::F64, on.device).map(drop), "PqKvCache: dtype: expected f32, f16 or bf16, got f64"),
        (PqAttention::new(config, f32::NAN).map(drop), "PqAttention: scale: expected a positive finite number, got NaN"),
    ]);
    assert_eq!(state(&cache)?, before);
    Ok(())
}

/// All that a cache gives away.
fn state(cache: &PqKvCache) -> Result<impl PartialEq + std::fmt::Debug> {
    let (keys, values, codes) = (numbers(&cache.keys()?), numbers(&cache.values()?), integers(&cache.codes()?));
    let clusters = cache.clusters().map(|clusters| (numbers(&clusters.sums), integers(&clusters.counts)));
    let codebook = cache.codebook().map(|codebook| Ok::<_, candle_core::Error>(numbers(&codebook.centroids()?)));
    Ok((cache.len(), cache.capacity(), cache.memory(), keys, values, codes, clusters, codebook.transpose()?))
}

/// An attention, and a cache of 60 keys with an index.
fn with_index(on: On) -> Result<(PqAttention, PqKvCache)> {
    let attn = PqAttention::new(with_tail(), 0.25)?;
    let mut cache = attn.new_cache([1, 2, 16], 0, DType::F32, on.device)?;
    let mut rng = Rng(1);
    let [q, kv] = [4, 2].map(|heads| rng.tensor(&[1, heads, 60, 16], DType::F32).to_device(on.device));
    let kv = kv?;
    attn.forward(&q?, &kv, &kv, &mut cache)?;
    cache.build_index()?;
    Ok((attn, cache))
}

/// A cache that is full makes room only for what it can take.
fn full_cache(on: On) -> Result<()> {
    let (attn, mut cache) = with_index(on)?;
    let (q, kv) = (on.f32s(&[1, 4, 1, 16]), on.f32s(&[1, 2, 1, 16]));
    while cache.len() < cache.capacity() {
        attn.forward(&q, &kv, &kv, &mut cache)?;
    }
    let before = state(&cache)?;
    let mut forward = |k: &Tensor, v: &Tensor| attn.forward(&q, k, v, &mut cache).map(drop);
    on.assert_errors(vec![
        (forward(&on.f32s(&[2, 16]), &kv), "PqKvCache: keys: expected [1, 2, s, 16], got [2, 16]"),
        (forward(&on.f32s(&[16]), &kv), "PqKvCache: keys: expected [1, 2, s, 16], got [16]"),
        (forward(&on.f32s(&[1, 2, 1, 8]), &kv), "PqKvCache: keys: expected [1, 2, s, 16], got [1, 2, 1, 8]"),
        (forward(&kv, &on.f32s(&[2, 16])), "PqKvCache: values: expected [1, 2, s, 16], got [2, 16]"),
        (forward(&kv, &on.f32s(&[1, 2, 2, 16])), "PqKvCache: values: expected as many as keys (1), got 2"),
        (forward(&kv, &on.zeros(&[1, 2, 1, 16], DType::F16)), "PqKvCache: values: expected dtype f32, got f16"),
    ]);
    assert_eq!(state(&cache)?, before);
    let capacity = cache.capacity();
    attn.forward(&q, &kv, &kv, &mut cache)?;
    assert_eq!((cache.len(), cache.capacity() > capacity), (capacity + 1, true));
    Ok(())
}

fn prefill_and_budget(on: On) -> Result<()> {
    let (attn, mut cache) = with_index(on)?;
    let before = state(&cache)?;
    let (q, kv) = (on.f32s(&[1, 4, 2, 16]), on.f32s(&[1, 2, 2, 16]));
    let narrow = attn.clone().with_prefill(|q, _, _, _| q.narrow(3, 0, 8));
    let failing = attn.clone().with_prefill(|_, _, _, _| candle_core::bail!("mine: no memory"));
    on.assert_errors(vec![
        (
            narrow.forward(&q, &kv, &kv, &mut cache).map(drop),
            "PqAttention: prefill function: expected a result of ([1, 4, 2, 16], F32), got ([1, 4, 2, 8], F32)",
        ),
        (failing.forward(&q, &kv, &kv, &mut cache).map(drop), "mine: no memory"),
        (
            attn.forward_dense(&on.f32s(&[4, 2, 16]), &kv, &kv, &mut cache).map(drop),
            "PqAttention: query: expected [1, a multiple of 2, s >= 1, 16], got [4, 2, 16]",
        ),
        (
            attn.forward_dense(&q, &on.f32s(&[2, 2, 16]), &kv, &mut cache).map(drop),
            "PqKvCache: keys: expected [1, 2, s, 16], got [2, 2, 16]",
        ),
        (
            attn.forward_run(&on.f32s(&[1, 4, 0, 16]), &kv, &kv, &mut cache).map(drop),
            "PqAttention: query: expected [1, a multiple of 2, s >= 1, 16], got [1, 4, 0, 16]",
        ),
        (
            attn.forward_run(&q, &on.f32s(&[1, 2, 3, 16]), &kv, &mut cache).map(drop),
            "PqAttention: keys: expected s = 2 as the query, got 3",
        ),
        (
            attn.forward_run(&q, &kv, &on.f32s(&[1, 2, 3, 16]), &mut cache).map(drop),
            "PqKvCache: values: expected as many as keys (2), got 3",
        ),
        (
            attn.forward_run(&q, &kv, &on.f32s(&[2, 2, 16]), &mut cache).map(drop),
            "PqKvCache: values: expected [1, 2, s, 16], got [2, 2, 16]",
        ),
        (PqAttention::new(with_tail(), 0.0).map(drop), "PqAttention: scale: expected a positive finite number, got 0"),
        (
            PqAttention::new(with_tail(), -1.0).map(drop),
            "PqAttention: scale: expected a positive finite number, got -1",
        ),
        (cache.append(&kv, &on.f32s(&[1, 2, 3, 16])), "PqKvCache: values: expected as many as keys (2), got 3"),
        (cache.append(&kv, &on.zeros(&[1, 2, 2, 16], DType::U8)), "PqKvCache: values: expected dtype f32, got u8"),
    ]);
    assert_eq!(state(&cache)?, before);

    // Room for the 256 keys that there is room for, and no more.
    cache.set_max_bytes(86_000)?;
    let many = on.f32s(&[1, 2, 200, 16]);
    let queries = on.f32s(&[1, 4, 200, 16]);
    on.assert_errors(vec![
        (cache.append(&many, &many), "PqKvCache: max_bytes: expected 260 keys to take at most 86000 bytes, got 86048"),
        (
            attn.forward(&queries, &many, &many, &mut cache).map(drop),
            "PqKvCache: max_bytes: expected 260 keys to take at most 86000 bytes, got 86048",
        ),
        (cache.reserve(usize::MAX), "PqKvCache: max_bytes: expected 18446744073709551615 keys to take at most 86000 bytes, got 18446744073709551615"),
    ]);
    assert_eq!(state(&cache)?, before);
    Ok(())
}

fn pages(on: On) -> Result<()> {
    let config = PqConfig { pq_dim: 4, pq_bits: 4, coarse: 0, tail: Tail::None, ..PqConfig::default() };
    let new = |dims, pages, dtype| PagePool::new(config.clone(), dims, pages, dtype, on.device);
    let pool = new([1, 2, 16], 3, DType::F32)?;
    let other = PqConfig { sink: 5, ..config.clone() };
    let of_others = PqKvCache::new(other, [1, 2, 16], 0, DType::F32, on.device)?;
    let mut of_other_dims = PqKvCache::new(config.clone(), [1, 3, 16], 0, DType::F32, on.device)?;
    of_other_dims.append(&on.f32s(&[1, 3, 1, 16]), &on.f32s(&[1, 3, 1, 16]))?;
    let copy_of_others = pool.copy_of(&of_others).map(drop);
    let wanted = copy_of_others.as_ref().expect_err("another config").to_string();
    assert!(wanted.starts_with("PagePool: cache: expected one made with the pool's config, got PqConfig"), "{wanted}");

    let mut cache = pool.new_cache()?;
    let kv = on.f32s(&[1, 2, 300, 16]);
    cache.append(&kv.narrow(2, 0, 200)?, &kv.narrow(2, 0, 200)?)?;
    cache.build_index()?;
    let before = (numbers(&cache.keys()?), integers(&cache.codes()?), cache.len(), cache.capacity(), pool.free_pages());
    let mut fork = cache.fork()?;
    let appended = cache.append(&kv, &kv);
    let second = cache.fork().map(drop);
    on.assert_errors(vec![
        (
            new([1, 2, 16], 0, DType::F32).map(drop),
            "PagePool: pages: expected 1 or more with less than 2^31 elements of keys, got 0 of [1, 2, 16]",
        ),
        (
            new([1, 2, 16], 1 << 20, DType::F32).map(drop),
            "PagePool: pages: expected 1 or more with less than 2^31 elements of keys, got 1048576 of [1, 2, 16]",
        ),
        (
            new([1, 2, 16], usize::MAX / 8, DType::F32).map(drop),
            "PagePool: pages: expected 1 or more with less than 2^31 elements of keys, got 2305843009213693951 of [1, 2, 16]",
        ),
        (new([1, 2, 16], 1, DType::U8).map(drop), "PqKvCache: dtype: expected f32, f16 or bf16, got u8"),
        (
            new([1, 0, 16], 1, DType::F32).map(drop),
            "PqKvCache: expected at least one sequence and one KV head, got batch 1, h_kv 0",
        ),
        (pool.copy_of(&of_other_dims).map(drop), "PqKvCache: keys: expected [1, 2, s, 16], got [1, 3, 1, 16]"),
        (appended, "PagePool: expected 2 free pages, got 0 of 3"),
        (second, "PagePool: expected 1 free pages, got 0 of 3"),
        (cache.reserve(usize::MAX), "PagePool: expected 144115188075855870 free pages, got 0 of 3"),
    ]);
    let after = (numbers(&cache.keys()?), integers(&cache.codes()?), cache.len(), cache.capacity(), 1);
    assert_eq!(after, before);
    // The last page is the fork's copy of a part of one.
    assert_eq!((pool.free_pages(), fork.len()), (0, 200));
    fork.append(&kv.narrow(2, 0, 50)?, &kv.narrow(2, 0, 50)?)?;
    drop(fork);
    assert_eq!(pool.free_pages(), 1);
    cache.append(&kv.narrow(2, 0, 180)?, &kv.narrow(2, 0, 180)?)
}

fn packed(on: On) -> Result<()> {
    let (attn, mut cache) = with_index(on)?;
    let new = |attn: &PqAttention, b| attn.new_cache([b, 2, 16], 0, DType::F32, on.device);
    let (mut other, mut batch) = (new(&attn, 1)?, new(&attn, 2)?);
    let mut stranger = new(&PqAttention::new(small(), 0.25)?, 1)?;
    let before = state(&cache)?;
    let (q, kv) = (on.f32s(&[1, 4, 2, 16]), on.f32s(&[1, 2, 2, 16]));
    on.assert_errors(vec![
        (
            attn.forward_packed(&q, &kv, &kv, []).map(drop),
            "PqAttention: sequences: expected at least a position each, 2 in all as the query has, got []",
        ),
        (
            attn.forward_packed(&q, &kv, &kv, [(&mut cache, 1)]).map(drop),
            "PqAttention: sequences: expected at least a position each, 2 in all as the query has, got [1]",
        ),
        (
            attn.forward_packed(&q, &kv, &kv, [(&mut cache, 0), (&mut other, 2)]).map(drop),
            "PqAttention: sequences: expected at least a position each, 2 in all as the query has, got [0, 2]",
        ),
        (
            attn.forward_packed(&q, &kv, &kv, [(&mut cache, usize::MAX), (&mut other, 3)]).map(drop),
            "PqAttention: sequences: expected at least a position each, 2 in all as the query has, got \
             [18446744073709551615, 3]",
        ),
        (
            attn.forward_packed(&q, &kv, &kv, [(&mut cache, 1), (&mut batch, 1)]).map(drop),
            "PqAttention: sequences: expected caches of one sequence, got one of 2",
        ),
        (
            attn.forward_packed(&on.f32s(&[2, 4, 2, 16]), &kv, &kv, [(&mut cache, 2)]).map(drop),
            "PqAttention: query: expected [1, heads, s, head_dim] of one s, got [2, 4, 2, 16]",
        ),
        (
            attn.forward_packed(&q, &on.f32s(&[1, 2, 3, 16]), &kv, [(&mut cache, 2)]).map(drop),
            "PqAttention: keys: expected [1, heads, s, head_dim] of one s, got [1, 2, 3, 16]",
        ),
        (
            attn.forward_packed(&q, &kv, &on.f32s(&[2, 2, 16]), [(&mut cache, 2)]).map(drop),
            "PqAttention: values: expected [1, heads, s, head_dim] of one s, got [2, 2, 16]",
        ),
        (
            attn.forward_packed(&q, &on.f32s(&[1, 3, 2, 16]), &kv, [(&mut cache, 2)]).map(drop),
            "PqKvCache: keys: expected [1, 2, s, 16], got [1, 3, 2, 16]",
        ),
    ]);
    let error = attn.forward_packed(&q, &kv, &kv, [(&mut cache, 1), (&mut stranger, 1)]).expect_err("another config");
    assert!(first_line(&error).starts_with("PqAttention: cache: expected one made with this attention's config, got"));
    assert_eq!(state(&cache)?, before);
    assert_eq!((other.len(), batch.len(), stranger.len()), (0, 0, 0));
    Ok(())
}

fn drop_in(on: On) -> Result<()> {
    let attn = PqAttention::new(small(), 0.25)?;
    let (q, kv) = (on.f32s(&[1, 4, 3, 16]), on.f32s(&[1, 2, 3, 16]));
    let mut cache = KvCache::new(attn.clone(), 100);
    on.assert_errors(vec![
        (cache.append(&on.f32s(&[2, 3, 16]), &kv).map(drop), "KvCache: keys: expected [b, h_kv, s, head_dim], got [2, 3, 16]"),
        (cache.append(&on.f32s(&[1, 2, 3, 18]), &kv).map(drop), "PqConfig: pq_dim: expected a divisor of head_dim 18, got 4"),
        (cache.append(&on.zeros(&[1, 2, 3, 16], DType::U8), &kv).map(drop), "PqKvCache: dtype: expected f32, f16 or bf16, got u8"),
        (cache.append(&kv, &on.f32s(&[1, 2, 4, 16])).map(drop), "PqKvCache: values: expected as many as keys (3), got 4"),
        (
            cache.attend(&on.f32s(&[1, 3, 3, 16]), &kv, &kv).map(drop),
            "PqAttention: query: expected [1, a multiple of 2, s >= 1, 16], got [1, 3, 3, 16]",
        ),
        (
            KvCache::new(attn, usize::MAX).append(&kv, &kv).map(drop),
            "PqKvCache: capacity: expected keys and values of less than 9223372036854775807 bytes, got 18446744073709551615 of [1, 2, 16]",
        ),
    ]);
    // Not made by what failed.
    assert!(cache.inner().is_none() && cache.k()?.is_none() && cache.current_seq_len() == 0);
    cache.attend(&q, &kv, &kv)?;
    on.assert_errors(vec![
        (cache.append(&on.f32s(&[2, 3, 16]), &kv).map(drop), "PqKvCache: keys: expected [1, 2, s, 16], got [2, 3, 16]"),
        (
            cache.attend(&q, &kv, &on.f32s(&[1, 2, 2, 16])).map(drop),
            "PqKvCache: values: expected as many as keys (3), got 2",
        ),
    ]);
    assert_eq!(cache.current_seq_len(), 3);
    Ok(())
}

fn files(on: On) -> Result<()> {
    let directory = tempfile::tempdir()?;
    let (_, cache) = with_index(on)?;
    let before = state(&cache)?;
    let path = directory.path().join("file");
    let nowhere = directory.path().join("nowhere").join("file");
    let codebook = cache.codebook().expect("a codebook");
    let at = |op: &str, path: &std::path::Path, what: &str| format!("{op}: {}: {what}", path.display());
    let missing = "No such file or directory (os error 2)";
    let check = |result: Result<()>, expected: String| {
        let error = first_line(&result.expect_err(&expected));
        assert!(error.starts_with(&expected), "{error}, expected {expected}");
    };
    check(load_caches(&nowhere, 0, on.device).map(drop), at("load_caches", &nowhere, missing));
    check(Codebook::load(&nowhere, on.device).map(drop), at("Codebook", &nowhere, missing));
    check(save_caches(&nowhere, [&cache], ""), at("save_caches", &nowhere, missing));
    check(codebook.save(&nowhere), at("Codebook", &nowhere, "I/O error: "));
    // What was saved by the other.
    codebook.save(&path)?;
    let what = "expected a file of save_caches, with \"caches\" in its metadata; got another";
    check(load_caches(&path, 0, on.device).map(drop), at("load_caches", &path, what));
    save_caches(&path, [&cache], "")?;
    let what = "expected a tensor `centroids`, found none";
    check(Codebook::load(&path, on.device).map(drop), at("Codebook", &path, what));
    std::fs::write(&path, "of some other kind")?;
    check(Codebook::load(&path, on.device).map(drop), at("Codebook", &path, "header too large"));
    save_caches(&path, [&cache], "")?;
    let what = "PqKvCache: capacity: expected keys and values of less than 9223372036854775807 bytes, got";
    check(load_caches(&path, usize::MAX, on.device).map(drop), at("load_caches", &path, what));
    assert_eq!(state(&cache)?, before);
    Ok(())
}

fn graph(on: On) -> Result<()> {
    let (attn, mut cache) = with_index(on)?;
    let before = state(&cache)?;
    let token = on.u32s(&[7], &[1]);
    let (q, kv) = (on.f32s(&[1, 4, 1, 16]), on.f32s(&[1, 2, 1, 16]));
    let step = |caches: &mut [PqKvCache], forward: &dyn Fn(&mut [PqKvCache]) -> Result<Tensor>| {
        DecodeGraph::new(|_, _, caches| forward(caches)).step(&token, caches).map(drop)
    };
    let run = |caches: &mut [PqKvCache]| attn.forward(&q, &kv, &kv, &mut caches[0]);
    let empty = attn.new_cache([1, 2, 16], 0, DType::F32, on.device)?;
    on.assert_errors(vec![(step(&mut [], &run), "DecodeGraph: caches: expected at least one, got none")]);
    let mut caches = [cache, empty];
    on.assert_errors(vec![(
        step(&mut caches, &run),
        "DecodeGraph: caches: expected as many keys in each, got 60 in cache 0 and 0 in cache 1",
    )]);
    [cache, _] = caches;
    let caches = std::slice::from_mut(&mut cache);
    on.assert_errors(vec![
        (
            step(caches, &|_| token.copy()),
            "DecodeGraph: forward: expected it to append one key to each cache, which makes 61, got 60 in cache 0",
        ),
        (
            step(caches, &|caches| run(caches).and_then(|_| run(caches))),
            "DecodeGraph: forward: expected it to append one key to each cache, which makes 61, got 62 in cache 0",
        ),
        (step(caches, &|caches| run(caches).and_then(|_| candle_core::bail!("mine: no memory"))), "mine: no memory"),
    ]);
    assert_eq!(state(&cache)?, before);
    Ok(())
}
