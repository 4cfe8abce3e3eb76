// Makes the tables of tables.cuh.
#pragma once

#include "tables.cuh"

// What a sequence's tables are made of.
struct Source {
  const void* query;       // [h, head_dim]
  const float* centroids;  // [h_kv, pq_dim, n_centroids, pq_len]
  const float* coarse;     // [h_kv, n_clusters, head_dim], or null
  u64 query_stride;        // between heads
};

// i / n, exact for i below 2^21: a fraction of a division's instructions.
__device__ inline u32 divide(u32 i, u32 n) {
  return __float2uint_rz(__fdividef(static_cast<float>(i) + 0.5f, static_cast<float>(n)));
}

// A unit of a bundle's tables, of which each warp makes some entries for itself: begin() has on its way what they are made of,
// finish() makes them. Rows, which are the centroids of a subspace or of the clusters, are read by four lanes each, or by all, four
// elements a lane: so lanes read side by side, and a lane's part of the queries serves ROWS of them.
template <class T>
struct TableUnit {
  static constexpr u32 ROWS = 4, OF_SUBSPACE = 4;

  u32 bundle;         // of all sequences'
  u32 unit;           // of the bundle
  u32 entry;          // where the lane's first one is in the tables
  u32 between;        // entries from one to the next
  const float4* row;  // the lane's part of its first one
  u32 row_stride;     // fours from one of its rows to the next
  u32 row_step;       // rows as well
  u32 left;           // rows from the first on
  u32 lanes;          // of a row
  u32 fours;          // of a row, from the lane's part on
  bool is_long;       // a lane has up to two of them, not one
  const T* query;     // of the first head, what is multiplied with the lane's part
  u64 query_stride;
  u32 heads;          // that are there
  float4 ahead[ROWS];
  T queries[MAX_HEADS][4];

  // The `i`-th of all.
  template <class P>
  __device__ void begin(u32 i, const P& p) {
    const u32 units = table_units(p), chunks = p.pq_dim / SUBSPACES, of_codes = units_of_codes(p);
    bundle = divide(i, units), unit = i - bundle * units;
    const u32 of_row = divide(bundle, p.bundles), sequence = divide(of_row, p.h_kv), kv = of_row - sequence * p.h_kv;
    const Source& source = p.sources[sequence];
    const u32 warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    u32 first, all, lane_of_row, step, element;
    if (unit >= chunks * of_codes) {
      first = (unit - chunks * of_codes) * OF_UNIT + warp * ROWS, all = p.n_clusters, step = 1;
      lanes = 32, lane_of_row = lane, fours = p.head_dim / 4, element = 0;
      row = reinterpret_cast<const float4*>(source.coarse) + (kv * p.n_clusters + first) * fours;
      entry = p.pq_dim * p.n_centroids + first, between = 1;
    } else {
      const u32 chunk = divide(unit, of_codes), m = chunk * SUBSPACES + warp / WARPS_OF_SUBSPACE;
      constexpr u32 OF_WARP = OF_UNIT / WARPS_OF_SUBSPACE;
      step = 32 / OF_SUBSPACE;
      first = (unit - chunk * of_codes) * OF_UNIT + warp % WARPS_OF_SUBSPACE * OF_WARP + lane / OF_SUBSPACE, all = p.n_centroids;
      lanes = OF_SUBSPACE, lane_of_row = lane % OF_SUBSPACE, fours = p.pq_len / 4, element = m * p.pq_len;
      row = reinterpret_cast<const float4*>(source.centroids) + ((kv * p.pq_dim + m) * p.n_centroids + first) * u64{fours};
      entry = (chunk * p.n_centroids + first) * SUBSPACES + m % SUBSPACES, between = step * SUBSPACES;
      static_assert(OF_WARP == ROWS * 32 / OF_SUBSPACE);
    }
    left = all - min(first, all), row_step = step;
    row += lane_of_row, row_stride = step * fours;
    is_long = fours > lanes;
    fours -= min(lane_of_row, fours);
    const u32 first_head = kv * p.group + (bundle - of_row * p.bundles) * p.heads;
    heads = min(p.heads, (kv + 1) * p.group - first_head);
    query_stride = source.query_stride;
    query = static_cast<const T*>(source.query) + first_head * query_stride + element + lane_of_row * 4;
    load_queries(0);
    load_rows(0);
  }

