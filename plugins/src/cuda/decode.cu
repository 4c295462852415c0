// Decode attention in code space: one new token a row against the coded tokens and the exact ones. docs/cuda.md.
//
// Scores. A cluster serves one KV head; each CTA keeps a slice of the key codebook (32 dims, int8) in shared memory. A
// warp gathers the codewords of 16 tokens straight into the fragments of an int8 matrix product with a matrix of stage
// multipliers, which adds the stages exactly; the sum, a RoPE pair in each thread, is turned by the token's offset in
// the tile and multiplied on tensor cores with the queries turned back by the tile's first position. Partial scores
// of the slices are exchanged through distributed shared memory.
// Values. Softmax weights, as integers, are added into a bin for each (stage, codeword, head); a second kernel multiplies
// the bins with the codebook, a third adds the exact tokens. Integer adds and fixed orders: the same bits every run.
#include <cmath>
#include <map>
#include <mutex>
#include <tuple>

#include "decode_plan.hpp"
#include "internal.cuh"

namespace gsrq::cuda {
namespace {

constexpr int kKeyThreads = 32 * kKeyWarps, kValueThreads = 32 * kValueWarps;
constexpr float kLog2e = 1.4426950408889634f;
constexpr int kFixedBits = 20;       // weights are integers of 2^-20 of their window's reference
constexpr float kHeadroom = 2.0f;    // log2 by which a weight may exceed it
constexpr int kWindowChunks = 5;     // 5 * 192 * 2^(20 + 2) < 2^32
constexpr float kNone = -INFINITY;
static_assert(kWindowChunks * kChunk * 4LL * (1 << kFixedBits) < (1LL << 32), "bins would overflow");

extern __shared__ __align__(128) char shared_memory[];

struct KeyScale {  // of a CTA's stages: codeword sum = integers * unit
  float unit, shrink;
  signed char multipliers[kMostBlocks * kBlockStages];
};

struct Constants {  // what prepare() derives
  const signed char* words;  // [kv_heads][cluster][blocks][256][4 stages][2 halves][16 dims]
  const KeyScale* scales;    // [planes * splits]
};

struct Memory {  // of a call
  float* bins;       // [partials][cluster][256][stride]
  float2* state;     // [partials][lanes]: reference (log2) and sum of weights
  float2* combined;  // [vheads][batch][lanes]: the same over all partials
  float* values;     // [vheads][slots][batch][lanes][width], divided by the sum
};

struct Range {
  int64_t first;  // token
  int32_t count;  // coded tokens that the query sees
};

__device__ inline Range coded_range(const gsrq_layer& layer, const gsrq_call& call, int b) {
  if (call.new_lengths[b] <= 0) return {layer.sinks, 0};
  int64_t total = call.past_lengths[b] + 1;
  if (total > call.max_total) total = call.max_total;  // never read past what the host sized
  int64_t first = layer.sinks;
  if (layer.sliding_window > 0 && total - layer.sliding_window > first) first = total - layer.sliding_window;
  const int64_t count = layer.sinks + gsrq_coded(total, layer.sinks, layer.window, layer.block) - first;
  return {first, static_cast<int32_t>(count > 0 ? count : 0)};
}

// Chunks of all heads stand in one line, head by head, row by row; cluster k takes an equal stretch of it.
struct Line {
  int64_t per_head, total;
  int clusters;
  __device__ int64_t begin(int64_t k) const { return k * total / clusters; }
  __device__ int owner(int64_t chunk) const {  // the cluster whose stretch holds the chunk
    int64_t k = total > 0 ? chunk * clusters / total : 0;
    while (k + 1 < clusters && begin(k + 1) <= chunk) ++k;
    while (begin(k) > chunk) --k;
    return static_cast<int>(k);
  }
};

__device__ inline int chunks_of(const gsrq_layer& layer, const gsrq_call& call, int b) {
  return (coded_range(layer, call, b).count + kChunk - 1) / kChunk;
}

// Sum over rows [0, stop) of their chunks; all lanes get it.
__device__ inline int64_t chunks_before(const gsrq_layer& layer, const gsrq_call& call, int stop) {
  int64_t sum = 0;
  for (int b = threadIdx.x % 32; b < stop; b += 32) sum += chunks_of(layer, call, b);
  for (int o = 16; o > 0; o /= 2) sum += __shfl_xor_sync(~0u, sum, o);
  return sum;
}

__device__ inline Line line_of(const gsrq_layer& layer, const gsrq_call& call, int vheads, int clusters) {
  const int64_t per_head = chunks_before(layer, call, call.batch);
  return {per_head, per_head * vheads, clusters};
}

// Walks a cluster's stretch item by item; an item is what it has of one (head, row).
struct Cursor {
  int64_t chunk, end;  // in the line
  int vhead, row, first, stop;  // chunks first .. stop - 1 of the row
  __device__ void start(const gsrq_layer& layer, const gsrq_call& call, const Line& line, int cluster) {
    chunk = line.begin(cluster);
    end = line.begin(cluster + 1);
    if (chunk >= end) return;
    vhead = static_cast<int>(chunk / line.per_head);
    int64_t rest = chunk % line.per_head;
    row = 0;
    for (int at = 0; at < call.batch; at += 32) {  // 32 rows at a time
      const int b = at + threadIdx.x % 32;
      int64_t sum = b < call.batch ? chunks_of(layer, call, b) : 0;
      const int64_t own = sum;
      for (int o = 1; o < 32; o *= 2) {
        const int64_t up = __shfl_up_sync(~0u, sum, o);
        if (threadIdx.x % 32 >= o) sum += up;
      }
      const unsigned found = __ballot_sync(~0u, sum > rest);
      if (found != 0) {
        const int lane = __ffs(found) - 1;
        row = at + lane;
        rest -= __shfl_sync(~0u, sum - own, lane);
        break;
      }
      rest -= __shfl_sync(~0u, sum, 31);
    }
    first = static_cast<int>(rest);
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
    settle(layer, call);
  }
};

#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 900

__device__ inline uint32_t shared_address(const void* p) { return static_cast<uint32_t>(__cvta_generic_to_shared(p)); }
__device__ inline uint32_t cluster_rank() {
  uint32_t rank;
  asm("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
  return rank;
}
__device__ inline uint32_t remote(uint32_t address, uint32_t rank) {
  uint32_t out;
  asm("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(out) : "r"(address), "r"(rank));
  return out;
}
__device__ inline void cluster_arrive() { asm volatile("barrier.cluster.arrive.release.aligned;" ::: "memory"); }
__device__ inline void cluster_wait() { asm volatile("barrier.cluster.wait.acquire.aligned;" ::: "memory"); }
template <int Threads>
__device__ inline void sync_warps(int id) {
  asm volatile("bar.sync %0, %1;" ::"r"(id), "n"(Threads) : "memory");
}

__device__ inline uint4 gather(uint32_t address) {
  uint4 v;
  asm volatile("ld.shared.v4.u32 {%0, %1, %2, %3}, [%4];" : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w) : "r"(address));
  return v;
}

__device__ inline void mma_int8(int (&c)[4], uint32_t a0, uint32_t a1, uint32_t a2, uint32_t a3, uint32_t b0, uint32_t b1) {
  asm("mma.sync.aligned.m16n8k32.row.col.s32.s8.s8.s32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
      : "+r"(c[0]), "+r"(c[1]), "+r"(c[2]), "+r"(c[3])
      : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
}

__device__ inline uint32_t pack_half2(float low, float high) {
  const __half2 h = __floats2half2_rn(low, high);
  return *reinterpret_cast<const uint32_t*>(&h);
}

constexpr int kBias = 0x4b400000;  // an integer v added to this pattern reads as the float 12582912 + v
constexpr float kBiasValue = 12582912.0f;

// Bytes 4 i .. 4 i + 3 of a token's codes of one head, as a word each; stages past the last are 0.
template <int Blocks>
__device__ inline void load_codes(uint32_t (&out)[Blocks], const int8_t* row, int first_byte, int bytes, int wide) {
  if (wide == 16 && Blocks == 4) {
    const uint4 v = __ldg(reinterpret_cast<const uint4*>(row + first_byte));
    out[0] = v.x;
    out[1 % Blocks] = v.y;
    out[2 % Blocks] = v.z;
    out[3 % Blocks] = v.w;
    return;
  }
#pragma unroll
  for (int i = 0; i < Blocks; ++i) {
    const int at = first_byte + 4 * i;
    uint32_t word = 0;
    if (wide >= 4) {
      if (at < bytes) word = __ldg(reinterpret_cast<const uint32_t*>(row + at));
    } else {
#pragma unroll
      for (int j = 0; j < 4; ++j)
        if (at + j < bytes) word |= static_cast<uint32_t>(static_cast<uint8_t>(__ldg(row + at + j))) << (8 * j);
    }
    out[i] = word;
  }
}

struct Shared {  // a CTA's shared memory, by the plan
  signed char* words;
  uint32_t* bins;   // [256][stride]: of the current window
  float* totals;    // [256][stride]: of the item
  float* scores;    // [2][cluster][kChunk][lanes]
  uint32_t* weights;  // [kChunk][lanes]
  uint8_t* codes;   // [kChunk][slots_per_cta]
  float* maxima;    // [kValueWarps][lanes]
};

__device__ inline Shared shared_of(const DecodePlan& p, char* base) {
  Shared s;
  s.words = reinterpret_cast<signed char*>(base);
  s.bins = reinterpret_cast<uint32_t*>(base + p.blocks * kBlockBytes);
  s.totals = reinterpret_cast<float*>(s.bins + p.bins());
  s.scores = s.totals + p.bins();
  s.weights = reinterpret_cast<uint32_t*>(s.scores + 2 * p.cluster * kChunk * p.lanes);
  s.maxima = reinterpret_cast<float*>(s.weights + kChunk * p.lanes);
  s.codes = reinterpret_cast<uint8_t*>(s.maxima + kValueWarps * 8);
  return s;
}

// ---------------------------------------------------------------------------------------------------------------- keys

template <int Blocks, int Lanes>
__device__ void score_keys(const gsrq_layer& layer, const gsrq_call& call, const DecodePlan& plan, const Constants& constants,
                           const Shared& shared, Cursor cursor, uint32_t rank) {
  const int thread = threadIdx.x, warp = thread / 32, lane = thread % 32, g = lane / 4, t = lane % 4, parity = g & 1;
  const int slice = rank % plan.slices, part_of_stages = rank / plan.slices, split = part_of_stages % plan.splits;
  const int half = layer.half_rope, bytes = layer.keys.groups * layer.keys.stages;
  const int first_block = split * plan.blocks;

  // Of the CTA's stages: their multipliers as matrices, and what a unit of the integer sum is worth.
  const KeyScale& scale = constants.scales[part_of_stages];
  const float unit = scale.unit, shrink = scale.shrink;
  uint32_t low[Blocks], high[Blocks];
#pragma unroll
  for (int i = 0; i < Blocks; ++i) {
    const uint32_t m = static_cast<uint8_t>(scale.multipliers[i * kBlockStages + t]);
    low[i] = g < 4 ? m << (8 * g) : 0;
    high[i] = g < 4 ? 0 : m << (8 * (g - 4));
  }

  // Column group u of the products holds pairs 4 u' .. 4 u' + 3 of the slice; rows of odd g gather the halves of a
  // codeword in the other order, so that no two threads of a phase meet in a bank.
  int pair[4];
  float turn_c[4][2], turn_s[4][2];
#pragma unroll
  for (int u = 0; u < 4; ++u) {
    pair[u] = slice * 16 + ((u / 2) ^ parity) * 8 + (u % 2) * 4 + t;
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      float c = 1, s = 0, norm = 1;
      const int64_t offset = min(g + 8 * r, layer.positions - 1);
      if (pair[u] < half) {
        norm = layer.cos[pair[u]];
        c = layer.cos[offset * half + pair[u]] / norm;
        s = layer.sin[offset * half + pair[u]] / norm;
      }
      turn_c[u][r] = c * shrink;
      turn_s[u][r] = s * shrink;
    }
  }

  const uint32_t words = shared_address(shared.words) + t * 32 + parity * 16;
  const uint32_t scores = shared_address(shared.scores);
  int loaded = -1;
  uint32_t chunk_index = 0;
  bool pending = false;  // a barrier was arrived at and not yet waited for

  for (; !cursor.done(); cursor.next(layer, call)) {
    const int kv_head = cursor.vhead / plan.parts, part = cursor.vhead % plan.parts;
    const Range range = coded_range(layer, call, cursor.row);
    if (kv_head != loaded) {
      sync_warps<kKeyThreads>(1);
      const uint4* from = reinterpret_cast<const uint4*>(
          constants.words + (static_cast<int64_t>(kv_head) * plan.cluster + rank) * Blocks * kBlockBytes);
      uint4* to = reinterpret_cast<uint4*>(shared.words);
      for (int i = thread; i < Blocks * kBlockBytes / 16; i += kKeyThreads) to[i] = from[i];
      loaded = kv_head;
      sync_warps<kKeyThreads>(1);
    }
    const int group_byte = static_cast<int>(static_cast<int64_t>(kv_head) * layer.head_dim / layer.keys.width) *
                           layer.keys.stages;
    const int first_byte = group_byte + first_block * kBlockStages, last_byte = group_byte + layer.keys.stages;
    const int wide = layer.keys.stages % 4 != 0 ? 1
                     : Blocks == 4 && bytes % 16 == 0 && first_byte % 16 == 0 && first_byte + 16 <= last_byte ? 16
                                                                                                             : 4;

    // The queries: head g's pairs of the slice, turned to the new token's position. Column group v in slice order.
    float query_x[4], query_y[4], query_scale;
    {
      const int head = kv_head * plan.group + part * plan.part_heads + g;
      const bool real = g < plan.part_heads && part * plan.part_heads + g < plan.group;
      const int64_t position = min(call.past_lengths[cursor.row], static_cast<int64_t>(layer.positions) - 1);
      float most = 0;
#pragma unroll
      for (int v = 0; v < 4; ++v) {
        const int p = slice * 16 + v * 4 + t;
        int e0, e1;
        pair_elements(layer, p, &e0, &e1);
        float x = 0, y = 0;
        if (real) {
          const int64_t base = (static_cast<int64_t>(cursor.row) * layer.heads + head) * layer.head_dim;
          x = load(call.query, base + e0, call.dtype);
          y = load(call.query, base + e1, call.dtype);
        }
        const float c = p < half ? layer.cos[position * half + p] : 1.0f;
        const float s = p < half ? layer.sin[position * half + p] : 0.0f;
        query_x[v] = x * c - y * s;
        query_y[v] = y * c + x * s;
        most = fmaxf(most, fmaxf(fabsf(query_x[v]), fabsf(query_y[v])));
      }
      most = fmaxf(most, __shfl_xor_sync(~0u, most, 1));
      most = fmaxf(most, __shfl_xor_sync(~0u, most, 2));
      const float inverse = most > 0 ? 1 / most : 0.0f;  // float16 queries of size 1
#pragma unroll
      for (int v = 0; v < 4; ++v) {
        query_x[v] *= inverse;
        query_y[v] *= inverse;
      }
      query_scale = most * unit * layer.scale * (layer.softcap > 0 ? 1.0f : kLog2e);
    }
    // The products' columns of a thread are heads 2 t and 2 t + 1.
    const float scale0 = __shfl_sync(~0u, query_scale, (2 * t) * 4), scale1 = __shfl_sync(~0u, query_scale, (2 * t + 1) * 4);

    uint32_t codes[2][Blocks], coming[2][Blocks];
    float base_c[4], base_s[4], coming_c[4], coming_s[4];
    const auto fetch = [&](int chunk) {
      const int tile = chunk * kChunk + warp * kTile;
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        const int i = min(tile + g + 8 * r, range.count - 1);
        const int64_t row = code_row(call, cursor.row, range.first - layer.sinks + i);
        load_codes<Blocks>(coming[r], call.key_codes + row * bytes, first_byte, last_byte, wide);
      }
      const int64_t base = min(range.first + tile, static_cast<int64_t>(layer.positions) - 1);
#pragma unroll
      for (int v = 0; v < 4; ++v) {
        const int p = slice * 16 + v * 4 + t;
        coming_c[v] = p < half ? __ldg(layer.cos + base * half + p) : 1.0f;
        coming_s[v] = p < half ? __ldg(layer.sin + base * half + p) : 0.0f;
      }
    };
    fetch(cursor.first);

    for (int chunk = cursor.first; chunk < cursor.stop; ++chunk, ++chunk_index) {
#pragma unroll
      for (int i = 0; i < Blocks; ++i) {
        codes[0][i] = coming[0][i];
        codes[1][i] = coming[1][i];
      }
#pragma unroll
      for (int v = 0; v < 4; ++v) {
        base_c[v] = coming_c[v];
        base_s[v] = coming_s[v];
      }
      if (chunk + 1 < cursor.stop) fetch(chunk + 1);

      int sums[4][4];
#pragma unroll
      for (int u = 0; u < 4; ++u)
#pragma unroll
        for (int k = 0; k < 4; ++k) sums[u][k] = kBias;
#pragma unroll
      for (int i = 0; i < Blocks; ++i) {
        const uint32_t at0 = words + i * kBlockBytes + __byte_perm(codes[0][i], 0, 0x4440 | t) * 128;
        const uint32_t at1 = words + i * kBlockBytes + __byte_perm(codes[1][i], 0, 0x4440 | t) * 128;
        const uint4 a = gather(at0), b = gather(at1);
        const uint4 c = gather(at0 ^ 16), d = gather(at1 ^ 16);
        mma_int8(sums[0], a.x, b.x, a.y, b.y, low[i], high[i]);
        mma_int8(sums[1], a.z, b.z, a.w, b.w, low[i], high[i]);
        mma_int8(sums[2], c.x, d.x, c.y, d.y, low[i], high[i]);
        mma_int8(sums[3], c.z, d.z, c.w, d.w, low[i], high[i]);
      }

      uint32_t keys[4][2];  // [column group][row]: a RoPE pair, turned by the row's offset in the tile
#pragma unroll
      for (int u = 0; u < 4; ++u)
#pragma unroll
        for (int r = 0; r < 2; ++r) {
          const float x = __int_as_float(sums[u][2 * r]) - kBiasValue, y = __int_as_float(sums[u][2 * r + 1]) - kBiasValue;
          keys[u][r] = pack_half2(x * turn_c[u][r] - y * turn_s[u][r], y * turn_c[u][r] + x * turn_s[u][r]);
        }
      float products[4] = {0, 0, 0, 0};
#pragma unroll
      for (int s = 0; s < 2; ++s) {
        uint32_t b[2];
#pragma unroll
        for (int k = 0; k < 2; ++k) {
          const int v = 2 * s + k;
          b[k] = pack_half2(query_x[v] * base_c[v] + query_y[v] * base_s[v], query_y[v] * base_c[v] - query_x[v] * base_s[v]);
        }
        const uint32_t a0 = parity ? keys[2 - 2 * s][0] : keys[2 * s][0], a1 = parity ? keys[2 - 2 * s][1] : keys[2 * s][1];
        const uint32_t a2 = parity ? keys[3 - 2 * s][0] : keys[2 * s + 1][0],
                       a3 = parity ? keys[3 - 2 * s][1] : keys[2 * s + 1][1];
        asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
            : "+f"(products[0]), "+f"(products[1]), "+f"(products[2]), "+f"(products[3])
            : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b[0]), "r"(b[1]));
      }

      if (pending) cluster_wait();  // the other buffer's readers are done, and so is whoever read this one
      const uint32_t to =
          scores + (((chunk_index & 1) * plan.cluster + rank) * kChunk + warp * kTile + g) * Lanes * 4 + 2 * t * 4;
      if (2 * t < Lanes)
        for (uint32_t other = 0; other < static_cast<uint32_t>(plan.cluster); ++other) {
          const uint32_t address = remote(to, other);
          if constexpr (Lanes == 1) {
            asm volatile("st.shared::cluster.f32 [%0], %1;" ::"r"(address), "f"(products[0] * scale0) : "memory");
            asm volatile("st.shared::cluster.f32 [%0], %1;" ::"r"(address + 8 * Lanes * 4), "f"(products[2] * scale0) : "memory");
          } else {
            asm volatile("st.shared::cluster.v2.f32 [%0], {%1, %2};" ::"r"(address), "f"(products[0] * scale0),
                         "f"(products[1] * scale1) : "memory");
            asm volatile("st.shared::cluster.v2.f32 [%0], {%1, %2};" ::"r"(address + 8 * Lanes * 4),
                         "f"(products[2] * scale0), "f"(products[3] * scale1) : "memory");
          }
        }
      __syncwarp();
      cluster_arrive();
      pending = true;
    }
  }
  if (pending) cluster_wait();
}

