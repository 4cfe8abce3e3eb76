//! Attention to the keys that were not selected, by the means of their clusters.

mod cpu;
#[cfg(feature = "cuda")]
mod cuda;
#[cfg(feature = "cuda")]
pub(super) use cuda::Kernels;

#[cfg(feature = "cuda")]
use candle_core::CudaStorage;
use candle_core::{bail, CpuStorage, CustomOp3, DType, Layout, Result, Shape, Tensor};

use super::arg::{with_unit_rows, Arg, View};
use super::cluster_sums::ClusterSums;
use super::indices_and_weights::{Lists, Selected};
use super::side_output::SideOutput;
use super::{Attended, Places};

const OP: &str = "tail_attend";

/// Attends to the candidates that `selected` does not list, each with the weight of its score and the mean value of its
/// cluster: `out = Σ_c Z_c vbar_c / Σ_c Z_c`, `Z_c = Σ e^{scale · score[t]}` over the unlisted candidates of cluster `c`.
///
/// As attention to one key a cluster, of weight `Z_c` and value `vbar_c`, it merges with that to the listed ones; see
/// [`sparse_attend_with_tail`](super::sparse_attend_with_tail()).
///
/// # Shapes
/// - `scores`: `[b, h, n]` f32, of the candidates, of which the first is at position `init_offset`
/// - `codes`: `[b, h_kv, n]` u8, the cluster of each candidate; `h` a multiple of `h_kv`
/// - `clusters`: `vbar = sums / counts`; candidates of a cluster that counts no keys are passed over
/// - `selected`: lists of positions, one a query head or one a KV head; what weighs 0 counts as unlisted
/// - returns `out` `[b, h, 1, head_dim]` f32, zeros where all candidates are listed, and `lse`, there negative infinity
///
/// # Errors
/// Shapes or dtypes other than these, a code that is no cluster's, or a `scale` that is not finite.
///
/// # Numerics
/// f32, shifted by the largest product of the unlisted candidates. A candidate whose score is NaN weighs
/// nothing. The order of summation depends on positions alone, so
/// reruns are equal to the bit for any number of threads.
pub fn tail_attend(
    scores: &Tensor,
    codes: &Tensor,
    clusters: &ClusterSums,
    selected: &Selected,
    init_offset: usize,
    scale: f32,
) -> Result<Attended> {
    tail_attend_in_pages(scores, (codes, None), clusters, selected, init_offset, scale)
}

/// As [`tail_attend`], with the codes at `places` where there are any: on a CPU.
pub(crate) fn tail_attend_in_pages(
    scores: &Tensor,
    (codes, places): (&Tensor, Option<&Places>),
    clusters: &ClusterSums,
    selected: &Selected,
    init_offset: usize,
    scale: f32,
) -> Result<Attended> {
    let (scores, codes) = (with_unit_rows(scores)?, with_unit_rows(codes)?);
    let (sums, counts) = (with_unit_rows(&clusters.sums)?, with_unit_rows(&clusters.counts)?);
    let (clusters, selected) = (ClusterSums { sums, counts }, selected.with_unit_rows()?);
    let plan = Plan::new(&scores, (&codes, places), &clusters, &selected, init_offset, scale)?;
    let op = TailAttend { plan, counts: clusters.counts, selected, places, lse: SideOutput::default() };
    let out = scores.apply_op3_no_bwd(&codes, &clusters.sums, &op)?;
    Ok(Attended { out, lse: op.lse.take(OP)? })
}

/// A checked call of [`tail_attend`].
pub(crate) struct Plan {
    pub(crate) scores: View<3>,
    /// `[b, h_kv, n, 1]`
    pub(crate) codes: View<4>,
    pub(crate) sums: View<4>,
    pub(crate) counts: View<3>,
    pub(crate) lists: Lists,
    pub(crate) init_offset: usize,
    pub(crate) scale: f32,
}

impl Plan {
    fn new(
        scores: &Tensor,
        (codes, places): (&Tensor, Option<&Places>),
        clusters: &ClusterSums,
        selected: &Selected,
        init_offset: usize,
        scale: f32,
    ) -> Result<Self> {
        let (scores_arg, codes_arg) = (Arg::new(OP, "scores", scores), Arg::new(OP, "codes", codes));
        scores_arg.is(DType::F32)?;
        codes_arg.is(DType::U8)?;
        let scores: View<3> = scores_arg.view("[b, h, n]")?;
        let [_, h_kv, positions] = codes_arg.view::<3>("[b, h_kv, n]")?.dims;
        let [b, h, n] = scores.dims;
        codes_arg.has_dims(&[b, h_kv, if places.is_some() { positions } else { n }])?;
        if h == 0 || h_kv == 0 || !h.is_multiple_of(h_kv) {
            return codes_arg.fail(&format!("an h_kv that divides h {h}"), format_args!("{h_kv}"));
        }
        let codes = Arg::new(OP, "codes", &codes.unsqueeze(3)?).view("[b, h_kv, n, 1]")?;
        let lists = Lists::serving(OP, selected, [b, h, h_kv])?;
        Self::of(scores, codes, clusters, lists, init_offset, scale)
    }

    /// Of views that are known to agree.
    pub(super) fn of(
        scores: View<3>,
        codes: View<4>,
        clusters: &ClusterSums,
        lists: Lists,
        init_offset: usize,
        scale: f32,
    ) -> Result<Self> {
        let [b, h_kv, ..] = codes.dims;
        clusters.check(OP, [b, h_kv])?;
        if !scale.is_finite() {
            bail!("{OP}: scale: expected a finite number, got {scale}");
        }
        let sums = Arg::new(OP, "sums", &clusters.sums).view("[b, h_kv, n_clusters, head_dim]")?;
        let counts = Arg::new(OP, "counts", &clusters.counts).view("[b, h_kv, n_clusters]")?;
        Ok(Self { scores, codes, sums, counts, lists, init_offset, scale })
    }
}

struct TailAttend<'a> {
    plan: Plan,
    counts: Tensor,
    selected: Selected,
    places: Option<&'a Places>,
    lse: SideOutput,
}

impl CustomOp3 for TailAttend<'_> {
    fn name(&self) -> &'static str {
        OP
    }

    fn cpu_fwd(
        &self,
        scores: &CpuStorage,
        _: &Layout,
        codes: &CpuStorage,
        _: &Layout,
        sums: &CpuStorage,
        _: &Layout,
    ) -> Result<(CpuStorage, Shape)> {
        let ([b, h, _], [.., head_dim]) = (self.plan.scores.dims, self.plan.sums.dims);
        let (out, lse) = cpu::run(self, scores, codes, sums)?;
        self.lse.put_cpu(CpuStorage::F32(lse), (b, h));
        Ok((CpuStorage::F32(out), (b, h, 1, head_dim).into()))
    }

    #[cfg(feature = "cuda")]
    fn cuda_fwd(
        &self,
        scores: &CudaStorage,
        _: &Layout,
        codes: &CudaStorage,
        _: &Layout,
        sums: &CudaStorage,
        _: &Layout,
    ) -> Result<(CudaStorage, Shape)> {
        if self.places.is_some() {
            bail!("{OP}: codes: expected them in one piece on a GPU, got pages");
        }
        let ([b, h, _], [.., head_dim]) = (self.plan.scores.dims, self.plan.sums.dims);
        let (out, lse) = cuda::run(&self.plan, &self.counts, &self.selected, [scores, codes, sums])?;
        self.lse.put_cuda(lse, (b, h));
        Ok((out, (b, h, 1, head_dim).into()))
    }
}
