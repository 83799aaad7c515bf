// AVX-512 with VBMI2 (Ice Lake, Zen 4 and later): `vpexpand` spreads packed values under the mask of 32 or 64 columns.
//
// Included by avx512.cpp and, with bf16 dot products, by avx512_bf16.cpp. Inputs are first brought to the form that
// the dot product of the value type wants: floats in the order the values come out, bf16 as they are, or two planes
// of bytes (16-bit fixed point with one scale per token) beside int8 values.
#pragma once
#include <immintrin.h>

#include <type_traits>

#include "dots512.h"
#include "narrow.h"
#include "paths.h"
#include "tokens.h"
#include "tokens512.h"
#include "widen.h"

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

FIPS_INLINE __m512i expand16(uint32_t mask, const uint16_t *v) {
  return _mm512_maskz_expandloadu_epi16(_cvtu32_mask32(mask), v);
}

// A dot product of one row: `prepare` puts x of one token into `bytes(padded)` bytes, `decode` spreads the next values
// under a mask of 64 columns, `Sum::add` takes them.
template <class T> struct ValueCursor {
  static constexpr bool narrow = false;
  const T *at;
  static float unit(const fips_matrix &) { return 1; }
  ValueCursor(const fips_matrix &a, int64_t first) : at(static_cast<const T *>(a.values) + first) {}
  FIPS_INLINE void prefetch() const { _mm_prefetch(reinterpret_cast<const char *>(at) + 1024, _MM_HINT_T0); }
};

struct FloatDot { // fp32 values
  using Cursor = ValueCursor<float>;
  static int64_t bytes(int64_t padded) { return padded * 4; }
  static float prepare(const fips_call &c, int64_t t, int64_t cols, int64_t padded, void *to) {
    for (int64_t k = 0; k < padded; k += 16)
      _mm512_store_ps(static_cast<float *>(to) + k, read_floats(c, t, k, cols));
    return 1;
  }
  struct Weights {
    __m512 w[4];
  };
  FIPS_INLINE static Weights decode(uint64_t mask, Cursor &v) {
    Weights out;
    for (int i = 0; i < 4; ++i, mask >>= 16) {
      out.w[i] = _mm512_maskz_expandloadu_ps(_cvtu32_mask16(uint16_t(mask)), v.at);
      v.at += popcount64(mask & 0xFFFF);
    }
    return out;
  }
  struct Sum {
    __m512 a = _mm512_setzero_ps(), b = _mm512_setzero_ps();
    FIPS_INLINE void add(const Weights &s, const void *x, int64_t k, int64_t) {
      const float *xk = static_cast<const float *>(x) + k;
      a = _mm512_fmadd_ps(s.w[0], _mm512_load_ps(xk), a);
      b = _mm512_fmadd_ps(s.w[1], _mm512_load_ps(xk + 16), b);
      a = _mm512_fmadd_ps(s.w[2], _mm512_load_ps(xk + 32), a);
      b = _mm512_fmadd_ps(s.w[3], _mm512_load_ps(xk + 48), b);
    }
    void merge(const Sum &other) {
      a = _mm512_add_ps(a, other.a);
      b = _mm512_add_ps(b, other.b);
    }
    float total() const { return _mm512_reduce_add_ps(_mm512_add_ps(a, b)); }
  };
};

struct HalfDot : FloatDot { // fp16 values
  using Cursor = ValueCursor<uint16_t>;
  FIPS_INLINE static Weights decode(uint64_t mask, Cursor &v) {
    Weights out;
    for (int i = 0; i < 2; ++i, mask >>= 32) {
      const __m512i half = expand16(uint32_t(mask), v.at);
      out.w[2 * i] = _mm512_cvtph_ps(_mm512_castsi512_si256(half));
      out.w[2 * i + 1] = _mm512_cvtph_ps(_mm512_extracti64x4_epi64(half, 1));
      v.at += popcount64(uint32_t(mask));
    }
    return out;
  }
};

struct BrainDot : FloatDot { // bf16 values beside float inputs: even columns first, then odd ones, in every 32
  using Cursor = ValueCursor<uint16_t>;
  static float prepare(const fips_call &c, int64_t t, int64_t cols, int64_t padded, void *to) {
    const __m512i even = _mm512_set_epi32(30, 28, 26, 24, 22, 20, 18, 16, 14, 12, 10, 8, 6, 4, 2, 0);
    const __m512i odd = _mm512_or_si512(even, _mm512_set1_epi32(1));
    for (int64_t k = 0; k < padded; k += 32) {
      const __m512 low = read_floats(c, t, k, cols), high = read_floats(c, t, k + 16, cols);
      _mm512_store_ps(static_cast<float *>(to) + k, _mm512_permutex2var_ps(low, even, high));
      _mm512_store_ps(static_cast<float *>(to) + k + 16, _mm512_permutex2var_ps(low, odd, high));
    }
    return 1;
  }
  FIPS_INLINE static Weights decode(uint64_t mask, Cursor &v) {
    const __m512i odd = _mm512_set1_epi32(int(0xFFFF0000));
    Weights out;
    for (int i = 0; i < 2; ++i, mask >>= 32) {
      const __m512i pairs = expand16(uint32_t(mask), v.at);
      out.w[2 * i] = _mm512_castsi512_ps(_mm512_slli_epi32(pairs, 16));
      out.w[2 * i + 1] = _mm512_castsi512_ps(_mm512_and_si512(pairs, odd));
      v.at += popcount64(uint32_t(mask));
    }
    return out;
  }
};

