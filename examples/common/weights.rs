//! The tensors of a checkpoint under one naming and layout, that of Hugging Face.

use std::collections::HashMap;

use anyhow::{ensure, Context, Result};
use candle_core::quantized::{GgmlDType, QStorage, QTensor};
use candle_core::{DType, Device, Tensor};

use crate::common::config::ModelConfig;
use crate::common::linear::Matrix;
use crate::common::source::{weight_files, Checkpoint, Gguf};

/// The types of a model's numbers.
#[derive(Debug, Clone, Copy)]
pub struct Precision {
    /// What weights, keys and values are stored in, as was asked for.
    pub stored: DType,
    /// What goes between layers. On a CPU it is f32 always: Candle's operations are slow there in less, and round more.
    pub compute: DType,
}

impl Precision {
    fn new(stored: DType, device: &Device) -> Self {
        Self { stored, compute: if device.is_cpu() { DType::F32 } else { stored } }
    }
}

/// Hands out each tensor once, its shape checked.
pub struct Weights {
    store: Store,
    precision: Precision,
    device: Device,
    quantized: bool,
}

enum Store {
    Gguf { gguf: Gguf, interleaved_head_dim: Option<usize>, gemma: bool },
    Safetensors(HashMap<String, Tensor>),
}

impl Weights {
    /// Opens a checkpoint, whose numbers are to be rounded to `dtype`.
    pub fn new(checkpoint: Checkpoint, config: &ModelConfig, dtype: DType, device: &Device) -> Result<Self> {
        let store = match checkpoint {
            Checkpoint::Gguf(gguf) => Store::gguf(gguf, config),
            Checkpoint::Directory(directory) => {
                let mut tensors = HashMap::new();
                for file in weight_files(&directory)? {
                    let shard = candle_core::safetensors::load(&file, device);
                    let shard = shard.with_context(|| format!("cannot read {}", file.display()))?;
                    tensors.extend(shard.into_iter().map(|(name, tensor)| (text_model_name(name), tensor)));
                }
                Store::Safetensors(tensors)
            }
        };
        Ok(Self { store, precision: Precision::new(dtype, device), device: device.clone(), quantized: false })
    }

    /// Leaves matrices quantised that are: a fraction of the memory. Products with few rows then round these to 8 bits.
    pub fn quantized(self) -> Self {
        Self { quantized: true, ..self }
    }

    pub fn precision(&self) -> Precision {
        self.precision
    }

    pub fn device(&self) -> &Device {
        &self.device
    }

    /// Whether norms have the 1 that Gemma leaves out: in GGUF they do.
    pub fn has_whole_norms(&self) -> bool {
        matches!(self.store, Store::Gguf { .. })
    }

    /// The tensor of that name and shape, in the stored type.
    pub fn tensor(&mut self, name: &str, shape: &[usize]) -> Result<Tensor> {
        let tensor = self.store.take(name, &self.device)?;
        ensure!(tensor.dims() == shape, "the model's tensor {name} has shape {:?}, expected {shape:?}", tensor.dims());
        Ok(tensor.to_dtype(self.precision.stored)?)
    }

    /// As [`tensor`](Self::tensor), but a matrix that is quantised may stay so.
    pub fn matrix(&mut self, name: &str, shape: &[usize; 2]) -> Result<Matrix> {
        if self.quantized {
            if let Some(quantized) = self.store.take_quantized(name, &self.device)? {
                let dims = quantized.shape().dims();
                ensure!(dims == shape, "the model's tensor {name} has shape {dims:?}, expected {shape:?}");
                return Ok(Matrix::Quantized(quantized.into()));
            }
        }
        Ok(Matrix::Plain(self.tensor(name, shape)?))
    }
}

