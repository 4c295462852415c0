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
constexpr int kFixedBits = 19;       // weights are integers of 2^-19 of their window's reference
constexpr float kHeadroom = 2.0f;    // log2 by which a weight may exceed it
constexpr int kWindowTokens = 2047;  // of that size fit a bin: 2047 * 2^(19 + 2) < 2^32
constexpr int kAnchorChunks = 32;    // between two exact turns of the queries; a power of two
constexpr float kNone = -INFINITY;
static_assert(kWindowTokens * 4LL * (1 << kFixedBits) < (1LL << 32), "bins would overflow");

extern __shared__ __align__(128) char shared_memory[];

__device__ inline float exp2_fast(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

struct KeyScale {  // of a CTA's stages: codeword sum = integers * unit
  float unit, shrink;
  signed char multipliers[kMostBlocks * kBlockStages];
};

struct Constants {  // what prepare() derives
  const signed char* words;  // [kv_heads][cluster][blocks][256][4 stages][2 halves][16 dims]
  const KeyScale* scales;    // [planes * splits]
};

struct Memory {  // of a call
  float* bins;       // [partials][ways][256][stride]
  float* scratch;    // [CTAs][2][256][stride]: of an item, before the owners' are added
  float2* scratch_state;  // [CTAs][2][lanes]
  float2* state;     // [partials][lanes]: reference (log2) and sum of weights
  float2* combined;  // [vheads][batch][lanes]: the same over all partials
  float* values;     // [vheads][slots][batch][lanes][width], divided by the sum
  float* exact;      // [batch][vheads][splits][lanes][head_dim]: of exact tokens
  float2* exact_state;  // [batch][vheads][splits][lanes]
};

// gsrq_coded() and gsrq_slot() of layout.h in 32 bits, which positions fit: 64-bit divisions take hundreds of cycles.
__device__ inline int coded_tokens(const gsrq_layer& layer, int total) {
  const int full = total - layer.sinks - layer.window;
  const uint32_t block = static_cast<uint32_t>(layer.block);
  return full > 0 ? static_cast<int>(static_cast<uint32_t>(full) / block * block) : 0;
}

__device__ inline int exact_slot(const gsrq_layer& layer, int token) {
  const uint32_t ring = static_cast<uint32_t>(layer.window + layer.block);
  return token < layer.sinks ? token : layer.sinks + static_cast<int>(static_cast<uint32_t>(token - layer.sinks) % ring);
}

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
  const int count = layer.sinks + coded_tokens(layer, total) - first;
  return {first, count > 0 ? count : 0};
}

// Chunks of all heads stand in one line, head by head, row by row; cluster k takes an equal stretch of it.
struct Line {
  int64_t per_head, total;
  int clusters;
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
  const int64_t per_head = chunks_before(layer, call, call.batch), total = per_head * vheads;
  // No cluster between two that have some of a row may have nothing.
  return {per_head, total, static_cast<int>(total < clusters ? (total > 0 ? total : 1) : clusters)};
}

// Walks a cluster's stretch item by item; an item is what it has of one (head, row).
struct Cursor {
  int64_t chunk, end;  // in the line
  int vhead, row, first, stop;  // chunks first .. stop - 1 of the row
  __device__ void start(const gsrq_layer& layer, const gsrq_call& call, const Line& line, int cluster) {
    chunk = cluster < line.clusters ? line.begin(cluster) : line.total;
    end = cluster < line.clusters ? line.begin(cluster + 1) : line.total;
    if (chunk >= end) return;
    vhead = static_cast<int>(line.divide(chunk, line.per_head));
    int64_t rest = chunk - vhead * line.per_head;
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
__device__ inline void cluster_sync() {
  asm volatile("barrier.cluster.arrive.release.aligned;\n\tbarrier.cluster.wait.acquire.aligned;" ::: "memory");
}

// Hand-over of score buffers: full[b] completes when all of a chunk's scores have come in, by their bytes; empty[b] when
// every CTA of the cluster has read them. Unlike the cluster's own barrier they wait for no other memory traffic.
__device__ inline void barrier_init(uint32_t barrier, uint32_t count) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(barrier), "r"(count) : "memory");
}
__device__ inline void barrier_expect(uint32_t barrier, uint32_t bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(barrier), "r"(bytes) : "memory");
}
__device__ inline void barrier_arrive_remote(uint32_t barrier) {
  asm volatile("mbarrier.arrive.shared::cluster.b64 _, [%0];" ::"r"(barrier) : "memory");
}
__device__ inline void barrier_wait(uint32_t barrier, uint32_t parity) {
  asm volatile(
      "{\n\t.reg .pred done;\n\t"
      "again%=: mbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n\t"
      "@!done bra again%=;\n\t}" ::"r"(barrier), "r"(parity) : "memory");
}
__device__ inline void store_remote(uint32_t address, float x, float y, uint32_t barrier) {
  asm volatile("st.async.shared::cluster.mbarrier::complete_tx::bytes.v2.f32 [%0], {%1, %2}, [%3];" ::"r"(address),
               "f"(x), "f"(y), "r"(barrier) : "memory");
}
__device__ inline void store_remote(uint32_t address, float x, uint32_t barrier) {
  asm volatile("st.async.shared::cluster.mbarrier::complete_tx::bytes.f32 [%0], %1, [%2];" ::"r"(address), "f"(x),
               "r"(barrier) : "memory");
}
template <int Threads>
__device__ inline void sync_warps(int id) {
  asm volatile("bar.sync %0, %1;" ::"r"(id), "n"(Threads) : "memory");
}

// Scoring holds many values in registers, binning few; the pool is split unevenly where the target can. The sum must not
// exceed what the block is launched with, 128 a thread: 8 * 160 + 8 * 96 = 16 * 128.
template <int Registers, bool More>
__device__ inline void set_registers() {
#if defined(__CUDA_ARCH_FEAT_SM90_ALL) || defined(__CUDA_ARCH_FEAT_SM100_ALL)
  if constexpr (More) asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(Registers));
  else asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(Registers));
#endif
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

// Keeps a value in a register instead of computing it again where it is used.
template <class T>
__device__ inline void keep(T& x) {
  if constexpr (sizeof(T) == 8) asm volatile("" : "+l"(x));
  else asm volatile("" : "+r"(x));
}

__device__ inline uint32_t word_of_bytes(const int8_t* row, int first, int last) {
  uint32_t word = 0;
#pragma unroll 1
  for (int j = 0; j < 4; ++j)
    if (first + j < last) word |= static_cast<uint32_t>(static_cast<uint8_t>(row[first + j])) << (8 * j);
  return word;
}

__device__ inline int64_t row_of(const gsrq_call& call, int b, int row) {
  if (call.block_table == nullptr) return b * call.capacity + row;
  const uint32_t page = static_cast<uint32_t>(call.page), at = static_cast<uint32_t>(row) / page;
  return static_cast<int64_t>(call.block_table[b * static_cast<int64_t>(call.table_stride) + at]) * page +
         (static_cast<uint32_t>(row) - at * page);
}

// Bytes first .. last - 1 of a token's codes, as words; past the last: 0. Fast: all words are there and aligned, four also
// together.
template <int Words, bool Fast>
__device__ inline void load_codes(uint32_t (&out)[Words], const int8_t* row, int first, int last) {
  if constexpr (Fast && Words == 4) {
    const uint4 v = __ldg(reinterpret_cast<const uint4*>(row + first));
    out[0] = v.x;
    out[1] = v.y;
    out[2] = v.z;
    out[3] = v.w;
  } else if constexpr (Fast) {
#pragma unroll
    for (int i = 0; i < Words; ++i) out[i] = __ldg(reinterpret_cast<const uint32_t*>(row + first) + i);
  } else {
#pragma unroll
    for (int i = 0; i < Words; ++i) out[i] = word_of_bytes(row, first + 4 * i, last);
  }
}

struct Shared {  // a CTA's shared memory, by the plan; the key slice lies first
  uint32_t* bins;  // [256][stride]: of the current window
  float* scores;   // [kBuffers][cluster][own tiles][16][lanes]: partial, of the tokens that the CTA weighs
  float* maxima;   // [kValueWarps][lanes]
  float* scales;   // [kKeyWarps][8]: of a warp's products, by head
  uint4* targets;  // [kKeyWarps][2]: for each tile of a warp the addresses of its scores and of the barrier there, and the
                   // bytes from a buffer of scores to the next
  uint32_t full, empty, done;  // addresses of barriers: kBuffers, kBuffers, one
};

