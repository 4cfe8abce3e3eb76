//! The centroids of one layer's keys.

use std::collections::HashMap;
use std::path::Path;

use candle_core::safetensors::Load;
use candle_core::{bail, DType, Device, Error, Result, Tensor};
use safetensors::SafeTensors;

use crate::config::{Metric, PqConfig};
use crate::fault::point_of_failure;
use crate::ops::arg::own_if_empty;
#[cfg(feature = "cuda")]
use crate::ops::Coarse;
use crate::ops::{self, KmeansOptions, MAX_HEAD_DIM};

/// Centroids for every (batch, KV head, subspace), trained on keys and fixed from then on.
///
/// With coarse clusters there are also centroids of whole keys, and those of the subspaces are of residuals: of what the
/// centroid nearest to a key leaves of it.
///
/// With weights all of this is in keys whose elements have been multiplied by them: what is near there is near in what
/// queries look at. Scores are those of the centroids divided by the weights, so that queries stay as they are.
///
/// ```
/// use candle_core::{Device, Tensor};
/// use candle_pq_attn::{Codebook, PqConfig};
///
/// let config = PqConfig { coarse: 16, pq_bits: 4, ..PqConfig::default() };
/// let keys = Tensor::randn(0f32, 1., (1, 2, 600, 64), &Device::Cpu)?;
/// let codebook = Codebook::train(&keys, &config)?;
/// let (codes, clusters) = codebook.encode(&keys)?;
/// assert_eq!(codes.dims(), [1, 2, 600, 8]);
/// assert_eq!(clusters.map(|clusters| clusters.dims().to_vec()), Some(vec![1, 2, 600]));
/// # candle_core::Result::Ok(())
/// ```
#[derive(Debug, Clone)]
pub struct Codebook {
    centroids: Tensor,
    phi: Option<Tensor>,
    /// `[b, h_kv, n_clusters, head_dim]`
    coarse: Option<Tensor>,
    weights: Option<Weights>,
}

/// Weights of the elements of keys, and the centroids without them.
#[derive(Debug, Clone)]
struct Weights {
    /// `[b, h_kv, head_dim]`, without gaps
    weights: Tensor,
    centroids: Tensor,
    coarse: Option<Tensor>,
}

impl Codebook {
    /// Trains on `keys`, `[b, h_kv, n, head_dim]`; see [`ops::kmeans`]. Clusters and residuals are of the same sample, half
    /// of which is from the last quarter of the keys: the latest matter most, and the keys to come are likest them.
    ///
    /// # Errors
    /// A config that does not suit the keys, or fewer keys than centroids or clusters.
    pub fn train(keys: &Tensor, config: &PqConfig) -> Result<Self> {
        Self::train_weighted(keys, None, config)
    }

    /// As [`train`](Self::train), on keys whose elements are multiplied by `weights`, `[b, h_kv, head_dim]` f32, where there
    /// are some. The roots of the mean squares of the elements of queries make the error of a score smallest; see
    /// [`PqConfig::query_weights`], with which a cache takes them from its prompt.
    ///
    /// # Errors
    /// Those of [`train`](Self::train) and of [`with_weights`](Self::with_weights).
    pub fn train_weighted(keys: &Tensor, weights: Option<&Tensor>, config: &PqConfig) -> Result<Self> {
        let [b, h_kv, n, head_dim] = *keys.dims() else {
            bail!("Codebook: keys: expected [b, h_kv, n, head_dim], got {:?}", keys.dims());
        };
        config.validate(head_dim)?;
        if b == 0 || h_kv == 0 {
            bail!("Codebook: keys: expected at least one sequence and one KV head, got batch {b}, h_kv {h_kv}");
        }
        check_float(keys)?;
        if n < config.min_train_keys() {
            bail!("Codebook: keys: expected at least {} (n_centroids, coarse), got {n}", config.min_train_keys());
        }
        let options = KmeansOptions {
            pq_dim: config.pq_dim,
            pq_bits: config.pq_bits,
            iters: config.kmeans_iters,
            metric: config.metric,
            max_keys: config.max_train_keys,
            seed: config.seed,
        };
        if let Some(weights) = weights {
            check_weights(weights, [b, h_kv, head_dim], config.metric)?;
        }
        let with_weights = |codebook: Self| match weights {
            None => Ok(codebook),
            Some(weights) => codebook.with_weights(weights.clone()),
        };
        // Weighted, as far as they are trained on.
        let sample = match (weights, config.coarse) {
            (None, 0) => keys.clone(),
            _ => weigh(&select(keys, &sample_positions(n, config))?, weights)?,
        };
        if config.coarse == 0 {
            let (centroids, phi) = ops::kmeans(&sample, &options)?;
            return with_weights(Self::new(centroids, phi)?);
        }
        let whole = KmeansOptions { pq_dim: 1, pq_bits: config.coarse.ilog2() as usize, ..options };
        let coarse = ops::kmeans(&sample, &whole)?.0.squeeze(2)?;
        let residuals = residuals(&sample, &coarse, &nearest(&sample, &coarse)?)?;
        let (centroids, phi) = ops::kmeans(&residuals, &options)?;
        with_weights(Self::new(centroids, phi)?.with_coarse(coarse)?)
    }

