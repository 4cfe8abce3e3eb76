//! Exact attention of one query a head over listed positions, or over all of them.

mod cpu;
#[cfg(feature = "cuda")]
mod cuda;
#[cfg(feature = "cuda")]
pub(super) use cuda::Kernels;

#[cfg(feature = "cuda")]
use candle_core::CudaStorage;
use candle_core::{bail, CpuStorage, CustomOp2, CustomOp3, DType, Layout, Result, Shape, Tensor};

use super::arg::{share_storage, with_unit_rows, Arg, View};
use super::indices_and_weights::{Lists, Selected};
use super::side_output::SideOutput;
use super::{place_of, MAX_HEAD_DIM, PAGE};

/// What attention over some positions gives, in a form that merges with attention over others.
#[derive(Debug, Clone)]
pub struct Attended {
    /// `[b, h, 1, head_dim]`, the dtype of the query, or f32 of a tail; zeros where nothing was attended.
    pub out: Tensor,
    /// `[b, h]` f32: natural logarithm of `Σ w_i exp(s_i)`; negative infinity where nothing was attended.
    pub lse: Tensor,
}

impl Attended {
    /// Attention over the keys of both, if none is in both.
    ///
    /// `out = (e^{lse_a} out_a + e^{lse_b} out_b) / (e^{lse_a} + e^{lse_b})`, the sum's logarithm the new LSE.
    ///
    /// # Errors
    /// Results of different shapes or dtypes.
    ///
    /// # Numerics
    /// f32, rounded once to the dtype of both. Where one side's LSE is negative infinity the other's bits are returned.
    pub fn merge(&self, other: &Self) -> Result<Self> {
        const OP: &str = "merge";
        for (name, a, b) in [("out", &self.out, &other.out), ("lse", &self.lse, &other.lse)] {
            Arg::new(OP, name, b).is(a.dtype())?;
            Arg::new(OP, name, b).has_dims(a.dims())?;
        }
        let [b, h, ..] = Arg::new(OP, "out", &self.out).view::<4>("[b, h, 1, head_dim]")?.dims;
        Arg::new(OP, "lse", &self.lse).has_dims(&[b, h])?;
        let (this, other) = (self.with_unit_rows()?, other.with_unit_rows()?);
        let nothing = |lse: &Tensor| lse.eq(f32::NEG_INFINITY);
        let (nothing_here, nothing_there) = (nothing(&this.lse)?, nothing(&other.lse)?);
        // NaN where there is nothing on either side, and not taken there.
        let largest = this.lse.maximum(&other.lse)?;
        let (a, b) = ((&this.lse - &largest)?.exp()?, (&other.lse - &largest)?.exp()?);
        let sum = (&a + &b)?;
        let lse = (sum.log()? + largest)?;
        let share = |weight: &Tensor, out: &Tensor| {
            out.to_dtype(DType::F32)?.broadcast_mul(&(weight / &sum)?.unsqueeze(2)?.unsqueeze(3)?)
        };
        let out = (share(&a, &this.out)? + share(&b, &other.out)?)?.to_dtype(this.out.dtype())?;
        let choose = |a: &Tensor, b: &Tensor, both: &Tensor| {
            let mut dims = nothing_here.dims().to_vec();
            dims.resize(both.rank(), 1);
            let mask = |nothing: &Tensor| nothing.reshape(dims.as_slice())?.broadcast_as(both.shape());
            mask(&nothing_there)?.where_cond(a, &mask(&nothing_here)?.where_cond(b, both)?)
        };
        Ok(Self { out: choose(&this.out, &other.out, &out)?, lse: choose(&this.lse, &other.lse, &lse)? })
    }

    /// The same, with unit strides along the last dimensions.
    fn with_unit_rows(&self) -> Result<Self> {
        Ok(Self { out: with_unit_rows(&self.out)?, lse: with_unit_rows(&self.lse)? })
    }

    /// Views of the tail of a call with queries of these dimensions.
    fn views(&self, op: &'static str, query: &[usize; 4]) -> Result<(View<4>, View<2>)> {
        let (out, lse) = (Arg::new(op, "tail.out", &self.out), Arg::new(op, "tail.lse", &self.lse));
        out.is(DType::F32)?;
        lse.is(DType::F32)?;
        out.has_dims(query)?;
        lse.has_dims(&query[..2])?;
        Ok((out.view("[b, h, 1, head_dim]")?, lse.view("[b, h]")?))
    }
}

