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
  __device__ float bottom_of(u32 bin) const {
    const int above = static_cast<int>(bin) - HALF;
    if (bin == 0) return 0;
    return __int_as_float(above < 0 ? max(low + above * (1 << LOWER_SHIFT), 0) : low + (above << shift));
  }
  __device__ float top_of(u32 bin) const { return bottom_of(bin + 1); }

  // What is_below has instead of a bin.
  __device__ float edge_of(u32 bin) const { return bottom_of(bin); }
  __device__ bool is_below(float mass, float edge) const { return mass < edge; }
};

// Bins of scores: as wide as each other between two bounds.
struct ScoreBins {
  static constexpr u32 LAST = BINS<false> - 1;
  float high;
  float per_bin;
  float width;

  ScoreBins() = default;
  __device__ ScoreBins(float low, float high) : high(high) {
    width = (high - low) / LAST;
    per_bin = width > 0 ? fminf(1 / width, 1e38f) : 0;
  }
  __device__ u32 of(float score) const {
    const float below = fminf(fmaxf((high - score) * per_bin, 0.0f), static_cast<float>(LAST));
    return isnan(score) ? 0 : LAST - static_cast<u32>(below);
  }
  __device__ float top_of(u32 bin) const { return high - static_cast<float>(LAST - bin) * width; }

  // What is_below has instead of a bin.
  __device__ float edge_of(u32 bin) const { return bin == 0 ? INFINITY : static_cast<float>(LAST + 1 - bin); }
  __device__ bool is_below(float score, float edge) const { return (high - score) * per_bin >= edge; }
};

// The sum of `x` over the threads before this one, and over all.
template <int THREADS>
__device__ inline u32 scan(u32 x, u32* total) {
  constexpr u32 WARPS = THREADS / 32;
  __shared__ u32 sums[WARPS];
  const u32 warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  u32 sum = x;
#pragma unroll
  for (int lanes = 1; lanes < 32; lanes *= 2) {
    const u32 other = __shfl_up_sync(ALL_LANES, sum, lanes);
    if (lane >= lanes) sum += other;
  }
  __syncthreads();
  if (lane == 31) sums[warp] = sum;
  __syncthreads();
  u32 all = lane < WARPS ? sums[lane] : 0;
#pragma unroll
  for (u32 lanes = 1; lanes < WARPS; lanes *= 2) {
    const u32 other = __shfl_up_sync(ALL_LANES, all, lanes);
    if (lane >= lanes) all += other;
  }
  *total = __shfl_sync(ALL_LANES, all, WARPS - 1);
  const u32 before = __shfl_sync(ALL_LANES, all, max(static_cast<int>(warp), 1) - 1);
  return sum - x + (warp ? before : 0);
}

// Finds the bin in which the `k` best end, and how many of it are among them: the counts of BINS bins are at `counts`,
// which is in shared memory, or is what other blocks wrote. Bin MAX_BINS where there are fewer.
template <int THREADS, u32 BINS>
__device__ void find_bin(const u32* counts, u32 k, u32* bin, u32* wanted) {
  constexpr u32 OWN = BINS / THREADS;  // bins a thread, from the top
  static_assert(OWN % 4 == 0);
  const u32 lowest = BINS - OWN * (threadIdx.x + 1);
  u32 own[OWN], all = 0, total;
#pragma unroll
  for (u32 i = 0; i < OWN; i += 4) {
    const uint4 four = *reinterpret_cast<const uint4*>(&counts[lowest + i]);
    own[i] = four.x, own[i + 1] = four.y, own[i + 2] = four.z, own[i + 3] = four.w;
  }
  if (threadIdx.x == 0) *bin = MAX_BINS, *wanted = 0;
#pragma unroll
  for (u32 i = 0; i < OWN; i++) all += own[i];
  u32 before = scan<THREADS>(all, &total);
#pragma unroll
  for (int i = OWN - 1; i >= 0; i--) {
    if (before < k && k <= before + own[i]) *bin = lowest + i, *wanted = k - before;
    before += own[i];
  }
  __syncthreads();
}

// Adds a block's histogram to that of its list. Where the block alone has `k` keys in bins that are as good, the selection
// ends no further down: those below are left out.
template <int THREADS, u32 BINS>
__device__ void add_histogram(const u32* own, u32 k, Search& search) {
  __shared__ u32 bin, wanted;
  __syncthreads();
  find_bin<THREADS, BINS>(own, k, &bin, &wanted);
  const u32 lowest = bin == MAX_BINS ? 0 : bin;
  for (u32 i = lowest + threadIdx.x; i < BINS; i += THREADS) {
    if (own[i]) atomicAdd(&search.histogram[i], own[i]);
  }
}
