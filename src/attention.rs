//! Attention as a language model calls it: dense for the prompt, sparse for every token after.

mod packed;
mod run;

use std::fmt;
use std::sync::Arc;

use candle_core::{bail, DType, Device, Result, Tensor};
use tracing::trace_span;

use crate::cache::{Index, PqKvCache};
use crate::config::{PqConfig, Selection};
use crate::ops::{self, Geometry, Selected};

/// Causal self-attention over a [`PqKvCache`].
///
/// One serves all layers of a model; each layer has a cache of its own. On a GPU it keeps buffers, for each thread that
/// decodes with it: let long-lived threads do so.
///
/// ```
/// use candle_core::{DType, Device, Tensor};
/// use candle_pq_attn::{PqAttention, PqConfig};
///
/// let (b, h, h_kv, head_dim) = (1, 8, 2, 64);
/// let attn = PqAttention::new(PqConfig::default(), 1.0 / (head_dim as f32).sqrt())?;
/// let mut cache = attn.new_cache([b, h_kv, head_dim], 1024, DType::F32, &Device::Cpu)?;
/// let random = |heads, s| Tensor::randn(0f32, 1., (b, heads, s, head_dim), &Device::Cpu);
///
/// // the prompt, dense
/// let out = attn.forward(&random(h, 1000)?, &random(h_kv, 1000)?, &random(h_kv, 1000)?, &mut cache)?;
/// assert_eq!(out.dims(), [b, h, 1000, head_dim]);
/// // one more token, sparse
/// let out = attn.forward(&random(h, 1)?, &random(h_kv, 1)?, &random(h_kv, 1)?, &mut cache)?;
/// assert_eq!(out.dims(), [b, h, 1, head_dim]);
/// # candle_core::Result::Ok(())
/// ```
///
/// # NaN and infinities
/// What is not finite in queries, keys or values stays in its sequence and KV head; all others are the same to the bit. In a
/// key or a value it reaches the query heads of that KV head's group: prefill multiplies all values of a block of queries,
/// so that NaN in one may reach queries before it, and a codebook that was trained on it codes that head poorly. In a query
/// it makes that query head's output what it is; the other heads of the group stay finite, but in sparse steps may attend
/// to other keys: with [`Selection::PerKvHead`] they choose together, and with [`PqConfig::query_weights`] they share what
/// their queries look at. All of it leaves with its position, by [`PqKvCache::truncate`].
#[derive(Debug, Clone)]
pub struct PqAttention {
    config: PqConfig,
    scale: f32,
    prefill: Option<Prefill>,
    #[cfg(feature = "cuda")]
    workspace: ops::Workspace,
}

/// Dense causal attention of the caller's own; see [`PqAttention::with_prefill`].
#[derive(Clone)]
struct Prefill(Arc<PrefillFn>);

type PrefillFn = dyn Fn(&Tensor, &Tensor, &Tensor, f32) -> Result<Tensor> + Send + Sync;

impl fmt::Debug for Prefill {
    fn fmt(&self, f: &mut fmt::Formatter) -> fmt::Result {
        f.write_str("Prefill(..)")
    }
}

impl PqAttention {
    /// Attention with `softmax(scale · q kᵀ)`; `scale` is `1 / sqrt(head_dim)` in most models.
    ///
    /// # Errors
    /// A `scale` that is not positive and finite: the keys of the largest scores would not be those of the largest weights.
    pub fn new(config: PqConfig, scale: f32) -> Result<Self> {
        if !(scale.is_finite() && scale > 0.0) {
            bail!("PqAttention: scale: expected a positive finite number, got {scale}");
        }
        Ok(Self {
            config,
            scale,
            prefill: None,
            #[cfg(feature = "cuda")]
            workspace: ops::Workspace::default(),
        })
    }

    /// Has `attend` compute the dense causal attention of prefill, such as a call of candle-flash-attn.
    ///
    /// It is given the query `[b, h, s, head_dim]`, views of all keys and values so far, `[b, h_kv, n, head_dim]`, and
    /// the scale; the queries are the last `s` of the `n` positions. It returns `[b, h, s, head_dim]` in the dtype of the
    /// query.
    pub fn with_prefill(
        self,
        attend: impl Fn(&Tensor, &Tensor, &Tensor, f32) -> Result<Tensor> + Send + Sync + 'static,
    ) -> Self {
        Self { prefill: Some(Prefill(Arc::new(attend))), ..self }
    }

    /// The config of its selection.
    pub fn config(&self) -> &PqConfig {
        &self.config
    }

