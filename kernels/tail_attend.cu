// Attention to the candidates that no list names, by the mean values of their clusters.
//
// 1. The candidates of a head are cut into tiles. A block weighs those of a tile, 0 what is listed, and adds the weights
//    up by cluster. They are added as integers, in units of 2^-40 of the largest: in any order the sum is the same.
// 2. A block brings the tiles of a head to one shift, in their order, and sums the clusters' means with the masses.
#include "common.cuh"

constexpr int WARPS = 8;
constexpr int THREADS = WARPS * 32;
constexpr u32 MAX_CLUSTERS = THREADS;

// Of the second kernel.
constexpr int ATTEND_WARPS = 32;
constexpr int ATTEND_THREADS = ATTEND_WARPS * 32;

// Candidates of a tile. No more than 2^12: a half of a weight has 20 bits, and their sum must fit 32.
constexpr u32 TILE = 4096;
constexpr int EACH = TILE / THREADS;

struct TailAttend {
  View<3> scores;
  View<4> codes;
  View<3> indices;
  View<2> list_lens;
  View<3> weights;
  View<4> sums;
  View<3> counts;
  Step step;  // init_offset and the number of candidates
  u32 h;
  u32 h_kv;
  u32 lists;  // a batch element
  u32 list_len;
  u32 n_clusters;
  u32 head_dim;
  u32 tiles;  // the most there may be
  float scale;
};

// Grid: (any number of blocks, which share the tiles; b * h).
extern "C" __global__ __launch_bounds__(THREADS) void tail_masses(
    const float* scores,   // [b, h, n]
    const u8* codes,       // [b, h_kv, n, 1]
    const u32* indices,    // [b, lists, list_len]
    const u32* list_lens,  // [b, lists]
    const float* weights,  // [b, lists, list_len]
    const u32* lens,       // [b], or null
    float* masses,         // [b, h, tiles, n_clusters]
    float* shifts,         // [b, h, tiles]
    const TailAttend p) {
  __shared__ u32 listed[TILE / 32], high[MAX_CLUSTERS], low[MAX_CLUSTERS];
  const u32 row = blockIdx.y, b = row / p.h, head = row % p.h, kv = head / (p.h / p.h_kv), list = head / (p.h / p.lists);
  const u64 n = p.step.candidates(p.step.length(lens, b));
  const u32 list_len = min(list_lens[p.list_lens.at(b, list)], p.list_len);
  scores += p.scores.at(b, head);
  codes += p.codes.at(b, kv);
  indices += p.indices.at(b, list);
  weights += p.weights.at(b, list);
  for (u64 tile = blockIdx.x; tile * TILE < n; tile += gridDim.x) {
    const u64 first = tile * TILE;
    const u32 count = static_cast<u32>(min(static_cast<u64>(TILE), n - first));
    __syncthreads();  // the last tile's sums have been read
    if (threadIdx.x < TILE / 32) listed[threadIdx.x] = 0;
    high[threadIdx.x] = low[threadIdx.x] = 0;
    __syncthreads();
#pragma unroll 4
    for (u32 i = threadIdx.x; i < list_len; i += THREADS) {
      const u64 t = indices[i] - p.step.init_offset - first;  // wraps around below the tile
      if (t < count && weights[i] != 0) atomicOr(&listed[t / 32], 1u << t % 32);
    }
    __syncthreads();
    float x[EACH], largest = -INFINITY;
    u32 clusters[EACH / 4] = {};  // a byte each
#pragma unroll
    for (int i = 0; i < EACH; i++) {
      const u32 t = i * THREADS + threadIdx.x;
      if (t < count) clusters[i / 4] |= codes[(first + t) * p.codes.strides[2]] << i % 4 * 8;
      x[i] = t < count && !(listed[t / 32] >> t % 32 & 1) ? scores[first + t] * p.scale : -INFINITY;
      largest = fmaxf(largest, x[i]);
    }
    largest = block_max<WARPS>(largest);
    if (largest > -INFINITY) {
#pragma unroll
      for (int i = 0; i < EACH; i++) {
        // At most 2^40 - 1; NaN weighs nothing.
        const float scaled = exp2f((x[i] - largest) * LOG2_E) * 0x1p40f;
        const u64 weight = scaled > 0 ? min(__float2ull_rz(scaled), (1ull << 40) - 1) : 0;
        const u32 upper = static_cast<u32>(weight >> 20), lower = static_cast<u32>(weight & 0xfffff);
        const u32 cluster = clusters[i / 4] >> i % 4 * 8 & 0xff;
        if (upper) atomicAdd(&high[cluster], upper);
        if (lower) atomicAdd(&low[cluster], lower);
      }
    }
    __syncthreads();
    const u64 at = static_cast<u64>(row) * p.tiles + tile;
    if (threadIdx.x < p.n_clusters) {
      const u64 sum = (static_cast<u64>(high[threadIdx.x]) << 20) + low[threadIdx.x];
      masses[at * p.n_clusters + threadIdx.x] = __ull2float_rn(sum) * 0x1p-40f;
    }
    if (threadIdx.x == 0) shifts[at] = largest;
  }
}

