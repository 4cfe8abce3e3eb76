//! The centroids of one layer's keys.

use std::collections::HashMap;
use std::ops::Range;
use std::path::Path;

use candle_core::{bail, DType, Device, Result, Tensor};

use crate::config::{Metric, PqConfig};
use crate::ops::{self, KmeansOptions};

/// Centroids for every (batch, KV head, subspace), trained on keys and fixed from then on.
#[derive(Debug, Clone)]
pub struct Codebook {
    centroids: Tensor,
    phi: Option<Tensor>,
}

impl Codebook {
    /// Trains on `keys`, `[b, h_kv, n, head_dim]`; see [`ops::kmeans`].
    ///
    /// # Errors
    /// A config that does not suit the keys, or fewer keys than `config.n_centroids()`.
    pub fn train(keys: &Tensor, config: &PqConfig) -> Result<Self> {
        let options = KmeansOptions {
            pq_dim: config.pq_dim,
            pq_bits: config.pq_bits,
            iters: config.kmeans_iters,
            metric: config.metric,
            max_keys: config.max_train_keys,
            seed: config.seed,
        };
        let (centroids, phi) = ops::kmeans(keys, &options)?;
        Ok(Self { centroids, phi })
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
        Ok(Self { centroids, phi })
    }

    /// Codes `[b, h_kv, n, pq_dim]` u8 of `keys` `[b, h_kv, n, head_dim]`; see [`ops::encode`].
    ///
    /// # Errors
    /// Keys of other dimensions than those trained on.
    pub fn encode(&self, keys: &Tensor) -> Result<Tensor> {
        ops::encode(keys, &self.centroids, self.phi.as_ref())
    }

    /// Writes the codes of the keys at `positions` of a cache in place, `[b, h_kv, capacity, ...]` each.
    pub(crate) fn encode_into(&self, codes: &Tensor, keys: &Tensor, positions: Range<usize>) -> Result<()> {
        let keys = keys.narrow(2, positions.start, positions.len())?;
        #[cfg(feature = "cuda")]
        if keys.device().is_cuda() {
            let codes = codes.narrow(2, positions.start, positions.len())?;
            return ops::encode_into(&codes, &keys, &self.centroids, self.phi.as_ref(), None);
        }
        codes.slice_set(&self.encode(&keys)?, 2, positions.start)
    }

    /// As [`encode_into`](Self::encode_into), for the block that the GPU finds due.
    #[cfg(feature = "cuda")]
    pub(crate) fn encode_due(&self, codes: &Tensor, keys: &Tensor, due: ops::Due) -> Result<()> {
        ops::encode_into(codes, keys, &self.centroids, self.phi.as_ref(), Some(due))
    }

    /// Centroids without the augmentation, for [`ops::score`]: `[b, h_kv, pq_dim, n_centroids, pq_len]`.
    ///
    /// # Errors
    /// None in a codebook that was made here.
    pub fn centroids(&self) -> Result<Tensor> {
        self.centroids.narrow(4, 0, self.pq_len())
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

    /// `[b, h_kv, pq_dim, n_centroids]`
    pub fn dims(&self) -> [usize; 4] {
        let dims = self.centroids.dims();
        [dims[0], dims[1], dims[2], dims[3]]
    }

    /// Bytes of the centroids.
    pub fn bytes(&self) -> usize {
        let phi = self.phi.as_ref().map_or(0, Tensor::elem_count);
        (self.centroids.elem_count() + phi) * size_of::<f32>()
    }

    /// Writes a safetensors file with `centroids` and, for the inner-product metric, `phi`.
    ///
    /// # Errors
    /// What writing the file gives.
    pub fn save(&self, path: impl AsRef<Path>) -> Result<()> {
        let mut tensors = HashMap::from([("centroids", self.centroids.clone())]);
        if let Some(phi) = &self.phi {
            tensors.insert("phi", phi.clone());
        }
        candle_core::safetensors::save(&tensors, path)
    }

    /// Reads what [`Codebook::save`] wrote.
    ///
    /// # Errors
    /// What reading the file gives, a missing `centroids`, or tensors that are no codebook.
    pub fn load(path: impl AsRef<Path>, device: &Device) -> Result<Self> {
        let mut tensors = candle_core::safetensors::load(&path, device)?;
        match tensors.remove("centroids") {
            Some(centroids) => Self::new(centroids, tensors.remove("phi")),
            None => bail!("Codebook: expected a tensor `centroids` in {}, found none", path.as_ref().display()),
        }
    }
}
