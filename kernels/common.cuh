// What the kernels share: element types, strided views, reductions.
//
// Kernels trust their arguments: the op's Plan has checked them. Every pointer's comment is the shape behind it; sizes
// and offsets are 64-bit wherever they count elements of a tensor.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cfloat>
#include <cstdint>

using u8 = uint8_t;
using u32 = uint32_t;
using u64 = uint64_t;

constexpr u32 ALL_LANES = 0xffffffff;

// Instantiates X(suffix, type) for every element type of queries, keys and values.
#define FOR_EACH_FLOAT(X) X(f32, float) X(f16, __half) X(bf16, __nv_bfloat16)

// Offset and strides of a tensor, in elements. DeviceView in src/cuda has the same layout.
template <int N>
struct View {
  u64 offset;
  u64 strides[N];

  template <class... Index>
  __device__ u64 at(Index... index) const {
    const u64 indices[] = {static_cast<u64>(index)...};
    u64 position = offset;
#pragma unroll
    for (int i = 0; i < static_cast<int>(sizeof...(Index)); i++) position += indices[i] * strides[i];
    return position;
  }
};

// Which keys of a sequence a decode step is about. Step in src/cuda has the same layout.
//
// All counts follow from the sequence's length. In a decode step that is in device memory (`lens`), so that a captured
// graph serves a sequence that grows; without `lens` it is `n`.
struct Step {
  u64 n;  // where there are lens: the most there may be
  u64 sink;
  u64 window;
  u64 init_offset;
  u64 heavy;     // so many heavy keys,
  double share;  // or this share of all

  __device__ u64 length(const u32* lens, u64 b) const { return lens ? min(static_cast<u64>(lens[b]), n) : n; }

  // Keys that can be selected: those from init_offset on that have left the window.
  __device__ u64 candidates(u64 length) const {
    return length > window + init_offset ? length - window - init_offset : 0;
  }

  // Keys to select. The share is rounded up as Heavy::count does in src/config.rs.
  __device__ u64 selected(u64 length) const {
    const double keys = __dmul_rn(__dmul_rn(share, static_cast<double>(length)), 1.0 - 4.0 * DBL_EPSILON);
    return min(heavy + static_cast<u64>(ceil(keys)), candidates(length));
  }
};

// What fills a list behind its positions. Rust: PADDING in src/ops.
constexpr u32 PADDING = UINT32_MAX;

// Positions of a page. Rust: PAGE in src/ops.
constexpr u32 PAGE = 128;

// Where in its tensor a position lies, whose `pages` may be null.
__device__ inline u64 place_of(u64 position, const u32* pages) {
  return pages ? static_cast<u64>(__ldg(&pages[position / PAGE])) * PAGE + position % PAGE : position;
}

// Has what is at `from` come to the second-level cache.
__device__ inline void prefetch(const void* from) { asm volatile("prefetch.global.L2 [%0];" ::"l"(from)); }

// Floats between rows in shared memory, of so many each: lanes that read four of a row each meet in no bank.
__device__ inline u32 stride_of(u32 columns) { return (columns + 3) / 4 * 4 | 4; }

__device__ inline u64 ceil_div(u64 x, u64 y) { return (x + y - 1) / y; }

__device__ inline float widen(float x) { return x; }
__device__ inline float widen(__half x) { return __half2float(x); }
__device__ inline float widen(__nv_bfloat16 x) { return __bfloat162float(x); }

template <class T>
__device__ T narrow(float x);
template <>
__device__ inline float narrow<float>(float x) { return x; }
template <>
__device__ inline __half narrow<__half>(float x) { return __float2half_rn(x); }
template <>
__device__ inline __nv_bfloat16 narrow<__nv_bfloat16>(float x) { return __float2bfloat16_rn(x); }

// Eight adjacent elements, loaded 16 bytes at a time; `src` is aligned to 16 bytes.
template <class T>
struct alignas(16) Chunk {
  T x[8];
};

template <class T>
__device__ inline Chunk<T> load_chunk(const T* src) {
  Chunk<T> chunk;
  const uint4* from = reinterpret_cast<const uint4*>(src);
  uint4* to = reinterpret_cast<uint4*>(&chunk);
#pragma unroll
  for (int i = 0; i < static_cast<int>(sizeof(chunk) / sizeof(uint4)); i++) to[i] = __ldg(from + i);
  return chunk;
}

