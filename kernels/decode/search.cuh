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

  __device__ void store(u32 local, u32 chunk, u32 bundle, const Packed<HEADS> (&x)[EACH]) const {
    const u32 lane = threadIdx.x % 32, to = (local * bundles + bundle) * CHUNK + lane;
    if (local < shared_chunks) {
#pragma unroll
      for (u32 j = 0; j < EACH; j++) shared_scores[to + j * 32] = x[j];
    } else {
#pragma unroll
      for (u32 j = 0; j < EACH; j++) scores[bundle * room + chunk * CHUNK + lane + j * 32] = x[j];
    }
  }
  // Of one of this block's keys.
  __device__ Packed<HEADS> score_of(u32 position, u32 bundle, u32 splits) const {
    const u32 local = position / CHUNK / splits, slot = score_slot(position);
    return local < shared_chunks ? shared_scores[(local * bundles + bundle) * CHUNK + slot % CHUNK] : scores[bundle * room + slot];
  }
  __device__ float mass_of(u32 position, u32 splits) const {
    const u32 local = position / CHUNK / splits, slot = score_slot(position);
    return local < shared_chunks ? shared_masses[local * CHUNK + slot % CHUNK] : masses[slot];
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
    kept.store(i * WARPS + warp, at / CHUNK, bundle, x);
    then(at, x);
    at = later;
  }
}

