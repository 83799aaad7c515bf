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

// Rows of codes that depend on those above them, several at a time: each row of codes is read once for all that ask.
constexpr int kRecalledRows = 4; // they divide a run, so that nothing above the first of a run is theirs

template <int MEMORY> struct RecalledRows : NarrowStream {
  int64_t row_bytes, step; // step: bytes of 64 codes
  __m512i shifts, mask, table, added[MEMORY];
  explicit RecalledRows(const fips_matrix &a) : NarrowStream(a), step(8 * a.value_bits) {
    const int64_t codes = int64_t(1) << a.value_bits;
    row_bytes = a.cols / 64 * step;
    shifts = _mm512_load_si512(narrow_tables.low_shifts[a.value_bits][0]);
    mask = _mm512_set1_epi8(char(codes - 1));
    table = lifted(repeated(a.levels, a.num_levels));
    for (int back = 0; back < MEMORY; ++back) added[back] = repeated(a.history + back * codes, codes);
  }
};

// Where R rows from `row` on begin, of which `left` are there, and MEMORY rows above them; any row where there is none.
template <int MEMORY, int R>
FIPS_INLINE void starts_of_rows(int64_t row, int left, int64_t row_bytes, int64_t (&from)[MEMORY + R]) {
#pragma GCC unroll 8
  for (int r = 0; r < MEMORY + R; ++r) {
    const int64_t place = row - MEMORY + min_of(r, MEMORY + left - 1);
    from[r] = (place < 0 ? 0 : place) * row_bytes;
  }
}

template <int MEMORY, int T, class Factors>
void recalled_digits(const fips_matrix &a, const fips_call &c, const RecalledRows<MEMORY> &codes, int64_t row,
                     const DigitToken *tokens, const Factors (*factors)[T], const float (*added)[T]) {
  constexpr int R = kRecalledRows;
  const int left = int(min_of(R, a.rows - row));
  __m512i above[MEMORY]; // what the rows before these add: nothing at the beginning of a run
  for (int back = 0; back < MEMORY; ++back) above[back] = row % a.run ? codes.added[back] : _mm512_setzero_si512();
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
      __m512i place = _mm512_and_si512(fields[MEMORY + r], codes.mask);
#pragma GCC unroll 4
      for (int back = 1; back <= MEMORY; ++back) {
        const __m512i own = back <= r ? codes.added[back - 1] : above[back - 1];
        place = _mm512_xor_si512(place, _mm512_permutexvar_epi8(fields[MEMORY + r - back], own));
      }
      const __m512i weights = _mm512_permutexvar_epi8(place, codes.table);
#pragma GCC unroll 4
      for (int t = 0; t < T; ++t) {
        const __m512i digits = _mm512_load_si512(tokens[t].digits + k);
        const __m512i dot = _mm512_dpbusd_epi32(_mm512_setzero_si512(), weights, digits);
        sums[r][t] = _mm512_fmadd_ps(_mm512_cvtepi32_ps(dot), factors[r][t].at(k / 64), sums[r][t]);
      }
    }
  }
  for (int r = 0; r < left; ++r)
    for (int t = 0; t < T; ++t) store_sum(a, c, row + r, t, _mm512_reduce_add_ps(sums[r][t]) + added[r][t]);
}

// Of 128 columns in two registers.
enum class DigitOrder { columns, even_and_odd, far_halves };

// How the rows of a matrix are gone through, for T tokens: `Base` row by row.
template <class Base, int T> struct SingleRows {
  static constexpr int rows = 1;
  static constexpr DigitOrder order = DigitOrder::columns;
  explicit SingleRows(const fips_matrix &) {}
  template <class Factors, class Reader>
  void multiply(const fips_matrix &a, const fips_call &c, const Reader &reader, int64_t row, const DigitToken *tokens,
                const Factors (*factors)[T], const float (*added)[T]) const {
    digits_row<Base, T>(a, c, reader, row, tokens, factors[0], added[0]);
  }
};

template <int MEMORY, int T> struct SeveralRows : RecalledRows<MEMORY> {
  static constexpr int rows = kRecalledRows;
  static constexpr DigitOrder order = DigitOrder::columns;
  using RecalledRows<MEMORY>::RecalledRows;
  template <class Factors, class Reader>
  void multiply(const fips_matrix &a, const fips_call &c, const Reader &, int64_t row, const DigitToken *tokens,
                const Factors (*factors)[T], const float (*added)[T]) const {
    recalled_digits<MEMORY, T>(a, c, *this, row, tokens, factors, added);
  }
};

