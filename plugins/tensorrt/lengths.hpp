// Lengths come from clients and lie on the device, where the host cannot read them without waiting: a row whose lengths are
// impossible is left alone and its output made NaN, so that no kernel reads or writes past a cache and nobody takes the
// answer for one.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

namespace gsrq::trt {

struct Lengths {
  int32_t batch, steps;
  int64_t most;  // tokens that a row may have after the call
  const int64_t *past, *fresh;
};

// Copies the lengths, those of an impossible row as zeros. safe_past, safe_fresh: int64 [batch].
cudaError_t sanitize(const Lengths& lengths, int64_t* safe_past, int64_t* safe_fresh, cudaStream_t stream);

// Fills the rows of output [batch, row_bytes] that are impossible with bytes 0xff: NaN in every float type.
cudaError_t poison(const Lengths& lengths, void* output, int64_t row_bytes, cudaStream_t stream);

}  // namespace gsrq::trt
