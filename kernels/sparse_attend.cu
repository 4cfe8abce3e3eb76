// Exact attention of one query a head over listed positions, or over all, split over the keys.
//
// 1. A block takes a run of a list's positions, for up to HEADS query heads that share the list. Each of its groups of
//    threads keeps an online softmax of the keys it met. There are two ways through them:
//    - `attend_by_fma`: LANES neighbouring threads read a key, eight elements each. For any dtype and layout.
//    - `attend_by_mma`: a warp takes 16 keys to the tensor cores. For f16 and bf16 in rows aligned to 16 bytes.
// 2. The groups of a block are brought to one shift and added up in their order: a partial result of
//    (shift, sum, values) a head.
// 3. A second launch merges the partials of a head in the order of the runs.
#include "common.cuh"

struct Attend {
  View<4> query;
  View<4> keys;
  View<4> values;
  View<3> indices;
  View<2> list_lens;
  View<3> weights;
  View<4> tail_out;
  View<2> tail_lse;
  Step step;  // for the length
  u32 h;
  u32 h_kv;
  u32 head_dim;
  u32 lists;           // a batch element
  u32 heads_per_list;  // query heads that share a list
  u32 list_len;
  u32 runs;  // the most there may be
  float scale;
};

constexpr int THREADS = 128;

// Positions of a run, at least.
constexpr u64 MIN_RUN = 64;

// Positions of a run of `count`: as even as multiples of MIN_RUN allow.
__device__ inline u64 run_length(u64 count, u32 runs) {
  return max(ceil_div(ceil_div(count, runs), MIN_RUN), u64{1}) * MIN_RUN;
}

// Keys in flight a group of threads: as many as registers allow.
template <int HEADS>
constexpr int DEPTH = HEADS > 4 ? 2 : 4;

// Blocks a multiprocessor must have registers for.
template <int HEADS>
constexpr int MIN_BLOCKS = HEADS > 4 ? 2 : HEADS > 2 ? 3 : 4;

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

// The positions of a block and where its keys and values are.
template <class T>
struct Run {
  const T* keys;         // [n, head_dim]
  const T* values;       // [n, head_dim]
  const u32* indices;    // [list_len], null for all positions
  const float* weights;  // [list_len]
  u64 begin;
  u64 end;
  u64 n;
  u32 b;
  u32 first_head;  // of the heads that this block serves
  u32 heads;

  __device__ Run(const T* all_keys, const T* all_values, const u32* all_indices, const u32* list_lens,
                 const float* all_weights, const u32* lens, u32 heads_per_block, const Attend& p) {
    const u32 bundles = (p.heads_per_list + heads_per_block - 1) / heads_per_block;
    const u32 list = blockIdx.y / bundles, first_in_list = blockIdx.y % bundles * heads_per_block;
    b = blockIdx.z;
    n = p.step.length(lens, b);
    first_head = list * p.heads_per_list + first_in_list;
    heads = min(heads_per_block, p.heads_per_list - first_in_list);
    const u32 kv = first_head / (p.h / p.h_kv);
    keys = all_keys + p.keys.at(b, kv);
    values = all_values + p.values.at(b, kv);
    indices = all_indices;
    weights = all_weights;
    end = n;
    if (indices) {
      end = min(list_lens[p.list_lens.at(b, list)], p.list_len);
      indices += p.indices.at(b, list);
      weights += p.weights.at(b, list);
    }
    const u64 length = run_length(end, p.runs);
    begin = min(blockIdx.x * length, end);
    end = min(begin + length, end);
  }

  // Position of the `i`-th entry, and its weight: 0 beyond the run and for padding, which must not be read from K and V.
  __device__ u64 position(u64 i, float* weight) const {
    *weight = i < end ? 1.0f : 0.0f;
    if (!indices || i >= end) return i;
    const u64 t = indices[i];  // padding is beyond n
    *weight = t < n ? weights[i] : 0.0f;
    return t;
  }
};

