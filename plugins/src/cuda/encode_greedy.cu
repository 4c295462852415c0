// Greedy encoding on tensor cores. All 256 scores of a stage come from float16 products with float32 sums; where the best
// two are closer than a bound of their error they are compared again in float32 from the float32 residual, and where
// that cannot tell either, in float64 from the vector itself. docs/cuda-encode.md has the bounds.
//
// A thread block has a tile of vectors of one group, with their residuals, for all stages; the codewords stream by.
#include "encode_greedy.cuh"

namespace gsrq::cuda {
namespace {

template <int Tiles, int RowWarps, int WordWarps>
__global__ void __launch_bounds__(32 * RowWarps * WordWarps, RowWarps* WordWarps <= 8 && RowWarps > 1 ? 2 : 1)
    encode_tiles(const __grid_constant__ gsrq_layer layer, const __grid_constant__ gsrq_call call,
                 const __grid_constant__ EncodeBook book, const __grid_constant__ EncodeSource source, int64_t tiles,
                 int64_t batches) {
  using S = Shape<Tiles, RowWarps, WordWarps>;
  constexpr int kThreads = S::kThreads, kWarps = S::kWarps, kTurnRows = 4 * kWarps;
  extern __shared__ __align__(16) char memory[];
  const Layout layout{S::kRows, WordWarps, book.padded};
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, sub = lane % kLanesOfRow;
  const int64_t tile = blockIdx.x % tiles, b = blockIdx.x / tiles % batches, g = blockIdx.x / tiles / batches;
  int64_t start;
  const int64_t left = source.rows(layer, call, b, &start) - tile * S::kRows;
  if (left <= 0) return;
  const int64_t first_row = start + tile * S::kRows;
  const int count = static_cast<int>(left < S::kRows ? left : S::kRows);
  const int padded = book.padded, stages = book.book.stages;
  const StageBounds* all_bounds = book.bounds + g * stages;

  __half* high = reinterpret_cast<__half*>(memory);
  float* residual = reinterpret_cast<float*>(memory + layout.residual_at());
  __half* ring = reinterpret_cast<__half*>(memory + layout.ring_at());
  float* norms = reinterpret_cast<float*>(memory + layout.norms_at());
  float4* bests = reinterpret_cast<float4*>(memory + layout.best_at());
  Row* state = reinterpret_cast<Row*>(memory + layout.row_at());
  const int high_stride = layout.high_stride(), residual_stride = layout.residual_stride();

  load_vectors<S::kRows, kWarps>(layer, call, book, source, layout, {b, g, first_row, count}, memory);
  __syncthreads();

  const int depth_tiles = (padded + kDepth - 1) / kDepth, per_stage = 2 * depth_tiles, total = stages * per_stage;
  const auto start_load = [&](int t) {
    if (t < total) {
      const int chunk = t / depth_tiles, from = t % depth_tiles * kDepth;  // chunk: 2 stage + half
      const int64_t word0 = (g * stages * 2 + chunk) * static_cast<int64_t>(kWords);
      __half* to = ring + t % kRing * (kWords * kTileStride);
      const __half* words = book.high + word0 * padded + from;
#pragma unroll
      for (int n = 0; n < kWords * kDepth / 8 / kThreads; ++n) {
        const int i = n * kThreads + threadIdx.x, word = i / (kDepth / 8), e = i % (kDepth / 8) * 8;
        const bool real = from + e < padded;
        copy_async(to + word * kTileStride + e, real ? words + static_cast<int64_t>(word) * padded + e : book.high, real);
      }
      if (from == 0 && threadIdx.x < kWords / 4)
        copy_async(norms + chunk % 4 * kWords + threadIdx.x * 4, book.half_norms + word0 + threadIdx.x * 4, true);
    }
    commit_async();
  };
  start_load(0);
  start_load(1);

  const int row_warp = warp / WordWarps, word_warp = warp % WordWarps;
  const __half* my_high = high + (row_warp * Tiles * 16 + lane % 16) * high_stride + lane / 16 * 8;
  const int my_words = (word_warp * S::kNear * 8 + lane % 8 + lane / 16 * 8) * kTileStride + lane / 8 % 2 * 8;
  const float accumulated = padded / 16 * 24 * 0x1p-23f;  // rounding of the tensor cores' sums, relative to the norms

  int t = 0;
  for (int stage = 0; stage < stages; ++stage) {
    float best[Tiles][2][3];
#pragma unroll
    for (int m = 0; m < Tiles; ++m)
#pragma unroll
      for (int h = 0; h < 2; ++h) best[m][h][0] = best[m][h][1] = best[m][h][2] = -3e38f;

    for (int half = 0; half < 2; ++half) {
      float sum[Tiles][S::kNear][4];
#pragma unroll
      for (int m = 0; m < Tiles; ++m)
#pragma unroll
        for (int n = 0; n < S::kNear; ++n)
#pragma unroll
          for (int j = 0; j < 4; ++j) sum[m][n][j] = 0;
      for (int depth = 0; depth < depth_tiles; ++depth, ++t) {
        wait_async<1>();
        __syncthreads();
        start_load(t + 2);
        const __half* words = ring + t % kRing * (kWords * kTileStride) + my_words;
        const int from = depth * kDepth, steps = min(kDepth, padded - from) / 16;
#pragma unroll 4
        for (int s = 0; s < steps; ++s) {
          uint32_t a[Tiles][4];
#pragma unroll
          for (int m = 0; m < Tiles; ++m) load_matrices(a[m], my_high + m * 16 * high_stride + from + s * 16);
#pragma unroll
          for (int n = 0; n < S::kNear; n += 2) {
            uint32_t w[4];
            load_matrices(w, words + n * 8 * kTileStride + s * 16);
#pragma unroll
            for (int m = 0; m < Tiles; ++m) {
              multiply(sum[m][n], a[m], w[0], w[1]);
              multiply(sum[m][n + 1], a[m], w[2], w[3]);
            }
          }
        }
      }
      // Scores <high, w> - half norm / scale; their low five bits become the number of the thread's candidate.
      const float* half_norms = norms + (2 * stage + half) % 4 * kWords + word_warp * S::kNear * 8 + lane % 4 * 2;
#pragma unroll
      for (int m = 0; m < Tiles; ++m)
#pragma unroll
        for (int h = 0; h < 2; ++h) {
          const float inverse = -reciprocal(state[(row_warp * Tiles + m) * 16 + lane / 4 + 8 * h].scale);
          const int offset = half * 2 * S::kNear;
#pragma unroll
          for (int n = 0; n < S::kNear; ++n)
#pragma unroll
            for (int j = 0; j < 2; ++j) {
              const float score = fmaf(half_norms[n * 8 + j], inverse, sum[m][n][2 * h + j]);
              const float x = __int_as_float((__float_as_int(score) & ~31) | (offset + 2 * n + j));
              float* top = best[m][h];
              const float below = fminf(top[0], x);
              top[0] = fmaxf(top[0], x);
              const float lower = fminf(top[1], below);
              top[1] = fmaxf(top[1], below);
              top[2] = fmaxf(top[2], lower);
            }
        }
    }
#pragma unroll
    for (int m = 0; m < Tiles; ++m)
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        const auto code = [&](float x) {
          const int id = __float_as_int(x) & 31;
          return id / (2 * S::kNear) * kWords + (word_warp * S::kNear + id / 2 % S::kNear) * 8 + lane % 4 * 2 + id % 2;
        };
        Best mine{best[m][h][0], best[m][h][1], best[m][h][2], code(best[m][h][0]), code(best[m][h][1])};
#pragma unroll
        for (int offset = 1; offset < 4; offset *= 2) {
          Best other;
          other.first = __shfl_xor_sync(0xffffffffu, mine.first, offset);
          other.second = __shfl_xor_sync(0xffffffffu, mine.second, offset);
          other.third = __shfl_xor_sync(0xffffffffu, mine.third, offset);
          other.code = __shfl_xor_sync(0xffffffffu, mine.code, offset);
          other.other = __shfl_xor_sync(0xffffffffu, mine.other, offset);
          merge(mine, other);
        }
        if (lane % 4 == 0)
          bests[word_warp * S::kRows + (row_warp * Tiles + m) * 16 + lane / 4 + 8 * h] =
              make_float4(mine.first, mine.second, mine.third, __int_as_float(mine.code | mine.other << 8));
      }
    __syncthreads();

    // The choice, 8 lanes a row.
    const StageBounds bounds = all_bounds[stage];
    const int64_t word0 = (g * stages + stage) * 256;
    int chosen[S::kTurns];
#pragma unroll 1
    for (int turn = 0; turn < S::kTurns; ++turn) {
      if (kTurnRows * turn + 4 * warp >= S::kRows) continue;
      const int row = kTurnRows * turn + 4 * warp + lane / kLanesOfRow;
      const bool real = row < count;
      const float* mine = residual + row * residual_stride;
      const Row known = state[row];
      Best top;
#pragma unroll
      for (int w = 0; w < WordWarps; ++w) {
        const float4 x = bests[w * S::kRows + row];
        const int codes = __float_as_int(x.w);
        const Best part{x.x, x.y, x.z, codes & 255, codes >> 8};
        if (w == 0) top = part;
        else merge(top, part);
      }
      const float inverse = reciprocal(known.scale), reach = known.norm * bounds.largest;
      const float bound = 1.02f * (bounds.largest * (known.error * inverse + known.off + accumulated * known.norm) +
                                   known.norm * bounds.high_off + 0x1p-17f * (fabsf(top.first) + 2 * reach));
      const bool close = real && !(top.first - top.second > 2 * bound);
      const bool many = real && !(top.first - top.third > 2 * bound);
      int code = top.code, rival = -1;  // rival: the higher of two codes that only float64 can tell apart
      const float norm = known.scale * known.norm;  // of r, at most: norm includes off
      if (__any_sync(0xffffffffu, close && !many)) {
        const int lower = min(top.code, top.other), upper = max(top.code, top.other);
        float sum = 0;
        for (int at = sub * 4; at < padded; at += 4 * kLanesOfRow) {
          const float4 r = *reinterpret_cast<const float4*>(mine + at);
          const float4 x = word_elements(book, word0 + lower, at), y = word_elements(book, word0 + upper, at);
          sum += r.x * (x.x - y.x) + r.y * (x.y - y.y) + r.z * (x.z - y.z) + r.w * (x.w - y.w);
        }
        const float h_lower = book.half_norms[word0 + lower], h_upper = book.half_norms[word0 + upper];
        const float lead = row_sum(sum) - (h_lower - h_upper);
        const float doubt = 1.02f * (2 * (known.error * bounds.largest + norm * bounds.low_off) +
                                     (padded / kLanesOfRow + 12) * 0x1p-23f * norm * bounds.largest +
                                     0x1p-22f * (h_lower + h_upper));
        if (close && !many) {
          code = lead > 0 ? lower : upper;
          if (!(fabsf(lead) > doubt)) code = lower, rival = upper;
        }
      }
      unsigned open = __ballot_sync(0xffffffffu, sub == 0 && (many || rival >= 0));
      while (open != 0) {
        const int leader = __ffs(open) - 1;
        open &= open - 1;
        const int at_row = __shfl_sync(0xffffffffu, row, leader), a = __shfl_sync(0xffffffffu, code, leader);
        const int other = __shfl_sync(0xffffffffu, rival, leader);
        const float error = __shfl_sync(0xffffffffu, known.error, leader);
        const float its_norm = __shfl_sync(0xffffffffu, norm, leader);
        __syncwarp();  // the stages before were written by another lane
        const Exact exact{layer, book, source, source.origin(layer, call, b, first_row + at_row), g,
                          source.target(layer, book.book, call, b, first_row + at_row, g)};
        const int better = other < 0 ? among_all(exact, stage, layout, residual + at_row * residual_stride, error, its_norm)
                                     : (exact.beats(stage, a, other) ? other : a);
        if (row == at_row) code = better;
      }
      if (real && sub == 0) source.target(layer, book.book, call, b, first_row + row, g)[stage] = static_cast<int8_t>(code);
#pragma unroll
      for (int same = 0; same < S::kTurns; ++same)  // not indexed by what is known only at run time: stays in registers
        if (same == turn) chosen[same] = code;
    }
    if (stage + 1 == stages) break;

    // The next residuals. The codewords of all turns are fetched at once: the latency is paid once.
    Halves fetched[S::kTurns][kFetched];
#pragma unroll
    for (int turn = 0; turn < S::kTurns; ++turn)
#pragma unroll
      for (int n = 0; n < kFetched; ++n) {
        const int at = (n * kLanesOfRow + sub) * 4;
        if (kTurnRows * turn + 4 * warp < S::kRows && at < padded)
          fetched[turn][n] = word_halves(book, word0 + chosen[turn], at);
      }
#pragma unroll
    for (int turn = 0; turn < S::kTurns; ++turn) {
      if (kTurnRows * turn + 4 * warp >= S::kRows) continue;
      const int row = kTurnRows * turn + 4 * warp + lane / kLanesOfRow;
      float* mine = residual + row * residual_stride;
      float squares = 0;
      const auto subtract = [&](int at, const Halves& halves) {
        float4 r = *reinterpret_cast<const float4*>(mine + at);
        const float4 w = whole(halves);
        r.x -= bounds.scale * w.x, r.y -= bounds.scale * w.y, r.z -= bounds.scale * w.z, r.w -= bounds.scale * w.w;
        *reinterpret_cast<float4*>(mine + at) = r;
        squares += r.x * r.x + r.y * r.y + r.z * r.z + r.w * r.w;
      };
#pragma unroll
      for (int n = 0; n < kFetched; ++n) {
        const int at = (n * kLanesOfRow + sub) * 4;
        if (at < padded) subtract(at, fetched[turn][n]);
      }
      for (int at = (kFetched * kLanesOfRow + sub) * 4; at < padded; at += 4 * kLanesOfRow)
        subtract(at, word_halves(book, word0 + chosen[turn], at));
      const float after = root_above(row_sum(squares));
      const float error = 1.0001f * (state[row].error + bounds.scale * (bounds.low_off + 0x1p-23f * bounds.largest) +
                                     0x1p-23f * after);
      __syncwarp();
      finish_row(layout, squares, all_bounds[stage + 1].scale, mine, high + row * high_stride, error, state + row);
    }
  }
  wait_async<0>();
}

template <int Tiles, int RowWarps, int WordWarps>
int launch(const gsrq_layer& layer, const gsrq_call& call, const EncodeBook& book, const EncodeSource& source,
           cudaStream_t stream) {
  using S = Shape<Tiles, RowWarps, WordWarps>;
  const int64_t batches = encode_batch(call, source);
  const int64_t tiles = (encode_rows(layer, call, source) + S::kRows - 1) / S::kRows;
  const int64_t grid = tiles * batches * book.book.groups;
  if (grid > INT32_MAX) return fail("encode: %lld blocks are too many", static_cast<long long>(grid));
  const size_t bytes = Layout{S::kRows, WordWarps, book.padded}.bytes();
  const auto kernel = encode_tiles<Tiles, RowWarps, WordWarps>;
  if (cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(bytes)) != cudaSuccess)
    return launched("encode_greedy");
  kernel<<<static_cast<unsigned>(grid), S::kThreads, bytes, stream>>>(layer, call, book, source, tiles, batches);
  return launched("encode_greedy");
}

}  // namespace

