// Plain C++: any processor, any compiler.
#include <type_traits>

#include "columns.h"
#include "paths.h"
#include "rotate.h"
#include "tokens.h"

namespace {

template <int W> struct PlainVector {
  static constexpr int width = W;
  struct type {
    float lane[W];
  };
  static type load(const float *from) {
    type v;
    for (int i = 0; i < W; ++i) v.lane[i] = from[i];
    return v;
  }
  template <class Values> static type read(const typename Values::type *from) {
    type v;
    for (int i = 0; i < W; ++i) v.lane[i] = Values::get(from[i]);
    return v;
  }
  static void store(float *to, const type &v) {
    for (int i = 0; i < W; ++i) to[i] = v.lane[i];
  }
  static type set(float value) {
    type v;
    for (int i = 0; i < W; ++i) v.lane[i] = value;
    return v;
  }
  static type fma(const type &a, const type &b, type c) {
    for (int i = 0; i < W; ++i) c.lane[i] += a.lane[i] * b.lane[i];
    return c;
  }
};

} // namespace

bool fips_portable(const fips_matrix &a, const fips_call &c) {
  if (c.path == FIPS_TILES) return false;
  return c.tokens == 1 ? tokens_path<PlainVector<1>, 1>(a, c) : tokens_path<PlainVector<8>>(a, c);
}

void fips_widen_portable(const uint8_t *stream, int64_t bytes, int bits, int64_t first, int64_t count, int8_t *to) {
  const uint64_t mask = (uint64_t(1) << bits) - 1, sign = uint64_t(1) << (bits - 1);
  for (int64_t i = 0; i < count; i += 8) {
    uint64_t word = bits_at(stream, bytes, (first + i) * bits);
    for (int64_t j = 0; j < 8 && i + j < count; ++j, word >>= bits)
      to[i + j] = int8_t(int64_t((word & mask) ^ sign) - int64_t(sign));
  }
}

void fips_rotate_portable(const fips_matrix &a, const fips_call &c, float *to) {
#pragma omp parallel for num_threads(c.threads) schedule(static) if (c.tokens > 1)
  for (int64_t t = 0; t < c.tokens; ++t) {
    float *row = to + t * a.cols;
    for (int64_t k = 0; k < a.cols; ++k) row[k] = load_float(c.x, c.x_type, t * c.x_stride + k);
    rotate_row(a, row);
  }
}

bool fips_columns_portable(const fips_matrix &a, const fips_call &c) { return columns_path<PlainVector<8>>(a, c); }
