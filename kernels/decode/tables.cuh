// Tables of a step: query . centroid, an entry for each centroid and cluster.
#pragma once

#include "layout.cuh"

template <u32 X>
struct Constant {
  static constexpr u32 value = X;
};

// Subspaces of a row of the tables in shared memory, which is as long as all banks: 32 / HEADS entries.
constexpr u32 SUBSPACES = 8;
constexpr u32 ROW_BYTES = 128;

// Entries of the tables of a bundle: pq_dim / SUBSPACES times [n_centroids, SUBSPACES], then the clusters'.
__device__ inline u32 table_entries(const Decode& p) { return p.pq_dim * p.n_centroids + p.n_clusters; }

// Lanes that share an entry of a cluster, which is as long as a key.
constexpr u32 ENTRY_LANES = 8;

// The products of each head's query, `queries`, with every LANES-th four elements of a centroid.
template <int HEADS, u32 LANES>
__device__ inline Entry<HEADS> product_of(const float* centroid, const float* queries, u32 lane, u32 len, u32 head_dim) {
  Entry<HEADS> entry = {};
#pragma unroll 4
  for (u32 j = lane * 4; j < len; j += LANES * 4) {
    const float4 x = __ldg(reinterpret_cast<const float4*>(centroid + j));
#pragma unroll
    for (int h = 0; h < HEADS; h++) {
      const float4 y = *reinterpret_cast<const float4*>(&queries[h * head_dim + j]);
      entry.x[h] += x.x * y.x + x.y * y.y + x.z * y.z + x.w * y.w;
    }
  }
  return entry;
}

// This block's share of the tables of a bundle: of the subspaces' entries a thread each, of the clusters' eight lanes each,
// from the last thread on, since there are mostly threads for both at once.
template <int HEADS, class T>
__device__ void make_tables(Entry<HEADS>* out, float* queries, const Part& part, u32 bundle, const Decode& p) {
  const Sequence& sequence = p.sequences[part.sequence];
  const T* const query = static_cast<const T*>(sequence.query);
  const u32 first_head = part.kv * p.group + bundle * HEADS, heads = min(HEADS, p.group - bundle * HEADS);
  __syncthreads();  // the queries of the bundle before have been read
  for (u32 e = threadIdx.x; e < p.head_dim; e += THREADS) {
#pragma unroll
    for (u32 h = 0; h < HEADS; h++) {
      queries[h * p.head_dim + e] = h < heads ? widen(query[(first_head + h) * sequence.query_stride + e]) : 0;
    }
  }
  __syncthreads();
  const u32 of_subspaces = p.pq_dim * p.n_centroids, bits = __ffs(static_cast<int>(p.n_centroids)) - 1;  // a power of two
  const u32 own = (of_subspaces + part.splits - 1) / part.splits, begin = part.split * own, end = min(begin + own, of_subspaces);
  for (u32 i = begin + threadIdx.x; i < end; i += THREADS) {
    const u32 m = i >> bits, c = i & (p.n_centroids - 1);
    const float* const centroid = sequence.centroids + (static_cast<u64>(part.kv) * of_subspaces + i) * p.pq_len;
    out[(m / SUBSPACES * p.n_centroids + c) * SUBSPACES + m % SUBSPACES] =
        product_of<HEADS, 1>(centroid, queries + m * p.pq_len, 0, p.pq_len, p.head_dim);
  }
  const u32 own_clusters = (p.n_clusters + part.splits - 1) / part.splits, first = part.split * own_clusters;
  const u32 last = min(first + own_clusters, p.n_clusters), thread = THREADS - 1 - threadIdx.x, lane = thread % ENTRY_LANES;
  for (u32 i = thread / 32 * 4; i < own_clusters; i += THREADS / ENTRY_LANES) {  // whole warps take part
    const u32 c = first + i + thread % 32 / ENTRY_LANES;
    Entry<HEADS> entry = {};
    if (c < last) {
      const float* const centroid = sequence.coarse + (static_cast<u64>(part.kv) * p.n_clusters + c) * p.head_dim;
      entry = product_of<HEADS, ENTRY_LANES>(centroid, queries, lane, p.head_dim, p.head_dim);
    }
#pragma unroll
    for (int h = 0; h < HEADS; h++) {
#pragma unroll
      for (u32 lanes = ENTRY_LANES / 2; lanes > 0; lanes /= 2) {
        entry.x[h] += __shfl_xor_sync(ALL_LANES, entry.x[h], lanes);
      }
    }
    if (lane == 0 && c < last) out[of_subspaces + c] = entry;
  }
}

