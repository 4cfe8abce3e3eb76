//! Caches in a file: a document is read once and asked again on another day.
//!
//! A safetensors file with the tensors of each layer, `0.keys`, `0.values` and so on, as far as they are in use, and three
//! entries of metadata: `caches`, this format and what is no tensor as JSON; `about`, the caller's; and `xxh3`, a checksum of
//! all that. Sums of values are not in it: they are those of the codes, and adding them up costs next to nothing.

use std::collections::HashMap;
use std::fs::File;
use std::io::{Read, Seek, SeekFrom};
use std::path::Path;

use candle_core::{bail, DType, Device, Result, Tensor};
use safetensors::tensor::{Metadata, View};
use serde::{Deserialize, Serialize};
use xxhash_rust::xxh3::Xxh3;

use super::PqKvCache;
use crate::codebook::{at_path, check_shape, Codebook};
use crate::config::PqConfig;

/// Raised by what an older version would read wrongly.
const FORMAT: u32 = 1;

/// The most bytes of a header, as the format of safetensors has it.
const MAX_HEADER: u64 = 100_000_000;

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
/// The file takes the place of another only when it is complete. A tensor at a time is copied, and on a GPU read back,
/// twice: for the checksum, and to be written.
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
    tensors.sort_by(|a, b| a.0.cmp(&b.0));
    let mut sum = Checksum::new(&caches, about);
    for (name, tensor) in &tensors {
        sum.add(name, &tensor.data());
    }
    let metadata = [("caches", caches), ("about", about.to_string()), ("xxh3", sum.hex())];
    let metadata = metadata.map(|(name, text)| (name.to_string(), text)).into();
    let path = path.as_ref();
    safetensors::serialize_to_file(tensors, Some(metadata), path)
        .map_err(|error| at_path("save_caches", path, error.into()))
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
        // Before anything is made of it.
        if file.checksum(&caches, &about)? != file.metadata("xxh3")? {
            bail!("expected the bytes that were saved, got others: the checksum differs");
        }
        let layers = saved.layers.iter().enumerate();
        let caches =
            layers.map(|(index, layer)| layer.load(&mut file, index, capacity, device)).collect::<Result<_>>()?;
        Ok(SavedCaches { caches, about })
    };
    load().map_err(|error| at_path("load_caches", path, error))
}

struct Checksum(Xxh3);

impl Checksum {
    fn new(caches: &str, about: &str) -> Self {
        let mut sum = Self(Xxh3::new());
        sum.add(caches, about.as_bytes());
        sum
    }

    /// Lengths come first, so that no byte can move from one part to the next.
    fn add(&mut self, name: &str, bytes: &[u8]) {
        self.0.update(&(name.len() as u64).to_le_bytes());
        self.0.update(&(bytes.len() as u64).to_le_bytes());
        self.0.update(name.as_bytes());
        self.0.update(bytes);
    }

    fn hex(&self) -> String {
        format!("{:032x}", self.0.digest128())
    }
}

