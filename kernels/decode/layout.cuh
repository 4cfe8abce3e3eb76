// What the launches of a decode step share: its sizes, a block's part of it, and what they leave each other.
#pragma once

#include "../common.cuh"

// Threads of a block of `search`. What each warp does once takes longer the more there are, and what they do for each key
// less: many are for small teams, whose blocks have many keys.
constexpr int FEW_THREADS = 512;
constexpr int MANY_THREADS = 1024;
constexpr u32 MAX_WARPS = MANY_THREADS / 32;
constexpr u32 MAX_SPLITS = 64;
constexpr u32 MAX_CLUSTERS = 256;
constexpr u32 MAX_GROUP = 64;

// Keys that a warp takes at a time: four adjacent ones a lane.
constexpr u32 EACH = 4;
constexpr u32 CHUNK = 32 * EACH;
static_assert(PAGE % CHUNK == 0);

// Where the scores of a key are: those that the lanes of a warp write or read at once lie side by side.
__device__ inline u32 score_slot(u32 position) {
  return position / CHUNK * CHUNK + position % EACH * 32 + position % CHUNK / EACH;
}

// Bins of a histogram. Masses want more: their bins are not as even.
constexpr u32 MAX_BINS = 4096;
template <bool BY_KV>
constexpr u32 BINS = BY_KV ? MAX_BINS : 2048;

// Open keys of a list whose ranks are kept. By KV head there is one list, and a million keys leave more of them open.
constexpr u32 MAX_KEPT = 1024;
template <bool BY_KV>
constexpr u32 KEPT = BY_KV ? MAX_KEPT : 256;

// The most sequences of a launch, whose parameters must fit 4 KB.
constexpr u32 MAX_SEQUENCES = 16;

// A sequence of a step, in memory of its own. What there is of a position lies without gaps; strides are between heads.
struct Sequence {
  const void* query;          // [h, head_dim]
  const void* keys;           // [h_kv, capacity, head_dim], of which those from `shared` on are there
  const void* values;         // as the keys
  const void* prefix_keys;    // [h_kv, shared, head_dim]
  const void* prefix_values;  // as these
  const u8* codes;            // [h_kv, capacity, pq_dim]
  const u8* clusters;         // [h_kv, capacity], or null
  const float* centroids;     // [h_kv, pq_dim, n_centroids, pq_len]
  const float* coarse;        // [h_kv, n_clusters, head_dim], or null
  const float* sums;          // [h_kv, n_clusters, head_dim], or null
  const u32* counts;          // [h_kv, n_clusters], or null
  const u32* pages;           // of keys and values, or null
  const u32* code_pages;      // of codes and clusters, or null
  const u32* len;
  u64 query_stride;
  u64 key_stride;  // and of values
  u64 prefix_stride;
  u64 codes_stride;
  u64 clusters_stride;
  u64 room_before;   // of the sequences before this one
  u64 lists_before;  // positions in their lists
  u32 room;          // positions that a row's scores have room for, a multiple of CHUNK
  u32 per_warp;      // the most keys that a warp of a split may have: the lists' room for them
  u32 capacity;
  u32 ahead;  // so many of its last keys are not seen
  u32 shared;
  u32 splits;
  u32 first_block;  // of `search`
};

struct Decode {
  Sequence sequences[MAX_SEQUENCES];
  Step step;
  u32 n_sequences;
  u32 first_sequence;  // of the outputs
  u32 h;
  u32 h_kv;
  u32 group;
  u32 bundles;  // a row
  u32 splits;         // the most of a sequence
  u32 warps;          // of a block of `search`
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

__device__ inline float exp2_approx(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

// What is known of a list. Zeroed once. Rust: SEARCH_WORDS in ops/decode/fused.rs.
struct Search {
  u32 histogram[MAX_BINS];
  u64 open[MAX_KEPT];  // ranks of the first keys in the bin in which the selection ends
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
  u32 sequence;
  u32 split;
  u32 splits;
  u32 kv;
  u32 row;     // of all sequences'
  u32 bundle;  // of the row
  u32 first_head;
  u32 heads;
  u32 n;
  u32 begin;  // candidates
  u32 end;
  u32 sink;
  u32 window_start;

  // Of a split of the `of_all`-th of all bundles.
  __device__ Part(u32 of_all, u32 split, u32 heads_per_bundle, const Decode& p) : split(split) {
    bundle = of_all % p.bundles;
    row = of_all / p.bundles;
    sequence = row / p.h_kv;
    kv = row % p.h_kv;
    first_head = kv * p.group + bundle * heads_per_bundle;
    heads = min(heads_per_bundle, p.group - bundle * heads_per_bundle);
    const Sequence& own = p.sequences[sequence];
    splits = own.splits;
    n = min(*own.len, own.capacity);
    n -= min(own.ahead, n);
    begin = static_cast<u32>(p.step.init_offset);
    end = n - static_cast<u32>(min(p.step.window, u64{n}));
    sink = static_cast<u32>(min(p.step.sink, u64{n}));
    window_start = max(end, sink);
  }

  // The first position of a lane's keys, the `i`-th time.
  template <int THREADS>
  __device__ u32 position(u32 i) const {
    u32 thread = threadIdx.x, threads = THREADS;
    // With many threads asked for anew each time: what is kept for the next phase takes registers that this one needs.
    if constexpr (THREADS == MANY_THREADS) {
      asm volatile("mov.u32 %0, %tid.x; mov.u32 %1, %ntid.x;" : "=r"(thread), "=r"(threads));
    }
    return ((i * (threads / 32) + thread / 32) * splits + split) * CHUNK + thread % 32 * EACH;
  }

  // The head's place among those of all sequences.
  __device__ u32 head_of_all(const Decode& p) const { return sequence * p.h + first_head; }

  // Where the masses of this row begin, in positions.
  __device__ u64 masses_at(const Decode& p) const {
    const Sequence& own = p.sequences[sequence];
    return own.room_before * p.h_kv + static_cast<u64>(kv) * own.room;
  }

  // Where the scores of this bundle begin, in positions.
  __device__ u64 scores_at(const Decode& p) const {
    const Sequence& own = p.sequences[sequence];
    return (own.room_before * p.h_kv + static_cast<u64>(kv) * own.room) * p.bundles + static_cast<u64>(bundle) * own.room;
  }
};

// Of two that are equal the one in front is better.
__device__ inline u64 rank_of(float x, u32 position) { return static_cast<u64>(rank_of(x)) << 32 | ~position; }

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
