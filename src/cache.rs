//! The KV cache of one layer, with the index that a sparse decode searches.

use candle_core::{bail, DType, Device, Result, Tensor};

use crate::codebook::Codebook;
use crate::config::{PqConfig, Tail};
use crate::ops::{self, ClusterSums};

/// Keys, values and codes of one layer, `[b, h_kv, n, ...]`, growing along `n`.
///
/// - **Growth.** [`append`](Self::append) writes the new keys and values behind the old ones. Capacity doubles when it
///   runs out, so an append costs amortised O(1) a key; give [`new`](Self::new) the final length and nothing is ever
///   copied.
/// - **Index.** The codebook is trained when a decode first wants it, on the keys from `init_offset` to the last one,
///   and again whenever the keys have doubled since, until `max_train_keys` were seen: a codebook of a short prompt
///   does not have to serve a long answer. Keys are encoded in blocks, just before the first of them leaves the window.
/// - **Tail.** With [`Tail::ClusterMeans`] it also sums the values of each cluster, over the candidates and as many keys
///   of the window as make whole windows: a window of values is added at a time, and which they are depends on `n` alone.
/// - **Going back.** [`truncate`](Self::truncate) forgets the last keys. If the codebook was trained on some of them it
///   is forgotten too, so an index never remembers keys that are gone.
///
/// What [`keys`](Self::keys), [`values`](Self::values) and [`codes`](Self::codes) return are views: valid until the
/// positions they show are truncated and written again or, for codes, the codebook is trained again.
#[derive(Debug)]
pub struct PqKvCache {
    config: PqConfig,
    keys: Tensor,
    values: Tensor,
    codes: Tensor,
    /// `[b, h_kv, capacity]`, with coarse clusters.
    coarse_codes: Option<Tensor>,
    len: usize,
    index: Option<Index>,
    /// Keys from `init_offset` up to here have codes.
    encoded: usize,
}

#[derive(Debug)]
struct Index {
    codebook: Codebook,
    /// End of the keys it was trained on; None for a codebook that was handed in.
    trained: Option<usize>,
    /// What the values of each cluster sum to, and the end of the keys whose values they are; None: of none.
    clusters: Option<(ClusterSums, usize)>,
}

/// What a decode step searches.
pub(crate) struct Candidates<'a> {
    pub(crate) codebook: &'a Codebook,
    pub(crate) codes: Tensor,
    pub(crate) coarse_codes: Option<Tensor>,
    pub(crate) clusters: Option<&'a ClusterSums>,
}

/// Bytes in use, as opposed to reserved.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Memory {
    /// Keys and values.
    pub kv_bytes: usize,
    /// Codes, codebook and sums of clusters.
    pub index_bytes: usize,
}

impl PqKvCache {
    /// A cache for `batch` sequences with room for `capacity` keys (0: grow from the first append).
    ///
    /// # Errors
    /// A config that does not suit `head_dim`, no sequences or heads, or a dtype other than f32, f16 and bf16.
    pub fn new(
        config: PqConfig,
        [batch, kv_heads, head_dim]: [usize; 3],
        capacity: usize,
        dtype: DType,
        device: &Device,
    ) -> Result<Self> {
        config.validate(head_dim)?;
        if batch == 0 || kv_heads == 0 {
            bail!("PqKvCache: expected at least one sequence and one KV head, got batch {batch}, h_kv {kv_heads}");
        }
        if !matches!(dtype, DType::F32 | DType::F16 | DType::BF16) {
            bail!("PqKvCache: dtype: expected f32, f16 or bf16, got {}", dtype.as_str());
        }
        check_capacity([batch, kv_heads, head_dim], capacity, dtype)?;
        #[cfg(feature = "cuda")]
        if let Device::Cuda(device) = device {
            crate::cuda::prepare(device)?;
        }
        let keys = Tensor::zeros((batch, kv_heads, capacity, head_dim), dtype, device)?;
        let values = Tensor::zeros((batch, kv_heads, capacity, head_dim), dtype, device)?;
        let codes = Tensor::zeros((batch, kv_heads, capacity, config.pq_dim), DType::U8, device)?;
        let coarse_codes = match config.coarse {
            0 => None,
            _ => Some(Tensor::zeros((batch, kv_heads, capacity), DType::U8, device)?),
        };
        let encoded = config.init_offset();
        Ok(Self { config, keys, values, codes, coarse_codes, len: 0, index: None, encoded })
    }

