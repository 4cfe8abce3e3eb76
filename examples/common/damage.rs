//! Models whose files are damaged: an error, or what a model of other numbers gives, but no panic.

use std::fs;
use std::path::{Path, PathBuf};
use std::sync::OnceLock;

use anyhow::Result;
use candle_core::{DType, Device};
use candle_pq_attn::PqConfig;
use proptest::prelude::*;
use proptest::sample::{select, Index};
use serde_json::Value;
use tempfile::TempDir;

use crate::common::model::Model;
use crate::common::source::Checkpoint;
use crate::common::testing::*;
use crate::common::weights::Weights;

/// A model as a GGUF file and as a directory.
struct Tiny {
    directory: TempDir,
    gguf: Vec<u8>,
}

impl Tiny {
    fn get() -> &'static Self {
        static TINY: OnceLock<Tiny> = OnceLock::new();
        TINY.get_or_init(|| {
            let make = || -> Result<Self> {
                let (directory, config) = (tempfile::tempdir()?, tiny_config());
                let tensors = tiny_tensors(&config)?;
                write_directory(directory.path(), "llama", &config, &tensors, 1)?;
                let path = directory.path().join("tiny.gguf");
                write_gguf(&path, "llama", &config, &tensors, &gguf_metadata("llama", &config, "smollm"))?;
                Ok(Self { gguf: fs::read(&path)?, directory })
            };
            make().expect("a model")
        })
    }

    fn read(&self, name: &str) -> Vec<u8> {
        fs::read(self.directory.path().join(name)).expect("a file")
    }

    /// A directory in which `name` has other bytes.
    fn with(&self, name: &str, bytes: &[u8]) -> std::io::Result<TempDir> {
        let damaged = tempfile::tempdir()?;
        for file in ["config.json", "tokenizer.json", "model.safetensors"] {
            fs::write(damaged.path().join(file), self.read(file))?;
        }
        fs::write(damaged.path().join(name), bytes)?;
        Ok(damaged)
    }
}

/// Loads a model and takes a step, which may give any numbers.
fn run(path: &Path) -> Result<Vec<f32>> {
    let mut checkpoint = Checkpoint::open(path.to_str().expect("a path"))?;
    let config = checkpoint.config()?;
    let pq = PqConfig { pq_dim: 4, ..PqConfig::default() };
    Model::new(&config, Weights::new(checkpoint, &config, DType::F32, &Device::Cpu)?, &pq, 16)?
        .forward(&[7, 3, 25], true)
}

/// Bytes changed within the first `header` bytes or anywhere, and the end cut off.
fn damage() -> impl Strategy<Value = (Vec<(Index, bool, u8)>, Option<Index>)> {
    (
        prop::collection::vec((any::<Index>(), prop::bool::weighted(0.8), any::<u8>()), 0..4),
        prop::option::of(any::<Index>()),
    )
}

fn damaged(good: &[u8], header: usize, (changes, cut): &(Vec<(Index, bool, u8)>, Option<Index>)) -> Vec<u8> {
    let mut bytes = good.to_vec();
    for (at, in_header, byte) in changes {
        bytes[at.index(if *in_header { header } else { good.len() })] = *byte;
    }
    bytes.truncate(cut.as_ref().map_or(good.len(), |cut| cut.index(good.len())));
    bytes
}

fn numbers_of(json: &mut Value) -> Vec<&mut Value> {
    match json {
        Value::Number(_) => vec![json],
        Value::Array(items) => items.iter_mut().flat_map(numbers_of).collect(),
        Value::Object(fields) => fields.values_mut().flat_map(numbers_of).collect(),
        _ => Vec::new(),
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(500))]

    #[test]
    fn of_gguf_is_no_panic(damage in damage()) {
        let tiny = Tiny::get();
        let directory = tempfile::tempdir()?;
        let path: PathBuf = directory.path().join("damaged.gguf");
        // Its metadata and the first tensors' descriptions.
        fs::write(&path, damaged(&tiny.gguf, 6000, &damage))?;
        drop(run(&path));
    }

    #[test]
    fn of_safetensors_is_no_panic(damage in damage()) {
        let tiny = Tiny::get();
        let good = tiny.read("model.safetensors");
        let header = 8 + u64::from_le_bytes(good[..8].try_into()?) as usize;
        drop(run(tiny.with("model.safetensors", &damaged(&good, header, &damage))?.path()));
    }

    #[test]
    fn of_a_config_is_no_panic(
        damage in damage(),
        number in prop::option::of((any::<Index>(), select(vec!["0", "1", "3", "4294967296", "18446744073709551615", "-1", "1e300"]))),
    ) {
        let tiny = Tiny::get();
        let good = tiny.read("config.json");
        let bytes = match number {
            None => damaged(&good, good.len(), &damage),
            Some((index, number)) => {
                let mut json: Value = serde_json::from_slice(&good)?;
                let mut numbers = numbers_of(&mut json);
                let count = numbers.len();
                *numbers[index.index(count)] = serde_json::from_str(number)?;
                json.to_string().into_bytes()
            }
        };
        drop(run(tiny.with("config.json", &bytes)?.path()));
    }
}
