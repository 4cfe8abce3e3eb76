//! On a model of random weights, without network.

use anyhow::Result;
use candle_core::{DType, Device};
use candle_pq_attn::PqConfig;
use clap::{CommandFactory, Parser};
use indicatif::ProgressBar;
use rand::rngs::StdRng;
use rand::SeedableRng;

use crate::cli::{Args, Length};
use crate::common::cli::{first_line, usage_error};
use crate::common::config::ModelConfig;
use crate::common::model::Model;
use crate::common::source::Checkpoint;
use crate::common::testing::{tiny_config, tiny_tensors, write_directory};
use crate::common::tokenizer::Codec;
use crate::common::weights::Weights;
use crate::haystack::{Haystack, Needle, SUBJECTS};
use crate::report::{Answer, Asked, Cell, Report, SIDES};
use crate::search::{work, Search};
use crate::{places, plot, run};

/// Of which a token is about a byte.
const CONTEXT: usize = 1024;

/// A directory with a model of random weights and a text of 60 sentences in paragraphs of 5.
struct Tiny(tempfile::TempDir);

impl Tiny {
    fn new() -> Result<Self> {
        let (config, directory) = (ModelConfig { context: CONTEXT, ..tiny_config() }, tempfile::tempdir()?);
        write_directory(directory.path(), "llama", &config, &tiny_tensors(&config)?, 1)?;
        let tiny = Self(directory);
        std::fs::write(tiny.path("text.txt"), text())?;
        Ok(tiny)
    }

    fn path(&self, name: &str) -> String {
        self.0.path().join(name).to_str().unwrap().to_string()
    }

    fn args(&self, args: &[&str]) -> Result<Args> {
        let (model, text) = (self.path(""), self.path("text.txt"));
        let given = ["needle", "--model", &model, "--pq-dim", "4", "--window", "8", "--coarse", "16"];
        let own: &[&str] = if args.contains(&"--text") { &[] } else { &["--text", &text] };
        Ok(Args::try_parse_from([&given, own, args].concat())?)
    }

    fn codec(&self) -> Result<Codec> {
        Codec::new(&mut Checkpoint::open(&self.path(""))?)
    }

    fn search<'a>(&self, args: &Args, codec: &'a Codec) -> Result<Search<'a>> {
        let mut checkpoint = Checkpoint::open(&self.path(""))?;
        let config = checkpoint.config()?;
        let weights = Weights::new(checkpoint, &config, DType::F32, &Device::Cpu)?;
        let model = Model::new(&config, weights, &args.index.config(config.head_dim)?, CONTEXT)?;
        Ok(Search { model, codec, limit: args.sample_len, read: Vec::new() })
    }
}

fn text() -> String {
    let sentence = |i: usize| format!("Sentence {i} says little!{}", if i % 5 == 4 { "\n\n" } else { " " });
    (0..60).map(sentence).collect()
}

fn decoded(codec: &Codec, tokens: &[u32]) -> Result<String> {
    let mut stream = codec.stream();
    tokens.iter().map(|&token| stream(token)).collect()
}

#[test]
fn needles_are_between_sentences_at_their_depth() -> Result<()> {
    let (tiny, text) = (Tiny::new()?, text());
    let (codec, haystack) = (tiny.codec()?, Haystack::new(&text));
    let needles = Needle::draw(2, &mut StdRng::seed_from_u64(3));
    let [one, two] = [0, 1].map(|i| (needles[i].subject, needles[i].secret));
    let planted = format!("The {} is {}. The {} is {}. ", one.0, one.1, two.0, two.1);
    for (depth, before) in [(0., ""), (0.5, "says little! "), (0.73, "says little!\n\n"), (1., "says little! ")] {
        let hidden = haystack.hide(&codec, needles.clone(), 900, depth)?;
        let prompts = hidden.prompts.iter().map(|prompt| decoded(&codec, prompt)).collect::<Result<Vec<_>>>()?;
        for (prompt, needle) in prompts.iter().zip(&needles) {
            // Whole sentences, none of which is lost, then the question.
            let (introduction, rest) = prompt.split_once("\n\n").unwrap();
            let (rest, question) = rest.rsplit_once("\n\n").unwrap();
            let (above, below) =
                format!("{rest} ").split_once(&planted).map(|(a, b)| (a.to_string(), b.to_string())).unwrap();
            assert!(above.ends_with(before) && text.starts_with(format!("{above}{below}").trim_end()), "{prompt}");
            assert_eq!(above.len(), hidden.before);
            assert!(introduction.starts_with("Some facts") && question == format!("What is the {}?", needle.subject));
        }
        // Within half a sentence of where they should be.
        assert!((hidden.before as f64 - depth * hidden.all as f64).abs() <= 14., "{depth}: {hidden:?}");
        // As many sentences as fit, and no more.
        let longest = hidden.prompts.iter().map(Vec::len).max().unwrap();
        assert!((900 - 26..=900).contains(&longest), "{longest} tokens");
    }
    Ok(())
}

