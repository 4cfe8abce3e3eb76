//! New keys and values, written behind the last ones of caches on a GPU.

mod cuda;

use candle_core::{bail, Result, Tensor};

use super::arg::{Arg, View};
use crate::cuda::Lens;

const OP: &str = "append";

/// What is new in a cache.
pub(crate) struct New<'a> {
    /// `[2, b, h_kv, positions, head_dim]`
    pub(crate) cache: &'a Tensor,
    /// Its first position.
    pub(crate) first: usize,
    /// Where it has positions in pages, the number of each page in their order, u32.
    pub(crate) pages: Option<&'a Tensor>,
    /// Positions that there is room for.
    pub(crate) capacity: usize,
    pub(crate) lens: &'a Lens,
    /// `[b, h_kv, added, head_dim]` of any strides.
    pub(crate) keys: Tensor,
    /// As the keys.
    pub(crate) values: Tensor,
}

/// Writes new keys and values, as many to each cache, from the positions that `lens` says, which then grow by their number.
///
/// A sequence without room for them stays as it is.
///
/// # Errors
/// Shapes or dtypes other than these.
pub(crate) fn append(new: &[&New]) -> Result<()> {
    let plans = new.iter().map(|new| Plan::new(new)).collect::<Result<Vec<_>>>()?;
    let Some(first) = plans.first() else { return Ok(()) };
    let [added, head_dim, h_kv] = first.sizes();
    match plans.iter().map(Plan::sizes).find(|sizes| *sizes != first.sizes()) {
        None => cuda::run(&plans, new),
        Some([a, d, h]) => bail!(
            "{OP}: keys: expected {added} of {h_kv} heads and {head_dim} elements as in the first cache, got {a} of {h} and {d}"
        ),
    }
}

/// What is checked of a cache's part.
pub(super) struct Plan {
    pub(super) cache: View<5>,
    pub(super) keys: View<4>,
    pub(super) values: View<4>,
}

impl Plan {
    pub(super) fn new(new: &New) -> Result<Self> {
        let New { cache, keys, values, .. } = new;
        let (cache_arg, keys_arg) = (Arg::new(OP, "cache", cache), Arg::new(OP, "keys", keys));
        let values_arg = Arg::new(OP, "values", values);
        cache_arg.is_float()?;
        keys_arg.is(cache.dtype())?;
        values_arg.is(cache.dtype())?;
        let cache: View<5> = cache_arg.view("[2, b, h_kv, capacity, head_dim]")?;
        let keys: View<4> = keys_arg.view("[b, h_kv, added, head_dim]")?;
        let [_, b, h_kv, capacity, head_dim] = cache.dims;
        cache_arg.has_dims(&[2, b, h_kv, capacity, head_dim])?;
        keys_arg.has_dims(&[b, h_kv, keys.dims[2], head_dim])?;
        values_arg.has_dims(&keys.dims)?;
        if !(cache.has_adjacent_rows() && cache.strides[4] == 1) {
            return cache_arg.fail("rows without gaps", format_args!("strides {:?}", cache.strides));
        }
        Ok(Self { cache, keys, values: values_arg.view("[b, h_kv, added, head_dim]")? })
    }

    /// Added keys, elements of a row, KV heads.
    pub(super) fn sizes(&self) -> [usize; 3] {
        let [_, h_kv, added, head_dim] = self.keys.dims;
        [added, head_dim, h_kv]
    }
}
