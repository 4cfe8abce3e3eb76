//! What a run ends with: a table, and the same with all answers as JSON.

use std::fmt;

use candle_pq_attn::PqConfig;
use comfy_table::{presets, CellAlignment, Table};
use serde::Serialize;

use crate::cli::Length;

/// A run; as JSON, exactly its fields.
#[derive(Debug, Serialize)]
pub struct Report {
    pub model: String,
    pub text: String,
    pub text_sha256: String,
    pub needles: usize,
    pub sample_len: usize,
    pub seed: u64,
    pub index: PqConfig,
    pub dense_layers: usize,
    /// As on the command line.
    pub heavy_layers: Vec<String>,
    pub version: &'static str,
    /// By length, then by depth.
    pub cells: Vec<Cell>,
}

/// Needles at one depth of a prompt of one length.
#[derive(Debug, Serialize)]
pub struct Cell {
    pub length: usize,
    pub depth: f64,
    /// Where they are, between two sentences near the depth: share of the haystack's bytes before them.
    pub placed: f64,
    pub needles: Vec<Asked>,
}

/// A needle, and what the model said when it was asked for it.
#[derive(Debug, PartialEq, Serialize)]
pub struct Asked {
    pub subject: &'static str,
    pub secret: usize,
    pub prompt_tokens: usize,
    pub dense: Answer,
    pub sparse: Answer,
}

#[derive(Debug, PartialEq, Serialize)]
pub struct Answer {
    pub text: String,
    pub found: bool,
    /// Share of the keys that its steps attended to.
    pub attended: f64,
}

/// Dense or sparse.
pub type Side = fn(&Asked) -> &Answer;
pub const SIDES: [(&str, Side); 2] = [("dense", |asked| &asked.dense), ("sparse", |asked| &asked.sparse)];

impl Cell {
    pub fn found(&self, side: Side) -> usize {
        self.needles.iter().filter(|asked| side(asked).found).count()
    }

    /// Whether one side found a needle that the other did not.
    pub fn differs(&self) -> bool {
        self.needles.iter().any(|asked| asked.dense.found != asked.sparse.found)
    }
}

impl Report {
    pub fn lengths(&self) -> Vec<usize> {
        let mut lengths: Vec<_> = self.cells.iter().map(|cell| cell.length).collect();
        lengths.dedup();
        lengths
    }

    /// Those of each length.
    pub fn depths(&self) -> Vec<f64> {
        let first = self.cells.first().map(|cell| cell.length);
        self.cells.iter().take_while(|cell| Some(cell.length) == first).map(|cell| cell.depth).collect()
    }

    /// The cells of a length, or all, from the first depth on.
    pub fn cells(&self, length: Option<usize>) -> impl Iterator<Item = &Cell> {
        self.cells.iter().filter(move |cell| length.is_none_or(|length| cell.length == length))
    }

    fn asked(&self, length: Option<usize>) -> impl Iterator<Item = &Asked> {
        self.cells(length).flat_map(|cell| &cell.needles)
    }

    pub fn found(&self, side: Side) -> usize {
        self.cells.iter().map(|cell| cell.found(side)).sum()
    }

    pub fn total(&self) -> usize {
        self.asked(None).count()
    }

    /// Mean over the answers.
    pub fn attended(&self, side: Side, length: Option<usize>) -> f64 {
        let sum: f64 = self.asked(length).map(|asked| side(asked).attended).sum();
        sum / self.asked(length).count().max(1) as f64
    }
}

impl fmt::Display for Report {
    fn fmt(&self, f: &mut fmt::Formatter) -> fmt::Result {
        let lengths = self.lengths();
        let columns = || SIDES.iter().flat_map(|&(name, side)| lengths.iter().map(move |&n| (name, side, n)));
        let mut table = Table::new();
        let header = columns().map(|(name, _, length)| format!("{name} {}", Length(length)));
        table.load_style(presets::ASCII_MARKDOWN).set_header(["depth".to_string()].into_iter().chain(header));
        for (row, depth) in self.depths().iter().enumerate() {
            let found = columns().map(|(_, side, length)| {
                let cell = self.cells(Some(length)).nth(row);
                cell.map_or(String::new(), |cell| format!("{}/{}", cell.found(side), cell.needles.len()))
            });
            table.add_row([percent(*depth, 0)].into_iter().chain(found));
        }
        let attended = columns().map(|(_, side, length)| percent(self.attended(side, Some(length)), 1));
        table.add_row(["keys attended".to_string()].into_iter().chain(attended));
        for column in table.column_iter_mut() {
            column.set_cell_alignment(CellAlignment::Right);
        }
        writeln!(f, "{}, {} ({}...)", self.model, self.text, &self.text_sha256[..12])?;
        writeln!(f, "needles found, by depth and by tokens of the prompt\n\n{table}\n")?;
        let [dense, sparse] = SIDES.map(|(_, side)| self.found(side));
        let same = self.asked(None).filter(|asked| asked.dense.text == asked.sparse.text).count();
        let differ = self.cells.iter().filter(|cell| cell.differs()).count();
        let total = self.total();
        writeln!(f, "found: dense {dense} of {total}, sparse {sparse}; the same answer, word for word: {same}")?;
        writeln!(f, "cells where one finds what the other does not: {differ} of {}", self.cells.len())?;
        write!(f, "keys attended: sparse {} of them", percent(self.attended(SIDES[1].1, None), 1))
    }
}

/// A share, with so many decimals.
pub fn percent(share: f64, digits: usize) -> String {
    format!("{:.digits$}%", 100. * share)
}
