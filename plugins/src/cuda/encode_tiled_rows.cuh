// Where the vectors of encode_tiled.cu come from: from the call's tokens or a matrix, by way of shared memory, into registers.
#pragma once

#include "encode_choice.cuh"
#include "mma.cuh"

namespace gsrq::cuda::tiled {

constexpr int kWarpRows = 16;
constexpr unsigned kAll = 0xffffffffu;

template <int Steps>
struct Form {  // Steps: of 16 elements
  static constexpr bool kWide = Steps > 8;  // more than a warp keeps of 16 rows
  static constexpr int kShares = kWide ? 2 : 1;  // so many warps share 16 rows: each has its share of elements and codewords
  static constexpr int kPadded = 16 * Steps, kCores = 2 * Steps / kShares;
  static constexpr int kChunkBytes = kTiledWords * kPadded * 2, kStageBytes = 256 * kPadded * 2;
  static constexpr int kStride = kPadded + 8;  // of staged vectors: four rows' pairs of elements in different banks
  static constexpr int kRounds = (kPadded + 127) / 128;  // in which a warp stages them, four elements a lane
  static_assert(Steps % (2 * kShares) == 0, "a lane's eight elements of two steps lie together");
};

template <int Steps>
using Residual = float[2][Form<Steps>::kCores][2];

// Where the warps that share 16 rows meet.
template <int Steps>
__device__ inline void meet(int tile) {
  if constexpr (Form<Steps>::kShares == 1) __syncwarp();
  else asm volatile("bar.sync %0, %1;" ::"r"(1 + tile), "n"(32 * Form<Steps>::kShares) : "memory");
}

// Of two warps that share rows, the sum of what both have. own, others: where; written by the lanes that tell.
template <int Steps, class T>
__device__ inline T sum_of_both(T mine, T* own, const T* others, bool tell, int tile) {
  if (tell) *own = mine;
  meet<Steps>(tile);
  mine += *others;
  meet<Steps>(tile);
  return mine;
}

// Where a row's vector and codes are.
struct Vector {
  Origin origin;
  int8_t* codes;
};

// How a group's vectors can be read: several elements at once, or one by one.
enum class Loads { kAny, kPlain, kFramed };

struct Side {
  EncodeBook book;
  EncodeSource source;
  int64_t batch, most;  // rows of the source: batch * most, of which some may not be
  unsigned tiles;       // blocks a group
  Loads loads;
};

inline Loads loads_of(const gsrq_layer& layer, const gsrq_call& call, const EncodeSource& source, int width) {
  if (layer.head_dim % 4 != 0 || width % 4 != 0) return Loads::kAny;
  if (source.vectors != nullptr) return aligned(source.vectors) ? Loads::kPlain : Loads::kAny;
  const bool values = aligned(call.value) && aligned(call.value_exact), keys = aligned(call.key) && aligned(call.key_exact);
  if (!(source.values ? values : keys)) return Loads::kAny;
  if (source.values || layer.key_center == nullptr) return Loads::kPlain;
  const bool whole = width % layer.head_dim == 0 && layer.half_rope % 2 == 0 && aligned(layer.cos) && aligned(layer.sin);
  return whole ? Loads::kFramed : Loads::kAny;
}

// Row `flat` of batch rows of `most` each, or no row.
__device__ inline Vector vector_of(const gsrq_layer& layer, const gsrq_call& call, const EncodeBook& book,
                                   const EncodeSource& source, int64_t batch, int64_t most, int64_t flat, int64_t g) {
  const int64_t b = batch == 1 ? 0 : flat / most, i = batch == 1 ? flat : flat % most;
  int64_t start;
  if (b >= batch || i >= source.rows(layer, call, b, &start)) return {};
  return {source.origin(layer, call, b, start + i), source.target(layer, book.book, call, b, start + i, g)};
}

// Neighbouring elements as they lie in memory, two or four of 2 or 4 bytes. In an order of their own, so that many are under
// way at once.
__device__ inline void load_raw(uint32_t (&to)[2], const void* from, int wide) {
  asm volatile("{\n\t.reg .pred wide;\n\tsetp.ne.s32 wide, %3, 0;\n\t"
               "@wide ld.global.nc.v2.b32 {%0, %1}, [%2];\n\t@!wide ld.global.nc.b32 %0, [%2];\n\t}"
               : "=r"(to[0]), "=r"(to[1])
               : "l"(from), "r"(wide));
}

__device__ inline void load_raw(uint32_t (&to)[4], const void* from, int wide) {
  asm volatile("{\n\t.reg .pred wide;\n\tsetp.ne.s32 wide, %5, 0;\n\t"
               "@wide ld.global.nc.v4.b32 {%0, %1, %2, %3}, [%4];\n\t@!wide ld.global.nc.v2.b32 {%0, %1}, [%4];\n\t}"
               : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3])
               : "l"(from), "r"(wide));
}

