// The scores of the center, which keys coded in the rotated frame lack: a query times the turned center, for all positions.
#pragma once

#include "decode_query.cuh"
#include "launch.cuh"
#include "mma.cuh"

namespace gsrq::cuda::decoding {

constexpr int kPrepareThreads = 256;
constexpr int kCenterTokens = kPrepareThreads / 32 * kCenterTiles * 16, kCenterHeads = 8, kFewCenterHeads = 4;
constexpr float kCenterMargin = 1.25f;  // what a table may be off from rotations, and rounding, beside the bound
constexpr int kTurnWarps = kPrepareThreads / 32 / kFewCenterHeads;  // that turn the queries of a vhead

// Shared memory of score_center.
constexpr int kCenterBytes = kCenterTiles * kCenterSteps * 32 * static_cast<int>(sizeof(uint4)) +
                             kCenterHeads * kCenterPairs * kLookupLanes * static_cast<int>(sizeof(float2));

// How the work is cut into blocks: vheads in all and of one; stretches of kCenterTokens that it has, one after another; blocks
// of a row's tokens, and of its vheads. With one row a block runs its code once, and reading it takes longer than running it:
// there is little of it.
struct CenterWork {
  int vheads, heads, stretches;
  unsigned pieces, groups;
};

// What a block has: up to kCenterHeads vheads of a row, and some stretches of kCenterTokens.
struct CenterBlock {
  int row, first_vhead, here;  // here: vheads
  int begin, end;              // coded tokens
  bool first;                  // of the row's tokens
  Range range;
  __device__ CenterBlock(const gsrq_layer& layer, const gsrq_call& call, const CenterWork& work, unsigned block) : range{} {
    const unsigned of_row = block / work.pieces, piece = block - of_row * work.pieces;
    row = static_cast<int>(of_row / work.groups);
    first_vhead = static_cast<int>(of_row - row * work.groups) * work.heads;
    here = min(work.heads, work.vheads - first_vhead);
    range = coded_range(layer, call, row);
    first = piece == 0;
    begin = static_cast<int>(piece) * work.stretches * kCenterTokens;
    end = min(begin + work.stretches * kCenterTokens, range.count);
  }
};

// A score as an integer of 1 / inverse above 2^15, in the low 16 bits: those of a float of 2^23 or more are an integer.
__device__ inline uint32_t fixed(float x, float inverse) { return __float_as_uint(fmaf(x, inverse, kCenterZero)); }

// Drifts of up to kFewCenterHeads vheads, and what bounds the sum of those. kTurnWarps take a vhead, some heads each.
__device__ inline void turn_center(const gsrq_layer& layer, const gsrq_call& call, const DecodePlan& plan,
                                   const LookupMemory& memory, const CenterBlock& own, int vheads, float2* drifts,
                                   float* inverses) {
  constexpr int kHeads = kLookupLanes / kTurnWarps;
  __shared__ float2 sums[kFewCenterHeads][kLookupLanes];  // (bound, rest)
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, pairs = layer.head_dim / 2;
  const int of_block = warp / kTurnWarps, first_head = warp % kTurnWarps * kHeads;
  const bool real = of_block < own.here;
  const int vhead = own.first_vhead + (real ? of_block : 0);
  const TurnedQuery queries[kHeads] = {TurnedQuery(layer, call, plan, own.row, vhead, first_head),
                                       TurnedQuery(layer, call, plan, own.row, vhead, first_head + 1)};
  static_assert(kHeads == 2, "the queries above");
  float bound[kHeads] = {}, rest[kHeads] = {};
#pragma unroll 1
  for (int p = lane; p < max(pairs, kCenterPairs); p += 32) {
    const int here = min(p, pairs - 1);
    const TurnedPair turned[kHeads] = {TurnedPair(layer, call, queries[0], here), TurnedPair(layer, call, queries[1], here)};
    const float mx = __ldg(queries[0].center + turned[0].e0), my = __ldg(queries[0].center + turned[0].e1);
    const float size = fabsf(__ldg(layer.cos + min(here, layer.half_rope - 1)));  // row 0 has the table's scale
    const bool turns = p < layer.half_rope;
#pragma unroll
    for (int h = 0; h < kHeads; ++h) {
      const float2 drift = drift_of(turned[h].turned(queries[h]), mx, my);
      bound[h] += turns ? length_of(drift) * size : 0.0f;
      rest[h] += turns || p >= pairs ? 0.0f : drift.x;
      if (p < kCenterPairs)
        drifts[of_block * kCenterPairs * kLookupLanes + drift_at(p, first_head + h)] =
            turns && real ? drift : make_float2(0, 0);
    }
  }
#pragma unroll
  for (int o = 16; o > 0; o /= 2)
#pragma unroll
    for (int h = 0; h < kHeads; ++h) {
      bound[h] += __shfl_xor_sync(~0u, bound[h], o);
      rest[h] += __shfl_xor_sync(~0u, rest[h], o);
    }
  if (lane == 0)
#pragma unroll
    for (int h = 0; h < kHeads; ++h) sums[of_block][first_head + h] = make_float2(bound[h], rest[h]);
  __syncthreads();
  if (threadIdx.x < own.here * kLookupLanes) {
    const float2 all = sums[threadIdx.x / kLookupLanes][threadIdx.x % kLookupLanes];
    const float unit = all.x * (kCenterMargin / kCenterMost);
    inverses[threadIdx.x] = unit > 0 ? __fdividef(1.0f, unit) : 0.0f;
    if (own.first) {
      const int64_t at = (static_cast<int64_t>(own.row) * vheads + own.first_vhead) * kLookupLanes + threadIdx.x;
      memory.unit[at] = unit;
      memory.rest[at] = all.y;
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
  const CenterBlock own(layer, call, work, static_cast<unsigned>(block));
  const int vheads = work.vheads;
  if (own.begin >= own.end) return;
  const int here = own.here, end = own.end, half = layer.half_rope;
  const int thread = threadIdx.x, warp = thread / 32, lane = thread % 32, g = lane / 4, t = lane % 4;
  const int64_t item = static_cast<int64_t>(own.row) * vheads + own.first_vhead;
  uint4* const offsets = reinterpret_cast<uint4*>(shared_memory);  // [tiles][steps][32]
  float2* const drifts = reinterpret_cast<float2*>(offsets + kCenterTiles * kCenterSteps * 32);  // [vheads][pairs * 4]
  static_assert(kCenterTiles * kCenterSteps * 32 % kThreads == 0, "each thread copies as many");
#pragma unroll
  for (int i = 0; i < kCenterTiles * kCenterSteps * 32; i += kThreads)
    copy_async(offsets + i + thread, memory.offsets + i + thread, true);
  if (Full && lane < 4) {  // the row of the table that the warp turns by first, on its way from memory meanwhile
    const int64_t at = static_cast<int64_t>(own.range.first + min(own.begin + warp * kCenterTiles * 16, end - 1)) * half;
    prefetch((lane < 2 ? layer.cos : layer.sin) + at + lane % 2 * 32);
  }
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
#pragma unroll 1
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
  const CenterBlock own(layer, call, work, static_cast<unsigned>(block));
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