    /// From centroids `[b, h_kv, pq_dim, n_centroids, pq_len]` f32; with `phi` `[b, h_kv, pq_dim]` f32 they are of the
    /// inner-product metric, and one wider.
    ///
    /// # Errors
    /// Other shapes or dtypes.
    pub fn new(centroids: Tensor, phi: Option<Tensor>) -> Result<Self> {
        let (b, h_kv, pq_dim, n_centroids, columns) = match *centroids.dims() {
            [b, h_kv, pq_dim, n_centroids, columns] => (b, h_kv, pq_dim, n_centroids, columns),
            _ => bail!(
                "Codebook: centroids: expected [b, h_kv, pq_dim, n_centroids, pq_len], got {:?}",
                centroids.dims()
            ),
        };
        if centroids.dtype() != DType::F32 {
            bail!("Codebook: centroids: expected dtype f32, got {}", centroids.dtype().as_str());
        }
        if !(2..=256).contains(&n_centroids) || !n_centroids.is_power_of_two() {
            bail!("Codebook: centroids: expected 2, 4, 8, ... or 256 centroids, got {n_centroids}");
        }
        if let Some(phi) = &phi {
            if phi.dims() != [b, h_kv, pq_dim] || phi.dtype() != DType::F32 {
                let (dims, dtype) = (phi.dims(), phi.dtype().as_str());
                bail!("Codebook: phi: expected [{b}, {h_kv}, {pq_dim}] f32, got {dims:?} {dtype}");
            }
        }
        if pq_dim == 0 {
            bail!("Codebook: centroids: expected a pq_dim of at least 1, got {:?}", centroids.dims());
        }
        if columns <= usize::from(phi.is_some()) {
            bail!("Codebook: centroids: expected a pq_len of at least 1, got {:?}", centroids.dims());
        }
        let head_dim = pq_dim.checked_mul(columns - usize::from(phi.is_some()));
        if head_dim.is_none_or(|head_dim| head_dim > MAX_HEAD_DIM) {
            bail!(
                "Codebook: centroids: expected a head_dim (pq_dim times pq_len) of 1 to {MAX_HEAD_DIM}, got {:?}",
                centroids.dims()
            );
        }
        let own = |tensor: &Tensor| own_if_empty(tensor)?.contiguous();
        Ok(Self { centroids: own(&centroids)?, phi: phi.as_ref().map(own).transpose()?, coarse: None, weights: None })
    }

    /// The same centroids, of residuals to the clusters whose centroids are `coarse`, `[b, h_kv, n_clusters, head_dim]`
    /// f32. Weights come after.
    ///
    /// # Errors
    /// Another shape or dtype, or a codebook of the inner-product metric or with weights.
    pub fn with_coarse(self, coarse: Tensor) -> Result<Self> {
        let [b, h_kv, pq_dim, _] = self.dims();
        let head_dim = pq_dim * self.pq_len();
        match *coarse.dims() {
            [cb, ch, 2..=256, cd] if [cb, ch, cd] == [b, h_kv, head_dim] && coarse.dim(2)?.is_power_of_two() => {}
            _ => bail!(
                "Codebook: coarse: expected [{b}, {h_kv}, 2, 4, 8, ... or 256, {head_dim}], got {:?}",
                coarse.dims()
            ),
        }
        if coarse.dtype() != DType::F32 {
            bail!("Codebook: coarse: expected dtype f32, got {}", coarse.dtype().as_str());
        }
        if self.phi.is_some() {
            bail!("Codebook: coarse: expected centroids of the Euclidean metric, got InnerProduct");
        }
        if self.weights.is_some() {
            bail!("Codebook: coarse: expected a codebook that gets its weights afterwards, got one that has some");
        }
        Ok(Self { coarse: Some(own_if_empty(&coarse)?.contiguous()?), ..self })
    }

