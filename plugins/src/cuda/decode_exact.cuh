// Attention over the exact tokens of a decoding row: sinks, the window, the new token.
#pragma once

#include "decode_common.cuh"
#include "mma.cuh"

namespace gsrq::cuda::decoding {

constexpr int kCombineThreads = 256;
constexpr int kExactTokens = 32;  // of a block

// Shared memory of attend_exact.
inline int exact_bytes(int head_dim) { return 4 * (8 * head_dim + 2 * kExactTokens * (head_dim + 8)); }

// The exact tokens that a row's query sees, in order: sinks, then the newest, the new one last.
struct ExactTokens {
  int past, first_recent, lowest;  // lowest: the first that a sliding window leaves visible
  int sinks, count;
  __device__ ExactTokens(const gsrq_layer& layer, const gsrq_call& call, int row) {
    past = static_cast<int>(max(min(call.past_lengths[row], call.max_total - 1), static_cast<int64_t>(0)));
    const int total = past + 1;
    first_recent = layer.sinks + gsrq_coded32(total, layer.sinks, layer.window, layer.block);
    sinks = min(layer.sinks, total);
    count = sinks + max(total - first_recent, 0);
    lowest = layer.sliding_window > 0 ? total - layer.sliding_window : 0;
  }
  __device__ int token(int i) const { return i < sinks ? i : first_recent + i - sinks; }
};

// Where cached exact tokens lie, as gsrq_slot32 says, with one division for all of them.
struct ExactSlots {
  int sinks, ring, first_place;  // the layer's sinks; first_place: of the first recent token, in the ring
  __device__ ExactSlots(const gsrq_layer& layer, const ExactTokens& exact)
      : sinks(layer.sinks),
        ring(layer.window + layer.block),
        first_place(static_cast<uint32_t>(exact.first_recent - layer.sinks) % static_cast<uint32_t>(ring)) {}
  __device__ int count() const { return sinks + ring; }
  __device__ int of(const ExactTokens& exact, int i) const {
    int place = first_place + i - exact.sinks;
    if (place >= ring) place -= ring;
    return i < exact.sinks ? i : sinks + place;
  }
};

// What a block has: up to 32 of the exact tokens of one (row, vhead).
struct ExactShare {
  int row, heads, first;  // heads: query heads of the vhead; first: of the tokens, in their order
  int64_t head_row, first_query, at;  // vectors before those of the KV head and of its query heads; where the results go
  __device__ ExactShare(const gsrq_layer& layer, const DecodePlan& plan, int vheads, int splits, int block) {
    const int split = block % splits, vhead = block / splits % vheads;
    const int kv_head = vhead / plan.parts, part = vhead % plan.parts;
    row = block / (splits * vheads);
    heads = min(plan.part_heads, plan.group - part * plan.part_heads);
    first = split * kExactTokens;
    head_row = static_cast<int64_t>(row) * layer.kv_heads + kv_head;
    first_query = static_cast<int64_t>(row) * layer.heads + kv_head * plan.group + part * plan.part_heads;
    at = (static_cast<int64_t>(row) * vheads + vhead) * splits + split;
  }
};

// Two consecutive 16-bit elements.
__device__ inline float2 load_pair(uint32_t word, int dtype) {
  return dtype == GSRQ_F16 ? __half22float2(*reinterpret_cast<const __half2*>(&word))
                           : make_float2(__uint_as_float(word << 16), __uint_as_float(word & 0xffff0000));
}

// Eight consecutive elements, 16-bit ones.
__device__ inline void load_eight(const void* data, int64_t at, int dtype, float (&to)[8]) {
  const uint4 words = __ldg(reinterpret_cast<const uint4*>(static_cast<const uint16_t*>(data) + at));
  const uint32_t pairs[4] = {words.x, words.y, words.z, words.w};
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const float2 x = load_pair(pairs[i], dtype);
    to[2 * i] = x.x;
    to[2 * i + 1] = x.y;
  }
}