__device__ inline Shared shared_of(const DecodePlan& p) {
  Shared s;
  s.bins = reinterpret_cast<uint32_t*>(shared_memory + p.blocks * kBlockBytes);
  s.scores = reinterpret_cast<float*>(s.bins + p.bins());
  s.maxima = s.scores + kBuffers * p.cluster * p.own_tiles * kTile * p.lanes;
  s.scales = s.maxima + kValueWarps * 8;
  s.targets = reinterpret_cast<uint4*>(s.scales + kKeyWarps * 8);
  s.full = shared_address(s.targets + kKeyWarps * 2);
  s.empty = s.full + 8 * kBuffers;
  s.done = s.empty + 8 * kBuffers;
  return s;
}

// ---------------------------------------------------------------------------------------------------------------- keys

template <int Blocks, int Lanes, bool Fast>
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

  // A gathered vector of 16 bytes, half of a codeword's slice, fills the fragment of one product: of its four words two
  // are the row of the token, two the row 8 below. A thread gets two RoPE pairs of the half: near(t) and near(t) + 2.
  // Rows of odd g gather the halves in the other order, so that no two threads of a phase meet in a bank.
  const int near = t < 2 ? t : t + 2;
  float turn_c[2][2][2], turn_s[2][2][2];  // [octet of tokens][half, in the thread's order][pair]
#pragma unroll
  for (int o = 0; o < 2; ++o)
#pragma unroll
    for (int u = 0; u < 2; ++u)
#pragma unroll
      for (int k = 0; k < 2; ++k) {
        const int p = slice * 16 + (u ^ parity) * 8 + near + 2 * k;
        float c = 1, s = 0;
        const int64_t offset = min(g + 8 * o, layer.positions - 1);
        if (p < half) {
          const float inverse = __frcp_rn(layer.cos[p]);
          c = layer.cos[offset * half + p] * inverse;
          s = layer.sin[offset * half + p] * inverse;
        }
        turn_c[o][u][k] = c * shrink;
        turn_s[o][u][k] = s * shrink;
      }
  // From one tile of the warp to its next the queries turn back by so many positions.
  constexpr int kStride = kKeyWarps * kTile;
  float step_c[2][2], step_s[2][2];  // [half, in the slice's order][pair]
#pragma unroll
  for (int u = 0; u < 2; ++u)
#pragma unroll
    for (int k = 0; k < 2; ++k) {
      const int p = slice * 16 + u * 8 + near + 2 * k;
      const int64_t at = min(kStride, layer.positions - 1);
      step_c[u][k] = p < half ? layer.cos[at * half + p] * __frcp_rn(layer.cos[p]) : 1.0f;
      step_s[u][k] = p < half ? layer.sin[at * half + p] * __frcp_rn(layer.cos[p]) : 0.0f;
    }

  int words = t * 32 + parity * 16, byte_of_word = 0x4440 | t, token_in_chunk = warp * kTile + g;
  keep(words);
  keep(byte_of_word);
  keep(token_in_chunk);
