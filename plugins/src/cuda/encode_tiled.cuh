// Greedy encoding of sub-vectors of 64, 128 or 256 elements: a block's memory, products and float32 scores.
//
// A warp has 16 rows, or two warps share them: of more than 128 elements, each keeps half. Lane l keeps of rows l / 4 and
// l / 4 + 8 the elements 8 n + 2 (l % 4) + b, float32, in registers: the lanes that hold a row's elements in the tensor cores'
// operand are those that hold its scores in their result, so that products, choice and update of a row stay within four lanes
// of a warp.
#pragma once

#include "barrier.cuh"
#include "encode_choice.cuh"
#include "encode_tiled_rows.cuh"
#include "mma.cuh"

namespace gsrq::cuda::tiled {

// How codewords come and go: in pieces, each with a barrier of its own, through a ring of places. Piece n = kPieces stage + i
// goes to place n % kPlaces once the codewords there are given back, which is done by whole stages.
template <int Steps>
struct Ring {
  static constexpr int kPieces = Form<Steps>::kWide ? 4 : 1;  // of a stage
  static constexpr int kPlaces = Form<Steps>::kWide ? 5 : 2;
  static constexpr int kFirst = Form<Steps>::kWide ? 2 : 1;  // pieces that may come while vectors lie in the places after
  static constexpr int kBytes = Form<Steps>::kStageBytes / kPieces;
};

template <int Steps, int Groups>
struct Memory {
  static constexpr int kShares = Form<Steps>::kShares, kRows = 64 * Groups;
  __half words[Ring<Steps>::kPlaces][Ring<Steps>::kBytes / 2];  // from place kFirst on first float[8][kStride] a warp
  __half rows[kShares > 1 ? kRows * Form<Steps>::kPadded : 8];  // float16(r / scale), as codewords of a chunk lie
  int4 best[kShares][kShares > 1 ? 2 * kRows : 1];  // what the warps that share rows tell each other: a lane's best,
  double products[4 * Groups][kShares];
  float sums[3][kShares][kShares > 1 ? kRows : 1];  // and a row's sums of their elements
  alignas(16) float half_norms[2][256];
  StageBounds bounds[2];
  float scores[4 * Groups * kShares][256];
  Vector vectors[kRows];
  uint64_t full[Ring<Steps>::kPlaces], empty[2];  // a piece is there; all warps have read a stage, even or odd
  unsigned active;
};

__device__ inline float quad_sum(float x) {
  x += __shfl_xor_sync(kAll, x, 1);
  return x + __shfl_xor_sync(kAll, x, 2);
}

__device__ inline int quad_max(int x) {
  x = max(x, __shfl_xor_sync(kAll, x, 1));
  return max(x, __shfl_xor_sync(kAll, x, 2));
}

// float16(r / scale) as the tensor cores' left operand, of rows that a warp has for itself.
template <int Steps>
__device__ inline void pack(const Residual<Steps>& r, const float (&inverse)[2], uint32_t (&a)[Steps][4]) {
#pragma unroll
  for (int n = 0; n < 2 * Steps; ++n)
#pragma unroll
    for (int h = 0; h < 2; ++h) a[n / 2][n % 2 * 2 + h] = packed(r[h][n][0] * inverse[h], r[h][n][1] * inverse[h]);
}

// The same by way of shared memory, of rows that warps share: each puts its elements there, and when all have all are read.
// to: this lane's first pair of elements there; off: what left_over gives, of the warp's share.
template <int Steps>
__device__ inline void split(const Residual<Steps>& r, const float (&inverse)[2], char* to, float (&off)[2]) {
  off[0] = off[1] = 0;
#pragma unroll
  for (int n = 0; n < Form<Steps>::kCores; ++n)
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const __half2 both = __floats2half2_rn(r[h][n][0] * inverse[h], r[h][n][1] * inverse[h]);
      const float2 back = __half22float2(both);
      const float dx = fmaf(r[h][n][0], inverse[h], -back.x), dy = fmaf(r[h][n][1], inverse[h], -back.y);
      off[h] = fmaf(dy, dy, fmaf(dx, dx, off[h]));
      *reinterpret_cast<__half2*>(to + n * (kTiledWords * 16) + h * 128) = both;
    }
}

