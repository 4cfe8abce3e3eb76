// Exact attention of one query a head over listed positions, or over all, split over the keys.
//
// 1. A block takes a run of a list's positions, for up to HEADS query heads that share the list. A key is read by LANES
//    neighbouring threads, eight elements each, and serves all the heads; a few keys are loaded at a time, so that enough
//    bytes are on their way. Each group of LANES threads keeps an online softmax of the keys it met.
// 2. The groups of a block are brought to one shift and added up in their order: a partial result of
//    (shift, sum, values) a head.
// 3. A second launch merges the partials of a head in the order of the runs.
#include "common.cuh"

struct Attend {
  View<4> query;
  View<4> keys;
  View<4> values;
  View<3> indices;
  View<2> lens;
  View<3> weights;
  u64 n;
  u64 run;  // positions of a block
  u32 h;
  u32 h_kv;
  u32 head_dim;
  u32 lists;           // a batch element
  u32 heads_per_list;  // query heads that share a list
  u32 list_len;
  u32 runs;
  float scale;
};

constexpr int THREADS = 128;

// Keys in flight a group of threads: as many as registers allow.
template <int HEADS>
constexpr int DEPTH = HEADS > 4 ? 2 : 4;

// Blocks a multiprocessor must have registers for.
template <int HEADS>
constexpr int MIN_BLOCKS = HEADS > 4 ? 2 : HEADS > 2 ? 3 : 4;

constexpr float LOG2_E = 1.44269504f;

// A shift to subtract: scores that are all negative infinity must not become NaN.
__device__ inline float finite(float largest) { return largest == -INFINITY ? 0.0f : largest; }

// Eight elements from `d` on of a row of `head_dim`, zero beyond its end.
template <bool ALIGNED, class T>
__device__ inline Chunk<T> load(const T* row, u32 d, u32 head_dim) {
  Chunk<T> chunk = {};
  if constexpr (ALIGNED) {
    if (d < head_dim) chunk = load_chunk(row + d);
  } else {
#pragma unroll
    for (int e = 0; e < 8; e++) {
      if (d + e < head_dim) chunk.x[e] = row[d + e];
    }
  }
  return chunk;
}