#pragma unroll
  for (int i = 0; i < Blocks; ++i) {
    keep(low[i]);
    keep(high[i]);
  }
  // Rarely needed values wait in shared memory, which is nearer than spilled registers: where the scores of the warp's two
  // tiles go, in their owners' memory, and by what they are multiplied.
  if (lane < 2) {
    const int tile = lane * kKeyWarps + warp, owner = tile % plan.owners, place = tile / plan.owners;
    shared.targets[warp * 2 + lane] =
        make_uint4(remote(shared_address(shared.scores) + (rank * plan.own_tiles + place) * kTile * Lanes * 4, owner),
                   remote(shared.full, owner), plan.cluster * plan.own_tiles * kTile * Lanes * 4, 0);
  }
  __syncwarp();
  int loaded = -1;
  uint32_t chunk_index = 0;

  for (; !cursor.done(); cursor.next(layer, call)) {
    const int kv_head = cursor.vhead / plan.parts, part = cursor.vhead % plan.parts;
    const Range range = coded_range(layer, call, cursor.row);
    if (kv_head != loaded) {
      sync_warps<kKeyThreads>(1);
      const uint4* from = reinterpret_cast<const uint4*>(
          constants.words + (static_cast<int64_t>(kv_head) * plan.cluster + rank) * Blocks * kBlockBytes);
      uint4* to = reinterpret_cast<uint4*>(shared_memory);
#pragma unroll 8
      for (int i = thread; i < Blocks * kBlockBytes / 16; i += kKeyThreads) to[i] = from[i];
      loaded = kv_head;
      sync_warps<kKeyThreads>(1);
    }
    const int group_byte = static_cast<int>(static_cast<int64_t>(kv_head) * layer.head_dim / layer.keys.width) *
                           layer.keys.stages;
    const int first_byte = group_byte + first_block * kBlockStages, last_byte = group_byte + layer.keys.stages;

    // The queries: head g's pairs of the slice, turned to the new token's position and back by a tile's first token.
    const int head = kv_head * plan.group + part * plan.part_heads + g;
    const bool real = g < plan.part_heads && part * plan.part_heads + g < plan.group;
    float query_x[2][2], query_y[2][2], query_scale = 0;
    const auto anchor = [&](int chunk) {
      const int64_t position = min(call.past_lengths[cursor.row], static_cast<int64_t>(layer.positions) - 1);
      const int64_t base = min(range.first + chunk * kChunk + warp * kTile, layer.positions - 1);
      float most = 0;
#pragma unroll
      for (int u = 0; u < 2; ++u)
#pragma unroll
        for (int k = 0; k < 2; ++k) {
          const int p = slice * 16 + u * 8 + near + 2 * k;
          int e0, e1;
          pair_elements(layer, p, &e0, &e1);
          float x = 0, y = 0;
          if (real) {
            const int64_t at = (static_cast<int64_t>(cursor.row) * layer.heads + head) * layer.head_dim;
            x = load(call.query, at + e0, call.dtype);
            y = load(call.query, at + e1, call.dtype);
          }
          most = fmaxf(most, fmaxf(fabsf(x), fabsf(y)));
          if (p < half) {
            const float pc = layer.cos[position * half + p], ps = layer.sin[position * half + p];
            const float bc = layer.cos[base * half + p], bs = layer.sin[base * half + p];
            const float turned_x = x * pc - y * ps, turned_y = y * pc + x * ps;
            x = turned_x * bc + turned_y * bs;
            y = turned_y * bc - turned_x * bs;
          }
          query_x[u][k] = x;
          query_y[u][k] = y;
        }
      most = fmaxf(most, __shfl_xor_sync(~0u, most, 1));
      most = fmaxf(most, __shfl_xor_sync(~0u, most, 2));
      const float inverse = most > 0 ? __frcp_rn(most) : 0.0f;  // float16 queries of size 1
#pragma unroll
      for (int u = 0; u < 2; ++u)
#pragma unroll
        for (int k = 0; k < 2; ++k) {
          query_x[u][k] *= inverse;
          query_y[u][k] *= inverse;
        }
      query_scale = most * unit * layer.scale * (layer.softcap > 0 ? 1.0f : kLog2e);
    };

    anchor(cursor.first);
    if (t == 0) shared.scales[warp * 8 + g] = query_scale;
    __syncwarp();

    uint32_t codes[2][2][Blocks], coming[2][2][Blocks];  // [tile][octet]
    const int first_row = range.first - layer.sinks;
    const int8_t* linear = call.key_codes + (cursor.row * call.capacity + first_row) * bytes;
    if constexpr (Fast) linear += first_byte;
    int last_token = range.count - 1;
    keep(linear);
    keep(last_token);
    const auto fetch = [&](int chunk) {
#pragma unroll
      for (int m = 0; m < 2; ++m)
#pragma unroll
        for (int o = 0; o < 2; ++o) {
          const int i = min(chunk * kChunk + token_in_chunk + m * kStride + 8 * o, last_token);
          if constexpr (Fast)
            load_codes<Blocks, true>(coming[m][o], linear + static_cast<uint64_t>(static_cast<uint32_t>(i)) * static_cast<uint32_t>(bytes), 0, 0);
          else
            load_codes<Blocks, false>(coming[m][o], call.key_codes + row_of(call, cursor.row, first_row + i) * bytes, first_byte,
                                      last_byte);
        }
    };
    fetch(cursor.first);

    for (int chunk = cursor.first; chunk < cursor.stop; ++chunk, ++chunk_index) {
#pragma unroll
      for (int m = 0; m < 2; ++m)
#pragma unroll
        for (int o = 0; o < 2; ++o)
#pragma unroll
          for (int i = 0; i < Blocks; ++i) codes[m][o][i] = coming[m][o][i];
      if (chunk + 1 < cursor.stop) fetch(chunk + 1);

      int sums[2][2][2][4];  // [tile][octet][half]
#pragma unroll
      for (int m = 0; m < 2; ++m)
#pragma unroll
        for (int o = 0; o < 2; ++o)
#pragma unroll
          for (int u = 0; u < 2; ++u)
#pragma unroll
            for (int k = 0; k < 4; ++k) sums[m][o][u][k] = kBias;
#pragma unroll
      for (int i = 0; i < Blocks; ++i) {
        uint4 gathered[2][2][2];
#pragma unroll
        for (int m = 0; m < 2; ++m)
#pragma unroll
          for (int o = 0; o < 2; ++o) {
            const int at = i * kBlockBytes + static_cast<int>(__byte_perm(codes[m][o][i], 0, byte_of_word)) * 128 + words;
            gathered[m][o][0] = *reinterpret_cast<const uint4*>(shared_memory + at);
            gathered[m][o][1] = *reinterpret_cast<const uint4*>(shared_memory + (at ^ 16));
          }
#pragma unroll
        for (int m = 0; m < 2; ++m)
#pragma unroll
          for (int o = 0; o < 2; ++o)
#pragma unroll
            for (int u = 0; u < 2; ++u) {
              const uint4 v = gathered[m][o][u];
              mma_int8(sums[m][o][u], v.x, v.y, v.z, v.w, low[i], high[i]);
            }
      }

      const uint32_t buffer = chunk_index % kBuffers;
      barrier_wait(shared.empty + 8 * buffer, (chunk_index / kBuffers & 1) ^ 1);
#pragma unroll
      for (int m = 0; m < 2; ++m) {
        uint32_t keys[2][2][2];  // [octet][half, in the thread's order][pair]: turned by the token's offset in the tile
#pragma unroll
        for (int o = 0; o < 2; ++o)
#pragma unroll
          for (int u = 0; u < 2; ++u)
#pragma unroll
            for (int k = 0; k < 2; ++k) {
              const float x = __int_as_float(sums[m][o][u][2 * k]) - kBiasValue,
                          y = __int_as_float(sums[m][o][u][2 * k + 1]) - kBiasValue;
              const float c = turn_c[o][u][k], s = turn_s[o][u][k];
              keys[o][u][k] = pack_half2(x * c - y * s, y * c + x * s);
            }
        float products[4] = {0, 0, 0, 0};
#pragma unroll
        for (int u = 0; u < 2; ++u) {
          const uint32_t b0 = pack_half2(query_x[u][0], query_y[u][0]), b1 = pack_half2(query_x[u][1], query_y[u][1]);
          const uint32_t a0 = parity ? keys[0][1 - u][0] : keys[0][u][0], a1 = parity ? keys[1][1 - u][0] : keys[1][u][0];
          const uint32_t a2 = parity ? keys[0][1 - u][1] : keys[0][u][1], a3 = parity ? keys[1][1 - u][1] : keys[1][u][1];
          asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
              : "+f"(products[0]), "+f"(products[1]), "+f"(products[2]), "+f"(products[3])
              : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
        }
#pragma unroll
        for (int u = 0; u < 2; ++u)
#pragma unroll
          for (int k = 0; k < 2; ++k) {
            const float x = query_x[u][k], y = query_y[u][k];
            query_x[u][k] = x * step_c[u][k] + y * step_s[u][k];
            query_y[u][k] = y * step_c[u][k] - x * step_s[u][k];
          }
        if (2 * t < Lanes) {
          const uint4 target = shared.targets[warp * 2 + m];
          // The products' columns of a thread are heads 2 t and 2 t + 1.
          const float2 scale = *reinterpret_cast<const float2*>(shared.scales + warp * 8 + 2 * t);
          uint32_t me;
          asm volatile("mov.u32 %0, %%laneid;" : "=r"(me));  // again, rather than from a spilled register
          uint32_t to = target.x + buffer * target.z + (me / 4 * Lanes + 2 * (me % 4)) * 4, barrier = target.y + 8 * buffer;
#pragma unroll 1
          for (int way = 0;;) {
            if constexpr (Lanes == 1) {
              store_remote(to, products[0] * scale.x, barrier);
              store_remote(to + 8 * Lanes * 4, products[2] * scale.x, barrier);
            } else {
              store_remote(to, products[0] * scale.x, products[1] * scale.y, barrier);
              store_remote(to + 8 * Lanes * 4, products[2] * scale.x, products[3] * scale.y, barrier);
            }
            if (++way == plan.ways) break;
            const int tile = m * kKeyWarps + warp, other = tile % plan.owners + way * plan.owners;
            const int place = (buffer * plan.cluster + rank) * plan.own_tiles + tile / plan.owners;
            to = remote(shared_address(shared.scores) + ((place * kTile + g) * Lanes + 2 * t) * 4, other);
            barrier = remote(shared.full + 8 * buffer, other);
          }
        }
      }
      // Rounding errors of the turns must not add up.
      if (chunk_index % kAnchorChunks == kAnchorChunks - 1 && chunk + 1 < cursor.stop) anchor(chunk + 1);
    }
  }
}

// -------------------------------------------------------------------------------------------------------------- values

// softcap * tanh(x / softcap) in units of log2, without the slow paths of a division.
__device__ inline float soft_capped(float x, float cap) {
  return cap * kLog2e * (1 - __fdividef(2.0f, 1 + exp2_fast(x * __fdividef(2 * kLog2e, cap))));
}

__device__ inline bool any_value_thread(bool x) {
  uint32_t any;
  asm volatile(
      "{\n\t.reg .pred p, q;\n\tsetp.ne.u32 p, %1, 0;\n\t"
      "barrier.red.or.pred q, 2, %2, p;\n\tselp.u32 %0, 1, 0, q;\n\t}"
      : "=r"(any) : "r"(static_cast<uint32_t>(x)), "n"(kValueThreads) : "memory");
  return any != 0;
}

// Largest over a warp, by integer comparison of the floats' bits.
__device__ inline float warp_max(float x) {
  const int bits = __float_as_int(x);
  const int most = __reduce_max_sync(~0u, bits ^ ((bits >> 31) & 0x7fffffff));
  return __int_as_float(most ^ ((most >> 31) & 0x7fffffff));
}

