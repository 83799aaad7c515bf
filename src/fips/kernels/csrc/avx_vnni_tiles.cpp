// Many tokens with AVX-VNNI.
#include "digit_blocks256.h"
#include "paths.h"

bool fips_avx_vnni_tiles(const fips_matrix &a, const fips_call &c) { return digit_blocks_path<DotBytes>(a, c); }
