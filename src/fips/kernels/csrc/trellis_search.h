// The cheapest way through a trellis (fips/formats/trellis.py): codes of a column whose numbers depend on codes above.
//
// `V<C>` holds C integers, one for every code.
#pragma once
#include "packed.h"

namespace {

// A run of rows of one column. Costs are integers whose lowest 4 bits tell the oldest code of the state that a way comes
// from, so that the smallest of them says both.
template <template <int> class V, int BITS, int MEMORY> class RunSearch {
  static constexpr int C = 1 << BITS, R = 1 << BITS * (MEMORY - 1), S = C * R;
  using Codes = V<C>;
  static constexpr float kLarge = float(1 << 23); // errors from there on grow ever less, to twice that
  static constexpr int32_t kFar = 1 << 30;

public:
  explicit RunSearch(const fips_search &s) : levels_(s.levels), places_(int(s.num_levels)) {
    for (int state = 0; state < S; ++state) {
      int place = 0;
      for (int back = 0; back < MEMORY; ++back) place ^= s.history[back * C + (state >> BITS * back & (C - 1))];
      above_[state] = uint8_t(place);
    }
  }

  // `unit`: what the integers count errors in, over one. `from`: S bytes for every row.
  void run(const float *wanted, const float *weight, float unit, int64_t rows, uint8_t *from, int8_t *fields) {
    for (int state = 0; state < S; ++state) cost_[state] = state ? kFar : 0;
    for (int64_t n = 0; n < rows; ++n) step(wanted[n], weight[n] * unit, from + n * S);
    int at = 0;
    for (int state = 1; state < S; ++state) at = cost_[state] < cost_[at] ? state : at;
    for (int64_t n = rows; n-- > 0;) {
      fields[n] = int8_t(at & (C - 1));
      at = (at >> BITS) + R * from[n * S + at];
    }
  }

private:
  void step(float wanted, float weight, uint8_t *from) {
    alignas(64) float errors[64];
    float least = 3e38f;
    for (int p = 0; p < places_; ++p) {
      const float gap = wanted - float(levels_[p]);
      errors[p] = gap * gap * weight;
      least = errors[p] < least ? errors[p] : least;
    }
    alignas(64) int32_t whole[64], error[64][C]; // by place of code 0 and by code
    for (int p = 0; p < places_; ++p) {
      const float over = errors[p] - least;
      whole[p] = int32_t(over < kLarge ? over : 2 * kLarge - kLarge * (kLarge / over)) * 16;
    }
    for (int p = 0; p < places_; ++p) Codes::exchange(whole + p / C * C, p % C, error[p]);
    alignas(64) int32_t next[S];
    Codes least_of_all = Codes::all(kFar);
    for (int r = 0; r < R; ++r) {
      Codes best = Codes::all(INT32_MAX);
      for (int oldest = 0; oldest < C; ++oldest) {
        const int state = oldest * R + r;
        best = best.least(Codes::load(error[above_[state]]).plus(cost_[state] + oldest));
      }
      best.low_bits(from + r * C);
      best = best.high_bits();
      best.store(next + r * C);
      least_of_all = least_of_all.least(best);
    }
    const int32_t smallest = least_of_all.smallest();
    for (int r = 0; r < R; ++r)
      Codes::load(next + r * C).plus(-smallest).least(Codes::all(kFar)).store(cost_ + r * C);
  }

  const int8_t *levels_;
  int places_;
  alignas(64) uint8_t above_[S];
  alignas(64) int32_t cost_[S];
};

template <template <int> class V, int BITS, int MEMORY> void search_all(const fips_search &s) {
  constexpr int64_t states = int64_t(1) << BITS * MEMORY;
  const int64_t runs = (s.rows + s.run - 1) / s.run, all = s.columns * runs;
  const int threads = int(min_of(s.threads, all));
  const PerThread<uint8_t> from(Scratch::bytes, states * s.run, threads);
#pragma omp parallel for num_threads(threads) schedule(static) if (threads > 1)
  for (int64_t i = 0; i < all; ++i) {
    const int64_t first = i / runs * s.rows + i % runs * s.run, rows = min_of(s.run, s.rows - i % runs * s.run);
    RunSearch<V, BITS, MEMORY> search(s);
    int8_t *codes = s.codes + first;
    search.run(s.wanted + first, s.weight + first, s.unit, rows, from.mine(), codes);
    for (int64_t n = 0; n < rows; ++n) {
      int place = codes[n];
      for (int back = 1; back <= MEMORY && back <= n; ++back)
        place ^= s.history[((back - 1) << BITS) + (codes[n - back] & ((1 << BITS) - 1))];
      s.numbers[first + n] = float(s.levels[place]);
    }
    constexpr int sign = 1 << (BITS - 1);
    for (int64_t n = 0; n < rows; ++n) codes[n] = int8_t((codes[n] ^ sign) - sign);
  }
}

template <template <int> class V> bool search_paths(const fips_search &s) {
  if (s.bits == 2 && s.memory == 3) return search_all<V, 2, 3>(s), true;
  if (s.bits == 3 && s.memory == 2) return search_all<V, 3, 2>(s), true;
  if (s.bits == 4 && s.memory == 2) return search_all<V, 4, 2>(s), true;
  return false;
}

} // namespace
