use candle_core::{CpuStorage, Result};
use multiversion::multiversion;
use rayon::prelude::*;

use super::Plan;
use crate::config::Metric;
use crate::cpu::{dispatch_float, slice, Elem};
use crate::ops::encode::{augmentation, nearest, Tile, TILE};

/// Returns the centroids and each subspace's `phi`.
pub(super) fn run(plan: &Plan, keys: &CpuStorage) -> Result<(Vec<f32>, Vec<f32>)> {
    dispatch_float!(keys, run_for(plan, keys))
}

fn run_for<T: Elem>(plan: &Plan, keys: &CpuStorage) -> Result<(Vec<f32>, Vec<f32>)> {
    let keys = slice::<T>(keys)?;
    let [b, h_kv, ..] = plan.keys.dims;
    let pq_dim = plan.options.pq_dim;
    let mut phi = vec![0f32; b * h_kv * pq_dim];
    let mut centroids = vec![0f32; phi.len() * plan.n_centroids * plan.columns];
    let tables = centroids.par_chunks_mut(plan.n_centroids * plan.columns);
    tables.zip(&mut phi).enumerate().for_each(|(subspace, (table, phi))| {
        let (head, m) = (subspace / pq_dim, subspace % pq_dim);
        *phi = train::<T>(plan, keys, [head / h_kv, head % h_kv, m], table);
    });
    Ok((centroids, phi))
}

/// Trains the centroids of subspace `[b, h, m]`; returns its `phi`.
#[multiversion(targets = "simd")]
fn train<T: Elem>(plan: &Plan, keys: &[T], [b, h, m]: [usize; 3], centroids: &mut [f32]) -> f32 {
    let mut tiles = gather::<T>(plan, keys, [b, h], m);
    let phi = match plan.options.metric {
        Metric::Euclidean => 0.0,
        Metric::InnerProduct => augment(&mut tiles, plan),
    };
    let subspace = (b * plan.keys.dims[1] + h) * plan.options.pq_dim + m;
    // Mixed first: a multiple of the generator's own increment would only shift the numbers of another subspace.
    let random = Random(plan.options.seed ^ Random(subspace as u64).next());
    Lloyd { plan, tiles: &tiles, random }.train(centroids);
    phi
}

/// The sampled sub-vectors of one subspace in tiles of `[columns]` coordinates; unused lanes repeat the first key's.
#[inline(always)]
fn gather<T: Elem>(plan: &Plan, keys: &[T], [b, h]: [usize; 2], m: usize) -> Vec<Tile> {
    let n = plan.keys.dims[2];
    let mut tiles = vec![[0f32; TILE]; plan.samples.div_ceil(TILE) * plan.columns];
    let x = &mut [0f32; super::MAX_HEAD_DIM][..plan.pq_len];
    for (i, tile) in tiles.chunks_exact_mut(plan.columns).enumerate() {
        for lane in 0..TILE {
            let sample = if i * TILE + lane < plan.samples { i * TILE + lane } else { 0 };
            // 128 bits: n and the number of samples may both be large.
            let t = (sample as u128 * n as u128 / plan.samples as u128) as usize;
            let at = plan.keys.at(&[b, h, t]) + m * plan.pq_len;
            T::widen(&keys[at..at + plan.pq_len], x);
            for (coordinate, x) in tile.iter_mut().zip(&*x) {
                coordinate[lane] = *x;
            }
        }
    }
    tiles
}

/// Fills in the last coordinate of the inner-product metric; returns `phi`.
#[inline(always)]
fn augment(tiles: &mut [Tile], plan: &Plan) -> f32 {
    let mut phi = 0f32;
    for tile in tiles.chunks_exact(plan.columns) {
        for lane in 0..TILE {
            phi = phi.max(tile[..plan.pq_len].iter().map(|x| x[lane] * x[lane]).sum());
        }
    }
    for tile in tiles.chunks_exact_mut(plan.columns) {
        tile[plan.pq_len] = augmentation(&tile[..plan.pq_len], phi);
    }
    phi
}

/// One subspace in training.
struct Lloyd<'a> {
    plan: &'a Plan,
    tiles: &'a [Tile],
    random: Random,
}

impl Lloyd<'_> {
    #[inline(always)]
    fn train(mut self, centroids: &mut [f32]) {
        self.draw_distinct(centroids);
        for _ in 0..self.plan.options.iters {
            self.update(centroids);
        }
    }

    /// Sets the centroids to as many distinct samples, by the first steps of a Fisher-Yates shuffle.
    #[inline(always)]
    fn draw_distinct(&mut self, centroids: &mut [f32]) {
        let mut order: Vec<usize> = (0..self.plan.samples).collect();
        for (i, centroid) in centroids.chunks_exact_mut(self.plan.columns).enumerate() {
            let j = i + self.random.below(order.len() - i);
            order.swap(i, j);
            self.copy_sample(order[i], centroid);
        }
    }

    /// Moves every centroid to the mean of the samples that it is nearest to.
    #[inline(always)]
    fn update(&mut self, centroids: &mut [f32]) {
        let columns = self.plan.columns;
        let mut sums = vec![0f64; centroids.len()];
        let mut counts = vec![0u32; self.plan.n_centroids];
        for (i, tile) in self.tiles.chunks_exact(columns).enumerate() {
            let indices = nearest(tile, centroids);
            for (lane, &c) in indices.iter().enumerate().take(self.plan.samples - i * TILE) {
                counts[usize::from(c)] += 1;
                for (sum, coordinate) in sums[usize::from(c) * columns..][..columns].iter_mut().zip(tile) {
                    *sum += f64::from(coordinate[lane]);
                }
            }
        }
        let means = centroids.chunks_exact_mut(columns).zip(sums.chunks_exact(columns));
        for ((centroid, sum), count) in means.zip(counts) {
            if count == 0 {
                let sample = self.random.below(self.plan.samples);
                self.copy_sample(sample, centroid);
                continue;
            }
            for (x, sum) in centroid.iter_mut().zip(sum) {
                *x = (sum / f64::from(count)) as f32;
            }
        }
    }

    #[inline(always)]
    fn copy_sample(&self, sample: usize, centroid: &mut [f32]) {
        let tile = &self.tiles[sample / TILE * self.plan.columns..];
        for (x, coordinate) in centroid.iter_mut().zip(tile) {
            *x = coordinate[sample % TILE];
        }
    }
}

/// SplitMix64 (Steele, Lea and Flood, *Fast Splittable Pseudorandom Number Generators*, 2014): five lines whose output
/// will never change under a dependency's update, as codebooks must not.
struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let z = (self.0 ^ (self.0 >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    /// A number in `0..bound`, by the multiply-shift of Lemire (its bias, below 2^-32, does not matter here).
    fn below(&mut self, bound: usize) -> usize {
        ((u128::from(self.next()) * bound as u128) >> 64) as usize
    }
}
