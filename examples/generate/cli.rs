//! The command line.

use std::path::PathBuf;

use anyhow::{ensure, Result};
use candle_core::{DType, Device};
use candle_pq_attn::{Heavy, PqConfig, Selection, Tail};
use clap::builder::{PossibleValuesParser, TypedValueParser};
use clap::{Parser, ValueEnum};

use crate::common::cli::{at_least_one, first_line, heavy};
use crate::common::source::read;

/// Answers from a long document with sparse attention, dense attention, or both in comparison.
///
/// With no arguments, SmolLM2-135M-Instruct answers a question about a section of the Rust book.
#[derive(Debug, Parser)]
#[command(name = "generate", args_override_self = true)]
pub struct Args {
    /// smollm2 (fetched once with pip), a GGUF file, a directory in the layout of Hugging Face, or ORG/NAME on its hub
    #[arg(long, value_name = "MODEL", default_value = "smollm2")]
    pub model: String,
    /// The prompt [default: a section of the Rust book and a question]
    #[arg(long, value_name = "TEXT", conflicts_with = "prompt_file")]
    prompt: Option<String>,
    /// A file with the prompt
    #[arg(long, value_name = "FILE")]
    prompt_file: Option<PathBuf>,
    /// Tokens to generate at most
    #[arg(long, value_name = "N", default_value = "128", value_parser = at_least_one)]
    pub sample_len: usize,
    /// 0 takes the likeliest token always
    #[arg(long, value_name = "T", default_value = "0", value_parser = temperature)]
    pub temperature: f64,
    /// Draws from the likeliest tokens that together have this probability
    #[arg(long, value_name = "P", default_value = "1", value_parser = top_p)]
    pub top_p: f64,
    /// Seed of the draws
    #[arg(long, value_name = "S", default_value_t = 0)]
    pub seed: u64,
    /// How decode steps attend
    #[arg(long, value_enum, default_value_t = Attention::Sparse)]
    pub attention: Attention,
    /// First keys, always attended
    #[arg(long, value_name = "N", default_value_t = PqConfig::default().sink)]
    sink: usize,
    /// Last keys, always attended
    #[arg(long, value_name = "N", default_value_t = PqConfig::default().window)]
    window: usize,
    /// Keys selected by score, a number or a share of all
    #[arg(long, value_name = "N|P%", default_value_t = PqConfig::default().heavy, value_parser = heavy)]
    heavy: Heavy,
    /// Subspaces, a divisor of the head dimension: bytes of codes a key
    #[arg(long, value_name = "N", default_value_t = PqConfig::default().pq_dim)]
    pq_dim: usize,
    /// Bits of a code, 1 to 8
    #[arg(long, value_name = "N", default_value_t = PqConfig::default().pq_bits)]
    pq_bits: usize,
    /// Clusters of whole keys under the codes, 0 for none
    #[arg(long, value_name = "N", default_value_t = PqConfig::default().coarse)]
    coarse: usize,
    /// What stands for the keys that are not selected [default: the clusters' means, where there are clusters]
    #[arg(long, value_parser = tail())]
    tail: Option<Tail>,
    /// Who selects: each query head, or all of a key-value head together
    #[arg(long, default_value = "query-head", value_parser = selection())]
    selection: Selection,
    /// Where to run
    #[arg(long, default_value = "cpu", value_parser = device)]
    pub device: Device,
    /// Has the same model on this device, cpu or cuda, read prompt and answer, and reports how far its distributions are off
    #[arg(long, value_name = "DEVICE", value_parser = device)]
    pub check_on: Option<Device>,
    /// Capture a decode step as a CUDA graph and replay it for each token, with --device cuda
    #[arg(long)]
    pub graph: bool,
    /// The type of weights, keys and values
    #[arg(long, default_value = "f32", value_parser = dtype())]
    pub dtype: DType,
    /// Print nothing but a JSON object at the end
    #[arg(long)]
    pub json: bool,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum Attention {
    Sparse,
    Dense,
    /// Dense, and sparse on its tokens: reports how they differ
    Both,
}

impl Args {
    /// The prompt's text.
    pub fn prompt(&self) -> Result<String> {
        let prompt = match (&self.prompt, &self.prompt_file) {
            (Some(text), _) => text.clone(),
            (None, Some(file)) => read(file)?,
            (None, None) => include_str!("prompt.txt").to_string(),
        };
        ensure!(!prompt.trim().is_empty(), "the prompt is empty: give some text");
        Ok(prompt)
    }

    /// The config of sparse attention, for a model of that head dimension.
    pub fn pq_config(&self, head_dim: usize) -> Result<PqConfig> {
        let config = PqConfig {
            sink: self.sink,
            window: self.window,
            heavy: self.heavy,
            pq_dim: self.pq_dim,
            pq_bits: self.pq_bits,
            coarse: self.coarse,
            tail: self.tail.unwrap_or(if self.coarse > 0 { Tail::ClusterMeans } else { Tail::None }),
            selection: self.selection,
            // A dense run keeps no sample of queries for an index that it does not build.
            query_weights: self.attention != Attention::Dense,
            ..PqConfig::default()
        };
        config.validate(head_dim)?;
        Ok(config)
    }
}

fn temperature(text: &str) -> Result<f64, String> {
    let number = text.parse().ok().filter(|t: &f64| t.is_finite() && *t >= 0.);
    number.ok_or_else(|| "expected 0 or a positive number".to_string())
}

fn top_p(text: &str) -> Result<f64, String> {
    let number = text.parse().ok().filter(|&p: &f64| p > 0. && p <= 1.);
    number.ok_or_else(|| "expected a number above 0, at most 1".to_string())
}

fn device(name: &str) -> Result<Device, String> {
    match name {
        "cpu" => Ok(Device::Cpu),
        "cuda" => Device::new_cuda(0).map_err(|error| {
            let error = first_line(&error.to_string()).to_string();
            format!("no GPU ({error}): build with --features cuda, where there is an NVIDIA GPU and its driver")
        }),
        _ => Err("expected cpu or cuda".to_string()),
    }
}

fn selection() -> impl TypedValueParser<Value = Selection> {
    PossibleValuesParser::new(["query-head", "kv-head"]).map(|name| match name.as_str() {
        "kv-head" => Selection::PerKvHead,
        _ => Selection::PerQueryHead,
    })
}

fn tail() -> impl TypedValueParser<Value = Tail> {
    PossibleValuesParser::new(["none", "cluster-means"]).map(|name| match name.as_str() {
        "none" => Tail::None,
        _ => Tail::ClusterMeans,
    })
}

fn dtype() -> impl TypedValueParser<Value = DType> {
    PossibleValuesParser::new(["f32", "bf16", "f16"]).map(|name| match name.as_str() {
        "bf16" => DType::BF16,
        "f16" => DType::F16,
        _ => DType::F32,
    })
}
