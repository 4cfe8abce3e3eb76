// What a decode step begins with. It makes the tables that the search looks up. It adds a key and a value a head to a cache; and
// where they fill a block of keys its codes, and its values' share of the clusters' sums, the bits of encode.cu and
// cluster_sums.cu.
#include <cuda_pipeline.h>

#include "make_tables.cuh"
#include "nearest.cuh"

constexpr u32 THREADS = UNIT_THREADS;
constexpr u32 WARPS = THREADS / 32;

// Keys of a row are taken so many at a time, a group by a block of threads, of which each lane has one.
constexpr u32 KEYS = 64;
constexpr u32 GROUP = 32;

// Parts of the clusters, of which a block of threads has one.
constexpr u32 SLICES = 8;

// Floats of centroids in shared memory.
constexpr u32 TILE = 8192;

// Elements of values that a block of threads adds up at a time.
constexpr u32 ELEMENTS = THREADS / KEYS;

// What there is of a position lies without gaps, from position 0 on; strides are between heads.
struct Sequence {
  void* keys;              // [h_kv, capacity, head_dim]
  void* values;            // as the keys
  u8* codes;               // [h_kv, capacity, pq_dim], or null without an index
  u8* clusters;            // [h_kv, capacity], or null
  const void* new_key;     // [h_kv, head_dim]
  const void* new_value;   // as the key
  const float* centroids;  // [h_kv, pq_dim, n_centroids, pq_len, or one more with phi]
  const float* phi;        // [h_kv, pq_dim], or null
  const float* weights;    // [h_kv, head_dim], or null
  const float* coarse;     // [h_kv, n_clusters, head_dim], or null
  float* sums;             // [h_kv, n_clusters, head_dim], or null
  u32* counts;             // [h_kv, n_clusters], or null
  const u32* pages;        // of keys and values, or null
  const u32* code_pages;   // of codes and clusters, or null
  u32* len;
  u32* appended;  // blocks of threads that know the lengths
  u32* met;       // blocks of threads that came to a meeting
  Nearest* nearest;        // [h_kv, SLICES, KEYS], clusters
  u64 new_key_strides[2];  // between heads and elements
  u64 new_value_strides[2];
  u64 key_stride;
  u64 codes_stride;
  u64 clusters_stride;
  u64 capacity;
};

struct BeginStep {
  u64 init_offset;
  u32 block;  // keys
  u32 n_sequences;  // that grow
  u32 n_sources;
  u32 h_kv;
  u32 group;
  u32 bundles;  // a KV head
  u32 heads;    // a bundle
  u32 head_dim;
  u32 pq_dim;
  u32 pq_len;
  u32 n_centroids;
  u32 n_clusters;
  // Behind what all blocks ask for first, as in decode/layout.cuh.
  Source sources[MAX_SEQUENCES];
  Sequence sequences[MAX_SEQUENCES];
};

// Centroids, [TILE], and behind these the keys of a group.
extern __shared__ __align__(16) float shared[];

// WIDTH floats that lie side by side.
template <u32 WIDTH>
struct alignas(4 * WIDTH) Floats {
  float x[WIDTH];
};
template <u32 WIDTH>
__device__ inline Floats<WIDTH> load_floats(const float* from) { return *reinterpret_cast<const Floats<WIDTH>*>(from); }

// Some centroids of a table, side by side.
struct Table {
  const float* centroids;  // [rows, columns]
  u32 first;               // one's number
  u32 rows;
  u32 columns;

  // Whether they can be read four floats at a time.
  __device__ bool has_fours() const { return columns % 4 == 0 && reinterpret_cast<u64>(centroids) % 16 == 0; }

  // Sends those from the `begin`-th on on their way to shared memory, as many as it has room for.
  __device__ void fetch(u32 begin) const {
    const u32 n = min(TILE / columns, rows - begin) * columns;
    const float* const from = centroids + begin * columns;
    if (has_fours()) {
#pragma unroll 4
      for (u32 i = threadIdx.x * 4; i < n; i += THREADS * 4) __pipeline_memcpy_async(shared + i, from + i, 4 * sizeof(float));
    } else {
      for (u32 i = threadIdx.x; i < n; i += THREADS) __pipeline_memcpy_async(shared + i, from + i, sizeof(float));
    }
    __pipeline_commit();
  }
};

