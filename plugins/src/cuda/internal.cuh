// What the files of the CUDA library share: errors, type dispatch, a warp's largest, where codes lie.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cstdint>

#include "gsrq/cuda/gsrq_cuda.h"
#include "gsrq/layout.h"

namespace gsrq::cuda {

inline bool is_dtype(int32_t dtype) { return dtype == GSRQ_F32 || dtype == GSRQ_F16 || dtype == GSRQ_BF16; }
__host__ __device__ inline int dtype_bytes(int32_t dtype) { return dtype == GSRQ_F32 ? 4 : 2; }

// To 16 bytes, the longest piece that a thread reads or writes at once.
__host__ __device__ inline bool aligned(const void* pointer) { return reinterpret_cast<uintptr_t>(pointer) % 16 == 0; }

// Sets gsrq_cuda_error() of the thread; returns 1.
int fail(const char* format, ...) __attribute__((format(printf, 1, 2)));
// 0, or the failure of the last launch under its name.
int launched(const char* kernel);

// One part's share of a prepared or workspace block: sizes are summed in the same order as pointers are taken.
struct Arena {
  char* base = nullptr;
  int64_t used = 0;
  template <class T>
  T* take(int64_t count) {
    T* at = base == nullptr ? nullptr : reinterpret_cast<T*>(base + used);
    used += (count * static_cast<int64_t>(sizeof(T)) + 255) / 256 * 256;
    return at;
  }
};

__device__ inline float load(const void* data, int64_t i, int32_t dtype) {
  if (dtype == GSRQ_F32) return static_cast<const float*>(data)[i];
  if (dtype == GSRQ_F16) return __half2float(static_cast<const __half*>(data)[i]);
  return __bfloat162float(static_cast<const __nv_bfloat16*>(data)[i]);
}

// The same of memory that the kernel does not write: the compiler may load ahead of stores to other memory.
__device__ inline float load_constant(const void* data, int64_t i, int32_t dtype) {
  if (dtype == GSRQ_F32) return __ldg(static_cast<const float*>(data) + i);
  if (dtype == GSRQ_F16) return __half2float(__ldg(static_cast<const __half*>(data) + i));
  return __bfloat162float(__ldg(static_cast<const __nv_bfloat16*>(data) + i));
}

// Element i of memory that the kernel does not write. Without a branch for its type: many are loaded at once.
__device__ inline float load_any(const void* data, int64_t i, int dtype) {
  const uint32_t word =
      dtype == GSRQ_F32 ? __ldg(static_cast<const uint32_t*>(data) + i) : __ldg(static_cast<const uint16_t*>(data) + i);
  const float half = __half2float(__ushort_as_half(static_cast<uint16_t>(word)));
  return dtype == GSRQ_F16 ? half : __uint_as_float(dtype == GSRQ_F32 ? word : word << 16);
}

__device__ inline void store(void* data, int64_t i, float x, int32_t dtype) {
  if (dtype == GSRQ_F32) static_cast<float*>(data)[i] = x;
  else if (dtype == GSRQ_F16) static_cast<__half*>(data)[i] = __float2half_rn(x);
  else static_cast<__nv_bfloat16*>(data)[i] = __float2bfloat16_rn(x);
}

// Largest over a warp, by integer comparison of the floats' bits: NaNs are ordered, too.
__device__ inline float warp_max(float x) {
  const int bits = __float_as_int(x);
  const int most = __reduce_max_sync(~0u, bits ^ ((bits >> 31) & 0x7fffffff));
  return __int_as_float(most ^ ((most >> 31) & 0x7fffffff));
}

// x as the cache stores it: what is appended is what every query sees.
__device__ inline float rounded(float x, int32_t dtype) {
  if (dtype == GSRQ_F16) return __half2float(__float2half_rn(x));
  if (dtype == GSRQ_BF16) return __bfloat162float(__float2bfloat16_rn(x));
  return x;
}

// Row of the code tensors that holds coded row `row` (token - sinks) of batch row b.
__device__ inline int64_t code_row(const gsrq_call& call, int32_t b, int64_t row) {
  if (call.block_table == nullptr) return b * call.capacity + row;
  return static_cast<int64_t>(call.block_table[b * static_cast<int64_t>(call.table_stride) + row / call.page]) * call.page +
         row % call.page;
}

// Where, in a tensor of codes, those lie that begin at a KV head's first byte: at(row) + j is byte j of the head's, as
// gsrq_code_offset has it, in steps that a kernel can take apart. A row is the tensor's: code_row. Rows i and i + kCodeTile are
// always tile bytes apart.
constexpr int kCodeTile = GSRQ_CODE_TILE;
struct CodePlaces {
  int64_t first;  // of row 0
  int32_t tile, run;  // bytes from a tile of rows to the next, from a row to the next within one
  __host__ __device__ int64_t at(int64_t row) const { return first + row / kCodeTile * tile + row % kCodeTile * run; }
};

__host__ __device__ inline CodePlaces code_places(const gsrq_layer& layer, const gsrq_codebook& book, int32_t kv_head) {
  const uint32_t d = layer.head_dim, width = book.width, stages = book.stages, row_bytes = book.groups * stages;
  const uint32_t byte = static_cast<uint32_t>(kv_head) * d / width * stages;
  if (!layer.codes_by_head) return {byte, static_cast<int32_t>(kCodeTile * row_bytes), static_cast<int32_t>(row_bytes)};
  const uint32_t run = (width < d ? d / width : 1) * stages;  // gsrq_code_run, without 64-bit divisions; byte is a multiple
  return {static_cast<int64_t>(byte) * kCodeTile, static_cast<int32_t>(kCodeTile * row_bytes), static_cast<int32_t>(run)};
}

// Elements (first, second) of RoPE pair p of a head; pairs past half_rope do not turn.
__host__ __device__ inline void pair_elements(const gsrq_layer& layer, int32_t p, int32_t* first, int32_t* second) {
  const int32_t half = layer.half_rope;
  if (p < half) {
    *first = layer.rope_interleaved ? 2 * p : p;
    *second = layer.rope_interleaved ? 2 * p + 1 : p + half;
  } else {
    *first = 2 * p;
    *second = 2 * p + 1;
  }
}

// Parts of the library. Each states its memory with an Arena whose base may be null.
int decode_prepare(const gsrq_layer& layer, Arena& prepared, cudaStream_t stream, bool launch);
bool decode_supported(const gsrq_layer& layer, const gsrq_call& call);
void decode_workspace(const gsrq_layer& layer, const gsrq_call& call, Arena& workspace);
int decode(const gsrq_layer& layer, const gsrq_call& call, Arena& prepared, Arena& workspace, cudaStream_t stream);

// Those of decode for keys in the rotated frame.
int lookup_prepare(const gsrq_layer& layer, Arena& prepared, cudaStream_t stream, bool launch);
bool lookup_supported(const gsrq_layer& layer);
void lookup_workspace(const gsrq_layer& layer, const gsrq_call& call, Arena& workspace);
int lookup(const gsrq_layer& layer, const gsrq_call& call, Arena& prepared, Arena& workspace, cudaStream_t stream);

int encode_prepare(const gsrq_layer& layer, Arena& prepared, cudaStream_t stream, bool launch);
void encode_workspace(const gsrq_layer& layer, const gsrq_call& call, Arena& workspace);
int encode(const gsrq_layer& layer, const gsrq_call& call, Arena& prepared, Arena& workspace, cudaStream_t stream);

void prefill_workspace(const gsrq_layer& layer, const gsrq_call& call, Arena& workspace);
int prefill(const gsrq_layer& layer, const gsrq_call& call, Arena& workspace, cudaStream_t stream);

int append(const gsrq_layer& layer, const gsrq_call& call, cudaStream_t stream);

// Around the operator, of a server's tokens. rows_workspace sets the call's query, key, value, output and exact buffers.
int check_rows(const gsrq_layer& layer, const gsrq_call& call, const gsrq_rows& rows);
void rows_workspace(const gsrq_layer& layer, gsrq_call& call, Arena& workspace);
int gather(const gsrq_layer& layer, const gsrq_call& call, const gsrq_rows& rows, cudaStream_t stream);
int scatter(const gsrq_layer& layer, const gsrq_call& call, const gsrq_rows& rows, cudaStream_t stream);

}  // namespace gsrq::cuda
