//! A language model and its caches, with sparse and with dense attention.

pub mod packed;

use std::path::Path;
use std::rc::Rc;

use anyhow::{ensure, Result};
use candle_core::{DType, Tensor};
use candle_pq_attn::{save_caches, DecodeGraph, PqAttention, PqConfig, PqKvCache};

use crate::common::budget::LayerBudget;
use crate::common::config::{LayerKind, ModelConfig};
use crate::common::decoder::Decoder;
use crate::common::sliding;
use crate::common::weights::Weights;

/// Weights, and the cache of the one sequence that they work on.
pub struct Model {
    decoder: Rc<Decoder>,
    attention: Attention,
    /// One a layer.
    caches: Vec<PqKvCache>,
    /// Of sparse and of dense steps, if these are to be captured.
    graphs: Option<[StepGraph; 2]>,
}

type StepGraph = DecodeGraph<Box<dyn FnMut(&Tensor, &Tensor, &mut [PqKvCache]) -> candle_core::Result<Tensor>>>;

/// Bytes in use, over all layers.
#[derive(Debug, Clone, Copy, Default)]
pub struct Memory {
    pub kv_bytes: usize,
    pub index_bytes: usize,
}

impl Model {
    /// Reads the weights, and makes room for `capacity` tokens.
    pub fn new(config: &ModelConfig, weights: Weights, pq: &PqConfig, capacity: usize) -> Result<Self> {
        let attention = Attention::new(config, |_| pq.clone())?;
        let decoder = Rc::new(Decoder::new(config, weights)?);
        let (dims, dtype) = ([1, config.kv_heads, config.head_dim], decoder.precision().stored);
        let cache = |pq: &PqAttention| pq.new_cache(dims, capacity, dtype, decoder.device());
        let caches = attention.pq.iter().map(cache).collect::<candle_core::Result<_>>()?;
        Ok(Self { decoder, attention, caches, graphs: None })
    }

    /// Reads the weights, and goes on from what a model with the same ones has read.
    pub fn with_caches(config: &ModelConfig, weights: Weights, caches: Vec<PqKvCache>) -> Result<Self> {
        let decoder = Rc::new(Decoder::new(config, weights)?);
        let expected = (config.layers, [1, config.kv_heads, config.head_dim], decoder.precision().stored);
        let (dims, dtype) = caches.first().map_or(([0; 3], DType::U8), |cache| (cache.dims(), cache.dtype()));
        ensure!(
            (caches.len(), dims, dtype) == expected,
            "expected caches of {} layers of {:?} {:?}, got {} of {dims:?} {dtype:?}: of another model or --dtype",
            expected.0,
            expected.1,
            expected.2,
            caches.len()
        );
        let same = caches.iter().all(|cache| (cache.dims(), cache.dtype()) == (dims, dtype));
        ensure!(same, "expected caches of equal layers");
        let attention = Attention::new(config, |layer| caches[layer].config().clone())?;
        Ok(Self { decoder, attention, caches, graphs: None })
    }

    /// Has the first `layers` layers attend to all keys in every step.
    pub fn with_dense_layers(mut self, layers: usize) -> Result<Self> {
        let all = self.attention.kinds.len();
        ensure!(layers <= all, "--dense-layers: expected at most {all}, the model's layers; got {layers}");
        self.attention.dense_layers = layers;
        Ok(self)
    }

    /// Has some layers select another number of keys than the others. Nothing must have been read yet.
    pub fn with_heavy_layers(mut self, budgets: &[LayerBudget]) -> Result<Self> {
        let mut pending: Vec<_> = (0..self.caches.len()).collect();
        for budget in budgets {
            let (LayerBudget { layers, heavy }, all) = (budget, self.caches.len());
            ensure!(*layers.end() < all, "--heavy-layers {budget}: expected layers below {all}, the model's");
            let selects = layers.clone().any(|layer| self.attention.is_sparse(layer));
            ensure!(selects, "--heavy-layers {budget}: none of these layers selects keys");
            for layer in layers.clone() {
                let is_first = pending.iter().position(|&other| other == layer).map(|at| pending.remove(at));
                ensure!(is_first.is_some(), "--heavy-layers {budget}: layer {layer} has two budgets");
                let cache = &mut self.caches[layer];
                let pq = self.attention.set(layer, PqConfig { heavy: *heavy, ..cache.config().clone() })?;
                *cache = pq.new_cache(cache.dims(), cache.capacity(), cache.dtype(), self.decoder.device())?;
            }
        }
        Ok(self)
    }

