//! Codebook training: Lloyd's k-means in every subspace.

mod cpu;
#[cfg(feature = "cuda")]
mod cuda;

#[cfg(feature = "cuda")]
use candle_core::CudaStorage;
use candle_core::{bail, CpuStorage, CustomOp1, Layout, Result, Shape, Tensor};

use super::arg::{with_unit_rows, Arg, View};
use super::side_output::SideOutput;
use super::MAX_HEAD_DIM;
use crate::config::Metric;

const OP: &str = "kmeans";

/// How [`kmeans`] trains.
#[derive(Debug, Clone, Copy)]
pub struct KmeansOptions {
    /// Subspaces, a divisor of `head_dim`.
    pub pq_dim: usize,
    /// `2^pq_bits` centroids a subspace, 1 to 8.
    pub pq_bits: usize,
    /// Rounds of assignment and update; with 0 the centroids are keys drawn at random.
    pub iters: usize,
    /// What distance the codes are to be good for.
    pub metric: Metric,
    /// Trains on at most so many keys, spread evenly over all of them.
    pub max_keys: usize,
    /// Same seed, same keys: same centroids, to the bit.
    pub seed: u64,
}

/// Trains centroids for each (batch, KV head, subspace) by Lloyd's algorithm.
///
/// Starts from distinct keys drawn at random; a centroid that no key is nearest to is drawn anew. With
/// [`Metric::InnerProduct`] sub-vectors get one more coordinate, `sqrt(phi - |x|²)` (see [`encode`](super::encode())).
///
/// # Shapes
/// - `keys`: `[b, h_kv, n, head_dim]`, f32, f16 or bf16, any strides; `n` at least the number of centroids
/// - returns centroids `[b, h_kv, pq_dim, n_centroids, pq_len]` f32, with the inner-product metric `pq_len + 1` wide
///   and with `phi` `[b, h_kv, pq_dim]` f32, the largest squared norm of a sub-vector
///
/// # Errors
/// Other shapes or dtypes, options out of range, or fewer keys than centroids.
///
/// # Numerics
/// Assignment as [`encode`](super::encode()), means in f64: the same bits for any number of threads.
///
/// ```
/// use candle_core::{Device, Tensor};
/// use candle_pq_attn::ops::{encode, kmeans, KmeansOptions};
/// use candle_pq_attn::Metric;
///
/// let keys = Tensor::randn(0f32, 1., (1, 2, 500, 64), &Device::Cpu)?;
/// let (pq_dim, pq_bits, metric) = (8, 4, Metric::Euclidean);
/// let options = KmeansOptions { pq_dim, pq_bits, iters: 5, metric, max_keys: 500, seed: 0 };
/// let (centroids, phi) = kmeans(&keys, &options)?;
/// assert_eq!(centroids.dims(), [1, 2, 8, 16, 8]);
/// assert!(phi.is_none()); // of the inner-product metric
/// assert_eq!(encode(&keys, &centroids, None)?.dims(), [1, 2, 500, 8]);
/// # candle_core::Result::Ok(())
/// ```
pub fn kmeans(keys: &Tensor, options: &KmeansOptions) -> Result<(Tensor, Option<Tensor>)> {
    let keys = with_unit_rows(keys)?;
    let op = Kmeans { plan: Plan::new(&keys, options)?, phi: SideOutput::default() };
    let centroids = keys.apply_op1_no_bwd(&op)?;
    let phi = match options.metric {
        Metric::Euclidean => None,
        Metric::InnerProduct => Some(op.phi.take(OP)?),
    };
    Ok((centroids, phi))
}

/// A checked call of [`kmeans`].
pub(crate) struct Plan {
    pub(crate) keys: View<4>,
    pub(crate) options: KmeansOptions,
    pub(crate) pq_len: usize,
    /// `pq_len`, and one more with the inner-product metric.
    pub(crate) columns: usize,
    pub(crate) n_centroids: usize,
    /// Keys trained on.
    pub(crate) samples: usize,
}

impl Plan {
    fn new(keys: &Tensor, options: &KmeansOptions) -> Result<Self> {
        let arg = Arg::new(OP, "keys", keys);
        arg.is_float()?;
        let view: View<4> = arg.view("[b, h_kv, n, head_dim]")?;
        let [_, _, n, head_dim] = view.dims;
        let &KmeansOptions { pq_dim, pq_bits, .. } = options;
        if head_dim == 0 || head_dim > MAX_HEAD_DIM {
            return arg.fail("a head_dim of 1 to 256", format_args!("{head_dim}"));
        }
        if pq_dim == 0 || !head_dim.is_multiple_of(pq_dim) {
            bail!("{OP}: pq_dim: expected a divisor of head_dim {head_dim}, got {pq_dim}");
        }
        if !(1..=8).contains(&pq_bits) {
            bail!("{OP}: pq_bits: expected 1 to 8, got {pq_bits}");
        }
        let n_centroids = 1 << pq_bits;
        let samples = n.min(options.max_keys);
        if samples < n_centroids {
            return arg.fail(
                &format!("at least n_centroids {n_centroids} keys to train on"),
                format_args!("{samples} (n {n}, max_keys {})", options.max_keys),
            );
        }
        let pq_len = head_dim / pq_dim;
        let columns = pq_len + usize::from(options.metric == Metric::InnerProduct);
        Ok(Self { keys: view, options: *options, pq_len, columns, n_centroids, samples })
    }
}

struct Kmeans {
    plan: Plan,
    phi: SideOutput,
}

impl CustomOp1 for Kmeans {
    fn name(&self) -> &'static str {
        OP
    }

    fn cpu_fwd(&self, keys: &CpuStorage, _: &Layout) -> Result<(CpuStorage, Shape)> {
        let [b, h_kv, ..] = self.plan.keys.dims;
        let (centroids, phi) = cpu::run(&self.plan, keys)?;
        let pq_dim = self.plan.options.pq_dim;
        self.phi.put_cpu(CpuStorage::F32(phi), (b, h_kv, pq_dim));
        let shape = (b, h_kv, pq_dim, self.plan.n_centroids, self.plan.columns);
        Ok((CpuStorage::F32(centroids), shape.into()))
    }

    #[cfg(feature = "cuda")]
    fn cuda_fwd(&self, keys: &CudaStorage, _: &Layout) -> Result<(CudaStorage, Shape)> {
        let [b, h_kv, ..] = self.plan.keys.dims;
        let (centroids, phi) = cuda::run(&self.plan, keys)?;
        let pq_dim = self.plan.options.pq_dim;
        self.phi.put_cuda(phi, (b, h_kv, pq_dim));
        Ok((centroids, (b, h_kv, pq_dim, self.plan.n_centroids, self.plan.columns).into()))
    }
}