/// A safetensors file, read tensor by tensor.
struct SavedFile {
    file: File,
    header: Metadata,
    /// Where the tensors begin.
    start: u64,
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
        if len > MAX_HEADER || len > size - 8 {
            bail!("{FOREIGN}, or one that was cut off: {size} bytes, with a header of {len}");
        }
        let mut header = vec![0; usize::try_from(len)?];
        file.read_exact(&mut header)?;
        let header: Metadata = match serde_json::from_slice(&header) {
            Ok(header) => header,
            Err(error) => bail!("{FOREIGN}: {error}"),
        };
        let (start, expected) = (8 + len, header.data_len() as u64);
        if size - start != expected {
            bail!("expected {expected} bytes of tensors, got {}: the file was cut off or changed", size - start);
        }
        Ok(Self { file, header, start })
    }

    fn metadata(&self, name: &str) -> Result<String> {
        match self.header.metadata().as_ref().and_then(|metadata| metadata.get(name)) {
            Some(text) => Ok(text.clone()),
            None => bail!("expected a file of save_caches, with {name:?} in its metadata; got another"),
        }
    }

    /// The checksum of what is in the file.
    fn checksum(&mut self, caches: &str, about: &str) -> Result<String> {
        let mut names = self.header.offset_keys();
        names.sort();
        let mut sum = Checksum::new(caches, about);
        for name in names {
            sum.add(&name, &self.bytes(&name)?);
        }
        Ok(sum.hex())
    }

    fn bytes(&mut self, name: &str) -> Result<Vec<u8>> {
        let Some(info) = self.header.info(name) else { bail!("expected a tensor {name:?}, found none") };
        let (begin, end) = info.data_offsets;
        // As many as the file has: its length is that of all tensors together.
        let mut bytes = vec![0; end - begin];
        self.file.seek(SeekFrom::Start(self.start + begin as u64))?;
        self.file.read_exact(&mut bytes)?;
        Ok(bytes)
    }

    /// A tensor of that dtype, if there is one of that name.
    fn tensor(&mut self, name: &str, dtype: DType, device: &Device) -> Result<Option<Tensor>> {
        let Some(info) = self.header.info(name) else { return Ok(None) };
        let shape = info.shape.clone();
        check_shape(name, &shape)?;
        if DType::try_from(info.dtype).ok() != Some(dtype) {
            bail!("{name}: expected dtype {}, got {:?}", dtype.as_str(), info.dtype);
        }
        let bytes = self.bytes(name)?;
        Tensor::from_raw_buffer(&bytes, dtype, &shape, device).map(Some)
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
    fn load(&self, file: &mut SavedFile, index: usize, capacity: usize, device: &Device) -> Result<PqKvCache> {
        let ([b, h_kv, head_dim], len) = (self.dims, self.len);
        let mut tensor = |name: &str, dtype, dims: Option<&[usize]>| -> Result<Option<Tensor>> {
            let name = format!("{index}.{name}");
            let tensor = file.tensor(&name, dtype, device)?;
            match (&tensor, dims) {
                (Some(tensor), Some(dims)) if tensor.dims() != dims => {
                    bail!("{name}: expected shape {dims:?}, got {:?}", tensor.dims())
                }
                (None, Some(_)) => bail!("expected a tensor {name:?}, found none"),
                _ => Ok(tensor),
            }
        };
        let dtype: DType = match self.dtype.parse() {
            Ok(dtype) => dtype,
            Err(_) => bail!("{index}.dtype: expected f32, f16 or bf16, got {:?}", self.dtype),
        };
        let kv_dims = [b, h_kv, len, head_dim];
        let keys = tensor("keys", dtype, Some(&kv_dims))?;
        let values = tensor("values", dtype, Some(&kv_dims))?;
        // A file without keys has no bytes that its heads were counted by.
        let capacity = if len == 0 { 0 } else { capacity.max(len) };
        let mut cache = PqKvCache::new(self.config.clone(), self.dims, capacity, dtype, device)?;
        if let (Some(keys), Some(values)) = (keys, values) {
            cache.append(&keys, &values)?;
        }
        for &first in &self.queries {
            match tensor(&format!("queries.{first}"), DType::F32, None)? {
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
        let codebook = Codebook::from_tensors(|name| tensor(name, DType::F32, None))?;
        cache.check_codebook(&codebook)?;
        cache.use_codebook(codebook, end)?;
        if encoded > start {
            let pq_dim = cache.config.pq_dim;
            let codes = tensor("codes", DType::U8, Some(&[b, h_kv, encoded - start, pq_dim]))?;
            let coarse_codes = match cache.coarse_codes {
                None => None,
                Some(_) => tensor("coarse_codes", DType::U8, Some(&[b, h_kv, encoded - start]))?,
            };
            for (to, from) in [(Some(&cache.codes), codes), (cache.coarse_codes.as_ref(), coarse_codes)] {
                if let (Some(to), Some(from)) = (to, from) {
                    to.slice_set(&from, 2, start)?;
                }
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
    fn tensors(&self) -> Result<Vec<(String, Tensor)>> {
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
