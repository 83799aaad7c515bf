// What bf16 dot products and conversions make faster: many tokens, and few bf16 ones beside bf16 values.
#include "direct512.h"
#include "tile_dots512.h"

bool fips_avx512_bf16(const fips_matrix &a, const fips_call &c) {
  if (c.path == FIPS_TILES) return dots_path(a, c);
  return c.path == FIPS_DIRECT && a.value_type == FIPS_BF16 && c.x_type == FIPS_BF16 && direct_path<Bf16PairDot>(a, c);
}
