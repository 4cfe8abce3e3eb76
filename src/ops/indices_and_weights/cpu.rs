use candle_core::{bail, CpuStorage, Result};
use rayon::prelude::*;

use super::{Geometry, Lists, Plan, Selected, DENSE_OP, OP, PADDING};
use crate::cpu::{held, slice};

pub(super) struct Output {
    pub(super) indices: Vec<u32>,
    pub(super) lens: Vec<u32>,
    pub(super) weights: Vec<f32>,
}

pub(super) fn run(plan: &Plan, heavy: &CpuStorage) -> Result<Output> {
    let heavy = slice::<u32>(heavy)?;
    let [b, lists, k] = plan.heavy.dims;
    let mut indices = vec![PADDING; b * lists * plan.list_len];
    let mut weights = vec![0f32; indices.len()];
    let mut lens = vec![0u32; b * lists];
    let rows = indices.chunks_mut(plan.list_len.max(1)).zip(weights.chunks_mut(plan.list_len.max(1)));
    for (row, ((indices, weights), len)) in rows.zip(&mut lens).enumerate() {
        let at = plan.heavy.at(&[row / lists, row % lists]);
        let attended = list(plan.geometry, &heavy[at..at + k], indices)?;
        weights[..attended].fill(1.0);
        *len = attended as u32;
    }
    Ok(Output { indices, lens, weights })
}

/// Writes the attended positions to the front of `indices`; returns how many there are.
fn list(geometry: Geometry, heavy: &[u32], indices: &mut [u32]) -> Result<usize> {
    let Geometry { n, sink, window, init_offset } = geometry;
    let (sink, window_start) = (sink.min(n), n.saturating_sub(window));
    let middle = sink..window_start;
    let mut next = 0;
    let mut push = |position: usize| {
        indices[next] = position as u32;
        next += 1;
    };
    (0..sink).for_each(&mut push);
    let mut last = None;
    for &index in heavy {
        let position = init_offset.saturating_add(index as usize);
        if position >= n {
            bail!("{OP}: heavy: expected positions below n {n}, got {init_offset} + {index}");
        }
        if last.is_some_and(|last| last >= index) {
            bail!("{OP}: heavy: expected ascending positions, got {index} after {}", last.unwrap_or_default());
        }
        last = Some(index);
        if middle.contains(&position) {
            push(position);
        }
    }
    (window_start.max(sink)..n).for_each(&mut push);
    Ok(next)
}

/// Writes each list's weights to their positions, in the rows of all the query heads that the list serves.
pub(super) fn scatter(
    lists: &Lists,
    h: usize,
    n: usize,
    indices: &CpuStorage,
    lens: &CpuStorage,
    weights: &CpuStorage,
) -> Result<Vec<f32>> {
    let storages = ListStorages { indices: slice(indices)?, lens: slice(lens)?, weights: slice(weights)? };
    let mut dense = vec![0f32; lists.indices.dims[0] * h * n];
    let heads_per_list = h / lists.lists();
    dense.par_chunks_mut(n.max(1)).enumerate().try_for_each(|(row, dense)| {
        lists.each(DENSE_OP, &storages, [row / h, row % h / heads_per_list], n, |position, weight| {
            dense[position] += weight;
        })
    })?;
    Ok(dense)
}

/// The elements of a [`Selected`](super::Selected).
struct ListStorages<'a> {
    indices: &'a [u32],
    lens: &'a [u32],
    weights: &'a [f32],
}

impl Lists {
    /// The attended positions of every list and their weights, in order; what weighs nothing is passed over.
    ///
    /// Fails as [`each`](Self::each).
    pub(crate) fn attended(&self, op: &str, selected: &Selected, n: usize) -> Result<Vec<Vec<(u32, f32)>>> {
        let Selected { indices, lens, weights } = selected;
        let (indices, lens) = (indices.storage_and_layout().0, lens.storage_and_layout().0);
        let weights = weights.storage_and_layout().0;
        let storages = ListStorages {
            indices: held(op, "selected", &indices)?,
            lens: held(op, "selected", &lens)?,
            weights: held(op, "selected", &weights)?,
        };
        let lists = (0..self.indices.dims[0] * self.lists()).into_par_iter().map(|row| {
            let mut attended = Vec::with_capacity(self.indices.dims[2]);
            self.each(op, &storages, [row / self.lists(), row % self.lists()], n, |position, weight| {
                if weight != 0.0 {
                    attended.push((position as u32, weight));
                }
            })?;
            Ok(attended)
        });
        lists.collect()
    }

    /// Calls `f` with each attended position of one list and its weight, in order; padding is passed over.
    ///
    /// Fails, in the name of `op`, where a position is not below `n` or a length not within the list.
    fn each(
        &self,
        op: &str,
        storages: &ListStorages,
        row: [usize; 2],
        n: usize,
        mut f: impl FnMut(usize, f32),
    ) -> Result<()> {
        let len = storages.lens[self.lens.at(&row)] as usize;
        if len > self.indices.dims[2] {
            bail!("{op}: lens: expected at most {} positions, got {len}", self.indices.dims[2]);
        }
        let (indices, weights) = (self.indices.at(&row), self.weights.at(&row));
        for (&index, &weight) in storages.indices[indices..indices + len].iter().zip(&storages.weights[weights..]) {
            match index as usize {
                _ if index == PADDING => {}
                position if position < n => f(position, weight),
                position => bail!("{op}: indices: expected positions below n {n}, got {position}"),
            }
        }
        Ok(())
    }
}
