// The cheapest way through a trellis (fips/formats/trellis.py): codes of a column whose numbers depend on codes above.
//
// `V` holds `V::lanes` integers of 32 bits: for every code those of as many runs of rows as fit, which are searched side
// by side. The number of code c of run i is lane c * runs + i.
#pragma once
#include "packed.h"

namespace {

// A run of rows of one column.
struct Run {
  const float *wanted, *weight;
  int64_t rows;
  int8_t *fields;
};

// Costs are integers whose lowest 4 bits tell the oldest code of the state that a way comes from, so that the smallest of
// them says both.
template <class V, int BITS, int MEMORY> class RunSearch {
  static constexpr int C = 1 << BITS, R = 1 << BITS * (MEMORY - 1), S = C * R, W = V::lanes;
  static constexpr float kLarge = float(1 << 23); // errors from there on grow ever less, to twice that
  static constexpr int32_t kFar = 1 << 30;
  static constexpr int kPlaces = 64;

public:
  static constexpr int side = W / C; // runs side by side
  static constexpr int64_t bytes = S * side; // of `from`, for every row

  explicit RunSearch(const fips_search &s) : unit_(s.unit), blocks_(int(s.num_levels) / C) {
    for (int r = 0; r < R; ++r)
      for (int oldest = 0; oldest < C; ++oldest) {
        int place = 0;
        for (int back = 0; back < MEMORY; ++back) place ^= s.history[back * C + ((oldest * R + r) >> BITS * back & (C - 1))];
        above_[r * C + oldest] = place * W;
      }
    for (int i = 0; i < blocks_ * W; ++i) levels_[i] = float(s.levels[i / side]);
  }

  // Fields of `side` runs; one that has no rows is not there.
  void find(const Run (&runs)[side], int64_t rows, uint8_t *from) {
    for (int i = 0; i < S * side; ++i) cost_[i] = i < side ? 0 : kFar + i / (R * side);
    int at[side];
    for (int64_t n = 0; n < rows; ++n) {
      step(runs, n, from + n * bytes);
      for (int i = 0; i < side; ++i)
        if (n + 1 == runs[i].rows) at[i] = cheapest(i);
    }
    for (int i = 0; i < side; ++i)
      for (int64_t n = runs[i].rows; n-- > 0;) {
        runs[i].fields[n] = int8_t(at[i] & (C - 1));
        at[i] = (at[i] >> BITS) + R * from[n * bytes + at[i] * side + i];
      }
  }

private:
  int cheapest(int i) const {
    int at = 0;
    for (int state = 1; state < S; ++state) at = cost_[state * side + i] < cost_[at * side + i] ? state : at;
    return at;
  }

  // In all lanes of a run the smallest of them.
  static V least_of_run(V v) {
    for (int lanes = side; lanes < W; lanes *= 2) v = v.least(v.exchanged(lanes));
    return v;
  }

  // The errors of a row, by place of code 0 and by code.
  void measure(const Run (&runs)[side], int64_t n) {
    alignas(64) float wanted[W], weight[W], least[W], errors[kPlaces * side];
    for (int i = 0; i < side; ++i) {
      const bool there = n < runs[i].rows;
      const float number = there ? runs[i].wanted[n] : 0.0f, weighs = there ? runs[i].weight[n] * unit_ : 0.0f;
      for (int j = i; j < W; j += side) wanted[j] = number, weight[j] = weighs;
    }
    for (int first = 0; first < blocks_ * W; first += W)
      for (int j = 0; j < W; ++j) {
        const float gap = wanted[j] - levels_[first + j];
        errors[first + j] = gap * gap * weight[j];
      }
    V smallest = V::load(errors); // floats that are not negative are in the order of their bits
    for (int first = W; first < blocks_ * W; first += W) smallest = smallest.least(V::load(errors + first));
    least_of_run(smallest).store(least);
    for (int block = 0; block < blocks_; ++block) {
      alignas(64) int32_t whole[W];
      for (int j = 0; j < W; ++j) {
        const float over = errors[block * W + j] - least[j];
        whole[j] = int32_t(over < kLarge ? over : 2 * kLarge - kLarge * (kLarge / over)) * 16;
      }
      const V errors_of_block = V::load(whole);
      for (int code = 0; code < C; ++code) errors_of_block.exchanged(code * side).store(errors_ + (block * C + code) * W);
    }
  }

  void step(const Run (&runs)[side], int64_t n, uint8_t *from) {
    measure(runs, n);
    alignas(64) int32_t next[S * side];
    V least_of_all = V::all(kFar);
    for (int r = 0; r < R; ++r) {
      V best = V::all(INT32_MAX);
      for (int oldest = 0; oldest < C; ++oldest) {
        const V cost = V::template spread<side>(cost_ + (oldest * R + r) * side);
        best = best.least(V::load(errors_ + above_[r * C + oldest]).plus(cost));
      }
      best.low_bits(from + r * W);
      best = best.high_bits();
      best.store(next + r * W);
      least_of_all = least_of_all.least(best);
    }
    least_of_all = least_of_run(least_of_all);
    for (int r = 0; r < R; ++r) {
      const int32_t oldest = r * C / R; // of all states that end here
      V::load(next + r * W).minus(least_of_all).least(V::all(kFar)).plus(V::all(oldest)).store(cost_ + r * W);
    }
  }

  float unit_;
  int blocks_;
  int32_t above_[S]; // where errors of the codes that may follow a state begin, those that end alike side by side
  alignas(64) float levels_[kPlaces * side];
  alignas(64) int32_t cost_[S * side]; // of every state, with its oldest code
  alignas(64) int32_t errors_[kPlaces * W];
};

inline int64_t runs_of_column(const fips_search &s) { return (s.rows + s.run - 1) / s.run; }

template <class V, int BITS, int MEMORY> void search_all(const fips_search &s) {
  using Search = RunSearch<V, BITS, MEMORY>;
  constexpr int side = Search::side;
  const int64_t runs = runs_of_column(s), all = s.columns * runs, groups = (all + side - 1) / side;
  const int threads = int(min_of(s.threads, groups));
  const PerThread<uint8_t> from(Scratch::bytes, Search::bytes * s.run, threads);
#pragma omp parallel for num_threads(threads) schedule(static) if (threads > 1)
  for (int64_t group = 0; group < groups; ++group) {
    Search search(s);
    Run found[side];
    int64_t rows = 0;
    for (int i = 0; i < side; ++i) {
      const int64_t at = group * side + i, skipped = at % runs * s.run, first = at / runs * s.rows + skipped;
      found[i] = at < all ? Run{s.wanted + first, s.weight + first, min_of(s.run, s.rows - skipped), s.codes + first} : Run{};
      rows = rows > found[i].rows ? rows : found[i].rows;
    }
    search.find(found, rows, from.mine());
    for (const Run &run : found) {
      float *numbers = s.numbers + (run.fields - s.codes);
      for (int64_t n = 0; n < run.rows; ++n) {
        int place = run.fields[n];
        for (int back = 1; back <= MEMORY && back <= n; ++back)
          place ^= s.history[((back - 1) << BITS) + (run.fields[n - back] & ((1 << BITS) - 1))];
        numbers[n] = float(s.levels[place]);
      }
      constexpr int sign = 1 << (BITS - 1);
      for (int64_t n = 0; n < run.rows; ++n) run.fields[n] = int8_t((run.fields[n] ^ sign) - sign);
    }
  }
}

// With `V4`, `V8` and `V16` for 4, 8 and 16 codes.
template <class V4, class V8, class V16> bool search_paths(const fips_search &s) {
  if (s.bits == 2 && s.memory == 3) return search_all<V4, 2, 3>(s), true;
  if (s.bits == 3 && s.memory == 2) return search_all<V8, 3, 2>(s), true;
  if (s.bits == 4 && s.memory == 2) return search_all<V16, 4, 2>(s), true;
  return false;
}

} // namespace
