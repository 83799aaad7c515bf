// Few tokens in 8 bits beside integer values: 64 inputs share a scale, so that sums become floats after 64 columns.
//
// A weight has 128 added, since `vpdpbusd` wants one side without sign. What that adds to the sum of a row depends on the
// scales of its groups and on the digits of a token alone: 128 times the sum of the digits of every group.
#pragma once
#include "direct512.h"

namespace {

// One token: its digits, the scale of every 64 of them, and what every group of a row adds.
struct DigitToken {
  const uint8_t *digits;
  const float *scales, *excess;
};

struct DigitLayout {
  int64_t cols, padded, blocks, groups, group; // columns of a group: all of them without group scales
  explicit DigitLayout(const fips_matrix &a)
      : cols(a.cols), padded(round_up(a.cols, 128)), blocks(padded / 64), groups(a.scale_group ? groups_of_row(a) : 1),
        group(a.scale_group ? a.scale_group : padded) {}
  int64_t stride() const { return round_up(blocks, 16) + 16; } // of the factors of one row
  int64_t floats() const { return round_up(blocks, 16) + round_up(groups, 16); }
  int64_t nbytes() const { return padded + floats() * 4; }
  DigitToken place(const uint8_t *from) const {
    const auto *scales = reinterpret_cast<const float *>(from + padded);
    return {from, scales, scales + round_up(blocks, 16)};
  }
};

inline void prepare_digits(const fips_call &c, int64_t t, const DigitLayout &layout, uint8_t *to) {
  auto *scales = reinterpret_cast<float *>(to + layout.padded), *excess = scales + round_up(layout.blocks, 16);
  std::memset(scales, 0, size_t(layout.floats()) * 4);
  for (int64_t block = 0; block < layout.blocks; ++block) {
    const int64_t k = 64 * block;
    const __m512i digits = block_digits(c, t, k, layout.cols, scales + block);
    _mm512_store_si512(to + k, digits);
    const __m512i sums = _mm512_dpbusd_epi32(_mm512_setzero_si512(), _mm512_set1_epi8(1), digits);
    for (int64_t first = 0; first < 64; first += layout.group) { // 4 columns to a lane
      const __mmask16 lanes = __mmask16(first_columns(min_of(layout.group, 64) / 4) << first / 4);
      const int64_t group = min_of((k + first) / layout.group, layout.groups - 1);
      excess[group] -= 128.0f * float(_mm512_mask_reduce_add_epi32(lanes, sums)) * scales[block];
    }
  }
}

// What the sums of 64 columns are multiplied by, for one row and token.
struct UnitFactors { // a number for each block
  const float *factors;
  FIPS_INLINE __m512 at(int64_t block) const { return _mm512_set1_ps(factors[block]); }
};

struct LaneFactors { // groups of less than 64 columns
  RowGroups groups;
  const float *scales;
  FIPS_INLINE __m512 at(int64_t block) const {
    return _mm512_mul_ps(scales_of_lanes(groups, 64 * block), _mm512_set1_ps(scales[block]));
  }
};

// The group scales of a row beside T tokens: factors of their blocks, if groups are no smaller, and what a row adds.
template <int T>
FIPS_INLINE void scale_blocks(const fips_matrix &a, int64_t row, const DigitLayout &layout, const DigitToken *tokens,
                              float *factors, float *added) {
  const uint8_t *from = a.group_scales + row * layout.groups;
  const __m512i low = _mm512_set_epi32(7, 7, 6, 6, 5, 5, 4, 4, 3, 3, 2, 2, 1, 1, 0, 0);
  const __m512i high = _mm512_add_epi32(low, _mm512_set1_epi32(8));
  const int64_t stride = layout.stride();
  __m512 sums[T] = {};
  for (int64_t g = 0; g < layout.groups; g += 16) {
    const __m128i bytes = _mm_maskz_loadu_epi8(columns_there(layout.groups - g), from + g);
    const __m512 scales = _mm512_cvtepi32_ps(_mm512_cvtepu8_epi32(bytes));
#pragma GCC unroll 4
    for (int t = 0; t < T; ++t) {
      const DigitToken &x = tokens[t];
      sums[t] = _mm512_fmadd_ps(scales, _mm512_loadu_ps(x.excess + g), sums[t]);
      if (layout.group == 64) {
        _mm512_store_ps(factors + t * stride + g, _mm512_mul_ps(scales, _mm512_loadu_ps(x.scales + g)));
      } else if (layout.group == 128) {
        const auto twice = [&](__m512i places, int64_t at) {
          if (at >= layout.blocks) return;
          const __m512 spread = _mm512_permutexvar_ps(places, scales);
          _mm512_store_ps(factors + t * stride + at, _mm512_mul_ps(spread, _mm512_loadu_ps(x.scales + at)));
        };
        twice(low, 2 * g);
        twice(high, 2 * g + 16);
      }
    }
  }
#pragma GCC unroll 4
  for (int t = 0; t < T; ++t) added[t] = _mm512_reduce_add_ps(sums[t]);
}

template <class Base, int T, class Factors, class Reader>
FIPS_INLINE void digits_row(const fips_matrix &a, const fips_call &c, const Reader &reader, int64_t row,
                            const DigitToken *tokens, const Factors *factors, const float *added) {
  auto v = Base::cursor(a, reader, row);
  __m512 sums[T] = {}, more[T] = {}; // two sets, since a dot product has a latency of several cycles
  const auto add = [&](__m512 *to, int64_t k) {
    v.prefetch();
    const __m512i weights = Base::decode(reader.mask(row, k), v).w;
#pragma GCC unroll 4
    for (int t = 0; t < T; ++t) {
      const __m512i digits = _mm512_load_si512(tokens[t].digits + k);
      const __m512i dot = _mm512_dpbusd_epi32(_mm512_setzero_si512(), weights, digits);
      to[t] = _mm512_fmadd_ps(_mm512_cvtepi32_ps(dot), factors[t].at(k / 64), to[t]);
    }
  };
  int64_t k = 0;
  for (; k + 64 < a.cols; k += 128) {
    add(sums, k);
    add(more, k + 64);
  }
  if (k < a.cols) add(sums, k);
#pragma GCC unroll 4
  for (int t = 0; t < T; ++t) {
    const float sum = _mm512_reduce_add_ps(_mm512_add_ps(sums[t], more[t])) + added[t];
    store_sum(a, c, row, t, sum * Base::Cursor::unit(a));
  }
}

// How many rows above have a say in what a cursor reads.
template <class Cursor> constexpr int recalled_rows = 0;
template <int MEMORY> constexpr int recalled_rows<RecalledCursor<MEMORY>> = MEMORY;

// Written out, since in a loop that may end early the compiler would keep the sums in memory from the beginning.
template <int R, int T>
FIPS_INLINE void store_sums(const fips_matrix &a, const fips_call &c, int64_t row, int left, const __m512 (&sums)[R][T],
                            const float (*added)[T], float unit = 1) {
#pragma GCC unroll 4
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
    for (int t = 0; t < T; ++t)
      if (r < left) store_sum(a, c, row + r, t, (_mm512_reduce_add_ps(sums[r][t]) + added[r][t]) * unit);
}

template <int MEMORY, int T, class Factors>
void recalled_digits(const fips_matrix &a, const fips_call &c, const RecalledRows<MEMORY> &codes, int64_t row,
                     const DigitToken *tokens, const Factors (*factors)[T], const float (*added)[T]) {
  constexpr int R = kRecalledRows;
  const int left = int(min_of(R, a.rows - row));
  __m512i adds[MEMORY];
  codes.above(row, adds);
  int64_t from[MEMORY + R];
  starts_of_rows<MEMORY, R>(row, left, codes.row_bytes, from);
  __m512 sums[R][T] = {};
  for (int64_t k = 0, at = 0; k < a.cols; k += 64, at += codes.step) {
    __m512i fields[MEMORY + R];
#pragma GCC unroll 8
    for (int r = 0; r < MEMORY + R; ++r) {
      if (r >= MEMORY)
        _mm_prefetch(reinterpret_cast<const char *>(codes.stream) + from[r] + at + R * codes.row_bytes, _MM_HINT_T0);
      fields[r] = codes.fields(from[r] + at, codes.shifts);
    }
#pragma GCC unroll 4
    for (int r = 0; r < R; ++r) {
      const __m512i weights = codes.lifted_number(fields, r, adds);
#pragma GCC unroll 4
      for (int t = 0; t < T; ++t) {
        const __m512i digits = _mm512_load_si512(tokens[t].digits + k);
        const __m512i dot = _mm512_dpbusd_epi32(_mm512_setzero_si512(), weights, digits);
        sums[r][t] = _mm512_fmadd_ps(_mm512_cvtepi32_ps(dot), factors[r][t].at(k / 64), sums[r][t]);
      }
    }
  }
  store_sums<R, T>(a, c, row, left, sums, added);
}

// `Base` row by row, for T tokens.
template <class Base, int T> struct SingleRows {
  static constexpr int rows = 1;
  explicit SingleRows(const fips_matrix &) {}
  template <class Factors, class Reader>
  void multiply(const fips_matrix &a, const fips_call &c, const Reader &reader, int64_t row, const DigitToken *tokens,
                const Factors (*factors)[T], const float (*added)[T]) const {
    digits_row<Base, T>(a, c, reader, row, tokens, factors[0], added[0]);
  }
};

template <int MEMORY, int T> struct SeveralRows : RecalledRows<MEMORY> {
  static constexpr int rows = kRecalledRows;
  using RecalledRows<MEMORY>::RecalledRows;
  template <class Factors, class Reader>
  void multiply(const fips_matrix &a, const fips_call &c, const Reader &, int64_t row, const DigitToken *tokens,
                const Factors (*factors)[T], const float (*added)[T]) const {
    recalled_digits<MEMORY, T>(a, c, *this, row, tokens, factors, added);
  }
};

template <class Rows, int T, class Reader>
void digits_rows(const fips_matrix &a, const fips_call &c, const Reader &reader, const DigitLayout &layout,
                 const DigitToken *tokens, const PerThread<float> &products) {
  constexpr int R = Rows::rows;
  const int64_t stride = layout.stride();
  const bool fine = a.scale_group && a.scale_group < 64;
  const Rows how(a);
#pragma omp parallel num_threads(c.threads)
  {
    float added[R][T], *mine = products.mine();
    UnitFactors units[R][T];
    LaneFactors lanes[R][T];
    for (int r = 0; r < R; ++r)
      for (int t = 0; t < T; ++t) {
        added[r][t] = tokens[t].excess[0];
        units[r][t] = {a.scale_group ? mine + (r * T + t) * stride : tokens[t].scales};
        lanes[r][t].scales = tokens[t].scales;
      }
#pragma omp for schedule(static)
    for (int64_t row = c.first_row; row < c.end_row; row += R) {
      for (int r = 0; a.scale_group && r < R && row + r < a.rows; ++r) {
        scale_blocks<T>(a, row + r, layout, tokens, mine + r * T * stride, added[r]);
        for (int t = 0; fine && t < T; ++t) lanes[r][t].groups = RowGroups(a, row + r);
      }
      if (fine) {
        how.multiply(a, c, reader, row, tokens, lanes, added);
        continue;
      }
      how.multiply(a, c, reader, row, tokens, units, added);
    }
  }
}

template <class Base, class Rows, int T> bool rows_path(const fips_matrix &a, const fips_call &c) {
  if (a.format == FIPS_BLOCK_ROWS) return false; // values of a row do not lie together
  const DigitLayout layout(a);
  const int64_t nbytes = round_up(layout.nbytes(), 64);
  auto *x = scratch<uint8_t>(Scratch::tokens, T * nbytes);
  DigitToken tokens[T];
  for (int t = 0; t < T; ++t) {
    prepare_digits(c, t, layout, x + t * nbytes);
    tokens[t] = layout.place(x + t * nbytes);
  }
  const PerThread<float> products(Scratch::sums, Rows::rows * T * layout.stride(), c.threads);
  const auto all_rows = [&](const auto &reader) { digits_rows<Rows, T>(a, c, reader, layout, tokens, products); };
  if constexpr (!Base::Cursor::whole) return with_reader(a, all_rows);
  if (a.format != FIPS_FULL) return false;
  all_rows(FullReader(a));
  return true;
}

template <class Base, int T> bool digits_path(const fips_matrix &a, const fips_call &c) {
  constexpr int memory = recalled_rows<typename Base::Cursor>;
  if constexpr (memory > 0) {
    if (a.cols % 64 == 0) return rows_path<Base, SeveralRows<memory, T>, T>(a, c);
  }
  return rows_path<Base, SingleRows<Base, T>, T>(a, c);
}

template <class Base> bool digits_path(const fips_matrix &a, const fips_call &c) {
  return with_few_tokens(c, [&](auto count) { return digits_path<Base, decltype(count)::value>(a, c); });
}

} // namespace
