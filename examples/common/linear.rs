//! Linear layers that decode at the speed of memory.

use candle_core::{CpuStorage, CustomOp2, Layout, Module, Result, Shape, Tensor, WithDType};
use half::slice::HalfFloatSliceExt;
use half::{bf16, f16};
use multiversion::multiversion;
use rayon::prelude::*;

/// [`candle_nn::Linear`] for weights that are stored in fewer bits than the layers compute in.
///
/// A single row, as in every decode step, reads them as they are and on all cores, as fast as memory gives them: Candle's
/// matrix product takes one core for it. Several rows widen the weights first, for which they pay little.
pub struct Linear {
    weight: Tensor, // [outputs, inputs]
    bias: Option<Tensor>,
}

impl Linear {
    /// `bias` is in the computing type.
    pub fn new(weight: Tensor, bias: Option<Tensor>) -> Self {
        Self { weight, bias }
    }
}

impl Module for Linear {
    fn forward(&self, x: &Tensor) -> Result<Tensor> {
        let one_row = x.elem_count() == self.weight.dim(1)?;
        if !one_row || !x.device().is_cpu() {
            let weight = self.weight.to_dtype(x.dtype())?;
            return candle_nn::Linear::new(weight, self.bias.clone()).forward(x);
        }
        let y = x.apply_op2_no_bwd(&self.weight, &OneRow)?;
        match &self.bias {
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
        let x = contiguous(x, x_l)?;
        let y = match w {
            CpuStorage::BF16(_) => products::<bf16>(x, contiguous(w, w_l)?),
            CpuStorage::F16(_) => products::<f16>(x, contiguous(w, w_l)?),
            _ => products::<f32>(x, contiguous(w, w_l)?),
        };
        let mut dims = x_l.dims().to_vec();
        if let Some(last) = dims.last_mut() {
            *last = y.len();
        }
        Ok((CpuStorage::F32(y), dims.into()))
    }
}

fn contiguous<'a, T: WithDType>(storage: &'a CpuStorage, layout: &Layout) -> Result<&'a [T]> {
    match layout.contiguous_offsets() {
        Some((start, end)) => Ok(&storage.as_slice()?[start..end]),
        None => candle_core::bail!("one-row-linear: expected contiguous tensors, got {layout:?}"),
    }
}

/// The product of `x` with each row of `weight`.
fn products<T: Element>(x: &[f32], weight: &[T]) -> Vec<f32> {
    let mut y = vec![0f32; weight.len() / x.len()];
    // Two tasks a core balance cores of unequal speed; fewer than 16 rows are not worth a task.
    let rows = y.len().div_ceil(2 * rayon::current_num_threads()).max(16);
    y.par_chunks_mut(rows).zip(weight.par_chunks(rows * x.len())).for_each(|(y, weight)| dot_each(x, weight, y));
    y
}

#[multiversion(targets = "simd")]
fn dot_each<T: Element>(x: &[f32], weight: &[T], y: &mut [f32]) {
    let mut buffer = vec![0f32; x.len()];
    for (y, row) in y.iter_mut().zip(weight.chunks_exact(x.len())) {
        *y = dot(x, T::widen(row, &mut buffer));
    }
}

/// Sums in 32 lanes: independent additions, which the compiler turns into vectors.
#[inline(always)]
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

/// A type that weights are stored in.
trait Element: WithDType {
    /// `row` in f32, in `buffer` unless it is so already.
    fn widen<'a>(row: &'a [Self], buffer: &'a mut [f32]) -> &'a [f32];
}

impl Element for f32 {
    #[inline(always)]
    fn widen<'a>(row: &'a [f32], _: &'a mut [f32]) -> &'a [f32] {
        row
    }
}

impl Element for bf16 {
    #[inline(always)]
    fn widen<'a>(row: &'a [bf16], buffer: &'a mut [f32]) -> &'a [f32] {
        // A shift, which vectorises; the conversion of `half` looks after the payload of NaN and does not.
        for (wide, narrow) in buffer.iter_mut().zip(row) {
            *wide = f32::from_bits(u32::from(narrow.to_bits()) << 16);
        }
        buffer
    }
}

impl Element for f16 {
    #[inline(always)]
    fn widen<'a>(row: &'a [f16], buffer: &'a mut [f32]) -> &'a [f32] {
        row.convert_to_f32_slice(buffer);
        buffer
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use candle_core::{DType, Device};

    #[test]
    fn one_row_equals_the_row_of_a_product() -> Result<()> {
        for dtype in [DType::F32, DType::BF16, DType::F16] {
            for (inputs, outputs) in [(1, 1), (7, 3), (32, 16), (100, 131)] {
                let weight = Tensor::randn(0f32, 1., (outputs, inputs), &Device::Cpu)?.to_dtype(dtype)?;
                let bias = Tensor::randn(0f32, 1., outputs, &Device::Cpu)?;
                let x = Tensor::randn(0f32, 1., (1, 2, inputs), &Device::Cpu)?;
                let linear = Linear::new(weight, Some(bias));
                let both = linear.forward(&x)?;
                for row in 0..2 {
                    let one = linear.forward(&x.narrow(1, row, 1)?)?;
                    assert_eq!(one.dims(), [1, 1, outputs]);
                    let off = (one - both.narrow(1, row, 1)?)?.abs()?.max_all()?.to_scalar::<f32>()?;
                    assert!(off < 1e-4, "{dtype:?}, {inputs} x {outputs}, row {row}: off by {off}");
                }
            }
        }
        Ok(())
    }
}
