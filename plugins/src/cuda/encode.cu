// Encoding: the derived forms of the codebooks, and which kernel codes what.
#include <algorithm>

#include "encode.cuh"

namespace gsrq::cuda {
namespace {

constexpr int kThreads = 256;

__global__ void mark_diagonal(EncodeBook book) {
  const int g = blockIdx.x * blockDim.x + threadIdx.x;
  if (g < book.book.groups) book.diagonal[g] = 1;
}

// Block: row i of group g of A^T A and of A^T.
__global__ void __launch_bounds__(kThreads) build_metric(EncodeBook book) {
  const int64_t width = book.book.width, g = blockIdx.x / width, i = blockIdx.x % width;
  const float* a = book.book.transform + g * width * width;
  bool other = false;
  for (int64_t j = threadIdx.x; j < width; j += kThreads) {
    double sum = 0;
    for (int64_t k = 0; k < width; ++k)
      sum += static_cast<double>(a[k * width + i]) * static_cast<double>(a[k * width + j]);
    book.metric[(g * width + i) * width + j] = sum;
    const float entry = a[j * width + i];
    book.turned[(g * width + i) * width + j] = entry;
    if (i != j && entry != 0.0f) other = true;
  }
  if (other) book.diagonal[g] = 0;
}

__device__ double block_sum(double x, double* shared) {
  for (int offset = 16; offset > 0; offset /= 2) x += __shfl_xor_sync(0xffffffffu, x, offset);
  __syncthreads();
  if (threadIdx.x % 32 == 0) shared[threadIdx.x / 32] = x;
  __syncthreads();
  double sum = 0;
  for (int w = 0; w < kThreads / 32; ++w) sum += shared[w];
  return sum;
}

// w = A c of the block's codeword, one element a call. `word` is the codeword in shared memory.
__device__ double transformed(const EncodeBook& book, int64_t g, const float* word, int64_t i) {
  const int64_t width = book.book.width;
  const double* turned = book.turned + g * width * width;
  if (book.diagonal[g]) return turned[i * width + i] * static_cast<double>(word[i]);
  double sum = 0;
  for (int64_t j = 0; j < width; ++j)
    sum += turned[j * width + i] * static_cast<double>(word[j]);
  return sum;
}

__device__ void read_word(const EncodeBook& book, int64_t index, float* word) {
  const int64_t width = book.book.width;
  const __half* from = static_cast<const __half*>(book.book.codewords) + index * width;
  for (int64_t j = threadIdx.x; j < width; j += kThreads) word[j] = __half2float(from[j]);
  __syncthreads();
}

// Block: one codeword.
__global__ void __launch_bounds__(kThreads) build_norms(EncodeBook book) {
  extern __shared__ float word[];
  __shared__ double shared[kThreads / 32];
  const int64_t index = blockIdx.x, g = index / 256 / book.book.stages;
  read_word(book, index, word);
  double sum = 0;
  for (int64_t i = threadIdx.x; i < book.book.width; i += kThreads) {
    const double w = transformed(book, g, word, i);
    sum += w * w;
  }
  sum = block_sum(sum, shared);
  if (threadIdx.x == 0) book.norms[index] = sum;
}

// Block: one stage. Its scale; its codewords that repeat an earlier one can never be chosen.
__global__ void __launch_bounds__(256) build_bounds(EncodeBook book) {
  __shared__ double norms[256];
  const int64_t stage = blockIdx.x, k = threadIdx.x, width = book.book.width;
  const double norm = book.norms[stage * 256 + k];
  norms[k] = norm;
  __syncthreads();
  double largest = 0;
  for (int j = 0; j < 256; ++j) largest = fmax(largest, norms[j]);
  int exponent = 0;
  const double root = sqrt(largest) * (1 + 1e-6);
  if (root > 0) frexp(root, &exponent);
  const double scale = ldexp(1.0, exponent);

  const __half* words = static_cast<const __half*>(book.book.codewords) + stage * 256 * width;
  bool repeats = false;
  for (int64_t j = 0; j < k && !repeats; ++j) {
    if (norms[j] != norm) continue;
    repeats = true;
    for (int64_t i = 0; i < width && repeats; ++i)
      repeats = __half2float(words[j * width + i]) == __half2float(words[k * width + i]);
  }
  // encode_tiled.cu compares scores as integers and wants those of the best codewords to be positive: with this offset the best
  // is at least the largest product of a codeword and the residual.
  const double offset = book.tiled ? root / scale * root / 2 : 0;
  // So far above any product of a residual and a codeword that it is never near the best.
  book.half_norms[stage * 256 + k] = static_cast<float>(repeats ? ldexp(scale, 70) : norm / (2 * scale) - offset);
  if (k == 0) book.bounds[stage] = {static_cast<float>(scale), static_cast<float>(root / scale), 0.0f, 0.0f};
}

// Block: one codeword. Its two float16 halves, and how far they are off (bit patterns of positive floats order as they do).
__global__ void __launch_bounds__(kThreads) build_words(EncodeBook book) {
  extern __shared__ float word[];
  __shared__ double shared[kThreads / 32];
  const int64_t index = blockIdx.x, g = index / 256 / book.book.stages;
  StageBounds* bounds = book.bounds + index / 256;
  const double inverse = 1 / static_cast<double>(bounds->scale);
  read_word(book, index, word);
  double high_off = 0, low_off = 0;
  for (int64_t i = threadIdx.x; i < book.padded; i += kThreads) {
    const double w = i < book.book.width ? transformed(book, g, word, i) * inverse : 0.0;
    const __half high = __double2half(w);
    const double rest = w - static_cast<double>(__half2float(high));
    const __half low = __double2half(rest);
    const double left = rest - static_cast<double>(__half2float(low));
    const int word = static_cast<int>(index % 256), e = static_cast<int>(i);
    const int64_t stage = index / 256 * 256 * book.padded, plain = static_cast<int64_t>(word) * book.padded + i;
    book.high[stage + (book.tiled ? tiled_high(word, e, book.padded) : plain)] = high;
    book.low[stage + (book.tiled ? tiled_low(word, e, book.padded) : plain)] = low;
    high_off += rest * rest;
    low_off += left * left;
  }
  high_off = block_sum(high_off, shared);
  low_off = block_sum(low_off, shared);
  if (threadIdx.x == 0) {
    const float high = static_cast<float>(sqrt(high_off) * (1 + 1e-6)), low = static_cast<float>(sqrt(low_off) * (1 + 1e-6));
    atomicMax(reinterpret_cast<int*>(&bounds->high_off), __float_as_int(high));
    atomicMax(reinterpret_cast<int*>(&bounds->low_off), __float_as_int(low));
  }
}

int prepare_book(const EncodeBook& book, cudaStream_t stream) {
  const int64_t rows = static_cast<int64_t>(book.book.groups) * book.book.width;
  const int64_t stages = static_cast<int64_t>(book.book.groups) * book.book.stages;
  if (rows > INT32_MAX || stages * 256 > INT32_MAX) return fail("prepare: the codebook is too large");
  const size_t shared = static_cast<size_t>(book.book.width) * sizeof(float);
  if (shared > 46 * 1024) return fail("prepare: width %d is more than encoding supports", book.book.width);
  mark_diagonal<<<(book.book.groups + 255) / 256, 256, 0, stream>>>(book);
  build_metric<<<static_cast<unsigned>(rows), kThreads, 0, stream>>>(book);
  build_norms<<<static_cast<unsigned>(stages * 256), kThreads, shared, stream>>>(book);
  if (book.greedy) {
    build_bounds<<<static_cast<unsigned>(stages), 256, 0, stream>>>(book);
    build_words<<<static_cast<unsigned>(stages * 256), kThreads, shared, stream>>>(book);
  }
  return launched("encode_prepare");
}

int encode_source(const gsrq_layer& layer, const gsrq_call& call, const EncodeBook& book, const EncodeSource& source,
                  void* workspace, int64_t bytes, cudaStream_t stream) {
  if (encode_rows(layer, call, source) == 0 || encode_batch(call, source) == 0) return 0;
  const EncodeBook* one = &book;
  const EncodeSource* its = &source;
  if (book.tiled) return encode_tiled(layer, call, &one, &its, 1, stream);
  if (book.greedy) return encode_greedy(layer, call, book, source, stream);
  return encode_exact(layer, call, book, source, workspace, bytes, stream);
}

}  // namespace

int encode_prepare(const gsrq_layer& layer, Arena& prepared, cudaStream_t stream, bool launch) {
  const EncodeBook keys = encode_book(layer, layer.keys, prepared), values = encode_book(layer, layer.values, prepared);
  return launch ? prepare_book(keys, stream) || prepare_book(values, stream) : 0;
}

namespace {

// Keys and values are encoded one after the other and share the workspace.
int64_t workspace_need(const gsrq_layer& layer, const gsrq_call& call) {
  int64_t need = 0;
  for (const gsrq_codebook* book : {&layer.keys, &layer.values}) {
    if (is_greedy(layer, *book)) continue;
    need = std::max(need, encode_exact_slice(layer, *book) *
                              encode_exact_blocks(layer, *book, call.batch, most_coded(layer, call)));
  }
  return need;
}

}  // namespace

void encode_workspace(const gsrq_layer& layer, const gsrq_call& call, Arena& workspace) {
  workspace.take<char>(workspace_need(layer, call));
}

int encode(const gsrq_layer& layer, const gsrq_call& call, Arena& prepared, Arena& workspace, cudaStream_t stream) {
  const EncodeBook keys = encode_book(layer, layer.keys, prepared), values = encode_book(layer, layer.values, prepared);
  const int64_t bytes = workspace_need(layer, call);
  char* scratch = workspace.take<char>(bytes);
  const EncodeSource key_source{false, nullptr, 0, 0, call.key_codes}, value_source{true, nullptr, 0, 0, call.value_codes};
  if (keys.tiled && values.tiled && keys.padded == values.padded && call.batch > 0 && most_coded(layer, call) > 0) {
    const EncodeBook* books[] = {&keys, &values};
    const EncodeSource* sources[] = {&key_source, &value_source};
    return encode_tiled(layer, call, books, sources, 2, stream);
  }
  return encode_source(layer, call, keys, key_source, scratch, bytes, stream) ||
         encode_source(layer, call, values, value_source, scratch, bytes, stream);
}

}  // namespace gsrq::cuda

