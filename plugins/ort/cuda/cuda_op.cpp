// ONNX Runtime custom op ai.gsrq::GsrqAttention, version 1, CUDA: reads tensors, checks, launches on the session's stream.
//
// The lengths are taken in CPU memory: the session has them there, so the operator's errors can be raised before
// anything is written and the grids are sized for the tokens there are, without waiting for the GPU. Their price is one
// small copy to the device a call and node, and that a CUDA graph would replay the lengths it was captured with; capture
// is therefore refused. Codebooks must be initializers: they are read and brought into the kernels' form once a node.
#include <algorithm>
#include <memory>
#include <mutex>
#include <unordered_map>
#include <vector>

#include "../host.hpp"
#include "gsrq/cuda/host.hpp"
#include "gsrq/layout.h"

namespace gsrq::ort {
namespace {

int32_t element_of(ElementType type) {
  return type == ElementType::f16 ? GSRQ_F16 : type == ElementType::bf16 ? GSRQ_BF16 : GSRQ_F32;
}

size_t bytes_of(ElementType type) { return type == ElementType::f32 ? 4 : 2; }

int64_t count(const cpu::Shape& shape) {
  int64_t product = 1;
  for (const int64_t size : shape) product *= size;
  return product;
}

// Most bytes that a stream's calls have had from its session's arena.
class Known {
 public:
  bool has(const void* stream, size_t bytes) {
    const std::lock_guard<std::mutex> lock(mutex_);
    return most_[stream] >= bytes;
  }
  void note(const void* stream, size_t bytes) {
    const std::lock_guard<std::mutex> lock(mutex_);
    most_[stream] = std::max(most_[stream], bytes);
  }
  void forget() {
    const std::lock_guard<std::mutex> lock(mutex_);
    most_.clear();
  }

 private:
  std::mutex mutex_;
  std::unordered_map<const void*, size_t> most_;
};

Known& known() {
  static Known one;
  return one;
}

// Memory of one call from the session's allocator. Given back when the launches are queued: whoever gets it next
// works on the same stream, or the allocator makes it wait.
class Scratch {
 public:
  Scratch(const Api* api, const KernelContext* context, const MemoryInfo* where, const void* stream, size_t bytes)
      : allocator_(nullptr, {api}) {
    Allocator* allocator = nullptr;
    require(KernelContext_GetAllocator(api, context, where, &allocator));
    allocator_.reset(allocator);
    if (stream == nullptr) {  // the stream-aware call dereferences the stream
      memory_ = allocator->allocate(allocator, bytes);
    } else {
      // That call is declared to throw nothing and calls the arena, which throws where memory is out: the process would end.
      // So the first call of a size asks the arena by the way that may throw. It keeps what is given back.
      if (!known().has(stream, bytes)) {
        void* tried = allocator->allocate(allocator, bytes);
        if (tried == nullptr) throw std::bad_alloc();
        allocator->release(allocator, tried);
      }
      require(KernelContext_GetScratchBuffer(api, context, where, bytes, &memory_));
      known().note(stream, bytes);
    }
    if (memory_ == nullptr) throw std::bad_alloc();
  }
  ~Scratch() { allocator_->release(allocator_.get(), memory_); }
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;
  char* data() const { return static_cast<char*>(memory_); }

