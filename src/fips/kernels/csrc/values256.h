// Values of a row eight at a time as floats in their columns.
#pragma once
#include <type_traits>

#include "registers256.h"

namespace {

inline float total(__m256 v) {
  __m128 sum = _mm_add_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
  sum = _mm_add_ps(sum, _mm_movehl_ps(sum, sum));
  return _mm_cvtss_f32(_mm_add_ss(sum, _mm_movehdup_ps(sum)));
}

template <class Values> __m256 read8(const typename Values::type *v) {
  if constexpr (std::is_same_v<Values, F32Values>) {
    return _mm256_loadu_ps(v);
  } else if constexpr (std::is_same_v<Values, BF16Values>) {
    const __m128i half = _mm_loadu_si128(reinterpret_cast<const __m128i *>(v));
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(half), 16));
  } else if constexpr (std::is_same_v<Values, F16Values>) {
    return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i *>(v)));
  } else {
    return _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i *>(v))));
  }
}

// `used` inputs as floats, and zeros behind them up to `count`.
template <class Values> void read_floats(const typename Values::type *from, int64_t used, int64_t count, float *to) {
  int64_t k = 0;
  for (; k + 8 <= used; k += 8) _mm256_storeu_ps(to + k, read8<Values>(from + k));
  for (; k < used; ++k) to[k] = Values::get(from[k]);
  for (; k < count; ++k) to[k] = 0.0f;
}

struct Vector8 {
  static constexpr int width = 8;
  using type = __m256;
  static type load(const float *from) { return _mm256_load_ps(from); }
  template <class Values> static type read(const typename Values::type *from) { return read8<Values>(from); }
  static void store(float *to, type v) { _mm256_store_ps(to, v); }
  static type set(float value) { return _mm256_set1_ps(value); }
  static type fma(type a, type b, type c) { return _mm256_fmadd_ps(a, b, c); }
};

// Lane i of entry `mask` holds how many kept entries come before column i, or 0x80 where column i is not kept.
struct SpreadTable {
  alignas(64) uint8_t lane[256][8];
  SpreadTable() {
    for (int mask = 0; mask < 256; ++mask)
      for (int i = 0, kept = 0; i < 8; ++i) lane[mask][i] = mask >> i & 1 ? uint8_t(kept++) : 0x80;
  }
};
const SpreadTable spread;

// Reads the values of a row eight at a time; those beyond the last of the matrix are anything finite.
template <class Values> struct ValueCursor {
  const typename Values::type *v = nullptr;
  int64_t left = 0;
  ValueCursor() = default;
  ValueCursor(const fips_matrix &a, int64_t first)
      : v(static_cast<const typename Values::type *>(a.values) + first), left(a.num_values - first) {}
  __m256 read() const {
    if (left >= 8) return read8<Values>(v);
    alignas(32) float some[8] = {};
    for (int64_t i = 0; i < left; ++i) some[i] = Values::get(v[i]);
    return _mm256_load_ps(some);
  }
  void skip(int count) { v += count, left -= count; }
};

// Integers of less than 8 bits: eight of them lie in a word of 64. Each lane takes the 4 bytes where its integer begins
// and shifts it to the top and, with its sign, down again.
struct NarrowLanes {
  alignas(32) uint8_t place[32] = {};
  alignas(32) int32_t above[8] = {};
  int bits = 0;
  constexpr NarrowLanes() = default;
  constexpr explicit NarrowLanes(int count) : bits(count) {
    for (int i = 0; i < 8; ++i) {
      const int byte = i * bits / 8;
      above[i] = 32 - bits - i * bits % 8;
      for (int j = 0; j < 4; ++j) place[4 * i + j] = byte + j < 8 ? uint8_t(byte + j) : 0x80;
    }
  }
  FIPS_INLINE __m256i top(uint64_t word) const { // integers in the highest bits of each lane
    const __m256i places = _mm256_load_si256(reinterpret_cast<const __m256i *>(place));
    const __m256i bytes = _mm256_shuffle_epi8(_mm256_set1_epi64x(int64_t(word)), places);
    return _mm256_sllv_epi32(bytes, _mm256_load_si256(reinterpret_cast<const __m256i *>(above)));
  }
  FIPS_INLINE __m256i integers(uint64_t word) const {
    return _mm256_sra_epi32(top(word), _mm_cvtsi32_si128(32 - bits));
  }
};

