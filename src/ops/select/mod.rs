//! The indexer: from a query and codes to what a decode step attends to.

#[cfg(feature = "cuda")]
mod cuda;
#[cfg(feature = "cuda")]
pub(super) use cuda::Selector;

use candle_core::{bail, Result, Tensor};

use super::arg::{with_unit_rows, View};
use super::indices_and_weights::{self, dense_weights, Geometry, Selected};
use super::{score, topk};

const OP: &str = "select";

/// Scores candidates from their codes, and lists the `k` best of them between sink and window: [`score`](super::score()),
/// [`topk`](super::topk()) and [`indices_and_weights`](super::indices_and_weights()) in one call, with the same result to the bit.
///
/// On a GPU it takes one launch, which leaves no scores in memory, where the tables of a query head fit a block's shared memory
/// and the candidates of a sequence are at most 524,288 and many more than `k`; otherwise, and where a call
/// is captured as a graph before the thread has made one on the device's stream, those of the three.
///
/// # Shapes
/// - `query`: `[b, h, 1, head_dim]`, f32, f16 or bf16
/// - `codes`: `[b, h_kv, n, pq_dim]` u8, those of the candidates: of positions from `geometry.init_offset` on
/// - `centroids`: `[b, h_kv, pq_dim, n_centroids, pq_len]` f32, any strides
/// - returns a list a query head, of length `min(geometry.n, sink + min(k, n) + window)`
///
/// # Errors
/// As those of the three, or candidates beyond `geometry.n`.
///
/// ```
/// use candle_core::{Device, Tensor};
/// use candle_pq_attn::ops::{select, Geometry};
///
/// let centroids = Tensor::new(&[0f32, 1., 10., 20.], &Device::Cpu)?.reshape((1, 1, 2, 2, 1))?;
/// let codes = Tensor::new(&[[[[0u8, 0], [0, 1], [1, 0]]]], &Device::Cpu)?; // of positions 1 to 3 of 5
/// let query = Tensor::new(&[[[[2f32, 1.]]]], &Device::Cpu)?;
/// let selected = select(&query, &codes, &centroids, 1, Geometry { n: 5, sink: 1, window: 1, init_offset: 1 })?;
/// assert_eq!(selected.indices.flatten_all()?.to_vec1::<u32>()?, [0, 2, 4]);
/// # candle_core::Result::Ok(())
/// ```
pub fn select(query: &Tensor, codes: &Tensor, centroids: &Tensor, k: usize, geometry: Geometry) -> Result<Selected> {
    Ok(run([query, codes, centroids], k, geometry, false)?.0)
}

/// As [`select`], with the weights by position as well: what [`dense_weights`](super::dense_weights()) makes of the lists,
/// `[b, h, geometry.n]` f32.
///
/// # Errors
/// As [`select`].
pub fn select_dense(
    query: &Tensor,
    codes: &Tensor,
    centroids: &Tensor,
    k: usize,
    geometry: Geometry,
) -> Result<(Selected, Tensor)> {
    match run([query, codes, centroids], k, geometry, true)? {
        (selected, Some(dense)) => Ok((selected, dense)),
        _ => bail!("{OP}: ran without leaving its weights by position"),
    }
}

fn run(inputs: [&Tensor; 3], k: usize, geometry: Geometry, is_dense: bool) -> Result<(Selected, Option<Tensor>)> {
    let [query, codes, centroids] = inputs.map(with_unit_rows);
    let [query, codes, centroids] = &[query?, codes?, centroids?];
    let inputs = [query, codes, centroids];
    let plan = Plan::new(inputs, k, geometry, is_dense)?;
    #[cfg(feature = "cuda")]
    if let Some(selected) = cuda::run(&plan, inputs, is_dense)? {
        return Ok(selected);
    }
    let (scores, k) = (score::of_plan(plan.score, inputs)?, plan.k);
    let selected = indices_and_weights::of_plan(plan.lists, &topk(&scores, k)?)?;
    let dense = is_dense.then(|| dense_weights(&selected, scores.dim(1)?, geometry.n)).transpose()?;
    Ok((selected, dense))
}

/// A checked call of [`select`].
struct Plan {
    score: score::Plan,
    lists: indices_and_weights::Plan,
    k: usize,
}

impl Plan {
    fn new([query, codes, centroids]: [&Tensor; 3], k: usize, geometry: Geometry, is_dense: bool) -> Result<Self> {
        let score = score::Plan::new(OP, query, codes, centroids, None)?;
        for (tensor, name) in [(codes, "codes"), (centroids, "centroids")] {
            if !tensor.device().same_device(query.device()) {
                let (expected, got) = (query.device().location(), tensor.device().location());
                bail!("{OP}: {name}: expected device {expected:?} as the query, got {got:?}");
            }
        }
        let ([b, h, ..], n) = (score.query.dims, score.codes.dims[2]);
        let Geometry { n: length, init_offset, .. } = geometry;
        if init_offset.checked_add(n).is_none_or(|end| end > length) {
            bail!("{OP}: codes: expected at most the {length} keys (n) from init_offset {init_offset} on, got {n}");
        }
        let k = k.min(n);
        let lists = indices_and_weights::Plan::checked(OP, View::contiguous([b, h, k]), geometry)?;
        if is_dense {
            indices_and_weights::check_count(OP, [b, h, length])?;
        }
        Ok(Self { score, lists, k })
    }
}