int encode_greedy(const gsrq_layer& layer, const gsrq_call& call, const EncodeBook& book, const EncodeSource& source,
                  cudaStream_t stream) {
  constexpr int64_t kFill = 128;  // thread blocks below which smaller tiles serve better
  int device = 0, most = 0;
  if (cudaGetDevice(&device) != cudaSuccess ||
      cudaDeviceGetAttribute(&most, cudaDevAttrMaxSharedMemoryPerBlockOptin, device) != cudaSuccess)
    return launched("encode_greedy");
  const int64_t rows = encode_rows(layer, call, source), others = encode_batch(call, source) * book.book.groups;
  const auto suits = [&](int tile, int word_warps, int least) {
    if (Layout{tile, word_warps, book.padded}.bytes() > static_cast<size_t>(most)) return false;
    return tile == least || (rows + tile - 1) / tile * others >= kFill;
  };
  if (suits(128, 4, 0)) return launch<2, 4, 4>(layer, call, book, source, stream);
  if (suits(64, 4, 0)) return launch<2, 2, 4>(layer, call, book, source, stream);
  if (suits(32, 8, 32)) return launch<2, 1, 8>(layer, call, book, source, stream);
  if (suits(16, 8, 16)) return launch<1, 1, 8>(layer, call, book, source, stream);
  return fail("encode: width %d needs %zu bytes of shared memory a block, the device has %d", book.book.width,
              Layout{16, 8, book.padded}.bytes(), most);
}

}  // namespace gsrq::cuda
