//! The search goes by tiles of sub-vectors, stored coordinate by coordinate, so that one centroid is compared with a
//! whole tile at a time: no reduction across lanes, and ties fall to the lower index by the order of the loop.

use candle_core::{CpuStorage, Result};
use multiversion::multiversion;
use rayon::prelude::*;

use super::Plan;
use crate::cpu::{dispatch_float, slice, Elem};

/// Sub-vectors compared at a time: two AVX-512 registers of lanes.
pub(crate) const TILE: usize = 32;

/// Keys a parallel task encodes, a multiple of [`TILE`].
const KEYS_PER_TASK: usize = 128;

/// One coordinate of a tile's sub-vectors.
pub(crate) type Tile = [f32; TILE];

/// Index of the nearest of `centroids` (`[n_centroids, len]`) for each sub-vector of a tile (`[len]` coordinates).
#[inline(always)]
pub(crate) fn nearest(tile: &[Tile], centroids: &[f32]) -> [u8; TILE] {
    // The lengths of common shapes at compile time keep the tile in registers.
    match tile.len() {
        2 => nearest_of_len::<2>(tile, centroids),
        4 => nearest_of_len::<4>(tile, centroids),
        8 => nearest_of_len::<8>(tile, centroids),
        16 => nearest_of_len::<16>(tile, centroids),
        _ => nearest_of_any_len(tile, centroids),
    }
}

#[inline(always)]
fn nearest_of_len<const LEN: usize>(tile: &[Tile], centroids: &[f32]) -> [u8; TILE] {
    match <&[Tile; LEN]>::try_from(tile) {
        Ok(tile) => nearest_of_any_len(tile, centroids),
        Err(_) => nearest_of_any_len(tile, centroids),
    }
}

#[inline(always)]
fn nearest_of_any_len(tile: &[Tile], centroids: &[f32]) -> [u8; TILE] {
    let mut best = [f32::INFINITY; TILE];
    let mut index = [0i32; TILE];
    for (c, centroid) in centroids.chunks_exact(tile.len()).enumerate() {
        let mut distance = [0f32; TILE];
        for (coordinate, y) in tile.iter().zip(centroid) {
            for l in 0..TILE {
                let diff = coordinate[l] - y;
                distance[l] += diff * diff;
            }
        }
        for l in 0..TILE {
            let closer = distance[l] < best[l];
            index[l] = if closer { c as i32 } else { index[l] };
            best[l] = if closer { distance[l] } else { best[l] };
        }
    }
    index.map(|c| c as u8)
}

pub(super) fn run(plan: &Plan, keys: &CpuStorage, centroids: &CpuStorage, phi: &CpuStorage) -> Result<Vec<u8>> {
    dispatch_float!(keys, run_for(plan, keys, slice(centroids)?, slice(phi)?))
}

fn run_for<T: Elem>(plan: &Plan, keys: &CpuStorage, centroids: &[f32], phi: &[f32]) -> Result<Vec<u8>> {
    let keys = slice::<T>(keys)?;
    let [b, h_kv, n, _] = plan.keys.dims;
    let pq_dim = plan.centroids.dims[2];
    let mut codes = vec![0u8; b * h_kv * n * pq_dim];
    if codes.is_empty() {
        return Ok(codes);
    }
    let centroids = contiguous_centroids(plan, centroids);
    let table_len = centroids.len() / (b * h_kv);
    codes.par_chunks_mut(n * pq_dim).zip(centroids.par_chunks(table_len)).enumerate().for_each(
        |(head, (codes, table))| {
            let (bi, hi) = (head / h_kv, head % h_kv);
            codes.par_chunks_mut(KEYS_PER_TASK * pq_dim).enumerate().for_each(|(task, codes)| {
                encode_keys::<T>(plan, keys, phi, table, [bi, hi, task * KEYS_PER_TASK], codes);
            });
        },
    );
    Ok(codes)
}

/// Encodes the keys of head `[b, h]` from `first` on, as many as `codes` has rows for.
#[multiversion(targets = "simd")]
fn encode_keys<T: Elem>(
    plan: &Plan,
    keys: &[T],
    phi: &[f32],
    table: &[f32],
    [b, h, first]: [usize; 3],
    codes: &mut [u8],
) {
    let [_, _, pq_dim, _, columns] = plan.centroids.dims;
    // A row for each coordinate of each subspace, the augmentation included where there is one.
    let mut tiles = vec![[0f32; TILE]; pq_dim * columns];
    for (i, codes) in codes.chunks_mut(TILE * pq_dim).enumerate() {
        encode_tile::<T>(plan, keys, phi, table, [b, h, first + i * TILE], &mut tiles, codes);
    }
}

/// Encodes up to [`TILE`] keys.
#[inline(always)]
fn encode_tile<T: Elem>(
    plan: &Plan,
    keys: &[T],
    phi: &[f32],
    table: &[f32],
    [b, h, first]: [usize; 3],
    tiles: &mut [Tile],
    codes: &mut [u8],
) {
    let [_, _, pq_dim, n_centroids, columns] = plan.centroids.dims;
    let [.., head_dim] = plan.keys.dims;
    let key = &mut [0f32; super::MAX_HEAD_DIM][..head_dim];
    for lane in 0..codes.len() / pq_dim {
        let at = plan.keys.at(&[b, h, first + lane]);
        T::widen(&keys[at..at + head_dim], key);
        for (tile, x) in tiles.chunks_exact_mut(columns).zip(key.chunks_exact(plan.pq_len)) {
            for (coordinate, x) in tile.iter_mut().zip(x) {
                coordinate[lane] = *x;
            }
        }
    }
    let subspaces = tiles.chunks_exact_mut(columns).zip(table.chunks_exact(n_centroids * columns));
    for (m, (tile, table)) in subspaces.enumerate() {
        if let Some(view) = plan.phi {
            tile[plan.pq_len] = augmentation(&tile[..plan.pq_len], phi[view.at(&[b, h, m])]);
        }
        for (row, index) in codes.chunks_exact_mut(pq_dim).zip(nearest(tile, table)) {
            row[m] = index;
        }
    }
}

/// `sqrt(max(phi - |x|², 0))` of each sub-vector.
#[inline(always)]
pub(crate) fn augmentation(tile: &[Tile], phi: f32) -> Tile {
    let mut norms = [0f32; TILE];
    for coordinate in tile {
        for l in 0..TILE {
            norms[l] += coordinate[l] * coordinate[l];
        }
    }
    norms.map(|norm| (phi - norm).max(0.0).sqrt())
}

/// The centroids as `[b, h_kv, pq_dim, n_centroids, columns]` without gaps, whatever their strides.
fn contiguous_centroids(plan: &Plan, centroids: &[f32]) -> Vec<f32> {
    let [b, h_kv, pq_dim, n_centroids, columns] = plan.centroids.dims;
    let mut out = Vec::with_capacity(b * h_kv * pq_dim * n_centroids * columns);
    for row in 0..b * h_kv * pq_dim * n_centroids {
        let (head, rest) = (row / (pq_dim * n_centroids), row % (pq_dim * n_centroids));
        let at = plan.centroids.at(&[head / h_kv, head % h_kv, rest / n_centroids, rest % n_centroids]);
        out.extend_from_slice(&centroids[at..at + columns]);
    }
    out
}
