// Numbers of codes that depend on the codes above them (fips/formats/trellis.py).
#pragma once
#include "inputs256.h"

namespace {

// The numbers of 64 entries, `kBias` more, given their codes and those of `MEMORY` rows above: tables say what each adds
// to the place in the table of levels.
template <int MEMORY> struct Recall {
  static constexpr int parts = MEMORY == 3 ? 2 : 4; // 16 levels each, see `recalls`
  __m256i added[MEMORY], tables[parts];
  explicit Recall(const fips_matrix &a) {
    const int64_t codes = int64_t(1) << a.value_bits;
    for (int back = 0; back < MEMORY; ++back) {
      alignas(16) uint8_t one[16] = {};
      for (int64_t i = 0; i < codes; ++i) one[i] = turned_place(a.history[back * codes + i]);
      added[back] = _mm256_broadcastsi128_si256(_mm_load_si128(reinterpret_cast<const __m128i *>(one)));
    }
    for (int part = 0; part < parts; ++part) {
      alignas(16) int8_t one[16];
      for (int i = 0; i < 16; ++i) one[i] = int8_t(a.levels[(16 * part + i) & (a.num_levels - 1)] + kBias);
      tables[part] = _mm256_broadcastsi128_si256(_mm_load_si128(reinterpret_cast<const __m128i *>(one)));
    }
  }
  // `codes`: of the first row above all that is looked at; `row` counts from there.
  template <class Registers> FIPS_INLINE __m256i number(const Registers &codes, int row) const {
    __m256i place = codes(row);
#pragma GCC unroll 4
    for (int back = 1; back <= MEMORY; ++back) place = _mm256_xor_si256(place, look_up(added[back - 1], codes(row - back)));
    return look_up_turned(tables, place);
  }
};

// Rows that share the codes above them. They divide `run`, so that nothing above the first of a run is theirs.
constexpr int kRecalled = 4;

// `kRecalled` rows from `row` on, or what is left of them.
template <int T, Scales SCALES, int BITS, int MEMORY, class Inputs>
void recalled_rows(const fips_matrix &a, const fips_call &c, const Codes<BITS, true> &codes, const Recall<MEMORY> &recall,
                   int64_t row, const Inputs &inputs) {
  constexpr int64_t bytes = Codes<BITS, true>::bytes;
  const int64_t row_bytes = a.cols / 64 * bytes;
  const bool first = row % a.run == 0;
  const int left = int(min_of(kRecalled, a.rows - row));
  const uint8_t *from[MEMORY + kRecalled]; // behind the last row that one again
  RowGroups groups[kRecalled];
  BlockScales<T, SCALES> by[kRecalled];
  __m256 acc[kRecalled][T][1];
#pragma GCC unroll 8
  for (int r = -MEMORY; r < kRecalled; ++r) {
    const int64_t place = row + (r < left ? r : left - 1);
    from[MEMORY + r] = static_cast<const uint8_t *>(a.values) + (place < 0 ? 0 : place) * row_bytes;
    if (r >= 0 && SCALES != Scales::none) groups[r] = RowGroups(a, place);
  }
#pragma GCC unroll 4
  for (int r = 0; r < kRecalled; ++r)
#pragma GCC unroll 4
    for (int t = 0; t < T; ++t) acc[r][t][0] = _mm256_setzero_ps();
  for (int64_t k = 0, at = 0; k < a.cols;) {
    const int64_t blocks = min_of(kBlocks, (a.cols - k) / 64);
#pragma GCC unroll 4
    for (int r = 0; r < kRecalled; ++r) by[r].set(groups[r], inputs.scales, a.cols, k, blocks);
    for (int64_t block = 0; block < blocks; ++block, k += 64, at += bytes) {
      __m256i fields[MEMORY + kRecalled][2];
#pragma GCC unroll 8
      for (int r = 0; r < MEMORY + kRecalled; ++r) {
        alignas(32) uint8_t last[96];
        if (r >= MEMORY) // the rows after these
          _mm_prefetch(reinterpret_cast<const char *>(from[r]) + at + kRecalled * row_bytes, _MM_HINT_T0);
        Codes<BITS, true>::fields(codes.within(from[r] + at, last), fields[r]);
        if (r < MEMORY && first) fields[r][0] = fields[r][1] = _mm256_setzero_si256();
      }
#pragma GCC unroll 4
      for (int r = 0; r < kRecalled; ++r) {
        __m256i numbers[2];
#pragma GCC unroll 2
        for (int side = 0; side < 2; ++side)
          numbers[side] = recall.number([&](int at) { return fields[at][side]; }, MEMORY + r);
        inputs.add(numbers, k, groups[r], by[r], block, acc[r]);
      }
    }
  }
  for (int r = 0; r < left; ++r)
    for (int t = 0; t < T; ++t) store_sum(a, c, row + r, t, total(acc[r][t][0]));
}

template <int T, int BITS, int MEMORY> void recalled_path(const fips_matrix &a, const fips_call &c, float *x) {
  const Codes<BITS, true> codes(a);
  const Recall<MEMORY> recall(a);
  with_scales_and_inputs<T, Codes<BITS, true>>(a, c, x, [&](const auto &inputs) {
#pragma omp parallel for num_threads(c.threads) schedule(static)
    for (int64_t row = c.first_row; row < c.end_row; row += kRecalled)
      recalled_rows<T, std::decay_t<decltype(inputs)>::kind>(a, c, codes, recall, row, inputs);
  });
}

// Of the codes that `recalls` knows.
template <int T> void recalled_path(const fips_matrix &a, const fips_call &c, float *x) {
  switch (a.value_bits) {
  case 2: return recalled_path<T, 2, 3>(a, c, x);
  case 3: return recalled_path<T, 3, 2>(a, c, x);
  default: return recalled_path<T, 4, 2>(a, c, x);
  }
}

} // namespace
