// Integers of 2 to 7 bits, 64 at a time from the stream to a register, with VBMI.
//
// 8 of them lie in as many bytes as they have bits: a byte shuffle brings these bytes into each 64-bit lane, and one
// multishift puts every integer into the high bits of a byte. `unit` undoes that.
#pragma once
#include <immintrin.h>

#include "packed.h"

namespace {

// Signed bytes with 128 added, as `vpdpbusd` wants one side without sign.
FIPS_INLINE __m512i lifted(__m512i bytes) { return _mm512_xor_si512(bytes, _mm512_set1_epi8(char(0x80))); }

struct NarrowTables {
  alignas(64) uint8_t places[8][64] = {};    // by bits
  // by bits and the bit within a byte where the first integer begins: into the high bits of a byte, and the low ones
  alignas(64) uint8_t shifts[8][8][64] = {}, low_shifts[8][8][64] = {};
  constexpr NarrowTables() {
    for (int bits = 2; bits < 8; ++bits)
      for (int i = 0; i < 64; ++i) {
        places[bits][i] = uint8_t(i / 8 * bits + i % 8);
        for (int first = 0; first < 8; ++first) {
          shifts[bits][first][i] = uint8_t((i % 8 * bits + first + bits - 8) & 63);
          low_shifts[bits][first][i] = uint8_t((i % 8 * bits + first) & 63);
        }
      }
  }
};
constexpr NarrowTables narrow_tables;

inline __m512i repeated(const void *from, int64_t bytes) { // 4 to 64 of them, a power of 2, all over a register
  switch (bytes) {
  case 64: return _mm512_loadu_si512(from);
  case 32: return _mm512_broadcast_i64x4(_mm256_loadu_si256(static_cast<const __m256i *>(from)));
  case 16: return _mm512_broadcast_i32x4(_mm_loadu_si128(static_cast<const __m128i *>(from)));
  case 8: {
    int64_t word;
    std::memcpy(&word, from, 8);
    return _mm512_set1_epi64(word);
  }
  default: {
    int32_t word;
    std::memcpy(&word, from, 4);
    return _mm512_set1_epi32(word);
  }
  }
}

// The numbers of all codes, as their bits lie in the stream, again and again: whatever lies above them looks up the same.
inline __m512i numbers_of_levels(const fips_matrix &a) {
  alignas(64) static constexpr auto places = [] {
    struct { uint8_t at[64]; } table = {};
    for (int i = 0; i < 64; ++i) table.at[i] = uint8_t(i);
    return table;
  }();
  const __m512i sign = _mm512_set1_epi8(char(a.num_levels / 2)); // code 0 is in the middle
  return _mm512_permutexvar_epi8(_mm512_xor_si512(_mm512_load_si512(places.at), sign), repeated(a.levels, a.num_levels));
}

struct NarrowStream {
  const uint8_t *stream;
  int64_t last; // byte from which on 64 bytes would leave the stream
  __m512i places, high, levels, lifted_levels;
  bool by_level; // codes of levels: a permutation of bytes looks them up, whatever lies above their bits
  explicit NarrowStream(const fips_matrix &a) : stream(static_cast<const uint8_t *>(a.values)) {
    last = (a.num_values * a.value_bits + 7) / 8 - 64;
    places = _mm512_load_si512(narrow_tables.places[a.value_bits]);
    high = _mm512_set1_epi8(char(0xFF << (8 - a.value_bits)));
    by_level = a.num_levels > 0 && !a.memory;
    levels = by_level ? numbers_of_levels(a) : _mm512_setzero_si512();
    lifted_levels = lifted(levels);
  }
  static float unit(const fips_matrix &a) { return a.num_levels ? 1.0f : 1.0f / float(1 << (8 - a.value_bits)); }
  static const uint8_t (*shifts_of(const fips_matrix &a))[64] {
    return a.num_levels ? narrow_tables.low_shifts[a.value_bits] : narrow_tables.shifts[a.value_bits];
  }
  FIPS_INLINE void prefetch(int64_t byte) const {
    _mm_prefetch(reinterpret_cast<const char *>(stream) + byte + kAhead, _MM_HINT_T0);
  }
  FIPS_INLINE __m512i bytes(int64_t at) const {
    return at <= last ? _mm512_loadu_si512(stream + at)
                      : _mm512_maskz_loadu_epi8(first_columns(last + 64 - at), stream + at);
  }
  // Calls `body` with what reads 64 bytes; the furthest that it is asked for begins at `furthest`.
  template <class Body> FIPS_INLINE void with_loads(int64_t furthest, const Body &body) const {
    if (furthest <= last) // none leaves the stream
      body([this](int64_t at) { return _mm512_loadu_si512(stream + at); });
    else
      body([this](int64_t at) { return bytes(at); });
  }
  FIPS_INLINE __m512i unpacked(__m512i packed, __m512i shifts) const {
    return _mm512_multishift_epi64_epi8(shifts, _mm512_permutexvar_epi8(places, packed));
  }
  FIPS_INLINE __m512i fields(int64_t byte, __m512i shifts) const { return unpacked(bytes(byte), shifts); }
  FIPS_INLINE static __m512i lifted_high(__m512i found, __m512i high) {
    constexpr int and_then_xor = 0x6A;
    return _mm512_ternarylogic_epi64(found, high, _mm512_set1_epi8(char(0x80)), and_then_xor);
  }
  FIPS_INLINE __m512i integers(int64_t byte, __m512i shifts) const {
    const __m512i found = fields(byte, shifts);
    return by_level ? _mm512_permutexvar_epi8(found, levels) : _mm512_and_si512(found, high);
  }
  FIPS_INLINE __m512i lifted_integers(int64_t byte, __m512i shifts) const {
    const __m512i found = fields(byte, shifts);
    return by_level ? _mm512_permutexvar_epi8(found, lifted_levels) : lifted_high(found, high);
  }
};

struct NarrowCursor : NarrowStream { // of a matrix kept whole: 64 integers are whole bytes, so the shifts stay
  static constexpr bool whole = true;
  int64_t byte, step;
  __m512i shifts;
  NarrowCursor(const fips_matrix &a, int64_t first)
      : NarrowStream(a), byte(first * a.value_bits >> 3), step(8 * a.value_bits),
        shifts(_mm512_load_si512(shifts_of(a)[first * a.value_bits & 7])) {}
  FIPS_INLINE void prefetch() const { NarrowStream::prefetch(byte); }
  FIPS_INLINE __m512i next(uint64_t) { // beyond the last column it is anything
    const __m512i out = integers(byte, shifts);
    byte += step;
    return out;
  }
  FIPS_INLINE __m512i next_lifted(uint64_t) {
    const __m512i out = lifted_integers(byte, shifts);
    byte += step;
    return out;
  }
};

// Of a matrix whose codes depend on those of `MEMORY` rows above (fips/formats/trellis.py): permutations of bytes say what
// each of them adds to the place, and what is there.
template <int MEMORY> struct RecalledCursor : NarrowStream {
  static constexpr bool whole = true;
  int64_t byte[MEMORY + 1], step;
  __m512i shifts[MEMORY + 1], added[MEMORY], mask, table;
  RecalledCursor(const fips_matrix &a, int64_t first) : NarrowStream(a), step(8 * a.value_bits) {
    const int64_t codes = int64_t(1) << a.value_bits, above = first / a.cols % a.run;
    for (int back = 0; back <= MEMORY; ++back) {
      const bool there = back <= above;
      const int64_t bit = (there ? first - back * a.cols : first) * a.value_bits;
      byte[back] = bit >> 3;
      shifts[back] = _mm512_load_si512(narrow_tables.low_shifts[a.value_bits][bit & 7]);
      if (back) added[back - 1] = there ? repeated(a.history + (back - 1) * codes, codes) : _mm512_setzero_si512();
    }
    mask = _mm512_set1_epi8(char(codes - 1));
    table = repeated(a.levels, a.num_levels);
  }
  FIPS_INLINE void prefetch() const { NarrowStream::prefetch(byte[0]); }
  FIPS_INLINE __m512i next(uint64_t) {
    __m512i place = _mm512_and_si512(fields(byte[0], shifts[0]), mask);
    byte[0] += step;
    for (int back = 1; back <= MEMORY; ++back) {
      place = _mm512_xor_si512(place, _mm512_permutexvar_epi8(fields(byte[back], shifts[back]), added[back - 1]));
      byte[back] += step;
    }
    return _mm512_permutexvar_epi8(place, table);
  }
  FIPS_INLINE __m512i next_lifted(uint64_t mask) { return lifted(next(mask)); }
};

struct KeptCursor : NarrowStream { // of the entries under a mask
  static constexpr bool whole = false;
  const uint8_t (*shifts)[64];
  int64_t bit, bits;
  explicit KeptCursor(const fips_matrix &a, int64_t first = 0)
      : NarrowStream(a), shifts(shifts_of(a)), bit(first * a.value_bits), bits(a.value_bits) {}
  FIPS_INLINE void prefetch() const { NarrowStream::prefetch(bit >> 3); }
  FIPS_INLINE __m512i next(uint64_t mask) {
    const __m512i kept = integers(bit >> 3, _mm512_load_si512(shifts[bit & 7]));
    bit += popcount64(mask) * bits;
    return _mm512_maskz_expand_epi8(_cvtu64_mask64(mask), kept);
  }
  FIPS_INLINE __m512i next_lifted(uint64_t mask) { return lifted(next(mask)); }
};

// Rows of a matrix kept whole, many codes of a row at a time.
struct NarrowRows : NarrowStream {
  const uint8_t (*shifts)[64];
  int64_t bits;
  explicit NarrowRows(const fips_matrix &a) : NarrowStream(a), shifts(shifts_of(a)), bits(a.value_bits) {}

