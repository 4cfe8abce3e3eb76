//! Candle's own Llama on the same weights.

use candle_core::{DType, Device, Result, Tensor};
use candle_nn::VarBuilder;
use candle_transformers::models::llama::{Cache, Config, Llama};

use super::model::{Model, EPS, THETA};

/// Tokens of a chunk of the prompt: its cache is filled by running one, since nothing else has access to it.
const CHUNK: usize = 256;

pub struct Peer {
    llama: Llama,
    config: Config,
    dtype: DType,
}

impl Peer {
    pub fn new(model: &Model, context: usize, device: &Device) -> Result<Self> {
        let shape = &model.shape;
        let config = Config {
            hidden_size: shape.hidden(),
            intermediate_size: shape.mlp,
            vocab_size: shape.vocab,
            num_hidden_layers: shape.layers,
            num_attention_heads: shape.heads,
            num_key_value_heads: shape.kv_heads,
            use_flash_attn: false,
            rms_norm_eps: EPS,
            rope_theta: THETA as f32,
            bos_token_id: None,
            eos_token_id: None,
            rope_scaling: None,
            max_position_embeddings: context,
            tie_word_embeddings: false,
        };
        let llama = Llama::load(VarBuilder::from_tensors(model.tensors()?, shape.dtype, device), &config)?;
        Ok(Self { llama, config, dtype: shape.dtype })
    }

    /// A cache of `n` random tokens.
    pub fn cache(&self, n: usize, device: &Device) -> Result<Cache> {
        let mut cache = Cache::new(true, self.dtype, &self.config, device)?;
        for start in (0..n).step_by(CHUNK) {
            let ids = (start..n.min(start + CHUNK))
                .map(|i| (i as u32).wrapping_mul(2_654_435_761) % self.config.vocab_size as u32);
            self.llama.forward(&Tensor::from_iter(ids, device)?.unsqueeze(0)?, start, &mut cache)?;
        }
        Ok(cache)
    }

    /// Logits `[1, vocab]` after `token`, `[1]`.
    pub fn forward(&self, token: &Tensor, position: usize, cache: &mut Cache) -> Result<Tensor> {
        self.llama.forward(&token.unsqueeze(0)?, position, cache)
    }
}
