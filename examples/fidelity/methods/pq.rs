//! Product quantization as the library does it, by [`PqAttention::forward`].

use anyhow::{bail, Result};
use candle_core::Tensor;
use candle_pq_attn::ops::{self, Geometry};
use candle_pq_attn::{Codebook, Heavy, PqAttention, PqConfig, PqKvCache, Selection};

use super::{codes, Layer, Method, Prefill};
use crate::attend::{Attended, Queries};

/// The parts of its config that do not come from the command line.
#[derive(Clone)]
pub struct Pq(PqConfig);

impl Pq {
    /// `16x8`, or `16x8:select=kv-head`
    pub fn parse(text: &str) -> Result<Self> {
        let (text, selection) = match text.split_once(':') {
            None | Some((_, "select=query-head")) => (text, Selection::PerQueryHead),
            Some((_, "select=kv-head")) => (text, Selection::PerKvHead),
            Some((_, other)) => bail!("pq: expected select=query-head or select=kv-head, got {other:?}"),
        };
        let (pq_dim, pq_bits) = codes(text.split(':').next().unwrap_or_default())?;
        Ok(Self(PqConfig { pq_dim, pq_bits, selection, ..PqConfig::default() }))
    }
}

impl Method for Pq {
    fn label(&self) -> String {
        let PqConfig { pq_dim, pq_bits, selection, .. } = self.0;
        let by = if selection == Selection::PerKvHead { ", by KV head" } else { "" };
        format!("PQ {pq_dim} x {pq_bits}{by}")
    }

    fn bytes_per_key(&self, _: usize) -> Option<f64> {
        Some(self.0.pq_dim as f64)
    }

    fn observe(&self, prefill: &Prefill) -> Result<Box<dyn Layer>> {
        let settings = prefill.settings;
        let config = PqConfig {
            sink: settings.sink,
            window: settings.window,
            seed: settings.seed,
            max_train_keys: settings.max_train_keys,
            ..self.0.clone()
        };
        let keys = prefill.training_keys()?.unsqueeze(0)?;
        config.validate(keys.dim(3)?)?;
        Ok(Box::new(Trained { codebook: Codebook::train(&keys, &config)?, config }))
    }
}

struct Trained {
    codebook: Codebook,
    config: PqConfig,
}

impl Layer for Trained {
    fn attend(&self, queries: &Queries, heavy: Heavy) -> Result<Attended> {
        let attention = PqAttention::new(PqConfig { heavy, ..self.config.clone() }, queries.scale)?;
        let [q, keys, values] = [queries.q, queries.keys, queries.values].map(|tensor| tensor.unsqueeze(0));
        let (q, keys, values) = (q?, keys?, values?);
        let (_, h, s, _) = q.dims4()?;
        let (_, h_kv, n, d) = keys.dims4()?;
        let mut cache = attention.new_cache([1, h_kv, d], n, q.dtype(), q.device())?;
        cache.set_codebook(self.codebook.clone())?;
        cache.append(&keys.narrow(2, 0, n - s)?, &values.narrow(2, 0, n - s)?)?;
        let (mut outs, mut masses) = (Vec::with_capacity(s), vec![0f64; h * s]);
        for i in 0..s {
            let [q, key, value] = [(&q, i), (&keys, n - s + i), (&values, n - s + i)].map(|(x, at)| x.narrow(2, at, 1));
            let q = q?;
            outs.push(attention.forward(&q, &key?, &value?, &mut cache)?);
            for (head, mass) in mass(&q, &mut cache, queries.scale)?.into_iter().enumerate() {
                masses[head * s + i] = f64::from(mass);
            }
        }
        Ok(Attended { out: Tensor::cat(&outs, 2)?.squeeze(0)?, mass: masses, tail: None })
    }
}

/// Log mass of what the step that has just been taken attended to, for each query head. A step keeps it to itself: the
/// ops repeat it.
fn mass(q: &Tensor, cache: &mut PqKvCache, scale: f32) -> Result<Vec<f32>> {
    let (n, config) = (cache.len(), cache.config().clone());
    let (keys, values) = (cache.keys()?, cache.values()?);
    if config.is_dense(n) {
        return Ok(ops::dense_attend(q, &keys, &values, scale)?.lse.flatten_all()?.to_vec1()?);
    }
    let candidates = config.candidates(n);
    let Some(codebook) = cache.codebook() else { bail!("pq: expected a codebook after a sparse step, found none") };
    let codes = cache.codes()?.narrow(2, 0, candidates.len())?;
    let mut scores = ops::score(q, &codes, &codebook.centroids()?)?;
    if config.selection == Selection::PerKvHead {
        scores = ops::group_mass(&scores, cache.dims()[1], scale)?;
    }
    let heavy = ops::topk(&scores, config.heavy.count(n))?;
    let (sink, window, init_offset) = (config.sink, config.window, candidates.start);
    let selected = ops::indices_and_weights(&heavy, Geometry { n, sink, window, init_offset })?;
    Ok(ops::sparse_attend(q, &keys, &values, &selected, scale)?.lse.flatten_all()?.to_vec1()?)
}
