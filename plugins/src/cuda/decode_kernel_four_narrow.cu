// Instances of decode_kernel.cuh.
#include "decode_kernel.cuh"

namespace gsrq::cuda::decoding {

Kernel kernel_of_four_narrow(const DecodePlan& plan) { return kernel_of<4, 32, Reading::bytes>(plan.blocks); }

}  // namespace gsrq::cuda::decoding
