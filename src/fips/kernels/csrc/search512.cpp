// The search of codes that are found together, by AVX-512.
#include <immintrin.h>

#include "paths.h"
#include "trellis_search.h"

namespace {

// 16 integers of 32 bits.
struct Lanes512 {
  static constexpr int lanes = 16;
  __m512i all_lanes;
  FIPS_INLINE static Lanes512 all(int32_t value) { return {_mm512_set1_epi32(value)}; }
  // As many numbers as lie there, again and again.
  template <int COUNT> FIPS_INLINE static Lanes512 spread(const int32_t *from) {
    if constexpr (COUNT == 1) return all(*from);
    if constexpr (COUNT == 4) return {_mm512_broadcast_i32x4(_mm_load_si128(reinterpret_cast<const __m128i *>(from)))};
    static_assert(COUNT == 1 || COUNT == 2 || COUNT == 4);
    long long both;
    std::memcpy(&both, from, sizeof(both));
    return {_mm512_set1_epi64(both)};
  }
  FIPS_INLINE static Lanes512 load(const void *from) { return {_mm512_load_si512(from)}; }
  FIPS_INLINE void store(void *to) const { _mm512_store_si512(to, all_lanes); }
  FIPS_INLINE Lanes512 exchanged(int places) const {
    const __m512i order = _mm512_set_epi32(15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0);
    return {_mm512_permutexvar_epi32(_mm512_xor_si512(order, _mm512_set1_epi32(places)), all_lanes)};
  }
  FIPS_INLINE Lanes512 plus(const Lanes512 &other) const { return {_mm512_add_epi32(all_lanes, other.all_lanes)}; }
  FIPS_INLINE Lanes512 minus(const Lanes512 &other) const { return {_mm512_sub_epi32(all_lanes, other.all_lanes)}; }
  FIPS_INLINE Lanes512 least(const Lanes512 &other) const { return {_mm512_min_epi32(all_lanes, other.all_lanes)}; }
  FIPS_INLINE Lanes512 high_bits() const { return {_mm512_and_si512(all_lanes, _mm512_set1_epi32(~15))}; }
  FIPS_INLINE void low_bits(uint8_t *to) const {
    const __m128i bytes = _mm512_cvtepi32_epi8(_mm512_and_si512(all_lanes, _mm512_set1_epi32(15)));
    _mm_storeu_si128(reinterpret_cast<__m128i *>(to), bytes);
  }
};

} // namespace

bool fips_search_avx512(const fips_search &search) {
  const int64_t runs = search.columns * runs_of_column(search), side = Lanes512::lanes >> search.bits;
  if (runs < side * search.threads) return fips_search_256(search); // of fewer runs side by side more threads have some
  return search_paths<Lanes512, Lanes512, Lanes512>(search);
}
