// `search`: which keys a step attends to, and what all others weigh.
#pragma once

#include "bins.cuh"
#include "layout.cuh"
#include "tables.cuh"

// The largest product of a block's keys with a head's query, and the sum of 2^(product - largest).
struct Stats {
  float largest;
  float sum;
};

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

// Has what is at `from` come to the second-level cache.
__device__ inline void prefetch(const u8* from) { asm volatile("prefetch.global.L2 [%0];" ::"l"(from)); }

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

// What a block keeps of its keys, a chunk of a warp's keys at a time, the `local`-th of the block and the `chunk`-th of all:
// in shared memory as far as there is room.
template <int HEADS>
struct Kept {
  Packed<HEADS>* shared_scores;  // [shared_chunks, bundles, CHUNK]
  float* shared_masses;          // [shared_chunks, CHUNK]
  Packed<HEADS>* scores;         // [bundles, room]
  float* masses;                 // [room]
  u32 shared_chunks;
  u32 bundles;
  u64 room;

  // Those of a lane lie 32 apart.
  __device__ Packed<HEADS>* scores_at(u32 local, u32 chunk, u32 bundle) const {
    Packed<HEADS>* const first =
        local < shared_chunks ? shared_scores + (local * bundles + bundle) * CHUNK : scores + bundle * room + chunk * CHUNK;
    return first + threadIdx.x % 32;
  }
  __device__ float* masses_at(u32 local, u32 chunk) const {
    return (local < shared_chunks ? shared_masses + local * CHUNK : masses + chunk * CHUNK) + threadIdx.x % 32;
  }
};

// Adds up the entries of this block's keys. `then(at, x)` is called with a lane's keys and their scores.
template <int HEADS, class Then>
__device__ void add_entries(const u8* codes, const u8* clusters, const u8* rows, const Kept<HEADS>& kept, u32 bundle,
                            const Part& part, const Decode& p, Then then) {
  using Sum = Packed<HEADS>;
  constexpr u32 SLOTS = ROW_BYTES / sizeof(Sum);
  const u32 lane = threadIdx.x % 32, warp = threadIdx.x / 32, chunks = p.pq_dim / SUBSPACES;
  const u8* const coarse_rows = rows + chunks * p.n_centroids * ROW_BYTES;
  const u32 slot = lane % SLOTS, start = slot % SUBSPACES;
  // The subspaces in a lane's order: start, start ^ 1, start ^ 2, ... The last four are the first with one bit flipped.
  constexpr u32 FLIP = SUBSPACES / 2;
  u32 order[2] = {}, offsets[FLIP];
#pragma unroll
  for (u32 j = 0; j < SUBSPACES; j++) {
    order[j / 4] |= (start ^ j) << j % 4 * 4;
    if (j < FLIP) offsets[j] = (slot - start + (start ^ j)) * sizeof(Sum);
  }
  const u32 code_mask = (p.n_centroids - 1) * ROW_BYTES, cluster_mask = p.n_clusters - 1;
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
    Sum x[EACH] = {};
    if (p.n_clusters) {
#pragma unroll
      for (u32 j = 0; j < EACH; j++) {
        x[j] = reinterpret_cast<const Sum*>(coarse_rows + (next_clusters >> j * 8 & cluster_mask) * ROW_BYTES)[slot];
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
          if (m >= FLIP) offset ^= FLIP * sizeof(Sum);
          x[j] += *reinterpret_cast<const Sum*>(table + offset);
        }
      }
    }
    Sum* const to = kept.scores_at(i * WARPS + warp, at / CHUNK, bundle);
#pragma unroll
    for (u32 j = 0; j < EACH; j++) to[j * 32] = x[j];
    then(at, x);
    at = later;
  }
}

