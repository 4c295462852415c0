// Beam search of residual codes in float64, so that the choice is that of exact arithmetic up to rounding 1e-16.
// With the metric M = A^T A, ||A (x - c)||^2 = ||A x||^2 - 2 c.(M x) + c.M c: codewords are used as stored and only
// the residual is multiplied by M. Cost a sub-vector and stage: 256 * width products, plus width^2 with a metric.
#if defined(__AVX512BW__)
constexpr int kEncodeVectors = 4;
#else
constexpr int kEncodeVectors = 2;
#endif
constexpr int kEncodeBlock = kEncodeVectors * kDoubles;  // codewords of a block

struct Candidate {
  double error;
  int32_t path, code;
};

// panel[block, element, codeword of the block]
static void pack_stage(const uint16_t* words, int64_t width, double* panel) {
  for (int64_t block = 0; block < kCodewords / kEncodeBlock; ++block)
    for (int64_t k = 0; k < kEncodeBlock; ++k) {
      const uint16_t* word = words + (block * kEncodeBlock + k) * width;
      double* out = panel + block * width * kEncodeBlock + k;
      for (int64_t e = 0; e < width; ++e) out[e * kEncodeBlock] = half_to_float(word[e]);
    }
}

// products[row, 256] of ROWS vectors with all codewords of a stage
template <int ROWS>
static void stage_products(const double* vectors, int64_t width, const double* panel, double* products) {
  for (int64_t block = 0; block < kCodewords / kEncodeBlock; ++block) {
    const double* words = panel + block * width * kEncodeBlock;
    vd acc[ROWS][kEncodeVectors];
    for (int m = 0; m < ROWS; ++m)
      for (int v = 0; v < kEncodeVectors; ++v) acc[m][v] = splat_d(0);
    for (int64_t e = 0; e < width; ++e) {
      vd word[kEncodeVectors];
      for (int v = 0; v < kEncodeVectors; ++v) word[v] = load<vd>(words + e * kEncodeBlock + v * kDoubles);
      for (int m = 0; m < ROWS; ++m) {
        const vd x = splat_d(vectors[m * width + e]);
        for (int v = 0; v < kEncodeVectors; ++v) acc[m][v] += x * word[v];
      }
    }
    for (int m = 0; m < ROWS; ++m)
      for (int v = 0; v < kEncodeVectors; ++v)
        store(products + m * kCodewords + block * kEncodeBlock + v * kDoubles, acc[m][v]);
  }
}

// out = metric x, the metric being symmetric
static inline void apply_metric(const double* metric, const double* x, int64_t width, double* out) {
  for (int64_t i = 0; i < width; ++i) out[i] = 0;
  for (int64_t j = 0; j < width; ++j) {
    const double* row = metric + j * width;
    int64_t i = 0;
    for (; i + kDoubles <= width; i += kDoubles) store(out + i, load<vd>(out + i) + load<vd>(row + i) * x[j]);
    for (; i < width; ++i) out[i] += row[i] * x[j];
  }
}

// Adds a path's 256 candidates to the sorted list of the best `keep`; ties keep the earlier one.
static inline void add_candidates(double error, int32_t path, const double* products, const double* norms,
                                  int64_t keep, int64_t* held, Candidate* best) {
  for (int32_t k = 0; k < kCodewords; ++k) {
    const double e = error - (2 * products[k] - norms[k]);
    if (*held == keep && !(e < best[keep - 1].error)) continue;
    int64_t at = *held < keep ? (*held)++ : keep - 1;
    for (; at > 0 && e < best[at - 1].error; --at) best[at] = best[at - 1];
    best[at] = {e, path, k};
  }
}

static void encode(const EncodeTask& task) {
  const int64_t width = task.words.width, stages = task.words.stages, most = task.rows * task.beam;
  const int64_t padded = round_up(most, 4) * width;
  double* panel = task.scratch;
  double* residual = panel + width * kCodewords;
  double* next_residual = residual + padded;
  double* target = next_residual + padded;
  double* error = target + padded;
  double* next_error = error + most;
  double* products = next_error + most;
  Candidate* best = reinterpret_cast<Candidate*>(products + 4 * kCodewords);
  uint8_t* path = reinterpret_cast<uint8_t*>(best + task.beam);
  uint8_t* next_path = path + most * stages;

  __builtin_memcpy(residual, task.vectors, static_cast<size_t>(task.rows * width) * sizeof(double));
  for (int64_t i = 0; i < task.rows; ++i) error[i] = 0;
  int64_t held = 1;  // paths of each row
  for (int64_t r = 0; r < stages; ++r) {
    const uint16_t* words = task.words.data + (task.group * stages + r) * kCodewords * width;
    const double* norms = task.norms + r * kCodewords;
    const int64_t keep = held * kCodewords < task.beam ? held * kCodewords : task.beam, paths = task.rows * held;
    pack_stage(words, width, panel);
    const double* vectors = residual;
    if (task.metric != nullptr) {
      for (int64_t p = 0; p < paths; ++p) apply_metric(task.metric, residual + p * width, width, target + p * width);
      vectors = target;
    }
    int64_t found = 0;
    for (int64_t p = 0; p < paths; ++p) {
      if (p % 4 == 0) {
        if (paths - p >= 4) {
          stage_products<4>(vectors + p * width, width, panel, products);
        } else {
          for (int64_t q = p; q < paths; ++q)
            stage_products<1>(vectors + q * width, width, panel, products + (q - p) * kCodewords);
        }
      }
      if (p % held == 0) found = 0;
      add_candidates(error[p], static_cast<int32_t>(p % held), products + p % 4 * kCodewords, norms, keep, &found,
                     best);
      if (p % held != held - 1) continue;
      const int64_t row = p / held;
      for (int64_t i = 0; i < keep; ++i) {
        const int64_t from = row * held + best[i].path, to = row * keep + i;
        const uint16_t* word = words + best[i].code * width;
        for (int64_t e = 0; e < width; ++e)
          next_residual[to * width + e] = residual[from * width + e] - half_to_float(word[e]);
        next_error[to] = best[i].error;
        for (int64_t s = 0; s < r; ++s) next_path[to * stages + s] = path[from * stages + s];
        next_path[to * stages + r] = static_cast<uint8_t>(best[i].code);
      }
    }
    double* swap = residual;
    residual = next_residual;
    next_residual = swap;
    swap = error;
    error = next_error;
    next_error = swap;
    uint8_t* swap_path = path;
    path = next_path;
    next_path = swap_path;
    held = keep;
  }
  for (int64_t row = 0; row < task.rows; ++row) {
    uint8_t* codes = task.codes + code_offset(task.code_rows, row);
    for (int64_t r = 0; r < stages; ++r) codes[r] = path[row * held * stages + r];
  }
}

static void norms(const NormsTask& task) {
  const int64_t width = task.words.width;
  double* word = task.scratch;
  double* image = word + width;
  for (int64_t k = 0; k < task.words.stages * kCodewords; ++k) {
    const uint16_t* half = task.words.data + (task.group * task.words.stages * kCodewords + k) * width;
    for (int64_t e = 0; e < width; ++e) word[e] = half_to_float(half[e]);
    const double* other = word;
    if (task.metric != nullptr) {
      apply_metric(task.metric, word, width, image);
      other = image;
    }
    double sum = 0;
    for (int64_t e = 0; e < width; ++e) sum += word[e] * other[e];
    task.norms[k] = sum;
  }
}
