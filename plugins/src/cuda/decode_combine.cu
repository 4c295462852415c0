// See decode_combine.cuh.
#include "decode_combine.cuh"

#include <algorithm>

#include "decode_exact.cuh"
#include "launch.cuh"
#include "mma.cuh"

namespace gsrq::cuda::decoding {
namespace {

constexpr int kPadHalves = 8;
// (row, query head) pairs of a block, and codewords at a time: many rows in turns of half the codebook, of several slots, or
// few rows and one slot with a quarter of it.
constexpr int kManyRows = 32, kManyCodes = 128, kFewRows = 16, kFewCodes = 64;
constexpr int kManyBlocks = 2 * 132;  // that run at once: if there are more, they take several slots each
// Bins, divided by their sum, are multiplied as float16: of their sum's size times this, so that small ones keep their bits.
constexpr float kBinScale = 4096;

template <int Lanes>
__device__ inline void load_lanes(float (&to)[Lanes], const float* from) {
  if constexpr (Lanes == 1) {
    to[0] = __ldg(from);
  } else {
#pragma unroll
    for (int h = 0; h < Lanes; h += 4) {
      const float4 v = __ldg(reinterpret_cast<const float4*>(from + h));
      to[h] = v.x, to[h + 1] = v.y, to[h + 2] = v.z, to[h + 3] = v.w;
    }
  }
}

constexpr int kWarps = kCombineThreads / 32;

// Of a block's rows the owners: how many there are, and where the first one's factors, state and bins lie.
template <int Rows>
struct Owners {
  int count[Rows], first_factor[Rows];
  int64_t first_partial[Rows], first_bins[Rows];
};

// All threads call it; what the launch before has written can be read afterwards. Few: the block has all rows, and computes their
// owners while that launch ends; of many rows it has left a list.
template <bool Few, int Rows>
__device__ void find_owners(Owners<Rows>& owners, const gsrq_layer& layer, const gsrq_call& call, const DecodePlan& plan,
                            const Memory& memory, const Stretches& coded, int vhead, int first_row, int rows) {
  static_assert(Rows <= 32, "a lane a row");
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const int64_t chunks = warp == 0 && lane < rows ? chunks_of(layer, call, first_row + lane) : 0;
  if (!Few) wait_for_previous();
  if (warp == 0) {
    const int64_t of_lane = static_cast<int64_t>(vhead) * call.batch + first_row + lane;
    int2 own = make_int2(0, -1);  // the first and the last owner
    if constexpr (Few) {
      const Line line = line_of(layer, call, coded.vheads, coded.owners, coded.even, coded.lead);
      const int64_t places = places_of(static_cast<int>(chunks), line.lead);
      const int64_t begin = line.first_chunk(vhead, running_sum(places) - places);
      if (chunks > 0) own = make_int2(line.owner(begin), line.owner(begin + chunks - 1));
    } else {
      if (chunks > 0) own = __ldcg(memory.owners + of_lane);
    }
    const int used = own.y - own.x + 1, total = running_sum(used);
    if (lane < rows) {
      owners.count[lane] = used;
      owners.first_factor[lane] = total - used;
      owners.first_partial[lane] = of_lane + own.x;
      owners.first_bins[lane] = (of_lane + own.x) * plan.ways * plan.bins();
    }
  }
  __syncthreads();
  if (Few) wait_for_previous();
}

// What the owners' bins are multiplied by: [owners of the rows][Lanes]. combined: of the first row's heads, null if another
// block writes it.
template <int Rows, int Lanes>
__device__ void weigh_owners(const Owners<Rows / Lanes>& owners, const float2* states, int pairs, float* factors,
                             float2* combined) {
  constexpr int kShare = 8;  // lanes of a pair
  static_assert(Rows * kShare <= kCombineThreads, "one pass");
  const int pair = threadIdx.x / kShare, r = pair / Lanes, h = pair % Lanes, n = pair < pairs ? owners.count[r] : 0;
  const float2* const state = states + (pair < pairs ? owners.first_partial[r] * Lanes + h : 0);
  float* const own_factors = factors + (pair < pairs ? owners.first_factor[r] * Lanes + h : 0);
  float most = kNone, sum = 0;
  const int first = threadIdx.x % kShare;
  const float2 own[2] = {first < n ? __ldg(&state[first * Lanes]) : make_float2(kNone, 0),
                         first + kShare < n ? __ldg(&state[(first + kShare) * Lanes]) : make_float2(kNone, 0)};
  most = fmaxf(own[0].x, own[1].x);
#pragma unroll 1
  for (int k = first + 2 * kShare; k < n; k += kShare) most = fmaxf(most, __ldg(&state[k * Lanes].x));
#pragma unroll
  for (int o = kShare / 2; o > 0; o /= 2) most = fmaxf(most, __shfl_xor_sync(~0u, most, o));
  const auto weigh = [&](int k, float2 s) {
    const float factor = s.x == kNone ? 0.0f : exp2f(s.x - most);
    sum += s.y * factor;
    own_factors[k * Lanes] = factor;
  };
  if (first < n) weigh(first, own[0]);
  if (first + kShare < n) weigh(first + kShare, own[1]);
#pragma unroll 1
  for (int k = first + 2 * kShare; k < n; k += kShare) weigh(k, __ldg(&state[k * Lanes]));
#pragma unroll
  for (int o = kShare / 2; o > 0; o /= 2) sum += __shfl_xor_sync(~0u, sum, o);
  const float inverse = sum > 0 ? kBinScale / sum : 0.0f;
#pragma unroll 1
  for (int k = first; k < n; k += kShare) own_factors[k * Lanes] *= inverse;
  if (combined != nullptr && pair < pairs && first == 0) combined[pair] = make_float2(most, sum);
}

// Where the bins of a value slot lie: of the first partial, from codeword to codeword, from partial to partial.
template <int Lanes>
struct SlotBins {
  int code_stride, slot_stride, of_way, slots_of_way;
  int64_t partial;
  __device__ SlotBins(const DecodePlan& plan, const Stretches& coded)
      : code_stride(coded.by_slot ? Lanes : plan.stride),
        slot_stride(coded.by_slot ? kCodewords * Lanes : Lanes),
        of_way(plan.bins()),
        slots_of_way(plan.slots_per_cta),
        partial(static_cast<int64_t>(plan.ways) * plan.bins()) {}
  __device__ int64_t of(int slot) const {
    return static_cast<int64_t>(slot / slots_of_way) * of_way + slot % slots_of_way * slot_stride;
  }
};

// The codewords of a value stage: of one of the head's sub-vectors, the columns of the head.
__device__ inline const __half* value_words(const gsrq_layer& layer, int element, int stage) {
  const int of_group = layer.values.width;
  return static_cast<const __half*>(layer.values.codewords) +
         static_cast<int64_t>(element / of_group * layer.values.stages + stage) * kCodewords * of_group + element % of_group;
}

// Codewords `from` on into rows of shared memory, asynchronously; of_group: elements from one to the next.
template <int Codes>
__device__ inline void load_words(__half* words, const __half* from, int of_group, int width) {
  const int pitch = width + kPadHalves;
  const int vectors = width / 8, step_codes = kCombineThreads / vectors, step_at = kCombineThreads % vectors;
  for (int code = threadIdx.x / vectors, at = threadIdx.x % vectors; code < Codes;) {
    copy_async(words + code * pitch + at * 8, from + code * of_group + at * 8, true);
    code += step_codes;
    at += step_at;
    if (at >= vectors) at -= vectors, ++code;
  }
  commit_async();
}

// A product bins [Rows][Codes] times words [Codes][width]; a warp has its share of the pieces of 8 dims.
template <int Rows, bool Wide>
struct Product {
  static constexpr int kTiles = Rows / 16, kPieces = (Wide ? 32 : 16) / kWarps;
  float sums[kTiles][kPieces][4] = {};
  int width, first_piece;
  __device__ explicit Product(int width) : width(width), first_piece(threadIdx.x / 32) {}

