// Many tokens in 8 bits beside numbers of at most 8: both are words of 16 bits, so that one instruction multiplies 16 of
// them and adds pairs, twice as many as of floats. Rows are decoded a few at a time, as in row_blocks256.h.
#pragma once
#include "inputs256.h"
#include "row_blocks256.h"

namespace {

constexpr int64_t kWordRows = 24; // with the tokens of a block they fit into 32 KB

// Tokens as digits, 64 of which share a scale: [token block][cols / 2][tokens of the block][2], and the scales
// [token block][cols / 64][tokens of the block]; zero where there is no column or no token.
struct DigitTokens {
  int16_t *digits;
  float *scales;
};

template <int BLOCK>
void lay_out_digits(const fips_matrix &a, const fips_call &c, const DigitTokens &to) {
  const int64_t padded = round_up(a.cols, 64), blocks = (c.tokens + BLOCK - 1) / BLOCK;
  with_inputs(c, [&](auto values) {
    using Values = decltype(values);
    const auto *x = static_cast<const typename Values::type *>(c.x);
#pragma omp parallel for collapse(2) num_threads(c.threads) schedule(static)
    for (int64_t b = 0; b < blocks; ++b)
      for (int64_t k = 0; k < padded; k += 64) {
        alignas(32) int16_t rows[BLOCK][64] = {};
        float *scales = to.scales + (b * padded + k) / 64 * BLOCK;
        for (int t = 0; t < BLOCK; ++t) {
          scales[t] = 0;
          if (b * BLOCK + t >= c.tokens) continue;
          alignas(32) float numbers[64];
          read_floats<Values>(x + (b * BLOCK + t) * c.x_stride + k, min_of(64, c.x_columns - k), 64, numbers);
          digits_of(numbers, 64, rows[t], scales + t);
        }
        auto *pairs = reinterpret_cast<int32_t *>(to.digits + (b * padded + k) * BLOCK);
        for (int p = 0; p < 32; ++p)
#pragma GCC unroll 16
          for (int t = 0; t < BLOCK; ++t) std::memcpy(pairs + p * BLOCK + t, rows[t] + 2 * p, sizeof *pairs);
      }
  });
}

// Columns [k0, k1) of one row as words, zero where nothing is kept.
template <class Reader, class Cursor>
void decode_words(const Reader &reader, int64_t row, int64_t k0, int64_t k1, Cursor &cursor, int16_t *to) {
  for (int64_t k = k0; k < k1; k += 64, to += 64) {
    __m256i whole[8];
    read_columns(reader, row, k, cursor, [&](int64_t j, __m256 w) { whole[j / 8] = _mm256_cvtps_epi32(w); });
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) // packing takes turns between the halves of registers
      _mm256_store_si256(reinterpret_cast<__m256i *>(to + 16 * i),
                         _mm256_permute4x64_epi64(_mm256_packs_epi32(whole[2 * i], whole[2 * i + 1]), 0xD8));
  }
}

// sums (R, 8 C tokens) += weights (R, 2 pairs) x (2 pairs, 8 C tokens), times the scales of both.
template <int R, int C>
FIPS_INLINE void add_digits(const int16_t *weights, const int16_t *x, int64_t pairs, const float *own, int64_t own_stride,
                            const float *scales, float *sums, int64_t stride) {
  __m256i acc[R][C];
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
    for (int j = 0; j < C; ++j) acc[r][j] = _mm256_setzero_si256();
  for (int64_t p = 0; p < pairs; ++p) {
    __m256i xp[C];
#pragma GCC unroll 4
    for (int j = 0; j < C; ++j) {
      xp[j] = _mm256_load_si256(reinterpret_cast<const __m256i *>(x) + p * C + j);
      __asm__("" : "+x"(xp[j])); // read once
    }
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) {
      int32_t pair;
      std::memcpy(&pair, weights + r * kDecodedColumns + 2 * p, sizeof pair);
      const __m256i w = _mm256_set1_epi32(pair);
#pragma GCC unroll 4
      for (int j = 0; j < C; ++j) { // GCC itself multiplies early, for which it has no registers, and copies sums
        const __m256i products = _mm256_madd_epi16(w, xp[j]);
        __asm__("vpaddd %1, %0, %0" : "+x"(acc[r][j]) : "x"(products));
      }
    }
  }
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
    for (int j = 0; j < C; ++j) {
      float *sum = sums + r * stride + 8 * j;
      const __m256 scale = _mm256_mul_ps(_mm256_load_ps(scales + 8 * j), _mm256_set1_ps(own[r * own_stride]));
      _mm256_store_ps(sum, _mm256_fmadd_ps(_mm256_cvtepi32_ps(acc[r][j]), scale, _mm256_load_ps(sum)));
    }
}

