// Scores of coded keys against the query heads of one KV head, then softmax weights up to the run's maximum.
//
// A key is the sum of its stages' codewords. Codewords are taken a slice (16 RoPE pairs, 64 bytes a codeword) or two
// at a time, so that a slice of all stages stays in the second-level cache while all tokens pass. Rotation: tokens in a
// chunk of 32 differ from its first by a small offset; the query is turned back by the first token's row of the
// table, the key by the offset's row, so the table is not streamed. Cost a token and slice: `stages` 64-byte loads
// and 2 vector operations each, 4 for the rotation, 2 and the horizontal sum a query head.

constexpr int64_t kStageWords = kCodewords * 2 * kLanes;  // int16 of a stage of a slice
constexpr int64_t kPassBytes = 640 * 1024;                // codewords of a pass over the tokens

struct Pair {  // 16 first and 16 second elements of RoPE pairs
  vf first[kSub], second[kSub];
};

// SLICES (1 or 2) slices of the keys of 4 tokens, each up to its unit. words and bias: of the first slice; the next
// lie slice_words and 32 on.
#if defined(__AVX512BW__)
struct Sums {
  __m512i first, second;
};

static inline Sums start_sums(const int32_t* bias) {
  return {_mm512_loadu_si512(bias), _mm512_loadu_si512(bias + kLanes)};
}

static inline void add_words(Sums& sums, __m512i even, __m512i odd, __m512i multipliers) {
  sums.first = _mm512_dpwssd_epi32(sums.first, _mm512_unpacklo_epi16(even, odd), multipliers);
  sums.second = _mm512_dpwssd_epi32(sums.second, _mm512_unpackhi_epi16(even, odd), multipliers);
}

static inline void finish_sums(const Sums& sums, Pair& out) {
  out.first[0] = (vf)_mm512_cvtepi32_ps(sums.first);
  out.second[0] = (vf)_mm512_cvtepi32_ps(sums.second);
}

