//! Linear layers that decode at the speed of memory.

use std::sync::Arc;

use candle_core::quantized::{QMatMul, QTensor};
use candle_core::{CpuStorage, CustomOp2, DType, Layout, Module, Result, Shape, Tensor, WithDType, D};
use half::slice::HalfFloatSliceExt;
use half::{bf16, f16};
use multiversion::multiversion;
use rayon::prelude::*;

/// A matrix of weights, `[outputs, inputs]`.
#[derive(Debug, Clone)]
pub enum Matrix {
    Plain(Tensor),
    /// As a GGUF file has it, in a few bits a number.
    Quantized(Arc<QTensor>),
}

impl Matrix {
    /// The rows of a vocabulary's `tokens`, in the type that they are stored in, or else in f32.
    pub fn embed(&self, tokens: &Tensor) -> Result<Tensor> {
        match self {
            Self::Plain(rows) => {
                let dims = [tokens.dims(), &rows.dims()[1..]].concat();
                rows.embedding(&tokens.flatten_all()?)?.reshape(dims)
            }
            Self::Quantized(rows) => rows.embedding(tokens),
        }
    }

    /// `x · selfᵀ`, in the type of `x`.
    ///
    /// A few rows, as in every decode step, read the weights as they are and on all cores, as fast as memory gives them:
    /// Candle's matrix product takes one core for a row. Many widen them first, for which they pay little.
    fn times(&self, x: &Tensor) -> Result<Tensor> {
        // Up to here the products are faster one by one than by Candle's, or than widening a quantised matrix.
        const FEW: usize = 8;
        let rows = x.elem_count() / x.dim(D::Minus1)?.max(1);
        let is_cpu = x.device().is_cpu();
        let product = |weight: Tensor| candle_nn::Linear::new(weight, None).forward(x);
        match self {
            Self::Plain(weight) if rows <= FEW && is_cpu => x.contiguous()?.apply_op2_no_bwd(weight, &FewRows),
            Self::Plain(weight) => product(weight.to_dtype(x.dtype())?),
            Self::Quantized(weight) if rows > FEW && is_cpu => product(weight.dequantize(x.device())?),
            Self::Quantized(weight) => {
                let x32 = x.to_dtype(DType::F32)?.contiguous()?;
                QMatMul::from_arc(weight.clone())?.forward(&x32)?.to_dtype(x.dtype())
            }
        }
    }
}

/// [`candle_nn::Linear`] for weights that are stored in fewer bits than the layers compute in.
pub struct Linear {
    /// One below the other.
    parts: Vec<Matrix>,
    bias: Option<Tensor>,
}

impl Linear {
    /// One layer for projections of the same input: few large products are faster than many small ones. `bias` is in the
    /// computing type.
    pub fn new(parts: Vec<Matrix>, bias: Option<Tensor>) -> Result<Self> {
        let plain = parts.iter().map(|part| match part {
            Matrix::Plain(weight) => Some(weight),
            Matrix::Quantized(_) => None,
        });
        let parts = match plain.collect::<Option<Vec<_>>>() {
            Some(weights) => vec![Matrix::Plain(Tensor::cat(&weights, 0)?)],
            None => parts,
        };
        Ok(Self { parts, bias })
    }
}

impl Module for Linear {
    fn forward(&self, x: &Tensor) -> Result<Tensor> {
        let parts = self.parts.iter().map(|part| part.times(x)).collect::<Result<Vec<_>>>()?;
        let y = match <[Tensor; 1]>::try_from(parts) {
            Ok([y]) => y,
            Err(parts) => Tensor::cat(&parts, D::Minus1)?,
        };
        match &self.bias {
            Some(bias) => y.broadcast_add(bias),
            None => Ok(y),
        }
    }
}

/// `x · weightᵀ` in f32, for an `x` of few rows, of which each gets the bits that it gets alone.
struct FewRows;

impl CustomOp2 for FewRows {
    fn name(&self) -> &'static str {
        "few-rows-linear"
    }

    fn cpu_fwd(&self, x: &CpuStorage, x_l: &Layout, w: &CpuStorage, w_l: &Layout) -> Result<(CpuStorage, Shape)> {
        let (x, (outputs, inputs)) = (contiguous(x, x_l)?, w_l.shape().dims2()?);
        let y = match w {
            CpuStorage::BF16(_) => products::<bf16>(x, contiguous(w, w_l)?, inputs),
            CpuStorage::F16(_) => products::<f16>(x, contiguous(w, w_l)?, inputs),
            _ => products::<f32>(x, contiguous(w, w_l)?, inputs),
        };
        let mut dims = x_l.dims().to_vec();
        if let Some(last) = dims.last_mut() {
            *last = outputs;
        }
        Ok((CpuStorage::F32(y), dims.into()))
    }
}

fn contiguous<'a, T: WithDType>(storage: &'a CpuStorage, layout: &Layout) -> Result<&'a [T]> {
    match layout.contiguous_offsets() {
        Some((start, end)) => Ok(&storage.as_slice()?[start..end]),
        None => candle_core::bail!("few-rows-linear: expected contiguous tensors, got {layout:?}"),
    }
}

