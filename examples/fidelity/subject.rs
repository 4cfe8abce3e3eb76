//! The model on its text: what dense attention computes, and what it computes with another.

use anyhow::{ensure, Result};
use candle_core::{DType, Device, Tensor};
use candle_pq_attn::{PqAttention, PqConfig};
use indicatif::ProgressBar;
use rayon::prelude::*;

use crate::attend::{attend, Plan, Queries};
use crate::common::config::ModelConfig;
use crate::common::decoder::Decoder;
use crate::common::logits::{argmax, kl, log_softmax};
use crate::common::sliding;

/// Tokens a step of the prefill.
const CHUNK: usize = 512;

/// A model that has read its text with dense attention.
pub struct Subject {
    decoder: Decoder,
    scale: f32,
    /// Those of the prefill, those after it, and one more, which is only predicted.
    tokens: Vec<u32>,
    prompt: usize,
    layers: Vec<Captured>,
    /// Of each layer, where it has one that slides.
    windows: Vec<Option<usize>>,
    /// Logits after each token behind the prefill, `[tokens, vocab]`.
    logits: Tensor,
}

/// One layer of the dense pass, in f32.
pub struct Captured {
    /// `[h, n, head_dim]`
    queries: Tensor,
    /// `[h_kv, n, head_dim]`
    keys: Tensor,
    values: Tensor,
}

/// How well the whole model predicts the text, and how its predictions differ from the dense ones.
#[derive(Debug, Clone, Copy)]
pub struct Predictions {
    pub perplexity: f64,
    /// Mean over the positions, in nats.
    pub kl: f64,
    /// Standard error of that mean, positions taken as independent.
    pub kl_error: f64,
    pub top1_agreement: f64,
}

impl Subject {
    /// Reads `tokens`: a prefill of `prompt` and all but the last of the others, which are to be predicted.
    pub fn read(
        decoder: Decoder,
        config: &ModelConfig,
        tokens: Vec<u32>,
        prompt: usize,
        bar: &ProgressBar,
    ) -> Result<Self> {
        let &ModelConfig { layers, kv_heads, head_dim, .. } = config;
        let windows: Vec<_> = (0..layers).map(|layer| config.window(layer)).collect();
        ensure!(prompt + 2 <= tokens.len(), "expected at least 1 token after {prompt} and one to predict");
        let scale = config.attention_scale();
        let attention = PqAttention::new(PqConfig { pq_dim: 1, ..PqConfig::default() }, scale)?;
        let read = tokens.len() - 1;
        let cache = |_| attention.new_cache([1, kv_heads, head_dim], read, DType::F32, &Device::Cpu);
        let mut caches = (0..layers).map(cache).collect::<candle_core::Result<Vec<_>>>()?;
        let mut dense = |layer: usize, q: &Tensor, k: &Tensor, v: &Tensor| {
            let cache = &mut caches[layer];
            Ok(match windows[layer] {
                Some(window) => sliding::attend(q, k, v, cache, window, scale)?,
                None => attention.forward_dense(q, k, v, cache)?,
            })
        };
        let mut queries = vec![Vec::new(); layers];
        let mut captured = |layer: usize, q: &Tensor, k: &Tensor, v: &Tensor| {
            queries[layer].push(q.squeeze(0)?);
            dense(layer, q, k, v)
        };
        for start in (0..prompt).step_by(CHUNK) {
            let chunk = &tokens[start..prompt.min(start + CHUNK)];
            decoder.forward(chunk, start, &mut captured)?;
            bar.inc(chunk.len() as u64);
        }
        let hidden = decoder.forward(&tokens[prompt..read], prompt, &mut captured)?;
        let logits = decoder.logits(&hidden)?.squeeze(0)?;
        bar.inc((read - prompt) as u64);
        let captured = queries.into_iter().zip(caches).map(|(queries, cache)| {
            let (keys, values) = (cache.keys()?.squeeze(0)?.contiguous()?, cache.values()?.squeeze(0)?.contiguous()?);
            Ok(Captured { queries: Tensor::cat(&queries, 1)?, keys, values })
        });
        let layers = captured.collect::<Result<_>>()?;
        Ok(Self { decoder, scale, tokens, prompt, layers, windows, logits })
    }