/// Attends to the positions of `selected`: `out = Σ w_i e^{s_i} v_i / Σ w_i e^{s_i}`, `s_i = scale · q · k_i`.
///
/// # Shapes
/// - `query`: `[b, h, 1, head_dim]`, f32, f16 or bf16
/// - `keys`, `values`: `[b, h_kv, n, head_dim]`, the query's dtype, each with strides of its own; `h` a multiple of
///   `h_kv`
/// - `selected`: lists of positions below `n`, one a query head or one a KV head; weights of 0 and padding are passed
///   over, whatever keys, values or weights hold there
///
/// # Errors
/// Shapes or dtypes other than these, `head_dim` above 256, a position at or beyond `n`, or a `scale` that is not
/// finite.
///
/// # Numerics
/// Scores, sums and the merge of partial results are in f32, whatever the dtype; the result is rounded once. The order
/// of summation depends on the positions alone, so reruns are equal to the bit for any number of threads.
///
/// ```
/// use candle_core::{Device, Tensor};
/// use candle_pq_attn::ops::{indices_and_weights, sparse_attend, Geometry};
///
/// let query = Tensor::new(&[[[[0f32, 0.]]]], &Device::Cpu)?;
/// let keys = Tensor::new(&[[[[1f32, 2.], [3., 4.], [50., 60.], [5., 6.]]]], &Device::Cpu)?;
/// let heavy = Tensor::new(&[[[0u32]]], &Device::Cpu)?; // the first candidate, at position 1
/// let selected = indices_and_weights(&heavy, Geometry { n: 4, sink: 1, window: 1, init_offset: 1 })?;
/// let attended = sparse_attend(&query, &keys, &keys, &selected, 1.0)?;
/// assert_eq!(attended.out.flatten_all()?.to_vec1::<f32>()?, [3., 4.]); // of all but the third
/// # candle_core::Result::Ok(())
/// ```
pub fn sparse_attend(
    query: &Tensor,
    keys: &Tensor,
    values: &Tensor,
    selected: &Selected,
    scale: f32,
) -> Result<Attended> {
    attend("sparse_attend", query, &KeysAndValues::of(keys, values), Some(selected), None, scale)
}

/// Keys and values as a cache has them, `[b, h_kv, positions, head_dim]`.
pub(crate) struct KeysAndValues {
    /// Those of the first positions: views of one tensor.
    pub(crate) prefix: Option<[Tensor; 2]>,
    /// Those behind them.
    pub(crate) own: [Tensor; 2],
    /// Where `own` has positions in pages, [`PAGE`] each, the number of each page in their order.
    pub(crate) pages: Option<Vec<u32>>,
}

impl KeysAndValues {
    /// Of all positions, in one piece.
    fn of(keys: &Tensor, values: &Tensor) -> Self {
        Self { prefix: None, own: [keys.clone(), values.clone()], pages: None }
    }
}

/// As [`sparse_attend`], with a tail where there is one, over keys and values where they are in a cache on a CPU.
///
/// # Errors
/// As [`sparse_attend`]; with a prefix or pages on a GPU.
pub(crate) fn sparse_attend_to_cache(
    query: &Tensor,
    cached: &KeysAndValues,
    selected: &Selected,
    tail: Option<&Attended>,
    scale: f32,
) -> Result<Attended> {
    attend("sparse_attend", query, cached, Some(selected), tail, scale)
}

