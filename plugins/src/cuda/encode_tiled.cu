// Greedy encoding of sub-vectors of 64 or 128 elements, compute capability 9.0 and later. The three levels of a choice are
// those of docs/cuda-encode.md.
//
// A block has one or three groups of four warps, each with 64 vectors of one codebook group for all stages. Vectors stay in
// registers, a stage's codewords in shared memory, two stages at a time; warps meet only where codewords come and go.
#include <map>
#include <mutex>

#include "encode_tiled.cuh"

namespace gsrq::cuda {
namespace {

using namespace tiled;

constexpr unsigned kScored = ~31u;  // bits of a score that are not its candidate's number

struct Sides {
  Side of[2];
  unsigned first;  // blocks of the first
  unsigned scored;  // kScored, which as a constant would take an instruction of its own for every score
};

#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 900

// Scores are compared as integers, which order as the floats do where these are positive.
__device__ inline int max3(int a, int b, int c) { return max(max(a, b), c); }

// A lane's best two of the 32 candidates of a set: codes 128 set + 8 (id / 2) + 2 q + id % 2, id in the low five bits of the
// first. Of the second only the value is known.
struct Two {
  int first, second;
};

__device__ inline int code_of(int x, int set, int q) {
  const int id = x & 31;
  return 128 * set + id / 2 * 8 + 2 * q + id % 2;
}

// value & scored | number
__device__ inline int numbered(int value, unsigned scored, int number) {
  int out;
  asm("lop3.b32 %0, %1, %2, %3, 0xea;" : "=r"(out) : "r"(value), "r"(scored), "r"(number));
  return out;
}

// A set's candidates stand in a table of 8 rows and 4 columns. What is best is best of its row and of its column; what is
// second best is best of another row or of another column. So two maxima a score, of rows and of columns, do.
struct Table {
  int column[4];
  Two row;  // the best two of the rows so far

  // The scores <h, w> - half norm / scale of a part, the `part`-th of its set, for the lane's row h of vectors: two rows.
  __device__ void add(const float (&sum)[4][4], const float2 (&norm)[4], float inverse, int h, int part, unsigned scored) {
    int x[4][2];
#pragma unroll
    for (int n = 0; n < 4; ++n)
#pragma unroll
      for (int j = 0; j < 2; ++j)
        x[n][j] = __float_as_int(fmaf(j == 0 ? norm[n].x : norm[n].y, -inverse, sum[n][2 * h + j]));
#pragma unroll
    for (int c = 0; c < 4; ++c) {
      const int one = x[c / 2][c % 2], two = x[c / 2 + 2][c % 2];
      column[c] = part == 0 ? max(one, two) : max3(column[c], one, two);
    }
    int best[2];
#pragma unroll
    for (int k = 0; k < 2; ++k)
      best[k] = numbered(max(max3(x[2 * k][0], x[2 * k][1], x[2 * k + 1][0]), x[2 * k + 1][1]), scored, 8 * part + 4 * k);
    const int upper = max(best[0], best[1]), lower = min(best[0], best[1]);
    row.second = part == 0 ? lower : max3(row.second, lower, min(row.first, upper));
    row.first = part == 0 ? upper : max(row.first, upper);
  }

