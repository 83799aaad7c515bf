// Few tokens beside 64 numbers of a row at a time: as floats, or in 8 bits, 64 of which share a scale.
//
// Tokens lie in the order in which the numbers come, `Codes::order`.
#pragma once
#include "codes256.h"

namespace {

// One token as floats, and zeros behind it up to `count`.
inline void read_token(const fips_call &c, int64_t t, int64_t count, float *to) {
  with_inputs(c, [&](auto values) {
    using Values = decltype(values);
    read_floats<Values>(static_cast<const typename Values::type *>(c.x) + t * c.x_stride, c.x_columns, count, to);
  });
}

// Few of them one behind the other, each filled up to a multiple of 64.
template <int T> float *tokens_as_floats(const fips_matrix &a, const fips_call &c) {
  const int64_t padded = round_up(a.cols, 64);
  float *x = scratch<float>(Scratch::tokens, T * padded);
  for (int t = 0; t < T; ++t) read_token(c, t, padded, x + t * padded);
  return x;
}

// The scales of 16 columns each from k on, of which groups of 32 and more have some in common.
FIPS_INLINE __m256 four_scales(const RowGroups &groups, int64_t k) { // and once more
  const float a = groups.at(k), b = groups.at(k + 16), c = groups.at(k + 32), d = groups.at(k + 48);
  return _mm256_setr_ps(a, b, c, d, a, b, c, d);
}

// For which of four scales every lane of eight asks: byte 32 `r` + `first` + `step` times the lane.
template <Order ORDER> struct Lanes {
  alignas(32) int32_t of[8] = {};
  constexpr Lanes(int r, int first, int step) {
    for (int lane = 0; lane < 8; ++lane) of[lane] = sixteen_of(ORDER, r, first + step * lane);
  }
  FIPS_INLINE __m256 take(__m256 scales) const {
    return _mm256_permutevar8x32_ps(scales, _mm256_load_si256(reinterpret_cast<const __m256i *>(of)));
  }
};
template <Order ORDER> constexpr Lanes<ORDER> sums_of[2] = {{0, 0, 4}, {1, 0, 4}}; // of four bytes
template <Order ORDER>
constexpr Lanes<ORDER> floats_of[2][4] = {{{0, 0, 1}, {0, 8, 1}, {0, 16, 1}, {0, 24, 1}}, {{1, 0, 1}, {1, 8, 1}, {1, 16, 1}, {1, 24, 1}}};

// What the sums of 64 columns each are multiplied by, of as many as are multiplied in one go: the scale of the inputs times
// that of the numbers. Scales of a row or of less than 64 columns are not among them.
constexpr int kBlocks = 32;
template <int T, Scales SCALES> struct BlockScales {
  alignas(32) float of[T][kBlocks];

  // `scales`: those of the inputs, for every 64 of the `cols` columns of a token; or none.
  FIPS_INLINE void set(const RowGroups &groups, const float *scales, int64_t cols, int64_t k, int64_t blocks) {
    if constexpr (SCALES != Scales::wide) return;
    int64_t i = 0;
    for (; i + 8 <= blocks; i += 8) {
      __m256 own;
      if (groups.shift == 6) { // 64 columns are a group
        const auto *bytes = reinterpret_cast<const __m128i *>(groups.scales + k / 64 + i);
        own = _mm256_cvtepi32_ps(_mm256_cvtepu8_epi32(_mm_loadl_epi64(bytes)));
      } else {
        for (int64_t j = i; j < i + 8; ++j) of[0][j] = groups.at(k + 64 * j);
        own = _mm256_load_ps(of[0] + i);
      }
      if (!scales) _mm256_store_ps(of[0] + i, own);
#pragma GCC unroll 4
      for (int t = 0; scales && t < T; ++t)
        _mm256_store_ps(of[t] + i, _mm256_mul_ps(own, _mm256_loadu_ps(scales + (t * cols + k) / 64 + i)));
    }
    for (; i < blocks; ++i) {
      const float own = groups.at(k + 64 * i);
      for (int t = 0; t < T; ++t) of[t][i] = scales ? own * scales[(t * cols + k) / 64 + i] : own;
    }
  }
  FIPS_INLINE float at(int t, int64_t block, const float *scales, int64_t cols, int64_t k) const {
    return SCALES == Scales::wide ? of[t][block] : scales[(t * cols + k) / 64];
  }
};

template <Scales SCALES, Order ORDER> struct FloatInputs {
  static constexpr Scales kind = SCALES;
  using Numbers = __m256i[2];
  static constexpr const float *scales = nullptr;
  const float *x; // the tokens, one behind the other
  int64_t cols;

  // Adds the products of columns k to k + 63 with every token, in `CHAINS` sums each, of which later ones do not wait
  // for each other; `block` is the place of these columns in `by`.
  template <int T, int CHAINS>
  FIPS_INLINE void add(const __m256i (&numbers)[2], int64_t k, const RowGroups &groups, const BlockScales<T, SCALES> &by, int64_t block,
                       __m256 (&acc)[T][CHAINS]) const {
    const __m256 scales = SCALES == Scales::fine   ? four_scales(groups, k)
                          : SCALES == Scales::wide ? _mm256_set1_ps(by.of[0][block])
                                                   : _mm256_setzero_ps();
#pragma GCC unroll 2
    for (int r = 0; r < 2; ++r) {
      __m256 w[4];
      as_floats(numbers[r], w);
#pragma GCC unroll 4
      for (int i = 0; SCALES == Scales::fine && i < 4; ++i) w[i] = _mm256_mul_ps(w[i], floats_of<ORDER>[r][i].take(scales));
#pragma GCC unroll 4
      for (int t = 0; t < T; ++t) {
        const float *xk = x + t * cols + k + 32 * r;
        __m256 sum = acc[t][r % CHAINS];
        if (SCALES == Scales::wide) sum = _mm256_mul_ps(w[0], _mm256_load_ps(xk));
#pragma GCC unroll 4
        for (int i = SCALES == Scales::wide; i < 4; ++i) sum = _mm256_fmadd_ps(w[i], _mm256_load_ps(xk + 8 * i), sum);
        acc[t][r % CHAINS] = SCALES == Scales::wide ? _mm256_fmadd_ps(sum, scales, acc[t][r % CHAINS]) : sum;
      }
    }
  }
};

template <Scales SCALES, Order ORDER> struct DigitInputs {
  static constexpr Scales kind = SCALES;
  using Numbers = __m256i[2];
  const int8_t *digits;
  const float *scales; // of 64 digits
  int64_t cols;

  template <int T, int CHAINS>
  FIPS_INLINE void add(const __m256i (&numbers)[2], int64_t k, const RowGroups &groups, const BlockScales<T, SCALES> &by, int64_t block,
                       __m256 (&acc)[T][CHAINS]) const {
    constexpr bool together = SCALES != Scales::fine || alike(ORDER);
    const __m256 four = SCALES == Scales::fine ? four_scales(groups, k) : _mm256_setzero_ps();
#pragma GCC unroll 4
    for (int t = 0; t < T; ++t) {
      const auto *from = reinterpret_cast<const __m256i *>(digits + t * cols + k);
      const __m256 scale = _mm256_set1_ps(by.at(t, block, scales, cols, k));
      const __m256i one = byte_products(numbers[0], _mm256_load_si256(from));
      const __m256i two = byte_products(numbers[1], _mm256_load_si256(from + 1));
      const __m256i first = together ? _mm256_add_epi32(one, two) : one;
      __m256 &sum = acc[t][0];
      const __m256 each = SCALES == Scales::fine ? sums_of<ORDER>[0].take(_mm256_mul_ps(four, scale)) : scale;
      sum = _mm256_fmadd_ps(_mm256_cvtepi32_ps(first), each, sum);
      if (!together)
        sum = _mm256_fmadd_ps(_mm256_cvtepi32_ps(two), sums_of<ORDER>[1].take(_mm256_mul_ps(four, scale)), sum);
    }
  }
};

#if defined(FIPS_DOTS_OF_BYTES)
// The same where one instruction does it. What the bias of the numbers adds to the sums of 64 columns is the same for all
// rows: the sums begin so much lower.
template <Scales SCALES, Order ORDER> struct DotInputs {
  static constexpr Scales kind = SCALES;
  static constexpr bool together = SCALES != Scales::fine || alike(ORDER);
  static constexpr int sums = together ? 1 : 2; // of 64 columns
  using Numbers = __m256i[2];
  const int8_t *digits;
  const __m256i *starts;
  const float *scales; // of 64 digits
  int64_t cols;

  DotInputs(const int8_t *from, const float *their_scales, int64_t tokens, int64_t columns)
      : digits(from), scales(their_scales), cols(columns) {
    auto *to = scratch<__m256i>(Scratch::sums, sums * tokens * cols / 64);
    starts = to;
    const __m256i bias = _mm256_set1_epi8(char(kBias)), zero = _mm256_setzero_si256();
    for (int64_t i = 0; i < tokens * cols / 64; ++i, from += 64, to += sums) {
      const auto *x = reinterpret_cast<const __m256i *>(from);
      const __m256i one = add_dots(zero, bias, _mm256_load_si256(x));
      const __m256i two = add_dots(together ? one : zero, bias, _mm256_load_si256(x + 1));
      to[0] = _mm256_sub_epi32(zero, together ? two : one);
      to[sums - 1] = _mm256_sub_epi32(zero, two);
    }
  }

  template <int T, int CHAINS>
  FIPS_INLINE void add(const __m256i (&numbers)[2], int64_t k, const RowGroups &groups, const BlockScales<T, SCALES> &by, int64_t block,
                       __m256 (&acc)[T][CHAINS]) const {
    const __m256 four = SCALES == Scales::fine ? four_scales(groups, k) : _mm256_setzero_ps();
#pragma GCC unroll 4
    for (int t = 0; t < T; ++t) {
      const auto *from = reinterpret_cast<const __m256i *>(digits + t * cols + k);
      const __m256i *start = starts + (t * cols + k) / 64 * sums;
      const __m256 scale = _mm256_set1_ps(by.at(t, block, scales, cols, k));
      const __m256i one = add_dots(_mm256_load_si256(start), numbers[0], _mm256_load_si256(from));
      const __m256i before = together ? one : _mm256_load_si256(start + 1);
      const __m256i two = add_dots(before, numbers[1], _mm256_load_si256(from + 1));
      const auto each = [&](int r) {
        return SCALES == Scales::fine ? sums_of<ORDER>[r].take(_mm256_mul_ps(four, scale)) : scale;
      };
      __m256 &sum = acc[t][0];
      sum = _mm256_fmadd_ps(_mm256_cvtepi32_ps(together ? two : one), each(0), sum);
      if (!together) sum = _mm256_fmadd_ps(_mm256_cvtepi32_ps(two), each(1), sum);
    }
  }
};
#endif

// Brings every 64 numbers into an order; `count` is a multiple of 64.
template <Order ORDER, class Number> void arrange(Number *numbers, int64_t count) {
  if (ORDER == Order::natural) return;
  for (Number *block = numbers; block < numbers + count; block += 64) {
    Number natural[64];
    std::memcpy(natural, block, sizeof natural);
    for (int r = 0; r < 2; ++r)
#pragma GCC unroll 32
      for (int p = 0; p < 32; ++p) block[32 * r + p] = natural[column_of(ORDER, r, p)];
  }
}

FIPS_INLINE void store_digits(const __m256i (&whole)[4], int8_t *to) {
  // packing takes turns between the halves of registers
  const __m256i low = _mm256_packs_epi32(whole[0], whole[1]), high = _mm256_packs_epi32(whole[2], whole[3]);
  const __m256i order = _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7);
  _mm256_store_si256(reinterpret_cast<__m256i *>(to),
                     _mm256_permutevar8x32_epi32(_mm256_packs_epi16(low, high), order));
}
FIPS_INLINE void store_digits(const __m256i (&whole)[4], int16_t *to) {
  const __m256i order = _mm256_setr_epi32(0, 1, 4, 5, 2, 3, 6, 7);
#pragma GCC unroll 2
  for (int i = 0; i < 2; ++i)
    _mm256_store_si256(reinterpret_cast<__m256i *>(to + 16 * i),
                       _mm256_permutevar8x32_epi32(_mm256_packs_epi32(whole[2 * i], whole[2 * i + 1]), order));
}