// -------------------------------------------------------------------------------------------------------------- values

template <int Lanes>
__device__ void bin_values(const gsrq_layer& layer, const gsrq_call& call, const DecodePlan& plan, const Memory& memory,
                           const Shared& shared, Cursor cursor, uint32_t rank, int cluster) {
  const int thread = threadIdx.x - kKeyThreads, warp = thread / 32, lane = thread % 32;
  const int head = thread % Lanes;  // of all scores of the thread
  constexpr int kScores = (kChunk * Lanes + kValueThreads - 1) / kValueThreads;
  constexpr int kCodes = kChunk * kMostSlots / kValueThreads;
  const int slots = plan.slots_per_cta, bytes = layer.values.groups * layer.values.stages;
  const int used = slots * Lanes, code_bytes = kChunk * slots;
  const int tokens_at_once = plan.stride <= 32 ? 32 / plan.stride : 1;
  uint32_t chunk_index = 0;

  for (int i = thread; i < plan.bins(); i += kValueThreads) {
    shared.bins[i] = 0;
    shared.totals[i] = 0;
  }

  for (; !cursor.done(); cursor.next(layer, call)) {
    const int kv_head = cursor.vhead / plan.parts;
    const Range range = coded_range(layer, call, cursor.row);
    const int group_byte = static_cast<int>(static_cast<int64_t>(kv_head) * layer.head_dim / layer.values.width) *
                           layer.values.stages;
    const int first_slot = static_cast<int>(rank) * slots;

    uint8_t coming[kCodes];
    const auto fetch = [&](int chunk) {
#pragma unroll
      for (int k = 0; k < kCodes; ++k) {
        const int at = thread + k * kValueThreads;
        coming[k] = 0;
        if (at < code_bytes) {
          const int token = at / slots, slot = first_slot + at % slots;
          const int i = min(chunk * kChunk + token, range.count - 1);
          if (slot < plan.slots)
            coming[k] = static_cast<uint8_t>(
                __ldg(call.value_codes + code_row(call, cursor.row, range.first - layer.sinks + i) * bytes + group_byte + slot));
        }
      }
    };
    fetch(cursor.first);

    // Of the thread's head: the item's and the window's reference exponents, and the sums of weights under each.
    float item_reference = kNone, window_reference = kNone, item_sum = 0;
    uint32_t window_sum = 0;  // of the thread's tokens
    int window_chunks = 0;

    // Moves the window's bins into the item's totals. All value threads call it together.
    const auto flush = [&](bool last) {
      const float reference = fmaxf(item_reference, window_reference);
      const float keep = item_reference == kNone ? 0.0f : exp2f(item_reference - reference);
      const float add = window_reference == kNone ? 0.0f : exp2f(window_reference - reference - kFixedBits);
      item_sum = item_sum * keep + static_cast<float>(window_sum) * add;
      sync_warps<kValueThreads>(2);
      for (int i = thread; i < plan.bins(); i += kValueThreads) {  // i % Lanes == head: strides are multiples of Lanes
        const float total = shared.totals[i] * keep + static_cast<float>(shared.bins[i]) * add;
        shared.bins[i] = 0;
        shared.totals[i] = last ? 0.0f : total;
        if (last) {
          const int64_t partial = static_cast<int64_t>(cursor.vhead) * call.batch + cursor.row + cluster;
          memory.bins[(partial * plan.cluster + rank) * plan.bins() + i] = total;
        }
      }
      sync_warps<kValueThreads>(2);
      item_reference = reference;
      window_reference = kNone;
      window_sum = 0;
      window_chunks = 0;
    };

    for (int chunk = cursor.first; chunk < cursor.stop; ++chunk, ++chunk_index) {
      cluster_arrive();
      cluster_wait();
#pragma unroll
      for (int k = 0; k < kCodes; ++k)
        if (thread + k * kValueThreads < code_bytes) shared.codes[thread + k * kValueThreads] = coming[k];
      if (chunk + 1 < cursor.stop) fetch(chunk + 1);

      const float* scores = shared.scores + (chunk_index & 1) * plan.cluster * kChunk * Lanes;
      float score[kScores];
      float most = kNone;
#pragma unroll
      for (int k = 0; k < kScores; ++k) {
        const int at = thread + k * kValueThreads;
        float sum = kNone;
        if (at < kChunk * Lanes && chunk * kChunk + at / Lanes < range.count) {
          sum = 0;
          for (int other = 0; other < plan.cluster; ++other) sum += scores[other * kChunk * Lanes + at];
          if (layer.softcap > 0) sum = layer.softcap * tanhf(sum / layer.softcap) * kLog2e;
        }
        score[k] = sum;
        most = fmaxf(most, sum);
      }
#pragma unroll
      for (int o = 16; o >= Lanes; o /= 2) most = fmaxf(most, __shfl_xor_sync(~0u, most, o));
      if (lane < Lanes) shared.maxima[warp * Lanes + lane] = most;
      sync_warps<kValueThreads>(2);
      most = kNone;
      bool exceeds = false;  // the same in all threads: over all heads
#pragma unroll
      for (int h = 0; h < Lanes; ++h) {
        float m = kNone;
#pragma unroll
        for (int w = 0; w < kValueWarps; ++w) m = fmaxf(m, shared.maxima[w * Lanes + h]);
        if (h == head) most = m;
      }
      exceeds = most > window_reference + kHeadroom;
      const bool full = window_chunks == kWindowChunks;
      if (__any_sync(~0u, exceeds) || full) {  // every warp holds every head, so all warps agree
        if (window_chunks > 0) flush(false);
        window_reference = most;
      }
      ++window_chunks;

#pragma unroll
      for (int k = 0; k < kScores; ++k) {
        const int at = thread + k * kValueThreads;
        if (at < kChunk * Lanes) {
          const uint32_t weight = score[k] == kNone ? 0u : __float2uint_rn(exp2f(score[k] - window_reference + kFixedBits));
          shared.weights[at] = weight;
          window_sum += weight;
        }
      }
      sync_warps<kValueThreads>(2);

      const int tokens = min(kChunk, range.count - chunk * kChunk);
      if (plan.stride <= 32) {
        const int sub = lane / plan.stride, bin = lane % plan.stride, slot = bin / Lanes;
        if (bin < used)
          for (int token = warp * tokens_at_once + sub; token < tokens; token += kValueWarps * tokens_at_once) {
            const uint32_t weight = shared.weights[token * Lanes + bin % Lanes];
            if (weight != 0) atomicAdd(&shared.bins[shared.codes[token * slots + slot] * plan.stride + bin], weight);
          }
      } else {
        for (int token = warp; token < tokens; token += kValueWarps)
          for (int bin = lane; bin < used; bin += 32) {
            const uint32_t weight = shared.weights[token * Lanes + bin % Lanes];
            if (weight != 0) atomicAdd(&shared.bins[shared.codes[token * slots + bin / Lanes] * plan.stride + bin], weight);
          }
      }
    }
    flush(true);
    // The sum of weights over the threads of a head.
    float sum = item_sum;
#pragma unroll
    for (int o = 16; o >= Lanes; o /= 2) sum += __shfl_xor_sync(~0u, sum, o);
    if (lane < Lanes) shared.maxima[warp * Lanes + lane] = sum;
    sync_warps<kValueThreads>(2);
    if (rank == 0 && thread < Lanes) {
      float total = 0;
      for (int w = 0; w < kValueWarps; ++w) total += shared.maxima[w * Lanes + thread];
      const int64_t partial = static_cast<int64_t>(cursor.vhead) * call.batch + cursor.row + cluster;
      memory.state[partial * Lanes + thread] = make_float2(item_reference, total);
    }
    sync_warps<kValueThreads>(2);
  }
}

