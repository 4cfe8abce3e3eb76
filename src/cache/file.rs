//! Caches in a file: a document is read once and asked again on another day.
//!
//! A safetensors file with the tensors of each layer, `0.keys`, `0.values` and so on, as far as they are in use; two entries
//! of metadata: `caches`, this format and what is no tensor as JSON, and `about`, the caller's; and at the end a tensor
//! `xxh3`, `[1 + tensors, 16]` u8: the 128-bit XXH3 of the header and of each other tensor, in the order of the file, so that
//! all of it is written, and read, once. Sums of values are not in it: they are those of the codes, and adding them up costs
//! next to nothing.

use std::collections::HashMap;
use std::fs::File;
use std::io::{Read, Seek, SeekFrom, Write};
use std::path::Path;
use std::sync::{Mutex, PoisonError};

use candle_core::backend::BackendStorage;
use candle_core::{bail, CpuStorage, DType, Device, InplaceOp1, Layout, Result, Tensor};
use rayon::prelude::*;
use safetensors::tensor::{Dtype, Metadata, TensorInfo, View};
use serde::{Deserialize, Serialize};
use tempfile::NamedTempFile;
use xxhash_rust::xxh3::{xxh3_128, Xxh3};

use super::PqKvCache;
use crate::codebook::{at_path, check_shape, Codebook};
use crate::config::PqConfig;

/// Raised by what an older version would read wrongly.
const FORMAT: u32 = 3;

/// The most bytes of a header, as the format of safetensors has it.
const MAX_HEADER: usize = 100_000_000;

/// Bytes that are read or written at a time: few enough to stay in the processor's cache until all is done with them, and to
/// need no memory that is fresh, which costs more than anything else.
const BLOCK: usize = 1 << 19;

/// The name of the checksums.
const SUMS: &str = "xxh3";

/// Bytes of a checksum.
const SUM: usize = 16;

/// What [`load_caches`] found.
#[derive(Debug)]
pub struct SavedCaches {
    /// In the order in which they were saved.
    pub caches: Vec<PqKvCache>,
    /// What was said of them.
    pub about: String,
}

#[derive(Serialize, Deserialize)]
struct Saved {
    format: u32,
    layers: Vec<Layer>,
}

/// What a cache is beside its tensors.
#[derive(Serialize, Deserialize)]
struct Layer {
    config: PqConfig,
    /// `[b, h_kv, head_dim]`
    dims: [usize; 3],
    dtype: String,
    len: usize,
    /// Of each piece of the sample of queries.
    queries: Vec<usize>,
    trained: Option<Trained>,
}

#[derive(Serialize, Deserialize)]
struct Trained {
    end: Option<usize>,
    encoded: usize,
}

/// Writes caches, those of a model's layers say, to one file, from which [`load_caches`] makes caches that go on as these
/// do, bit for bit. `about` is given back with them: what they are of.
///
/// The file takes the place of another only when it is complete. Little more than the caches is in memory at any time.
///
/// # Errors
/// What reading tensors back and writing the file give, or a capture of a CUDA graph that is under way.
///
/// ```
/// use candle_core::{DType, Device, Tensor};
/// use candle_pq_attn::{load_caches, save_caches, PqConfig, PqKvCache};
///
/// let mut cache = PqKvCache::new(PqConfig::default(), [1, 2, 64], 0, DType::F32, &Device::Cpu)?;
/// let kv = Tensor::randn(0f32, 1., (1, 2, 700, 64), &Device::Cpu)?;
/// cache.append(&kv, &kv)?;
/// let path = std::env::temp_dir().join(format!("caches-of-an-example-{}", std::process::id()));
/// save_caches(&path, [&cache], "a document")?;
/// let saved = load_caches(&path, 1024, &Device::Cpu)?; // with room to go on
/// assert_eq!((saved.about.as_str(), saved.caches[0].len()), ("a document", 700));
/// # std::fs::remove_file(&path)?;
/// # candle_core::Result::Ok(())
/// ```
pub fn save_caches<'a>(
    path: impl AsRef<Path>,
    caches: impl IntoIterator<Item = &'a PqKvCache>,
    about: &str,
) -> Result<()> {
    let (mut layers, mut tensors) = (Vec::new(), Vec::new());
    for (index, cache) in caches.into_iter().enumerate() {
        cache.forbid_capture("save", "save")?;
        layers.push(Layer::of(cache));
        tensors.extend(cache.tensors()?.into_iter().map(|(name, tensor)| (format!("{index}.{name}"), tensor)));
    }
    let caches = serde_json::to_string(&Saved { format: FORMAT, layers }).map_err(candle_core::Error::wrap)?;
    let path = path.as_ref();
    write(path, caches, about, tensors).map_err(|error| at_path("save_caches", path, error))
}