    /// Appends keys and values, `[b, h_kv, s, head_dim]` each, any `s` and any strides.
    ///
    /// # Errors
    /// Another shape, dtype or device; the cache is then as before.
    pub fn append(&mut self, keys: &Tensor, values: &Tensor) -> Result<()> {
        self.check(keys, "keys")?;
        self.check(values, "values")?;
        let added = keys.dims()[2];
        if values.dims()[2] != added {
            bail!("PqKvCache: values: expected as many as keys ({added}), got {}", values.dims()[2]);
        }
        if added == 0 {
            return Ok(());
        }
        self.reserve(added)?;
        self.keys.slice_set(&keys.contiguous()?, 2, self.len)?;
        self.values.slice_set(&values.contiguous()?, 2, self.len)?;
        self.len += added;
        Ok(())
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
        if !tensor.device().same_device(self.keys.device()) {
            let (expected, got) = (self.keys.device().location(), tensor.device().location());
            bail!("PqKvCache: {name}: expected device {expected:?}, got {got:?}");
        }
        Ok(())
    }

    /// Makes room for `additional` more keys; doubles the capacity at least when it grows.
    ///
    /// # Errors
    /// More memory than can be addressed, or than the device has (a CPU aborts there); the cache is then as before.
    pub fn reserve(&mut self, additional: usize) -> Result<()> {
        const SMALLEST: usize = 256;
        let (needed, capacity) = (self.len.saturating_add(additional), self.keys.dims()[2]);
        if needed <= capacity {
            return Ok(());
        }
        let capacity = needed.max(2 * capacity).max(SMALLEST);
        check_capacity(self.dims(), capacity, self.dtype())?;
        let grown = |old: &Tensor| {
            let mut dims = old.dims().to_vec();
            dims[2] = capacity;
            let new = Tensor::zeros(dims, old.dtype(), old.device())?;
            if old.elem_count() > 0 {
                new.slice_set(old, 2, 0)?;
            }
            Ok::<_, candle_core::Error>(new)
        };
        let coarse_codes = self.coarse_codes.as_ref().map(grown).transpose()?;
        (self.keys, self.values, self.codes) = (grown(&self.keys)?, grown(&self.values)?, grown(&self.codes)?);
        self.coarse_codes = coarse_codes;
        Ok(())
    }

    /// Brings the index up to date now, rather than in the next decode step: trains the codebook if one is due, and
    /// encodes every key. Does nothing while there are fewer keys than centroids or clusters.
    ///
    /// # Errors
    /// What the device gives.
    pub fn build_index(&mut self) -> Result<()> {
        self.train_if_due()?;
        self.encode_up_to(self.len)?;
        self.sum_clusters()
    }