// A warp weighs a tile of the CTA's and bins it for up to 32 / Lanes slots: each half of the warp has the tile's 16 tokens,
// a thread a token, and half of the slots.
template <int Lanes, int Stride, bool Fast>
__device__ void bin_values(const gsrq_layer& layer, const gsrq_call& call, const DecodePlan& plan, const Memory& memory,
                           const Shared& shared, Cursor cursor, uint32_t rank, int cluster) {
  int thread = threadIdx.x - kKeyThreads, lane = thread % 32;
  const int warp = thread / 32;
  constexpr int kPadded = Stride / Lanes, kPartSlots = kPadded < 32 / Lanes ? kPadded : 32 / Lanes;
  constexpr int kParts = kPadded / kPartSlots, kSlots = kPartSlots / 2, kWords = (kSlots + 3) / 4;
  const int owner = rank % plan.owners, way = rank / plan.owners, own_tiles = plan.tiles_of(owner);
  const int bytes = layer.values.groups * layer.values.stages;
  const int units = own_tiles * kParts, rounds = (units + kValueWarps - 1) / kValueWarps;
  const int round_tokens = kParts >= kValueWarps ? kTile : kTile * kValueWarps / kParts;  // no round has more
  const uint32_t full_bytes = plan.cluster * own_tiles * kTile * Lanes * 4;
  const int64_t cta = static_cast<int64_t>(cluster) * plan.cluster + rank;
  // In step (a, b) lanes differ in (slot, head), so that they meet in no bank: theirs are a and b, exclusive-or the lane's.
  const int half = lane / kTile, head_turn = lane % Lanes, slot_turn = lane % kTile / Lanes % kSlots;
  int turn = ((half * kSlots + slot_turn) * Lanes + head_turn) * 4;  // in bytes of a codeword's bins
  uint32_t byte_turn = 0x3210 ^ 0x1111 * (slot_turn & 3);
  if constexpr (kSlots < 4) byte_turn >>= 8 * half;  // the loaded word has both halves' codes
  keep(thread);
  keep(lane);
  keep(turn);
  keep(byte_turn);
  uint32_t chunk_index = 0, item = 0;

  for (int i = thread; i < plan.bins(); i += kValueThreads) shared.bins[i] = 0;
  sync_warps<kValueThreads>(2);

  for (; !cursor.done(); cursor.next(layer, call), ++item) {
    const int kv_head = cursor.vhead / plan.parts;
    const Range range = coded_range(layer, call, cursor.row);
    const int group_byte = static_cast<int>(static_cast<int64_t>(kv_head) * layer.head_dim / layer.values.width) *
                           layer.values.stages;
    const int first_row = range.first - layer.sinks;
    const int8_t* linear = call.value_codes + (cursor.row * call.capacity + first_row) * bytes;
    int last_token = range.count - 1;
    keep(linear);
    keep(last_token);

    // Token of the chunk that the thread has in a round; past all others if none.
    const auto offset_of = [&](int round) {
      const int unit = round * kValueWarps + warp;
      return unit < units ? (unit / kParts * plan.owners + owner) * kTile + lane % kTile : 1 << 30;
    };
    int first_offset = offset_of(0);
    keep(first_offset);
    uint32_t coming[kWords];
    const auto fetch = [&](int chunk, int round) {
      const int offset = rounds == 1 ? first_offset : offset_of(round);
      const int i = min(chunk * kChunk + offset, last_token);
      const int first_byte = group_byte + way * plan.slots_per_cta +
                             (round * kValueWarps + warp) % kParts * kPartSlots + (kSlots < 4 ? 0 : lane / kTile * kSlots);
      if constexpr (Fast) {
        const int8_t* row = linear + static_cast<uint64_t>(static_cast<uint32_t>(i)) * static_cast<uint32_t>(bytes);
#pragma unroll
        for (int w = 0; w < kWords; ++w)
          coming[w] = first_byte - group_byte + 4 * w < plan.slots ? __ldg(reinterpret_cast<const uint32_t*>(row + first_byte) + w) : 0;
      } else {
        load_codes<kWords, false>(coming, call.value_codes + row_of(call, cursor.row, first_row + i) * bytes, first_byte,
                                  group_byte + plan.slots);
      }
    };
    fetch(cursor.first, 0);

    // Reference exponents of the item and of the window; of the thread's tokens the sums of weights under each.
    float item_reference[Lanes], reference[Lanes], item_sum[Lanes];
    uint32_t window_sum[Lanes];
    int window_tokens = 0;
    bool flushed = false;
#pragma unroll
    for (int h = 0; h < Lanes; ++h) {
      item_reference[h] = reference[h] = kNone;
      item_sum[h] = 0;
      window_sum[h] = 0;
    }
    float* const scratch = memory.scratch + (2 * cta + (item & 1)) * plan.bins();

    // Adds the window's bins to the item's in global memory. All value threads call it together.
    const auto flush = [&]() {
      float kept[Lanes], added[Lanes];
#pragma unroll
      for (int h = 0; h < Lanes; ++h) {
        const float most = fmaxf(item_reference[h], reference[h]);
        kept[h] = item_reference[h] == kNone ? 0.0f : exp2_fast(item_reference[h] - most);
        added[h] = reference[h] == kNone ? 0.0f : exp2_fast(reference[h] - most - kFixedBits);
        item_sum[h] = item_sum[h] * kept[h] + static_cast<float>(window_sum[h]) * added[h];
        item_reference[h] = most;
        window_sum[h] = 0;
      }
      sync_warps<kValueThreads>(2);
      const bool upper = Lanes == 8 && thread % 2 == 1;  // of a thread's four bins the heads: always the same
      float4 keep4, add4;
      if constexpr (Lanes == 1) {
        keep4 = make_float4(kept[0], kept[0], kept[0], kept[0]);
        add4 = make_float4(added[0], added[0], added[0], added[0]);
      } else {
        keep4 = make_float4(kept[0], kept[1], kept[2], kept[3]);
        add4 = make_float4(added[0], added[1], added[2], added[3]);
        if (upper) {
          keep4 = make_float4(kept[Lanes - 4], kept[Lanes - 3], kept[Lanes - 2], kept[Lanes - 1]);
          add4 = make_float4(added[Lanes - 4], added[Lanes - 3], added[Lanes - 2], added[Lanes - 1]);
        }
      }
      constexpr int kVectors = kCodewords * Stride / 4;
#pragma unroll 8
      for (int i = thread; i < kVectors; i += kValueThreads) {
        uint4* bins = reinterpret_cast<uint4*>(shared.bins) + i;
        const uint4 u = *bins;
        *bins = make_uint4(0, 0, 0, 0);
        float4 total = make_float4(0, 0, 0, 0);
        if (flushed) total = __ldcg(reinterpret_cast<const float4*>(scratch) + i);
        total.x = total.x * keep4.x + static_cast<float>(u.x) * add4.x;
        total.y = total.y * keep4.y + static_cast<float>(u.y) * add4.y;
        total.z = total.z * keep4.z + static_cast<float>(u.z) * add4.z;
        total.w = total.w * keep4.w + static_cast<float>(u.w) * add4.w;
        __stcg(reinterpret_cast<float4*>(scratch) + i, total);
      }
      sync_warps<kValueThreads>(2);
      flushed = true;
      window_tokens = 0;
    };

    for (int chunk = cursor.first; chunk < cursor.stop; ++chunk, ++chunk_index) {
      const uint32_t buffer = chunk_index % kBuffers;
      for (int round = 0; round < rounds; ++round) {
        uint32_t codes[kWords];
#pragma unroll
        for (int w = 0; w < kWords; ++w) codes[w] = coming[w];
        if (round + 1 < rounds) fetch(chunk, round + 1);
        else if (chunk + 1 < cursor.stop) fetch(chunk + 1, 0);
        if (round == 0) barrier_wait(shared.full + 8 * buffer, chunk_index / kBuffers & 1);

        const int unit = round * kValueWarps + warp, offset = rounds == 1 ? first_offset : offset_of(round);
        const bool valid = chunk * kChunk + offset <= last_token;
        float score[Lanes];
#pragma unroll
        for (int h = 0; h < Lanes; ++h) score[h] = 0;
        if (valid) {
          const int stride = plan.own_tiles * kTile * Lanes;
          const float* scores = shared.scores + buffer * plan.cluster * stride + (unit / kParts * kTile + lane % kTile) * Lanes;
          if constexpr (Lanes == 1) {
            for (int other = 0; other < plan.cluster; ++other) score[0] += scores[other * stride];
          } else {
            for (int first = 0; first < plan.cluster; first += 4) {
              float4 v[4][Lanes / 4];
#pragma unroll
              for (int j = 0; j < 4; ++j)
#pragma unroll
                for (int h = 0; h < Lanes / 4; ++h)
                  v[j][h] = first + j < plan.cluster ? reinterpret_cast<const float4*>(scores + (first + j) * stride)[h]
                                                     : make_float4(0, 0, 0, 0);
#pragma unroll
              for (int j = 0; j < 4; ++j)
#pragma unroll
                for (int h = 0; h < Lanes / 4; ++h) {
                  score[4 * h] += v[j][h].x;
                  score[4 * h + 1] += v[j][h].y;
                  score[4 * h + 2] += v[j][h].z;
                  score[4 * h + 3] += v[j][h].w;
                }
            }
          }
          if (layer.softcap > 0)
#pragma unroll
            for (int h = 0; h < Lanes; ++h) score[h] = soft_capped(score[h], layer.softcap);
        }
        bool exceeds = window_tokens + round_tokens > kWindowTokens || window_tokens == 0;
#pragma unroll
        for (int h = 0; h < Lanes; ++h) {
          if (!valid) score[h] = kNone;
          exceeds |= score[h] > reference[h] + kHeadroom;
        }
        exceeds = any_value_thread(exceeds);
        if (round == rounds - 1) {  // all have read the scores: the buffer may be filled again, by all CTAs
          if (thread == 0) barrier_expect(shared.full + 8 * buffer, full_bytes);
          if (thread < plan.cluster) barrier_arrive_remote(remote(shared.empty + 8 * buffer, thread));
        }
        if (exceeds) {  // a new window, whose reference is the largest here
          if (window_tokens > 0) flush();
#pragma unroll
          for (int h = 0; h < Lanes; ++h) {
            const float most = warp_max(score[h]);
            if (lane == h) shared.maxima[warp * Lanes + h] = most;
          }
          sync_warps<kValueThreads>(2);
#pragma unroll
          for (int h = 0; h < Lanes; ++h) {
            float most = kNone;
#pragma unroll
            for (int w = 0; w < kValueWarps; ++w) most = fmaxf(most, shared.maxima[w * Lanes + h]);
            reference[h] = most;
          }
          sync_warps<kValueThreads>(2);
        }
        window_tokens += round_tokens;

        if (valid) {
          uint32_t weight[Lanes];
#pragma unroll
          for (int h = 0; h < Lanes; ++h) {
            weight[h] = __float2uint_rn(exp2_fast(score[h] - reference[h] + kFixedBits));
            if (unit % kParts == 0 && lane < kTile) window_sum[h] += weight[h];
          }
          // Step b's is head b ^ head_turn, byte a of the codes that of slot a ^ slot_turn.
#pragma unroll
          for (int by = 1; by < Lanes; by *= 2)
#pragma unroll
            for (int h = 0; h < Lanes; ++h)
              if ((h & by) == 0) {
                const uint32_t low = weight[h], high = weight[h + by];
                weight[h] = turn & 4 * by ? high : low;
                weight[h + by] = turn & 4 * by ? low : high;
              }
#pragma unroll
          for (int w = 0; w < kWords; ++w) codes[w] = __byte_perm(codes[w], 0, byte_turn);
#pragma unroll
          for (int by = 1; by < kWords; by *= 2)
#pragma unroll
            for (int w = 0; w < kWords; ++w)
              if ((w & by) == 0) {
                const uint32_t low = codes[w], high = codes[w + by];
                codes[w] = turn & 16 * Lanes * by ? high : low;
                codes[w + by] = turn & 16 * Lanes * by ? low : high;
              }
          char* const part = reinterpret_cast<char*>(shared.bins) + unit % kParts * (kPartSlots * Lanes * 4);
#pragma unroll
          for (int a = 0; a < kSlots; ++a) {
            const uint32_t row = (codes[a / 4] >> (8 * (a % 4)) & 0xff) * (Stride * 4);
#pragma unroll
            for (int b = 0; b < Lanes; ++b)
              atomicAdd(reinterpret_cast<uint32_t*>(part + (row | (turn ^ ((a * Lanes + b) * 4)))), weight[b]);
          }
        }
      }
    }
    flush();

    // The sum of weights over the threads, and the references, for the other owners.
#pragma unroll
    for (int h = 0; h < Lanes; ++h) {
      float sum = item_sum[h];
      for (int o = 16; o > 0; o /= 2) sum += __shfl_xor_sync(~0u, sum, o);
      if (lane == h) shared.maxima[warp * Lanes + h] = sum;
    }
    sync_warps<kValueThreads>(2);
    if (thread < Lanes) {
      float total = 0, most = kNone;
      for (int w = 0; w < kValueWarps; ++w) total += shared.maxima[w * Lanes + thread];
#pragma unroll
      for (int h = 0; h < Lanes; ++h)
        if (h == thread) most = item_reference[h];
      __stcg(memory.scratch_state + (2 * cta + (item & 1)) * Lanes + thread, make_float2(most, total));
    }
    __threadfence();
    sync_warps<kValueThreads>(2);
    if (thread < plan.cluster) barrier_arrive_remote(remote(shared.done, thread));
    barrier_wait(shared.done, item & 1);
    __threadfence();

    // Each owner adds an equal share of its way's bins.
    const int64_t partial = static_cast<int64_t>(cursor.vhead) * call.batch + cursor.row + cluster;
    const int64_t first_cta = static_cast<int64_t>(cluster) * plan.cluster + way * plan.owners;
    const int vectors = plan.bins() / 4, share = (vectors + plan.owners - 1) / plan.owners;
    float most[Lanes];
#pragma unroll
    for (int h = 0; h < Lanes; ++h) most[h] = kNone;
    for (int k = 0; k < plan.owners; ++k)
#pragma unroll
      for (int h = 0; h < Lanes; ++h)
        most[h] = fmaxf(most[h], __ldcg(memory.scratch_state + (2 * (first_cta + k) + (item & 1)) * Lanes + h).x);
    if (rank == 0 && thread < Lanes) {
      float total = 0, reference_out = kNone;
#pragma unroll
      for (int h = 0; h < Lanes; ++h)
        if (h == thread) reference_out = most[h];
      for (int k = 0; k < plan.owners; ++k) {
        const float2 state = __ldcg(memory.scratch_state + (2 * (first_cta + k) + (item & 1)) * Lanes + thread);
        if (state.x != kNone) total += state.y * exp2_fast(state.x - reference_out);
      }
      memory.state[partial * Lanes + thread] = make_float2(reference_out, total);
    }
    float4* const out = reinterpret_cast<float4*>(memory.bins + (partial * plan.ways + way) * plan.bins());
    const int first_head = Lanes == 8 ? 4 : 0;  // of odd vectors
#pragma unroll 2
    for (int i = owner * share + thread; i < min(vectors, (owner + 1) * share); i += kValueThreads) {
      float4 total = make_float4(0, 0, 0, 0);
#pragma unroll 4
      for (int k = 0; k < plan.owners; ++k) {
        const int64_t other = 2 * (first_cta + k) + (item & 1);
        const float4 v = __ldcg(reinterpret_cast<const float4*>(memory.scratch + other * plan.bins()) + i);
        const float2* state = memory.scratch_state + other * Lanes;
        float factor[4];
#pragma unroll
        for (int j = 0; j < 4; ++j) {
          const int head = Lanes == 1 ? 0 : j + (i % 2 ? first_head : 0);
          float reference_out = most[0];
#pragma unroll
          for (int h = 1; h < Lanes; ++h) reference_out = h == head ? most[h] : reference_out;
          const float own = __ldcg(state + head).x;
          factor[j] = own == kNone ? 0.0f : exp2_fast(own - reference_out);
        }
        total.x += v.x * factor[0];
        total.y += v.y * factor[1];
        total.z += v.z * factor[2];
        total.w += v.w * factor[3];
      }
      out[i] = total;
    }
  }
}

