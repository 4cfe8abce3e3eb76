//! What a decode step begins with on a GPU: it adds a key and a value to each cache, and the codes of the block of keys that is
//! full with it, and it makes the tables that the search of an index looks up.

mod cuda;

use candle_core::{bail, Result, Tensor};

pub(super) use cuda::{launch, tensors, Launches, Source, Tables, MAX_SEQUENCES, SUBSPACES};

use super::append::{self, New};
use super::arg::{Arg, View};
use super::cluster_sums::{self, ClusterSums};
use super::encode::{EncodeOptions, IntoPlan};
use super::score::Coarse;

const OP: &str = "begin_step";

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
#[derive(Clone, Copy, Default)]
pub(crate) struct Due {
    pub(crate) init_offset: usize,
    pub(crate) block: usize,
}

/// One key and value for each of some caches, and what they fill: see [`Indexed`], which is there where the block of keys that the
/// GPU may find full with them is to be indexed.
pub(crate) struct Appending<'a> {
    pub(crate) new: Vec<(New<'a>, Option<Indexed<'a>>)>,
    pub(crate) due: Due,
}

impl Appending<'_> {
    pub(crate) fn has_index(&self) -> bool {
        self.new.iter().any(|(_, index)| index.is_some())
    }
}

/// As [`append`](super::append()) of one key to each cache, and where there is an index the codes of the block that the GPU finds
/// full with it, and of its keys' clusters; its values are added to those of their clusters. No block begins before the cache's
/// own first position.
///
/// The bits are those of [`encode`](super::encode()) and [`cluster_sums`](super::cluster_sums()), of all of which this is one
/// launch: as a part of a captured step it mostly appends alone. A [`decode`](super::decode()) of the same caches does it in
/// the launch that makes the tables.
///
/// # Errors
/// Shapes or dtypes other than these, or caches that differ in more than their capacities.
pub(crate) fn begin_step(appending: &Appending) -> Result<()> {
    match Plans::new(appending)? {
        None => Ok(()),
        Some(plans) => cuda::run(appending, &plans),
    }
}

/// What is checked of all caches.
pub(super) struct Plans {
    each: Vec<Plan>,
    sizes: Sizes,
}

impl Plans {
    /// None without a cache.
    pub(super) fn new(appending: &Appending) -> Result<Option<Self>> {
        let each = appending.new.iter().map(Plan::new).collect::<Result<Vec<_>>>()?;
        let Some(first) = each.first() else { return Ok(None) };
        let index = each.iter().find_map(Plan::of_index).unwrap_or_default();
        let sizes = Sizes { append: first.append.sizes(), index };
        let differs = |plan: &&Plan| {
            let own = Sizes { append: plan.append.sizes(), index: plan.of_index().unwrap_or(index) };
            own != sizes || own.append[0] != 1
        };
        match each.iter().find(differs) {
            None => Ok(Some(Self { each, sizes })),
            Some(plan) => bail!(
                "{OP}: caches: expected one key each and {sizes:?}, got {:?}, {:?}",
                plan.append.sizes(),
                plan.of_index()
            ),
        }
    }
}

/// What all caches of a launch have in common.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
struct Sizes {
    /// Added keys, elements of a row, KV heads.
    append: [usize; 3],
    /// `pq_dim`, `n_centroids`, columns of the centroids, and clusters.
    index: [usize; 4],
}

/// What is checked of a cache.
struct Plan {
    append: append::Plan,
    index: Option<IntoPlan>,
}

impl Plan {
    fn new((new, index): &(New, Option<Indexed>)) -> Result<Self> {
        let append = append::Plan::new(new)?;
        let index = index.as_ref().map(|index| Self::check(new.cache, index)).transpose()?;
        Ok(Self { append, index })
    }

    fn check(cache: &Tensor, index: &Indexed) -> Result<IntoPlan> {
        let (keys, values) = (&cache.get(0)?, &cache.get(1)?);
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