template <int Blocks, int Lanes>
__global__ void __launch_bounds__(kDecodeThreads, 1)
    decode_kernel(const __grid_constant__ gsrq_layer layer, const __grid_constant__ gsrq_call call,
                  const __grid_constant__ DecodePlan plan, Constants constants, Memory memory, int vheads) {
  const Shared shared = shared_of(plan, shared_memory);
  const uint32_t rank = cluster_rank();
  const int cluster = blockIdx.x / plan.cluster, clusters = gridDim.x / plan.cluster;
  const Line line = line_of(layer, call, vheads, clusters);
  Cursor cursor{};
  cursor.start(layer, call, line, cluster);
  cluster_arrive();  // no CTA may write into another that has not started
  cluster_wait();
  if (threadIdx.x < kKeyThreads) score_keys<Blocks, Lanes>(layer, call, plan, constants, shared, cursor, rank);
  else bin_values<Lanes>(layer, call, plan, memory, shared, cursor, rank, cluster);
}

#else
template <int Blocks, int Lanes>
__global__ void decode_kernel(gsrq_layer, gsrq_call, DecodePlan, Constants, Memory, int) {}
#endif

// ------------------------------------------------------------------------------------------------------------- combine

// Clusters that hold a part of (vhead, row): [first, last]; none if the row has no coded tokens.
__device__ inline void owners(const gsrq_layer& layer, const gsrq_call& call, const Line& line, int vhead, int row,
                              int64_t before, int* first, int* last) {
  const int64_t begin = vhead * line.per_head + before, count = chunks_of(layer, call, row);
  *first = 0;
  *last = -1;
  if (count == 0) return;
  *first = line.owner(begin);
  *last = line.owner(begin + count - 1);
}

