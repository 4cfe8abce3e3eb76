// What a decode step adds to an index: the codes of the block of keys that the step filled, and its values' share of the
// clusters' sums; the bits of encode.cu and cluster_sums.cu, in one launch that mostly finds nothing due.
#include "nearest.cuh"

struct IndexBlock {
  View<4> keys;
  View<4> values;
  View<4> codes;
  View<3> clusters;
  View<5> centroids;
  View<4> coarse;
  View<3> phi;
  View<3> weights;
  Step step;
  u64 block;  // keys
  u32 b;
  u32 h_kv;
  u32 head_dim;
  u32 pq_dim;
  u32 pq_len;
  u32 n_centroids;
  u32 n_clusters;
  u32 augmented;
};

constexpr u32 WARPS = NEAREST_THREADS / 32;

// Adds a row's values, those of a cluster one after the other, which only one warp does.
template <class T>
__device__ void add_values(const T* values, u64 stride, const u8* clusters, u64 cluster_stride, float* sums, u32* counts,
                           const IndexBlock& p) {
  const u32 warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  for (u64 first = 0; first < p.block; first += 32) {
    const u64 t = first + lane;
    const u32 own = t < p.block ? __ldcg(&clusters[t * cluster_stride]) : 0;
    for (u32 i = 0; i < min(u64{32}, p.block - first); i++) {
      const u32 cluster = __shfl_sync(ALL_LANES, own, i);
      if (cluster % WARPS != warp) continue;
      if (lane == 0) counts[cluster]++;
#pragma unroll 4
      for (u32 e = lane; e < p.head_dim; e += 32) sums[cluster * p.head_dim + e] += widen(values[(first + i) * stride + e]);
    }
  }
}

// A warp a key: its cluster, then its codes. The last block of a row adds up the values.
// Grid: (any number of blocks, which share the keys; b * h_kv).
template <class T>
__device__ void index_block(const T* keys, const T* values, const float* centroids, const float* phi, const float* weights,
                            const float* coarse, u32* lens, u8* codes, u8* clusters, float* sums, u32* counts,
                            const IndexBlock& p) {
  const u32 pair = blockIdx.y, b = pair / p.h_kv, h = pair % p.h_kv;
  u64 begin;
  if (!p.step.find_due(lens, b, p.block, &begin)) return;
  SubVectors<T> vectors;
  vectors.first = keys + p.keys.at(b, h, begin);
  vectors.stride = p.keys.strides[2];
  vectors.n = vectors.count = p.block;
  vectors.len = p.head_dim;
  vectors.augmented = false;
  vectors.phi = 0;
  if (weights) vectors.weights = weights + p.weights.at(b, h);
  const SubVectors<T> whole = vectors;
  const Centroids of_clusters = {coarse + p.coarse.at(b, h), p.coarse.strides[2], p.coarse.strides[3], p.n_clusters};
  u8* const own_clusters = clusters + p.clusters.at(b, h, begin);
  const u64 cluster_stride = p.clusters.strides[2];
  vectors.len = p.pq_len;
  vectors.augmented = p.augmented;
  if (coarse) {
    vectors.clusters = own_clusters;
    vectors.cluster_stride = cluster_stride;
    vectors.coarse_stride = p.coarse.strides[2];
  }
  for (u64 tile = blockIdx.x; tile * WARPS < p.block; tile += gridDim.x) {
    if (coarse) {
      nearest_by_warp(whole, of_clusters, tile, [&](u64 t, u8 cluster) { own_clusters[t * cluster_stride] = cluster; });
      __syncwarp();
    }
    for (u32 m = 0; m < p.pq_dim; m++) {
      SubVectors<T> sub = vectors;
      sub.first += m * p.pq_len;
      if (weights) sub.weights += m * p.pq_len;
      if (coarse) sub.coarse = coarse + p.coarse.at(b, h) + m * p.pq_len;
      if (p.augmented) sub.phi = phi[p.phi.at(b, h, m)];
      const Centroids table = {centroids + p.centroids.at(b, h, m), p.centroids.strides[3], p.centroids.strides[4],
                               p.n_centroids};
      nearest_by_warp(sub, table, tile, [&](u64 t, u8 code) { codes[p.codes.at(b, h, begin + t, m)] = code; });
      __syncwarp();
    }
  }
  if (!sums || !is_last(&lens[p.b + 1 + pair], gridDim.x)) return;
  const u64 first_cluster = static_cast<u64>(pair) * p.n_clusters;
  add_values(values + p.values.at(b, h, begin), p.values.strides[2], own_clusters, cluster_stride,
             sums + first_cluster * p.head_dim, counts + first_cluster, p);
}

#define KERNEL(suffix, type)                                                                  \
  extern "C" __global__ __launch_bounds__(NEAREST_THREADS) void index_block_##suffix(         \
      const type* keys,        /* [b, h_kv, capacity, head_dim] */                            \
      const type* values,      /* [b, h_kv, capacity, head_dim] */                            \
      const float* centroids,  /* [b, h_kv, pq_dim, n_centroids, columns] */                  \
      const float* phi,        /* [b, h_kv, pq_dim], or null */                               \
      const float* weights,    /* [b, h_kv, head_dim], or null */                             \
      const float* coarse,     /* [b, h_kv, n_clusters, head_dim], or null */                 \
      u32* lens,               /* [b], [1], [b, h_kv]: Lens in src/cuda */                    \
      u8* codes,               /* [b, h_kv, capacity, pq_dim] */                              \
      u8* clusters,            /* [b, h_kv, capacity], or null */                             \
      float* sums,             /* [b, h_kv, n_clusters, head_dim], or null */                 \
      u32* counts,             /* [b, h_kv, n_clusters], or null */                           \
      const IndexBlock p) {                                                                   \
    index_block(keys, values, centroids, phi, weights, coarse, lens, codes, clusters, sums, counts, p); \
  }
FOR_EACH_FLOAT(KERNEL)
