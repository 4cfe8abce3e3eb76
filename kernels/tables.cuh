// The tables of a decode step as one launch makes them and the next one loads them: query . centroid, an entry for each
// centroid and cluster, which holds the numbers of a bundle's heads.
//
// They are made a unit at a time, by a block of threads: 64 centroids of each of eight subspaces, of which two warps have one each,
// or 64 clusters. Each warp leaves the bounds of its entries as well.
#pragma once

#include "common.cuh"

template <int HEADS>
struct alignas(4 * HEADS) Entry {
  float x[HEADS];
};

// The most sequences of a launch, whose parameters must fit 4 KB.
constexpr u32 MAX_SEQUENCES = 16;

constexpr u32 MAX_CLUSTERS = 256;
constexpr u32 MAX_HEADS = 4;  // of a bundle

// Subspaces whose entries for a code lie side by side.
constexpr u32 SUBSPACES = 8;

constexpr u32 UNIT_THREADS = 512;
constexpr u32 UNIT_WARPS = UNIT_THREADS / 32;
constexpr u32 OF_UNIT = 64;
constexpr u32 WARPS_OF_SUBSPACE = UNIT_WARPS / SUBSPACES;

// Where what is below is asked of a step, `p` has its sizes: pq_dim, n_centroids, n_clusters.

// Entries of a bundle: pq_dim / SUBSPACES times [n_centroids, SUBSPACES], then the clusters'.
template <class P>
__device__ inline u32 table_entries(const P& p) { return p.pq_dim * p.n_centroids + p.n_clusters; }

// Units of SUBSPACES subspaces, and of a bundle.
template <class P>
__device__ inline u32 units_of_codes(const P& p) { return (p.n_centroids + OF_UNIT - 1) / OF_UNIT; }
template <class P>
__device__ inline u32 table_units(const P& p) {
  return p.pq_dim / SUBSPACES * units_of_codes(p) + (p.n_clusters + OF_UNIT - 1) / OF_UNIT;
}

// Floats of a unit's bounds: of the entries and of their negatives, [2, HEADS, UNIT_WARPS].
template <u32 HEADS>
constexpr u32 UNIT_BOUNDS = 2 * HEADS * UNIT_WARPS;
