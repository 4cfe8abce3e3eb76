// What a decode step attends to by plain PQ codes, a list a query head, in one launch:
//
// 1. A block makes its head's tables, scores its run of the candidates, and leaves those that may be among the k best of all: its
//    own k best, and what shares the last of these one's bin in a histogram.
// 2. The last block of a head finds the k best of the finalists of all runs, and lists them between sink and window.
//
// Scores have the bits of score.cu, and ties go to the lower position: the lists are those that topk.cu leads to.
#include "histogram.cuh"

constexpr u32 THREADS = 512;
constexpr u32 WARPS = THREADS / 32;
constexpr u32 BINS = 2048;

// Candidates of a thread, and of its block. Rust: RUN in ops/select/cuda.rs, and so the next two and SLACK.
constexpr u32 EACH = 16;
constexpr u32 RUN = EACH * THREADS;
constexpr u32 MAX_RUNS = 64;

// Floats of products with centroids in shared memory.
constexpr u32 TILE = 9216;

constexpr u32 MAX_SUBSPACES = 256;

// Finalists that the last block has in shared memory, where products were; it reads others where they are.
constexpr u32 KEPT = 4096;
static_assert(2 * KEPT <= TILE);

// So many finalists are compared with each other; among more a histogram says where the selection ends.
constexpr u32 MAX_OPEN = 32;

// A run may have so many finalists more than are selected.
constexpr u32 SLACK = 512;
static_assert(SLACK >= MAX_OPEN);

struct Select {
  View<4> query;
  View<4> codes;
  View<5> centroids;
  Step step;
  u64 candidates;  // without lens
  u32 h;
  u32 group;
  u32 runs;
  u32 pq_dim;
  u32 pq_len;
  u32 n_centroids;
  u32 list_len;
  u32 share;       // of the weights by position, a multiple of four
  u32 key_stride;  // of the codes
  u32 room;        // for a run's finalists

  __device__ u32 candidates_of(u64 length, const u32* lens) const {
    return static_cast<u32>(lens ? step.candidates(length) : candidates);
  }
  // Runs that there are of so many candidates: blocks of other runs have nothing to do, and nobody waits for them.
  __device__ u32 runs_of(u32 candidates) const { return max((candidates + RUN - 1) / RUN, 1); }
  __device__ u32 selected_of(u64 length, const u32* lens) const {
    return static_cast<u32>(lens ? step.selected(length) : min(step.heavy, candidates));
  }
};

// The finalists of all lists.
struct Finalists {
  u32* counts;  // [b * h, runs]
  u32* ranks;   // [b * h, runs, room], in the order of their positions
  u32* keys;    // as ranks; counted from the first candidate

  __device__ Finalists(u32* buffer, u64 lists, const Select& p)
      : counts(buffer), ranks(counts + lists * p.runs), keys(ranks + lists * p.runs * p.room) {}
};

// Of two candidates that score the same the one in front is better.
__device__ inline u64 order_of(u32 rank, u32 position) { return static_cast<u64>(rank) << 32 | ~position; }

// Where a selection ends: the last that is selected is one of `count` from `low` to `high`, of which `wanted` are.
struct End {
  u64 low;
  u64 high;
  u32 wanted;
  u32 count;

  // Narrows it until it is known, or between MAX_OPEN. `each` calls a function with all that are from low to high; the histogram
  // is zero before and after.
  template <class Each>
  __device__ void narrow(u32* histogram, Each each) {
    __shared__ u32 found[1], rest[1];
    while (count > wanted && count > MAX_OPEN) {
      const u32 shift = max(64 - __clzll(high - low), 11) - 11;
      each([&](u64 x) { atomicAdd(&histogram[(x - low) >> shift], 1); });
      __syncthreads();
      find_bins<THREADS, 1, BINS>([&](u32) { return histogram; }, wanted, found, rest);
      wanted = rest[0], count = histogram[found[0]];
      low += u64{found[0]} << shift;
      high = low + min(high - low, (u64{1} << shift) - 1);
      __syncthreads();
      for (u32 i = threadIdx.x; i < BINS; i += THREADS) histogram[i] = 0;
      __syncthreads();
    }
  }
};

