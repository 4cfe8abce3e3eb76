// `search`: which keys a step attends to, and what all others weigh.
#pragma once

#include "scores.cuh"

// Has what is at `from` come to the second-level cache.
__device__ inline void prefetch(const u8* from) { asm volatile("prefetch.global.L2 [%0];" ::"l"(from)); }

// Tells the other blocks of a team that this one has done its part of a phase.
__device__ inline void arrive(u32* arrived, u32 blocks) {
  __syncthreads();
  // In the order of the memory model: what the block did is released.
  if (blocks > 1 && threadIdx.x == 0) asm volatile("red.release.gpu.global.add.u32 [%0], 1;" ::"l"(arrived) : "memory");
}

// Waits for them, for the `turn`-th time: what they wrote before can be read then. All of them must be running, which a
// cooperative launch sees to.
__device__ inline void wait(u32* arrived, u32 blocks, u32 turn) {
  if (blocks > 1 && threadIdx.x == 0) {
    // What the others did is acquired.
    u32 count;
    do {
      asm volatile("ld.acquire.gpu.global.u32 %0, [%1];" : "=r"(count) : "l"(arrived) : "memory");
    } while (count < blocks * turn);
  }
  __syncthreads();
}

// Lists this block's parts: the work of all teams lies in a row, of which each block has a piece.
template <int HEADS, bool BY_KV>
__device__ u32 find_parts(Part* parts, const Decode& p) {
  const u32 from = blockIdx.x * p.units_per_block, to = from + p.units_per_block;
  u32 count = 0, slot = 0;
  for (u32 sequence = 0; sequence < p.n_sequences; sequence++) {
    const Sequence& own = p.sequences[sequence];
    const u32 bundles = BY_KV ? 1 : p.bundles, teams = p.h_kv * bundles;
    if (own.first_unit >= to || own.first_unit + teams * own.units <= from) continue;
    u32 team = (max(from, own.first_unit) - own.first_unit) / own.units;
    for (u32 start = own.first_unit + team * own.units; team < teams && start < to; team++, start += own.units) {
      Part part = Part::of<BY_KV>(sequence, team / bundles, team % bundles, blockIdx.x, false, HEADS, p);
      const u32 chunks = (part.end + CHUNK - 1) / CHUNK;
      if (p.units_per_block == 1) {
        // Blocks take turns: neighbours, which are often heavy together, go to all of them.
        part.first_chunk = part.split;
        part.chunk_step = part.splits;
        part.stop = part.end;
        part.slot = 0;
      } else {
        // As large a share of the keys as of the team's units, in one piece.
        const u64 first = max(from, start) - start, last = min(to, start + own.units) - start;
        const u32 last_chunk = static_cast<u32>(last * chunks / own.units);
        part.first_chunk = static_cast<u32>(first * chunks / own.units);
        part.chunk_step = 1;
        part.stop = min(part.end, last_chunk * CHUNK);
        part.slot = slot;
        slot += last_chunk - part.first_chunk;
      }
      part.k = static_cast<u32>(p.step.selected(part.n));
      parts[count++] = part;
    }
  }
  return count;
}

// A block of `search`: where it reads and writes.
template <int HEADS, bool BY_KV, class T>
struct Searcher {
  static constexpr u32 LISTS = BY_KV ? 1 : HEADS, N_BINS = BINS<BY_KV>;
  const Decode& p;
  float* tables;
  float* all_scores;
  float* masses;
  Stats* stats;
  Search* searches;
  u32* lists;
  Listed* listed;
  u32* tail;
  u8* rows;              // tables, and after these the tail's masses, [heads, MAX_CLUSTERS]
  u32* histogram;        // [LISTS, N_BINS]
  ScoreBins* score_bins;  // [MAX_PARTS, HEADS]
  MassBins* mass_bins;   // [MAX_PARTS]

  // Heads, lists and bundles of a team.
  __device__ u32 heads(const Part& part) const { return BY_KV ? p.group : part.heads; }
  __device__ u32 n_lists(const Part& part) const { return BY_KV ? 1 : part.heads; }
  __device__ u32 bundles() const { return BY_KV ? p.bundles : 1; }

  // The first of its lists, and of its bundles, among all sequences'.
  __device__ u32 first_list(const Part& part) const { return BY_KV ? part.row : part.head_of_all(p); }
  __device__ u32 first_bundle(const Part& part) const { return part.row * p.bundles + part.bundle; }

  // Counts blocks that are done with a phase.
  __device__ u32* arrived(const Part& part) const { return &searches[first_list(part)].arrived; }