template <int Blocks, int Lanes, int Stride, bool Fast>
__global__ void __launch_bounds__(kDecodeThreads, 1)
    decode_kernel(const __grid_constant__ gsrq_layer layer, const __grid_constant__ gsrq_call call,
                  const __grid_constant__ DecodePlan plan, Constants constants, Memory memory, int vheads) {
  const Shared shared = shared_of(plan);
  const uint32_t rank = cluster_rank();
  const int cluster = blockIdx.x / plan.cluster, clusters = gridDim.x / plan.cluster;
  const Line line = line_of(layer, call, vheads, clusters);
  Cursor cursor{};
  cursor.start(layer, call, line, cluster);
  if (threadIdx.x == 0) {
    for (int b = 0; b < kBuffers; ++b) {
      barrier_init(shared.full + 8 * b, 1);
      barrier_init(shared.empty + 8 * b, plan.cluster);
      barrier_expect(shared.full + 8 * b, plan.cluster * plan.tiles_of(rank % plan.owners) * kTile * Lanes * 4);
    }
    barrier_init(shared.done, plan.cluster);
  }
  cluster_sync();  // no CTA may write into another that has not started
  if (threadIdx.x < kKeyThreads) {
    set_registers<160, true>();
    score_keys<Blocks, Lanes, Fast>(layer, call, plan, constants, shared, cursor, rank);
  } else {
    set_registers<96, false>();
    bin_values<Lanes, Stride, Fast>(layer, call, plan, memory, shared, cursor, rank, cluster);
  }
  cluster_sync();  // nor leave while others write into it
}

#else
template <int Blocks, int Lanes, int Stride, bool Fast>
__global__ void decode_kernel(gsrq_layer, gsrq_call, DecodePlan, Constants, Memory, int) {}
#endif

// ------------------------------------------------------------------------------------------------------------- combine

