// The C interface: checks, memory shares, and the order of a call's parts.
#include <algorithm>
#include <cmath>
#include <cstdarg>
#include <cstdio>
#include <cstring>

#include "decode_plan.hpp"
#include "internal.cuh"

namespace gsrq::cuda {
namespace {

thread_local char message[512];

constexpr int64_t kMostHeadDim = 256, kMostStages = 256, kMostGroup = 16;

int check_codebook(const gsrq_layer& layer, const gsrq_codebook& book, const char* side) {
  const int64_t total = static_cast<int64_t>(layer.kv_heads) * layer.head_dim;
  if (book.groups < 1 || book.stages < 1 || book.stages > kMostStages || book.width < 1)
    return fail("%s: groups %d, stages %d (1 to 256), width %d must be positive", side, book.groups, book.stages, book.width);
  if (static_cast<int64_t>(book.groups) * book.width != total)
    return fail("%s: groups %d * width %d must be kv_heads * head_dim = %lld", side, book.groups, book.width,
                static_cast<long long>(total));
  if (book.width % layer.head_dim != 0 && layer.head_dim % book.width != 0)
    return fail("%s: width %d must divide head_dim %d or be a multiple of it", side, book.width, layer.head_dim);
  if (book.codewords == nullptr || book.transform == nullptr) return fail("%s: codewords or transform is null", side);
  return 0;
}

int check(const gsrq_layer& layer) {
  if (layer.heads < 1 || layer.kv_heads < 1 || layer.heads % layer.kv_heads != 0)
    return fail("heads %d must be a positive multiple of kv_heads %d", layer.heads, layer.kv_heads);
  if (layer.heads / layer.kv_heads > kMostGroup)
    return fail("%d query heads a KV head; at most %lld are supported", layer.heads / layer.kv_heads,
                static_cast<long long>(kMostGroup));
  if (layer.head_dim < 2 || layer.head_dim % 2 != 0 || layer.head_dim > kMostHeadDim)
    return fail("head_dim %d must be even and at most %lld", layer.head_dim, static_cast<long long>(kMostHeadDim));
  if (layer.half_rope < 0 || 2 * layer.half_rope > layer.head_dim)
    return fail("half_rope %d must be 0 to head_dim / 2 = %d", layer.half_rope, layer.head_dim / 2);
  if (layer.sinks < 0 || layer.window < 0 || layer.block < 1)
    return fail("need sinks >= 0, window >= 0, block >= 1; got %d, %d, %d", layer.sinks, layer.window, layer.block);
  if (layer.beam < 1 || layer.beam > GSRQ_CODEBOOK_SIZE)
    return fail("beam %d must be 1 to %d", layer.beam, GSRQ_CODEBOOK_SIZE);
  if (layer.sliding_window < 0) return fail("sliding_window %d is negative", layer.sliding_window);
  if (!std::isfinite(layer.scale) || !std::isfinite(layer.softcap) || layer.softcap < 0)
    return fail("scale and softcap must be finite, softcap not negative");
  if (layer.positions < 1 || (layer.half_rope > 0 && (layer.cos == nullptr || layer.sin == nullptr)))
    return fail("cos and sin must have at least one position (positions is %d)", layer.positions);
  return check_codebook(layer, layer.keys, "keys") || check_codebook(layer, layer.values, "values");
}

int check(const gsrq_layer& layer, const gsrq_call& call) {
  if (check(layer)) return 1;
  if (call.batch < 0 || call.steps < 0) return fail("batch %d and steps %d must not be negative", call.batch, call.steps);
  if (!is_dtype(call.dtype) || !is_dtype(call.exact_dtype))
    return fail("dtype %d and exact_dtype %d must be GSRQ_F32, GSRQ_F16 or GSRQ_BF16", call.dtype, call.exact_dtype);
  if (call.max_total < 0 || call.max_total > layer.positions)
    return fail("max_total %lld exceeds the rotary table's %d positions", static_cast<long long>(call.max_total),
                layer.positions);
  const int64_t coded = gsrq_coded(call.max_total, layer.sinks, layer.window, layer.block);
  const int64_t rows = call.block_table == nullptr ? call.capacity : call.page;
  if (layer.codes_by_head && (rows % kCodeTile != 0 || layer.block % kCodeTile != 0))
    return fail("%lld rows of codes and blocks of %d: ordered by head, both must be multiples of %d", static_cast<long long>(rows),
                layer.block, kCodeTile);
  if (call.block_table == nullptr && coded > call.capacity)
    return fail("%lld coded tokens exceed the cache's capacity of %lld", static_cast<long long>(coded),
                static_cast<long long>(call.capacity));
  if (call.block_table != nullptr && (call.page < 1 || static_cast<int64_t>(call.page) * call.table_stride < coded))
    return fail("%lld coded tokens exceed %d pages of %d", static_cast<long long>(coded), call.table_stride, call.page);
  return 0;
}

int check_memory(const gsrq_layer& layer, const gsrq_call& call, const void* prepared, const void* workspace,
                 int64_t bytes) {
  if (check(layer, call)) return 1;
  if (layer.keys.planes != 1 && layer.keys.planes != 2)
    return fail("keys.planes is %d: call gsrq_cuda_inspect first", layer.keys.planes);
  const int64_t need = gsrq_cuda_workspace_bytes(&layer, &call);
  if (bytes < need || (need > 0 && workspace == nullptr))
    return fail("the workspace has %lld bytes, %lld are needed", static_cast<long long>(bytes), static_cast<long long>(need));
  if (prepared == nullptr) return fail("prepared is null: call gsrq_cuda_prepare first");
  const bool has_codes = gsrq_coded(call.max_total, layer.sinks, layer.window, layer.block) > 0;
  if (has_codes && (call.key_codes == nullptr || call.value_codes == nullptr)) return fail("the code tensors are null");
  if (!aligned(call.key_codes) || !aligned(call.value_codes)) return fail("the code tensors must be aligned to 16 bytes");
  for (const void* pointer : {call.query, call.key, call.value, static_cast<const void*>(call.past_lengths),
                              static_cast<const void*>(call.new_lengths), static_cast<const void*>(call.output),
                              static_cast<const void*>(call.key_exact), static_cast<const void*>(call.value_exact)})
    if (pointer == nullptr) return fail("a tensor of the call is null");
  for (const void* pointer : {call.key, call.value, static_cast<const void*>(call.key_exact),
                              static_cast<const void*>(call.value_exact)})
    if (!aligned(pointer)) return fail("key, value and the exact buffers must be aligned to 16 bytes");
  return 0;
}

// [0]: bit pattern of the largest deviation of a table row from rotations by its position; then for each key stage the
// largest |codeword| and the finest power of two that all its codewords are multiples of.
struct Traits {
  int deviation;
  int largest[256];
  int finest[256];
};

__global__ void clear_traits(Traits* traits) {
  if (threadIdx.x == 0) traits->deviation = 0;
  traits->largest[threadIdx.x] = 0;
  traits->finest[threadIdx.x] = 64;
}

// float16 x = m * 2^e with odd m: e + 32, so that 0 never is a result; 64 for zero.
__device__ int lowest_bit(unsigned short bits) {
  const int mantissa = bits & 0x3ff, exponent = (bits >> 10) & 0x1f;
  if (exponent == 0 && mantissa == 0) return 64;
  const int whole = exponent == 0 ? mantissa : mantissa | 0x400;
  return (exponent == 0 ? 1 : exponent) - 25 + __ffs(whole) - 1 + 32;
}

__global__ void inspect_codewords(gsrq_codebook book, Traits* traits) {
  const int stage = blockIdx.x % book.stages;
  const int64_t per = 256 * static_cast<int64_t>(book.width), base = blockIdx.x * per;
  const unsigned short* words = static_cast<const unsigned short*>(book.codewords);
  int largest = 0, finest = 64;
  for (int64_t i = threadIdx.x; i < per; i += blockDim.x) {
    const unsigned short bits = words[base + i];
    largest = max(largest, static_cast<int>(bits & 0x7fff));
    finest = min(finest, lowest_bit(bits));
  }
  atomicMax(&traits->largest[stage], largest);
  atomicMin(&traits->finest[stage], finest);
}

constexpr float kGeometric = 2e-4f;

// Row j must be row (j - j % 16) turned by row j % 16 and, so that the rows 16 apart are right too, row 16 i must be
// that of 16 (i - 1) turned by row 16.
__global__ void inspect_rope(gsrq_layer layer, Traits* traits) {
  const int64_t i = blockIdx.x * static_cast<int64_t>(blockDim.x) + threadIdx.x;
  if (i >= static_cast<int64_t>(layer.positions) * layer.half_rope) return;
  const int64_t row = i / layer.half_rope, p = i % layer.half_rope;
  const int64_t offset = row % 16 != 0 ? row % 16 : (row > 0 ? 16 : 0), base = row - offset;
  const auto c = [&](int64_t r) { return layer.cos[r * layer.half_rope + p]; };
  const auto s = [&](int64_t r) { return layer.sin[r * layer.half_rope + p]; };
  const float norm = sqrtf(c(0) * c(0) + s(0) * s(0));
  const float turned_c = (c(base) * c(offset) - s(base) * s(offset)) / norm;
  const float turned_s = (s(base) * c(offset) + c(base) * s(offset)) / norm;
  const float off = fmaxf(fabsf(turned_c - c(row)), fabsf(turned_s - s(row)));
  const float straight = fabsf(s(0));
  // Angles that a model computes in float32 are off by half a unit in their last place, up to row * 2^-24 a table row.
  const float allowed = norm * (kGeometric + 2.4e-7f * static_cast<float>(row));
  const float worst = fmaxf(off / allowed, straight / (norm * kGeometric));
  atomicMax(&traits->deviation, __float_as_int(worst >= 0 ? worst : INFINITY));
}

// What a call's parts do once the call and its memory have been checked.
int encode_checked(const gsrq_layer& layer, const gsrq_call& call, const void* prepared, void* workspace, void* stream) {
  Arena constants{static_cast<char*>(const_cast<void*>(prepared))}, scratch{static_cast<char*>(workspace)};
  decode_prepare(layer, constants, nullptr, false);  // skips its share
  return encode(layer, call, constants, scratch, static_cast<cudaStream_t>(stream));
}

int attend_checked(const gsrq_layer& layer, const gsrq_call& call, const void* prepared, void* workspace, void* stream) {
  Arena constants{static_cast<char*>(const_cast<void*>(prepared))}, scratch{static_cast<char*>(workspace)};
  return decode_supported(layer, call) ? decode(layer, call, constants, scratch, static_cast<cudaStream_t>(stream))
                                       : prefill(layer, call, scratch, static_cast<cudaStream_t>(stream));
}

int attention_checked(const gsrq_layer& layer, const gsrq_call& call, const void* prepared, void* workspace, void* stream) {
  return encode_checked(layer, call, prepared, workspace, stream) || attend_checked(layer, call, prepared, workspace, stream) ||
         append(layer, call, static_cast<cudaStream_t>(stream));
}

}  // namespace

int fail(const char* format, ...) {
  va_list list;
  va_start(list, format);
  std::vsnprintf(message, sizeof message, format, list);
  va_end(list);
  return 1;
}

int launched(const char* kernel) {
  const cudaError_t error = cudaGetLastError();
  return error == cudaSuccess ? 0 : fail("%s: %s", kernel, cudaGetErrorString(error));
}

}  // namespace gsrq::cuda

