//! Measures how close sparse attention comes to dense attention.
//!
//!     cargo run --release --example fidelity -- --help

mod attend;
mod cli;
#[path = "../common/mod.rs"]
mod common;
mod measure;
mod methods;
mod plot;
mod report;
mod subject;
#[cfg(test)]
mod tests;

use std::process::ExitCode;

use anyhow::{ensure, Context, Result};
use candle_core::{DType, Device};

use cli::{Args, Measure};
use common::decoder::Decoder;
use common::source::Checkpoint;
use common::terminal::bar;
use common::tokenizer::Codec;
use common::weights::Weights;
use measure::Task;
use methods::Settings;
use report::Report;
use subject::Subject;

fn main() -> ExitCode {
    common::cli::run(|args| {
        println!("{}", run(args)?);
        Ok(())
    })
}

/// Measures, and writes the files that were asked for.
fn run(args: &Args) -> Result<Report> {
    let report = measure(args)?;
    if let Some(file) = &args.json {
        let json = serde_json::to_string_pretty(&report)? + "\n";
        std::fs::write(file, json).with_context(|| format!("cannot write {}", file.display()))?;
    }
    if let Some(file) = &args.plot {
        plot::draw(&report, file)?;
    }
    Ok(report)
}

fn measure(args: &Args) -> Result<Report> {
    let methods = args.methods.iter().map(|name| methods::parse(name).with_context(|| format!("--methods {name}")));
    let methods = methods.collect::<Result<Vec<_>>>()?;
    let text = args.text()?;
    let mut checkpoint = Checkpoint::open(&args.model)?;
    let config = checkpoint.config()?;
    let layers = args.layers.of(&config)?;
    let tokens = tokens(args, &Codec::new(&mut checkpoint)?.encode_plain(&text.content)?, config.context)?;
    let decoder = Decoder::new(&config, Weights::new(checkpoint, &config, DType::F32, &Device::Cpu)?)?;

    let reading = bar(tokens.len() - 1, "{msg} {wide_bar} {pos}/{len} tokens, {eta} left")?;
    reading.set_message("dense attention");
    let subject = Subject::read(decoder, &config, tokens, args.prompt_tokens, &reading)?;
    reading.finish_and_clear();

    let train_keys = args.train_tokens.unwrap_or(args.prompt_tokens).min(args.prompt_tokens);
    let settings = Settings {
        sink: args.sink,
        window: args.window,
        seed: args.seed,
        train_keys,
        max_train_keys: args.max_train_keys,
    };
    let task = Task {
        subject: &subject,
        heavy: &args.heavy,
        settings,
        layers: if args.measure == Measure::Model { Vec::new() } else { layers },
        probes: args.probes(),
        whole_model: args.measure != Measure::Layers,
    };
    let (prefills, dense) = (task.prefills()?, task.dense()?);
    let steps = methods.iter().map(|method| task.steps(method.as_ref())).sum();
    let progress = bar(steps, "{msg} {wide_bar} {percent}%, {eta} left")?;
    let methods = args.methods.iter().zip(&methods);
    let methods = methods.map(|(name, method)| task.run(name, method.as_ref(), &prefills, &dense, &progress));
    let methods = methods.collect::<Result<_>>()?;
    progress.finish_and_clear();
    Ok(Report {
        model: args.model.clone(),
        text: text.name,
        text_sha256: text.sha256,
        prompt_tokens: args.prompt_tokens,
        eval_tokens: args.eval_tokens,
        probes: args.probes(),
        sink: args.sink,
        window: args.window,
        seed: args.seed,
        train_tokens: train_keys,
        max_train_keys: args.max_train_keys,
        version: env!("CARGO_PKG_VERSION"),
        dense: subject.dense()?.into(),
        methods,
    })
}

/// The tokens of the prefill, those after it, and the one that the last of them is to predict.
fn tokens(args: &Args, text: &[u32], context: usize) -> Result<Vec<u32>> {
    let read = args.prompt_tokens.saturating_add(args.eval_tokens);
    ensure!(
        read <= context,
        "--prompt-tokens and --eval-tokens: expected at most {context} together, the model's context; got {read}"
    );
    ensure!(
        read < text.len(),
        "--text: expected more than {read} tokens, the prompt's and those after it; got {}: give more --text, or lower \
         --prompt-tokens or --eval-tokens",
        text.len()
    );
    Ok(text[..=read].to_vec())
}
