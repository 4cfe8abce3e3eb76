// What a decode step adds to a cache: a key and a value a head; and where they fill a block of keys its codes, and its
// values' share of the clusters' sums, the bits of encode.cu and cluster_sums.cu.
#include <cuda_pipeline.h>

#include "nearest.cuh"

constexpr u32 MAX_SEQUENCES = 16;  // of a launch

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
  u32* appended;  // blocks of threads that are done
  u32* indexed;   // [h_kv], parts of a row's block that are done
  u64 new_key_strides[2];  // between heads and elements
  u64 new_value_strides[2];
  u64 key_stride;
  u64 codes_stride;
  u64 clusters_stride;
  u64 capacity;
};

struct AppendAndIndex {
  Sequence sequences[MAX_SEQUENCES];
  u64 init_offset;
  u64 block;  // keys
  u32 n_sequences;
  u32 h_kv;
  u32 head_dim;
  u32 pq_dim;
  u32 pq_len;
  u32 n_centroids;
  u32 n_clusters;
};

constexpr u32 THREADS = 256;
constexpr u32 WARPS = THREADS / 32;
constexpr u32 KEYS = 5;  // that a block of threads takes at a time

// Columns of a table that are in shared memory at a time, of a centroid for each thread; so many of these tiles there are,
// of which one is read while the others are on their way.
constexpr u32 COLUMNS = 16;
constexpr u32 TILES = 4;
constexpr u32 TILE = THREADS * (COLUMNS + 4);

// The longest key.
constexpr u32 LONGEST = 256;

// From a row of a tile to the next, so that lanes that read WIDTH floats of rows side by side meet in no bank.
template <u32 WIDTH>
constexpr u32 STRIDE = (COLUMNS / WIDTH | 1) * WIDTH;

// WIDTH floats of shared memory.
template <u32 WIDTH>
struct alignas(4 * WIDTH) Floats {
  float x[WIDTH];
};
template <u32 WIDTH>
__device__ inline Floats<WIDTH> load_floats(const float* from) { return *reinterpret_cast<const Floats<WIDTH>*>(from); }

// The centroids nearest to a block's sub-vectors in each of some tables, [tables, count, columns] of at most THREADS
// centroids; the same bits as nearest_by_warp in nearest.cuh. A thread has a centroid, and one load of it serves all keys.
// `x`, [KEYS, head_dim], has the sub-vectors of each table side by side, `len` elements each; `last(key, table)` is what
// comes behind these where there are more columns. Calls `write(key, table, code)`. Rows of x and of tables are read WIDTH
// floats at a time.
template <u32 WIDTH, class Last, class Write>
__device__ void find_nearest(const float* x, u32 head_dim, u32 len, const float* centroids, u32 tables, u32 count, u32 columns,
                             float* tiles, Last last, Write write) {
  __shared__ Nearest of_warps[2][KEYS][WARPS];
  const u32 tiles_of_table = (columns + COLUMNS - 1) / COLUMNS, all = tables * tiles_of_table;
  u32 loaded_table = 0, loaded_column = 0, loaded = 0;
  const auto load_next = [&] {
    if (loaded_table < tables) {
      constexpr u32 PIECES = COLUMNS / WIDTH;
      const float* const from = centroids + static_cast<u64>(loaded_table) * count * columns + loaded_column;
      float* const to = tiles + loaded % TILES * TILE;
#pragma unroll 4
      for (u32 i = 0; i < PIECES; i++) {
        const u32 row = (i * THREADS + threadIdx.x) / PIECES, at = threadIdx.x % PIECES * WIDTH;
        if (row < count && loaded_column + at < columns) {
          __pipeline_memcpy_async(to + row * STRIDE<WIDTH> + at, from + row * columns + at, WIDTH * sizeof(float));
        }
      }
      loaded++, loaded_column += COLUMNS;
      if (loaded_column >= columns) loaded_table++, loaded_column = 0;
    }
    __pipeline_commit();
  };
  for (u32 i = 0; i + 1 < TILES; i++) load_next();
  // What the warps have found in a table, brought together while they are in the next.
  const auto finish = [&](u32 table) {
    if (threadIdx.x >= KEYS) return;
    Nearest nearest = of_warps[table % 2][threadIdx.x][0];
#pragma unroll
    for (u32 warp = 1; warp < WARPS; warp++) nearest = nearer(nearest, of_warps[table % 2][threadIdx.x][warp]);
    write(threadIdx.x, table, nearest.code());
  };
  float distances[KEYS];
  u32 table = 0, column = 0;
  for (u32 i = 0; i < all; i++) {
    __pipeline_wait_prior(TILES - 2);
    __syncthreads();  // the tile has come, and the one before it has been read
    load_next();
    if (column == 0 && table > 0) finish(table - 1);
    const float* const centroid = tiles + i % TILES * TILE + threadIdx.x * STRIDE<WIDTH>;
    const float* const own = x + table * len + column;
    if (column == 0) {
#pragma unroll
      for (u32 key = 0; key < KEYS; key++) distances[key] = 0;
    }
    const auto add = [&](u32 j) {
      const auto c = load_floats<WIDTH>(centroid + j);
#pragma unroll
      for (u32 key = 0; key < KEYS; key++) {
        const auto a = load_floats<WIDTH>(own + key * head_dim + j);
#pragma unroll
        for (u32 k = 0; k < WIDTH; k++) distances[key] = add_square(distances[key], a.x[k] - c.x[k]);
      }
    };
    const u32 n = min(COLUMNS, len - min(column, len));
    if (n == COLUMNS) {
#pragma unroll
      for (u32 j = 0; j < COLUMNS; j += WIDTH) add(j);
    } else {
#pragma unroll 1
      for (u32 j = 0; j < n; j += WIDTH) add(j);
    }
    if (n < COLUMNS && columns > len) {
#pragma unroll
      for (u32 key = 0; key < KEYS; key++) distances[key] = add_square(distances[key], last(key, table) - centroid[n]);
    }
    column += COLUMNS;
    if (column < columns) continue;
#pragma unroll
    for (u32 key = 0; key < KEYS; key++) {
      const bool is_there = threadIdx.x < count && distances[key] < INFINITY;
      const Nearest own = {is_there ? distances[key] : INFINITY, is_there ? threadIdx.x : UINT32_MAX};
      const Nearest nearest = nearest_of_lanes(own);
      if (threadIdx.x % 32 == 0) of_warps[table % 2][key][threadIdx.x / 32] = nearest;
    }
    table++, column = 0;
  }
  __syncthreads();
  finish(tables - 1);
}

