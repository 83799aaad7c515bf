// Many tokens in 8 bits beside numbers of at most 8, of which one instruction multiplies 16 or 32 and adds some together,
// where it multiplies 8 floats. Rows are decoded a few at a time, as in row_blocks256.h.
#pragma once
#include "row_blocks256.h"
#include "full256.h"
#include "trellis256.h"

namespace {

constexpr int64_t kDigitRows = 24; // as words, with the tokens of a block, they fit into 32 KB

// Tokens as digits, 64 of which share a scale; `together` columns of a token fill a lane of 32 bits:
// [token block][cols / together][tokens of the block][together], and the scales [token block][cols / 64][tokens of the
// block]; zero where there is no column or no token. For every `unit` of columns `surplus` is what their sums begin with.
template <class Numbers> struct DigitTokens {
  typename Numbers::digit *digits;
  float *scales;
  int32_t *surplus;
  int64_t unit;
};

template <class Numbers, int BLOCK>
void lay_out_digits(const fips_matrix &a, const fips_call &c, const DigitTokens<Numbers> &to) {
  using Digit = typename Numbers::digit;
  constexpr int together = 4 / sizeof(Digit);
  const int64_t padded = round_up(a.cols, 64), blocks = (c.tokens + BLOCK - 1) / BLOCK;
  with_inputs(c, [&](auto values) {
    using Values = decltype(values);
    const auto *x = static_cast<const typename Values::type *>(c.x);
#pragma omp parallel for collapse(2) num_threads(c.threads) schedule(static)
    for (int64_t b = 0; b < blocks; ++b)
      for (int64_t k = 0; k < padded; k += 64) {
        alignas(32) Digit rows[BLOCK][64] = {};
        float *scales = to.scales + (b * padded + k) / 64 * BLOCK;
        for (int t = 0; t < BLOCK; ++t) {
          scales[t] = 0;
          if (b * BLOCK + t >= c.tokens) continue;
          alignas(32) float numbers[64];
          read_floats<Values>(x + (b * BLOCK + t) * c.x_stride + k, min_of(64, c.x_columns - k), 64, numbers);
          digits_of(numbers, 64, rows[t], scales + t);
        }
        auto *lanes = reinterpret_cast<int32_t *>(to.digits + (b * padded + k) * BLOCK);
        for (int p = 0; p < 64 / together; ++p)
#pragma GCC unroll 16
          for (int t = 0; t < BLOCK; ++t) std::memcpy(lanes + p * BLOCK + t, rows[t] + together * p, sizeof *lanes);
        if constexpr (Numbers::offset)
          for (int64_t u = 0; u < 64; u += to.unit)
            for (int t = 0; t < BLOCK; ++t) {
              int32_t sum = 0;
              for (int64_t i = u; i < u + to.unit; ++i) sum += rows[t][i];
              to.surplus[(b * padded + k + u) / to.unit * BLOCK + t] = -Numbers::offset * sum;
            }
      }
  });
}

// sums (R, 8 C tokens) += weights (R, lanes) x (lanes, 8 C tokens), a lane being what lies in 32 bits.
template <class Numbers, int R, int C>
FIPS_INLINE void add_lanes(const typename Numbers::number *weights, const typename Numbers::digit *x, int64_t lanes,
                           __m256i (&sums)[R][C]) {
#pragma GCC unroll 4
  for (int64_t p = 0; p < lanes; ++p) {
    __m256i xp[C];
#pragma GCC unroll 4
    for (int j = 0; j < C; ++j) {
      xp[j] = _mm256_load_si256(reinterpret_cast<const __m256i *>(x) + p * C + j);
      __asm__("" : "+x"(xp[j])); // read once
    }
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) {
      int32_t lane;
      std::memcpy(&lane, weights + r * kDecodedColumns + p * int64_t(sizeof lane / sizeof *weights), sizeof lane);
      const __m256i w = _mm256_set1_epi32(lane);
#pragma GCC unroll 4
      for (int j = 0; j < C; ++j) Numbers::add_products(sums[r][j], w, xp[j]);
    }
  }
}