using namespace gsrq::cuda;

int gsrq_cuda_encode_vectors(const gsrq_layer* layer, int32_t side, const void* vectors, int32_t dtype, int64_t n,
                             int8_t* codes, const void* prepared, void* workspace, int64_t workspace_bytes,
                             void* stream) {
  if (gsrq_cuda_prepared_bytes(layer) < 0) return 1;  // checks the layer
  if (side != 0 && side != 1) return fail("side %d must be 0 (keys) or 1 (values)", side);
  if (!is_dtype(dtype)) return fail("dtype %d is unknown", dtype);
  if (n < 0) return fail("n = %lld is negative", static_cast<long long>(n));
  if (n == 0) return 0;
  if (vectors == nullptr || codes == nullptr || prepared == nullptr) return fail("vectors, codes or prepared is null");
  Arena constants{static_cast<char*>(const_cast<void*>(prepared))};
  decode_prepare(*layer, constants, nullptr, false);
  const EncodeBook keys = encode_book(*layer, layer->keys, constants), values = encode_book(*layer, layer->values, constants);
  const EncodeSource source{side == 1, vectors, dtype, n, codes};
  const gsrq_call call{};
  return encode_source(*layer, call, side == 1 ? values : keys, source, workspace, workspace == nullptr ? 0 : workspace_bytes,
                       static_cast<cudaStream_t>(stream));
}
