// AVX2 with FMA, or NEON with dot products: eight columns at a time, spread by a permutation looked up from eight mask
// bits.
#include "dense_basis.h"
#include "exact.h"
#include "full256.h"
#include "magnitudes.h"
#include "paths.h"
#include "rotate256.h"
#include "sparse_tokens.h"
#include "trellis256.h"

namespace {

// With group scales: the sums of a group, or of its part among 64 columns, are scaled when they are complete.
template <int T, class Reader, class Cursor>
void direct_row(const fips_matrix &a, const fips_call &c, const Reader &reader, const RowGroups &groups, int64_t row,
                const float *x, int64_t padded) {
  Cursor cursor(a, reader.start(row));
  const int64_t unit = min_of(a.scale_group, 64);
  __m256 acc[T], sums[T];
  for (int t = 0; t < T; ++t) acc[t] = sums[t] = _mm256_setzero_ps();
  for (int64_t k = 0; k < a.cols; k += 64)
    read_columns(reader, row, k, cursor, [&](int64_t j, __m256 w) {
      for (int t = 0; t < T; ++t) sums[t] = _mm256_fmadd_ps(w, _mm256_load_ps(x + t * padded + k + j), sums[t]);
      if ((j + 8) & (unit - 1)) return;
      const __m256 scale = _mm256_set1_ps(groups.at(k + j));
      for (int t = 0; t < T; ++t) acc[t] = _mm256_fmadd_ps(sums[t], scale, acc[t]), sums[t] = _mm256_setzero_ps();
    });
  for (int t = 0; t < T; ++t) store_sum(a, c, row, t, total(acc[t]));
}

template <int T, class Reader, class Cursor>
void direct_row(const fips_matrix &a, const fips_call &c, const Reader &reader, const NoGroups &, int64_t row,
                const float *x, int64_t padded) {
  Cursor cursor(a, reader.start(row));
  __m256 acc[T];
  for (int t = 0; t < T; ++t) acc[t] = _mm256_setzero_ps();
  for (int64_t k = 0; k < a.cols; k += 64)
    read_columns(reader, row, k, cursor, [&](int64_t j, __m256 w) {
      for (int t = 0; t < T; ++t) acc[t] = _mm256_fmadd_ps(w, _mm256_load_ps(x + t * padded + k + j), acc[t]);
    });
  for (int t = 0; t < T; ++t) store_sum(a, c, row, t, total(acc[t]));
}

template <int T> bool direct_path(const fips_matrix &a, const fips_call &c) {
  const int64_t padded = round_up(a.cols, 64);
  float *x = tokens_as_floats<T>(a, c);
  if (a.memory) return recalled_path<T>(a, c, x), true; // whole rows, see `reads_narrow`
  if (reads_whole(a)) return whole_path<T>(a, c, x), true;
  return with_cursor(a, [&](const auto &reader, auto cursor) {
    using Reader = std::decay_t<decltype(reader)>;
    with_groups<reads_integers<decltype(cursor)>>(a, [&](auto tag) {
      using Groups = typename decltype(tag)::type;
#pragma omp parallel for num_threads(c.threads) schedule(static)
      for (int64_t row = c.first_row; row < c.end_row; ++row)
        direct_row<T, Reader, decltype(cursor)>(a, c, reader, Groups(a, row), row, x, padded);
    });
  });
}

} // namespace

bool fips_256(const fips_matrix &a, const fips_call &c) {
  if (c.path == FIPS_TOKENS) return tokens_path<Vector8>(a, c);
  if (a.format == FIPS_BLOCK_ROWS) return false; // values of a row do not lie together
  if (c.path == FIPS_TILES) return fips_tiles_256(a, c);
  if (c.path != FIPS_DIRECT) return false;
  return with_few_tokens(c, [&](auto count) { return direct_path<decltype(count)::value>(a, c); });
}

uint32_t fips_magnitude_256(const fips_call &c, int64_t t) { return largest_magnitude(c, t); }

void fips_rotate_256(const fips_matrix &a, const fips_call &c, float *to) {
#pragma omp parallel for num_threads(c.threads) schedule(static) if (c.tokens > 1)
  for (int64_t t = 0; t < c.tokens; ++t) {
    float *row = to + t * a.cols;
    read_token(c, t, a.cols, row);
    if (a.rotation == 64) rotate_row256<64>(row, a.cols);
    else if (a.rotation == 16) rotate_row256<16>(row, a.cols);
    else rotate_row(a, row);
  }
}

bool fips_columns_256(const fips_matrix &a, const fips_call &c) { return columns_path<Vector8>(a, c); }

void fips_widen_256(const uint8_t *stream, int64_t bytes, int bits, int64_t first, int64_t count, int8_t *to) {
  const auto eight = [&](int64_t i) { return narrow_lanes[bits].integers(bits_at(stream, bytes, (first + i) * bits)); };
  const __m256i order = _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7); // packing takes turns between the halves
  int64_t i = 0;
  for (; i + 32 <= count; i += 32) {
    const __m256i low = _mm256_packs_epi32(eight(i), eight(i + 8));
    const __m256i high = _mm256_packs_epi32(eight(i + 16), eight(i + 24));
    const __m256i numbers = _mm256_permutevar8x32_epi32(_mm256_packs_epi16(low, high), order);
    _mm256_storeu_si256(reinterpret_cast<__m256i *>(to + i), numbers);
  }
  if (i < count) fips_widen_portable(stream, bytes, bits, first + i, count - i, to + i);
}

namespace {

template <int MEMORY> void recall_run(const fips_matrix &a, int64_t k0, int64_t k1, int8_t *wide) {
  const Recall<MEMORY> recall(a);
  const __m256i mask = _mm256_set1_epi8(char((1 << a.value_bits) - 1));
  for (int64_t row = a.rows; row-- > 0;)
    for (int64_t k = k0; k < k1; k += 32) {
      __m256i codes[MEMORY + 1];
      for (int back = 0; back <= MEMORY; ++back) {
        codes[MEMORY - back] = _mm256_setzero_si256();
        if (back > row % a.run) continue;
        const auto *from = reinterpret_cast<const __m256i *>(wide + (row - back) * a.cols + k);
        codes[MEMORY - back] = _mm256_and_si256(_mm256_loadu_si256(from), mask);
      }
      const __m256i numbers = recall.number([&](int at) { return codes[at]; }, MEMORY);
      _mm256_storeu_si256(reinterpret_cast<__m256i *>(wide + row * a.cols + k), numbers);
    }
}

} // namespace

void fips_recall_256(const fips_matrix &a, int threads, int8_t *wide) {
  if (a.cols % 32 || !recalls(a)) return fips_recall_portable(a, threads, wide);
  const int64_t run = 1 << 10;
#pragma omp parallel for num_threads(threads) schedule(static)
  for (int64_t k0 = 0; k0 < a.cols; k0 += run) {
    if (a.memory == 3) recall_run<3>(a, k0, min_of(k0 + run, a.cols), wide);
    else recall_run<2>(a, k0, min_of(k0 + run, a.cols), wide);
  }
}