// The centroid of a table that is nearest to each lane's key, in the threads of the first warp: the same bits as nearest_by_warp
// in nearest.cuh. The keys' sub-vectors are as long as a centroid, `stride` apart. The first centroids are on their way; a warp
// takes TOGETHER at a time. Rows are read WIDTH floats at a time.
template <u32 WIDTH>
__device__ Nearest find_nearest(u32 stride, const Table& table) {
  __shared__ Nearest of_warps[WARPS][32];
  constexpr u32 TOGETHER = 4;
  const u32 lane = threadIdx.x % 32, warp = threadIdx.x / 32, columns = table.columns;
  const float* const own = shared + TILE + lane * stride;
  Nearest nearest = {INFINITY, UINT32_MAX};
  for (u32 begin = 0, n; begin < table.rows; begin += n) {
    n = min(TILE / columns, table.rows - begin);
    if (begin > 0) {
      __syncthreads();  // the tile before has been read
      table.fetch(begin);
    }
    __pipeline_wait_prior(0);
    __syncthreads();  // x is there as well
    for (u32 c = warp * TOGETHER; c < n; c += WARPS * TOGETHER) {
      const float* rows[TOGETHER];
      float distances[TOGETHER] = {};
#pragma unroll
      for (u32 k = 0; k < TOGETHER; k++) rows[k] = shared + min(c + k, n - 1) * columns;
#pragma unroll 2
      for (u32 j = 0; j < columns; j += WIDTH) {
        const auto a = load_floats<WIDTH>(own + j);
#pragma unroll
        for (u32 k = 0; k < TOGETHER; k++) {
          const auto b = load_floats<WIDTH>(rows[k] + j);
#pragma unroll
          for (u32 i = 0; i < WIDTH; i++) distances[k] = add_square(distances[k], a.x[i] - b.x[i]);
        }
      }
#pragma unroll
      for (u32 k = 0; k < TOGETHER; k++) {
        if (distances[k] < nearest.distance) nearest = {distances[k], table.first + begin + c + k};
      }
    }
  }
  of_warps[warp][lane] = nearest;
  __syncthreads();
  if (warp == 0) {
#pragma unroll
    for (u32 w = 1; w < WARPS; w++) nearest = nearer(nearest, of_warps[w][lane]);
  }
  return nearest;
}

// Not inlined, so that clusters and codes run the same instructions: what runs once waits for these more than for anything
// else.
__device__ __noinline__ Nearest find_nearest(u32 stride, Table table) {
  return table.has_fours() ? find_nearest<4>(stride, table) : find_nearest<1>(stride, table);
}

// Elements of a key or a value.
template <class T>
struct Row {
  const T* first;
  u64 stride;
  __device__ T operator[](u32 e) const { return first[e * stride]; }
};

// A head's keys or values, of which the newest is yet to be appended.
template <class T>
struct Rows {
  const T* cached;
  Row<T> newest;
  u64 length;  // positions that are cached
  const u32* pages;
  u32 head_dim;

  __device__ Rows(const Sequence& own, bool is_key, u32 h, u64 length, const BeginStep& p)
      : length(length), pages(own.pages), head_dim(p.head_dim) {
    const u64* const strides = is_key ? own.new_key_strides : own.new_value_strides;
    cached = static_cast<const T*>(is_key ? own.keys : own.values) + h * own.key_stride;
    newest = {static_cast<const T*>(is_key ? own.new_key : own.new_value) + h * strides[0], strides[1]};
  }
  // Addresses depend on a condition, and so loads on none: they need not wait for each other.
  __device__ Row<T> operator[](u64 position) const {
    const bool is_cached = position < length;
    return {is_cached ? cached + place_of(position, pages) * head_dim : newest.first, is_cached ? 1 : newest.stride};
  }
};

// A part of what is due: a group of a row's keys, and a slice of the clusters or a subspace.
struct Part {
  const Sequence& own;
  u32 h;
  u64 length;  // without the newest
  u64 first;   // position of a key
  u32 n;       // keys of all groups, of at most KEYS
  u32 groups;
  u32 group;
  u32 index;  // of the slice or the subspace

  // A lane's key, where there is none the last.
  __device__ u32 key(u32 lane) const { return min(group * GROUP + lane, n - 1); }
  __device__ bool has(u32 lane) const { return group * GROUP + lane < n; }

