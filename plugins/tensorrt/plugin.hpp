// TensorRT plugin GsrqAttention, version 1, namespace ai.gsrq: the operator of docs/operator.md over gsrq_cuda.h. Inputs,
// outputs and attributes are the operator's; codes are int8, as plugins take no uint8.
#pragma once

#include <NvInferRuntime.h>

#include <array>
#include <memory>
#include <string>
#include <vector>

#include "gsrq/cuda/host.hpp"

namespace gsrq::trt {

constexpr const char *kName = "GsrqAttention", *kVersion = "1", *kNamespace = "ai.gsrq";
constexpr int32_t kOutputs = 5, kRequiredInputs = 15;
constexpr int32_t kFirstAliased = 7, kAliased = 4;  // outputs 1 .. 4 continue inputs 7 .. 10

// The attributes as plugin fields, which point at it.
class Fields {
 public:
  Fields();
  Fields(const Fields& other);
  Fields& operator=(const Fields&) = delete;

  // Sets them from a node's or a plan's; returns what is wrong.
  std::string read(const nvinfer1::PluginFieldCollection* given);
  const nvinfer1::PluginFieldCollection* collection() const { return &collection_; }
  const cpu::Attributes& attributes() const { return attributes_; }
  std::string text() const;  // "scale=0.25 sinks=4 ..."

 private:
  static constexpr int kInts = 9, kFloats = 2;
  std::array<int32_t, kInts> ints_{};
  std::array<float, kFloats> floats_{};
  std::array<nvinfer1::PluginField, kInts + kFloats> fields_;
  nvinfer1::PluginFieldCollection collection_;
  cpu::Attributes attributes_;
};

class Plugin final : public nvinfer1::IPluginV3,
                     public nvinfer1::IPluginV3OneCore,
                     public nvinfer1::IPluginV3OneBuildV2,
                     public nvinfer1::IPluginV3OneRuntime {
 public:
  // shared: of a plugin read from a plan, whose contexts see the same codebooks; null while a plan is built, where
  // TensorRT may time a plugin on arbitrary data.
  Plugin(const Fields& fields, std::shared_ptr<cuda::Constants> shared);

  nvinfer1::IPluginCapability* getCapabilityInterface(nvinfer1::PluginCapabilityType type) noexcept override;
  nvinfer1::IPluginV3* clone() noexcept override;

  const char* getPluginName() const noexcept override { return kName; }
  const char* getPluginVersion() const noexcept override { return kVersion; }
  const char* getPluginNamespace() const noexcept override { return kNamespace; }

  int32_t configurePlugin(const nvinfer1::DynamicPluginTensorDesc* in, int32_t inputs,
                          const nvinfer1::DynamicPluginTensorDesc* out, int32_t outputs) noexcept override;
  int32_t getOutputDataTypes(nvinfer1::DataType* out, int32_t outputs, const nvinfer1::DataType* in,
                             int32_t inputs) const noexcept override;
  int32_t getOutputShapes(const nvinfer1::DimsExprs* in, int32_t inputs, const nvinfer1::DimsExprs*, int32_t,
                          nvinfer1::DimsExprs* out, int32_t outputs, nvinfer1::IExprBuilder&) noexcept override;
  bool supportsFormatCombination(int32_t pos, const nvinfer1::DynamicPluginTensorDesc* all, int32_t inputs,
                                 int32_t outputs) noexcept override;
  int32_t getNbOutputs() const noexcept override { return kOutputs; }
  size_t getWorkspaceSize(const nvinfer1::DynamicPluginTensorDesc* in, int32_t inputs,
                          const nvinfer1::DynamicPluginTensorDesc* out, int32_t outputs) const noexcept override;
  const char* getTimingCacheID() noexcept override { return text_.c_str(); }
  const char* getMetadataString() noexcept override { return text_.c_str(); }
  int32_t getAliasedInput(int32_t output) noexcept override;

  int32_t onShapeChange(const nvinfer1::PluginTensorDesc* in, int32_t inputs, const nvinfer1::PluginTensorDesc* out,
                        int32_t outputs) noexcept override;
  int32_t enqueue(const nvinfer1::PluginTensorDesc* in, const nvinfer1::PluginTensorDesc* out, const void* const* inputs,
                  void* const* outputs, void* workspace, cudaStream_t stream) noexcept override;
  nvinfer1::IPluginV3* attachToContext(nvinfer1::IPluginResourceContext*) noexcept override { return clone(); }
  const nvinfer1::PluginFieldCollection* getFieldsToSerialize() noexcept override { return fields_.collection(); }

 private:
  int32_t inputs() const { return kRequiredInputs + fields_.attributes().rotated_keys; }
  std::string check_counts(int32_t inputs, int32_t outputs) const;
  std::string check_types(const nvinfer1::PluginTensorDesc* in) const;

  const Fields fields_;
  const std::string text_;
  const std::shared_ptr<cuda::Constants> shared_, constants_;
};

}  // namespace gsrq::trt
