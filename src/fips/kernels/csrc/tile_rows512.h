// Tokens as tiles and rows of S decoded beside them: what the matrix unit (amx.cpp) and dot products (tile_dots512.h) share.
//
// S is the left operand: `vpexpand` gives rows of words of 4 bytes, 1 float, 2 bf16 or 4 int8 columns each. Tokens are
// the right operand, packed once per call. Wider inputs become several planes of columns, added up at the end: floats
// beside bf16 are up to three bf16 terms, inputs of int8 values bytes of a fixed-point number (one scale per token).
//
// Tile of x: 16 words along K by 16 tokens. A "step" is one tile along K, a "column" 16 tokens of one plane. Sums of 16
// rows by a column lie in a tile too, one row after the other.
#pragma once
#include <immintrin.h>

#include <type_traits>

#include "codes512.h"
#include "packed.h"
#include "paths.h"
#include "token_loads512.h"

namespace {

constexpr int64_t kTileBytes = 1024, kMostRows = 256; // that a decoder takes
constexpr int kMaxPlanes = 3;

inline void transpose(__m512i r[16]) { // 16 x 16 words
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

FIPS_INLINE __m512 widen(__m256i half) { return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(half), 16)); }

// Tokens as tiles: planes of `blocks` columns of tiles, each `steps` long.
struct PackedTokens {
  uint8_t *tiles;
  float *scales; // per token, int8 only
  int64_t blocks, steps;
  int planes;
  char sign; // added to every digit of a fixed-point number by exclusive or: 0x80 takes the 128 in it away
  int units; // of a step, after which sums are scaled; 0: never
  int64_t nbytes() const { return planes * blocks * steps * kTileBytes; }
  int64_t padded_tokens() const { return round_up(blocks * 16, 32); } // scales of two copies share no line
  int64_t side_numbers() const { return padded_tokens() + (units ? blocks * steps * 16 * (1 + planes * units) : 0); }
  uint8_t *tile(int plane, int64_t block, int64_t step) const {
    return tiles + ((plane * blocks + block) * steps + step) * kTileBytes;
  }
  // With units: what the digits of a tile are multiplied by, a number for each of its 16 tokens, ...
  float *tile_scales(int64_t block, int64_t step) const {
    return scales + padded_tokens() + (block * steps + step) * 16;
  }
  // ... and where their sums begin, 16 numbers for each unit.
  int32_t *starts(int plane, int64_t block, int64_t step) const {
    auto *first = reinterpret_cast<int32_t *>(tile_scales(blocks, 0));
    return first + ((plane * blocks + block) * steps + step) * units * 16;
  }
};

template <class Values> struct Kind;

#ifdef __AVX512BF16__
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
  static void finish(const PackedTokens &, int, int64_t, int64_t, const __m512i *) {} // nothing beside the tile
  static __m512 sum(const uint8_t *const *planes, int count, int row) {
    __m512 value = _mm512_load_ps(planes[0] + row * 64);
    for (int i = 1; i < count; ++i) value = _mm512_add_ps(value, _mm512_load_ps(planes[i] + row * 64));
    return value;
  }
};
#endif

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
      lines[plane][at] = _mm512_xor_si512(digits[plane], _mm512_set1_epi8(p.sign));
  }
  FIPS_INLINE static void decode(uint64_t mask, const int8_t *&v, uint8_t *to) {
    _mm512_store_si512(to, _mm512_maskz_expandloadu_epi8(_cvtu64_mask64(mask), v));
    v += popcount64(mask);
  }
  static void finish(const PackedTokens &, int, int64_t, int64_t, const __m512i *) {}
  static __m512 sum(const uint8_t *const *planes, int count, int row) {
    __m512 value = _mm512_cvtepi32_ps(_mm512_load_si512(planes[count - 1] + row * 64));
    for (int i = count - 2; i >= 0; --i)
      value = _mm512_fmadd_ps(value, _mm512_set1_ps(256), _mm512_cvtepi32_ps(_mm512_load_si512(planes[i] + row * 64)));
    return value;
  }
};

struct NarrowValues : I8Values {}; // of less than 8 bits

