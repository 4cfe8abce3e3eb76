//! Sparse attention in plain loops: any selection of keys, and any estimate of the rest.
//!
//! Everything that a method knows of the keys it expresses as stand-ins for them (the keys themselves, their
//! reconstructions, the centroids of their clusters, the bounds of their pages), so that a score is an inner product with
//! a stand-in and one matmul gives those of a block of queries.

use anyhow::{ensure, Result};
use candle_core::Tensor;
use candle_pq_attn::Heavy;
use rayon::prelude::*;

/// Queries of one layer, at the last positions, and all keys and values that the last of them sees.
pub struct Queries<'a> {
    /// `[h, s, head_dim]`, f32, contiguous as the others
    pub q: &'a Tensor,
    /// `[h_kv, n, head_dim]`
    pub keys: &'a Tensor,
    /// `[h_kv, n, head_dim]`
    pub values: &'a Tensor,
    pub scale: f32,
}

/// What the queries get.
pub struct Attended {
    /// `[h, s, head_dim]`
    pub out: Tensor,
    /// `[h * s]`: logarithm of the sum of `exp(scale · q · k)` over the attended keys.
    pub mass: Vec<f64>,
    /// The same of the rest, estimated, by a method that does so.
    pub tail: Option<Vec<f64>>,
}

impl Attended {
    /// Of consecutive positions.
    pub fn cat(parts: &[Self]) -> Result<Self> {
        let outs: Vec<_> = parts.iter().map(|part| &part.out).collect();
        let out = Tensor::cat(&outs, 1)?;
        let rows = |mass: &'_ dyn Fn(&Self) -> Option<&Vec<f64>>| -> Result<Option<Vec<f64>>> {
            let mut all = vec![Vec::new(); out.dim(0)?];
            for part in parts {
                let Some(mass) = mass(part) else { return Ok(None) };
                let heads = mass.chunks_exact(part.out.dim(1)?);
                all.iter_mut().zip(heads).for_each(|(all, head)| all.extend_from_slice(head));
            }
            Ok(Some(all.concat()))
        };
        let mass = rows(&|part| Some(&part.mass))?.unwrap_or_default();
        let tail = rows(&|part| part.tail.as_ref())?;
        Ok(Self { out, mass, tail })
    }
}

/// Which keys are attended exactly, and what stands for the others.
#[derive(Clone)]
pub struct Plan<'a> {
    pub sink: usize,
    pub window: usize,
    /// None: sink and window only.
    pub choose: Option<Choose<'a>>,
    /// None: the others are left out.
    pub tail: Option<Tail<'a>>,
}

/// How keys are chosen: the best of the candidates, those between sink and window.
#[derive(Clone)]
pub struct Choose<'a> {
    pub heavy: Heavy,
    pub by: Standins<'a>,
    /// One choice for all query heads of a KV head, by the sum of their softmax.
    pub per_kv_head: bool,
}

/// What keys are scored by. The first one stands for the key behind the sink.
#[derive(Clone, Copy)]
pub enum Standins<'a> {
    /// `[h_kv, n - sink, head_dim]`: one a key.
    Keys(&'a Tensor),
    /// `[h_kv, pages, 2 * head_dim]`: of each page of so many keys the largest and the smallest elements. Chooses whole
    /// pages, the last of them at most in excess of the budget.
    Bounds(&'a Tensor, usize),
}

/// Each key that was not chosen counts with its estimated weight, and with the mean value of its cluster.
#[derive(Clone)]
pub struct Tail<'a> {
    /// `[h_kv, n - sink, head_dim]`: weights are `exp(scale · q · k)` of these keys.
    pub by: &'a Tensor,
    /// `[h_kv][n - sink]`
    pub clusters: &'a [Vec<u8>],
    /// The mean is over the keys that were not chosen, rather than all candidates of the cluster.
    pub rest: bool,
    pub spread: Spread<'a>,
}

