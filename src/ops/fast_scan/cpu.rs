//! For one query head:
//! 1. Scan: the rounded sum of every key.
//! 2. A bound that k keys reach, from the sums' largest in groups; what may come near it is kept.
//! 3. Of these, keys whose sum is above the band around the k-th largest are among the k best for sure. Those within it
//!    are scored exactly, and the best of them complete the k. Where the tables cannot be rounded, all keys are scored.

use candle_core::{bail, CpuStorage, Result};
use multiversion::multiversion;
use rayon::prelude::*;

use super::tables::{Rounded, Table};
use super::{simd, Plan, BLOCK, MAX_CENTROIDS, OP};
use crate::cpu::{dispatch_float, slice, Elem};
use crate::ops::arg::View;
use crate::ops::score::cpu::{build_tables, Heads, Queries};
use crate::ops::topk;

/// Keys of a group, of which only the largest sum counts for the first bound.
const GROUP: usize = 8;

pub(super) fn pack(view: &View<4>, codes: &CpuStorage) -> Result<Vec<u8>> {
    let codes = slice::<u8>(codes)?;
    let [b, h_kv, n, pq_dim] = view.dims;
    let (blocks, rows) = (n.div_ceil(BLOCK), pq_dim.div_ceil(2));
    let mut packed = vec![0u8; b * h_kv * blocks * rows * BLOCK];
    let largest = packed.par_chunks_mut((rows * BLOCK).max(1)).enumerate().map(|(i, packed)| {
        let (pair, first) = (i / blocks, i % blocks * BLOCK);
        let mut largest = 0;
        for key in first..n.min(first + BLOCK) {
            let codes = &codes[view.at(&[pair / h_kv, pair % h_kv, key])..][..pq_dim];
            for (m, &code) in codes.iter().enumerate() {
                packed[m / 2 * BLOCK + key - first] |= code << (m % 2 * 4);
                largest = largest.max(code);
            }
        }
        largest
    });
    match largest.max() {
        Some(code) if usize::from(code) >= MAX_CENTROIDS => {
            bail!("pack_codes: codes: expected codes below {MAX_CENTROIDS}, got {code}")
        }
        _ => Ok(packed),
    }
}

pub(super) fn run(plan: &Plan, query: &CpuStorage, packed: &CpuStorage, centroids: &CpuStorage) -> Result<Vec<u32>> {
    let (packed, centroids) = (slice(packed)?, slice(centroids)?);
    check_packed(plan, packed)?;
    dispatch_float!(query, run_for(plan, query, packed, centroids))
}

/// Fails if a code is not below the number of centroids; of 16 every half byte is.
fn check_packed(plan: &Plan, packed: &[u8]) -> Result<()> {
    let n_centroids = plan.centroids.dims[3];
    if n_centroids == MAX_CENTROIDS {
        return Ok(());
    }
    let heads = plan.packed.dims[0] * plan.packed.dims[1];
    let largest = (0..heads).into_par_iter().map(|pair| largest(head(plan, packed, pair)));
    match largest.max() {
        Some(code) if usize::from(code) >= n_centroids => {
            bail!("{OP}: packed: expected codes below n_centroids {n_centroids}, got {code}")
        }
        _ => Ok(()),
    }
}

#[multiversion(targets = "simd")]
fn largest(packed: &[u8]) -> u8 {
    packed.iter().fold(0, |largest, codes| largest.max(codes & 15).max(codes >> 4))
}

/// The blocks of the `pair`-th (batch, KV head).
fn head<'a>(plan: &Plan, packed: &'a [u8], pair: usize) -> &'a [u8] {
    let [_, h_kv, blocks, rows, _] = plan.packed.dims;
    &packed[plan.packed.at(&[pair / h_kv, pair % h_kv])..][..blocks * rows * BLOCK]
}

fn run_for<T: Elem>(plan: &Plan, query: &CpuStorage, packed: &[u8], centroids: &[f32]) -> Result<Vec<u32>> {
    let query = Queries { view: &plan.query, numbers: slice::<T>(query)?, group: plan.group };
    let [b, h, ..] = plan.query.dims;
    let mut positions = vec![0u32; b * h * plan.k];
    if plan.k > 0 {
        positions.par_chunks_mut(plan.k).enumerate().for_each(|(row, positions)| {
            let heads = Heads { pair: row / plan.group, first: row % plan.group };
            let tables = build_tables::<T, 1>(&query, (&plan.centroids, centroids), heads, 1);
            let tables: Vec<Table> = tables.iter().map(|table| std::array::from_fn(|c| table[c][0])).collect();
            Scan { tables: &tables, packed: head(plan, packed, heads.pair), n: plan.n }.select(positions);
        });
    }
    Ok(positions)
}

