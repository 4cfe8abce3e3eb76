//! The text that a model reads, by default one that comes with the examples.

use std::path::PathBuf;

use anyhow::{Context, Result};
use sha2::{Digest, Sha256};

use crate::common::source::read;

/// A text, and what tells it from others.
pub struct Text {
    pub name: String,
    pub content: String,
    pub sha256: String,
}

impl Text {
    /// That of `files`, one after the other; the bundled one where there are none.
    pub fn of(files: &[PathBuf]) -> Result<Self> {
        let (name, content) = match files {
            [] => {
                let bundled = include_str!("../fidelity/text.txt");
                ("The Rust Programming Language, chapter 17".to_string(), bundled.to_string())
            }
            _ => {
                let texts: Result<Vec<_>> = files.iter().map(|file| read(file)).collect();
                let file_name = |path: &PathBuf| path.file_name().map(|name| name.to_string_lossy().into_owned());
                let names: Option<Vec<_>> = files.iter().map(file_name).collect();
                (names.context("--text: expected files")?.join(" + "), texts?.concat())
            }
        };
        let sha256 = Sha256::digest(&content).iter().map(|byte| format!("{byte:02x}")).collect();
        Ok(Self { name, content, sha256 })
    }
}