// What a thread works with: decoded rows, their scales per `unit` columns, and sums.
struct DigitBlock {
  int16_t *weights;
  float *own, *sums;
};

template <int R, int C, class Cursor, class Reader>
void digit_chunk(const fips_matrix &a, const fips_call &c, const Reader &reader, int64_t row0, int64_t t0,
                 const DigitTokens &x, const DigitBlock &work) {
  constexpr int64_t block = 8 * C;
  const int64_t padded = round_up(a.cols, 64), unit = a.scale_group ? min_of(a.scale_group, 64) : 64;
  const int64_t units = kDecodedColumns / unit;
  const int64_t rows = min_of(kWordRows, a.rows - row0), tokens = min_of(kTokensPerPass, c.tokens - t0);
  const int64_t stride = round_up(tokens, block);
  std::memset(work.sums, 0, size_t(kWordRows * stride) * sizeof *work.sums);
  Cursor next[kWordRows];
  for (int64_t r = 0; r < rows; ++r) next[r] = Cursor(a, reader.start(row0 + r));
  for (int64_t k0 = 0; k0 < padded; k0 += kDecodedColumns) {
    const int64_t k1 = min_of(k0 + kDecodedColumns, padded);
    for (int64_t r = 0; r < rows; ++r) {
      decode_words(reader, row0 + r, k0, k1, next[r], work.weights + r * kDecodedColumns);
      const RowGroups groups = a.scale_group ? RowGroups(a, row0 + r) : RowGroups();
      for (int64_t k = k0; k < k1; k += unit) work.own[r * units + (k - k0) / unit] = a.scale_group ? groups.at(k) : 1.0f;
    }
    for (int64_t t = 0; t < tokens; t += block) {
      const int16_t *xt = x.digits + (t0 + t) * padded;
      const float *scales = x.scales + (t0 + t) * (padded / 64);
      for (int64_t r = 0; r < rows; r += R)
        for (int64_t k = k0; k < k1; k += unit)
          add_digits<R, C>(work.weights + r * kDecodedColumns + k - k0, xt + k * block, unit / 2,
                           work.own + r * units + (k - k0) / unit, units, scales + k / 64 * block,
                           work.sums + r * stride + t, stride);
    }
  }
  for (int64_t t = 0; t < tokens; ++t)
    for (int64_t r = 0; r < rows; ++r) store_sum(a, c, row0 + r, t0 + t, work.sums[r * stride + t]);
}

// R rows by 8 C tokens fill the registers of the machine.
template <int R, int C> bool digit_blocks_path(const fips_matrix &a, const fips_call &c) {
  constexpr int64_t block = 8 * C, most_units = kDecodedColumns / 16;
  static_assert(kWordRows % R == 0 && kTokensPerPass % block == 0, "blocks do not fill their buffers");
  const int64_t padded = round_up(a.cols, 64), tokens = round_up(c.tokens, block);
  const DigitTokens x{scratch<int16_t>(Scratch::tokens, tokens * padded),
                      scratch<float>(Scratch::scales, tokens * (padded / 64))};
  const int64_t most = round_up(min_of(kTokensPerPass, c.tokens), block);
  const PerThread<float> sums(Scratch::sums, kWordRows * (most + most_units), c.threads);
  const PerThread<int16_t> weights(Scratch::weights, kWordRows * kDecodedColumns, c.threads);
  lay_out_digits<block>(a, c, x);
  const int64_t chunks = (a.rows + kWordRows - 1) / kWordRows;
  const int64_t passes = (c.tokens + kTokensPerPass - 1) / kTokensPerPass;
  return with_cursor(a, [&](const auto &reader, auto cursor) {
    if constexpr (reads_integers<decltype(cursor)>) {
#pragma omp parallel for num_threads(c.threads) schedule(dynamic) collapse(2)
      for (int64_t pass = 0; pass < passes; ++pass)
        for (int64_t i = 0; i < chunks; ++i) {
          const DigitBlock work{weights.mine(), sums.mine() + kWordRows * most, sums.mine()};
          digit_chunk<R, C, decltype(cursor)>(a, c, reader, i * kWordRows, pass * kTokensPerPass, x, work);
        }
    }
  });
}

} // namespace
