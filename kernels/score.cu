// PQ scores: LUT[m][c] = query_m . centroid[m][c], then score[t] = sum over m of LUT[m][codes[t][m]]; the CPU's bits.
// Where the codes are of residuals, the sum starts with query . coarse[clusters[t]], from one more table.
//
// One look-up serves several query heads of a group: an entry holds a lane for each. Two launches:
// 1. The tables, a thread an entry.
// 2. The scores, a thread a key; a block copies its tables to shared memory first, where they fit.
#include "common.cuh"

struct Score {
  View<4> query;
  View<4> codes;
  View<5> centroids;
  View<4> clusters;
  View<5> coarse;  // of one subspace, as long as the key
  Step step;
  u64 row;  // distance of the scores' rows
  u32 h_kv;
  u32 group;
  u32 parts;  // tables of a group: its heads in bundles of LANES
  u32 pq_dim;
  u32 pq_len;
  u32 n_centroids;
  u32 n_clusters;  // 0 for none
};

constexpr int LUT_THREADS = 128;
constexpr int SCORE_THREADS = 512;

// An entry: one f32 a query head.
template <int LANES>
struct alignas(4 * LANES) Entry {
  float x[LANES];
};

// Entries of the tables that serve some heads: the clusters' come last.
__device__ inline u32 table_entries(const Score& p) { return p.pq_dim * p.n_centroids + p.n_clusters; }

// Grid: (tiles of centroids, pq_dim and one more for the clusters, b * h_kv * parts).
template <int LANES, class T>
__device__ void lut(const T* query, const float* centroids, const float* coarse, Entry<LANES>* tables, const Score& p) {
  const u32 m = blockIdx.y, pair = blockIdx.z / p.parts, b = pair / p.h_kv, kv = pair % p.h_kv;
  const u32 c = blockIdx.x * LUT_THREADS + threadIdx.x;
  const bool is_coarse = m == p.pq_dim;
  if (c >= (is_coarse ? p.n_clusters : p.n_centroids)) return;
  const u32 first = blockIdx.z % p.parts * LANES, len = is_coarse ? p.pq_dim * p.pq_len : p.pq_len;
  const float* centroid = is_coarse ? coarse + p.coarse.at(b, kv, 0, c) : centroids + p.centroids.at(b, kv, m, c);
  const u64 stride = is_coarse ? p.coarse.strides[4] : p.centroids.strides[4];
  const T* queries = query + p.query.at(b, kv * p.group + first) + (is_coarse ? 0 : m * p.pq_len);
  Entry<LANES> entry = {};
  const auto add = [&](u32 j, float x) {
#pragma unroll
    for (int l = 0; l < LANES; l++) {
      if (first + l < p.group) entry.x[l] = add_product(entry.x[l], widen(queries[l * p.query.strides[1] + j]), x);
    }
  };
  // A thread's row is far from its neighbours': the wider its loads, the fewer times it waits for memory.
  u32 j = 0;
  if (stride == 1 && reinterpret_cast<u64>(centroid) % sizeof(float4) == 0) {
#pragma unroll 8
    for (; j + 4 <= len; j += 4) {
      const float4 x = __ldg(reinterpret_cast<const float4*>(centroid + j));
      add(j, x.x);
      add(j + 1, x.y);
      add(j + 2, x.z);
      add(j + 3, x.w);
    }
  }
#pragma unroll 8
  for (; j < len; j++) add(j, centroid[j * stride]);
  tables[static_cast<u64>(blockIdx.z) * table_entries(p) + m * p.n_centroids + c] = entry;
}

// `BYTES` code bytes, loaded at once.
template <int BYTES>
struct alignas(BYTES) CodeBytes {
  u8 x[BYTES];
};

