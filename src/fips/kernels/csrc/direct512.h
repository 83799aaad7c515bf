// Few tokens with AVX-512 and VBMI2 (Ice Lake, Zen 4 and later): `vpexpand` spreads packed values under the mask of 32
// or 64 columns.
//
// Inputs are first brought to the form that the dot product of the value type wants: floats in the order the values
// come out, bf16 as they are, or planes of bytes (fixed point with one scale per token) beside int8 values.
#pragma once
#include <immintrin.h>

#include <type_traits>

#include "codes512.h"
#include "paths.h"
#include "token_loads512.h"

namespace {

FIPS_INLINE __m512i expand16(uint32_t mask, const uint16_t *v) {
  return _mm512_maskz_expandloadu_epi16(_cvtu32_mask32(mask), v);
}

struct Token {
  float scale = 1;
  double added = 0; // to the sums of all rows alike
};

// A dot product of one row: `prepare` puts x of one token into `bytes(padded)` bytes, `decode` spreads the next values
// under a mask of 64 columns, `Sum::add` takes them.
template <class T> struct ValueCursor {
  static constexpr bool whole = false;
  const T *at;
  static float unit(const fips_matrix &) { return 1; }
  ValueCursor(const fips_matrix &a, int64_t first) : at(static_cast<const T *>(a.values) + first) {}
  FIPS_INLINE void prefetch() const { _mm_prefetch(reinterpret_cast<const char *>(at) + kAhead, _MM_HINT_T0); }
};

// Without group scales nothing but the place of a row's first value is needed to read it.
template <class C> struct Reading {
  using Cursor = C;
  template <class Reader> static Cursor cursor(const fips_matrix &a, const Reader &reader, int64_t row) {
    return Cursor(a, reader.start(row));
  }
};

struct FloatDot : Reading<ValueCursor<float>> { // fp32 values
  static int64_t bytes(int64_t padded) { return padded * 4; }
  static Token prepare(const fips_call &c, int64_t t, int64_t cols, int64_t padded, void *to) {
    for (int64_t k = 0; k < padded; k += 16)
      _mm512_store_ps(static_cast<float *>(to) + k, read_floats(c, t, k, cols));
    return {};
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
    float total(const Token &) const { return _mm512_reduce_add_ps(_mm512_add_ps(a, b)); }
  };
};

struct HalfDot : FloatDot, Reading<ValueCursor<uint16_t>> { // fp16 values
  using Reading<ValueCursor<uint16_t>>::Cursor;
  using Reading<ValueCursor<uint16_t>>::cursor;
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

// bf16 values beside float inputs: even columns first, then odd ones, in every 32
struct BrainDot : FloatDot, Reading<ValueCursor<uint16_t>> {
  using Reading<ValueCursor<uint16_t>>::Cursor;
  using Reading<ValueCursor<uint16_t>>::cursor;
  static Token prepare(const fips_call &c, int64_t t, int64_t cols, int64_t padded, void *to) {
    const __m512i even = _mm512_set_epi32(30, 28, 26, 24, 22, 20, 18, 16, 14, 12, 10, 8, 6, 4, 2, 0);
    const __m512i odd = _mm512_or_si512(even, _mm512_set1_epi32(1));
    for (int64_t k = 0; k < padded; k += 32) {
      const __m512 low = read_floats(c, t, k, cols), high = read_floats(c, t, k + 16, cols);
      _mm512_store_ps(static_cast<float *>(to) + k, _mm512_permutex2var_ps(low, even, high));
      _mm512_store_ps(static_cast<float *>(to) + k + 16, _mm512_permutex2var_ps(low, odd, high));
    }
    return {};
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
struct Bf16PairDot : Reading<ValueCursor<uint16_t>> { // bf16 values and inputs
  static int64_t bytes(int64_t padded) { return padded * 2; }
  static Token prepare(const fips_call &c, int64_t t, int64_t cols, int64_t padded, void *to) {
    const uint16_t *x = static_cast<const uint16_t *>(c.x) + t * c.x_stride;
    std::memcpy(to, x, size_t(cols) * 2);
    std::memset(static_cast<uint16_t *>(to) + cols, 0, size_t(padded - cols) * 2);
    return {};
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
    float total(const Token &) const { return _mm512_reduce_add_ps(_mm512_add_ps(a, b)); }
  };
};
#endif

// The lowest digit is plane 0. `vpdpbusd` wants one side without sign: 128 is added to every weight, and what that adds
// to all rows alike, 128 times the sum of a token's digits, is taken away from their totals.
template <int PLANES> struct ByteDot : Reading<ValueCursor<int8_t>> { // int8 values
  static int64_t bytes(int64_t padded) { return padded * PLANES; }
  static Token prepare(const fips_call &c, int64_t t, int64_t cols, int64_t padded, void *to) {
    const float scale = token_scale(c, t, cols, PLANES);
    const __m512 inverse = _mm512_set1_ps(1 / scale);
    const __m512i lift = _mm512_set1_epi8(char(0x80)), ones = _mm512_set1_epi8(1);
    __m512i sums[PLANES] = {};
    with_type(c, [&](auto type) {
      __m512i digits[PLANES];
      for (int64_t k = 0; k < padded; k += 64) {
        fixed_point<decltype(type)::value>(c, t, k, cols, inverse, PLANES, digits);
        for (int i = 0; i < PLANES; ++i) { // they come with 128 added
          const __m512i digit = _mm512_xor_si512(digits[i], lift);
          sums[i] = _mm512_dpbusd_epi32(sums[i], ones, digit);
          _mm512_store_si512(static_cast<uint8_t *>(to) + i * padded + k, digit);
        }
      }
    });
    double added = 0;
    for (int i = PLANES; i-- > 0;) added = 256 * added + _mm512_reduce_add_epi32(sums[i]);
    return {scale, 128 * added};
  }
  struct Weights {
    __m512i w;
  };
  FIPS_INLINE static Weights decode(uint64_t mask, Cursor &v) {
    const __m512i w = _mm512_maskz_expandloadu_epi8(_cvtu64_mask64(mask), v.at);
    v.at += popcount64(mask);
    return {lifted(w)};
  }
  struct Sum {
    __m512i a = _mm512_setzero_si512(), b = a, c = a;
    FIPS_INLINE void add(const Weights &s, const void *x, int64_t k, int64_t padded) {
      const uint8_t *xk = static_cast<const uint8_t *>(x) + k;
      a = _mm512_dpbusd_epi32(a, s.w, _mm512_load_si512(xk));
      if constexpr (PLANES > 1) b = _mm512_dpbusd_epi32(b, s.w, _mm512_load_si512(xk + padded));
      if constexpr (PLANES > 2) c = _mm512_dpbusd_epi32(c, s.w, _mm512_load_si512(xk + 2 * padded));
    }
    void merge(const Sum &other) {
      a = _mm512_add_epi32(a, other.a);
      b = _mm512_add_epi32(b, other.b);
      c = _mm512_add_epi32(c, other.c);
    }
    float total(const Token &token) const { // all sums at once: pairs of vectors, pairs of pairs, then the lanes
      const __m512i ab = _mm512_add_epi32(_mm512_unpacklo_epi32(a, b), _mm512_unpackhi_epi32(a, b));
      const __m512i cc = _mm512_add_epi32(_mm512_unpacklo_epi32(c, c), _mm512_unpackhi_epi32(c, c));
      const __m512i all = _mm512_add_epi32(_mm512_unpacklo_epi64(ab, cc), _mm512_unpackhi_epi64(ab, cc));
      const __m256i half = _mm256_add_epi32(_mm512_castsi512_si256(all), _mm512_extracti64x4_epi64(all, 1));
      alignas(16) int32_t sums[4];
      _mm_store_si128(reinterpret_cast<__m128i *>(sums),
                      _mm_add_epi32(_mm256_castsi256_si128(half), _mm256_extracti128_si256(half, 1)));
      double sum = sums[0] - token.added;
      if constexpr (PLANES > 1) sum += 256.0 * sums[1];
      if constexpr (PLANES > 2) sum += 65536.0 * sums[2];
      return float(sum);
    }
  };
};

template <int PLANES, class Stream> struct NarrowDot : ByteDot<PLANES>, Reading<Stream> { // of less than 8 bits
  using typename Reading<Stream>::Cursor;
  using Reading<Stream>::cursor;
  FIPS_INLINE static typename ByteDot<PLANES>::Weights decode(uint64_t mask, Cursor &v) {
    return {v.next_lifted(mask)}; // beyond the last column x is 0, whatever is read there
  }
};

// The group scales of 64 columns, one for each of 16 times 4.
struct ScaleLanes {
  alignas(64) int32_t group[5][16] = {}; // by the logarithm of columns of a group, less 2: 64 columns are 4 or 2 groups
  constexpr ScaleLanes() {
    for (int i = 0; i < 16; ++i) {
      group[2][i] = i / 4;
      group[3][i] = i / 8;
    }
  }
};
constexpr ScaleLanes scale_lanes;

FIPS_INLINE __m512 scales_of_lanes(const RowGroups &groups, int64_t k) {
  if (groups.shift >= 6) return _mm512_set1_ps(groups.at(k));
  const int64_t first = k >> groups.shift;
  uint32_t four = 0;
  if (first + 4 <= groups.groups) {
    std::memcpy(&four, groups.scales + first, 4);
  } else {
    for (int64_t i = first; i < groups.groups; ++i) four |= uint32_t(groups.scales[i]) << 8 * (i - first);
  }
  const __m128 scales = _mm_cvtepi32_ps(_mm_cvtepu8_epi32(_mm_cvtsi32_si128(int(four))));
  const __m512 all = _mm512_broadcast_f32x4(scales);
  return _mm512_permutex2var_ps(all, _mm512_load_si512(scale_lanes.group[groups.shift - 2]), all);
}

// A dot product of integers with group scales: those of every 64 columns become floats and are scaled. What the 128 added
// to every weight adds is taken away lane by lane; it lies behind the planes of a token.
template <class Base, int PLANES> struct GroupedDot {
  struct Cursor : Base::Cursor {
    RowGroups groups;
    int64_t k = 0;
    Cursor(const fips_matrix &a, int64_t first, int64_t row) : Base::Cursor(a, first), groups(a, row) {}
  };
  template <class Reader> static Cursor cursor(const fips_matrix &a, const Reader &reader, int64_t row) {
    return Cursor(a, reader.start(row), row);
  }
  static int64_t bytes(int64_t padded) { return 2 * padded * PLANES; }
  static Token prepare(const fips_call &c, int64_t t, int64_t cols, int64_t padded, void *to) {
    const Token token = ByteDot<PLANES>::prepare(c, t, cols, padded, to);
    auto *x = static_cast<uint8_t *>(to);
    for (int64_t at = 0; at < padded * PLANES; at += 64)
      _mm512_store_si512(x + padded * PLANES + at,
                         _mm512_sub_epi32(_mm512_setzero_si512(),
                                          _mm512_dpbusd_epi32(_mm512_setzero_si512(), _mm512_set1_epi8(char(0x80)),
                                                              _mm512_load_si512(x + at))));
    return {token.scale, 0};
  }
  struct Weights {
    __m512i w;
    __m512 scale;
  };
  FIPS_INLINE static Weights decode(uint64_t mask, Cursor &v) {
    const __m512i w = Base::decode(mask, v).w;
    const __m512 scale = scales_of_lanes(v.groups, v.k);
    v.k += 64;
    return {w, scale};
  }
  struct Sum {
    __m512 a = _mm512_setzero_ps(), b = a, c = a;
    FIPS_INLINE static __m512 plane(const Weights &s, const uint8_t *x, int64_t behind, __m512 sum) {
      const __m512i dot = _mm512_dpbusd_epi32(_mm512_load_si512(x + behind), s.w, _mm512_load_si512(x));
      return _mm512_fmadd_ps(_mm512_cvtepi32_ps(dot), s.scale, sum);
    }
    FIPS_INLINE void add(const Weights &s, const void *x, int64_t k, int64_t padded) {
      const uint8_t *xk = static_cast<const uint8_t *>(x) + k;
      a = plane(s, xk, padded * PLANES, a);
      if constexpr (PLANES > 1) b = plane(s, xk + padded, padded * PLANES, b);
      if constexpr (PLANES > 2) c = plane(s, xk + 2 * padded, padded * PLANES, c);
    }
    void merge(const Sum &other) {
      a = _mm512_add_ps(a, other.a);
      b = _mm512_add_ps(b, other.b);
      c = _mm512_add_ps(c, other.c);
    }
    float total(const Token &) const {
      double sum = _mm512_reduce_add_ps(a);
      if constexpr (PLANES > 1) sum += 256.0 * _mm512_reduce_add_ps(b);
      if constexpr (PLANES > 2) sum += 65536.0 * _mm512_reduce_add_ps(c);
      return float(sum);
    }
  };
};

// One row by T tokens. Not an array: the compiler would keep it in memory and store every sum in every step.
template <class Dot, int T> struct Sums : Sums<Dot, T - 1> {
  using Others = Sums<Dot, T - 1>;
  typename Dot::Sum sum;
  FIPS_INLINE void add(const typename Dot::Weights &weights, const char *x, int64_t k, int64_t padded) {
    Others::add(weights, x, k, padded);
    sum.add(weights, x + (T - 1) * Dot::bytes(padded), k, padded);
  }
  FIPS_INLINE void merge(const Sums &other) {
    Others::merge(other);
    sum.merge(other.sum);
  }
  template <class Body> FIPS_INLINE void each(Body &&body) const {
    Others::each(body);
    body(T - 1, sum);
  }
};

template <class Dot> struct Sums<Dot, 0> {
  FIPS_INLINE void add(const typename Dot::Weights &, const char *, int64_t, int64_t) {}
  FIPS_INLINE void merge(const Sums &) {}
  template <class Body> FIPS_INLINE void each(Body &&) const {}
};

template <class Dot, int T>
FIPS_INLINE void add_columns(Sums<Dot, T> &sums, uint64_t mask, typename Dot::Cursor &v, const char *x, int64_t k,
                             int64_t padded) {
  v.prefetch();
  sums.add(Dot::decode(mask, v), x, k, padded);
}

template <class Dot, int T, class Reader>
void direct_row(const fips_matrix &a, const fips_call &c, const Reader &reader, int64_t row, const char *x,
                int64_t padded, const Token *tokens) {
  auto v = Dot::cursor(a, reader, row);
  Sums<Dot, T> sums, more; // two sets, since a dot product has a latency of several cycles
  int64_t k = 0;
  for (; k + 64 < a.cols; k += 128) {
    add_columns(sums, reader.mask(row, k), v, x, k, padded);
    add_columns(more, reader.mask(row, k + 64), v, x, k + 64, padded);
  }
  if (k < a.cols) add_columns(sums, reader.mask(row, k), v, x, k, padded);
  sums.merge(more);
  sums.each([&](int t, const typename Dot::Sum &sum) {
    store_sum(a, c, row, t, sum.total(tokens[t]) * Dot::Cursor::unit(a) * tokens[t].scale);
  });
}

template <class Dot, int T> bool direct_path(const fips_matrix &a, const fips_call &c) {
  if (a.format == FIPS_BLOCK_ROWS) return false; // values of a row do not lie together
  const int64_t padded = round_up(a.cols, 64);
  char *x = scratch<char>(Scratch::tokens, T * Dot::bytes(padded));
  Token tokens[T];
  for (int t = 0; t < T; ++t)
    tokens[t] = Dot::prepare(c, t, a.cols, padded, x + t * Dot::bytes(padded));
  const auto all_rows = [&](const auto &reader) {
#pragma omp parallel for num_threads(c.threads) schedule(static)
    for (int64_t row = c.first_row; row < c.end_row; ++row) direct_row<Dot, T>(a, c, reader, row, x, padded, tokens);
  };
  if constexpr (!Dot::Cursor::whole) return with_reader(a, all_rows);
  if (a.format != FIPS_FULL) return false;
  all_rows(FullReader(a));
  return true;
}

template <class Dot> bool direct_path(const fips_matrix &a, const fips_call &c) {
  return with_few_tokens(c, [&](auto count) { return direct_path<Dot, decltype(count)::value>(a, c); });
}

} // namespace
