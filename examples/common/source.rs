//! Where a model comes from: a name becomes files on this machine.

use std::fs::File;
use std::io::BufReader;
use std::panic::{catch_unwind, AssertUnwindSafe};
use std::path::{Path, PathBuf};

use anyhow::{anyhow, bail, ensure, Context, Result};
use candle_core::quantized::gguf_file::Content;
use candle_core::{DType, Device};
use hf_hub::api::sync::{ApiBuilder, ApiRepo};

use crate::common::config::ModelConfig;
use crate::common::smollm2;

/// The files of a model, opened but not yet read.
pub enum Checkpoint {
    Gguf(Gguf),
    /// A directory in the layout of Hugging Face.
    Directory(PathBuf),
}

/// A GGUF file, whose header has been read.
pub struct Gguf {
    pub path: PathBuf,
    pub content: Content,
    pub file: BufReader<File>,
}

impl Checkpoint {
    /// `smollm2`, a GGUF file, a directory or `ORG/NAME` on the hub.
    pub fn open(model: &str) -> Result<Self> {
        let path = Path::new(model);
        if model == "smollm2" {
            Self::gguf(&smollm2::fetch()?)
        } else if path.is_dir() {
            Self::directory(path)
        } else if path.is_file() {
            Self::gguf(path)
        } else if is_hub_id(model) {
            Self::directory(&download(model)?)
        } else {
            bail!(
                "no model {model:?}: give smollm2, a GGUF file, a directory with a config.json, or ORG/NAME on the hub"
            )
        }
    }

    fn gguf(path: &Path) -> Result<Self> {
        let open = || -> Result<Gguf> {
            let mut file = BufReader::new(File::open(path)?);
            // Candle divides by the alignment that the file gives, and 0 makes it panic.
            let content = catch_unwind(AssertUnwindSafe(|| Content::read(&mut file)))
                .map_err(|_| anyhow!("its header makes the reader of GGUF files panic"))??;
            for (name, info) in &content.tensor_infos {
                // As f32. Candle compares with the size of the file, but by a product that may overflow.
                let bytes = info
                    .shape
                    .dims()
                    .iter()
                    .filter(|dim| **dim > 0)
                    .try_fold(4usize, |bytes, dim| bytes.checked_mul(*dim));
                ensure!(bytes.is_some(), "the tensor {name} has shape {:?}", info.shape.dims());
            }
            Ok(Gguf { path: path.to_path_buf(), content, file })
        };
        let gguf = open().with_context(|| format!("cannot read {} as GGUF; give another --model", path.display()))?;
        Ok(Self::Gguf(gguf))
    }

    fn directory(path: &Path) -> Result<Self> {
        let missing = ["config.json", "tokenizer.json"].into_iter().find(|name| !path.join(name).is_file());
        if let Some(name) = missing {
            bail!("{} has no {name}: give a directory in the layout of Hugging Face, or a GGUF file", path.display());
        }
        Ok(Self::Directory(path.to_path_buf()))
    }

    /// Where it lies.
    pub fn path(&self) -> &Path {
        match self {
            Self::Gguf(gguf) => &gguf.path,
            Self::Directory(path) => path,
        }
    }

    /// The model's dimensions.
    pub fn config(&mut self) -> Result<ModelConfig> {
        let config = match self {
            Self::Gguf(Gguf { content, file, .. }) => {
                ModelConfig::from_gguf(content, |name| vector(content, file, name))
            }
            Self::Directory(path) => read(&path.join("config.json")).and_then(|text| ModelConfig::from_json(&text)),
        };
        config.with_context(|| format!("cannot run {}", self.path().display()))
    }
}

/// A tensor's numbers, if it is there.
fn vector(content: &Content, file: &mut BufReader<File>, name: &str) -> Result<Option<Vec<f64>>> {
    if !content.tensor_infos.contains_key(name) {
        return Ok(None);
    }
    let tensor = content.tensor(file, name, &Device::Cpu)?.dequantize(&Device::Cpu)?;
    Ok(Some(tensor.to_dtype(DType::F64)?.to_vec1()?))
}

/// A text file, with its path in the error.
pub fn read(path: &Path) -> Result<String> {
    std::fs::read_to_string(path).with_context(|| format!("cannot read {}", path.display()))
}

fn is_hub_id(model: &str) -> bool {
    let part = |text: &str| {
        !text.is_empty()
            && text.chars().all(|c| c.is_ascii_alphanumeric() || "-_.".contains(c))
            && !text.starts_with('.')
    };
    let gguf = Path::new(model).extension().is_some_and(|extension| extension.eq_ignore_ascii_case("gguf"));
    !gguf && model.split_once('/').is_some_and(|(org, name)| part(org) && part(name))
}