/// A query head's search.
struct Scan<'a> {
    tables: &'a [Table],
    packed: &'a [u8],
    n: usize,
}

impl Scan<'_> {
    fn select(&self, positions: &mut [u32]) {
        let k = positions.len();
        let (sure, unsure) = match Rounded::new(self.tables) {
            Some(rounded) => self.narrow(&rounded, k),
            None => (vec![], (0..self.n as u32).collect()),
        };
        let (first, rest) = positions.split_at_mut(sure.len());
        first.copy_from_slice(&sure);
        if !rest.is_empty() {
            let scores: Vec<f32> = unsure.iter().map(|&position| self.score(position as usize)).collect();
            topk::cpu::select(&scores, rest);
            rest.iter_mut().for_each(|position| *position = unsure[*position as usize]);
        }
        positions.sort(); // two ascending runs
    }

    /// Keys that are among the k best for sure, fewer than k or all of them, and keys of which the others are; both
    /// ascending.
    fn narrow(&self, rounded: &Rounded, k: usize) -> (Vec<u32>, Vec<u32>) {
        let mut sums = vec![[0u16; BLOCK]; self.n.div_ceil(BLOCK)];
        simd::scan(self.packed, rounded, &mut sums);
        let sums = &sums.as_flattened()[..self.n];
        let bound = lower_bound(sums, k).saturating_sub(rounded.band);
        let kept = simd::reach(sums, bound);
        if kept.len() == k {
            return (kept, vec![]);
        }
        let of: Vec<u16> = kept.iter().map(|&position| sums[position as usize]).collect();
        let above = kth_largest(&of, k + 1).saturating_add(rounded.band);
        let least = kth_largest(&of, k).saturating_sub(rounded.band);
        // Without a branch, which would be taken by chance.
        let (mut sure, mut near) = (vec![0; kept.len()], vec![0; kept.len()]);
        let (mut sure_len, mut near_len) = (0, 0);
        for (position, sum) in kept.into_iter().zip(of) {
            sure[sure_len] = position;
            near[near_len] = position;
            sure_len += usize::from(sum > above);
            near_len += usize::from(sum >= least && sum <= above);
        }
        sure.truncate(sure_len);
        near.truncate(near_len);
        (sure, near)
    }

    /// As `score` computes it.
    #[inline(always)]
    fn score(&self, position: usize) -> f32 {
        let rows = self.tables.len().div_ceil(2);
        let block = &self.packed[position / BLOCK * rows * BLOCK..][..rows * BLOCK];
        let mut sum = 0.0;
        for (tables, codes) in self.tables.chunks(2).zip(block.chunks_exact(BLOCK)) {
            let codes = codes[position % BLOCK];
            for (table, code) in tables.iter().zip([codes & 15, codes >> 4]) {
                sum += table[usize::from(code)];
            }
        }
        sum
    }
}

/// A sum that at least `k` keys reach, close to the k-th largest: the k-th largest of the groups' largest.
#[multiversion(targets = "simd")]
fn lower_bound(sums: &[u16], k: usize) -> u16 {
    let (chunks, _) = sums.as_chunks::<{ GROUP * BLOCK }>();
    let mut largest = vec![[0; BLOCK]; chunks.len()];
    for (largest, chunk) in largest.iter_mut().zip(chunks) {
        for sums in chunk.as_chunks::<BLOCK>().0 {
            for l in 0..BLOCK {
                largest[l] = largest[l].max(sums[l]);
            }
        }
    }
    // Larger groups, as long as few of the k best are likely to share one.
    let (mut largest, mut len) = (largest.into_flattened(), chunks.len() * BLOCK);
    while len >= 16 * k {
        len /= 2;
        let (a, b) = largest.split_at_mut(len);
        for (a, b) in a.iter_mut().zip(b) {
            *a = (*a).max(*b);
        }
    }
    kth_largest(&largest[..len], k)
}

/// The k-th largest number, a bit at a time; 0 of fewer.
#[multiversion(targets = "simd")]
fn kth_largest(numbers: &[u16], k: usize) -> u16 {
    let mut found = 0;
    for bit in (0..16).rev() {
        let candidate = found | 1 << bit;
        if count(numbers, candidate) >= k {
            found = candidate;
        }
    }
    found
}

/// How many numbers are `bound` or more.
#[inline(always)]
fn count(numbers: &[u16], bound: u16) -> usize {
    let mut total = 0;
    for numbers in numbers.chunks(1 << 15) {
        let mut count = 0u16; // as wide as the numbers, so that it counts as many at a time
        for x in numbers {
            count += u16::from(*x >= bound);
        }
        total += usize::from(count);
    }
    total
}