// Named sums, no array: GCC keeps an array of them in memory and the loop then waits for its stores.
template <int SLICES>
static inline void sum_stages(const uint8_t* const (&codes)[4], const int16_t* words, int64_t slice_words,
                              int64_t stages, const int32_t* multipliers, const int32_t* bias, Pair (*out)[SLICES]) {
  const int32_t* next_bias = bias + (SLICES - 1) * 2 * kLanes;
  Sums a0 = start_sums(bias), a1 = a0, a2 = a0, a3 = a0;
  Sums b0 = start_sums(next_bias), b1 = b0, b2 = b0, b3 = b0;
  const uint8_t *c0 = codes[0], *c1 = codes[1], *c2 = codes[2], *c3 = codes[3];
  const auto word = [&](uint8_t code, int64_t stage, int64_t slice) {
    return _mm512_load_si512(words + stage * kStageWords + slice * slice_words + static_cast<size_t>(code) * 2 * kLanes);
  };
  const auto token = [&](const uint8_t* code, __m512i m, Sums& a, Sums& b) {
    add_words(a, word(code[0], 0, 0), word(code[1], 1, 0), m);
    if constexpr (SLICES == 2) add_words(b, word(code[0], 0, 1), word(code[1], 1, 1), m);
  };
  const auto last = [&](const uint8_t* code, __m512i m, Sums& a, Sums& b) {
    add_words(a, word(code[0], 0, 0), _mm512_setzero_si512(), m);
    if constexpr (SLICES == 2) add_words(b, word(code[0], 0, 1), _mm512_setzero_si512(), m);
  };
  int64_t r = 0;
  for (; r + 2 <= stages; r += 2, words += 2 * kStageWords) {
    const __m512i m = _mm512_set1_epi32(multipliers[r / 2]);
    token(c0 + r, m, a0, b0);
    token(c1 + r, m, a1, b1);
    token(c2 + r, m, a2, b2);
    token(c3 + r, m, a3, b3);
  }
  if (r < stages) {
    const __m512i m = _mm512_set1_epi32(multipliers[r / 2]);
    last(c0 + r, m, a0, b0);
    last(c1 + r, m, a1, b1);
    last(c2 + r, m, a2, b2);
    last(c3 + r, m, a3, b3);
  }
  finish_sums(a0, out[0][0]);
  finish_sums(a1, out[1][0]);
  finish_sums(a2, out[2][0]);
  finish_sums(a3, out[3][0]);
  if constexpr (SLICES == 2) {
    finish_sums(b0, out[0][1]);
    finish_sums(b1, out[1][1]);
    finish_sums(b2, out[2][1]);
    finish_sums(b3, out[3][1]);
  }
}
#else
template <int SLICES>
static inline void sum_token(const uint8_t* codes, const int16_t* words, int64_t slice_words, int64_t stages,
                             const int32_t* multipliers, const int32_t* bias, Pair* out) {
#if defined(__AVX2__)
  for (int s = 0; s < SLICES; ++s, words += slice_words, bias += 2 * kLanes) {
    __m256i first[2], second[2];
    for (int h = 0; h < 2; ++h) {
      first[h] = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(bias + 8 * h));
      second[h] = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(bias + kLanes + 8 * h));
    }
    const int16_t* stage = words;
    for (int64_t r = 0; r < stages; r += 2, stage += 2 * kStageWords) {
      const __m256i m = _mm256_set1_epi32(multipliers[r / 2]);
      const int16_t* even = stage + codes[r] * 2 * kLanes;
      const int16_t* odd = r + 1 < stages ? stage + kStageWords + codes[r + 1] * 2 * kLanes : even;  // multiplier 0
      for (int h = 0; h < 2; ++h) {
        const __m256i x = _mm256_load_si256(reinterpret_cast<const __m256i*>(even + 16 * h));
        const __m256i y = _mm256_load_si256(reinterpret_cast<const __m256i*>(odd + 16 * h));
        first[h] = _mm256_add_epi32(first[h], _mm256_madd_epi16(_mm256_unpacklo_epi16(x, y), m));
        second[h] = _mm256_add_epi32(second[h], _mm256_madd_epi16(_mm256_unpackhi_epi16(x, y), m));
      }
    }
    for (int h = 0; h < 2; ++h) {
      out[s].first[h] = (vf)_mm256_cvtepi32_ps(first[h]);
      out[s].second[h] = (vf)_mm256_cvtepi32_ps(second[h]);
    }
  }
#else
  for (int s = 0; s < SLICES; ++s, words += slice_words, bias += 2 * kLanes) {
    int32_t sum[2 * kLanes];
    __builtin_memcpy(sum, bias, sizeof sum);
    const int16_t* stage = words;
    for (int64_t r = 0; r < stages; ++r, stage += kStageWords) {
      const int32_t m = (multipliers[r / 2] >> (r & 1) * 16) & 0xFFFF;
      const int16_t* word = stage + codes[r] * 2 * kLanes;
      for (int i = 0; i < kLanes; ++i) {
        sum[i] += m * word[i / 4 * 8 + i % 4];
        sum[kLanes + i] += m * word[i / 4 * 8 + i % 4 + 4];
      }
    }
    for (int i = 0; i < kSub; ++i) {
      out[s].first[i] = __builtin_convertvector(load<vi>(sum + i * kWidth), vf);
      out[s].second[i] = __builtin_convertvector(load<vi>(sum + kLanes + i * kWidth), vf);
    }
  }
#endif
}

template <int SLICES>
static inline void sum_stages(const uint8_t* const (&codes)[4], const int16_t* words, int64_t slice_words,
                              int64_t stages, const int32_t* multipliers, const int32_t* bias, Pair (*out)[SLICES]) {
  for (int j = 0; j < 4; ++j) sum_token<SLICES>(codes[j], words, slice_words, stages, multipliers, bias, out[j]);
}
#endif