#ifdef __AVX512BF16__
struct BrainPairDot { // bf16 values and inputs
  using Cursor = ValueCursor<uint16_t>;
  static int64_t bytes(int64_t padded) { return padded * 2; }
  static float prepare(const fips_call &c, int64_t t, int64_t cols, int64_t padded, void *to) {
    const uint16_t *x = static_cast<const uint16_t *>(c.x) + t * c.x_stride;
    std::memcpy(to, x, size_t(cols) * 2);
    std::memset(static_cast<uint16_t *>(to) + cols, 0, size_t(padded - cols) * 2);
    return 1;
  }
  struct Weights {
    __m512i w[2];
  };
  FIPS_INLINE static Weights decode(uint64_t mask, Cursor &v) {
    Weights out;
    out.w[0] = expand16(uint32_t(mask), v.at);
    v.at += popcount64(uint32_t(mask));
    out.w[1] = expand16(uint32_t(mask >> 32), v.at);
    v.at += popcount64(mask >> 32);
    return out;
  }
  struct Sum {
    __m512 a = _mm512_setzero_ps(), b = _mm512_setzero_ps();
    FIPS_INLINE void add(const Weights &s, const void *x, int64_t k, int64_t) {
      const __m512i *xk = reinterpret_cast<const __m512i *>(static_cast<const uint16_t *>(x) + k);
      a = _mm512_dpbf16_ps(a, __m512bh(s.w[0]), __m512bh(_mm512_load_si512(xk)));
      b = _mm512_dpbf16_ps(b, __m512bh(s.w[1]), __m512bh(_mm512_load_si512(xk + 1)));
    }
    void merge(const Sum &other) {
      a = _mm512_add_ps(a, other.a);
      b = _mm512_add_ps(b, other.b);
    }
    float total() const { return _mm512_reduce_add_ps(_mm512_add_ps(a, b)); }
  };
};
#endif

// The lowest digit is plane 0; every digit is stored with 128 added, as `vpdpbusd` wants one side without sign.
template <int PLANES> struct ByteDot { // int8 values
  using Cursor = ValueCursor<int8_t>;
  static int64_t bytes(int64_t padded) { return padded * PLANES; }
  static float prepare(const fips_call &c, int64_t t, int64_t cols, int64_t padded, void *to) {
    const float scale = token_scale(c, t, cols, PLANES);
    const __m512 inverse = _mm512_set1_ps(1 / scale);
    with_type(c, [&](auto type) {
      __m512i digits[PLANES];
      for (int64_t k = 0; k < padded; k += 64) {
        fixed_point<decltype(type)::value>(c, t, k, cols, inverse, PLANES, digits);
        for (int i = 0; i < PLANES; ++i) _mm512_store_si512(static_cast<uint8_t *>(to) + i * padded + k, digits[i]);
      }
    });
    return scale;
  }
  struct Weights {
    __m512i w;
  };
  FIPS_INLINE static Weights decode(uint64_t mask, Cursor &v) {
    const __m512i w = _mm512_maskz_expandloadu_epi8(_cvtu64_mask64(mask), v.at);
    v.at += popcount64(mask);
    return {w};
  }
  struct Sum {
    __m512i a = _mm512_setzero_si512(), b = a, c = a, ones = a;
    FIPS_INLINE void add(const Weights &s, const void *x, int64_t k, int64_t padded) {
      const uint8_t *xk = static_cast<const uint8_t *>(x) + k;
      a = _mm512_dpbusd_epi32(a, _mm512_load_si512(xk), s.w);
      if constexpr (PLANES > 1) b = _mm512_dpbusd_epi32(b, _mm512_load_si512(xk + padded), s.w);
      if constexpr (PLANES > 2) c = _mm512_dpbusd_epi32(c, _mm512_load_si512(xk + 2 * padded), s.w);
      ones = _mm512_dpbusd_epi32(ones, _mm512_set1_epi8(1), s.w);
    }
    void merge(const Sum &other) {
      a = _mm512_add_epi32(a, other.a);
      b = _mm512_add_epi32(b, other.b);
      c = _mm512_add_epi32(c, other.c);
      ones = _mm512_add_epi32(ones, other.ones);
    }
    float total() const { // four sums at once: pairs of vectors, pairs of pairs, then the lanes
      const __m512i ab = _mm512_add_epi32(_mm512_unpacklo_epi32(a, b), _mm512_unpackhi_epi32(a, b));
      const __m512i co = _mm512_add_epi32(_mm512_unpacklo_epi32(c, ones), _mm512_unpackhi_epi32(c, ones));
      const __m512i all = _mm512_add_epi32(_mm512_unpacklo_epi64(ab, co), _mm512_unpackhi_epi64(ab, co));
      const __m256i half = _mm256_add_epi32(_mm512_castsi512_si256(all), _mm512_extracti64x4_epi64(all, 1));
      alignas(16) int32_t sums[4];
      _mm_store_si128(reinterpret_cast<__m128i *>(sums),
                      _mm_add_epi32(_mm256_castsi256_si128(half), _mm256_extracti128_si256(half, 1)));
      const double added = 128.0 * sums[3];
      double sum = sums[0] - added;
      if constexpr (PLANES > 1) sum += 256.0 * (sums[1] - added);
      if constexpr (PLANES > 2) sum += 65536.0 * (sums[2] - added);
      return float(sum);
    }
  };
};

