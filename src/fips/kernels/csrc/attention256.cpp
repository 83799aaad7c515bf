// Attention of one token to those before it, with AVX2 with FMA, or with NEON. Keys and values are read once for the
// queries that share them, up to `kQueries` of them, some keys at a time, which threads share. Where scores and weights
// are rounded, all scores of a query are there before its values are read.
#include <cmath>
#include <cstring>
#include <type_traits>

#include "exponential256.h"
#include "paths.h"
#include "rounding256.h"

namespace {

constexpr int64_t kKeys = 128; // of a piece: with their values of 64 numbers 32 KB
constexpr int kQueries = 4;
constexpr int64_t kHead = 8; // floats before the sums of a piece: its largest score, and the sum of its weights
constexpr int64_t kAlone = 1 << 15; // numbers of keys up to which one thread takes no longer than several
constexpr float kLeast = -3e38f; // less than any score

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
  int64_t hidden; // of them, the first, weigh nothing
  const float *queries;
};

// What is never the largest behind `count` numbers, up to a multiple of 8.
FIPS_INLINE void pad(float *numbers, int64_t count) {
  for (int64_t l = count; l < round_up(count, 8); ++l) numbers[l] = kLeast;
}

// Scores of Q queries, padded.
template <class Values, int Q> void score(const Piece<Values> &piece, float (&scores)[Q][kKeys]) {
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
    for (int q = 0; q < Q; ++q) scores[q][l] = total(acc[q]);
  }
  for (int q = 0; q < Q; ++q) pad(scores[q], piece.count);
}

// `numbers`, padded, become e to the power of what they are above the largest, which is returned; `sum` is theirs.
FIPS_INLINE float raise(float *numbers, int64_t count, float &sum) {
  const int64_t padded = round_up(count, 8);
  __m256 most = _mm256_set1_ps(kLeast), all = _mm256_setzero_ps();
  for (int64_t l = 0; l < padded; l += 8) most = _mm256_max_ps(_mm256_load_ps(numbers + l), most);
  const float top = largest(most);
  for (int64_t l = 0; l < padded; l += 8) {
    const __m256 weight = exponential(_mm256_sub_ps(_mm256_load_ps(numbers + l), _mm256_set1_ps(top)));
    _mm256_store_ps(numbers + l, weight);
    all = _mm256_fmadd_ps(weight, _mm256_set1_ps(1), all);
  }
  sum = total(all);
  return top;
}

// tanh x = 1 - 2 / (e^2x + 1).
FIPS_INLINE __m256 hyperbolic(__m256 x) {
  const __m256 one = _mm256_set1_ps(1), two = _mm256_set1_ps(2);
  const __m256 most = _mm256_set1_ps(40); // from far below it on, 1
  const __m256 e = exponential(_mm256_min_ps(most, _mm256_mul_ps(x, two))); // NaN stays NaN
  return _mm256_sub_ps(one, _mm256_div_ps(two, _mm256_add_ps(e, one)));
}

// Scores, padded, become numbers between -cap and cap, each step through `rounded`.
template <class Round> FIPS_INLINE void cap_scores(float *scores, int64_t count, float cap, Round &&rounded) {
  const __m256 caps = _mm256_set1_ps(cap);
  const auto each = [&](auto body) {
    for (int64_t l = 0; l < count; l += 8) _mm256_store_ps(scores + l, body(_mm256_load_ps(scores + l)));
    rounded(scores, round_up(count, 8));
  };
  each([&](__m256 x) { return _mm256_div_ps(x, caps); });
  each([&](__m256 x) { return hyperbolic(x); });
  each([&](__m256 x) { return _mm256_mul_ps(x, caps); });
  pad(scores, count);
}

