//! A decoder of the Llama family: Llama, Mistral, Qwen2 and Qwen3 are options of [`ModelConfig`].

use anyhow::Result;
use candle_core::{DType, Device, Module, Tensor};
use candle_nn::ops::swiglu;
use candle_nn::{Embedding, RmsNorm};
use candle_pq_attn::{PqAttention, PqConfig, PqKvCache};

use crate::config::ModelConfig;
use crate::linear::Linear;
use crate::rotary::Rotary;
use crate::weights::{Precision, Weights};

/// Weights, and the cache of the one sequence that they work on.
pub struct Model {
    embedding: Embedding,
    layers: Vec<Layer>,
    norm: RmsNorm,
    head: Linear,
    rotary: Rotary,
    attention: PqAttention,
    precision: Precision,
    device: Device,
}

/// Bytes in use, over all layers.
#[derive(Debug, Clone, Copy, Default)]
pub struct Memory {
    pub kv_bytes: usize,
    pub index_bytes: usize,
}

impl Model {
    /// Reads the weights, and makes room for `capacity` tokens.
    pub fn new(config: &ModelConfig, mut weights: Weights, pq: &PqConfig, capacity: usize) -> Result<Self> {
        let (precision, device) = (weights.precision(), weights.device().clone());
        let weights = &mut weights;
        let attention = PqAttention::new(pq.clone(), 1. / (config.head_dim as f32).sqrt())?;
        let embeddings = weights.tensor("model.embed_tokens.weight", &[config.vocab_size, config.hidden_size])?;
        let head = match config.tied_embeddings {
            true => embeddings.clone(),
            false => weights.tensor("lm_head.weight", &[config.vocab_size, config.hidden_size])?,
        };
        let layers = (0..config.layers).map(|index| {
            let dims = [1, config.kv_heads, config.head_dim];
            let cache = attention.new_cache(dims, capacity, precision.stored, &device)?;
            Layer::new(config, weights, index, cache)
        });
        Ok(Self {
            layers: layers.collect::<Result<_>>()?,
            embedding: Embedding::new(embeddings, config.hidden_size),
            norm: norm(config, weights, "model.norm", config.hidden_size)?,
            head: Linear::new(head, None),
            rotary: Rotary::new(config, precision.compute, &device)?,
            attention,
            precision,
            device,
        })
    }

    /// Appends `tokens` and returns the logits after the last of them, f32 on the host. `dense` attends to every key;
    /// several tokens at once do so in any case.
    pub fn forward(&mut self, tokens: &[u32], dense: bool) -> Result<Vec<f32>> {
        let tokens_in = Tensor::new(tokens, &self.device)?.unsqueeze(0)?;
        let mut x = self.embedding.forward(&tokens_in)?.to_dtype(self.precision.compute)?;
        for layer in &mut self.layers {
            x = layer.forward(&x, &self.rotary, &self.attention, dense)?;
        }
        let last = x.narrow(1, tokens.len() - 1, 1)?;
        let logits = self.head.forward(&self.norm.forward(&last)?)?;
        Ok(logits.flatten_all()?.to_dtype(DType::F32)?.to_vec1()?)
    }

    /// Tokens so far.
    pub fn len(&self) -> usize {
        self.layers.first().map_or(0, |layer| layer.cache.len())
    }

    /// Keys that the last step attended to.
    pub fn attended(&self, dense: bool) -> usize {
        match dense {
            true => self.len(),
            false => self.attention.config().attended(self.len()),
        }
    }

    /// Forgets all tokens but the first `len`.
    pub fn truncate(&mut self, len: usize) -> Result<()> {
        Ok(self.layers.iter_mut().try_for_each(|layer| layer.cache.truncate(len))?)
    }

    /// Trains codebooks on the keys so far and encodes them, which the first sparse step would do otherwise.
    pub fn build_index(&mut self) -> Result<()> {
        Ok(self.layers.iter_mut().try_for_each(|layer| layer.cache.build_index())?)
    }