// Numbers of at most 8 bits as words of 16, beside words.
struct Words {
  using number = int16_t;
  using digit = int16_t;
  static constexpr int offset = 0, at_once = 6; // rows
  static constexpr bool recalls = true; // codes that depend on those above, too

  struct Numbers {
    __m256i of[2];
  };
  template <class Codes> FIPS_INLINE static void read(const Codes &codes, const uint8_t *from, Numbers &to) {
    codes.read(from, to.of);
  }
  FIPS_INLINE static void store_bytes(const __m256i (&bytes)[2], int16_t *to) {
    auto *out = reinterpret_cast<__m256i *>(to);
#pragma GCC unroll 2
    for (int i = 0; i < 2; ++i) {
      _mm256_store_si256(out + 2 * i, _mm256_cvtepi8_epi16(_mm256_castsi256_si128(bytes[i])));
      _mm256_store_si256(out + 2 * i + 1, _mm256_cvtepi8_epi16(_mm256_extracti128_si256(bytes[i], 1)));
    }
  }
  FIPS_INLINE static void store_words(const __m256i (&words)[4], int16_t *to) {
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) _mm256_store_si256(reinterpret_cast<__m256i *>(to) + i, words[i]);
  }
  // Calls `body` with what reads the numbers of a matrix without a pattern, 64 at a time.
  template <class Body> static void with_codes(const fips_matrix &a, Body &&body) {
    switch (a.num_levels ? a.value_bits : a.value_bits + 8) {
    case 2: return body(Codes<2, true>(a));
    case 3: return body(Codes<3, true>(a));
    case 4: return body(Codes<4, true>(a));
    case 5: return body(Codes<5, true>(a));
    case 15: return body(Codes<7, false>(a));
    default: return body(WholeBytes(a));
    }
  }

  FIPS_INLINE static void add_products(__m256i &sum, __m256i w, __m256i x) {
    const __m256i products = _mm256_madd_epi16(w, x); // GCC itself multiplies early, for which it has no registers,
    __asm__("vpaddd %1, %0, %0" : "+x"(sum) : "x"(products)); // and copies sums
  }
  template <int R, int C>
  FIPS_INLINE static void add(const int16_t *weights, const int16_t *x, int64_t lanes, __m256i (&acc)[R][C]) {
    add_lanes<Words>(weights, x, lanes, acc);
  }
};

// Numbers as bytes that are `OFFSET` more, and so have no sign, beside bytes.
template <int OFFSET> struct Bytes {
  using number = uint8_t;
  using digit = int8_t;
  static constexpr int offset = OFFSET;

  struct Numbers {
    __m256i of[2];
  };
  FIPS_INLINE static void store_bytes(const __m256i (&bytes)[2], uint8_t *to) {
    _mm256_store_si256(reinterpret_cast<__m256i *>(to), bytes[0]);
    _mm256_store_si256(reinterpret_cast<__m256i *>(to) + 1, bytes[1]);
  }
  FIPS_INLINE static void store_words(const __m256i (&words)[4], uint8_t *to) {
    __m256i bytes[2];
#pragma GCC unroll 2
    for (int i = 0; i < 2; ++i) // packing takes turns between the halves of registers
      bytes[i] = _mm256_add_epi8(_mm256_permute4x64_epi64(_mm256_packs_epi16(words[2 * i], words[2 * i + 1]), 0xD8),
                                 _mm256_set1_epi8(char(OFFSET)));
    store_bytes(bytes, to);
  }
};

#if defined(FIPS_DOTS_OF_BYTES)
// Numbers of at most 8 bits, of which one instruction multiplies 32 and adds them up.
struct DotBytes : Bytes<kBias> {
  static constexpr int at_once = 6; // rows
  static constexpr bool recalls = true;

