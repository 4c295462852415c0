// Flash attention of a tile of queries over key/value tiles of 64 tokens, coded or exact. Each row (query, head) sees
// one interval of a tile: the cache rule makes every visible set an interval of coded and two of exact tokens.

// sum over the stages of one token's codewords, elements begin .. begin + n - 1 of the concatenated heads; codes are those
// from the first of their sub-vectors on
static inline void decode_row(const Words& words, const uint8_t* codes, int64_t begin, int64_t n, float* out) {
  const int64_t first = begin / words.width;
  while (n > 0) {
    const int64_t group = begin / words.width, column = begin % words.width;
    const int64_t run = words.width - column < n ? words.width - column : n;
    const uint16_t* book = words.data + group * words.stages * kCodewords * words.width + column;
    const uint8_t* code = codes + gsrq_code_byte(group - first, 0, words.stages);
    int64_t e = 0;
    for (; e + 4 * kWidth <= run; e += 4 * kWidth) {
      vf sum[4] = {splat(0), splat(0), splat(0), splat(0)};
      for (int64_t r = 0; r < words.stages; ++r) {
        const uint16_t* word = book + (r * kCodewords + code[r]) * words.width + e;
        for (int v = 0; v < 4; ++v) sum[v] += load_half(word + v * kWidth);
      }
      for (int v = 0; v < 4; ++v) store(out + e + v * kWidth, sum[v]);
    }
    for (; e < run; ++e) {
      float sum = 0;
      for (int64_t r = 0; r < words.stages; ++r)
        sum += half_to_float(book[(r * kCodewords + code[r]) * words.width + e]);
      out[e] = sum;
    }
    begin += run;
    out += run;
    n -= run;
  }
}

// Rotates a head; element e goes to out[e * stride].
static inline void rotate_row(const Rope& rope, int64_t position, const float* in, int64_t n, float* out,
                              int64_t stride) {
  const float* cos = rope.cos + position * rope.half;
  const float* sin = rope.sin + position * rope.half;
  const int64_t step = rope.interleaved ? 2 : 1, apart = rope.interleaved ? 1 : rope.half;
  for (int64_t p = 0; p < rope.half; ++p) {
    const int64_t i = p * step, j = i + apart;
    out[i * stride] = in[i] * cos[p] - in[j] * sin[p];
    out[j * stride] = in[j] * cos[p] + in[i] * sin[p];
  }
  for (int64_t e = 2 * rope.half; e < n; ++e) out[e * stride] = in[e];
}

enum class Source { coded, sink, recent };

struct AttendScratch {
  float* query;   // [rows, padded]
  float* score;   // [rows, 64]
  float* keys;    // [padded, 64], rotated
  float* values;  // [64, padded]
  float* row;     // [padded] twice
};

static inline int64_t seen_by(const AttendTask& task, int64_t position) {
  const int64_t at = task.exact_prefill ? task.past : position;
  const int64_t seen = gsrq_coded(at + 1, task.sinks, task.window, task.block);
  return seen < task.coded_after ? seen : task.coded_after;
}

static inline void fill_tile(const AttendTask& task, Source source, int64_t first, int64_t n,
                             const AttendScratch& scratch) {
  const int64_t d = task.head_dim, padded = round_up(d, kLanes), column = task.kv_head * d;
  for (int64_t t = 0; t < n; ++t) {
    const int64_t token = first + t;
    float* value = scratch.values + t * padded;
    if (source == Source::coded) {
      const int64_t row = gsrq_code_row(token, task.sinks);
      decode_row(task.key_words, task.key_codes + code_offset(task.key_rows, row), column, d, scratch.row);
      decode_row(task.value_words, task.value_codes + code_offset(task.value_rows, row), column, d, value);
    } else {
      const bool old = token < task.past;
      const int64_t at =
          (old ? gsrq_slot(token, task.sinks, task.window, task.block) : token - task.past) * d *
          element_size(task.element);
      widen((old ? task.key_past : task.key_new) + at, scratch.row, d, task.element);
      widen((old ? task.value_past : task.value_new) + at, value, d, task.element);
    }
    if (source == Source::coded && task.key_center != nullptr) {  // rotated already, less the rotated center
      rotate_row(task.rope, token, task.key_center, d, scratch.keys + t, kTile);
      for (int64_t e = 0; e < d; ++e) scratch.keys[t + e * kTile] += scratch.row[e];
    } else {
      rotate_row(task.rope, token, scratch.row, d, scratch.keys + t, kTile);
    }
  }
}