// Tokens, of which `cols` is a multiple of 64, as digits.
template <class Digit> void digits_of(const float *x, int64_t count, Digit *digits, float *scales) {
  const __m256 sign = _mm256_set1_ps(-0.0f);
  for (int64_t k = 0; k < count; k += 64) {
    __m256 most = _mm256_setzero_ps();
    for (int i = 0; i < 8; ++i) most = _mm256_max_ps(most, _mm256_andnot_ps(sign, _mm256_load_ps(x + k + 8 * i)));
    alignas(32) float lanes[8];
    _mm256_store_ps(lanes, most);
    float largest = 0;
    for (float lane : lanes) largest = lane > largest ? lane : largest;
    const float scale = scales[k / 64] = fixed_scale(largest, 1);
    const __m256 inverse = _mm256_set1_ps(1 / scale);
    for (int64_t j = k; j < k + 64; j += 32) {
      __m256i whole[4];
      for (int i = 0; i < 4; ++i) whole[i] = _mm256_cvtps_epi32(_mm256_mul_ps(_mm256_load_ps(x + j + 8 * i), inverse));
      store_digits(whole, digits + j);
    }
  }
}

// Tokens as digits, in the order in which the numbers of `Codes` come.
template <int T, class Codes> const int8_t *digits_in_order(const fips_matrix &a, const float *x, float *scales) {
  auto *digits = scratch<int8_t>(Scratch::bytes, T * a.cols);
  digits_of(x, T * a.cols, digits, scales);
  arrange<Codes::order>(digits, T * a.cols);
  return digits;
}

} // namespace

