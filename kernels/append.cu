// New keys and values, written behind the last ones of a cache, whose length then grows.
#include "common.cuh"

constexpr int THREADS = 256;

struct Append {
  View<4> keys;
  View<4> values;
  View<5> cache;
  u64 capacity;
  u64 added;  // keys a sequence
  u32 b;
  u32 h_kv;
  u32 head_dim;
};

// `lens` are lengths of the sequences, then a count of the blocks that are done. Rust: `Lens` in src/cuda.
//
// A sequence for which there is no room is left as it is. Grid: (any number of blocks, which share the elements; b; keys
// and values). WIDTH elements of a row are copied at once.
template <int WIDTH, class T>
__device__ void append(const T* keys, const T* values, T* cache, u32* lens, const Append& p) {
  struct alignas(sizeof(T) * WIDTH) Piece {
    T x[WIDTH];
  };
  const u32 b = blockIdx.y, which = blockIdx.z;
  const u64 length = lens[b], row_pieces = p.head_dim / WIDTH, pieces = p.added * p.h_kv * row_pieces;
  const View<4>& view = which == 0 ? p.keys : p.values;
  const T* rows = which == 0 ? keys : values;
  if (length + p.added <= p.capacity) {
    for (u64 i = static_cast<u64>(blockIdx.x) * THREADS + threadIdx.x; i < pieces; i += static_cast<u64>(gridDim.x) * THREADS) {
      const u64 e = i % row_pieces * WIDTH, row = i / row_pieces, h = row / p.added, t = row % p.added;
      const T* from = rows + view.at(b, h, t, e);
      T* to = cache + p.cache.at(which, b, h, length + t, e);
      *reinterpret_cast<Piece*>(to) = *reinterpret_cast<const Piece*>(from);
    }
  }
  // The last block to come here is the last that needed the old lengths.
  if (!is_last(&lens[p.b], gridDim.x * gridDim.y * gridDim.z) || threadIdx.x != 0) return;
  for (u32 sequence = 0; sequence < p.b; sequence++) {
    if (lens[sequence] + p.added <= p.capacity) lens[sequence] += static_cast<u32>(p.added);
  }
}

#define KERNEL(name, type, WIDTH)                                    \
  extern "C" __global__ __launch_bounds__(THREADS) void append_##name( \
      const type* keys,   /* [b, h_kv, added, head_dim] */           \
      const type* values, /* [b, h_kv, added, head_dim] */           \
      type* cache,        /* [2, b, h_kv, capacity, head_dim] */     \
      u32* lens,          /* [b], [1] */                             \
      const Append p) {                                              \
    append<WIDTH>(keys, values, cache, lens, p);                     \
  }
KERNEL(2_x1, uint16_t, 1)
KERNEL(2_x8, uint16_t, 8)
KERNEL(4_x1, u32, 1)
KERNEL(4_x4, u32, 4)