// Horizontal sums of the products of 4 tokens with 4 query heads: out[token * stride + head] (+)= sum.
static inline void sum_4x4(const vf (&v)[4][4], float* out, int64_t stride, bool add) {
#if defined(__AVX512BW__)
  __m512 z[4];
  for (int t = 0; t < 4; ++t) {
    const __m512 a = (__m512)v[t][0], b = (__m512)v[t][1], c = (__m512)v[t][2], d = (__m512)v[t][3];
    const __m512d x = _mm512_castps_pd(_mm512_add_ps(_mm512_unpacklo_ps(a, b), _mm512_unpackhi_ps(a, b)));
    const __m512d y = _mm512_castps_pd(_mm512_add_ps(_mm512_unpacklo_ps(c, d), _mm512_unpackhi_ps(c, d)));
    z[t] = _mm512_add_ps(_mm512_castpd_ps(_mm512_unpacklo_pd(x, y)), _mm512_castpd_ps(_mm512_unpackhi_pd(x, y)));
  }
  const __m512 p = _mm512_add_ps(_mm512_shuffle_f32x4(z[0], z[1], 0x44), _mm512_shuffle_f32x4(z[0], z[1], 0xEE));
  const __m512 q = _mm512_add_ps(_mm512_shuffle_f32x4(z[2], z[3], 0x44), _mm512_shuffle_f32x4(z[2], z[3], 0xEE));
  __m512 w = _mm512_add_ps(_mm512_shuffle_f32x4(p, q, 0x88), _mm512_shuffle_f32x4(p, q, 0xDD));
  if (stride == 4) {
    if (add) w = _mm512_add_ps(w, _mm512_loadu_ps(out));
    _mm512_storeu_ps(out, w);
    return;
  }
  alignas(64) float sums[16];
  _mm512_store_ps(sums, w);
#else
  float sums[16];
  for (int t = 0; t < 4; ++t) {
#if defined(__AVX2__)
    const __m256 x = _mm256_hadd_ps((__m256)v[t][0], (__m256)v[t][1]);
    const __m256 y = _mm256_hadd_ps((__m256)v[t][2], (__m256)v[t][3]);
    const __m256 z = _mm256_hadd_ps(x, y);
    _mm_storeu_ps(sums + 4 * t, _mm_add_ps(_mm256_castps256_ps128(z), _mm256_extractf128_ps(z, 1)));
#else
    for (int l = 0; l < 4; ++l) sums[4 * t + l] = (v[t][l][0] + v[t][l][1]) + (v[t][l][2] + v[t][l][3]);
#endif
  }
#endif
  for (int t = 0; t < 4; ++t) {
    v4 s = load<v4>(sums + 4 * t);
    if (add) s += load<v4>(out + t * stride);
    store(out + t * stride, s);
  }
}

// A slice's part of a table row: cos then sin of its 16 pairs; 1 and 0 where elements pass unrotated.
static inline void table_row(const Rope& rope, int64_t slice, int64_t position, float scale, float* out) {
  const int64_t begin = slice * kLanes;
  int64_t n = rope.half - begin;
  n = n < 0 ? 0 : n > kLanes ? kLanes : n;
  const float* cos = rope.cos + position * rope.half + begin;
  const float* sin = rope.sin + position * rope.half + begin;
  int64_t i = 0;
  for (; i + kWidth <= n; i += kWidth) {
    store(out + i, load<vf>(cos + i) * scale);
    store(out + kLanes + i, load<vf>(sin + i) * scale);
  }
  for (; i < n; ++i) {
    out[i] = cos[i] * scale;
    out[kLanes + i] = sin[i] * scale;
  }
  for (; i < kLanes; ++i) {
    out[i] = 1;
    out[kLanes + i] = 0;
  }
}

// The table's common factor (YaRN and others scale it), 0 if row 0 is not that factor times (1, 0).
static float table_factor(const Rope& rope) {
  if (rope.half == 0) return 1;
  const float f = rope.cos[0];
  bool plain = f > 0;
  for (int64_t i = 0; i < rope.half; ++i) plain = plain && rope.cos[i] == f && rope.sin[i] == 0;
  return plain ? f : 0;
}