template <> struct Kind<NarrowValues> : Kind<I8Values> {};

template <class Values> struct Floats : Values {}; // values widened to float32, one to a word

// Bytes whose sums are scaled after every unit of columns, by the scales of groups of the matrix and, where inputs have
// 8 bits, of 64 inputs. Weights have 128 added and digits their sign: sums of a token begin 128 times the sum of its
// digits lower, which is the same for all rows.
template <class Values> struct Scaled : Values {};

template <class Values> constexpr bool is_scaled = false;
template <class Values> constexpr bool is_scaled<Scaled<Values>> = true;
template <class Values> constexpr bool is_narrow = std::is_base_of_v<NarrowValues, Values>;
// Whether values are multiplied as bytes, beside tokens in fixed point.
template <class Values>
constexpr bool stays_bytes = std::is_same_v<Values, I8Values> || std::is_same_v<Values, NarrowValues>;

template <class Values> struct Kind<Scaled<Values>> : Kind<I8Values> {
  static void scale(const fips_matrix &a, const fips_call &c, int64_t t, const PackedTokens &p) {
    p.scales[t] = p.planes == 1 ? 1.0f : token_scale(c, t, a.cols, p.planes);
  }
  static void line(const fips_matrix &a, const fips_call &c, const PackedTokens &p, int64_t t, int64_t k,
                   __m512i (*lines)[16], int at) {
    float *scale = p.tile_scales(t / 16, k / step) + at;
    *scale = 1.0f;
    if (p.planes > 1) return Kind<I8Values>::line(a, c, p, t, k, lines, at);
    lines[0][at] = block_digits(c, t, k, a.cols, scale);
  }
  static void finish(const PackedTokens &p, int plane, int64_t b, int64_t s, const __m512i *lines) {
    const int words = 16 / p.units;
    for (int unit = 0; unit < p.units; ++unit) {
      __m512i sum = _mm512_setzero_si512();
      for (int i = 0; i < words; ++i) sum = _mm512_dpbusd_epi32(sum, _mm512_set1_epi8(1), lines[unit * words + i]);
      _mm512_store_si512(p.starts(plane, b, s) + unit * 16, _mm512_mullo_epi32(sum, _mm512_set1_epi32(-128)));
    }
  }
  static __m512 sum(const uint8_t *const *planes, int count, int row) {
    __m512 value = _mm512_load_ps(planes[count - 1] + row * 64);
    for (int i = count - 2; i >= 0; --i)
      value = _mm512_fmadd_ps(value, _mm512_set1_ps(256), _mm512_load_ps(planes[i] + row * 64));
    return value;
  }
};

template <class Values> struct Kind<Floats<Values>> {
  static constexpr int64_t step = 16;
  static int planes(const fips_call &) { return 1; }
  static void scale(const fips_matrix &, const fips_call &, int64_t, const PackedTokens &) {} // none
  static void line(const fips_matrix &a, const fips_call &c, const PackedTokens &, int64_t t, int64_t k,
                   __m512i (*lines)[16], int at) {
    lines[0][at] = _mm512_castps_si512(read_floats(c, t, k, a.cols));
  }
  FIPS_INLINE static void decode(uint64_t mask, const typename Values::type *&v, uint8_t *to) { // four steps
    for (int i = 0; i < 4; ++i, mask >>= 16, to += 64) {
      if constexpr (std::is_same_v<Values, F32Values>) {
        _mm512_store_ps(reinterpret_cast<float *>(to), _mm512_maskz_expandloadu_ps(_cvtu32_mask16(uint16_t(mask)), v));
      } else {
        const __m256i half = _mm256_maskz_expandloadu_epi16(_cvtu32_mask16(uint16_t(mask)), v);
        _mm512_store_ps(reinterpret_cast<float *>(to),
                        std::is_same_v<Values, BF16Values> ? widen(half) : _mm512_cvtph_ps(half));
      }
      v += popcount64(mask & 0xFFFF);
    }
  }
  static void finish(const PackedTokens &, int, int64_t, int64_t, const __m512i *) {}
  static __m512 sum(const uint8_t *const *planes, int, int row) { return _mm512_load_ps(planes[0] + row * 64); }
};

