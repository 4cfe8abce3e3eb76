//! The KV cache of one layer, with the index that a sparse decode searches.

mod file;
mod fork;
mod index;
mod pages;

pub use file::{load_caches, save_caches, SavedCaches};
pub(crate) use index::Index;
pub use pages::PagePool;

use std::ops::Range;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::Arc;

use candle_core::{bail, DType, Device, Result, Tensor};

use crate::codebook::Codebook;
use crate::config::{Metric, PqConfig, Tail};
use crate::fault::point_of_failure;
use crate::ops::arg::share_storage;
use crate::ops::{ClusterSums, PAGE};
use crate::query_weights::QuerySample;
#[cfg(feature = "cuda")]
use crate::{cuda::Lens, ops};
use fork::Prefix;
use index::Trained;
use pages::Pages;

/// Keys, values and codes of one layer, `[b, h_kv, n, ...]`, growing along `n`.
///
/// - **Growth.** [`append`](Self::append) writes the new keys and values behind the old ones. Capacity doubles when it
///   runs out, so an append costs amortised O(1) a key; give [`new`](Self::new) the final length and nothing is ever
///   copied. A cache of a [`PagePool`] grows by pages, without copying.
/// - **Index.** The codebook is trained when a decode first wants it, on the keys from `init_offset` to the last one,
///   and again whenever the keys have grown by [`PqConfig::refresh`] since: what the codebook has not seen it codes
///   poorly. Keys are encoded in blocks of `window`, one key if that is 0, when a block is full, which is before its first
///   key can be selected. With [`Tail::ClusterMeans`] their values are added to their clusters' then.
/// - **Queries.** With [`PqConfig::query_weights`] it keeps a few of a prompt's, 32 of each doubling of its length: what
///   they look at is what a codebook is to be good in.
/// - **Going back.** [`truncate`](Self::truncate) forgets the last keys. If the codebook was trained on some of them it
///   is forgotten too, so an index never remembers keys that are gone.
/// - **Several continuations.** [`fork`](Self::fork) makes a cache that goes on from here by itself, with the same memory
///   for what is there already.
///
/// What [`keys`](Self::keys), [`values`](Self::values) and [`codes`](Self::codes) return are views: valid until the
/// positions they show are truncated and written again or, for codes, the codebook is trained again.
///
/// ```
/// use candle_core::{DType, Device, Tensor};
/// use candle_pq_attn::{PqConfig, PqKvCache};
///
/// let mut cache = PqKvCache::new(PqConfig::default(), [1, 2, 64], 1024, DType::F32, &Device::Cpu)?;
/// let kv = Tensor::randn(0f32, 1., (1, 2, 700, 64), &Device::Cpu)?;
/// cache.append(&kv, &kv)?;
/// cache.build_index()?; // or in the next sparse step
/// assert_eq!(cache.keys()?.dims(), [1, 2, 700, 64]);
/// assert!(cache.codes()?.dim(2)? >= 700 - 4 - 64); // all that have left the window
/// cache.truncate(650)?;
/// assert_eq!(cache.len(), 650);
/// # candle_core::Result::Ok(())
/// ```
#[derive(Debug)]
pub struct PqKvCache {
    config: PqConfig,
    /// The first keys and values, where the cache is a fork.
    prefix: Option<Prefix>,
    /// Which of the positions of `kv` and `codes` are its own, where these are a pool's.
    pages: Option<Pages>,
    /// Keys, then values, behind those of the prefix: `[2, b, h_kv, own_capacity, head_dim]`.
    kv: Tensor,
    /// Forks have clones of this as long as they read `kv`, of which they see `lent_len` keys at most.
    lent: Arc<()>,
    lent_len: usize,
    /// `[b, h_kv, capacity, pq_dim]`
    codes: Tensor,
    /// `[b, h_kv, capacity]`, with coarse clusters.
    coarse_codes: Option<Tensor>,
    len: usize,
    /// On a GPU, what `len` will be when the launches so far are done.
    #[cfg(feature = "cuda")]
    lens: Option<Lens>,
    /// With query weights.
    queries: QuerySample,
    trained: Option<Trained>,
    /// Keys from `init_offset` up to here have codes.
    encoded: usize,
    /// Of the memory that a captured step is about; no other cache ever has the same.
    version: u64,
    /// The most bytes to reserve.
    max_bytes: Option<usize>,
}

