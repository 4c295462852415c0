// What a block of the decode kernel does with its cluster, its shared memory and the tensor cores; sm_90 and later.
#pragma once

#include "barrier.cuh"
#include "decode_common.cuh"
#include "mma.cuh"

namespace gsrq::cuda::decoding {

constexpr int kKeyThreads = 32 * kKeyWarps, kValueThreads = 32 * kValueWarps;

#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 900

__device__ inline uint32_t cluster_rank() {
  uint32_t rank;
  asm("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
  return rank;
}
__device__ inline uint32_t remote(uint32_t address, uint32_t rank) {
  uint32_t out;
  asm("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(out) : "r"(address), "r"(rank));
  return out;
}
__device__ inline void cluster_sync() {
  asm volatile("barrier.cluster.arrive.release.aligned;\n\tbarrier.cluster.wait.acquire.aligned;" ::: "memory");
}

// Hand-over of score buffers: full[b] completes when all of a chunk's scores have come in, by their bytes; empty[b] when
// every CTA of the cluster has read them. Unlike the cluster's own barrier they wait for no other memory traffic.
__device__ inline void barrier_arrive_remote(uint32_t barrier) {
  asm volatile("mbarrier.arrive.shared::cluster.b64 _, [%0];" ::"r"(barrier) : "memory");
}
__device__ inline void store_remote(uint32_t address, float x, float y, uint32_t barrier) {
  asm volatile("st.async.shared::cluster.mbarrier::complete_tx::bytes.v2.f32 [%0], {%1, %2}, [%3];" ::"r"(address),
               "f"(x), "f"(y), "r"(barrier) : "memory");
}
__device__ inline void store_remote(uint32_t address, float x, uint32_t barrier) {
  asm volatile("st.async.shared::cluster.mbarrier::complete_tx::bytes.f32 [%0], %1, [%2];" ::"r"(address), "f"(x),
               "r"(barrier) : "memory");
}
// The same with what the cluster's CTAs wrote to global memory before.
__device__ inline void barrier_release_remote(uint32_t barrier) {
  asm volatile("mbarrier.arrive.release.cluster.shared::cluster.b64 _, [%0];" ::"r"(barrier) : "memory");
}
__device__ inline void barrier_acquire(uint32_t barrier, uint32_t parity) {
  asm volatile(
      "{\n\t.reg .pred done;\n\t"
      "again%=: mbarrier.try_wait.parity.acquire.cluster.shared::cta.b64 done, [%0], %1;\n\t"
      "@!done bra again%=;\n\t}" ::"r"(barrier), "r"(parity) : "memory");
}
__device__ inline float2 load_state(uint32_t from) {
  float2 v;
  asm volatile("ld.shared.v2.f32 {%0, %1}, [%2];" : "=f"(v.x), "=f"(v.y) : "r"(from) : "memory");
  return v;
}
template <int Threads>
__device__ inline void sync_warps(int id) {
  asm volatile("bar.sync %0, %1;" ::"r"(id), "n"(Threads) : "memory");
}

// Scoring holds many values in registers, binning few; the pool is split unevenly where the target can. The sum must not
// exceed what the block is launched with, 128 a thread: 8 * 160 + 8 * 96 = 16 * 128.
template <int Registers, bool More>
__device__ inline void set_registers() {
#if defined(__CUDA_ARCH_FEAT_SM90_ALL) || defined(__CUDA_ARCH_FEAT_SM100_ALL)
  if constexpr (More) asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(Registers));
  else asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(Registers));
#endif
}

__device__ inline void mma_int8(int (&c)[4], uint32_t a0, uint32_t a1, uint32_t a2, uint32_t a3, uint32_t b0, uint32_t b1) {
  asm("mma.sync.aligned.m16n8k32.row.col.s32.s8.s8.s32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
      : "+r"(c[0]), "+r"(c[1]), "+r"(c[2]), "+r"(c[3])
      : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
}

// Keeps a value in a register instead of computing it again where it is used.
template <class T>
__device__ inline void keep(T& x) {
  if constexpr (sizeof(T) == 8) asm volatile("" : "+l"(x));
  else asm volatile("" : "+r"(x));
}

// Of a linear cache nothing.
template <bool Paged>
__device__ inline Pages kept_pages(const gsrq_call& call) {
  Pages pages{};
  if constexpr (Paged) {
    pages = pages_of(call);
    keep(pages.bits);
  }
  return pages;
}

__device__ inline uint32_t word_of_bytes(const int8_t* row, int first, int last) {
  uint32_t word = 0;
#pragma unroll 1
  for (int j = 0; j < 4; ++j)
    if (first + j < last) word |= static_cast<uint32_t>(static_cast<uint8_t>(row[first + j])) << (8 * j);
  return word;
}

__device__ inline int64_t row_of(const gsrq_call& call, int b, int row) {
  if (call.block_table == nullptr) return b * call.capacity + row;
  const uint32_t page = static_cast<uint32_t>(call.page), at = static_cast<uint32_t>(row) / page;
  return static_cast<int64_t>(call.block_table[b * static_cast<int64_t>(call.table_stride) + at]) * page +
         (static_cast<uint32_t>(row) - at * page);
}

// Bytes first .. last - 1 of a token's codes, as words; past the last: 0. Fast: all words are there and aligned.
template <int Words, bool Fast>
__device__ inline void load_codes(uint32_t (&out)[Words], const int8_t* row, int first, int last) {
  if constexpr (Fast) {
#pragma unroll
    for (int i = 0; i < Words; ++i) out[i] = __ldg(reinterpret_cast<const uint32_t*>(row + first) + i);
  } else {
#pragma unroll
    for (int i = 0; i < Words; ++i) out[i] = word_of_bytes(row, first + 4 * i, last);
  }
}

struct Shared {  // a CTA's shared memory, by the plan; the key slice lies first
  uint32_t* bins;  // [256][stride]: of the current window
  float* scores;   // [buffers][cluster][own tiles][16][lanes]: partial, of the tokens that the CTA weighs
  float* maxima;   // [kValueWarps][lanes]
  uint32_t full, empty, done, slice;  // addresses of barriers: one a buffer, one a buffer, two, one
  float* factors;  // [owners][lanes]: what the owners' bins of an item are multiplied by
  uint32_t states;  // address of [2][cluster][lanes]: reference (log2) and sum of weights of each CTA's part of an item
};

__device__ inline Shared shared_of(const DecodePlan& p) {
  Shared s;
  s.bins = reinterpret_cast<uint32_t*>(shared_memory + p.blocks * kBlockBytes);
  s.scores = reinterpret_cast<float*>(s.bins + p.bins());
  s.maxima = s.scores + p.buffers * p.cluster * p.own_tiles * kTile * p.lanes;
  s.full = shared_address(s.maxima + kValueWarps * 8);
  s.empty = s.full + 8 * kMostBuffers;
  s.done = s.empty + 8 * kMostBuffers;
  s.slice = s.done + 16;
  s.states = s.slice + 8;
  s.factors = s.maxima + kValueWarps * 8 + 2 * (2 * kMostBuffers + 4) + 2 * 2 * p.cluster * p.lanes;
  return s;
}

#endif

}  // namespace gsrq::cuda::decoding
