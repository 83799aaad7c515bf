// What the machine can do, which variant runs, and the tables they share.
#include <cstdlib>
#include <map>
#include <memory>
#include <mutex>
#include <utility>
#include <vector>

#include "packed.h"
#include "paths.h"

#if defined(__linux__) && defined(__x86_64__)
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace {

uint16_t unrank_subset(int64_t rank, int n, int m) {
  uint16_t mask = 0;
  for (int k = n; k >= 1; --k) {
    int position = k - 1;
    for (;;) { // the largest position with binomial(position, k) <= rank
      double next = 1;
      for (int i = 1; i <= k; ++i) next = next * (position + 1 - k + i) / i;
      if (position + 1 >= m || int64_t(next + 0.5) > rank) break;
      ++position;
    }
    double here = position < k ? 0 : 1;
    for (int i = 1; i <= k && position >= k; ++i) here = here * (position - k + i) / i;
    rank -= int64_t(here + 0.5);
    mask = uint16_t(mask | 1u << position);
  }
  return mask;
}

std::unique_ptr<std::vector<uint16_t>> make_table(int n, int m) {
  const int bits = nm_code_bits(n, m), groups = 16 / m;
  double subsets = 1;
  for (int i = 1; i <= n; ++i) subsets = subsets * (m - n + i) / i;
  std::vector<uint16_t> one(size_t(1) << bits, 0);
  for (int64_t code = 0; code < int64_t(subsets + 0.5); ++code) one[size_t(code)] = unrank_subset(code, n, m);
  auto table = std::make_unique<std::vector<uint16_t>>(size_t(1) << bits * groups, 0);
  for (size_t code = 0; code < table->size(); ++code)
    for (int g = 0; g < groups; ++g)
      (*table)[code] = uint16_t((*table)[code] | one[code >> g * bits & (one.size() - 1)] << g * m);
  return table;
}

#if defined(FIPS_EMULATE)
int detect() { return FIPS_AMX; }
#elif defined(__x86_64__) && (defined(__GNUC__) || defined(__clang__))
bool may_use_amx() { // the kernel wants to be asked for the tile registers
#if defined(FIPS_HAVE_AMX) && defined(__linux__)
  constexpr long request_permission = 0x1023, tile_data = 18;
  unsigned eax = 7, ebx = 0, ecx = 0, edx;
  __asm__("cpuid" : "+a"(eax), "+b"(ebx), "+c"(ecx), "=d"(edx));
  const bool present = (edx >> 22 & 1) && (edx >> 24 & 1) && (edx >> 25 & 1); // bf16, tiles, int8
  return present && syscall(SYS_arch_prctl, request_permission, tile_data) == 0;
#else
  return false;
#endif
}

int detect() {
  int level = FIPS_PORTABLE;
#if defined(FIPS_HAVE_AVX2)
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c"))
    level = FIPS_AVX2;
#endif
#if defined(FIPS_HAVE_AVX512)
  if (level == FIPS_AVX2 && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl") &&
      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vbmi") &&
      __builtin_cpu_supports("avx512vbmi2") &&
      __builtin_cpu_supports("avx512vnni"))
    level = FIPS_AVX512;
#endif
#if defined(FIPS_HAVE_AVX512_BF16)
  if (level == FIPS_AVX512 && __builtin_cpu_supports("avx512bf16")) level = FIPS_AVX512_BF16;
#endif
  if (level == FIPS_AVX512_BF16 && may_use_amx()) level = FIPS_AMX;
  return level;
}
#else
int detect() { return FIPS_PORTABLE; }
#endif

bool valid(const fips_matrix &a, const fips_call &c) {
  if (a.rows < 0 || a.cols <= 0 || c.tokens < 0 || c.threads < 1) return false;
  if (c.x_type < FIPS_F32 || c.x_type > FIPS_F16) return false;
  if (a.value_type == FIPS_I8 && a.cols > 65536) return false; // sums of bytes would leave 32 bits
  if (a.value_bits < 2 || a.value_bits > 8 || (a.value_bits < 8 && a.value_type != FIPS_I8)) return false;
  switch (a.format) {
  case FIPS_DENSE: return true;
  case FIPS_BITMASK: return a.row_start;
  case FIPS_NM: return fips_nm_table(a.n, a.m) && a.cols % a.m == 0;
  case FIPS_BLOCK_ROWS: return a.row_start && a.m > 0;
  case FIPS_BLOCK_COLS: return a.row_start && (a.m == 4 || a.m == 8);
  default: return false;
  }
}

// The path of a call that leaves it open. Tiles pay from a few tokens on, unless so little is kept that skipping the
// rest is faster.
int fastest_path(const fips_matrix &a, const fips_call &c, int level) {
  if (a.format == FIPS_BLOCK_ROWS) return FIPS_TOKENS; // values of a row do not lie together
  const bool matrix_unit = level >= FIPS_AMX && (a.value_type == FIPS_BF16 || a.value_type == FIPS_I8);
  if (c.tokens <= (matrix_unit ? 1 : 4)) return FIPS_DIRECT;
  if (level < FIPS_AVX2) return FIPS_TOKENS;
  const double kept = double(a.num_values) / (double(a.rows) * double(a.cols)); // limits measured on Zen 4
  if (level < FIPS_AVX512) return kept < 0.55 ? FIPS_TOKENS : FIPS_TILES;
  if (matrix_unit || a.value_type == FIPS_I8) return FIPS_TILES;
  const bool pairs = level >= FIPS_AVX512_BF16 && a.value_type == FIPS_BF16 && c.x_type == FIPS_BF16;
  const bool skip = pairs ? c.tokens > 32 && kept < 0.2 : kept < (c.tokens > 16 ? 0.6 : 0.3);
  return skip ? FIPS_TOKENS : FIPS_TILES;
}

// Whether the variant that will run reads integers of less than 8 bits as they are.
bool reads_narrow(const fips_matrix &a, const fips_call &c, int level) {
  if (a.format == FIPS_BLOCK_ROWS || c.path == FIPS_TOKENS) return false;
  return level >= FIPS_AVX2;
}

// The matrix with a byte for every value. The bytes stay with the calling thread, for its next call.
fips_matrix widened(const fips_matrix &a, const fips_call &c, int level) {
  fips_matrix wide = a;
  wide.value_bits = 8;
  static thread_local std::unique_ptr<int8_t[]> scratch;
  static thread_local int64_t capacity = 0;
  if (capacity < a.num_values) {
    scratch.reset(new int8_t[size_t(a.num_values)]);
    capacity = a.num_values;
  }
  int8_t *to = scratch.get();
  auto widen = fips_widen_portable;
#if defined(FIPS_HAVE_AVX2)
  if (level >= FIPS_AVX2) widen = fips_widen_avx2;
#endif
#if defined(FIPS_HAVE_AVX512)
  if (level >= FIPS_AVX512) widen = fips_widen_avx512;
#endif
  const auto *stream = static_cast<const uint8_t *>(a.values);
  const int bits = int(a.value_bits);
  const int64_t bytes = (a.num_values * bits + 7) / 8, run = 1 << 14;
#pragma omp parallel for num_threads(c.threads) schedule(static)
  for (int64_t first = 0; first < a.num_values; first += run)
    widen(stream, bytes, bits, first, a.num_values - first < run ? a.num_values - first : run, to + first);
  (void)level;
  wide.values = to;
  return wide;
}

} // namespace

