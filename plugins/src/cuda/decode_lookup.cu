// Decode over keys coded in the rotated frame. A block serves one KV head of one row at a time. Its query times every codeword
// lies in shared memory as a table, so a token's score is a sum of one table row a key slot, plus the center's score;
// the softmax weight is added, as an integer, to one bin a (value slot, head), and the bins of all blocks are multiplied with
// the value codebook at the end (decode_combine.cu). Neither keys nor values are decoded.
#include <algorithm>
#include <utility>

#include "decode_combine.cuh"
#include "decode_lookup.cuh"
#include "launch.cuh"
#include "mma.cuh"

namespace gsrq::cuda {
namespace decoding {

bool make_lookup_plan(const gsrq_layer& layer, int most_shared, LookupPlan* out) {
  const int d = layer.head_dim;
  if (layer.key_center == nullptr || d < 16 || d > 512) return false;
  LookupPlan p{};
  p.key_width = std::min(layer.keys.width, d);
  DecodePlan& b = p.head;
  b.head_dim = d;
  b.width = std::min(layer.values.width, d);
  if (p.key_width % 16 != 0 || b.width % 8 != 0) return false;
  if ((reinterpret_cast<uintptr_t>(layer.keys.codewords) | reinterpret_cast<uintptr_t>(layer.values.codewords)) % 16 != 0)
    return false;  // codewords are read 16 bytes at once
  p.key_slots = layer.keys.stages * (d / p.key_width);
  p.key_parts = (p.key_slots + kPartSlots - 1) / kPartSlots;
  p.key_inverse = 65535u / p.key_parts + 1;
  b.slots = layer.values.stages * (d / b.width);
  p.value_parts = (b.slots + kPartSlots - 1) / kPartSlots;
  p.value_inverse = 65535u / p.value_parts + 1;
  if (p.key_parts > kMostParts || p.value_parts > kMostParts) return false;
  b.lanes = kLookupLanes;
  b.group = layer.heads / layer.kv_heads;
  b.parts = (b.group + kLookupLanes - 1) / kLookupLanes;
  b.part_heads = (b.group + b.parts - 1) / b.parts;
  b.ways = p.value_parts;
  b.slots_per_cta = kPartSlots;
  b.stride = kPartWords;
  const int parts = p.key_parts + p.value_parts;
  for (p.threads = kManyThreads; p.threads >= kFewThreads; p.threads /= 2) {
    p.shared_bytes = parts * (kPartBytes + 2 * p.threads * kPartSlots);
    *out = p;
    if (p.shared_bytes + kFixedShared <= most_shared) return true;
  }
  return false;
}

namespace {

__device__ inline void copy_word(void* to, const void* from) {
  const uint32_t at = static_cast<uint32_t>(__cvta_generic_to_shared(to));
  asm volatile("cp.async.ca.shared.global [%0], [%1], 4;" ::"r"(at), "l"(from) : "memory");
}

__device__ inline void copy_words(void* to, const void* from) {
  const uint32_t at = static_cast<uint32_t>(__cvta_generic_to_shared(to));
  asm volatile("cp.async.ca.shared.global [%0], [%1], 8;" ::"r"(at), "l"(from) : "memory");
}

__device__ inline float4 load_shared(uint32_t at) {
  float4 v;
  asm volatile("ld.shared.v4.f32 {%0, %1, %2, %3}, [%4];" : "=f"(v.x), "=f"(v.y), "=f"(v.z), "=f"(v.w) : "r"(at));
  return v;
}

__device__ inline void add_shared(uint32_t at, uint32_t x) { asm volatile("red.shared.add.u32 [%0], %1;" ::"r"(at), "r"(x)); }

// Codes of one side of an item's tokens, where the head's slots begin.
struct Codes {
  const int8_t* base;  // of row 0 of the tensor or, linear, of the tile that has the item's first token
  uint32_t tile, run;  // CodePlaces'
  int skipped;         // linear: rows of that tile before the token
  int slots, parts;
  int alignment;       // 8, 4, or 1 where bytes must be taken one by one
  // Of the item's token i, in a linear cache; else of the tensor's row i.
  __device__ const int8_t* at(int64_t i) const {
    const int64_t row = skipped + i;
    return base + row / kCodeTile * tile + row % kCodeTile * run;
  }
  // Of token i after the first of an octet, one of the item's in a linear cache, else of the tensor's.
  __device__ const int8_t* of_octet(uint32_t octet, int i) const {
    const uint32_t row = skipped + i;
    return base + static_cast<uint64_t>(octet + row / kCodeTile) * tile + row % kCodeTile * run;
  }
};

__device__ inline Codes codes_of(const gsrq_layer& layer, const gsrq_call& call, const gsrq_codebook& book, const int8_t* codes,
                                 int kv_head, int slots, int parts, int64_t first_row) {
  const CodePlaces places = code_places(layer, book, kv_head);
  Codes c;
  c.tile = static_cast<uint32_t>(places.tile);
  c.run = static_cast<uint32_t>(places.run);
  c.slots = slots;
  c.parts = parts;
  const bool linear = call.block_table == nullptr;
  c.skipped = linear ? static_cast<int>(first_row % kCodeTile) : 0;
  c.base = codes + places.first + (linear ? first_row / kCodeTile * c.tile : 0);
  const int64_t all = places.first | c.run | slots;
  c.alignment = all % 8 == 0 ? 8 : all % 4 == 0 ? 4 : 1;
  return c;
}

// Starts copying the codes of a warp's tokens, which lie together, to staged[part][thread] in pieces of 8 bytes. Lanes
// stand token by token, so that what they read together lies together. Unrolled: addresses wait for no copy.
template <int Threads>
__device__ inline void fetch_pieces(const Codes& codes, uint32_t octet, int parts, uint32_t inverse, int tokens, int lane,
                                    uint32_t staged) {
  const int all = min(tokens, 32) * parts;
#pragma unroll
  for (int i = 0; i < kMostParts; ++i) {
    if (i >= parts) break;
    const uint32_t piece = lane + 32 * i, token = piece * inverse >> 16, part = piece - token * parts;
    if (piece < all)
      asm volatile(
          "cp.async.ca.shared.global [%0], [%1], 8;" ::"r"(staged + (part * Threads + token) * kPartSlots),
          "l"(codes.of_octet(octet, token) + part * kPartSlots)
          : "memory");
  }
}

// The same for any cache. row_of(i): the codes of the warp's token i.
template <int Threads, class RowOf>
__device__ inline void fetch_any(const Codes& codes, int tokens, int lane, uint2* staged, const RowOf& row_of) {
  if (codes.alignment > 1) {
    const int bytes = codes.alignment, pieces = codes.slots / bytes;
#pragma unroll 1
    for (int i = lane; i < min(tokens, 32) * pieces; i += 32) {
      const int token = i / pieces, at = (i - token * pieces) * bytes;
      char* const to = reinterpret_cast<char*>(staged + at / kPartSlots * Threads + token) + at % kPartSlots;
      if (bytes == 8) copy_words(to, row_of(token) + at);
      else copy_word(to, row_of(token) + at);
    }
  } else if (lane < tokens) {
    const int8_t* from = row_of(lane);
#pragma unroll 1
    for (int p = 0; p < codes.parts; ++p) {
      uint32_t words[2] = {0, 0};
#pragma unroll
      for (int j = 0; j < kPartSlots; ++j)
        if (p * kPartSlots + j < codes.slots)
          words[j / 4] |= static_cast<uint32_t>(static_cast<uint8_t>(from[p * kPartSlots + j])) << (8 * (j % 4));
      staged[p * Threads + lane] = make_uint2(words[0], words[1]);
    }
  }
}

// x, of which the compiler knows nothing: sums with it are not kept in registers from round to round.
__device__ inline uint32_t opaque(uint32_t x) {
  asm volatile("" : "+r"(x));
  return x;
}

// The eight codes of a part in the order slot 0 ^ turn, 1 ^ turn, ...; selector: byte_perm's for the first four.
__device__ inline uint2 turned(uint2 codes, uint32_t selector) {
  return make_uint2(__byte_perm(codes.x, codes.y, selector), __byte_perm(codes.x, codes.y, selector ^ 0x4444));
}

template <class Fn, int... A>
__device__ inline void each_slot(uint2 codes, const Fn& fn, std::integer_sequence<int, A...>) {
  (fn(__byte_perm(A < 4 ? codes.x : codes.y, 0, 0x4440 + A % 4) * (kPartWords * 4), A), ...);
}

// fn(bytes of the code's table row, a) for each code of turned ones.
template <class Fn>
__device__ inline void each_slot(uint2 codes, const Fn& fn) {
  each_slot(codes, fn, std::make_integer_sequence<int, kPartSlots>());
}

// The i-th bin of a flush: where it lies in shared memory, [part][code][slot], and in memory, [part][slot][code], so that what is
// read for one slot lies together. A warp has four codes of eight slots: it writes whole sectors and asks few banks twice.
struct BinPlace {
  int shared, memory;
};

__device__ inline BinPlace bin_place(int i) {
  constexpr int kPart = kCodewords * kPartSlots;
  const int slot = i / 8 % 2 * 4 + i % 8 / 2, code = i % kPart / 32 * 4 + i / 16 % 2 * 2 + i % 2, part = i / kPart * kPart;
  return {part + code * kPartSlots + slot, part + slot * kCodewords + code};
}

__device__ __noinline__ float4 capped(float4 x, float cap) {
  const auto one = [&](float v) { return cap * kLog2e * tanhf(v / cap); };
  return make_float4(one(x.x), one(x.y), one(x.z), one(x.w));
}

// What an item is and has gathered, in shared memory: registers are scarce, and one warp that finds it out takes less time than
// all of them.
struct ItemState {
  Cursor cursor;  // at the item
  int first_row;  // of its tokens, in the row's codes
  int count;      // of its tokens; 0: there is no item
  bool ends;      // it has the row's last coded token
  Codes keys, values;
  const void* center;
  int64_t partial;  // of all items' in the line's order
  float4 unit, rest;  // of the center's scores where they are fixed
  float4 now;  // reference (log2) of the window
  float maxima[kManyThreads / 32][kLookupLanes];  // of the warps' scores in a round
  float reference[kLookupLanes], sum[kLookupLanes];  // of the windows that were flushed
  uint32_t window[kLookupLanes];                     // sum of the window's weights
};

constexpr int kTurnRounds = 16;  // rounds for which a warp looks up pages at once

// Words: codes lie in pieces of 8 bytes. Whole: and a token has 16 key and 8 value slots, which a thread copies for itself.
template <Reading How, int Threads, bool Whole>
__global__ void __launch_bounds__(Threads, 1)
    lookup_kernel(const __grid_constant__ gsrq_layer layer, const __grid_constant__ gsrq_call call,
                  const __grid_constant__ LookupPlan plan, LookupMemory memory, int vheads, int even) {
  constexpr bool kPaged = How == Reading::words_of_pages;
  __shared__ ItemState state;
  let_next_begin();
  const int thread = threadIdx.x, warp = threadIdx.x / 32u, lane = threadIdx.x % 32u;
  const bool fixed = Whole || memory.fixed;
  const int key_parts = Whole ? 2 : plan.key_parts, value_parts = Whole ? 1 : plan.value_parts;
  char* const tables = shared_memory;                  // [key parts][256][8 slots][4 heads] float
  char* const bins = tables + key_parts * kPartBytes;  // [value parts][256][8 slots][4 heads] uint32
  // [2][parts][threads]; whole: [2], each [threads][2] of keys and [threads] of values
  uint2* const staged = reinterpret_cast<uint2*>(bins + value_parts * kPartBytes);
  const int stage = (key_parts + value_parts) * Threads;
  // The eight lanes that read 16 bytes together differ in the slot; all that add together in slot or head.
  const uint32_t key_turn = threadIdx.x % kPartSlots, value_turn = threadIdx.x % 32u / kLookupLanes;
  const uint32_t head_turn = threadIdx.x % kLookupLanes;
  const auto selector = [](int turn) { return (0x3210u ^ 0x1111u * (turn & 3)) ^ (turn & 4 ? 0x4444u : 0); };
  const uint32_t table_at = static_cast<uint32_t>(__cvta_generic_to_shared(tables)) + key_turn * 16;
  const uint32_t bins_at = static_cast<uint32_t>(__cvta_generic_to_shared(bins)) + value_turn * 16 + head_turn * 4;
  const uint32_t staged_at = static_cast<uint32_t>(__cvta_generic_to_shared(staged));

  // A flush zeroes bins again. (Codes past the last slot may be any.)
  for (int i = thread; i < value_parts * kPartBytes / 16; i += Threads)
    reinterpret_cast<uint4*>(bins)[i] = make_uint4(0, 0, 0, 0);
  const auto describe = [&](const Cursor& cursor) {
    state.cursor = cursor;
    state.count = 0;
    if (!cursor.done()) {
      const int kv_head = cursor.vhead / plan.head.parts, row = cursor.row;
      const int64_t item = static_cast<int64_t>(row) * vheads + cursor.vhead;
      const Range range = coded_range(layer, call, row);
      const int begin = cursor.first * kChunk, end = min(cursor.stop * kChunk, range.count);
      state.first_row = range.first - layer.sinks + begin;
      state.count = end - begin;
      state.ends = end == range.count;
      const int64_t linear_row = row * call.capacity + state.first_row;
      state.keys = codes_of(layer, call, layer.keys, call.key_codes, kv_head, plan.key_slots, key_parts, linear_row);
      state.values =
          codes_of(layer, call, layer.values, call.value_codes, kv_head, plan.head.slots, value_parts, linear_row);
      state.center = static_cast<const char*>(memory.center) +
                     (item * memory.padded + begin) * static_cast<int64_t>(fixed ? sizeof(uint2) : sizeof(float4));
      state.partial = static_cast<int64_t>(cursor.vhead) * call.batch + row + blockIdx.x;
    }
  };
  if (warp == 0) {
    const Line line = line_of(layer, call, vheads, gridDim.x, even, 0);
    Cursor cursor{};
    cursor.start(layer, call, line, blockIdx.x);
    if (lane == 0) describe(cursor);
  }
  while (true) {
    if (thread < kLookupLanes) {
      state.reference[thread] = kNone;
      state.sum[thread] = 0;
      state.window[thread] = 0;
    }
    __syncthreads();
    const int count = state.count, rounds = (count + Threads - 1) / Threads;
    if (count == 0) break;
    const int64_t item = static_cast<int64_t>(state.cursor.row) * vheads + state.cursor.vhead;
    // Of pages the octet of the tensor with which the warp's tokens of a round begin: a lane has that of so many rounds on.
    uint32_t octets = 0;
    const auto find_pages = [&](int round) {
      if constexpr (kPaged) {
        const Pages pages = pages_of(call);
        const int token = min((round + lane) * Threads + warp * 32, count - 1), octet = (state.first_row + token) / kCodeTile;
        octets = octet + pages.shift(pages.page(state.cursor.row * call.table_stride, octet), octet);
      }
    };
    const auto fetch = [&](const Codes& codes, int parts, uint32_t inverse, int round, int first_part, int ahead) {
      const int first = round * Threads + warp * 32, tokens = count - first;
      const uint32_t octet = kPaged ? __shfl_sync(~0u, octets, ahead) : static_cast<uint32_t>(first) / kCodeTile;
      if (Whole) {
        const int8_t* const from = codes.of_octet(octet, lane);
        uint2* const to = staged + (round & 1) * stage;
        if (lane < tokens) {
          if (first_part == 0) copy_async(to + 2 * thread, from, true);
          else copy_words(to + 2 * Threads + thread, from);
        }
        return;
      }
      if (tokens <= 0) return;
      const int to = (round & 1) * stage + first_part * Threads + warp * 32;
      if (How != Reading::bytes) {
        fetch_pieces<Threads>(codes, octet, parts, inverse, tokens, lane, staged_at + to * kPartSlots);
      } else if (call.block_table == nullptr)
        fetch_any<Threads>(codes, tokens, lane, staged + to, [&](int i) { return codes.of_octet(octet, i); });
      else
        fetch_any<Threads>(codes, tokens, lane, staged + to, [&](int i) {
          return codes.at(code_row(call, state.cursor.row, state.first_row + first + i));
        });
    };
    // ahead: rounds after the one for which pages were looked up.
    const auto fetch_keys = [&](int round, int ahead) { fetch(state.keys, key_parts, plan.key_inverse, round, 0, ahead); };
    const auto fetch_values = [&](int round, int ahead) {
      fetch(state.values, value_parts, plan.value_inverse, round, key_parts, ahead);
    };
    find_pages(0);
    fetch_keys(0, 0);  // codes are older than the launch before
    commit_async();
    wait_for_previous();
    {
      const char* const from = reinterpret_cast<const char*>(memory.tables) + item * key_parts * kPartBytes;
      const uint32_t to = static_cast<uint32_t>(__cvta_generic_to_shared(tables));
#pragma unroll 1
      for (int i = thread; i < key_parts * kPartBytes / 16; i += Threads) {
        asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(to + i * 16),
                     "l"(from + i * 16)
                     : "memory");
      }
    }
    commit_async();
    fetch_keys(1, 1);
    fetch_values(0, 0);
    commit_async();
    if (thread == 0) {
      state.unit = __ldg(reinterpret_cast<const float4*>(memory.unit) + item);
      state.rest = __ldg(reinterpret_cast<const float4*>(memory.rest) + item);
    }
    const auto load_center = [&](int token) {
      if (token >= count) return make_float4(0, 0, 0, 0);
      if (!fixed) return __ldg(static_cast<const float4*>(state.center) + token);
      const uint2 both = __ldg(static_cast<const uint2*>(state.center) + token);
      return make_float4(__uint_as_float(both.x), __uint_as_float(both.y), 0, 0);
    };
    const float4 first_center = load_center(thread);
    wait_async<1>();
    __syncthreads();
    const bool last = state.cursor.chunk + state.cursor.stop - state.cursor.first >= state.cursor.end;
    if (!last && state.cursor.row + 1 < call.batch) {
      const char* const from = reinterpret_cast<const char*>(memory.tables) + (item + vheads) * key_parts * kPartBytes;
      for (int i = thread * 128; i < key_parts * kPartBytes; i += Threads * 128) prefetch(from + i);  // the next item's
    } else if (last) {  // what the next launch reads
      const char* const words = static_cast<const char*>(layer.values.codewords);
      const int64_t bytes = static_cast<int64_t>(layer.kv_heads) * layer.head_dim * layer.values.stages * kCodewords * 2;
      const int64_t step = static_cast<int64_t>(Threads) * gridDim.x * 128;
      for (int64_t at = (static_cast<int64_t>(thread) * gridDim.x + blockIdx.x) * 128; at < bytes; at += step)
        prefetch(words + at);
    }
    float score[kLookupLanes] = {};
    const auto look_up = [&](int round, float4 sum) {
      const uint2* const codes = staged + (round & 1) * stage + thread;
      uint4 both = make_uint4(0, 0, 0, 0);
      if (Whole) both = *reinterpret_cast<const uint4*>(codes + thread);
      if (fixed) {
        const float4 unit = state.unit, rest = state.rest;
        const uint32_t low = __float_as_uint(sum.x), high = __float_as_uint(sum.y);
        const auto one = [](uint32_t word, uint32_t halves, float by, float beside) {  // above 2^23 + 2^15
          return fmaf(__uint_as_float(__byte_perm(word, 0x4B000000, halves)) - kCenterZero, by, beside);
        };
        sum = make_float4(one(low, 0x7610, unit.x, rest.x), one(low, 0x7632, unit.y, rest.y),
                          one(high, 0x7610, unit.z, rest.z), one(high, 0x7632, unit.w, rest.w));
      }
#pragma unroll
      for (int p = 0; p < kMostParts; ++p) {
        if (p >= key_parts) break;
        const uint32_t at = opaque(table_at);
        const uint2 own = !Whole ? codes[p * Threads] : p == 0 ? make_uint2(both.x, both.y) : make_uint2(both.z, both.w);
        each_slot(turned(own, selector(key_turn)), [&](uint32_t code, int a) {
          const float4 v = load_shared((at ^ (a * 16)) + code + p * kPartBytes);
          sum.x += v.x;
          sum.y += v.y;
          sum.z += v.z;
          sum.w += v.w;
        });
      }
      if (layer.softcap > 0) sum = capped(sum, layer.softcap);
      const bool real = round * Threads + thread < count;
      score[0] = real ? sum.x : kNone;
      score[1] = real ? sum.y : kNone;
      score[2] = real ? sum.z : kNone;
      score[3] = real ? sum.w : kNone;
    };

    constexpr uint32_t kMostOfWarp = ~0u / (Threads / 32);  // then no bin overflows
    uint32_t window_sum[kLookupLanes] = {};  // of the warp's tokens
    bool flushed = false;
    // Adds the window's bins, as floats, to those of the item's earlier windows, and zeroes them. All threads call it
    // together, their adds done. Ends with them in step.
    const auto flush = [&] {
      float4* const totals = reinterpret_cast<float4*>(memory.parts.bins) + state.partial * value_parts * (kPartBytes / 16);
      const float4 window = state.now;
      const float reference[kLookupLanes] = {window.x, window.y, window.z, window.w};
      float kept[kLookupLanes], added[kLookupLanes];
#pragma unroll
      for (int h = 0; h < kLookupLanes; ++h) {
        const float before = state.reference[h], most = fmaxf(before, reference[h]);
        kept[h] = before == kNone ? 0.0f : exp2_fast(before - most);
        added[h] = reference[h] == kNone ? 0.0f : exp2_fast(reference[h] - most - kLookupBits);
        if (lane == h) atomicAdd(&state.window[h], window_sum[h]);
        window_sum[h] = 0;
      }
#pragma unroll 1
      for (int i = thread; i < value_parts * kPartBytes / 16; i += Threads) {
        const BinPlace place = bin_place(i);
        uint4* const bin = reinterpret_cast<uint4*>(bins) + place.shared;
        float4* const sum = totals + place.memory;
        const uint4 u = *bin;
        float4 total = make_float4(0, 0, 0, 0);
        if (flushed) total = __ldcg(sum);
        total.x = total.x * kept[0] + static_cast<float>(u.x) * added[0];
        total.y = total.y * kept[1] + static_cast<float>(u.y) * added[1];
        total.z = total.z * kept[2] + static_cast<float>(u.z) * added[2];
        total.w = total.w * kept[3] + static_cast<float>(u.w) * added[3];
        *bin = make_uint4(0, 0, 0, 0);
        __stcg(sum, total);
      }
      __syncthreads();
#pragma unroll
      for (int h = 0; h < kLookupLanes; ++h)
        if (thread == h) {
          state.sum[h] = state.sum[h] * kept[h] + static_cast<float>(state.window[h]) * added[h];
          state.window[h] = 0;
          state.reference[h] = fmaxf(state.reference[h], reference[h]);
        }
      __syncthreads();
      flushed = true;
    };

    look_up(0, first_center);
    // In step `round` weights of that round are added, then the next one's scores are looked up; codes come for later.
#pragma unroll 1
    for (int round = 0;; ++round) {
      const bool ended = round == rounds;
      const int token = round * Threads + thread;
      uint32_t weight[kLookupLanes], added[kLookupLanes];
      // The thread's weights under a reference, and the warp's sums of them; whether they are more than the window takes.
      const auto weigh = [&](float4 now) {
        const float references[kLookupLanes] = {now.x, now.y, now.z, now.w};
        bool exceeds = false;
#pragma unroll
        for (int h = 0; h < kLookupLanes; ++h) {
          weight[h] = __float2uint_rn(exp2_fast(score[h] - references[h] + kLookupBits));
          added[h] = __reduce_add_sync(~0u, min(weight[h], kLookupLargest));
          exceeds |= weight[h] > kLookupLargest || window_sum[h] + added[h] > kMostOfWarp;
        }
        return exceeds;
      };
      bool exceeds = true;
      if (!ended) {
        __syncwarp();  // all lanes have read what is copied over
        if (kPaged && round > 0 && round % kTurnRounds == 0) find_pages(round);
        fetch_keys(round + 2, round % kTurnRounds + 2);
        fetch_values(round + 1, round % kTurnRounds + 1);
        commit_async();
        wait_async<1>();
        exceeds = weigh(state.now) || round == 0;
      }
      // All earlier adds are done.
      if (__syncthreads_or(exceeds)) {
        if (round > 0) flush();
        if (ended) break;
#pragma unroll
        for (int h = 0; h < kLookupLanes; ++h) {
          const float most = warp_max(score[h]);
          if (lane == h) state.maxima[warp][h] = most;
        }
        __syncthreads();
        const float4 own = lane < Threads / 32 ? *reinterpret_cast<const float4*>(state.maxima[lane])
                                               : make_float4(kNone, kNone, kNone, kNone);
        float4 now = make_float4(warp_max(own.x), warp_max(own.y), warp_max(own.z), warp_max(own.w));
        if (round > 0) {
          const float4 before = state.now;
          now = make_float4(fmaxf(now.x, before.x), fmaxf(now.y, before.y), fmaxf(now.z, before.z), fmaxf(now.w, before.w));
        }
        __syncthreads();  // all have read the last one
        if (thread == 0) state.now = now;
        __syncthreads();  // the next round reads it
        weigh(now);
      }
      const float4 next = load_center(token + Threads);
#pragma unroll
      for (int h = 0; h < kLookupLanes; ++h) window_sum[h] += added[h];
      if (token < count) {
        // Step b's is head b ^ head_turn.
        const uint32_t w01 = head_turn & 1 ? weight[1] : weight[0], w10 = head_turn & 1 ? weight[0] : weight[1];
        const uint32_t w23 = head_turn & 1 ? weight[3] : weight[2], w32 = head_turn & 1 ? weight[2] : weight[3];
        const uint32_t own[kLookupLanes] = {head_turn & 2 ? w23 : w01, head_turn & 2 ? w32 : w10,
                                            head_turn & 2 ? w01 : w23, head_turn & 2 ? w10 : w32};
        const uint2* const codes = staged + (round & 1) * stage + key_parts * Threads + thread;
#pragma unroll
        for (int p = 0; p < kMostParts; ++p) {
          if (p >= value_parts) break;
          each_slot(turned(codes[p * Threads], selector(value_turn)), [&](uint32_t code, int a) {
            const uint32_t at = bins_at + code;  // bins lie at a multiple of 128: the turns change its low bits alone
#pragma unroll
            for (int b = 0; b < kLookupLanes; ++b) add_shared((at ^ (a * 16 | b * 4)) + p * kPartBytes, own[b]);
          });
        }
      }
      __syncwarp();
      if (round + 1 < rounds) look_up(round + 1, next);
    }
    if (thread == 0) {
      int2* const owners = memory.parts.owners + (state.partial - blockIdx.x);
      if (state.cursor.first == 0) owners->x = blockIdx.x;
      if (state.ends) owners->y = blockIdx.x;
    }
    if (thread < kLookupLanes)
      memory.parts.state[state.partial * kLookupLanes + thread] = make_float2(state.reference[thread], state.sum[thread]);
    __syncwarp();  // before the next item's
    if (thread == 0) {
      Cursor cursor = state.cursor;
      cursor.next(layer, call);
      describe(cursor);
    }
  }
  wait_for_previous();  // also where there was nothing to do
}

template <int Threads>
auto lookup_of(Reading how) {
  return how == Reading::words            ? lookup_kernel<Reading::words, Threads, false>
         : how == Reading::words_of_pages ? lookup_kernel<Reading::words_of_pages, Threads, false>
                                          : lookup_kernel<Reading::bytes, Threads, false>;
}

// Blocks that run at once on the current device and the shared memory that one may have.
struct Device {
  int blocks = 0, shared = 0;
};

Device device() {
  Device found;
  int id = 0;
  if (cudaGetDevice(&id) != cudaSuccess ||
      cudaDeviceGetAttribute(&found.blocks, cudaDevAttrMultiProcessorCount, id) != cudaSuccess ||
      cudaDeviceGetAttribute(&found.shared, cudaDevAttrMaxSharedMemoryPerBlockOptin, id) != cudaSuccess) {
    cudaGetLastError();
    return {};
  }
  return found;
}

// Blocks, not many fewer than there are, that share items, or of which some share each, evenly; 0: there is no such number.
// A stretch that ends inside of an item costs both blocks a start and a last round.
int even_blocks(int64_t items, int blocks) {
  for (int k = blocks; k * 16 >= blocks * 15; --k)
    if (items % k == 0 || k % items == 0) return k;
  return 0;
}

LookupMemory take_memory(const gsrq_layer& layer, const gsrq_call& call, const LookupPlan& plan, int blocks,
                         Arena& workspace) {
  const int64_t vheads = static_cast<int64_t>(layer.kv_heads) * plan.head.parts, rows = vheads * call.batch;
  const int64_t d = layer.head_dim;
  LookupMemory m{};
  m.parts.bins = workspace.take<float>((rows + blocks) * plan.value_parts * (kPartBytes / 4));
  m.parts.state = workspace.take<float2>((rows + blocks) * kLookupLanes);
  m.parts.combined = workspace.take<float2>(rows * kLookupLanes);
  m.parts.values =
      workspace.take<float>(rows * (plan.head.slots / layer.values.stages) * value_parts(layer, call, plan.head, vheads) *
                            kLookupLanes * plan.head.width);
  m.parts.exact = workspace.take<float>(rows * exact_splits(layer) * kLookupLanes * d);
  m.parts.exact_state = workspace.take<float2>(rows * exact_splits(layer) * kLookupLanes);
  m.parts.owners = workspace.take<int2>(rows);
  m.high = workspace.take<__half>(rows * kLookupLanes * d);
  m.low = workspace.take<__half>(rows * kLookupLanes * d);
  m.drifts = workspace.take<float2>(rows * drift_count(layer));
  m.tables = workspace.take<float>(rows * plan.key_parts * (kPartBytes / 4));
  m.padded = (gsrq_coded(call.max_total, layer.sinks, layer.window, layer.block) + 63) / 64 * 64;
  m.fixed = center_is_fixed(layer);
  m.center = workspace.take<char>(rows * m.padded * static_cast<int64_t>(m.fixed ? sizeof(uint2) : sizeof(float4)));
  m.unit = workspace.take<float>(rows * kLookupLanes);
  m.rest = workspace.take<float>(rows * kLookupLanes);
  return m;
}

}  // namespace
}  // namespace decoding