template <class K> void pack_tile(const fips_matrix &a, const fips_call &c, const PackedTokens &p, int64_t b, int64_t s) {
  __m512i lines[kMaxPlanes][16];
  if (p.units) _mm512_store_ps(p.tile_scales(b, s), _mm512_setzero_ps()); // of tokens that are not there
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
    K::finish(p, plane, b, s, lines[plane]);
  }
}

// Decodes rows of a panel over one block of steps; remembers where the values of every row go on.
template <class Reader, class Values> class Decoder {
public:
  Decoder(const fips_matrix &a, const Reader &reader, int64_t row0, int64_t rows, int64_t row_bytes)
      : a_(a), reader_(reader), codes_(a), row0_(row0), rows_(rows), row_bytes_(row_bytes) {
    for (int64_t r = 0; r < rows; ++r) next_[r] = reader.start(row0 + r);
  }

  // Rows [first, first + count) of the panel, one after the other; a tile is 16 rows by 64 bytes of `to`. The block
  // after this one begins at row `then`: a row of it is fetched for every row decoded.
  void decode(int64_t first, int64_t count, int64_t step0, int64_t steps, uint8_t *to, int64_t then) {
    const int64_t k0 = step0 * Kind<Values>::step, k1 = min_of(a_.cols, (step0 + steps) * Kind<Values>::step);
    for (int64_t r = first, end = first + count; r < end;) {
      const Decoded done = decode_rows(r, end, k0, k1, to);
      to += done.rows * row_bytes_;
      for (const int64_t stop = r + done.rows; r < stop; ++r) {
        if (then + r - first >= rows_) continue;
        const char *fetched = place(next_[then + r - first]);
        for (int64_t i = 0; i < done.bytes + 64; i += 64) _mm_prefetch(fetched + i, _MM_HINT_T0);
      }
    }
  }

  // Where the values of a row not yet decoded begin; those of the last one end behind it.
  const char *at(int64_t row) const { return place(row < rows_ ? next_[row] : reader_end()); }

private:
  int64_t reader_end() const { return row0_ + rows_ < a_.rows ? reader_.start(row0_ + rows_) : a_.num_values; }

  const char *place(int64_t value) const {
    if constexpr (is_narrow<Values>)
      return static_cast<const char *>(a_.values) + (value * a_.value_bits >> 3);
    else
      return reinterpret_cast<const char *>(static_cast<const typename Values::type *>(a_.values) + value);
  }

  static constexpr bool is_full = std::is_same_v<Reader, FullReader>;
  struct NoCodes {
    explicit NoCodes(const fips_matrix &) {}
  };
  struct Decoded {
    int64_t rows, bytes; // of the values of each
  };

  // Codes that depend on those above, of rows from r on, before `end`.
  template <int MEMORY> Decoded recall(int64_t r, int64_t end, int64_t k0, int64_t k1, uint8_t *to) {
    const int64_t row = row0_ + r, blocks = (k1 - k0 + 63) / 64, bytes = (k1 - k0) * a_.value_bits >> 3;
    if (a_.cols % 64 == 0 && row % kRecalledRows == 0) { // several at a time
      const int64_t rows = min_of(kRecalledRows, end - r);
      const RecalledRows<MEMORY> codes(a_);
      codes.template write<is_scaled<Values>>(row, int(rows), k0, blocks, to, row_bytes_);
      for (int64_t i = 0; i < rows; ++i) next_[r + i] += k1 - k0;
      return {rows, bytes};
    }
    RecalledCursor<MEMORY> v(a_, next_[r]);
    for (int64_t i = 0; i < blocks; ++i)
      _mm512_store_si512(to + 64 * i, is_scaled<Values> ? v.next_lifted(0) : v.next(0));
    next_[r] += k1 - k0;
    return {1, bytes};
  }

  // Returns how many rows from r on, before `end`, it decoded.
  Decoded decode_rows(int64_t r, int64_t end, int64_t k0, int64_t k1, uint8_t *to) {
    if constexpr (is_narrow<Values> && is_full) {
      if (a_.memory == 2) return recall<2>(r, end, k0, k1, to);
      if (a_.memory == 3) return recall<3>(r, end, k0, k1, to);
      codes_.template write<is_scaled<Values>>(next_[r], (k1 - k0 + 63) / 64, to);
      next_[r] += k1 - k0;
      return {1, (k1 - k0) * a_.value_bits >> 3};
    } else {
      return {1, decode_row(r, k0, k1, to)};
    }
  }

  int64_t decode_row(int64_t r, int64_t k0, int64_t k1, uint8_t *to) { // returns how many bytes of values it read
    if constexpr (is_narrow<Values>) {
      const int64_t begin = codes_.bit = next_[r] * a_.value_bits;
      for (int64_t k = k0; k < k1; k += 64) { // beyond the last column x is 0, whatever is read there
        const uint64_t mask = reader_.mask(row0_ + r, k);
        _mm512_store_si512(to + (k - k0), is_scaled<Values> ? codes_.next_lifted(mask) : codes_.next(mask));
        next_[r] += popcount64(mask);
      }
      return (codes_.bit - begin) >> 3;
    } else {
      const auto *all = static_cast<const typename Values::type *>(a_.values), *begin = all + next_[r], *v = begin;
      int64_t k = k0;
      if constexpr (is_full && int64_t(sizeof *v) * Kind<Values>::step == 64) // as they are
        for (; k + 64 <= k1; k += 64, v += 64)
          for (size_t i = 0; i < sizeof *v; ++i, to += 64) {
            const __m512i line = _mm512_loadu_si512(reinterpret_cast<const char *>(v) + 64 * i);
            _mm512_store_si512(to, is_scaled<Values> ? lifted(line) : line);
          }
      for (; k < k1; k += 64, to += 64 / Kind<Values>::step * 64) {
        Kind<Values>::decode(reader_.mask(row0_ + r, k), v, to);
        if (is_scaled<Values>) _mm512_store_si512(to, lifted(_mm512_load_si512(to)));
      }
      next_[r] = v - all;
      return (v - begin) * int64_t(sizeof *v);
    }
  }

  const fips_matrix &a_;
  const Reader reader_;
  std::conditional_t<!is_narrow<Values>, NoCodes, std::conditional_t<is_full, NarrowRows, KeptCursor>> codes_;
  int64_t row0_, rows_, row_bytes_;
  int64_t next_[kMostRows];
};