const uint16_t *fips_nm_table(int n, int m) {
  static std::mutex lock;
  static std::map<std::pair<int, int>, std::unique_ptr<std::vector<uint16_t>>> tables;
  if (!(m == 2 || m == 4 || m == 8 || m == 16) || n < 1 || n >= m) return nullptr;
  const std::lock_guard<std::mutex> guard(lock);
  auto &table = tables[{n, m}];
  if (!table) table = make_table(n, m);
  return table->data();
}

extern "C" {

int fips_abi(void) { return FIPS_ABI; }

int fips_isa_level(void) {
  static const int level = detect();
  return level;
}

int fips_multiply(const fips_matrix *matrix, const fips_call *call) {
  if (!valid(*matrix, *call)) return -1;
  if (!matrix->rows || !call->tokens) return 0;
  const int level = call->isa < fips_isa_level() ? call->isa : fips_isa_level();
  fips_call chosen = *call;
  if (chosen.path == FIPS_AUTO) chosen.path = fastest_path(*matrix, chosen, level);
  fips_matrix wide;
  if (matrix->value_bits < 8 && !reads_narrow(*matrix, chosen, level)) {
    wide = widened(*matrix, chosen, level);
    matrix = &wide;
  }
#if defined(FIPS_HAVE_AMX)
  if (level >= FIPS_AMX && fips_amx(*matrix, chosen)) return 0;
#endif
#if defined(FIPS_HAVE_AVX512_BF16)
  if (level >= FIPS_AVX512_BF16 && fips_avx512_bf16(*matrix, chosen)) return 0;
#endif
#if defined(FIPS_HAVE_AVX512)
  if (level >= FIPS_AVX512) return fips_avx512(*matrix, chosen) ? 0 : -1;
#endif
#if defined(FIPS_HAVE_AVX2)
  if (level >= FIPS_AVX2) return fips_avx2(*matrix, chosen) ? 0 : -1;
#endif
  return fips_portable(*matrix, chosen) ? 0 : -1;
}

int fips_multiply_again(const fips_matrix *matrix, const fips_call *call, const void *x, void *y) {
  fips_call again = *call;
  again.x = x;
  again.y = y;
  return fips_multiply(matrix, &again);
}

int fips_multiply_columns(const fips_matrix *matrix, const fips_call *call) {
  if (!valid(*matrix, *call) || matrix->value_bits < 8) return -1;
  if (!matrix->rows || !call->tokens) return -1;
  const int level = call->isa < fips_isa_level() ? call->isa : fips_isa_level();
#if defined(FIPS_HAVE_AVX512)
  if (level >= FIPS_AVX512) return fips_columns_avx512(*matrix, *call) ? 0 : -1;
#endif
#if defined(FIPS_HAVE_AVX2)
  if (level >= FIPS_AVX2) return fips_columns_avx2(*matrix, *call) ? 0 : -1;
#endif
  return fips_columns_portable(*matrix, *call) ? 0 : -1;
}

int64_t fips_row_starts(const fips_matrix *matrix, uint32_t *row_start) {
  fips_matrix a = *matrix;
  a.row_start = row_start; // the readers keep the pointer; only masks are read here
  int64_t kept = 0;
  const bool known = with_reader(a, [&](const auto &reader) {
    int64_t first = 0;
    for (int64_t row = 0; row < a.rows; ++row) {
      if (row % reader.stride() == 0) first = kept;
      row_start[row] = uint32_t(first);
      for (int64_t k = 0; k < a.cols; k += 64) kept += popcount64(reader.mask(row, k));
    }
  });
  return known ? kept : -1;
}

} // extern "C"
