// The compiled variants that dispatch.cpp chooses from. Each returns false if it cannot do the combination.
#pragma once
#include "fips_kernels.h"

bool fips_portable(const fips_matrix &matrix, const fips_call &call);
bool fips_avx2(const fips_matrix &matrix, const fips_call &call);
bool fips_avx512(const fips_matrix &matrix, const fips_call &call);
bool fips_avx512_bf16(const fips_matrix &matrix, const fips_call &call);
bool fips_amx(const fips_matrix &matrix, const fips_call &call);

bool fips_columns_portable(const fips_matrix &matrix, const fips_call &call);
bool fips_columns_avx2(const fips_matrix &matrix, const fips_call &call);
bool fips_columns_avx512(const fips_matrix &matrix, const fips_call &call);
