//! Linear layers that decode at the speed of memory.

use candle_core::{CpuStorage, CustomOp2, Layout, Module, Result, Shape, Tensor};
use rayon::prelude::*;

/// [`candle_nn::Linear`], except that a single row, as in every decode step, runs on all cores: Candle's matrix product
/// takes one core for it, which cannot read the weights as fast as memory gives them.
pub struct Linear(candle_nn::Linear);

impl Linear {
    pub fn new(weight: Tensor, bias: Option<Tensor>) -> Self {
        Self(candle_nn::Linear::new(weight, bias))
    }
}

impl Module for Linear {
    fn forward(&self, x: &Tensor) -> Result<Tensor> {
        let weight = self.0.weight();
        let one_row = x.elem_count() == weight.dim(1)?;
        if !one_row || !x.device().is_cpu() {
            return self.0.forward(x);
        }
        let y = x.apply_op2_no_bwd(weight, &OneRow)?;
        match self.0.bias() {
            Some(bias) => y.broadcast_add(bias),
            None => Ok(y),
        }
    }
}

/// `x · weightᵀ` in f32, for an `x` of one row.
struct OneRow;

impl CustomOp2 for OneRow {
    fn name(&self) -> &'static str {
        "one-row-linear"
    }

    fn cpu_fwd(&self, x: &CpuStorage, x_l: &Layout, w: &CpuStorage, w_l: &Layout) -> Result<(CpuStorage, Shape)> {
        let (x, w) = (contiguous(x, x_l)?, contiguous(w, w_l)?);
        let mut dims = x_l.dims().to_vec();
        let rows = w_l.dims()[0];
        if let Some(last) = dims.last_mut() {
            *last = rows;
        }
        let mut y = vec![0f32; rows];
        // Two tasks a core balance cores of unequal speed; fewer than 16 rows are not worth a task.
        let chunk = rows.div_ceil(2 * rayon::current_num_threads()).max(16);
        y.par_chunks_mut(chunk).zip(w.par_chunks(chunk * x.len())).for_each(|(y, w)| {
            for (y, row) in y.iter_mut().zip(w.chunks_exact(x.len())) {
                *y = dot(x, row);
            }
        });
        Ok((CpuStorage::F32(y), dims.into()))
    }
}

fn contiguous<'a>(storage: &'a CpuStorage, layout: &Layout) -> Result<&'a [f32]> {
    match layout.contiguous_offsets() {
        Some((start, end)) => Ok(&storage.as_slice()?[start..end]),
        None => candle_core::bail!("one-row-linear: expected contiguous tensors, got {layout:?}"),
    }
}

/// Sums in 32 lanes: independent additions, which the compiler turns into vectors.
fn dot(x: &[f32], y: &[f32]) -> f32 {
    const LANES: usize = 32;
    let mut sums = [0f32; LANES];
    let (xs, ys) = (x.chunks_exact(LANES), y.chunks_exact(LANES));
    let rest: f32 = xs.remainder().iter().zip(ys.remainder()).map(|(x, y)| x * y).sum();
    for (x, y) in xs.zip(ys) {
        for (sum, (x, y)) in sums.iter_mut().zip(x.iter().zip(y)) {
            *sum += x * y;
        }
    }
    sums.iter().sum::<f32>() + rest
}

#[cfg(test)]
mod tests {
    use super::*;
    use candle_core::Device;

    #[test]
    fn one_row_equals_the_row_of_a_product() -> Result<()> {
        for (inputs, outputs) in [(1, 1), (7, 3), (32, 16), (100, 131)] {
            let weight = Tensor::randn(0f32, 1., (outputs, inputs), &Device::Cpu)?;
            let bias = Tensor::randn(0f32, 1., outputs, &Device::Cpu)?;
            let x = Tensor::randn(0f32, 1., (1, 2, inputs), &Device::Cpu)?;
            let linear = Linear::new(weight, Some(bias));
            let both = linear.forward(&x)?;
            for row in 0..2 {
                let one = linear.forward(&x.narrow(1, row, 1)?)?;
                assert_eq!(one.dims(), [1, 1, outputs]);
                let off = (one - both.narrow(1, row, 1)?)?.abs()?.max_all()?.to_scalar::<f32>()?;
                assert!(off < 1e-4, "{inputs} x {outputs}, row {row}: off by {off}");
            }
        }
        Ok(())
    }
}