// Up to 32 exact tokens of one (row, vhead): their weighted values, reference and sum.
template <int Lanes>
__device__ void attend_exact(const gsrq_layer& layer, const gsrq_call& call, const DecodePlan& plan, const Memory& memory,
                             int vheads, int splits, int block) {
  const ExactShare own(layer, plan, vheads, splits, block);
  const int d = layer.head_dim, half = layer.half_rope, thread = threadIdx.x, warp = thread / 32, lane = thread % 32;
  if (call.new_lengths[own.row] <= 0) return;
  const ExactTokens exact(layer, call, own.row);
  const int first = own.first, here = min(kExactTokens, exact.count - first);
  if (here <= 0) return;
  const int pitch = d + 8;
  float* const queries = reinterpret_cast<float*>(shared_memory);  // [8][d], turned and scaled, pair by pair
  float* const keys = queries + 8 * d;                             // [32][pitch], later the second half of the sums
  float* const values = keys + kExactTokens * pitch;               // [32][pitch]
  __shared__ float weights[8][kExactTokens];
  __shared__ int64_t place[kExactTokens];  // of the token's vector, in vectors; -1: the new token
  const float scale = query_scale(layer);
  const int64_t slots = gsrq_exact_slots(layer.sinks, layer.window, layer.block);
  if (thread < here) {
    const int token = exact.token(first + thread);
    place[thread] = token == exact.past ? -1 : own.head_row * slots + gsrq_slot32(token, layer.sinks, layer.window, layer.block);
  }
  for (int i = thread; i < Lanes * (d / 2); i += kCombineThreads) {
    const int h = i / (d / 2), p = i % (d / 2);
    float x = 0, y = 0;
    if (h < own.heads) {
      int e0, e1;
      pair_elements(layer, p, &e0, &e1);
      const int64_t base = (own.first_query + h) * d;
      x = load_constant(call.query, base + e0, call.dtype) * scale;
      y = load_constant(call.query, base + e1, call.dtype) * scale;
    }
    const int64_t table = static_cast<int64_t>(exact.past) * half + p;
    const float c = p < half ? __ldg(layer.cos + table) : 1.0f, s = p < half ? __ldg(layer.sin + table) : 0.0f;
    queries[h * d + 2 * p] = x * c - y * s;
    queries[h * d + 2 * p + 1] = y * c + x * s;
  }
  __syncthreads();

  // Eight pairs at a time where 16-bit vectors can be read in pieces of 16 bytes, else one.
  const bool pieces = call.exact_dtype != GSRQ_F32 && d % 16 == 0 && half % 8 == 0;
  const int step = pieces ? 8 : 1, steps = d / 2 / step;
  for (int i = thread; i < here * steps; i += kCombineThreads) {
    const int n = i / steps, p = (i - n * steps) * step;
    const int64_t at = place[n] * d, fresh = own.head_row * d, table = static_cast<int64_t>(exact.token(first + n)) * half + p;
    float* const key = keys + n * pitch + 2 * p;
    float* const value = values + n * pitch + 2 * p;
    const bool is_new = place[n] < 0;
    if (pieces && (!is_new || call.dtype != GSRQ_F32)) {
      const void* const from[2] = {is_new ? call.key : call.key_exact, is_new ? call.value : call.value_exact};
      const int64_t base = is_new ? fresh : at;
      const int type = is_new ? call.dtype : call.exact_dtype;
      int e0, e1;
      pair_elements(layer, p, &e0, &e1);
      const bool adjacent = e1 == e0 + 1;
      float x[8], y[8], v[16];
      load_eight(from[0], base + e0, type, x);
      load_eight(from[0], base + (adjacent ? e0 + 8 : e1), type, y);
      load_eight(from[1], base + 2 * p, type, *reinterpret_cast<float(*)[8]>(v));
      load_eight(from[1], base + 2 * p + 8, type, *reinterpret_cast<float(*)[8]>(v + 8));
      if (type != call.exact_dtype) {  // as the cache will have them
#pragma unroll
        for (int j = 0; j < 8; ++j) {
          x[j] = rounded(x[j], call.exact_dtype), y[j] = rounded(y[j], call.exact_dtype);
          v[j] = rounded(v[j], call.exact_dtype), v[8 + j] = rounded(v[8 + j], call.exact_dtype);
        }
      }
      if (adjacent) {
        float z[16];
#pragma unroll
        for (int j = 0; j < 8; ++j) z[j] = x[j], z[8 + j] = y[j];
#pragma unroll
        for (int j = 0; j < 8; ++j) x[j] = z[2 * j], y[j] = z[2 * j + 1];
      }
#pragma unroll
      for (int j = 0; j < 8; j += 2) {
        const bool turns = p < half;
        const float c0 = turns ? __ldg(layer.cos + table + j) : 1.0f, s0 = turns ? __ldg(layer.sin + table + j) : 0.0f;
        const float c1 = turns ? __ldg(layer.cos + table + j + 1) : 1.0f, s1 = turns ? __ldg(layer.sin + table + j + 1) : 0.0f;
        *reinterpret_cast<float4*>(key + 2 * j) = make_float4(x[j] * c0 - y[j] * s0, y[j] * c0 + x[j] * s0,
                                                              x[j + 1] * c1 - y[j + 1] * s1, y[j + 1] * c1 + x[j + 1] * s1);
        *reinterpret_cast<float4*>(value + 2 * j) = make_float4(v[2 * j], v[2 * j + 1], v[2 * j + 2], v[2 * j + 3]);
      }
      continue;
    }
#pragma unroll 1
    for (int j = 0; j < step; ++j) {
      int e0, e1;
      pair_elements(layer, p + j, &e0, &e1);
      float x, y, v0, v1;
      if (is_new) {
        x = rounded(load_constant(call.key, fresh + e0, call.dtype), call.exact_dtype);
        y = rounded(load_constant(call.key, fresh + e1, call.dtype), call.exact_dtype);
        v0 = rounded(load_constant(call.value, fresh + 2 * (p + j), call.dtype), call.exact_dtype);
        v1 = rounded(load_constant(call.value, fresh + 2 * (p + j) + 1, call.dtype), call.exact_dtype);
      } else {
        x = load_constant(call.key_exact, at + e0, call.exact_dtype);
        y = load_constant(call.key_exact, at + e1, call.exact_dtype);
        v0 = load_constant(call.value_exact, at + 2 * (p + j), call.exact_dtype);
        v1 = load_constant(call.value_exact, at + 2 * (p + j) + 1, call.exact_dtype);
      }
      const bool turns = p + j < half;
      const float c = turns ? __ldg(layer.cos + table + j) : 1.0f, s = turns ? __ldg(layer.sin + table + j) : 0.0f;
      key[2 * j] = x * c - y * s;
      key[2 * j + 1] = y * c + x * s;
      value[2 * j] = v0;
      value[2 * j + 1] = v1;
    }
  }
  __syncthreads();

  {  // eight threads a token
    const int n = thread / 8, j = thread % 8;
    float dots[Lanes] = {};
    if (n < here)
      for (int e = j; e < d; e += 8) {
        const float k = keys[n * pitch + e];
#pragma unroll
        for (int h = 0; h < Lanes; ++h)
          dots[h] += queries[h * d + e] * k;
      }
#pragma unroll
    for (int h = 0; h < Lanes; ++h) {
#pragma unroll
      for (int o = 4; o > 0; o /= 2) dots[h] += __shfl_xor_sync(~0u, dots[h], o);
      if (j == h && n < here) {
        const float s = layer.softcap > 0 ? layer.softcap * tanhf(dots[h] / layer.softcap) * kLog2e : dots[h];
        weights[h][n] = exact.token(first + n) >= exact.lowest ? s : kNone;
      }
    }
  }
  __syncthreads();
  if (warp < Lanes) {  // one warp a head
    const float s = lane < here ? weights[warp][lane] : kNone;
    float most = s;
    for (int o = 16; o > 0; o /= 2) most = fmaxf(most, __shfl_xor_sync(~0u, most, o));
    const float w = s == kNone ? 0.0f : exp2f(s - most);
    float sum = w;
    for (int o = 16; o > 0; o /= 2) sum += __shfl_xor_sync(~0u, sum, o);
    weights[warp][lane] = w;
    if (lane == 0) memory.exact_state[own.at * Lanes + warp] = make_float2(most, sum);
  }
  __syncthreads();

  // A thread has one dim of all heads, of every groups-th token; groups are added in order.
  const int groups = kCombineThreads / d > 1 ? 2 : 1, group = thread / d, e = thread % d;
  float out[Lanes] = {};
  if (group < groups)
#pragma unroll 4
    for (int i = group; i < here; i += groups) {
      const float x = values[i * pitch + e];
#pragma unroll
      for (int h = 0; h < Lanes; ++h)
        out[h] += weights[h][i] * x;
    }
  if (group == 1 && groups == 2)
    for (int h = 0; h < Lanes; ++h)
      keys[h * d + e] = out[h];
  __syncthreads();
  if (group == 0)
#pragma unroll
    for (int h = 0; h < Lanes; ++h)
      memory.exact[(own.at * Lanes + h) * d + e] = out[h] + (groups == 2 ? keys[h * d + e] : 0.0f);
}

