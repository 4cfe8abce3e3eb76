//! The ported models against their originals, on the same weights and tokens.

use std::collections::HashMap;
use std::io::Cursor;

use anyhow::{ensure, Result};
use candle::quantized::gguf_file::{self, Value};
use candle::quantized::{GgmlDType, QTensor};
use candle::{DType, Device, Tensor};
use candle_nn::{Activation, VarBuilder, VarMap};
use candle_pq_attn::{Heavy, PqConfig, Tail};
use candle_transformers::models as original;
use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};

const VOCABULARY: usize = 64;
const HIDDEN: usize = 64;
const HEADS: usize = 4;
const KV_HEADS: usize = 2;
const LAYERS: usize = 2;
/// In two chunks, so that the second is attended to with an offset.
const PROMPT: [usize; 2] = [300, 150];
const STEPS: usize = 64;
const LEN: usize = PROMPT[0] + PROMPT[1] + STEPS;

const DEVICE: &Device = &Device::Cpu;

/// Attends densely, whatever the length.
fn dense() -> PqConfig {
    PqConfig { heavy: Heavy::Fraction(1.0), ..small() }
}

/// Selects all but a few keys. That all can be selected is what dense attention is for, so this is the nearest to it.
fn nearly_all() -> PqConfig {
    PqConfig { heavy: Heavy::Fraction(0.9), ..small() }
}

/// Trains, and so is sparse, from a few dozen keys on.
fn small() -> PqConfig {
    PqConfig {
        sink: 4,
        window: 40,
        heavy: Heavy::Fraction(0.1),
        pq_dim: 8,
        pq_bits: 5,
        coarse: 32,
        tail: Tail::ClusterMeans,
        ..PqConfig::default()
    }
}

/// A model as a program calls it: tokens `[b, s]` and their offset to logits of the last position.
type Model<'a> = Box<dyn FnMut(&Tensor, usize) -> Result<Tensor> + 'a>;

fn tokens(batch: usize) -> Result<Tensor> {
    let mut rng = StdRng::seed_from_u64(2);
    let tokens = (0..batch * LEN).map(|_| rng.random_range(0..VOCABULARY as u32)).collect();
    Ok(Tensor::from_vec(tokens, (batch, LEN), DEVICE)?)
}

/// The logits after each chunk of the prompt, then of each step.
fn read(mut model: Model, tokens: &Tensor) -> Result<Vec<Tensor>> {
    let chunks = PROMPT.into_iter().chain([1; STEPS]);
    let mut offset = 0;
    chunks
        .map(|s| {
            let logits = model(&tokens.narrow(1, offset, s)?, offset)?;
            offset += s;
            Ok(logits)
        })
        .collect()
}

/// Each difference's largest element, relative to the largest logit.
fn errors(got: &[Tensor], want: &[Tensor]) -> Result<Vec<f32>> {
    let largest = |x: &Tensor| -> Result<f32> { Ok(x.abs()?.flatten_all()?.max(0)?.to_scalar()?) };
    ensure!(got.len() == want.len());
    got.iter().zip(want).map(|(got, want)| Ok(largest(&got.sub(want)?)? / largest(want)?)).collect()
}

/// Reads with the original and, in each of the three ways, with the port.
fn compare<'a>(
    name: &str,
    batch: usize,
    original: Model<'a>,
    mut ported: impl FnMut(PqConfig) -> Result<Model<'a>>,
) -> Result<()> {
    let tokens = tokens(batch)?;
    let want = read(original, &tokens)?;
    let mut errors_with = |config| errors(&read(ported(config)?, &tokens)?, &want);
    let largest = |errors: &[f32]| errors.iter().copied().fold(0., f32::max);

    let with_dense = errors_with(dense())?;
    let (prompt, nearly) = (PROMPT.len(), nearly_all());
    for n in LEN - STEPS + 1..=LEN {
        assert!(dense().is_dense(n) && !nearly.is_dense(n) && !small().is_dense(n), "{n} keys");
        assert!((1..=8).contains(&(n - nearly.attended(n))), "{n} keys");
    }
    let with_nearly_all = errors_with(nearly)?;
    let with_few = errors_with(small())?;
    let steps = &with_few[prompt..];
    let (least, mean) = (steps.iter().copied().fold(f32::MAX, f32::min), steps.iter().sum::<f32>() / STEPS as f32);
    println!(
        "{name}: largest error {:.1e} dense, {:.1e} with all keys but 8; with few {least:.1e} to {:.1e}, mean {mean:.1e}",
        largest(&with_dense),
        largest(&with_nearly_all[prompt..]),
        largest(steps),
    );
    assert!(largest(&with_dense) < 1e-4, "{name}, dense: {with_dense:?}");
    // Prompts are dense whatever the config.
    assert!(largest(&with_nearly_all[..prompt]) < 1e-4, "{name}, nearly all: {with_nearly_all:?}");
    assert!(largest(&with_nearly_all) < 1e-2, "{name}, nearly all: {with_nearly_all:?}");
    // Random weights spread attention over keys that have nothing in common: no model is as hard to estimate.
    assert!(least > 1e-3 && mean < 0.3, "{name}, few: {with_few:?}");
    // An attention that only looked at the last keys would lose the same with both budgets.
    assert!(mean > 10. * largest(&with_nearly_all), "{name}: {with_few:?} {with_nearly_all:?}");
    Ok(())
}