// What codes of 4 bits add to the place of those below them, linear in their bits: as affine maps of bits.
struct HalfMaps {
  uint64_t first = 0, second = 0; // of the lower half of a byte, the upper one
};

inline HalfMaps half_maps(const uint8_t *added) { // by what each of the 16 codes adds
  HalfMaps maps;
  for (int out = 0; out < 6; ++out)
    for (int in = 0; in < 4; ++in) {
      const uint64_t bit = added[1 << in] >> out & 1;
      maps.first |= bit << (8 * (7 - out) + in), maps.second |= bit << (8 * (7 - out) + in + 4);
    }
  return maps;
}

// Nothing is left out, and every 64 columns of a row have one scale.
inline bool whole_blocks(const fips_matrix &a) {
  return a.format == FIPS_FULL && a.cols % 64 == 0 && !(a.scale_group && a.scale_group < 64);
}

inline bool reads_half_bytes(const fips_matrix &a) {
  if (!a.memory && a.cols > 4096) return false; // two rows are too far from each other: slower from memory
  if (a.value_bits != 4 || !whole_blocks(a)) return false;
  for (int back = 0; back < a.memory; ++back)
    for (int code = 0; code < 16; ++code) {
      const uint8_t *added = a.history + 16 * back;
      const int lowest = code & -code;
      if (added[code] != (code ? added[lowest] ^ added[code ^ lowest] : 0) || added[code] > 63) return false;
    }
  return true;
}

template <DigitOrder ORDER> void arrange(const DigitLayout &layout, uint8_t *digits) {
  for (int64_t k = 0; ORDER != DigitOrder::columns && k < layout.padded; k += 128) {
    const __m512i low = _mm512_load_si512(digits + k), high = _mm512_load_si512(digits + k + 64);
    if constexpr (ORDER == DigitOrder::far_halves) {
      _mm512_store_si512(digits + k, _mm512_shuffle_i32x4(low, high, 0x44));
      _mm512_store_si512(digits + k + 64, _mm512_shuffle_i32x4(low, high, 0xEE));
      continue;
    }
    const auto joined = [&](__m256i left, __m256i right) {
      return _mm512_inserti64x4(_mm512_castsi256_si512(left), right, 1);
    };
    const __m512i even = joined(_mm512_cvtepi16_epi8(low), _mm512_cvtepi16_epi8(high));
    const __m512i odd =
        joined(_mm512_cvtepi16_epi8(_mm512_srli_epi16(low, 8)), _mm512_cvtepi16_epi8(_mm512_srli_epi16(high, 8)));
    _mm512_store_si512(digits + k, even);
    _mm512_store_si512(digits + k + 64, odd);
  }
}

inline __m512i lifted_numbers(const fips_matrix &a) { // of all codes with 128 added, whatever lies above the place
  if (a.memory) return lifted(repeated(a.levels, a.num_levels));
  if (a.num_levels) return lifted(numbers_of_levels(a));
  alignas(64) int8_t numbers[64];
  for (int i = 0; i < 64; ++i) numbers[i] = int8_t(number_of(a, i & ((1 << a.value_bits) - 1)));
  return lifted(_mm512_load_si512(numbers));
}

// The products of 128 columns, of which the first half of either register is of one block and the second half of the next.
FIPS_INLINE __m512 add_pair(__m512i first, __m512i second, const uint8_t *digits, const float *factors, __m512 sum) {
  __m512i dot = _mm512_dpbusd_epi32(_mm512_setzero_si512(), first, _mm512_load_si512(digits));
  dot = _mm512_dpbusd_epi32(dot, second, _mm512_load_si512(digits + 64));
  const __m512 both = _mm512_mask_blend_ps(0xFF00, _mm512_set1_ps(factors[0]), _mm512_set1_ps(factors[1]));
  return _mm512_fmadd_ps(_mm512_cvtepi32_ps(dot), both, sum);
}

