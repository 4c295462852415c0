// Vectors of the instruction set a file is compiled for. Included only by kernels_impl.hpp, inside its namespace:
// nothing here may have linkage that another instruction set's copy could replace.
#if defined(__AVX512BW__)
constexpr int kWidth = 16;
#elif defined(__AVX2__)
constexpr int kWidth = 8;
#else
constexpr int kWidth = 4;
#endif
constexpr int kSub = static_cast<int>(kLanes) / kWidth;  // vectors of 16 lanes

typedef float vf __attribute__((vector_size(4 * kWidth)));
typedef int32_t vi __attribute__((vector_size(4 * kWidth)));
typedef double vd __attribute__((vector_size(4 * kWidth)));
constexpr int kDoubles = kWidth / 2;
typedef float v4 __attribute__((vector_size(16)));

template <class V>
static inline V load(const void* p) {
  V v;
  __builtin_memcpy(&v, p, sizeof v);
  return v;
}
template <class V>
static inline void store(void* p, V v) {
  __builtin_memcpy(p, &v, sizeof v);
}
static inline vf splat(float x) { return x - vf{}; }
static inline vd splat_d(double x) { return x - vd{}; }
static inline vi splat_i(int32_t x) { return x - vi{}; }
static inline vf vmax(vf a, vf b) { return a > b ? a : b; }

static inline float bits_to_float(uint32_t u) {
  float f;
  __builtin_memcpy(&f, &u, 4);
  return f;
}
static inline uint32_t float_to_bits(float f) {
  uint32_t u;
  __builtin_memcpy(&u, &f, 4);
  return u;
}

static inline float half_to_float(uint16_t h) {
#if defined(__F16C__)
  return _cvtsh_ss(h);
#else
  const uint32_t sign = static_cast<uint32_t>(h & 0x8000) << 16, magnitude = h & 0x7FFF;
  if (magnitude >= 0x7C00) return bits_to_float(sign | 0x7F800000 | (magnitude & 0x3FF) << 13);
  // Scaling by 2^112 is exact and turns subnormal halves into normal floats.
  return bits_to_float(sign | float_to_bits(bits_to_float(magnitude << 13) * 0x1p112f));
#endif
}

static inline uint16_t float_to_half(float f) {
#if defined(__F16C__)
  return static_cast<uint16_t>(_cvtss_sh(f, 0));
#else
  const uint32_t u = float_to_bits(f), sign = (u >> 16) & 0x8000, magnitude = u & 0x7FFFFFFF;
  if (magnitude > 0x7F800000) return static_cast<uint16_t>(sign | 0x7E00);
  if (magnitude >= 0x477FF000) return static_cast<uint16_t>(sign | 0x7C00);  // 65520 and up round to infinity
  if (magnitude < 0x38800000) {  // subnormal half: adding 0.5 lets the float adder round at 2^-24
    const uint32_t rounded = float_to_bits(bits_to_float(magnitude) + 0.5f);
    return static_cast<uint16_t>(sign | (rounded - 0x3F000000));
  }
  const uint32_t odd = (magnitude >> 13) & 1;
  return static_cast<uint16_t>(sign | ((magnitude - 0x38000000 + 0xFFF + odd) >> 13));
#endif
}

static inline float bfloat_to_float(uint16_t b) { return bits_to_float(static_cast<uint32_t>(b) << 16); }
static inline uint16_t float_to_bfloat(float f) {
  const uint32_t u = float_to_bits(f);
  if ((u & 0x7FFFFFFF) > 0x7F800000) return static_cast<uint16_t>((u >> 16) | 0x40);
  return static_cast<uint16_t>((u + 0x7FFF + ((u >> 16) & 1)) >> 16);
}

static inline vf load_half(const uint16_t* p) {
#if defined(__AVX512BW__)
  return (vf)_mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
#elif defined(__AVX2__)
  return (vf)_mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
#else
  return vf{half_to_float(p[0]), half_to_float(p[1]), half_to_float(p[2]), half_to_float(p[3])};
#endif
}

// exp for x <= 0 to about 2 ulp; 0 below -87.
static inline vf exp_nonpositive(vf x) {
  const vf low = splat(-87.0f);
  const vf clamped = vmax(x, low);
  const vf shifted = clamped * 1.44269504f + 12582912.0f;  // the adder rounds to an integer
  const vf n = shifted - 12582912.0f;
  const vf r = (clamped - n * 0.693359375f) + n * 2.12194440e-4f;
  vf p = splat(1.9875691500e-4f);
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * r * r + r + 1.0f;
  const vi power = (__builtin_convertvector(n, vi) + 127) << 23;
  return x < low ? splat(0.0f) : p * (vf)power;
}
