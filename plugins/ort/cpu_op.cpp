// ONNX Runtime custom op ai.gsrq::GsrqAttention, version 1, CPU: reads tensors, checks, calls gsrq::cpu::Layer.
#include "host.hpp"

namespace gsrq::ort {
namespace {

struct Kernel {
  const Api* api;
  cpu::Element element;
  cpu::Layer layer;
  cpu::Attributes attributes;
};

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
    const bool center = !attributes.rotated_keys || constant(api, info, kKeyCenter);
    const bool keys = constant(api, info, 11) && constant(api, info, 13) && center;
    const bool values = constant(api, info, 12) && constant(api, info, 14);
    *out = new Kernel{api, element_of(static_cast<const Op*>(op)->exact), {attributes, kernels, keys, values},
                      attributes};
    return {};
  });
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
    const std::array<const void*, kInputs> data = read_inputs(api, context, &s);
    const float* key_center = read_key_center(api, context, &s);
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
    call.key_center = key_center;
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

}  // namespace

Op make_cpu_op(ElementType exact) {
  Op op = declare_op(ElementType::f32, exact);
  op.get_execution_provider = [](const CustomOp*) noexcept { return "CPUExecutionProvider"; };
  op.get_input_memory = [](const CustomOp*, size_t) noexcept { return MemoryType::standard; };
  op.create_kernel_v2 = create_kernel;
  op.compute_v2 = compute;
  op.destroy_kernel = [](void* kernel) noexcept { delete static_cast<Kernel*>(kernel); };
  return op;
}

}  // namespace gsrq::ort
