//! Models small enough to be written by a test, and an independent f64 forward pass to hold them against.

use std::collections::{BTreeMap, HashMap};
use std::f64::consts::PI;
use std::fs::File;
use std::path::Path;

use anyhow::Result;
use candle_core::quantized::gguf_file::{self, Value};
use candle_core::quantized::{GgmlDType, QTensor};
use candle_core::{Device, Tensor};
use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};
use serde_json::{json, Value as Json};
use tokenizers::models::bpe::{Vocab, BPE};
use tokenizers::pre_tokenizers::byte_level::ByteLevel;
use tokenizers::{AddedToken, Tokenizer};

use crate::common::config::{LayerKind, ModelConfig, RopeScaling};
use crate::common::weights::INTERLEAVED;

/// Named as Hugging Face does.
pub type Tensors = BTreeMap<String, Tensor>;

pub const SPECIALS: [&str; 3] = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"];
pub const MERGES: [(&str, &str); 2] = [("h", "e"), ("1", "2")];

/// The special tokens, the 256 bytes, the merges.
pub fn vocabulary() -> Vec<String> {
    let mut bytes: Vec<String> = ByteLevel::alphabet().into_iter().map(String::from).collect();
    bytes.sort();
    let merged = MERGES.map(|(a, b)| format!("{a}{b}"));
    SPECIALS.map(String::from).into_iter().chain(bytes).chain(merged).collect()
}

pub fn tiny_config() -> ModelConfig {
    ModelConfig {
        vocab_size: vocabulary().len(),
        hidden_size: 24,
        intermediate_size: 40,
        layers: 2,
        heads: 4,
        kv_heads: 2,
        head_dim: 16,
        rms_norm_eps: 1e-5,
        rope_theta: 10_000.,
        rope_scaling: RopeScaling::None,
        context: 256,
        tied_embeddings: false,
        qkv_bias: false,
        qk_norm: false,
        fused: false,
        gemma: false,
        query_pre_attn_scalar: None,
        local_rope_theta: None,
        layer_kinds: Vec::new(),
    }
}

/// Random weights for `config`, large enough for attention to prefer some keys over others; the same each time, for with
/// some an answer ends before it begins.
pub fn tiny_tensors(config: &ModelConfig) -> Result<Tensors> {
    let &ModelConfig { vocab_size, hidden_size, intermediate_size, head_dim, .. } = config;
    let (q_size, kv_size) = (config.heads * head_dim, config.kv_heads * head_dim);
    let mut shapes = vec![
        ("model.embed_tokens.weight".to_string(), vec![vocab_size, hidden_size]),
        ("model.norm.weight".to_string(), vec![hidden_size]),
    ];
    if !config.tied_embeddings {
        shapes.push(("lm_head.weight".to_string(), vec![vocab_size, hidden_size]));
    }
    for layer in 0..config.layers {
        let mut add =
            |part: &str, shape: &[usize]| shapes.push((format!("model.layers.{layer}.{part}"), shape.to_vec()));
        add("input_layernorm.weight", &[hidden_size]);
        add("post_attention_layernorm.weight", &[hidden_size]);
        if config.gemma {
            add("pre_feedforward_layernorm.weight", &[hidden_size]);
            add("post_feedforward_layernorm.weight", &[hidden_size]);
        }
        let (qkv, gate_up): (&[_], &[_]) = match config.fused {
            true => (&[("qkv", q_size + 2 * kv_size)], &[("gate_up", 2 * intermediate_size)]),
            false => (
                &[("q", q_size), ("k", kv_size), ("v", kv_size)],
                &[("gate", intermediate_size), ("up", intermediate_size)],
            ),
        };
        for &(part, size) in qkv {
            add(&format!("self_attn.{part}_proj.weight"), &[size, hidden_size]);
            if config.qkv_bias {
                add(&format!("self_attn.{part}_proj.bias"), &[size]);
            }
        }
        if config.qk_norm {
            add("self_attn.q_norm.weight", &[head_dim]);
            add("self_attn.k_norm.weight", &[head_dim]);
        }
        add("self_attn.o_proj.weight", &[hidden_size, q_size]);
        for &(part, size) in gate_up {
            add(&format!("mlp.{part}_proj.weight"), &[size, hidden_size]);
        }
        add("mlp.down_proj.weight", &[hidden_size, intermediate_size]);
    }
    let mut rng = StdRng::seed_from_u64(1);
    let mut random = |(name, shape): (String, Vec<usize>)| {
        let numbers: Vec<f32> = (0..shape.iter().product()).map(|_| rng.random_range(-0.5..0.5)).collect();
        Ok((name, Tensor::from_vec(numbers, shape, &Device::Cpu)?))
    };
    shapes.into_iter().map(&mut random).collect()
}

