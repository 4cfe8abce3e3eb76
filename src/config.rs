//! What a sparse decode keeps, selects and attends to.

use std::fmt;
use std::str::FromStr;

use candle_core::{bail, Result};
use serde::{Deserialize, Serialize};

use crate::ops::MAX_HEAD_DIM;

/// Parameters of the index and of the selection, checked once by [`PqConfig::validate`].
///
/// ```
/// use candle_pq_attn::{Heavy, PqConfig};
///
/// let config = PqConfig { heavy: Heavy::Fraction(0.01), ..PqConfig::default() };
/// config.validate(128)?;
/// assert!(config.is_dense(200) && !config.is_dense(100_000));
/// assert_eq!(config.attended(100_000), 4 + 1_000 + 64);
/// # candle_core::Result::Ok(())
/// ```
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct PqConfig {
    /// First keys, always attended: any number. A few catch the mass that softmax attention parks on the first tokens.
    pub sink: usize,
    /// Last keys, always attended: any number. It is also the write buffer of the index, which is filled in blocks of
    /// so many keys; small windows make many small blocks.
    pub window: usize,
    /// Keys selected by score. 1% suits contexts of 100,000 keys; short ones, and those without a tail, want more.
    pub heavy: Heavy,
    /// Subspaces, a divisor of the head dimension: the bytes of index a key. 8 with `coarse` clusters, or 16 without,
    /// lose little against exact scores.
    pub pq_dim: usize,
    /// `2^pq_bits` centroids a subspace: 1 to 8. A code takes a byte whatever it is.
    pub pq_bits: usize,
    /// Rounds of k-means: any number; gains fade after 4.
    pub kmeans_iters: usize,
    /// Trains on at most so many keys, at least `2^pq_bits` and `coarse`; without `coarse` they are spread evenly, with it
    /// they are half of all, if those are many, and half of them from the last quarter. More than 64 a centroid (the
    /// default) gain little.
    pub max_train_keys: usize,
    /// Trains again when the keys have grown by this share since, by one at least: above 0 and finite (1e9: never). Codes
    /// of keys that the codebook has not seen are poor, and the latest keys matter most; rarer training costs fidelity, more
    /// frequent training costs time.
    pub refresh: f64,
    /// Clusters of whole keys, for each KV head: 0 for none, or 2, 4, 8, ... or 256. The codes are then of what their
    /// cluster's centroid leaves of each key, at one more byte of index a key: with 256, half the `pq_dim` loses little
    /// more.
    pub coarse: usize,
    /// What stands for the keys that are not selected. The means of `coarse` clusters bring the output closer to dense
    /// attention than five times as many selected keys would.
    pub tail: Tail,
    /// First key that is quantized, and so can be selected; by default the one after the sink.
    pub init_offset: Option<usize>,
    /// What the codes approximate best.
    pub metric: Metric,
    /// Whether codes are best in the elements that queries look at, by a sample of the prompt's: good for any model, and
    /// free in a decode step. The sample is of the positions where [`forward`](crate::PqAttention::forward) was given more
    /// than one; without any, all elements count alike. Not with the inner-product metric, which is about the norms of
    /// keys as they are.
    pub query_weights: bool,
    /// Whether each query head selects for itself.
    pub selection: Selection,
    /// Seed of the codebook's training.
    pub seed: u64,
}

impl Default for PqConfig {
    fn default() -> Self {
        Self {
            sink: 4,
            window: 64,
            heavy: Heavy::Fraction(0.02),
            pq_dim: 8,
            pq_bits: 8,
            kmeans_iters: 4,
            max_train_keys: 16_384,
            refresh: 0.0625,
            coarse: 256,
            tail: Tail::ClusterMeans,
            init_offset: None,
            metric: Metric::Euclidean,
            query_weights: true,
            selection: Selection::PerQueryHead,
            seed: 0,
        }
    }
}

impl PqConfig {
    /// Checks every field, for keys of `head_dim` elements.
    ///
    /// # Errors
    /// Names the first field out of range, what it may be and what it is.
    pub fn validate(&self, head_dim: usize) -> Result<()> {
        if head_dim == 0 || head_dim > MAX_HEAD_DIM {
            bail!("PqConfig: head_dim: expected 1 to {MAX_HEAD_DIM}, got {head_dim}");
        }
        if self.pq_dim == 0 || !head_dim.is_multiple_of(self.pq_dim) {
            bail!("PqConfig: pq_dim: expected a divisor of head_dim {head_dim}, got {}", self.pq_dim);
        }
        if !(1..=8).contains(&self.pq_bits) {
            bail!("PqConfig: pq_bits: expected 1 to 8, got {}", self.pq_bits);
        }
        if self.max_train_keys < self.n_centroids() {
            let n_centroids = self.n_centroids();
            bail!("PqConfig: max_train_keys: expected at least {n_centroids} (2^pq_bits), got {}", self.max_train_keys);
        }
        if !self.refresh.is_finite() || self.refresh <= 0.0 {
            bail!("PqConfig: refresh: expected a finite share above 0, got {}", self.refresh);
        }
        if self.coarse != 0 && !(self.coarse.is_power_of_two() && (2..=256).contains(&self.coarse)) {
            bail!("PqConfig: coarse: expected 0, 2, 4, 8, ... or 256 clusters, got {}", self.coarse);
        }
        if self.max_train_keys < self.coarse {
            bail!("PqConfig: max_train_keys: expected at least {} (coarse), got {}", self.coarse, self.max_train_keys);
        }
        if self.coarse != 0 && self.metric != Metric::Euclidean {
            bail!("PqConfig: metric: expected Euclidean with coarse clusters, got {:?}", self.metric);
        }
        if self.query_weights && self.metric != Metric::Euclidean {
            bail!("PqConfig: query_weights: expected false with the metric {:?}, got true", self.metric);
        }
        if self.coarse == 0 && self.tail == Tail::ClusterMeans {
            bail!("PqConfig: coarse: expected at least 2 clusters with a tail of cluster means, got 0");
        }
        self.heavy.validate()
    }