// What attend_exact_wide takes: the usual head, all in one 16-bit type.
inline bool exact_is_wide(const gsrq_layer& layer, const gsrq_call& call) {
  return layer.head_dim == 128 && layer.half_rope == 64 && !layer.rope_interleaved && call.exact_dtype != GSRQ_F32 &&
         call.dtype == call.exact_dtype && reinterpret_cast<uintptr_t>(call.query) % 4 == 0 &&
         (reinterpret_cast<uintptr_t>(layer.cos) | reinterpret_cast<uintptr_t>(layer.sin)) % 8 == 0;
}

// Lanes 2 N apart give each other half of their 2 N entries, and add.
template <int N>
__device__ inline void exchange(float (&x)[16], int lane) {
  const bool upper = (lane & (2 * N)) != 0;
#pragma unroll
  for (int i = 0; i < N; ++i) {
    const float given = upper ? x[i] : x[i + N], kept = upper ? x[i + N] : x[i];
    x[i] = kept + __shfl_xor_sync(~0u, given, 2 * N);
  }
}

// Two consecutive elements: float16, or bfloat16.
template <bool Half>
__device__ inline float2 unpacked(uint32_t word) {
  return load_pair(word, Half ? GSRQ_F16 : GSRQ_BF16);
}

// Four query heads of 128 dims, turned to the new token's position: a lane has pairs 2 lane and 2 lane + 1.
template <bool Half>
struct WideQuery {
  float q[4][4];  // [head]: both pairs' first elements, then their second ones
  __device__ WideQuery(const gsrq_layer& layer, const gsrq_call& call, const ExactShare& own, int past, int lane) {
    constexpr int kDim = 128, kHalf = 64;
    const float scale = query_scale(layer);
    const int64_t table = static_cast<int64_t>(past) * kHalf;
    const float2 c = __ldg(reinterpret_cast<const float2*>(layer.cos + table) + lane);
    const float2 s = __ldg(reinterpret_cast<const float2*>(layer.sin + table) + lane);
#pragma unroll
    for (int h = 0; h < 4; ++h) {  // heads past the last are multiplied like the first
      const uint16_t* const from = static_cast<const uint16_t*>(call.query) + (own.first_query + (h < own.heads ? h : 0)) * kDim;
      float2 x = unpacked<Half>(__ldg(reinterpret_cast<const uint32_t*>(from) + lane));
      float2 y = unpacked<Half>(__ldg(reinterpret_cast<const uint32_t*>(from + kHalf) + lane));
      x.x *= scale, x.y *= scale, y.x *= scale, y.y *= scale;
      q[h][0] = x.x * c.x - y.x * s.x;
      q[h][1] = x.y * c.y - y.y * s.y;
      q[h][2] = y.x * c.x + x.x * s.x;
      q[h][3] = y.y * c.y + x.y * s.y;
    }
  }
  // The lane's share of the products with a key (x, y), which is turned by (c, s) first; dots: [4 heads].
  __device__ void multiply(float* dots, float2 x, float2 y, float2 c, float2 s) const {
    const float k[4] = {x.x * c.x - y.x * s.x, x.y * c.y - y.y * s.y, y.x * c.x + x.x * s.x, y.y * c.y + x.y * s.y};
#pragma unroll
    for (int h = 0; h < 4; ++h) dots[h] = q[h][0] * k[0] + q[h][1] * k[1] + q[h][2] * k[2] + q[h][3] * k[3];
  }
};

