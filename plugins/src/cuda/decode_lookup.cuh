// Decode over keys coded in the rotated frame: scores are sums of table entries. docs/cuda.md.
#pragma once

#include "decode_common.cuh"

namespace gsrq::cuda::decoding {

constexpr int kManyThreads = 1024, kFewThreads = 256;     // of a block: the most for whose codes there is shared memory
constexpr int kLookupLanes = 4;                            // query heads of a KV head that are served together
constexpr int kPartSlots = 8;                              // slots whose (slot, head) pairs fill the 32 banks once
constexpr int kPartWords = kPartSlots * kLookupLanes;
constexpr int kPartBytes = kCodewords * kPartWords * 4;    // of a table or of bins
constexpr int kMostParts = 5;                              // of keys or values
constexpr int kFixedShared = 2048;                         // of lookup_kernel, beside its tables
constexpr int kLookupBits = 18;         // weights are integers of 2^-18 of their window's reference
constexpr uint32_t kLookupLargest = 1u << 26;  // weight: 2^8 times the reference's; the sum of a warp's fits 32 bits
constexpr int kCenterSteps = 8, kCenterPairs = 8 * kCenterSteps;  // RoPE pairs that the tensor-core kernel takes
constexpr int kCenterTiles = 8;                                   // of 16 tokens that one turn of the queries serves
constexpr float kCenterMost = 32767, kCenterZero = 8421376;       // 2^23 + 2^15: a float with the integer in its low bits

// A slot is a code byte of a head: stage r of the sub-vector, or of the part of one, that lies in the head.
struct LookupPlan {
  DecodePlan head;  // heads, parts, value slots and bins, as combine() reads them
  int key_slots, key_parts, value_parts, key_width;
  uint32_t key_inverse, value_inverse;  // 2^16 / parts, rounded up: exact for the pieces of a warp
  int threads;
  int shared_bytes;
};

struct LookupMemory {
  Memory parts;           // what blocks leave to combine()
  __half *high, *low;     // [batch][vheads][4 heads][head_dim]: turned and scaled queries = high + low
  float2* drifts;         // [batch][vheads][drift_count]: u and v of q . RoPE_t(m) = sum of u cos(t) + v sin(t)
  float* tables;          // [batch][vheads][key parts][256][8 slots][4 heads]: query times codeword
  void* center;           // [batch][vheads][padded][4 heads]: query times the turned center, by coded token. As center_is_fixed
                          // says uint16, integers of `unit` above 2^15 beside `rest`, or float
  float *unit, *rest;     // [batch][vheads][4 heads]; rest: of the pairs that do not turn
  int64_t padded;         // coded tokens of a row, rounded up
  const uint4* offsets;   // of prepare: [tiles][steps][32 lanes], cosines and sines of positions 0 to 127
  bool fixed;             // center_is_fixed
};

// Whether the tensor-core kernel scores the center.
bool center_is_fixed(const gsrq_layer& layer);

// Drifts of a vhead.
int64_t drift_count(const gsrq_layer& layer);

// Launches what must be known of the queries before coded tokens are looked up, and the exact tokens.
int prepare_lookup(const gsrq_layer& layer, const gsrq_call& call, const LookupPlan& plan, const LookupMemory& memory,
                   cudaStream_t stream);

// Fills LookupMemory::offsets.
int fill_offsets(const gsrq_layer& layer, uint4* offsets, cudaStream_t stream);

}  // namespace gsrq::cuda::decoding
