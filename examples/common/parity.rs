//! Tiny models of random weights beside the same models of candle-transformers.

use std::collections::HashMap;
use std::path::Path;

use anyhow::{ensure, Result};
use candle_core::{DType, Device, Tensor};
use candle_nn::VarBuilder;
use candle_pq_attn::{Heavy, PqConfig};
use candle_transformers::models::smol::smollm3;
use candle_transformers::models::{gemma3, llama, mistral, phi3, qwen2, qwen3};
use serde_json::{json, Value as Json};

use crate::common::config::{LayerKind, ModelConfig, RopeScaling};
use crate::common::model::Model;
use crate::common::source::{read, Checkpoint};
use crate::common::testing::{tiny_config, tiny_tensors, write_directory};
use crate::common::weights::Weights;

const PROMPT: usize = 16;
const STEPS: usize = 64;

/// A model of candle-transformers: the logits after tokens, `[1, s]`, of which the first has that position.
type Original = Box<dyn FnMut(&Tensor, usize) -> candle_core::Result<Tensor>>;

/// A config whose heads fill the hidden size, which some of the originals take for granted.
fn square() -> ModelConfig {
    ModelConfig { hidden_size: 64, ..tiny_config() }
}

/// One checkpoint, read by both: the same logits after a prompt, then after each token of a decode. `original` is given
/// the `config.json`, with the fields that only the original asks for.
fn compare(
    model_type: &str,
    config: &ModelConfig,
    asked_for: Json,
    original: impl FnOnce(&str, VarBuilder) -> Result<Original>,
) -> Result<()> {
    let (tensors, directory) = (tiny_tensors(config)?, tempfile::tempdir()?);
    write_directory(directory.path(), model_type, config, &tensors, 1)?;
    let mut fields: Json = serde_json::from_str(&read(&directory.path().join("config.json"))?)?;
    for (name, value) in asked_for.as_object().into_iter().flatten() {
        fields[name] = value.clone();
    }
    let tensors: HashMap<_, _> = tensors.into_iter().collect();
    let weights = VarBuilder::from_tensors(tensors, DType::F32, &Device::Cpu);
    let mut original = original(&fields.to_string(), weights)?;

    let tokens: Vec<u32> = (0..PROMPT + STEPS).map(|i| ((i * i * 7 + i * 31) % config.vocab_size) as u32).collect();
    let calls = || std::iter::once(0..PROMPT).chain((PROMPT..PROMPT + STEPS).map(|position| position..position + 1));
    let expected = calls().map(|call| -> Result<Vec<f32>> {
        let logits = original(&Tensor::new(&tokens[call.clone()], &Device::Cpu)?.unsqueeze(0)?, call.start)?;
        Ok(logits.flatten_all()?.to_vec1()?)
    });
    let expected = expected.collect::<Result<Vec<_>>>()?;
    let largest = expected.iter().flatten().fold(0f32, |largest, logit| largest.max(logit.abs()));

    for dense in [true, false] {
        let mut checkpoint = Checkpoint::open(directory.path().to_str().unwrap())?;
        assert_eq!(checkpoint.config()?, *config, "{model_type}");
        let weights = Weights::new(checkpoint, config, DType::F32, &Device::Cpu)?;
        // Sparse attention with a budget that leaves no key out.
        let pq = PqConfig { pq_dim: 4, heavy: Heavy::Fraction(1.), ..PqConfig::default() };
        let mut model = Model::new(config, weights, &pq, tokens.len())?;
        for (call, expected) in calls().zip(&expected) {
            let logits = model.forward(&tokens[call.clone()], dense)?;
            ensure!(logits.len() == expected.len(), "{} logits, expected {}", logits.len(), expected.len());
            let off = logits.iter().zip(expected).map(|(l, e)| (l - e).abs()).fold(0f32, f32::max);
            assert!(off < 2e-5 * largest, "{model_type}, dense {dense}, {call:?}: off by {off} of {largest}");
        }
    }
    Ok(())
}

fn compare_llama(config: &ModelConfig) -> Result<()> {
    compare("llama", config, json!({}), |fields, weights| {
        let config = serde_json::from_str::<llama::LlamaConfig>(fields)?.into_config(false);
        let mut cache = llama::Cache::new(true, DType::F32, &config, &Device::Cpu)?;
        let model = llama::Llama::load(weights, &config)?;
        Ok(Box::new(move |tokens, start| model.forward(tokens, start, &mut cache)))
    })
}

#[test]
fn llama() -> Result<()> {
    compare_llama(&square())?;
    compare_llama(&ModelConfig { tied_embeddings: true, kv_heads: 4, rope_theta: 500_000., ..square() })
}

#[test]
fn llama3_rope_scaling() -> Result<()> {
    // Of eight frequencies some are kept, some stretched and some between.
    let rope_scaling =
        RopeScaling::Llama3 { factor: 8., low_freq_factor: 1., high_freq_factor: 4., original_context: 64. };
    compare_llama(&ModelConfig { rope_scaling, ..square() })
}

#[test]
fn mistral() -> Result<()> {
    compare("mistral", &tiny_config(), json!({ "sliding_window": null }), |fields, weights| {
        let mut model = mistral::Model::new(&serde_json::from_str(fields)?, weights)?;
        Ok(Box::new(move |tokens, start| model.forward(tokens, start)))
    })
}

