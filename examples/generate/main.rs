//! A language model answers from a long document, with sparse attention next to dense.
//!
//!     cargo run --release --example generate -- --help

mod cli;
#[path = "../common/mod.rs"]
mod common;
mod generate;
#[cfg(test)]
#[path = "../common/parity.rs"]
mod parity;
mod report;

use std::ops::ControlFlow;
use std::process::ExitCode;

use anyhow::{ensure, Result};

use cli::{Args, Attention};
use common::cli::print;
use common::decoding::{prefill, Request};
use common::model::Model;
use common::sampling::Sampler;
use common::source::Checkpoint;
use common::tokenizer::Codec;
use generate::{answer, compare, Check};
use report::Report;

fn main() -> ExitCode {
    // Within the thread pool: work that one of its threads hands out costs no switch to another thread.
    common::cli::run(|args| rayon::scope(|_| run(args)))
}

fn run(args: &Args) -> Result<()> {
    let report = report(args)?;
    match args.json {
        true => print(&format!("{}\n", serde_json::to_string(&report)?)),
        false => print(&format!("\n\n{report}")),
    }
}

/// Generates; prints the text on the way unless there is to be JSON.
fn report(args: &Args) -> Result<Report> {
    let both = args.attention == Attention::Both;
    ensure!(!both || args.temperature == 0., "--attention both takes the likeliest tokens: leave out --temperature");
    ensure!(!both || args.check_on.is_none(), "--check-on checks one kind of attention: leave out --attention both");
    let mut checkpoint = Checkpoint::open(&args.model.model)?;
    let config = checkpoint.config()?;
    let pq = args.pq_config(config.head_dim)?;
    let codec = Codec::new(&mut checkpoint)?;
    let prompt = codec.encode(&args.prompt()?)?;
    let limit = room(prompt.len(), args.sample_len, config.context)?;
    let model_on = |checkpoint, device| {
        let weights = args.model.load(checkpoint, &config, device)?;
        args.index.set_layers(Model::new(&config, weights, &pq, prompt.len() + limit)?)
    };
    let mut model = model_on(checkpoint, &args.model.device)?;
    if args.graph {
        model = model.with_graphs()?;
    }

    let (logits, prefill_time) = prefill(&mut model, &prompt)?;
    let request = Request { codec: &codec, sampler: Sampler::new(args.seed, args.temperature, args.top_p), limit };
    let emit = |text: &str| {
        let shown = if args.json { Ok(()) } else { print(text) };
        shown.map(ControlFlow::Continue)
    };
    let outcome = match args.attention {
        Attention::Both => compare(&mut model, request, logits, emit)?,
        attention => {
            let checked_on = args.check_on.as_ref();
            let mut other =
                checked_on.map(|device| model_on(Checkpoint::open(&args.model.model)?, device)).transpose()?;
            let check = other.as_mut().map(|model| Check { model, prompt: &prompt });
            answer(&mut model, request, logits, attention == Attention::Dense, emit, check)?
        }
    };
    let memory = model.memory();
    Ok(Report {
        model: args.model.model.clone(),
        prompt_tokens: prompt.len(),
        generated_tokens: outcome.tokens,
        text: outcome.text,
        prefill_s: prefill_time.as_secs_f64(),
        decode_tokens_per_s: outcome.steps.tokens_per_s(),
        attended_fraction: outcome.steps.attended_fraction(),
        kv_bytes: memory.kv_bytes,
        index_bytes: memory.index_bytes,
        comparison: outcome.comparison,
        check_kl: outcome.check_kl,
        index_time: outcome.index_time,
    })
}

/// How many tokens to generate: as many as were asked for, or as fit into the context behind the prompt.
fn room(prompt: usize, wanted: usize, context: usize) -> Result<usize> {
    ensure!(prompt > 0, "the prompt has no tokens: give some text");
    ensure!(prompt <= context, "the prompt has {prompt} tokens, the model's context {context}: shorten the prompt");
    // The last token generated is not fed back: it needs no position.
    let room = context - prompt + 1;
    if wanted > room {
        eprintln!("note: the context has room for {room} tokens after the prompt, not {wanted}");
    }
    Ok(wanted.min(room))
}

#[cfg(test)]
mod tests {
    use clap::Parser;

    use super::*;
    use crate::common::cli::{first_line, usage_error};
    use crate::common::testing::*;

