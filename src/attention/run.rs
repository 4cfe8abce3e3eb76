//! Sparse attention for several positions of one sequence.

use candle_core::{Result, Tensor};

use super::PqAttention;
use crate::cache::PqKvCache;

impl PqAttention {
    /// As [`forward`](Self::forward) for each position in turn: sparse attention for every query of a short run, of which
    /// each sees the keys before it and its own. For speculative decoding, which has a model judge a few drafted tokens in
    /// one call.
    ///
    /// The same as `s` calls with one position each, on a CPU to the bit and on a GPU to within rounding; but if one fails the
    /// cache is as before all of them.
    /// Afterwards take back the tokens that were refused by [`PqKvCache::truncate`]. It forgets a codebook that was trained
    /// on one of them: call [`PqKvCache::build_index`] before the run, and rarely any is.
    ///
    /// On a GPU the positions of a run are searched and attended to in the launches of one step, but where a block of keys
    /// fills or a codebook is trained. On a CPU a run costs what its steps do: only what surrounds attention gains from being
    /// one call. A prompt is [`forward`](Self::forward)'s.
    ///
    /// # Shapes
    /// As [`forward`](Self::forward): `query`: `[b, h, s, head_dim]`, `keys` and `values`: `[b, h_kv, s, head_dim]`; returns
    /// `[b, h, s, head_dim]`
    ///
    /// # Errors
    /// As [`forward`](Self::forward).
    ///
    /// ```
    /// use candle_core::{DType, Device, Tensor};
    /// use candle_pq_attn::{PqAttention, PqConfig};
    ///
    /// let attn = PqAttention::new(PqConfig::default(), 0.125)?;
    /// let mut cache = attn.new_cache([1, 2, 64], 2048, DType::F32, &Device::Cpu)?;
    /// let random = |heads, s| Tensor::randn(0f32, 1., (1, heads, s, 64), &Device::Cpu);
    /// attn.forward(&random(8, 1500)?, &random(2, 1500)?, &random(2, 1500)?, &mut cache)?;
    ///
    /// cache.build_index()?;
    /// let out = attn.forward_run(&random(8, 4)?, &random(2, 4)?, &random(2, 4)?, &mut cache)?;
    /// assert_eq!(out.dims(), [1, 8, 4, 64]);
    /// cache.truncate(1502)?; // two of four drafted tokens were right
    /// # candle_core::Result::Ok(())
    /// ```
    pub fn forward_run(&self, query: &Tensor, keys: &Tensor, values: &Tensor, cache: &mut PqKvCache) -> Result<Tensor> {
        self.check(query, keys, cache)?;
        let added = cache.check_new(keys, values)?;
        cache.reserve(added)?;
        let before = cache.checkpoint();
        let out = self.run([query, keys, values], added, cache);
        if out.is_err() {
            cache.restore(before)?;
        }
        out
    }

    fn run(&self, qkv: [&Tensor; 3], added: usize, cache: &mut PqKvCache) -> Result<Tensor> {
        let (mut outs, mut first) = (Vec::new(), 0);
        while first < added {
            let positions = |tensor: &Tensor, count| tensor.narrow(2, first, count);
            #[cfg(feature = "cuda")]
            {
                let count = cache.steps_alike(added - first);
                let [query, keys, values] = qkv.map(|tensor| positions(tensor, count));
                if let Some(out) = self.steps_on_gpu([query?, keys?, values?], cache)? {
                    outs.push(out);
                    first += count;
                    continue;
                }
            }
            let [query, keys, values] = qkv.map(|tensor| positions(tensor, 1));
            outs.push(self.forward(&query?, &keys?, &values?, cache)?);
            first += 1;
        }
        match &*outs {
            [out] => Ok(out.clone()),
            outs => Tensor::cat(outs, 2),
        }
    }

    /// Steps that search the same index, all at once; None where there are no kernels for it, and for a single one.
    #[cfg(feature = "cuda")]
    fn steps_on_gpu(&self, [query, keys, values]: [Tensor; 3], cache: &mut PqKvCache) -> Result<Option<Tensor>> {
        let steps = query.dims()[2];
        if steps < 2 || !query.device().is_cuda() || cache.is_capturing()? {
            return Ok(None);
        }
        let before = cache.checkpoint();
        cache.append(&keys.detach(), &values.detach())?;
        let index = cache.index()?;
        let step = |i: usize| cache.on_gpu(Some(index.clone()), steps - 1 - i);
        let sequences = (0..steps).filter_map(|i| step(i).transpose()).collect::<Result<Vec<_>>>()?;
        let out = self.decode_together(&query.detach(), &sequences, None)?;
        drop(sequences);
        if out.is_none() {
            cache.restore(before)?;
        }
        Ok(out)
    }
}