  template <class Codes> FIPS_INLINE static void read(const Codes &codes, const uint8_t *from, Numbers &to) {
    codes.read(from, to.of);
  }
  template <class Body> static void with_codes(const fips_matrix &a, Body &&body) {
    switch (a.value_bits) {
    case 2: return body(Codes<2, true>(a));
    case 3: return body(Codes<3, true>(a));
    case 4: return body(Codes<4, true>(a));
    case 5: return a.num_levels ? body(Codes<5, true>(a)) : body(Codes<5, false>(a));
    case 6: return body(Codes<6, false>(a));
    case 7: return body(Codes<7, false>(a));
    default: return body(WholeBytes(a));
    }
  }

  FIPS_INLINE static void add_products(__m256i &sum, __m256i w, __m256i x) { sum = add_dots(sum, w, x); }
  template <int R, int C>
  FIPS_INLINE static void add(const uint8_t *weights, const int8_t *x, int64_t lanes, __m256i (&acc)[R][C]) {
    add_lanes<DotBytes>(weights, x, lanes, acc);
  }
};
#endif

// Integers of `BITS` bits: `STEPS` sums of two products, each at most 2 (2^BITS - 1) 127, have room in words of 16 bits.
template <int BITS> struct UnsignedBytes : Bytes<1 << (BITS - 1)> {
  static_assert(BITS <= 6, "two products would not have room, or more bits cost nothing");
  static constexpr int at_once = 3; // rows: each has a sum more
  static constexpr bool recalls = false;
  static constexpr int64_t STEPS = 1 << (7 - BITS);

  template <class Codes, class Numbers> FIPS_INLINE static void read(const Codes &codes, const uint8_t *from, Numbers &to) {
    codes.read(from, to);
  }
  template <class Body> static void with_codes(const fips_matrix &a, Body &&body) { body(Codes<BITS, false>(a)); }

  FIPS_INLINE static void add_products(__m256i &sum, __m256i w, __m256i x) {
    const __m256i products = _mm256_maddubs_epi16(w, x);
    __asm__("vpaddw %1, %0, %0" : "+x"(sum) : "x"(products));
  }
  template <int R, int C>
  FIPS_INLINE static void add(const uint8_t *weights, const int8_t *x, int64_t lanes, __m256i (&acc)[R][C]) {
    constexpr int together = STEPS < 4 ? int(STEPS) : 4; // every unit of columns is a multiple
    const int64_t most = min_of(STEPS, lanes);
    for (int64_t first = 0; first < lanes; first += most) {
      __m256i sums[R][C];
#pragma GCC unroll 8
      for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
        for (int j = 0; j < C; ++j) sums[r][j] = _mm256_setzero_si256();
      for (int64_t s = 0; s < most; s += together, x += 32 * C * together, weights += 4 * together)
        add_lanes<UnsignedBytes>(weights, x, together, sums);
#pragma GCC unroll 8
      for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
        for (int j = 0; j < C; ++j)
          acc[r][j] = _mm256_add_epi32(acc[r][j], _mm256_madd_epi16(sums[r][j], _mm256_set1_epi16(1)));
    }
  }
};

FIPS_INLINE __m256i neighbours_exchanged(__m256i bytes) {
  const __m128i places = _mm_setr_epi8(1, 0, 3, 2, 5, 4, 7, 6, 9, 8, 11, 10, 13, 12, 15, 14);
  return _mm256_shuffle_epi8(bytes, _mm256_broadcastsi128_si256(places));
}

