// Greedy encoding of sub-vectors of 64, 128 or 256 elements: the best of the scores, and of those that are close.
#pragma once

#include "encode_tiled.cuh"

namespace gsrq::cuda::tiled {

constexpr unsigned kScored = ~31u;  // bits of a score that are not its candidate's number

#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 900

// Scores are compared as integers, which order as the floats do where these are positive.
__device__ inline int max3(int a, int b, int c) { return max(max(a, b), c); }

// A lane's best two of the 32 candidates of a set, whose number is in the low five bits of the first. Of the second only the
// value is known.
struct Two {
  int first, second;
};

// Codeword of a candidate, 8 part + 2 n + i: the i-th of the lane's two of the n-th eight of a part. The parts of a set lie
// together, or, where warps share rows, in each piece one of each set.
template <int Steps>
__device__ inline int code_of(int x, int set, int q) {
  const int id = x & 31;
  if constexpr (Form<Steps>::kShares == 1) return 128 * set + id / 2 * 8 + 2 * q + id % 2;
  else return (2 * (id / 8) + set) * kPartWords + id / 2 % 4 * 8 + 2 * q + id % 2;
}

// value & scored | number
__device__ inline int numbered(int value, unsigned scored, int number) {
  int out;
  asm("lop3.b32 %0, %1, %2, %3, 0xea;" : "=r"(out) : "r"(value), "r"(scored), "r"(number));
  return out;
}

// A set's candidates stand in a table of 8 rows and 4 columns. What is best is best of its row and of its column; what is
// second best is best of another row or of another column. So two maxima a score, of rows and of columns, do.
struct Table {
  int column[4];
  Two row;  // the best two of the rows so far

  // The scores <h, w> - half norm / scale of a part, the `part`-th of its set, for the lane's row h of vectors: two rows.
  __device__ void add(const float (&sum)[4][4], const float2 (&norm)[4], float inverse, int h, int part, unsigned scored) {
    int x[4][2];
#pragma unroll
    for (int n = 0; n < 4; ++n)
#pragma unroll
      for (int j = 0; j < 2; ++j)
        x[n][j] = __float_as_int(fmaf(j == 0 ? norm[n].x : norm[n].y, -inverse, sum[n][2 * h + j]));
#pragma unroll
    for (int c = 0; c < 4; ++c) {
      const int one = x[c / 2][c % 2], two = x[c / 2 + 2][c % 2];
      column[c] = part == 0 ? max(one, two) : max3(column[c], one, two);
    }
    int best[2];
#pragma unroll
    for (int k = 0; k < 2; ++k)
      best[k] = numbered(max(max3(x[2 * k][0], x[2 * k][1], x[2 * k + 1][0]), x[2 * k + 1][1]), scored, 8 * part + 4 * k);
    const int upper = max(best[0], best[1]), lower = min(best[0], best[1]);
    row.second = part == 0 ? lower : max3(row.second, lower, min(row.first, upper));
    row.first = part == 0 ? upper : max(row.first, upper);
  }

  __device__ Two best(unsigned scored) const {
    int c[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) c[i] = numbered(column[i], scored, i);
    const int front = max(c[0], c[1]), back = max(c[2], c[3]);
    const int second = max3(min(c[0], c[1]), min(c[2], c[3]), min(front, back));
    return {row.first | (max(front, back) & 3), max(row.second, second)};
  }
};

__device__ inline unsigned of_quad(unsigned ballot) { return ballot >> (threadIdx.x & 28) & 15; }

// Of one row, the scores in float32 of the codewords of those lanes and sets that have one near the best, 8 at once; from
// which score on they are close. near: the row's lanes of set 0, then of set 1. r: the row's elements of this lane. scores,
// others: the warp's own and those of the warp that shares the row, if there is one.
template <int Steps>
__device__ inline float score_near(const Words<Steps>& words, const float (&r)[Form<Steps>::kCores][2], const float* half_norms,
                                   const StageBounds& bounds, float error, float norm, unsigned near, float* scores,
                                   const float* others, int tile) {
  const int lane = threadIdx.x % 32, quad = lane / 4;
#pragma unroll 1
  for (unsigned left = near; left != 0; left &= left - 1) {
    const int at = __ffs(static_cast<int>(left)) - 1;  // lane + 4 set
#pragma unroll 2
    for (int t = 0; t < 32; t += 8) {
      const int word = code_of<Steps>(t + quad, at / 4, at % 4);
      const float product = quad_sum(words.dot(r, word));
      if (lane % 4 == 0) scores[word] = Form<Steps>::kShares == 1 ? product - half_norms[word] : product;
    }
  }
  if constexpr (Form<Steps>::kShares > 1) {
    float whole[8];
    meet<Steps>(tile);
#pragma unroll
    for (int i = 0; i < 8; ++i)
      whole[i] = scores[lane + 32 * i] + others[lane + 32 * i] - half_norms[lane + 32 * i];
    meet<Steps>(tile);
#pragma unroll
    for (int i = 0; i < 8; ++i) scores[lane + 32 * i] = whole[i];
  }
  __syncwarp();
  float best = -INFINITY;
#pragma unroll
  for (int i = 0; i < 8; ++i) best = fmaxf(best, scores[lane + 32 * i]);
  best = warp_max(best);
  // A close candidate's half norm is its product less its score.
  const float reach = norm * bounds.largest;
  const float bound = 1.02f * (error * bounds.largest + norm * bounds.low_off + (Steps + 8) * 0x1p-23f * reach +
                               0x1p-22f * (fabsf(best) + reach));
  return best - 2 * bound;
}

// The best, in float64, of the codewords whose scores are not below `least`. products: of the warps that share the row.
template <int Steps>
__device__ inline int best_of(const Exact& exact, int stage, const float* scores, float least, double* products, int tile,
                              int share) {
  using F = Form<Steps>;
  int chosen = -1;
#pragma unroll 1
  for (int i = 0; i < 8; ++i) {
    unsigned close = __ballot_sync(kAll, !(scores[threadIdx.x % 32 + 32 * i] < least));
#pragma unroll 1
    for (; close != 0; close &= close - 1) {
      const int code = 32 * i + __ffs(static_cast<int>(close)) - 1;
      if (chosen < 0) {
        chosen = code;
        continue;
      }
      constexpr int kMine = F::kPadded / F::kShares;
      double product = exact.product(stage, chosen, code, share * kMine, min((share + 1) * kMine, exact.book.book.width));
      if constexpr (F::kShares > 1)
        product = sum_of_both<Steps>(product, products + share, products + 1 - share, threadIdx.x % 32 == 0, tile);
      if (exact.beats(stage, chosen, code, product)) chosen = code;
    }
  }
  return chosen;
}

#endif

}  // namespace gsrq::cuda::tiled
