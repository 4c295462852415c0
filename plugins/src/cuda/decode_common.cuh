// What the parts of the fast decode share: constants, memory, and how a call's tokens are cut into work. docs/cuda.md.
#pragma once

#include <cmath>

#include "decode_plan.hpp"
#include "internal.cuh"

namespace gsrq::cuda::decoding {

constexpr float kLog2e = 1.4426950408889634f;
constexpr int kFixedBits = 18;       // weights are integers of 2^-18 of their window's reference
constexpr float kHeadroom = 1.99f;   // log2 by which a weight may exceed it
constexpr int kWindowTokens = 4096;  // of that size fit a bin: 4096 * 2^(18 + 1.99) < 0.994 * 2^32
constexpr int kAnchorChunks = 128;   // between two exact turns of the queries; a power of two
constexpr float kNone = -INFINITY;
static_assert(kWindowTokens <= (1LL << (32 - 2 - kFixedBits)) && kHeadroom < 2, "bins would overflow");

extern __shared__ __align__(128) char shared_memory[];

// What queries are multiplied with: scores in units of log2, save where softcap needs them plain.
__device__ inline float query_scale(const gsrq_layer& layer) { return layer.scale * (layer.softcap > 0 ? 1.0f : kLog2e); }

// x as the sum of two float16.
__device__ inline void split_in_two(float x, __half* high, __half* low) {
  const __half h = __float2half_rn(x);
  *high = h;
  *low = __float2half_rn(x - __half2float(h));
}

// Of a warp: the sum of the lanes' x up to the thread's own.
template <class T>
__device__ inline T running_sum(T x) {
  for (int o = 1; o < 32; o *= 2) {
    const T up = __shfl_up_sync(~0u, x, o);
    if (threadIdx.x % 32 >= o) x += up;
  }
  return x;
}

__device__ inline float exp2_fast(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

// How a lane scores keys. A gathered vector of 16 bytes, half of a codeword's slice, fills the fragment of one product: of its
// four words two are the row of the token, two the row 8 below. A thread gets two RoPE pairs of the half: near and near + 2.
// Rows of odd g gather the halves in the other order, so that no two threads of a phase meet in a bank. Where there are at most
// four heads, columns 4 to 7 of the product are the same heads with the halves of the query swapped, and rows 8 to 15 take the
// opposite order: of a row either columns 0 to 3 or 4 to 7 are its scores, a thread has one of both rows.
struct LanePlace {
  int near, parity, swapped;  // swapped: the thread's halves of the query
  bool twice;
  __host__ __device__ LanePlace(int lanes, int lane) {
    const int g = lane / 4, t = lane % 4;
    near = t < 2 ? t : t + 2;
    parity = g & 1;
    twice = lanes == 4;
    swapped = twice && g >= 4 ? 1 : 0;
  }
  // RoPE pair k of the lane in a half of a slice.
  __host__ __device__ int pair(int slice, int half, int k) const { return slice * 16 + half * 8 + near + 2 * k; }
  // Half u, in the thread's order, of keys of octet o.
  __host__ __device__ int key_half(int o, int u) const { return u ^ parity ^ (twice ? o : 0); }
};

// What a lane of a CTA keeps of the layer while it scores keys; decode_keys.cuh says what it is for. A RoPE pair's turn is
// (cosine, sine). turn: [octet of tokens][half, in the lane's order for keys][pair], by the token's offset in its tile;
// times shrink.
struct alignas(16) LaneConstants {
  float2 turn[2][2][2];
  float2 step[2][2];     // [half, in its order for queries][pair]: from one tile of a warp to its next
  uint32_t low[kMostBlocks], high[kMostBlocks];  // multipliers of its stage of a block, where the product wants them
  float unit;
};

// How a kernel takes codes. bytes: any. words: whole ones, of a linear cache or of pages.
enum class Reading { bytes, words, words_of_pages };

// words: whether a token's codes are whole words. Of pages they are taken where stretches of so many tokens, counted from a
// row's first coded one, lie in a page each, which is found without a division; entries of the table are numbered in 32 bits.
inline Reading reading_of(const gsrq_layer& layer, const gsrq_call& call, bool words, int tokens) {
  if (!words) return Reading::bytes;
  if (call.block_table == nullptr) return Reading::words;
  const bool whole = layer.sliding_window == 0 && call.page % tokens == 0 && (call.page & (call.page - 1)) == 0 &&
                     static_cast<int64_t>(call.batch) * call.table_stride < INT32_MAX;
  return whole ? Reading::words_of_pages : Reading::bytes;
}

// The page table where pages are a power of two of octets.
struct Pages {
  const int32_t* table;
  int bits;  // of the octets of a page
  // The page of an octet of a row whose entries begin at `first`.
  __device__ int page(int first, int octet) const { return __ldg(table + first + (octet >> bits)); }
  // What is added to the row's octets in a page to get the tensor's.
  __device__ int shift(int page, int octet) const { return (page - (octet >> bits)) << bits; }
};

__device__ inline Pages pages_of(const gsrq_call& call) { return {call.block_table, 31 - __clz(call.page / kCodeTile)}; }

struct Constants {  // what prepare() derives
  const signed char* words;    // [kv_heads][cluster][blocks][256][4 stages][2 halves][16 dims]
  const LaneConstants* lanes;  // [cluster][32]
};

struct Memory {  // of a call
  float* bins;       // [partials][ways][256][stride]
  float* scratch;    // [CTAs][2][256][stride]: of an item, before the owners' are added
  float2* state;     // [partials][lanes]: reference (log2) and sum of weights
  float2* combined;  // [vheads][batch][lanes]: the same over all partials
  int2* owners;      // [vheads][batch]: the first and the last cluster, or block, that has some of a row's coded tokens
  float* values;     // [vheads][sub-vectors][value_parts][batch][lanes][width], divided by the sum
  float* exact;      // [batch][vheads][splits][lanes][head_dim]: of exact tokens
  float2* exact_state;  // [batch][vheads][splits][lanes]
};

struct Range {
  int first;  // token
  int count;  // coded tokens that the query sees
};

__device__ inline Range coded_range(const gsrq_layer& layer, const gsrq_call& call, int b) {
  if (call.new_lengths[b] <= 0) return {layer.sinks, 0};
  // Never past what the host sized.
  const int total = static_cast<int>(min(call.past_lengths[b] + 1, call.max_total));
  int first = layer.sinks;
  if (layer.sliding_window > 0 && total - layer.sliding_window > first) first = total - layer.sliding_window;
  const int count = layer.sinks + gsrq_coded32(total, layer.sinks, layer.window, layer.block) - first;
  return {first, count > 0 ? count : 0};
}

// Chunks of all heads and rows stand in one line, head by head, of which cluster k takes an equal stretch: it keeps a head's
// codebook, and clusters of several heads go through the codes of the same rows at the same time. Before a row's chunks stand
// `lead` empty places, for what an item costs beside its chunks; a cluster may have nothing but such.
struct Line {
  int64_t per_head, total;  // places
  int clusters, lead;
  __device__ int64_t divide(int64_t a, int64_t b) const {
    return a >> 32 == 0 ? static_cast<uint32_t>(a) / static_cast<uint32_t>(b) : a / b;
  }
  __device__ int64_t begin(int64_t k) const { return divide(k * total, clusters); }
  __device__ int owner(int64_t chunk) const {  // the cluster whose stretch holds the chunk
    int64_t k = total > 0 ? divide(chunk * clusters, total) : 0;
    while (k + 1 < clusters && begin(k + 1) <= chunk) ++k;
    while (begin(k) > chunk) --k;
    return static_cast<int>(k);
  }
  // First chunk of a row with `before` places in the rows before it.
  __device__ int64_t first_chunk(int vhead, int64_t before) const { return vhead * per_head + before + lead; }
};

// Line::lead of the decode before RoPE. When this was measured, another item cost a cluster 13 us (another row) to 20 us (another
// head), a chunk 1.2 us: without a lead, clusters that have parts of two heads end that much after the others.
constexpr int kItemLead = 10;

__device__ inline int chunks_of(const gsrq_layer& layer, const gsrq_call& call, int b) {
  return (coded_range(layer, call, b).count + kChunk - 1) / kChunk;
}

// Of a row in the line.
__device__ inline int places_of(int chunks, int lead) { return chunks + (chunks > 0 ? lead : 0); }

// Sum over rows [0, stop) of their places; all lanes get it.
__device__ inline int64_t places_before(const gsrq_layer& layer, const gsrq_call& call, int stop, int lead) {
  int64_t sum = 0;
  for (int b = threadIdx.x % 32; b < stop; b += 32) sum += places_of(chunks_of(layer, call, b), lead);
  for (int o = 16; o > 0; o /= 2) sum += __shfl_xor_sync(~0u, sum, o);
  return sum;
}

// even: clusters to use where all rows have as many chunks, so that no stretch ends inside of a row needlessly; 0: as others.
__device__ inline Line line_of(const gsrq_layer& layer, const gsrq_call& call, int vheads, int clusters, int even, int lead) {
  const int64_t per_head = places_before(layer, call, call.batch, lead), total = per_head * vheads;
  if (even > 0) {
    bool same = true;
    for (int b = threadIdx.x % 32; b < call.batch; b += 32)
      same = same && static_cast<int64_t>(places_of(chunks_of(layer, call, b), lead)) * call.batch == per_head;
    if (__all_sync(~0u, same)) clusters = even;
  }
  // No cluster between two that have some of a row may have nothing.
  return {per_head, total, static_cast<int>(total < clusters ? (total > 0 ? total : 1) : clusters), lead};
}

// Walks a cluster's stretch item by item; an item is what it has of one (head, row).
struct Cursor {
  int64_t chunk, end;  // places in the line
  int vhead, row, first, stop;  // chunks first .. stop - 1 of the row
  int lead;                     // the line's
  __device__ void start(const gsrq_layer& layer, const gsrq_call& call, const Line& line, int cluster) {
    chunk = cluster < line.clusters ? line.begin(cluster) : line.total;
    end = cluster < line.clusters ? line.begin(cluster + 1) : line.total;
    lead = line.lead;
    if (chunk >= end) return;
    vhead = static_cast<int>(line.divide(chunk, line.per_head));
    int64_t rest = chunk - vhead * line.per_head;
    row = 0;
    for (int at = 0; at < call.batch; at += 32) {  // 32 rows at a time
      const int b = at + threadIdx.x % 32;
      const int64_t own = b < call.batch ? places_of(chunks_of(layer, call, b), lead) : 0, sum = running_sum(own);
      const unsigned found = __ballot_sync(~0u, sum > rest);
      if (found != 0) {
        const int lane = __ffs(found) - 1;
        row = at + lane;
        rest -= __shfl_sync(~0u, sum - own, lane);
        break;
      }
      rest -= __shfl_sync(~0u, sum, 31);
    }
    first = static_cast<int>(rest) - lead;
    if (lead > 0 && first < 0) {  // inside of the lead
      chunk -= first;
      first = 0;
    }
    settle(layer, call);
  }
  __device__ void settle(const gsrq_layer& layer, const gsrq_call& call) {
    const int64_t all = chunks_of(layer, call, row), left = end - chunk;
    stop = static_cast<int>(all < first + left ? all : first + left);
  }
  __device__ bool done() const { return chunk >= end; }
  __device__ void next(const gsrq_layer& layer, const gsrq_call& call) {
    chunk += stop - first;
    if (done()) return;
    first = 0;
    do {
      if (++row == call.batch) {
        row = 0;
        ++vhead;
      }
    } while (chunks_of(layer, call, row) == 0);
    chunk += lead;  // where the stretch may end: then it has nothing of the row
    settle(layer, call);
  }
};

// A cursor in local memory, which a loop that is short of registers does not need: what is spilled in a loop costs a
// trip to the second-level cache each time, as shared memory leaves the first level next to nothing.
struct Parked {
  int64_t chunk, end;
  int vhead, row, first, stop, lead;
};
__device__ inline void park(volatile Parked& to, const Cursor& from) {
  to.chunk = from.chunk, to.end = from.end, to.lead = from.lead;
  to.vhead = from.vhead, to.row = from.row, to.first = from.first, to.stop = from.stop;
}
__device__ inline Cursor unpark(const volatile Parked& from) {
  return {from.chunk, from.end, from.vhead, from.row, from.first, from.stop, from.lead};
}

}  // namespace gsrq::cuda::decoding