    /// The same centroids, of keys whose elements have been multiplied by `weights`, `[b, h_kv, head_dim]` f32.
    ///
    /// # Errors
    /// Another shape or dtype, numbers that are not above 0 or not finite or whose inverse is not, or a codebook of the
    /// inner-product metric.
    pub fn with_weights(self, weights: Tensor) -> Result<Self> {
        let ([b, h_kv, pq_dim, _], pq_len) = (self.dims(), self.pq_len());
        let head_dim = pq_dim * pq_len;
        let weights = own_if_empty(&weights)?;
        let numbers = check_weights(&weights, [b, h_kv, head_dim], self.metric())?;
        point_of_failure()?;
        // Inverted here, so that every device multiplies by the same numbers.
        let inverse: Vec<f32> = numbers.into_iter().map(f32::recip).collect();
        let inverse = Tensor::from_vec(inverse, (b, h_kv, head_dim), weights.device())?;
        let centroids = self.centroids.broadcast_mul(&inverse.reshape((b, h_kv, pq_dim, 1, pq_len))?)?;
        let coarse = self.coarse.as_ref().map(|coarse| weigh(coarse, Some(&inverse))).transpose()?;
        let weights = Weights { weights: weights.contiguous()?, centroids, coarse };
        Ok(Self { weights: Some(weights), ..self })
    }

    /// Codes `[b, h_kv, n, pq_dim]` u8 of `keys` `[b, h_kv, n, head_dim]`, and with coarse clusters those of the keys,
    /// `[b, h_kv, n]` u8; see [`ops::encode`].
    ///
    /// # Errors
    /// Keys of other dimensions than those trained on.
    pub fn encode(&self, keys: &Tensor) -> Result<(Tensor, Option<Tensor>)> {
        // Keys that are multiplied, or have residuals, at a time: a prompt's would be twice the size of its keys, or more.
        const BLOCK: usize = 4096;
        if self.coarse.is_none() && self.weights.is_none() {
            return Ok((ops::encode(keys, &self.centroids, self.phi.as_ref())?, None));
        }
        let ([b, h_kv, pq_dim, _], pq_len) = (self.dims(), self.pq_len());
        let n = match *keys.dims() {
            // Multiplying by weights would make of others what fits.
            [keys_b, keys_h, n, d] if [keys_b, keys_h, d] == [b, h_kv, pq_dim * pq_len] => n,
            _ => bail!("Codebook: keys: expected [{b}, {h_kv}, n, {}], got {:?}", pq_dim * pq_len, keys.dims()),
        };
        check_float(keys)?;
        let keys = own_if_empty(keys)?;
        let block = |start: usize| {
            let keys = weigh(&keys.narrow(2, start, BLOCK.min(n - start))?, self.weights())?;
            let Some(coarse) = &self.coarse else { return Ok((ops::encode(&keys, &self.centroids, None)?, None)) };
            let clusters = nearest(&keys, coarse)?;
            let codes = ops::encode(&residuals(&keys, coarse, &clusters)?, &self.centroids, None)?;
            Ok((codes, Some(clusters)))
        };
        // An empty block where there are no keys.
        let blocks: Result<(Vec<_>, Vec<_>)> = (0..n.max(1)).step_by(BLOCK).map(block).collect();
        let (codes, clusters) = blocks?;
        let clusters: Option<Vec<_>> = clusters.into_iter().collect();
        Ok((Tensor::cat(&codes, 2)?, clusters.map(|clusters| Tensor::cat(&clusters, 2)).transpose()?))
    }

    /// Writes the codes of a cache's keys in place from position `first` on, and their clusters; `[b, h_kv, capacity, ...]`.
    pub(crate) fn encode_into(
        &self,
        (codes, coarse_codes): (&Tensor, Option<&Tensor>),
        keys: &Tensor,
        first: usize,
    ) -> Result<()> {
        #[cfg(feature = "cuda")]
        if keys.device().is_cuda() {
            let of_keys = |codes: &Tensor| codes.narrow(2, first, keys.dim(2)?);
            return self.encode_on_gpu((&of_keys(codes)?, coarse_codes.map(of_keys).transpose()?.as_ref()), keys);
        }
        let (new, new_coarse) = self.encode(keys)?;
        codes.slice_set(&new, 2, first)?;
        point_of_failure()?;
        match (coarse_codes, new_coarse) {
            (Some(coarse_codes), Some(new)) => coarse_codes.slice_set(&new, 2, first),
            _ => Ok(()),
        }
    }

