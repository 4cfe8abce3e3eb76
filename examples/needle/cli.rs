//! The command line.

use std::fmt;
use std::path::PathBuf;
use std::str::FromStr;

use anyhow::Result;
use clap::Parser;

use crate::common::cli::{at_least_one, IndexArgs, ModelArgs};
use crate::common::text::Text;
use crate::haystack::SUBJECTS;

/// Hides needles in a haystack, and asks for them with dense and with sparse attention.
///
/// The haystack is the beginning of a text, as long as fits. At a depth of it, from 0% (its beginning) to 100% (its end,
/// just before the question), N sentences are put between two of its own:
///
///   The special magic number for Lyon is 4821.
///
/// and a question at the end asks for one of them, for each of the N in turn:
///
///   What is the special magic number for Lyon?
///
/// The prompt is read once, densely, as always; then the model answers twice with what is likeliest, token by token: with
/// dense attention, and with sparse attention. (The first token of both is the prefill's.) A needle is found if the answer
/// contains its number. The table has, for each depth and length, how many were found.
///
/// What dense attention does not find, the model cannot: compare the two. With no arguments, SmolLM2-135M-Instruct
/// searches a chapter of the Rust book; this takes up to 20 minutes on two cores, and --lengths 1k,2k a few.
#[derive(Debug, Parser)]
#[command(name = "needle", args_override_self = true, verbatim_doc_comment)]
pub struct Args {
    #[command(flatten)]
    pub model: ModelArgs,
    #[command(flatten)]
    pub index: IndexArgs,
    /// Tokens of the whole prompt, its template and question included; 1k is 1,024. Where an answer would not fit into the
    /// model's context behind it, so many less
    #[arg(long, value_name = "N|Nk", default_value = "1k,2k,4k,8k", value_delimiter = ',')]
    pub lengths: Vec<Length>,
    /// How many depths, evenly from 0% to 100%; a single one is 50%
    #[arg(long, value_name = "D", default_value = "5", value_parser = at_least_one)]
    depths: usize,
    /// Needles hidden together, and asked for one by one, in each prompt
    #[arg(long, value_name = "N", default_value = "3", value_parser = needles)]
    pub needles: usize,
    /// The haystack; several files are read one after the other [default: a chapter of the Rust book]
    #[arg(long, value_name = "FILE", num_args = 1..)]
    text: Vec<PathBuf>,
    /// Tokens of an answer at most
    #[arg(long, value_name = "N", default_value = "24", value_parser = at_least_one)]
    pub sample_len: usize,
    /// Seed of what is hidden
    #[arg(long, value_name = "S", default_value_t = 0)]
    pub seed: u64,
    /// Write all answers to FILE
    #[arg(long, value_name = "FILE")]
    pub json: Option<PathBuf>,
    /// Draw what was found, by depth and length, to FILE
    #[arg(long, value_name = "FILE.svg", value_parser = svg)]
    pub plot: Option<PathBuf>,
}

/// A number of tokens.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Length(pub usize);

impl FromStr for Length {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let (number, unit) = text.strip_suffix('k').map_or((text, 1), |number| (number, 1024));
        let tokens = at_least_one(number).ok().and_then(|number| number.checked_mul(unit));
        tokens.map(Self).ok_or_else(|| "expected a number of tokens such as 1500 or 4k".to_string())
    }
}

impl fmt::Display for Length {
    fn fmt(&self, f: &mut fmt::Formatter) -> fmt::Result {
        match self.0.is_multiple_of(1024) {
            true => write!(f, "{}k", self.0 / 1024),
            false => write!(f, "{}", self.0),
        }
    }
}

impl Args {
    /// As shares of the haystack.
    pub fn depths(&self) -> Vec<f64> {
        match self.depths {
            1 => vec![0.5],
            n => (0..n).map(|i| i as f64 / (n - 1) as f64).collect(),
        }
    }

    pub fn text(&self) -> Result<Text> {
        Text::of(&self.text)
    }
}

fn needles(text: &str) -> Result<usize, String> {
    let number = text.parse().ok().filter(|n| (1..=SUBJECTS.len()).contains(n));
    number.ok_or_else(|| format!("expected a number from 1 to {}", SUBJECTS.len()))
}

fn svg(text: &str) -> Result<PathBuf, String> {
    let file = PathBuf::from(text);
    let is_svg = file.extension().is_some_and(|extension| extension.eq_ignore_ascii_case("svg"));
    is_svg.then_some(file).ok_or_else(|| "expected a name that ends in .svg".to_string())
}
