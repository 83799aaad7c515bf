// Codes of 2 to 7 bits of matrices without a pattern, 64 at a time from whole bytes.
#pragma once
#include "values256.h"

namespace {

// Whether rows are made of whole runs of 64 columns, and so begin with whole bytes.
inline bool reads_whole(const fips_matrix &a) {
  return a.format == FIPS_FULL && a.value_type == FIPS_I8 && a.cols % 64 == 0;
}

// Where 64 columns of a row lie in two registers of bytes.
enum class Order { natural, halves, pairs, twos, quarters, turned };

// The column of byte `p` of register `r`. A code may lie where it takes least to put it: tokens are brought into the
// same order once.
constexpr int column_of(Order order, int r, int p) {
  switch (order) {
  case Order::halves: return 32 * r + (p / 8 == 1 ? p + 8 : p / 8 == 2 ? p - 8 : p); // as packing leaves them
  case Order::pairs: return 2 * p + r;
  case Order::twos: return 4 * (p / 2) + 2 * (p % 2) + r;
  case Order::quarters: return 4 * (p % 16) + 2 * r + p / 16;
  case Order::turned: return 32 * (p / 16) + 16 * r + (p % 16 ^ 1); // two columns that are neighbours change places
  default: return 32 * r + p;
  }
}

// Which 16 of the 64 columns byte `p` belongs to; four bytes that follow each other have it in common.
constexpr int sixteen_of(Order order, int r, int p) { return column_of(order, r, p) / 16; }

// Whether that is so for the same byte of both registers.
constexpr bool alike(Order order) {
  return order == Order::pairs || order == Order::twos || order == Order::quarters;
}

// 32 bytes as floats, in their order.
FIPS_INLINE void as_floats(__m256i all, __m256 (&to)[4]) {
  const __m128i one = _mm256_castsi256_si128(all), two = _mm256_extracti128_si256(all, 1);
  to[0] = _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(one));
  to[1] = _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_unpackhi_epi64(one, one)));
  to[2] = _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(two));
  to[3] = _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_unpackhi_epi64(two, two)));
}

// The same 16 bytes twice, and 16 in each half.
FIPS_INLINE __m256i twice(const uint8_t *from) {
  return _mm256_broadcastsi128_si256(_mm_loadu_si128(reinterpret_cast<const __m128i *>(from)));
}
FIPS_INLINE __m256i two_parts(const uint8_t *low, const uint8_t *high) {
  return _mm256_set_m128i(_mm_loadu_si128(reinterpret_cast<const __m128i *>(high)),
                          _mm_loadu_si128(reinterpret_cast<const __m128i *>(low)));
}

// Fields of `BITS` bits, `EACH` of them together, 16 times: a byte shuffle brings two bytes that hold them into every lane
// of 16 bits, which is shifted to the top. Fields of the second half lie `SPLIT` bytes behind those of the first.
template <int BITS, int EACH, int SPLIT> struct Windows {
  alignas(32) uint8_t place[32] = {};
  alignas(32) uint16_t up[16] = {};
  constexpr Windows() {
    for (int i = 0; i < 16; ++i) {
      const int bit = i * BITS * EACH - (i < 8 ? 0 : 8 * SPLIT);
      place[2 * i] = uint8_t(bit / 8), place[2 * i + 1] = uint8_t(bit / 8 + 1);
      up[i] = up_by(16 - BITS * EACH - bit % 8);
    }
  }
};
template <int BITS, int EACH, int SPLIT> constexpr Windows<BITS, EACH, SPLIT> windows;

template <class Entry> FIPS_INLINE __m256i entries(const Entry *table) {
  return _mm256_load_si256(reinterpret_cast<const __m256i *>(table));
}

template <int BITS, int EACH, int SPLIT = 0> FIPS_INLINE __m256i at_top(__m256i raw) {
  constexpr const auto &table = windows<BITS, EACH, SPLIT>;
  return each_up(_mm256_shuffle_epi8(raw, entries(table.place)), entries(table.up));
}