// Calls f(at, scores, stride, masses) for the keys of each lane in turn: where their scores and masses are, those of a lane
// 32 apart, and the scores of the next bundle `stride` apart. Code of its own for each memory, as one for both takes far
// longer.
template <int HEADS, class F>
__device__ void each_chunk(const Kept<HEADS>& kept, const Part& part, const Decode& p, F f) {
  const u32 lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  u32 at = part.position(0, WARPS, p.splits), i = 0;
#pragma unroll 1
  for (; at - lane * EACH < part.end && i * WARPS + warp < kept.shared_chunks; at = part.position(++i, WARPS, p.splits)) {
    const u32 local = i * WARPS + warp;
    f(at, kept.shared_scores + local * kept.bundles * CHUNK + lane, CHUNK, kept.shared_masses + local * CHUNK + lane);
  }
#pragma unroll 1
  for (; at - lane * EACH < part.end; at = part.position(++i, WARPS, p.splits)) {
    const u32 first = at / CHUNK * CHUNK + lane;
    f(at, kept.scores + first, kept.room, kept.masses + first);
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
  float largest = own[0].largest;
#pragma unroll
  for (int lanes = 16; lanes > 0; lanes /= 2) largest = fmaxf(largest, __shfl_xor_sync(ALL_LANES, largest, lanes));
  float sum = own[0].sum * exp2_approx(own[0].largest - finite(largest));
#pragma unroll
  for (int lanes = 16; lanes > 0; lanes /= 2) sum += __shfl_xor_sync(ALL_LANES, sum, lanes);
  return {largest, sum};
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

  // To a whole warp.
  __device__ void add(u32 position, bool is_sure, bool is_open) {
    const u32 all_sure = __ballot_sync(ALL_LANES, is_sure), all_open = __ballot_sync(ALL_LANES, is_open);
    const u32 before = (1u << threadIdx.x % 32) - 1;
    if (is_sure) own[n_sure + __popc(all_sure & before)] = position;
    if (is_open) own[per_warp - 1 - (n_open + __popc(all_open & before))] = position;
    n_sure += __popc(all_sure);
    n_open += __popc(all_open);
  }
  __device__ u32 sure(u32 i) const { return own[i]; }
  __device__ u32 open(u32 i) const { return own[per_warp - 1 - i]; }
};

// Leaves the rank of a key that may be selected.
__device__ inline void leave_open(Search& search, float x, u32 position) {
  const u32 slot = atomicAdd(&search.n_open, 1);
  if (slot < KEPT) search.open[slot] = rank_of(x, position);
}

// Where the masses of the tail's clusters are added up: words of each cluster, in copies between which the lanes are shared
// out, as lanes that meet in a bank or a word wait for each other.
struct TailSums {
  u32* words;  // [words, n_clusters, copies]
  u32 n_clusters;
  u32 copies;  // a power of two

  __device__ u32* at(u32 word, u32 cluster, u32 lane) const {
    return words + (word * n_clusters + (cluster & n_clusters - 1)) * copies + (lane & copies - 1);
  }
  // To a whole block.
  __device__ void clear(u32 n_words) const {
#pragma unroll 1
    for (u32 i = threadIdx.x; i < n_words * n_clusters * copies; i += THREADS) words[i] = 0;
  }
  // Calls f(word) for the copies; threads start at different ones.
  template <class F>
  __device__ void each_copy(u32 word, u32 cluster, F f) const {
#pragma unroll 4
    for (u32 i = 0; i < copies; i++) f(*at(word, cluster, threadIdx.x + i));
  }
};

// What a block searches with.
template <int HEADS>
struct Block {
  const u8* codes;
  const u8* clusters;
  Entry<HEADS>* staged;  // tables on their way; where scores are later
  u32* histogram;        // a list's bins after the other's
  TailSums tail;  // where the tables were
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
__device__ void each_chunk(const Block<HEADS>& block, const Part& part, const Decode& p, F f) {
  const auto load = [&](u32 at) {
    return p.has_tail && at < part.end ? __ldg(reinterpret_cast<const u32*>(block.clusters + at)) : 0;
  };
  u32 i = 0, next = load(part.position(0, WARPS, p.splits));
  each_chunk(block.kept, part, p, [&](u32 at, auto scores, u64 stride, auto masses) {
    const u32 clusters = next;
    next = load(part.position(++i, WARPS, p.splits));
    f(at, scores, stride, masses, clusters);
  });
}

// Adds a block's histogram to that of its list: the bins from `from` to `to`.
__device__ inline void add_histogram(const u32* own, u32 from, u32 to, Search& search) {
#pragma unroll 1
  for (u32 i = from + threadIdx.x; i < to; i += THREADS) {
    if (own[i]) atomicAdd(&search.histogram[i], own[i]);
  }
}

// A share of the softmax in units of a block's tail, of which a head's are about 2^15 together: two heads fit a word. `lane`
// and `cut` are the key's.
__device__ inline u32 in_units(float share, float units, float cut) {
  return __float_as_uint(__fadd_rd(fmaf(share, units, cut), 0x1p23f)) & 0xffff;
}

// By KV head: keys are ranked by their mass, the sum over the heads of their shares of the softmax.
//
// All keys are first added to the tail, and those that may be selected then taken out again; what is not selected of these
// `attend` puts back.
template <int HEADS>
__device__ void search_by_mass(const Block<HEADS>& block, const Entry<HEADS>* tables, const Bounds<HEADS>* bounds,
                               u8* rows, Stats* stats, u32* tail, u32 k, const Part& part, const Decode& p) {
  constexpr u32 N_BINS = BINS<true>;
  constexpr int WORDS = Packed<HEADS>::WORDS;
  __shared__ Share shares[MAX_GROUP];
  __shared__ float best_shares[MAX_GROUP], lows[MAX_GROUP], units[MAX_GROUP], sums[MAX_GROUP], of_warps[HEADS][WARPS];
  __shared__ u32 largest[MAX_GROUP];
  __shared__ Range ranges[HEADS];
  __shared__ u32 found_bin, found_wanted;
  const u32 lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const Kept<HEADS>& kept = block.kept;
  if (threadIdx.x < MAX_GROUP) largest[threadIdx.x] = 0;
  for (u32 bundle = 0; bundle < p.bundles; bundle++) {
    load_tables<HEADS>(tables + bundle * p.entries(), bounds + bundle * p.columns(), rows, block.staged, ranges, p);
    Packed<HEADS> most = {};
    add_entries<HEADS>(block.codes, block.clusters, rows, kept, bundle, part, p, [&](u32 at, const Packed<HEADS>(&x)[EACH]) {
#pragma unroll
      for (u32 j = 0; j < EACH; j++) {
#pragma unroll
        for (int i = 0; i < WORDS; i++) most.words[i] = __vmaxu2(most.words[i], part.is_candidate(at + j) ? x[j].words[i] : 0);
      }
    });
#pragma unroll
    for (int h = 0; h < HEADS; h++) {
      const u32 of_warp = __reduce_max_sync(ALL_LANES, most.of(h));
      if (lane == 0) atomicMax(&largest[bundle * HEADS + h], of_warp);
    }
    __syncthreads();
    if (threadIdx.x < HEADS) {
      const u32 head = bundle * HEADS + threadIdx.x;
      const float scale = p.scale * LOG2_E, factor = fminf(ranges[threadIdx.x].step * scale, 1e30f);
      shares[head] = {factor, largest[head] * factor};
      lows[head] = ranges[threadIdx.x].low * scale;
    }
    __syncthreads();
    Share of_heads[HEADS];
    float own[HEADS] = {};
#pragma unroll
    for (int h = 0; h < HEADS; h++) of_heads[h] = shares[bundle * HEADS + h];
    each_chunk(kept, part, p, [&](u32 at, auto scores, u64 stride, auto) {
#pragma unroll 2
      for (u32 j = 0; j < EACH; j++) {
        const Packed<HEADS> x = scores[bundle * stride + j * 32];
        const bool is_candidate = part.is_candidate(at + j);
#pragma unroll
        for (int h = 0; h < HEADS; h++) {
          const float weight = of_heads[h].of(x.as_float(h));
          own[h] += is_candidate ? weight : 0;
        }
      }
    });
#pragma unroll
    for (int h = 0; h < HEADS; h++) {
#pragma unroll
      for (int lanes = 16; lanes > 0; lanes /= 2) own[h] += __shfl_xor_sync(ALL_LANES, own[h], lanes);
      if (lane == 0) of_warps[h][warp] = own[h];
    }
    __syncthreads();
    if (threadIdx.x < HEADS) {
      const u32 h = threadIdx.x, head = bundle * HEADS + h;
      float sum = 0;
#pragma unroll 1
      for (int i = 0; i < WARPS; i++) sum += of_warps[h][i];
      sums[head] = sum;
      stats[(bundle * MAX_SPLITS + blockIdx.x) * HEADS + h] = {sum > 0 ? shares[head].shift : -INFINITY, sum};
    }
  }
  if (p.has_tail) block.tail.clear(p.bundles * WORDS);
  meet(&block.searches->arrived, p.splits, 1);

#pragma unroll 1
  for (u32 head = warp; head < p.bundles * HEADS; head += WARPS) {
    const Stats all = find_stats<HEADS>(stats, head / HEADS, head % HEADS, p.splits);
    // A head that there is not has a share of 0.
    const float shift = head < p.group ? all.largest + log2f(all.sum) : INFINITY;
    if (lane == 0) {
      // Of this block's keys all together; units are a power of two.
      const float own = sums[head] * exp2_approx(shares[head].shift - shift);
      units[head] = fminf(__uint_as_float(__float_as_uint(__fdividef(0x1p15f, own)) & 0x7f800000), SHARE_UNIT);
      shares[head].shift = shift, best_shares[head] = exp2_approx(all.largest - shift);
      // For `attend`, which knows scores, not integers.
      if (blockIdx.x == 0) block.searches->shifts[head] = shift + lows[head];
    }
  }
  __syncthreads();
  float best = 0;
#pragma unroll 1
  for (u32 head = 0; head < p.group; head++) best += best_shares[head];
  const MassBins bins(0.5f * p.group / max(part.end - part.begin, 1u), best);
  each_chunk(block, part, p, [&](u32 at, auto scores, u64 stride, auto masses, u32 clusters) {
#pragma unroll 2
    for (u32 j = 0; j < EACH; j++) {
      const u32 position = at + j;
      const bool is_candidate = part.is_candidate(position), is_in_tail = p.has_tail && is_candidate && position >= part.sink;
      float mass = 0;
#pragma unroll 1
      for (u32 bundle = 0; bundle < p.bundles; bundle++) {
        const Packed<HEADS> x = scores[bundle * stride + j * 32];
        Packed<HEADS> weights;
#pragma unroll
        for (int h = 0; h < HEADS; h++) {
          const float share = shares[bundle * HEADS + h].of(x.as_float(h));
          mass += share;
          weights.set(h, in_units(share, units[bundle * HEADS + h], cut_of(position)));
        }
        if (!is_in_tail) continue;
#pragma unroll
        for (int w = 0; w < WORDS; w++) atomicAdd(block.tail.at(bundle * WORDS + w, clusters >> j * 8, lane), weights.words[w]);
      }
      masses[j * 32] = mass;
      // Smaller ones are counted where these are not enough.
      const u32 bin = bins.of(mass);
      if (is_candidate && bin >= bins.HALF) atomicAdd(&block.histogram[bin], 1);
    }
  });
  // Where the block alone has `k` keys in bins that are as good, the selection ends no further down.
  __syncthreads();
  find_bins<N_BINS, 1>(block.histogram, 0, 1, k, &found_bin, &found_wanted);
  add_histogram(block.histogram, found_bin == MAX_BINS ? bins.HALF : found_bin, N_BINS, *block.searches);
  meet(&block.searches->arrived, p.splits, 2);

  find_bins<N_BINS, 1>(block.searches->histogram, 0, 1, k, &found_bin, &found_wanted);
  if (found_bin == MAX_BINS && k > 0) {  // in all blocks
    each_chunk(kept, part, p, [&](u32 at, auto, u64, auto masses) {
#pragma unroll 1
      for (u32 j = 0; j < EACH; j++) {
        const u32 bin = bins.of(masses[j * 32]);
        if (part.is_candidate(at + j) && bin < bins.HALF) atomicAdd(&block.histogram[bin], 1);
      }
    });
    __syncthreads();
    add_histogram(block.histogram, 0, bins.HALF, *block.searches);
    meet(&block.searches->arrived, p.splits, 3);
    find_bins<N_BINS, 1>(block.searches->histogram, 0, 1, k, &found_bin, &found_wanted);
  }
  const u32 bin = found_bin;
  const float bottom = bins.bottom_of(bin);
  if (blockIdx.x == 0 && threadIdx.x == 0) block.searches->wanted = found_wanted;
  List list = block.list(0, p);
  each_chunk(kept, part, p, [&](u32 at, auto, u64, auto masses) {
#pragma unroll 1
    for (u32 j = 0; j < EACH; j++) {
      const float mass = masses[j * 32];
      const u32 position = at + j;
      const bool is_listed = !(mass < bottom) && part.is_candidate(position);
      if (!__any_sync(ALL_LANES, is_listed)) continue;
      const u32 in = bins.of(mass);
      list.add(position, is_listed && in > bin && position >= part.sink, is_listed && in == bin);
    }
  });
  block.leave(0, list, p);
  __syncwarp();
#pragma unroll 1
  for (u32 i = lane; i < list.n_sure + list.n_open; i += 32) {
    const bool is_open = i >= list.n_sure;
    const u32 position = is_open ? list.open(i - list.n_sure) : list.sure(i);
    if (is_open) {
      // For `attend`: its rank, and what it weighs.
      const float mass = kept.mass_of(position, p.splits);
      kept.masses[score_slot(position)] = mass;
      leave_open(*block.searches, mass, position);
    }
    const u32 cluster = p.has_tail ? __ldg(block.clusters + position) : 0;
#pragma unroll 1
    for (u32 bundle = 0; bundle < p.bundles; bundle++) {
      const Packed<HEADS> x = kept.score_of(position, bundle, p.splits);
      Packed<HEADS> weights;
#pragma unroll
      for (int h = 0; h < HEADS; h++) {
        const float share = shares[bundle * HEADS + h].of(x.as_float(h));
        if (is_open) block.open_scores[(bundle * p.room + score_slot(position)) * HEADS + h] = share;
        weights.set(h, in_units(share, units[bundle * HEADS + h], cut_of(position)));
      }
      if (!p.has_tail || position < part.sink) continue;
      // Out of the copy that it went to.
      const u32 its_lane = position % CHUNK / EACH;
#pragma unroll
      for (int w = 0; w < WORDS; w++) atomicSub(block.tail.at(bundle * WORDS + w, cluster, its_lane), weights.words[w]);
    }
  }
  __syncthreads();
#pragma unroll 1
  for (u32 c = warp % 8 * 32 + lane; p.has_tail && c < p.n_clusters; c += 8 * 32) {
#pragma unroll 1
    for (u32 word = warp / 8; word < p.bundles * WORDS; word += WARPS / 8) {
      u32 low = 0, high = 0;
      block.tail.each_copy(word, c, [&](u32 x) { low += x & 0xffff, high += x >> 16; });
      const u32 head = word / WORDS * HEADS + word % WORDS * 2;
      tail[head * MAX_CLUSTERS + c] = low * static_cast<u32>(__fdividef(SHARE_UNIT, units[head]));
      if (HEADS > 1 && head + 1 < p.group) tail[(head + 1) * MAX_CLUSTERS + c] = high * static_cast<u32>(__fdividef(SHARE_UNIT, units[head + 1]));
    }
  }
}

// By query head: keys are ranked by each head's scores.
//
// Scores of a head lie close to each other, and lanes that count in the same bin wait for each other. So a quarter of the
// keys is counted, and of the others those in bins in which the selection may end. Where it is found to end further down
// all are counted after all.
template <int HEADS>
__device__ void search_by_score(const Block<HEADS>& block, const Entry<HEADS>* tables, const Bounds<HEADS>* bounds,
                                u8* rows, u32* tail, u32 k, const Part& part, const Decode& p) {
  constexpr u32 N_BINS = BINS<false>;
  __shared__ u32 counted_from[HEADS], found_bin[HEADS], found_wanted[HEADS];
  __shared__ Range ranges[HEADS];
  constexpr u32 STRIDE = sizeof(Search) / sizeof(u32);
  const u32 lane = threadIdx.x % 32, warp = threadIdx.x / 32, n_lists = part.heads;
  const Kept<HEADS>& kept = block.kept;
  load_tables<HEADS>(tables, bounds, rows, block.staged, ranges, p);
  add_entries<HEADS>(block.codes, block.clusters, rows, kept, 0, part, p, [&](u32 at, const Packed<HEADS>(&x)[EACH]) {
    if (!part.is_candidate(at)) return;
#pragma unroll
    for (int h = 0; h < HEADS; h++) atomicAdd(&block.histogram[h * N_BINS + x[0].of(h) / SCORES_A_BIN], 1);
  });
  __syncthreads();
  // Twice this block's part of the keys to select, of which a quarter has been counted.
  find_bins<N_BINS, HEADS>(block.histogram, N_BINS, HEADS, k / (2 * p.splits) + 16, counted_from, found_wanted);
  u32 from[HEADS];
#pragma unroll
  for (int h = 0; h < HEADS; h++) from[h] = counted_from[h] == MAX_BINS ? 0 : counted_from[h];
  // The other three quarters, in the bins from `from` on, or in those below.
  const auto count = [&](bool is_below) {
    each_chunk(kept, part, p, [&](u32 at, auto scores, u64, auto) {
#pragma unroll 1
      for (u32 j = 1; j < EACH; j++) {
        const Packed<HEADS> x = scores[j * 32];
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
  find_bins<N_BINS, HEADS>(block.histogram, N_BINS, HEADS, k, found_bin, found_wanted);
#pragma unroll 1
  for (u32 list = 0; list < n_lists; list++) {
    const u32 counted = counted_from[list], enough = found_bin[list];
    const u32 first = max(counted == MAX_BINS ? 0 : counted, enough == MAX_BINS ? 0 : enough);
    add_histogram(block.histogram + list * N_BINS, first, N_BINS, block.searches[list]);
    if (threadIdx.x == 0 && counted != MAX_BINS) atomicMax(&block.searches[list].counted_from, counted);
  }
  meet(&block.searches->arrived, p.splits, 1);

  find_bins<N_BINS, HEADS>(block.searches->histogram, STRIDE, n_lists, k, found_bin, found_wanted);
  bool is_found = true;  // or not in all blocks
#pragma unroll 1
  for (u32 list = 0; list < n_lists; list++) {
    is_found &= k == 0 || (found_bin[list] != MAX_BINS && found_bin[list] >= __ldcg(&block.searches[list].counted_from));
  }
  if (!is_found) {
    count(true);
#pragma unroll 1
    for (u32 list = 0; list < n_lists; list++) {
      if (counted_from[list] != MAX_BINS) add_histogram(block.histogram + list * N_BINS, 0, counted_from[list], block.searches[list]);
    }
    meet(&block.searches->arrived, p.splits, 2);
    find_bins<N_BINS, HEADS>(block.searches->histogram, STRIDE, n_lists, k, found_bin, found_wanted);
  }

  // What makes the largest weight that there may be below the bin a unit of the tail.
  const float unit = tail_unit(p.per_warp * WARPS * p.splits);
  u32 bins[HEADS];
  Share weights[HEADS];
  List lists[HEADS];
#pragma unroll
  for (int h = 0; h < HEADS; h++) {
    bins[h] = found_bin[h];
    const float top = (min(bins[h], N_BINS - 1) + 1) * SCORES_A_BIN;
    weights[h].factor = fminf(ranges[h].step * p.scale * LOG2_E, 1e30f);
    weights[h].shift = top * weights[h].factor - log2f(unit);
    lists[h] = block.list(h, p);
    if (blockIdx.x == 0 && threadIdx.x == 0 && h < n_lists) {
      block.searches[h].wanted = found_wanted[h], block.searches[h].top = ranges[h].of(top);
    }
  }
  __syncthreads();  // histograms have been read
  if (p.has_tail) block.tail.clear(n_lists);
  __syncthreads();
  each_chunk(block, part, p, [&](u32 at, auto scores, u64, auto, u32 clusters) {
#pragma unroll 1
    for (u32 j = 0; j < EACH; j++) {
      const Packed<HEADS> x = scores[j * 32];
      const u32 position = at + j;
      const bool is_candidate = part.is_candidate(position), is_sink = position < part.sink;
      const float cut = cut_of(position);
#pragma unroll
      for (int h = 0; h < HEADS; h++) {
        if (h >= n_lists) continue;
        const u32 bin = x.of(h) / SCORES_A_BIN;
        const bool is_listed = is_candidate && bin >= bins[h];
        if (__any_sync(ALL_LANES, is_listed)) {
          lists[h].add(position, is_listed && bin > bins[h] && !is_sink, is_listed && bin == bins[h]);
        }
        if (!p.has_tail || is_listed || !is_candidate || is_sink) continue;
        const u32 units = in_units(fminf(weights[h].of(x.as_float(h)), unit), cut);
        if (units) atomicAdd(block.tail.at(h, clusters >> j * 8, lane), units);
      }
    }
  });
  // For `attend`: where open keys are, their ranks, and their scores.
  __syncwarp();
#pragma unroll
  for (int h = 0; h < HEADS; h++) {
    if (h >= n_lists) continue;
    block.leave(h, lists[h], p);
#pragma unroll 1
    for (u32 i = lane; i < lists[h].n_open; i += 32) {
      const u32 position = lists[h].open(i);
      const float score = ranges[h].of(kept.score_of(position, 0, p.splits).as_float(h));
      leave_open(block.searches[h], score, position);
      block.open_scores[static_cast<u64>(score_slot(position)) * HEADS + h] = score;
    }
  }
  __syncthreads();
#pragma unroll 1
  for (u32 c = warp % 8 * 32 + lane; p.has_tail && c < p.n_clusters; c += 8 * 32) {
#pragma unroll 1
    for (u32 h = warp / 8; h < n_lists; h += WARPS / 8) {
      u32 sum = 0;
      block.tail.each_copy(h, c, [&](u32 x) { sum += x; });
      tail[h * MAX_CLUSTERS + c] = sum;
    }
  }
}

// Grid: (splits, h_kv, or h_kv * bundles by query head, b). Blocks of one (y, z) are a team.
template <int HEADS, bool BY_KV>
__device__ void search(const u8* codes, const u8* clusters, const u32* lens, const float* all_tables, const u32* all_bounds,
                       u32* all_scores, float* open_scores, float* masses, Stats* stats, Search* searches, u32* lists,
                       Listed* listed, u32* tail, const Decode& p) {
  constexpr u32 N_BINS = (BY_KV ? 1 : HEADS) * BINS<BY_KV>;
  extern __shared__ __align__(128) u8 rows[];  // tables, and after these the tail's masses; histograms; scores; masses
  u32* const histogram = reinterpret_cast<u32*>(rows + p.histogram_at);
  const u32 b = blockIdx.z, kv = BY_KV ? blockIdx.y : blockIdx.y / p.bundles, first_bundle = BY_KV ? 0 : blockIdx.y - kv * p.bundles;
  const u32 row = b * p.h_kv + kv, y = row * p.bundles + first_bundle;  // the team's first bundle of all
  const Entry<HEADS>* const tables = reinterpret_cast<const Entry<HEADS>*>(all_tables) + y * u64{p.entries()};
  const Bounds<HEADS>* const bounds = reinterpret_cast<const Bounds<HEADS>*>(all_bounds) + y * u64{p.columns()};
  const Part part(lens, kv, first_bundle, HEADS, p);
  const u32 heads = BY_KV ? p.group : part.heads, first_head = BY_KV ? kv * p.group : part.first_head;
  const u32 first_list = BY_KV ? row : b * p.h + first_head;
  codes += p.codes.at(b, kv);
  clusters += p.n_clusters ? p.clusters.at(b, kv) : 0;
#pragma unroll 1
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
                              reinterpret_cast<Entry<HEADS>*>(histogram + N_BINS),
                              histogram,
                              {reinterpret_cast<u32*>(rows), p.n_clusters, p.tail_copies},
                              kept,
                              open_scores + y * p.room * HEADS,
                              searches + first_list,
                              lists + first_segment * p.per_warp,
                              listed + first_segment};
  tail += ((static_cast<u64>(b) * p.h + first_head) * p.splits + blockIdx.x * heads) * MAX_CLUSTERS;
  if constexpr (BY_KV) {
    search_by_mass<HEADS>(block, tables, bounds, rows, stats + u64{y} * MAX_SPLITS * HEADS, tail, k, part, p);
  } else {
    search_by_score<HEADS>(block, tables, bounds, rows, tail, k, part, p);
  }
}
