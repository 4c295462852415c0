// Greedy encoding of sub-vectors of 64, 128 or 256 elements, compute capability 9.0 and later. The three levels of a choice are
// those of docs/cuda-encode.md.
//
// A block has one or three groups of four warps, each with 64 vectors of one codebook group for all stages. Vectors stay in
// registers, a stage's codewords in shared memory, two stages at a time; warps meet only where codewords come and go. Of 256
// elements two groups share 64 vectors, with half of the elements and of the codewords each, and there is room for one
// stage's codewords and a quarter.
#include <map>
#include <mutex>

#include "encode_tiled_choice.cuh"

namespace gsrq::cuda {
namespace {

using namespace tiled;

struct Sides {
  Side of[2];
  unsigned first;   // blocks of the first
  unsigned scored;  // kScored, which as a constant would take an instruction of its own for every score
};

#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 900

template <int Steps, int Groups>
__global__ void __launch_bounds__(128 * Groups * Form<Steps>::kShares, 1)
    encode_rows(const __grid_constant__ gsrq_layer layer, const __grid_constant__ gsrq_call call,
                const __grid_constant__ Sides sides) {
  using F = Form<Steps>;
  using R = Ring<Steps>;
  static_assert(!F::kWide || Groups == 1, "the whole block meets where warps that share rows do");
  constexpr int kStaged = (Groups == 1 ? kWarpRows : 8) * F::kStride;  // of a warp's rows on their way, or of two warps'
  static_assert(4 * Groups * kStaged * sizeof(float) <= (R::kPlaces - R::kFirst) * R::kBytes, "they go where codewords will");
  constexpr int kParts = 8 / F::kShares;  // of the codewords whose scores a warp looks at
  extern __shared__ __align__(128) char dynamic[];
  auto& memory = *reinterpret_cast<Memory<Steps, Groups>*>(dynamic);
  const int thread = threadIdx.x, warp = thread / 32, lane = thread % 32, quad = lane / 4, q = lane % 4;
  // Of rows, and of their elements and codewords. Warps that share rows have different schedulers, for what few rows need.
  const int share = F::kWide ? warp / 4 : 0, tile = F::kWide ? (warp + share) % 4 : warp;
  const bool second = blockIdx.x >= sides.first;
  const Side& side = sides.of[second ? 1 : 0];
  const unsigned block = second ? blockIdx.x - sides.first : blockIdx.x;
  const EncodeBook& book = side.book;
  const int64_t g = block / side.tiles, first_row = static_cast<int64_t>(block % side.tiles) * (64 * Groups);
  const int stages = book.book.stages;
  const unsigned scored = sides.scored;

  const auto start_load = [&](int piece) {  // by one thread
    const int stage = piece / R::kPieces, part = piece % R::kPieces, at = stage & 1;
    const uint32_t full = shared_address(memory.full + piece % R::kPlaces);
    const int64_t from = g * stages + stage;
    barrier_expect(full, R::kBytes + (part == 0 ? sizeof(memory.half_norms[0]) + sizeof(StageBounds) : 0));
    copy_bulk(memory.words[piece % R::kPlaces], book.high + from * 256 * F::kPadded + part * (R::kBytes / 2), R::kBytes, full);
    if (part != 0) return;
    copy_bulk(memory.half_norms[at], book.half_norms + from * 256, sizeof(memory.half_norms[0]), full);
    copy_bulk(memory.bounds + at, book.bounds + from, sizeof(StageBounds), full);
  };
  const auto wait_for = [&](int piece) {
    barrier_wait(shared_address(memory.full + piece % R::kPlaces), piece / R::kPlaces & 1);
  };
  if (thread == 0) {
    for (int i = 0; i < R::kPlaces; ++i) barrier_init(shared_address(memory.full + i), 1);
    asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
    memory.active = 0;
    fence_bulk();
#pragma unroll 1
    for (int i = 0; i < R::kFirst; ++i) start_load(i);
  }
  __syncthreads();
  if (thread < 64 * Groups) {
    memory.vectors[thread] = vector_of(layer, call, book, side.source, side.batch, side.most, first_row + thread, g);
    if (memory.vectors[thread].origin.from != nullptr) atomicOr(&memory.active, 1u << thread / 64);
  }
  __syncthreads();
  const unsigned active = memory.active;
  if (!F::kWide && thread == 0 && active != 0)  // before the next __syncthreads: no warp arrives earlier
    for (int i = 0; i < 2; ++i) barrier_init(shared_address(memory.empty + i), 128 * __popc(active));
  const Vector* vectors = memory.vectors + tile * kWarpRows;
  float r[2][F::kCores][2], squares[2], error[2], norm[2];
  if (active >> tile / 4 & 1)
    load_rows<Steps, Groups == 1>(layer, side, g, vectors,
                                  reinterpret_cast<float*>(memory.words[R::kFirst]) + tile * kStaged, tile, share, r, squares);
  fence_bulk();  // the staged vectors before the codewords that come to their place
  __syncthreads();
  if (thread == 0 && active != 0)
#pragma unroll 1
    for (int i = R::kFirst; i < R::kPlaces && i < R::kPieces * stages; ++i) start_load(i);
  if (thread == 0 && active == 0)  // nothing may come after the block's end
#pragma unroll 1
    for (int i = 0; i < R::kFirst; ++i) wait_for(i);
  if (!(active >> tile / 4 & 1)) return;

  const bool real0 = vectors[quad].origin.from != nullptr, real1 = vectors[quad + 8].origin.from != nullptr;
  const int real = (real0 ? 1 : 0) | (real1 ? 2 : 0);  // a bit a row
  // The first two lanes write a row's code each.
  int8_t* target = q < 2 && share == 0 ? vectors[quad + 8 * q].codes : nullptr;

  // Of a row, the sum of what all lanes give that have its elements. Warps that share rows tell each other what theirs give,
  // and meet, before they ask.
  const auto tell = [&](int kind, float (&x)[2]) {
    if constexpr (F::kWide) {
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        x[h] = quad_sum(x[h]);
        if (q == 0) memory.sums[kind][share][tile * kWarpRows + quad + 8 * h] = x[h];
      }
    }
  };
  const auto sum_of = [&](int kind, const float (&x)[2], int h) {
    if constexpr (F::kWide) return x[h] + memory.sums[kind][1 - share][tile * kWarpRows + quad + 8 * h];
    else return quad_sum(x[h]);
  };
  tell(0, squares);
  if constexpr (F::kWide) meet<Steps>(tile);
#pragma unroll
  for (int h = 0; h < 2; ++h) norm[h] = root_above(sum_of(0, squares, h)), error[h] = norm[h] * 0x1.1p-24f;

