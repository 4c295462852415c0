// A host of the TensorRT plugin without TensorRT: what the builder and a context do with a plugin, as C functions for
// ctypes (tests/trt_harness.py). Compiled against the headers that the plugin was compiled with, linked to nothing of theirs.
#include <NvInferRuntime.h>

#include <dlfcn.h>

#include <cstring>
#include <string>
#include <vector>

using namespace nvinfer1;

namespace {

std::string messages;

class Logger final : public ILogger {
 public:
  void log(Severity, const char* text) noexcept override { messages += std::string(text) + "\n"; }
} logger;

class Finder final : public ILoggerFinder {
 public:
  ILogger* findLogger() override { return &logger; }
} finder;

struct Expr final : IDimensionExpr {};  // only passed on; which one comes back is what counts
struct Builder final : IExprBuilder {};

IPluginCreatorV3One* creator = nullptr;

template <class Capability>
Capability* as(IPluginV3* plugin, PluginCapabilityType type) {
  return static_cast<Capability*>(plugin->getCapabilityInterface(type));
}
IPluginV3OneCore* core(IPluginV3* plugin) { return as<IPluginV3OneCore>(plugin, PluginCapabilityType::kCORE); }
IPluginV3OneBuildV2* build(IPluginV3* plugin) { return as<IPluginV3OneBuildV2>(plugin, PluginCapabilityType::kBUILD); }
IPluginV3OneRuntime* runtime(IPluginV3* plugin) {
  return as<IPluginV3OneRuntime>(plugin, PluginCapabilityType::kRUNTIME);
}

}  // namespace

extern "C" {

struct Field {
  const char* name;
  int32_t type, length;
  const void* data;
};

struct Tensor {
  int32_t type, format, rank;
  int64_t dims[8], least[8], most[8];
};

}

namespace {

std::vector<DynamicPluginTensorDesc> dynamic(const Tensor* tensors, int32_t count) {
  std::vector<DynamicPluginTensorDesc> out(static_cast<size_t>(count));
  for (int32_t i = 0; i < count; ++i) {
    const Tensor& t = tensors[i];
    auto& d = out[static_cast<size_t>(i)];
    d.desc.type = static_cast<DataType>(t.type);
    d.desc.format = static_cast<TensorFormat>(t.format);
    for (auto [dims, from] : {std::pair{&d.desc.dims, t.dims}, {&d.min, t.least}, {&d.opt, t.most}, {&d.max, t.most}}) {
      dims->nbDims = t.rank;
      std::copy(from, from + 8, dims->d);
    }
  }
  return out;
}

std::vector<PluginTensorDesc> fixed(const Tensor* tensors, int32_t count) {
  std::vector<PluginTensorDesc> out;
  for (const auto& d : dynamic(tensors, count)) out.push_back(d.desc);
  return out;
}

std::string describe(const PluginFieldCollection* fields) {
  std::string out;
  for (int32_t i = 0; i < fields->nbFields; ++i) {
    const PluginField& f = fields->fields[i];
    out += std::string(f.name) + (f.type == PluginFieldType::kINT32 ? " int " : " float ");
    out += f.type == PluginFieldType::kINT32 ? std::to_string(*static_cast<const int32_t*>(f.data))
                                             : std::to_string(*static_cast<const float*>(f.data));
    out += "\n";
  }
  return out;
}

}  // namespace