// Codes that are loaded at once.
template <int BYTES>
struct Code;
template <>
struct Code<1> {
  using Word = u8;
};
template <>
struct Code<2> {
  using Word = uint16_t;
};
template <>
struct Code<4> {
  using Word = u32;
};

// A block's tables: products of a query's parts with the centroids of their subspaces, which pass by in tiles of rows.
template <class T>
struct Tables {
  const T* query;  // elements side by side
  const float* centroids;
  u64 strides[3];  // between subspaces, centroids and elements
  u32 rows;
  u32 columns;
  u32 bits;    // of a code
  float* tile;
  u32 stride;  // between rows of the tile: threads that read four floats of a row each meet in no bank

  __device__ u32 rows_of_tile() const { return TILE / stride; }

  // Leaves the products of each element in the tile. Threads side by side take a row's, WIDTH each.
  template <u32 WIDTH>
  __device__ void multiply(u32 begin, u32 end) const {
    const u32 of_row = columns / WIDTH, at_once = THREADS / of_row, column = threadIdx.x % of_row * WIDTH;
    const u32 own = threadIdx.x / of_row;
    if (own >= at_once) return;
    constexpr u32 BATCH = 4;
#pragma unroll 1
    for (u32 first = begin + own; first < end; first += BATCH * at_once) {
      // Addresses depend on a condition, and so loads on none: all of them are on their way at once.
      float x[BATCH][WIDTH];
      T y[BATCH][WIDTH];
#pragma unroll
      for (u32 i = 0; i < BATCH; i++) {
        const u32 row = min(first + i * at_once, end - 1), m = row >> bits, c = row & ((1u << bits) - 1);
        const float* const from = centroids + m * strides[0] + c * strides[1] + column * strides[2];
        if constexpr (WIDTH == 4) {
          const float4 four = __ldg(reinterpret_cast<const float4*>(from));
          x[i][0] = four.x, x[i][1] = four.y, x[i][2] = four.z, x[i][3] = four.w;
        } else {
          x[i][0] = __ldg(from);
        }
        const T* const part = query + (m * columns + column);
#pragma unroll
        for (u32 j = 0; j < WIDTH; j++) y[i][j] = part[j];
      }
#pragma unroll
      for (u32 i = 0; i < BATCH; i++) {
        const u32 row = first + i * at_once;
        float* const to = tile + (row - begin) * stride + column;
#pragma unroll
        for (u32 j = 0; j < WIDTH; j++) x[i][j] = __fmul_rn(widen(y[i][j]), x[i][j]);
        if (row >= end) continue;
        if constexpr (WIDTH == 4) {
          *reinterpret_cast<float4*>(to) = make_float4(x[i][0], x[i][1], x[i][2], x[i][3]);
        } else {
          *to = x[i][0];
        }
      }
    }
  }

