// `attend`: exact attention to the keys that `search` listed, and to clusters in the place of all others.
#pragma once

#include "layout.cuh"

// What the warps of a block leave each other must fit shared memory.
template <int D>
constexpr int ATTEND_THREADS = D > 128 ? 256 : 512;

// Blocks of a multiprocessor that registers must leave room for. Left to itself ptxas makes it three of 256 threads in
// some kernels, at the price of spills.
template <int D>
constexpr int ATTEND_BLOCKS = D > 128 ? 2 : 0;

// Positions of a list whose places a block finds before it attends, and has their keys and values on their way.
template <bool BY_KV, int D>
constexpr u32 RESOLVED = BY_KV && D <= 128 ? 512 : 256;

// And of its open keys, at most, of which it has the ranks as well.
constexpr u32 RESOLVED_OPEN = 64;

// A list's keys as they are ranked: masses of a row, or scores of one head of a bundle.
template <int HEADS, bool BY_KV>
struct Ranked {
  const float* from;

  __device__ Ranked(const float* scores, const float* masses, u32 head, const Part& part, const Decode& p) {
    from = BY_KV ? masses + part.masses_at(p) : scores + part.scores_at(p) * HEADS + head;
  }
  __device__ float operator[](u32 position) const {
    return BY_KV ? from[position] : from[static_cast<u64>(score_slot(position)) * HEADS];
  }
};