    #[cfg(feature = "cuda")]
    fn encode_on_gpu(&self, (codes, coarse_codes): (&Tensor, Option<&Tensor>), keys: &Tensor) -> Result<()> {
        let coarse = self.coarse_of(coarse_codes);
        let options = self.encode_options(coarse.as_ref());
        if let Some(Coarse { codes, centroids }) = &coarse {
            let options = ops::EncodeOptions { phi: None, coarse: None, ..options };
            ops::encode_into(&codes.unsqueeze(3)?, keys, &centroids.unsqueeze(2)?, options)?;
        }
        ops::encode_into(codes, keys, &self.centroids, options)
    }

    /// What [`ops::begin_step`] is told of this codebook.
    #[cfg(feature = "cuda")]
    pub(crate) fn encoder(&self) -> ops::Encoder<'_> {
        let (phi, weights, coarse) = (self.phi.as_ref(), self.weights(), self.coarse.as_ref());
        ops::Encoder { centroids: &self.centroids, phi, weights, coarse }
    }

    /// Clusters of keys beside the centroids that they are coded by, with the weights.
    #[cfg(feature = "cuda")]
    fn coarse_of(&self, codes: Option<&Tensor>) -> Option<Coarse> {
        Some(Coarse { codes: codes?.clone(), centroids: self.coarse.clone()? })
    }

    #[cfg(feature = "cuda")]
    fn encode_options<'a>(&'a self, coarse: Option<&'a Coarse>) -> ops::EncodeOptions<'a> {
        ops::EncodeOptions { phi: self.phi.as_ref(), weights: self.weights(), coarse }
    }

    /// Centroids without the augmentation and the weights, for [`ops::score`]: `[b, h_kv, pq_dim, n_centroids, pq_len]`.
    ///
    /// # Errors
    /// None in a codebook that was made here.
    pub fn centroids(&self) -> Result<Tensor> {
        match &self.weights {
            None => self.centroids.narrow(4, 0, self.pq_len()),
            Some(Weights { centroids, .. }) => Ok(centroids.clone()),
        }
    }

    /// Centroids of the coarse clusters without the weights, `[b, h_kv, n_clusters, head_dim]`, where there are any.
    pub fn coarse(&self) -> Option<&Tensor> {
        match &self.weights {
            None => self.coarse.as_ref(),
            Some(Weights { coarse, .. }) => coarse.as_ref(),
        }
    }

    /// What the elements of keys are multiplied by before they are encoded, `[b, h_kv, head_dim]`, if anything.
    pub fn weights(&self) -> Option<&Tensor> {
        self.weights.as_ref().map(|Weights { weights, .. }| weights)
    }

    /// Elements of a sub-vector.
    pub fn pq_len(&self) -> usize {
        self.centroids.dims()[4] - usize::from(self.phi.is_some())
    }

    /// The metric that it was trained for.
    pub fn metric(&self) -> Metric {
        match self.phi {
            None => Metric::Euclidean,
            Some(_) => Metric::InnerProduct,
        }
    }

    /// The device of the centroids.
    pub(crate) fn device(&self) -> &Device {
        self.centroids.device()
    }

    /// `[b, h_kv, pq_dim, n_centroids]`
    pub fn dims(&self) -> [usize; 4] {
        let dims = self.centroids.dims();
        [dims[0], dims[1], dims[2], dims[3]]
    }

    /// Bytes of the centroids, with weights those of both forms.
    pub fn bytes(&self) -> usize {
        let tensors = [Some(&self.centroids), self.phi.as_ref(), self.coarse.as_ref()];
        let weights = self.weights.as_ref().map(|w| [Some(&w.weights), Some(&w.centroids), w.coarse.as_ref()]);
        tensors.into_iter().chain(weights.into_iter().flatten()).flatten().map(Tensor::elem_count).sum::<usize>()
            * size_of::<f32>()
    }

    /// Writes a safetensors file with `centroids` and, where there are any, `phi`, `coarse` and `weights`.
    ///
    /// # Errors
    /// What writing the file gives.
    pub fn save(&self, path: impl AsRef<Path>) -> Result<()> {
        let tensors: HashMap<_, _> = self.tensors().into_iter().map(|(name, tensor)| (name, tensor.clone())).collect();
        let path = path.as_ref();
        candle_core::safetensors::save(&tensors, path).map_err(|error| at_path("Codebook", path, error))
    }

    /// Reads what [`Codebook::save`] wrote.
    ///
    /// # Errors
    /// What reading the file gives, a missing `centroids`, or tensors that are no codebook.
    pub fn load(path: impl AsRef<Path>, device: &Device) -> Result<Self> {
        let path = path.as_ref();
        let load = || {
            let bytes = std::fs::read(path)?;
            let file = SafeTensors::deserialize(&bytes)?;
            Self::from_tensors(|name| match file.tensor(name) {
                Ok(tensor) => check_shape(name, tensor.shape()).and_then(|()| tensor.load(device)).map(Some),
                Err(_) => Ok(None),
            })
        };
        load().map_err(|error| at_path("Codebook", path, error))
    }

    /// What it is made of, by the names that files have for it.
    pub(crate) fn tensors(&self) -> Vec<(&'static str, &Tensor)> {
        let all = [
            ("centroids", Some(&self.centroids)),
            ("phi", self.phi.as_ref()),
            ("coarse", self.coarse.as_ref()),
            ("weights", self.weights()),
        ];
        all.into_iter().filter_map(|(name, tensor)| Some((name, tensor?))).collect()
    }

    /// From such tensors, as far as `find` has them.
    pub(crate) fn from_tensors(mut find: impl FnMut(&'static str) -> Result<Option<Tensor>>) -> Result<Self> {
        let Some(centroids) = find("centroids")? else {
            bail!("Codebook: expected a tensor `centroids`, found none");
        };
        let codebook = Self::new(centroids, find("phi")?)?;
        let codebook = match find("coarse")? {
            None => codebook,
            Some(coarse) => codebook.with_coarse(coarse)?,
        };
        match find("weights")? {
            None => Ok(codebook),
            Some(weights) => codebook.with_weights(weights),
        }
    }
}

