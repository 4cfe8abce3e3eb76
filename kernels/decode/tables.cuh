// Tables of a step: query . centroid for each centroid and cluster.
#pragma once

#include "layout.cuh"

// Subspaces of a row of the tables in shared memory, which is as long as all banks.
constexpr u32 SUBSPACES = 8;
constexpr u32 ROW_BYTES = 128;

// Lanes that share an entry of a cluster, which is as long as a key.
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

// A row of a centroid that a lane multiplies, every LANES-th four elements of it, of which the first are on their way.
struct Row {
  static constexpr u32 AHEAD = 4;
  const float* from;
  u32 len;
  u32 step;
  float4 ahead[AHEAD];

  __device__ void load(const float* first, u32 lane, u32 lanes, u32 length) {
    from = first, len = length, step = lanes * 4;
#pragma unroll
    for (u32 i = 0; i < AHEAD; i++) {
      const u32 j = lane * 4 + i * step;
      ahead[i] = j < len ? __ldg(reinterpret_cast<const float4*>(from + j)) : float4{};
    }
  }

  // With each head's query, from the same element on.
  template <int HEADS>
  __device__ Entry<HEADS> times(const float* queries, u32 lane, u32 head_dim) const {
    Entry<HEADS> entry = {};
    const auto add = [&](float4 x, u32 j) {
#pragma unroll
      for (int h = 0; h < HEADS; h++) {
        const float4 y = *reinterpret_cast<const float4*>(&queries[h * head_dim + j]);
        entry.x[h] += x.x * y.x + x.y * y.y + x.z * y.z + x.w * y.w;
      }
    };
#pragma unroll
    for (u32 i = 0; i < AHEAD; i++) {
      if (lane * 4 + i * step < len) add(ahead[i], lane * 4 + i * step);
    }
    for (u32 j = lane * 4 + AHEAD * step; j < len; j += step) add(__ldg(reinterpret_cast<const float4*>(from + j)), j);
    return entry;
  }
};

// This block's share of the tables of a bundle, and of their bounds. A warp makes 32 entries of subspaces at a time, a lane
// each, or those of four clusters.
template <int HEADS, class T>
__device__ void make_tables(const T* query, const float* centroids, const float* coarse, Entry<HEADS>* out,
                            Bounds<HEADS>* bounds, float* queries, u32 b, u32 kv, u32 bundle, const Decode& p) {
  constexpr u32 CLUSTERS = 32 / CLUSTER_LANES;
  const u32 first_head = kv * p.group + bundle * HEADS, heads = min(HEADS, p.group - bundle * HEADS);
  const u32 lane = threadIdx.x % 32, of_subspaces = p.pq_dim * p.n_centroids;
  const u32 pieces = (of_subspaces + 31) / 32, all_pieces = pieces + (p.n_clusters + CLUSTERS - 1) / CLUSTERS;
  // The lane's entry of a piece: of a subspace's centroid, or its share of a cluster's.
  struct Place {
    bool is_cluster;
    bool is_there;
    u32 m;
    u32 c;
    u32 lane;
  };
  const auto place_of = [&](u32 piece) {
    Place place;
    place.is_cluster = piece >= pieces;
    if (place.is_cluster) {
      place.m = p.pq_dim, place.c = (piece - pieces) * CLUSTERS + lane / CLUSTER_LANES, place.lane = lane % CLUSTER_LANES;
      place.is_there = place.c < p.n_clusters;
    } else {
      const u32 i = piece * 32 + lane;
      place.m = i / p.n_centroids, place.c = i % p.n_centroids, place.lane = 0;
      place.is_there = i < of_subspaces;
    }
    return place;
  };
  const auto load = [&](const Place& place) {
    Row row;
    const u32 m = place.is_there ? place.m : 0, c = place.is_there ? place.c : 0;
    if (place.is_cluster) {
      row.load(coarse + p.coarse.at(b, kv, c), place.lane, CLUSTER_LANES, p.head_dim);
    } else {
      row.load(centroids + p.centroids.at(b, kv, m, c), 0, 1, p.pq_len);
    }
    return row;
  };
  // Pieces go to all blocks before they go to a block's next warp.
  const u32 step = p.splits * WARPS;
  u32 piece = threadIdx.x / 32 * p.splits + blockIdx.x;
  Place place = place_of(piece);
  Row row = {};
  if (piece < all_pieces) row = load(place);
  __syncthreads();  // the queries of the bundle before have been read
  for (u32 i = threadIdx.x; i < HEADS * p.head_dim; i += THREADS) {
    const u32 head = i / p.head_dim, e = i % p.head_dim;
    queries[i] = head < heads ? widen(query[p.query.at(b, first_head + head, 0, e)]) : 0;
  }
  __syncthreads();
  while (piece < all_pieces) {  // whole warps take part
    Entry<HEADS> entry = row.template times<HEADS>(queries + (place.is_cluster ? 0 : place.m * p.pq_len), place.lane, p.head_dim);
    if (place.is_cluster) {
#pragma unroll
      for (int h = 0; h < HEADS; h++) {
#pragma unroll
        for (u32 lanes = CLUSTER_LANES / 2; lanes > 0; lanes /= 2) {
          entry.x[h] += __shfl_xor_sync(ALL_LANES, entry.x[h], lanes);
        }
      }
    }
    if (place.is_there && place.lane == 0) {
      const u32 m = place.m, row_of = m / SUBSPACES * p.n_centroids + place.c;
      out[place.is_cluster ? of_subspaces + place.c : row_of * SUBSPACES + m % SUBSPACES] = entry;
    }
    const bool are_alike = place.is_cluster || p.n_centroids >= 32;  // of one column
#pragma unroll
    for (int h = 0; h < HEADS; h++) {
      u32 largest = place.is_there ? rank_of(entry.x[h]) : 0, smallest = largest ? ~largest : 0;
      if (are_alike) {
        largest = __reduce_max_sync(ALL_LANES, largest);
        smallest = __reduce_max_sync(ALL_LANES, smallest);
      }
      if ((are_alike ? lane == 0 : place.is_there)) {
        atomicMax(&bounds[place.m].largest[h], largest);
        atomicMax(&bounds[place.m].smallest[h], smallest);
      }
    }
    piece += step;
    place = place_of(piece);
    if (piece < all_pieces) row = load(place);
  }
}

