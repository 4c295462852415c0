/* The operator ai.gsrq::GsrqAttention on CUDA: plain C, no framework. docs/operator.md has the semantics, docs/cuda.md
 * the kernels. Every launch goes to the caller's stream, uses the caller's memory, neither allocates nor synchronises
 * (gsrq_cuda_inspect excepted), and may be captured into a CUDA graph: what changes from step to step (lengths, block
 * tables, tensors' contents) is read on the device.
 *
 * All pointers are device pointers unless said otherwise. Functions return 0, or non-zero with the reason in
 * gsrq_cuda_error() of the calling thread; nothing is launched then.
 */
#ifndef GSRQ_CUDA_H_
#define GSRQ_CUDA_H_

#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

#define GSRQ_CUDA_ABI 3
#define GSRQ_CUDA_API __attribute__((visibility("default")))

enum { GSRQ_F32 = 0, GSRQ_F16 = 1, GSRQ_BF16 = 2 };

typedef struct {
  int32_t groups, stages, width; /* groups * width = kv_heads * head_dim */
  int32_t planes;                /* of the keys: set by gsrq_cuda_inspect, see gsrq_layer */
  const void* codewords;         /* float16 [groups, stages, 256, width] */
  const float* transform;        /* float [groups, width, width] */
} gsrq_codebook;

/* What stays the same between the calls of a layer. Filled by the host, completed by gsrq_cuda_inspect: `planes` is 1
 * where every key codeword is an int8 times a power of two of its stage (codec.codewords: int8), else 2 (any float16
 * codebook, at twice the work); `geometric` is 1 where row j of cos/sin is j times a fixed rotation. */
typedef struct {
  int32_t heads, kv_heads, head_dim, half_rope, positions; /* cos, sin: float [positions, half_rope] */
  int32_t sinks, window, block, beam, sliding_window;
  int32_t rope_interleaved, exact_prefill;
  int32_t geometric;
  int32_t codes_by_head; /* how stored codes are ordered, gsrq/layout.h; then C, page and block are multiples of 8 */
  float scale, softcap;
  const float *cos, *sin;
  gsrq_codebook keys, values;
  const float* key_center; /* float [kv_heads, head_dim]: keys are coded turned, less this; NULL: coded before RoPE */
  int32_t exponents[256]; /* host: of each key stage, for planes = 1: codeword = int8 * 2^exponent */
} gsrq_layer;

typedef struct {
  int32_t batch, steps;             /* T new tokens a row, padded on the right */
  int32_t dtype, exact_dtype;       /* of query, key, value and output; of the exact buffers */
  int64_t max_total;                /* no row exceeds so many tokens, new ones included: sizes grids and workspace */
  int64_t capacity;                 /* linear cache: rows of a code tensor, C */
  const void *query, *key, *value;  /* [B, H, T, d], [B, N, T, d], contiguous; before RoPE */
  const int64_t *past_lengths, *new_lengths; /* [B] */
  int8_t *key_codes, *value_codes;  /* linear: [B, C, bytes]; paged: [pages, page, bytes] */
  void *key_exact, *value_exact;    /* [B, N, S + W + P, d]; these, key, value and codes: 16-byte aligned */
  const int32_t* block_table;       /* NULL: linear; else [B, table_stride]: page of coded rows page*i .. page*i+page-1.
                                     * Powers of two from 32 on decode fastest */
  int32_t page, table_stride;
  void* output;                     /* [B, T, H, d] */
} gsrq_call;

GSRQ_CUDA_API int32_t gsrq_cuda_abi(void);
GSRQ_CUDA_API const char* gsrq_cuda_error(void);
/* Compute capabilities that the library was compiled for, "80,90,100"; later ones run the last by way of PTX. */
GSRQ_CUDA_API const char* gsrq_cuda_architectures(void);

/* Reads the codebooks and tables once and completes `layer` (planes, geometric, exponents). Synchronises the stream.
 * scratch: 4096 bytes. */
GSRQ_CUDA_API int gsrq_cuda_inspect(gsrq_layer* layer, void* scratch, void* stream);

/* Derived forms of a layer's constants, in memory that the caller keeps: 256-byte aligned. */
GSRQ_CUDA_API int64_t gsrq_cuda_prepared_bytes(const gsrq_layer* layer);
GSRQ_CUDA_API int gsrq_cuda_prepare(const gsrq_layer* layer, void* prepared, void* stream);

/* Bytes of workspace (256-byte aligned, contents need not survive) for any call of these batch, steps and max_total. */
GSRQ_CUDA_API int64_t gsrq_cuda_workspace_bytes(const gsrq_layer* layer, const gsrq_call* call);

/* The operator, its cache updated in place: codes the blocks that leave the window, attends, appends to the ring. */
GSRQ_CUDA_API int gsrq_cuda_attention(const gsrq_layer* layer, const gsrq_call* call, const void* prepared,
                                      void* workspace, int64_t workspace_bytes, void* stream);

