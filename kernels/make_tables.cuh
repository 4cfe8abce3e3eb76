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

// Floats of shared memory that a unit needs: the queries, and then the warps' bounds.
constexpr u32 MAX_ROW = 256 + 256 / 8 * 4;  // of a query, whose subspaces of eight and more elements lie four apart
constexpr u32 UNIT_WARPS = UNIT_THREADS / 32;
constexpr u32 UNIT_FLOATS = MAX_HEADS * MAX_ROW;
static_assert(UNIT_BOUNDS<MAX_HEADS> * (UNIT_WARPS + 1) <= UNIT_FLOATS);

// A unit of a bundle's tables, of which each thread has an entry, or an eighth of a cluster's: begin() has all on its way that
// it reads, finish() makes the entries.
template <class T>
struct TableUnit {
  static constexpr u32 AHEAD = 4, QUERIES = MAX_HEADS * 256 / UNIT_THREADS;

  u32 bundle;       // of all sequences'
  u32 unit;         // of the bundle
  bool is_cluster;  // whether it is one of clusters
  bool is_there;    // whether the thread has an entry
  u32 entry;        // where that is in the tables
  const float* centroid;
  u32 first;   // element of the query that is multiplied with the first of these, and of a row of queries in shared memory
  u32 step;    // floats from four of them to the next
  u32 count;   // fours
  float4 ahead[AHEAD];
  float query[QUERIES];

  // The `i`-th of all.
  template <class P>
  __device__ void begin(u32 i, const P& p) {
    const u32 units = table_units(p), chunks = p.pq_dim / SUBSPACES, of_codes = units_of_codes(p);
    bundle = i / units, unit = i - bundle * units;
    const u32 row = bundle / p.bundles, sequence = row / p.h_kv, kv = row - sequence * p.h_kv;
    const Source& source = p.sources[sequence];
    is_cluster = unit >= chunks * of_codes;
    const u32 column = threadIdx.x % SUBSPACES;
    if (is_cluster) {
      const u32 c = (unit - chunks * of_codes) * OF_UNIT + threadIdx.x / SUBSPACES;
      is_there = c < p.n_clusters;
      entry = p.pq_dim * p.n_centroids + c;
      centroid = source.coarse + (static_cast<u64>(kv) * p.n_clusters + c) * p.head_dim + column * 4;
      first = column * 4, step = SUBSPACES * 4, count = (p.head_dim - min(first, p.head_dim) + step - 1) / step;
    } else {
      const u32 chunk = unit / of_codes, m = chunk * SUBSPACES + column;
      const u32 c = (unit - chunk * of_codes) * OF_UNIT + threadIdx.x / SUBSPACES;
      is_there = c < p.n_centroids;
      entry = (chunk * p.n_centroids + c) * SUBSPACES + column;
      centroid = source.centroids + ((static_cast<u64>(kv) * p.pq_dim + m) * p.n_centroids + c) * p.pq_len;
      // Eight lanes that read four elements of a subspace each meet in no bank.
      first = m * (p.pq_len | 4), step = 4, count = p.pq_len / 4;
    }
    if (!is_there) count = 0;
    load(0);
    const u32 first_head = kv * p.group + (bundle - row * p.bundles) * p.heads;
    const u32 heads = min(p.heads, (kv + 1) * p.group - first_head);
    const T* const queries = static_cast<const T*>(source.query) + first_head * source.query_stride;
#pragma unroll
    for (u32 k = 0; k < QUERIES; k++) {
      const u32 e = k * UNIT_THREADS + threadIdx.x, head = e / p.head_dim;
      query[k] = head < heads ? widen(queries[head * source.query_stride + (e - head * p.head_dim)]) : 0;
    }
  }

  // Four times four elements, from the `begin`-th four on.
  __device__ void load(u32 begin) {
#pragma unroll
    for (u32 k = 0; k < AHEAD; k++) {
      ahead[k] = begin + k < count ? __ldg(reinterpret_cast<const float4*>(centroid + (begin + k) * step)) : float4{};
    }
  }

  // `scratch` is UNIT_FLOATS of shared memory. All threads call it.
  template <int HEADS, class P>
  __device__ void finish(float* scratch, float* tables, float* bounds, const P& p) {
    const u32 gap = is_cluster ? 0 : (p.pq_len | 4) - p.pq_len, length = p.head_dim + p.pq_dim * gap;
    __syncthreads();  // what was there before has been read
#pragma unroll
    for (u32 k = 0; k < QUERIES; k++) {
      const u32 i = k * UNIT_THREADS + threadIdx.x, head = i / p.head_dim, e = i - head * p.head_dim;
      if (head < HEADS) scratch[head * length + e + (gap ? e / p.pq_len * gap : 0)] = query[k];
    }
    __syncthreads();
    Entry<HEADS> x = {};
    for (u32 begin = 0; begin < count; begin += AHEAD) {
      if (begin > 0) load(begin);
#pragma unroll
      for (u32 k = 0; k < AHEAD; k++) {
        if (begin + k >= count) continue;
#pragma unroll
        for (int h = 0; h < HEADS; h++) {
          const float4 a = ahead[k], b = *reinterpret_cast<const float4*>(&scratch[h * length + first + (begin + k) * step]);
          x.x[h] += a.x * b.x + a.y * b.y + a.z * b.z + a.w * b.w;
        }
      }
    }
    if (is_cluster) {
#pragma unroll
      for (int h = 0; h < HEADS; h++) {
#pragma unroll
        for (u32 lanes = SUBSPACES / 2; lanes > 0; lanes /= 2) x.x[h] += __shfl_xor_sync(ALL_LANES, x.x[h], lanes);
      }
    }
    const bool writes = is_there && (!is_cluster || threadIdx.x % SUBSPACES == 0);
    if (writes) reinterpret_cast<Entry<HEADS>*>(tables)[static_cast<u64>(bundle) * table_entries(p) + entry] = x;
    // The largest of a column's entries and of their negatives.
    const u32 lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    float largest[2 * HEADS];
#pragma unroll
    for (u32 i = 0; i < 2 * HEADS; i++) {
      const float own = i < HEADS ? x.x[i % HEADS] : -x.x[i % HEADS];
      largest[i] = is_there ? own : -INFINITY;
#pragma unroll
      for (u32 lanes = SUBSPACES; lanes < 32; lanes *= 2) {
        largest[i] = fmaxf(largest[i], __shfl_xor_sync(ALL_LANES, largest[i], lanes));
      }
    }
    __syncthreads();  // the queries have been read
    if (lane < SUBSPACES) {
#pragma unroll
      for (u32 i = 0; i < 2 * HEADS; i++) scratch[(i * SUBSPACES + lane) * (UNIT_WARPS + 1) + warp] = largest[i];
    }
    __syncthreads();
    constexpr u32 BOUNDS = UNIT_BOUNDS<HEADS>;
    if (threadIdx.x < BOUNDS) {
      float y = -INFINITY;
#pragma unroll
      for (u32 w = 0; w < UNIT_WARPS; w++) y = fmaxf(y, scratch[threadIdx.x * (UNIT_WARPS + 1) + w]);
      bounds[(static_cast<u64>(bundle) * table_units(p) + unit) * BOUNDS + threadIdx.x] = y;
    }
  }

  template <class P>
  __device__ void finish(float* scratch, float* tables, float* bounds, const P& p) {
    switch (p.heads) {
      case 1: return finish<1>(scratch, tables, bounds, p);
      case 2: return finish<2>(scratch, tables, bounds, p);
      default: return finish<4>(scratch, tables, bounds, p);
    }
  }
};
