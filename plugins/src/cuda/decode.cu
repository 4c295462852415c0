// Decode attention in code space: one new token a row against the coded tokens and the exact ones. docs/cuda.md.
//
// Scores. A cluster serves one KV head; each CTA keeps a slice of the key codebook (32 dims, int8) in shared memory. A
// warp gathers the codewords of 16 tokens straight into the fragments of an int8 matrix product with a matrix of stage
// multipliers, which adds the stages exactly; the sum, a RoPE pair in each thread, is turned by the token's offset in
// the tile and multiplied on tensor cores with the queries turned back by the tile's first position. Partial scores
// of the slices are exchanged through distributed shared memory.
// Values. Softmax weights, as integers, are added into a bin for each (stage, codeword, head); a second kernel multiplies
// the bins with the codebook, a third adds the exact tokens. Integer adds and fixed orders: the same bits every run.
#include <algorithm>
#include <map>
#include <mutex>
#include <tuple>

#include "decode_combine.cuh"
#include "decode_kernel.cuh"
#include "launch.cuh"

namespace gsrq::cuda {
namespace decoding {
namespace {

// The key codewords as int8 slices; see Constants::words. One thread a byte.
__global__ void slice_keys(const __grid_constant__ gsrq_layer layer, const __grid_constant__ DecodePlan plan,
                           signed char* out) {
  const int64_t i = blockIdx.x * static_cast<int64_t>(blockDim.x) + threadIdx.x;
  const int64_t per_cta = static_cast<int64_t>(plan.blocks) * kBlockBytes;
  if (i >= layer.kv_heads * static_cast<int64_t>(plan.cluster) * per_cta) return;
  const int kv_head = static_cast<int>(i / (plan.cluster * per_cta)), rank = static_cast<int>(i / per_cta % plan.cluster);
  const int byte = static_cast<int>(i % per_cta);
  const int block = byte / kBlockBytes, code = byte / 128 % kCodewords;
  const int slot = byte / 32 % 4, inside = byte % 32;
  const int slice = rank % plan.slices, split = rank / plan.slices % plan.splits;
  const int plane = rank / (plan.slices * plan.splits);
  const int stage = split * plan.blocks * kBlockStages + stage_of(plan.blocks, block, slot);
  signed char result = 0;
  if (stage < layer.keys.stages) {
    int elements[2];
    pair_elements(layer, slice * 16 + inside / 2, &elements[0], &elements[1]);
    const int64_t at = static_cast<int64_t>(kv_head) * layer.head_dim + elements[inside % 2];
    const int64_t group = at / layer.keys.width, column = at % layer.keys.width;
    const float x = __half2float(static_cast<const __half*>(
        layer.keys.codewords)[((group * layer.keys.stages + stage) * kCodewords + code) * layer.keys.width + column]);
    const float units = ldexpf(x, -layer.exponents[stage]);
    const float upper = fminf(fmaxf(rintf(units), -127.0f), 127.0f);
    result = static_cast<signed char>(
        plane == 0 ? upper : fminf(fmaxf(rintf((units - upper) * 256), -127.0f), 127.0f));
  }
  out[i] = result;
}

struct KeyScale {  // of a CTA's stages: codeword sum = integers * unit
  float unit, shrink;
  signed char multipliers[kMostBlocks * kBlockStages];
};

struct KeyScales {
  KeyScale scales[kMostCluster];
};

// One warp a CTA of a cluster.
__global__ void fill_lanes(const __grid_constant__ gsrq_layer layer, const __grid_constant__ DecodePlan plan,
                           const __grid_constant__ KeyScales scales, LaneConstants* out) {
  const int rank = blockIdx.x, lane = threadIdx.x, g = lane / 4, t = lane % 4, half = layer.half_rope;
  const int slice = rank % plan.slices, part_of_stages = rank / plan.slices;
  const KeyScale& scale = scales.scales[part_of_stages];
  const LanePlace place(plan.lanes, lane);
  const auto turn = [&](int row, int half_of_slice, int k, float by) {  // row 0 has the table's scale
    const int p = place.pair(slice, half_of_slice, k);
    if (p >= half) return make_float2(by, 0);
    const int64_t at = static_cast<int64_t>(min(row, layer.positions - 1)) * half + p;
    return make_float2(layer.cos[at] / layer.cos[p] * by, layer.sin[at] / layer.cos[p] * by);
  };
  LaneConstants c{};
  for (int u = 0; u < 2; ++u)
    for (int k = 0; k < 2; ++k) {
      for (int o = 0; o < 2; ++o) c.turn[o][u][k] = turn(g + 8 * o, place.key_half(o, u), k, scale.shrink);
      c.step[u][k] = turn(kNextTile, u ^ place.swapped, k, 1.0f);
    }
  for (int i = 0; i < plan.blocks; ++i) {
    const uint32_t m = static_cast<uint8_t>(scale.multipliers[stage_of(plan.blocks, i, t)]);
    c.low[i] = g < 4 ? m << (8 * g) : 0;
    c.high[i] = g < 4 ? 0 : m << (8 * (g - 4));
  }
  c.unit = scale.unit;
  out[rank * 32 + lane] = c;
}

KeyScales key_scales(const gsrq_layer& layer, const DecodePlan& plan) {
  KeyScales out{};
  for (int plane = 0; plane < plan.planes; ++plane)
    for (int split = 0; split < plan.splits; ++split) {
      KeyScale& scale = out.scales[plane * plan.splits + split];
      const int first = split * plan.blocks * kBlockStages;
      const int stop = std::min(first + plan.blocks * kBlockStages, layer.keys.stages);
      int lowest = 1000;
      for (int r = first; r < stop; ++r) lowest = std::min(lowest, layer.exponents[r]);
      float bound = 0;
      for (int r = first; r < stop; ++r) {
        scale.multipliers[r - first] = static_cast<signed char>(1 << (layer.exponents[r] - lowest));
        bound += 127.0f * scale.multipliers[r - first];
      }
      if (first >= stop) lowest = 0;
      int shift = 0;  // turned sums must stay in float16's range
      while (std::ldexp(bound * 1.5f, -shift) > 32768.0f) ++shift;
      scale.shrink = std::ldexp(1.0f, -shift);
      scale.unit = std::ldexp(1.0f, lowest + shift - 8 * plane);
    }
  return out;
}

bool multipliers_fit(const gsrq_layer& layer) {
  int least = layer.exponents[0], most = layer.exponents[0];
  for (int r = 1; r < layer.keys.stages; ++r) {
    least = std::min(least, layer.exponents[r]);
    most = std::max(most, layer.exponents[r]);
  }
  return most - least <= kExponentSpread;
}

// Kernels that take words exist for four or eight query heads a KV head and up to 16 value stages.
Kernel kernel_of(const DecodePlan& plan, Reading how) {
  if (plan.lanes == 1) return kernel_of_one(plan);
  if (plan.lanes == 8) return kernel_of_eight(plan, how);
  return plan.stride == 64 ? kernel_of_four(plan, how) : kernel_of_four_narrow(plan);
}

// A token's codes are whole words: the kernel needs no bounds inside of them.
bool in_words(const gsrq_layer& layer, const DecodePlan& plan) {
  const int key_bytes = layer.keys.groups * layer.keys.stages, value_bytes = layer.values.groups * layer.values.stages;
  return plan.lanes >= 4 && plan.ways == 1 && kKeyWarps % plan.owners == 0 &&
         layer.keys.stages % kBlockStages == 0 &&
         plan.all_blocks == plan.blocks * plan.splits && key_bytes % 4 == 0 &&
         value_bytes % 4 == 0 && plan.slots % 4 == 0;
}

cudaLaunchConfig_t launch_config(const DecodePlan& plan, cudaLaunchAttribute* attribute, int clusters) {
  attribute->id = cudaLaunchAttributeClusterDimension;
  attribute->val.clusterDim = {static_cast<unsigned>(plan.cluster), 1, 1};
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(static_cast<unsigned>(clusters * plan.cluster));
  config.blockDim = dim3(kDecodeThreads);
  config.dynamicSmemBytes = static_cast<size_t>(plan.shared_bytes);
  config.attrs = attribute;
  config.numAttrs = 1;
  return config;
}

bool prepare_kernel(Kernel kernel, const DecodePlan& plan) {
  cudaFuncAttributes attributes;
  if (cudaFuncGetAttributes(&attributes, kernel) != cudaSuccess || attributes.ptxVersion < 90)
    return false;  // compiled for an older one, from whose code the kernel is left out
  return cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, kSharedLimit) == cudaSuccess &&
         (plan.cluster <= 8 || cudaFuncSetAttribute(kernel, cudaFuncAttributeNonPortableClusterSizeAllowed, 1) == cudaSuccess);
}

// Clusters that run at once on the current device, 0 where none can; asked once a device and kernel.
int resident_clusters(const DecodePlan& plan) {
  static std::mutex mutex;
  static std::map<std::tuple<int, const void*, int, int>, int> known;
  const Kernel kernel = kernel_of(plan, Reading::bytes);
  int device = 0;
  if (kernel == nullptr || cudaGetDevice(&device) != cudaSuccess) return 0;
  const auto key = std::make_tuple(device, reinterpret_cast<const void*>(kernel), plan.cluster, plan.shared_bytes);
  const std::lock_guard<std::mutex> lock(mutex);
  const auto found = known.find(key);
  if (found != known.end()) return found->second;
  int clusters = 0;
  if (compute_major() >= 9) {
    cudaLaunchAttribute attribute;
    const cudaLaunchConfig_t config = launch_config(plan, &attribute, 1);
    const bool ready =
        prepare_kernel(kernel, plan) && prepare_kernel(kernel_of(plan, Reading::words), plan) &&
        prepare_kernel(kernel_of(plan, Reading::words_of_pages), plan) &&
        cudaOccupancyMaxActiveClusters(&clusters, kernel, &config) == cudaSuccess;
    if (!ready) clusters = 0;
    cudaGetLastError();
  }
  known[key] = clusters;
  return clusters;
}

Memory take_memory(const gsrq_layer& layer, const gsrq_call& call, const DecodePlan& plan, int vheads, int clusters,
                   Arena& workspace) {
  const int64_t rows = static_cast<int64_t>(vheads) * call.batch, partials = rows + clusters;
  Memory m{};
  m.bins = workspace.take<float>(partials * plan.ways * plan.bins());
  m.scratch = workspace.take<float>(2LL * clusters * plan.cluster * plan.bins());
  m.state = workspace.take<float2>(partials * plan.lanes);
  m.combined = workspace.take<float2>(rows * plan.lanes);
  m.owners = workspace.take<int2>(rows);
  const int sub_vectors = plan.slots / layer.values.stages;
  m.values = workspace.take<float>(rows * sub_vectors * value_parts(layer, call, plan, vheads) * plan.lanes * plan.width);
  m.exact = workspace.take<float>(rows * exact_splits(layer) * plan.lanes * plan.head_dim);
  m.exact_state = workspace.take<float2>(rows * exact_splits(layer) * plan.lanes);
  return m;
}

Constants take_constants(const gsrq_layer& layer, const DecodePlan& plan, Arena& prepared) {
  Constants c{};
  c.words = prepared.take<signed char>(static_cast<int64_t>(layer.kv_heads) * plan.cluster * plan.blocks * kBlockBytes);
  c.lanes = prepared.take<LaneConstants>(plan.cluster * 32);
  return c;
}

bool plan_of(const gsrq_layer& layer, DecodePlan* plan) {
  return layer.key_center == nullptr && make_decode_plan(layer, plan) && multipliers_fit(layer) && resident_clusters(*plan) > 0;
}

}  // namespace
}  // namespace decoding