constexpr int kCombineThreads = 256, kPadHalves = 8;
// (row, query head) pairs and codewords of a block at a time: many rows, or few and all codewords in flight at once.
constexpr int kManyRows = 32, kManyCodes = 64, kFewRows = 16, kFewCodes = 256;
constexpr int kExactTokens = 32;  // of a block

__device__ inline void mma_half(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

// One value slot of one head: the bins of up to Rows (row, query head) pairs times the slot's 256 codewords. The bins, at
// most 1 after division by their sum, are split into two float16 of 22 bits together.
template <int Rows, int Codes, int Lanes>
__device__ void combine_values(const gsrq_layer& layer, const gsrq_call& call, const DecodePlan& plan, const Memory& memory,
                               int vheads, int clusters, int block) {
  char* const raw = shared_memory;
  const int slot = block % plan.slots, vhead = block / plan.slots % vheads, kv_head = vhead / plan.parts;
  const int rows_at_once = Rows / Lanes, first_row = block / (plan.slots * vheads) * rows_at_once;
  const int rows = min(rows_at_once, call.batch - first_row), pairs = rows * Lanes, tiles = (pairs + 15) / 16;
  const int width = plan.width, pitch = width + kPadHalves;
  constexpr int kBinPitch = Codes + kPadHalves;
  __half* words = reinterpret_cast<__half*>(raw);  // [Codes][pitch]
  __half* high = words + Codes * pitch;            // [Rows][kBinPitch]
  __half* low = high + Rows * kBinPitch;
  __shared__ int first_owner[Rows], last_owner[Rows];
  __shared__ float reference[Rows], inverse[Rows];
  const int thread = threadIdx.x, warp = thread / 32, lane = thread % 32;

  const Line line = line_of(layer, call, vheads, clusters);
  if (warp == 0) {
    int64_t before = chunks_before(layer, call, first_row);
    for (int at = 0; at < rows; at += 32) {
      const int r = at + lane;
      const int64_t own = r < rows ? chunks_of(layer, call, first_row + r) : 0;
      int64_t sum = own;
      for (int o = 1; o < 32; o *= 2) {
        const int64_t up = __shfl_up_sync(~0u, sum, o);
        if (lane >= o) sum += up;
      }
      if (r < rows) {
        const int64_t begin = vhead * line.per_head + before + sum - own;
        first_owner[r] = own > 0 ? line.owner(begin) : 0;
        last_owner[r] = own > 0 ? line.owner(begin + own - 1) : -1;
      }
      before += __shfl_sync(~0u, sum, 31);
    }
  }
  __syncthreads();
  for (int i = thread; i < pairs; i += kCombineThreads) {
    const int r = i / Lanes, h = i % Lanes;
    const int64_t base = static_cast<int64_t>(vhead) * call.batch + first_row + r;
    float most = kNone, sum = 0;
    for (int k = first_owner[r]; k <= last_owner[r]; ++k) most = fmaxf(most, memory.state[(base + k) * Lanes + h].x);
    for (int k = first_owner[r]; k <= last_owner[r]; ++k) {
      const float2 s = memory.state[(base + k) * Lanes + h];
      if (s.x != kNone) sum += s.y * exp2f(s.x - most);
    }
    reference[i] = most;
    inverse[i] = sum > 0 ? 1 / sum : 0.0f;
    if (slot == 0) memory.combined[base * Lanes + h] = make_float2(most, sum);
  }
  __syncthreads();

  // The codewords: sub-vector, column and stage of the slot.
  const int64_t element = static_cast<int64_t>(kv_head) * layer.head_dim + (slot / layer.values.stages) * width;
  const int64_t group = element / layer.values.width, column = element % layer.values.width;
  const __half* from = static_cast<const __half*>(layer.values.codewords) +
                       (group * layer.values.stages + slot % layer.values.stages) * kCodewords * layer.values.width + column;
  const int vectors = width / 8, way = slot / plan.slots_per_cta, place = slot % plan.slots_per_cta;
  const int g = lane / 4, t = lane % 4;
  constexpr int kWarps = kCombineThreads / 32, kPieces = 256 / 8 / kWarps;  // pieces of 8 dims of a warp
  float sums[Rows / 16][kPieces][4];
#pragma unroll
  for (int i = 0; i < Rows / 16; ++i)
#pragma unroll
    for (int j = 0; j < kPieces; ++j)
#pragma unroll
      for (int k = 0; k < 4; ++k) sums[i][j][k] = 0;

  for (int first_code = 0; first_code < kCodewords; first_code += Codes) {
#pragma unroll 4
    for (int i = thread; i < Codes * vectors; i += kCombineThreads) {
      const int code = i / vectors, at = i % vectors * 8;
      const __half* source = from + static_cast<int64_t>(first_code + code) * layer.values.width + at;
      *reinterpret_cast<uint4*>(words + code * pitch + at) = __ldg(reinterpret_cast<const uint4*>(source));
    }
    // Bins of all owners, scaled and added in the owners' order; a thread has the heads of one (row, codeword).
#pragma unroll 2
    for (int i = thread; i < tiles * 16 / Lanes * Codes; i += kCombineThreads) {
      const int code = i % Codes, r = i / Codes;
      float totals[Lanes] = {};
      if (r < rows) {
        const int64_t base = static_cast<int64_t>(vhead) * call.batch + first_row + r;
        const float* bins = memory.bins + way * plan.bins() + (first_code + code) * plan.stride + place * Lanes;
#pragma unroll 2
        for (int k = first_owner[r]; k <= last_owner[r]; ++k) {
          const float* from_bins = bins + (base + k) * plan.ways * plan.bins();
          const float2* state = memory.state + (base + k) * Lanes;
          float v[Lanes];
          if constexpr (Lanes == 1) {
            v[0] = __ldg(from_bins);
          } else {
#pragma unroll
            for (int h = 0; h < Lanes; h += 4)
              *reinterpret_cast<float4*>(v + h) = __ldg(reinterpret_cast<const float4*>(from_bins + h));
          }
#pragma unroll
          for (int h = 0; h < Lanes; ++h) totals[h] += exp2_fast(__ldg(state + h).x - reference[r * Lanes + h]) * v[h];
        }
      }
#pragma unroll
      for (int h = 0; h < Lanes; ++h) {
        const int at = r * Lanes + h;
        const float total = r < rows ? totals[h] * inverse[at] : 0.0f;
        const __half top = __float2half_rn(total);
        high[at * kBinPitch + code] = top;
        low[at * kBinPitch + code] = __float2half_rn(total - __half2float(top));
      }
    }
    __syncthreads();

#pragma unroll 1
    for (int k = 0; k < Codes; k += 16) {
      uint32_t b[kPieces][2];  // codewords k .. k + 15 of 8 dims, as the product wants them
#pragma unroll
      for (int j = 0; j < kPieces; ++j) {
        const int piece = warp + j * kWarps;
        if (piece * 8 >= width) break;
        const uint32_t address =
            static_cast<uint32_t>(__cvta_generic_to_shared(words + (k + lane % 16) * pitch + piece * 8));
        asm volatile("ldmatrix.sync.aligned.m8n8.x2.trans.shared.b16 {%0, %1}, [%2];"
                     : "=r"(b[j][0]), "=r"(b[j][1]) : "r"(address));
      }
#pragma unroll
      for (int i = 0; i < Rows / 16; ++i) {
        if (i >= tiles) break;
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          const __half* at = (half ? low : high) + (i * 16 + g) * kBinPitch + k + 2 * t;
          const uint32_t a[4] = {*reinterpret_cast<const uint32_t*>(at), *reinterpret_cast<const uint32_t*>(at + 8 * kBinPitch),
                                 *reinterpret_cast<const uint32_t*>(at + 8),
                                 *reinterpret_cast<const uint32_t*>(at + 8 * kBinPitch + 8)};
#pragma unroll
          for (int j = 0; j < kPieces; ++j)
            if ((warp + j * kWarps) * 8 < width) mma_half(sums[i][j], a, b[j][0], b[j][1]);
        }
      }
    }
    __syncthreads();
  }

#pragma unroll
  for (int i = 0; i < Rows / 16; ++i)
#pragma unroll
    for (int j = 0; j < kPieces; ++j)
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        const int at = i * 16 + g + 8 * r, piece = warp + j * kWarps;
        if (at >= pairs || piece * 8 >= width) continue;
        const int64_t row = first_row + at / Lanes;
        float* to = memory.values +
                    (((static_cast<int64_t>(vhead) * plan.slots + slot) * call.batch + row) * Lanes + at % Lanes) * width +
                    piece * 8 + 2 * t;
        *reinterpret_cast<float2*>(to) = make_float2(sums[i][j][2 * r], sums[i][j][2 * r + 1]);
      }
}

