//! What a model of the Llama family is made of, read from a checkpoint.

use anyhow::{bail, ensure, Context, Result};
use candle_core::quantized::gguf_file::{Content, Value};
use serde::Deserialize;
use serde_json::{json, Value as Json};

/// Dimensions and options of a decoder.
#[derive(Debug, Clone, PartialEq)]
pub struct ModelConfig {
    pub vocab_size: usize,
    pub hidden_size: usize,
    pub intermediate_size: usize,
    pub layers: usize,
    pub heads: usize,
    pub kv_heads: usize,
    pub head_dim: usize,
    pub rms_norm_eps: f64,
    pub rope_theta: f64,
    pub rope_scaling: RopeScaling,
    /// Positions that the model was made for.
    pub context: usize,
    /// The embedding is the last layer's weight too.
    pub tied_embeddings: bool,
    /// Biases in the projections to queries, keys and values: Qwen2.
    pub qkv_bias: bool,
    /// RMS norm of each head's queries and keys: Qwen3.
    pub qk_norm: bool,
    /// One tensor for the projections to queries, keys and values, and one for gate and up: Phi-3.
    pub fused: bool,
    /// Norms behind attention and MLP too, norms' weights less 1, GELU for SiLU, and embeddings that are scaled by the
    /// root of their size: Gemma 3.
    pub gemma: bool,
    /// What scores are divided by the root of, where it is not the head dimension.
    pub query_pre_attn_scalar: Option<f64>,
    /// `rope_theta` of the layers with a sliding window, where it is another; they are not stretched then.
    pub local_rope_theta: Option<f64>,
    /// What differs between layers: one each, or none where all are [`LayerKind::Global`].
    pub layer_kinds: Vec<LayerKind>,
}

/// How a layer attends.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum LayerKind {
    /// To all keys, by rotary embedding.
    Global,
    /// To all keys, wherever they are: SmolLM3.
    NoRope,
    /// To so many keys, the last: Gemma 3.
    Sliding(usize),
}

/// How the rotary embedding was stretched to a longer context.
#[derive(Debug, Clone, PartialEq)]
pub enum RopeScaling {
    None,
    /// Positions divided by a factor.
    Linear(f64),
    /// Slow frequencies divided by a factor, fast ones kept: Llama 3.1 and later.
    Llama3 {
        factor: f64,
        low_freq_factor: f64,
        high_freq_factor: f64,
        original_context: f64,
    },
    /// Each frequency divided by its own number, as GGUF files spell out the above.
    Divisors(Vec<f64>),
    /// The same, and rotated elements multiplied with a number: Phi-3.
    LongRope {
        divisors: Vec<f64>,
        attention_factor: f64,
    },
}

const ARCHITECTURES: &str = "llama, mistral, qwen2, qwen3, phi3, smollm3, gemma3";

/// Differences that only the architecture's name tells.
#[derive(Default)]
struct Architecture {
    qkv_bias: bool,
    qk_norm: bool,
    fused: bool,
    gemma: bool,
    tied_embeddings: bool,
    /// Of so many layers each last one is without rotary embedding.
    no_rope_interval: Option<usize>,
    /// Of so many layers each last one is without a sliding window.
    global_interval: Option<usize>,
}

impl Architecture {
    fn named(name: &str) -> Result<Self> {
        let llama = Self::default();
        Ok(match name {
            "llama" | "mistral" => llama,
            "qwen2" => Self { qkv_bias: true, ..llama },
            "qwen3" => Self { qk_norm: true, ..llama },
            "phi3" => Self { fused: true, ..llama },
            "smollm3" => Self { tied_embeddings: true, no_rope_interval: Some(4), ..llama },
            "gemma3" | "gemma3_text" => {
                Self { gemma: true, qk_norm: true, tied_embeddings: true, global_interval: Some(6), ..llama }
            }
            other => bail!("architecture {other:?} is not one of {ARCHITECTURES}: choose a model of these"),
        })
    }

