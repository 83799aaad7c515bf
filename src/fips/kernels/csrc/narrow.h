// Integers of 2 to 7 bits of matrices kept whole, 64 at a time from the stream to a register, with VBMI.
//
// 8 of them lie in as many bytes as they have bits: a byte shuffle brings these bytes into each 64-bit lane, and one
// multishift puts every integer into the high bits of a byte. `unit` undoes that.
#pragma once
#include <immintrin.h>

#include "packed.h"

namespace {

struct NarrowTables {
  alignas(64) uint8_t places[8][64] = {};    // by bits
  alignas(64) uint8_t shifts[8][8][64] = {}; // by bits and the bit within a byte where the first integer begins
  constexpr NarrowTables() {
    for (int bits = 2; bits < 8; ++bits)
      for (int i = 0; i < 64; ++i) {
        places[bits][i] = uint8_t(i / 8 * bits + i % 8);
        for (int first = 0; first < 8; ++first)
          shifts[bits][first][i] = uint8_t((i % 8 * bits + first + bits - 8) & 63);
      }
  }
};
constexpr NarrowTables narrow_tables;

struct NarrowCursor {
  static constexpr bool narrow = true;
  const uint8_t *at, *last; // `last`: from here on 64 bytes would leave the stream
  int64_t step;             // bytes of 64 integers, which is why `shifts` stay
  __m512i places, shifts, high;
  NarrowCursor(const fips_matrix &a, int64_t first) {
    const int bits = int(a.value_bits);
    const auto *stream = static_cast<const uint8_t *>(a.values);
    at = stream + (first * bits >> 3);
    last = stream + (a.num_values * bits + 7) / 8 - 64;
    step = 8 * bits;
    places = _mm512_load_si512(narrow_tables.places[bits]);
    shifts = _mm512_load_si512(narrow_tables.shifts[bits][first * bits & 7]);
    high = _mm512_set1_epi8(char(0xFF << (8 - bits)));
  }
  static float unit(const fips_matrix &a) { return 1.0f / float(1 << (8 - a.value_bits)); }
  FIPS_INLINE void prefetch() const { _mm_prefetch(reinterpret_cast<const char *>(at) + 1024, _MM_HINT_T0); }
  FIPS_INLINE __m512i next() { // 64 of them
    const __m512i raw =
        at <= last ? _mm512_loadu_si512(at) : _mm512_maskz_loadu_epi8(first_columns(last + 64 - at), at);
    const __m512i fields = _mm512_multishift_epi64_epi8(shifts, _mm512_permutexvar_epi8(places, raw));
    at += step;
    return _mm512_and_si512(fields, high);
  }
};

} // namespace
