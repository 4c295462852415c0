// See decode_combine.cuh.
#include "decode_combine.cuh"

#include <algorithm>

#include "decode_exact.cuh"
#include "launch.cuh"
#include "mma.cuh"

namespace gsrq::cuda::decoding {
namespace {

constexpr int kPadHalves = 8;
// (row, query head) pairs and codewords of a block at a time: many rows in turns of half the codebook, or few rows and a
// quarter of it a block.
constexpr int kManyRows = 32, kManyCodes = 128, kFewRows = 16, kFewCodes = 64;

bool few_rows(const gsrq_call& call, const DecodePlan& plan) { return call.batch * plan.lanes <= kFewRows; }

template <int Lanes>
__device__ inline void load_lanes(float (&to)[Lanes], const float* from) {
  if constexpr (Lanes == 1) {
    to[0] = __ldg(from);
  } else {
#pragma unroll
    for (int h = 0; h < Lanes; h += 4) {
      const float4 v = __ldg(reinterpret_cast<const float4*>(from + h));
      to[h] = v.x, to[h + 1] = v.y, to[h + 2] = v.z, to[h + 3] = v.w;
    }
  }
}

constexpr int kWarps = kCombineThreads / 32;

// Pieces: of 8 dims, a warp has. One value slot of one head: the bins of up to Rows (row, query head) pairs times the slot's
// 256 codewords, or a quarter of them. The bins, at most 1 after division by their sum, are split into two float16 of 22 bits
// together.
template <int Rows, int Codes, int Lanes, int Pieces>
__device__ void combine_values(const gsrq_layer& layer, const gsrq_call& call, const DecodePlan& plan, const Memory& memory,
                               const Stretches& coded, int block) {
  constexpr bool kFew = Codes == kFewCodes;
  constexpr int kSplits = kFew ? kCodewords / Codes : 1;
  const int vheads = coded.vheads;
  const int split = block % kSplits, of = block / kSplits;
  const int slot = of % plan.slots, vhead = of / plan.slots % vheads, kv_head = vhead / plan.parts;
  constexpr int kRowsAtOnce = Rows / Lanes;
  const int first_row = of / (plan.slots * vheads) * kRowsAtOnce;
  const int rows = min(kRowsAtOnce, call.batch - first_row), pairs = rows * Lanes, tiles = (pairs + 15) / 16;
  const int width = plan.width, pitch = width + kPadHalves;
  constexpr int kBinPitch = Codes + kPadHalves;
  __half* words = reinterpret_cast<__half*>(shared_memory);  // [Codes][pitch]
  __half* high = words + Codes * pitch;                      // [Rows][kBinPitch]
  __half* low = high + Rows * kBinPitch;
  float* const factors = reinterpret_cast<float*>(low + Rows * kBinPitch);  // [owners of the rows][Lanes]
  float* const of_groups = factors + (kRowsAtOnce + coded.owners) * Lanes;  // [threads][Lanes], where rows are few
  __shared__ int owners[Rows], first_factor[Rows];
  __shared__ int64_t first_partial[Rows], first_bins[Rows];
  const int thread = threadIdx.x, warp = thread / 32, lane = thread % 32;

  // The codewords: sub-vector, column and stage of the slot.
  const int element = kv_head * layer.head_dim + slot / layer.values.stages * width, of_group = layer.values.width;
  const __half* const from =
      static_cast<const __half*>(layer.values.codewords) +
      static_cast<int64_t>(element / of_group * layer.values.stages + slot % layer.values.stages) * kCodewords * of_group +
      element % of_group;
  const int vectors = width / 8, step_codes = kCombineThreads / vectors, step_at = kCombineThreads % vectors;
  const int thread_code = thread / vectors, thread_at = thread % vectors;
  const auto load_words = [&](int first_code) {
    for (int code = thread_code, at = thread_at; code < Codes;) {
      copy_async(words + code * pitch + at * 8, from + (first_code + code) * of_group + at * 8, true);
      code += step_codes;
      at += step_at;
      if (at >= vectors) at -= vectors, ++code;
    }
    commit_async();
  };
  load_words(split * Codes);

  const int64_t partial_bins = static_cast<int64_t>(plan.ways) * plan.bins();
  static_assert(kRowsAtOnce <= 32, "a lane a row");
  const bool listed = coded.listed != nullptr;
  const int64_t chunks = warp == 0 && lane < rows ? chunks_of(layer, call, first_row + lane) : 0;
  if (listed) wait_for_previous();
  if (warp == 0) {
    const int64_t of_lane = static_cast<int64_t>(vhead) * call.batch + first_row + lane;
    int2 own = make_int2(0, -1);  // the first and the last owner
    if (listed) {
      if (chunks > 0) own = __ldcg(coded.listed + of_lane);
    } else {
      const Line line = line_of(layer, call, vheads, coded.owners, coded.even, coded.lead);
      const int64_t places = places_of(static_cast<int>(chunks), line.lead);
      const int64_t begin = line.first_chunk(
          vhead, places_before(layer, call, first_row, line.lead) + running_sum(places) - places);
      if (chunks > 0) own = make_int2(line.owner(begin), line.owner(begin + chunks - 1));
    }
    const int used = own.y - own.x + 1, total = running_sum(used);
    if (lane < rows) {
      owners[lane] = used;
      first_factor[lane] = total - used;
      first_partial[lane] = of_lane + own.x;
      first_bins[lane] = first_partial[lane] * partial_bins;
    }
  }
  __syncthreads();
  if (!listed) wait_for_previous();

  // A thread has all heads of some (row, codeword); where rows are few, every Groups-th owner's of one.
  constexpr int kItems = Rows * Codes / Lanes / kCombineThreads > 0 ? Rows * Codes / Lanes / kCombineThreads : 1;
  const int way = slot / plan.slots_per_cta, place = slot % plan.slots_per_cta;
  const int code_stride = coded.by_slot ? Lanes : plan.stride, place_stride = coded.by_slot ? kCodewords * Lanes : Lanes;
  const float* const own_bins = memory.bins + static_cast<int64_t>(way) * plan.bins() + place * place_stride;
  const int groups = kFew ? max(kCombineThreads / (rows * Codes), 1) : 1;
  constexpr int kAhead = kFew && kItems == 1 ? 4 : 1;  // owners whose bins a thread reads at once, before it knows their factors
  constexpr int kLater = kFew ? 4 : 1;  // many rows have few owners each, and code that is read once
  float totals[kItems][Lanes], ahead[kAhead][Lanes];
  const auto load_first = [&](int first_code) {
#pragma unroll
    for (int j = 0; j < kItems; ++j) {
      const int i = thread + j * kCombineThreads, r = i / Codes % (groups > 1 ? rows : kRowsAtOnce);
      const int k = groups > 1 ? i / (rows * Codes) : 0;
#pragma unroll
      for (int h = 0; h < Lanes; ++h) totals[j][h] = 0;
      const int n = i < groups * rows * Codes ? owners[r] : 0;
      const float* const bins = own_bins + first_bins[r] + (first_code + i % Codes) * code_stride;
      if (k < n) load_lanes<Lanes>(totals[j], bins + k * partial_bins);
#pragma unroll
      for (int a = 1; a < kAhead; ++a)
        if (k + a * groups < n) load_lanes<Lanes>(ahead[a], bins + (k + a * groups) * partial_bins);
    }
  };
  load_first(split * Codes);

  // Eight lanes a pair.
  static_assert(Rows * 8 <= kCombineThreads, "one pass");
  {
    const int pair = thread / 8, r = pair / Lanes, h = pair % Lanes, n = pair < pairs ? owners[r] : 0;
    const float2* const state = memory.state + (pair < pairs ? first_partial[r] * Lanes + h : 0);
    float most = kNone, sum = 0;
    const int first = thread % 8;
    const float2 own[2] = {first < n ? __ldg(&state[first * Lanes]) : make_float2(kNone, 0),
                           first + 8 < n ? __ldg(&state[(first + 8) * Lanes]) : make_float2(kNone, 0)};
    most = fmaxf(own[0].x, own[1].x);
#pragma unroll 1
    for (int k = first + 16; k < n; k += 8) most = fmaxf(most, __ldg(&state[k * Lanes].x));
#pragma unroll
    for (int o = 4; o > 0; o /= 2) most = fmaxf(most, __shfl_xor_sync(~0u, most, o));
    const auto weigh = [&](int k, float2 s) {
      const float factor = s.x == kNone ? 0.0f : exp2f(s.x - most);
      sum += s.y * factor;
      factors[(first_factor[r] + k) * Lanes + h] = factor;
    };
    if (first < n) weigh(first, own[0]);
    if (first + 8 < n) weigh(first + 8, own[1]);
#pragma unroll 1
    for (int k = first + 16; k < n; k += 8) weigh(k, __ldg(&state[k * Lanes]));
#pragma unroll
    for (int o = 4; o > 0; o /= 2) sum += __shfl_xor_sync(~0u, sum, o);
    const float inverse = sum > 0 ? 1 / sum : 0.0f;
#pragma unroll 1
    for (int k = first; k < n; k += 8) factors[(first_factor[r] + k) * Lanes + h] *= inverse;
    if (slot == 0 && split == 0 && pair < pairs && thread % 8 == 0)
      memory.combined[(static_cast<int64_t>(vhead) * call.batch + first_row + r) * Lanes + h] = make_float2(most, sum);
  }
  __syncthreads();

  const int g = lane / 4, t = lane % 4;
  float sums[Rows / 16][Pieces][4];
#pragma unroll
  for (int i = 0; i < Rows / 16; ++i)
#pragma unroll
    for (int j = 0; j < Pieces; ++j)
#pragma unroll
      for (int k = 0; k < 4; ++k) sums[i][j][k] = 0;

#pragma unroll 1
  for (int first_code = split * Codes; first_code < (kFew ? (split + 1) * Codes : kCodewords); first_code += Codes) {
    if (first_code > split * Codes) load_words(first_code);
    // Bins of all owners, scaled and added in the owners' order.
#pragma unroll
    for (int j = 0; j < kItems; ++j) {
      const int i = thread + j * kCombineThreads, code = i % Codes, r = i / Codes % (groups > 1 ? rows : kRowsAtOnce);
      const int first = groups > 1 ? i / (rows * Codes) : 0;
      const bool here = i < groups * rows * Codes;
      const int n = here ? owners[r] : 0;
      if (first < n) {
        const float* const factor = factors + first_factor[r] * Lanes;
        const float* const bins = own_bins + first_bins[r] + (first_code + code) * code_stride;
#pragma unroll
        for (int h = 0; h < Lanes; ++h) totals[j][h] *= factor[first * Lanes + h];
#pragma unroll
        for (int a = 1; a < kAhead; ++a) {
          const int k = first + a * groups;
          if (k >= n) break;
#pragma unroll
          for (int h = 0; h < Lanes; ++h) totals[j][h] += factor[k * Lanes + h] * ahead[a][h];
        }
#pragma unroll kLater
        for (int k = first + kAhead * groups; k < n; k += groups) {
          float v[Lanes];
          load_lanes<Lanes>(v, bins + k * partial_bins);
#pragma unroll
          for (int h = 0; h < Lanes; ++h) totals[j][h] += factor[k * Lanes + h] * v[h];
        }
      }
      if (kFew && j == 0 && groups > 1) {  // the groups' sums, in their order
#pragma unroll
        for (int h = 0; h < Lanes; ++h) of_groups[i * Lanes + h] = totals[j][h];
        __syncthreads();
        if (i < rows * Codes)
          for (int k = 1; k < groups; ++k)
#pragma unroll
            for (int h = 0; h < Lanes; ++h) totals[j][h] += of_groups[(i + k * rows * Codes) * Lanes + h];
      }
      if (i / Codes < tiles * 16 / Lanes) {
#pragma unroll
        for (int h = 0; h < Lanes; ++h) {
          const int at = (i / Codes) * Lanes + h;
          const float total = i < rows * Codes ? totals[j][h] : 0.0f;
          split_in_two(total, high + at * kBinPitch + code, low + at * kBinPitch + code);
        }
      }
    }
    wait_async<0>();
    __syncthreads();
    if (!kFew && first_code + Codes < kCodewords) load_first(first_code + Codes);

#pragma unroll 1
    for (int k = 0; k < Codes; k += 16) {
      uint32_t b[Pieces / 2][4];  // codewords k .. k + 15 of 8 dims, two pieces, as the product wants them
#pragma unroll
      for (int j = 0; j < Pieces / 2; ++j) {
        const int piece = warp + (2 * j + lane / 16) * kWarps;
        load_transposed(b[j], words + (k + lane % 16) * pitch + (piece * 8 < width ? piece * 8 : 0));
      }
#pragma unroll
      for (int i = 0; i < Rows / 16; ++i) {
        if (i >= tiles) break;
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          uint32_t a[4];
          load_matrices(a, (half ? low : high) + (i * 16 + lane % 16) * kBinPitch + k + lane / 16 * 8);
#pragma unroll
          for (int j = 0; j < Pieces; ++j)
            if ((warp + j * kWarps) * 8 < width) multiply(sums[i][j], a, b[j / 2][j % 2 * 2], b[j / 2][j % 2 * 2 + 1]);
        }
      }
    }
    __syncthreads();
  }

