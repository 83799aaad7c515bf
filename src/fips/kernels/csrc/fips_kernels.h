// C interface of the fips CPU kernels: y = x S^T (+ bias) for a packed sparse S of shape (rows, cols).
//
// Plain C, no Python and no torch headers: the library is loaded with ctypes. All pointers are borrowed for one call.
#pragma once
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

#if defined(_WIN32)
#define FIPS_API __declspec(dllexport)
#else
#define FIPS_API __attribute__((visibility("default")))
#endif

enum { FIPS_ABI = 3 };

enum fips_type { FIPS_F32 = 0, FIPS_BF16 = 1, FIPS_F16 = 2, FIPS_I8 = 3 };

// Where the kept entries are; see fips/storage/packing.py for the bytes.
enum fips_format {
  FIPS_DENSE = 0,      // everywhere
  FIPS_BITMASK = 1,    // one bit per entry, row-major, least significant first
  FIPS_NM = 2,         // colexicographic rank of the N-subset of every M columns; M in 2, 4, 8, 16
  FIPS_BLOCK_ROWS = 3, // one bit per column for every `m` consecutive rows; the values of a block lie together
  FIPS_BLOCK_COLS = 4  // one bit per `m` consecutive columns of every row
};

// Instruction sets, each a superset of the one before. A call may ask for less than the machine has.
enum fips_isa { FIPS_PORTABLE = 0, FIPS_AVX2 = 1, FIPS_AVX512 = 2, FIPS_AVX512_BF16 = 3, FIPS_AMX = 4 };

// How the product is formed. DIRECT decodes every entry once per token in registers (few tokens), TOKENS multiplies
// each kept entry by a vector of tokens, TILES decodes a few rows at a time and multiplies them by all tokens.
enum fips_path { FIPS_AUTO = 0, FIPS_DIRECT = 1, FIPS_TOKENS = 2, FIPS_TILES = 3 };

typedef struct {
  int64_t rows, cols;
  int32_t format, value_type;
  int32_t n, m;
  const void *values;        // `num_values` kept entries, row-major
  const uint8_t *pattern;    // packed pattern, `pattern_bytes` long
  int64_t num_values, pattern_bytes;
  const uint32_t *row_start; // index of the first value of every row (of its block for BLOCK_ROWS), from
                             // fips_row_starts; null for dense and N:M
  const float *scales;       // one per row, multiplies the values; null: 1
  int64_t value_bits;        // of I8 values: 8, or 2 to 7 for a stream of two's complement numbers, lowest bit first
} fips_matrix;

typedef struct {
  const void *x;
  void *y;
  const void *bias;         // rows entries of type x_type, or null
  int64_t tokens;
  int64_t x_stride, y_stride; // in elements
  int32_t x_type;           // of x, y and bias: F32, BF16 or F16
  int32_t threads, isa, path;
  int32_t activation_bits;  // 24, 16 or 8: fixed-point width of x beside int8 values
} fips_call;

FIPS_API int fips_abi(void);
// Best instruction set of this machine among those compiled in.
FIPS_API int fips_isa_level(void);
// y = x S^T + bias. Returns 0, or -1 if the combination is not supported (nothing is written then).
FIPS_API int fips_multiply(const fips_matrix *matrix, const fips_call *call);
// The same call with another x and y.
FIPS_API int fips_multiply_again(const fips_matrix *matrix, const fips_call *call, const void *x, void *y);
// y = x S without bias, for a dense S and at most four tokens: x has as many columns as S has rows.
FIPS_API int fips_multiply_columns(const fips_matrix *matrix, const fips_call *call);
// Fill `row_start` (rows) of a pattern; returns the number of kept entries, or -1 for an unsupported format.
FIPS_API int64_t fips_row_starts(const fips_matrix *matrix, uint32_t *row_start);

#ifdef __cplusplus
}
#endif
