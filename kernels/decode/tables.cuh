// Tables of a step: query . centroid for each centroid and cluster.
#pragma once

#include "layout.cuh"

// Subspaces of a row of the tables in shared memory, which is as long as all banks.
constexpr u32 SUBSPACES = 8;
constexpr u32 ROW_BYTES = 128;

// Lanes of a head that share an entry of a cluster, which is as long as a key.
constexpr u32 CLUSTER_LANES = 8;

// Bounds of a column's entries for each head, as ranks of floats: the largest, and the complement of the smallest. 0 for
// none, which is below all others.
template <int HEADS>
struct Bounds {
  u32 largest[HEADS];
  u32 smallest[HEADS];
};

__device__ inline float of_rank(u32 rank) {
  const float x = __uint_as_float(rank & 0x80000000u ? rank ^ 0x80000000u : ~rank);
  return fminf(fmaxf(x, -1e36f), 1e36f);  // sums of all columns are numbers
}

// Has what is at `from` come to the second-level cache.
__device__ inline void prefetch(const void* from) { asm volatile("prefetch.global.L2 [%0];" ::"l"(from)); }

constexpr u32 TABLE_THREADS = 128;

// `tables`: the entries of a bundle, and their bounds. A lane makes one head's part of an entry, or an eighth of that of a
// cluster, whose lanes add up theirs. Meanwhile codes come to the second-level cache.
// Grid: (enough blocks for all entries, h_kv * bundles, b).
template <int HEADS, class T>
__device__ void make_tables(const T* query, const u8* codes, const u8* clusters, const float* centroids, const float* coarse,
                            const u32* lens, Entry<HEADS>* out, Bounds<HEADS>* bounds, Search* searches, bool by_kv,
                            const Decode& p) {
  constexpr u32 ENTRIES = 32 / HEADS, TABLE_WARPS = TABLE_THREADS / 32;  // entries a warp
  __shared__ alignas(16) float queries[HEADS][256];
  const u32 kv = blockIdx.y / p.bundles;
  const Part part(lens, kv, blockIdx.y - kv * p.bundles, HEADS, p);
  const u32 y = part.row * p.bundles + part.bundle, lane = threadIdx.x % 32, warp = threadIdx.x / 32, head = lane % HEADS;
  const u32 of_subspaces = p.pq_dim << p.pq_bits, pieces = (of_subspaces + ENTRIES - 1) / ENTRIES;
  out += y * u64{p.entries()};
  bounds += y * u64{p.columns()};
  // What the lane multiplies.
  const u32 piece = blockIdx.x * TABLE_WARPS + warp, i = piece * ENTRIES + lane / HEADS;
  const bool is_cluster = piece >= pieces;
  const u32 eighth = i - pieces * ENTRIES;
  const u32 m = is_cluster ? p.pq_dim : i >> p.pq_bits, c = is_cluster ? eighth / CLUSTER_LANES : i & p.n_centroids - 1;
  const u32 first = is_cluster ? eighth % CLUSTER_LANES * 4 : 0, len = is_cluster ? p.head_dim : p.pq_len;
  const bool is_there = is_cluster ? c < p.n_clusters : i < of_subspaces;
  const float* row = centroids;
  if (is_there) row = is_cluster ? coarse + p.coarse.at(part.b, kv, c) : centroids + p.centroids.at(part.b, kv, m, c);
  if (is_there) prefetch(row + first);
#pragma unroll
  for (int h = 0; h < HEADS; h++) {
#pragma unroll 1
    for (u32 e = threadIdx.x; e < p.head_dim; e += TABLE_THREADS) {
      queries[h][e] = h < part.heads ? widen(query[p.query.at(part.b, part.first_head + h, 0, e)]) : 0;
    }
  }
  __syncthreads();
  const float* const own = queries[head] + (is_cluster ? 0 : m * p.pq_len);
  float entry = 0;
#pragma unroll 4
  for (u32 j = first; is_there && j < len; j += is_cluster ? CLUSTER_LANES * 4 : 4) {
    const float4 x = __ldg(reinterpret_cast<const float4*>(row + j)), y = *reinterpret_cast<const float4*>(own + j);
    entry += x.x * y.x + x.y * y.y + x.z * y.z + x.w * y.w;
  }
  if (is_cluster) {
#pragma unroll
    for (u32 lanes = CLUSTER_LANES / 2; lanes > 0; lanes /= 2) entry += __shfl_xor_sync(ALL_LANES, entry, lanes * HEADS);
  }
  const u32 slot = ((m / SUBSPACES << p.pq_bits) + c) * SUBSPACES + m % SUBSPACES;
  const bool is_own = is_there && first == 0;
  if (is_own) out[is_cluster ? of_subspaces + c : slot].x[head] = entry;
  u32 largest = is_there ? rank_of(entry) : 0, smallest = largest ? ~largest : 0;
  const bool are_alike = is_cluster || p.n_centroids >= ENTRIES;  // of one column
  if (are_alike) {
#pragma unroll
    for (u32 lanes = 16; lanes >= HEADS; lanes /= 2) {
      largest = max(largest, __shfl_xor_sync(ALL_LANES, largest, lanes));
      smallest = max(smallest, __shfl_xor_sync(ALL_LANES, smallest, lanes));
    }
  }
  if (are_alike ? lane < HEADS && is_there : is_own) {
    atomicMax(&bounds[m].largest[head], largest);
    atomicMax(&bounds[m].smallest[head], smallest);
  }
  // For `search`.
  if (blockIdx.x == 0 && threadIdx.x < (by_kv ? 1 : part.heads)) {
    Search& search = searches[by_kv ? part.row : part.b * p.h + part.first_head + threadIdx.x];
    search.n_open = 0, search.counted_from = 0;
  }
  if (by_kv && part.bundle > 0) return;
  constexpr u32 LINE = 64;
  const u32 thread = blockIdx.x * TABLE_THREADS + threadIdx.x, threads = gridDim.x * TABLE_THREADS;
  const u8* const own_codes = codes + p.codes.at(part.b, kv);
#pragma unroll 1
  for (u64 at = thread * LINE; at < u64{part.end} * p.pq_dim; at += threads * LINE) prefetch(own_codes + at);
  if (p.n_clusters == 0) return;
  const u8* const own_clusters = clusters + p.clusters.at(part.b, kv);
#pragma unroll 1
  for (u64 at = thread * LINE; at < part.end; at += threads * LINE) prefetch(own_clusters + at);
}

