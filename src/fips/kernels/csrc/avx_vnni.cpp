// AVX2 with the dot products of bytes of AVX-VNNI: integers and codes beside inputs of 8 bits. All else is for AVX2 alone.
#include "full256.h"
#include "paths.h"
#include "trellis256.h"

bool fips_avx_vnni(const fips_matrix &a, const fips_call &c) {
  if (a.value_type != FIPS_I8 || fixed_planes(c) != 1 || a.format == FIPS_BLOCK_ROWS) return false;
  if (c.path == FIPS_TILES) return fips_avx_vnni_tiles(a, c);
  if (c.path != FIPS_DIRECT || !(a.memory || reads_whole(a))) return false;
  return with_few_tokens(c, [&](auto count) {
    constexpr int tokens = decltype(count)::value;
    float *x = tokens_as_floats<tokens>(a, c);
    if (a.memory) recalled_path<tokens>(a, c, x);
    else whole_path<tokens>(a, c, x);
    return true;
  });
}
