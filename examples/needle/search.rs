//! Asking a model for needles, with dense and with sparse attention.

use std::ops::ControlFlow;

use anyhow::Result;
use indicatif::ProgressBar;

use crate::common::decoding::{decode, read, Request};
use crate::common::model::Model;
use crate::common::sampling::Sampler;
use crate::common::tokenizer::Codec;
use crate::haystack::{Hidden, Needle};
use crate::report::{Answer, Asked};

/// A model, and the prompt that it has read.
pub struct Search<'a> {
    pub model: Model,
    pub codec: &'a Codec,
    /// Tokens of an answer at most.
    pub limit: usize,
    pub read: Vec<u32>,
}

impl Search<'_> {
    /// Asks for each needle.
    pub fn find(&mut self, hidden: &Hidden, bar: &ProgressBar) -> Result<Vec<Asked>> {
        hidden.needles.iter().zip(&hidden.prompts).map(|(needle, prompt)| self.ask(needle, prompt, bar)).collect()
    }

    /// Both answers begin after the same dense prefill, of which nothing is read twice that the last prompt had too.
    pub fn ask(&mut self, needle: &Needle, prompt: &[u32], bar: &ProgressBar) -> Result<Asked> {
        let known = shared(&self.read, prompt);
        self.model.truncate(known)?;
        let logits = read(&mut self.model, &prompt[known..], bar)?;
        self.read = prompt.to_vec();
        let dense = self.answer(needle, logits.clone(), true)?;
        self.model.truncate(prompt.len())?;
        self.model.build_index()?;
        let sparse = self.answer(needle, logits, false)?;
        self.model.truncate(prompt.len())?;
        bar.inc(2 * self.limit as u64);
        Ok(Asked { subject: needle.subject, secret: needle.secret, prompt_tokens: prompt.len(), dense, sparse })
    }

    fn answer(&mut self, needle: &Needle, logits: Vec<f32>, dense: bool) -> Result<Answer> {
        let request = Request { codec: self.codec, sampler: Sampler::new(0, 0., 1.), limit: self.limit };
        let decoded = decode(&mut self.model, request, logits, dense, |_| Ok(ControlFlow::Continue(())), |_| ())?;
        let (found, attended) = (needle.is_in(&decoded.text), decoded.steps.attended_fraction());
        Ok(Answer { text: decoded.text, found, attended })
    }
}

/// What the bar counts of these prompts: tokens that are read, and those that answers may have.
pub fn work<'a>(prompts: impl Iterator<Item = &'a Vec<u32>>, limit: usize) -> usize {
    let (mut last, mut steps) = (&Vec::new(), 0);
    for prompt in prompts {
        steps += prompt.len() - shared(last, prompt) + 2 * limit;
        last = prompt;
    }
    steps
}

/// Tokens at the beginning of `prompt` that were read for the `last` one. Its own last is none of them: the logits after it
/// are wanted.
fn shared(last: &[u32], prompt: &[u32]) -> usize {
    let same = last.iter().zip(prompt).take_while(|(a, b)| a == b).count();
    same.min(prompt.len().saturating_sub(1))
}