  float* const to =
      memory.values +
      (((static_cast<int64_t>(vhead) * plan.slots + slot) * kSplits + split) * call.batch + first_row) * Lanes * width;
#pragma unroll
  for (int i = 0; i < Rows / 16; ++i)
#pragma unroll
    for (int j = 0; j < Pieces; ++j)
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        const int at = i * 16 + g + 8 * r, piece = warp + j * kWarps;
        if (at < pairs && piece * 8 < width)
          *reinterpret_cast<float2*>(to + at * width + piece * 8 + 2 * t) = make_float2(sums[i][j][2 * r], sums[i][j][2 * r + 1]);
      }
}

template <int Rows, int Codes, int Lanes, int Pieces>
__global__ void __launch_bounds__(kCombineThreads, Lanes == 4 && Pieces == 2 ? 4 : 3)
    combine_kernel(const __grid_constant__ gsrq_layer layer, const __grid_constant__ gsrq_call call,
                   const __grid_constant__ DecodePlan plan, Memory memory, const __grid_constant__ Stretches coded,
                   int exact_blocks, int splits, bool by_rows) {
  const int block = blockIdx.x;
  let_next_begin();
  if (block < exact_blocks) {
    if (Lanes != 4 || !by_rows) attend_exact<Lanes>(layer, call, plan, memory, coded.vheads, splits, block);
    else if (call.dtype == GSRQ_F16) attend_exact_rows<true>(layer, call, plan, memory, coded.vheads, splits, block);
    else attend_exact_rows<false>(layer, call, plan, memory, coded.vheads, splits, block);
  } else combine_values<Rows, Codes, Lanes, Pieces>(layer, call, plan, memory, coded, block - exact_blocks);
  wait_for_previous();  // exact tokens need nothing of it, but what follows does
}

