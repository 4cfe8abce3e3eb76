//! Whole pages of keys, by an upper bound of their scores (Tang et al., *Quest*, 2024).

use anyhow::{Context, Result};
use candle_core::Tensor;
use candle_pq_attn::Heavy;

use super::{Layer, Method, Prefill, Settings};
use crate::attend::{attend, Attended, Choose, Plan, Queries, Standins};

/// Keys a page.
#[derive(Clone, Copy)]
pub struct Quest(usize);

impl Quest {
    pub fn parse(page: Option<&str>) -> Result<Self> {
        let page = page.map_or(Some(16), |text| text.parse().ok().filter(|&page| page > 0));
        page.map(Self).context("quest: expected keys a page, from 1 up, such as quest:16")
    }
}

impl Method for Quest {
    fn label(&self) -> String {
        format!("Quest, pages of {}", self.0)
    }

    /// Two rows a page, in 16 bits.
    fn bytes_per_key(&self, head_dim: usize) -> Option<f64> {
        Some((2 * 2 * head_dim) as f64 / self.0 as f64)
    }

    fn observe(&self, prefill: &Prefill) -> Result<Box<dyn Layer>> {
        Ok(Box::new(Pages { page: *self, settings: prefill.settings }))
    }
}

struct Pages {
    page: Quest,
    settings: Settings,
}

impl Layer for Pages {
    fn attend(&self, queries: &Queries, heavy: Heavy) -> Result<Attended> {
        let Settings { sink, window, .. } = self.settings;
        let Quest(page) = self.page;
        let bounds = bounds(queries.keys, sink, page)?;
        let choose = Some(Choose { heavy, by: Standins::Bounds(&bounds, page), per_kv_head: false });
        attend(queries, &Plan { sink, window, choose, tail: None })
    }
}

/// The largest and smallest elements of each page behind the sink, `[h_kv, pages, 2 * head_dim]`. A page may reach into
/// the window of an early query, and beyond it if that is shorter than a page: its bound is then looser, but holds.
pub fn bounds(keys: &Tensor, sink: usize, page: usize) -> Result<Tensor> {
    let (h_kv, n, d) = keys.dims3()?;
    let pages = (sink..n).step_by(page).map(|start| {
        let keys = keys.narrow(1, start, page.min(n - start))?;
        Tensor::cat(&[keys.max_keepdim(1)?, keys.min_keepdim(1)?], 2)
    });
    let pages = pages.collect::<candle_core::Result<Vec<_>>>()?;
    match pages.is_empty() {
        true => Ok(Tensor::zeros((h_kv, 0, 2 * d), keys.dtype(), keys.device())?),
        false => Ok(Tensor::cat(&pages, 1)?),
    }
}