/// Has a port read a batch of one, start over, and read that sequence twice as a batch of two.
fn start_over<M>(
    mut model: M,
    forward: impl Fn(&mut M, &Tensor, usize) -> candle::Result<Tensor>,
    clear: impl Fn(&mut M),
) -> Result<()> {
    let tokens = tokens(1)?;
    let alone = read(Box::new(|tokens, offset| Ok(forward(&mut model, tokens, offset)?)), &tokens)?;
    clear(&mut model);
    let twice = tokens.repeat((2, 1))?;
    let twice = read(Box::new(|tokens, offset| Ok(forward(&mut model, tokens, offset)?)), &twice)?;
    for row in 0..2 {
        let of_row: Vec<_> = twice.iter().map(|logits| logits.narrow(0, row, 1)).collect::<candle::Result<_>>()?;
        let errors = errors(&of_row, &alone)?;
        assert!(errors.iter().all(|error| *error < 1e-4), "row {row}: {errors:?}");
    }
    Ok(())
}

/// Weights of the names and shapes that `load` asks for, random but the same each time, and such that attention prefers
/// some keys over others.
fn weights<M>(load: impl FnOnce(VarBuilder) -> candle::Result<M>) -> Result<HashMap<String, Tensor>> {
    let asked_for = VarMap::new();
    load(VarBuilder::from_varmap(&asked_for, DType::F32, DEVICE))?;
    let asked_for = asked_for.data().lock().unwrap();
    let mut asked_for: Vec<_> = asked_for.iter().collect();
    asked_for.sort_by_key(|(name, _)| *name);
    let mut rng = StdRng::seed_from_u64(1);
    let mut random = |(name, var): (&String, &candle::Var)| {
        let range = match name.as_str() {
            "model.embed_tokens.weight" => -1.0..1.0,
            _ if name.ends_with("norm.weight") => 0.5..1.5,
            _ => -0.25..0.25,
        };
        let numbers = (0..var.elem_count()).map(|_| rng.random_range(range.clone())).collect();
        Ok((name.clone(), Tensor::from_vec::<_, f32>(numbers, var.shape(), DEVICE)?))
    };
    asked_for.into_iter().map(&mut random).collect()
}

/// The two types are alike but for what the port adds.
macro_rules! llama_config {
    ($llama:path) => {{
        use $llama as llama;
        llama::Config {
            hidden_size: HIDDEN,
            intermediate_size: 96,
            vocab_size: VOCABULARY,
            num_hidden_layers: LAYERS,
            num_attention_heads: HEADS,
            num_key_value_heads: KV_HEADS,
            use_flash_attn: false,
            rms_norm_eps: 1e-5,
            rope_theta: 10_000.,
            bos_token_id: None,
            eos_token_id: None,
            rope_scaling: None,
            max_position_embeddings: 1024,
            tie_word_embeddings: false,
        }
    }};
}

macro_rules! qwen3_config {
    ($qwen3:path $(, $pq:ident)?) => {{
        use $qwen3 as qwen3;
        qwen3::Config {
            vocab_size: VOCABULARY,
            hidden_size: HIDDEN,
            intermediate_size: 96,
            num_hidden_layers: LAYERS,
            num_attention_heads: HEADS,
            // Not the hidden size by the heads, as in some of the real models.
            head_dim: 32,
            attention_bias: false,
            num_key_value_heads: KV_HEADS,
            max_position_embeddings: 1024,
            sliding_window: None,
            max_window_layers: LAYERS,
            tie_word_embeddings: false,
            rope_theta: 10_000.,
            rms_norm_eps: 1e-6,
            use_sliding_window: false,
            hidden_act: Activation::Silu,
            $($pq,)?
        }
    }};
}

#[test]
fn llama() -> Result<()> {
    let (config, ported_config) = (llama_config!(original::llama), llama_config!(porting::llama));
    let weights = weights(|vb| original::llama::Llama::load(vb, &config))?;
    let vb = || VarBuilder::from_tensors(weights.clone(), DType::F32, DEVICE);
    for batch in [1, 2] {
        let model = original::llama::Llama::load(vb(), &config)?;
        let mut cache = original::llama::Cache::new(true, DType::F32, &config, DEVICE)?;
        let original: Model = Box::new(move |tokens, offset| Ok(model.forward(tokens, offset, &mut cache)?));
        compare(&format!("llama, batch {batch}"), batch, original, |pq| {
            let model = porting::llama::Llama::load(vb(), &ported_config)?;
            let mut cache = porting::llama::Cache::new(pq, batch, DType::F32, &ported_config, DEVICE)?;
            Ok(Box::new(move |tokens, offset| Ok(model.forward(tokens, offset, &mut cache)?)))
        })?;
    }
    Ok(())
}