// Two neighbouring fields of `BITS` bits, 5 or 6, 16 times: a byte shuffle brings the two bytes that hold them into every
// lane of 16 bits; shifted up the first is a byte, shifted down the second. Products shift on units of x86 that shuffles
// do not need, and each of the two may be any distance, but for none: so they change places. Fields of the second half
// lie `BEFORE` bytes into what is read.
template <int BITS, int BEFORE> struct TurnedPairs {
  alignas(32) uint8_t place[32] = {};
  alignas(32) uint16_t up[16] = {}, down[16] = {};
  constexpr TurnedPairs() {
    for (int i = 0; i < 16; ++i) {
      const int bit = 2 * BITS * (i % 8) + (i < 8 ? 0 : 8 * BEFORE);
      place[2 * i] = uint8_t(bit / 8), place[2 * i + 1] = uint8_t(bit / 8 + 1);
      up[i] = up_by(8 - bit % 8), down[i] = down_by(BITS + bit % 8);
    }
  }
};
template <int BITS, int BEFORE> constexpr TurnedPairs<BITS, BEFORE> turned_pairs;

template <int BITS, int BEFORE> FIPS_INLINE __m256i turned(__m256i raw) {
  constexpr const auto &table = turned_pairs<BITS, BEFORE>;
  constexpr int field = (1 << BITS) - 1;
  const __m256i pairs = _mm256_shuffle_epi8(raw, entries(table.place));
  return _mm256_or_si256(_mm256_and_si256(each_up(pairs, entries(table.up)), _mm256_set1_epi16(short(field << 8))),
                         _mm256_and_si256(each_down(pairs, entries(table.down)), _mm256_set1_epi16(field)));
}

// What products with inputs of 8 bits are made of. Integers also come as words, at their top, or without a sign.
enum class Kind { bytes, words, unsigned_bytes };