/// Writes a model in the layout of Hugging Face, its weights cut into `shards`.
pub fn write_directory(
    directory: &Path,
    model_type: &str,
    config: &ModelConfig,
    tensors: &Tensors,
    shards: usize,
) -> Result<()> {
    std::fs::write(directory.join("config.json"), config_json(model_type, config).to_string())?;
    tokenizer()?.save(directory.join("tokenizer.json"), false).map_err(anyhow::Error::msg)?;
    if shards == 1 {
        let tensors: HashMap<_, _> = tensors.clone().into_iter().collect();
        return Ok(candle_core::safetensors::save(&tensors, directory.join("model.safetensors"))?);
    }
    let mut weight_map = HashMap::new();
    for shard in 0..shards {
        let file = format!("model-{}-of-{shards}.safetensors", shard + 1);
        let part = tensors.clone().into_iter().enumerate().filter(|(index, _)| index % shards == shard);
        let part: HashMap<String, Tensor> = part.map(|(_, named)| named).collect();
        candle_core::safetensors::save(&part, directory.join(&file))?;
        weight_map.extend(part.into_keys().map(|name| (name, file.clone())));
    }
    let index = json!({ "weight_map": weight_map }).to_string();
    Ok(std::fs::write(directory.join("model.safetensors.index.json"), index)?)
}

fn config_json(model_type: &str, config: &ModelConfig) -> Json {
    let rope_scaling = match &config.rope_scaling {
        RopeScaling::Llama3 { factor, low_freq_factor, high_freq_factor, original_context } => json!({
            "rope_type": "llama3", "factor": factor, "low_freq_factor": low_freq_factor,
            "high_freq_factor": high_freq_factor, "original_max_position_embeddings": *original_context as usize,
        }),
        RopeScaling::Linear(factor) => json!({ "rope_type": "linear", "factor": factor }),
        RopeScaling::LongRope { divisors, attention_factor } => json!({
            "type": "longrope", "short_factor": [], "long_factor": divisors, "attention_factor": attention_factor,
            "original_max_position_embeddings": config.context / 2,
        }),
        RopeScaling::None | RopeScaling::Divisors(_) => Json::Null,
    };
    let rotated = |layer| usize::from(config.layer_kind(layer) != LayerKind::NoRope);
    let mut json = json!({
        "model_type": model_type, "vocab_size": config.vocab_size, "hidden_size": config.hidden_size,
        "intermediate_size": config.intermediate_size, "num_hidden_layers": config.layers,
        "num_attention_heads": config.heads, "num_key_value_heads": config.kv_heads, "head_dim": config.head_dim,
        "rms_norm_eps": config.rms_norm_eps, "rope_theta": config.rope_theta, "rope_scaling": rope_scaling,
        "max_position_embeddings": config.context, "tie_word_embeddings": config.tied_embeddings, "eos_token_id": 0,
        "no_rope_layers": (0..config.layers).map(rotated).collect::<Vec<_>>(),
    });
    let windows: Vec<_> = (0..config.layers).map(|layer| window(config.layer_kind(layer))).collect();
    json["sliding_window"] = windows.iter().flatten().next().copied().into();
    if config.gemma {
        let layer_type = |window: &Option<usize>| if window.is_some() { "sliding_attention" } else { "full_attention" };
        json["layer_types"] = windows.iter().map(layer_type).collect();
        json["query_pre_attn_scalar"] = config.query_pre_attn_scalar.map(|scalar| scalar as usize).into();
        json["rope_local_base_freq"] = config.local_rope_theta.into();
        json["hidden_activation"] = "gelu_pytorch_tanh".into();
    }
    json
}

fn window(kind: LayerKind) -> Option<usize> {
    match kind {
        LayerKind::Sliding(window) => Some(window),
        LayerKind::Global | LayerKind::NoRope => None,
    }
}

fn tokenizer() -> Result<Tokenizer> {
    let vocab: Vocab = vocabulary().into_iter().zip(0..).collect();
    let merges = MERGES.map(|(a, b)| (a.to_string(), b.to_string())).to_vec();
    let bpe = BPE::builder().vocab_and_merges(vocab, merges).build().map_err(anyhow::Error::msg)?;
    let mut tokenizer = Tokenizer::new(bpe);
    tokenizer.with_pre_tokenizer(Some(ByteLevel::new(false, true, true)));
    tokenizer.with_decoder(Some(ByteLevel::default()));
    let specials = SPECIALS.map(|token| AddedToken::from(token, true));
    tokenizer.add_special_tokens(specials).map_err(anyhow::Error::msg)?;
    Ok(tokenizer)
}

