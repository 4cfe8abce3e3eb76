//! How clusters and codes are trained, with what may be tried there.

use anyhow::{bail, ensure, Context, Result};
use candle_core::{DType, Tensor, D};
use candle_pq_attn::ops::{self, KmeansOptions};
use candle_pq_attn::{Metric, PqConfig};

use super::Settings;

/// What the elements of a key weigh in distances: by how much a query, on average, makes of their error.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Weigh {
    None,
    /// `E[q_i²]`
    Diagonal,
    /// The mean of that over the two elements that rotary embedding rotates together, `i` and `i + head_dim / 2`.
    Pairs,
}

#[derive(Clone)]
pub struct Training {
    weigh: Weigh,
    /// Weights are of the first so many queries of the prefill.
    queries: usize,
    /// Half of the sample is from the last quarter of the keys.
    recent: bool,
    /// Size of the sample over the number of keys. Above 1 keys count several times.
    sample: f64,
    rounds: usize,
    /// Trained anew when the keys have grown by this share.
    grow: Option<f64>,
}

impl Default for Training {
    fn default() -> Self {
        let rounds = PqConfig::default().kmeans_iters;
        Self { weigh: Weigh::None, queries: usize::MAX, recent: false, sample: 1., rounds, grow: None }
    }
}

impl Training {
    /// Takes an option; whether there is one of that name.
    pub fn option(&mut self, name: &str, text: &str) -> Result<bool> {
        let share = || -> Result<f64> {
            let number = text.parse().ok().filter(|number: &f64| *number > 0. && number.is_finite());
            number.with_context(|| format!("{name}: expected a number above 0, got {text:?}"))
        };
        let count = || -> Result<usize> {
            let number = text.parse().ok().filter(|number| *number > 0);
            number.with_context(|| format!("{name}: expected a number from 1 up, got {text:?}"))
        };
        match (name, text) {
            ("weigh", "none") => self.weigh = Weigh::None,
            ("weigh", "diagonal") => self.weigh = Weigh::Diagonal,
            ("weigh", "pairs") => self.weigh = Weigh::Pairs,
            ("weigh", _) => bail!("weigh: expected none, diagonal or pairs, got {text:?}"),
            ("recent", "none") => self.recent = false,
            ("recent", "half") => self.recent = true,
            ("recent", _) => bail!("recent: expected none or half, got {text:?}"),
            ("queries", _) => self.queries = count()?,
            ("rounds", _) => self.rounds = count()?,
            ("sample", _) => self.sample = share()?,
            ("grow", "none") => self.grow = None,
            ("grow", _) => self.grow = Some(share()?),
            _ => return Ok(false),
        }
        Ok(true)
    }

    /// What a training on the same keys depends on.
    pub fn key(&self) -> String {
        let Self { weigh, queries, recent, sample, rounds, .. } = *self;
        format!("{} {queries} {recent} {sample} {rounds}", weigh as u8)
    }

    /// After a training with so many keys the next one is with so many.
    pub fn next(&self, keys: usize) -> usize {
        self.grow.map_or(usize::MAX, |grow| keys + ((keys as f64 * grow) as usize).max(1))
    }

    /// Square roots of the weights, `[1, h_kv, 1, head_dim]`, by the queries of each group, `[h, n, head_dim]`.
    pub fn weights(&self, queries: &Tensor, h_kv: usize) -> Result<Tensor> {
        let (_, n, d) = queries.dims3()?;
        let queries = queries.narrow(1, 0, n.min(self.queries))?.contiguous()?;
        let squares = queries.sqr()?.reshape((1, h_kv, (), d))?.mean_keepdim(2)?;
        let squares = match self.weigh {
            Weigh::None => return Ok(squares.ones_like()?),
            Weigh::Diagonal => squares,
            Weigh::Pairs => {
                ensure!(d % 2 == 0, "weigh=pairs: expected an even head_dim, got {d}");
                let mean = squares.reshape((1, h_kv, 1, 2, d / 2))?.mean_keepdim(3)?;
                mean.repeat((1, 1, 1, 2, 1))?.reshape((1, h_kv, 1, d))?
            }
        };
        // An element that no query looks at still has a way back.
        let least = (squares.mean_keepdim(D::Minus1)? * 1e-4)?;
        Ok(squares.broadcast_add(&least)?.sqrt()?)
    }

    /// Which of `keys`, `[1, h_kv, n, head_dim]`, are trained on.
    pub fn sample(&self, keys: &Tensor, most: usize) -> Result<Tensor> {
        let n = keys.dim(2)?;
        let count = ((n as f64 * self.sample) as usize).min(most).max(1);
        if count == n && !self.recent {
            return Ok(keys.clone());
        }
        let spread =
            |from: usize, to: usize, count: usize| (0..count).map(move |i| (from + i * (to - from) / count) as u32);
        let positions: Vec<u32> = match self.recent {
            false => spread(0, n, count).collect(),
            true => spread(0, n - n / 4, count - count / 2).chain(spread(n - n / 4, n, count / 2)).collect(),
        };
        Ok(keys.contiguous()?.index_select(&Tensor::new(positions, keys.device())?, 2)?)
    }
}

/// Centroids of keys of which each element has been multiplied by the square root of its weight. Means do not depend on
/// such factors, distances do.
pub struct Quantizer {
    /// `[1, h_kv, pq_dim, n_centroids, pq_len]`
    centroids: Tensor,
    /// `[1, h_kv, 1, head_dim]`
    weights: Tensor,
}

impl Quantizer {
    /// `sample`: `[1, h_kv, n, head_dim]`
    pub fn train(
        training: &Training,
        settings: &Settings,
        sample: &Tensor,
        (pq_dim, pq_bits): (usize, usize),
        weights: &Tensor,
    ) -> Result<Self> {
        let d = sample.dim(D::Minus1)?;
        ensure!(d.is_multiple_of(pq_dim), "codes: expected a divisor of head_dim {d}, got {pq_dim}");
        let options = KmeansOptions {
            pq_dim,
            pq_bits,
            iters: training.rounds,
            metric: Metric::Euclidean,
            max_keys: usize::MAX,
            seed: settings.seed,
        };
        let centroids = ops::kmeans(&sample.broadcast_mul(weights)?, &options)?.0;
        Ok(Self { centroids, weights: weights.clone() })
    }

    /// Codes of `keys`, and what they stand for.
    pub fn encode(&self, keys: &Tensor) -> Result<(Tensor, Tensor)> {
        let codes = ops::encode(&keys.broadcast_mul(&self.weights)?, &self.centroids, None)?;
        let decoded = decode(&codes, &self.centroids)?.broadcast_div(&self.weights)?;
        Ok((codes, decoded))
    }
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