  // The lane's fours from the `begin`-th of their rows on.
  __device__ void load_rows(u32 begin) {
#pragma unroll
    for (u32 k = 0; k < ROWS; k++) {
      ahead[k] = begin < fours && k * row_step < left ? __ldg(row + k * row_stride + begin) : float4{};
    }
  }
  __device__ void load_queries(u32 begin) {
#pragma unroll
    for (u32 h = 0; h < MAX_HEADS; h++) {
#pragma unroll
      for (u32 e = 0; e < 4; e++) {
        queries[h][e] = begin < fours && h < heads ? query[h * query_stride + begin * 4 + e] : T{};
      }
    }
  }

  // All lanes of a warp call it.
  template <int HEADS, class P>
  __device__ void finish(float* tables, float* bounds, const P& p) {
    float x[ROWS][HEADS] = {};
    for (u32 begin = 0;;) {
#pragma unroll
      for (u32 k = 0; k < ROWS; k++) {
#pragma unroll
        for (int h = 0; h < HEADS; h++) {
          const float4 a = ahead[k];
          const T(&b)[4] = queries[h];
          x[k][h] += a.x * widen(b[0]) + a.y * widen(b[1]) + a.z * widen(b[2]) + a.w * widen(b[3]);
        }
      }
      begin += lanes;
      if (!is_long || begin >= lanes * 2) break;
      load_queries(begin);
      load_rows(begin);
    }
    // Of four lanes each has a head's sum in the end.
    const u32 lane = threadIdx.x % 32, warp = threadIdx.x / 32, head = lane % HEADS;
    float high = -INFINITY, low = -INFINITY;  // of the entries, and of their negatives
    float* const to = tables + (static_cast<u64>(bundle) * table_entries(p) + entry) * HEADS;
#pragma unroll
    for (u32 k = 0; k < ROWS; k++) {
      float y = x[k][0];
      if constexpr (HEADS == 4) {
        const bool is_odd = lane & 1, is_upper = lane & 2;
        const float a = (is_odd ? x[k][1] : x[k][0]) + __shfl_xor_sync(ALL_LANES, is_odd ? x[k][0] : x[k][1], 1);
        const float b = (is_odd ? x[k][3] : x[k][2]) + __shfl_xor_sync(ALL_LANES, is_odd ? x[k][2] : x[k][3], 1);
        y = (is_upper ? b : a) + __shfl_xor_sync(ALL_LANES, is_upper ? a : b, 2);
      } else if constexpr (HEADS == 2) {
        const bool is_odd = lane & 1;
        y = (is_odd ? x[k][1] : x[k][0]) + __shfl_xor_sync(ALL_LANES, is_odd ? x[k][0] : x[k][1], 1);
        y += __shfl_xor_sync(ALL_LANES, y, 2);
      } else {
        y += __shfl_xor_sync(ALL_LANES, y, 1);
        y += __shfl_xor_sync(ALL_LANES, y, 2);
      }
      if (lanes == 32) {
#pragma unroll
        for (u32 other = OF_SUBSPACE; other < 32; other *= 2) y += __shfl_xor_sync(ALL_LANES, y, other);
      }
      if (k * row_step < left) {
        if (lane % lanes < HEADS) to[k * between * HEADS + head] = y;
        high = fmaxf(high, y), low = fmaxf(low, -y);
      }
    }
#pragma unroll
    for (u32 other = OF_SUBSPACE; other < 32; other *= 2) {
      high = fmaxf(high, __shfl_xor_sync(ALL_LANES, high, other)), low = fmaxf(low, __shfl_xor_sync(ALL_LANES, low, other));
    }
    if (lane < HEADS) {
      float* const of_unit = bounds + (static_cast<u64>(bundle) * table_units(p) + unit) * UNIT_BOUNDS<HEADS>;
      of_unit[head * UNIT_WARPS + warp] = high, of_unit[(HEADS + head) * UNIT_WARPS + warp] = low;
    }
  }

  template <class P>
  __device__ void finish(float* tables, float* bounds, const P& p) {
    switch (p.heads) {
      case 1: return finish<1>(tables, bounds, p);
      case 2: return finish<2>(tables, bounds, p);
      default: return finish<4>(tables, bounds, p);
    }
  }
};
