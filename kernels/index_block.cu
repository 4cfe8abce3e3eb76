// What a decode step adds to an index: the codes of the block of keys that the step filled, and its values' share of the
// clusters' sums; the bits of encode.cu and cluster_sums.cu, in one launch that mostly finds nothing due.
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

constexpr u32 WARPS = NEAREST_THREADS / 32;

// Adds a row's values, those of a cluster one after the other, which only one warp does.
template <class T>
__device__ void add_values(const T* values, const u8* clusters, float* sums, u32* counts, const IndexBlock& p) {
  const u32 warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  for (u64 first = 0; first < p.block; first += 32) {
    const u64 t = first + lane;
    const u32 own = t < p.block ? __ldcg(&clusters[t]) : 0;
    for (u32 i = 0; i < min(u64{32}, p.block - first); i++) {
      const u32 cluster = __shfl_sync(ALL_LANES, own, i);
      if (cluster % WARPS != warp) continue;
      if (lane == 0) counts[cluster]++;
#pragma unroll 4
      for (u32 e = lane; e < p.head_dim; e += 32) sums[cluster * p.head_dim + e] += widen(values[(first + i) * p.head_dim + e]);
    }
  }
}

// The last `block` keys of a sequence are due where they are full: blocks of keys follow each other from init_offset on. A
// warp a key: its cluster, then its codes. The last block of threads of a row adds up the values.
// Grid: (any number of blocks, which share the keys; h_kv; sequences).
template <class T>
__device__ void index_block(const IndexBlock& p) {
  const Sequence& own = p.sequences[blockIdx.z];
  const u32 h = blockIdx.y;
  const u64 length = min(static_cast<u64>(*own.len), own.capacity);
  if (length <= p.init_offset || (length - p.init_offset) % p.block != 0) return;
  const u64 begin = length - p.block;
  SubVectors<T> vectors;
  vectors.first = static_cast<const T*>(own.keys) + h * own.key_stride + begin * p.head_dim;
  vectors.stride = p.head_dim;
  vectors.n = vectors.count = p.block;
  vectors.len = p.head_dim;
  vectors.augmented = false;
  vectors.phi = 0;
  if (own.weights) vectors.weights = own.weights + h * p.head_dim;
  const SubVectors<T> whole = vectors;
  const u32 first_cluster = h * p.n_clusters;
  const float* const coarse = own.coarse + static_cast<u64>(first_cluster) * p.head_dim;
  const Centroids of_clusters = {coarse, p.head_dim, 1, p.n_clusters};
  u8* const codes = own.codes + h * own.codes_stride + begin * p.pq_dim;
  u8* const clusters = own.clusters + h * own.clusters_stride + begin;
  vectors.len = p.pq_len;
  vectors.augmented = own.phi;
  if (own.coarse) {
    vectors.clusters = clusters;
    vectors.cluster_stride = 1;
    vectors.coarse_stride = p.head_dim;
  }
  const u32 columns = p.pq_len + vectors.augmented;
  for (u64 tile = blockIdx.x; tile * WARPS < p.block; tile += gridDim.x) {
    if (own.coarse) {
      nearest_by_warp(whole, of_clusters, tile, [&](u64 t, u8 cluster) { clusters[t] = cluster; });
      __syncwarp();
    }
    for (u32 m = 0; m < p.pq_dim; m++) {
      const u32 subspace = h * p.pq_dim + m;
      SubVectors<T> sub = vectors;
      sub.first += m * p.pq_len;
      if (own.weights) sub.weights += m * p.pq_len;
      if (own.coarse) sub.coarse = coarse + m * p.pq_len;
      if (own.phi) sub.phi = own.phi[subspace];
      const float* const centroids = own.centroids + static_cast<u64>(subspace) * p.n_centroids * columns;
      const Centroids table = {centroids, columns, 1, p.n_centroids};
      nearest_by_warp(sub, table, tile, [&](u64 t, u8 code) { codes[t * p.pq_dim + m] = code; });
      __syncwarp();
    }
  }
  if (!own.sums || !is_last(&own.arrived[h], gridDim.x)) return;
  const T* const values = static_cast<const T*>(own.values) + h * own.key_stride + begin * p.head_dim;
  add_values(values, clusters, own.sums + static_cast<u64>(first_cluster) * p.head_dim, own.counts + first_cluster, p);
}

#define KERNEL(suffix, type)                                                            \
  extern "C" __global__ __launch_bounds__(NEAREST_THREADS) void index_block_##suffix(   \
      const __grid_constant__ IndexBlock p) {                                           \
    index_block<type>(p);                                                               \
  }
FOR_EACH_FLOAT(KERNEL)