    /// Centroids a subspace.
    pub fn n_centroids(&self) -> usize {
        let bits = u32::try_from(self.pq_bits).unwrap_or(u32::MAX);
        1usize.checked_shl(bits).unwrap_or(usize::MAX)
    }

    /// Keys that a codebook needs at least: one a centroid.
    pub(crate) fn min_train_keys(&self) -> usize {
        self.n_centroids().max(self.coarse)
    }

    /// Position of the first key that is quantized.
    pub fn init_offset(&self) -> usize {
        self.init_offset.unwrap_or(self.sink)
    }

    /// Whether attention over `n` keys is dense: as long as there is nothing to save or no codebook yet, that is while
    /// `n <= max(sink + heavy + window, heavy + init_offset + 1 + max(n_centroids, coarse))`.
    pub fn is_dense(&self, n: usize) -> bool {
        let heavy = self.heavy.count(n);
        let attended = self.sink.saturating_add(heavy).saturating_add(self.window);
        let trained = heavy.saturating_add(self.init_offset()).saturating_add(self.min_train_keys().saturating_add(1));
        n <= attended.max(trained)
    }

    /// Positions of the keys that can be selected among `n`.
    pub fn candidates(&self, n: usize) -> std::ops::Range<usize> {
        let end = n.saturating_sub(self.window);
        self.init_offset().min(end)..end
    }

    /// Keys that one decode step attends to when there are `n`: at most these, since a heavy key may lie in the sink
    /// where `init_offset` is smaller.
    pub fn attended(&self, n: usize) -> usize {
        if self.is_dense(n) {
            return n;
        }
        let heavy = self.heavy.count(n).min(self.candidates(n).len());
        self.sink.saturating_add(heavy).saturating_add(self.window).min(n)
    }
}

/// The budget of selected keys.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Heavy {
    /// So many: at least 1.
    Keys(usize),
    /// A share of all keys, rounded up: above 0, at most 1.
    Fraction(f64),
}

impl Heavy {
    /// How many keys of `n` this is.
    pub fn count(self, n: usize) -> usize {
        match self {
            Self::Keys(keys) => keys,
            // A share such as 7% is no binary fraction: what is above a whole number by rounding alone is that number.
            Self::Fraction(fraction) => (fraction * n as f64 * (1.0 - 4.0 * f64::EPSILON)).ceil() as usize,
        }
    }

    fn validate(self) -> Result<()> {
        match self {
            Self::Keys(0) => bail!("PqConfig: heavy: expected at least 1 key, got 0"),
            Self::Fraction(fraction) if !(fraction > 0.0 && fraction <= 1.0) => {
                bail!("PqConfig: heavy: expected a share above 0% and at most 100%, got {self}")
            }
            _ => Ok(()),
        }
    }
}

/// `512` for keys, `2%` for a share.
impl FromStr for Heavy {
    type Err = candle_core::Error;

    fn from_str(text: &str) -> Result<Self> {
        let heavy = match text.trim().strip_suffix('%') {
            Some(percent) => percent.trim().parse().ok().map(|percent: f64| Self::Fraction(percent / 100.0)),
            None => text.trim().parse().ok().map(Self::Keys),
        };
        match heavy {
            Some(heavy) => heavy.validate().map(|()| heavy),
            None => bail!("PqConfig: heavy: expected a number of keys such as 512 or a share such as 2%, got {text:?}"),
        }
    }
}

impl fmt::Display for Heavy {
    fn fmt(&self, f: &mut fmt::Formatter) -> fmt::Result {
        match self {
            Self::Keys(keys) => write!(f, "{keys}"),
            Self::Fraction(fraction) => write!(f, "{}%", (fraction * 1e12).round() / 1e10),
        }
    }
}

/// What nearest centroids are near in.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Metric {
    /// Squared distance: the best reconstruction of the keys.
    Euclidean,
    /// Inner product, by the augmentation `sqrt(phi - |x|²)`: favours keys of large norm. Not with `coarse` clusters,
    /// whose residuals no longer have the norms of the keys.
    InnerProduct,
}

/// Who selects.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Selection {
    /// Each query head its own keys: the most faithful.
    PerQueryHead,
    /// The query heads of a KV head together, by the sum of their softmax: K and V are read once a group.
    PerKvHead,
}

/// What stands for the keys that a decode step does not attend to.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Tail {
    /// Nothing: the attended keys share all the weight.
    None,
    /// The mean value of each `coarse` cluster, with the weight that its keys have by their scores: closer to dense
    /// attention than any selection alone, for one more pass over the scores. Values of a cluster are summed in f32, so they
    /// must be small beside 3.4e38 divided by the number of keys.
    ClusterMeans,
}