#[test]
fn needles_are_told_apart() -> Result<()> {
    let draw = |seed| Needle::draw(SUBJECTS.len(), &mut StdRng::seed_from_u64(seed));
    let distinct = |mut keys: Vec<String>| {
        keys.sort();
        keys.dedup();
        keys.len()
    };
    let needles = draw(1);
    assert_eq!(distinct(needles.iter().map(|needle| needle.subject.to_string()).collect()), SUBJECTS.len());
    assert_eq!(distinct(needles.iter().map(|needle| needle.secret.to_string()).collect()), SUBJECTS.len());
    assert!(needles.iter().all(|needle| needle.secret.to_string().len() == 4));
    assert!(needles == draw(1) && needles != draw(2));

    let needle = Needle { subject: SUBJECTS[0], secret: 4821 };
    for (answer, found) in [
        ("4821", true),
        ("It is `4821`.\n", true),
        ("1 or 4821", true),
        ("14821", false),
        ("48210", false),
        ("", false),
    ] {
        assert_eq!(needle.is_in(answer), found, "{answer:?}");
    }
    Ok(())
}

/// What is kept of the prompt before changes no answer.
#[test]
fn a_shared_prefix_gives_the_answers_of_a_whole_prefill() -> Result<()> {
    let tiny = Tiny::new()?;
    let args = tiny.args(&["--lengths", "500,900", "--depths", "3", "--needles", "2", "--heavy", "4"])?;
    let (codec, text) = (tiny.codec()?, text());
    let places = places(&args, &codec, &Haystack::new(&text), CONTEXT)?;
    let prompts: Vec<_> = places.iter().flat_map(|place| &place.hidden.prompts).cloned().collect();
    let whole: usize = prompts.iter().map(|prompt| prompt.len() + 2 * args.sample_len).sum();
    let steps = work(prompts.iter(), args.sample_len);
    assert!(steps < whole / 2, "{steps} of {whole}");

    let (mut one, bar, mut answers) = (tiny.search(&args, &codec)?, ProgressBar::hidden(), Vec::new());
    for hidden in places.iter().map(|place| &place.hidden) {
        let shared = one.find(hidden, &bar)?;
        for ((shared, needle), prompt) in shared.into_iter().zip(&hidden.needles).zip(&hidden.prompts) {
            let alone = tiny.search(&args, &codec)?.ask(needle, prompt, &ProgressBar::hidden())?;
            assert_eq!(alone, shared);
            answers.push([shared.dense.text, shared.sparse.text]);
        }
    }
    assert_eq!(bar.position(), steps as u64);
    // All this would hold of a model that says the same whatever it reads.
    assert!(answers.iter().any(|[dense, sparse]| dense != sparse), "{answers:?}");
    assert!(answers.iter().any(|[dense, _]| *dense != answers[0][0]), "{answers:?}");
    Ok(())
}

#[test]
fn lengths_and_depths_are_as_asked_for() -> Result<()> {
    let args = |args: &[&str]| Args::try_parse_from([&["needle"], args].concat());
    assert_eq!(args(&[])?.depths(), [0., 0.25, 0.5, 0.75, 1.]);
    assert_eq!(args(&["--depths", "1"])?.depths(), [0.5]);
    assert_eq!(args(&["--depths", "2"])?.depths(), [0., 1.]);
    let lengths = args(&["--lengths", "1k,1500,8k"])?.lengths;
    assert_eq!(lengths, [1024, 1500, 8192].map(Length));
    assert_eq!(lengths.iter().map(Length::to_string).collect::<Vec<_>>(), ["1k", "1500", "8k"]);
    Ok(())
}