  // Fetches what comes to the places of a stage, once all have read it: by one lane, in the stage after, or when all have met.
  const bool loader = lane == 0 && warp == 4 * (__ffs(static_cast<int>(active)) - 1);
  const auto follow = [&](int stage) {
    const int next = R::kPieces * stage + R::kPlaces, last = min(next + R::kPieces, R::kPieces * stages);
    if (!loader || stage < 0 || next >= last) return;
    if constexpr (!F::kWide) barrier_wait(shared_address(memory.empty + (stage & 1)), stage >> 1 & 1);
    fence_bulk();
#pragma unroll 1
    for (int i = next; i < last; ++i) start_load(i);
  };

#pragma unroll 1
  for (int stage = 0;; ++stage) {
    const int at = stage & 1;
    const int first = R::kPieces * stage;  // piece of the stage
    wait_for(first);
    __syncwarp();
    const StageBounds bounds = memory.bounds[at];
    const float* half_norms = memory.half_norms[at];
    float slack[2];  // the scores' error but for what the last bits add
    Two best[2][2] = {};  // of set, of row: where warps share rows a set is what one of them looks at
    {
      float inverse[2], off[2];
#pragma unroll
      for (int h = 0; h < 2; ++h)
        inverse[h] = reciprocal(power_of_two_above(fmaxf(fmaxf(norm[h], bounds.scale * 0x1p-20f), 0x1p-100f)));
      // While a part's scores are looked at the next part's products are under way.
      float sum[2][4][4];
      uint32_t a[Steps][4];
      [[maybe_unused]] uint32_t described;  // the stage's codewords, where they are one chunk after another
      if constexpr (F::kWide) {
        char* rows = reinterpret_cast<char*>(memory.rows) + tile * (kWarpRows * 16);
        split<Steps>(r, inverse, rows + share * (F::kCores * kTiledWords * 16) + lane * 4, off);
        tell(1, off);
        meet<Steps>(tile);
        gather<Steps>(rows, a);
      } else {
        pack<Steps>(r, inverse, a);
        described = description(memory.words[at]);
      }
      const auto start = [&](int part) {
        if constexpr (F::kWide) {
          const int piece = first + part;
          wait_for(piece);
          __syncwarp();
          const __half* chunk = memory.words[piece % R::kPlaces];
          const int within = share * (kPartWords * 16);
          start_products<Steps>(sum[part % 2], a, chunk + within / 2, description(chunk) + (within >> 4));
        } else {
          const int within = part % 2 * (kPartWords * 16), bytes = part / 2 * F::kChunkBytes + within;  // a chunk
          start_products<Steps>(sum[part % 2], a, memory.words[at] + bytes / 2, described + (bytes >> 4));
        }
      };
      start(0);
      if constexpr (!F::kWide) left_over<Steps>(r, inverse, a, off);
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        const float rest = root_above(sum_of(1, off, h)), most = norm[h] * inverse[h] + rest;  // of float16(r / scale)
        slack[h] = bounds.largest * (error[h] * inverse[h] + rest + (Steps * 24 * 0x1p-23f + 0x1p-16f) * most) +
                   most * bounds.high_off;
      }
      Table tables[2];
#pragma unroll
      for (int part = 0; part < kParts; ++part) {
        if (part + 1 < kParts) {
          start(part + 1);
          finish_products<1>(sum[part % 2]);
        } else {
          finish_products<0>(sum[part % 2]);
        }
        float2 its_norms[4];
        const int from = (F::kWide ? 2 * part + share : part) * kPartWords;
#pragma unroll
        for (int n = 0; n < 4; ++n) its_norms[n] = *reinterpret_cast<const float2*>(half_norms + from + 8 * n + 2 * q);
#pragma unroll
        for (int h = 0; h < 2; ++h) {
          tables[h].add(sum[part % 2], its_norms, inverse[h], h, part % 4, scored);
          if (part % 4 == 3) best[part / 4][h] = tables[h].best(scored);
        }
      }
      if constexpr (F::kWide) {
        const int row_lane = tile * 32 + lane;
        memory.best[share][row_lane] = make_int4(best[0][0].first, best[0][0].second, best[0][1].first, best[0][1].second);
        meet<Steps>(tile);
#pragma unroll
        for (int set = 0; set < 2; ++set) {
          const int4 its = memory.best[set][row_lane];
          best[set][0] = {its.x, its.y}, best[set][1] = {its.z, its.w};
        }
      }
    }
    if constexpr (!F::kWide) follow(stage - 1);  // for the next stage; the other warps have had time to leave the last one
    __syncwarp();

