#include "lengths.hpp"

namespace gsrq::trt {
namespace {

__device__ bool possible(const Lengths& lengths, int32_t row) {
  const int64_t past = lengths.past[row], fresh = lengths.fresh[row];
  return past >= 0 && fresh >= 0 && fresh <= lengths.steps && past <= lengths.most - fresh;
}

__global__ void sanitize_rows(Lengths lengths, int64_t* safe_past, int64_t* safe_fresh) {
  const int32_t row = blockIdx.x * blockDim.x + threadIdx.x;
  if (row >= lengths.batch) return;
  const bool sound = possible(lengths, row);
  safe_past[row] = sound ? lengths.past[row] : 0;
  safe_fresh[row] = sound ? lengths.fresh[row] : 0;
}

__global__ void poison_rows(Lengths lengths, unsigned char* output, int64_t row_bytes) {
  const int32_t row = blockIdx.x;
  if (possible(lengths, row)) return;
  for (int64_t i = threadIdx.x; i < row_bytes; i += blockDim.x) output[row * row_bytes + i] = 0xff;
}

}  // namespace

cudaError_t sanitize(const Lengths& lengths, int64_t* safe_past, int64_t* safe_fresh, cudaStream_t stream) {
  sanitize_rows<<<static_cast<unsigned>((lengths.batch + 127) / 128), 128, 0, stream>>>(lengths, safe_past, safe_fresh);
  return cudaGetLastError();
}

cudaError_t poison(const Lengths& lengths, void* output, int64_t row_bytes, cudaStream_t stream) {
  poison_rows<<<static_cast<unsigned>(lengths.batch), 256, 0, stream>>>(lengths, static_cast<unsigned char*>(output),
                                                                       row_bytes);
  return cudaGetLastError();
}

}  // namespace gsrq::trt
