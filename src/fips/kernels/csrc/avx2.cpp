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

// Eight values from `v` on, of which `left` exist.
template <class Values> __m256 read_values(const typename Values::type *v, int64_t left) {
  if (left >= 8) return read8<Values>(v);
  alignas(32) float some[8] = {};
  for (int64_t i = 0; i < left; ++i) some[i] = Values::get(v[i]);
  return _mm256_load_ps(some);
}

inline float total(__m256 v) {
  __m128 sum = _mm_add_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
  sum = _mm_add_ps(sum, _mm_movehl_ps(sum, sum));
  return _mm_cvtss_f32(_mm_add_ss(sum, _mm_movehdup_ps(sum)));
}

template <int T, class Reader, class Values>
void direct_row(const fips_matrix &a, const fips_call &c, const Reader &reader, int64_t row, const float *x,
                int64_t padded) {
  const auto *v = static_cast<const typename Values::type *>(a.values) + reader.start(row);
  int64_t left = a.num_values - reader.start(row);
  __m256 acc[T];
  for (int t = 0; t < T; ++t) acc[t] = _mm256_setzero_ps();
  for (int64_t k = 0; k < a.cols; k += 64) {
    uint64_t mask = reader.mask(row, k);
    for (int64_t j = k; mask; j += 8, mask >>= 8) {
      const __m256i lane = _mm256_cvtepi8_epi32(
          _mm_loadl_epi64(reinterpret_cast<const __m128i *>(spread.lane[mask & 0xFF])));
      const __m256 w = _mm256_permutevar8x32_ps(read_values<Values>(v, left), lane);
      const __m256 kept = _mm256_andnot_ps(_mm256_castsi256_ps(_mm256_srai_epi32(lane, 31)), w);
      for (int t = 0; t < T; ++t) acc[t] = _mm256_fmadd_ps(kept, _mm256_load_ps(x + t * padded + j), acc[t]);
      const int count = popcount64(mask & 0xFF);
      v += count, left -= count;
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
    with_values(a, [&](auto values) {
      using Reader = std::decay_t<decltype(reader)>;
#pragma omp parallel for num_threads(c.threads) schedule(static)
      for (int64_t row = 0; row < a.rows; ++row)
        direct_row<T, Reader, decltype(values)>(a, c, reader, row, x, padded);
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
