// AVX2 with FMA: eight columns at a time, spread by a permutation looked up from eight mask bits.
#include <immintrin.h>

#include <type_traits>

#include "blocks.h"
#include "columns.h"
#include "paths.h"
#include "tokens.h"

namespace {

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
  const typename Values::type *v;
  int64_t left;
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
  alignas(32) uint8_t place[32];
  alignas(32) int32_t above[8];
  __m128i rest;
  explicit NarrowLanes(int bits) : rest(_mm_cvtsi32_si128(32 - bits)) {
    for (int i = 0; i < 8; ++i) {
      const int byte = i * bits / 8;
      above[i] = 32 - bits - i * bits % 8;
      for (int j = 0; j < 4; ++j) place[4 * i + j] = byte + j < 8 ? uint8_t(byte + j) : 0x80;
    }
  }
  FIPS_INLINE __m256i integers(uint64_t word) const {
    const __m256i places = _mm256_load_si256(reinterpret_cast<const __m256i *>(place));
    const __m256i bytes = _mm256_shuffle_epi8(_mm256_set1_epi64x(int64_t(word)), places);
    const __m256i top = _mm256_sllv_epi32(bytes, _mm256_load_si256(reinterpret_cast<const __m256i *>(above)));
    return _mm256_sra_epi32(top, rest);
  }
};

struct NarrowCursor {
  const uint8_t *stream;
  int64_t bytes, bits, at;
  NarrowLanes lanes;
  NarrowCursor(const fips_matrix &a, int64_t first)
      : stream(static_cast<const uint8_t *>(a.values)), bytes((a.num_values * a.value_bits + 7) / 8),
        bits(a.value_bits), at(first * a.value_bits), lanes(int(a.value_bits)) {}
  FIPS_INLINE __m256 read() const { return _mm256_cvtepi32_ps(lanes.integers(bits_at(stream, bytes, at))); }
  FIPS_INLINE void skip(int count) { at += count * bits; }
};

inline float total(__m256 v) {
  __m128 sum = _mm_add_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
  sum = _mm_add_ps(sum, _mm_movehl_ps(sum, sum));
  return _mm_cvtss_f32(_mm_add_ss(sum, _mm_movehdup_ps(sum)));
}

template <int T, class Reader, class Cursor>
void direct_row(const fips_matrix &a, const fips_call &c, const Reader &reader, int64_t row, const float *x,
                int64_t padded) {
  Cursor cursor(a, reader.start(row));
  __m256 acc[T];
  for (int t = 0; t < T; ++t) acc[t] = _mm256_setzero_ps();
  const auto add = [&](int64_t k, __m256 w) {
    for (int t = 0; t < T; ++t) acc[t] = _mm256_fmadd_ps(w, _mm256_load_ps(x + t * padded + k), acc[t]);
  };
  for (int64_t k = 0; k < a.cols; k += 64) {
    uint64_t mask = reader.mask(row, k);
    if (std::is_same_v<Reader, DenseReader> && mask == ~uint64_t(0)) {
      for (int64_t j = k; j < k + 64; j += 8, cursor.skip(8)) add(j, cursor.read());
      continue;
    }
    for (int64_t j = k; mask; j += 8, mask >>= 8) {
      const __m256i lane = _mm256_cvtepi8_epi32(
          _mm_loadl_epi64(reinterpret_cast<const __m128i *>(spread.lane[mask & 0xFF])));
      const __m256 w = _mm256_permutevar8x32_ps(cursor.read(), lane);
      add(j, _mm256_andnot_ps(_mm256_castsi256_ps(_mm256_srai_epi32(lane, 31)), w));
      cursor.skip(popcount64(mask & 0xFF));
    }
  }
  for (int t = 0; t < T; ++t) store_sum(a, c, row, t, total(acc[t]));
}

template <int T> bool direct_path(const fips_matrix &a, const fips_call &c) {
  static thread_local Scratch scratch;
  const int64_t padded = round_up(a.cols, 64);
  float *x = scratch.get<float>(T * padded);
  for (int t = 0; t < T; ++t)
    for (int64_t k = 0; k < padded; ++k)
      x[t * padded + k] = k < a.cols ? load_float(c.x, c.x_type, t * c.x_stride + k) : 0.0f;
  if (a.format == FIPS_BLOCK_ROWS) return false;
  return with_reader(a, [&](const auto &reader) {
    const auto multiply = [&](auto row) {
#pragma omp parallel for num_threads(c.threads) schedule(static)
      for (int64_t i = 0; i < a.rows; ++i) row(i);
    };
    using Reader = std::decay_t<decltype(reader)>;
    if (a.value_bits < 8)
      return multiply([&](int64_t row) { direct_row<T, Reader, NarrowCursor>(a, c, reader, row, x, padded); });
    with_values(a, [&](auto values) {
      using Cursor = ValueCursor<decltype(values)>;
      multiply([&](int64_t row) { direct_row<T, Reader, Cursor>(a, c, reader, row, x, padded); });
    });
  });
}

} // namespace

bool fips_avx2(const fips_matrix &a, const fips_call &c) {
  if (c.path == FIPS_TOKENS) return tokens_path<Vector8>(a, c);
  if (c.path == FIPS_TILES) return blocks_path<Vector8, 6, 2>(a, c);
  if (c.path != FIPS_DIRECT) return false;
  switch (c.tokens) {
  case 1: return direct_path<1>(a, c);
  case 2: return direct_path<2>(a, c);
  case 3: return direct_path<3>(a, c);
  case 4: return direct_path<4>(a, c);
  default: return false;
  }
}

bool fips_columns_avx2(const fips_matrix &a, const fips_call &c) { return columns_path<Vector8>(a, c); }

void fips_widen_avx2(const uint8_t *stream, int64_t bytes, int bits, int64_t first, int64_t count, int8_t *to) {
  const NarrowLanes lanes(bits);
  const auto eight = [&](int64_t i) { return lanes.integers(bits_at(stream, bytes, (first + i) * bits)); };
  const __m256i order = _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7); // packing takes turns between the halves
  int64_t i = 0;
  for (; i + 32 <= count; i += 32) {
    const __m256i low = _mm256_packs_epi32(eight(i), eight(i + 8)), high = _mm256_packs_epi32(eight(i + 16), eight(i + 24));
    const __m256i numbers = _mm256_permutevar8x32_epi32(_mm256_packs_epi16(low, high), order);
    _mm256_storeu_si256(reinterpret_cast<__m256i *>(to + i), numbers);
  }
  if (i < count) fips_widen_portable(stream, bytes, bits, first + i, count - i, to + i);
}