// Grid: (runs, lists * bundles of heads, b).
template <int LANES, int HEADS, bool ALIGNED, class T>
__device__ void attend(const T* query, const T* keys, const T* values, const u32* indices, const u32* lens,
                       const float* weights, float* partials, float2* stats, const Attend& p) {
  constexpr int GROUPS = THREADS / LANES, KEYS = DEPTH<HEADS>;
  __shared__ float shifts[GROUPS][HEADS], sums[GROUPS][HEADS];
  __shared__ float accumulators[GROUPS][HEADS][LANES * 8];
  const u32 bundles = (p.heads_per_list + HEADS - 1) / HEADS, b = blockIdx.z;
  const u32 list = blockIdx.y / bundles, first_in_list = blockIdx.y % bundles * HEADS;
  const u32 heads = min(static_cast<u32>(HEADS), p.heads_per_list - first_in_list);
  const u32 first_head = list * p.heads_per_list + first_in_list, kv = first_head / (p.h / p.h_kv);
  const u32 group = threadIdx.x / LANES, d = threadIdx.x % LANES * 8;

  float q[HEADS][8];
#pragma unroll
  for (int head = 0; head < HEADS; head++) {
    // Heads beyond the bundle repeat its first one.
    const T* row = query + p.query.at(b, first_head + (head < heads ? head : 0));
    const Chunk<T> chunk = load<ALIGNED>(row, d, p.head_dim);
#pragma unroll
    for (int e = 0; e < 8; e++) q[head][e] = widen(chunk.x[e]);
  }

  u64 end = p.n;
  if (indices) {
    end = min(lens[p.lens.at(b, list)], p.list_len);
    indices += p.indices.at(b, list);
    weights += p.weights.at(b, list);
  }
  const u64 begin = min(blockIdx.x * p.run, end);
  end = min(begin + p.run, end);
  keys += p.keys.at(b, kv);
  values += p.values.at(b, kv);

  // Scores are kept in units of ln 2, for exp2.
  const float scale = p.scale * LOG2_E;
  float largest[HEADS], sum[HEADS], acc[HEADS][8];
#pragma unroll
  for (int head = 0; head < HEADS; head++) {
    largest[head] = -INFINITY;
    sum[head] = 0;
#pragma unroll
    for (int e = 0; e < 8; e++) acc[head][e] = 0;
  }
  for (u64 base = begin; base < end; base += GROUPS * KEYS) {
    Chunk<T> key[KEYS], value[KEYS];
    float weight[KEYS];
#pragma unroll
    for (int u = 0; u < KEYS; u++) {
      const u64 i = base + u * GROUPS + group;
      u64 t = i;
      weight[u] = i < end ? 1.0f : 0.0f;
      if (indices && i < end) {
        t = indices[i];  // padding is beyond n
        weight[u] = t < p.n ? weights[i] : 0.0f;
      }
      // What is passed over is not read: it may hold NaN.
      key[u] = value[u] = {};
      if (weight[u] != 0) {
        key[u] = load<ALIGNED>(keys + t * p.keys.strides[2], d, p.head_dim);
        value[u] = load<ALIGNED>(values + t * p.values.strides[2], d, p.head_dim);
      }
    }
    float score[KEYS][HEADS];
#pragma unroll
    for (int u = 0; u < KEYS; u++) {
      float k[8];
#pragma unroll
      for (int e = 0; e < 8; e++) k[e] = widen(key[u].x[e]);
#pragma unroll
      for (int head = 0; head < HEADS; head++) {
        float dot = 0;
#pragma unroll
        for (int e = 0; e < 8; e++) dot += q[head][e] * k[e];
        score[u][head] = dot;
      }
    }
#pragma unroll
    for (int u = 0; u < KEYS; u++) {
#pragma unroll
      for (int head = 0; head < HEADS; head++) {
#pragma unroll
        for (int lanes = LANES / 2; lanes > 0; lanes /= 2) {
          score[u][head] += __shfl_xor_sync(ALL_LANES, score[u][head], lanes);
        }
        score[u][head] = weight[u] != 0 ? score[u][head] * scale : -INFINITY;
      }
    }
#pragma unroll
    for (int head = 0; head < HEADS; head++) {
      float top = largest[head];
#pragma unroll
      for (int u = 0; u < KEYS; u++) top = fmaxf(top, score[u][head]);
      const float factor = exp2f(largest[head] - finite(top));
      largest[head] = top;
      sum[head] *= factor;
#pragma unroll
      for (int e = 0; e < 8; e++) acc[head][e] *= factor;
#pragma unroll
      for (int u = 0; u < KEYS; u++) {
        score[u][head] = weight[u] * exp2f(score[u][head] - finite(top));
        sum[head] += score[u][head];
      }
    }
#pragma unroll
    for (int u = 0; u < KEYS; u++) {
#pragma unroll
      for (int e = 0; e < 8; e++) {
        const float v = widen(value[u].x[e]);
#pragma unroll
        for (int head = 0; head < HEADS; head++) acc[head][e] += score[u][head] * v;
      }
    }
  }

#pragma unroll
  for (int head = 0; head < HEADS; head++) {
    if (d == 0) {
      shifts[group][head] = largest[head];
      sums[group][head] = sum[head];
    }
#pragma unroll
    for (int e = 0; e < 8; e++) accumulators[group][head][d + e] = acc[head][e];
  }
  __syncthreads();
  for (u32 i = threadIdx.x; i < heads * p.head_dim; i += THREADS) {
    const u32 head = i / p.head_dim, e = i % p.head_dim;
    const u64 row = (static_cast<u64>(b) * p.h + first_head + head) * p.runs + blockIdx.x;
    float top = -INFINITY, total = 0, x = 0;
#pragma unroll
    for (int g = 0; g < GROUPS; g++) top = fmaxf(top, shifts[g][head]);
#pragma unroll
    for (int g = 0; g < GROUPS; g++) {
      const float factor = exp2f(shifts[g][head] - finite(top));
      total += factor * sums[g][head];
      x += factor * accumulators[g][head][e];
    }
    partials[row * p.head_dim + e] = x;
    if (e == 0) stats[row] = {top, total};
  }
}