// An element of a head's keys or values, of which the newest is yet to be appended.
template <class T>
struct Rows {
  const T* cached;
  const T* newest;
  u64 newest_stride;
  u64 length;  // positions that are cached
  const u32* pages;
  u32 head_dim;

  __device__ Rows(const Sequence& own, bool is_key, u32 h, u64 length, const AppendAndIndex& p)
      : length(length), pages(own.pages), head_dim(p.head_dim) {
    const u64* const strides = is_key ? own.new_key_strides : own.new_value_strides;
    cached = static_cast<const T*>(is_key ? own.keys : own.values) + h * own.key_stride;
    newest = static_cast<const T*>(is_key ? own.new_key : own.new_value) + h * strides[0];
    newest_stride = strides[1];
  }
  __device__ T at(u64 position, u32 e) const {
    return position < length ? cached[place_of(position, pages) * head_dim + e] : newest[e * newest_stride];
  }
};

// Adds a row's values to the sums of their clusters: those of a cluster one after the other as they lie. A warp takes the
// first key of a cluster and those that follow it there. `first` is the position of the block's first key; `staged` has room
// for TILES * TILE floats.
template <class T>
__device__ void add_values(const Sequence& own, u32 h, u64 first, const Rows<T>& values, T* staged, const AppendAndIndex& p) {
  constexpr u32 WORDS = 3, MOST = 32 * WORDS;  // keys at a time, a bit each
  constexpr u32 BATCH = 8, ELEMENTS = 4;       // loads of a thread that are on their way
  __shared__ u32 cluster_of[MOST];
  const u8* const clusters = own.clusters + h * own.clusters_stride;
  float* const sums = own.sums + static_cast<u64>(h) * p.n_clusters * p.head_dim;
  u32* const counts = own.counts + h * p.n_clusters;
  const u32 lane = threadIdx.x % 32, most = min(MOST, TILES * TILE * 4 / (p.head_dim * static_cast<u32>(sizeof(T))));
  for (u64 begin = 0; begin < p.block; begin += most) {
    const u32 n = static_cast<u32>(min(p.block - begin, u64{most})), elements = n * p.head_dim;
    __syncthreads();  // those before have been added
    if (threadIdx.x < n) {
      const u32 cluster = __ldcg(&clusters[place_of(first + begin + threadIdx.x, own.code_pages)]);
      cluster_of[threadIdx.x] = cluster;
      atomicAdd(&counts[cluster], 1);
    }
    for (u32 i = threadIdx.x; i < elements; i += BATCH * THREADS) {
      T x[BATCH];
#pragma unroll
      for (u32 k = 0; k < BATCH; k++) {
        const u32 element = min(i + k * THREADS, elements - 1), key = element / p.head_dim;
        x[k] = values.at(first + begin + key, element - key * p.head_dim);
      }
#pragma unroll
      for (u32 k = 0; k < BATCH; k++) {
        if (i + k * THREADS < elements) staged[i + k * THREADS] = x[k];
      }
    }
    __syncthreads();
    u32 of_lane[WORDS];
#pragma unroll
    for (u32 w = 0; w < WORDS; w++) of_lane[w] = w * 32 + lane < n ? cluster_of[w * 32 + lane] : UINT32_MAX;
    for (u32 key = threadIdx.x / 32; key < n; key += WARPS) {
      const u32 cluster = cluster_of[key];
      u32 same[WORDS], before = 0;
#pragma unroll
      for (u32 w = 0; w < WORDS; w++) {
        same[w] = __ballot_sync(ALL_LANES, of_lane[w] == cluster);
        const u32 below = key / 32 > w ? ALL_LANES : key / 32 == w ? (1u << key % 32) - 1 : 0;
        before |= same[w] & below;
      }
      if (before) continue;
      for (u32 first = lane; first < p.head_dim; first += 32 * ELEMENTS) {
        float sum[ELEMENTS];
#pragma unroll
        for (u32 k = 0; k < ELEMENTS; k++) {
          const u32 e = first + k * 32;
          sum[k] = e < p.head_dim ? sums[cluster * p.head_dim + e] : 0;
        }
#pragma unroll
        for (u32 w = 0; w < WORDS; w++) {
          for (u32 left = same[w]; left; left &= left - 1) {
            const T* const value = staged + (w * 32 + __ffs(left) - 1) * p.head_dim;
#pragma unroll
            for (u32 k = 0; k < ELEMENTS; k++) sum[k] += widen(value[min(first + k * 32, p.head_dim - 1)]);
          }
        }
#pragma unroll
        for (u32 k = 0; k < ELEMENTS; k++) {
          const u32 e = first + k * 32;
          if (e < p.head_dim) sums[cluster * p.head_dim + e] = sum[k];
        }
      }
    }
  }
}

