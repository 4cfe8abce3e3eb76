//! Prefill and decoding, token by token.

use std::ops::ControlFlow;
use std::time::{Duration, Instant};

use anyhow::Result;
use indicatif::ProgressBar;

use super::model::Model;
use super::sampling::Sampler;
use super::terminal::{bar, spinner};
use super::tokenizer::Codec;

/// Tokens a step of the prefill: enough for matrix products at full speed, few enough for the bar to move.
const CHUNK: usize = 512;

/// Runs the prompt through the model, and returns the logits after it.
pub fn prefill(model: &mut Model, prompt: &[u32]) -> Result<(Vec<f32>, Duration)> {
    let bar = bar(prompt.len(), "prefill {wide_bar} {pos}/{len} tokens, {eta} left")?;
    let start = Instant::now();
    let logits = read(model, prompt, &bar)?;
    let time = start.elapsed();
    bar.finish_and_clear();
    Ok((logits, time))
}

/// Appends `tokens` with dense attention, moves `bar` by them, and returns the logits after the last.
pub fn read(model: &mut Model, tokens: &[u32], bar: &ProgressBar) -> Result<Vec<f32>> {
    let mut logits = Vec::new();
    for chunk in tokens.chunks(CHUNK) {
        logits = model.forward(chunk, true)?;
        bar.inc(chunk.len() as u64);
    }
    Ok(logits)
}

/// Builds the index over the prompt, and returns how long it took.
pub fn build_index(model: &mut Model) -> Result<Duration> {
    let spinner = spinner("building the index");
    let start = Instant::now();
    model.build_index()?;
    let time = start.elapsed();
    spinner.finish_and_clear();
    Ok(time)
}

/// What to generate, and how.
pub struct Request<'a> {
    pub codec: &'a Codec,
    pub sampler: Sampler,
    /// Tokens at most.
    pub limit: usize,
}

/// An answer.
pub struct Decoded {
    pub tokens: Vec<u32>,
    pub text: String,
    pub steps: Steps,
}

/// Generates token by token; `emit` sees the text and says whether to go on, `observe` sees the logits of each step.
pub fn decode(
    model: &mut Model,
    mut request: Request,
    mut logits: Vec<f32>,
    dense: bool,
    mut emit: impl FnMut(&str) -> Result<ControlFlow<()>>,
    mut observe: impl FnMut(&[f32]),
) -> Result<Decoded> {
    let mut stream = request.codec.stream();
    let mut decoded = Decoded { tokens: Vec::new(), text: String::new(), steps: Steps::default() };
    loop {
        let token = request.sampler.sample(&logits)?;
        if request.codec.is_end(token) {
            return Ok(decoded);
        }
        decoded.tokens.push(token);
        let piece = stream(token)?;
        let flow = emit(&piece)?;
        decoded.text.push_str(&piece);
        if flow.is_break() || decoded.tokens.len() == request.limit {
            return Ok(decoded);
        }
        logits = decoded.steps.run(model, token, dense)?;
        observe(&logits);
    }
}

/// Decode steps: how many, how long, how many keys they attended to of how many.
#[derive(Debug, Default, Clone, Copy)]
pub struct Steps {
    pub count: usize,
    time: Duration,
    attended: f64,
    keys: usize,
}

impl Steps {
    /// Takes one.
    pub fn run(&mut self, model: &mut Model, token: u32, dense: bool) -> Result<Vec<f32>> {
        let start = Instant::now();
        let logits = model.forward(&[token], dense)?;
        self.time += start.elapsed();
        self.count += 1;
        self.attended += model.attended(dense);
        self.keys += model.len();
        Ok(logits)
    }

    /// 0 where there was no step.
    pub fn tokens_per_s(&self) -> f64 {
        ratio(self.count as f64, self.time.as_secs_f64())
    }

    /// 1 where there was no step.
    pub fn attended_fraction(&self) -> f64 {
        match self.count {
            0 => 1.,
            _ => ratio(self.attended, self.keys as f64),
        }
    }
}

fn ratio(part: f64, whole: f64) -> f64 {
    match whole > 0. {
        true => part / whole,
        false => 0.,
    }
}
