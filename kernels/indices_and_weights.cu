// Lists of attended positions, and their weights by position.
#include "common.cuh"

constexpr int THREADS = 256;

struct List {
  View<3> heavy;
  Step step;
  u32 lists;  // a batch element
  u32 list_len;
};

// How many of the `k` ascending `heavy` lie before `position`.
__device__ u32 count_before(const u32* heavy, u32 k, u64 init_offset, u64 position) {
  u32 low = 0, high = k;
  // The usual answers first: none, and all.
  if (high > 0 && init_offset + heavy[0] >= position) high = 0;
  if (high > 0 && init_offset + heavy[high - 1] < position) low = high;
  while (low < high) {
    const u32 middle = low + (high - low) / 2;
    if (init_offset + heavy[middle] < position) {
      low = middle + 1;
    } else {
      high = middle;
    }
  }
  return low;
}

// Sink, heavy keys between sink and window, window: each entry for itself, since the heavy keys ascend.
// Grid: (tiles of a list, b * lists).
extern "C" __global__ __launch_bounds__(THREADS) void indices_and_weights(
    const u32* heavy,        // [b, lists, k]
    const u32* lens,         // [b], or null: then heavy holds step.heavy keys
    u32* indices,            // [b, lists, list_len]
    float* weights,          // [b, lists, list_len]
    u32* list_lens,          // [b, lists]
    const List p) {
  __shared__ u32 first, last;
  const u32 row = blockIdx.y;
  heavy += p.heavy.at(row / p.lists, row % p.lists);
  const u64 n = p.step.length(lens, row / p.lists), init_offset = p.step.init_offset;
  const u32 k = static_cast<u32>(lens ? p.step.selected(n) : p.step.heavy);
  const u64 sink = min(p.step.sink, n), window_start = max(n - min(p.step.window, n), sink);
  if (threadIdx.x == 0) first = count_before(heavy, k, init_offset, sink);
  if (threadIdx.x == 32) last = count_before(heavy, k, init_offset, window_start);
  __syncthreads();
  const u64 window_from = sink + (last - first), len = window_from + (n - window_start);
  if (blockIdx.x == 0 && threadIdx.x == 0) list_lens[row] = static_cast<u32>(len);
  const u64 i = blockIdx.x * THREADS + threadIdx.x;
  if (i >= p.list_len) return;
  u64 position = PADDING;
  if (i < sink) {
    position = i;
  } else if (i < window_from) {
    position = init_offset + heavy[first + (i - sink)];
  } else if (i < len) {
    position = window_start + (i - window_from);
  }
  indices[static_cast<u64>(row) * p.list_len + i] = static_cast<u32>(position);
  weights[static_cast<u64>(row) * p.list_len + i] = i < len ? 1.0f : 0.0f;
}

struct DenseWeights {
  View<3> indices;
  View<2> lens;
  View<3> weights;
  u64 n;
  u32 h;
  u32 lists;
  u32 list_len;
};

// Positions of a block: it zeroes them in shared memory, goes through the list, and writes each once.
constexpr int SEGMENT = 8192;

// Grid: (segments, b * h).
extern "C" __global__ __launch_bounds__(THREADS) void dense_weights(
    const u32* indices,    // [b, lists, list_len]
    const u32* lens,       // [b, lists]
    const float* weights,  // [b, lists, list_len]
    float* dense,          // [b, h, n]
    const DenseWeights p) {
  __shared__ float segment[SEGMENT];
  const u32 row = blockIdx.y, b = row / p.h, list = row % p.h / (p.h / p.lists);
  const u64 begin = static_cast<u64>(blockIdx.x) * SEGMENT;
  const u32 size = static_cast<u32>(min(static_cast<u64>(SEGMENT), p.n - begin));
  for (u32 i = threadIdx.x; i < size; i += THREADS) segment[i] = 0;
  __syncthreads();
  const u32 len = min(lens[p.lens.at(b, list)], p.list_len);
  indices += p.indices.at(b, list);
  weights += p.weights.at(b, list);
  for (u32 i = threadIdx.x; i < len; i += THREADS) {
    const u64 at = indices[i] - begin;  // wraps around below the segment
    if (at < size) atomicAdd(&segment[at], weights[i]);
  }
  __syncthreads();
  dense += row * p.n + begin;
  for (u32 i = threadIdx.x; i < size; i += THREADS) dense[i] = segment[i];
}