  // The entries, whose sums have the order of score.cu, and bins for sums of one of each subspace.
  __device__ EvenBins<BINS> make(float* entries) const {
    __shared__ u32 highest[MAX_SUBSPACES], lowest[MAX_SUBSPACES];  // ranks of entries, and of what is in their place if negated
    const bool has_fours = columns % 4 == 0 && strides[2] == 1 && strides[0] % 4 == 0 && strides[1] % 4 == 0 &&
                           reinterpret_cast<u64>(centroids) % sizeof(float4) == 0;
    const u32 subspaces = rows >> bits, lane = threadIdx.x % 32;
    for (u32 m = threadIdx.x; m < subspaces; m += THREADS) highest[m] = lowest[m] = 0;
#pragma unroll 1
    for (u32 begin = 0; begin < rows; begin += rows_of_tile()) {
      const u32 end = min(begin + rows_of_tile(), rows);
      if (begin > 0) __syncthreads();  // the tile before has been read
      has_fours ? multiply<4>(begin, end) : multiply<1>(begin, end);
      __syncthreads();
#pragma unroll 1
      for (u32 first = begin + threadIdx.x - lane; first < end; first += THREADS) {
        const u32 row = min(first + lane, end - 1), m = row >> bits;
        const float* const x = tile + (row - begin) * stride;
        float sum = 0;
        u32 j = 0;
#pragma unroll 4
        for (; j + 4 <= columns; j += 4) {
          const float4 four = *reinterpret_cast<const float4*>(x + j);
          sum = __fadd_rn(__fadd_rn(__fadd_rn(__fadd_rn(sum, four.x), four.y), four.z), four.w);
        }
#pragma unroll 1
        for (; j < columns; j++) sum = __fadd_rn(sum, x[j]);
        entries[row] = sum;
        u32 high = rank_of(sum), low = rank_of(-sum);  // NaN is neither
        if (bits >= 5 && begin % 32 == 0) {
          // All lanes' are of one subspace.
          high = __reduce_max_sync(ALL_LANES, high), low = __reduce_max_sync(ALL_LANES, low);
          if (lane == 0) atomicMax(&highest[m], high), atomicMax(&lowest[m], low);
        } else {
          atomicMax(&highest[m], high), atomicMax(&lowest[m], low);
        }
      }
    }
    __syncthreads();
    float high = 0, low = 0;
    for (u32 m = lane; m < subspaces; m += 32) high += score_of(highest[m]), low += -score_of(lowest[m]);
#pragma unroll
    for (u32 lanes = 16; lanes > 0; lanes /= 2) {
      high += __shfl_xor_sync(ALL_LANES, high, lanes), low += __shfl_xor_sync(ALL_LANES, low, lanes);
    }
    return EvenBins<BINS>(fminf(fmaxf(low, -1e38f), 1e38f), fminf(fmaxf(high, -1e38f), 1e38f));
  }
};

extern __shared__ __align__(16) float shared[];  // the tile and the tables

