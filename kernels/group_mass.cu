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
  Step step;
  u64 row;  // distance of the mass's rows
  u32 h;
  u32 group;
  u32 runs;  // distance of the rows of statistics
  float scale;
};

// Largest product of a run, and the sum of e^(product - largest).
struct Stats {
  float largest;
  float sum;
};

// Grid: (any number of blocks, which share the runs; b * h).
extern "C" __global__ __launch_bounds__(THREADS) void group_mass_stats(const float* scores,  // [b, h, n]
                                                                       const u32* lens,      // [b], or null
                                                                       Stats* stats,         // [b, h, runs]
                                                                       const GroupMass p) {
  const u32 row = blockIdx.y;
  const u64 n = p.step.candidates(p.step.length(lens, row / p.h));
  const float* from = scores + p.scores.at(row / p.h, row % p.h);
  for (u64 run = blockIdx.x; run * RUN < n; run += gridDim.x) {
    const u64 begin = run * RUN, end = min(begin + RUN, n);
    float largest = -INFINITY;
#pragma unroll 8
    for (u64 i = begin + threadIdx.x; i < end; i += THREADS) largest = fmaxf(largest, from[i] * p.scale);
    largest = block_max<WARPS>(largest);
    float sum = 0;
#pragma unroll 8
    for (u64 i = begin + threadIdx.x; i < end; i += THREADS) sum += __expf(from[i] * p.scale - largest);
    sum = block_sum<WARPS>(sum);
    if (threadIdx.x == 0) stats[static_cast<u64>(row) * p.runs + run] = {largest, sum};
  }
}

// Heads whose statistics a block holds at a time.
constexpr int HEADS = 16;

// Grid: (any number of blocks, which share the tiles of keys; b * h_kv).
extern "C" __global__ __launch_bounds__(THREADS) void group_mass(const float* scores,  // [b, h, n]
                                                                 const Stats* stats,   // [b, h, runs]
                                                                 const u32* lens,      // [b], or null
                                                                 float* mass,          // [b, h_kv, row]
                                                                 const GroupMass p) {
  __shared__ float largest[HEADS], inverse[HEADS];
  const u32 first_row = blockIdx.y * p.group, b = first_row / p.h, warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const u64 n = p.step.candidates(p.step.length(lens, b)), runs = ceil_div(n, RUN);
  mass += blockIdx.y * p.row;
  if (static_cast<u64>(blockIdx.x) * TILE >= n) return;
  for (u32 first = 0; first < p.group; first += HEADS) {
    const u32 heads = min(static_cast<u32>(HEADS), p.group - first);
    __syncthreads();
    for (u32 head = warp; head < heads; head += WARPS) {
      const Stats* own = stats + static_cast<u64>(first_row + first + head) * p.runs;
      float top = -INFINITY;
      for (u32 run = lane; run < runs; run += 32) top = fmaxf(top, own[run].largest);
#pragma unroll
      for (int lanes = 16; lanes > 0; lanes /= 2) top = fmaxf(top, __shfl_xor_sync(ALL_LANES, top, lanes));
      float sum = 0;
      for (u32 run = lane; run < runs; run += 32) sum += own[run].sum * __expf(own[run].largest - top);
#pragma unroll
      for (int lanes = 16; lanes > 0; lanes /= 2) sum += __shfl_xor_sync(ALL_LANES, sum, lanes);
      if (lane == 0) {
        largest[head] = top;
        inverse[head] = 1 / sum;
      }
    }
    __syncthreads();
    for (u64 tile = static_cast<u64>(blockIdx.x) * TILE; tile < n; tile += static_cast<u64>(gridDim.x) * TILE) {
      for (u64 i = tile + threadIdx.x; i < min(tile + TILE, n); i += THREADS) {
        float sum = first == 0 ? 0 : mass[i];
#pragma unroll 4
        for (u32 head = 0; head < heads; head++) {
          const float product = scores[p.scores.at(b, (first_row + first + head) % p.h, i)] * p.scale;
          sum += __expf(product - largest[head]) * inverse[head];
        }
        mass[i] = sum;
      }
    }
  }
}
