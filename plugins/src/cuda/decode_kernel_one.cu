// Instances of decode_kernel.cuh.
#include "decode_kernel.cuh"

namespace gsrq::cuda::decoding {

Kernel kernel_of_one(const DecodePlan& plan) { return kernel_of<1, 32, Reading::bytes>(plan.blocks); }

}  // namespace gsrq::cuda::decoding