    /// What differs between layers, by what the model states or else the architecture's interval.
    fn layer_kinds(&self, layers: usize, stated: &LayerPattern) -> Result<Vec<LayerKind>> {
        use LayerKind::{Global, NoRope, Sliding};
        ensure!(layers <= 1 << 12, "{layers} layers, expected at most {}", 1 << 12);
        let each_last = |interval: usize| (1..=layers).map(move |layer| layer.is_multiple_of(interval));
        if let Some(usual) = self.no_rope_interval {
            let no_rope: Vec<_> = match &stated.no_rope_layers {
                Some(rotated) => rotated.iter().map(|&rotated| rotated == 0).collect(),
                None => each_last(stated.no_rope_layer_interval.unwrap_or(usual)).collect(),
            };
            Ok(no_rope.into_iter().map(|no_rope| if no_rope { NoRope } else { Global }).collect())
        } else if let Some(usual) = self.global_interval {
            let sliding = Sliding(stated.sliding_window.context("no sliding_window")?);
            match &stated.layer_types {
                Some(types) => {
                    let kinds = types.iter().map(|name| match name.as_str() {
                        "full_attention" => Ok(Global),
                        "sliding_attention" => Ok(sliding),
                        other => bail!("layer type {other:?} is not one of full_attention, sliding_attention"),
                    });
                    kinds.collect()
                }
                None => {
                    let global = each_last(stated.sliding_window_pattern.unwrap_or(usual));
                    Ok(global.map(|global| if global { Global } else { sliding }).collect())
                }
            }
        } else {
            Ok(Vec::new())
        }
    }
}

impl ModelConfig {
    /// From the text of a Hugging Face `config.json`.
    pub fn from_json(text: &str) -> Result<Self> {
        let json: HfConfig = serde_json::from_value(with_gemma_defaults(serde_json::from_str(text)?))?;
        let architecture = Architecture::named(&json.model_type)?;
        let (act, usual) = match architecture.gemma {
            true => (json.hidden_activation, "gelu_pytorch_tanh"),
            false => (json.hidden_act, "silu"),
        };
        let act = act.as_deref().unwrap_or(usual);
        ensure!(act == usual, "hidden_act {act:?} is not {usual}");
        ensure!(
            !json.use_bidirectional_attention,
            "use_bidirectional_attention: it embeds texts and continues none, choose another model"
        );
        let softcapped = json.attn_logit_softcapping.or(json.final_logit_softcapping).is_some();
        ensure!(!softcapped, "attn_logit_softcapping and final_logit_softcapping are not supported");
        ensure!(!json.attention_bias && !json.mlp_bias, "attention_bias and mlp_bias are not supported");
        let mut rope = json.rope_parameters.or(json.rope_scaling).unwrap_or_default();
        let local = rope.sliding_attention.take().and_then(|local| local.rope_theta).or(json.rope_local_base_freq);
        rope = rope.full_attention.take().map_or(rope, |global| *global);
        let rotated = rope.partial_rotary_factor.or(json.partial_rotary_factor).unwrap_or(1.);
        ensure!(rotated == 1., "partial_rotary_factor {rotated} is not 1: only whole heads can be rotated");
        let config = Self {
            vocab_size: json.vocab_size,
            hidden_size: json.hidden_size,
            intermediate_size: json.intermediate_size,
            layers: json.num_hidden_layers,
            heads: json.num_attention_heads,
            kv_heads: json.num_key_value_heads.unwrap_or(json.num_attention_heads),
            head_dim: json.head_dim.unwrap_or(json.hidden_size / json.num_attention_heads.max(1)),
            rms_norm_eps: json.rms_norm_eps,
            rope_theta: rope.rope_theta.or(json.rope_theta).unwrap_or(10_000.),
            rope_scaling: rope.scaling(json.max_position_embeddings as f64, json.original_max_position_embeddings)?,
            context: json.max_position_embeddings,
            tied_embeddings: json.tie_word_embeddings.unwrap_or(architecture.tied_embeddings),
            qkv_bias: architecture.qkv_bias,
            qk_norm: architecture.qk_norm,
            fused: architecture.fused,
            gemma: architecture.gemma,
            query_pre_attn_scalar: json.query_pre_attn_scalar,
            local_rope_theta: local.filter(|_| architecture.gemma),
            layer_kinds: architecture.layer_kinds(json.num_hidden_layers, &json.pattern)?,
        };
        // Qwen states a window that it does not use.
        let uses_window = ["mistral", "phi3"].contains(&json.model_type.as_str());
        let window = json.pattern.sliding_window.filter(|_| json.use_sliding_window.unwrap_or(uses_window));
        config.checked(window)
    }

