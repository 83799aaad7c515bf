// The exponential function, eight numbers at a time.
#pragma once
#include <initializer_list>

#include "registers256.h"

namespace {

// e^x for x from -87 (below it that of -87) to 87, to 1e-7 of itself; NaN for NaN.
FIPS_INLINE __m256 exponential(__m256 x) {
  const auto all = [](float value) { return _mm256_set1_ps(value); };
  x = _mm256_max_ps(all(-87), x);
  const __m256i whole = _mm256_cvtps_epi32(_mm256_mul_ps(x, all(1.44269504f)));
  const __m256 n = _mm256_cvtepi32_ps(whole);
  __m256 r = _mm256_fmadd_ps(n, all(-0.693359375f), x);
  r = _mm256_fmadd_ps(n, all(2.12194440e-4f), r);
  __m256 sum = all(1.0f / 720);
  for (float next : {1.0f / 120, 1.0f / 24, 1.0f / 6, 0.5f, 1.0f, 1.0f}) sum = _mm256_fmadd_ps(sum, r, all(next));
  const __m256i power = _mm256_slli_epi32(_mm256_add_epi32(whole, _mm256_set1_epi32(127)), 23);
  return _mm256_mul_ps(sum, _mm256_castsi256_ps(power));
}

} // namespace