__device__ inline void load_raw(uint32_t (&to)[2], const float* from) {
  asm volatile("ld.global.nc.v2.b32 {%0, %1}, [%2];" : "=r"(to[0]), "=r"(to[1]) : "l"(from));
}

// What the cache stores of them; zeros where there is no row.
template <int Count>
__device__ inline void elements_of(float (&to)[Count], const uint32_t (&raw)[Count], const Origin& origin) {
#pragma unroll
  for (int i = 0; i < Count; i += 2) {
    float2 two;
    if (origin.dtype == GSRQ_F32) two = make_float2(__uint_as_float(raw[i]), __uint_as_float(raw[i + 1]));
    else if (origin.dtype == GSRQ_BF16)
      two = make_float2(__uint_as_float(raw[i / 2] << 16), __uint_as_float(raw[i / 2] & 0xffff0000));
    else two = __half22float2(*reinterpret_cast<const __half2*>(&raw[i / 2]));
    if (origin.round_to >= 0) two = make_float2(rounded(two.x, origin.round_to), rounded(two.y, origin.round_to));
    to[i] = origin.from == nullptr ? 0 : two.x;
    to[i + 1] = origin.from == nullptr ? 0 : two.y;
  }
}

// Eight rows of a warp as the source has them, four elements a lane. other: any aligned address.
template <int Steps>
__device__ inline void stage_plain(const gsrq_layer& layer, int width, int64_t first, const Vector* vectors, const void* other,
                                   float* staged) {
#pragma unroll 1
  for (int at = 4 * (threadIdx.x % 32), round = 0; round < Form<Steps>::kRounds && at < width; at += 128, ++round) {
    const int d = layer.head_dim, element = static_cast<int>(first) + at;
    uint32_t raw[8][4];
#pragma unroll
    for (int r = 0; r < 8; ++r) {
      const char* from = vectors[r].origin.from;
      const int wide = vectors[r].origin.dtype == GSRQ_F32;
      const int64_t offset = static_cast<int64_t>(element / d) * vectors[r].origin.head_stride + element % d;
      load_raw(raw[r], from == nullptr ? other : from + (offset << (1 + wide)), wide);
    }
#pragma unroll
    for (int r = 0; r < 8; ++r) {
      float x[4];
      elements_of(x, raw[r], vectors[r].origin);
      *reinterpret_cast<float4*>(staged + r * Form<Steps>::kStride + at) = make_float4(x[0], x[1], x[2], x[3]);
    }
  }
}