    /// Writes what it has read to a file, for [`with_caches`](Self::with_caches).
    pub fn save(&self, path: &Path, about: &str) -> Result<()> {
        Ok(save_caches(path, &self.caches, about)?)
    }

    /// Has steps of one token captured as a CUDA graph and replayed, on a GPU.
    pub fn with_graphs(self) -> Result<Self> {
        // A window begins at another key in each step, which a replay would not know of.
        ensure!(!self.attention.has_windows(), "--graph is not for models with a sliding window: leave it out");
        let graph = |dense| {
            let (decoder, attention) = (self.decoder.clone(), self.attention.clone());
            let step = move |token: &Tensor, position: &Tensor, caches: &mut [PqKvCache]| {
                let attend =
                    |layer: usize, q: &_, k: &_, v: &_| attention.attend(layer, [q, k, v], &mut caches[layer], dense);
                let logits = decoder.forward_at(token, position, attend).and_then(|hidden| decoder.logits(&hidden));
                logits.map_err(|error| candle_core::Error::msg(format!("{error:#}")))
            };
            DecodeGraph::new(Box::new(step) as _)
        };
        Ok(Self { graphs: Some([graph(false), graph(true)]), ..self })
    }

    /// Appends `tokens` and returns the logits after the last of them, f32 on the host. `dense` attends to every key;
    /// several tokens at once do so in any case.
    pub fn forward(&mut self, tokens: &[u32], dense: bool) -> Result<Vec<f32>> {
        let start = self.len();
        let logits = match (&mut self.graphs, tokens) {
            (Some(graphs), [token]) => {
                let token = Tensor::new(&[*token], self.decoder.device())?;
                graphs[usize::from(dense)].step(&token, &mut self.caches)?
            }
            _ => {
                let hidden = self.decoder.forward(tokens, start, |layer, q, k, v| {
                    self.attention.attend(layer, [q, k, v], &mut self.caches[layer], dense)
                })?;
                self.decoder.logits(&hidden.narrow(1, tokens.len() - 1, 1)?)?
            }
        };
        Ok(logits.flatten_all()?.to_dtype(DType::F32)?.to_vec1()?)
    }

    /// Tokens so far.
    pub fn len(&self) -> usize {
        self.caches.first().map_or(0, PqKvCache::len)
    }

    /// Keys that the last step attended to, on the mean over the layers.
    pub fn attended(&self, dense: bool) -> f64 {
        let layers = self.caches.len();
        let sum: usize = (0..layers).map(|layer| self.attention.attended(layer, self.len(), dense)).sum();
        sum as f64 / layers as f64
    }

    /// Forgets all tokens but the first `len`.
    pub fn truncate(&mut self, len: usize) -> Result<()> {
        Ok(self.caches.iter_mut().try_for_each(|cache| cache.truncate(len))?)
    }

    /// Trains codebooks on the keys so far and encodes them, which the first sparse step would do otherwise.
    pub fn build_index(&mut self) -> Result<()> {
        let attention = &self.attention;
        let mut indexed = self.caches.iter_mut().enumerate().filter(|(layer, _)| attention.is_sparse(*layer));
        Ok(indexed.try_for_each(|(_, cache)| cache.build_index())?)
    }

    pub fn memory(&self) -> Memory {
        self.caches.iter().map(PqKvCache::memory).fold(Memory::default(), |sum, memory| Memory {
            kv_bytes: sum.kv_bytes + memory.kv_bytes,
            index_bytes: sum.index_bytes + memory.index_bytes,
        })
    }
}

