//! The values of each cluster of keys, summed.

mod cpu;
#[cfg(feature = "cuda")]
mod cuda;

use candle_core::{bail, CpuStorage, CustomOp3, DType, Device, Layout, Result, Shape, Tensor};
#[cfg(feature = "cuda")]
use candle_core::{CudaStorage, InplaceOp2, InplaceOp3};

use super::arg::{own_if_empty, with_unit_rows, Arg, View};
use super::side_output::SideOutput;
use super::MAX_HEAD_DIM;
use crate::fault::point_of_failure;

const OP: &str = "cluster_sums";

/// Clusters of keys: what their values sum to, and how many they are. Mean values are `sums / counts`.
#[derive(Debug, Clone)]
pub struct ClusterSums {
    /// `[b, h_kv, n_clusters, head_dim]` f32
    pub sums: Tensor,
    /// `[b, h_kv, n_clusters]` u32
    pub counts: Tensor,
}

impl ClusterSums {
    /// Clusters without keys, `[b, h_kv, n_clusters, head_dim]`.
    ///
    /// # Errors
    /// More than can be addressed, or what the device gives.
    pub fn empty([b, h_kv, n_clusters, head_dim]: [usize; 4], device: &Device) -> Result<Self> {
        let dims = [b, h_kv, n_clusters, head_dim];
        let bytes = dims.iter().try_fold(size_of::<f32>(), |bytes, dim| bytes.checked_mul((*dim).max(1)));
        if bytes.is_none_or(|bytes| isize::try_from(bytes).is_err()) {
            bail!("ClusterSums: expected sums of less than {} bytes, got {dims:?} numbers", isize::MAX);
        }
        point_of_failure()?;
        Ok(Self {
            sums: Tensor::zeros((b, h_kv, n_clusters, head_dim), DType::F32, device)?,
            counts: Tensor::zeros((b, h_kv, n_clusters), DType::U32, device)?,
        })
    }

    /// Bytes of both.
    pub fn bytes(&self) -> usize {
        self.sums.elem_count() * size_of::<f32>() + self.counts.elem_count() * size_of::<u32>()
    }

    /// Adds keys as [`cluster_sums`] does; on a GPU, in place.
    pub(crate) fn add(&mut self, values: &Tensor, codes: &Tensor) -> Result<()> {
        #[cfg(feature = "cuda")]
        if values.device().is_cuda() {
            return self.add_on_gpu(values, codes);
        }
        *self = cluster_sums(values, codes, self)?;
        Ok(())
    }

    #[cfg(feature = "cuda")]
    fn add_on_gpu(&self, values: &Tensor, codes: &Tensor) -> Result<()> {
        let plan = Plan::new(values, codes, self)?;
        let op = AddInPlace { plan };
        self.sums.inplace_op3(values, codes, &op)?;
        self.counts.inplace_op2(codes, &op)
    }

    /// Forgets all keys, in place.
    pub(crate) fn clear(&self) -> Result<()> {
        self.sums.zero_set()?;
        self.counts.zero_set()
    }

    /// The same, without gaps in memory.
    fn contiguous(&self) -> Result<Self> {
        let contiguous = |tensor: &Tensor| own_if_empty(tensor)?.contiguous();
        Ok(Self { sums: contiguous(&self.sums)?, counts: contiguous(&self.counts)? })
    }

    /// `[n_clusters, head_dim]`, once dtypes and shapes are those of `[b, h_kv]` heads.
    pub(crate) fn check(&self, op: &'static str, [b, h_kv]: [usize; 2]) -> Result<[usize; 2]> {
        let (sums, counts) = (Arg::new(op, "sums", &self.sums), Arg::new(op, "counts", &self.counts));
        sums.is(DType::F32)?;
        counts.is(DType::U32)?;
        let [_, _, n_clusters, head_dim] = sums.view::<4>("[b, h_kv, n_clusters, head_dim]")?.dims;
        sums.has_dims(&[b, h_kv, n_clusters, head_dim])?;
        counts.has_dims(&[b, h_kv, n_clusters])?;
        if !(1..=256).contains(&n_clusters) {
            return sums.fail("1 to 256 clusters", format_args!("{n_clusters}"));
        }
        if head_dim == 0 || head_dim > MAX_HEAD_DIM {
            return sums.fail("a head_dim of 1 to 256", format_args!("{head_dim}"));
        }
        Ok([n_clusters, head_dim])
    }
}