constexpr NarrowLanes narrow_lanes[8] = {NarrowLanes(),  NarrowLanes(),  NarrowLanes(2), NarrowLanes(3),
                                         NarrowLanes(4), NarrowLanes(5), NarrowLanes(6), NarrowLanes(7)};

struct NarrowCursor {
  const NarrowLanes *lanes = nullptr;
  const uint8_t *stream = nullptr;
  int64_t bytes = 0, bits = 0, at = 0;
  NarrowCursor() = default;
  NarrowCursor(const fips_matrix &a, int64_t first)
      : lanes(&narrow_lanes[a.value_bits]), stream(static_cast<const uint8_t *>(a.values)),
        bytes((a.num_values * a.value_bits + 7) / 8), bits(a.value_bits), at(first * a.value_bits) {}
  FIPS_INLINE __m256 read() const { return _mm256_cvtepi32_ps(lanes->integers(bits_at(stream, bytes, at))); }
  FIPS_INLINE void skip(int count) { at += count * bits; }
};

// Codes of at most 5 bits of a matrix kept whole, whose numbers are levels: a byte shuffle looks them up.
struct LevelCursor : NarrowCursor {
  __m256i low = {}, high = {};
  __m128i down = {};
  LevelCursor() = default;
  LevelCursor(const fips_matrix &a, int64_t first) : NarrowCursor(a, first), down(_mm_cvtsi32_si128(32 - int(bits))) {
    alignas(16) uint8_t table[32] = {}; // by the codes as numbers without sign, 128 more than the levels
    for (int i = 0; i < 1 << bits; ++i) table[i] = uint8_t(number_of(a, i) + 128);
    low = _mm256_broadcastsi128_si256(_mm_load_si128(reinterpret_cast<const __m128i *>(table)));
    high = _mm256_broadcastsi128_si256(_mm_load_si128(reinterpret_cast<const __m128i *>(table + 16)));
  }
  FIPS_INLINE __m256 read() const {
    const __m256i codes = _mm256_srl_epi32(lanes->top(bits_at(stream, bytes, at)), down);
    const __m256i places = _mm256_or_si256(codes, _mm256_set1_epi32(int(0x80808000))); // other bytes become 0
    __m256i found = _mm256_shuffle_epi8(low, places);
    if (bits == 5) found = _mm256_blendv_epi8(found, _mm256_shuffle_epi8(high, places), _mm256_slli_epi32(codes, 3));
    return _mm256_sub_ps(_mm256_cvtepi32_ps(found), _mm256_set1_ps(128));
  }
};

// `body(j, w)` for eight columns from k + j on, j = 0, 8, ... 56: w is zero where nothing is kept.
template <class Reader, class Cursor, class Body>
FIPS_INLINE void read_columns(const Reader &reader, int64_t row, int64_t k, Cursor &cursor, Body &&body) {
  uint64_t mask = reader.mask(row, k);
  if (std::is_same_v<Reader, FullReader> && mask == ~uint64_t(0)) {
    for (int64_t j = 0; j < 64; j += 8, cursor.skip(8)) body(j, cursor.read());
    return;
  }
  for (int64_t j = 0; j < 64; j += 8, mask >>= 8) {
    const auto *lanes = reinterpret_cast<const __m128i *>(spread.lane[mask & 0xFF]);
    const __m256i lane = _mm256_cvtepi8_epi32(_mm_loadl_epi64(lanes));
    const __m256 w = _mm256_permutevar8x32_ps(cursor.read(), lane);
    body(j, _mm256_andnot_ps(_mm256_castsi256_ps(_mm256_srai_epi32(lane, 31)), w));
    cursor.skip(popcount64(mask & 0xFF));
  }
}

template <class Cursor> constexpr bool reads_integers = false;
template <> constexpr bool reads_integers<NarrowCursor> = true;
template <> constexpr bool reads_integers<LevelCursor> = true;
template <> constexpr bool reads_integers<ValueCursor<I8Values>> = true;

// Calls `body` with the reader of a matrix whose rows have their values together, and a value of the type of its cursors.
template <class Body> bool with_cursor(const fips_matrix &a, Body &&body) {
  return with_reader(a, [&](const auto &reader) {
    if constexpr (std::decay_t<decltype(reader)>::contiguous) {
      if constexpr (std::is_same_v<std::decay_t<decltype(reader)>, FullReader>) {
        if (a.num_levels) return body(reader, LevelCursor());
      }
      if (a.value_bits < 8) return body(reader, NarrowCursor());
      with_values(a, [&](auto values) { body(reader, ValueCursor<decltype(values)>()); });
    }
  });
}

} // namespace
