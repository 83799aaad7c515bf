// The compiled variants that dispatch.cpp chooses from. Each returns false if it cannot do the combination.
#pragma once
#include "fips_kernels.h"

// The best instruction set of the machine that is no better than the one of a call.
inline int best_level(int64_t isa) {
  int level = int(isa);
  while (!(fips_isas() >> level & 1)) --level;
  return level;
}

bool fips_portable(const fips_matrix &matrix, const fips_call &call);
bool fips_256(const fips_matrix &matrix, const fips_call &call);
bool fips_tiles_256(const fips_matrix &matrix, const fips_call &call);
bool fips_avx_vnni(const fips_matrix &matrix, const fips_call &call);
bool fips_avx_vnni_tiles(const fips_matrix &matrix, const fips_call &call);
bool fips_avx512(const fips_matrix &matrix, const fips_call &call);
bool fips_avx512_pairs(const fips_matrix &matrix, const fips_call &call); // up to 8 tokens
bool fips_avx512_tiles(const fips_matrix &matrix, const fips_call &call);
bool fips_avx512_bf16(const fips_matrix &matrix, const fips_call &call);
bool fips_amx(const fips_matrix &matrix, const fips_call &call);

// `count` integers of `bits` < 8 bits as bytes, from `first` on, a multiple of 8.
void fips_widen_portable(const uint8_t *stream, int64_t bytes, int bits, int64_t first, int64_t count, int8_t *to);
void fips_widen_256(const uint8_t *stream, int64_t bytes, int bits, int64_t first, int64_t count, int8_t *to);
void fips_widen_avx512(const uint8_t *stream, int64_t bytes, int bits, int64_t first, int64_t count, int8_t *to);

// The tokens of a call as floats in the rotated columns of the matrix, `cols` apart.
using FipsRotate = void(const fips_matrix &matrix, const fips_call &call, float *to);
FipsRotate fips_rotate_portable, fips_rotate_256;

bool fips_columns_portable(const fips_matrix &matrix, const fips_call &call);
bool fips_columns_256(const fips_matrix &matrix, const fips_call &call);
bool fips_columns_avx512(const fips_matrix &matrix, const fips_call &call);

// Fill a search; false for codes that it does not know.
bool fips_search_portable(const fips_search &search);
bool fips_search_256(const fips_search &search);
bool fips_search_avx512(const fips_search &search);

void fips_normalise_256(const fips_norm &norm);
void fips_attend_256(const fips_attention &attention);

// Of a block, all in one `type` of 16 bits. Of every head of `size` numbers the first `turned` turned by the angles of its
// position, which may be floats.
void fips_turn_256(void *heads, int64_t count, int64_t size, const void *cosines, const void *sines, int64_t turned,
                   int32_t angles_type, int32_t type);
// `gate`, through a fips_activation, times `up`, in place.
void fips_gate_256(void *gate, const void *up, int64_t count, int32_t activation, int32_t type, int threads);
void fips_add_256(const void *a, const void *b, void *sum, int64_t count, int32_t type);

// `wide` holds the codes of a matrix with a memory, as they lie in the stream: put their numbers in their place.
void fips_recall_portable(const fips_matrix &matrix, int threads, int8_t *wide);
void fips_recall_256(const fips_matrix &matrix, int threads, int8_t *wide);