  // Of `tiles` of 16 rows.
  template <int Codes>
  __device__ void add(const __half* bins, const __half* words, int tiles) {
    const int lane = threadIdx.x % 32, pitch = width + kPadHalves;
    constexpr int kBinPitch = Codes + kPadHalves;
#pragma unroll 2
    for (int k = 0; k < Codes; k += 16) {
      uint32_t b[kPieces / 2][4];  // codewords k .. k + 15 of 8 dims, two pieces, as the product wants them
#pragma unroll
      for (int j = 0; j < kPieces / 2; ++j) {
        const int piece = first_piece + (2 * j + lane / 16) * kWarps;
        load_transposed(b[j], words + (k + lane % 16) * pitch + (piece * 8 < width ? piece * 8 : 0));
      }
#pragma unroll
      for (int i = 0; i < kTiles; ++i) {
        if (i >= tiles) break;
        uint32_t a[4];
        load_matrices(a, bins + (i * 16 + lane % 16) * kBinPitch + k + lane / 16 * 8);
#pragma unroll
        for (int j = 0; j < kPieces; ++j)
          if ((first_piece + j * kWarps) * 8 < width) multiply(sums[i][j], a, b[j / 2][j % 2 * 2], b[j / 2][j % 2 * 2 + 1]);
      }
    }
  }

