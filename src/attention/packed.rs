//! Steps of several sequences at once.

use candle_core::{bail, Result, Tensor};

use super::PqAttention;
use crate::cache::PqKvCache;

/// A sequence's share of a packed step.
struct Part<'a> {
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    cache: &'a mut PqKvCache,
}

impl PqAttention {
    /// As [`forward`](Self::forward) for each of several sequences, of any lengths, in one call: continuous batching, where
    /// some sequences decode a token while others read their prompts.
    ///
    /// New positions are packed along `s`, those of one sequence behind those of the one before, as a model computes what
    /// surrounds attention: `sequences` gives each one's cache and how many of them are its own. One with a single position
    /// decodes, sparsely; one with more is in prefill, densely. Each has a cache of its own, of one sequence, with
    /// its own length, codebook and [budget](PqKvCache::set_max_bytes), so that sequences come and go between steps; it may be
    /// a [`fork`](PqKvCache::fork) of another.
    ///
    /// On a GPU all sequences that decode sparsely are appended to, searched and attended to in the launches of one step, up to 16
    /// in each; longer ones have a larger share of the device. On a CPU, and in prefill, each costs what a call of
    /// [`forward`](Self::forward) for it does; what gains is the rest of the model, whose weights are read once for all of
    /// them.
    ///
    /// The same as a call of [`forward`](Self::forward) for each, whatever else is in the batch: on a CPU to the bit, on a GPU
    /// to within rounding. But if one fails all caches are as before.
    ///
    /// # Shapes
    /// - `query`: `[1, h, s, head_dim]`, `keys` and `values`: `[1, h_kv, s, head_dim]`, with `s` the sum of the sequences'
    ///   positions
    /// - returns `[1, h, s, head_dim]`, the dtype of the query
    ///
    /// # Errors
    /// No sequence, one without a position, positions that do not add up to `s`, a cache of a batch; and as
    /// [`forward`](Self::forward).
    ///
    /// ```
    /// use candle_core::{DType, Device, Tensor};
    /// use candle_pq_attn::{PqAttention, PqConfig};
    ///
    /// let attn = PqAttention::new(PqConfig::default(), 0.125)?;
    /// let cache = || attn.new_cache([1, 2, 64], 0, DType::F32, &Device::Cpu);
    /// let random = |heads, s| Tensor::randn(0f32, 1., (1, heads, s, 64), &Device::Cpu);
    /// let (mut old, mut new) = (cache()?, cache()?);
    /// attn.forward(&random(8, 1500)?, &random(2, 1500)?, &random(2, 1500)?, &mut old)?;
    ///
    /// // a token of the one, and the prompt of the other
    /// let (q, k, v) = (random(8, 301)?, random(2, 301)?, random(2, 301)?);
    /// let out = attn.forward_packed(&q, &k, &v, [(&mut old, 1), (&mut new, 300)])?;
    /// assert_eq!(out.dims(), [1, 8, 301, 64]);
    /// assert_eq!((old.len(), new.len()), (1501, 300));
    /// # candle_core::Result::Ok(())
    /// ```
    pub fn forward_packed<'a>(
        &self,
        query: &Tensor,
        keys: &Tensor,
        values: &Tensor,
        sequences: impl IntoIterator<Item = (&'a mut PqKvCache, usize)>,
    ) -> Result<Tensor> {
        let mut parts = cut([query, keys, values], sequences)?;
        for part in &parts {
            self.check(&part.query, &part.keys, part.cache)?;
            part.cache.check_new(&part.keys, &part.values)?;
        }
        for part in &mut parts {
            part.cache.reserve(part.keys.dims()[2])?;
        }
        let before: Vec<_> = parts.iter().map(|part| part.cache.checkpoint()).collect();
        let out = self.forward_parts(query, &mut parts);
        if out.is_err() {
            // All of them, even where one cannot be.
            let restored: Vec<_> =
                parts.into_iter().zip(before).map(|(part, before)| part.cache.restore(before)).collect();
            restored.into_iter().collect::<Result<()>>()?;
        }
        out
    }

