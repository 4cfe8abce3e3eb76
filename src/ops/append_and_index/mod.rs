//! What a decode step adds to caches on a GPU: a key and a value each, and the codes of the block of keys that is full with it.

mod cuda;

use candle_core::{bail, Result, Tensor};

use super::append::{self, New};
use super::arg::{Arg, View};
use super::cluster_sums::{self, ClusterSums};
use super::encode::{EncodeOptions, IntoPlan};
use super::score::Coarse;

const OP: &str = "append_and_index";

/// The index of a cache, of which all tensors are of the positions of the cache's.
pub(crate) struct Indexed<'a> {
    /// `[b, h_kv, capacity, pq_dim]`
    pub(crate) codes: Tensor,
    /// Of clusters, `[b, h_kv, capacity]`.
    pub(crate) coarse_codes: Option<Tensor>,
    pub(crate) encoder: Encoder<'a>,
    pub(crate) clusters: Option<&'a ClusterSums>,
    /// Where the codes have positions in pages, the number of each page in their order, u32.
    pub(crate) pages: Option<&'a Tensor>,
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

/// As [`append`](super::append()) of one key to each cache, and where there is an index the codes of the block that the GPU finds
/// full with it, and of its keys' clusters; its values are added to those of their clusters. No block begins before the cache's
/// own first position.
///
/// The bits are those of [`encode`](super::encode()) and [`cluster_sums`](super::cluster_sums()), of all of which this is one
/// launch: as a part of a captured step it mostly appends alone.
///
/// # Errors
/// Shapes or dtypes other than these, or caches that differ in more than their capacities.
pub(crate) fn append_and_index(new: &[(New, Option<Indexed>)], due: Due) -> Result<()> {
    let plans = new.iter().map(Plan::new).collect::<Result<Vec<_>>>()?;
    let Some(index) = plans.iter().find_map(Plan::of_index) else {
        bail!("{OP}: caches: expected an index in one of them, got {} without", new.len())
    };
    let first = Sizes { append: plans[0].append.sizes(), index };
    let differs = |plan: &&Plan| {
        let own = Sizes { append: plan.append.sizes(), index: plan.of_index().unwrap_or(index) };
        own != first || own.append[0] != 1
    };
    match plans.iter().find(differs) {
        None => cuda::run(&plans, new, first, due),
        Some(plan) => bail!(
            "{OP}: caches: expected one key each and {first:?}, got {:?}, {:?}",
            plan.append.sizes(),
            plan.of_index()
        ),
    }
}

/// What all caches of a launch have in common.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Sizes {
    /// Added keys, elements of a row, KV heads.
    append: [usize; 3],
    /// `pq_dim`, `n_centroids`, columns of the centroids, and clusters.
    index: [usize; 4],
}

/// What is checked of a cache.
struct Plan {
    append: append::Plan,
    /// Keys and values of all positions, `[b, h_kv, capacity, head_dim]`.
    kv: [Tensor; 2],
    index: Option<IntoPlan>,
}

impl Plan {
    fn new((new, index): &(New, Option<Indexed>)) -> Result<Self> {
        let kv = [new.cache.get(0)?, new.cache.get(1)?];
        let index = index.as_ref().map(|index| Self::check(&kv, index)).transpose()?;
        Ok(Self { append: append::Plan::new(new)?, kv, index })
    }

    fn check([keys, values]: &[Tensor; 2], index: &Indexed) -> Result<IntoPlan> {
        let Indexed { codes, coarse_codes, encoder, clusters, .. } = index;
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
        let is_dense = |view: &View<4>| view.has_adjacent_rows() && view.strides[3] == 1;
        if !is_dense(&into.codes) || into.coarse.is_some_and(|(codes, _)| codes.strides[2] != 1) {
            return Arg::new(OP, "codes", codes)
                .fail("codes without gaps", format_args!("strides {:?}", into.codes.strides));
        }
        Ok(into)
    }

    /// The sizes of an index.
    fn of_index(&self) -> Option<[usize; 4]> {
        self.index.as_ref().map(|into| {
            let [_, _, pq_dim, n_centroids, columns] = into.encode.centroids.dims;
            [pq_dim, n_centroids, columns, into.coarse.map_or(0, |(_, centroids)| centroids.dims[2])]
        })
    }
}