impl Store {
    fn gguf(gguf: Gguf, config: &ModelConfig) -> Self {
        let architecture = gguf.content.metadata.get("general.architecture").and_then(|name| name.to_string().ok());
        let interleaved = architecture.is_some_and(|name| INTERLEAVED.contains(&name.as_str()));
        Self::Gguf { gguf, interleaved_head_dim: interleaved.then_some(config.head_dim), gemma: config.gemma }
    }

    /// None where the tensor is not quantised, or not there.
    fn take_quantized(&mut self, name: &str, device: &Device) -> Result<Option<QTensor>> {
        let Self::Gguf { gguf, interleaved_head_dim, gemma } = self else { return Ok(None) };
        let Some(gguf_name) = gguf_name(name, *gemma) else { return Ok(None) };
        let dtype = gguf.content.tensor_infos.get(&gguf_name).map(|info| info.ggml_dtype);
        if matches!(dtype, None | Some(GgmlDType::F32 | GgmlDType::F16 | GgmlDType::BF16)) {
            return Ok(None);
        }
        let tensor = gguf.content.tensor(&mut gguf.file, &gguf_name, device)?;
        match interleaved_head_dim {
            Some(head_dim) if is_interleaved(name) => deinterleave_quantized(&tensor, *head_dim).map(Some),
            _ => Ok(Some(tensor)),
        }
    }

    fn take(&mut self, name: &str, device: &Device) -> Result<Tensor> {
        let missing = || format!("the model lacks the tensor {name}");
        match self {
            Self::Safetensors(tensors) => tensors.remove(name).with_context(missing),
            Self::Gguf { gguf, interleaved_head_dim, gemma } => {
                let gguf_name = gguf_name(name, *gemma).with_context(missing)?;
                ensure!(gguf.content.tensor_infos.contains_key(&gguf_name), "{} ({gguf_name})", missing());
                let tensor = gguf.content.tensor(&mut gguf.file, &gguf_name, device)?.dequantize(device)?;
                match interleaved_head_dim {
                    Some(head_dim) if is_interleaved(name) => deinterleave(&tensor, *head_dim),
                    _ => Ok(tensor),
                }
            }
        }
    }
}

fn is_interleaved(name: &str) -> bool {
    name.contains(".q_proj.") || name.contains(".k_proj.")
}

/// The name that a tensor has where the language model is not one part of several.
fn text_model_name(name: String) -> String {
    match (name.strip_prefix("language_model."), name.strip_prefix("model.language_model.")) {
        (Some(rest), _) => rest.to_string(),
        (_, Some(rest)) => format!("model.{rest}"),
        _ => name,
    }
}

/// Architectures whose projections to queries and keys GGUF interleaves.
pub const INTERLEAVED: [&str; 2] = ["llama", "smollm3"];

/// Undoes what GGUF does to these: there the two elements
/// that a rotation mixes lie side by side, where Hugging Face has them half a head apart.
fn deinterleave(projection: &Tensor, head_dim: usize) -> Result<Tensor> {
    let rows = projection.dim(0)?;
    let pairs = projection.reshape((rows / head_dim, head_dim / 2, 2, ()))?;
    Ok(pairs.transpose(1, 2)?.reshape(projection.shape())?)
}

/// As [`deinterleave`]: a row is whole blocks of quantised numbers, so that rows move as bytes.
fn deinterleave_quantized(projection: &QTensor, head_dim: usize) -> Result<QTensor> {
    let bytes = projection.data()?;
    let rows = projection.shape().dims2()?.0;
    ensure!(rows > 0 && rows % head_dim == 0, "a projection to heads of {head_dim} elements has {rows} rows");
    let row = bytes.len() / rows;
    let half = head_dim / 2;
    let moved: Vec<u8> = (0..rows)
        .flat_map(|to| {
            let (head, at) = (to / head_dim, to % head_dim);
            let from = head * head_dim + at % half * 2 + at / half;
            &bytes[from * row..(from + 1) * row]
        })
        .copied()
        .collect();
    let storage = QStorage::from_data(moved.into(), &projection.device(), projection.dtype())?;
    Ok(QTensor::new(storage, projection.shape())?)
}

