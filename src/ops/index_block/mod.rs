//! What decode steps add to indexes on a GPU: the blocks of keys that they filled.

mod cuda;

use candle_core::{bail, Result, Tensor};

use super::arg::{Arg, View};
use super::cluster_sums::{self, ClusterSums};
use super::encode::{EncodeOptions, IntoPlan};
use super::score::Coarse;
use crate::cuda::Lens;

const OP: &str = "index_block";

/// A cache whose last block of keys may be due; all tensors are of all positions that there is room for, or of a pool's.
pub(crate) struct Indexed<'a> {
    /// `[b, h_kv, capacity, pq_dim]`
    pub(crate) codes: Tensor,
    /// Keys and values, `[b, h_kv, capacity, head_dim]`.
    pub(crate) kv: [Tensor; 2],
    /// Of clusters, `[b, h_kv, capacity]`.
    pub(crate) coarse_codes: Option<Tensor>,
    pub(crate) encoder: Encoder<'a>,
    pub(crate) clusters: Option<&'a ClusterSums>,
    pub(crate) lens: &'a Lens,
    /// The position of the first key; no block begins before it.
    pub(crate) first: usize,
    /// Where they have positions in pages, the number of each page of keys and values, and of codes, u32.
    pub(crate) pages: Option<[&'a Tensor; 2]>,
    /// Positions that there is room for.
    pub(crate) capacity: usize,
}

/// What keys are encoded with; all contiguous.
pub(crate) struct Encoder<'a> {
    /// `[b, h_kv, pq_dim, n_centroids, pq_len]`, or with `phi` one wider.
    pub(crate) centroids: &'a Tensor,
    pub(crate) phi: Option<&'a Tensor>,
    pub(crate) weights: Option<&'a Tensor>,
    /// Centroids of clusters, `[b, h_kv, n_clusters, head_dim]`.
    pub(crate) coarse: Option<&'a Tensor>,
}

/// Where blocks of keys lie: they follow each other from `init_offset` on, and one that ends with a sequence's last key is
/// due.
#[derive(Clone, Copy)]
pub(crate) struct Due {
    pub(crate) init_offset: usize,
    pub(crate) block: usize,
}

/// Writes the codes of the blocks that the GPU finds due, and of their keys' clusters, and adds their values to those of their
/// clusters; does nothing in sequences of which none is due.
///
/// The bits are those of [`encode`](super::encode()) and [`cluster_sums`](super::cluster_sums()), of all of which this is one
/// launch: as a part of a captured step it is idle in most.
///
/// # Errors
/// Shapes or dtypes other than these, or caches that differ in more than their capacities.
pub(crate) fn index_block(caches: &[Indexed], due: Due) -> Result<()> {
    let plans = caches.iter().map(Plan::new).collect::<Result<Vec<_>>>()?;
    let Some(first) = plans.first() else { return Ok(()) };
    match plans.iter().map(Plan::sizes).find(|sizes| *sizes != first.sizes()) {
        None => cuda::run(&plans, caches, due),
        Some(sizes) => bail!("{OP}: caches: expected all as the first, {:?}, got {sizes:?}", first.sizes()),
    }
}

/// What is checked of a cache.
struct Plan {
    into: IntoPlan,
}

impl Plan {
    fn new(cache: &Indexed) -> Result<Self> {
        let Indexed { codes, kv: [keys, values], coarse_codes, encoder, clusters, .. } = cache;
        let Encoder { centroids, phi, weights, coarse } = encoder;
        if let (Some(codes), Some(clusters)) = (coarse_codes, clusters) {
            cluster_sums::Plan::new(values, codes, clusters)?;
        }
        let coarse = match (coarse_codes, coarse) {
            (Some(codes), Some(coarse)) => Some(Coarse { codes: codes.clone(), centroids: (*coarse).clone() }),
            _ => None,
        };
        let options = EncodeOptions { phi: *phi, weights: *weights, coarse: coarse.as_ref() };
        let into = IntoPlan::new(codes, keys, centroids, options)?;
        for (name, tensor) in
            [("centroids", Some(centroids)), ("phi", phi.as_ref()), ("coarse", encoder.coarse.as_ref())]
        {
            if let Some(tensor) = tensor.filter(|tensor| !tensor.is_contiguous()) {
                let arg = Arg::new(OP, name, tensor);
                return arg.fail("a contiguous tensor", format_args!("strides {:?}", tensor.stride()));
            }
        }
        let (keys_arg, codes_arg) = (Arg::new(OP, "keys", keys), Arg::new(OP, "codes", codes));
        let values = Arg::new(OP, "values", values).view("[b, h_kv, capacity, head_dim]")?;
        let is_dense = |view: &View<4>| view.has_adjacent_rows() && view.strides[3] == 1;
        if !is_dense(&into.encode.keys) || !is_dense(&values) || values.strides != into.encode.keys.strides {
            return keys_arg
                .fail("rows without gaps, and values like them", format_args!("{:?}", into.encode.keys.strides));
        }
        if !is_dense(&into.codes) || into.coarse.is_some_and(|(codes, _)| codes.strides[2] != 1) {
            return codes_arg.fail("codes without gaps", format_args!("strides {:?}", into.codes.strides));
        }
        Ok(Self { into })
    }

    /// `h_kv`, `head_dim`, `pq_dim`, `n_centroids`, columns of the centroids, and clusters.
    fn sizes(&self) -> [usize; 6] {
        let encode = &self.into.encode;
        let ([_, h_kv, _, head_dim], [_, _, pq_dim, n_centroids, columns]) = (encode.keys.dims, encode.centroids.dims);
        [h_kv, head_dim, pq_dim, n_centroids, columns, self.into.coarse.map_or(0, |(_, centroids)| centroids.dims[2])]
    }
}