  __device__ Table clusters(const BeginStep& p) const {
    const u32 most = (p.n_clusters + SLICES - 1) / SLICES, begin = min(index * most, p.n_clusters);
    return {own.coarse + (h * p.n_clusters + begin) * p.head_dim, begin, min(most, p.n_clusters - begin), p.head_dim};
  }
  __device__ Table codes(const BeginStep& p) const {
    const u32 columns = p.pq_len + (own.phi ? 1 : 0), table = h * p.pq_dim + index;
    return {own.centroids + static_cast<u64>(table) * p.n_centroids * columns, 0, p.n_centroids, columns};
  }
};

// Loads `len` elements from the `begin`-th on of a group's keys, weighted, minus those of their clusters if there are any.
template <class T>
__device__ void load_keys(u32 stride, const Part& part, u32 begin, u32 len, const u32* cluster_of,
                          const BeginStep& p) {
  constexpr u32 OF_WARP = GROUP / WARPS, BATCH = 4;
  const Rows<T> keys(part.own, true, part.h, part.length, p);
  const float* const weights = part.own.weights ? part.own.weights + part.h * p.head_dim + begin : nullptr;
  const float* const coarse = part.own.coarse + part.h * p.n_clusters * p.head_dim + begin;
  const u32 lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  for (u32 first = lane; first < len; first += 32 * BATCH) {
    T loaded[OF_WARP][BATCH];
#pragma unroll
    for (u32 k = 0; k < OF_WARP; k++) {
      const Row<T> key = keys[part.first + part.key(warp + k * WARPS)];
#pragma unroll
      for (u32 i = 0; i < BATCH; i++) {
        if (first + i * 32 < len) loaded[k][i] = key[begin + first + i * 32];
      }
    }
#pragma unroll
    for (u32 k = 0; k < OF_WARP; k++) {
      const u32 cluster = cluster_of ? cluster_of[part.key(warp + k * WARPS)] : 0;
#pragma unroll
      for (u32 i = 0; i < BATCH; i++) {
        const u32 e = first + i * 32;
        if (e >= len) continue;
        float element = widen(loaded[k][i]);
        if (weights) element = __fmul_rn(element, __ldg(&weights[e]));
        if (cluster_of) element = __fsub_rn(element, __ldg(&coarse[cluster * p.head_dim + e]));
        shared[TILE + (warp + k * WARPS) * stride + e] = element;
      }
    }
  }
}

// Finds which of a slice of the clusters is nearest to each key. The table is on its way.
template <class T>
__device__ void find_clusters(const Part& part, const BeginStep& p) {
  const u32 stride = stride_of(p.head_dim);
  load_keys<T>(stride, part, 0, p.head_dim, nullptr, p);
  const Nearest nearest = find_nearest(stride, part.clusters(p));
  const u32 at = (part.h * SLICES + part.index) * KEYS + part.group * GROUP;
  if (threadIdx.x < GROUP) part.own.nearest[at + threadIdx.x] = nearest;
}

