//! On a tiny model: what a question costs and what answers depend on.

use std::ops::ControlFlow::{Break, Continue};
use std::path::Path;

use anyhow::Result;
use clap::Parser;

use crate::cli::Args;
use crate::common::cli::usage_error;
use crate::common::testing::*;
use crate::session::Session;
use crate::{open, run};

/// A tiny model and a document of 120 tokens, as many bytes: more than a sparse step attends to.
struct Files {
    directory: tempfile::TempDir,
}

impl Files {
    fn new() -> Result<Self> {
        let (config, directory) = (tiny_config(), tempfile::tempdir()?);
        write_directory(directory.path(), "llama", &config, &tiny_tensors(&config)?, 1)?;
        std::fs::write(directory.path().join("story.txt"), &"a long story ".repeat(10)[..118])?;
        Ok(Self { directory })
    }

    fn path(&self, name: &str) -> String {
        self.directory.path().join(name).to_str().unwrap().to_string()
    }

    fn args(&self, args: &[&str]) -> Result<Args> {
        let model = self.path("");
        let index =
            ["--pq-dim", "4", "--pq-bits", "4", "--sink", "2", "--window", "8", "--coarse", "16", "--heavy", "8"];
        Ok(Args::try_parse_from([&["ask", "--model", &model, "--sample-len", "12"], &index[..], args].concat())?)
    }

    fn session(&self, args: &[&str]) -> Result<Session> {
        open(&self.args(args)?)
    }
}

fn ask(session: &mut Session, question: &str) -> Result<String> {
    Ok(session.ask(question, 12, |_| Ok(Continue(())))?.text)
}

#[test]
fn answers_depend_on_document_and_question_alone() -> Result<()> {
    let files = Files::new()?;
    let story = files.path("story.txt");
    let (mut session, mut other) = (files.session(&[&story])?, files.session(&[&story])?);
    assert_eq!(session.tokens(), 120);
    let first = ask(&mut session, "who?")?;
    let second = session.ask("and why is that so?", 12, |_| Ok(Continue(())))?;
    // The question, and nothing of the document.
    assert_eq!(second.read, "and why is that so?".len());
    assert!(second.steps.count > 0 && second.steps.attended_fraction() < 0.2);
    assert_eq!(second.text, ask(&mut other, "and why is that so?")?);
    assert_eq!(first, ask(&mut other, "who?")?);
    let all = ["who?", "and why is that so?", "zzzz", "0 1 2 3", "XYZ"].map(|question| ask(&mut session, question));
    let all = all.into_iter().collect::<Result<std::collections::BTreeSet<_>>>()?;
    assert!(all.len() > 1, "every question has the answer {all:?}");
    Ok(())
}

#[test]
fn answers_together_are_those_of_one_by_one() -> Result<()> {
    let files = Files::new()?;
    let questions = ["who?", "and why is that so?", "zzzz", "0 1 2 3", "XYZ", "w"].map(String::from);
    for layers in [["--dense-layers", "0"], ["--dense-layers", "1"], ["--heavy-layers", "1=30"]] {
        let mut session = files.session(&[&[files.path("story.txt").as_str()][..], &layers].concat())?;
        let want: Vec<_> = questions.iter().map(|question| ask(&mut session, question)).collect::<Result<_>>()?;
        for at_once in [1, 2, 4, 9] {
            let mut got = Vec::new();
            let together = session.ask_together(&questions, at_once, 12, |answer| {
                got.push(answer.to_string());
                Ok(())
            })?;
            assert_eq!(got, want, "{at_once} at once");
            assert!(together.tokens > 12);
        }
        assert_eq!(ask(&mut session, &questions[0])?, want[0], "forks left no trace");
    }
    Ok(())
}

/// As by Ctrl-C.
#[test]
fn a_stopped_answer_leaves_no_trace() -> Result<()> {
    let files = Files::new()?;
    let mut session = files.session(&[&files.path("story.txt")])?;
    let whole = session.ask("who?", 12, |_| Ok(Continue(())))?;
    let mut pieces = 0;
    let stopped = session.ask("who?", 12, |_| {
        pieces += 1;
        Ok(if pieces == 3 { Break(()) } else { Continue(()) })
    })?;
    assert!(stopped.steps.count == 2 && whole.steps.count > 2);
    assert!(whole.text.starts_with(&stopped.text) && whole.text != stopped.text);
    assert_eq!(ask(&mut session, "who?")?, whole.text);
    Ok(())
}

