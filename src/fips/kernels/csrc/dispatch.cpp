// What the machine can do, which variant runs, and the tables they share.
#include <atomic>
#include <cstddef>
#include <cstdlib>
#include <map>
#include <memory>
#include <mutex>
#include <new>
#include <utility>
#include <vector>

#include "checks.h"
#include "exact.h"
#include "packed.h"
#include "paths.h"

#if defined(__linux__) && defined(__x86_64__)
#include <sys/syscall.h>
#include <unistd.h>
#elif defined(__linux__) && defined(__aarch64__)
#include <sys/auxv.h>
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
int detect() { return (2 << FIPS_AMX) - 1; }
#elif defined(__x86_64__) && (defined(__GNUC__) || defined(__clang__))
// Everything a variant is compiled with (CMakeLists.txt) is asked for, with the support of the operating system.
bool may_use_amx() { // the kernel wants to be asked for the tile registers
#if defined(FIPS_HAVE_AMX) && defined(__linux__)
  constexpr long request_permission = 0x1023, tile_data = 18;
  unsigned eax = 7, ebx = 0, ecx = 0, edx;
  __asm__("cpuid" : "+a"(eax), "+b"(ebx), "+c"(ecx), "=d"(edx));
  const bool amx_bf16 = edx >> 22 & 1, amx_tile = edx >> 24 & 1, amx_int8 = edx >> 25 & 1;
  return amx_bf16 && amx_tile && amx_int8 && syscall(SYS_arch_prctl, request_permission, tile_data) == 0;
#else
  return false;
#endif
}

#define HAS(name) (__builtin_cpu_supports(name) != 0)

int detect() {
  int found = 1 << FIPS_PORTABLE;
  const auto add = [&](int isa, int needed, bool there) {
    if (there && found >> needed & 1) found |= 1 << isa;
  };
#if defined(FIPS_HAVE_256)
  add(FIPS_VECTORS_256, FIPS_PORTABLE,
      HAS("avx2") && HAS("fma") && HAS("f16c") && HAS("popcnt") && HAS("bmi") && HAS("bmi2"));
#endif
#if defined(FIPS_HAVE_AVX_VNNI)
  add(FIPS_AVX_VNNI, FIPS_VECTORS_256, HAS("avxvnni"));
#endif
#if defined(FIPS_HAVE_AVX512)
  add(FIPS_AVX512, FIPS_VECTORS_256,
      HAS("avx512f") && HAS("avx512bw") && HAS("avx512dq") && HAS("avx512vl") && HAS("avx512vbmi") &&
          HAS("avx512vbmi2") && HAS("avx512vnni") && HAS("gfni"));
#endif
#if defined(FIPS_HAVE_AVX512_BF16)
  add(FIPS_AVX512_BF16, FIPS_AVX512, HAS("avx512bf16"));
#endif
  if (found >> FIPS_AVX512_BF16 & 1) add(FIPS_AMX, FIPS_AVX512_BF16, may_use_amx());
  return found;
}

#undef HAS
#elif defined(FIPS_HAVE_256) && defined(__APPLE__)
int detect() { return 1 << FIPS_PORTABLE | 1 << FIPS_VECTORS_256; } // every processor of theirs for arm64
#elif defined(FIPS_HAVE_256) && defined(__linux__)
int detect() {
  constexpr unsigned long dot_products = 1ul << 20; // HWCAP_ASIMDDP
  return 1 << FIPS_PORTABLE | (getauxval(AT_HWCAP) & dot_products ? 1 << FIPS_VECTORS_256 : 0);
}
#else
int detect() { return 1 << FIPS_PORTABLE; }
#endif

bool uses_matrix_unit(const fips_matrix &a, int level) {
  return level >= FIPS_AMX && (a.value_type == FIPS_BF16 || (a.value_type == FIPS_I8 && !a.scale_group));
}

// Up to how many tokens a matrix is read in memory order, each row for all of them.
int most_direct(const fips_matrix &a, const fips_call &c, int level) {
  if (uses_matrix_unit(a, level)) return 1;
  return level >= FIPS_AVX512 && c.tokens > 4 && fixed_planes(c) == 1 && takes_pairs(a) ? 8 : 4;
}

