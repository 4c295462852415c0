/* The cache rule and the byte layout of codes, in C.
 *
 * The only other statement of them is gsrq_export/cache/rule.py; tests/plugins/test_native.py holds the two equal.
 * n tokens are in the cache, the newest included. The first S (sinks) stay exact; tokens leave the window of W
 * in blocks of P and are coded then. Usable from C, C++ and CUDA.
 */
#ifndef GSRQ_LAYOUT_H_
#define GSRQ_LAYOUT_H_

#include <stdint.h>

#if defined(__CUDACC__)
#define GSRQ_INLINE static __host__ __device__ inline
#else
#define GSRQ_INLINE static inline
#endif

#define GSRQ_CODEBOOK_SIZE 256 /* codewords a stage: one byte a code */

/* Tokens coded when the cache holds n: tokens S .. S + coded - 1. */
GSRQ_INLINE int64_t gsrq_coded(int64_t n, int64_t sinks, int64_t window, int64_t block) {
  const int64_t full = n - sinks - window;
  return full > 0 ? full / block * block : 0;
}

/* Slots of the exact buffer: the sinks, then the ring of W + P. */
GSRQ_INLINE int64_t gsrq_exact_slots(int64_t sinks, int64_t window, int64_t block) { return sinks + window + block; }

/* Slot of the exact buffer in which token j lies while it is exact. */
GSRQ_INLINE int64_t gsrq_slot(int64_t token, int64_t sinks, int64_t window, int64_t block) {
  return token < sinks ? token : sinks + (token - sinks) % (window + block);
}

/* The two rules where n and token fit 32 bits: on a GPU a 64-bit division takes hundreds of cycles. */
GSRQ_INLINE int32_t gsrq_coded32(int32_t n, int32_t sinks, int32_t window, int32_t block) {
  const int32_t full = n - sinks - window;
  return full > 0 ? (int32_t)((uint32_t)full / (uint32_t)block * (uint32_t)block) : 0;
}

GSRQ_INLINE int32_t gsrq_slot32(int32_t token, int32_t sinks, int32_t window, int32_t block) {
  const uint32_t ring = (uint32_t)(window + block);
  return token < sinks ? token : sinks + (int32_t)((uint32_t)(token - sinks) % ring);
}

/* Row of the code tensor that holds a coded token. */
GSRQ_INLINE int64_t gsrq_code_row(int64_t token, int64_t sinks) { return token - sinks; }

/* Byte, within a token's row, of stage r of sub-vector g. */
GSRQ_INLINE int64_t gsrq_code_byte(int64_t group, int64_t stage, int64_t stages) { return group * stages + stage; }

#endif /* GSRQ_LAYOUT_H_ */
