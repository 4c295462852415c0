// The nearest codeword of each row. Rows and codewords are float16 pairs, high + low, scaled by powers of two; three
// products (high high, high low, low high) with float32 sums on tensor cores are as exact as float32 products.
//
// A thread block has a tile of rows of one group for all codewords, which stream by in tiles of 128 words x 32 elements;
// scores never leave registers, each thread keeps the best of its columns.
#include "cluster.cuh"
#include "mma.cuh"

namespace gsrq::cuda {
namespace {

constexpr int kThreads = 256, kWarps = kThreads / 32, kHalf = 128, kStride = kClusterDepth + 8, kHeld = 4;

__device__ float power_above(float x) {  // the power of two above a normal positive x
  return __int_as_float((__float_as_int(x) & 0x7f800000) + 0x00800000);
}

__device__ float inverse_of(float power_of_two) { return __int_as_float(0x7f000000 - __float_as_int(power_of_two)); }

__device__ float scale_of(float largest) { return power_above(fmaxf(largest, 0x1p-100f)); }

// One warp a codeword.
__global__ void __launch_bounds__(kThreads) split_words(gsrq_clustering of, const float* words, bool inner, int padded,
                                                        WordForms to) {
  const int64_t word = blockIdx.x * static_cast<int64_t>(kWarps) + threadIdx.x / 32;
  const int lane = threadIdx.x % 32, width = of.width;
  const float* from = words + word * width;
  float largest = 0;
  double squares = 0;
  for (int e = lane; e < width; e += 32) {
    const float x = from[e];
    largest = fmaxf(largest, fabsf(x));
    squares += static_cast<double>(x) * x;
  }
  for (int offset = 16; offset > 0; offset /= 2) {
    largest = fmaxf(largest, __shfl_xor_sync(0xffffffffu, largest, offset));
    squares += __shfl_xor_sync(0xffffffffu, squares, offset);
  }
  const float scale = scale_of(largest), inverse = inverse_of(scale);
  for (int e = lane; e < padded; e += 32) {
    const float x = e < width ? from[e] * inverse : 0;
    const __half high = __float2half_rn(x);
    to.high[word * padded + e] = high;
    to.low[word * padded + e] = __float2half_rn(x - __half2float(high));
  }
  if (lane == 0) {
    to.factors[word] = inner ? scale : 2 * scale;
    to.norms[word] = inner ? 0.0f : static_cast<float>(squares);
  }
}

// A warp multiplies 32 rows with 1 / WordWarps of a tile's codewords.
template <int RowWarps, int WordWarps>
struct Shape {
  static constexpr int kRows = 32 * RowWarps, kNear = kHalf / WordWarps / 8;
  static_assert(RowWarps * WordWarps == kWarps && kNear % 2 == 0 && kRows >= kLeastTileRows, "whole warps, pairs of tiles");
};

struct Layout {
  int rows, word_warps, padded;
  __host__ __device__ int stride() const { return padded + 8; }
  __host__ __device__ size_t low_at() const { return sizeof(__half) * rows * stride(); }
  __host__ __device__ size_t ring_at() const { return 2 * low_at(); }
  __host__ __device__ size_t factors_at() const { return ring_at() + sizeof(__half) * 2 * 2 * kHalf * kStride; }
  __host__ __device__ size_t norms_at() const { return factors_at() + sizeof(float) * kClusters; }
  __host__ __device__ size_t scales_at() const { return norms_at() + sizeof(float) * kClusters; }
  __host__ __device__ size_t best_at() const { return scales_at() + sizeof(float) * rows; }
  __host__ __device__ size_t bytes() const { return best_at() + sizeof(float2) * rows * word_warps; }
};

__device__ float4 elements(const float* row, int at, int width, bool whole) {
  if (whole) return at < width ? __ldg(reinterpret_cast<const float4*>(row + at)) : make_float4(0, 0, 0, 0);
  const auto one = [&](int e) { return e < width ? __ldg(row + e) : 0.0f; };
  return make_float4(one(at), one(at + 1), one(at + 2), one(at + 3));
}

__device__ float largest_of(float4 x) { return fmaxf(fmaxf(fabsf(x.x), fabsf(x.y)), fmaxf(fabsf(x.z), fabsf(x.w))); }

__device__ void put(float4 x, float inverse, __half* high, __half* low) {
  const __half2 front = __floats2half2_rn(x.x * inverse, x.y * inverse);
  const __half2 back = __floats2half2_rn(x.z * inverse, x.w * inverse);
  const float2 f = __half22float2(front), k = __half22float2(back);
  *reinterpret_cast<__half2*>(high) = front;
  *reinterpret_cast<__half2*>(high + 2) = back;
  *reinterpret_cast<__half2*>(low) = __floats2half2_rn(x.x * inverse - f.x, x.y * inverse - f.y);
  *reinterpret_cast<__half2*>(low + 2) = __floats2half2_rn(x.z * inverse - k.x, x.w * inverse - k.y);
}

// Rows of the tile, 8 lanes each; zeros for those past `count`.
template <int Rows>
__device__ void load_rows(const gsrq_clustering& of, int64_t first, int count, int padded, int stride, __half* high,
                          __half* low, float* scales) {
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, sub = lane % 8 * 4, width = of.width;
  const bool whole = width % 4 == 0;
#pragma unroll 1
  for (int top = 4 * warp; top < Rows; top += 4 * kWarps) {
    const int row = top + lane / 8;
    const int have = row < count ? width : 0;
    const float* from = of.vectors + (first + (row < count ? row : 0)) * width;
    float4 held[kHeld];
    float largest = 0;
#pragma unroll
    for (int i = 0; i < kHeld; ++i) held[i] = elements(from, 32 * i + sub, have, whole);
#pragma unroll
    for (int i = 0; i < kHeld; ++i) largest = fmaxf(largest, largest_of(held[i]));
    for (int at = 32 * kHeld + sub; at < padded; at += 32) largest = fmaxf(largest, largest_of(elements(from, at, have, whole)));
    for (int offset = 1; offset < 8; offset *= 2) largest = fmaxf(largest, __shfl_xor_sync(0xffffffffu, largest, offset));
    const float scale = scale_of(largest), inverse = inverse_of(scale);
    const int to = row * stride;
#pragma unroll
    for (int i = 0; i < kHeld; ++i)
      if (32 * i < padded) put(held[i], inverse, high + to + 32 * i + sub, low + to + 32 * i + sub);
    for (int at = 32 * kHeld + sub; at < padded; at += 32)
      put(elements(from, at, have, whole), inverse, high + to + at, low + to + at);
    if (sub == 0) scales[row] = scale;
  }
}

__device__ void keep_better(float& best, int& code, float other, int other_code) {
  if (other > best || (other == best && other_code < code)) best = other, code = other_code;
}

template <int RowWarps, int WordWarps>
__global__ void __launch_bounds__(kThreads, RowWarps == 4 ? 2 : 1)
    assign_rows(const __grid_constant__ gsrq_clustering of, const __grid_constant__ WordForms forms, int padded, int64_t tiles,
                uint8_t* codes, float* gains, double* partial) {
  using S = Shape<RowWarps, WordWarps>;
  extern __shared__ __align__(16) char memory[];
  const Layout layout{S::kRows, WordWarps, padded};
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, stride = layout.stride();
  const int64_t g = blockIdx.x / tiles, tile = blockIdx.x % tiles, first = g * of.rows + tile * S::kRows;
  const int64_t left = of.rows - tile * S::kRows;
  const int count = static_cast<int>(left < S::kRows ? left : S::kRows);
  __half* high = reinterpret_cast<__half*>(memory);
  __half* low = reinterpret_cast<__half*>(memory + layout.low_at());
  __half* ring = reinterpret_cast<__half*>(memory + layout.ring_at());
  float* factors = reinterpret_cast<float*>(memory + layout.factors_at());
  float* norms = reinterpret_cast<float*>(memory + layout.norms_at());
  float* scales = reinterpret_cast<float*>(memory + layout.scales_at());
  float2* bests = reinterpret_cast<float2*>(memory + layout.best_at());

  constexpr int kPart = kHalf * kStride;  // of the high, then of the low halves of a tile of codewords
  const int depths = padded / kClusterDepth, total = 2 * depths;
  const auto start_load = [&](int t) {
    if (t < total) {
      const int64_t at = (g * kClusters + t / depths * kHalf) * padded + t % depths * kClusterDepth;
      __half* to = ring + t % 2 * (2 * kPart);
#pragma unroll
      for (int n = 0; n < 2 * kHalf * kClusterDepth / 8 / kThreads; ++n) {
        const int i = n * kThreads + threadIdx.x, part = i / (kHalf * kClusterDepth / 8);
        const int word = i / (kClusterDepth / 8) % kHalf, e = i % (kClusterDepth / 8) * 8;
        const __half* from = (part == 0 ? forms.high : forms.low) + at + static_cast<int64_t>(word) * padded + e;
        copy_async(to + part * kPart + word * kStride + e, from, true);
      }
    }
    commit_async();
  };
  start_load(0);
  factors[threadIdx.x] = forms.factors[g * kClusters + threadIdx.x];
  norms[threadIdx.x] = forms.norms[g * kClusters + threadIdx.x];
  load_rows<S::kRows>(of, first, count, padded, stride, high, low, scales);

  const int row_warp = warp / WordWarps, word_warp = warp % WordWarps;
  const int my_row = (row_warp * 32 + lane % 16) * stride + lane / 16 * 8;
  const int my_word = (word_warp * S::kNear * 8 + lane % 8 + lane / 16 * 8) * kStride + lane / 8 % 2 * 8;
  float best[2][2];
  int code[2][2];
#pragma unroll
  for (int m = 0; m < 2; ++m)
#pragma unroll
    for (int h = 0; h < 2; ++h) best[m][h] = -INFINITY, code[m][h] = 0;

  int t = 0;
#pragma unroll 1
  for (int half = 0; half < 2; ++half) {
    float sum[2][S::kNear][4];
#pragma unroll
    for (int m = 0; m < 2; ++m)
#pragma unroll
      for (int n = 0; n < S::kNear; ++n)
#pragma unroll
        for (int j = 0; j < 4; ++j) sum[m][n][j] = 0;
#pragma unroll 1
    for (int depth = 0; depth < depths; ++depth, ++t) {
      wait_async<0>();
      __syncthreads();  // tile t is there, and all are done with tile t - 1
      start_load(t + 1);
      const __half* words = ring + t % 2 * (2 * kPart) + my_word;
#pragma unroll
      for (int s = 0; s < kClusterDepth / 16; ++s) {
        const int at = my_row + depth * kClusterDepth + s * 16;
        uint32_t a_high[2][4], a_low[2][4];
#pragma unroll
        for (int m = 0; m < 2; ++m) {
          load_matrices(a_high[m], high + at + m * 16 * stride);
          load_matrices(a_low[m], low + at + m * 16 * stride);
        }
#pragma unroll
        for (int n = 0; n < S::kNear; n += 2) {
          uint32_t w_high[4], w_low[4];
          load_matrices(w_high, words + n * 8 * kStride + s * 16);
          load_matrices(w_low, words + kPart + n * 8 * kStride + s * 16);
#pragma unroll
          for (int m = 0; m < 2; ++m) {
            multiply(sum[m][n], a_high[m], w_high[0], w_high[1]);
            multiply(sum[m][n + 1], a_high[m], w_high[2], w_high[3]);
          }
#pragma unroll
          for (int m = 0; m < 2; ++m) {
            multiply(sum[m][n], a_high[m], w_low[0], w_low[1]);
            multiply(sum[m][n + 1], a_high[m], w_low[2], w_low[3]);
          }
#pragma unroll
          for (int m = 0; m < 2; ++m) {
            multiply(sum[m][n], a_low[m], w_high[0], w_high[1]);
            multiply(sum[m][n + 1], a_low[m], w_high[2], w_high[3]);
          }
        }
      }
    }
    float scale[2][2];
#pragma unroll
    for (int m = 0; m < 2; ++m)
#pragma unroll
      for (int h = 0; h < 2; ++h) scale[m][h] = scales[row_warp * 32 + m * 16 + lane / 4 + 8 * h];
    const int column = half * kHalf + word_warp * S::kNear * 8 + lane % 4 * 2;
#pragma unroll
    for (int n = 0; n < S::kNear; ++n) {
      const float2 factor = *reinterpret_cast<const float2*>(factors + column + n * 8);
      const float2 norm = *reinterpret_cast<const float2*>(norms + column + n * 8);
#pragma unroll
      for (int m = 0; m < 2; ++m)
#pragma unroll
        for (int h = 0; h < 2; ++h)
#pragma unroll
          for (int j = 0; j < 2; ++j) {
            const float score = fmaf(sum[m][n][2 * h + j] * scale[m][h], j == 0 ? factor.x : factor.y,
                                     j == 0 ? -norm.x : -norm.y);
            if (score > best[m][h]) best[m][h] = score, code[m][h] = column + n * 8 + j;  // columns ascend
          }
    }
  }
  wait_async<0>();
#pragma unroll
  for (int m = 0; m < 2; ++m)
#pragma unroll
    for (int h = 0; h < 2; ++h) {
#pragma unroll
      for (int offset = 1; offset < 4; offset *= 2) {
        const float other = __shfl_xor_sync(0xffffffffu, best[m][h], offset);
        const int other_code = __shfl_xor_sync(0xffffffffu, code[m][h], offset);
        keep_better(best[m][h], code[m][h], other, other_code);
      }
      if (lane % 4 == 0)
        bests[word_warp * S::kRows + row_warp * 32 + m * 16 + lane / 4 + 8 * h] =
            make_float2(best[m][h], __int_as_float(code[m][h]));
    }
  __syncthreads();

  double weighted = 0;
  const int row = threadIdx.x;
  if (row < count) {
    float top = bests[row].x;
    int chosen = __float_as_int(bests[row].y);
#pragma unroll
    for (int w = 1; w < WordWarps; ++w)
      keep_better(top, chosen, bests[w * S::kRows + row].x, __float_as_int(bests[w * S::kRows + row].y));
    codes[first + row] = static_cast<uint8_t>(chosen);
    if (gains != nullptr) gains[first + row] = top;
    weighted = of.weights != nullptr ? static_cast<double>(of.weights[first + row] * top) : static_cast<double>(top);
  }
  if (partial == nullptr) return;
  __shared__ double of_warp[kWarps];
  for (int offset = 16; offset > 0; offset /= 2) weighted += __shfl_xor_sync(0xffffffffu, weighted, offset);
  if (lane == 0) of_warp[warp] = weighted;
  __syncthreads();
  if (threadIdx.x == 0) {
    double all = 0;
    for (int w = 0; w < kWarps; ++w) all += of_warp[w];
    partial[g * tiles + tile] = all;
  }
}

__global__ void __launch_bounds__(kThreads) sum_inertia(const double* partial, int64_t tiles, double* inertia) {
  __shared__ double of_warp[kWarps];
  double sum = 0;
  for (int64_t i = threadIdx.x; i < tiles; i += kThreads) sum += partial[blockIdx.x * tiles + i];
  for (int offset = 16; offset > 0; offset /= 2) sum += __shfl_xor_sync(0xffffffffu, sum, offset);
  if (threadIdx.x % 32 == 0) of_warp[threadIdx.x / 32] = sum;
  __syncthreads();
  if (threadIdx.x == 0) {
    double all = 0;
    for (int w = 0; w < kWarps; ++w) all += of_warp[w];
    inertia[blockIdx.x] = all;
  }
}

template <int RowWarps, int WordWarps>
int launch(const gsrq_clustering& of, uint8_t* codes, float* gains, double* inertia, const AssignShare& share,
           cudaStream_t stream) {
  using S = Shape<RowWarps, WordWarps>;
  const int padded = padded_width(of);
  const int64_t tiles = parts_of(of.rows, S::kRows), grid = tiles * of.groups;
  if (grid > INT32_MAX) return fail("clustering: %lld blocks are too many", static_cast<long long>(grid));
  const int bytes = static_cast<int>(Layout{S::kRows, WordWarps, padded}.bytes());
  const auto kernel = assign_rows<RowWarps, WordWarps>;
  if (cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes) != cudaSuccess ||
      cudaFuncSetAttribute(kernel, cudaFuncAttributePreferredSharedMemoryCarveout, cudaSharedmemCarveoutMaxShared) !=
          cudaSuccess)
    return launched("clustering assign");
  kernel<<<static_cast<unsigned>(grid), kThreads, bytes, stream>>>(of, share.words, padded, tiles, codes, gains,
                                                                   inertia == nullptr ? nullptr : share.partial);
  if (launched("clustering assign")) return 1;
  if (inertia != nullptr) sum_inertia<<<of.groups, kThreads, 0, stream>>>(share.partial, tiles, inertia);
  return launched("clustering inertia");
}

}  // namespace

