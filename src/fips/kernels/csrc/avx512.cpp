// AVX-512 without bf16 dot products: the direct and the tokens path, and what other variants share.
#include "dense_basis.h"
#include "digits512.h"
#include "exact.h"
#include "magnitudes.h"
#include "paths.h"
#include "sparse_tokens.h"

namespace {

struct Vector16 {
  static constexpr int width = 16;
  using type = __m512;
  static type load(const float *from) { return _mm512_load_ps(from); }
  template <class Values> static type read(const typename Values::type *from) {
    if constexpr (std::is_same_v<Values, F32Values>) {
      return _mm512_loadu_ps(from);
    } else if constexpr (std::is_same_v<Values, BF16Values>) {
      const __m256i half = _mm256_loadu_si256(reinterpret_cast<const __m256i *>(from));
      return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(half), 16));
    } else if constexpr (std::is_same_v<Values, F16Values>) {
      return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i *>(from)));
    } else {
      return _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i *>(from))));
    }
  }
  static void store(float *to, type v) { _mm512_store_ps(to, v); }
  static type set(float value) { return _mm512_set1_ps(value); }
  static type fma(type a, type b, type c) { return _mm512_fmadd_ps(a, b, c); }
};

template <class One, class Two, class Three> bool byte_path(const fips_matrix &a, const fips_call &c) {
  switch (fixed_planes(c)) {
  case 1: return digits_path<One>(a, c);
  case 2: return a.scale_group ? direct_path<GroupedDot<Two, 2>>(a, c) : direct_path<Two>(a, c);
  default: return a.scale_group ? direct_path<GroupedDot<Three, 3>>(a, c) : direct_path<Three>(a, c);
  }
}

template <class Cursor> bool narrow_path(const fips_matrix &a, const fips_call &c) {
  return byte_path<NarrowDot<1, Cursor>, NarrowDot<2, Cursor>, NarrowDot<3, Cursor>>(a, c);
}

bool direct_path(const fips_matrix &a, const fips_call &c) {
  switch (a.value_type) {
  case FIPS_F32: return direct_path<FloatDot>(a, c);
  case FIPS_F16: return direct_path<HalfDot>(a, c);
  case FIPS_I8:
    if (fixed_planes(c) == 1 && fips_avx512_pairs(a, c)) return true;
    if (a.value_bits == 8) return byte_path<ByteDot<1>, ByteDot<2>, ByteDot<3>>(a, c);
    if (a.memory == 2) return narrow_path<RecalledCursor<2>>(a, c);
    if (a.memory == 3) return narrow_path<RecalledCursor<3>>(a, c);
    return a.format == FIPS_FULL ? narrow_path<NarrowCursor>(a, c) : narrow_path<KeptCursor>(a, c);
  default: return direct_path<BrainDot>(a, c);
  }
}

} // namespace

bool fips_avx512(const fips_matrix &a, const fips_call &c) {
  switch (c.path) {
  case FIPS_DIRECT: return direct_path(a, c);
  case FIPS_TILES: return fips_avx512_tiles(a, c);
  default: return tokens_path<Vector16>(a, c);
  }
}

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

uint32_t fips_magnitude_avx512(const fips_call &c, int64_t t) { return largest_magnitude(c, t); }

bool fips_columns_avx512(const fips_matrix &a, const fips_call &c) { return columns_path<Vector16>(a, c); }