/// Writes the file, with `caches` and `about` for its metadata.
fn write(path: &Path, caches: String, about: &str, mut tensors: Vec<(String, Tensor)>) -> Result<()> {
    // Large elements first, so that all lie at multiples of their size.
    let size = |tensor: &Tensor| tensor.dtype().size_in_bytes();
    tensors.sort_by(|(a, x), (b, y)| (size(y), a).cmp(&(size(x), b)));
    let mut end = 0;
    let mut info = |name: &str, dtype: Dtype, shape: &[usize], bytes: usize| {
        let begin = end;
        end += bytes;
        (name.to_string(), TensorInfo { dtype, shape: shape.to_vec(), data_offsets: (begin, end) })
    };
    let mut infos: Vec<_> = tensors
        .iter()
        .map(|(name, tensor)| info(name, tensor.dtype().into(), tensor.dims(), tensor.data_len()))
        .collect();
    let sums = 1 + tensors.len();
    infos.push(info(SUMS, Dtype::U8, &[sums, SUM], sums * SUM));
    let metadata = HashMap::from([("caches".to_string(), caches), ("about".to_string(), about.to_string())]);
    let mut header = serde_json::to_vec(&Metadata::new(Some(metadata), infos)?).map_err(candle_core::Error::wrap)?;
    header.resize(header.len().next_multiple_of(8), b' ');
    if header.len() > MAX_HEADER {
        bail!("about: expected a header of at most {MAX_HEADER} bytes with it, got {}", header.len());
    }
    let mut file = NamedTempFile::new_in(path.parent().unwrap_or(Path::new(".")))?;
    file.write_all(&(header.len() as u64).to_le_bytes())?;
    file.write_all(&header)?;
    let mut sums = xxh3_128(&header).to_le_bytes().to_vec();
    for (_, tensor) in &tensors {
        let mut sum = Xxh3::new();
        for_each_block(tensor, &mut |block| {
            let bytes = block.data();
            sum.update(&bytes);
            Ok(file.write_all(&bytes)?)
        })?;
        sums.extend(sum.digest128().to_le_bytes());
    }
    file.write_all(&sums)?;
    match file.persist(path) {
        Ok(_) => Ok(()),
        Err(error) => Err(error.error.into()),
    }
}

/// The parts of a tensor one after the other, without gaps and of at most [`BLOCK`] bytes each.
fn for_each_block(tensor: &Tensor, run: &mut impl FnMut(&Tensor) -> Result<()>) -> Result<()> {
    let count = match *tensor.dims() {
        // Dimensions beside an empty one may be of any size.
        _ if tensor.elem_count() == 0 => return Ok(()),
        [count, ..] => count,
        [] => return run(tensor),
    };
    let row = tensor.data_len() / count;
    match tensor.is_contiguous() && row <= BLOCK {
        true => {
            let rows = BLOCK / row;
            (0..count).step_by(rows).try_for_each(|start| run(&tensor.narrow(0, start, rows.min(count - start))?))
        }
        // Not `get`, which copies.
        false => (0..count).try_for_each(|index| for_each_block(&tensor.get_on_dim(0, index)?, run)),
    }
}

