//! The metadata of a GGUF file.

use anyhow::{bail, ensure, Context, Result};
use candle_core::quantized::gguf_file::{Content, Value};

use super::{Architecture, LayerPattern, ModelConfig, RopeScaling};

impl ModelConfig {
    /// From the metadata of a GGUF file; `rope_divisors` are its tensor `rope_freqs.weight`.
    pub fn from_gguf(content: &Content, rope_divisors: Option<Vec<f64>>) -> Result<Self> {
        let architecture =
            content.metadata.get("general.architecture").context("no general.architecture")?.to_string()?;
        let metadata = Metadata { content, architecture };
        let mut architecture = Architecture::named(architecture)?;
        // Mistral is one of these here.
        architecture.all_slide |= metadata.architecture == "llama";
        ensure!(!architecture.gemma, "gemma3 is not supported as GGUF: give a directory in the layout of Hugging Face");
        let longrope = content.tensor_infos.contains_key("rope_factors_long.weight");
        ensure!(!longrope, "rope scaling \"longrope\" is not linear");
        let (heads, hidden_size) = (metadata.required("attention.head_count")?, metadata.required("embedding_length")?);
        let (layers, context) = (metadata.required("block_count")?, metadata.required("context_length")?);
        let sliding_window = metadata.integer("attention.sliding_window")?;
        let pattern = LayerPattern { sliding_window, ..LayerPattern::default() };
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
            rope_theta: metadata.float("rope.freq_base")?.unwrap_or(10_000.),
            rope_scaling: match rope_divisors {
                Some(divisors) => RopeScaling::Divisors(divisors),
                None => metadata.rope_scaling()?,
            },
            context,
            tied_embeddings: !content.tensor_infos.contains_key("output.weight"),
            qkv_bias: architecture.qkv_bias,
            qk_norm: architecture.qk_norm,
            fused: architecture.fused,
            gemma: false,
            query_pre_attn_scalar: None,
            local_rope_theta: None,
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
        let window = gguf(&[("llama.attention.sliding_window", Value::U32(16))])?;
        assert_eq!(window.layer_kinds, [LayerKind::Sliding(16); 2]);
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
        ] {
            let error = format!("{:#}", gguf(&[(key, value)]).unwrap_err());
            assert!(error.contains(expected), "{key}: {error}");
        }
        let divisors = ModelConfig { rope_scaling: RopeScaling::Divisors(vec![1.]), ..tiny_config() };
        assert_eq!(divisors.checked().unwrap_err().to_string(), "1 rope divisors, expected 8");
    }
}
