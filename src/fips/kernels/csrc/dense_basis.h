// y = x W for a dense row-major W of shape (K, N) and few tokens: W is read once, in the order it lies in memory.
#pragma once
#include "packed.h"

namespace {

// `V::read<Values>(from)` loads V::width values as floats.
template <class V, int T, int NV, class Values>
void columns_chunk(const fips_matrix &a, const fips_call &c, int64_t j0, const float *x) {
  const auto *w = static_cast<const typename Values::type *>(a.values) + j0;
  typename V::type acc[T][NV];
  for (int t = 0; t < T; ++t)
    for (int j = 0; j < NV; ++j) acc[t][j] = V::set(0);
  for (int64_t k = 0; k < a.rows; ++k, w += a.cols) {
    typename V::type row[NV];
    for (int j = 0; j < NV; ++j) row[j] = V::template read<Values>(w + j * V::width);
    for (int t = 0; t < T; ++t) {
      const typename V::type xk = V::set(x[t * a.rows + k]);
      for (int j = 0; j < NV; ++j) acc[t][j] = V::fma(xk, row[j], acc[t][j]);
    }
  }
  alignas(64) float sums[V::width];
  for (int t = 0; t < T; ++t) {
    for (int j = 0; j < NV; ++j) {
      V::store(sums, acc[t][j]);
      for (int i = 0; i < V::width; ++i)
        store_float(c.y, c.y_type, t * c.y_stride + j0 + j * V::width + i, sums[i]);
    }
  }
}

template <class Values> void columns_rest(const fips_matrix &a, const fips_call &c, int64_t j0, const float *x) {
  const auto *w = static_cast<const typename Values::type *>(a.values);
  for (int64_t t = 0; t < c.tokens; ++t) {
    for (int64_t j = j0; j < a.cols; ++j) {
      float sum = 0;
      for (int64_t k = 0; k < a.rows; ++k) sum += x[t * a.rows + k] * Values::get(w[k * a.cols + j]);
      store_float(c.y, c.y_type, t * c.y_stride + j, sum);
    }
  }
}

template <class V, int T, class Values> void columns_path(const fips_matrix &a, const fips_call &c, const float *x) {
  constexpr int NV = T == 1 ? 4 : 2;
  constexpr int64_t wide = NV * V::width;
  const int64_t whole = a.cols / wide * wide, units = (a.cols - whole) / V::width;
#pragma omp parallel for num_threads(c.threads) schedule(static)
  for (int64_t chunk = 0; chunk < whole / wide + units + 1; ++chunk) {
    if (chunk < whole / wide)
      columns_chunk<V, T, NV, Values>(a, c, chunk * wide, x);
    else if (chunk < whole / wide + units)
      columns_chunk<V, T, 1, Values>(a, c, whole + (chunk - whole / wide) * V::width, x);
    else
      columns_rest<Values>(a, c, whole + units * V::width, x);
  }
}

template <class V> bool columns_path(const fips_matrix &a, const fips_call &c) {
  if (a.format != FIPS_FULL || a.value_type == FIPS_I8 || c.tokens > 4) return false;
  float *x = scratch<float>(Scratch::tokens, c.tokens * a.rows);
  for (int64_t t = 0; t < c.tokens; ++t)
    for (int64_t k = 0; k < a.rows; ++k) x[t * a.rows + k] = load_float(c.x, c.x_type, t * c.x_stride + k);
  return with_values(a, [&](auto values) {
    using Values = decltype(values);
    switch (c.tokens) {
    case 1: columns_path<V, 1, Values>(a, c, x); break;
    case 2: columns_path<V, 2, Values>(a, c, x); break;
    case 3: columns_path<V, 3, Values>(a, c, x); break;
    default: columns_path<V, 4, Values>(a, c, x); break;
    }
  });
}

} // namespace
