//! One look-up serves all query heads of a group: a table entry holds a lane for each of them, so the sum over the
//! subspaces is one vector addition a code byte. Lane counts are powers of two; a group of three has an idle lane.
//! Clusters are one more subspace, as long as the key, whose table comes first.

use candle_core::{CpuStorage, Result};
use multiversion::multiversion;
use rayon::prelude::*;

use super::{Places, Plan, Score};
use crate::cpu::{check_codes, dispatch_float, held, slice, Elem};
use crate::ops::arg::View;

/// Keys a parallel task scores.
const KEYS_PER_TASK: usize = 2048;

/// Keys whose sums are kept while the tables pass: few enough that they stay in the first-level cache.
const KEYS_PER_BLOCK: usize = 256;

/// The most heads one table entry serves; larger groups take several passes over the codes.
const MAX_LANES: usize = 8;

/// Table entries of one subspace: as many as a byte can name, so that no look-up needs a bounds check.
pub(in crate::ops) type Table<const LANES: usize> = [[f32; LANES]; 256];

pub(super) fn run(op: &Score, query: &CpuStorage, codes: &CpuStorage, centroids: &CpuStorage) -> Result<Vec<f32>> {
    let Score { plan, coarse, places } = op;
    let check_codes = |name, view: &View<4>, codes: &[u8], n_centroids| match places {
        None => check_codes(plan.op, name, view, codes, n_centroids),
        Some(_) => Ok(()), // a cache's own
    };
    let pq = Quantizer {
        codes_view: &plan.codes,
        codes: slice(codes)?,
        centroids_view: &plan.centroids,
        centroids: slice(centroids)?,
    };
    check_codes("codes", &plan.codes, pq.codes, plan.centroids.dims[3])?;
    let (Some(coarse), Some(views)) = (coarse, &plan.coarse) else {
        return dispatch_float!(query, run_for(op, query, &[pq]));
    };
    let (codes, centroids) = (coarse.codes.storage_and_layout().0, coarse.centroids.storage_and_layout().0);
    let coarse = Quantizer {
        codes_view: &views.codes,
        codes: held(plan.op, "coarse_codes", &codes)?,
        centroids_view: &views.centroids,
        centroids: held(plan.op, "coarse_centroids", &centroids)?,
    };
    check_codes("coarse_codes", &views.codes, coarse.codes, views.centroids.dims[3])?;
    dispatch_float!(query, run_for(op, query, &[coarse, pq]))
}

/// Centroids, and the codes that name them.
struct Quantizer<'a> {
    codes_view: &'a View<4>,
    codes: &'a [u8],
    centroids_view: &'a View<5>,
    centroids: &'a [f32],
}

/// Sums the look-ups of all `quantizers`, in their order.
fn run_for<T: Elem>(op: &Score, query: &CpuStorage, quantizers: &[Quantizer]) -> Result<Vec<f32>> {
    let plan = &op.plan;
    let query = slice::<T>(query)?;
    let [b, h, ..] = plan.query.dims;
    let n = op.n();
    let mut scores = vec![0f32; b * h * n];
    if n == 0 {
        return Ok(scores);
    }
    let mut rows: Vec<&mut [f32]> = scores.chunks_mut(n).collect();
    rows.par_chunks_mut(plan.group).enumerate().for_each(|(pair, rows)| {
        for (part, rows) in rows.chunks_mut(MAX_LANES).enumerate() {
            let heads = Heads { pair, first: part * MAX_LANES };
            match rows.len() {
                1 => score_heads::<T, 1>(op, query, quantizers, heads, rows),
                2 => score_heads::<T, 2>(op, query, quantizers, heads, rows),
                3..=4 => score_heads::<T, 4>(op, query, quantizers, heads, rows),
                _ => score_heads::<T, 8>(op, query, quantizers, heads, rows),
            }
        }
    });
    Ok(scores)
}

/// Some query heads of one group: of the `pair`-th (batch, KV head), from the group's `first` head on.
#[derive(Clone, Copy)]
pub(in crate::ops) struct Heads {
    pub(in crate::ops) pair: usize,
    pub(in crate::ops) first: usize,
}

/// Scores all keys for up to `LANES` query heads; `rows` are their outputs.
fn score_heads<T: Elem, const LANES: usize>(
    op: &Score,
    query: &[T],
    quantizers: &[Quantizer],
    heads: Heads,
    rows: &mut [&mut [f32]],
) {
    let Plan { codes, query: query_view, group, .. } = &op.plan;
    let h_kv = codes.dims[1];
    let (b, kv) = (heads.pair / h_kv, heads.pair % h_kv);
    let query = Queries { view: query_view, numbers: query, group: *group };
    let tables = |quantizer: &Quantizer| {
        build_tables::<T, LANES>(&query, (quantizer.centroids_view, quantizer.centroids), heads, rows.len())
    };
    let tables: Vec<_> = quantizers.iter().map(|quantizer| (quantizer, tables(quantizer))).collect();
    // Split every row at the same keys, so that a task owns its keys' scores of all the heads.
    let mut parts: Vec<_> = rows.iter_mut().map(|row| row.chunks_mut(KEYS_PER_TASK)).collect();
    let tasks: Vec<Vec<&mut [f32]>> =
        std::iter::from_fn(|| parts.iter_mut().map(|part| part.next()).collect()).collect();
    tasks.into_par_iter().enumerate().for_each(|(task, mut rows)| {
        score_keys(&tables, op.places, [b, kv, task * KEYS_PER_TASK], &mut rows);
    });
}

