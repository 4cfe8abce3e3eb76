// What a decode step adds to an index: the codes of the block of keys that the step filled, and its values' share of the
// clusters' sums; the bits of encode.cu and cluster_sums.cu, in one launch that mostly finds nothing due.
#include <cuda_pipeline.h>

#include "nearest.cuh"

constexpr u32 MAX_SEQUENCES = 16;  // of a launch

// What there is of a position lies without gaps, from position 0 on; strides are between heads.
struct Sequence {
  const void* keys;        // [h_kv, capacity, head_dim]
  const void* values;      // as the keys
  u8* codes;               // [h_kv, capacity, pq_dim]
  u8* clusters;            // [h_kv, capacity], or null
  const float* centroids;  // [h_kv, pq_dim, n_centroids, pq_len, or one more with phi]
  const float* phi;        // [h_kv, pq_dim], or null
  const float* weights;    // [h_kv, head_dim], or null
  const float* coarse;     // [h_kv, n_clusters, head_dim], or null
  float* sums;             // [h_kv, n_clusters, head_dim], or null
  u32* counts;             // [h_kv, n_clusters], or null
  const u32* len;
  u32* arrived;  // [h_kv], blocks of threads that are done
  u64 key_stride;
  u64 codes_stride;
  u64 clusters_stride;
  u64 capacity;
};

struct IndexBlock {
  Sequence sequences[MAX_SEQUENCES];
  u64 init_offset;
  u64 block;  // keys
  u32 head_dim;
  u32 pq_dim;
  u32 pq_len;
  u32 n_centroids;
  u32 n_clusters;
};

constexpr u32 THREADS = 256;
constexpr u32 KEYS = THREADS / 32;  // a warp each

// The longest row of a key in shared memory, and centroids there, of which those that come next are on their way.
constexpr u32 LONGEST = 257;
constexpr u32 TILE = 256 * 17;

// Lanes that read a column of rows as long as this meet in no bank.
__device__ inline u32 stride_of(u32 columns) { return columns | 1; }

// The centroids nearest to a block's sub-vectors in each of some tables, [tables, count, columns]; the same bits as
// nearest_by_warp in nearest.cuh. `x`, [KEYS, stride_of(...)], has the sub-vectors of each table side by side, `len` elements
// each; `last(key, table)` is what comes behind these where there are more columns. Calls `write(key, table, index)`.
template <class Last, class Write>
__device__ void find_nearest(const float* x, u32 x_stride, u32 len, const float* centroids, u32 tables, u32 count, u32 columns,
                             float (&tiles)[2][TILE], Last last, Write write) {
  const u32 warp = threadIdx.x / 32, lane = threadIdx.x % 32, stride = stride_of(columns);
  const u32 rows = min(count, TILE / stride >= 32 ? TILE / stride / 32 * 32 : TILE / stride);
  const u32 tiles_of_table = (count + rows - 1) / rows, rows_on = THREADS / columns, columns_on = THREADS % columns;
  const auto load = [&](u32 i) {
    const u32 first = i / tiles_of_table * count + i % tiles_of_table * rows, n = min(rows, count - i % tiles_of_table * rows);
    if (i < tables * tiles_of_table) {
      u32 row = threadIdx.x / columns, column = threadIdx.x % columns;
      for (u32 j = threadIdx.x; j < n * columns; j += THREADS) {
        __pipeline_memcpy_async(&tiles[i % 2][row * stride + column], &centroids[first * columns + j], sizeof(float));
        row += rows_on, column += columns_on;
        if (column >= columns) row++, column -= columns;
      }
    }
    __pipeline_commit();
  };
  float best = INFINITY;
  u32 index = UINT32_MAX;
  load(0);
  for (u32 i = 0; i < tables * tiles_of_table; i++) {
    const u32 table = i / tiles_of_table, tile = i % tiles_of_table, n = min(rows, count - tile * rows);
    load(i + 1);
    __pipeline_wait_prior(1);
    __syncthreads();
    const float* const own = x + warp * x_stride + table * len;
    const float behind = columns > len ? last(warp, table) : 0;
    for (u32 c = lane; c < n; c += 32) {
      const float* const centroid = &tiles[i % 2][c * stride];
      float distance = 0;
#pragma unroll 16
      for (u32 j = 0; j < len; j++) distance = add_square(distance, own[j] - centroid[j]);
      if (columns > len) distance = add_square(distance, behind - centroid[len]);
      if (distance < best) best = distance, index = tile * rows + c;
    }
    if (tile + 1 == tiles_of_table) {
      const u32 nearest = nearest_of_lanes(best, index);
      if (lane == 0) write(warp, table, static_cast<u8>(nearest));
      best = INFINITY, index = UINT32_MAX;
    }
    __syncthreads();  // the tile has been read
  }
}

