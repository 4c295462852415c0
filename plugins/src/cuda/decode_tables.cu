// What a query is multiplied with once, before the coded tokens of a cache in the rotated frame are scored; and the row's
// exact tokens, which wait for nothing. Code is compact: with one row a block runs it once, and reading it takes longer than
// running it.
#include <algorithm>

#include "decode_center.cuh"
#include "decode_combine.cuh"
#include "decode_exact.cuh"
#include "launch.cuh"

namespace gsrq::cuda::decoding {
namespace {

constexpr int kThreads = kPrepareThreads;
constexpr int kPadHalves = 32;  // of a table block's queries: two columns that are read together lie in different banks
constexpr int kTogetherRows = 8;  // of a table block, that are written together
constexpr int kTableRows = 16, kFewTableCodes = 32, kManyTableCodes = 64;
constexpr int kAloneRows = 4;        // up to so many rows each block turns the queries it needs: no launch ahead of it
constexpr int kCenterBlocks = 256;   // about so many, each with some stretches of a row
static_assert(kThreads / 32 == kPartSlots, "a warp fills one slot's tables");
static_assert(kThreads == kCombineThreads, "exact tokens are attended to here");

// Blocks of each kind, and what one of them takes.
struct Work {
  int exact, centers, tables;
  int table_codes, splits, vheads;
  CenterWork center;
  bool with_offsets, full, wide_exact, exact_rows;  // exact_rows: attend_exact_rows takes the exact tokens
};

// Grid: (vheads, batch). Turned queries, their drifts with the center, and what bounds the sum of those.
__global__ void __launch_bounds__(kThreads)
    turn_queries(const __grid_constant__ gsrq_layer layer, const __grid_constant__ gsrq_call call,
                 const __grid_constant__ LookupPlan plan, LookupMemory memory) {
  __shared__ float2 sums[kThreads / 32][kLookupLanes];
  wait_for_previous();  // before the next one may begin, which reads what the previous ones wrote
  let_next_begin();
  const int vhead = blockIdx.x, vheads = gridDim.x, row = blockIdx.y, d = layer.head_dim, half = layer.half_rope;
  const int thread = threadIdx.x, lane = thread % 32, h = thread % kLookupLanes, pairs = drift_pairs(layer);
  const int64_t item = static_cast<int64_t>(row) * vheads + vhead;
  const TurnedQuery query(layer, call, plan.head, row, vhead, h);
  float bound = 0, rest = 0;
#pragma unroll 1
  for (int p = thread / kLookupLanes; p < max(d / 2, pairs); p += kThreads / kLookupLanes) {
    float2 drift = make_float2(0, 0);
    if (p < d / 2) {
      const TurnedPair pair(layer, call, query, p);
      const float2 q = pair.turned(query);
      drift = drift_of(q, __ldg(query.center + pair.e0), __ldg(query.center + pair.e1));
      if (p < half) bound += length_of(drift) * fabsf(__ldg(layer.cos + p));  // row 0 has the table's scale
      else rest += drift.x;
      const int64_t to = (item * kLookupLanes + h) * d;
      split_in_two(q.x, memory.high + to + pair.e0, memory.low + to + pair.e0);
      split_in_two(q.y, memory.high + to + pair.e1, memory.low + to + pair.e1);
    }
    if (p < pairs) memory.drifts[item * pairs * kLookupLanes + drift_at(p, h)] = p < half ? drift : make_float2(0, 0);
  }
#pragma unroll
  for (int o = kLookupLanes; o < 32; o *= 2) {
    bound += __shfl_xor_sync(~0u, bound, o);
    rest += __shfl_xor_sync(~0u, rest, o);
  }
  if (lane < kLookupLanes) sums[thread / 32][lane] = make_float2(bound, rest);
  __syncthreads();
  if (thread < kLookupLanes) {
    float2 all = make_float2(0, 0);
    for (int w = 0; w < kThreads / 32; ++w) all = make_float2(all.x + sums[w][thread].x, all.y + sums[w][thread].y);
    memory.unit[item * kLookupLanes + thread] = all.x * (kCenterMargin / kCenterMost);
    memory.rest[item * kLookupLanes + thread] = all.y;
  }
}

// Block: some codewords of the eight slots of a part, a warp a slot, times the queries of up to 16 rows. A product's columns are
// the heads of a row, both summands of each. Its steps take a codeword's elements in an order in which a lane's lie together:
// eight of 32, for two steps. Exact: a codeword has Chunks times 32 elements, else at most that.
template <int Chunks, bool Exact, bool Alone>
__device__ void fill_tables(const gsrq_layer& layer, const gsrq_call& call, const LookupPlan& plan,
                            const LookupMemory& memory, const Work& work, int block) {
  const unsigned groups = kCodewords / static_cast<unsigned>(work.table_codes), vheads = work.vheads;
  const unsigned of_part = static_cast<unsigned>(block) / groups, of_vhead = of_part / static_cast<unsigned>(plan.key_parts);
  const unsigned of_rows = Alone ? 0 : of_vhead / vheads;
  const int first_code = static_cast<int>(block - of_part * groups) * work.table_codes;
  const int part = static_cast<int>(of_part - of_vhead * plan.key_parts), vhead = static_cast<int>(of_vhead - of_rows * vheads);
  const int kv_head = static_cast<int>(static_cast<unsigned>(vhead) / static_cast<unsigned>(plan.head.parts));
  const int first_row = static_cast<int>(of_rows) * kTableRows, rows = min(kTableRows, call.batch - first_row);
  const int d = layer.head_dim, pitch = d + kPadHalves, thread = threadIdx.x, warp = thread / 32, lane = thread % 32;
  const int g = lane / 4, t = lane % 4, slot = part * kPartSlots + warp;
  __half* const queries = reinterpret_cast<__half*>(shared_memory);  // [rows][high, low][4 heads][pitch]
  const bool real = slot < plan.key_slots;  // slots past the last are zeros
  const int used = real ? slot : 0, of_head = used / static_cast<unsigned>(layer.keys.stages) * plan.key_width;
  const int element = kv_head * d + of_head, width = layer.keys.width;
  const int64_t stage = static_cast<int64_t>(static_cast<unsigned>(element) / static_cast<unsigned>(width)) * layer.keys.stages +
                        static_cast<unsigned>(used) % static_cast<unsigned>(layer.keys.stages);
  const __half* const word = static_cast<const __half*>(layer.keys.codewords) + (stage * kCodewords + first_code + g) * width +
                             static_cast<unsigned>(element) % static_cast<unsigned>(width) + 8 * t;
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
  if (real)
#pragma unroll 1
    for (int i = 16 + lane / 2; i < work.table_codes; i += 16)
#pragma unroll 1
      for (int at = lane % 2 * 64; at < plan.key_width; at += 128) prefetch(word + (i - g) * width + at - 8 * t);
  if (Alone) {
#pragma unroll 1
    for (int i = thread; i < rows * kLookupLanes * (d / 2); i += kThreads) {
      const int column = static_cast<int>(static_cast<unsigned>(i) / (static_cast<unsigned>(d) / 2)), p = i - column * (d / 2);
      const int row = column / kLookupLanes, h = column % kLookupLanes;
      const TurnedQuery query(layer, call, plan.head, first_row + row, vhead, h);
      const TurnedPair pair(layer, call, query, p);
      const float2 q = pair.turned(query);
      __half* const high = queries + (row * 2 * kLookupLanes + h) * pitch;
      split_in_two(q.x, high + pair.e0, high + kLookupLanes * pitch + pair.e0);
      split_in_two(q.y, high + pair.e1, high + kLookupLanes * pitch + pair.e1);
    }
  } else {
    wait_for_previous();
    const int pieces = d / 8;
    for (int i = thread; i < rows * 2 * kLookupLanes * pieces; i += kThreads) {
      const int at = i % pieces * 8, column = i / pieces, row = column / (2 * kLookupLanes), h = column % kLookupLanes;
      const int64_t from = ((static_cast<int64_t>(first_row + row) * vheads + vhead) * kLookupLanes + h) * d + at;
      copy_async(queries + column * pitch + at, (column / kLookupLanes % 2 ? memory.low : memory.high) + from, true);
    }
    commit_async();
    wait_async<0>();
  }
  __syncthreads();

  // What the warps have of 16 codewords and some rows is gathered, and written in whole lines. A slot's place in a codeword's 128
  // bytes is turned by the codeword, so that eight of them lie in different banks.
  float* const gathered = reinterpret_cast<float*>(queries + rows * 2 * kLookupLanes * pitch);  // [kTogetherRows][16][8 slots][4]
  const bool lower = t >= 2;
  const int own_code = g + (lower ? 8 : 0);
  float2* const gather = reinterpret_cast<float2*>(gathered + own_code * kPartWords + (warp ^ g) * kLookupLanes + t % 2 * 2);
  const int64_t of_row = static_cast<int64_t>(vheads) * plan.key_parts * (kCodewords * kPartWords);
  float* const out = memory.tables + first_row * of_row +
                     static_cast<int64_t>(vhead * plan.key_parts + part) * (kCodewords * kPartWords) + first_code * kPartWords;
#pragma unroll 1
  for (int code = 0; code < work.table_codes; code += 16) {
    if (code > 0) load(code);
    const __half* from = queries + g * pitch + of_head + 8 * t;
#pragma unroll 1
    for (int begin = 0; begin < rows; begin += kTogetherRows) {
      const int here = min(kTogetherRows, rows - begin);
#pragma unroll 1
      for (int row = 0; row < here; ++row) {
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
        gather[row * (16 * kPartWords / 2)] = make_float2(kept[0], kept[1]);
        from += 2 * kLookupLanes * pitch;
      }
      __syncthreads();
      for (int i = thread; i < here * (16 * kPartSlots); i += kThreads) {
        const int row = i / (16 * kPartSlots), at = i % (16 * kPartSlots), of_code = at / kPartSlots, of_slot = at % kPartSlots;
        __stcg(reinterpret_cast<float4*>(out + (begin + row) * of_row + code * kPartWords) + at,
               reinterpret_cast<const float4*>(gathered)[row * (16 * kPartSlots) + of_code * kPartSlots + (of_slot ^ of_code % 8)]);
      }
      __syncthreads();
    }
  }
}

template <bool Half, bool Alone>
__device__ inline void attend_usual(const gsrq_layer& layer, const gsrq_call& call, const LookupPlan& plan,
                                    const LookupMemory& memory, const Work& work, int block) {
  if (!Alone && work.exact_rows) attend_exact_rows<Half>(layer, call, plan.head, memory.parts, work.vheads, work.splits, block);
  else attend_exact_wide<Half>(layer, call, plan.head, memory.parts, work.vheads, work.splits, block);
}

template <int Chunks, bool Exact, bool Alone>
__global__ void __launch_bounds__(kThreads, Chunks == 4 ? 3 : 2)
    prepare_kernel(const __grid_constant__ gsrq_layer layer, const __grid_constant__ gsrq_call call,
                   const __grid_constant__ LookupPlan plan, LookupMemory memory, const __grid_constant__ Work work) {
  // The longest first: with few rows those are exact tokens, in whose blocks no warp has much, else tables.
  int block = Alone ? gridDim.x - 1 - blockIdx.x : blockIdx.x;
  if (Alone) wait_for_previous();  // the first of a call's launches
  let_next_begin();
  if (block < work.tables) {
    fill_tables<Chunks, Exact, Alone>(layer, call, plan, memory, work, block);
    return;  // it waited, where there was what to wait for
  }
  block -= work.tables;
  if (block < work.centers) {
    if (work.full) score_center<true, Alone>(layer, call, plan.head, memory, work.center, block);
    else if (Alone || work.with_offsets) score_center<false, Alone>(layer, call, plan.head, memory, work.center, block);
    else score_center_plain(layer, call, memory, work.center, block);
  } else {
    block -= work.centers;
    if (!work.wide_exact) attend_exact<kLookupLanes>(layer, call, plan.head, memory.parts, work.vheads, work.splits, block);
    else if (call.dtype == GSRQ_F16) attend_usual<true, Alone>(layer, call, plan, memory, work, block);
    else attend_usual<false, Alone>(layer, call, plan, memory, work, block);
  }
  wait_for_previous();  // also where there was nothing to do
}

using PrepareKernel = void (*)(gsrq_layer, gsrq_call, LookupPlan, LookupMemory, Work);

template <bool Alone>
PrepareKernel prepare_of(const LookupPlan& plan) {
  return plan.key_width == 128  ? prepare_kernel<4, true, Alone>
         : plan.key_width < 128 ? prepare_kernel<4, false, Alone>
                                : prepare_kernel<8, false, Alone>;
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

int64_t drift_count(const gsrq_layer& layer) { return static_cast<int64_t>(drift_pairs(layer)) * kLookupLanes; }

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
  work.with_offsets = center_is_fixed(layer);
  work.full = work.with_offsets && layer.half_rope == kCenterPairs &&
              (reinterpret_cast<uintptr_t>(layer.cos) | reinterpret_cast<uintptr_t>(layer.sin)) % 8 == 0;
  work.wide_exact = exact_is_wide(layer, call);
  work.exact_rows = exact_by_rows(layer, call, work.vheads);
  work.table_codes = batch > kTableRows ? kManyTableCodes : kFewTableCodes;
  work.splits = exact_splits(layer);
  // The queries that a block needs are turned once for all of its stretches.
  const int64_t stretches = (memory.padded + kCenterTokens - 1) / kCenterTokens;
  const bool alone = batch <= kAloneRows && work.with_offsets;
  const int center_heads = alone ? kFewCenterHeads : kCenterHeads;
  const int64_t of_stretch = (vheads + center_heads - 1) / center_heads * batch;
  const int64_t together = std::min(stretches, (stretches * of_stretch + kCenterBlocks - 1) / kCenterBlocks);
  const int64_t pieces = (stretches + together - 1) / together;
  work.center = {work.vheads, center_heads, static_cast<int>(together), static_cast<unsigned>(pieces),
                 static_cast<unsigned>(of_stretch / batch)};
  const int64_t centers = pieces * of_stretch;
  const int64_t tables =
      kCodewords / work.table_codes * plan.key_parts * vheads * ((batch + kTableRows - 1) / kTableRows);
  const int64_t exact = work.splits * vheads * batch / (work.exact_rows ? kThreads / 32 : 1);
  if (batch > 65535 || centers + tables + exact > INT32_MAX)
    return fail("decode: %lld rows are too many", static_cast<long long>(batch));
  work.tables = static_cast<int>(tables);
  work.centers = static_cast<int>(centers);
  work.exact = static_cast<int>(exact);
  const int table_rows = static_cast<int>(std::min<int64_t>(batch, kTableRows));
  const int table_bytes = 2 * table_rows * 2 * kLookupLanes * (d + kPadHalves) +
                          4 * std::min(table_rows, kTogetherRows) * 16 * kPartWords;
  const int bytes = std::max({table_bytes, work.with_offsets ? kCenterBytes : 0, exact_bytes(d),
                              work.exact_rows ? kExactRowsBytes : 0});
  const PrepareKernel kernel = alone ? prepare_of<true>(plan) : prepare_of<false>(plan);
  if (cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes) != cudaSuccess)
    return launched("prepare_lookup");
  if (!alone) {
    launch(true, turn_queries, dim3(static_cast<unsigned>(vheads), static_cast<unsigned>(batch)), kThreads, 0, stream, layer,
           call, plan, memory);
    if (launched("turn_queries")) return 1;
  }
  launch(true, kernel, static_cast<unsigned>(centers + tables + exact), kThreads, bytes, stream, layer, call, plan, memory,
         work);
  return launched("prepare_lookup");
}

}  // namespace gsrq::cuda::decoding
