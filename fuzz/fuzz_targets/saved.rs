//! The parts of a file of caches, to be changed one by one.

use std::path::Path;
use std::sync::OnceLock;

use arbitrary::Arbitrary;
use candle_core::{DType, Device, Tensor};
use candle_pq_attn::{save_caches, Heavy, PqAttention, PqConfig};
use safetensors::tensor::Metadata;
use serde_json::Value;
use tempfile::NamedTempFile;
use xxhash_rust::xxh3::xxh3_128;

/// The most bytes of data that new shapes make: what a file of any size may hold is not what is looked for.
const MOST: usize = 1 << 16;

#[derive(Debug, Arbitrary)]
pub enum Change {
    Header(Edit),
    Data(Edit),
    /// A number of the header, any of JSON's.
    Number(u8, Number),
    /// What the file says that its header's length is.
    HeaderLen(u64),
}

#[derive(Debug, Arbitrary)]
pub enum Edit {
    Set(u16, u8),
    Insert(u16, Vec<u8>),
    Remove(u16, u8),
    /// A part of it once more, elsewhere.
    Repeat {
        from: u16,
        len: u8,
        to: u16,
    },
    Cut(u16),
}

#[derive(Debug, Arbitrary)]
pub enum Number {
    Small(u8),
    Any(u64),
    Below(i8),
    Real(f32),
}

#[derive(Debug, Clone)]
pub struct File {
    header_len: Option<u64>,
    header: Vec<u8>,
    data: Vec<u8>,
}

/// Where it is written, each time.
pub fn path() -> &'static Path {
    static FILE: OnceLock<NamedTempFile> = OnceLock::new();
    FILE.get_or_init(|| NamedTempFile::new().unwrap()).path()
}

impl File {
    /// One that has everything.
    pub fn of_a_small_cache() -> Self {
        static FILE: OnceLock<File> = OnceLock::new();
        FILE.get_or_init(|| {
            let (window, heavy) = (2, Heavy::Keys(2));
            let config = PqConfig { sink: 2, window, heavy, pq_dim: 4, pq_bits: 1, coarse: 2, ..PqConfig::default() };
            let attn = PqAttention::new(config, 0.25).unwrap();
            let mut cache = attn.new_cache([1, 1, 4], 0, DType::F32, &Device::Cpu).unwrap();
            // The same in each run, so that an input which was kept means the same.
            let tensor = |heads: usize| {
                let numbers = (0..heads * 80).map(|i| (i as f32 * 12.9898).sin()).collect();
                Tensor::from_vec(numbers, (1, heads, 20, 4), &Device::Cpu).unwrap()
            };
            attn.forward(&tensor(2), &tensor(1), &tensor(1), &mut cache).unwrap();
            cache.build_index().unwrap();
            save_caches(path(), [&cache], "about").unwrap();
            let bytes = std::fs::read(path()).unwrap();
            let (len, rest) = bytes.split_first_chunk().unwrap();
            let (header, data) = rest.split_at(u64::from_le_bytes(*len) as usize);
            Self { header_len: None, header: header.to_vec(), data: data.to_vec() }
        })
        .clone()
    }

    pub fn bytes(&self) -> Vec<u8> {
        let len = self.header_len.unwrap_or(self.header.len() as u64);
        [&len.to_le_bytes(), &self.header[..], &self.data].concat()
    }

    pub fn change(&mut self, change: &Change) {
        match change {
            Change::Header(edit) => edit.apply(&mut self.header),
            Change::Data(edit) => edit.apply(&mut self.data),
            Change::Number(which, number) => self.replace_number(usize::from(*which), number),
            Change::HeaderLen(len) => self.header_len = Some(*len),
        }
    }

    fn replace_number(&mut self, which: usize, number: &Number) {
        let is_digit = |at: usize| self.header.get(at).is_some_and(u8::is_ascii_digit);
        let starts: Vec<_> =
            (0..self.header.len()).filter(|at| is_digit(*at) && !is_digit(at.wrapping_sub(1))).collect();
        let Some(start) = starts.get(which % starts.len().max(1)).copied() else { return };
        let end = (start..).find(|at| !is_digit(*at)).unwrap();
        let number = match number {
            Number::Small(number) => number.to_string(),
            Number::Any(number) => number.to_string(),
            Number::Below(number) => number.to_string(),
            Number::Real(number) => number.to_string(),
        };
        self.header.splice(start..end, number.into_bytes());
    }

    /// Has each tensor take the bytes that its shape wants, if the header can be read.
    pub fn lay_out(&mut self) -> Option<()> {
        let mut header: Value = serde_json::from_slice(&self.header).ok()?;
        let tensors = header.as_object_mut()?.iter_mut().filter(|(name, _)| *name != "__metadata__");
        let offset = |tensor: &Value, which: usize| Some(tensor.get("data_offsets")?.get(which)?.as_u64()? as usize);
        let mut tensors: Vec<_> =
            tensors.map(|(_, tensor)| Some((offset(tensor, 0)?, offset(tensor, 1)?, tensor))).collect::<Option<_>>()?;
        tensors.sort_by_key(|(begin, end, _)| (*begin, *end));
        let mut data = Vec::new();
        for (begin, end, tensor) in tensors {
            let element: usize = match tensor.get("dtype")?.as_str()? {
                "F64" | "I64" | "U64" => 8,
                "F32" | "I32" | "U32" => 4,
                "F16" | "BF16" => 2,
                _ => 1,
            };
            let mut dims = tensor.get("shape")?.as_array()?.iter();
            let len = dims.try_fold(element, |len, dim| len.checked_mul(usize::try_from(dim.as_u64()?).ok()?))?;
            let start = data.len();
            if len > MOST - start {
                return None;
            }
            data.extend(self.data.get(begin..end).unwrap_or_default().iter().take(len));
            data.resize(start + len, 0);
            *tensor.get_mut("data_offsets")? = vec![start, start + len].into();
        }
        (self.header, self.data) = (serde_json::to_vec(&header).ok()?, data);
        Some(())
    }

    /// Puts the checksums at the end that it should have, if the header can be read.
    pub fn sign(&mut self) -> Option<()> {
        let header: Metadata = serde_json::from_slice(&self.header).ok()?;
        let mut names = header.offset_keys();
        names.pop();
        let of_tensor = |name: &String| {
            let (begin, end) = header.info(name)?.data_offsets;
            self.data.get(begin..end)
        };
        let tensors: Vec<_> = names.iter().map(of_tensor).collect::<Option<_>>()?;
        let parts = [&self.header[..]].into_iter().chain(tensors);
        let sums: Vec<u8> = parts.flat_map(|part| xxh3_128(part).to_le_bytes()).collect();
        let end = self.data.len().checked_sub(sums.len())?;
        self.data.splice(end.., sums);
        Some(())
    }
}

impl Edit {
    fn apply(&self, bytes: &mut Vec<u8>) {
        let len = bytes.len();
        let at = |at: &u16| usize::from(*at) % (len + 1);
        let range = |from: &u16, count: &u8| at(from)..len.min(at(from) + usize::from(*count));
        match self {
            Self::Set(to, byte) => bytes.iter_mut().skip(at(to)).take(1).for_each(|to| *to = *byte),
            Self::Insert(to, new) => drop(bytes.splice(at(to)..at(to), new.iter().copied())),
            Self::Remove(from, count) => drop(bytes.drain(range(from, count))),
            Self::Repeat { from, len, to } => {
                let part = bytes[range(from, len)].to_vec();
                bytes.splice(at(to)..at(to), part);
            }
            Self::Cut(to) => bytes.truncate(at(to)),
        }
    }
}
