//! Clusters of whole keys, PQ codes of the residuals, and a tail: what the crate's `coarse` and `tail` compute, here
//! from the definition and in plain loops, as a cross-check and to try variants.

use std::sync::Arc;

use anyhow::{bail, ensure, Result};
use candle_core::{DType, Tensor, D};
use candle_pq_attn::ops::{self, KmeansOptions};
use candle_pq_attn::{Heavy, Metric, PqConfig};

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
        let Self { codes: (m, bits), n, .. } = self;
        match self.name.as_str() {
            "ours" => format!("{m} x {bits} on residuals + tail"),
            "ours-no-tail" => format!("{m} x {bits} on residuals, no tail"),
            "ours-kv" => format!("{m} x {bits} on residuals + tail, by KV head"),
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
        let key = (self.n, self.codes.0 * 16 + self.codes.1);
        let index = match indices.get(&key) {
            Some(index) => index.clone(),
            None => {
                let index = Arc::new(Index::train(prefill, self.n, self.codes)?);
                indices.insert(key, index.clone());
                index
            }
        };
        Ok(Box::new(Indexed { method: self.clone(), settings: prefill.settings, index }))
    }
}

/// Centroids trained on a layer's prefill, and what they make of its keys.
pub struct Index {
    coarse: Tensor,   // [1, h_kv, 1, n, head_dim]
    residual: Tensor, // [1, h_kv, pq_dim, n_centroids, pq_len]
    prefill: Encoded,
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
    fn train(prefill: &Prefill, n: usize, (pq_dim, pq_bits): (usize, usize)) -> Result<Self> {
        let keys = prefill.training_keys()?.unsqueeze(0)?;
        let d = keys.dim(D::Minus1)?;
        ensure!(d.is_multiple_of(pq_dim), "codes: expected a divisor of head_dim {d}, got {pq_dim}");
        let kmeans = |keys: &Tensor, pq_dim, pq_bits| -> Result<Tensor> {
            let options = KmeansOptions {
                pq_dim,
                pq_bits,
                iters: PqConfig::default().kmeans_iters,
                metric: Metric::Euclidean,
                max_keys: prefill.settings.max_train_keys,
                seed: prefill.settings.seed,
            };
            Ok(ops::kmeans(keys, &options)?.0)
        };
        let coarse = kmeans(&keys, 1, n.ilog2() as usize)?;
        let centroids = decode(&ops::encode(&keys, &coarse, None)?, &coarse)?;
        let residual = kmeans(&(keys - centroids)?, pq_dim, pq_bits)?;
        let behind_sink = prefill.keys.dim(1)? - prefill.settings.sink;
        let keys = prefill.keys.narrow(1, prefill.settings.sink, behind_sink)?;
        let prefill = encode(&keys, &coarse, &residual)?;
        let spread = SpreadOf::new(&(keys - &prefill.decoded)?, &prefill.clusters, n)?;
        Ok(Self { coarse, residual, prefill, spread })
    }

    /// The keys behind the sink, of which the first are the prefill's and known already.
    fn encode(&self, keys: &Tensor) -> Result<Encoded> {
        let known = self.prefill.decoded.dim(1)?;
        let new = keys.dim(1)? - known;
        if new == 0 {
            return Ok(self.prefill.clone());
        }
        let new = encode(&keys.narrow(1, known, new)?, &self.coarse, &self.residual)?;
        let clusters = self.prefill.clusters.iter().zip(&new.clusters).map(|(known, new)| [&known[..], new].concat());
        Ok(Encoded {
            clusters: clusters.collect(),
            centroids: Tensor::cat(&[&self.prefill.centroids, &new.centroids], 1)?,
            decoded: Tensor::cat(&[&self.prefill.decoded, &new.decoded], 1)?,
        })
    }
}

/// Codes `keys`, `[h_kv, n, head_dim]`.
fn encode(keys: &Tensor, coarse: &Tensor, residual: &Tensor) -> Result<Encoded> {
    let keys = keys.unsqueeze(0)?;
    let clusters = ops::encode(&keys, coarse, None)?;
    let centroids = decode(&clusters, coarse)?;
    let rest = (&keys - &centroids)?;
    let decoded = (&centroids + decode(&ops::encode(&rest, residual, None)?, residual)?)?;
    let clusters = clusters.squeeze(0)?.squeeze(2)?.to_vec2()?;
    Ok(Encoded { clusters, centroids: centroids.squeeze(0)?, decoded: decoded.squeeze(0)? })
}

/// The centroids that `codes`, `[1, h_kv, n, pq_dim]`, stand for: `[1, h_kv, n, head_dim]`.
fn decode(codes: &Tensor, centroids: &Tensor) -> Result<Tensor> {
    let (_, h_kv, _, pq_dim) = codes.dims4()?;
    let heads = (0..h_kv).map(|kv| {
        let parts = (0..pq_dim).map(|m| {
            let codes = codes.get(0)?.get(kv)?.narrow(1, m, 1)?.squeeze(1)?.to_dtype(DType::U32)?;
            centroids.get(0)?.get(kv)?.get(m)?.index_select(&codes.contiguous()?, 0)
        });
        Tensor::cat(&parts.collect::<candle_core::Result<Vec<_>>>()?, 1)
    });
    Ok(Tensor::stack(&heads.collect::<candle_core::Result<Vec<_>>>()?, 0)?.unsqueeze(0)?)
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
        let Settings { sink, window, .. } = self.settings;
        let keys = queries.keys.narrow(1, sink, queries.keys.dim(1)? - sink)?;
        let encoded = self.index.encode(&keys)?;
        let standins = |by| match by {
            By::Exact => &keys,
            By::Codes => &encoded.decoded,
            By::Centroids => &encoded.centroids,
        };
        let spread = &self.index.spread;
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
