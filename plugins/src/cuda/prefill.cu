// Attention for any number of new tokens: keys and values are reconstructed into the workspace, then read by a
// flash-attention kernel; few queries over a long cache split the keys, and the parts are combined in a fixed order.
#include <algorithm>

#include "prefill.cuh"

namespace gsrq::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int64_t kWave = 132;  // thread blocks that fill the larger GPUs once
constexpr int kKeysOfSplit = 256, kMostSplits = 64;

__device__ void put(float* to, float x) { *to = x; }
__device__ void put(__half* to, float x) { *to = __float2half_rn(fminf(fmaxf(x, -65504.0f), 65504.0f)); }

// Element of a coded vector: the sum of its codewords. codes: of the KV head whose first element is `first`.
__device__ float decoded(const gsrq_codebook& book, const int8_t* codes, int first, int element) {
  const int g = element / book.width, j = element % book.width;
  const uint8_t* bytes = reinterpret_cast<const uint8_t*>(codes) + (g - first / book.width) * book.stages;
  const __half* words = static_cast<const __half*>(book.codewords) +
                        static_cast<int64_t>(g) * book.stages * 256 * book.width + j;
  float sum = 0;
#pragma unroll 4
  for (int r = 0; r < book.stages; ++r)
    sum += __half2float(words[(static_cast<int64_t>(r) * 256 + bytes[r]) * book.width]);
  return sum;
}

// Grid: (entries / entries of a block, KV heads, batch). A thread is a RoPE pair of one entry, coded ones first.
template <class T>
__global__ void __launch_bounds__(kThreads) gather(gsrq_layer layer, gsrq_call call, PrefillPlan plan) {
  const int d = layer.head_dim, pairs = d / 2, each = kThreads / pairs;
  const int pair = threadIdx.x % pairs, sub = threadIdx.x / pairs;
  if (sub >= each) return;
  const int64_t entry = blockIdx.x * static_cast<int64_t>(each) + sub, head = blockIdx.y, b = blockIdx.z;
  const RowLengths row = row_lengths(layer, call, b);
  if (row.total == row.past) return;
  const int64_t oldest = Visibility(layer, row).oldest(static_cast<int32_t>(row.past));
  int first, second;
  pair_elements(layer, pair, &first, &second);
  int64_t token, at;
  float2 key, value;
  const bool coded = entry < plan.coded;
  if (coded) {
    token = layer.sinks + entry;
    if (entry >= row.after || token < oldest) return;
    const int64_t line = code_row(call, static_cast<int32_t>(b), entry);
    const int8_t* codes = call.key_codes + code_places(layer, layer.keys, static_cast<int>(head)).at(line);
    const int base = static_cast<int>(head) * d;
    key = make_float2(decoded(layer.keys, codes, base, base + first), decoded(layer.keys, codes, base, base + second));
    codes = call.value_codes + code_places(layer, layer.values, static_cast<int>(head)).at(line);
    value = make_float2(decoded(layer.values, codes, base, base + first), decoded(layer.values, codes, base, base + second));
    at = ((b * layer.kv_heads + head) * plan.coded + entry) * plan.stride;
  } else {
    const int64_t e = entry - plan.coded;
    token = e < layer.sinks ? e : e + row.before;
    if (e >= plan.exact || token >= row.total || token < oldest) return;
    const auto pair_of = [&](bool values) {
      const Origin origin = exact_origin(layer, call, values, b, token, row.past);
      const int its = static_cast<int>(head);
      return make_float2(exact_element(origin, its, first), exact_element(origin, its, second));
    };
    key = pair_of(false), value = pair_of(true);
    at = ((b * layer.kv_heads + head) * plan.exact + e) * plan.stride;
  }
  if (coded && layer.key_center != nullptr) {  // turned already, less the turned center
    const float* m = layer.key_center + head * d;
    const float2 center = rotated(layer, pair, token, make_float2(m[first], m[second]));
    key = make_float2(key.x + center.x, key.y + center.y);
  } else {
    key = rotated(layer, pair, token, key);
  }
  T* keys = static_cast<T*>(coded ? plan.coded_keys : plan.exact_keys) + at;
  T* values = static_cast<T*>(coded ? plan.coded_values : plan.exact_values) + at;
  put(keys + first, key.x), put(keys + second, key.y);
  put(values + first, value.x), put(values + second, value.y);
  if (pair == 0)
    for (int e = d; e < plan.stride; ++e) put(keys + e, 0.0f), put(values + e, 0.0f);
}