constexpr int kCombineThreads = 256, kCombineRows = 64, kPadHalves = 8;

__device__ inline void mma_half(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

// One value slot of one head: the bins of up to 64 (row, query head) pairs times the slot's 256 codewords. The bins, at
// most 1 after division by their sum, are split into two float16 of 22 bits together.
__global__ void __launch_bounds__(kCombineThreads)
    combine_values(const __grid_constant__ gsrq_layer layer, const __grid_constant__ gsrq_call call,
                   const __grid_constant__ DecodePlan plan, Memory memory, int vheads, int clusters) {
  char* const raw = shared_memory;
  const int slot = blockIdx.x, vhead = blockIdx.y, kv_head = vhead / plan.parts;
  const int rows_at_once = kCombineRows / plan.lanes, first_row = blockIdx.z * rows_at_once;
  const int rows = min(rows_at_once, call.batch - first_row), pairs = rows * plan.lanes;
  const int width = plan.width, pitch = width + kPadHalves, bin_pitch = kCodewords + kPadHalves;
  __half* words = reinterpret_cast<__half*>(raw);                    // [256][pitch]
  __half* high = words + kCodewords * pitch;                         // [64][bin_pitch]
  __half* low = high + kCombineRows * bin_pitch;
  __shared__ int first_owner[kCombineRows], last_owner[kCombineRows];
  __shared__ float reference[kCombineRows], inverse[kCombineRows];
  const int thread = threadIdx.x, warp = thread / 32, lane = thread % 32;

  // The codewords: sub-vector, column and stage of the slot.
  const int64_t element = static_cast<int64_t>(kv_head) * layer.head_dim + (slot / layer.values.stages) * width;
  const int64_t group = element / layer.values.width, column = element % layer.values.width;
  const __half* from = static_cast<const __half*>(layer.values.codewords) +
                       (group * layer.values.stages + slot % layer.values.stages) * kCodewords * layer.values.width + column;
  const int vectors = width / 8;
  const bool aligned = layer.values.width % 8 == 0 && column % 8 == 0;
  for (int i = thread; i < kCodewords * vectors; i += kCombineThreads) {
    const int code = i / vectors, at = i % vectors * 8;
    const __half* source = from + static_cast<int64_t>(code) * layer.values.width + at;
    if (aligned) *reinterpret_cast<uint4*>(words + code * pitch + at) = __ldg(reinterpret_cast<const uint4*>(source));
    else
      for (int j = 0; j < 8; ++j) words[code * pitch + at + j] = source[j];
  }

  const Line line = line_of(layer, call, vheads, clusters);
  if (warp == 0) {
    int64_t before = chunks_before(layer, call, first_row);
    for (int r = 0; r < rows; ++r) {
      if (lane == 0) owners(layer, call, line, vhead, first_row + r, before, &first_owner[r], &last_owner[r]);
      before += chunks_of(layer, call, first_row + r);
    }
  }
  __syncthreads();
  for (int i = thread; i < pairs; i += kCombineThreads) {
    const int r = i / plan.lanes, h = i % plan.lanes, row = first_row + r;
    const int64_t base = static_cast<int64_t>(vhead) * call.batch + row;
    float most = kNone, sum = 0;
    for (int k = first_owner[r]; k <= last_owner[r]; ++k) most = fmaxf(most, memory.state[(base + k) * plan.lanes + h].x);
    for (int k = first_owner[r]; k <= last_owner[r]; ++k) {
      const float2 s = memory.state[(base + k) * plan.lanes + h];
      if (s.x != kNone) sum += s.y * exp2f(s.x - most);
    }
    reference[i] = most;
    inverse[i] = sum > 0 ? 1 / sum : 0.0f;
    if (slot == 0) memory.combined[base * plan.lanes + h] = make_float2(most, sum);
  }
  __syncthreads();

  // Bins of all owners, scaled and added in the owners' order.
  const int rank = slot / plan.slots_per_cta, place = slot % plan.slots_per_cta;
  const int tiles = (pairs + 15) / 16;
  for (int i = thread; i < tiles * 16 * kCodewords; i += kCombineThreads) {
    const int h = i % plan.lanes, code = i / plan.lanes % kCodewords, r = i / (plan.lanes * kCodewords);
    const int at = r * plan.lanes + h;
    float total = 0;
    if (at < pairs) {
      const int64_t base = static_cast<int64_t>(vhead) * call.batch + first_row + r;
      for (int k = first_owner[r]; k <= last_owner[r]; ++k) {
        const float factor = exp2f(memory.state[(base + k) * plan.lanes + h].x - reference[at]);
        total += factor * memory.bins[((base + k) * plan.cluster + rank) * plan.bins() + code * plan.stride +
                                      place * plan.lanes + h];
      }
      total *= inverse[at];
    }
    const __half top = __float2half_rn(total);
    high[at * bin_pitch + code] = top;
    low[at * bin_pitch + code] = __float2half_rn((total - __half2float(top)) * 2048);
  }
  __syncthreads();

  const int g = lane / 4, t = lane % 4;
  const int pieces = width / 8;
  for (int piece = warp; piece < pieces; piece += kCombineThreads / 32) {
    for (int tile = 0; tile < tiles; ++tile) {
      float upper[4] = {0, 0, 0, 0}, lower[4] = {0, 0, 0, 0};
      for (int k = 0; k < kCodewords; k += 16) {
        uint32_t b0, b1;  // codewords k .. k + 15 of 8 dims, as the product wants them
        const uint32_t address = static_cast<uint32_t>(
            __cvta_generic_to_shared(words + (k + lane % 16) * pitch + piece * 8));
        asm volatile("ldmatrix.sync.aligned.m8n8.x2.trans.shared.b16 {%0, %1}, [%2];" : "=r"(b0), "=r"(b1) : "r"(address));
        uint32_t a[4];
        const auto fragment = [&](const __half* from_bins) {
          const __half* at = from_bins + (tile * 16 + g) * bin_pitch + k + 2 * t;
          a[0] = *reinterpret_cast<const uint32_t*>(at);
          a[1] = *reinterpret_cast<const uint32_t*>(at + 8 * bin_pitch);
          a[2] = *reinterpret_cast<const uint32_t*>(at + 8);
          a[3] = *reinterpret_cast<const uint32_t*>(at + 8 * bin_pitch + 8);
        };
        fragment(high);
        mma_half(upper, a, b0, b1);
        fragment(low);
        mma_half(lower, a, b0, b1);
      }
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        const int at = tile * 16 + g + 8 * r;
        if (at >= pairs) continue;
        const int64_t row = first_row + at / plan.lanes;
        float* to = memory.values +
                    (((static_cast<int64_t>(vhead) * plan.slots + slot) * call.batch + row) * plan.lanes + at % plan.lanes) * width +
                    piece * 8 + 2 * t;
        to[0] = upper[2 * r] + lower[2 * r] / 2048;
        to[1] = upper[2 * r + 1] + lower[2 * r + 1] / 2048;
      }
    }
  }
}