// Adds a row's values to the sums of their clusters, an element a thread, one after the other as they lie.
template <class T>
__device__ void add_values(const T* values, const u8* clusters, float* sums, u32* counts, const IndexBlock& p) {
  // Loaded at a time, where one may be of the cluster of another before it.
  constexpr u32 BATCH = 8;
  for (u64 t = threadIdx.x; t < p.block; t += THREADS) atomicAdd(&counts[__ldcg(&clusters[t])], 1);
  for (u32 e = threadIdx.x; e < p.head_dim; e += THREADS) {
    for (u64 first = 0; first < p.block; first += BATCH) {
      u32 cluster[BATCH];
      float sum[BATCH], value[BATCH];
#pragma unroll
      for (u32 i = 0; i < BATCH; i++) {
        const u64 t = min(first + i, p.block - 1);
        cluster[i] = first + i < p.block ? __ldcg(&clusters[t]) : UINT32_MAX;
        value[i] = widen(values[t * p.head_dim + e]);
      }
#pragma unroll
      for (u32 i = 0; i < BATCH; i++) sum[i] = cluster[i] == UINT32_MAX ? 0 : sums[cluster[i] * p.head_dim + e];
#pragma unroll
      for (u32 i = 0; i < BATCH; i++) {
#pragma unroll
        for (u32 j = 0; j < i; j++) sum[i] = cluster[j] == cluster[i] ? sum[j] : sum[i];
        sum[i] += value[i];
      }
#pragma unroll
      for (u32 i = 0; i < BATCH; i++) {
        if (cluster[i] != UINT32_MAX) sums[cluster[i] * p.head_dim + e] = sum[i];
      }
    }
  }
}

// The last `block` keys of a sequence are due where they are full: blocks of keys follow each other from init_offset on. Of
// each key first its cluster, then its codes. The last block of threads of a row adds up the values.
// Grid: (any number of blocks, which share the keys; h_kv; sequences).
template <class T>
__device__ void index_block(const IndexBlock& p) {
  const Sequence& own = p.sequences[blockIdx.z];
  const u32 h = blockIdx.y;
  const u64 length = min(static_cast<u64>(*own.len), own.capacity);
  if (length <= p.init_offset || (length - p.init_offset) % p.block != 0) return;
  const u64 begin = length - p.block;
  const T* const keys = static_cast<const T*>(own.keys) + h * own.key_stride + begin * p.head_dim;
  const float* const weights = own.weights + h * p.head_dim;
  const u32 first_cluster = h * p.n_clusters, first_table = h * p.pq_dim;
  const float* const coarse = own.coarse + static_cast<u64>(first_cluster) * p.head_dim;
  const u32 columns = p.pq_len + (own.phi ? 1 : 0), stride = stride_of(p.head_dim);
  const float* const centroids = own.centroids + static_cast<u64>(first_table) * p.n_centroids * columns;
  u8* const codes = own.codes + h * own.codes_stride + begin * p.pq_dim;
  u8* const clusters = own.clusters + h * own.clusters_stride + begin;
  __shared__ float x[KEYS * LONGEST], tiles[2][TILE];
  __shared__ u8 nearest_clusters[KEYS];
  // The coordinate that the inner-product metric adds to that of a key, which has no weights and no cluster.
  const auto augmentation = [&](u32 key, u32 m) {
    float norm = 0;
    for (u32 j = 0; j < p.pq_len; j++) norm = add_square(norm, x[key * stride + m * p.pq_len + j]);
    return __fsqrt_rn(fmaxf(own.phi[first_table + m] - norm, 0.0f));
  };
  for (u64 first = blockIdx.x * KEYS; first < p.block; first += gridDim.x * KEYS) {
    __syncthreads();  // those of the keys before have been read
#pragma unroll 4
    for (u32 i = threadIdx.x; i < KEYS * p.head_dim; i += THREADS) {
      const u32 key = i / p.head_dim, j = i - key * p.head_dim;
      const float element = widen(keys[min(first + key, p.block - 1) * p.head_dim + j]);
      x[key * stride + j] = own.weights ? __fmul_rn(element, weights[j]) : element;
    }
    __syncthreads();
    if (own.coarse) {
      const auto write = [&](u32 key, u32, u8 cluster) {
        nearest_clusters[key] = cluster;
        if (first + key < p.block) clusters[first + key] = cluster;
      };
      find_nearest(x, stride, p.head_dim, coarse, 1, p.n_clusters, p.head_dim, tiles, augmentation, write);
#pragma unroll 4
      for (u32 i = threadIdx.x; i < KEYS * p.head_dim; i += THREADS) {
        const u32 key = i / p.head_dim, j = i - key * p.head_dim;
        x[key * stride + j] = __fsub_rn(x[key * stride + j], coarse[nearest_clusters[key] * p.head_dim + j]);
      }
      __syncthreads();
    }
    const auto write = [&](u32 key, u32 m, u8 code) {
      if (first + key < p.block) codes[(first + key) * p.pq_dim + m] = code;
    };
    find_nearest(x, stride, p.pq_len, centroids, p.pq_dim, p.n_centroids, columns, tiles, augmentation, write);
  }
  if (!own.sums || !is_last(&own.arrived[h], gridDim.x)) return;
  const T* const values = static_cast<const T*>(own.values) + h * own.key_stride + begin * p.head_dim;
  add_values(values, clusters, own.sums + static_cast<u64>(first_cluster) * p.head_dim, own.counts + first_cluster, p);
}

#define KERNEL(suffix, type)                                                     \
  extern "C" __global__ __launch_bounds__(THREADS, 2) void index_block_##suffix( \
      const __grid_constant__ IndexBlock p) {                                    \
    index_block<type>(p);                                                        \
  }
FOR_EACH_FLOAT(KERNEL)