    // The best of the row's lanes. Its low halves are on their way while the others are looked at.
    const Words<Steps> words{memory.words[F::kWide ? 0 : at], book.low + (g * stages + stage) * 256 * F::kPadded, q,
                             F::kWide ? first % R::kPlaces : 0, share};
    int code[2];
    float top[2];
    uint4 low[2][F::kCores / 4];
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const Two x = best[0][h], y = best[1][h];
      const int mine = max(x.first, y.first), its_top = quad_max(mine);
      top[h] = __int_as_float(its_top);
      const int leader = (lane & 28) + __ffs(static_cast<int>(of_quad(__ballot_sync(kAll, mine == its_top)))) - 1;
      code[h] = __shfl_sync(kAll, x.first >= y.first ? code_of<Steps>(x.first, 0, q) : code_of<Steps>(y.first, 1, q), leader);
#pragma unroll
      for (int j = 0; j < F::kCores / 4; ++j) low[h][j] = words.low_of(code[h], j);
    }
    unsigned near = 0, todo = 0;  // near: of the quad, for row 0 and 1; todo: the lane's rows that are not decided, a bit each
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const Two x = best[0][h], y = best[1][h];
      const float least = top[h] - 2.04f * (slack[h] + 0x1p-17f * fabsf(top[h]));
      const bool counts = (real >> h & 1) != 0, all = !(least > 0);  // all: integers may have misled
      const auto is_near = [&](int score) { return counts && (all || !(__int_as_float(score) < least)); };
      // Lanes whose best of either set is near the row's best, and those with a second one that is.
      const unsigned set0 = of_quad(__ballot_sync(kAll, is_near(x.first)));
      const unsigned set1 = of_quad(__ballot_sync(kAll, is_near(y.first)));
      const unsigned deep = of_quad(__ballot_sync(kAll, is_near(max(x.second, y.second))));
      near |= (set0 | set1 << 4 | deep << 8) << (12 * h);
      todo |= __popc(set0 | set1 << 4) > 1 || deep != 0 ? 1u << h : 0;
    }
    if (__any_sync(kAll, todo != 0)) {
      unsigned codes = 0;  // the lane's best of each set and row
#pragma unroll
      for (int i = 0; i < 4; ++i) codes |= static_cast<unsigned>(code_of<Steps>(best[i % 2][i / 2].first, i % 2, q)) << (8 * i);
#pragma unroll 1
      while (__any_sync(kAll, todo != 0)) {
        const bool h = todo == 2;  // the row that is looked at
        const auto of = [&](const auto& both) { return h ? both[1] : both[0]; };
        const unsigned its_near = h ? near >> 12 : near, mine0 = its_near & 15, mine1 = its_near >> 4 & 15;
        const int count = __popc(its_near & 255);
        const bool many = todo != 0 && (count > 2 || (its_near >> 8 & 15) != 0), pair = todo != 0 && !many;
        const float its_error = of(error), its_norm = of(norm);  // of r, at most
        int chosen = of(code), rival = -1;  // rival: the higher of two codes that only float64 can tell apart
        if (__any_sync(kAll, pair)) {
          float row[F::kCores][2];
#pragma unroll
          for (int n = 0; n < F::kCores; ++n)
#pragma unroll
            for (int b = 0; b < 2; ++b) row[n][b] = h ? r[1][n][b] : r[0][n][b];
          const unsigned its_codes = h ? codes >> 16 : codes;
          const int code0 = its_codes & 255, code1 = its_codes >> 8 & 255;
          const bool front0 = mine0 != 0, back0 = __popc(mine0) == 2;
          const int front = (__ffs(static_cast<int>(front0 ? mine0 : mine1)) - 1) & 3;
          const int back = (31 - __clz(static_cast<int>(back0 ? mine0 : mine1))) & 3, base = lane & 28;
          const int one = __shfl_sync(kAll, code0, base + front), two = __shfl_sync(kAll, code1, base + front);
          const int three = __shfl_sync(kAll, code0, base + back), four = __shfl_sync(kAll, code1, base + back);
          const int a = front0 ? one : two, b = back0 ? three : four, lower = min(a, b), upper = max(a, b);
          float lead = quad_sum(pair ? words.dot_difference(row, lower, upper) : 0.0f);
          if constexpr (F::kWide) {
            float(&sums)[2][64] = memory.sums[2];
            const int at_row = tile * kWarpRows + quad;  // of either row: one at a time
            lead = sum_of_both<Steps>(lead, sums[share] + at_row, sums[1 - share] + at_row, q == 0, tile);
          }
          lead -= half_norms[lower] - half_norms[upper];
          const float doubt = 1.02f * (2 * (its_error * bounds.largest + its_norm * bounds.low_off) +
                                       (Steps + 8) * 0x1p-23f * its_norm * bounds.largest +
                                       0x1p-22f * (fabsf(half_norms[lower]) + fabsf(half_norms[upper])));
          if (pair) {
            chosen = lead > 0 ? lower : upper;
            if (!(fabsf(lead) > doubt)) chosen = lower, rival = upper;
          }
        }
        unsigned open = __ballot_sync(kAll, q == 0 && (many || rival >= 0));
#pragma unroll 1
        for (; open != 0; open &= open - 1) {
          const int leader = __ffs(static_cast<int>(open)) - 1;
          const bool its_h = __shfl_sync(kAll, h ? 1 : 0, leader) != 0;
          const int index = leader / 4 + (its_h ? 8 : 0);
          float* scores = memory.scores[4 * share + tile];
          __syncwarp();  // the codes of the stages before, too, were written by other lanes
#pragma unroll
          for (int i = 0; i < 8; ++i) scores[lane + 32 * i] = -INFINITY;
          __syncwarp();
          const int other = __shfl_sync(kAll, rival, leader);
          float least = 0;
          if (other < 0) {
            float its[F::kCores][2];
#pragma unroll
            for (int n = 0; n < F::kCores; ++n)
#pragma unroll
              for (int b = 0; b < 2; ++b) its[n][b] = __shfl_sync(kAll, its_h ? r[1][n][b] : r[0][n][b], leader + q);
            least = score_near<Steps>(words, its, half_norms, bounds, __shfl_sync(kAll, its_error, leader),
                                      __shfl_sync(kAll, its_norm, leader), __shfl_sync(kAll, its_near, leader) & 255, scores,
                                      memory.scores[F::kWide ? 4 * (1 - share) + tile : tile], tile);
          } else {
            if (lane == leader) scores[chosen] = scores[rival] = 0;
            __syncwarp();
          }
          // Registers are short: the vectors step aside where a function is called, which is rare.
          volatile float aside[2][F::kCores][2];
#pragma unroll
          for (int n = 0; n < 4 * F::kCores; ++n) aside[n % 2][n / 4][n / 2 % 2] = r[n % 2][n / 4][n / 2 % 2];
          const Exact exact{layer, book, side.source, vectors[index].origin, g, vectors[index].codes};
          const int better = best_of<Steps>(exact, stage, scores, least, memory.products[tile], tile, share);
          if (quad == leader / 4) chosen = better;
#pragma unroll
          for (int n = 0; n < 4 * F::kCores; ++n) r[n % 2][n / 4][n / 2 % 2] = aside[n % 2][n / 4][n / 2 % 2];
        }
        if (todo != 0 && !h) code[0] = chosen;
        if (todo != 0 && h) code[1] = chosen;
        todo &= todo - 1;
      }
#pragma unroll
      for (int h = 0; h < 2; ++h)
#pragma unroll
        for (int j = 0; j < F::kCores / 4; ++j) low[h][j] = words.low_of(code[h], j);
    }
    if (target != nullptr) target[stage] = static_cast<int8_t>(q == 0 ? code[0] : code[1]);
    if (stage + 1 == stages) break;

    // The next residuals.
    const auto next_norm = [&](int h) {
      norm[h] = root_above(sum_of(0, squares, h));
      error[h] = 1.0001f * (error[h] + bounds.scale * (bounds.low_off + 0x1p-33f * bounds.largest) + 0x1p-23f * norm[h]);
    };
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const char* high = words.high_of(code[h]);
      squares[h] = 0;
