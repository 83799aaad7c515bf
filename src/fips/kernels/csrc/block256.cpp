// What a block of a decoder does with a token between its matrices, with AVX2 with FMA, or with NEON.
#include "exponential256.h"
#include "paths.h"
#include "rounding256.h"

namespace {

constexpr int64_t kMostSize = kMostRounded; // of a head
constexpr int64_t kSome = 64;
constexpr int64_t kAlone = 1 << 12; // numbers up to which one thread takes no longer than several

// Products are rounded where angles are of the same type; beside floats torch computes in floats.
template <class Values, class Angles>
void turn(Number<Values> *heads, int64_t count, int64_t size, const Number<Angles> *cosines, const Number<Angles> *sines,
          int64_t turned) {
  alignas(32) float by_cosine[kMostSize], by_sine[kMostSize], cosine[kMostSize], sine[kMostSize];
  const int64_t half = turned / 2;
  read_floats<Angles>(cosines, turned, turned, cosine);
  read_floats<Angles>(sines, turned, turned, sine);
  for (Number<Values> *head = heads; head != heads + count * size; head += size) {
    read_floats<Values>(head, turned, turned, by_cosine);
    for (int64_t i = 0; i < half; ++i) by_sine[i] = -by_cosine[half + i] * sine[i];
    for (int64_t i = 0; i < half; ++i) by_sine[half + i] = by_cosine[i] * sine[half + i];
    for (int64_t i = 0; i < turned; ++i) by_cosine[i] *= cosine[i];
    if constexpr (std::is_same_v<Angles, Values>) {
      round_to<Values>(by_cosine, turned);
      round_to<Values>(by_sine, turned);
    }
    for (int64_t i = 0; i < turned; ++i) by_cosine[i] += by_sine[i];
    store<Values>(head, by_cosine, turned);
  }
}

// x / (1 + e^-x); with TANH x / (1 + e^-2u), which is x / 2 (1 + tanh u).
template <bool TANH> FIPS_INLINE __m256 activated(__m256 x) {
  const auto all = [](float value) { return _mm256_set1_ps(value); };
  __m256 power = x;
  if (TANH) { // 2 sqrt(2 / pi) x (1 + 0.044715 x^2)
    const __m256 cubic = _mm256_fmadd_ps(_mm256_mul_ps(x, x), all(0.044715f), all(1));
    power = _mm256_mul_ps(_mm256_mul_ps(x, all(1.5957691216f)), cubic);
  }
  const __m256 e = exponential(_mm256_sub_ps(_mm256_setzero_ps(), _mm256_max_ps(all(-87), power)));
  return _mm256_div_ps(x, _mm256_add_ps(all(1), e));
}

template <class Values, bool TANH> void gate_some(Number<Values> *gate, const Number<Values> *up, int64_t count) {
  alignas(32) float numbers[kSome];
  for (int64_t i = 0; i < count; i += 8) _mm256_store_ps(numbers + i, activated<TANH>(read8<Values>(gate + i)));
  round_to<Values>(numbers, count);
  for (int64_t i = 0; i < count; i += 8)
    _mm256_store_ps(numbers + i, _mm256_mul_ps(_mm256_load_ps(numbers + i), read8<Values>(up + i)));
  store<Values>(gate, numbers, count);
}

template <class Values> void multiply_by_gate(Number<Values> *gate, const Number<Values> *up, int64_t count, int32_t activation, int threads) {
  (void)threads;
#pragma omp parallel for num_threads(threads) schedule(static) if (count > kAlone)
  for (int64_t k = 0; k < count; k += kSome) {
    const int64_t some = min_of(kSome, count - k);
    if (activation == FIPS_SILU) gate_some<Values, false>(gate + k, up + k, some);
    else gate_some<Values, true>(gate + k, up + k, some);
  }
}

template <class Values> void add(const Number<Values> *a, const Number<Values> *b, Number<Values> *sum, int64_t count) {
  for (int64_t k = 0; k < count; k += kSome) {
    alignas(32) float numbers[kSome];
    const int64_t some = min_of(kSome, count - k);
    for (int64_t i = 0; i < some; i += 8)
      _mm256_store_ps(numbers + i, _mm256_add_ps(read8<Values>(a + k + i), read8<Values>(b + k + i)));
    store<Values>(sum + k, numbers, some);
  }
}

// `body` with the values of a type of 16 bits.
template <class Body> void with_type(int32_t type, Body &&body) {
  if (type == FIPS_BF16) body(BF16Values());
  else body(F16Values());
}

} // namespace

void fips_turn_256(void *heads, int64_t count, int64_t size, const void *cosines, const void *sines, int64_t turned,
                   int32_t angles_type, int32_t type) {
  with_type(type, [&](auto values) {
    using Values = decltype(values);
    const auto turn_by = [&](auto angles) {
      using Angles = decltype(angles);
      const auto read = [](const void *from) { return static_cast<const Number<Angles> *>(from); };
      turn<Values, Angles>(static_cast<Number<Values> *>(heads), count, size, read(cosines), read(sines), turned);
    };
    if (angles_type == FIPS_F32) turn_by(F32Values());
    else turn_by(values);
  });
}

void fips_gate_256(void *gate, const void *up, int64_t count, int32_t activation, int32_t type, int threads) {
  with_type(type, [&](auto values) {
    using N = Number<decltype(values)>;
    multiply_by_gate<decltype(values)>(static_cast<N *>(gate), static_cast<const N *>(up), count, activation, threads);
  });
}

void fips_add_256(const void *a, const void *b, void *sum, int64_t count, int32_t type) {
  with_type(type, [&](auto values) {
    using N = Number<decltype(values)>;
    add<decltype(values)>(static_cast<const N *>(a), static_cast<const N *>(b), static_cast<N *>(sum), count);
  });
}
