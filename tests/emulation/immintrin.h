// AVX-512 and AMX in plain C++, for machines without them: lane by lane, as the manuals of the instructions say.
//
// Stands before the compiler's header in the include path of a build with FIPS_EMULATE. Only what the kernels use is
// here; masked and expanding loads read exactly the bytes that the instruction may read, so that an address sanitizer
// sees what the hardware would. Much too slow for anything but tests.
#pragma once
#include_next <immintrin.h>

#include <climits>
#include <cmath>
#include <cstdint>
#include <cstring>

#ifdef FIPS_EMULATE_BF16 // the kernels ask for it; set behind the compiler's header, whose own bf16 needs the hardware
#undef __AVX512BF16__
#define __AVX512BF16__ 1
#endif

namespace emulated {

template <class T, class V> struct Lanes {
  static constexpr int count = int(sizeof(V) / sizeof(T));
  T at[count];
  Lanes() = default;
  explicit Lanes(const V &from) { std::memcpy(at, &from, sizeof at); }
  V value() const {
    V out;
    std::memcpy(&out, at, sizeof at);
    return out;
  }
  T operator[](int i) const { return at[i]; }
};

// A vector of type V whose lane i of type T is of(i).
template <class T, class V, class Of> inline V each(Of &&of) {
  Lanes<T, V> out;
  for (int i = 0; i < Lanes<T, V>::count; ++i) out.at[i] = T(of(i));
  return out.value();
}

template <class T, class V, class Of> inline V map(const V &a, Of &&of) {
  const Lanes<T, V> x(a);
  return each<T, V>([&](int i) { return of(x[i]); });
}

template <class T, class V, class Of> inline V zip(const V &a, const V &b, Of &&of) {
  const Lanes<T, V> x(a), y(b);
  return each<T, V>([&](int i) { return of(x[i], y[i]); });
}

template <class V> inline V read(const void *from) {
  V out;
  std::memcpy(&out, from, sizeof out);
  return out;
}

template <class V> inline void write(void *to, const V &value) { std::memcpy(to, &value, sizeof value); }

inline bool bit(uint64_t mask, int i) { return mask >> i & 1; }

template <class T, class V> inline V masked_read(uint64_t mask, const void *from) {
  return each<T, V>([&](int i) { return bit(mask, i) ? read<T>(static_cast<const T *>(from) + i) : T(0); });
}

template <class T, class V> inline void masked_write(void *to, uint64_t mask, const V &value) {
  const Lanes<T, V> x(value);
  for (int i = 0; i < x.count; ++i)
    if (bit(mask, i)) write(static_cast<T *>(to) + i, x[i]);
}

template <class T, class V> inline V expanding_read(uint64_t mask, const void *from) {
  const T *next = static_cast<const T *>(from);
  return each<T, V>([&](int i) { return bit(mask, i) ? read<T>(next++) : T(0); });
}

inline float brain(uint16_t half) {
  const uint32_t bits = uint32_t(half) << 16;
  const float value = read<float>(&bits);
  return std::fpclassify(value) == FP_SUBNORMAL ? 0.0f : value;
}

inline uint16_t to_brain(float value) {
  if (std::fpclassify(value) == FP_SUBNORMAL) value = 0;
  const uint32_t bits = read<uint32_t>(&value);
  if (value != value) return uint16_t(bits >> 16 | 0x40);
  return uint16_t((bits + 0x7FFF + (bits >> 16 & 1)) >> 16);
}

inline int32_t to_int(float value) { // out of range and NaN: the integer indefinite
  return value >= -2147483648.0f && value < 2147483648.0f ? int32_t(std::nearbyintf(value)) : INT32_MIN;
}

template <class V> inline V dot_bytes(const V &sum, const V &unsigned_bytes, const V &signed_bytes) {
  const Lanes<int32_t, V> s(sum);
  const Lanes<uint8_t, V> u(unsigned_bytes);
  const Lanes<int8_t, V> v(signed_bytes);
  return each<int32_t, V>([&](int i) {
    uint32_t total = uint32_t(s[i]);
    for (int j = 4 * i; j < 4 * i + 4; ++j) total += uint32_t(int32_t(u[j]) * v[j]);
    return int32_t(total);
  });
}

template <class F, class H> inline F dot_brains(const F &sum, const H &a, const H &b) {
  const Lanes<float, F> s(sum);
  const Lanes<uint16_t, H> x(a), y(b);
  return each<float, F>([&](int i) {
    const float odd = std::fmaf(brain(x[2 * i + 1]), brain(y[2 * i + 1]), s[i]);
    return std::fmaf(brain(x[2 * i]), brain(y[2 * i]), odd);
  });
}

template <class T, class V> inline V unpack(const V &a, const V &b, int half) { // of every 128 bits
  const Lanes<T, V> x(a), y(b);
  constexpr int group = int(16 / sizeof(T));
  return each<T, V>([&](int i) {
    const int from = i / group * group + half * group / 2 + i % group / 2;
    return i % 2 ? y[from] : x[from];
  });
}

struct Tiles {
  uint8_t at[8][16][64];
};
inline Tiles &tiles() {
  static thread_local Tiles all;
  return all;
}

inline void load_tile(int tile, const void *from, int64_t stride) {
  for (int row = 0; row < 16; ++row) std::memcpy(tiles().at[tile][row], static_cast<const char *>(from) + row * stride, 64);
}

inline void store_tile(int tile, void *to, int64_t stride) {
  for (int row = 0; row < 16; ++row) std::memcpy(static_cast<char *>(to) + row * stride, tiles().at[tile][row], 64);
}

inline void zero_tile(int tile) { std::memset(tiles().at[tile], 0, sizeof tiles().at[tile]); }

inline void dot_tiles_bytes(int sum, int a, int b) {
  Tiles &t = tiles();
  for (int m = 0; m < 16; ++m)
    for (int n = 0; n < 16; ++n) {
      uint32_t total = read<uint32_t>(t.at[sum][m] + 4 * n);
      for (int k = 0; k < 16; ++k)
        for (int i = 0; i < 4; ++i) total += uint32_t(int32_t(int8_t(t.at[a][m][4 * k + i])) * int8_t(t.at[b][k][4 * n + i]));
      write(t.at[sum][m] + 4 * n, total);
    }
}

inline void dot_tiles_brains(int sum, int a, int b) {
  Tiles &t = tiles();
  for (int m = 0; m < 16; ++m)
    for (int n = 0; n < 16; ++n) {
      float total = read<float>(t.at[sum][m] + 4 * n);
      for (int k = 0; k < 16; ++k)
        for (int i = 0; i < 2; ++i)
          total = std::fmaf(brain(read<uint16_t>(t.at[a][m] + 4 * k + 2 * i)),
                            brain(read<uint16_t>(t.at[b][k] + 4 * n + 2 * i)), total);
      write(t.at[sum][m] + 4 * n, total);
    }
}

// The intrinsics under their own names.
namespace mm {
using I = __m512i;
using F = __m512;

inline I load_si512(const void *p) { return read<I>(p); }
inline F load_ps(const void *p) { return read<F>(p); }
inline void store_si512(void *p, I v) { write(p, v); }
inline void store_ps(void *p, F v) { write(p, v); }
inline I set1_epi8(char v) { return each<int8_t, I>([&](int) { return v; }); }
inline I set1_epi16(short v) { return each<int16_t, I>([&](int) { return v; }); }
inline I set1_epi32(int v) { return each<int32_t, I>([&](int) { return v; }); }
inline I set1_epi64(long long v) { return each<int64_t, I>([&](int) { return v; }); }
inline __m512d set1_pd(double v) {
  return each<double, __m512d>([&](int) { return v; });
}
inline F castpd_ps(__m512d v) { return read<F>(&v); }
inline I broadcast_i64x4(__m256i v) {
  int64_t all[4];
  std::memcpy(all, &v, sizeof all);
  return each<int64_t, I>([&](int i) { return all[i % 4]; });
}
inline I broadcast_i32x4(__m128i v) {
  int64_t all[2];
  std::memcpy(all, &v, sizeof all);
  return each<int64_t, I>([&](int i) { return all[i % 2]; });
}
inline F set1_ps(float v) { return each<float, F>([&](int) { return v; }); }
template <class... Number> inline I set_epi32(Number... from_the_last) {
  const int all[16] = {from_the_last...};
  return each<int32_t, I>([&](int i) { return all[15 - i]; });
}
inline I setzero_si512() { return I{}; }
inline F setzero_ps() { return F{}; }

inline I add_epi8(I a, I b) { return zip<uint8_t>(a, b, [](uint8_t x, uint8_t y) { return x + y; }); }
inline I sub_epi8(I a, I b) { return zip<uint8_t>(a, b, [](uint8_t x, uint8_t y) { return x - y; }); }
inline I add_epi16(I a, I b) { return zip<uint16_t>(a, b, [](uint16_t x, uint16_t y) { return x + y; }); }
inline I add_epi32(I a, I b) { return zip<uint32_t>(a, b, [](uint32_t x, uint32_t y) { return x + y; }); }
inline I min_epi32(I a, I b) { return zip<int32_t>(a, b, [](int32_t x, int32_t y) { return x < y ? x : y; }); }
inline I sub_epi32(I a, I b) { return zip<uint32_t>(a, b, [](uint32_t x, uint32_t y) { return x - y; }); }
inline I and_si512(I a, I b) { return a & b; }
inline I or_si512(I a, I b) { return a | b; }
inline I xor_si512(I a, I b) { return a ^ b; }
inline I slli_epi32(I a, unsigned count) { return map<uint32_t>(a, [&](uint32_t x) { return x << count; }); }
inline I srli_epi32(I a, unsigned count) { return map<uint32_t>(a, [&](uint32_t x) { return x >> count; }); }
inline I srli_epi16(I a, unsigned count) { return map<uint16_t>(a, [&](uint16_t x) { return x >> count; }); }
inline I srlv_epi32(I a, I counts) {
  return zip<uint32_t>(a, counts, [](uint32_t x, uint32_t count) { return count < 32 ? x >> count : 0; });
}
inline I mullo_epi32(I a, I b) { return zip<uint32_t>(a, b, [](uint32_t x, uint32_t y) { return x * y; }); }
inline I ternarylogic_epi64(I a, I b, I c, int table) {
  I out = setzero_si512();
  for (int i = 0; i < 8; ++i)
    if (table >> i & 1) out |= (i & 4 ? a : ~a) & (i & 2 ? b : ~b) & (i & 1 ? c : ~c);
  return out;
}
inline I gf2p8affine_epi64_epi8(I bytes, I matrices, int added) {
  const Lanes<uint8_t, I> x(bytes), rows(matrices);
  return each<uint8_t, I>([&](int i) {
    int out = added;
    for (int to = 0; to < 8; ++to)
      out ^= __builtin_parity(unsigned(x[i] & rows[i / 8 * 8 + 7 - to])) << to;
    return out;
  });
}
inline F add_ps(F a, F b) { return a + b; }
inline F sub_ps(F a, F b) { return a - b; }
inline F mul_ps(F a, F b) { return a * b; }
inline F max_ps(F a, F b) { return zip<float>(a, b, [](float x, float y) { return x > y ? x : y; }); }
inline F min_ps(F a, F b) { return zip<float>(a, b, [](float x, float y) { return x < y ? x : y; }); }
inline F abs_ps(F a) { return map<float>(a, [](float x) { return std::fabs(x); }); }
inline F fmadd_ps(F a, F b, F c) {
  const Lanes<float, F> x(a), y(b), z(c);
  return each<float, F>([&](int i) { return std::fmaf(x[i], y[i], z[i]); });
}
inline float reduce_add_ps(F a) { // halves together, as compilers do it
  Lanes<float, F> x(a);
  for (int half = 8; half; half /= 2)
    for (int i = 0; i < half; ++i) x.at[i] += x[i + half];
  return x[0];
}
inline float reduce_max_ps(F a) {
  Lanes<float, F> x(a);
  for (int half = 8; half; half /= 2)
    for (int i = 0; i < half; ++i) x.at[i] = x[i] > x[i + half] ? x[i] : x[i + half];
  return x[0];
}
inline int reduce_add_epi32(I a) {
  uint32_t total = 0;
  for (int i = 0; i < 16; ++i) total += Lanes<uint32_t, I>(a)[i];
  return int(total);
}
inline int mask_reduce_add_epi32(__mmask16 mask, I a) {
  uint32_t total = 0;
  for (int i = 0; i < 16; ++i) total += bit(mask, i) ? Lanes<uint32_t, I>(a)[i] : 0;
  return int(total);
}
inline __mmask16 cmp_ps_mask(F a, F b, int how) {
  const Lanes<float, F> x(a), y(b);
  uint32_t mask = 0;
  for (int i = 0; i < 16; ++i) {
    const bool unordered = x[i] != x[i] || y[i] != y[i];
    bool holds = false;
    switch (how) {
    case _CMP_UNORD_Q: holds = unordered; break;
    case _CMP_ORD_Q: holds = !unordered; break;
    case _CMP_LT_OQ: case _CMP_LT_OS: holds = x[i] < y[i]; break;
    case _CMP_LE_OQ: case _CMP_LE_OS: holds = x[i] <= y[i]; break;
    case _CMP_GT_OQ: case _CMP_GT_OS: holds = x[i] > y[i]; break;
    case _CMP_GE_OQ: case _CMP_GE_OS: holds = x[i] >= y[i]; break;
    case _CMP_EQ_OQ: holds = x[i] == y[i]; break;
    case _CMP_NEQ_UQ: holds = !(x[i] == y[i]); break;
    case _CMP_NLE_UQ: case _CMP_NLE_US: holds = !(x[i] <= y[i]); break;
    case _CMP_NLT_UQ: case _CMP_NLT_US: holds = !(x[i] < y[i]); break;
    default: __builtin_trap(); // not used by the kernels so far
    }
    mask |= uint32_t(holds) << i;
  }
  return __mmask16(mask);
}

inline F cvtepi32_ps(I a) {
  const Lanes<int32_t, I> x(a);
  return each<float, F>([&](int i) { return float(x[i]); });
}
inline I cvtps_epi32(F a) {
  const Lanes<float, F> x(a);
  return each<int32_t, I>([&](int i) { return to_int(x[i]); });
}
inline I cvtepu16_epi32(__m256i a) {
  const Lanes<uint16_t, __m256i> x(a);
  return each<int32_t, I>([&](int i) { return x[i]; });
}
inline I cvtepi8_epi32(__m128i a) {
  const Lanes<int8_t, __m128i> x(a);
  return each<int32_t, I>([&](int i) { return x[i]; });
}
inline I cvtepu8_epi32(__m128i a) {
  const Lanes<uint8_t, __m128i> x(a);
  return each<uint32_t, I>([&](int i) { return x[i]; });
}
inline __m128i cvtepi32_epi8(I a) {
  const Lanes<uint32_t, I> x(a);
  return each<uint8_t, __m128i>([&](int i) { return x[i]; });
}
inline __m256i cvtepi16_epi8(I a) {
  const Lanes<uint16_t, I> x(a);
  return each<uint8_t, __m256i>([&](int i) { return x[i]; });
}
inline __m256i cvtepi32_epi16(I a) {
  const Lanes<uint32_t, I> x(a);
  return each<uint16_t, __m256i>([&](int i) { return x[i]; });
}
inline F cvtph_ps(__m256i a) {
  const Lanes<uint16_t, __m256i> x(a);
  return each<float, F>([&](int i) { return _cvtsh_ss(x[i]); });
}
inline __m256i cvtps_ph(F a, int) {
  const Lanes<float, F> x(a);
  return each<uint16_t, __m256i>([&](int i) { return _cvtss_sh(x[i], 0); });
}
inline __m256bh cvtneps_pbh(F a) {
  const Lanes<float, F> x(a);
  return each<uint16_t, __m256bh>([&](int i) { return to_brain(x[i]); });
}
inline __m512bh cvtne2ps_pbh(F high, F low) {
  const Lanes<float, F> h(high), l(low);
  return each<uint16_t, __m512bh>([&](int i) { return to_brain(i < 16 ? l[i] : h[i - 16]); });
}

inline I castps_si512(F a) { return read<I>(&a); }
inline F castsi512_ps(I a) { return read<F>(&a); }
inline __m256i castsi512_si256(I a) { return read<__m256i>(&a); }
inline I castsi256_si512(__m256i a) { // the upper half is anything: not zero here
  I out = set1_epi8(char(0xA5));
  std::memcpy(&out, &a, sizeof a);
  return out;
}
inline I inserti64x4(I a, __m256i b, int half) {
  std::memcpy(reinterpret_cast<char *>(&a) + 32 * half, &b, 32);
  return a;
}
inline __m256i extracti64x4_epi64(I a, int half) { return read<__m256i>(reinterpret_cast<const char *>(&a) + 32 * half); }
inline I shuffle_i32x4(I a, I b, int which) {
  const Lanes<uint32_t, I> x(a), y(b);
  return each<uint32_t, I>([&](int i) {
    const int from = 4 * (which >> 2 * (i / 4) & 3) + i % 4;
    return i < 8 ? x[from] : y[from];
  });
}
inline I unpacklo_epi32(I a, I b) { return unpack<uint32_t>(a, b, 0); }
inline I unpackhi_epi32(I a, I b) { return unpack<uint32_t>(a, b, 1); }
inline I unpacklo_epi64(I a, I b) { return unpack<uint64_t>(a, b, 0); }
inline I unpackhi_epi64(I a, I b) { return unpack<uint64_t>(a, b, 1); }
inline F permutex2var_ps(F a, I places, F b) {
  const Lanes<float, F> x(a), y(b);
  const Lanes<uint32_t, I> from(places);
  return each<float, F>([&](int i) { return from[i] & 16 ? y[int(from[i] & 15)] : x[int(from[i] & 15)]; });
}
inline I permutex2var_epi8(I a, I places, I b) {
  const Lanes<uint8_t, I> x(a), y(b), from(places);
  return each<uint8_t, I>([&](int i) { return from[i] & 64 ? y[from[i] & 63] : x[from[i] & 63]; });
}
inline F permutexvar_ps(I places, F a) {
  const Lanes<float, F> x(a);
  const Lanes<uint32_t, I> from(places);
  return each<float, F>([&](int i) { return x[int(from[i] & 15)]; });
}
inline I permutexvar_epi32(I places, I a) {
  const Lanes<uint32_t, I> x(a), from(places);
  return each<uint32_t, I>([&](int i) { return x[int(from[i] & 15)]; });
}
inline I permutex2var_epi32(I a, I places, I b) {
  const Lanes<uint32_t, I> x(a), y(b), from(places);
  return each<uint32_t, I>([&](int i) { return from[i] & 16 ? y[int(from[i] & 15)] : x[int(from[i] & 15)]; });
}
inline I permutexvar_epi8(I places, I a) {
  const Lanes<uint8_t, I> x(a), from(places);
  return each<uint8_t, I>([&](int i) { return x[from[i] & 63]; });
}
inline I multishift_epi64_epi8(I shifts, I a) {
  const Lanes<uint64_t, I> x(a);
  const Lanes<uint8_t, I> shift(shifts);
  return each<uint8_t, I>([&](int i) {
    const int by = shift[i] & 63;
    return by ? x[i / 8] >> by | x[i / 8] << (64 - by) : x[i / 8];
  });
}

inline F broadcast_f32x4(__m128 a) {
  const Lanes<float, __m128> x(a);
  return each<float, F>([&](int i) { return x[i & 3]; });
}
inline F maskz_loadu_ps(__mmask16 mask, const void *p) { return masked_read<float, F>(mask, p); }
inline I maskz_loadu_epi8(__mmask64 mask, const void *p) { return masked_read<uint8_t, I>(mask, p); }
inline I maskz_loadu_epi16(__mmask32 mask, const void *p) { return masked_read<uint16_t, I>(mask, p); }
inline F maskz_expandloadu_ps(__mmask16 mask, const void *p) { return expanding_read<float, F>(mask, p); }
inline I maskz_expandloadu_epi8(__mmask64 mask, const void *p) { return expanding_read<uint8_t, I>(mask, p); }
inline I maskz_expandloadu_epi16(__mmask32 mask, const void *p) { return expanding_read<uint16_t, I>(mask, p); }
inline I maskz_expand_epi8(__mmask64 mask, I a) { return expanding_read<uint8_t, I>(mask, &a); }
inline I maskz_mov_epi16(__mmask32 mask, I a) { return masked_read<uint16_t, I>(mask, &a); }
inline void mask_storeu_ps(void *p, __mmask16 mask, F v) { masked_write<float>(p, mask, v); }
inline void mask_storeu_epi8(void *p, __mmask64 mask, I v) { masked_write<uint8_t>(p, mask, v); }
inline void mask_storeu_epi16(void *p, __mmask32 mask, I v) { masked_write<uint16_t>(p, mask, v); }
inline I mask_blend_epi16(__mmask32 mask, I a, I b) {
  const Lanes<uint16_t, I> x(a), y(b);
  return each<uint16_t, I>([&](int i) { return bit(mask, i) ? y[i] : x[i]; });
}
inline __m128i maskz_loadu_epi8_128(__mmask16 mask, const void *p) { return masked_read<uint8_t, __m128i>(mask, p); }
inline I mask_or_epi32(I from, __mmask16 mask, I a, I b) {
  const Lanes<uint32_t, I> f(from), x(a), y(b);
  return each<uint32_t, I>([&](int i) { return bit(mask, i) ? x[i] | y[i] : f[i]; });
}
inline I dpbusd_epi32(I sum, I a, I b) { return dot_bytes(sum, a, b); }
inline F dpbf16_ps(F sum, __m512bh a, __m512bh b) { return dot_brains(sum, a, b); }
} // namespace mm

namespace mm256 {
inline __m128i maskz_expandloadu_epi8(__mmask16 mask, const void *p) { return expanding_read<uint8_t, __m128i>(mask, p); }
inline __m256i maskz_loadu_epi16(__mmask16 mask, const void *p) { return masked_read<uint16_t, __m256i>(mask, p); }
inline __m256i maskz_expandloadu_epi16(__mmask16 mask, const void *p) { return expanding_read<uint16_t, __m256i>(mask, p); }
inline __m256i dpbusd_epi32(__m256i sum, __m256i a, __m256i b) { return dot_bytes(sum, a, b); }
inline __m256 dpbf16_ps(__m256 sum, __m256bh a, __m256bh b) { return dot_brains(sum, a, b); }
} // namespace mm256

} // namespace emulated