using namespace decoding;

int lookup_prepare(const gsrq_layer& layer, Arena& prepared, cudaStream_t stream, bool launch) {
  uint4* const offsets = prepared.take<uint4>(kCenterTiles * kCenterSteps * 32);
  return launch ? fill_offsets(layer, offsets, stream) : 0;
}

bool lookup_supported(const gsrq_layer& layer) {
  LookupPlan plan;
  const Device found = device();
  return found.blocks > 0 && make_lookup_plan(layer, found.shared, &plan);
}

void lookup_workspace(const gsrq_layer& layer, const gsrq_call& call, Arena& workspace) {
  LookupPlan plan;
  const Device found = device();
  if (make_lookup_plan(layer, found.shared, &plan)) take_memory(layer, call, plan, found.blocks, workspace);
}

int lookup(const gsrq_layer& layer, const gsrq_call& call, Arena& prepared, Arena& workspace, cudaStream_t stream) {
  LookupPlan plan;
  const Device found = device();
  if (!make_lookup_plan(layer, found.shared, &plan)) return fail("decoding by lookups does not apply");
  LookupMemory memory = take_memory(layer, call, plan, found.blocks, workspace);
  memory.offsets = prepared.take<uint4>(kCenterTiles * kCenterSteps * 32);
  const int vheads = layer.kv_heads * plan.head.parts;
  const int even = even_blocks(static_cast<int64_t>(vheads) * call.batch, found.blocks);
  if (memory.padded > 0) {
    if (prepare_lookup(layer, call, plan, memory, stream)) return 1;
    const auto in_pieces = [](const gsrq_codebook& book, int slots) {
      return book.stages % 8 == 0 && book.groups * book.stages % 8 == 0 && slots % 8 == 0;
    };
    const bool pieces = in_pieces(layer.keys, plan.key_slots) && in_pieces(layer.values, plan.head.slots);
    const Reading how = reading_of(layer, call, pieces, 32);  // of a warp's tokens
    const bool whole = pieces && memory.fixed && plan.threads == kManyThreads && plan.key_slots == 16 && plan.head.slots == 8;
    const auto kernel = whole && how == Reading::words            ? lookup_kernel<Reading::words, kManyThreads, true>
                        : whole && how == Reading::words_of_pages ? lookup_kernel<Reading::words_of_pages, kManyThreads, true>
                        : plan.threads == kManyThreads            ? lookup_of<kManyThreads>(how)
                        : plan.threads == kFewThreads             ? lookup_of<kFewThreads>(how)
                                                                  : lookup_of<kManyThreads / 2>(how);
    if (cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, plan.shared_bytes) != cudaSuccess)
      return launched("lookup_kernel");
    launch(true, kernel, found.blocks, plan.threads, plan.shared_bytes, stream, layer, call, plan, memory, vheads,
           even);
    if (launched("lookup_kernel")) return 1;
  }
  const Stretches coded{vheads, found.blocks, even, 0, memory.padded > 0, true};
  return combine(layer, call, plan.head, memory.parts, coded, memory.padded == 0, stream);
}

}  // namespace gsrq::cuda
