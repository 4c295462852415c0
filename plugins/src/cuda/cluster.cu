// Clustering's update and its C functions. Rows are sorted by code (counting sort, stable), each cluster's members summed
// in pieces of fixed size by one thread block each, pieces added in order: no atomics on floats, the same bits every time.
#include "cluster.cuh"

#include <algorithm>

namespace gsrq::cuda {
namespace {

constexpr int kSortThreads = 256, kSortWarps = kSortThreads / 32;
constexpr int kScanParts = 4;
constexpr int kSumThreads = 128, kSumWarps = kSumThreads / 32;
constexpr int kAtOnce = 8;     // rows whose elements are on their way
constexpr int kColumns = 128;  // of a row that a warp adds at once, 4 a lane

// How often each code is in each run of rows. One warp a run.
__global__ void __launch_bounds__(kSortThreads) count_codes(const uint8_t* codes, int64_t rows, int64_t runs,
                                                            int32_t* counts) {
  __shared__ int mine[kSortWarps][kClusters];
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const int64_t run = blockIdx.x * static_cast<int64_t>(kSortWarps) + warp, g = blockIdx.y;
  if (run >= runs) return;
  for (int k = lane; k < kClusters; k += 32) mine[warp][k] = 0;
  __syncwarp();
#pragma unroll 8
  for (int i = 0; i < kRun; i += 32) {
    const int64_t row = run * kRun + i + lane;
    if (row < rows) atomicAdd(&mine[warp][codes[g * rows + row]], 1);  // whole numbers: any order gives the same
  }
  __syncwarp();
  for (int k = lane; k < kClusters; k += 32) counts[(g * runs + run) * kClusters + k] = mine[warp][k];
}

// Where each cluster starts, its first piece, and where the rows of each code in each run go. One thread block a group;
// thread (p, k) has quarter p of the runs for code k.
__global__ void __launch_bounds__(kScanParts* kClusters) scan_counts(int64_t runs, int32_t* offsets, int32_t* starts,
                                                                     int32_t* first_piece) {
  __shared__ int part_sum[kScanParts][kClusters], scanned[2][kClusters];
  const int k = threadIdx.x % kClusters, part = threadIdx.x / kClusters;
  const int64_t g = blockIdx.x, per = (runs + kScanParts - 1) / kScanParts;
  const int64_t from = min(runs, part * per), to = min(runs, from + per);
  int32_t* mine = offsets + g * runs * kClusters + k;
  int count = 0;
#pragma unroll 8
  for (int64_t run = from; run < to; ++run) count += mine[run * kClusters];
  part_sum[part][k] = count;
  __syncthreads();
  int before_me = 0, total = 0;  // of this code: in the quarters before, in all
  for (int p = 0; p < kScanParts; ++p) {
    if (p < part) before_me += part_sum[p][k];
    total += part_sum[p][k];
  }
  const int pieces = (total + kPiece - 1) / kPiece;
  if (part == 0) scanned[0][k] = total, scanned[1][k] = pieces;
  __syncthreads();
  for (int offset = 1; offset < kClusters; offset *= 2) {
    int other = 0;
    if (part < 2 && k >= offset) other = scanned[part][k - offset];
    __syncthreads();
    if (part < 2) scanned[part][k] += other;
    __syncthreads();
  }
  const int start = scanned[0][k] - total;
  if (part == 0) {
    starts[g * (kClusters + 1) + k] = start;
    first_piece[g * (kClusters + 1) + k] = scanned[1][k] - pieces;
    if (k == kClusters - 1) {
      starts[g * (kClusters + 1) + kClusters] = scanned[0][k];
      first_piece[g * (kClusters + 1) + kClusters] = scanned[1][k];
    }
  }
  int at = start + before_me;
#pragma unroll 8
  for (int64_t run = from; run < to; ++run) {
    const int here = mine[run * kClusters];
    mine[run * kClusters] = at;
    at += here;
  }
}

// Rows in order of their codes. One warp a run, 32 rows at a time in order.
__global__ void __launch_bounds__(kSortThreads) sort_rows(const uint8_t* codes, int64_t rows, int64_t runs,
                                                          const int32_t* offsets, int32_t* order) {
  __shared__ int next[kSortWarps][kClusters];
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const int64_t run = blockIdx.x * static_cast<int64_t>(kSortWarps) + warp, g = blockIdx.y;
  if (run >= runs) return;
  for (int k = lane; k < kClusters; k += 32) next[warp][k] = offsets[(g * runs + run) * kClusters + k];
  __syncwarp();
#pragma unroll 8
  for (int i = 0; i < kRun; i += 32) {
    const int64_t row = run * kRun + i + lane;
    const int code = row < rows ? codes[g * rows + row] : kClusters;
    const unsigned same = __match_any_sync(0xffffffffu, code), before = same & ((1u << lane) - 1);
    const int at = code < kClusters ? next[warp][code] : 0;
    __syncwarp();
    if (code < kClusters) {
      order[g * rows + at + __popc(before)] = static_cast<int32_t>(row);
      if (before == 0) next[warp][code] = at + __popc(same);
    }
    __syncwarp();
  }
}

// Sums of a piece of a cluster: of w x, of w x / ||x|| and of w. A warp adds every fourth 32 of its rows.
template <bool Directions>
__global__ void __launch_bounds__(kSumThreads) sum_pieces(const __grid_constant__ gsrq_clustering of, int64_t pieces,
                                                          const int32_t* order, const int32_t* starts,
                                                          const int32_t* first_piece, float* sums, float* weights) {
  __shared__ float4 of_warp[Directions ? 2 : 1][kSumWarps][32];
  __shared__ float weight_of_warp[kSumWarps];
  const int64_t g = blockIdx.y;
  const int piece = static_cast<int>(blockIdx.x);
  const int32_t* firsts = first_piece + g * (kClusters + 1);
  if (piece >= firsts[kClusters]) return;
  int k = 0;  // the last cluster that starts at this piece or before: it has the piece
  for (int step = kClusters / 2; step > 0; step /= 2)
    if (firsts[k + step] <= piece) k += step;
  const int from = starts[g * (kClusters + 1) + k] + (piece - firsts[k]) * kPiece;
  const int to = min(starts[g * (kClusters + 1) + k + 1], from + kPiece);
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, width = of.width;
  const int column = static_cast<int>(blockIdx.z) * kColumns + lane * 4;
  const bool whole = width % 4 == 0;
  float4 plain = make_float4(0, 0, 0, 0), direction = plain;
  float weight = 0;
  for (int base = from + 32 * warp; base < to; base += 32 * kSumWarps) {
    const bool real = base + lane < to;
    const int64_t row = g * of.rows + (real ? order[g * of.rows + base + lane] : 0);
    const float w = !real ? 0.0f : of.weights != nullptr ? of.weights[row] : 1.0f;
    const float turned = Directions ? w / fmaxf(of.norms[row], kTiny) : 0.0f;
    weight += w;
    const int count = min(32, to - base);  // rows past it, up to a multiple of the unrolling, weigh nothing
    for (int first = 0; first < count; first += kAtOnce) {
#pragma unroll
      for (int i = 0; i < kAtOnce; ++i) {
        const int r = first + i;
        const float* x = of.vectors + __shfl_sync(0xffffffffu, row, r) * width;
        const float a = __shfl_sync(0xffffffffu, w, r), b = __shfl_sync(0xffffffffu, turned, r);
        float4 v = make_float4(0, 0, 0, 0);
        if (whole) {
          if (column < width) v = __ldg(reinterpret_cast<const float4*>(x + column));
        } else {
          const auto one = [&](int e) { return e < width ? __ldg(x + e) : 0.0f; };
          v = make_float4(one(column), one(column + 1), one(column + 2), one(column + 3));
        }
        plain.x = fmaf(a, v.x, plain.x), plain.y = fmaf(a, v.y, plain.y);
        plain.z = fmaf(a, v.z, plain.z), plain.w = fmaf(a, v.w, plain.w);
        if (Directions) {
          direction.x = fmaf(b, v.x, direction.x), direction.y = fmaf(b, v.y, direction.y);
          direction.z = fmaf(b, v.z, direction.z), direction.w = fmaf(b, v.w, direction.w);
        }
      }
    }
  }
  for (int offset = 16; offset > 0; offset /= 2) weight += __shfl_xor_sync(0xffffffffu, weight, offset);
  of_warp[0][warp][lane] = plain;
  if (Directions) of_warp[Directions ? 1 : 0][warp][lane] = direction;
  if (lane == 0) weight_of_warp[warp] = weight;
  __syncthreads();
  const int64_t at = g * pieces + piece;
  if (threadIdx.x == 0 && blockIdx.z == 0) {
    float sum = 0;
    for (int w = 0; w < kSumWarps; ++w) sum += weight_of_warp[w];
    weights[at] = sum;
  }
  const int e = static_cast<int>(blockIdx.z) * kColumns + static_cast<int>(threadIdx.x);
  if (e >= width) return;
#pragma unroll
  for (int s = 0; s < (Directions ? 2 : 1); ++s) {
    float sum = 0;
    for (int w = 0; w < kSumWarps; ++w) sum += reinterpret_cast<const float*>(of_warp[s][w])[threadIdx.x];
    sums[(at * 2 + s) * width + e] = sum;
  }
}

__device__ double block_sum(double x, double* of_warp) {
  for (int offset = 16; offset > 0; offset /= 2) x += __shfl_xor_sync(0xffffffffu, x, offset);
  __syncthreads();  // of_warp may still be read
  if (threadIdx.x % 32 == 0) of_warp[threadIdx.x / 32] = x;
  __syncthreads();
  double all = 0;
  for (int w = 0; w < kSumWarps; ++w) all += of_warp[w];
  return all;
}

// A codeword from its pieces. One thread block a codeword; `updated` may be `words`.
__global__ void __launch_bounds__(kSumThreads) finish_words(const __grid_constant__ gsrq_clustering of, int32_t form,
                                                            int64_t pieces, const int32_t* first_piece, const float* sums,
                                                            const float* weights, const float* words, float* updated,
                                                            float* totals) {
  __shared__ float means[kMostClusterWidth], shapes[kMostClusterWidth];
  __shared__ double of_warp[kSumWarps];
  const int k = static_cast<int>(blockIdx.x), width = of.width;
  const int64_t g = blockIdx.y, word = g * kClusters + k;
  const int32_t* firsts = first_piece + g * (kClusters + 1);
  const int64_t from = g * pieces + firsts[k], to = g * pieces + firsts[k + 1];
  double all = 0;
  for (int64_t p = from; p < to; ++p) all += weights[p];
  const float total = static_cast<float>(all);
  if (threadIdx.x == 0) totals[word] = total;
  const double share = form == GSRQ_SUMS ? 1.0 : 1.0 / static_cast<double>(fmaxf(total, kTiny));
  double squares = 0;
  for (int e = threadIdx.x; e < width; e += kSumThreads) {
    double plain = 0, direction = 0;
#pragma unroll 4
    for (int64_t p = from; p < to; ++p) {
      plain += sums[p * 2 * width + e];
      if (form == GSRQ_GAIN_SHAPE) direction += sums[(p * 2 + 1) * width + e];
    }
    means[e] = static_cast<float>(plain * share);
    if (form != GSRQ_GAIN_SHAPE) {
      updated[word * width + e] = means[e];
      continue;
    }
    const float mean_direction = static_cast<float>(direction * share);
    shapes[e] = mean_direction;
    squares += static_cast<double>(mean_direction) * mean_direction;
  }
  if (form != GSRQ_GAIN_SHAPE) return;
  const double length = sqrt(block_sum(squares, of_warp));
  double inverse = 1 / fmax(length, static_cast<double>(kTiny));
  if (!(length > 1e-6)) {  // the old direction
    double old = 0;
    for (int e = threadIdx.x; e < width; e += kSumThreads) {
      shapes[e] = words[word * width + e];
      old += static_cast<double>(shapes[e]) * shapes[e];
    }
    inverse = 1 / fmax(sqrt(block_sum(old, of_warp)), static_cast<double>(kTiny));
  }
  double dot = 0;  // each thread reads what it wrote
  for (int e = threadIdx.x; e < width; e += kSumThreads) dot += static_cast<double>(means[e]) * (shapes[e] * inverse);
  const double gain = fmax(block_sum(dot, of_warp), 0.0);
  for (int e = threadIdx.x; e < width; e += kSumThreads)
    updated[word * width + e] = static_cast<float>(gain * (shapes[e] * inverse));
}

int check(const gsrq_clustering& of) {
  if (of.groups < 1 || of.groups > 65535) return fail("clustering: groups %d must be 1 to 65535", of.groups);
  if (of.width < 1 || of.width > kMostClusterWidth)
    return fail("clustering: width %d must be 1 to %d", of.width, kMostClusterWidth);
  if (of.rows < 1 || of.rows > INT32_MAX / 2)
    return fail("clustering: rows %lld must be 1 to %d", static_cast<long long>(of.rows), INT32_MAX / 2);
  return 0;
}

int check(const gsrq_clustering& of, const void* workspace, int64_t bytes) {
  if (check(of)) return 1;
  if (of.vectors == nullptr) return fail("clustering: vectors is null");
  if (!aligned(of.vectors)) return fail("clustering: vectors must be aligned to 16 bytes");
  const int64_t need = gsrq_cuda_clustering_workspace_bytes(&of);
  if (workspace == nullptr || bytes < need)
    return fail("clustering: the workspace has %lld bytes, %lld are needed", static_cast<long long>(bytes),
                static_cast<long long>(need));
  return 0;
}

}  // namespace

int cluster_update(const gsrq_clustering& of, int32_t form, const uint8_t* codes, const float* words, float* updated,
                   float* totals, const UpdateShare& share, cudaStream_t stream) {
  const auto groups = static_cast<unsigned>(of.groups);
  const dim3 sorts(static_cast<unsigned>(parts_of(share.runs, kSortWarps)), groups);
  count_codes<<<sorts, kSortThreads, 0, stream>>>(codes, of.rows, share.runs, share.offsets);
  scan_counts<<<groups, kScanParts * kClusters, 0, stream>>>(share.runs, share.offsets, share.starts, share.first_piece);
  sort_rows<<<sorts, kSortThreads, 0, stream>>>(codes, of.rows, share.runs, share.offsets, share.order);
  const dim3 sums(static_cast<unsigned>(share.pieces), groups, static_cast<unsigned>(parts_of(of.width, kColumns)));
  if (launched("clustering sort")) return 1;
  const auto kernel = form == GSRQ_GAIN_SHAPE ? sum_pieces<true> : sum_pieces<false>;
  kernel<<<sums, kSumThreads, 0, stream>>>(of, share.pieces, share.order, share.starts, share.first_piece, share.sums,
                                           share.weights);
  if (launched("clustering sums")) return 1;
  finish_words<<<dim3(kClusters, groups), kSumThreads, 0, stream>>>(of, form, share.pieces, share.first_piece, share.sums,
                                                                    share.weights, words, updated, totals);
  return launched("clustering words");
}

}  // namespace gsrq::cuda

