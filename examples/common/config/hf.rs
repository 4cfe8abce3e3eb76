//! A model's `config.json`, as Hugging Face writes it.

use anyhow::{bail, ensure, Context, Result};
use serde::Deserialize;
use serde_json::{json, Value as Json};

use super::{Architecture, LayerPattern, ModelConfig, RopeScaling};

impl ModelConfig {
    /// From the text of a Hugging Face `config.json`.
    pub fn from_json(text: &str) -> Result<Self> {
        let json: HfConfig = serde_json::from_value(with_gemma_defaults(serde_json::from_str(text)?)?)?;
        let architecture = Architecture::named(&json.model_type)?;
        // Qwen states a window that it does not use.
        let uses_window = json.use_sliding_window.unwrap_or(architecture.all_slide || architecture.gemma);
        let pattern =
            LayerPattern { sliding_window: json.pattern.sliding_window.filter(|_| uses_window), ..json.pattern };
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
            layer_kinds: architecture.layer_kinds(json.num_hidden_layers, json.max_position_embeddings, &pattern)?,
        };
        config.checked()
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

/// The text model's part of a Gemma 3, whose files leave out what is usual.
fn with_gemma_defaults(mut json: Json) -> Result<Json> {
    if json["model_type"] == "gemma3" {
        json = json["text_config"].take();
        ensure!(json.is_object(), "text_config: expected an object, got {json}");
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
    Ok(json)
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
                RopeScaling::longrope(context, original, [self.short_factor, self.long_factor], self.attention_factor)
            }
            Some(other) => bail!("rope scaling {other:?} is not one of linear, llama3, longrope"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::common::config::LayerKind;

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
    fn windows_shorter_than_the_context_slide() -> Result<()> {
        for (model_type, window, used) in
            [("mistral", 4096, None), ("phi3", 2047, None), ("phi3", 262_144, None), ("mistral", 4096, Some(false))]
        {
            let json = json!({
                "model_type": model_type, "sliding_window": window, "use_sliding_window": used, "rope_scaling": null
            });
            let slides = window < 131_072 && used.is_none();
            let kinds = if slides { vec![LayerKind::Sliding(window); 16] } else { Vec::new() };
            assert_eq!(with(json.clone())?.layer_kinds, kinds, "{json}");
        }
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
            (
                json!({"model_type": "qwen2", "sliding_window": 4096, "use_sliding_window": true}),
                "a sliding window of 4096 tokens",
            ),
            (json!({"rope_scaling": {"type": "longrope"}}), "lacks original_max_position_embeddings"),
            (
                json!({"rope_scaling": {"type": "su", "long_factor": [1.0]}, "original_max_position_embeddings": 4096}),
                "1 rope divisors, expected 32",
            ),
            (json!({"model_type": "smollm3", "no_rope_layers": [1, 1]}), "kinds of 2 layers are listed, expected 16"),
            (json!({"model_type": "gemma3_text", "layer_types": ["chunked_attention"]}), "\"chunked_attention\""),
            (json!({"model_type": "gemma3_text", "sliding_window": 0}), "sliding_window 0, expected at least 1"),
            (json!({"model_type": "gemma3", "text_config": []}), "text_config: expected an object, got []"),
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
}