/// The metadata of a GGUF file; `pre` names its pre-tokenizer.
pub fn gguf_metadata(architecture: &str, config: &ModelConfig, pre: &str) -> Vec<(String, Value)> {
    let integer = |n: usize| Value::U32(n as u32);
    let texts = |texts: Vec<String>| Value::Array(texts.into_iter().map(Value::String).collect());
    let token_type = |index| Value::I32(if index < SPECIALS.len() { 3 } else { 1 });
    let own = |name: &str, value| (format!("{architecture}.{name}"), value);
    let tokenizer = |name: &str, value| (format!("tokenizer.ggml.{name}"), value);
    let float = |n: f64| Value::F32(n as f32);
    let scaling = match &config.rope_scaling {
        RopeScaling::Linear(factor) => {
            vec![own("rope.scaling.type", Value::String("linear".into())), own("rope.scaling.factor", float(*factor))]
        }
        RopeScaling::LongRope { attention_factor, .. } => vec![
            own("rope.scaling.original_context_length", integer(config.context / 2)),
            own("rope.scaling.attn_factor", float(*attention_factor)),
        ],
        _ => vec![],
    };
    let global = config.layer_kinds.iter().position(|kind| *kind == LayerKind::Global);
    let sliding = config.layer_kinds.iter().find_map(|kind| window(*kind)).into_iter().flat_map(|window| {
        [
            own("attention.sliding_window", integer(window)),
            own("attention.sliding_window_pattern", integer(global.map_or(1, |layer| layer + 1))),
        ]
    });
    let local = config.local_rope_theta.map(|theta| own("rope.freq_base_swa", float(theta)));
    let common = vec![
        ("general.architecture".into(), Value::String(architecture.into())),
        own("block_count", integer(config.layers)),
        own("context_length", integer(config.context)),
        own("embedding_length", integer(config.hidden_size)),
        own("feed_forward_length", integer(config.intermediate_size)),
        own("attention.head_count", integer(config.heads)),
        own("attention.head_count_kv", integer(config.kv_heads)),
        own("attention.key_length", integer(config.head_dim)),
        own("attention.layer_norm_rms_epsilon", Value::F32(config.rms_norm_eps as f32)),
        own("rope.freq_base", Value::F32(config.rope_theta as f32)),
        tokenizer("model", Value::String("gpt2".into())),
        tokenizer("pre", Value::String(pre.into())),
        tokenizer("tokens", texts(vocabulary())),
        tokenizer("merges", texts(MERGES.map(|(a, b)| format!("{a} {b}")).to_vec())),
        tokenizer("token_type", Value::Array((0..config.vocab_size).map(token_type).collect())),
        tokenizer("bos_token_id", Value::U32(1)),
        tokenizer("eos_token_id", Value::U32(0)),
    ];
    common.into_iter().chain(scaling).chain(sliding).chain(local).collect()
}

/// Writes a GGUF file of f32 tensors, those of some architectures interleaved as is the custom there.
pub fn write_gguf(
    path: &Path,
    architecture: &str,
    config: &ModelConfig,
    tensors: &Tensors,
    metadata: &[(String, Value)],
) -> Result<()> {
    write_gguf_of(GgmlDType::F32, path, architecture, config, tensors, metadata)
}