/// How each layer attends.
#[derive(Clone)]
struct Attention {
    /// One a layer. Those of equal configs are one, and have the same buffers.
    pq: Vec<PqAttention>,
    scale: f32,
    kinds: Vec<LayerKind>,
    /// The first so many layers attend to all keys.
    dense_layers: usize,
}

impl Attention {
    fn new(config: &ModelConfig, pq: impl Fn(usize) -> PqConfig) -> Result<Self> {
        let scale = config.attention_scale();
        let kinds = (0..config.layers).map(|layer| config.layer_kind(layer)).collect();
        let first = PqAttention::new(pq(0), scale)?;
        let mut attention = Self { pq: vec![first; config.layers], scale, kinds, dense_layers: 0 };
        (1..config.layers).try_for_each(|layer| attention.set(layer, pq(layer)).map(|_| ()))?;
        Ok(attention)
    }

    /// Gives a layer a config of its own.
    fn set(&mut self, layer: usize, pq: PqConfig) -> Result<&PqAttention> {
        let equal = self.pq.iter().find(|other| *other.config() == pq).cloned();
        self.pq[layer] = equal.map_or_else(|| PqAttention::new(pq, self.scale), Ok)?;
        Ok(&self.pq[layer])
    }

    fn has_windows(&self) -> bool {
        self.kinds.iter().any(|kind| matches!(kind, LayerKind::Sliding(_)))
    }

    fn is_sparse(&self, layer: usize) -> bool {
        layer >= self.dense_layers && !matches!(self.kinds[layer], LayerKind::Sliding(_))
    }

    /// Keys of `n` that a step attends to.
    fn attended(&self, layer: usize, n: usize, dense: bool) -> usize {
        match self.kinds[layer] {
            LayerKind::Sliding(window) => n.min(window),
            _ if dense || !self.is_sparse(layer) => n,
            _ => self.pq[layer].config().attended(n),
        }
    }

