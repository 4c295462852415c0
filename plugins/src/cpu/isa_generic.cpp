// Kernels for any processor: 128-bit vectors, no extension.
#define GSRQ_ISA generic
#include "gsrq/cpu/kernels_impl.hpp"