/// The variance of `key - stand-in`, for which weights are corrected: the mean of `e^x` is `e^(mean + variance / 2)` for a
/// normal `x`.
#[derive(Clone, Copy)]
pub enum Spread<'a> {
    Ignored,
    /// `[h_kv, clusters or 1, head_dim]`: variances of the elements.
    Diagonal(&'a Tensor),
    /// `[h_kv, head_dim, head_dim]`
    Full(&'a Tensor),
}

/// Queries whose scores are computed at a time.
const BLOCK: usize = 32;

/// Attends by `plan`.
pub fn attend(queries: &Queries, plan: &Plan) -> Result<Attended> {
    let (h, s, d) = queries.q.dims3()?;
    let (h_kv, n, _) = queries.keys.dims3()?;
    ensure!(
        h % h_kv == 0 && s <= n,
        "attend: expected queries of a multiple of {h_kv} heads, at most {n}; got {h}, {s}"
    );
    let tasks: Vec<_> = (0..h_kv).flat_map(|kv| (0..s).step_by(BLOCK).map(move |start| (kv, start))).collect();
    let blocks = tasks.par_iter().map(|&(kv, start)| {
        let block = Block { queries, plan, kv, start, len: BLOCK.min(s - start) };
        Ok((kv, start, block.run()?))
    });
    let mut out = vec![0f32; h * s * d];
    let (mut mass, mut tail) = (vec![0f64; h * s], vec![0f64; h * s]);
    let group = h / h_kv;
    for (kv, start, rows) in blocks.collect::<Result<Vec<_>>>()? {
        for (index, row) in rows.into_iter().enumerate() {
            let (i, g) = (index / group, index % group);
            let at = (kv * group + g) * s + start + i;
            out[at * d..][..d].copy_from_slice(&row.out);
            (mass[at], tail[at]) = (row.mass, row.tail);
        }
    }
    let out = Tensor::from_vec(out, (h, s, d), queries.q.device())?;
    Ok(Attended { out, mass, tail: plan.tail.is_some().then_some(tail) })
}

/// A few consecutive queries of the heads of one KV head.
struct Block<'a> {
    queries: &'a Queries<'a>,
    plan: &'a Plan<'a>,
    kv: usize,
    start: usize,
    len: usize,
}

/// One query of one head.
struct Row {
    out: Vec<f32>,
    mass: f64,
    tail: f64,
}