// Block: one query of one head. The splits' outputs, each relative to its own maximum, in order.
__global__ void __launch_bounds__(kThreads) combine(gsrq_layer layer, gsrq_call call, PrefillPlan plan) {
  const int64_t at = blockIdx.x, rows = static_cast<int64_t>(call.batch) * layer.heads * call.steps;
  const int64_t step = at % call.steps, head = at / call.steps % layer.heads, b = at / call.steps / layer.heads;
  const int d = layer.head_dim;
  const bool real = step < call.new_lengths[b];
  float maximum = -INFINITY, sum = 0;
  if (real) {
    for (int s = 0; s < plan.splits; ++s) maximum = fmaxf(maximum, plan.maxima[s * rows + at]);
    for (int s = 0; s < plan.splits; ++s)
      if (plan.sums[s * rows + at] > 0) sum += plan.sums[s * rows + at] * expf(plan.maxima[s * rows + at] - maximum);
  }
  for (int e = threadIdx.x; e < d; e += blockDim.x) {
    float out = 0;
    if (real && sum > 0) {
      for (int s = 0; s < plan.splits; ++s)
        if (plan.sums[s * rows + at] > 0)
          out += plan.partial[(s * rows + at) * d + e] * expf(plan.maxima[s * rows + at] - maximum);
      out /= sum;
    }
    store(call.output, ((b * call.steps + step) * layer.heads + head) * d + e, out, call.dtype);
  }
}

}  // namespace

PrefillPlan prefill_plan(const gsrq_layer& layer, const gsrq_call& call, Arena& workspace) {
  PrefillPlan plan{};
  plan.tensor = call.dtype != GSRQ_F32;
  plan.group = layer.heads / layer.kv_heads;
  plan.tokens = (plan.tensor ? kTensorRows : kQueryRows) / plan.group;
  plan.tiles = (call.steps + plan.tokens - 1) / plan.tokens;
  const int64_t heads = static_cast<int64_t>(call.batch) * layer.kv_heads, blocks = heads * plan.tiles;
  plan.splits = 1;
  if (blocks > 0 && blocks < kWave)
    plan.splits = static_cast<int32_t>(std::max<int64_t>(
        1, std::min({2 * kWave / blocks, (call.max_total + kKeysOfSplit - 1) / kKeysOfSplit, int64_t{kMostSplits}})));
  plan.coded = gsrq_coded(call.max_total, layer.sinks, layer.window, layer.block);
  plan.exact = std::min<int64_t>(call.max_total, static_cast<int64_t>(call.steps) + layer.sinks + layer.window + layer.block);
  const int64_t d = layer.head_dim, size = plan.tensor ? 2 : 4;
  plan.stride = plan.tensor ? (layer.head_dim + 7) / 8 * 8 : layer.head_dim;
  const int64_t entry = heads * plan.stride * size;
  plan.coded_keys = workspace.take<char>(plan.coded * entry);
  plan.coded_values = workspace.take<char>(plan.coded * entry);
  plan.exact_keys = workspace.take<char>(plan.exact * entry);
  plan.exact_values = workspace.take<char>(plan.exact * entry);
  if (plan.splits > 1) {
    const int64_t rows = plan.splits * static_cast<int64_t>(call.batch) * layer.heads * call.steps;
    plan.partial = workspace.take<float>(rows * d);
    plan.maxima = workspace.take<float>(rows);
    plan.sums = workspace.take<float>(rows);
  }
  return plan;
}

int prefill_gather(const gsrq_layer& layer, const gsrq_call& call, const PrefillPlan& plan, cudaStream_t stream) {
  const int64_t entries = plan.coded + plan.exact, each = kThreads / (layer.head_dim / 2);
  if (entries == 0) return 0;
  const dim3 grid(static_cast<unsigned>((entries + each - 1) / each), static_cast<unsigned>(layer.kv_heads),
                  static_cast<unsigned>(call.batch));
  if (plan.tensor) gather<__half><<<grid, kThreads, 0, stream>>>(layer, call, plan);
  else gather<float><<<grid, kThreads, 0, stream>>>(layer, call, plan);
  return launched("prefill_gather");
}

void prefill_workspace(const gsrq_layer& layer, const gsrq_call& call, Arena& workspace) {
  prefill_plan(layer, call, workspace);
}

int prefill(const gsrq_layer& layer, const gsrq_call& call, Arena& workspace, cudaStream_t stream) {
  if (call.batch == 0 || call.steps == 0) return 0;
  if (call.batch > 65535 || layer.kv_heads > 65535 / kMostSplits)
    return fail("prefill: batch %d may be 65535 at most, kv_heads %d %d", call.batch, layer.kv_heads, 65535 / kMostSplits);
  const PrefillPlan plan = prefill_plan(layer, call, workspace);
  if (prefill_gather(layer, call, plan, stream)) return 1;
  if (plan.tensor ? prefill_tensor(layer, call, plan, stream) : prefill_plain(layer, call, plan, stream)) return 1;
  if (plan.splits == 1) return 0;
  const int64_t rows = static_cast<int64_t>(call.batch) * layer.heads * call.steps;
  if (rows > INT32_MAX) return fail("prefill: %lld query rows are too many", static_cast<long long>(rows));
  combine<<<static_cast<unsigned>(rows), layer.head_dim <= 64 ? 64 : 128, 0, stream>>>(layer, call, plan);
  return launched("prefill_combine");
}

}  // namespace gsrq::cuda
