//! What a model of the Llama family is made of, read from a checkpoint.

mod gguf;
mod hf;

use anyhow::{bail, ensure, Context, Result};
use serde::Deserialize;

pub use gguf::integer;

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
    /// To so many keys, the last: Gemma 3, and Mistral's first.
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
    /// All layers have a sliding window, where one is stated.
    all_slide: bool,
    /// Of so many layers each last one is without rotary embedding.
    no_rope_interval: Option<usize>,
    /// Of so many layers each last one is without a sliding window.
    global_interval: Option<usize>,
}

impl Architecture {
    fn named(name: &str) -> Result<Self> {
        let llama = Self::default();
        Ok(match name {
            "llama" => llama,
            "mistral" => Self { all_slide: true, ..llama },
            "qwen2" => Self { qkv_bias: true, ..llama },
            "qwen3" => Self { qk_norm: true, ..llama },
            "phi3" => Self { fused: true, all_slide: true, ..llama },
            "smollm3" => Self { tied_embeddings: true, no_rope_interval: Some(4), ..llama },
            "gemma3" | "gemma3_text" => {
                Self { gemma: true, qk_norm: true, tied_embeddings: true, global_interval: Some(6), ..llama }
            }
            other => bail!("architecture {other:?} is not one of {ARCHITECTURES}: choose a model of these"),
        })
    }

    /// What differs between layers, by what the model states or else the architecture's interval.
    fn layer_kinds(&self, layers: usize, context: usize, stated: &LayerPattern) -> Result<Vec<LayerKind>> {
        use LayerKind::{Global, NoRope, Sliding};
        ensure!(layers <= 1 << 12, "{layers} layers, expected at most {}", 1 << 12);
        // One that holds the context is none.
        let window = stated.sliding_window.filter(|&window| window > 0 && window < context);
        let unknown = window.filter(|_| !self.all_slide && self.global_interval.is_none()).unwrap_or(0);
        ensure!(unknown == 0, "a sliding window of {unknown} tokens is not supported here: choose another model");
        let each_last = |interval: usize| (1..=layers).map(move |layer| layer.is_multiple_of(interval));
        if let Some(usual) = self.no_rope_interval {
            let no_rope: Vec<_> = match &stated.no_rope_layers {
                Some(rotated) => rotated.iter().map(|&rotated| rotated == 0).collect(),
                None => each_last(stated.no_rope_layer_interval.unwrap_or(usual)).collect(),
            };
            Ok(no_rope.into_iter().map(|no_rope| if no_rope { NoRope } else { Global }).collect())
        } else if let Some(usual) = self.global_interval {
            let window = stated.sliding_window.context("no sliding_window")?;
            ensure!(window > 0, "sliding_window 0, expected at least 1");
            let sliding = Sliding(window.min(context));
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
                    let global =
                        each_last(stated.sliding_window_pattern.or(stated._sliding_window_pattern).unwrap_or(usual));
                    Ok(global.map(|global| if global { Global } else { sliding }).collect())
                }
            }
        } else {
            Ok(window.map_or_else(Vec::new, |window| vec![Sliding(window); layers]))
        }
    }
}

impl RopeScaling {
    /// For a model of that context, made from one of the `original` context.
    ///
    /// The original goes from the short to the long divisors when a sequence outgrows the first context; keys that are
    /// cached would have to be rotated anew.
    fn longrope(context: f64, original: f64, divisors: [Option<Vec<f64>>; 2], factor: Option<f64>) -> Result<Self> {
        let [short, long] = divisors;
        let divisors = if context > original { long } else { short };
        let usual = (1. + (context / original).max(1.).ln() / original.ln()).sqrt();
        Ok(Self::LongRope {
            divisors: divisors.context("rope scaling lacks short_factor or long_factor")?,
            attention_factor: factor.unwrap_or(usual),
        })
    }
}

impl ModelConfig {
    /// What scores are multiplied with.
    pub fn attention_scale(&self) -> f32 {
        1. / (self.query_pre_attn_scalar.unwrap_or(self.head_dim as f64) as f32).sqrt()
    }

    /// How that layer attends.
    pub fn layer_kind(&self, layer: usize) -> LayerKind {
        self.layer_kinds.get(layer).copied().unwrap_or(LayerKind::Global)
    }

    /// The keys that a layer attends to at most, where it has a sliding window.
    pub fn window(&self, layer: usize) -> Option<usize> {
        match self.layer_kind(layer) {
            LayerKind::Sliding(window) => Some(window),
            LayerKind::Global | LayerKind::NoRope => None,
        }
    }

    /// Refuses what the model would compute wrongly.
    fn checked(self) -> Result<Self> {
        let Self { heads, kv_heads, head_dim, context, .. } = self;
        ensure!(kv_heads > 0 && heads % kv_heads == 0, "{heads} heads cannot share {kv_heads} key-value heads");
        ensure!(head_dim > 0 && head_dim % 2 == 0, "head_dim {head_dim} is not even");
        // There are tables of all positions.
        for (name, number, most) in
            [("head_dim", head_dim, 256), ("heads", heads, 1 << 16), ("context", context, 1 << 20)]
        {
            ensure!(number <= most, "{name} {number} is more than {most}");
        }
        let kinds = self.layer_kinds.len();
        ensure!([0, self.layers].contains(&kinds), "kinds of {kinds} layers are listed, expected {}", self.layers);
        if let RopeScaling::Divisors(divisors) | RopeScaling::LongRope { divisors, .. } = &self.rope_scaling {
            ensure!(divisors.len() == head_dim / 2, "{} rope divisors, expected {}", divisors.len(), head_dim / 2);
        }
        Ok(self)
    }
}

/// Which layers are of which kind.
#[derive(Deserialize, Default)]
struct LayerPattern {
    /// 1 for each layer that has rotary embedding, whatever the name says.
    no_rope_layers: Option<Vec<usize>>,
    no_rope_layer_interval: Option<usize>,
    sliding_window: Option<usize>,
    sliding_window_pattern: Option<usize>,
    /// The same, as some files have it.
    _sliding_window_pattern: Option<usize>,
    layer_types: Option<Vec<String>>,
}
