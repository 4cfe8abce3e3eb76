//! Several questions at once.

use std::time::{Duration, Instant};

use anyhow::Result;

use super::Session;
use crate::common::model::packed::Sequence;
use crate::common::sampling::Sampler;
use crate::common::tokenizer::Codec;

/// What answering questions together took.
pub struct Together {
    /// Of all answers.
    pub tokens: usize,
    pub time: Duration,
}

/// A question that is being answered.
struct Asked<'a> {
    /// The how manyth.
    index: usize,
    sequence: Sequence,
    /// What the next step reads: the question, then a token of the answer.
    next: Vec<u32>,
    text: String,
    tokens: usize,
    limit: usize,
    sampler: Sampler,
    stream: Box<dyn FnMut(u32) -> Result<String> + 'a>,
}

impl Asked<'_> {
    /// Takes the token that `logits` say, and whether it was the last.
    fn is_done(&mut self, codec: &Codec, logits: &[f32]) -> Result<bool> {
        let token = self.sampler.sample(logits)?;
        if codec.is_end(token) {
            return Ok(true);
        }
        self.text.push_str(&(self.stream)(token)?);
        self.tokens += 1;
        self.next = vec![token];
        Ok(self.tokens == self.limit)
    }
}

impl Session {
    /// Answers questions about the document, `at_once` at a time, each in a fork of what was read; where one is answered the
    /// next is begun, while the others go on. `emit` gets the answers in the order of the questions.
    pub fn ask_together(
        &mut self,
        questions: &[String],
        at_once: usize,
        limit: usize,
        mut emit: impl FnMut(&str) -> Result<()>,
    ) -> Result<Together> {
        let start = Instant::now();
        let questions: Vec<_> = questions.iter().map(|question| self.closing(question)).collect::<Result<_>>()?;
        let mut waiting = questions.into_iter().enumerate();
        let mut answers = vec![None; waiting.len()];
        let (mut asked, mut emitted, mut tokens): (Vec<Asked>, _, _) = (Vec::new(), 0, 0);
        loop {
            for (index, (question, room)) in waiting.by_ref().take(at_once - asked.len()) {
                let limit = limit.min(room);
                asked.push(Asked {
                    index,
                    sequence: self.model.fork(question.len() + limit)?,
                    next: question,
                    text: String::new(),
                    tokens: 0,
                    limit,
                    sampler: Sampler::new(0, 0., 1.),
                    stream: Box::new(self.codec.stream()),
                });
            }
            if asked.is_empty() {
                return Ok(Together { tokens, time: start.elapsed() });
            }
            let mut sequences: Vec<_> = asked.iter_mut().map(|one| (&mut one.sequence, &one.next[..])).collect();
            let logits = self.model.step(&mut sequences)?;
            let mut going_on = Vec::new();
            for (mut one, logits) in asked.into_iter().zip(logits) {
                match one.is_done(&self.codec, &logits)? {
                    true => {
                        tokens += one.tokens;
                        answers[one.index] = Some(one.text);
                    }
                    false => going_on.push(one),
                }
            }
            asked = going_on;
            while let Some(Some(answer)) = answers.get(emitted) {
                emit(answer)?;
                emitted += 1;
            }
        }
    }
}
