//! Second outputs of custom ops.

use std::sync::OnceLock;

use candle_core::{bail, op::BackpropOp, CpuStorage, Result, Shape, Storage, Tensor};

/// A place where a running custom op leaves an output beyond the one tensor that Candle lets it return.
///
/// The op struct owns it; the function that applied the op takes the tensor out afterwards.
#[derive(Default)]
pub(crate) struct SideOutput(OnceLock<(Storage, Shape)>);

impl SideOutput {
    /// Leaves a CPU output; the first one stays.
    pub(crate) fn put_cpu(&self, storage: CpuStorage, shape: impl Into<Shape>) {
        let _ = self.0.set((Storage::Cpu(storage), shape.into()));
    }

    /// Leaves a GPU output; the first one stays.
    #[cfg(feature = "cuda")]
    pub(crate) fn put_cuda(&self, storage: candle_core::CudaStorage, shape: impl Into<Shape>) {
        let _ = self.0.set((Storage::Cuda(storage), shape.into()));
    }

    /// The output as a tensor.
    pub(crate) fn take(self, op: &str) -> Result<Tensor> {
        match self.0.into_inner() {
            Some((storage, shape)) => Ok(Tensor::from_storage(storage, shape, BackpropOp::none(), false)),
            None => bail!("{op}: ran without leaving its second output"),
        }
    }
}
