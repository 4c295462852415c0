// What a query is multiplied with once, before the coded tokens of a cache in the rotated frame are scored; and the row's exact
// tokens, which wait for nothing. Code is compact: with one row a block runs it once, and reading it takes longer than running it.
#include <algorithm>

#include "decode_center.cuh"
#include "decode_combine.cuh"
#include "decode_exact.cuh"
#include "launch.cuh"

namespace gsrq::cuda::decoding {
namespace {

constexpr int kThreads = kPrepareThreads;
constexpr int kPadHalves = 32;  // of a table block's queries: two columns that are read together lie in different banks
constexpr int kTableCodes = 32;      // of a table block
constexpr int kFewRows = 4;          // for so many each block turns the queries it needs: no launch ahead of it
constexpr int kCenterBlocks = 256;   // at most, unless a block's stretches were more than a row
static_assert(kThreads / 32 == kPartSlots, "a warp fills one slot's tables");
static_assert(kThreads == kCombineThreads, "exact tokens are attended to here");

// Blocks of each kind, in their order, and what one of them takes.
struct Work {
  int tables, centers, exact;
  int stretches, splits, vheads;  // stretches: of kCenterTokens, one after another
  bool full, wide_exact;
};

// Block: some codewords of the eight slots of a part, a warp a slot, times the queries of all rows. A product's columns are
// the heads of a row, both summands of each. Its steps take a codeword's elements in an order in which a lane's lie together:
// eight of 32, for two steps. Exact: a codeword has Chunks times 32 elements, else at most that.
template <int Chunks, bool Exact>
__device__ void fill_tables(const gsrq_layer& layer, const gsrq_call& call, const LookupPlan& plan,
                            const LookupMemory& memory, const Work& work, int block) {
  constexpr int kGroups = kCodewords / kTableCodes;
  const int vheads = work.vheads, rows = call.batch;
  const int first_code = block % kGroups * kTableCodes, part = block / kGroups % plan.key_parts;
  const int vhead = block / (kGroups * plan.key_parts), kv_head = vhead / plan.head.parts;
  const int d = layer.head_dim, pitch = d + kPadHalves, thread = threadIdx.x, warp = thread / 32, lane = thread % 32;
  const int g = lane / 4, t = lane % 4, slot = part * kPartSlots + warp;
  __half* const queries = reinterpret_cast<__half*>(shared_memory);  // [rows][high, low][4 heads][pitch]
  const bool real = slot < plan.key_slots;  // slots past the last are zeros
  const int used = real ? slot : 0, of_head = used / layer.keys.stages * plan.key_width;
  const int element = kv_head * d + of_head, width = layer.keys.width;
  const __half* const word =
      static_cast<const __half*>(layer.keys.codewords) +
      (static_cast<int64_t>(element / width * layer.keys.stages + used % layer.keys.stages) * kCodewords + first_code + g) * width +
      element % width + 8 * t;
  uint32_t same = 0x3210;  // moves with it are made once and not in each row's turn
  asm volatile("" : "+r"(same));
  uint32_t a[2 * Chunks][4];
  const auto load = [&](int code) {
    const __half* const from[2] = {word + code * width, word + (code + 8) * width};
    uint4 x[Chunks][2];
#pragma unroll
    for (int k = 0; k < Chunks; ++k)
#pragma unroll
      for (int r = 0; r < 2; ++r)
        x[k][r] = real && (Exact || 32 * k + 8 * t < plan.key_width)
                      ? __ldg(reinterpret_cast<const uint4*>(from[r] + 32 * k))
                      : make_uint4(0, 0, 0, 0);
#pragma unroll
    for (int k = 0; k < Chunks; ++k)
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        const uint32_t words[4] = {x[k][r].x, x[k][r].y, x[k][r].z, x[k][r].w};
#pragma unroll
        for (int i = 0; i < 4; ++i) a[2 * k + i / 2][i % 2 * 2 + r] = __byte_perm(words[i], 0, same);
      }
  };
  load(0);
  for (int i = thread; i < rows * kLookupLanes * (d / 2); i += kThreads) {
    const int p = i % (d / 2), column = i / (d / 2), row = column / kLookupLanes, h = column % kLookupLanes;
    const TurnedQuery query(layer, call, plan.head, row, vhead, h);
    const TurnedPair pair(layer, call, query, p);
    const float2 q = pair.turned(query);
    __half* const high = queries + (row * 2 * kLookupLanes + h) * pitch;
    split(q.x, high + pair.e0, high + kLookupLanes * pitch + pair.e0);
    split(q.y, high + pair.e1, high + kLookupLanes * pitch + pair.e1);
  }
  __syncthreads();