/// Fetches what a directory needs into the hub's cache, and returns the directory there.
fn download(id: &str) -> Result<PathBuf> {
    let fetch = || -> Result<PathBuf> {
        let repo = ApiBuilder::from_env().build()?.model(id.to_string());
        let config = repo.get("config.json")?;
        repo.get("tokenizer.json")?;
        for optional in ["generation_config.json", "tokenizer_config.json", "chat_template.jinja"] {
            // A file that the model does not have is as good as one that cannot be fetched.
            repo.get(optional).ok();
        }
        download_weights(&repo)?;
        Ok(config.parent().context("no directory in the hub's cache")?.to_path_buf())
    };
    // The error's own text says all that the chain below it does.
    fetch().map_err(|error| {
        anyhow!(
            "cannot fetch {id} from its hub: check the name and the network, or give a directory or GGUF file: {error}"
        )
    })
}

fn download_weights(repo: &ApiRepo) -> Result<()> {
    let Ok(index) = repo.get(SHARD_INDEX) else {
        repo.get(SINGLE_FILE)?;
        return Ok(());
    };
    for shard in shards(&read(&index)?)? {
        repo.get(&shard)?;
    }
    Ok(())
}

const SINGLE_FILE: &str = "model.safetensors";
const SHARD_INDEX: &str = "model.safetensors.index.json";

/// The safetensors files of a directory.
pub fn weight_files(directory: &Path) -> Result<Vec<PathBuf>> {
    let (single, index) = (directory.join(SINGLE_FILE), directory.join(SHARD_INDEX));
    if single.is_file() {
        return Ok(vec![single]);
    }
    ensure!(index.is_file(), "{} has neither {SINGLE_FILE} nor {SHARD_INDEX}", directory.display());
    Ok(shards(&read(&index)?)?.iter().map(|shard| directory.join(shard)).collect())
}

/// The files that a shard index names, each once.
fn shards(index: &str) -> Result<Vec<String>> {
    #[derive(serde::Deserialize)]
    struct Index {
        weight_map: std::collections::BTreeMap<String, String>,
    }
    let index: Index = serde_json::from_str(index).with_context(|| format!("cannot parse {SHARD_INDEX}"))?;
    let mut files: Vec<String> = index.weight_map.into_values().collect();
    files.sort();
    files.dedup();
    Ok(files)
}

#[cfg(test)]
mod tests {
    use candle_core::quantized::gguf_file::{self, Value};

    use super::*;

    fn error(model: &str) -> String {
        format!("{:#}", Checkpoint::open(model).err().unwrap())
    }

    #[test]
    fn hub_ids_have_two_parts() {
        for (model, is_id) in [
            ("HuggingFaceTB/SmolLM2-135M-Instruct", true),
            ("Qwen/Qwen2.5-0.5B", true),
            ("smollm", false),
            ("a/b/c", false),
            ("models/tiny.gguf", false),
            ("models/tiny.GGUF", false),
            ("../model", false),
            ("/model", false),
            ("org/", false),
            ("org/na me", false),
        ] {
            assert_eq!(is_hub_id(model), is_id, "{model}");
        }
    }

    #[test]
    fn what_is_no_model_says_what_one_is() -> Result<()> {
        assert!(
            error("no-such-model").contains("give smollm2, a GGUF file, a directory"),
            "{}",
            error("no-such-model")
        );
        assert!(error("models/none.gguf").contains("no model \"models/none.gguf\""));

        let directory = tempfile::tempdir()?;
        let path = directory.path().to_str().unwrap();
        assert!(error(path).contains("has no config.json"));
        std::fs::write(directory.path().join("config.json"), "{}")?;
        assert!(error(path).contains("has no tokenizer.json"));
        std::fs::write(directory.path().join("tokenizer.json"), "{}")?;
        assert!(format!("{:#}", Checkpoint::open(path)?.config().unwrap_err()).contains("cannot run"));
        assert!(weight_files(directory.path()).unwrap_err().to_string().contains("neither model.safetensors nor"));

        let file = directory.path().join("broken.gguf");
        for bytes in [&b""[..], b"not a model", b"GGUF\x03\0\0\0"] {
            std::fs::write(&file, bytes)?;
            assert!(error(file.to_str().unwrap()).contains("as GGUF; give another --model"));
        }
        let alignment = Value::U32(0);
        gguf_file::write(&mut File::create(&file)?, &[("general.alignment", &alignment)], &[])?;
        assert!(error(file.to_str().unwrap()).contains("as GGUF; give another --model: its header"));
        Ok(())
    }

    #[test]
    fn each_shard_is_named_once() -> Result<()> {
        let index =
            r#"{"metadata": {}, "weight_map": {"a": "2.safetensors", "b": "1.safetensors", "c": "2.safetensors"}}"#;
        assert_eq!(shards(index)?, ["1.safetensors", "2.safetensors"]);
        assert!(shards("[]").is_err());
        Ok(())
    }
}
