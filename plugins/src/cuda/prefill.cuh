// What the prefill kernels share: which keys a tile of queries sees, and the reconstructed keys and values in the workspace.
#pragma once

#include "source.cuh"

namespace gsrq::cuda {

constexpr int kQueryRows = 64;   // (token, query head) rows of a tile of the float32 kernel
constexpr int kTensorRows = 128; // and of the tensor-core kernel

// The keys of a row lie in two arrays: coded (entry c is token sinks + c) and exact (entry e is token e below the sinks,
// else token before + e). Tokens first .. stop - 1 of one of them, that some query of a tile sees.
struct Segment {
  bool coded;
  int32_t offset;  // entry + offset = token
  int32_t first, stop;
};

// What a query at position p sees of a segment: tokens low .. high - 1.
struct Interval {
  int32_t low, high;
};

struct Visibility {
  int32_t sinks, sliding, past, total, before, seen_by_all;  // seen_by_all: with exact_prefill, else -1
  int32_t window, block;

  __host__ __device__ Visibility(const gsrq_layer& layer, const RowLengths& row)
      : sinks(layer.sinks), sliding(layer.sliding_window), past(static_cast<int32_t>(row.past)),
        total(static_cast<int32_t>(row.total)), before(static_cast<int32_t>(row.before)), seen_by_all(-1),
        window(layer.window), block(layer.block) {
    if (layer.exact_prefill) {
      const int64_t seen = gsrq_coded(row.past + 1, sinks, window, block);
      seen_by_all = static_cast<int32_t>(seen < row.after ? seen : row.after);
    }
  }

  __host__ __device__ int32_t seen(int32_t p) const {
    return seen_by_all >= 0 ? seen_by_all : static_cast<int32_t>(gsrq_coded(p + 1, sinks, window, block));
  }

  // First token that the sliding window leaves visible at p.
  __host__ __device__ int32_t oldest(int32_t p) const { return sliding > 0 && p >= sliding ? p - sliding + 1 : 0; }

  // Segment 0: sinks, 1: coded, 2: the other exact ones; for queries at p0 .. p1.
  __host__ __device__ Segment segment(int index, int32_t p0, int32_t p1) const {
    Segment out{index == 1, 0, oldest(p0), 0};
    if (index == 0) {
      out.stop = sinks < p1 + 1 ? sinks : p1 + 1;
    } else if (index == 1) {
      out.offset = sinks;
      if (out.first < sinks) out.first = sinks;
      out.stop = sinks + seen(p1);
    } else {
      out.offset = before;
      if (out.first < sinks + seen(p0)) out.first = sinks + seen(p0);
      out.stop = p1 + 1;
    }
    if (out.stop < out.first) out.stop = out.first;
    return out;
  }

  // Never falls as p grows, neither end. seen_here: seen(p).
  __host__ __device__ Interval interval(int index, int32_t p, int32_t seen_here) const {
    const int32_t low = oldest(p), coded = sinks + seen_here;
    if (index == 0) return {low, sinks < p + 1 ? sinks : p + 1};
    if (index == 1) return {low > sinks ? low : sinks, coded};
    return {low > coded ? low : coded, p + 1};
  }
};

// The key tiles of a tile of queries, all segments after one another.
struct TileList {
  Segment segments[3];
  int32_t ends[3];  // tiles up to and including each segment

  __host__ __device__ TileList(const Visibility& visible, int32_t p0, int32_t p1, int32_t keys) {
    int32_t count = 0;
    for (int i = 0; i < 3; ++i) {
      segments[i] = visible.segment(i, p0, p1);
      count += (segments[i].stop - segments[i].first + keys - 1) / keys;
      ends[i] = count;
    }
  }
  __host__ __device__ int32_t count() const { return ends[2]; }
  __host__ __device__ int index(int32_t tile) const { return tile < ends[0] ? 0 : (tile < ends[1] ? 1 : 2); }
  // Tokens of a tile: first and how many.
  __host__ __device__ int32_t first(int i, int32_t tile, int32_t keys) const {
    return segments[i].first + (tile - (i == 0 ? 0 : ends[i - 1])) * keys;
  }
};

// Memory and shape of a call's attention.
struct PrefillPlan {
  bool tensor;       // half precision on tensor cores
  int32_t group;     // query heads a KV head
  int32_t tokens;    // of a tile of queries
  int32_t tiles;     // of queries, a row and KV head
  int32_t splits;    // of the keys
  int32_t stride;    // elements from one entry to the next: head_dim, for tensor cores padded with zeros to 16 bytes
  int64_t coded, exact;  // entries of the arrays, a row and KV head
  void *coded_keys, *coded_values;  // [B, N, coded, stride]: float or half, keys rotated
  void *exact_keys, *exact_values;  // [B, N, exact, stride]
  float *partial, *maxima, *sums;   // [splits, B, H, T, d], [splits, B, H, T]; splits > 1
};

PrefillPlan prefill_plan(const gsrq_layer& layer, const gsrq_call& call, Arena& workspace);
int prefill_gather(const gsrq_layer& layer, const gsrq_call& call, const PrefillPlan& plan, cudaStream_t stream);
int prefill_plain(const gsrq_layer& layer, const gsrq_call& call, const PrefillPlan& plan, cudaStream_t stream);
int prefill_tensor(const gsrq_layer& layer, const gsrq_call& call, const PrefillPlan& plan, cudaStream_t stream);

// Elements (first, second) of a pair of a query, rotated to position p.
__device__ inline float2 rotated(const gsrq_layer& layer, int32_t pair, int64_t position, float2 x) {
  if (pair >= layer.half_rope) return x;
  const float c = layer.cos[position * layer.half_rope + pair], s = layer.sin[position * layer.half_rope + pair];
  return make_float2(x.x * c - x.y * s, x.y * c + x.x * s);
}

__device__ inline float2 rotated_query(const gsrq_layer& layer, const gsrq_call& call, int64_t b, int64_t head,
                                       int64_t step, int32_t pair, int64_t position) {
  int32_t first, second;
  pair_elements(layer, pair, &first, &second);
  const int64_t at = ((b * layer.heads + head) * call.steps + step) * layer.head_dim;
  return rotated(layer, pair, position,
                 make_float2(load(call.query, at + first, call.dtype), load(call.query, at + second, call.dtype)));
}

}  // namespace gsrq::cuda