constexpr int kFinishThreads = 256, kExactTile = 64;

// The exact tokens of one (row, vhead), and the sum of it all.
__global__ void __launch_bounds__(kFinishThreads)
    finish(const __grid_constant__ gsrq_layer layer, const __grid_constant__ gsrq_call call,
           const __grid_constant__ DecodePlan plan, Memory memory, int has_coded) {
  const int vhead = blockIdx.x, row = blockIdx.y, kv_head = vhead / plan.parts, part = vhead % plan.parts;
  const int d = layer.head_dim, thread = threadIdx.x, warp = thread / 32, lane = thread % 32, half = layer.half_rope;
  const int64_t first_head = static_cast<int64_t>(kv_head) * plan.group + part * plan.part_heads;
  const int heads = min(plan.part_heads, plan.group - part * plan.part_heads);
  __shared__ float queries[8][256];                 // turned and scaled, pair by pair
  __shared__ float weights[8][kExactTile];
  __shared__ float reference[8], sum[8], keep[8];
  if (call.new_lengths[row] <= 0) {
    for (int i = thread; i < heads * d; i += kFinishThreads)
      store(call.output, (row * static_cast<int64_t>(layer.heads) + first_head) * d + i, 0, call.dtype);
    return;
  }
  const int64_t past = min(call.past_lengths[row], call.max_total - 1), total = past + 1;
  const int64_t slots = gsrq_exact_slots(layer.sinks, layer.window, layer.block);
  const int64_t first_recent = layer.sinks + gsrq_coded(total, layer.sinks, layer.window, layer.block);
  const int64_t sinks = min(static_cast<int64_t>(layer.sinks), total);
  const int64_t recent = total > first_recent ? total - first_recent : 0, count = sinks + recent;
  const int64_t lowest = layer.sliding_window > 0 ? total - layer.sliding_window : 0;  // the first visible token
  const float scale = layer.scale * (layer.softcap > 0 ? 1.0f : kLog2e);

  for (int i = thread; i < heads * (d / 2); i += kFinishThreads) {
    const int h = i / (d / 2), p = i % (d / 2);
    int e0, e1;
    pair_elements(layer, p, &e0, &e1);
    const int64_t base = (row * static_cast<int64_t>(layer.heads) + first_head + h) * d;
    const float x = load(call.query, base + e0, call.dtype), y = load(call.query, base + e1, call.dtype);
    const float c = p < half ? layer.cos[past * half + p] : 1.0f, s = p < half ? layer.sin[past * half + p] : 0.0f;
    queries[h][2 * p] = (x * c - y * s) * scale;
    queries[h][2 * p + 1] = (y * c + x * s) * scale;
  }
  if (thread < 8) {
    reference[thread] = kNone;
    sum[thread] = 0;
  }
  __syncthreads();

  // Output elements of a thread: (head, dim) = thread + i * 256.
  constexpr int kOutputs = 8 * 256 / kFinishThreads;
  float out[kOutputs];
#pragma unroll
  for (int i = 0; i < kOutputs; ++i) out[i] = 0;

  const auto element = [&](const void* fresh, const void* buffer, int64_t token, int e) {
    if (token == past)
      return rounded(load(fresh, (row * static_cast<int64_t>(layer.kv_heads) + kv_head) * d + e, call.dtype), call.exact_dtype);
    const int64_t slot = gsrq_slot(token, layer.sinks, layer.window, layer.block);
    return load(buffer, ((row * static_cast<int64_t>(layer.kv_heads) + kv_head) * slots + slot) * d + e, call.exact_dtype);
  };
  const auto token_of = [&](int64_t i) { return i < sinks ? i : first_recent + i - sinks; };

  for (int64_t tile = 0; tile < count; tile += kExactTile) {
    const int here = static_cast<int>(min(static_cast<int64_t>(kExactTile), count - tile));
    for (int i = warp; i < here; i += kFinishThreads / 32) {
      const int64_t token = token_of(tile + i);
      float dots[8];
#pragma unroll
      for (int h = 0; h < 8; ++h) dots[h] = 0;
      for (int p = lane; p < d / 2; p += 32) {
        int e0, e1;
        pair_elements(layer, p, &e0, &e1);
        const float x = element(call.key, call.key_exact, token, e0), y = element(call.key, call.key_exact, token, e1);
        const float c = p < half ? layer.cos[token * half + p] : 1.0f, s = p < half ? layer.sin[token * half + p] : 0.0f;
        const float kx = x * c - y * s, ky = y * c + x * s;
#pragma unroll
        for (int h = 0; h < 8; ++h)
          if (h < heads) dots[h] += queries[h][2 * p] * kx + queries[h][2 * p + 1] * ky;
      }
#pragma unroll
      for (int h = 0; h < 8; ++h) {
        if (h >= heads) break;
        for (int o = 16; o > 0; o /= 2) dots[h] += __shfl_xor_sync(~0u, dots[h], o);
        if (lane == h) {
          float s = dots[h];
          if (layer.softcap > 0) s = layer.softcap * tanhf(s / layer.softcap) * kLog2e;
          weights[h][i] = token >= lowest ? s : kNone;
        }
      }
    }
    __syncthreads();
    if (warp < heads) {  // one warp a head
      float most = reference[warp];
      for (int i = lane; i < here; i += 32) most = fmaxf(most, weights[warp][i]);
      for (int o = 16; o > 0; o /= 2) most = fmaxf(most, __shfl_xor_sync(~0u, most, o));
      float added = 0;
      for (int i = lane; i < here; i += 32) {
        const float w = weights[warp][i] == kNone ? 0.0f : exp2f(weights[warp][i] - most);
        weights[warp][i] = w;
        added += w;
      }
      for (int o = 16; o > 0; o /= 2) added += __shfl_xor_sync(~0u, added, o);
      if (lane == 0) {
        keep[warp] = reference[warp] == kNone ? 0.0f : exp2f(reference[warp] - most);
        sum[warp] = sum[warp] * keep[warp] + added;
        reference[warp] = most;
      }
    }
    __syncthreads();
#pragma unroll
    for (int k = 0; k < kOutputs; ++k) {
      const int at = thread + k * kFinishThreads;
      if (at >= heads * d) continue;
      const int h = at / d, e = at % d;
      float o = out[k] * keep[h];
      for (int i = 0; i < here; ++i) o += weights[h][i] * element(call.value, call.value_exact, token_of(tile + i), e);
      out[k] = o;
    }
    __syncthreads();
  }

#pragma unroll
  for (int k = 0; k < kOutputs; ++k) {
    const int at = thread + k * kFinishThreads;
    if (at >= heads * d) continue;
    const int h = at / d, e = at % d;
    float2 coded = make_float2(kNone, 0);
    float value = 0;
    if (has_coded) {
      coded = memory.combined[(static_cast<int64_t>(vhead) * call.batch + row) * plan.lanes + h];
      if (coded.y > 0)
        for (int r = 0; r < layer.values.stages; ++r) {
          const int slot = e / plan.width * layer.values.stages + r;
          value += memory.values[(((static_cast<int64_t>(vhead) * plan.slots + slot) * call.batch + row) * plan.lanes + h) * plan.width +
                                 e % plan.width];
        }
    }
    const float most = fmaxf(reference[h], coded.x);
    const float exact_share = reference[h] == kNone ? 0.0f : exp2f(reference[h] - most);
    const float coded_share = coded.y > 0 ? exp2f(coded.x - most) * coded.y : 0.0f;
    const float result = (out[k] * exact_share + value * coded_share) / (sum[h] * exact_share + coded_share);
    store(call.output, (row * static_cast<int64_t>(layer.heads) + first_head + h) * d + e, result, call.dtype);
  }
}

