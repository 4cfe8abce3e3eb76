//! The calls of Candle's own cache, in front of this crate's.

use candle_core::{bail, Result, Tensor};

use crate::attention::PqAttention;
use crate::cache::PqKvCache;

/// A [`PqKvCache`] with the calls of `candle_nn::kv_cache::KvCache`, for models whose attention is yet to change.
///
/// [`append`](Self::append) returns all keys and values, which the model attends to as it did. Layer by layer, [`attend`]
/// then takes the place of `append` and of what follows it. Two things differ from Candle's: sequences are along
/// dimension 2, `[b, h_kv, s, head_dim]`, and the cache belongs to an attention.
///
/// ```
/// use candle_core::{DType, Device, Tensor};
/// use candle_pq_attn::{KvCache, PqAttention, PqConfig};
///
/// let attn = PqAttention::new(PqConfig::default(), 0.125)?;
/// let mut cache = KvCache::new(attn, 1024);
/// let q = Tensor::randn(0f32, 1., (1, 8, 600, 64), &Device::Cpu)?;
/// let kv = Tensor::randn(0f32, 1., (1, 2, 600, 64), &Device::Cpu)?;
/// let (k, v) = cache.append(&kv, &kv)?; // as before
/// assert_eq!((k.dims(), v.dims()), (kv.dims(), kv.dims()));
/// let (q, kv) = (q.narrow(2, 0, 1)?, kv.narrow(2, 0, 1)?);
/// let out = cache.attend(&q, &kv, &kv)?; // sparse, instead
/// assert_eq!(out.dims(), [1, 8, 1, 64]);
/// assert_eq!(cache.current_seq_len(), 601);
/// # candle_core::Result::Ok(())
/// ```
///
/// [`attend`]: Self::attend
#[derive(Debug)]
pub struct KvCache {
    attn: PqAttention,
    max_seq_len: usize,
    /// Made when the first keys say of which shape, type and device.
    cache: Option<PqKvCache>,
}

impl KvCache {
    /// A cache with room for `max_seq_len` keys; with more it grows.
    pub fn new(attn: PqAttention, max_seq_len: usize) -> Self {
        Self { attn, max_seq_len, cache: None }
    }

    /// Appends keys and values, `[b, h_kv, s, head_dim]`, and returns all of them so far, `[b, h_kv, n, head_dim]`: views.
    ///
    /// # Errors
    /// As [`PqAttention::new_cache`] and [`PqKvCache::append`]; the cache is then as before.
    pub fn append(&mut self, k: &Tensor, v: &Tensor) -> Result<(Tensor, Tensor)> {
        self.with(k, |_, cache| {
            cache.append(k, v)?;
            Ok((cache.keys()?, cache.values()?))
        })
    }

    /// Appends keys and values and attends to all of them: [`PqAttention::forward`].
    ///
    /// # Errors
    /// As [`PqAttention::new_cache`] and [`PqAttention::forward`]; the cache is then as before.
    pub fn attend(&mut self, q: &Tensor, k: &Tensor, v: &Tensor) -> Result<Tensor> {
        self.with(k, |attn, cache| attn.forward(q, k, v, cache))
    }

    /// Keys so far, `[b, h_kv, n, head_dim]`: a view; None before the first.
    ///
    /// # Errors
    /// None in practice; narrowing a tensor returns a result.
    pub fn k(&self) -> Result<Option<Tensor>> {
        self.cache.as_ref().map(PqKvCache::keys).transpose()
    }

    /// Values so far, `[b, h_kv, n, head_dim]`: a view; None before the first.
    ///
    /// # Errors
    /// None in practice; narrowing a tensor returns a result.
    pub fn v(&self) -> Result<Option<Tensor>> {
        self.cache.as_ref().map(PqKvCache::values).transpose()
    }

    /// Keys so far, `n`.
    pub fn current_seq_len(&self) -> usize {
        self.cache.as_ref().map_or(0, PqKvCache::len)
    }

    /// Forgets all keys and gives their memory back, as Candle's does.
    pub fn reset(&mut self) {
        self.cache = None;
    }

    /// The cache behind, once there are keys: to truncate, say, or to build its index early.
    pub fn inner(&mut self) -> Option<&mut PqKvCache> {
        self.cache.as_mut()
    }

    fn with<T>(&mut self, k: &Tensor, run: impl FnOnce(&PqAttention, &mut PqKvCache) -> Result<T>) -> Result<T> {
        if let Some(cache) = &mut self.cache {
            return run(&self.attn, cache);
        }
        let [b, h_kv, _, head_dim] = *k.dims() else {
            bail!("KvCache: keys: expected [b, h_kv, s, head_dim], got {:?}", k.dims());
        };
        let mut cache = self.attn.new_cache([b, h_kv, head_dim], self.max_seq_len, k.dtype(), k.device())?;
        let out = run(&self.attn, &mut cache)?;
        self.cache = Some(cache);
        Ok(out)
    }
}
