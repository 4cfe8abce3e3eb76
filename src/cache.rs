//! The KV cache of one layer, with the index that a sparse decode searches.

use candle_core::{bail, DType, Device, Result, Tensor};

use crate::codebook::Codebook;
use crate::config::PqConfig;

/// Keys, values and codes of one layer, `[b, h_kv, n, ...]`, growing along `n`.
///
/// - **Growth.** [`append`](Self::append) writes the new keys and values behind the old ones. Capacity doubles when it
///   runs out, so an append costs amortised O(1) a key; give [`new`](Self::new) the final length and nothing is ever
///   copied.
/// - **Index.** The codebook is trained when a decode first wants it, on the keys from `init_offset` to the last one,
///   and again whenever the keys have doubled since, until `max_train_keys` were seen: a codebook of a short prompt
///   does not have to serve a long answer. Keys are encoded in blocks, just before the first of them leaves the window.
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
}

/// Bytes in use, as opposed to reserved.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Memory {
    /// Keys and values.
    pub kv_bytes: usize,
    /// Codes and codebook.
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
        let encoded = config.init_offset();
        Ok(Self { config, keys, values, codes, len: 0, index: None, encoded })
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
        (self.keys, self.values, self.codes) = (grown(&self.keys)?, grown(&self.values)?, grown(&self.codes)?);
        Ok(())
    }

    /// Brings the index up to date now, rather than in the next decode step: trains the codebook if one is due, and
    /// encodes every key. Does nothing while there are fewer keys than centroids.
    ///
    /// # Errors
    /// What the device gives.
    pub fn build_index(&mut self) -> Result<()> {
        self.train_if_due()?;
        self.encode_up_to(self.len)
    }

    /// Codebook and codes of all candidates.
    pub(crate) fn index(&mut self) -> Result<(&Codebook, Tensor)> {
        self.train_if_due()?;
        let candidates = self.config.candidates(self.len);
        self.encode_up_to(candidates.end)?;
        match &self.index {
            None => bail!(
                "PqKvCache: index: expected at least n_centroids {} keys from init_offset {} on, got {} keys",
                self.config.n_centroids(),
                self.config.init_offset(),
                self.len
            ),
            Some(index) => Ok((&index.codebook, self.codes.narrow(2, candidates.start, candidates.len())?)),
        }
    }

    fn train_if_due(&mut self) -> Result<()> {
        let start = self.config.init_offset();
        let trainable = self.len.saturating_sub(start);
        let due = match &self.index {
            None => trainable >= self.config.n_centroids(),
            Some(Index { trained: None, .. }) => false,
            Some(Index { trained: Some(end), .. }) => {
                let trained = end - start;
                trained < self.config.max_train_keys && trainable >= 2 * trained
            }
        };
        if due {
            let codebook = Codebook::train(&self.keys.narrow(2, start, trainable)?, &self.config)?;
            self.index = Some(Index { codebook, trained: Some(self.len) });
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
            self.codes.slice_set(&index.codebook.encode(&keys)?, 2, self.encoded)?;
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
        self.index = Some(Index { codebook, trained: None });
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
        Ok(())
    }

    /// Forgets all keys, and the codebook unless it was handed in; keeps the memory.
    pub fn reset(&mut self) {
        self.len = 0;
        self.encoded = self.config.init_offset();
        self.index.take_if(|index| index.trained.is_some());
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
        let start = self.config.init_offset();
        match self.index {
            None => self.codes.narrow(2, 0, 0),
            Some(_) if self.encoded <= start => self.codes.narrow(2, 0, 0),
            Some(_) => self.codes.narrow(2, start, self.encoded - start),
        }
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
        let codebook = self.codebook().map_or(0, Codebook::bytes);
        Memory { kv_bytes, index_bytes: b * h_kv * encoded * self.config.pq_dim + codebook }
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
