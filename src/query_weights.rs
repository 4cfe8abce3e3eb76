//! What the elements of a key weigh in distances: by how much queries, on average, make of their error.
//!
//! A score's error is `q · (key - what stands for it)`. Over queries whose elements do not go together, its mean square is
//! `Σ E[q_i²] (key_i - ...)²`: squared distance, once each element has been multiplied by the root of `E[q_i²]`.

use std::ops::Range;

use candle_core::{bail, DType, Device, Result, Tensor};

use crate::fault::point_of_failure;

/// Distance of a position of the sample to the next: 32 positions are of each doubling, so that a long prompt costs little
/// more than a short one.
fn stride(position: usize) -> usize {
    1 << (position.max(128).ilog2() - 5)
}

/// Those in `range` whose queries are in the sample.
fn positions(range: Range<usize>) -> impl Iterator<Item = usize> {
    let first = range.start.next_multiple_of(stride(range.start));
    std::iter::successors(Some(first), |position| Some(position + stride(*position)))
        .take_while(move |position| *position < range.end)
}

/// What queries of a prompt look at, kept by position: what it says depends on the positions in the cache, not on how they
/// came there.
#[derive(Debug, Default, Clone)]
pub(crate) struct QuerySample {
    /// For the sample's positions from a first one on, [`squares`] of their queries. In ascending order.
    pieces: Vec<(usize, Tensor)>,
}

impl QuerySample {
    /// Takes what it wants of `query`, `[b, h, s, head_dim]`, whose positions begin with `start`.
    pub(crate) fn add(&mut self, start: usize, query: &Tensor, h_kv: usize) -> Result<()> {
        let sampled: Vec<_> = positions(start..start + query.dim(2)?).collect();
        if let Some(first) = sampled.first() {
            let rows: Result<Vec<_>> = sampled.iter().map(|position| query.narrow(2, position - start, 1)).collect();
            self.pieces.push((*first, squares(&Tensor::cat(&rows?, 2)?, h_kv)?));
        }
        Ok(())
    }

    /// Forgets the queries from position `len` on.
    pub(crate) fn truncate(&mut self, len: usize) -> Result<()> {
        self.pieces.retain(|(first, _)| *first < len);
        if let Some((first, squares)) = self.pieces.last_mut() {
            *squares = squares.narrow(2, 0, positions(*first..len).take(squares.dim(2)?).count())?;
        }
        Ok(())
    }

    /// The first position of each piece, and squares of it and those that follow.
    pub(crate) fn pieces(&self) -> impl Iterator<Item = (usize, &Tensor)> {
        self.pieces.iter().map(|(first, squares)| (*first, squares))
    }

    /// Takes back a piece of a cache for keys of `[b, h_kv, head_dim]` that has `len` of them.
    pub(crate) fn push(&mut self, first: usize, squares: Tensor, dims: [usize; 3], len: usize) -> Result<()> {
        let [b, h_kv, head_dim] = dims;
        let next = self.pieces.last().map_or(Some(0), |(first, squares)| positions(*first..len).nth(squares.dims()[2]));
        let count = squares.dims().get(2).copied().unwrap_or(0);
        let is_sampled = |first: &usize| positions(*first..len).next() == Some(*first);
        if next.is_none_or(|next| first < next)
            || !is_sampled(&first)
            || positions(first..len).take(count).count() < count
        {
            bail!("queries: expected ascending positions of a sample of {len}, got {count} from {first} on");
        }
        let expected = [b, h_kv, count, head_dim.div_ceil(2)];
        if squares.dims() != expected || count == 0 {
            bail!("queries: expected shape [{b}, {h_kv}, count, {}], got {:?}", expected[3], squares.dims());
        }
        self.pieces.push((first, squares));
        Ok(())
    }

    pub(crate) fn bytes(&self) -> usize {
        self.pieces.iter().map(|(_, squares)| squares.elem_count() * size_of::<f32>()).sum()
    }