#[test]
fn mistral_with_a_sliding_window() -> Result<()> {
    // Shorter than the prompt.
    let window = 10;
    let config = ModelConfig { layer_kinds: vec![LayerKind::Sliding(window); 2], ..tiny_config() };
    // The original sees a key more than its window has, and in a decode step all: each step is a prompt to it.
    compare("mistral", &config, json!({ "sliding_window": window - 1 }), |fields, weights| {
        let mut model = mistral::Model::new(&serde_json::from_str(fields)?, weights)?;
        let mut read: Option<Tensor> = None;
        Ok(Box::new(move |tokens, _| {
            let all = read.iter().chain([tokens]).cloned().collect::<Vec<_>>();
            let all = Tensor::cat(&all, 1)?;
            read = Some(all.clone());
            model.clear_kv_cache();
            model.forward(&all, 0)
        }))
    })
}

#[test]
fn qwen2() -> Result<()> {
    for tied_embeddings in [false, true] {
        let config = ModelConfig { qkv_bias: true, tied_embeddings, ..square() };
        let unused = json!({
            "sliding_window": 256, "use_sliding_window": false, "max_window_layers": 2, "hidden_act": "silu"
        });
        compare("qwen2", &config, unused, |fields, weights| {
            let mut model = qwen2::ModelForCausalLM::new(&serde_json::from_str(fields)?, weights)?;
            Ok(Box::new(move |tokens, start| model.forward(tokens, start)))
        })?;
    }
    Ok(())
}

#[test]
fn qwen3() -> Result<()> {
    let config = ModelConfig { qk_norm: true, ..tiny_config() };
    let unused = json!({
        "attention_bias": false, "sliding_window": null, "use_sliding_window": false, "max_window_layers": 2,
        "hidden_act": "silu"
    });
    compare("qwen3", &config, unused, |fields, weights| {
        let mut model = qwen3::ModelForCausalLM::new(&serde_json::from_str(fields)?, weights)?;
        Ok(Box::new(move |tokens, start| model.forward(tokens, start)))
    })
}

#[test]
fn phi3() -> Result<()> {
    for tied_embeddings in [false, true] {
        let config = ModelConfig { fused: true, tied_embeddings, ..square() };
        compare("phi3", &config, json!({ "hidden_act": "silu" }), |fields, weights| {
            let mut model = phi3::Model::new(&serde_json::from_str(fields)?, weights)?;
            Ok(Box::new(move |tokens, start| model.forward(tokens, start)))
        })?;
    }
    Ok(())
}

#[test]
fn smollm3() -> Result<()> {
    use LayerKind::{Global, NoRope};
    for tied_embeddings in [false, true] {
        let layer_kinds = vec![NoRope, Global, Global];
        let config = ModelConfig { layers: 3, layer_kinds, tied_embeddings, ..square() };
        compare("smollm3", &config, json!({ "hidden_act": "silu" }), |fields, weights| {
            let mut model = smollm3::ModelForCausalLM::new(&serde_json::from_str(fields)?, weights)?;
            Ok(Box::new(move |tokens, start| model.forward(tokens, start)))
        })?;
    }
    Ok(())
}

#[test]
fn gemma3() -> Result<()> {
    // Shorter than the prompt.
    let window = LayerKind::Sliding(10);
    let gemma = ModelConfig { gemma: true, qk_norm: true, tied_embeddings: true, layers: 3, ..tiny_config() };
    let config = ModelConfig {
        layer_kinds: vec![window, LayerKind::Global, window],
        local_rope_theta: Some(100.),
        // The head dimension, which the original takes always.
        query_pre_attn_scalar: Some(16.),
        ..gemma
    };
    let asked_for = json!({ "attention_bias": false, "sliding_window_pattern": 2 });
    compare("gemma3_text", &config, asked_for, |fields, weights| {
        let mut model = gemma3::Model::new(false, &serde_json::from_str(fields)?, weights)?;
        // In a prompt the original fails with several key-value heads, and masks a key too few: token by token.
        Ok(Box::new(move |tokens, start| {
            let mut steps = (0..tokens.dim(1)?).map(|i| model.forward(&tokens.narrow(1, i, 1)?, start + i));
            steps.try_fold(None, |_, logits| logits.map(Some))?.ok_or_else(|| candle_core::Error::msg("no tokens"))
        }))
    })
}

/// Logits of Hugging Face's models, where candle-transformers has none to compare with: scripts/parity-vectors.py.
#[test]
fn hugging_face() -> Result<()> {
    let vectors = Path::new(env!("CARGO_MANIFEST_DIR")).join("examples/common/vectors");
    for name in ["gemma3", "phi3-longrope"] {
        let directory = vectors.join(name);
        let expected = candle_core::safetensors::load(directory.join("vectors.safetensors"), &Device::Cpu)?;
        let tokens = expected["tokens"].to_vec1::<u32>()?;
        let expected = expected["logits"].to_vec2::<f32>()?;
        let largest = expected.iter().flatten().fold(0f32, |largest, logit| largest.max(logit.abs()));
        for prompt in [1, 25, 50] {
            let mut checkpoint = Checkpoint::Directory(directory.clone());
            let config = checkpoint.config()?;
            let weights = Weights::new(checkpoint, &config, DType::F32, &Device::Cpu)?;
            let mut model = Model::new(&config, weights, &PqConfig { pq_dim: 4, ..PqConfig::default() }, tokens.len())?;
            let calls = std::iter::once(0..prompt).chain((prompt..tokens.len()).map(|i| i..i + 1));
            for call in calls {
                let logits = model.forward(&tokens[call.clone()], true)?;
                let expected = &expected[call.end - 1];
                ensure!(logits.len() == expected.len(), "{name}: {} logits", logits.len());
                let off = logits.iter().zip(expected).map(|(l, e)| (l - e).abs()).fold(0f32, f32::max);
                assert!(off < 2e-5 * largest, "{name}, prompt of {prompt}, {call:?}: off by {off} of {largest}");
            }
        }
    }
    Ok(())
}
