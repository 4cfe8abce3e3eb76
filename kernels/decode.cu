// A decode step over an index, in two launches behind the one that makes its tables (begin_step.cu).
//
// A row is a KV head of a sequence; its query heads come in bundles of HEADS, whose numbers lie side by side in tables and
// scores, so that one look-up or load serves all of them. A list is what is selected together: a row's keys by KV head,
// a query head's otherwise. Each row (by query head each bundle) is shared by a team of `splits` blocks, which take turns
// at its keys, 128 at a time.
//
// Sequences are each in memory of their own and as long as they are; longer ones have larger teams.
//
// `search` runs all blocks at once, a block a multiprocessor, each with the tables in its shared memory. Scores stay where they are
// made, there too as far as there is room; a team meets where one of its blocks needs what others found:
// 1. scores: entries added up for each key. By KV head a block's softmax statistics, by query head the histograms.
// 2. shares, by KV head: each head's softmax, whose sum over the group is a key's mass, and the masses' histogram. All shares
//    add to the tail's mass of their cluster.
// 3. selection: the histogram says in which bin the selection ends. Keys in higher bins are listed, and those in the bin stay
//    open; by KV head both are taken out of the tail. By query head keys in lower bins add to it now.
//
// `attend`: each block ranks the open keys of its lists, which says at which of them the selection ends. Then it attends to
// what it listed, to its part of the sinks and of the window, and to some of the clusters. The last block of a bundle brings
// the partial results together.
//
// Sums of integers, in histograms and in the tail's masses, do not depend on the order; what is in f32 has a fixed one. So
// the result is the same in each run. What counts up over a step is left at zero for the next.
#include "decode/attend.cuh"
#include "decode/search.cuh"

#define SEARCH(name, HEADS, BY_KV)                                                                         \
  extern "C" __global__ __launch_bounds__(THREADS, 1) void decode_search_h##HEADS##name(                   \
      const float* tables,  /* [sequences, h_kv, bundles, entries, HEADS] */                               \
      const float* bounds,  /* [sequences, h_kv, bundles, units, UNIT_BOUNDS<HEADS>] */                    \
      float* scores,      /* of each sequence [h_kv, bundles, room, HEADS]; by KV head shares, of the open keys */ \
      float* masses,      /* of each [h_kv, room], of the open keys, and of what finds no shared memory; null by query head */ \
      Stats* stats,       /* [sequences, h_kv, bundles, MAX_SPLITS, HEADS] */                              \
      Search* searches,   /* [lists] */                                                                    \
      u32* lists,         /* of each sequence [its lists, its splits, WARPS, per_warp] */                  \
      Listed* listed,     /* [lists, splits, WARPS] */                                                     \
      u32* tail,          /* [sequences, lists of heads, splits, heads of a list, MAX_CLUSTERS] */         \
      const __grid_constant__ Decode p) {                                                                  \
    search<HEADS, BY_KV>(tables, bounds, scores, masses, stats, searches, lists, listed, tail, p);         \
  }
#define ATTEND(suffix, type, D, name, HEADS, BY_KV)                                                        \
  extern "C" __global__ __launch_bounds__(ATTEND_THREADS<D>, ATTEND_BLOCKS<D>) void decode_attend_##suffix##_d##D##_h##HEADS##name( \
      const float* scores,    /* as search leaves them, and all up to `tail` */                            \
      const float* masses,                                                                                 \
      Search* searches,                                                                                    \
      const u32* lists,                                                                                    \
      const Listed* listed,                                                                                \
      const u32* tail,                                                                                     \
      float* partials,        /* [sequences, h_kv, bundles, splits, HEADS, D] */                           \
      float2* partial_stats,  /* [sequences, h_kv, bundles, splits, HEADS] */                              \
      u32* arrived,           /* [sequences, h_kv, bundles] */                                             \
      type* out,              /* [sequences, h, head_dim] */                                               \
      const __grid_constant__ Decode p) {                                                                  \
    attend<HEADS, BY_KV, D>(scores, masses, searches, lists, listed, tail, partials, partial_stats, arrived, out, p); \
  }

#define BY_HEADS(HEADS) SEARCH(, HEADS, false) SEARCH(_by_kv, HEADS, true)
#define BY_TYPE(suffix, type)                                                         \
  BY_SIZE(suffix, type, 64) BY_SIZE(suffix, type, 128) BY_SIZE(suffix, type, 256)
#define BY_SIZE(suffix, type, D)                                                      \
  ATTEND(suffix, type, D, , 1, false) ATTEND(suffix, type, D, _by_kv, 1, true)        \
  ATTEND(suffix, type, D, , 2, false) ATTEND(suffix, type, D, _by_kv, 2, true)        \
  ATTEND(suffix, type, D, , 4, false) ATTEND(suffix, type, D, _by_kv, 4, true)
BY_HEADS(1) BY_HEADS(2) BY_HEADS(4)
FOR_EACH_FLOAT(BY_TYPE)
