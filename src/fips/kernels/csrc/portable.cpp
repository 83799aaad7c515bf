// Plain C++: any processor, any compiler.
#include <type_traits>

#include "dense_basis.h"
#include "paths.h"
#include "rotate.h"
#include "sparse_tokens.h"
#include "trellis_search.h"

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

namespace {

template <int C> struct PlainLanes {
  static constexpr int lanes = C;
  int32_t lane[C];
  template <class Body> static PlainLanes each(Body &&body) {
    PlainLanes v;
    for (int i = 0; i < C; ++i) v.lane[i] = body(i);
    return v;
  }
  static PlainLanes all(int32_t value) {
    return each([=](int) { return value; });
  }
  template <int COUNT> static PlainLanes spread(const int32_t *from) {
    return each([=](int i) { return from[i % COUNT]; });
  }
  static PlainLanes load(const void *from) {
    PlainLanes v;
    std::memcpy(v.lane, from, sizeof(v.lane));
    return v;
  }
  void store(void *to) const { std::memcpy(to, lane, sizeof(lane)); }
  // Number i ^ `places` at i.
  PlainLanes exchanged(int places) const {
    return each([&](int i) { return lane[i ^ places]; });
  }
  PlainLanes plus(const PlainLanes &other) const {
    return each([&](int i) { return lane[i] + other.lane[i]; });
  }
  PlainLanes minus(const PlainLanes &other) const {
    return each([&](int i) { return lane[i] - other.lane[i]; });
  }
  PlainLanes least(const PlainLanes &other) const {
    return each([&](int i) { return lane[i] < other.lane[i] ? lane[i] : other.lane[i]; });
  }
  PlainLanes high_bits() const {
    return each([&](int i) { return lane[i] & ~15; });
  }
  void low_bits(uint8_t *to) const {
    for (int i = 0; i < C; ++i) to[i] = uint8_t(lane[i] & 15);
  }
};

} // namespace

bool fips_search_portable(const fips_search &search) {
  return search_paths<PlainLanes<4>, PlainLanes<8>, PlainLanes<16>>(search);
}

void fips_recall_portable(const fips_matrix &a, int threads, int8_t *wide) {
  const int mask = (1 << a.value_bits) - 1;
  const int64_t run = 1 << 10; // columns that a thread takes, from the last row on: codes above are still there
#pragma omp parallel for num_threads(threads) schedule(static)
  for (int64_t k0 = 0; k0 < a.cols; k0 += run) {
    const int64_t k1 = min_of(k0 + run, a.cols);
    for (int64_t row = a.rows; row-- > 0;) {
      int8_t *to = wide + row * a.cols;
      const int64_t above = min_of(a.memory, row % a.run);
      for (int64_t k = k0; k < k1; ++k) {
        int place = to[k] & mask;
        for (int64_t back = 1; back <= above; ++back)
          place ^= a.history[((back - 1) << a.value_bits) + (to[k - back * a.cols] & mask)];
        to[k] = a.levels[place];
      }
    }
  }
}