// The path of a call that leaves it open. Tiles pay from a few tokens on, unless so little is kept that skipping the
// rest is faster.
int fastest_path(const fips_matrix &a, const fips_call &c, int level) {
  if (a.format == FIPS_BLOCK_ROWS) return FIPS_TOKENS; // values of a row do not lie together
  if (c.tokens <= most_direct(a, c, level)) return FIPS_DIRECT;
  if (level < FIPS_VECTORS_256) return FIPS_TOKENS;
  const double kept = double(a.num_values) / (double(a.rows) * double(a.cols)); // limits measured on Zen 4
  if (level < FIPS_AVX512) return kept < 0.55 ? FIPS_TOKENS : FIPS_TILES;
  if (uses_matrix_unit(a, level) || a.value_type == FIPS_I8) return FIPS_TILES; // bytes are multiplied as they are
  const bool pairs = level >= FIPS_AVX512_BF16 && a.value_type == FIPS_BF16 && c.x_type == FIPS_BF16;
  const bool skip = pairs ? c.tokens > 32 && kept < 0.2 : kept < (c.tokens > 16 ? 0.6 : 0.3);
  return skip ? FIPS_TOKENS : FIPS_TILES;
}

// Whether the variant for AVX2 multiplies tokens of 8 bits on the tiles path: see fips_tiles_256.
bool tiles_of_digits(const fips_call &c) {
#if defined(__aarch64__)
  (void)c;
  return false;
#else
  return c.path == FIPS_TILES && fixed_planes(c) == 1;
#endif
}

// Whether the variant that will run reads integers of less than 8 bits as they are.
bool reads_narrow(const fips_matrix &a, const fips_call &c, int level) {
  if (a.format == FIPS_BLOCK_ROWS || c.path == FIPS_TOKENS) return false;
  if (a.memory && !recalls(a)) return false;
  if (a.memory && level < FIPS_AVX512 && (a.cols % 64 || !(c.path == FIPS_DIRECT || tiles_of_digits(c)))) return false;
  if (a.num_levels && a.format != FIPS_FULL) return false;
  return level >= FIPS_VECTORS_256;
}

// The matrix with a byte for every value, for the time of a call.
fips_matrix widened(const fips_matrix &a, const fips_call &c, int level) {
  fips_matrix wide = a;
  wide.value_bits = 8;
  wide.value_bytes = a.num_values;
  int8_t *to = scratch<int8_t>(Scratch::bytes, a.num_values);
  auto widen = fips_widen_portable;
#if defined(FIPS_HAVE_256)
  if (level >= FIPS_VECTORS_256) widen = fips_widen_256;
#endif
#if defined(FIPS_HAVE_AVX512)
  if (level >= FIPS_AVX512) widen = fips_widen_avx512;
#endif
  const auto *stream = static_cast<const uint8_t *>(a.values);
  const int bits = int(a.value_bits);
  const int64_t bytes = a.value_bytes, run = 1 << 14;
#pragma omp parallel for num_threads(c.threads) schedule(static)
  for (int64_t first = 0; first < a.num_values; first += run) {
    const int64_t count = min_of(a.num_values - first, run);
    widen(stream, bytes, bits, first, count, to + first);
    const int8_t *middle = a.levels + a.num_levels / 2; // that of code 0
    for (int64_t i = first; a.num_levels && !a.memory && i < first + count; ++i) to[i] = middle[to[i]];
  }
  auto recall = fips_recall_portable;
#if defined(FIPS_HAVE_256)
  if (level >= FIPS_VECTORS_256) recall = fips_recall_256;
#endif
  if (a.memory) recall(a, c.threads, to);
  (void)level;
  wide.history = nullptr;
  wide.num_history = wide.memory = wide.run = 0;
  wide.levels = nullptr;
  wide.num_levels = 0;
  wide.values = to;
  return wide;
}