    /// From the metadata of a GGUF file; `rope_divisors` are its tensor `rope_freqs.weight`.
    pub fn from_gguf(content: &Content, rope_divisors: Option<Vec<f64>>) -> Result<Self> {
        let architecture =
            content.metadata.get("general.architecture").context("no general.architecture")?.to_string()?;
        let metadata = Metadata { content, architecture };
        let architecture = Architecture::named(architecture)?;
        ensure!(!architecture.gemma, "gemma3 is not supported as GGUF: give a directory in the layout of Hugging Face");
        let longrope = content.tensor_infos.contains_key("rope_factors_long.weight");
        ensure!(!longrope, "rope scaling \"longrope\" is not linear");
        let (heads, hidden_size) = (metadata.required("attention.head_count")?, metadata.required("embedding_length")?);
        let embedding = content.tensor_infos.get("token_embd.weight").context("no tensor token_embd.weight")?;
        let config = Self {
            vocab_size: embedding.shape.dims2()?.0,
            hidden_size,
            intermediate_size: metadata.required("feed_forward_length")?,
            layers: metadata.required("block_count")?,
            heads,
            kv_heads: metadata.integer("attention.head_count_kv")?.unwrap_or(heads),
            head_dim: metadata.integer("attention.key_length")?.unwrap_or(hidden_size / heads.max(1)),
            rms_norm_eps: metadata.float("attention.layer_norm_rms_epsilon")?.unwrap_or(1e-5),
            rope_theta: metadata.float("rope.freq_base")?.unwrap_or(10_000.),
            rope_scaling: match rope_divisors {
                Some(divisors) => RopeScaling::Divisors(divisors),
                None => metadata.rope_scaling()?,
            },
            context: metadata.required("context_length")?,
            tied_embeddings: !content.tensor_infos.contains_key("output.weight"),
            qkv_bias: architecture.qkv_bias,
            qk_norm: architecture.qk_norm,
            fused: architecture.fused,
            gemma: false,
            query_pre_attn_scalar: None,
            local_rope_theta: None,
            layer_kinds: architecture.layer_kinds(metadata.required("block_count")?, &LayerPattern::default())?,
        };
        let rotated = metadata.integer("rope.dimension_count")?.unwrap_or(config.head_dim);
        ensure!(rotated == config.head_dim, "only {rotated} of a head's {} elements are rotated", config.head_dim);
        config.checked(metadata.integer("attention.sliding_window")?)
    }

    /// What scores are multiplied with.
    pub fn attention_scale(&self) -> f32 {
        1. / (self.query_pre_attn_scalar.unwrap_or(self.head_dim as f64) as f32).sqrt()
    }

    /// How that layer attends.
    pub fn layer_kind(&self, layer: usize) -> LayerKind {
        self.layer_kinds.get(layer).copied().unwrap_or(LayerKind::Global)
    }

