// Matrix tiles (Sapphire Rapids and later): decode 32 rows of S into dense tiles, multiply them by all tokens.
//
// S is the left operand: `vpexpand` gives rows of 32 bf16 or 64 int8 columns, which is what a tile row holds. Tokens
// are the right operand, packed once per call. Wider inputs become several planes of columns, added up at the end:
// floats are three bf16 terms, inputs of int8 values bytes of a fixed-point number (one scale per token).
//
// Tile of x: 16 words of 4 bytes (2 bf16 or 4 int8 along K) by 16 tokens. A "step" is one tile along K.
#include <immintrin.h>

#include <cmath>
#include <type_traits>

#include "narrow.h"
#include "packed.h"
#include "paths.h"
#include "widen.h"

namespace {

constexpr int64_t kTileBytes = 1024, kColumnsPerPass = 512, kPanelRows = 256, kFewColumns = 4;
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

__m512 read_floats(const fips_call &c, int64_t t, int64_t k, int64_t cols) {
  const __mmask16 there = __mmask16(first_columns(cols - k < 0 ? 0 : min_of(cols - k, 16)));
  const int64_t at = t * c.x_stride + k;
  if (c.x_type == FIPS_F32) return _mm512_maskz_loadu_ps(there, static_cast<const float *>(c.x) + at);
  const __m256i half = _mm256_maskz_loadu_epi16(there, static_cast<const uint16_t *>(c.x) + at);
  if (c.x_type == FIPS_F16) return _mm512_cvtph_ps(half);
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(half), 16));
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
  static void token_scale(const fips_matrix &, const fips_call &, int64_t, const PackedTokens &) {} // none
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
  static void token_scale(const fips_matrix &a, const fips_call &c, int64_t t, const PackedTokens &p) {
    __m512 most = _mm512_setzero_ps();
    for (int64_t k = 0; k < a.cols; k += 16) most = _mm512_max_ps(most, _mm512_abs_ps(read_floats(c, t, k, a.cols)));
    p.scales[t] = fixed_scale(_mm512_reduce_max_ps(most), p.planes);
  }
  static void line(const fips_matrix &a, const fips_call &c, const PackedTokens &p, int64_t t, int64_t k,
                   __m512i (*lines)[16], int at) {
    const __m512 inverse = _mm512_set1_ps(1 / p.scales[t]);
    for (int i = 0; i < 4; ++i) {
      __m512i fixed = _mm512_cvtps_epi32(_mm512_mul_ps(read_floats(c, t, k + 16 * i, a.cols), inverse));
      for (int plane = 0; plane < p.planes; ++plane) { // the lowest digit first
        reinterpret_cast<__m128i *>(&lines[plane][at])[i] = _mm512_cvtepi32_epi8(fixed);
        const __m512i digit = _mm512_srai_epi32(_mm512_slli_epi32(fixed, 24), 24);
        fixed = _mm512_srai_epi32(_mm512_sub_epi32(fixed, digit), 8);
      }
    }
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
      : a_(a), reader_(reader), row0_(row0), row_bytes_(row_bytes) {
    for (int64_t r = 0; r < rows; ++r) next_[r] = reader.start(row0 + r);
  }

  // Rows [first, first + count) of the panel, one after the other; a tile is 16 rows by 64 bytes of `to`.
  void decode(int64_t first, int64_t count, int64_t step0, int64_t steps, uint8_t *to) {
    if constexpr (std::is_same_v<Values, NarrowValues>) return decode_narrow(first, count, step0, steps, to);
    const auto *all = static_cast<const typename Values::type *>(a_.values);
    const int64_t k0 = step0 * Kind<Values>::step, k1 = min_of(a_.cols, (step0 + steps) * Kind<Values>::step);
    for (int64_t r = first; r < first + count; ++r, to += row_bytes_) {
      const typename Values::type *v = all + next_[r];
      uint8_t *line = to;
      for (int64_t k = k0; k < k1; k += 64, line += 64 / Kind<Values>::step * 64) {
        _mm_prefetch(reinterpret_cast<const char *>(v) + 512, _MM_HINT_T0);
        Kind<Values>::decode(reader_.mask(row0_ + r, k), v, line);
      }
      next_[r] = v - all;
    }
  }

private:
  void decode_narrow(int64_t first, int64_t count, int64_t step0, int64_t steps, uint8_t *to) {
    const int64_t k0 = step0 * 64, k1 = min_of(a_.cols, (step0 + steps) * 64);
    for (int64_t r = row0_ + first; r < row0_ + first + count; ++r, to += row_bytes_) {
      NarrowCursor v(a_, r * a_.cols + k0);
      for (int64_t k = k0; k < k1; k += 64) {
        v.prefetch();
        _mm512_store_si512(to + (k - k0), v.next()); // beyond the last column x is 0, whatever is read there
      }
    }
  }

  const fips_matrix &a_;
  const Reader reader_;
  int64_t row0_, row_bytes_;
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

// sums += weights x for 32 rows and two (or one) blocks of 16 tokens
template <class Values, bool PAIR>
void multiply_block(const uint8_t *weights, const uint8_t *x0, const uint8_t *x1, int64_t steps, int64_t row_bytes,
                    uint8_t *sum0, uint8_t *sum1, int64_t lower, bool first) {
  __asm__ volatile("" ::: "memory"); // the tile loads do not tell the compiler that they read memory
  if (first) {
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
  } else {
    _tile_loadd(0, sum0, 64);
    _tile_loadd(2, sum0 + lower, 64);
    if constexpr (PAIR) {
      _tile_loadd(1, sum1, 64);
      _tile_loadd(3, sum1 + lower, 64);
    }
  }
  for (int64_t s = 0; s < steps; ++s) {
    _tile_loadd(4, weights + s * 64, row_bytes);
    _tile_loadd(5, weights + 16 * row_bytes + s * 64, row_bytes);
    _tile_loadd(6, x0 + s * kTileBytes, 64);
    if constexpr (PAIR) _tile_loadd(7, x1 + s * kTileBytes, 64);
    dot<Values, PAIR>();
  }
  _tile_stored(0, sum0, 64);
  _tile_stored(2, sum0 + lower, 64);
  if constexpr (PAIR) {
    _tile_stored(1, sum1, 64);
    _tile_stored(3, sum1 + lower, 64);
  }
  __asm__ volatile("" ::: "memory");
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
template <class Reader, class Values>
void panel(const fips_matrix &a, const fips_call &c, const Reader &reader, const PackedTokens &p, int64_t row0,
           int64_t rows, int64_t block0, int64_t blocks) {
  static thread_local Scratch sum_scratch, weight_scratch;
  const int64_t columns = blocks * p.planes, pairs = (rows + 31) / 32, lower = columns * kTileBytes;
  uint8_t *sums = sum_scratch.get<uint8_t>(pairs * 2 * lower); // [16 rows][column][tile]
  const int64_t block_steps = columns <= kFewColumns ? 8 : 16; // decoded rows stay in the first-level cache
  const int64_t row_bytes = block_steps * 64 + 64; // odd in cache lines: 16 rows fall into different sets
  uint8_t *weights = weight_scratch.get<uint8_t>(32 * row_bytes);
  const auto x = [&](int64_t column, int64_t step) {
    return p.tile(int(column / blocks), block0 + column % blocks, step);
  };
  const fips_matrix wide = std::is_same_v<Values, NarrowValues> ? a : widened_rows(a, reader, row0, rows);
  Decoder<Reader, Values> decoder(wide, reader, row0, rows, row_bytes);
  const auto multiply = [&](int64_t pair, int64_t step) {
    const int64_t steps = min_of(block_steps, p.steps - step);
    decoder.decode(pair * 32, min_of(32, rows - pair * 32), step, steps, weights);
    uint8_t *sum = sums + pair * 2 * lower;
    int64_t i = 0;
    for (; i + 2 <= columns; i += 2)
      multiply_block<Values, true>(weights, x(i, step), x(i + 1, step), steps, row_bytes,
                                   sum + i * kTileBytes, sum + (i + 1) * kTileBytes, lower, step == 0);
    if (i < columns)
      multiply_block<Values, false>(weights, x(i, step), nullptr, steps, row_bytes, sum + i * kTileBytes, nullptr,
                                    lower, step == 0);
  };
  if (columns <= kFewColumns) { // sums stay in the cache: read the packed rows in order
    for (int64_t pair = 0; pair < pairs; ++pair)
      for (int64_t step = 0; step < p.steps; step += block_steps) multiply(pair, step);
  } else { // one block of all tokens stays in the second-level cache
    for (int64_t step = 0; step < p.steps; step += block_steps)
      for (int64_t pair = 0; pair < pairs; ++pair) multiply(pair, step);
  }
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
        for (int64_t t = 0; t < c.tokens; ++t) Kind<Values>::token_scale(a, c, t, p);
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
