// The few instructions of the tensor cores that the kernels use (sm_80 and later): float16 products, float32 sums.
#pragma once

#include <cuda_fp16.h>

#include <cstdint>

namespace gsrq::cuda {

// Four 8 x 8 matrices; lane l gives the address of row l % 8 of matrix l / 8 (16 bytes, aligned).
__device__ inline void load_matrices(uint32_t (&to)[4], const __half* from) {
  const uint32_t at = static_cast<uint32_t>(__cvta_generic_to_shared(from));
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3])
               : "r"(at));
}

__device__ inline void load_transposed(uint32_t (&to)[4], const __half* from) {
  const uint32_t at = static_cast<uint32_t>(__cvta_generic_to_shared(from));
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3])
               : "r"(at));
}

// sum [16 x 8] += a [16 x 16] b [16 x 8]. sum: rows lane / 4 (and + 8: the last two), columns 2 (lane % 4) and + 1.
__device__ inline void multiply(float (&sum)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
      : "+f"(sum[0]), "+f"(sum[1]), "+f"(sum[2]), "+f"(sum[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

// The same in float64: sum [8 x 8] += a [8 x 4] b [4 x 8]. a: row lane / 4, column lane % 4; b: row lane % 4, column
// lane / 4; sum: row lane / 4, columns 2 (lane % 4) and + 1.
__device__ inline void multiply(double (&sum)[2], double a, double b) {
  asm volatile("mma.sync.aligned.m8n8k4.row.col.f64.f64.f64.f64 {%0, %1}, {%2}, {%3}, {%0, %1};"
               : "+d"(sum[0]), "+d"(sum[1])
               : "d"(a), "d"(b));
}

// 16 bytes from global to shared memory; zeros where not real. `from` must be a valid address of the array all the same.
__device__ inline void copy_async(void* to, const void* from, bool real) {
  const uint32_t at = static_cast<uint32_t>(__cvta_generic_to_shared(to));
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(at), "l"(from), "r"(real ? 16 : 0) : "memory");
}

// Into the second-level cache.
__device__ inline void prefetch(const void* from) { asm volatile("prefetch.global.L2 [%0];" ::"l"(from)); }

__device__ inline void commit_async() { asm volatile("cp.async.commit_group;" ::: "memory"); }

template <int Left>
__device__ inline void wait_async() {
  asm volatile("cp.async.wait_group %0;" ::"n"(Left) : "memory");
}

__device__ inline uint32_t packed(float low, float high) {
  const __half2 both = __floats2half2_rn(low, high);
  return *reinterpret_cast<const uint32_t*>(&both);
}

}  // namespace gsrq::cuda