  __device__ Entry<HEADS>* tables_of(const Part& part) const {
    return reinterpret_cast<Entry<HEADS>*>(tables) + first_bundle(part) * u64{table_entries(p)};
  }
  __device__ Scores<HEADS> scores_of(const Part& part) const {
    return {reinterpret_cast<Entry<HEADS>*>(histogram + LISTS * N_BINS),
            reinterpret_cast<Entry<HEADS>*>(all_scores) + part.scores_at(p), p.shared_chunks, bundles(),
            p.sequences[part.sequence].room};
  }
  __device__ const u8* codes_of(const Part& part) const {
    return p.sequences[part.sequence].codes + part.kv * p.sequences[part.sequence].codes_stride;
  }
  __device__ const u8* clusters_of(const Part& part) const {
    return p.sequences[part.sequence].clusters + part.kv * p.sequences[part.sequence].clusters_stride;
  }

  __device__ void make_tables(const Part& part) const {
    const u8* const codes = codes_of(part);
    const u8* const clusters = clusters_of(part);
    if (part.split == 0 && threadIdx.x < n_lists(part)) searches[first_list(part) + threadIdx.x].n_open = 0;
    for (u32 bundle = 0; bundle < bundles(); bundle++) {
      ::make_tables<HEADS, T>(tables_of(part) + bundle * table_entries(p), reinterpret_cast<float*>(histogram), part,
                              part.bundle + bundle, p);
    }
    // Codes are on their way to the second-level cache while the tables are brought together.
    u32 at = part.position(0);
    for (u32 i = 0; at < part.stop; at = part.position(++i)) {
      prefetch(codes + static_cast<u64>(at) * p.pq_dim);
      if (p.n_clusters && threadIdx.x % 8 == 0) prefetch(clusters + at);
    }
  }

