// Matrix tiles (Sapphire Rapids and later): decode 32 rows of S into dense tiles, multiply them by all tokens.
//
// S is the left operand: `vpexpand` gives rows of 32 bf16 or 64 int8 columns, which is what a tile row holds. Tokens
// are the right operand, packed once per call. Wider inputs become several planes of columns, added up at the end:
// floats are three bf16 terms, inputs of int8 values bytes of a fixed-point number (one scale per token).
//
// Tile of x: 16 words of 4 bytes (2 bf16 or 4 int8 along K) by 16 tokens. A "step" is one tile along K.
#include <immintrin.h>

#include <type_traits>

#include "narrow.h"
#include "packed.h"
#include "paths.h"
#include "tokens512.h"
#include "widen.h"

namespace {

constexpr int64_t kTileBytes = 1024, kColumnsPerPass = 512, kPanelRows = 256, kFewColumns = 4, kManySteps = 8;
constexpr int kMaxPlanes = 3;

struct alignas(64) TileConfig {
  uint8_t palette = 1, start_row = 0, reserved[14] = {};
  uint16_t row_bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
  uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
};

void transpose(__m512i r[16]) { // 16 x 16 words
  __m512i t[16];
  for (int i = 0; i < 8; ++i) {
    t[2 * i] = _mm512_unpacklo_epi32(r[2 * i], r[2 * i + 1]);
    t[2 * i + 1] = _mm512_unpackhi_epi32(r[2 * i], r[2 * i + 1]);
  }
  for (int i = 0; i < 4; ++i) {
    r[4 * i] = _mm512_unpacklo_epi64(t[4 * i], t[4 * i + 2]);
    r[4 * i + 1] = _mm512_unpackhi_epi64(t[4 * i], t[4 * i + 2]);
    r[4 * i + 2] = _mm512_unpacklo_epi64(t[4 * i + 1], t[4 * i + 3]);
    r[4 * i + 3] = _mm512_unpackhi_epi64(t[4 * i + 1], t[4 * i + 3]);
  }
  for (int i = 0; i < 4; ++i) {
    t[i] = _mm512_shuffle_i32x4(r[i], r[i + 4], 0x88);
    t[i + 4] = _mm512_shuffle_i32x4(r[i], r[i + 4], 0xDD);
    t[i + 8] = _mm512_shuffle_i32x4(r[i + 8], r[i + 12], 0x88);
    t[i + 12] = _mm512_shuffle_i32x4(r[i + 8], r[i + 12], 0xDD);
  }
  for (int i = 0; i < 8; ++i) {
    r[i] = _mm512_shuffle_i32x4(t[i], t[i + 8], 0x88);
    r[i + 8] = _mm512_shuffle_i32x4(t[i], t[i + 8], 0xDD);
  }
}

__m512 widen(__m256i half) { return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(half), 16)); }

// Tokens as tiles: planes of `blocks` columns of tiles, each `steps` long.
struct PackedTokens {
  uint8_t *tiles;
  float *scales; // per token, int8 only
  int64_t blocks, steps;
  int planes;
  uint8_t *tile(int plane, int64_t block, int64_t step) const {
    return tiles + ((plane * blocks + block) * steps + step) * kTileBytes;
  }
};

template <class Values> struct Kind;

template <> struct Kind<BF16Values> {
  static constexpr int64_t step = 32;
  static int planes(const fips_call &c) { return c.x_type == FIPS_BF16 ? 1 : c.x_type == FIPS_F16 ? 2 : 3; }
  static void scale(const fips_matrix &, const fips_call &, int64_t, const PackedTokens &) {} // none
  // 32 columns of one token, one line of 64 bytes per plane
  static void line(const fips_matrix &a, const fips_call &c, const PackedTokens &p, int64_t t, int64_t k,
                   __m512i (*lines)[16], int at) {
    if (p.planes == 1) {
      const __mmask32 there = __mmask32(first_columns(min_of(a.cols - k, 32)));
      lines[0][at] = _mm512_maskz_loadu_epi16(there, static_cast<const uint16_t *>(c.x) + t * c.x_stride + k);
      return;
    }
    __m512 low = read_floats(c, t, k, a.cols), high = read_floats(c, t, k + 16, a.cols);
    for (int plane = 0; plane < p.planes; ++plane) {
      const __m256i l = __m256i(_mm512_cvtneps_pbh(low)), h = __m256i(_mm512_cvtneps_pbh(high));
      lines[plane][at] = _mm512_inserti64x4(_mm512_castsi256_si512(l), h, 1);
      low = _mm512_sub_ps(low, widen(l));
      high = _mm512_sub_ps(high, widen(h));
    }
  }
  FIPS_INLINE static void decode(uint64_t mask, const uint16_t *&v, uint8_t *to) { // 64 columns: two steps
    _mm512_store_si512(to, _mm512_maskz_expandloadu_epi16(_cvtu32_mask32(uint32_t(mask)), v));
    v += popcount64(uint32_t(mask));
    _mm512_store_si512(to + 64, _mm512_maskz_expandloadu_epi16(_cvtu32_mask32(uint32_t(mask >> 32)), v));
    v += popcount64(mask >> 32);
  }
  static __m512 sum(const uint8_t *const *planes, int count, int row) {
    __m512 value = _mm512_load_ps(planes[0] + row * 64);
    for (int i = 1; i < count; ++i) value = _mm512_add_ps(value, _mm512_load_ps(planes[i] + row * 64));
    return value;
  }
};

