// ONNX Runtime custom op ai.gsrq::GsrqAttention, version 1, CPU: reads tensors, checks, calls gsrq::cpu::Layer.
// One registered op for each type of the exact buffers; ONNX Runtime picks by type. Nothing throws across the ABI.
#include <array>
#include <exception>
#include <memory>
#include <mutex>
#include <new>
#include <string>
#include <vector>

#include "gsrq/cpu/attention.hpp"
#include "ort_abi.h"

namespace gsrq::ort {
namespace {

constexpr size_t kInputs = 15, kOutputs = 5;
constexpr size_t kFirstAliased = 7, kAliased = 4;  // inputs 7 .. 10 may share memory with outputs 1 .. 4

Status* failure(const Api* api, const std::string& message) {
  return CreateStatus(api, ErrorCode::invalid_argument, ("GsrqAttention: " + message).c_str());
}

// A status of the runtime on its way out of nested calls.
struct Failed {
  Status* status;
};
void require(Status* status) {
  if (status != nullptr) throw Failed{status};
}

// Runs fn; turns whatever it throws into a status.
template <class Fn>
Status* guarded(const Api* api, const Fn& fn) noexcept {
  try {
    const std::string problem = fn();
    return problem.empty() ? nullptr : failure(api, problem);
  } catch (const Failed& failed) {
    return failed.status;
  } catch (const std::bad_alloc&) {
    return CreateStatus(api, ErrorCode::fail, "GsrqAttention: out of memory");
  } catch (const std::exception& error) {
    return CreateStatus(api, ErrorCode::fail, error.what());
  } catch (...) {
    return CreateStatus(api, ErrorCode::fail, "GsrqAttention: unknown failure");
  }
}

struct Op : CustomOp {
  ElementType exact;
};

struct Kernel {
  const Api* api;
  cpu::Element element;
  cpu::Layer layer;
  cpu::Attributes attributes;
};

// Attribute readers: false if absent; an attribute of the other type is an error, not an absence.
bool read(const Api* api, const KernelInfo* info, const char* name, int64_t* out) {
  Status* status = KernelInfoGetAttribute_int64(api, info, name, out);
  if (status == nullptr) return true;
  ReleaseStatus(api, status);
  float other;
  status = KernelInfoGetAttribute_float(api, info, name, &other);
  if (status == nullptr) throw Failed{failure(api, std::string("attribute ") + name + " must be an int, is a float")};
  ReleaseStatus(api, status);
  return false;
}

bool read(const Api* api, const KernelInfo* info, const char* name, float* out) {
  Status* status = KernelInfoGetAttribute_float(api, info, name, out);
  if (status == nullptr) return true;
  ReleaseStatus(api, status);
  int64_t other;
  status = KernelInfoGetAttribute_int64(api, info, name, &other);
  if (status == nullptr) throw Failed{failure(api, std::string("attribute ") + name + " must be a float, is an int")};
  ReleaseStatus(api, status);
  return false;
}

std::string read_attributes(const Api* api, const KernelInfo* info, cpu::Attributes* out) {
  for (const auto& [name, value] :
       {std::pair<const char*, int64_t*>{"sinks", &out->sinks}, {"window", &out->window}, {"block", &out->block}})
    if (!read(api, info, name, value)) return std::string("attribute ") + name + " is missing";
  if (!read(api, info, "scale", &out->scale)) return "attribute scale is missing";
  int64_t interleaved = 0, exact_prefill = 0;
  read(api, info, "beam", &out->beam);
  read(api, info, "sliding_window", &out->sliding_window);
  read(api, info, "softcap", &out->softcap);
  read(api, info, "rope_interleaved", &interleaved);
  read(api, info, "exact_prefill", &exact_prefill);
  for (const auto& [name, value] : {std::pair<const char*, int64_t>{"rope_interleaved", interleaved},
                                    {"exact_prefill", exact_prefill}})
    if (value != 0 && value != 1)
      return std::string("attribute ") + name + " is " + std::to_string(value) + ", must be 0 or 1";
  out->rope_interleaved = interleaved != 0;
  out->exact_prefill = exact_prefill != 0;
  return cpu::check(*out);
}

bool constant(const Api* api, const KernelInfo* info, size_t input) {
  int is_constant = 0;
  const Value* value = nullptr;
  require(KernelInfoGetConstantInput_tensor(api, info, input, &is_constant, &value));
  return is_constant != 0;
}

cpu::Element element_of(ElementType type) {
  return type == ElementType::f16 ? cpu::Element::f16 : type == ElementType::bf16 ? cpu::Element::bf16 : cpu::Element::f32;
}

Status* create_kernel(const CustomOp* op, const Api* api, const KernelInfo* info, void** out) noexcept {
  return guarded(api, [&]() -> std::string {
    cpu::Attributes attributes;
    if (std::string problem = read_attributes(api, info, &attributes); !problem.empty()) return problem;
    const char* problem = nullptr;
    const cpu::Kernels* kernels = cpu::select_kernels(&problem);
    if (kernels == nullptr) return problem;
    const bool keys = constant(api, info, 11) && constant(api, info, 13);
    const bool values = constant(api, info, 12) && constant(api, info, 14);
    *out = new Kernel{api, element_of(static_cast<const Op*>(op)->exact), {attributes, kernels, keys, values},
                      attributes};
    return {};
  });
}

// Shape and data of an input.
const void* read_input(const Api* api, const KernelContext* context, size_t index, cpu::Shape* shape) {
  const Value* value = nullptr;
  require(KernelContext_GetInput(api, context, index, &value));
  TensorInfo* info = nullptr;
  require(GetTensorTypeAndShape(api, value, &info));
  size_t rank = 0;
  Status* status = GetDimensionsCount(api, info, &rank);
  if (status == nullptr) {
    shape->resize(rank);
    status = GetDimensions(api, info, shape->data(), rank);
  }
  ReleaseTensorTypeAndShapeInfo(api, info);
  require(status);
  void* data = nullptr;
  require(GetTensorMutableData(api, const_cast<Value*>(value), &data));
  return data;
}

void* allocate_output(const Api* api, KernelContext* context, size_t index, const cpu::Shape& shape) {
  Value* value = nullptr;
  require(KernelContext_GetOutput(api, context, index, shape.data(), shape.size(), &value));
  void* data = nullptr;
  require(GetTensorMutableData(api, value, &data));
  return data;
}

struct Host {
  const Api* api;
  const KernelContext* context;
};

void parallel_for(void* opaque, void (*fn)(void*, size_t), size_t total, void* argument) {
  const Host& host = *static_cast<Host*>(opaque);
  require(KernelContext_ParallelFor(host.api, host.context, fn, total, total, argument));
}

Status* compute(void* opaque, KernelContext* context) noexcept {
  Kernel& kernel = *static_cast<Kernel*>(opaque);
  const Api* api = kernel.api;
  return guarded(api, [&]() -> std::string {
    cpu::Shapes s;
    cpu::Shape* const shapes[kInputs] = {&s.query,         &s.key,           &s.value,           &s.cos,
                                         &s.sin,           &s.past_lengths,  &s.new_lengths,     &s.key_codes,
                                         &s.value_codes,   &s.key_exact,     &s.value_exact,     &s.key_codebooks,
                                         &s.value_codebooks, &s.key_transform, &s.value_transform};
    std::array<const void*, kInputs> data{};
    for (size_t i = 0; i < kInputs; ++i) data[i] = read_input(api, context, i, shapes[i]);
    if (std::string problem = cpu::check(kernel.attributes, s); !problem.empty()) return problem;

    cpu::Call call{};
    call.batch = s.query[0];
    call.heads = s.query[1];
    call.steps = s.query[2];
    call.head_dim = s.query[3];
    call.kv_heads = s.key[1];
    call.positions = s.cos[0];
    call.half_rope = s.cos[1];
    call.capacity = s.key_codes[1];
    call.query = static_cast<const float*>(data[0]);
    call.key = static_cast<const float*>(data[1]);
    call.value = static_cast<const float*>(data[2]);
    call.cos = static_cast<const float*>(data[3]);
    call.sin = static_cast<const float*>(data[4]);
    call.past_lengths = static_cast<const int64_t*>(data[5]);
    call.new_lengths = static_cast<const int64_t*>(data[6]);
    call.key_codes = static_cast<const uint8_t*>(data[7]);
    call.value_codes = static_cast<const uint8_t*>(data[8]);
    call.key_exact = data[9];
    call.value_exact = data[10];
    call.element = kernel.element;
    const auto words = [](const void* codewords, const cpu::Shape& shape) {
      return cpu::Words{static_cast<const uint16_t*>(codewords), shape[0], shape[1], shape[3]};
    };
    call.key_words = words(data[11], s.key_codebooks);
    call.value_words = words(data[12], s.value_codebooks);
    call.key_transform = static_cast<const float*>(data[13]);
    call.value_transform = static_cast<const float*>(data[14]);
    if (std::string problem = cpu::check(kernel.attributes, call); !problem.empty()) return problem;

    call.output = static_cast<float*>(
        allocate_output(api, context, 0, {call.batch, call.steps, call.heads, call.head_dim}));
    call.present_key_codes = static_cast<uint8_t*>(allocate_output(api, context, 1, s.key_codes));
    call.present_value_codes = static_cast<uint8_t*>(allocate_output(api, context, 2, s.value_codes));
    call.present_key_exact = allocate_output(api, context, 3, s.key_exact);
    call.present_value_exact = allocate_output(api, context, 4, s.value_exact);
    Host host{api, context};
    kernel.layer.run(call, {&host, parallel_for});
    return {};
  });
}

ElementType input_type(const CustomOp* op, size_t index) noexcept {
  switch (index) {
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
  return index == 0 ? ElementType::f32 : input_type(op, kFirstAliased + index - 1);
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

Op make_op(ElementType exact) {
  Op op{};
  op.version = kApiVersion;
  op.exact = exact;
  op.get_name = [](const CustomOp*) noexcept { return "GsrqAttention"; };
  op.get_execution_provider = [](const CustomOp*) noexcept { return "CPUExecutionProvider"; };
  op.get_input_type = input_type;
  op.get_input_count = [](const CustomOp*) noexcept { return kInputs; };
  op.get_output_type = output_type;
  op.get_output_count = [](const CustomOp*) noexcept { return kOutputs; };
  op.destroy_kernel = [](void* kernel) noexcept { delete static_cast<Kernel*>(kernel); };
  op.get_input_presence = [](const CustomOp*, size_t) noexcept { return Presence::required; };
  op.get_output_presence = op.get_input_presence;
  op.get_input_memory = [](const CustomOp*, size_t) noexcept { return MemoryType::standard; };
  op.create_kernel_v2 = create_kernel;
  op.compute_v2 = compute;
  op.get_start_version = [](const CustomOp*) noexcept { return 1; };
  op.get_end_version = op.get_start_version;
  op.get_may_inplace = may_inplace;
  op.release_may_inplace = [](int* inputs, int* outputs) noexcept {
    delete[] inputs;
    delete[] outputs;
  };
  return op;
}

}  // namespace

extern "C" __attribute__((visibility("default"))) Status* RegisterCustomOps(SessionOptions* options,
                                                                            const ApiBase* base) noexcept {
  const Api* api = base->get_api(kApiVersion);
  if (api == nullptr) return nullptr;  // cannot happen with ONNX Runtime 1.18 or later; older ones print the reason
  return guarded(api, [&]() -> std::string {
    static const std::array<Op, 3> ops = {make_op(ElementType::f16), make_op(ElementType::f32),
                                          make_op(ElementType::bf16)};
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