int cluster_assign(const gsrq_clustering& of, const float* words, bool inner, uint8_t* codes, float* gains, double* inertia,
                   const AssignShare& share, cudaStream_t stream) {
  int device = 0, most = 0;
  if (cudaGetDevice(&device) != cudaSuccess ||
      cudaDeviceGetAttribute(&most, cudaDevAttrMaxSharedMemoryPerBlockOptin, device) != cudaSuccess)
    return launched("clustering assign");
  const int padded = padded_width(of);
  split_words<<<of.groups * (kClusters / kWarps), kThreads, 0, stream>>>(of, words, inner, padded, share.words);
  if (launched("clustering words")) return 1;
  constexpr int kStatic = 128;  // of_warp
  const auto fits = [&](int rows, int word_warps) {
    return Layout{rows, word_warps, padded}.bytes() + kStatic <= static_cast<size_t>(most);
  };
  if (fits(128, 2)) return launch<4, 2>(of, codes, gains, inertia, share, stream);
  if (fits(64, 4)) return launch<2, 4>(of, codes, gains, inertia, share, stream);
  if (fits(32, 8)) return launch<1, 8>(of, codes, gains, inertia, share, stream);
  return fail("clustering: width %d needs %zu bytes of shared memory a block, the device has %d", of.width,
              Layout{32, 8, padded}.bytes(), most);
}

}  // namespace gsrq::cuda