// The same less the heads' centers and turned to their positions, two pairs a lane: groups of whole heads. As
// EncodeSource::framed.
template <int Steps>
__device__ inline void stage_framed(const gsrq_layer& layer, int width, int64_t first, const Vector* vectors,
                                    const float* other, float* staged) {
  const int d = layer.head_dim, half = layer.half_rope;
#pragma unroll 1
  for (int at = 4 * (threadIdx.x % 32), round = 0; round < Form<Steps>::kRounds && at < width; at += 128, ++round) {
    const int head = at / 2 / (d / 2), pair = at / 2 % (d / 2), real_head = static_cast<int>(first) / d + head;
    const bool turned = pair < half, apart = turned && !layer.rope_interleaved;  // apart: firsts and seconds lie together
    const int one = apart ? pair : 2 * pair, two = apart ? pair + half : 2 * pair + 2;
    const float* center = layer.key_center + real_head * d;
    const double at_one[2] = {center[one], center[one + 1]}, at_two[2] = {center[two], center[two + 1]};
    uint32_t raw_one[8][2], raw_two[8][2], raw_cos[8][2], raw_sin[8][2];
#pragma unroll
    for (int r = 0; r < 8; ++r) {
      const char* from = vectors[r].origin.from;
      const int wide = vectors[r].origin.dtype == GSRQ_F32;
      const int64_t from_head = static_cast<int64_t>(real_head) * vectors[r].origin.head_stride;
      load_raw(raw_one[r], from == nullptr ? other : static_cast<const void*>(from + ((from_head + one) << (1 + wide))), wide);
      load_raw(raw_two[r], from == nullptr ? other : static_cast<const void*>(from + ((from_head + two) << (1 + wide))), wide);
      const bool angle = turned && from != nullptr;
      const int64_t angle_at = static_cast<int64_t>(vectors[r].origin.token) * half + pair;
      load_raw(raw_cos[r], angle ? layer.cos + angle_at : other);
      load_raw(raw_sin[r], angle ? layer.sin + angle_at : other);
    }
#pragma unroll
    for (int r = 0; r < 8; ++r) {
      float a[2], b[2], out_a[2], out_b[2];
      elements_of(a, raw_one[r], vectors[r].origin);
      elements_of(b, raw_two[r], vectors[r].origin);
      const double da[2] = {a[0] - at_one[0], a[1] - at_one[1]}, db[2] = {b[0] - at_two[0], b[1] - at_two[1]};
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const double x = apart ? da[i] : i == 0 ? da[0] : db[0], y = apart ? db[i] : i == 0 ? da[1] : db[1];
        const double c = __uint_as_float(raw_cos[r][i]), s = __uint_as_float(raw_sin[r][i]);
        const float front = static_cast<float>(turned ? x * c - y * s : x);
        const float back = static_cast<float>(turned ? y * c + x * s : y);
        if (apart) out_a[i] = front, out_b[i] = back;
        else if (i == 0) out_a[0] = front, out_a[1] = back;
        else out_b[0] = front, out_b[1] = back;
      }
      const bool real = vectors[r].origin.from != nullptr;
      float* to = staged + r * Form<Steps>::kStride + head * d;
      *reinterpret_cast<float2*>(to + one) = real ? make_float2(out_a[0], out_a[1]) : float2{};
      *reinterpret_cast<float2*>(to + two) = real ? make_float2(out_b[0], out_b[1]) : float2{};
    }
  }
}

// Element by element, for heads and groups of any size.
template <int Steps>
__device__ __noinline__ void stage_any(const gsrq_layer& layer, const EncodeSource& source, int width, int64_t first,
                                       const Vector* vectors, float* staged) {
#pragma unroll 1
  for (int r = 0; r < 8; ++r) {
    const Origin origin = vectors[r].origin;
#pragma unroll 1
    for (int e = threadIdx.x % 32; e < width; e += 32)
      staged[r * Form<Steps>::kStride + e] = origin.from == nullptr ? 0.0f : source.element(layer, origin, first + e);
  }
}

