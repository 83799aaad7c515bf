// Attention of one token to those before it, with AVX2 with FMA, or with NEON. Keys and values are read once for the
// queries that share them, up to `kQueries` of them, some keys at a time, which threads share.
#include <cmath>

#include "exponential256.h"
#include "paths.h"
#include "values256.h"

namespace {

constexpr int64_t kKeys = 128; // of a piece: with their values of 64 numbers 32 KB
constexpr int kQueries = 4;
constexpr int64_t kHead = 8; // floats before the sums of a piece: its largest score, and the sum of its weights
constexpr int64_t kAlone = 1 << 15; // numbers of keys up to which one thread takes no longer than several

inline float largest(__m256 v) {
  alignas(32) float lanes[8];
  _mm256_store_ps(lanes, v);
  float most = lanes[0];
  for (float lane : lanes) most = lane > most ? lane : most;
  return most;
}

// Keys and values that lie one behind the other, of some tokens, beside queries as floats.
template <class Values> struct Piece {
  const typename Values::type *keys, *values;
  int64_t key_stride, value_stride, count, size;
  const float *queries;
};

// Scores of Q queries, and what they become with the largest of them taken off before the exponential.
template <class Values, int Q> void weigh(const Piece<Values> &piece, float (&weights)[Q][kKeys], float *to, int64_t stride) {
  for (int64_t l = 0; l < piece.count; ++l) {
    __m256 acc[Q];
#pragma GCC unroll 4
    for (int q = 0; q < Q; ++q) acc[q] = _mm256_setzero_ps();
    for (int64_t d = 0; d < piece.size; d += 8) {
      const __m256 key = read8<Values>(piece.keys + l * piece.key_stride + d);
#pragma GCC unroll 4
      for (int q = 0; q < Q; ++q) acc[q] = _mm256_fmadd_ps(key, _mm256_load_ps(piece.queries + q * piece.size + d), acc[q]);
    }
#pragma GCC unroll 4
    for (int q = 0; q < Q; ++q) weights[q][l] = total(acc[q]);
  }
  const int64_t padded = round_up(piece.count, 8);
  for (int q = 0; q < Q; ++q) {
    for (int64_t l = piece.count; l < padded; ++l) weights[q][l] = -3e38f;
    __m256 most = _mm256_set1_ps(-3e38f), sum = _mm256_setzero_ps();
    for (int64_t l = 0; l < padded; l += 8) most = _mm256_max_ps(_mm256_load_ps(weights[q] + l), most);
    const float top = largest(most);
    for (int64_t l = 0; l < padded; l += 8) {
      const __m256 weight = exponential(_mm256_sub_ps(_mm256_load_ps(weights[q] + l), _mm256_set1_ps(top)));
      _mm256_store_ps(weights[q] + l, weight);
      sum = _mm256_fmadd_ps(weight, _mm256_set1_ps(1), sum);
    }
    to[q * stride] = top, to[q * stride + 1] = total(sum);
  }
}

// Sums of values times weights, 8 C numbers of each from `d` on.
template <class Values, int Q, int C>
FIPS_INLINE void add_values(const Piece<Values> &piece, const float (&weights)[Q][kKeys], int64_t d, float *to, int64_t stride) {
  __m256 acc[Q][C];
#pragma GCC unroll 4
  for (int q = 0; q < Q; ++q)
#pragma GCC unroll 2
    for (int i = 0; i < C; ++i) acc[q][i] = _mm256_setzero_ps();
  for (int64_t l = 0; l < piece.count; ++l) {
    __m256 value[C];
#pragma GCC unroll 2
    for (int i = 0; i < C; ++i) value[i] = read8<Values>(piece.values + l * piece.value_stride + d + 8 * i);
#pragma GCC unroll 4
    for (int q = 0; q < Q; ++q) {
      const __m256 weight = _mm256_set1_ps(weights[q][l]);
#pragma GCC unroll 2
      for (int i = 0; i < C; ++i) acc[q][i] = _mm256_fmadd_ps(weight, value[i], acc[q][i]);
    }
  }
#pragma GCC unroll 4
  for (int q = 0; q < Q; ++q)
#pragma GCC unroll 2
    for (int i = 0; i < C; ++i) _mm256_store_ps(to + q * stride + kHead + d + 8 * i, acc[q][i]);
}

template <class Values, int Q> void attend_piece(const Piece<Values> &piece, float *to, int64_t stride) {
  alignas(32) float weights[Q][kKeys];
  weigh<Values, Q>(piece, weights, to, stride);
  int64_t d = 0;
  for (; d + 16 <= piece.size; d += 16) add_values<Values, Q, 2>(piece, weights, d, to, stride);
  if (d < piece.size) add_values<Values, Q, 1>(piece, weights, d, to, stride);
}

// What the pieces of one query come to, in place of the first of them.
void merge_pieces(float *first, int64_t pieces, int64_t apart, int64_t size) {
  float top = first[0];
  for (int64_t p = 1; p < pieces; ++p) top = first[p * apart] > top ? first[p * apart] : top;
  float all = 0;
  for (int64_t p = 0; p < pieces; ++p) {
    float *one = first + p * apart;
    const float by = std::exp(one[0] - top);
    all += by * one[1];
    for (int64_t d = 0; d < size; ++d) one[kHead + d] *= by;
    if (p)
      for (int64_t d = 0; d < size; ++d) first[kHead + d] += one[kHead + d];
  }
  for (int64_t d = 0; d < size; ++d) first[kHead + d] /= all;
}

template <class Values> void attend(const fips_attention &a) {
  using Number = typename Values::type;
  const int64_t shared = a.heads / a.key_heads, turns = (shared + kQueries - 1) / kQueries;
  const int64_t pieces = (a.length + kKeys - 1) / kKeys, stride = a.size + kHead, all = a.examples * a.heads;
  float *queries = scratch<float>(Scratch::tokens, all * a.size), *sums = scratch<float>(Scratch::sums, all * pieces * stride);
  read_floats<Values>(static_cast<const Number *>(a.queries), all * a.size, all * a.size, queries);
  for (int64_t i = 0; i < all * a.size; ++i) queries[i] *= a.scale;
  const int64_t units = a.examples * a.key_heads * pieces * turns;
  const bool alone = a.examples * a.key_heads * a.length * a.size <= kAlone;
#pragma omp parallel num_threads(alone ? 1 : a.threads)
  {
#pragma omp for schedule(static)
    for (int64_t unit = 0; unit < units; ++unit) {
      const int64_t turn = unit % turns, p = unit / turns % pieces, head = unit / turns / pieces;
      const int64_t example = head / a.key_heads, place = head % a.key_heads, l = p * kKeys;
      const int64_t query = head * shared + turn * kQueries, count = min_of(kQueries, shared - turn * kQueries);
      const Piece<Values> piece = {
          static_cast<const Number *>(a.keys) + example * a.key_strides[0] + place * a.key_strides[1] + l * a.key_strides[2],
          static_cast<const Number *>(a.values) + example * a.value_strides[0] + place * a.value_strides[1] + l * a.value_strides[2],
          a.key_strides[2], a.value_strides[2], min_of(kKeys, a.length - l), a.size, queries + query * a.size};
      float *to = sums + (query * pieces + p) * stride; // the pieces of a query lie together
      switch (count) {
      case 1: attend_piece<Values, 1>(piece, to, pieces * stride); break;
      case 2: attend_piece<Values, 2>(piece, to, pieces * stride); break;
      case 3: attend_piece<Values, 3>(piece, to, pieces * stride); break;
      default: attend_piece<Values, 4>(piece, to, pieces * stride);
      }
    }
#pragma omp for schedule(static)
    for (int64_t query = 0; query < all; ++query) {
      float *first = sums + query * pieces * stride;
      merge_pieces(first, pieces, stride, a.size);
      store_floats(a.y, a.type, query * a.size, first + kHead, a.size);
    }
  }
}

} // namespace

void fips_attend_256(const fips_attention &a) {
  if (a.type == FIPS_BF16) attend<BF16Values>(a);
  else attend<F16Values>(a);
}