/// As [`sparse_attend`], merged with attention over other keys before anything is rounded.
///
/// # Shapes
/// - `tail`: as [`tail_attend`](super::tail_attend()) returns it, `out` `[b, h, 1, head_dim]` f32
///
/// # Errors
/// As [`sparse_attend`], for a tail of another shape or dtype.
///
/// # Numerics
/// Where the LSE of `tail` is negative infinity the result is that of [`sparse_attend`], to the bit.
///
/// ```
/// use candle_core::{Device, Tensor};
/// use candle_pq_attn::ops::{self, ClusterSums, Geometry};
///
/// let random = |dims: &[usize]| Tensor::randn(0f32, 1., dims, &Device::Cpu);
/// let (query, keys, values) = (random(&[1, 2, 1, 16])?, random(&[1, 1, 40, 16])?, random(&[1, 1, 40, 16])?);
/// // Each of 40 keys in a cluster of its own, and exact scores: nothing is lost, whatever is selected.
/// let codes = Tensor::arange(0u8, 40, &Device::Cpu)?.reshape((1, 1, 40))?;
/// let clusters = ops::cluster_sums(&values, &codes, &ClusterSums::empty([1, 1, 40, 16], &Device::Cpu)?)?;
/// let scores = query.reshape((1, 1, 2, 16))?.matmul(&keys.t()?)?.reshape((1, 2, 40))?;
/// let geometry = Geometry { n: 40, sink: 0, window: 0, init_offset: 0 };
/// let selected = ops::indices_and_weights(&ops::topk(&scores, 3)?, geometry)?;
/// let tail = ops::tail_attend(&scores, &codes, &clusters, &selected, 0, 0.25)?;
/// let sparse = ops::sparse_attend_with_tail(&query, &keys, &values, &selected, &tail, 0.25)?;
/// let dense = ops::dense_attend(&query, &keys, &values, 0.25)?;
/// let off = (sparse.out - dense.out)?.abs()?.max_all()?.to_scalar::<f32>()?;
/// assert!(off < 1e-5);
/// # candle_core::Result::Ok(())
/// ```
pub fn sparse_attend_with_tail(
    query: &Tensor,
    keys: &Tensor,
    values: &Tensor,
    selected: &Selected,
    tail: &Attended,
    scale: f32,
) -> Result<Attended> {
    let all = KeysAndValues::of(keys, values);
    attend("sparse_attend_with_tail", query, &all, Some(selected), Some(tail), scale)
}

/// Attends to all keys; otherwise as [`sparse_attend`].
///
/// The sequence is split over the cores, and K and V are read once for all query heads of a group: the honest baseline
/// for a sparse decode.
///
/// ```
/// use candle_core::{Device, Tensor};
/// use candle_pq_attn::ops::dense_attend;
///
/// let query = Tensor::new(&[[[[0f32, 0.]]]], &Device::Cpu)?;
/// let keys = Tensor::new(&[[[[1f32, 2.], [3., 4.]]]], &Device::Cpu)?;
/// let attended = dense_attend(&query, &keys, &keys, 1.0)?;
/// assert_eq!(attended.out.flatten_all()?.to_vec1::<f32>()?, [2., 3.]); // the mean
/// assert!((attended.lse.flatten_all()?.to_vec1::<f32>()?[0] - 2f32.ln()).abs() < 1e-6);
/// # candle_core::Result::Ok(())
/// ```
pub fn dense_attend(query: &Tensor, keys: &Tensor, values: &Tensor, scale: f32) -> Result<Attended> {
    attend("dense_attend", query, &KeysAndValues::of(keys, values), None, None, scale)
}

fn attend(
    op: &'static str,
    query: &Tensor,
    cached: &KeysAndValues,
    selected: Option<&Selected>,
    tail: Option<&Attended>,
    scale: f32,
) -> Result<Attended> {
    let [keys, values] = &cached.own;
    let (query, keys, values) = (with_unit_rows(query)?, with_unit_rows(keys)?, with_unit_rows(values)?);
    let prefix = match &cached.prefix {
        None => None,
        Some([keys, values]) => {
            let views = Plan::new(op, &query, keys, values, None, None, scale)?;
            Some(Prefix { keys: keys.clone(), views: [views.keys, views.values] })
        }
    };
    let selected = selected.map(Selected::with_unit_rows).transpose()?;
    let tail = tail.map(Attended::with_unit_rows).transpose()?;
    let plan = Plan::new(op, &query, &keys, &values, selected.as_ref(), tail.as_ref(), scale)?;
    let pages = cached.pages.as_deref();
    let op = Attend { plan, prefix, pages, selected, tail, lse: SideOutput::default() };
    let out = match share_storage(&keys, &values) {
        true => query.apply_op2_no_bwd(&keys, &op)?,
        false => query.apply_op3_no_bwd(&keys, &values, &op)?,
    };
    Ok(Attended { out, lse: op.lse.take(op.plan.op)? })
}

/// A checked call of [`sparse_attend`], with or without a tail, or [`dense_attend`].
pub(crate) struct Plan {
    pub(crate) op: &'static str,
    pub(crate) query: View<4>,
    pub(crate) keys: View<4>,
    pub(crate) values: View<4>,
    /// None: all positions.
    pub(crate) lists: Option<Lists>,
    /// Output and LSE of other keys.
    pub(crate) tail: Option<(View<4>, View<2>)>,
    pub(crate) scale: f32,
}