bool multiply(const fips_matrix &a, const fips_call &c, int level) {
#if defined(FIPS_HAVE_AMX)
  if (level >= FIPS_AMX && fips_amx(a, c)) return true;
#endif
#if defined(FIPS_HAVE_AVX512_BF16)
  if (level >= FIPS_AVX512_BF16 && fips_avx512_bf16(a, c)) return true;
#endif
#if defined(FIPS_HAVE_AVX512)
  if (level >= FIPS_AVX512) return fips_avx512(a, c);
#endif
#if defined(FIPS_HAVE_AVX_VNNI)
  if (level >= FIPS_AVX_VNNI && fips_avx_vnni(a, c)) return true;
#endif
#if defined(FIPS_HAVE_256)
  if (level >= FIPS_VECTORS_256) return fips_256(a, c);
#endif
  return fips_portable(a, c);
}

// The call with its tokens in the rotated columns of the matrix, in scratch memory.
fips_call rotated(const fips_matrix &a, const fips_call &c, int level) {
  float *to = scratch<float>(Scratch::rotated, c.tokens * a.cols);
#if defined(FIPS_HAVE_256)
  auto *rotate = level >= FIPS_VECTORS_256 ? fips_rotate_256 : fips_rotate_portable;
#else
  auto *rotate = fips_rotate_portable;
#endif
  rotate(a, c, to);
  (void)level;
  fips_call turned = c;
  turned.x = to;
  turned.x_type = FIPS_F32;
  turned.x_stride = a.cols;
  turned.x_length = c.tokens * a.cols;
  return turned;
}

FipsMagnitude *magnitude_of(int level) {
#if defined(FIPS_HAVE_AVX512)
  if (level >= FIPS_AVX512) return fips_magnitude_avx512;
#endif
#if defined(FIPS_HAVE_256)
  if (level >= FIPS_VECTORS_256) return fips_magnitude_256;
#endif
  (void)level;
  return fips_magnitude_portable;
}

constexpr int64_t kFewestTokens = 64; // of a part: a row is decoded once for every part

// Tokens that fit, laid out, into what a thread keeps, but some however long they are.
int64_t tokens_that_fit(const fips_matrix &a, const fips_call &c) {
  const int64_t widest = a.value_type == FIPS_BF16 && c.x_type == FIPS_F32 ? 6 : 4; // bytes of a laid out number
  const int64_t turned = a.rotation > 1 ? 4 : 0;
  const int64_t fit = FIPS_KEPT_SCRATCH / ((widest + turned) * a.cols);
  return fit < kFewestTokens ? kFewestTokens : fit;
}

// Tokens that are laid out at a time where all threads share the rows, in parts of equal size.
int64_t tokens_at_a_time(const fips_matrix &a, const fips_call &c) {
  const int64_t fit = tokens_that_fit(a, c);
  if (c.tokens <= fit) return c.tokens;
  const int64_t unit = fit >= 512 ? 512 : 16, most = fit / unit * unit;
  const int64_t parts = (c.tokens + most - 1) / most;
  return min_of(round_up((c.tokens + parts - 1) / parts, unit), most);
}

fips_call part_of(const fips_call &c, int64_t first, int64_t count) {
  const auto size = [](int32_t type) { return type == FIPS_F32 ? 4 : 2; };
  fips_call part = c;
  part.x = static_cast<const char *>(c.x) + first * c.x_stride * size(c.x_type);
  part.y = static_cast<char *>(c.y) + first * c.y_stride * size(c.y_type);
  part.tokens = count;
  return part;
}

constexpr int64_t kMostTogether = 16;

int check_product(const fips_matrix &a, const fips_call &c) {
  int status = fips_check_matrix(a);
  if (!status) status = fips_check_call(c, a.cols, a.rows);
  if (!status) status = fips_check_rows(a);
  return status;
}

// No exception leaves the library.
template <class Body> int caught(Body &&body) {
  try {
    return body();
  } catch (const std::bad_alloc &) {
    return FIPS_NO_MEMORY;
  } catch (...) {
    return FIPS_INVALID;
  }
}

// Runs what may ask for memory.
template <class Body> int guarded(int threads, Body &&body) {
  return caught([&] {
    const ScratchOfCall scratch(threads);
    return body();
  });
}

// One part of the tokens, with all threads of the call.
bool multiply_part(const fips_matrix &a, const fips_call &call, int level, bool fixed_point) {
  const fips_call part = a.rotation > 1 ? rotated(a, call, level) : call;
  if (!multiply(a, part, level)) return false;
  fips_mend_tokens(a, part, fixed_point, magnitude_of(level));
  return true;
}