#[test]
fn what_was_kept_answers_the_same() -> Result<()> {
    let files = Files::new()?;
    let (story, kept) = (files.path("story.txt"), files.path("story.pq"));
    for layers in [["--dense-layers", "0"], ["--dense-layers", "1"], ["--heavy-layers", "1=30"]] {
        let story = [&[story.as_str()][..], &layers].concat();
        run(&files.args(&[&story[..], &["--save", &kept, "-q", "who?"]].concat())?)?;
        let (mut read, mut loaded) = (files.session(&story)?, files.session(&["--load", &kept])?);
        for question in ["who?", "where?", "who?"] {
            let answers = [&mut loaded, &mut read].map(|session| session.ask(question, 12, |_| Ok(Continue(()))));
            let [loaded, read] = answers.map(|answer| answer.map(|a| (a.text, a.steps.attended_fraction())));
            assert_eq!(loaded?, read?);
        }
    }
    Ok(())
}

#[test]
fn what_was_kept_of_something_else_is_refused() -> Result<()> {
    let (files, others) = (Files::new()?, Files::new()?);
    let kept = files.path("story.pq");
    files.session(&[&files.path("story.txt")])?.save(Path::new(&kept))?;
    let bytes = std::fs::read(&kept)?;
    let refused = |files: &Files, args: &[&str], expected: &str| {
        let error = format!("{:#}", files.session(&[&["--load", &kept], args].concat()).err().unwrap());
        assert!(error.contains(expected), "{error}");
    };
    refused(&others, &[], "was read by the model");
    refused(&files, &["--dtype", "bf16"], "of another model or --dtype");
    std::fs::write(&kept, &bytes[..bytes.len() / 2])?;
    refused(&files, &[], "cut off or changed");
    let mut changed = bytes.clone();
    *changed.last_mut().unwrap() ^= 1;
    std::fs::write(&kept, changed)?;
    refused(&files, &[], "the checksum differs");
    std::fs::write(&kept, "some text")?;
    refused(&files, &[], "got another");
    Ok(())
}

#[test]
fn errors_say_what_to_do() -> Result<()> {
    let files = Files::new()?;
    let (long, empty) = (files.path("long.txt"), files.path("empty.txt"));
    std::fs::write(&long, "x".repeat(300))?;
    std::fs::write(&empty, " ")?;
    for (document, expected) in [
        (&long, "the document has 302 tokens, the model's context 256: shorten the document"),
        (&empty, "the document is empty: give some text"),
        (&files.path("none.txt"), "cannot read"),
    ] {
        let error = format!("{:#}", files.session(&[document]).err().unwrap());
        assert!(error.contains(expected), "{error}");
    }
    let mut session = files.session(&[&files.path("story.txt")])?;
    let before = ask(&mut session, "who?")?;
    let error = ask(&mut session, &"x".repeat(140)).unwrap_err().to_string();
    assert!(error.contains("have 260 tokens, the model's context 256: ask a shorter one"), "{error}");
    let error = session.ask("who?", 12, |_| anyhow::bail!("a closed pipe")).err().unwrap().to_string();
    assert_eq!((error.as_str(), ask(&mut session, "who?")?), ("a closed pipe", before));
    for (args, expected) in [
        (&[][..], "required arguments were not provided: <FILE>..."),
        (&["a.txt", "--load", "b"], "cannot be used with"),
        (&["--save", "a", "--load", "b"], "cannot be used with"),
        (&["a.txt", "--at-once", "2"], "required arguments were not provided: --question <TEXT>"),
        (&["a.txt", "-q", "a", "--at-once", "0"], "expected a number from 1 up"),
        (&["a.txt", "--sample-len", "0"], "expected a number from 1 up"),
    ] {
        let line = usage_error(&Args::try_parse_from([&["ask"], args].concat()).unwrap_err().to_string());
        assert!(line.starts_with("error: ") && line.contains(expected), "{args:?}: {line}");
    }
    Ok(())
}