#[test]
fn qwen3() -> Result<()> {
    let config = qwen3_config!(original::qwen3);
    let weights = weights(|vb| original::qwen3::ModelForCausalLM::new(&config, vb))?;
    let vb = || VarBuilder::from_tensors(weights.clone(), DType::F32, DEVICE);
    for batch in [1, 2] {
        let mut model = original::qwen3::ModelForCausalLM::new(&config, vb())?;
        let original: Model = Box::new(move |tokens, offset| Ok(model.forward(tokens, offset)?));
        compare(&format!("qwen3, batch {batch}"), batch, original, |pq| {
            let mut model = porting::qwen3::ModelForCausalLM::new(&qwen3_config!(porting::qwen3, pq), vb())?;
            Ok(Box::new(move |tokens, offset| Ok(model.forward(tokens, offset)?)))
        })?;
    }
    Ok(())
}

#[test]
fn cleared_models_take_another_batch_size() -> Result<()> {
    let config = qwen3_config!(original::qwen3);
    let weights = weights(|vb| original::qwen3::ModelForCausalLM::new(&config, vb))?;
    let pq = dense();
    let vb = VarBuilder::from_tensors(weights, DType::F32, DEVICE);
    let model = porting::qwen3::ModelForCausalLM::new(&qwen3_config!(porting::qwen3, pq), vb)?;
    start_over(model, |model, tokens, offset| model.forward(tokens, offset), |model| model.clear_kv_cache())?;

    let file = qwen3_gguf()?;
    let content = gguf_file::Content::read(&mut Cursor::new(&file))?;
    let mut reader = Cursor::new(&file);
    let model = porting::quantized_qwen3::ModelWeights::from_gguf(content, &mut reader, dense(), DEVICE)?;
    start_over(model, |model, tokens, offset| model.forward(tokens, offset), |model| model.clear_kv_cache())
}

#[test]
fn quantized_qwen3() -> Result<()> {
    let file = qwen3_gguf()?;
    let content = || gguf_file::Content::read(&mut Cursor::new(&file));
    let mut model = original::quantized_qwen3::ModelWeights::from_gguf(content()?, &mut Cursor::new(&file), DEVICE)?;
    let original: Model = Box::new(move |tokens, offset| Ok(model.forward(tokens, offset)?));
    // The original takes no larger batch on a CPU.
    compare("quantized_qwen3, batch 1", 1, original, |pq| {
        let mut reader = Cursor::new(&file);
        let mut model = porting::quantized_qwen3::ModelWeights::from_gguf(content()?, &mut reader, pq, DEVICE)?;
        Ok(Box::new(move |tokens, offset| Ok(model.forward(tokens, offset)?)))
    })
}

/// A GGUF file of f32 tensors, the weights of a Qwen3.
fn qwen3_gguf() -> Result<Vec<u8>> {
    let config = qwen3_config!(original::qwen3);
    let weights = weights(|vb| original::qwen3::ModelForCausalLM::new(&config, vb))?;
    let renamed = weights.iter().map(|(name, tensor)| {
        // Products with quantized weights round their input to 8 bits, which makes much of the last bit of a sum.
        Ok((gguf_name(name), QTensor::quantize(tensor, GgmlDType::F32)?))
    });
    let renamed = renamed.collect::<Result<Vec<_>>>()?;
    let tensors: Vec<_> = renamed.iter().map(|(name, tensor)| (name.as_str(), tensor)).collect();
    let integer = |n: usize| Value::U32(n as u32);
    let metadata = [
        // The angles in f32: by default they are in f16.
        ("general.dtype", integer(0)),
        ("qwen3.block_count", integer(LAYERS)),
        ("qwen3.context_length", integer(config.max_position_embeddings)),
        ("qwen3.embedding_length", integer(HIDDEN)),
        ("qwen3.attention.head_count", integer(HEADS)),
        ("qwen3.attention.head_count_kv", integer(KV_HEADS)),
        ("qwen3.attention.key_length", integer(config.head_dim)),
        ("qwen3.attention.layer_norm_rms_epsilon", Value::F32(config.rms_norm_eps as f32)),
        ("qwen3.rope.freq_base", Value::F32(config.rope_theta as f32)),
    ];
    let metadata = metadata.each_ref().map(|(name, value)| (*name, value));
    let mut file = Cursor::new(Vec::new());
    gguf_file::write(&mut file, &metadata, &tensors)?;
    Ok(file.into_inner())
}

fn gguf_name(name: &str) -> String {
    [
        ("model.layers", "blk"),
        ("model.embed_tokens", "token_embd"),
        ("model.norm", "output_norm"),
        ("lm_head", "output"),
        ("input_layernorm", "attn_norm"),
        ("post_attention_layernorm", "ffn_norm"),
        ("self_attn.o_proj", "attn_output"),
        ("self_attn.", "attn_"),
        ("mlp.", "ffn_"),
        ("_proj", ""),
    ]
    .iter()
    .fold(name.to_string(), |name, (hf, gguf)| name.replace(hf, gguf))
}