// What the groups of a block found: for each of HEADS heads the shift, the sum and WIDTH values.
template <int GROUPS, int HEADS, int WIDTH>
struct Found {
  float shifts[GROUPS][HEADS];
  float sums[GROUPS][HEADS];
  float values[GROUPS][HEADS][WIDTH];

  // Adds up the groups and writes the block's partial results.
  template <class T>
  __device__ void write(const Run<T>& run, float* partials, float2* stats, const Attend& p) const {
    for (u32 i = threadIdx.x; i < run.heads * p.head_dim; i += THREADS) {
      const u32 head = i / p.head_dim, e = i % p.head_dim;
      const u64 row = (static_cast<u64>(run.b) * p.h + run.first_head + head) * p.runs + blockIdx.x;
      float top = -INFINITY, total = 0, x = 0;
#pragma unroll
      for (int g = 0; g < GROUPS; g++) top = fmaxf(top, shifts[g][head]);
#pragma unroll
      for (int g = 0; g < GROUPS; g++) {
        const float factor = exp2f(shifts[g][head] - finite(top));
        total += factor * sums[g][head];
        x += factor * values[g][head][e];
      }
      partials[row * p.head_dim + e] = x;
      if (e == 0) stats[row] = {top, total};
    }
  }
};

// Grid: (runs, lists * bundles of heads, b).
template <int LANES, int HEADS, bool ALIGNED, class T>
__device__ void attend_by_fma(const T* query, const Run<T>& run, float* partials, float2* stats, const Attend& p) {
  constexpr int GROUPS = THREADS / LANES, KEYS = DEPTH<HEADS>;
  __shared__ Found<GROUPS, HEADS, LANES * 8> found;
  const u32 group = threadIdx.x / LANES, d = threadIdx.x % LANES * 8;

  float q[HEADS][8];
#pragma unroll
  for (int head = 0; head < HEADS; head++) {
    // Heads beyond the bundle repeat its first one.
    const T* row = query + p.query.at(run.b, run.first_head + (head < run.heads ? head : 0));
    const Chunk<T> chunk = load<ALIGNED>(row, d, p.head_dim);
#pragma unroll
    for (int e = 0; e < 8; e++) q[head][e] = widen(chunk.x[e]);
  }

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
  for (u64 base = run.begin; base < run.end; base += GROUPS * KEYS) {
    Chunk<T> key[KEYS], value[KEYS];
    float weight[KEYS];
#pragma unroll
    for (int u = 0; u < KEYS; u++) {
      const u64 t = run.position(base + u * GROUPS + group, &weight[u]);
      key[u] = value[u] = {};
      if (weight[u] != 0) {
        key[u] = load<ALIGNED>(run.keys + t * p.keys.strides[2], d, p.head_dim);
        value[u] = load<ALIGNED>(run.values + t * p.values.strides[2], d, p.head_dim);
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
      found.shifts[group][head] = largest[head];
      found.sums[group][head] = sum[head];
    }
#pragma unroll
    for (int e = 0; e < 8; e++) found.values[group][head][d + e] = acc[head][e];
  }
  __syncthreads();
  found.write(run, partials, stats, p);
}

// c += a * b on the tensor cores, 16 x 8 += 16 x 16 * 16 x 8, in f32.
__device__ inline void multiply(float (&c)[4], const u32 (&a)[4], u32 b0, u32 b1, __half) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

__device__ inline void multiply(float (&c)[4], const u32 (&a)[4], u32 b0, u32 b1, __nv_bfloat16) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

// Two numbers as one register of T, and what rounding took from them.
template <class T>
__device__ inline u32 pack(float low, float high, float* low_rest, float* high_rest) {
  const T pair[2] = {narrow<T>(low), narrow<T>(high)};
  *low_rest = low - widen(pair[0]);
  *high_rest = high - widen(pair[1]);
  return *reinterpret_cast<const u32*>(pair);
}

constexpr int MMA_HEADS = 8;
constexpr int MMA_KEYS = 16;

// Grid: (runs, lists * bundles of heads, b). D is the head dimension rounded up to a multiple of 32.
//
// A warp multiplies Q [16 heads, of which 8 are empty; D] by Kᵀ, and Vᵀ [D, 16 keys] by P [16 keys, 8 heads]. Of an
// operand's fragment, lane 4g + t holds rows g and columns around 2t; which element of a row a column means is free as
// long as both operands agree. So each lane loads 16 adjacent bytes of a row and takes them for its columns: no shared
// memory, no shuffles. The scores come out where P goes in: of head g, keys 2t, 2t + 1, 2t + 8 and 2t + 9. The products
// with V are taken twice, with P rounded to T and with what the rounding left, which keeps P to 16 bits at least.
template <int D, class T>
__device__ void attend_by_mma(const T* query, const Run<T>& run, float* partials, float2* stats, const Attend& p) {
  constexpr int WARPS = THREADS / 32, SEGMENTS = D / 32, COLUMNS = (D + 63) / 64;
  __shared__ Found<WARPS, MMA_HEADS, D> found;
  const u32 warp = threadIdx.x / 32, g = threadIdx.x % 32 / 4, t = threadIdx.x % 4;

  uint4 q[SEGMENTS];
#pragma unroll
  for (int s = 0; s < SEGMENTS; s++) {
    const u32 d = 32 * s + 8 * t;
    q[s] = {};
    if (g < run.heads && d < p.head_dim) {
      q[s] = *reinterpret_cast<const uint4*>(query + p.query.at(run.b, run.first_head + g) + d);
    }
  }

  const float scale = p.scale * LOG2_E;
  float largest = -INFINITY, sum = 0;  // of head g; the sum is of this lane's keys
  float acc[COLUMNS][4][4] = {};       // of elements 64c + 8g + 2i and the next, heads 2t and 2t + 1
  for (u64 base = run.begin + warp * MMA_KEYS; base < run.end; base += WARPS * MMA_KEYS) {
    uint4 key[2][SEGMENTS], value[4][COLUMNS];
    float weight[4];
#pragma unroll
    for (int half = 0; half < 2; half++) {
      float key_weight;
      const u64 at = run.position(base + 8 * half + g, &key_weight);
      const T* row = run.keys + at * p.keys.strides[2];
#pragma unroll
      for (int s = 0; s < SEGMENTS; s++) {
        const u32 d = 32 * s + 8 * t;
        key[half][s] = {};
        if (key_weight != 0 && d < p.head_dim) key[half][s] = __ldg(reinterpret_cast<const uint4*>(row + d));
      }
    }
    const auto load_values = [&] {
#pragma unroll
      for (int j = 0; j < 4; j++) {
        const u64 at = run.position(base + 8 * (j / 2) + 2 * t + j % 2, &weight[j]);
        const T* row = run.values + at * p.values.strides[2];
#pragma unroll
        for (int c = 0; c < COLUMNS; c++) {
          const u32 d = 64 * c + 8 * g;
          value[j][c] = {};
          if (weight[j] != 0 && d < p.head_dim) value[j][c] = __ldg(reinterpret_cast<const uint4*>(row + d));
        }
      }
    };
    // Both loads on their way at once, where registers allow.
    if constexpr (D <= 128) load_values();

    float products[2][4] = {};  // of head g: with keys 8 * half + 2t and the next; then of empty heads
#pragma unroll
    for (int half = 0; half < 2; half++) {
#pragma unroll
      for (int s = 0; s < SEGMENTS; s++) {
        multiply(products[half], {q[s].x, 0, q[s].y, 0}, key[half][s].x, key[half][s].y, T());
        multiply(products[half], {q[s].z, 0, q[s].w, 0}, key[half][s].z, key[half][s].w, T());
      }
    }
    if constexpr (D > 128) load_values();
    float x[4], top = largest;
#pragma unroll
    for (int j = 0; j < 4; j++) {
      // The weight as a summand of the exponent, so that P is at most 1.
      x[j] = weight[j] != 0 ? products[j / 2][j % 2] * scale + log2f(weight[j]) : -INFINITY;
      top = fmaxf(top, x[j]);
    }
    top = fmaxf(top, __shfl_xor_sync(ALL_LANES, top, 1));
    top = fmaxf(top, __shfl_xor_sync(ALL_LANES, top, 2));
    if (__any_sync(ALL_LANES, top != largest)) {
      const float factor = exp2f(largest - finite(top));
      largest = top;
      sum *= factor;
      const float even = __shfl_sync(ALL_LANES, factor, 8 * t), odd = __shfl_sync(ALL_LANES, factor, 8 * t + 4);
#pragma unroll
      for (int c = 0; c < COLUMNS; c++) {
#pragma unroll
        for (int i = 0; i < 4; i++) {
          acc[c][i][0] *= even;
          acc[c][i][1] *= odd;
          acc[c][i][2] *= even;
          acc[c][i][3] *= odd;
        }
      }
    }
    float rest[4], none;
#pragma unroll
    for (int j = 0; j < 4; j++) {
      x[j] = exp2f(x[j] - finite(largest));
      sum += x[j];
    }
    const u32 low = pack<T>(x[0], x[1], &rest[0], &rest[1]), high = pack<T>(x[2], x[3], &rest[2], &rest[3]);
    const u32 low_rest = pack<T>(rest[0], rest[1], &none, &none), high_rest = pack<T>(rest[2], rest[3], &none, &none);
#pragma unroll
    for (int c = 0; c < COLUMNS; c++) {
#pragma unroll
      for (int i = 0; i < 4; i++) {
        const auto pair = [&](int j, u32 selector) {
          const u32* first = reinterpret_cast<const u32*>(&value[j][c]);
          const u32* second = reinterpret_cast<const u32*>(&value[j + 1][c]);
          return __byte_perm(first[i], second[i], selector);
        };
        const u32 a[4] = {pair(0, 0x5410), pair(0, 0x7632), pair(2, 0x5410), pair(2, 0x7632)};
        multiply(acc[c][i], a, low, high, T());
        multiply(acc[c][i], a, low_rest, high_rest, T());
      }
    }
  }

  sum += __shfl_xor_sync(ALL_LANES, sum, 1);
  sum += __shfl_xor_sync(ALL_LANES, sum, 2);
  if (t == 0) {
    found.shifts[warp][g] = largest;
    found.sums[warp][g] = sum;
  }
#pragma unroll
  for (int c = 0; c < COLUMNS; c++) {
#pragma unroll
    for (int i = 0; i < 4; i++) {
#pragma unroll
      for (int x = 0; x < 4; x++) {
        const u32 d = 64 * c + 8 * g + 2 * i + x / 2;
        if (d < D) found.values[warp][2 * t + x % 2][d] = acc[c][i][x];
      }
    }
  }
  __syncthreads();
  found.write(run, partials, stats, p);
}

// Attention over other keys, to add to that over the listed ones: [b, h, head_dim] and [b, h]; null for none.
struct Tail {
  const float* out;
  const float* lse;
};

// Grid: b * h; a thread an element.
template <class T>
__device__ void merge(const float* partials, const float2* stats, const u32* list_lens, const u32* lens,
                      const Tail& tail, T* out, float* lse, const Attend& p) {
  const u64 row = blockIdx.x, b = row / p.h;
  const u64 count = list_lens ? min(list_lens[p.list_lens.at(b, row % p.h / p.heads_per_list)], p.list_len)
                              : p.step.length(lens, b);
  const u32 runs = static_cast<u32>(ceil_div(count, run_length(count, p.runs)));
  partials += row * p.runs * p.head_dim;
  stats += row * p.runs;
  float top = -INFINITY;
#pragma unroll 16
  for (u32 run = 0; run < runs; run++) top = fmaxf(top, stats[run].x);
  const float tail_shift = tail.lse ? tail.lse[p.tail_lse.at(b, row % p.h)] * LOG2_E : -INFINITY;
  top = fmaxf(top, tail_shift);
  for (u32 e = threadIdx.x; e < p.head_dim; e += THREADS) {
    float total = 0, x = 0;
#pragma unroll 16
    for (u32 run = 0; run < runs; run++) {
      const float factor = exp2f(stats[run].x - finite(top));
      total += factor * stats[run].y;
      x += factor * partials[static_cast<u64>(run) * p.head_dim + e];
    }
    if (tail_shift != -INFINITY) {
      const float factor = exp2f(tail_shift - finite(top));
      total += factor;
      x += factor * tail.out[p.tail_out.at(b, row % p.h) + e];
    }
    // Nothing attended, or only scores of negative infinity: zeros.
    out[row * p.head_dim + e] = narrow<T>(total == 0 ? 0 : x / total);
    if (e == 0) lse[row] = total == 0 ? -INFINITY : top / LOG2_E + logf(total);
  }
}

#define KERNEL(name, type, HEADS, BLOCKS, attend)                                              \
  extern "C" __global__ __launch_bounds__(THREADS, BLOCKS) void attend_##name(                 \
      const type* query,     /* [b, h, 1, head_dim] */                                         \
      const type* keys,      /* [b, h_kv, n, head_dim] */                                      \
      const type* values,    /* [b, h_kv, n, head_dim] */                                      \
      const u32* indices,    /* [b, lists, list_len]; null for all positions, as the next two */ \
      const u32* list_lens,  /* [b, lists] */                                                  \
      const float* weights,  /* [b, lists, list_len] */                                        \
      const u32* lens,       /* [b], or null */                                                \
      float* partials,       /* [b, h, runs, head_dim] */                                      \
      float2* stats,         /* [b, h, runs]: shift, sum */                                    \
      const Attend p) {                                                                        \
    attend(query, Run<type>(keys, values, indices, list_lens, weights, lens, HEADS, p), partials, stats, p); \
  }

