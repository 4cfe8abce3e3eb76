//! The softmax of dense causal attention, in place.

mod cpu;
#[cfg(feature = "cuda")]
mod cuda;

#[cfg(feature = "cuda")]
use candle_core::CudaStorage;
use candle_core::{bail, CpuStorage, DType, InplaceOp1, Layout, Result, Tensor};

use super::arg::{Arg, View};

const OP: &str = "causal_softmax";

/// Replaces each row of scores by `softmax(scale · scores)` over the keys that its query may see.
///
/// Row `r` of a head belongs to the query at position `first + r % queries`, and sees the keys up to its own position;
/// the others get probability 0. Rows beyond `queries` are further query heads of the same group, which a matmul with
/// K stacks so as to read K once. Works in place, in one pass over each row.
///
/// # Shapes
/// - `scores`: `[b, h_kv, group * queries, n]` f32, contiguous
///
/// # Errors
/// Another rank, dtype or layout, `queries` that do not divide the rows, a `first` query position whose last query is
/// beyond `n`, or a `scale` that is not finite.
///
/// ```
/// use candle_core::{Device, Tensor};
/// use candle_pq_attn::ops::causal_softmax;
///
/// // Two queries at positions 1 and 2 of three keys.
/// let scores = Tensor::zeros((1, 1, 2, 3), candle_core::DType::F32, &Device::Cpu)?;
/// causal_softmax(&scores, 1, 2, 1.0)?;
/// let third = 1.0 / 3.0;
/// assert_eq!(scores.flatten_to(2)?.to_vec2::<f32>()?, [[0.5, 0.5, 0.0], [third, third, third]]);
/// # candle_core::Result::Ok(())
/// ```
pub fn causal_softmax(scores: &Tensor, first: usize, queries: usize, scale: f32) -> Result<()> {
    let plan = Plan::new(scores, first, queries, scale)?;
    if scores.elem_count() == 0 {
        // It may begin behind the end of its memory.
        return Ok(());
    }
    scores.inplace_op1(&CausalSoftmax { plan })
}

/// A checked call of [`causal_softmax`].
pub(crate) struct Plan {
    pub(crate) scores: View<4>,
    pub(crate) first: usize,
    pub(crate) queries: usize,
    pub(crate) scale: f32,
}

impl Plan {
    fn new(scores: &Tensor, first: usize, queries: usize, scale: f32) -> Result<Self> {
        let arg = Arg::new(OP, "scores", scores);
        arg.is(DType::F32)?;
        let view: View<4> = arg.view("[b, h_kv, group * queries, n]")?;
        if !scores.is_contiguous() {
            return arg.fail("a contiguous tensor", format_args!("strides {:?}", scores.stride()));
        }
        let [_, _, rows, n] = view.dims;
        if queries == 0 || !rows.is_multiple_of(queries) {
            bail!("{OP}: queries: expected a divisor of {rows} rows, got {queries}");
        }
        if first.saturating_add(queries) > n {
            bail!("{OP}: first: expected at most {n} keys minus {queries} queries, got {first}");
        }
        if !scale.is_finite() {
            bail!("{OP}: scale: expected a finite number, got {scale}");
        }
        Ok(Self { scores: view, first, queries, scale })
    }
}

struct CausalSoftmax {
    plan: Plan,
}

impl InplaceOp1 for CausalSoftmax {
    fn name(&self) -> &'static str {
        OP
    }

    fn cpu_fwd(&self, scores: &mut CpuStorage, _: &Layout) -> Result<()> {
        cpu::run(&self.plan, scores)
    }

    #[cfg(feature = "cuda")]
    fn cuda_fwd(&self, scores: &mut CudaStorage, _: &Layout) -> Result<()> {
        cuda::run(&self.plan, scores)
    }
}