constexpr int kFinishThreads = 128;

__device__ inline void add_scaled(float4& sum, float4 x, float by) {
  sum = make_float4(sum.x + x.x * by, sum.y + x.y * by, sum.z + x.z * by, sum.w + x.w * by);
}

// Four elements, where `to` may hold such at once.
__device__ inline void store_four(void* to, int64_t i, float4 x, int dtype, bool aligned) {
  if (aligned && dtype != GSRQ_F32) {
    uint2 words;
    if (dtype == GSRQ_F16) {
      words = make_uint2(packed(x.x, x.y), packed(x.z, x.w));
    } else {
      const __nv_bfloat162 low = __floats2bfloat162_rn(x.x, x.y), high = __floats2bfloat162_rn(x.z, x.w);
      words = make_uint2(*reinterpret_cast<const uint32_t*>(&low), *reinterpret_cast<const uint32_t*>(&high));
    }
    *reinterpret_cast<uint2*>(static_cast<uint16_t*>(to) + i) = words;
  } else {
    store(to, i, x.x, dtype);
    store(to, i + 1, x.y, dtype);
    store(to, i + 2, x.z, dtype);
    store(to, i + 3, x.w, dtype);
  }
}

// The sum of the coded and exact parts of one (row, vhead); a thread has four dims of a head. Usual: heads and value sub-vectors
// of 128. Parts: of the coded part, that are read at once.
template <bool Usual, int Parts>
__global__ void __launch_bounds__(kFinishThreads)
    finish(const __grid_constant__ gsrq_layer layer, const __grid_constant__ gsrq_call call,
           const __grid_constant__ DecodePlan plan, Memory memory, int has_coded, int splits, int code_splits) {
  let_next_begin();  // the next call's first launch waits at once: its start is out of the way
  const int vhead = blockIdx.x, vheads = gridDim.x, row = blockIdx.y, kv_head = vhead / plan.parts, part = vhead % plan.parts;
  const int d = Usual ? 128 : layer.head_dim, width = Usual ? 128 : plan.width;
  const int heads = min(plan.part_heads, plan.group - part * plan.part_heads);
  const int64_t first_head = static_cast<int64_t>(row) * layer.heads + kv_head * plan.group + part * plan.part_heads;
  const bool live = call.new_lengths[row] > 0, aligned = reinterpret_cast<uintptr_t>(call.output) % 16 == 0;
  const int used = live ? (ExactTokens(layer, call, row).count + kExactTokens - 1) / kExactTokens : 0;
  const int64_t first = (static_cast<int64_t>(row) * vheads + vhead) * splits;
  const int64_t slot_stride = static_cast<int64_t>(call.batch) * plan.lanes * width;
  wait_for_previous();
#pragma unroll 1
  for (int i = threadIdx.x; i < heads * (d / 4); i += kFinishThreads) {
    const int h = i / (d / 4), e = i % (d / 4) * 4;
    float4 value = make_float4(0, 0, 0, 0);
    if (live) {
      float2 coded = make_float2(kNone, 0);
      if (has_coded) coded = memory.combined[(static_cast<int64_t>(vhead) * call.batch + row) * plan.lanes + h];
      const float2* const states = memory.exact_state + first * plan.lanes + h;
      const float4* const exact = reinterpret_cast<const float4*>(memory.exact + (first * plan.lanes + h) * d + e);
      const float4* const from = reinterpret_cast<const float4*>(
          memory.values + (static_cast<int64_t>(vhead) * plan.slots + e / width * layer.values.stages) * code_splits * slot_stride +
          (static_cast<int64_t>(row) * plan.lanes + h) * width + e % width);
      // All reads are under way before the first is used; zeros and no weight where there is nothing.
      constexpr int kExact = 6;
      const int64_t exact_stride = plan.lanes * (d / 4);
      float2 state[kExact];
      float4 piece[Parts], x[kExact];
      const int parts = has_coded ? layer.values.stages * code_splits : 0;
#pragma unroll
      for (int k = 0; k < kExact; ++k) state[k] = k < used ? __ldcg(states + k * plan.lanes) : make_float2(kNone, 0);
#pragma unroll
      for (int k = 0; k < kExact; ++k) x[k] = k < used ? __ldcg(exact + k * exact_stride) : value;
#pragma unroll
      for (int r = 0; r < Parts; ++r) piece[r] = r < parts ? __ldcg(from + r * (slot_stride / 4)) : value;
      float4 all = value;
#pragma unroll
      for (int r = 0; r < Parts; ++r) add_scaled(all, piece[r], 1.0f);
#pragma unroll 4
      for (int r = Parts; r < parts; ++r) add_scaled(all, __ldcg(from + r * (slot_stride / 4)), 1.0f);
      float most = coded.y > 0 ? coded.x : kNone, sum = 0;
#pragma unroll
      for (int k = 0; k < kExact; ++k) most = fmaxf(most, state[k].x);
#pragma unroll 1
      for (int k = kExact; k < used; ++k) most = fmaxf(most, states[k * plan.lanes].x);
      if (coded.y > 0) {
        sum = coded.y * exp2f(coded.x - most);
        add_scaled(value, all, sum);
      }
#pragma unroll
      for (int k = 0; k < kExact; ++k) {
        const float factor = state[k].x == kNone ? 0.0f : exp2f(state[k].x - most);
        sum += state[k].y * factor;
        add_scaled(value, x[k], factor);
      }
#pragma unroll 1
      for (int k = kExact; k < used; ++k) {
        const float2 later = states[k * plan.lanes];
        const float factor = later.x == kNone ? 0.0f : exp2f(later.x - most);
        sum += later.y * factor;
        add_scaled(value, __ldcg(exact + k * exact_stride), factor);
      }
      const float inverse = 1 / sum;
      value = make_float4(value.x * inverse, value.y * inverse, value.z * inverse, value.w * inverse);
    }
    store_four(call.output, (first_head + h) * d + e, value, call.dtype, aligned);
  }
}

