// The kernels are in libgsrq_cuda.so, which this library loads when it first needs them: one build of them serves all
// versions of TensorRT and other hosts. It is the one that GSRQ_CUDA_LIBRARY names, else the one beside this library.
#pragma once

#include <string>

namespace gsrq::trt {

// Empty once the kernels can be called, or why they cannot.
std::string load_kernels();

}  // namespace gsrq::trt
