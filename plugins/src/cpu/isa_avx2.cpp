// Kernels for AVX2, FMA and F16C. Compiled with those flags, called only where the processor has them.
#define GSRQ_ISA avx2
#include "gsrq/cpu/kernels_impl.hpp"
