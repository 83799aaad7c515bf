// Few tokens by codes of 2 to 7 bits, of matrices without a pattern, with AVX2.
//
// The products of 32 columns are added in two independent chains, since an addition has a latency of several cycles.
#pragma once
#include "codes256.h"

namespace {

template <int T, Scales SCALES, class Codes>
void whole_row(const fips_matrix &a, const fips_call &c, const Codes &codes, int64_t row, const float *x) {
  const auto *from = static_cast<const uint8_t *>(a.values) + row * (a.cols / 32) * Codes::bytes;
  const RowGroups groups = SCALES == Scales::none ? RowGroups() : RowGroups(a, row);
  __m256 acc[T][2];
#pragma GCC unroll 4
  for (int t = 0; t < T; ++t) acc[t][0] = acc[t][1] = _mm256_setzero_ps();
  for (int64_t k = 0; k < a.cols; k += 32, from += Codes::bytes) {
    if (k % 64 == 0) _mm_prefetch(reinterpret_cast<const char *>(from) + 1024, _MM_HINT_T0);
    __m256 w[4];
    codes.read(from, w);
    if constexpr (SCALES == Scales::fine) {
#pragma GCC unroll 4
      for (int i = 0; i < 4; ++i) w[i] = _mm256_mul_ps(w[i], _mm256_set1_ps(groups.at(k + 8 * i)));
    }
    const __m256 scale = SCALES == Scales::wide ? _mm256_set1_ps(groups.at(k)) : _mm256_setzero_ps();
#pragma GCC unroll 4
    for (int t = 0; t < T; ++t) {
      const float *xk = x + t * a.cols + k;
      __m256 one = SCALES == Scales::wide ? _mm256_mul_ps(w[0], _mm256_load_ps(xk))
                                          : _mm256_fmadd_ps(w[0], _mm256_load_ps(xk), acc[t][0]);
      __m256 two = SCALES == Scales::wide ? _mm256_mul_ps(w[1], _mm256_load_ps(xk + 8))
                                          : _mm256_fmadd_ps(w[1], _mm256_load_ps(xk + 8), acc[t][1]);
      one = _mm256_fmadd_ps(w[2], _mm256_load_ps(xk + 16), one);
      two = _mm256_fmadd_ps(w[3], _mm256_load_ps(xk + 24), two);
      acc[t][0] = SCALES == Scales::wide ? _mm256_fmadd_ps(one, scale, acc[t][0]) : one;
      acc[t][1] = SCALES == Scales::wide ? _mm256_fmadd_ps(two, scale, acc[t][1]) : two;
    }
  }
  for (int t = 0; t < T; ++t) store_sum(a, c, row, t, total(_mm256_add_ps(acc[t][0], acc[t][1])));
}

template <int T, Scales SCALES, class Codes> void whole_rows(const fips_matrix &a, const fips_call &c, const float *x) {
  const Codes codes(a);
#pragma omp parallel for num_threads(c.threads) schedule(static)
  for (int64_t row = 0; row < a.rows; ++row) whole_row<T, SCALES>(a, c, codes, row, x);
}

template <int T, int BITS, bool LEVELS> void whole_path(const fips_matrix &a, const fips_call &c, const float *x) {
  if (!a.scale_group) return whole_rows<T, Scales::none, Codes<BITS, LEVELS>>(a, c, x);
  if (a.scale_group < 64) return whole_rows<T, Scales::fine, Codes<BITS, LEVELS>>(a, c, x);
  whole_rows<T, Scales::wide, Codes<BITS, LEVELS>>(a, c, x);
}

// `x`: the tokens as floats, one behind the other.
template <int T> void whole_path(const fips_matrix &a, const fips_call &c, const float *x) {
  switch (a.value_bits) {
  case 2: return a.num_levels ? whole_path<T, 2, true>(a, c, x) : whole_path<T, 2, false>(a, c, x);
  case 3: return a.num_levels ? whole_path<T, 3, true>(a, c, x) : whole_path<T, 3, false>(a, c, x);
  case 4: return whole_path<T, 4, true>(a, c, x);
  case 5: return a.num_levels ? whole_path<T, 5, true>(a, c, x) : whole_path<T, 5, false>(a, c, x);
  case 6: return whole_path<T, 6, false>(a, c, x);
  default: return whole_path<T, 7, false>(a, c, x);
  }
}

} // namespace