// The CPU's arithmetic to the bit: no fused multiply-add.
__device__ inline float add_product(float sum, float x, float y) { return __fadd_rn(sum, __fmul_rn(x, y)); }

__device__ inline float add_square(float sum, float diff) { return add_product(sum, diff, diff); }

constexpr float LOG2_E = 1.44269504f;

// A shift to subtract: scores that are all negative infinity must not become NaN.
__device__ inline float finite(float largest) { return largest == -INFINITY ? 0.0f : largest; }

// Orders as the scores do: NaN lowest, zeros of either sign equal.
__device__ inline u32 rank_of(float score) {
  const u32 bits = __float_as_uint(score + 0.0f);
  const u32 sign = static_cast<u32>(static_cast<int32_t>(bits) >> 31);
  return isnan(score) ? 0 : bits ^ (sign | 0x80000000u);
}

// The score of a rank, NaN for that of NaN.
__device__ inline float score_of(u32 rank) {
  return __uint_as_float(rank & 0x80000000u ? rank ^ 0x80000000u : ~rank);
}

// The segment with the `i`-th of their elements, if `before` counts those in front of each.
template <u32 SEGMENTS>
__device__ inline u32 segment_of(const u32* before, u32 i) {
  u32 segment = 0;
#pragma unroll
  for (u32 half = SEGMENTS / 2; half > 0; half /= 2) segment += before[segment + half] <= i ? half : 0;
  return segment;
}

// Reductions over a block of `WARPS` full warps; every thread gets the result. The order is fixed.
template <int WARPS, class Combine>
__device__ float block_reduce(float x, Combine combine) {
  __shared__ float partial[WARPS];
#pragma unroll
  for (int lanes = 16; lanes > 0; lanes /= 2) x = combine(x, __shfl_xor_sync(ALL_LANES, x, lanes));
  __syncthreads();  // the last call's partials have been read
  if (threadIdx.x % 32 == 0) partial[threadIdx.x / 32] = x;
  __syncthreads();
  x = partial[0];
#pragma unroll
  for (int warp = 1; warp < WARPS; warp++) x = combine(x, partial[warp]);
  return x;
}

template <int WARPS>
__device__ float block_sum(float x) {
  return block_reduce<WARPS>(x, [](float a, float b) { return a + b; });
}

// The largest, ignoring NaN.
template <int WARPS>
__device__ float block_max(float x) {
  return block_reduce<WARPS>(x, [](float a, float b) { return fmaxf(a, b); });
}

// Counts a thread of each of `blocks` blocks, and returns how many came before. What they did before is released. `arrived` is 0
// before and after.
__device__ inline u32 arrive(u32* arrived, u32 blocks) {
  u32 before;
  asm volatile("atom.release.gpu.global.inc.u32 %0, [%1], %2;" : "=r"(before) : "l"(arrived), "r"(blocks - 1) : "memory");
  return before;
}

// Whether this block is the last of `blocks` to come here; what the others wrote before can be read then, past the
// first-level cache. `arrived` is 0 before and after.
__device__ inline bool is_last(u32* arrived, u32 blocks) {
  __shared__ bool last;
  __syncthreads();
  if (threadIdx.x == 0) {
    // In the order of the memory model: what the block did is released, what the others did is acquired.
    u32 before;
    asm volatile("atom.acq_rel.gpu.global.inc.u32 %0, [%1], %2;" : "=r"(before) : "l"(arrived), "r"(blocks - 1) : "memory");
    last = before == blocks - 1;
  }
  __syncthreads();
  return last;
}

// Waits for the other `blocks` of a team, whose `turn`-th meeting this is: what they wrote before can be read then, past the
// first-level cache. All of them must be running, which a cooperative launch sees to.
__device__ inline void meet(u32* arrived, u32 blocks, u32 turn) {
  __syncthreads();
  if (blocks == 1) return;
  if (threadIdx.x == 0) {
    // In the order of the memory model: what the block did is released, what the others did is acquired.
    asm volatile("red.release.gpu.global.add.u32 [%0], 1;" ::"l"(arrived) : "memory");
    u32 count;
    do {
      asm volatile("ld.acquire.gpu.global.u32 %0, [%1];" : "=r"(count) : "l"(arrived) : "memory");
    } while (count < blocks * turn);
  }
  __syncthreads();
}