// Copies bytes to shared memory, past the registers; they are there when the thread has waited.
template <int BYTES>
__device__ inline void copy_async(void* to, const void* from) {
  const u32 address = static_cast<u32>(__cvta_generic_to_shared(to));
  if constexpr (BYTES == 16) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(address), "l"(from) : "memory");
  } else {
    asm volatile("cp.async.ca.shared.global [%0], [%1], %2;" ::"r"(address), "l"(from), "n"(BYTES) : "memory");
  }
}
__device__ inline void wait_for_copies() { asm volatile("cp.async.wait_all;" ::: "memory"); }

// Copies a bundle's tables to shared memory as integers: all entries of a head in the same steps, those of a column from the
// smallest on. So sums of entries are exact, and `ranges` say what scores they are. `staged` has room for the tables.
//
// Each lane starts its key's sum at another subspace, so that of the lanes that are served at a time no two meet in a
// bank; where a row has more slots than subspaces, the subspaces are there several times, and so are the clusters.
template <int HEADS>
__device__ void load_tables(const Entry<HEADS>* from, const Bounds<HEADS>* bounds, u8* rows, Entry<HEADS>* staged,
                            Range (&ranges)[HEADS], const Decode& p) {
  constexpr u32 SLOTS = ROW_BYTES / sizeof(Packed<HEADS>);
  __shared__ float smallest[MAX_COLUMNS][HEADS], spans[MAX_COLUMNS][HEADS], per_step[HEADS];
  const u32 columns = p.columns(), of_subspaces = p.pq_dim << p.pq_bits, entries = of_subspaces + p.n_clusters;
  Packed<HEADS>* const to = reinterpret_cast<Packed<HEADS>*>(rows);
  __syncthreads();  // the tables of the bundle before have been read
#pragma unroll 1
  for (u32 i = threadIdx.x; i < entries; i += THREADS) copy_async<sizeof(Entry<HEADS>)>(&staged[i], &from[i]);
  // Other blocks have written these: past the first-level cache.
#pragma unroll 1
  for (u32 i = threadIdx.x; i < columns * HEADS; i += THREADS) {
    const Bounds<HEADS>& of_column = bounds[i / HEADS];
    const u32 least = __ldcg(&of_column.smallest[i % HEADS]), most = __ldcg(&of_column.largest[i % HEADS]);
    const float low = of_rank(least ? ~least : 0), high = of_rank(most);
    smallest[i / HEADS][i % HEADS] = low;
    spans[i / HEADS][i % HEADS] = high - low;
  }
  __syncthreads();
  if (threadIdx.x < HEADS) {
    const u32 h = threadIdx.x;
    float low = 0, span = 0;
#pragma unroll 1
    for (u32 column = 0; column < columns; column++) low += smallest[column][h], span += spans[column][h];
    // A power of two, so that what lies on a grid stays there.
    const u32 step = (__float_as_uint(fmaxf(span * (1 / LARGEST_SCORE), 1e-30f)) + 0x7fffff) & 0x7f800000;
    per_step[h] = __uint_as_float(0x7f000000 - step);
    ranges[h] = {low, __uint_as_float(step)};
  }
  wait_for_copies();
  __syncthreads();
#pragma unroll 1
  for (u32 i = threadIdx.x; i < entries; i += THREADS) {
    const bool is_cluster = i >= of_subspaces;
    const u32 column = is_cluster ? p.pq_dim : (i / SUBSPACES >> p.pq_bits) * SUBSPACES + i % SUBSPACES;
    const u32 row = is_cluster ? of_subspaces / SUBSPACES + i - of_subspaces : i / SUBSPACES;
    const Entry<HEADS> entry = staged[i];
    Packed<HEADS> packed;
#pragma unroll
    for (int h = 0; h < HEADS; h++) {
      const float above = fminf(fmaxf(entry.x[h] - smallest[column][h], 0.0f), spans[column][h]);  // NaN is 0
      packed.set(h, __float_as_uint(fmaf(above, per_step[h], 0x1p23f)) & 0xffff);                  // rounded
    }
#pragma unroll 1
    for (u32 copy = 0; copy < SLOTS; copy += is_cluster ? 1 : SUBSPACES) to[row * SLOTS + (i + copy) % SLOTS] = packed;
  }
  __syncthreads();
}
