// Numbers of a type of 16 bits that are computed with as floats.
#pragma once
#include <type_traits>

#include "values256.h"

namespace {

constexpr int64_t kMostRounded = 512; // at a time

template <class Values> using Number = typename Values::type;

// `count` is a multiple of 8.
template <class Values> FIPS_INLINE void store(Number<Values> *to, const float *from, int64_t count) {
#if !defined(__aarch64__)
  if constexpr (std::is_same_v<Values, F16Values>) {
    for (int64_t i = 0; i < count; i += 8)
      _mm_storeu_si128(reinterpret_cast<__m128i *>(to + i), _mm256_cvtps_ph(_mm256_loadu_ps(from + i), 0));
    return;
  }
#endif
  store_floats(to, std::is_same_v<Values, BF16Values> ? FIPS_BF16 : FIPS_F16, 0, from, count);
}

// As floats what the type makes of them.
template <class Values> FIPS_INLINE void round_to(float *numbers, int64_t count) {
  alignas(32) Number<Values> rounded[kMostRounded];
  store<Values>(rounded, numbers, count);
  read_floats<Values>(rounded, count, count, numbers);
}

} // namespace