// Encodes KEYS keys from the `first`-th of a head's block on, of which the newest is the last: of each first its cluster, then its codes. Where they are the
// last part of `parts` to be done the block's values are added up as well.
template <class T>
__device__ void index_keys(const Sequence& own, u32 h, u64 first, u32 parts, float* tiles, const AppendAndIndex& p) {
  const u64 length = *own.len, begin = length + 1 - p.block;
  const Rows<T> keys(own, true, h, length, p);
  const float* const weights = own.weights + h * p.head_dim;
  const u32 first_cluster = h * p.n_clusters, first_table = h * p.pq_dim;
  const float* const coarse = own.coarse + static_cast<u64>(first_cluster) * p.head_dim;
  const u32 columns = p.pq_len + (own.phi ? 1 : 0);
  const float* const centroids = own.centroids + static_cast<u64>(first_table) * p.n_centroids * columns;
  u8* const codes = own.codes + h * own.codes_stride;
  u8* const clusters = own.clusters + h * own.clusters_stride;
  __shared__ alignas(16) float x[KEYS * LONGEST];
  __shared__ u8 nearest_clusters[KEYS];
  // The coordinate that the inner-product metric adds to that of a key, which has no weights and no cluster.
  const auto augmentation = [&](u32 key, u32 m) {
    float norm = 0;
    for (u32 j = 0; j < p.pq_len; j++) norm = add_square(norm, x[key * p.head_dim + m * p.pq_len + j]);
    return __fsqrt_rn(fmaxf(own.phi[first_table + m] - norm, 0.0f));
  };
  __syncthreads();  // those of the keys before have been read
  // A thread's elements of keys, all loaded before the first is waited for.
  const u32 elements = KEYS * p.head_dim;
  T element[KEYS];
#pragma unroll
  for (u32 k = 0; k < KEYS; k++) {
    const u32 i = min(k * THREADS + threadIdx.x, elements - 1), key = i / p.head_dim;
    element[k] = keys.at(begin + min(first + key, p.block - 1), i - key * p.head_dim);
  }
#pragma unroll
  for (u32 k = 0; k < KEYS; k++) {
    const u32 i = k * THREADS + threadIdx.x;
    if (i < elements) x[i] = own.weights ? __fmul_rn(widen(element[k]), weights[i % p.head_dim]) : widen(element[k]);
  }
  __syncthreads();
  // The same code for clusters and for codes: what runs once waits for its instructions more than for anything else.
#pragma unroll 1
  for (u32 round = own.coarse ? 0 : 1; round < 2; round++) {
    const bool is_cluster = round == 0;
    const auto write = [&](u32 key, u32 m, u8 index) {
      if (is_cluster) nearest_clusters[key] = index;
      if (first + key >= p.block) return;
      const u64 place = place_of(begin + first + key, own.code_pages);
      (is_cluster ? clusters[place] : codes[place * p.pq_dim + m]) = index;
    };
    const u32 len = is_cluster ? p.head_dim : p.pq_len, tables = is_cluster ? 1 : p.pq_dim;
    const u32 count = is_cluster ? p.n_clusters : p.n_centroids, all_columns = is_cluster ? len : columns;
    const float* const from = is_cluster ? coarse : centroids;
    if (len % 4 == 0 && all_columns == len && reinterpret_cast<u64>(from) % 16 == 0) {
      find_nearest<4>(x, p.head_dim, len, from, tables, count, all_columns, tiles, augmentation, write);
    } else {
      find_nearest<1>(x, p.head_dim, len, from, tables, count, all_columns, tiles, augmentation, write);
    }
    __syncthreads();
    if (!is_cluster) break;
    float centroid[KEYS];
#pragma unroll
    for (u32 k = 0; k < KEYS; k++) {
      const u32 i = min(k * THREADS + threadIdx.x, elements - 1), key = i / p.head_dim;
      centroid[k] = coarse[nearest_clusters[key] * p.head_dim + i - key * p.head_dim];
    }
#pragma unroll
    for (u32 k = 0; k < KEYS; k++) {
      const u32 i = k * THREADS + threadIdx.x;
      if (i < elements) x[i] = __fsub_rn(x[i], centroid[k]);
    }
    __syncthreads();
  }
  if (!own.sums || !is_last(&own.indexed[h], parts)) return;
  add_values(own, h, begin, Rows<T>(own, false, h, length, p), reinterpret_cast<T*>(tiles), p);
}

