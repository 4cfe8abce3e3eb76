// The histograms of a step.
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
    const int above = __float_as_int(fmaxf(mass, 0.0f)) - low;  // NaN is 0
    return above < 0 ? max(HALF + (above >> LOWER_SHIFT), 0) : HALF + min(above >> shift, HALF - 1);
  }
  __device__ float bottom_of(u32 bin) const {
    const int above = static_cast<int>(bin) - HALF;
    if (bin == 0) return 0;
    return __int_as_float(above < 0 ? max(low + above * (1 << LOWER_SHIFT), 0) : low + (above << shift));
  }

  // What is_below has instead of a bin.
  __device__ float edge_of(u32 bin) const { return bottom_of(bin); }
  __device__ bool is_below(float mass, float edge) const { return mass < edge; }
};

// Bins of scores.
using ScoreBins = EvenBins<BINS<false>>;

// Adds a block's histograms, of N bins, to those of its lists. Where the block alone has `k` keys in bins that are as good,
// the selection ends no further down: those below are left out.
template <u32 LISTS, u32 N>
__device__ void add_histograms(const u32* own, u32 k, u32 n_lists, Search* searches) {
  __shared__ u32 bins[LISTS], wanted[LISTS];
  constexpr u32 OF_LIST = THREADS / LISTS;
  __syncthreads();
  find_bins<THREADS, LISTS, N>([&](u32 list) { return own + list * N; }, k, bins, wanted);
  const u32 list = threadIdx.x / OF_LIST, lowest = bins[list] == MAX_BINS ? 0 : bins[list];
  for (u32 i = lowest + threadIdx.x % OF_LIST; i < N; i += OF_LIST) {
    const u32 count = own[list * N + i];
    if (count && list < n_lists) atomicAdd(&searches[list].histogram[i], count);
  }
}
