// The tables of a step in a block's shared memory.
#pragma once

#include "bins.cuh"

// A row of the tables in shared memory is as long as all banks: 32 / HEADS entries.
constexpr u32 ROW_BYTES = 128;

// Copies a bundle's tables to shared memory, each entry rounded to a multiple of what is 2^-23 of a power of two above the
// largest magnitude that a sum of entries may have: sums of those are exact, and so the same in any order.
//
// Each lane starts its key's sum at another subspace, so that of the lanes that are served at a time no two meet in a
// bank; where a row has more slots than subspaces, the subspaces are there several times, and so are the clusters.
// `bins` are those of the heads' scores, or null.
template <int HEADS>
__device__ void load_tables(const Entry<HEADS>* from, const float* bounds, u8* rows, ScoreBins* bins, const Decode& p) {
  constexpr u32 SLOTS = ROW_BYTES / sizeof(Entry<HEADS>), COPIES = SLOTS / SUBSPACES, AHEAD = 4;
  // Of sums of codes' entries, and of the clusters': the least, the most, the largest magnitude.
  struct Range {
    float low, high, magnitude;
  };
  __shared__ Range ranges[2][HEADS];
  const u32 lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const u32 of_subspaces = p.pq_dim * p.n_centroids, rows_of_codes = p.pq_dim / SUBSPACES * p.n_centroids;
  Entry<HEADS>* const to = reinterpret_cast<Entry<HEADS>*>(rows);
  const auto load = [&](u32 i, bool is_there) {
    Entry<HEADS> entry = {};
    if (!is_there) return entry;
    if constexpr (HEADS == 4) {
      const float4 x = __ldg(reinterpret_cast<const float4*>(&from[i]));
      entry.x[0] = x.x, entry.x[1] = x.y, entry.x[2] = x.z, entry.x[3] = x.w;
    } else {
#pragma unroll
      for (int h = 0; h < HEADS; h++) entry.x[h] = __ldg(&from[i].x[h]);
    }
    return entry;
  };
  // All of the first entries are on their way at once.
  Entry<HEADS> ahead[AHEAD];
  const auto load_ahead = [&](u32 first) {
#pragma unroll
    for (u32 k = 0; k < AHEAD; k++) ahead[k] = load(first + k * THREADS, first + k * THREADS < of_subspaces);
  };
  load_ahead(threadIdx.x);
  const bool has_cluster = threadIdx.x < p.n_clusters;
  const Entry<HEADS> of_cluster = load(of_subspaces + threadIdx.x, has_cluster);
  if (warp < 2 * HEADS) {
    // What one warp left of two units is a lane's: those of a subspace lie side by side.
    constexpr u32 AT_ONCE = 32 / UNIT_WARPS;
    const bool is_of_clusters = warp >= HEADS;
    const u32 units = units_of_codes(p), chunks = p.pq_dim / SUBSPACES, head = warp % HEADS;
    Range range = {};
    for (u32 chunk = is_of_clusters ? chunks : 0; chunk < chunks + (is_of_clusters && p.n_clusters); chunk++) {
      const u32 end = is_of_clusters ? table_units(p) : (chunk + 1) * units;
      float x = -INFINITY, y = -INFINITY;
#pragma unroll
      for (u32 i = 0; i < MAX_CLUSTERS / OF_UNIT; i += AT_ONCE) {
        const u32 unit = chunk * units + i + lane / UNIT_WARPS;
        const float* const of_head = bounds + (unit * 2 * HEADS + head) * UNIT_WARPS + lane % UNIT_WARPS;
        if (unit < end) x = fmaxf(x, __ldg(of_head)), y = fmaxf(y, __ldg(of_head + HEADS * UNIT_WARPS));
      }
#pragma unroll
      for (u32 lanes = 16; lanes > 0; lanes /= 2) {
        if (lanes >= WARPS_OF_SUBSPACE && lanes < UNIT_WARPS && !is_of_clusters) continue;
        x = fmaxf(x, __shfl_xor_sync(ALL_LANES, x, lanes)), y = fmaxf(y, __shfl_xor_sync(ALL_LANES, y, lanes));
      }
      float z = fmaxf(fmaxf(x, y), 0.0f);
      if (!is_of_clusters) {
#pragma unroll
        for (u32 lanes = UNIT_WARPS / 2; lanes >= WARPS_OF_SUBSPACE; lanes /= 2) {
          x += __shfl_xor_sync(ALL_LANES, x, lanes), y += __shfl_xor_sync(ALL_LANES, y, lanes);
          z += __shfl_xor_sync(ALL_LANES, z, lanes);
        }
      }
      range.low -= y, range.high += x, range.magnitude += z;
    }
    if (lane == 0) ranges[is_of_clusters][head] = range;
  }
  __syncthreads();  // and the tables of the bundle before have been read
  float far[HEADS];
#pragma unroll
  for (int h = 0; h < HEADS; h++) {
    // Adding and taking away 1.5 * 2^23 units rounds to a unit.
    const float magnitude = ranges[0][h].magnitude + ranges[1][h].magnitude;
    const int exponent = static_cast<int>(__float_as_uint(magnitude) >> 23) - 126 - 23;
    far[h] = __uint_as_float(static_cast<u32>(min(max(exponent, -100), 100) + 127) << 23) * 0x1.8p23f;
  }
  if (bins && threadIdx.x < HEADS) {
    const Range codes = ranges[0][threadIdx.x], clusters = ranges[1][threadIdx.x];
    const float low = codes.low + clusters.low, high = codes.high + clusters.high;
    bins[threadIdx.x] = ScoreBins(fminf(fmaxf(low, -1e38f), 1e38f), fminf(fmaxf(high, -1e38f), 1e38f));
  }
  const auto rounded = [&](Entry<HEADS> entry) {
#pragma unroll
    for (int h = 0; h < HEADS; h++) entry.x[h] = __fsub_rn(__fadd_rn(entry.x[h], far[h]), far[h]);
    return entry;
  };
  for (u32 first = threadIdx.x; first < of_subspaces; first += AHEAD * THREADS) {
    if (first >= AHEAD * THREADS) load_ahead(first);
#pragma unroll
    for (u32 k = 0; k < AHEAD; k++) {
      const u32 i = first + k * THREADS;
      if (i >= of_subspaces) continue;
      const Entry<HEADS> entry = rounded(ahead[k]);
#pragma unroll
      for (u32 copy = 0; copy < COPIES; copy++) to[i / SUBSPACES * SLOTS + copy * SUBSPACES + i % SUBSPACES] = entry;
    }
  }
  if (has_cluster) {
    const Entry<HEADS> entry = rounded(of_cluster);
#pragma unroll
    for (u32 copy = 0; copy < SLOTS; copy++) to[(rows_of_codes + threadIdx.x) * SLOTS + (copy + lane) % SLOTS] = entry;
  }
  __syncthreads();
}
