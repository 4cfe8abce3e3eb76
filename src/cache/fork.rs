//! Caches that share their first keys and values.

use std::ops::Range;
use std::sync::Arc;

#[cfg(feature = "cuda")]
use candle_core::bail;
use candle_core::{Result, Tensor};

use super::pages::Pages;
#[cfg(feature = "cuda")]
use super::Index;
use super::{copy_to, next_version, with_room, PqKvCache, Store, Trained};
use crate::ops::{ClusterSums, KeysAndValues};
#[cfg(feature = "cuda")]
use crate::ops::{Coarse, Sequences};

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
    /// A fork grows from the first append: [`reserve`](Self::reserve) room for what is to come. Of a cache in a
    /// [`PagePool`](crate::PagePool) it shares whole pages, those of codes as well, so [`build_index`](Self::build_index) before;
    /// a fork of a fork shares them too.
    /// What reads all keys at once makes a copy of them for as long as it takes: a prefill, training, [`keys`](Self::keys),
    /// saving, and on a CPU dense decode steps. On a GPU a dense step, or one that its fused kernels do not suit, has the fork
    /// take a copy of its own for good. Shared memory stays as long as one of them uses a part of it.
    ///
    /// They may be on different threads. On a CPU an append to one waits for a step of another, so do not run them as tasks of
    /// rayon's own pool, which a step uses; on a GPU work with them in one stream, as with any two tensors that share memory.
    ///
    /// # Errors
    /// What the device gives, a capture of a CUDA graph that is under way, a budget without room for one more key, or too few
    /// free pages.
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
        if let Some(pages) = &self.pages {
            return self.fork_pages(pages.sharing(self.len, self.device())?);
        }
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
        fork.copy_index(self)?;
        if self.prefix.is_none() {
            self.lent_len = self.lent_len.max(shared);
        }
        Ok(fork)
    }

    /// A fork that shares all pages but those that either of them will write to.
    fn fork_pages(&self, pages: Pages) -> Result<Self> {
        let (kv, codes, coarse_codes) = (self.kv.clone(), self.codes.clone(), self.coarse_codes.clone());
        let mut fork = Self::of_store(self.config.clone(), Store { kv, codes, coarse_codes }, Some(pages))?;
        fork.max_bytes = self.max_bytes;
        fork.set_len(self.len)?;
        fork.take_index(self)?;
        fork.reclaim()?;
        Ok(fork)
    }

    /// Has the codebook, sums and queries of `from`, and as many codes.
    fn take_index(&mut self, from: &Self) -> Result<()> {
        self.trained = from.trained.as_ref().map(Trained::fork).transpose()?;
        self.encoded = from.encoded;
        self.queries = from.queries.clone();
        Ok(())
    }

    /// The same, with copies of the codes of `from`, whose keys and values this has already.
    pub(super) fn copy_index(&mut self, from: &Self) -> Result<()> {
        self.take_index(from)?;
        let coded = self.config.init_offset()..self.encoded;
        if self.trained.is_none() || coded.is_empty() {
            return Ok(());
        }
        let coarse_codes = (self.coarse_codes.as_ref(), from.coarse_codes()?);
        for (to, from) in [(Some(&self.codes), Some(from.codes()?)), coarse_codes] {
            let (Some(to), Some(from)) = (to, from) else { continue };
            for (place, positions) in self.code_places(coded.clone()) {
                let codes = from.narrow(2, positions.start - coded.start, positions.len())?;
                // Not `contiguous`: it may be a view of what is written to, where both are of one pool.
                to.slice_set(&codes.force_contiguous()?, 2, place)?;
            }
        }
        Ok(())
    }

    /// Keys and values that are in another cache's memory.
    pub(super) fn shared(&self) -> usize {
        self.prefix.as_ref().map_or(0, |prefix| prefix.len)
    }

    /// Positions cut where those of the prefix end.
    pub(super) fn pieces_of(&self, positions: Range<usize>) -> impl Iterator<Item = Range<usize>> + use<> {
        let shared = self.shared();
        let of_prefix = positions.start..positions.end.min(shared);
        let own = positions.start.max(shared)..positions.end;
        [of_prefix, own].into_iter().filter(|positions| !positions.is_empty())
    }

    /// Keys (0) or values (1) at `positions`, `[b, h_kv, positions, head_dim]`: a view where they lie in one piece.
    pub(super) fn between(&self, which: usize, positions: Range<usize>) -> Result<Tensor> {
        if let Some(pages) = &self.pages {
            return pages.kv.gather(&self.kv.get(which)?, positions);
        }
        let piece = |positions: Range<usize>| match &self.prefix {
            Some(prefix) if positions.start < prefix.len => {
                prefix.kv.get(which)?.narrow(2, positions.start, positions.len())
            }
            _ => self.kv.get(which)?.narrow(2, positions.start - self.shared(), positions.len()),
        };
        let mut pieces = self.pieces_of(positions).map(piece).collect::<Result<Vec<_>>>()?;
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

    /// Keys and values where they are.
    pub(crate) fn keys_and_values(&self) -> Result<KeysAndValues> {
        if let Some(pages) = &self.pages {
            let own = [self.kv.get(0)?, self.kv.get(1)?];
            return Ok(KeysAndValues { prefix: None, own, pages: Some(pages.kv.numbers()) });
        }
        let of = |positions: Range<usize>| {
            Ok::<_, candle_core::Error>([self.between(0, positions.clone())?, self.between(1, positions)?])
        };
        let shared = self.shared();
        let prefix = (shared > 0).then(|| of(0..shared)).transpose()?;
        Ok(KeysAndValues { prefix, own: of(shared..self.len)?, pages: None })
    }

    /// Before keys are written behind the last: where forks read what was there, this cache goes on in a copy.
    pub(super) fn reclaim(&mut self) -> Result<()> {
        let is_read_behind = self.is_read_behind();
        if is_read_behind {
            self.forbid_capture("an append to what a fork reads", "append a key")?;
        }
        if let Some(pages) = &mut self.pages {
            pages.kv.own_from(self.len..self.len, &[self.kv.get(0)?, self.kv.get(1)?])?;
            return self.own_codes_from(self.encoded);
        }
        if !is_read_behind {
            return Ok(());
        }
        self.kv = with_room(&self.kv, 3, self.own_capacity())?;
        (self.lent, self.lent_len, self.version) = (Arc::default(), 0, next_version());
        Ok(())
    }

    /// Before codes are written from position `first` on: the same for their pages.
    pub(super) fn own_codes_from(&mut self, first: usize) -> Result<()> {
        match &self.pages {
            Some(pages) if pages.codes.is_shared_from(first) => {}
            _ => return Ok(()),
        }
        self.forbid_capture("codes in pages that a fork reads", "take a step")?;
        let tensors: Vec<_> = [Some(&self.codes), self.coarse_codes.as_ref()].into_iter().flatten().cloned().collect();
        let live = first..self.encoded;
        self.pages.as_mut().map_or(Ok(()), |pages| pages.codes.own_from(live, &tensors))
    }

    /// Whether forks read the memory behind the last key, or behind its codes.
    pub(super) fn is_read_behind(&self) -> bool {
        match &self.pages {
            Some(pages) => pages.kv.is_shared_from(self.len) || pages.codes.is_shared_from(self.encoded),
            None => self.len - self.shared() < self.lent_len && Arc::strong_count(&self.lent) > 1,
        }
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

    /// Keys and values, and of `index` the codes, copied from pages into one piece each, for steps of kernels that read no
    /// pages. None of a cache that is not paged, or on a CPU.
    #[cfg(feature = "cuda")]
    pub(crate) fn out_of_pages(&self, index: Option<Index>) -> Result<Option<Sequences<'_>>> {
        let (Some(pages), Some(lens)) = (&self.pages, &self.lens) else { return Ok(None) };
        self.forbid_capture("a step that copies keys out of pages", "take one such step")?;
        let positions = 0..self.capacity();
        // They are to share a storage.
        let kv = Tensor::stack(&[self.between(0, positions.clone())?, self.between(1, positions.clone())?], 0)?;
        let coded = self.config.init_offset()..positions.end;
        let copy = |codes: &Tensor| pages.codes.gather(codes, coded.clone());
        let with_copies = |index: Index| {
            let codes_of = |coarse: Coarse| match &self.coarse_codes {
                Some(codes) => Ok::<_, candle_core::Error>(Some(Coarse { codes: copy(codes)?, ..coarse })),
                None => Ok(None),
            };
            let coarse = index.coarse.map(codes_of).transpose()?.flatten();
            Ok::<_, candle_core::Error>(Index { codes: copy(&self.codes)?, coarse, ..index })
        };
        let (index, [keys, values]) = (index.map(with_copies).transpose()?, [kv.get(0)?, kv.get(1)?]);
        let (len, capacity) = (self.len, positions.end);
        Ok(Some(Sequences { keys, values, prefix: None, shared: 0, pages: None, capacity, lens, len, ahead: 0, index }))
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
            for positions in self.pieces_of(0..self.len) {
                copy_to(&kv.get(which)?, positions.start, &self.between(which, positions)?)?;
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