// Copies a bundle's tables to shared memory, each entry rounded to a multiple of what is 2^-23 of a power of two above the
// largest magnitude that a sum of entries may have: sums of those are exact, and so the same in any order.
//
// Each lane starts its key's sum at another subspace, so that of the lanes that are served at a time no two meet in a
// bank; where a row has more slots than subspaces, the subspaces are there several times, and so are the clusters.
// With HAS_RANGE `low` and `high` are bounds of a head's sums.
template <int HEADS, bool HAS_RANGE>
__device__ void load_tables(const Entry<HEADS>* from, u8* rows, float (&low)[HEADS], float (&high)[HEADS],
                            const Decode& p) {
  constexpr u32 SLOTS = ROW_BYTES / sizeof(Entry<HEADS>);
  constexpr u32 COLUMNS = 2 * SUBSPACES;  // of bounds: subspaces, and the clusters
  constexpr u32 SUMMING_LANES = HEADS * COLUMNS < 32 ? (1u << HEADS * COLUMNS % 32) - 1 : ALL_LANES;
  // The largest of the entries and of their negatives, or of both.
  constexpr u32 SIDES = HAS_RANGE ? 2 : 1;
  struct Bounds {
    Entry<HEADS> of[SIDES];

    __device__ Bounds() {
#pragma unroll
      for (u32 side = 0; side < SIDES; side++) {
#pragma unroll
        for (int h = 0; h < HEADS; h++) of[side].x[h] = HAS_RANGE ? -INFINITY : 0;
      }
    }
    __device__ void add(const Entry<HEADS>& entry) {
#pragma unroll
      for (u32 side = 0; side < SIDES; side++) {
#pragma unroll
        for (int h = 0; h < HEADS; h++) {
          const float x = entry.x[h];
          of[side].x[h] = fmaxf(of[side].x[h], !HAS_RANGE ? fabsf(x) : side == 0 ? x : -x);
        }
      }
    }
  };
  __shared__ float of_warps[SIDES][HEADS][SUBSPACES + 1][WARPS + 1];
  __shared__ float bounds[SIDES + 1][HEADS];  // of a sum of entries on each side, and of its magnitude
  const u32 lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const u32 of_subspaces = p.pq_dim * p.n_centroids, rows_of_codes = p.pq_dim / SUBSPACES * p.n_centroids;
  Entry<HEADS>* const to = reinterpret_cast<Entry<HEADS>*>(rows);
  // Tables have been written by other blocks: past the first-level cache.
  const auto load = [&](u32 i) {
    Entry<HEADS> entry;
    if constexpr (HEADS == 4) {
      const float4 x = __ldcg(reinterpret_cast<const float4*>(&from[i]));
      entry.x[0] = x.x, entry.x[1] = x.y, entry.x[2] = x.z, entry.x[3] = x.w;
    } else {
#pragma unroll
      for (int h = 0; h < HEADS; h++) entry.x[h] = __ldcg(&from[i].x[h]);
    }
    return entry;
  };
  // A thread's bounds, of which those of lanes STEP apart are of one table, into those of its warp.
  const auto leave_bounds = [&](auto step, const Bounds& own, u32 column) {
    constexpr u32 STEP = decltype(step)::value;
#pragma unroll
    for (u32 side = 0; side < SIDES; side++) {
#pragma unroll
      for (int h = 0; h < HEADS; h++) {
        float x = own.of[side].x[h];
#pragma unroll
        for (u32 lanes = 16; lanes >= STEP; lanes /= 2) x = fmaxf(x, __shfl_xor_sync(ALL_LANES, x, lanes));
        if (lane < STEP) of_warps[side][h][column + lane][warp] = x;
      }
    }
  };
  __syncthreads();  // the tables of the bundle before have been read
  const bool has_cluster = threadIdx.x < p.n_clusters;
  Entry<HEADS> of_cluster = {};
  if (has_cluster) of_cluster = load(of_subspaces + threadIdx.x);
  const u32 of_chunk = SUBSPACES * p.n_centroids, head = threadIdx.x / COLUMNS, column = threadIdx.x % COLUMNS;
  float sums[SIDES + 1] = {};  // of a table and a head, in the first threads
  for (u32 first = 0; first < of_subspaces; first += of_chunk) {
    Bounds own;
#pragma unroll 4
    for (u32 i = first + threadIdx.x; i < first + of_chunk; i += THREADS) {
      const Entry<HEADS> entry = load(i);
      own.add(entry);
#pragma unroll
      for (u32 copy = 0; copy < SLOTS; copy += SUBSPACES) to[i / SUBSPACES * SLOTS + copy + i % SUBSPACES] = entry;
    }
    leave_bounds(Constant<SUBSPACES>(), own, 0);
    if (first == 0 && p.n_clusters) {
      Bounds of_clusters;
      if (has_cluster) of_clusters.add(of_cluster);
      leave_bounds(Constant<1>(), of_clusters, SUBSPACES);
#pragma unroll
      for (u32 copy = 0; copy < SLOTS; copy++) {
        if (has_cluster) to[(rows_of_codes + threadIdx.x) * SLOTS + (copy + lane) % SLOTS] = of_cluster;
      }
    }
    __syncthreads();
    if (head < HEADS && (column < SUBSPACES || (column == SUBSPACES && first == 0 && p.n_clusters))) {
      float magnitude = 0;
#pragma unroll
      for (u32 side = 0; side < SIDES; side++) {
        float x = -INFINITY;
#pragma unroll
        for (u32 w = 0; w < WARPS; w++) x = fmaxf(x, of_warps[side][head][column][w]);
        sums[side] += x;
        magnitude = fmaxf(magnitude, x);
      }
      sums[SIDES] += magnitude;
    }
    __syncthreads();
  }
  if (threadIdx.x < HEADS * COLUMNS) {
#pragma unroll
    for (u32 i = 0; i <= SIDES; i++) {
#pragma unroll
      for (int lanes = COLUMNS / 2; lanes > 0; lanes /= 2) sums[i] += __shfl_xor_sync(SUMMING_LANES, sums[i], lanes);
      if (column == 0) bounds[i][head] = sums[i];
    }
  }
  __syncthreads();
  float far[HEADS];
#pragma unroll
  for (int h = 0; h < HEADS; h++) {
    if constexpr (HAS_RANGE) {
      high[h] = fminf(fmaxf(bounds[0][h], -1e38f), 1e38f);
      low[h] = fminf(fmaxf(-bounds[1][h], -1e38f), 1e38f);
    }
    // Adding and taking away 1.5 * 2^23 units rounds to a unit.
    const int exponent = static_cast<int>(__float_as_uint(bounds[SIDES][h]) >> 23) - 126 - 23;
    far[h] = __uint_as_float(static_cast<u32>(min(max(exponent, -100), 100) + 127) << 23) * 0x1.8p23f;
  }
  for (u32 i = threadIdx.x; i < (rows_of_codes + p.n_clusters) * SLOTS; i += THREADS) {
    Entry<HEADS> entry = to[i];
#pragma unroll
    for (int h = 0; h < HEADS; h++) entry.x[h] = __fsub_rn(__fadd_rn(entry.x[h], far[h]), far[h]);
    to[i] = entry;
  }
  __syncthreads();
}
