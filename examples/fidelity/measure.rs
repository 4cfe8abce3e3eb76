//! Runs every method with every budget.

use anyhow::Result;
use candle_pq_attn::Heavy;
use indicatif::ProgressBar;

use crate::attend::{attend, Attended, Choose, Plan, Queries, Standins};
use crate::methods::{Layer, Method, Prefill, Settings};
use crate::report::{LayerFigures, MethodReport, ModelFigures, Run};
use crate::subject::Subject;

/// What is measured.
pub struct Task<'a> {
    pub subject: &'a Subject,
    pub heavy: &'a [Heavy],
    pub settings: Settings,
    /// None: the whole model only.
    pub layers: Vec<usize>,
    pub probes: usize,
    pub whole_model: bool,
}

impl Task<'_> {
    /// Steps of the progress bar that a method takes.
    pub fn steps(&self, method: &dyn Method) -> usize {
        let budgets = self.budgets(method).len();
        let predicted = if self.whole_model { budgets * self.subject.global_layers().len() } else { 0 };
        self.trained().len() + budgets * self.layers.len() + predicted
    }

    /// Layers in which methods have something to do.
    fn trained(&self) -> Vec<usize> {
        match self.whole_model {
            true => self.subject.global_layers(),
            false => self.layers.clone(),
        }
    }

    fn budgets(&self, method: &dyn Method) -> &[Heavy] {
        let count = if method.has_budget() { self.heavy.len() } else { 1 };
        &self.heavy[..count]
    }

    /// The prefill of each layer, and what methods have in common of what they train on it.
    pub fn prefills(&self) -> Result<Vec<Prefill>> {
        let layers = 0..self.subject.layers();
        let prefill = |layer| -> Result<Prefill> {
            let (keys, queries) = (self.subject.prefill_keys(layer)?, self.subject.prefill_queries(layer)?);
            Ok(Prefill::new(keys, queries, self.settings))
        };
        layers.map(prefill).collect()
    }

    /// What dense attention gives to the probed queries of each measured layer.
    pub fn dense(&self) -> Result<Vec<Attended>> {
        self.layers.iter().map(|&layer| self.subject.probe(layer, self.probes, dense)).collect()
    }

    pub fn run(
        &self,
        name: &str,
        method: &dyn Method,
        prefills: &[Prefill],
        dense: &[Attended],
        bar: &ProgressBar,
    ) -> Result<MethodReport> {
        bar.set_message(method.label());
        let mut trained: Vec<Option<Box<dyn Layer>>> = prefills.iter().map(|_| None).collect();
        for layer in self.trained() {
            trained[layer] = Some(method.observe(&prefills[layer])?);
            bar.inc(1);
        }
        let layer = |index: usize| trained[index].as_deref().ok_or_else(|| anyhow::anyhow!("layer {index} is missing"));
        let mut runs = Vec::new();
        for &heavy in self.budgets(method) {
            let mut layers = Vec::new();
            for (&index, dense) in self.layers.iter().zip(dense) {
                let attended =
                    self.subject.probe(index, self.probes, |queries| layer(index)?.attend(queries, heavy))?;
                layers.push(LayerFigures::new(index, &attended, dense)?);
                bar.inc(1);
            }
            let model = match self.whole_model {
                false => None,
                true => Some(ModelFigures::from(self.subject.predict(|index, queries| {
                    bar.inc(1);
                    Ok(layer(index)?.attend(queries, heavy)?.out)
                })?)),
            };
            let heavy = method.has_budget().then_some(heavy);
            let share = heavy.map(|heavy| match heavy {
                Heavy::Fraction(share) => share,
                Heavy::Keys(keys) => keys as f64 / self.subject.keys() as f64,
            });
            runs.push(Run { heavy: heavy.map(|heavy| heavy.to_string()), share, layers, model });
        }
        let bytes_per_key = method.bytes_per_key(self.subject.head_dim()?);
        Ok(MethodReport { name: name.to_string(), label: method.label(), bytes_per_key, runs })
    }
}

/// Dense attention in the same loops: every key is chosen.
pub fn dense(queries: &Queries) -> Result<Attended> {
    let heavy = Heavy::Fraction(1.);
    let choose = Some(Choose { heavy, by: Standins::Keys(queries.keys), per_kv_head: false });
    attend(queries, &Plan { sink: 0, window: 0, choose, tail: None })
}
