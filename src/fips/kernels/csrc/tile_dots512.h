// Many tokens without a matrix unit: blocks of rows by tokens in registers, by the dot products of AVX-512.
//
// One word of a row is broadcast and multiplied by the words of 16 tokens, as they lie in the tiles of tile_rows512.h: one
// float by `vfmadd`, two bf16 by `vdpbf16ps`, four int8 by `vpdpbusd`. The last wants tokens without sign: their digits
// keep the 128 added to them, and the sums of a row begin 128 times the sum of its weights lower.
#pragma once
#include "paths.h"
#include "tile_rows512.h"

namespace {

constexpr int64_t kWords = 1024, kRowBytes = kWords * 4 + 64; // of a row at a time; rows lie in different cache sets
constexpr int64_t kPairRows = 6;                              // of every block of scaled sums of two columns
constexpr int64_t kFewRows = 12, kSomeRows = 24, kPartRows = 48; // decoded at a time: multiples of the rows of every block
constexpr int64_t kLongSteps = 64;                                // of rows of which fewer are fetched ahead
constexpr int64_t kFewColumns = 2, kSomeColumns = 16, kSlabColumns = 256;
constexpr int kFewThreads = 2;
constexpr int64_t kOwnBytes = 2 << 20; // of tokens that each of few threads packs for itself
constexpr int64_t kNearBytes = 512 << 10; // of tokens that stay in the second-level cache

// `sum` plus products of bytes, those of `bytes` without a sign, in the register where it is: GCC 12 copies the sums of a
// loop from register to register where the intrinsic is called, two copies for each product.
template <class Vector> FIPS_INLINE Vector add_products(Vector sum, Vector bytes, Vector with_sign) {
#if defined(__GNUC__) && defined(__AVX512VNNI__)
  __asm__("vpdpbusd %2, %1, %0" : "+v"(sum) : "v"(bytes), "v"(with_sign));
  return sum;
#else
  if constexpr (sizeof sum == 64) return _mm512_dpbusd_epi32(sum, bytes, with_sign);
  else return _mm256_dpbusd_epi32(sum, bytes, with_sign);
#endif
}

// Sums of one row by W tokens; the last tokens of a call may fill only half a vector, which is half the work.
template <class Values, int W> struct Dots;

template <class Values> struct Dots<Values, 16> {
  using Sum = __m512;
  using Tokens = __m512i;
  static Sum load(const uint8_t *from) { return _mm512_load_ps(from); }
  static void store(uint8_t *to, Sum sum) { _mm512_store_ps(to, sum); }
  static Sum start(Sum sum, int32_t) { return sum; }
  FIPS_INLINE static Tokens tokens(const uint8_t *x) { return _mm512_load_si512(x); }
  FIPS_INLINE static Sum add(Sum sum, Tokens x, int32_t word) {
    const __m512i w = _mm512_set1_epi32(word);
#ifdef __AVX512BF16__
    if constexpr (std::is_same_v<Values, BF16Values>) return _mm512_dpbf16_ps(sum, __m512bh(x), __m512bh(w));
#endif
    return _mm512_fmadd_ps(_mm512_castsi512_ps(x), _mm512_castsi512_ps(w), sum);
  }
};

template <class Values> struct Dots<Values, 8> {
  using Sum = __m256;
  using Tokens = __m256i;
  static Sum load(const uint8_t *from) { return _mm256_load_ps(reinterpret_cast<const float *>(from)); }
  static void store(uint8_t *to, Sum sum) { _mm256_store_ps(reinterpret_cast<float *>(to), sum); }
  static Sum start(Sum sum, int32_t) { return sum; }
  FIPS_INLINE static Tokens tokens(const uint8_t *x) {
    return _mm256_load_si256(reinterpret_cast<const __m256i *>(x));
  }
  FIPS_INLINE static Sum add(Sum sum, Tokens x, int32_t word) {
    const __m256i w = _mm256_set1_epi32(word);
#ifdef __AVX512BF16__
    if constexpr (std::is_same_v<Values, BF16Values>) return _mm256_dpbf16_ps(sum, __m256bh(x), __m256bh(w));
#endif
    return _mm256_fmadd_ps(_mm256_castsi256_ps(x), _mm256_castsi256_ps(w), sum);
  }
};

struct ByteDots16 {
  using Sum = __m512i;
  using Tokens = __m512i;
  static Sum load(const uint8_t *from) { return _mm512_load_si512(from); }
  static void store(uint8_t *to, Sum sum) { _mm512_store_si512(to, sum); }
  static Sum start(Sum sum, int32_t excess) { return _mm512_sub_epi32(sum, _mm512_set1_epi32(excess)); }
  using Floats = __m512;
  FIPS_INLINE static Floats floats(const float *from) { return _mm512_load_ps(from); }
  FIPS_INLINE static Floats times(Floats a, float b) { return _mm512_mul_ps(a, _mm512_set1_ps(b)); }
  FIPS_INLINE static Floats add_scaled(Floats to, Sum sum, Floats scale) {
    return _mm512_fmadd_ps(_mm512_cvtepi32_ps(sum), scale, to);
  }
  FIPS_INLINE static void store(float *to, Floats sum) { _mm512_store_ps(to, sum); }
  FIPS_INLINE static Tokens tokens(const uint8_t *x) { return _mm512_load_si512(x); }
  FIPS_INLINE static Sum add(Sum sum, Tokens x, int32_t word) {
    return add_products(sum, x, _mm512_set1_epi32(word));
  }
};

struct ByteDots8 {
  using Sum = __m256i;
  using Tokens = __m256i;
  static Sum load(const uint8_t *from) { return _mm256_load_si256(reinterpret_cast<const __m256i *>(from)); }
  static void store(uint8_t *to, Sum sum) { _mm256_store_si256(reinterpret_cast<__m256i *>(to), sum); }
  static Sum start(Sum sum, int32_t excess) { return _mm256_sub_epi32(sum, _mm256_set1_epi32(excess)); }
  using Floats = __m256;
  FIPS_INLINE static Floats floats(const float *from) { return _mm256_load_ps(from); }
  FIPS_INLINE static Floats times(Floats a, float b) { return _mm256_mul_ps(a, _mm256_set1_ps(b)); }
  FIPS_INLINE static Floats add_scaled(Floats to, Sum sum, Floats scale) {
    return _mm256_fmadd_ps(_mm256_cvtepi32_ps(sum), scale, to);
  }
  FIPS_INLINE static void store(float *to, Floats sum) { _mm256_store_ps(to, sum); }
  FIPS_INLINE static Tokens tokens(const uint8_t *x) { return load(x); }
  FIPS_INLINE static Sum add(Sum sum, Tokens x, int32_t word) {
    return add_products(sum, x, _mm256_set1_epi32(word));
  }
};

template <> struct Dots<I8Values, 16> : ByteDots16 {};
template <> struct Dots<I8Values, 8> : ByteDots8 {};
template <> struct Dots<NarrowValues, 16> : ByteDots16 {};
template <> struct Dots<NarrowValues, 8> : ByteDots8 {};
template <class Values> struct Dots<Scaled<Values>, 16> : ByteDots16 {
  FIPS_INLINE static Sum add(Sum sum, Tokens x, int32_t word) {
    return add_products(sum, _mm512_set1_epi32(word), x);
  }
};
template <class Values> struct Dots<Scaled<Values>, 8> : ByteDots8 {
  FIPS_INLINE static Sum add(Sum sum, Tokens x, int32_t word) {
    return add_products(sum, _mm256_set1_epi32(word), x);
  }
};

// Digits are stored 128 larger, without sign: what that adds to the sums of a decoded row.
template <class Values> int32_t excess_of(const uint8_t *row, int64_t steps) {
  if constexpr (!stays_bytes<Values>) return 0;
  __m512i sum[4] = {}; // several, since a dot product has a latency of several cycles
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

// Packed values that come next, fetched in equal shares while others are multiplied.
struct Ahead {
  const char *at, *end;
  int64_t share;
  Ahead(const char *from, const char *to, int64_t steps) : at(from), end(to), share((to - from) / steps + 64) {}
  FIPS_INLINE void fetch() {
    for (const char *stop = at + min_of(share, end - at); at < stop; at += 64) _mm_prefetch(at, _MM_HINT_T0);
  }
};

// One column of a product: its tokens, and where its sums of a slab are, in tiles of 16 rows `lower` bytes apart.
struct Column {
  const uint8_t *x;
  uint8_t *sums;
  const float *scales = nullptr;   // of its tiles, and
  const int32_t *starts = nullptr; // where sums of their units begin, where these are scaled
};

constexpr int64_t kUnits = kWords / 4; // of a row at a time, at most

// One word of R rows times those of C columns.
template <class D, int R, int C>
FIPS_INLINE void add_word(typename D::Sum (&acc)[R][C], const uint8_t *weights, const uint8_t *const (&x)[C], int64_t at) {
  typename D::Tokens xs[C];
#pragma GCC unroll 4
  for (int j = 0; j < C; ++j) xs[j] = D::tokens(x[j] + at * 64);
#pragma GCC unroll 16
  for (int r = 0; r < R; ++r) {
    int32_t word;
    std::memcpy(&word, weights + r * kRowBytes + at * 4, 4);
#pragma GCC unroll 4
    for (int j = 0; j < C; ++j) acc[r][j] = D::add(acc[r][j], xs[j], word);
  }
}

// Sums of R rows by C columns over some steps. `weights` and `excess` begin with the first of these rows, `row`.
template <class Values, int W, int R, int C>
FIPS_APART void multiply_block(const uint8_t *weights, const Column *columns, int64_t steps, int64_t row,
                               int64_t lower, bool first, const int32_t *excess, Ahead &ahead) {
  using D = Dots<Values, W>;
  typename D::Sum acc[R][C];
  const uint8_t *x[C];
  for (int j = 0; j < C; ++j) x[j] = columns[j].x;
  const auto place = [&](int r, int j) { return columns[j].sums + (row + r) / 16 * lower + (row + r) % 16 * 64; };
#pragma GCC unroll 16
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
    for (int j = 0; j < C; ++j) acc[r][j] = D::start(first ? typename D::Sum{} : D::load(place(r, j)), excess[r]);
  for (int64_t s = 0; s < steps; ++s) {
    ahead.fetch();
    for (int64_t at = 16 * s; at < 16 * s + 16; ++at) add_word<D, R, C>(acc, weights, x, at);
  }
#pragma GCC unroll 16
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
    for (int j = 0; j < C; ++j) D::store(place(r, j), acc[r][j]);
}

// The same where sums are scaled after every unit, in registers beside those of the unit: sums of floats in memory would
// cost a third of the time. `scales` has the numbers of the units of these rows, if the matrix has GROUPS.
template <class Values, int W, int R, int C, bool GROUPS>
FIPS_APART void multiply_units(const uint8_t *weights, const Column *columns, int64_t steps, int64_t row,
                               int64_t lower, bool first, const float *scales, int units, Ahead &ahead) {
  using D = Dots<Values, W>;
  const auto place = [&](int r, int j) {
    return reinterpret_cast<float *>(columns[j].sums + (row + r) / 16 * lower + (row + r) % 16 * 64);
  };
  const int64_t words = 16 / units;
  const uint8_t *x[C];
  for (int j = 0; j < C; ++j) x[j] = columns[j].x;
  typename D::Floats sums[R][C];
#pragma GCC unroll 16
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
    for (int j = 0; j < C; ++j) sums[r][j] = first ? typename D::Floats{} : D::floats(place(r, j));
  for (int64_t s = 0; s < steps; ++s) {
    ahead.fetch();
    for (int64_t unit = s * units; unit < (s + 1) * units; ++unit) {
      typename D::Sum acc[R][C];
#pragma GCC unroll 4
      for (int j = 0; j < C; ++j) {
        const auto start = D::load(reinterpret_cast<const uint8_t *>(columns[j].starts + unit * 16));
#pragma GCC unroll 16
        for (int r = 0; r < R; ++r) acc[r][j] = start;
      }
      for (int64_t at = unit * words; at < (unit + 1) * words; ++at) add_word<D, R, C>(acc, weights, x, at);
#pragma GCC unroll 16
      for (int r = 0; r < R; ++r) {
#pragma GCC unroll 4
        for (int j = 0; j < C; ++j) {
          const auto scale = D::floats(columns[j].scales + s * 16);
          sums[r][j] =
              D::add_scaled(sums[r][j], acc[r][j], GROUPS ? D::times(scale, scales[r * kUnits + unit]) : scale);
        }
      }
    }
  }
#pragma GCC unroll 16
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
    for (int j = 0; j < C; ++j) D::store(place(r, j), sums[r][j]);
}

// All rows of a part by some columns; rows behind the last of a slab are multiplied too, and not looked at.
struct Part {
  const uint8_t *weights;
  const int32_t *excess;
  const float *scales;
  int64_t row, rows, step, steps, lower;
  int units;

  template <class Values, int W, int R, int C> void multiply(const Column *columns, Ahead &ahead) const {
    Column from[C];
    for (int j = 0; j < C; ++j) from[j] = {columns[j].x + step * kTileBytes, columns[j].sums};
    if constexpr (is_scaled<Values>) {
      for (int j = 0; j < C; ++j) {
        from[j].scales = columns[j].scales + step * 16;
        from[j].starts = columns[j].starts + step * units * 16;
      }
      const auto multiply_rows = scales ? multiply_units<Values, W, R, C, true> : multiply_units<Values, W, R, C, false>;
      for (int64_t r = 0; r < rows; r += R)
        multiply_rows(weights + r * kRowBytes, from, steps, row + r, lower, step == 0,
                      scales ? scales + r * kUnits : nullptr, units, ahead);
      return;
    }
    for (int64_t r = 0; r < rows; r += R)
      multiply_block<Values, W, R, C>(weights + r * kRowBytes, from, steps, row + r, lower, step == 0, excess + r,
                                      ahead);
  }

  template <class Values, int W> void multiply(const Column *columns, int64_t count, Ahead &ahead) const {
    if constexpr (is_scaled<Values>) {
      for (; count >= 2; count -= 2, columns += 2) multiply<Values, W, 6, 2>(columns, ahead);
      if (count == 1) multiply<Values, W, 12, 1>(columns, ahead);
      return;
    }
    for (; count >= 4; count -= 4, columns += 4) multiply<Values, W, 6, 4>(columns, ahead);
    if (count == 3) multiply<Values, W, 8, 3>(columns, ahead);
    if (count == 2) multiply<Values, W, 12, 2>(columns, ahead);
    if (count == 1) multiply<Values, W, 12, 1>(columns, ahead);
  }
};

// Those of the rows that come next.
inline void fetch_scales(const fips_matrix &a, int64_t row, int64_t rows) {
  if (!a.scale_group) return;
  const int64_t groups = groups_of_row(a);
  const uint8_t *from = a.group_scales + row * groups;
  for (int64_t i = 0; i < rows * groups; i += 64) _mm_prefetch(reinterpret_cast<const char *>(from + i), _MM_HINT_T0);
}

// What the units of some rows are multiplied by, from one unit of so many columns on, which is no more than a group has.
inline void unit_scales(const fips_matrix &a, int64_t row, int64_t rows, int64_t first, int64_t count, int64_t columns,
                        float *to) {
  const int shift = lowest_bit(uint64_t(a.scale_group / columns)); // units of a group: a power of 2
  const __m512i lanes = _mm512_set_epi32(15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0);
  const int64_t groups = groups_of_row(a);
  const uint8_t *from = a.group_scales + row * groups;
  for (int64_t r = 0; r < rows; ++r, from += groups, to += kUnits)
    for (int64_t i = 0; i < count; i += 16) {
      const int64_t unit = first + i, group = unit >> shift;
      const __m128i bytes = _mm_maskz_loadu_epi8(__mmask16(first_columns(min_of(groups - group, 16))), from + group);
      const __m512 scales = _mm512_cvtepi32_ps(_mm512_cvtepu8_epi32(bytes)); // behind the last group 0
      const __m512i places = _mm512_add_epi32(lanes, _mm512_set1_epi32(int(unit - (group << shift))));
      _mm512_storeu_ps(to + i, _mm512_permutexvar_ps(_mm512_srlv_epi32(places, _mm512_set1_epi32(shift)), scales));
    }
}

// How many rows are decoded before they are multiplied by so many columns of tokens, of which all are multiplied in
// pairs or not. As few as the first-level cache holds where the tokens come from the second each time anyway; coded rows
// are decoded several at a time, which costs more than it gains where each is used once. What is fetched ahead of long
// rows must not drive the tokens out of the second.
inline int64_t rows_of_part(const fips_matrix &a, int64_t columns, bool paired, int64_t steps) {
  const bool used_once = columns <= kFewColumns;
  if (paired && columns * steps * kTileBytes <= kNearBytes && !(used_once && a.memory)) return kPairRows;
  if (used_once) return kFewRows;
  return steps > kLongSteps ? kSomeRows : kPartRows;
}

// Rows [row0, row0 + rows) of at most kMostRows by token blocks [block0, block0 + blocks) of every plane.
template <class Reader, class Values>
void slab(const fips_matrix &a, const fips_call &c, const Reader &reader, const PackedTokens &p, int64_t row0,
          int64_t rows, int64_t block0, int64_t blocks, uint8_t *sums, uint8_t *weights) {
  const int64_t columns = blocks * p.planes, lower = columns * kTileBytes;
  Column all[kSlabColumns]; // those with few tokens last
  const bool half = block0 + blocks == p.blocks && (c.tokens - 1) % 16 < 8;
  const int64_t halves = half ? p.planes : 0, whole = columns - halves;
  for (int64_t b = 0, i = 0, j = whole; b < blocks; ++b)
    for (int plane = 0; plane < p.planes; ++plane) {
      Column &one = all[half && b + 1 == blocks ? j++ : i++];
      one = {p.tile(plane, block0 + b, 0), sums + (plane * blocks + b) * kTileBytes};
      if (is_scaled<Values>) {
        one.scales = p.tile_scales(block0 + b, 0);
        one.starts = p.starts(plane, block0 + b, 0);
      }
    }
  const int64_t most = kWords / 16, runs = (p.steps + most - 1) / most;
  const int64_t run_steps = round_up((p.steps + runs - 1) / runs, 4);
  Decoder<Reader, Values> decoder(a, reader, row0, rows, kRowBytes);
  const bool paired = is_scaled<Values> && whole % 2 == 0 && halves % 2 == 0;
  const int64_t part_rows = rows_of_part(a, columns, paired, p.steps);
  for (int64_t row = 0; row < rows; row += part_rows) {
    const int64_t next = min_of(row + part_rows, rows), then = min_of(next + part_rows, rows);
    fetch_scales(a, row0 + next, then - next);
    Ahead ahead(decoder.at(next), decoder.at(then), (next - row + kFewRows - 1) / kFewRows * p.steps);
    for (int64_t step = 0; step < p.steps; step += run_steps) {
      const int64_t steps = min_of(run_steps, p.steps - step);
      int32_t excess[kPartRows] = {};
      decoder.decode(row, next - row, step, steps, weights, rows);
      for (int64_t r = 0; r < next - row; ++r) excess[r] = excess_of<Values>(weights + r * kRowBytes, steps);
      float scales[is_scaled<Values> ? kPartRows * kUnits : 1];
      if (is_scaled<Values> && a.scale_group)
        unit_scales(a, row0 + row, next - row, step * p.units, steps * p.units, 64 / p.units, scales);
      const Part part{weights, excess, a.scale_group ? scales : nullptr, row, next - row, step, steps, lower, p.units};
      part.multiply<Values, 16>(all, whole, ahead);
      part.multiply<Values, 8>(all + whole, halves, ahead);
    }
  }
  finish_panel<Values>(a, c, p, sums, row0, rows, block0, blocks);
}

// Rows that a thread takes at a time, `most` but for the last of each thread, so that all have as many. Their outputs are
// whole cache lines, which no other thread writes.
struct Slabs {
  int64_t rows, most, full, last, count;
  Slabs(int64_t all, int threads, int64_t size)
      : rows(all), most(size), full(all / (size * threads) * threads),
        last(round_up((all - full * size + threads - 1) / threads, 32)),
        count(full + (last ? (all - full * size + last - 1) / last : 0)) {}
  int64_t first(int64_t i) const { return min_of(i < full ? i * most : full * most + (i - full) * last, rows); }
};

template <class Reader, class Values>
void multiply_slabs(const fips_matrix &a, const fips_call &c, const Reader &reader, const PackedTokens &shared,
                    bool alone) {
  if constexpr (Reader::contiguous) {
    const int64_t columns = shared.planes * shared.blocks;
    const int64_t per_pass = kSlabColumns / shared.planes, passes = (shared.blocks + per_pass - 1) / per_pass;
    // With few tokens the packed values of a part are fetched while the one before is multiplied, but for the first.
    const int64_t most = columns <= kSomeColumns ? 4 * kPartRows : 2 * kPartRows;
    const Slabs slabs(a.rows, c.threads, most);
    const int64_t tiles = most / 16 * min_of(per_pass, shared.blocks) * shared.planes;
    const PerThread<uint8_t> sums(Scratch::sums, tiles * kTileBytes, c.threads); // [16 rows][column][tile]
    const PerThread<uint8_t> weights(Scratch::weights, kPartRows * kRowBytes, c.threads);
#pragma omp parallel num_threads(c.threads)
    {
      const PackedTokens p = alone ? copy_of(shared, thread_number()) : shared;
      pack_tokens<Values>(a, c, p, alone);
#pragma omp for collapse(2) schedule(dynamic)
      for (int64_t pass = 0; pass < passes; ++pass)
        for (int64_t i = 0; i < slabs.count; ++i)
          slab<Reader, Values>(a, c, reader, p, slabs.first(i), slabs.first(i + 1) - slabs.first(i), pass * per_pass,
                               min_of(per_pass, p.blocks - pass * per_pass), sums.mine(), weights.mine());
    }
  }
}

template <class Values> bool dots_path(const fips_matrix &a, const fips_call &c) {
  // Lines that another core has read are slow to write, several times so where the cores share no cache: two threads
  // are faster when each packs everything, but for turned tokens, of which half come from the other as floats.
  const bool alone =
      c.threads <= kFewThreads && a.rotation <= 1 && shape_tokens<Values>(a, c, 0).nbytes() <= kOwnBytes;
  const PackedTokens p = place_tokens<Values>(a, c, is_scaled<Values> ? char(0x80) : 0, alone ? c.threads : 1);
  return with_reader(a, [&](const auto &reader) {
    multiply_slabs<std::decay_t<decltype(reader)>, Values>(a, c, reader, p, alone);
  });
}

bool dots_path(const fips_matrix &a, const fips_call &c) {
  if (a.format == FIPS_BLOCK_ROWS) return false; // values of a row do not lie together
  switch (a.value_type) {
  case FIPS_I8:
    if (a.scale_group || fixed_planes(c) == 1)
      return a.value_bits < 8 ? dots_path<Scaled<NarrowValues>>(a, c) : dots_path<Scaled<I8Values>>(a, c);
    return a.value_bits < 8 ? dots_path<NarrowValues>(a, c) : dots_path<I8Values>(a, c);
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
