// The one table of formats: which there are, their numbers, their sizes and what reads them.
//
// The numbers are those of `Pattern.code` in fips/formats/patterns.py and `TYPES` in fips/kernels/cpu.py; a test compares
// them. A further format is a row here and the reader it names, in packed.h.
#pragma once

// name, number, entries under one code, bits of a code, kept entries of a code (-1: the bits say it), reader, and the
// side that whole groups fill (0: none)
#define FIPS_PATTERNS(ROW)                                            \
  ROW(FULL, 0, 1, 0, 1, FullReader, 0)                                \
  ROW(BITMASK, 1, 1, 1, -1, BitmaskReader, 0)                         \
  ROW(NM, 2, a.m, nm_code_bits(a.n, a.m), a.n, NmReader, a.cols)      \
  ROW(BLOCK_ROWS, 3, a.m, 1, -1, BlockRowsReader, a.rows)             \
  ROW(BLOCK_COLS, 4, a.m, 1, -1, BlockColsReader, a.cols)

// name, number, type in memory, its bits, reader. Integers of 2 to 7 bits are I8 with their `value_bits`.
#define FIPS_VALUES(ROW)                 \
  ROW(F32, 0, float, 32, F32Values)      \
  ROW(BF16, 1, uint16_t, 16, BF16Values) \
  ROW(F16, 2, uint16_t, 16, F16Values)   \
  ROW(I8, 3, int8_t, 8, I8Values)