  __device__ void store(float* to, int rows) const {
    const int g = threadIdx.x % 32 / 4, t = threadIdx.x % 4;
#pragma unroll
    for (int i = 0; i < kTiles; ++i)
#pragma unroll
      for (int j = 0; j < kPieces; ++j)
#pragma unroll
        for (int r = 0; r < 2; ++r) {
          const int at = i * 16 + g + 8 * r, piece = first_piece + j * kWarps;
          if (at < rows && piece * 8 < width)
            __stcg(reinterpret_cast<float2*>(to + at * width + piece * 8 + 2 * t),
                   make_float2(sums[i][j][2 * r] * (1 / kBinScale), sums[i][j][2 * r + 1] * (1 / kBinScale)));
        }
  }
};

// Few rows: one value slot of one head, the bins of up to kFewRows (row, query head) pairs times a quarter of its codewords.
template <int Lanes, bool Wide>
__device__ void combine_few(const gsrq_layer& layer, const gsrq_call& call, const DecodePlan& plan, const Memory& memory,
                            const Stretches& coded, int block) {
  constexpr int kRows = kFewRows, kCodes = kFewCodes, kSplits = kCodewords / kCodes, kBinPitch = kCodes + kPadHalves;
  const int split = block % kSplits, slot = block / kSplits % plan.slots;
  const int vhead = block / kSplits / plan.slots, rows = call.batch, pairs = rows * Lanes, width = plan.width;
  __half* const words = reinterpret_cast<__half*>(shared_memory);  // [kCodes][width + padding]
  __half* const bins_of_pairs = words + kCodes * (width + kPadHalves);  // [kRows][kBinPitch]
  float* const factors = reinterpret_cast<float*>(bins_of_pairs + kRows * kBinPitch);  // [owners of the rows][Lanes]
  float* const of_groups = factors + (kRows / Lanes + coded.owners) * Lanes;  // [threads][Lanes]
  __shared__ Owners<kRows / Lanes> owners;
  const int thread = threadIdx.x, first_code = split * kCodes, of_group = layer.values.width;
  const int element = vhead / plan.parts * layer.head_dim + slot / layer.values.stages * width;
  load_words<kCodes>(words, value_words(layer, element, slot % layer.values.stages) + first_code * of_group, of_group, width);
  find_owners<true>(owners, layer, call, plan, memory, coded, vhead, 0, rows);

  // A thread has all heads of some (row, codeword), and every groups-th owner's of it.
  constexpr int kItems = kRows * kCodes / Lanes / kCombineThreads > 0 ? kRows * kCodes / Lanes / kCombineThreads : 1;
  const SlotBins<Lanes> place(plan, coded);
  const float* const own_bins = memory.bins + place.of(slot);
  const int groups = max(kCombineThreads / (rows * kCodes), 1);
  constexpr int kAhead = kItems == 1 ? 4 : 1;  // owners whose bins a thread reads at once, before it knows their factors
  float totals[kItems][Lanes], ahead[kAhead][Lanes];
#pragma unroll
  for (int j = 0; j < kItems; ++j) {
    const int i = thread + j * kCombineThreads, r = i / kCodes % rows, k = i / (rows * kCodes);
#pragma unroll
    for (int h = 0; h < Lanes; ++h) totals[j][h] = 0;
    const int n = i < groups * rows * kCodes ? owners.count[r] : 0;
    const float* const bins = own_bins + owners.first_bins[r] + (first_code + i % kCodes) * place.code_stride;
    if (k < n) load_lanes<Lanes>(totals[j], bins + k * place.partial);
#pragma unroll
    for (int a = 1; a < kAhead; ++a)
      if (k + a * groups < n) load_lanes<Lanes>(ahead[a], bins + (k + a * groups) * place.partial);
  }
  weigh_owners<kRows, Lanes>(owners, memory.state, pairs, factors,
                             slot == 0 && split == 0 ? memory.combined + static_cast<int64_t>(vhead) * rows * Lanes : nullptr);
  __syncthreads();

  // Bins of all owners, scaled and added in the owners' order.
#pragma unroll
  for (int j = 0; j < kItems; ++j) {
    const int i = thread + j * kCombineThreads, code = i % kCodes, r = i / kCodes % rows, first = i / (rows * kCodes);
    const int n = i < groups * rows * kCodes ? owners.count[r] : 0;
    if (first < n) {
      const float* const factor = factors + owners.first_factor[r] * Lanes;
      const float* const bins = own_bins + owners.first_bins[r] + (first_code + code) * place.code_stride;
#pragma unroll
      for (int h = 0; h < Lanes; ++h) totals[j][h] *= factor[first * Lanes + h];
#pragma unroll
      for (int a = 1; a < kAhead; ++a) {
        const int k = first + a * groups;
        if (k >= n) break;
#pragma unroll
        for (int h = 0; h < Lanes; ++h) totals[j][h] += factor[k * Lanes + h] * ahead[a][h];
      }
#pragma unroll 4
      for (int k = first + kAhead * groups; k < n; k += groups) {
        float v[Lanes];
        load_lanes<Lanes>(v, bins + k * place.partial);
#pragma unroll
        for (int h = 0; h < Lanes; ++h) totals[j][h] += factor[k * Lanes + h] * v[h];
      }
    }
    if (j == 0 && groups > 1) {  // the groups' sums, in their order
#pragma unroll
      for (int h = 0; h < Lanes; ++h) of_groups[i * Lanes + h] = totals[j][h];
      __syncthreads();
      if (i < rows * kCodes)
        for (int k = 1; k < groups; ++k)
#pragma unroll
          for (int h = 0; h < Lanes; ++h) totals[j][h] += of_groups[(i + k * rows * kCodes) * Lanes + h];
    }
    if (i / kCodes < kRows / Lanes) {
#pragma unroll
      for (int h = 0; h < Lanes; ++h)
        bins_of_pairs[(i / kCodes * Lanes + h) * kBinPitch + code] = __float2half_rn(i < rows * kCodes ? totals[j][h] : 0.0f);
    }
  }
  wait_async<0>();
  __syncthreads();
  Product<kRows, Wide> product(width);
  product.template add<kCodes>(bins_of_pairs, words, 1);
  float* const to =
      memory.values + ((static_cast<int64_t>(vhead) * plan.slots + slot) * kSplits + split) * rows * Lanes * width;
  product.store(to, pairs);
}

// Many rows: up to `together` value slots of one head and sub-vector, which are summed, for up to kManyRows (row, query head)
// pairs. A step is half of a slot's codewords; what the next one needs comes while one is multiplied.
template <int Lanes, bool Wide>
__device__ void combine_many(const gsrq_layer& layer, const gsrq_call& call, const DecodePlan& plan, const Memory& memory,
                             const Stretches& coded, int together, int block) {
  constexpr int kRows = kManyRows, kCodes = kManyCodes, kHalves = kCodewords / kCodes, kBinPitch = kCodes + kPadHalves;
  constexpr int kRowsAtOnce = kRows / Lanes;
  const int stages = layer.values.stages, parts = (stages + together - 1) / together, all_parts = plan.slots / stages * parts;
  const int part = block % all_parts, vhead = block / all_parts % coded.vheads;
  const int first_row = block / (all_parts * coded.vheads) * kRowsAtOnce, rows = min(kRowsAtOnce, call.batch - first_row);
  const int pairs = rows * Lanes, tiles = (pairs + 15) / 16, width = plan.width, thread = threadIdx.x;
  const int sub_vector = part / parts, first_stage = part % parts * together;
  const int steps = min(together, stages - first_stage) * kHalves;
  const int words_of_step = kCodes * (width + kPadHalves);
  __half* const words = reinterpret_cast<__half*>(shared_memory);  // [2][kCodes][width + padding]
  __half* const bins_of_pairs = words + 2 * words_of_step;         // [2][kRows][kBinPitch]
  float* const factors = reinterpret_cast<float*>(bins_of_pairs + 2 * kRows * kBinPitch);  // [owners of the rows][Lanes]
  __shared__ Owners<kRowsAtOnce> owners;
  const int element = vhead / plan.parts * layer.head_dim + sub_vector * width, of_group = layer.values.width;
  // Blocks of other heads and rows begin with other steps, so that not all read the same part of their bins at a time.
  const int first_step = block / all_parts % steps;
  const auto turned = [&](int i) { return i + first_step < steps ? i + first_step : i + first_step - steps; };
  const auto load_step = [&](int i) {
    const int step = turned(i);
    const __half* const from = value_words(layer, element, first_stage + step / kHalves) + step % kHalves * kCodes * of_group;
    load_words<kCodes>(words + i % 2 * words_of_step, from, of_group, width);
  };
  load_step(0);
  find_owners<false>(owners, layer, call, plan, memory, coded, vhead, first_row, rows);

  // A thread has all heads of two neighbouring codewords of some rows. Of the first owners bins are read a step ahead; many
  // rows seldom have more.
  constexpr int kItems = kRows * kCodes / Lanes / kCombineThreads / 2;
  static_assert(kItems > 0 && kCombineThreads % (kCodes / 2) == 0, "all threads have as many");
  constexpr int kRowsBetween = kCombineThreads / (kCodes / 2);
  const int thread_code = thread % (kCodes / 2) * 2, thread_row = thread / (kCodes / 2);
  const SlotBins<Lanes> place(plan, coded);
  const auto bins_of = [&](int i, int r) {
    const int step = turned(i), slot = sub_vector * stages + first_stage + step / kHalves;
    return memory.bins + owners.first_bins[r] + place.of(slot) + (step % kHalves * kCodes + thread_code) * place.code_stride;
  };
  float ahead[kItems][2][Lanes];
  const auto load_first = [&](int step) {
#pragma unroll
    for (int j = 0; j < kItems; ++j) {
      const int r = thread_row + j * kRowsBetween;
#pragma unroll
      for (int c = 0; c < 2; ++c) {
#pragma unroll
        for (int h = 0; h < Lanes; ++h) ahead[j][c][h] = 0;
        if (r < rows && owners.count[r] > 0) load_lanes<Lanes>(ahead[j][c], bins_of(step, r) + c * place.code_stride);
      }
    }
  };
  load_first(0);
  weigh_owners<kRows, Lanes>(
      owners, memory.state, pairs, factors,
      part == 0 ? memory.combined + (static_cast<int64_t>(vhead) * call.batch + first_row) * Lanes : nullptr);
  __syncthreads();

  Product<kRows, Wide> product(width);
#pragma unroll 1
  for (int step = 0; step < steps; ++step) {
    __half* const own_bins = bins_of_pairs + step % 2 * kRows * kBinPitch;
    // Bins of all owners, scaled and added in the owners' order.
#pragma unroll
    for (int j = 0; j < kItems; ++j) {
      const int r = thread_row + j * kRowsBetween, n = r < rows ? owners.count[r] : 0;
      const float* const factor = factors + (r < rows ? owners.first_factor[r] * Lanes : 0);
      float total[2][Lanes];
#pragma unroll
      for (int c = 0; c < 2; ++c)
#pragma unroll
        for (int h = 0; h < Lanes; ++h) total[c][h] = n > 0 ? ahead[j][c][h] * factor[h] : 0.0f;
#pragma unroll 1
      for (int k = 1; k < n; ++k)
#pragma unroll
        for (int c = 0; c < 2; ++c) {
          float v[Lanes];
          load_lanes<Lanes>(v, bins_of(step, r) + c * place.code_stride + k * place.partial);
#pragma unroll
          for (int h = 0; h < Lanes; ++h) total[c][h] += factor[k * Lanes + h] * v[h];
        }
#pragma unroll
      for (int h = 0; h < Lanes; ++h)
        *reinterpret_cast<uint32_t*>(own_bins + (r * Lanes + h) * kBinPitch + thread_code) = packed(total[0][h], total[1][h]);
    }
    wait_async<0>();
    __syncthreads();
    if (step + 1 < steps) {
      load_step(step + 1);
      load_first(step + 1);
    }
    product.template add<kCodes>(own_bins, words + step % 2 * words_of_step, tiles);
  }
  float* const to =
      memory.values +
      ((static_cast<int64_t>(vhead) * all_parts + part) * call.batch + first_row) * Lanes * width;
  product.store(to, pairs);
}

// together: value slots of a block, 0 where rows are few.
template <bool Few, int Lanes, bool Wide>
__global__ void __launch_bounds__(kCombineThreads, !Few ? 2 : Lanes == 4 && !Wide ? 4 : 3)
    combine_kernel(const __grid_constant__ gsrq_layer layer, const __grid_constant__ gsrq_call call,
                   const __grid_constant__ DecodePlan plan, Memory memory, const __grid_constant__ Stretches coded,
                   int exact_blocks, int splits, bool by_rows, int together) {
  const int block = blockIdx.x;
  let_next_begin();
  if (block < exact_blocks) {
    if (Lanes != 4 || !by_rows) attend_exact<Lanes>(layer, call, plan, memory, coded.vheads, splits, block);
    else if (call.dtype == GSRQ_F16) attend_exact_rows<true>(layer, call, plan, memory, coded.vheads, splits, block);
    else attend_exact_rows<false>(layer, call, plan, memory, coded.vheads, splits, block);
  } else if constexpr (Few) {
    combine_few<Lanes, Wide>(layer, call, plan, memory, coded, block - exact_blocks);
  } else {
    combine_many<Lanes, Wide>(layer, call, plan, memory, coded, together, block - exact_blocks);
  }
  // Blocks of exact tokens end without waiting, so that all of them run beside the launch before: those of values, of which
  // there are some wherever this launch is early, wait for it.
}

constexpr int kFinishThreads = 128;

__device__ inline void add_scaled(float4& sum, float4 x, float by) {
  sum = make_float4(sum.x + x.x * by, sum.y + x.y * by, sum.z + x.z * by, sum.w + x.w * by);
}

// Four elements, where `to` may hold such at once.
__device__ inline void store_four(void* to, int64_t i, float4 x, int dtype, bool aligned) {
  if (aligned && dtype != GSRQ_F32) {
    uint2 words;
    if (dtype == GSRQ_F16) {
      words = make_uint2(packed(x.x, x.y), packed(x.z, x.w));
    } else {
      const __nv_bfloat162 low = __floats2bfloat162_rn(x.x, x.y), high = __floats2bfloat162_rn(x.z, x.w);
      words = make_uint2(*reinterpret_cast<const uint32_t*>(&low), *reinterpret_cast<const uint32_t*>(&high));
    }
    *reinterpret_cast<uint2*>(static_cast<uint16_t*>(to) + i) = words;
  } else {
    store(to, i, x.x, dtype);
    store(to, i + 1, x.y, dtype);
    store(to, i + 2, x.z, dtype);
    store(to, i + 3, x.w, dtype);
  }
}

// The sum of the coded and exact parts of one (row, vhead); a thread has four dims of a head. Usual: heads and value sub-vectors
// of 128. Parts: of the coded part, that are read at once; Groups: threads that share those of the same dims.
template <bool Usual, int Parts, int Groups>
__global__ void __launch_bounds__(kFinishThreads)
    finish(const __grid_constant__ gsrq_layer layer, const __grid_constant__ gsrq_call call,
           const __grid_constant__ DecodePlan plan, Memory memory, int has_coded, int splits, int parts_of_sub_vector) {
  let_next_begin();  // the next call's first launch waits at once: its start is out of the way
  const int vhead = blockIdx.x, vheads = gridDim.x, row = blockIdx.y, kv_head = vhead / plan.parts, part = vhead % plan.parts;
  const int d = Usual ? 128 : layer.head_dim, width = Usual ? 128 : plan.width;
  const int heads = min(plan.part_heads, plan.group - part * plan.part_heads);
  const int64_t first_head = static_cast<int64_t>(row) * layer.heads + kv_head * plan.group + part * plan.part_heads;
  const bool live = call.new_lengths[row] > 0, aligned = reinterpret_cast<uintptr_t>(call.output) % 16 == 0;
  const int used = live ? (ExactTokens(layer, call, row).count + kExactTokens - 1) / kExactTokens : 0;
  const int64_t first = (static_cast<int64_t>(row) * vheads + vhead) * splits;
  const int64_t slot_stride = static_cast<int64_t>(call.batch) * plan.lanes * width;
  constexpr int kItems = kFinishThreads / Groups;
  const int group = threadIdx.x / kItems;
  __shared__ float4 of_groups[Groups > 1 ? kFinishThreads : 1];
  wait_for_previous();
#pragma unroll 1
  for (int i = blockIdx.z * kItems + threadIdx.x % kItems; i < heads * (d / 4); i += gridDim.z * kItems) {
    const int h = i / (d / 4), e = i % (d / 4) * 4;
    float4 value = make_float4(0, 0, 0, 0);
    if (live) {
      float2 coded = make_float2(kNone, 0);
      if (has_coded) coded = memory.combined[(static_cast<int64_t>(vhead) * call.batch + row) * plan.lanes + h];
      const float2* const states = memory.exact_state + first * plan.lanes + h;
      const float4* const exact = reinterpret_cast<const float4*>(memory.exact + (first * plan.lanes + h) * d + e);
      const float4* const from = reinterpret_cast<const float4*>(
          memory.values + (static_cast<int64_t>(vhead) * (d / width) + e / width) * parts_of_sub_vector * slot_stride +
          (static_cast<int64_t>(row) * plan.lanes + h) * width + e % width);
      // All reads are under way before the first is used; zeros and no weight where there is nothing.
      constexpr int kExact = 6;
      const int64_t exact_stride = plan.lanes * (d / 4);
      float2 state[kExact];
      float4 piece[Parts], x[kExact];
      const int parts = has_coded ? parts_of_sub_vector : 0;
#pragma unroll
      for (int k = 0; k < kExact; ++k) state[k] = k < used ? __ldcg(states + k * plan.lanes) : make_float2(kNone, 0);
#pragma unroll
      for (int k = 0; k < kExact; ++k) x[k] = k < used ? __ldcg(exact + k * exact_stride) : value;
#pragma unroll
      for (int r = 0; r < Parts; ++r)
        piece[r] = group + r * Groups < parts ? __ldcg(from + (group + r * Groups) * (slot_stride / 4)) : value;
      float4 all = value;
#pragma unroll
      for (int r = 0; r < Parts; ++r) add_scaled(all, piece[r], 1.0f);
#pragma unroll 4
      for (int r = group + Parts * Groups; r < parts; r += Groups) add_scaled(all, __ldcg(from + r * (slot_stride / 4)), 1.0f);
      if constexpr (Groups > 1) {  // the groups' sums, in their order
        of_groups[threadIdx.x] = all;
        __syncthreads();
        if (group > 0) return;
        for (int k = 1; k < Groups; ++k) add_scaled(all, of_groups[k * kItems + threadIdx.x], 1.0f);
      }
      float most = coded.y > 0 ? coded.x : kNone, sum = 0;
#pragma unroll
      for (int k = 0; k < kExact; ++k) most = fmaxf(most, state[k].x);
#pragma unroll 1
      for (int k = kExact; k < used; ++k) most = fmaxf(most, states[k * plan.lanes].x);
      if (coded.y > 0) {
        sum = coded.y * exp2f(coded.x - most);
        add_scaled(value, all, sum);
      }
#pragma unroll
      for (int k = 0; k < kExact; ++k) {
        const float factor = state[k].x == kNone ? 0.0f : exp2f(state[k].x - most);
        sum += state[k].y * factor;
        add_scaled(value, x[k], factor);
      }
#pragma unroll 1
      for (int k = kExact; k < used; ++k) {
        const float2 later = states[k * plan.lanes];
        const float factor = later.x == kNone ? 0.0f : exp2f(later.x - most);
        sum += later.y * factor;
        add_scaled(value, __ldcg(exact + k * exact_stride), factor);
      }
      const float inverse = 1 / sum;
      value = make_float4(value.x * inverse, value.y * inverse, value.z * inverse, value.w * inverse);
    }
    store_four(call.output, (first_head + h) * d + e, value, call.dtype, aligned);
  }
}

using CombineKernel = void (*)(gsrq_layer, gsrq_call, DecodePlan, Memory, Stretches, int, int, bool, int);

bool is_wide(const DecodePlan& plan) { return plan.width > 128; }

template <int Lanes, bool Wide>
CombineKernel combine_of(bool few) {
  return few ? combine_kernel<true, Lanes, Wide> : combine_kernel<false, Lanes, Wide>;
}

template <int Lanes>
CombineKernel combine_of(const DecodePlan& plan, bool few) {
  return is_wide(plan) ? combine_of<Lanes, true>(few) : combine_of<Lanes, false>(few);
}

CombineKernel combine_of(const DecodePlan& plan, bool few) {
  return plan.lanes == 1   ? combine_of<1>(plan, few)
         : plan.lanes == 4 ? combine_of<4>(plan, few)
                           : combine_of<8>(plan, few);
}

int combine_bytes(const DecodePlan& plan, bool few, int owners, bool with_exact, bool by_rows) {
  const int rows = few ? kFewRows : kManyRows, codes = few ? kFewCodes : kManyCodes, buffers = few ? 1 : 2;
  const int values = 2 * buffers * (codes * (plan.width + kPadHalves) + rows * (codes + kPadHalves)) +
                     4 * plan.lanes * (rows / plan.lanes + owners + (few ? kCombineThreads : 0));
  return std::max(values, !with_exact ? 0 : by_rows ? kExactRowsBytes : exact_bytes(plan.head_dim));
}

bool few_rows(const gsrq_call& call, const DecodePlan& plan) { return call.batch * plan.lanes <= kFewRows; }

// Blocks that all rows of one part of the values take.
int64_t row_blocks(const gsrq_call& call, const DecodePlan& plan, int vheads) {
  const int at_once = kManyRows / plan.lanes;
  return static_cast<int64_t>(vheads) * (few_rows(call, plan) ? 1 : (call.batch + at_once - 1) / at_once);
}

// Value slots of a block, 0 where rows are few.
int slots_together(const gsrq_layer& layer, const gsrq_call& call, const DecodePlan& plan, int vheads) {
  if (few_rows(call, plan)) return 0;
  int together = 1;
  while (2 * together <= layer.values.stages && row_blocks(call, plan, vheads) * plan.slots / together > kManyBlocks)
    together *= 2;
  return together;
}

int parts_of(const gsrq_layer& layer, int together) {
  const int stages = layer.values.stages;
  return together == 0 ? stages * (kCodewords / kFewCodes) : (stages + together - 1) / together;
}

}  // namespace

int exact_splits(const gsrq_layer& layer) {
  return static_cast<int>((gsrq_exact_slots(layer.sinks, layer.window, layer.block) + kExactTokens - 1) / kExactTokens);
}

int value_parts(const gsrq_layer& layer, const gsrq_call& call, const DecodePlan& plan, int vheads) {
  return parts_of(layer, slots_together(layer, call, plan, vheads));
}

int combine(const gsrq_layer& layer, const gsrq_call& call, const DecodePlan& plan, const Memory& memory,
            const Stretches& coded, bool with_exact, cudaStream_t stream) {
  const int together = slots_together(layer, call, plan, coded.vheads);
  const bool few = together == 0;
  const int splits = exact_splits(layer), parts = parts_of(layer, together);
  const int64_t value_blocks =
      coded.any ? row_blocks(call, plan, coded.vheads) * parts * (plan.slots / layer.values.stages) : 0;
  // Exact tokens first: they may begin while coded ones are under way.
  const bool by_rows = plan.lanes == 4 && exact_by_rows(layer, call, coded.vheads);
  const int64_t exact_blocks =
      with_exact ? static_cast<int64_t>(splits) * coded.vheads * call.batch / (by_rows ? kCombineThreads / 32 : 1) : 0;
  const int64_t blocks = exact_blocks + value_blocks;
  if (call.batch > 65535 || blocks > INT32_MAX) return fail("decode: %d rows are too many", call.batch);
  const CombineKernel kernel = combine_of(plan, few);
  const int bytes = combine_bytes(plan, few, coded.owners, with_exact, by_rows);
  if (cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes) != cudaSuccess)
    return launched("combine");
  if (blocks > 0)
    launch(coded.any, kernel, static_cast<unsigned>(blocks), kCombineThreads, bytes, stream, layer, call, plan, memory, coded,
           static_cast<int>(exact_blocks), splits, by_rows, together);
  if (launched("combine")) return 1;
  const bool usual = plan.head_dim == 128 && plan.width == 128;
  // Many parts are shared by groups, where all threads have an item: those have no loop.
  constexpr int kGroups = 4, kItems = kFinishThreads / kGroups;
  const int items = plan.part_heads * (plan.head_dim / 4);
  const bool shared = parts > 32 && plan.group % plan.part_heads == 0 && items % kItems == 0;
  const auto kernel_of_sum = shared      ? (usual ? finish<true, 16, kGroups> : finish<false, 16, kGroups>)
                             : parts > 8 ? (usual ? finish<true, 32, 1> : finish<false, 32, 1>)
                                         : (usual ? finish<true, 8, 1> : finish<false, 8, 1>);
  const dim3 blocks_of_heads(static_cast<unsigned>(coded.vheads), static_cast<unsigned>(call.batch),
                             static_cast<unsigned>(shared ? items / kItems : 1));
  launch(true, kernel_of_sum, blocks_of_heads, kFinishThreads, 0, stream, layer, call, plan, memory,
         static_cast<int>(coded.any), splits, parts);
  return launched("finish");
}

}  // namespace gsrq::cuda::decoding