// Whether the chunk's last row is its first row turned by the offset's row, up to the rounding of angles in float32.
static bool rows_compose(const Rope& rope, int64_t slice, int64_t first, int64_t offset, float factor,
                         const float* base, const float* turn) {
  float last[2 * kLanes];
  table_row(rope, slice, first + offset, 1, last);
  const float limit = factor * (2e-6f + 2.4e-7f * static_cast<float>(first + offset));
  vf worst = splat(0);
  for (int i = 0; i < kLanes; i += kWidth) {
    const vf ac = load<vf>(base + i), as = load<vf>(base + kLanes + i);
    const vf bc = load<vf>(turn + i), bs = load<vf>(turn + kLanes + i);
    const vf c = ac * bc - as * bs - load<vf>(last + i), s = as * bc + ac * bs - load<vf>(last + kLanes + i);
    worst = vmax(worst, vmax(vmax(c, -c), vmax(s, -s)));
  }
  bool within = true;
  for (int x = 0; x < kWidth; ++x) within = within && worst[x] <= limit;
  return within;
}

// The table rows with which a chunk's keys are rotated; the query has been turned by base.
static inline const float* chunk_rows(const ScoreTask& task, int64_t slice, int64_t first, int64_t n, float factor,
                                      const float* turns, float* rows, float* base) {
  table_row(task.rope, slice, first, 1, base);
  if (factor > 0 && rows_compose(task.rope, slice, first, n - 1, factor, base, turns + (n - 1) * 2 * kLanes))
    return turns;
  // Any table is right this way, only slower.
  for (int64_t o = 0; o < n; ++o) table_row(task.rope, slice, first + o, 1, rows + o * 2 * kLanes);
  for (int i = 0; i < kLanes; ++i) {
    base[i] = 1;
    base[kLanes + i] = 0;
  }
  return rows;
}

template <int SLICES>
static void score_pass(const ScoreTask& task, int64_t first_slice, float factor) {
  constexpr int64_t row_size = 2 * kLanes, chunk_size = kChunk * row_size;
  const int64_t stages = task.keys.stages, lanes = task.lanes, slice_words = stages * kStageWords;
  const int16_t* words = task.keys.words + first_slice * slice_words;
  const int32_t* bias = task.keys.bias + first_slice * row_size;
  float* turns = task.scratch;                        // [slices, 32, 2, 16] rows of the offsets
  float* rows = turns + kMostSlices * chunk_size;     // the same of a chunk whose table does not compose
  float* turned = rows + kMostSlices * chunk_size;    // [lanes, slices, 2, 16]
  const int64_t offsets = task.count < kChunk ? task.count : kChunk;
  if (factor > 0)
    for (int s = 0; s < SLICES; ++s)
      for (int64_t o = 0; o < offsets; ++o)
        table_row(task.rope, first_slice + s, o, 1 / factor, turns + s * chunk_size + o * row_size);

  for (int64_t begin = 0; begin < task.count; begin += kChunk) {
    const int64_t n = task.count - begin < kChunk ? task.count - begin : kChunk, first = task.first_token + begin;
    const float* table[SLICES];
    for (int s = 0; s < SLICES; ++s) {
      float base[row_size];
      table[s] = chunk_rows(task, first_slice + s, first, n, factor, turns + s * chunk_size, rows + s * chunk_size, base);
      const float* unit = task.keys.unit + (first_slice + s) * kLanes;
      for (int64_t l = 0; l < lanes; ++l) {
        const float* q = task.query + ((first_slice + s) * lanes + l) * row_size;
        float* t = turned + (l * SLICES + s) * row_size;
        for (int64_t at = 0; at < kLanes; at += kWidth) {
          const vf a = load<vf>(q + at), b = load<vf>(q + kLanes + at), u = load<vf>(unit + at);
          const vf c = load<vf>(base + at), d = load<vf>(base + kLanes + at);
          store(t + at, (a * c + b * d) * u);
          store(t + kLanes + at, (b * c - a * d) * u);
        }
      }
    }
    for (int64_t t = 0; t < n; t += 4) {
      Pair key[4][SLICES];
      int64_t at[4];
      const uint8_t* codes[4];
      for (int j = 0; j < 4; ++j) {
        at[j] = t + j < n ? t + j : n - 1;
        codes[j] = task.codes + code_offset(task.code_rows, begin + at[j]);
      }
      prefetch_codes(task.codes, task.code_rows, begin + t);
      sum_stages<SLICES>(codes, words, slice_words, stages, task.keys.multipliers, bias, key);
      for (int j = 0; j < 4; ++j) {
        for (int s = 0; s < SLICES; ++s) {
          const float* row = table[s] + at[j] * row_size;
          for (int i = 0; i < kSub; ++i) {
            const vf c = load<vf>(row + i * kWidth), d = load<vf>(row + kLanes + i * kWidth);
            const vf a = key[j][s].first[i], b = key[j][s].second[i];
            key[j][s].first[i] = a * c - b * d;
            key[j][s].second[i] = b * c + a * d;
          }
        }
      }
      float* out = task.weights + (begin + t) * lanes;  // rows past the count are in the buffer's padding
      for (int64_t block = 0; block < lanes; block += 4) {
        vf v[4][4];
        for (int l = 0; l < 4; ++l) {
          const float* q = turned + (block + l) * SLICES * row_size;
          for (int j = 0; j < 4; ++j) v[j][l] = splat(0);
          for (int s = 0; s < SLICES; ++s, q += row_size)
            for (int i = 0; i < kSub; ++i) {
              const vf a = load<vf>(q + i * kWidth), b = load<vf>(q + kLanes + i * kWidth);
              for (int j = 0; j < 4; ++j) {
                v[j][l] += key[j][s].first[i] * a;
                v[j][l] += key[j][s].second[i] * b;
              }
            }
        }
        sum_4x4(v, out + block, lanes, first_slice > 0);
      }
    }
  }
}