// Sums of values times weights, 8 C numbers of each from `d` on.
template <class Values, int Q, int C>
FIPS_INLINE void add_values(const Piece<Values> &piece, const float (&weights)[Q][kKeys], int64_t d, float *to,
                            int64_t stride) {
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

template <class Values, int Q>
FIPS_INLINE void add_all_values(const Piece<Values> &piece, const float (&weights)[Q][kKeys], float *to, int64_t stride) {
  int64_t d = 0;
  for (; d + 16 <= piece.size; d += 16) add_values<Values, Q, 2>(piece, weights, d, to, stride);
  if (d < piece.size) add_values<Values, Q, 1>(piece, weights, d, to, stride);
}

FIPS_INLINE void hide(float *scores, int64_t count) {
  for (int64_t l = 0; l < count; ++l) scores[l] = kLeast;
}

template <class Values, int Q> void attend_piece(const Piece<Values> &piece, float cap, float *to, int64_t stride) {
  alignas(32) float weights[Q][kKeys];
  score<Values, Q>(piece, weights);
  for (int q = 0; q < Q; ++q) {
    if (cap > 0) cap_scores(weights[q], piece.count, cap, [](float *, int64_t) {});
    hide(weights[q], piece.hidden);
    to[q * stride] = raise(weights[q], piece.count, to[q * stride + 1]);
  }
  add_all_values<Values, Q>(piece, weights, to, stride);
}

// Scores of a piece as torch leaves them after every step; `scores` of a query lie `apart`.
template <class Values, int Q>
void score_rounded(const Piece<Values> &piece, float scale, float cap, float *scores, int64_t apart) {
  alignas(32) float some[Q][kKeys];
  score<Values, Q>(piece, some);
  const int64_t padded = round_up(piece.count, 8);
  const __m256 by = _mm256_set1_ps(scale);
  for (int q = 0; q < Q; ++q) {
    round_to<Values>(some[q], padded);
    for (int64_t l = 0; l < padded; l += 8) _mm256_store_ps(some[q] + l, _mm256_mul_ps(_mm256_load_ps(some[q] + l), by));
    round_to<Values>(some[q], padded);
    if (cap > 0) cap_scores(some[q], piece.count, cap, round_to<Values>);
    hide(some[q], piece.hidden);
    std::memcpy(scores + q * apart, some[q], size_t(piece.count) * sizeof(float));
  }
}

template <class Values, int Q>
void add_rounded(const Piece<Values> &piece, const float *weights, int64_t apart, float *to, int64_t stride) {
  alignas(32) float some[Q][kKeys];
  for (int q = 0; q < Q; ++q) std::memcpy(some[q], weights + q * apart, size_t(piece.count) * sizeof(float));
  add_all_values<Values, Q>(piece, some, to, stride);
}

// The scores of a query become weights, rounded to the type.
template <class Values> void weigh_rounded(float *scores, int64_t count) {
  float sum;
  pad(scores, count);
  raise(scores, count, sum);
  for (int64_t l = 0; l < count; l += kKeys) {
    const int64_t some = round_up(min_of(kKeys, count - l), 8);
    for (int64_t i = l; i < l + some; i += 8)
      _mm256_store_ps(scores + i, _mm256_div_ps(_mm256_load_ps(scores + i), _mm256_set1_ps(sum)));
    round_to<Values>(scores + l, some);
  }
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

// `body` with a number of queries as a constant.
template <class Body> FIPS_INLINE void with_queries(int64_t count, Body &&body) {
  switch (count) {
  case 1: return body(std::integral_constant<int, 1>());
  case 2: return body(std::integral_constant<int, 2>());
  case 3: return body(std::integral_constant<int, 3>());
  default: return body(std::integral_constant<int, 4>());
  }
}

template <class Values> class Attention {
public:
  explicit Attention(const fips_attention &a)
      : a_(a), shared_(a.heads / a.key_heads), turns_((shared_ + kQueries - 1) / kQueries),
        pieces_((a.length + kKeys - 1) / kKeys), stride_(a.size + kHead), all_(a.examples * a.heads),
        queries_(scratch<float>(Scratch::tokens, all_ * a.size)),
        sums_(scratch<float>(Scratch::sums, all_ * pieces_ * (stride_ + (a.rounded ? kKeys : 0)))),
        scores_(sums_ + all_ * pieces_ * stride_) {
    read_floats<Values>(static_cast<const Number<Values> *>(a.queries), all_ * a.size, all_ * a.size, queries_);
    if (!a.rounded)
      for (int64_t i = 0; i < all_ * a.size; ++i) queries_[i] *= a.scale;
  }

  void run() {
    const int64_t units = a_.examples * a_.key_heads * pieces_ * turns_;
    const bool alone = a_.examples * a_.key_heads * a_.length * a_.size <= kAlone;
#pragma omp parallel num_threads(alone ? 1 : a_.threads)
    {
      if (a_.rounded) {
#pragma omp for schedule(static)
        for (int64_t unit = 0; unit < units; ++unit) {
          const Unit u = unit_of(unit);
          with_queries(u.count, [&](auto count) {
            score_rounded<Values, decltype(count)::value>(u.piece, a_.scale, a_.cap, scores(u), pieces_ * kKeys);
          });
        }
#pragma omp for schedule(static)
        for (int64_t query = 0; query < all_; ++query)
          weigh_rounded<Values>(scores_ + query * pieces_ * kKeys, a_.length);
      }
#pragma omp for schedule(static)
      for (int64_t unit = 0; unit < units; ++unit) {
        const Unit u = unit_of(unit);
        float *to = sums_ + (u.query * pieces_ + u.place) * stride_; // the pieces of a query lie together
        with_queries(u.count, [&](auto count) {
          constexpr int Q = decltype(count)::value;
          if (a_.rounded) add_rounded<Values, Q>(u.piece, scores(u), pieces_ * kKeys, to, pieces_ * stride_);
          else attend_piece<Values, Q>(u.piece, a_.cap, to, pieces_ * stride_);
        });
      }
#pragma omp for schedule(static)
      for (int64_t query = 0; query < all_; ++query) {
        float *first = sums_ + query * pieces_ * stride_;
        if (a_.rounded) add_pieces(first);
        else merge_pieces(first, pieces_, stride_, a_.size);
        store_floats(a_.y, a_.type, query * a_.size, first + kHead, a_.size);
      }
    }
  }

private:
  // Some keys and `count` queries from `query` on.
  struct Unit {
    Piece<Values> piece;
    int64_t query, count, place;
  };

  Unit unit_of(int64_t unit) const {
    const int64_t turn = unit % turns_, place = unit / turns_ % pieces_, head = unit / turns_ / pieces_;
    const int64_t example = head / a_.key_heads, key_head = head % a_.key_heads, l = place * kKeys;
    const int64_t query = head * shared_ + turn * kQueries, count = min_of(kQueries, shared_ - turn * kQueries);
    const auto at = [&](const void *data, const int64_t (&strides)[3]) {
      return static_cast<const Number<Values> *>(data) + example * strides[0] + key_head * strides[1] + l * strides[2];
    };
    const int64_t keys = min_of(kKeys, a_.length - l), before = a_.hidden ? a_.hidden[example] - l : 0;
    const Piece<Values> piece = {at(a_.keys, a_.key_strides), at(a_.values, a_.value_strides), a_.key_strides[2],
                                 a_.value_strides[2], keys, a_.size, before > 0 ? min_of(before, keys) : 0,
                                 queries_ + query * a_.size};
    return {piece, query, count, place};
  }

  float *scores(const Unit &u) const { return scores_ + u.query * pieces_ * kKeys + u.place * kKeys; }

  void add_pieces(float *first) const {
    for (int64_t p = 1; p < pieces_; ++p)
      for (int64_t d = 0; d < a_.size; ++d) first[kHead + d] += first[p * stride_ + kHead + d];
  }

  const fips_attention &a_;
  const int64_t shared_, turns_, pieces_, stride_, all_;
  float *const queries_, *const sums_, *const scores_;
};

} // namespace

void fips_attend_256(const fips_attention &a) {
  if (a.type == FIPS_BF16) Attention<BF16Values>(a).run();
  else Attention<F16Values>(a).run();
}
