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
    const cpu::Inputs data = read_inputs(api, context, &s);
    if (std::string problem = cpu::check(kernel.attributes, s); !problem.empty()) return problem;
    cpu::Call call = cpu::make_call(s, data);
    call.element = kernel.element;
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