using namespace gsrq::cuda;

int32_t gsrq_cuda_abi(void) { return GSRQ_CUDA_ABI; }
const char* gsrq_cuda_error(void) { return message; }

int gsrq_cuda_inspect(gsrq_layer* layer, void* scratch, void* opaque) {
  static_assert(sizeof(Traits) <= 4096, "the header promises 4096 bytes");
  if (check(*layer)) return 1;
  const auto stream = static_cast<cudaStream_t>(opaque);
  Traits* traits = static_cast<Traits*>(scratch);
  clear_traits<<<1, 256, 0, stream>>>(traits);
  inspect_codewords<<<layer->keys.groups * layer->keys.stages, 256, 0, stream>>>(layer->keys, traits);
  const int64_t entries = static_cast<int64_t>(layer->positions) * layer->half_rope;
  if (entries > 0)
    inspect_rope<<<static_cast<unsigned>((entries + 255) / 256), 256, 0, stream>>>(*layer, traits);
  if (launched("inspect")) return 1;
  Traits host;
  if (cudaMemcpyAsync(&host, traits, sizeof host, cudaMemcpyDeviceToHost, stream) != cudaSuccess ||
      cudaStreamSynchronize(stream) != cudaSuccess)
    return fail("inspect: %s", cudaGetErrorString(cudaGetLastError()));
  float deviation;
  std::memcpy(&deviation, &host.deviation, sizeof deviation);
  layer->geometric = deviation <= 1;
  layer->keys.planes = 1;
  for (int32_t r = 0; r < layer->keys.stages; ++r) {
    const int bits = host.largest[r];
    const float largest = (bits >> 10) == 0 ? std::ldexp(static_cast<float>(bits), -24)
                                            : std::ldexp(static_cast<float>((bits & 0x3ff) | 0x400), (bits >> 10) - 25);
    // A stage of zeros may take any exponent.
    const int exponent = host.finest[r] != 64 ? host.finest[r] - 32 : r > 0 ? layer->exponents[r - 1] : 0;
    layer->exponents[r] = exponent;
    if (std::ldexp(largest, -exponent) > 127) layer->keys.planes = 2;
  }
  const auto bounds = std::minmax_element(layer->exponents, layer->exponents + layer->keys.stages);
  if (*bounds.second - *bounds.first > kExponentSpread) layer->keys.planes = 2;
  if (layer->keys.planes == 2) {  // the exponent of the upper plane: largest <= 127 * 2^e
    int32_t most = -64;
    for (int32_t r = 0; r < layer->keys.stages; ++r) {
      const int bits = host.largest[r];
      layer->exponents[r] = bits == 0 ? -64 : std::max(bits >> 10, 1) - 15 - 5;
      most = std::max(most, layer->exponents[r]);
    }
    for (int32_t r = 0; r < layer->keys.stages; ++r)
      layer->exponents[r] = std::max(layer->exponents[r], most - kExponentSpread);
  }
  return 0;
}

