//! From heavy keys to the list of attended positions and their weights.

mod cpu;
#[cfg(feature = "cuda")]
mod cuda;
#[cfg(feature = "cuda")]
pub(super) use cuda::launch;

#[cfg(feature = "cuda")]
use candle_core::CudaStorage;
use candle_core::{bail, CpuStorage, CustomOp1, CustomOp3, DType, Layout, Result, Shape, Tensor};

use super::arg::{with_unit_rows, Arg, View};
use super::side_output::SideOutput;

const OP: &str = "indices_and_weights";
const DENSE_OP: &str = "dense_weights";

/// What fills [`Selected::indices`] behind the attended positions.
pub const PADDING: u32 = u32::MAX;

/// The positions that a decode step attends to, for each of `lists` heads: `h` of them with one list a query head,
/// `h_kv` with one a KV head.
#[derive(Debug, Clone)]
pub struct Selected {
    /// `[b, lists, l]` u32: attended positions in ascending order, then [`PADDING`].
    pub indices: Tensor,
    /// `[b, lists]` u32: how many positions are attended, at most `l`.
    pub lens: Tensor,
    /// `[b, lists, l]` f32: the inverse of each position's sampling probability, 1 for a key taken for sure; 0 for
    /// padding.
    pub weights: Tensor,
}

impl Selected {
    /// The same, with unit strides where lists are read.
    pub(crate) fn with_unit_rows(&self) -> Result<Self> {
        Ok(Self {
            indices: with_unit_rows(&self.indices)?,
            lens: with_unit_rows(&self.lens)?,
            weights: with_unit_rows(&self.weights)?,
        })
    }
}

/// Which parts of a sequence of `n` keys are attended besides the heavy ones.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Geometry {
    /// Keys so far.
    pub n: usize,
    /// First keys, always attended.
    pub sink: usize,
    /// Last keys, always attended.
    pub window: usize,
    /// Position of the first candidate: what is added to a heavy key's index to get its position.
    pub init_offset: usize,
}

/// Lists the attended positions in ascending order: sink, heavy, window, each position once.
///
/// # Shapes
/// - `heavy`: `[b, lists, k]` u32, ascending and distinct, as [`topk`](super::topk()) returns it for the scores of the
///   candidates: position `init_offset + heavy[..]` in the sequence
/// - returns lists of length `min(n, sink + k + window)`
///
/// A heavy key inside the sink or the window is attended once; its list is then shorter, which
/// [`Selected::lens`] says, and padded with [`PADDING`].
///
/// # Errors
/// Another rank or dtype, a position at or beyond `n`, positions that do not ascend, or `n` above `u32::MAX`.
///
/// ```
/// use candle_core::{Device, Tensor};
/// use candle_pq_attn::ops::{indices_and_weights, Geometry, PADDING};
///
/// // Ten keys: 1 sink, a window of 2, and of the candidates from position 1 on those at 3 and 5 of them.
/// let heavy = Tensor::new(&[[[3u32, 5]]], &Device::Cpu)?;
/// let selected = indices_and_weights(&heavy, Geometry { n: 10, sink: 1, window: 2, init_offset: 1 })?;
/// let listed = selected.indices.flatten_all()?.to_vec1::<u32>()?;
/// let len = selected.lens.flatten_all()?.to_vec1::<u32>()?[0] as usize;
/// assert_eq!(listed[..len], [0, 4, 6, 8, 9]);
/// assert!(listed[len..].iter().all(|position| *position == PADDING));
/// # candle_core::Result::Ok(())
/// ```
pub fn indices_and_weights(heavy: &Tensor, geometry: Geometry) -> Result<Selected> {
    let heavy = with_unit_rows(heavy)?;
    of_plan(Plan::new(&heavy, geometry)?, &heavy)
}

/// What a [`Plan`] of the same `heavy` says.
pub(super) fn of_plan(plan: Plan, heavy: &Tensor) -> Result<Selected> {
    let op = IndicesAndWeights { plan, lens: SideOutput::default(), weights: SideOutput::default() };
    let indices = heavy.apply_op1_no_bwd(&op)?;
    Ok(Selected { indices, lens: op.lens.take(OP)?, weights: op.weights.take(OP)? })
}