impl Block<'_> {
    /// Rows by query, and within one by head.
    fn run(&self) -> Result<Vec<Row>> {
        let Self { queries, plan, kv, start, len } = *self;
        let (h, s, d) = queries.q.dims3()?;
        let (h_kv, n, _) = queries.keys.dims3()?;
        let group = h / h_kv;
        let (first, last) = (n - s + start, n - s + start + len);
        let sink = plan.sink;

        let q = queries.q.narrow(0, kv * group, group)?.narrow(1, start, len)?.reshape((group * len, d))?;
        let exact = product(&q, &queries.keys.get(kv)?.narrow(0, 0, last)?)?;
        let behind_sink = last.saturating_sub(sink);
        let chosen_by = match plan.choose.as_ref().map(|choose| choose.by) {
            None => None,
            Some(Standins::Keys(keys)) => Some(product(&q, &keys.get(kv)?.narrow(0, 0, behind_sink)?)?),
            Some(Standins::Bounds(bounds, page)) => {
                // The bound takes for each element the corner of the page's box that is better for the query.
                let corners = Tensor::cat(&[q.relu()?, q.neg()?.relu()?.neg()?], 1)?;
                Some(product(&corners, &bounds.get(kv)?.narrow(0, 0, behind_sink.div_ceil(page))?)?)
            }
        };
        let tail_by = match &plan.tail {
            None => None,
            Some(tail) => {
                let scores = product(&q, &tail.by.get(kv)?.narrow(0, 0, behind_sink)?)?;
                let n_clusters = tail.clusters[kv].iter().max().map_or(0, |&c| usize::from(c) + 1);
                Some((scores, corrections(&q, tail.spread, kv, queries.scale)?, n_clusters))
            }
        };
        let values = queries.values.get(kv)?.narrow(0, 0, last)?.flatten_all()?.to_vec1::<f32>()?;

        let mut sums = ClusterSums::new(tail_by.as_ref().map_or(0, |(.., n)| *n), d);
        let mut rows = Vec::with_capacity(group * len);
        for i in 0..len {
            let n = first + i + 1;
            let end = n.saturating_sub(plan.window);
            let candidates = sink.min(end)..end;
            if let Some(tail) = &plan.tail {
                sums.advance(&tail.clusters[kv], candidates.len(), &values[candidates.start * d..]);
            }
            let row_of = |g: usize| g * len + i;
            let choices = self.choices(n, candidates.len(), chosen_by.as_deref(), group, row_of)?;
            for g in 0..group {
                let exact = &exact[row_of(g) * last..][..n];
                let mut row = Accumulator::new(d, queries.scale);
                let chosen = &choices[g % choices.len()];
                let positions = chosen.iter().enumerate().filter(|(_, chosen)| **chosen);
                let heavy = positions.map(|(t, _)| candidates.start + t);
                for t in (0..candidates.start).chain(heavy.clone()).chain(candidates.end..n) {
                    row.add(exact[t], &values[t * d..][..d]);
                }
                if let (Some((scores, corrections, _)), Some(tail)) = (&tail_by, &plan.tail) {
                    let scores = &scores[row_of(g) * behind_sink..][..candidates.len()];
                    let corrections = &corrections[row_of(g)];
                    row.add_tail(scores, corrections, &tail.clusters[kv], chosen, &sums, |t| {
                        tail.rest.then(|| &values[(candidates.start + t) * d..][..d])
                    });
                }
                rows.push(row.finish());
            }
        }
        Ok(rows)
    }

    /// Which candidates are attended: for each head of the group, or for all of them.
    fn choices(
        &self,
        n: usize,
        candidates: usize,
        scores: Option<&[f32]>,
        group: usize,
        row_of: impl Fn(usize) -> usize,
    ) -> Result<Vec<Vec<bool>>> {
        let (Some(choose), Some(scores)) = (&self.plan.choose, scores) else {
            return Ok(vec![vec![false; candidates]]);
        };
        let unit = match choose.by {
            Standins::Keys(_) => 1,
            Standins::Bounds(_, page) => page,
        };
        let columns = scores.len() / (group * self.len);
        let units = candidates.div_ceil(unit);
        let wanted = choose.heavy.count(n).div_ceil(unit);
        let row = |g: usize| &scores[row_of(g) * columns..][..units];
        let best = |scores: &[f32]| -> Vec<bool> {
            let mut mask = top(scores, wanted);
            if unit > 1 {
                mask = (0..candidates).map(|t| mask[t / unit]).collect();
            }
            mask
        };
        if !choose.per_kv_head {
            return Ok((0..group).map(|g| best(row(g))).collect());
        }
        let mut pooled = vec![0f32; units];
        for g in 0..group {
            let largest = row(g).iter().copied().fold(f32::NEG_INFINITY, f32::max);
            let weights: Vec<f32> = row(g).iter().map(|x| ((x - largest) * self.queries.scale).exp()).collect();
            let sum: f32 = weights.iter().sum();
            pooled.iter_mut().zip(&weights).for_each(|(pooled, weight)| *pooled += weight / sum);
        }
        Ok(vec![best(&pooled)])
    }
}

/// `rows · keysᵀ`
fn product(rows: &Tensor, keys: &Tensor) -> Result<Vec<f32>> {
    Ok(rows.matmul(&keys.t()?)?.flatten_all()?.to_vec1()?)
}

/// What is added to the scaled scores of each row, by cluster; one number for all clusters, or none.
fn corrections(q: &Tensor, spread: Spread, kv: usize, scale: f32) -> Result<Vec<Vec<f32>>> {
    let half = f64::from(scale * scale) / 2.;
    Ok(match spread {
        Spread::Ignored => vec![vec![0.]; q.dim(0)?],
        Spread::Diagonal(variances) => (q.sqr()?.matmul(&variances.get(kv)?.t()?)? * half)?.to_vec2()?,
        Spread::Full(covariance) => ((q.matmul(&covariance.get(kv)?)? * q)?.sum_keepdim(1)? * half)?.to_vec2()?,
    })
}

/// Marks the `k` largest scores; of equal ones those of the lower position.
pub fn top(scores: &[f32], k: usize) -> Vec<bool> {
    if k >= scores.len() {
        return vec![true; scores.len()];
    }
    if k == 0 {
        return vec![false; scores.len()];
    }
    let mut sorted = scores.to_vec();
    let (_, &mut threshold, _) = sorted.select_nth_unstable_by(k - 1, |a, b| b.total_cmp(a));
    let above = scores.iter().filter(|score| score.total_cmp(&threshold).is_gt()).count();
    let mut ties = k - above;
    let mark = |score: &f32| match score.total_cmp(&threshold) {
        std::cmp::Ordering::Greater => true,
        std::cmp::Ordering::Equal if ties > 0 => {
            ties -= 1;
            true
        }
        _ => false,
    };
    scores.iter().map(mark).collect()
}