    /// A cache for one layer: `[batch, kv_heads, head_dim]`, with room for `capacity` keys; see [`PqKvCache::new`].
    ///
    /// # Errors
    /// A config that does not suit `head_dim`, or a dtype other than f32, f16 and bf16.
    pub fn new_cache(&self, dims: [usize; 3], capacity: usize, dtype: DType, device: &Device) -> Result<PqKvCache> {
        PqKvCache::new(self.config.clone(), dims, capacity, dtype, device)
    }

    /// Appends `keys` and `values` to the cache and attends to it, causally.
    ///
    /// With `s = 1` (decode) attention is sparse, but dense while [`PqConfig::is_dense`] says so; with a longer `s`
    /// (prefill, whole or in chunks) it is dense.
    ///
    /// # Shapes
    /// - `query`: `[b, h, s, head_dim]`, `keys` and `values`: `[b, h_kv, s, head_dim]`, `h` a multiple of `h_kv`, any
    ///   strides; position embeddings already applied
    /// - returns `[b, h, s, head_dim]`, the dtype of the query
    ///
    /// # Errors
    /// Shapes, dtypes or devices that do not fit the cache, a cache made with another config, or no queries (`s = 0`).
    /// The cache is then as before.
    pub fn forward(&self, query: &Tensor, keys: &Tensor, values: &Tensor, cache: &mut PqKvCache) -> Result<Tensor> {
        self.append_and(query, keys, values, cache, Self::sparse_step)
    }

    /// As [`forward`](Self::forward), but dense for every `s`.
    ///
    /// # Errors
    /// As [`forward`](Self::forward).
    pub fn forward_dense(
        &self,
        query: &Tensor,
        keys: &Tensor,
        values: &Tensor,
        cache: &mut PqKvCache,
    ) -> Result<Tensor> {
        self.append_and(query, keys, values, cache, Self::dense_step)
    }

    fn append_and(
        &self,
        query: &Tensor,
        keys: &Tensor,
        values: &Tensor,
        cache: &mut PqKvCache,
        step: fn(&Self, &Tensor, [Tensor; 2], &mut PqKvCache) -> Result<Tensor>,
    ) -> Result<Tensor> {
        let _span = trace_span!("pq-attn").entered();
        self.check(query, keys, cache)?;
        cache.check_new(keys, values)?;
        let before = cache.checkpoint();
        // Inference only: the ops in place and the cache are invisible to Candle's backward pass.
        let (query, new) = (&query.detach(), [keys.detach(), values.detach()]);
        let out = match query.dims()[2] {
            1 => step(self, query, new, cache),
            _ => cache
                .append(&new[0], &new[1])
                .and_then(|()| cache.observe(query))
                .and_then(|()| self.prefill(query, cache)),
        };
        if out.is_err() {
            cache.restore(before)?;
        }
        out
    }

    fn check(&self, query: &Tensor, keys: &Tensor, cache: &PqKvCache) -> Result<()> {
        let [b, h_kv, head_dim] = cache.dims();
        if cache.config() != &self.config {
            bail!("PqAttention: cache: expected one made with this attention's config, got {:?}", cache.config());
        }
        let s = match *query.dims() {
            [qb, h, s, qd] if qb == b && h > 0 && h.is_multiple_of(h_kv) && s > 0 && qd == head_dim => s,
            _ => bail!(
                "PqAttention: query: expected [{b}, a multiple of {h_kv}, s >= 1, {head_dim}], got {:?}",
                query.dims()
            ),
        };
        if query.dtype() != cache.dtype() {
            let (expected, got) = (cache.dtype().as_str(), query.dtype().as_str());
            bail!("PqAttention: query: expected dtype {expected} as the cache, got {got}");
        }
        if !query.device().same_device(cache.device()) {
            let (expected, got) = (cache.device().location(), query.device().location());
            bail!("PqAttention: query: expected device {expected:?} as the cache, got {got:?}");
        }
        match *keys.dims() {
            [_, _, ks, _] if ks != s => bail!("PqAttention: keys: expected s = {s} as the query, got {ks}"),
            _ => Ok(()),
        }
    }

    /// A key and a value each, and then one query a head over the whole cache.
    fn dense_step(&self, query: &Tensor, [keys, values]: [Tensor; 2], cache: &mut PqKvCache) -> Result<Tensor> {
        cache.append(&keys, &values)?;
        self.dense_decode(query, cache)
    }

    /// The same over the keys that matter to the query.
    fn sparse_step(&self, query: &Tensor, new: [Tensor; 2], cache: &mut PqKvCache) -> Result<Tensor> {
        #[cfg(feature = "cuda")]
        if let Some(out) = self.steps_together(query, &mut [(cache, new.clone())])? {
            return Ok(out);
        }
        let [keys, values] = new;
        cache.append(&keys, &values)?;
        self.sparse_decode(query, cache)
    }

