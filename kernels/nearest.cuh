// The nearest centroid of a sub-vector, for encode.cu and kmeans.cu: the CPU's bits.
//
// Squared distances are summed coordinate by coordinate without fused multiply-add, and ties go to the lower index.
// Two ways through the same sums:
// - `nearest_by_thread`: a thread holds sub-vectors of a length known at compile time in registers and meets the
//   centroids in shared memory, all threads of a block the same one at a time.
// - `nearest_by_warp`: a warp's lanes share the centroids of one sub-vector of any length. For other lengths, and for
//   the few keys of a decode step, where a thread's walk through all centroids would be all the time there is.
#pragma once

#include "common.cuh"

// Sub-vectors of one (batch, KV head, subspace).
template <class T>
struct SubVectors {
  const T* first;  // [n, len], `stride` elements apart
  u64 stride;
  u64 n;
  u64 count;  // sub-vector i is that of key i * n / count
  u32 len;
  bool augmented;
  float phi;
  // What to multiply each coordinate by; null for nothing.
  const float* weights = nullptr;
  // The cluster of each key, and what to subtract from its sub-vector; null for nothing.
  const u8* clusters = nullptr;
  u64 cluster_stride;
  const float* coarse = nullptr;
  u64 coarse_stride;

  __device__ u64 position(u64 i) const { return count == n ? i : i * n / count; }

  __device__ const T* operator[](u64 i) const { return first + position(i) * stride; }

  // What to subtract from sub-vector `i`.
  __device__ const float* base(u64 i) const {
    return coarse ? coarse + clusters[position(i) * cluster_stride] * coarse_stride : nullptr;
  }

  // Coordinate `j` of `x`, minus that of `base` where that is not null.
  __device__ float value(const T* x, const float* base, u32 j) const {
    const float weighted = weights ? __fmul_rn(widen(x[j]), weights[j]) : widen(x[j]);
    return base ? __fsub_rn(weighted, base[j]) : weighted;
  }

  __device__ float norm(const T* x) const {
    float sum = 0;
    for (u32 j = 0; j < len; j++) sum = add_square(sum, widen(x[j]));
    return sum;
  }

  // The coordinate that the inner-product metric adds.
  __device__ float augmentation(float norm) const { return __fsqrt_rn(fmaxf(phi - norm, 0.0f)); }

  // Coordinate `j` of sub-vector `i`, the augmentation being the last one.
  __device__ float coordinate(u64 i, u32 j) const {
    const T* x = (*this)[i];
    if (j >= len) return augmentation(norm(x));
    return value(x, base(i), j);
  }

  __device__ u32 columns() const { return len + augmented; }
};

// Centroids of one (batch, KV head, subspace).
struct Centroids {
  const float* data;  // [count, columns]
  u64 row_stride;
  u64 column_stride;
  u32 count;

  __device__ float at(u32 c, u32 j) const { return data[c * row_stride + j * column_stride]; }
};

constexpr int NEAREST_THREADS = 128;

// Floats of shared memory in which centroids pass by.
constexpr int NEAREST_SHARED = 8192;

// Sub-vectors a thread compares at a time: two hide the latency of the sums, where registers allow.
template <int LEN>
constexpr int NEAREST_EACH = LEN <= 16 ? 2 : 1;

// Sub-vectors a block of `nearest_by_thread` covers.
template <int LEN>
constexpr int NEAREST_TILE = NEAREST_THREADS * NEAREST_EACH<LEN>;