/// Memory for keys, values and codes.
#[derive(Debug, Clone)]
struct Store {
    /// `[2, b, h_kv, capacity, head_dim]`
    kv: Tensor,
    /// `[b, h_kv, capacity, pq_dim]`
    codes: Tensor,
    /// `[b, h_kv, capacity]`, with coarse clusters.
    coarse_codes: Option<Tensor>,
}

impl Store {
    /// See [`PqKvCache::new`].
    fn new(config: &PqConfig, dims: [usize; 3], capacity: usize, dtype: DType, device: &Device) -> Result<Self> {
        let [batch, kv_heads, head_dim] = dims;
        config.validate(head_dim)?;
        if batch == 0 || kv_heads == 0 {
            bail!("PqKvCache: expected at least one sequence and one KV head, got batch {batch}, h_kv {kv_heads}");
        }
        if !matches!(dtype, DType::F32 | DType::F16 | DType::BF16) {
            bail!("PqKvCache: dtype: expected f32, f16 or bf16, got {}", dtype.as_str());
        }
        check_capacity(dims, capacity, dtype)?;
        let code_capacity = code_capacity(capacity);
        Ok(Self {
            kv: Tensor::zeros((2, batch, kv_heads, capacity, head_dim), dtype, device)?,
            codes: Tensor::zeros((batch, kv_heads, code_capacity, config.pq_dim), DType::U8, device)?,
            coarse_codes: match config.coarse {
                0 => None,
                _ => Some(Tensor::zeros((batch, kv_heads, code_capacity), DType::U8, device)?),
            },
        })
    }
}

/// What a captured step relies on: replayed where another is found, it would work on memory that is gone, or leave
/// something out.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Replayable {
    version: u64,
    is_dense: bool,
}

/// What a step that fails is to leave behind; see [`PqKvCache::restore`].
#[derive(Debug)]
pub(crate) struct Checkpoint {
    len: usize,
    trained: Option<Trained>,
    encoded: usize,
}

fn next_version() -> u64 {
    static VERSIONS: AtomicU64 = AtomicU64::new(0);
    VERSIONS.fetch_add(1, Ordering::Relaxed)
}

/// Bytes in use, as opposed to reserved.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Memory {
    /// Keys and values; of a [`fork`](PqKvCache::fork) its own.
    pub kv_bytes: usize,
    /// Codes, codebook, sums of clusters and sample of queries.
    pub index_bytes: usize,
}

impl PqKvCache {
    /// A cache for sequences of `[batch, kv_heads, head_dim]` with room for `capacity` keys (0: grow from the first append).
    ///
    /// # Errors
    /// A config that does not suit `head_dim`, no sequences or heads, or a dtype other than f32, f16 and bf16.
    pub fn new(config: PqConfig, dims: [usize; 3], capacity: usize, dtype: DType, device: &Device) -> Result<Self> {
        let store = Store::new(&config, dims, capacity, dtype, device)?;
        Self::of_store(config, store, None)
    }

    /// An empty cache in this memory, which is others' as well where it has `pages` of it.
    fn of_store(config: PqConfig, store: Store, pages: Option<Pages>) -> Result<Self> {
        let Store { kv, codes, coarse_codes } = store;
        #[cfg(feature = "cuda")]
        let lens = match kv.device() {
            Device::Cuda(device) => {
                crate::cuda::prepare(device)?;
                Some(Lens::new(device, [kv.dims()[1], kv.dims()[2]])?)
            }
            _ => None,
        };
        let encoded = config.init_offset();
        Ok(Self {
            config,
            prefix: None,
            pages,
            kv,
            lent: Arc::default(),
            lent_len: 0,
            codes,
            coarse_codes,
            len: 0,
            #[cfg(feature = "cuda")]
            lens,
            queries: QuerySample::default(),
            trained: None,
            encoded,
            version: next_version(),
            max_bytes: None,
        })
    }

