// Kernels for AVX-512 (F, BW, DQ, VL, VNNI: Cascade Lake and Zen 4 on). Compiled with those flags, called only where the processor has them.
#define GSRQ_ISA avx512
#include "gsrq/cpu/kernels_impl.hpp"