template <int PLANES> struct NarrowDot : ByteDot<PLANES> { // of matrices kept whole
  using Cursor = NarrowCursor;
  FIPS_INLINE static typename ByteDot<PLANES>::Weights decode(uint64_t, Cursor &v) {
    return {v.next()}; // beyond the last column x is 0, whatever is read there
  }
};

template <class Dot, int T>
FIPS_INLINE void add_columns(uint64_t mask, typename Dot::Cursor &v, const char *x, int64_t k, int64_t padded,
                             typename Dot::Sum (&sums)[T]) {
  v.prefetch();
  const auto weights = Dot::decode(mask, v);
#pragma GCC unroll 4
  for (int t = 0; t < T; ++t) sums[t].add(weights, x + t * Dot::bytes(padded), k, padded);
}

template <class Dot, int T, class Reader>
void direct_row(const fips_matrix &packed, const fips_call &c, const Reader &reader, int64_t row, const char *x,
                int64_t padded, const float *token_scale) {
  const fips_matrix a = Dot::Cursor::narrow ? packed : widened_rows(packed, reader, row, 1);
  typename Dot::Cursor v(a, reader.start(row));
  typename Dot::Sum sums[T], more[T]; // two sets: a dot product takes longer to finish than to start
  int64_t k = 0;
  for (; k + 64 < a.cols; k += 128) {
    add_columns<Dot, T>(reader.mask(row, k), v, x, k, padded, sums);
    add_columns<Dot, T>(reader.mask(row, k + 64), v, x, k + 64, padded, more);
  }
  if (k < a.cols) add_columns<Dot, T>(reader.mask(row, k), v, x, k, padded, sums);
  for (int t = 0; t < T; ++t) {
    sums[t].merge(more[t]);
    store_sum(a, c, row, t, sums[t].total() * Dot::Cursor::unit(a) * token_scale[t]);
  }
}

template <class Dot, int T> bool direct_path(const fips_matrix &a, const fips_call &c) {
  if (a.format == FIPS_BLOCK_ROWS) return false; // values of a row do not lie together
  static thread_local Scratch scratch;
  const int64_t padded = round_up(a.cols, 64);
  char *x = scratch.get<char>(T * Dot::bytes(padded));
  float token_scale[T];
  for (int t = 0; t < T; ++t)
    token_scale[t] = Dot::prepare(c, t, a.cols, padded, x + t * Dot::bytes(padded));
  return with_reader(a, [&](const auto &reader) {
#pragma omp parallel for num_threads(c.threads) schedule(static)
    for (int64_t row = 0; row < a.rows; ++row) direct_row<Dot, T>(a, c, reader, row, x, padded, token_scale);
  });
}

template <class Dot> bool direct_path(const fips_matrix &a, const fips_call &c) {
  switch (c.tokens) {
  case 1: return direct_path<Dot, 1>(a, c);
  case 2: return direct_path<Dot, 2>(a, c);
  case 3: return direct_path<Dot, 3>(a, c);
  case 4: return direct_path<Dot, 4>(a, c);
  default: return false;
  }
}

inline bool direct_path(const fips_matrix &a, const fips_call &c) {
  switch (a.value_type) {
  case FIPS_F32: return direct_path<FloatDot>(a, c);
  case FIPS_F16: return direct_path<HalfDot>(a, c);
  case FIPS_I8:
    if (a.value_bits < 8 && a.format == FIPS_DENSE) // with a pattern few values are left to widen
      return fixed_planes(c) == 1   ? direct_path<NarrowDot<1>>(a, c)
             : fixed_planes(c) == 2 ? direct_path<NarrowDot<2>>(a, c)
                                    : direct_path<NarrowDot<3>>(a, c);
    return fixed_planes(c) == 1   ? direct_path<ByteDot<1>>(a, c)
           : fixed_planes(c) == 2 ? direct_path<ByteDot<2>>(a, c)
                                  : direct_path<ByteDot<3>>(a, c);
  default:
#ifdef __AVX512BF16__
    if (c.x_type == FIPS_BF16) return direct_path<BrainPairDot>(a, c);
#endif
    return direct_path<BrainDot>(a, c);
  }
}

inline bool run_avx512(const fips_matrix &a, const fips_call &c) {
  switch (c.path) {
  case FIPS_DIRECT: return direct_path(a, c);
  case FIPS_TILES: return dots_path(a, c);
  default: return tokens_path<Vector16>(a, c);
  }
}

} // namespace
