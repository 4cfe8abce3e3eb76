//! Several sequences in one step.

use anyhow::Result;
use candle_core::{DType, Tensor};
use candle_pq_attn::PqKvCache;

use super::{Attention, Model};

/// A text that goes on from what a model has read, beside others that do.
pub struct Sequence {
    /// One a layer.
    caches: Vec<PqKvCache>,
}

impl Model {
    /// A sequence that goes on from the tokens so far, with room for `tokens` more.
    pub fn fork(&mut self, tokens: usize) -> Result<Sequence> {
        let fork = |cache: &mut PqKvCache| {
            let mut cache = cache.fork()?;
            cache.reserve(tokens)?;
            Ok(cache)
        };
        Ok(Sequence { caches: self.caches.iter_mut().map(fork).collect::<candle_core::Result<_>>()? })
    }

    /// Appends tokens to each of some sequences, at least one, and returns the logits after the last of each, f32 on the
    /// host. One token attends sparsely, several to all keys. The weights are read once for all of them.
    pub fn step(&self, sequences: &mut [(&mut Sequence, &[u32])]) -> Result<Vec<Vec<f32>>> {
        let (mut tokens, mut positions, mut last) = (Vec::new(), Vec::new(), Vec::new());
        for (sequence, new) in sequences.iter() {
            let start = sequence.caches.first().map_or(0, PqKvCache::len);
            tokens.extend_from_slice(new);
            positions.extend((start..start + new.len()).map(|position| position as u32));
            last.push(tokens.len() as u32 - 1);
        }
        let on_device = |numbers: Vec<u32>| Tensor::new(numbers, self.decoder.device());
        let (tokens, positions, last) = (on_device(tokens)?, on_device(positions)?, on_device(last)?);
        let hidden = self.decoder.forward_at(&tokens, &positions, |layer, q, k, v| {
            let caches = sequences.iter_mut().map(|(sequence, new)| (&mut sequence.caches[layer], new.len()));
            self.attention.attend_packed(layer, [q, k, v], caches)
        })?;
        let logits = self.decoder.logits(&hidden.index_select(&last, 1)?)?;
        Ok(logits.squeeze(0)?.to_dtype(DType::F32)?.to_vec2()?)
    }
}

impl Attention {
    /// Of queries, keys and values that are packed along dimension 2: of each cache so many.
    fn attend_packed<'a>(
        &self,
        layer: usize,
        [q, k, v]: [&Tensor; 3],
        caches: impl Iterator<Item = (&'a mut PqKvCache, usize)>,
    ) -> Result<Tensor> {
        if self.is_sparse(layer) {
            return Ok(self.pq[layer].forward_packed(q, k, v, caches)?);
        }
        let mut first = 0;
        let attend = |(cache, count): (&mut PqKvCache, usize)| {
            let [q, k, v] = [q, k, v].map(|tensor| tensor.narrow(2, first, count));
            first += count;
            self.attend(layer, [&q?, &k?, &v?], cache, false)
        };
        Ok(Tensor::cat(&caches.map(attend).collect::<Result<Vec<_>>>()?, 2)?)
    }
}
