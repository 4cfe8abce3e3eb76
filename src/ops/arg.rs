//! Checked views of an op's tensor arguments: the one place that turns a layout into offsets, or into an error that
//! names the op, the argument, what was expected and what came.

use candle_core::{bail, DType, Layout, Result, Tensor};

use crate::fault::point_of_failure;

/// One tensor argument of an op, on its way to being checked.
pub(crate) struct Arg<'a> {
    op: &'static str,
    name: &'static str,
    layout: &'a Layout,
    dtype: DType,
}

impl<'a> Arg<'a> {
    pub(crate) fn new(op: &'static str, name: &'static str, tensor: &'a Tensor) -> Self {
        Self { op, name, layout: tensor.layout(), dtype: tensor.dtype() }
    }

    /// The argument as an `N`-dimensional view; `shape` says in words what was expected.
    pub(crate) fn view<const N: usize>(&self, shape: &str) -> Result<View<N>> {
        let (Ok(dims), Ok(strides)) = (self.layout.dims().try_into(), self.layout.stride().try_into()) else {
            return self.fail(shape, format_args!("{:?}", self.layout.dims()));
        };
        point_of_failure()?;
        Ok(View { offset: self.layout.start_offset(), dims, strides })
    }

    /// Fails unless the argument has exactly these dimensions.
    pub(crate) fn has_dims(&self, expected: &[usize]) -> Result<()> {
        if self.layout.dims() == expected {
            return Ok(());
        }
        self.fail(&format!("shape {expected:?}"), format_args!("{:?}", self.layout.dims()))
    }

    /// Fails unless the argument is f32, f16 or bf16.
    pub(crate) fn is_float(&self) -> Result<()> {
        self.is_one_of(&[DType::F32, DType::F16, DType::BF16])
    }

    /// Fails unless the argument has this dtype.
    pub(crate) fn is(&self, dtype: DType) -> Result<()> {
        self.is_one_of(&[dtype])
    }

    fn is_one_of(&self, dtypes: &[DType]) -> Result<()> {
        if dtypes.contains(&self.dtype) {
            return Ok(());
        }
        let names: Vec<_> = dtypes.iter().map(|d| d.as_str()).collect();
        self.fail(&format!("dtype {}", names.join(", ")), format_args!("{}", self.dtype.as_str()))
    }

    /// The error `op: name: expected ..., got ...`.
    pub(crate) fn fail<T>(&self, expected: &str, got: std::fmt::Arguments) -> Result<T> {
        bail!("{}: {}: expected {expected}, got {got}", self.op, self.name)
    }
}

/// Dimensions and strides of a checked argument, in elements.
#[derive(Debug, Clone, Copy)]
pub(crate) struct View<const N: usize> {
    offset: usize,
    pub(crate) dims: [usize; N],
    pub(crate) strides: [usize; N],
}

impl<const N: usize> View<N> {
    /// Of elements that lie in order, without a gap.
    pub(crate) fn contiguous(dims: [usize; N]) -> Self {
        let mut strides = [1; N];
        for i in (1..N).rev() {
            strides[i - 1] = strides[i] * dims[i];
        }
        Self { offset: 0, dims, strides }
    }

    /// Whether rows follow each other without a gap.
    pub(crate) fn has_adjacent_rows(&self) -> bool {
        self.strides[N - 2] == self.dims[N - 1]
    }

    /// Offset of the element at `index`; fewer indices than dimensions address the start of a row or block.
    #[inline(always)]
    pub(crate) fn at(&self, index: &[usize]) -> usize {
        index.iter().zip(&self.strides).fold(self.offset, |at, (i, stride)| at + i * stride)
    }

    /// Offset and strides as a kernel takes them.
    #[cfg(feature = "cuda")]
    pub(crate) fn device(&self) -> crate::cuda::DeviceView<N> {
        crate::cuda::DeviceView { offset: self.offset as u64, strides: self.strides.map(|stride| stride as u64) }
    }
}

/// Whether tensors are views of one: to be locked once, since a second read could wait for a writer who waits for the first.
pub(crate) fn share_storage(a: &Tensor, b: &Tensor) -> bool {
    let storage = |tensor: &Tensor| std::ptr::from_ref(&*tensor.storage_and_layout().0).addr();
    storage(a) == storage(b)
}

/// `tensor` with adjacent elements along its last dimension: itself, or a copy where it is strided there.
///
/// Every other dimension keeps its strides, so views into a larger cache are never copied.
pub(crate) fn with_unit_rows(tensor: &Tensor) -> Result<Tensor> {
    match (tensor.layout().stride().last(), tensor.dims().last()) {
        (Some(&stride), Some(&dim)) if stride != 1 && dim > 1 => tensor.contiguous(),
        _ => own_if_empty(tensor),
    }
}

/// `tensor`, or a new one where it is empty: an empty view may begin behind the end of its memory, where Candle panics.
pub(crate) fn own_if_empty(tensor: &Tensor) -> Result<Tensor> {
    match tensor.elem_count() {
        0 => Tensor::zeros(tensor.shape(), tensor.dtype(), tensor.device()),
        _ => Ok(tensor.clone()),
    }
}
