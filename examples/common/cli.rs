//! What the command lines share.

use std::io::{stdout, Write};
use std::process::ExitCode;

use anyhow::{Context, Result};
use candle_core::{DType, Device};
use candle_pq_attn::{Heavy, PqConfig, Selection, Tail};
use clap::builder::{PossibleValuesParser, TypedValueParser};
use clap::Parser;

use super::budget::LayerBudget;
use super::config::ModelConfig;
use super::model::Model;
use super::source::Checkpoint;
use super::terminal::tidy_on_ctrl_c;
use super::weights::Weights;

/// Which model, and where and how it runs.
#[derive(Debug, Clone, clap::Args)]
pub struct ModelArgs {
    /// smollm2 (fetched once with pip), a GGUF file, a directory in the layout of Hugging Face, or ORG/NAME on its hub:
    /// Llama, Mistral, Qwen2, Qwen3, Phi-3, SmolLM3 or Gemma 3
    #[arg(long, value_name = "MODEL", default_value = "smollm2")]
    pub model: String,
    /// Where to run
    #[arg(long, default_value = "cpu", value_parser = device)]
    pub device: Device,
    /// The type of keys and values, and of weights that are not quantised
    #[arg(long, default_value = "f32", value_parser = dtype())]
    pub dtype: DType,
    /// What becomes of weights that a GGUF file has quantised: left so they take a fraction of the memory, widened to --dtype
    /// they round less, and a small model is faster [default: quantized if the file is larger than 1 GB]
    #[arg(long, value_enum)]
    pub weights: Option<WeightsKept>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
pub enum WeightsKept {
    Quantized,
    Widened,
}

impl ModelArgs {
    /// The weights of a checkpoint, as is asked for, on a device.
    pub fn load(&self, checkpoint: Checkpoint, config: &ModelConfig, device: &Device) -> Result<Weights> {
        const LARGE: u64 = 1_000_000_000;
        let is_large = std::fs::metadata(checkpoint.path()).is_ok_and(|file| file.len() > LARGE);
        let default = if is_large { WeightsKept::Quantized } else { WeightsKept::Widened };
        let weights = Weights::new(checkpoint, config, self.dtype, device)?;
        Ok(match self.weights.unwrap_or(default) {
            WeightsKept::Quantized => weights.quantized(),
            WeightsKept::Widened => weights,
        })
    }
}

/// What sparse attention keeps and selects.
#[derive(Debug, Clone, clap::Args)]
pub struct IndexArgs {
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
    /// First layers that attend to all keys in every step
    #[arg(long, value_name = "N", default_value_t = 0)]
    pub dense_layers: usize,
    /// Layers, counted from 0, that select another number or share of keys than --heavy, such as 0-3=5%,10=512
    #[arg(long, value_name = "L=N|L-L=P%", value_delimiter = ',')]
    pub heavy_layers: Vec<LayerBudget>,
}

impl IndexArgs {
    /// Their config, for a model of that head dimension.
    pub fn config(&self, head_dim: usize) -> Result<PqConfig> {
        let config = PqConfig {
            sink: self.sink,
            window: self.window,
            heavy: self.heavy,
            pq_dim: self.pq_dim,
            pq_bits: self.pq_bits,
            coarse: self.coarse,
            tail: self.tail.unwrap_or(if self.coarse > 0 { Tail::ClusterMeans } else { Tail::None }),
            selection: self.selection,
            ..PqConfig::default()
        };
        config.validate(head_dim)?;
        Ok(config)
    }

    /// A model that has read nothing yet, with what some of its layers have of their own.
    pub fn set_layers(&self, model: Model) -> Result<Model> {
        model.with_dense_layers(self.dense_layers)?.with_heavy_layers(&self.heavy_layers)
    }
}

/// Parses the command line and runs; a bad one and an error are a line each, and exit codes 2 and 1.
pub fn run<A: Parser>(run: impl FnOnce(&A) -> Result<()>) -> ExitCode {
    let args = match A::try_parse() {
        Ok(args) => args,
        Err(help) if !help.use_stderr() => help.exit(),
        Err(error) => {
            eprintln!("{}", usage_error(&error.to_string()));
            return ExitCode::from(2);
        }
    };
    match tidy_on_ctrl_c().and_then(|()| run(&args)) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("error: {}", first_line(&format!("{error:#}")));
            ExitCode::FAILURE
        }
    }
}

/// To standard output, at once; a closed pipe is an error like any other.
pub fn print(text: &str) -> Result<()> {
    let mut out = stdout().lock();
    out.write_all(text.as_bytes()).and_then(|()| out.flush()).context("cannot write to standard output")
}

/// clap's report of a bad command line in one line, without the usage.
pub fn usage_error(report: &str) -> String {
    let usage = |line: &str| line.starts_with("Usage:") || line.starts_with("For more information");
    let lines = report.lines().map(str::trim).filter(|line| !line.is_empty());
    lines.take_while(|line| !usage(line)).collect::<Vec<_>>().join(" ")
}

/// An error without the backtrace that Candle puts below it where `RUST_BACKTRACE` is set.
pub fn first_line(error: &str) -> &str {
    error.lines().next().unwrap_or_default()
}

/// Parses a number that is not 0.
pub fn at_least_one(text: &str) -> std::result::Result<usize, String> {
    text.parse().ok().filter(|&n| n > 0).ok_or_else(|| "expected a number from 1 up".to_string())
}

/// Parses a budget of selected keys.
pub fn heavy(text: &str) -> std::result::Result<Heavy, String> {
    text.parse().map_err(|error: candle_core::Error| first_line(&error.to_string()).to_string())
}

/// Parses a device.
pub fn device(name: &str) -> Result<Device, String> {
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
