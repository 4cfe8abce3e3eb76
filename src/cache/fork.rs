//! Caches that share their first keys and values.

use std::ops::Range;
use std::sync::Arc;

#[cfg(feature = "cuda")]
use candle_core::bail;
use candle_core::{Result, Tensor};

use super::{copy_to, next_version, with_room, PqKvCache, Trained};
use crate::ops::ClusterSums;

/// The first keys and values of a fork, in the memory of the cache that it was made of.
#[derive(Debug, Clone)]
pub(super) struct Prefix {
    /// `[2, b, h_kv, at least len, head_dim]`
    pub(super) kv: Tensor,
    /// As many of them as are in use: those of whole blocks, so that a block lies in one piece.
    pub(super) len: usize,
    /// Tells the owner of `kv` that it is still in use.
    _lent: Arc<()>,
}

impl PqKvCache {
    /// A cache of the same keys and values that goes on by itself: for several continuations of one text, such as many
    /// questions on one document, or the candidates of a search.
    ///
    /// The two share the memory of the keys and values so far, but for those of the last `window` positions at most,
    /// which are copied; so are codes and sums of clusters. A codebook is shared until one of them trains anew. Each goes on,
    /// is truncated and dropped as if there were no other: a cache that is truncated into what it has lent moves to memory of
    /// its own with its next append. A fork of a fork copies what the first one has added.
    ///
    /// A fork grows from the first append: [`reserve`](Self::reserve) room for what is to come.
    /// What reads all keys at once makes a copy of them for as long as it takes: a prefill, training, [`keys`](Self::keys),
    /// saving, and on a CPU dense decode steps. On a GPU a dense step, or one that its fused kernels do not suit, has the fork
    /// take a copy of its own for good. Shared memory stays as long as one of them uses a part of it.
    ///
    /// They may be on different threads. On a CPU an append to one waits for a step of another, so do not run them as tasks of
    /// rayon's own pool, which a step uses; on a GPU work with them in one stream, as with any two tensors that share memory.
    ///
    /// # Errors
    /// What the device gives, a capture of a CUDA graph that is under way, or a budget without room for one more key.
    ///
    /// ```
    /// use candle_core::{DType, Device, Tensor};
    /// use candle_pq_attn::{PqConfig, PqKvCache};
    ///
    /// let mut document = PqKvCache::new(PqConfig::default(), [1, 2, 64], 0, DType::F32, &Device::Cpu)?;
    /// let random = |len| Tensor::randn(0f32, 1., (1, 2, len, 64), &Device::Cpu);
    /// document.append(&random(1000)?, &random(1000)?)?;
    /// document.build_index()?; // once for all forks
    ///
    /// let mut question = document.fork()?;
    /// question.append(&random(20)?, &random(20)?)?;
    /// assert_eq!((document.len(), question.len()), (1000, 1020));
    /// assert!(question.memory().kv_bytes < document.memory().kv_bytes / 10);
    /// # candle_core::Result::Ok(())
    /// ```
    pub fn fork(&mut self) -> Result<Self> {
        self.forbid_capture("fork", "fork")?;
        if Arc::strong_count(&self.lent) == 1 {
            self.lent_len = 0;
        }
        let prefix = match &self.prefix {
            Some(prefix) => prefix.clone(),
            None => {
                Prefix { kv: self.kv.clone(), len: self.blocks_end(self.len).min(self.len), _lent: self.lent.clone() }
            }
        };
        let mut fork = Self::new(self.config.clone(), self.dims(), 0, self.dtype(), self.device())?;
        fork.max_bytes = self.max_bytes;
        let (shared, own) = (prefix.len, prefix.len..self.len);
        let (keys, values) = (self.between(0, own.clone())?, self.between(1, own.clone())?);
        (fork.len, fork.prefix) = (shared, Some(prefix));
        fork.reserve(own.len() + 1)?;
        fork.set_len(shared)?;
        fork.append(&keys, &values)?;
        fork.trained = self.trained.as_ref().map(Trained::fork).transpose()?;
        fork.encoded = self.encoded;
        fork.queries = self.queries.clone();
        let coded = self.config.init_offset()..self.encoded;
        if self.trained.is_some() && !coded.is_empty() {
            for (to, from) in
                [(Some(&fork.codes), Some(&self.codes)), (fork.coarse_codes.as_ref(), self.coarse_codes.as_ref())]
            {
                if let (Some(to), Some(from)) = (to, from) {
                    to.slice_set(&from.narrow(2, coded.start, coded.len())?.contiguous()?, 2, coded.start)?;
                }
            }
        }
        if self.prefix.is_none() {
            self.lent_len = self.lent_len.max(shared);
        }
        Ok(fork)
    }

    /// Keys and values that are in another cache's memory.
    pub(super) fn shared(&self) -> usize {
        self.prefix.as_ref().map_or(0, |prefix| prefix.len)
    }