    /// Refuses what the model would compute wrongly.
    fn checked(self, sliding_window: Option<usize>) -> Result<Self> {
        let Self { heads, kv_heads, head_dim, context, .. } = self;
        ensure!(kv_heads > 0 && heads % kv_heads == 0, "{heads} heads cannot share {kv_heads} key-value heads");
        ensure!(head_dim > 0 && head_dim % 2 == 0, "head_dim {head_dim} is not even");
        // There are tables of all positions.
        for (name, number, most) in
            [("head_dim", head_dim, 256), ("heads", heads, 1 << 16), ("context", context, 1 << 20)]
        {
            ensure!(number <= most, "{name} {number} is more than {most}");
        }
        if let Some(window) = sliding_window.filter(|window| *window < context) {
            bail!("it attends to a sliding window of {window} tokens, which is not supported: choose another model");
        }
        let kinds = self.layer_kinds.len();
        ensure!([0, self.layers].contains(&kinds), "kinds of {kinds} layers are listed, expected {}", self.layers);
        if let RopeScaling::Divisors(divisors) | RopeScaling::LongRope { divisors, .. } = &self.rope_scaling {
            ensure!(divisors.len() == head_dim / 2, "{} rope divisors, expected {}", divisors.len(), head_dim / 2);
        }
        Ok(self)
    }
}

#[derive(Deserialize)]
struct HfConfig {
    model_type: String,
    vocab_size: usize,
    hidden_size: usize,
    intermediate_size: usize,
    num_hidden_layers: usize,
    num_attention_heads: usize,
    num_key_value_heads: Option<usize>,
    head_dim: Option<usize>,
    rms_norm_eps: f64,
    rope_theta: Option<f64>,
    rope_scaling: Option<HfRope>,
    rope_parameters: Option<HfRope>,
    partial_rotary_factor: Option<f64>,
    max_position_embeddings: usize,
    original_max_position_embeddings: Option<f64>,
    #[serde(flatten)]
    pattern: LayerPattern,
    use_sliding_window: Option<bool>,
    tie_word_embeddings: Option<bool>,
    #[serde(default)]
    attention_bias: bool,
    #[serde(default)]
    mlp_bias: bool,
    hidden_act: Option<String>,
    hidden_activation: Option<String>,
    query_pre_attn_scalar: Option<f64>,
    #[serde(default)]
    use_bidirectional_attention: bool,
    attn_logit_softcapping: Option<f64>,
    final_logit_softcapping: Option<f64>,
    rope_local_base_freq: Option<f64>,
}

/// Which layers are of which kind.
#[derive(Deserialize, Default)]
struct LayerPattern {
    /// 1 for each layer that has rotary embedding, whatever the name says.
    no_rope_layers: Option<Vec<usize>>,
    no_rope_layer_interval: Option<usize>,
    sliding_window: Option<usize>,
    #[serde(alias = "_sliding_window_pattern")]
    sliding_window_pattern: Option<usize>,
    layer_types: Option<Vec<String>>,
}

/// The text model's part of a Gemma 3, whose files leave out what is usual.
fn with_gemma_defaults(mut json: Json) -> Json {
    if json["model_type"] == "gemma3" {
        json = json["text_config"].take();
        json["model_type"] = "gemma3_text".into();
    }
    if json["model_type"] == "gemma3_text" {
        let usual = json!({
            "vocab_size": 262_208, "num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 256,
            "rms_norm_eps": 1e-6, "rope_theta": 1e6, "rope_local_base_freq": 1e4, "max_position_embeddings": 131_072,
            "query_pre_attn_scalar": 256, "sliding_window": 4096,
        });
        for (name, value) in usual.as_object().into_iter().flatten() {
            if json[name].is_null() {
                json[name] = value.clone();
            }
        }
    }
    json
}

/// `rope_scaling`, or `rope_parameters` in newer files.
#[derive(Deserialize, Default)]
struct HfRope {
    rope_type: Option<String>,
    /// Its name in older files; some have both.
    #[serde(rename = "type")]
    old_rope_type: Option<String>,
    rope_theta: Option<f64>,
    partial_rotary_factor: Option<f64>,
    factor: Option<f64>,
    low_freq_factor: Option<f64>,
    high_freq_factor: Option<f64>,
    original_max_position_embeddings: Option<f64>,
    short_factor: Option<Vec<f64>>,
    long_factor: Option<Vec<f64>>,
    attention_factor: Option<f64>,
    /// Where global layers and those with a sliding window have their own.
    full_attention: Option<Box<HfRope>>,
    sliding_attention: Option<Box<HfRope>>,
}