/// A checked call of [`indices_and_weights`].
pub(crate) struct Plan {
    pub(crate) heavy: View<3>,
    pub(crate) geometry: Geometry,
    /// Length of a list: no longer than the sequence.
    pub(crate) list_len: usize,
}

impl Plan {
    fn new(heavy: &Tensor, geometry: Geometry) -> Result<Self> {
        let arg = Arg::new(OP, "heavy", heavy);
        arg.is(DType::U32)?;
        let heavy: View<3> = arg.view("[b, lists, k]")?;
        let plan = Self::checked(OP, heavy, geometry)?;
        if geometry.n == 0 && heavy.dims[2] > 0 {
            return arg.fail("no positions for n 0", format_args!("{} a list", heavy.dims[2]));
        }
        Ok(plan)
    }

    /// For `heavy` as it will be.
    pub(super) fn checked(op: &str, heavy: View<3>, geometry: Geometry) -> Result<Self> {
        if u32::try_from(geometry.n).is_err() {
            bail!("{op}: n: expected at most u32::MAX keys, got {}", geometry.n);
        }
        let plan = Self::of(heavy, geometry);
        check_count(op, [heavy.dims[0], heavy.dims[1], plan.list_len])?;
        Ok(plan)
    }

    pub(super) fn of(heavy: View<3>, geometry: Geometry) -> Self {
        let Geometry { n, sink, window, .. } = geometry;
        let list_len = sink.saturating_add(window).saturating_add(heavy.dims[2]).min(n);
        Self { heavy, geometry, list_len }
    }
}

struct IndicesAndWeights {
    plan: Plan,
    lens: SideOutput,
    weights: SideOutput,
}

impl CustomOp1 for IndicesAndWeights {
    fn name(&self) -> &'static str {
        OP
    }

    fn cpu_fwd(&self, heavy: &CpuStorage, _: &Layout) -> Result<(CpuStorage, Shape)> {
        let [b, lists, _] = self.plan.heavy.dims;
        let shape = (b, lists, self.plan.list_len);
        let out = cpu::run(&self.plan, heavy)?;
        self.lens.put_cpu(CpuStorage::U32(out.lens), (b, lists));
        self.weights.put_cpu(CpuStorage::F32(out.weights), shape);
        Ok((CpuStorage::U32(out.indices), shape.into()))
    }

    #[cfg(feature = "cuda")]
    fn cuda_fwd(&self, heavy: &CudaStorage, _: &Layout) -> Result<(CudaStorage, Shape)> {
        let [b, lists, _] = self.plan.heavy.dims;
        let shape = (b, lists, self.plan.list_len);
        let out = cuda::run(&self.plan, heavy)?;
        self.lens.put_cuda(out.lens, (b, lists));
        self.weights.put_cuda(out.weights, shape);
        Ok((out.indices, shape.into()))
    }
}

/// The weights by position: `[b, h, n]` f32, 0 where a key is not attended.
///
/// With one list a KV head, each query head of a group gets its group's weights. A position that is listed twice counts
/// with the sum of its weights.
///
/// # Errors
/// Shapes or dtypes other than [`Selected`]'s, an `h` that its number of lists does not divide, or a position at or
/// beyond `n`.
///
/// ```
/// use candle_core::{Device, Tensor};
/// use candle_pq_attn::ops::{dense_weights, indices_and_weights, Geometry};
///
/// let heavy = Tensor::new(&[[[1u32]]], &Device::Cpu)?;
/// let selected = indices_and_weights(&heavy, Geometry { n: 5, sink: 1, window: 1, init_offset: 1 })?;
/// // One list for two query heads.
/// let weights = dense_weights(&selected, 2, 5)?.squeeze(0)?;
/// assert_eq!(weights.flatten_all()?.to_vec1::<f32>()?, [1., 0., 1., 0., 1., 1., 0., 1., 0., 1.]);
/// # candle_core::Result::Ok(())
/// ```
pub fn dense_weights(selected: &Selected, h: usize, n: usize) -> Result<Tensor> {
    let (indices, weights) = (with_unit_rows(&selected.indices)?, with_unit_rows(&selected.weights)?);
    let lens = with_unit_rows(&selected.lens)?;
    let lists = Lists::new(DENSE_OP, &indices, &lens, &weights)?;
    if lists.lists() == 0 || !h.is_multiple_of(lists.lists()) {
        bail!("{DENSE_OP}: h: expected a multiple of {} lists, got {h}", lists.lists());
    }
    check_count(DENSE_OP, [lists.indices.dims[0], h, n])?;
    indices.apply_op3_no_bwd(&lens, &weights, &DenseWeights { lists, h, n })
}