    /// Weights for keys of `[b, h_kv, head_dim]`, of these dimensions, in f32; None without queries.
    ///
    /// Reads the sample back and sums in f64 by position: the same bits on any device and however the prompt was cut.
    pub(crate) fn weights(&self, dims: [usize; 3], device: &Device) -> Result<Option<Tensor>> {
        let [b, h_kv, head_dim] = dims;
        let columns = head_dim.div_ceil(2);
        let (mut sums, mut count) = (vec![0f64; b * h_kv * columns], 0);
        for (_, squares) in &self.pieces {
            let positions = squares.dim(2)?;
            let numbers = squares.flatten_all()?.to_vec1::<f32>()?;
            for (sums, head) in sums.chunks_exact_mut(columns).zip(numbers.chunks_exact(positions * columns)) {
                for row in head.chunks_exact(columns) {
                    sums.iter_mut().zip(row).for_each(|(sum, x)| *sum += f64::from(*x));
                }
            }
            count += positions;
        }
        if count == 0 {
            return Ok(None);
        }
        point_of_failure()?;
        let weights: Vec<f32> = sums.chunks_exact(columns).flat_map(|sums| weigh(sums, head_dim, count)).collect();
        Tensor::from_vec(weights, (b, h_kv, head_dim), device).map(Some)
    }
}

/// Squares of the elements of queries `[b, h, count, head_dim]`, summed over each group and over the elements `i` and
/// `i + head_dim / 2`, which rotary embedding turns together: `[b, h_kv, count, head_dim / 2]` f32, and at the end the middle
/// of an odd `head_dim`.
///
/// One addition after the other, which is the same on every device.
fn squares(queries: &Tensor, h_kv: usize) -> Result<Tensor> {
    point_of_failure()?;
    let (b, h, count, d) = queries.dims4()?;
    let queries = queries.to_dtype(DType::F32)?;
    let squares = (&queries * &queries)?.reshape((b, h_kv, h / h_kv, count, d))?;
    let mut sum = squares.get_on_dim(2, 0)?;
    for head in 1..h / h_kv {
        sum = (sum + squares.get_on_dim(2, head)?)?;
    }
    let part = |from: usize, len: usize| sum.narrow(3, from, len);
    let pairs = |half: usize| part(0, half)? + part(d - half, half)?;
    match (d / 2, d % 2) {
        (0, _) => Ok(sum),
        (half, 0) => pairs(half),
        (half, _) => Tensor::cat(&[&pairs(half)?, &part(half, 1)?], 3),
    }
}