  __device__ Two best(unsigned scored) const {
    int c[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) c[i] = numbered(column[i], scored, i);
    const int front = max(c[0], c[1]), back = max(c[2], c[3]);
    const int second = max3(min(c[0], c[1]), min(c[2], c[3]), min(front, back));
    return {row.first | (max(front, back) & 3), max(row.second, second)};
  }
};

__device__ inline unsigned of_quad(unsigned ballot) { return ballot >> (threadIdx.x & 28) & 15; }

// Of one row, the scores in float32 of the codewords of those lanes and sets that have one near the best, 8 at once; from
// which score on they are close. near: the row's lanes of set 0, then of set 1. r: the row's elements of this lane.
template <int Steps>
__device__ inline float score_near(const Words<Steps>& words, const float (&r)[2 * Steps][2], const float* half_norms,
                                   const StageBounds& bounds, float error, float norm, unsigned near, float* scores) {
  const int lane = threadIdx.x % 32, quad = lane / 4;
#pragma unroll 1
  for (unsigned left = near; left != 0; left &= left - 1) {
    const int at = __ffs(static_cast<int>(left)) - 1;  // lane + 4 set
#pragma unroll 2
    for (int t = 0; t < 16; t += 4) {
      const int word = at / 4 * 128 + (t + quad / 2) * 8 + at % 4 * 2 + quad % 2;
      const float product = quad_sum(words.dot(r, word));
      if (lane % 4 == 0) scores[word] = product - half_norms[word];
    }
  }
  __syncwarp();
  float best = -INFINITY;
#pragma unroll
  for (int i = 0; i < 8; ++i) best = fmaxf(best, scores[lane + 32 * i]);
  best = warp_max(best);
  // A close candidate's half norm is its product less its score.
  const float reach = norm * bounds.largest;
  const float bound = 1.02f * (error * bounds.largest + norm * bounds.low_off + (Steps + 8) * 0x1p-23f * reach +
                               0x1p-22f * (fabsf(best) + reach));
  return best - 2 * bound;
}

// The best, in float64, of the codewords whose scores are not below `least`.
__device__ inline int best_of(const Exact& exact, int stage, const float* scores, float least) {
  int chosen = -1;
#pragma unroll 1
  for (int i = 0; i < 8; ++i) {
    unsigned close = __ballot_sync(kAll, !(scores[threadIdx.x % 32 + 32 * i] < least));
#pragma unroll 1
    for (; close != 0; close &= close - 1) {
      const int code = 32 * i + __ffs(static_cast<int>(close)) - 1;
      if (chosen < 0 || exact.beats(stage, chosen, code)) chosen = code;
    }
  }
  return chosen;
}

template <int Steps, int Groups>
__global__ void __launch_bounds__(128 * Groups, 1)
    encode_rows(const __grid_constant__ gsrq_layer layer, const __grid_constant__ gsrq_call call,
                const __grid_constant__ Sides sides) {
  using F = Form<Steps>;
  extern __shared__ __align__(128) char dynamic[];
  auto& memory = *reinterpret_cast<Memory<Steps, Groups>*>(dynamic);
  const int thread = threadIdx.x, warp = thread / 32, lane = thread % 32, quad = lane / 4, q = lane % 4;
  const bool second = blockIdx.x >= sides.first;
  const Side& side = sides.of[second ? 1 : 0];
  const unsigned block = second ? blockIdx.x - sides.first : blockIdx.x;
  const EncodeBook& book = side.book;
  const int64_t g = block / side.tiles, first_row = static_cast<int64_t>(block % side.tiles) * (64 * Groups);
  const int stages = book.book.stages;
  const unsigned scored = sides.scored;

  const auto start_load = [&](int stage) {  // by one thread
    const int at = stage & 1;
    const uint32_t full = shared_address(memory.full + at);
    const int64_t from = g * stages + stage;
    barrier_expect(full, F::kStageBytes + sizeof(memory.half_norms[0]) + sizeof(StageBounds));
    copy_bulk(memory.words[at], book.high + from * 256 * F::kPadded, F::kStageBytes, full);
    copy_bulk(memory.half_norms[at], book.half_norms + from * 256, sizeof(memory.half_norms[0]), full);
    copy_bulk(memory.bounds + at, book.bounds + from, sizeof(StageBounds), full);
  };
  if (thread == 0) {
    barrier_init(shared_address(memory.full), 1), barrier_init(shared_address(memory.full + 1), 1);
    asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
    memory.active = 0;
    fence_bulk();
    start_load(0);
  }
  __syncthreads();
  if (thread < 64 * Groups) {
    memory.origins[thread] = origin_of(layer, call, book, side.source, side.batch, side.most, first_row + thread, g);
    if (memory.origins[thread].from != nullptr) atomicOr(&memory.active, 1u << thread / 64);
  }
  __syncthreads();
  const unsigned active = memory.active;
  if (thread == 0 && active != 0)  // before the next __syncthreads: no warp arrives earlier
    for (int i = 0; i < 2; ++i) barrier_init(shared_address(memory.empty + i), 4 * __popc(active));
  const Origin* origins = memory.origins + warp * kWarpRows;
  float r[2][F::kCores][2], squares[2], error[2], norm[2];
  if (active >> warp / 4 & 1)
    load_rows<Steps>(layer, call, side, first_row + warp * kWarpRows, g, origins,
                     reinterpret_cast<float*>(memory.words[1]) + warp * 8 * F::kStride, r, squares);
  fence_bulk();  // the staged vectors before stage 1
  __syncthreads();
  if (thread == 0 && active != 0 && stages > 1) start_load(1);
  if (active == 0 && thread == 0) barrier_wait(shared_address(memory.full), 0);  // nothing may come after the block's end
  if (!(active >> warp / 4 & 1)) return;

  const int real = (origins[quad].from != nullptr ? 1 : 0) | (origins[quad + 8].from != nullptr ? 2 : 0);  // a bit a row
  int8_t* target = q < 2 ? origins[quad + 8 * q].target : nullptr;  // the first two lanes write a row's code each
#pragma unroll
  for (int h = 0; h < 2; ++h) norm[h] = root_above(quad_sum(squares[h])), error[h] = norm[h] * 0x1.1p-24f;

#pragma unroll 1
  for (int stage = 0;; ++stage) {
    const int at = stage & 1;
    barrier_wait(shared_address(memory.full + at), stage >> 1 & 1);
    __syncwarp();
    const StageBounds bounds = memory.bounds[at];
    const float* half_norms = memory.half_norms[at];
    float slack[2];  // the scores' error but for what the last bits add
    Two best[2][2] = {};  // of set, of row
    {
      uint32_t a[Steps][4];
      float inverse[2], off[2];
#pragma unroll
      for (int h = 0; h < 2; ++h)
        inverse[h] = reciprocal(power_of_two_above(fmaxf(fmaxf(norm[h], bounds.scale * 0x1p-20f), 0x1p-100f)));
      pack<Steps>(r, inverse, a);
      // While a part's scores are looked at the next part's products are under way.
      float sum[2][4][4];
      const uint32_t described = description(memory.words[at]);
      start_products<Steps>(sum[0], a, memory.words[at], described, 0);
      left_over<Steps>(r, inverse, a, off);
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        const float rest = root_above(quad_sum(off[h])), most = norm[h] * inverse[h] + rest;  // of float16(r / scale)
        slack[h] = bounds.largest * (error[h] * inverse[h] + rest + (Steps * 24 * 0x1p-23f + 0x1p-16f) * most) +
                   most * bounds.high_off;
      }
      Table tables[2];
#pragma unroll
      for (int part = 0; part < 8; ++part) {
        if (part < 7) {
          start_products<Steps>(sum[(part + 1) % 2], a, memory.words[at], described, part + 1);
          finish_products<1>(sum[part % 2]);
        } else {
          finish_products<0>(sum[part % 2]);
        }
        float2 its_norms[4];
#pragma unroll
        for (int n = 0; n < 4; ++n)
          its_norms[n] = *reinterpret_cast<const float2*>(half_norms + part * kPartWords + 8 * n + 2 * q);
#pragma unroll
        for (int h = 0; h < 2; ++h) {
          tables[h].add(sum[part % 2], its_norms, inverse[h], h, part % 4, scored);
          if (part % 4 == 3) best[part / 4][h] = tables[h].best(scored);
        }
      }
    }

    // The best of the row's lanes. Its low halves are on their way while the others are looked at.
    const Words<Steps> words{memory.words[at], book.low + (g * stages + stage) * 256 * F::kPadded, q};
    int code[2];
    float top[2];
    uint4 low[2][Steps / 2];
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const Two x = best[0][h], y = best[1][h];
      const int mine = max(x.first, y.first), its_top = quad_max(mine);
      top[h] = __int_as_float(its_top);
      const int leader = (lane & 28) + __ffs(static_cast<int>(of_quad(__ballot_sync(kAll, mine == its_top)))) - 1;
      code[h] = __shfl_sync(kAll, x.first >= y.first ? code_of(x.first, 0, q) : code_of(y.first, 1, q), leader);
#pragma unroll
      for (int j = 0; j < Steps / 2; ++j) low[h][j] = words.low_of(code[h], j);
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
      for (int i = 0; i < 4; ++i) codes |= static_cast<unsigned>(code_of(best[i % 2][i / 2].first, i % 2, q)) << (8 * i);
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
          const float lead = quad_sum(pair ? words.dot_difference(row, lower, upper) : 0.0f) -
                             (half_norms[lower] - half_norms[upper]);
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
          float* scores = memory.scores[warp];
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
                                      __shfl_sync(kAll, its_norm, leader), __shfl_sync(kAll, its_near, leader) & 255, scores);
          } else {
            if (lane == leader) scores[chosen] = scores[rival] = 0;
            __syncwarp();
          }
          // Registers are short: the vectors step aside where a function is called, which is rare.
          volatile float aside[2][F::kCores][2];
#pragma unroll
          for (int n = 0; n < 4 * F::kCores; ++n) aside[n % 2][n / 4][n / 2 % 2] = r[n % 2][n / 4][n / 2 % 2];
          const int64_t flat = first_row + warp * kWarpRows + index, at_batch = flat / side.most;
          int64_t start;
          side.source.rows(layer, call, at_batch, &start);
          const Exact exact{layer, call, book, side.source, at_batch, start + flat % side.most, g, origins[index].target};
          const int better = best_of(exact, stage, scores, least);
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
        for (int j = 0; j < Steps / 2; ++j) low[h][j] = words.low_of(code[h], j);
    }
    if (target != nullptr) target[stage] = static_cast<int8_t>(q == 0 ? code[0] : code[1]);
    if (stage + 1 == stages) break;

    // The next residuals.
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
      norm[h] = root_above(quad_sum(squares[h]));
      error[h] = 1.0001f * (error[h] + bounds.scale * (bounds.low_off + 0x1p-33f * bounds.largest) + 0x1p-23f * norm[h]);
    }
    __syncwarp();
    // Whoever is last to read a stage's codewords fetches those of the next but one.
    if (lane == 0 && stage + 2 < stages && barrier_arrive(shared_address(memory.empty + at))) {
      barrier_wait(shared_address(memory.empty + at), stage >> 1 & 1);  // over already: it orders the others' reads before
      fence_bulk();
      start_load(stage + 2);
    }
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
  if (padded != 64 && padded != 128) return 0;
  if (cudaGetDevice(&device) != cudaSuccess) {
    cudaGetLastError();
    return 0;
  }
  const std::lock_guard<std::mutex> lock(mutex);
  const auto found = known.find(device);
  if (found != known.end()) return found->second;
  int count = 0;
  const bool can = ready<4, 1>() && ready<4, 3>() && ready<8, 1>() && ready<8, 3>() &&
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
  encode_rows<Steps, Groups><<<static_cast<unsigned>(grid[0] + grid[1]), 128 * Groups, sizeof(Memory<Steps, Groups>), stream>>>(
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
  const bool few = small <= processors(padded);
  if (padded == 64) return few ? launch<4, 1>(layer, call, sides, stream) : launch<4, 3>(layer, call, sides, stream);
  return few ? launch<8, 1>(layer, call, sides, stream) : launch<8, 3>(layer, call, sides, stream);
}

}  // namespace gsrq::cuda