/// Sums of the values of each cluster, over the candidates so far.
struct ClusterSums {
    sums: Vec<f32>,
    counts: Vec<u32>,
    d: usize,
    seen: usize,
}

impl ClusterSums {
    fn new(clusters: usize, d: usize) -> Self {
        Self { sums: vec![0.; clusters * d], counts: vec![0; clusters], d, seen: 0 }
    }

    /// Adds the candidates up to `end`; `values` begins with the first candidate's.
    fn advance(&mut self, clusters: &[u8], end: usize, values: &[f32]) {
        for t in self.seen..end {
            let cluster = usize::from(clusters[t]);
            let sum = &mut self.sums[cluster * self.d..][..self.d];
            sum.iter_mut().zip(&values[t * self.d..][..self.d]).for_each(|(sum, v)| *sum += v);
            self.counts[cluster] += 1;
        }
        self.seen = self.seen.max(end);
    }
}

/// A softmax-weighted sum of values, on the go.
struct Accumulator {
    out: Vec<f32>,
    scale: f32,
    largest: f32,
    sum: f32,
    tail: f32,
}

impl Accumulator {
    fn new(d: usize, scale: f32) -> Self {
        Self { out: vec![0.; d], scale, largest: f32::NEG_INFINITY, sum: 0., tail: 0. }
    }

    /// Makes room for weights up to `exp(logit)`.
    fn raise(&mut self, logit: f32) {
        if logit > self.largest {
            let factor = (self.largest - logit).exp();
            self.out.iter_mut().for_each(|x| *x *= factor);
            self.sum *= factor;
            self.largest = logit;
        }
    }

    fn add(&mut self, score: f32, value: &[f32]) {
        let logit = score * self.scale;
        self.raise(logit);
        let weight = (logit - self.largest).exp();
        self.sum += weight;
        self.out.iter_mut().zip(value).for_each(|(x, v)| *x += weight * v);
    }

    /// Adds the candidates that were not chosen. `excluded` gives the value of a chosen one if it is not to count in its
    /// cluster's mean.
    fn add_tail<'v>(
        &mut self,
        scores: &[f32],
        corrections: &[f32],
        clusters: &[u8],
        chosen: &[bool],
        sums: &ClusterSums,
        excluded: impl Fn(usize) -> Option<&'v [f32]>,
    ) {
        let correction = |cluster: usize| corrections[cluster % corrections.len()];
        let logit = |t: usize| scores[t] * self.scale + correction(usize::from(clusters[t]));
        let logits: Vec<f32> = (0..scores.len()).map(logit).collect();
        let rest = || logits.iter().zip(chosen).zip(clusters).enumerate().filter(|(_, ((_, chosen), _))| !**chosen);
        self.raise(rest().fold(f32::NEG_INFINITY, |largest, (_, ((logit, _), _))| largest.max(*logit)));
        let mut weights = vec![0f32; sums.counts.len()];
        for (_, ((logit, _), &cluster)) in rest() {
            weights[usize::from(cluster)] += (logit - self.largest).exp();
        }
        self.tail = weights.iter().sum();
        let mut counts = sums.counts.clone();
        let left_out: Vec<_> =
            (0..chosen.len()).filter(|&t| chosen[t]).filter_map(|t| Some((t, excluded(t)?))).collect();
        left_out.iter().for_each(|(t, _)| counts[usize::from(clusters[*t])] -= 1);
        // A cluster without keys, or of chosen ones alone, has weight 0.
        let shares: Vec<f32> = weights.iter().zip(&counts).map(|(w, &count)| w / count.max(1) as f32).collect();
        for (share, sum) in shares.iter().zip(sums.sums.chunks_exact(sums.d)).filter(|(share, _)| **share > 0.) {
            self.out.iter_mut().zip(sum).for_each(|(x, v)| *x += share * v);
        }
        for (t, value) in left_out {
            let share = shares[usize::from(clusters[t])];
            self.out.iter_mut().zip(value).for_each(|(x, v)| *x -= share * v);
        }
    }

    fn finish(mut self) -> Row {
        let total = self.sum + self.tail;
        self.out.iter_mut().for_each(|x| *x /= total);
        let log = |sum: f32| f64::from(self.largest) + f64::from(sum).ln();
        let (mass, tail) = (log(self.sum), log(self.tail));
        Row { out: self.out, mass, tail }
    }
}
