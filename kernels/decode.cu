// A decode step over an index, in two launches.
//
// A row is a KV head of a sequence; its query heads come in bundles of HEADS, whose numbers lie side by side in tables and
// scores, so that one look-up or load serves all of them. A list is what is selected together: a row's keys by KV head,
// a query head's otherwise. Each row (by query head each bundle) is shared by a team of `splits` blocks, which take turns
// at its keys, 128 at a time.
//
// `search` runs all blocks at once, a block a multiprocessor. Scores stay where they are made, in shared memory as far as
// there is room; a team meets where one of its blocks needs what others found:
// 1. tables: query . centroid, an entry for each centroid and cluster. Each block makes some.
// 2. scores: entries added up for each key. By KV head a block's softmax statistics, by query head the histograms.
// 3. shares, by KV head: each head's softmax, whose sum over the group is a key's mass, and the masses' histogram.
// 4. selection: the histogram says in which bin the selection ends. Keys in higher bins are listed, those in lower ones add
//    to the tail's mass of their cluster, and those in the bin stay open.
//
// `attend`: each block ranks the open keys of its lists, which says at which of them the selection ends. Then it attends to
// what it listed, to its part of the sinks and of the window, and to some of the clusters. The last block of a bundle brings
// the partial results together.
//
// Sums of integers, in histograms and in the tail's masses, do not depend on the order; what is in f32 has a fixed one. So
// the result is the same in each run. What counts up over a step is left at zero for the next.
#include "common.cuh"

constexpr int THREADS = 512;
constexpr int WARPS = THREADS / 32;
// Those of `attend`: what its warps leave each other must fit shared memory.
template <int D>
constexpr int ATTEND_THREADS = D > 128 ? 256 : 512;
constexpr u32 MAX_SPLITS = 64;
constexpr u32 MAX_CLUSTERS = 256;
constexpr u32 MAX_GROUP = 64;

// Keys that a warp takes at a time: four adjacent ones a lane.
constexpr u32 EACH = 4;
constexpr u32 CHUNK = 32 * EACH;

// Where the scores of a key are: those that the lanes of a warp write or read at once lie side by side.
__device__ inline u32 score_slot(u32 position) {
  return position / CHUNK * CHUNK + position % EACH * 32 + position % CHUNK / EACH;
}

template <u32 X>
struct Constant {
  static constexpr u32 value = X;
};

// Subspaces of a row of the tables in shared memory, which is as long as all banks: 32 / HEADS entries.
constexpr u32 SUBSPACES = 8;
constexpr u32 ROW_BYTES = 128;

// Bins of a histogram. Masses want more: their bins are not as even.
constexpr u32 MAX_BINS = 4096;
template <bool BY_KV>
constexpr u32 BINS = BY_KV ? MAX_BINS : 2048;

// Open keys whose ranks are kept.
constexpr u32 KEPT = 256;

// Positions of a list that a block resolves before it attends.
constexpr u32 RESOLVED = 256;

struct Decode {
  View<4> query;
  View<4> keys;
  View<4> values;
  View<3> codes;     // of a position: pq_dim bytes, without gaps between positions
  View<3> clusters;  // of a position: a byte
  View<5> centroids;
  View<4> coarse;
  View<4> sums;
  View<3> counts;
  Step step;
  u64 room;  // positions that the buffers have room for, a multiple of CHUNK
  u32 h;
  u32 h_kv;
  u32 group;
  u32 bundles;  // a row
  u32 splits;
  u32 per_warp;  // the most keys that a warp of a split may have: the lists' room for them
  u32 histogram_at;   // where it is in the shared memory of `search`: behind the tables and the tail's masses
  u32 shared_chunks;  // of scores, which come behind it
  u32 head_dim;
  u32 pq_dim;
  u32 pq_len;
  u32 n_centroids;
  u32 n_clusters;  // 0 for none
  u32 has_tail;
  float scale;
};

// Numbers of a bundle's heads.
template <int HEADS>
struct alignas(4 * HEADS) Entry {
  float x[HEADS];
};

// The largest product of a block's keys with a head's query, and the sum of 2^(product - largest).
struct Stats {
  float largest;
  float sum;
};

