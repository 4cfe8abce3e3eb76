//! What the command lines share.

use std::process::ExitCode;

use anyhow::Result;
use candle_pq_attn::Heavy;
use clap::Parser;

/// Parses the command line and runs; a bad one and an error are a line each, and exit codes 2 and 1.
pub fn run<A: Parser>(run: impl FnOnce(&A) -> Result<()>) -> ExitCode {
    let args = match A::try_parse() {
        Ok(args) => args,
        Err(help) if !help.use_stderr() => help.exit(),
        Err(error) => {
            eprintln!("{}", usage_error(&error.to_string()));
            return ExitCode::from(2);
        }
    };
    match run(&args) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("error: {}", first_line(&format!("{error:#}")));
            ExitCode::FAILURE
        }
    }
}

/// clap's report of a bad command line in one line, without the usage.
pub fn usage_error(report: &str) -> String {
    let usage = |line: &str| line.starts_with("Usage:") || line.starts_with("For more information");
    let lines = report.lines().map(str::trim).filter(|line| !line.is_empty());
    lines.take_while(|line| !usage(line)).collect::<Vec<_>>().join(" ")
}

/// An error without the backtrace that Candle puts below it where `RUST_BACKTRACE` is set.
pub fn first_line(error: &str) -> &str {
    error.lines().next().unwrap_or_default()
}

/// Parses a number that is not 0.
pub fn at_least_one(text: &str) -> std::result::Result<usize, String> {
    text.parse().ok().filter(|&n| n > 0).ok_or_else(|| "expected a number from 1 up".to_string())
}

/// Parses a budget of selected keys.
pub fn heavy(text: &str) -> std::result::Result<Heavy, String> {
    text.parse().map_err(|error: candle_core::Error| first_line(&error.to_string()).to_string())
}
