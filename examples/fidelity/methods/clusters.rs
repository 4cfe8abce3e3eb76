//! Clusters of whole keys, PQ codes of the residuals, and a tail: what the crate's `coarse` and `tail` compute, here
//! from the definition and in plain loops, as a cross-check and to try variants.

use std::sync::Arc;

use anyhow::{bail, Result};
use candle_core::Tensor;
use candle_pq_attn::Heavy;

use super::train::{Quantizer, Training};
use super::{codes, Layer, Method, Prefill, Settings};
use crate::attend::{attend, Attended, Choose, Plan, Queries, Spread, Standins, Tail};

/// What stands for a key.
#[derive(Clone, Copy, PartialEq, Eq)]
enum By {
    Exact,
    Codes,
    Centroids,
}

/// How the variance of what the codes lose is taken into account.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Variance {
    Ignored,
    Head,
    Cluster,
    Full,
}

#[derive(Clone)]
pub struct Clusters {
    name: String,
    n: usize,
    /// Codes of the residual, and their bits.
    codes: (usize, usize),
    choose: By,
    tail: Option<By>,
    per_kv_head: bool,
    rest: bool,
    variance: Variance,
    training: Training,
}

impl Clusters {
    /// From options such as `n=64`, of which later ones win.
    pub fn parse<'a>(name: &str, options: impl Iterator<Item = &'a str>) -> Result<Self> {
        let mut parsed = Self {
            name: name.to_string(),
            n: 256,
            codes: (8, 8),
            choose: By::Codes,
            tail: Some(By::Codes),
            per_kv_head: false,
            rest: false,
            variance: Variance::Ignored,
            training: Training::default(),
        };
        let by = |text: &str| match text {
            "exact" => Some(By::Exact),
            "codes" => Some(By::Codes),
            "centroids" => Some(By::Centroids),
            _ => None,
        };
        for option in options.filter(|option| !option.is_empty()) {
            match option.split_once('=') {
                Some(("n", text)) => match text.parse() {
                    Ok(n @ 2..=256) if usize::is_power_of_two(n) => parsed.n = n,
                    _ => bail!("n: expected 2, 4, 8, ... or 256, got {text:?}"),
                },
                Some(("codes", text)) => parsed.codes = codes(text)?,
                Some(("tail", "none")) => parsed.tail = None,
                Some(("tail", text)) if by(text).is_some() => parsed.tail = by(text),
                Some(("choose", text)) if by(text).is_some() => parsed.choose = by(text).unwrap_or(By::Codes),
                Some(("select", "query-head")) => parsed.per_kv_head = false,
                Some(("select", "kv-head")) => parsed.per_kv_head = true,
                Some(("means", "all")) => parsed.rest = false,
                Some(("means", "rest")) => parsed.rest = true,
                Some(("spread", "none")) => parsed.variance = Variance::Ignored,
                Some(("spread", "head")) => parsed.variance = Variance::Head,
                Some(("spread", "cluster")) => parsed.variance = Variance::Cluster,
                Some(("spread", "full")) => parsed.variance = Variance::Full,
                Some((name, text)) if parsed.training.option(name, text)? => {}
                _ => bail!("expected options as --help lists them, such as n=64; got {option:?}"),
            }
        }
        Ok(parsed)
    }

    fn uses(&self, by: By) -> bool {
        self.choose == by || self.tail == Some(by)
    }
}

impl Method for Clusters {
    fn label(&self) -> String {
        let n = self.n;
        match self.name.as_str() {
            "oracle+tail" => format!("oracle + tail by {n} centroids"),
            "centroids" => format!("{n} centroids choose, + tail"),
            other => other.to_string(),
        }
    }

    fn bytes_per_key(&self, _: usize) -> Option<f64> {
        let codes = if self.uses(By::Codes) { self.codes.0 } else { 0 };
        (!self.uses(By::Exact)).then_some(1. + codes as f64)
    }

