//! Pools the scores of a group's query heads, for one selection a KV head.

mod cpu;
#[cfg(feature = "cuda")]
mod cuda;
#[cfg(feature = "cuda")]
pub(super) use cuda::Kernels;

#[cfg(feature = "cuda")]
use candle_core::CudaStorage;
use candle_core::{bail, CpuStorage, CustomOp1, DType, Layout, Result, Shape, Tensor};

use super::arg::{with_unit_rows, Arg, View};

const OP: &str = "group_mass";

/// The attention mass that the query heads of each group give to each key: `Σ_head softmax(scale · score[head])`.
///
/// Its top-k is the one list that serves a whole group best, so that a decode step reads K and V once a KV head.
///
/// # Shapes
/// - `scores`: `[b, h, n]` f32, any strides
/// - returns mass `[b, h_kv, n]` f32; each row sums to `h / h_kv`
///
/// # Errors
/// Another rank or dtype, an `h_kv` that does not divide `h`, or a `scale` that is not finite.
///
/// # Numerics
/// f32; keys whose share underflows have mass 0 and tie.
///
/// ```
/// use candle_core::{Device, Tensor};
/// use candle_pq_attn::ops::group_mass;
///
/// // Two query heads of one KV head: one is sure of the second key, the other of none.
/// let scores = Tensor::new(&[[[-100f32, 100.], [0., 0.]]], &Device::Cpu)?;
/// assert_eq!(group_mass(&scores, 1, 1.0)?.flatten_all()?.to_vec1::<f32>()?, [0.5, 1.5]);
/// # candle_core::Result::Ok(())
/// ```
pub fn group_mass(scores: &Tensor, h_kv: usize, scale: f32) -> Result<Tensor> {
    let scores = with_unit_rows(scores)?;
    let plan = Plan::new(&scores, h_kv, scale)?;
    scores.apply_op1_no_bwd(&GroupMass { plan })
}

/// A checked call of [`group_mass`].
pub(crate) struct Plan {
    pub(crate) scores: View<3>,
    pub(crate) h_kv: usize,
    pub(crate) scale: f32,
}

impl Plan {
    fn new(scores: &Tensor, h_kv: usize, scale: f32) -> Result<Self> {
        let arg = Arg::new(OP, "scores", scores);
        arg.is(DType::F32)?;
        let scores: View<3> = arg.view("[b, h, n]")?;
        let h = scores.dims[1];
        if h == 0 || h_kv == 0 || !h.is_multiple_of(h_kv) {
            bail!("{OP}: h_kv: expected a divisor of h {h}, got {h_kv}");
        }
        if !scale.is_finite() {
            bail!("{OP}: scale: expected a finite number, got {scale}");
        }
        Ok(Self { scores, h_kv, scale })
    }
}

struct GroupMass {
    plan: Plan,
}

impl CustomOp1 for GroupMass {
    fn name(&self) -> &'static str {
        OP
    }

    fn cpu_fwd(&self, scores: &CpuStorage, _: &Layout) -> Result<(CpuStorage, Shape)> {
        let [b, _, n] = self.plan.scores.dims;
        let mass = cpu::run(&self.plan, scores)?;
        Ok((CpuStorage::F32(mass), (b, self.plan.h_kv, n).into()))
    }

    #[cfg(feature = "cuda")]
    fn cuda_fwd(&self, scores: &CudaStorage, _: &Layout) -> Result<(CudaStorage, Shape)> {
        let [b, _, n] = self.plan.scores.dims;
        let mass = cuda::run(&self.plan, scores)?;
        Ok((mass, (b, self.plan.h_kv, n).into()))
    }
}
