// Many tokens where most entries are kept: rows are decoded into floats, a few at a time, and registers hold the sums
// of blocks of rows by tokens. With AVX-512 see tile_dots512.h.
#pragma once
#include "values256.h"
#include "sparse_tokens.h"

namespace {

constexpr int64_t kDecodedRows = 48, kDecodedColumns = 256, kTokensPerPass = 512;

// Columns [k0, k1) of one row as floats, zero where nothing is kept.
template <class Reader, class Groups, class Cursor>
void decode_floats(const Reader &reader, const Groups &groups, int64_t row, int64_t k0, int64_t k1, Cursor &cursor,
                   float *to) {
  for (int64_t k = k0; k < k1; k += 64, to += 64)
    read_columns(reader, row, k, cursor, [&](int64_t j, __m256 w) {
      if constexpr (Groups::there) w = _mm256_mul_ps(w, _mm256_set1_ps(groups.at(k + j)));
      _mm256_store_ps(to + j, w);
    });
}

// The outputs of a block from its sums (rows, tokens), as a matrix (tokens, rows).
template <int64_t MOST>
void store_block(const fips_matrix &a, const fips_call &c, int64_t row0, int64_t rows, int64_t t0, int64_t tokens,
                 const float *sums, int64_t stride) {
  constexpr int64_t few = 16;
  float turned[few][MOST];
  for (int64_t t = 0; t < tokens; t += few) {
    const int64_t count = min_of(few, tokens - t);
    for (int64_t r = 0; r < rows; ++r) {
      const float scale = a.scales ? a.scales[row0 + r] : 1.0f;
      for (int64_t i = 0; i < count; ++i) turned[i][r] = sums[r * stride + t + i] * scale;
      if (!c.bias) continue;
      const float bias = load_float(c.bias, c.y_type, row0 + r);
      for (int64_t i = 0; i < count; ++i) turned[i][r] += bias;
    }
    for (int64_t i = 0; i < count; ++i) store_floats(c.y, c.y_type, (t0 + t + i) * c.y_stride + row0, turned[i], rows);
  }
}

// sums (R, C vectors of tokens) += weights (R, count) x (count, C vectors)
template <class V, int R, int C>
void add_block(const float *weights, const float *x, int64_t count, float *sums, int64_t stride) {
  typename V::type acc[R][C];
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
    for (int j = 0; j < C; ++j) acc[r][j] = V::load(sums + r * stride + j * V::width);
  for (int64_t k = 0; k < count; ++k) {
    typename V::type xk[C];
#pragma GCC unroll 4
    for (int j = 0; j < C; ++j) xk[j] = V::load(x + (k * C + j) * V::width);
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) {
      const typename V::type w = V::set(weights[r * kDecodedColumns + k]);
#pragma GCC unroll 4
      for (int j = 0; j < C; ++j) acc[r][j] = V::fma(w, xk[j], acc[r][j]);
    }
  }
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
    for (int j = 0; j < C; ++j) V::store(sums + r * stride + j * V::width, acc[r][j]);
}

// Rows [row0, row0 + rows) by the tokens from t0 on of one pass; the sums of rows behind the last are not looked at.
template <class V, int R, int C, class Groups, class Cursor, class Reader>
void blocks_chunk(const fips_matrix &a, const fips_call &c, const Reader &reader, int64_t row0, int64_t t0,
                  const float *x_all, float *sums, float *weights) {
  constexpr int64_t block = C * V::width;
  const int64_t rows = min_of(kDecodedRows, a.rows - row0), tokens = min_of(kTokensPerPass, c.tokens - t0);
  const int64_t stride = round_up(tokens, block);
  std::memset(sums, 0, size_t(kDecodedRows * stride) * sizeof *sums);
  Cursor next[kDecodedRows];
  for (int64_t r = 0; r < rows; ++r) next[r] = Cursor(a, reader.start(row0 + r));
  for (int64_t k0 = 0; k0 < a.cols; k0 += kDecodedColumns) {
    const int64_t k1 = min_of(k0 + kDecodedColumns, a.cols);
    for (int64_t r = 0; r < rows; ++r)
      decode_floats(reader, Groups(a, row0 + r), row0 + r, k0, k1, next[r], weights + r * kDecodedColumns);
    for (int64_t t = 0; t < tokens; t += block)
      for (int64_t r = 0; r < rows; r += R)
        add_block<V, R, C>(weights + r * kDecodedColumns, x_all + (t0 + t) * a.cols + k0 * block, k1 - k0,
                           sums + r * stride + t, stride);
  }
  store_block<kDecodedRows>(a, c, row0, rows, t0, tokens, sums, stride);
}

// R rows by C vectors of tokens fill the registers of the machine.
template <class V, int R, int C> bool blocks_path(const fips_matrix &a, const fips_call &c) {
  constexpr int64_t block = C * V::width;
  static_assert(kDecodedRows % R == 0 && kTokensPerPass % block == 0, "blocks do not fill their buffers");
  float *x = scratch<float>(Scratch::tokens, round_up(c.tokens, block) * a.cols);
  const int64_t most = round_up(min_of(kTokensPerPass, c.tokens), block);
  const PerThread<float> sums(Scratch::sums, kDecodedRows * most, c.threads);
  const PerThread<float> weights(Scratch::weights, kDecodedRows * kDecodedColumns, c.threads);
  transpose_tokens(a, c, block, x);
  const int64_t chunks = (a.rows + kDecodedRows - 1) / kDecodedRows;
  const int64_t passes = (c.tokens + kTokensPerPass - 1) / kTokensPerPass;
  return with_cursor(a, [&](const auto &reader, auto cursor) {
    with_groups<reads_integers<decltype(cursor)>>(a, [&](auto tag) {
      using Groups = typename decltype(tag)::type;
#pragma omp parallel for num_threads(c.threads) schedule(dynamic) collapse(2)
      for (int64_t pass = 0; pass < passes; ++pass)
        for (int64_t i = 0; i < chunks; ++i)
          blocks_chunk<V, R, C, Groups, decltype(cursor)>(a, c, reader, i * kDecodedRows, pass * kTokensPerPass, x,
                                                          sums.mine(), weights.mine());
    });
  });
}

} // namespace
