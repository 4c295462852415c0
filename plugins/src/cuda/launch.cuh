// Programmatic dependent launch: a kernel's blocks may start while the one before it on the stream still runs, and wait for
// its results where they need them. Where the device has no such launch (before compute capability 9.0) kernels run in turn.
#pragma once

#include <cuda_runtime.h>

#include <atomic>
#include <utility>

namespace gsrq::cuda {

// Until all blocks of the kernel before have ended and what they wrote can be read. Every kernel of a chain must wait; the first
// one before it lets the next begin, which may read what came before the chain.
__device__ inline void wait_for_previous() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

// Once all blocks have called it, blocks of the next kernel may take what place is left.
__device__ inline void let_next_begin() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;");
#endif
}

// Major compute capability of the current device, 0 with an error set where there is none; the driver is asked once a device.
inline int compute_major() {
  constexpr int kDevices = 64;
  static std::atomic<int> known[kDevices];
  int id = 0, major = 0;
  if (cudaGetDevice(&id) != cudaSuccess) return 0;
  if (id < kDevices && (major = known[id].load(std::memory_order_relaxed)) != 0) return major;
  if (cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, id) != cudaSuccess) return 0;
  if (id < kDevices) known[id].store(major, std::memory_order_relaxed);
  return major;
}

// Of a launch that may start before the kernel launched last on the stream has ended.
inline cudaLaunchAttribute early_launch() {
  cudaLaunchAttribute attribute{};
  attribute.id = cudaLaunchAttributeProgrammaticStreamSerialization;
  attribute.val.programmaticStreamSerializationAllowed = 1;
  return attribute;
}

// early: as early_launch says.
template <class... Parameters, class... Arguments>
cudaError_t launch(bool early, void (*kernel)(Parameters...), dim3 grid, int threads, int shared_bytes, cudaStream_t stream,
                   Arguments&&... arguments) {
  const int major = early ? compute_major() : 0;
  if (early && major == 0) return cudaGetLastError();
  cudaLaunchAttribute attribute = early_launch();
  cudaLaunchConfig_t config{};
  config.gridDim = grid;
  config.blockDim = dim3(static_cast<unsigned>(threads));
  config.dynamicSmemBytes = static_cast<size_t>(shared_bytes);
  config.stream = stream;
  config.attrs = &attribute;
  config.numAttrs = early && major >= 9 ? 1 : 0;
  return cudaLaunchKernelEx(&config, kernel, std::forward<Arguments>(arguments)...);
}

}  // namespace gsrq::cuda
