// Few tokens in 8 bits beside integer values, 128 columns at a step: every other lane of a register, of 4 columns, is of
// one block of 64 and the lanes between of the next, so that both blocks' sums become floats together, and are multiplied
// by two factors side by side in memory that one load spreads over a register.
//
// Everything that a step reads of the tokens lies together: their digits, and their factors of a row.
#pragma once
#include "digits512.h"

namespace {

// In which order the columns of a step lie in its two registers of digits.
enum class PairOrder { blocks_in_turn, even_and_odd };

struct LaneTables {
  alignas(64) int32_t turn[2][16], halves[16]; // of the lanes of two registers, and of the halves of one
  constexpr LaneTables() : turn(), halves() {
    for (int i = 0; i < 16; ++i) {
      for (int part = 0; part < 2; ++part) turn[part][i] = 8 * part + i / 2 + i % 2 * 16;
      halves[i] = i / 2 + i % 2 * 8;
    }
  }
};
constexpr LaneTables lane_tables;

// The lanes of two blocks of 64 columns in turn: those of their first and of their second 32.
template <int PART> FIPS_INLINE __m512i in_turn(__m512i first, __m512i second) {
  return _mm512_permutex2var_epi32(first, _mm512_load_si512(lane_tables.turn[PART]), second);
}
FIPS_INLINE __m512i halves_in_turn(__m512i both) {
  return _mm512_permutexvar_epi32(_mm512_load_si512(lane_tables.halves), both);
}

template <int T> constexpr int kSlots = T <= 2 ? T : T <= 4 ? 4 : 8; // places for the factors of T tokens

// T tokens: of every 128 columns the digits of one after another, and two factors of each.
template <int T> struct PairTokens {
  int64_t pairs;
  const uint8_t *digits;
  const float *factors;
  DigitToken tokens[T]; // as they were prepared
};

template <PairOrder ORDER> FIPS_INLINE void arrange(__m512i low, __m512i high, uint8_t *to) {
  if constexpr (ORDER == PairOrder::blocks_in_turn) {
    _mm512_store_si512(to, in_turn<0>(low, high));
    _mm512_store_si512(to + 64, in_turn<1>(low, high));
  } else {
    const auto joined = [&](__m256i left, __m256i right) {
      return halves_in_turn(_mm512_inserti64x4(_mm512_castsi256_si512(left), right, 1));
    };
    const auto odd = [&](__m512i bytes) { return _mm512_cvtepi16_epi8(_mm512_srli_epi16(bytes, 8)); };
    _mm512_store_si512(to, joined(_mm512_cvtepi16_epi8(low), _mm512_cvtepi16_epi8(high)));
    _mm512_store_si512(to + 64, joined(odd(low), odd(high)));
  }
}

template <PairOrder ORDER, int T> PairTokens<T> pair_tokens(const fips_call &c, const DigitLayout &layout) {
  const int64_t nbytes = round_up(layout.nbytes(), 64), blocks = round_up(layout.blocks, 16);
  auto *x = scratch<uint8_t>(Scratch::tokens, T * (nbytes + layout.padded) + kSlots<T> * blocks * 4);
  auto *digits = x + T * nbytes;
  auto *factors = reinterpret_cast<float *>(digits + T * layout.padded);
  PairTokens<T> out{layout.padded / 128, digits, factors, {}};
  std::memset(factors, 0, size_t(kSlots<T> * blocks) * 4);
  for (int t = 0; t < T; ++t) {
    prepare_digits(c, t, layout, x + t * nbytes);
    const DigitToken token = out.tokens[t] = layout.place(x + t * nbytes);
    for (int64_t pair = 0; pair < out.pairs; ++pair) {
      const uint8_t *from = token.digits + 128 * pair;
      arrange<ORDER>(_mm512_load_si512(from), _mm512_load_si512(from + 64), digits + 128 * (T * pair + t));
      std::memcpy(factors + 2 * (kSlots<T> * pair + t), token.scales + 2 * pair, 8);
    }
  }
  return out;
}

// The products of 128 columns with T tokens.
template <int T>
FIPS_INLINE void add_pair(__m512i first, __m512i second, const uint8_t *digits, const float *factors,
                          __m512 (&sums)[T]) {
#pragma GCC unroll 8
  for (int t = 0; t < T; ++t) {
    __m512i dot = _mm512_dpbusd_epi32(_mm512_setzero_si512(), first, _mm512_load_si512(digits + 128 * t));
    dot = _mm512_dpbusd_epi32(dot, second, _mm512_load_si512(digits + 128 * t + 64));
    double both;
    std::memcpy(&both, factors + 2 * t, 8);
    sums[t] = _mm512_fmadd_ps(_mm512_cvtepi32_ps(dot), _mm512_castpd_ps(_mm512_set1_pd(both)), sums[t]);
  }
}

// For every 16 factors of 8 pairs of blocks which of 16 scales they are multiplied by: SLOTS times those of a pair.
template <int SLOTS> struct ScalePlaces {
  alignas(64) int32_t at[SLOTS][16];
  constexpr ScalePlaces() : at() {
    for (int line = 0; line < SLOTS; ++line)
      for (int i = 0; i < 16; ++i) at[line][i] = (8 * line + i / 2) / SLOTS * 2 + i % 2;
  }
};
template <int SLOTS> constexpr ScalePlaces<SLOTS> scale_places;

// 16 scales of neighbouring blocks of a row by the factors of the tokens there.
template <int T> FIPS_INLINE void multiply_factors(__m512 scales, const float *factors, float *to) {
  constexpr int slots = kSlots<T>;
#pragma GCC unroll 8
  for (int line = 0; line < slots; ++line) {
    const __m512i places = _mm512_load_si512(scale_places<slots>.at[line]);
    const __m512 spread = slots == 1 ? scales : _mm512_permutexvar_ps(places, scales);
    _mm512_storeu_ps(to + 16 * line, _mm512_mul_ps(spread, _mm512_loadu_ps(factors + 16 * line)));
  }
}

// The factors of all blocks of a row with group scales, and what the row adds to the sums of the tokens.
template <int T>
FIPS_INLINE void scale_pairs(const fips_matrix &a, int64_t row, const DigitLayout &layout, const PairTokens<T> &x,
                             float *factors, float (&added)[T]) {
  const uint8_t *from = a.group_scales + row * layout.groups;
  const __m512i low = _mm512_set_epi32(7, 7, 6, 6, 5, 5, 4, 4, 3, 3, 2, 2, 1, 1, 0, 0);
  const __m512i high = _mm512_add_epi32(low, _mm512_set1_epi32(8));
  __m512 sums[T] = {};
  for (int64_t g = 0; g < layout.groups; g += 16) {
    const __m128i bytes = _mm_maskz_loadu_epi8(columns_there(layout.groups - g), from + g);
    const __m512 scales = _mm512_cvtepi32_ps(_mm512_cvtepu8_epi32(bytes));
#pragma GCC unroll 8
    for (int t = 0; t < T; ++t) sums[t] = _mm512_fmadd_ps(scales, _mm512_loadu_ps(x.tokens[t].excess + g), sums[t]);
    const auto multiply = [&](__m512 spread, int64_t block) {
      if (block < layout.blocks) multiply_factors<T>(spread, x.factors + kSlots<T> * block, factors + kSlots<T> * block);
    };
    if (layout.group == 64) {
      multiply(scales, g);
    } else { // 128 columns, two blocks
      multiply(_mm512_permutexvar_ps(low, scales), 2 * g);
      multiply(_mm512_permutexvar_ps(high, scales), 2 * g + 16);
    }
  }
#pragma GCC unroll 8
  for (int t = 0; t < T; ++t) added[t] = _mm512_reduce_add_ps(sums[t]);
}

// What codes of 4 bits add to the place of those below them, linear in their bits: as affine maps of bits.
struct HalfMaps {
  uint64_t first = 0, second = 0; // of the lower half of a byte, the upper one
};

inline HalfMaps half_maps(const uint8_t *added) { // by what each of the 16 codes adds
  HalfMaps maps;
  for (int out = 0; out < 6; ++out)
    for (int in = 0; in < 4; ++in) {
      const uint64_t bit = added[1 << in] >> out & 1;
      maps.first |= bit << (8 * (7 - out) + in), maps.second |= bit << (8 * (7 - out) + in + 4);
    }
  return maps;
}

inline __m512i lifted_numbers(const fips_matrix &a) { // of all codes with 128 added, whatever lies above the place
  if (a.memory) return lifted(repeated(a.levels, a.num_levels));
  if (a.num_levels) return lifted(numbers_of_levels(a));
  alignas(64) int8_t numbers[64];
  for (int i = 0; i < 64; ++i) numbers[i] = int8_t(number_of(a, i & ((1 << a.value_bits) - 1)));
  return lifted(_mm512_load_si512(numbers));
}

// Codes of 4 bits, two rows at a time and as they lie in the stream: a permutation of bytes looks up the number of
// either half of a byte. Digits lie as these halves do: of 128 columns first those with even numbers, blocks in turn.
template <int MEMORY, int T> struct HalfByteRows : NarrowStream {
  static constexpr int rows = 2; // more are slower where they come from memory
  static constexpr PairOrder order = PairOrder::even_and_odd;
  static constexpr int64_t ahead = 1024; // bytes behind the last of these rows: they are fetched in the order they lie
  int64_t row_bytes;
  __m512i table;
  HalfMaps maps[2];
  explicit HalfByteRows(const fips_matrix &a)
      : NarrowStream(a), row_bytes(a.cols / 2), table(lifted_numbers(a)) {
    for (int back = 0; back < MEMORY; ++back) maps[back] = half_maps(a.history + 16 * back);
  }

  void multiply(const fips_matrix &a, const fips_call &c, int64_t row, const PairTokens<T> &x,
                const float *const (&factors)[rows], const float (*added)[T]) const {
    const int left = int(min_of(rows, a.rows - row));
    int64_t from[MEMORY + rows];
    starts_of_rows<MEMORY, rows>(row, left, row_bytes, from);
    with_loads(from[MEMORY + left - 1] + row_bytes - 32,
               [&](const auto &load) { multiply(a, c, row, from, x, factors, added, load); });
  }

  template <class Load>
  FIPS_INLINE void multiply(const fips_matrix &a, const fips_call &c, int64_t row, const int64_t (&from)[MEMORY + rows],
                            const PairTokens<T> &x, const float *const (&factors)[rows], const float (*added)[T],
                            const Load &load) const {
    constexpr int R = rows, xor_three = 0x96, and_then_xor = 0x6A;
    const uint64_t there = MEMORY && row % a.run ? ~uint64_t(0) : 0; // at the beginning of a run nothing is above
    HalfMaps adds[2]; // by the rows above the first of these
    for (int back = 0; back < MEMORY; ++back) adds[back] = {maps[back].first & there, maps[back].second & there};
    const auto map = [&](int back, int r, uint64_t HalfMaps::*half) {
      return _mm512_set1_epi64(int64_t((back <= r ? maps : adds)[back - 1].*half));
    };
    const __m512i low = _mm512_set1_epi8(15), upper = _mm512_set1_epi64(0x1020408000000000); // map: upper half to lower
    const char *next = reinterpret_cast<const char *>(stream) + from[MEMORY] + (R - 1) * row_bytes + ahead;
    const uint8_t *digits = x.digits;
    __m512 sums[R][T] = {};
    for (int64_t pair = 0, at = 0; pair < x.pairs; ++pair, at += 64, digits += 128 * T) {
      __m512i codes[MEMORY + R];
#pragma GCC unroll 8
      for (int r = 0; r < MEMORY + R; ++r) {
        if (r >= MEMORY) _mm_prefetch(next + R * at + 64 * (r - MEMORY), _MM_HINT_T0);
        codes[r] = halves_in_turn(load(from[r] + at));
      }
#pragma GCC unroll 4
      for (int r = 0; r < R; ++r) {
        const __m512i own = codes[MEMORY + r];
        __m512i even = own, odd = _mm512_srli_epi16(own, 4);
        if constexpr (MEMORY == 2) {
          const auto above = [&](int back, uint64_t HalfMaps::*half) {
            return _mm512_gf2p8affine_epi64_epi8(codes[r + 2 - back], map(back, r, half), 0);
          };
          const __m512i first = _mm512_xor_si512(above(1, &HalfMaps::first), above(2, &HalfMaps::first));
          even = _mm512_ternarylogic_epi64(own, low, first, and_then_xor);
          odd = _mm512_ternarylogic_epi64(_mm512_gf2p8affine_epi64_epi8(own, upper, 0), above(1, &HalfMaps::second),
                                          above(2, &HalfMaps::second), xor_three);
        }
        add_pair<T>(_mm512_permutexvar_epi8(even, table), _mm512_permutexvar_epi8(odd, table), digits,
                    factors[r] + 2 * kSlots<T> * pair, sums[r]);
      }
    }
    store_sums<R, T>(a, c, row, int(min_of(R, a.rows - row)), sums, added);
  }
};

// Codes of 2 to 5 bits, some rows at a time and 128 columns in two steps: a register holds the codes of 32 columns and of
// those 64 further on, 4 of one block of digits and 4 of the next in turn, and the sums of all 128 become floats
// together. Digits lie in the same order. A permutation of bytes looks up every number, whatever lies above the bits of
// its code.
template <int ROWS, int T> struct FarFours : NarrowStream {
  static constexpr int rows = ROWS;
  static constexpr PairOrder order = PairOrder::blocks_in_turn;
  int64_t row_bytes, half, step; // bytes of a row, of 32 codes, of 128
  __m512i far, shifts, table;
  explicit FarFours(const fips_matrix &a)
      : NarrowStream(a), row_bytes(a.cols / 8 * a.value_bits), half(4 * a.value_bits), step(16 * a.value_bits),
        table(lifted_numbers(a)) {
    alignas(64) uint8_t at[64], bit[64];
    for (int i = 0; i < 64; ++i) { // 4 codes lie in 4 bytes from that on in which the first of them begins
      const int64_t first = i / 8 * 4 * a.value_bits, block = i / 4 % 2;
      at[i] = uint8_t(first / 8 + block * 8 * a.value_bits + i % 4);
      bit[i] = uint8_t(first % 8 + block * 32 + i % 4 * a.value_bits);
    }
    far = _mm512_load_si512(at), shifts = _mm512_load_si512(bit);
  }

  void multiply(const fips_matrix &a, const fips_call &c, int64_t row, const PairTokens<T> &x,
                const float *const (&factors)[rows], const float (*added)[T]) const {
    with_loads((row + rows) * row_bytes + half,
               [&](const auto &load) { multiply(a, c, row, x, factors, added, load); });
  }

  template <class Load>
  FIPS_INLINE void multiply(const fips_matrix &a, const fips_call &c, int64_t row, const PairTokens<T> &x,
                            const float *const (&factors)[rows], const float (*added)[T], const Load &load) const {
    constexpr int R = rows;
    const int left = int(min_of(R, a.rows - row));
    const int64_t from = row * row_bytes;
    const char *next = reinterpret_cast<const char *>(stream) + from + R * row_bytes;
    const uint8_t *digits = x.digits;
    __m512 sums[R][T] = {};
    for (int64_t pair = 0, at = from; pair < x.pairs; ++pair, at += step, next += R * step, digits += 128 * T) {
      for (int64_t line = 0; line < R * step; line += 64) _mm_prefetch(next + line, _MM_HINT_T0);
#pragma GCC unroll 4
      for (int r = 0; r < R; ++r) {
        const int64_t own = at + min_of(r, left - 1) * row_bytes;
        const auto weights = [&](int64_t place) {
          const __m512i fields = _mm512_multishift_epi64_epi8(shifts, _mm512_permutexvar_epi8(far, load(place)));
          return _mm512_permutexvar_epi8(fields, table);
        };
        add_pair<T>(weights(own), weights(own + half), digits, factors[r] + 2 * kSlots<T> * pair, sums[r]);
      }
    }
    store_sums<R, T>(a, c, row, left, sums, added);
  }
};

// 64 numbers of 6 or 7 bits, or of 8.
struct WideStream : NarrowStream {
  __m512i shifts;
  explicit WideStream(const fips_matrix &a) : NarrowStream(a), shifts(_mm512_load_si512(shifts_of(a)[0])) {}
  FIPS_INLINE __m512i lifted_at(int64_t at) const { return lifted_integers(at, shifts); }
};
struct ByteStream {
  const uint8_t *stream;
  explicit ByteStream(const fips_matrix &a) : stream(static_cast<const uint8_t *>(a.values)) {}
  FIPS_INLINE __m512i lifted_at(int64_t at) const { return lifted(_mm512_loadu_si512(stream + at)); }
};

// Some rows at a time and 128 columns at a step, whose sums become floats together as in the classes above.
template <class Stream, int ROWS, int T> struct WholeRows : Stream {
  static constexpr int rows = ROWS;
  static constexpr PairOrder order = PairOrder::blocks_in_turn;
  int64_t row_bytes, step; // bytes of a row and of 64 columns
  explicit WholeRows(const fips_matrix &a)
      : Stream(a), row_bytes(a.cols / 8 * a.value_bits), step(8 * a.value_bits) {}

  void multiply(const fips_matrix &a, const fips_call &c, int64_t row, const PairTokens<T> &x,
                const float *const (&factors)[rows], const float (*added)[T]) const {
    constexpr int R = rows;
    const int left = int(min_of(R, a.rows - row));
    const int64_t from = row * row_bytes;
    const char *next = reinterpret_cast<const char *>(this->stream) + from + R * row_bytes;
    const uint8_t *digits = x.digits;
    __m512 sums[R][T] = {};
    for (int64_t pair = 0, at = from; pair < x.pairs; ++pair, at += 2 * step, digits += 128 * T) {
#pragma GCC unroll 4
      for (int r = 0; r < R; ++r, next += 2 * step) {
        _mm_prefetch(next, _MM_HINT_T0);
        _mm_prefetch(next + 64, _MM_HINT_T0);
        const int64_t own = at + min_of(r, left - 1) * row_bytes;
        const __m512i low = this->lifted_at(own);
        const __m512i high = 128 * pair + 64 < a.cols ? this->lifted_at(own + step) : low; // beside digits of 0
        add_pair<T>(in_turn<0>(low, high), in_turn<1>(low, high), digits, factors[r] + 2 * kSlots<T> * pair, sums[r]);
      }
    }
    store_sums<R, T>(a, c, row, left, sums, added, a.value_bits == 8 ? 1.0f : NarrowStream::unit(a));
  }
};

template <class Rows, int T> bool pairs_path(const fips_matrix &a, const fips_call &c) {
  constexpr int R = Rows::rows;
  const DigitLayout layout(a);
  const PairTokens<T> x = pair_tokens<Rows::order, T>(c, layout);
  const int64_t stride = kSlots<T> * (round_up(layout.blocks, 16) + 16); // rows beside each other in other cache sets
  const PerThread<float> products(Scratch::sums, a.scale_group ? R * stride : 1, c.threads);
  const Rows how(a);
#pragma omp parallel num_threads(c.threads)
  {
    float added[R][T], *mine = products.mine();
    const float *factors[R];
    for (int r = 0; r < R; ++r) {
      factors[r] = a.scale_group ? mine + r * stride : x.factors;
      for (int t = 0; t < T; ++t) added[r][t] = x.tokens[t].excess[0];
    }
#pragma omp for schedule(static)
    for (int64_t row = c.first_row; row < c.end_row; row += R) {
      for (int r = 0; a.scale_group && r < R && row + r < a.rows; ++r)
        scale_pairs<T>(a, row + r, layout, x, mine + r * stride, added[r]);
      how.multiply(a, c, row, x, factors, added);
    }
  }
  return true;
}

// As many rows at a time as are fastest from memory, by how far they lie apart.
template <template <int, int> class Rows, int NEAR, int FAR, int T>
bool pairs_path(const fips_matrix &a, const fips_call &c) {
  return a.cols <= 4096 ? pairs_path<Rows<NEAR, T>, T>(a, c) : pairs_path<Rows<FAR, T>, T>(a, c);
}

template <int ROWS, int T> using RowsOfBytes = WholeRows<ByteStream, ROWS, T>;
template <int ROWS, int T> using WideRows = WholeRows<WideStream, ROWS, T>;

// Of a matrix that `takes_pairs`: with a memory it has codes of 4 bits.
template <int T> bool pairs_path(const fips_matrix &a, const fips_call &c) {
  if (a.memory) return pairs_path<HalfByteRows<2, T>, T>(a, c);
  if (a.value_bits == 4) return pairs_path<HalfByteRows<0, T>, T>(a, c);
  if (a.value_bits == 8) return pairs_path<RowsOfBytes, 2, (T > 4 ? 2 : 1), T>(a, c);
  if (a.value_bits > 5) // half a step would not lie in one register
    return pairs_path<WideRows, 2, (T > 4 ? 2 : 1), T>(a, c);
  return pairs_path<FarFours, (T > 4 ? 2 : 4), 2, T>(a, c); // all sums in registers
}

} // namespace
