//! Searches needles in haystacks, with sparse attention next to dense.
//!
//!     cargo run --release --example needle -- --help

mod cli;
#[path = "../common/mod.rs"]
mod common;
mod haystack;
mod plot;
mod report;
mod search;
#[cfg(test)]
mod tests;

use std::process::ExitCode;

use anyhow::{ensure, Context, Result};
use rand::rngs::StdRng;
use rand::SeedableRng;

use cli::{Args, Length};
use common::model::Model;
use common::source::Checkpoint;
use common::terminal::bar;
use common::tokenizer::Codec;
use haystack::{Haystack, Hidden, Needle};
use report::{Cell, Report};
use search::{work, Search};

fn main() -> ExitCode {
    // Within the thread pool: work that one of its threads hands out costs no switch to another thread.
    common::cli::run(|args| {
        println!("{}", rayon::scope(|_| run(args))?);
        Ok(())
    })
}

/// Searches, and writes the files that were asked for.
fn run(args: &Args) -> Result<Report> {
    let report = search(args)?;
    if let Some(file) = &args.json {
        let json = serde_json::to_string_pretty(&report)? + "\n";
        std::fs::write(file, json).with_context(|| format!("cannot write {}", file.display()))?;
    }
    if let Some(file) = &args.plot {
        plot::draw(&report, file)?;
    }
    Ok(report)
}

fn search(args: &Args) -> Result<Report> {
    let text = args.text()?;
    let mut checkpoint = Checkpoint::open(&args.model.model)?;
    let config = checkpoint.config()?;
    let pq = args.index.config(config.head_dim)?;
    let codec = Codec::new(&mut checkpoint)?;
    let places = places(args, &codec, &Haystack::new(&text.content), config.context)?;
    let prompts = || places.iter().flat_map(|place| &place.hidden.prompts);
    let capacity = prompts().map(Vec::len).max().unwrap_or(0) + args.sample_len;
    let weights = args.model.load(checkpoint, &config, &args.model.device)?;
    let model = args.index.set_layers(Model::new(&config, weights, &pq, capacity)?)?;
    let mut search = Search { model, codec: &codec, limit: args.sample_len, read: Vec::new() };

    let bar = bar(work(prompts(), args.sample_len), "{msg} {wide_bar} {percent}%, {eta} left")?;
    let mut cells = Vec::new();
    for Place { length, depth, hidden } in &places {
        bar.set_message(format!("{length} tokens, needles at {:.0}%", 100. * depth));
        let placed = hidden.before as f64 / hidden.all as f64;
        cells.push(Cell { length: length.0, depth: *depth, placed, needles: search.find(hidden, &bar)? });
    }
    bar.finish_and_clear();
    cells.sort_by(|a, b| a.length.cmp(&b.length).then(a.depth.total_cmp(&b.depth)));
    Ok(Report {
        model: args.model.model.clone(),
        text: text.name,
        text_sha256: text.sha256,
        needles: args.needles,
        sample_len: args.sample_len,
        seed: args.seed,
        index: pq,
        dense_layers: args.index.dense_layers,
        heavy_layers: args.index.heavy_layers.iter().map(ToString::to_string).collect(),
        version: env!("CARGO_PKG_VERSION"),
        cells,
    })
}

/// A cell of the table, before the search.
struct Place {
    length: Length,
    depth: f64,
    hidden: Hidden,
}

/// All of them, in the order that saves most: what comes before a needle is the same in all prompts, whatever their length,
/// so that from the deepest needle on back each has in common with the one before it all but what follows its needle.
fn places(args: &Args, codec: &Codec, haystack: &Haystack, context: usize) -> Result<Vec<Place>> {
    let mut lengths = args.lengths.clone();
    lengths.sort_by_key(|length| length.0);
    lengths.dedup();
    ensure!(args.sample_len < context, "--sample-len: expected less than the model's context, {context}");
    let mut rng = StdRng::seed_from_u64(args.seed);
    let mut places = Vec::new();
    for length in lengths {
        ensure!(length.0 <= context, "--lengths: expected at most {context}, the model's context; got {}", length.0);
        for depth in args.depths() {
            let needles = Needle::draw(args.needles, &mut rng);
            let hidden = haystack.hide(codec, needles, length.0.min(context - args.sample_len), depth)?;
            places.push(Place { length, depth, hidden });
        }
    }
    places.sort_by_key(|place| std::cmp::Reverse(place.hidden.before));
    Ok(places)
}
