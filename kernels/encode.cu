// Codes of keys: the nearest centroid of each sub-vector (nearest.cuh).
#include "nearest.cuh"

struct Encode {
  View<4> keys;
  View<5> centroids;
  View<3> phi;
  u64 n;
  u32 h_kv;
  u32 pq_dim;
  u32 pq_len;
  u32 n_centroids;
  u32 augmented;
};

// Grid: (tiles of keys, pq_dim, b * h_kv).
template <int LEN, class T>
__device__ void encode(const T* keys, const float* centroids, const float* phi, u8* codes, const Encode& p) {
  const u32 m = blockIdx.y, pair = blockIdx.z, b = pair / p.h_kv, h = pair % p.h_kv;
  SubVectors<T> vectors;
  vectors.first = keys + p.keys.at(b, h) + m * p.pq_len;
  vectors.stride = p.keys.strides[2];
  vectors.n = vectors.count = p.n;
  vectors.len = p.pq_len;
  vectors.augmented = p.augmented;
  vectors.phi = p.augmented ? phi[p.phi.at(b, h, m)] : 0;
  const Centroids table = {centroids + p.centroids.at(b, h, m), p.centroids.strides[3], p.centroids.strides[4],
                           p.n_centroids};
  u8* out = codes + pair * p.n * p.pq_dim + m;
  nearest<LEN>(vectors, table, blockIdx.x, [&](u64 t, u8 code) { out[t * p.pq_dim] = code; });
}

#define KERNEL(suffix, type, LEN)                                                      \
  extern "C" __global__ __launch_bounds__(NEAREST_THREADS) void encode_##suffix##_len##LEN( \
      const type* keys,        /* [b, h_kv, n, head_dim] */                            \
      const float* centroids,  /* [b, h_kv, pq_dim, n_centroids, columns] */           \
      const float* phi,        /* [b, h_kv, pq_dim], read where augmented */           \
      u8* codes,               /* [b, h_kv, n, pq_dim] */                              \
      const Encode p) {                                                                \
    encode<LEN>(keys, centroids, phi, codes, p);                                       \
  }
#define KERNELS(suffix, type) FOR_EACH_LENGTH(KERNEL, suffix, type)
FOR_EACH_FLOAT(KERNELS)
