// Many tokens with AVX2 with FMA, or with NEON.
#include "paths.h"
#include "row_blocks256.h"

#if !defined(__aarch64__)
#include "digit_blocks256.h"
#endif

bool fips_tiles_256(const fips_matrix &a, const fips_call &c) {
#if !defined(__aarch64__)
  if (a.value_type == FIPS_I8 && fixed_planes(c) == 1) return digit_blocks_path<6, 2>(a, c);
#endif
  return blocks_path<Vector8, 6, 2>(a, c);
}
