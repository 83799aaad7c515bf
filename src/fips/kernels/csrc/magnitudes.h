// The largest magnitude in a token, read as integers: one pass that compilers turn into vectors.
#pragma once
#include "packed.h"

namespace {

constexpr uint32_t kInfinity = 0x7F800000; // of a float; NaN lies above it

template <class Word> uint32_t largest_word(const void *x, int64_t at, int64_t count) {
  const auto *bytes = static_cast<const unsigned char *>(x) + at * int64_t(sizeof(Word));
  constexpr Word magnitude = Word(~Word(0)) >> 1;
  Word most = 0;
  for (int64_t k = 0; k < count; ++k) {
    Word word;
    std::memcpy(&word, bytes + k * int64_t(sizeof word), sizeof word);
    word = Word(word & magnitude);
    most = word > most ? word : most;
  }
  return most;
}

// As the bits of a float.
inline uint32_t largest_magnitude(const fips_call &c, int64_t t) {
  const int64_t at = t * c.x_stride;
  if (c.x_type == FIPS_F32) return largest_word<uint32_t>(c.x, at, c.x_columns);
  const uint32_t most = largest_word<uint16_t>(c.x, at, c.x_columns);
  if (c.x_type == FIPS_BF16) return most << 16;
  const float value = f16_to_float(uint16_t(most));
  uint32_t bits;
  std::memcpy(&bits, &value, 4);
  return bits;
}

} // namespace