__device__ inline float exp2_approx(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

// Of LANES adjacent lanes together.
template <int LANES>
__device__ inline Stats reduce(Stats own) {
  float largest = own.largest;
#pragma unroll
  for (int lanes = LANES / 2; lanes > 0; lanes /= 2) largest = fmaxf(largest, __shfl_xor_sync(ALL_LANES, largest, lanes));
  float sum = own.sum * exp2_approx(own.largest - finite(largest));
#pragma unroll
  for (int lanes = LANES / 2; lanes > 0; lanes /= 2) sum += __shfl_xor_sync(ALL_LANES, sum, lanes);
  return {largest, sum};
}

// What is known of a list. Zeroed once. Rust: SEARCH_WORDS in ops/decode/fused.rs.
struct Search {
  u32 histogram[MAX_BINS];
  u64 open[KEPT];  // ranks of the first keys in the bin in which the selection ends
  u32 n_open;      // all of them
  u32 arrived;     // blocks that came to a meeting of the team
  float top;       // upper end of that bin
  u32 wanted;      // keys of it that are selected
  float shifts[MAX_GROUP];  // by KV head: of each head's scores, to its shares
  u32 padding[4];
};

// How many of a warp's keys are listed, and how many may be.
struct alignas(8) Listed {
  u32 sure;
  u32 open;
};

// A row and this block's keys of it. Sizes of a sequence fit 32 bits, as its length does.
struct Part {
  u32 b;
  u32 kv;
  u32 row;
  u32 bundle;  // of the row
  u32 first_head;
  u32 heads;
  u32 n;
  u32 begin;  // candidates
  u32 end;
  u32 sink;
  u32 window_start;

  __device__ Part(const u32* lens, u32 y, u32 heads_per_bundle, const Decode& p) {
    bundle = y % p.bundles;
    row = y / p.bundles;
    b = row / p.h_kv;
    kv = row % p.h_kv;
    first_head = kv * p.group + bundle * heads_per_bundle;
    heads = min(heads_per_bundle, p.group - bundle * heads_per_bundle);
    n = static_cast<u32>(p.step.length(lens, b));
    begin = static_cast<u32>(p.step.init_offset);
    end = n - static_cast<u32>(min(p.step.window, u64{n}));
    sink = static_cast<u32>(min(p.step.sink, u64{n}));
    window_start = max(end, sink);
  }

  // The first position of a lane's keys, the `i`-th time.
  __device__ u32 position(u32 i, u32 warps, u32 splits) const {
    return ((i * warps + threadIdx.x / 32) * splits + blockIdx.x) * CHUNK + threadIdx.x % 32 * EACH;
  }
};

// Of two that are equal the one in front is better.
__device__ inline u64 rank_of(float x, u32 position) { return static_cast<u64>(rank_of(x)) << 32 | ~position; }

// Bins of masses, which do not decrease with the mass, for masses that are at most `best`: the upper half of them evenly
// in the bits of a float from `low` on, the lower half 64 to a power of two below.
struct MassBins {
  static constexpr int HALF = BINS<true> / 2, LOWER_SHIFT = 17;
  int low;
  int shift;

  MassBins() = default;
  __device__ MassBins(float low, float best) : low(__float_as_int(low)) {
    shift = max(32 - __clz(max(__float_as_int(best) - this->low, 1) / HALF), 0);
  }
  __device__ u32 of(float mass) const {
    const int above = (isnan(mass) ? 0 : __float_as_int(mass)) - low;
    return above < 0 ? max(HALF + (above >> LOWER_SHIFT), 0) : HALF + min(above >> shift, HALF - 1);
  }
  __device__ float bottom_of(u32 bin) const {
    const int above = static_cast<int>(bin) - HALF;
    if (bin == 0) return 0;
    return __int_as_float(above < 0 ? max(low + above * (1 << LOWER_SHIFT), 0) : low + (above << shift));
  }
  __device__ float top_of(u32 bin) const { return bottom_of(bin + 1); }

  // What is_below has instead of a bin.
  __device__ float edge_of(u32 bin) const { return bottom_of(bin); }
  __device__ bool is_below(float mass, float edge) const { return mass < edge; }
};

// Bins of scores: as wide as each other between two bounds.
struct ScoreBins {
  static constexpr u32 LAST = BINS<false> - 1;
  float high;
  float per_bin;
  float width;

  ScoreBins() = default;
  __device__ ScoreBins(float low, float high) : high(high) {
    width = (high - low) / LAST;
    per_bin = width > 0 ? fminf(1 / width, 1e38f) : 0;
  }
  __device__ u32 of(float score) const {
    const float below = fminf(fmaxf((high - score) * per_bin, 0.0f), static_cast<float>(LAST));
    return isnan(score) ? 0 : LAST - static_cast<u32>(below);
  }
  __device__ float top_of(u32 bin) const { return high - static_cast<float>(LAST - bin) * width; }

  // What is_below has instead of a bin.
  __device__ float edge_of(u32 bin) const { return bin == 0 ? INFINITY : static_cast<float>(LAST + 1 - bin); }
  __device__ bool is_below(float score, float edge) const { return (high - score) * per_bin >= edge; }
};

// What the largest weight of a tail is in integers, where a block adds up `keys`: their sum fits 32 bits, and the largest
// the mantissa of an f32.
__device__ inline float tail_unit(u32 keys) { return static_cast<float>(1u << min(__clz(max(keys, 2u) - 1) - 1, 22)); }

// Where the weight of a key is cut off, between 0 and 1: evenly spread over the keys, so that their sum is not biased by
// weights that are small beside the unit.
__device__ inline float cut_of(u32 position) { return __uint_as_float(0x3f800000 | __brev(position) >> 9) - 1.0f; }

// A weight in units as an integer; none is above the unit of the largest. NaN is 0.
__device__ inline u32 in_units(float weight, float unit, float cut) {
  constexpr float TO_INTEGER = 1 << 23;
  return weight > 0 ? __float_as_uint(__fadd_rd(fminf(weight, unit) + cut, TO_INTEGER)) & 0x7fffff : 0;
}

// The sum of `x` over the threads before this one, and over all.
__device__ inline u32 scan(u32 x, u32* total) {
  __shared__ u32 sums[WARPS];
  const u32 warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  u32 sum = x;
#pragma unroll
  for (int lanes = 1; lanes < 32; lanes *= 2) {
    const u32 other = __shfl_up_sync(ALL_LANES, sum, lanes);
    if (lane >= lanes) sum += other;
  }
  __syncthreads();
  if (lane == 31) sums[warp] = sum;
  __syncthreads();
  u32 all = lane < WARPS ? sums[lane] : 0;
#pragma unroll
  for (int lanes = 1; lanes < WARPS; lanes *= 2) {
    const u32 other = __shfl_up_sync(ALL_LANES, all, lanes);
    if (lane >= lanes) all += other;
  }
  *total = __shfl_sync(ALL_LANES, all, WARPS - 1);
  const u32 before = __shfl_sync(ALL_LANES, all, max(static_cast<int>(warp), 1) - 1);
  return sum - x + (warp ? before : 0);
}

// Has what is at `from` come to the second-level cache.
__device__ inline void prefetch(const u8* from) { asm volatile("prefetch.global.L2 [%0];" ::"l"(from)); }

// Entries of the tables of a bundle: pq_dim / SUBSPACES times [n_centroids, SUBSPACES], then the clusters'.
__device__ inline u32 table_entries(const Decode& p) { return p.pq_dim * p.n_centroids + p.n_clusters; }

// Waits for the other blocks of a team, whose `turn`-th meeting this is: what they wrote before can be read then. All of
// them must be running, which a cooperative launch sees to.
__device__ inline void meet(u32* arrived, u32 blocks, u32 turn) {
  __syncthreads();
  if (blocks == 1) return;
  if (threadIdx.x == 0) {
    // In the order of the memory model: what the block did is released, what the others did is acquired.
    asm volatile("red.release.gpu.global.add.u32 [%0], 1;" ::"l"(arrived) : "memory");
    u32 count;
    do {
      asm volatile("ld.acquire.gpu.global.u32 %0, [%1];" : "=r"(count) : "l"(arrived) : "memory");
    } while (count < blocks * turn);
  }
  __syncthreads();
}

// Finds the bin in which the `k` best end, and how many of it are among them: the counts of BINS bins are at `counts`,
// which is in shared memory, or is what other blocks wrote. Bin MAX_BINS where there are fewer.
template <u32 BINS>
__device__ void find_bin(const u32* counts, u32 k, u32* bin, u32* wanted) {
  constexpr u32 OWN = BINS / THREADS;  // bins a thread, from the top
  const u32 lowest = BINS - OWN * (threadIdx.x + 1);
  u32 own[OWN], all = 0, total;
#pragma unroll
  for (u32 i = 0; i < OWN; i += 4) {
    const uint4 four = *reinterpret_cast<const uint4*>(&counts[lowest + i]);
    own[i] = four.x, own[i + 1] = four.y, own[i + 2] = four.z, own[i + 3] = four.w;
  }
  if (threadIdx.x == 0) *bin = MAX_BINS, *wanted = 0;
#pragma unroll
  for (u32 i = 0; i < OWN; i++) all += own[i];
  u32 before = scan(all, &total);
#pragma unroll
  for (int i = OWN - 1; i >= 0; i--) {
    if (before < k && k <= before + own[i]) *bin = lowest + i, *wanted = k - before;
    before += own[i];
  }
  __syncthreads();
}

// Adds a block's histogram to that of its list. Where the block alone has `k` keys in bins that are as good, the selection
// ends no further down: those below are left out.
template <u32 BINS>
__device__ void add_histogram(const u32* own, u32 k, Search& search) {
  __shared__ u32 bin, wanted;
  __syncthreads();
  find_bin<BINS>(own, k, &bin, &wanted);
  const u32 lowest = bin == MAX_BINS ? 0 : bin;
  for (u32 i = lowest + threadIdx.x; i < BINS; i += THREADS) {
    if (own[i]) atomicAdd(&search.histogram[i], own[i]);
  }
}

// Scores of a block's keys, a chunk of a warp's keys of a bundle at a time: in shared memory as far as there is room.
template <int HEADS>
struct Scores {
  Entry<HEADS>* shared;
  Entry<HEADS>* global;  // of the block's first bundle
  u32 n_shared;
  u32 bundles;
  u64 room;

  // The `local`-th chunk of this block, the `chunk`-th of all.
  __device__ void load(u32 local, u32 chunk, u32 bundle, Entry<HEADS> (&x)[EACH]) const {
    const u32 at = local * bundles + bundle, lane = threadIdx.x % 32;
    if (at < n_shared) {
#pragma unroll
      for (u32 j = 0; j < EACH; j++) x[j] = shared[at * CHUNK + j * 32 + lane];
    } else {
#pragma unroll
      for (u32 j = 0; j < EACH; j++) x[j] = global[bundle * room + chunk * CHUNK + j * 32 + lane];
    }
  }
  __device__ Entry<HEADS> one(u32 local, u32 chunk, u32 bundle, u32 j) const {
    const u32 at = local * bundles + bundle, key = j * 32 + threadIdx.x % 32;
    return at < n_shared ? shared[at * CHUNK + key] : global[bundle * room + chunk * CHUNK + key];
  }
  __device__ void store(u32 local, u32 chunk, u32 bundle, const Entry<HEADS> (&x)[EACH]) const {
    const u32 at = local * bundles + bundle, lane = threadIdx.x % 32;
    if (at < n_shared) {
#pragma unroll
      for (u32 j = 0; j < EACH; j++) shared[at * CHUNK + j * 32 + lane] = x[j];
    } else {
#pragma unroll
      for (u32 j = 0; j < EACH; j++) global[bundle * room + chunk * CHUNK + j * 32 + lane] = x[j];
    }
  }
};

// Lanes that share an entry of a cluster, which is as long as a key.
constexpr u32 ENTRY_LANES = 8;

// The products of each head's query, `queries`, with every LANES-th four elements of a centroid.
template <int HEADS, u32 LANES>
__device__ inline Entry<HEADS> product_of(const float* centroid, const float* queries, u32 lane, u32 len, u32 head_dim) {
  Entry<HEADS> entry = {};
#pragma unroll 4
  for (u32 j = lane * 4; j < len; j += LANES * 4) {
    const float4 x = __ldg(reinterpret_cast<const float4*>(centroid + j));
#pragma unroll
    for (int h = 0; h < HEADS; h++) {
      const float4 y = *reinterpret_cast<const float4*>(&queries[h * head_dim + j]);
      entry.x[h] += x.x * y.x + x.y * y.y + x.z * y.z + x.w * y.w;
    }
  }
  return entry;
}

// This block's share of the tables of a bundle: of the subspaces' entries a thread each, of the clusters' eight lanes each,
// from the last thread on, since there are mostly threads for both at once.
template <int HEADS, class T>
__device__ void make_tables(const T* query, const float* centroids, const float* coarse, Entry<HEADS>* out,
                            float* queries, const Part& part, u32 bundle, const Decode& p) {
  const u32 first_head = part.kv * p.group + bundle * HEADS, heads = min(HEADS, p.group - bundle * HEADS);
  __syncthreads();  // the queries of the bundle before have been read
  for (u32 i = threadIdx.x; i < HEADS * p.head_dim; i += THREADS) {
    const u32 head = i / p.head_dim, e = i % p.head_dim;
    queries[i] = head < heads ? widen(query[p.query.at(part.b, first_head + head, 0, e)]) : 0;
  }
  __syncthreads();
  const u32 of_subspaces = p.pq_dim * p.n_centroids;
  const u32 own = (of_subspaces + p.splits - 1) / p.splits, begin = blockIdx.x * own, end = min(begin + own, of_subspaces);
  for (u32 i = begin + threadIdx.x; i < end; i += THREADS) {
    const u32 m = i / p.n_centroids, c = i % p.n_centroids;
    const float* const centroid = centroids + p.centroids.at(part.b, part.kv, m, c);
    out[(m / SUBSPACES * p.n_centroids + c) * SUBSPACES + m % SUBSPACES] =
        product_of<HEADS, 1>(centroid, queries + m * p.pq_len, 0, p.pq_len, p.head_dim);
  }
  const u32 own_clusters = (p.n_clusters + p.splits - 1) / p.splits, first = blockIdx.x * own_clusters;
  const u32 last = min(first + own_clusters, p.n_clusters), thread = THREADS - 1 - threadIdx.x, lane = thread % ENTRY_LANES;
  for (u32 i = thread / 32 * 4; i < own_clusters; i += THREADS / ENTRY_LANES) {  // whole warps take part
    const u32 c = first + i + thread % 32 / ENTRY_LANES;
    Entry<HEADS> entry = {};
    if (c < last) {
      const float* const centroid = coarse + p.coarse.at(part.b, part.kv, c);
      entry = product_of<HEADS, ENTRY_LANES>(centroid, queries, lane, p.head_dim, p.head_dim);
    }
#pragma unroll
    for (int h = 0; h < HEADS; h++) {
#pragma unroll
      for (u32 lanes = ENTRY_LANES / 2; lanes > 0; lanes /= 2) {
        entry.x[h] += __shfl_xor_sync(ALL_LANES, entry.x[h], lanes);
      }
    }
    if (lane == 0 && c < last) out[of_subspaces + c] = entry;
  }
}

// Copies a bundle's tables to shared memory, each entry rounded to a multiple of what is 2^-23 of a power of two above the
// largest magnitude that a sum of entries may have: sums of those are exact, and so the same in any order.
//
// Each lane starts its key's sum at another subspace, so that of the lanes that are served at a time no two meet in a
// bank; where a row has more slots than subspaces, the subspaces are there several times, and so are the clusters.
// `low` and `high` are bounds of a head's sums.
template <int HEADS>
__device__ void load_tables(const Entry<HEADS>* from, u8* rows, float (&low)[HEADS], float (&high)[HEADS],
                            const Decode& p) {
  constexpr u32 SLOTS = ROW_BYTES / sizeof(Entry<HEADS>);
  constexpr u32 COLUMNS = 2 * SUBSPACES;  // of bounds: subspaces, and the clusters
  constexpr u32 SUMMING_LANES = HEADS * COLUMNS < 32 ? (1u << HEADS * COLUMNS % 32) - 1 : ALL_LANES;
  __shared__ float of_warps[2][HEADS][SUBSPACES + 1][WARPS + 1];
  __shared__ float bounds[3][HEADS];  // the smallest, the largest, and the magnitude of a sum of entries
  const u32 lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const u32 of_subspaces = p.pq_dim * p.n_centroids, rows_of_codes = p.pq_dim / SUBSPACES * p.n_centroids;
  Entry<HEADS>* const to = reinterpret_cast<Entry<HEADS>*>(rows);
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
  // A thread's bounds, of which those of lanes STEP apart are of one table, into those of its warp.
  const auto leave_bounds = [&](auto step, const Entry<HEADS>& smallest, const Entry<HEADS>& largest, u32 column) {
    constexpr u32 STEP = decltype(step)::value;
#pragma unroll
    for (int h = 0; h < HEADS; h++) {
      float x = smallest.x[h], y = largest.x[h];
#pragma unroll
      for (u32 lanes = 16; lanes >= STEP; lanes /= 2) {
        x = fminf(x, __shfl_xor_sync(ALL_LANES, x, lanes));
        y = fmaxf(y, __shfl_xor_sync(ALL_LANES, y, lanes));
      }
      if (lane < STEP) of_warps[0][h][column + lane][warp] = x, of_warps[1][h][column + lane][warp] = y;
    }
  };
  __syncthreads();  // the tables of the bundle before have been read
  const bool has_cluster = threadIdx.x < p.n_clusters;
  Entry<HEADS> of_cluster = {};
  if (has_cluster) of_cluster = load(of_subspaces + threadIdx.x);
  const u32 of_chunk = SUBSPACES * p.n_centroids, head = threadIdx.x / COLUMNS, column = threadIdx.x % COLUMNS;
  float sums[3] = {};  // of a table and a head, in the first threads
  for (u32 first = 0; first < of_subspaces; first += of_chunk) {
    Entry<HEADS> smallest, largest;
#pragma unroll
    for (int h = 0; h < HEADS; h++) smallest.x[h] = INFINITY, largest.x[h] = -INFINITY;
#pragma unroll 4
    for (u32 i = first + threadIdx.x; i < first + of_chunk; i += THREADS) {
      const Entry<HEADS> entry = load(i);
#pragma unroll
      for (int h = 0; h < HEADS; h++) {
        smallest.x[h] = fminf(smallest.x[h], entry.x[h]);
        largest.x[h] = fmaxf(largest.x[h], entry.x[h]);
      }
#pragma unroll
      for (u32 copy = 0; copy < SLOTS; copy += SUBSPACES) to[i / SUBSPACES * SLOTS + copy + i % SUBSPACES] = entry;
    }
    leave_bounds(Constant<SUBSPACES>(), smallest, largest, 0);
    if (first == 0 && p.n_clusters) {
#pragma unroll
      for (int h = 0; h < HEADS; h++) {
        smallest.x[h] = has_cluster ? of_cluster.x[h] : INFINITY;
        largest.x[h] = has_cluster ? of_cluster.x[h] : -INFINITY;
      }
      leave_bounds(Constant<1>(), smallest, largest, SUBSPACES);
#pragma unroll
      for (u32 copy = 0; copy < SLOTS; copy++) {
        if (has_cluster) to[(rows_of_codes + threadIdx.x) * SLOTS + (copy + lane) % SLOTS] = of_cluster;
      }
    }
    __syncthreads();
    if (head < HEADS && (column < SUBSPACES || (column == SUBSPACES && first == 0 && p.n_clusters))) {
      float x = INFINITY, y = -INFINITY;
#pragma unroll
      for (u32 w = 0; w < WARPS; w++) x = fminf(x, of_warps[0][head][column][w]), y = fmaxf(y, of_warps[1][head][column][w]);
      sums[0] += x, sums[1] += y, sums[2] += fmaxf(-x, y);
    }
    __syncthreads();
  }
  if (threadIdx.x < HEADS * COLUMNS) {
#pragma unroll
    for (int i = 0; i < 3; i++) {
#pragma unroll
      for (int lanes = COLUMNS / 2; lanes > 0; lanes /= 2) sums[i] += __shfl_xor_sync(SUMMING_LANES, sums[i], lanes);
      if (column == 0) bounds[i][head] = sums[i];
    }
  }
  __syncthreads();
  float far[HEADS];
#pragma unroll
  for (int h = 0; h < HEADS; h++) {
    low[h] = fminf(fmaxf(bounds[0][h], -1e38f), 1e38f);
    high[h] = fminf(fmaxf(bounds[1][h], -1e38f), 1e38f);
    // Adding and taking away 1.5 * 2^23 units rounds to a unit.
    const int exponent = static_cast<int>(__float_as_uint(bounds[2][h]) >> 23) - 126 - 23;
    far[h] = __uint_as_float(static_cast<u32>(min(max(exponent, -100), 100) + 127) << 23) * 0x1.8p23f;
  }
  for (u32 i = threadIdx.x; i < (rows_of_codes + p.n_clusters) * SLOTS; i += THREADS) {
    Entry<HEADS> entry = to[i];
#pragma unroll
    for (int h = 0; h < HEADS; h++) entry.x[h] = __fsub_rn(__fadd_rn(entry.x[h], far[h]), far[h]);
    to[i] = entry;
  }
  __syncthreads();
}

// Adds up the entries of this block's keys. By KV head returns a thread's statistics of the softmax, by query head counts
// in `histogram`.
template <int HEADS, bool BY_KV>
__device__ void add_entries(const u8* codes, const u8* clusters, const u8* rows, const Scores<HEADS>& scores, u32 bundle,
                            Stats (&stats)[HEADS], u32* histogram, const ScoreBins* bins, const Part& part,
                            const Decode& p) {
  constexpr u32 SLOTS = ROW_BYTES / sizeof(Entry<HEADS>);
  const u32 lane = threadIdx.x % 32, warp = threadIdx.x / 32, chunks = p.pq_dim / SUBSPACES;
  const u8* const coarse_rows = rows + chunks * p.n_centroids * ROW_BYTES;
  const u32 slot = lane % SLOTS, start = slot % SUBSPACES;
  // The subspaces in a lane's order: start, start ^ 1, start ^ 2, ... The last four are the first with one bit flipped.
  constexpr u32 FLIP = SUBSPACES / 2;
  u32 order[2] = {}, offsets[FLIP];
#pragma unroll
  for (u32 j = 0; j < SUBSPACES; j++) {
    order[j / 4] |= (start ^ j) << j % 4 * 4;
    if (j < FLIP) offsets[j] = (slot - start + (start ^ j)) * sizeof(Entry<HEADS>);
  }
  const u32 code_mask = (p.n_centroids - 1) * ROW_BYTES, cluster_mask = p.n_clusters - 1;
  const float scale = p.scale * LOG2_E;
#pragma unroll
  for (int h = 0; h < HEADS; h++) stats[h] = {-INFINITY, 0};
  // Codes of what comes next are on their way.
  uint2 next[EACH];
  u32 next_clusters = 0;
  const auto load = [&](u32 at, u32 chunk) {
    if (at >= part.end) return;
    const u8* const from = codes + static_cast<u64>(at) * p.pq_dim + chunk * SUBSPACES;
#pragma unroll
    for (u32 j = 0; j < EACH; j++) next[j] = __ldg(reinterpret_cast<const uint2*>(from + j * p.pq_dim));
    if (chunk == 0 && p.n_clusters) next_clusters = __ldg(reinterpret_cast<const u32*>(clusters + at));
  };
  u32 at = part.position(0, WARPS, p.splits);
  load(at, 0);
  for (u32 i = 0; at - lane * EACH < part.end; i++) {
    const u32 later = part.position(i + 1, WARPS, p.splits);
    Entry<HEADS> x[EACH] = {};
    if (p.n_clusters) {
#pragma unroll
      for (u32 j = 0; j < EACH; j++) {
        x[j] = reinterpret_cast<const Entry<HEADS>*>(coarse_rows + (next_clusters >> j * 8 & cluster_mask) * ROW_BYTES)[slot];
      }
    }
#pragma unroll 1
    for (u32 chunk = 0; chunk < chunks; chunk++) {
      const u8* const table = rows + chunk * p.n_centroids * ROW_BYTES;
      uint2 bytes[EACH];
#pragma unroll
      for (u32 j = 0; j < EACH; j++) bytes[j] = next[j];
      const bool is_last = chunk + 1 == chunks;
      load(is_last ? later : at, is_last ? 0 : chunk + 1);
#pragma unroll
      for (u32 j = 0; j < EACH; j++) {
        const u32 turned[2] = {__byte_perm(bytes[j].x, bytes[j].y, order[0]),
                               __byte_perm(bytes[j].x, bytes[j].y, order[1])};
#pragma unroll
        for (u32 m = 0; m < SUBSPACES; m++) {
          // A code in the place of its row's offset; the mask keeps a byte that is no code inside the table.
          const u32 word = turned[m / 4], row = m % 4 == 0 ? word << 7 : word >> (m % 4 * 8 - 7);
          u32 offset = (row & code_mask) | offsets[m % FLIP];
          if (m >= FLIP) offset ^= FLIP * sizeof(Entry<HEADS>);
          const Entry<HEADS> entry = *reinterpret_cast<const Entry<HEADS>*>(table + offset);
#pragma unroll
          for (int h = 0; h < HEADS; h++) x[j].x[h] += entry.x[h];
        }
      }
    }
    scores.store(i * WARPS + warp, at / CHUNK, bundle, x);
    if constexpr (BY_KV) {
#pragma unroll
      for (int h = 0; h < HEADS; h++) {
        float larger = stats[h].largest, product[EACH];
#pragma unroll
        for (u32 j = 0; j < EACH; j++) {
          product[j] = at + j >= part.begin && at + j < part.end ? x[j].x[h] * scale : -INFINITY;
          larger = fmaxf(larger, product[j]);
        }
        stats[h].sum *= exp2_approx(stats[h].largest - finite(larger));
        stats[h].largest = larger;
#pragma unroll
        for (u32 j = 0; j < EACH; j++) stats[h].sum += exp2_approx(product[j] - finite(larger));
      }
    } else {
#pragma unroll
      for (u32 j = 0; j < EACH; j++) {
        if (at + j < part.begin || at + j >= part.end) continue;
#pragma unroll
        for (int h = 0; h < HEADS; h++) atomicAdd(&histogram[h * BINS<false> + bins[h].of(x[j].x[h])], 1);
      }
    }
    at = later;
  }
}

// The softmax statistics of a bundle's head over all keys; to a whole warp.
template <int HEADS>
__device__ Stats find_stats(const Stats* stats, u32 bundle, u32 head, u32 splits) {
  const u32 lane = threadIdx.x % 32;
  Stats own[MAX_SPLITS / 32];
#pragma unroll
  for (u32 i = 0; i < MAX_SPLITS / 32; i++) {
    const u32 split = i * 32 + lane;
    own[i] = {-INFINITY, 0};
    if (split < splits) {
      const float2 both = __ldcg(reinterpret_cast<const float2*>(&stats[(bundle * MAX_SPLITS + split) * HEADS + head]));
      own[i] = {both.x, both.y};
    }
  }
#pragma unroll
  for (u32 i = 1; i < MAX_SPLITS / 32; i++) {
    const float largest = fmaxf(own[0].largest, own[i].largest);
    own[0] = {largest, own[0].sum * exp2_approx(own[0].largest - finite(largest)) +
                           own[i].sum * exp2_approx(own[i].largest - finite(largest))};
  }
  return reduce<32>(own[0]);
}

// What turns a score into its share of the softmax, 2^(score * scale - shift).
__device__ inline float shift_of(Stats all) { return all.largest + log2f(all.sum); }

// Turns the scores of this block's keys into shares of their heads' softmax, 0 for those that are no candidates, and counts
// the sums over a key's heads in `histogram`.
template <int HEADS>
__device__ void add_shares(const Scores<HEADS>& scores, const float* shifts, u32* histogram, const MassBins& bins,
                           const Part& part, const Decode& p) {
  const u32 lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const float scale = p.scale * LOG2_E;
  u32 at = part.position(0, WARPS, p.splits);
  for (u32 i = 0; at - lane * EACH < part.end; at = part.position(++i, WARPS, p.splits)) {
    float mass[EACH] = {};
    for (u32 bundle = 0; bundle < p.bundles; bundle++) {
      Entry<HEADS> x[EACH];
      scores.load(i * WARPS + warp, at / CHUNK, bundle, x);
#pragma unroll
      for (int h = 0; h < HEADS; h++) {
        const float shift = shifts[bundle * HEADS + h];
#pragma unroll
        for (u32 j = 0; j < EACH; j++) {
          const bool is_candidate = at + j >= part.begin && at + j < part.end;
          x[j].x[h] = is_candidate ? exp2_approx(x[j].x[h] * scale - shift) : 0;
          mass[j] += x[j].x[h];
        }
      }
      scores.store(i * WARPS + warp, at / CHUNK, bundle, x);
    }
#pragma unroll
    for (u32 j = 0; j < EACH; j++) {
      if (at + j >= part.begin && at + j < part.end) atomicAdd(&histogram[bins.of(mass[j])], 1);
    }
  }
}

// Grid: (splits, b * h_kv, or b * h_kv * bundles by query head). Blocks of one y are a team.
template <int HEADS, bool BY_KV, class T>
__device__ void search(const T* query, const u8* codes, const u8* clusters, const float* centroids, const float* coarse,
                       const u32* lens, float* tables, float* all_scores, float* masses, Stats* stats, Search* searches,
                       u32* lists, Listed* listed, u32* tail, const Decode& p) {
  constexpr u32 LISTS = BY_KV ? 1 : HEADS, N_BINS = BINS<BY_KV>;
  extern __shared__ __align__(128) u8 rows[];  // tables, and after these the tail's masses; a histogram; scores
  __shared__ float shifts[MAX_GROUP], best_shares[MAX_GROUP];
  __shared__ ScoreBins score_bins[HEADS];
  __shared__ u32 found_bin[LISTS], found_wanted[LISTS];
  const Part part(lens, BY_KV ? blockIdx.y * p.bundles : blockIdx.y, HEADS, p);
  const u32 lane = threadIdx.x % 32, warp = threadIdx.x / 32, k = static_cast<u32>(p.step.selected(part.n));
  const u32 heads = BY_KV ? p.group : part.heads, n_lists = BY_KV ? 1 : part.heads;
  const u32 first_list = BY_KV ? part.row : part.b * p.h + part.first_head;
  const u32 bundles = BY_KV ? p.bundles : 1, first_bundle = part.row * p.bundles + part.bundle;
  u32* const histogram = reinterpret_cast<u32*>(rows + p.histogram_at);
  u32* const tail_units = reinterpret_cast<u32*>(rows);  // [heads, MAX_CLUSTERS]
  const Scores<HEADS> scores = {reinterpret_cast<Entry<HEADS>*>(histogram + LISTS * N_BINS),
                                reinterpret_cast<Entry<HEADS>*>(all_scores) + first_bundle * p.room, p.shared_chunks,
                                bundles, p.room};
  Search& first_search = searches[first_list];
  codes += p.codes.at(part.b, part.kv);
  clusters += p.n_clusters ? p.clusters.at(part.b, part.kv) : 0;
  if (blockIdx.x == 0 && threadIdx.x < n_lists) searches[first_list + threadIdx.x].n_open = 0;
  Entry<HEADS>* const own_tables = reinterpret_cast<Entry<HEADS>*>(tables) + first_bundle * u64{table_entries(p)};
  for (u32 bundle = 0; bundle < bundles; bundle++) {
    make_tables<HEADS>(query, centroids, coarse, own_tables + bundle * table_entries(p),
                       reinterpret_cast<float*>(histogram), part, part.bundle + bundle, p);
  }
  // Codes are on their way to the second-level cache while the tables are brought together.
  u32 at = part.position(0, WARPS, p.splits);
  for (u32 i = 0; at < part.end; at = part.position(++i, WARPS, p.splits)) {
    prefetch(codes + static_cast<u64>(at) * p.pq_dim);
    if (p.n_clusters && lane % 8 == 0) prefetch(clusters + at);
  }
  meet(&first_search.arrived, p.splits, 1);

  for (u32 i = threadIdx.x; i < LISTS * N_BINS; i += THREADS) histogram[i] = 0;
  for (u32 bundle = 0; bundle < bundles; bundle++) {
    float low[HEADS], high[HEADS];
    load_tables<HEADS>(own_tables + bundle * table_entries(p), rows, low, high, p);
    if constexpr (!BY_KV) {
      if (threadIdx.x == 0) {
#pragma unroll
        for (int h = 0; h < HEADS; h++) score_bins[h] = ScoreBins(low[h], high[h]);
      }
      __syncthreads();
    }
    Stats own[HEADS];
    add_entries<HEADS, BY_KV>(codes, clusters, rows, scores, bundle, own, histogram, score_bins, part, p);
    if constexpr (BY_KV) {
      __shared__ Stats of_warps[HEADS][WARPS];
#pragma unroll
      for (int h = 0; h < HEADS; h++) {
        const Stats of_warp = reduce<32>(own[h]);
        if (lane == 0) of_warps[h][warp] = of_warp;
      }
      __syncthreads();
      if (warp < HEADS) {
        const Stats of_block = reduce<WARPS>(of_warps[warp][lane % WARPS]);
        if (lane == 0) stats[((first_bundle + bundle) * MAX_SPLITS + blockIdx.x) * HEADS + warp] = of_block;
      }
    }
  }
  MassBins mass_bins;
  if constexpr (BY_KV) {
    meet(&first_search.arrived, p.splits, 2);
    for (u32 head = warp; head < p.bundles * HEADS; head += WARPS) {
      const Stats all = find_stats<HEADS>(stats, first_bundle + head / HEADS, head % HEADS, p.splits);
      const float shift = head < p.group ? shift_of(all) : INFINITY;  // a share of 0
      if (lane == 0 && head < MAX_GROUP) shifts[head] = shift, best_shares[head] = exp2_approx(all.largest - shift);
    }
    __syncthreads();
    if (blockIdx.x == 0 && threadIdx.x < p.group) first_search.shifts[threadIdx.x] = shifts[threadIdx.x];
    float best = 0;
    for (u32 head = 0; head < p.group; head++) best += best_shares[head];
    mass_bins = MassBins(0.5f * p.group / max(part.end - part.begin, 1u), best);
    add_shares<HEADS>(scores, shifts, histogram, mass_bins, part, p);
    add_histogram<N_BINS>(histogram, k, first_search);
  } else {
    for (u32 list = 0; list < n_lists; list++) {
      add_histogram<N_BINS>(histogram + list * N_BINS, k, searches[first_list + list]);
    }
  }
  meet(&first_search.arrived, p.splits, BY_KV ? 3 : 2);

  for (u32 i = threadIdx.x; p.has_tail && i < heads * MAX_CLUSTERS; i += THREADS) tail_units[i] = 0;
  for (u32 list = 0; list < n_lists; list++) {
    find_bin<N_BINS>(searches[first_list + list].histogram, k, &found_bin[list], &found_wanted[list]);
  }
  u32 bin[LISTS];
  float top[LISTS], edge[LISTS];
  ScoreBins bins[LISTS];
#pragma unroll
  for (u32 list = 0; list < LISTS; list++) {
    bin[list] = list < n_lists ? found_bin[list] : MAX_BINS;
    bins[list] = score_bins[BY_KV ? 0 : list];
    top[list] = BY_KV ? mass_bins.top_of(bin[list]) : bins[list].top_of(bin[list]);
    edge[list] = BY_KV ? mass_bins.edge_of(bin[list]) : bins[list].edge_of(bin[list]);
  }
  const u32 per_split = p.per_warp * WARPS;
  const float unit = tail_unit(per_split), scale = p.scale * LOG2_E;
  // What makes the largest weight that there may be below the bin a unit of the tail: a factor of shares, a shift of scores.
  float to_units[HEADS];
#pragma unroll
  for (int h = 0; h < HEADS; h++) {
    to_units[h] = BY_KV ? unit / top[0] : log2f(unit) - (h < LISTS ? top[h] : 0) * scale;
  }
  u32 n_sure[LISTS] = {}, n_open[LISTS] = {};
  at = part.position(0, WARPS, p.splits);
  const auto load_clusters = [&](u32 at) {
    return p.has_tail && at < part.end ? __ldg(reinterpret_cast<const u32*>(clusters + at)) : 0;
  };
  u32 next_clusters = load_clusters(at);
  for (u32 i = 0; at - lane * EACH < part.end;) {
    const u32 local = i * WARPS + warp, chunk = at / CHUNK, later = part.position(++i, WARPS, p.splits);
    const u32 words = next_clusters;
    next_clusters = load_clusters(later);
    Entry<HEADS> x[EACH];
    float ranked[LISTS][EACH] = {};
    for (u32 bundle = 0; bundle < bundles; bundle++) {
      scores.load(local, chunk, bundle, x);
#pragma unroll
      for (int h = 0; h < HEADS; h++) {
#pragma unroll
        for (u32 j = 0; j < EACH; j++) ranked[BY_KV ? 0 : h][j] += x[j].x[h];  // in the order of add_shares
      }
    }
    u32 below[LISTS] = {};  // a bit a key
#pragma unroll
    for (u32 list = 0; list < LISTS; list++) {
      const u64 segment = ((first_list + list) * static_cast<u64>(p.splits) + blockIdx.x) * WARPS + warp;
      u32* const own = lists + segment * p.per_warp;
#pragma unroll
      for (u32 j = 0; j < EACH; j++) {
        const u32 position = at + j;
        const bool is_candidate = position >= part.begin && position < part.end, is_sink = position < part.sink;
        const float x = ranked[list][j];
        const bool is_below = BY_KV ? mass_bins.is_below(x, edge[list]) : bins[list].is_below(x, edge[list]);
        if (is_below && is_candidate && !is_sink) below[list] |= 1u << j;
        if (!__any_sync(ALL_LANES, !is_below && is_candidate)) continue;
        const u32 in = BY_KV ? mass_bins.of(x) : bins[list].of(x);
        const bool is_sure = is_candidate && in > bin[list] && !is_sink, is_open = is_candidate && in == bin[list];
        const u32 all_sure = __ballot_sync(ALL_LANES, is_sure), all_open = __ballot_sync(ALL_LANES, is_open);
        const u32 before = (1u << lane) - 1;
        if (is_sure) own[n_sure[list] + __popc(all_sure & before)] = position;
        if (is_open) {
          // For `attend`: where it is, its rank, and what it weighs.
          own[p.per_warp - 1 - (n_open[list] + __popc(all_open & before))] = position;
          Search& search = searches[first_list + list];
          const u32 slot = atomicAdd(&search.n_open, 1);
          if (slot < KEPT) search.open[slot] = rank_of(x, position);
          if (BY_KV) masses[part.row * p.room + position] = x;
          for (u32 bundle = 0; bundle < bundles; bundle++) {
            const Entry<HEADS> entry = scores.one(local, chunk, bundle, j);
            float* const to = scores.global[bundle * p.room + score_slot(position)].x;
#pragma unroll
            for (u32 h = 0; h < HEADS; h++) {
              if (BY_KV || h == list) to[h] = entry.x[h];
            }
          }
        }
        n_sure[list] += __popc(all_sure);
        n_open[list] += __popc(all_open);
      }
    }
    if (p.has_tail) {
      float cuts[EACH];
#pragma unroll
      for (u32 j = 0; j < EACH; j++) cuts[j] = cut_of(at + j);
      for (u32 bundle = 0; bundle < bundles; bundle++) {
        if (bundles > 1) scores.load(local, chunk, bundle, x);
#pragma unroll
        for (int h = 0; h < HEADS; h++) {
          const u32 head = bundle * HEADS + h, bits = below[BY_KV ? 0 : h];
          if (head >= heads) continue;
#pragma unroll
          for (u32 j = 0; j < EACH; j++) {
            const float weight = BY_KV ? x[j].x[h] * to_units[h] : exp2_approx(x[j].x[h] * scale + to_units[h]);
            const u32 units = in_units(weight, unit, cuts[j]);
            if ((bits >> j & 1) && units) atomicAdd(&tail_units[head * MAX_CLUSTERS + (words >> j * 8 & 0xff)], units);
          }
        }
      }
    }
    at = later;
  }
  if (lane == 0) {
#pragma unroll
    for (u32 list = 0; list < LISTS; list++) {
      if (list < n_lists) {
        const u64 segment = ((first_list + list) * static_cast<u64>(p.splits) + blockIdx.x) * WARPS + warp;
        listed[segment] = {n_sure[list], n_open[list]};
      }
    }
  }
  __syncthreads();
  if (p.has_tail) {
    const u32 first_head = BY_KV ? part.kv * p.group : part.first_head;
    u32* const to = tail + ((static_cast<u64>(part.b) * p.h + first_head) * p.splits + blockIdx.x * heads) * MAX_CLUSTERS;
    for (u32 i = threadIdx.x; i < heads * MAX_CLUSTERS; i += THREADS) to[i] = tail_units[i];
  }
  if (blockIdx.x == 0 && threadIdx.x == 0) {
#pragma unroll
    for (u32 list = 0; list < LISTS; list++) {
      if (list < n_lists) searches[first_list + list].wanted = found_wanted[list], searches[first_list + list].top = top[list];
    }
  }
}

// A list's keys as they are ranked: masses of a row, or scores of one head of a bundle.
template <int HEADS, bool BY_KV>
struct Ranked {
  const float* from;

  __device__ Ranked(const float* scores, const float* masses, u32 row, u32 bundle, u32 head, const Decode& p) {
    from = BY_KV ? masses + row * p.room : scores + (static_cast<u64>(row) * p.bundles + bundle) * p.room * HEADS + head;
  }
  __device__ float operator[](u32 position) const {
    return BY_KV ? from[position] : from[static_cast<u64>(score_slot(position)) * HEADS];
  }
};

// The segment with the `i`-th of their elements, if `before` counts those in front of each.
template <u32 SEGMENTS>
__device__ inline u32 segment_of(const u32* before, u32 i) {
  u32 segment = 0;
#pragma unroll
  for (u32 half = SEGMENTS / 2; half > 0; half /= 2) segment += before[segment + half] <= i ? half : 0;
  return segment;
}

// Grid: (splits, b * h_kv * bundles). Groups of LANES threads take a key each, eight elements a thread.
template <int HEADS, bool BY_KV, int D, class T>
__device__ void attend(const T* query, const T* keys, const T* values, const u8* clusters, const float* scores,
                       const float* masses, const u32* lens, Search* searches, const u32* lists,
                       const Listed* listed, const float* sums, const u32* counts, const u32* tail, float* partials,
                       float2* partial_stats, u32* arrived, T* out, const Decode& p) {
  constexpr u32 BLOCK = ATTEND_THREADS<D>, WARPS_OF_BLOCK = BLOCK / 32, LANES = D / 8, GROUPS = BLOCK / LANES, LISTS = BY_KV ? 1 : HEADS;
  constexpr u32 LIST_WARPS = WARPS_OF_BLOCK / LISTS, LIST_GROUPS = GROUPS / LISTS;
  // Keys whose loads are on their way at a time, as many as registers hold.
  constexpr bool IS_WIDE = sizeof(T) == 4;
  constexpr int AHEAD = BY_KV ? (HEADS < 4 ? (IS_WIDE ? 2 : 3) : (IS_WIDE ? 1 : 2)) : (IS_WIDE ? 3 : 5);
  constexpr int PER_GROUP = BY_KV ? HEADS : 1;
  // Ranks of open keys, later the warps' results, then sums of splits.
  constexpr u32 MERGED = WARPS_OF_BLOCK * PER_GROUP * D / 4, RANKED = LISTS * KEPT / 2;
  constexpr u32 SCRATCH = MERGED > RANKED ? MERGED : RANKED;
  __shared__ float4 scratch[SCRATCH > BLOCK ? SCRATCH : BLOCK];
  u64(&ranks)[LISTS][KEPT] = *reinterpret_cast<u64(*)[LISTS][KEPT]>(scratch);
  __shared__ alignas(16) float queries[HEADS][D];
  __shared__ float shifts[HEADS];
  __shared__ float tops[WARPS_OF_BLOCK][PER_GROUP], totals[WARPS_OF_BLOCK][PER_GROUP];
  __shared__ unsigned long long tail_units[HEADS][MAX_CLUSTERS];
  __shared__ u32 tail_counts[MAX_CLUSTERS];
  __shared__ u32 before_sure[LISTS][WARPS + 1], before_open[LISTS][WARPS + 1];
  __shared__ u64 pivots[LISTS];
  __shared__ u32 positions[LISTS][RESOLVED];
  u32(&digits)[LISTS][256] = *reinterpret_cast<u32(*)[LISTS][256]>(positions);
  static_assert(RESOLVED >= 256);
  const Part part(lens, blockIdx.y, HEADS, p);
  const u32 tid = threadIdx.x, lane = tid % 32, warp = tid / 32;
  const u32 group = tid / LANES, e = tid % LANES * 8, list = group / LIST_GROUPS;
  const u32 first_list = BY_KV ? part.row : part.b * p.h + part.first_head, n_lists = BY_KV ? 1 : part.heads;
  const float scale = p.scale * LOG2_E;
  const bool is_list = list < n_lists;
  clusters += p.has_tail ? p.clusters.at(part.b, part.kv) : 0;
  // For the next step.
  for (u32 i = blockIdx.x * BLOCK + tid; i < n_lists * BINS<BY_KV>; i += p.splits * BLOCK) {
    searches[first_list + i / BINS<BY_KV>].histogram[i % BINS<BY_KV>] = 0;
  }
  if (blockIdx.x == 0 && tid == 0) searches[first_list].arrived = 0;
  // All loads that wait for nothing, before the first that is waited for.
  constexpr u32 QUERIES = (HEADS * D + BLOCK - 1) / BLOCK;
  float query_values[QUERIES];
#pragma unroll
  for (u32 i = 0; i < QUERIES; i++) {
    const u32 head = (i * BLOCK + tid) / D, j = (i * BLOCK + tid) % D;
    const bool is_there = head < part.heads && j < p.head_dim;
    query_values[i] = is_there ? widen(query[p.query.at(part.b, part.first_head + head, 0, j)]) : 0;
  }
  u32 own_sure = 0, own_open = 0;
  if (warp < n_lists && lane < WARPS) {
    const Listed& own = listed[((first_list + warp) * static_cast<u64>(p.splits) + blockIdx.x) * WARPS + lane];
    own_sure = own.sure, own_open = own.open;
  }
  Search& search = searches[first_list + (BY_KV ? 0 : min(list, n_lists - 1))];
  const u32 wanted = search.wanted, n_open_all = is_list ? search.n_open : 0;
  const float tail_top = search.top, own_shift = BY_KV ? search.shifts[part.bundle * HEADS + tid % HEADS] : 0;
  constexpr u32 LIST_THREADS = BLOCK / LISTS, OPEN = (KEPT + LIST_THREADS - 1) / LIST_THREADS;
  // Open keys that are ranked by comparing all with all, at most one a thread.
  constexpr u32 COMPARED = LIST_THREADS < 128 ? LIST_THREADS : 128;
  u64 open[OPEN];
#pragma unroll
  for (u32 i = 0; i < OPEN; i++) open[i] = search.open[min(i * LIST_THREADS + tid % LIST_THREADS, KEPT - 1)];
  const u32 per_split = p.per_warp * WARPS;
  // This block's clusters.
  const u32 share = (p.n_clusters + p.splits - 1) / p.splits, first_cluster = min(blockIdx.x * share, p.n_clusters);
  const u32 n_own = min(share, p.n_clusters - first_cluster);
  const u32 tail_heads = BY_KV ? p.group : part.heads;  // of a block of `search`
  const u64 tail_first = (static_cast<u64>(part.b) * p.h + (BY_KV ? part.kv * p.group : part.first_head)) * MAX_CLUSTERS;
  if (p.has_tail) {
    // Eight lanes a cluster, of which each adds up some splits.
    constexpr u32 ADDERS = 8;
    const u32 all = part.heads * n_own;
    for (u32 from = 0; from < all; from += BLOCK / ADDERS) {
      const u32 i = min(from + tid / ADDERS, all - 1), head = i / n_own, c = first_cluster + i % n_own;
      const u32* of_split = tail + tail_first * p.splits + (BY_KV ? part.bundle * HEADS + head : head) * MAX_CLUSTERS + c;
      const u32 count = counts[p.counts.at(part.b, part.kv, c)];
      u64 units = 0;
#pragma unroll
      for (u32 k = 0; k < MAX_SPLITS / ADDERS; k++) {
        const u32 split = k * ADDERS + tid % ADDERS;
        if (split < p.splits) units += of_split[split * tail_heads * MAX_CLUSTERS];
      }
#pragma unroll
      for (u32 lanes = ADDERS / 2; lanes > 0; lanes /= 2) units += __shfl_xor_sync(ALL_LANES, units, lanes);
      if (tid % ADDERS == 0 && from + tid / ADDERS < all) {
        tail_units[head][i % n_own] = units;
        tail_counts[i % n_own] = count;
      }
    }
  }
  if (BY_KV && tid < HEADS) shifts[tid] = own_shift;
#pragma unroll
  for (u32 i = 0; i < QUERIES; i++) {
    const u32 head = (i * BLOCK + tid) / D, j = (i * BLOCK + tid) % D;
    if (head < HEADS) queries[head][j] = query_values[i];
  }
  if (warp < LISTS) {
#pragma unroll
    for (int lanes = 1; lanes < WARPS; lanes *= 2) {
      const u32 x = __shfl_up_sync(ALL_LANES, own_sure, lanes), y = __shfl_up_sync(ALL_LANES, own_open, lanes);
      if (lane >= lanes) own_sure += x, own_open += y;
    }
    if (lane < WARPS) before_sure[warp][lane + 1] = own_sure, before_open[warp][lane + 1] = own_open;
    if (lane == 0) before_sure[warp][0] = before_open[warp][0] = 0;
  }
  // Open keys are ranked by all threads of their list.
  if (tid < LISTS) pivots[tid] = ~u64{0};
  const Ranked<HEADS, BY_KV> ranked(scores, masses, part.row, part.bundle, is_list ? list : 0, p);
  const u64 first_segment = (first_list + (is_list ? list : 0)) * static_cast<u64>(p.splits) * WARPS;
  const bool are_kept = n_open_all <= KEPT;
#pragma unroll
  for (u32 i = 0; i < OPEN; i++) {
    const u32 at = i * LIST_THREADS + tid % LIST_THREADS;
    if (at < KEPT) ranks[list][at] = open[i];
  }
  // Calls f with the rank of each.
  const auto each_open = [&](auto f) {
    if (are_kept) {
      for (u32 i = tid % LIST_THREADS; i < n_open_all; i += LIST_THREADS) f(ranks[list][i]);
      return;
    }
    constexpr u32 LIST_WARPS = LIST_THREADS / 32;
    for (u32 i = warp % LIST_WARPS; i < p.splits * WARPS; i += LIST_WARPS) {
      const u32 count = is_list ? listed[first_segment + i].open : 0;
      for (u32 k = lane; k < count; k += 32) {
        const u32 position = lists[(first_segment + i + 1) * p.per_warp - 1 - k];
        f(rank_of(ranked[position], position));
      }
    }
  };
  const bool compares = __syncthreads_and(n_open_all <= COMPARED);
  const u32* const own = lists + first_segment * p.per_warp + static_cast<u64>(blockIdx.x) * per_split;
  const u32 n_sure = before_sure[list][WARPS], n_open = before_open[list][WARPS];
  const auto sure_position = [&](u32 row) {
    const u32 segment = segment_of<WARPS>(before_sure[list], row);
    return own[segment * p.per_warp + (row - before_sure[list][segment])];
  };
  const auto resolve = [&] {
    for (u32 i = tid % LIST_THREADS; i < min(n_sure, RESOLVED); i += LIST_THREADS) positions[list][i] = sure_position(i);
  };
  // Where an open key counts in the tail: its cluster, and its shares or scores.
  struct OpenKey {
    u32 cluster;
    float scores[PER_GROUP];
  };
  const auto load_open = [&](u64 rank) {
    const u32 position = ~static_cast<u32>(rank);
    const u64 at = (static_cast<u64>(blockIdx.y) * p.room + score_slot(position)) * HEADS + (BY_KV ? 0 : list);
    OpenKey key;
    key.cluster = clusters[position];
#pragma unroll
    for (int h = 0; h < PER_GROUP; h++) key.scores[h] = scores[at + h];
    return key;
  };
  // With few of them a thread has one, which is on its way while they are ranked.
  const bool is_early = compares && p.has_tail && tid % LIST_THREADS < n_open_all;
  OpenKey early = {};
  if (is_early) early = load_open(open[0]);
  if (compares) {
    resolve();
    each_open([&](u64 rank) {
      u32 above = 0;
#pragma unroll 8
      for (u32 k = 0; k < n_open_all; k++) above += ranks[list][k] > rank;
      if (above + 1 == wanted) pivots[list] = rank;
    });
  } else {
    // Too many in a list: digit by digit.
    u64 known = 0, mask = 0;
    u32 left = wanted;
    for (int shift = 56; shift >= 0; shift -= 8) {
      __syncthreads();
      for (u32 i = tid % LIST_THREADS; i < 256; i += LIST_THREADS) digits[list][i] = 0;
      __syncthreads();
      each_open([&](u64 rank) {
        if ((rank & mask) == known) atomicAdd(&digits[list][rank >> shift & 0xff], 1);
      });
      __syncthreads();
      u32 digit = 255;
      while (digit > 0 && digits[list][digit] < left) left -= digits[list][digit--];
      known |= static_cast<u64>(digit) << shift;
      mask |= u64{0xff} << shift;
    }
    pivots[list] = known;
    __syncthreads();  // positions lie where the digits were
    resolve();
  }
  __syncthreads();
  if (p.has_tail) {
    // Those that are not selected, where they belong to one of this block's clusters.
    const float unit = tail_unit(per_split), to_units = BY_KV ? unit / tail_top : log2f(unit) - tail_top * scale;
    const auto add_open = [&](u64 rank, const OpenKey& key) {
      const u32 position = ~static_cast<u32>(rank), own = key.cluster - first_cluster;
      if (rank >= pivots[list] || position < part.sink || own >= n_own) return;
#pragma unroll
      for (int h = 0; h < PER_GROUP; h++) {
        const u32 head = BY_KV ? h : list;
        const float weight = BY_KV ? key.scores[h] * to_units : exp2_approx(key.scores[h] * scale + to_units);
        const unsigned long long units = in_units(weight, unit, cut_of(position));
        if (head < part.heads) atomicAdd(&tail_units[head][own], units);
      }
    };
    if (is_early) add_open(open[0], early);
    if (!compares) each_open([&](u64 rank) { add_open(rank, load_open(rank)); });
  }
  const u32 edges = part.sink + (part.n - part.window_start);
  const u32 n_rows = n_sure + n_open + (edges > blockIdx.x ? (edges - blockIdx.x + p.splits - 1) / p.splits : 0);
  keys += p.keys.at(part.b, part.kv);
  values += p.values.at(part.b, part.kv);
  float acc[PER_GROUP][8], top[PER_GROUP], sum[PER_GROUP];
#pragma unroll
  for (int h = 0; h < PER_GROUP; h++) {
#pragma unroll
    for (int j = 0; j < 8; j++) acc[h][j] = 0;
    top[h] = -INFINITY;
    sum[h] = 0;
  }
  for (u32 i = group % LIST_GROUPS; __any_sync(ALL_LANES, i < n_rows); i += AHEAD * LIST_GROUPS) {
    Chunk<T> key[AHEAD], value[AHEAD];
    bool is_attended[AHEAD];
#pragma unroll
    for (int u = 0; u < AHEAD; u++) {
      u32 row = i + u * LIST_GROUPS, position = 0;
      is_attended[u] = row < n_rows;
      if (row < n_sure) {
        position = row < RESOLVED ? positions[list][row] : sure_position(row);
      } else if ((row -= n_sure) < n_open) {
        const u32 segment = segment_of<WARPS>(before_open[list], row);
        position = own[(segment + 1) * p.per_warp - 1 - (row - before_open[list][segment])];
        is_attended[u] = rank_of(ranked[position], position) >= pivots[list] && position >= part.sink;
      } else {
        const u32 edge = blockIdx.x + (row - n_open) * p.splits;
        position = edge < part.sink ? edge : part.window_start + (edge - part.sink);
      }
      key[u] = value[u] = {};
      if (is_attended[u] && e < p.head_dim) {
        key[u] = load_chunk(keys + position * p.keys.strides[2] + e);
        value[u] = load_chunk(values + position * p.values.strides[2] + e);
      }
    }
    float product[AHEAD][PER_GROUP];
#pragma unroll
    for (int h = 0; h < PER_GROUP; h++) {
      float q[8];
#pragma unroll
      for (int j = 0; j < 8; j += 4) {
        const float4 from = *reinterpret_cast<const float4*>(&queries[BY_KV ? h : list][e + j]);
        q[j] = from.x, q[j + 1] = from.y, q[j + 2] = from.z, q[j + 3] = from.w;
      }
#pragma unroll
      for (int u = 0; u < AHEAD; u++) {
        float dot = 0;
#pragma unroll
        for (int j = 0; j < 8; j++) dot += q[j] * widen(key[u].x[j]);
#pragma unroll
        for (u32 lanes = LANES / 2; lanes > 0; lanes /= 2) dot += __shfl_xor_sync(ALL_LANES, dot, lanes);
        product[u][h] = is_attended[u] ? dot * scale : -INFINITY;
      }
    }
#pragma unroll
    for (int h = 0; h < PER_GROUP; h++) {
      float larger = top[h];
#pragma unroll
      for (int u = 0; u < AHEAD; u++) larger = fmaxf(larger, product[u][h]);
      const float factor = exp2_approx(top[h] - finite(larger));
      top[h] = larger;
      sum[h] *= factor;
#pragma unroll
      for (int j = 0; j < 8; j++) acc[h][j] *= factor;
#pragma unroll
      for (int u = 0; u < AHEAD; u++) {
        const float weight = exp2_approx(product[u][h] - finite(larger));
        sum[h] += weight;
#pragma unroll
        for (int j = 0; j < 8; j++) acc[h][j] += weight * widen(value[u].x[j]);
      }
    }
  }
  // The clusters as further keys, of which a head's scores are what is left of its mass.
  __syncthreads();  // open keys have been added
  const float to_weight = -log2f(tail_unit(per_split));
  for (u32 c = group % LIST_GROUPS; p.has_tail && c < n_own; c += LIST_GROUPS) {
    const float* from = sums + p.sums.at(part.b, part.kv, first_cluster + c, e);
    const u32 count = tail_counts[c];
    const float inverse = 1.0f / max(count, 1u);
    float4 row[2] = {};
    if (e < p.head_dim) row[0] = __ldg(reinterpret_cast<const float4*>(from)), row[1] = __ldg(reinterpret_cast<const float4*>(from) + 1);
    const float mean[8] = {row[0].x * inverse, row[0].y * inverse, row[0].z * inverse, row[0].w * inverse,
                           row[1].x * inverse, row[1].y * inverse, row[1].z * inverse, row[1].w * inverse};
#pragma unroll
    for (int h = 0; h < PER_GROUP; h++) {
      const u32 head = BY_KV ? h : list;
      const float shift = BY_KV ? shifts[h] + log2f(tail_top) : tail_top * scale;
      // What weighs nothing is passed over: its mean may be no number.
      const u64 units = head < part.heads && count ? tail_units[head][c] : 0;
      if (units == 0) continue;
      const float log_mass = log2f(__ull2float_rn(units)) + to_weight;
      const float larger = fmaxf(top[h], shift + log_mass), weight = exp2_approx(shift + log_mass - larger);
      const float factor = exp2_approx(top[h] - larger);
      top[h] = larger;
      sum[h] = sum[h] * factor + weight;
#pragma unroll
      for (int j = 0; j < 8; j++) acc[h][j] = acc[h][j] * factor + weight * mean[j];
    }
  }
  // A warp's groups together, then the warps.
#pragma unroll
  for (int h = 0; h < PER_GROUP; h++) {
    float larger = top[h];
#pragma unroll
    for (u32 lanes = LANES; lanes < 32; lanes *= 2) larger = fmaxf(larger, __shfl_xor_sync(ALL_LANES, larger, lanes));
    const float factor = exp2_approx(top[h] - finite(larger));
    sum[h] *= factor;
#pragma unroll
    for (u32 lanes = LANES; lanes < 32; lanes *= 2) sum[h] += __shfl_xor_sync(ALL_LANES, sum[h], lanes);
#pragma unroll
    for (int j = 0; j < 8; j++) {
      acc[h][j] *= factor;
#pragma unroll
      for (u32 lanes = LANES; lanes < 32; lanes *= 2) acc[h][j] += __shfl_xor_sync(ALL_LANES, acc[h][j], lanes);
    }
    if (lane < LANES) {
      if (lane == 0) tops[warp][h] = larger, totals[warp][h] = sum[h];
      float4* to = &scratch[((warp * PER_GROUP + h) * D + e) / 4];
      to[0] = {acc[h][0], acc[h][1], acc[h][2], acc[h][3]};
      to[1] = {acc[h][4], acc[h][5], acc[h][6], acc[h][7]};
    }
  }
  __syncthreads();
  const u64 partial = static_cast<u64>(blockIdx.y) * p.splits + blockIdx.x;
  for (u32 i = tid; i < HEADS * D; i += BLOCK) {
    const u32 h = i / D, element = i % D, w0 = BY_KV ? 0 : h * LIST_WARPS, hh = BY_KV ? h : 0;
    float shift = -INFINITY;
#pragma unroll
    for (u32 w = 0; w < LIST_WARPS; w++) shift = fmaxf(shift, tops[w0 + w][hh]);
    float total = 0, y = 0;
#pragma unroll
    for (u32 w = 0; w < LIST_WARPS; w++) {
      const float factor = exp2_approx(tops[w0 + w][hh] - finite(shift));
      total += factor * totals[w0 + w][hh];
      y += factor * (&scratch[0].x)[((w0 + w) * PER_GROUP + hh) * D + element];
    }
    partials[(partial * HEADS + h) * D + element] = y;
    if (element == 0) partial_stats[partial * HEADS + h] = {shift, total};
  }
  if (!is_last(&arrived[blockIdx.y], p.splits)) return;
  // What a split's result is to be multiplied with.
  __shared__ float factors[HEADS][MAX_SPLITS];
  const u64 first_partial = static_cast<u64>(blockIdx.y) * p.splits * HEADS;
  // Four elements a thread; the threads of the same ones share the splits, of which the first are loaded ahead.
  constexpr u32 QUADS = HEADS * D / 4, SHARERS = BLOCK / QUADS, AT_ONCE = 8;
  const float4* const of_splits = reinterpret_cast<const float4*>(partials + first_partial * D) + tid % QUADS;
  float4 results[AT_ONCE];
  const auto load_results = [&](u32 first) {
#pragma unroll
    for (u32 i = 0; i < AT_ONCE; i++) {
      const u32 split = first + i * SHARERS;
      results[i] = split < p.splits ? __ldcg(of_splits + split * QUADS) : float4{};
    }
  };
  load_results(tid / QUADS);
  if (warp < part.heads) {
    float2 own[MAX_SPLITS / 32];
    float shift = -INFINITY, total = 0;
#pragma unroll
    for (u32 i = 0; i < MAX_SPLITS / 32; i++) {
      const u32 split = i * 32 + lane;
      own[i] = split < p.splits ? __ldcg(&partial_stats[first_partial + split * HEADS + warp]) : float2{-INFINITY, 0};
      shift = fmaxf(shift, own[i].x);
    }
#pragma unroll
    for (int lanes = 16; lanes > 0; lanes /= 2) shift = fmaxf(shift, __shfl_xor_sync(ALL_LANES, shift, lanes));
#pragma unroll
    for (u32 i = 0; i < MAX_SPLITS / 32; i++) {
      own[i].x = exp2_approx(own[i].x - finite(shift));
      total += own[i].x * own[i].y;
    }
#pragma unroll
    for (int lanes = 16; lanes > 0; lanes /= 2) total += __shfl_xor_sync(ALL_LANES, total, lanes);
#pragma unroll
    for (u32 i = 0; i < MAX_SPLITS / 32; i++) factors[warp][i * 32 + lane] = total == 0 ? 0 : own[i].x / total;
  }
  __syncthreads();
  {
    const float* own = factors[tid % QUADS * 4 / D];
    float4 y = {};
    for (u32 first = tid / QUADS; first < p.splits; first += AT_ONCE * SHARERS) {
      if (first >= AT_ONCE * SHARERS) load_results(first);
#pragma unroll
      for (u32 i = 0; i < AT_ONCE; i++) {
        const float factor = own[min(first + i * SHARERS, p.splits - 1)];
        y.x += factor * results[i].x, y.y += factor * results[i].y;
        y.z += factor * results[i].z, y.w += factor * results[i].w;
      }
    }
    scratch[tid] = y;
  }
  __syncthreads();
  for (u32 i = tid; i < HEADS * D; i += BLOCK) {
    const u32 h = i / D, element = i % D;
    if (h >= part.heads || element >= p.head_dim) continue;
    float y = 0;
#pragma unroll
    for (u32 sharer = 0; sharer < SHARERS; sharer++) y += (&scratch[sharer * QUADS].x)[i];
    out[(static_cast<u64>(part.b) * p.h + part.first_head + h) * p.head_dim + element] = narrow<T>(y);
  }
}

#define SEARCH(suffix, type, name, HEADS, BY_KV)                                                           \
  extern "C" __global__ __launch_bounds__(THREADS, 1) void decode_search_##suffix##_h##HEADS##name(        \
      const type* query,       /* [b, h, 1, head_dim] */                                                   \
      const u8* codes,         /* [b, h_kv, capacity, pq_dim] */                                           \
      const u8* clusters,      /* [b, h_kv, capacity], or null */                                          \
      const float* centroids,  /* [b, h_kv, pq_dim, n_centroids, pq_len] */                                \
      const float* coarse,     /* [b, h_kv, n_clusters, head_dim], or null */                              \
      const u32* lens,         /* [b] */                                                                   \
      float* tables,           /* [b, h_kv, bundles, entries, HEADS] */                                    \
      float* scores,           /* [b, h_kv, bundles, room, HEADS]; by KV head shares, of the open keys */  \
      float* masses,           /* [b, h_kv, room], of the open keys; null by query head */                 \
      Stats* stats,            /* [b, h_kv, bundles, MAX_SPLITS, HEADS] */                                 \
      Search* searches,        /* [lists] */                                                               \
      u32* lists,              /* [lists, room] */                                                         \
      Listed* listed,          /* [lists, splits, WARPS] */                                                \
      u32* tail,               /* [b, lists of heads, splits, heads of a list, MAX_CLUSTERS] */            \
      const Decode p) {                                                                                    \
    search<HEADS, BY_KV>(query, codes, clusters, centroids, coarse, lens, tables, scores, masses, stats, searches, lists, \
                         listed, tail, p);                                                                 \
  }