// Tokens of a part where threads take parts of their own, all of even size; 0 where they had better share the rows. A
// part is laid out, multiplied and written by one thread: lines that another core has read or written are slow to
// fetch, and a layer of few rows has too few shares for threads to take. With fewer tokens, or with rows so long that
// fewer fit into what a thread keeps, decoding every row once more would cost more than that.
int64_t tokens_apart(const fips_matrix &a, const fips_call &c) {
  constexpr int64_t most = 256;
  const int64_t fewest = a.rows < 1024 ? 96 : 128, fit = tokens_that_fit(a, c);
  if (c.threads == 1 || c.tokens < fewest * c.threads || fit < fewest) return 0;
  return even_share(c.tokens, c.threads, min_of(fit, most), 16);
}

int multiply_apart(const fips_matrix &a, const fips_call &c, int level, bool fixed_point, int64_t at_a_time) {
  fips_call alone = c;
  alone.threads = 1;
  std::atomic<int> status{0};
#pragma omp parallel for num_threads(c.threads) schedule(dynamic)
  for (int64_t first = 0; first < c.tokens; first += at_a_time) {
    const fips_call part = part_of(alone, first, min_of(at_a_time, c.tokens - first));
    const auto body = [&] { return multiply_part(a, part, level, fixed_point) ? 0 : FIPS_UNSUPPORTED; };
    const int one = thread_number() == 0 ? caught(body) : guarded(1, body); // the first is in the call already
    if (one) status = one;
  }
  return status;
}

// The call with the path that it takes.
fips_call with_path(const fips_matrix &a, const fips_call &c, int level) {
  fips_call chosen = c;
  if (c.path == FIPS_AUTO) chosen.path = fastest_path(a, c, level);
  return chosen;
}

bool wants_bytes(const fips_matrix &a, const fips_call &c, int level) {
  return a.value_bits < 8 && !reads_narrow(a, c, level);
}

bool is_fixed_point(const fips_matrix &a, const fips_call &c, int level) {
  const bool digits = level >= FIPS_AVX512 || (level >= FIPS_VECTORS_256 && fixed_planes(c) == 1);
  return a.value_type == FIPS_I8 && digits && c.path != FIPS_TOKENS;
}

int multiply_in_parts(const fips_matrix &a, const fips_call &c) {
  const int level = best_level(c.isa);
  const fips_call chosen = with_path(a, c, level);
  if (c.end_row - c.first_row != a.rows && (chosen.path != FIPS_DIRECT || level < FIPS_VECTORS_256)) return FIPS_UNSUPPORTED;
  const fips_matrix read = wants_bytes(a, chosen, level) ? widened(a, chosen, level) : a;
  const bool fixed_point = is_fixed_point(a, chosen, level);
  if (const int64_t apart = tokens_apart(a, c)) return multiply_apart(read, chosen, level, fixed_point, apart);
  const int64_t at_a_time = tokens_at_a_time(a, c);
  for (int64_t first = 0; first < c.tokens; first += at_a_time) {
    const fips_call part = part_of(chosen, first, min_of(at_a_time, c.tokens - first));
    if (!multiply_part(read, part, level, fixed_point)) return FIPS_UNSUPPORTED;
  }
  return 0;
}

int multiply_checked(const fips_matrix &a, const fips_call &c) {
  if (!a.rows || !c.tokens) return 0;
  return guarded(c.threads, [&] { return multiply_in_parts(a, c); });
}

struct Product {
  const fips_matrix *matrix;
  fips_call call;
};

// Whether threads may take parts of the rows: few tokens, read as they lie.
bool rows_may_part(const Product &one) {
  const int level = best_level(one.call.isa);
  const fips_call chosen = with_path(*one.matrix, one.call, level);
  const bool direct = level >= FIPS_VECTORS_256 && chosen.path == FIPS_DIRECT && one.matrix->rows && one.call.tokens;
  return direct && one.matrix->format != FIPS_BLOCK_ROWS && !wants_bytes(*one.matrix, chosen, level);
}

