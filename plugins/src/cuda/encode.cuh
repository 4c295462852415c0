// What the encoding kernels share: the codebooks' derived forms, and where the vectors come from and the codes go.
#pragma once

#include "source.cuh"

namespace gsrq::cuda {

// Wider sub-vectors, and beams, take the float64 kernel: the tensor-core kernel keeps a tile's residuals in shared memory.
constexpr int32_t kGreedyWidth = 1024;

// Where the kernel of encode_tiled.cu serves, the float16 codewords of a stage lie as it reads them. The high halves: chunks
// of 64 codewords, in each first their elements 0 .. 7, then 8 .. 15 and so on. The low halves: codeword by codeword, the
// elements of a lane (of four; 8 n + 2 lane and + 1) of each 32 together.
constexpr int kTiledWords = 64;

__host__ __device__ inline int64_t tiled_high(int word, int element, int padded) {
  const int before = word / kTiledWords * padded + element / 8 * 8;
  return static_cast<int64_t>(before) * kTiledWords + word % kTiledWords * 8 + element % 8;
}
__host__ __device__ inline int64_t tiled_low(int word, int element, int padded) {
  return static_cast<int64_t>(word) * padded + element / 32 * 32 + element % 8 / 2 * 8 + element / 8 % 4 * 2 + element % 2;
}

// Per stage of a group, in units of `scale` (a power of two, at least the largest norm of the transformed codewords).
struct StageBounds {
  float scale;
  float largest;   // norm of the largest codeword
  float high_off;  // most that a codeword differs (norm) from its float16 form, and
  float low_off;   // from the sum of its two float16 halves
};

// Derived forms of one codebook. w = A c are the codewords where distance is Euclidean; width is padded to 16 elements, or to
// the next width of the tiled kernel where that is quicker.
struct EncodeBook {
  gsrq_codebook book;
  int32_t padded;
  bool greedy;         // the members after `diagonal` exist
  bool tiled;          // high and low are ordered by tiled_high and tiled_low
  double* metric;      // [G, D, D]: A^T A
  double* turned;      // [G, D, D]: A^T
  double* norms;       // [G, R, 256]: ||A c||^2
  int32_t* diagonal;   // [G]: A is diagonal
  __half *high, *low;  // [G, R, 256, padded], a stage's in this order or as above: w / scale = high + low
  float* half_norms;   // [G, R, 256]: ||w||^2 / (2 scale), huge for a codeword that repeats an earlier one
  StageBounds* bounds; // [G, R]
};

inline bool is_greedy(const gsrq_layer& layer, const gsrq_codebook& book) {
  return layer.beam == 1 && book.width <= kGreedyWidth;
}

bool encode_tiled_serves(int32_t padded);  // on the current device

inline EncodeBook encode_book(const gsrq_layer& layer, const gsrq_codebook& book, Arena& prepared) {
  const int64_t groups = book.groups, width = book.width, words = groups * book.stages * 256;
  EncodeBook out{};
  out.book = book;
  out.padded = (book.width + 15) / 16 * 16;
  out.greedy = is_greedy(layer, book);
  if (out.greedy && book.width > 128 && book.width <= 256 && encode_tiled_serves(256)) out.padded = 256;
  out.metric = prepared.take<double>(groups * width * width);
  out.turned = prepared.take<double>(groups * width * width);
  out.norms = prepared.take<double>(words);
  out.diagonal = prepared.take<int32_t>(groups);
  if (out.greedy) {
    out.tiled = encode_tiled_serves(out.padded);
    out.high = prepared.take<__half>(words * out.padded);
    out.low = prepared.take<__half>(words * out.padded);
    out.half_norms = prepared.take<float>(words);
    out.bounds = prepared.take<StageBounds>(groups * book.stages);
  }
  return out;
}

// The vectors to encode: tokens of a call that leave the window, or rows of a matrix [n, groups * width].
struct EncodeSource {
  bool values;
  const void* vectors;  // null: the call's tokens
  int32_t dtype;
  int64_t count;
  int8_t* codes;

