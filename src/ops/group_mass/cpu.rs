use candle_core::{CpuStorage, Result};
use multiversion::multiversion;
use rayon::prelude::*;

use super::Plan;
use crate::cpu::{exp_and_sum, max, slice};

pub(super) fn run(plan: &Plan, scores: &CpuStorage) -> Result<Vec<f32>> {
    let scores = slice::<f32>(scores)?;
    let [b, h, n] = plan.scores.dims;
    let group = h / plan.h_kv;
    let mut mass = vec![0f32; b * plan.h_kv * n];
    if n == 0 {
        return Ok(mass);
    }
    mass.par_chunks_mut(n).enumerate().for_each(|(pair, mass)| {
        let (b, kv) = (pair / plan.h_kv, pair % plan.h_kv);
        let mut shares = vec![0f32; n];
        for head in 0..group {
            let at = plan.scores.at(&[b, kv * group + head]);
            shares.copy_from_slice(&scores[at..at + n]);
            add_softmax(mass, &mut shares, plan.scale);
        }
    });
    Ok(mass)
}

/// Adds `softmax(scale · scores)` to `mass`; `scores` is overwritten.
#[multiversion(targets = "simd")]
fn add_softmax(mass: &mut [f32], scores: &mut [f32], scale: f32) {
    // The largest product: of the largest score, or of the smallest under a negative scale.
    let sign = 1f32.copysign(scale);
    scores.iter_mut().for_each(|x| *x *= sign);
    let sum = exp_and_sum(scores, scale.abs(), max(scores) * scale.abs());
    for (mass, share) in mass.iter_mut().zip(scores) {
        *mass += *share / sum;
    }
}
