//! New keys and values, written behind the last ones of a cache on a GPU.

mod cuda;

use std::sync::{Mutex, PoisonError};

use candle_core::{bail, CpuStorage, CudaStorage, InplaceOp3, Layout, Result, Tensor};

use super::arg::{Arg, View};
use crate::cuda::Lens;

const OP: &str = "append";

/// Writes `keys` and `values`, `[b, h_kv, added, head_dim]` of any strides, to `cache`,
/// `[2, b, h_kv, capacity, head_dim]`, whose first position is `first`, from the positions that `lens` says, which then grow
/// by `added`.
///
/// A sequence without room for them stays as it is.
///
/// # Errors
/// Shapes or dtypes other than these.
pub(crate) fn append(cache: &Tensor, first: usize, lens: &mut Lens, keys: &Tensor, values: &Tensor) -> Result<()> {
    let plan = Plan::new(cache, first, keys, values)?;
    cache.inplace_op3(keys, values, &Append { plan, lens: Mutex::new(lens) })
}

/// A checked call of [`append`].
struct Plan {
    cache: View<5>,
    first: usize,
    keys: View<4>,
    values: View<4>,
}

impl Plan {
    fn new(cache: &Tensor, first: usize, keys: &Tensor, values: &Tensor) -> Result<Self> {
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
        Ok(Self { cache, first, keys, values: values_arg.view("[b, h_kv, added, head_dim]")? })
    }
}

struct Append<'a> {
    plan: Plan,
    /// Candle runs an op by shared reference; this one has a second output.
    lens: Mutex<&'a mut Lens>,
}

impl InplaceOp3 for Append<'_> {
    fn name(&self) -> &'static str {
        OP
    }

    fn cpu_fwd(
        &self,
        _: &mut CpuStorage,
        _: &Layout,
        _: &CpuStorage,
        _: &Layout,
        _: &CpuStorage,
        _: &Layout,
    ) -> Result<()> {
        bail!("{OP}: expected tensors on a GPU, got CPU tensors")
    }

    fn cuda_fwd(
        &self,
        cache: &mut CudaStorage,
        _: &Layout,
        keys: &CudaStorage,
        _: &Layout,
        values: &CudaStorage,
        _: &Layout,
    ) -> Result<()> {
        let mut lens = self.lens.lock().unwrap_or_else(PoisonError::into_inner);
        cuda::run(&self.plan, cache, lens.storage_mut(), keys, values)
    }
}
