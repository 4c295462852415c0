// The part of ONNX Runtime's stable C ABI that the custom op uses, so that it builds without ONNX Runtime's headers
// (no wheel carries them). Facts only: ONNX Runtime appends to its function table and to OrtCustomOp and never
// reorders them. tests/plugins/check_ort_abi.cpp compares every slot, offset and value with the real header.
#pragma once

#include <cstddef>
#include <cstdint>

namespace gsrq::ort {

// Function table and OrtCustomOp as of ONNX Runtime 1.18, the first with the may-inplace hook.
inline constexpr uint32_t kApiVersion = 18;

// Opaque objects of the runtime.
struct Status;
struct Value;
struct TensorInfo;
struct KernelInfo;
struct KernelContext;
struct SessionOptions;
struct CustomOpDomain;
struct MemoryInfo;

enum class ErrorCode : int { fail = 1, invalid_argument = 2 };
enum class ElementType : int { f32 = 1, i8 = 3, i64 = 7, f16 = 10, bf16 = 16 };
enum class MemoryType : int { cpu_input = -2, standard = 0 };
enum class Presence : int { required = 0, optional = 1 };

struct Api;  // a table of function pointers; see Slot
struct ApiBase {
  const Api* (*get_api)(uint32_t version);
  const char* (*get_version_string)();
};

struct Allocator {
  uint32_t version;
  void* (*allocate)(Allocator*, size_t bytes);
  void (*release)(Allocator*, void*);
};

// Index of a function in the table and its type.
template <size_t Index, class Function>
struct Slot;
template <size_t Index, class Result, class... Arguments>
struct Slot<Index, Result(Arguments...)> {
  static constexpr size_t index = Index;
  using pointer = Result (*)(Arguments...);
  Result operator()(const Api* api, Arguments... arguments) const {
    return reinterpret_cast<const pointer*>(api)[Index](arguments...);
  }
};

inline constexpr Slot<0, Status*(ErrorCode, const char*)> CreateStatus{};
inline constexpr Slot<26, Status*(const char*, CustomOpDomain**)> CreateCustomOpDomain{};
inline constexpr Slot<27, Status*(CustomOpDomain*, const struct CustomOp*)> CustomOpDomain_Add{};
inline constexpr Slot<28, Status*(SessionOptions*, CustomOpDomain*)> AddCustomOpDomain{};
inline constexpr Slot<51, Status*(Value*, void**)> GetTensorMutableData{};
inline constexpr Slot<60, Status*(const TensorInfo*, ElementType*)> GetTensorElementType{};
inline constexpr Slot<61, Status*(const TensorInfo*, size_t*)> GetDimensionsCount{};
inline constexpr Slot<62, Status*(const TensorInfo*, int64_t*, size_t)> GetDimensions{};
inline constexpr Slot<65, Status*(const Value*, TensorInfo**)> GetTensorTypeAndShape{};
inline constexpr Slot<85, Status*(const KernelInfo*, const char*, float*)> KernelInfoGetAttribute_float{};
inline constexpr Slot<86, Status*(const KernelInfo*, const char*, int64_t*)> KernelInfoGetAttribute_int64{};
inline constexpr Slot<90, Status*(const KernelContext*, size_t, const Value**)> KernelContext_GetInput{};
inline constexpr Slot<91, Status*(KernelContext*, size_t, const int64_t*, size_t, Value**)> KernelContext_GetOutput{};
inline constexpr Slot<93, void(Status*)> ReleaseStatus{};
inline constexpr Slot<99, void(TensorInfo*)> ReleaseTensorTypeAndShapeInfo{};
inline constexpr Slot<101, void(CustomOpDomain*)> ReleaseCustomOpDomain{};
inline constexpr Slot<132, void(Allocator*)> ReleaseAllocator{};
inline constexpr Slot<193, Status*(const KernelContext*, void**)> KernelContext_GetGPUComputeStream{};
inline constexpr Slot<194, Status*(const Value*, const MemoryInfo**)> GetTensorMemoryInfo{};
inline constexpr Slot<249, Status*(const KernelInfo*, size_t, int*, const Value**)> KernelInfoGetConstantInput_tensor{};
inline constexpr Slot<253, Status*(const KernelContext*, const MemoryInfo*, Allocator**)> KernelContext_GetAllocator{};
inline constexpr Slot<274, Status*(const KernelContext*, void (*)(void*, size_t), size_t, size_t, void*)>
    KernelContext_ParallelFor{};
inline constexpr Slot<277, Status*(const KernelContext*, const MemoryInfo*, size_t, void**)>
    KernelContext_GetScratchBuffer{};

// What the runtime asks of a custom op. Null: not provided.
struct CustomOp {
  uint32_t version;
  void* (*create_kernel)(const CustomOp*, const Api*, const KernelInfo*);
  const char* (*get_name)(const CustomOp*);
  const char* (*get_execution_provider)(const CustomOp*);
  ElementType (*get_input_type)(const CustomOp*, size_t index);
  size_t (*get_input_count)(const CustomOp*);
  ElementType (*get_output_type)(const CustomOp*, size_t index);
  size_t (*get_output_count)(const CustomOp*);
  void (*compute)(void* kernel, KernelContext*);
  void (*destroy_kernel)(void* kernel);
  Presence (*get_input_presence)(const CustomOp*, size_t index);
  Presence (*get_output_presence)(const CustomOp*, size_t index);
  MemoryType (*get_input_memory)(const CustomOp*, size_t index);
  int (*get_variadic_input_min)(const CustomOp*);
  int (*get_variadic_input_homogeneous)(const CustomOp*);
  int (*get_variadic_output_min)(const CustomOp*);
  int (*get_variadic_output_homogeneous)(const CustomOp*);
  Status* (*create_kernel_v2)(const CustomOp*, const Api*, const KernelInfo*, void** kernel);
  Status* (*compute_v2)(void* kernel, KernelContext*);
  Status* (*infer_output_shape)(const CustomOp*, void* context);
  int (*get_start_version)(const CustomOp*);
  int (*get_end_version)(const CustomOp*);
  size_t (*get_may_inplace)(int** input_index, int** output_index);
  void (*release_may_inplace)(int* input_index, int* output_index);
  size_t (*get_alias_map)(int** input_index, int** output_index);
  void (*release_alias_map)(int* input_index, int* output_index);
};

}  // namespace gsrq::ort
