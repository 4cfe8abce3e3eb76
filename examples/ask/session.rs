//! A document that has been read, and questions about it.

mod together;

use std::ops::ControlFlow;
use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::{ensure, Context, Result};
use candle_pq_attn::{load_caches, SavedCaches};
use serde::{Deserialize, Serialize};

use crate::common::cli::{IndexArgs, ModelArgs};
use crate::common::config::ModelConfig;
use crate::common::decoding::{build_index, decode, prefill, Request, Steps};
use crate::common::model::Model;
use crate::common::sampling::Sampler;
use crate::common::source::Checkpoint;
use crate::common::tokenizer::Codec;

pub use together::Together;

/// A model that has read a document.
pub struct Session {
    model: Model,
    codec: Codec,
    about: About,
    context: usize,
}

/// What a file of caches is of.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
struct About {
    model: String,
    /// Of the document, and what the model expects before it.
    tokens: usize,
    /// First layers that attend to all keys.
    dense_layers: usize,
}

/// An answer, and what it cost.
pub struct Answer {
    pub text: String,
    /// Tokens that were read for it.
    pub read: usize,
    pub until_first_token: Duration,
    pub steps: Steps,
}

/// A model's parts but its weights.
fn open(args: &ModelArgs) -> Result<(Checkpoint, ModelConfig, Codec)> {
    let mut checkpoint = Checkpoint::open(&args.model)?;
    let config = checkpoint.config()?;
    let codec = Codec::new(&mut checkpoint)?;
    Ok((checkpoint, config, codec))
}

impl Session {
    /// Reads the document, with room for a question and an answer of `answer` tokens.
    pub fn read(args: &ModelArgs, index: &IndexArgs, document: &str, answer: usize) -> Result<Self> {
        let (checkpoint, config, codec) = open(args)?;
        let tokens = codec.encode_opening(&format!("{document}\n\n"))?;
        let context = config.context;
        ensure!(
            tokens.len() < context,
            "the document has {} tokens, the model's context {context}: shorten the document",
            tokens.len()
        );
        let weights = args.load(checkpoint, &config, &args.device)?;
        let capacity = (tokens.len() + answer + ROOM_FOR_A_QUESTION).min(context);
        let model = Model::new(&config, weights, &index.config(config.head_dim)?, capacity)?;
        let mut model = index.set_layers(model)?;
        prefill(&mut model, &tokens)?;
        build_index(&mut model)?;
        let about = About { model: args.model.clone(), tokens: tokens.len(), dense_layers: index.dense_layers };
        Ok(Self { model, codec, about, context })
    }

    /// Goes on from a file.
    pub fn load(args: &ModelArgs, file: &Path, answer: usize) -> Result<Self> {
        let (checkpoint, config, codec) = open(args)?;
        // Room for the document that it turns out to be.
        let SavedCaches { mut caches, about } = load_caches(file, 0, &args.device)?;
        let about: About = serde_json::from_str(&about)
            .with_context(|| format!("{}: expected what --save has written, got other caches", file.display()))?;
        ensure!(
            about.model == args.model,
            "{}: was read by the model {}, got --model {}",
            file.display(),
            about.model,
            args.model
        );
        ensure!(
            caches.iter().all(|cache| cache.len() == about.tokens),
            "{}: expected {} tokens in each layer",
            file.display(),
            about.tokens
        );
        for cache in &mut caches {
            cache.reserve((answer + ROOM_FOR_A_QUESTION).min(config.context.saturating_sub(about.tokens)))?;
        }
        let weights = args.load(checkpoint, &config, &args.device)?;
        let model = Model::with_caches(&config, weights, caches)
            .and_then(|model| model.with_dense_layers(about.dense_layers))
            .with_context(|| file.display().to_string())?;
        Ok(Self { model, codec, about, context: config.context })
    }

    /// Keeps what was read of the document.
    pub fn save(&self, file: &Path) -> Result<()> {
        self.model.save(file, &serde_json::to_string(&self.about)?)
    }

    /// Tokens of the document.
    pub fn tokens(&self) -> usize {
        self.about.tokens
    }

    /// The tokens of a question, and how many an answer may have.
    fn closing(&self, question: &str) -> Result<(Vec<u32>, usize)> {
        let question = self.codec.encode_closing(question)?;
        let room = (self.context + 1).saturating_sub(self.tokens() + question.len());
        ensure!(
            room > 0,
            "the document and the question have {} tokens, the model's context {}: ask a shorter one",
            self.tokens() + question.len(),
            self.context
        );
        Ok((question, room))
    }

    /// Answers a question about the document, whatever was asked before; `emit` sees the text as it comes, and says whether
    /// to go on.
    pub fn ask(
        &mut self,
        question: &str,
        limit: usize,
        emit: impl FnMut(&str) -> Result<ControlFlow<()>>,
    ) -> Result<Answer> {
        let (question, room) = self.closing(question)?;
        let start = Instant::now();
        let answer = self.model.forward(&question, true).and_then(|logits| {
            let until_first_token = start.elapsed();
            let request = Request { codec: &self.codec, sampler: Sampler::new(0, 0., 1.), limit: limit.min(room) };
            let decoded = decode(&mut self.model, request, logits, false, emit, |_| ())?;
            Ok(Answer { text: decoded.text, read: question.len(), until_first_token, steps: decoded.steps })
        });
        self.model.truncate(self.tokens())?;
        // A short document's index is trained anew while it is answered about, and forgotten with the answer.
        self.model.build_index()?;
        answer
    }
}

/// Tokens of a question for which there is room from the beginning; a longer one has the caches grow.
const ROOM_FOR_A_QUESTION: usize = 256;
