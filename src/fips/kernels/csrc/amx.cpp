// Matrix tiles (Sapphire Rapids and later): decode 32 rows of S into dense tiles, multiply them by all tokens.
#include <immintrin.h>

#include <type_traits>

#include "paths.h"
#include "tile_rows512.h"

namespace {

constexpr int64_t kColumnsPerPass = 512, kFewColumns = 4, kManySteps = 8;

struct alignas(64) TileConfig {
  uint8_t palette = 1, start_row = 0, reserved[14] = {};
  uint16_t row_bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
  uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
};

// tiles 0..3 += tiles 4, 5 (rows) by tiles 6, 7 (tokens); without PAIR tile 6 alone
template <class Values, bool PAIR> void dot() {
  if constexpr (std::is_same_v<Values, BF16Values>) {
    _tile_dpbf16ps(0, 4, 6);
    _tile_dpbf16ps(2, 5, 6);
    if constexpr (PAIR) {
      _tile_dpbf16ps(1, 4, 7);
      _tile_dpbf16ps(3, 5, 7);
    }
  } else {
    _tile_dpbssd(0, 4, 6);
    _tile_dpbssd(2, 5, 6);
    if constexpr (PAIR) {
      _tile_dpbssd(1, 4, 7);
      _tile_dpbssd(3, 5, 7);
    }
  }
}

// tiles 0..3 from or to memory: the second column lies one tile behind the first, the lower 16 rows `lower` bytes
template <bool PAIR> void load_sums(const uint8_t *sum, int64_t lower) {
  _tile_loadd(0, sum, 64);
  _tile_loadd(2, sum + lower, 64);
  if constexpr (PAIR) {
    _tile_loadd(1, sum + kTileBytes, 64);
    _tile_loadd(3, sum + lower + kTileBytes, 64);
  }
}

template <bool PAIR> void store_sums(uint8_t *sum, int64_t lower) {
  _tile_stored(0, sum, 64);
  _tile_stored(2, sum + lower, 64);
  if constexpr (PAIR) {
    _tile_stored(1, sum + kTileBytes, 64);
    _tile_stored(3, sum + lower + kTileBytes, 64);
  }
}

// tiles 0..3 += weights x for 32 rows and two (or one) columns of tiles; `meanwhile` runs beside every step
template <class Values, bool PAIR, class Meanwhile>
FIPS_INLINE void multiply_steps(const uint8_t *weights, const uint8_t *x0, const uint8_t *x1, int64_t steps,
                                int64_t row_bytes, Meanwhile &&meanwhile) {
  for (int64_t s = 0; s < steps; ++s) {
    __asm__ volatile("" ::: "memory"); // the tile loads do not tell the compiler that they read memory
    _tile_loadd(4, weights + s * 64, row_bytes);
    _tile_loadd(5, weights + 16 * row_bytes + s * 64, row_bytes);
    _tile_loadd(6, x0 + s * kTileBytes, 64);
    if constexpr (PAIR) _tile_loadd(7, x1 + s * kTileBytes, 64);
    dot<Values, PAIR>();
    meanwhile();
  }
}

// Rows [row0, row0 + rows) by token blocks [block0, block0 + blocks) of every plane.
//
// Goes through parts of 32 rows by `part_steps` steps; while the tiles multiply one, the rows of the next are decoded.
template <class Reader, class Values>
void panel(const fips_matrix &a, const fips_call &c, const Reader &reader, const PackedTokens &p, int64_t row0,
           int64_t rows, int64_t block0, int64_t blocks, uint8_t *sums, uint8_t *weights) {
  const int64_t columns = blocks * p.planes, pairs = (rows + 31) / 32, lower = columns * kTileBytes;
  const bool few = columns <= kFewColumns, stay = columns <= 2; // with few columns the packed rows are read in order
  const int64_t runs = (p.steps + kManySteps - 1) / kManySteps;
  const int64_t part_steps = round_up((p.steps + runs - 1) / runs, 2), parts = pairs * runs;
  const int64_t row_bytes = part_steps * 64 + 64; // odd in cache lines: 16 rows fall into different sets
  Decoder<Reader, Values> decoder(a, reader, row0, rows, row_bytes);
  const auto pair_of = [&](int64_t part) { return few ? part / runs : part % pairs; };
  const auto step_of = [&](int64_t part) { return (few ? part % runs : part / pairs) * part_steps; };
  const auto steps_of = [&](int64_t part) { return min_of(part_steps, p.steps - step_of(part)); };
  const auto rows_of = [&](int64_t part) { return weights + part % 2 * 32 * row_bytes; };
  const auto decode = [&](int64_t part, int64_t first, int64_t end) {
    const int64_t row = pair_of(part) * 32;
    decoder.decode(row + first, min_of(end, rows - row) - first, step_of(part), steps_of(part),
                   rows_of(part) + first * row_bytes, part + 1 < parts ? pair_of(part + 1) * 32 + first : rows);
  };
  decode(0, 0, 32);
  for (int64_t part = 0; part < parts; ++part) {
    const int64_t step = step_of(part), steps = steps_of(part), all = (columns + 1) / 2 * steps;
    int64_t done = 0, due = 0; // rows of the next part, spread evenly over the steps of all columns
    const auto meanwhile = [&] {
      const int64_t first = done;
      for (due += 32; due >= all; due -= all) ++done;
      if (done > first && part + 1 < parts) decode(part + 1, first, done);
    };
    const auto x = [&](int64_t column) { return p.tile(int(column / blocks), block0 + column % blocks, step); };
    const auto multiply = [&](auto pair, int64_t i) {
      constexpr bool PAIR = decltype(pair)::value;
      uint8_t *sum = sums + pair_of(part) * 2 * lower + i * kTileBytes;
      if (step == 0) {
        _tile_zero(0);
        _tile_zero(1);
        _tile_zero(2);
        _tile_zero(3);
      } else if (!stay) {
        load_sums<PAIR>(sum, lower);
      }
      multiply_steps<Values, PAIR>(rows_of(part), x(i), PAIR ? x(i + 1) : nullptr, steps, row_bytes, meanwhile);
      if (!stay || step + steps == p.steps) store_sums<PAIR>(sum, lower);
    };
    int64_t i = 0;
    for (; i + 2 <= columns; i += 2) multiply(std::true_type(), i);
    if (i < columns) multiply(std::false_type(), i);
  }
  __asm__ volatile("" ::: "memory");
  finish_panel<Values>(a, c, p, sums, row0, rows, block0, blocks);
}

template <class Values> bool tiles_path(const fips_matrix &a, const fips_call &c) {
  const PackedTokens p = place_tokens<Values>(a, c, char(0x80), 1);
  const int64_t rows = even_share(a.rows, c.threads, kMostRows, 32), per_pass = kColumnsPerPass / 16 / p.planes;
  const int64_t panels = (a.rows + rows - 1) / rows, passes = (p.blocks + per_pass - 1) / per_pass;
  const int64_t tiles = (rows + 31) / 32 * 2 * min_of(per_pass, p.blocks) * p.planes;
  const PerThread<uint8_t> sums(Scratch::sums, tiles * kTileBytes, c.threads); // [16 rows][column][tile]
  const PerThread<uint8_t> weights(Scratch::weights, 2 * 32 * (kManySteps * 64 + 64), c.threads);
  return with_reader(a, [&](const auto &reader) {
    using Reader = std::decay_t<decltype(reader)>;
#pragma omp parallel num_threads(c.threads)
    {
      const TileConfig config;
      _tile_loadconfig(&config);
      pack_tokens<Values>(a, c, p, false);
#pragma omp for collapse(2) schedule(dynamic)
      for (int64_t pass = 0; pass < passes; ++pass)
        for (int64_t i = 0; i < panels; ++i)
          panel<Reader, Values>(a, c, reader, p, i * rows, min_of(rows, a.rows - i * rows), pass * per_pass,
                                min_of(per_pass, p.blocks - pass * per_pass), sums.mine(), weights.mine());
      _tile_release();
    }
  });
}

} // namespace

bool fips_amx(const fips_matrix &a, const fips_call &c) {
  if (c.path != FIPS_TILES || a.format == FIPS_BLOCK_ROWS) return false;
  if (a.value_type == FIPS_BF16) return tiles_path<BF16Values>(a, c);
  if (a.value_type != FIPS_I8 || a.scale_group) return false;
  fips_call finer = c; // a tile sums whole rows, so inputs of 8 bits, 64 of which share a scale, take 16 here
  if (fixed_planes(c) == 1) finer.activation_bits = 16;
  return a.value_bits < 8 ? tiles_path<NarrowValues>(a, finer) : tiles_path<I8Values>(a, finer);
}
