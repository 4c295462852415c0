// What a query is multiplied with once, before the coded tokens of a cache in the rotated frame are scored; and the row's exact
// tokens, which wait for nothing.
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
constexpr float kCenterMargin = 1.01f;  // rounding of the product and of tables beside the bound
static_assert(kThreads / 32 == kPartSlots, "a warp fills one slot's tables");
static_assert(kThreads / 32 == kCenterHeads, "a warp bounds one vhead's scores");
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

// fn(T{}): with the type in hand loads are free of branches, so that many are under way at once.
template <class Fn>
__device__ inline void with_type(int dtype, const Fn& fn) {
  if (dtype == GSRQ_F32) fn(float{});
  else if (dtype == GSRQ_F16) fn(__half{});
  else fn(__nv_bfloat16{});
}

__device__ inline float to_float(float x) { return x; }
__device__ inline float to_float(__half x) { return __half2float(x); }
__device__ inline float to_float(__nv_bfloat16 x) { return __bfloat162float(x); }

// Cosine and sine of a pair at a position.
__device__ inline float2 rotation(const gsrq_layer& layer, int position, int p) {
  if (p >= layer.half_rope) return make_float2(1, 0);
  const int64_t at = static_cast<int64_t>(position) * layer.half_rope + p;
  return make_float2(__ldg(layer.cos + at), __ldg(layer.sin + at));
}

__device__ inline float2 turned(float x, float y, float2 by) { return make_float2(x * by.x - y * by.y, y * by.x + x * by.y); }

// In units of log2 save where softcap needs it plain.
__device__ inline float query_scale(const gsrq_layer& layer) { return layer.scale * (layer.softcap > 0 ? 1.0f : kLog2e); }

