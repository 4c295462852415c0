// What hosts of the CUDA operator share: a gsrq_layer and a gsrq_call from checked shapes and pointers, and the constants
// of a node, brought into the kernels' form once. Failures are exceptions, which hosts turn into their own errors.
#pragma once

#include <cuda_runtime_api.h>

#include <algorithm>
#include <climits>
#include <memory>
#include <mutex>
#include <new>
#include <stdexcept>
#include <string>

#include "gsrq/cpu/attention.hpp"
#include "gsrq/cuda/gsrq_cuda.h"

namespace gsrq::cuda {

constexpr size_t kAlignment = 256, kInspectBytes = 4096;

inline size_t round_up(size_t bytes) { return (bytes + kAlignment - 1) / kAlignment * kAlignment; }

inline void require(cudaError_t error, const char* what) {
  if (error == cudaSuccess) return;
  throw std::runtime_error("GsrqAttention: " + std::string(what) + ": " + cudaGetErrorString(error));
}

// For the functions of gsrq_cuda.h.
inline void require(int failed) {
  if (failed != 0) throw std::runtime_error(std::string("GsrqAttention: ") + gsrq_cuda_error());
}

struct DeviceFree {
  void operator()(void* memory) const { cudaFree(memory); }
};
using DeviceMemory = std::unique_ptr<void, DeviceFree>;

inline DeviceMemory device_memory(size_t bytes) {
  void* memory = nullptr;
  if (cudaMalloc(&memory, std::max<size_t>(bytes, 1)) != cudaSuccess) {
    cudaGetLastError();
    throw std::bad_alloc();
  }
  return DeviceMemory(memory);
}

inline int32_t narrow(const char* name, int64_t value) {
  if (value > INT32_MAX) throw std::invalid_argument("GsrqAttention: " + std::string(name) + " is too large for CUDA");
  return static_cast<int32_t>(value);
}

// All that does not come from gsrq_cuda_inspect. The shapes have passed cpu::check.
inline gsrq_layer describe(const cpu::Attributes& a, const cpu::Shapes& s, const cpu::Inputs& inputs) {
  const auto book = [&](const cpu::Shape& shape, size_t words, size_t transform) {
    return gsrq_codebook{narrow("groups", shape[0]), narrow("stages", shape[1]),
                         narrow("width", shape[3]),  0,
                         inputs[words],              static_cast<const float*>(inputs[transform])};
  };
  gsrq_layer layer{};
  layer.heads = narrow("heads", s.query[1]);
  layer.kv_heads = narrow("KV heads", s.key[1]);
  layer.head_dim = narrow("head_dim", s.query[3]);
  layer.half_rope = narrow("rope_dim", s.cos[1]);
  layer.positions = narrow("positions", s.cos[0]);
  layer.sinks = narrow("sinks", a.sinks);
  layer.window = narrow("window", a.window);
  layer.block = narrow("block", a.block);
  layer.beam = narrow("beam", a.beam);
  layer.sliding_window = narrow("sliding_window", a.sliding_window);
  layer.rope_interleaved = a.rope_interleaved;
  layer.exact_prefill = a.exact_prefill;
  layer.codes_by_head = a.codes_by_head;
  layer.scale = a.scale;
  layer.softcap = a.softcap;
  layer.cos = static_cast<const float*>(inputs[3]);
  layer.sin = static_cast<const float*>(inputs[4]);
  layer.keys = book(s.key_codebooks, 11, 13);
  layer.values = book(s.value_codebooks, 12, 14);
  layer.key_center = static_cast<const float*>(inputs[15]);
  return layer;
}

// All but max_total, the lengths, which must lie on the device, and the outputs.
inline gsrq_call describe_call(const cpu::Shapes& s, const cpu::Inputs& inputs, int32_t dtype, int32_t exact_dtype) {
  gsrq_call call{};
  call.batch = narrow("batch", s.query[0]);
  call.steps = narrow("steps", s.query[2]);
  call.dtype = dtype;
  call.exact_dtype = exact_dtype;
  call.capacity = s.key_codes[1];
  call.query = inputs[0];
  call.key = inputs[1];
  call.value = inputs[2];
  return call;
}

// A node's codebooks and tables, inspected and prepared in its first call, which waits for the stream once.
class Constants {
 public:
  // The layer of a call. constant_tables: cos and sin never change; else they are not taken for geometric ones.
  gsrq_layer layer(const cpu::Attributes& attributes, const cpu::Shapes& shapes, const cpu::Inputs& inputs,
                   bool constant_tables, cudaStream_t stream) {
    gsrq_layer layer = describe(attributes, shapes, inputs);
    const std::lock_guard<std::mutex> lock(mutex_);
    if (prepared_ == nullptr) {
      refuse_capture(stream);
      const DeviceMemory scratch = device_memory(kInspectBytes);
      require(gsrq_cuda_inspect(&layer, scratch.get(), stream));
      if (!constant_tables) layer.geometric = 0;
      const int64_t bytes = gsrq_cuda_prepared_bytes(&layer);
      require(bytes < 0);
      DeviceMemory prepared = device_memory(static_cast<size_t>(bytes));
      require(gsrq_cuda_prepare(&layer, prepared.get(), stream));
      require(cudaStreamSynchronize(stream), "preparing the codebooks");  // other calls have other streams
      first_ = layer;
      prepared_ = std::move(prepared);
    }
    if (layer.heads != first_.heads || layer.kv_heads != first_.kv_heads || layer.head_dim != first_.head_dim ||
        layer.half_rope != first_.half_rope)
      throw std::invalid_argument("GsrqAttention: heads, head_dim and rope_dim must be the same in all calls");
    // The constants stay as they are; where they lie, and the rest, is this call's.
    layer.geometric = first_.geometric;
    layer.keys.planes = first_.keys.planes;
    layer.values.planes = first_.values.planes;
    std::copy(std::begin(first_.exponents), std::end(first_.exponents), std::begin(layer.exponents));
    return layer;
  }

  const void* prepared() const { return prepared_.get(); }

 private:
  static void refuse_capture(cudaStream_t stream) {
    cudaStreamCaptureStatus status = cudaStreamCaptureStatusNone;
    require(cudaStreamIsCapturing(stream, &status), "asking whether the stream is captured");
    if (status != cudaStreamCaptureStatusNone)
      throw std::invalid_argument("GsrqAttention: the first call prepares the codebooks; run one before capturing a graph");
  }

  std::mutex mutex_;
  gsrq_layer first_{};
  DeviceMemory prepared_;
};

}  // namespace gsrq::cuda
