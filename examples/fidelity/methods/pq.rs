//! What the library does, by [`PqAttention::forward`].

use anyhow::{bail, Context, Result};
use candle_core::Tensor;
use candle_pq_attn::ops::{self, Geometry};
use candle_pq_attn::{Codebook, Heavy, PqAttention, PqConfig, PqKvCache, Selection, Tail};

use super::{codes, Layer, Method, Prefill};
use crate::attend::{Attended, Queries};

/// The parts of its config that come from the command line.
pub struct Pq {
    name: String,
    config: PqConfig,
    /// Whether the codebook is trained again as keys are added, rather than on the prefill alone.
    grows: bool,
}

impl Pq {
    /// Product quantization alone, as `pq:16x8`, and options such as `coarse=256`.
    pub fn plain(name: &str, text: &str) -> Result<Self> {
        let (size, options) = text.split_once(':').unwrap_or((text, ""));
        let (coarse, tail, query_weights) = (0, Tail::None, false);
        let config = PqConfig { coarse, tail, query_weights, ..PqConfig::default() };
        Self { name: name.to_string(), config, grows: false }.with(&format!("codes={size}"))?.with(options)
    }

    /// What a user of the library gets who changes nothing.
    pub fn defaults(name: &str) -> Self {
        Self { name: name.to_string(), config: PqConfig::default(), grows: true }
    }

    /// With options such as `coarse=256:tail=none`.
    pub fn with(mut self, options: &str) -> Result<Self> {
        let Self { config, grows, .. } = &mut self;
        for option in options.split(':').filter(|option| !option.is_empty()) {
            match option.split_once('=') {
                Some(("codes", size)) => (config.pq_dim, config.pq_bits) = codes(size)?,
                Some(("select", "query-head")) => config.selection = Selection::PerQueryHead,
                Some(("select", "kv-head")) => config.selection = Selection::PerKvHead,
                Some(("tail", "none")) => config.tail = Tail::None,
                Some(("tail", "means")) => config.tail = Tail::ClusterMeans,
                Some(("weigh", "none")) => config.query_weights = false,
                Some(("weigh", "queries")) => config.query_weights = true,
                Some(("grow", "none")) => *grows = false,
                Some(("grow", share)) if share.parse::<f64>().is_ok() => {
                    (config.refresh, *grows) = (share.parse()?, true);
                }
                Some(("rounds", number)) if number.parse::<usize>().is_ok() => config.kmeans_iters = number.parse()?,
                Some(("coarse", number)) if number.parse::<usize>().is_ok() => config.coarse = number.parse()?,
                _ => bail!("{}: expected options as --help lists them, such as coarse=256; got {option:?}", self.name),
            }
        }
        Ok(self)
    }
}

impl Method for Pq {
    fn label(&self) -> String {
        let PqConfig { pq_dim, pq_bits, coarse, .. } = self.config;
        match self.name.as_str() {
            "ours" => format!("ours: {pq_dim} x {pq_bits} on residuals + tail"),
            "ours-no-tail" => "ours, no tail".to_string(),
            "ours-kv" => "ours, by KV head".to_string(),
            name if coarse == 0 && !name[3..].contains(':') => format!("PQ {pq_dim} x {pq_bits}"),
            other => other.to_string(),
        }
    }

    fn bytes_per_key(&self, _: usize) -> Option<f64> {
        Some((self.config.pq_dim + usize::from(self.config.coarse > 0)) as f64)
    }

    fn observe(&self, prefill: &Prefill) -> Result<Box<dyn Layer>> {
        let settings = prefill.settings;
        let config = PqConfig {
            sink: settings.sink,
            window: settings.window,
            seed: settings.seed,
            max_train_keys: settings.max_train_keys,
            ..self.config.clone()
        };
        config.validate(prefill.keys.dim(2)?)?;
        let n = settings.sink + prefill.training_keys()?.dim(1)?;
        let [queries, keys] = [&prefill.queries, &prefill.keys].map(|x| x.narrow(1, 0, n)?.unsqueeze(0));
        let (queries, keys) = (queries?, keys?);
        let mut cache = read(&PqAttention::new(config.clone(), 1.)?, &queries, &keys, &keys)?;
        cache.build_index()?;
        let codebook = cache.codebook().with_context(|| {
            let least = config.n_centroids().max(config.coarse);
            format!(
                "expected at least {least} keys to train on, a centroid's each, got {}: raise --train-tokens",
                n - settings.sink
            )
        })?;
        let queries = prefill.queries.unsqueeze(0)?;
        Ok(Box::new(Trained { codebook: (!self.grows).then(|| codebook.clone()), config, queries }))
    }
}

