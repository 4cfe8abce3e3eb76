//! The command line.

use std::path::PathBuf;

use anyhow::{ensure, Result};
use candle_core::Device;
use candle_pq_attn::PqConfig;
use clap::{Parser, ValueEnum};

use crate::common::cli::{at_least_one, device, IndexArgs, ModelArgs};
use crate::common::source::read;

/// Answers from a long document with sparse attention, dense attention, or both in comparison.
///
/// With no arguments, SmolLM2-135M-Instruct answers a question about a section of the Rust book.
#[derive(Debug, Parser)]
#[command(name = "generate", args_override_self = true)]
pub struct Args {
    #[command(flatten)]
    pub model: ModelArgs,
    #[command(flatten)]
    pub index: IndexArgs,
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
    /// Has the same model on this device, cpu or cuda, read prompt and answer, and reports how far its distributions are off
    #[arg(long, value_name = "DEVICE", value_parser = device)]
    pub check_on: Option<Device>,
    /// Capture a decode step as a CUDA graph and replay it for each token, with --device cuda
    #[arg(long)]
    pub graph: bool,
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
    /// The config of sparse attention, for a model of that head dimension.
    pub fn pq_config(&self, head_dim: usize) -> Result<PqConfig> {
        // A dense run keeps no sample of queries for an index that it does not build.
        let query_weights = self.attention != Attention::Dense;
        Ok(PqConfig { query_weights, ..self.index.config(head_dim)? })
    }

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
}

fn temperature(text: &str) -> Result<f64, String> {
    let number = text.parse().ok().filter(|t: &f64| t.is_finite() && *t >= 0.);
    number.ok_or_else(|| "expected 0 or a positive number".to_string())
}

fn top_p(text: &str) -> Result<f64, String> {
    let number = text.parse().ok().filter(|&p: &f64| p > 0. && p <= 1.);
    number.ok_or_else(|| "expected a number above 0, at most 1".to_string())
}
