//! A decoder of the Llama family, without its attention: architectures are options of [`ModelConfig`].

use anyhow::Result;
use candle_core::{DType, Device, Module, Tensor, D};
use candle_nn::ops::swiglu;
use candle_nn::RmsNorm;

use super::config::{LayerKind, ModelConfig};
use super::linear::{Linear, Matrix};
use super::rotary::{Rotary, Rotations};
use super::weights::{Precision, Weights};

/// The weights; caches and attention are the caller's.
pub struct Decoder {
    embedding: Matrix,
    layers: Vec<Layer>,
    norm: RmsNorm,
    head: Linear,
    /// What embeddings are multiplied with.
    embedding_scale: f64,
    rotary: Rotary,
    /// Of the layers with a sliding window, where it is another.
    local_rotary: Option<Rotary>,
    precision: Precision,
    device: Device,
}

impl Decoder {
    /// Reads the weights.
    pub fn new(config: &ModelConfig, mut weights: Weights) -> Result<Self> {
        let (precision, device) = (weights.precision(), weights.device().clone());
        let weights = &mut weights;
        let embeddings = weights.matrix("model.embed_tokens.weight", &[config.vocab_size, config.hidden_size])?;
        let head = match config.tied_embeddings {
            true => embeddings.clone(),
            false => weights.matrix("lm_head.weight", &[config.vocab_size, config.hidden_size])?,
        };
        Ok(Self {
            layers: (0..config.layers).map(|index| Layer::new(config, weights, index)).collect::<Result<_>>()?,
            embedding: embeddings,
            norm: norm(config, weights, "model.norm", config.hidden_size)?,
            head: Linear::new(vec![head], None)?,
            embedding_scale: if config.gemma { (config.hidden_size as f64).sqrt() } else { 1. },
            rotary: Rotary::new(config, precision.compute, &device)?,
            local_rotary: Rotary::local(config, precision.compute, &device)?,
            precision,
            device,
        })
    }

    /// Hidden states `[1, s, hidden]` of `s` tokens, the first of them at position `start`.
    ///
    /// `attend(layer, q, k, v)` is the attention, and keeps what it needs: it gets queries `[1, h, s, head_dim]`, new keys
    /// and values `[1, h_kv, s, head_dim]` in the stored type, and returns what the queries get, `[1, h, s, head_dim]`.
    pub fn forward(
        &self,
        tokens: &[u32],
        start: usize,
        attend: impl FnMut(usize, &Tensor, &Tensor, &Tensor) -> Result<Tensor>,
    ) -> Result<Tensor> {
        let rotations = |rotary: &Rotary| rotary.range(start, tokens.len());
        self.run(&Tensor::new(tokens, &self.device)?, rotations, attend)
    }

    /// As [`forward`](Self::forward), of tokens and positions on the device, `[s]` u32 each.
    pub fn forward_at(
        &self,
        tokens: &Tensor,
        positions: &Tensor,
        attend: impl FnMut(usize, &Tensor, &Tensor, &Tensor) -> Result<Tensor>,
    ) -> Result<Tensor> {
        self.run(tokens, |rotary| rotary.of(positions), attend)
    }

    fn run(
        &self,
        tokens: &Tensor,
        rotations: impl Fn(&Rotary) -> candle_core::Result<Rotations>,
        mut attend: impl FnMut(usize, &Tensor, &Tensor, &Tensor) -> Result<Tensor>,
    ) -> Result<Tensor> {
        let tokens = tokens.unsqueeze(0)?;
        let mut x = self.embedding.embed(&tokens)?.to_dtype(self.precision.compute)?;
        if self.embedding_scale != 1. {
            x = (x * self.embedding_scale)?;
        }
        let local = self.local_rotary.as_ref().map(&rotations).transpose()?;
        let global = rotations(&self.rotary)?;
        for (index, layer) in self.layers.iter().enumerate() {
            let rotations = match layer.kind {
                LayerKind::Global => Some(&global),
                LayerKind::NoRope => None,
                LayerKind::Sliding(_) => Some(local.as_ref().unwrap_or(&global)),
            };
            let [q, k, v] = layer.project(&x, rotations, self.precision.stored)?;
            x = layer.finish(&x, &attend(index, &q, &k, &v)?)?;
        }
        Ok(x)
    }

    /// Logits for the token after each of `hidden`, `[1, s, hidden]`: `[1, s, vocab]`.
    pub fn logits(&self, hidden: &Tensor) -> Result<Tensor> {
        Ok(self.head.forward(&self.norm.forward(hidden)?)?)
    }

    /// The types of its numbers.
    pub fn precision(&self) -> Precision {
        self.precision
    }

    /// Where the weights are.
    pub fn device(&self) -> &Device {
        &self.device
    }
}

struct Layer {
    input_norm: RmsNorm,
    qkv: Linear,
    qk_norm: Option<(RmsNorm, RmsNorm)>,
    output: Linear,
    output_norm: Option<RmsNorm>,
    mlp_norm: RmsNorm,
    gate_up: Linear,
    gelu: bool,
    down: Linear,
    down_norm: Option<RmsNorm>,
    kind: LayerKind,
    heads: usize,
    kv_heads: usize,
}