    pub fn layers(&self) -> usize {
        self.layers.len()
    }

    /// Layers that attend to all keys.
    pub fn global_layers(&self) -> Vec<usize> {
        (0..self.layers()).filter(|&layer| self.windows[layer].is_none()).collect()
    }

    pub fn head_dim(&self) -> Result<usize> {
        Ok(self.layers[0].keys.dim(2)?)
    }

    /// Keys at the last position.
    pub fn keys(&self) -> usize {
        self.tokens.len() - 1
    }

    /// The keys that a layer's prefill leaves.
    pub fn prefill_keys(&self, layer: usize) -> Result<Tensor> {
        Ok(self.layers[layer].keys.narrow(1, 0, self.prompt)?.contiguous()?)
    }

    /// The queries of a layer's prefill.
    pub fn prefill_queries(&self, layer: usize) -> Result<Tensor> {
        Ok(self.layers[layer].queries.narrow(1, 0, self.prompt)?.contiguous()?)
    }

    /// Hands `use_them` the last `count` queries of a layer.
    pub fn probe<T>(&self, layer: usize, count: usize, use_them: impl FnOnce(&Queries) -> Result<T>) -> Result<T> {
        let Captured { queries, keys, values } = &self.layers[layer];
        let n = queries.dim(1)?;
        let q = queries.narrow(1, n - count, count)?.contiguous()?;
        use_them(&Queries { q: &q, keys, values, scale: self.scale })
    }

    /// Predictions of the dense model.
    pub fn dense(&self) -> Result<Predictions> {
        self.compare(&self.logits)
    }

    /// Predictions with the attention of every layer but those with a sliding window replaced behind the prefill. All tokens go through a layer at once: what
    /// a query gets depends on the keys up to its own position, so it is the same as token by token.
    pub fn predict(&self, mut instead: impl FnMut(usize, &Queries) -> Result<Tensor>) -> Result<Predictions> {
        let read = self.keys();
        let hidden = self.decoder.forward(&self.tokens[self.prompt..read], self.prompt, |layer, q, k, v| {
            let q = q.squeeze(0)?.contiguous()?;
            let Captured { keys, values, .. } = &self.layers[layer];
            let with = |prefill: &Tensor, new: &Tensor| {
                Tensor::cat(&[prefill.narrow(1, 0, self.prompt)?, new.squeeze(0)?.contiguous()?], 1)
            };
            let (keys, values) = (with(keys, k)?, with(values, v)?);
            let queries = Queries { q: &q, keys: &keys, values: &values, scale: self.scale };
            let out = match self.windows[layer] {
                Some(window) => attend(&queries, &Plan { sink: 0, window, choose: None, tail: None })?.out,
                None => instead(layer, &queries)?,
            };
            Ok(out.unsqueeze(0)?)
        })?;
        self.compare(&self.decoder.logits(&hidden)?.squeeze(0)?)
    }

    fn compare(&self, logits: &Tensor) -> Result<Predictions> {
        let targets = &self.tokens[self.prompt + 1..];
        let rows = targets.par_iter().enumerate().map(|(i, &target)| {
            let (dense, other) = (self.logits.get(i)?.to_vec1::<f32>()?, logits.get(i)?.to_vec1::<f32>()?);
            let wide: Vec<f64> = other.iter().map(|&logit| f64::from(logit)).collect();
            let surprise = -log_softmax(&wide)[target as usize];
            Ok((surprise, kl(&dense, &other), f64::from(argmax(&dense) == argmax(&other))))
        });
        let rows = rows.collect::<Result<Vec<_>>>()?;
        let n = rows.len() as f64;
        let mean = |of: fn(&(f64, f64, f64)) -> f64| rows.iter().map(of).sum::<f64>() / n;
        let kl = mean(|row| row.1);
        let variance = rows.iter().map(|row| (row.1 - kl).powi(2)).sum::<f64>() / (n - 1.).max(1.);
        Ok(Predictions {
            perplexity: mean(|row| row.0).exp(),
            kl,
            kl_error: (variance / n).sqrt(),
            top1_agreement: mean(|row| row.2),
        })
    }
}
