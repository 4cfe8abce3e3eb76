// The values of each cluster of keys, summed, and how many they are; the CPU's bits.
#include "common.cuh"

constexpr int WARPS = 8;
constexpr int THREADS = WARPS * 32;
constexpr u32 MAX_HEAD_DIM = THREADS;

struct ClusterSums {
  View<4> values;
  View<4> codes;
  u64 n;
  u32 h_kv;
  u32 head_dim;
  u32 n_clusters;
};

// Clusters of a block.
constexpr u32 SLICE = 16;

// Keys among which a block looks for those of its clusters at a time.
constexpr u32 TILE = 1024;

// Values on their way.
constexpr int AHEAD = 8;

// A block lists the keys of its clusters, in order, and adds their values one after the other, a thread an element.
// Grid: (slices of clusters, b * h_kv).
template <class T>
__device__ void add(const T* values, const u8* codes, float* sums, const ClusterSums& p) {
  __shared__ float acc[SLICE][MAX_HEAD_DIM];
  __shared__ u32 listed[TILE], counts[WARPS];  // position in the tile << 8 | cluster in the slice
  const u32 first = blockIdx.x * SLICE, pair = blockIdx.y, b = pair / p.h_kv, h = pair % p.h_kv;
  const u32 warp = threadIdx.x / 32, lane = threadIdx.x % 32, e = threadIdx.x;
  values += p.values.at(b, h);
  codes += p.codes.at(b, h);
  sums += (static_cast<u64>(pair) * p.n_clusters + first) * p.head_dim;
  const u32 clusters = min(SLICE, p.n_clusters - first);
  for (u32 c = 0; c < clusters; c++) {
    if (e < p.head_dim) acc[c][e] = sums[c * p.head_dim + e];
  }
  for (u64 tile = 0; tile < p.n; tile += TILE) {
    u32 count = 0;
    for (u32 offset = 0; offset < TILE; offset += THREADS) {
      const u64 t = tile + offset + threadIdx.x;
      const u32 cluster = t < p.n ? codes[t * p.codes.strides[2]] - first : SLICE;  // wraps around below the slice
      const u32 mine = __ballot_sync(ALL_LANES, cluster < clusters);
      __syncthreads();  // the counts and, at first, the list have been read
      if (lane == 0) counts[warp] = __popc(mine);
      __syncthreads();
      u32 at = count + __popc(mine & ((1u << lane) - 1));
      for (u32 w = 0; w < WARPS; w++) {
        if (w < warp) at += counts[w];
        count += counts[w];
      }
      if (cluster < clusters) listed[at] = (offset + threadIdx.x) << 8 | cluster;
    }
    __syncthreads();
    if (e >= p.head_dim) continue;
    for (u32 i = 0; i < count; i += AHEAD) {
      float x[AHEAD];
#pragma unroll
      for (int u = 0; u < AHEAD; u++) {
        if (i + u < count) x[u] = widen(values[(tile + (listed[i + u] >> 8)) * p.values.strides[2] + e]);
      }
#pragma unroll
      for (int u = 0; u < AHEAD; u++) {
        if (i + u < count) acc[listed[i + u] & 0xff][e] += x[u];
      }
    }
  }
  for (u32 c = 0; c < clusters; c++) {
    if (e < p.head_dim) sums[c * p.head_dim + e] = acc[c][e];
  }
}

#define KERNEL(suffix, type)                                                     \
  extern "C" __global__ __launch_bounds__(THREADS) void cluster_sums_##suffix(   \
      const type* values, /* [b, h_kv, n, head_dim] */                           \
      const u8* codes,    /* [b, h_kv, n, 1] */                                  \
      float* sums,        /* [b, h_kv, n_clusters, head_dim] */                  \
      const ClusterSums p) {                                                     \
    add(values, codes, sums, p);                                                 \
  }
FOR_EACH_FLOAT(KERNEL)

// Grid: (any number of blocks, which share the keys; b * h_kv).
extern "C" __global__ __launch_bounds__(THREADS) void cluster_counts(
    const u8* codes,  // [b, h_kv, n, 1]
    u32* counts,      // [b, h_kv, n_clusters]
    const ClusterSums p) {
  __shared__ u32 found[256];
  const u32 pair = blockIdx.y, b = pair / p.h_kv, h = pair % p.h_kv;
  codes += p.codes.at(b, h);
  found[threadIdx.x] = 0;
  __syncthreads();
  for (u64 t = static_cast<u64>(blockIdx.x) * THREADS + threadIdx.x; t < p.n; t += static_cast<u64>(gridDim.x) * THREADS) {
    atomicAdd(&found[codes[t * p.codes.strides[2]]], 1);
  }
  __syncthreads();
  const u32 c = threadIdx.x;
  if (c < p.n_clusters && found[c]) atomicAdd(&counts[static_cast<u64>(pair) * p.n_clusters + c], found[c]);
}
