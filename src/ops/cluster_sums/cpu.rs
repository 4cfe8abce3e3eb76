use candle_core::{CpuStorage, Layout, Result, Tensor};
use multiversion::multiversion;
use rayon::prelude::*;

use super::{Plan, OP};
use crate::cpu::{check_codes, dispatch_float, slice, Elem};

/// Returns the sums and the counts.
pub(super) fn run(
    plan: &Plan,
    values: &CpuStorage,
    codes: &CpuStorage,
    (sums, layout): (&CpuStorage, &Layout),
    counts: &Tensor,
) -> Result<(Vec<f32>, Vec<u32>)> {
    let codes = slice(codes)?;
    check_codes(OP, "codes", &plan.codes, codes, plan.n_clusters)?;
    // Both are without gaps.
    let mut sums = slice::<f32>(sums)?[layout.start_offset()..][..layout.shape().elem_count()].to_vec();
    let mut counts = counts.flatten_all()?.to_vec1::<u32>()?;
    dispatch_float!(values, run_for(plan, values, codes, &mut sums, &mut counts))?;
    Ok((sums, counts))
}

fn run_for<T: Elem>(
    plan: &Plan,
    values: &CpuStorage,
    codes: &[u8],
    sums: &mut [f32],
    counts: &mut [u32],
) -> Result<()> {
    let values = slice::<T>(values)?;
    let [_, h_kv, _, head_dim] = plan.values.dims;
    let heads = sums.par_chunks_mut(plan.n_clusters * head_dim).zip(counts.par_chunks_mut(plan.n_clusters));
    heads.enumerate().for_each(|(head, (sums, counts))| {
        add_head(plan, values, codes, [head / h_kv, head % h_kv], sums, counts);
    });
    Ok(())
}

/// Adds the values of head `[b, h]`.
#[multiversion(targets = "simd")]
fn add_head<T: Elem>(
    plan: &Plan,
    values: &[T],
    codes: &[u8],
    [b, h]: [usize; 2],
    sums: &mut [f32],
    counts: &mut [u32],
) {
    let [_, _, n, head_dim] = plan.values.dims;
    let value = &mut [0f32; super::MAX_HEAD_DIM][..head_dim];
    for t in 0..n {
        let cluster = usize::from(codes[plan.codes.at(&[b, h, t])]);
        T::widen(&values[plan.values.at(&[b, h, t])..][..head_dim], value);
        for (sum, x) in sums[cluster * head_dim..][..head_dim].iter_mut().zip(&*value) {
            *sum += x;
        }
        counts[cluster] += 1;
    }
}