 private:
  struct Release {
    const Api* api;
    void operator()(Allocator* allocator) const { ReleaseAllocator(api, allocator); }
  };
  std::unique_ptr<Allocator, Release> allocator_;
  void* memory_ = nullptr;
};

struct Kernel {
  const Api* api;
  ElementType io, exact;
  cpu::Attributes attributes;
  bool constant_tables;  // cos and sin never change
  cuda::Constants constants;
};

Status* create_kernel(const CustomOp* op, const Api* api, const KernelInfo* info, void** out) noexcept {
  return guarded(api, [&]() -> std::string {
    auto kernel = std::make_unique<Kernel>();
    kernel->api = api;
    kernel->io = static_cast<const Op*>(op)->io;
    kernel->exact = static_cast<const Op*>(op)->exact;
    if (std::string problem = read_attributes(api, info, &kernel->attributes); !problem.empty()) return problem;
    for (size_t input = 11; input < kInputs; ++input)
      if (!constant(api, info, input))
        return "on CUDA the codebooks and transforms (inputs 11 to 14) must be initializers";
    if (kernel->attributes.rotated_keys && !constant(api, info, kKeyCenter))
      return "on CUDA the keys' center (input 15) must be an initializer";
    kernel->constant_tables = constant(api, info, 3) && constant(api, info, 4);
    known().forget();  // a new session's stream may lie where an old one's did
    *out = kernel.release();
    return {};
  });
}

const MemoryInfo* memory_of(const Api* api, const KernelContext* context, size_t input) {
  const Value* value = nullptr;
  require(KernelContext_GetInput(api, context, input, &value));
  const MemoryInfo* where = nullptr;
  require(GetTensorMemoryInfo(api, value, &where));
  return where;
}

// Whether a row's block leaves the window: in most steps of a short batch none does, and the launches that code are saved.
bool codes_blocks(const gsrq_layer& layer, const cpu::Call& lengths) {
  const auto coded = [&](int64_t total) { return gsrq_coded(total, layer.sinks, layer.window, layer.block); };
  for (int64_t b = 0; b < lengths.batch; ++b)
    if (coded(lengths.past_lengths[b] + lengths.new_lengths[b]) > coded(lengths.past_lengths[b])) return true;
  return false;
}

// An output that starts as a copy of its input, or is it.
void* continued(const Api* api, KernelContext* context, size_t input, const cpu::Shape& shape, const void* past,
                size_t element, cudaStream_t stream) {
  void* present = allocate_output(api, context, input - kFirstAliased + 1, shape);
  if (present != past)
    cuda::require(
        cudaMemcpyAsync(present, past, static_cast<size_t>(count(shape)) * element, cudaMemcpyDeviceToDevice, stream),
        "copying the cache");
  return present;
}

Status* compute(void* opaque, KernelContext* context) noexcept {
  Kernel& kernel = *static_cast<Kernel*>(opaque);
  const Api* api = kernel.api;
  return guarded(api, [&]() -> std::string {
    cpu::Shapes s;
    const cpu::Inputs data = read_inputs(api, context, &s);
    if (std::string problem = cpu::check(kernel.attributes, s); !problem.empty()) return problem;
    const cpu::Call lengths = cpu::make_call(s, data);
    if (std::string problem = cpu::check(kernel.attributes, lengths); !problem.empty()) return problem;

    void* native = nullptr;
    require(KernelContext_GetGPUComputeStream(api, context, &native));
    const auto stream = static_cast<cudaStream_t>(native);
    cudaStreamCaptureStatus capturing = cudaStreamCaptureStatusNone;
    cuda::require(cudaStreamIsCapturing(stream, &capturing), "asking whether the stream is captured");
    if (capturing != cudaStreamCaptureStatusNone)
      return "a CUDA graph would repeat the lengths it was captured with; run without enable_cuda_graph";

    gsrq_call call = cuda::describe_call(s, data, element_of(kernel.io), element_of(kernel.exact));
    call.output = allocate_output(api, context, 0, {s.query[0], s.query[2], s.query[1], s.query[3]});
    const size_t exact = bytes_of(kernel.exact);
    call.key_codes = static_cast<int8_t*>(continued(api, context, 7, s.key_codes, data[7], 1, stream));
    call.value_codes = static_cast<int8_t*>(continued(api, context, 8, s.value_codes, data[8], 1, stream));
    call.key_exact = continued(api, context, 9, s.key_exact, data[9], exact, stream);
    call.value_exact = continued(api, context, 10, s.value_exact, data[10], exact, stream);
    if (call.batch == 0 || call.steps == 0) return {};
    for (int64_t b = 0; b < lengths.batch; ++b)
      call.max_total = std::max(call.max_total, lengths.past_lengths[b] + lengths.new_lengths[b]);

    const gsrq_layer layer =
        kernel.constants.layer(kernel.attributes, s, data, kernel.constant_tables, stream);
    const int64_t need = gsrq_cuda_workspace_bytes(&layer, &call);
    cuda::require(need < 0);
    const size_t workspace = cuda::round_up(static_cast<size_t>(need)), half = static_cast<size_t>(call.batch) * sizeof(int64_t);
    const Scratch scratch(api, context, memory_of(api, context, 0), native, workspace + 2 * half);
    std::vector<int64_t> both(lengths.past_lengths, lengths.past_lengths + call.batch);
    both.insert(both.end(), lengths.new_lengths, lengths.new_lengths + call.batch);
    auto* on_device = reinterpret_cast<int64_t*>(scratch.data() + workspace);
    // Pageable memory: the driver has read it when the call returns.
    cuda::require(cudaMemcpyAsync(on_device, both.data(), 2 * half, cudaMemcpyHostToDevice, stream), "copying the lengths");
    call.past_lengths = on_device;
    call.new_lengths = on_device + call.batch;
    char* const memory = scratch.data();
    const void* const prepared = kernel.constants.prepared();
    if (codes_blocks(layer, lengths)) {
      cuda::require(gsrq_cuda_attention(&layer, &call, prepared, memory, need, stream));
    } else {
      cuda::require(gsrq_cuda_attend(&layer, &call, prepared, memory, need, stream));
      cuda::require(gsrq_cuda_append(&layer, &call, stream));
    }
    return {};
  });
}

}  // namespace

Op make_cuda_op(ElementType io, ElementType exact) {
  Op op = declare_op(io, exact);
  op.get_execution_provider = [](const CustomOp*) noexcept { return "CUDAExecutionProvider"; };
  op.get_input_memory = [](const CustomOp*, size_t index) noexcept {
    return index == 5 || index == 6 ? MemoryType::cpu_input : MemoryType::standard;
  };
  op.create_kernel_v2 = create_kernel;
  op.compute_v2 = compute;
  op.destroy_kernel = [](void* kernel) noexcept { delete static_cast<Kernel*>(kernel); };
  return op;
}

}  // namespace gsrq::ort

extern "C" __attribute__((visibility("default"))) const char* GsrqCudaArchitectures() noexcept {
  return gsrq_cuda_architectures();
}