    /// Never reserves more than `max_bytes`: growth that would is an error before anything is allocated, by which a server
    /// can refuse a sequence, or make room, rather than run out of memory.
    ///
    /// Counted are keys, values and codes by [`capacity`](Self::capacity), and a codebook and sums of clusters as the config
    /// has them, whether they are there yet or not; of a [`fork`](Self::fork), which has the budget of the cache that it was
    /// made of, its own. Where doubling the capacity would exceed the budget it grows by what is
    /// left. Not counted are the sample of queries, which is small, and what is there for a moment: the old keys and
    /// values while growth copies them, and a training's sample; nor the keys of one block, which a fork takes over when it is
    /// truncated into what it shares; nor the weighted half of a codebook that was handed in where
    /// the config has no query weights. A saved cache does not say what its budget was.
    ///
    /// # Errors
    /// A budget below what is reserved already; the one before stays.
    ///
    /// ```
    /// use candle_core::{DType, Device, Tensor};
    /// use candle_pq_attn::{PqConfig, PqKvCache};
    ///
    /// let mut cache = PqKvCache::new(PqConfig::default(), [1, 2, 64], 0, DType::F32, &Device::Cpu)?;
    /// cache.set_max_bytes(2 << 20)?;
    /// let kv = Tensor::randn(0f32, 1., (1, 2, 1000, 64), &Device::Cpu)?;
    /// cache.append(&kv, &kv)?;
    /// assert!(cache.append(&kv, &kv).is_err());
    /// assert_eq!(cache.len(), 1000);
    /// # candle_core::Result::Ok(())
    /// ```
    pub fn set_max_bytes(&mut self, max_bytes: usize) -> Result<()> {
        let reserved = self.bytes_at(self.capacity());
        if reserved > max_bytes {
            bail!(
                "PqKvCache: max_bytes: expected at least {reserved}, which its capacity of {} takes, got {max_bytes}",
                self.capacity()
            );
        }
        self.max_bytes = Some(max_bytes);
        Ok(())
    }

    /// Appends keys and values, `[b, h_kv, s, head_dim]` each, any `s` and any strides.
    ///
    /// # Errors
    /// Another shape, dtype or device, or growth that fails as that of [`reserve`](Self::reserve); the cache is then as
    /// before.
    pub fn append(&mut self, keys: &Tensor, values: &Tensor) -> Result<()> {
        let added = self.check_new(keys, values)?;
        if added == 0 {
            return Ok(());
        }
        #[cfg(feature = "cuda")]
        if self.lens.is_some() {
            return Self::append_together(&mut [(self, [keys.clone(), values.clone()])]);
        }
        self.reserve(added)?;
        self.reclaim()?;
        self.write(keys, values)?;
        self.len += added;
        Ok(())
    }

    /// As an [`append`](Self::append) to each of some caches on a GPU, in one launch, of what [`check_new`](Self::check_new) has
    /// found to fit; all of them have as many new keys. Encodes the blocks that these fill, now, or in each replay of the graph
    /// that is being captured. Where it fails none has grown.
    #[cfg(feature = "cuda")]
    pub(crate) fn append_together(caches: &mut [(&mut Self, [Tensor; 2])]) -> Result<()> {
        let before: Vec<_> = caches.iter().map(|(cache, _)| cache.checkpoint()).collect();
        let launch = |_: &[&Self], appending: &ops::Appending| match appending.has_index() {
            true => ops::begin_step(appending).map(Some),
            false => ops::append(&appending.new.iter().map(|(new, _)| new).collect::<Vec<_>>()).map(Some),
        };
        let done = Self::append_together_by(caches, launch).map(drop);
        if done.is_err() {
            caches.iter_mut().zip(before).try_for_each(|((cache, _), before)| cache.restore(before))?;
        }
        done
    }

