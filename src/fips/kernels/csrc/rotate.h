// Tokens in rotated columns: blocks of 4, 16 or 64 of them times a Walsh-Hadamard matrix, see fips/formats/rotation.py.
#pragma once
#include "packed.h"

namespace {

template <int64_t BLOCK> void rotate_block(float *v) {
  for (int64_t half = 1; half < BLOCK; half *= 2)
    for (int64_t i = 0; i < BLOCK; i += 2 * half)
      for (int64_t j = i; j < i + half; ++j) {
        const float a = v[j], b = v[j + half];
        v[j] = a + b;
        v[j + half] = a - b;
      }
}

template <int64_t BLOCK> void rotate_row(float *row, int64_t cols) {
  constexpr float unit = BLOCK == 64 ? 0.125f : BLOCK == 16 ? 0.25f : 0.5f;
  for (int64_t k = 0; k < cols; k += BLOCK) {
    rotate_block<BLOCK>(row + k);
    for (int64_t j = 0; j < BLOCK; ++j) row[k + j] *= unit;
  }
}

inline void rotate_row(const fips_matrix &a, float *row) {
  if (a.rotation == 64) return rotate_row<64>(row, a.cols);
  if (a.rotation == 16) return rotate_row<16>(row, a.cols);
  rotate_row<4>(row, a.cols);
}

} // namespace
