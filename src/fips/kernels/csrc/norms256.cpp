// Numbers of a token over the root of their mean square, with AVX2 with FMA, or with NEON: what torch does in eight
// operations, each of which takes longer to be called than this.
#include <cmath>

#include "paths.h"
#include "values256.h"

namespace {

template <class Values> float mean_square(const typename Values::type *x, int64_t size) {
  __m256 acc[2] = {_mm256_setzero_ps(), _mm256_setzero_ps()};
  for (int64_t k = 0; k < size; k += 8) {
    const __m256 v = read8<Values>(x + k);
    acc[k / 8 % 2] = _mm256_fmadd_ps(v, v, acc[k / 8 % 2]);
  }
  return total(_mm256_add_ps(acc[0], acc[1])) / float(size);
}

template <class Values> void normalise(const fips_norm &n) {
  using Number = typename Values::type;
  constexpr int64_t some = 64;
  const auto *weight = static_cast<const Number *>(n.weight);
  const __m256 more = _mm256_set1_ps(n.kind == FIPS_NORM_ONE_MORE ? 1.0f : 0.0f);
  for (int64_t row = 0; row < n.length; row += n.size) {
    const auto *x = static_cast<const Number *>(n.x) + row;
    auto *y = static_cast<Number *>(n.y) + row;
    const __m256 by = _mm256_set1_ps(1.0f / std::sqrt(mean_square<Values>(x, n.size) + n.eps));
    for (int64_t k = 0; k < n.size; k += some) {
      alignas(32) float numbers[some];
      const int64_t count = min_of(some, n.size - k);
      for (int64_t i = 0; i < count; i += 8) _mm256_store_ps(numbers + i, _mm256_mul_ps(read8<Values>(x + k + i), by));
      if (n.kind == FIPS_NORM_ROUNDED) { // before the weights
        store_floats(y, n.type, k, numbers, count);
        for (int64_t i = 0; i < count; i += 8) _mm256_store_ps(numbers + i, read8<Values>(y + k + i));
      }
      for (int64_t i = 0; i < count; i += 8) {
        const __m256 w = _mm256_add_ps(read8<Values>(weight + k + i), more);
        _mm256_store_ps(numbers + i, _mm256_mul_ps(_mm256_load_ps(numbers + i), w));
      }
      store_floats(y, n.type, k, numbers, count);
    }
  }
}

} // namespace

void fips_normalise_256(const fips_norm &norm) {
  if (norm.type == FIPS_BF16) normalise<BF16Values>(norm);
  else normalise<F16Values>(norm);
}
