// Inputs of 8 bits beside integers, whose numbers need not be looked up: as processors of x86 multiply them with fewest
// instructions. Their products of bytes want one side without a sign, for which levels have to be turned.
#pragma once
#include "inputs256.h"

namespace {

#if defined(__aarch64__)
template <Scales SCALES, int BITS> struct WordInputs;
template <Scales SCALES, class Codes> struct UnsignedInputs;
#else

// Beside 64 numbers of `BITS` bits at the top of words of 16 bits, which takes less than to make bytes of them: the digits
// are words, too.
template <Scales SCALES, int BITS> struct WordInputs {
  static constexpr Scales kind = SCALES;
  using Numbers = __m256i[4];
  const int16_t *digits;
  const float *scales; // of 64 digits, times the lowest bit of a number
  int64_t cols;

  template <int T> static WordInputs of(const fips_matrix &a, const float *x, float *scales) {
    auto *digits = scratch<int16_t>(Scratch::bytes, T * a.cols);
    digits_of(x, T * a.cols, digits, scales);
    for (int64_t i = 0; i < T * a.cols / 64; ++i) scales[i] *= 1.0f / float(1 << (16 - BITS));
    return {digits, scales, a.cols};
  }

  template <int T, int CHAINS>
  FIPS_INLINE void add(const __m256i (&words)[4], int64_t k, const RowGroups &groups, const BlockScales<T, SCALES> &by, int64_t block,
                       __m256 (&acc)[T][CHAINS]) const {
#pragma GCC unroll 4
    for (int t = 0; t < T; ++t) {
      const auto *from = reinterpret_cast<const __m256i *>(digits + t * cols + k);
      const float scale = by.at(t, block, scales, cols, k);
      __m256i sums[4];
#pragma GCC unroll 4
      for (int i = 0; i < 4; ++i) sums[i] = _mm256_madd_epi16(words[i], _mm256_load_si256(from + i));
      if constexpr (SCALES != Scales::fine) {
        const __m256i sum = _mm256_add_epi32(_mm256_add_epi32(sums[0], sums[1]), _mm256_add_epi32(sums[2], sums[3]));
        acc[t][0] = _mm256_fmadd_ps(_mm256_cvtepi32_ps(sum), _mm256_set1_ps(scale), acc[t][0]);
      } else {
#pragma GCC unroll 4
        for (int i = 0; i < 4; ++i)
          acc[t][i % CHAINS] = _mm256_fmadd_ps(_mm256_cvtepi32_ps(sums[i]), _mm256_set1_ps(groups.at(k + 16 * i) * scale),
                                               acc[t][i % CHAINS]);
      }
    }
  }
};

// Beside numbers that are `offset` more than they mean, which makes them no less than 0: what that adds to the sums is
// the same for all rows.
template <Scales SCALES, class Codes> struct UnsignedInputs {
  static constexpr Scales kind = SCALES;
  static constexpr bool together = SCALES != Scales::fine || alike(Codes::order);
  static constexpr int sums = together ? 1 : 2; // of 64 columns
  struct Numbers {
    __m256i of[2];
  };
  const int8_t *digits;
  const __m256i *surplus; // of 64 digits
  const float *scales;
  int64_t cols;

  template <int T> static UnsignedInputs of(const fips_matrix &a, const float *x, float *scales) {
    const int8_t *digits = digits_in_order<T, Codes>(a, x, scales);
    auto *surplus = scratch<__m256i>(Scratch::sums, sums * T * a.cols / 64);
    const __m256i offset = _mm256_set1_epi8(Codes::offset);
    for (int64_t i = 0; i < T * a.cols / 64; ++i) {
      __m256i found[sums];
      products({{offset, offset}}, digits + 64 * i, found);
      for (int s = 0; s < sums; ++s) surplus[sums * i + s] = found[s];
    }
    return {digits, surplus, scales, a.cols};
  }

  // Sums of 16 bits hold four products of numbers of at most 6 bits.
  FIPS_INLINE static void products(const Numbers &numbers, const int8_t *digits, __m256i (&to)[sums]) {
    const auto *from = reinterpret_cast<const __m256i *>(digits);
    const __m256i ones = _mm256_set1_epi16(1);
    const __m256i first = _mm256_maddubs_epi16(numbers.of[0], _mm256_load_si256(from));
    const __m256i second = _mm256_maddubs_epi16(numbers.of[1], _mm256_load_si256(from + 1));
    to[0] = _mm256_madd_epi16(together ? _mm256_add_epi16(first, second) : first, ones);
    if constexpr (!together) to[1] = _mm256_madd_epi16(second, ones);
  }

  template <int T, int CHAINS>
  FIPS_INLINE void add(const Numbers &numbers, int64_t k, const RowGroups &groups, const BlockScales<T, SCALES> &by, int64_t block,
                       __m256 (&acc)[T][CHAINS]) const {
    static_assert(Codes::bits <= 6, "there is no room for more");
    const __m256 four = SCALES == Scales::fine ? four_scales(groups, k) : _mm256_setzero_ps();
#pragma GCC unroll 4
    for (int t = 0; t < T; ++t) {
      const __m256i *more = surplus + (t * cols + k) / 64 * sums;
      __m256i found[sums];
      products(numbers, digits + t * cols + k, found);
      const __m256 scale = _mm256_set1_ps(by.at(t, block, scales, cols, k));
#pragma GCC unroll 2
      for (int s = 0; s < sums; ++s) {
        const __m256i sum = _mm256_sub_epi32(found[s], _mm256_load_si256(more + s));
        const __m256 each = SCALES == Scales::fine ? sums_of<Codes::order>[s].take(_mm256_mul_ps(four, scale)) : scale;
        acc[t][0] = _mm256_fmadd_ps(_mm256_cvtepi32_ps(sum), each, acc[t][0]);
      }
    }
  }
};

#endif

} // namespace
