// Exact top-k of each row by radix select, in one launch.
//
// 1. Three passes over the row's bits, from the top: a histogram of the next digit, over the scores that share the
//    digits found so far, says which digit the k-th largest score has. Then its bits are known, and how many of the
//    scores equal to it are among the k.
// 2. A pass that counts, for each warp's run of scores, those above and those equal; the sums before a run say where
//    it writes its positions.
// 3. A pass that writes them, in ascending order.
//
// A row is shared by `parts` blocks, which add up histograms and counts in the workspace and wait for each other there:
// all blocks of the grid must be running (a cooperative launch) unless `parts` is 1. Integers are summed in any order,
// so the result does not depend on it.
#include "common.cuh"

constexpr int THREADS = 1024;
constexpr int WARPS = THREADS / 32;
constexpr int DIGITS = 3;
constexpr int BINS = 2048;

// A row's share of the workspace, zeroed before the launch. Rust: WORKSPACE in ops/topk/cuda.rs.
constexpr int MAX_PARTS = 64;
struct Workspace {
  u32 histograms[DIGITS][BINS];
  u32 above[MAX_PARTS];
  u32 equal[MAX_PARTS];
  u32 arrived;
  u32 padding[63];
};

// Waits until all blocks of the row came here for the `round`-th time.
__device__ void wait_for_row(Workspace* row, u32 parts, u32 round) {
  __syncthreads();
  if (threadIdx.x == 0) {
    __threadfence();
    atomicAdd(&row->arrived, 1);
    while (*const_cast<volatile u32*>(&row->arrived) < round * parts) {
    }
    __threadfence();
  }
  __syncthreads();
}

// The sum of `x` over the threads before this one, and over all.
__device__ u32 scan(u32 x, u32* total) {
  __shared__ u32 sums[WARPS];
  const u32 warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  u32 sum = x;
#pragma unroll
  for (int lanes = 1; lanes < 32; lanes *= 2) {
    const u32 other = __shfl_up_sync(ALL_LANES, sum, lanes);
    if (lane >= lanes) sum += other;
  }
  __syncthreads();  // the last call's sums have been read
  if (lane == 31) sums[warp] = sum;
  __syncthreads();
  if (warp == 0) {
    u32 inclusive = sums[lane];
#pragma unroll
    for (int lanes = 1; lanes < 32; lanes *= 2) {
      const u32 other = __shfl_up_sync(ALL_LANES, inclusive, lanes);
      if (lane >= lanes) inclusive += other;
    }
    sums[lane] = inclusive;
  }
  __syncthreads();
  *total = sums[WARPS - 1];
  return sum - x + (warp ? sums[warp - 1] : 0);
}

// Ranks that a thread keeps in registers, where the row is cut into runs that short: the row is then read once.
constexpr int KEPT = 32;

// A warp's run of a row.
template <bool KEEP>
struct Run {
  const float* scores;
  u64 begin;
  u64 end;
  u32 lane;
  u32 kept[KEEP ? KEPT : 1];

  __device__ __forceinline__ Run(const float* scores, u64 begin, u64 end)
      : scores(scores), begin(begin), end(end), lane(threadIdx.x % 32) {
    if constexpr (KEEP) {
#pragma unroll
      for (int step = 0; step < KEPT; step++) {
        kept[step] = step * 32 < left() ? rank_of(first()[step * 32]) : 0;
      }
    }
  }

  // Where this lane's scores start, 32 apart, and how many positions are left from there.
  __device__ __forceinline__ const float* first() const { return scores + begin + lane; }
  __device__ __forceinline__ int left() const { return static_cast<int>(end - begin) - static_cast<int>(lane); }

  // Calls `f(position, rank, inside)` for all lanes of the warp at once, in ascending order of positions.
  template <class F>
  __device__ __forceinline__ void each(F f) const {
    if constexpr (KEEP) {
#pragma unroll
      for (int step = 0; step < KEPT; step++) {
        f(static_cast<u32>(begin) + lane + step * 32, kept[step], step * 32 < left());
      }
    } else {
      constexpr int AHEAD = 8;  // loads on their way
      for (u64 base = begin; base < end; base += AHEAD * 32) {
        u32 ranks[AHEAD];
#pragma unroll
        for (int step = 0; step < AHEAD; step++) {
          const u64 i = base + step * 32 + lane;
          ranks[step] = i < end ? rank_of(scores[i]) : 0;
        }
#pragma unroll
        for (int step = 0; step < AHEAD; step++) {
          const u64 i = base + step * 32 + lane;
          f(static_cast<u32>(i), ranks[step], i < end);
        }
      }
    }
  }
};

