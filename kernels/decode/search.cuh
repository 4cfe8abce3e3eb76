// `search`: which keys a step attends to, and what all others weigh.
#pragma once

#include "scores.cuh"

// This block's part: blocks of a sequence follow each other, and so do those of a team, of which there is one a row, or a
// bundle by query head.
template <int HEADS, bool BY_KV>
__device__ inline Part part_of_block(const Decode& p) {
  u32 sequence = 0;
  while (sequence + 1 < p.n_sequences && blockIdx.x >= p.sequences[sequence + 1].first_block) sequence++;
  const Sequence& own = p.sequences[sequence];
  const u32 block = blockIdx.x - own.first_block, team = block / own.splits, split = block - team * own.splits;
  // Before the first load a division counts: so few of them.
  const u32 kv = BY_KV ? team : team / p.bundles;
  return Part(sequence, kv, BY_KV ? 0 : team - kv * p.bundles, split, HEADS, p);
}

// Grid: the blocks of all sequences.
template <int HEADS, bool BY_KV>
__device__ void search(const float* tables, const float* bounds, float* all_scores, float* masses, Stats* stats,
                       Search* searches, u32* lists, Listed* listed, u32* tail, const Decode& p) {
  constexpr u32 LISTS = BY_KV ? 1 : HEADS, N_BINS = BINS<BY_KV>;
  extern __shared__ __align__(128) u8 rows[];  // tables, and after these the tail's masses and the keys'; a histogram; scores
  __shared__ float shifts[MAX_GROUP], best_shares[MAX_GROUP];
  __shared__ ScoreBins score_bins[HEADS];
  __shared__ u32 found_bin[LISTS], found_wanted[LISTS];
  u32* const histogram = reinterpret_cast<u32*>(rows + p.histogram_at);
  for (u32 i = threadIdx.x; i < LISTS * N_BINS; i += THREADS) histogram[i] = 0;
  const Part part = part_of_block<HEADS, BY_KV>(p);
  const Sequence& sequence = p.sequences[part.sequence];
  const u32 lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const u32 heads = BY_KV ? p.group : part.heads, n_lists = BY_KV ? 1 : part.heads;
  const u32 first_list = BY_KV ? part.row : part.head_of_all(p);
  const u32 bundles = BY_KV ? p.bundles : 1, first_bundle = part.bundle_of_all(p);
  u32* const tail_units = reinterpret_cast<u32*>(rows);  // [heads, MAX_CLUSTERS]
  const Scores<HEADS> scores = {reinterpret_cast<Entry<HEADS>*>(histogram + LISTS * N_BINS),
                                reinterpret_cast<Entry<HEADS>*>(all_scores) + part.scores_at(p), p.shared_chunks, bundles,
                                sequence.room};
  Search& first_search = searches[first_list];
  const u8* const codes = sequence.codes + part.kv * sequence.codes_stride;
  const u8* const clusters = sequence.clusters + part.kv * sequence.clusters_stride;
  if (part.split == 0 && threadIdx.x < n_lists) searches[first_list + threadIdx.x].n_open = 0;
  const Entry<HEADS>* const own_tables =
      reinterpret_cast<const Entry<HEADS>*>(tables) + first_bundle * u64{table_entries(p)};
  constexpr u32 BOUNDS = UNIT_BOUNDS<HEADS>;
  const float* const own_bounds = bounds + first_bundle * u64{table_units(p)} * BOUNDS;
  CodesAhead ahead = {codes, clusters, sequence.code_pages};
  u32 at = part.position(0);
  const u32 k = static_cast<u32>(p.step.selected(part.n));
  for (u32 bundle = 0; bundle < bundles; bundle++) {
    ahead.load(at, 0, part, p);
    load_tables<HEADS>(own_tables + bundle * table_entries(p), own_bounds + bundle * table_units(p) * BOUNDS, rows,
                       BY_KV ? nullptr : score_bins, p);
    Stats own[HEADS];
    add_entries<HEADS, BY_KV>(ahead, rows, scores, bundle, own, histogram, score_bins, part, p);
    if constexpr (BY_KV) {
      __shared__ Stats of_warps[HEADS][WARPS];
#pragma unroll
      for (int h = 0; h < HEADS; h++) {
        const Stats of_warp = reduce<32>(own[h]);
        if (lane == 0) of_warps[h][warp] = of_warp;
      }
      __syncthreads();
      if (warp < HEADS) {
        const Stats of_block = reduce<WARPS>(of_warps[warp][lane % WARPS]);
        if (lane == 0) stats[((first_bundle + bundle) * MAX_SPLITS + part.split) * HEADS + warp] = of_block;
      }
    }
  }
  const u32 per_warp = sequence.per_warp, per_split = per_warp * WARPS;
  const float scale = p.scale * LOG2_E;
  const TailUnits units(per_split);
  MassBins mass_bins;
  // By KV head no key that is not selected has a larger mass than this: those that are have no less, and all masses sum to `group`
  // at most, but for what is added here.
  float limit = 1.001f * p.group / max(k, 1u), factor = 1;
  const Masses kept = {reinterpret_cast<float*>(tail_units + bundles * HEADS * MAX_CLUSTERS), masses + part.masses_at(p),
                       (p.histogram_at / u32{sizeof(float)} - bundles * HEADS * MAX_CLUSTERS) / CHUNK};
  // Where the tables were, as soon as no block needs them any more and before the tail is added up.
  const auto clear_tail = [&] {
    for (u32 i = threadIdx.x; p.has_tail && i < heads * MAX_CLUSTERS; i += THREADS) tail_units[i] = 0;
  };
  if constexpr (BY_KV) {
    meet(&first_search.arrived, part.splits, 1);
    clear_tail();
    for (u32 head = warp; head < p.bundles * HEADS; head += WARPS) {
      const Stats all = find_stats<HEADS>(stats, first_bundle + head / HEADS, head % HEADS, part.splits);
      const float shift = head < p.group ? shift_of(all) : INFINITY;  // a share of 0
      if (lane == 0 && head < MAX_GROUP) shifts[head] = shift, best_shares[head] = exp2_approx(all.largest - shift);
    }
    __syncthreads();
    if (part.split == 0 && threadIdx.x < p.group) first_search.shifts[threadIdx.x] = shifts[threadIdx.x];
    float best = 0;
    for (u32 head = 0; head < p.group; head++) best += best_shares[head];
    mass_bins = MassBins(0.5f * p.group / max(part.end - part.begin, 1u), best);
    limit = fminf(limit, best);
    factor = __fdividef(1, limit);
    add_shares<HEADS>(scores, shifts, kept, histogram, mass_bins, tail_units, units, factor, clusters, sequence.code_pages,
                      part, p);
  }
  add_histograms<LISTS, N_BINS>(histogram, k, n_lists, &first_search);
  meet(&first_search.arrived, part.splits, BY_KV ? 2 : 1);

  if (!BY_KV) clear_tail();
  const auto counts = [&](u32 list) { return searches[first_list + min(list, n_lists - 1)].histogram; };
  find_bins<THREADS, LISTS, N_BINS>(counts, k, found_bin, found_wanted);
  u32 bin[LISTS];
  float top[LISTS], edge[LISTS];
  ScoreBins bins[LISTS];
#pragma unroll
  for (u32 list = 0; list < LISTS; list++) {
    bin[list] = list < n_lists ? found_bin[list] : MAX_BINS;
    bins[list] = score_bins[BY_KV ? 0 : list];
    top[list] = BY_KV ? limit : bins[list].top_of(bin[list]);
    edge[list] = BY_KV ? mass_bins.edge_of(bin[list]) : bins[list].edge_of(bin[list]);
  }
  u32 n_sure[LISTS] = {}, n_open[LISTS] = {};
  const auto list_at = [&](u32 list) {
    const u32 of_sequence = BY_KV ? part.kv : part.first_head + list;
    return lists + sequence.lists_before + ((static_cast<u64>(of_sequence) * part.splits + part.split) * WARPS + warp) * per_warp;
  };
  at = part.position(0);
  const auto load_next = [&](u32 at) { return BY_KV ? 0 : load_clusters(clusters, sequence.code_pages, at, part, p); };
  u32 next_clusters = load_next(at);
  for (u32 i = 0; at - lane * EACH < part.end;) {
    const u32 local = i * WARPS + warp, chunk = at / CHUNK, later = part.position(++i);
    const u32 words = next_clusters;
    next_clusters = load_next(later);
    float ranked[LISTS][EACH];
    if constexpr (BY_KV) {
      kept.load(local, at, ranked[0]);
    } else {
      Entry<HEADS> x[EACH];
      scores.load(local, chunk, 0, x);
#pragma unroll
      for (u32 list = 0; list < LISTS; list++) {
#pragma unroll
        for (u32 j = 0; j < EACH; j++) ranked[list][j] = x[j].x[list];
      }
    }
    u32 below[LISTS] = {};  // a bit a key
#pragma unroll
    for (u32 list = 0; list < LISTS; list++) {
      u32* const own = list_at(list);
#pragma unroll
      for (u32 j = 0; j < EACH; j++) {
        const u32 position = at + j;
        const bool is_candidate = position >= part.begin && position < part.end, is_sink = position < part.sink;
        const float x = ranked[list][j];
        const bool is_below = BY_KV ? mass_bins.is_below(x, edge[list]) : bins[list].is_below(x, edge[list]);
        if (is_below && is_candidate && !is_sink && list < n_lists) below[list] |= 1u << j;
        if (!__any_sync(ALL_LANES, !is_below && is_candidate)) continue;
        const u32 in = BY_KV ? mass_bins.of(x) : bins[list].of(x);
        const bool is_sure = is_candidate && in > bin[list] && !is_sink, is_open = is_candidate && in == bin[list];
        const u32 all_sure = __ballot_sync(ALL_LANES, is_sure), all_open = __ballot_sync(ALL_LANES, is_open);
        const u32 before = (1u << lane) - 1;
        if (is_sure) own[n_sure[list] + __popc(all_sure & before)] = position;
        if (is_open) own[per_warp - 1 - (n_open[list] + __popc(all_open & before))] = position;
        n_sure[list] += __popc(all_sure);
        n_open[list] += __popc(all_open);
      }
    }
    if (!BY_KV && p.has_tail) {
#pragma unroll
      for (u32 j = 0; j < EACH; j++) {
        u32* const of_cluster = &tail_units[words >> j * 8 & 0xff];
        const float cut = units.cut_of(at + j);
#pragma unroll
        for (u32 list = 0; list < LISTS; list++) {
          // Of the largest weight that there may be up to the end of the bin.
          const float weight = exp2_approx((ranked[list][j] - top[list]) * scale);
          atomicAdd(of_cluster + list * MAX_CLUSTERS, units.of(weight, 1, below[list] >> j & 1 ? cut : -INFINITY));
        }
      }
    }
    at = later;
  }
  // What else there is to do about the keys of the lists, a key a lane. Lanes wrote the positions for each other.
  __syncwarp();
#pragma unroll
  for (u32 list = 0; list < LISTS; list++) {
    const u32* const own = list_at(list);
    Search& search = searches[first_list + list];
    for (u32 i = lane; i < n_open[list] + (BY_KV && p.has_tail ? n_sure[list] : 0); i += 32) {
      const bool is_open = i < n_open[list];
      const u32 position = is_open ? own[per_warp - 1 - i] : own[i - n_open[list]];
      const u32 local = position / CHUNK / part.splits;
      if (is_open) {
        // For `attend`: its rank and what it is ranked by; below what it weighs.
        const float x = BY_KV ? kept.one(local, position) : scores.one(local, 0, position).x[list];
        const u32 slot = atomicAdd(&search.n_open, 1);
        if (slot < KEPT<BY_KV>) search.open[slot] = rank_of(x, position);
        if (BY_KV) masses[part.masses_at(p) + position] = x;
      }
      float* const to = scores.global[score_slot(position)].x;
      if constexpr (BY_KV) {
        const u32 cluster = p.has_tail ? clusters[place_of(position, sequence.code_pages)] : 0;
        const float cut = cut_of(units, position, part);
        for (u32 bundle = 0; bundle < bundles; bundle++) {
          const Entry<HEADS> entry = scores.one(local, bundle, position);
#pragma unroll
          for (u32 h = 0; h < HEADS; h++) {
            const float share = share_of(entry.x[h], scale, shifts[bundle * HEADS + h]);
            if (is_open) to[bundle * scores.room * HEADS + h] = share;
            if (p.has_tail) atomicSub(&tail_units[(bundle * HEADS + h) * MAX_CLUSTERS + cluster], units.of(share, factor, cut));
          }
        }
      } else {
        to[list] = scores.one(local, 0, position).x[list];
      }
    }
  }
  if (lane == 0) {
#pragma unroll
    for (u32 list = 0; list < LISTS; list++) {
      if (list < n_lists) {
        listed[((first_list + list) * static_cast<u64>(p.splits) + part.split) * WARPS + warp] = {n_sure[list], n_open[list]};
      }
    }
  }
  __syncthreads();
  if (p.has_tail) {
    const u32 first_head = BY_KV ? part.kv * p.group : part.first_head;
    u32* const to =
        tail + ((static_cast<u64>(part.sequence) * p.h + first_head) * p.splits + part.split * heads) * MAX_CLUSTERS;
    for (u32 i = threadIdx.x; i < heads * MAX_CLUSTERS; i += THREADS) to[i] = tail_units[i];
  }
  if (part.split == 0 && threadIdx.x == 0) {
#pragma unroll
    for (u32 list = 0; list < LISTS; list++) {
      if (list < n_lists) searches[first_list + list].wanted = found_wanted[list], searches[first_list + list].top = top[list];
    }
  }
}
