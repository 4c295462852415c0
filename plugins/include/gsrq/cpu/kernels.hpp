// The CPU kernels' table: one for each instruction set, filled by src/cpu/isa_*.cpp from kernels_impl.hpp.
//
// Plain structs of raw pointers; no framework, no ownership. All memory, scratch included, belongs to the caller.
#pragma once

#include <cstddef>
#include <cstdint>

#include "gsrq/layout.h"

namespace gsrq::cpu {

enum class Element : int { f16, bf16, f32 };

inline constexpr int64_t kLanes = 16;       // RoPE pairs of a key slice; every row is padded to a multiple of it
inline constexpr int64_t kChunk = 32;       // tokens whose rotation is an offset from the chunk's first
inline constexpr int64_t kMostSlices = 2;   // of key codewords in a pass over the tokens
inline constexpr int64_t kTile = 64;        // tokens of a key/value tile of attend
inline constexpr int64_t kCodewords = 256;  // = GSRQ_CODEBOOK_SIZE
inline constexpr int64_t kCodesAhead = 32;  // rows whose codes are on their way from memory

static constexpr int64_t round_up(int64_t n, int64_t to) { return (n + to - 1) / to * to; }
static constexpr int64_t element_size(Element e) { return e == Element::f32 ? 4 : 2; }

// The two elements of a head that RoPE pair p rotates; pairs from half_rope on are the elements that pass.
static inline void pair_elements(int64_t p, int64_t half_rope, bool interleaved, int64_t* first, int64_t* second) {
  if (p < half_rope && !interleaved) {
    *first = p;
    *second = p + half_rope;
  } else {
    *first = 2 * p;
    *second = 2 * p + 1;
  }
}

struct Rope {
  const float* cos;  // [positions, half]
  const float* sin;
  int64_t half;
  bool interleaved;
};

// Codewords of one side (keys or values) as stored: float16 [groups, stages, 256, width].
struct Words {
  const uint16_t* data;
  int64_t groups, stages, width;
};

// Rows of codes from the first one of a task on, in either order: row i's begin code_offset(rows, i) bytes on from row 0's, as
// gsrq_code_offset has it.
struct CodeRows {
  int64_t first;
  int64_t stride;  // from row to row
  int64_t skip;    // more of it from 8 rows to the next 8; 0 where codes are ordered by token
};
static inline int64_t code_offset(const CodeRows& rows, int64_t i) {
  const int64_t row = rows.first + i;
  return row * rows.stride + static_cast<int64_t>(static_cast<uint64_t>(row) / GSRQ_CODE_TILE) * rows.skip;
}
// For a loop that is at row i. By head a page has but a few tiles of a head, too few for a processor to see where the next
// ones lie. Past the end nothing is read, and a prefetch does not fault.
static inline void prefetch_codes(const uint8_t* codes, const CodeRows& rows, int64_t i) {
  __builtin_prefetch(codes + code_offset(rows, i + kCodesAhead));
}

// Key codewords of one KV head in 16-bit fixed point, cut into slices of 16 RoPE pairs so that a slice of all
// stages stays in the second-level cache. A decoded element is unit * (bias + sum_r multiplier_r * word_r).
struct KeySlices {
  const int16_t* words;         // [slices, stages, 256, 32]: of every 8, 4 first then 4 second elements of pairs
  const int32_t* multipliers;   // [ceil(stages / 2)]: two int16, the even stage's in the low half
  const float* unit;            // [slices, 16]
  const int32_t* bias;          // [slices, 2, 16]
  int64_t slices, stages;
};

struct PrepareTask {  // one KV head; writes what KeySlices points to
  Words words;
  int64_t group, column, head_dim;  // the head is elements column .. column + head_dim - 1 of the sub-vector
  int64_t half_rope;
  bool interleaved;
  int16_t* out_words;
  int32_t* out_multipliers;
  float* out_unit;
  int32_t* out_bias;
  float* scratch;  // stages * 2 * 16 + stages
};

// Softmax weights, up to exp(maximum), of a run of coded tokens for the query heads of one KV head.
struct ScoreTask {
  KeySlices keys;
  Rope rope;
  const uint8_t* codes;  // row 0's of the cache, at this head's sub-vector
  CodeRows code_rows;
  int64_t count, first_token;
  const float* query;  // [slices, lanes, 2, 16]: rotated to its position and scaled; lanes is a multiple of 4
  int64_t lanes;
  float softcap;
  float* weights;  // out [round_up(count, 16), lanes]
  float* maximum;  // out [lanes]
  float* sum;      // out [lanes]
  float* scratch;  // score_scratch(lanes)
};

// One stage's score table of keys in the rotated frame: query x codeword for the query heads of one KV head.
struct TableTask {
  const uint16_t* panels;  // of the stage [4, slices, 2 * 16, 64]: 64 codewords, elements as in a query's slices
  int64_t slices, lanes;
  const float* query;  // [slices, lanes, 2, 16], as ScoreTask's
  float* table;        // out [256, lanes]
};

// The same as ScoreTask of keys in the rotated frame, by table.
struct LookupTask {
  const float* table;   // [stages, 256, lanes]
  const float* center;  // [slices, 2, 16]: what was taken off the head's keys before RoPE
  int64_t stages, slices;
  Rope rope;
  const uint8_t* codes;
  CodeRows code_rows;
  int64_t count, first_token;
  const float* query;
  int64_t lanes;
  float softcap;
  float *weights, *maximum, *sum;  // out
  float* scratch;                  // lookup_scratch(slices, lanes)
};

// Weights summed into bins (stage, code), then bins x codewords: the coded values' part of the output.
struct ValueTask {
  Words words;
  const uint8_t* codes;  // row 0's of the cache, at the first stage of the task
  CodeRows code_rows;
  int64_t count;
  int64_t group, first_stage, stages;
  int64_t heads, queries, lanes;  // KV heads that share the sub-vector, query heads of each, lanes of each
  int64_t width;                  // elements of each of those heads in the sub-vector
  const float* weights;           // [heads] arrays, weight_stride apart, of [count, lanes]
  int64_t weight_stride;
  const float* factors;  // [heads, splits, lanes]
  int64_t splits, split_size;
  float* out;      // [heads, queries, round_up(width, 16)]
  float* scratch;  // value_scratch(...)
};

// Flash attention of a tile of queries of one KV head over coded and exact tokens.
struct AttendTask {
  Rope rope;
  Words key_words, value_words;
  const uint8_t* key_codes;  // row 0's of the cache, at this head's first sub-vector
  const uint8_t* value_codes;
  CodeRows key_rows, value_rows;
  int64_t kv_head, head_dim, queries;  // query heads of this KV head
  const float* query;                  // [queries, query_stride] rows of [steps, head_dim], from the tile's first query
  int64_t query_stride;
  int64_t count;  // queries (tokens) of the tile
  int64_t past, first_position;
  int64_t sinks, window, block, sliding_window;
  int64_t coded_after;  // coded tokens after the call
  bool exact_prefill, attend_coded;
  float scale, softcap;
  Element element;
  const unsigned char* key_past;  // exact buffers of this row and head [slots, head_dim]
  const unsigned char* value_past;
  const float* key_center;        // [head_dim] of keys coded in the rotated frame, else null
  const unsigned char* key_new;  // the call's tokens, rounded to the buffers' type [steps, head_dim]
  const unsigned char* value_new;
  float* out;      // [count * queries, round_up(head_dim, 16)]: not yet divided by sum
  float* maximum;  // [count * queries]
  float* sum;
  float* scratch;  // attend_scratch(...)
};

// Beam search of one sub-vector's codes for several tokens.
struct EncodeTask {
  Words words;
  int64_t group, rows, beam;
  const double* metric;  // [width, width] = A^T A, or null for the identity
  const double* norms;   // [stages, 256]: c^T A^T A c of the group
  const double* vectors;  // [rows, width]
  uint8_t* codes;         // out, row 0's of the cache, first byte of the sub-vector
  CodeRows code_rows;
  double* scratch;  // encode_scratch(...) doubles
};

struct NormsTask {
  Words words;
  int64_t group;
  const double* metric;
  double* norms;
  double* scratch;  // width * 2
};

struct Kernels {
  const char* name;
  void (*prepare_keys)(const PrepareTask&);
  void (*score)(const ScoreTask&);
  void (*build_table)(const TableTask&);
  void (*lookup)(const LookupTask&);
  void (*values)(const ValueTask&);
  void (*attend)(const AttendTask&);
  void (*encode)(const EncodeTask&);
  void (*norms)(const NormsTask&);
  void (*narrow)(const float* from, void* to, int64_t count, Element type);  // round to nearest even
  void (*widen)(const void* from, float* to, int64_t count, Element type);
};

// Scratch sizes, in floats (encode: in doubles).
static inline int64_t score_scratch(int64_t lanes) {
  return kMostSlices * (2 * kChunk + lanes) * 2 * kLanes;
}
static inline int64_t lookup_scratch(int64_t slices, int64_t lanes) {
  return (2 * slices + 2) * kChunk * 2 * kLanes + (slices + 1) * lanes * 2 * kLanes + lanes * kChunk;
}
static inline int64_t value_scratch(int64_t stages, int64_t lanes, int64_t width) {
  return stages * kCodewords * lanes + 32 * round_up(width, kLanes);
}
static inline int64_t attend_scratch(int64_t rows, int64_t head_dim) {
  const int64_t padded = round_up(head_dim, kLanes);
  return rows * padded + rows * kTile + 2 * kTile * padded + 2 * padded;
}
static inline int64_t encode_scratch(int64_t rows, int64_t width, int64_t stages, int64_t beam) {
  const int64_t paths = rows * beam;
  return width * kCodewords + 3 * round_up(paths, 4) * width + 2 * paths + 4 * kCodewords + 8 * width +
         2 * (paths * stages / 8 + 1) + 3 * beam;
}

extern const Kernels generic_kernels;
#if defined(__x86_64__)
extern const Kernels avx2_kernels;
extern const Kernels avx512_kernels;
#endif

// The best table for this machine; GSRQ_CPU_ISA=generic|avx2|avx512 asks for a lower one. Null, with a reason, if
// the one asked for is unknown or cannot run here.
const Kernels* select_kernels(const char** problem);

}  // namespace gsrq::cpu