/// A whole run, with its files.
#[test]
fn a_run_has_a_table_json_and_a_plot() -> Result<()> {
    let tiny = Tiny::new()?;
    let (json, svg) = (tiny.path("out.json"), tiny.path("out.svg"));
    let grid = ["--lengths", "1k,400", "--depths", "2", "--needles", "2", "--heavy", "4", "--sample-len", "9"];
    let report = run(&tiny.args(&[&grid[..], &["--json", &json, "--plot", &svg]].concat())?)?;
    let table = report.to_string();
    for expected in
        ["text.txt", "dense 400", "sparse 1k", "|            0% |", "|          100% |", "found: dense 0 of 8"]
    {
        assert!(table.contains(expected), "{expected}: {table}");
    }
    let json: serde_json::Value = serde_json::from_str(&std::fs::read_to_string(&json)?)?;
    assert_eq!((json["index"]["pq_dim"].as_u64(), json["text_sha256"].as_str().unwrap().len()), (Some(4), 64));
    let cells = json["cells"].as_array().unwrap();
    let place = |cell: &serde_json::Value| (cell["length"].as_u64().unwrap(), cell["depth"].as_f64().unwrap());
    assert_eq!(cells.iter().map(place).collect::<Vec<_>>(), [(400, 0.), (400, 1.), (1024, 0.), (1024, 1.)]);
    for cell in cells {
        assert_eq!(cell["placed"], cell["depth"]);
        for asked in cell["needles"].as_array().unwrap() {
            let tokens = asked["prompt_tokens"].as_u64().unwrap();
            // Behind the longest prompt there is room for the answer.
            assert!(tokens <= place(cell).0.min(1024 - 9) && tokens + 30 > place(cell).0.min(1024 - 9), "{asked}");
            assert_eq!(
                (asked["dense"]["attended"].as_f64(), asked["dense"]["found"].as_bool()),
                (Some(1.), Some(false))
            );
            // 4 + 8 + 4 keys, of somewhat more than the prompt's.
            let attended = asked["sparse"]["attended"].as_f64().unwrap() * tokens as f64;
            assert!((15.5..16.).contains(&attended) && asked["sparse"]["text"].is_string(), "{attended}");
        }
    }
    let svg = std::fs::read_to_string(&svg)?;
    assert!(svg.starts_with("<svg") && svg.contains("tokens of the prompt") && svg.contains("depth of the needle"));
    Ok(())
}

/// A report of one needle a cell, whose cells have these depths and were found by dense and by sparse or not.
fn report(cells: &[(f64, bool, bool)]) -> Report {
    let answer = |found: bool, attended| Answer { text: found.to_string(), found, attended };
    let cell = |&(depth, dense, sparse): &(f64, bool, bool)| {
        let (dense, sparse) = (answer(dense, 1.), answer(sparse, 0.03));
        let asked = Asked { subject: SUBJECTS[0], secret: 4821, prompt_tokens: 4000, dense, sparse };
        Cell { length: 4096, depth, placed: depth, needles: vec![asked] }
    };
    Report {
        model: "tiny".into(),
        text: "a text".into(),
        text_sha256: "0".repeat(64),
        needles: 1,
        sample_len: 9,
        seed: 0,
        index: PqConfig::default(),
        dense_layers: 0,
        heavy_layers: Vec::new(),
        version: "0",
        cells: cells.iter().map(cell).collect(),
    }
}