    fn observe(&self, prefill: &Prefill) -> Result<Box<dyn Layer>> {
        // The lock is held while training: another method in need of the same index waits for it.
        let mut indices = prefill.indices.lock().map_err(|_| anyhow::anyhow!("an earlier training failed"))?;
        let key = format!("{} {:?} {}", self.n, self.codes, self.training.key());
        let index = match indices.get(&key) {
            Some(index) => index.clone(),
            None => {
                let (h_kv, n, _) = prefill.keys.dims3()?;
                let keys = prefill.keys.narrow(1, prefill.settings.sink, n - prefill.settings.sink)?;
                let train_keys = prefill.training_keys()?.dim(1)?;
                let weights = self.training.weights(&prefill.queries, h_kv)?;
                let index = Arc::new(Index::train(self, &prefill.settings, &keys, train_keys, &weights)?);
                indices.insert(key, index.clone());
                index
            }
        };
        Ok(Box::new(Indexed { method: self.clone(), settings: prefill.settings, index }))
    }
}

/// Centroids trained on a layer's keys, and what they make of them.
pub struct Index {
    coarse: Quantizer,
    residual: Quantizer,
    /// As [`Training::weights`].
    weights: Tensor,
    known: Encoded,
    /// Variances of the prefill's keys around their reconstructions.
    spread: SpreadOf,
}

/// Keys behind the sink, as the index knows them.
#[derive(Clone)]
struct Encoded {
    /// `[h_kv][n]`
    clusters: Vec<Vec<u8>>,
    /// `[h_kv, n, head_dim]`: of each key the centroid of its cluster.
    centroids: Tensor,
    /// `[h_kv, n, head_dim]`: the same plus the decoded residual.
    decoded: Tensor,
}

struct SpreadOf {
    /// `[h_kv, 1, head_dim]`
    head: Tensor,
    /// `[h_kv, n, head_dim]`
    cluster: Tensor,
    /// `[h_kv, head_dim, head_dim]`
    full: Tensor,
}

impl Index {
    /// Trains on the first `train_keys` of `keys`, `[h_kv, n, head_dim]`, and codes all of them.
    fn train(
        method: &Clusters,
        settings: &Settings,
        keys: &Tensor,
        train_keys: usize,
        weights: &Tensor,
    ) -> Result<Self> {
        let training = &method.training;
        let sample = keys.narrow(1, 0, train_keys)?.unsqueeze(0)?;
        let sample = training.sample(&sample, settings.max_train_keys)?;
        let coarse = Quantizer::train(training, settings, &sample, (1, method.n.ilog2() as usize), weights)?;
        let rest = (&sample - coarse.encode(&sample)?.1)?;
        let residual = Quantizer::train(training, settings, &rest, method.codes, weights)?;
        let known = encode(keys, &coarse, &residual)?;
        let spread = SpreadOf::new(&(keys - &known.decoded)?, &known.clusters, method.n)?;
        Ok(Self { coarse, residual, weights: weights.clone(), known, spread })
    }

    /// The keys behind the sink, of which the first are known already.
    fn encode(&self, keys: &Tensor) -> Result<Encoded> {
        let known = self.known.decoded.dim(1)?;
        let new = keys.dim(1)? - known;
        if new == 0 {
            return Ok(self.known.clone());
        }
        let new = encode(&keys.narrow(1, known, new)?, &self.coarse, &self.residual)?;
        let clusters = self.known.clusters.iter().zip(&new.clusters).map(|(known, new)| [&known[..], new].concat());
        Ok(Encoded {
            clusters: clusters.collect(),
            centroids: Tensor::cat(&[&self.known.centroids, &new.centroids], 1)?,
            decoded: Tensor::cat(&[&self.known.decoded, &new.decoded], 1)?,
        })
    }
}

/// Codes `keys`, `[h_kv, n, head_dim]`.
fn encode(keys: &Tensor, coarse: &Quantizer, residual: &Quantizer) -> Result<Encoded> {
    let keys = keys.unsqueeze(0)?;
    let (clusters, centroids) = coarse.encode(&keys)?;
    let rest = (&keys - &centroids)?;
    let decoded = (&centroids + residual.encode(&rest)?.1)?;
    let clusters = clusters.squeeze(0)?.squeeze(2)?.to_vec2()?;
    Ok(Encoded { clusters, centroids: centroids.squeeze(0)?, decoded: decoded.squeeze(0)? })
}