// Copies a bundle's tables to shared memory as integers: all entries of a head in the same steps, those of a column from the
// smallest on. So sums of entries are exact, and `ranges` say what scores they are.
//
// Each lane starts its key's sum at another subspace, so that of the lanes that are served at a time no two meet in a
// bank; where a row has more slots than subspaces, the subspaces are there several times, and so are the clusters.
template <int HEADS>
__device__ void load_tables(const Entry<HEADS>* from, const Bounds<HEADS>* bounds, u8* rows, Range (&ranges)[HEADS],
                            const Decode& p) {
  constexpr u32 SLOTS = ROW_BYTES / sizeof(Packed<HEADS>), OWN = 4;
  __shared__ float smallest[MAX_COLUMNS][HEADS], spans[MAX_COLUMNS][HEADS];
  const u32 columns = p.columns(), of_subspaces = p.pq_dim * p.n_centroids;
  const u32 rows_of_codes = p.pq_dim / SUBSPACES * p.n_centroids;
  Packed<HEADS>* const to = reinterpret_cast<Packed<HEADS>*>(rows);
  // Tables have been written by other blocks: past the first-level cache.
  const auto load = [&](u32 i) {
    Entry<HEADS> entry;
    if constexpr (HEADS == 4) {
      const float4 x = __ldcg(reinterpret_cast<const float4*>(&from[i]));
      entry.x[0] = x.x, entry.x[1] = x.y, entry.x[2] = x.z, entry.x[3] = x.w;
    } else {
#pragma unroll
      for (int h = 0; h < HEADS; h++) entry.x[h] = __ldcg(&from[i].x[h]);
    }
    return entry;
  };
  const bool has_cluster = threadIdx.x < p.n_clusters;
  Entry<HEADS> entries[OWN], of_cluster = {};
  const auto load_all = [&](u32 first) {
#pragma unroll
    for (u32 i = 0; i < OWN; i++) {
      const u32 at = first + i * THREADS + threadIdx.x;
      if (at < of_subspaces) entries[i] = load(at);
    }
  };
  if (has_cluster) of_cluster = load(of_subspaces + threadIdx.x);
  load_all(0);
  __syncthreads();  // the tables of the bundle before have been read
  for (u32 i = threadIdx.x; i < columns * HEADS; i += THREADS) {
    const Bounds<HEADS>& of_column = bounds[i / HEADS];
    const u32 least = __ldcg(&of_column.smallest[i % HEADS]), most = __ldcg(&of_column.largest[i % HEADS]);
    const float low = of_rank(least ? ~least : 0), high = of_rank(most);
    smallest[i / HEADS][i % HEADS] = low;
    spans[i / HEADS][i % HEADS] = high - low;
  }
  __syncthreads();
  float per_step[HEADS];
#pragma unroll
  for (int h = 0; h < HEADS; h++) {
    float low = 0, span = 0;
    for (u32 column = 0; column < columns; column++) low += smallest[column][h], span += spans[column][h];
    // A power of two, so that what lies on a grid stays there.
    const u32 step = (__float_as_uint(fmaxf(span / LARGEST_SCORE, 1e-30f)) + 0x7fffff) & 0x7f800000;
    per_step[h] = __uint_as_float(0x7f000000 - step);
    ranges[h] = {low, __uint_as_float(step)};
  }
  const auto pack = [&](const Entry<HEADS>& entry, u32 column) {
    Packed<HEADS> packed;
#pragma unroll
    for (int h = 0; h < HEADS; h++) {
      const float above = fminf(fmaxf(entry.x[h] - smallest[column][h], 0.0f), spans[column][h]);  // NaN is 0
      packed.set(h, __float2uint_rn(above * per_step[h]));
    }
    return packed;
  };
  for (u32 first = 0; first < of_subspaces; first += OWN * THREADS) {
    if (first) load_all(first);
#pragma unroll
    for (u32 i = 0; i < OWN; i++) {
      const u32 at = first + i * THREADS + threadIdx.x;
      if (at >= of_subspaces) continue;
      const u32 column = at / (SUBSPACES * p.n_centroids) * SUBSPACES + at % SUBSPACES;
      const Packed<HEADS> packed = pack(entries[i], column);
#pragma unroll
      for (u32 copy = 0; copy < SLOTS; copy += SUBSPACES) to[at / SUBSPACES * SLOTS + copy + at % SUBSPACES] = packed;
    }
  }
  if (has_cluster) {
    const Packed<HEADS> packed = pack(of_cluster, p.pq_dim);
#pragma unroll
    for (u32 copy = 0; copy < SLOTS; copy++) {
      to[(rows_of_codes + threadIdx.x) * SLOTS + (copy + threadIdx.x) % SLOTS] = packed;
    }
  }
  __syncthreads();
}