struct DenseWeights {
    lists: Lists,
    h: usize,
    n: usize,
}

impl CustomOp3 for DenseWeights {
    fn name(&self) -> &'static str {
        DENSE_OP
    }

    fn cpu_fwd(
        &self,
        indices: &CpuStorage,
        _: &Layout,
        lens: &CpuStorage,
        _: &Layout,
        weights: &CpuStorage,
        _: &Layout,
    ) -> Result<(CpuStorage, Shape)> {
        let dense = cpu::scatter(&self.lists, self.h, self.n, indices, lens, weights)?;
        Ok((CpuStorage::F32(dense), (self.lists.indices.dims[0], self.h, self.n).into()))
    }

    #[cfg(feature = "cuda")]
    fn cuda_fwd(
        &self,
        indices: &CudaStorage,
        _: &Layout,
        lens: &CudaStorage,
        _: &Layout,
        weights: &CudaStorage,
        _: &Layout,
    ) -> Result<(CudaStorage, Shape)> {
        let dense = cuda::scatter(&self.lists, self.h, self.n, indices, lens, weights)?;
        Ok((dense, (self.lists.indices.dims[0], self.h, self.n).into()))
    }
}

/// Fails where a result of `[b, heads, n]` numbers is more than can be addressed.
pub(super) fn check_count(op: &str, dims: [usize; 3]) -> Result<()> {
    let bytes = dims.iter().try_fold(size_of::<f32>(), |bytes, dim| bytes.checked_mul(*dim));
    match bytes.filter(|bytes| isize::try_from(*bytes).is_ok()) {
        Some(_) => Ok(()),
        None => bail!("{op}: n: expected a result of less than {} bytes, got {dims:?} numbers", isize::MAX),
    }
}

/// The checked layout of a [`Selected`].
#[derive(Clone, Copy)]
pub(crate) struct Lists {
    pub(crate) indices: View<3>,
    pub(crate) lens: View<2>,
    pub(crate) weights: View<3>,
}

impl Lists {
    pub(crate) fn new(op: &'static str, indices: &Tensor, lens: &Tensor, weights: &Tensor) -> Result<Self> {
        let (indices_arg, lens_arg) = (Arg::new(op, "indices", indices), Arg::new(op, "lens", lens));
        let weights_arg = Arg::new(op, "weights", weights);
        indices_arg.is(DType::U32)?;
        lens_arg.is(DType::U32)?;
        weights_arg.is(DType::F32)?;
        let indices: View<3> = indices_arg.view("[b, lists, l]")?;
        let [b, lists, _] = indices.dims;
        lens_arg.has_dims(&[b, lists])?;
        weights_arg.has_dims(&indices.dims)?;
        Ok(Self { indices, lens: lens_arg.view("[b, lists]")?, weights: weights_arg.view("[b, lists, l]")? })
    }

    /// The layout of lists for `h` query heads: one each, or one for each of `h_kv` KV heads.
    pub(crate) fn serving(op: &'static str, selected: &Selected, [b, h, h_kv]: [usize; 3]) -> Result<Self> {
        let lists = Self::new(op, &selected.indices, &selected.lens, &selected.weights)?;
        let [list_b, list_heads, len] = lists.indices.dims;
        if list_b != b || (list_heads != h && list_heads != h_kv) {
            let expected = format!("shape [{b}, {h} or {h_kv}, {len}]");
            return Arg::new(op, "indices", &selected.indices)
                .fail(&expected, format_args!("{:?}", lists.indices.dims));
        }
        Ok(lists)
    }

    /// Lists a batch element.
    pub(crate) fn lists(&self) -> usize {
        self.indices.dims[1]
    }
}