// Where head h of a vhead's query begins; -1: there is none.
__device__ inline int64_t query_at(const gsrq_layer& layer, const LookupPlan& plan, int row, int vhead, int h) {
  const int kv_head = vhead / plan.head.parts, head = vhead % plan.head.parts * plan.head.part_heads + h;
  if (h >= plan.head.part_heads || head >= plan.head.group) return -1;
  return (static_cast<int64_t>(row) * layer.heads + static_cast<int64_t>(kv_head) * plan.head.group + head) * layer.head_dim;
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
  __shared__ int positions[kTableRows];  // -1: no query
  if (thread < kTableRows)
    positions[thread] =
        thread < rows && call.new_lengths[first_row + thread] > 0 ? position_of(call, first_row + thread) : -1;

  const bool real = slot < plan.key_slots;  // slots past the last are zeros
  const int used = real ? slot : 0, of_head = used / layer.keys.stages * plan.key_width;
  const int64_t element = static_cast<int64_t>(kv_head) * d + of_head, width = layer.keys.width;
  const __half* const first_word =
      static_cast<const __half*>(layer.keys.codewords) +
      ((element / width * layer.keys.stages + used % layer.keys.stages) * kCodewords + first_code) * width + element % width;
  if (real)
    for (int i = lane; i < work.table_codes; i += 32)
      for (int at = 0; at < plan.key_width; at += 64) prefetch(first_word + i * width + at);
  __syncthreads();

  // A warp turns one head of every second row.
  const float scale = query_scale(layer);
  with_type(call.dtype, [&](auto type) {
    using T = decltype(type);
    const int h = warp % kLookupLanes, row_step = layer.heads * d;
    const int64_t base = query_at(layer, plan, first_row, vhead, h);
    for (int p = lane; p < d / 2; p += 32) {
      int e0, e1;
      pair_elements(layer, p, &e0, &e1);
      const T* const from = static_cast<const T*>(call.query) + max(base, static_cast<int64_t>(0)) + e0;
#pragma unroll 4
      for (int row = warp / kLookupLanes; row < 2 * tiles; row += 2) {
        const int position = positions[row];
        const T* const own = from + min(row, rows - 1) * row_step;
        const float by = base >= 0 && position >= 0 ? scale : 0.0f;
        const float2 q = turned(to_float(__ldg(own)) * by, to_float(__ldg(own + (e1 - e0))) * by,
                                rotation(layer, max(position, 0), p));
        const __half x = __float2half_rn(q.x), y = __float2half_rn(q.y);
        const int to = (row * kLookupLanes + h) * pitch;
        high[to + e0] = x;
        high[to + e1] = y;
        low[to + e0] = __float2half_rn(q.x - __half2float(x));
        low[to + e1] = __float2half_rn(q.y - __half2float(y));
      }
    }
  });
  __syncthreads();

  const __half* const words = first_word + g * width + 2 * t;
  const int64_t below = 8 * width, slots = static_cast<int64_t>(plan.key_parts) * kPartSlots;
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
        float* const to = memory.tables +
                          (((static_cast<int64_t>(first_row) + row) * vheads + vhead) * slots + slot) *
                              (kCodewords * kLookupLanes) +
                          (first_code + code + g) * kLookupLanes + t % 2 * 2;
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

// q . RoPE_t(m) = sum over pairs of u cos(t) + v sin(t): u and v as [vheads][pairs][4 heads]. rests: of pairs that do not turn;
// bounds: of the sum's absolute value, rest and all. A warp a vhead.
__device__ inline void turn_center(const gsrq_layer& layer, const gsrq_call& call, const LookupPlan& plan,
                                   const CenterBlock& work, int pairs, float2* drifts, float (*rests)[kLookupLanes],
                                   float (*bounds)[kLookupLanes]) {
  const int half = layer.half_rope, d = layer.head_dim, position = position_of(call, work.row);
  const float scale = query_scale(layer);
  const auto drift = [&](const auto* query, int vhead, int h, int e0, int e1, float2 by) {
    const int64_t base = query_at(layer, plan, work.row, vhead, h);
    const auto* const from = query + max(base, static_cast<int64_t>(0));
    const float* const m = layer.key_center + static_cast<int64_t>(vhead / plan.head.parts) * d;
    const float mx = __ldg(m + e0), my = __ldg(m + e1), own = base < 0 ? 0.0f : scale;
    const float2 q = turned(to_float(__ldg(from + e0)) * own, to_float(__ldg(from + e1)) * own, by);
    return make_float2(q.x * mx + q.y * my, q.y * mx - q.x * my);
  };
  with_type(call.dtype, [&](auto type) {
    const auto* const query = static_cast<const decltype(type)*>(call.query);
    for (int i = threadIdx.x; i < pairs * kLookupLanes; i += kThreads) {
      const int h = i % kLookupLanes, p = i / kLookupLanes;
      int e0 = 0, e1 = 1;
      if (p < half) pair_elements(layer, p, &e0, &e1);
      const float2 by = rotation(layer, position, max(min(p, half - 1), 0));
#pragma unroll 4
      for (int v = 0; v < work.here; ++v) {
        const float2 x = drift(query, work.first_vhead + v, h, e0, e1, by);
        drifts[v * pairs * kLookupLanes + i] = p < half ? x : make_float2(0, 0);
      }
    }
  });
  __syncthreads();
  const int v = threadIdx.x / 32, lane = threadIdx.x % 32, h = lane % kLookupLanes;
  if (v < work.here) {
    float rest = 0, bound = 0;
    for (int p = lane / kLookupLanes; p < half; p += 32 / kLookupLanes) {
      const float2 x = drifts[(v * pairs + p) * kLookupLanes + h];
      bound += sqrtf(x.x * x.x + x.y * x.y) * fabsf(__ldg(layer.cos + p));  // position 0: the table's scale
    }
    with_type(call.dtype, [&](auto type) {
      const auto* const query = static_cast<const decltype(type)*>(call.query);
      for (int p = half + lane / kLookupLanes; p < d / 2; p += 32 / kLookupLanes) {
        int e0, e1;
        pair_elements(layer, p, &e0, &e1);
        rest += drift(query, work.first_vhead + v, h, e0, e1, make_float2(1, 0)).x;
      }
    });
#pragma unroll
    for (int o = kLookupLanes; o < 32; o *= 2) {
      rest += __shfl_xor_sync(~0u, rest, o);
      bound += __shfl_xor_sync(~0u, bound, o);
    }
    if (lane < kLookupLanes) {
      rests[v][h] = rest;
      bounds[v][h] = bound + fabsf(rest);
    }
  }
  __syncthreads();
}

// Two scores as integers of `unit` beside kCenterZero, 16 bits each. `inverse`: 1 / unit.
__device__ inline uint32_t fixed_pair(float2 x, float2 inverse) {
  const auto one = [](float v) {  // the low bits of a float of 2^23 or more are an integer
    return __float_as_uint(fminf(fmaxf(v, -kCenterMost), kCenterMost) + kCenterZero);
  };
  return __byte_perm(one(x.x * inverse.x), one(x.y * inverse.y), 0x5410);
}

// A warp takes 128 tokens: their offsets from the first are constant, so the matrix of their cosines and sines, as float16, lies
// in shared memory, and the first token's row turns u and v. A product's columns are the heads of two vheads; two products share
// a read of the matrix.
__device__ void score_center(const gsrq_layer& layer, const gsrq_call& call, const LookupPlan& plan,
                             const LookupMemory& memory, const Work& work, int block) {
  constexpr int kPairs = 2;  // of vheads that are scored together
  const CenterBlock own(layer, call, memory, work, block);
  if (own.begin >= own.end) return;
  const int here = own.here, end = own.end, half = layer.half_rope;
  const int thread = threadIdx.x, warp = thread / 32, lane = thread % 32, g = lane / 4, t = lane % 4;
  const int64_t item = static_cast<int64_t>(own.row) * work.vheads + own.first_vhead;
  uint4* const offsets = reinterpret_cast<uint4*>(shared_memory);  // [tiles][steps][32]
  float2* const drifts = reinterpret_cast<float2*>(offsets + kCenterTiles * kCenterSteps * 32);  // [vheads][pairs][4]
  __shared__ __align__(16) float rests[kCenterHeads][kLookupLanes], units[kCenterHeads][kLookupLanes];
  const int first = own.begin + warp * kCenterTiles * 16;
  const int64_t at = static_cast<int64_t>(own.range.first + first) * half;
  if (first < end && lane < 2 * half / 32 + 2) {
    const int p = min(lane / 2 * 32, half - 1);
    prefetch((lane % 2 ? layer.sin : layer.cos) + at + p);
  }
  for (int i = thread; i < kCenterTiles * kCenterSteps * 32; i += kThreads) offsets[i] = __ldg(memory.offsets + i);
  for (int i = here * kCenterPairs * kLookupLanes + thread; i < kCenterHeads * kCenterPairs * kLookupLanes; i += kThreads)
    drifts[i] = make_float2(0, 0);
  turn_center(layer, call, plan, own, kCenterPairs, drifts, rests, units);
  if (thread < here * kLookupLanes) {
    float* const unit = &units[0][0] + thread;
    *unit *= kCenterMargin / kCenterMost;
    if (own.stretch == 0) memory.unit[item * kLookupLanes + thread] = *unit;
  }
  __syncthreads();
  if (first >= end) return;
#pragma unroll 1
  for (int v = 0; v < here; v += 2 * kPairs) {
    uint32_t b[kPairs][kCenterSteps][2];
#pragma unroll
    for (int s = 0; s < kCenterSteps; ++s) {
      float turned[kPairs][2][2];
#pragma unroll
      for (int k = 0; k < 2; ++k) {
        const int pair = 8 * s + 2 * t + k;
        const int64_t place = at + min(pair, half - 1);  // drifts past it are zero
        const float c = __ldg(layer.cos + place), d = __ldg(layer.sin + place);
#pragma unroll
        for (int i = 0; i < kPairs; ++i) {
          const float2 x = drifts[((v + 2 * i + g / kLookupLanes) * kCenterPairs + pair) * kLookupLanes + g % kLookupLanes];
          turned[i][0][k] = x.x * c + x.y * d;
          turned[i][1][k] = x.y * c - x.x * d;
        }
      }
#pragma unroll
      for (int i = 0; i < kPairs; ++i)
#pragma unroll
        for (int j = 0; j < 2; ++j) b[i][s][j] = packed(turned[i][j][0], turned[i][j][1]);
    }
    // Columns 2 t and 2 t + 1: heads of vhead t / 2 of the two.
    float2 rest[kPairs], inverse[kPairs];
#pragma unroll
    for (int i = 0; i < kPairs; ++i) {
      const int vhead = min(v + 2 * i + t / 2, here - 1), h = t % 2 * 2;
      const float2 unit = *reinterpret_cast<const float2*>(&units[vhead][h]);
      rest[i] = *reinterpret_cast<const float2*>(&rests[vhead][h]);
      inverse[i] = make_float2(unit.x > 0 ? 1 / unit.x : 0.0f, unit.y > 0 ? 1 / unit.y : 0.0f);
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
          words[r] = fixed_pair(make_float2(sums[i][2 * r] + rest[i].x, sums[i][2 * r + 1] + rest[i].y), inverse[i]);
        // An even lane takes all heads of token g, its neighbour of token g + 8.
        const bool odd = t % 2 != 0;
        const uint32_t other = __shfl_xor_sync(~0u, odd ? words[0] : words[1], 1);
        const int vhead = v + 2 * i + t / 2, token = first + tile * 16 + g + (odd ? 8 : 0);
        if (vhead < here && token < end)
          static_cast<uint2*>(memory.center)[(item + vhead) * memory.padded + token] =
              odd ? make_uint2(other, words[1]) : make_uint2(words[0], other);
      }
    }
  }
}

