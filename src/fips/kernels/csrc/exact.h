// Tokens that a kernel cannot multiply as a dense layer does.
#pragma once
#include "fips_kernels.h"

// The largest magnitude in token t, as the bits of a float; NaN counts as the largest.
using FipsMagnitude = uint32_t(const fips_call &call, int64_t t);
FipsMagnitude fips_magnitude_portable, fips_magnitude_256, fips_magnitude_avx512;

// Writes the outputs of these tokens anew. `fixed_point`: the kernel turned tokens into integers.
void fips_mend_tokens(const fips_matrix &matrix, const fips_call &call, bool fixed_point, FipsMagnitude *magnitude);