/// A cache after a prefill whose output nobody wants.
fn read(attention: &PqAttention, queries: &Tensor, keys: &Tensor, values: &Tensor) -> Result<PqKvCache> {
    let attention = attention.clone().with_prefill(|queries, _, _, _| Ok(queries.clone()));
    let (_, h_kv, n, d) = keys.dims4()?;
    let mut cache = attention.new_cache([1, h_kv, d], n, keys.dtype(), keys.device())?;
    attention.forward(queries, keys, values, &mut cache)?;
    Ok(cache)
}

struct Trained {
    /// None: each cache trains its own.
    codebook: Option<Codebook>,
    config: PqConfig,
    /// Those of the prefill.
    queries: Tensor,
}

impl Layer for Trained {
    fn attend(&self, queries: &Queries, heavy: Heavy) -> Result<Attended> {
        let attention = PqAttention::new(PqConfig { heavy, ..self.config.clone() }, queries.scale)?;
        let [q, keys, values] = [queries.q, queries.keys, queries.values].map(|tensor| tensor.unsqueeze(0));
        let (q, keys, values) = (q?, keys?, values?);
        let (_, h, s, _) = q.dims4()?;
        let n = keys.dim(2)?;
        let prompt = self.queries.dim(2)?.min(n - s);
        let upto = |x: &Tensor| x.narrow(2, 0, prompt);
        let mut cache = read(&attention, &upto(&self.queries)?, &upto(&keys)?, &upto(&values)?)?;
        match &self.codebook {
            Some(codebook) => cache.set_codebook(codebook.clone())?,
            None => cache.build_index()?,
        }
        // As decode steps would.
        for t in prompt..n - s {
            cache.append(&keys.narrow(2, t, 1)?, &values.narrow(2, t, 1)?)?;
            cache.build_index()?;
        }
        let (mut outs, mut masses, mut tails) = (Vec::with_capacity(s), vec![0f64; h * s], vec![0f64; h * s]);
        for i in 0..s {
            let [q, key, value] = [(&q, i), (&keys, n - s + i), (&values, n - s + i)].map(|(x, at)| x.narrow(2, at, 1));
            let q = q?;
            outs.push(attention.forward(&q, &key?, &value?, &mut cache)?);
            let (mass, tail) = masses_of(&q, &cache, queries.scale)?;
            for head in 0..h {
                (masses[head * s + i], tails[head * s + i]) = (f64::from(mass[head]), f64::from(tail[head]));
            }
        }
        let tail = (self.config.tail == Tail::ClusterMeans).then_some(tails);
        Ok(Attended { out: Tensor::cat(&outs, 2)?.squeeze(0)?, mass: masses, tail })
    }
}

/// Log masses of what the step that has just been taken attended to, and of its tail, for each query head. A step keeps
/// them to itself: the ops repeat it.
fn masses_of(q: &Tensor, cache: &PqKvCache, scale: f32) -> Result<(Vec<f32>, Vec<f32>)> {
    let (n, config) = (cache.len(), cache.config().clone());
    let (keys, values) = (cache.keys()?, cache.values()?);
    let lse = |attended: ops::Attended| attended.lse.flatten_all()?.to_vec1::<f32>();
    let no_tail = vec![f32::NEG_INFINITY; q.dim(1)?];
    if config.is_dense(n) {
        return Ok((lse(ops::dense_attend(q, &keys, &values, scale)?)?, no_tail));
    }
    let candidates = config.candidates(n);
    let Some(codebook) = cache.codebook() else { bail!("pq: expected a codebook after a sparse step, found none") };
    let (codes, centroids) = (cache.codes()?.narrow(2, 0, candidates.len())?, codebook.centroids()?);
    let coarse_codes = cache.coarse_codes()?.map(|codes| codes.narrow(2, 0, candidates.len())).transpose()?;
    let scores = match (&coarse_codes, codebook.coarse()) {
        (Some(coarse_codes), Some(coarse)) => ops::residual_score(q, &codes, &centroids, coarse_codes, coarse)?,
        _ => ops::score(q, &codes, &centroids)?,
    };
    let chosen_by = match config.selection {
        Selection::PerQueryHead => scores.clone(),
        Selection::PerKvHead => ops::group_mass(&scores, cache.dims()[1], scale)?,
    };
    let heavy = ops::topk(&chosen_by, config.heavy.count(n))?;
    let (sink, window, init_offset) = (config.sink, config.window, candidates.start);
    let selected = ops::indices_and_weights(&heavy, Geometry { n, sink, window, init_offset })?;
    let tail = match (&coarse_codes, cache.clusters()) {
        (Some(codes), Some(clusters)) => {
            lse(ops::tail_attend(&scores, codes, clusters, &selected, init_offset, scale)?)?
        }
        _ => no_tail,
    };
    Ok((lse(ops::sparse_attend(q, &keys, &values, &selected, scale)?)?, tail))
}
