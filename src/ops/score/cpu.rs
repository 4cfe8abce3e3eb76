//! One look-up serves all query heads of a group: a table entry holds a lane for each of them, so the sum over the
//! subspaces is one vector addition a code byte. Lane counts are powers of two; a group of three has an idle lane.
//! Clusters are one more subspace, as long as the key, whose table comes first.

use candle_core::{CpuStorage, Result};
use multiversion::multiversion;
use rayon::prelude::*;

use super::{Coarse, Plan};
use crate::cpu::{check_codes, dispatch_float, held, slice, Elem};
use crate::ops::arg::View;

/// Keys a parallel task scores.
const KEYS_PER_TASK: usize = 2048;

/// Keys whose sums are kept while the tables pass, and tables in a pass: few enough that both stay in the first-level
/// cache, which all the tables of 16 subspaces would not.
const KEYS_PER_BLOCK: usize = 256;
const TABLES_PER_PASS: usize = 8;

/// The most heads one table entry serves; larger groups take several passes over the codes.
const MAX_LANES: usize = 8;

/// Table entries of one subspace: as many as a byte can name, so that no look-up needs a bounds check.
type Table<const LANES: usize> = [[f32; LANES]; 256];

pub(super) fn run(
    plan: &Plan,
    coarse: Option<&Coarse>,
    query: &CpuStorage,
    codes: &CpuStorage,
    centroids: &CpuStorage,
) -> Result<Vec<f32>> {
    let pq = Quantizer {
        codes_view: &plan.codes,
        codes: slice(codes)?,
        centroids_view: &plan.centroids,
        centroids: slice(centroids)?,
    };
    check_codes(plan.op, "codes", &plan.codes, pq.codes, plan.centroids.dims[3])?;
    let (Some(coarse), Some(views)) = (coarse, &plan.coarse) else {
        return dispatch_float!(query, run_for(plan, query, &[pq]));
    };
    let (codes, centroids) = (coarse.codes.storage_and_layout().0, coarse.centroids.storage_and_layout().0);
    let coarse = Quantizer {
        codes_view: &views.codes,
        codes: held(plan.op, "coarse_codes", &codes)?,
        centroids_view: &views.centroids,
        centroids: held(plan.op, "coarse_centroids", &centroids)?,
    };
    check_codes(plan.op, "coarse_codes", &views.codes, coarse.codes, views.centroids.dims[3])?;
    dispatch_float!(query, run_for(plan, query, &[coarse, pq]))
}

/// Centroids, and the codes that name them.
struct Quantizer<'a> {
    codes_view: &'a View<4>,
    codes: &'a [u8],
    centroids_view: &'a View<5>,
    centroids: &'a [f32],
}

/// Sums the look-ups of all `quantizers`, in their order.
fn run_for<T: Elem>(plan: &Plan, query: &CpuStorage, quantizers: &[Quantizer]) -> Result<Vec<f32>> {
    let query = slice::<T>(query)?;
    let [b, h, ..] = plan.query.dims;
    let n = plan.codes.dims[2];
    let mut scores = vec![0f32; b * h * n];
    if n == 0 {
        return Ok(scores);
    }
    let mut rows: Vec<&mut [f32]> = scores.chunks_mut(n).collect();
    rows.par_chunks_mut(plan.group).enumerate().for_each(|(pair, rows)| {
        for (part, rows) in rows.chunks_mut(MAX_LANES).enumerate() {
            let heads = Heads { pair, first: part * MAX_LANES };
            match rows.len() {
                1 => score_heads::<T, 1>(plan, query, quantizers, heads, rows),
                2 => score_heads::<T, 2>(plan, query, quantizers, heads, rows),
                3..=4 => score_heads::<T, 4>(plan, query, quantizers, heads, rows),
                _ => score_heads::<T, 8>(plan, query, quantizers, heads, rows),
            }
        }
    });
    Ok(scores)
}

/// Some query heads of one group: of the `pair`-th (batch, KV head), from the group's `first` head on.
#[derive(Clone, Copy)]
struct Heads {
    pair: usize,
    first: usize,
}