    /// The same where `launch`, which is given the caches and what is new in each, launches it. Nothing is appended where it returns
    /// None. Where it fails a part of it may have run: [`restore`](Self::restore) takes back what there is.
    #[cfg(feature = "cuda")]
    pub(crate) fn append_together_by<T>(
        caches: &mut [(&mut Self, [Tensor; 2])],
        launch: impl FnOnce(&[&Self], &ops::Appending) -> Result<Option<T>>,
    ) -> Result<Option<T>> {
        for (cache, [keys, _]) in caches.iter_mut() {
            cache.reserve(keys.dims()[2])?;
            cache.reclaim()?;
        }
        let Some((first, _)) = caches.first() else { return Ok(None) };
        let is_capturing = first.is_capturing()?;
        let due = ops::Due { init_offset: first.config.init_offset(), block: first.block() };
        let mut new = Vec::new();
        for (cache, [keys, values]) in caches.iter() {
            let index = match keys.dims()[2] == 1 && (is_capturing || cache.fills_block()) {
                true => cache.as_indexed()?,
                false => None,
            };
            new.push((cache.as_new(keys, values)?, index));
        }
        let indexed: Vec<_> = new.iter().map(|(_, index)| index.is_some()).collect();
        let views: Vec<_> = caches.iter().map(|(cache, _)| &**cache).collect();
        let launched = launch(&views, &ops::Appending { new, due });
        if matches!(launched, Ok(None)) {
            return Ok(None);
        }
        for ((cache, [keys, _]), is_indexed) in caches.iter_mut().zip(indexed) {
            cache.len += keys.dims()[2];
            let end = cache.blocks_end(cache.len);
            if let Some(trained) = cache.trained.as_mut().filter(|_| is_indexed) {
                (cache.encoded, trained.summed) = (end, end);
            }
        }
        launched
    }