extern "C" {

// 0, or 1 with the reason among the messages.
int harness_open(const char* path) {
  void* library = dlopen(path, RTLD_NOW | RTLD_LOCAL);
  if (library == nullptr) {
    messages += std::string(dlerror()) + "\n";
    return 1;
  }
  reinterpret_cast<void (*)(ILoggerFinder*)>(dlsym(library, "setLoggerFinder"))(&finder);
  int32_t count = 0;
  auto* creators =
      reinterpret_cast<IPluginCreatorInterface* const* (*)(int32_t&)>(dlsym(library, "getCreators"))(count);
  if (count != 1 || std::strcmp(creators[0]->getInterfaceInfo().kind, "PLUGIN CREATOR_V3ONE") != 0) return 1;
  creator = static_cast<IPluginCreatorV3One*>(creators[0]);
  return 0;
}

// The messages since the last call.
const char* harness_messages() {
  static std::string taken;
  taken.swap(messages);
  messages.clear();
  return taken.c_str();
}

void* harness_create(const Field* fields, int32_t count, int32_t runtime_phase) {
  std::vector<PluginField> list;
  for (int32_t i = 0; i < count; ++i)
    list.emplace_back(fields[i].name, fields[i].data, static_cast<PluginFieldType>(fields[i].type), fields[i].length);
  const PluginFieldCollection collection{count, list.data()};
  return creator->createPlugin("node", &collection, runtime_phase ? TensorRTPhase::kRUNTIME : TensorRTPhase::kBUILD);
}

// What a plan does: the plugin of the fields that this one serializes.
void* harness_reload(void* plugin) {
  return creator->createPlugin("node", runtime(static_cast<IPluginV3*>(plugin))->getFieldsToSerialize(),
                               TensorRTPhase::kRUNTIME);
}

void* harness_clone(void* plugin) { return static_cast<IPluginV3*>(plugin)->clone(); }
void* harness_attach(void* plugin) { return runtime(static_cast<IPluginV3*>(plugin))->attachToContext(nullptr); }
void harness_delete(void* plugin) { delete static_cast<IPluginV3*>(plugin); }

const char* harness_serialized(void* plugin) {
  static std::string out;
  out = describe(runtime(static_cast<IPluginV3*>(plugin))->getFieldsToSerialize());
  return out.c_str();
}

const char* harness_identity(void* plugin) {
  static std::string out;
  auto* p = static_cast<IPluginV3*>(plugin);
  out = std::string(core(p)->getPluginNamespace()) + " " + core(p)->getPluginName() + " " + core(p)->getPluginVersion() +
        "\n" + build(p)->getInterfaceInfo().kind + " " + std::to_string(build(p)->getInterfaceInfo().major) + "\n" +
        build(p)->getTimingCacheID();
  for (int32_t i = 0; i < creator->getFieldNames()->nbFields; ++i)
    out += std::string(i ? " " : "\n") + creator->getFieldNames()->fields[i].name;
  return out.c_str();
}

int32_t harness_aliased(void* plugin, int32_t output) {
  return build(static_cast<IPluginV3*>(plugin))->getAliasedInput(output);
}

int harness_supports(void* plugin, int32_t pos, const Tensor* all, int32_t inputs, int32_t outputs) {
  const auto descs = dynamic(all, inputs + outputs);
  return build(static_cast<IPluginV3*>(plugin))->supportsFormatCombination(pos, descs.data(), inputs, outputs);
}

int harness_output_types(void* plugin, const int32_t* in, int32_t inputs, int32_t* out, int32_t outputs) {
  return build(static_cast<IPluginV3*>(plugin))
      ->getOutputDataTypes(reinterpret_cast<DataType*>(out), outputs, reinterpret_cast<const DataType*>(in), inputs);
}

// out: for each output its rank, then for each of 8 dimensions input * 8 + dimension that it is, -1 where it is neither.
int harness_output_shapes(void* plugin, const Tensor* in, int32_t inputs, int32_t outputs, int32_t* out) {
  std::vector<Expr> exprs(static_cast<size_t>(inputs) * 8);
  std::vector<DimsExprs> shapes(static_cast<size_t>(inputs)), results(static_cast<size_t>(outputs));
  for (int32_t i = 0; i < inputs; ++i) {
    shapes[static_cast<size_t>(i)].nbDims = in[i].rank;
    for (int32_t d = 0; d < 8; ++d) shapes[static_cast<size_t>(i)].d[d] = &exprs[static_cast<size_t>(i * 8 + d)];
  }
  Builder builder;
  const int32_t failed = build(static_cast<IPluginV3*>(plugin))
                             ->getOutputShapes(shapes.data(), inputs, nullptr, 0, results.data(), outputs, builder);
  if (failed) return failed;
  for (const DimsExprs& result : results) {
    *out++ = result.nbDims;
    for (int32_t d = 0; d < 8; ++d) {
      const auto at = static_cast<const Expr*>(result.d[d]) - exprs.data();
      *out++ = d < result.nbDims && at >= 0 && at < static_cast<int64_t>(exprs.size()) ? static_cast<int32_t>(at) : -1;
    }
  }
  return 0;
}

int harness_configure(void* plugin, const Tensor* in, int32_t inputs, const Tensor* out, int32_t outputs) {
  return build(static_cast<IPluginV3*>(plugin))
      ->configurePlugin(dynamic(in, inputs).data(), inputs, dynamic(out, outputs).data(), outputs);
}

int64_t harness_workspace(void* plugin, const Tensor* in, int32_t inputs, const Tensor* out, int32_t outputs) {
  return static_cast<int64_t>(build(static_cast<IPluginV3*>(plugin))
                                  ->getWorkspaceSize(dynamic(in, inputs).data(), inputs, dynamic(out, outputs).data(), outputs));
}

int harness_shape_change(void* plugin, const Tensor* in, int32_t inputs, const Tensor* out, int32_t outputs) {
  return runtime(static_cast<IPluginV3*>(plugin))
      ->onShapeChange(fixed(in, inputs).data(), inputs, fixed(out, outputs).data(), outputs);
}

int harness_enqueue(void* plugin, const Tensor* in, int32_t inputs, const Tensor* out, int32_t outputs,
                    const void* const* from, void* const* to, void* workspace, void* stream) {
  return runtime(static_cast<IPluginV3*>(plugin))
      ->enqueue(fixed(in, inputs).data(), fixed(out, outputs).data(), from, to, workspace,
                static_cast<cudaStream_t>(stream));
}

}  // extern "C"
