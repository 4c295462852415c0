// Softmax weights of coded tokens, added into a bin for each (value stage, codeword, head). docs/cuda.md.
#pragma once

#include "decode_cluster.cuh"

namespace gsrq::cuda::decoding {

#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 900

// softcap * tanh(x / softcap) in units of log2, without the slow paths of a division.
__device__ inline float soft_capped(float x, float cap) {
  return cap * kLog2e * (1 - __fdividef(2.0f, 1 + exp2_fast(x * __fdividef(2 * kLog2e, cap))));
}

__device__ inline bool any_value_thread(bool x) {
  uint32_t any;
  asm volatile(
      "{\n\t.reg .pred p, q;\n\tsetp.ne.u32 p, %1, 0;\n\t"
      "barrier.red.or.pred q, 2, %2, p;\n\tselp.u32 %0, 1, 0, q;\n\t}"
      : "=r"(any) : "r"(static_cast<uint32_t>(x)), "n"(kValueThreads) : "memory");
  return any != 0;
}

__device__ inline void add_shared(uint32_t address, uint32_t x) {
  asm volatile("red.shared.add.u32 [%0], %1;" ::"r"(address), "r"(x) : "memory");
}

template <int Lanes>
__device__ inline void load_scores(float (&part)[Lanes], uint32_t from) {
  if constexpr (Lanes == 1) {
    asm volatile("ld.shared.f32 %0, [%1];" : "=f"(part[0]) : "r"(from));
  } else {
#pragma unroll
    for (int h = 0; h < Lanes; h += 4)
      asm volatile("ld.shared.v4.f32 {%0, %1, %2, %3}, [%4];"
                   : "=f"(part[h]), "=f"(part[h + 1]), "=f"(part[h + 2]), "=f"(part[h + 3])
                   : "r"(from + 4 * h));
  }
}

// Bins of four or eight heads are left slot by slot, as the next launch reads them. Of the i-th vector of four that is moved,
// where it lies as bins do in shared memory, and where it is left: a warp takes eight codewords of four slots, 128 bytes of
// each.
struct BinPlace {
  int shared, left;
};
template <int Lanes, int Stride>
__device__ inline BinPlace bin_place(int i) {
  if constexpr (Lanes == 1) {
    return {i, i};
  } else {
    constexpr int kOfCode = Stride / 4, kOfSlot = Lanes / 4;
    const int at = i / 32 % (kOfCode / 4) * 4 + i % 4, code = i / 32 / (kOfCode / 4) * 8 + i / 4 % 8;
    return {code * kOfCode + at, (at / kOfSlot * kCodewords + code) * kOfSlot + at % kOfSlot};
  }
}

constexpr int kPlainCluster = 4;
constexpr int kNoOctet = 1 << 28;  // past all others: of a warp that has no tile in a round
constexpr int kTogether = 2;  // steps for which the value warps meet once

// A warp weighs a tile of the CTA's and bins it for up to 32 / Lanes slots: each half of the warp has the tile's 16 tokens,
// a thread a token, and half of the slots. Plain: a cluster of kPlainCluster owners, no softcap, no token in a second round.
// Four heads with 64 bins a codeword, plain: a warp bins a tile for all slots and half of the warps have the step's second
// chunk, so that a token is weighed by two threads, not by four.
template <int Lanes, int Stride, Reading How, bool Plain>
__device__ void bin_values(const gsrq_layer& layer, const gsrq_call& call, const DecodePlan& plan, const Memory& memory,
                           const Shared& shared, Cursor cursor, uint32_t rank, int cluster) {
  constexpr bool kFast = How != Reading::bytes, kPaged = How == Reading::words_of_pages;
  int thread = threadIdx.x - kKeyThreads, lane = thread % 32;
  const int warp = thread / 32;
  constexpr bool kWhole = Plain && Lanes == 4 && Stride == 64;
  constexpr int kPadded = Stride / Lanes, kPartSlots = kWhole || kPadded < 32 / Lanes ? kPadded : 32 / Lanes;
  constexpr int kParts = kPadded / kPartSlots, kSlots = kPartSlots / 2, kWords = (kSlots + 3) / 4;
  const int owner = rank % plan.owners, way = rank / plan.owners, own_tiles = plan.tiles_of(owner);
  const int tile_bytes = kCodeTile * layer.values.groups * layer.values.stages;
  const int cluster_size = Plain ? kPlainCluster : plan.cluster, owners = Plain ? kPlainCluster : plan.owners;
  const int most_tiles = Plain ? kChunkTiles / kPlainCluster : plan.own_tiles;
  constexpr int kTurns = kWhole ? 1 : kTogether;  // tokens of a thread in the steps for which the warps meet
  constexpr int kWholeTiles = kChunkTiles / kPlainCluster;
  static_assert(!kWhole || kTogether * kWholeTiles == kValueWarps, "a tile a warp");
  const int units = own_tiles * kParts, round_bits = Plain || units <= kValueWarps ? 0 : units <= 2 * kValueWarps ? 1 : 2;
  constexpr int round_tokens = kTile * kValueWarps / kParts;  // no round has more
  static_assert(kChunkTiles * kParts <= 4 * kValueWarps, "four rounds at most");
  const int round_stride = kValueWarps / kParts * plan.owners * (kTile / kCodeTile);
  const uint32_t full_bytes = plan.cluster * own_tiles * kTile * Lanes * 4;
  const uint32_t part_bytes = most_tiles * kTile * Lanes * 4, buffer_bytes = cluster_size * part_bytes;
  const uint32_t last_buffer = plan.buffers - 1;
  const bool wide = kWhole && layer.values.stages % 8 == 0;  // then two words are one of eight bytes
  const float softcap = Plain ? 0.0f : layer.softcap;
  const int64_t cta = static_cast<int64_t>(cluster) * plan.cluster + rank;
  // In step (a, b) lanes differ in (slot, head), so that they meet in no bank: theirs are a and b, exclusive-or the lane's.
  const int half = lane / kTile, head_turn = lane % Lanes, slot_turn = (lane % kTile / Lanes + (kWhole ? half * 4 : 0)) % kSlots;
  int turn = ((half * kSlots + slot_turn) * Lanes + head_turn) * 4;  // in bytes of a codeword's bins
  uint32_t byte_turn = 0x3210 ^ 0x1111 * (slot_turn & 3);
  if constexpr (kSlots < 4) byte_turn >>= 8 * half;  // the loaded word has both halves' codes
  // A warp's part of the slots is the same in all rounds; a codeword's 32 bins there are 128 bytes, aligned. Of 64 bins the
  // halves of the warp add to opposite banks.
  static_assert(kValueWarps % kParts == 0 && (kWhole || kPartSlots * Lanes == 32), "a warp adds to 32 banks");
  uint32_t bins_of_thread = shared_address(shared.bins) + warp % kParts * 128 + turn;
  const bool counts = warp % kParts == 0 && lane < kTile;  // of the threads with the same token one adds up its weights
  keep(thread);
  keep(lane);
  keep(turn);
  keep(byte_turn);
  keep(bins_of_thread);
  // Its token and slots in the first round, where the token's scores lie, and the other CTAs' barriers, a thread each.
  const int tile = kWhole ? warp % kWholeTiles : warp / kParts;
  int first_step = kWhole ? warp / kWholeTiles : 0;
  keep(first_step);
  const auto own_step = [&](int step, int j) { return step + (kWhole ? first_step : j); };
  const int of_octet = lane % kCodeTile;  // a thread's tokens are the same of all octets: tile_bytes apart in either order of codes
  int first_offset =
      kWhole || warp < units ? (tile * plan.owners + owner) * (kTile / kCodeTile) + lane % kTile / kCodeTile : kNoOctet;
  int first_slot = way * plan.slots_per_cta + warp % kParts * kPartSlots + (kSlots < 4 ? 0 : half * kSlots);
  uint32_t scores_of_thread = shared_address(shared.scores) + (tile * kTile + lane % kTile) * Lanes * 4;
  uint32_t empty_of_other = remote(shared.empty, thread < plan.cluster ? thread : 0);
  uint32_t full = shared.full;
  keep(full);
  keep(first_offset);
  keep(first_slot);
  keep(scores_of_thread);
  keep(empty_of_other);
  uint32_t chunk_index = 0, item = 0;

  for (int i = thread; i < plan.bins(); i += kValueThreads) shared.bins[i] = 0;
  sync_warps<kValueThreads>(2);

  // Of the item: where the thread's codes of octet 0 lie (of pages the tensor's; bytes: those of the tensor's row 0), its steps (a
  // round of a chunk each, kTogether of them at a time), the octets of the thread's first token and of its last one, less than 0
  // if it has none.
  const int8_t* codes_at = nullptr;
  int last_octet = 0, first_row = 0, row = 0, run = 0, steps = 0, first_octet = 0, entries = 0;
  constexpr int kChunkOctets = kChunk / kCodeTile;
  // The octet of the thread's token in a step; past all others if none.
  const auto octet_of = [&](int step) {
    if (round_bits == 0) return first_octet + step * kChunkOctets;
    const int round = step & ((1 << round_bits) - 1), octet = first_octet + (step >> round_bits) * kChunkOctets;
    return round * kValueWarps + warp < units ? octet + round * round_stride : kNoOctet;
  };
  uint32_t coming[kTurns][kWords];
  int page[kTurns];  // of what is fetched next
  const Pages pages = kept_pages<kPaged>(call);
  const auto octet_in_row = [&](int step) { return max(min(octet_of(step), last_octet), 0); };  // past it: one of its last tokens
  const auto look_up = [&](int step) {
    if constexpr (kPaged) {
#pragma unroll
      for (int j = 0; j < kTurns; ++j) {
        if (own_step(step, j) >= steps) break;
        page[j] = pages.page(entries, octet_in_row(own_step(step, j)));
      }
    }
  };
  const auto fetch = [&](int step) {
#pragma unroll
    for (int j = 0; j < kTurns; ++j) {
      if (own_step(step, j) >= steps) break;
      const int octet = octet_in_row(own_step(step, j));
      if constexpr (kFast) {
        const int shift = kPaged ? pages.shift(page[j], octet) : 0;
        const int8_t* codes =
            codes_at + static_cast<uint64_t>(static_cast<uint32_t>(octet + shift)) * static_cast<uint32_t>(tile_bytes);
        if (kWords == 2 && wide) {
          const uint2 both = __ldg(reinterpret_cast<const uint2*>(codes));
          coming[j][0] = both.x;
          coming[j][kWords - 1] = both.y;
          continue;
        }
#pragma unroll
        for (int w = 0; w < kWords; ++w)
          coming[j][w] = first_slot + 4 * w < plan.slots ? __ldg(reinterpret_cast<const uint32_t*>(codes) + w) : 0;
      } else {
        const int of_row = first_row + octet * kCodeTile + (last_octet < 0 ? 0 : of_octet);
        const CodePlaces places{0, tile_bytes, run};
        load_codes<kWords, false>(coming[j], codes_at + places.at(row_of(call, row, of_row)), first_slot, plan.slots);
      }
    }
  };
  const auto begin = [&](const Cursor& item) {
    const int kv_head = item.vhead / plan.parts;
    const Range range = coded_range(layer, call, item.row);
    const CodePlaces places = code_places(layer, layer.values, kv_head);
    first_row = range.first - layer.sinks;
    row = item.row;
    run = places.run;
    entries = kPaged ? item.row * call.table_stride : 0;
    const int64_t tensor_row = (kPaged ? 0 : item.row * call.capacity + first_row) + min(of_octet, range.count - 1);
    codes_at = call.value_codes + (kFast ? places.at(tensor_row) + first_slot : places.first);
    last_octet = (range.count - 1 - of_octet + kCodeTile) / kCodeTile - 1;
    steps = (item.stop - item.first) << round_bits;
    first_octet = item.first * kChunkOctets + first_offset;
    keep(codes_at);
    keep(last_octet);
    keep(steps);
    keep(first_octet);
    look_up(0);
    fetch(0);
    look_up(kTogether);
  };

  if (!cursor.done()) begin(cursor);
  volatile Parked parked;
  for (; !cursor.done(); ++item) {
    park(parked, cursor);

    // Reference exponents of the item and of the window; of the thread's tokens the sums of weights under each.
    float reference[Lanes];
    volatile float item_reference[Lanes], item_sum[Lanes];  // in local memory: registers are short
    uint32_t window_sum[Lanes];
    int window_tokens = 0;
    bool flushed = false;
#pragma unroll
    for (int h = 0; h < Lanes; ++h) {
      item_reference[h] = kNone;
      reference[h] = kNone;
      item_sum[h] = 0;
      window_sum[h] = 0;
    }
    float* const scratch = memory.scratch + (2 * cta + (item & 1)) * plan.bins();

    // Adds the window's bins to the item's in global memory. All value threads call it together.
    const auto flush = [&]() {
      float kept[Lanes], added[Lanes];
#pragma unroll
      for (int h = 0; h < Lanes; ++h) {
        const float before = item_reference[h], most = fmaxf(before, reference[h]);
        kept[h] = before == kNone ? 0.0f : exp2_fast(before - most);
        added[h] = reference[h] == kNone ? 0.0f : exp2_fast(reference[h] - most - kFixedBits);
        item_sum[h] = item_sum[h] * kept[h] + static_cast<float>(window_sum[h]) * added[h];
        item_reference[h] = most;
        window_sum[h] = 0;
      }
      sync_warps<kValueThreads>(2);
      const bool upper = Lanes == 8 && thread % 2 == 1;  // of a thread's four bins the heads: always the same
      float4 keep4, add4;
      if constexpr (Lanes == 1) {
        keep4 = make_float4(kept[0], kept[0], kept[0], kept[0]);
        add4 = make_float4(added[0], added[0], added[0], added[0]);
      } else {
        keep4 = make_float4(kept[0], kept[1], kept[2], kept[3]);
        add4 = make_float4(added[0], added[1], added[2], added[3]);
        if (upper) {
          keep4 = make_float4(kept[Lanes - 4], kept[Lanes - 3], kept[Lanes - 2], kept[Lanes - 1]);
          add4 = make_float4(added[Lanes - 4], added[Lanes - 3], added[Lanes - 2], added[Lanes - 1]);
        }
      }
      constexpr int kVectors = kCodewords * Stride / 4;
      uint4* const bins = reinterpret_cast<uint4*>(shared.bins) + thread;
      float4* const totals = reinterpret_cast<float4*>(scratch) + thread;
      constexpr int kMoves = kVectors / kValueThreads, kAtOnce = kMoves < 8 ? kMoves : 8;
#pragma unroll
      for (int first = 0; first < kMoves; first += kAtOnce) {
        float4 total[kAtOnce];
#pragma unroll
        for (int j = 0; j < kAtOnce; ++j) total[j] = make_float4(0, 0, 0, 0);
        if (flushed)
#pragma unroll
          for (int j = 0; j < kAtOnce; ++j) total[j] = __ldcg(totals + (first + j) * kValueThreads);
#pragma unroll
        for (int j = 0; j < kAtOnce; ++j) {
          const int i = first + j;
          const uint4 u = bins[i * kValueThreads];
          bins[i * kValueThreads] = make_uint4(0, 0, 0, 0);
          total[j].x = total[j].x * keep4.x + static_cast<float>(u.x) * add4.x;
          total[j].y = total[j].y * keep4.y + static_cast<float>(u.y) * add4.y;
          total[j].z = total[j].z * keep4.z + static_cast<float>(u.z) * add4.z;
          total[j].w = total[j].w * keep4.w + static_cast<float>(u.w) * add4.w;
          __stcg(totals + i * kValueThreads, total[j]);
        }
      }
      sync_warps<kValueThreads>(2);
      flushed = true;
      window_tokens = 0;
    };

#pragma unroll 1
    for (int step = 0; step < steps; step += kTogether) {
      uint32_t codes[kTurns][kWords];
#pragma unroll
      for (int j = 0; j < kTurns; ++j)
#pragma unroll
        for (int w = 0; w < kWords; ++w) codes[j][w] = coming[j][w];
      fetch(step + kTogether);
      look_up(step + 2 * kTogether);

      float score[kTurns][Lanes];
#pragma unroll
      for (int j = 0; j < kTurns; ++j) {
        const uint32_t index = chunk_index + (own_step(step, j) >> round_bits);
        if (own_step(step, j) < steps)
          barrier_wait(full + 8 * (index & last_buffer), (index & (last_buffer + 1)) != 0);
      }
#pragma unroll
      for (int j = 0; j < kTurns; ++j) {
        const uint32_t index = chunk_index + (own_step(step, j) >> round_bits);
        uint32_t from = scores_of_thread + (index & last_buffer) * buffer_bytes;
        if (round_bits > 0) from += (own_step(step, j) & ((1 << round_bits) - 1)) * (kValueWarps / kParts * kTile * Lanes * 4);
#pragma unroll
        for (int h = 0; h < Lanes; ++h) score[j][h] = 0;
        if (own_step(step, j) >= steps) break;  // what lies there is not of this item
        if (!Plain && octet_of(own_step(step, j)) >= kNoOctet) continue;  // nor of this warp
        if constexpr (Plain) {  // all on their way at once
          float parts[kPlainCluster][Lanes];
#pragma unroll
          for (int other = 0; other < kPlainCluster; ++other) load_scores<Lanes>(parts[other], from + other * part_bytes);
#pragma unroll
          for (int h = 0; h < Lanes; ++h) score[j][h] = (parts[0][h] + parts[1][h]) + (parts[2][h] + parts[3][h]);
        } else {
#pragma unroll 4
          for (int other = 0; other < cluster_size; ++other) {
            float part[Lanes];
            load_scores<Lanes>(part, from + other * part_bytes);
#pragma unroll
            for (int h = 0; h < Lanes; ++h) score[j][h] += part[h];
          }
        }
      }
      bool exceeds = window_tokens + kTurns * round_tokens > kWindowTokens || window_tokens == 0;
#pragma unroll
      for (int j = 0; j < kTurns; ++j) {
        const bool valid = own_step(step, j) < steps && octet_of(own_step(step, j)) <= last_octet;
#pragma unroll
        for (int h = 0; h < Lanes; ++h) {
          if (softcap > 0) score[j][h] = soft_capped(score[j][h], softcap);
          if (!valid) score[j][h] = kNone;
          exceeds |= score[j][h] > reference[h] + kHeadroom;
        }
      }
      exceeds = any_value_thread(exceeds);
      // All have read the scores: a chunk's buffer may be filled again after its last round, by all CTAs.
#pragma unroll
      for (int j = 0; j < kTogether; ++j) {
        if (step + j >= steps || ((step + j + 1) & ((1 << round_bits) - 1)) != 0) continue;
        const uint32_t buffer = (chunk_index + ((step + j) >> round_bits)) & last_buffer;
        if (thread == 0) barrier_expect(full + 8 * buffer, full_bytes);
        if (thread < cluster_size) barrier_arrive_remote(empty_of_other + 8 * buffer);
      }
      if (exceeds) {  // a new window, whose reference is the largest here
        if (window_tokens > 0) flush();
#pragma unroll
        for (int h = 0; h < Lanes; ++h) {
          float most = score[0][h];
#pragma unroll
          for (int j = 1; j < kTurns; ++j) most = fmaxf(most, score[j][h]);
          most = warp_max(most);
          if (lane == h) shared.maxima[warp * Lanes + h] = most;
        }
        sync_warps<kValueThreads>(2);
#pragma unroll
        for (int h = 0; h < Lanes; ++h) {
          float most = kNone;
#pragma unroll
          for (int w = 0; w < kValueWarps; ++w) most = fmaxf(most, shared.maxima[w * Lanes + h]);
          reference[h] = most;
        }
        sync_warps<kValueThreads>(2);
      }
      window_tokens += kTurns * round_tokens;

#pragma unroll
      for (int j = 0; j < kTurns; ++j) {
        if (score[j][0] == kNone) continue;  // no token there
        uint32_t weight[Lanes];
#pragma unroll
        for (int h = 0; h < Lanes; ++h) {
          weight[h] = __float2uint_rn(exp2_fast(score[j][h] - reference[h] + kFixedBits));
          window_sum[h] += weight[h];
        }
        // Step b's is head b ^ head_turn, byte a of the codes that of slot a ^ slot_turn.
#pragma unroll
        for (int by = 1; by < Lanes; by *= 2)
#pragma unroll
          for (int h = 0; h < Lanes; ++h)
            if ((h & by) == 0) {
              const uint32_t low = weight[h], high = weight[h + by];
              weight[h] = turn & 4 * by ? high : low;
              weight[h + by] = turn & 4 * by ? low : high;
            }
#pragma unroll
        for (int w = 0; w < kWords; ++w) codes[j][w] = __byte_perm(codes[j][w], 0, byte_turn);
#pragma unroll
        for (int by = 1; by < kWords; by *= 2)
#pragma unroll
          for (int w = 0; w < kWords; ++w)
            if ((w & by) == 0) {
              const uint32_t low = codes[j][w], high = codes[j][w + by];
              codes[j][w] = turn & 16 * Lanes * by ? high : low;
              codes[j][w + by] = turn & 16 * Lanes * by ? low : high;
            }
#pragma unroll
        for (int a = 0; a < kSlots; ++a) {
          const uint32_t row = (codes[j][a / 4] >> (8 * (a % 4)) & 0xff) * (Stride * 4) + bins_of_thread;
#pragma unroll
          for (int b = 0; b < Lanes; ++b) add_shared(row ^ (a * Lanes + b) * 4, weight[b]);
        }
      }
    }
    chunk_index += steps >> round_bits;
    flush();

    // The sum of weights over the threads, and the references, for the other owners.
#pragma unroll
    for (int h = 0; h < Lanes; ++h) {
      float sum = counts ? item_sum[h] : 0.0f;
      for (int o = 16; o > 0; o /= 2) sum += __shfl_xor_sync(~0u, sum, o);
      if (lane == h) shared.maxima[warp * Lanes + h] = sum;
    }
    sync_warps<kValueThreads>(2);
    // Items take turns with two barriers: a CTA that is done with the next item may signal before another has seen this one's end.
    const uint32_t states = shared.states + (item & 1) * plan.cluster * Lanes * 8, done = shared.done + (item & 1) * 8;
    if (thread < plan.cluster * Lanes) {
      const int head = thread % Lanes, other = thread / Lanes;
      float total = 0, most = kNone;
#pragma unroll
      for (int w = 0; w < kValueWarps; ++w) total += shared.maxima[w * Lanes + head];
#pragma unroll
      for (int h = 0; h < Lanes; ++h)
        if (h == head) most = item_reference[h];
      store_remote(remote(states + (rank * Lanes + head) * 8, other), most, total, remote(done, other));
    }
    if (thread < plan.cluster) barrier_release_remote(remote(done, thread));
    const Cursor ended = unpark(parked);
    if (rank == 0 && thread == 0) {
      int2* const owners = memory.owners + static_cast<int64_t>(ended.vhead) * call.batch + ended.row;
      if (ended.first == 0) owners->x = cluster;
      if (ended.stop * kChunkOctets > last_octet) owners->y = cluster;  // of octets' first tokens, as the thread's are
    }
    cursor = ended;
    cursor.next(layer, call);
    if (!cursor.done()) begin(cursor);  // its codes come while the others end
    barrier_acquire(done, item >> 1 & 1);
    if (thread == 0) barrier_expect(done, plan.cluster * Lanes * 8);

    // Each owner adds an equal share of its way's bins.
    const int64_t partial = static_cast<int64_t>(ended.vhead) * call.batch + ended.row + cluster;
    const int64_t first_cta = static_cast<int64_t>(cluster) * plan.cluster + way * plan.owners;
    const int vectors = plan.bins() / 4, share = (vectors + plan.owners - 1) / plan.owners;
    if (thread < plan.owners * Lanes) {
      const int head = thread % Lanes;
      const auto state_of = [&](int k) { return load_state(states + ((way * plan.owners + k) * Lanes + head) * 8); };
      float most = kNone, total = 0;
#pragma unroll 4
      for (int k = 0; k < plan.owners; ++k) most = fmaxf(most, state_of(k).x);
      const float own = state_of(thread / Lanes).x;
      shared.factors[thread] = own == kNone ? 0.0f : exp2_fast(own - most);
      if (rank == 0 && thread < Lanes) {
#pragma unroll 4
        for (int k = 0; k < plan.owners; ++k) {
          const float2 state = state_of(k);
          if (state.x != kNone) total += state.y * exp2_fast(state.x - most);
        }
        memory.state[partial * Lanes + thread] = make_float2(most, total);
      }
    }
    sync_warps<kValueThreads>(2);
    float4* const out = reinterpret_cast<float4*>(memory.bins + (partial * plan.ways + way) * plan.bins());
    const int first_head = Lanes == 8 ? 4 : 0;  // of odd vectors
#pragma unroll(Plain ? 4 : 1)
    for (int i = owner * share + thread; i < min(vectors, (owner + 1) * share); i += kValueThreads) {
      const BinPlace place = bin_place<Lanes, Stride>(i);
      float4 total = make_float4(0, 0, 0, 0);
#pragma unroll 4
      for (int k = 0; k < owners; ++k) {
        const int64_t other = 2 * (first_cta + k) + (item & 1);
        const float4 v = __ldcg(reinterpret_cast<const float4*>(memory.scratch + other * plan.bins()) + place.shared);
        float4 factor;
        if constexpr (Lanes == 1) factor.x = factor.y = factor.z = factor.w = shared.factors[k];
        else factor = *reinterpret_cast<const float4*>(shared.factors + k * Lanes + (i % 2 ? first_head : 0));
        total.x += v.x * factor.x;
        total.y += v.y * factor.y;
        total.z += v.z * factor.z;
        total.w += v.w * factor.w;
      }
      out[place.left] = total;
    }
  }
}

#endif

}  // namespace gsrq::cuda::decoding