/// As [`write_gguf`], with its matrices in another type.
pub fn write_gguf_of(
    dtype: GgmlDType,
    path: &Path,
    architecture: &str,
    config: &ModelConfig,
    tensors: &Tensors,
    metadata: &[(String, Value)],
) -> Result<()> {
    let renamed = tensors.iter().map(|(name, tensor)| {
        let projection = name.contains("q_proj") || name.contains("k_proj");
        let tensor = match projection && INTERLEAVED.contains(&architecture) {
            true => tensor
                .reshape((tensor.dim(0)? / config.head_dim, 2, config.head_dim / 2, ()))?
                .transpose(1, 2)?
                .reshape(tensor.shape())?,
            false => tensor.clone(),
        };
        // Gemma's norms have their 1 there.
        let tensor = if config.gemma && name.ends_with("norm.weight") { (tensor + 1.)? } else { tensor };
        let dtype = if tensor.rank() == 2 { dtype } else { GgmlDType::F32 };
        Ok((gguf_name(name, config.gemma), QTensor::quantize(&tensor, dtype)?))
    });
    let mut renamed = renamed.collect::<Result<Vec<_>>>()?;
    if let RopeScaling::LongRope { divisors, .. } = &config.rope_scaling {
        let divisors: Vec<f32> = divisors.iter().map(|&divisor| divisor as f32).collect();
        let divisors = Tensor::from_vec(divisors, config.head_dim / 2, &Device::Cpu)?;
        for (name, divisors) in [("long", divisors.clone()), ("short", divisors.ones_like()?)] {
            let divisors = QTensor::quantize(&divisors, GgmlDType::F32)?;
            renamed.push((format!("rope_factors_{name}.weight"), divisors));
        }
    }
    let renamed: Vec<_> = renamed.iter().map(|(name, tensor)| (name.as_str(), tensor)).collect();
    let metadata: Vec<_> = metadata.iter().map(|(name, value)| (name.as_str(), value)).collect();
    Ok(gguf_file::write(&mut File::create(path)?, &metadata, &renamed)?)
}

fn gguf_name(name: &str, gemma: bool) -> String {
    [
        ("post_attention_layernorm", if gemma { "post_attention_norm" } else { "ffn_norm" }),
        ("pre_feedforward_layernorm", "ffn_norm"),
        ("post_feedforward_layernorm", "post_ffw_norm"),
        ("model.layers", "blk"),
        ("model.embed_tokens", "token_embd"),
        ("model.norm", "output_norm"),
        ("lm_head", "output"),
        ("input_layernorm", "attn_norm"),
        ("self_attn.o_proj", "attn_output"),
        ("mlp.gate_up_proj", "ffn_up"),
        ("self_attn.", "attn_"),
        ("mlp.", "ffn_"),
        ("_proj", ""),
    ]
    .iter()
    .fold(name.to_string(), |name, (hf, gguf)| name.replace(hf, gguf))
}

/// The tensors with those that are fused cut into the ones that they stand for.
fn unfused(config: &ModelConfig, tensors: &Tensors) -> Result<Tensors> {
    let (q_size, kv_size) = (config.heads * config.head_dim, config.kv_heads * config.head_dim);
    let mut all = tensors.clone();
    for (name, tensor) in tensors.iter().filter(|_| config.fused) {
        let parts = match name {
            _ if name.contains("qkv_proj") => vec![("qkv", "q", q_size), ("qkv", "k", kv_size), ("qkv", "v", kv_size)],
            _ if name.contains("gate_up_proj") => {
                vec![("gate_up", "gate", config.intermediate_size), ("gate_up", "up", config.intermediate_size)]
            }
            _ => vec![],
        };
        let mut row = 0;
        for (fused, part, rows) in parts {
            all.insert(name.replace(fused, part), tensor.narrow(0, row, rows)?);
            row += rows;
        }
    }
    Ok(all)
}

