// The operator's attributes as plugin fields: from an ONNX node through TensorRT's parser, and to and from a plan.
#include <climits>
#include <cstring>
#include <sstream>

#include "plugin.hpp"

namespace gsrq::trt {
namespace {

using nvinfer1::PluginField;
using nvinfer1::PluginFieldType;

constexpr const char* kIntNames[] = {"sinks",         "window",           "block",         "beam",
                                     "sliding_window", "rope_interleaved", "exact_prefill", "key_frame",
                                     "code_order"};
constexpr const char* kFloatNames[] = {"scale", "softcap"};
constexpr int kRequiredInts = 3, kRequiredFloats = 1;  // the first ones

}  // namespace

Fields::Fields() {
  ints_[3] = 1;
  for (int i = 0; i < kInts; ++i) fields_[i] = PluginField(kIntNames[i], &ints_[i], PluginFieldType::kINT32, 1);
  for (int i = 0; i < kFloats; ++i)
    fields_[kInts + i] = PluginField(kFloatNames[i], &floats_[i], PluginFieldType::kFLOAT32, 1);
  collection_.nbFields = kInts + kFloats;
  collection_.fields = fields_.data();
}

Fields::Fields(const Fields& other) : Fields() {
  ints_ = other.ints_;
  floats_ = other.floats_;
  attributes_ = other.attributes_;
}

std::string Fields::read(const nvinfer1::PluginFieldCollection* given) {
  if (given == nullptr || given->nbFields < 0 || (given->nbFields > 0 && given->fields == nullptr))
    return "no attributes are given";
  std::array<bool, kInts + kFloats> seen{};
  for (int32_t f = 0; f < given->nbFields; ++f) {
    const PluginField& field = given->fields[f];
    if (field.name == nullptr) return "attribute " + std::to_string(f) + " has no name";
    int at = -1;
    for (int i = 0; i < kInts + kFloats; ++i)
      if (std::strcmp(field.name, fields_[i].name) == 0) at = i;
    const std::string name = std::string("attribute ") + field.name;
    if (at < 0) return name + " is unknown";
    if (seen[at]) return name + " is given twice";
    if (field.data == nullptr || field.length != 1) return name + " must be one number";
    seen[at] = true;
    if (at >= kInts) {
      if (field.type != PluginFieldType::kFLOAT32) return name + " must be a float";
      std::memcpy(&floats_[at - kInts], field.data, sizeof(float));
    } else if (field.type == PluginFieldType::kINT32) {
      std::memcpy(&ints_[at], field.data, sizeof(int32_t));
    } else if (field.type == PluginFieldType::kINT64) {
      int64_t value;
      std::memcpy(&value, field.data, sizeof value);
      if (value < INT32_MIN || value > INT32_MAX) return name + " is " + std::to_string(value) + ", too large for CUDA";
      ints_[at] = static_cast<int32_t>(value);
    } else {
      return name + " must be an int";
    }
  }
  for (int i = 0; i < kInts + kFloats; ++i)
    if (!seen[i] && (i < kRequiredInts || (i >= kInts && i < kInts + kRequiredFloats)))
      return std::string("attribute ") + fields_[i].name + " is missing";
  for (int i = 5; i < kInts; ++i)
    if (ints_[i] != 0 && ints_[i] != 1)
      return std::string("attribute ") + kIntNames[i] + " is " + std::to_string(ints_[i]) + ", must be 0 or 1";
  cpu::Attributes& a = attributes_;
  a.scale = floats_[0];
  a.softcap = floats_[1];
  a.sinks = ints_[0];
  a.window = ints_[1];
  a.block = ints_[2];
  a.beam = ints_[3];
  a.sliding_window = ints_[4];
  a.rope_interleaved = ints_[5] != 0;
  a.exact_prefill = ints_[6] != 0;
  a.rotated_keys = ints_[7] != 0;
  a.codes_by_head = ints_[8] != 0;
  return cpu::check(a);
}

std::string Fields::text() const {
  std::ostringstream out;
  out.precision(9);
  for (int i = 0; i < kInts; ++i) out << kIntNames[i] << '=' << ints_[i] << ' ';
  for (int i = 0; i < kFloats; ++i) out << (i ? " " : "") << kFloatNames[i] << '=' << floats_[i];
  return out.str();
}

}  // namespace gsrq::trt
