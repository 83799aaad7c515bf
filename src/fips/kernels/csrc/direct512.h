// Few tokens with AVX-512 and VBMI2 (Ice Lake, Zen 4 and later): `vpexpand` spreads packed values under the mask of 32
// or 64 columns.
//
// Inputs are first brought to the form that the dot product of the value type wants: floats in the order the values
// come out, bf16 as they are, or planes of bytes (fixed point with one scale per token) beside int8 values.
#pragma once
#include <immintrin.h>

#include <type_traits>

#include "narrow.h"
#include "paths.h"
#include "tokens512.h"

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
  FIPS_INLINE void prefetch() const { _mm_prefetch(reinterpret_cast<const char *>(at) + 1024, _MM_HINT_T0); }
};

struct FloatDot { // fp32 values
  using Cursor = ValueCursor<float>;
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
struct BrainPairDot { // bf16 values and inputs
  using Cursor = ValueCursor<uint16_t>;
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
template <int PLANES> struct ByteDot { // int8 values
  using Cursor = ValueCursor<int8_t>;
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
  FIPS_INLINE static Weights lifted(__m512i w) { return {_mm512_xor_si512(w, _mm512_set1_epi8(char(0x80)))}; }
  FIPS_INLINE static Weights decode(uint64_t mask, Cursor &v) {
    const __m512i w = _mm512_maskz_expandloadu_epi8(_cvtu64_mask64(mask), v.at);
    v.at += popcount64(mask);
    return lifted(w);
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

template <int PLANES, class Stream> struct NarrowDot : ByteDot<PLANES> { // of less than 8 bits
  using Cursor = Stream;
  FIPS_INLINE static typename ByteDot<PLANES>::Weights decode(uint64_t mask, Cursor &v) {
    return ByteDot<PLANES>::lifted(v.next(mask)); // beyond the last column x is 0, whatever is read there
  }
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
  typename Dot::Cursor v(a, reader.start(row));
  Sums<Dot, T> sums, more; // two sets: a dot product takes longer to finish than to start
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
    for (int64_t row = 0; row < a.rows; ++row) direct_row<Dot, T>(a, c, reader, row, x, padded, tokens);
  };
  if constexpr (!Dot::Cursor::whole) return with_reader(a, all_rows);
  if (a.format != FIPS_FULL) return false;
  all_rows(FullReader(a));
  return true;
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

} // namespace