/// Reads what [`save_caches`] wrote, into caches with room for `capacity` keys, or for those that they have.
///
/// # Errors
/// A file that cannot be read, that is no such file or of another version, that was cut off or changed; or what the device
/// gives. Nothing is allocated that the file has no bytes for.
pub fn load_caches(path: impl AsRef<Path>, capacity: usize, device: &Device) -> Result<SavedCaches> {
    let path = path.as_ref();
    let load = || -> Result<SavedCaches> {
        let mut file = SavedFile::open(path)?;
        let (caches, about) = (file.metadata("caches")?, file.metadata("about")?);
        let saved: Saved = match serde_json::from_str(&caches) {
            Ok(saved) => saved,
            Err(error) => bail!("expected caches of format {FORMAT}, got others: {error}"),
        };
        if saved.format != FORMAT {
            bail!("expected caches of format {FORMAT}, got format {}", saved.format);
        }
        file.read_sums()?;
        let load = |(index, layer): (usize, &Layer)| layer.load(&mut file.reader(path)?, index, capacity, device);
        let layers = &saved.layers;
        // Layer by layer on a GPU, whose stream may be this thread's own.
        let caches: Vec<_> = match device.is_cpu() {
            true => layers.par_iter().enumerate().map(load).collect(),
            false => layers.iter().enumerate().map(load).collect(),
        };
        Ok(SavedCaches { caches: caches.into_iter().collect::<Result<_>>()?, about })
    };
    load().map_err(|error| at_path("load_caches", path, error))
}

/// A safetensors file.
struct SavedFile {
    file: File,
    header: Metadata,
    header_sum: [u8; SUM],
    /// Where the tensors begin.
    start: u64,
    /// Of each tensor, by its name.
    sums: HashMap<String, [u8; SUM]>,
}

/// Reads it tensor by tensor, beside others that do.
struct Reader<'a> {
    of: &'a SavedFile,
    file: File,
    /// On its way to a GPU.
    block: Vec<u8>,
}

impl SavedFile {
    fn open(path: &Path) -> Result<Self> {
        const FOREIGN: &str = "expected a file of save_caches, got another";
        let mut file = File::open(path)?;
        let size = file.metadata()?.len();
        let mut len = [0; 8];
        if size < 8 {
            bail!("{FOREIGN}: {size} bytes");
        }
        file.read_exact(&mut len)?;
        let len = u64::from_le_bytes(len);
        if len > MAX_HEADER as u64 || len > size - 8 {
            bail!("{FOREIGN}, or one that was cut off: {size} bytes, with a header of {len}");
        }
        let mut header = vec![0; usize::try_from(len)?];
        file.read_exact(&mut header)?;
        let header_sum = xxh3_128(&header).to_le_bytes();
        let header: Metadata = match serde_json::from_slice(&header) {
            Ok(header) => header,
            Err(error) => bail!("{FOREIGN}: {error}"),
        };
        let (start, expected) = (8 + len, header.data_len() as u64);
        if size - start != expected {
            bail!("expected {expected} bytes of tensors, got {}: the file was cut off or changed", size - start);
        }
        Ok(Self { file, header, header_sum, start, sums: HashMap::new() })
    }

    /// Reads the checksums, and finds the header to be what was saved.
    fn read_sums(&mut self) -> Result<()> {
        let names = self.header.offset_keys();
        let expected = (Dtype::U8, vec![names.len(), SUM]);
        let info = self.header.info(SUMS).filter(|info| (info.dtype, &info.shape) == (expected.0, &expected.1));
        let (Some(info), true) = (info, names.last().is_some_and(|name| name == SUMS)) else {
            bail!("expected a tensor {SUMS:?} of {:?} at the end, found none", expected.1);
        };
        let mut sums = vec![0; names.len() * SUM];
        self.file.seek(SeekFrom::Start(self.start + info.data_offsets.0 as u64))?;
        self.file.read_exact(&mut sums)?;
        let (sums, _) = sums.as_chunks::<SUM>();
        if sums[0] != self.header_sum {
            bail!("expected the header that was saved, got another: the checksum differs");
        }
        self.sums = names.into_iter().zip(sums[1..].iter().copied()).collect();
        Ok(())
    }

    fn metadata(&self, name: &str) -> Result<String> {
        match self.header.metadata().as_ref().and_then(|metadata| metadata.get(name)) {
            Some(text) => Ok(text.clone()),
            None => bail!("expected a file of save_caches, with {name:?} in its metadata; got another"),
        }
    }

