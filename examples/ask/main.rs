//! A document is read once and asked about again and again.
//!
//!     cargo run --release --example ask -- --help

mod cli;
#[path = "../common/mod.rs"]
mod common;
mod session;
#[cfg(test)]
mod tests;

use std::io::{stderr, IsTerminal};
use std::process::ExitCode;
use std::time::Instant;

use anyhow::{Context, Result};
use rustyline::error::ReadlineError;
use rustyline::DefaultEditor;

use cli::Args;
use common::cli::print;
use session::{Answer, Session};

fn main() -> ExitCode {
    // Within the thread pool: work that one of its threads hands out costs no switch to another thread.
    common::cli::run(|args| rayon::scope(|_| run(args)))
}

fn run(args: &Args) -> Result<()> {
    let start = Instant::now();
    let mut session = open(args)?;
    note(&format!("{} tokens of the document at hand after {:.1} s", session.tokens(), start.elapsed().as_secs_f64()));
    if let Some(file) = &args.save {
        session.save(file)?;
        let megabytes = std::fs::metadata(file).map_or(0, |file| file.len()) as f64 / 1e6;
        note(&format!("kept in {}, {megabytes:.0} MB", file.display()));
    }
    for question in &args.question {
        answer(&mut session, question, args.sample_len)?;
    }
    match args.question.is_empty() {
        true => converse(&mut session, args.sample_len),
        false => Ok(()),
    }
}

/// The document, from disk or from a text.
fn open(args: &Args) -> Result<Session> {
    match &args.load {
        Some(file) => Session::load(&args.model, file, args.sample_len),
        None => Session::read(&args.model, &args.index, &args.document()?, args.sample_len),
    }
}

/// Asks for questions until there are no more.
fn converse(session: &mut Session, limit: usize) -> Result<()> {
    let mut lines = DefaultEditor::new()?;
    loop {
        match lines.readline("? ") {
            Ok(question) if question.trim().is_empty() => {}
            Ok(question) => {
                lines.add_history_entry(&question)?;
                if let Err(error) = answer(session, question.trim(), limit) {
                    note(&format!("error: {error:#}"));
                }
            }
            Err(ReadlineError::Eof | ReadlineError::Interrupted) => return Ok(()),
            Err(error) => return Err(error).context("cannot read a question"),
        }
    }
}

fn answer(session: &mut Session, question: &str, limit: usize) -> Result<()> {
    let Answer { text, read, until_first_token, steps } = session.ask(question, limit, print)?;
    print("\n")?;
    if text.is_empty() {
        note("the model ended its answer before its first word");
    }
    note(&format!(
        "read {read} tokens, first word after {:.2} s, then {:.1} tokens/s over {:.1}% of the keys",
        until_first_token.as_secs_f64(),
        steps.tokens_per_s(),
        100. * steps.attended_fraction()
    ));
    Ok(())
}

/// To standard error, faint on a terminal.
fn note(text: &str) {
    match stderr().is_terminal() {
        true => eprintln!("\x1b[2m{text}\x1b[0m"),
        false => eprintln!("{text}"),
    }
}