using namespace decoding;

int decode_prepare(const gsrq_layer& layer, Arena& prepared, cudaStream_t stream, bool launch) {
  if (layer.key_center != nullptr) return lookup_prepare(layer, prepared, stream, launch);
  DecodePlan plan;
  if (!plan_of(layer, &plan)) return 0;
  const Constants constants = take_constants(layer, plan, prepared);
  if (!launch) return 0;
  const int64_t bytes = static_cast<int64_t>(layer.kv_heads) * plan.cluster * plan.blocks * kBlockBytes;
  slice_keys<<<static_cast<unsigned>((bytes + 255) / 256), 256, 0, stream>>>(layer, plan,
                                                                             const_cast<signed char*>(constants.words));
  fill_lanes<<<plan.cluster, 32, 0, stream>>>(layer, plan, key_scales(layer, plan),
                                              const_cast<LaneConstants*>(constants.lanes));
  return launched("decode_prepare");
}

bool decode_supported(const gsrq_layer& layer, const gsrq_call& call) {
  DecodePlan plan;
  return call.steps == 1 && (layer.key_center != nullptr ? lookup_supported(layer) : plan_of(layer, &plan));
}

void decode_workspace(const gsrq_layer& layer, const gsrq_call& call, Arena& workspace) {
  if (layer.key_center != nullptr) return lookup_workspace(layer, call, workspace);
  DecodePlan plan;
  if (!plan_of(layer, &plan)) return;
  take_memory(layer, call, plan, layer.kv_heads * plan.parts, resident_clusters(plan), workspace);
}