// The exact tokens that a row's query sees, in order: sinks, then the newest, the new one last.
struct ExactTokens {
  int past, first_recent, lowest;  // lowest: the first that a sliding window leaves visible
  int sinks, count;
  __device__ ExactTokens(const gsrq_layer& layer, const gsrq_call& call, int row) {
    past = static_cast<int>(min(call.past_lengths[row], call.max_total - 1));
    const int total = past + 1;
    first_recent = layer.sinks + coded_tokens(layer, total);
    sinks = min(layer.sinks, total);
    count = sinks + max(total - first_recent, 0);
    lowest = layer.sliding_window > 0 ? total - layer.sliding_window : 0;
  }
  __device__ int token(int i) const { return i < sinks ? i : first_recent + i - sinks; }
};

// Up to 32 exact tokens of one (row, vhead): their weighted values, reference and sum.
template <int Lanes>
__device__ void attend_exact(const gsrq_layer& layer, const gsrq_call& call, const DecodePlan& plan, const Memory& memory,
                             int vheads, int splits, int block) {
  const int split = block % splits, vhead = block / splits % vheads, row = block / (splits * vheads);
  const int kv_head = vhead / plan.parts, part = vhead % plan.parts;
  const int d = layer.head_dim, half = layer.half_rope, thread = threadIdx.x, warp = thread / 32, lane = thread % 32;
  const int heads = min(plan.part_heads, plan.group - part * plan.part_heads);
  const int64_t at = (static_cast<int64_t>(row) * vheads + vhead) * splits + split;
  if (call.new_lengths[row] <= 0) return;
  const ExactTokens exact(layer, call, row);
  const int first = split * kExactTokens, here = min(kExactTokens, exact.count - first);
  if (here <= 0) return;
  const int pitch = d + 8;
  float* const queries = reinterpret_cast<float*>(shared_memory);  // [8][d], turned and scaled, pair by pair
  float* const keys = queries + 8 * d;                             // [32][pitch], later the second half of the sums
  float* const values = keys + kExactTokens * pitch;               // [32][pitch]
  __shared__ float weights[8][kExactTokens];
  __shared__ int64_t place[kExactTokens];  // of the token's vector, in vectors; -1: the new token
  const float scale = layer.scale * (layer.softcap > 0 ? 1.0f : kLog2e);
  const int64_t slots = gsrq_exact_slots(layer.sinks, layer.window, layer.block);
  const int64_t head_row = static_cast<int64_t>(row) * layer.kv_heads + kv_head;
  if (thread < here) {
    const int token = exact.token(first + thread);
    place[thread] = token == exact.past ? -1 : head_row * slots + exact_slot(layer, token);
  }
  for (int i = thread; i < Lanes * (d / 2); i += kCombineThreads) {
    const int h = i / (d / 2), p = i % (d / 2);
    float x = 0, y = 0;
    if (h < heads) {
      int e0, e1;
      pair_elements(layer, p, &e0, &e1);
      const int64_t base =
          (static_cast<int64_t>(row) * layer.heads + kv_head * plan.group + part * plan.part_heads + h) * d;
      x = load_constant(call.query, base + e0, call.dtype) * scale;
      y = load_constant(call.query, base + e1, call.dtype) * scale;
    }
    const float c = p < half ? __ldg(layer.cos + static_cast<int64_t>(exact.past) * half + p) : 1.0f, s = p < half ? __ldg(layer.sin + static_cast<int64_t>(exact.past) * half + p) : 0.0f;
    queries[h * d + 2 * p] = x * c - y * s;
    queries[h * d + 2 * p + 1] = y * c + x * s;
  }
  __syncthreads();

#pragma unroll 2
  for (int i = thread; i < here * (d / 2); i += kCombineThreads) {
    const int n = i / (d / 2), p = i % (d / 2);
    const int64_t at = place[n] * d, fresh = head_row * d, token = exact.token(first + n);
    int e0, e1;
    pair_elements(layer, p, &e0, &e1);
    const bool is_new = place[n] < 0;
    float x, y, v0, v1;
    if (is_new) {
      x = rounded(load_constant(call.key, fresh + e0, call.dtype), call.exact_dtype);
      y = rounded(load_constant(call.key, fresh + e1, call.dtype), call.exact_dtype);
      v0 = rounded(load_constant(call.value, fresh + 2 * p, call.dtype), call.exact_dtype);
      v1 = rounded(load_constant(call.value, fresh + 2 * p + 1, call.dtype), call.exact_dtype);
    } else {
      x = load_constant(call.key_exact, at + e0, call.exact_dtype);
      y = load_constant(call.key_exact, at + e1, call.exact_dtype);
      v0 = load_constant(call.value_exact, at + 2 * p, call.exact_dtype);
      v1 = load_constant(call.value_exact, at + 2 * p + 1, call.exact_dtype);
    }
    const float c = p < half ? __ldg(layer.cos + token * half + p) : 1.0f, s = p < half ? __ldg(layer.sin + token * half + p) : 0.0f;
    keys[n * pitch + 2 * p] = x * c - y * s;
    keys[n * pitch + 2 * p + 1] = y * c + x * s;
    values[n * pitch + 2 * p] = v0;
    values[n * pitch + 2 * p + 1] = v1;
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
    for (int h = 0; h < Lanes; ++h)
      {
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
    if (lane == 0) memory.exact_state[at * Lanes + warp] = make_float2(most, sum);
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
      memory.exact[(at * Lanes + h) * d + e] = out[h] + (groups == 2 ? keys[h * d + e] : 0.0f);
}

template <int Rows, int Codes, int Lanes>
__global__ void __launch_bounds__(kCombineThreads, 3)
    combine(const __grid_constant__ gsrq_layer layer, const __grid_constant__ gsrq_call call,
            const __grid_constant__ DecodePlan plan, Memory memory, int vheads, int clusters, int value_blocks, int splits) {
  const int block = blockIdx.x;
  if (block < value_blocks) combine_values<Rows, Codes, Lanes>(layer, call, plan, memory, vheads, clusters, block);
  else attend_exact<Lanes>(layer, call, plan, memory, vheads, splits, block - value_blocks);
}

constexpr int kFinishThreads = 128;

// The sum of the coded and exact parts of one (row, query head).
__global__ void __launch_bounds__(kFinishThreads)
    finish(const __grid_constant__ gsrq_layer layer, const __grid_constant__ gsrq_call call,
           const __grid_constant__ DecodePlan plan, Memory memory, int has_coded, int splits) {
  const int vhead = blockIdx.x / plan.part_heads, h = blockIdx.x % plan.part_heads, row = blockIdx.y;
  const int kv_head = vhead / plan.parts, part = vhead % plan.parts, vheads = gridDim.x / plan.part_heads;
  const int d = layer.head_dim;
  if (part * plan.part_heads + h >= plan.group) return;
  const int64_t head = static_cast<int64_t>(kv_head) * plan.group + part * plan.part_heads + h;
  const int64_t base = (static_cast<int64_t>(row) * layer.heads + head) * d;
  if (call.new_lengths[row] <= 0) {
    for (int i = threadIdx.x; i < d; i += kFinishThreads) store(call.output, base + i, 0, call.dtype);
    return;
  }
  const int used = (ExactTokens(layer, call, row).count + kExactTokens - 1) / kExactTokens;
  const int64_t first = (static_cast<int64_t>(row) * vheads + vhead) * splits;
  float2 coded = make_float2(kNone, 0);
  if (has_coded) coded = memory.combined[(static_cast<int64_t>(vhead) * call.batch + row) * plan.lanes + h];
  float most = coded.y > 0 ? coded.x : kNone;
#pragma unroll 8
  for (int k = 0; k < used; ++k) most = fmaxf(most, memory.exact_state[(first + k) * plan.lanes + h].x);
  for (int e = threadIdx.x; e < d; e += kFinishThreads) {
    float value = 0, sum = 0;
    if (coded.y > 0) {
      const int64_t slot_stride = static_cast<int64_t>(call.batch) * plan.lanes * plan.width;
      const float* from =
          memory.values + (static_cast<int64_t>(vhead) * plan.slots + e / plan.width * layer.values.stages) * slot_stride +
          (static_cast<int64_t>(row) * plan.lanes + h) * plan.width + e % plan.width;
#pragma unroll 16
      for (int r = 0; r < layer.values.stages; ++r) value += from[r * slot_stride];
      sum = coded.y * exp2f(coded.x - most);
      value *= sum;
    }
#pragma unroll 8
    for (int k = 0; k < used; ++k) {
      const float2 state = memory.exact_state[(first + k) * plan.lanes + h];
      const float factor = state.x == kNone ? 0.0f : exp2f(state.x - most);
      sum += state.y * factor;
      value += memory.exact[((first + k) * plan.lanes + h) * d + e] * factor;
    }
    store(call.output, base + e, value / sum, call.dtype);
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

template <int Lanes, int Stride, bool Fast>
Kernel kernel_of(int blocks) {
  switch (blocks) {
    case 3: return decode_kernel<3, Lanes, Stride, Fast>;
    case 4: return decode_kernel<4, Lanes, Stride, Fast>;
#ifndef GSRQ_DECODE_FEW
    case 1: return decode_kernel<1, Lanes, Stride, Fast>;
    case 2: return decode_kernel<2, Lanes, Stride, Fast>;
    case 6: return decode_kernel<6, Lanes, Stride, Fast>;
#endif
    default: return nullptr;
  }
}

// Fast kernels exist for four or eight query heads a KV head and up to 16 value stages.
Kernel kernel_of(const DecodePlan& plan, bool fast) {
  switch (plan.lanes * 1000 + plan.stride) {
    case 4064: return fast ? kernel_of<4, 64, true>(plan.blocks) : kernel_of<4, 64, false>(plan.blocks);
#ifndef GSRQ_DECODE_FEW
    case 1032: return kernel_of<1, 32, false>(plan.blocks);
    case 4032: return kernel_of<4, 32, false>(plan.blocks);
    case 8064: return fast ? kernel_of<8, 64, true>(plan.blocks) : kernel_of<8, 64, false>(plan.blocks);
#endif
    default: return nullptr;
  }
}

using CombineKernel = void (*)(gsrq_layer, gsrq_call, DecodePlan, Memory, int, int, int, int);

template <int Rows, int Codes>
CombineKernel combine_of(int lanes) {
  return lanes == 1 ? combine<Rows, Codes, 1> : lanes == 4 ? combine<Rows, Codes, 4> : combine<Rows, Codes, 8>;
}

CombineKernel combine_of(const DecodePlan& plan, bool few) {
  return few ? combine_of<kFewRows, kFewCodes>(plan.lanes) : combine_of<kManyRows, kManyCodes>(plan.lanes);
}

// The codes lie linearly and in whole words: the kernel needs no bounds inside a row and no page table.
bool is_fast(const gsrq_layer& layer, const gsrq_call& call, const DecodePlan& plan) {
  const int key_bytes = layer.keys.groups * layer.keys.stages, value_bytes = layer.values.groups * layer.values.stages;
  const int word = plan.blocks == 4 ? 16 : 4;
  return call.block_table == nullptr && plan.lanes >= 4 && plan.ways == 1 && layer.keys.stages % kBlockStages == 0 &&
         plan.all_blocks == plan.blocks * plan.splits && key_bytes % word == 0 && layer.keys.stages % word == 0 &&
         value_bytes % 4 == 0 && plan.slots % 4 == 0;
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

int combine_bytes(const DecodePlan& plan, int rows, int codes) {
  const int values = 2 * (codes * (plan.width + kPadHalves) + 2 * rows * (codes + kPadHalves));
  return std::max(values, 4 * (8 * plan.head_dim + 2 * kExactTokens * (plan.head_dim + 8)));
}

int exact_splits(const gsrq_layer& layer) {
  return static_cast<int>((gsrq_exact_slots(layer.sinks, layer.window, layer.block) + kExactTokens - 1) / kExactTokens);
}

bool prepare_kernel(Kernel kernel, const DecodePlan& plan) {
  return cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, kSharedLimit) == cudaSuccess &&
         (plan.cluster <= 8 || cudaFuncSetAttribute(kernel, cudaFuncAttributeNonPortableClusterSizeAllowed, 1) == cudaSuccess);
}

// Clusters that run at once on the current device, 0 where none can; asked once a device and kernel.
int resident_clusters(const DecodePlan& plan) {
  static std::mutex mutex;
  static std::map<std::tuple<int, const void*, int, int>, int> known;
  const Kernel kernel = kernel_of(plan, false), fast = kernel_of(plan, true);
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
        prepare_kernel(kernel, plan) && prepare_kernel(fast, plan) &&
        cudaFuncSetAttribute(combine_of(plan, true), cudaFuncAttributeMaxDynamicSharedMemorySize, kSharedLimit - 8192) ==
            cudaSuccess &&
        cudaFuncSetAttribute(combine_of(plan, false), cudaFuncAttributeMaxDynamicSharedMemorySize, kSharedLimit - 8192) ==
            cudaSuccess &&
        cudaOccupancyMaxActiveClusters(&clusters, kernel, &config) == cudaSuccess;
    if (!ready) clusters = 0;
    cudaGetLastError();
  }
  known[key] = clusters;
  return clusters;
}

Memory take_memory(const gsrq_layer& layer, const gsrq_call& call, const DecodePlan& plan, int vheads, int clusters, Arena& workspace) {
  const int64_t rows = static_cast<int64_t>(vheads) * call.batch, partials = rows + clusters;
  Memory m{};
  m.bins = workspace.take<float>(partials * plan.ways * plan.bins());
  m.scratch = workspace.take<float>(2LL * clusters * plan.cluster * plan.bins());
  m.scratch_state = workspace.take<float2>(2LL * clusters * plan.cluster * plan.lanes);
  m.state = workspace.take<float2>(partials * plan.lanes);
  m.combined = workspace.take<float2>(rows * plan.lanes);
  m.values = workspace.take<float>(rows * plan.slots * plan.lanes * plan.width);
  m.exact = workspace.take<float>(rows * exact_splits(layer) * plan.lanes * plan.head_dim);
  m.exact_state = workspace.take<float2>(rows * exact_splits(layer) * plan.lanes);
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
  take_memory(layer, call, plan, layer.kv_heads * plan.parts, resident_clusters(plan), workspace);
}

int decode(const gsrq_layer& layer, const gsrq_call& call, Arena& prepared, Arena& workspace, cudaStream_t stream) {
  DecodePlan plan;
  if (!plan_of(layer, &plan)) return fail("the fast decode does not apply");
  const int vheads = layer.kv_heads * plan.parts, clusters = resident_clusters(plan);
  const Constants constants = take_constants(layer, plan, prepared);
  const Memory memory = take_memory(layer, call, plan, vheads, clusters, workspace);
  const bool has_coded = gsrq_coded(call.max_total, layer.sinks, layer.window, layer.block) > 0;
  if (has_coded) {
    cudaLaunchAttribute attribute;
    cudaLaunchConfig_t config = launch_config(plan, &attribute, clusters);
    config.stream = stream;
    if (cudaLaunchKernelEx(&config, kernel_of(plan, is_fast(layer, call, plan)), layer, call, plan, constants, memory, vheads) != cudaSuccess)
      return launched("decode_kernel");
  }
  const bool few = call.batch * plan.lanes <= kFewRows;
  const int rows = few ? kFewRows : kManyRows, rows_at_once = rows / plan.lanes, splits = exact_splits(layer);
  const int64_t value_blocks =
      has_coded ? static_cast<int64_t>(plan.slots) * vheads * ((call.batch + rows_at_once - 1) / rows_at_once) : 0;
  const int64_t blocks = value_blocks + static_cast<int64_t>(splits) * vheads * call.batch;
  const CombineKernel combine_kernel = combine_of(plan, few);
  combine_kernel<<<static_cast<unsigned>(blocks), kCombineThreads,
                   combine_bytes(plan, rows, few ? kFewCodes : kManyCodes), stream>>>(
      layer, call, plan, memory, vheads, clusters, static_cast<int>(value_blocks), splits);
  if (launched("combine")) return 1;
  finish<<<dim3(static_cast<unsigned>(vheads * plan.part_heads), static_cast<unsigned>(call.batch)), kFinishThreads, 0,
           stream>>>(layer, call, plan, memory, has_coded, splits);
  return launched("finish");
}

}  // namespace gsrq::cuda
