// What the build says of itself.
#include "gsrq/cuda/gsrq_cuda.h"

const char* gsrq_cuda_architectures(void) { return GSRQ_CUDA_ARCHITECTURES; }
