// See decode_combine.cuh.
#include "decode_combine.cuh"

#include <algorithm>

#include "decode_exact.cuh"
#include "launch.cuh"
#include "mma.cuh"

namespace gsrq::cuda::decoding {
namespace {

constexpr int kPadHalves = 8;
// (row, query head) pairs and codewords of a block at a time: many rows, or few and all codewords in flight at once.
constexpr int kManyRows = 32, kManyCodes = 64, kFewRows = 16, kFewCodes = 256;

// One value slot of one head: the bins of up to Rows (row, query head) pairs times the slot's 256 codewords. The bins, at
// most 1 after division by their sum, are split into two float16 of 22 bits together.
template <int Rows, int Codes, int Lanes>
__device__ void combine_values(const gsrq_layer& layer, const gsrq_call& call, const DecodePlan& plan, const Memory& memory,
                               const Stretches& coded, int block) {
  const int vheads = coded.vheads;
  char* const raw = shared_memory;
  const int slot = block % plan.slots, vhead = block / plan.slots % vheads, kv_head = vhead / plan.parts;
  const int rows_at_once = Rows / Lanes, first_row = block / (plan.slots * vheads) * rows_at_once;
  const int rows = min(rows_at_once, call.batch - first_row), pairs = rows * Lanes, tiles = (pairs + 15) / 16;
  const int width = plan.width, pitch = width + kPadHalves;
  constexpr int kBinPitch = Codes + kPadHalves, kAhead = Codes == kFewCodes ? 8 : 2;  // loads under way
  __half* words = reinterpret_cast<__half*>(raw);  // [Codes][pitch]
  __half* high = words + Codes * pitch;            // [Rows][kBinPitch]
  __half* low = high + Rows * kBinPitch;
  __shared__ int first_owner[Rows], last_owner[Rows];
  __shared__ int64_t first_partial[Rows];
  __shared__ float reference[Rows], inverse[Rows];
  const int thread = threadIdx.x, warp = thread / 32, lane = thread % 32;

  // The codewords: sub-vector, column and stage of the slot.
  const int64_t element = static_cast<int64_t>(kv_head) * layer.head_dim + (slot / layer.values.stages) * width;
  const int64_t group = element / layer.values.width, column = element % layer.values.width;
  const __half* from = static_cast<const __half*>(layer.values.codewords) +
                       (group * layer.values.stages + slot % layer.values.stages) * kCodewords * layer.values.width + column;
  const int vectors = width / 8;
  const auto load_words = [&](int first_code) {
#pragma unroll 2 * kAhead
    for (int i = thread; i < Codes * vectors; i += kCombineThreads) {
      const int code = i / vectors, at = i % vectors * 8;
      const __half* source = from + static_cast<int64_t>(first_code + code) * layer.values.width + at;
      *reinterpret_cast<uint4*>(words + code * pitch + at) = __ldg(reinterpret_cast<const uint4*>(source));
    }
  };
  load_words(0);

  const Line line = line_of(layer, call, vheads, coded.owners, coded.by_row);
  if (warp == 0) {
    int64_t before = chunks_before(layer, call, first_row);
    for (int at = 0; at < rows; at += 32) {
      const int r = at + lane;
      const int64_t own = r < rows ? chunks_of(layer, call, first_row + r) : 0;
      int64_t sum = own;
      for (int o = 1; o < 32; o *= 2) {
        const int64_t up = __shfl_up_sync(~0u, sum, o);
        if (lane >= o) sum += up;
      }
      if (r < rows) {
        const int64_t begin = line.first_chunk(vhead, before + sum - own, own), row = first_row + r;
        first_owner[r] = own > 0 ? line.owner(begin) : 0;
        last_owner[r] = own > 0 ? line.owner(begin + own - 1) : -1;
        first_partial[r] = coded.by_row ? row * vheads + vhead : static_cast<int64_t>(vhead) * call.batch + row;
      }
      before += __shfl_sync(~0u, sum, 31);
    }
  }
  __syncthreads();
  wait_for_previous();
  for (int i = thread; i < pairs; i += kCombineThreads) {
    const int r = i / Lanes, h = i % Lanes;
    const int64_t base = first_partial[r];
    float most = kNone, sum = 0;
    for (int k = first_owner[r]; k <= last_owner[r]; ++k) most = fmaxf(most, memory.state[(base + k) * Lanes + h].x);
    for (int k = first_owner[r]; k <= last_owner[r]; ++k) {
      const float2 s = memory.state[(base + k) * Lanes + h];
      if (s.x != kNone) sum += s.y * exp2f(s.x - most);
    }
    reference[i] = most;
    inverse[i] = sum > 0 ? 1 / sum : 0.0f;
    if (slot == 0)
      memory.combined[(static_cast<int64_t>(vhead) * call.batch + first_row + r) * Lanes + h] = make_float2(most, sum);
  }
  __syncthreads();

  const int way = slot / plan.slots_per_cta, place = slot % plan.slots_per_cta;
  const int g = lane / 4, t = lane % 4;
  constexpr int kWarps = kCombineThreads / 32, kPieces = 256 / 8 / kWarps;  // pieces of 8 dims of a warp
  float sums[Rows / 16][kPieces][4];
#pragma unroll
  for (int i = 0; i < Rows / 16; ++i)
#pragma unroll
    for (int j = 0; j < kPieces; ++j)
#pragma unroll
      for (int k = 0; k < 4; ++k) sums[i][j][k] = 0;

  for (int first_code = 0; first_code < kCodewords; first_code += Codes) {
    if (first_code > 0) load_words(first_code);
    // Bins of all owners, scaled and added in the owners' order; a thread has the heads of one (row, codeword).
#pragma unroll 2
    for (int i = thread; i < tiles * 16 / Lanes * Codes; i += kCombineThreads) {
      const int code = i % Codes, r = i / Codes;
      float totals[Lanes] = {};
      if (r < rows) {
        const int64_t base = first_partial[r];
        const float* bins = memory.bins + way * plan.bins() + (first_code + code) * plan.stride + place * Lanes;
#pragma unroll kAhead
        for (int k = first_owner[r]; k <= last_owner[r]; ++k) {
          const float* from_bins = bins + (base + k) * plan.ways * plan.bins();
          const float2* state = memory.state + (base + k) * Lanes;
          float v[Lanes];
          if constexpr (Lanes == 1) {
            v[0] = __ldg(from_bins);
          } else {
#pragma unroll
            for (int h = 0; h < Lanes; h += 4)
              *reinterpret_cast<float4*>(v + h) = __ldg(reinterpret_cast<const float4*>(from_bins + h));
          }
#pragma unroll
          for (int h = 0; h < Lanes; ++h) totals[h] += exp2_fast(__ldg(state + h).x - reference[r * Lanes + h]) * v[h];
        }
      }
#pragma unroll
      for (int h = 0; h < Lanes; ++h) {
        const int at = r * Lanes + h;
        const float total = r < rows ? totals[h] * inverse[at] : 0.0f;
        const __half top = __float2half_rn(total);
        high[at * kBinPitch + code] = top;
        low[at * kBinPitch + code] = __float2half_rn(total - __half2float(top));
      }
    }
    __syncthreads();

#pragma unroll 1
    for (int k = 0; k < Codes; k += 16) {
      uint32_t b[kPieces][2];  // codewords k .. k + 15 of 8 dims, as the product wants them
#pragma unroll
      for (int j = 0; j < kPieces; ++j) {
        const int piece = warp + j * kWarps;
        if (piece * 8 >= width) break;
        const uint32_t address =
            static_cast<uint32_t>(__cvta_generic_to_shared(words + (k + lane % 16) * pitch + piece * 8));
        asm volatile("ldmatrix.sync.aligned.m8n8.x2.trans.shared.b16 {%0, %1}, [%2];"
                     : "=r"(b[j][0]), "=r"(b[j][1]) : "r"(address));
      }
#pragma unroll
      for (int i = 0; i < Rows / 16; ++i) {
        if (i >= tiles) break;
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          const __half* at = (half ? low : high) + (i * 16 + g) * kBinPitch + k + 2 * t;
          const uint32_t a[4] = {*reinterpret_cast<const uint32_t*>(at), *reinterpret_cast<const uint32_t*>(at + 8 * kBinPitch),
                                 *reinterpret_cast<const uint32_t*>(at + 8),
                                 *reinterpret_cast<const uint32_t*>(at + 8 * kBinPitch + 8)};
#pragma unroll
          for (int j = 0; j < kPieces; ++j)
            if ((warp + j * kWarps) * 8 < width) multiply(sums[i][j], a, b[j][0], b[j][1]);
        }
      }
    }
    __syncthreads();
  }

#pragma unroll
  for (int i = 0; i < Rows / 16; ++i)
#pragma unroll
    for (int j = 0; j < kPieces; ++j)
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        const int at = i * 16 + g + 8 * r, piece = warp + j * kWarps;
        if (at >= pairs || piece * 8 >= width) continue;
        const int64_t row = first_row + at / Lanes;
        float* to = memory.values +
                    (((static_cast<int64_t>(vhead) * plan.slots + slot) * call.batch + row) * Lanes + at % Lanes) * width +
                    piece * 8 + 2 * t;
        *reinterpret_cast<float2*>(to) = make_float2(sums[i][j][2 * r], sums[i][j][2 * r + 1]);
      }
}

