// Scores of coded keys in the rotated frame. A key is decode(codes) + RoPE_t(m), so query . key is the sum of a table
// entry a stage, query x codeword, and query . RoPE_t(m), which depends on the position alone. Cost a token: `stages`
// loads and additions of all query heads at once, and 2 multiplications a RoPE pair and query head for the second term.

constexpr int64_t kPanel = 64;  // codewords of a panel

typedef float v8 __attribute__((vector_size(32)));
typedef float v16 __attribute__((vector_size(64)));

// One stage's part of the table: 256 codewords with all query heads.
static void build_table(const TableTask& task) {
  float products[4 * kPanel];
  for (int64_t block = 0; block < kCodewords / kPanel; ++block) {
    const uint16_t* panel = task.panels + block * task.slices * 2 * kLanes * kPanel;
    for (int64_t l = 0; l < task.lanes; l += 4) {
      for (int64_t i = 0; i < 4 * kPanel; ++i) products[i] = 0;
      for (int64_t s = 0; s < task.slices; ++s)
        gemm(4, kPanel, 2 * kLanes, task.query + (s * task.lanes + l) * 2 * kLanes, 2 * kLanes, 1,
             panel + s * 2 * kLanes * kPanel, kPanel, products, kPanel);
      float* out = task.table + block * kPanel * task.lanes + l;
      for (int64_t k = 0; k < kPanel; ++k, out += task.lanes)
        for (int64_t i = 0; i < 4; ++i) out[i] = products[i * kPanel + k];
    }
  }
}

// A slice's table rows [32][2, 16] as [2 * 16][32], the offsets side by side.
static inline void turn_over(const float* rows, int64_t n, float* out) {
  for (int64_t i = 0; i < 2 * kLanes; ++i)
    for (int64_t o = 0; o < kChunk; ++o) out[i * kChunk + o] = o < n ? rows[o * 2 * kLanes + i] : 0;
}

// query . RoPE_t(m) of all tokens and query heads, into the weights. A RoPE pair with query (a, b) and center (u, v) gives
// cos_t (a u + b v) + sin_t (b u - a v): a product of table rows with two coefficients, turned by a chunk's first row
// like the query in score.hpp.
static void center_scores(const LookupTask& task) {
  constexpr int64_t row_size = 2 * kLanes, chunk_size = kChunk * row_size;
  const float factor = table_factor(task.rope);
  const int64_t lanes = task.lanes, slices = task.slices;
  const int64_t offsets = task.count < kChunk ? task.count : kChunk;
  float* turns = task.scratch;                  // [slices, 32, 2, 16]
  float* over = turns + slices * chunk_size;    // [slices, 2 * 16, 32]: turns by element
  float* rows = over + slices * chunk_size;     // [32, 2, 16]
  float* other = rows + chunk_size;             // [2 * 16, 32]
  float* pairs = other + chunk_size;            // [slices, lanes, 2, 16]: the coefficients
  float* turned = pairs + slices * lanes * row_size;  // [lanes, 2, 16]
  float* scores = turned + lanes * row_size;    // [lanes, 32]
  for (int64_t s = 0; s < slices; ++s) {
    if (factor > 0) {
      for (int64_t o = 0; o < offsets; ++o)
        table_row(task.rope, s, o, 1 / factor, turns + s * chunk_size + o * row_size);
      turn_over(turns + s * chunk_size, offsets, over + s * chunk_size);
    }
    const float* center = task.center + s * row_size;
    for (int64_t l = 0; l < lanes; ++l) {
      const float* q = task.query + (s * lanes + l) * row_size;
      float* out = pairs + (s * lanes + l) * row_size;
      for (int64_t i = 0; i < kLanes; ++i) {
        out[i] = q[i] * center[i] + q[kLanes + i] * center[kLanes + i];
        out[kLanes + i] = q[kLanes + i] * center[i] - q[i] * center[kLanes + i];
      }
    }
  }

  for (int64_t begin = 0; begin < task.count; begin += kChunk) {
    const int64_t n = task.count - begin < kChunk ? task.count - begin : kChunk, first = task.first_token + begin;
    for (int64_t i = 0; i < lanes * kChunk; ++i) scores[i] = 0;
    for (int64_t s = 0; s < slices; ++s) {
      float base[row_size];
      table_row(task.rope, s, first, 1, base);
      const float* by_element = over + s * chunk_size;
      if (!(factor > 0 && rows_compose(task.rope, s, first, n - 1, factor, base,
                                       turns + s * chunk_size + (n - 1) * row_size))) {
        for (int64_t o = 0; o < n; ++o) table_row(task.rope, s, first + o, 1, rows + o * row_size);
        turn_over(rows, n, other);
        by_element = other;
        for (int i = 0; i < kLanes; ++i) {
          base[i] = 1;
          base[kLanes + i] = 0;
        }
      }
      for (int64_t l = 0; l < lanes; ++l) {
        const float* p = pairs + (s * lanes + l) * row_size;
        float* t = turned + l * row_size;
        for (int64_t at = 0; at < kLanes; at += kWidth) {
          const vf a = load<vf>(p + at), b = load<vf>(p + kLanes + at);
          const vf c = load<vf>(base + at), d = load<vf>(base + kLanes + at);
          store(t + at, a * c + b * d);
          store(t + kLanes + at, b * c - a * d);
        }
      }
      gemm(lanes, kChunk, row_size, turned, row_size, 1, by_element, kChunk, scores, kChunk);
    }
    float* out = task.weights + begin * lanes;
    for (int64_t t = 0; t < n; ++t)
      for (int64_t l = 0; l < lanes; ++l) out[t * lanes + l] = scores[l * kChunk + t];
  }
}