// Calls f(at, local, chunk) for the keys of each lane in turn.
template <class F>
__device__ void each_chunk(const Part& part, const Decode& p, F f) {
  const u32 lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  u32 at = part.position(0, WARPS, p.splits);
  for (u32 i = 0; at - lane * EACH < part.end; at = part.position(++i, WARPS, p.splits)) f(at, i * WARPS + warp, at / CHUNK);
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

// A head's score as its share of the softmax: 2^(factor * score - shift).
struct Share {
  float factor;
  float shift;

  __device__ float of(float score) const { return exp2_approx(fmaf(score, factor, -shift)); }
};

// Where a warp's keys of a list go: those that are selected for sure from the front on, those that may be from the end on.
struct List {
  u32* own;
  u32 per_warp;
  u32 n_sure;
  u32 n_open;

  // To a whole warp. Whether the lane's key is listed.
  __device__ void add(u32 position, bool is_sure, bool is_open) {
    const u32 all_sure = __ballot_sync(ALL_LANES, is_sure), all_open = __ballot_sync(ALL_LANES, is_open);
    const u32 before = (1u << threadIdx.x % 32) - 1;
    if (is_sure) own[n_sure + __popc(all_sure & before)] = position;
    if (is_open) own[per_warp - 1 - (n_open + __popc(all_open & before))] = position;
    n_sure += __popc(all_sure);
    n_open += __popc(all_open);
  }
};

// Leaves the rank of a key that may be selected.
__device__ inline void leave_open(Search& search, float x, u32 position) {
  const u32 slot = atomicAdd(&search.n_open, 1);
  if (slot < KEPT) search.open[slot] = rank_of(x, position);
}

// What a block searches with.
template <int HEADS>
struct Block {
  const u8* codes;
  const u8* clusters;
  u32* histogram;   // a list's bins after the other's
  u32* tail_units;  // [heads, MAX_CLUSTERS]; where the tables were
  Kept<HEADS> kept;
  float* open_scores;  // [bundles, room, HEADS], of the open keys: scores, by KV head shares
  Search* searches;    // of this team's lists
  u32* lists;          // [lists, splits, WARPS, per_warp], from the first of the team's on
  Listed* listed;      // [lists, splits, WARPS]

  __device__ List list(u32 i, const Decode& p) const {
    const u64 segment = (static_cast<u64>(i) * p.splits + blockIdx.x) * WARPS + threadIdx.x / 32;
    return {lists + segment * p.per_warp, p.per_warp, 0, 0};
  }
  __device__ void leave(u32 i, const List& list, const Decode& p) const {
    if (threadIdx.x % 32 != 0) return;
    listed[(static_cast<u64>(i) * p.splits + blockIdx.x) * WARPS + threadIdx.x / 32] = {list.n_sure, list.n_open};
  }
};

// As each_chunk, with the clusters of the keys, if there is a tail: those of what comes next are on their way.
template <int HEADS, class F>
__device__ void each_chunk(const Part& part, const Decode& p, const Block<HEADS>& block, F f) {
  const auto load = [&](u32 at) {
    return p.has_tail && at < part.end ? __ldg(reinterpret_cast<const u32*>(block.clusters + at)) : 0;
  };
  u32 i = 0, next = load(part.position(0, WARPS, p.splits));
  each_chunk(part, p, [&](u32 at, u32 local, u32 chunk) {
    const u32 clusters = next;
    next = load(part.position(++i, WARPS, p.splits));
    f(at, local, chunk, clusters);
  });
}

// Adds a block's histogram to that of its list: the bins from `from` to `to`.
__device__ inline void add_histogram(const u32* own, u32 from, u32 to, Search& search) {
  for (u32 i = from + threadIdx.x; i < to; i += THREADS) {
    if (own[i]) atomicAdd(&search.histogram[i], own[i]);
  }
}

// By KV head: keys are ranked by their mass, the sum over the heads of their shares of the softmax.
//
// All keys are first added to the tail, whose units are shares too, and those that may be selected taken out again; what is
// not selected of these `attend` puts back.
template <int HEADS>
__device__ void search_by_mass(const Block<HEADS>& block, const Entry<HEADS>* tables, const Bounds<HEADS>* bounds,
                               u8* rows, Stats* stats, u32 k, const Part& part, const Decode& p) {
  constexpr u32 N_BINS = BINS<true>;
  __shared__ Share shares[MAX_GROUP];
  __shared__ float best_shares[MAX_GROUP], lows[MAX_GROUP];
  __shared__ Stats of_warps[HEADS][WARPS];
  __shared__ u32 found_bin[1], found_wanted[1];
  const u32 lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const float scale = p.scale * LOG2_E;
  const Kept<HEADS>& kept = block.kept;
  for (u32 bundle = 0; bundle < p.bundles; bundle++) {
    Range ranges[HEADS];
    load_tables<HEADS>(tables + bundle * p.entries(), bounds + bundle * p.columns(), rows, ranges, p);
    Stats own[HEADS];
#pragma unroll
    for (int h = 0; h < HEADS; h++) own[h] = {-INFINITY, 0};
    add_entries<HEADS>(block.codes, block.clusters, rows, kept, bundle, part, p, [&](u32 at, const Packed<HEADS>(&x)[EACH]) {
#pragma unroll
      for (int h = 0; h < HEADS; h++) {
        const float factor = ranges[h].step * scale;
        float larger = own[h].largest, product[EACH];
#pragma unroll
        for (u32 j = 0; j < EACH; j++) {
          product[j] = part.is_candidate(at + j) ? x[j].as_float(h) * factor : -INFINITY;
          larger = fmaxf(larger, product[j]);
        }
        own[h].sum *= exp2_approx(own[h].largest - finite(larger));
        own[h].largest = larger;
#pragma unroll
        for (u32 j = 0; j < EACH; j++) own[h].sum += exp2_approx(product[j] - finite(larger));
      }
    });
#pragma unroll
    for (int h = 0; h < HEADS; h++) {
      const Stats of_warp = reduce<32>(own[h]);
      if (lane == 0) of_warps[h][warp] = of_warp;
      if (threadIdx.x == 0) shares[bundle * HEADS + h].factor = ranges[h].step * scale, lows[bundle * HEADS + h] = ranges[h].low * scale;
    }
    __syncthreads();
    if (warp < HEADS) {
      const Stats of_block = reduce<WARPS>(of_warps[warp][lane % WARPS]);
      if (lane == 0) stats[(bundle * MAX_SPLITS + blockIdx.x) * HEADS + warp] = of_block;
    }
  }
  for (u32 i = threadIdx.x; p.has_tail && i < p.group * MAX_CLUSTERS; i += THREADS) block.tail_units[i] = 0;
  meet(&block.searches->arrived, p.splits, 2);

  for (u32 head = warp; head < p.bundles * HEADS; head += WARPS) {
    const Stats all = find_stats<HEADS>(stats, head / HEADS, head % HEADS, p.splits);
    // A head that there is not has a share of 0.
    const float shift = head < p.group ? all.largest + log2f(all.sum) : INFINITY;
    if (lane == 0) {
      shares[head].shift = shift, best_shares[head] = exp2_approx(all.largest - shift);
      // For `attend`, which knows scores, not integers.
      if (blockIdx.x == 0) block.searches->shifts[head] = shift + lows[head];
    }
  }
  __syncthreads();
  float best = 0;
  for (u32 head = 0; head < p.group; head++) best += best_shares[head];
  const MassBins bins(0.5f * p.group / max(part.end - part.begin, 1u), best);
  each_chunk(part, p, block, [&](u32 at, u32 local, u32 chunk, u32 clusters) {
    float mass[EACH] = {};
    for (u32 bundle = 0; bundle < p.bundles; bundle++) {
      const Packed<HEADS>* const from = kept.scores_at(local, chunk, bundle);
      Packed<HEADS> x[EACH];
#pragma unroll
      for (u32 j = 0; j < EACH; j++) x[j] = from[j * 32];
#pragma unroll
      for (int h = 0; h < HEADS; h++) {
        const Share of_head = shares[bundle * HEADS + h];
        u32* const units = block.tail_units + (bundle * HEADS + h) * MAX_CLUSTERS;
#pragma unroll
        for (u32 j = 0; j < EACH; j++) {
          const u32 position = at + j;
          const float share = of_head.of(x[j].as_float(h));
          mass[j] += share;
          if (p.has_tail && part.is_candidate(position) && position >= part.sink) {
            const u32 own = in_units(share * SHARE_UNIT, cut_of(position));
            if (own) atomicAdd(&units[clusters >> j * 8 & 0xff], own);
          }
        }
      }
    }
    float* const to = kept.masses_at(local, chunk);
#pragma unroll
    for (u32 j = 0; j < EACH; j++) {
      to[j * 32] = mass[j];
      if (part.is_candidate(at + j)) atomicAdd(&block.histogram[bins.of(mass[j])], 1);
    }
  });
  // Where the block alone has `k` keys in bins that are as good, the selection ends no further down.
  __syncthreads();
  find_bins<N_BINS, 1>([&](u32) { return block.histogram; }, k, found_bin, found_wanted);
  add_histogram(block.histogram, found_bin[0] == MAX_BINS ? 0 : found_bin[0], N_BINS, *block.searches);
  meet(&block.searches->arrived, p.splits, 3);

  find_bins<N_BINS, 1>([&](u32) { return block.searches->histogram; }, k, found_bin, found_wanted);
  const u32 bin = found_bin[0];
  const float bottom = bins.bottom_of(bin);
  if (blockIdx.x == 0 && threadIdx.x == 0) block.searches->wanted = found_wanted[0];
  List list = block.list(0, p);
  each_chunk(part, p, [&](u32 at, u32 local, u32 chunk) {
    const float* const from = kept.masses_at(local, chunk);
    float mass[EACH];
    bool is_above = false;
#pragma unroll
    for (u32 j = 0; j < EACH; j++) {
      mass[j] = from[j * 32];
      is_above |= !(mass[j] < bottom);
    }
    if (!__any_sync(ALL_LANES, is_above)) return;
    const u32 clusters = p.has_tail && at < part.end ? __ldg(reinterpret_cast<const u32*>(block.clusters + at)) : 0;
#pragma unroll
    for (u32 j = 0; j < EACH; j++) {
      const u32 position = at + j, in = bins.of(mass[j]);
      const bool is_candidate = part.is_candidate(position), is_sink = position < part.sink;
      const bool is_sure = is_candidate && in > bin && !is_sink, is_open = is_candidate && in == bin;
      list.add(position, is_sure, is_open);
      if (!is_sure && !is_open) continue;
      // For `attend`: where an open key is, its rank, and what it weighs.
      if (is_open) leave_open(*block.searches, mass[j], position);
      if (is_open) kept.masses[score_slot(position)] = mass[j];
      for (u32 bundle = 0; bundle < p.bundles; bundle++) {
        const Packed<HEADS> x = kept.scores_at(local, chunk, bundle)[j * 32];
#pragma unroll
        for (int h = 0; h < HEADS; h++) {
          const float share = shares[bundle * HEADS + h].of(x.as_float(h));
          if (is_open) block.open_scores[(bundle * p.room + score_slot(position)) * HEADS + h] = share;
          const u32 own = p.has_tail && !is_sink ? in_units(share * SHARE_UNIT, cut_of(position)) : 0;
          if (own) atomicSub(&block.tail_units[(bundle * HEADS + h) * MAX_CLUSTERS + (clusters >> j * 8 & 0xff)], own);
        }
      }
    }
  });
  block.leave(0, list, p);
}

// By query head: keys are ranked by each head's scores.
//
// Scores of a head lie close to each other, and lanes that count in the same bin wait for each other. So a quarter of the
// keys is counted, and of the others those in bins in which the selection may end. Where it is found to end further down
// all are counted after all.
template <int HEADS>
__device__ void search_by_score(const Block<HEADS>& block, const Entry<HEADS>* tables, const Bounds<HEADS>* bounds,
                                u8* rows, u32 k, const Part& part, const Decode& p) {
  constexpr u32 N_BINS = BINS<false>;
  __shared__ u32 counted_from[HEADS], found_bin[HEADS], found_wanted[HEADS];
  const float scale = p.scale * LOG2_E;
  const Kept<HEADS>& kept = block.kept;
  const u32 n_lists = part.heads;
  Range ranges[HEADS];
  load_tables<HEADS>(tables, bounds, rows, ranges, p);
  add_entries<HEADS>(block.codes, block.clusters, rows, kept, 0, part, p, [&](u32 at, const Packed<HEADS>(&x)[EACH]) {
    if (!part.is_candidate(at)) return;
#pragma unroll
    for (int h = 0; h < HEADS; h++) atomicAdd(&block.histogram[h * N_BINS + x[0].of(h) / SCORES_A_BIN], 1);
  });
  __syncthreads();
  const auto own_counts = [&](u32 list) { return block.histogram + list * N_BINS; };
  // Twice this block's part of the keys to select, of which a quarter has been counted.
  find_bins<N_BINS, HEADS>(own_counts, k / (2 * p.splits) + 16, counted_from, found_wanted);
  u32 from[HEADS];
#pragma unroll
  for (int h = 0; h < HEADS; h++) from[h] = counted_from[h] == MAX_BINS ? 0 : counted_from[h];
  // The other three quarters, in the bins from `from` on, or in those below.
  const auto count = [&](bool is_below) {
    each_chunk(part, p, [&](u32 at, u32 local, u32 chunk) {
      const Packed<HEADS>* const own = kept.scores_at(local, chunk, 0);
#pragma unroll
      for (u32 j = 1; j < EACH; j++) {
        const Packed<HEADS> x = own[j * 32];
        if (!part.is_candidate(at + j)) continue;
#pragma unroll
        for (int h = 0; h < HEADS; h++) {
          const u32 bin = x.of(h) / SCORES_A_BIN;
          if ((bin < from[h]) == is_below) atomicAdd(&block.histogram[h * N_BINS + bin], 1);
        }
      }
    });
    __syncthreads();
  };
  count(false);
  // Where the block alone has `k` keys in bins that are as good, the selection ends no further down.
  find_bins<N_BINS, HEADS>(own_counts, k, found_bin, found_wanted);
  for (u32 list = 0; list < n_lists; list++) {
    const u32 enough = found_bin[list] == MAX_BINS ? 0 : found_bin[list];
    add_histogram(own_counts(list), max(enough, from[list]), N_BINS, block.searches[list]);
  }
  if (threadIdx.x == 0) {
#pragma unroll
    for (u32 list = 0; list < HEADS; list++) {
      if (list < n_lists) atomicMax(&block.searches[list].counted_from, from[list]);
    }
  }
  meet(&block.searches->arrived, p.splits, 2);

  const auto all_counts = [&](u32 list) { return block.searches[min(list, n_lists - 1)].histogram; };
  find_bins<N_BINS, HEADS>(all_counts, k, found_bin, found_wanted);
  bool is_found = true;  // or not in all blocks
  for (u32 list = 0; list < n_lists; list++) {
    const u32 bin = found_bin[list];
    is_found &= k == 0 || (bin != MAX_BINS && bin >= __ldcg(&block.searches[list].counted_from));
  }
  if (!is_found) {
    count(true);
    for (u32 list = 0; list < n_lists; list++) add_histogram(own_counts(list), 0, from[list], block.searches[list]);
    meet(&block.searches->arrived, p.splits, 3);
    find_bins<N_BINS, HEADS>(all_counts, k, found_bin, found_wanted);
  }

  // What makes the largest weight that there may be below the bin a unit of the tail.
  const float unit = tail_unit(p.per_warp * WARPS);
  u32 bins[HEADS];
  Share weights[HEADS];
  List lists[HEADS];
#pragma unroll
  for (int h = 0; h < HEADS; h++) {
    bins[h] = found_bin[h];
    const float top = (min(bins[h], N_BINS - 1) + 1) * SCORES_A_BIN;
    weights[h].factor = ranges[h].step * scale;
    weights[h].shift = top * weights[h].factor - log2f(unit);
    lists[h] = block.list(h, p);
    if (blockIdx.x == 0 && threadIdx.x == 0 && h < n_lists) {
      block.searches[h].wanted = found_wanted[h], block.searches[h].top = ranges[h].of(top);
    }
  }
  for (u32 i = threadIdx.x; p.has_tail && i < n_lists * MAX_CLUSTERS; i += THREADS) block.tail_units[i] = 0;
  __syncthreads();
  each_chunk(part, p, block, [&](u32 at, u32 local, u32 chunk, u32 clusters) {
    const Packed<HEADS>* const from = kept.scores_at(local, chunk, 0);
#pragma unroll
    for (u32 j = 0; j < EACH; j++) {
      const Packed<HEADS> x = from[j * 32];
      const u32 position = at + j, cluster = clusters >> j * 8 & 0xff;
      const bool is_candidate = part.is_candidate(position), is_sink = position < part.sink;
      const float cut = cut_of(position);
#pragma unroll
      for (int h = 0; h < HEADS; h++) {
        const u32 bin = x.of(h) / SCORES_A_BIN;
        const bool is_listed = is_candidate && bin >= bins[h] && h < n_lists;
        if (__any_sync(ALL_LANES, is_listed)) {
          const bool is_open = is_listed && bin == bins[h];
          lists[h].add(position, is_listed && bin > bins[h] && !is_sink, is_open);
          if (is_open) {
            const float score = ranges[h].of(x.as_float(h));
            leave_open(block.searches[h], score, position);
            block.open_scores[static_cast<u64>(score_slot(position)) * HEADS + h] = score;
          }
        }
        if (!p.has_tail || is_listed || !is_candidate || is_sink || h >= n_lists) continue;
        const u32 units = in_units(fminf(weights[h].of(x.as_float(h)), unit), cut);
        if (units) atomicAdd(&block.tail_units[h * MAX_CLUSTERS + cluster], units);
      }
    }
  });
#pragma unroll
  for (int h = 0; h < HEADS; h++) {
    if (h < n_lists) block.leave(h, lists[h], p);
  }
}

// Grid: (splits, b * h_kv, or b * h_kv * bundles by query head). Blocks of one y are a team.
template <int HEADS, bool BY_KV, class T>
__device__ void search(const T* query, const u8* codes, const u8* clusters, const float* centroids, const float* coarse,
                       const u32* lens, float* all_tables, u32* all_bounds, u32* all_scores, float* open_scores,
                       float* masses, Stats* stats, Search* searches, u32* lists, Listed* listed, u32* tail,
                       const Decode& p) {
  constexpr u32 N_BINS = (BY_KV ? 1 : HEADS) * BINS<BY_KV>;
  extern __shared__ __align__(128) u8 rows[];  // tables, and after these the tail's masses; histograms; scores; masses
  u32* const histogram = reinterpret_cast<u32*>(rows + p.histogram_at);
  const u32 y = BY_KV ? blockIdx.y * p.bundles : blockIdx.y;  // the team's first bundle
  Entry<HEADS>* const tables = reinterpret_cast<Entry<HEADS>*>(all_tables) + y * u64{p.entries()};
  Bounds<HEADS>* const bounds = reinterpret_cast<Bounds<HEADS>*>(all_bounds) + y * u64{p.columns()};
  const u32 row = y / p.bundles, b = row / p.h_kv, kv = row % p.h_kv;
  for (u32 bundle = 0; bundle < (BY_KV ? p.bundles : 1); bundle++) {
    make_tables<HEADS>(query, centroids, coarse, tables + bundle * p.entries(), bounds + bundle * p.columns(),
                       reinterpret_cast<float*>(histogram), b, kv, y % p.bundles + bundle, p);
  }
  const Part part(lens, y, HEADS, p);
  const u32 heads = BY_KV ? p.group : part.heads, first_head = BY_KV ? kv * p.group : part.first_head;
  const u32 first_list = BY_KV ? row : b * p.h + first_head, n_lists = BY_KV ? 1 : heads;
  codes += p.codes.at(b, kv);
  clusters += p.n_clusters ? p.clusters.at(b, kv) : 0;
  if (blockIdx.x == 0 && threadIdx.x < n_lists) {
    Search& search = searches[first_list + threadIdx.x];
    search.n_open = 0, search.counted_from = 0;
  }
  // Codes are on their way to the second-level cache while the tables are brought together.
  each_chunk(part, p, [&](u32 at, u32, u32) {
    if (at >= part.end) return;
    prefetch(codes + static_cast<u64>(at) * p.pq_dim);
    if (p.n_clusters && threadIdx.x % 8 == 0) prefetch(clusters + at);
  });
  meet(&searches[first_list].arrived, p.splits, 1);

  for (u32 i = threadIdx.x; i < N_BINS; i += THREADS) histogram[i] = 0;
  const u32 bundles = BY_KV ? p.bundles : 1, k = static_cast<u32>(p.step.selected(part.n));
  Packed<HEADS>* const shared_scores = reinterpret_cast<Packed<HEADS>*>(histogram + N_BINS);
  const Kept<HEADS> kept = {shared_scores,
                            reinterpret_cast<float*>(shared_scores + p.shared_chunks * bundles * CHUNK),
                            reinterpret_cast<Packed<HEADS>*>(all_scores) + y * p.room,
                            masses + (BY_KV ? row * p.room : 0),
                            p.shared_chunks,
                            bundles,
                            p.room};
  const u64 first_segment = static_cast<u64>(first_list) * p.splits * WARPS;
  const Block<HEADS> block = {codes,
                              clusters,
                              histogram,
                              reinterpret_cast<u32*>(rows),
                              kept,
                              open_scores + y * p.room * HEADS,
                              searches + first_list,
                              lists + first_segment * p.per_warp,
                              listed + first_segment};
  if constexpr (BY_KV) {
    search_by_mass<HEADS>(block, tables, bounds, rows, stats + u64{y} * MAX_SPLITS * HEADS, k, part, p);
  } else {
    search_by_score<HEADS>(block, tables, bounds, rows, k, part, p);
  }
  __syncthreads();
  if (p.has_tail) {
    u32* const to = tail + ((static_cast<u64>(b) * p.h + first_head) * p.splits + blockIdx.x * heads) * MAX_CLUSTERS;
    for (u32 i = threadIdx.x; i < heads * MAX_CLUSTERS; i += THREADS) to[i] = block.tail_units[i];
  }
}