using CombineKernel = void (*)(gsrq_layer, gsrq_call, DecodePlan, Memory, Stretches, int, int, bool);

template <int Lanes, int Pieces>
CombineKernel combine_of(bool few) {
  return few ? combine_kernel<kFewRows, kFewCodes, Lanes, Pieces> : combine_kernel<kManyRows, kManyCodes, Lanes, Pieces>;
}

template <int Lanes>
CombineKernel combine_of(const DecodePlan& plan, bool few) {
  return plan.width <= 2 * 8 * kWarps ? combine_of<Lanes, 2>(few) : combine_of<Lanes, 4>(few);
}

CombineKernel combine_of(const DecodePlan& plan, bool few) {
  return plan.lanes == 1   ? combine_of<1>(plan, few)
         : plan.lanes == 4 ? combine_of<4>(plan, few)
                           : combine_of<8>(plan, few);
}

int combine_bytes(const DecodePlan& plan, int rows, int codes, int owners, bool with_exact, bool by_rows) {
  const int values = 2 * (codes * (plan.width + kPadHalves) + 2 * rows * (codes + kPadHalves)) +
                     4 * plan.lanes * (rows / plan.lanes + owners + (codes == kFewCodes ? kCombineThreads : 0));
  return std::max(values, !with_exact ? 0 : by_rows ? kExactRowsBytes : exact_bytes(plan.head_dim));
}

}  // namespace

