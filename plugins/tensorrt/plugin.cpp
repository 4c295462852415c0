#include "plugin.hpp"

#include <algorithm>

#include "gsrq/layout.h"
#include "kernels.hpp"
#include "lengths.hpp"
#include "log.hpp"

namespace gsrq::trt {
namespace {

using nvinfer1::DataType;
using nvinfer1::Dims;
using nvinfer1::PluginTensorDesc;

constexpr const char* kInputNames[] = {
    "query",     "key",         "value",     "cos",         "sin",           "past_lengths",    "new_lengths",  "key_codes",
    "value_codes", "key_exact", "value_exact", "key_codebooks", "value_codebooks", "key_transform", "value_transform", "key_center"};

bool is_float(DataType type) { return type == DataType::kFLOAT || type == DataType::kHALF || type == DataType::kBF16; }

int32_t element_of(DataType type) {
  return type == DataType::kHALF ? GSRQ_F16 : type == DataType::kBF16 ? GSRQ_BF16 : GSRQ_F32;
}

int64_t bytes_of(DataType type) { return type == DataType::kINT8 ? 1 : type == DataType::kFLOAT ? 4 : 2; }

// Whether input `i` may have a type, given the types of the inputs before it.
template <class TypeOf>
bool input_type(int32_t i, DataType type, const TypeOf& before) {
  switch (i) {
    case 0: return is_float(type);
    case 1:
    case 2: return type == before(0);
    case 5:
    case 6: return type == DataType::kINT64;
    case 7:
    case 8: return type == DataType::kINT8;
    case 9: return before(0) == DataType::kFLOAT ? is_float(type) : type == before(0);
    case 10: return type == before(9);
    case 11:
    case 12: return type == DataType::kHALF;
    default: return type == DataType::kFLOAT;
  }
}

// The input whose type an output has.
int32_t type_source(int32_t output) { return output == 0 ? 0 : kFirstAliased + output - 1; }

cpu::Shape shape_of(const Dims& dims) {
  return dims.nbDims < 0 ? cpu::Shape{} : cpu::Shape(dims.d, dims.d + dims.nbDims);
}

template <class DimsOf>
cpu::Shapes shapes_of(int32_t inputs, const DimsOf& dims_of) {
  cpu::Shapes shapes;
  const auto all = cpu::in_order(shapes);
  for (int32_t i = 0; i < inputs; ++i) *all[i] = shape_of(dims_of(i));
  return shapes;
}

int64_t count(const cpu::Shape& shape) {
  int64_t product = 1;
  for (const int64_t size : shape) product *= size;
  return product;
}

// Tokens that a row of the cache and the rotary table hold: lengths are not known here, so all grids are sized for it.
int64_t most_tokens(const gsrq_layer& layer, int64_t capacity) {
  const int64_t blocks = capacity / layer.block + 1;
  return std::min<int64_t>(layer.positions, int64_t{layer.sinks} + layer.window + blocks * layer.block - 1);
}

// Workspace of any call whose batch, steps and capacity are at most these. That of a call does not always grow with its
// sizes, as short calls are cut into more parts: all sizes are asked that may have parts.
int64_t workspace_bound(gsrq_layer layer, gsrq_call call, int64_t capacity) {
  constexpr int32_t kSteps = 4096;  // more steps are never cut
  const int32_t batch = call.batch, steps = call.steps;
  const void* const stand_in = &layer;  // constants have no address yet; they are not read
  layer.cos = layer.sin = static_cast<const float*>(stand_in);
  for (gsrq_codebook* book : {&layer.keys, &layer.values}) {
    book->codewords = stand_in;
    book->transform = static_cast<const float*>(stand_in);
  }
  call.max_total = most_tokens(layer, capacity);
  int64_t bound = 0;
  const auto ask = [&](int32_t b, int32_t t) {
    call.batch = b;
    call.steps = t;
    const int64_t bytes = gsrq_cuda_workspace_bytes(&layer, &call);
    cuda::require(bytes < 0);
    bound = std::max(bound, bytes);
  };
  for (layer.keys.planes = 1; layer.keys.planes <= 2; ++layer.keys.planes)
    for (layer.geometric = 0; layer.geometric <= 1; ++layer.geometric) ask(batch, std::min(1, steps));
  layer.keys.planes = 1;
  layer.geometric = 0;
  for (int32_t b = 1; b <= batch; ++b)
    for (int32_t t = 1; t <= std::min(steps, kSteps); ++t) ask(b, t);
  ask(batch, steps);
  return bound;
}

struct Call {
  gsrq_layer layer;
  gsrq_call call;
};

Call describe(const cpu::Attributes& attributes, const cpu::Shapes& shapes, DataType io, DataType exact) {
  return {cuda::describe(attributes, shapes, {}), cuda::describe_call(shapes, {}, element_of(io), element_of(exact))};
}

size_t whole_workspace(int64_t bytes, int64_t batch) {
  return cuda::round_up(static_cast<size_t>(bytes)) + 2 * static_cast<size_t>(batch) * sizeof(int64_t);
}

}  // namespace

Plugin::Plugin(const Fields& fields, std::shared_ptr<cuda::Constants> shared)
    : fields_(fields),
      text_(fields_.text()),
      shared_(std::move(shared)),
      constants_(shared_ != nullptr ? shared_ : std::make_shared<cuda::Constants>()) {}

nvinfer1::IPluginCapability* Plugin::getCapabilityInterface(nvinfer1::PluginCapabilityType type) noexcept {
  switch (type) {
    case nvinfer1::PluginCapabilityType::kCORE: return static_cast<nvinfer1::IPluginV3OneCore*>(this);
    case nvinfer1::PluginCapabilityType::kBUILD: return static_cast<nvinfer1::IPluginV3OneBuildV2*>(this);
    case nvinfer1::PluginCapabilityType::kRUNTIME: return static_cast<nvinfer1::IPluginV3OneRuntime*>(this);
  }
  return nullptr;
}

nvinfer1::IPluginV3* Plugin::clone() noexcept {
  Plugin* copy = nullptr;
  succeeded("clone", [&] {
    copy = new Plugin(fields_, shared_);
    return std::string();
  });
  return copy;
}

std::string Plugin::check_counts(int32_t given, int32_t outputs) const {
  if (given != inputs())
    return std::to_string(given) + " inputs are given, attribute key_frame " +
           (fields_.attributes().rotated_keys ? "1" : "0") + " needs " + std::to_string(inputs());
  if (outputs != kOutputs) return std::to_string(outputs) + " outputs are given, needed are 5";
  return {};
}

std::string Plugin::check_types(const PluginTensorDesc* in) const {
  for (int32_t i = 0; i < inputs(); ++i) {
    if (in[i].format != nvinfer1::TensorFormat::kLINEAR) return std::string(kInputNames[i]) + " is not in linear format";
    if (!input_type(i, in[i].type, [&](int32_t k) { return in[k].type; }))
      return std::string(kInputNames[i]) + " has a type that it must not have: number " +
             std::to_string(static_cast<int>(in[i].type)) + " of nvinfer1::DataType";
  }
  return {};
}

int32_t Plugin::configurePlugin(const nvinfer1::DynamicPluginTensorDesc* in, int32_t given,
                                const nvinfer1::DynamicPluginTensorDesc*, int32_t outputs) noexcept {
  return !succeeded("configurePlugin", [&]() -> std::string {
    if (auto e = check_counts(given, outputs); !e.empty()) return e;
    for (int32_t i = 0; i < given; ++i) {
      const bool constant = i == 3 || i == 4 || i >= 11;
      if (constant && shape_of(in[i].min) != shape_of(in[i].max))
        return std::string(kInputNames[i]) + " must be a constant, but its shape varies";
    }
    const cpu::Shapes shapes = shapes_of(given, [&](int32_t i) { return in[i].max; });
    if (auto e = cpu::check(fields_.attributes(), shapes); !e.empty()) return "at the largest shapes: " + e;
    describe(fields_.attributes(), shapes, in[0].desc.type, in[9].desc.type);  // throws what is too large
    return load_kernels();
  });
}

int32_t Plugin::getOutputDataTypes(DataType* out, int32_t outputs, const DataType* in, int32_t given) const noexcept {
  return !succeeded("getOutputDataTypes", [&] {
    std::string problem = check_counts(given, outputs);
    for (int32_t o = 0; problem.empty() && o < kOutputs; ++o) out[o] = in[type_source(o)];
    return problem;
  });
}

int32_t Plugin::getOutputShapes(const nvinfer1::DimsExprs* in, int32_t given, const nvinfer1::DimsExprs*, int32_t,
                                nvinfer1::DimsExprs* out, int32_t outputs, nvinfer1::IExprBuilder&) noexcept {
  return !succeeded("getOutputShapes", [&]() -> std::string {
    if (auto e = check_counts(given, outputs); !e.empty()) return e;
    constexpr int32_t ranks[] = {4, 4, 4, 2, 2, 1, 1, 3, 3, 4, 4, 4, 4, 3, 3, 1};
    for (int32_t i = 0; i < given; ++i)
      if (in[i].nbDims != ranks[i])
        return std::string(kInputNames[i]) + " has " + std::to_string(in[i].nbDims) + " dimensions, must have " +
               std::to_string(ranks[i]);
    out[0].nbDims = 4;  // [batch, steps, heads, head_dim] of query's [batch, heads, steps, head_dim]
    for (int32_t i = 0; i < 4; ++i) out[0].d[i] = in[0].d[i == 1 ? 2 : i == 2 ? 1 : i];
    for (int32_t o = 0; o < kAliased; ++o) out[1 + o] = in[kFirstAliased + o];
    return {};
  });
}

bool Plugin::supportsFormatCombination(int32_t pos, const nvinfer1::DynamicPluginTensorDesc* all, int32_t given,
                                       int32_t outputs) noexcept {
  if (given != inputs() || outputs != kOutputs || pos < 0 || pos >= given + outputs) return false;
  const PluginTensorDesc& desc = all[pos].desc;
  if (desc.format != nvinfer1::TensorFormat::kLINEAR) return false;
  const auto before = [&](int32_t i) { return all[i].desc.type; };
  return pos < given ? input_type(pos, desc.type, before) : desc.type == before(type_source(pos - given));
}

size_t Plugin::getWorkspaceSize(const nvinfer1::DynamicPluginTensorDesc* in, int32_t given,
                                const nvinfer1::DynamicPluginTensorDesc*, int32_t outputs) const noexcept {
  size_t bytes = 0;
  succeeded("getWorkspaceSize", [&]() -> std::string {
    if (auto e = check_counts(given, outputs); !e.empty()) return e;
    if (auto e = load_kernels(); !e.empty()) return e;
    const cpu::Shapes shapes = shapes_of(given, [&](int32_t i) { return in[i].max; });
    if (auto e = cpu::check(fields_.attributes(), shapes); !e.empty()) return "at the largest shapes: " + e;
    Call most = describe(fields_.attributes(), shapes, in[0].desc.type, in[9].desc.type);
    if (fields_.attributes().rotated_keys) most.layer.key_center = reinterpret_cast<const float*>(&most);  // not read
    bytes = whole_workspace(workspace_bound(most.layer, most.call, most.call.capacity), most.call.batch);
    return {};
  });
  return bytes;
}

int32_t Plugin::getAliasedInput(int32_t output) noexcept {
  return output >= 1 && output <= kAliased ? kFirstAliased + output - 1 : -1;
}

int32_t Plugin::onShapeChange(const PluginTensorDesc* in, int32_t given, const PluginTensorDesc*, int32_t outputs) noexcept {
  return !succeeded("onShapeChange", [&]() -> std::string {
    if (auto e = check_counts(given, outputs); !e.empty()) return e;
    if (auto e = check_types(in); !e.empty()) return e;
    return cpu::check(fields_.attributes(), shapes_of(given, [&](int32_t i) { return in[i].dims; }));
  });
}

int32_t Plugin::enqueue(const PluginTensorDesc* in, const PluginTensorDesc*, const void* const* inputs, void* const* outputs,
                        void* workspace, cudaStream_t stream) noexcept {
  return !succeeded("enqueue", [&]() -> std::string {
    const int32_t given = this->inputs();
    if (auto e = check_types(in); !e.empty()) return e;
    const cpu::Shapes shapes = shapes_of(given, [&](int32_t i) { return in[i].dims; });
    if (auto e = cpu::check(fields_.attributes(), shapes); !e.empty()) return e;
    if (auto e = load_kernels(); !e.empty()) return e;
    cpu::Inputs data{};
    std::copy(inputs, inputs + given, data.begin());
    gsrq_call call = cuda::describe_call(shapes, data, element_of(in[0].type), element_of(in[9].type));

    // An output that is not its input's memory starts as a copy of it.
    const cpu::Shape* const aliased[] = {&shapes.key_codes, &shapes.value_codes, &shapes.key_exact, &shapes.value_exact};
    for (int32_t i = 0; i < kAliased; ++i) {
      const void* past = inputs[kFirstAliased + i];
      const size_t bytes = static_cast<size_t>(count(*aliased[i]) * bytes_of(in[kFirstAliased + i].type));
      if (outputs[1 + i] != past && bytes > 0)
        cuda::require(cudaMemcpyAsync(outputs[1 + i], past, bytes, cudaMemcpyDeviceToDevice, stream), "copying the cache");
    }
    if (call.batch == 0 || call.steps == 0) return {};
    const gsrq_layer layer = constants_->layer(fields_.attributes(), shapes, data, true, stream);
    call.max_total = most_tokens(layer, call.capacity);
    call.output = outputs[0];
    call.key_codes = static_cast<int8_t*>(outputs[1]);
    call.value_codes = static_cast<int8_t*>(outputs[2]);
    call.key_exact = outputs[3];
    call.value_exact = outputs[4];
    const int64_t need = gsrq_cuda_workspace_bytes(&layer, &call);
    cuda::require(need < 0);
    const Lengths lengths{call.batch, call.steps, call.max_total, static_cast<const int64_t*>(inputs[5]),
                          static_cast<const int64_t*>(inputs[6])};
    auto* past = reinterpret_cast<int64_t*>(static_cast<char*>(workspace) + cuda::round_up(static_cast<size_t>(need)));
    cuda::require(sanitize(lengths, past, past + call.batch, stream), "reading the lengths");
    call.past_lengths = past;
    call.new_lengths = past + call.batch;
    cuda::require(gsrq_cuda_attention(&layer, &call, constants_->prepared(), workspace, need, stream));
    const int64_t row = count(shapes.query) / call.batch * bytes_of(in[0].type);
    cuda::require(poison(lengths, outputs[0], row, stream), "marking impossible rows");
    return {};
  });
}

}  // namespace gsrq::trt
