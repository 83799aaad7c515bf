// Up to 8 tokens in 8 bits beside integers of which nothing is left out.
#include "pairs512.h"

bool fips_avx512_pairs(const fips_matrix &a, const fips_call &c) {
  if (!takes_pairs(a)) return false;
  switch (c.tokens) {
  case 5: return pairs_path<5>(a, c);
  case 6: return pairs_path<6>(a, c);
  case 7: return pairs_path<7>(a, c);
  case 8: return pairs_path<8>(a, c);
  default: return with_few_tokens(c, [&](auto count) { return pairs_path<decltype(count)::value>(a, c); });
  }
}
