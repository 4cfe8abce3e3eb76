//! One pass that keeps a buffer of candidates above a rising threshold:
//! 1. Pass over blocks that have no score above the threshold, which in a long row are nearly all. Of the others, append
//!    every score above it, without a branch, until the buffer is full.
//! 2. Cut the buffer to its k best by quickselect; the worst of them is the new threshold. A later score equal to it
//!    cannot enter, since k candidates at lower positions are as good, so "above" is strict.
//!
//! On scores in random order only about `k (1 + ln(n / k))` are ever appended; in ascending order, the worst case,
//! each cut is paid for by the appends since the last.

use candle_core::{CpuStorage, Layout, Result};
use multiversion::multiversion;
use rayon::prelude::*;

use super::Plan;
use crate::cpu::slice;

/// Scores between two looks at the threshold and at how full the buffer is.
const BLOCK: usize = 32;

/// Room of the buffer beside that for 2 k candidates, so that a small k is not cut every few appends.
const ROOM: usize = 512;

pub(super) fn run(plan: &Plan, scores: &CpuStorage, layout: &Layout) -> Result<Vec<u32>> {
    let scores = slice::<f32>(scores)?;
    let (start, stride) = (layout.start_offset(), layout.stride()[0]);
    let mut positions = vec![0u32; plan.rows * plan.k];
    if plan.k > 0 {
        positions.par_chunks_mut(plan.k).enumerate().for_each(|(row, positions)| {
            let at = start + row * stride;
            select(&scores[at..at + plan.n], positions);
        });
    }
    Ok(positions)
}

/// Writes the positions of the `positions.len()` largest scores, ascending; there are as many scores, and one at least.
#[multiversion(targets = "simd")]
pub(in crate::ops) fn select(scores: &[f32], positions: &mut [u32]) {
    let k = positions.len();
    let mut buffer = vec![0u64; (2 * k + ROOM).min(scores.len() + BLOCK)];
    let (mut len, mut threshold, mut bar) = (0, -1, f32::NAN);
    for (block, scores) in scores.chunks(BLOCK).enumerate() {
        let mut above = above(scores, bar);
        if above == 0 {
            continue;
        }
        if len + BLOCK > buffer.len() {
            threshold = cut(&mut buffer[..len], k);
            bar = score(threshold as u32);
            len = k;
        }
        while above != 0 {
            let i = above.trailing_zeros() as usize;
            above &= above - 1;
            let rank = rank(scores[i]);
            // The position's complement makes the lower position the better one of equal ranks.
            buffer[len] = u64::from(rank) << 32 | u64::from(!((block * BLOCK + i) as u32));
            len += usize::from(i64::from(rank) > threshold);
        }
    }
    cut(&mut buffer[..len], k);
    for (position, candidate) in positions.iter_mut().zip(&buffer) {
        *position = !(*candidate as u32);
    }
    positions.sort_unstable();
}

/// Which scores may be above `bar`, a bit each: all of them where it is NaN.
#[inline(always)]
fn above(scores: &[f32], bar: f32) -> u32 {
    let mut bits = 0;
    for (i, x) in scores.iter().enumerate() {
        bits |= u32::from(*x > bar || bar.is_nan()) << i;
    }
    bits
}

/// Moves the `k` best candidates to the front; returns the rank of the worst of them.
fn cut(candidates: &mut [u64], k: usize) -> i64 {
    let (_, worst, _) = candidates.select_nth_unstable_by(k - 1, |a, b| b.cmp(a));
    (*worst >> 32) as i64
}

/// Orders as the scores do: NaN lowest, zeros of either sign equal.
#[inline(always)]
fn rank(x: f32) -> u32 {
    let bits = (x + 0.0).to_bits();
    let sign = ((bits as i32) >> 31) as u32;
    let ordered = bits ^ (sign | 0x8000_0000);
    if x.is_nan() {
        0
    } else {
        ordered
    }
}

/// The score of a rank.
fn score(rank: u32) -> f32 {
    match rank {
        0 => f32::NAN,
        1..0x8000_0000 => f32::from_bits(!rank),
        _ => f32::from_bits(rank ^ 0x8000_0000),
    }
}