#undef _mm_maskz_loadu_epi8
#define _mm_maskz_loadu_epi8 emulated::mm::maskz_loadu_epi8_128
#undef _mm512_abs_ps
#define _mm512_abs_ps emulated::mm::abs_ps
#undef _mm512_add_epi16
#define _mm512_add_epi16 emulated::mm::add_epi16
#undef _mm512_add_epi32
#define _mm512_add_epi32 emulated::mm::add_epi32
#undef _mm512_add_epi8
#define _mm512_add_epi8 emulated::mm::add_epi8
#undef _mm512_add_ps
#define _mm512_add_ps emulated::mm::add_ps
#undef _mm512_and_si512
#define _mm512_and_si512 emulated::mm::and_si512
#undef _mm512_broadcast_f32x4
#define _mm512_broadcast_f32x4 emulated::mm::broadcast_f32x4
#undef _mm512_castps_si512
#define _mm512_castps_si512 emulated::mm::castps_si512
#undef _mm512_castsi256_si512
#define _mm512_castsi256_si512 emulated::mm::castsi256_si512
#undef _mm512_castsi512_ps
#define _mm512_castsi512_ps emulated::mm::castsi512_ps
#undef _mm512_castsi512_si256
#define _mm512_castsi512_si256 emulated::mm::castsi512_si256
#undef _mm512_cmp_ps_mask
#define _mm512_cmp_ps_mask emulated::mm::cmp_ps_mask
#undef _mm512_cvtepi16_epi8
#define _mm512_cvtepi16_epi8 emulated::mm::cvtepi16_epi8
#undef _mm512_cvtepi32_epi16
#define _mm512_cvtepi32_epi16 emulated::mm::cvtepi32_epi16
#undef _mm512_cvtepi32_epi8
#define _mm512_cvtepi32_epi8 emulated::mm::cvtepi32_epi8
#undef _mm512_cvtepi32_ps
#define _mm512_cvtepi32_ps emulated::mm::cvtepi32_ps
#undef _mm512_cvtepi8_epi32
#define _mm512_cvtepi8_epi32 emulated::mm::cvtepi8_epi32
#undef _mm512_cvtepu16_epi32
#define _mm512_cvtepu16_epi32 emulated::mm::cvtepu16_epi32
#undef _mm512_cvtepu8_epi32
#define _mm512_cvtepu8_epi32 emulated::mm::cvtepu8_epi32
#undef _mm512_cvtne2ps_pbh
#define _mm512_cvtne2ps_pbh emulated::mm::cvtne2ps_pbh
#undef _mm512_cvtneps_pbh
#define _mm512_cvtneps_pbh emulated::mm::cvtneps_pbh
#undef _mm512_cvtph_ps
#define _mm512_cvtph_ps emulated::mm::cvtph_ps
#undef _mm512_cvtps_epi32
#define _mm512_cvtps_epi32 emulated::mm::cvtps_epi32
#undef _mm512_cvtps_ph
#define _mm512_cvtps_ph emulated::mm::cvtps_ph
#undef _mm512_dpbf16_ps
#define _mm512_dpbf16_ps emulated::mm::dpbf16_ps
#undef _mm512_dpbusd_epi32
#define _mm512_dpbusd_epi32 emulated::mm::dpbusd_epi32
#undef _mm512_extracti64x4_epi64
#define _mm512_extracti64x4_epi64 emulated::mm::extracti64x4_epi64
#undef _mm512_fmadd_ps
#define _mm512_fmadd_ps emulated::mm::fmadd_ps
#undef _mm512_gf2p8affine_epi64_epi8
#define _mm512_gf2p8affine_epi64_epi8 emulated::mm::gf2p8affine_epi64_epi8
#undef _mm512_inserti64x4
#define _mm512_inserti64x4 emulated::mm::inserti64x4
#undef _mm512_load_ps
#define _mm512_load_ps emulated::mm::load_ps
#undef _mm512_load_si512
#define _mm512_load_si512 emulated::mm::load_si512
#undef _mm512_loadu_ps
#define _mm512_loadu_ps emulated::mm::load_ps
#undef _mm512_loadu_si512
#define _mm512_loadu_si512 emulated::mm::load_si512
#undef _mm512_mask_blend_epi16
#define _mm512_mask_blend_epi16 emulated::mm::mask_blend_epi16
#undef _mm512_mask_or_epi32
#define _mm512_mask_or_epi32 emulated::mm::mask_or_epi32
#undef _mm512_mask_reduce_add_epi32
#define _mm512_mask_reduce_add_epi32 emulated::mm::mask_reduce_add_epi32
#undef _mm512_mask_storeu_epi16
#define _mm512_mask_storeu_epi16 emulated::mm::mask_storeu_epi16
#undef _mm512_mask_storeu_epi8
#define _mm512_mask_storeu_epi8 emulated::mm::mask_storeu_epi8
#undef _mm512_mask_storeu_ps
#define _mm512_mask_storeu_ps emulated::mm::mask_storeu_ps
#undef _mm512_maskz_expand_epi8
#define _mm512_maskz_expand_epi8 emulated::mm::maskz_expand_epi8
#undef _mm512_maskz_expandloadu_epi16
#define _mm512_maskz_expandloadu_epi16 emulated::mm::maskz_expandloadu_epi16
#undef _mm512_maskz_expandloadu_epi8
#define _mm512_maskz_expandloadu_epi8 emulated::mm::maskz_expandloadu_epi8
#undef _mm512_maskz_expandloadu_ps
#define _mm512_maskz_expandloadu_ps emulated::mm::maskz_expandloadu_ps
#undef _mm512_maskz_loadu_epi16
#define _mm512_maskz_loadu_epi16 emulated::mm::maskz_loadu_epi16
#undef _mm512_maskz_loadu_epi8
#define _mm512_maskz_loadu_epi8 emulated::mm::maskz_loadu_epi8
#undef _mm512_maskz_loadu_ps
#define _mm512_maskz_loadu_ps emulated::mm::maskz_loadu_ps
#undef _mm512_maskz_mov_epi16
#define _mm512_maskz_mov_epi16 emulated::mm::maskz_mov_epi16
#undef _mm512_max_ps
#define _mm512_max_ps emulated::mm::max_ps
#undef _mm512_min_epi32
#define _mm512_min_epi32 emulated::mm::min_epi32
#undef _mm512_min_ps
#define _mm512_min_ps emulated::mm::min_ps
#undef _mm512_mul_ps
#define _mm512_mul_ps emulated::mm::mul_ps
#undef _mm512_mullo_epi32
#define _mm512_mullo_epi32 emulated::mm::mullo_epi32
#undef _mm512_multishift_epi64_epi8
#define _mm512_multishift_epi64_epi8 emulated::mm::multishift_epi64_epi8
#undef _mm512_or_si512
#define _mm512_or_si512 emulated::mm::or_si512
#undef _mm512_permutex2var_epi8
#define _mm512_permutex2var_epi8 emulated::mm::permutex2var_epi8
#undef _mm512_permutex2var_ps
#define _mm512_permutex2var_ps emulated::mm::permutex2var_ps
#undef _mm512_permutexvar_epi32
#define _mm512_permutexvar_epi32 emulated::mm::permutexvar_epi32
#undef _mm512_permutex2var_epi32
#define _mm512_permutex2var_epi32 emulated::mm::permutex2var_epi32
#undef _mm512_permutexvar_epi8
#define _mm512_permutexvar_epi8 emulated::mm::permutexvar_epi8
#undef _mm512_permutexvar_ps
#define _mm512_permutexvar_ps emulated::mm::permutexvar_ps
#undef _mm512_reduce_add_epi32
#define _mm512_reduce_add_epi32 emulated::mm::reduce_add_epi32
#undef _mm512_reduce_add_ps
#define _mm512_reduce_add_ps emulated::mm::reduce_add_ps
#undef _mm512_reduce_max_ps
#define _mm512_reduce_max_ps emulated::mm::reduce_max_ps
#undef _mm512_broadcast_i32x4
#define _mm512_broadcast_i32x4 emulated::mm::broadcast_i32x4
#undef _mm512_broadcast_i64x4
#define _mm512_broadcast_i64x4 emulated::mm::broadcast_i64x4
#undef _mm512_set1_epi16
#define _mm512_set1_epi16 emulated::mm::set1_epi16
#undef _mm512_set1_epi32
#define _mm512_set1_epi32 emulated::mm::set1_epi32
#undef _mm512_set1_epi64
#define _mm512_set1_epi64 emulated::mm::set1_epi64
#undef _mm512_set1_epi8
#define _mm512_set1_epi8 emulated::mm::set1_epi8
#undef _mm512_set1_pd
#define _mm512_set1_pd emulated::mm::set1_pd
#undef _mm512_castpd_ps
#define _mm512_castpd_ps emulated::mm::castpd_ps
#undef _mm512_set1_ps
#define _mm512_set1_ps emulated::mm::set1_ps
#undef _mm512_set_epi32
#define _mm512_set_epi32 emulated::mm::set_epi32
#undef _mm512_setzero_ps
#define _mm512_setzero_ps emulated::mm::setzero_ps
#undef _mm512_setzero_si512
#define _mm512_setzero_si512 emulated::mm::setzero_si512
#undef _mm512_shuffle_i32x4
#define _mm512_shuffle_i32x4 emulated::mm::shuffle_i32x4
#undef _mm512_slli_epi32
#define _mm512_slli_epi32 emulated::mm::slli_epi32
#undef _mm512_srli_epi16
#define _mm512_srli_epi16 emulated::mm::srli_epi16
#undef _mm512_srli_epi32
#define _mm512_srli_epi32 emulated::mm::srli_epi32
#undef _mm512_srlv_epi32
#define _mm512_srlv_epi32 emulated::mm::srlv_epi32
#undef _mm512_store_ps
#define _mm512_store_ps emulated::mm::store_ps
#undef _mm512_store_si512
#define _mm512_store_si512 emulated::mm::store_si512
#undef _mm512_storeu_ps
#define _mm512_storeu_ps emulated::mm::store_ps
#undef _mm512_sub_epi32
#define _mm512_sub_epi32 emulated::mm::sub_epi32
#undef _mm512_sub_epi8
#define _mm512_sub_epi8 emulated::mm::sub_epi8
#undef _mm512_sub_ps
#define _mm512_sub_ps emulated::mm::sub_ps
#undef _mm512_ternarylogic_epi64
#define _mm512_ternarylogic_epi64 emulated::mm::ternarylogic_epi64
#undef _mm512_unpackhi_epi32
#define _mm512_unpackhi_epi32 emulated::mm::unpackhi_epi32
#undef _mm512_unpackhi_epi64
#define _mm512_unpackhi_epi64 emulated::mm::unpackhi_epi64
#undef _mm512_unpacklo_epi32
#define _mm512_unpacklo_epi32 emulated::mm::unpacklo_epi32
#undef _mm512_unpacklo_epi64
#define _mm512_unpacklo_epi64 emulated::mm::unpacklo_epi64
#undef _mm512_xor_si512
#define _mm512_xor_si512 emulated::mm::xor_si512
#undef _mm256_maskz_loadu_epi16
#define _mm256_maskz_loadu_epi16 emulated::mm256::maskz_loadu_epi16
#undef _mm_maskz_expandloadu_epi8
#define _mm_maskz_expandloadu_epi8 emulated::mm256::maskz_expandloadu_epi8
#undef _mm256_maskz_expandloadu_epi16
#define _mm256_maskz_expandloadu_epi16 emulated::mm256::maskz_expandloadu_epi16
#undef _mm256_dpbusd_epi32
#define _mm256_dpbusd_epi32 emulated::mm256::dpbusd_epi32
#undef _mm256_dpbusd_avx_epi32
#define _mm256_dpbusd_avx_epi32 emulated::mm256::dpbusd_epi32
#undef _mm256_dpbf16_ps
#define _mm256_dpbf16_ps emulated::mm256::dpbf16_ps
#undef _cvtu32_mask16
#define _cvtu32_mask16(mask) __mmask16(mask)
#undef _cvtu32_mask32
#define _cvtu32_mask32(mask) __mmask32(mask)
#undef _cvtu64_mask64
#define _cvtu64_mask64(mask) __mmask64(mask)

#undef _tile_loadconfig
#define _tile_loadconfig(config) (void)(config)
#undef _tile_release
#define _tile_release() (void)0
#undef _tile_zero
#define _tile_zero emulated::zero_tile
#undef _tile_loadd
#define _tile_loadd emulated::load_tile
#undef _tile_stored
#define _tile_stored emulated::store_tile
#undef _tile_dpbssd
#define _tile_dpbssd emulated::dot_tiles_bytes
#undef _tile_dpbf16ps
#define _tile_dpbf16ps emulated::dot_tiles_brains