#define ATTEND(suffix, type, D, name, HEADS, BY_KV)                                                        \
  extern "C" __global__ __launch_bounds__(ATTEND_THREADS<D>) void decode_attend_##suffix##_d##D##_h##HEADS##name( \
      const type* query,      /* [b, h, 1, head_dim] */                                                    \
      const type* keys,       /* [b, h_kv, capacity, head_dim] */                                          \
      const type* values,     /* [b, h_kv, capacity, head_dim] */                                          \
      const u8* clusters,     /* [b, h_kv, capacity], or null */                                           \
      const float* scores,    /* [b, h_kv, bundles, room, HEADS] */                                        \
      const float* masses,    /* [b, h_kv, room] */                                                        \
      const u32* lens,        /* [b] */                                                                    \
      Search* searches,       /* [lists] */                                                                \
      const u32* lists,       /* [lists, room] */                                                          \
      const Listed* listed,   /* [lists, splits, WARPS] */                                                 \
      const float* sums,      /* [b, h_kv, n_clusters, head_dim], or null */                               \
      const u32* counts,      /* [b, h_kv, n_clusters], or null */                                         \
      const u32* tail,        /* as search leaves it */                                                    \
      float* partials,        /* [b, h_kv, bundles, splits, HEADS, D] */                                   \
      float2* partial_stats,  /* [b, h_kv, bundles, splits, HEADS] */                                      \
      u32* arrived,           /* [b, h_kv, bundles] */                                                     \
      type* out,              /* [b, h, head_dim] */                                                       \
      const Decode p) {                                                                                    \
    attend<HEADS, BY_KV, D>(query, keys, values, clusters, scores, masses, lens, searches, lists, listed, sums, counts, \
                            tail, partials, partial_stats, arrived, out, p);                          \
  }

#define BY_TYPE(suffix, type)                                                         \
  SEARCH(suffix, type, , 1, false) SEARCH(suffix, type, _by_kv, 1, true)              \
  SEARCH(suffix, type, , 2, false) SEARCH(suffix, type, _by_kv, 2, true)              \
  SEARCH(suffix, type, , 4, false) SEARCH(suffix, type, _by_kv, 4, true)              \
  BY_SIZE(suffix, type, 64) BY_SIZE(suffix, type, 128) BY_SIZE(suffix, type, 256)
#define BY_SIZE(suffix, type, D)                                                      \
  ATTEND(suffix, type, D, , 1, false) ATTEND(suffix, type, D, _by_kv, 1, true)        \
  ATTEND(suffix, type, D, , 2, false) ATTEND(suffix, type, D, _by_kv, 2, true)        \
  ATTEND(suffix, type, D, , 4, false) ATTEND(suffix, type, D, _by_kv, 4, true)
FOR_EACH_FLOAT(BY_TYPE)