// rows: of the warp, as codewords of a chunk lie.
template <int Steps>
__device__ inline void gather(const char* rows, uint32_t (&a)[Steps][4]) {
  const int lane = threadIdx.x % 32;
  const char* mine = rows + lane / 16 * (kTiledWords * 16) + lane % 16 * 16;
#pragma unroll
  for (int s = 0; s < Steps; ++s)
    load_matrices(a[s], reinterpret_cast<const __half*>(mine + s * (2 * kTiledWords * 16)));
}

// This lane's share of the squares of what rounding leaves of r / scale.
template <int Steps>
__device__ inline void left_over(const Residual<Steps>& r, const float (&inverse)[2], const uint32_t (&a)[Steps][4],
                                 float (&off)[2]) {
  off[0] = off[1] = 0;
#pragma unroll
  for (int n = 0; n < 2 * Steps; ++n)
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const float2 back = __half22float2(*reinterpret_cast<const __half2*>(&a[n / 2][n % 2 * 2 + h]));
      const float dx = fmaf(r[h][n][0], inverse[h], -back.x), dy = fmaf(r[h][n][1], inverse[h], -back.y);
      off[h] = fmaf(dy, dy, fmaf(dx, dx, off[h]));
    }
}

#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 900

__device__ inline void barrier_arrive(uint32_t barrier) {
  asm volatile("mbarrier.arrive.release.cta.shared::cta.b64 _, [%0];" ::"r"(barrier) : "memory");
}

constexpr int kPartWords = 32;  // codewords of a product: two are under way, or one while another's scores are looked at
constexpr int kStepBytes = 2 * kTiledWords * 16, kNextWords = 128;  // of a chunk: to the next step's elements, the next 8 words

// The low half of the descriptor of codewords or rows that lie as chunks do: 8 x 8 matrices of 128 bytes, those of the next 8
// codewords beside, of the next 8 elements after.
__device__ inline uint32_t description(const __half* chunk) {
  // The same in all lanes; as the result of a reduction it lies in a uniform register, where the instruction wants it.
  return __reduce_or_sync(kAll, (shared_address(chunk) & 0x3ffff) >> 4 | kTiledWords * 16 >> 4 << 16);
}

// Between products and other uses of a sum, which they have to themselves while they are under way.
__device__ inline void hold(float (&sum)[4][4]) {
#pragma unroll
  for (int n = 0; n < 4; ++n)
#pragma unroll
    for (int j = 0; j < 4; ++j) asm volatile("" : "+f"(sum[n][j])::"memory");
}

// sum = a w of 16 rows a warp and 32 codewords, in the order of mma.cuh's multiply; sum and a are not to be touched before
// finish_products. words: the first of the 32, described: the description of the chunk and its distance / 16.
template <int Steps>
__device__ inline void start_products(float (&sum)[4][4], const uint32_t (&a)[Steps][4], const __half* words,
                                      uint32_t described) {
#if defined(__CUDA_ARCH_FEAT_SM90_ALL) && !defined(GSRQ_NO_WGMMA)
  hold(sum);
  asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
#pragma unroll
  for (int s = 0; s < Steps; ++s)
    asm volatile(
        "{\n\t.reg .pred more;\n\t.reg .b64 words;\n\tmov.b64 words, {%20, %22};\n\tsetp.ne.s32 more, %21, 0;\n\t"
        "wgmma.mma_async.sync.aligned.m64n32k16.f32.f16.f16 "
        "{%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15}, "
        "{%16, %17, %18, %19}, words, more, 1, 1, 0;\n\t}"
        : "+f"(sum[0][0]), "+f"(sum[0][1]), "+f"(sum[0][2]), "+f"(sum[0][3]), "+f"(sum[1][0]), "+f"(sum[1][1]),
          "+f"(sum[1][2]), "+f"(sum[1][3]), "+f"(sum[2][0]), "+f"(sum[2][1]), "+f"(sum[2][2]), "+f"(sum[2][3]),
          "+f"(sum[3][0]), "+f"(sum[3][1]), "+f"(sum[3][2]), "+f"(sum[3][3])
        : "r"(a[s][0]), "r"(a[s][1]), "r"(a[s][2]), "r"(a[s][3]), "r"(described + s * (kStepBytes >> 4)),
          "r"(s != 0 ? 1 : 0), "r"(kNextWords >> 4)
        : "memory");
  asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
#else
#pragma unroll
  for (int n = 0; n < 4; ++n)
#pragma unroll
    for (int j = 0; j < 4; ++j) sum[n][j] = 0;
  const int lane = threadIdx.x % 32;
  const __half* mine = words + lane / 8 * (kTiledWords * 8) + lane % 8 * 8;
#pragma unroll
  for (int s = 0; s < Steps; s += 2)
#pragma unroll
    for (int n = 0; n < 4; ++n) {
      uint32_t w[4];
      load_matrices(w, mine + s * (2 * kTiledWords * 8) + n * 64);
      multiply(sum[n], a[s], w[0], w[1]);
      multiply(sum[n], a[s + 1], w[2], w[3]);
    }
#endif
}

