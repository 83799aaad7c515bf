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
  const uint8_t *stream;
  int64_t bytes, bit;
  int bits;
  __m512i places, high;
  NarrowCursor(const fips_matrix &a, int64_t first)
      : stream(static_cast<const uint8_t *>(a.values)), bytes((a.num_values * a.value_bits + 7) / 8),
        bit(first * a.value_bits), bits(int(a.value_bits)), places(_mm512_load_si512(narrow_tables.places[bits])),
        high(_mm512_set1_epi8(char(0xFF << (8 - bits)))) {}
  static float unit(const fips_matrix &a) { return 1.0f / float(1 << (8 - a.value_bits)); }
  FIPS_INLINE void prefetch() const {
    _mm_prefetch(reinterpret_cast<const char *>(stream) + (bit >> 3) + 1024, _MM_HINT_T0);
  }
  FIPS_INLINE __m512i next() { // 64 of them
    const int64_t byte = bit >> 3;
    const __m512i raw = byte + 64 <= bytes ? _mm512_loadu_si512(stream + byte)
                                           : _mm512_maskz_loadu_epi8(first_columns(bytes - byte), stream + byte);
    const __m512i lanes = _mm512_permutexvar_epi8(places, raw);
    const __m512i fields = _mm512_multishift_epi64_epi8(_mm512_load_si512(narrow_tables.shifts[bits][bit & 7]), lanes);
    bit += 64 * bits;
    return _mm512_and_si512(fields, high);
  }
};

} // namespace