template <int Rows, int Codes, int Lanes>
__global__ void __launch_bounds__(kCombineThreads, 3)
    combine_kernel(const __grid_constant__ gsrq_layer layer, const __grid_constant__ gsrq_call call,
                   const __grid_constant__ DecodePlan plan, Memory memory, const __grid_constant__ Stretches coded,
                   int value_blocks, int splits) {
  const int block = blockIdx.x;
  let_next_begin();
  if (block < value_blocks) combine_values<Rows, Codes, Lanes>(layer, call, plan, memory, coded, block);
  else attend_exact<Lanes>(layer, call, plan, memory, coded.vheads, splits, block - value_blocks);
  wait_for_previous();  // exact tokens need nothing of it, but what follows does
}

constexpr int kFinishThreads = 128;

// The sum of the coded and exact parts of one (row, query head).
__global__ void __launch_bounds__(kFinishThreads)
    finish(const __grid_constant__ gsrq_layer layer, const __grid_constant__ gsrq_call call,
           const __grid_constant__ DecodePlan plan, Memory memory, int has_coded, int splits) {
  const int vhead = blockIdx.x / plan.part_heads, h = blockIdx.x % plan.part_heads, row = blockIdx.y;
  const int kv_head = vhead / plan.parts, part = vhead % plan.parts, vheads = gridDim.x / plan.part_heads;
  const int d = layer.head_dim;
  wait_for_previous();
  if (part * plan.part_heads + h >= plan.group) return;
  const int64_t head = static_cast<int64_t>(kv_head) * plan.group + part * plan.part_heads + h;
  const int64_t base = (static_cast<int64_t>(row) * layer.heads + head) * d;
  if (call.new_lengths[row] <= 0) {
    for (int i = threadIdx.x; i < d; i += kFinishThreads) store(call.output, base + i, 0, call.dtype);
    return;
  }
  const int used = (ExactTokens(layer, call, row).count + kExactTokens - 1) / kExactTokens;
  const int64_t first = (static_cast<int64_t>(row) * vheads + vhead) * splits;
  float2 coded = make_float2(kNone, 0);
  if (has_coded) coded = memory.combined[(static_cast<int64_t>(vhead) * call.batch + row) * plan.lanes + h];
  float most = coded.y > 0 ? coded.x : kNone;
#pragma unroll 8
  for (int k = 0; k < used; ++k) most = fmaxf(most, memory.exact_state[(first + k) * plan.lanes + h].x);
  for (int e = threadIdx.x; e < d; e += kFinishThreads) {
    float value = 0, sum = 0;
    if (coded.y > 0) {
      const int64_t slot_stride = static_cast<int64_t>(call.batch) * plan.lanes * plan.width;
      const float* from =
          memory.values + (static_cast<int64_t>(vhead) * plan.slots + e / plan.width * layer.values.stages) * slot_stride +
          (static_cast<int64_t>(row) * plan.lanes + h) * plan.width + e % plan.width;
#pragma unroll 16
      for (int r = 0; r < layer.values.stages; ++r) value += from[r * slot_stride];
      sum = coded.y * exp2f(coded.x - most);
      value *= sum;
    }
#pragma unroll 8
    for (int k = 0; k < used; ++k) {
      const float2 state = memory.exact_state[(first + k) * plan.lanes + h];
      const float factor = state.x == kNone ? 0.0f : exp2f(state.x - most);
      sum += state.y * factor;
      value += memory.exact[((first + k) * plan.lanes + h) * d + e] * factor;
    }
    store(call.output, base + e, value / sum, call.dtype);
  }
}