    /// Sparse steps of several caches on a GPU, of a key and a value and a position of `query` each, in the launches of one; None,
    /// with nothing appended, where one of them takes more than these.
    #[cfg(feature = "cuda")]
    fn steps_together(&self, query: &Tensor, caches: &mut [(&mut PqKvCache, [Tensor; 2])]) -> Result<Option<Tensor>> {
        if !query.device().is_cuda() || !caches.iter().all(|(cache, _)| cache.has_index_of_next()) {
            return Ok(None);
        }
        let _span = trace_span!("pq-attn-sparse").entered();
        PqKvCache::append_together_by(caches, |caches, appending| {
            let mut sequences = Vec::new();
            for cache in caches {
                sequences.extend(cache.on_gpu(Some(cache.last_index()?), 0)?);
            }
            self.decode_together(query, &sequences, Some(appending))
        })
    }

    /// One query a head over the whole cache.
    fn dense_decode(&self, query: &Tensor, cache: &mut PqKvCache) -> Result<Tensor> {
        let _span = trace_span!("pq-attn-dense").entered();
        #[cfg(feature = "cuda")]
        if let Some(out) = self.decode_on_gpu(query, None, cache)? {
            return Ok(out);
        }
        Ok(ops::dense_attend(query, &cache.keys()?, &cache.values()?, self.scale)?.out)
    }

    /// The same, or with an index a sparse step, if the cache is on a GPU. The kernels that suit any step read keys that lie in
    /// one piece: a fork has a copy of its own then, and of pages there is one for the step.
    #[cfg(feature = "cuda")]
    fn decode_on_gpu(&self, query: &Tensor, index: Option<Index>, cache: &mut PqKvCache) -> Result<Option<Tensor>> {
        let step = |cache: &PqKvCache| match cache.on_gpu(index.clone(), 0)? {
            None => Ok(None),
            Some(cache) => self.decode_together(query, &[cache], None),
        };
        let out = step(cache)?;
        if out.is_some() || !query.device().is_cuda() {
            return Ok(out);
        }
        if let Some(copy) = cache.out_of_pages(index.clone())? {
            return self.decode_together(query, &[copy], None);
        }
        cache.unshare()?;
        step(cache)
    }

    /// A step of several caches on a GPU, each of a position of `query`, to which it may append; None where there are no kernels for
    /// it.
    #[cfg(feature = "cuda")]
    fn decode_together(
        &self,
        query: &Tensor,
        caches: &[ops::Sequences],
        appending: Option<&ops::Appending>,
    ) -> Result<Option<Tensor>> {
        ops::decode(query, caches, appending, &self.config, self.scale, &self.workspace)
    }

    /// One query a head over the keys that matter to it.
    fn sparse_decode(&self, query: &Tensor, cache: &mut PqKvCache) -> Result<Tensor> {
        if self.config.is_dense(cache.len()) {
            return self.dense_decode(query, cache);
        }
        let index = cache.index()?;
        let _span = trace_span!("pq-attn-sparse").entered();
        #[cfg(feature = "cuda")]
        if let Some(out) = self.decode_on_gpu(query, Some(index.clone()), cache)? {
            return Ok(out);
        }
        let ([_, h_kv, _], n) = (cache.dims(), cache.len());
        let Index { codes, centroids, coarse, clusters, places } = &index;
        let scores = ops::score_candidates(query, codes, centroids, coarse.as_ref(), places.as_ref())?;
        let selected = self.select(&scores, h_kv, n)?;
        let tail = match (coarse, clusters) {
            (Some(coarse), Some(clusters)) => {
                let first = self.config.candidates(n).start;
                let codes = (&coarse.codes, places.as_ref());
                Some(ops::tail_attend_in_pages(&scores, codes, clusters, &selected, first, self.scale)?)
            }
            _ => None,
        };
        Ok(ops::sparse_attend_to_cache(query, &cache.keys_and_values()?, &selected, tail.as_ref(), self.scale)?.out)
    }

    /// Lists what to attend to of `n` keys by the scores of the candidates.
    fn select(&self, scores: &Tensor, h_kv: usize, n: usize) -> Result<Selected> {
        let heavy = match self.config.selection {
            Selection::PerQueryHead => ops::topk(scores, self.config.heavy.count(n))?,
            Selection::PerKvHead => {
                let mass = ops::group_mass(scores, h_kv, self.scale)?;
                ops::topk(&mass, self.config.heavy.count(n))?
            }
        };
        let geometry = Geometry {
            n,
            sink: self.config.sink,
            window: self.config.window,
            init_offset: self.config.candidates(n).start,
        };
        ops::indices_and_weights(&heavy, geometry)
    }

