// decode_tables.cu for many rows: queries are turned by a launch ahead, and tables written slot by slot.
#include <algorithm>

#include "decode_combine.cuh"
#include "decode_exact.cuh"
#include "decode_lookup.cuh"
#include "launch.cuh"
#include "mma.cuh"

namespace gsrq::cuda::decoding {
namespace {

constexpr int kThreads = 256, kPad = 8;
constexpr int kTableRows = 16, kTablePairs = kTableRows * kLookupLanes, kFewTableCodes = 32, kManyTableCodes = 64;
constexpr int kCenterTokens = kThreads / 32 * kCenterTiles * 16, kCenterHeads = 8;
constexpr float kCenterMargin = 1.25f;  // what a table may be off from rotations, and rounding, beside the bound
static_assert(kThreads / 32 == kPartSlots, "a warp fills one slot's tables");
static_assert(kThreads == kCombineThreads, "exact tokens are attended to here");

// Blocks of each kind, in their order, and what one of them takes.
struct Work {
  int tables, centers, exact;
  int table_codes, center_heads, splits, vheads;
  bool with_offsets, wide_exact;
};

__device__ inline int position_of(const gsrq_call& call, int row) {
  return static_cast<int>(max(min(call.past_lengths[row], call.max_total - 1), static_cast<int64_t>(0)));
}

// Grid: (vheads, batch). Queries turned to their position, in units of log2 save where softcap needs them plain; their products
// with the center, pair by pair, and what bounds the sum of those.
__global__ void __launch_bounds__(kThreads)
    turn_queries(const __grid_constant__ gsrq_layer layer, const __grid_constant__ gsrq_call call,
                 const __grid_constant__ LookupPlan plan, LookupMemory memory) {
  __shared__ float2 sums[kThreads / 32][kLookupLanes];
  let_next_begin();
  const int vhead = blockIdx.x, vheads = gridDim.x, row = blockIdx.y, d = layer.head_dim, half = layer.half_rope;
  const int kv_head = vhead / plan.head.parts, thread = threadIdx.x, lane = thread % 32, h = thread % kLookupLanes;
  const int head = vhead % plan.head.parts * plan.head.part_heads + h, position = position_of(call, row);
  const float scale = query_scale(layer);
  const int64_t item = static_cast<int64_t>(row) * vheads + vhead;
  const bool live = call.new_lengths[row] > 0 && h < plan.head.part_heads && head < plan.head.group;
  const int64_t base = (static_cast<int64_t>(row) * layer.heads + kv_head * plan.head.group + head) * d;
  const int pairs = max(half, kCenterPairs);
  float bound = 0, rest = 0;
#pragma unroll 1
  for (int p = thread / kLookupLanes; p < max(d / 2, pairs); p += kThreads / kLookupLanes) {
    float2 q = make_float2(0, 0), drift = q;
    if (p < d / 2) {
      int e0, e1;
      pair_elements(layer, p, &e0, &e1);
      if (live) {
        const int64_t at = static_cast<int64_t>(position) * half + p;
        const float c = p < half ? __ldg(layer.cos + at) : 1.0f, s = p < half ? __ldg(layer.sin + at) : 0.0f;
        const float* m = layer.key_center + kv_head * d;
        const float mx = __ldg(m + e0), my = __ldg(m + e1), size = p < half ? __ldg(layer.cos + p) : 0.0f;
        const float x = load_constant(call.query, base + e0, call.dtype) * scale;
        const float y = load_constant(call.query, base + e1, call.dtype) * scale;
        q = make_float2(x * c - y * s, y * c + x * s);
        drift = make_float2(q.x * mx + q.y * my, q.y * mx - q.x * my);
        if (p < half) bound += sqrtf(drift.x * drift.x + drift.y * drift.y) * fabsf(size);  // row 0 has the table's scale
        else rest += drift.x;
      }
      const int64_t to = (item * kLookupLanes + h) * d;
      const __half x = __float2half_rn(q.x), y = __float2half_rn(q.y);
      memory.high[to + e0] = x;
      memory.high[to + e1] = y;
      memory.low[to + e0] = __float2half_rn(q.x - __half2float(x));
      memory.low[to + e1] = __float2half_rn(q.y - __half2float(y));
    }
    if (p < pairs) memory.drifts[(item * pairs + p) * kLookupLanes + h] = p < half ? drift : make_float2(0, 0);
  }
#pragma unroll
  for (int o = kLookupLanes; o < 32; o *= 2) {
    bound += __shfl_xor_sync(~0u, bound, o);
    rest += __shfl_xor_sync(~0u, rest, o);
  }
  if (lane < kLookupLanes) sums[thread / 32][lane] = make_float2(bound, rest);
  __syncthreads();
  if (thread < kLookupLanes) {
    float2 all = make_float2(0, 0);
    for (int w = 0; w < kThreads / 32; ++w) all = make_float2(all.x + sums[w][thread].x, all.y + sums[w][thread].y);
    memory.unit[item * kLookupLanes + thread] = all.x * (kCenterMargin / kCenterMost);
    memory.rest[item * kLookupLanes + thread] = all.y;
  }
}

__device__ inline void prefetch(const void* from) { asm volatile("prefetch.global.L2 [%0];" ::"l"(from)); }

// Block: some codewords of the eight slots of a part, a warp a slot, times the queries of up to 16 rows. Exact: a codeword has
// Steps times 16 elements, else at most that.
template <int Steps, bool Exact>
__device__ void fill_tables(const gsrq_layer& layer, const gsrq_call& call, const LookupPlan& plan,
                            const LookupMemory& memory, const Work& work, int block) {
  const int groups = kCodewords / work.table_codes, vheads = work.vheads;
  const int first_code = block % groups * work.table_codes, part = block / groups % plan.key_parts;
  const int vhead = block / (groups * plan.key_parts) % vheads, kv_head = vhead / plan.head.parts;
  const int first_row = block / (groups * plan.key_parts * vheads) * kTableRows, rows = min(kTableRows, call.batch - first_row);
  const int d = layer.head_dim, pitch = d + kPad, thread = threadIdx.x, warp = thread / 32, lane = thread % 32;
  const int g = lane / 4, t = lane % 4, slot = part * kPartSlots + warp, tiles = (rows + 1) / 2;
  __half* const high = reinterpret_cast<__half*>(shared_memory);  // [64][pitch]: turned queries = high + low
  __half* const low = high + kTablePairs * pitch;
  const bool real = slot < plan.key_slots;  // slots past the last are zeros
  const int used = real ? slot : 0, of_head = used / layer.keys.stages * plan.key_width;
  const int element = kv_head * d + of_head, width = layer.keys.width;
  const __half* const first_word =
      static_cast<const __half*>(layer.keys.codewords) +
      (static_cast<int64_t>(element / width * layer.keys.stages + used % layer.keys.stages) * kCodewords + first_code) * width +
      element % width;
  if (real)
    for (int i = lane; i < work.table_codes; i += 32)
      for (int at = 0; at < plan.key_width; at += 64) prefetch(first_word + i * width + at);
  wait_for_previous();
  const __half* const queries = lane < 16 ? memory.high : memory.low;
  __half* const to_queries = lane < 16 ? high : low;
  for (int pair = warp; pair < 2 * tiles * kLookupLanes; pair += kThreads / 32) {
    const int row = first_row + min(pair / kLookupLanes, rows - 1);
    const int64_t from = ((static_cast<int64_t>(row) * vheads + vhead) * kLookupLanes + pair % kLookupLanes) * d;
    for (int at = lane % 16 * 8; at < d; at += 16 * 8) copy_async(to_queries + pair * pitch + at, queries + from + at, true);
  }
  commit_async();
  wait_async<0>();
  __syncthreads();

  const __half* const words = first_word + g * width + 2 * t;
  const int below = 8 * width, slots = plan.key_parts * kPartSlots;
  float* const out = memory.tables +
                     ((static_cast<int64_t>(first_row) * vheads + vhead) * slots + slot) * (kCodewords * kLookupLanes) +
                     (first_code + g) * kLookupLanes + t % 2 * 2;
  // Of load_matrices: matrices 0 and 1 are the two halves of a step of `high`, 2 and 3 of `low`.
  const __half* const from = (lane < 16 ? high : low) + lane % 8 * pitch + of_head + lane / 8 % 2 * 8;
#pragma unroll 1
  for (int code = 0; code < work.table_codes; code += 16) {
    uint32_t a[Steps][4];
#pragma unroll
    for (int k = 0; k < Steps; ++k) {
      const __half* word = words + code * width + k * 16;
      const bool here = real && (Exact || k * 16 < plan.key_width);
      a[k][0] = here ? __ldg(reinterpret_cast<const uint32_t*>(word)) : 0;
      a[k][1] = here ? __ldg(reinterpret_cast<const uint32_t*>(word + below)) : 0;
      a[k][2] = here ? __ldg(reinterpret_cast<const uint32_t*>(word + 8)) : 0;
      a[k][3] = here ? __ldg(reinterpret_cast<const uint32_t*>(word + below + 8)) : 0;
    }
#pragma unroll 1
    for (int tile = 0; tile < tiles; tile += 2) {  // two at a time
      float sums[2][2][4] = {};
      const __half* const at[2] = {from + tile * 8 * pitch, from + min(tile + 1, tiles - 1) * 8 * pitch};
      uint32_t b[2][2][4];  // of this step and the next
#pragma unroll
      for (int i = 0; i < 2; ++i) load_matrices(b[0][i], at[i]);
#pragma unroll
      for (int k = 0; k < Steps; ++k) {
        if (!Exact && k * 16 >= plan.key_width) break;
        if (k + 1 < Steps && (Exact || (k + 1) * 16 < plan.key_width))
#pragma unroll
          for (int i = 0; i < 2; ++i) load_matrices(b[(k + 1) % 2][i], at[i] + (k + 1) * 16);
#pragma unroll
        for (int j = 0; j < 2; ++j)
#pragma unroll
          for (int i = 0; i < 2; ++i) multiply(sums[i][j], a[k], b[k % 2][i][2 * j], b[k % 2][i][2 * j + 1]);
      }
      // Column 2 t of a tile: row of two, head.
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const int row = (tile + i) * 2 + t / 2;
        if (row >= rows) continue;
        float* const to = out + (row * vheads * slots * kCodewords + code) * static_cast<int64_t>(kLookupLanes);
        const float(&high_sum)[4] = sums[i][0];
        const float(&low_sum)[4] = sums[i][1];
        *reinterpret_cast<float2*>(to) = make_float2(high_sum[0] + low_sum[0], high_sum[1] + low_sum[1]);
        *reinterpret_cast<float2*>(to + 8 * kLookupLanes) = make_float2(high_sum[2] + low_sum[2], high_sum[3] + low_sum[3]);
      }
    }
  }
}

// Tokens and vheads of a block that scores the center.
struct CenterBlock {
  int row, first_vhead, here;  // here: vheads
  int stretch, begin, end;     // coded tokens
  Range range;
  __device__ CenterBlock(const gsrq_layer& layer, const gsrq_call& call, const LookupMemory& memory, const Work& work,
                         int block)
      : range{} {
    const int stretches = static_cast<int>((memory.padded + kCenterTokens - 1) / kCenterTokens);
    const int groups = (work.vheads + work.center_heads - 1) / work.center_heads;
    row = block / (stretches * groups);
    first_vhead = block / stretches % groups * work.center_heads;
    here = min(work.center_heads, work.vheads - first_vhead);
    range = coded_range(layer, call, row);
    stretch = block % stretches;
    begin = stretch * kCenterTokens;
    end = min(begin + kCenterTokens, range.count);
  }
};

// A score as an integer of 1 / inverse above 2^15, in the low 16 bits: those of a float of 2^23 or more are an integer.
__device__ inline uint32_t fixed(float x, float inverse) { return __float_as_uint(fmaf(x, inverse, kCenterZero)); }

// A warp takes 128 tokens: their offsets from the first are constant, so the matrix of their cosines and sines, as float16, lies
// in shared memory, and the first token's row turns u and v. A product's columns are the heads of two vheads; two products share
// a read of the matrix.
// Full: half_rope is kCenterPairs.
template <bool Full>
__device__ void score_center(const gsrq_layer& layer, const gsrq_call& call, const LookupMemory& memory, const Work& work,
                             int block) {
  constexpr int kPairs = 2;  // of vheads that are scored together
  const CenterBlock own(layer, call, memory, work, block);
  if (own.begin >= own.end) return;
  const int here = own.here, end = own.end, half = layer.half_rope;
  const int thread = threadIdx.x, warp = thread / 32, lane = thread % 32, g = lane / 4, t = lane % 4;
  const int64_t item = static_cast<int64_t>(own.row) * work.vheads + own.first_vhead;
  uint4* const offsets = reinterpret_cast<uint4*>(shared_memory);  // [tiles][steps][32]
  float2* const drifts = reinterpret_cast<float2*>(offsets + kCenterTiles * kCenterSteps * 32);  // [vheads][pairs][4]
  const int first = own.begin + warp * kCenterTiles * 16;
  const int64_t at = static_cast<int64_t>(own.range.first + first) * half;
  if (first < end && lane < 2 * half / 32 + 2)
    prefetch((lane % 2 ? layer.sin : layer.cos) + at + min(lane / 2 * 32, half - 1));
  for (int i = thread; i < kCenterTiles * kCenterSteps * 32; i += kThreads) copy_async(offsets + i, memory.offsets + i, true);
  wait_for_previous();
  const float4* const from = reinterpret_cast<const float4*>(memory.drifts + item * kCenterPairs * kLookupLanes);
  const int used = here * kCenterPairs * kLookupLanes / 2;
  for (int i = thread; i < kCenterHeads * kCenterPairs * kLookupLanes / 2; i += kThreads)
    copy_async(reinterpret_cast<float4*>(drifts) + i, from + (i < used ? i : 0), i < used);  // zeros past them
  commit_async();
  wait_async<0>();
  __syncthreads();
  if (first >= end) return;
  const float* const cosines = layer.cos + at + 2 * t;
  const float* const sines = layer.sin + at + 2 * t;
  const float2* const own_drifts = drifts + (g / kLookupLanes * kCenterPairs + 2 * t) * kLookupLanes + g % kLookupLanes;
#pragma unroll 1
  for (int v = 0; v < here; v += 2 * kPairs) {
    uint32_t b[kPairs][kCenterSteps][2];
#pragma unroll
    for (int s = 0; s < kCenterSteps; ++s) {
      float turned[kPairs][2][2];
#pragma unroll
      for (int k = 0; k < 2; ++k) {
        const int pair = Full ? 8 * s + k : min(8 * s + k, half - 1 - 2 * t);  // from 2 t on; drifts past the last are zero
        const float c = __ldg(cosines + pair), d = __ldg(sines + pair);
#pragma unroll
        for (int i = 0; i < kPairs; ++i) {
          const float2 x = own_drifts[((v + 2 * i) * kCenterPairs + 8 * s + k) * kLookupLanes];
          turned[i][0][k] = x.x * c + x.y * d;
          turned[i][1][k] = x.y * c - x.x * d;
        }
      }
#pragma unroll
      for (int i = 0; i < kPairs; ++i)
#pragma unroll
        for (int j = 0; j < 2; ++j) b[i][s][j] = packed(turned[i][j][0], turned[i][j][1]);
    }
    // Columns 2 t and 2 t + 1: heads of vhead t / 2 of the two. An even lane writes all heads of token g, its neighbour of g + 8.
    const bool odd = t % 2 != 0;
    const int own_token = first + g + (odd ? 8 : 0);
    float2 inverse[kPairs];
    uint2* to[kPairs];
    int left[kPairs];  // tokens from own_token on
#pragma unroll
    for (int i = 0; i < kPairs; ++i) {
      const int vhead = v + 2 * i + t / 2;
      const float2 unit = __ldg(reinterpret_cast<const float2*>(memory.unit + (item + min(vhead, here - 1)) * kLookupLanes) + t % 2);
      inverse[i] = make_float2(unit.x > 0 ? 1 / unit.x : 0.0f, unit.y > 0 ? 1 / unit.y : 0.0f);
      to[i] = static_cast<uint2*>(memory.center) + (item + vhead) * memory.padded + own_token;
      left[i] = vhead < here ? end - own_token : 0;
    }
#pragma unroll 2
    for (int tile = 0; tile < kCenterTiles; ++tile) {
      float sums[kPairs][4] = {};
#pragma unroll
      for (int s = 0; s < kCenterSteps; ++s) {
        const uint4 x = offsets[(tile * kCenterSteps + s) * 32 + lane];
        const uint32_t a[4] = {x.x, x.y, x.z, x.w};
#pragma unroll
        for (int i = 0; i < kPairs; ++i) multiply(sums[i], a, b[i][s][0], b[i][s][1]);
      }
#pragma unroll
      for (int i = 0; i < kPairs; ++i) {
        uint32_t words[2];  // two heads of tokens g and g + 8
#pragma unroll
        for (int r = 0; r < 2; ++r)
          words[r] = __byte_perm(fixed(sums[i][2 * r], inverse[i].x), fixed(sums[i][2 * r + 1], inverse[i].y), 0x5410);
        const uint32_t other = __shfl_xor_sync(~0u, odd ? words[0] : words[1], 1);
        if (tile * 16 < left[i]) to[i][tile * 16] = odd ? make_uint2(other, words[1]) : make_uint2(words[0], other);
      }
    }
  }
}

// The same for any rotary table, in float32: a thread a (token, head).
__device__ void score_center_plain(const gsrq_layer& layer, const gsrq_call& call, const LookupMemory& memory,
                                   const Work& work, int block) {
  const CenterBlock own(layer, call, memory, work, block);
  if (own.begin >= own.end) return;
  const int half = layer.half_rope, here = own.here, pairs = max(half, kCenterPairs);
  wait_for_previous();
  for (int i = threadIdx.x; i < (own.end - own.begin) * here * kLookupLanes; i += kThreads) {
    const int h = i % kLookupLanes, v = i / kLookupLanes % here, token = own.begin + i / (kLookupLanes * here);
    const int64_t at = static_cast<int64_t>(own.range.first + token) * half;
    const int64_t item = static_cast<int64_t>(own.row) * work.vheads + own.first_vhead + v;
    float sum = memory.rest[item * kLookupLanes + h];
    for (int p = 0; p < half; ++p) {
      const float2 x = memory.drifts[(item * pairs + p) * kLookupLanes + h];
      sum += x.x * __ldg(layer.cos + at + p) + x.y * __ldg(layer.sin + at + p);
    }
    static_cast<float*>(memory.center)[(item * memory.padded + token) * kLookupLanes + h] = sum;
  }
}

template <int Steps, bool Exact>
__global__ void __launch_bounds__(kThreads, 3)
    prepare_kernel(const __grid_constant__ gsrq_layer layer, const __grid_constant__ gsrq_call call,
                   const __grid_constant__ LookupPlan plan, LookupMemory memory, const __grid_constant__ Work work) {
  int block = blockIdx.x;
  let_next_begin();
  if (block < work.tables) {
    fill_tables<Steps, Exact>(layer, call, plan, memory, work, block);
    return;  // it waited
  }
  block -= work.tables;
  if (block >= work.centers && work.wide_exact)
    attend_exact_wide(layer, call, plan.head, memory.parts, work.vheads, work.splits, block - work.centers);
  else if (block >= work.centers)
    attend_exact<kLookupLanes>(layer, call, plan.head, memory.parts, work.vheads, work.splits, block - work.centers);
  else if (work.with_offsets && layer.half_rope == kCenterPairs) score_center<true>(layer, call, memory, work, block);
  else if (work.with_offsets) score_center<false>(layer, call, memory, work, block);
  else score_center_plain(layer, call, memory, work, block);
  wait_for_previous();  // also where there was nothing to do
}

}  // namespace

