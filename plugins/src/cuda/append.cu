// Writes the new tokens' keys and values into the exact buffers: sinks, and the ring of window + block tokens.
#include <algorithm>

#include "source.cuh"

namespace gsrq::cuda {
namespace {

constexpr int kThreads = 256;

// A thread copies one piece of a head's vector: 16 bytes where both sides have one type and are aligned, else one element.
template <bool Wide>
__global__ void __launch_bounds__(kThreads) append_ring(gsrq_layer layer, gsrq_call call, int64_t most, int pieces) {
  const int64_t i = blockIdx.x * static_cast<int64_t>(kThreads) + threadIdx.x;
  const int64_t piece = i % pieces, head = i / pieces % layer.kv_heads;
  const int64_t writer = i / pieces / layer.kv_heads % most, b = i / pieces / layer.kv_heads / most;
  if (b >= call.batch) return;
  const RowLengths row = row_lengths(layer, call, b);
  const RingWriters writers = ring_writers(layer, row.past, row.total);
  if (writer >= writers.count) return;
  const int64_t token = writers.token(writer, row.past), at = b * layer.kv_heads + head;
  const int64_t slots = gsrq_exact_slots(layer.sinks, layer.window, layer.block);
  const int64_t slot = gsrq_slot(token, layer.sinks, layer.window, layer.block);
  const int64_t to = (at * slots + slot) * pieces + piece, from = (at * call.steps + token - row.past) * pieces + piece;
  if constexpr (Wide) {
    static_cast<uint4*>(call.key_exact)[to] = static_cast<const uint4*>(call.key)[from];
    static_cast<uint4*>(call.value_exact)[to] = static_cast<const uint4*>(call.value)[from];
  } else {
    store(call.key_exact, to, load(call.key, from, call.dtype), call.exact_dtype);
    store(call.value_exact, to, load(call.value, from, call.dtype), call.exact_dtype);
  }
}

}  // namespace

int append(const gsrq_layer& layer, const gsrq_call& call, cudaStream_t stream) {
  const int64_t slots = gsrq_exact_slots(layer.sinks, layer.window, layer.block);
  const int64_t most = std::min<int64_t>(call.steps, slots);
  if (call.batch == 0 || most == 0) return 0;
  const int64_t bytes = static_cast<int64_t>(layer.head_dim) * dtype_bytes(call.dtype);
  const bool wide = call.dtype == call.exact_dtype && bytes % 16 == 0 && aligned(call.key) && aligned(call.value) &&
                    aligned(call.key_exact) && aligned(call.value_exact);
  const int pieces = wide ? static_cast<int>(bytes / 16) : layer.head_dim;
  const int64_t threads = call.batch * most * layer.kv_heads * pieces;
  const int64_t grid = (threads + kThreads - 1) / kThreads;
  if (grid > INT32_MAX) return fail("append: %lld blocks are too many", static_cast<long long>(grid));
  if (wide) append_ring<true><<<static_cast<unsigned>(grid), kThreads, 0, stream>>>(layer, call, most, pieces);
  else append_ring<false><<<static_cast<unsigned>(grid), kThreads, 0, stream>>>(layer, call, most, pieces);
  return launched("append");
}

}  // namespace gsrq::cuda