#pragma unroll
      for (int n = 0; n < F::kCores; ++n) {
        const float2 x = words.high_pair(high, n), y = words.low_pair(low[h][n / 4], n % 4);
        float(&mine)[2] = r[h][n];
        mine[0] -= bounds.scale * x.x, mine[1] -= bounds.scale * x.y;
        mine[0] -= bounds.scale * y.x, mine[1] -= bounds.scale * y.y;
        squares[h] = fmaf(mine[1], mine[1], fmaf(mine[0], mine[0], squares[h]));
      }
      if constexpr (!F::kWide) next_norm(h);
    }
    if constexpr (F::kWide) {
      tell(0, squares);
      // Twice: racecheck learns late of who has met, and takes the copies for races with the reads before where all meet once.
      __syncthreads();
      __syncthreads();
      follow(stage);
      next_norm(0), next_norm(1);
    }
    // All lanes, though one a warp would do: racecheck does not see that the others' reads come before its arrival.
    if (!F::kWide && first + R::kPlaces < R::kPieces * stages) barrier_arrive(shared_address(memory.empty + at));
  }
}

#else

template <int Steps, int Groups>
__global__ void encode_rows(const __grid_constant__ gsrq_layer, const __grid_constant__ gsrq_call,
                            const __grid_constant__ Sides) {}  // never launched

