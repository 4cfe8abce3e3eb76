//! Exact top-k: the positions of the k largest scores of each row.

pub(super) mod cpu;
#[cfg(feature = "cuda")]
mod cuda;
#[cfg(feature = "cuda")]
pub(super) use cuda::Kernels;

#[cfg(feature = "cuda")]
use candle_core::CudaStorage;
use candle_core::{CpuStorage, CustomOp1, DType, Layout, Result, Shape, Tensor};

use super::arg::Arg;

const OP: &str = "topk";

/// Positions of the `k` largest scores of each row, in ascending order of *position*.
///
/// The set is exact and unique: of equal scores the lower position wins. Zeros of either sign are equal, and NaN ranks
/// below every number. `k` may be anything; of a row with fewer scores all are returned. For the values, gather.
///
/// # Shapes
/// - `scores`: `[..., n]` f32, any strides
/// - returns positions `[..., min(k, n)]` u32
///
/// # Errors
/// A dtype other than f32, a tensor without dimensions, or rows of more than `u32::MAX` scores.
///
/// ```
/// use candle_core::{Device, Tensor};
/// use candle_pq_attn::ops::topk;
///
/// let scores = Tensor::new(&[[0.1f32, 0.7, 0.7, 0.3]], &Device::Cpu)?;
/// assert_eq!(topk(&scores, 2)?.to_vec2::<u32>()?, [[1, 2]]);
/// assert_eq!(topk(&scores, 1)?.to_vec2::<u32>()?, [[1]]); // of equals the first
/// # candle_core::Result::Ok(())
/// ```
pub fn topk(scores: &Tensor, k: usize) -> Result<Tensor> {
    let plan = Plan::new(scores, k)?;
    let rows = scores.reshape((plan.rows, plan.n))?; // a copy of what is not contiguous
    let positions = rows.apply_op1_no_bwd(&TopK { plan })?;
    let dims = scores.dims();
    let shape: Vec<usize> = dims[..dims.len() - 1].iter().copied().chain([positions.dim(1)?]).collect();
    positions.reshape(shape)
}

/// A checked call of [`topk`].
pub(crate) struct Plan {
    pub(crate) rows: usize,
    pub(crate) n: usize,
    pub(crate) k: usize,
}

impl Plan {
    fn new(scores: &Tensor, k: usize) -> Result<Self> {
        let arg = Arg::new(OP, "scores", scores);
        arg.is(DType::F32)?;
        let Some((&n, rows)) = scores.dims().split_last() else {
            return arg.fail("[..., n]", format_args!("[]"));
        };
        if u32::try_from(n).is_err() {
            return arg.fail("rows of at most u32::MAX scores", format_args!("{n}"));
        }
        Ok(Self { rows: rows.iter().product(), n, k: k.min(n) })
    }
}

struct TopK {
    plan: Plan,
}

impl CustomOp1 for TopK {
    fn name(&self) -> &'static str {
        OP
    }

    fn cpu_fwd(&self, scores: &CpuStorage, layout: &Layout) -> Result<(CpuStorage, Shape)> {
        let positions = cpu::run(&self.plan, scores, layout)?;
        Ok((CpuStorage::U32(positions), (self.plan.rows, self.plan.k).into()))
    }

    #[cfg(feature = "cuda")]
    fn cuda_fwd(&self, scores: &CudaStorage, layout: &Layout) -> Result<(CudaStorage, Shape)> {
        let positions = cuda::run(&self.plan, scores, layout)?;
        Ok((positions, (self.plan.rows, self.plan.k).into()))
    }
}