// Codes of 4 bits, two rows at a time and as they lie in the stream: a permutation of bytes looks up the number of
// either half of a byte. Digits lie as these halves do: of 128 columns first those with even numbers.
template <int MEMORY, int T> struct HalfByteRows : NarrowStream {
  static constexpr int rows = 2; // more are slower where they come from memory
  static constexpr DigitOrder order = DigitOrder::even_and_odd;
  static constexpr int64_t ahead = 1024; // bytes behind the last of these rows: they are fetched in the order they lie
  int64_t row_bytes;
  __m512i table;
  HalfMaps maps[2];
  explicit HalfByteRows(const fips_matrix &a)
      : NarrowStream(a), row_bytes(a.cols / 2), table(lifted_numbers(a)) {
    for (int back = 0; back < MEMORY; ++back) maps[back] = half_maps(a.history + 16 * back);
  }

  template <class Reader>
  void multiply(const fips_matrix &a, const fips_call &c, const Reader &, int64_t row, const DigitToken *tokens,
                const UnitFactors (*factors)[T], const float (*added)[T]) const {
    constexpr int R = rows, xor_three = 0x96, and_then_xor = 0x6A;
    const int left = int(min_of(R, a.rows - row));
    const uint64_t there = MEMORY && row % a.run ? ~uint64_t(0) : 0; // at the beginning of a run nothing is above
    const auto map = [&](int back, int r, uint64_t HalfMaps::*half) {
      return _mm512_set1_epi64(int64_t(maps[back - 1].*half & (back <= r ? ~uint64_t(0) : there)));
    };
    const __m512i low = _mm512_set1_epi8(15), upper = _mm512_set1_epi64(0x1020408000000000); // map: upper half to lower
    int64_t from[MEMORY + R];
    starts_of_rows<MEMORY, R>(row, left, row_bytes, from);
    __m512 sums[R][T] = {};
    for (int64_t k = 0, at = 0; k < a.cols; k += 128, at += 64) {
      __m512i codes[MEMORY + R];
#pragma GCC unroll 8
      for (int r = 0; r < MEMORY + R; ++r) {
        if (r >= MEMORY)
          _mm_prefetch(reinterpret_cast<const char *>(stream) + from[MEMORY] + (R - 1) * row_bytes + ahead + R * at +
                           64 * (r - MEMORY),
                       _MM_HINT_T0);
        codes[r] = bytes(from[r] + at);
      }
#pragma GCC unroll 4
      for (int r = 0; r < R; ++r) {
        const __m512i own = codes[MEMORY + r];
        __m512i even = own, odd = _mm512_srli_epi16(own, 4);
        if constexpr (MEMORY == 2) {
          const auto above = [&](int back, uint64_t HalfMaps::*half) {
            return _mm512_gf2p8affine_epi64_epi8(codes[r + 2 - back], map(back, r, half), 0);
          };
          const __m512i first = _mm512_xor_si512(above(1, &HalfMaps::first), above(2, &HalfMaps::first));
          even = _mm512_ternarylogic_epi64(own, low, first, and_then_xor);
          odd = _mm512_ternarylogic_epi64(_mm512_gf2p8affine_epi64_epi8(own, upper, 0), above(1, &HalfMaps::second),
                                          above(2, &HalfMaps::second), xor_three);
        }
        const __m512i weights[2] = {_mm512_permutexvar_epi8(even, table), _mm512_permutexvar_epi8(odd, table)};
#pragma GCC unroll 4
        for (int t = 0; t < T; ++t) {
          const uint8_t *digits = tokens[t].digits + k;
          sums[r][t] = add_pair(weights[0], weights[1], digits, factors[r][t].factors + k / 64, sums[r][t]);
        }
      }
    }
    for (int r = 0; r < left; ++r)
      for (int t = 0; t < T; ++t) store_sum(a, c, row + r, t, _mm512_reduce_add_ps(sums[r][t]) + added[r][t]);
  }
};