// Grid: b * h; a thread an element.
template <class T>
__device__ void merge(const float* partials, const float2* stats, T* out, float* lse, u32 runs, u32 head_dim) {
  const u64 row = blockIdx.x;
  partials += row * runs * head_dim;
  stats += row * runs;
  float top = -INFINITY;
  for (u32 run = 0; run < runs; run++) top = fmaxf(top, stats[run].x);
  for (u32 e = threadIdx.x; e < head_dim; e += THREADS) {
    float total = 0, x = 0;
#pragma unroll 8
    for (u32 run = 0; run < runs; run++) {
      const float factor = exp2f(stats[run].x - finite(top));
      total += factor * stats[run].y;
      x += factor * partials[static_cast<u64>(run) * head_dim + e];
    }
    // Nothing attended, or only scores of negative infinity: zeros.
    out[row * head_dim + e] = narrow<T>(total == 0 ? 0 : x / total);
    if (e == 0) lse[row] = total == 0 ? -INFINITY : top / LOG2_E + logf(total);
  }
}

#define ATTEND(suffix, type, LANES, HEADS, name, ALIGNED)                                               \
  extern "C" __global__ __launch_bounds__(THREADS, MIN_BLOCKS<HEADS>) void attend_##suffix##_##name##_h##HEADS( \
      const type* query,     /* [b, h, 1, head_dim] */                                                  \
      const type* keys,      /* [b, h_kv, n, head_dim] */                                               \
      const type* values,    /* [b, h_kv, n, head_dim] */                                               \
      const u32* indices,    /* [b, lists, list_len]; null for all positions, as the next two */        \
      const u32* lens,       /* [b, lists] */                                                           \
      const float* weights,  /* [b, lists, list_len] */                                                 \
      float* partials,       /* [b, h, runs, head_dim] */                                               \
      float2* stats,         /* [b, h, runs]: shift, sum */                                             \
      const Attend p) {                                                                                 \
    attend<LANES, HEADS, ALIGNED>(query, keys, values, indices, lens, weights, partials, stats, p);     \
  }
#define ALIGNED_ATTEND(suffix, type, LANES, name)                                                       \
  ATTEND(suffix, type, LANES, 1, name, true)                                                            \
  ATTEND(suffix, type, LANES, 2, name, true)                                                            \
  ATTEND(suffix, type, LANES, 4, name, true)                                                            \
  ATTEND(suffix, type, LANES, 8, name, true)
#define KERNELS(suffix, type)                                                                           \
  ALIGNED_ATTEND(suffix, type, 8, d64)                                                                  \
  ALIGNED_ATTEND(suffix, type, 16, d128)                                                                \
  ALIGNED_ATTEND(suffix, type, 32, d256)                                                                \
  ATTEND(suffix, type, 32, 1, any, false)                                                               \
  ATTEND(suffix, type, 32, 4, any, false)                                                               \
  extern "C" __global__ __launch_bounds__(THREADS) void attend_merge_##suffix(                          \
      const float* partials, /* [b, h, runs, head_dim] */                                               \
      const float2* stats,   /* [b, h, runs] */                                                         \
      type* out,             /* [b, h, head_dim] */                                                     \
      float* lse,            /* [b, h] */                                                               \
      const u32 runs, const u32 head_dim) {                                                             \
    merge(partials, stats, out, lse, runs, head_dim);                                                   \
  }
FOR_EACH_FLOAT(KERNELS)
