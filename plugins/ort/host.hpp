// What the custom op's hosts for CPU and CUDA share: reading attributes and tensors, and how the op declares itself.
// Nothing throws across the ABI.
#pragma once

#include <exception>
#include <new>
#include <stdexcept>
#include <string>
#include <utility>

#include "gsrq/cpu/attention.hpp"
#include "ort_abi.h"

namespace gsrq::ort {

constexpr size_t kInputs = 15, kOutputs = 5;  // required ones
constexpr size_t kKeyCenter = 15;             // the optional input of keys coded in the rotated frame
constexpr size_t kFirstAliased = 7, kAliased = 4;  // inputs 7 .. 10 may share memory with outputs 1 .. 4

// One registered op for each type of query, key, value and output (io) and of the exact buffers; the runtime picks by type.
struct Op : CustomOp {
  ElementType io, exact;
};

Op make_cpu_op(ElementType exact);
Op make_cuda_op(ElementType io, ElementType exact);  // in libgsrq_ort_cuda.so alone

inline Status* failure(const Api* api, const std::string& message) {
  return CreateStatus(api, ErrorCode::invalid_argument, ("GsrqAttention: " + message).c_str());
}

// A status of the runtime on its way out of nested calls.
struct Failed {
  Status* status;
};
inline void require(Status* status) {
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

// Attribute readers: false if absent; an attribute of the other type is an error, not an absence.
inline bool read(const Api* api, const KernelInfo* info, const char* name, int64_t* out) {
  Status* status = KernelInfoGetAttribute_int64(api, info, name, out);
  if (status == nullptr) return true;
  ReleaseStatus(api, status);
  float other;
  status = KernelInfoGetAttribute_float(api, info, name, &other);
  if (status == nullptr) throw Failed{failure(api, std::string("attribute ") + name + " must be an int, is a float")};
  ReleaseStatus(api, status);
  return false;
}

inline bool read(const Api* api, const KernelInfo* info, const char* name, float* out) {
  Status* status = KernelInfoGetAttribute_float(api, info, name, out);
  if (status == nullptr) return true;
  ReleaseStatus(api, status);
  int64_t other;
  status = KernelInfoGetAttribute_int64(api, info, name, &other);
  if (status == nullptr) throw Failed{failure(api, std::string("attribute ") + name + " must be a float, is an int")};
  ReleaseStatus(api, status);
  return false;
}

inline std::string read_attributes(const Api* api, const KernelInfo* info, cpu::Attributes* out) {
  for (const auto& [name, value] :
       {std::pair<const char*, int64_t*>{"sinks", &out->sinks}, {"window", &out->window}, {"block", &out->block}})
    if (!read(api, info, name, value)) return std::string("attribute ") + name + " is missing";
  if (!read(api, info, "scale", &out->scale)) return "attribute scale is missing";
  int64_t interleaved = 0, exact_prefill = 0, key_frame = 0, code_order = 0;
  read(api, info, "beam", &out->beam);
  read(api, info, "sliding_window", &out->sliding_window);
  read(api, info, "softcap", &out->softcap);
  read(api, info, "rope_interleaved", &interleaved);
  read(api, info, "exact_prefill", &exact_prefill);
  read(api, info, "key_frame", &key_frame);
  read(api, info, "code_order", &code_order);
  for (const auto& [name, value] : {std::pair<const char*, int64_t>{"rope_interleaved", interleaved},
                                    {"exact_prefill", exact_prefill},
                                    {"key_frame", key_frame},
                                    {"code_order", code_order}})
    if (value != 0 && value != 1)
      return std::string("attribute ") + name + " is " + std::to_string(value) + ", must be 0 or 1";
  out->rope_interleaved = interleaved != 0;
  out->exact_prefill = exact_prefill != 0;
  out->rotated_keys = key_frame != 0;
  out->codes_by_head = code_order != 0;
  return cpu::check(*out);
}

inline bool constant(const Api* api, const KernelInfo* info, size_t input) {
  int is_constant = 0;
  const Value* value = nullptr;
  require(KernelInfoGetConstantInput_tensor(api, info, input, &is_constant, &value));
  return is_constant != 0;
}

// Shape and data of an input.
inline const void* read_input(const Api* api, const KernelContext* context, size_t index, cpu::Shape* shape) {
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

inline void* allocate_output(const Api* api, KernelContext* context, size_t index, const cpu::Shape& shape) {
  Value* value = nullptr;
  require(KernelContext_GetOutput(api, context, index, shape.data(), shape.size(), &value));
  void* data = nullptr;
  require(GetTensorMutableData(api, value, &data));
  return data;
}

// Shapes and data of all inputs. key_center, which is optional, is null with an empty shape where it is not given;
// cpu::check judges both.
inline cpu::Inputs read_inputs(const Api* api, const KernelContext* context, cpu::Shapes* s) {
  const auto shapes = cpu::in_order(*s);
  cpu::Inputs data{};
  for (size_t i = 0; i < kInputs; ++i) data[i] = read_input(api, context, i, shapes[i]);
  const Value* center = nullptr;
  require(KernelContext_GetInput(api, context, kKeyCenter, &center));
  if (center != nullptr) data[kKeyCenter] = read_input(api, context, kKeyCenter, shapes[kKeyCenter]);
  return data;
}

// All of an op but its provider, its kernel and where its inputs lie.
Op declare_op(ElementType io, ElementType exact);

}  // namespace gsrq::ort
