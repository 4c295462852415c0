// C[M, N] += A[M, K] B[K, N] in float32 for the small products of attention. B and C are row-major with N a multiple
// of 16; A has any strides, B may be float16. Register-blocked; every element is summed in order of k, so blocking changes no bits.
#if defined(__AVX512BW__)
constexpr int kBlockVectors = 4;
#else
constexpr int kBlockVectors = 2;
#endif

static inline vf load_row(const float* p) { return load<vf>(p); }
static inline vf load_row(const uint16_t* p) { return load_half(p); }

template <int MR, int NV, class B>
static inline void gemm_block(int64_t k_count, const float* a, int64_t a_row, int64_t a_col, const B* b,
                              int64_t ldb, float* c, int64_t ldc) {
  vf acc[MR][NV];
  for (int m = 0; m < MR; ++m)
    for (int v = 0; v < NV; ++v) acc[m][v] = load<vf>(c + m * ldc + v * kWidth);
  for (int64_t k = 0; k < k_count; ++k) {
    vf row[NV];
    for (int v = 0; v < NV; ++v) row[v] = load_row(b + k * ldb + v * kWidth);
    for (int m = 0; m < MR; ++m) {
      const vf x = splat(a[m * a_row + k * a_col]);
      for (int v = 0; v < NV; ++v) acc[m][v] += x * row[v];
    }
  }
  for (int m = 0; m < MR; ++m)
    for (int v = 0; v < NV; ++v) store(c + m * ldc + v * kWidth, acc[m][v]);
}

template <int NV, class B>
static inline void gemm_columns(int64_t m_count, int64_t k_count, const float* a, int64_t a_row, int64_t a_col,
                                const B* b, int64_t ldb, float* c, int64_t ldc) {
  int64_t m = 0;
  for (; m + 4 <= m_count; m += 4) gemm_block<4, NV>(k_count, a + m * a_row, a_row, a_col, b, ldb, c + m * ldc, ldc);
  for (; m < m_count; ++m) gemm_block<1, NV>(k_count, a + m * a_row, a_row, a_col, b, ldb, c + m * ldc, ldc);
}

template <class B>
static void gemm(int64_t m_count, int64_t n_count, int64_t k_count, const float* a, int64_t a_row, int64_t a_col,
                 const B* b, int64_t ldb, float* c, int64_t ldc) {
  int64_t n = 0;
  for (; n + kBlockVectors * kWidth <= n_count; n += kBlockVectors * kWidth)
    gemm_columns<kBlockVectors>(m_count, k_count, a, a_row, a_col, b + n, ldb, c + n, ldc);
  for (; n < n_count; n += kWidth) gemm_columns<1>(m_count, k_count, a, a_row, a_col, b + n, ldb, c + n, ldc);
}

static void widen(const void* from, float* to, int64_t count, Element type) {
  if (type == Element::f32) {
    __builtin_memcpy(to, from, static_cast<size_t>(count) * 4);
    return;
  }
  const uint16_t* h = static_cast<const uint16_t*>(from);
  int64_t i = 0;
  if (type == Element::f16) {
    for (; i + kWidth <= count; i += kWidth) store(to + i, load_half(h + i));
    for (; i < count; ++i) to[i] = half_to_float(h[i]);
  } else {
    for (; i < count; ++i) to[i] = bfloat_to_float(h[i]);
  }
}

static void narrow(const float* from, void* to, int64_t count, Element type) {
  if (type == Element::f32) {
    __builtin_memcpy(to, from, static_cast<size_t>(count) * 4);
    return;
  }
  uint16_t* h = static_cast<uint16_t*>(to);
  if (type == Element::f16) {
    for (int64_t i = 0; i < count; ++i) h[i] = float_to_half(from[i]);
  } else {
    for (int64_t i = 0; i < count; ++i) h[i] = float_to_bfloat(from[i]);
  }
}