  __device__ void score(u32 i, const Part& part) const {
    const u32 lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    ScoreBins* const own_bins = score_bins + i * HEADS;
    for (u32 bin = threadIdx.x; bin < LISTS * N_BINS; bin += THREADS) histogram[bin] = 0;
    for (u32 bundle = 0; bundle < bundles(); bundle++) {
      float low[HEADS], high[HEADS];
      load_tables<HEADS>(tables_of(part) + bundle * table_entries(p), rows, low, high, p);
      if constexpr (!BY_KV) {
        if (threadIdx.x == 0) {
#pragma unroll
          for (int h = 0; h < HEADS; h++) own_bins[h] = ScoreBins(low[h], high[h]);
        }
        __syncthreads();
      }
      Stats own[HEADS];
      add_entries<HEADS, BY_KV>(codes_of(part), clusters_of(part), rows, scores_of(part), bundle, own, histogram, own_bins, part, p);
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
          if (lane == 0) stats[((first_bundle(part) + bundle) * MAX_SPLITS + part.split) * HEADS + warp] = of_block;
        }
      }
    }
    if constexpr (!BY_KV) {
      for (u32 list = 0; list < n_lists(part); list++) {
        add_histogram<N_BINS>(histogram + list * N_BINS, part.k, searches[first_list(part) + list]);
      }
    }
  }

  // By KV head.
  __device__ void share(u32 i, const Part& part) const {
    __shared__ float shifts[MAX_GROUP], best_shares[MAX_GROUP];
    const u32 lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    Search& search = searches[first_list(part)];
    if (i > 0) {
      for (u32 bin = threadIdx.x; bin < N_BINS; bin += THREADS) histogram[bin] = 0;
    }
    for (u32 head = warp; head < p.bundles * HEADS; head += WARPS) {
      const Stats all = find_stats<HEADS>(stats, first_bundle(part) + head / HEADS, head % HEADS, part.splits);
      const float shift = head < p.group ? shift_of(all) : INFINITY;  // a share of 0
      if (lane == 0 && head < MAX_GROUP) shifts[head] = shift, best_shares[head] = exp2_approx(all.largest - shift);
    }
    __syncthreads();
    if (part.split == 0 && threadIdx.x < p.group) search.shifts[threadIdx.x] = shifts[threadIdx.x];
    float best = 0;
    for (u32 head = 0; head < p.group; head++) best += best_shares[head];
    const MassBins bins(0.5f * p.group / max(part.end - part.begin, 1u), best);
    if (threadIdx.x == 0) mass_bins[i] = bins;
    add_shares<HEADS>(scores_of(part), shifts, histogram, bins, part, p);
    add_histogram<N_BINS>(histogram, part.k, search);
  }

  __device__ void select(u32 i, const Part& part) const {
    __shared__ u32 found_bin[LISTS], found_wanted[LISTS];
    const u32 lane = threadIdx.x % 32, warp = threadIdx.x / 32, bundles = this->bundles();
    const u32 heads = this->heads(part), n_lists = this->n_lists(part), first_list = this->first_list(part);
    const ScoreBins* const own_bins = score_bins + i * HEADS;
    const Scores<HEADS> scores = scores_of(part);
    const u8* const clusters = clusters_of(part);
    u32* const tail_units = reinterpret_cast<u32*>(rows);
    u32* const lists = this->lists + p.sequences[part.sequence].lists_before;
    float* const masses = this->masses + part.masses_at(p);
    for (u32 j = threadIdx.x; p.has_tail && j < heads * MAX_CLUSTERS; j += THREADS) tail_units[j] = 0;
    for (u32 list = 0; list < n_lists; list++) {
      find_bin<N_BINS>(searches[first_list + list].histogram, part.k, &found_bin[list], &found_wanted[list]);
    }
    const MassBins mass_bins = this->mass_bins[i];
    u32 bin[LISTS];
    float top[LISTS], edge[LISTS];
    ScoreBins bins[LISTS];
#pragma unroll
    for (u32 list = 0; list < LISTS; list++) {
      bin[list] = list < n_lists ? found_bin[list] : MAX_BINS;
      bins[list] = own_bins[BY_KV ? 0 : list];
      top[list] = BY_KV ? mass_bins.top_of(bin[list]) : bins[list].top_of(bin[list]);
      edge[list] = BY_KV ? mass_bins.edge_of(bin[list]) : bins[list].edge_of(bin[list]);
    }
    const u32 per_warp = p.sequences[part.sequence].per_warp, per_split = per_warp * WARPS;
    const float unit = tail_unit(per_split), scale = p.scale * LOG2_E;
    // What makes the largest weight that there may be below the bin a unit of the tail: a factor of shares, a shift of scores.
    float to_units[HEADS];
#pragma unroll
    for (int h = 0; h < HEADS; h++) {
      to_units[h] = BY_KV ? unit / top[0] : log2f(unit) - (h < LISTS ? top[h] : 0) * scale;
    }
    u32 n_sure[LISTS] = {}, n_open[LISTS] = {};
    u32 at = part.position(0);
    const auto load_clusters = [&](u32 at) {
      return p.has_tail && at < part.stop ? __ldg(reinterpret_cast<const u32*>(clusters + at)) : 0;
    };
    u32 next_clusters = load_clusters(at);
    for (u32 round = 0; at - lane * EACH < part.stop;) {
      const u32 local = part.slot + round * WARPS + warp, chunk = at / CHUNK, later = part.position(++round);
      const u32 words = next_clusters;
      next_clusters = load_clusters(later);
      Entry<HEADS> x[EACH];
      float ranked[LISTS][EACH] = {};
      for (u32 bundle = 0; bundle < bundles; bundle++) {
        scores.load(local, chunk, bundle, x);
#pragma unroll
        for (int h = 0; h < HEADS; h++) {
#pragma unroll
          for (u32 j = 0; j < EACH; j++) ranked[BY_KV ? 0 : h][j] += x[j].x[h];  // in the order of add_shares
        }
      }
      u32 below[LISTS] = {};  // a bit a key
#pragma unroll
      for (u32 list = 0; list < LISTS; list++) {
        const u32 of_sequence = BY_KV ? part.kv : part.first_head + list;
        u32* const own = lists + ((static_cast<u64>(of_sequence) * p.splits + part.split) * WARPS + warp) * per_warp;
#pragma unroll
        for (u32 j = 0; j < EACH; j++) {
          const u32 position = at + j;
          const bool is_candidate = position >= part.begin && position < part.end, is_sink = position < part.sink;
          const float x = ranked[list][j];
          const bool is_below = BY_KV ? mass_bins.is_below(x, edge[list]) : bins[list].is_below(x, edge[list]);
          if (is_below && is_candidate && !is_sink) below[list] |= 1u << j;
          if (!__any_sync(ALL_LANES, !is_below && is_candidate)) continue;
          const u32 in = BY_KV ? mass_bins.of(x) : bins[list].of(x);
          const bool is_sure = is_candidate && in > bin[list] && !is_sink, is_open = is_candidate && in == bin[list];
          const u32 all_sure = __ballot_sync(ALL_LANES, is_sure), all_open = __ballot_sync(ALL_LANES, is_open);
          const u32 before = (1u << lane) - 1;
          if (is_sure) own[n_sure[list] + __popc(all_sure & before)] = position;
          if (is_open) {
            // For `attend`: where it is, its rank, and what it weighs.
            own[per_warp - 1 - (n_open[list] + __popc(all_open & before))] = position;
            Search& search = searches[first_list + list];
            const u32 slot = atomicAdd(&search.n_open, 1);
            if (slot < KEPT) search.open[slot] = rank_of(x, position);
            if (BY_KV) masses[position] = x;
            for (u32 bundle = 0; bundle < bundles; bundle++) {
              const Entry<HEADS> entry = scores.one(local, chunk, bundle, j);
              float* const to = scores.global[bundle * scores.room + score_slot(position)].x;
#pragma unroll
              for (u32 h = 0; h < HEADS; h++) {
                if (BY_KV || h == list) to[h] = entry.x[h];
              }
            }
          }
          n_sure[list] += __popc(all_sure);
          n_open[list] += __popc(all_open);
        }
      }
      if (p.has_tail) {
        float cuts[EACH];
#pragma unroll
        for (u32 j = 0; j < EACH; j++) cuts[j] = cut_of(at + j);
        for (u32 bundle = 0; bundle < bundles; bundle++) {
          if (bundles > 1) scores.load(local, chunk, bundle, x);
#pragma unroll
          for (int h = 0; h < HEADS; h++) {
            const u32 head = bundle * HEADS + h, bits = below[BY_KV ? 0 : h];
            if (head >= heads) continue;
#pragma unroll
            for (u32 j = 0; j < EACH; j++) {
              const float weight = BY_KV ? x[j].x[h] * to_units[h] : exp2_approx(x[j].x[h] * scale + to_units[h]);
              const u32 units = in_units(weight, unit, cuts[j]);
              if ((bits >> j & 1) && units) atomicAdd(&tail_units[head * MAX_CLUSTERS + (words >> j * 8 & 0xff)], units);
            }
          }
        }
      }
      at = later;
    }
    if (lane == 0) {
#pragma unroll
      for (u32 list = 0; list < LISTS; list++) {
        if (list < n_lists) {
          const u64 segment = ((first_list + list) * static_cast<u64>(p.splits) + part.split) * WARPS + warp;
          listed[segment] = {n_sure[list], n_open[list]};
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
};

// Grid: blocks of which each has as much work. A phase of all its parts is done before the next of any: others wait for it.
template <int HEADS, bool BY_KV, class T>
__device__ void search(float* tables, float* all_scores, float* masses, Stats* stats, Search* searches, u32* lists,
                       Listed* listed, u32* tail, const Decode& p) {
  using Block = Searcher<HEADS, BY_KV, T>;
  extern __shared__ __align__(128) u8 rows[];  // what Searcher says, a histogram, and scores
  __shared__ Part parts[MAX_PARTS];
  __shared__ u32 n_parts;
  __shared__ ScoreBins score_bins[MAX_PARTS * HEADS];
  __shared__ MassBins mass_bins[MAX_PARTS];
  u32* const histogram = reinterpret_cast<u32*>(rows + p.histogram_at);
  const Block block = {p,      tables, all_scores, masses,    stats,      searches, lists,
                       listed, tail,   rows,       histogram, score_bins, mass_bins};
  if (threadIdx.x == 0) n_parts = find_parts<HEADS, BY_KV>(parts, p);
  __syncthreads();
  const u32 count = n_parts;
#pragma unroll 1
  for (u32 i = 0; i < count; i++) {
    const Part part = parts[i];
    block.make_tables(part);
    arrive(block.arrived(part), part.splits);
  }
#pragma unroll 1
  for (u32 i = 0; i < count; i++) {
    const Part part = parts[i];
    wait(block.arrived(part), part.splits, 1);
    block.score(i, part);
    arrive(block.arrived(part), part.splits);
  }
  if constexpr (BY_KV) {
#pragma unroll 1
    for (u32 i = 0; i < count; i++) {
      const Part part = parts[i];
      wait(block.arrived(part), part.splits, 2);
      block.share(i, part);
      arrive(block.arrived(part), part.splits);
    }
  }
#pragma unroll 1
  for (u32 i = 0; i < count; i++) {
    const Part& part = parts[i];  // registers are few
    wait(block.arrived(part), part.splits, BY_KV ? 3 : 2);
    block.select(i, part);
  }
}
