// Few tokens beside 32 numbers of a row at a time: as floats, or in 8 bits, 64 of which share a scale.
//
// Numbers come as `Codes` gives them, of columns 0 to 7, 16 to 23, 8 to 15 and 24 to 31; digits lie in that order too.
#pragma once
#include "codes256.h"

namespace {

template <Scales SCALES> struct FloatInputs {
  static constexpr Scales kind = SCALES;
  const float *x; // the tokens, one behind the other
  int64_t cols;

  // The products of columns k to k + 31 with every token, in `CHAINS` sums each, of which later ones do not wait for
  // each other.
  template <int T, int CHAINS>
  FIPS_INLINE void add(__m256i numbers, int64_t k, const RowGroups &groups, int, __m256 (&acc)[T][CHAINS]) const {
    __m256 w[4];
    as_floats(numbers, w);
    if constexpr (SCALES == Scales::fine) {
#pragma GCC unroll 4
      for (int i = 0; i < 4; ++i) w[i] = _mm256_mul_ps(w[i], _mm256_set1_ps(groups.at(k + 8 * i)));
    }
    const __m256 scale = SCALES == Scales::wide ? _mm256_set1_ps(groups.at(k)) : _mm256_setzero_ps();
#pragma GCC unroll 4
    for (int t = 0; t < T; ++t) {
      const float *xk = x + t * cols + k;
      __m256 sums[CHAINS];
#pragma GCC unroll 2
      for (int i = 0; i < CHAINS; ++i)
        sums[i] = SCALES == Scales::wide ? _mm256_mul_ps(w[i], _mm256_load_ps(xk + 8 * i))
                                         : _mm256_fmadd_ps(w[i], _mm256_load_ps(xk + 8 * i), acc[t][i]);
#pragma GCC unroll 4
      for (int i = CHAINS; i < 4; ++i)
        sums[i % CHAINS] = _mm256_fmadd_ps(w[i], _mm256_load_ps(xk + 8 * i), sums[i % CHAINS]);
#pragma GCC unroll 2
      for (int i = 0; i < CHAINS; ++i)
        acc[t][i] = SCALES == Scales::wide ? _mm256_fmadd_ps(sums[i], scale, acc[t][i]) : sums[i];
    }
  }
};

template <Scales SCALES> struct DigitInputs {
  static constexpr Scales kind = SCALES;
  const int8_t *digits;
  const float *scales; // of 64 digits
  int64_t cols;

  // `half`: of the 64 columns.
  template <int T, int CHAINS>
  FIPS_INLINE void add(__m256i numbers, int64_t k, const RowGroups &groups, int half, __m256 (&acc)[T][CHAINS]) const {
    const bool sixteen = SCALES == Scales::fine && groups.shift == 4;
    const float own = SCALES == Scales::none ? 1.0f : groups.at(k), next = sixteen ? groups.at(k + 16) : own;
#pragma GCC unroll 4
    for (int t = 0; t < T; ++t) {
      const auto *from = reinterpret_cast<const __m256i *>(digits + t * cols + k);
      const __m256 sums = _mm256_cvtepi32_ps(byte_products(numbers, _mm256_load_si256(from)));
      const float scale = scales[(t * cols + k) / 64];
      __m256 factor = _mm256_set1_ps(own * scale);
      if (sixteen) factor = _mm256_blend_ps(factor, _mm256_set1_ps(next * scale), 0b11001100);
      acc[t][half % CHAINS] = _mm256_fmadd_ps(sums, factor, acc[t][half % CHAINS]);
    }
  }
};

// Tokens, of which `cols` is a multiple of 64, as digits in their order.
inline void digits_of(const float *x, int64_t count, int8_t *digits, float *scales) {
  const __m256 sign = _mm256_set1_ps(-0.0f);
  for (int64_t k = 0; k < count; k += 64) {
    __m256 most = _mm256_setzero_ps();
    for (int i = 0; i < 8; ++i) most = _mm256_max_ps(most, _mm256_andnot_ps(sign, _mm256_load_ps(x + k + 8 * i)));
    alignas(32) float lanes[8];
    _mm256_store_ps(lanes, most);
    float largest = 0;
    for (float lane : lanes) largest = lane > largest ? lane : largest;
    const float scale = scales[k / 64] = fixed_scale(largest, 1);
    const __m256 inverse = _mm256_set1_ps(1 / scale);
    for (int64_t j = k; j < k + 64; j += 32) {
      __m256i whole[4];
      for (int i = 0; i < 4; ++i) whole[i] = _mm256_cvtps_epi32(_mm256_mul_ps(_mm256_load_ps(x + j + 8 * i), inverse));
      // packing takes turns between the halves of registers
      const __m256i low = _mm256_packs_epi32(whole[0], whole[1]), high = _mm256_packs_epi32(whole[2], whole[3]);
      const __m256i order = _mm256_setr_epi32(0, 4, 2, 6, 1, 5, 3, 7);
      _mm256_store_si256(reinterpret_cast<__m256i *>(digits + j),
                         _mm256_permutevar8x32_epi32(_mm256_packs_epi16(low, high), order));
    }
  }
}

// Calls `body` with the tokens in the form that a call wants: `x` are floats, one token behind the other.
template <int T, Scales SCALES, class Body>
void with_inputs_of(const fips_matrix &a, const fips_call &c, const float *x, Body &&body) {
  if (fixed_planes(c) > 1) return body(FloatInputs<SCALES>{x, a.cols});
  auto *digits = scratch<int8_t>(Scratch::bytes, T * a.cols);
  auto *scales = scratch<float>(Scratch::scales, T * a.cols / 64);
  digits_of(x, T * a.cols, digits, scales);
  body(DigitInputs<SCALES>{digits, scales, a.cols});
}

// The same with what the scales of a matrix are.
template <int T, class Body> void with_scales_and_inputs(const fips_matrix &a, const fips_call &c, const float *x, Body &&body) {
  if (!a.scale_group) return with_inputs_of<T, Scales::none>(a, c, x, body);
  if (a.scale_group < 64) return with_inputs_of<T, Scales::fine>(a, c, x, body);
  with_inputs_of<T, Scales::wide>(a, c, x, body);
}

} // namespace
