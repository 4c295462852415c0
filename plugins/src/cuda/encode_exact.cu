// Encoding in float64 throughout, any beam and width: the gains 2 <M r, c> - c^T M c with M = A^T A and the residual r kept
// without rounding in the codewords' own space.
#include <algorithm>

#include "encode.cuh"

namespace gsrq::cuda {
namespace {

constexpr int kThreads = 256;  // a thread is a codeword
constexpr int kColumns = 16;   // kept paths of all tokens of a tile that are scored at once
constexpr int kDepth = 32;     // elements a step
constexpr int64_t kMostBlocks = 528, kBudget = int64_t{256} << 20;

__host__ __device__ int64_t tile_tokens(int32_t beam) { return beam >= kColumns ? 1 : kColumns / beam; }

// A thread block's share of the workspace; a column is a (token, kept path) pair: token * beam + path.
struct Slice {
  double *residual, *next, *gradient;  // [columns, width]: r, the next stage's, M r
  double *candidates;                  // [columns, 256]: errors
  double *error, *next_error;          // [columns]
  uint8_t *parents, *codes;            // [stages, columns]

  __host__ __device__ static int64_t bytes(int64_t columns, int64_t width, int64_t stages) {
    return ((3 * columns * width + 256 * columns + 2 * columns) * 8 + 2 * stages * columns + 255) / 256 * 256;
  }
  __device__ Slice(char* at, int64_t columns, int64_t width, int64_t stages) {
    residual = reinterpret_cast<double*>(at);
    next = residual + columns * width;
    gradient = next + columns * width;
    candidates = gradient + columns * width;
    error = candidates + 256 * columns;
    next_error = error + columns;
    parents = reinterpret_cast<uint8_t*>(next_error + columns);
    codes = parents + stages * columns;
  }
};

struct Shared {
  double columns[kColumns][kDepth];
  double words[kDepth][kThreads + 1];
  double best[kThreads / 32];
  int index[kThreads / 32];
};

// gradient = M residual for the columns first .. first + 15 that are live.
__device__ void turn(const EncodeBook& book, int64_t g, const Slice& slice, int64_t first, const bool (&live)[kColumns],
                     Shared& shared) {
  const int64_t width = book.book.width;
  const double* metric = book.metric + g * width * width;
  const bool diagonal = book.diagonal[g] != 0;
  for (int64_t base = 0; base < width; base += kThreads) {
    const int64_t i = base + threadIdx.x;
    double sum[kColumns] = {};
    if (diagonal) {
#pragma unroll
      for (int c = 0; c < kColumns; ++c)
        if (live[c] && i < width) sum[c] = metric[i * width + i] * slice.residual[(first + c) * width + i];
    } else {
      for (int64_t from = 0; from < width; from += kDepth) {
        __syncthreads();
        for (int at = threadIdx.x; at < kColumns * kDepth; at += kThreads) {
          const int c = at / kDepth;
          const int64_t j = from + at % kDepth;
          shared.columns[c][at % kDepth] = live[c] && j < width ? slice.residual[(first + c) * width + j] : 0.0;
        }
        __syncthreads();
        const int depth = static_cast<int>(width - from < kDepth ? width - from : kDepth);
        if (i < width)
          for (int j = 0; j < depth; ++j) {
            const double m = metric[(from + j) * width + i];
#pragma unroll
            for (int c = 0; c < kColumns; ++c) sum[c] += m * shared.columns[c][j];
          }
      }
    }
#pragma unroll
    for (int c = 0; c < kColumns; ++c)
      if (live[c] && i < width) slice.gradient[(first + c) * width + i] = sum[c];
  }
  __syncthreads();
}

// Errors of all codewords of a stage after the columns first .. first + 15.
__device__ void score(const EncodeBook& book, int64_t stage, const Slice& slice, int64_t first,
                      const bool (&live)[kColumns], Shared& shared) {
  const int64_t width = book.book.width;
  const __half* words = static_cast<const __half*>(book.book.codewords) + stage * 256 * width;
  double sum[kColumns] = {};
  for (int64_t from = 0; from < width; from += kDepth) {
    __syncthreads();
    for (int at = threadIdx.x; at < kColumns * kDepth; at += kThreads) {
      const int c = at / kDepth;
      const int64_t j = from + at % kDepth;
      shared.columns[c][at % kDepth] = live[c] && j < width ? slice.gradient[(first + c) * width + j] : 0.0;
    }
    for (int at = threadIdx.x; at < 256 * kDepth; at += kThreads) {
      const int64_t j = from + at % kDepth;
      shared.words[at % kDepth][at / kDepth] =
          j < width ? static_cast<double>(__half2float(words[at / kDepth * width + j])) : 0.0;
    }
    __syncthreads();
#pragma unroll 4
    for (int j = 0; j < kDepth; ++j) {
      const double w = shared.words[j][threadIdx.x];
#pragma unroll
      for (int c = 0; c < kColumns; ++c) sum[c] += w * shared.columns[c][j];
    }
  }
  const double norm = book.norms[stage * 256 + threadIdx.x];
#pragma unroll
  for (int c = 0; c < kColumns; ++c)
    if (live[c]) slice.candidates[(first + c) * 256 + threadIdx.x] = slice.error[first + c] - (2 * sum[c] - norm);
}

// The least of the block's values, of equals the lowest index. All threads get it.
__device__ int least(double value, int index, double* result, Shared& shared) {
  for (int offset = 16; offset > 0; offset /= 2) {
    const double other = __shfl_xor_sync(0xffffffffu, value, offset);
    const int at = __shfl_xor_sync(0xffffffffu, index, offset);
    if (other < value || (other == value && at < index)) value = other, index = at;
  }
  __syncthreads();
  if (threadIdx.x % 32 == 0) shared.best[threadIdx.x / 32] = value, shared.index[threadIdx.x / 32] = index;
  __syncthreads();
  value = shared.best[0], index = shared.index[0];
  for (int w = 1; w < kThreads / 32; ++w)
    if (shared.best[w] < value || (shared.best[w] == value && shared.index[w] < index))
      value = shared.best[w], index = shared.index[w];
  *result = value;
  return index;
}

// The `keep` best candidates of a token, in order, and their residuals. A thread owns the candidates of its codeword.
__device__ void keep_best(const EncodeBook& book, int64_t stage, int64_t r, const Slice& slice, int64_t columns,
                          int64_t first, int paths, int keep, Shared& shared) {
  const int k = threadIdx.x;
  double* mine = slice.candidates + first * 256 + k;
  const auto rescan = [&](double* value) {
    int path = 0;
    *value = mine[0];
    for (int p = 1; p < paths; ++p)
      if (mine[p * 256] < *value) *value = mine[p * 256], path = p;
    return path * 256 + k;
  };
  double value;
  int index = rescan(&value);
  for (int i = 0; i < keep; ++i) {
    double error;
    const int chosen = least(value, index, &error, shared);
    if (chosen % 256 == k) {
      mine[chosen - k] = INFINITY;
      index = rescan(&value);
    }
    if (k == 0) {
      slice.next_error[first + i] = error;
      slice.parents[r * columns + first + i] = static_cast<uint8_t>(chosen / 256);
      slice.codes[r * columns + first + i] = static_cast<uint8_t>(chosen % 256);
    }
  }
  __syncthreads();
  const int64_t width = book.book.width;
  const __half* words = static_cast<const __half*>(book.book.codewords) + stage * 256 * width;
  for (int64_t at = threadIdx.x; at < keep * width; at += kThreads) {
    const int64_t to = first + at / width, j = at % width;
    const int64_t parent = first + slice.parents[r * columns + to], code = slice.codes[r * columns + to];
    slice.next[to * width + j] =
        slice.residual[parent * width + j] - static_cast<double>(__half2float(words[code * width + j]));
  }
}

__global__ void __launch_bounds__(kThreads) encode_tiles(gsrq_layer layer, gsrq_call call, EncodeBook book,
                                                         EncodeSource source, char* workspace, int64_t slice_bytes,
                                                         int64_t tiles, int64_t tasks) {
  extern __shared__ char memory[];
  Shared& shared = *reinterpret_cast<Shared*>(memory);
  const int64_t width = book.book.width, stages = book.book.stages, beam = layer.beam;
  const int64_t tokens = tile_tokens(layer.beam), columns = tokens * beam;
  Slice slice(workspace + blockIdx.x * slice_bytes, columns, width, stages);
  for (int64_t task = blockIdx.x; task < tasks; task += gridDim.x) {
    const int64_t tile = task % tiles, b = task / tiles % (tasks / tiles / book.book.groups);
    const int64_t g = task / tiles / (tasks / tiles / book.book.groups);
    int64_t start;
    const int64_t rows = source.rows(layer, call, b, &start);
    if (tile * tokens >= rows) continue;
    const int64_t first_row = start + tile * tokens, left = rows - tile * tokens;
    const int64_t count = left < tokens ? left : tokens;
    __syncthreads();  // the slice and the shared memory of the task before
    for (int64_t at = threadIdx.x; at < count * width; at += kThreads) {
      const int64_t t = at / width, j = at % width;
      slice.residual[t * beam * width + j] =
          static_cast<double>(source.element(layer, source.origin(layer, call, b, first_row + t), g * width + j));
    }
    for (int64_t c = threadIdx.x; c < columns; c += kThreads) slice.error[c] = 0;
    __syncthreads();
    int paths = 1;
    for (int64_t r = 0; r < stages; ++r) {
      const int64_t stage = g * stages + r;
      for (int64_t first = 0; first < columns; first += kColumns) {
        bool live[kColumns], any = false;
#pragma unroll
        for (int c = 0; c < kColumns; ++c) {
          const int64_t column = first + c;
          live[c] = column < columns && column / beam < count && column % beam < paths;
          any = any || live[c];
        }
        if (!any) continue;
        turn(book, g, slice, first, live, shared);
        score(book, stage, slice, first, live, shared);
      }
      __syncthreads();
      const int keep = static_cast<int>(beam < paths * 256 ? beam : paths * 256);
      for (int64_t t = 0; t < count; ++t) keep_best(book, stage, r, slice, columns, t * beam, paths, keep, shared);
      __syncthreads();
      double* swap = slice.residual;
      slice.residual = slice.next, slice.next = swap;
      swap = slice.error;
      slice.error = slice.next_error, slice.next_error = swap;
      paths = keep;
    }
    if (threadIdx.x < count) {
      int8_t* out = source.target(layer, book.book, call, b, first_row + threadIdx.x, g);
      int64_t path = 0;
      for (int64_t r = stages - 1; r >= 0; --r) {
        const int64_t at = r * columns + threadIdx.x * beam + path;
        out[r] = static_cast<int8_t>(slice.codes[at]);
        path = slice.parents[at];
      }
    }
  }
}

int64_t task_count(const gsrq_layer& layer, const gsrq_codebook& book, int64_t batch, int64_t rows) {
  const int64_t tokens = tile_tokens(layer.beam);
  return (rows + tokens - 1) / tokens * batch * book.groups;
}

}  // namespace

int64_t encode_exact_slice(const gsrq_layer& layer, const gsrq_codebook& book) {
  return Slice::bytes(tile_tokens(layer.beam) * layer.beam, book.width, book.stages);
}

int64_t encode_exact_blocks(const gsrq_layer& layer, const gsrq_codebook& book, int64_t batch, int64_t rows) {
  const int64_t fit = std::max<int64_t>(1, kBudget / encode_exact_slice(layer, book));
  return std::min({task_count(layer, book, batch, rows), fit, kMostBlocks});
}

int encode_exact(const gsrq_layer& layer, const gsrq_call& call, const EncodeBook& book, const EncodeSource& source,
                 void* workspace, int64_t bytes, cudaStream_t stream) {
  const int64_t rows = encode_rows(layer, call, source), batch = encode_batch(call, source);
  const int64_t slice = encode_exact_slice(layer, book.book);
  const int64_t blocks = std::min(encode_exact_blocks(layer, book.book, batch, rows), bytes / slice);
  if (blocks < 1)
    return fail("encode: beam %d at width %d needs %lld bytes of workspace at least, %lld were given", layer.beam,
                book.book.width, static_cast<long long>(slice), static_cast<long long>(bytes));
  const int64_t tokens = tile_tokens(layer.beam), tiles = (rows + tokens - 1) / tokens;
  if (cudaFuncSetAttribute(encode_tiles, cudaFuncAttributeMaxDynamicSharedMemorySize, sizeof(Shared)) != cudaSuccess)
    return launched("encode_exact");
  encode_tiles<<<static_cast<unsigned>(blocks), kThreads, sizeof(Shared), stream>>>(
      layer, call, book, source, static_cast<char*>(workspace), slice, tiles, tiles * batch * book.book.groups);
  return launched("encode_exact");
}

}  // namespace gsrq::cuda