// ------------------------------------------------------------------------------------------------------------- prepare

// The key codewords as int8 slices; see Constants::words. One thread a byte.
__global__ void slice_keys(const __grid_constant__ gsrq_layer layer, const __grid_constant__ DecodePlan plan, signed char* out) {
  const int64_t i = blockIdx.x * static_cast<int64_t>(blockDim.x) + threadIdx.x;
  const int64_t per_cta = static_cast<int64_t>(plan.blocks) * kBlockBytes;
  if (i >= layer.kv_heads * static_cast<int64_t>(plan.cluster) * per_cta) return;
  const int kv_head = static_cast<int>(i / (plan.cluster * per_cta)), rank = static_cast<int>(i / per_cta % plan.cluster);
  const int byte = static_cast<int>(i % per_cta);
  const int block = byte / kBlockBytes, code = byte / 128 % kCodewords, stage_in_block = byte / 32 % 4, inside = byte % 32;
  const int slice = rank % plan.slices, split = rank / plan.slices % plan.splits, plane = rank / (plan.slices * plan.splits);
  const int stage = (split * plan.blocks + block) * kBlockStages + stage_in_block;
  signed char result = 0;
  if (stage < layer.keys.stages && split * plan.blocks + block < plan.all_blocks) {
    int elements[2];
    pair_elements(layer, slice * 16 + inside / 2, &elements[0], &elements[1]);
    const int64_t at = static_cast<int64_t>(kv_head) * layer.head_dim + elements[inside % 2];
    const int64_t group = at / layer.keys.width, column = at % layer.keys.width;
    const float x = __half2float(static_cast<const __half*>(
        layer.keys.codewords)[((group * layer.keys.stages + stage) * kCodewords + code) * layer.keys.width + column]);
    const float units = ldexpf(x, -layer.exponents[stage]);
    const float upper = fminf(fmaxf(rintf(units), -127.0f), 127.0f);
    result = static_cast<signed char>(
        plane == 0 ? upper : fminf(fmaxf(rintf((units - upper) * 256), -127.0f), 127.0f));
  }
  out[i] = result;
}

