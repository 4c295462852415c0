// What both greedy kernels share: numbers that bound errors, and decisions in float64.
#pragma once

#include "encode.cuh"

namespace gsrq::cuda {

__device__ inline double warp_sum(double x) {
  for (int offset = 16; offset > 0; offset /= 2) x += __shfl_xor_sync(0xffffffffu, x, offset);
  return x;
}

__device__ inline float power_of_two_above(float x) {  // of a normal positive x
  return __int_as_float((__float_as_int(x) & 0x7f800000) + 0x00800000);
}

__device__ inline float reciprocal(float power_of_two) { return __int_as_float(0x7f000000 - __float_as_int(power_of_two)); }

// At least the root of x >= 0.
__device__ inline float root_above(float x) { return x > 1e-37f ? x * rsqrtf(x) * 1.00001f : 3.2e-19f; }

// Decisions in float64, by a whole warp: does code b (the higher) beat code a after the stages already chosen? They are rare:
// their code is read anew each time, which takes longer than running it, and so is short.
struct Exact {
  const gsrq_layer& layer;
  const EncodeBook& book;
  const EncodeSource& source;
  Origin origin;
  int64_t group;
  const int8_t* codes;  // of this vector and group

  // <A r, A (c_b - c_a)>, of elements `from` to `to` of r.
  __device__ __noinline__ double product(int stage, int a, int b, int from, int to) const {
    const int width = book.book.width, lane = threadIdx.x % 32;
    const int64_t first = group * book.book.stages;
    const __half* words = static_cast<const __half*>(book.book.codewords) + first * 256 * width;
    const __half* of_a = words + (stage * 256 + a) * static_cast<int64_t>(width);
    const __half* of_b = words + (stage * 256 + b) * static_cast<int64_t>(width);
    const double* metric = book.metric + group * width * width;
    const bool diagonal = book.diagonal[group] != 0;
    const auto difference = [&](int j) {
      return static_cast<double>(__half2float(of_b[j])) - static_cast<double>(__half2float(of_a[j]));
    };
    constexpr int kStages = 8;  // at once
    constexpr int kAhead = 4;  // elements of a lane at once. Past the end: the last, which does not count.
    double sum = 0;
#pragma unroll 1
    for (int at = from + lane; at < to + lane; at += 32 * kAhead) {
      int i[kAhead];
      double r[kAhead];
#pragma unroll
      for (int k = 0; k < kAhead; ++k) {
        i[k] = min(at + 32 * k, to - 1);
        r[k] = source.element(layer, origin, group * width + i[k]);
      }
#pragma unroll 1
      for (int s0 = 0; s0 < stage; s0 += 32) {
        const int mine = s0 + lane < stage ? static_cast<uint8_t>(codes[s0 + lane]) : 0, count = min(stage - s0, 32);
#pragma unroll 1
        for (int s1 = 0; s1 < count; s1 += kStages) {
#pragma unroll
          for (int u = 0; u < kStages; ++u) {  // no branch: all loads are under way together
            const int s = min(s1 + u, count - 1), code = __shfl_sync(0xffffffffu, mine, s);
            const __half* word = words + ((s0 + s) * 256 + code) * static_cast<int64_t>(width);
#pragma unroll
            for (int k = 0; k < kAhead; ++k) {
              const float x = __half2float(word[i[k]]);
              r[k] -= s1 + u < count ? x : 0.0f;
            }
          }
        }
      }
#pragma unroll
      for (int k = 0; k < kAhead; ++k) {
        double turned = 0;
        if (diagonal) {
          turned = metric[static_cast<int64_t>(i[k]) * width + i[k]] * difference(i[k]);
        } else {
#pragma unroll 4
          for (int j = 0; j < width; ++j) turned += metric[static_cast<int64_t>(j) * width + i[k]] * difference(j);
        }
        sum += at + 32 * k < to ? r[k] * turned : 0.0;
      }
    }
    return warp_sum(sum);
  }

  // product: of all elements.
  __device__ bool beats(int stage, int a, int b, double product) const {
    const double* norms = book.norms + (group * book.book.stages + stage) * 256;
    return 2 * product - (norms[b] - norms[a]) > 0;
  }
  __device__ bool beats(int stage, int a, int b) const { return beats(stage, a, b, product(stage, a, b, 0, book.book.width)); }
};

}  // namespace gsrq::cuda