    pub fn memory(&self) -> Memory {
        self.layers.iter().fold(Memory::default(), |sum, layer| {
            let memory = layer.cache.memory();
            Memory { kv_bytes: sum.kv_bytes + memory.kv_bytes, index_bytes: sum.index_bytes + memory.index_bytes }
        })
    }
}

struct Layer {
    input_norm: RmsNorm,
    qkv: Linear,
    qk_norm: Option<(RmsNorm, RmsNorm)>,
    output: Linear,
    mlp_norm: RmsNorm,
    gate_up: Linear,
    down: Linear,
    heads: usize,
    kv_heads: usize,
    cache: PqKvCache,
}

impl Layer {
    fn new(config: &ModelConfig, weights: &mut Weights, index: usize, cache: PqKvCache) -> Result<Self> {
        let &ModelConfig { hidden_size, intermediate_size, heads, kv_heads, head_dim, .. } = config;
        let name = |part: &str| format!("model.layers.{index}.{part}");
        let (q_size, kv_size) = (heads * head_dim, kv_heads * head_dim);
        let qkv = [("q", q_size), ("k", kv_size), ("v", kv_size)];
        let qkv = qkv.map(|(part, size)| (name(&format!("self_attn.{part}_proj")), size));
        let gate_up = ["gate", "up"].map(|part| (name(&format!("mlp.{part}_proj")), intermediate_size));
        let qk_norm = match config.qk_norm {
            true => Some((
                norm(config, weights, &name("self_attn.q_norm"), head_dim)?,
                norm(config, weights, &name("self_attn.k_norm"), head_dim)?,
            )),
            false => None,
        };
        Ok(Self {
            input_norm: norm(config, weights, &name("input_layernorm"), hidden_size)?,
            qkv: linear(weights, &qkv, hidden_size, config.qkv_bias)?,
            qk_norm,
            output: linear(weights, &[(name("self_attn.o_proj"), hidden_size)], q_size, false)?,
            mlp_norm: norm(config, weights, &name("post_attention_layernorm"), hidden_size)?,
            gate_up: linear(weights, &gate_up, hidden_size, false)?,
            down: linear(weights, &[(name("mlp.down_proj"), hidden_size)], intermediate_size, false)?,
            heads,
            kv_heads,
            cache,
        })
    }

    fn forward(&mut self, x: &Tensor, rotary: &Rotary, attention: &PqAttention, dense: bool) -> Result<Tensor> {
        let x = (x + self.attend(&self.input_norm.forward(x)?, rotary, attention, dense)?)?;
        let gated = swiglu(&self.gate_up.forward(&self.mlp_norm.forward(&x)?)?)?;
        Ok((&x + self.down.forward(&gated)?)?)
    }

    fn attend(&mut self, x: &Tensor, rotary: &Rotary, attention: &PqAttention, dense: bool) -> Result<Tensor> {
        let (batch, tokens, _) = x.dims3()?;
        let all_heads = self.heads + 2 * self.kv_heads;
        let qkv = self.qkv.forward(x)?.reshape((batch, tokens, all_heads, ()))?.transpose(1, 2)?;
        let mut q = qkv.narrow(1, 0, self.heads)?;
        let mut k = qkv.narrow(1, self.heads, self.kv_heads)?;
        let v = qkv.narrow(1, self.heads + self.kv_heads, self.kv_heads)?;
        if let Some((q_norm, k_norm)) = &self.qk_norm {
            (q, k) = (q_norm.forward(&q.contiguous()?)?, k_norm.forward(&k.contiguous()?)?);
        }
        let start = self.cache.len();
        let dtype = self.cache.dtype();
        let q = rotary.apply(&q, start)?.to_dtype(dtype)?;
        let k = rotary.apply(&k, start)?.to_dtype(dtype)?;
        let v = v.to_dtype(dtype)?;
        let out = match dense {
            true => attention.forward_dense(&q, &k, &v, &mut self.cache)?,
            false => attention.forward(&q, &k, &v, &mut self.cache)?,
        };
        let out = out.transpose(1, 2)?.reshape((batch, tokens, ()))?;
        Ok(self.output.forward(&out.to_dtype(x.dtype())?)?)
    }
}

