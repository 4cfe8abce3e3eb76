//! What a run ends with: a table, and the same numbers and more as JSON.

use std::fmt;

use anyhow::Result;
use comfy_table::{presets, CellAlignment, Table};
use serde::Serialize;

use crate::attend::Attended;
use crate::subject::Predictions;

/// All figures of a run.
#[derive(Debug, Serialize)]
pub struct Report {
    pub model: String,
    pub text: String,
    pub text_sha256: String,
    pub prompt_tokens: usize,
    pub eval_tokens: usize,
    pub probes: usize,
    pub sink: usize,
    pub window: usize,
    pub seed: u64,
    pub train_tokens: usize,
    pub max_train_keys: usize,
    pub version: &'static str,
    pub dense: ModelFigures,
    pub methods: Vec<MethodReport>,
}

#[derive(Debug, Serialize)]
pub struct MethodReport {
    pub name: String,
    pub label: String,
    /// None: it reads the keys themselves.
    pub bytes_per_key: Option<f64>,
    pub runs: Vec<Run>,
}

/// One method with one budget.
#[derive(Debug, Serialize)]
pub struct Run {
    /// None for a method without a budget.
    pub heavy: Option<String>,
    /// The same as a share of the keys at the last position.
    pub share: Option<f64>,
    pub layers: Vec<LayerFigures>,
    pub model: Option<ModelFigures>,
}

/// Attention in one layer, means over heads and queries.
#[derive(Debug, Clone, Serialize)]
pub struct LayerFigures {
    pub layer: usize,
    /// Softmax mass of the attended keys.
    pub mass: f64,
    /// ‖sparse - dense‖ / ‖dense‖
    pub error: f64,
    /// Of the keys that are not attended, as a share of all mass; by estimate, and in truth.
    pub tail_estimated: Option<f64>,
    pub tail_true: f64,
}

#[derive(Debug, Clone, Copy, Serialize)]
pub struct ModelFigures {
    pub perplexity: f64,
    pub kl: f64,
    pub kl_standard_error: f64,
    pub top1_agreement: f64,
}

impl From<Predictions> for ModelFigures {
    fn from(Predictions { perplexity, kl, kl_error, top1_agreement }: Predictions) -> Self {
        Self { perplexity, kl, kl_standard_error: kl_error, top1_agreement }
    }
}

impl LayerFigures {
    pub fn new(layer: usize, attended: &Attended, dense: &Attended) -> Result<Self> {
        let norms =
            |x: &candle_core::Tensor| -> Result<Vec<f32>> { Ok(x.sqr()?.sum(2)?.sqrt()?.flatten_all()?.to_vec1()?) };
        let (off, norm) = (norms(&(&attended.out - &dense.out)?)?, norms(&dense.out)?);
        let error = mean(off.iter().zip(&norm).map(|(off, norm)| f64::from(off / norm)));
        // Rounding can carry a sum of all weights a little above the whole.
        let mass = mean(attended.mass.iter().zip(&dense.mass).map(|(part, whole)| (part - whole).exp().min(1.)));
        let tail = |tail: &Vec<f64>| mean(tail.iter().zip(&dense.mass).map(|(part, whole)| (part - whole).exp()));
        Ok(Self { layer, mass, error, tail_estimated: attended.tail.as_ref().map(tail), tail_true: 1. - mass })
    }
}

impl Run {
    /// The mean of a figure over the layers; None where none was measured.
    pub fn layer_mean(&self, figure: impl Fn(&LayerFigures) -> f64) -> Option<f64> {
        (!self.layers.is_empty()).then(|| mean(self.layers.iter().map(figure)))
    }

    /// Estimated mass of the keys that are not attended over their true mass.
    fn tail_ratio(&self) -> Option<f64> {
        let estimated: Option<Vec<f64>> = self.layers.iter().map(|layer| layer.tail_estimated).collect();
        let truth = self.layer_mean(|layer| layer.tail_true).filter(|truth| *truth > 0.)?;
        estimated.filter(|all| !all.is_empty()).map(|all| mean(all.into_iter()) / truth)
    }
}

fn mean(values: impl Iterator<Item = f64>) -> f64 {
    let (sum, count) = values.fold((0., 0usize), |(sum, count), value| (sum + value, count + 1));
    sum / count.max(1) as f64
}

const HEADER: [&str; 9] =
    ["method", "bytes/key", "heavy", "mass", "error", "tail est./true", "perplexity", "KL to dense", "same top token"];

impl fmt::Display for Report {
    fn fmt(&self, f: &mut fmt::Formatter) -> fmt::Result {
        let mut table = Table::new();
        table.load_style(presets::ASCII_MARKDOWN).set_header(HEADER);
        for column in table.column_iter_mut().skip(1) {
            column.set_cell_alignment(CellAlignment::Right);
        }
        let model = |figures: Option<ModelFigures>| match figures {
            None => [String::new(), String::new(), String::new()],
            Some(figures) => [
                format!("{:.3}", figures.perplexity),
                format!("{:.4}", figures.kl),
                format!("{:.3}", figures.top1_agreement),
            ],
        };
        let [perplexity, ..] = model(Some(self.dense));
        let dense = ["dense", "", "", "1", "0", "", &perplexity, "0", "1"];
        table.add_row(dense);
        for method in &self.methods {
            for (index, run) in method.runs.iter().enumerate() {
                let first = |text: String| if index == 0 { text } else { String::new() };
                let bytes = method.bytes_per_key.map_or("the keys".to_string(), |bytes| bytes.to_string());
                let figure = |value: Option<f64>, digits| value.map_or(String::new(), |v| format!("{v:.digits$}"));
                let layers = [
                    figure(run.layer_mean(|layer| layer.mass), 3),
                    figure(run.layer_mean(|layer| layer.error), 4),
                    figure(run.tail_ratio(), 2),
                ];
                let row = [first(method.label.clone()), first(bytes), run.heavy.clone().unwrap_or_default()];
                table.add_row(row.into_iter().chain(layers).chain(model(run.model)));
            }
        }
        writeln!(f, "{}, {} ({}...)", self.model, self.text, &self.text_sha256[..12])?;
        write!(f, "{} tokens of dense prefill, then {}; ", self.prompt_tokens, self.eval_tokens)?;
        writeln!(f, "sink {}, window {}; trained on {} tokens\n", self.sink, self.window, self.train_tokens)?;
        write!(f, "{table}")
    }
}
