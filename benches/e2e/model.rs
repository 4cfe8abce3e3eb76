//! A Llama of random weights, on this crate's attention.

use std::collections::HashMap;

use candle_core::{DType, Device, Result, Tensor};
use candle_nn::ops::{rms_norm, swiglu};
use candle_nn::{Linear, Module};
use candle_pq_attn::{PqAttention, PqKvCache};

pub const EPS: f64 = 1e-5;
pub const THETA: f64 = 500_000.0;

/// Sizes of Llama 3 8B, or smaller ones.
#[derive(Debug, Clone)]
pub struct Shape {
    pub layers: usize,
    pub heads: usize,
    pub kv_heads: usize,
    pub head_dim: usize,
    pub mlp: usize,
    pub vocab: usize,
    pub dtype: DType,
}

impl Shape {
    pub fn hidden(&self) -> usize {
        self.heads * self.head_dim
    }

    pub fn scale(&self) -> f32 {
        1.0 / (self.head_dim as f32).sqrt()
    }
}

pub struct Model {
    pub shape: Shape,
    embeddings: Tensor,
    layers: Vec<Layer>,
    norm: Tensor,
    head: Linear,
    cos: Tensor,
    sin: Tensor,
}

struct Layer {
    input_norm: Tensor,
    qkv: Linear,
    output: Linear,
    mlp_norm: Tensor,
    gate_up: Linear,
    down: Linear,
}

/// What a step does about attention.
pub enum Attend<'a> {
    Sparse(&'a PqAttention),
    Dense(&'a PqAttention),
    /// Keys and values are kept, and that is all: what a step costs besides attention.
    Not,
}

impl Model {
    /// Draws the weights on the device, for positions below `context`.
    pub fn new(shape: Shape, context: usize, device: &Device) -> Result<Self> {
        let weight = |outputs: usize, inputs: usize| {
            Tensor::randn(0f32, 1.0 / (inputs as f32).sqrt(), (outputs, inputs), device)?.to_dtype(shape.dtype)
        };
        let linear = |outputs, inputs| Ok::<_, candle_core::Error>(Linear::new(weight(outputs, inputs)?, None));
        let norm = || Tensor::ones(shape.hidden(), shape.dtype, device);
        let layer = |_| {
            Ok(Layer {
                input_norm: norm()?,
                qkv: linear((shape.heads + 2 * shape.kv_heads) * shape.head_dim, shape.hidden())?,
                output: linear(shape.hidden(), shape.hidden())?,
                mlp_norm: norm()?,
                gate_up: linear(2 * shape.mlp, shape.hidden())?,
                down: linear(shape.hidden(), shape.mlp)?,
            })
        };
        let layers = (0..shape.layers).map(layer).collect::<Result<_>>()?;
        let (embeddings, head) = (weight(shape.vocab, shape.hidden())?, linear(shape.vocab, shape.hidden())?);
        let pairs = shape.head_dim / 2;
        let angles = (0..context)
            .flat_map(|n| (0..pairs).map(move |i| (n as f64 * THETA.powf(-(i as f64) / pairs as f64)) as f32));
        let angles = Tensor::from_iter(angles, &Device::Cpu)?.reshape((context, pairs))?;
        let table = |angles: Tensor| angles.to_dtype(shape.dtype)?.to_device(device);
        let (cos, sin) = (table(angles.cos()?)?, table(angles.sin()?)?);
        Ok(Self { embeddings, layers, norm: norm()?, head, cos, sin, shape })
    }

    /// Logits `[1, vocab]` after `tokens`, `[s]`, at `positions`, `[s]`; both on the device.
    pub fn forward(
        &self,
        tokens: &Tensor,
        positions: &Tensor,
        caches: &mut [PqKvCache],
        attend: &Attend,
    ) -> Result<Tensor> {
        let Shape { heads, kv_heads, head_dim, .. } = self.shape;
        let (cos, sin) = (self.cos.index_select(positions, 0)?, self.sin.index_select(positions, 0)?);
        let mut x = self.embeddings.embedding(tokens)?;
        let s = tokens.dim(0)?;
        for (layer, cache) in self.layers.iter().zip(caches) {
            let qkv = layer.qkv.forward(&rms_norm(&x, &layer.input_norm, EPS as f32)?)?;
            let qkv = qkv.reshape((1, s, heads + 2 * kv_heads, head_dim))?.transpose(1, 2)?;
            // One rotation for queries and keys.
            let qk = candle_nn::rotary_emb::rope(&qkv.narrow(1, 0, heads + kv_heads)?.contiguous()?, &cos, &sin)?;
            let (q, k) = (qk.narrow(1, 0, heads)?, qk.narrow(1, heads, kv_heads)?);
            let v = qkv.narrow(1, heads + kv_heads, kv_heads)?;
            let out = match attend {
                Attend::Sparse(attn) => attn.forward(&q, &k, &v, cache)?,
                Attend::Dense(attn) => attn.forward_dense(&q, &k, &v, cache)?,
                Attend::Not => {
                    cache.append(&k, &v)?;
                    q
                }
            };
            x = (&x + layer.output.forward(&out.transpose(1, 2)?.reshape((s, self.shape.hidden()))?)?)?;
            let gate_up = layer.gate_up.forward(&rms_norm(&x, &layer.mlp_norm, EPS as f32)?)?;
            x = (&x + layer.down.forward(&swiglu(&gate_up)?)?)?;
        }
        let last = x.narrow(0, s - 1, 1)?;
        self.head.forward(&rms_norm(&last, &self.norm, EPS as f32)?)?.to_dtype(DType::F32)
    }

    /// Bytes that a step reads, but for the caches and all embeddings but one.
    pub fn bytes(&self) -> usize {
        let linears = self.layers.iter().flat_map(|layer| [&layer.qkv, &layer.output, &layer.gate_up, &layer.down]);
        let elements = linears.chain([&self.head]).map(|linear| linear.weight().elem_count()).sum::<usize>();
        elements * self.shape.dtype.size_in_bytes()
    }

    /// The same memory by its names in a checkpoint.
    pub fn tensors(&self) -> Result<HashMap<String, Tensor>> {
        let Shape { heads, kv_heads, head_dim, mlp, .. } = self.shape;
        let mut tensors = HashMap::from([
            ("model.embed_tokens.weight".to_string(), self.embeddings.clone()),
            ("model.norm.weight".to_string(), self.norm.clone()),
            ("lm_head.weight".to_string(), self.head.weight().clone()),
        ]);
        let (q, kv) = (heads * head_dim, kv_heads * head_dim);
        for (i, layer) in self.layers.iter().enumerate() {
            let (qkv, gate_up) = (layer.qkv.weight(), layer.gate_up.weight());
            for (name, tensor) in [
                ("self_attn.q_proj", qkv.narrow(0, 0, q)?),
                ("self_attn.k_proj", qkv.narrow(0, q, kv)?),
                ("self_attn.v_proj", qkv.narrow(0, q + kv, kv)?),
                ("self_attn.o_proj", layer.output.weight().clone()),
                ("mlp.gate_proj", gate_up.narrow(0, 0, mlp)?),
                ("mlp.up_proj", gate_up.narrow(0, mlp, mlp)?),
                ("mlp.down_proj", layer.down.weight().clone()),
                ("input_layernorm", layer.input_norm.clone()),
                ("post_attention_layernorm", layer.mlp_norm.clone()),
            ] {
                tensors.insert(format!("model.layers.{i}.{name}.weight"), tensor);
            }
        }
        Ok(tensors)
    }
}