    /// Codebook, codes and clusters of all candidates.
    pub(crate) fn index(&mut self) -> Result<Candidates<'_>> {
        self.train_if_due()?;
        let candidates = self.config.candidates(self.len);
        self.encode_up_to(candidates.end)?;
        self.sum_clusters()?;
        let of_candidates = |codes: &Tensor| codes.narrow(2, candidates.start, candidates.len());
        match &self.index {
            None => bail!(
                "PqKvCache: index: expected at least {} keys (n_centroids, coarse) from init_offset {} on, got {} keys",
                self.config.min_train_keys(),
                self.config.init_offset(),
                self.len
            ),
            Some(index) => Ok(Candidates {
                codebook: &index.codebook,
                codes: of_candidates(&self.codes)?,
                coarse_codes: self.coarse_codes.as_ref().map(of_candidates).transpose()?,
                clusters: index.clusters.as_ref().map(|(clusters, _)| clusters),
            }),
        }
    }

    /// Has the clusters sum the values of the candidates, and those that the candidates lack to whole windows.
    ///
    /// A rule that depends on `n` alone: whatever came before, the same keys give the same sums.
    fn sum_clusters(&mut self) -> Result<()> {
        if self.config.tail == Tail::None {
            return Ok(());
        }
        let [b, h_kv, head_dim] = self.dims();
        let (first, candidates) = (self.config.init_offset(), self.config.candidates(self.len).len());
        let end = first + candidates.next_multiple_of(self.config.window.max(1));
        self.encode_up_to(end)?;
        let (Some(index), Some(codes)) = (&mut self.index, &self.coarse_codes) else { return Ok(()) };
        let (before, start) = match index.clusters.take_if(|(_, summed)| *summed <= end) {
            Some(clusters) => clusters,
            None => {
                let dims = [b, h_kv, self.config.coarse, head_dim];
                (ClusterSums::empty(dims, self.values.device())?, first)
            }
        };
        let clusters = match end - start {
            0 => before,
            added => {
                let (values, codes) = (self.values.narrow(2, start, added)?, codes.narrow(2, start, added)?);
                ops::cluster_sums(&values, &codes, &before)?
            }
        };
        index.clusters = Some((clusters, end));
        Ok(())
    }

    fn train_if_due(&mut self) -> Result<()> {
        let start = self.config.init_offset();
        let trainable = self.len.saturating_sub(start);
        let due = match &self.index {
            None => trainable >= self.config.min_train_keys(),
            Some(Index { trained: None, .. }) => false,
            Some(Index { trained: Some(end), .. }) => {
                let trained = end - start;
                trained < self.config.max_train_keys && trainable >= 2 * trained
            }
        };
        if due {
            let codebook = Codebook::train(&self.keys.narrow(2, start, trainable)?, &self.config)?;
            self.index = Some(Index { codebook, trained: Some(self.len), clusters: None });
            self.encoded = start;
        }
        Ok(())
    }

    /// Encodes the keys that have no codes yet if one before `end` is among them: then all, the window's as well, so
    /// that the next time comes only when those have left it.
    fn encode_up_to(&mut self, end: usize) -> Result<()> {
        let Some(index) = &self.index else { return Ok(()) };
        if self.encoded < end {
            let keys = self.keys.narrow(2, self.encoded, self.len - self.encoded)?;
            let (codes, coarse_codes) = index.codebook.encode(&keys)?;
            self.codes.slice_set(&codes, 2, self.encoded)?;
            if let (Some(all), Some(new)) = (&self.coarse_codes, coarse_codes) {
                all.slice_set(&new, 2, self.encoded)?;
            }
            self.encoded = self.len;
        }
        Ok(())
    }

    /// Uses a codebook trained elsewhere, which is then never trained again.
    ///
    /// # Errors
    /// A codebook of other dimensions or another metric than the cache and its config.
    pub fn set_codebook(&mut self, codebook: Codebook) -> Result<()> {
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
        self.index = Some(Index { codebook, trained: None, clusters: None });
        self.encoded = self.config.init_offset();
        Ok(())
    }

    /// Forgets all keys from position `len` on.
    ///
    /// # Errors
    /// A `len` beyond the end; the cache is then as before.
    pub fn truncate(&mut self, len: usize) -> Result<()> {
        if len > self.len {
            bail!("PqKvCache: truncate: expected at most the {} keys there are, got {len}", self.len);
        }
        self.len = len;
        let start = self.config.init_offset();
        if matches!(self.index, Some(Index { trained: Some(end), .. }) if end > len) {
            self.index = None;
            self.encoded = start;
        }
        self.encoded = self.encoded.min(len).max(start);
        self.forget_sums_beyond(len);
        Ok(())
    }

    /// Forgets all keys, and the codebook unless it was handed in; keeps the memory.
    pub fn reset(&mut self) {
        self.len = 0;
        self.encoded = self.config.init_offset();
        self.index.take_if(|index| index.trained.is_some());
        self.forget_sums_beyond(0);
    }

    /// Forgets sums that have values of keys from position `len` on; the next step sums what is left.
    fn forget_sums_beyond(&mut self, len: usize) {
        if let Some(index) = &mut self.index {
            index.clusters.take_if(|(_, end)| *end > len);
        }
    }

    /// Keys so far, `[b, h_kv, n, head_dim]`: a view.
    ///
    /// # Errors
    /// None in practice; narrowing a tensor returns a result.
    pub fn keys(&self) -> Result<Tensor> {
        self.keys.narrow(2, 0, self.len)
    }

    /// Values so far, `[b, h_kv, n, head_dim]`: a view.
    ///
    /// # Errors
    /// None in practice; narrowing a tensor returns a result.
    pub fn values(&self) -> Result<Tensor> {
        self.values.narrow(2, 0, self.len)
    }

    /// Codes of the keys that have some, `[b, h_kv, encoded - init_offset, pq_dim]` u8: a view.
    ///
    /// # Errors
    /// None in practice; narrowing a tensor returns a result.
    pub fn codes(&self) -> Result<Tensor> {
        self.of_encoded(&self.codes)
    }

    /// Clusters of the keys that have codes, `[b, h_kv, encoded - init_offset]` u8: a view; None without coarse clusters.
    ///
    /// # Errors
    /// None in practice; narrowing a tensor returns a result.
    pub fn coarse_codes(&self) -> Result<Option<Tensor>> {
        self.coarse_codes.as_ref().map(|codes| self.of_encoded(codes)).transpose()
    }

    fn of_encoded(&self, codes: &Tensor) -> Result<Tensor> {
        let start = self.config.init_offset();
        match self.index {
            None => codes.narrow(2, 0, 0),
            Some(_) if self.encoded <= start => codes.narrow(2, 0, 0),
            Some(_) => codes.narrow(2, start, self.encoded - start),
        }
    }

    /// What the values of each cluster sum to, once a step with [`Tail::ClusterMeans`] wanted it.
    pub fn clusters(&self) -> Option<&ClusterSums> {
        self.index.as_ref()?.clusters.as_ref().map(|(clusters, _)| clusters)
    }

    /// The codebook, once there is one.
    pub fn codebook(&self) -> Option<&Codebook> {
        self.index.as_ref().map(|index| &index.codebook)
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
        self.keys.dims()[2]
    }

    /// The config it was made with.
    pub fn config(&self) -> &PqConfig {
        &self.config
    }

    /// `[b, h_kv, head_dim]`
    pub fn dims(&self) -> [usize; 3] {
        let dims = self.keys.dims();
        [dims[0], dims[1], dims[3]]
    }

    /// The dtype of keys and values.
    pub fn dtype(&self) -> DType {
        self.keys.dtype()
    }

    /// Bytes in use.
    pub fn memory(&self) -> Memory {
        let [b, h_kv, head_dim] = self.dims();
        let kv_bytes = 2 * b * h_kv * self.len * head_dim * self.dtype().size_in_bytes();
        let encoded = if self.index.is_some() { self.encoded - self.config.init_offset() } else { 0 };
        let key = self.config.pq_dim + usize::from(self.config.coarse > 0);
        let (codebook, clusters) =
            (self.codebook().map_or(0, Codebook::bytes), self.clusters().map_or(0, ClusterSums::bytes));
        Memory { kv_bytes, index_bytes: b * h_kv * encoded * key + codebook + clusters }
    }
}

/// Fails where the bytes of the keys cannot be counted.
fn check_capacity(dims: [usize; 3], capacity: usize, dtype: DType) -> Result<()> {
    let bytes = dims.iter().try_fold(capacity, |product, dim| product.checked_mul(*dim));
    match bytes.and_then(|elements| elements.checked_mul(dtype.size_in_bytes())) {
        Some(bytes) if isize::try_from(bytes).is_ok() => Ok(()),
        _ => bail!("PqKvCache: capacity: expected keys of less than {} bytes, got {capacity} of {dims:?}", isize::MAX),
    }
}
