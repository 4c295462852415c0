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

/* Byte, of a token's codes, of stage r of sub-vector g. */
GSRQ_INLINE int64_t gsrq_code_byte(int64_t group, int64_t stage, int64_t stages) { return group * stages + stage; }

#define GSRQ_CODE_TILE 8 /* rows whose codes of a head lie together where codes are ordered by head */

/* Bytes of a token's codes that lie together: all of them, or by head those of a KV head (of the heads that share a
 * sub-vector, where one spans several). */
GSRQ_INLINE int64_t gsrq_code_run(int by_head, int64_t groups, int64_t stages, int64_t width, int64_t head_dim) {
  return by_head ? (width < head_dim ? head_dim / width : 1) * stages : groups * stages;
}

/* Where, from a linear cache's row 0 or a page's, byte `byte` of a row's codes lies: [row / 8][byte / run][row % 8][byte % run].
 * Where run is row_bytes, that is row * row_bytes + byte. */
GSRQ_INLINE int64_t gsrq_code_offset(int64_t row, int64_t byte, int64_t row_bytes, int64_t run) {
  return (row / GSRQ_CODE_TILE * row_bytes + byte / run * run) * GSRQ_CODE_TILE + row % GSRQ_CODE_TILE * run + byte % run;
}

#endif /* GSRQ_LAYOUT_H_ */