struct KeyScales {
  KeyScale scales[kMostCluster];
};

__global__ void store_scales(KeyScales scales, KeyScale* out, int count) {
  if (threadIdx.x < count) out[threadIdx.x] = scales.scales[threadIdx.x];
}

KeyScales key_scales(const gsrq_layer& layer, const DecodePlan& plan) {
  KeyScales out{};
  for (int plane = 0; plane < plan.planes; ++plane)
    for (int split = 0; split < plan.splits; ++split) {
      KeyScale& scale = out.scales[plane * plan.splits + split];
      const int first = split * plan.blocks * kBlockStages;
      const int stop = std::min(first + plan.blocks * kBlockStages, layer.keys.stages);
      int lowest = 1000;
      for (int r = first; r < stop; ++r) lowest = std::min(lowest, layer.exponents[r]);
      float bound = 0;
      for (int r = first; r < stop; ++r) {
        scale.multipliers[r - first] = static_cast<signed char>(1 << (layer.exponents[r] - lowest));
        bound += 127.0f * scale.multipliers[r - first];
      }
      if (first >= stop) lowest = 0;
      int shift = 0;  // turned sums must stay in float16's range
      while (std::ldexp(bound * 1.5f, -shift) > 32768.0f) ++shift;
      scale.shrink = std::ldexp(1.0f, -shift);
      scale.unit = std::ldexp(1.0f, lowest + shift - 8 * plane);
    }
  return out;
}

bool multipliers_fit(const gsrq_layer& layer) {
  int least = layer.exponents[0], most = layer.exponents[0];
  for (int r = 1; r < layer.keys.stages; ++r) {
    least = std::min(least, layer.exponents[r]);
    most = std::max(most, layer.exponents[r]);
  }
  return most - least <= kMostMultiplier;
}

using Kernel = void (*)(gsrq_layer, gsrq_call, DecodePlan, Constants, Memory, int);