// The same for any rotary table, in float32: a thread a (token, head).
__device__ void score_center_plain(const gsrq_layer& layer, const gsrq_call& call, const LookupPlan& plan,
                                   const LookupMemory& memory, const Work& work, int block) {
  const CenterBlock own(layer, call, memory, work, block);
  if (own.begin >= own.end) return;
  const int half = layer.half_rope, here = own.here, pairs = max(half, 1);
  float2* const drifts = reinterpret_cast<float2*>(shared_memory);  // [vheads][pairs][4]
  __shared__ float rests[kCenterHeads][kLookupLanes], bounds[kCenterHeads][kLookupLanes];
  turn_center(layer, call, plan, own, pairs, drifts, rests, bounds);
  for (int i = threadIdx.x; i < (own.end - own.begin) * here * kLookupLanes; i += kThreads) {
    const int h = i % kLookupLanes, v = i / kLookupLanes % here, token = own.begin + i / (kLookupLanes * here);
    const int64_t at = static_cast<int64_t>(own.range.first + token) * half;
    float sum = rests[v][h];
    for (int p = 0; p < half; ++p) {
      const float2 x = drifts[(v * pairs + p) * kLookupLanes + h];
      sum += x.x * __ldg(layer.cos + at + p) + x.y * __ldg(layer.sin + at + p);
    }
    const int64_t item = static_cast<int64_t>(own.row) * work.vheads + own.first_vhead + v;
    static_cast<float*>(memory.center)[(item * memory.padded + token) * kLookupLanes + h] = sum;
  }
}