    fn forward_parts(&self, query: &Tensor, parts: &mut [Part]) -> Result<Tensor> {
        let mut outs = vec![None; parts.len()];
        if let Some((places, out)) = self.decode_parts(query, parts)? {
            if places.len() == parts.len() {
                return Ok(out);
            }
            for (i, place) in places.into_iter().enumerate() {
                outs[place] = Some(out.narrow(2, i, 1)?);
            }
        }
        let out = |(part, out): (&mut Part, Option<Tensor>)| match out {
            Some(out) => Ok(out),
            None => self.forward(&part.query, &part.keys, &part.values, part.cache),
        };
        let outs = parts.iter_mut().zip(outs).map(out).collect::<Result<Vec<_>>>()?;
        Tensor::cat(&outs, 2)
    }

    /// On a CPU all parts take their steps one by one.
    #[cfg(not(feature = "cuda"))]
    fn decode_parts(&self, _: &Tensor, _: &mut [Part]) -> Result<Option<(Vec<usize>, Tensor)>> {
        Ok(None)
    }

    /// On a GPU the step of all parts that decode sparsely, whose places are returned with what they attended to; None if no
    /// two do.
    #[cfg(feature = "cuda")]
    fn decode_parts(&self, query: &Tensor, parts: &mut [Part]) -> Result<Option<(Vec<usize>, Tensor)>> {
        let decodes = |part: &Part| part.query.dims()[2] == 1 && !self.config.is_dense(part.cache.len() + 1);
        let count = parts.len();
        let (places, steps): (Vec<_>, Vec<_>) = parts.iter_mut().enumerate().filter(|(_, part)| decodes(part)).unzip();
        if steps.len() < 2 || !query.device().is_cuda() {
            return Ok(None);
        }
        let query = match steps.len() == count {
            true => query.clone(),
            false => Tensor::cat(&steps.iter().map(|part| &part.query).collect::<Vec<_>>(), 2)?,
        };
        let query = query.detach();
        let mut new: Vec<_> =
            steps.into_iter().map(|part| (&mut *part.cache, [part.keys.detach(), part.values.detach()])).collect();
        if let Some(out) = self.steps_together(&query, &mut new)? {
            return Ok(Some((places, out)));
        }
        PqKvCache::append_together(&mut new)?;
        let mut caches: Vec<_> = new.into_iter().map(|(cache, _)| cache).collect();
        let indexes = caches.iter_mut().map(|cache| cache.index()).collect::<Result<Vec<_>>>()?;
        let sequences =
            caches.iter().zip(indexes).filter_map(|(cache, index)| cache.on_gpu(Some(index), 0).transpose());
        if let Some(out) = self.decode_together(&query, &sequences.collect::<Result<Vec<_>>>()?, None)? {
            return Ok(Some((places, out)));
        }
        let single = |(i, cache): (usize, &mut PqKvCache)| self.sparse_decode(&query.narrow(2, i, 1)?, cache);
        let outs = caches.into_iter().enumerate().map(single).collect::<Result<Vec<_>>>()?;
        Ok(Some((places, Tensor::cat(&outs, 2)?)))
    }
}

/// Cuts queries, keys and values, packed along dimension 2, into what is each sequence's.
fn cut<'a>(
    qkv: [&Tensor; 3],
    sequences: impl IntoIterator<Item = (&'a mut PqKvCache, usize)>,
) -> Result<Vec<Part<'a>>> {
    for (tensor, name) in qkv.into_iter().zip(["query", "keys", "values"]) {
        match *tensor.dims() {
            [1, _, s, _] if s == qkv[0].dims()[2] => {}
            _ => bail!("PqAttention: {name}: expected [1, heads, s, head_dim] of one s, got {:?}", tensor.dims()),
        }
    }
    let sequences: Vec<_> = sequences.into_iter().collect();
    let (s, counts): (_, Vec<_>) = (qkv[0].dims()[2], sequences.iter().map(|(_, count)| *count).collect());
    if counts.contains(&0) || counts.iter().try_fold(0usize, |sum, count| sum.checked_add(*count)) != Some(s) || s == 0
    {
        bail!("PqAttention: sequences: expected at least a position each, {s} in all as the query has, got {counts:?}");
    }
    let mut first = 0;
    let part = |(cache, count): (&'a mut PqKvCache, usize)| {
        if cache.dims()[0] != 1 {
            bail!("PqAttention: sequences: expected caches of one sequence, got one of {}", cache.dims()[0]);
        }
        let [query, keys, values] = qkv.map(|tensor| tensor.narrow(2, first, count));
        first += count;
        Ok(Part { query: query?, keys: keys?, values: values?, cache })
    };
    sequences.into_iter().map(part).collect()
}