// Encodes keys in a subspace, and adds a share of the elements of all groups' values to the sums of their clusters: those of
// a cluster one after the other as they lie. The table is on its way.
template <class T>
__device__ void find_codes(const Part& part, const BeginStep& p) {
  __shared__ u32 cluster_of[KEYS];
  __shared__ u64 same[KEYS];  // keys of the same cluster, a bit each
  __shared__ float staged[KEYS][ELEMENTS];
  const Sequence& own = part.own;
  const u32 lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  __syncthreads();  // what there was of others has been read
  // The thread's element of the values.
  const u32 parts = part.groups * p.pq_dim, most = (p.head_dim + parts - 1) / parts;
  const u32 begin = (part.group * p.pq_dim + part.index) * most, end = own.sums ? min(begin + most, p.head_dim) : 0;
  const u32 key = threadIdx.x / ELEMENTS, column = threadIdx.x % ELEMENTS;
  const Row<T> values = Rows<T>(own, false, part.h, part.length, p)[part.first + min(key, part.n - 1)];
  float value = begin + column < end ? widen(values[begin + column]) : 0;
  if (p.n_clusters && threadIdx.x < KEYS) {
    Nearest nearest = {INFINITY, UINT32_MAX};
#pragma unroll
    for (u32 slice = 0; slice < SLICES; slice++) {
      const Nearest* const of_slice = &own.nearest[(part.h * SLICES + slice) * KEYS + threadIdx.x];
      const float2 both = __ldcg(reinterpret_cast<const float2*>(of_slice));
      nearest = nearer(nearest, {both.x, __float_as_uint(both.y)});
    }
    cluster_of[threadIdx.x] = threadIdx.x < part.n ? nearest.code() : UINT32_MAX;
  }
  __syncthreads();
  const Table table = part.codes(p);
  const u32 stride = stride_of(table.columns);
  load_keys<T>(stride, part, part.index * p.pq_len, p.pq_len, p.n_clusters ? cluster_of : nullptr, p);
  for (u32 k = warp; own.sums && k < part.n; k += WARPS) {
    const u32 low = __ballot_sync(ALL_LANES, cluster_of[lane] == cluster_of[k]);
    const u32 high = __ballot_sync(ALL_LANES, cluster_of[32 + lane] == cluster_of[k]);
    if (lane == 0) same[k] = static_cast<u64>(high) << 32 | low;
  }
  __syncthreads();
  if (own.phi) {
    // The coordinate that the inner-product metric adds to that of a key, which has no weights and no cluster.
    if (warp == 0) {
      float* const x = shared + TILE + lane * stride;
      float norm = 0;
      for (u32 j = 0; j < p.pq_len; j++) norm = add_square(norm, x[j]);
      x[p.pq_len] = __fsqrt_rn(fmaxf(own.phi[part.h * p.pq_dim + part.index] - norm, 0.0f));
    }
  }
  const bool is_first = own.sums && key < part.n && (same[key] & ((u64{1} << key) - 1)) == 0;
  float* const of_cluster = own.sums + (part.h * p.n_clusters + (is_first ? cluster_of[key] : 0)) * p.head_dim;
  if (is_first && begin < end) prefetch(of_cluster + begin);
  const Nearest nearest = find_nearest(stride, table);
  if (warp == 0 && part.has(lane)) {
    const u64 place = place_of(part.first + part.key(lane), own.code_pages);
    own.codes[part.h * own.codes_stride + place * p.pq_dim + part.index] = nearest.code();
    if (part.index == 0 && p.n_clusters) {
      const u32 cluster = cluster_of[part.key(lane)];
      own.clusters[part.h * own.clusters_stride + place] = static_cast<u8>(cluster);
      if (own.sums) atomicAdd(&own.counts[part.h * p.n_clusters + cluster], 1);
    }
  }
  for (u32 first = begin; first < end; first += ELEMENTS) {
    const u32 e = first + column;
    staged[key][column] = value;
    __syncthreads();
    if (is_first && e < end) {
      float sum = __ldcg(of_cluster + e);
      for (u64 left = same[key]; left; left &= left - 1) sum += staged[__ffsll(static_cast<long long>(left)) - 1][column];
      of_cluster[e] = sum;
    }
    __syncthreads();
    if (e + ELEMENTS < end) value = widen(values[e + ELEMENTS]);
  }
}

// Writes the new keys and values, a thread an element, the last blocks first, which have least to do with the tables. Returns of
// which sequences there is a block of keys to encode, a bit each, to all threads. A sequence for which there is no room is left
// as it is.
template <class T>
__device__ u32 append(u32* lengths, const BeginStep& p) {
  __shared__ u32 all_due;
  const u32 row = p.head_dim, of_sequence = 2 * p.h_kv * row, all = p.n_sequences * of_sequence;
  u32 i = (gridDim.x - 1 - blockIdx.x) * THREADS + threadIdx.x;
  const auto load = [&] {
    if (i >= all) return T{};
    const Sequence& own = p.sequences[i / of_sequence];
    const bool is_key = i / row / p.h_kv % 2 == 0;
    return Rows<T>(own, is_key, i / row % p.h_kv, 0, p).newest[i % row];
  };
  T element = load();
  if (threadIdx.x < 32) {
    bool is_due = false;
    if (threadIdx.x < p.n_sequences) {
      const Sequence& own = p.sequences[threadIdx.x];
      // Where there is room a length and its successor fit 32 bits, for which a division is short: all threads wait for it.
      const u32 before = *own.len, quantized = before + 1 - static_cast<u32>(p.init_offset);
      lengths[threadIdx.x] = before;
      is_due = own.codes && before < own.capacity && before >= p.init_offset && quantized % p.block == 0;
    }
    const u32 due = __ballot_sync(ALL_LANES, is_due);
    if (threadIdx.x == 0) all_due = due;
  }
  __syncthreads();
  while (i < all) {
    const Sequence& own = p.sequences[i / of_sequence];
    const u32 length = lengths[i / of_sequence];
    const bool is_key = i / row / p.h_kv % 2 == 0;
    T* const to = static_cast<T*>(is_key ? own.keys : own.values) + i / row % p.h_kv * own.key_stride;
    if (length < own.capacity) to[place_of(length, own.pages) * row + i % row] = element;
    i += gridDim.x * THREADS;
    element = load();
  }
  return all_due;
}

