// How ai.gsrq::GsrqAttention declares itself to ONNX Runtime, and the library's entry points.
#include <array>
#include <mutex>

#include "host.hpp"

namespace gsrq::ort {
namespace {

ElementType input_type(const CustomOp* op, size_t index) noexcept {
  switch (index) {
    case 0:
    case 1:
    case 2: return static_cast<const Op*>(op)->io;
    case 5:
    case 6: return ElementType::i64;
    case 7:
    case 8: return ElementType::i8;
    case 9:
    case 10: return static_cast<const Op*>(op)->exact;
    case 11:
    case 12: return ElementType::f16;
    default: return ElementType::f32;
  }
}

ElementType output_type(const CustomOp* op, size_t index) noexcept {
  return index == 0 ? static_cast<const Op*>(op)->io : input_type(op, kFirstAliased + index - 1);
}

size_t may_inplace(int** inputs, int** outputs) noexcept {
  *inputs = new (std::nothrow) int[kAliased];
  *outputs = new (std::nothrow) int[kAliased];
  if (*inputs == nullptr || *outputs == nullptr) return 0;
  for (size_t i = 0; i < kAliased; ++i) {
    (*inputs)[i] = static_cast<int>(kFirstAliased + i);
    (*outputs)[i] = static_cast<int>(1 + i);
  }
  return kAliased;
}

}  // namespace

Op declare_op(ElementType io, ElementType exact) {
  Op op{};
  op.version = kApiVersion;
  op.io = io;
  op.exact = exact;
  op.get_name = [](const CustomOp*) noexcept { return "GsrqAttention"; };
  op.get_input_type = input_type;
  op.get_input_count = [](const CustomOp*) noexcept { return kInputs + 1; };
  op.get_output_type = output_type;
  op.get_output_count = [](const CustomOp*) noexcept { return kOutputs; };
  op.get_input_presence = [](const CustomOp*, size_t index) noexcept {
    return index == kKeyCenter ? Presence::optional : Presence::required;
  };
  op.get_output_presence = [](const CustomOp*, size_t) noexcept { return Presence::required; };
  op.get_start_version = [](const CustomOp*) noexcept { return 1; };
  op.get_end_version = op.get_start_version;
  op.get_may_inplace = may_inplace;
  op.release_may_inplace = [](int* inputs, int* outputs) noexcept {
    delete[] inputs;
    delete[] outputs;
  };
  return op;
}

extern "C" __attribute__((visibility("default"))) Status* RegisterCustomOps(SessionOptions* options,
                                                                            const ApiBase* base) noexcept {
  const Api* api = base->get_api(kApiVersion);
  if (api == nullptr) return nullptr;  // cannot happen with ONNX Runtime 1.18 or later; older ones print the reason
  return guarded(api, [&]() -> std::string {
    constexpr ElementType f32 = ElementType::f32, f16 = ElementType::f16, bf16 = ElementType::bf16;
    static const std::array ops = {
      make_cpu_op(f16), make_cpu_op(f32), make_cpu_op(bf16),
#ifdef GSRQ_ORT_CUDA
      make_cuda_op(f32, f16), make_cuda_op(f32, f32), make_cuda_op(f32, bf16),
      make_cuda_op(f16, f16), make_cuda_op(bf16, bf16),
#endif
    };
    // Sessions keep the domain's address; it lives as long as the library.
    static CustomOpDomain* domain = nullptr;
    static std::mutex mutex;
    const std::lock_guard<std::mutex> lock(mutex);
    if (domain == nullptr) {
      CustomOpDomain* fresh = nullptr;
      require(CreateCustomOpDomain(api, "ai.gsrq", &fresh));
      for (const Op& op : ops)
        if (Status* status = CustomOpDomain_Add(api, fresh, &op); status != nullptr) {
          ReleaseCustomOpDomain(api, fresh);
          throw Failed{status};
        }
      domain = fresh;
    }
    require(AddCustomOpDomain(api, options, domain));
    return {};
  });
}

// Comma-separated names of the instruction sets this library has kernels for.
extern "C" __attribute__((visibility("default"))) const char* GsrqInstructionSets() noexcept {
#if defined(__x86_64__)
  return "generic,avx2,avx512";
#else
  return "generic";
#endif
}

}  // namespace gsrq::ort
