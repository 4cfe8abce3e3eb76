// Codes of keys: the nearest centroid of each sub-vector (nearest.cuh).
#include "nearest.cuh"

struct Encode {
  View<4> keys;
  View<5> centroids;
  View<3> phi;
  View<3> weights;
  View<4> codes;
  View<3> clusters;
  View<4> coarse;
  u64 n;
  u32 h_kv;
  u32 pq_dim;
  u32 pq_len;
  u32 n_centroids;
  u32 augmented;
};

// Encodes n keys; with `weights`, their products with these; with `coarse`, what their clusters' centroids leave of them.
// Grid: (tiles of keys, pq_dim, b * h_kv).
template <int LEN, class T>
__device__ void encode(const T* keys, const float* centroids, const float* phi, const float* weights,
                       const u8* clusters, const float* coarse, u8* codes, const Encode& p) {
  const u32 m = blockIdx.y, pair = blockIdx.z, b = pair / p.h_kv, h = pair % p.h_kv;
  SubVectors<T> vectors;
  vectors.first = keys + p.keys.at(b, h) + m * p.pq_len;
  vectors.stride = p.keys.strides[2];
  vectors.n = vectors.count = p.n;
  vectors.len = p.pq_len;
  vectors.augmented = p.augmented;
  vectors.phi = p.augmented ? phi[p.phi.at(b, h, m)] : 0;
  if (weights) vectors.weights = weights + p.weights.at(b, h) + m * p.pq_len;
  if (coarse) {
    vectors.clusters = clusters + p.clusters.at(b, h);
    vectors.cluster_stride = p.clusters.strides[2];
    vectors.coarse = coarse + p.coarse.at(b, h) + m * p.pq_len;
    vectors.coarse_stride = p.coarse.strides[2];
  }
  const Centroids table = {centroids + p.centroids.at(b, h, m), p.centroids.strides[3], p.centroids.strides[4],
                           p.n_centroids};
  nearest<LEN>(vectors, table, blockIdx.x, [&](u64 t, u8 code) { codes[p.codes.at(b, h, t, m)] = code; });
}

#define KERNEL_NAMED(suffix, type, LEN, name)                                          \
  extern "C" __global__ __launch_bounds__(NEAREST_THREADS) void encode_##suffix##_##name( \
      const type* keys,        /* [b, h_kv, n, head_dim] */                            \
      const float* centroids,  /* [b, h_kv, pq_dim, n_centroids, columns] */           \
      const float* phi,        /* [b, h_kv, pq_dim], read where augmented */           \
      const float* weights,    /* [b, h_kv, head_dim], or null */                      \
      const u8* clusters,      /* [b, h_kv, n], or null */                             \
      const float* coarse,     /* [b, h_kv, n_clusters, head_dim], or null */          \
      u8* codes,               /* [b, h_kv, n, pq_dim] */                              \
      const Encode p) {                                                                \
    encode<LEN>(keys, centroids, phi, weights, clusters, coarse, codes, p);            \
  }
#define KERNEL(suffix, type, LEN) KERNEL_NAMED(suffix, type, LEN, len##LEN)
#define KERNELS(suffix, type) FOR_EACH_LENGTH(KERNEL, suffix, type) KERNEL_NAMED(suffix, type, -1, few)
FOR_EACH_FLOAT(KERNELS)
