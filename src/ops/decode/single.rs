//! A step over one cache in the launches of the single ops, for what the fused ones do not suit.

use candle_core::{CudaStorage, DType, Result, Tensor};

use super::workspace::Buffers;
use super::{Plan, SelectionPlan, Sequences, OP};
use crate::cache::Index;
use crate::cuda::{self, Step};
use crate::ops::select::Selector;
use crate::ops::{group_mass, indices_and_weights, score, sparse_attend, tail_attend, topk};

/// Writes the output, `[1, b, h, head_dim]`.
pub(super) fn run(
    plan: &Plan,
    cache: &Sequences,
    query: &Tensor,
    buffers: &mut Buffers,
    out: &mut CudaStorage,
) -> Result<()> {
    let guard = query.storage_and_layout().0;
    let query = cuda::storage_of(OP, &guard)?;
    let (_, device) = cuda::kind(query);
    let [b, h, ..] = plan.attend.query.dims;
    let lens = Some(cache.lens.storage());
    // Keys and values share a storage.
    let of_cache = cache.keys.storage_and_layout().0;
    let keys = cuda::storage_of(OP, &of_cache)?;
    let attend = sparse_attend::Kernels::new(&plan.attend, query)?;
    if let (Some(selection), Some(index)) = (&plan.selection, &cache.index) {
        list_keys(selection, plan.step, lens, query, index, buffers)?;
    }
    let lists = match &plan.selection {
        None => None,
        Some(_) => Some([buffers.indices.get(OP)?, buffers.list_lens.get(OP)?, buffers.weights.get(OP)?]),
    };
    let tail = match &plan.attend.tail {
        None => None,
        Some(_) => Some([buffers.tail_out.get(OP)?, buffers.tail_lse.get(OP)?]),
    };
    let partials = buffers.partials.of(device, attend.partials_len(), DType::F32)?;
    let stats = buffers.attend_stats.of(device, attend.stats_len(), DType::F32)?;
    let lse = buffers.lse.of(device, b * h, DType::F32)?;
    attend.run(plan.step, lens, [query, keys, keys], lists, tail, [partials, stats, out, lse])
}

/// Scores the candidates and leaves the lists of what to attend to in `buffers`, and the attention to all others.
fn list_keys(
    plan: &SelectionPlan,
    step: Step,
    lens: Option<&CudaStorage>,
    query: &CudaStorage,
    index: &Index,
    buffers: &mut Buffers,
) -> Result<()> {
    let (dtype, device) = cuda::kind(query);
    let (codes, centroids) = (index.codes.storage_and_layout().0, index.centroids.storage_and_layout().0);
    let inputs = [query, cuda::storage_of(OP, &codes)?, cuda::storage_of(OP, &centroids)?];
    let entries = plan.topk.rows * plan.lists.list_len;
    let indices = buffers.indices.of(device, entries, DType::U32)?;
    let list_lens = buffers.list_lens.of(device, plan.topk.rows, DType::U32)?;
    let weights = buffers.weights.of(device, entries, DType::F32)?;
    let selector = match plan.mass.is_none() && plan.tail.is_none() {
        true => Selector::new(&plan.score, &plan.lists, plan.topk.k, dtype, device)?,
        false => None,
    };
    if let Some(selector) = selector {
        let finalists = buffers.finalists.of(device, selector.finalists_len(), DType::U32)?;
        let arrived = buffers.arrived.zeroed(device, selector.lists(), DType::U32)?;
        let outputs = [indices, list_lens, weights];
        return selector.run((step, plan.topk.n), lens, inputs, [finalists, arrived], outputs, None);
    }

    let kernels = score::Kernels::new(&plan.score, query)?;
    let ([b, h, ..], room) = (plan.score.query.dims, plan.topk.n);
    let tables = buffers.tables.of(device, kernels.tables_len(), DType::F32)?;
    let scores = buffers.scores.of(device, b * h * room, DType::F32)?;
    kernels.run(step, lens, inputs, index.coarse.as_ref(), tables, scores)?;

    let ranked: &CudaStorage = match &plan.mass {
        None => scores,
        Some(mass_plan) => {
            let kernels = group_mass::Kernels::new(mass_plan, device)?;
            let stats = buffers.mass_stats.of(device, kernels.stats_len(), DType::F32)?;
            let mass = buffers.mass.of(device, plan.topk.rows * room, DType::F32)?;
            kernels.run(step, lens, scores, stats, mass)?;
            mass
        }
    };

    let kernels = topk::Kernels::new(&plan.topk, device)?;
    let heavy = buffers.heavy.of(device, plan.topk.rows * plan.topk.k, DType::U32)?;
    let workspace = match kernels.workspace_len() {
        0 => None,
        len => Some(buffers.histograms.of(device, len, DType::U32)?),
    };
    kernels.run(step, lens, (ranked, 0, room), plan.topk.rows / b, workspace, heavy)?;

    indices_and_weights::launch(&plan.lists, step, lens, heavy, [&mut *indices, &mut *list_lens, &mut *weights])?;

    let (Some(tail), Some(coarse), Some(clusters)) = (&plan.tail, &index.coarse, &index.clusters) else {
        return Ok(());
    };
    let kernels = tail_attend::Kernels::new(tail, device)?;
    let guards = [&coarse.codes, &clusters.sums, &clusters.counts].map(|tensor| tensor.storage_and_layout().0);
    let [codes, sums, counts] = [&guards[0], &guards[1], &guards[2]].map(|guard| cuda::storage_of(OP, guard));
    let masses = buffers.tail_masses.of(device, kernels.masses_len(), DType::F32)?;
    let shifts = buffers.tail_shifts.of(device, kernels.shifts_len(), DType::F32)?;
    let out = buffers.tail_out.of(device, b * h * tail.sums.dims[3], DType::F32)?;
    let lse = buffers.tail_lse.of(device, b * h, DType::F32)?;
    let (lists, outputs) = ([&*indices, &*list_lens, &*weights], [masses, shifts, out, lse]);
    kernels.run(step, lens, [scores, codes?], lists, [sums?, counts?], outputs)
}