  const bool lower = t >= 2;
  const int64_t of_row = static_cast<int64_t>(vheads) * plan.key_parts * (kCodewords * kPartWords);
  float* const out = memory.tables + static_cast<int64_t>(vhead * plan.key_parts + part) * (kCodewords * kPartWords) +
                     (first_code + g + (lower ? 8 : 0)) * kPartWords + warp * kLookupLanes + t % 2 * 2;
#pragma unroll 1
  for (int code = 0; code < kTableCodes; code += 16) {
    if (code > 0) load(code);
    const __half* from = queries + g * pitch + of_head + 8 * t;
    float* to = out + code * kPartWords;
#pragma unroll 1
    for (int row = 0; row < rows; ++row) {
      float sums[2][4] = {};
#pragma unroll
      for (int k = 0; k < Chunks; ++k) {
        uint4 b = make_uint4(0, 0, 0, 0);
        if (Exact || 32 * k + 8 * t < plan.key_width) b = *reinterpret_cast<const uint4*>(from + 32 * k);
        multiply(sums[0], a[2 * k], b.x, b.y);
        multiply(sums[1], a[2 * k + 1], b.z, b.w);
      }
      // Columns 2 t: lanes t < 2 have sums with `high`, the others with `low` of the same heads. Those end with code g, these
      // with g + 8.
      float kept[2];
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const float x = sums[0][i] + sums[1][i], y = sums[0][2 + i] + sums[1][2 + i];
        kept[i] = (lower ? y : x) + __shfl_xor_sync(~0u, lower ? x : y, 2);
      }
      __stcg(reinterpret_cast<float2*>(to), make_float2(kept[0], kept[1]));
      from += 2 * kLookupLanes * pitch;
      to += of_row;
    }
  }
}

template <int Chunks, bool Exact>
__global__ void __launch_bounds__(kThreads, Chunks == 4 ? 3 : 2)
    prepare_kernel(const __grid_constant__ gsrq_layer layer, const __grid_constant__ gsrq_call call,
                   const __grid_constant__ LookupPlan plan, LookupMemory memory, const __grid_constant__ Work work) {
  int block = blockIdx.x;
  let_next_begin();
  if (block < work.tables) {
    fill_tables<Chunks, Exact>(layer, call, plan, memory, work, block);
    return;
  }
  block -= work.tables;
  if (block >= work.centers && work.wide_exact)
    attend_exact_wide(layer, call, plan.head, memory.parts, work.vheads, work.splits, block - work.centers);
  else if (block >= work.centers)
    attend_exact<kLookupLanes>(layer, call, plan.head, memory.parts, work.vheads, work.splits, block - work.centers);
  else if (work.full) score_center<true>(layer, call, plan.head, memory, work.vheads, work.stretches, block);
  else score_center<false>(layer, call, plan.head, memory, work.vheads, work.stretches, block);
}

using PrepareKernel = void (*)(gsrq_layer, gsrq_call, LookupPlan, LookupMemory, Work);

PrepareKernel prepare_of(const LookupPlan& plan) {
  return plan.key_width == 128  ? prepare_kernel<4, true>
         : plan.key_width < 128 ? prepare_kernel<4, false>
                                : prepare_kernel<8, false>;
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

bool queries_are_few(const gsrq_layer& layer, const gsrq_call& call) { return call.batch <= kFewRows && center_is_fixed(layer); }

int fill_offsets(const gsrq_layer& layer, uint4* offsets, cudaStream_t stream) {
  if (!center_is_fixed(layer)) return 0;
  offsets_kernel<<<kCenterTiles, 32 * kCenterSteps, 0, stream>>>(layer, offsets);
  return launched("fill_offsets");
}

int prepare_lookup(const gsrq_layer& layer, const gsrq_call& call, const LookupPlan& plan, const LookupMemory& memory,
                   cudaStream_t stream) {
  const int64_t vheads = static_cast<int64_t>(layer.kv_heads) * plan.head.parts, batch = call.batch;
  const int d = layer.head_dim;
  Work work{};
  work.vheads = static_cast<int>(vheads);
  work.full = layer.half_rope == kCenterPairs &&
              (reinterpret_cast<uintptr_t>(layer.cos) | reinterpret_cast<uintptr_t>(layer.sin)) % 8 == 0;
  work.wide_exact = exact_is_wide(layer, call);
  work.splits = exact_splits(layer);
  // The queries that a block needs are turned once for all of its stretches.
  const int64_t stretches = (memory.padded + kCenterTokens - 1) / kCenterTokens;
  const int64_t of_stretch = (vheads + kCenterHeads - 1) / kCenterHeads * batch;
  const int64_t together = std::min(stretches, (stretches * of_stretch + kCenterBlocks - 1) / kCenterBlocks);
  work.stretches = static_cast<int>(together);
  const int64_t centers = (stretches + together - 1) / together * of_stretch;
  const int64_t tables = kCodewords / kTableCodes * plan.key_parts * vheads;
  const int64_t exact = work.splits * vheads * batch;
  work.tables = static_cast<int>(tables);
  work.centers = static_cast<int>(centers);
  work.exact = static_cast<int>(exact);
  const int table_bytes = 2 * call.batch * 2 * kLookupLanes * (d + kPadHalves);
  const int bytes = std::max({table_bytes, kCenterBytes, exact_bytes(d)});
  const PrepareKernel kernel = prepare_of(plan);
  if (cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes) != cudaSuccess)
    return launched("prepare_lookup");
  launch(false, kernel, static_cast<unsigned>(centers + tables + exact), kThreads, bytes, stream, layer, call, plan, memory,
         work);
  return launched("prepare_lookup");
}

}  // namespace gsrq::cuda::decoding
