// Whether the arguments of a call agree with each other and with the memory that they name. Return 0 or a fips_status.
#pragma once
#include "fips_kernels.h"

// Whether there is a reader for the format, N and M.
bool fips_format_is_known(const fips_matrix &matrix);
// All but the starts of rows: sizes against lengths, in constant time.
int fips_check_matrix(const fips_matrix &matrix);
// Whether no row reads values that are not there, whatever the pattern and the starts say.
int fips_check_rows(const fips_matrix &matrix);
int fips_check_norm(const fips_norm &norm);
int fips_check_attention(const fips_attention &attention);
int fips_check_block(const fips_block &block);
int fips_check_block_parts(const fips_block &block); // all but what changes from token to token
// A call with so many columns in and out; its outputs may have a bias.
int fips_check_search(const fips_search &search);
int fips_check_call(const fips_call &call, int64_t inputs, int64_t outputs);
