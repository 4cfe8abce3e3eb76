// softmax(scale * scores) of each row over the keys that its query may see, in place; a block a row.
#include "common.cuh"

constexpr int WARPS = 8;
constexpr int THREADS = WARPS * 32;

// Grid: rows.
extern "C" __global__ __launch_bounds__(THREADS) void causal_softmax(
    float* scores,  // [b, h_kv, rows, n], contiguous
    const u64 offset, const u64 n, const u64 rows, const u64 first, const u64 queries, const float scale) {
  float* row = scores + offset + blockIdx.x * n;
  const u64 visible = first + blockIdx.x % rows % queries + 1;
  float largest = -INFINITY;
  for (u64 i = threadIdx.x; i < visible; i += THREADS) largest = fmaxf(largest, row[i] * scale);
  largest = block_max<WARPS>(largest);
  float sum = 0;
  for (u64 i = threadIdx.x; i < visible; i += THREADS) {
    const float x = expf(row[i] * scale - largest);
    row[i] = x;
    sum += x;
  }
  sum = block_sum<WARPS>(sum);
  for (u64 i = threadIdx.x; i < n; i += THREADS) row[i] = i < visible ? row[i] / sum : 0;
}