// attend_exact for head_dim 128, four lanes: a warp has four tokens, whose loads are all under way at once, and a lane two pairs
// of their keys; warps meet once.
template <bool Half>
__device__ inline void attend_exact_wide(const gsrq_layer& layer, const gsrq_call& call, const DecodePlan& plan,
                                         const Memory& memory, int vheads, int splits, int block) {
  constexpr int kLanes = 4, kDim = 128, kHalf = 64, kOwn = 4, kWarps = kCombineThreads / 32;
  static_assert(kOwn * kWarps == kExactTokens, "a token a warp's quarter");
  const ExactShare own(layer, plan, vheads, splits, block);
  const int thread = threadIdx.x, warp = thread / 32, lane = thread % 32;
  if (call.new_lengths[own.row] <= 0) return;
  const ExactTokens exact(layer, call, own.row);
  const int first = own.first, here = min(kExactTokens, exact.count - first);
  if (here <= 0) return;
  float* const sums = reinterpret_cast<float*>(shared_memory);  // [warps][4][128]
  __shared__ float2 states[kWarps][kLanes];
  const ExactSlots slots(layer, exact);

  uint32_t key[kOwn][2];
  uint2 value[kOwn];
  float2 c[kOwn], s[kOwn];
#pragma unroll
  for (int j = 0; j < kOwn; ++j) {
    const int i = first + min(warp * kOwn + j, here - 1), token = exact.token(i);
    const bool is_new = token == exact.past;
    const int64_t from = (is_new ? own.head_row : own.head_row * slots.count() + slots.of(exact, i)) * kDim;
    const uint16_t* const k = static_cast<const uint16_t*>(is_new ? call.key : call.key_exact) + from;
    const uint16_t* const v = static_cast<const uint16_t*>(is_new ? call.value : call.value_exact) + from;
    key[j][0] = __ldg(reinterpret_cast<const uint32_t*>(k) + lane);
    key[j][1] = __ldg(reinterpret_cast<const uint32_t*>(k + kHalf) + lane);
    value[j] = __ldg(reinterpret_cast<const uint2*>(v) + lane);
    const int64_t table = static_cast<int64_t>(token) * kHalf;
    c[j] = __ldg(reinterpret_cast<const float2*>(layer.cos + table) + lane);
    s[j] = __ldg(reinterpret_cast<const float2*>(layer.sin + table) + lane);
  }
  const WideQuery<Half> query(layer, call, own, exact.past, lane);

  float dots[kOwn * kLanes];
#pragma unroll
  for (int j = 0; j < kOwn; ++j) {
    query.multiply(dots + j * kLanes, unpacked<Half>(key[j][0]), unpacked<Half>(key[j][1]), c[j], s[j]);
  }
  // Lane l ends with the sum over lanes of entry l / 2: token l / 8, head l / 2 % 4.
  exchange<8>(dots, lane);
  exchange<4>(dots, lane);
  exchange<2>(dots, lane);
  exchange<1>(dots, lane);
  float score = dots[0] + __shfl_xor_sync(~0u, dots[0], 1);
  if (layer.softcap > 0) score = layer.softcap * tanhf(score / layer.softcap) * kLog2e;
  const int n = warp * kOwn + lane / 8;
  if (n >= here || exact.token(first + n) < exact.lowest) score = kNone;
  const float most = fmaxf(fmaxf(score, __shfl_xor_sync(~0u, score, 8)),
                           fmaxf(__shfl_xor_sync(~0u, score, 16), __shfl_xor_sync(~0u, score, 24)));
  const float weight = score == kNone ? 0.0f : exp2f(score - most);
  float sum = weight + __shfl_xor_sync(~0u, weight, 8);
  sum += __shfl_xor_sync(~0u, sum, 16);
  if (lane < 8 && lane % 2 == 0) states[warp][lane / 2] = make_float2(most, sum);

  float out[kLanes][4] = {};  // of dims 4 lane to 4 lane + 3
#pragma unroll
  for (int j = 0; j < kOwn; ++j) {
    const float2 x = unpacked<Half>(value[j].x), y = unpacked<Half>(value[j].y);
#pragma unroll
    for (int h = 0; h < kLanes; ++h) {
      const float w = __shfl_sync(~0u, weight, j * 8 + h * 2);
      out[h][0] += w * x.x;
      out[h][1] += w * x.y;
      out[h][2] += w * y.x;
      out[h][3] += w * y.y;
    }
  }
#pragma unroll
  for (int h = 0; h < kLanes; ++h)
    reinterpret_cast<float4*>(sums + (warp * kLanes + h) * kDim)[lane] =
        make_float4(out[h][0], out[h][1], out[h][2], out[h][3]);
  __syncthreads();

  const int h = thread / kHalf, e = thread % kHalf;  // dims 2 e and 2 e + 1
  float all = kNone, total = 0;
#pragma unroll
  for (int w = 0; w < kWarps; ++w) all = fmaxf(all, states[w][h].x);
  float2 result = make_float2(0, 0);
#pragma unroll
  for (int w = 0; w < kWarps; ++w) {
    const float2 state = states[w][h];
    const float factor = state.x == kNone ? 0.0f : exp2f(state.x - all);
    const float2 x = reinterpret_cast<const float2*>(sums + (w * kLanes + h) * kDim)[e];
    total += state.y * factor;
    result.x += x.x * factor;
    result.y += x.y * factor;
  }
  reinterpret_cast<float2*>(memory.exact + (own.at * kLanes + h) * kDim)[e] = result;
  if (e == 0) memory.exact_state[own.at * kLanes + h] = make_float2(all, total);
}