// The codes of the sequences in `all_due`, and their values' share of the clusters' sums. All blocks share them.
template <class T>
__device__ void index(u32 all_due, const u32* lengths, const BeginStep& p) {
  const u32 rows = __popc(all_due) * p.h_kv, block = p.block;
  u32* const met = p.sequences[0].met;
  for (u32 begin = 0, turn = 0; begin < block; begin += KEYS) {
    const u32 n = min(KEYS, block - begin), groups = (n + GROUP - 1) / GROUP;
    // The `i`-th of all, of which there are as many for each row and group as there are indices.
    const auto part = [&](u32 i, u32 indices) {
      const u32 row = i / groups / indices;
      u32 due = all_due;
      for (u32 before = row / p.h_kv; before > 0; before--) due &= due - 1;
      const u32 sequence = __ffs(due) - 1;
      const u64 length = lengths[sequence], first = length + 1 - block + begin;
      return Part{p.sequences[sequence], row % p.h_kv, length, first, n, groups, i % groups, i / groups % indices};
    };
    const u32 all_slices = rows * groups * SLICES, all_codes = rows * groups * p.pq_dim;
    for (u32 i = blockIdx.x; p.n_clusters && i < all_slices; i += gridDim.x) {
      const Part own = part(i, SLICES);
      own.clusters(p).fetch(0);
      find_clusters<T>(own, p);
    }
    // The first table comes while others are waited for.
    if (blockIdx.x < all_codes) part(blockIdx.x, p.pq_dim).codes(p).fetch(0);
    if (p.n_clusters) meet(met, gridDim.x, ++turn);
    for (u32 i = blockIdx.x; i < all_codes; i += gridDim.x) {
      const Part own = part(i, p.pq_dim);
      if (i >= gridDim.x) own.codes(p).fetch(0);
      find_codes<T>(own, p);
    }
    if (p.n_clusters && begin + KEYS < block) meet(met, gridDim.x, ++turn);
  }
  // Blocks that met have all counted before that they know the lengths: the count is free again.
  if (p.n_clusters && is_last(p.sequences[0].appended, gridDim.x) && threadIdx.x == 0) *met = 0;
}

// The last `block` keys of a sequence are due where the new one fills them: blocks of keys follow each other from
// init_offset on. Grid: any number of blocks, which share the tables, what is new and what is due; all at once where something
// may be due.
template <class T>
__device__ void begin_step(float* tables, float* bounds, const BeginStep& p) {
  __shared__ u32 lengths[MAX_SEQUENCES];
  const u32 units = p.n_sources ? p.n_sources * p.h_kv * p.bundles * table_units(p) : 0;
  TableUnit<T> unit;
  u32 i = blockIdx.x, all_due = 0, before = 0;
  if (i < units) unit.begin(i, p);
  if (p.n_sequences) {
    all_due = append<T>(lengths, p);
    // Counts the blocks that know the lengths; what the count was is asked for later.
    if (threadIdx.x == 0) before = arrive(p.sequences[0].appended, gridDim.x);
  }
  while (i < units) {
    unit.finish(tables, bounds, p);
    i += gridDim.x;
    if (i < units) unit.begin(i, p);
  }
  if (p.n_sequences == 0) return;
  if (threadIdx.x < 32 && __shfl_sync(ALL_LANES, before, 0) == gridDim.x - 1) {
    // The last one that needed the old lengths moves them on.
    __threadfence();
    __syncwarp();
    if (threadIdx.x < p.n_sequences && lengths[threadIdx.x] < p.sequences[threadIdx.x].capacity) {
      *p.sequences[threadIdx.x].len += 1;
    }
  }
  if (all_due) index<T>(all_due, lengths, p);
}

#define KERNEL(suffix, type)                                                          \
  extern "C" __global__ __launch_bounds__(THREADS, 1) void begin_step_##suffix(       \
      float* tables, /* [sources, h_kv, bundles, entries, heads] */                   \
      float* bounds, /* [sources, h_kv, bundles, units, UNIT_BOUNDS<heads>] */        \
      const __grid_constant__ BeginStep p) {                                          \
    begin_step<type>(tables, bounds, p);                                              \
  }
FOR_EACH_FLOAT(KERNEL)