template <bool KEEP>
__device__ __forceinline__ void topk(const float* scores, Workspace* workspace, u32* positions, u64 n, u32 k, u32 part,
                                     u32 parts) {
  __shared__ u32 histogram[BINS];
  __shared__ u32 digit_found, wanted_left;
  const u32 warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const u64 run_len = ceil_div(n, parts * WARPS);
  const u64 begin = min((part * WARPS + warp) * run_len, n);
  const Run<KEEP> run(scores, begin, min(begin + run_len, n));

  u32 threshold = 0, wanted = k, round = 0;
#pragma unroll
  for (int digit = 0; digit < DIGITS; digit++) {
    // 11 bits, 11 bits, 10 bits.
    const u32 shift = digit == 0 ? 21 : digit == 1 ? 10 : 0, bins = digit == 2 ? 1024 : 2048;
    const u32 known = digit == 0 ? 0 : ALL_LANES << (digit == 1 ? 21 : 10);
    for (u32 bin = threadIdx.x; bin < BINS; bin += THREADS) histogram[bin] = 0;
    __syncthreads();
    run.each([&](u32, u32 rank, bool inside) {
      if (inside && (rank & known) == threshold) atomicAdd(&histogram[rank >> shift & (bins - 1)], 1);
    });
    __syncthreads();
    if (parts > 1) {
      for (u32 bin = threadIdx.x; bin < bins; bin += THREADS) {
        if (histogram[bin]) atomicAdd(&workspace->histograms[digit][bin], histogram[bin]);
      }
      wait_for_row(workspace, parts, ++round);
      for (u32 bin = threadIdx.x; bin < bins; bin += THREADS) {
        histogram[bin] = __ldcg(&workspace->histograms[digit][bin]);
      }
      __syncthreads();
    }
    // Bins from the top, two a thread: the one in which the count of larger scores reaches `wanted` has the digit.
    const u32 high = bins - 1 - 2 * threadIdx.x;
    const bool valid = 2 * threadIdx.x < bins;
    const u32 in_high = valid ? histogram[high] : 0, in_low = valid ? histogram[high - 1] : 0;
    u32 total;
    const u32 before = scan(in_high + in_low, &total);
    if (before < wanted && wanted <= before + in_high) {
      digit_found = high;
      wanted_left = wanted - before;
    } else if (before + in_high < wanted && wanted <= before + in_high + in_low) {
      digit_found = high - 1;
      wanted_left = wanted - before - in_high;
    }
    __syncthreads();
    threshold |= digit_found << shift;
    wanted = wanted_left;
    __syncthreads();
  }

  // `wanted` of the scores equal to the threshold are taken: those of the lowest positions.
  u32 above = 0, equal = 0;
  run.each([&](u32, u32 rank, bool inside) {
    above += inside && rank > threshold;
    equal += inside && rank == threshold;
  });
  u32 above_here, equal_here;
  above = scan(above, &above_here);
  equal = scan(equal, &equal_here);
  above = __shfl_sync(ALL_LANES, above, 0);  // before this warp's run, within the block
  equal = __shfl_sync(ALL_LANES, equal, 0);
  if (parts > 1) {
    if (threadIdx.x == 0) {
      workspace->above[part] = above_here;
      workspace->equal[part] = equal_here;
    }
    wait_for_row(workspace, parts, ++round);
    for (u32 other = 0; other < part; other++) {
      above += __ldcg(&workspace->above[other]);
      equal += __ldcg(&workspace->equal[other]);
    }
  }
  const u32 before_lane = (1u << lane) - 1;
  run.each([&](u32 i, u32 rank, bool inside) {
    const u32 all_above = __ballot_sync(ALL_LANES, inside && rank > threshold);
    const u32 all_equal = __ballot_sync(ALL_LANES, inside && rank == threshold);
    if ((all_above | all_equal) == 0) return;
    const u32 equal_before = equal + __popc(all_equal & before_lane);
    const bool is_taken = (all_equal >> lane & 1) && equal_before < wanted;
    if ((all_above >> lane & 1) || is_taken) {
      positions[above + __popc(all_above & before_lane) + min(equal_before, wanted)] = i;
    }
    above += __popc(all_above);
    equal += __popc(all_equal);
  });
}

struct TopK {
  Step step;
  u64 offset;
  u64 stride;           // of the rows
  u32 k;                // distance of the rows of positions
  u32 parts;            // blocks a row
  u32 rows_per_length;  // rows of a sequence
};

// Scores of a block whose threads keep them.
constexpr u64 KEPT_SCORES = KEPT * THREADS;

// Grid: rows * parts.
extern "C" __global__ __launch_bounds__(THREADS, 1) void topk(
    const float* scores,   // [rows, n], rows `stride` apart
    const u32* lens,       // [b], or null
    Workspace* workspace,  // [rows], null where there is one part
    u32* positions,        // [rows, k]
    const TopK p) {
  const u32 part = blockIdx.x % p.parts;
  const u64 row = blockIdx.x / p.parts, length = p.step.length(lens, row / p.rows_per_length);
  const u64 n = p.step.candidates(length);
  const u32 k = static_cast<u32>(p.step.selected(length));
  // With fewer scores a part, waiting for each other would cost more than it gives.
  const u32 parts = static_cast<u32>(min(max(ceil_div(n, KEPT_SCORES), u64{1}), u64{p.parts}));
  if (part >= parts || k == 0) return;
  scores += p.offset + row * p.stride;
  positions += row * p.k;
  if (n <= parts * KEPT_SCORES) {
    topk<true>(scores, workspace + row, positions, n, k, part, parts);
  } else {
    topk<false>(scores, workspace + row, positions, n, k, part, parts);
  }
}