// 64 bytes as codes leave them, brought into the order of their columns.
template <Order ORDER> FIPS_INLINE void bring_in_order(__m256i (&bytes)[2]) {
  const __m256i one = bytes[0], two = bytes[1];
  if constexpr (ORDER == Order::pairs || ORDER == Order::twos) { // even columns, and odd ones
    const __m256i low = _mm256_unpacklo_epi8(one, two), high = _mm256_unpackhi_epi8(one, two);
    bytes[0] = _mm256_permute2x128_si256(low, high, 0x20), bytes[1] = _mm256_permute2x128_si256(low, high, 0x31);
  } else if constexpr (ORDER == Order::quarters) { // every fourth from the first on, from the second on, ...
    const __m256i even = _mm256_permute2x128_si256(one, two, 0x20), odd = _mm256_permute2x128_si256(one, two, 0x31);
    const __m256i low = _mm256_unpacklo_epi8(even, odd), high = _mm256_unpackhi_epi8(even, odd);
    const __m256i first = _mm256_permute2x128_si256(low, high, 0x20), second = _mm256_permute2x128_si256(low, high, 0x31);
    const __m256i a = _mm256_unpacklo_epi16(first, second), b = _mm256_unpackhi_epi16(first, second);
    bytes[0] = _mm256_permute2x128_si256(a, b, 0x20), bytes[1] = _mm256_permute2x128_si256(a, b, 0x31);
  } else if constexpr (ORDER == Order::turned) {
    const __m256i a = neighbours_exchanged(one), b = neighbours_exchanged(two);
    bytes[0] = _mm256_permute2x128_si256(a, b, 0x20), bytes[1] = _mm256_permute2x128_si256(a, b, 0x31);
  } else if constexpr (ORDER == Order::halves) {
    bytes[0] = _mm256_permute4x64_epi64(one, 0xD8), bytes[1] = _mm256_permute4x64_epi64(two, 0xD8);
  }
}

// Columns [k0, k1) of rows from `row0` on of a matrix that `reads_whole` knows. What follows in a row is fetched.
template <class Numbers>
void decode_whole(const fips_matrix &a, int64_t row0, int64_t rows, int64_t k0, int64_t k1, typename Numbers::number *to) {
  Numbers::with_codes(a, [&](const auto &codes) {
    using Codes = std::decay_t<decltype(codes)>;
    for (int64_t r = 0; r < rows; ++r) {
      const auto *from = static_cast<const uint8_t *>(a.values) + ((row0 + r) * a.cols + k0) / 64 * Codes::bytes;
      for (int64_t k = k0; k < k1; k += 64, from += Codes::bytes) {
        typename Numbers::Numbers numbers;
        _mm_prefetch(reinterpret_cast<const char *>(from) + kDecodedColumns / 64 * Codes::bytes, _MM_HINT_T0);
        alignas(32) uint8_t last[96];
        Numbers::read(codes, codes.within(from, last), numbers);
        bring_in_order<Codes::order>(numbers.of);
        Numbers::store_bytes(numbers.of, to + r * kDecodedColumns + k - k0);
      }
    }
  });
}

// The same of a matrix with a memory.
template <class Numbers, int BITS, int MEMORY>
void decode_recalled(const fips_matrix &a, int64_t row0, int64_t rows, int64_t k0, int64_t k1, typename Numbers::number *to) {
  constexpr int64_t bytes = Codes<BITS, true>::bytes;
  const Codes<BITS, true> codes(a);
  const Recall<MEMORY> recall(a);
  const int64_t row_bytes = a.cols / 64 * bytes;
  for (int64_t k = k0; k < k1; k += 64) {
    const auto *from = static_cast<const uint8_t *>(a.values) + row0 * row_bytes + k / 64 * bytes;
    __m256i above[MEMORY + 1][2]; // codes, of this row last
    const auto read = [&](const uint8_t *place, __m256i (&fields)[2]) {
      alignas(32) uint8_t last[96];
      Codes<BITS, true>::fields(codes.within(place, last), fields);
    };
#pragma GCC unroll 4
    for (int back = 1; back <= MEMORY; ++back)
      if (row0 >= back) read(from - back * row_bytes, above[MEMORY - back]);
    for (int64_t r = 0; r < rows; ++r) {
      const uint8_t *place = from + r * row_bytes;
      _mm_prefetch(reinterpret_cast<const char *>(place) + kDecodedColumns / 64 * bytes, _MM_HINT_T0);
      if ((row0 + r) % a.run == 0)
#pragma GCC unroll 4
        for (int back = 1; back <= MEMORY; ++back) above[MEMORY - back][0] = above[MEMORY - back][1] = _mm256_setzero_si256();
      read(place, above[MEMORY]);
      __m256i numbers[2];
#pragma GCC unroll 2
      for (int side = 0; side < 2; ++side)
        numbers[side] = recall.number([&](int at) { return above[at][side]; }, MEMORY);
      bring_in_order<Codes<BITS, true>::order>(numbers);
      Numbers::store_bytes(numbers, to + r * kDecodedColumns + k - k0);
#pragma GCC unroll 4
      for (int back = 0; back < MEMORY; ++back) above[back][0] = above[back + 1][0], above[back][1] = above[back + 1][1];
    }
  }
}
template <class Numbers>
void decode_recalled(const fips_matrix &a, int64_t row0, int64_t rows, int64_t k0, int64_t k1, typename Numbers::number *to) {
  switch (a.value_bits) {
  case 2: return decode_recalled<Numbers, 2, 3>(a, row0, rows, k0, k1, to);
  case 3: return decode_recalled<Numbers, 3, 2>(a, row0, rows, k0, k1, to);
  default: return decode_recalled<Numbers, 4, 2>(a, row0, rows, k0, k1, to);
  }
}

