// Instances of decode_kernel.cuh.
#include "decode_kernel.cuh"

namespace gsrq::cuda::decoding {

Kernel kernel_of_eight(const DecodePlan& plan, bool fast) {
  return fast ? kernel_of<8, 64, true>(plan.blocks) : kernel_of<8, 64, false>(plan.blocks);
}

}  // namespace gsrq::cuda::decoding
