//! Split over the positions, then merged (as in Flash-Decoding):
//! 1. The positions of each list are cut into blocks. A block's keys are scored for all heads of the list, its largest
//!    score is the block's shift, and its values are summed with the weights `w e^{s - shift}`: a partial result of
//!    `(shift, Σ w e^{s - shift}, Σ w e^{s - shift} v)` a head.
//! 2. The partials of a head are brought to one shift and added, in the order of the blocks.
//!
//! Blocks are cut by position, never by the number of threads.

use candle_core::{bail, CpuStorage, Result, Storage};
use multiversion::multiversion;
use rayon::prelude::*;

use super::{Lists, Plan, Selected};
use crate::cpu::{dispatch_float, dot, exp, exp_and_sum, max, slice, Elem};
use crate::ops::indices_and_weights::ListStorages;

/// Positions of a block, for a parallel task.
const BLOCK: usize = 256;

/// Rows of K or V that are gathered at a time, few enough to stay in the first-level cache.
const TILE: usize = 32;

pub(super) fn run(
    plan: &Plan,
    selected: Option<&Selected>,
    query: &CpuStorage,
    keys: &CpuStorage,
    values: &CpuStorage,
) -> Result<(CpuStorage, Vec<f32>)> {
    dispatch_float!(query, run_for(plan, selected, query, keys, values))
}

fn run_for<T: Elem>(
    plan: &Plan,
    selected: Option<&Selected>,
    query: &CpuStorage,
    keys: &CpuStorage,
    values: &CpuStorage,
) -> Result<(CpuStorage, Vec<f32>)> {
    let inputs = Inputs { plan, query: slice::<T>(query)?, keys: slice::<T>(keys)?, values: slice::<T>(values)? };
    let [b, h, _, head_dim] = plan.query.dims;
    let heads = plan.heads_per_list();
    let blocks = match (&plan.lists, selected) {
        (Some(lists), Some(selected)) => listed_blocks(plan, lists, selected)?,
        _ => all_blocks(plan),
    };
    let partials: Vec<Partial> = blocks.par_iter().map(|block| attend_block(&inputs, block, heads)).collect();

    let mut out = vec![T::zero(); b * h * head_dim];
    let mut lse = vec![f32::NEG_INFINITY; b * h];
    // Blocks of one list follow each other.
    let same_list = |a: &(&Block, Partial), b: &(&Block, Partial)| a.0.first_head == b.0.first_head;
    let partials: Vec<_> = blocks.iter().zip(partials).collect();
    for partials in partials.chunk_by(same_list) {
        for head in 0..heads {
            let row = partials[0].0.first_head + head;
            let out = &mut out[row * head_dim..][..head_dim];
            lse[row] = merge(partials.iter().map(|(_, partial)| partial), head, out);
        }
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

fn listed_blocks(plan: &Plan, lists: &Lists, selected: &Selected) -> Result<Vec<Block>> {
    let (indices, lens, weights) = (
        selected.indices.storage_and_layout(),
        selected.lens.storage_and_layout(),
        selected.weights.storage_and_layout(),
    );
    let storages = ListStorages {
        indices: slice(cpu(&indices.0)?)?,
        lens: slice(cpu(&lens.0)?)?,
        weights: slice(cpu(&weights.0)?)?,
    };
    let ([b, h, ..], n) = (plan.query.dims, plan.keys.dims[2]);
    let per_list: Result<Vec<Vec<Block>>> = (0..b * lists.lists())
        .into_par_iter()
        .map(|row| {
            let mut attended = Vec::with_capacity(lists.indices.dims[2]);
            lists.each(plan.op, &storages, [row / lists.lists(), row % lists.lists()], n, |position, weight| {
                if weight != 0.0 {
                    attended.push((position as u32, weight));
                }
            })?;
            let block = |part: &[(u32, f32)]| {
                let (positions, weights) = part.iter().copied().unzip();
                Block { first_head: row * (h / lists.lists()), positions: Positions::Listed { positions, weights } }
            };
            Ok(attended.chunks(BLOCK).map(block).collect())
        })
        .collect();
    Ok(per_list?.into_iter().flatten().collect())
}

/// The CPU storage of a tensor that the op holds beside its three inputs.
fn cpu(storage: &Storage) -> Result<&CpuStorage> {
    match storage {
        Storage::Cpu(storage) => Ok(storage),
        _ => bail!("sparse_attend: selected: expected tensors on the device of the query"),
    }
}

struct Inputs<'a, T> {
    plan: &'a Plan,
    query: &'a [T],
    keys: &'a [T],
    values: &'a [T],
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

    let (keys, values) = (&inputs.plan.keys, &inputs.plan.values);
    let in_range = matches!(block.positions, Positions::Range(_));
    let mut scores = vec![0f32; heads * len];
    let mut tile = vec![0f32; TILE * head_dim];
    for start in (0..len).step_by(TILE) {
        let count = TILE.min(len - start);
        let at = |i| keys.at(&[b, kv, position(start + i)]);
        let tile = rows(inputs.keys, &mut tile, [count, head_dim], in_range && keys.has_adjacent_rows(), at);
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
        let at = |i| values.at(&[b, kv, position(start + i)]);
        let tile = rows(inputs.values, &mut tile, [count, head_dim], in_range && values.has_adjacent_rows(), at);
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

/// `count` rows, the `i`-th from offset `at(i)`, one after the other as f32: where they lie so already (`adjacent`), or
/// copied into the tile.
///
/// Copying is a step of its own, with nothing else to wait for, so it keeps many cache misses in flight: the rows of a
/// list are scattered over memory.
#[inline(always)]
fn rows<'a, T: Elem>(
    from: &'a [T],
    tile: &'a mut [f32],
    [count, head_dim]: [usize; 2],
    adjacent: bool,
    at: impl Fn(usize) -> usize,
) -> &'a [f32] {
    if let (true, Some(rows)) = (adjacent, T::as_f32(&from[at(0)..])) {
        return &rows[..count * head_dim];
    }
    for (i, row) in tile.chunks_exact_mut(head_dim).take(count).enumerate() {
        T::widen(&from[at(i)..][..head_dim], row);
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

/// Merges the partials of one head into `out`; returns the LSE.
fn merge<'a, T: Elem>(partials: impl Iterator<Item = &'a Partial> + Clone, head: usize, out: &mut [T]) -> f32 {
    let shift = partials.clone().map(|partial| partial.shift[head]).fold(f32::NEG_INFINITY, f32::max);
    let mut sum = 0f32;
    let mut values = vec![0f32; out.len()];
    for partial in partials {
        let factor = exp(partial.shift[head] - finite(shift));
        sum += factor * partial.sum[head];
        for (value, x) in values.iter_mut().zip(&partial.values[head * out.len()..]) {
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
