//! Split over the positions, then merged (as in Flash-Decoding):
//! 1. The positions of each list are cut into blocks. A block's keys are scored for all heads of the list, its largest
//!    score is the block's shift, and its values are summed with the weights `w e^{s - shift}`: a partial result of
//!    `(shift, Σ w e^{s - shift}, Σ w e^{s - shift} v)` a head.
//! 2. The partials of a head are brought to one shift and added, in the order of the blocks. A tail is the last of them.
//!
//! Blocks are cut by position, never by the number of threads.

use candle_core::{CpuStorage, Result};
use multiversion::multiversion;
use rayon::prelude::*;

use super::{place_of, Attend, Lists, Plan, Prefix, Selected, PAGE};
use crate::cpu::{dispatch_float, dot, exp, exp_and_sum, held, max, slice, Elem};
use crate::ops::arg::View;

/// Positions of a block, for a parallel task.
const BLOCK: usize = 256;

/// Rows of K or V that are gathered at a time, few enough to stay in the first-level cache.
const TILE: usize = 32;

pub(super) fn run(
    op: &Attend,
    query: &CpuStorage,
    keys: &CpuStorage,
    values: &CpuStorage,
) -> Result<(CpuStorage, Vec<f32>)> {
    dispatch_float!(query, run_for(op, query, keys, values))
}

fn run_for<T: Elem>(
    op: &Attend,
    query: &CpuStorage,
    keys: &CpuStorage,
    values: &CpuStorage,
) -> Result<(CpuStorage, Vec<f32>)> {
    let Attend { plan, prefix, pages, selected, tail, .. } = op;
    // One guard for both: they are views of one tensor, and a second read would wait for a writer who waits for the first.
    let storage = prefix.as_ref().map(|prefix| prefix.keys.storage_and_layout().0);
    let (prefix_keys, prefix_values) = match (prefix, &storage) {
        (Some(Prefix { views: [keys, values], .. }), Some(storage)) => {
            let data: &[T] = held(plan.op, "prefix", storage)?;
            (Some(Piece { data, view: keys }), Some(Piece { data, view: values }))
        }
        _ => (None, None),
    };
    let inputs = Inputs {
        plan,
        query: slice::<T>(query)?,
        keys: Rows { prefix: prefix_keys, own: Piece { data: slice(keys)?, view: &plan.keys }, pages: *pages },
        values: Rows { prefix: prefix_values, own: Piece { data: slice(values)?, view: &plan.values }, pages: *pages },
    };
    let [b, h, _, head_dim] = plan.query.dims;
    let heads = plan.heads_per_list();
    let blocks = match (&plan.lists, selected) {
        (Some(lists), Some(selected)) => listed_blocks(plan, lists, selected, inputs.keys.len())?,
        _ => all_blocks(plan),
    };
    let partials: Vec<Partial> = blocks.par_iter().map(|block| attend_block(&inputs, block, heads)).collect();

    let mut out = vec![T::zero(); b * h * head_dim];
    let mut lse = vec![f32::NEG_INFINITY; b * h];
    let tail = tail.as_ref().map(|tail| (tail.out.storage_and_layout().0, tail.lse.storage_and_layout().0));
    let tail = match (&plan.tail, &tail) {
        (Some(views), Some((out, lse))) => Some((views, held(plan.op, "tail", out)?, held(plan.op, "tail", lse)?)),
        _ => None,
    };
    for (row, (out, lse)) in out.chunks_exact_mut(head_dim).zip(&mut lse).enumerate() {
        // Blocks of one list follow each other.
        let (first_head, head) = (row - row % heads, row % heads);
        let start = blocks.partition_point(|block| block.first_head < first_head);
        let end = blocks.partition_point(|block| block.first_head <= first_head);
        let parts = partials[start..end].iter().map(|partial| partial.of_head(head, head_dim));
        // Without any weight it may hold anything, and is no part.
        let tail = tail.and_then(|((out_view, lse_view), out, lse)| {
            let shift: f32 = lse[lse_view.at(&[row / h, row % h])];
            let values: &[f32] = &out[out_view.at(&[row / h, row % h])..][..head_dim];
            (shift != f32::NEG_INFINITY).then_some(Part { shift, sum: 1.0, values })
        });
        *lse = merge(parts.chain(tail), out);
    }
    Ok((T::to_cpu_storage_owned(out), lse))
}

/// Positions that the heads from `first_head` on (counted over the whole batch) attend to, a part of their list.
struct Block {
    first_head: usize,
    positions: Positions,
}

enum Positions {
    Range(std::ops::Range<usize>),
    Listed { positions: Vec<u32>, weights: Vec<f32> },
}

