// Tokens that kernels cannot multiply as a dense layer does, once more and in float64: those with NaN or Inf, and beside
// integer values those whose sums would leave the range of a float.
#include "exact.h"

#include "magnitudes.h"

namespace {

constexpr uint32_t kHuge = uint32_t(127 + 100) << 23, kTiny = uint32_t(127 - 100) << 23; // 2^100 and 2^-100 as floats
constexpr int64_t kWorthThreads = 1 << 16; // elements

bool is_unusual(uint32_t most, const fips_matrix &a, bool fixed_point) {
  if (most >= kInfinity) return true;
  if (a.value_type != FIPS_I8) return false;
  return most >= kHuge || (fixed_point && most != 0 && most < kTiny);
}

bool any_unusual(const fips_matrix &a, const fips_call &c, bool fixed_point, FipsMagnitude *magnitude) {
  int found = 0;
  const int threads = c.tokens * a.cols < kWorthThreads ? 1 : c.threads;
  if (threads == 1) {
    for (int64_t t = 0; t < c.tokens; ++t) found |= is_unusual(magnitude(c, t), a, fixed_point);
    return found;
  }
#pragma omp parallel for num_threads(threads) schedule(static) reduction(| : found)
  for (int64_t t = 0; t < c.tokens; ++t) found |= is_unusual(magnitude(c, t), a, fixed_point);
  return found;
}

double stored_value(const fips_matrix &a, int64_t i) {
  if (a.value_bits == 8) return load_float(a.values, a.value_type, i);
  return a.memory ? recalled_number(a, i) : number_of(a, field_at(a, i));
}

struct Token {
  const fips_call &c;
  int64_t t;
  const uint64_t *infinite; // a bit for every column
  bool finite;
  double at(int64_t k) const { return load_float(c.x, c.x_type, t * c.x_stride + k); }
};

// With Inf among them other entries do not count: only what is multiplied by Inf is looked at, until it is NaN.
template <class Reader> double row_sum(const fips_matrix &a, const Reader &reader, int64_t row, const Token &token) {
  int64_t i = reader.start(row);
  const RowGroups groups = a.scale_group ? RowGroups(a, row) : RowGroups();
  const auto value = [&](int64_t k) { return stored_value(a, i) * (a.scale_group ? groups.at(k) : 1.0f); };
  double sum = 0;
  for (int64_t k = 0; k < a.cols; k += 64) {
    uint64_t mask = reader.mask(row, k);
    const uint64_t infinite = token.infinite[k / 64];
    const int64_t next = i + popcount64(mask) * reader.stride();
    if (infinite & ~mask) return __builtin_nan(""); // zero times Inf
    if (token.finite || infinite)
      for (; mask; mask &= mask - 1, i += reader.stride()) {
        const int64_t column = k + lowest_bit(mask);
        sum += value(column) * token.at(column);
      }
    if (sum != sum) return sum;
    i = next;
  }
  return sum;
}

void store_exact(const fips_matrix &a, const fips_call &c, int64_t row, int64_t t, double sum) {
  double value = sum * (a.scales ? a.scales[row] : 1.0f);
  if (c.bias) value += load_float(c.bias, c.y_type, row);
  store_float(c.y, c.y_type, t * c.y_stride + row, float(value));
}

void multiply_exactly(const fips_matrix &a, const fips_call &c, int64_t t, uint32_t most) {
  if (most > kInfinity) { // NaN times anything
    for (int64_t row = c.first_row; row < c.end_row; ++row) store_exact(a, c, row, t, __builtin_nan(""));
    return;
  }
  const int64_t words = (a.cols + 63) / 64;
  auto *infinite = scratch<uint64_t>(Scratch::weights, words);
  std::memset(infinite, 0, size_t(words) * sizeof *infinite);
  const Token token{c, t, infinite, most < kInfinity};
  for (int64_t k = 0; !token.finite && k < a.cols; ++k) {
    const double x = token.at(k);
    infinite[k / 64] |= uint64_t(x - x != 0) << (k % 64);
  }
  with_reader(a, [&](const auto &reader) {
#pragma omp parallel for num_threads(c.threads) schedule(static)
    for (int64_t row = c.first_row; row < c.end_row; ++row) store_exact(a, c, row, t, row_sum(a, reader, row, token));
  });
}

} // namespace

uint32_t fips_magnitude_portable(const fips_call &c, int64_t t) { return largest_magnitude(c, t); }

void fips_mend_tokens(const fips_matrix &a, const fips_call &c, bool fixed_point, FipsMagnitude *magnitude) {
  if (!any_unusual(a, c, fixed_point, magnitude)) return;
  for (int64_t t = 0; t < c.tokens; ++t) {
    const uint32_t most = magnitude(c, t);
    if (is_unusual(most, a, fixed_point)) multiply_exactly(a, c, t, most);
  }
}