template <int Lanes>
Kernel kernel_of(int blocks) {
  switch (blocks) {
#ifndef GSRQ_DECODE_FEW
    case 1: return decode_kernel<1, Lanes>;
    case 2: return decode_kernel<2, Lanes>;
    case 6: return decode_kernel<6, Lanes>;
#endif
    case 3: return decode_kernel<3, Lanes>;
    case 4: return decode_kernel<4, Lanes>;
    default: return nullptr;
  }
}

Kernel kernel_of(const DecodePlan& plan) {
  switch (plan.lanes) {
#ifndef GSRQ_DECODE_FEW
    case 1: return kernel_of<1>(plan.blocks);
    case 8: return kernel_of<8>(plan.blocks);
#endif
    case 4: return kernel_of<4>(plan.blocks);
    default: return nullptr;
  }
}

cudaLaunchConfig_t launch_config(const DecodePlan& plan, cudaLaunchAttribute* attribute, int clusters) {
  attribute->id = cudaLaunchAttributeClusterDimension;
  attribute->val.clusterDim = {static_cast<unsigned>(plan.cluster), 1, 1};
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(static_cast<unsigned>(clusters * plan.cluster));
  config.blockDim = dim3(kDecodeThreads);
  config.dynamicSmemBytes = static_cast<size_t>(plan.shared_bytes);
  config.attrs = attribute;
  config.numAttrs = 1;
  return config;
}

int combine_bytes(const DecodePlan& plan) {
  return 2 * (kCodewords * (plan.width + kPadHalves) + 2 * kCombineRows * (kCodewords + kPadHalves));
}

// Clusters that run at once on the current device, 0 where none can; asked once a device and kernel.
int resident_clusters(const DecodePlan& plan) {
  static std::mutex mutex;
  static std::map<std::tuple<int, const void*, int, int>, int> known;
  const Kernel kernel = kernel_of(plan);
  int device = 0, major = 0;
  if (kernel == nullptr || cudaGetDevice(&device) != cudaSuccess) return 0;
  const auto key = std::make_tuple(device, reinterpret_cast<const void*>(kernel), plan.cluster, plan.shared_bytes);
  const std::lock_guard<std::mutex> lock(mutex);
  const auto found = known.find(key);
  if (found != known.end()) return found->second;
  int clusters = 0;
  if (cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device) == cudaSuccess && major >= 9) {
    cudaLaunchAttribute attribute;
    const cudaLaunchConfig_t config = launch_config(plan, &attribute, 1);
    const bool ready =
        cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, kSharedLimit) == cudaSuccess &&
        (plan.cluster <= 8 || cudaFuncSetAttribute(kernel, cudaFuncAttributeNonPortableClusterSizeAllowed, 1) == cudaSuccess) &&
        cudaFuncSetAttribute(combine_values, cudaFuncAttributeMaxDynamicSharedMemorySize, kSharedLimit - 4096) == cudaSuccess &&
        cudaOccupancyMaxActiveClusters(&clusters, kernel, &config) == cudaSuccess;
    if (!ready) clusters = 0;
    cudaGetLastError();
  }
  known[key] = clusters;
  return clusters;
}

Memory take_memory(const gsrq_call& call, const DecodePlan& plan, int vheads, int clusters, Arena& workspace) {
  const int64_t rows = static_cast<int64_t>(vheads) * call.batch, partials = rows + clusters;
  Memory m{};
  m.bins = workspace.take<float>(partials * plan.cluster * plan.bins());
  m.state = workspace.take<float2>(partials * plan.lanes);
  m.combined = workspace.take<float2>(rows * plan.lanes);
  m.values = workspace.take<float>(rows * plan.slots * plan.lanes * plan.width);
  return m;
}

Constants take_constants(const gsrq_layer& layer, const DecodePlan& plan, Arena& prepared) {
  Constants c{};
  c.words = prepared.take<signed char>(static_cast<int64_t>(layer.kv_heads) * plan.cluster * plan.blocks * kBlockBytes);
  c.scales = prepared.take<KeyScale>(kMostCluster);
  return c;
}

bool plan_of(const gsrq_layer& layer, DecodePlan* plan) {
  return make_decode_plan(layer, plan) && multipliers_fit(layer) && resident_clusters(*plan) > 0;
}

}  // namespace

int decode_prepare(const gsrq_layer& layer, Arena& prepared, cudaStream_t stream, bool launch) {
  DecodePlan plan;
  if (!plan_of(layer, &plan)) return 0;
  const Constants constants = take_constants(layer, plan, prepared);
  if (!launch) return 0;
  const int64_t bytes = static_cast<int64_t>(layer.kv_heads) * plan.cluster * plan.blocks * kBlockBytes;
  slice_keys<<<static_cast<unsigned>((bytes + 255) / 256), 256, 0, stream>>>(layer, plan,
                                                                             const_cast<signed char*>(constants.words));
  store_scales<<<1, 32, 0, stream>>>(key_scales(layer, plan), const_cast<KeyScale*>(constants.scales),
                                     plan.planes * plan.splits);
  return launched("decode_prepare");
}

bool decode_supported(const gsrq_layer& layer, const gsrq_call& call) {
  DecodePlan plan;
  return call.steps == 1 && plan_of(layer, &plan);
}

void decode_workspace(const gsrq_layer& layer, const gsrq_call& call, Arena& workspace) {
  DecodePlan plan;
  if (!plan_of(layer, &plan)) return;
  take_memory(call, plan, layer.kv_heads * plan.parts, resident_clusters(plan), workspace);
}

int decode(const gsrq_layer& layer, const gsrq_call& call, Arena& prepared, Arena& workspace, cudaStream_t stream) {
  DecodePlan plan;
  if (!plan_of(layer, &plan)) return fail("the fast decode does not apply");
  const int vheads = layer.kv_heads * plan.parts, clusters = resident_clusters(plan);
  const Constants constants = take_constants(layer, plan, prepared);
  const Memory memory = take_memory(call, plan, vheads, clusters, workspace);
  const bool has_coded = gsrq_coded(call.max_total, layer.sinks, layer.window, layer.block) > 0;
  if (has_coded) {
    cudaLaunchAttribute attribute;
    cudaLaunchConfig_t config = launch_config(plan, &attribute, clusters);
    config.stream = stream;
    if (cudaLaunchKernelEx(&config, kernel_of(plan), layer, call, plan, constants, memory, vheads) != cudaSuccess)
      return launched("decode_kernel");
    const int rows_at_once = kCombineRows / plan.lanes;
    const dim3 grid(static_cast<unsigned>(plan.slots), static_cast<unsigned>(vheads),
                    static_cast<unsigned>((call.batch + rows_at_once - 1) / rows_at_once));
    combine_values<<<grid, kCombineThreads, combine_bytes(plan), stream>>>(layer, call, plan, memory, vheads, clusters);
    if (launched("combine_values")) return 1;
  }
  finish<<<dim3(static_cast<unsigned>(vheads), static_cast<unsigned>(call.batch)), kFinishThreads, 0, stream>>>(
      layer, call, plan, memory, has_coded);
  return launched("finish");
}

}  // namespace gsrq::cuda
