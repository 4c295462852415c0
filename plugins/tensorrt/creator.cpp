// The plugin's creator, TensorRT's logger, and the entry points that TensorRT looks up in a plugin library.
#include <atomic>
#include <cstdio>

#include "log.hpp"
#include "plugin.hpp"

namespace gsrq::trt {
namespace {

std::atomic<nvinfer1::ILoggerFinder*> logger_finder{nullptr};

class Creator final : public nvinfer1::IPluginCreatorV3One {
 public:
  nvinfer1::IPluginV3* createPlugin(const char*, const nvinfer1::PluginFieldCollection* given,
                                    nvinfer1::TensorRTPhase phase) noexcept override {
    Plugin* plugin = nullptr;
    succeeded("createPlugin", [&] {
      Fields fields;
      std::string problem = fields.read(given);
      const bool runtime = phase == nvinfer1::TensorRTPhase::kRUNTIME;
      if (problem.empty()) plugin = new Plugin(fields, runtime ? std::make_shared<cuda::Constants>() : nullptr);
      return problem;
    });
    return plugin;
  }
  const nvinfer1::PluginFieldCollection* getFieldNames() noexcept override { return names_.collection(); }
  const char* getPluginName() const noexcept override { return kName; }
  const char* getPluginVersion() const noexcept override { return kVersion; }
  const char* getPluginNamespace() const noexcept override { return kNamespace; }

 private:
  const Fields names_;
};

}  // namespace

void log_error(const std::string& message) noexcept {
  nvinfer1::ILoggerFinder* finder = logger_finder.load();
  nvinfer1::ILogger* logger = finder != nullptr ? finder->findLogger() : nullptr;
  if (logger != nullptr) logger->log(nvinfer1::ILogger::Severity::kERROR, message.c_str());
  else std::fprintf(stderr, "%s\n", message.c_str());
}

}  // namespace gsrq::trt

#define GSRQ_EXPORT extern "C" __attribute__((visibility("default")))
#define GSRQ_TEXT_OF(x) #x
#define GSRQ_TEXT(x) GSRQ_TEXT_OF(x)

GSRQ_EXPORT nvinfer1::IPluginCreatorInterface* const* getCreators(int32_t& count) {
  static gsrq::trt::Creator creator;
  static nvinfer1::IPluginCreatorInterface* const creators[] = {&creator};
  count = 1;
  return creators;
}

GSRQ_EXPORT void setLoggerFinder(nvinfer1::ILoggerFinder* finder) { gsrq::trt::logger_finder = finder; }

// The TensorRT whose headers this was compiled with: plugins are for one major version.
GSRQ_EXPORT const char* GsrqTensorRTVersion() noexcept {
  return GSRQ_TEXT(NV_TENSORRT_MAJOR) "." GSRQ_TEXT(NV_TENSORRT_MINOR);
}