// Grid: (runs of keys, b * h_kv * parts).
template <int LANES, int BYTES, bool SHARED>
__device__ void score(const u8* codes, const u8* clusters, const Entry<LANES>* tables, const u32* lens, float* scores,
                      const Score& p) {
  extern __shared__ __align__(16) u8 shared[];
  const u32 pair = blockIdx.y / p.parts, b = pair / p.h_kv, kv = pair % p.h_kv;
  const u64 n = p.step.candidates(p.step.length(lens, b));
  const u64 keys_per_block = max(ceil_div(n, gridDim.x), u64{SCORE_THREADS});
  const u64 begin = blockIdx.x * keys_per_block, end = min(begin + keys_per_block, n);
  if (begin >= end) return;
  const u32 entries = table_entries(p), mask = p.n_centroids - 1;
  const Entry<LANES>* table = tables + static_cast<u64>(blockIdx.y) * entries;
  if (SHARED) {
    Entry<LANES>* copy = reinterpret_cast<Entry<LANES>*>(shared);
    for (u32 i = threadIdx.x; i < entries; i += SCORE_THREADS) copy[i] = table[i];
    __syncthreads();
    table = copy;
  }
  const u32 first = blockIdx.y % p.parts * LANES, heads = min(static_cast<u32>(LANES), p.group - first);
  float* rows = scores + (static_cast<u64>(pair) * p.group + first) * p.row;
  const u8* head_codes = codes + p.codes.at(b, kv);
  for (u64 t = begin + threadIdx.x; t < end; t += SCORE_THREADS) {
    const u8* key = head_codes + t * p.codes.strides[2];
    float sums[LANES] = {};
    if (p.n_clusters) {
      const u32 cluster = clusters[p.clusters.at(b, kv, t)] & (p.n_clusters - 1);
      const Entry<LANES> entry = table[p.pq_dim * p.n_centroids + cluster];
#pragma unroll
      for (int l = 0; l < LANES; l++) sums[l] = entry.x[l];
    }
    const Entry<LANES>* subspace = table;
#pragma unroll 1
    for (u32 m = 0; m < p.pq_dim; m += BYTES) {
      const CodeBytes<BYTES> bytes = *reinterpret_cast<const CodeBytes<BYTES>*>(key + m);
#pragma unroll
      for (int i = 0; i < BYTES; i++) {
        // The mask keeps a byte that is no code inside the table.
        const Entry<LANES> entry = subspace[bytes.x[i] & mask];
#pragma unroll
        for (int l = 0; l < LANES; l++) sums[l] += entry.x[l];
        subspace += p.n_centroids;
      }
    }
#pragma unroll
    for (int l = 0; l < LANES; l++) {
      if (l < heads) rows[l * p.row + t] = sums[l];
    }
  }
}

#define LUT(suffix, type, LANES)                                                             \
  extern "C" __global__ __launch_bounds__(LUT_THREADS) void score_lut_##suffix##_h##LANES(   \
      const type* query,        /* [b, h, 1, head_dim] */                                    \
      const float* centroids,   /* [b, h_kv, pq_dim, n_centroids, pq_len] */                 \
      const float* coarse,      /* [b, h_kv, 1, n_clusters, head_dim], or null */            \
      float* tables,            /* [b, h_kv, parts, entries, LANES] */                       \
      const Score p) {                                                                       \
    lut<LANES>(query, centroids, coarse, reinterpret_cast<Entry<LANES>*>(tables), p);        \
  }
#define LUTS(suffix, type) LUT(suffix, type, 1) LUT(suffix, type, 2) LUT(suffix, type, 4)
FOR_EACH_FLOAT(LUTS)

#define SCORE(LANES, BYTES, name, SHARED)                                                      \
  extern "C" __global__ __launch_bounds__(SCORE_THREADS) void score_h##LANES##_x##BYTES##name( \
      const u8* codes,      /* [b, h_kv, n, pq_dim], from the first candidate on */            \
      const u8* clusters,   /* [b, h_kv, n, 1], or null */                                     \
      const float* tables,  /* [b, h_kv, parts, entries, LANES] */                             \
      const u32* lens,      /* [b], or null */                                                 \
      float* scores,        /* [b, h, row] */                                                  \
      const Score p) {                                                                         \
    score<LANES, BYTES, SHARED>(codes, clusters, reinterpret_cast<const Entry<LANES>*>(tables), lens, scores, p); \
  }
#define SCORES(LANES)                                                                      \
  SCORE(LANES, 1, , true) SCORE(LANES, 2, , true) SCORE(LANES, 4, , true) SCORE(LANES, 8, , true) \
  SCORE(LANES, 16, , true)
SCORES(1) SCORES(2) SCORES(4)
// Tables too large for shared memory.
SCORE(1, 1, _global, false)