#endif

template <int Steps, int Groups>
bool ready() {
  const auto kernel = encode_rows<Steps, Groups>;
  cudaFuncAttributes attributes;
  return cudaFuncGetAttributes(&attributes, kernel) == cudaSuccess && attributes.ptxVersion >= 90 &&
         cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, sizeof(Memory<Steps, Groups>)) ==
             cudaSuccess;
}

// Multiprocessors of the current device, 0 where it cannot run the kernel; asked once a device.
int processors(int padded) {
  static std::mutex mutex;
  static std::map<int, int> known;
  int device = 0;
  if (padded != 64 && padded != 128 && padded != 256) return 0;
  if (cudaGetDevice(&device) != cudaSuccess) {
    cudaGetLastError();
    return 0;
  }
  const std::lock_guard<std::mutex> lock(mutex);
  const auto found = known.find(device);
  if (found != known.end()) return found->second;
  int count = 0;
  const bool can = ready<4, 1>() && ready<4, 3>() && ready<8, 1>() && ready<8, 3>() && ready<16, 1>() &&
                   cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, device) == cudaSuccess;
  cudaGetLastError();
  return known[device] = can ? count : 0;
}

template <int Steps, int Groups>
int launch(const gsrq_layer& layer, const gsrq_call& call, Sides& sides, cudaStream_t stream) {
  int64_t grid[2] = {0, 0};
  for (int i = 0; i < 2; ++i) {
    Side& side = sides.of[i];
    const int64_t tiles = (side.batch * side.most + 64 * Groups - 1) / (64 * Groups);
    grid[i] = tiles * side.book.book.groups;
    if (grid[0] + grid[1] > INT32_MAX)
      return fail("encode: %lld blocks are too many", static_cast<long long>(grid[0] + grid[1]));
    side.tiles = static_cast<unsigned>(tiles);
  }
  sides.first = static_cast<unsigned>(grid[0]);
  constexpr int kThreads = 128 * Groups * Form<Steps>::kShares;
  encode_rows<Steps, Groups><<<static_cast<unsigned>(grid[0] + grid[1]), kThreads, sizeof(Memory<Steps, Groups>), stream>>>(
      layer, call, sides);
  return launched("encode_tiled");
}

}  // namespace