// Calls `write(i, code)` for the block's sub-vectors, those from `block * NEAREST_TILE` on; `LEN` is their length.
template <int LEN, class T, class Write>
__device__ void nearest_by_thread(const SubVectors<T>& vectors, const Centroids& centroids, u64 block, Write write) {
  constexpr int EACH = NEAREST_EACH<LEN>;
  constexpr int STRIDE = LEN + 4;  // room for the augmentation; rows stay aligned to 16 bytes
  constexpr int ROWS = NEAREST_SHARED / STRIDE;
  __shared__ alignas(16) float table[ROWS * STRIDE];

  float x[EACH][LEN], augmentation[EACH], best[EACH];
  u32 index[EACH];
#pragma unroll
  for (int e = 0; e < EACH; e++) {
    const u64 i = block * NEAREST_TILE<LEN> + e * NEAREST_THREADS + threadIdx.x;
    const T* from = vectors[min(i, vectors.count - 1)];
    const float* base = vectors.base(min(i, vectors.count - 1));
    float norm = 0;
#pragma unroll
    for (int j = 0; j < LEN; j++) {
      x[e][j] = vectors.value(from, base, j);
      norm = add_square(norm, x[e][j]);
    }
    augmentation[e] = vectors.augmentation(norm);
    best[e] = INFINITY;
    index[e] = 0;
  }

  for (u32 first = 0; first < centroids.count; first += ROWS) {
    const u32 rows = min(static_cast<u32>(ROWS), centroids.count - first);
    __syncthreads();
    for (u32 i = threadIdx.x; i < rows * vectors.columns(); i += NEAREST_THREADS) {
      const u32 c = i / vectors.columns(), j = i % vectors.columns();
      table[c * STRIDE + j] = centroids.at(first + c, j);
    }
    __syncthreads();
    for (u32 c = 0; c < rows; c++) {
      const float* y = table + c * STRIDE;
#pragma unroll
      for (int e = 0; e < EACH; e++) {
        float distance = 0;
#pragma unroll
        for (int j = 0; j < LEN; j++) distance = add_square(distance, x[e][j] - y[j]);
        if (vectors.augmented) distance = add_square(distance, augmentation[e] - y[LEN]);
        if (distance < best[e]) {
          best[e] = distance;
          index[e] = first + c;
        }
      }
    }
  }
#pragma unroll
  for (int e = 0; e < EACH; e++) {
    const u64 i = block * NEAREST_TILE<LEN> + e * NEAREST_THREADS + threadIdx.x;
    if (i < vectors.count) write(i, static_cast<u8>(index[e]));
  }
}

// A centroid and how far it is; UINT32_MAX for none.
struct Nearest {
  float distance;
  u32 index;

  // No centroid is nearest to NaN: 0.
  __device__ u8 code() const { return index == UINT32_MAX ? 0 : static_cast<u8>(index); }
};

// Of two that are equally far the one of the lower index.
__device__ inline Nearest nearer(Nearest a, Nearest b) {
  return b.distance < a.distance || (b.distance == a.distance && b.index < a.index) ? b : a;
}

// That of a warp, to all lanes. Distances are sums of squares, whose bits are in the order of their values.
__device__ inline Nearest nearest_of_lanes(Nearest own) {
  const u32 bits = __float_as_uint(own.distance), least = __reduce_min_sync(ALL_LANES, bits);
  return {__uint_as_float(least), __reduce_min_sync(ALL_LANES, bits == least ? own.index : UINT32_MAX)};
}

constexpr int MAX_COLUMNS = 257;

// As `nearest_by_thread`, for any length; a block covers one sub-vector a warp.
template <class T, class Write>
__device__ void nearest_by_warp(const SubVectors<T>& vectors, const Centroids& centroids, u64 block, Write write) {
  constexpr int WARPS = NEAREST_THREADS / 32;
  __shared__ float coordinates[WARPS][MAX_COLUMNS];
  const u32 warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const u64 i = block * WARPS + warp;
  if (i >= vectors.count) return;

  float* x = coordinates[warp];
  for (u32 j = lane; j < vectors.columns(); j += 32) x[j] = vectors.coordinate(i, j);
  __syncwarp();

  float best = INFINITY;
  u32 index = UINT32_MAX;
  for (u32 c = lane; c < centroids.count; c += 32) {
    float distance = 0;
#pragma unroll 16
    for (u32 j = 0; j < vectors.columns(); j++) distance = add_square(distance, x[j] - centroids.at(c, j));
    if (distance < best) {
      best = distance;
      index = c;
    }
  }
  const u8 code = nearest_of_lanes({best, index}).code();
  if (lane == 0) write(i, code);
}

// Either way: by warp where LEN is 0.
template <int LEN, class T, class Write>
__device__ void nearest(const SubVectors<T>& vectors, const Centroids& centroids, u64 block, Write write) {
  if constexpr (LEN == 0) {
    nearest_by_warp(vectors, centroids, block, write);
  } else {
    nearest_by_thread<LEN>(vectors, centroids, block, write);
  }
}

// Instantiates X(suffix, type, LEN) for every element type and length; `len0` is the one for any length.
#define FOR_EACH_LENGTH(X, suffix, type) \
  X(suffix, type, 0) X(suffix, type, 2) X(suffix, type, 4) X(suffix, type, 8) X(suffix, type, 16) X(suffix, type, 32) \
  X(suffix, type, 64) X(suffix, type, 80) X(suffix, type, 96) X(suffix, type, 128)
