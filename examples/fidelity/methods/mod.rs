//! Ways to attend to a long context.

mod clusters;
mod edges;
mod oracle;
mod pq;
mod quest;
mod train;

#[cfg(test)]
pub use {quest::bounds, train::Training};

use std::collections::HashMap;
use std::sync::{Arc, Mutex};

use anyhow::{bail, ensure, Context, Result};
use candle_core::Tensor;
use candle_pq_attn::Heavy;

use crate::attend::{Attended, Queries};
use clusters::{Clusters, Index};
use pq::Pq;

/// One way to attend.
pub trait Method: Send + Sync {
    /// What a person calls it.
    fn label(&self) -> String;

    /// Bytes of index that a decode step reads for each key of a KV head; None where it reads the keys themselves.
    fn bytes_per_key(&self, head_dim: usize) -> Option<f64>;

    /// Whether it chooses keys, as many as the budget says.
    fn has_budget(&self) -> bool {
        true
    }

    /// Sees the keys and values of a layer's prefill, and trains on them if it does so at all.
    fn observe(&self, prefill: &Prefill) -> Result<Box<dyn Layer>>;
}

/// A method in one layer, after the prefill.
pub trait Layer {
    /// Attends from the last positions; every query sees the keys up to its own. The first keys are the prefill's.
    fn attend(&self, queries: &Queries, heavy: Heavy) -> Result<Attended>;
}

/// What is kept and trained in every method alike.
#[derive(Debug, Clone, Copy)]
pub struct Settings {
    pub sink: usize,
    pub window: usize,
    pub seed: u64,
    /// Codebooks see the first so many keys of the prefill.
    pub train_keys: usize,
    /// Of which they see at most so many, spread evenly.
    pub max_train_keys: usize,
}

/// One layer's keys and values when decoding begins.
pub struct Prefill {
    /// `[h_kv, n, head_dim]`, f32, contiguous
    pub keys: Tensor,
    /// `[h, n, head_dim]`, the same
    pub queries: Tensor,
    pub settings: Settings,
    /// Clusters and codes that methods have in common, by how many of each.
    indices: Mutex<HashMap<String, Arc<Index>>>,
}

impl Prefill {
    pub fn new(keys: Tensor, queries: Tensor, settings: Settings) -> Self {
        Self { keys, queries, settings, indices: Mutex::default() }
    }

    /// The keys to train on: those behind the sink.
    fn training_keys(&self) -> Result<Tensor> {
        let Settings { sink, train_keys, .. } = self.settings;
        let n = self.keys.dim(1)?.min(train_keys);
        ensure!(
            n > sink,
            "expected more than {sink} keys to train on, those of the sink; got {n}: raise --train-tokens"
        );
        Ok(self.keys.narrow(1, sink, n - sink)?)
    }
}

/// Those that are compared unless others are asked for.
pub const DEFAULT: [&str; 10] =
    ["edges", "oracle", "quest", "pq:2x6", "pq:16x8", "oracle+tail", "centroids", "ours-no-tail", "ours", "ours-kv"];

/// What `--help` says of methods.
pub const HELP: &str = "\
METHODS
  edges           sink and window only
  oracle          the keys of the highest exact scores: no other top-k covers more
  quest[:PAGE]    whole pages of 16 keys, by the upper bound from their smallest and largest elements
  pq:MxB          product quantization of the keys, M codes of B bits; pq:2x6 is PQCache's own setting
  ours            this library with its defaults. It computes pq too; options of both, and what they are in pq:
                    codes=8x8        M codes of B bits
                    coarse=0         clusters of whole keys, of whose residuals the codes are
                    tail=none        or means: their mean values stand for the rest
                    select=query-head  or kv-head: one choice for all query heads of a KV head
                    weigh=none       or queries: elements of keys by what queries look at
                    rounds=4         of k-means
                    grow=none        trains anew when keys have grown by this share, such as 0.0625
  ours-no-tail    ours:tail=none
  ours-kv         ours:select=kv-head
  clusters        clusters of whole keys, PQ codes of the residuals, and a tail: the weights of the keys that
                  were not chosen, spent on their clusters' mean values. Ours, frozen at the prefill, from the
                  definition and in plain loops, with the options
                    n=256            clusters: 2, 4, ... 256
                    codes=8x8        codes of the residual
                    choose=codes     who chooses: exact, codes, or centroids (of the clusters)
                    tail=codes       who weighs the rest: exact, codes, centroids, or none: there is no tail
                    select=query-head  or kv-head: one choice for all query heads of a KV head
                    means=all        or rest: mean values without the chosen keys
                    spread=none      corrects weights for the variance of what codes lose: head, cluster, or full
                    weigh=none       elements of keys by the mean square of those of queries: diagonal, or pairs,
                                     one weight for the two elements that are rotated together
                    queries=N        number of the first queries of the prefill that count for that
                    recent=none      or half: half of what is trained on is from the last quarter of the keys
                    sample=1         number of keys to train on over the number of all; above 1 they repeat
                    rounds=4         of k-means
                    grow=none        trains anew when keys have grown by this share, such as 0.0625
  oracle+tail     clusters:choose=exact:tail=centroids
  centroids       clusters:choose=centroids:tail=centroids, as RetroInfer does

Options follow the name: ours:codes=16x8:select=kv-head, clusters:n=64";

/// The method of that name.
pub fn parse(name: &str) -> Result<Box<dyn Method>> {
    let (kind, options) = name.split_once(':').map_or((name, None), |(kind, options)| (kind, Some(options)));
    let clusters = |preset: &str| -> Result<Box<dyn Method>> {
        let options = [preset, options.unwrap_or_default()];
        Ok(Box::new(Clusters::parse(name, options.into_iter().flat_map(|part| part.split(':')))?))
    };
    let ours = |preset: &str| -> Result<Box<dyn Method>> {
        Ok(Box::new(Pq::defaults(name).with(preset)?.with(options.unwrap_or_default())?))
    };
    match kind {
        "edges" | "oracle" if options.is_some() => bail!("{kind}: expected no options, got {name:?}"),
        "edges" => Ok(Box::new(edges::Edges)),
        "oracle" => Ok(Box::new(oracle::Oracle)),
        "quest" => Ok(Box::new(quest::Quest::parse(options)?)),
        "pq" => Ok(Box::new(Pq::plain(name, options.context("pq: expected pq:MxB, such as pq:16x8")?)?)),
        "ours" => ours(""),
        "ours-no-tail" => ours("tail=none"),
        "ours-kv" => ours("select=kv-head"),
        "clusters" => clusters(""),
        "oracle+tail" => clusters("choose=exact:tail=centroids"),
        "centroids" => clusters("choose=centroids:tail=centroids"),
        _ => bail!("expected one of edges, oracle, quest, pq:MxB, clusters, {}; got {name:?}", DEFAULT[5..].join(", ")),
    }
}

/// `8x8`: so many codes of so many bits.
fn codes(text: &str) -> Result<(usize, usize)> {
    let numbers = text.split_once('x').and_then(|(m, bits)| Some((m.parse().ok()?, bits.parse().ok()?)));
    match numbers {
        Some((m, bits)) if m > 0 && (1..=8).contains(&bits) => Ok((m, bits)),
        _ => bail!("expected MxB, M codes of 1 to 8 bits, such as 8x8; got {text:?}"),
    }
}
