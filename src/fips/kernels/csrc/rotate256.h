// The same eight numbers at a time, whole blocks of at least eight.
#pragma once
#include "registers256.h"
#include "rotate.h"

namespace {

// Sums and differences of neighbours, of pairs and of fours in a vector.
template <int HALF> FIPS_INLINE __m256 butterfly(__m256 v) {
  __m256 other;
  if constexpr (HALF == 1) other = _mm256_permute_ps(v, 0xB1);
  if constexpr (HALF == 2) other = _mm256_permute_ps(v, 0x4E);
  if constexpr (HALF == 4) other = _mm256_permute2f128_ps(v, v, 1);
  const __m256 signs = HALF == 1   ? _mm256_setr_ps(1, -1, 1, -1, 1, -1, 1, -1)
                       : HALF == 2 ? _mm256_setr_ps(1, 1, -1, -1, 1, 1, -1, -1)
                                   : _mm256_setr_ps(1, 1, 1, 1, -1, -1, -1, -1);
  return _mm256_fmadd_ps(v, signs, other);
}

template <int BLOCK> void rotate_row256(float *row, int64_t cols) {
  constexpr int count = BLOCK / 8;
  const __m256 unit = _mm256_set1_ps(BLOCK == 64 ? 0.125f : 0.25f);
  for (int64_t k = 0; k < cols; k += BLOCK) {
    __m256 v[count];
#pragma GCC unroll 8
    for (int i = 0; i < count; ++i)
      v[i] = butterfly<4>(butterfly<2>(butterfly<1>(_mm256_load_ps(row + k + 8 * i))));
#pragma GCC unroll 3
    for (int half = 1; half < count; half *= 2)
#pragma GCC unroll 8
      for (int i = 0; i < count; ++i)
        if (!(i & half)) {
          const __m256 a = v[i], b = v[i + half];
          v[i] = _mm256_add_ps(a, b);
          v[i + half] = _mm256_sub_ps(a, b);
        }
#pragma GCC unroll 8
    for (int i = 0; i < count; ++i) _mm256_store_ps(row + k + 8 * i, _mm256_mul_ps(v[i], unit));
  }
}

} // namespace