// The same of any matrix, zero where nothing is kept; `next` are where the values of the rows go on.
template <class Numbers, class Reader, class Cursor>
void decode_digits(const fips_matrix &a, const Reader &reader, int64_t row0, int64_t rows, int64_t k0, int64_t k1, Cursor *next,
                   typename Numbers::number *to) {
  if constexpr (Numbers::recalls)
    if (a.memory) return decode_recalled<Numbers>(a, row0, rows, k0, k1, to);
  if (reads_whole(a)) return decode_whole<Numbers>(a, row0, rows, k0, k1, to);
  for (int64_t r = 0; r < rows; ++r)
    for (int64_t k = k0; k < k1; k += 64) {
      __m256i whole[8], words[4];
      read_columns(reader, row0 + r, k, next[r], [&](int64_t j, __m256 w) { whole[j / 8] = _mm256_cvtps_epi32(w); });
#pragma GCC unroll 4
      for (int i = 0; i < 4; ++i)
        words[i] = _mm256_permute4x64_epi64(_mm256_packs_epi32(whole[2 * i], whole[2 * i + 1]), 0xD8);
      Numbers::store_words(words, to + r * kDecodedColumns + k - k0);
    }
}

// sums (R, 8 C tokens) += weights (R, unit) x (unit, 8 C tokens), times the scales of both.
template <class Numbers, int R, int C>
FIPS_INLINE void add_digits(const typename Numbers::number *weights, const typename Numbers::digit *x, int64_t unit,
                            const int32_t *surplus, const float *own, int64_t own_stride, const float *scales, float *sums,
                            int64_t stride) {
  __m256i acc[R][C];
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
    for (int j = 0; j < C; ++j)
      acc[r][j] = Numbers::offset ? _mm256_load_si256(reinterpret_cast<const __m256i *>(surplus) + j) : _mm256_setzero_si256();
  Numbers::template add<R, C>(weights, x, unit * int64_t(sizeof *x) / 4, acc);
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
    for (int j = 0; j < C; ++j) {
      float *sum = sums + r * stride + 8 * j;
      const __m256 scale = _mm256_mul_ps(_mm256_load_ps(scales + 8 * j), _mm256_set1_ps(own[r * own_stride]));
      _mm256_store_ps(sum, _mm256_fmadd_ps(_mm256_cvtepi32_ps(acc[r][j]), scale, _mm256_load_ps(sum)));
    }
}

// What a thread works with: decoded rows, their scales per `unit` columns, and sums.
template <class Numbers> struct DigitBlock {
  typename Numbers::number *weights;
  float *own, *sums;
};