template <int Steps, bool Exact>
__global__ void __launch_bounds__(kThreads, 3)
    prepare_kernel(const __grid_constant__ gsrq_layer layer, const __grid_constant__ gsrq_call call,
                   const __grid_constant__ LookupPlan plan, LookupMemory memory, const __grid_constant__ Work work) {
  int block = blockIdx.x;
  let_next_begin();
  if (block < work.tables) return fill_tables<Steps, Exact>(layer, call, plan, memory, work, block);
  block -= work.tables;
  if (block >= work.centers && work.wide_exact)
    attend_exact_wide(layer, call, plan.head, memory.parts, work.vheads, work.splits, block - work.centers);
  else if (block >= work.centers)
    attend_exact<kLookupLanes>(layer, call, plan.head, memory.parts, work.vheads, work.splits, block - work.centers);
  else if (work.with_offsets) score_center(layer, call, plan, memory, work, block);
  else score_center_plain(layer, call, plan, memory, work, block);
}

// Block: a tile; thread: a lane's fragment of a step. Scaled tables: the scale is the first row's cosine.
__global__ void offsets_kernel(const __grid_constant__ gsrq_layer layer, uint4* offsets) {
  const int i = threadIdx.x, lane = i % 32, s = i / 32, half = layer.half_rope;
  uint32_t words[4];
  for (int j = 0; j < 4; ++j) {
    const int position = min(static_cast<int>(blockIdx.x) * 16 + lane / 4 + 8 * (j % 2), layer.positions - 1);
    float x[2];
    for (int k = 0; k < 2; ++k) {
      const int p = 8 * s + 2 * (lane % 4) + k;
      x[k] = p < half ? (j < 2 ? layer.cos : layer.sin)[static_cast<int64_t>(position) * half + p] / layer.cos[p] : 0.0f;
    }
    words[j] = packed(x[0], x[1]);
  }
  offsets[blockIdx.x * blockDim.x + i] = make_uint4(words[0], words[1], words[2], words[3]);
}

}  // namespace

