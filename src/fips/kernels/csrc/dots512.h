// Many tokens without a matrix unit: blocks of rows by tokens in registers, by the dot products of AVX-512.
//
// One word of a row is broadcast and multiplied by the words of 16 tokens, as they lie in the tiles of tiles512.h: one
// float by `vfmadd`, two bf16 by `vdpbf16ps`, four int8 by `vpdpbusd`. The last wants tokens without sign: their digits
// keep the 128 added to them, and the sums of a row begin 128 times the sum of its weights lower.
#pragma once
#include "paths.h"
#include "tiles512.h"

namespace {

constexpr int64_t kWords = 512, kRowBytes = kWords * 4 + 64; // of a row at a time; rows lie in different cache sets
constexpr int64_t kPartRows = 48, kSlabRows = 192, kSlabColumns = 256, kFewColumns = 2, kSomeColumns = 16;

template <class Values> struct Dots {
  using Sum = __m512;
  static Sum load(const uint8_t *from) { return _mm512_load_ps(from); }
  static void store(uint8_t *to, Sum sum) { _mm512_store_ps(to, sum); }
  static Sum start(Sum sum, int32_t) { return sum; }
  FIPS_INLINE static Sum add(Sum sum, __m512i x, int32_t word) {
    const __m512i w = _mm512_set1_epi32(word);
#ifdef __AVX512BF16__
    if constexpr (std::is_same_v<Values, BF16Values>) return _mm512_dpbf16_ps(sum, __m512bh(x), __m512bh(w));
#endif
    return _mm512_fmadd_ps(_mm512_castsi512_ps(x), _mm512_castsi512_ps(w), sum);
  }
  static int32_t excess(const uint8_t *, int64_t) { return 0; }
};

template <> struct Dots<I8Values> {
  using Sum = __m512i;
  static Sum load(const uint8_t *from) { return _mm512_load_si512(from); }
  static void store(uint8_t *to, Sum sum) { _mm512_store_si512(to, sum); }
  static Sum start(Sum sum, int32_t excess) { return _mm512_sub_epi32(sum, _mm512_set1_epi32(excess)); }
  FIPS_INLINE static Sum add(Sum sum, __m512i x, int32_t word) {
    return _mm512_dpbusd_epi32(sum, x, _mm512_set1_epi32(word));
  }
  // What the 128 in every digit add to the sums of a decoded row.
  static int32_t excess(const uint8_t *row, int64_t steps) {
    __m512i sum[4] = {}; // a dot product takes longer to finish than to start
    int64_t s = 0;
    const auto add = [&](int i, int64_t at) {
      sum[i] = _mm512_dpbusd_epi32(sum[i], _mm512_set1_epi8(1), _mm512_load_si512(row + 64 * at));
    };
    for (; s + 4 <= steps; s += 4)
      for (int i = 0; i < 4; ++i) add(i, s + i);
    for (; s < steps; ++s) add(0, s);
    return 128 * _mm512_reduce_add_epi32(
                     _mm512_add_epi32(_mm512_add_epi32(sum[0], sum[1]), _mm512_add_epi32(sum[2], sum[3])));
  }
};

template <> struct Dots<NarrowValues> : Dots<I8Values> {};

// Packed values that come next, fetched in equal shares while others are multiplied.
struct Ahead {
  const char *at, *end;
  int64_t share;
  Ahead(const char *from, const char *to, int64_t steps) : at(from), end(to), share((to - from) / steps + 64) {}
  FIPS_INLINE void fetch() {
    for (const char *stop = at + min_of(share, end - at); at < stop; at += 64) _mm_prefetch(at, _MM_HINT_T0);
  }
};

// Sums of R rows by C columns over some steps. `weights`, `excess` and `row` are those of the first row, `sums` holds
// row 0 of the first column, and rows of the next tile `lower` bytes behind.
template <class Values, int R, int C>
FIPS_APART void multiply_block(const uint8_t *weights, const uint8_t *const (&x)[C], int64_t steps, uint8_t *sums,
                               int64_t row, int64_t lower, bool first, const int32_t *excess, Ahead &ahead) {
  using D = Dots<Values>;
  typename D::Sum acc[R][C];
  const auto place = [&](int r, int j) { return sums + (row + r) / 16 * lower + j * kTileBytes + (row + r) % 16 * 64; };
#pragma GCC unroll 16
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
    for (int j = 0; j < C; ++j) acc[r][j] = D::start(first ? typename D::Sum{} : D::load(place(r, j)), excess[r]);
  for (int64_t s = 0; s < steps; ++s) {
    ahead.fetch();
    for (int64_t at = 16 * s; at < 16 * s + 16; ++at) {
      __m512i xs[C];
#pragma GCC unroll 4
      for (int j = 0; j < C; ++j) xs[j] = _mm512_load_si512(x[j] + at * 64);
#pragma GCC unroll 16
      for (int r = 0; r < R; ++r) {
        int32_t word;
        std::memcpy(&word, weights + r * kRowBytes + at * 4, 4);
#pragma GCC unroll 4
        for (int j = 0; j < C; ++j) acc[r][j] = D::add(acc[r][j], xs[j], word);
      }
    }
  }
#pragma GCC unroll 16
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
    for (int j = 0; j < C; ++j) D::store(place(r, j), acc[r][j]);
}

// Rows [row0, row0 + rows) of at most kSlabRows by token blocks [block0, block0 + blocks) of every plane.
template <class Reader, class Values>
void slab(const fips_matrix &a, const fips_call &c, const Reader &reader, const PackedTokens &p, int64_t row0,
          int64_t rows, int64_t block0, int64_t blocks) {
  static thread_local Scratch sum_scratch, weight_scratch;
  const int64_t columns = blocks * p.planes, lower = columns * kTileBytes;
  uint8_t *sums = sum_scratch.get<uint8_t>(round_up(rows, kPartRows * 2) / 16 * lower); // [16 rows][column][tile]
  uint8_t *weights = weight_scratch.get<uint8_t>(kPartRows * kRowBytes);
  const int64_t most = kWords / 16, runs = (p.steps + most - 1) / most;
  const int64_t run_steps = round_up((p.steps + runs - 1) / runs, 4);
  const fips_matrix wide = std::is_same_v<Values, NarrowValues> ? a : widened_rows(a, reader, row0, rows);
  Decoder<Reader, Values> decoder(wide, reader, row0, rows, kRowBytes);
  // Few columns use a decoded row once: it is taken from the first-level cache, a few rows at a time.
  const int64_t part = columns <= kFewColumns ? 12 : kPartRows;
  for (int64_t row = 0; row < rows; row += part) {
    const int64_t part_rows = min_of(part, rows - row), calls = columns <= kFewColumns ? 1 : (part_rows + 5) / 6;
    Ahead ahead(decoder.at(row + part_rows), decoder.at(min_of(row + part_rows + part, rows)), calls * p.steps);
    for (int64_t step = 0; step < p.steps; step += run_steps) {
      const int64_t steps = min_of(run_steps, p.steps - step);
      int32_t excess[kPartRows] = {};
      decoder.decode(row, part_rows, step, steps, weights, rows);
      for (int64_t r = 0; r < part_rows; ++r) excess[r] = Dots<Values>::excess(weights + r * kRowBytes, steps);
      const auto multiply = [&](auto height, auto width, int64_t column) {
        constexpr int R = decltype(height)::value, C = decltype(width)::value;
        const uint8_t *x[C];
        for (int j = 0; j < C; ++j) x[j] = p.tile(int((column + j) / blocks), block0 + (column + j) % blocks, step);
        for (int64_t r = 0; r < part_rows; r += R)
          multiply_block<Values, R, C>(weights + r * kRowBytes, x, steps, sums + column * kTileBytes, row + r, lower,
                                       step == 0, excess + r, ahead);
      };
      int64_t column = 0;
      for (; column + 4 <= columns; column += 4)
        multiply(std::integral_constant<int, 6>(), std::integral_constant<int, 4>(), column);
      switch (columns - column) {
      case 3: multiply(std::integral_constant<int, 8>(), std::integral_constant<int, 3>(), column); break;
      case 2: multiply(std::integral_constant<int, 12>(), std::integral_constant<int, 2>(), column); break;
      case 1: multiply(std::integral_constant<int, 12>(), std::integral_constant<int, 1>(), column); break;
      default: break;
      }
    }
  }
  finish_panel<Values>(a, c, p, sums, row0, rows, block0, blocks);
}

// Rows of a slab: as even as possible over the threads, whole parts.
inline int64_t slab_rows(int64_t rows, int64_t columns, int threads) {
  const int64_t most = columns <= kSomeColumns ? kSlabRows : kPartRows, rounds = (rows + threads * most - 1) / (threads * most);
  return round_up((rows + rounds * threads - 1) / (rounds * threads), kPartRows);
}

template <class Values> bool dots_path(const fips_matrix &a, const fips_call &c) {
  const PackedTokens p = place_tokens<Values>(a, c, 0);
  const int64_t per_pass = kSlabColumns / p.planes, passes = (p.blocks + per_pass - 1) / per_pass;
  const int64_t rows = slab_rows(a.rows, p.planes * p.blocks, c.threads), slabs = (a.rows + rows - 1) / rows;
  return with_reader(a, [&](const auto &reader) {
    using Reader = std::decay_t<decltype(reader)>;
#pragma omp parallel num_threads(c.threads)
    {
      pack_tokens<Values>(a, c, p);
#pragma omp for collapse(2) schedule(dynamic)
      for (int64_t pass = 0; pass < passes; ++pass)
        for (int64_t i = 0; i < slabs; ++i)
          slab<Reader, Values>(a, c, reader, p, i * rows, min_of(rows, a.rows - i * rows), pass * per_pass,
                               min_of(per_pass, p.blocks - pass * per_pass));
    }
  });
}

bool dots_path(const fips_matrix &a, const fips_call &c) {
  if (a.format == FIPS_BLOCK_ROWS) return false; // values of a row do not lie together
  switch (a.value_type) {
  case FIPS_I8:
    return a.value_bits < 8 && a.format == FIPS_DENSE ? dots_path<NarrowValues>(a, c) : dots_path<I8Values>(a, c);
  case FIPS_F32: return dots_path<Floats<F32Values>>(a, c);
  case FIPS_F16: return dots_path<Floats<F16Values>>(a, c);
  default:
#ifdef __AVX512BF16__
    if (c.x_type == FIPS_BF16) return dots_path<BF16Values>(a, c);
#endif
    return dots_path<Floats<BF16Values>>(a, c);
  }
}

} // namespace
