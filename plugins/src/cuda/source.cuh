// Where a call's tokens lie: how many of a row are coded before and after it, their exact vectors, the appended ones.
#pragma once

#include "internal.cuh"

namespace gsrq::cuda {

// A batch row of a call. Tokens coded before and after it; the exact ones that queries may see are the sinks and all from
// sinks + before on.
struct RowLengths {
  int64_t past, total, before, after;
};

// Lengths fit 32 bits: none exceeds the rotary table's positions.
__host__ __device__ inline RowLengths row_lengths(const gsrq_layer& layer, int64_t past, int64_t fresh) {
  const int64_t total = past + fresh;
  return {past, total, gsrq_coded32(static_cast<int32_t>(past), layer.sinks, layer.window, layer.block),
          gsrq_coded32(static_cast<int32_t>(total), layer.sinks, layer.window, layer.block)};
}

// A row whose lengths cannot be is left alone: hosts check them, but no length may lead out of the caller's memory.
__device__ inline RowLengths row_lengths(const gsrq_layer& layer, const gsrq_call& call, int64_t b) {
  const int64_t past = call.past_lengths[b], fresh = call.new_lengths[b];
  const bool possible = past >= 0 && fresh >= 0 && fresh <= call.steps && past <= call.max_total - fresh;
  return possible ? row_lengths(layer, past, fresh) : row_lengths(layer, 0, 0);
}

// Most tokens that a call of so many steps codes in one row.
__host__ __device__ inline int64_t most_coded(const gsrq_layer& layer, const gsrq_call& call) {
  const int64_t most = (static_cast<int64_t>(call.steps) + layer.block - 1) / layer.block * layer.block;
  const int64_t all = gsrq_coded(call.max_total, layer.sinks, layer.window, layer.block);
  return most < all ? most : all;
}

// Where a token's exact vectors are.
struct Origin {
  const char* from;     // head 0, element 0; null: none
  int32_t head_stride;  // elements
  int32_t token;
  int32_t dtype, round_to;  // round_to: what the cache will store, or -1
};

// Of a token of the cache, or of one that the call appends to it.
__device__ inline Origin exact_origin(const gsrq_layer& layer, const gsrq_call& call, bool values, int64_t b, int64_t token,
                                      int64_t past) {
  const int64_t d = layer.head_dim;
  Origin out{};
  int64_t element;  // of head 0
  out.round_to = -1;
  out.token = static_cast<int32_t>(token);
  if (token < past) {
    const int64_t slots = gsrq_exact_slots(layer.sinks, layer.window, layer.block);
    out.from = static_cast<const char*>(values ? call.value_exact : call.key_exact);
    out.dtype = call.exact_dtype, out.head_stride = static_cast<int32_t>(slots * d);
    element = (b * layer.kv_heads * slots + gsrq_slot32(out.token, layer.sinks, layer.window, layer.block)) * d;
  } else {
    out.from = static_cast<const char*>(values ? call.value : call.key);
    out.dtype = call.dtype, out.head_stride = static_cast<int32_t>(call.steps * d);
    if (call.dtype != call.exact_dtype && call.exact_dtype != GSRQ_F32) out.round_to = call.exact_dtype;
    element = (b * layer.kv_heads * call.steps + token - past) * d;
  }
  out.from += element * dtype_bytes(out.dtype);
  return out;
}

// Element of a head's exact vector, as the cache stores it (or will).
__device__ inline float exact_element(const Origin& origin, int32_t head, int32_t element) {
  const float x = load_any(origin.from, static_cast<int64_t>(head) * origin.head_stride + element, origin.dtype);
  return origin.round_to < 0 ? x : rounded(x, origin.round_to);
}

// Of the new tokens those whose slot no later one takes: the sinks, then the ring's. Writers are numbered 0 .. count - 1.
struct RingWriters {
  int64_t sinks, first, count;
  __host__ __device__ int64_t token(int64_t writer, int64_t past) const {
    return writer < sinks ? past + writer : first + (writer - sinks);
  }
};

__host__ __device__ inline RingWriters ring_writers(const gsrq_layer& layer, int64_t past, int64_t total) {
  const int64_t ring = static_cast<int64_t>(layer.window) + layer.block;
  const int64_t last_sink = layer.sinks < total ? layer.sinks : total;
  const int64_t sinks = last_sink > past ? last_sink - past : 0;
  int64_t first = past > layer.sinks ? past : layer.sinks;
  if (total - ring > first) first = total - ring;
  return {sinks, first, sinks + (total > first ? total - first : 0)};
}

}  // namespace gsrq::cuda