impl SpreadOf {
    /// Of `errors`, `[h_kv, keys, head_dim]`.
    fn new(errors: &Tensor, clusters: &[Vec<u8>], n: usize) -> Result<Self> {
        let (h_kv, keys, d) = errors.dims3()?;
        let full = (errors.transpose(1, 2)?.contiguous()?.matmul(errors)? / keys as f64)?;
        let squares = errors.sqr()?;
        let mut cluster = vec![0f32; h_kv * n * d];
        for (kv, clusters) in clusters.iter().enumerate() {
            let mut counts = vec![0f32; n];
            for (square, &c) in squares.get(kv)?.to_vec2::<f32>()?.iter().zip(clusters) {
                let at = (kv * n + usize::from(c)) * d;
                cluster[at..at + d].iter_mut().zip(square).for_each(|(sum, square)| *sum += square);
                counts[usize::from(c)] += 1.;
            }
            for (c, count) in counts.iter().enumerate().filter(|(_, count)| **count > 0.) {
                cluster[(kv * n + c) * d..][..d].iter_mut().for_each(|sum| *sum /= count);
            }
        }
        let cluster = Tensor::from_vec(cluster, (h_kv, n, d), errors.device())?;
        Ok(Self { head: squares.mean_keepdim(1)?, cluster, full })
    }
}

struct Indexed {
    method: Clusters,
    settings: Settings,
    index: Arc<Index>,
}

impl Layer for Indexed {
    fn attend(&self, queries: &Queries, heavy: Heavy) -> Result<Attended> {
        let sink = self.settings.sink;
        let (s, n) = (queries.q.dim(1)?, queries.keys.dim(1)?);
        let mut index = self.index.clone();
        let mut trained = sink + index.known.decoded.dim(1)?;
        let mut parts = Vec::new();
        let mut done = 0;
        while done < s {
            let next = self.method.training.next(trained);
            let keys = n - s + done;
            if next <= keys {
                let keys = queries.keys.narrow(1, sink, next - sink)?;
                index = Arc::new(Index::train(&self.method, &self.settings, &keys, next - sink, &index.weights)?);
                trained = next;
                continue;
            }
            let count = (next - keys).min(s - done);
            let upto = |x: &Tensor| x.narrow(1, 0, keys + count)?.contiguous();
            let (q, keys, values) = (queries.q.narrow(1, done, count)?, upto(queries.keys)?, upto(queries.values)?);
            let part = Queries { q: &q.contiguous()?, keys: &keys, values: &values, scale: queries.scale };
            parts.push(self.attend_by(&index, &part, heavy)?);
            done += count;
        }
        Attended::cat(&parts)
    }
}

impl Indexed {
    /// Attends with an index of some or all of the keys.
    fn attend_by(&self, index: &Index, queries: &Queries, heavy: Heavy) -> Result<Attended> {
        let Settings { sink, window, .. } = self.settings;
        let keys = queries.keys.narrow(1, sink, queries.keys.dim(1)? - sink)?;
        let encoded = index.encode(&keys)?;
        let standins = |by| match by {
            By::Exact => &keys,
            By::Codes => &encoded.decoded,
            By::Centroids => &encoded.centroids,
        };
        let spread = &index.spread;
        let spread = match self.method.variance {
            Variance::Ignored => Spread::Ignored,
            Variance::Head => Spread::Diagonal(&spread.head),
            Variance::Cluster => Spread::Diagonal(&spread.cluster),
            Variance::Full => Spread::Full(&spread.full),
        };
        let by = Standins::Keys(standins(self.method.choose));
        let tail = self.method.tail.map(|by| Tail {
            by: standins(by),
            clusters: &encoded.clusters,
            rest: self.method.rest,
            spread,
        });
        let choose = Some(Choose { heavy, by, per_kv_head: self.method.per_kv_head });
        attend(queries, &Plan { sink, window, choose, tail })
    }
}