    /// The shape of a tensor of that dtype, if there is one of that name.
    fn shape(&self, name: &str, dtype: DType) -> Result<Option<&[usize]>> {
        let Some(info) = self.header.info(name) else { return Ok(None) };
        check_shape(name, &info.shape)?;
        if DType::try_from(info.dtype).ok() != Some(dtype) {
            bail!("{name}: expected dtype {}, got {:?}", dtype.as_str(), info.dtype);
        }
        Ok(Some(&info.shape))
    }

    /// Fails unless there is a tensor of that name, dtype and shape.
    fn expect(&self, name: &str, dtype: DType, dims: &[usize]) -> Result<()> {
        match self.shape(name, dtype)? {
            Some(shape) if shape == dims => Ok(()),
            Some(shape) => bail!("{name}: expected shape {dims:?}, got {shape:?}"),
            None => bail!("expected a tensor {name:?}, found none"),
        }
    }

    /// One that reads from `path`, where this file is.
    fn reader(&self, path: &Path) -> Result<Reader<'_>> {
        Ok(Reader { of: self, file: File::open(path)?, block: Vec::new() })
    }
}

impl Reader<'_> {
    /// Reads a tensor into `to`, which has its shape. It is to be used only if this succeeds.
    fn read_into(&mut self, name: &str, to: &Tensor) -> Result<()> {
        let Self { of, file, block } = self;
        of.expect(name, to.dtype(), to.dims())?;
        let begin = of.header.info(name).map_or(0, |info| info.data_offsets.0);
        file.seek(SeekFrom::Start(of.start + begin as u64))?;
        let mut sum = Xxh3::new();
        for_each_block(to, &mut |to| {
            if to.device().is_cpu() {
                return to.inplace_op1(&ReadBlock(Mutex::new((&mut *file, &mut sum))));
            }
            block.resize(to.data_len(), 0);
            let bytes = &mut block[..];
            file.read_exact(bytes)?;
            sum.update(bytes);
            to.slice_set(&Tensor::from_raw_buffer(bytes, to.dtype(), to.dims(), to.device())?, 0, 0)
        })?;
        if of.sums.get(name) != Some(&sum.digest128().to_le_bytes()) {
            bail!("{name}: expected the bytes that were saved, got others: the checksum differs");
        }
        Ok(())
    }

    /// A tensor of that dtype, if there is one of that name.
    fn tensor(&mut self, name: &str, dtype: DType, device: &Device) -> Result<Option<Tensor>> {
        let Some(shape) = self.of.shape(name, dtype)? else { return Ok(None) };
        let tensor = Tensor::zeros(shape, dtype, device)?;
        self.read_into(name, &tensor)?;
        Ok(Some(tensor))
    }
}

/// Reads a block into the memory of a tensor on the CPU, and adds it to a checksum.
struct ReadBlock<'a>(Mutex<(&'a mut File, &'a mut Xxh3)>);

impl InplaceOp1 for ReadBlock<'_> {
    fn name(&self) -> &'static str {
        "load_caches"
    }

    fn cpu_fwd(&self, to: &mut CpuStorage, layout: &Layout) -> Result<()> {
        let Some((start, end)) = layout.contiguous_offsets() else { bail!("expected a block without gaps") };
        let bytes = match to {
            CpuStorage::F32(to) => bytemuck::must_cast_slice_mut(&mut to[start..end]),
            CpuStorage::F16(to) => bytemuck::must_cast_slice_mut(&mut to[start..end]),
            CpuStorage::BF16(to) => bytemuck::must_cast_slice_mut(&mut to[start..end]),
            CpuStorage::U8(to) => &mut to[start..end],
            _ => bail!("expected f32, f16, bf16 or u8, got {:?}", to.dtype()),
        };
        let (file, sum) = &mut *self.0.lock().unwrap_or_else(PoisonError::into_inner);
        file.read_exact(bytes)?;
        sum.update(bytes);
        Ok(())
    }
}