#define BY_FMA(suffix, type, LANES, HEADS, shape, ALIGNED) \
  KERNEL(suffix##_##shape##_h##HEADS, type, HEADS, MIN_BLOCKS<HEADS>, (attend_by_fma<LANES, HEADS, ALIGNED>))
#define BY_FMA_ALIGNED(LANES, shape)       \
  BY_FMA(f32, float, LANES, 1, shape, true) \
  BY_FMA(f32, float, LANES, 2, shape, true) \
  BY_FMA(f32, float, LANES, 4, shape, true) \
  BY_FMA(f32, float, LANES, 8, shape, true)
BY_FMA_ALIGNED(8, d64)
BY_FMA_ALIGNED(16, d128)
BY_FMA_ALIGNED(32, d256)

#define BY_FMA_ANY(suffix, type) BY_FMA(suffix, type, 32, 1, any, false) BY_FMA(suffix, type, 32, 4, any, false)
FOR_EACH_FLOAT(BY_FMA_ANY)

#define BY_MMA(suffix, type, D, BLOCKS) KERNEL(suffix##_mma_d##D, type, MMA_HEADS, BLOCKS, attend_by_mma<D>)
#define BY_MMA_ALIGNED(suffix, type) \
  BY_MMA(suffix, type, 64, 4)        \
  BY_MMA(suffix, type, 96, 3)        \
  BY_MMA(suffix, type, 128, 3)       \
  BY_MMA(suffix, type, 256, 2)
BY_MMA_ALIGNED(f16, __half)
BY_MMA_ALIGNED(bf16, __nv_bfloat16)

#define MERGE(suffix, type)                                                    \
  extern "C" __global__ __launch_bounds__(THREADS) void attend_merge_##suffix( \
      const float* partials, /* [b, h, runs, head_dim] */                      \
      const float2* stats,   /* [b, h, runs] */                                \
      const u32* list_lens,  /* [b, lists], null for all positions */          \
      const u32* lens,       /* [b], or null */                                \
      const float* tail_out, /* [b, h, 1, head_dim], or null */                \
      const float* tail_lse, /* [b, h], or null */                             \
      type* out,             /* [b, h, head_dim] */                            \
      float* lse,            /* [b, h] */                                      \
      const Attend p) {                                                        \
    merge(partials, stats, list_lens, lens, Tail{tail_out, tail_lse}, out, lse, p); \
  }
FOR_EACH_FLOAT(MERGE)
