// Flash attention in float32 on the ordinary cores: for float32 outputs.
#include "prefill.cuh"

namespace gsrq::cuda {
namespace {

constexpr int kThreads = 256, kKeys = 32;

template <int Dim>
struct Shared {
  float query[kQueryRows][Dim + 4], key[kKeys][Dim + 4], value[kKeys][Dim + 4];
  float weight[kQueryRows][kKeys + 1];
};

// Grid: (query tiles, KV heads * splits, batch). A thread has rows 4 ty .. 4 ty + 3, keys tx and tx + 16, and of the output
// elements 4 tx + 64 i.
template <int Dim>
__global__ void __launch_bounds__(kThreads) attend(gsrq_layer layer, gsrq_call call, PrefillPlan plan) {
  extern __shared__ char memory[];
  Shared<Dim>& shared = *reinterpret_cast<Shared<Dim>*>(memory);
  const int tx = threadIdx.x % 16, ty = threadIdx.x / 16, d = layer.head_dim, group = plan.group;
  const int64_t b = blockIdx.z, head = blockIdx.y / plan.splits;
  const int split = blockIdx.y % plan.splits;
  const RowLengths row = row_lengths(layer, call, b);
  const int fresh = static_cast<int>(row.total - row.past), step0 = blockIdx.x * plan.tokens;
  const int rows = min(plan.tokens, call.steps - step0) * group;

  float out[4][Dim / 16] = {};
  float maximum[4] = {-INFINITY, -INFINITY, -INFINITY, -INFINITY}, sum[4] = {};
  if (step0 < fresh) {
    const Visibility visible(layer, row);
    const int32_t p0 = static_cast<int32_t>(row.past) + step0;
    const int32_t p1 = static_cast<int32_t>(row.past) + min(step0 + plan.tokens, fresh) - 1;
    const TileList list(visible, p0, p1, kKeys);
    const int32_t chunk = (list.count() + plan.splits - 1) / plan.splits;
    const int32_t stop = min(list.count(), (split + 1) * chunk);

    for (int i = threadIdx.x; i < kQueryRows * (Dim / 2); i += kThreads) {
      const int r = i / (Dim / 2), pair = i % (Dim / 2);
      int first, second;
      pair_elements(layer, pair, &first, &second);
      float2 x = make_float2(0, 0);
      const int step = step0 + r / group;
      if (r < rows && step < fresh && pair < d / 2)
        x = rotated_query(layer, call, b, head * group + r % group, step, pair, row.past + step);
      shared.query[r][first] = x.x, shared.query[r][second] = x.y;
    }
    for (int32_t tile = split * chunk; tile < stop; ++tile) {
      const int index = list.index(tile);
      const Segment& segment = list.segments[index];
      const int32_t token0 = list.first(index, tile, kKeys);
      const int count = min(kKeys, segment.stop - token0);
      const int64_t at = (b * layer.kv_heads + head) * (segment.coded ? plan.coded : plan.exact) + token0 - segment.offset;
      const float* keys = static_cast<const float*>(segment.coded ? plan.coded_keys : plan.exact_keys) + at * d;
      const float* values = static_cast<const float*>(segment.coded ? plan.coded_values : plan.exact_values) + at * d;
      __syncthreads();
      for (int i = threadIdx.x; i < kKeys * Dim; i += kThreads) {
        const int k = i / Dim, e = i % Dim;
        const bool real = k < count && e < d;
        shared.key[k][e] = real ? keys[static_cast<int64_t>(k) * d + e] : 0.0f;
        shared.value[k][e] = real ? values[static_cast<int64_t>(k) * d + e] : 0.0f;
      }
      __syncthreads();
      float score[4][2] = {};
#pragma unroll 4
      for (int e = 0; e < Dim; e += 4) {
        float4 k[2];
        k[0] = *reinterpret_cast<const float4*>(&shared.key[tx][e]);
        k[1] = *reinterpret_cast<const float4*>(&shared.key[tx + 16][e]);
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          const float4 q = *reinterpret_cast<const float4*>(&shared.query[4 * ty + i][e]);
#pragma unroll
          for (int j = 0; j < 2; ++j)
            score[i][j] += q.x * k[j].x + q.y * k[j].y + q.z * k[j].z + q.w * k[j].w;
        }
      }
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int32_t p = min(p0 + (4 * ty + i) / group, p1);
        const Interval seen = visible.interval(index, p, visible.seen(p));
        float most = maximum[i];
#pragma unroll
        for (int j = 0; j < 2; ++j) {
          const int k = tx + 16 * j;
          float s = score[i][j] * layer.scale;
          if (layer.softcap > 0) s = layer.softcap * tanhf(s / layer.softcap);
          score[i][j] = k < count && token0 + k >= seen.low && token0 + k < seen.high ? s : -INFINITY;
          most = fmaxf(most, score[i][j]);
        }
        for (int offset = 8; offset > 0; offset /= 2) most = fmaxf(most, __shfl_xor_sync(0xffffffffu, most, offset));
        const float shrink = most == -INFINITY ? 1.0f : expf(maximum[i] - most);
        maximum[i] = most;
        sum[i] *= shrink;
#pragma unroll
        for (int e = 0; e < Dim / 16; ++e) out[i][e] *= shrink;
#pragma unroll
        for (int j = 0; j < 2; ++j) {
          const float weight = score[i][j] == -INFINITY ? 0.0f : expf(score[i][j] - most);
          sum[i] += weight;
          shared.weight[4 * ty + i][tx + 16 * j] = weight;
        }
      }
      __syncwarp();  // a row's weights are written and read by the same half warp
#pragma unroll 2
      for (int k = 0; k < kKeys; ++k) {
        float weight[4];
#pragma unroll
        for (int i = 0; i < 4; ++i) weight[i] = shared.weight[4 * ty + i][k];
#pragma unroll
        for (int j = 0; j < Dim / 64; ++j) {
          const float4 v = *reinterpret_cast<const float4*>(&shared.value[k][4 * tx + 64 * j]);
#pragma unroll
          for (int i = 0; i < 4; ++i) {
            out[i][4 * j] += weight[i] * v.x, out[i][4 * j + 1] += weight[i] * v.y;
            out[i][4 * j + 2] += weight[i] * v.z, out[i][4 * j + 3] += weight[i] * v.w;
          }
        }
      }
      __syncwarp();
    }
#pragma unroll
    for (int i = 0; i < 4; ++i)
      for (int offset = 8; offset > 0; offset /= 2) sum[i] += __shfl_xor_sync(0xffffffffu, sum[i], offset);
  }

#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const int r = 4 * ty + i, step = step0 + r / group;
    if (r >= rows) continue;
    const int64_t h = head * group + r % group;
    const bool real = step < fresh && sum[i] > 0;
    const int64_t at = (((split * static_cast<int64_t>(call.batch)) + b) * layer.heads + h) * call.steps + step;
    if (plan.splits > 1 && tx == 0) plan.maxima[at] = maximum[i], plan.sums[at] = step < fresh ? sum[i] : 0.0f;
    const float inverse = real ? 1.0f / sum[i] : 0.0f;
#pragma unroll
    for (int j = 0; j < Dim / 16; ++j) {
      const int e = 4 * tx + 64 * (j / 4) + j % 4;
      if (e >= d) continue;
      if (plan.splits > 1) plan.partial[at * d + e] = out[i][j];
      else store(call.output, ((b * call.steps + step) * layer.heads + h) * d + e, real ? out[i][j] * inverse : 0.0f, call.dtype);
    }
  }
}

template <int Dim>
int launch(const gsrq_layer& layer, const gsrq_call& call, const PrefillPlan& plan, cudaStream_t stream) {
  constexpr int bytes = sizeof(Shared<Dim>);
  if (cudaFuncSetAttribute(attend<Dim>, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes) != cudaSuccess)
    return launched("prefill_plain");
  const dim3 grid(static_cast<unsigned>(plan.tiles), static_cast<unsigned>(layer.kv_heads * plan.splits),
                  static_cast<unsigned>(call.batch));
  attend<Dim><<<grid, kThreads, bytes, stream>>>(layer, call, plan);
  return launched("prefill_plain");
}

}  // namespace

int prefill_plain(const gsrq_layer& layer, const gsrq_call& call, const PrefillPlan& plan, cudaStream_t stream) {
  if (layer.head_dim <= 64) return launch<64>(layer, call, plan, stream);
  if (layer.head_dim <= 128) return launch<128>(layer, call, plan, stream);
  return launch<256>(layer, call, plan, stream);
}

}  // namespace gsrq::cuda