int prepare_rows(const gsrq_layer& layer, const gsrq_call& call, const LookupPlan& plan, const LookupMemory& memory,
                   cudaStream_t stream) {
  const int64_t vheads = static_cast<int64_t>(layer.kv_heads) * plan.head.parts, batch = call.batch;
  const int d = layer.head_dim;
  Work work{};
  work.vheads = static_cast<int>(vheads);
  work.with_offsets = center_is_fixed(layer);
  work.wide_exact = exact_is_wide(layer, call);
  work.center_heads = kCenterHeads;
  work.table_codes = batch > kTableRows ? kManyTableCodes : kFewTableCodes;
  work.splits = exact_splits(layer);
  const int64_t centers =
      (memory.padded + kCenterTokens - 1) / kCenterTokens * ((vheads + work.center_heads - 1) / work.center_heads) * batch;
  const int64_t tables =
      kCodewords / work.table_codes * plan.key_parts * vheads * ((batch + kTableRows - 1) / kTableRows);
  const int64_t exact = work.splits * vheads * batch;
  if (batch > 65535 || centers + tables + exact > INT32_MAX)
    return fail("decode: %lld rows are too many", static_cast<long long>(batch));
  work.tables = static_cast<int>(tables);
  work.centers = static_cast<int>(centers);
  work.exact = static_cast<int>(exact);
  const int center_bytes = static_cast<int>(kCenterHeads * kCenterPairs * kLookupLanes * sizeof(float2) +
                                            kCenterTiles * kCenterSteps * 32 * sizeof(uint4));
  const int bytes = std::max({4 * kTablePairs * (d + kPad), center_bytes, exact_bytes(d)});
  const auto kernel = plan.key_width == 128   ? prepare_kernel<8, true>
                      : plan.key_width < 128 ? prepare_kernel<8, false>
                                             : prepare_kernel<16, false>;
  if (cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes) != cudaSuccess)
    return launched("prepare_lookup");
  turn_queries<<<dim3(static_cast<unsigned>(vheads), static_cast<unsigned>(batch)), kThreads, 0, stream>>>(layer, call, plan,
                                                                                                          memory);
  if (launched("turn_queries")) return 1;
  launch(true, kernel, static_cast<unsigned>(centers + tables + exact), kThreads, bytes, stream, layer, call, plan, memory,
         work);
  return launched("prepare_lookup");
}

}  // namespace gsrq::cuda::decoding