// 16 rows by 16 tokens as 16 lines of one token each: planes added, scaled, with bias
template <class Values>
void finish_tile(const fips_matrix &a, const fips_call &c, const PackedTokens &p, const uint8_t *const *sums,
                 int64_t row, __m512 token_scale, __m512i *lines) {
  const int64_t rows = min_of(16, a.rows - row);
  const float unit = is_narrow<Values> ? NarrowStream::unit(a) : 1.0f;
  alignas(64) float bias[16] = {};
  for (int r = 0; r < 16; ++r) {
    const float scale = unit * (a.scales && r < rows ? a.scales[row + r] : 1.0f);
    const __m512 value = _mm512_mul_ps(Kind<Values>::sum(sums, p.planes, r), _mm512_set1_ps(scale));
    lines[r] = _mm512_castps_si512(_mm512_mul_ps(value, token_scale));
  }
  transpose(lines);
  if (!c.bias) return;
  for (int r = 0; r < rows; ++r) bias[r] = load_float(c.bias, c.y_type, row + r);
  for (int t = 0; t < 16; ++t)
    lines[t] = _mm512_castps_si512(_mm512_add_ps(_mm512_castsi512_ps(lines[t]), _mm512_load_ps(bias)));
}

// 32 floats as bf16, to nearest even
FIPS_INLINE __m512i to_bf16(__m512 low, __m512 high) {
#ifdef __AVX512BF16__
  return __m512i(_mm512_cvtne2ps_pbh(high, low));
#else
  const auto round = [](__m512 v) {
    const __m512i bits = _mm512_castps_si512(v);
    const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
    const __m512i up = _mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7FFF)));
    const __mmask16 nan = _mm512_cmp_ps_mask(v, v, _CMP_UNORD_Q);
    const __m512i all = _mm512_mask_or_epi32(up, nan, bits, _mm512_set1_epi32(0x400000));
    return _mm512_cvtepi32_epi16(_mm512_srli_epi32(all, 16));
  };
  return _mm512_inserti64x4(_mm512_castsi256_si512(round(low)), round(high), 1);
