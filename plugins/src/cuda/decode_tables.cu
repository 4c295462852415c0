// What a query is multiplied with once, before the coded tokens of a cache in the rotated frame are scored.
#include <algorithm>

#include "decode_combine.cuh"
#include "decode_lookup.cuh"
#include "launch.cuh"
#include "mma.cuh"

namespace gsrq::cuda::decoding {
namespace {

constexpr int kThreads = 256, kPad = 8;
constexpr int kTableRows = 16, kTablePairs = kTableRows * kLookupLanes, kTableCodes = 32;
constexpr int kCenterTokens = kThreads / 32 * kCenterTiles * 16, kCenterHeads = 8;
static_assert(kThreads / 32 == kPartSlots, "a warp fills one slot's tables");

__device__ inline int position_of(const gsrq_call& call, int row) {
  return static_cast<int>(max(min(call.past_lengths[row], call.max_total - 1), static_cast<int64_t>(0)));
}

// Grid: (vheads, batch). Queries turned to their position, in units of log2 save where softcap needs them plain.
__global__ void __launch_bounds__(kThreads)
    turn_queries(const __grid_constant__ gsrq_layer layer, const __grid_constant__ gsrq_call call,
                 const __grid_constant__ LookupPlan plan, LookupMemory memory) {
  __shared__ float rests[kLookupLanes][128];
  let_next_begin();
  const int vhead = blockIdx.x, vheads = gridDim.x, row = blockIdx.y, d = layer.head_dim, half = layer.half_rope;
  const int kv_head = vhead / plan.head.parts, part = vhead % plan.head.parts, position = position_of(call, row);
  const float scale = layer.scale * (layer.softcap > 0 ? 1.0f : kLog2e);
  const int64_t item = static_cast<int64_t>(row) * vheads + vhead;
  const bool live = call.new_lengths[row] > 0;
  const int pairs = max(half, kCenterPairs);
  for (int i = threadIdx.x; i < kLookupLanes * max(d / 2, pairs); i += kThreads) {
    const int h = i % kLookupLanes, p = i / kLookupLanes, head = part * plan.head.part_heads + h;
    float2 q = make_float2(0, 0), drift = q;
    if (p < d / 2) {
      int e0, e1;
      pair_elements(layer, p, &e0, &e1);
      if (live && h < plan.head.part_heads && head < plan.head.group) {
        const int64_t base =
            (static_cast<int64_t>(row) * layer.heads + static_cast<int64_t>(kv_head) * plan.head.group + head) * d;
        const float x = load_constant(call.query, base + e0, call.dtype) * scale;
        const float y = load_constant(call.query, base + e1, call.dtype) * scale;
        const int64_t at = static_cast<int64_t>(position) * half + p;
        const float c = p < half ? __ldg(layer.cos + at) : 1.0f, s = p < half ? __ldg(layer.sin + at) : 0.0f;
        const float* m = layer.key_center + static_cast<int64_t>(kv_head) * d;
        const float mx = __ldg(m + e0), my = __ldg(m + e1);
        q = make_float2(x * c - y * s, y * c + x * s);
        drift = make_float2(q.x * mx + q.y * my, q.y * mx - q.x * my);
      }
      const int64_t to = (item * kLookupLanes + h) * d;
      const __half x = __float2half_rn(q.x), y = __float2half_rn(q.y);
      memory.high[to + e0] = x;
      memory.high[to + e1] = y;
      memory.low[to + e0] = __float2half_rn(q.x - __half2float(x));
      memory.low[to + e1] = __float2half_rn(q.y - __half2float(y));
      if (p >= half) rests[h][p - half] = drift.x;
    }
    if (p < pairs) memory.drifts[(item * pairs + p) * kLookupLanes + h] = p < half ? drift : make_float2(0, 0);
  }
  __syncthreads();
  if (threadIdx.x < kLookupLanes) {
    float sum = 0;
    for (int p = half; p < d / 2; ++p) sum += rests[threadIdx.x][p - half];
    memory.rest[item * kLookupLanes + threadIdx.x] = sum;
  }
}

// Block: 32 codewords of the eight slots of a part, a warp a slot, times the queries of up to 16 rows.
template <int Steps>
__device__ void fill_tables(const gsrq_layer& layer, const gsrq_call& call, const LookupPlan& plan,
                            const LookupMemory& memory, int vheads, int block) {
  constexpr int kGroups = kCodewords / kTableCodes;
  const int first_code = block % kGroups * kTableCodes, part = block / kGroups % plan.key_parts;
  const int vhead = block / (kGroups * plan.key_parts) % vheads, kv_head = vhead / plan.head.parts;
  const int first_row = block / (kGroups * plan.key_parts * vheads) * kTableRows, rows = min(kTableRows, call.batch - first_row);
  const int d = layer.head_dim, pitch = d + kPad, thread = threadIdx.x, warp = thread / 32, lane = thread % 32;
  const int g = lane / 4, t = lane % 4, slot = part * kPartSlots + warp, tiles = (rows + 1) / 2;
  __half* const high = reinterpret_cast<__half*>(shared_memory);  // [64][pitch]
  __half* const low = high + kTablePairs * pitch;
  float* const out = reinterpret_cast<float*>(low + kTablePairs * pitch);  // [2][2 rows][16 codewords][32]
  const int vectors = d / 8;
  wait_for_previous();
  for (int i = thread; i < 2 * tiles * kLookupLanes * vectors; i += kThreads) {
    const int pair = i / vectors, at = i % vectors * 8, row = pair / kLookupLanes;
    const int64_t from = ((static_cast<int64_t>(first_row + min(row, rows - 1)) * vheads + vhead) * kLookupLanes +
                          pair % kLookupLanes) * d + at;
    *reinterpret_cast<uint4*>(high + pair * pitch + at) = __ldg(reinterpret_cast<const uint4*>(memory.high + from));
    *reinterpret_cast<uint4*>(low + pair * pitch + at) = __ldg(reinterpret_cast<const uint4*>(memory.low + from));
  }
  const bool real = slot < plan.key_slots;
  const int used = real ? slot : 0, of_head = used / layer.keys.stages * plan.key_width;
  const int64_t element = static_cast<int64_t>(kv_head) * d + of_head, width = layer.keys.width;
  const __half* const words =
      static_cast<const __half*>(layer.keys.codewords) +
      ((element / width * layer.keys.stages + used % layer.keys.stages) * kCodewords + first_code + g) * width +
      element % width + 2 * t;
  const int64_t below = 8 * width;
  int buffer = 0;
  for (int half = 0; half < kTableCodes / 16; ++half) {
    uint32_t a[Steps][4];
#pragma unroll
    for (int k = 0; k < Steps; ++k) {
      const __half* from = words + half * 16 * width + k * 16;
      const bool here = real && k * 16 < plan.key_width;
      a[k][0] = here ? __ldg(reinterpret_cast<const uint32_t*>(from)) : 0;
      a[k][1] = here ? __ldg(reinterpret_cast<const uint32_t*>(from + below)) : 0;
      a[k][2] = here ? __ldg(reinterpret_cast<const uint32_t*>(from + 8)) : 0;
      a[k][3] = here ? __ldg(reinterpret_cast<const uint32_t*>(from + below + 8)) : 0;
    }
    __syncthreads();
    for (int tile = 0; tile < tiles; ++tile, buffer ^= 1) {
      float sums[2][4] = {};
      const int at = (tile * 8 + g) * pitch + of_head + 2 * t;
#pragma unroll
      for (int k = 0; k < Steps; ++k) {
        if (k * 16 >= plan.key_width) break;
        const uint32_t* x = reinterpret_cast<const uint32_t*>(high + at + k * 16);
        const uint32_t* y = reinterpret_cast<const uint32_t*>(low + at + k * 16);
        multiply(sums[0], a[k], x[0], x[4]);
        multiply(sums[1], a[k], y[0], y[4]);
      }
      // Column 2 t of the tile: row of two, head.
      float* const to = out + buffer * 1024 + (t / 2 * 16 + g) * kPartWords + warp * kLookupLanes + t % 2 * 2;
      *reinterpret_cast<float2*>(to) = make_float2(sums[0][0] + sums[1][0], sums[0][1] + sums[1][1]);
      *reinterpret_cast<float2*>(to + 8 * kPartWords) = make_float2(sums[0][2] + sums[1][2], sums[0][3] + sums[1][3]);
      __syncthreads();
      const int row = tile * 2 + thread / 128, word = thread % 128;
      if (row < rows) {
        float* const table = memory.tables +
                             (((static_cast<int64_t>(first_row) + row) * vheads + vhead) * plan.key_parts + part) *
                                 (kCodewords * kPartWords) +
                             (first_code + half * 16) * kPartWords;
        reinterpret_cast<float4*>(table)[word] = reinterpret_cast<const float4*>(out + buffer * 1024)[thread];
      }
    }
  }
}

// A warp takes 128 tokens: their offsets from the first are constant, so the matrix of their cosines and sines, as float16, lies
// in shared memory, and the first token's row turns u and v. A product's columns are the heads of two vheads; two products share
// a read of the matrix.
__device__ void score_center(const gsrq_layer& layer, const gsrq_call& call, const LookupMemory& memory, int vheads,
                             int block) {
  constexpr int kPairs = 2;  // of vheads that are scored together
  const int stretches = static_cast<int>((memory.padded + kCenterTokens - 1) / kCenterTokens);
  const int groups = (vheads + kCenterHeads - 1) / kCenterHeads, row = block / (stretches * groups);
  const int first_vhead = block / stretches % groups * kCenterHeads, here = min(kCenterHeads, vheads - first_vhead);
  const Range range = coded_range(layer, call, row);
  const int begin = block % stretches * kCenterTokens, end = min(begin + kCenterTokens, range.count);
  if (begin >= end) return;
  const int thread = threadIdx.x, warp = thread / 32, lane = thread % 32, g = lane / 4, t = lane % 4;
  const int64_t item = static_cast<int64_t>(row) * vheads + first_vhead;
  uint4* const offsets = reinterpret_cast<uint4*>(shared_memory);  // [tiles][steps][32]
  float2* const drifts = reinterpret_cast<float2*>(offsets + kCenterTiles * kCenterSteps * 32);  // [vheads][pairs][4]
  for (int i = thread; i < kCenterTiles * kCenterSteps * 32; i += kThreads) offsets[i] = __ldg(memory.offsets + i);
  wait_for_previous();
  for (int i = thread; i < kCenterHeads * kCenterPairs * kLookupLanes / 2; i += kThreads)
    reinterpret_cast<float4*>(drifts)[i] =
        i < here * kCenterPairs * kLookupLanes / 2
            ? __ldg(reinterpret_cast<const float4*>(memory.drifts + item * kCenterPairs * kLookupLanes) + i)
            : make_float4(0, 0, 0, 0);
  __syncthreads();
  const int half = layer.half_rope, first = begin + warp * kCenterTiles * 16;
  if (first >= end) return;
  const int64_t at = static_cast<int64_t>(range.first + first) * half;
#pragma unroll 1
  for (int v = 0; v < here; v += 2 * kPairs) {
    uint32_t b[kPairs][kCenterSteps][2];
#pragma unroll
    for (int s = 0; s < kCenterSteps; ++s) {
      float turned[kPairs][2][2];
#pragma unroll
      for (int k = 0; k < 2; ++k) {
        const int pair = 8 * s + 2 * t + k;
        const int64_t place = at + min(pair, half - 1);  // drifts past it are zero
        const float c = __ldg(layer.cos + place), d = __ldg(layer.sin + place);
#pragma unroll
        for (int i = 0; i < kPairs; ++i) {
          const float2 x = drifts[((v + 2 * i + g / kLookupLanes) * kCenterPairs + pair) * kLookupLanes + g % kLookupLanes];
          turned[i][0][k] = x.x * c + x.y * d;
          turned[i][1][k] = x.y * c - x.x * d;
        }
      }
#pragma unroll
      for (int i = 0; i < kPairs; ++i)
#pragma unroll
        for (int j = 0; j < 2; ++j) b[i][s][j] = packed(turned[i][j][0], turned[i][j][1]);
    }
    // Columns 2 t and 2 t + 1: heads of vhead t / 2 of the two.
    float2 rest[kPairs];
#pragma unroll
    for (int i = 0; i < kPairs; ++i) {
      const int vhead = v + 2 * i + t / 2;
      rest[i] = vhead < here
                    ? __ldg(reinterpret_cast<const float2*>(memory.rest + (item + vhead) * kLookupLanes) + t % 2)
                    : make_float2(0, 0);
    }
#pragma unroll 2
    for (int tile = 0; tile < kCenterTiles; ++tile) {
      float sums[kPairs][4] = {};
#pragma unroll
      for (int s = 0; s < kCenterSteps; ++s) {
        const uint4 x = offsets[(tile * kCenterSteps + s) * 32 + lane];
        const uint32_t a[4] = {x.x, x.y, x.z, x.w};
#pragma unroll
        for (int i = 0; i < kPairs; ++i) multiply(sums[i], a, b[i][s][0], b[i][s][1]);
      }
#pragma unroll
      for (int i = 0; i < kPairs; ++i) {
        const int vhead = v + 2 * i + t / 2;
#pragma unroll
        for (int r = 0; r < 2; ++r) {
          const int token = first + tile * 16 + g + 8 * r;
          if (vhead < here && token < end)
            reinterpret_cast<float2*>(memory.center + (item + vhead) * memory.padded + token)[t % 2] =
                make_float2(sums[i][2 * r] + rest[i].x, sums[i][2 * r + 1] + rest[i].y);
        }
      }
    }
  }
}

// The same for any rotary table: a thread a (token, head).
__device__ void score_center_plain(const gsrq_layer& layer, const gsrq_call& call, const LookupMemory& memory, int vheads,
                                   int block) {
  const int stretches = static_cast<int>((memory.padded + kCenterTokens - 1) / kCenterTokens);
  const int groups = (vheads + kCenterHeads - 1) / kCenterHeads, row = block / (stretches * groups);
  const int first_vhead = block / stretches % groups * kCenterHeads, here = min(kCenterHeads, vheads - first_vhead);
  const Range range = coded_range(layer, call, row);
  const int begin = block % stretches * kCenterTokens, end = min(begin + kCenterTokens, range.count);
  const int half = layer.half_rope, pairs = max(half, kCenterPairs);
  wait_for_previous();
  for (int i = threadIdx.x; i < (end - begin) * here * kLookupLanes; i += kThreads) {
    const int h = i % kLookupLanes, v = i / kLookupLanes % here, token = begin + i / (kLookupLanes * here);
    const int64_t at = static_cast<int64_t>(range.first + token) * half;
    const int64_t item = static_cast<int64_t>(row) * vheads + first_vhead + v;
    float sum = memory.rest[item * kLookupLanes + h];
    for (int p = 0; p < half; ++p) {
      const float2 x = memory.drifts[(item * pairs + p) * kLookupLanes + h];
      sum += x.x * __ldg(layer.cos + at + p) + x.y * __ldg(layer.sin + at + p);
    }
    reinterpret_cast<float*>(memory.center + item * memory.padded + token)[h] = sum;
  }
}

bool takes_offsets(const gsrq_layer& layer) {
  return layer.geometric && layer.half_rope > 0 && layer.half_rope <= kCenterPairs;
}

// Blocks: first those of the center, then of the tables.
template <int Steps>
__global__ void __launch_bounds__(kThreads, 3)
    prepare_kernel(const __grid_constant__ gsrq_layer layer, const __grid_constant__ gsrq_call call,
                   const __grid_constant__ LookupPlan plan, LookupMemory memory, int vheads, int center_blocks,
                   int with_offsets) {
  const int block = blockIdx.x;
  let_next_begin();
  if (block >= center_blocks) fill_tables<Steps>(layer, call, plan, memory, vheads, block - center_blocks);
  else if (with_offsets) score_center(layer, call, memory, vheads, block);
  else score_center_plain(layer, call, memory, vheads, block);
  wait_for_previous();  // also where there was nothing to do
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

int fill_offsets(const gsrq_layer& layer, uint4* offsets, cudaStream_t stream) {
  if (!takes_offsets(layer)) return 0;
  offsets_kernel<<<kCenterTiles, 32 * kCenterSteps, 0, stream>>>(layer, offsets);
  return launched("fill_offsets");
}

int prepare_lookup(const gsrq_layer& layer, const gsrq_call& call, const LookupPlan& plan, const LookupMemory& memory,
                   cudaStream_t stream) {
  const int64_t vheads = static_cast<int64_t>(layer.kv_heads) * plan.head.parts, batch = call.batch;
  const int64_t stretches = (memory.padded + kCenterTokens - 1) / kCenterTokens;
  const int64_t center_blocks = stretches * ((vheads + kCenterHeads - 1) / kCenterHeads) * batch;
  const int64_t table_blocks =
      kCodewords / kTableCodes * plan.key_parts * vheads * ((batch + kTableRows - 1) / kTableRows);
  const int64_t blocks = center_blocks + table_blocks;
  if (batch > 65535 || blocks > INT32_MAX) return fail("decode: %lld rows are too many", static_cast<long long>(batch));
  turn_queries<<<dim3(static_cast<unsigned>(vheads), static_cast<unsigned>(batch)), kThreads, 0, stream>>>(layer, call, plan,
                                                                                                          memory);
  if (launched("turn_queries")) return 1;
  const int d = layer.head_dim;
  const int bytes = std::max(4 * kTablePairs * (d + kPad) + 2 * 4096,
                             static_cast<int>(kCenterHeads * kCenterPairs * kLookupLanes * sizeof(float2) +
                                              kCenterTiles * kCenterSteps * 32 * sizeof(uint4)));
  const auto kernel = plan.key_width <= 128 ? prepare_kernel<8> : prepare_kernel<16>;
  if (cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes) != cudaSuccess)
    return launched("prepare_lookup");
  launch(true, kernel, static_cast<unsigned>(blocks), kThreads, bytes, stream, layer, call, plan, memory,
         static_cast<int>(vheads), static_cast<int>(center_blocks), static_cast<int>(takes_offsets(layer)));
  return launched("prepare_lookup");
}

}  // namespace gsrq::cuda::decoding
