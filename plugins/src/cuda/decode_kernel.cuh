// The decode kernel: eight warps score keys, eight bin values. Instances are spread over files so that they compile side by
// side.
#pragma once

#include "decode_keys.cuh"
#include "decode_values.cuh"
#include "launch.cuh"

namespace gsrq::cuda::decoding {

using Kernel = void (*)(gsrq_layer, gsrq_call, DecodePlan, Constants, Memory, int);

template <int Blocks, int Lanes, int Stride, Reading How>
__global__ void __launch_bounds__(kDecodeThreads, 1)
    decode_kernel(const __grid_constant__ gsrq_layer layer, const __grid_constant__ gsrq_call call,
                  const __grid_constant__ DecodePlan plan, Constants constants, Memory memory, int vheads) {
#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 900  // never launched on others
  wait_for_previous();  // before the next one may begin, which reads what the previous ones wrote
  let_next_begin();     // multiprocessors that no cluster has take exact tokens meanwhile
  const Shared shared = shared_of(plan);
  const uint32_t rank = cluster_rank();
  const int cluster = blockIdx.x / plan.cluster, clusters = gridDim.x / plan.cluster;
  const Line line = line_of(layer, call, vheads, clusters, 0, kItemLead);
  Cursor cursor{};
  cursor.start(layer, call, line, cluster);
  if (threadIdx.x == 0) {
    for (int b = 0; b < plan.buffers; ++b) {
      barrier_init(shared.full + 8 * b, 1);
      barrier_init(shared.empty + 8 * b, plan.cluster);
      barrier_expect(shared.full + 8 * b, plan.cluster * plan.tiles_of(rank % plan.owners) * kTile * Lanes * 4);
    }
    for (int i = 0; i < 2; ++i) {
      barrier_init(shared.done + 8 * i, plan.cluster + 1);
      barrier_expect(shared.done + 8 * i, plan.cluster * Lanes * 8);
    }
    barrier_init(shared.slice, 1);
  }
  cluster_sync();  // no CTA may write into another that has not started
  if (threadIdx.x < kKeyThreads) {
    set_registers<160, true>();
    score_keys<Blocks, Lanes, How>(layer, call, plan, constants, shared, cursor, rank);
  } else {
    set_registers<96, false>();
    constexpr bool kFast = How != Reading::bytes;
    const bool plain = kFast && plan.cluster == kPlainCluster && plan.tiles_of(0) * (Stride / 32) <= kValueWarps &&
                       !(layer.softcap > 0);
    if (plain) bin_values<Lanes, Stride, How, kFast>(layer, call, plan, memory, shared, cursor, rank, cluster);
    else bin_values<Lanes, Stride, How, false>(layer, call, plan, memory, shared, cursor, rank, cluster);
  }
  cluster_sync();  // nor leave while others write into it
#endif
}

template <int Lanes, int Stride, Reading How>
Kernel kernel_of(int blocks) {
  switch (blocks) {
    case 1: return decode_kernel<1, Lanes, Stride, How>;
    case 2: return decode_kernel<2, Lanes, Stride, How>;
    case 3: return decode_kernel<3, Lanes, Stride, How>;
    case 4: return decode_kernel<4, Lanes, Stride, How>;
    case 6: return decode_kernel<6, Lanes, Stride, How>;
    default: return nullptr;
  }
}

// Instances for 1, 4 or 8 query heads at a time, by how many bins a codeword has; null where none exists.
Kernel kernel_of_one(const DecodePlan& plan);
Kernel kernel_of_four(const DecodePlan& plan, Reading how);
Kernel kernel_of_four_narrow(const DecodePlan& plan);
Kernel kernel_of_eight(const DecodePlan& plan, Reading how);

// Where all ways of reading have instances.
template <int Lanes, int Stride>
Kernel kernel_of(const DecodePlan& plan, Reading how) {
  switch (how) {
    case Reading::words: return kernel_of<Lanes, Stride, Reading::words>(plan.blocks);
    case Reading::words_of_pages: return kernel_of<Lanes, Stride, Reading::words_of_pages>(plan.blocks);
    default: return kernel_of<Lanes, Stride, Reading::bytes>(plan.blocks);
  }
}

}  // namespace gsrq::cuda::decoding