template <class Numbers, int R, int C, class Cursor, class Reader>
void digit_chunk(const fips_matrix &a, const fips_call &c, const Reader &reader, int64_t row0, int64_t t0,
                 const DigitTokens<Numbers> &x, const DigitBlock<Numbers> &work) {
  constexpr int64_t block = 8 * C;
  const int64_t padded = round_up(a.cols, 64), unit = x.unit, units = kDecodedColumns / unit;
  const int64_t rows = min_of(kDigitRows, a.rows - row0), tokens = min_of(kTokensPerPass, c.tokens - t0);
  const int64_t stride = round_up(tokens, block);
  std::memset(work.sums, 0, size_t(kDigitRows * stride) * sizeof *work.sums);
  Cursor next[kDigitRows];
  for (int64_t r = 0; r < rows; ++r) next[r] = Cursor(a, reader.start(row0 + r));
  for (int64_t k0 = 0; k0 < padded; k0 += kDecodedColumns) {
    const int64_t k1 = min_of(k0 + kDecodedColumns, padded);
    decode_digits<Numbers>(a, reader, row0, rows, k0, k1, next, work.weights);
    for (int64_t r = 0; r < rows; ++r) {
      const RowGroups groups = a.scale_group ? RowGroups(a, row0 + r) : RowGroups();
      for (int64_t k = k0; k < k1; k += unit) work.own[r * units + (k - k0) / unit] = a.scale_group ? groups.at(k) : 1.0f;
    }
    for (int64_t t = 0; t < tokens; t += block) {
      const auto *xt = x.digits + (t0 + t) * padded;
      const float *scales = x.scales + (t0 + t) * (padded / 64);
      const int32_t *surplus = x.surplus + (t0 + t) * (padded / unit);
      for (int64_t r = 0; r < rows; r += R)
        for (int64_t k = k0; k < k1; k += unit)
          add_digits<Numbers, R, C>(work.weights + r * kDecodedColumns + k - k0, xt + k * block, unit,
                                    surplus + k / unit * block, work.own + r * units + (k - k0) / unit, units,
                                    scales + k / 64 * block, work.sums + r * stride + t, stride);
    }
  }
  store_block<kDigitRows>(a, c, row0, rows, t0, tokens, work.sums, stride);
}

// R rows by 8 C tokens fill the registers of the machine.
template <class Numbers, int R, int C> bool digit_blocks_path(const fips_matrix &a, const fips_call &c) {
  constexpr int64_t block = 8 * C, most_units = kDecodedColumns / 16;
  static_assert(kDigitRows % R == 0 && kTokensPerPass % block == 0, "blocks do not fill their buffers");
  const int64_t padded = round_up(a.cols, 64), tokens = round_up(c.tokens, block);
  const int64_t unit = a.scale_group ? min_of(a.scale_group, 64) : 64;
  const DigitTokens<Numbers> x{scratch<typename Numbers::digit>(Scratch::tokens, tokens * padded),
                               scratch<float>(Scratch::scales, tokens * (padded / 64)),
                               scratch<int32_t>(Scratch::surplus, Numbers::offset ? tokens * (padded / unit) : 0), unit};
  const int64_t most = round_up(min_of(kTokensPerPass, c.tokens), block);
  const PerThread<float> sums(Scratch::sums, kDigitRows * (most + most_units), c.threads);
  const PerThread<typename Numbers::number> weights(Scratch::weights, kDigitRows * kDecodedColumns, c.threads);
  lay_out_digits<Numbers, block>(a, c, x);
  const int64_t chunks = (a.rows + kDigitRows - 1) / kDigitRows;
  const int64_t passes = (c.tokens + kTokensPerPass - 1) / kTokensPerPass;
  return with_cursor(a, [&](const auto &reader, auto cursor) {
    if constexpr (reads_integers<decltype(cursor)>) {
#pragma omp parallel for num_threads(c.threads) schedule(dynamic) collapse(2)
      for (int64_t pass = 0; pass < passes; ++pass)
        for (int64_t i = 0; i < chunks; ++i) {
          const DigitBlock<Numbers> work{weights.mine(), sums.mine() + kDigitRows * most, sums.mine()};
          digit_chunk<Numbers, R, C, decltype(cursor)>(a, c, reader, i * kDigitRows, pass * kTokensPerPass, x, work);
        }
    }
  });
}

template <class Numbers> bool digit_blocks_path(const fips_matrix &a, const fips_call &c) {
  if (c.tokens <= 8) return digit_blocks_path<Numbers, 6, 1>(a, c);
  return digit_blocks_path<Numbers, Numbers::at_once, 2>(a, c);
}

} // namespace