impl HfRope {
    /// For a model of that context, and of `original` before it was stretched if that is not stated here.
    fn scaling(self, context: f64, original: Option<f64>) -> Result<RopeScaling> {
        let number = |value: Option<f64>, name| value.with_context(|| format!("rope scaling lacks {name}"));
        match self.rope_type.as_deref().or(self.old_rope_type.as_deref()) {
            None | Some("default") => Ok(RopeScaling::None),
            Some("linear") => Ok(RopeScaling::Linear(number(self.factor, "factor")?)),
            Some("llama3") => Ok(RopeScaling::Llama3 {
                factor: number(self.factor, "factor")?,
                low_freq_factor: number(self.low_freq_factor, "low_freq_factor")?,
                high_freq_factor: number(self.high_freq_factor, "high_freq_factor")?,
                original_context: number(self.original_max_position_embeddings, "original_max_position_embeddings")?,
            }),
            Some("longrope" | "su") => {
                let original = self.original_max_position_embeddings.or(original);
                let original = number(original, "original_max_position_embeddings")?;
                // The original goes from the short to the long ones when a sequence outgrows the first context; keys
                // that are cached would have to be rotated anew.
                let divisors = if context > original { self.long_factor } else { self.short_factor };
                let usual = (1. + (context / original).max(1.).ln() / original.ln()).sqrt();
                Ok(RopeScaling::LongRope {
                    divisors: divisors.context("rope scaling lacks short_factor or long_factor")?,
                    attention_factor: self.attention_factor.unwrap_or(usual),
                })
            }
            Some(other) => bail!("rope scaling {other:?} is not one of linear, llama3, longrope"),
        }
    }
}

/// The keys of a GGUF file that begin with its architecture.
struct Metadata<'a> {
    content: &'a Content,
    architecture: &'a str,
}

impl Metadata<'_> {
    fn get(&self, name: &str) -> Option<&Value> {
        self.content.metadata.get(&format!("{}.{name}", self.architecture))
    }

    fn required(&self, name: &str) -> Result<usize> {
        self.integer(name)?.with_context(|| format!("no {}.{name}", self.architecture))
    }

    fn integer(&self, name: &str) -> Result<Option<usize>> {
        self.get(name).map(|value| integer(value).with_context(|| format!("{}.{name}", self.architecture))).transpose()
    }

    fn float(&self, name: &str) -> Result<Option<f64>> {
        let value = self.get(name).map(|value| value.to_f64().or_else(|_| value.to_f32().map(f64::from)));
        value.transpose().with_context(|| format!("{}.{name}", self.architecture))
    }

    fn rope_scaling(&self) -> Result<RopeScaling> {
        let kind = self.get("rope.scaling.type").map(|kind| kind.to_string()).transpose()?;
        match kind.map(String::as_str) {
            None | Some("none") => Ok(RopeScaling::None),
            Some("linear") => Ok(RopeScaling::Linear(self.float("rope.scaling.factor")?.unwrap_or(1.))),
            Some(other) => bail!("rope scaling {other:?} is not linear"),
        }
    }
}

