//! The metadata of a GGUF file.

use anyhow::{bail, ensure, Context, Result};
use candle_core::quantized::gguf_file::{Content, Value};

use super::{Architecture, LayerPattern, ModelConfig, RopeScaling};

impl ModelConfig {
    /// From the metadata of a GGUF file; `vector` reads a tensor of it, if it is there.
    pub fn from_gguf(content: &Content, vector: impl FnMut(&str) -> Result<Option<Vec<f64>>>) -> Result<Self> {
        let architecture =
            content.metadata.get("general.architecture").context("no general.architecture")?.to_string()?;
        let metadata = Metadata { content, architecture };
        let mut architecture = Architecture::named(architecture)?;
        // Mistral is one of these here.
        architecture.all_slide |= metadata.architecture == "llama";
        let softcapping = metadata.float("final_logit_softcapping")?.or(metadata.float("attn_logit_softcapping")?);
        ensure!(softcapping.unwrap_or(0.) == 0., "softcapping of logits is not supported");
        let (heads, hidden_size) = (metadata.required("attention.head_count")?, metadata.required("embedding_length")?);
        let (layers, context) = (metadata.required("block_count")?, metadata.required("context_length")?);
        let sliding_window = metadata.integer("attention.sliding_window")?;
        let sliding_window_pattern = metadata.integer("attention.sliding_window_pattern")?;
        let pattern = LayerPattern { sliding_window, sliding_window_pattern, ..LayerPattern::default() };
        let gemma = architecture.gemma;
        // No key tells it of Gemma 3's largest, the only one with as many layers.
        let query_pre_attn_scalar = (gemma && layers == 62).then(|| hidden_size as f64 / heads as f64);
        let local_rope_theta = metadata.float("rope.freq_base_swa")?.unwrap_or(10_000.);
        let embedding = content.tensor_infos.get("token_embd.weight").context("no tensor token_embd.weight")?;
        let config = Self {
            vocab_size: embedding.shape.dims2()?.0,
            hidden_size,
            intermediate_size: metadata.required("feed_forward_length")?,
            layers,
            heads,
            kv_heads: metadata.integer("attention.head_count_kv")?.unwrap_or(heads),
            head_dim: metadata.integer("attention.key_length")?.unwrap_or(hidden_size / heads.max(1)),
            rms_norm_eps: metadata.float("attention.layer_norm_rms_epsilon")?.unwrap_or(1e-5),
            rope_theta: metadata.float("rope.freq_base")?.unwrap_or(if gemma { 1e6 } else { 1e4 }),
            rope_scaling: metadata.rope_scaling(context, vector)?,
            context,
            tied_embeddings: !content.tensor_infos.contains_key("output.weight"),
            qkv_bias: architecture.qkv_bias,
            qk_norm: architecture.qk_norm,
            fused: architecture.fused,
            gemma,
            query_pre_attn_scalar,
            local_rope_theta: gemma.then_some(local_rope_theta),
            layer_kinds: architecture.layer_kinds(layers, context, &pattern)?,
        };
        let rotated = metadata.integer("rope.dimension_count")?.unwrap_or(config.head_dim);
        ensure!(rotated == config.head_dim, "only {rotated} of a head's {} elements are rotated", config.head_dim);
        config.checked()
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

    fn rope_scaling(
        &self,
        context: usize,
        mut vector: impl FnMut(&str) -> Result<Option<Vec<f64>>>,
    ) -> Result<RopeScaling> {
        if let Some(divisors) = vector("rope_freqs.weight")? {
            return Ok(RopeScaling::Divisors(divisors));
        }
        let divisors = [vector("rope_factors_short.weight")?, vector("rope_factors_long.weight")?];
        if divisors.iter().any(Option::is_some) {
            let original = self.required("rope.scaling.original_context_length")?;
            let factor = self.float("rope.scaling.attn_factor")?;
            return RopeScaling::longrope(context as f64, original as f64, divisors, factor);
        }
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
    use crate::common::config::LayerKind;
    use crate::common::testing::{gguf_metadata, tiny_config};
    use candle_core::quantized::gguf_file::{TensorInfo, VersionedMagic};
    use candle_core::quantized::GgmlDType;

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
        ModelConfig::from_gguf(&content, |_| Ok(None))
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
        let window = gguf(&[("llama.attention.sliding_window", Value::U32(16))])?;
        assert_eq!(window.layer_kinds, [LayerKind::Sliding(16); 2]);
        Ok(())
    }

    /// As llama.cpp writes it, with nothing of what is usual.
    #[test]
    fn gemma3_leaves_out_what_is_usual() -> Result<()> {
        for (layers, scale) in [(7, 1. / 4.), (62, 1. / 6f32.sqrt())] {
            let mut metadata: Vec<_> = gguf_metadata("gemma3", &tiny_config(), "");
            metadata.retain(|(key, _)| key != "gemma3.rope.freq_base");
            let window = [("gemma3.attention.sliding_window", 20), ("gemma3.block_count", layers)];
            let window = window.map(|(key, value)| (key.to_string(), Value::U32(value)));
            let changes: Vec<_> =
                metadata.iter().chain(&window).map(|(key, value)| (key.as_str(), value.clone())).collect();
            let config = gguf(&changes)?;
            let (local, all) = (LayerKind::Sliding(20), LayerKind::Global);
            assert_eq!(config.layer_kinds[..7], [local, local, local, local, local, all, local]);
            assert_eq!((config.rope_theta, config.local_rope_theta), (1e6, Some(1e4)));
            // Of heads of 16 elements, or of a hidden size of 24 by 4 heads.
            assert_eq!(config.attention_scale(), scale);
            assert!(config.gemma && config.qk_norm && config.tied_embeddings);
        }
        Ok(())
    }

    #[test]
    fn gguf_metadata_that_cannot_be_used_is_refused() {
        for (key, value, expected) in [
            ("general.architecture", Value::String("gemma".into()), "architecture \"gemma\""),
            ("llama.final_logit_softcapping", Value::F32(30.), "softcapping of logits is not supported"),
            ("llama.rope.scaling.type", Value::String("longrope".into()), "rope scaling \"longrope\" is not linear"),
            ("llama.block_count", Value::I32(-1), "llama.block_count"),
            ("llama.block_count", Value::String("two".into()), "llama.block_count"),
            ("llama.rope.dimension_count", Value::U32(8), "only 8 of a head's 16 elements are rotated"),
            ("llama.rope.scaling.type", Value::String("yarn".into()), "rope scaling \"yarn\""),
        ] {
            let error = format!("{:#}", gguf(&[(key, value)]).unwrap_err());
            assert!(error.contains(expected), "{key}: {error}");
        }
        let divisors = ModelConfig { rope_scaling: RopeScaling::Divisors(vec![1.]), ..tiny_config() };
        assert_eq!(divisors.checked().unwrap_err().to_string(), "1 rope divisors, expected 8");
    }
}
