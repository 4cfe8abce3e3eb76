//! A document is read once and asked about again and again.
//!
//!     cargo run --release --example ask -- --help

mod cli;
#[path = "../common/mod.rs"]
mod common;
mod session;
#[cfg(test)]
mod tests;

use std::io::{stdin, IsTerminal};
use std::mem::take;
use std::ops::ControlFlow;
use std::process::ExitCode;
use std::time::Instant;

use anyhow::{Context, Result};
use rustyline::error::ReadlineError;
use rustyline::history::DefaultHistory;
use rustyline::{Config, Editor};

use cli::Args;
use common::cli::print;
use common::terminal::{self, note};
use session::{Answer, Session, Together};

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
    match (&args.question[..], args.at_once) {
        ([], _) => converse(&mut session, args.sample_len),
        (questions, 1) => {
            questions.iter().try_for_each(|question| answer(&mut session, question, args.sample_len, || false))
        }
        (questions, at_once) => answer_together(&mut session, questions, at_once, args.sample_len),
    }
}

/// The document, from disk or from a text.
fn open(args: &Args) -> Result<Session> {
    match &args.load {
        Some(file) => Session::load(&args.model, file, args.sample_len),
        None => Session::read(&args.model, &args.index, &args.document()?, args.sample_len),
    }
}

/// Asks for questions until there are no more. At a terminal Ctrl-C stops an answer, and leaves where a question is asked
/// for.
fn converse(session: &mut Session, limit: usize) -> Result<()> {
    let (at_terminal, mut asked) = (stdin().is_terminal(), DefaultHistory::default());
    while let Some(question) = next_question(&mut asked)? {
        let shown = at_terminal.then(terminal::Answer::begin);
        let is_stopped = || shown.as_ref().is_some_and(terminal::Answer::is_stopped);
        if let Err(error) = answer(session, question.trim(), limit, is_stopped) {
            note(&format!("error: {error:#}"));
        }
    }
    Ok(())
}

fn next_question(asked: &mut DefaultHistory) -> Result<Option<String>> {
    // Anew for each: an editor keeps Ctrl-C to itself for as long as it lives.
    let mut lines = Editor::<(), _>::with_history(Config::default(), take(asked))?;
    let question = loop {
        match lines.readline("? ") {
            Ok(line) if line.trim().is_empty() => {}
            Ok(line) => {
                lines.add_history_entry(&line)?;
                break Some(line);
            }
            Err(ReadlineError::Eof | ReadlineError::Interrupted) => break None,
            Err(error) => return Err(error).context("cannot read a question"),
        }
    };
    *asked = take(lines.history_mut());
    Ok(question)
}

fn answer(session: &mut Session, question: &str, limit: usize, is_stopped: impl Fn() -> bool) -> Result<()> {
    let emit = |text: &str| {
        print(text)?;
        Ok(if is_stopped() { ControlFlow::Break(()) } else { ControlFlow::Continue(()) })
    };
    let Answer { text, read, until_first_token, steps } = session.ask(question, limit, emit)?;
    print("\n")?;
    if text.is_empty() && !is_stopped() {
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

fn answer_together(session: &mut Session, questions: &[String], at_once: usize, limit: usize) -> Result<()> {
    let Together { tokens, time } =
        session.ask_together(questions, at_once, limit, |answer| print(&format!("{answer}\n")))?;
    let (seconds, rate) = (time.as_secs_f64(), tokens as f64 / time.as_secs_f64());
    note(&format!("{} answers, {tokens} tokens in {seconds:.1} s, {rate:.1} tokens/s", questions.len()));
    Ok(())
}