/// Scores the keys of KV head `[b, kv]` from `first` on, as many as each of `rows` holds.
#[multiversion(targets = "simd")]
fn score_keys<const LANES: usize>(
    tables: &[(&Quantizer, Vec<Table<LANES>>)],
    places: Option<&Places>,
    [b, kv, first]: [usize; 3],
    rows: &mut [&mut [f32]],
) {
    let mut sums = [[0f32; LANES]; KEYS_PER_BLOCK];
    let count = rows[0].len();
    for start in (0..count).step_by(KEYS_PER_BLOCK) {
        let sums = &mut sums[..KEYS_PER_BLOCK.min(count - start)];
        sums.fill([0.0; LANES]);
        for (place, keys) in Places::runs(places, first + start, sums.len()) {
            let sums = &mut sums[keys];
            for (quantizer, tables) in tables {
                let codes = Codes::new(quantizer, [b, kv, place]);
                let (wide, rest) = tables.as_chunks::<16>();
                for (part, tables) in wide.iter().enumerate() {
                    pass(tables, codes.skip(16 * part), sums);
                }
                let mut codes = codes.skip(16 * wide.len());
                let (eight, rest) = rest.as_chunks::<8>();
                for tables in eight {
                    pass(tables, codes, sums);
                    codes = codes.skip(8);
                }
                for table in rest {
                    pass::<LANES, 1>(std::array::from_ref(table), codes, sums);
                    codes = codes.skip(1);
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

/// The codes of consecutive keys, from a subspace on.
#[derive(Clone, Copy)]
struct Codes<'a> {
    codes: &'a [u8],
    /// From a key to the next.
    stride: usize,
}

impl<'a> Codes<'a> {
    #[inline(always)]
    fn new(quantizer: &Quantizer<'a>, key: [usize; 3]) -> Self {
        Self { codes: &quantizer.codes[quantizer.codes_view.at(&key)..], stride: quantizer.codes_view.strides[2] }
    }

    #[inline(always)]
    fn skip(self, subspaces: usize) -> Self {
        Self { codes: &self.codes[subspaces..], ..self }
    }

    #[inline(always)]
    fn of<const N: usize>(self, key: usize) -> &'a [u8; N] {
        &self.codes[key * self.stride..].as_chunks().0[0]
    }
}

/// Adds the look-ups in `N` tables to the sums of consecutive keys, four at a time: their chains of additions overlap.
#[inline(always)]
fn pass<const LANES: usize, const N: usize>(tables: &[Table<LANES>; N], codes: Codes, sums: &mut [[f32; LANES]]) {
    let (fours, rest) = sums.as_chunks_mut::<4>();
    let first = 4 * fours.len();
    for (i, sums) in fours.iter_mut().enumerate() {
        look_up(tables, [0, 1, 2, 3].map(|key| codes.of(4 * i + key)), sums);
    }
    for (i, sums) in rest.iter_mut().enumerate() {
        look_up(tables, [codes.of(first + i)], std::array::from_mut(sums));
    }
}

#[inline(always)]
fn look_up<const LANES: usize, const N: usize, const KEYS: usize>(
    tables: &[Table<LANES>; N],
    codes: [&[u8; N]; KEYS],
    sums: &mut [[f32; LANES]; KEYS],
) {
    let mut acc = *sums;
    for (m, table) in tables.iter().enumerate() {
        for (sums, codes) in acc.iter_mut().zip(codes) {
            let entry = &table[usize::from(codes[m])];
            for l in 0..LANES {
                sums[l] += entry[l];
            }
        }
    }
    *sums = acc;
}

/// A checked `query` argument.
pub(in crate::ops) struct Queries<'a, T> {
    /// `[b, h, 1, head_dim]`
    pub(in crate::ops) view: &'a View<4>,
    pub(in crate::ops) numbers: &'a [T],
    pub(in crate::ops) group: usize,
}

/// `LUT[m][c]` of `count` heads, one a lane.
#[multiversion(targets = "simd")]
pub(in crate::ops) fn build_tables<T: Elem, const LANES: usize>(
    queries: &Queries<T>,
    (view, centroids): (&View<5>, &[f32]),
    heads: Heads,
    count: usize,
) -> Vec<Table<LANES>> {
    let [_, h_kv, pq_dim, n_centroids, pq_len] = view.dims;
    let (b, kv) = (heads.pair / h_kv, heads.pair % h_kv);
    let mut tables = vec![[[0f32; LANES]; 256]; pq_dim];
    // The queries coordinate by coordinate, so that all heads advance together.
    let head_dim = pq_dim * pq_len;
    let mut columns = vec![[0f32; LANES]; head_dim];
    let widened = &mut [0f32; super::MAX_HEAD_DIM][..head_dim];
    for lane in 0..count {
        let at = queries.view.at(&[b, kv * queries.group + heads.first + lane]);
        T::widen(&queries.numbers[at..at + head_dim], widened);
        for (coordinate, x) in columns.iter_mut().zip(&*widened) {
            coordinate[lane] = *x;
        }
    }
    for (m, (table, query)) in tables.iter_mut().zip(columns.chunks_exact(pq_len)).enumerate() {
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