    /// A tiny model, and the report of a run on it.
    fn tiny(args: &[&str]) -> Result<Report> {
        let (config, directory) = (tiny_config(), tempfile::tempdir()?);
        write_directory(directory.path(), "llama", &config, &tiny_tensors(&config)?, 1)?;
        let model = ["generate", "--json", "--model", directory.path().to_str().unwrap()];
        let index = ["--pq-dim", "4", "--pq-bits", "4", "--sink", "2", "--window", "8", "--coarse", "0"];
        report(&Args::try_parse_from([&model[..], &index, args].concat())?)
    }

    /// 96 tokens, as many bytes: more than a sparse step attends to.
    fn prompt() -> String {
        "a long story ".repeat(8)[..96].to_string()
    }

    #[test]
    fn sparse_attends_to_few_and_dense_to_all() -> Result<()> {
        let sparse = tiny(&["--prompt", &prompt(), "--heavy", "8", "--sample-len", "5"])?;
        assert_eq!((sparse.prompt_tokens, sparse.generated_tokens), (96, 5));
        // 2 + 8 + 8 of 97 to 100 keys.
        assert!((sparse.attended_fraction - 4. * 18. / (97. + 98. + 99. + 100.)).abs() < 1e-9);
        assert!(sparse.index_bytes > 0 && sparse.prefill_s > 0. && sparse.decode_tokens_per_s > 0.);
        let dense = tiny(&["--prompt", &prompt(), "--attention", "dense", "--sample-len", "5"])?;
        assert_eq!((dense.attended_fraction, dense.index_bytes), (1., 0));
        assert_eq!(dense.kv_bytes, 2 * 2 * 2 * 16 * 4 * 100);
        Ok(())
    }

    #[test]
    fn first_layers_can_be_dense() -> Result<()> {
        let args = ["--prompt", &prompt(), "--heavy", "8", "--sample-len", "5", "--dense-layers"];
        let sparse = tiny(&[&args[..], &["0"]].concat())?;
        // One layer of two has no index, and attends to all.
        let half = tiny(&[&args[..], &["1"]].concat())?;
        assert!((half.attended_fraction - (1. + sparse.attended_fraction) / 2.).abs() < 1e-9);
        assert!(half.index_bytes < sparse.index_bytes);
        let dense = tiny(&[&args[..], &["2"]].concat())?;
        assert_eq!(dense.attended_fraction, 1.);
        Ok(())
    }

    #[test]
    fn layers_can_have_budgets_of_their_own() -> Result<()> {
        let args = ["--prompt", &prompt(), "--sample-len", "5"];
        let run = |budgets: &[&str]| tiny(&[&args[..], budgets].concat());
        let few = run(&["--heavy", "8"])?.attended_fraction;
        let many = run(&["--heavy", "50%"])?.attended_fraction;
        let mixed = run(&["--heavy", "8", "--heavy-layers", "1=50%"])?.attended_fraction;
        assert!(few < many && (mixed - (few + many) / 2.).abs() < 1e-9, "{few} {mixed} {many}");
        assert_eq!(run(&["--heavy", "8", "--heavy-layers", "0=50%,1=50%"])?.attended_fraction, many);
        assert_eq!(run(&["--heavy", "50%", "--heavy-layers", "0-1=8"])?.attended_fraction, few);
        Ok(())
    }

    #[test]
    fn both_compares() -> Result<()> {
        let few = tiny(&["--prompt", &prompt(), "--attention", "both", "--heavy", "8", "--sample-len", "20"])?;
        let comparison = few.comparison.unwrap();
        assert!(comparison.kl > 1e-6 && comparison.kl < 2., "{comparison:?}");
        assert!((few.decode_tokens_per_s / comparison.dense_decode_tokens_per_s - comparison.speedup).abs() < 1e-9);
        let all = tiny(&["--prompt", &prompt(), "--attention", "both", "--heavy", "100%", "--sample-len", "20"])?;
        let comparison = all.comparison.unwrap();
        assert!(comparison.kl < 1e-9 && comparison.top1_agreement == 1. && all.attended_fraction == 1.);
        Ok(())
    }

    /// Another model in f32 finds the same to the bit.
    #[test]
    fn a_check_finds_no_difference() -> Result<()> {
        for attention in ["sparse", "dense"] {
            let args = ["--prompt", &prompt(), "--heavy", "8", "--sample-len", "9", "--check-on", "cpu"];
            let report = tiny(&[&args[..], &["--attention", attention]].concat())?;
            assert_eq!(report.check_kl, Some(0.));
        }
        Ok(())
    }

    #[test]
    fn selection_and_types_are_options() -> Result<()> {
        for option in [
            ["--selection", "kv-head"],
            ["--coarse", "16"],
            ["--dtype", "bf16"],
            ["--dtype", "f16"],
            ["--temperature", "0.8"],
            ["--graph", "--seed=1"],
        ] {
            let report = tiny(&[&["--prompt", &prompt(), "--heavy", "8", "--sample-len", "3"], &option[..]].concat())?;
            assert!(report.generated_tokens <= 3 && report.attended_fraction < 0.25, "{option:?}");
        }
        Ok(())
    }