int exact_splits(const gsrq_layer& layer) {
  return static_cast<int>((gsrq_exact_slots(layer.sinks, layer.window, layer.block) + kExactTokens - 1) / kExactTokens);
}

int value_splits(const gsrq_call& call, const DecodePlan& plan) { return few_rows(call, plan) ? kCodewords / kFewCodes : 1; }

int combine(const gsrq_layer& layer, const gsrq_call& call, const DecodePlan& plan, const Memory& memory,
            const Stretches& coded, bool with_exact, cudaStream_t stream) {
  const bool few = few_rows(call, plan);
  const int rows = few ? kFewRows : kManyRows, rows_at_once = rows / plan.lanes, splits = exact_splits(layer);
  const int code_splits = value_splits(call, plan);
  const int64_t value_blocks = coded.any ? static_cast<int64_t>(plan.slots) * code_splits * coded.vheads *
                                               ((call.batch + rows_at_once - 1) / rows_at_once)
                                         : 0;
  // Exact tokens first: they may begin while coded ones are under way.
  const bool by_rows = plan.lanes == 4 && exact_by_rows(layer, call, coded.vheads);
  const int64_t exact_blocks =
      with_exact ? static_cast<int64_t>(splits) * coded.vheads * call.batch / (by_rows ? kCombineThreads / 32 : 1) : 0;
  const int64_t blocks = exact_blocks + value_blocks;
  if (call.batch > 65535 || blocks > INT32_MAX) return fail("decode: %d rows are too many", call.batch);
  const CombineKernel kernel = combine_of(plan, few);
  const int bytes = combine_bytes(plan, rows, few ? kFewCodes : kManyCodes, coded.owners, with_exact, by_rows);
  if (cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes) != cudaSuccess)
    return launched("combine");
  if (blocks > 0)
    launch(coded.any, kernel, static_cast<unsigned>(blocks), kCombineThreads, bytes, stream, layer, call, plan, memory, coded,
           static_cast<int>(exact_blocks), splits, by_rows);
  if (launched("combine")) return 1;
  const dim3 heads(static_cast<unsigned>(coded.vheads), static_cast<unsigned>(call.batch));
  const bool usual = plan.head_dim == 128 && plan.width == 128;
  const bool many = layer.values.stages * code_splits > 8;
  const auto kernel_of_sum = usual ? (many ? finish<true, 32> : finish<true, 8>) : (many ? finish<false, 32> : finish<false, 8>);
  launch(true, kernel_of_sum, heads, kFinishThreads, 0, stream, layer, call, plan, memory,
         static_cast<int>(coded.any), splits, code_splits);
  return launched("finish");
}

}  // namespace gsrq::cuda::decoding