template <int BYTES, class T>
__device__ void find_finalists(const T* query, const u8* codes, const float* centroids, const u32* lens, const Finalists& finalists,
                               float* dense, u32* histogram, const Select& p) {
  __shared__ u32 found[1], wanted[1], counts[WARPS];
  const u32 row = blockIdx.y, run = blockIdx.x, b = row / p.h, head = row - b * p.h, kv = head / p.group;
  const u32 lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const u64 length = p.step.length(lens, b);
  const u32 n = p.candidates_of(length, lens), k = p.selected_of(length, lens);
  const u32 end = min((run + 1) * RUN, n), entries = p.pq_dim * p.n_centroids;
  // This block's share of the weights by position, which there are of candidates without lens.
  const auto clear_dense = [&] {
    if (!dense) return;
    const u32 all = static_cast<u32>(p.step.n), begin = static_cast<u32>(min(u64{run} * p.share, p.step.n));
    const u32 count = min(p.share, all - begin);
    float* const own = dense + u64{row} * all + begin;
    if (all % 4 == 0) {
      for (u32 i = threadIdx.x; i < count / 4; i += THREADS) reinterpret_cast<float4*>(own)[i] = {};
    } else {
      for (u32 i = threadIdx.x; i < count; i += THREADS) own[i] = 0;
    }
  };
  const u32 own_run = row * p.runs + run;
  if (run * RUN >= end || k == 0) {
    clear_dense();
    if (threadIdx.x == 0) finalists.counts[own_run] = 0;
    return;
  }
  float* const tables = shared + TILE;
  const Tables<T> of_head = {query + p.query.at(b, head), centroids + p.centroids.at(b, kv),
                             {p.centroids.strides[2], p.centroids.strides[3], p.centroids.strides[4]},
                             entries, p.pq_len, 31u - __clz(p.n_centroids), shared, stride_of(p.pq_len)};
  // A warp's candidates follow each other, its lanes take turns at them.
  const u32 first = run * RUN + warp * EACH * 32 + lane;
  const u8* const of_row = codes + p.codes.at(b, kv);
  u32 words[EACH];
  // Addresses depend on a condition, and so loads on none.
  const auto load = [&](u32 m) {
#pragma unroll
    for (u32 i = 0; i < EACH; i++) {
      const u8* const from = of_row + u64{min(first + i * 32, end - 1)} * p.key_stride + m;
      words[i] = *reinterpret_cast<const typename Code<BYTES>::Word*>(from);
    }
  };
  load(0);
  for (u32 i = threadIdx.x; i < BINS; i += THREADS) histogram[i] = 0;
  const EvenBins<BINS> bins = of_head.make(tables);
  clear_dense();  // behind all loads that are waited for

  const u32 mask = p.n_centroids - 1;  // keeps a byte that is no code inside its table
  float x[EACH] = {};
  for (u32 m = 0; m < p.pq_dim; m += BYTES) {
    const float* const table = tables + m * p.n_centroids;
#pragma unroll
    for (u32 i = 0; i < EACH; i++) {
#pragma unroll
      for (u32 j = 0; j < BYTES; j++) x[i] += table[j * p.n_centroids + (words[i] >> 8 * j & mask)];
    }
    if (m + BYTES < p.pq_dim) load(m + BYTES);
  }
#pragma unroll
  for (u32 i = 0; i < EACH; i++) {
    // What is behind the last candidate counts nothing, in bins that differ, and is the last of all below.
    const bool is_there = first + i * 32 < end;
    atomicAdd(&histogram[is_there ? bins.of(x[i]) : threadIdx.x], is_there ? 1 : 0);
    x[i] = is_there ? x[i] : -INFINITY;
  }
  __syncthreads();
  find_bins<THREADS, 1, BINS>([&](u32) { return histogram; }, k, found, wanted);

  u32 are[EACH], before, all;  // finalists, a bit a lane; those of the warps before, and of all
  const auto mark = [&](auto is_finalist) {
    u32 count = 0;
#pragma unroll
    for (u32 i = 0; i < EACH; i++) {
      are[i] = __ballot_sync(ALL_LANES, is_finalist(i));
      count += __popc(are[i]);
    }
    if (lane == 0) counts[warp] = count;
    __syncthreads();
    before = all = 0;
#pragma unroll
    for (u32 w = 0; w < WARPS; w++) {
      if (w == warp) before = all;
      all += counts[w];
    }
  };
  const u32 here = end - run * RUN;
  const float edge = bins.edge_of(found[0] == MAX_BINS ? 0 : found[0]);  // of fewer than k candidates all are left
  mark([&](u32 i) { return !bins.is_below(x[i], edge); });
  all = min(all, here);  // with the first bin what is not there is in
  if (all > k + SLACK) {
    // Scores that bins do not tell apart: one that is far from all others, or all alike.
    __syncthreads();
    for (u32 i = threadIdx.x; i < BINS; i += THREADS) histogram[i] = 0;
    __syncthreads();
    End last = {0, UINT64_MAX, k, here};
    const auto order = [&](u32 i) { return order_of(rank_of(x[i]), first + i * 32); };
    last.narrow(histogram, [&](auto f) {
#pragma unroll
      for (u32 i = 0; i < EACH; i++) {
        if (first + i * 32 < end && order(i) >= last.low && order(i) <= last.high) f(order(i));
      }
    });
    mark([&](u32 i) { return first + i * 32 < end && order(i) >= last.low; });
  }
  if (threadIdx.x == 0) finalists.counts[own_run] = all;
  u32* const ranks = finalists.ranks + static_cast<u64>(own_run) * p.room;
  u32* const keys = finalists.keys + static_cast<u64>(own_run) * p.room;
#pragma unroll
  for (u32 i = 0; i < EACH; i++) {
    if (are[i] == 0) continue;
    const u32 at = before + __popc(are[i] & ((1u << lane) - 1));
    if ((are[i] >> lane & 1) && at < all) ranks[at] = rank_of(x[i]), keys[at] = first + i * 32;
    before += __popc(are[i]);
  }
}