// Scores of a run's tokens to softmax weights up to the run's maximum, for all query heads; see ScoreTask.
static void soften_run(int64_t count, int64_t lanes, float softcap, float* w, float* maximum, float* sum) {
  const int64_t padded = round_up(count, kLanes), used = count * lanes;
  if (softcap > 0)
    for (int64_t i = 0; i < used; ++i) w[i] = softcap * tanhf(w[i] / softcap);
  for (int64_t i = used; i < padded * lanes; ++i) w[i] = -1e30f;  // weight 0
  for (int64_t l = 0; l < lanes; l += 4) {
    v4 most = load<v4>(w + l);
    for (int64_t t = 1; t < count; ++t) {
      const v4 x = load<v4>(w + t * lanes + l);
      most = x > most ? x : most;
    }
    store(maximum + l, most);
  }
  // 16 tokens are a whole number of vectors for any number of lanes: vector i of each 16 has the same lanes.
  const int64_t per = kLanes * lanes / kWidth;
  for (int64_t l = 0; l < lanes; ++l) sum[l] = 0;
  for (int64_t i = 0; i < per; ++i) {
    float pattern[kWidth], sums[kWidth];
    for (int x = 0; x < kWidth; ++x) pattern[x] = maximum[(i * kWidth + x) % lanes];
    const vf most = load<vf>(pattern);
    vf total = splat(0);
    for (int64_t t = 0; t < padded; t += kLanes) {
      float* at = w + t * lanes + i * kWidth;
      const vf e = exp_nonpositive(load<vf>(at) - most);
      store(at, e);
      total += e;
    }
    store(sums, total);
    for (int x = 0; x < kWidth; ++x) sum[(i * kWidth + x) % lanes] += sums[x];
  }
}

static void score(const ScoreTask& task) {
  const float factor = table_factor(task.rope);
  const bool two = 2 * task.keys.stages * kStageWords * 2 <= kPassBytes;
  for (int64_t s = 0; s < task.keys.slices;) {
    if (two && s + 2 <= task.keys.slices) {
      score_pass<2>(task, s, factor);
      s += 2;
    } else {
      score_pass<1>(task, s, factor);
      s += 1;
    }
  }
  soften_run(task.count, task.lanes, task.softcap, task.weights, task.maximum, task.sum);
}