/// An error of a file's, in one line: without the backtrace that Candle puts below it where `RUST_BACKTRACE` is set.
pub(crate) fn at_path(op: &str, path: &Path, error: Error) -> Error {
    let error = error.to_string();
    let line = error.lines().next().unwrap_or_default();
    let what = line.strip_prefix(op).and_then(|line| line.strip_prefix(": ")).unwrap_or(line);
    Error::Msg(format!("{op}: {}: {what}", path.display()))
}

/// Fails where a shape that a file names cannot be counted in any order: where a tensor has no elements, its other
/// dimensions may be any.
pub(crate) fn check_shape(name: &str, shape: &[usize]) -> Result<()> {
    match shape.iter().filter(|dim| **dim > 0).try_fold(1usize, |product, dim| product.checked_mul(*dim)) {
        Some(_) => Ok(()),
        None => bail!("{name}: expected a shape of at most {} elements, got {shape:?}", usize::MAX),
    }
}

/// Positions of the keys to train on, of `n`. With clusters: of half of them, or of as many as are enough for all centroids,
/// a half spread over the last quarter, and the others over the rest.
fn sample_positions(n: usize, config: &PqConfig) -> Vec<i64> {
    let spread = |from: usize, to: usize, count: usize| {
        let (from, to, len) = (from as u128, to as u128, count as u128);
        (0..len).map(move |i| (from + i * (to - from) / len) as i64)
    };
    let (most, enough) = (n.min(config.max_train_keys), 4 * config.min_train_keys());
    let count = if config.coarse > 0 { most.min(enough.max(n / 2)) } else { most };
    if config.coarse == 0 || count < enough {
        return spread(0, n, count).collect();
    }
    let (recent, last_quarter) = (count / 2, n - n / 4);
    spread(0, last_quarter, count - recent).chain(spread(last_quarter, n, recent)).collect()
}

/// The keys at `positions`.
fn select(keys: &Tensor, positions: &[i64]) -> Result<Tensor> {
    let (b, h_kv, _, head_dim) = keys.dims4()?;
    let count = positions.len();
    let positions = Tensor::from_slice(positions, count, keys.device())?;
    // Head by head: Candle gathers from tensors without gaps, and only a head's keys are one in a cache.
    let head =
        |i: usize| keys.narrow(0, i / h_kv, 1)?.narrow(1, i % h_kv, 1)?.contiguous()?.index_select(&positions, 2);
    let heads: Result<Vec<_>> = (0..b * h_kv).map(head).collect();
    Tensor::cat(&heads?, 0)?.reshape((b, h_kv, count, head_dim))
}