// Where the `i`-th of a list's finalists is, if `before` counts those in front of each run's.
__device__ inline u64 place_in_runs(const u32* before, u32 room, u32 i) {
  const u32 run = segment_of<MAX_RUNS>(before, i);
  return u64{run} * room + (i - before[run]);
}

// One behind those that are kept in shared memory: seldom any, so that its code is out of the way.
__device__ __noinline__ u32 load_far(const u32* of_runs, const u32* before, u32 room, u32 i) {
  return __ldcg(&of_runs[place_in_runs(before, room, i)]);
}

__device__ void write_lists(const u32* lens, const Finalists& all, u32* indices, float* weights, u32* list_lens, float* dense,
                            u32* histogram, const Select& p) {
  u32 *const kept_ranks = reinterpret_cast<u32*>(shared), *const kept_keys = kept_ranks + KEPT;
  __shared__ u32 before[MAX_RUNS + 1];
  __shared__ u32 least, most, n_open, window_from;
  __shared__ u64 open[MAX_OPEN];
  const u32 row = blockIdx.y, lane = threadIdx.x % 32;
  const u32 n = static_cast<u32>(p.step.length(lens, row / p.h)), runs = p.runs_of(p.candidates_of(n, lens));
  const u64 first_run = static_cast<u64>(row) * p.runs;
  const u32* const ranks = all.ranks + first_run * p.room;
  const u32* const keys = all.keys + first_run * p.room;
  const u32 in_run = threadIdx.x < runs ? __ldcg(&all.counts[first_run + threadIdx.x]) : 0;
  for (u32 i = threadIdx.x; i < BINS; i += THREADS) histogram[i] = 0;
  if (threadIdx.x == 0) least = UINT32_MAX, most = n_open = 0;
  const u32 before_run = sum_before<THREADS, 1>(in_run);
  if (threadIdx.x <= MAX_RUNS) before[threadIdx.x] = before_run;
  __syncthreads();
  const u32 total = before[MAX_RUNS];
  u32 lowest = UINT32_MAX, highest = 0;
#pragma unroll 1
  for (u32 i = threadIdx.x; i < total; i += THREADS) {
    const u64 at = place_in_runs(before, p.room, i);
    const u32 rank = __ldcg(&ranks[at]), key = __ldcg(&keys[at]);
    if (i < KEPT) kept_ranks[i] = rank, kept_keys[i] = key;
    lowest = min(lowest, rank), highest = max(highest, rank);
  }
  lowest = __reduce_min_sync(ALL_LANES, lowest), highest = __reduce_max_sync(ALL_LANES, highest);
  if (lane == 0) atomicMin(&least, lowest), atomicMax(&most, highest);
  __syncthreads();

  const auto order = [&](u32 i) { return order_of(i < KEPT ? kept_ranks[i] : load_far(ranks, before, p.room, i), i); };
  End last = {order_of(least, UINT32_MAX), order_of(most, 0), p.selected_of(n, lens), total};
  const auto each_between = [&](auto f) {
#pragma unroll 1
    for (u32 i = threadIdx.x; i < total; i += THREADS) {
      const u64 x = order(i);
      if (x >= last.low && x <= last.high) f(x);
    }
  };
  last.narrow(histogram, each_between);
  if (last.count > last.wanted) {
    each_between([&](u64 x) { open[atomicAdd(&n_open, 1)] = x; });
    __syncthreads();
    // Every warp finds it for itself.
    const u64 own = open[min(lane, last.count - 1)];
    u32 above = 0;
    for (u32 i = 0; i < last.count; i++) above += open[i] > own;
    last.low = __shfl_sync(ALL_LANES, own, __ffs(__ballot_sync(ALL_LANES, above + 1 == last.wanted)) - 1);
  }

  // Positions fit 32 bits, and so do sums of them with the threads of a block.
  const u32 sink = static_cast<u32>(min(p.step.sink, u64{n})), window = static_cast<u32>(min(p.step.window, u64{n}));
  const u32 window_start = max(n - window, sink), init_offset = static_cast<u32>(p.step.init_offset);
  indices += static_cast<u64>(row) * p.list_len;
  weights += static_cast<u64>(row) * p.list_len;
  if (dense) dense += row * p.step.n;
  const auto put = [&](u32 i, u32 position) {
    indices[i] = position, weights[i] = position == PADDING ? 0.0f : 1.0f;
    if (dense && position != PADDING) dense[position] = 1;
  };
  // A thread's finalists follow each other. They are counted, and then listed, by the same code, which runs sooner the second time.
  const u32 of_thread = (total + THREADS - 1) / THREADS, begin = threadIdx.x * of_thread, end = min(begin + of_thread, total);
  u32 next = 0;
#pragma unroll 1
  for (bool lists = false;; lists = true) {
#pragma unroll 1
    for (u32 i = begin; i < end; i++) {
      if (order(i) < last.low) continue;
      const u32 position = init_offset + (i < KEPT ? kept_keys[i] : load_far(keys, before, p.room, i));
      if (position < sink || position >= window_start) continue;
      if (lists) put(next, position);
      next++;
    }
    if (lists) break;
    const u32 listed = next;
    next = sink + sum_before<THREADS, 1>(listed);
    if (threadIdx.x == THREADS - 1) window_from = next + listed;
  }
  __syncthreads();
  const u32 len = window_from + (n - window_start);
#pragma unroll 1
  for (u32 i = threadIdx.x; i < p.list_len; i += THREADS) {
    if (i < sink) put(i, i);
    if (i >= window_from) put(i, i < len ? window_start + (i - window_from) : PADDING);
  }
  if (threadIdx.x == 0) list_lens[row] = len;
}

