//! An answer, and the comparison of sparse with dense.

use std::ops::ControlFlow;
use std::time::Duration;

use anyhow::{ensure, Result};

use crate::common::decoding::{build_index, decode, prefill, Decoded, Request, Steps};
use crate::common::logits::{argmax, kl};
use crate::common::model::Model;
use crate::report::Comparison;

/// An answer, and the figures of its decode steps.
#[derive(Debug)]
pub struct Outcome {
    pub tokens: usize,
    pub text: String,
    /// Those of the sparse model where there are two.
    pub steps: Steps,
    pub index_time: Option<Duration>,
    pub comparison: Option<Comparison>,
    /// Mean over the steps, in nats, to the model that checked them.
    pub check_kl: Option<f64>,
}

/// Answers with dense or with sparse attention. The answer begins with one of `logits`, those after the prompt; `emit`
/// sees its text as it comes. With a `check`, another model then reads the prompt and the answer.
pub fn answer(
    model: &mut Model,
    request: Request,
    logits: Vec<f32>,
    dense: bool,
    emit: impl FnMut(&str) -> Result<ControlFlow<()>>,
    check: Option<Check>,
) -> Result<Outcome> {
    let index_time = (!dense).then(|| build_index(model)).transpose()?;
    let mut all_logits = Vec::new();
    let observe = |logits: &[f32]| {
        if check.is_some() {
            all_logits.push(logits.to_vec());
        }
    };
    let Decoded { tokens, text, steps } = decode(model, request, logits, dense, emit, observe)?;
    let check_kl = match check {
        None => None,
        Some(Check { model, prompt }) => {
            prefill(model, prompt)?;
            if !dense {
                build_index(model)?;
            }
            Some(replay(model, &tokens, &all_logits, dense)?.kl)
        }
    };
    Ok(Outcome { tokens: tokens.len(), text, steps, index_time, comparison: None, check_kl })
}

/// Another model, which has read nothing yet, and the prompt.
pub struct Check<'a> {
    pub model: &'a mut Model,
    pub prompt: &'a [u32],
}

/// Answers with dense attention, then has the sparse model read the same tokens, and compares the distributions that
/// the two give for each next one.
pub fn compare(
    model: &mut Model,
    request: Request,
    logits: Vec<f32>,
    emit: impl FnMut(&str) -> Result<ControlFlow<()>>,
) -> Result<Outcome> {
    const NO_STEP: &str = "the answer has no decode step to compare: give another prompt or --sample-len";
    ensure!(request.limit > 1, NO_STEP);
    let (prompt, first) = (model.len(), argmax(&logits));
    warm_up(model, first, true)?;
    let mut dense_logits = Vec::new();
    let dense = decode(model, request, logits, true, emit, |logits| dense_logits.push(logits.to_vec()))?;
    ensure!(dense.steps.count > 0, NO_STEP);

    model.truncate(prompt)?;
    let index_time = build_index(model)?;
    warm_up(model, first, false)?;
    let replay = replay(model, &dense.tokens, &dense_logits, false)?;
    let comparison = Comparison {
        dense_decode_tokens_per_s: dense.steps.tokens_per_s(),
        speedup: replay.steps.tokens_per_s() / dense.steps.tokens_per_s(),
        kl: replay.kl,
        top1_agreement: replay.top1_agreement,
    };
    Ok(Outcome {
        tokens: dense.tokens.len(),
        text: dense.text,
        steps: replay.steps,
        index_time: Some(index_time),
        comparison: Some(comparison),
        check_kl: None,
    })
}

struct Replay {
    steps: Steps,
    /// Mean over the steps, in nats, from the other model.
    kl: f64,
    /// Share of the steps whose likeliest next token is the same.
    top1_agreement: f64,
}

/// Feeds `tokens` to a model, and compares each step's logits with those of another.
fn replay(model: &mut Model, tokens: &[u32], others: &[Vec<f32>], dense: bool) -> Result<Replay> {
    let (mut steps, mut kl_sum, mut agreed) = (Steps::default(), 0., 0usize);
    for (&token, other) in tokens.iter().zip(others) {
        let logits = steps.run(model, token, dense)?;
        kl_sum += kl(other, &logits);
        agreed += usize::from(argmax(other) == argmax(&logits));
    }
    let count = steps.count.max(1) as f64;
    Ok(Replay { steps, kl: kl_sum / count, top1_agreement: agreed as f64 / count })
}

/// Takes a step and forgets it, so that the first one measured finds threads and caches warm.
fn warm_up(model: &mut Model, token: u32, dense: bool) -> Result<()> {
    let len = model.len();
    model.forward(&[token], dense)?;
    model.truncate(len)
}
