// Compares ort_abi.h with ONNX Runtime's own header; compiled, never run.
#include <onnxruntime_c_api.h>

#include "ort_abi.h"

namespace ours = gsrq::ort;

#define SLOT(name)                                                                                      \
  static_assert(offsetof(OrtApi, name) == decltype(ours::name)::index * sizeof(void*), "slot of " #name)
SLOT(CreateStatus);
SLOT(CreateCustomOpDomain);
SLOT(CustomOpDomain_Add);
SLOT(AddCustomOpDomain);
SLOT(GetTensorMutableData);
SLOT(GetTensorElementType);
SLOT(GetDimensionsCount);
SLOT(GetDimensions);
SLOT(GetTensorTypeAndShape);
SLOT(KernelInfoGetAttribute_float);
SLOT(KernelInfoGetAttribute_int64);
SLOT(KernelContext_GetInput);
SLOT(KernelContext_GetOutput);
SLOT(ReleaseStatus);
SLOT(ReleaseTensorTypeAndShapeInfo);
SLOT(ReleaseCustomOpDomain);
SLOT(ReleaseAllocator);
SLOT(KernelContext_GetGPUComputeStream);
SLOT(GetTensorMemoryInfo);
SLOT(KernelInfoGetConstantInput_tensor);
SLOT(KernelContext_GetAllocator);
SLOT(KernelContext_ParallelFor);
SLOT(KernelContext_GetScratchBuffer);

static_assert(offsetof(OrtAllocator, version) == offsetof(ours::Allocator, version), "OrtAllocator::version");
static_assert(offsetof(OrtAllocator, Alloc) == offsetof(ours::Allocator, allocate), "OrtAllocator::Alloc");
static_assert(offsetof(OrtAllocator, Free) == offsetof(ours::Allocator, release), "OrtAllocator::Free");

#define MEMBER(theirs, mine)                                                                      \
  static_assert(offsetof(OrtCustomOp, theirs) == offsetof(ours::CustomOp, mine), "offset of " #theirs)
MEMBER(version, version);
MEMBER(CreateKernel, create_kernel);
MEMBER(GetName, get_name);
MEMBER(GetExecutionProviderType, get_execution_provider);
MEMBER(GetInputType, get_input_type);
MEMBER(GetInputTypeCount, get_input_count);
MEMBER(GetOutputType, get_output_type);
MEMBER(GetOutputTypeCount, get_output_count);
MEMBER(KernelCompute, compute);
MEMBER(KernelDestroy, destroy_kernel);
MEMBER(GetInputCharacteristic, get_input_presence);
MEMBER(GetOutputCharacteristic, get_output_presence);
MEMBER(GetInputMemoryType, get_input_memory);
MEMBER(GetVariadicInputMinArity, get_variadic_input_min);
MEMBER(GetVariadicInputHomogeneity, get_variadic_input_homogeneous);
MEMBER(GetVariadicOutputMinArity, get_variadic_output_min);
MEMBER(GetVariadicOutputHomogeneity, get_variadic_output_homogeneous);
MEMBER(CreateKernelV2, create_kernel_v2);
MEMBER(KernelComputeV2, compute_v2);
MEMBER(InferOutputShapeFn, infer_output_shape);
MEMBER(GetStartVersion, get_start_version);
MEMBER(GetEndVersion, get_end_version);
MEMBER(GetMayInplace, get_may_inplace);
MEMBER(ReleaseMayInplace, release_may_inplace);
MEMBER(GetAliasMap, get_alias_map);
MEMBER(ReleaseAliasMap, release_alias_map);
static_assert(sizeof(OrtCustomOp) >= sizeof(ours::CustomOp), "OrtCustomOp has shrunk");
static_assert(ORT_API_VERSION >= ours::kApiVersion, "header older than the ABI we use");

#define VALUE(theirs, mine) static_assert(static_cast<int>(theirs) == static_cast<int>(ours::mine), #theirs)
VALUE(ORT_FAIL, ErrorCode::fail);
VALUE(ORT_INVALID_ARGUMENT, ErrorCode::invalid_argument);
VALUE(ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT, ElementType::f32);
VALUE(ONNX_TENSOR_ELEMENT_DATA_TYPE_INT8, ElementType::i8);
VALUE(ONNX_TENSOR_ELEMENT_DATA_TYPE_INT64, ElementType::i64);
VALUE(ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT16, ElementType::f16);
VALUE(ONNX_TENSOR_ELEMENT_DATA_TYPE_BFLOAT16, ElementType::bf16);
VALUE(OrtMemTypeCPUInput, MemoryType::cpu_input);
VALUE(OrtMemTypeDefault, MemoryType::standard);
VALUE(INPUT_OUTPUT_REQUIRED, Presence::required);
VALUE(INPUT_OUTPUT_OPTIONAL, Presence::optional);
static_assert(offsetof(OrtApiBase, GetApi) == offsetof(ours::ApiBase, get_api), "GetApi");
static_assert(offsetof(OrtApiBase, GetVersionString) == offsetof(ours::ApiBase, get_version_string), "GetVersionString");
