// C interface of the fips CPU kernels: y = x S^T (+ bias) for a packed sparse S of shape (rows, cols).
//
// Plain C, no Python and no torch headers: the library is loaded with ctypes. All pointers are borrowed for one call.
// Every pointer comes with how much lies behind it. A call checks that before it reads or writes, whatever the
// arguments and the bytes of the pattern say; only memory that another thread changes during the call is not covered.
#pragma once
#include <stdint.h>

#include "formats.h"

#ifdef __cplusplus
extern "C" {
#endif

#if defined(_WIN32)
#define FIPS_API __declspec(dllexport)
#else
#define FIPS_API __attribute__((visibility("default")))
#endif

enum { FIPS_ABI = 16 };
enum { FIPS_ROW_UNIT = 16 }; // rows that parts of a matrix are counted in

// What a function returns besides success, which is 0 or a count. Nothing was written then, unless memory ran out.
enum fips_status {
  FIPS_UNSUPPORTED = -1, // there is no kernel for this combination
  FIPS_INVALID = -2,     // the arguments contradict each other, or the pattern does not fit the values
  FIPS_NO_MEMORY = -3
};

#define FIPS_ROW(name, number, type, bits, reader) FIPS_##name = number,
enum fips_type { FIPS_VALUES(FIPS_ROW) };
#undef FIPS_ROW

// Where the kept entries are; see fips/formats/patterns.py for the bytes.
//   FULL        everywhere
//   BITMASK     one bit per entry, row-major, least significant first
//   NM          colexicographic rank of the N-subset of every M columns; M in 2, 4, 8, 16
//   BLOCK_ROWS  one bit per column for every `m` consecutive rows; the values of a block lie together
//   BLOCK_COLS  one bit per `m` consecutive columns of every row
#define FIPS_ROW(name, number, group, bits, kept, reader, side) FIPS_##name = number,
enum fips_format { FIPS_PATTERNS(FIPS_ROW) };
#undef FIPS_ROW

// Instruction sets, each a superset of the one before. A call may ask for less than the machine has. VECTORS_256 is AVX2
// with FMA, or on ARM NEON with dot products of bytes.
enum fips_isa {
  FIPS_PORTABLE = 0, FIPS_VECTORS_256 = 1, FIPS_AVX_VNNI = 2, FIPS_AVX512 = 3, FIPS_AVX512_BF16 = 4, FIPS_AMX = 5
};

// How the product is formed. DIRECT decodes every entry once per token in registers (few tokens), TOKENS multiplies
// each kept entry by a vector of tokens, TILES decodes a few rows at a time and multiplies them by all tokens.
enum fips_path { FIPS_AUTO = 0, FIPS_DIRECT = 1, FIPS_TOKENS = 2, FIPS_TILES = 3 };

typedef struct {
  int64_t rows, cols;
  int32_t format, value_type;
  int32_t n, m;
  const void *values;        // `num_values` kept entries, row-major, `value_bytes` long
  const uint8_t *pattern;    // packed pattern, `pattern_bytes` long
  int64_t num_values, value_bytes, pattern_bytes;
  const uint32_t *row_start; // index of the first value of every row (of its block for BLOCK_ROWS), from
                             // fips_row_starts, `num_starts` = rows long; null for full and N:M
  const float *scales;       // one per row, multiplies the values, `num_scales` = rows long; null: 1
  int64_t num_starts, num_scales;
  int64_t value_bits;        // of I8 values: 8, or 2 to 7 for a stream of two's complement numbers, lowest bit first
  const uint8_t *group_scales; // of I8 values: one for every `scale_group` columns of every row, multiplies beside the
                             // scale of the row; null and 0 and 0: 1
  int64_t num_group_scales;  // rows times groups of a row, of which the last may be short
  int64_t scale_group;       // 16, 32, 64 or 128
  const int8_t *levels;      // of I8 values of at most 5 bits: the number of every code, the lowest code first; null and
                             // 0: codes are the numbers. With a memory: of every place, which is the code as it lies in
                             // the stream xor what `history` has for the codes of the rows above it
  int64_t num_levels;        // 2^value_bits; with a memory a power of 2 from there to 64
  const uint8_t *history;    // with a memory: for every row above, the next first, a number for every code
  int64_t num_history;       // memory * 2^value_bits, or 0
  int64_t memory;            // rows above an entry that have a say in its number, at most 3, of a matrix kept whole of
                             // at most 4 bits; 0: none
  int64_t run;               // rows after which codes above do not count, with a memory
  int64_t rotation;          // columns of a block that is stored rotated: 4, 16 or 64, which divides `cols`; 1: none.
                             // Then an Inf in a token may come out as NaN
} fips_matrix;

typedef struct {
  const void *x;            // tokens by x_columns, `x_length` elements in all
  void *y;                  // tokens by y_columns, `y_length` elements in all
  const void *bias;         // `bias_length` = rows elements of type y_type, or null
  int64_t tokens, x_columns, y_columns;
  int64_t x_stride, y_stride; // in elements, from one token to the next; of x it may be 0, of y not below y_columns
  int64_t x_length, y_length, bias_length;
  int32_t x_type, y_type;   // of x, and of y and bias: F32, BF16 or F16
  int32_t threads, isa, path;
  int32_t activation_bits;  // 24, 16 or 8: fixed-point width of x beside int8 values
  int64_t first_row, end_row; // columns of y that are computed, the others stay as they are: all of them, or with the
                            // path DIRECT a part that begins at a multiple of FIPS_ROW_UNIT and ends at one or
                            // at the last
} fips_call;

// The cheapest way through a trellis, for every column and every run of `run` rows of it: see fips/formats/trellis.py.
typedef struct {
  const float *wanted, *weight; // columns times rows: numbers in units of the step, and what their squared errors weigh
  int8_t *codes;                // what is found, and
  float *numbers;               // the numbers of these codes
  int64_t columns, rows, length; // `length` = columns * rows elements in each of the four
  int64_t run, bits, memory;
  const int8_t *levels;
  const uint8_t *history;
  int64_t num_levels, num_history; // as in fips_matrix
  int64_t threads, isa;
  float unit;                   // errors are counted in integers of one over this; a weight is about 1
} fips_search;

// Attention of one token of every example to `length` others: softmax(c(`scale` q K^T)) V for every head, c(s) being s or,
// with a `cap` above 0, cap tanh(s / cap).
typedef struct {
  const void *queries;          // examples by heads by size, `queries_length` elements
  const void *keys, *values;    // examples by key_heads by length by size: numbers of a token side by side, the others
                                // `key_strides` and `value_strides` elements apart, within so many elements
  void *y;                      // as the queries
  const int64_t *hidden;        // null, or of every example how many of the first keys are left out, less than `length`
  int64_t queries_length, keys_length, values_length, y_length, hidden_length; // the last: 0 or `examples`
  int64_t examples, heads, key_heads; // heads / key_heads queries that follow each other share keys and values
  int64_t length, size;         // size: a multiple of 8 up to 512
  int64_t key_strides[3], value_strides[3];
  float scale, cap;
  int32_t type;                 // of all four: BF16 or F16
  int32_t rounded;              // 1: scores and weights are rounded to the type wherever torch, one operation after the
                                // other, rounds them
  int32_t threads, isa;
} fips_attention;

// What the norm of x, its numbers over the root of their mean square, is multiplied by: the weights, after it was rounded
// to the type of y or as it is, or one more than the weights.
enum fips_norm_kind { FIPS_NORM_ROUNDED = 0, FIPS_NORM_WHOLE = 1, FIPS_NORM_ONE_MORE = 2 };

typedef struct {
  const void *x;                // tokens by `size`, `length` elements, a multiple of size
  const void *weight;           // `weight_length` = size elements
  void *y;                      // as x
  int64_t length, size;         // size: a multiple of 8
  int64_t weight_length;
  float eps;                    // added to the mean square
  int32_t kind, type, isa;      // type of all three: BF16 or F16
} fips_norm;

// The matrices of a block, in this order: what reads its input, what attention gives goes through, and an MLP with a gate.
// One matrix may give queries, keys and values, one behind the other, and one what the gate and `up` give: it stands in
// the place of the first, and null in the others'.
enum fips_block_matrix {
  FIPS_QUERIES = 0, FIPS_KEYS = 1, FIPS_VALUES_OF_KEYS = 2, FIPS_OUT = 3, FIPS_GATE = 4, FIPS_UP = 5, FIPS_DOWN = 6,
  FIPS_BLOCK_MATRICES = 7
};
// Its norms: of the input, of what the MLP reads, of queries and of keys, head by head or whole, and of what attention and
// the MLP give.
enum fips_block_norm {
  FIPS_NORM_INPUT = 0, FIPS_NORM_MLP = 1, FIPS_NORM_QUERIES = 2, FIPS_NORM_KEYS = 3, FIPS_NORM_ATTENDED = 4, FIPS_NORM_MADE = 5,
  FIPS_BLOCK_NORMS = 6
};
// What the gate goes through: x / (1 + e^-x), or x / (1 + e^-2u) with u = sqrt(2 / pi) (x + 0.044715 x^3).
enum fips_activation { FIPS_SILU = 0, FIPS_GELU_TANH = 1 };

// One block of a decoder for one token of every example, which comes behind `before` others in the caches:
//   n = norm(x);  q, k, v = Q n, K n, V n, q and k normed and turned by position
//   h = x + norm(O attention(q, k, v and those before));  m = norm(h);  y = h + norm(D (act(G m) * U m))
// where norms without weights are left out,
// with numbers rounded to their type wherever torch, one operation after the other, rounds them.
typedef struct {
  const void *x;                // examples by width, `length` elements
  void *y;                      // as x
  void *room;                   // what is made in between, `room_length` elements, at least fips_block_room
  int64_t length, room_length;
  const fips_matrix *const *matrices; // as many as FIPS_BLOCK_MATRICES, each
  const fips_call *const *calls;      // with a call for such inputs, whose x and y do not count
  const void *norms[FIPS_BLOCK_NORMS]; // weights, `norm_lengths` elements; null and 0: no norm
  const void *cosines, *sines;  // of the angles by which heads of queries and keys are turned: `turned` elements,
  int64_t angles_length, angles_stride; // `angles_stride` from one example to the next, which may be 0; `angles_length`
  int64_t turned;               // in all; numbers of a head that are turned, the first: a multiple of 8
  void *keys, *values;          // as in fips_attention, with room for one token more, which is written
  const int64_t *hidden;        // as there, of `before` tokens
  int64_t keys_length, values_length, hidden_length;
  int64_t examples, heads, key_heads, before, size;
  int64_t norm_lengths[FIPS_BLOCK_NORMS];
  int64_t key_strides[3], value_strides[3];
  float scale, cap, eps[FIPS_BLOCK_NORMS];
  int32_t norm_kinds[FIPS_BLOCK_NORMS];
  int32_t activation, type;     // type of all numbers but angles: BF16 or F16
  int32_t angles_type;          // the same, or F32
  int32_t rounded;              // as in fips_attention
  int32_t threads, isa;
} fips_block;

FIPS_API int fips_abi(void);
// The row of the table of formats for a pattern: entries under one code, bits of a code, kept entries of a code or -1.
// Returns 0 or a fips_status.
FIPS_API int fips_pattern(int32_t format, int32_t n, int32_t m, int32_t row[3]);
// Bits of a value of a fips_type in memory, or a fips_status.
FIPS_API int fips_value_bits(int32_t value_type);
// Size of fips_matrix, the offsets of its fields in order, the same of fips_call, fips_search, fips_attention,
// fips_norm and fips_block; returns how many numbers these are and writes as many as `length`.
FIPS_API int64_t fips_layout(int64_t *numbers, int64_t length);
// Instruction sets of this machine that are compiled in: bit i for the one of number i. A call runs with the best of
// them that is no better than its own.
FIPS_API int fips_isas(void);
// y = x S^T + bias. Returns 0 or a fips_status. A token with NaN or Inf in it gives what a dense matrix with zeros in the
// places of entries not kept gives: NaN or Inf in every output. Other tokens do not feel it.
FIPS_API int fips_multiply(const fips_matrix *matrix, const fips_call *call);
// The same call with another x and y of the same lengths.
FIPS_API int fips_multiply_again(const fips_matrix *matrix, const fips_call *call, const void *x, void *y);
// The same of several matrices with one x, each with a call and a y of its own. Few tokens go through all of them in one
// parallel region, in which every thread has a share of the bytes of all together. What matrices before one that fails
// have written stays.
FIPS_API int fips_multiply_together(const fips_matrix *const *matrices, const fips_call *const *calls, int64_t count,
                                    const void *x, void *const *ys);
// y = x S without bias, for a dense S of floats and at most four tokens: x has as many columns as S has rows.
FIPS_API int fips_multiply_columns(const fips_matrix *matrix, const fips_call *call);
// Fill `codes` and `numbers`. FIPS_UNSUPPORTED for other codes than 2 bits with a memory of 3 rows, 3 and 4 with one of 2.
FIPS_API int fips_search_paths(const fips_search *search);
// Fill `y`. Sums run in float32; FIPS_UNSUPPORTED where there are no registers of 256 bits.
FIPS_API int fips_attend(const fips_attention *attention);
// Fill `y`, on the calling thread; FIPS_UNSUPPORTED where there are no registers of 256 bits.
FIPS_API int fips_normalise(const fips_norm *norm);
// Fill `y` and the place of the token in `keys` and `values`; FIPS_UNSUPPORTED where there are no registers of 256 bits.
FIPS_API int fips_run_block(const fips_block *block);
// Elements of room that a block needs, of which only matrices, calls, heads, sizes and `length` have to be there; or a
// fips_status.
FIPS_API int64_t fips_block_room(const fips_block *block);
// Fill `row_start`, `length` = rows long (null and 0 for full and N:M); returns the number of kept entries, which is
// `num_values` unless the pattern is damaged, or a fips_status.
FIPS_API int64_t fips_row_starts(const fips_matrix *matrix, uint32_t *row_start, int64_t length);
// Bytes that calls have taken for the time they last and threads keep for their next call: each at most
// FIPS_KEPT_SCRATCH, and FIPS_KEPT_SCRATCH_OF_THREAD for every thread that it shared the rows with. Threads that took
// parts of the tokens instead keep their own.
FIPS_API int64_t fips_scratch_bytes(void);
// Give back what no call needs now; returns how many bytes that were.
FIPS_API int64_t fips_free_scratch(void);

enum { FIPS_KEPT_SCRATCH = 8 << 20, FIPS_KEPT_SCRATCH_OF_THREAD = 1 << 20 };

#ifdef __cplusplus
}
#endif