/* Its parts, for hosts that overlap them and for benchmarks. */
GSRQ_CUDA_API int gsrq_cuda_encode(const gsrq_layer* layer, const gsrq_call* call, const void* prepared,
                                   void* workspace, int64_t workspace_bytes, void* stream);
GSRQ_CUDA_API int gsrq_cuda_attend(const gsrq_layer* layer, const gsrq_call* call, const void* prepared,
                                   void* workspace, int64_t workspace_bytes, void* stream);
GSRQ_CUDA_API int gsrq_cuda_append(const gsrq_layer* layer, const gsrq_call* call, void* stream);

/* New tokens and exact vectors as a server keeps them: tokens of all sequences one after another, rotated already; exact
 * buffers in pages that sequences share with others, or in a slot of their own (a page with all of it). */
typedef struct {
  const void *query, *key, *value; /* [tokens, H, d], [tokens, N, d] of the call's dtype, of a token contiguous; after RoPE */
  void* output;                    /* [tokens, H, d]; the rows' tokens are written */
  int64_t query_stride, key_stride, value_stride, output_stride; /* elements from a token to the next */
  const int64_t* starts;           /* [B]: where a row's new tokens begin */
  void *key_pages, *value_pages;   /* [pages, page bytes]; a row's exact keys, then its exact values, are the bytes of the
                                    * keys' parts of its pages, then those of the values' parts; see key_exact */
  int64_t key_page_bytes, value_page_bytes; /* multiples of 16 are copied fastest */
  const int32_t* exact_table;      /* [B, exact_stride]: of each row its exact_pages pages */
  int64_t exact_stride;
  int32_t exact_pages;
} gsrq_rows;

/* The operator on a server's tokens: turned back to before RoPE in float32 and rounded once, appended, attended. Of the
 * call query, key, value, output, key_exact and value_exact are not read: they take their place in the workspace. */
GSRQ_CUDA_API int64_t gsrq_cuda_rows_workspace_bytes(const gsrq_layer* layer, const gsrq_call* call);
GSRQ_CUDA_API int gsrq_cuda_attention_rows(const gsrq_layer* layer, const gsrq_call* call, const gsrq_rows* rows,
                                           const void* prepared, void* workspace, int64_t workspace_bytes, void* stream);

/* Codes of n vectors [n, groups * width] of type dtype; codes int8 [n, groups * stages]. side: 0 keys, 1 values. */
GSRQ_CUDA_API int gsrq_cuda_encode_vectors(const gsrq_layer* layer, int32_t side, const void* vectors, int32_t dtype,
                                           int64_t n, int8_t* codes, const void* prepared, void* workspace,
                                           int64_t workspace_bytes, void* stream);

/* Clustering of calibration vectors, one codebook of 256 codewords a group: gsrq_export/codec/cluster.py has the method.
 * Distances are formed on tensor cores and compared in registers: no matrix of rows x codewords is written. Sums run in a
 * fixed order: the same bits every time. */
enum {
  GSRQ_SUMS = 0,      /* sum of w x */
  GSRQ_MEANS = 1,     /* sum of w x / sum of w: the codewords of k-means */
  GSRQ_GAIN_SHAPE = 2 /* the codewords of gain-shape k-means */
};

typedef struct {
  int32_t groups, width; /* width up to 512 */
  int64_t rows;          /* of each group */
  const float* vectors;  /* [groups, rows, width]; aligned to 16 bytes */
  const float* weights;  /* [groups, rows]; NULL: ones */
  const float* norms;    /* [groups, rows], lengths of the vectors; for GSRQ_GAIN_SHAPE alone */
} gsrq_clustering;

/* Bytes of workspace (256-byte aligned, contents need not survive) for any of the functions below. */
GSRQ_CUDA_API int64_t gsrq_cuda_clustering_workspace_bytes(const gsrq_clustering* of);

/* The codeword k of words [groups, 256, width] with the most 2 <x, c_k> - ||c_k||^2, or with `inner` the most <x, c_k>; of
 * equals the lowest. codes uint8 [groups, rows]; gains float [groups, rows], that score, may be NULL; inertia double
 * [groups], the sum of weight * gain, may be NULL. Scores are as those of float32 sums, see docs/cuda.md. */
GSRQ_CUDA_API int gsrq_cuda_clustering_assign(const gsrq_clustering* of, const float* words, int32_t inner, uint8_t* codes,
                                              float* gains, double* inertia, void* workspace, int64_t workspace_bytes,
                                              void* stream);

/* Over the rows of each code: updated float [groups, 256, width] as `form` says, zeros for a codeword without weight;
 * totals float [groups, 256], the sum of weights. words, the codewords before, for GSRQ_GAIN_SHAPE alone: a direction is
 * kept where the mean direction vanishes. `updated` may be `words`. */
GSRQ_CUDA_API int gsrq_cuda_clustering_update(const gsrq_clustering* of, int32_t form, const uint8_t* codes,
                                              const float* words, float* updated, float* totals, void* workspace,
                                              int64_t workspace_bytes, void* stream);

#ifdef __cplusplus
}
#endif

#endif /* GSRQ_CUDA_H_ */