    /// What is written behind its last keys and values, which are on a GPU.
    #[cfg(feature = "cuda")]
    fn as_new(&self, keys: &Tensor, values: &Tensor) -> Result<ops::New<'_>> {
        let Some(lens) = &self.lens else {
            bail!("PqKvCache: append: expected caches on a GPU, got one that is not");
        };
        let (keys, values) = (self.apart(keys)?, self.apart(values)?);
        let (first, capacity) = (self.shared(), self.capacity());
        let pages = self.pages.as_ref().and_then(|pages| pages.kv.on_gpu());
        Ok(ops::New { cache: &self.kv, first, capacity, pages, lens, keys, values })
    }

    /// Takes note of the queries of the last positions, `[b, h, s, head_dim]`: codebooks trained from now on know what they
    /// look at.
    pub(crate) fn observe(&mut self, query: &Tensor) -> Result<()> {
        match self.config.query_weights {
            true => self.queries.add(self.len - query.dim(2)?, query, self.dims()[1]),
            false => Ok(()),
        }
    }

    /// Writes keys and values behind the last ones, where there is room: on a CPU.
    fn write(&mut self, keys: &Tensor, values: &Tensor) -> Result<()> {
        let of_piece = |tensor: &Tensor, positions: &Range<usize>| {
            self.apart(tensor)?.narrow(2, positions.start - self.len, positions.len())?.contiguous()
        };
        for (place, positions) in self.own_places(self.len..self.len + keys.dims()[2]) {
            point_of_failure()?;
            self.kv.get(0)?.slice_set(&of_piece(keys, &positions)?, 2, place)?;
            point_of_failure()?;
            self.kv.get(1)?.slice_set(&of_piece(values, &positions)?, 2, place)?;
        }
        Ok(())
    }

    /// Where positions that are not a prefix's lie in `kv`: of each piece its first place, and which positions it has.
    fn own_places(&self, positions: Range<usize>) -> Vec<(usize, Range<usize>)> {
        match &self.pages {
            Some(pages) => pages.kv.places(positions),
            None => vec![(positions.start - self.shared(), positions)],
        }
    }

    /// Where codes of some positions lie, as [`own_places`](Self::own_places).
    fn code_places(&self, positions: Range<usize>) -> Vec<(usize, Range<usize>)> {
        match &self.pages {
            Some(pages) => pages.codes.places(positions),
            None => vec![(positions.start, positions)],
        }
    }

    /// What `codes` has of some positions: a view where they lie in one piece.
    fn codes_between(&self, codes: &Tensor, positions: Range<usize>) -> Result<Tensor> {
        match &self.pages {
            Some(pages) => pages.codes.gather(codes, positions),
            None => codes.narrow(2, positions.start, positions.len()),
        }
    }

    /// `tensor`, or a copy where it is a view of these keys and values: Candle writes to no tensor what is in it.
    fn apart(&self, tensor: &Tensor) -> Result<Tensor> {
        match share_storage(tensor, &self.kv) {
            true => tensor.force_contiguous(),
            false => Ok(tensor.clone()),
        }
    }

    /// How many keys and values these are, if they fit.
    pub(crate) fn check_new(&self, keys: &Tensor, values: &Tensor) -> Result<usize> {
        self.check(keys, "keys")?;
        self.check(values, "values")?;
        let added = keys.dims()[2];
        if values.dims()[2] != added {
            bail!("PqKvCache: values: expected as many as keys ({added}), got {}", values.dims()[2]);
        }
        Ok(added)
    }

    fn check(&self, tensor: &Tensor, name: &str) -> Result<()> {
        let [b, h_kv, head_dim] = self.dims();
        match *tensor.dims() {
            [tb, th, _, td] if [tb, th, td] == [b, h_kv, head_dim] => {}
            _ => bail!("PqKvCache: {name}: expected [{b}, {h_kv}, s, {head_dim}], got {:?}", tensor.dims()),
        }
        if tensor.dtype() != self.dtype() {
            let (expected, got) = (self.dtype().as_str(), tensor.dtype().as_str());
            bail!("PqKvCache: {name}: expected dtype {expected}, got {got}");
        }
        if !tensor.device().same_device(self.kv.device()) {
            let (expected, got) = (self.kv.device().location(), tensor.device().location());
            bail!("PqKvCache: {name}: expected device {expected:?}, got {got:?}");
        }
        Ok(())
    }

    /// Makes room for `additional` more keys; doubles the capacity at least when it grows, but by pages in a
    /// [`PagePool`].
    ///
    /// # Errors
    /// More memory than can be addressed, than [`set_max_bytes`](Self::set_max_bytes) allows, than the pool has free pages, or
    /// than the device has (a CPU aborts there); the cache is then as before.
    pub fn reserve(&mut self, additional: usize) -> Result<()> {
        const SMALLEST: usize = 256;
        let (needed, shared) = (self.len.saturating_add(additional), self.shared());
        if needed <= self.capacity() {
            return Ok(());
        }
        self.forbid_capture("growth", "reserve room for all steps")?;
        if self.pages.is_some() {
            return self.take_pages(needed);
        }
        let wanted = self.own_capacity().saturating_mul(2).max(SMALLEST).saturating_add(shared);
        let capacity = self.affordable(needed, wanted)?;
        check_capacity(self.dims(), capacity, self.dtype())?;
        let code_capacity = code_capacity(capacity);
        let coarse_codes = self.coarse_codes.as_ref().map(|codes| with_room(codes, 2, code_capacity)).transpose()?;
        (self.kv, self.codes) = (with_room(&self.kv, 3, capacity - shared)?, with_room(&self.codes, 2, code_capacity)?);
        (self.coarse_codes, self.lent, self.lent_len) = (coarse_codes, Arc::default(), 0);
        self.version = next_version();
        Ok(())
    }

    /// Grows to `needed` positions by pages.
    fn take_pages(&mut self, needed: usize) -> Result<()> {
        let needed = needed.checked_next_multiple_of(PAGE).unwrap_or(usize::MAX);
        self.affordable(needed, needed)?;
        if let Some(pages) = &mut self.pages {
            pages.grow_to(needed, self.len, self.encoded)?;
        }
        self.version = next_version();
        Ok(())
    }

    /// The capacity to grow to: `wanted` keys, or as many as the budget has room for, if these are those that are `needed`.
    fn affordable(&self, needed: usize, wanted: usize) -> Result<usize> {
        let wanted = wanted.max(needed);
        let Some(max_bytes) = self.max_bytes.filter(|max_bytes| self.bytes_at(wanted) > *max_bytes) else {
            return Ok(wanted);
        };
        let shared = self.shared();
        let (least, sixteen) = (self.bytes_at(shared), self.bytes_at(shared + 16) - self.bytes_at(shared));
        let capacity = (shared + max_bytes.saturating_sub(least) / sixteen * 16).max(needed);
        let bytes = self.bytes_at(capacity);
        if bytes > max_bytes {
            bail!("PqKvCache: max_bytes: expected {needed} keys to take at most {max_bytes} bytes, got {bytes}");
        }
        Ok(capacity)
    }

    /// Bytes of this cache if it had room for `capacity` keys, and an index.
    fn bytes_at(&self, capacity: usize) -> usize {
        self.bytes_of(capacity.saturating_sub(self.shared()), capacity)
    }

    /// Bytes of a cache with room for so many keys of its own, for the codes of `capacity`, and with an index.
    fn bytes_of(&self, own: usize, capacity: usize) -> usize {
        let PqConfig { pq_dim, coarse, tail, query_weights, metric, .. } = self.config;
        let [b, h_kv, head_dim] = self.dims();
        let key = 2 * head_dim * self.dtype().size_in_bytes();
        let code = pq_dim + usize::from(coarse > 0);
        let augmented = if metric == Metric::InnerProduct { pq_dim } else { 0 };
        let centroids = self.config.n_centroids() * (head_dim + augmented) + coarse * head_dim;
        let weighted = if query_weights { centroids + head_dim } else { 0 };
        let sums = if tail == Tail::ClusterMeans { coarse * (head_dim + 1) } else { 0 };
        let index = (centroids + augmented + weighted + sums) * size_of::<f32>();
        let keys = own.saturating_mul(key).saturating_add(code_capacity(capacity).saturating_mul(code));
        keys.saturating_add(index).saturating_mul(b * h_kv)
    }

    /// Whether launches are recorded for a CUDA graph rather than run.
    pub(crate) fn is_capturing(&self) -> Result<bool> {
        match self.kv.device() {
            #[cfg(feature = "cuda")]
            Device::Cuda(device) => crate::cuda::is_capturing(device),
            _ => Ok(false),
        }
    }

    /// Fails where `what` would become a part of a captured graph.
    fn forbid_capture(&self, what: &str, instead: &str) -> Result<()> {
        if self.is_capturing()? {
            bail!("PqKvCache: {what}: expected none while a CUDA graph is captured: {instead} first");
        }
        Ok(())
    }

    /// Forgets all keys from position `len` on.
    ///
    /// # Errors
    /// A `len` beyond the end, or what the device gives; the cache is then as before.
    pub fn truncate(&mut self, len: usize) -> Result<()> {
        if len > self.len {
            bail!("PqKvCache: truncate: expected at most the {} keys there are, got {len}", self.len);
        }
        let shared = self.shared_until(len)?;
        self.set_len(len)?;
        if let Some(shared) = shared {
            (self.prefix, self.kv) = shared;
            self.version = next_version();
        }
        if let Some(pages) = &mut self.pages {
            let capacity = pages.capacity();
            pages.give_back(len);
            if pages.capacity() < capacity {
                self.version = next_version();
            }
        }
        self.queries.truncate(len)?;
        if matches!(self.trained, Some(Trained { end: Some(end), .. }) if end > len) {
            self.forget_codebook();
        }
        self.encoded = self.encoded.min(self.blocks_end(len));
        let start = self.config.init_offset();
        match &mut self.trained {
            // Summed again by the next step.
            Some(trained) if trained.summed > self.encoded => trained.forget_values(start),
            _ => Ok(()),
        }
    }

    /// What [`restore`](Self::restore) goes back to. Copies no numbers.
    pub(crate) fn checkpoint(&self) -> Checkpoint {
        Checkpoint { len: self.len, trained: self.trained.clone(), encoded: self.encoded }
    }

    /// Takes back what was appended and trained since, whether it ran or was only recorded for a graph.
    ///
    /// Codes and sums, which were written in place, are made anew at the end. On a GPU that takes no memory; where it fails
    /// all the same the next step does it.
    pub(crate) fn restore(&mut self, before: Checkpoint) -> Result<()> {
        let summed = before.trained.as_ref().map_or(0, |trained| trained.summed);
        if self.is_capturing()? {
            // Nothing ran, and nothing was trained.
            (self.len, self.encoded) = (before.len, before.encoded);
            if let Some(trained) = &mut self.trained {
                trained.summed = summed;
            }
            return self.queries.truncate(before.len);
        }
        self.truncate(before.len)?;
        let (start, version) = (self.config.init_offset(), |trained: &Trained| trained.version);
        let is_another = self.trained.as_ref().map(version) != before.trained.as_ref().map(version);
        if is_another {
            self.forget_codebook();
            self.trained = before.trained;
        }
        self.encoded = self.encoded.min(before.encoded);
        if let Some(trained) = self.trained.as_mut().filter(|trained| is_another || trained.summed > summed) {
            trained.forget_values(start)?;
        }
        self.encode(before.encoded)?;
        self.sum_values(summed)
    }

    fn set_len(&mut self, len: usize) -> Result<()> {
        self.forbid_capture("truncate", "call it")?;
        #[cfg(feature = "cuda")]
        if let Some(lens) = &mut self.lens {
            lens.set(len)?;
        }
        self.len = len;
        Ok(())
    }

    /// Forgets all keys, and the codebook unless it was handed in; keeps the memory. The same as `truncate(0)`.
    ///
    /// # Errors
    /// What the device gives.
    pub fn reset(&mut self) -> Result<()> {
        self.truncate(0)
    }

    /// Takes note of `steps` decode steps that a replayed CUDA graph took, each of one key: the device has moved on
    /// without the host. [`DecodeGraph`](crate::DecodeGraph) does this and what follows by itself.
    ///
    /// A step of [`PqAttention`](crate::PqAttention) reads lengths from the device, so that it can be captured once and
    /// replayed as the sequence grows. What the host needs is its own count, for the next step that is no replay. The
    /// capture itself counts as the first replay. A graph is valid until the cache grows, is truncated or trains, or a
    /// [`fork`](Self::fork) takes a copy of its own, so reserve room for all steps, and capture after [`build_index`](Self::build_index) and a first eager step.
    ///
    /// # Errors
    /// More steps than there is room for: replays beyond the capacity append nothing. Full blocks of keys without codes, which
    /// no replay encodes. Or a fork that reads what a replay would write to. The cache is then as before.
    pub fn advance(&mut self, steps: usize) -> Result<()> {
        let (len, room) = (self.len, self.capacity() - self.len);
        if steps > room {
            bail!(
                "PqKvCache: advance: expected at most {room} steps for {len} keys of {}, got {steps}",
                self.capacity()
            );
        }
        if steps == 0 {
            return Ok(());
        }
        if self.is_read_behind() {
            bail!("PqKvCache: advance: expected no fork to read what comes next, got {len} keys: append one first");
        }
        if !self.is_indexed(len) {
            let (end, encoded) = (self.blocks_end(len), self.encoded);
            bail!("PqKvCache: advance: expected codes up to key {end}, got {encoded}: call build_index first");
        }
        self.len += steps;
        // Every step of a graph that was captured with an index encodes the block that it fills.
        let end = self.blocks_end(self.len);
        if let Some(trained) = &mut self.trained {
            (self.encoded, trained.summed) = (end, end);
        }
        Ok(())
    }

    /// Keys so far, `[b, h_kv, n, head_dim]`: a view, or a copy of what lies in several pieces.
    ///
    /// # Errors
    /// What the device gives.
    pub fn keys(&self) -> Result<Tensor> {
        self.between(0, 0..self.len)
    }

    /// Values so far, `[b, h_kv, n, head_dim]`: a view, or a copy of what lies in several pieces.
    ///
    /// # Errors
    /// What the device gives.
    pub fn values(&self) -> Result<Tensor> {
        self.between(1, 0..self.len)
    }

    /// Codes of the keys that have some, `[b, h_kv, encoded - init_offset, pq_dim]` u8: a view, or a copy of pages.
    ///
    /// # Errors
    /// None in practice; narrowing a tensor returns a result.
    pub fn codes(&self) -> Result<Tensor> {
        self.of_encoded(&self.codes)
    }

    /// Clusters of the keys that have codes, `[b, h_kv, encoded - init_offset]` u8, as [`codes`](Self::codes); None without coarse
    /// clusters.
    ///
    /// # Errors
    /// None in practice; narrowing a tensor returns a result.
    pub fn coarse_codes(&self) -> Result<Option<Tensor>> {
        self.coarse_codes.as_ref().map(|codes| self.of_encoded(codes)).transpose()
    }

    fn of_encoded(&self, codes: &Tensor) -> Result<Tensor> {
        let start = self.config.init_offset();
        match self.trained {
            None => codes.narrow(2, 0, 0),
            Some(_) if self.encoded <= start => codes.narrow(2, 0, 0),
            Some(_) => self.codes_between(codes, start..self.encoded),
        }
    }

    /// What the values of each cluster sum to, over the keys that have codes; None without [`Tail::ClusterMeans`].
    pub fn clusters(&self) -> Option<&ClusterSums> {
        self.trained.as_ref()?.clusters.as_ref()
    }

    /// The codebook, once there is one.
    pub fn codebook(&self) -> Option<&Codebook> {
        self.trained.as_ref().map(|trained| &trained.codebook)
    }

    /// Keys so far, `n`.
    pub fn len(&self) -> usize {
        self.len
    }

    /// Whether there are no keys.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// Keys that fit before the next growth.
    pub fn capacity(&self) -> usize {
        self.shared() + self.own_capacity()
    }

    fn own_capacity(&self) -> usize {
        self.pages.as_ref().map_or(self.kv.dims()[3], Pages::capacity)
    }

    /// The config it was made with.
    pub fn config(&self) -> &PqConfig {
        &self.config
    }

    /// `[b, h_kv, head_dim]`
    pub fn dims(&self) -> [usize; 3] {
        let dims = self.kv.dims();
        [dims[1], dims[2], dims[4]]
    }

    /// The device of keys and values.
    pub(crate) fn device(&self) -> &Device {
        self.kv.device()
    }

    /// The dtype of keys and values.
    pub fn dtype(&self) -> DType {
        self.kv.dtype()
    }

    /// Bytes in use.
    pub fn memory(&self) -> Memory {
        let [b, h_kv, head_dim] = self.dims();
        let shared = self.pages.as_ref().map_or(self.shared(), |pages| pages.kv.inherited(self.len));
        let kv_bytes = 2 * b * h_kv * (self.len - shared) * head_dim * self.dtype().size_in_bytes();
        let encoded = if self.trained.is_some() { self.encoded - self.config.init_offset() } else { 0 };
        let key = self.config.pq_dim + usize::from(self.config.coarse > 0);
        let (codebook, clusters) =
            (self.codebook().map_or(0, Codebook::bytes), self.clusters().map_or(0, ClusterSums::bytes));
        Memory { kv_bytes, index_bytes: b * h_kv * encoded * key + codebook + clusters + self.queries.bytes() }
    }
}