/// What a block gives each of its heads.
struct Partial {
    shift: Vec<f32>,
    sum: Vec<f32>,
    /// `[heads, head_dim]`
    values: Vec<f32>,
}

/// A partial result of one head.
#[derive(Clone, Copy)]
struct Part<'a> {
    shift: f32,
    sum: f32,
    values: &'a [f32],
}

impl Partial {
    fn of_head(&self, head: usize, head_dim: usize) -> Part<'_> {
        let values = &self.values[head * head_dim..][..head_dim];
        Part { shift: self.shift[head], sum: self.sum[head], values }
    }
}

fn all_blocks(plan: &Plan) -> Vec<Block> {
    let ([b, h, ..], [_, h_kv, n, _]) = (plan.query.dims, plan.keys.dims);
    let ranges = |pair| {
        (0..n).step_by(BLOCK).map(move |start| Block {
            first_head: pair * (h / h_kv),
            positions: Positions::Range(start..n.min(start + BLOCK)),
        })
    };
    (0..b * h_kv).flat_map(ranges).collect()
}

fn listed_blocks(plan: &Plan, lists: &Lists, selected: &Selected, n: usize) -> Result<Vec<Block>> {
    let heads = plan.heads_per_list();
    let of_list = |(list, attended): (usize, Vec<(u32, f32)>)| {
        let block = |part: &[(u32, f32)]| {
            let (positions, weights) = part.iter().copied().unzip();
            Block { first_head: list * heads, positions: Positions::Listed { positions, weights } }
        };
        attended.chunks(BLOCK).map(block).collect::<Vec<_>>()
    };
    let attended = lists.attended(plan.op, selected, n)?;
    Ok(attended.into_iter().enumerate().flat_map(of_list).collect())
}

struct Inputs<'a, T> {
    plan: &'a Plan,
    query: &'a [T],
    keys: Rows<'a, T>,
    values: Rows<'a, T>,
}

/// Rows that lie in one tensor.
struct Piece<'a, T> {
    data: &'a [T],
    view: &'a View<4>,
}

/// Keys or values, in two pieces in a fork, or in pages.
struct Rows<'a, T> {
    prefix: Option<Piece<'a, T>>,
    own: Piece<'a, T>,
    pages: Option<&'a [u32]>,
}

impl<'a, T> Rows<'a, T> {
    fn len(&self) -> usize {
        self.shared() + self.pages.map_or(self.own.view.dims[2], |pages| pages.len() * PAGE)
    }

    fn shared(&self) -> usize {
        self.prefix.as_ref().map_or(0, |prefix| prefix.view.dims[2])
    }

    fn are_adjacent(&self) -> bool {
        self.prefix.is_none() && self.pages.is_none() && self.own.view.has_adjacent_rows()
    }

    /// The row of a position, and what follows it.
    #[inline(always)]
    fn at(&self, b: usize, kv: usize, position: usize) -> &'a [T] {
        let (piece, position) = match &self.prefix {
            Some(prefix) if position < prefix.view.dims[2] => (prefix, position),
            _ => (&self.own, position - self.shared()),
        };
        let position = self.pages.map_or(position, |pages| place_of(pages, position));
        &piece.data[piece.view.at(&[b, kv, position])..]
    }
}

#[multiversion(targets = "simd")]
fn attend_block<T: Elem>(inputs: &Inputs<T>, block: &Block, heads: usize) -> Partial {
    let [_, h, _, head_dim] = inputs.plan.query.dims;
    let group = h / inputs.plan.keys.dims[1];
    let (b, first) = (block.first_head / h, block.first_head % h);
    let kv = first / group;
    let query = inputs.widened_queries(b, first, heads);
    let position = |i: usize| match &block.positions {
        Positions::Range(range) => range.start + i,
        Positions::Listed { positions, .. } => positions[i] as usize,
    };
    let len = match &block.positions {
        Positions::Range(range) => range.len(),
        Positions::Listed { positions, .. } => positions.len(),
    };

    let (keys, values) = (&inputs.keys, &inputs.values);
    let in_range = matches!(block.positions, Positions::Range(_));
    let mut scores = vec![0f32; heads * len];
    let mut tile = vec![0f32; TILE * head_dim];
    for start in (0..len).step_by(TILE) {
        let count = TILE.min(len - start);
        let at = |i| keys.at(b, kv, position(start + i));
        let tile = rows(&mut tile, [count, head_dim], in_range && keys.are_adjacent(), at);
        for (query, scores) in query.chunks_exact(head_dim).zip(scores.chunks_exact_mut(len)) {
            for (score, key) in scores[start..start + count].iter_mut().zip(tile.chunks_exact(head_dim)) {
                *score = dot(query, key);
            }
        }
    }

    let mut partial = Partial { shift: vec![0.0; heads], sum: vec![0.0; heads], values: vec![0.0; heads * head_dim] };
    for (head, scores) in scores.chunks_exact_mut(len).enumerate() {
        // Scaled before the maximum is taken: the scale may be negative.
        scores.iter_mut().for_each(|score| *score *= inputs.plan.scale);
        partial.shift[head] = max(scores);
        partial.sum[head] = exp_and_sum(scores, 1.0, finite(partial.shift[head]));
        if let Positions::Listed { weights, .. } = &block.positions {
            scores.iter_mut().zip(weights).for_each(|(score, weight)| *score *= weight);
            partial.sum[head] = scores.iter().sum();
        }
    }

    for start in (0..len).step_by(TILE) {
        let count = TILE.min(len - start);
        let at = |i| values.at(b, kv, position(start + i));
        let tile = rows(&mut tile, [count, head_dim], in_range && values.are_adjacent(), at);
        for (scores, sums) in scores.chunks_exact(len).zip(partial.values.chunks_exact_mut(head_dim)) {
            add_weighted(tile, &scores[start..start + count], sums);
        }
    }
    partial
}

