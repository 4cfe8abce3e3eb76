//! What a decode step adds to an index on a GPU: the block of keys that it filled.

mod cuda;

use candle_core::{Result, Tensor};

use super::cluster_sums::{self, ClusterSums};
use super::encode::{EncodeOptions, IntoPlan};
use crate::cuda::Lens;

const OP: &str = "index_block";

/// On which condition keys are encoded: blocks of keys follow each other from `init_offset` on, and one that ends with the
/// last key is due.
pub(crate) struct Due<'a> {
    pub(crate) lens: &'a mut Lens,
    pub(crate) init_offset: usize,
    pub(crate) block: usize,
    /// The position of the first key; no block begins before it.
    pub(crate) first: usize,
}

/// Writes the codes of the block that the GPU finds due to `codes`, and of its keys' clusters to those of `options`, and
/// adds its values to `clusters`; does nothing in sequences of which none is due.
///
/// The bits are those of [`encode`](super::encode()) and [`cluster_sums`](super::cluster_sums()), of all of which this is one
/// launch: as a part of a captured step it is idle in most.
///
/// # Shapes
/// Of all positions that there is room for, from `due.first` on: `codes` `[b, h_kv, capacity, pq_dim]`, keys and values
/// `[b, h_kv, capacity, head_dim]`, `centroids` as in [`encode`](super::encode()).
///
/// # Errors
/// Shapes or dtypes other than these.
pub(crate) fn index_block(
    codes: &Tensor,
    [keys, values]: [&Tensor; 2],
    centroids: &Tensor,
    options: EncodeOptions,
    clusters: Option<&ClusterSums>,
    due: Due,
) -> Result<()> {
    let sums = match (&options.coarse, clusters) {
        (Some(coarse), Some(clusters)) => Some(cluster_sums::Plan::new(values, &coarse.codes, clusters)?),
        _ => None,
    };
    let plan = Plan { into: IntoPlan::new(codes, keys, centroids, options)?, sums };
    cuda::run(&plan, codes, [keys, values], centroids, options, clusters, due)
}

/// A checked call of [`index_block`].
struct Plan {
    into: IntoPlan,
    sums: Option<cluster_sums::Plan>,
}