int64_t gsrq_cuda_prepared_bytes(const gsrq_layer* layer) {
  if (check(*layer)) return -1;
  Arena arena;
  decode_prepare(*layer, arena, nullptr, false);
  encode_prepare(*layer, arena, nullptr, false);
  return arena.used;
}

int gsrq_cuda_prepare(const gsrq_layer* layer, void* prepared, void* stream) {
  if (check(*layer)) return 1;
  if (prepared == nullptr) return fail("prepared is null");
  Arena arena{static_cast<char*>(prepared)};
  return decode_prepare(*layer, arena, static_cast<cudaStream_t>(stream), true) ||
         encode_prepare(*layer, arena, static_cast<cudaStream_t>(stream), true);
}

int64_t gsrq_cuda_workspace_bytes(const gsrq_layer* layer, const gsrq_call* call) {
  if (check(*layer, *call)) return -1;
  Arena encoding, attending;
  encode_workspace(*layer, *call, encoding);
  if (decode_supported(*layer, *call)) decode_workspace(*layer, *call, attending);
  else prefill_workspace(*layer, *call, attending);
  return std::max(encoding.used, attending.used);
}

int gsrq_cuda_encode(const gsrq_layer* layer, const gsrq_call* call, const void* prepared, void* workspace, int64_t bytes,
                     void* stream) {
  return check_memory(*layer, *call, prepared, workspace, bytes) ||
         encode_checked(*layer, *call, prepared, workspace, stream);
}

