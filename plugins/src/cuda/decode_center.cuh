// The scores of the center, which keys coded in the rotated frame lack: a query times the turned center, for all positions.
#pragma once

#include "decode_query.cuh"
#include "launch.cuh"
#include "mma.cuh"

namespace gsrq::cuda::decoding {

constexpr int kPrepareThreads = 256;
constexpr int kCenterTokens = kPrepareThreads / 32 * kCenterTiles * 16, kCenterHeads = 8, kFewCenterHeads = 4;
constexpr float kCenterMargin = 1.25f;  // what a table may be off from rotations, and rounding, beside the bound
static_assert(kPrepareThreads / 32 == kCenterHeads, "a warp turns the queries of one vhead");

// Shared memory of score_center.
constexpr int kCenterBytes = kCenterTiles * kCenterSteps * 32 * static_cast<int>(sizeof(uint4)) +
                             kCenterHeads * kCenterPairs * kLookupLanes * static_cast<int>(sizeof(float2));

// How the work is cut into blocks: vheads in all and of one; stretches of kCenterTokens that it has, one after another.
struct CenterWork {
  int vheads, heads, stretches;
};

// What a block has: up to kCenterHeads vheads of a row, and some stretches of kCenterTokens.
struct CenterBlock {
  int row, first_vhead, here;  // here: vheads
  int begin, end;              // coded tokens
  bool first;                  // of the row's tokens
  Range range;
  __device__ CenterBlock(const gsrq_layer& layer, const gsrq_call& call, const LookupMemory& memory, const CenterWork& work,
                         int block)
      : range{} {
    const int tokens = work.stretches * kCenterTokens, pieces = static_cast<int>((memory.padded + tokens - 1) / tokens);
    const int groups = (work.vheads + work.heads - 1) / work.heads;
    row = block / (pieces * groups);
    first_vhead = block / pieces % groups * work.heads;
    here = min(work.heads, work.vheads - first_vhead);
    range = coded_range(layer, call, row);
    first = block % pieces == 0;
    begin = block % pieces * tokens;
    end = min(begin + tokens, range.count);
  }
};

// A score as an integer of 1 / inverse above 2^15, in the low 16 bits: those of a float of 2^23 or more are an integer.
__device__ inline uint32_t fixed(float x, float inverse) { return __float_as_uint(fmaf(x, inverse, kCenterZero)); }

// A warp's vhead: its drifts, and what bounds the sum of those.
__device__ inline void turn_center(const gsrq_layer& layer, const gsrq_call& call, const DecodePlan& plan,
                                   const LookupMemory& memory, const CenterBlock& own, int vheads, float2* drifts,
                                   float* inverses) {
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, h = lane % kLookupLanes, d = layer.head_dim;
  if (warp >= own.here) {
    for (int i = lane; i < kCenterPairs * kLookupLanes; i += 32)
      drifts[warp * kCenterPairs * kLookupLanes + i] = make_float2(0, 0);
    return;
  }
  const TurnedQuery query(layer, call, plan, own.row, own.first_vhead + warp, h);
  float bound = 0, rest = 0;
  constexpr int kTogether = 4, kStep = 32 / kLookupLanes;
#pragma unroll 1
  for (int first = lane / kLookupLanes; first < max(d / 2, kCenterPairs); first += kTogether * kStep) {
    const auto pair_of = [&](int j) { return min(first + j * kStep, d / 2 - 1); };
    const auto load = [&](int j) { return TurnedPair(layer, call, query, pair_of(j)); };
    const TurnedPair pairs[kTogether] = {load(0), load(1), load(2), load(3)};
    float mx[kTogether], my[kTogether], size[kTogether];
#pragma unroll
    for (int j = 0; j < kTogether; ++j) {
      mx[j] = __ldg(query.center + pairs[j].e0);
      my[j] = __ldg(query.center + pairs[j].e1);
      size[j] = __ldg(layer.cos + min(pair_of(j), layer.half_rope - 1));  // row 0 has the table's scale
    }
#pragma unroll
    for (int j = 0; j < kTogether; ++j) {
      const int p = first + j * kStep;
      const bool turns = p < layer.half_rope;
      const float2 drift = drift_of(pairs[j].turned(query), mx[j], my[j]);
      bound += turns ? length_of(drift) * fabsf(size[j]) : 0.0f;
      rest += turns || p >= d / 2 ? 0.0f : drift.x;
      if (p < kCenterPairs)
        drifts[warp * kCenterPairs * kLookupLanes + drift_at(p, h)] = turns ? drift : make_float2(0, 0);
    }
  }
#pragma unroll
  for (int o = kLookupLanes; o < 32; o *= 2) {
    bound += __shfl_xor_sync(~0u, bound, o);
    rest += __shfl_xor_sync(~0u, rest, o);
  }
  if (lane < kLookupLanes) {
    const float unit = bound * (kCenterMargin / kCenterMost);
    inverses[warp * kLookupLanes + lane] = unit > 0 ? 1 / unit : 0.0f;
    if (own.first) {
      const int64_t at = (static_cast<int64_t>(own.row) * vheads + own.first_vhead + warp) * kLookupLanes + lane;
      memory.unit[at] = unit;
      memory.rest[at] = rest;
    }
  }
}

// A warp takes 128 tokens: their offsets from the first are constant, so the matrix of their cosines and sines, as float16, lies
// in shared memory, and the first token's row turns u and v. A product's columns are the heads of two vheads; two products share
// a read of the matrix.
// Full: half_rope is kCenterPairs, and pairs of cosines and sines are aligned. Alone: no launch has turned the queries.
template <bool Full, bool Alone>
__device__ void score_center(const gsrq_layer& layer, const gsrq_call& call, const DecodePlan& plan, const LookupMemory& memory,
                             const CenterWork& work, int block) {
  constexpr int kPairs = 2;  // of vheads that are scored together
  constexpr int kThreads = kPrepareThreads;
  __shared__ __align__(8) float inverses[kCenterHeads * kLookupLanes];  // of units
  const CenterBlock own(layer, call, memory, work, block);
  const int vheads = work.vheads;
  if (own.begin >= own.end) return;
  const int here = own.here, end = own.end, half = layer.half_rope;
  const int thread = threadIdx.x, warp = thread / 32, lane = thread % 32, g = lane / 4, t = lane % 4;
  const int64_t item = static_cast<int64_t>(own.row) * vheads + own.first_vhead;
  uint4* const offsets = reinterpret_cast<uint4*>(shared_memory);  // [tiles][steps][32]
  float2* const drifts = reinterpret_cast<float2*>(offsets + kCenterTiles * kCenterSteps * 32);  // [vheads][pairs * 4]
  for (int i = thread; i < kCenterTiles * kCenterSteps * 32; i += kThreads) copy_async(offsets + i, memory.offsets + i, true);
  const int used = here * kCenterPairs * kLookupLanes / 2;
  if (Alone) {
    commit_async();
    turn_center(layer, call, plan, memory, own, vheads, drifts, inverses);
  } else {
    wait_for_previous();
    const float4* const from = reinterpret_cast<const float4*>(memory.drifts + item * kCenterPairs * kLookupLanes);
    for (int i = thread; i < kCenterHeads * kCenterPairs * kLookupLanes / 2; i += kThreads)
      copy_async(reinterpret_cast<float4*>(drifts) + i, from + (i < used ? i : 0), i < used);  // zeros past them
    commit_async();
    if (thread < here * kLookupLanes) {
      const float unit = __ldg(memory.unit + item * kLookupLanes + thread);
      inverses[thread] = unit > 0 ? 1 / unit : 0.0f;
    }
  }
  wait_async<0>();
  __syncthreads();
  // Columns 2 t and 2 t + 1: heads of vhead t / 2 of the two. An even lane writes all heads of token g, its neighbour of g + 8.
  const bool odd = t % 2 != 0;
  const float4* const own_drifts =
      reinterpret_cast<const float4*>(drifts) + ((g / kLookupLanes * kCenterSteps * kLookupLanes + g % kLookupLanes) * 4 + t);
#pragma unroll 1
  for (int first = own.begin + warp * kCenterTiles * 16; first < end; first += kCenterTokens) {
    const int64_t at = static_cast<int64_t>(own.range.first + first) * half + 2 * t;
    const float* const cosines = layer.cos + at;
    const float* const sines = layer.sin + at;
#pragma unroll 1
    for (int v = 0; v < here; v += 2 * kPairs) {
      float2 c[kCenterSteps], s[kCenterSteps];
#pragma unroll
      for (int k = 0; k < kCenterSteps; ++k) {
        if (Full) {
          c[k] = __ldg(reinterpret_cast<const float2*>(cosines) + 4 * k);
          s[k] = __ldg(reinterpret_cast<const float2*>(sines) + 4 * k);
        } else {  // drifts past the last are zero
          const int low = min(8 * k, half - 1 - 2 * t), high = min(8 * k + 1, half - 1 - 2 * t);
          c[k] = make_float2(__ldg(cosines + low), __ldg(cosines + high));
          s[k] = make_float2(__ldg(sines + low), __ldg(sines + high));
        }
      }
      uint32_t b[kPairs][kCenterSteps][2];
#pragma unroll
      for (int k = 0; k < kCenterSteps; ++k)
#pragma unroll
        for (int i = 0; i < kPairs; ++i) {
          const float4 x = own_drifts[((v + 2 * i) * kCenterSteps + k) * kLookupLanes * 4];  // u and v of both
          b[i][k][0] = packed(x.x * c[k].x + x.y * s[k].x, x.z * c[k].y + x.w * s[k].y);
          b[i][k][1] = packed(x.y * c[k].x - x.x * s[k].x, x.w * c[k].y - x.z * s[k].y);
        }
      const int own_token = first + g + (odd ? 8 : 0);
      float2 inverse[kPairs];
      uint2* to[kPairs];
      int left[kPairs];  // tokens from own_token on
#pragma unroll
      for (int i = 0; i < kPairs; ++i) {
        const int vhead = v + 2 * i + t / 2;
        inverse[i] = *reinterpret_cast<const float2*>(inverses + min(vhead, here - 1) * kLookupLanes + t % 2 * 2);
        to[i] = static_cast<uint2*>(memory.center) + (item + vhead) * memory.padded + own_token;
        left[i] = vhead < here ? end - own_token : 0;
      }
#pragma unroll 2
      for (int tile = 0; tile < kCenterTiles; ++tile) {
        float sums[kPairs][4] = {};
#pragma unroll
        for (int k = 0; k < kCenterSteps; ++k) {
          const uint4 x = offsets[(tile * kCenterSteps + k) * 32 + lane];
          const uint32_t a[4] = {x.x, x.y, x.z, x.w};
#pragma unroll
          for (int i = 0; i < kPairs; ++i) multiply(sums[i], a, b[i][k][0], b[i][k][1]);
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
}

// The same for any rotary table, in float32: a thread a (token, head). A launch has turned the queries.
__device__ inline void score_center_plain(const gsrq_layer& layer, const gsrq_call& call, const LookupMemory& memory,
                                          const CenterWork& work, int block) {
  const CenterBlock own(layer, call, memory, work, block);
  const int vheads = work.vheads;
  if (own.begin >= own.end) return;
  const int half = layer.half_rope, here = own.here, pairs = drift_pairs(layer);
  wait_for_previous();
  for (int i = threadIdx.x; i < (own.end - own.begin) * here * kLookupLanes; i += kPrepareThreads) {
    const int h = i % kLookupLanes, v = i / kLookupLanes % here, token = own.begin + i / (kLookupLanes * here);
    const int64_t at = static_cast<int64_t>(own.range.first + token) * half;
    const int64_t item = static_cast<int64_t>(own.row) * vheads + own.first_vhead + v;
    float sum = memory.rest[item * kLookupLanes + h];
    for (int p = 0; p < half; ++p) {
      const float2 x = memory.drifts[item * pairs * kLookupLanes + drift_at(p, h)];
      sum += x.x * __ldg(layer.cos + at + p) + x.y * __ldg(layer.sin + at + p);
    }
    static_cast<float*>(memory.center)[(item * memory.padded + token) * kLookupLanes + h] = sum;
  }
}

}  // namespace gsrq::cuda::decoding