int64_t units_of(const Product &one) { return (one.matrix->rows + FIPS_ROW_UNIT - 1) / FIPS_ROW_UNIT; }

double cost_of_unit(const Product &one) { return double(one.matrix->num_values) * double(one.matrix->value_bits) / double(units_of(one)); }

// Of all products one behind the other the part of one thread: rows of about as many bytes for each. Columns of x are
// turned once for products of the same turn that follow each other.
int multiply_share(const std::vector<Product> &products, int thread, int threads) {
  double all = 0, before = 0;
  for (const Product &one : products) all += cost_of_unit(one) * double(units_of(one));
  const double from = all * thread / threads, to = all * (thread + 1) / threads;
  int64_t turn = 1;
  fips_call turned = {};
  for (const Product &one : products) {
    const fips_matrix &a = *one.matrix;
    const int64_t units = units_of(one);
    const auto unit_at = [&](double cost) { // the first that begins behind it, counted from the middle of units
      const double place = (cost - before) / cost_of_unit(one) + 0.5;
      return place <= 0 ? int64_t(0) : place >= double(units) ? units : int64_t(place);
    };
    const int64_t first = thread ? unit_at(from) : 0, end = thread + 1 < threads ? unit_at(to) : units;
    before += cost_of_unit(one) * double(units);
    if (first >= end) continue;
    const int level = best_level(one.call.isa);
    fips_call part = with_path(a, one.call, level);
    part.threads = 1;
    part.first_row = first * FIPS_ROW_UNIT;
    part.end_row = min_of(end * FIPS_ROW_UNIT, a.rows);
    if (a.rotation > 1) {
      if (a.rotation != turn) turned = rotated(a, part, level), turn = a.rotation;
      part.x = turned.x, part.x_type = turned.x_type, part.x_stride = turned.x_stride, part.x_length = turned.x_length;
    }
    if (!multiply(a, part, level)) return FIPS_UNSUPPORTED;
    fips_mend_tokens(a, part, is_fixed_point(a, part, level), magnitude_of(level));
  }
  return 0;
}

int multiply_side_by_side(const std::vector<Product> &products) {
  std::atomic<int> status{0};
#pragma omp parallel num_threads(products[0].call.threads)
  {
    const auto body = [&] { return multiply_share(products, thread_number(), thread_count()); };
    const int one = thread_number() == 0 ? caught(body) : guarded(1, body); // the first is in the call already
    if (one) status = one;
  }
  return status;
}