// Adds the tokens' table entries; V holds all query heads, or 4 of them at a time.
template <class V>
static inline void add_entries(const LookupTask& task, int64_t lane) {
  const int64_t lanes = task.lanes, stage = kCodewords * lanes, stages = task.stages;
  const int64_t stride = task.code_rows.stride;
  const float* table = task.table + lane;
  float* w = task.weights + lane;
  const auto one = [&](int64_t t) {
    const uint8_t* codes = task.codes + code_offset(task.code_rows, t);
    V sum = load<V>(w + t * lanes);
    for (int64_t r = 0; r < stages; ++r) sum += load<V>(table + r * stage + codes[r] * lanes);
    store(w + t * lanes, sum);
  };
  int64_t t = 0;
  for (; t < task.count && (task.code_rows.first + t) % 4 != 0; ++t) one(t);  // 4 rows are then of one tile, a stride apart
  for (; t + 4 <= task.count; t += 4) {
    const uint8_t* c0 = task.codes + code_offset(task.code_rows, t);
    const uint8_t *c1 = c0 + stride, *c2 = c1 + stride, *c3 = c2 + stride;
    prefetch_codes(task.codes, task.code_rows, t);
    V s0 = load<V>(w + t * lanes), s1 = load<V>(w + (t + 1) * lanes);
    V s2 = load<V>(w + (t + 2) * lanes), s3 = load<V>(w + (t + 3) * lanes);
    const float* entries = table;
    for (int64_t r = 0; r < stages; ++r, entries += stage) {
      s0 += load<V>(entries + c0[r] * lanes);
      s1 += load<V>(entries + c1[r] * lanes);
      s2 += load<V>(entries + c2[r] * lanes);
      s3 += load<V>(entries + c3[r] * lanes);
    }
    store(w + t * lanes, s0);
    store(w + (t + 1) * lanes, s1);
    store(w + (t + 2) * lanes, s2);
    store(w + (t + 3) * lanes, s3);
  }
  for (; t < task.count; ++t) one(t);
}

static void lookup(const LookupTask& task) {
  center_scores(task);
  switch (task.lanes) {
    case 4: add_entries<v4>(task, 0); break;
    case 8: add_entries<v8>(task, 0); break;
    case 16: add_entries<v16>(task, 0); break;
    default:
      for (int64_t l = 0; l < task.lanes; l += 4) add_entries<v4>(task, l);
  }
  soften_run(task.count, task.lanes, task.softcap, task.weights, task.maximum, task.sum);
}
