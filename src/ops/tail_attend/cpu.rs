//! 1. The candidates of each head are cut into blocks by position. In a block, scores become weights
//!    `e^{scale · score - shift}`, 0 for what is listed, with the block's largest product as the shift; they are added to
//!    the masses of their clusters one after the other.
//! 2. The masses of a head's blocks are brought to one shift and added, in the order of the blocks.
//! 3. The means of the clusters are summed with these masses, in the order of the clusters.

use candle_core::{CpuStorage, Result};
use multiversion::multiversion;
use rayon::prelude::*;

use super::{Places, Plan, Selected, TailAttend, OP};
use crate::cpu::{check_codes, exp, exp_and_sum, held, max, slice};

/// Candidates of a block, for a parallel task; many, for each block has masses of all clusters to merge.
const BLOCK: usize = 4096;

/// As many as a byte can name, so that adding to one needs no bounds check.
type Masses = [f32; 256];

/// Returns outputs and LSEs.
pub(super) fn run(
    op: &TailAttend,
    scores: &CpuStorage,
    codes: &CpuStorage,
    sums: &CpuStorage,
) -> Result<(Vec<f32>, Vec<f32>)> {
    let TailAttend { plan, counts, selected, places, .. } = op;
    let (scores, codes, sums) = (slice::<f32>(scores)?, slice::<u8>(codes)?, slice::<f32>(sums)?);
    let counts = counts.storage_and_layout().0;
    let counts = held::<u32>(OP, "counts", &counts)?;
    let [_, h_kv, n_clusters, head_dim] = plan.sums.dims;
    if places.is_none() {
        check_codes(OP, "codes", &plan.codes, codes, n_clusters)?; // else a cache's own
    }
    let listed = listed(plan, selected)?;
    let [b, h, n] = plan.scores.dims;
    let (mut out, mut lse) = (vec![0f32; b * h * head_dim], vec![f32::NEG_INFINITY; b * h]);
    let rows = out.par_chunks_exact_mut(head_dim).zip(&mut lse).enumerate();
    rows.for_each(|(row, (out, lse))| {
        let (b, kv) = (row / h, row % h / (h / h_kv));
        let scores = &scores[plan.scores.at(&[b, row % h])..][..n];
        let codes = &codes[plan.codes.at(&[b, kv])..][..plan.codes.dims[2]];
        let listed = &listed[row / (h / plan.lists.lists())];
        let blocks: Vec<Block> = scores
            .par_chunks(BLOCK)
            .enumerate()
            .map(|(i, scores)| {
                let range = [i * BLOCK, i * BLOCK + scores.len()].map(|t| listed.partition_point(|&other| other < t));
                weigh(scores, (codes, *places), &listed[range[0]..range[1]], i * BLOCK, plan.scale)
            })
            .collect();
        let counts = &counts[plan.counts.at(&[b, kv])..][..n_clusters];
        let sums_at = |cluster| &sums[plan.sums.at(&[b, kv, cluster])..][..head_dim];
        *lse = attend(&blocks, counts, sums_at, out);
    });
    Ok((out, lse))
}

/// The candidates that each list has, ascending.
fn listed(plan: &Plan, selected: &Selected) -> Result<Vec<Vec<usize>>> {
    let candidates = |list: Vec<(u32, f32)>| {
        let candidates = list.into_iter().filter_map(|(position, _)| (position as usize).checked_sub(plan.init_offset));
        let mut candidates: Vec<_> = candidates.filter(|&t| t < plan.scores.dims[2]).collect();
        candidates.sort_unstable();
        candidates
    };
    // Positions behind the candidates are none of this op's business, however large.
    let lists = plan.lists.attended(OP, selected, usize::MAX)?;
    Ok(lists.into_iter().map(candidates).collect())
}

/// What the candidates of a block weigh.
struct Block {
    /// Negative infinity where no candidate weighs anything.
    shift: f32,
    masses: Masses,
}

/// Weighs the candidates from `first` on; `codes` are those of all.
#[multiversion(targets = "simd")]
fn weigh(
    scores: &[f32],
    (codes, places): (&[u8], Option<&Places>),
    listed: &[usize],
    first: usize,
    scale: f32,
) -> Block {
    let mut weights: Vec<f32> = scores.iter().map(|score| score * scale).collect();
    for &t in listed {
        weights[t - first] = f32::NEG_INFINITY;
    }
    let mut block = Block { shift: max(&weights), masses: [0.0; 256] };
    if block.shift > f32::NEG_INFINITY {
        exp_and_sum(&mut weights, 1.0, block.shift);
        for (place, keys) in Places::runs(places, first, weights.len()) {
            for (weight, &code) in weights[keys].iter().zip(&codes[place..]) {
                // NaN is 0, as on a GPU: of a score that is NaN, or infinite as the largest is.
                block.masses[usize::from(code)] += weight.max(0.0);
            }
        }
    }
    block
}

/// Sums the clusters' means into `out`, which is zeros; returns the LSE.
#[multiversion(targets = "simd")]
fn attend<'a>(blocks: &[Block], counts: &[u32], sums: impl Fn(usize) -> &'a [f32], out: &mut [f32]) -> f32 {
    let shift = blocks.iter().map(|block| block.shift).fold(f32::NEG_INFINITY, f32::max);
    if shift == f32::NEG_INFINITY {
        return shift; // all candidates are listed
    }
    let mut masses: Masses = [0.0; 256];
    for block in blocks {
        let factor = exp(block.shift - shift);
        for (mass, x) in masses.iter_mut().zip(&block.masses) {
            // Nor does NaN reach the masses of other blocks.
            *mass += (factor * x).max(0.0);
        }
    }
    let mut total = 0f32;
    for (cluster, (mass, &count)) in masses.iter().zip(counts).enumerate() {
        if *mass != 0.0 && count > 0 {
            total += mass;
            let weight = mass / count as f32;
            for (out, sum) in out.iter_mut().zip(sums(cluster)) {
                *out += weight * sum;
            }
        }
    }
    if total == 0.0 {
        return f32::NEG_INFINITY;
    }
    out.iter_mut().for_each(|out| *out /= total);
    shift + total.ln()
}
