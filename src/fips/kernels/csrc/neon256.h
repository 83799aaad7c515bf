// The instructions of AVX2 that the kernels of 256 bits use, on ARM: a register is a pair of NEON's.
//
// Under Intel's names, so that one source serves both, and only as far as the kernels use them: orders of lanes that they
// do not ask for are refused by the compiler. What one side does in one instruction and the other in several has a name
// of its own in registers256.h.
#pragma once
#include <arm_neon.h>

#include <cstdint>

#include "packed.h"

namespace {

using __m128 = float32x4_t;
using __m128i = int8x16_t;
struct __m256 {
  float32x4_t low, high;
};
struct __m256i {
  int8x16_t low, high;
};

FIPS_INLINE int16x8_t words(int8x16_t v) { return vreinterpretq_s16_s8(v); }
FIPS_INLINE int32x4_t integers(int8x16_t v) { return vreinterpretq_s32_s8(v); }
FIPS_INLINE int64x2_t longs(int8x16_t v) { return vreinterpretq_s64_s8(v); }
FIPS_INLINE uint8x16_t unsigned_bytes(int8x16_t v) { return vreinterpretq_u8_s8(v); }
FIPS_INLINE int8x16_t bytes(int16x8_t v) { return vreinterpretq_s8_s16(v); }
FIPS_INLINE int8x16_t bytes(uint16x8_t v) { return vreinterpretq_s8_u16(v); }
FIPS_INLINE int8x16_t bytes(int32x4_t v) { return vreinterpretq_s8_s32(v); }
FIPS_INLINE int8x16_t bytes(uint32x4_t v) { return vreinterpretq_s8_u32(v); }
FIPS_INLINE int8x16_t bytes(int64x2_t v) { return vreinterpretq_s8_s64(v); }
FIPS_INLINE int8x16_t bytes(uint8x16_t v) { return vreinterpretq_s8_u8(v); }
FIPS_INLINE int8x16_t bytes(float32x4_t v) { return vreinterpretq_s8_f32(v); }

// Both halves by the same body.
template <class V, class Body> FIPS_INLINE __m256i halves(const V &v, Body &&body) { return {body(v.low), body(v.high)}; }
template <class Body> FIPS_INLINE __m256i halves(const __m256i &v, const __m256i &w, Body &&body) {
  return {body(v.low, w.low), body(v.high, w.high)};
}

// ---- one register of NEON

FIPS_INLINE __m128i _mm_loadu_si128(const __m128i *from) { return vld1q_s8(reinterpret_cast<const int8_t *>(from)); }
FIPS_INLINE __m128i _mm_load_si128(const __m128i *from) { return _mm_loadu_si128(from); }
FIPS_INLINE __m128i _mm_loadl_epi64(const __m128i *from) {
  return vcombine_s8(vld1_s8(reinterpret_cast<const int8_t *>(from)), vdup_n_s8(0));
}
FIPS_INLINE void _mm_store_si128(__m128i *to, __m128i v) { vst1q_s8(reinterpret_cast<int8_t *>(to), v); }
FIPS_INLINE __m128i _mm_set1_epi8(char value) { return vdupq_n_s8(int8_t(value)); }
FIPS_INLINE __m128i _mm_cvtsi32_si128(int value) { return bytes(vsetq_lane_s32(value, vdupq_n_s32(0), 0)); }
FIPS_INLINE __m128i _mm_and_si128(__m128i a, __m128i b) { return vandq_s8(a, b); }
FIPS_INLINE __m128i _mm_unpacklo_epi8(__m128i a, __m128i b) { return vzip1q_s8(a, b); }
FIPS_INLINE __m128i _mm_unpackhi_epi8(__m128i a, __m128i b) { return vzip2q_s8(a, b); }
FIPS_INLINE __m128i _mm_unpackhi_epi64(__m128i a, __m128i b) { return bytes(vzip2q_s64(longs(a), longs(b))); }
template <int COUNT> FIPS_INLINE __m128i shifted_down_half(__m128i v) {
  return bytes(vshrq_n_u16(vreinterpretq_u16_s8(v), COUNT));
}
#define _mm_srli_epi16(v, count) shifted_down_half<(count)>(v)

FIPS_INLINE __m128 _mm_add_ps(__m128 a, __m128 b) { return vaddq_f32(a, b); }
FIPS_INLINE __m128 _mm_movehl_ps(__m128 a, __m128 b) { return vcombine_f32(vget_high_f32(b), vget_high_f32(a)); }
FIPS_INLINE __m128 _mm_movehdup_ps(__m128 v) { return vtrn2q_f32(v, v); }
FIPS_INLINE __m128 _mm_add_ss(__m128 a, __m128 b) { // of the others nothing is asked
  return vaddq_f32(a, b);
}
FIPS_INLINE float _mm_cvtss_f32(__m128 v) { return vgetq_lane_f32(v, 0); }

// ---- floats

FIPS_INLINE __m256 _mm256_loadu_ps(const float *from) { return {vld1q_f32(from), vld1q_f32(from + 4)}; }
FIPS_INLINE __m256 _mm256_load_ps(const float *from) { return _mm256_loadu_ps(from); }
FIPS_INLINE void _mm256_storeu_ps(float *to, __m256 v) { vst1q_f32(to, v.low), vst1q_f32(to + 4, v.high); }
FIPS_INLINE void _mm256_store_ps(float *to, __m256 v) { _mm256_storeu_ps(to, v); }
FIPS_INLINE __m256 _mm256_set1_ps(float value) { return {vdupq_n_f32(value), vdupq_n_f32(value)}; }
FIPS_INLINE __m256 _mm256_setzero_ps() { return _mm256_set1_ps(0); }
FIPS_INLINE __m256 _mm256_setr_ps(float a, float b, float c, float d, float e, float f, float g, float h) {
  const float lanes[8] = {a, b, c, d, e, f, g, h};
  return _mm256_loadu_ps(lanes);
}
FIPS_INLINE __m256 _mm256_add_ps(__m256 a, __m256 b) { return {vaddq_f32(a.low, b.low), vaddq_f32(a.high, b.high)}; }
FIPS_INLINE __m256 _mm256_sub_ps(__m256 a, __m256 b) { return {vsubq_f32(a.low, b.low), vsubq_f32(a.high, b.high)}; }
FIPS_INLINE __m256 _mm256_min_ps(__m256 a, __m256 b) { return {vminq_f32(a.low, b.low), vminq_f32(a.high, b.high)}; }
FIPS_INLINE __m256 _mm256_div_ps(__m256 a, __m256 b) { return {vdivq_f32(a.low, b.low), vdivq_f32(a.high, b.high)}; }
FIPS_INLINE __m256 _mm256_mul_ps(__m256 a, __m256 b) { return {vmulq_f32(a.low, b.low), vmulq_f32(a.high, b.high)}; }
FIPS_INLINE __m256 _mm256_fmadd_ps(__m256 a, __m256 b, __m256 c) {
  return {vfmaq_f32(c.low, a.low, b.low), vfmaq_f32(c.high, a.high, b.high)};
}
FIPS_INLINE __m256 _mm256_max_ps(__m256 a, __m256 b) { // the second where either is NaN
  return {vbslq_f32(vcgtq_f32(a.low, b.low), a.low, b.low), vbslq_f32(vcgtq_f32(a.high, b.high), a.high, b.high)};
}
FIPS_INLINE __m256 _mm256_andnot_ps(__m256 a, __m256 b) {
  const auto half = [](float32x4_t x, float32x4_t y) {
    return vreinterpretq_f32_u8(vbicq_u8(vreinterpretq_u8_f32(y), vreinterpretq_u8_f32(x)));
  };
  return {half(a.low, b.low), half(a.high, b.high)};
}
#define _mm256_extractf128_ps(v, half) ((half) ? (v).high : (v).low)
FIPS_INLINE __m128 _mm256_castps256_ps128(__m256 v) { return v.low; }
FIPS_INLINE __m256 _mm256_castsi256_ps(__m256i v) {
  return {vreinterpretq_f32_s8(v.low), vreinterpretq_f32_s8(v.high)};
}
FIPS_INLINE __m256 _mm256_cvtepi32_ps(__m256i v) {
  return {vcvtq_f32_s32(integers(v.low)), vcvtq_f32_s32(integers(v.high))};
}
FIPS_INLINE __m256i _mm256_cvtps_epi32(__m256 v) {
  return halves(v, [](float32x4_t x) { return bytes(vcvtnq_s32_f32(x)); });
}
FIPS_INLINE __m256 _mm256_cvtph_ps(__m128i v) {
  const float16x8_t half = vreinterpretq_f16_s8(v);
  return {vcvt_f32_f16(vget_low_f16(half)), vcvt_high_f32_f16(half)};
}

template <int ORDER> FIPS_INLINE __m256 swapped_lanes(__m256 v) {
  static_assert(ORDER == 0xB1 || ORDER == 0x4E, "neighbours or pairs");
  if constexpr (ORDER == 0xB1) return {vrev64q_f32(v.low), vrev64q_f32(v.high)};
  return {vextq_f32(v.low, v.low, 2), vextq_f32(v.high, v.high, 2)};
}
#define _mm256_permute_ps(v, order) swapped_lanes<(order)>(v)
template <int ORDER> FIPS_INLINE __m256 swapped_halves(__m256 v) {
  static_assert(ORDER == 1, "the halves of one register");
  return {v.high, v.low};
}
#define _mm256_permute2f128_ps(v, same, order) swapped_halves<(order)>(v)
template <int LANES> FIPS_INLINE __m256 joined_halves(__m256 a, __m256 b) {
  static_assert(LANES == 0xF0, "the lower half of one, the upper of the other");
  return {a.low, b.high};
}
#define _mm256_blend_ps(a, b, lanes) joined_halves<(lanes)>(a, b)

// ---- integers

FIPS_INLINE __m256i _mm256_loadu_si256(const __m256i *from) {
  const auto *one = reinterpret_cast<const int8_t *>(from);
  return {vld1q_s8(one), vld1q_s8(one + 16)};
}
FIPS_INLINE __m256i _mm256_load_si256(const __m256i *from) { return _mm256_loadu_si256(from); }
FIPS_INLINE void _mm256_storeu_si256(__m256i *to, __m256i v) {
  auto *one = reinterpret_cast<int8_t *>(to);
  vst1q_s8(one, v.low), vst1q_s8(one + 16, v.high);
}
FIPS_INLINE void _mm256_store_si256(__m256i *to, __m256i v) { _mm256_storeu_si256(to, v); }
FIPS_INLINE __m256i _mm256_broadcastsi128_si256(__m128i v) { return {v, v}; }
FIPS_INLINE __m256i _mm256_castsi128_si256(__m128i v) { return {v, v}; }
FIPS_INLINE __m128i _mm256_castsi256_si128(__m256i v) { return v.low; }
#define _mm256_extracti128_si256(v, half) ((half) ? (v).high : (v).low)
FIPS_INLINE __m256i _mm256_set_m128i(__m128i high, __m128i low) { return {low, high}; }
FIPS_INLINE __m256i _mm256_set1_epi8(char value) { return _mm256_broadcastsi128_si256(vdupq_n_s8(int8_t(value))); }
FIPS_INLINE __m256i _mm256_set1_epi16(short value) { return {bytes(vdupq_n_s16(value)), bytes(vdupq_n_s16(value))}; }
FIPS_INLINE __m256i _mm256_set1_epi32(int value) { return _mm256_broadcastsi128_si256(bytes(vdupq_n_s32(value))); }
FIPS_INLINE __m256i _mm256_set1_epi64x(long long value) {
  return _mm256_broadcastsi128_si256(bytes(vdupq_n_s64(value)));
}
FIPS_INLINE __m256i _mm256_setzero_si256() { return _mm256_set1_epi8(0); }
FIPS_INLINE __m256i _mm256_setr_epi32(int a, int b, int c, int d, int e, int f, int g, int h) {
  const int32_t lanes[8] = {a, b, c, d, e, f, g, h};
  return _mm256_loadu_si256(reinterpret_cast<const __m256i *>(lanes));
}
FIPS_INLINE __m256i _mm256_and_si256(__m256i a, __m256i b) { return {vandq_s8(a.low, b.low), vandq_s8(a.high, b.high)}; }
FIPS_INLINE __m256i _mm256_or_si256(__m256i a, __m256i b) { return {vorrq_s8(a.low, b.low), vorrq_s8(a.high, b.high)}; }
FIPS_INLINE __m256i _mm256_xor_si256(__m256i a, __m256i b) { return {veorq_s8(a.low, b.low), veorq_s8(a.high, b.high)}; }
FIPS_INLINE __m256i _mm256_add_epi32(__m256i a, __m256i b) {
  return halves(a, b, [](int8x16_t x, int8x16_t y) { return bytes(vaddq_s32(integers(x), integers(y))); });
}
FIPS_INLINE __m256i _mm256_sub_epi32(__m256i a, __m256i b) {
  return halves(a, b, [](int8x16_t x, int8x16_t y) { return bytes(vsubq_s32(integers(x), integers(y))); });
}
FIPS_INLINE __m256i _mm256_min_epi32(__m256i a, __m256i b) {
  return halves(a, b, [](int8x16_t x, int8x16_t y) { return bytes(vminq_s32(integers(x), integers(y))); });
}
FIPS_INLINE __m256i _mm256_add_epi8(__m256i a, __m256i b) { return {vaddq_s8(a.low, b.low), vaddq_s8(a.high, b.high)}; }
FIPS_INLINE __m256i _mm256_blendv_epi8(__m256i a, __m256i b, __m256i mask) { // by the highest bit of a byte
  const auto half = [](int8x16_t x, int8x16_t y, int8x16_t m) { return vbslq_s8(vcltzq_s8(m), y, x); };
  return {half(a.low, b.low, mask.low), half(a.high, b.high, mask.high)};
}

template <int COUNT> FIPS_INLINE __m256i shifted_up_words(__m256i v) {
  return halves(v, [](int8x16_t x) { return bytes(vshlq_n_s16(words(x), COUNT)); });
}
template <int COUNT> FIPS_INLINE __m256i shifted_down_words(__m256i v) {
  return halves(v, [](int8x16_t x) { return shifted_down_half<COUNT>(x); });
}
template <int COUNT> FIPS_INLINE __m256i signed_down_words(__m256i v) {
  return halves(v, [](int8x16_t x) { return bytes(vshrq_n_s16(words(x), COUNT)); });
}
template <int COUNT> FIPS_INLINE __m256i shifted_up(__m256i v) {
  return halves(v, [](int8x16_t x) { return bytes(vshlq_n_s32(integers(x), COUNT)); });
}
template <int COUNT> FIPS_INLINE __m256i signed_down(__m256i v) {
  return halves(v, [](int8x16_t x) { return bytes(vshrq_n_s32(integers(x), COUNT)); });
}
#define _mm256_slli_epi16(v, count) shifted_up_words<(count)>(v)
#define _mm256_srli_epi16(v, count) shifted_down_words<(count)>(v)
#define _mm256_srai_epi16(v, count) signed_down_words<(count)>(v)
#define _mm256_slli_epi32(v, count) shifted_up<(count)>(v)
#define _mm256_srai_epi32(v, count) signed_down<(count)>(v)
FIPS_INLINE __m256i _mm256_sllv_epi32(__m256i v, __m256i counts) {
  return halves(v, counts, [](int8x16_t x, int8x16_t n) { return bytes(vshlq_s32(integers(x), integers(n))); });
}
FIPS_INLINE __m256i _mm256_sra_epi32(__m256i v, __m128i count) {
  const int32x4_t down = vnegq_s32(vdupq_laneq_s32(integers(count), 0));
  return halves(v, [=](int8x16_t x) { return bytes(vshlq_s32(integers(x), down)); });
}
FIPS_INLINE __m256i _mm256_srl_epi32(__m256i v, __m128i count) {
  const int32x4_t down = vnegq_s32(vdupq_laneq_s32(integers(count), 0));
  return halves(v, [=](int8x16_t x) { return bytes(vshlq_u32(vreinterpretq_u32_s8(x), down)); });
}

FIPS_INLINE __m256i _mm256_cvtepi8_epi32(__m128i v) { // of the lowest eight
  const int16x8_t wide = vmovl_s8(vget_low_s8(v));
  return {bytes(vmovl_s16(vget_low_s16(wide))), bytes(vmovl_high_s16(wide))};
}
FIPS_INLINE __m256i _mm256_cvtepu8_epi32(__m128i v) { // of the lowest eight
  const uint16x8_t wide = vmovl_u8(vget_low_u8(unsigned_bytes(v)));
  return {bytes(vmovl_u16(vget_low_u16(wide))), bytes(vmovl_high_u16(wide))};
}
FIPS_INLINE __m256i _mm256_cvtepu16_epi32(__m128i v) {
  const uint16x8_t wide = vreinterpretq_u16_s8(v);
  return {bytes(vmovl_u16(vget_low_u16(wide))), bytes(vmovl_high_u16(wide))};
}
FIPS_INLINE __m256i _mm256_packs_epi32(__m256i a, __m256i b) {
  return halves(a, b, [](int8x16_t x, int8x16_t y) {
    return bytes(vcombine_s16(vqmovn_s32(integers(x)), vqmovn_s32(integers(y))));
  });
}
FIPS_INLINE __m256i _mm256_packs_epi16(__m256i a, __m256i b) {
  return halves(a, b, [](int8x16_t x, int8x16_t y) { return vcombine_s8(vqmovn_s16(words(x)), vqmovn_s16(words(y))); });
}
FIPS_INLINE __m256i _mm256_packus_epi16(__m256i a, __m256i b) {
  return halves(a, b, [](int8x16_t x, int8x16_t y) {
    return bytes(vcombine_u8(vqmovun_s16(words(x)), vqmovun_s16(words(y))));
  });
}

FIPS_INLINE __m256i _mm256_shuffle_epi8(__m256i table, __m256i places) { // 0 at places from 128 on
  return halves(table, places, [](int8x16_t t, int8x16_t p) {
    return bytes(vqtbl1q_u8(unsigned_bytes(t), vandq_u8(unsigned_bytes(p), vdupq_n_u8(0x8F))));
  });
}
template <int ORDER> FIPS_INLINE __m256i turned_quarters(__m256i v) {
  static_assert(ORDER == 0xD8, "0, 2, 1, 3");
  return {bytes(vzip1q_s64(longs(v.low), longs(v.high))), bytes(vzip2q_s64(longs(v.low), longs(v.high)))};
}
#define _mm256_permute4x64_epi64(v, order) turned_quarters<(order)>(v)
FIPS_INLINE __m256i _mm256_permutevar8x32_epi32(__m256i v, __m256i lanes) {
  const uint8x16x2_t table = {{unsigned_bytes(v.low), unsigned_bytes(v.high)}};
  return halves(lanes, [&](int8x16_t order) {
    const int32x4_t first = vmulq_s32(vandq_s32(integers(order), vdupq_n_s32(7)), vdupq_n_s32(0x04040404));
    return bytes(vqtbl2q_u8(table, unsigned_bytes(bytes(vaddq_s32(first, vdupq_n_s32(0x03020100))))));
  });
}
FIPS_INLINE __m256 _mm256_permutevar8x32_ps(__m256 v, __m256i lanes) {
  return _mm256_castsi256_ps(_mm256_permutevar8x32_epi32({bytes(v.low), bytes(v.high)}, lanes));
}

#define _MM_HINT_T0 3
#define _mm_prefetch(place, locality) __builtin_prefetch(place, 0, locality)

} // namespace
