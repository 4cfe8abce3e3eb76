// Codes of keys: the nearest centroid of each sub-vector (nearest.cuh).
#include "nearest.cuh"

struct Encode {
  View<4> keys;
  View<5> centroids;
  View<3> phi;
  View<4> codes;
  Step step;
  u64 n;  // keys to encode
  u32 h_kv;
  u32 pq_dim;
  u32 pq_len;
  u32 n_centroids;
  u32 augmented;
};

// Without `lens`, encodes the first n keys. With them, the last n keys of a sequence if they are a block that is due:
// blocks of n follow each other from init_offset on, and are encoded when they are full.
// Grid: (tiles of keys, pq_dim, b * h_kv).
template <int LEN, class T>
__device__ void encode(const T* keys, const float* centroids, const float* phi, const u32* lens, u8* codes,
                       const Encode& p) {
  const u32 m = blockIdx.y, pair = blockIdx.z, b = pair / p.h_kv, h = pair % p.h_kv;
  u64 begin = 0;
  if (lens) {
    const u64 length = p.step.length(lens, b), init_offset = p.step.init_offset;
    if (length <= init_offset || (length - init_offset) % p.n != 0) return;
    begin = length - p.n;
  }
  SubVectors<T> vectors;
  vectors.first = keys + p.keys.at(b, h, begin) + m * p.pq_len;
  vectors.stride = p.keys.strides[2];
  vectors.n = vectors.count = p.n;
  vectors.len = p.pq_len;
  vectors.augmented = p.augmented;
  vectors.phi = p.augmented ? phi[p.phi.at(b, h, m)] : 0;
  const Centroids table = {centroids + p.centroids.at(b, h, m), p.centroids.strides[3], p.centroids.strides[4],
                           p.n_centroids};
  nearest<LEN>(vectors, table, blockIdx.x, [&](u64 t, u8 code) { codes[p.codes.at(b, h, begin + t, m)] = code; });
}

#define KERNEL(suffix, type, LEN)                                                      \
  extern "C" __global__ __launch_bounds__(NEAREST_THREADS) void encode_##suffix##_len##LEN( \
      const type* keys,        /* [b, h_kv, n, head_dim] */                            \
      const float* centroids,  /* [b, h_kv, pq_dim, n_centroids, columns] */           \
      const float* phi,        /* [b, h_kv, pq_dim], read where augmented */           \
      const u32* lens,         /* [b], or null */                                      \
      u8* codes,               /* [b, h_kv, n, pq_dim] */                              \
      const Encode p) {                                                                \
    encode<LEN>(keys, centroids, phi, lens, codes, p);                                 \
  }
#define KERNELS(suffix, type) FOR_EACH_LENGTH(KERNEL, suffix, type)
FOR_EACH_FLOAT(KERNELS)
