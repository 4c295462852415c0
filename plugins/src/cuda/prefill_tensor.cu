// Flash attention on tensor cores: float16 products, float32 sums and softmax. Eight warps of 16 (token, query head) rows.
#include "mma.cuh"
#include "prefill.cuh"

namespace gsrq::cuda {
namespace {

constexpr int kThreads = 256;
constexpr float kLog2E = 1.4426950408889634f, kLn2 = 0.6931471805599453f;

template <int Dim, int Keys>
struct Shared {
  static constexpr int kStride = Dim + 8;  // an odd number of 16-byte pieces: the rows of a matrix lie in different banks
  __half query[kTensorRows * kStride];
  __half key[2][Keys * kStride], value[2][Keys * kStride];
};

template <int Dim, int Keys>
__device__ void load_tile(Shared<Dim, Keys>& shared, int buffer, const __half* keys, const __half* values, int stride,
                          int count) {
  constexpr int kPieces = Dim / 8;
#pragma unroll
  for (int n = 0; n < Keys * kPieces / kThreads; ++n) {
    const int i = n * kThreads + threadIdx.x, k = i / kPieces, e = i % kPieces * 8;
    const bool real = k < count && e < stride;
    const int64_t from = real ? static_cast<int64_t>(k) * stride + e : 0;
    copy_async(&shared.key[buffer][k * Shared<Dim, Keys>::kStride + e], keys + from, real);
    copy_async(&shared.value[buffer][k * Shared<Dim, Keys>::kStride + e], values + from, real);
  }
}

__device__ float quad_max(float x) {
  x = fmaxf(x, __shfl_xor_sync(0xffffffffu, x, 1));
  return fmaxf(x, __shfl_xor_sync(0xffffffffu, x, 2));
}

__device__ float quad_sum(float x) {
  x += __shfl_xor_sync(0xffffffffu, x, 1);
  return x + __shfl_xor_sync(0xffffffffu, x, 2);
}

// Grid: (query tiles, KV heads * splits, batch).
template <int Dim, int Keys>
__global__ void __launch_bounds__(kThreads) attend(gsrq_layer layer, gsrq_call call, PrefillPlan plan) {
  using Memory = Shared<Dim, Keys>;
  constexpr int kStride = Memory::kStride, kDepth = Dim / 16, kNear = Keys / 8, kOut = Dim / 8;
  constexpr bool kHeld = Dim <= 128;  // the queries stay in registers
  extern __shared__ __align__(16) char memory[];
  Memory& shared = *reinterpret_cast<Memory*>(memory);
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, d = layer.head_dim, group = plan.group;
  const int64_t b = blockIdx.z, head = blockIdx.y / plan.splits;
  const int split = blockIdx.y % plan.splits;
  const RowLengths row = row_lengths(layer, call, b);
  const int fresh = static_cast<int>(row.total - row.past);
  const int step0 = (gridDim.x - 1 - blockIdx.x) * plan.tokens;  // the longest first
  const int rows = min(plan.tokens, call.steps - step0) * group;

  float out[kOut][4] = {};
  float maximum[2] = {-INFINITY, -INFINITY}, sum[2] = {};
  if (step0 < fresh) {
    const Visibility visible(layer, row);
    const int32_t p0 = static_cast<int32_t>(row.past) + step0;
    const int32_t p1 = static_cast<int32_t>(row.past) + min(step0 + plan.tokens, fresh) - 1;
    const TileList list(visible, p0, p1, Keys);
    const int32_t chunk = (list.count() + plan.splits - 1) / plan.splits;
    const int32_t stop = min(list.count(), (split + 1) * chunk);
    const int32_t seen0 = visible.seen(p0), seen1 = visible.seen(p1);
    int32_t position[2], seen[2];
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      position[h] = min(p0 + (warp * 16 + lane / 4 + 8 * h) / group, p1);
      seen[h] = visible.seen(position[h]);
    }
    const auto start_load = [&](int32_t tile, int buffer) {
      if (tile < stop) {
        const int index = list.index(tile);
        const Segment& segment = list.segments[index];
        const int32_t token0 = list.first(index, tile, Keys);
        const int64_t at =
            ((b * layer.kv_heads + head) * (segment.coded ? plan.coded : plan.exact) + token0 - segment.offset) * plan.stride;
        load_tile<Dim, Keys>(shared, buffer, static_cast<const __half*>(segment.coded ? plan.coded_keys : plan.exact_keys) + at,
                             static_cast<const __half*>(segment.coded ? plan.coded_values : plan.exact_values) + at,
                             plan.stride, min(Keys, segment.stop - token0));
      }
      commit_async();
    };
    start_load(split * chunk, 0);

    for (int i = threadIdx.x; i < kTensorRows * (Dim / 2); i += kThreads) {
      const int r = i / (Dim / 2), pair = i % (Dim / 2), step = step0 + r / group;
      int first, second;
      pair_elements(layer, pair, &first, &second);
      float2 x = make_float2(0, 0);
      if (r < rows && step < fresh && pair < d / 2)
        x = rotated_query(layer, call, b, head * group + r % group, step, pair, row.past + step);
      shared.query[r * kStride + first] = __float2half_rn(fminf(fmaxf(x.x, -65504.0f), 65504.0f));
      shared.query[r * kStride + second] = __float2half_rn(fminf(fmaxf(x.y, -65504.0f), 65504.0f));
    }
    __syncthreads();
    const __half* query = shared.query + (warp * 16 + lane % 16) * kStride + lane / 16 * 8;
    uint32_t held[kHeld ? kDepth : 1][4];
    if constexpr (kHeld) {
#pragma unroll
      for (int s = 0; s < kDepth; ++s) load_matrices(held[s], query + s * 16);
    }

    for (int32_t tile = split * chunk; tile < stop; ++tile) {
      const int buffer = (tile - split * chunk) % 2;
      wait_async<0>();
      __syncthreads();
      start_load(tile + 1, buffer ^ 1);

      const int index = list.index(tile);
      const int32_t token0 = list.first(index, tile, Keys), count = min(Keys, list.segments[index].stop - token0);
      float score[kNear][4] = {};
      const __half* keys = shared.key[buffer] + (lane % 8 + lane / 16 * 8) * kStride + lane / 8 % 2 * 8;
#pragma unroll
      for (int s = 0; s < kDepth; ++s) {
        uint32_t a[4];
        if constexpr (!kHeld) load_matrices(a, query + s * 16);
#pragma unroll
        for (int n = 0; n < kNear; n += 2) {
          uint32_t k[4];
          load_matrices(k, keys + n * 8 * kStride + s * 16);
          if constexpr (kHeld) {
            multiply(score[n], held[s], k[0], k[1]);
            multiply(score[n + 1], held[s], k[2], k[3]);
          } else {
            multiply(score[n], a, k[0], k[1]);
            multiply(score[n + 1], a, k[2], k[3]);
          }
        }
      }
      if (layer.softcap > 0) {
        const float inner = layer.scale / layer.softcap, outer = layer.softcap * kLog2E;
#pragma unroll
        for (int n = 0; n < kNear; ++n)
#pragma unroll
          for (int j = 0; j < 4; ++j) score[n][j] = outer * tanhf(score[n][j] * inner);
      } else {
        const float factor = layer.scale * kLog2E;
#pragma unroll
        for (int n = 0; n < kNear; ++n)
#pragma unroll
          for (int j = 0; j < 4; ++j) score[n][j] *= factor;
      }
      const bool whole = count == Keys && token0 >= visible.interval(index, p1, seen1).low &&
                         token0 + Keys <= visible.interval(index, p0, seen0).high;
      if (!whole) {
#pragma unroll
        for (int h = 0; h < 2; ++h) {
          const Interval limits = visible.interval(index, position[h], seen[h]);
          const int32_t low = limits.low - token0, high = min(limits.high - token0, count);
#pragma unroll
          for (int n = 0; n < kNear; ++n)
#pragma unroll
            for (int j = 0; j < 2; ++j) {
              const int k = n * 8 + lane % 4 * 2 + j;
              if (k < low || k >= high) score[n][2 * h + j] = -INFINITY;
            }
        }
      }
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        float most = maximum[h];
#pragma unroll
        for (int n = 0; n < kNear; ++n) most = fmaxf(most, fmaxf(score[n][2 * h], score[n][2 * h + 1]));
        most = quad_max(most);
        const float base = most == -INFINITY ? 0.0f : most, shrink = exp2f(maximum[h] - base);
        maximum[h] = most;
        sum[h] *= shrink;
#pragma unroll
        for (int n = 0; n < kOut; ++n) out[n][2 * h] *= shrink, out[n][2 * h + 1] *= shrink;
#pragma unroll
        for (int n = 0; n < kNear; ++n)
#pragma unroll
          for (int j = 0; j < 2; ++j) {
            score[n][2 * h + j] = exp2f(score[n][2 * h + j] - base);
            sum[h] += score[n][2 * h + j];
          }
      }
      const __half* values = shared.value[buffer] + lane % 16 * kStride + lane / 16 * 8;
#pragma unroll
      for (int n = 0; n < kNear; n += 2) {
        const uint32_t a[4] = {packed(score[n][0], score[n][1]), packed(score[n][2], score[n][3]),
                               packed(score[n + 1][0], score[n + 1][1]), packed(score[n + 1][2], score[n + 1][3])};
#pragma unroll
        for (int e = 0; e < kOut; e += 2) {
          uint32_t v[4];
          load_transposed(v, values + n * 8 * kStride + e * 8);
          multiply(out[e], a, v[0], v[1]);
          multiply(out[e + 1], a, v[2], v[3]);
        }
      }
    }
    wait_async<0>();
    sum[0] = quad_sum(sum[0]);
    sum[1] = quad_sum(sum[1]);
  }

#pragma unroll
  for (int h = 0; h < 2; ++h) {
    const int r = warp * 16 + lane / 4 + 8 * h, step = step0 + r / group;
    if (r >= rows) continue;
    const int64_t q = head * group + r % group;
    const bool real = step < fresh && sum[h] > 0;
    const int64_t at = (((split * static_cast<int64_t>(call.batch)) + b) * layer.heads + q) * call.steps + step;
    if (plan.splits > 1 && lane % 4 == 0) plan.maxima[at] = maximum[h] * kLn2, plan.sums[at] = step < fresh ? sum[h] : 0.0f;
    const float inverse = real ? 1.0f / sum[h] : 0.0f;
    const int64_t to = ((b * call.steps + step) * layer.heads + q) * d;
#pragma unroll
    for (int n = 0; n < kOut; ++n)
#pragma unroll
      for (int j = 0; j < 2; ++j) {
        const int e = n * 8 + lane % 4 * 2 + j;
        if (e >= d) continue;
        if (plan.splits > 1) plan.partial[at * d + e] = out[n][2 * h + j];
        else store(call.output, to + e, real ? out[n][2 * h + j] * inverse : 0.0f, call.dtype);
      }
  }
}

template <int Dim, int Keys>
int launch(const gsrq_layer& layer, const gsrq_call& call, const PrefillPlan& plan, cudaStream_t stream) {
  constexpr int bytes = sizeof(Shared<Dim, Keys>);
  if (cudaFuncSetAttribute(attend<Dim, Keys>, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes) != cudaSuccess)
    return launched("prefill_tensor");
  const dim3 grid(static_cast<unsigned>(plan.tiles), static_cast<unsigned>(layer.kv_heads * plan.splits),
                  static_cast<unsigned>(call.batch));
  attend<Dim, Keys><<<grid, kThreads, bytes, stream>>>(layer, call, plan);
  return launched("prefill_tensor");
}

}  // namespace

int prefill_tensor(const gsrq_layer& layer, const gsrq_call& call, const PrefillPlan& plan, cudaStream_t stream) {
  if (layer.head_dim <= 64) return launch<64, 64>(layer, call, plan, stream);
  if (layer.head_dim <= 128) return launch<128, 64>(layer, call, plan, stream);
  return launch<256, 32>(layer, call, plan, stream);
}

}  // namespace gsrq::cuda
