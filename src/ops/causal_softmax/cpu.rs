use candle_core::{bail, CpuStorage, Result};
use multiversion::multiversion;
use rayon::prelude::*;

use super::{Plan, OP};
use crate::cpu::{exp_and_sum, max};

pub(super) fn run(plan: &Plan, scores: &mut CpuStorage) -> Result<()> {
    let CpuStorage::F32(scores) = scores else {
        bail!("{OP}: scores: expected f32 storage");
    };
    let [b, h_kv, rows, n] = plan.scores.dims;
    let start = plan.scores.at(&[]);
    let scores = &mut scores[start..start + b * h_kv * rows * n];
    scores.par_chunks_mut(n).enumerate().for_each(|(row, scores)| {
        let visible = plan.first + row % rows % plan.queries + 1;
        let (visible, masked) = scores.split_at_mut(visible);
        softmax(visible, plan.scale);
        masked.fill(0.0);
    });
    Ok(())
}

#[multiversion(targets = "simd")]
fn softmax(scores: &mut [f32], scale: f32) {
    // Scaled before the maximum is taken: the scale may be negative.
    scores.iter_mut().for_each(|x| *x *= scale);
    let sum = exp_and_sum(scores, 1.0, max(scores));
    scores.iter_mut().for_each(|x| *x /= sum);
}
