constexpr double kInfinity = __builtin_huge_val();

// The nearest integer of 16 bits; of NaN, which a hostile codebook may hold, any.
static inline int16_t rounded_int16(float x) {
  const float most = 32767.0f, low = x > -most ? x : -most, bounded = low < most ? low : most;
  return static_cast<int16_t>(bounded < 0 ? bounded - 0.5f : bounded + 0.5f);
}

// Key codewords to 16-bit fixed point (see KeySlices). Each stage is centerd, so that the first stage's mean costs no
// precision, and has its own integer multiplier; the sums are exact in int32. The rounding error of a decoded
// element is near sqrt(stages) * (a stage's half range) * 1e-5, below that of a float16 cache.
static void prepare_keys(const PrepareTask& task) {
  const int64_t stages = task.words.stages, width = task.words.width, pairs = task.head_dim / 2;
  const int64_t slices = round_up(pairs, kLanes) / kLanes;
  const uint16_t* words = task.words.data + task.group * stages * kCodewords * width + task.column;
  const double budget = 32768.0;  // the multipliers' sum; times 32767 it leaves int32 room for the bias
  float* spread = task.scratch;   // [stages] largest half range of a stage
  float* center = spread + stages;  // [stages, 2, 16]
  double total = 0;

  for (int64_t r = 0; r < stages; ++r) {
    const uint16_t* stage = words + r * kCodewords * width;
    float most = 0;
    for (int64_t e = 0; e < task.head_dim; ++e) {
      float low = half_to_float(stage[e]), high = low;
      for (int64_t k = 1; k < kCodewords; ++k) {
        const float x = half_to_float(stage[k * width + e]);
        low = x < low ? x : low;
        high = x > high ? x : high;
      }
      const float half = (high - low) * 0.5f;
      most = half > most ? half : most;
    }
    spread[r] = most;
    total += most;
  }
  int32_t multiplier[2] = {0, 0};
  for (int64_t r = 0; r < stages; ++r) {
    const double share = total > 0 && total < kInfinity ? spread[r] / total * budget : 1.0;
    const int64_t m = static_cast<int64_t>(share);
    multiplier[r & 1] = static_cast<int32_t>(m < 1 ? 1 : m > 32767 ? 32767 : m);
    if (r & 1 || r + 1 == stages) {
      if (!(r & 1)) multiplier[1] = 0;
      task.out_multipliers[r / 2] = multiplier[0] | multiplier[1] << 16;
    }
  }

  for (int64_t s = 0; s < slices; ++s) {
    for (int64_t lane = 0; lane < kLanes; ++lane) {
      const int64_t pair = s * kLanes + lane;
      int16_t* out = task.out_words + s * stages * kCodewords * 2 * kLanes + lane / 4 * 8 + lane % 4;
      float* unit = task.out_unit + s * kLanes + lane;
      int32_t* bias = task.out_bias + s * 2 * kLanes + lane;
      if (pair >= pairs) {
        for (int64_t i = 0; i < stages * kCodewords; ++i) out[i * 2 * kLanes] = out[i * 2 * kLanes + 4] = 0;
        *unit = 0;
        bias[0] = bias[kLanes] = 0;
        continue;
      }
      int64_t element[2];
      pair_elements(pair, task.half_rope, task.interleaved, &element[0], &element[1]);
      double step = 0, sum[2] = {0, 0};
      for (int64_t r = 0; r < stages; ++r) {
        const int32_t m = (task.out_multipliers[r / 2] >> (r & 1) * 16) & 0xFFFF;
        for (int side = 0; side < 2; ++side) {
          const uint16_t* stage = words + r * kCodewords * width + element[side];
          float low = half_to_float(stage[0]), high = low;
          for (int64_t k = 1; k < kCodewords; ++k) {
            const float x = half_to_float(stage[k * width]);
            low = x < low ? x : low;
            high = x > high ? x : high;
          }
          center[r * 2 + side] = (low + high) * 0.5f;
          sum[side] += center[r * 2 + side];
          const double need = (high - low) * 0.5 * 1.0001 / (32767.0 * m);
          step = need > step ? need : step;
        }
      }
      for (double mean : sum) {  // the bias must fit too
        const double need = (mean < 0 ? -mean : mean) / 536870912.0;
        step = need > step ? need : step;
      }
      if (step == 0) step = 1;
      const float rounded_step = static_cast<float>(step * 1.000001);
      *unit = rounded_step;
      for (int side = 0; side < 2; ++side) {
        bias[side * kLanes] = static_cast<int32_t>(__builtin_llrint(sum[side] / rounded_step));
        for (int64_t r = 0; r < stages; ++r) {
          const int32_t m = (task.out_multipliers[r / 2] >> (r & 1) * 16) & 0xFFFF;
          const uint16_t* stage = words + r * kCodewords * width + element[side];
          const float inverse = static_cast<float>(1.0 / (static_cast<double>(rounded_step) * m));
          int16_t* row = out + r * kCodewords * 2 * kLanes + side * 4;
          for (int64_t k = 0; k < kCodewords; ++k) {
            const float x = (half_to_float(stage[k * width]) - center[r * 2 + side]) * inverse;
            row[k * 2 * kLanes] = rounded_int16(x);
          }
        }
      }
    }
  }
}