/// Fails unless the keys are f32, f16 or bf16: multiplying by weights would make f32 of others.
fn check_float(keys: &Tensor) -> Result<()> {
    match keys.dtype() {
        DType::F32 | DType::F16 | DType::BF16 => Ok(()),
        other => bail!("Codebook: keys: expected dtype f32, f16 or bf16, got {}", other.as_str()),
    }
}

/// The numbers of weights for keys of `[b, h_kv, head_dim]`, if they are fit for it.
fn check_weights(weights: &Tensor, dims: [usize; 3], metric: Metric) -> Result<Vec<f32>> {
    if weights.dims() != dims || weights.dtype() != DType::F32 {
        bail!("Codebook: weights: expected {dims:?} f32, got {:?} {}", weights.dims(), weights.dtype().as_str());
    }
    if metric != Metric::Euclidean {
        bail!("Codebook: weights: expected centroids of the Euclidean metric, got {metric:?}");
    }
    let numbers = weights.flatten_all()?.to_vec1::<f32>()?;
    if let Some(bad) = numbers.iter().find(|w| !(w.is_normal() && **w > 0.0 && w.recip().is_normal())) {
        bail!("Codebook: weights: expected positive finite numbers, got {bad}");
    }
    Ok(numbers)
}

/// Keys, or centroids of keys, `[b, h_kv, n, head_dim]`, in f32 and multiplied by `weights`, if there are any.
fn weigh(keys: &Tensor, weights: Option<&Tensor>) -> Result<Tensor> {
    match weights {
        None => Ok(keys.clone()),
        Some(weights) => keys.to_dtype(DType::F32)?.broadcast_mul(&weights.unsqueeze(2)?),
    }
}

/// The cluster of each key, `[b, h_kv, n]` u8.
fn nearest(keys: &Tensor, coarse: &Tensor) -> Result<Tensor> {
    ops::encode(keys, &coarse.unsqueeze(2)?, None)?.squeeze(3)
}

/// Keys minus the centroids of their clusters, in f32.
fn residuals(keys: &Tensor, coarse: &Tensor, clusters: &Tensor) -> Result<Tensor> {
    let (b, h_kv, n_clusters, head_dim) = coarse.dims4()?;
    let first: Vec<u32> = (0..b * h_kv).map(|head| (head * n_clusters) as u32).collect();
    let first = Tensor::from_vec(first, (b, h_kv, 1), keys.device())?;
    let rows = clusters.to_dtype(DType::U32)?.broadcast_add(&first)?.flatten_all()?;
    let centroids = coarse.reshape((b * h_kv * n_clusters, head_dim))?.index_select(&rows, 0)?;
    keys.to_dtype(DType::F32)? - centroids.reshape(keys.shape())?
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn half_of_the_sample_is_recent() {
        let sample_positions = |n, max_train_keys, coarse| {
            sample_positions(n, &PqConfig { pq_bits: 1, coarse, max_train_keys, ..PqConfig::default() })
        };
        assert_eq!(sample_positions(6, 10, 2), [0, 1, 2, 3, 4, 5], "too few to choose");
        assert_eq!(sample_positions(8, 4, 2), [0, 2, 4, 6], "too few to choose");
        assert_eq!(sample_positions(16, 8, 2), [0, 3, 6, 9, 12, 13, 14, 15]);
        assert_eq!(sample_positions(16, 100, 2), [0, 3, 6, 9, 12, 13, 14, 15], "half");
        assert_eq!(sample_positions(8, 100, 0), [0, 1, 2, 3, 4, 5, 6, 7], "without clusters");
        // No more than are needed, but enough: the recent ones twice.
        assert_eq!(sample_positions(8, 100, 2), [0, 1, 3, 4, 6, 6, 7, 7]);
        assert_eq!(sample_positions(100, 1000, 16).len(), 64);
        let many = sample_positions(1 << 40, 1000, 16);
        assert_eq!((many.len(), many[499] < 3 << 38, many[500], many[999] < 1 << 40), (1000, true, 3 << 38, true));
    }
}