bool multiply_columns(const fips_matrix &a, const fips_call &c) {
  const int level = best_level(c.isa);
#if defined(FIPS_HAVE_AVX512)
  if (level >= FIPS_AVX512) return fips_columns_avx512(a, c);
#endif
#if defined(FIPS_HAVE_256)
  if (level >= FIPS_VECTORS_256) return fips_columns_256(a, c);
#endif
  (void)level;
  return fips_columns_portable(a, c);
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

int fips_pattern(int32_t format, int32_t n, int32_t m, int32_t row[3]) {
  fips_matrix a = {};
  a.format = format;
  a.n = n;
  a.m = m;
  if (!row) return FIPS_INVALID;
  if (!fips_format_is_known(a)) return FIPS_UNSUPPORTED;
  const PatternSizes sizes = pattern_sizes(a);
  row[0] = int32_t(sizes.group);
  row[1] = int32_t(sizes.bits);
  row[2] = int32_t(sizes.kept);
  return 0;
}

int fips_value_bits(int32_t value_type) {
  const int bits = value_type_bits(value_type);
  return bits ? bits : int(FIPS_UNSUPPORTED);
}

int64_t fips_layout(int64_t *numbers, int64_t length) {
  const int64_t found[] = {
      int64_t(sizeof(fips_matrix)),
      int64_t(offsetof(fips_matrix, rows)),
      int64_t(offsetof(fips_matrix, cols)),
      int64_t(offsetof(fips_matrix, format)),
      int64_t(offsetof(fips_matrix, value_type)),
      int64_t(offsetof(fips_matrix, n)),
      int64_t(offsetof(fips_matrix, m)),
      int64_t(offsetof(fips_matrix, values)),
      int64_t(offsetof(fips_matrix, pattern)),
      int64_t(offsetof(fips_matrix, num_values)),
      int64_t(offsetof(fips_matrix, value_bytes)),
      int64_t(offsetof(fips_matrix, pattern_bytes)),
      int64_t(offsetof(fips_matrix, row_start)),
      int64_t(offsetof(fips_matrix, scales)),
      int64_t(offsetof(fips_matrix, num_starts)),
      int64_t(offsetof(fips_matrix, num_scales)),
      int64_t(offsetof(fips_matrix, value_bits)),
      int64_t(offsetof(fips_matrix, group_scales)),
      int64_t(offsetof(fips_matrix, num_group_scales)),
      int64_t(offsetof(fips_matrix, scale_group)),
      int64_t(offsetof(fips_matrix, levels)),
      int64_t(offsetof(fips_matrix, num_levels)),
      int64_t(offsetof(fips_matrix, history)),
      int64_t(offsetof(fips_matrix, num_history)),
      int64_t(offsetof(fips_matrix, memory)),
      int64_t(offsetof(fips_matrix, run)),
      int64_t(offsetof(fips_matrix, rotation)),
      int64_t(sizeof(fips_call)),
      int64_t(offsetof(fips_call, x)),
      int64_t(offsetof(fips_call, y)),
      int64_t(offsetof(fips_call, bias)),
      int64_t(offsetof(fips_call, tokens)),
      int64_t(offsetof(fips_call, x_columns)),
      int64_t(offsetof(fips_call, y_columns)),
      int64_t(offsetof(fips_call, x_stride)),
      int64_t(offsetof(fips_call, y_stride)),
      int64_t(offsetof(fips_call, x_length)),
      int64_t(offsetof(fips_call, y_length)),
      int64_t(offsetof(fips_call, bias_length)),
      int64_t(offsetof(fips_call, x_type)),
      int64_t(offsetof(fips_call, y_type)),
      int64_t(offsetof(fips_call, threads)),
      int64_t(offsetof(fips_call, isa)),
      int64_t(offsetof(fips_call, path)),
      int64_t(offsetof(fips_call, activation_bits)),
      int64_t(offsetof(fips_call, first_row)),
      int64_t(offsetof(fips_call, end_row)),
      int64_t(sizeof(fips_search)),
      int64_t(offsetof(fips_search, wanted)),
      int64_t(offsetof(fips_search, weight)),
      int64_t(offsetof(fips_search, codes)),
      int64_t(offsetof(fips_search, numbers)),
      int64_t(offsetof(fips_search, columns)),
      int64_t(offsetof(fips_search, rows)),
      int64_t(offsetof(fips_search, length)),
      int64_t(offsetof(fips_search, run)),
      int64_t(offsetof(fips_search, bits)),
      int64_t(offsetof(fips_search, memory)),
      int64_t(offsetof(fips_search, levels)),
      int64_t(offsetof(fips_search, history)),
      int64_t(offsetof(fips_search, num_levels)),
      int64_t(offsetof(fips_search, num_history)),
      int64_t(offsetof(fips_search, threads)),
      int64_t(offsetof(fips_search, isa)),
      int64_t(offsetof(fips_search, unit)),
      int64_t(sizeof(fips_attention)),
      int64_t(offsetof(fips_attention, queries)),
      int64_t(offsetof(fips_attention, keys)),
      int64_t(offsetof(fips_attention, values)),
      int64_t(offsetof(fips_attention, y)),
      int64_t(offsetof(fips_attention, hidden)),
      int64_t(offsetof(fips_attention, queries_length)),
      int64_t(offsetof(fips_attention, keys_length)),
      int64_t(offsetof(fips_attention, values_length)),
      int64_t(offsetof(fips_attention, y_length)),
      int64_t(offsetof(fips_attention, hidden_length)),
      int64_t(offsetof(fips_attention, examples)),
      int64_t(offsetof(fips_attention, heads)),
      int64_t(offsetof(fips_attention, key_heads)),
      int64_t(offsetof(fips_attention, length)),
      int64_t(offsetof(fips_attention, size)),
      int64_t(offsetof(fips_attention, key_strides)),
      int64_t(offsetof(fips_attention, value_strides)),
      int64_t(offsetof(fips_attention, scale)),
      int64_t(offsetof(fips_attention, cap)),
      int64_t(offsetof(fips_attention, type)),
      int64_t(offsetof(fips_attention, rounded)),
      int64_t(offsetof(fips_attention, threads)),
      int64_t(offsetof(fips_attention, isa)),
      int64_t(sizeof(fips_norm)),
      int64_t(offsetof(fips_norm, x)),
      int64_t(offsetof(fips_norm, weight)),
      int64_t(offsetof(fips_norm, y)),
      int64_t(offsetof(fips_norm, length)),
      int64_t(offsetof(fips_norm, size)),
      int64_t(offsetof(fips_norm, weight_length)),
      int64_t(offsetof(fips_norm, eps)),
      int64_t(offsetof(fips_norm, kind)),
      int64_t(offsetof(fips_norm, type)),
      int64_t(offsetof(fips_norm, isa)),
      int64_t(sizeof(fips_block)),
      int64_t(offsetof(fips_block, x)),
      int64_t(offsetof(fips_block, y)),
      int64_t(offsetof(fips_block, room)),
      int64_t(offsetof(fips_block, length)),
      int64_t(offsetof(fips_block, room_length)),
      int64_t(offsetof(fips_block, matrices)),
      int64_t(offsetof(fips_block, calls)),
      int64_t(offsetof(fips_block, norms)),
      int64_t(offsetof(fips_block, cosines)),
      int64_t(offsetof(fips_block, sines)),
      int64_t(offsetof(fips_block, angles_length)),
      int64_t(offsetof(fips_block, angles_stride)),
      int64_t(offsetof(fips_block, turned)),
      int64_t(offsetof(fips_block, keys)),
      int64_t(offsetof(fips_block, values)),
      int64_t(offsetof(fips_block, hidden)),
      int64_t(offsetof(fips_block, keys_length)),
      int64_t(offsetof(fips_block, values_length)),
      int64_t(offsetof(fips_block, hidden_length)),
      int64_t(offsetof(fips_block, examples)),
      int64_t(offsetof(fips_block, heads)),
      int64_t(offsetof(fips_block, key_heads)),
      int64_t(offsetof(fips_block, before)),
      int64_t(offsetof(fips_block, size)),
      int64_t(offsetof(fips_block, norm_lengths)),
      int64_t(offsetof(fips_block, key_strides)),
      int64_t(offsetof(fips_block, value_strides)),
      int64_t(offsetof(fips_block, scale)),
      int64_t(offsetof(fips_block, cap)),
      int64_t(offsetof(fips_block, eps)),
      int64_t(offsetof(fips_block, norm_kinds)),
      int64_t(offsetof(fips_block, activation)),
      int64_t(offsetof(fips_block, type)),
      int64_t(offsetof(fips_block, angles_type)),
      int64_t(offsetof(fips_block, rounded)),
      int64_t(offsetof(fips_block, threads)),
      int64_t(offsetof(fips_block, isa)),
  };
  const int64_t count = int64_t(sizeof(found) / sizeof(*found));
  for (int64_t i = 0; numbers && i < length && i < count; ++i) numbers[i] = found[i];
  return count;
}

int fips_isas(void) {
  static const int found = detect();
  return found;
}

int fips_multiply(const fips_matrix *matrix, const fips_call *call) {
  if (!matrix || !call) return FIPS_INVALID;
  const int status = check_product(*matrix, *call);
  return status ? status : multiply_checked(*matrix, *call);
}

int fips_multiply_again(const fips_matrix *matrix, const fips_call *call, const void *x, void *y) {
  if (!call) return FIPS_INVALID;
  fips_call again = *call;
  again.x = x;
  again.y = y;
  return fips_multiply(matrix, &again);
}

int fips_multiply_together(const fips_matrix *const *matrices, const fips_call *const *calls, int64_t count, const void *x,
                           void *const *ys) {
  if (!matrices || !calls || !ys || count < 1 || count > kMostTogether) return FIPS_INVALID;
  return caught([&] {
    std::vector<Product> products;
    bool together = true;
    for (int64_t i = 0; i < count; ++i) {
      if (!matrices[i] || !calls[i]) return int(FIPS_INVALID);
      Product one = {matrices[i], *calls[i]};
      one.call.x = x;
      one.call.y = ys[i];
      products.push_back(one);
      const fips_call &first = products[0].call;
      together &= one.call.threads == first.threads && one.call.x_columns == first.x_columns &&
                  one.call.tokens == first.tokens && one.call.x_type == first.x_type && one.call.x_stride == first.x_stride;
    }
    for (const Product &one : products) {
      const int status = check_product(*one.matrix, one.call);
      if (status) return status;
      together = together && rows_may_part(one);
    }
    if (together) return guarded(products[0].call.threads, [&] { return multiply_side_by_side(products); });
    for (const Product &one : products)
      if (const int status = multiply_checked(*one.matrix, one.call)) return status;
    return 0;
  });
}

int fips_multiply_columns(const fips_matrix *matrix, const fips_call *call) {
  if (!matrix || !call) return FIPS_INVALID;
  int status = fips_check_matrix(*matrix);
  if (!status) status = fips_check_call(*call, matrix->rows, matrix->cols);
  if (status) return status;
  if (call->bias || matrix->scales || matrix->group_scales || matrix->rotation > 1) return FIPS_INVALID;
  if (!matrix->rows || !call->tokens) return FIPS_UNSUPPORTED;
  return guarded(call->threads, [&] { return multiply_columns(*matrix, *call) ? 0 : FIPS_UNSUPPORTED; });
}

int fips_search_paths(const fips_search *search) {
  if (!search) return FIPS_INVALID;
  const int status = fips_check_search(*search);
  if (status || !search->length) return status;
  const int level = best_level(search->isa);
  return guarded(int(search->threads), [&] {
#if defined(FIPS_HAVE_AVX512)
    if (level >= FIPS_AVX512) return fips_search_avx512(*search) ? 0 : FIPS_UNSUPPORTED;
#endif
#if defined(FIPS_HAVE_256)
    if (level >= FIPS_VECTORS_256) return fips_search_256(*search) ? 0 : FIPS_UNSUPPORTED;
#endif
    (void)level;
    return fips_search_portable(*search) ? 0 : FIPS_UNSUPPORTED;
  });
}

int fips_attend(const fips_attention *attention) {
  if (!attention) return FIPS_INVALID;
  const int status = fips_check_attention(*attention);
  if (status) return status;
#if defined(FIPS_HAVE_256)
  if (best_level(attention->isa) >= FIPS_VECTORS_256)
    return guarded(attention->threads, [&] { return fips_attend_256(*attention), 0; });
#endif
  return FIPS_UNSUPPORTED;
}

int fips_normalise(const fips_norm *norm) {
  if (!norm) return FIPS_INVALID;
  const int status = fips_check_norm(*norm);
  if (status) return status;
#if defined(FIPS_HAVE_256)
  if (best_level(norm->isa) >= FIPS_VECTORS_256) return fips_normalise_256(*norm), 0;
#endif
  return FIPS_UNSUPPORTED;
}

int64_t fips_row_starts(const fips_matrix *matrix, uint32_t *row_start, int64_t length) {
  if (!matrix) return FIPS_INVALID;
  const int status = fips_check_matrix(*matrix);
  if (status) return status;
  const bool wanted = pattern_sizes(*matrix).kept < 0;
  if (length != (wanted ? matrix->rows : 0) || (length && !row_start)) return FIPS_INVALID;
  fips_matrix a = *matrix;
  a.row_start = row_start; // the readers keep the pointer; only masks are read here
  int64_t kept = 0;
  const int failed = guarded(1, [&] {
    with_reader(a, [&](const auto &reader) {
      int64_t first = 0;
      for (int64_t row = 0; row < a.rows; ++row) {
        if (row % reader.stride() == 0) first = kept;
        if (wanted) row_start[row] = uint32_t(first);
        for (int64_t k = 0; k < a.cols; k += 64) kept += popcount64(reader.mask(row, k));
      }
    });
    return 0;
  });
  return failed ? failed : kept;
}

} // extern "C"
