// Queries turned to their position, and what they give with the center of keys coded in the rotated frame.
#pragma once

#include "decode_common.cuh"
#include "decode_lookup.cuh"

namespace gsrq::cuda::decoding {

__device__ inline int position_of(const gsrq_call& call, int row) {
  return static_cast<int>(max(min(call.past_lengths[row], call.max_total - 1), static_cast<int64_t>(0)));
}

// A query head of a vhead, one of four; those past the group's last, and of rows without a new token, are zeros.
struct TurnedQuery {
  float scale;  // queries are in units of log2, save where softcap needs them plain
  int64_t base, table;
  const float* center;
  bool live;
  __device__ TurnedQuery(const gsrq_layer& layer, const gsrq_call& call, const DecodePlan& plan, int row, int vhead, int h) {
    const int kv_head = vhead / plan.parts, head = vhead % plan.parts * plan.part_heads + h;
    live = call.new_lengths[row] > 0 && h < plan.part_heads && head < plan.group;
    scale = query_scale(layer);
    base = (static_cast<int64_t>(row) * layer.heads + kv_head * plan.group + (live ? head : 0)) * layer.head_dim;
    table = static_cast<int64_t>(position_of(call, row)) * layer.half_rope;
    center = layer.key_center + kv_head * layer.head_dim;
  }
};

// One of its pairs, read without a branch. Numbers are used in a second step, so that those of many pairs are under way at once.
struct TurnedPair {
  int e0, e1;
  float x, y, c, s;
  __device__ TurnedPair(const gsrq_layer& layer, const gsrq_call& call, const TurnedQuery& query, int p) {
    const bool turns = p < layer.half_rope;
    pair_elements(layer, p, &e0, &e1);
    x = load_any(call.query, query.base + e0, call.dtype);
    y = load_any(call.query, query.base + e1, call.dtype);
    c = turns ? __ldg(layer.cos + query.table + p) : 1.0f;
    s = turns ? __ldg(layer.sin + query.table + p) : 0.0f;
  }
  __device__ float2 turned(const TurnedQuery& query) const {
    const float a = query.live ? x * query.scale : 0.0f, b = query.live ? y * query.scale : 0.0f;
    return make_float2(a * c - b * s, b * c + a * s);
  }
};

// u and v of q . RoPE_t(m) = sum of u cos(t) + v sin(t), for elements mx and my of the center.
__device__ inline float2 drift_of(float2 q, float mx, float my) {
  return make_float2(q.x * mx + q.y * my, q.y * mx - q.x * my);
}

__device__ inline float length_of(float2 x) {
  float length;
  asm("sqrt.approx.ftz.f32 %0, %1;" : "=f"(length) : "f"(x.x * x.x + x.y * x.y));
  return length;
}

// Where the drift of pair p and head h of a vhead lies: a lane's two pairs of eight side by side, a head's eight as well.
__host__ __device__ inline int drift_at(int p, int h) { return (p / 8 * kLookupLanes + h) * 8 + p % 8; }
// Pairs that there is room for.
__host__ __device__ inline int drift_pairs(const gsrq_layer& layer) {
  return layer.half_rope > kCenterPairs ? (layer.half_rope + 7) / 8 * 8 : kCenterPairs;
}

}  // namespace gsrq::cuda::decoding