// Reads 64 numbers, bytes with `kBias` added; `LEVELS`: they are looked up, as integers of less than 5 bits may be, too.
template <int BITS, bool LEVELS> struct Codes {
  static constexpr int bits = BITS;
  static constexpr Kind kind = !signs_are_moved || dots_of_bytes || LEVELS ? Kind::bytes
                               : BITS > 6                                  ? Kind::words
                                                                           : Kind::unsigned_bytes;
  static constexpr char offset = 1 << (BITS - 1);
  static constexpr int bytes = 8 * BITS; // of 64 codes
  static constexpr int reach = BITS == 2 ? 16 : BITS == 3 ? 28 : BITS == 4 ? 32 : BITS == 5 ? 42 : 6 * BITS + 16; // of what is read
  static constexpr Order order = BITS == 2   ? Order::quarters
                                 : BITS == 3 ? Order::twos
                                 : BITS == 4 ? Order::pairs
                                 : BITS < 7  ? Order::turned
                                             : Order::halves;
  __m256i low, high; // the numbers of the codes as they lie in the stream, below 16 and from there on
  const uint8_t *end;
  explicit Codes(const fips_matrix &a) : end(static_cast<const uint8_t *>(a.values) + a.value_bytes) {
    alignas(32) int8_t table[32] = {};
    for (int i = 0; LEVELS && !a.memory && i < 1 << BITS; ++i) table[i] = int8_t(number_of(a, i) + kBias);
    low = _mm256_broadcastsi128_si256(_mm_load_si128(reinterpret_cast<const __m128i *>(table)));
    high = _mm256_broadcastsi128_si256(_mm_load_si128(reinterpret_cast<const __m128i *>(table + 16)));
  }
  FIPS_INLINE static __m256i top(const uint8_t *from) { return at_top<BITS, 1>(twice(from)); } // of 16
  // Codes as they lie in the stream.
  FIPS_INLINE static void fields(const uint8_t *from, __m256i (&to)[2]) {
    if constexpr (BITS == 2) {
      const __m256i raw = twice(from), mask = _mm256_set1_epi8(3);
      to[0] = _mm256_and_si256(upper_half_down<2>(raw), mask);
      to[1] = _mm256_and_si256(_mm256_srli_epi16(upper_half_down<2>(raw), 4), mask);
    } else if constexpr (BITS == 3) {
      const __m256i four = at_top<3, 4, 12>(two_parts(from, from + 12)); // bits 4 to 15 of every lane
      const __m256i first = _mm256_set1_epi32(0x00070007), third = _mm256_set1_epi32(0x07000700);
      to[0] = _mm256_or_si256(_mm256_and_si256(_mm256_srli_epi16(four, 4), first),
                              _mm256_and_si256(_mm256_srli_epi16(four, 2), third));
      to[1] = _mm256_or_si256(_mm256_and_si256(_mm256_srli_epi16(four, 7), first),
                              _mm256_and_si256(_mm256_srli_epi16(four, 5), third));
    } else if constexpr (BITS == 4) {
      const __m256i raw = _mm256_loadu_si256(reinterpret_cast<const __m256i *>(from)), mask = _mm256_set1_epi8(15);
      to[0] = _mm256_and_si256(raw, mask);
      to[1] = _mm256_and_si256(_mm256_srli_epi16(raw, 4), mask);
    } else if constexpr (BITS == 5) {
      to[0] = turned<5, 4>(_mm256_loadu_si256(reinterpret_cast<const __m256i *>(from)));
      to[1] = turned<5, 4>(_mm256_loadu_si256(reinterpret_cast<const __m256i *>(from + 10)));
    } else if constexpr (BITS == 6) {
      to[0] = turned<6, 0>(two_parts(from, from + 24));
      to[1] = turned<6, 0>(two_parts(from + 12, from + 36));
    } else {
#pragma GCC unroll 2
      for (int r = 0; r < 2; ++r, from += 4 * BITS)
        to[r] = _mm256_packus_epi16(_mm256_srli_epi16(top(from), 16 - BITS),
                                    _mm256_srli_epi16(top(from + 2 * BITS), 16 - BITS));
    }
  }
  // Whether reading 64 codes stays within the stream: of the last ones it may not, others can be read where they are.
  FIPS_INLINE bool inside(const uint8_t *from) const { return reach <= bytes || from + reach <= end; }
  FIPS_INLINE const uint8_t *within(const uint8_t *from, uint8_t (&last)[96]) const {
    if (inside(from)) return from;
    std::memcpy(last, from, bytes);
    return last;
  }
  template <class Unsigned> FIPS_INLINE void read(const uint8_t *from, Unsigned &to) const { // `offset` more
    fields(from, to.of);
#pragma GCC unroll 2
    for (int r = 0; r < 2; ++r) to.of[r] = _mm256_xor_si256(to.of[r], _mm256_set1_epi8(offset));
  }
  FIPS_INLINE void read(const uint8_t *from, __m256i (&to)[4]) const { // at the top of words, in their order
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) to[i] = _mm256_and_si256(top(from + 2 * BITS * i), _mm256_set1_epi16(short(0xFFFFu << (16 - BITS))));
  }
  FIPS_INLINE void read(const uint8_t *from, __m256i (&to)[2]) const {
    if constexpr (LEVELS) {
      fields(from, to);
#pragma GCC unroll 2
      for (int r = 0; r < 2; ++r) to[r] = BITS < 5 ? look_up(low, to[r]) : look_up(low, high, to[r]);
    } else { // without their sign, and with it
      fields(from, to);
      const __m256i sign = _mm256_set1_epi8(offset), more = _mm256_set1_epi8(char(kBias - offset));
#pragma GCC unroll 2
      for (int r = 0; r < 2; ++r) to[r] = _mm256_add_epi8(_mm256_xor_si256(to[r], sign), more);
    }
  }
};

struct WholeBytes { // integers of 8 bits
  static constexpr Kind kind = Kind::bytes;
  static constexpr int bytes = 64;
  static constexpr Order order = Order::natural;
  explicit WholeBytes(const fips_matrix &) {}
  FIPS_INLINE static bool inside(const uint8_t *) { return true; }
  FIPS_INLINE static const uint8_t *within(const uint8_t *from, uint8_t (&)[96]) { return from; }
  FIPS_INLINE static void read(const uint8_t *from, __m256i (&to)[2]) {
#pragma GCC unroll 2
    for (int r = 0; r < 2; ++r) to[r] = biased(_mm256_loadu_si256(reinterpret_cast<const __m256i *>(from) + r));
  }
};

enum class Scales { none, fine, wide }; // of a row alone, and of groups of less than 64 columns or more

} // namespace