// Waits for all products but those of the last `Left` starts.
template <int Left>
__device__ inline void finish_products(float (&sum)[4][4]) {
#if defined(__CUDA_ARCH_FEAT_SM90_ALL) && !defined(GSRQ_NO_WGMMA)
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(Left) : "memory");
  hold(sum);
#endif
}

#endif

// What a lane has of a codeword in units of its stage's scale: high halves in shared memory, low ones in global memory.
// Of the warp's share of the elements: pair n is of elements 8 n + 2 q and + 1, four pairs a piece of the low ones.
template <int Steps>
struct Words {
  static constexpr int kPieces = Form<Steps>::kCores / 4;
  const __half* high;  // of the stage, or of the ring
  const __half* low;
  int q, first;  // the place in the ring of the first codewords
  int share;

  __device__ const char* high_of(int word) const {
    int chunk = word / kTiledWords;
    if constexpr (Form<Steps>::kWide) chunk = (chunk + first) % Ring<Steps>::kPlaces;
    return reinterpret_cast<const char*>(high) + chunk * Form<Steps>::kChunkBytes + word % kTiledWords * 16 + q * 4 +
           share * (Form<Steps>::kCores * kTiledWords * 16);
  }
  __device__ uint4 low_of(int word, int piece) const {
    uint4 out;  // in an order of its own: many are under way at once
    asm volatile("ld.global.nc.v4.b32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(out.x), "=r"(out.y), "=r"(out.z), "=r"(out.w)
                 : "l"(low + word * Form<Steps>::kPadded + (share * kPieces + piece) * 32 + q * 8));
    return out;
  }
  __device__ static float2 high_pair(const char* of, int n) {
    return __half22float2(*reinterpret_cast<const __half2*>(of + n * (kTiledWords * 16)));
  }
  __device__ static float2 low_pair(const uint4& of, int k) {
    const uint32_t bits = k == 0 ? of.x : k == 1 ? of.y : k == 2 ? of.z : of.w;
    return __half22float2(*reinterpret_cast<const __half2*>(&bits));
  }
  // This lane's part of the product of r with what of(j, k) gives for pair k of piece j.
  template <class Of>
  __device__ static float part(const float (&r)[4 * kPieces][2], const Of& of) {
    float sum[4] = {};  // short chains: quicker, and their rounding errors are smaller
#pragma unroll
    for (int j = 0; j < kPieces; ++j)
#pragma unroll
      for (int k = 0; k < 4; ++k) {
        const float2 x = of(j, k);
        sum[k] = fmaf(r[4 * j + k][1], x.y, fmaf(r[4 * j + k][0], x.x, sum[k]));
      }
    return sum[0] + sum[1] + (sum[2] + sum[3]);
  }
  // The same of <r, word>.
  __device__ float dot(const float (&r)[4 * kPieces][2], int word) const {
    const char* front = high_of(word);
    uint4 back[kPieces];
#pragma unroll
    for (int j = 0; j < kPieces; ++j) back[j] = low_of(word, j);
    return part(r, [&](int j, int k) {
      const float2 x = high_pair(front, 4 * j + k), y = low_pair(back[j], k);
      return make_float2(x.x + y.x, x.y + y.y);
    });
  }
  // The same of <r, a - b>.
  __device__ float dot_difference(const float (&r)[4 * kPieces][2], int a, int b) const {
    const char *front_a = high_of(a), *front_b = high_of(b);
    uint4 back_a[kPieces], back_b[kPieces];
#pragma unroll
    for (int j = 0; j < kPieces; ++j) back_a[j] = low_of(a, j), back_b[j] = low_of(b, j);
    return part(r, [&](int j, int k) {
      const float2 x = high_pair(front_a, 4 * j + k), y = low_pair(back_a[j], k);
      const float2 u = high_pair(front_b, 4 * j + k), v = low_pair(back_b[j], k);
      return make_float2(x.x + y.x - (u.x + v.x), x.y + y.y - (u.y + v.y));
    });
  }
};

}  // namespace gsrq::cuda::tiled
