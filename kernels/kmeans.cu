// Codebook training: Lloyd's algorithm, a subspace of a (batch, KV head) at a time; the CPU's bits.
//
// A round is two launches:
// 1. Assign: the nearest centroid of every sample (nearest.cuh).
// 2. Update: a block sorts its subspace's samples by code, stably, so that each centroid's samples lie in ascending
//    order and one thread a coordinate can add them up in f64 in the order of the CPU.
#include "nearest.cuh"

struct Kmeans {
  View<4> keys;
  u64 n;
  u64 samples;
  u64 seed;
  u32 h_kv;
  u32 pq_dim;
  u32 pq_len;
  u32 n_centroids;
  u32 augmented;
};

// The sub-vectors of the `subspace`-th of all b * h_kv * pq_dim subspaces; `phi` may be null while it is not known.
template <class T>
__device__ SubVectors<T> sub_vectors(const T* keys, const float* phi, const Kmeans& p, u64 subspace) {
  const u64 pair = subspace / p.pq_dim, m = subspace % p.pq_dim;
  SubVectors<T> vectors;
  vectors.first = keys + p.keys.at(pair / p.h_kv, pair % p.h_kv) + m * p.pq_len;
  vectors.stride = p.keys.strides[2];
  vectors.n = p.n;
  vectors.count = p.samples;
  vectors.len = p.pq_len;
  vectors.augmented = p.augmented;
  vectors.phi = p.augmented && phi ? phi[subspace] : 0;
  return vectors;
}

__device__ Centroids table_of(const float* centroids, const Kmeans& p, u64 subspace) {
  const u32 columns = p.pq_len + p.augmented;
  return {centroids + subspace * p.n_centroids * columns, columns, 1, p.n_centroids};
}

constexpr int PHI_WARPS = 8;

// The largest squared norm of a subspace's samples. Grid: subspaces.
template <class T>
__device__ void largest_norm(const T* keys, float* phi, const Kmeans& p) {
  const SubVectors<T> vectors = sub_vectors<T>(keys, nullptr, p, blockIdx.x);
  float largest = 0;
  for (u64 i = threadIdx.x; i < p.samples; i += PHI_WARPS * 32) largest = fmaxf(largest, vectors.norm(vectors[i]));
  largest = block_max<PHI_WARPS>(largest);
  if (threadIdx.x == 0) phi[blockIdx.x] = largest;
}

// SplitMix64, as on the CPU.
struct Random {
  u64 state;

  __device__ u64 next() {
    state += 0x9e3779b97f4a7c15;
    u64 z = state;
    z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9;
    z = (z ^ (z >> 27)) * 0x94d049bb133111eb;
    return z ^ (z >> 31);
  }

  __device__ u64 below(u64 bound) { return __umul64hi(next(), bound); }
};

// Draws distinct samples as the first centroids, by the first steps of a Fisher-Yates shuffle whose array exists only
// as the list of swaps made so far. Grid: subspaces, a warp each.
template <class T>
__device__ void draw(const T* keys, const float* phi, float* centroids, u64* random, const Kmeans& p) {
  __shared__ u64 swapped_at[256], swapped_in[256];
  const u32 lane = threadIdx.x;
  const SubVectors<T> vectors = sub_vectors(keys, phi, p, blockIdx.x);
  const u32 columns = vectors.columns();
  Random subspace = {blockIdx.x};
  Random numbers = {p.seed ^ subspace.next()};
  for (u32 i = 0; i < p.n_centroids; i++) {
    const auto order = [&](u64 position) {
      u32 last = 0;
      for (u32 s = lane; s < i; s += 32) {
        if (swapped_at[s] == position) last = s + 1;
      }
      last = __reduce_max_sync(ALL_LANES, last);
      return last ? swapped_in[last - 1] : position;
    };
    const u64 j = i + numbers.below(p.samples - i);
    const u64 at_i = order(i), sample = order(j);
    __syncwarp();
    if (lane == 0) {
      swapped_at[i] = j;
      swapped_in[i] = at_i;
    }
    __syncwarp();
    float* centroid = centroids + (static_cast<u64>(blockIdx.x) * p.n_centroids + i) * columns;
    for (u32 c = lane; c < columns; c += 32) centroid[c] = vectors.coordinate(sample, c);
  }
  if (lane == 0) random[blockIdx.x] = numbers.state;
}

// Grid: (tiles of samples, subspaces).
template <int LEN, class T>
__device__ void assign(const T* keys, const float* centroids, const float* phi, u8* codes, const Kmeans& p) {
  const u64 subspace = blockIdx.y;
  u8* out = codes + subspace * p.samples;
  nearest<LEN>(sub_vectors(keys, phi, p, subspace), table_of(centroids, p, subspace), blockIdx.x,
               [&](u64 i, u8 code) { out[i] = code; });
}

constexpr int UPDATE_WARPS = 32;