// A sequence for which there is no room is left as it is.
__device__ inline bool has_room(const Sequence& own) { return *own.len < own.capacity; }

// Writes the new keys and values: a thread an element.
template <class T>
__device__ void append(const AppendAndIndex& p) {
  const u32 row = p.head_dim, of_sequence = 2 * p.h_kv * row;
  for (u32 i = blockIdx.x * THREADS + threadIdx.x; i < p.n_sequences * of_sequence; i += gridDim.x * THREADS) {
    const Sequence& own = p.sequences[i / of_sequence];
    const u32 e = i % row, h = i / row % p.h_kv;
    const bool is_key = i / row / p.h_kv % 2 == 0;
    if (!has_room(own)) continue;
    const u64 length = *own.len, at = h * own.key_stride + place_of(length, own.pages) * row + e;
    static_cast<T*>(is_key ? own.keys : own.values)[at] = Rows<T>(own, is_key, h, length, p).at(length, e);
  }
}

// The last `block` keys of a sequence are due where the new one fills them: blocks of keys follow each other from
// init_offset on. Grid: any number of blocks, which share what is new and what is due.
template <class T>
__device__ void append_and_index(const AppendAndIndex& p) {
  extern __shared__ __align__(16) float tiles[];  // [TILES, TILE]
  __shared__ u32 all_due;                         // a bit a sequence
  append<T>(p);
  if (threadIdx.x < 32) {
    bool is_due = false;
    if (threadIdx.x < p.n_sequences) {
      const Sequence& own = p.sequences[threadIdx.x];
      const u64 length = *own.len + u64{1};
      is_due = own.codes && has_room(own) && length > p.init_offset && (length - p.init_offset) % p.block == 0;
    }
    const u32 due = __ballot_sync(ALL_LANES, is_due);
    if (threadIdx.x == 0) all_due = due;
  }
  __syncthreads();
  const u64 parts = ceil_div(p.block, KEYS), parts_of_sequence = parts * p.h_kv;
  for (u64 i = blockIdx.x; i < __popc(all_due) * parts_of_sequence; i += gridDim.x) {
    u32 due = all_due;
    for (u64 before = i / parts_of_sequence; before > 0; before--) due &= due - 1;
    const u32 h = static_cast<u32>(i / parts % p.h_kv);
    index_keys<T>(p.sequences[__ffs(due) - 1], h, i % parts * KEYS, static_cast<u32>(parts), tiles, p);
  }
  // The last block to come here is the last that needed the old lengths.
  if (is_last(p.sequences[0].appended, gridDim.x) && threadIdx.x < p.n_sequences && has_room(p.sequences[threadIdx.x])) {
    *p.sequences[threadIdx.x].len += 1;
  }
}

#define KERNEL(suffix, type)                                                          \
  extern "C" __global__ __launch_bounds__(THREADS, 2) void append_and_index_##suffix( \
      const __grid_constant__ AppendAndIndex p) {                                     \
    append_and_index<type>(p);                                                        \
  }
FOR_EACH_FLOAT(KERNEL)
