// Greedy encoding of any width: a tile's memory, its rows' residuals, the decisions that the tensor cores leave open.
#pragma once

#include "encode_choice.cuh"
#include "mma.cuh"

namespace gsrq::cuda {

constexpr int kWords = 128;  // codewords of a tile
constexpr int kDepth = 64;   // their elements of a tile
constexpr int kTileStride = kDepth + 8;
constexpr int kRing = 3;     // tiles in shared memory
constexpr int kLanesOfRow = 8;
constexpr int kFetched = 4;  // of a codeword, pieces of 32 elements that are fetched ahead

// The best two candidates, best first, and the value of the third.
struct Best {
  float first, second, third;
  int code, other;
};

__device__ inline void merge(Best& a, Best o) {
  if (o.first > a.first) {
    const Best swap = a;
    a = o, o = swap;
  }
  if (o.first > a.second) {
    a.third = fmaxf(a.second, o.second);
    a.second = o.first, a.other = o.code;
  } else {
    a.third = fmaxf(a.third, o.first);
  }
}

// What is known of a row's residual r, kept in float32: the products see high = float16(r / scale).
struct Row {
  float scale;   // a power of two, at least the norm of r
  float norm;    // of high, at most
  float off;     // ||r / scale - high||, at most
  float error;   // ||r - true residual||, at most
};

// A warp multiplies Tiles * 16 rows with 1 / WordWarps of a tile's codewords, and chooses the codes of 4 rows at once.
template <int Tiles, int RowWarps, int WordWarps>
struct Shape {
  static constexpr int kRows = 16 * Tiles * RowWarps, kWarps = RowWarps * WordWarps, kThreads = 32 * kWarps;
  static constexpr int kNear = kWords / WordWarps / 8;  // 8-codeword tiles of a warp
  static constexpr int kTurns = (kRows + 4 * kWarps - 1) / (4 * kWarps);
  static_assert(kNear % 2 == 0 && 4 * kNear <= 32, "pairs of tiles; an id of a thread's candidates takes five bits");
};

struct Layout {
  int rows, word_warps, padded;
  __host__ __device__ int high_stride() const { return padded + 8; }
  __host__ __device__ int residual_stride() const { return padded + 4; }
  __host__ __device__ size_t residual_at() const { return sizeof(__half) * rows * high_stride(); }
  __host__ __device__ size_t ring_at() const { return residual_at() + sizeof(float) * rows * residual_stride(); }
  __host__ __device__ size_t norms_at() const { return ring_at() + sizeof(__half) * kRing * kWords * kTileStride; }
  __host__ __device__ size_t best_at() const { return norms_at() + sizeof(float) * 4 * kWords; }
  __host__ __device__ size_t row_at() const { return best_at() + sizeof(float4) * rows * word_warps; }
  __host__ __device__ size_t bytes() const { return row_at() + sizeof(Row) * rows; }
};

__device__ inline float row_sum(float x) {
  for (int offset = kLanesOfRow / 2; offset > 0; offset /= 2) x += __shfl_xor_sync(0xffffffffu, x, offset);
  return x;
}

// Four elements of a codeword as stored, and in units of its stage's scale.
struct Halves {
  uint2 high, low;
};

__device__ inline Halves word_halves(const EncodeBook& book, int64_t word, int at) {
  return {*reinterpret_cast<const uint2*>(book.high + word * book.padded + at),
          *reinterpret_cast<const uint2*>(book.low + word * book.padded + at)};
}

__device__ inline float4 whole(const Halves& halves) {
  const uint2 high = halves.high, low = halves.low;
  const auto two = [](uint32_t a, uint32_t b) {
    const float2 x = __half22float2(*reinterpret_cast<const __half2*>(&a));
    const float2 y = __half22float2(*reinterpret_cast<const __half2*>(&b));
    return make_float2(x.x + y.x, x.y + y.y);
  };
  const float2 front = two(high.x, low.x), back = two(high.y, low.y);
  return make_float4(front.x, front.y, back.x, back.y);
}

__device__ inline float4 word_elements(const EncodeBook& book, int64_t word, int at) { return whole(word_halves(book, word, at)); }

// Splits a row's float32 residual for the next products. Called by the 8 lanes of each row of the warp; squares: this
// lane's share of ||r||^2; stage_scale: that of the next stage.
__device__ inline void finish_row(const Layout& layout, float squares, float stage_scale, const float* residual, __half* high,
                           float error, Row* row) {
  const int lane = threadIdx.x % kLanesOfRow;
  const float norm = root_above(row_sum(squares));
  const float scale = power_of_two_above(fmaxf(fmaxf(norm, stage_scale * 0x1p-20f), 0x1p-100f)), inverse = reciprocal(scale);
  float off = 0;
  for (int at = lane * 4; at < layout.padded; at += 4 * kLanesOfRow) {
    const float4 r = *reinterpret_cast<const float4*>(residual + at);
    const __half2 front = __floats2half2_rn(r.x * inverse, r.y * inverse);
    const __half2 back = __floats2half2_rn(r.z * inverse, r.w * inverse);
    *reinterpret_cast<__half2*>(high + at) = front;
    *reinterpret_cast<__half2*>(high + at + 2) = back;
    const float2 f = __half22float2(front), k = __half22float2(back);
    const float a = r.x * inverse - f.x, b = r.y * inverse - f.y, c = r.z * inverse - k.x, d = r.w * inverse - k.y;
    off += a * a + b * b + c * c + d * d;
  }
  off = root_above(row_sum(off));
  if (lane == 0) *row = {scale, norm * inverse + off, off, error};
}

// Where three or more are close: all codewords in float32 by a whole warp, 8 lanes a codeword, then the close ones exactly.
// Lane l keeps the scores of the codes 32 t + l % 8 * 4 + l / 8.
__device__ __noinline__ static int among_all(const Exact& exact, int stage, const Layout& layout, const float* residual,
                                             float error, float norm) {
  const EncodeBook& book = exact.book;
  const int64_t at_stage = exact.group * book.book.stages + stage;
  const StageBounds bounds = book.bounds[at_stage];
  const int lane = threadIdx.x % 32, sub = lane % kLanesOfRow, quarter = lane / kLanesOfRow;
  float score[8], best = -INFINITY;
#pragma unroll
  for (int t = 0; t < 8; ++t) {
    score[t] = 0;
#pragma unroll 4
    for (int u = 0; u < kLanesOfRow; ++u) {
      const int64_t word = at_stage * 256 + 32 * t + 4 * u + quarter;
      float sum = 0;
      for (int at = sub * 4; at < layout.padded; at += 4 * kLanesOfRow) {
        const float4 r = *reinterpret_cast<const float4*>(residual + at), w = word_elements(book, word, at);
        sum += r.x * w.x + r.y * w.y + r.z * w.z + r.w * w.w;
      }
      sum = row_sum(sum);
      if (u == sub) score[t] = sum - book.half_norms[word];
    }
    best = fmaxf(best, score[t]);
  }
  best = warp_max(best);
  // A close candidate's half norm is its product less its score.
  const float reach = norm * bounds.largest;
  const float bound = 1.02f * (error * bounds.largest + norm * bounds.low_off +
                               (layout.padded / kLanesOfRow + 12) * 0x1p-23f * reach + 0x1p-22f * (fabsf(best) + reach));
  int chosen = -1;
#pragma unroll
  for (int t = 0; t < 8; ++t) {
    unsigned close = __ballot_sync(0xffffffffu, !(score[t] < best - 2 * bound));
    while (close != 0) {
      const int at = __ffs(static_cast<int>(close)) - 1, code = 32 * t + at % kLanesOfRow * 4 + at / kLanesOfRow;
      close &= close - 1;
      const int lower = min(chosen, code), upper = max(chosen, code);
      if (chosen < 0) chosen = code;
      else chosen = exact.beats(stage, lower, upper) ? upper : lower;
    }
  }
  return chosen;
}

struct Tile {
  int64_t batch, group, first_row;
  int count;
};

// The vectors, transformed. A warp has the rows 4 (warp + warps * turn) .. + 3, as when it chooses their codes; with a full
// transform those of two turns are multiplied at once, on the tensor cores' float64.
template <int Rows, int Warps>
__device__ __noinline__ void load_vectors(const gsrq_layer& layer, const gsrq_call& call, const EncodeBook& book,
                                          const EncodeSource& source, Layout layout, Tile tile, char* memory) {
  constexpr int kScratch = sizeof(__half) * kRing * kWords * kTileStride / sizeof(float) / Warps;
  constexpr int kPiece = 64, kPieceStride = kPiece + 4, kColumns = 16;
  static_assert(kScratch >= 8 * kPieceStride, "the ring is the scratch memory of all warps");
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, width = book.book.width, padded = book.padded;
  const int residual_stride = layout.residual_stride();
  float* residual = reinterpret_cast<float*>(memory + layout.residual_at());
  float* scratch = reinterpret_cast<float*>(memory + layout.ring_at()) + warp * kScratch;
  const double* turned = book.turned + tile.group * width * width;
  const auto origin_of = [&](int row) {
    return row < tile.count ? source.origin(layer, call, tile.batch, tile.first_row + row) : Origin{};
  };
  const auto element = [&](const Origin& origin, int e) {
    return origin.from != nullptr && e < width ? source.element(layer, origin, tile.group * width + e) : 0.0f;
  };
  if (book.diagonal[tile.group] != 0) {
    for (int top = 4 * warp; top < Rows; top += 4 * Warps)
      for (int row = top; row < top + 4; ++row) {
        const Origin origin = origin_of(row);
        for (int e = lane; e < padded; e += 32) {
          const double a = e < width ? turned[static_cast<int64_t>(e) * width + e] : 0.0;
          residual[row * residual_stride + e] = static_cast<float>(a * static_cast<double>(element(origin, e)));
        }
      }
  } else {
    for (int top = 4 * warp; top < Rows; top += 8 * Warps) {
      const auto row_of = [&](int r) { return top + r / 4 * (4 * Warps) + r % 4; };
      for (int column0 = 0; column0 < padded; column0 += 8 * kColumns) {
        double sum[kColumns][2] = {};
        for (int from = 0; from < width; from += kPiece) {
          __syncwarp();
          for (int r = 0; r < 8; ++r) {
            const Origin origin = origin_of(row_of(r));
            for (int e = lane; e < kPiece; e += 32) scratch[r * kPieceStride + e] = element(origin, from + e);
          }
          __syncwarp();
          for (int k = 0; k < kPiece && from + k < width; k += 4) {
            const double x = scratch[lane / 4 * kPieceStride + k + lane % 4];
            const int j = from + k + lane % 4;
#pragma unroll
            for (int n = 0; n < kColumns; ++n) {
              if (column0 + 8 * n >= padded) break;
              const int e = column0 + 8 * n + lane / 4;
              multiply(sum[n], x, j < width && e < width ? turned[static_cast<int64_t>(j) * width + e] : 0.0);
            }
          }
        }
        const int row = row_of(lane / 4);
        if (row < Rows) {
#pragma unroll
          for (int n = 0; n < kColumns; ++n) {
            const int e = column0 + 8 * n + lane % 4 * 2;
            if (e >= padded) break;
            residual[row * residual_stride + e] = static_cast<float>(sum[n][0]);
            residual[row * residual_stride + e + 1] = static_cast<float>(sum[n][1]);
          }
        }
      }
    }
  }
  __syncwarp();
  for (int top = 4 * warp; top < Rows; top += 4 * Warps) {
    const int row = top + lane / kLanesOfRow;
    const float* mine = residual + row * residual_stride;
    float squares = 0;
    for (int at = lane % kLanesOfRow * 4; at < padded; at += 4 * kLanesOfRow) {
      const float4 r = *reinterpret_cast<const float4*>(mine + at);
      squares += r.x * r.x + r.y * r.y + r.z * r.z + r.w * r.w;
    }
    const float norm = root_above(row_sum(squares));
    finish_row(layout, squares, book.bounds[tile.group * book.book.stages].scale, mine,
               reinterpret_cast<__half*>(memory) + row * layout.high_stride(), norm * 0x1.1p-24f,
               reinterpret_cast<Row*>(memory + layout.row_at()) + row);
  }
}

}  // namespace gsrq::cuda