    /// The memory that positions lie in: of each piece the tensor, the position that it begins with, and which of them.
    pub(super) fn segments(&self, positions: Range<usize>) -> impl Iterator<Item = (&Tensor, usize, Range<usize>)> {
        let shared = self.shared();
        let of_prefix = positions.start..positions.end.min(shared);
        let own = positions.start.max(shared)..positions.end;
        let of_prefix = self.prefix.as_ref().map(|prefix| (&prefix.kv, 0, of_prefix));
        of_prefix.into_iter().chain([(&self.kv, shared, own)]).filter(|(_, _, positions)| !positions.is_empty())
    }

    /// Keys (0) or values (1) at `positions`, `[b, h_kv, positions, head_dim]`: a view where they lie in one piece.
    pub(super) fn between(&self, which: usize, positions: Range<usize>) -> Result<Tensor> {
        let piece = |(kv, first, positions): (&Tensor, usize, Range<usize>)| {
            kv.get(which)?.narrow(2, positions.start - first, positions.len())
        };
        let mut pieces = self.segments(positions).map(piece).collect::<Result<Vec<_>>>()?;
        match pieces.len() {
            0 => self.kv.get(which)?.narrow(2, 0, 0),
            1 => Ok(pieces.remove(0)),
            _ => {
                let [b, h_kv, head_dim] = self.dims();
                let n = pieces.iter().map(|piece| piece.dims()[2]).sum::<usize>();
                let whole = Tensor::zeros((b, h_kv, n, head_dim), self.dtype(), self.device())?;
                let mut first = 0;
                for piece in &pieces {
                    copy_to(&whole, first, piece)?;
                    first += piece.dims()[2];
                }
                Ok(whole)
            }
        }
    }

    /// Keys and values of the prefix, and its own, `[b, h_kv, ..., head_dim]` each: views.
    pub(crate) fn pieces(&self) -> Result<(Option<[Tensor; 2]>, [Tensor; 2])> {
        let of = |positions: Range<usize>| {
            Ok::<_, candle_core::Error>([self.between(0, positions.clone())?, self.between(1, positions)?])
        };
        let shared = self.shared();
        Ok(((shared > 0).then(|| of(0..shared)).transpose()?, of(shared..self.len)?))
    }

    /// Before keys are written behind the last: where forks read what was there, this cache goes on in a copy.
    pub(super) fn reclaim(&mut self) -> Result<()> {
        if self.is_read_behind() {
            self.forbid_capture("an append to what a fork reads", "append a key")?;
            self.kv = with_room(&self.kv, 3, self.own_capacity())?;
            (self.lent, self.lent_len, self.version) = (Arc::default(), 0, next_version());
        }
        Ok(())
    }

    /// Whether forks read the memory behind the last key.
    pub(super) fn is_read_behind(&self) -> bool {
        self.len - self.shared() < self.lent_len && Arc::strong_count(&self.lent) > 1
    }

    /// What a fork of which `len` keys are left shares, whole blocks again, and its own memory with the others; None where
    /// it shares no less than before.
    pub(super) fn shared_until(&self, len: usize) -> Result<Option<(Option<Prefix>, Tensor)>> {
        let Some(prefix) = self.prefix.as_ref().filter(|prefix| len < prefix.len) else { return Ok(None) };
        self.forbid_capture("truncate", "call it")?;
        let shared = self.blocks_end(len).min(len);
        let own = with_room(&prefix.kv.narrow(3, shared, len - shared)?, 3, self.own_capacity().max(len - shared))?;
        Ok(Some(((shared > 0).then(|| Prefix { len: shared, ..prefix.clone() }), own)))
    }

    /// Takes a copy of what it shares.
    #[cfg(feature = "cuda")]
    pub(crate) fn unshare(&mut self) -> Result<()> {
        if self.prefix.is_none() {
            return Ok(());
        }
        self.forbid_capture("a step that reads all keys of a fork", "take one such step")?;
        let (capacity, [b, h_kv, head_dim]) = (self.capacity(), self.dims());
        let bytes = self.bytes_of(capacity, capacity);
        if self.max_bytes.is_some_and(|max_bytes| bytes > max_bytes) {
            bail!("PqKvCache: max_bytes: expected at least {bytes} for a fork's own copy of all keys, which this step reads");
        }
        let kv = Tensor::zeros((2, b, h_kv, capacity, head_dim), self.dtype(), self.device())?;
        for which in 0..2 {
            for (from, first, positions) in self.segments(0..self.len) {
                let piece = from.get(which)?.narrow(2, positions.start - first, positions.len())?;
                copy_to(&kv.get(which)?, positions.start, &piece)?;
            }
        }
        (self.kv, self.prefix, self.version) = (kv, None, next_version());
        Ok(())
    }
}

impl Trained {
    /// The same codebook, with sums of its own.
    fn fork(&self) -> Result<Self> {
        let copy = |clusters: &ClusterSums| {
            Ok::<_, candle_core::Error>(ClusterSums { sums: clusters.sums.copy()?, counts: clusters.counts.copy()? })
        };
        let clusters = self.clusters.as_ref().map(copy).transpose()?;
        Ok(Self { codebook: self.codebook.clone(), clusters, ..*self })
    }
}
