// Registers of 256 bits: those of AVX2, or pairs of NEON's under the same names.
#pragma once
#include "packed.h"

#if defined(__aarch64__)
#include "neon256.h"
#else
#include <immintrin.h>
#endif

namespace {

// Whether bytes with signs are multiplied by moving those of one side to the other.
#if defined(__aarch64__)
constexpr bool signs_are_moved = false;
#else
constexpr bool signs_are_moved = true;
#endif

// Whether one instruction multiplies four bytes by four, one side without a sign, and adds them to a sum. Numbers beside
// 8-bit inputs are then `kBias` more than they mean, so that they have no sign.
#if defined(__AVXVNNI__) || defined(FIPS_EMULATE_AVX_VNNI)
#define FIPS_DOTS_OF_BYTES
constexpr bool dots_of_bytes = true;
#else
constexpr bool dots_of_bytes = false;
#endif
constexpr int kBias = dots_of_bytes ? 128 : 0;

// Bytes with `kBias` added, which is their highest bit turned.
FIPS_INLINE __m256i biased(__m256i bytes) { return kBias ? _mm256_xor_si256(bytes, _mm256_set1_epi8(char(kBias))) : bytes; }

#if defined(FIPS_DOTS_OF_BYTES)
// In the register where the sum is: GCC 12 copies sums where the intrinsic is called (see `add_products`).
FIPS_INLINE __m256i add_dots(__m256i sum, __m256i bytes, __m256i with_sign) {
#if defined(__GNUC__) && defined(__AVXVNNI__)
  __asm__("%{vex%} vpdpbusd %2, %1, %0" : "+x"(sum) : "x"(bytes), "x"(with_sign));
  return sum;
#else
  return _mm256_dpbusd_avx_epi32(sum, bytes, with_sign);
#endif
}
#endif

// Bytes of a table of 16, which both halves of `table` hold, at places below 16.
FIPS_INLINE __m256i look_up(__m256i table, __m256i places) {
#if defined(__aarch64__)
  return halves(table, places, [](int8x16_t t, int8x16_t p) { return vqtbl1q_s8(t, unsigned_bytes(p)); });
#else
  return _mm256_shuffle_epi8(table, places);
#endif
}

// Of a table of 32, at places below 32.
FIPS_INLINE __m256i look_up(__m256i first, __m256i second, __m256i places) {
#if defined(__aarch64__)
  const int8x16x2_t table = {{first.low, second.low}};
  return halves(places, [&](int8x16_t p) { return vqtbl2q_s8(table, unsigned_bytes(p)); });
#else
  const __m256i bit4 = _mm256_slli_epi16(places, 3);
  return _mm256_blendv_epi8(_mm256_shuffle_epi8(first, places), _mm256_shuffle_epi8(second, places), bit4);
#endif
}

// Of tables of 32 or 64, at places that `turned_place` has made ready: a byte shuffle gives 0 where the highest bit of a
// place is set, which then says itself which of two tables has a say, without a shift.
inline uint8_t turned_place(int place) {
#if defined(__aarch64__)
  return uint8_t(place);
#else
  return uint8_t((place & 15) | (place >> 4 & 1) << 7 | (place >> 5 & 1) << 6);
#endif
}
template <int PARTS> FIPS_INLINE __m256i look_up_turned(const __m256i (&tables)[PARTS], __m256i places) {
  static_assert(PARTS == 2 || PARTS == 4, "of 16 bytes each");
#if defined(__aarch64__)
  if constexpr (PARTS == 2) return look_up(tables[0], tables[1], places);
  else {
    const int8x16x4_t table = {{tables[0].low, tables[1].low, tables[2].low, tables[3].low}};
    return halves(places, [&](int8x16_t p) { return vqtbl4q_s8(table, unsigned_bytes(p)); });
  }
#else
  const __m256i others = _mm256_xor_si256(places, _mm256_set1_epi8(char(0x80)));
  const auto of_two = [&](int first) {
    return _mm256_or_si256(_mm256_shuffle_epi8(tables[first], places), _mm256_shuffle_epi8(tables[first + 1], others));
  };
  if constexpr (PARTS == 2) return of_two(0);
  else return _mm256_blendv_epi8(of_two(0), of_two(2), _mm256_add_epi8(places, places)); // by bit 6
#endif
}

// Words of 16 bits, each shifted by a count of its own, which AVX2 has no instruction for: products with powers of two
// do it, or their upper halves. A table holds what `up_by` and `down_by` make of the counts.
#if defined(__aarch64__)
constexpr uint16_t up_by(int count) { return uint16_t(count); }
constexpr uint16_t down_by(int count) { return uint16_t(-count); }
FIPS_INLINE __m256i each_shifted(__m256i words, __m256i counts) {
  return halves(words, counts, [](int8x16_t x, int8x16_t n) {
    return bytes(vshlq_u16(vreinterpretq_u16_s8(x), vreinterpretq_s16_s8(n)));
  });
}
FIPS_INLINE __m256i each_up(__m256i words, __m256i table) { return each_shifted(words, table); }
FIPS_INLINE __m256i each_down(__m256i words, __m256i table) { return each_shifted(words, table); }
#else
constexpr uint16_t up_by(int count) { return uint16_t(1 << count); }
constexpr uint16_t down_by(int count) { return uint16_t(1 << (16 - count)); } // of at least 1
FIPS_INLINE __m256i each_up(__m256i words, __m256i table) { return _mm256_mullo_epi16(words, table); }
FIPS_INLINE __m256i each_down(__m256i words, __m256i table) { return _mm256_mulhi_epu16(words, table); }
#endif

// Words of 16 bits of the upper half moved down, so that those of the lower stay in line with them.
template <int COUNT> FIPS_INLINE __m256i upper_half_down(__m256i v) {
#if defined(__aarch64__)
  return {v.low, shifted_down_half<COUNT>(v.high)};
#else
  return _mm256_srlv_epi32(v, _mm256_setr_epi32(0, 0, 0, 0, COUNT, COUNT, COUNT, COUNT));
#endif
}

// The sums of four neighbouring products of bytes; of `b` none is -128.
FIPS_INLINE __m256i byte_products(__m256i a, __m256i b) {
#if defined(__aarch64__)
  return halves(a, b, [](int8x16_t x, int8x16_t y) { return bytes(vdotq_s32(vdupq_n_s32(0), x, y)); });
#else // one side without sign, which the other takes
  const __m256i pairs = _mm256_maddubs_epi16(_mm256_abs_epi8(a), _mm256_sign_epi8(b, a));
  return _mm256_madd_epi16(pairs, _mm256_set1_epi16(1));
#endif
}

} // namespace