template <> struct Kind<I8Values> {
  static constexpr int64_t step = 64;
  static int planes(const fips_call &c) { return fixed_planes(c); }
  static void scale(const fips_matrix &a, const fips_call &c, int64_t t, const PackedTokens &p) {
    p.scales[t] = token_scale(c, t, a.cols, p.planes);
  }
  static void line(const fips_matrix &a, const fips_call &c, const PackedTokens &p, int64_t t, int64_t k,
                   __m512i (*lines)[16], int at) {
    __m512i digits[kMaxPlanes];
    const __m512 inverse = _mm512_set1_ps(1 / p.scales[t]);
    with_type(c, [&](auto type) { fixed_point<decltype(type)::value>(c, t, k, a.cols, inverse, p.planes, digits); });
    for (int plane = 0; plane < p.planes; ++plane)
      lines[plane][at] = _mm512_xor_si512(digits[plane], _mm512_set1_epi8(char(0x80)));
  }
  FIPS_INLINE static void decode(uint64_t mask, const int8_t *&v, uint8_t *to) {
    _mm512_store_si512(to, _mm512_maskz_expandloadu_epi8(_cvtu64_mask64(mask), v));
    v += popcount64(mask);
  }
  static __m512 sum(const uint8_t *const *planes, int count, int row) {
    __m512 value = _mm512_cvtepi32_ps(_mm512_load_si512(planes[count - 1] + row * 64));
    for (int i = count - 2; i >= 0; --i)
      value = _mm512_fmadd_ps(value, _mm512_set1_ps(256), _mm512_cvtepi32_ps(_mm512_load_si512(planes[i] + row * 64)));
    return value;
  }
};

struct NarrowValues : I8Values {}; // of matrices kept whole

template <> struct Kind<NarrowValues> : Kind<I8Values> {};

template <class K> void pack_tile(const fips_matrix &a, const fips_call &c, const PackedTokens &p, int64_t b, int64_t s) {
  __m512i lines[kMaxPlanes][16];
  for (int i = 0; i < 16; ++i) {
    const int64_t t = b * 16 + i;
    if (t < c.tokens)
      K::line(a, c, p, t, s * K::step, lines, i);
    else
      for (int plane = 0; plane < p.planes; ++plane) lines[plane][i] = _mm512_setzero_si512();
  }
  for (int plane = 0; plane < p.planes; ++plane) {
    transpose(lines[plane]);
    for (int i = 0; i < 16; ++i) _mm512_store_si512(p.tile(plane, b, s) + i * 64, lines[plane][i]);
  }
}

