//! The keys of the highest exact scores: the most mass that a number of keys can cover.

use anyhow::Result;
use candle_pq_attn::Heavy;

use super::{Layer, Method, Prefill, Settings};
use crate::attend::{attend, Attended, Choose, Plan, Queries, Standins};

pub struct Oracle;

impl Method for Oracle {
    fn label(&self) -> String {
        "oracle top-k".into()
    }

    fn bytes_per_key(&self, _: usize) -> Option<f64> {
        None
    }

    fn observe(&self, prefill: &Prefill) -> Result<Box<dyn Layer>> {
        Ok(Box::new(ByKeys(prefill.settings)))
    }
}

struct ByKeys(Settings);

impl Layer for ByKeys {
    fn attend(&self, queries: &Queries, heavy: Heavy) -> Result<Attended> {
        let Settings { sink, window, .. } = self.0;
        let n = queries.keys.dim(1)?;
        let keys = queries.keys.narrow(1, sink.min(n), n.saturating_sub(sink))?;
        let choose = Some(Choose { heavy, by: Standins::Keys(&keys), per_kv_head: false });
        attend(queries, &Plan { sink, window, choose, tail: None })
    }
}
