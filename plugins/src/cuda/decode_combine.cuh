// The end of a decode: bins times the value codebook, exact tokens, and the sum of both.
#pragma once

#include "decode_common.cuh"

namespace gsrq::cuda::decoding {

// Bytes of the parts of Memory that depend on it: blocks of 32 exact tokens that a row can have.
int exact_splits(const gsrq_layer& layer);

// Lets the kernels use the shared memory that they need, once a device.
bool prepare_combine(const DecodePlan& plan);

// Launches both kernels. has_coded: the decode kernel ran before.
int combine(const gsrq_layer& layer, const gsrq_call& call, const DecodePlan& plan, const Memory& memory, int vheads,
            int clusters, bool has_coded, cudaStream_t stream);

}  // namespace gsrq::cuda::decoding
