// Attention mass of a group's query heads: the sum over heads of softmax(scale * score).
//
// 1. Each row is cut into runs; a block finds its run's largest product and the sum of exponentials below it.
// 2. Each block brings the runs of a group's rows to one shift, in their order, and adds up its keys' shares.
#include "common.cuh"

constexpr int WARPS = 8;
constexpr int THREADS = WARPS * 32;

// Scores of a run.
constexpr int RUN = 4096;

// Keys of a block in the second launch.
constexpr int TILE = 1024;

struct GroupMass {
  View<3> scores;
  u64 n;
  u32 h;
  u32 group;
  u32 runs;
  float scale;
};

// Largest product of a run, and the sum of e^(product - largest).
struct Stats {
  float largest;
  float sum;
};

// Grid: (runs, b * h).
extern "C" __global__ __launch_bounds__(THREADS) void group_mass_stats(const float* scores,  // [b, h, n]
                                                                       Stats* stats,         // [b, h, runs]
                                                                       const GroupMass p) {
  const u32 row = blockIdx.y;
  const float* from = scores + p.scores.at(row / p.h, row % p.h);
  const u64 begin = static_cast<u64>(blockIdx.x) * RUN, end = min(begin + RUN, p.n);
  float largest = -INFINITY;
#pragma unroll 8
  for (u64 i = begin + threadIdx.x; i < end; i += THREADS) largest = fmaxf(largest, from[i] * p.scale);
  largest = block_max<WARPS>(largest);
  float sum = 0;
#pragma unroll 8
  for (u64 i = begin + threadIdx.x; i < end; i += THREADS) sum += __expf(from[i] * p.scale - largest);
  sum = block_sum<WARPS>(sum);
  if (threadIdx.x == 0) stats[static_cast<u64>(row) * p.runs + blockIdx.x] = {largest, sum};
}

// Heads whose statistics a block holds at a time.
constexpr int HEADS = 16;

// Grid: (tiles of keys, b * h_kv).
extern "C" __global__ __launch_bounds__(THREADS) void group_mass(const float* scores,  // [b, h, n]
                                                                 const Stats* stats,   // [b, h, runs]
                                                                 float* mass,          // [b, h_kv, n]
                                                                 const GroupMass p) {
  __shared__ float largest[HEADS], inverse[HEADS];
  const u32 first_row = blockIdx.y * p.group, warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  mass += blockIdx.y * p.n;
  const u64 begin = static_cast<u64>(blockIdx.x) * TILE, end = min(begin + TILE, p.n);
  for (u32 first = 0; first < p.group; first += HEADS) {
    const u32 heads = min(static_cast<u32>(HEADS), p.group - first);
    __syncthreads();
    for (u32 head = warp; head < heads; head += WARPS) {
      const Stats* own = stats + static_cast<u64>(first_row + first + head) * p.runs;
      float top = -INFINITY;
      for (u32 run = lane; run < p.runs; run += 32) top = fmaxf(top, own[run].largest);
#pragma unroll
      for (int lanes = 16; lanes > 0; lanes /= 2) top = fmaxf(top, __shfl_xor_sync(ALL_LANES, top, lanes));
      float sum = 0;
      for (u32 run = lane; run < p.runs; run += 32) sum += own[run].sum * __expf(own[run].largest - top);
#pragma unroll
      for (int lanes = 16; lanes > 0; lanes /= 2) sum += __shfl_xor_sync(ALL_LANES, sum, lanes);
      if (lane == 0) {
        largest[head] = top;
        inverse[head] = 1 / sum;
      }
    }
    __syncthreads();
    for (u64 i = begin + threadIdx.x; i < end; i += THREADS) {
      float sum = first == 0 ? 0 : mass[i];
#pragma unroll 4
      for (u32 head = 0; head < heads; head++) {
        const u32 row = first_row + first + head;
        const float product = scores[p.scores.at(row / p.h, row % p.h, i)] * p.scale;
        sum += __expf(product - largest[head]) * inverse[head];
      }
      mass[i] = sum;
    }
  }
}