  // Coded rows first .. first + n - 1 of batch row b are to be encoded.
  __device__ int64_t rows(const gsrq_layer& layer, const gsrq_call& call, int64_t b, int64_t* first) const {
    if (vectors != nullptr) {
      *first = 0;
      return count;
    }
    const RowLengths row = row_lengths(layer, call, b);
    *first = row.before;
    return row.after - row.before;
  }

  // Of coded row `row` of batch row b.
  __device__ Origin origin(const gsrq_layer& layer, const gsrq_call& call, int64_t b, int64_t row) const {
    const int64_t token = layer.sinks + row;
    if (vectors == nullptr) return exact_origin(layer, call, values, b, token, call.past_lengths[b]);
    const int64_t bytes = row * layer.kv_heads * layer.head_dim * dtype_bytes(dtype);
    return {static_cast<const char*>(vectors) + bytes, layer.head_dim, static_cast<int32_t>(token), dtype, -1};
  }

  __device__ bool framed(const gsrq_layer& layer) const {
    return vectors == nullptr && !values && layer.key_center != nullptr;
  }

  // Element i of all heads', as the cache stores it. Of a framed key: less its head's center, turned to its token's position,
  // float64, rounded once.
  __device__ float element(const gsrq_layer& layer, const Origin& origin, int64_t i) const {
    const int32_t d = layer.head_dim, head = static_cast<int32_t>(i) / d, at = static_cast<int32_t>(i) % d;
    const auto stored = [&](int32_t e) { return exact_element(origin, head, e); };
    if (!framed(layer)) return stored(at);
    const float* center = layer.key_center + head * d;
    const auto centered = [&](int32_t e) { return static_cast<double>(stored(e)) - static_cast<double>(center[e]); };
    const int32_t half = layer.half_rope;
    if (at >= 2 * half) return static_cast<float>(centered(at));
    const int32_t p = layer.rope_interleaved ? at / 2 : at % half;
    const bool second = layer.rope_interleaved ? at % 2 == 1 : at >= half;
    int32_t e0, e1;
    pair_elements(layer, p, &e0, &e1);
    const int64_t angle = static_cast<int64_t>(origin.token) * half + p;
    const double c = layer.cos[angle], s = layer.sin[angle], x = centered(e0), y = centered(e1);
    return static_cast<float>(second ? y * c + x * s : x * c - y * s);
  }

  // The stages' codes of sub-vector g.
  __device__ int8_t* target(const gsrq_layer& layer, const gsrq_codebook& book, const gsrq_call& call, int64_t b, int64_t row,
                            int64_t g) const {
    if (vectors != nullptr) return codes + row * book.groups * book.stages + gsrq_code_byte(g, 0, book.stages);
    const int32_t element = static_cast<int32_t>(g) * book.width, head = element / layer.head_dim;
    const CodePlaces places = code_places(layer, book, head);
    return codes + places.at(code_row(call, static_cast<int32_t>(b), row)) +
           (element - head * layer.head_dim) / book.width * book.stages;
  }
};

inline int64_t encode_rows(const gsrq_layer& layer, const gsrq_call& call, const EncodeSource& source) {
  return source.vectors != nullptr ? source.count : most_coded(layer, call);
}

inline int64_t encode_batch(const gsrq_call& call, const EncodeSource& source) {
  return source.vectors != nullptr ? 1 : call.batch;
}

// Any beam, any width: float64 throughout. Workspace of one thread block, and how many blocks there should be.
int64_t encode_exact_slice(const gsrq_layer& layer, const gsrq_codebook& book);
int64_t encode_exact_blocks(const gsrq_layer& layer, const gsrq_codebook& book, int64_t batch, int64_t rows);
int encode_exact(const gsrq_layer& layer, const gsrq_call& call, const EncodeBook& book, const EncodeSource& source,
                 void* workspace, int64_t bytes, cudaStream_t stream);

// Greedy choice on tensor cores; close decisions again in float32, then float64. No workspace.
int encode_greedy(const gsrq_layer& layer, const gsrq_call& call, const EncodeBook& book, const EncodeSource& source,
                  cudaStream_t stream);

// The same for tiled books of one padded width: one or two, keys and values at once.
int encode_tiled(const gsrq_layer& layer, const gsrq_call& call, const EncodeBook* const* books,
                 const EncodeSource* const* sources, int count, cudaStream_t stream);

}  // namespace gsrq::cuda