/// The logits after `tokens`, by the book: one position, head and number at a time.
pub fn naive_logits(config: &ModelConfig, tensors: &Tensors, tokens: &[u32]) -> Result<Vec<f64>> {
    let tensors = unfused(config, tensors)?;
    let vector = |name: &str| -> Result<Vec<f64>> {
        Ok(tensors[name].flatten_all()?.to_vec1::<f32>()?.into_iter().map(f64::from).collect())
    };
    let linear = |name: &str, x: &[f64]| -> Result<Vec<f64>> {
        let weight = vector(&format!("{name}.weight"))?;
        let mut y: Vec<f64> = weight.chunks(x.len()).map(|row| row.iter().zip(x).map(|(w, x)| w * x).sum()).collect();
        if tensors.contains_key(&format!("{name}.bias")) {
            y.iter_mut().zip(vector(&format!("{name}.bias"))?).for_each(|(y, bias)| *y += bias);
        }
        Ok(y)
    };
    let norm = |name: &str, x: &[f64]| -> Result<Vec<f64>> {
        let mean_square = x.iter().map(|x| x * x).sum::<f64>() / x.len() as f64;
        let scale = 1. / (mean_square + config.rms_norm_eps).sqrt();
        let missing = if config.gemma { 1. } else { 0. };
        let weights = vector(&format!("{name}.weight"))?;
        Ok(x.iter().zip(weights).map(|(x, weight)| x * scale * (weight + missing)).collect())
    };
    let d = config.head_dim;
    let rotate = |head: &mut [f64], position: usize, kind: LayerKind| {
        let (theta, stretch) = match (kind, config.local_rope_theta, &config.rope_scaling) {
            (LayerKind::NoRope, ..) => return,
            (LayerKind::Sliding(_), Some(theta), _) => (theta, 1.),
            (_, _, RopeScaling::Linear(factor)) => (config.rope_theta, *factor),
            _ => (config.rope_theta, 1.),
        };
        let (divisors, factor) = match &config.rope_scaling {
            RopeScaling::LongRope { divisors, attention_factor } => (divisors.as_slice(), *attention_factor),
            _ => (&[][..], 1.),
        };
        for i in 0..d / 2 {
            let stretch = divisors.get(i).unwrap_or(&stretch);
            let angle = position as f64 / stretch * theta.powf(-2. * i as f64 / d as f64);
            let (a, b) = (factor * head[i], factor * head[i + d / 2]);
            head[i] = a * angle.cos() - b * angle.sin();
            head[i + d / 2] = b * angle.cos() + a * angle.sin();
        }
    };
    let embeddings = vector("model.embed_tokens.weight")?;
    let mut xs: Vec<Vec<f64>> =
        tokens.iter().map(|&t| embeddings.chunks(config.hidden_size).nth(t as usize).unwrap().to_vec()).collect();
    if config.gemma {
        xs.iter_mut().flatten().for_each(|x| *x *= (config.hidden_size as f64).sqrt());
    }
    let score_scale = 1. / config.query_pre_attn_scalar.unwrap_or(d as f64).sqrt();
    for layer in 0..config.layers {
        let name = |part: &str| format!("model.layers.{layer}.{part}");
        let (mut qs, mut ks, mut vs) = (Vec::new(), Vec::new(), Vec::new());
        for (position, x) in xs.iter().enumerate() {
            let x = norm(&name("input_layernorm"), x)?;
            let project = |part: &str, rotated: bool| -> Result<Vec<f64>> {
                let mut all = linear(&name(&format!("self_attn.{part}_proj")), &x)?;
                for head in all.chunks_mut(d).filter(|_| rotated) {
                    if config.qk_norm {
                        head.copy_from_slice(&norm(&name(&format!("self_attn.{part}_norm")), head)?);
                    }
                    rotate(head, position, config.layer_kind(layer));
                }
                Ok(all)
            };
            qs.push(project("q", true)?);
            ks.push(project("k", true)?);
            vs.push(project("v", false)?);
        }
        for (position, x) in xs.iter_mut().enumerate() {
            let first = window(config.layer_kind(layer)).map_or(0, |window| (position + 1).saturating_sub(window));
            let mut attended = Vec::new();
            for head in 0..config.heads {
                let kv = head / (config.heads / config.kv_heads) * d;
                let q = &qs[position][head * d..][..d];
                let score = |k: &Vec<f64>| q.iter().zip(&k[kv..]).map(|(q, k)| q * k).sum::<f64>() * score_scale;
                let exps: Vec<f64> = ks[first..=position].iter().map(|k| score(k).exp()).collect();
                let sum: f64 = exps.iter().sum();
                attended.extend(
                    (0..d).map(|i| exps.iter().zip(&vs[first..]).map(|(e, v)| e * v[kv + i]).sum::<f64>() / sum),
                );
            }
            let mut out = linear(&name("self_attn.o_proj"), &attended)?;
            if config.gemma {
                out = norm(&name("post_attention_layernorm"), &out)?;
            }
            x.iter_mut().zip(out).for_each(|(x, y)| *x += y);
            let before_mlp = if config.gemma { "pre_feedforward_layernorm" } else { "post_attention_layernorm" };
            let normed = norm(&name(before_mlp), x)?;
            let activate = |g: f64| match config.gemma {
                true => g / 2. * (1. + ((2. / PI).sqrt() * (g + 0.044715 * g.powi(3))).tanh()),
                false => g / (1. + (-g).exp()),
            };
            let gate = linear(&name("mlp.gate_proj"), &normed)?.into_iter().map(activate);
            let gated: Vec<f64> = gate.zip(linear(&name("mlp.up_proj"), &normed)?).map(|(g, u)| g * u).collect();
            let mut out = linear(&name("mlp.down_proj"), &gated)?;
            if config.gemma {
                out = norm(&name("post_feedforward_layernorm"), &out)?;
            }
            x.iter_mut().zip(out).for_each(|(x, y)| *x += y);
        }
    }
    let last = norm("model.norm", &xs[xs.len() - 1])?;
    linear(if config.tied_embeddings { "model.embed_tokens" } else { "lm_head" }, &last)
}