#include "integers256.h"

namespace {

// Calls `body` with the tokens in the form that a call and its codes want: `x` are floats, one token behind the other.
template <int T, Scales SCALES, class Codes, class Body>
void with_inputs_of(const fips_matrix &a, const fips_call &c, float *x, Body &&body) {
  if constexpr (!dots_of_bytes) {
    if (fixed_planes(c) > 1) {
      arrange<Codes::order>(x, T * a.cols);
      return body(FloatInputs<SCALES, Codes::order>{x, a.cols});
    }
  }
  auto *scales = scratch<float>(Scratch::scales, T * a.cols / 64);
  if constexpr (Codes::kind == Kind::words) return body(WordInputs<SCALES, Codes::bits>::template of<T>(a, x, scales));
  else if constexpr (Codes::kind == Kind::unsigned_bytes)
    return body(UnsignedInputs<SCALES, Codes>::template of<T>(a, x, scales));
  else {
    const int8_t *digits = digits_in_order<T, Codes>(a, x, scales);
#if defined(FIPS_DOTS_OF_BYTES)
    body(DotInputs<SCALES, Codes::order>(digits, scales, T, a.cols));
#else
    body(DigitInputs<SCALES, Codes::order>{digits, scales, a.cols});
#endif
  }
}

// The same with what the scales of a matrix are.
template <int T, class Codes, class Body>
void with_scales_and_inputs(const fips_matrix &a, const fips_call &c, float *x, Body &&body) {
  if (!a.scale_group) return with_inputs_of<T, Scales::none, Codes>(a, c, x, body);
  if (a.scale_group < 64) return with_inputs_of<T, Scales::fine, Codes>(a, c, x, body);
  with_inputs_of<T, Scales::wide, Codes>(a, c, x, body);
}

} // namespace
