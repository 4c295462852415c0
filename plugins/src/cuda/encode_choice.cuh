// What both greedy kernels share: numbers that bound errors, and decisions in float64.
#pragma once

#include "encode.cuh"

namespace gsrq::cuda {

__device__ inline double warp_sum(double x) {
  for (int offset = 16; offset > 0; offset /= 2) x += __shfl_xor_sync(0xffffffffu, x, offset);
  return x;
}

__device__ inline float warp_max(float x) {
  for (int offset = 16; offset > 0; offset /= 2) x = fmaxf(x, __shfl_xor_sync(0xffffffffu, x, offset));
  return x;
}

__device__ inline float power_of_two_above(float x) {  // of a normal positive x
  return __int_as_float((__float_as_int(x) & 0x7f800000) + 0x00800000);
}

__device__ inline float reciprocal(float power_of_two) { return __int_as_float(0x7f000000 - __float_as_int(power_of_two)); }

// At least the root of x >= 0.
__device__ inline float root_above(float x) { return x > 1e-37f ? x * rsqrtf(x) * 1.00001f : 3.2e-19f; }

// Decisions in float64, by a whole warp: does code b (the higher) beat code a after the stages already chosen?
struct Exact {
  const gsrq_layer& layer;
  const gsrq_call& call;
  const EncodeBook& book;
  const EncodeSource& source;
  int64_t batch, row, group;
  const int8_t* codes;  // of this vector and group

  __device__ __noinline__ bool beats(int stage, int a, int b) const {
    const int64_t width = book.book.width, first = group * book.book.stages;
    const __half* words = static_cast<const __half*>(book.book.codewords);
    const __half* of_a = words + ((first + stage) * 256 + a) * width;
    const __half* of_b = words + ((first + stage) * 256 + b) * width;
    const double* metric = book.metric + group * width * width;
    const bool diagonal = book.diagonal[group] != 0;
    const auto difference = [&](int64_t j) {
      return static_cast<double>(__half2float(of_b[j])) - static_cast<double>(__half2float(of_a[j]));
    };
    constexpr int kAhead = 4;  // elements of a lane at once: their loads are under way together
    const int lane = threadIdx.x % 32;
    double sum = 0;
    for (int64_t from = lane; from < width + lane; from += 32 * kAhead) {
      double r[kAhead];
#pragma unroll
      for (int k = 0; k < kAhead; ++k) {
        const int64_t i = from + 32 * k;
        r[k] = i < width ? static_cast<double>(source.element(layer, call, batch, row, group * width + i)) : 0.0;
      }
      for (int s0 = 0; s0 < stage; s0 += 32) {
        const int mine = s0 + lane < stage ? static_cast<uint8_t>(codes[s0 + lane]) : 0, count = min(stage - s0, 32);
#pragma unroll 4
        for (int s = 0; s < count; ++s) {
          const __half* word = words + ((first + s0 + s) * 256 + __shfl_sync(0xffffffffu, mine, s)) * width;
#pragma unroll
          for (int k = 0; k < kAhead; ++k)
            if (const int64_t i = from + 32 * k; i < width) r[k] -= static_cast<double>(__half2float(word[i]));
        }
      }
#pragma unroll
      for (int k = 0; k < kAhead; ++k) {
        const int64_t i = from + 32 * k;
        if (i >= width) break;
        double turned = 0;
        if (diagonal) {
          turned = metric[i * width + i] * difference(i);
        } else {
#pragma unroll 8
          for (int64_t j = 0; j < width; ++j) turned += metric[j * width + i] * difference(j);
        }
        sum += r[k] * turned;
      }
    }
    const double* norms = book.norms + (first + stage) * 256;
    return 2 * warp_sum(sum) - (norms[b] - norms[a]) > 0;
  }
};

}  // namespace gsrq::cuda