using namespace gsrq::cuda;

int64_t gsrq_cuda_clustering_workspace_bytes(const gsrq_clustering* of) {
  if (check(*of)) return -1;
  Arena assigning, updating;
  AssignShare{*of, assigning};
  UpdateShare{*of, updating};
  return std::max(assigning.used, updating.used);
}

int gsrq_cuda_clustering_assign(const gsrq_clustering* of, const float* words, int32_t inner, uint8_t* codes, float* gains,
                                double* inertia, void* workspace, int64_t bytes, void* stream) {
  if (check(*of, workspace, bytes)) return 1;
  if (words == nullptr || codes == nullptr) return fail("clustering: words or codes is null");
  Arena arena{static_cast<char*>(workspace)};
  return cluster_assign(*of, words, inner != 0, codes, gains, inertia, AssignShare(*of, arena),
                        static_cast<cudaStream_t>(stream));
}

int gsrq_cuda_clustering_update(const gsrq_clustering* of, int32_t form, const uint8_t* codes, const float* words,
                                float* updated, float* totals, void* workspace, int64_t bytes, void* stream) {
  if (check(*of, workspace, bytes)) return 1;
  if (form != GSRQ_SUMS && form != GSRQ_MEANS && form != GSRQ_GAIN_SHAPE)
    return fail("clustering: form %d must be GSRQ_SUMS, GSRQ_MEANS or GSRQ_GAIN_SHAPE", form);
  if (codes == nullptr || updated == nullptr || totals == nullptr) return fail("clustering: codes, updated or totals is null");
  if (form == GSRQ_GAIN_SHAPE && (words == nullptr || of->norms == nullptr))
    return fail("clustering: GSRQ_GAIN_SHAPE needs words and norms");
  Arena arena{static_cast<char*>(workspace)};
  return cluster_update(*of, form, codes, words, updated, totals, UpdateShare(*of, arena),
                        static_cast<cudaStream_t>(stream));
}
