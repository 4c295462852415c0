// The coded values' part of the output, without decoding a value: the weights of all query heads that share a
// sub-vector are added into bins [stage, code, lanes] with one vector addition a token and stage; then bins times
// codewords, a product of 256 x stages rows however many tokens there are.

template <int BLOCKS>
static void fill_bins(const ValueTask& task, float* bins) {
  const int64_t blocks = task.lanes / 4;  // of a head
  for (int64_t split = 0; split * task.split_size < task.count; ++split) {
    const int64_t begin = split * task.split_size;
    const int64_t end = begin + task.split_size < task.count ? begin + task.split_size : task.count;
    v4 factor[BLOCKS];
    const float* weights[BLOCKS];
    for (int b = 0; b < BLOCKS; ++b) {
      const int64_t head = b / blocks, lane = b % blocks * 4;
      factor[b] = load<v4>(task.factors + (head * task.splits + split) * task.lanes + lane);
      weights[b] = task.weights + head * task.weight_stride + lane;
    }
    for (int64_t t = begin; t < end; ++t) {
      const uint8_t* codes = task.codes + code_offset(task.code_rows, t);
      prefetch_codes(task.codes, task.code_rows, t);
      v4 w[BLOCKS];
      for (int b = 0; b < BLOCKS; ++b) w[b] = load<v4>(weights[b] + t * task.lanes) * factor[b];
      float* stage = bins;
      for (int64_t r = 0; r < task.stages; ++r, stage += kCodewords * 4 * BLOCKS) {
        float* bin = stage + codes[r] * 4 * BLOCKS;
        for (int b = 0; b < BLOCKS; ++b) store(bin + 4 * b, load<v4>(bin + 4 * b) + w[b]);
      }
    }
  }
}

static void fill_bins_any(const ValueTask& task, float* bins) {
  const int64_t all = task.heads * task.lanes;
  for (int64_t t = 0; t < task.count; ++t) {
    const uint8_t* codes = task.codes + code_offset(task.code_rows, t);
    const int64_t split = t / task.split_size;
    for (int64_t head = 0; head < task.heads; ++head) {
      for (int64_t l = 0; l < task.lanes; l += 4) {
        const v4 w = load<v4>(task.weights + head * task.weight_stride + t * task.lanes + l) *
                     load<v4>(task.factors + (head * task.splits + split) * task.lanes + l);
        for (int64_t r = 0; r < task.stages; ++r) {
          float* bin = bins + (r * kCodewords + codes[r]) * all + head * task.lanes + l;
          store(bin, load<v4>(bin) + w);
        }
      }
    }
  }
}

static void values(const ValueTask& task) {
  const int64_t all = task.heads * task.lanes, padded = round_up(task.width, kLanes);
  float* bins = task.scratch;
  float* rows = bins + task.stages * kCodewords * all;  // [32, padded] codewords in float32
  for (int64_t i = 0; i < task.stages * kCodewords * all; ++i) bins[i] = 0;
  switch (all / 4) {
    case 1: fill_bins<1>(task, bins); break;
    case 2: fill_bins<2>(task, bins); break;
    case 4: fill_bins<4>(task, bins); break;
    default: fill_bins_any(task, bins);
  }

  const int64_t size = task.heads * task.queries * padded;
  for (int64_t i = 0; i < size; ++i) task.out[i] = 0;
  for (int64_t i = 0; i < 32 * padded; ++i) rows[i] = 0;
  const uint16_t* words =
      task.words.data + (task.group * task.words.stages + task.first_stage) * kCodewords * task.words.width;
  // Up to 2 blocks of query heads take codewords straight from float16: widening twice is cheaper than a copy in
  // memory. More blocks, and widths with a tail, share a widened copy. The sums are in the same order either way.
  const bool direct = task.width % kLanes == 0 && task.queries / 4 + task.queries % 4 <= 2;
  for (int64_t head = 0; head < task.heads; ++head) {
    for (int64_t k = 0; k < task.stages * kCodewords; k += 32) {
      if (direct) {
        gemm(task.queries, padded, 32, bins + k * all + head * task.lanes, 1, all,
             words + k * task.words.width + head * task.width, task.words.width,
             task.out + head * task.queries * padded, padded);
        continue;
      }
      for (int64_t i = 0; i < 32; ++i)
        widen(words + (k + i) * task.words.width + head * task.width, rows + i * padded, task.width, Element::f16);
      gemm(task.queries, padded, 32, bins + k * all + head * task.lanes, 1, all, rows, padded,
           task.out + head * task.queries * padded, padded);
    }
  }
}