impl Plan {
    pub(super) fn new(
        op: &'static str,
        query: &Tensor,
        keys: &Tensor,
        values: &Tensor,
        selected: Option<&Selected>,
        tail: Option<&Attended>,
        scale: f32,
    ) -> Result<Self> {
        let query_arg = Arg::new(op, "query", query);
        let (keys_arg, values_arg) = (Arg::new(op, "keys", keys), Arg::new(op, "values", values));
        query_arg.is_float()?;
        keys_arg.is(query.dtype())?;
        values_arg.is(query.dtype())?;
        let query: View<4> = query_arg.view("[b, h, 1, head_dim]")?;
        let keys: View<4> = keys_arg.view("[b, h_kv, n, head_dim]")?;
        let [b, h, _, head_dim] = query.dims;
        let [_, h_kv, n, _] = keys.dims;
        query_arg.has_dims(&[b, h, 1, head_dim])?;
        if head_dim == 0 || head_dim > MAX_HEAD_DIM {
            return query_arg.fail("a head_dim of 1 to 256", format_args!("{head_dim}"));
        }
        keys_arg.has_dims(&[b, h_kv, n, head_dim])?;
        values_arg.has_dims(&keys.dims)?;
        if h == 0 || h_kv == 0 || !h.is_multiple_of(h_kv) {
            return keys_arg.fail(&format!("an h_kv that divides h {h}"), format_args!("{h_kv}"));
        }
        let lists = selected.map(|selected| Lists::serving(op, selected, [b, h, h_kv])).transpose()?;
        let tail = tail.map(|tail| tail.views(op, &query.dims)).transpose()?;
        if !scale.is_finite() {
            bail!("{op}: scale: expected a finite number, got {scale}");
        }
        Ok(Self { op, query, keys, values: values_arg.view("[b, h_kv, n, head_dim]")?, lists, tail, scale })
    }

    /// Query heads that read the same positions of the same K and V: one a list, or one a group.
    pub(crate) fn heads_per_list(&self) -> usize {
        self.query.dims[1] / self.lists.map_or(self.keys.dims[1], |lists| lists.lists())
    }
}

/// Keys and values of the first positions, where they do not lie with the others.
struct Prefix {
    /// In the same storage as the values.
    keys: Tensor,
    views: [View<4>; 2],
}

struct Attend<'a> {
    plan: Plan,
    prefix: Option<Prefix>,
    pages: Option<&'a [u32]>,
    selected: Option<Selected>,
    tail: Option<Attended>,
    lse: SideOutput,
}

/// Of keys and values that share a storage.
impl CustomOp2 for Attend<'_> {
    fn name(&self) -> &'static str {
        self.plan.op
    }

    fn cpu_fwd(&self, query: &CpuStorage, l: &Layout, kv: &CpuStorage, kv_l: &Layout) -> Result<(CpuStorage, Shape)> {
        CustomOp3::cpu_fwd(self, query, l, kv, kv_l, kv, kv_l)
    }

    #[cfg(feature = "cuda")]
    fn cuda_fwd(
        &self,
        query: &CudaStorage,
        l: &Layout,
        kv: &CudaStorage,
        kv_l: &Layout,
    ) -> Result<(CudaStorage, Shape)> {
        CustomOp3::cuda_fwd(self, query, l, kv, kv_l, kv, kv_l)
    }
}

impl CustomOp3 for Attend<'_> {
    fn name(&self) -> &'static str {
        self.plan.op
    }

    fn cpu_fwd(
        &self,
        query: &CpuStorage,
        _: &Layout,
        keys: &CpuStorage,
        _: &Layout,
        values: &CpuStorage,
        _: &Layout,
    ) -> Result<(CpuStorage, Shape)> {
        let [b, h, ..] = self.plan.query.dims;
        let (out, lse) = cpu::run(self, query, keys, values)?;
        self.lse.put_cpu(CpuStorage::F32(lse), (b, h));
        Ok((out, self.plan.query.dims.as_slice().into()))
    }

    #[cfg(feature = "cuda")]
    fn cuda_fwd(
        &self,
        query: &CudaStorage,
        _: &Layout,
        keys: &CudaStorage,
        _: &Layout,
        values: &CudaStorage,
        _: &Layout,
    ) -> Result<(CudaStorage, Shape)> {
        let [b, h, ..] = self.plan.query.dims;
        if self.prefix.is_some() || self.pages.is_some() {
            bail!("{}: keys: expected them in one piece on a GPU, got a prefix or pages", self.plan.op);
        }
        let (selected, tail) = (self.selected.as_ref(), self.tail.as_ref());
        let (out, lse) = cuda::run(&self.plan, selected, tail, query, keys, values)?;
        self.lse.put_cuda(lse, (b, h));
        Ok((out, self.plan.query.dims.as_slice().into()))
    }
}