#endif
}

// Up to 32 rows of one token.
FIPS_INLINE void write_rows(const fips_call &c, int64_t at, int64_t rows, __m512 low, __m512 high) {
  const __mmask32 there = __mmask32(first_columns(rows));
  if (c.y_type == FIPS_F32) {
    float *y = static_cast<float *>(c.y) + at;
    _mm512_mask_storeu_ps(y, __mmask16(there), low);
    _mm512_mask_storeu_ps(y + 16, __mmask16(there >> 16), high);
  } else if (c.y_type == FIPS_BF16) {
    _mm512_mask_storeu_epi16(static_cast<uint16_t *>(c.y) + at, there, to_bf16(low, high));
  } else {
    const __m512i half = _mm512_castsi256_si512(_mm512_cvtps_ph(low, 0));
    _mm512_mask_storeu_epi16(static_cast<uint16_t *>(c.y) + at, there,
                             _mm512_inserti64x4(half, _mm512_cvtps_ph(high, 0), 1));
  }
}

// The sums of rows [row0, row0 + rows) become outputs of the tokens of blocks [block0, block0 + blocks).
template <class Values>
void finish_panel(const fips_matrix &a, const fips_call &c, const PackedTokens &p, const uint8_t *sums, int64_t row0,
                  int64_t rows, int64_t block0, int64_t blocks) {
  const int64_t columns = blocks * p.planes;
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

template <class Values> PackedTokens shape_tokens(const fips_matrix &a, const fips_call &c, char sign) {
  PackedTokens p{};
  p.sign = sign;
  p.planes = Kind<Values>::planes(c);
  p.blocks = (c.tokens + 15) / 16;
  p.steps = round_up(a.cols, 64) / Kind<Values>::step;
  if (is_scaled<Values>) p.units = a.scale_group && a.scale_group < 64 ? int(64 / a.scale_group) : 1;
  return p;
}

// Room for the tokens of a call, `copies` times.
template <class Values> PackedTokens place_tokens(const fips_matrix &a, const fips_call &c, char sign, int copies) {
  PackedTokens p = shape_tokens<Values>(a, c, sign);
  p.tiles = scratch<uint8_t>(Scratch::tokens, copies * p.nbytes());
  if (stays_bytes<Values> || is_scaled<Values>)
    p.scales = scratch<float>(Scratch::scales, copies * p.side_numbers());
  return p;
}

// The next of several copies.
inline PackedTokens copy_of(PackedTokens p, int index) {
  p.tiles += index * p.nbytes();
  if (p.scales) p.scales += index * p.side_numbers();
  return p;
}

// Fills it: in equal shares by all threads of the parallel region that calls, or whole by the calling thread.
template <class Values> void pack_tokens(const fips_matrix &a, const fips_call &c, const PackedTokens &p, bool alone) {
  const auto scale = [&](int64_t t) { Kind<Values>::scale(a, c, t, p); };
  const auto pack = [&](int64_t b, int64_t s) { pack_tile<Kind<Values>>(a, c, p, b, s); };
  if (alone) {
    for (int64_t t = 0; p.scales && t < c.tokens; ++t) scale(t);
    for (int64_t b = 0; b < p.blocks; ++b)
      for (int64_t s = 0; s < p.steps; ++s) pack(b, s);
    return;
  }
  if (p.scales) {
#pragma omp for schedule(static)
    for (int64_t t = 0; t < c.tokens; ++t) scale(t);
  }
#pragma omp for collapse(2) schedule(static)
  for (int64_t b = 0; b < p.blocks; ++b)
    for (int64_t s = 0; s < p.steps; ++s) pack(b, s);
}

} // namespace