bool encode_tiled_serves(int32_t padded) { return processors(padded) > 0; }

int encode_tiled(const gsrq_layer& layer, const gsrq_call& call, const EncodeBook* const* books,
                 const EncodeSource* const* sources, int count, cudaStream_t stream) {
  Sides sides{};
  sides.scored = kScored;
  int64_t small = 0;  // blocks of one group of warps
  const int padded = books[0]->padded;
  const bool swap = count == 2 && books[1]->book.stages > books[0]->book.stages;  // the longer work first
  for (int i = 0; i < count; ++i) {
    Side& side = sides.of[swap ? 1 - i : i];
    side.book = *books[i], side.source = *sources[i];
    side.batch = encode_batch(call, *sources[i]), side.most = ::gsrq::cuda::encode_rows(layer, call, *sources[i]);
    side.loads = loads_of(layer, call, side.source, side.book.book.width);
    small += (side.batch * side.most + 63) / 64 * side.book.book.groups;
  }
  if (padded == 256) return launch<16, 1>(layer, call, sides, stream);
  const bool few = small <= processors(padded);
  if (padded == 64) return few ? launch<4, 1>(layer, call, sides, stream) : launch<4, 3>(layer, call, sides, stream);
  return few ? launch<8, 1>(layer, call, sides, stream) : launch<8, 3>(layer, call, sides, stream);
}

}  // namespace gsrq::cuda
