// What the launches of a decode step share: its sizes, a block's part of it, and what they leave each other.
#pragma once

#include "../histogram.cuh"
#include "../tables.cuh"

// Of a block of `search`.
constexpr u32 THREADS = 512;
constexpr u32 WARPS = THREADS / 32;

constexpr u32 MAX_SPLITS = 64;
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
template <bool BY_KV>
constexpr u32 BINS = BY_KV ? MAX_BINS : 2048;

// Open keys of a list whose ranks are kept. By KV head there is one list, and a million keys leave more of them open.
constexpr u32 MAX_KEPT = 1024;
template <bool BY_KV>
constexpr u32 KEPT = BY_KV ? MAX_KEPT : 256;

// A sequence of a step, in memory of its own. What there is of a position lies without gaps; strides are between heads.
struct Sequence {
  const void* query;          // [h, head_dim]
  const void* keys;           // [h_kv, capacity, head_dim], of which those from `shared` on are there
  const void* values;         // as the keys
  const void* prefix_keys;    // [h_kv, shared, head_dim]
  const void* prefix_values;  // as these
  const u8* codes;            // [h_kv, capacity, pq_dim]
  const u8* clusters;         // [h_kv, capacity], or null
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
  Step step;
  u32 n_sequences;
  u32 first_sequence;  // of the outputs
  u32 h;
  u32 h_kv;
  u32 group;
  u32 bundles;  // a row
  u32 splits;         // the most of a sequence
  u32 histogram_at;   // where it is in the shared memory of `search`: behind the tables and the tail's masses
  u32 shared_chunks;  // of scores, which come behind it
  u32 head_dim;
  u32 pq_dim;
  u32 n_centroids;
  u32 n_clusters;  // 0 for none
  u32 has_tail;
  float scale;
  // Behind what all blocks ask for first, which so lies beside the other arguments: fewer lines of the constant cache.
  Sequence sequences[MAX_SEQUENCES];
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
  float top;       // no key that is not selected ranks above: by query head the end of that bin
  u32 wanted;      // keys of that bin that are selected
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

  __device__ Part(u32 sequence, u32 kv, u32 bundle, u32 split, u32 heads_per_bundle, const Decode& p)
      : sequence(sequence), split(split), kv(kv), bundle(bundle) {
    row = sequence * p.h_kv + kv;
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
  __device__ u32 position(u32 i) const {
    return ((i * WARPS + threadIdx.x / 32) * splits + split) * CHUNK + threadIdx.x % 32 * EACH;
  }

  // The bundle's place among those of all sequences, and the first head's.
  __device__ u32 bundle_of_all(const Decode& p) const { return row * p.bundles + bundle; }
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

// Weights of a tail as integers, of which a block adds up those of `keys`: sums fit 32 bits, and the largest weight the
// mantissa of an f32.
struct TailUnits {
  u32 bits;  // the largest weight is 2^bits units

  __device__ explicit TailUnits(u32 keys) : bits(min(__clz(max(keys, 2u) - 1) - 1, 22)) {}

  // What is added to the weight of a key before it is rounded down, below 1 unit: evenly spread over the keys, so that their
  // sum is not biased by weights that are small beside a unit.
  __device__ float cut_of(u32 position) const {
    const float unit = __uint_as_float((127 - bits) << 23);
    return __fmaf_rn(__uint_as_float(0x3f800000 | __brev(position) >> 9), unit, -unit);
  }

  // A share x * factor of the largest weight; what is above counts as the largest, NaN as nothing. Nothing as well with a cut
  // of -infinity.
  __device__ u32 of(float x, float factor, float cut) const {
    const float to_integer = __uint_as_float((127 + 23 - bits) << 23);
    return __float_as_uint(__fadd_rd(__saturatef(__fmaf_rn(x, factor, cut)), to_integer)) & 0x7fffff;
  }
};