// Grid: b * h; some threads a cluster, then some an element, each for a part of what is to be summed.
extern "C" __global__ __launch_bounds__(ATTEND_THREADS) void tail_attend(
    const float* masses,  // [b, h, tiles, n_clusters]
    const float* shifts,  // [b, h, tiles]
    const float* sums,    // [b, h_kv, n_clusters, head_dim]
    const u32* counts,    // [b, h_kv, n_clusters]
    const u32* lens,      // [b], or null
    float* out,           // [b, h, head_dim]
    float* lse,           // [b, h]
    const TailAttend p) {
  __shared__ float parts[ATTEND_THREADS], weights[MAX_CLUSTERS];
  const u32 row = blockIdx.x, b = row / p.h, kv = row % p.h / (p.h / p.h_kv);
  const u64 n = p.step.candidates(p.step.length(lens, b));
  const u32 tiles = static_cast<u32>(ceil_div(n, TILE));
  shifts += static_cast<u64>(row) * p.tiles;
  masses += static_cast<u64>(row) * p.tiles * p.n_clusters;
  float top = -INFINITY;
  for (u32 tile = threadIdx.x; tile < tiles; tile += ATTEND_THREADS) top = fmaxf(top, shifts[tile]);
  top = block_max<ATTEND_WARPS>(top);

  constexpr u32 MASS_PARTS = ATTEND_THREADS / MAX_CLUSTERS;
  const u32 c = threadIdx.x % MAX_CLUSTERS;
  float mass = 0;
  if (c < p.n_clusters && top > -INFINITY) {
#pragma unroll 8
    for (u32 tile = threadIdx.x / MAX_CLUSTERS; tile < tiles; tile += MASS_PARTS) {
      const float own = masses[tile * p.n_clusters + c];
      mass += own == 0 ? 0 : exp2f((shifts[tile] - top) * LOG2_E) * own;  // an infinite score is the top, and weighs nothing
    }
  }
  parts[threadIdx.x] = mass;
  __syncthreads();
  mass = 0;
  if (threadIdx.x < MAX_CLUSTERS) {
    const u32 count = c < p.n_clusters ? counts[p.counts.at(b, kv, c)] : 0;
#pragma unroll
    for (u32 part = 0; part < MASS_PARTS; part++) mass += count ? parts[part * MAX_CLUSTERS + c] : 0;
    weights[c] = mass == 0 ? 0 : mass / count;
  }
  const float total = block_sum<ATTEND_WARPS>(mass);  // and the weights have been written, the parts read

  const u32 width = p.head_dim <= 64 ? 64 : p.head_dim <= 128 ? 128 : 256;
  const u32 part = threadIdx.x / width, e = threadIdx.x % width, per_part = p.n_clusters * width / ATTEND_THREADS + 1;
  const u32 begin = part * per_part, end = min(begin + per_part, p.n_clusters);
  float x = 0;
  if (e < p.head_dim) {
#pragma unroll 8
    for (u32 cluster = begin; cluster < end; cluster++) {
      // What weighs nothing is passed over: its sum may be no number.
      const float sum = sums[p.sums.at(b, kv, cluster) + e];
      x += weights[cluster] == 0 ? 0 : weights[cluster] * sum;
    }
  }
  parts[threadIdx.x] = x;
  __syncthreads();
  if (threadIdx.x < p.head_dim) {
    x = 0;
    for (u32 i = threadIdx.x; i < ATTEND_THREADS; i += width) x += parts[i];
    out[static_cast<u64>(row) * p.head_dim + threadIdx.x] = total == 0 ? 0 : x / total;
  }
  if (threadIdx.x == 0) lse[row] = total == 0 ? -INFINITY : top + logf(total);
}
