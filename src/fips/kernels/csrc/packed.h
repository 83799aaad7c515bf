// Reading packed patterns: 64 columns of a row at a time, as one 64-bit mask.
//
// Everything lives in an anonymous namespace: each instruction set compiles its own copy, and the linker must not
// replace a portable one by one that needs AVX-512.
#pragma once
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <type_traits>

#if defined(_OPENMP)
#include <omp.h>
#endif

#include "fips_kernels.h"
#include "scratch.h"

#if defined(_MSC_VER)
#include <intrin.h>
#endif

const uint16_t *fips_nm_table(int n, int m); // dispatch.cpp: code of 16 columns -> 16-bit mask

// Calls inside the inner loops would spill the vector registers.
#if defined(__GNUC__)
#define FIPS_INLINE __attribute__((always_inline)) inline
#define FIPS_APART __attribute__((noinline)) // one copy for all callers
#else
#define FIPS_INLINE inline
#define FIPS_APART
#endif

namespace {

FIPS_INLINE int popcount64(uint64_t bits) {
#if defined(__GNUC__)
  return __builtin_popcountll(bits);
#else
  int count = 0;
  for (; bits; bits &= bits - 1) ++count;
  return count;
#endif
}

FIPS_INLINE int lowest_bit(uint64_t bits) {
#if defined(__GNUC__)
  return __builtin_ctzll(bits);
#else
  int count = 0;
  for (; !(bits & 1); bits >>= 1) ++count;
  return count;
#endif
}

FIPS_INLINE uint64_t whole_word(const uint8_t *from) {
  uint64_t word;
  std::memcpy(&word, from, 8);
  return word;
}

// 57 or more bits of a little-endian bit stream from position `bit` on; zeros after its end.
FIPS_INLINE uint64_t bits_at(const uint8_t *stream, int64_t bytes, int64_t bit) {
  const int64_t byte = bit >> 3;
  uint64_t word = 0;
  if (byte + 8 <= bytes) {
    word = whole_word(stream + byte);
  } else { // not by `memcpy`, which would be a call
    for (int64_t i = byte; i < bytes; ++i) word |= uint64_t(stream[i]) << 8 * (i - byte);
  }
  return word >> (bit & 7);
}

FIPS_INLINE uint64_t word_at(const uint8_t *stream, int64_t bytes, int64_t bit) {
  uint64_t word = bits_at(stream, bytes, bit);
  const int shift = int(bit & 7);
  if (shift && (bit >> 3) + 8 < bytes) word |= uint64_t(stream[(bit >> 3) + 8]) << (64 - shift);
  return word;
}

FIPS_INLINE uint64_t first_columns(int64_t count) {
  return count >= 64 ? ~uint64_t(0) : count > 0 ? (uint64_t(1) << count) - 1 : 0;
}

inline int nm_code_bits(int n, int m) {
  double subsets = 1;
  for (int i = 1; i <= n; ++i) subsets = subsets * (m - n + i) / i;
  int bits = 0;
  for (int64_t most = int64_t(subsets + 0.5) - 1; most; most >>= 1) ++bits;
  return bits;
}

// A reader knows the columns kept in a row (`mask`) and where its values lie (`start`, then every `stride`-th).
struct FullReader {
  static constexpr bool contiguous = true;
  static constexpr int64_t stride() { return 1; }
  int64_t cols;
  explicit FullReader(const fips_matrix &a) : cols(a.cols) {}
  int64_t start(int64_t row) const { return row * cols; }
  FIPS_INLINE uint64_t mask(int64_t, int64_t k) const { return first_columns(cols - k); }
};

struct BitmaskReader {
  static constexpr bool contiguous = true;
  static constexpr int64_t stride() { return 1; }
  const uint8_t *bits;
  int64_t bytes, cols;
  const uint32_t *starts;
  bool words; // every row begins with a whole one
  explicit BitmaskReader(const fips_matrix &a)
      : bits(a.pattern), bytes(a.pattern_bytes), cols(a.cols), starts(a.row_start), words(a.cols % 64 == 0) {}
  int64_t start(int64_t row) const { return starts[row]; }
  FIPS_INLINE uint64_t mask(int64_t row, int64_t k) const {
    if (words) return whole_word(bits + ((row * cols + k) >> 3));
    return word_at(bits, bytes, row * cols + k) & first_columns(cols - k);
  }
};

struct NmReader {
  static constexpr bool contiguous = true;
  static constexpr int64_t stride() { return 1; }
  const uint8_t *codes;
  const uint16_t *table;
  int64_t bytes, cols, groups;
  int n, m, shift_m, bits, wide;
  explicit NmReader(const fips_matrix &a)
      : codes(a.pattern), table(fips_nm_table(a.n, a.m)), bytes(a.pattern_bytes), cols(a.cols), groups(a.cols / a.m),
        n(a.n), m(a.m), shift_m(lowest_bit(uint64_t(a.m))), bits(nm_code_bits(a.n, a.m)), wide(bits * (16 / a.m)) {}
  int64_t start(int64_t row) const { return row * groups * n; }
  FIPS_INLINE uint64_t mask(int64_t row, int64_t k) const {
    const uint64_t word = bits_at(codes, bytes, (row * groups + (k >> shift_m)) * bits);
    const uint64_t low = (uint64_t(1) << wide) - 1;
    const uint64_t mask = uint64_t(table[word & low]) | uint64_t(table[(word >> wide) & low]) << 16 |
                          uint64_t(table[(word >> 2 * wide) & low]) << 32 |
                          uint64_t(table[(word >> 3 * wide) & low]) << 48;
    return cols - k >= 64 ? mask : mask & first_columns(cols - k);
  }
};

struct BlockRowsReader { // the values of the rows of a block are interleaved
  static constexpr bool contiguous = false;
  const uint8_t *bits;
  int64_t bytes, cols, size;
  const uint32_t *starts;
  explicit BlockRowsReader(const fips_matrix &a)
      : bits(a.pattern), bytes(a.pattern_bytes), cols(a.cols), size(a.m), starts(a.row_start) {}
  int64_t stride() const { return size; }
  int64_t start(int64_t row) const { return starts[row] + row % size; }
  FIPS_INLINE uint64_t mask(int64_t row, int64_t k) const {
    return word_at(bits, bytes, row / size * cols + k) & first_columns(cols - k);
  }
};

struct BlockColsReader {
  static constexpr bool contiguous = true;
  static constexpr int64_t stride() { return 1; }
  const uint8_t *bits;
  int64_t bytes, cols, blocks;
  const uint32_t *starts;
  int size;
  explicit BlockColsReader(const fips_matrix &a)
      : bits(a.pattern), bytes(a.pattern_bytes), cols(a.cols), blocks((a.cols + a.m - 1) / a.m), starts(a.row_start),
        size(a.m) {}
  int64_t start(int64_t row) const { return starts[row]; }
  FIPS_INLINE uint64_t mask(int64_t row, int64_t k) const {
    uint64_t word = bits_at(bits, bytes, row * blocks + k / size);
    if (size == 4) { // spread 16 bits to every fourth place, then fill the nibbles
      word &= 0xFFFF;
      word = (word | word << 24) & 0x000000FF000000FFull;
      word = (word | word << 12) & 0x000F000F000F000Full;
      word = (word | word << 6) & 0x0303030303030303ull;
      word = (word | word << 3) & 0x1111111111111111ull;
      word *= 0xF;
    } else { // 8
      word &= 0xFF;
      word = (word | word << 28) & 0x0000000F0000000Full;
      word = (word | word << 14) & 0x0003000300030003ull;
      word = (word | word << 7) & 0x0101010101010101ull;
      word *= 0xFF;
    }
    return word & first_columns(cols - k);
  }
};

// Call `body` with the reader of a matrix; false for an unknown format.
template <class Body> bool with_reader(const fips_matrix &a, Body &&body) {
#define FIPS_ROW(name, number, group, bits, kept, reader, side) \
  case FIPS_##name: body(reader(a)); return true;
  switch (a.format) {
    FIPS_PATTERNS(FIPS_ROW)
  default: return false;
  }
#undef FIPS_ROW
}

// What a code of the pattern stands for, and the side of the matrix that whole groups fill.
struct PatternSizes {
  int64_t group, bits, kept, side;
};

inline PatternSizes pattern_sizes(const fips_matrix &a) { // of a known format
#define FIPS_ROW(name, number, group, bits, kept, reader, side) \
  case FIPS_##name: return {group, bits, kept, side};
  switch (a.format) {
    FIPS_PATTERNS(FIPS_ROW)
  default: return {1, 0, 0, 0};
  }
#undef FIPS_ROW
}

FIPS_INLINE float bf16_to_float(uint16_t bits) {
  const uint32_t wide = uint32_t(bits) << 16;
  float value;
  std::memcpy(&value, &wide, 4);
  return value;
}

inline uint16_t float_to_bf16(float value) { // to nearest even, NaN stays NaN
  uint32_t bits;
  std::memcpy(&bits, &value, 4);
  const uint32_t rounded = bits + 0x7FFF + (bits >> 16 & 1); // both are made, so that loops are vectors
  return uint16_t(((bits & 0x7FFFFFFF) > 0x7F800000 ? bits | 0x400000 : rounded) >> 16);
}

inline float f16_to_float(uint16_t bits) {
  const uint32_t sign = uint32_t(bits & 0x8000) << 16;
  uint32_t rest = bits & 0x7FFF, wide;
  if (rest >= 0x7C00) {
    wide = sign | 0x7F800000 | (rest & 0x3FF) << 13;
  } else if (rest >= 0x400) {
    wide = sign | ((rest << 13) + 0x38000000);
  } else {
    const float tiny = float(rest) * 5.9604644775390625e-8f; // 2^-24
    std::memcpy(&wide, &tiny, 4);
    wide |= sign;
  }
  float value;
  std::memcpy(&value, &wide, 4);
  return value;
}

inline uint16_t float_to_f16(float value) { // to nearest even
  uint32_t bits;
  std::memcpy(&bits, &value, 4);
  const uint16_t sign = uint16_t(bits >> 16 & 0x8000);
  bits &= 0x7FFFFFFF;
  if (bits > 0x7F800000) return sign | 0x7E00;
  if (bits >= 0x477FF000) return sign | 0x7C00;
  if (bits < 0x38800000) { // subnormal: let the float unit round
    float shifted;
    std::memcpy(&shifted, &bits, 4);
    shifted += 0.5f;
    uint32_t rounded;
    std::memcpy(&rounded, &shifted, 4);
    return uint16_t(sign | (rounded - 0x3F000000));
  }
  return uint16_t(sign | ((bits + 0xFFF + (bits >> 13 & 1) - 0x38000000) >> 13));
}

inline float load_float(const void *data, int type, int64_t index) {
  switch (type) {
  case FIPS_F32: return static_cast<const float *>(data)[index];
  case FIPS_BF16: return bf16_to_float(static_cast<const uint16_t *>(data)[index]);
  case FIPS_F16: return f16_to_float(static_cast<const uint16_t *>(data)[index]);
  default: return float(static_cast<const int8_t *>(data)[index]);
  }
}

inline void store_float(void *data, int type, int64_t index, float value) {
  switch (type) {
  case FIPS_F32: static_cast<float *>(data)[index] = value; break;
  case FIPS_BF16: static_cast<uint16_t *>(data)[index] = float_to_bf16(value); break;
  default: static_cast<uint16_t *>(data)[index] = float_to_f16(value); break;
  }
}

// Several that lie together.
inline void store_floats(void *data, int type, int64_t first, const float *from, int64_t count) {
  if (type == FIPS_BF16) {
    auto *to = static_cast<uint16_t *>(data) + first;
    for (int64_t i = 0; i < count; ++i) to[i] = float_to_bf16(from[i]);
  } else {
    for (int64_t i = 0; i < count; ++i) store_float(data, type, first + i, from[i]);
  }
}

// One output from the sum of its products.
inline void store_sum(const fips_matrix &a, const fips_call &c, int64_t row, int64_t token, float sum) {
  float value = sum * (a.scales ? a.scales[row] : 1.0f);
  if (c.bias) value += load_float(c.bias, c.y_type, row);
  store_float(c.y, c.y_type, token * c.y_stride + row, value);
}

// What values are multiplied by besides the scale of their row, by column.
struct NoGroups {
  static constexpr bool there = false;
  NoGroups(const fips_matrix &, int64_t) {}
  FIPS_INLINE float at(int64_t) const { return 1; }
};

inline int64_t groups_of_row(const fips_matrix &a) { return (a.cols + a.scale_group - 1) / a.scale_group; }

struct RowGroups {
  static constexpr bool there = true;
  const uint8_t *scales = nullptr;
  int64_t groups = 0, last = 0;
  int shift = 0;
  RowGroups() = default;
  RowGroups(const fips_matrix &a, int64_t row)
      : scales(a.group_scales + row * groups_of_row(a)), groups(groups_of_row(a)), last(a.cols - 1),
        shift(lowest_bit(uint64_t(a.scale_group))) {}
  FIPS_INLINE float at(int64_t k) const { return float(scales[(k < last ? k : last) >> shift]); } // behind the end too
};

template <class T> struct Tag {
  using type = T;
};

// Calls `body` with the tag of what a matrix has; only `integers` have groups.
template <bool integers, class Body> void with_groups(const fips_matrix &a, Body &&body) {
  if constexpr (integers) {
    if (a.scale_group) return body(Tag<RowGroups>());
  }
  body(Tag<NoGroups>());
}

struct F32Values {
  using type = float;
  FIPS_INLINE static float get(float v) { return v; }
};
struct BF16Values {
  using type = uint16_t;
  FIPS_INLINE static float get(uint16_t v) { return bf16_to_float(v); }
};
struct F16Values {
  using type = uint16_t;
  FIPS_INLINE static float get(uint16_t v) { return f16_to_float(v); }
};
struct I8Values {
  using type = int8_t;
  FIPS_INLINE static float get(int8_t v) { return float(v); }
};

#define FIPS_ROW(name, number, memory, bits, reader) \
  static_assert(sizeof(memory) * 8 == bits && sizeof(reader::type) == sizeof(memory), "the table of formats is wrong");
FIPS_VALUES(FIPS_ROW)
#undef FIPS_ROW

template <class Body> bool with_values(const fips_matrix &a, Body &&body) {
#define FIPS_ROW(name, number, memory, bits, reader) \
  case FIPS_##name: body(reader()); return true;
  switch (a.value_type) {
    FIPS_VALUES(FIPS_ROW)
  default: return false;
  }
#undef FIPS_ROW
}

// The number that a code of less than 8 bits stands for, given its bits as they lie in the stream.
inline int number_of(const fips_matrix &a, int64_t bits) {
  const int64_t sign = int64_t(1) << (a.value_bits - 1);
  return a.num_levels ? a.levels[bits ^ sign] : int((bits ^ sign) - sign);
}

// The bits of the code of an entry of less than 8, as they lie in the stream.
inline int64_t field_at(const fips_matrix &a, int64_t i) {
  const uint64_t word = bits_at(static_cast<const uint8_t *>(a.values), a.value_bytes, i * a.value_bits);
  return int64_t(word & ((uint64_t(1) << a.value_bits) - 1));
}

// The number of an entry of a matrix with a memory.
inline int recalled_number(const fips_matrix &a, int64_t i) {
  int64_t place = field_at(a, i);
  for (int64_t back = 1; back <= a.memory && back <= i / a.cols % a.run; ++back)
    place ^= a.history[((back - 1) << a.value_bits) + field_at(a, i - back * a.cols)];
  return a.levels[place];
}

// The codes with a memory that vectors read as they are.
inline bool recalls(const fips_matrix &a) {
  if (a.value_bits == 2) return a.memory == 3 && a.num_levels <= 32;
  return (a.value_bits == 3 || a.value_bits == 4) && a.memory == 2;
}

// Calls `body` with the reader of the type of x.
template <class Body> void with_inputs(const fips_call &c, Body &&body) {
  if (c.x_type == FIPS_F32) return body(F32Values());
  if (c.x_type == FIPS_BF16) return body(BF16Values());
  body(F16Values());
}

inline int value_type_bits(int type) { // in memory; 0 for an unknown type
#define FIPS_ROW(name, number, memory, bits, reader) \
  case FIPS_##name: return bits;
  switch (type) {
    FIPS_VALUES(FIPS_ROW)
  default: return 0;
  }
#undef FIPS_ROW
}

// Nothing is left out, and every 64 columns of a row have one scale.
inline bool whole_blocks(const fips_matrix &a) {
  return a.format == FIPS_FULL && a.cols % 64 == 0 && !(a.scale_group && a.scale_group < 64);
}

// Whether what codes of 4 bits add to those below is linear in their bits: then halves of bytes are mapped as they lie.
inline bool maps_half_bytes(const fips_matrix &a) {
  if (a.value_bits != 4 || !recalls(a)) return false;
  for (int back = 0; back < a.memory; ++back)
    for (int code = 0; code < 16; ++code) {
      const uint8_t *added = a.history + 16 * back;
      const int lowest = code & -code;
      if (added[code] != (code ? added[lowest] ^ added[code ^ lowest] : 0) || added[code] > 63) return false;
    }
  return true;
}

// Whether rows are multiplied in pairs of blocks of 64 columns, see pairs512.h.
inline bool takes_pairs(const fips_matrix &a) {
  return a.value_type == FIPS_I8 && whole_blocks(a) && (!a.memory || maps_half_bytes(a));
}

// Calls `body` with the number of tokens of the direct path; false for more than it takes.
template <class Body> bool with_few_tokens(const fips_call &c, Body &&body) {
  switch (c.tokens) {
  case 1: return body(std::integral_constant<int, 1>());
  case 2: return body(std::integral_constant<int, 2>());
  case 3: return body(std::integral_constant<int, 3>());
  case 4: return body(std::integral_constant<int, 4>());
  default: return false;
  }
}

// Fixed point beside int8 values: x ~ scale * (the number whose signed digits to base 256 are the planes).
inline int fixed_planes(const fips_call &c) { return c.activation_bits == 8 ? 1 : c.activation_bits == 16 ? 2 : 3; }

inline float fixed_scale(float most, int planes) { // a little below 127 in every digit, so that rounding cannot carry
  if (!(most > 0)) return 1.0f;
  return most / (planes == 1 ? 127.0f : planes == 2 ? 32639.0f : 8355000.0f);
}

// Bytes ahead of what is multiplied at which a stream is fetched, of one token: processors fetch ahead themselves, but not
// beyond a page of 4 KB.
constexpr int64_t kAhead = 4096;

inline int64_t round_up(int64_t value, int64_t step) { return (value + step - 1) / step * step; }
inline int64_t min_of(int64_t a, int64_t b) { return a < b ? a : b; }

inline int thread_number() { // in a parallel region, from 0 on
#if defined(_OPENMP)
  return omp_get_thread_num();
#else
  return 0;
#endif
}

inline int thread_count() { // of the parallel region
#if defined(_OPENMP)
  return omp_get_num_threads();
#else
  return 1;
#endif
}

// Room for `count` elements, for the time of a call. Not in parallel regions: what is thrown would end the process.
template <class T> T *scratch(Scratch use, int64_t count) {
  return static_cast<T *>(fips_scratch(use, count * int64_t(sizeof(T))));
}

// Room for the same number of elements for every thread of a call; they share no line of the cache.
template <class T> class PerThread {
public:
  PerThread(Scratch use, int64_t count, int threads)
      : stride_((count * int64_t(sizeof(T)) + 127) / 128 * 128 / int64_t(sizeof(T))),
        data_(scratch<T>(use, stride_ * threads)) {}
  T *mine() const { return data_ + stride_ * thread_number(); }

private:
  int64_t stride_;
  T *data_;
};

// Rows, or tokens, that a thread takes at a time: as even as possible over the threads, at most `most`, whole units.
inline int64_t even_share(int64_t count, int threads, int64_t most, int64_t unit) {
  const int64_t rounds = (count + threads * most - 1) / (threads * most);
  return round_up((count + rounds * threads - 1) / (rounds * threads), unit);
}

} // namespace