/// Any integer that is not negative: writers of GGUF differ in its type.
pub fn integer(value: &Value) -> Result<usize> {
    let integer = match *value {
        Value::I8(v) => i64::from(v),
        Value::I16(v) => i64::from(v),
        Value::I32(v) => i64::from(v),
        Value::I64(v) => v,
        _ => return Ok(usize::try_from(value.to_u64()?)?),
    };
    Ok(usize::try_from(integer)?)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::common::testing::{gguf_metadata, tiny_config};
    use candle_core::quantized::gguf_file::{TensorInfo, VersionedMagic};
    use candle_core::quantized::GgmlDType;

    /// The fields that every file has, of Llama 3.2 1B.
    fn llama() -> Json {
        json!({
            "model_type": "llama", "vocab_size": 128256, "hidden_size": 2048, "intermediate_size": 8192,
            "num_hidden_layers": 16, "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 64,
            "rms_norm_eps": 1e-5, "rope_theta": 500000.0, "max_position_embeddings": 131072,
            "tie_word_embeddings": true, "hidden_act": "silu", "attention_bias": false, "mlp_bias": false,
            "rope_scaling": {
                "factor": 32.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
                "original_max_position_embeddings": 8192, "rope_type": "llama3"
            }
        })
    }

    fn with(changes: Json) -> Result<ModelConfig> {
        let mut json = llama();
        for (key, value) in changes.as_object().unwrap() {
            json[key] = value.clone();
        }
        ModelConfig::from_json(&json.to_string())
    }

    #[test]
    fn llama_is_read() -> Result<()> {
        let expected = ModelConfig {
            vocab_size: 128_256,
            hidden_size: 2048,
            intermediate_size: 8192,
            layers: 16,
            heads: 32,
            kv_heads: 8,
            head_dim: 64,
            rms_norm_eps: 1e-5,
            rope_theta: 500_000.,
            rope_scaling: RopeScaling::Llama3 {
                factor: 32.,
                low_freq_factor: 1.,
                high_freq_factor: 4.,
                original_context: 8192.,
            },
            context: 131_072,
            tied_embeddings: true,
            qkv_bias: false,
            qk_norm: false,
            fused: false,
            gemma: false,
            query_pre_attn_scalar: None,
            local_rope_theta: None,
            layer_kinds: Vec::new(),
        };
        assert_eq!(with(json!({}))?, expected);
        Ok(())
    }

    #[test]
    fn relatives_are_options() -> Result<()> {
        let qwen2 = with(json!({"model_type": "qwen2", "sliding_window": 1024, "use_sliding_window": false}))?;
        assert!(qwen2.qkv_bias && !qwen2.qk_norm);
        let qwen3 = with(json!({"model_type": "qwen3", "head_dim": 128, "sliding_window": null}))?;
        assert!(qwen3.qk_norm && !qwen3.qkv_bias && qwen3.head_dim == 128);
        let mistral = with(json!({"model_type": "mistral", "sliding_window": null, "head_dim": null}))?;
        assert_eq!(mistral.head_dim, 64);
        let phi3 = json!({"model_type": "phi3", "rope_scaling": null, "sliding_window": 131072});
        assert!(with(phi3)?.fused);
        let smollm3 = json!({"model_type": "smollm3", "num_hidden_layers": 5, "tie_word_embeddings": null});
        let (smollm3, all) = (with(smollm3)?, LayerKind::Global);
        assert_eq!(smollm3.layer_kinds, [all, all, all, LayerKind::NoRope, all]);
        assert!(smollm3.tied_embeddings);
        Ok(())
    }

    #[test]
    fn longrope_divides_by_what_suits_the_context() -> Result<()> {
        let longrope = json!({"type": "longrope", "short_factor": vec![1.0; 32], "long_factor": vec![9.0; 32]});
        let read = |context: usize| -> Result<(Vec<f64>, f64)> {
            let original = json!({
                "rope_scaling": longrope, "original_max_position_embeddings": 4096, "max_position_embeddings": context
            });
            match with(original)?.rope_scaling {
                RopeScaling::LongRope { divisors, attention_factor } => Ok((divisors, attention_factor)),
                other => bail!("{other:?}"),
            }
        };
        assert_eq!(read(4096)?, (vec![1.; 32], 1.));
        // Stretched 2^5 times from 2^12.
        let (divisors, attention_factor) = read(131_072)?;
        assert_eq!(divisors, [9.; 32]);
        assert!((attention_factor - (1f64 + 5. / 12.).sqrt()).abs() < 1e-12);
        Ok(())
    }

    #[test]
    fn gemma3_files_leave_out_what_is_usual() -> Result<()> {
        let text = json!({
            "hidden_size": 2560, "intermediate_size": 10240, "num_hidden_layers": 7, "sliding_window": 1024,
            "rope_scaling": {"factor": 8.0, "rope_type": "linear"}, "model_type": "gemma3_text"
        });
        let config = ModelConfig::from_json(&json!({"model_type": "gemma3", "text_config": text}).to_string())?;
        assert_eq!(config, ModelConfig::from_json(&text.to_string())?);
        let (local, all) = (LayerKind::Sliding(1024), LayerKind::Global);
        assert_eq!(config.layer_kinds, [local, local, local, local, local, all, local]);
        assert_eq!((config.rope_theta, config.local_rope_theta), (1e6, Some(1e4)));
        assert_eq!((config.rope_scaling, config.heads), (RopeScaling::Linear(8.), 8));
        assert!(config.gemma && config.qk_norm && config.tied_embeddings);

        let newer = json!({
            "model_type": "gemma3_text", "hidden_size": 2560, "intermediate_size": 10240, "num_hidden_layers": 2,
            "layer_types": ["full_attention", "sliding_attention"], "query_pre_attn_scalar": 64,
            "rope_parameters": {
                "full_attention": {"rope_type": "linear", "factor": 4.0, "rope_theta": 2e6},
                "sliding_attention": {"rope_type": "default", "rope_theta": 3e4}
            }
        });
        let newer = ModelConfig::from_json(&newer.to_string())?;
        assert_eq!(newer.layer_kinds, [all, LayerKind::Sliding(4096)]);
        assert_eq!((newer.rope_theta, newer.local_rope_theta), (2e6, Some(3e4)));
        assert_eq!((newer.attention_scale(), newer.rope_scaling), (1. / 8., RopeScaling::Linear(4.)));
        Ok(())
    }

    #[test]
    fn rope_parameters_have_two_forms() -> Result<()> {
        let scaled = with(json!({"rope_scaling": {"type": "linear", "factor": 4.0}}))?;
        assert_eq!(scaled.rope_scaling, RopeScaling::Linear(4.));
        let both = with(json!({"rope_scaling": {"type": "linear", "rope_type": "linear", "factor": 4.0}}))?;
        assert_eq!(both.rope_scaling, RopeScaling::Linear(4.));
        let newer = json!({"rope_scaling": null, "rope_parameters": {"rope_type": "default", "rope_theta": 1e6}});
        let newer = with(newer)?;
        assert_eq!((newer.rope_theta, newer.rope_scaling), (1e6, RopeScaling::None));
        Ok(())
    }

    #[test]
    fn what_would_be_computed_wrongly_is_refused() {
        for (changes, expected) in [
            (
                json!({"model_type": "gemma"}),
                "architecture \"gemma\" is not one of llama, mistral, qwen2, qwen3, phi3, smollm3, gemma3",
            ),
            (json!({"model_type": "mistral", "sliding_window": 4096}), "a sliding window of 4096 tokens"),
            (json!({"model_type": "phi3", "sliding_window": 2047}), "a sliding window of 2047 tokens"),
            (json!({"rope_scaling": {"type": "longrope"}}), "lacks original_max_position_embeddings"),
            (
                json!({"rope_scaling": {"type": "su", "long_factor": [1.0]}, "original_max_position_embeddings": 4096}),
                "1 rope divisors, expected 32",
            ),
            (json!({"model_type": "smollm3", "no_rope_layers": [1, 1]}), "kinds of 2 layers are listed, expected 16"),
            (json!({"model_type": "gemma3_text", "layer_types": ["chunked_attention"]}), "\"chunked_attention\""),
            (json!({"model_type": "gemma3_text", "hidden_activation": "silu"}), "\"silu\" is not gelu_pytorch_tanh"),
            (json!({"final_logit_softcapping": 30.0}), "final_logit_softcapping"),
            (json!({"use_bidirectional_attention": true}), "use_bidirectional_attention"),
            (json!({"partial_rotary_factor": 0.75}), "partial_rotary_factor 0.75 is not 1"),
            (json!({"rope_scaling": {"rope_type": "yarn", "factor": 4.0}}), "rope scaling \"yarn\""),
            (json!({"rope_scaling": {"rope_type": "linear"}}), "lacks factor"),
            (json!({"hidden_act": "gelu"}), "hidden_act \"gelu\""),
            (json!({"attention_bias": true}), "attention_bias"),
            (json!({"num_key_value_heads": 5}), "32 heads cannot share 5"),
            (json!({"num_key_value_heads": 0}), "32 heads cannot share 0"),
            (json!({"head_dim": 63}), "head_dim 63 is not even"),
            (json!({"vocab_size": "many"}), "vocab_size"),
        ] {
            let error = format!("{:#}", with(changes.clone()).unwrap_err());
            let named = error.contains(expected) || changes["vocab_size"] == "many" && error.contains("invalid type");
            assert!(named, "{changes}: {error}");
        }
    }

    fn gguf(changes: &[(&str, Value)]) -> Result<ModelConfig> {
        let embedding = TensorInfo { ggml_dtype: GgmlDType::F32, shape: (300, 24).into(), offset: 0 };
        let mut metadata: std::collections::HashMap<_, _> =
            gguf_metadata("llama", &tiny_config(), "smollm").into_iter().collect();
        metadata.extend(changes.iter().map(|(key, value)| (key.to_string(), value.clone())));
        let content = Content {
            magic: VersionedMagic::GgufV3,
            metadata,
            tensor_infos: [("token_embd.weight".to_string(), embedding)].into(),
            tensor_data_offset: 0,
        };
        ModelConfig::from_gguf(&content, None)
    }

    #[test]
    fn gguf_metadata_is_read() -> Result<()> {
        let config = gguf(&[])?;
        let rms_norm_eps = f64::from(1e-5f32);
        assert_eq!(config, ModelConfig { vocab_size: 300, tied_embeddings: true, rms_norm_eps, ..tiny_config() });
        let linear = [
            ("llama.rope.scaling.type", Value::String("linear".into())),
            ("llama.rope.scaling.factor", Value::F32(2.)),
            ("llama.block_count", Value::I64(5)),
        ];
        let config = gguf(&linear)?;
        assert_eq!((config.rope_scaling, config.layers), (RopeScaling::Linear(2.), 5));
        Ok(())
    }

    #[test]
    fn gguf_metadata_that_cannot_be_used_is_refused() {
        for (key, value, expected) in [
            ("general.architecture", Value::String("gemma".into()), "architecture \"gemma\""),
            ("general.architecture", Value::String("gemma3".into()), "gemma3 is not supported as GGUF"),
            ("llama.block_count", Value::I32(-1), "llama.block_count"),
            ("llama.block_count", Value::String("two".into()), "llama.block_count"),
            ("llama.rope.dimension_count", Value::U32(8), "only 8 of a head's 16 elements are rotated"),
            ("llama.rope.scaling.type", Value::String("yarn".into()), "rope scaling \"yarn\""),
            ("llama.attention.sliding_window", Value::U32(16), "a sliding window of 16 tokens"),
        ] {
            let error = format!("{:#}", gguf(&[(key, value)]).unwrap_err());
            assert!(error.contains(expected), "{key}: {error}");
        }
        let divisors = ModelConfig { rope_scaling: RopeScaling::Divisors(vec![1.]), ..tiny_config() };
        assert_eq!(divisors.checked(None).unwrap_err().to_string(), "1 rope divisors, expected 8");
    }
}