    fn attend(&self, layer: usize, qkv: [&Tensor; 3], cache: &mut PqKvCache, dense: bool) -> Result<Tensor> {
        let [q, k, v] = qkv;
        Ok(match self.kinds[layer] {
            LayerKind::Sliding(window) => sliding::attend(q, k, v, cache, window, self.scale)?,
            _ if dense || !self.is_sparse(layer) => self.pq[layer].forward_dense(q, k, v, cache)?,
            _ => self.pq[layer].forward(q, k, v, cache)?,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::common::config::{LayerKind, RopeScaling};
    use crate::common::source::Checkpoint;
    use crate::common::testing::*;
    use candle_core::quantized::GgmlDType;
    use candle_core::Device;

    const TOKENS: [u32; 12] = [7, 3, 250, 7, 91, 18, 18, 4, 77, 130, 5, 60];

    fn load(path: &std::path::Path, dtype: DType) -> Result<Model> {
        let mut checkpoint = Checkpoint::open(path.to_str().unwrap())?;
        let config = checkpoint.config()?;
        let pq = PqConfig { pq_dim: 4, ..PqConfig::default() };
        Model::new(&config, Weights::new(checkpoint, &config, dtype, &Device::Cpu)?, &pq, 16)
    }

    /// The same tokens in two chunks and a step, as a prompt and decoding come.
    fn logits(mut model: Model) -> Result<Vec<f32>> {
        model.forward(&TOKENS[..5], true)?;
        model.forward(&TOKENS[5..11], false)?;
        let logits = model.forward(&TOKENS[11..], false)?;
        assert_eq!(model.len(), TOKENS.len());
        Ok(logits)
    }

    fn assert_near(logits: &[f32], expected: &[f64], tolerance: f64, what: &str) {
        assert_eq!(logits.len(), expected.len(), "{what}");
        let off = logits.iter().zip(expected).map(|(l, e)| (f64::from(*l) - e).abs()).fold(0., f64::max);
        assert!(off < tolerance, "{what}: off by {off}");
    }

    /// One model as a directory and as several files, against the forward pass by the book.
    fn check_directory(architecture: &str, config: &ModelConfig) -> Result<()> {
        let tensors = tiny_tensors(config)?;
        let expected = naive_logits(config, &tensors, &TOKENS)?;
        for shards in [1, 3] {
            let directory = tempfile::tempdir()?;
            write_directory(directory.path(), architecture, config, &tensors, shards)?;
            let logits = logits(load(directory.path(), DType::F32)?)?;
            assert_near(&logits, &expected, 1e-4, &format!("{architecture}, {shards} safetensors"));
        }
        Ok(())
    }

    /// The same, and as GGUF.
    fn check(architecture: &str, config: &ModelConfig) -> Result<()> {
        check_directory(architecture, config)?;
        let tensors = tiny_tensors(config)?;
        let expected = naive_logits(config, &tensors, &TOKENS)?;
        let directory = tempfile::tempdir()?;
        let file = directory.path().join("tiny.gguf");
        let architecture = architecture.trim_end_matches("_text");
        write_gguf(&file, architecture, config, &tensors, &gguf_metadata(architecture, config, "smollm"))?;
        assert_near(&logits(load(&file, DType::F32)?)?, &expected, 1e-4, &format!("{architecture}, GGUF"));
        Ok(())
    }

    #[test]
    fn llama_equals_the_forward_pass_by_the_book() -> Result<()> {
        check("llama", &tiny_config())?;
        check("llama", &ModelConfig { tied_embeddings: true, rope_theta: 500., ..tiny_config() })
    }

    #[test]
    fn qwen2_has_biases() -> Result<()> {
        check("qwen2", &ModelConfig { qkv_bias: true, ..tiny_config() })
    }

    #[test]
    fn qwen3_normalises_queries_and_keys() -> Result<()> {
        check("qwen3", &ModelConfig { qk_norm: true, kv_heads: 1, ..tiny_config() })
    }

    #[test]
    fn phi3_fuses_projections() -> Result<()> {
        let config = ModelConfig { fused: true, ..tiny_config() };
        check("phi3", &config)?;
        let divisors = (1..=config.head_dim / 2).map(|i| 0.7 * i as f64).collect();
        let rope_scaling = RopeScaling::LongRope { divisors, attention_factor: 1.2 };
        check("phi3", &ModelConfig { rope_scaling, ..config })
    }

    #[test]
    fn smollm3_rotates_in_most_layers_only() -> Result<()> {
        let layer_kinds = [[LayerKind::Global; 3].as_slice(), &[LayerKind::NoRope]].concat();
        check("smollm3", &ModelConfig { layers: 4, layer_kinds, tied_embeddings: true, ..tiny_config() })
    }

    fn gemma3() -> ModelConfig {
        let layer_kinds = vec![LayerKind::Sliding(3), LayerKind::Global, LayerKind::Sliding(3)];
        let rope_scaling = RopeScaling::Linear(2.);
        let (query_pre_attn_scalar, local_rope_theta) = (Some(20.), Some(100.));
        let config = ModelConfig { gemma: true, qk_norm: true, tied_embeddings: true, layers: 3, ..tiny_config() };
        ModelConfig { layer_kinds, rope_scaling, query_pre_attn_scalar, local_rope_theta, ..config }
    }

    #[test]
    fn gemma3_has_windows_and_norms_of_its_own() -> Result<()> {
        check_directory("gemma3_text", &gemma3())?;
        // A window that holds all tokens, and one that lacks the first.
        for window in [12, 11] {
            let layer_kinds = vec![LayerKind::Sliding(window), LayerKind::Global, LayerKind::Sliding(window)];
            check_directory("gemma3_text", &ModelConfig { layer_kinds, ..gemma3() })?;
        }
        // GGUF has no key for another scale than the usual.
        let query_pre_attn_scalar = Some(gemma3().head_dim as f64);
        check("gemma3_text", &ModelConfig { query_pre_attn_scalar, ..gemma3() })
    }

    #[test]
    fn half_precision_is_near() -> Result<()> {
        let (config, directory) = (tiny_config(), tempfile::tempdir()?);
        let tensors = tiny_tensors(&config)?;
        write_directory(directory.path(), "llama", &config, &tensors, 1)?;
        let expected = naive_logits(&config, &tensors, &TOKENS)?;
        let largest = expected.iter().fold(0f64, |max, l| max.max(l.abs()));
        for (dtype, tolerance) in [(DType::BF16, 0.05), (DType::F16, 0.01)] {
            let model = load(directory.path(), dtype)?;
            let logits = logits(model)?;
            assert_near(&logits, &expected, tolerance * largest, dtype.as_str());
            assert!(logits.iter().zip(&expected).any(|(l, e)| (f64::from(*l) - e).abs() > 1e-6 * largest), "rounded");
        }
        Ok(())
    }

    #[test]
    fn half_precision_halves_the_cache() -> Result<()> {
        let (config, directory) = (tiny_config(), tempfile::tempdir()?);
        write_directory(directory.path(), "llama", &config, &tiny_tensors(&config)?, 1)?;
        for (dtype, bytes) in [(DType::F32, 4), (DType::BF16, 2)] {
            let mut model = load(directory.path(), dtype)?;
            model.forward(&TOKENS, true)?;
            // K and V of two layers, of two heads of 16.
            assert_eq!(model.memory().kv_bytes, 2 * 2 * 2 * 16 * TOKENS.len() * bytes);
        }
        Ok(())
    }

    #[test]
    fn truncating_forgets() -> Result<()> {
        for (architecture, config) in [("llama", tiny_config()), ("gemma3_text", gemma3())] {
            let directory = tempfile::tempdir()?;
            write_directory(directory.path(), architecture, &config, &tiny_tensors(&config)?, 1)?;
            let expected = logits(load(directory.path(), DType::F32)?)?;
            let mut model = load(directory.path(), DType::F32)?;
            model.forward(&TOKENS[..5], true)?;
            // More than the windows hold.
            model.forward(&[1, 2, 3, 4, 5], true)?;
            model.truncate(5)?;
            model.forward(&TOKENS[5..11], false)?;
            assert_eq!(model.forward(&TOKENS[11..], false)?, expected, "{architecture}");
        }
        Ok(())
    }

    #[test]
    fn attended_keys_are_a_mean_over_layers() -> Result<()> {
        let (config, directory) = (gemma3(), tempfile::tempdir()?);
        write_directory(directory.path(), "gemma3_text", &config, &tiny_tensors(&config)?, 1)?;
        let mut model = load(directory.path(), DType::F32)?;
        model.forward(&TOKENS, true)?;
        // Windows of 3, and all 12.
        assert_eq!((model.attended(true), model.attended(false)), (6., 6.));
        let error = model.with_dense_layers(4).err().unwrap().to_string();
        assert_eq!(error, "--dense-layers: expected at most 3, the model's layers; got 4");
        Ok(())
    }

    #[test]
    fn windows_are_kept_on_disk() -> Result<()> {
        let (config, directory) = (gemma3(), tempfile::tempdir()?);
        write_directory(directory.path(), "gemma3_text", &config, &tiny_tensors(&config)?, 1)?;
        let expected = logits(load(directory.path(), DType::F32)?)?;
        let mut model = load(directory.path(), DType::F32)?;
        model.forward(&TOKENS[..5], true)?;
        let file = directory.path().join("caches");
        model.save(&file, "")?;
        let caches = candle_pq_attn::load_caches(&file, 16, &Device::Cpu)?.caches;
        let checkpoint = Checkpoint::open(directory.path().to_str().unwrap())?;
        let weights = Weights::new(checkpoint, &config, DType::F32, &Device::Cpu)?;
        let mut model = Model::with_caches(&config, weights, caches)?;
        model.forward(&TOKENS[5..11], false)?;
        assert_eq!(model.forward(&TOKENS[11..], false)?, expected);
        Ok(())
    }

    #[test]
    fn a_graph_is_refused_where_windows_slide() -> Result<()> {
        let (config, directory) = (gemma3(), tempfile::tempdir()?);
        write_directory(directory.path(), "gemma3_text", &config, &tiny_tensors(&config)?, 1)?;
        let error = load(directory.path(), DType::F32)?.with_graphs().err().unwrap().to_string();
        assert!(error.contains("not for models with a sliding window"), "{error}");
        Ok(())
    }

    #[test]
    fn steps_of_a_graph_are_the_same() -> Result<()> {
        let (config, directory) = (tiny_config(), tempfile::tempdir()?);
        write_directory(directory.path(), "llama", &config, &tiny_tensors(&config)?, 1)?;
        let expected = logits(load(directory.path(), DType::F32)?)?;
        assert_eq!(logits(load(directory.path(), DType::F32)?.with_graphs()?)?, expected);
        Ok(())
    }

    #[test]
    fn gguf_spells_out_rope_divisors() -> Result<()> {
        let config = tiny_config();
        let mut tensors = tiny_tensors(&config)?;
        let directory = tempfile::tempdir()?;
        let file = directory.path().join("tiny.gguf");
        tensors.insert("rope_freqs.weight".into(), Tensor::full(4f32, config.head_dim / 2, &Device::Cpu)?);
        write_gguf(&file, "llama", &config, &tensors, &gguf_metadata("llama", &config, "smollm"))?;
        let got = Checkpoint::open(file.to_str().unwrap())?.config()?;
        assert_eq!(got.rope_scaling, RopeScaling::Divisors(vec![4.; config.head_dim / 2]));
        Ok(())
    }

    #[test]
    fn quantized_weights_stay_so() -> Result<()> {
        let config = ModelConfig { hidden_size: 64, intermediate_size: 96, ..tiny_config() };
        for (architecture, dtype) in
            [("llama", GgmlDType::Q8_0), ("qwen2", GgmlDType::Q8_0), ("llama", GgmlDType::Q4_1)]
        {
            let config = ModelConfig { qkv_bias: architecture == "qwen2", ..config.clone() };
            let directory = tempfile::tempdir()?;
            let file = directory.path().join("tiny.gguf");
            let metadata = gguf_metadata(architecture, &config, "smollm");
            write_gguf_of(dtype, &file, architecture, &config, &tiny_tensors(&config)?, &metadata)?;
            let load = |quantized: bool| {
                let mut checkpoint = Checkpoint::open(file.to_str().unwrap())?;
                let config = checkpoint.config()?;
                let weights = Weights::new(checkpoint, &config, DType::F32, &Device::Cpu)?;
                let weights = if quantized { weights.quantized() } else { weights };
                logits(Model::new(&config, weights, &PqConfig { pq_dim: 4, ..PqConfig::default() }, 16)?)
            };
            let (got, want) = (load(true)?, load(false)?);
            let norm = |x: &[f32]| x.iter().map(|x| x * x).sum::<f32>().sqrt();
            let off: Vec<f32> = got.iter().zip(&want).map(|(got, want)| got - want).collect();
            let error = norm(&off) / norm(&want);
            // Rows of activations are rounded to 8 bits; mixed-up weights would be off by about 1.
            assert!(error > 0. && error < 0.05, "{architecture} {dtype:?}: off by {error}");
        }
        Ok(())
    }

    #[test]
    fn a_missing_or_misshapen_tensor_is_named() -> Result<()> {
        let (config, name) = (tiny_config(), "model.layers.1.mlp.down_proj.weight");
        let complete = tiny_tensors(&config)?;
        let mut missing = complete.clone();
        missing.remove(name);
        let mut misshapen = complete.clone();
        misshapen.insert(name.into(), complete[name].t()?.contiguous()?);
        for (tensors, expected) in [(missing, "lacks the tensor"), (misshapen, "has shape [40, 24], expected [24, 40]")]
        {
            let directory = tempfile::tempdir()?;
            write_directory(directory.path(), "llama", &config, &tensors, 1)?;
            let file = directory.path().join("tiny.gguf");
            write_gguf(&file, "llama", &config, &tensors, &gguf_metadata("llama", &config, "smollm"))?;
            for path in [directory.path(), &file] {
                let error = load(path, DType::F32).err().unwrap().to_string();
                assert!(error.contains(name) && error.contains(expected), "{error}");
            }
        }
        Ok(())
    }
}