/// Adds values to the sums of their keys' clusters, and the keys to the counts.
///
/// # Shapes
/// - `values`: `[b, h_kv, n, head_dim]`, f32, f16 or bf16
/// - `codes`: `[b, h_kv, n]` u8, the cluster of each key
/// - `before`: what the sums start from
///
/// # Errors
/// Shapes or dtypes other than these, `head_dim` above 256, more than 256 clusters, or a code that is no cluster's.
///
/// # Numerics
/// f32, one value after the other in ascending position: the same bits however the keys are cut into calls. Sums beyond
/// the largest f32, 3.4e38, are infinite, and so are the means: a million keys may have values of 1e32.
///
/// ```
/// use candle_core::{Device, Tensor};
/// use candle_pq_attn::ops::{cluster_sums, ClusterSums};
///
/// let values = Tensor::new(&[[[[1f32, 2.], [3., 4.], [5., 6.]]]], &Device::Cpu)?;
/// let codes = Tensor::new(&[[[1u8, 0, 1]]], &Device::Cpu)?;
/// let after = cluster_sums(&values, &codes, &ClusterSums::empty([1, 1, 2, 2], &Device::Cpu)?)?;
/// assert_eq!(after.sums.flatten_to(2)?.to_vec2::<f32>()?, [[3., 4.], [6., 8.]]);
/// assert_eq!(after.counts.flatten_all()?.to_vec1::<u32>()?, [1, 2]);
/// # candle_core::Result::Ok(())
/// ```
pub fn cluster_sums(values: &Tensor, codes: &Tensor, before: &ClusterSums) -> Result<ClusterSums> {
    let (values, codes, before) = (with_unit_rows(values)?, with_unit_rows(codes)?, before.contiguous()?);
    #[cfg(feature = "cuda")]
    if values.device().is_cuda() {
        let after = ClusterSums { sums: before.sums.copy()?, counts: before.counts.copy()? };
        after.add_on_gpu(&values, &codes)?;
        return Ok(after);
    }
    let plan = Plan::new(&values, &codes, &before)?;
    let op = Sum { plan, before: before.counts, counts: SideOutput::default() };
    let sums = values.apply_op3_no_bwd(&codes, &before.sums, &op)?;
    Ok(ClusterSums { sums, counts: op.counts.take(OP)? })
}

/// A checked call of [`cluster_sums`].
pub(crate) struct Plan {
    pub(crate) values: View<4>,
    /// `[b, h_kv, n, 1]`
    pub(crate) codes: View<4>,
    pub(crate) n_clusters: usize,
}

impl Plan {
    pub(crate) fn new(values: &Tensor, codes: &Tensor, before: &ClusterSums) -> Result<Self> {
        let (values_arg, codes_arg) = (Arg::new(OP, "values", values), Arg::new(OP, "codes", codes));
        values_arg.is_float()?;
        codes_arg.is(DType::U8)?;
        let values: View<4> = values_arg.view("[b, h_kv, n, head_dim]")?;
        let [b, h_kv, n, _] = values.dims;
        codes_arg.has_dims(&[b, h_kv, n])?;
        let [n_clusters, head_dim] = before.check(OP, [b, h_kv])?;
        values_arg.has_dims(&[b, h_kv, n, head_dim])?;
        let codes = Arg::new(OP, "codes", &codes.unsqueeze(3)?).view("[b, h_kv, n, 1]")?;
        Ok(Self { values, codes, n_clusters })
    }
}

struct Sum {
    plan: Plan,
    /// Counts to start from.
    before: Tensor,
    counts: SideOutput,
}

impl CustomOp3 for Sum {
    fn name(&self) -> &'static str {
        OP
    }

    fn cpu_fwd(
        &self,
        values: &CpuStorage,
        _: &Layout,
        codes: &CpuStorage,
        _: &Layout,
        sums: &CpuStorage,
        layout: &Layout,
    ) -> Result<(CpuStorage, Shape)> {
        let (sums, counts) = cpu::run(&self.plan, values, codes, (sums, layout), &self.before)?;
        self.counts.put_cpu(CpuStorage::U32(counts), self.before.shape());
        Ok((CpuStorage::F32(sums), layout.shape().clone()))
    }
}

#[cfg(feature = "cuda")]
struct AddInPlace {
    plan: Plan,
}

/// The sums.
#[cfg(feature = "cuda")]
impl InplaceOp3 for AddInPlace {
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
        bail!("{OP}: values: expected a tensor on a GPU, got a CPU tensor")
    }

    fn cuda_fwd(
        &self,
        sums: &mut CudaStorage,
        _: &Layout,
        values: &CudaStorage,
        _: &Layout,
        codes: &CudaStorage,
        _: &Layout,
    ) -> Result<()> {
        cuda::add_values(&self.plan, values, codes, sums)
    }
}

/// The counts.
#[cfg(feature = "cuda")]
impl InplaceOp2 for AddInPlace {
    fn name(&self) -> &'static str {
        OP
    }

    fn cpu_fwd(&self, _: &mut CpuStorage, _: &Layout, _: &CpuStorage, _: &Layout) -> Result<()> {
        bail!("{OP}: codes: expected a tensor on a GPU, got a CPU tensor")
    }

    fn cuda_fwd(&self, counts: &mut CudaStorage, _: &Layout, codes: &CudaStorage, _: &Layout) -> Result<()> {
        cuda::count(&self.plan, codes, counts)
    }
}
