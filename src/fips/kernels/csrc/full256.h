// Few tokens by integers or codes of matrices without a pattern.
#pragma once
#include "inputs256.h"

namespace {

template <int T, Scales SCALES, class Codes, class Inputs>
void whole_row(const fips_matrix &a, const fips_call &c, const Codes &codes, int64_t row, const Inputs &inputs) {
  const auto *from = static_cast<const uint8_t *>(a.values) + row * (a.cols / 64) * Codes::bytes;
  const RowGroups groups = SCALES == Scales::none ? RowGroups() : RowGroups(a, row);
  __m256 acc[T][2]; // an addition has a latency of several cycles
#pragma GCC unroll 4
  for (int t = 0; t < T; ++t) acc[t][0] = acc[t][1] = _mm256_setzero_ps();
  BlockScales<T, SCALES> by;
  alignas(32) uint8_t last[96];
  for (int64_t k = 0; k < a.cols;) {
    int64_t blocks = min_of(kBlocks, (a.cols - k) / 64);
    if (blocks > 1 && !codes.inside(from + (blocks - 1) * Codes::bytes)) --blocks;
    by.set(groups, inputs.scales, a.cols, k, blocks);
    const uint8_t *place = codes.within(from, last);
    for (int64_t i = 0; i < blocks; ++i, k += 64, place += Codes::bytes) {
      typename Inputs::Numbers numbers;
      _mm_prefetch(reinterpret_cast<const char *>(place) + kAhead, _MM_HINT_T0);
      codes.read(place, numbers);
      inputs.add(numbers, k, groups, by, i, acc);
    }
    from += blocks * Codes::bytes;
  }
  for (int t = 0; t < T; ++t) store_sum(a, c, row, t, total(_mm256_add_ps(acc[t][0], acc[t][1])));
}

template <int T, class Codes> void whole_path(const fips_matrix &a, const fips_call &c, float *x) {
  const Codes codes(a);
  with_scales_and_inputs<T, Codes>(a, c, x, [&](const auto &inputs) {
#pragma omp parallel for num_threads(c.threads) schedule(static)
    for (int64_t row = c.first_row; row < c.end_row; ++row)
      whole_row<T, std::decay_t<decltype(inputs)>::kind>(a, c, codes, row, inputs);
  });
}

template <int BITS> using Integers = Codes<BITS, !signs_are_moved || dots_of_bytes>; // of less than 5 bits

// `x`: the tokens as floats, one behind the other.
template <int T> void whole_path(const fips_matrix &a, const fips_call &c, float *x) {
  const bool looked_up = a.num_levels || fixed_planes(c) > 1; // as numbers with a sign
  switch (a.value_bits) {
  case 2: return looked_up ? whole_path<T, Codes<2, true>>(a, c, x) : whole_path<T, Integers<2>>(a, c, x);
  case 3: return looked_up ? whole_path<T, Codes<3, true>>(a, c, x) : whole_path<T, Integers<3>>(a, c, x);
  case 4: return looked_up ? whole_path<T, Codes<4, true>>(a, c, x) : whole_path<T, Integers<4>>(a, c, x);
  case 5: return a.num_levels ? whole_path<T, Codes<5, true>>(a, c, x) : whole_path<T, Codes<5, false>>(a, c, x);
  case 6: return whole_path<T, Codes<6, false>>(a, c, x);
  case 7: return whole_path<T, Codes<7, false>>(a, c, x);
  default: return whole_path<T, WholeBytes>(a, c, x);
  }
}

} // namespace
