// Scores of a block's keys, and their shares of the softmax.
#pragma once

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
  __device__ Entry<HEADS> one(u32 local, u32 bundle, u32 position) const {
    const u32 at = local * bundles + bundle, slot = score_slot(position);
    return at < n_shared ? shared[at * CHUNK + slot % CHUNK] : global[bundle * room + slot];
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

// Codes of a lane's keys on their way: those of what comes next.
struct CodesAhead {
  const u8* codes;
  const u8* clusters;
  const u32* pages;
  uint2 next[EACH];
  u32 next_clusters;
  u64 place;

  // Those of the keys from `at` on, of the `chunk`-th subspaces.
  __device__ void load(u32 at, u32 chunk, const Part& part, const Decode& p) {
    if (at >= part.end) return;
    if (chunk == 0) place = place_of(at, pages);
    const u8* const from = codes + place * p.pq_dim + chunk * SUBSPACES;
#pragma unroll
    for (u32 j = 0; j < EACH; j++) next[j] = __ldg(reinterpret_cast<const uint2*>(from + j * p.pq_dim));
    if (chunk == 0 && p.n_clusters) next_clusters = __ldg(reinterpret_cast<const u32*>(clusters + place));
  }
};

// Adds up the entries of this block's keys, of which the codes of the first are on their way. By KV head returns a thread's
// statistics of the softmax, by query head counts in `histogram`.
template <int HEADS, bool BY_KV>
__device__ void add_entries(CodesAhead& ahead, const u8* rows, const Scores<HEADS>& scores, u32 bundle,
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
  u32 at = part.position(0);
  for (u32 i = 0; at - lane * EACH < part.end; i++) {
    const u32 later = part.position(i + 1);
    Entry<HEADS> x[EACH] = {};
    if (p.n_clusters) {
#pragma unroll
      for (u32 j = 0; j < EACH; j++) {
        x[j] = reinterpret_cast<const Entry<HEADS>*>(coarse_rows + (ahead.next_clusters >> j * 8 & cluster_mask) * ROW_BYTES)[slot];
      }
    }
#pragma unroll 1
    for (u32 chunk = 0; chunk < chunks; chunk++) {
      const u8* const table = rows + chunk * p.n_centroids * ROW_BYTES;
      uint2 bytes[EACH];
#pragma unroll
      for (u32 j = 0; j < EACH; j++) bytes[j] = ahead.next[j];
      const bool is_last = chunk + 1 == chunks;
      ahead.load(is_last ? later : at, is_last ? 0 : chunk + 1, part, p);
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
      for (int h = 0; h < HEADS; h++) {
        u32 in[EACH];
#pragma unroll
        for (u32 j = 0; j < EACH; j++) in[j] = bins[h].of(x[j].x[h]);
#pragma unroll
        for (u32 j = 0; j < EACH; j++) {
          // To add nothing costs less than a branch.
          atomicAdd(&histogram[h * BINS<false> + in[j]], at + j >= part.begin && at + j < part.end ? 1 : 0);
        }
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

// What turns a score into its share of the softmax: larger by what products and shifts may lose to rounding, so that all shares sum
// to 1 at most. What a share weighs does not change, since it is 2^shift times the share.
__device__ inline float shift_of(Stats all) {
  return __fmaf_rn(fabsf(all.largest), 0x1p-22f, all.largest + log2f(all.sum));
}

// The same bits wherever a share is made: what is counted in a bin is looked for there later.
__device__ inline float share_of(float score, float scale, float shift) { return exp2_approx(__fmaf_rn(score, scale, -shift)); }

// The sums over a key's heads of their shares, for the block's keys, a chunk at a time: in shared memory as far as there is room.
struct Masses {
  float* shared;
  float* global;  // of the row
  u32 n_shared;   // chunks

  // Of the keys from `at` on, which are in the `local`-th chunk of this block.
  __device__ void load(u32 local, u32 at, float (&x)[EACH]) const {
    const float4 four = local < n_shared ? *reinterpret_cast<const float4*>(&shared[local * CHUNK + at % CHUNK])
                                         : *reinterpret_cast<const float4*>(&global[at]);
    x[0] = four.x, x[1] = four.y, x[2] = four.z, x[3] = four.w;
  }
  __device__ void store(u32 local, u32 at, const float (&x)[EACH]) const {
    const float4 four = {x[0], x[1], x[2], x[3]};
    if (local < n_shared) {
      *reinterpret_cast<float4*>(&shared[local * CHUNK + at % CHUNK]) = four;
    } else {
      *reinterpret_cast<float4*>(&global[at]) = four;
    }
  }
  __device__ float one(u32 local, u32 position) const {
    return local < n_shared ? shared[local * CHUNK + position % CHUNK] : global[position];
  }
};
static_assert(EACH == 4);

// The clusters of a lane's keys from `at` on, a byte each; where there is no tail none.
__device__ inline u32 load_clusters(const u8* clusters, const u32* pages, u32 at, const Part& part, const Decode& p) {
  if (!p.has_tail || at >= part.end) return 0;
  return __ldg(reinterpret_cast<const u32*>(clusters + place_of(at, pages)));
}

// The cut of a key in the tail, where sinks are not: they are attended to as they are.
__device__ inline float cut_of(const TailUnits& units, u32 position, const Part& part) {
  return position < part.sink ? -INFINITY : units.cut_of(position);
}

// Makes shares of the block's scores. Their sums over a key's heads are kept in `masses` and counted in `histogram`, and all are
// added to the tail, in units of 1 / factor, from which those of selected keys are taken later. `clusters` are the row's codes.
template <int HEADS>
__device__ void add_shares(const Scores<HEADS>& scores, const float* shifts, const Masses& masses, u32* histogram,
                           const MassBins& bins, u32* tail_units, const TailUnits& units, float factor,
                           const u8* clusters, const u32* pages, const Part& part, const Decode& p) {
  const u32 lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const float scale = p.scale * LOG2_E;
  u32 at = part.position(0), next_clusters = load_clusters(clusters, pages, at, part, p);
  for (u32 i = 0; at - lane * EACH < part.end;) {
    const u32 local = i * WARPS + warp, later = part.position(++i), words = next_clusters;
    next_clusters = load_clusters(clusters, pages, later, part, p);
    bool is_candidate[EACH];
    float cuts[EACH], mass[EACH] = {};
#pragma unroll
    for (u32 j = 0; j < EACH; j++) {
      is_candidate[j] = at + j >= part.begin && at + j < part.end;
      cuts[j] = cut_of(units, at + j, part);
    }
    for (u32 bundle = 0; bundle < p.bundles; bundle++) {
      Entry<HEADS> x[EACH];
      scores.load(local, at / CHUNK, bundle, x);
#pragma unroll
      for (int h = 0; h < HEADS; h++) {
        const float shift = shifts[bundle * HEADS + h];
#pragma unroll
        for (u32 j = 0; j < EACH; j++) {
          x[j].x[h] = is_candidate[j] ? share_of(x[j].x[h], scale, shift) : 0;
          mass[j] += x[j].x[h];
        }
      }
      if (!p.has_tail) continue;
#pragma unroll
      for (u32 j = 0; j < EACH; j++) {
        u32* const of_cluster = &tail_units[bundle * HEADS * MAX_CLUSTERS + (words >> j * 8 & 0xff)];
#pragma unroll
        for (int h = 0; h < HEADS; h++) atomicAdd(of_cluster + h * MAX_CLUSTERS, units.of(x[j].x[h], factor, cuts[j]));
      }
    }
#pragma unroll
    for (u32 j = 0; j < EACH; j++) atomicAdd(&histogram[bins.of(mass[j])], is_candidate[j] ? 1 : 0);
    masses.store(local, at, mass);
    at = later;
  }
}