/// Weights by such sums over `count` positions; the mean of their squares is 1.
///
/// The two elements that are turned together share what they have, which no rotation changes. A query more that looks at
/// all elements alike leaves a way back to those that none of a few queries looked at.
fn weigh(sums: &[f64], head_dim: usize, count: usize) -> Vec<f32> {
    let (d, half) = (head_dim, head_dim / 2);
    let mean = sums.iter().sum::<f64>() / d as f64;
    if !(mean.is_normal() && mean > 0.0) {
        return vec![1.0; d];
    }
    let count = count as f64;
    let square = |i: usize| match i {
        i if i < half => sums[i] / 2.0,
        i if i >= d - half => sums[i + half - d] / 2.0,
        middle => sums[middle],
    };
    (0..d).map(|i| ((count * square(i) / mean + 1.0) / (count + 1.0)).sqrt() as f32).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pairs_share_their_mean_and_squares_have_mean_one() {
        let off = |sums: &[f64], d, count, expected: &[f32]| {
            let weights = weigh(sums, d, count);
            assert_eq!(weights.len(), expected.len());
            weights.iter().zip(expected).all(|(w, e)| (w * w - e).abs() < 1e-6)
        };
        // Of a pair 2 and 6 each, in the middle 4, of a mean of 4; one query more counts 1 for each.
        assert!(off(&[4.0, 12.0, 4.0], 5, 1, &[0.75, 1.25, 1.0, 0.75, 1.25]));
        assert!(off(&[4.0, 12.0], 4, 3, &[0.625, 1.375, 0.625, 1.375]));
        assert!(off(&[0.0, 16.0], 4, usize::MAX, &[0.0, 2.0, 0.0, 2.0]));
        for nothing in [0.0, f64::NAN, f64::INFINITY] {
            assert_eq!(weigh(&[nothing; 2], 3, 7), [1.0; 3], "{nothing}");
        }
        assert_eq!((weigh(&[5.0], 1, 2), weigh(&[0.0, 1e38], 4, 1 << 20)[0] > 0.0), (vec![1.0], true));
    }

    #[test]
    fn squares_are_summed_over_groups_and_pairs() -> Result<()> {
        let queries = Tensor::new(&[[[1f32, 2., 3.], [4., 5., 6.]], [[-1., 0., 2.], [0., 7., 0.]]], &Device::Cpu)?;
        let of = |queries: &Tensor, h_kv| squares(queries, h_kv)?.flatten_all()?.to_vec1::<f32>();
        let two_heads = queries.reshape((1, 2, 2, 3))?;
        assert_eq!(of(&two_heads, 1)?, [1. + 9. + 1. + 4., 4. + 0., 16. + 36., 25. + 49.]);
        assert_eq!(of(&two_heads, 2)?, [10., 4., 52., 25., 5., 0., 0., 49.]);
        assert_eq!(of(&two_heads.narrow(3, 0, 2)?.to_dtype(DType::BF16)?, 2)?, [5., 41., 1., 49.]);
        assert_eq!(of(&two_heads.narrow(3, 2, 1)?, 1)?, [13., 36.]);
        Ok(())
    }

    #[test]
    fn positions_are_32_of_each_doubling() {
        let all: Vec<_> = positions(0..1 << 20).collect();
        assert_eq!(all[..34], [(0..128).step_by(4).collect::<Vec<_>>(), vec![128, 132]].concat());
        for doubling in 7..20 {
            let these: Vec<_> =
                all.iter().copied().filter(|position| (1 << doubling..2 << doubling).contains(position)).collect();
            assert_eq!(these, (1 << doubling..2 << doubling).step_by(1 << (doubling - 5)).collect::<Vec<_>>());
        }
        for (start, end) in [(0, 0), (1, 4), (1, 5), (127, 129), (1020, 1100), (5000, 5001), (1025, 70_000)] {
            let part: Vec<_> = all.iter().copied().filter(|position| (start..end).contains(position)).collect();
            assert_eq!(positions(start..end).collect::<Vec<_>>(), part);
        }
    }

    #[test]
    fn the_sample_is_by_position() -> Result<()> {
        let n = 2048;
        let all = Tensor::arange(0f32, (n * 2) as f32, &Device::Cpu)?.reshape((1, 1, n, 2))?;
        let rows = |sample: &QuerySample| -> Result<Vec<f32>> {
            let pieces: Vec<_> = sample.pieces.iter().map(|(_, squares)| squares).collect();
            Tensor::cat(&pieces, 2)?.flatten_all()?.to_vec1()
        };
        let expected =
            |len: usize| positions(0..len).map(|t| (4 * t * t + (2 * t + 1) * (2 * t + 1)) as f32).collect::<Vec<_>>();
        let mut whole = QuerySample::default();
        whole.add(0, &all, 1)?;
        assert_eq!(rows(&whole)?, expected(n));
        assert_eq!(whole.bytes(), 4 * 32 * 5);
        let weights = |sample: &QuerySample| sample.weights([1, 1, 2], &Device::Cpu);
        for cuts in [vec![1; 50], vec![3, 0, 9, 30], vec![8, 4, 1, 1023], vec![1000, 900]] {
            let (mut sample, mut at) = (QuerySample::default(), 0);
            for cut in cuts {
                sample.add(at, &all.narrow(2, at, cut)?, 1)?;
                at += cut;
                assert_eq!(rows(&sample)?, expected(at));
            }
            for len in [at - 1, 513, 40, 33, 32, 1] {
                sample.truncate(len)?;
                assert_eq!(rows(&sample)?, expected(len.min(at)), "{len}");
            }
            sample.add(1, &all.narrow(2, 1, n - 1)?, 1)?;
            let (same, whole) = (weights(&sample)?.expect("weights"), weights(&whole)?.expect("weights"));
            assert_eq!(same.flatten_all()?.to_vec1::<f32>()?, whole.flatten_all()?.to_vec1::<f32>()?);
            sample.truncate(0)?;
            assert!(weights(&sample)?.is_none() && sample.bytes() == 0);
        }
        Ok(())
    }
}
