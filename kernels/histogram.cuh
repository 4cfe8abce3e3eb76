// Histograms, which say where a selection ends.
#pragma once

#include "common.cuh"

// The most bins of a histogram.
constexpr u32 MAX_BINS = 4096;

// Bins as wide as each other between two bounds. The upper one begins the last bin, which has nothing above it.
template <u32 BINS>
struct EvenBins {
  static constexpr float N = BINS;
  float low;
  float high;
  float scale;  // to 1 at the end of the last bin
  float width;

  EvenBins() = default;
  __device__ EvenBins(float low, float high) : low(low), high(high), width((high - low) / (N - 1)) {
    scale = width > 0 ? fminf(1 / (N * width), 1e38f) : 0;
  }
  // Where a score is among all bins, from 0 to 1. NaN is 0.
  __device__ float place_of(float score) const { return __saturatef((score - low) * scale); }
  __device__ u32 of(float score) const {
    constexpr float TO_INTEGER = 0x1p23f / N;
    return __float_as_uint(__fadd_rd(fminf(place_of(score), 1 - 1 / N), TO_INTEGER)) & (BINS - 1);
  }
  // From the upper bound down: where the lower one is far off, rounding is where scores are few.
  __device__ float top_of(u32 bin) const { return high - fmaxf(N - 2 - static_cast<float>(bin), 0.0f) * width; }

  // What is_below has instead of a bin.
  __device__ float edge_of(u32 bin) const { return static_cast<float>(bin) / N; }
  __device__ bool is_below(float score, float edge) const { return place_of(score) < edge; }
};

// The sum of `x` over those of a list's threads that are before this one. Lists have equally many.
template <u32 THREADS, u32 LISTS>
__device__ u32 sum_before(u32 x) {
  constexpr u32 WARPS = THREADS / 32, OF_LIST = WARPS / LISTS;
  __shared__ u32 sums[WARPS];
  const u32 warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  u32 sum = x;
#pragma unroll
  for (u32 lanes = 1; lanes < 32; lanes *= 2) {
    const u32 other = __shfl_up_sync(ALL_LANES, sum, lanes);
    if (lane >= lanes) sum += other;
  }
  if (lane == 31) sums[warp] = sum;
  __syncthreads();
  u32 all = lane < WARPS ? sums[lane] : 0;
#pragma unroll
  for (u32 lanes = 1; lanes < OF_LIST; lanes *= 2) {
    const u32 other = __shfl_up_sync(ALL_LANES, all, lanes);
    if (lane % OF_LIST >= lanes) all += other;
  }
  const u32 before = __shfl_sync(ALL_LANES, all, max(warp, 1u) - 1);
  return sum - x + (warp % OF_LIST ? before : 0);
}

// Finds the bin in which the `k` best of each list end, and how many of it are among them; for all lists at once. A list's
// counts of N bins are at `counts(list)`, which is in shared memory, or is what other blocks wrote. Bin MAX_BINS where there
// are fewer.
template <u32 THREADS, u32 LISTS, u32 N, class Counts>
__device__ void find_bins(Counts counts, u32 k, u32 (&bins)[LISTS], u32 (&wanted)[LISTS]) {
  constexpr u32 OF_LIST = THREADS / LISTS, OWN = N / OF_LIST;  // bins a thread, from the top
  static_assert(OWN % 4 == 0);
  const u32 list = threadIdx.x / OF_LIST, thread = threadIdx.x % OF_LIST, lowest = N - OWN * (thread + 1);
  const u32* const of_list = counts(list);
  u32 own[OWN], all = 0;
#pragma unroll
  for (u32 i = 0; i < OWN; i += 4) {
    const uint4 four = *reinterpret_cast<const uint4*>(&of_list[lowest + i]);
    own[i] = four.x, own[i + 1] = four.y, own[i + 2] = four.z, own[i + 3] = four.w;
  }
#pragma unroll
  for (u32 i = 0; i < OWN; i++) all += own[i];
  if (thread == 0) bins[list] = MAX_BINS, wanted[list] = 0;
  u32 before = sum_before<THREADS, LISTS>(all);
#pragma unroll
  for (int i = OWN - 1; i >= 0; i--) {
    if (before < k && k <= before + own[i]) bins[list] = lowest + i, wanted[list] = k - before;
    before += own[i];
  }
  __syncthreads();
}
