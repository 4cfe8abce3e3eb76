//! The index of a cache: the codebook, the codes of keys and the sums of their clusters, kept up to date.

use candle_core::{bail, Result, Tensor};
use tracing::trace_span;

use super::pages::Pages;
use super::{next_version, PqKvCache, Replayable};
use crate::codebook::Codebook;
use crate::config::Tail;
#[cfg(feature = "cuda")]
use crate::ops;
use crate::ops::{ClusterSums, Coarse, Places};

#[derive(Debug, Clone)]
pub(super) struct Trained {
    pub(super) codebook: Codebook,
    /// End of the keys it was trained on; None for a codebook that was handed in.
    pub(super) end: Option<usize>,
    /// What the values of each cluster sum to, with a tail.
    pub(super) clusters: Option<ClusterSums>,
    /// Keys from `init_offset` up to here are in these sums.
    pub(super) summed: usize,
    /// The cache's when it was taken into use.
    pub(super) version: u64,
}

impl Trained {
    /// Has no values summed from `start` on, the first key that is encoded. Subtracting would leave traces in the last bits.
    pub(super) fn forget_values(&mut self, start: usize) -> Result<()> {
        self.summed = start;
        self.clusters.as_ref().map_or(Ok(()), ClusterSums::clear)
    }
}

/// What a decode step searches.
#[derive(Clone)]
pub(crate) struct Index {
    pub(crate) codes: Tensor,
    pub(crate) centroids: Tensor,
    pub(crate) coarse: Option<Coarse>,
    pub(crate) clusters: Option<ClusterSums>,
    /// Where the candidates are, if they are in pages, on a CPU.
    pub(crate) places: Option<Places>,
}

impl PqKvCache {
    /// Brings the index up to date now, rather than in the next decode step: trains the codebook if one is due, and
    /// encodes all full blocks of keys. Does nothing while there are fewer keys than centroids or clusters.
    ///
    /// # Errors
    /// What the device gives.
    pub fn build_index(&mut self) -> Result<()> {
        self.train_if_due()?;
        self.encode_blocks()
    }

    /// What a step searches, brought up to date.
    pub(crate) fn index(&mut self) -> Result<Index> {
        self.build_index()?;
        self.last_index()
    }

    /// What a step searches: all candidates, or on a GPU, which finds out their number for itself, all positions that there
    /// is room for; where they are in pages, all of the pool.
    pub(crate) fn last_index(&self) -> Result<Index> {
        let (start, candidates) = (self.config.init_offset(), self.config.candidates(self.len));
        let of_positions = |codes: &Tensor| match (&self.pages, self.kv.device().is_cuda()) {
            (Some(_), true) => codes.narrow(2, start, codes.dims()[2] - start),
            (None, true) => codes.narrow(2, start, self.capacity() - start),
            (Some(_), false) => Ok(codes.clone()),
            (None, false) => codes.narrow(2, candidates.start, candidates.len()),
        };
        let place =
            |pages: &Pages| Places { pages: pages.codes.numbers(), first: candidates.start, n: candidates.len() };
        let Some(trained) = &self.trained else {
            bail!(
                "PqKvCache: index: expected at least {} keys (n_centroids, coarse) from init_offset {} on, got {} keys",
                self.config.min_train_keys(),
                self.config.init_offset(),
                self.len
            )
        };
        let coarse = match (&self.coarse_codes, trained.codebook.coarse()) {
            (Some(codes), Some(centroids)) => {
                Some(Coarse { codes: of_positions(codes)?, centroids: centroids.clone() })
            }
            _ => None,
        };
        Ok(Index {
            codes: of_positions(&self.codes)?,
            centroids: trained.codebook.centroids()?,
            coarse,
            clusters: trained.clusters.clone(),
            places: self.pages.as_ref().filter(|_| self.kv.device().is_cpu()).map(place),
        })
    }