int gsrq_cuda_attend(const gsrq_layer* layer, const gsrq_call* call, const void* prepared, void* workspace, int64_t bytes,
                     void* stream) {
  return check_memory(*layer, *call, prepared, workspace, bytes) ||
         attend_checked(*layer, *call, prepared, workspace, stream);
}

int gsrq_cuda_append(const gsrq_layer* layer, const gsrq_call* call, void* stream) {
  return check(*layer, *call) || append(*layer, *call, static_cast<cudaStream_t>(stream));
}

int64_t gsrq_cuda_rows_workspace_bytes(const gsrq_layer* layer, const gsrq_call* call) {
  const int64_t own = gsrq_cuda_workspace_bytes(layer, call);
  if (own < 0) return own;
  gsrq_call gathered = *call;
  Arena arena;
  rows_workspace(*layer, gathered, arena);
  return arena.used + own;
}

int gsrq_cuda_attention_rows(const gsrq_layer* layer, const gsrq_call* call, const gsrq_rows* rows, const void* prepared,
                             void* workspace, int64_t bytes, void* opaque) {
  if (check(*layer, *call)) return 1;
  if (call->batch == 0 || call->steps == 0) return 0;
  const int64_t need = gsrq_cuda_rows_workspace_bytes(layer, call);
  if (bytes < need || workspace == nullptr)
    return fail("the workspace has %lld bytes, %lld are needed", static_cast<long long>(bytes), static_cast<long long>(need));
  gsrq_call gathered = *call;
  Arena arena{static_cast<char*>(workspace)};
  rows_workspace(*layer, gathered, arena);
  void* const rest = arena.base + arena.used;
  const auto stream = static_cast<cudaStream_t>(opaque);
  return check_rows(*layer, gathered, *rows) || check_memory(*layer, gathered, prepared, rest, bytes - arena.used) ||
         gather(*layer, gathered, *rows, stream) || attention_checked(*layer, gathered, prepared, rest, opaque) ||
         scatter(*layer, gathered, *rows, stream);
}

int gsrq_cuda_attention(const gsrq_layer* layer, const gsrq_call* call, const void* prepared, void* workspace,
                        int64_t bytes, void* stream) {
  if (call->batch == 0 || call->steps == 0) return check(*layer, *call);
  return check_memory(*layer, *call, prepared, workspace, bytes) ||
         attention_checked(*layer, *call, prepared, workspace, stream);
}