/// A copy of `old` with room for `capacity` positions along `dim`.
fn with_room(old: &Tensor, dim: usize, capacity: usize) -> Result<Tensor> {
    let mut dims = old.dims().to_vec();
    // Codes of a fork that was cut into what it shares have more room than their keys.
    let kept = std::mem::replace(&mut dims[dim], capacity).min(capacity);
    point_of_failure()?;
    let new = Tensor::zeros(dims, old.dtype(), old.device())?;
    // Head by head: Candle's copy counts in 32 bits on a GPU.
    let (from, to) = (old.flatten_to(dim - 1)?, new.flatten_to(dim - 1)?);
    for head in 0..if kept > 0 { from.dims()[0] } else { 0 } {
        to.get(head)?.slice_set(&from.get(head)?.narrow(0, 0, kept)?, 0, 0)?;
    }
    Ok(new)
}

/// Copies `from`, `[b, h_kv, n, head_dim]`, to `to` from position `first` on, head by head as in [`with_room`].
fn copy_to(to: &Tensor, first: usize, from: &Tensor) -> Result<()> {
    let (b, h_kv, n, _) = from.dims4()?;
    for head in 0..if n > 0 { b * h_kv } else { 0 } {
        let of = |tensor: &Tensor| tensor.get(head / h_kv)?.get(head % h_kv);
        of(to)?.slice_set(&of(from)?, 0, first)?;
    }
    Ok(())
}

/// Positions that codes have room for: a multiple of 16, so that those of every head can be read 16 bytes at a time.
fn code_capacity(capacity: usize) -> usize {
    capacity.checked_next_multiple_of(16).unwrap_or(usize::MAX)
}

/// Fails where the bytes of the keys and values cannot be counted.
fn check_capacity(dims: [usize; 3], capacity: usize, dtype: DType) -> Result<()> {
    // Keys and values are one tensor. Codes are no more bytes, of a capacity rounded up.
    let positions = capacity.max(1).checked_next_multiple_of(16);
    let elements = dims.iter().fold(positions, |product, dim| product?.checked_mul(*dim));
    match elements.and_then(|elements| elements.checked_mul(2 * dtype.size_in_bytes())) {
        Some(bytes) if isize::try_from(bytes).is_ok() => Ok(()),
        _ => bail!(
            "PqKvCache: capacity: expected keys and values of less than {} bytes, got {capacity} of {dims:?}",
            isize::MAX
        ),
    }
}

#[cfg(test)]
mod tests;
