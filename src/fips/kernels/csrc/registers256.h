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

// Of a table of 64, at places below 64.
FIPS_INLINE __m256i look_up(const __m256i (&tables)[4], __m256i places) {
#if defined(__aarch64__)
  const int8x16x4_t table = {{tables[0].low, tables[1].low, tables[2].low, tables[3].low}};
  return halves(places, [&](int8x16_t p) { return vqtbl4q_s8(table, unsigned_bytes(p)); });
#else
  const __m256i low = look_up(tables[0], tables[1], places), high = look_up(tables[2], tables[3], places);
  return _mm256_blendv_epi8(low, high, _mm256_slli_epi16(places, 2));
#endif
}

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
