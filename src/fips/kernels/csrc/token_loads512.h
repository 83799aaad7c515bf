// Tokens 16 numbers at a time, for the variants with AVX-512.
#pragma once
#include <immintrin.h>

#include <type_traits>

#include "packed.h"

namespace {

struct DigitPlaces { // of the lowest bytes of 32 words, and of 64 halves of words
  alignas(64) uint8_t of_words[64] = {}, of_halves[64] = {};
  constexpr DigitPlaces() {
    for (int i = 0; i < 64; ++i) of_words[i] = uint8_t(4 * (i % 32)), of_halves[i] = uint8_t(2 * i);
  }
};
constexpr DigitPlaces digit_places;

template <int TYPE> FIPS_INLINE __m512 read_floats(const void *x, int64_t at, __mmask16 there) {
  if constexpr (TYPE == FIPS_F32) {
    return _mm512_maskz_loadu_ps(there, static_cast<const float *>(x) + at);
  } else {
    const __m256i half = _mm256_maskz_loadu_epi16(there, static_cast<const uint16_t *>(x) + at);
    if constexpr (TYPE == FIPS_F16) return _mm512_cvtph_ps(half);
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(half), 16));
  }
}

template <class Body> FIPS_INLINE auto with_type(const fips_call &c, Body &&body) {
  switch (c.x_type) {
  case FIPS_F32: return body(std::integral_constant<int, FIPS_F32>());
  case FIPS_F16: return body(std::integral_constant<int, FIPS_F16>());
  default: return body(std::integral_constant<int, FIPS_BF16>());
  }
}

FIPS_INLINE __mmask16 columns_there(int64_t count) { return __mmask16(first_columns(min_of(count, 16))); }

// x[t, k..k+15] as floats, zero beyond the last column
FIPS_INLINE __m512 read_floats(const fips_call &c, int64_t t, int64_t k, int64_t cols) {
  return with_type(c, [&](auto type) {
    return read_floats<decltype(type)::value>(c.x, t * c.x_stride + k, columns_there(cols - k));
  });
}

// x[t, k..k+63] likewise
template <int TYPE>
FIPS_INLINE void read_floats(const fips_call &c, int64_t t, int64_t k, int64_t cols, __m512 (&out)[4]) {
  const int64_t at = t * c.x_stride + k;
  if (k + 64 <= cols)
    for (int i = 0; i < 4; ++i) out[i] = read_floats<TYPE>(c.x, at + 16 * i, 0xFFFF);
  else
    for (int i = 0; i < 4; ++i) out[i] = read_floats<TYPE>(c.x, at + 16 * i, columns_there(cols - k - 16 * i));
}

// The scale of one token as a fixed-point number of some planes of bytes
inline float token_scale(const fips_call &c, int64_t t, int64_t cols, int planes) {
  return with_type(c, [&](auto type) {
    __m512 most[4] = {}, x[4]; // several, since a maximum has a latency of several cycles
    for (int64_t k = 0; k < cols; k += 64) {
      read_floats<decltype(type)::value>(c, t, k, cols, x);
      for (int i = 0; i < 4; ++i) most[i] = _mm512_max_ps(most[i], _mm512_abs_ps(x[i]));
    }
    const __m512 all = _mm512_max_ps(_mm512_max_ps(most[0], most[1]), _mm512_max_ps(most[2], most[3]));
    return fixed_scale(_mm512_reduce_max_ps(all), planes);
  });
}

// 64 bf16 numbers in fixed point of 16 bits, two vectors of 32 in their order
FIPS_INLINE void brain_fixed_point(const fips_call &c, int64_t t, int64_t k, int64_t cols, __m512 inverse,
                                   __m512i *fixed) {
  const auto *x = static_cast<const uint16_t *>(c.x) + t * c.x_stride + k;
  const uint64_t there = first_columns(min_of(cols - k, 64));
  const auto whole = [&](__m512i number) {
    return _mm512_cvtps_epi32(_mm512_mul_ps(_mm512_castsi512_ps(number), inverse));
  };
  for (int i = 0; i < 2; ++i) { // a word is two numbers: either is a float with the other taken away
    const __m512i words = _mm512_maskz_loadu_epi16(__mmask32(there >> 32 * i), x + 32 * i);
    const __m512i odd = whole(_mm512_maskz_mov_epi16(0xAAAAAAAA, words)), even = whole(_mm512_slli_epi32(words, 16));
    fixed[i] = _mm512_mask_blend_epi16(0xAAAAAAAA, even, _mm512_slli_epi32(odd, 16));
  }
}

// 64 numbers of one token in fixed point, digits to base 256, the lowest in plane 0; 128 is added to every digit
template <int TYPE>
FIPS_INLINE void fixed_point(const fips_call &c, int64_t t, int64_t k, int64_t cols, __m512 inverse, int planes,
                             __m512i *digits) {
  // 128 more in every digit leave neither sign nor carry
  if (TYPE == FIPS_BF16 && planes == 2) {
    __m512i fixed[2];
    brain_fixed_point(c, t, k, cols, inverse, fixed);
    for (int i = 0; i < 2; ++i) fixed[i] = _mm512_add_epi16(fixed[i], _mm512_set1_epi16(short(0x8080)));
    for (int plane = 0; plane < planes; ++plane) {
      const __m512i places = _mm512_add_epi8(_mm512_load_si512(digit_places.of_halves), _mm512_set1_epi8(char(plane)));
      digits[plane] = _mm512_permutex2var_epi8(fixed[0], places, fixed[1]);
    }
    return;
  }
  __m512 x[4];
  __m512i fixed[4];
  read_floats<TYPE>(c, t, k, cols, x);
  for (int i = 0; i < 4; ++i)
    fixed[i] = _mm512_add_epi32(_mm512_cvtps_epi32(_mm512_mul_ps(x[i], inverse)),
                                _mm512_set1_epi32(planes == 2 ? 0x8080 : 0x808080));
  for (int plane = 0; plane < planes; ++plane) {
    const __m512i places = _mm512_add_epi8(_mm512_load_si512(digit_places.of_words), _mm512_set1_epi8(char(plane)));
    const __m512i low = _mm512_permutex2var_epi8(fixed[0], places, fixed[1]);
    const __m512i upper = _mm512_permutex2var_epi8(fixed[2], places, fixed[3]);
    digits[plane] = _mm512_inserti64x4(low, _mm512_castsi512_si256(upper), 1);
  }
}

// 64 numbers of one token as signed bytes with one scale
FIPS_INLINE __m512i block_digits(const fips_call &c, int64_t t, int64_t k, int64_t cols, float *scale) {
  __m512 x[4];
  with_type(c, [&](auto type) { read_floats<decltype(type)::value>(c, t, k, cols, x); });
  const __m512 pairs[2] = {_mm512_max_ps(_mm512_abs_ps(x[0]), _mm512_abs_ps(x[1])),
                           _mm512_max_ps(_mm512_abs_ps(x[2]), _mm512_abs_ps(x[3]))};
  *scale = fixed_scale(_mm512_reduce_max_ps(_mm512_max_ps(pairs[0], pairs[1])), 1);
  const __m512 inverse = _mm512_set1_ps(1 / *scale);
  __m128i parts[4];
  for (int i = 0; i < 4; ++i)
    parts[i] = _mm512_cvtepi32_epi8(_mm512_cvtps_epi32(_mm512_mul_ps(x[i], inverse)));
  const __m256i low = _mm256_set_m128i(parts[1], parts[0]), high = _mm256_set_m128i(parts[3], parts[2]);
  return _mm512_inserti64x4(_mm512_castsi256_si512(low), high, 1);
}

} // namespace