/// The products of the rows of `x` with those of `weight`, a row of them for each of `x`.
fn products<T: Element>(x: &[f32], weight: &[T], inputs: usize) -> Vec<f32> {
    let (rows, outputs) = (x.len() / inputs, weight.len() / inputs);
    let mut by_output = vec![0f32; outputs * rows];
    // Two tasks a core balance cores of unequal speed; fewer than 16 rows of weights are not worth a task.
    let chunk = outputs.div_ceil(2 * rayon::current_num_threads()).max(16);
    let tasks = by_output.par_chunks_mut(chunk * rows).zip(weight.par_chunks(chunk * inputs));
    tasks.for_each(|(y, weight)| dot_each(x, weight, inputs, y));
    match rows {
        1 => by_output,
        _ => (0..rows).flat_map(|row| by_output.iter().skip(row).step_by(rows)).copied().collect(),
    }
}

#[multiversion(targets = "simd")]
fn dot_each<T: Element>(x: &[f32], weight: &[T], inputs: usize, y: &mut [f32]) {
    let mut buffer = vec![0f32; inputs];
    for (y, weight) in y.chunks_exact_mut(x.len() / inputs).zip(weight.chunks_exact(inputs)) {
        let weight = T::widen(weight, &mut buffer);
        for (y, x) in y.iter_mut().zip(x.chunks_exact(inputs)) {
            *y = dot(x, weight);
        }
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
    use candle_core::quantized::GgmlDType;
    use candle_core::Device;

    /// By one product and by Candle's, and the same bits beside other rows.
    #[test]
    fn few_rows_equal_those_of_a_product() -> Result<()> {
        for dtype in [DType::F32, DType::BF16, DType::F16] {
            for (inputs, outputs) in [(1, 1), (7, 3), (32, 16), (100, 131)] {
                let weight = Tensor::randn(0f32, 1., (outputs, inputs), &Device::Cpu)?.to_dtype(dtype)?;
                let bias = Tensor::randn(0f32, 1., outputs, &Device::Cpu)?;
                let x = Tensor::randn(0f32, 1., (1, 20, inputs), &Device::Cpu)?;
                let linear = Linear::new(vec![Matrix::Plain(weight)], Some(bias))?;
                let (all, eight) = (linear.forward(&x)?, linear.forward(&x.narrow(1, 0, 8)?)?);
                assert_eq!(eight.dims(), [1, 8, outputs]);
                for row in 0..8 {
                    let one = linear.forward(&x.narrow(1, row, 1)?)?;
                    assert_eq!(one.dims(), [1, 1, outputs]);
                    let numbers = |y: &Tensor| y.flatten_all()?.to_vec1::<f32>();
                    assert_eq!(numbers(&one)?, numbers(&eight.narrow(1, row, 1)?)?);
                    let off = (one - all.narrow(1, row, 1)?)?.abs()?.max_all()?.to_scalar::<f32>()?;
                    assert!(off < 1e-4, "{dtype:?}, {inputs} x {outputs}, row {row}: off by {off}");
                }
            }
        }
        Ok(())
    }

    /// Parts of different types, as files of mixed bits have them, against the matrix that they stand for.
    #[test]
    fn quantized_parts_equal_what_they_stand_for() -> Result<()> {
        let parts = [(GgmlDType::Q8_0, 24), (GgmlDType::Q4_1, 40), (GgmlDType::F32, 8)].map(|(dtype, outputs)| {
            let weight = Tensor::randn(0f32, 1., (outputs, 64), &Device::Cpu)?;
            QTensor::quantize(&weight, dtype)
        });
        let parts = parts.into_iter().collect::<Result<Vec<_>>>()?;
        let plain = parts.iter().map(|part| part.dequantize(&Device::Cpu)).collect::<Result<Vec<_>>>()?;
        let weight = Tensor::cat(&plain, 0)?;
        let linear = Linear::new(parts.into_iter().map(|part| Matrix::Quantized(part.into())).collect(), None)?;
        for rows in [1, 3, 50] {
            let x = Tensor::randn(0f32, 1., (1, rows, 64), &Device::Cpu)?;
            let (got, want) = (linear.forward(&x)?, x.broadcast_matmul(&weight.t()?)?);
            assert_eq!(got.dims(), want.dims());
            let norm = |x: Tensor| x.sqr()?.sum_all()?.sqrt()?.to_scalar::<f32>();
            let error = norm((got - &want)?)? / norm(want)?;
            // Few rows are rounded to 8 bits.
            assert!(error < if rows > 8 { 1e-6 } else { 2e-2 }, "{rows} rows: off by {error}");
        }
        let rows = Matrix::Quantized(QTensor::quantize(&weight, GgmlDType::Q8_0)?.into());
        let tokens = Tensor::new(&[[3u32, 71, 3]], &Device::Cpu)?;
        let off = (rows.embed(&tokens)? - Matrix::Plain(weight).embed(&tokens)?)?.abs()?.max_all()?;
        assert!(off.to_scalar::<f32>()? < 0.03);
        Ok(())
    }
}
