// The search of codes that are found together, by AVX2 or NEON.
#include "paths.h"
#include "registers256.h"
#include "trellis_search.h"

namespace {

// Integers of 32 bits, 8 in every register.
template <int PARTS> struct Lanes256 {
  static constexpr int lanes = 8 * PARTS;
  __m256i part[PARTS];
  template <class Body> FIPS_INLINE static Lanes256 each(Body &&body) {
    Lanes256 v;
    for (int i = 0; i < PARTS; ++i) v.part[i] = body(i);
    return v;
  }
  FIPS_INLINE static Lanes256 all(int32_t value) {
    return each([=](int) { return _mm256_set1_epi32(value); });
  }
  // As many numbers as lie there, again and again.
  template <int COUNT> FIPS_INLINE static Lanes256 spread(const int32_t *from) {
    if constexpr (COUNT == 1) return all(*from);
    static_assert(COUNT <= 2);
    long long both;
    std::memcpy(&both, from, sizeof(both));
    return each([=](int) { return _mm256_set1_epi64x(both); });
  }
  FIPS_INLINE static Lanes256 load(const void *from) {
    return each([=](int i) { return _mm256_load_si256(static_cast<const __m256i *>(from) + i); });
  }
  FIPS_INLINE void store(void *to) const {
    for (int i = 0; i < PARTS; ++i) _mm256_store_si256(static_cast<__m256i *>(to) + i, part[i]);
  }
  FIPS_INLINE Lanes256 exchanged(int places) const {
    const __m256i order = _mm256_xor_si256(_mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7), _mm256_set1_epi32(places & 7));
    return each([&](int i) { return _mm256_permutevar8x32_epi32(part[i ^ (places >> 3)], order); });
  }
  FIPS_INLINE Lanes256 plus(const Lanes256 &other) const {
    return each([&](int i) { return _mm256_add_epi32(part[i], other.part[i]); });
  }
  FIPS_INLINE Lanes256 minus(const Lanes256 &other) const {
    return each([&](int i) { return _mm256_sub_epi32(part[i], other.part[i]); });
  }
  FIPS_INLINE Lanes256 least(const Lanes256 &other) const {
    return each([&](int i) { return _mm256_min_epi32(part[i], other.part[i]); });
  }
  FIPS_INLINE Lanes256 high_bits() const {
    return each([&](int i) { return _mm256_and_si256(part[i], _mm256_set1_epi32(~15)); });
  }
  FIPS_INLINE void low_bits(uint8_t *to) const {
    const __m256i mask = _mm256_set1_epi32(15), zero = _mm256_setzero_si256();
    const __m256i one = _mm256_and_si256(part[0], mask), two = PARTS == 2 ? _mm256_and_si256(part[PARTS - 1], mask) : zero;
    const __m256i words = _mm256_permute4x64_epi64(_mm256_packs_epi32(one, two), 0xD8);
    const __m256i bytes = _mm256_permute4x64_epi64(_mm256_packus_epi16(words, zero), 0xD8);
    alignas(32) uint8_t all[32];
    _mm256_store_si256(reinterpret_cast<__m256i *>(all), bytes);
    std::memcpy(to, all, lanes);
  }
};

} // namespace

bool fips_search_256(const fips_search &search) {
  return search_paths<Lanes256<1>, Lanes256<1>, Lanes256<2>>(search);
}