    #[test]
    fn the_context_limits_the_answer() -> Result<()> {
        assert_eq!(room(10, 5, 64)?, 5);
        assert_eq!(room(60, 128, 64)?, 5);
        assert_eq!(room(64, 128, 64)?, 1);
        let full = tiny(&["--prompt", &"x".repeat(256), "--sample-len", "9"])?;
        assert!(full.generated_tokens <= 1);
        Ok(())
    }

    #[test]
    fn errors_say_what_to_do() {
        let (full, long) = ("x".repeat(256), "x".repeat(257));
        for (args, expected) in [
            (&["--prompt", &long][..], "the prompt has 257 tokens, the model's context 256: shorten the prompt"),
            (&["--prompt", " "], "the prompt is empty: give some text"),
            (&["--prompt-file", "none.txt"], "cannot read none.txt"),
            (&["--pq-bits", "9"], "pq_bits: expected 1 to 8, got 9"),
            (&["--pq-dim", "5"], "pq_dim: expected a divisor of head_dim 16, got 5"),
            (
                &["--prompt", "x", "--heavy-layers", "1-2=5%"],
                "--heavy-layers 1-2=5%: expected layers below 2, the model's",
            ),
            (&["--prompt", "x", "--heavy-layers", "0-1=5%,1=9"], "--heavy-layers 1=9: layer 1 has two budgets"),
            (
                &["--prompt", "x", "--heavy-layers", "0=5%", "--dense-layers", "1"],
                "--heavy-layers 0=5%: none of these layers selects keys",
            ),
            (&["--attention", "both", "--temperature", "1"], "leave out --temperature"),
            (&["--attention", "both", "--check-on", "cpu"], "leave out --attention both"),
            (&["--attention", "both", "--prompt", "x", "--sample-len", "1"], "no decode step to compare"),
            (&["--attention", "both", "--prompt", &full], "no decode step to compare"),
        ] {
            let error = format!("{:#}", tiny(args).unwrap_err());
            assert!(first_line(&error).contains(expected), "{args:?}: {error}");
        }
    }

    #[test]
    fn bad_flags_are_one_line() {
        for (args, expected) in [
            (&["--heavy", "0%"][..], "'0%' for '--heavy <N|P%>'"),
            (&["--heavy", "0"], "at least 1 key"),
            (&["--heavy", "101%"], "at most 100%"),
            (&["--heavy-layers", "3=0"], "at least 1 key"),
            (&["--heavy-layers", "5%"], "expected layers and what they select, such as 0-3=5% or 10=512"),
            (&["--heavy", "some"], "a number of keys such as 512 or a share such as 2%"),
            (&["--attention", "fast"], "[possible values: sparse, dense, both]"),
            (&["--selection", "all"], "[possible values: query-head, kv-head]"),
            (&["--tail", "long"], "[possible values: none, cluster-means]"),
            (&["--dtype", "f64"], "[possible values: f32, bf16, f16]"),
            (&["--device", "tpu"], "expected cpu or cuda"),
            (&["--sample-len", "0"], "expected a number from 1 up"),
            (&["--temperature", "-1"], "error: "),
            (&["--temperature=-1"], "expected 0 or a positive number"),
            (&["--temperature", "NaN"], "expected 0 or a positive number"),
            (&["--top-p", "0"], "expected a number above 0, at most 1"),
            (&["--seed", "x"], "invalid digit"),
            (&["--prompt", "x", "--prompt-file", "y"], "cannot be used with"),
            (&["--bogus"], "unexpected argument '--bogus' found"),
            (&["stray"], "unexpected argument 'stray' found"),
        ] {
            let error = Args::try_parse_from([&["generate"], args].concat()).unwrap_err();
            let line = usage_error(&error.to_string());
            assert!(line.starts_with("error: ") && line.contains(expected) && !line.contains('\n'), "{args:?}: {line}");
        }
    }

    #[test]
    fn help_and_defaults_agree_with_the_library() -> Result<()> {
        let args = Args::try_parse_from(["generate"])?;
        assert_eq!(args.pq_config(64)?, candle_pq_attn::PqConfig::default());
        let help = <Args as clap::CommandFactory>::command().render_help().to_string();
        assert!(help.contains("--heavy <N|P%>") && help.contains("[default: 2%]"), "{help}");
        Ok(())
    }
}
