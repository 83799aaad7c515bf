#include "avx512.h"

bool fips_avx512_bf16(const fips_matrix &a, const fips_call &c) { return run_avx512(a, c); }