// Decodes rows of a panel over one block of steps; remembers where the values of every row go on.
template <class Reader, class Values> class Decoder {
public:
  Decoder(const fips_matrix &a, const Reader &reader, int64_t row0, int64_t rows, int64_t row_bytes)
      : a_(a), reader_(reader), row0_(row0), rows_(rows), row_bytes_(row_bytes) {
    for (int64_t r = 0; r < rows; ++r) next_[r] = reader.start(row0 + r);
  }

  // Rows [first, first + count) of the panel, one after the other; a tile is 16 rows by 64 bytes of `to`. The block
  // after this one begins at row `then`: a row of it is fetched for every row decoded.
  void decode(int64_t first, int64_t count, int64_t step0, int64_t steps, uint8_t *to, int64_t then) {
    const int64_t k0 = step0 * Kind<Values>::step, k1 = min_of(a_.cols, (step0 + steps) * Kind<Values>::step);
    for (int64_t r = first; r < first + count; ++r, to += row_bytes_) {
      const int64_t bytes = decode_row(r, k0, k1, to);
      if (then + r - first >= rows_) continue;
      const char *fetched = place(next_[then + r - first]);
      for (int64_t i = 0; i < bytes + 64; i += 64) _mm_prefetch(fetched + i, _MM_HINT_T0);
    }
  }

private:
  const char *place(int64_t value) const {
    if constexpr (std::is_same_v<Values, NarrowValues>)
      return static_cast<const char *>(a_.values) + (value * a_.value_bits >> 3);
    else
      return reinterpret_cast<const char *>(static_cast<const typename Values::type *>(a_.values) + value);
  }

  int64_t decode_row(int64_t r, int64_t k0, int64_t k1, uint8_t *to) { // returns how many bytes of values it read
    if constexpr (std::is_same_v<Values, NarrowValues>) {
      NarrowCursor v(a_, next_[r]);
      for (int64_t k = k0; k < k1; k += 64) // beyond the last column x is 0, whatever is read there
        _mm512_store_si512(to + (k - k0), v.next());
      next_[r] += k1 - k0;
      return (k1 - k0) * a_.value_bits >> 3;
    } else {
      const auto *all = static_cast<const typename Values::type *>(a_.values), *begin = all + next_[r], *v = begin;
      for (int64_t k = k0; k < k1; k += 64, to += 64 / Kind<Values>::step * 64)
        Kind<Values>::decode(reader_.mask(row0_ + r, k), v, to);
      next_[r] = v - all;
      return (v - begin) * int64_t(sizeof *v);
    }
  }

  const fips_matrix &a_;
  const Reader reader_;
  int64_t row0_, rows_, row_bytes_;
  int64_t next_[kPanelRows];
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

// 16 rows by 16 tokens as 16 lines of one token each: planes added, scaled, with bias
template <class Values>
void finish_tile(const fips_matrix &a, const fips_call &c, const PackedTokens &p, const uint8_t *const *sums,
                 int64_t row, __m512 token_scale, __m512i *lines) {
  const int64_t rows = min_of(16, a.rows - row);
  const float unit = std::is_same_v<Values, NarrowValues> ? NarrowCursor::unit(a) : 1.0f;
  alignas(64) float bias[16] = {};
  for (int r = 0; r < 16; ++r) {
    const float scale = unit * (a.scales && r < rows ? a.scales[row + r] : 1.0f);
    const __m512 value = _mm512_mul_ps(Kind<Values>::sum(sums, p.planes, r), _mm512_set1_ps(scale));
    lines[r] = _mm512_castps_si512(_mm512_mul_ps(value, token_scale));
  }
  transpose(lines);
  if (!c.bias) return;
  for (int r = 0; r < rows; ++r) bias[r] = load_float(c.bias, c.x_type, row + r);
  for (int t = 0; t < 16; ++t)
    lines[t] = _mm512_castps_si512(_mm512_add_ps(_mm512_castsi512_ps(lines[t]), _mm512_load_ps(bias)));
}

// Up to 32 rows of one token.
FIPS_INLINE void write_rows(const fips_call &c, int64_t at, int64_t rows, __m512 low, __m512 high) {
  const __mmask32 there = __mmask32(first_columns(rows));
  if (c.x_type == FIPS_F32) {
    float *y = static_cast<float *>(c.y) + at;
    _mm512_mask_storeu_ps(y, __mmask16(there), low);
    _mm512_mask_storeu_ps(y + 16, __mmask16(there >> 16), high);
  } else if (c.x_type == FIPS_BF16) {
    _mm512_mask_storeu_epi16(static_cast<uint16_t *>(c.y) + at, there, __m512i(_mm512_cvtne2ps_pbh(high, low)));
  } else {
    const __m512i half = _mm512_castsi256_si512(_mm512_cvtps_ph(low, 0));
    _mm512_mask_storeu_epi16(static_cast<uint16_t *>(c.y) + at, there,
                             _mm512_inserti64x4(half, _mm512_cvtps_ph(high, 0), 1));
  }
}

// Rows [row0, row0 + rows) by token blocks [block0, block0 + blocks) of every plane.
//
// Goes through parts of 32 rows by `part_steps` steps; while the tiles multiply one, the rows of the next are decoded.
template <class Reader, class Values>
void panel(const fips_matrix &a, const fips_call &c, const Reader &reader, const PackedTokens &p, int64_t row0,
           int64_t rows, int64_t block0, int64_t blocks) {
  static thread_local Scratch sum_scratch, weight_scratch;
  const int64_t columns = blocks * p.planes, pairs = (rows + 31) / 32, lower = columns * kTileBytes;
  uint8_t *sums = sum_scratch.get<uint8_t>(pairs * 2 * lower); // [16 rows][column][tile]
  const bool few = columns <= kFewColumns, stay = columns <= 2; // with few columns the packed rows are read in order
  const int64_t most = few ? 8 : kManySteps, runs = (p.steps + most - 1) / most;
  const int64_t part_steps = round_up((p.steps + runs - 1) / runs, 2), parts = pairs * runs;
  const int64_t row_bytes = part_steps * 64 + 64; // odd in cache lines: 16 rows fall into different sets
  uint8_t *weights = weight_scratch.get<uint8_t>(2 * 32 * row_bytes);
  const fips_matrix wide = std::is_same_v<Values, NarrowValues> ? a : widened_rows(a, reader, row0, rows);
  Decoder<Reader, Values> decoder(wide, reader, row0, rows, row_bytes);
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
  for (int64_t b = 0; b < blocks; ++b) { // all rows of a token before the next tokens
    const int64_t token = (block0 + b) * 16, tokens = min_of(16, c.tokens - token);
    const __m512 scale = p.scales ? _mm512_maskz_loadu_ps(__mmask16(first_columns(tokens)), p.scales + token)
                                  : _mm512_set1_ps(1);
    for (int64_t r = 0; r < rows; r += 32) {
      __m512i lines[32];
      for (int half = 0; half < 2; ++half) {
        const uint8_t *planes[kMaxPlanes];
        for (int i = 0; i < p.planes; ++i)
          planes[i] = sums + ((r / 16 + half) * columns + i * blocks + b) * kTileBytes;
        finish_tile<Values>(a, c, p, planes, row0 + r + half * 16, scale, lines + half * 16);
      }
      for (int64_t t = 0; t < tokens; ++t)
        write_rows(c, (token + t) * c.y_stride + row0 + r, min_of(32, rows - r), _mm512_castsi512_ps(lines[t]),
                   _mm512_castsi512_ps(lines[16 + t]));
    }
  }
}

int64_t panel_rows(int64_t rows, int threads) { // as even as possible over the threads, at most kPanelRows
  const int64_t rounds = (rows + threads * kPanelRows - 1) / (threads * kPanelRows);
  return round_up((rows + rounds * threads - 1) / (rounds * threads), 32);
}

template <class Values> bool tiles_path(const fips_matrix &a, const fips_call &c) {
  static thread_local Scratch tile_scratch, scale_scratch;
  PackedTokens p{};
  p.planes = Kind<Values>::planes(c);
  p.blocks = (c.tokens + 15) / 16;
  p.steps = round_up(a.cols, 64) / Kind<Values>::step;
  p.tiles = tile_scratch.get<uint8_t>(p.planes * p.blocks * p.steps * kTileBytes);
  if (!std::is_same_v<Values, BF16Values>) p.scales = scale_scratch.get<float>(c.tokens);
  const int64_t rows = panel_rows(a.rows, c.threads), per_pass = kColumnsPerPass / 16 / p.planes;
  const int64_t panels = (a.rows + rows - 1) / rows, passes = (p.blocks + per_pass - 1) / per_pass;
  return with_reader(a, [&](const auto &reader) {
    using Reader = std::decay_t<decltype(reader)>;
#pragma omp parallel num_threads(c.threads)
    {
      const TileConfig config;
      _tile_loadconfig(&config);
      if (p.scales) {
#pragma omp for schedule(static)
        for (int64_t t = 0; t < c.tokens; ++t) Kind<Values>::scale(a, c, t, p);
      }
#pragma omp for collapse(2) schedule(static)
      for (int64_t b = 0; b < p.blocks; ++b)
        for (int64_t s = 0; s < p.steps; ++s) pack_tile<Kind<Values>>(a, c, p, b, s);
#pragma omp for collapse(2) schedule(dynamic)
      for (int64_t pass = 0; pass < passes; ++pass)
        for (int64_t i = 0; i < panels; ++i)
          panel<Reader, Values>(a, c, reader, p, i * rows, min_of(rows, a.rows - i * rows), pass * per_pass,
                                min_of(per_pass, p.blocks - pass * per_pass));
      _tile_release();
    }
  });
}

} // namespace

bool fips_amx(const fips_matrix &a, const fips_call &c) {
  if (c.path == FIPS_DIRECT || c.path == FIPS_TOKENS || a.format == FIPS_BLOCK_ROWS) return false;
  if (c.path == FIPS_AUTO && c.tokens == 1) return false;
  if (a.value_type == FIPS_BF16) return tiles_path<BF16Values>(a, c);
  if (a.value_type != FIPS_I8) return false;
  return a.value_bits < 8 && a.format == FIPS_DENSE ? tiles_path<NarrowValues>(a, c) : tiles_path<I8Values>(a, c);
}