/// Names in a Hugging Face checkpoint and in GGUF, less the layer before and `.weight` or `.bias` after.
const NAMES: [(&str, &str); 18] = [
    ("model.embed_tokens", "token_embd"),
    ("model.norm", "output_norm"),
    ("lm_head", "output"),
    ("input_layernorm", "attn_norm"),
    ("self_attn.q_proj", "attn_q"),
    ("self_attn.k_proj", "attn_k"),
    ("self_attn.v_proj", "attn_v"),
    ("self_attn.qkv_proj", "attn_qkv"),
    ("self_attn.o_proj", "attn_output"),
    ("self_attn.q_norm", "attn_q_norm"),
    ("self_attn.k_norm", "attn_k_norm"),
    ("post_attention_layernorm", "ffn_norm"),
    ("pre_feedforward_layernorm", "ffn_norm"),
    ("post_feedforward_layernorm", "post_ffw_norm"),
    ("mlp.gate_proj", "ffn_gate"),
    ("mlp.up_proj", "ffn_up"),
    ("mlp.gate_up_proj", "ffn_up"),
    ("mlp.down_proj", "ffn_down"),
];

fn gguf_name(name: &str, gemma: bool) -> Option<String> {
    let translate = |part: &str| match part {
        // Not the one before the MLP, as that of others is.
        "post_attention_layernorm" if gemma => Some("post_attention_norm"),
        _ => NAMES.iter().find(|(hf, _)| *hf == part).map(|(_, gguf)| *gguf),
    };
    let (stem, kind) = name.rsplit_once('.')?;
    match stem.strip_prefix("model.layers.").and_then(|rest| rest.split_once('.')) {
        Some((layer, part)) => Some(format!("blk.{layer}.{}.{kind}", translate(part)?)),
        None => Some(format!("{}.{kind}", translate(stem)?)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_translate() {
        for (hf, gguf) in [
            ("model.embed_tokens.weight", "token_embd.weight"),
            ("lm_head.weight", "output.weight"),
            ("model.layers.12.self_attn.q_proj.bias", "blk.12.attn_q.bias"),
            ("model.layers.0.post_attention_layernorm.weight", "blk.0.ffn_norm.weight"),
        ] {
            assert_eq!(gguf_name(hf, false).as_deref(), Some(gguf));
        }
        let norm = "model.layers.0.post_attention_layernorm.weight";
        assert_eq!(gguf_name(norm, true).as_deref(), Some("blk.0.post_attention_norm.weight"));
        assert_eq!(gguf_name("model.layers.0.mystery.weight", false), None);
    }

    #[test]
    fn a_language_model_is_found_among_others() {
        for name in ["model.norm.weight", "language_model.model.norm.weight", "model.language_model.norm.weight"] {
            assert_eq!(text_model_name(name.to_string()), "model.norm.weight");
        }
    }

    #[test]
    fn deinterleaving_brings_pairs_half_a_head_apart() -> Result<()> {
        // Two heads of four elements: 0 and 1 rotate together, as do 2 and 3.
        let bias = Tensor::new(&[0f32, 1., 2., 3., 10., 11., 12., 13.], &Device::Cpu)?;
        assert_eq!(deinterleave(&bias, 4)?.to_vec1::<f32>()?, [0., 2., 1., 3., 10., 12., 11., 13.]);
        let projection = Tensor::randn(0f32, 1., (16, 64), &Device::Cpu)?;
        for dtype in [GgmlDType::Q4_0, GgmlDType::Q8_0] {
            let quantized = QTensor::quantize(&projection, dtype)?;
            let got = deinterleave_quantized(&quantized, 8)?.dequantize(&Device::Cpu)?;
            let want = deinterleave(&quantized.dequantize(&Device::Cpu)?, 8)?;
            assert_eq!(got.to_vec2::<f32>()?, want.to_vec2::<f32>()?);
        }
        Ok(())
    }
}
