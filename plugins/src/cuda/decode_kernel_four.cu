// Instances of decode_kernel.cuh.
#include "decode_kernel.cuh"

namespace gsrq::cuda::decoding {

Kernel kernel_of_four(const DecodePlan& plan, Reading how) { return kernel_of<4, 64>(plan, how); }

}  // namespace gsrq::cuda::decoding
