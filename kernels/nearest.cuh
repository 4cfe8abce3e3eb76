// The nearest centroid of a sub-vector, for encode.cu and kmeans.cu: the CPU's bits.
//
// Squared distances are summed coordinate by coordinate without fused multiply-add, and ties go to the lower index.
// Two ways through the same sums:
// - `nearest_by_thread`: a thread holds sub-vectors of a length known at compile time in registers and meets the
//   centroids in shared memory, all threads of a block the same one at a time.
// - `nearest_by_warp`: a warp's lanes share the centroids of one sub-vector of any length. For other lengths, and for
//   the few keys of a decode step, where a thread's walk through all centroids would be all the time there is.
#pragma once

#include <cuda_pipeline.h>

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

  // Whether rows of so many columns can be read four floats at a time.
  __device__ bool have_fours(u32 columns) const {
    return columns % 4 == 0 && column_stride == 1 && row_stride % 4 == 0 && reinterpret_cast<u64>(data) % sizeof(float4) == 0;
  }
  __device__ float4 four_at(u32 c, u32 j) const { return __ldg(reinterpret_cast<const float4*>(data + c * row_stride + j)); }
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

constexpr int MAX_COLUMNS = 260;  // a multiple of four

// Bytes of shared memory that the launch asked for.
__device__ inline u32 dynamic_shared_bytes() {
  u32 bytes;
  asm("mov.u32 %0, %%dynamic_smem_size;" : "=r"(bytes));
  return bytes;
}

// As `nearest_by_thread`, for any length; a block covers one sub-vector a warp, or `ALL` warps share one.
template <bool ALL, class T, class Write>
__device__ void nearest_by_warp(const SubVectors<T>& vectors, const Centroids& centroids, u64 block, Write write) {
  constexpr u32 WARPS = NEAREST_THREADS / 32, THREADS = ALL ? NEAREST_THREADS : 32;  // of a sub-vector
  __shared__ alignas(16) float coordinates[WARPS][MAX_COLUMNS];
  const u32 warp = threadIdx.x / 32, own = threadIdx.x % THREADS;
  const u64 i = ALL ? block : block * WARPS + warp;
  const u32 columns = vectors.columns();
  if (i >= vectors.count) return;

  const bool have_fours = centroids.have_fours(columns);
  // A block that has one sub-vector reads rows side by side, and waits once for them and for x: where the launch has shared memory
  // for them.
  extern __shared__ __align__(16) float table[];
  const u32 fours = columns / 4, stride = columns | 4;  // threads that read four floats of a row each meet in no bank
  const bool is_staged = ALL && have_fours && centroids.count * stride * sizeof(float) <= dynamic_shared_bytes();
  if (ALL && have_fours && !is_staged && own < centroids.count) {
    // On its way while x is waited for.
    for (u32 j = 0; j < columns; j += 32) prefetch(centroids.data + own * centroids.row_stride + j);
  }
  if (is_staged) {
    const u32 at_once = THREADS / fours, column = own % fours * 4;
    for (u32 c = own / fours; c < centroids.count && own < at_once * fours; c += at_once) {
      __pipeline_memcpy_async(&table[c * stride + column], centroids.data + c * centroids.row_stride + column, sizeof(float4));
    }
    __pipeline_commit();
  }
  float* x = coordinates[ALL ? 0 : warp];
  for (u32 j = own; j < columns; j += THREADS) x[j] = vectors.coordinate(i, j);
  if (is_staged) __pipeline_wait_prior(0);
  ALL ? __syncthreads() : __syncwarp();

  float best = INFINITY;
  u32 index = UINT32_MAX;
  for (u32 c = own; c < centroids.count; c += THREADS) {
    float distance = 0;
    const auto add_fours = [&](auto four_at) {
      // As many loads on their way as a row of 64 has: one key's time is that of waiting for them.
#pragma unroll 16
      for (u32 j = 0; j < columns; j += 4) {
        const float4 a = *reinterpret_cast<const float4*>(x + j), b = four_at(j);
        distance = add_square(distance, a.x - b.x);
        distance = add_square(distance, a.y - b.y);
        distance = add_square(distance, a.z - b.z);
        distance = add_square(distance, a.w - b.w);
      }
    };
    if (is_staged) {
      add_fours([&](u32 j) { return *reinterpret_cast<const float4*>(&table[c * stride + j]); });
    } else if (have_fours) {
      add_fours([&](u32 j) { return centroids.four_at(c, j); });
    } else {
#pragma unroll 8
      for (u32 j = 0; j < columns; j++) distance = add_square(distance, x[j] - centroids.at(c, j));
    }
    if (distance < best) {
      best = distance;
      index = c;
    }
  }
  Nearest nearest = nearest_of_lanes({best, index});
  if constexpr (ALL) {
    __shared__ Nearest of_warps[WARPS];
    if (threadIdx.x % 32 == 0) of_warps[warp] = nearest;
    __syncthreads();
    nearest = of_warps[0];
#pragma unroll
    for (u32 w = 1; w < WARPS; w++) nearest = nearer(nearest, of_warps[w]);
  }
  if (own == 0) write(i, nearest.code());
}

// Any way: by warp where LEN is 0, by all warps of a block where it is negative.
template <int LEN, class T, class Write>
__device__ void nearest(const SubVectors<T>& vectors, const Centroids& centroids, u64 block, Write write) {
  if constexpr (LEN <= 0) {
    nearest_by_warp<(LEN < 0)>(vectors, centroids, block, write);
  } else {
    nearest_by_thread<LEN>(vectors, centroids, block, write);
  }
}

// Instantiates X(suffix, type, LEN) for every element type and length; `len0` is the one for any length.
#define FOR_EACH_LENGTH(X, suffix, type) \
  X(suffix, type, 0) X(suffix, type, 2) X(suffix, type, 4) X(suffix, type, 8) X(suffix, type, 16) X(suffix, type, 32) \
  X(suffix, type, 64) X(suffix, type, 80) X(suffix, type, 96) X(suffix, type, 128)
