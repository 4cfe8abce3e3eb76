//! The command line.

use std::path::PathBuf;

use anyhow::{ensure, Result};
use clap::Parser;

use crate::common::cli::{at_least_one, IndexArgs, ModelArgs};
use crate::common::source::read;

/// Reads a document once, then answers question after question about it.
///
/// Between questions the cache goes back to the end of the document, so a question costs its own tokens and its answer,
/// however long the document is. Answers attend sparsely to it; each depends on the document and its question alone.
///
/// Without --question, questions are read from the terminal, or line by line from standard input.
///
/// --save keeps what was read of the document on disk, keys, values and index; --load goes on from there, with the same
/// answers, without reading the document again.
#[derive(Debug, Parser)]
#[command(name = "ask", args_override_self = true, after_help = EXAMPLES)]
pub struct Args {
    /// The document; several files are read one after the other
    #[arg(value_name = "FILE", required_unless_present = "load", conflicts_with = "load")]
    documents: Vec<PathBuf>,
    /// A question, instead of asking at the terminal; may be given several times
    #[arg(long, short, value_name = "TEXT")]
    pub question: Vec<String>,
    /// Answer up to N of the questions at a time, each in a fork of what was read: the weights are read once for all of them
    #[arg(long, value_name = "N", default_value = "1", value_parser = at_least_one, requires = "question")]
    pub at_once: usize,
    /// Keep what was read in FILE
    #[arg(long, value_name = "FILE")]
    pub save: Option<PathBuf>,
    /// Go on from what --save has kept in FILE, of the same --model and --dtype; what is kept and selected is as it was then
    #[arg(long, value_name = "FILE", conflicts_with = "save")]
    pub load: Option<PathBuf>,
    /// Tokens of an answer at most
    #[arg(long, value_name = "N", default_value = "128", value_parser = at_least_one)]
    pub sample_len: usize,
    #[command(flatten)]
    pub model: ModelArgs,
    #[command(flatten)]
    pub index: IndexArgs,
}

const EXAMPLES: &str = "\
EXAMPLES
  ask README.md -q \"What is it for?\" -q \"How is it installed?\"
  ask README.md --at-once 3 -q \"What is it for?\" -q \"How is it installed?\" -q \"Who may use it?\"
  ask --save manual.pq manual.txt -q \"Is there an index?\"
  ask --load manual.pq";

impl Args {
    /// The document's text.
    pub fn document(&self) -> Result<String> {
        let texts: Result<Vec<_>> = self.documents.iter().map(|file| read(file)).collect();
        let text = texts?.concat();
        ensure!(!text.trim().is_empty(), "the document is empty: give some text");
        Ok(text)
    }
}