// Codes of 2 to 5 bits, some rows at a time and 128 columns in two steps: a register holds the codes of 32 columns and of
// those 64 further on, so that its first half is of one block of digits and its second half of the next, and the sums of
// all 128 become floats together. Digits lie in the same order. A permutation of bytes looks up every number, whatever
// lies above the bits of its code.
template <int ROWS, int T> struct FarHalves : NarrowStream {
  static constexpr int rows = ROWS;
  static constexpr DigitOrder order = DigitOrder::far_halves;
  int64_t row_bytes, half, step; // bytes of a row, of 32 codes, of 128
  __m512i far, shifts, table;
  explicit FarHalves(const fips_matrix &a)
      : NarrowStream(a), row_bytes(a.cols / 8 * a.value_bits), half(4 * a.value_bits), step(16 * a.value_bits),
        shifts(_mm512_load_si512(narrow_tables.low_shifts[a.value_bits][0])), table(lifted_numbers(a)) {
    alignas(64) uint8_t at[64];
    for (int i = 0; i < 64; ++i) at[i] = uint8_t((i / 8 + i / 32 * 4) * a.value_bits + i % 8);
    far = _mm512_load_si512(at);
  }

  template <class Reader>
  void multiply(const fips_matrix &a, const fips_call &c, const Reader &, int64_t row, const DigitToken *tokens,
                const UnitFactors (*factors)[T], const float (*added)[T]) const {
    const int64_t from = row * row_bytes;
    if (from + rows * row_bytes + half <= last) // no load leaves the stream
      multiply(a, c, row, from, tokens, factors, added, [&](int64_t at) { return _mm512_loadu_si512(stream + at); });
    else
      multiply(a, c, row, from, tokens, factors, added, [&](int64_t at) { return bytes(at); });
  }

  template <class Load>
  FIPS_INLINE void multiply(const fips_matrix &a, const fips_call &c, int64_t row, int64_t from,
                            const DigitToken *tokens, const UnitFactors (*factors)[T], const float (*added)[T],
                            const Load &load) const {
    constexpr int R = rows;
    const int left = int(min_of(R, a.rows - row));
    __m512 sums[R][T] = {};
    for (int64_t k = 0, at = from; k < a.cols; k += 128, at += step) {
      const char *next = reinterpret_cast<const char *>(stream) + from + R * (row_bytes + at - from);
      for (int64_t line = 0; line < R * step; line += 64) _mm_prefetch(next + line, _MM_HINT_T0);
#pragma GCC unroll 4
      for (int r = 0; r < R; ++r) {
        const int64_t own = at + min_of(r, left - 1) * row_bytes;
        const auto weights = [&](int64_t place) {
          const __m512i fields = _mm512_multishift_epi64_epi8(shifts, _mm512_permutexvar_epi8(far, load(place)));
          return _mm512_permutexvar_epi8(fields, table);
        };
        const __m512i first = weights(own), second = weights(own + half);
#pragma GCC unroll 4
        for (int t = 0; t < T; ++t) {
          const uint8_t *digits = tokens[t].digits + k;
          sums[r][t] = add_pair(first, second, digits, factors[r][t].factors + k / 64, sums[r][t]);
        }
      }
    }
    for (int r = 0; r < left; ++r)
      for (int t = 0; t < T; ++t) store_sum(a, c, row + r, t, _mm512_reduce_add_ps(sums[r][t]) + added[r][t]);
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
      if constexpr (Rows::order == DigitOrder::columns) { // else groups are no smaller than 64 columns
        if (fine) {
          how.multiply(a, c, reader, row, tokens, lanes, added);
          continue;
        }
      }
      how.multiply(a, c, reader, row, tokens, units, added);
    }
  }
}

template <class Base, class Rows, int T> bool digits_path(const fips_matrix &a, const fips_call &c) {
  if (a.format == FIPS_BLOCK_ROWS) return false; // values of a row do not lie together
  const DigitLayout layout(a);
  const int64_t nbytes = round_up(layout.nbytes(), 64);
  auto *x = scratch<uint8_t>(Scratch::tokens, T * nbytes);
  DigitToken tokens[T];
  for (int t = 0; t < T; ++t) {
    prepare_digits(c, t, layout, x + t * nbytes);
    arrange<Rows::order>(layout, x + t * nbytes);
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
  if constexpr (Base::Cursor::whole && (memory == 0 || memory == 2)) {
    if (reads_half_bytes(a)) return digits_path<Base, HalfByteRows<memory, T>, T>(a, c);
  }
  if constexpr (Base::Cursor::whole && memory == 0) {
    if (whole_blocks(a) && a.value_bits <= 5) // of more bits half a step would not lie in one register
      return a.cols <= 4096 ? digits_path<Base, FarHalves<4, T>, T>(a, c) : digits_path<Base, FarHalves<2, T>, T>(a, c);
  }
  if constexpr (memory > 0) {
    if (a.cols % 64 == 0) return digits_path<Base, SeveralRows<memory, T>, T>(a, c);
  }
  return digits_path<Base, SingleRows<Base, T>, T>(a, c);
}

template <class Base> bool digits_path(const fips_matrix &a, const fips_call &c) {
  return with_few_tokens(c, [&](auto count) { return digits_path<Base, decltype(count)::value>(a, c); });
}

} // namespace