    /// Keys and values of all positions that there is room for, or of all in the pool, if they are on a GPU, for a step that
    /// searches `index` and does not see the last `ahead` keys.
    #[cfg(feature = "cuda")]
    pub(crate) fn on_gpu(&self, index: Option<Index>, ahead: usize) -> Result<Option<ops::Sequences<'_>>> {
        match &self.lens {
            None => Ok(None),
            Some(lens) => {
                let of = |kv: &Tensor| Ok::<_, candle_core::Error>([kv.get(0)?, kv.get(1)?]);
                let prefix = self.prefix.as_ref().map(|prefix| of(&prefix.kv)).transpose()?;
                let ([keys, values], shared, len) = (of(&self.kv)?, self.shared(), self.len - ahead);
                let tables = |pages: &'_ Pages| Some([pages.kv.on_gpu()?.clone(), pages.codes.on_gpu()?.clone()]);
                let (pages, capacity) = (self.pages.as_ref().and_then(tables), self.capacity());
                Ok(Some(ops::Sequences { keys, values, prefix, shared, pages, capacity, lens, len, ahead, index }))
            }
        }
    }

    /// Whether an index of `len` keys wants a codebook trained on them.
    fn is_training_due_at(&self, len: usize) -> bool {
        let start = self.config.init_offset();
        let trainable = len.saturating_sub(start);
        match &self.trained {
            None => trainable >= self.config.min_train_keys(),
            Some(Trained { end: None, .. }) => false,
            Some(Trained { end: Some(end), .. }) => {
                let trained = end - start;
                // A share may be lost to rounding, or less than a key.
                trainable > trained && trainable as f64 >= trained as f64 * (1.0 + self.config.refresh)
            }
        }
    }

    /// Whether an index of the keys so far wants a codebook trained on them.
    pub(crate) fn is_training_due(&self) -> bool {
        self.is_training_due_at(self.len)
    }

    /// What a graph of the next step, of one key, relies on; None if that step does more than a replay can: it grows the
    /// cache, finds blocks of earlier keys without codes, or, where steps train at all, trains.
    pub(crate) fn replayable(&self, trains: bool) -> Option<Replayable> {
        let len = self.len.checked_add(1).filter(|len| *len <= self.capacity() && !self.is_read_behind())?;
        let is_trained = !(trains && self.is_training_due_at(len));
        (self.is_indexed(self.len) && is_trained)
            .then(|| Replayable { is_dense: self.config.is_dense(len), ..self.last_step() })
    }

    /// Whether all full blocks of `len` keys have codes and are summed, as far as there is a codebook: replays encode those
    /// that fill later.
    pub(super) fn is_indexed(&self, len: usize) -> bool {
        self.trained.as_ref().is_none_or(|trained| {
            let is_summed = trained.clusters.is_none() || trained.summed == self.encoded;
            self.encoded == self.blocks_end(len) && is_summed
        })
    }

    /// What a graph of the step that was last run would rely on.
    pub(crate) fn last_step(&self) -> Replayable {
        Replayable { version: self.version, is_dense: self.config.is_dense(self.len) }
    }

    /// How many of the next `limit` steps search the same index, without training and sparsely; 1 at least.
    #[cfg(feature = "cuda")]
    pub(crate) fn steps_alike(&self, limit: usize) -> usize {
        let index_at = |len| (self.blocks_end(len), self.is_training_due_at(len), self.config.is_dense(len));
        let first = (self.blocks_end(self.len + 1), false, false);
        let alike = (1..=limit).take_while(|steps| self.trained.is_some() && index_at(self.len + steps) == first);
        alike.count().max(1)
    }

    fn train_if_due(&mut self) -> Result<()> {
        if self.is_training_due() {
            let _span = trace_span!("pq-attn-train").entered();
            self.forbid_capture("training", "call build_index")?;
            let start = self.config.init_offset();
            self.own_codes_from(start)?;
            let keys = self.between(0, start..self.len)?;
            let weights = self.queries.weights(self.dims(), keys.device())?;
            let codebook = Codebook::train_weighted(&keys, weights.as_ref(), &self.config)?;
            self.use_codebook(codebook, Some(self.len))?;
        }
        Ok(())
    }

    /// Has no keys encoded by `codebook`, trained on those up to `end`.
    pub(super) fn use_codebook(&mut self, codebook: Codebook, end: Option<usize>) -> Result<()> {
        let [b, h_kv, head_dim] = self.dims();
        let clusters = match self.config.tail {
            Tail::None => None,
            Tail::ClusterMeans => Some(ClusterSums::empty([b, h_kv, self.config.coarse, head_dim], self.kv.device())?),
        };
        let (start, version) = (self.config.init_offset(), next_version());
        self.trained = Some(Trained { codebook, end, clusters, summed: start, version });
        self.encoded = start;
        self.version = version;
        Ok(())
    }

    pub(super) fn forget_codebook(&mut self) {
        self.trained = None;
        self.encoded = self.config.init_offset();
        self.version = next_version();
    }

    /// Keys of a block: what fits the window, which is full before the first of them leaves it.
    pub(super) fn block(&self) -> usize {
        self.config.window.max(1)
    }

    /// End of the full blocks of `len` keys. It is never before the window, so all candidates have codes.
    pub(super) fn blocks_end(&self, len: usize) -> usize {
        let start = self.config.init_offset();
        start + len.saturating_sub(start) / self.block() * self.block()
    }

    /// Encodes the full blocks that have no codes yet, and adds their values to their clusters'.
    pub(crate) fn encode_blocks(&mut self) -> Result<()> {
        let end = self.blocks_end(self.len);
        self.encode(end)?;
        self.sum_values(end)
    }

    /// Encodes the keys up to `end` that have no codes yet.
    pub(super) fn encode(&mut self, end: usize) -> Result<()> {
        if self.trained.is_none() || self.encoded >= end {
            return Ok(());
        }
        self.forbid_capture("codes of earlier keys", "call build_index")?;
        let _span = trace_span!("pq-attn-encode").entered();
        self.own_codes_from(self.encoded)?;
        let Some(trained) = &self.trained else { return Ok(()) };
        let codes = (&self.codes, self.coarse_codes.as_ref());
        for piece in self.pieces_of(self.encoded..end) {
            let keys = self.between(0, piece.clone())?;
            for (place, positions) in self.code_places(piece.clone()) {
                let keys = keys.narrow(2, positions.start - piece.start, positions.len())?;
                trained.codebook.encode_into(codes, &keys, place)?;
            }
        }
        self.encoded = end;
        Ok(())
    }

    /// Adds the values up to `end`, whose keys have codes, to their clusters'.
    pub(super) fn sum_values(&mut self, end: usize) -> Result<()> {
        let Some(mut trained) = self.trained.take() else { return Ok(()) };
        let added = self.add_values(&mut trained, end);
        self.trained = Some(trained);
        added
    }

    fn add_values(&self, trained: &mut Trained, end: usize) -> Result<()> {
        if let (Some(clusters), Some(codes)) = (&mut trained.clusters, &self.coarse_codes) {
            for positions in self.pieces_of(trained.summed..end) {
                let values = self.between(1, positions.clone())?;
                clusters.add(&values, &self.codes_between(codes, positions.clone())?)?;
                trained.summed = positions.end;
            }
        }
        Ok(())
    }

    /// Whether the step of the next key is sparse and finds the index up to date once that is appended: without training, and with
    /// no codes but those of the block that it may fill.
    #[cfg(feature = "cuda")]
    pub(crate) fn has_index_of_next(&self) -> bool {
        let len = self.len + 1;
        let is_up_to_date = self.trained.is_some() && (self.is_indexed(len) || self.fills_block());
        is_up_to_date && !self.is_training_due_at(len) && !self.config.is_dense(len)
    }

    /// Whether the next key fills a block, which is then all that has no codes.
    #[cfg(feature = "cuda")]
    pub(super) fn fills_block(&self) -> bool {
        self.len + 1 == self.encoded + self.block() && self.can_index()
    }

    /// Whether there is an index of all full blocks, and the keys behind them are not in what a fork shares.
    #[cfg(feature = "cuda")]
    fn can_index(&self) -> bool {
        self.trained.is_some() && self.is_indexed(self.len) && self.encoded >= self.shared()
    }

    /// What is written of it when its last block of keys is encoded; None without a codebook.
    #[cfg(feature = "cuda")]
    pub(super) fn as_indexed(&self) -> Result<Option<ops::Indexed<'_>>> {
        let Some(trained) = &self.trained else { return Ok(None) };
        if !self.can_index() {
            bail!("PqKvCache: index: expected a capture to find all earlier blocks encoded: call build_index first");
        }
        // In pages, all of the pool.
        let (first, room) = (self.shared(), self.kv.dims()[3]);
        let codes = self.codes.narrow(2, first, room)?;
        let coarse_codes = self.coarse_codes.as_ref().map(|codes| codes.narrow(2, first, room)).transpose()?;
        let (encoder, clusters) = (trained.codebook.encoder(), trained.clusters.as_ref());
        let pages = self.pages.as_ref().and_then(|pages| pages.codes.on_gpu());
        Ok(Some(ops::Indexed { codes, coarse_codes, encoder, clusters, pages }))
    }

    /// Uses a codebook trained elsewhere, which is then never trained again.
    ///
    /// # Errors
    /// A codebook of other dimensions or another metric than the cache and its config, or on another device.
    pub fn set_codebook(&mut self, codebook: Codebook) -> Result<()> {
        self.check_codebook(&codebook)?;
        self.use_codebook(codebook, None)
    }

    pub(super) fn check_codebook(&self, codebook: &Codebook) -> Result<()> {
        let [b, h_kv, head_dim] = self.dims();
        let expected = [b, h_kv, self.config.pq_dim, self.config.n_centroids()];
        if codebook.dims() != expected || codebook.pq_len() * self.config.pq_dim != head_dim {
            bail!(
                "PqKvCache: codebook: expected [b, h_kv, pq_dim, n_centroids] {expected:?} of pq_len {}, got {:?} of {}",
                head_dim / self.config.pq_dim,
                codebook.dims(),
                codebook.pq_len()
            );
        }
        if codebook.metric() != self.config.metric {
            bail!("PqKvCache: codebook: expected metric {:?}, got {:?}", self.config.metric, codebook.metric());
        }
        if codebook.coarse().map_or(0, |coarse| coarse.dims()[2]) != self.config.coarse {
            let clusters = codebook.coarse().map_or(0, |coarse| coarse.dims()[2]);
            bail!("PqKvCache: codebook: expected {} coarse clusters, got {clusters}", self.config.coarse);
        }
        if !codebook.device().same_device(self.device()) {
            let (expected, got) = (self.device().location(), codebook.device().location());
            bail!("PqKvCache: codebook: expected device {expected:?}, got {got:?}");
        }
        Ok(())
    }
}