impl Layer {
    fn of(cache: &PqKvCache) -> Self {
        let trained = cache.trained.as_ref().map(|trained| Trained { end: trained.end, encoded: cache.encoded });
        Self {
            config: cache.config.clone(),
            dims: cache.dims(),
            dtype: cache.dtype().as_str().to_string(),
            len: cache.len,
            queries: cache.queries.pieces().map(|(first, _)| first).collect(),
            trained,
        }
    }

    /// The cache that this and its tensors are of. All that the file says is checked against the rest of it: a checksum keeps
    /// out accidents, not intent.
    fn load(&self, file: &mut Reader, index: usize, capacity: usize, device: &Device) -> Result<PqKvCache> {
        let ([b, h_kv, head_dim], len) = (self.dims, self.len);
        let name = |name: &str| format!("{index}.{name}");
        let dtype: DType = match self.dtype.parse() {
            Ok(dtype) => dtype,
            Err(_) => bail!("{index}.dtype: expected f32, f16 or bf16, got {:?}", self.dtype),
        };
        // Before room is made for them.
        for part in ["keys", "values"] {
            file.of.expect(&name(part), dtype, &[b, h_kv, len, head_dim])?;
        }
        // A file without keys has no bytes that its heads were counted by.
        let capacity = if len == 0 { 0 } else { capacity.max(len) };
        let mut cache = PqKvCache::new(self.config.clone(), self.dims, capacity, dtype, device)?;
        cache.set_len(len)?;
        file.read_into(&name("keys"), &cache.keys()?)?;
        file.read_into(&name("values"), &cache.values()?)?;
        for &first in &self.queries {
            match file.tensor(&name(&format!("queries.{first}")), DType::F32, device)? {
                Some(squares) => cache.queries.push(first, squares, self.dims, len)?,
                None => bail!("expected a tensor \"{index}.queries.{first}\", found none"),
            }
        }
        let Some(Trained { end, encoded }) = self.trained else { return Ok(cache) };
        let (start, block) = (cache.config.init_offset(), cache.block());
        let trained_from = start.saturating_add(cache.config.min_train_keys());
        if end.is_some_and(|end| !(trained_from..=len).contains(&end)) {
            bail!("{index}.end: expected {trained_from} to {len}, got {end:?}");
        }
        if !(start..=cache.blocks_end(len)).contains(&encoded) || !(encoded - start).is_multiple_of(block) {
            bail!("{index}.encoded: expected {start} and blocks of {block} up to {len}, got {encoded}");
        }
        let codebook = Codebook::from_tensors(|part| file.tensor(&name(part), DType::F32, device))?;
        cache.check_codebook(&codebook)?;
        cache.use_codebook(codebook, end)?;
        if encoded > start {
            file.read_into(&name("codes"), &cache.codes.narrow(2, start, encoded - start)?)?;
            if let Some(codes) = &cache.coarse_codes {
                file.read_into(&name("coarse_codes"), &codes.narrow(2, start, encoded - start)?)?;
            }
            cache.encoded = encoded;
        }
        // Those of these codes, if there are more keys to encode.
        cache.sum_values(encoded)?;
        Ok(cache)
    }
}

impl PqKvCache {
    /// All of it that is in use, but the sums.
    pub(super) fn tensors(&self) -> Result<Vec<(String, Tensor)>> {
        let mut tensors: HashMap<String, Tensor> =
            HashMap::from([("keys".to_string(), self.keys()?), ("values".to_string(), self.values()?)]);
        tensors.extend(self.queries.pieces().map(|(first, squares)| (format!("queries.{first}"), squares.clone())));
        if let Some(trained) = &self.trained {
            let codebook = trained.codebook.tensors();
            tensors.extend(codebook.into_iter().map(|(name, tensor)| (name.to_string(), tensor.clone())));
            if self.encoded > self.config.init_offset() {
                tensors.insert("codes".to_string(), self.codes()?);
                tensors.extend(self.coarse_codes()?.map(|codes| ("coarse_codes".to_string(), codes)));
            }
        }
        Ok(tensors.into_iter().collect())
    }
}

#[cfg(test)]
mod tests;