using CombineKernel = void (*)(gsrq_layer, gsrq_call, DecodePlan, Memory, Stretches, int, int);

template <int Rows, int Codes>
CombineKernel combine_of(int lanes) {
  return lanes == 1   ? combine_kernel<Rows, Codes, 1>
         : lanes == 4 ? combine_kernel<Rows, Codes, 4>
                      : combine_kernel<Rows, Codes, 8>;
}

CombineKernel combine_of(const DecodePlan& plan, bool few) {
  return few ? combine_of<kFewRows, kFewCodes>(plan.lanes) : combine_of<kManyRows, kManyCodes>(plan.lanes);
}

int combine_bytes(const DecodePlan& plan, int rows, int codes) {
  const int values = 2 * (codes * (plan.width + kPadHalves) + 2 * rows * (codes + kPadHalves));
  return std::max(values, 4 * (8 * plan.head_dim + 2 * kExactTokens * (plan.head_dim + 8)));
}

}  // namespace

int exact_splits(const gsrq_layer& layer) {
  return static_cast<int>((gsrq_exact_slots(layer.sinks, layer.window, layer.block) + kExactTokens - 1) / kExactTokens);
}

int combine(const gsrq_layer& layer, const gsrq_call& call, const DecodePlan& plan, const Memory& memory,
            const Stretches& coded, cudaStream_t stream) {
  const bool few = call.batch * plan.lanes <= kFewRows;
  const int rows = few ? kFewRows : kManyRows, rows_at_once = rows / plan.lanes, splits = exact_splits(layer);
  const int64_t value_blocks =
      coded.any ? static_cast<int64_t>(plan.slots) * coded.vheads * ((call.batch + rows_at_once - 1) / rows_at_once) : 0;
  const int64_t blocks = value_blocks + static_cast<int64_t>(splits) * coded.vheads * call.batch;
  if (call.batch > 65535 || blocks > INT32_MAX) return fail("decode: %d rows are too many", call.batch);
  const CombineKernel kernel = combine_of(plan, few);
  const int bytes = combine_bytes(plan, rows, few ? kFewCodes : kManyCodes);
  if (cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes) != cudaSuccess)
    return launched("combine");
  launch(coded.any, kernel, static_cast<unsigned>(blocks), kCombineThreads, bytes, stream, layer, call, plan, memory, coded,
         static_cast<int>(value_blocks), splits);
  if (launched("combine")) return 1;
  const dim3 heads(static_cast<unsigned>(coded.vheads * plan.part_heads), static_cast<unsigned>(call.batch));
  launch(true, finish, heads, kFinishThreads, 0, stream, layer, call, plan, memory, static_cast<int>(coded.any), splits);
  return launched("finish");
}

}  // namespace gsrq::cuda::decoding
