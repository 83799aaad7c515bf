// Many tokens with AVX2 with FMA, or with NEON.
#include "paths.h"
#include "row_blocks256.h"

#if !defined(__aarch64__)
#include "digit_blocks256.h"
#endif

bool fips_tiles_256(const fips_matrix &a, const fips_call &c) {
#if !defined(__aarch64__)
  if (a.value_type == FIPS_I8 && fixed_planes(c) == 1) {
    switch (a.num_levels || a.memory ? 8 : a.value_bits) {
    case 2: return digit_blocks_path<UnsignedBytes<2>>(a, c);
    case 3: return digit_blocks_path<UnsignedBytes<3>>(a, c);
    case 4: return digit_blocks_path<UnsignedBytes<4>>(a, c);
    case 5: return digit_blocks_path<UnsignedBytes<5>>(a, c);
    case 6: return digit_blocks_path<UnsignedBytes<6>>(a, c);
    default: return digit_blocks_path<Words>(a, c);
    }
  }
#endif
  return blocks_path<Vector8, 6, 2>(a, c);
}
