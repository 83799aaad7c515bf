#include "avx512.h"
#include "columns.h"

bool fips_avx512(const fips_matrix &a, const fips_call &c) { return run_avx512(a, c); }

void fips_widen_avx512(const uint8_t *stream, int64_t bytes, int bits, int64_t first, int64_t count, int8_t *to) {
  alignas(64) uint8_t places[64];
  for (int i = 0; i < 64; ++i) places[i] = uint8_t(i / 8 * bits + i % 8);
  const __m512i spread = _mm512_load_si512(places);
  uint64_t starts = 0; // bit positions of the 8 numbers of a word
  for (int j = 0; j < 8; ++j) starts |= uint64_t(bits * j) << 8 * j;
  const __m512i shifts = _mm512_set1_epi64(int64_t(starts));
  const __m512i mask = _mm512_set1_epi8(char((1 << bits) - 1)), sign = _mm512_set1_epi8(char(1 << (bits - 1)));
  const uint8_t *from = stream + first * bits / 8;
  int64_t left = bytes - first * bits / 8;
  for (int64_t i = 0; i < count; i += 64, from += 8 * bits, left -= 8 * bits) {
    const __m512i packed = _mm512_maskz_loadu_epi8(first_columns(left < 8 * bits ? left : 8 * bits), from);
    const __m512i words = _mm512_permutexvar_epi8(spread, packed);
    const __m512i fields = _mm512_and_si512(_mm512_multishift_epi64_epi8(shifts, words), mask);
    const __m512i numbers = _mm512_sub_epi8(_mm512_xor_si512(fields, sign), sign);
    _mm512_mask_storeu_epi8(to + i, first_columns(count - i), numbers);
  }
}

bool fips_columns_avx512(const fips_matrix &a, const fips_call &c) { return columns_path<Vector16>(a, c); }
