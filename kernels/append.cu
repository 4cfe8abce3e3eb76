// New keys and values, written behind the last ones of their sequences, whose lengths then grow.
#include "common.cuh"

constexpr int THREADS = 256;
constexpr u32 MAX_SEQUENCES = 16;  // of a launch

struct Sequence {
  const void* keys;      // [h_kv, added, head_dim]
  const void* values;    // [h_kv, added, head_dim]
  void* cached_keys;     // [h_kv, capacity, head_dim], of which those that are written to are there
  void* cached_values;   // as the keys
  u32* len;
  u32* arrived;  // blocks that are done
  const u32* pages;  // of the cached keys and values, or null
  u64 key_strides[3];
  u64 value_strides[3];
  u64 cached_stride;  // between heads
  u64 capacity;
};

struct Append {
  Sequence sequences[MAX_SEQUENCES];
  u64 added;  // keys a sequence
  u32 h_kv;
  u32 head_dim;
};

// A sequence for which there is no room is left as it is. Grid: (any number of blocks, which share the elements; sequences;
// keys and values). WIDTH elements of a row are copied at once.
template <int WIDTH, class T>
__device__ void append(const Append& p) {
  struct alignas(sizeof(T) * WIDTH) Piece {
    T x[WIDTH];
  };
  const Sequence& own = p.sequences[blockIdx.y];
  const bool is_key = blockIdx.z == 0;
  const u64 length = *own.len, row_pieces = p.head_dim / WIDTH, pieces = p.added * p.h_kv * row_pieces;
  const u64* const strides = is_key ? own.key_strides : own.value_strides;
  const T* const rows = static_cast<const T*>(is_key ? own.keys : own.values);
  T* const cached = static_cast<T*>(is_key ? own.cached_keys : own.cached_values);
  const bool has_room = length + p.added <= own.capacity;
  if (has_room) {
    for (u64 i = static_cast<u64>(blockIdx.x) * THREADS + threadIdx.x; i < pieces; i += static_cast<u64>(gridDim.x) * THREADS) {
      const u64 e = i % row_pieces * WIDTH, row = i / row_pieces, h = row / p.added, t = row % p.added;
      const T* from = rows + (h * strides[0] + t * strides[1] + e * strides[2]);
      T* to = cached + (h * own.cached_stride + place_of(length + t, own.pages) * p.head_dim + e);
      *reinterpret_cast<Piece*>(to) = *reinterpret_cast<const Piece*>(from);
    }
  }
  // The last block to come here is the last that needed the old length.
  if (is_last(own.arrived, gridDim.x * gridDim.z) && threadIdx.x == 0 && has_room) *own.len += static_cast<u32>(p.added);
}

#define KERNEL(name, type, WIDTH)                                                                                 \
  extern "C" __global__ __launch_bounds__(THREADS) void append_##name(const __grid_constant__ Append p) { append<WIDTH, type>(p); }
KERNEL(2_x1, uint16_t, 1)
KERNEL(2_x8, uint16_t, 8)
KERNEL(4_x1, u32, 1)
KERNEL(4_x4, u32, 4)
