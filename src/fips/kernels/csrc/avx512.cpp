#include "avx512.h"
#include "columns.h"

bool fips_avx512(const fips_matrix &a, const fips_call &c) { return run_avx512(a, c); }

bool fips_columns_avx512(const fips_matrix &a, const fips_call &c) { return columns_path<Vector16>(a, c); }