constexpr int kExactRowsBytes = 4 * kExactTokens * (128 + 8 * 4) + 8 * 16 * 256;  // shared memory of attend_exact_rows

constexpr int kFewExactRows = 4;  // up to so many, a block that has one vhead's tokens is over sooner

// What attend_exact_rows takes, for many rows: what attend_exact_wide does, a warp a vhead, and rotary rows in pieces of 16 bytes.
inline bool exact_by_rows(const gsrq_layer& layer, const gsrq_call& call, int vheads) {
  return call.batch > kFewExactRows && exact_is_wide(layer, call) && vheads % (kCombineThreads / 32) == 0 &&
         (reinterpret_cast<uintptr_t>(layer.cos) | reinterpret_cast<uintptr_t>(layer.sin)) % 16 == 0;
}

// attend_exact_wide for eight vheads of a row, a warp each, which is half the instructions where there are blocks enough: warps
// share the tokens' cosines and sines, turn a query once for 32 tokens, and need nothing of each other.
template <bool Half>
__device__ inline void attend_exact_rows(const gsrq_layer& layer, const gsrq_call& call, const DecodePlan& plan,
                                         const Memory& memory, int vheads, int splits, int block) {
  constexpr int kLanes = 4, kDim = 128, kHalf = 64, kOwn = 4, kWarps = kCombineThreads / 32, kPiece = 4;
  static_assert(kExactRowsBytes == 4 * kExactTokens * (kDim + kWarps * kLanes) + 2 * kWarps * 4 * kOwn * kDim);
  const int thread = threadIdx.x, warp = thread / 32, lane = thread % 32;
  const int eights = vheads / kWarps, row = block / (eights * splits), split = block / eights % splits;
  if (call.new_lengths[row] <= 0) return;
  const ExactTokens exact(layer, call, row);
  const int first = split * kExactTokens, here = min(kExactTokens, exact.count - first);
  if (here <= 0) return;
  const ExactShare own(layer, plan, vheads, splits, (row * vheads + block % eights * kWarps + warp) * splits + split);
  float* const turns = reinterpret_cast<float*>(shared_memory);  // [32][cosines, sines][64]
  float* const weights = turns + kExactTokens * kDim + warp * kExactTokens * kLanes;  // [warps][32][4]
  uint16_t* const vectors = reinterpret_cast<uint16_t*>(turns + kExactTokens * (kDim + kWarps * kLanes)) +
                            warp * (4 * kOwn * kDim);  // [warps][4 turns][4][128]
  for (int i = thread; i < here * (kDim / kPiece); i += kCombineThreads) {
    const int n = i / (kDim / kPiece), at = i % (kDim / kPiece) * kPiece;
    const float* const from = at < kHalf ? layer.cos + at : layer.sin + (at - kHalf);
    copy_async(turns + n * kDim + at, from + static_cast<int64_t>(exact.token(first + n)) * kHalf, true);
  }
  commit_async();

  // A lane knows where one token lies; negative: the new one.
  const ExactSlots slots(layer, exact);
  const int of_lane = first + min(lane, here - 1), slot = exact.token(of_lane) == exact.past ? -1 : slots.of(exact, of_lane);
  const int64_t cached = own.head_row * slots.count() * kDim, fresh = own.head_row * kDim;
  const auto vector_of = [&](bool value, int at) {
    return static_cast<const uint16_t*>(at < 0 ? (value ? call.value : call.key) : (value ? call.value_exact : call.key_exact)) +
           (at < 0 ? fresh : cached + at * kDim);
  };
  if (lane < here) {  // into the second-level cache, in lines
#pragma unroll
    for (int value = 0; value < 2; ++value) {
      prefetch(vector_of(value, slot));
      prefetch(vector_of(value, slot) + kHalf);
    }
  }
  // Four vectors are a turn: first those of keys, then those of values. Three turns are under way.
  const int turns_of_kind = (here + kOwn - 1) / kOwn;
  const auto fetch = [&](int turn) {
    if (turn < 2 * turns_of_kind) {
      const bool value = turn >= turns_of_kind;
      const int token = (turn - (value ? turns_of_kind : 0)) * kOwn + lane / 16;  // half a warp a vector
#pragma unroll
      for (int j = 0; j < kOwn; j += 2) {  // past the last: the last again
        const int at = __shfl_sync(~0u, slot, min(token + j, here - 1));
        copy_async(vectors + (turn % 4 * kOwn + j + lane / 16) * kDim + lane % 16 * 8, vector_of(value, at) + lane % 16 * 8, true);
      }
    }
    commit_async();
  };
  fetch(0), fetch(1), fetch(2);
  const WideQuery<Half> query(layer, call, own, exact.past, lane);
  wait_async<3>();
  __syncthreads();

  int turn = 0;
  const auto next_turn = [&] {  // its vectors have come; those before have been read by all lanes
    wait_async<2>();
    __syncwarp();
    fetch(turn + 3);
    return vectors + turn++ % 4 * (kOwn * kDim);
  };
#pragma unroll 1
  for (int token = 0; token < here; token += kOwn) {
    const uint16_t* const from = next_turn();
    float dots[kOwn * kLanes];
#pragma unroll
    for (int j = 0; j < kOwn; ++j) {
      const float2* const turned = reinterpret_cast<const float2*>(turns + min(token + j, here - 1) * kDim) + lane;
      const uint32_t* const words = reinterpret_cast<const uint32_t*>(from + j * kDim) + lane;
      query.multiply(dots + j * kLanes, unpacked<Half>(words[0]), unpacked<Half>(words[kHalf / 2]), turned[0], turned[kHalf / 2]);
    }
    // Lane l ends with the sum over lanes of entry l / 2: token l / 8, head l / 2 % 4.
    exchange<8>(dots, lane);
    exchange<4>(dots, lane);
    exchange<2>(dots, lane);
    exchange<1>(dots, lane);
    const float sum = dots[0] + __shfl_xor_sync(~0u, dots[0], 1);
    if (lane % 2 == 0) weights[token * kLanes + lane / 2] = sum;
  }
  __syncwarp();
  {  // A lane has head lane % 4 of every eighth token.
    float scores[kExactTokens / 8], most = kNone, sum = 0;
#pragma unroll
    for (int j = 0; j < kExactTokens / 8; ++j) {
      const int n = 8 * j + lane / kLanes;
      float s = n < here ? weights[32 * j + lane] : kNone;
      if (layer.softcap > 0) s = layer.softcap * tanhf(s / layer.softcap) * kLog2e;
      if (n >= here || exact.token(first + n) < exact.lowest) s = kNone;
      scores[j] = s;
      most = fmaxf(most, s);
    }
#pragma unroll
    for (int o = kLanes; o < 32; o *= 2) most = fmaxf(most, __shfl_xor_sync(~0u, most, o));
#pragma unroll
    for (int j = 0; j < kExactTokens / 8; ++j) {
      const float w = scores[j] == kNone ? 0.0f : exp2f(scores[j] - most);
      weights[32 * j + lane] = w;
      sum += w;
    }
#pragma unroll
    for (int o = kLanes; o < 32; o *= 2) sum += __shfl_xor_sync(~0u, sum, o);
    if (lane < kLanes) memory.exact_state[own.at * kLanes + lane] = make_float2(most, sum);
  }
  __syncwarp();

  float out[kLanes][4] = {};  // of dims 4 lane to 4 lane + 3
#pragma unroll 1
  for (int token = 0; token < here; token += kOwn) {
    const uint16_t* const from = next_turn();
#pragma unroll
    for (int j = 0; j < kOwn; ++j) {
      const uint2 words = reinterpret_cast<const uint2*>(from + j * kDim)[lane];
      const float2 x = unpacked<Half>(words.x), y = unpacked<Half>(words.y);
      const float4 w = *reinterpret_cast<const float4*>(weights + (token + j) * kLanes);
      const float own_weights[kLanes] = {w.x, w.y, w.z, w.w};
#pragma unroll
      for (int h = 0; h < kLanes; ++h) {
        out[h][0] += own_weights[h] * x.x;
        out[h][1] += own_weights[h] * x.y;
        out[h][2] += own_weights[h] * y.x;
        out[h][3] += own_weights[h] * y.y;
      }
    }
  }
#pragma unroll
  for (int h = 0; h < kLanes; ++h)
    reinterpret_cast<float4*>(memory.exact + (own.at * kLanes + h) * kDim)[lane] =
        make_float4(out[h][0], out[h][1], out[h][2], out[h][3]);
}

}  // namespace gsrq::cuda::decoding