bool center_is_fixed(const gsrq_layer& layer) {
  return layer.geometric && layer.half_rope > 0 && layer.half_rope <= kCenterPairs;
}

int fill_offsets(const gsrq_layer& layer, uint4* offsets, cudaStream_t stream) {
  if (!center_is_fixed(layer)) return 0;
  offsets_kernel<<<kCenterTiles, 32 * kCenterSteps, 0, stream>>>(layer, offsets);
  return launched("fill_offsets");
}

int prepare_lookup(const gsrq_layer& layer, const gsrq_call& call, const LookupPlan& plan, const LookupMemory& memory,
                   cudaStream_t stream) {
  const int64_t vheads = static_cast<int64_t>(layer.kv_heads) * plan.head.parts, batch = call.batch;
  const int d = layer.head_dim, pairs = std::max(layer.half_rope, kCenterPairs);
  Work work{};
  work.vheads = static_cast<int>(vheads);
  work.with_offsets = center_is_fixed(layer);
  work.wide_exact = exact_is_wide(layer, call);
  work.center_heads = std::min(kCenterHeads, std::max(kCenterHeads * kCenterPairs / pairs, 1));
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
  const int center_bytes = static_cast<int>(work.center_heads * pairs * kLookupLanes * sizeof(float2)) +
                           (work.with_offsets ? kCenterTiles * kCenterSteps * 32 * static_cast<int>(sizeof(uint4)) : 0);
  const int bytes = std::max({4 * kTablePairs * (d + kPad), center_bytes, exact_bytes(d)});
  const auto kernel = plan.key_width == 128   ? prepare_kernel<8, true>
                      : plan.key_width < 128 ? prepare_kernel<8, false>
                                             : prepare_kernel<16, false>;
  if (cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes) != cudaSuccess)
    return launched("prepare_lookup");
  launch(false, kernel, static_cast<unsigned>(centers + tables + exact), kThreads, bytes, stream, layer, call, plan, memory,
         work);
  return launched("prepare_lookup");
}

}  // namespace gsrq::cuda::decoding