impl<T: Elem> Inputs<'_, T> {
    /// The queries of `heads` heads from `first` on, `[heads, head_dim]`.
    #[inline(always)]
    fn widened_queries(&self, b: usize, first: usize, heads: usize) -> Vec<f32> {
        let head_dim = self.plan.query.dims[3];
        let mut out = vec![0f32; heads * head_dim];
        for (i, row) in out.chunks_exact_mut(head_dim).enumerate() {
            let at = self.plan.query.at(&[b, first + i]);
            T::widen(&self.query[at..at + head_dim], row);
        }
        out
    }
}

/// `count` rows, the `i`-th at the start of `at(i)`, one after the other as f32: where they lie so already (`adjacent`), or
/// copied into the tile.
///
/// Copying is a step of its own, with nothing else to wait for, so it keeps many cache misses in flight: the rows of a
/// list are scattered over memory.
#[inline(always)]
fn rows<'a, T: Elem>(
    tile: &'a mut [f32],
    [count, head_dim]: [usize; 2],
    adjacent: bool,
    at: impl Fn(usize) -> &'a [T],
) -> &'a [f32] {
    if let (true, Some(rows)) = (adjacent, T::as_f32(at(0))) {
        return &rows[..count * head_dim];
    }
    for (i, row) in tile.chunks_exact_mut(head_dim).take(count).enumerate() {
        T::widen(&at(i)[..head_dim], row);
    }
    &tile[..count * head_dim]
}

/// `sums += Σ_i weights[i] rows[i]`, with `rows` as long as `sums`.
#[inline(always)]
fn add_weighted(rows: &[f32], weights: &[f32], sums: &mut [f32]) {
    const LANES: usize = 64;
    let head_dim = sums.len();
    let (chunks, tail) = sums.as_chunks_mut::<LANES>();
    let tail_start = head_dim - tail.len();
    // A chunk of the sums stays in registers while all rows pass.
    for (c, sums) in chunks.iter_mut().enumerate() {
        let mut acc = *sums;
        for (row, weight) in rows.chunks_exact(head_dim).zip(weights) {
            let Some(row) = row[c * LANES..].first_chunk::<LANES>() else { continue };
            for l in 0..LANES {
                acc[l] += weight * row[l];
            }
        }
        *sums = acc;
    }
    for (row, weight) in rows.chunks_exact(head_dim).zip(weights) {
        for (sum, x) in tail.iter_mut().zip(&row[tail_start..]) {
            *sum += weight * x;
        }
    }
}

/// Merges the parts of one head into `out`; returns the LSE.
fn merge<'a, T: Elem>(parts: impl Iterator<Item = Part<'a>> + Clone, out: &mut [T]) -> f32 {
    let shift = parts.clone().map(|part| part.shift).fold(f32::NEG_INFINITY, f32::max);
    let mut sum = 0f32;
    let mut values = vec![0f32; out.len()];
    for part in parts {
        let factor = exp(part.shift - finite(shift));
        sum += factor * part.sum;
        for (value, x) in values.iter_mut().zip(part.values) {
            *value += factor * x;
        }
    }
    if sum == 0.0 {
        return f32::NEG_INFINITY; // nothing attended, or only scores of negative infinity: zeros
    }
    for (out, value) in out.iter_mut().zip(&values) {
        *out = T::narrow(value / sum);
    }
    finite(shift) + sum.ln()
}

/// A shift to subtract: scores that are all negative infinity must not become NaN.
#[inline(always)]
fn finite(shift: f32) -> f32 {
    if shift == f32::NEG_INFINITY {
        0.0
    } else {
        shift
    }
}
