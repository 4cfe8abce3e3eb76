// Histograms, which say where a selection ends.
#pragma once

#include "layout.cuh"

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
  // The smallest mass of a bin.
  __device__ float bottom_of(u32 bin) const {
    const int above = static_cast<int>(bin) - HALF;
    if (bin == 0) return 0;
    return __int_as_float(above < 0 ? max(low + above * (1 << LOWER_SHIFT), 0) : low + (above << shift));
  }
};

// Bins of scores, which are integers of 16 bits.
constexpr u32 SCORES_A_BIN = 0x10000 / BINS<false>;

// The sum of `x` over the threads before this one, of the same THREADS / GROUPS adjacent threads.
template <u32 GROUPS>
__device__ inline u32 scan(u32 x) {
  constexpr u32 OWN_WARPS = WARPS / GROUPS;
  __shared__ u32 sums[WARPS];
  const u32 warp = threadIdx.x / 32, lane = threadIdx.x % 32, first = warp / OWN_WARPS * OWN_WARPS;
  u32 sum = x;
#pragma unroll
  for (int lanes = 1; lanes < 32; lanes *= 2) {
    const u32 other = __shfl_up_sync(ALL_LANES, sum, lanes);
    if (lane >= lanes) sum += other;
  }
  __syncthreads();
  if (lane == 31) sums[warp] = sum;
  __syncthreads();
  u32 before = 0;
#pragma unroll
  for (u32 i = 0; i < OWN_WARPS; i++) before += first + i < warp ? sums[first + i] : 0;
  return before + sum - x;
}

// Finds for each of LISTS lists the bin in which the `k` best end, and how many of it are among them. The counts of a list's
// BINS bins are `stride` words behind those of the list before, of `n_lists`: in shared memory, or what other blocks wrote.
// Bin MAX_BINS where there are fewer.
//
// No part of the code around its calls: what a block does once takes as long as its instructions take to come.
template <u32 BINS, u32 LISTS>
__device__ __noinline__ void find_bins(const u32* counts, u32 stride, u32 n_lists, u32 k, u32* bins, u32* wanted) {
  constexpr u32 EACH_LIST = THREADS / LISTS, OWN = BINS / EACH_LIST;  // bins a thread, from the top
  const u32 list = threadIdx.x / EACH_LIST, lowest = BINS - OWN * (threadIdx.x % EACH_LIST + 1);
  const u32* const from = counts + min(list, n_lists - 1) * stride;
  u32 own[OWN], all = 0;
#pragma unroll
  for (u32 i = 0; i < OWN; i += 4) {
    const uint4 four = *reinterpret_cast<const uint4*>(&from[lowest + i]);
    own[i] = four.x, own[i + 1] = four.y, own[i + 2] = four.z, own[i + 3] = four.w;
  }
  if (threadIdx.x < LISTS) bins[threadIdx.x] = MAX_BINS, wanted[threadIdx.x] = 0;
#pragma unroll
  for (u32 i = 0; i < OWN; i++) all += own[i];
  u32 before = scan<LISTS>(all);
  if (before < k && k <= before + all) {
#pragma unroll
    for (int i = OWN - 1; i >= 0; i--) {
      if (before < k && k <= before + own[i]) bins[list] = lowest + i, wanted[list] = k - before;
      before += own[i];
    }
  }
  __syncthreads();
}