  // Writes `blocks` times 64 numbers, from that of code `first` on; LIFT: with 128 added.
  template <bool LIFT> void write(int64_t first, int64_t blocks, uint8_t *to) const {
    const int64_t from = first * bits >> 3, step = 8 * bits;
    const __m512i own = _mm512_load_si512(shifts[first * bits & 7]);
    const auto with = [&](const auto &number) {
      with_loads(from + step * (blocks - 1), [&](const auto &load) {
        for (int64_t i = 0; i < blocks; ++i)
          _mm512_store_si512(to + 64 * i, number(unpacked(load(from + step * i), own)));
      });
    };
    if (by_level) {
      const __m512i table = LIFT ? lifted_levels : levels;
      with([&](__m512i found) { return _mm512_permutexvar_epi8(found, table); });
    } else {
      const __m512i kept = high;
      with([&](__m512i found) { return LIFT ? lifted_high(found, kept) : _mm512_and_si512(found, kept); });
    }
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

constexpr int kRecalledRows = 4; // they divide a run, so that nothing above the first of a run is theirs

// Rows of codes that depend on those above them, several at a time: each row of codes is read once for all that ask.
template <int MEMORY> struct RecalledRows : NarrowStream {
  static constexpr int R = kRecalledRows;
  int64_t row_bytes, step; // step: bytes of 64 codes
  int run;                 // rows
  __m512i shifts, mask, table, added[MEMORY];
  explicit RecalledRows(const fips_matrix &a) : NarrowStream(a), step(8 * a.value_bits), run(int(a.run)) {
    const int64_t codes = int64_t(1) << a.value_bits;
    row_bytes = a.cols / 64 * step;
    shifts = _mm512_load_si512(narrow_tables.low_shifts[a.value_bits][0]);
    mask = _mm512_set1_epi8(char(codes - 1));
    table = lifted(repeated(a.levels, a.num_levels));
    for (int back = 0; back < MEMORY; ++back) added[back] = repeated(a.history + back * codes, codes);
  }

  // What the rows above `row`, the first of several, add: nothing at the beginning of a run.
  FIPS_INLINE void above(int64_t row, __m512i (&adds)[MEMORY]) const {
    for (int back = 0; back < MEMORY; ++back) adds[back] = row % run ? added[back] : _mm512_setzero_si512();
  }

  // 64 numbers of row `r` of several with 128 added, by the codes of all and of those above, which add `adds`.
  FIPS_INLINE __m512i lifted_number(const __m512i (&codes)[MEMORY + R], int r, const __m512i (&adds)[MEMORY]) const {
    __m512i place = _mm512_and_si512(codes[MEMORY + r], mask);
#pragma GCC unroll 4
    for (int back = 1; back <= MEMORY; ++back) {
      const __m512i own = back <= r ? added[back - 1] : adds[back - 1];
      place = _mm512_xor_si512(place, _mm512_permutexvar_epi8(codes[MEMORY + r - back], own));
    }
    return _mm512_permutexvar_epi8(place, table);
  }

  // Writes `blocks` times 64 numbers of `left` rows from `row` on, the first of several, from that of column k on; rows
  // of `to` are `apart` bytes apart. LIFT: with 128 added.
  template <bool LIFT>
  void write(int64_t row, int left, int64_t k, int64_t blocks, uint8_t *to, int64_t apart) const {
    __m512i adds[MEMORY];
    above(row, adds);
    int64_t from[MEMORY + R];
    starts_of_rows<MEMORY, R>(row, left, row_bytes, from);
    const int64_t first = k / 64 * step;
    with_loads(from[MEMORY + R - 1] + first + (blocks - 1) * step, [&](const auto &load) {
      for (int64_t i = 0, at = first; i < blocks; ++i, at += step) {
        __m512i codes[MEMORY + R];
#pragma GCC unroll 8
        for (int r = 0; r < MEMORY + R; ++r) codes[r] = unpacked(load(from[r] + at), shifts);
#pragma GCC unroll 4
        for (int r = 0; r < R; ++r) {
          const __m512i numbers = lifted_number(codes, r, adds);
          if (r < left) _mm512_store_si512(to + r * apart + 64 * i, LIFT ? numbers : lifted(numbers));
        }
      }
    });
  }
};

} // namespace
