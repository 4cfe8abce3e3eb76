//! No choice: the first keys and the last.

use anyhow::Result;
use candle_pq_attn::Heavy;

use super::{Layer, Method, Prefill, Settings};
use crate::attend::{attend, Attended, Plan, Queries};

pub struct Edges;

impl Method for Edges {
    fn label(&self) -> String {
        "sink and window only".into()
    }

    fn bytes_per_key(&self, _: usize) -> Option<f64> {
        Some(0.)
    }

    fn has_budget(&self) -> bool {
        false
    }

    fn observe(&self, prefill: &Prefill) -> Result<Box<dyn Layer>> {
        Ok(Box::new(prefill.settings))
    }
}

impl Layer for Settings {
    fn attend(&self, queries: &Queries, _: Heavy) -> Result<Attended> {
        attend(queries, &Plan { sink: self.sink, window: self.window, choose: None, tail: None })
    }
}