// Moves every centroid to the mean of its samples; one without samples to a random sample. Grid: subspaces.
template <class T>
__device__ void update(const T* keys, const float* phi, const u8* codes, u32* sorted, float* centroids, u64* random,
                       const Kmeans& p) {
  __shared__ u32 next[UPDATE_WARPS][256];  // where a warp's next sample of a code goes in `sorted`
  __shared__ u32 counts[256], starts[256];
  const u32 warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const SubVectors<T> vectors = sub_vectors(keys, phi, p, blockIdx.x);
  const u32 columns = vectors.columns();
  codes += blockIdx.x * p.samples;
  sorted += blockIdx.x * p.samples;
  centroids += static_cast<u64>(blockIdx.x) * p.n_centroids * columns;

  // A stable counting sort; each warp owns a run of samples.
  const u64 run = (p.samples + UPDATE_WARPS - 1) / UPDATE_WARPS;
  const u64 begin = min(warp * run, p.samples), end = min(begin + run, p.samples);
  for (u32 c = lane; c < 256; c += 32) next[warp][c] = 0;
  __syncwarp();
  for (u64 i = begin + lane; i < end; i += 32) atomicAdd(&next[warp][codes[i]], 1);
  __syncthreads();
  if (threadIdx.x < 256) {
    u32 count = 0;
    for (u32 w = 0; w < UPDATE_WARPS; w++) {
      const u32 own = next[w][threadIdx.x];
      next[w][threadIdx.x] = count;
      count += own;
    }
    counts[threadIdx.x] = count;
  }
  __syncthreads();
  if (warp == 0) {
    u32 before = 0;
    for (u32 c = lane; c < 256; c += 32) {
      u32 sum = counts[c];
#pragma unroll
      for (int lanes = 1; lanes < 32; lanes *= 2) {
        const u32 other = __shfl_up_sync(ALL_LANES, sum, lanes);
        if (lane >= lanes) sum += other;
      }
      starts[c] = before + sum - counts[c];
      before += __shfl_sync(ALL_LANES, sum, 31);
    }
  }
  __syncthreads();
  for (u64 base = begin; base < end; base += 32) {
    const bool valid = base + lane < end;
    const u32 code = valid ? codes[base + lane] : 256;
    const u32 peers = __match_any_sync(ALL_LANES, code);
    const u32 rank = __popc(peers & ((1u << lane) - 1));
    const u32 slot = valid ? next[warp][code] : 0;
    __syncwarp();
    if (valid) {
      sorted[starts[code] + slot + rank] = static_cast<u32>(base + lane);
      if (rank == 0) next[warp][code] = slot + __popc(peers);
    }
    __syncwarp();
  }
  __syncthreads();

  for (u32 i = threadIdx.x; i < p.n_centroids * columns; i += UPDATE_WARPS * 32) {
    const u32 c = i / columns, j = i % columns, count = counts[c];
    if (count == 0) continue;
    const u32* members = sorted + starts[c];
    const auto value = [&](u32 s) { return vectors.coordinate(members[s], j); };
    double sum = 0;
    u32 s = 0;
    for (; s + 4 <= count; s += 4) {
      float x[4];  // in flight together; added one after the other
#pragma unroll
      for (int e = 0; e < 4; e++) x[e] = value(s + e);
#pragma unroll
      for (int e = 0; e < 4; e++) sum += static_cast<double>(x[e]);
    }
    for (; s < count; s++) sum += static_cast<double>(value(s));
    centroids[i] = static_cast<float>(sum / static_cast<double>(count));
  }
  if (warp == 0) {
    Random numbers = {random[blockIdx.x]};
    for (u32 c = 0; c < p.n_centroids; c++) {
      if (counts[c] > 0) continue;
      const u64 sample = numbers.below(p.samples);
      for (u32 j = lane; j < columns; j += 32) centroids[c * columns + j] = vectors.coordinate(sample, j);
    }
    if (lane == 0) random[blockIdx.x] = numbers.state;
  }
}

#define KERNELS(suffix, type)                                                                      \
  extern "C" __global__ __launch_bounds__(PHI_WARPS * 32) void kmeans_phi_##suffix(                \
      const type* keys,  /* [b, h_kv, n, head_dim] */                                              \
      float* phi,        /* [b, h_kv, pq_dim] */                                                   \
      const Kmeans p) {                                                                            \
    largest_norm(keys, phi, p);                                                                    \
  }                                                                                                \
  extern "C" __global__ __launch_bounds__(32) void kmeans_draw_##suffix(                           \
      const type* keys,  /* [b, h_kv, n, head_dim] */                                              \
      const float* phi,  /* [b, h_kv, pq_dim] */                                                   \
      float* centroids,  /* [b, h_kv, pq_dim, n_centroids, columns] */                             \
      u64* random,       /* [b, h_kv, pq_dim], states of the generators */                         \
      const Kmeans p) {                                                                            \
    draw(keys, phi, centroids, random, p);                                                         \
  }                                                                                                \
  extern "C" __global__ __launch_bounds__(UPDATE_WARPS * 32) void kmeans_update_##suffix(          \
      const type* keys,  /* [b, h_kv, n, head_dim] */                                              \
      const float* phi,  /* [b, h_kv, pq_dim] */                                                   \
      const u8* codes,   /* [b, h_kv, pq_dim, samples] */                                          \
      u32* sorted,       /* [b, h_kv, pq_dim, samples], room for sample numbers */                 \
      float* centroids,  /* [b, h_kv, pq_dim, n_centroids, columns] */                             \
      u64* random,       /* [b, h_kv, pq_dim] */                                                   \
      const Kmeans p) {                                                                            \
    update(keys, phi, codes, sorted, centroids, random, p);                                        \
  }                                                                                                \
  FOR_EACH_LENGTH(ASSIGN, suffix, type)

#define ASSIGN(suffix, type, LEN)                                                                  \
  extern "C" __global__ __launch_bounds__(NEAREST_THREADS) void kmeans_assign_##suffix##_len##LEN( \
      const type* keys,        /* [b, h_kv, n, head_dim] */                                        \
      const float* centroids,  /* [b, h_kv, pq_dim, n_centroids, columns] */                       \
      const float* phi,        /* [b, h_kv, pq_dim] */                                             \
      u8* codes,               /* [b, h_kv, pq_dim, samples] */                                    \
      const Kmeans p) {                                                                            \
    assign<LEN>(keys, centroids, phi, codes, p);                                                   \
  }

FOR_EACH_FLOAT(KERNELS)
