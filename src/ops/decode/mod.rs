//! A whole decode step on a GPU, from the query to the attended output.
//!
//! With an index that suits them the launches are those of [`fused`], else those of the single ops. What differs from
//! these is where sizes come from: lengths are read from device memory, grids and buffers are made for the cache's
//! capacity, and what one launch leaves to the next has a place that stays. So nothing but the output is allocated, and a
//! step captured as a CUDA graph serves a sequence that grows.

mod fused;
mod single;
mod workspace;

use std::sync::Arc;

use candle_core::op::BackpropOp;
use candle_core::{Result, Storage, Tensor};

use super::arg::{with_unit_rows, View};
use super::begin_step::{self, Appending};
use super::indices_and_weights::{Geometry, Lists};
use super::{group_mass, indices_and_weights, score, sparse_attend, tail_attend, topk};
use crate::cache::Index;
use crate::config::{PqConfig, Selection};
use crate::cuda::{self, Lens, Step};
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
    /// Where the tensors have positions in pages, the number of each page of keys and values, and of codes, u32; without a
    /// prefix.
    pub(crate) pages: Option<[Tensor; 2]>,
    /// Positions that there is room for.
    pub(crate) capacity: usize,
    pub(crate) lens: &'a Lens,
    /// Roughly what `lens` says: sequences of a step share the device by it.
    pub(crate) len: usize,
    /// So many of the last keys are not seen: of a run each position sees its own and those before it.
    pub(crate) ahead: usize,
    /// Of all positions that there is room for; None to attend to all keys.
    pub(crate) index: Option<Index>,
}

/// Attends with each position of `query`, `[b, h, caches, head_dim]`, to a cache: to all keys, or by its index to those that
/// matter to it. Returns `[b, h, caches, head_dim]`.
///
/// With `appending` a key and a value are appended to each cache before, in the first of the launches.
///
/// None, with nothing done, where the fused launches do not suit, which alone serve several caches, those with a prefix or in
/// pages, runs, and what is appended.
///
/// # Errors
/// Shapes and dtypes that the single ops would refuse, or a step that is captured before one has been run: it would
/// have to allocate.
pub(crate) fn decode(
    query: &Tensor,
    caches: &[Sequences],
    appending: Option<&Appending>,
    config: &PqConfig,
    scale: f32,
    workspace: &Workspace,
) -> Result<Option<Tensor>> {
    let query = with_unit_rows(query)?;
    let (b, h, _, head_dim) = query.dims4()?;
    let device = query.device().as_cuda_device()?;
    let launches = match workspace.last_launches(device, &query, caches) {
        Some(fused) => Launches::Fused(fused),
        None => {
            let plan = |(i, cache)| Plan::new(&query.narrow(2, i, 1)?, cache, config, scale);
            let plans = caches.iter().enumerate().map(plan).collect::<Result<Vec<_>>>()?;
            match (Fused::new(&plans, caches, query.dtype(), device)?, caches, plans.into_iter().next()) {
                (Some(fused), ..) => Launches::Fused(Arc::new(fused)),
                (None, [Sequences { prefix: None, pages: None, ahead: 0, .. }], Some(plan)) if appending.is_none() => {
                    Launches::Single(Box::new(plan))
                }
                _ => return Ok(None),
            }
        }
    };
    let appending = match appending {
        None => None,
        Some(appending) => begin_step::Plans::new(appending)?.map(|plans| (appending, plans)),
    };
    // No custom op: it would hold the query's storage, which new keys and values may share, and `cuda::lock` locks each once.
    let dims = (caches.len(), b, h, head_dim);
    let mut out = cuda::output(device, dims, query.dtype())?;
    workspace.with(device, |buffers| match launches {
        Launches::Fused(fused) => {
            let done = fused.run(&query, caches, appending.as_ref(), buffers, &mut out);
            match done {
                Ok(()) => buffers.keep_launches(&query, caches, fused),
                Err(_) => buffers.forget_counts(),
            }
            done
        }
        Launches::Single(plan) => single::run(&plan, &caches[0], &query, buffers, &mut out),
    })?;
    let out = Tensor::from_storage(Storage::Cuda(out), dims, BackpropOp::none(), false);
    match caches.len() {
        1 => out.reshape((b, h, 1, head_dim)).map(Some),
        _ => out.permute((1, 2, 0, 3)).map(Some),
    }
}

/// What a step launches.
enum Launches {
    Fused(Arc<Fused>),
    /// Those of single ops, for one cache.
    Single(Box<Plan>),
}

/// A checked call of [`decode`]: the plans of its ops, for as many keys as there is room for.
struct Plan {
    step: Step,
    selection: Option<SelectionPlan>,
    attend: sparse_attend::Plan,
    /// Keys and values of the first `shared` positions.
    prefix: Option<[View<4>; 2]>,
    shared: usize,
    capacity: usize,
}

struct SelectionPlan {
    score: score::Plan,
    mass: Option<group_mass::Plan>,
    topk: topk::Plan,
    lists: indices_and_weights::Plan,
    tail: Option<tail_attend::Plan>,
}

impl Plan {
    fn new(query: &Tensor, cache: &Sequences, config: &PqConfig, scale: f32) -> Result<Self> {
        let mut attend = sparse_attend::Plan::new(OP, query, &cache.keys, &cache.values, None, None, scale)?;
        let (shared, capacity) = (cache.shared, cache.capacity);
        let prefix = match &cache.prefix {
            None => None,
            Some([keys, values]) => {
                let of_prefix = sparse_attend::Plan::new(OP, query, keys, values, None, None, scale)?;
                Some([of_prefix.keys, of_prefix.values])
            }
        };
        let Some(index) = &cache.index else {
            let step = Step::of_candidates(capacity, 0);
            return Ok(Self { step, selection: None, attend, prefix, shared, capacity });
        };
        let selection = SelectionPlan::new(query, index, config, capacity, scale)?;
        attend.lists = Some(selection.attended());
        if selection.tail.is_some() {
            let [b, h, ..] = attend.query.dims;
            attend.tail = Some((View::contiguous(attend.query.dims), View::contiguous([b, h])));
        }
        let step = Step::of_config(config, capacity);
        Ok(Self { step, selection: Some(selection), attend, prefix, shared, capacity })
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
