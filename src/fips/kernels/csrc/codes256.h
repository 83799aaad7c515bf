// Codes of 2 to 7 bits of matrices without a pattern, 32 at a time from whole bytes.
#pragma once
#include "values256.h"

namespace {

// Whether rows are made of whole runs of 64 columns, and so begin with whole bytes.
inline bool reads_whole(const fips_matrix &a) {
  return a.format == FIPS_FULL && a.value_type == FIPS_I8 && a.cols % 64 == 0;
}

// 32 numbers in the order of `Codes`, as floats in that of their columns.
FIPS_INLINE void as_floats(__m256i all, __m256 (&to)[4]) {
  const __m128i one = _mm256_castsi256_si128(all), two = _mm256_extracti128_si256(all, 1);
  to[0] = _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(one));
  to[1] = _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(two));
  to[2] = _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_unpackhi_epi64(one, one)));
  to[3] = _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_unpackhi_epi64(two, two)));
}

// Codes of 16 columns in the lowest or highest bits of 16-bit lanes: a byte shuffle brings two bytes that hold a code
// into each lane, a product shifts it to the top.
template <int BITS> struct Windows {
  alignas(32) uint8_t place[32] = {};
  alignas(32) uint16_t factor[16] = {};
  constexpr Windows() {
    for (int i = 0; i < 16; ++i) {
      const int bit = i * BITS;
      place[2 * i] = uint8_t(bit / 8), place[2 * i + 1] = uint8_t(bit / 8 + 1);
      factor[i] = uint16_t(1 << (16 - BITS - bit % 8));
    }
  }
};
template <int BITS> constexpr Windows<BITS> windows;

// Reads 32 numbers; `LEVELS`: codes are looked up, of 4 bits always.
template <int BITS, bool LEVELS> struct Codes {
  static constexpr int bytes = 4 * BITS; // of 32 codes
  __m256i low, high;                     // the numbers of the codes as they lie in the stream, below 16 and from there on
  const uint8_t *end;
  explicit Codes(const fips_matrix &a) : end(static_cast<const uint8_t *>(a.values) + a.value_bytes) {
    alignas(32) int8_t table[32] = {};
    for (int i = 0; LEVELS && !a.memory && i < 1 << BITS; ++i) table[i] = int8_t(number_of(a, i));
    low = _mm256_broadcastsi128_si256(_mm_load_si128(reinterpret_cast<const __m128i *>(table)));
    high = _mm256_broadcastsi128_si256(_mm_load_si128(reinterpret_cast<const __m128i *>(table + 16)));
  }
  FIPS_INLINE static __m256i top(const uint8_t *from) {
    const __m256i raw = _mm256_broadcastsi128_si256(_mm_loadu_si128(reinterpret_cast<const __m128i *>(from)));
    const __m256i places = _mm256_load_si256(reinterpret_cast<const __m256i *>(windows<BITS>.place));
    const __m256i factors = _mm256_load_si256(reinterpret_cast<const __m256i *>(windows<BITS>.factor));
    return _mm256_mullo_epi16(_mm256_shuffle_epi8(raw, places), factors);
  }
  // Codes as they lie in the stream, of columns 0 to 7, 16 to 23, 8 to 15 and 24 to 31.
  FIPS_INLINE static __m256i fields(const uint8_t *from) {
    if constexpr (BITS == 4) {
      const __m128i pairs = _mm_loadu_si128(reinterpret_cast<const __m128i *>(from)), mask = _mm_set1_epi8(15);
      const __m128i even = _mm_and_si128(pairs, mask), odd = _mm_and_si128(_mm_srli_epi16(pairs, 4), mask);
      const __m256i codes = _mm256_set_m128i(_mm_unpackhi_epi8(even, odd), _mm_unpacklo_epi8(even, odd));
      return _mm256_permute4x64_epi64(codes, 0xD8);
    } else {
      const __m256i first = _mm256_srli_epi16(top(from), 16 - BITS);
      return _mm256_packus_epi16(first, _mm256_srli_epi16(top(from + 2 * BITS), 16 - BITS));
    }
  }
  // The numbers of these columns.
  FIPS_INLINE __m256i numbers(const uint8_t *from) const {
    if constexpr (BITS == 4 || LEVELS) {
      if constexpr (BITS < 5) return look_up(low, fields(from));
      return look_up(low, high, fields(from));
    } else {
      return _mm256_packs_epi16(_mm256_srai_epi16(top(from), 16 - BITS),
                                _mm256_srai_epi16(top(from + 2 * BITS), 16 - BITS));
    }
  }
  // `from`, or a copy of its last bytes where 16 would leave the stream.
  FIPS_INLINE const uint8_t *within(const uint8_t *from, uint8_t (&last)[64]) const {
    if (BITS == 4 || from + 2 * BITS + 16 <= end) return from;
    std::memcpy(last, from, bytes);
    return last;
  }
  FIPS_INLINE __m256i read(const uint8_t *from) const {
    alignas(32) uint8_t last[64];
    return numbers(within(from, last));
  }
};

struct WholeBytes { // integers of 8 bits, in the order of `Codes`
  static constexpr int bytes = 32;
  explicit WholeBytes(const fips_matrix &) {}
  FIPS_INLINE static __m256i read(const uint8_t *from) {
    return _mm256_permute4x64_epi64(_mm256_loadu_si256(reinterpret_cast<const __m256i *>(from)), 0xD8);
  }
};

enum class Scales { none, fine, wide }; // of a row alone, and of groups of less than 64 columns or more

} // namespace
