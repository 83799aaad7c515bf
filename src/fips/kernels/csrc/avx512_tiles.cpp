// Many tokens with AVX-512; a file of its own, as it takes as long to compile as all else of AVX-512.
#include "tile_dots512.h"

bool fips_avx512_tiles(const fips_matrix &a, const fips_call &c) { return dots_path(a, c); }