/// Scores all keys for up to `LANES` query heads; `rows` are their outputs.
fn score_heads<T: Elem, const LANES: usize>(
    plan: &Plan,
    query: &[T],
    quantizers: &[Quantizer],
    heads: Heads,
    rows: &mut [&mut [f32]],
) {
    let h_kv = plan.codes.dims[1];
    let (b, kv) = (heads.pair / h_kv, heads.pair % h_kv);
    let tables = |quantizer| build_tables::<T, LANES>(plan, query, quantizer, heads, rows.len());
    let tables: Vec<_> = quantizers.iter().map(|quantizer| (quantizer, tables(quantizer))).collect();
    // Split every row at the same keys, so that a task owns its keys' scores of all the heads.
    let mut parts: Vec<_> = rows.iter_mut().map(|row| row.chunks_mut(KEYS_PER_TASK)).collect();
    let tasks: Vec<Vec<&mut [f32]>> =
        std::iter::from_fn(|| parts.iter_mut().map(|part| part.next()).collect()).collect();
    tasks.into_par_iter().enumerate().for_each(|(task, mut rows)| {
        score_keys(&tables, [b, kv, task * KEYS_PER_TASK], &mut rows);
    });
}

/// Scores the keys of KV head `[b, kv]` from `first` on, as many as each of `rows` holds.
#[multiversion(targets = "simd")]
fn score_keys<const LANES: usize>(
    tables: &[(&Quantizer, Vec<Table<LANES>>)],
    [b, kv, first]: [usize; 3],
    rows: &mut [&mut [f32]],
) {
    let mut sums = [[0f32; LANES]; KEYS_PER_BLOCK];
    let count = rows[0].len();
    for start in (0..count).step_by(KEYS_PER_BLOCK) {
        let sums = &mut sums[..KEYS_PER_BLOCK.min(count - start)];
        sums.fill([0.0; LANES]);
        for (quantizer, tables) in tables {
            for (part, tables) in tables.chunks(TABLES_PER_PASS).enumerate() {
                for (i, sums) in sums.iter_mut().enumerate() {
                    let at = quantizer.codes_view.at(&[b, kv, first + start + i]) + part * TABLES_PER_PASS;
                    *sums = look_up(tables, &quantizer.codes[at..at + tables.len()], *sums);
                }
            }
        }
        for (lane, row) in rows.iter_mut().enumerate() {
            for (score, sums) in row[start..].iter_mut().zip(&*sums) {
                *score = sums[lane];
            }
        }
    }
}

#[inline(always)]
fn look_up<const LANES: usize>(tables: &[Table<LANES>], codes: &[u8], mut sums: [f32; LANES]) -> [f32; LANES] {
    for (table, &code) in tables.iter().zip(codes) {
        let entry = table[usize::from(code)];
        for l in 0..LANES {
            sums[l] += entry[l];
        }
    }
    sums
}

/// `LUT[m][c]` of `count` heads, one a lane.
#[multiversion(targets = "simd")]
fn build_tables<T: Elem, const LANES: usize>(
    plan: &Plan,
    query: &[T],
    quantizer: &Quantizer,
    heads: Heads,
    count: usize,
) -> Vec<Table<LANES>> {
    let Quantizer { centroids_view: view, centroids, .. } = quantizer;
    let [_, h_kv, pq_dim, n_centroids, pq_len] = view.dims;
    let (b, kv) = (heads.pair / h_kv, heads.pair % h_kv);
    let mut tables = vec![[[0f32; LANES]; 256]; pq_dim];
    // The queries coordinate by coordinate, so that all heads advance together.
    let head_dim = pq_dim * pq_len;
    let mut queries = vec![[0f32; LANES]; head_dim];
    let widened = &mut [0f32; super::MAX_HEAD_DIM][..head_dim];
    for lane in 0..count {
        let at = plan.query.at(&[b, kv * plan.group + heads.first + lane]);
        T::widen(&query[at..at + head_dim], widened);
        for (coordinate, x) in queries.iter_mut().zip(&*widened) {
            coordinate[lane] = *x;
        }
    }
    for (m, (table, query)) in tables.iter_mut().zip(queries.chunks_exact(pq_len)).enumerate() {
        for (c, entry) in table.iter_mut().take(n_centroids).enumerate() {
            let centroid = &centroids[view.at(&[b, kv, m, c])..][..pq_len];
            let mut sums = [0f32; LANES];
            for (coordinate, x) in query.iter().zip(centroid) {
                for l in 0..LANES {
                    sums[l] += coordinate[l] * x;
                }
            }
            *entry = sums;
        }
    }
    tables
}