impl Layer {
    fn new(config: &ModelConfig, weights: &mut Weights, index: usize) -> Result<Self> {
        let &ModelConfig { hidden_size, intermediate_size, heads, kv_heads, head_dim, .. } = config;
        let name = |part: &str| format!("model.layers.{index}.{part}");
        let (q_size, kv_size) = (heads * head_dim, kv_heads * head_dim);
        let qkv = match config.fused {
            true => vec![("qkv", q_size + 2 * kv_size)],
            false => vec![("q", q_size), ("k", kv_size), ("v", kv_size)],
        };
        let gate_up = match config.fused {
            true => vec![("gate_up", 2 * intermediate_size)],
            false => vec![("gate", intermediate_size), ("up", intermediate_size)],
        };
        let named = |module: &str, parts: Vec<(&str, usize)>| -> Vec<_> {
            parts.into_iter().map(|(part, size)| (name(&format!("{module}.{part}_proj")), size)).collect()
        };
        let qk_norm = match config.qk_norm {
            true => Some((
                norm(config, weights, &name("self_attn.q_norm"), head_dim)?,
                norm(config, weights, &name("self_attn.k_norm"), head_dim)?,
            )),
            false => None,
        };
        // Gemma's norm behind attention has the name that others give to the one before the MLP.
        let (mlp_norm, output_norm, down_norm) = match config.gemma {
            true => (
                "pre_feedforward_layernorm",
                Some(norm(config, weights, &name("post_attention_layernorm"), hidden_size)?),
                Some(norm(config, weights, &name("post_feedforward_layernorm"), hidden_size)?),
            ),
            false => ("post_attention_layernorm", None, None),
        };
        Ok(Self {
            input_norm: norm(config, weights, &name("input_layernorm"), hidden_size)?,
            qkv: linear(weights, &named("self_attn", qkv), hidden_size, config.qkv_bias)?,
            qk_norm,
            output: linear(weights, &[(name("self_attn.o_proj"), hidden_size)], q_size, false)?,
            output_norm,
            mlp_norm: norm(config, weights, &name(mlp_norm), hidden_size)?,
            gate_up: linear(weights, &named("mlp", gate_up), hidden_size, false)?,
            down: linear(weights, &[(name("mlp.down_proj"), hidden_size)], intermediate_size, false)?,
            gelu: config.gemma,
            down_norm,
            kind: config.layer_kind(index),
            heads,
            kv_heads,
        })
    }

    /// Queries, keys and values of `x`; `stored` is the type of the cache.
    fn project(&self, x: &Tensor, rotations: Option<&Rotations>, stored: DType) -> Result<[Tensor; 3]> {
        let (batch, tokens, _) = x.dims3()?;
        let all_heads = self.heads + 2 * self.kv_heads;
        let qkv = self.qkv.forward(&self.input_norm.forward(x)?)?;
        let qkv = qkv.reshape((batch, tokens, all_heads, ()))?.transpose(1, 2)?;
        let mut q = qkv.narrow(1, 0, self.heads)?;
        let mut k = qkv.narrow(1, self.heads, self.kv_heads)?;
        let v = qkv.narrow(1, self.heads + self.kv_heads, self.kv_heads)?;
        if let Some((q_norm, k_norm)) = &self.qk_norm {
            (q, k) = (q_norm.forward(&q.contiguous()?)?, k_norm.forward(&k.contiguous()?)?);
        }
        if let Some(rotations) = rotations {
            (q, k) = (rotations.apply(&q)?, rotations.apply(&k)?);
        }
        Ok([q.to_dtype(stored)?, k.to_dtype(stored)?, v.to_dtype(stored)?])
    }

    /// What the layer makes of `x`, now that attention has given `out`, `[b, h, s, head_dim]`.
    fn finish(&self, x: &Tensor, out: &Tensor) -> Result<Tensor> {
        let (batch, tokens, _) = x.dims3()?;
        let out = out.transpose(1, 2)?.reshape((batch, tokens, ()))?;
        let x = (x + normed(&self.output_norm, self.output.forward(&out.to_dtype(x.dtype())?)?)?)?;
        let gate_up = self.gate_up.forward(&self.mlp_norm.forward(&x)?)?;
        let gated = if self.gelu { geglu(&gate_up)? } else { swiglu(&gate_up)? };
        Ok((&x + normed(&self.down_norm, self.down.forward(&gated)?)?)?)
    }
}

fn norm(config: &ModelConfig, weights: &mut Weights, name: &str, size: usize) -> Result<RmsNorm> {
    let mut weight = weights.tensor(&format!("{name}.weight"), &[size])?;
    if config.gemma && !weights.has_whole_norms() {
        weight = (weight.to_dtype(DType::F32)? + 1.)?;
    }
    Ok(RmsNorm::new(weight.to_dtype(weights.precision().compute)?, config.rms_norm_eps))
}

fn normed(norm: &Option<RmsNorm>, x: Tensor) -> Result<Tensor> {
    Ok(match norm {
        Some(norm) => norm.forward(&x)?,
        None => x,
    })
}

/// The first half of the elements, by GELU's tanh approximation, times the second.
fn geglu(gate_up: &Tensor) -> Result<Tensor> {
    let halves = gate_up.chunk(2, D::Minus1)?;
    Ok((halves[0].gelu()? * &halves[1])?)
}

/// One layer for projections of the same input.
fn linear(weights: &mut Weights, parts: &[(String, usize)], inputs: usize, bias: bool) -> Result<Linear> {
    let matrices = parts.iter().map(|(name, outputs)| weights.matrix(&format!("{name}.weight"), &[*outputs, inputs]));
    let matrices = matrices.collect::<Result<Vec<_>>>()?;
    let bias = match bias {
        false => None,
        true => {
            let biases = parts.iter().map(|(name, outputs)| weights.tensor(&format!("{name}.bias"), &[*outputs]));
            let bias = Tensor::cat(&biases.collect::<Result<Vec<_>>>()?, 0)?;
            Some(bias.to_dtype(weights.precision().compute)?)
        }
    };
    Ok(Linear::new(matrices, bias)?)
}