#[test]
fn the_table_counts() {
    let report = report(&[(0., true, false), (0.5, true, true), (1., false, true)]);
    let table = report.to_string();
    for expected in [
        "|            0% |      1/1 |       0/1 |",
        "|           50% |      1/1 |       1/1 |",
        "|          100% |      0/1 |       1/1 |",
        "| keys attended |   100.0% |      3.0% |",
        "found: dense 2 of 3, sparse 2; the same answer, word for word: 1",
        "cells where one finds what the other does not: 2 of 3",
        "keys attended: sparse 3.0% of them",
    ] {
        assert!(table.contains(expected), "{expected}: {table}");
    }
    assert_eq!(SIDES.map(|(name, side)| (name, report.found(side))), [("dense", 2), ("sparse", 2)]);
}

#[test]
fn the_plot_is_darker_where_more_was_found() -> Result<()> {
    let directory = tempfile::tempdir()?;
    let file = directory.path().join("plot.svg");
    // Squares of that colour beyond the one of the legend.
    let dark = |cells: &[(f64, bool, bool)]| -> Result<usize> {
        plot::draw(&report(cells), &file)?;
        Ok(std::fs::read_to_string(&file)?.matches(r##"fill="#005AA0""##).count() - 1)
    };
    assert_eq!(dark(&[(0., false, false), (1., false, false)])?, 0);
    assert_eq!(dark(&[(0., true, false), (1., true, true)])?, 3);
    let error = plot::draw(&report(&[(0., true, true)]), &directory.path().join("none/plot.svg")).unwrap_err();
    assert!(error.to_string().contains("cannot write"), "{error}");
    Ok(())
}

#[test]
fn bad_flags_are_one_line() {
    for (args, expected) in [
        (&["--lengths", "1k,0"][..], "a number of tokens such as 1500 or 4k"),
        (&["--lengths", "4M"], "a number of tokens such as 1500 or 4k"),
        (&["--lengths", "99999999999999999999k"], "a number of tokens such as 1500 or 4k"),
        (&["--depths", "0"], "expected a number from 1 up"),
        (&["--needles", "0"], "expected a number from 1 to 16"),
        (&["--needles", "17"], "expected a number from 1 to 16"),
        (&["--heavy", "0%"], "'0%' for '--heavy <N|P%>'"),
        (&["--plot", "map.png"], "expected a name that ends in .svg"),
        (&["--seed", "x"], "invalid digit"),
        (&["--bogus"], "unexpected argument '--bogus' found"),
    ] {
        let error = Args::try_parse_from([&["needle"], args].concat()).unwrap_err();
        let line = usage_error(&error.to_string());
        assert!(line.starts_with("error: ") && line.contains(expected) && !line.contains('\n'), "{args:?}: {line}");
    }
}

#[test]
fn errors_say_what_to_do() -> Result<()> {
    let tiny = Tiny::new()?;
    std::fs::write(tiny.path("short.txt"), "One sentence. Another.")?;
    std::fs::write(tiny.path("empty.txt"), "")?;
    let (short, empty) = (tiny.path("short.txt"), tiny.path("empty.txt"));
    for (args, expected) in [
        (&["--lengths", "2k"][..], "--lengths: expected at most 1024, the model's context; got 2048"),
        (&["--lengths", "100"], "--lengths: expected room for needles, question and a sentence of the text, "),
        (&["--sample-len", "1024"], "--sample-len: expected less than the model's context, 1024"),
        (&["--lengths", "1k", "--text", &short], "--text: expected more than 1000 tokens, got "),
        (&["--lengths", "1k", "--text", &empty], "--text: expected more than 1000 tokens, got "),
        (&["--text", "none.txt"], "cannot read none.txt"),
        (&["--pq-dim", "5"], "pq_dim: expected a divisor of head_dim 16, got 5"),
    ] {
        let error = format!("{:#}", run(&tiny.args(args)?).unwrap_err());
        assert!(first_line(&error).contains(expected), "{args:?}: {error}");
    }
    Ok(())
}

#[test]
fn help_and_defaults_agree_with_the_library() -> Result<()> {
    assert_eq!(Args::try_parse_from(["needle"])?.index.config(64)?, PqConfig::default());
    let help = Args::command().render_long_help().to_string();
    for expected in ["What is the special magic number for Lyon?", "[default: 1k,2k,4k,8k]", "[default: 2%]"] {
        assert!(help.contains(expected), "{expected}: {help}");
    }
    Ok(())
}
