//! A whole decode step on a GPU, from the query to the attended output.
//!
//! With an index that suits them the launches are those of [`fused`], else those of the single ops. What differs from
//! these is where sizes come from: lengths are read from device memory, grids and buffers are made for the cache's
//! capacity, and what one launch leaves to the next has a place that stays. So nothing but the output is allocated, and a
//! step captured as a CUDA graph serves a sequence that grows.

mod cuda;
mod fused;
mod workspace;

use candle_core::{bail, CpuStorage, CudaStorage, CustomOp3, Layout, Result, Shape, Tensor};

use super::arg::{with_unit_rows, View};
use super::indices_and_weights::{Geometry, Lists};
use super::{group_mass, indices_and_weights, score, sparse_attend, tail_attend, topk};
use crate::cache::Index;
use crate::config::{PqConfig, Selection};
use crate::cuda::{Lens, Step};
use fused::Fused;
pub(crate) use workspace::Workspace;

const OP: &str = "decode";

/// A cache as a step sees it: everything that there is room for, and how much of it there is.
pub(crate) struct Sequences<'a> {
    /// `[b, h_kv, room, head_dim]`
    pub(crate) keys: Tensor,
    /// `[b, h_kv, room, head_dim]`
    pub(crate) values: Tensor,
    /// Keys and values of the positions before these, `[b, h_kv, at least shared, head_dim]`.
    pub(crate) prefix: Option<[Tensor; 2]>,
    /// How many there are.
    pub(crate) shared: usize,
    pub(crate) lens: &'a Lens,
}

/// Attends to all keys, or with an index (of all positions that there is room for) to those that matter to `query`,
/// `[b, h, 1, head_dim]`.
///
/// None where there is a prefix and the fused launches do not suit.
///
/// # Errors
/// Shapes and dtypes that the single ops would refuse, or a step that is captured before one has been run: it would
/// have to allocate.
pub(crate) fn decode(
    query: &Tensor,
    sequences: &Sequences,
    index: Option<(&Index, &PqConfig)>,
    scale: f32,
    workspace: &Workspace,
) -> Result<Option<Tensor>> {
    let query = with_unit_rows(query)?;
    let plan = Plan::new(&query, sequences, index, scale)?;
    let device = query.device().as_cuda_device()?;
    let fused = Fused::new(&plan, query.dtype(), device)?;
    if fused.is_none() && plan.prefix.is_some() {
        return Ok(None);
    }
    let prefix = sequences.prefix.as_ref();
    let op = Decode { plan, fused, prefix, lens: sequences.lens, index: index.map(|(index, _)| index), workspace };
    query.apply_op3_no_bwd(&sequences.keys, &sequences.values, &op).map(Some)
}

/// A checked call of [`decode`]: the plans of its ops, for as many keys as there is room for.
struct Plan {
    step: Step,
    selection: Option<SelectionPlan>,
    attend: sparse_attend::Plan,
    /// Keys and values of the first `shared` positions.
    prefix: Option<[View<4>; 2]>,
    shared: usize,
}

struct SelectionPlan {
    score: score::Plan,
    mass: Option<group_mass::Plan>,
    topk: topk::Plan,
    lists: indices_and_weights::Plan,
    tail: Option<tail_attend::Plan>,
}

impl Plan {
    fn new(query: &Tensor, sequences: &Sequences, index: Option<(&Index, &PqConfig)>, scale: f32) -> Result<Self> {
        let mut attend = sparse_attend::Plan::new(OP, query, &sequences.keys, &sequences.values, None, None, scale)?;
        let shared = sequences.shared;
        let prefix = match &sequences.prefix {
            None => None,
            Some([keys, values]) => {
                let of_prefix = sparse_attend::Plan::new(OP, query, keys, values, None, None, scale)?;
                Some([of_prefix.keys, of_prefix.values])
            }
        };
        let capacity = shared + attend.keys.dims[2];
        let Some((index, config)) = index else {
            return Ok(Self { step: Step::of_candidates(capacity, 0), selection: None, attend, prefix, shared });
        };
        let selection = SelectionPlan::new(query, index, config, capacity, scale)?;
        attend.lists = Some(selection.attended());
        if selection.tail.is_some() {
            let [b, h, ..] = attend.query.dims;
            attend.tail = Some((View::contiguous(attend.query.dims), View::contiguous([b, h])));
        }
        Ok(Self { step: Step::of_config(config, capacity), selection: Some(selection), attend, prefix, shared })
    }
}

impl SelectionPlan {
    fn new(query: &Tensor, index: &Index, config: &PqConfig, capacity: usize, scale: f32) -> Result<Self> {
        let score = score::Plan::new(OP, query, &index.codes, &index.centroids, index.coarse.as_ref())?;
        let ([b, h, ..], [_, h_kv, room, _]) = (score.query.dims, score.codes.dims);
        let scores = View::contiguous([b, h, room]);
        let (mass, lists) = match config.selection {
            Selection::PerQueryHead => (None, h),
            Selection::PerKvHead => (Some(group_mass::Plan { scores, h_kv, scale }), h_kv),
        };
        // The most that a step can select: shares and candidates grow with the sequence.
        let k = config.heavy.count(capacity).min(config.candidates(capacity).len());
        let (sink, window, init_offset) = (config.sink, config.window, config.init_offset());
        let geometry = Geometry { n: capacity, sink, window, init_offset };
        let mut plan = Self {
            score,
            mass,
            topk: topk::Plan { rows: b * lists, n: room, k },
            lists: indices_and_weights::Plan::of(View::contiguous([b, lists, k]), geometry),
            tail: None,
        };
        if let (Some(coarse), Some(clusters)) = (&plan.score.coarse, &index.clusters) {
            let attended = plan.attended();
            plan.tail = Some(tail_attend::Plan::of(scores, coarse.codes, clusters, attended, init_offset, scale)?);
        }
        Ok(plan)
    }

    /// The lists that a step leaves.
    fn attended(&self) -> Lists {
        let [b, lists, _] = self.lists.heavy.dims;
        let dims = [b, lists, self.lists.list_len];
        Lists { indices: View::contiguous(dims), lens: View::contiguous([b, lists]), weights: View::contiguous(dims) }
    }
}

struct Decode<'a> {
    plan: Plan,
    fused: Option<Fused>,
    prefix: Option<&'a [Tensor; 2]>,
    lens: &'a Lens,
    index: Option<&'a Index>,
    workspace: &'a Workspace,
}

impl CustomOp3 for Decode<'_> {
    fn name(&self) -> &'static str {
        OP
    }

    fn cpu_fwd(
        &self,
        _: &CpuStorage,
        _: &Layout,
        _: &CpuStorage,
        _: &Layout,
        _: &CpuStorage,
        _: &Layout,
    ) -> Result<(CpuStorage, Shape)> {
        bail!("{OP}: query: expected a tensor on a GPU, got a CPU tensor")
    }

    fn cuda_fwd(
        &self,
        query: &CudaStorage,
        _: &Layout,
        keys: &CudaStorage,
        _: &Layout,
        values: &CudaStorage,
        _: &Layout,
    ) -> Result<(CudaStorage, Shape)> {
        let out = cuda::run(self, [query, keys, values])?;
        Ok((out, self.plan.attend.query.dims.as_slice().into()))
    }
}