    /// Dense causal attention of the last `s` positions, by matmuls over blocks of queries of one KV head at a time,
    /// so that the scores of a few queries are all that is held at a time, and K and V are read once for all query heads of
    /// the group.
    fn prefill(&self, query: &Tensor, cache: &PqKvCache) -> Result<Tensor> {
        let _span = trace_span!("pq-attn-prefill").entered();
        if let Some(Prefill(attend)) = &self.prefill {
            let out = attend(query, &cache.keys()?, &cache.values()?, self.scale)?;
            if (out.dims(), out.dtype()) != (query.dims(), query.dtype()) {
                let (expected, got) = ((query.dims(), query.dtype()), (out.dims(), out.dtype()));
                bail!("PqAttention: prefill function: expected a result of {expected:?}, got {got:?}");
            }
            return Ok(out);
        }
        #[cfg(feature = "cuda")]
        if query.device().is_cuda() {
            return self.prefill_on_gpu(query, cache);
        }
        let ([b, h_kv, head_dim], n) = (cache.dims(), cache.len());
        let (_, h, s, _) = query.dims4()?;
        let (group, keys, values) = (h / h_kv, cache.keys()?, cache.values()?);
        let outs: Result<Vec<_>> = (0..h_kv)
            .map(|kv| {
                // Candle's CPU has no matmul for bf16, and f16 scores would lose digits: f32 throughout.
                let keys = keys.narrow(1, kv, 1)?.squeeze(1)?.to_dtype(DType::F32)?;
                let values = values.narrow(1, kv, 1)?.squeeze(1)?.to_dtype(DType::F32)?;
                let query = query.narrow(1, kv * group, group)?;
                let blocks: Result<Vec<_>> = query_blocks(s, b * group * n)
                    .map(|block| {
                        let visible = n - s + block.end;
                        let queries = block.len();
                        let query = query.narrow(2, block.start, queries)?.to_dtype(DType::F32)?;
                        let query = query.reshape((b, group * queries, head_dim))?;
                        let scores = query.matmul(&keys.narrow(1, 0, visible)?.t()?)?.unsqueeze(1)?;
                        ops::causal_softmax(&scores, visible - queries, queries, self.scale)?;
                        let out = scores.squeeze(1)?.matmul(&values.narrow(1, 0, visible)?)?;
                        out.reshape((b, group, queries, head_dim))
                    })
                    .collect();
                Tensor::cat(&blocks?, 2)
            })
            .collect();
        Tensor::cat(&outs?, 1)?.to_dtype(query.dtype())
    }

    /// As [`prefill`](Self::prefill), by matmuls over all KV heads at once in the dtype of the cache; only the scores are
    /// f32, and no more than `query_blocks` allows.
    #[cfg(feature = "cuda")]
    fn prefill_on_gpu(&self, query: &Tensor, cache: &PqKvCache) -> Result<Tensor> {
        let ([b, h_kv, head_dim], n) = (cache.dims(), cache.len());
        let (_, h, s, _) = query.dims4()?;
        let (keys, values) = (cache.keys()?, cache.values()?);
        let blocks: Result<Vec<_>> = query_blocks(s, b * h * n / 16)
            .map(|block| {
                let (visible, queries) = (n - s + block.end, block.len());
                let query = query.narrow(2, block.start, queries)?.contiguous()?;
                let query = query.reshape((b, h_kv, h / h_kv * queries, head_dim))?;
                let scores = crate::cuda::matmul_to_f32(&query, &keys.narrow(2, 0, visible)?)?;
                ops::causal_softmax(&scores, visible - queries, queries, self.scale)?;
                let out = scores.to_dtype(values.dtype())?.matmul(&values.narrow(2, 0, visible)?)?;
                out.reshape((b, h, queries, head_dim))
            })
            .collect();
        Tensor::cat(&blocks?, 2)
    }
}

/// Cuts `s` queries into blocks of which each has about 16 MB of scores, which the last-level cache of most CPUs holds,
/// but no fewer than 16 queries, for the matmul's sake. `row` is the number of scores that one query makes.
fn query_blocks(s: usize, row: usize) -> impl Iterator<Item = std::ops::Range<usize>> {
    const SCORES: usize = 4 << 20;
    let queries = (SCORES / row.max(1)).clamp(16, 512);
    (0..s).step_by(queries).map(move |start| start..s.min(start + queries))
}