// The transformed vectors of a warp, as far as they are its share, and this lane's part of their squares. The rows are the
// tile-th 16 of the block. staged: float[8][kStride] of the tile, or Together: float[16][kStride], which takes half of the
// code. A block that comes to its rows once spends more on reading that than on running it.
template <int Steps, bool Together>
__device__ inline void load_rows(const gsrq_layer& layer, const Side& side, int64_t g, const Vector* vectors, float* staged,
                                 int tile, int share, Residual<Steps>& r, float (&squares)[2]) {
  using F = Form<Steps>;
  static_assert(Together || F::kShares == 1, "warps that share rows stage them together");
  constexpr int kMine = Together ? kWarpRows / F::kShares : 8;  // rows that a warp stages
  const EncodeBook& book = side.book;
  const int lane = threadIdx.x % 32, quad = lane / 4, q = lane % 4, width = book.book.width;
  const bool diagonal = book.diagonal[g] != 0;
  const float* transform = book.book.transform + g * width * width;
  const double* turned = book.turned + g * width * width;
  const int64_t first = g * width;
  float* own = staged + share * (kMine * F::kStride);
  for (int i = lane; width < F::kPadded && i < kMine * F::kStride; i += 32) own[i] = 0;
  float scale[F::kCores][2];  // of this lane's elements, where the transform is diagonal
  const int mine_from = 8 * share * F::kCores + 2 * q;
#pragma unroll
  for (int h = 0; h < 2; ++h) {
    if (!Together || h == 0) {
      __syncwarp();
#pragma unroll 1
      for (int i = 0; i < kMine; i += 8) {
        const int at = (Together ? share * kMine : 8 * h) + i;
        const Vector* rows = vectors + at;
        float* to = own + i * F::kStride;
        if (side.loads == Loads::kPlain) stage_plain<Steps>(layer, width, first, rows, book.half_norms, to);
        else if (side.loads == Loads::kFramed) stage_framed<Steps>(layer, width, first, rows, book.half_norms, to);
        else stage_any<Steps>(layer, side.source, width, first, rows, to);
      }
      meet<Steps>(tile);
    }
    const float* mine = staged + ((Together ? 8 * h : 0) + quad) * F::kStride;
    if (diagonal && (!Together || h == 0)) {
      const float* from = transform + static_cast<int64_t>(mine_from) * (width + 1);
#pragma unroll
      for (int n = 0; n < F::kCores; ++n)
#pragma unroll
        for (int b = 0; b < 2; ++b) scale[n][b] = mine_from + 8 * n + b < width ? from[(8 * n + b) * (width + 1)] : 0.0f;
    }
    if (diagonal) {  // a product of two float32 rounded once: float64 would give the same
#pragma unroll
      for (int n = 0; n < F::kCores; ++n) {
        const float2 x = *reinterpret_cast<const float2*>(mine + mine_from + 8 * n);
        r[h][n][0] = scale[n][0] * x.x, r[h][n][1] = scale[n][1] * x.y;
      }
    } else {
      constexpr int kAtOnce = F::kCores < 16 ? F::kCores : 16;
#pragma unroll
      for (int from = 0; from < F::kCores; from += kAtOnce) {
        double sum[kAtOnce][2] = {};
        for (int k = 0; k < width; k += 4) {
          const int j = k + q;
          const double x = mine[j];
#pragma unroll
          for (int n = 0; n < kAtOnce; ++n) {
            const int e = 8 * (share * F::kCores + from + n) + quad;
            multiply(sum[n], x, j < width && e < width ? turned[static_cast<int64_t>(j) * width + e] : 0.0);
          }
        }
#pragma unroll
        for (int n = 0; n < kAtOnce; ++n)
#pragma unroll
          for (int b = 0; b < 2; ++b) r[h][from + n][b] = static_cast<float>(sum[n][b]);
      }
    }
    squares[h] = 0;
#pragma unroll
    for (int n = 0; n < F::kCores; ++n) squares[h] += r[h][n][0] * r[h][n][0] + r[h][n][1] * r[h][n][1];
  }
}

}  // namespace gsrq::cuda::tiled
