// Many tokens without a matrix unit: every kept entry multiplies a vector of tokens, so zeros cost nothing.
//
// `V` is a vector of `V::width` floats. Inputs are transposed to (K, block of tokens) once, so that one kept entry is
// one broadcast and one load per multiply-add.
#pragma once
#include "packed.h"

namespace {

constexpr int64_t kRowChunk = 32;

// x (tokens, cols) -> [token block][cols][block] in float, zero where there is no token
inline void transpose_tokens(const fips_matrix &a, const fips_call &c, int64_t block, float *out) {
  const int64_t blocks = (c.tokens + block - 1) / block;
#pragma omp parallel for collapse(2) num_threads(c.threads) schedule(static)
  for (int64_t b = 0; b < blocks; ++b) {
    for (int64_t k0 = 0; k0 < a.cols; k0 += 64) {
      float *to = out + b * block * a.cols;
      const int64_t k1 = min_of(k0 + 64, a.cols), used = min_of(block, c.tokens - b * block);
      for (int64_t t = 0; t < used; ++t)
        for (int64_t k = k0; k < k1; ++k)
          to[k * block + t] = load_float(c.x, c.x_type, (b * block + t) * c.x_stride + k);
      for (int64_t k = k0; k < k1; ++k)
        for (int64_t t = used; t < block; ++t) to[k * block + t] = 0;
    }
  }
}

template <class V, int NV, class Values, class Reader, class Groups>
FIPS_INLINE void add_row(const Reader &reader, const Groups &groups, int64_t row, int64_t k0, int64_t k1,
                         const typename Values::type *&values, const float *x, float *sums) {
  constexpr int64_t block = NV * V::width;
  typename V::type acc[NV];
  for (int j = 0; j < NV; ++j) acc[j] = V::load(sums + j * V::width);
  for (int64_t k = k0; k < k1; k += 64) {
    uint64_t mask = reader.mask(row, k);
    const float *xk = x + k * block;
    for (; mask; mask &= mask - 1) {
      const int64_t column = lowest_bit(mask);
      const float value = Values::get(*values);
      const typename V::type w = V::set(Groups::there ? value * groups.at(k + column) : value);
      values += reader.stride();
      const float *xc = xk + column * block;
      for (int j = 0; j < NV; ++j) acc[j] = V::fma(w, V::load(xc + j * V::width), acc[j]);
    }
  }
  for (int j = 0; j < NV; ++j) V::store(sums + j * V::width, acc[j]);
}

template <class V, int NV, class Values, class Groups, class Reader>
void tokens_chunk(const fips_matrix &a, const fips_call &c, const Reader &reader, int64_t row0, const float *x_all) {
  constexpr int64_t block = NV * V::width;
  const int64_t k_block = round_up(8192 / block, 64); // 32 KB of inputs
  const int64_t rows = min_of(kRowChunk, a.rows - row0);
  const auto *values = static_cast<const typename Values::type *>(a.values);
  const typename Values::type *next[kRowChunk];
  alignas(64) float sums[kRowChunk * block];
  for (int64_t t0 = 0; t0 < c.tokens; t0 += block) {
    for (int64_t r = 0; r < rows; ++r) next[r] = values + reader.start(row0 + r);
    std::memset(sums, 0, sizeof sums);
    const float *x = x_all + t0 * a.cols;
    for (int64_t k0 = 0; k0 < a.cols; k0 += k_block)
      for (int64_t r = 0; r < rows; ++r)
        add_row<V, NV, Values>(reader, Groups(a, row0 + r), row0 + r, k0, min_of(k0 + k_block, a.cols), next[r], x,
                               sums + r * block);
    for (int64_t t = 0; t < min_of(block, c.tokens - t0); ++t)
      for (int64_t r = 0; r < rows; ++r) store_sum(a, c, row0 + r, t0 + t, sums[r * block + t]);
  }
}

template <class V, int NV> bool tokens_path(const fips_matrix &a, const fips_call &c) {
  constexpr int64_t block = NV * V::width;
  float *x = scratch<float>(Scratch::tokens, round_up(c.tokens, block) * a.cols);
  transpose_tokens(a, c, block, x);
  return with_reader(a, [&](const auto &reader) {
    with_values(a, [&](auto values) {
      with_groups<std::is_same_v<decltype(values), I8Values>>(a, [&](auto tag) {
        using Groups = typename decltype(tag)::type;
#pragma omp parallel for num_threads(c.threads) schedule(dynamic)
        for (int64_t row0 = 0; row0 < a.rows; row0 += kRowChunk)
          tokens_chunk<V, NV, decltype(values), Groups>(a, c, reader, row0, x);
      });
    });
  });
}

template <class V> bool tokens_path(const fips_matrix &a, const fips_call &c) {
  if (c.tokens <= V::width) return tokens_path<V, 1>(a, c);
  return c.tokens <= 2 * V::width ? tokens_path<V, 2>(a, c) : tokens_path<V, 4>(a, c);
}

} // namespace
