// Integers of less than 8 bits become bytes where they are needed, a few rows at a time: in the cache of the thread.
#pragma once
#include "packed.h"
#include "paths.h"

namespace {

// The matrix as it is, or a view of it whose values are bytes for the rows asked for and for no others.
template <class Reader>
inline fips_matrix widened_rows(const fips_matrix &a, const Reader &reader, int64_t row0, int64_t rows) {
  if (a.value_bits == 8) return a;
  static thread_local Scratch scratch;
  const int bits = int(a.value_bits);
  const int64_t first = reader.start(row0) & ~int64_t(7); // where a byte begins
  const int64_t last = row0 + rows < a.rows ? reader.start(row0 + rows) : a.num_values;
  int8_t *to = scratch.get<int8_t>(last - first + 64);
  fips_widen_avx512(static_cast<const uint8_t *>(a.values), (a.num_values * bits + 7) / 8, bits, first, last - first, to);
  fips_matrix view = a;
  view.value_bits = 8;
  view.values = to - first;
  return view;
}

} // namespace
