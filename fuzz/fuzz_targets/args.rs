//! Tensors for arguments: as they are expected, or not quite.

use arbitrary::Arbitrary;
use candle_core::{DType, Device, Result, Tensor};

/// How one argument is made.
#[derive(Debug, Default, Arbitrary)]
pub struct Form {
    layout: Layout,
    /// Where they are not what is expected.
    dims: Option<Dims>,
    dtype: Option<u8>,
    /// Whether codes and positions may be of nothing.
    wild: bool,
    numbers: Vec<i8>,
}

#[derive(Debug, Default, Arbitrary)]
enum Layout {
    #[default]
    Plain,
    /// A part of a larger tensor, in each dimension.
    Narrowed,
    /// The last two dimensions lie the other way round.
    Swapped,
    /// The same all along the first dimension.
    Repeated,
}

#[derive(Debug, Arbitrary)]
enum Dims {
    One(u8, u8),
    Without(u8),
    /// Up to 5, below 12.
    Others(Vec<u8>),
}

const DTYPES: [DType; 6] = [DType::F32, DType::F16, DType::BF16, DType::U8, DType::U32, DType::F64];

/// Any number, not finite at the ends.
pub fn number(x: i8) -> f32 {
    match x {
        i8::MIN => f32::NAN,
        i8::MAX => f32::INFINITY,
        x => f32::from(x) / 8.,
    }
}

pub fn dtype(which: u8) -> DType {
    DTYPES[usize::from(which) % DTYPES.len()]
}

/// Arguments, one after the other.
pub struct Args<'a>(pub std::slice::Iter<'a, Form>);

impl Args<'_> {
    /// One that is expected to be of these dimensions and of a dtype of floats.
    pub fn floats(&mut self, dims: &[usize], dtype: DType) -> Result<Tensor> {
        self.tensor(dims, dtype, usize::MAX)
    }

    /// One of whole numbers that are expected to be `below`.
    pub fn below(&mut self, below: usize, dims: &[usize], dtype: DType) -> Result<Tensor> {
        self.tensor(dims, dtype, below)
    }

    fn tensor(&mut self, dims: &[usize], dtype: DType, below: usize) -> Result<Tensor> {
        let usual = Form::default();
        self.0.next().unwrap_or(&usual).tensor(dims, dtype, below)
    }
}

impl Form {
    fn tensor(&self, expected: &[usize], dtype: DType, below: usize) -> Result<Tensor> {
        let dims = self.dims(expected);
        let dtype = self.dtype.map_or(dtype, self::dtype);
        match self.layout {
            Layout::Narrowed => {
                let larger: Vec<_> = dims.iter().map(|dim| dim + 1).collect();
                let larger = self.plain(&larger, dtype, below)?;
                dims.iter().enumerate().try_fold(larger, |tensor, (dim, len)| tensor.narrow(dim, 1, *len))
            }
            Layout::Swapped if dims.len() > 1 => {
                let mut swapped = dims.clone();
                swapped.swap(dims.len() - 1, dims.len() - 2);
                self.plain(&swapped, dtype, below)?.t()
            }
            Layout::Repeated if dims.len() > 1 => self.plain(&dims[1..], dtype, below)?.broadcast_as(dims),
            _ => self.plain(&dims, dtype, below),
        }
    }

    fn dims(&self, expected: &[usize]) -> Vec<usize> {
        let mut dims = expected.to_vec();
        match &self.dims {
            None => {}
            Some(Dims::One(which, size)) => {
                let which = usize::from(*which) % dims.len();
                dims[which] = usize::from(size % 24);
            }
            Some(Dims::Without(which)) => drop(dims.remove(usize::from(*which) % expected.len())),
            Some(Dims::Others(others)) => dims = others.iter().take(5).map(|dim| usize::from(dim % 12)).collect(),
        }
        dims
    }

    fn plain(&self, dims: &[usize], dtype: DType, below: usize) -> Result<Tensor> {
        let count = dims.iter().product();
        let at = |i: usize| self.numbers.get(i % self.numbers.len().max(1)).copied().unwrap_or((i * 37) as i8);
        let whole = |i: usize| match self.wild {
            true => at(i) as u8 as usize,
            false => at(i) as u8 as usize % below.max(1),
        };
        let tensor = match dtype {
            DType::U8 => Tensor::from_vec((0..count).map(|i| whole(i) as u8).collect(), dims, &Device::Cpu),
            DType::U32 => Tensor::from_vec((0..count).map(|i| whole(i) as u32).collect(), dims, &Device::Cpu),
            _ => Tensor::from_vec((0..count).map(|i| number(at(i))).collect(), dims, &Device::Cpu),
        };
        tensor?.to_dtype(dtype)
    }
}