// Scores to weights in place over columns [from, to), 0 elsewhere; rescales the row's output when its maximum grows.
static inline void soften(const AttendTask& task, float* score, int64_t from, int64_t to, float* maximum, float* sum,
                          float* out, int64_t padded) {
  const vf none = splat(-1e30f);
  vi lane;
  for (int x = 0; x < kWidth; ++x) lane[x] = x;
  const vi low = splat_i(static_cast<int32_t>(from)), high = splat_i(static_cast<int32_t>(to));
  if (task.softcap > 0)
    for (int64_t t = from; t < to; ++t) score[t] = task.softcap * tanhf(score[t] / task.softcap);
  vf most = none;
  for (int v = 0; v < kTile / kWidth; ++v) {
    const vi at = lane + v * kWidth;
    const vf s = ((at >= low) & (at < high)) ? load<vf>(score + v * kWidth) : none;
    store(score + v * kWidth, s);
    most = vmax(most, s);
  }
  float m = *maximum;
  for (int x = 0; x < kWidth; ++x) m = most[x] > m ? most[x] : m;
  if (m > *maximum) {
    const float factor = expf(*maximum - m);
    *sum *= factor;
    for (int64_t e = 0; e < padded; e += kWidth) store(out + e, load<vf>(out + e) * factor);
    *maximum = m;
  }
  vf total = splat(0);
  for (int v = 0; v < kTile / kWidth; ++v) {
    const vf w = exp_nonpositive(load<vf>(score + v * kWidth) - m);
    store(score + v * kWidth, w);
    total += w;
  }
  float s = 0;
  for (int x = 0; x < kWidth; ++x) s += total[x];
  *sum += s;
}

// All tiles of the tokens first .. last - 1 of one source.
static void attend_run(const AttendTask& task, Source source, int64_t first, int64_t last,
                       const AttendScratch& scratch) {
  const int64_t padded = round_up(task.head_dim, kLanes), rows = task.count * task.queries;
  for (int64_t begin = first; begin < last; begin += kTile) {
    const int64_t n = last - begin < kTile ? last - begin : kTile;
    fill_tile(task, source, begin, n, scratch);
    for (int64_t i = 0; i < rows * kTile; ++i) scratch.score[i] = 0;
    gemm(rows, kTile, task.head_dim, scratch.query, padded, 1, scratch.keys, kTile, scratch.score, kTile);
    for (int64_t i = 0; i < task.count; ++i) {
      const int64_t position = task.first_position + i, boundary = task.sinks + seen_by(task, position);
      int64_t from = 0, to = position + 1;  // tokens [from, to) of this source that the query sees
      if (task.sliding_window > 0 && position - task.sliding_window + 1 > from)
        from = position - task.sliding_window + 1;
      if (source == Source::coded && boundary < to) to = boundary;
      if (source == Source::recent && boundary > from) from = boundary;
      from = from < begin ? 0 : from - begin;
      to = to > begin + n ? n : to - begin;
      for (int64_t l = 0; l < task.queries; ++l) {
        const int64_t row = i * task.queries + l;
        float* score = scratch.score + row * kTile;
        if (from < to) {
          soften(task, score, from, to, task.maximum + row, task.sum + row, task.out + row * padded, padded);
        } else {
          for (int64_t t = 0; t < kTile; ++t) score[t] = 0;
        }
      }
    }
    gemm(rows, padded, n, scratch.score, kTile, 1, scratch.values, padded, task.out, padded);
  }
}

static void attend(const AttendTask& task) {
  const int64_t d = task.head_dim, padded = round_up(d, kLanes), rows = task.count * task.queries;
  AttendScratch scratch;
  scratch.query = task.scratch;
  scratch.score = scratch.query + rows * padded;
  scratch.keys = scratch.score + rows * kTile;
  scratch.values = scratch.keys + padded * kTile;
  scratch.row = scratch.values + kTile * padded;
  for (int64_t i = 0; i < 2 * kTile * padded; ++i) scratch.keys[i] = 0;  // the padding stays finite
  for (int64_t i = 0; i < rows * padded; ++i) task.out[i] = 0;
  for (int64_t i = 0; i < task.count; ++i) {
    for (int64_t l = 0; l < task.queries; ++l) {
      const int64_t row = i * task.queries + l;
      float* q = scratch.query + row * padded;
      rotate_row(task.rope, task.first_position + i, task.query + l * task.query_stride + i * d, d, q, 1);
      for (int64_t e = 0; e < d; ++e) q[e] *= task.scale;
      for (int64_t e = d; e < padded; ++e) q[e] = 0;
      task.maximum[row] = -INFINITY;
      task.sum[row] = 0;
    }
  }

  const int64_t last = task.first_position + task.count - 1;
  int64_t oldest = 0;  // that the tile's first query sees
  if (task.sliding_window > 0 && task.first_position - task.sliding_window + 1 > 0)
    oldest = task.first_position - task.sliding_window + 1;
  const int64_t sinks_end = task.sinks < last + 1 ? task.sinks : last + 1;
  if (oldest < sinks_end) attend_run(task, Source::sink, oldest, sinks_end, scratch);
  if (task.attend_coded) {
    const int64_t begin = oldest > task.sinks ? oldest : task.sinks, end = task.sinks + seen_by(task, last);
    if (begin < end) attend_run(task, Source::coded, begin, end, scratch);
  }
  int64_t begin = task.sinks + seen_by(task, task.first_position);
  begin = begin > oldest ? begin : oldest;
  if (begin <= last) attend_run(task, Source::recent, begin, last + 1, scratch);
}