// Grid: (runs, b * h).
template <int BYTES, class T>
__device__ void select(const T* query, const u8* codes, const float* centroids, const u32* lens, u32* buffer, u32* arrived,
                       u32* indices, float* weights, u32* list_lens, float* dense, const Select& p) {
  __shared__ alignas(16) u32 histogram[BINS];
  const Finalists finalists(buffer, gridDim.y, p);
  const u32 runs = p.runs_of(p.candidates_of(p.step.length(lens, blockIdx.y / p.h), lens));
  if (blockIdx.x >= runs) return;
  find_finalists<BYTES>(query, codes, centroids, lens, finalists, dense, histogram, p);
  if (is_last(&arrived[blockIdx.y], runs)) {
    write_lists(lens, finalists, indices, weights, list_lens, dense, histogram, p);
  }
}

#define KERNEL(suffix, type, BYTES)                                                                           \
  extern "C" __global__ __launch_bounds__(THREADS, 1) void select_##suffix##_x##BYTES(                        \
      const type* query,       /* [b, h, 1, head_dim] */                                                      \
      const u8* codes,         /* [b, h_kv, candidates, pq_dim] */                                            \
      const float* centroids,  /* [b, h_kv, pq_dim, n_centroids, pq_len] */                                   \
      const u32* lens,         /* [b], or null */                                                             \
      u32* finalists,          /* as Finalists */                                                             \
      u32* arrived,            /* [b, h] */                                                                   \
      u32* indices,            /* [b, h, list_len] */                                                         \
      float* weights,          /* [b, h, list_len] */                                                         \
      u32* list_lens,          /* [b, h] */                                                                   \
      float* dense,            /* [b, h, step.n], or null */                                                  \
      const __grid_constant__ Select p) {                                                                     \
    select<BYTES>(query, codes, centroids, lens, finalists, arrived, indices, weights, list_lens, dense, p);  \
  }
#define KERNELS(suffix, type) KERNEL(suffix, type, 1) KERNEL(suffix, type, 2) KERNEL(suffix, type, 4)
FOR_EACH_FLOAT(KERNELS)