int decode(const gsrq_layer& layer, const gsrq_call& call, Arena& prepared, Arena& workspace, cudaStream_t stream) {
  if (layer.key_center != nullptr) return lookup(layer, call, prepared, workspace, stream);
  DecodePlan plan;
  if (!plan_of(layer, &plan)) return fail("the fast decode does not apply");
  const int vheads = layer.kv_heads * plan.parts, clusters = resident_clusters(plan);
  const Constants constants = take_constants(layer, plan, prepared);
  const Memory memory = take_memory(layer, call, plan, vheads, clusters, workspace);
  const bool has_coded = gsrq_coded(call.max_total, layer.sinks, layer.window, layer.block) > 0;
  if (has_coded) {
    cudaLaunchAttribute attributes[2];
    cudaLaunchConfig_t config = launch_config(plan, attributes, clusters);
    attributes[1] = early_launch();
    config.numAttrs = 2;
    config.stream = stream;
    const Kernel kernel = kernel_of(plan, reading_of(layer, call, in_words(layer, plan), kTile));
    if (cudaLaunchKernelEx(&config, kernel, layer, call, plan, constants, memory, vheads) != cudaSuccess)
      return launched("decode_kernel");
  }
  return combine(layer, call, plan, memory, {vheads, clusters, 0, kItemLead, has_coded, plan.lanes > 1}, true, stream);
}

}  // namespace gsrq::cuda
