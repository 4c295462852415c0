// Decode over keys coded in the rotated frame. A block serves one KV head of one row at a time. Its query times every codeword
// lies in shared memory as a table, so a token's score is a sum of one table row a key slot, plus the centre's score;
// the softmax weight is added, as an integer, to one bin a (value slot, head), and the bins are multiplied with the value
// codebook at the end. Neither keys nor values are decoded.
#include <algorithm>

#include "decode_combine.cuh"
#include "decode_exact.cuh"
#include "decode_lookup.cuh"
#include "mma.cuh"

namespace gsrq::cuda {
namespace decoding {

bool make_lookup_plan(const gsrq_layer& layer, int most_shared, LookupPlan* out) {
  const int d = layer.head_dim;
  if (layer.key_centre == nullptr || d < 16) return false;
  LookupPlan p{};
  p.key_width = std::min(layer.keys.width, d);
  DecodePlan& b = p.head;
  b.head_dim = d;
  b.width = std::min(layer.values.width, d);
  if (p.key_width % 16 != 0 || b.width % 8 != 0) return false;
  p.key_slots = layer.keys.stages * (d / p.key_width);
  p.key_parts = (p.key_slots + kPartSlots - 1) / kPartSlots;
  b.slots = layer.values.stages * (d / b.width);
  p.value_parts = (b.slots + kPartSlots - 1) / kPartSlots;
  b.lanes = kLookupLanes;
  b.group = layer.heads / layer.kv_heads;
  b.parts = (b.group + kLookupLanes - 1) / kLookupLanes;
  b.part_heads = (b.group + b.parts - 1) / b.parts;
  p.shared_bytes = (p.key_parts + p.value_parts) * (kPartBytes + 2 * kStagedBytes);
  *out = p;
  return p.shared_bytes + 1024 <= most_shared;
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
  const int8_t* base;        // of a linear cache at the item's first token, else of page 0
  uint32_t row_bytes;
  int slots, words, parts;
  uint32_t inverse;          // 2^16 / pieces of a token, rounded up: exact for the indices of a warp
  int alignment;             // 8, 4, or 1 where bytes must be taken one by one
};

__device__ inline Codes codes_of(const gsrq_call& call, const gsrq_codebook& book, const int8_t* codes, int kv_head,
                                 int head_dim, int slots, int parts, int64_t first_row) {
  Codes c;
  const int64_t first = static_cast<int64_t>(kv_head) * head_dim / book.width * book.stages;
  c.row_bytes = static_cast<uint32_t>(book.groups * book.stages);
  c.slots = slots;
  c.words = slots / 4;
  c.parts = parts;
  c.base = codes + first + (call.block_table == nullptr ? first_row * c.row_bytes : 0);
  const int64_t all = first | c.row_bytes | slots;
  c.alignment = all % 8 == 0 ? 8 : all % 4 == 0 ? 4 : 1;
  c.inverse = 65536u / static_cast<uint32_t>(c.alignment == 8 ? parts : max(c.words, 1)) + 1;
  return c;
}

// Starts copying the codes of a warp's tokens to staged[part][thread]. The lanes that take pieces of one token stand
// together, so that each row is looked up in the cache once. row_of(i): those of the warp's token i.
template <bool Simple, class RowOf>
__device__ inline void fetch_codes(const Codes& codes, int tokens, int lane, uint2* staged, const RowOf& row_of) {
  if (Simple || codes.alignment == 8) {
#pragma unroll 1
    for (int i = lane; i < 32 * codes.parts; i += 32) {
      const int token = static_cast<int>(i * codes.inverse >> 16), part = i - token * codes.parts;
      if (token < tokens) copy_words(staged + part * kLookupThreads + token, row_of(token) + part * kPartSlots);
    }
  } else if (codes.alignment == 4) {
#pragma unroll 1
    for (int i = lane; i < 32 * codes.words; i += 32) {
      const int token = static_cast<int>(i * codes.inverse >> 16), word = i - token * codes.words;
      if (token < tokens)
        copy_word(reinterpret_cast<uint32_t*>(staged + word / 2 * kLookupThreads + token) + word % 2,
                  row_of(token) + word * 4);
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
      staged[p * kLookupThreads + lane] = make_uint2(words[0], words[1]);
    }
  }
}

// The codes of a part in the order slot 0 ^ turn, 1 ^ turn, ...; bytes: 0x3210 ^ 0x1111 (turn % 4).
__device__ inline uint2 turned(uint2 codes, int turn, uint32_t bytes) {
  const uint32_t low = __byte_perm(codes.x, 0, bytes), high = __byte_perm(codes.y, 0, bytes);
  return turn & 4 ? make_uint2(high, low) : make_uint2(low, high);
}

// Code a of a word times 128, the bytes of a table row.
template <int A>
__device__ inline uint32_t row_of_code(uint32_t word) {
  return (A == 0 ? word << 7 : word >> (8 * A - 7)) & 0x7f80;
}

// The bins of an item, divided by their sum, times the value codebook, into out [4][head_dim]. A warp has half the codewords of
// a slot; its bins are split into two float16 (rows 0 to 3 and 4 to 7 of the product) and codewords go from memory to
// the product's registers: column g, product j stand for dim 8 g + j of 64. bins: [parts][256][8 slots][4 heads];
// scratch: [16][4][64] floats. Ends with all threads in step.
__device__ void multiply_bins(const gsrq_layer& layer, const LookupPlan& plan, int kv_head, const float* bins,
                              const float* inverse, float* scratch, float* out) {
  constexpr int kSteps = kCodewords / 2 / 16, kUnit = 64;
  const int thread = threadIdx.x, warp = thread / 32, lane = thread % 32, g = lane / 4, t = lane % 4, h = g % kLookupLanes;
  const int d = layer.head_dim, width = plan.head.width;
  const float scale = inverse[h];
  for (int i = thread; i < kLookupLanes * d; i += kLookupThreads) out[i] = 0;
#pragma unroll 1
  for (int part = 0; part < plan.value_parts; ++part) {
    const int slot = part * kPartSlots + warp / 2, first_code = warp % 2 * (kCodewords / 2);
    const bool real = slot < plan.head.slots;
    uint32_t a[kSteps][2];
#pragma unroll
    for (int k = 0; k < kSteps; ++k)
#pragma unroll
      for (int j = 0; j < 2; ++j) {
        const float* from = bins + ((part * kCodewords + first_code + k * 16 + j * 8 + 2 * t) * kPartSlots + slot % kPartSlots) *
                                       kLookupLanes + h;
        const float x = from[0] * scale, y = from[kPartWords] * scale;
        const __half2 top = __floats2half2_rn(x, y);
        const float2 back = __half22float2(top);
        a[k][j] = g < kLookupLanes ? *reinterpret_cast<const uint32_t*>(&top) : packed(x - back.x, y - back.y);
      }
    const int of_head = real ? slot / layer.values.stages * width : 0;
    const int64_t element = static_cast<int64_t>(kv_head) * d + of_head, pitch = layer.values.width;
    const __half* const words =
        static_cast<const __half*>(layer.values.codewords) +
        ((element / pitch * layer.values.stages + slot % layer.values.stages) * kCodewords + first_code + 2 * t) * pitch +
        element % pitch + g * 8;
#pragma unroll 1
    for (int unit = 0; unit < width; unit += kUnit) {
      float sums[8][4] = {};
      if (real) {
        const bool here = unit + g * 8 < width;
#pragma unroll
        for (int k = 0; k < kSteps; ++k) {
          uint4 rows[4];
#pragma unroll
          for (int r = 0; r < 4; ++r)
            rows[r] = here ? __ldg(reinterpret_cast<const uint4*>(words + (k * 16 + r / 2 * 8 + r % 2) * pitch + unit))
                           : make_uint4(0, 0, 0, 0);
          const uint32_t both[4] = {a[k][0], 0, a[k][1], 0};
#pragma unroll
          for (int j = 0; j < 8; ++j) {
            const uint32_t select = j % 2 ? 0x7632 : 0x5410;
            const auto word = [&](const uint4& v) { return j / 2 == 0 ? v.x : j / 2 == 1 ? v.y : j / 2 == 2 ? v.z : v.w; };
            multiply(sums[j], both, __byte_perm(word(rows[0]), word(rows[1]), select),
                     __byte_perm(word(rows[2]), word(rows[3]), select));
          }
        }
      }
      float* const to = scratch + (warp * kLookupLanes + h) * kUnit + 16 * t;
#pragma unroll
      for (int j = 0; j < 8; ++j)
#pragma unroll
        for (int c = 0; c < 2; ++c) {
          const float sum = sums[j][c] + __shfl_xor_sync(~0u, sums[j][c], 16);
          if (g < kLookupLanes) to[c * 8 + j] = sum;
        }
      __syncthreads();
      const int dim = thread % kUnit, head = thread / kUnit;
      if (head < kLookupLanes && unit + dim < width)
        for (int w = 0; w < kLookupThreads / 32; ++w) {
          const int s = part * kPartSlots + w / 2;
          if (s < plan.head.slots)
            out[head * d + s / layer.values.stages * width + unit + dim] += scratch[(w * kLookupLanes + head) * kUnit + dim];
        }
      __syncthreads();
    }
  }
}

// Simple: a linear cache whose codes lie in pieces of 8 bytes.
template <bool Simple>
__global__ void __launch_bounds__(kLookupThreads, 1)
    lookup_kernel(const __grid_constant__ gsrq_layer layer, const __grid_constant__ gsrq_call call,
                  const __grid_constant__ LookupPlan plan, LookupMemory memory, int vheads) {
  __shared__ float maxima[kLookupThreads / 32][kLookupLanes];
  __shared__ float inverse[kLookupLanes];
  const int thread = threadIdx.x, warp = thread / 32, lane = thread % 32;
  const int key_parts = plan.key_parts, value_parts = plan.value_parts;
  char* const tables = shared_memory;                  // [key parts][256][8 slots][4 heads] float
  char* const bins = tables + key_parts * kPartBytes;  // [value parts][256][8 slots][4 heads] uint32
  uint2* const staged = reinterpret_cast<uint2*>(bins + value_parts * kPartBytes);  // [2][parts][512]
  const int stage = (key_parts + value_parts) * kLookupThreads;
  const uint32_t table_at = static_cast<uint32_t>(__cvta_generic_to_shared(tables));
  const uint32_t bins_at = static_cast<uint32_t>(__cvta_generic_to_shared(bins));
  // The eight lanes that read 16 bytes together differ in the slot; all that add together in slot or head.
  const int key_turn = lane % kPartSlots, value_turn = lane / kLookupLanes, head_turn = lane % kLookupLanes;
  const uint32_t key_bytes = 0x3210 ^ 0x1111 * (key_turn & 3), value_bytes = 0x3210 ^ 0x1111 * (value_turn & 3);
  const uint32_t key_place = key_turn * 16, value_place = value_turn * 16 | head_turn * 4;

  const Line line = line_of(layer, call, vheads, gridDim.x, true);
  Cursor cursor{};
  cursor.start<true>(layer, call, line, blockIdx.x);
  for (int i = thread; i < stage; i += kLookupThreads)  // slots past the last stay 0
    reinterpret_cast<uint4*>(staged)[i] = make_uint4(0, 0, 0, 0);

  for (; !cursor.done(); cursor.next<true>(layer, call, vheads)) {
    const int kv_head = cursor.vhead / plan.head.parts, row = cursor.row;
    const int64_t item = static_cast<int64_t>(row) * vheads + cursor.vhead;
    const Range range = coded_range(layer, call, row);
    const int begin = cursor.first * kChunk, end = min(cursor.stop * kChunk, range.count);
    const int rounds = (end - begin + kLookupThreads - 1) / kLookupThreads, first_row = range.first - layer.sinks + begin;
    const int64_t linear_row = row * call.capacity + first_row;
    const Codes keys =
        codes_of(call, layer.keys, call.key_codes, kv_head, layer.head_dim, plan.key_slots, key_parts, linear_row);
    const Codes values =
        codes_of(call, layer.values, call.value_codes, kv_head, layer.head_dim, plan.head.slots, value_parts, linear_row);
    const float4* const centre = memory.centre + item * memory.padded + begin;
    for (int i = thread; i < value_parts * kPartBytes / 16; i += kLookupThreads)
      reinterpret_cast<uint4*>(bins)[i] = make_uint4(0, 0, 0, 0);
    __syncthreads();
    const auto fetch = [&](const Codes& codes, int round, uint2* to) {
      const int first = round * kLookupThreads + warp * 32, tokens = end - begin - first;
      if (round < 0 || tokens <= 0) return;
      to += (round & 1) * stage + warp * 32;
      if (Simple || call.block_table == nullptr) {
        const int8_t* base = codes.base;
        fetch_codes<Simple>(codes, tokens, lane, to, [&](int i) {
          return base + static_cast<uint64_t>(static_cast<uint32_t>(first + i)) * codes.row_bytes;
        });
      } else {
        fetch_codes<Simple>(codes, tokens, lane, to, [&](int i) {
          return codes.base + code_row(call, row, first_row + first + i) * codes.row_bytes;
        });
      }
    };
    const float4* from = reinterpret_cast<const float4*>(memory.tables + item * key_parts * (kPartBytes / 4));
#pragma unroll 8
    for (int i = thread; i < key_parts * kPartBytes / 16; i += kLookupThreads)
      reinterpret_cast<float4*>(tables)[i] = __ldg(from + i);
    __syncthreads();
    float4 coming = make_float4(0, 0, 0, 0);
    const auto fetch_centre = [&](int round) {
      const int token = round * kLookupThreads + thread;
      if (token < end - begin) coming = __ldg(centre + token);
    };
    fetch_centre(0);
    float score[kLookupLanes] = {};
    const auto look_up = [&](int round) {
      const int token = round * kLookupThreads + thread;
      float sum[kLookupLanes] = {coming.x, coming.y, coming.z, coming.w};
      fetch_centre(round + 1);
      const bool real = token < end - begin;
      if (real) {
        const uint2* codes = staged + (round & 1) * stage + thread;
        uint32_t part = table_at;
#pragma unroll 1
        for (int p = 0; p < key_parts; ++p, codes += kLookupThreads, part += kPartBytes) {
          const uint2 c = turned(*codes, key_turn, key_bytes);
          const auto add = [&](uint32_t offset, int a) {
            const float4 v = load_shared(part + (offset | (key_place ^ (a * 16))));
            sum[0] += v.x;
            sum[1] += v.y;
            sum[2] += v.z;
            sum[3] += v.w;
          };
          add(row_of_code<0>(c.x), 0);
          add(row_of_code<1>(c.x), 1);
          add(row_of_code<2>(c.x), 2);
          add(row_of_code<3>(c.x), 3);
          add(row_of_code<0>(c.y), 4);
          add(row_of_code<1>(c.y), 5);
          add(row_of_code<2>(c.y), 6);
          add(row_of_code<3>(c.y), 7);
        }
      }
#pragma unroll
      for (int h = 0; h < kLookupLanes; ++h) {
        if (layer.softcap > 0) sum[h] = layer.softcap * kLog2e * tanhf(sum[h] / layer.softcap);
        score[h] = real ? sum[h] : kNone;
      }
    };

    // Reference exponents of the item and of the window; of the thread's tokens the sums of weights under each.
    float item_reference[kLookupLanes], reference[kLookupLanes], item_sum[kLookupLanes];
    uint32_t window_sum[kLookupLanes];
#pragma unroll
    for (int h = 0; h < kLookupLanes; ++h) {
      item_reference[h] = reference[h] = kNone;
      item_sum[h] = 0;
      window_sum[h] = 0;
    }
    int window_tokens = 0;
    bool flushed = false;
    float4* const scratch = reinterpret_cast<float4*>(memory.scratch + blockIdx.x * static_cast<int64_t>(value_parts) * (kPartBytes / 4));

    // Adds the window's bins to those of the item's earlier windows: to global memory and zero, or, the last, as floats to
    // the bins themselves. All threads call it together, their adds done.
    const auto flush = [&](bool last) {
      float kept[kLookupLanes], added[kLookupLanes];
#pragma unroll
      for (int h = 0; h < kLookupLanes; ++h) {
        const float most = fmaxf(item_reference[h], reference[h]);
        kept[h] = item_reference[h] == kNone ? 0.0f : exp2_fast(item_reference[h] - most);
        added[h] = reference[h] == kNone ? 0.0f : exp2_fast(reference[h] - most - kLookupBits);
        item_sum[h] = item_sum[h] * kept[h] + static_cast<float>(window_sum[h]) * added[h];
        item_reference[h] = most;
        window_sum[h] = 0;
      }
#pragma unroll 4
      for (int i = thread; i < value_parts * kPartBytes / 16; i += kLookupThreads) {
        uint4* const bin = reinterpret_cast<uint4*>(bins) + i;
        const uint4 u = *bin;
        float4 total = make_float4(0, 0, 0, 0);
        if (flushed) total = __ldcg(scratch + i);
        total.x = total.x * kept[0] + static_cast<float>(u.x) * added[0];
        total.y = total.y * kept[1] + static_cast<float>(u.y) * added[1];
        total.z = total.z * kept[2] + static_cast<float>(u.z) * added[2];
        total.w = total.w * kept[3] + static_cast<float>(u.w) * added[3];
        if (last) {
          *reinterpret_cast<float4*>(bin) = total;
        } else {
          *bin = make_uint4(0, 0, 0, 0);
          __stcg(scratch + i, total);
        }
      }
      flushed = true;
      window_tokens = 0;
    };

    // In step `round` weights of that round are added while the next one's scores are looked up and codes come for later.
#pragma unroll 1
    for (int round = -2; round < rounds; ++round) {
      __syncwarp();  // all lanes have read what is copied over
      fetch(keys, round + 2, staged);
      fetch(values, round + 1, staged + key_parts * kLookupThreads);
      commit_async();
      uint32_t weight[kLookupLanes] = {};
      const bool real = round >= 0 && score[0] != kNone;
      if (round >= 0) {
        bool exceeds = window_tokens + kLookupThreads > kLookupTokens || window_tokens == 0;
#pragma unroll
        for (int h = 0; h < kLookupLanes; ++h) exceeds |= score[h] > reference[h] + kHeadroom;
        if (__syncthreads_or(exceeds)) {  // a new window, whose reference is the largest here; all earlier adds are done
          if (window_tokens > 0) flush(false);
#pragma unroll
          for (int h = 0; h < kLookupLanes; ++h) {
            float most = score[h];
            for (int o = 16; o > 0; o /= 2) most = fmaxf(most, __shfl_xor_sync(~0u, most, o));
            if (lane == h) maxima[warp][h] = most;
          }
          __syncthreads();
#pragma unroll
          for (int h = 0; h < kLookupLanes; ++h) {
            float most = kNone;
#pragma unroll 1
            for (int w = 0; w < kLookupThreads / 32; ++w) most = fmaxf(most, maxima[w][h]);
            reference[h] = most;
          }
          __syncthreads();
        }
        window_tokens += kLookupThreads;
#pragma unroll
        for (int h = 0; h < kLookupLanes; ++h) {
          weight[h] = real ? __float2uint_rn(exp2_fast(score[h] - reference[h] + kLookupBits)) : 0;
          window_sum[h] += weight[h];
        }
      }
      wait_async<1>();
      __syncwarp();
      if (round >= -1 && round + 1 < rounds) look_up(round + 1);

      if (real) {
        // Step b's is head b ^ head_turn.
        const uint32_t w01 = head_turn & 1 ? weight[1] : weight[0], w10 = head_turn & 1 ? weight[0] : weight[1];
        const uint32_t w23 = head_turn & 1 ? weight[3] : weight[2], w32 = head_turn & 1 ? weight[2] : weight[3];
        const uint32_t own[kLookupLanes] = {head_turn & 2 ? w23 : w01, head_turn & 2 ? w32 : w10,
                                            head_turn & 2 ? w01 : w23, head_turn & 2 ? w10 : w32};
        const uint2* codes = staged + (round & 1) * stage + key_parts * kLookupThreads + thread;
        uint32_t part = bins_at;
#pragma unroll 1
        for (int p = 0; p < value_parts; ++p, codes += kLookupThreads, part += kPartBytes) {
          const uint2 c = turned(*codes, value_turn, value_bytes);
          const auto add = [&](uint32_t offset, int a) {
#pragma unroll
            for (int b = 0; b < kLookupLanes; ++b)
              add_shared(part + (offset | (value_place ^ (a * 16 | b * 4))), own[b]);
          };
          add(row_of_code<0>(c.x), 0);
          add(row_of_code<1>(c.x), 1);
          add(row_of_code<2>(c.x), 2);
          add(row_of_code<3>(c.x), 3);
          add(row_of_code<0>(c.y), 4);
          add(row_of_code<1>(c.y), 5);
          add(row_of_code<2>(c.y), 6);
          add(row_of_code<3>(c.y), 7);
        }
      }
    }
    __syncthreads();
    flush(true);
#pragma unroll
    for (int h = 0; h < kLookupLanes; ++h) {
      float sum = item_sum[h];
      for (int o = 16; o > 0; o /= 2) sum += __shfl_xor_sync(~0u, sum, o);
      if (lane == h) maxima[warp][h] = sum;
    }
    __syncthreads();
    const int64_t partial = item + blockIdx.x;
    if (thread < kLookupLanes) {
      float total = 0, most = kNone;
      for (int w = 0; w < kLookupThreads / 32; ++w) total += maxima[w][thread];
#pragma unroll
      for (int h = 0; h < kLookupLanes; ++h)
        if (h == thread) most = item_reference[h];
      memory.state[partial * kLookupLanes + thread] = make_float2(most, total);
      inverse[thread] = total > 0 ? 1 / total : 0.0f;
    }
    __syncthreads();
    float* const product = reinterpret_cast<float*>(tables);  // the tables' place is free now
    float* const result = product + kLookupThreads / 32 * kLookupLanes * 64;
    multiply_bins(layer, plan, kv_head, reinterpret_cast<const float*>(bins), inverse, product, result);
    for (int i = thread; i < kLookupLanes * layer.head_dim; i += kLookupThreads)
      memory.values[partial * kLookupLanes * layer.head_dim + i] = result[i];
    __syncthreads();
  }
}

constexpr int kFinishThreads = 128;

// Grid: (vheads * heads of a part, batch). The parts of one (row, query head) that blocks looked up, in their order, and the
// exact tokens.
__global__ void __launch_bounds__(kFinishThreads)
    finish_lookup(const __grid_constant__ gsrq_layer layer, const __grid_constant__ gsrq_call call,
                  const __grid_constant__ LookupPlan plan, LookupMemory memory, int vheads, int blocks, int splits) {
  __shared__ int owners[2];
  const DecodePlan& head = plan.head;
  const int vhead = blockIdx.x / head.part_heads, h = blockIdx.x % head.part_heads, row = blockIdx.y, d = layer.head_dim;
  const int of_group = vhead % head.parts * head.part_heads + h;
  if (of_group >= head.group) return;
  const int64_t base = (static_cast<int64_t>(row) * layer.heads +
                        static_cast<int64_t>(vhead / head.parts) * head.group + of_group) * d;
  if (call.new_lengths[row] <= 0) {
    for (int i = threadIdx.x; i < d; i += kFinishThreads) store(call.output, base + i, 0, call.dtype);
    return;
  }
  if (threadIdx.x < 32) {
    const Line line = line_of(layer, call, vheads, blocks, true);
    const int64_t before = chunks_before(layer, call, row), chunks = chunks_of(layer, call, row);
    const int64_t first = line.first_chunk(vhead, before, chunks);
    if (threadIdx.x == 0) {
      owners[0] = chunks > 0 ? line.owner(first) : 0;
      owners[1] = chunks > 0 ? line.owner(first + chunks - 1) : -1;
    }
  }
  __syncthreads();
  const int used = (ExactTokens(layer, call, row).count + kExactTokens - 1) / kExactTokens;
  const int64_t item = static_cast<int64_t>(row) * vheads + vhead, exact = item * splits;
  float most = kNone;
  for (int k = owners[0]; k <= owners[1]; ++k) most = fmaxf(most, memory.state[(item + k) * kLookupLanes + h].x);
#pragma unroll 4
  for (int k = 0; k < used; ++k) most = fmaxf(most, memory.exact.exact_state[(exact + k) * kLookupLanes + h].x);
  for (int e = threadIdx.x; e < d; e += kFinishThreads) {
    float value = 0, sum = 0;
#pragma unroll 4
    for (int k = owners[0]; k <= owners[1]; ++k) {
      const float2 state = memory.state[(item + k) * kLookupLanes + h];
      const float weight = state.x == kNone ? 0.0f : state.y * exp2f(state.x - most);
      sum += weight;
      value += memory.values[((item + k) * kLookupLanes + h) * d + e] * weight;
    }
#pragma unroll 4
    for (int k = 0; k < used; ++k) {
      const float2 state = memory.exact.exact_state[(exact + k) * kLookupLanes + h];
      const float factor = state.x == kNone ? 0.0f : exp2f(state.x - most);
      sum += state.y * factor;
      value += memory.exact.exact[((exact + k) * kLookupLanes + h) * d + e] * factor;
    }
    store(call.output, base + e, value / sum, call.dtype);
  }
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

LookupMemory take_memory(const gsrq_layer& layer, const gsrq_call& call, const LookupPlan& plan, int blocks,
                         Arena& workspace) {
  const int64_t vheads = static_cast<int64_t>(layer.kv_heads) * plan.head.parts, rows = vheads * call.batch;
  const int64_t d = layer.head_dim, pairs = std::max(layer.half_rope, kCentrePairs);
  LookupMemory m{};
  m.exact.exact = workspace.take<float>(rows * exact_splits(layer) * kLookupLanes * d);
  m.exact.exact_state = workspace.take<float2>(rows * exact_splits(layer) * kLookupLanes);
  m.high = workspace.take<__half>(rows * kLookupLanes * d);
  m.low = workspace.take<__half>(rows * kLookupLanes * d);
  m.drifts = workspace.take<float2>(rows * kLookupLanes * pairs);
  m.rest = workspace.take<float>(rows * kLookupLanes);
  m.tables = workspace.take<float>(rows * plan.key_parts * (kPartBytes / 4));
  m.padded = (gsrq_coded(call.max_total, layer.sinks, layer.window, layer.block) + 63) / 64 * 64;
  m.centre = workspace.take<float4>(rows * m.padded);
  m.scratch = workspace.take<float>(static_cast<int64_t>(blocks) * plan.value_parts * (kPartBytes / 4));
  m.values = workspace.take<float>((rows + blocks) * kLookupLanes * d);
  m.state = workspace.take<float2>((rows + blocks) * kLookupLanes);
  return m;
}

}  // namespace
}  // namespace decoding

using namespace decoding;

int lookup_prepare(const gsrq_layer& layer, Arena& prepared, cudaStream_t stream, bool launch) {
  uint4* const offsets = prepared.take<uint4>(2 * kCentreSteps * 32);
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
  memory.offsets = prepared.take<uint4>(2 * kCentreSteps * 32);
  const int vheads = layer.kv_heads * plan.head.parts;
  if (prepare_lookup(layer, call, plan, memory, stream)) return 1;
  if (memory.padded > 0) {
    const auto in_pieces = [](const gsrq_codebook& book, int slots) {
      return book.stages % 8 == 0 && book.groups * book.stages % 8 == 0 && slots % 8 == 0;
    };
    const bool simple = call.block_table == nullptr && in_pieces(layer.keys, plan.key_slots) &&
                        in_pieces(layer.values, plan.head.slots);
    const auto kernel = simple ? lookup_kernel<true> : lookup_kernel<false>;
    if (cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, plan.shared_bytes) != cudaSuccess)
      return launched("lookup_kernel");
    kernel<<<found.blocks, kLookupThreads, plan.shared_bytes, stream>>>(layer, call, plan, memory, vheads);
    if (launched("lookup_kernel")) return 1;
  }
  finish_lookup<<<dim3(static_cast<unsigned>(vheads * plan.head.part_heads), static_cast<unsigned>(call.batch)),
                  kFinishThreads, 0, stream>>>(layer, call, plan, memory, vheads, found.blocks, exact_splits(layer));
  return launched("finish_lookup");
}

}  // namespace gsrq::cuda