fn norm(config: &ModelConfig, weights: &mut Weights, name: &str, size: usize) -> Result<RmsNorm> {
    let weight = weights.tensor(&format!("{name}.weight"), &[size])?.to_dtype(weights.precision().compute)?;
    Ok(RmsNorm::new(weight, config.rms_norm_eps))
}

/// One layer for projections of the same input: few large products are faster than many small ones.
fn linear(weights: &mut Weights, parts: &[(String, usize)], inputs: usize, bias: bool) -> Result<Linear> {
    let mut stack = |kind: &str, inputs: &[usize]| -> Result<Tensor> {
        let tensors = parts
            .iter()
            .map(|(name, outputs)| weights.tensor(&format!("{name}.{kind}"), &[&[*outputs], inputs].concat()));
        let tensors = tensors.collect::<Result<Vec<_>>>()?;
        Ok(Tensor::cat(&tensors, 0)?)
    };
    let weight = stack("weight", &[inputs])?;
    let bias = bias.then(|| stack("bias", &[])).transpose()?;
    let bias = bias.map(|bias| bias.to_dtype(weights.precision().compute)).transpose()?;
    Ok(Linear::new(weight, bias))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::RopeScaling;
    use crate::source::Checkpoint;
    use crate::testing::*;

    const TOKENS: [u32; 12] = [7, 3, 250, 7, 91, 18, 18, 4, 77, 130, 5, 60];

    fn load(path: &std::path::Path, dtype: DType) -> Result<Model> {
        let mut checkpoint = Checkpoint::open(path.to_str().unwrap())?;
        let config = checkpoint.config()?;
        let pq = PqConfig { pq_dim: 4, ..PqConfig::default() };
        Model::new(&config, Weights::new(checkpoint, &config, dtype, &Device::Cpu)?, &pq, 16)
    }

    /// The same tokens in two chunks and a step, as a prompt and decoding come.
    fn logits(mut model: Model) -> Result<Vec<f32>> {
        model.forward(&TOKENS[..5], true)?;
        model.forward(&TOKENS[5..11], false)?;
        let logits = model.forward(&TOKENS[11..], false)?;
        assert_eq!(model.len(), TOKENS.len());
        Ok(logits)
    }

    fn assert_near(logits: &[f32], expected: &[f64], tolerance: f64, what: &str) {
        assert_eq!(logits.len(), expected.len(), "{what}");
        let off = logits.iter().zip(expected).map(|(l, e)| (f64::from(*l) - e).abs()).fold(0., f64::max);
        assert!(off < tolerance, "{what}: off by {off}");
    }

    /// One model as a directory, as several files and as GGUF, against the forward pass by the book.
    fn check(architecture: &str, config: &ModelConfig) -> Result<()> {
        let tensors = tiny_tensors(config)?;
        let expected = naive_logits(config, &tensors, &TOKENS)?;
        for shards in [1, 3] {
            let directory = tempfile::tempdir()?;
            write_directory(directory.path(), architecture, config, &tensors, shards)?;
            let logits = logits(load(directory.path(), DType::F32)?)?;
            assert_near(&logits, &expected, 1e-4, &format!("{architecture}, {shards} safetensors"));
        }
        let directory = tempfile::tempdir()?;
        let file = directory.path().join("tiny.gguf");
        write_gguf(&file, architecture, config, &tensors, &gguf_metadata(architecture, config, "smollm"))?;
        assert_near(&logits(load(&file, DType::F32)?)?, &expected, 1e-4, &format!("{architecture}, GGUF"));
        Ok(())
    }

    #[test]
    fn llama_equals_the_forward_pass_by_the_book() -> Result<()> {
        check("llama", &tiny_config())?;
        check("llama", &ModelConfig { tied_embeddings: true, rope_theta: 500., ..tiny_config() })
    }

    #[test]
    fn qwen2_has_biases() -> Result<()> {
        check("qwen2", &ModelConfig { qkv_bias: true, ..tiny_config() })
    }

    #[test]
    fn qwen3_normalises_queries_and_keys() -> Result<()> {
        check("qwen3", &ModelConfig { qk_norm: true, kv_heads: 1, ..tiny_config() })
    }

    #[test]
    fn half_precision_is_near() -> Result<()> {
        let (config, directory) = (tiny_config(), tempfile::tempdir()?);
        let tensors = tiny_tensors(&config)?;
        write_directory(directory.path(), "llama", &config, &tensors, 1)?;
        let expected = naive_logits(&config, &tensors, &TOKENS)?;
        let largest = expected.iter().fold(0f64, |max, l| max.max(l.abs()));
        for (dtype, tolerance) in [(DType::BF16, 0.05), (DType::F16, 0.01)] {
            let model = load(directory.path(), dtype)?;
            let logits = logits(model)?;
            assert_near(&logits, &expected, tolerance * largest, dtype.as_str());
            assert!(logits.iter().zip(&expected).any(|(l, e)| (f64::from(*l) - e).abs() > 1e-6 * largest), "rounded");
        }
        Ok(())
    }

    #[test]
    fn half_precision_halves_the_cache() -> Result<()> {
        let (config, directory) = (tiny_config(), tempfile::tempdir()?);
        write_directory(directory.path(), "llama", &config, &tiny_tensors(&config)?, 1)?;
        for (dtype, bytes) in [(DType::F32, 4), (DType::BF16, 2)] {
            let mut model = load(directory.path(), dtype)?;
            model.forward(&TOKENS, true)?;
            // K and V of two layers, of two heads of 16.
            assert_eq!(model.memory().kv_bytes, 2 * 2 * 2 * 16 * TOKENS.len() * bytes);
        }
        Ok(())
    }

    #[test]
    fn truncating_forgets() -> Result<()> {
        let (config, directory) = (tiny_config(), tempfile::tempdir()?);
        write_directory(directory.path(), "llama", &config, &tiny_tensors(&config)?, 1)?;
        let expected = logits(load(directory.path(), DType::F32)?)?;
        let mut model = load(directory.path(), DType::F32)?;
        model.forward(&TOKENS[..5], true)?;
        model.forward(&[1, 2, 3], true)?;
        model.truncate(5)?;
        model.forward(&TOKENS[5..11], false)?;
        assert_eq!(model.forward(&TOKENS[11..], false)?, expected);
        Ok(())
    }

    #[test]
    fn gguf_spells_out_rope_divisors() -> Result<()> {
        let config = tiny_config();
        let mut tensors = tiny_tensors(&config)?;
        let directory = tempfile::tempdir()?;
        let file = directory.path().join("tiny.gguf");
        tensors.insert("rope_freqs.weight".into(), Tensor::full(4f32, config.head_dim / 2, &Device::Cpu)?);
        write_gguf(&file, "llama", &config, &tensors, &gguf_metadata("llama", &config, "smollm"))?;
        let got = Checkpoint::open(file.to_str().unwrap())?.config()?;
        assert_eq!(got.rope_scaling, RopeScaling::Divisors(vec![4.; config.head_dim / 2]));
        Ok(())
    }

    #[test]
    fn a_missing_or_misshapen_tensor_is_named() -> Result<()> {
        let (config, name) = (tiny_config(), "model.layers.1.mlp.down_proj.weight");
        let complete = tiny_tensors(&config)?;
        let mut missing = complete.clone();
        missing.remove(name);
        let mut misshapen = complete.clone();
        misshapen.insert(name.into(), complete[name].t()?.contiguous()?);
        for (tensors, expected) in [(missing, "lacks the tensor"), (misshapen, "has shape [40, 24], expected [24, 40]")]
        {
            let directory = tempfile::tempdir()?;
            write_directory(directory.path(), "llama", &config, &tensors, 1)?;
            let file = directory.path().join("tiny.gguf");
            write_gguf(&file, "llama", &config, &tensors, &gguf_metadata("llama", &config, "smollm"))?;
            for path in [directory.path(), &file] {
                let error = load(path, DType::F32).err().unwrap().to_string();
                assert!(error.contains(name) && error.contains(expected), "{error}");
            }
        }
        Ok(())
    }
}