// Grid: (the most splits, bundles of a sequence, sequences). Groups of LANES threads take a key each, eight elements a thread.
template <int HEADS, bool BY_KV, int D, class T>
__device__ void attend(const float* scores, const float* masses, Search* searches, const u32* lists, const Listed* listed,
                       const u32* tail, float* partials, float2* partial_stats, u32* arrived, T* out, const Decode& p) {
  constexpr u32 BLOCK = ATTEND_THREADS<D>, WARPS_OF_BLOCK = BLOCK / 32, LANES = D / 8, GROUPS = BLOCK / LANES, LISTS = BY_KV ? 1 : HEADS;
  constexpr u32 LIST_WARPS = WARPS_OF_BLOCK / LISTS, LIST_GROUPS = GROUPS / LISTS;
  // Keys whose loads are on their way at a time, as many as registers hold.
  constexpr bool IS_WIDE = sizeof(T) == 4;
  constexpr int AHEAD = BY_KV ? (HEADS < 4 ? (IS_WIDE ? 2 : 3) : (IS_WIDE ? 1 : 2)) : (IS_WIDE ? 3 : 5);
  constexpr int PER_GROUP = BY_KV ? HEADS : 1;
  // Ranks of open keys, later the warps' results, then sums of splits.
  constexpr u32 MERGED = WARPS_OF_BLOCK * PER_GROUP * D / 4, RANKED = LISTS * KEPT<BY_KV> / 2;
  constexpr u32 SCRATCH = MERGED > RANKED ? MERGED : RANKED;
  __shared__ float4 scratch[SCRATCH > BLOCK ? SCRATCH : BLOCK];
  u64(&ranks)[LISTS][KEPT<BY_KV>] = *reinterpret_cast<u64(*)[LISTS][KEPT<BY_KV>]>(scratch);
  __shared__ alignas(16) float queries[HEADS][D];
  __shared__ float shifts[HEADS];
  __shared__ float tops[WARPS_OF_BLOCK][PER_GROUP], totals[WARPS_OF_BLOCK][PER_GROUP];
  __shared__ unsigned long long tail_units[HEADS][MAX_CLUSTERS];
  __shared__ u32 tail_counts[MAX_CLUSTERS];
  __shared__ u32 before_sure[LISTS][WARPS + 1], before_open[LISTS][WARPS + 1];
  __shared__ u64 pivots[LISTS];
  __shared__ u32 places[LISTS][RESOLVED<BY_KV, D>];
  __shared__ u64 open_ranks[LISTS][RESOLVED_OPEN];  // 0 for sinks
  u32(&digits)[LISTS][256] = *reinterpret_cast<u32(*)[LISTS][256]>(places);
  static_assert(RESOLVED<BY_KV, D> >= 256);
  const u32 kv = blockIdx.y / p.bundles;
  const Part part(blockIdx.z, kv, blockIdx.y - kv * p.bundles, blockIdx.x, HEADS, p);
  const Sequence& sequence = p.sequences[part.sequence];
  const u32 splits = part.splits, split = part.split, per_warp = sequence.per_warp;
  if (split >= splits) return;
  const u32 tid = threadIdx.x, lane = tid % 32, warp = tid / 32;
  const u32 group = tid / LANES, e = tid % LANES * 8, list = group / LIST_GROUPS;
  const u32 first_list = BY_KV ? part.row : part.head_of_all(p), n_lists = BY_KV ? 1 : part.heads;
  const float scale = p.scale * LOG2_E;
  const bool is_list = list < n_lists;
  const T* const query = static_cast<const T*>(sequence.query) + part.first_head * sequence.query_stride;
  const u8* const clusters = sequence.clusters + part.kv * sequence.clusters_stride;
  // The key at a place, and the value.
  const auto row_at = [&](const void* own, const void* prefix, u32 at) {
    const bool is_own = at >= sequence.shared;  // of which there are none in pages
    return static_cast<const T*>(is_own ? own : prefix) +
           (part.kv * (is_own ? sequence.key_stride : sequence.prefix_stride) + u64{at} * p.head_dim);
  };
  const auto key_at = [&](u32 at) { return row_at(sequence.keys, sequence.prefix_keys, at); };
  const auto value_at = [&](u32 at) { return row_at(sequence.values, sequence.prefix_values, at); };
  const auto place = [&](u32 position) { return static_cast<u32>(place_of(position, sequence.pages)); };
  // Has the key and the value at a place come to the second-level cache.
  const auto fetch = [&](u32 at) {
    const T *const key = key_at(at), *const value = value_at(at);
    constexpr u32 LINE = 128 / sizeof(T);
    for (u32 i = 0; i < p.head_dim; i += LINE) prefetch(key + i), prefetch(value + i);
  };
  // Sinks and keys of the window, of which this block has every so many-th.
  const u32 edges = part.sink + (part.n - part.window_start);
  const auto edge_position = [&](u32 edge) { return edge < part.sink ? edge : part.window_start + (edge - part.sink); };
  for (u32 edge = split + tid * splits; edge < edges; edge += BLOCK * splits) fetch(place(edge_position(edge)));
  // For the next step.
  for (u32 i = split * BLOCK + tid; i < n_lists * BINS<BY_KV>; i += splits * BLOCK) {
    searches[first_list + i / BINS<BY_KV>].histogram[i % BINS<BY_KV>] = 0;
  }
  if (split == 0 && tid == 0) searches[first_list].arrived = 0;
  // All loads that wait for nothing, before the first that is waited for.
  constexpr u32 QUERIES = (HEADS * D + BLOCK - 1) / BLOCK;
  T query_values[QUERIES];
#pragma unroll
  for (u32 i = 0; i < QUERIES; i++) {
    const u32 head = (i * BLOCK + tid) / D, j = (i * BLOCK + tid) % D;
    const bool is_there = head < part.heads && j < p.head_dim;
    query_values[i] = is_there ? query[head * sequence.query_stride + j] : T{};
  }
  u32 own_sure = 0, own_open = 0;
  if (warp < n_lists && lane < WARPS) {
    const Listed& own = listed[((first_list + warp) * static_cast<u64>(p.splits) + split) * WARPS + lane];
    own_sure = own.sure, own_open = own.open;
  }
  Search& search = searches[first_list + (BY_KV ? 0 : min(list, n_lists - 1))];
  const u32 wanted = search.wanted, n_open_all = is_list ? search.n_open : 0;
  const float tail_top = search.top, own_shift = BY_KV ? search.shifts[part.bundle * HEADS + tid % HEADS] : 0;
  constexpr u32 LIST_THREADS = BLOCK / LISTS, OPEN = (KEPT<BY_KV> + LIST_THREADS - 1) / LIST_THREADS;
  // Open keys that are ranked by comparing all with all, at most one a thread.
  constexpr u32 COMPARED = LIST_THREADS < 128 ? LIST_THREADS : 128;
  u64 open[OPEN];
#pragma unroll
  for (u32 i = 0; i < OPEN; i++) open[i] = search.open[min(i * LIST_THREADS + tid % LIST_THREADS, KEPT<BY_KV> - 1)];
  const u32 per_split = per_warp * WARPS;
  // This block's clusters.
  const u32 share = (p.n_clusters + splits - 1) / splits, first_cluster = min(split * share, p.n_clusters);
  const u32 n_own = min(share, p.n_clusters - first_cluster);
  const u32 tail_heads = BY_KV ? p.group : part.heads;  // of a block of `search`
  const u64 tail_first = (static_cast<u64>(part.sequence) * p.h + (BY_KV ? part.kv * p.group : part.first_head)) * MAX_CLUSTERS;
  // So many lanes a cluster and head that each adds up two splits: with many splits a block has few clusters.
  const u32 shift = splits > 2 ? 31 - __clz(splits - 1) : 0, adders = 1 << shift, together = (BLOCK >> shift) / HEADS;
  u32 split_units[2], split_count;
  const auto load_tail = [&](u32 from) {
    const u32 adder = tid % adders, head = (tid >> shift) % HEADS, i = from + (tid >> shift) / HEADS;
    const u32 c = first_cluster + min(i, n_own - 1), all = head < part.heads ? splits : 0;
    const u32* const of_split = tail + tail_first * p.splits + (BY_KV ? part.bundle * HEADS + head : head) * MAX_CLUSTERS + c;
    split_count = sequence.counts[part.kv * p.n_clusters + c];
#pragma unroll
    for (u32 k = 0; k < 2; k++) {
      const u32 other = k * adders + adder;
      split_units[k] = other < all ? of_split[other * tail_heads * MAX_CLUSTERS] : 0;
    }
  };
  // Of this block's clusters, while others rank open keys. The first are on their way, where registers hold them.
  constexpr bool IS_AHEAD = D <= 128;
  const auto add_tail = [&] {
    for (u32 from = 0; from < n_own; from += together) {
      if (from > 0 || !IS_AHEAD) load_tail(from);
      u64 units = u64{split_units[0]} + split_units[1];
      for (u32 lanes = adders / 2; lanes > 0; lanes /= 2) units += __shfl_xor_sync(ALL_LANES, units, lanes);
      const u32 i = from + (tid >> shift) / HEADS;
      if (tid % adders == 0 && i < n_own) tail_units[(tid >> shift) % HEADS][i] = units, tail_counts[i] = split_count;
    }
  };
  if (p.has_tail && n_own > 0) {
    // What the clusters' values sum to is on its way.
    const float* const own_sums = sequence.sums + (static_cast<u64>(part.kv) * p.n_clusters + first_cluster) * p.head_dim;
    for (u32 i = tid * 32; i < n_own * p.head_dim; i += BLOCK * 32) prefetch(own_sums + i);
    if (IS_AHEAD) load_tail(0);
  }
  if (BY_KV && tid < HEADS) shifts[tid] = own_shift;
#pragma unroll
  for (u32 i = 0; i < QUERIES; i++) {
    const u32 head = (i * BLOCK + tid) / D, j = (i * BLOCK + tid) % D;
    if (head < HEADS) queries[head][j] = widen(query_values[i]);
  }
  if (warp < LISTS) {
#pragma unroll
    for (u32 lanes = 1; lanes < WARPS; lanes *= 2) {
      const u32 x = __shfl_up_sync(ALL_LANES, own_sure, lanes), y = __shfl_up_sync(ALL_LANES, own_open, lanes);
      if (lane >= lanes) own_sure += x, own_open += y;
    }
    if (lane < WARPS) before_sure[warp][lane + 1] = own_sure, before_open[warp][lane + 1] = own_open;
    if (lane == 0) before_sure[warp][0] = before_open[warp][0] = 0;
  }
  // Open keys are ranked by all threads of their list.
  if (tid < LISTS) pivots[tid] = ~u64{0};
  const Ranked<HEADS, BY_KV> ranked(scores, masses, is_list ? list : 0, part, p);
  const u64 first_segment = (first_list + (is_list ? list : 0)) * static_cast<u64>(p.splits) * WARPS;
  const u32 list_of_sequence = BY_KV ? part.kv : part.first_head + (is_list ? list : 0);
  const u32* const of_list = lists + sequence.lists_before + static_cast<u64>(list_of_sequence) * splits * per_split;
  const bool are_kept = n_open_all <= KEPT<BY_KV>;
#pragma unroll
  for (u32 i = 0; i < OPEN; i++) {
    const u32 at = i * LIST_THREADS + tid % LIST_THREADS;
    if (at < KEPT<BY_KV>) ranks[list][at] = open[i];
  }
  // Calls f with the rank of each.
  const auto each_open = [&](auto f) {
    if (are_kept) {
      for (u32 i = tid % LIST_THREADS; i < n_open_all; i += LIST_THREADS) f(ranks[list][i]);
      return;
    }
    constexpr u32 LIST_WARPS = LIST_THREADS / 32;
    for (u32 i = warp % LIST_WARPS; i < splits * WARPS; i += LIST_WARPS) {
      const u32 count = is_list ? listed[first_segment + i].open : 0;
      for (u32 k = lane; k < count; k += 32) {
        const u32 position = of_list[static_cast<u64>(i + 1) * per_warp - 1 - k];
        f(rank_of(ranked[position], position));
      }
    }
  };
  const bool compares = __syncthreads_and(n_open_all <= COMPARED);
  const u32* const own = of_list + static_cast<u64>(split) * per_split;
  const u32 n_sure = before_sure[list][WARPS], n_open = before_open[list][WARPS];
  // Of the `row`-th listed key: those that are sure come first.
  const auto position_of = [&](u32 row) {
    const bool is_open = row >= n_sure;
    const u32* const before = is_open ? before_open[list] : before_sure[list];
    row -= is_open ? n_sure : 0;
    const u32 segment = segment_of<WARPS>(before, row), in_segment = row - before[segment];
    return own[is_open ? (segment + 1) * per_warp - 1 - in_segment : segment * per_warp + in_segment];
  };
  const auto open_rank = [&](u32 position) { return position < part.sink ? 0 : rank_of(ranked[position], position); };
  const u32 n_listed = n_sure + n_open, n_resolved = min(n_sure + min(n_open, RESOLVED_OPEN), RESOLVED<BY_KV, D>);
  const auto resolve = [&] {
    // From the last thread on: the first ones have open keys to rank.
    for (u32 i = LIST_THREADS - 1 - tid % LIST_THREADS; i < n_resolved; i += LIST_THREADS) {
      const u32 position = position_of(i), at = place(position);
      places[list][i] = at;
      fetch(at);
      if (i >= n_sure) open_ranks[list][i - n_sure] = open_rank(position);
    }
  };
  // Where an open key counts in the tail: its cluster, and its shares or scores.
  struct OpenKey {
    u32 cluster;
    float scores[PER_GROUP];
  };
  const auto load_open = [&](u64 rank) {
    const u32 position = ~static_cast<u32>(rank);
    const u64 at = (part.scores_at(p) + score_slot(position)) * HEADS + (BY_KV ? 0 : list);
    OpenKey key;
    key.cluster = clusters[place_of(position, sequence.code_pages)];
#pragma unroll
    for (int h = 0; h < PER_GROUP; h++) key.scores[h] = scores[at + h];
    return key;
  };
  // With few of them a thread has one, which is on its way while they are ranked.
  const bool is_early = compares && p.has_tail && tid % LIST_THREADS < n_open_all;
  OpenKey early = {};
  if (is_early) early = load_open(open[0]);
  if (compares) {
    resolve();
    each_open([&](u64 rank) {
      u32 above = 0;
#pragma unroll 8
      for (u32 k = 0; k < n_open_all; k++) above += ranks[list][k] > rank;
      if (above + 1 == wanted) pivots[list] = rank;
    });
  } else {
    // Too many in a list: digit by digit.
    u64 known = 0, mask = 0;
    u32 left = wanted;
    for (int shift = 56; shift >= 0; shift -= 8) {
      __syncthreads();
      for (u32 i = tid % LIST_THREADS; i < 256; i += LIST_THREADS) digits[list][i] = 0;
      __syncthreads();
      each_open([&](u64 rank) {
        if ((rank & mask) == known) atomicAdd(&digits[list][rank >> shift & 0xff], 1);
      });
      __syncthreads();
      u32 digit = 255;
      while (digit > 0 && digits[list][digit] < left) left -= digits[list][digit--];
      known |= static_cast<u64>(digit) << shift;
      mask |= u64{0xff} << shift;
    }
    pivots[list] = known;
    __syncthreads();  // positions lie where the digits were
    resolve();
  }
  if (p.has_tail) add_tail();
  __syncthreads();
  if (p.has_tail) {
    // Those that are not selected, where they belong to one of this block's clusters.
    const TailUnits units(per_split);
    const auto add_open = [&](u64 rank, const OpenKey& key) {
      const u32 position = ~static_cast<u32>(rank), own = key.cluster - first_cluster;
      if (rank >= pivots[list] || position < part.sink || own >= n_own) return;
#pragma unroll
      for (int h = 0; h < PER_GROUP; h++) {
        const u32 head = BY_KV ? h : list;
        const float weight = BY_KV ? key.scores[h] : exp2_approx((key.scores[h] - tail_top) * scale);
        const unsigned long long of_key = units.of(weight, BY_KV ? __fdividef(1, tail_top) : 1, units.cut_of(position));
        if (head < part.heads) atomicAdd(&tail_units[head][own], of_key);
      }
    };
    if (is_early) add_open(open[0], early);
    if (!compares) each_open([&](u64 rank) { add_open(rank, load_open(rank)); });
  }
  const u32 n_rows = n_listed + (edges > split ? (edges - split + splits - 1) / splits : 0);
  float acc[PER_GROUP][8], top[PER_GROUP], sum[PER_GROUP];
#pragma unroll
  for (int h = 0; h < PER_GROUP; h++) {
#pragma unroll
    for (int j = 0; j < 8; j++) acc[h][j] = 0;
    top[h] = -INFINITY;
    sum[h] = 0;
  }
  for (u32 i = group % LIST_GROUPS; __any_sync(ALL_LANES, i < n_rows); i += AHEAD * LIST_GROUPS) {
    Chunk<T> key[AHEAD], value[AHEAD];
    bool is_attended[AHEAD];
#pragma unroll
    for (int u = 0; u < AHEAD; u++) {
      const u32 row = i + u * LIST_GROUPS;
      u32 at = 0;  // where its key is
      is_attended[u] = row < n_rows;
      if (row < n_resolved) {
        at = places[list][row];
        if (row >= n_sure) is_attended[u] = open_ranks[list][row - n_sure] >= pivots[list];
      } else if (row < n_listed) {
        const u32 position = position_of(row);
        at = place(position);
        if (row >= n_sure) is_attended[u] = open_rank(position) >= pivots[list];
      } else if (is_attended[u]) {
        at = place(edge_position(split + (row - n_listed) * splits));
      }
      key[u] = value[u] = {};
      if (is_attended[u] && e < p.head_dim) {
        key[u] = load_chunk(key_at(at) + e);
        value[u] = load_chunk(value_at(at) + e);
      }
    }
    float product[AHEAD][PER_GROUP];
#pragma unroll
    for (int h = 0; h < PER_GROUP; h++) {
      float q[8];
#pragma unroll
      for (int j = 0; j < 8; j += 4) {
        const float4 from = *reinterpret_cast<const float4*>(&queries[BY_KV ? h : list][e + j]);
        q[j] = from.x, q[j + 1] = from.y, q[j + 2] = from.z, q[j + 3] = from.w;
      }
#pragma unroll
      for (int u = 0; u < AHEAD; u++) {
        float dot = 0;
#pragma unroll
        for (int j = 0; j < 8; j++) dot += q[j] * widen(key[u].x[j]);
#pragma unroll
        for (u32 lanes = LANES / 2; lanes > 0; lanes /= 2) dot += __shfl_xor_sync(ALL_LANES, dot, lanes);
        product[u][h] = is_attended[u] ? dot * scale : -INFINITY;
      }
    }
#pragma unroll
    for (int h = 0; h < PER_GROUP; h++) {
      float larger = top[h];
#pragma unroll
      for (int u = 0; u < AHEAD; u++) larger = fmaxf(larger, product[u][h]);
      const float factor = exp2_approx(top[h] - finite(larger));
      top[h] = larger;
      sum[h] *= factor;
#pragma unroll
      for (int j = 0; j < 8; j++) acc[h][j] *= factor;
#pragma unroll
      for (int u = 0; u < AHEAD; u++) {
        const float weight = exp2_approx(product[u][h] - finite(larger));
        sum[h] += weight;
#pragma unroll
        for (int j = 0; j < 8; j++) acc[h][j] += weight * widen(value[u].x[j]);
      }
    }
  }
  // The clusters as further keys, of which a head's scores are what is left of its mass.
  const u32 all_own = p.has_tail ? n_own : 0;
  u32 c = group % LIST_GROUPS;
  float4 row[2] = {};
  const auto load_sums = [&] {
    if (c >= all_own || e >= p.head_dim) return;
    const float* const from = sequence.sums + (static_cast<u64>(part.kv) * p.n_clusters + first_cluster + c) * p.head_dim + e;
    row[0] = __ldg(reinterpret_cast<const float4*>(from)), row[1] = __ldg(reinterpret_cast<const float4*>(from) + 1);
  };
  load_sums();
  __syncthreads();  // open keys have been added
  const float to_weight = -static_cast<float>(TailUnits(per_split).bits);
  for (; c < all_own; c += LIST_GROUPS, load_sums()) {
    const u32 count = tail_counts[c];
    const float inverse = __fdividef(1, static_cast<float>(max(count, 1u)));
    const float mean[8] = {row[0].x * inverse, row[0].y * inverse, row[0].z * inverse, row[0].w * inverse,
                           row[1].x * inverse, row[1].y * inverse, row[1].z * inverse, row[1].w * inverse};
#pragma unroll
    for (int h = 0; h < PER_GROUP; h++) {
      const u32 head = BY_KV ? h : list;
      const float shift = BY_KV ? shifts[h] + __log2f(tail_top) : tail_top * scale;
      // What weighs nothing is passed over: its mean may be no number.
      const u64 units = head < part.heads && count ? tail_units[head][c] : 0;
      if (units == 0) continue;
      const float log_mass = __log2f(__ull2float_rn(units)) + to_weight;
      const float larger = fmaxf(top[h], shift + log_mass), weight = exp2_approx(shift + log_mass - larger);
      const float factor = exp2_approx(top[h] - larger);
      top[h] = larger;
      sum[h] = sum[h] * factor + weight;
#pragma unroll
      for (int j = 0; j < 8; j++) acc[h][j] = acc[h][j] * factor + weight * mean[j];
    }
  }
  // A warp's groups together, of all heads at once: exchanges wait for each other only where they must. Then the warps.
  float largest[PER_GROUP];
#pragma unroll
  for (int h = 0; h < PER_GROUP; h++) largest[h] = top[h];
#pragma unroll
  for (u32 lanes = LANES; lanes < 32; lanes *= 2) {
#pragma unroll
    for (int h = 0; h < PER_GROUP; h++) largest[h] = fmaxf(largest[h], __shfl_xor_sync(ALL_LANES, largest[h], lanes));
  }
#pragma unroll
  for (int h = 0; h < PER_GROUP; h++) {
    const float factor = exp2_approx(top[h] - finite(largest[h]));
    sum[h] *= factor;
#pragma unroll
    for (int j = 0; j < 8; j++) acc[h][j] *= factor;
  }
#pragma unroll
  for (u32 lanes = LANES; lanes < 32; lanes *= 2) {
#pragma unroll
    for (int h = 0; h < PER_GROUP; h++) {
      sum[h] += __shfl_xor_sync(ALL_LANES, sum[h], lanes);
#pragma unroll
      for (int j = 0; j < 8; j++) acc[h][j] += __shfl_xor_sync(ALL_LANES, acc[h][j], lanes);
    }
  }
  if (lane < LANES) {
#pragma unroll
    for (int h = 0; h < PER_GROUP; h++) {
      if (lane == 0) tops[warp][h] = largest[h], totals[warp][h] = sum[h];
      float4* to = &scratch[((warp * PER_GROUP + h) * D + e) / 4];
      to[0] = {acc[h][0], acc[h][1], acc[h][2], acc[h][3]};
      to[1] = {acc[h][4], acc[h][5], acc[h][6], acc[h][7]};
    }
  }
  __syncthreads();
  const u64 partial = static_cast<u64>(part.bundle_of_all(p)) * p.splits + split;
  for (u32 i = tid; i < HEADS * D; i += BLOCK) {
    const u32 h = i / D, element = i % D, w0 = BY_KV ? 0 : h * LIST_WARPS, hh = BY_KV ? h : 0;
    float shift = -INFINITY;
#pragma unroll
    for (u32 w = 0; w < LIST_WARPS; w++) shift = fmaxf(shift, tops[w0 + w][hh]);
    float total = 0, y = 0;
#pragma unroll
    for (u32 w = 0; w < LIST_WARPS; w++) {
      const float factor = exp2_approx(tops[w0 + w][hh] - finite(shift));
      total += factor * totals[w0 + w][hh];
      y += factor * (&scratch[0].x)[((w0 + w) * PER_GROUP + hh) * D + element];
    }
    partials[(partial * HEADS + h) * D + element] = y;
    if (element == 0) partial_stats[partial * HEADS + h] = {shift, total};
  }
  if (!is_last(&arrived[part.bundle_of_all(p)], splits)) return;
  // What a split's result is to be multiplied with.
  __shared__ float factors[HEADS][MAX_SPLITS];
  const u64 first_partial = static_cast<u64>(part.bundle_of_all(p)) * p.splits * HEADS;
  // Four elements a thread; the threads of the same ones share the splits, of which the first are loaded ahead.
  constexpr u32 QUADS = HEADS * D / 4, SHARERS = BLOCK / QUADS, AT_ONCE = 8;
  const float4* const of_splits = reinterpret_cast<const float4*>(partials + first_partial * D) + tid % QUADS;
  float4 results[AT_ONCE];
  const auto load_results = [&](u32 first) {
#pragma unroll
    for (u32 i = 0; i < AT_ONCE; i++) {
      const u32 other = first + i * SHARERS;
      results[i] = other < splits ? __ldcg(of_splits + other * QUADS) : float4{};
    }
  };
  load_results(tid / QUADS);
  if (warp < part.heads) {
    float2 own[MAX_SPLITS / 32];
    float shift = -INFINITY, total = 0;
#pragma unroll
    for (u32 i = 0; i < MAX_SPLITS / 32; i++) {
      const u32 other = i * 32 + lane;
      own[i] = other < splits ? __ldcg(&partial_stats[first_partial + other * HEADS + warp]) : float2{-INFINITY, 0};
      shift = fmaxf(shift, own[i].x);
    }
#pragma unroll
    for (int lanes = 16; lanes > 0; lanes /= 2) shift = fmaxf(shift, __shfl_xor_sync(ALL_LANES, shift, lanes));
#pragma unroll
    for (u32 i = 0; i < MAX_SPLITS / 32; i++) {
      own[i].x = exp2_approx(own[i].x - finite(shift));
      total += own[i].x * own[i].y;
    }
#pragma unroll
    for (int lanes = 16; lanes > 0; lanes /= 2) total += __shfl_xor_sync(ALL_LANES, total, lanes);
#pragma unroll
    for (u32 i = 0; i < MAX_SPLITS / 32; i++) factors[warp][i * 32 + lane] = total == 0 ? 0 : own[i].x / total;
  }
  __syncthreads();
  {
    const float* own = factors[tid % QUADS * 4 / D];
    float4 y = {};
    for (u32 first = tid / QUADS; first < splits; first += AT_ONCE * SHARERS) {
      if (first >= AT_ONCE * SHARERS) load_results(first);
#pragma unroll
      for (u32 i = 0; i < AT_ONCE; i++) {
        const float factor = own[min(first + i * SHARERS, splits - 1)];
        y.x += factor * results[i].x, y.y += factor * results[i].y;
        y.z += factor * results[i].z, y.w += factor * results[i].w;
      }
    }
    scratch[tid] = y;
  }
  __syncthreads();
  for (u32 i = tid; i < HEADS * D; i += BLOCK) {
    const u32 h = i / D, element = i % D;
    if (h >= part.heads || element >= p.head_dim) continue;
    float y = 0;
#pragma unroll
    for (u32 sharer = 0; sharer < SHARERS; sharer++) y += (&scratch[sharer * QUADS].x)[i];
    out[(static_cast<u64>(p.first_sequence) * p.h + part.head_of_all(p) + h) * p.head_dim + element] = narrow<T>(y);
  }
}
