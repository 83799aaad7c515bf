// Sizes are bounded so that no product of them leaves 64 bits.
#include "checks.h"

#include <initializer_list>

#include "packed.h"

namespace {

constexpr int64_t kMostSide = (int64_t(1) << 31) - 1, kMostEntries = int64_t(1) << 48, kMostThreads = 4096;
constexpr int64_t kMostByteColumns = 65536; // beyond it sums of bytes would leave 32 bits

bool is_there(const void *data, int64_t length) { return length >= 0 && (data != nullptr || length == 0); }

int64_t bytes_of_bits(int64_t bits) { return (bits + 7) / 8; }

int64_t value_bytes(const fips_matrix &a) {
  return bytes_of_bits(a.num_values * (a.value_type == FIPS_I8 ? a.value_bits : value_type_bits(a.value_type)));
}

bool has_starts(const fips_matrix &a) { return pattern_sizes(a).kept < 0; }

// Values are there, as many as their type and count say.
bool values_fit(const fips_matrix &a) {
  if (!value_type_bits(a.value_type)) return false;
  if (a.value_bits < 2 || a.value_bits > 8 || (a.value_bits < 8 && a.value_type != FIPS_I8)) return false;
  if (a.num_values < 0 || a.num_values > a.rows * a.cols) return false;
  if (has_starts(a) && a.num_values > int64_t(UINT32_MAX)) return false;
  return is_there(a.values, a.value_bytes) && a.value_bytes == value_bytes(a);
}

// The pattern is as long as its format says for this shape, and so are the values where the shape says that too.
bool pattern_fits(const fips_matrix &a) {
  const PatternSizes sizes = pattern_sizes(a);
  const int64_t groups = a.rows * a.cols / sizes.group;
  if (!is_there(a.pattern, a.pattern_bytes) || sizes.side % sizes.group) return false;
  if (sizes.kept < 0 ? a.num_values % sizes.group != 0 : a.num_values != groups * sizes.kept) return false;
  return a.pattern_bytes == bytes_of_bits(groups * sizes.bits);
}

bool group_scales_fit(const fips_matrix &a) {
  if (a.scale_group == 0) return !a.group_scales && a.num_group_scales == 0;
  if (a.scale_group != 16 && a.scale_group != 32 && a.scale_group != 64 && a.scale_group != 128) return false;
  return a.value_type == FIPS_I8 && is_there(a.group_scales, a.num_group_scales) &&
         a.num_group_scales == a.rows * groups_of_row(a);
}

// Of a matrix with a memory, or of a search: no code leads to a place behind the table.
bool history_fits(const int8_t *levels, int64_t num_levels, const uint8_t *history, int64_t num_history, int64_t bits,
                  int64_t memory, int64_t run) {
  if (memory < 1 || memory > 3 || bits < 2 || bits > 4 || run < 4 || run % 4 || run > kMostSide) return false;
  if (!levels || num_levels > 64 || num_levels < int64_t(1) << bits || (num_levels & (num_levels - 1))) return false;
  if (!history || num_history != memory << bits) return false;
  for (int64_t i = 0; i < num_history; ++i)
    if (history[i] >= num_levels) return false;
  return true;
}

bool levels_fit(const fips_matrix &a) {
  if (a.memory) {
    if (a.value_type != FIPS_I8 || a.format != FIPS_FULL || a.num_values != a.rows * a.cols) return false;
    return history_fits(a.levels, a.num_levels, a.history, a.num_history, a.value_bits, a.memory, a.run);
  }
  if (a.history || a.num_history || a.run) return false;
  if (a.num_levels == 0) return !a.levels;
  return a.levels && a.value_type == FIPS_I8 && a.value_bits <= 5 && a.num_levels == int64_t(1) << a.value_bits;
}

bool rotation_fits(const fips_matrix &a) {
  if (a.rotation == 1) return true;
  return (a.rotation == 4 || a.rotation == 16 || a.rotation == 64) && a.cols % a.rotation == 0 && a.value_type == FIPS_I8;
}

} // namespace

bool fips_format_is_known(const fips_matrix &a) {
  switch (a.format) {
  case FIPS_FULL:
  case FIPS_BITMASK: return true;
  case FIPS_NM: return (a.m == 2 || a.m == 4 || a.m == 8 || a.m == 16) && a.n > 0 && a.n < a.m;
  case FIPS_BLOCK_ROWS:
  case FIPS_BLOCK_COLS: return a.m == 4 || a.m == 8;
  default: return false;
  }
}

namespace {

// `tokens` lines of `columns` elements, `stride` apart, within `length` elements.
bool lines_fit(const void *data, int64_t length, int64_t tokens, int64_t stride, int64_t columns) {
  if (!is_there(data, length) || length > kMostEntries || stride < 0 || length < columns) return false;
  return tokens == 1 || stride <= (length - columns) / (tokens - 1);
}

template <class Reader> bool row_fits(const fips_matrix &a, const Reader &reader, int64_t row) {
  int64_t kept = 0;
  for (int64_t k = 0; k < a.cols; k += 64) kept += popcount64(reader.mask(row, k));
  return kept == 0 || reader.start(row) + (kept - 1) * reader.stride() < a.num_values;
}

} // namespace

int fips_check_matrix(const fips_matrix &a) {
  if (a.rows < 0 || a.cols <= 0 || a.rows > kMostSide || a.cols > kMostSide) return FIPS_INVALID;
  if (a.rows * a.cols > kMostEntries) return FIPS_INVALID;
  if (!fips_format_is_known(a)) return FIPS_UNSUPPORTED;
  if (!values_fit(a) || !pattern_fits(a)) return FIPS_INVALID;
  if (!is_there(a.scales, a.num_scales) || a.num_scales != (a.scales ? a.rows : 0)) return FIPS_INVALID;
  if (!group_scales_fit(a) || !levels_fit(a) || !rotation_fits(a)) return FIPS_INVALID;
  return a.value_type == FIPS_I8 && a.cols > kMostByteColumns ? FIPS_UNSUPPORTED : 0;
}

int fips_check_rows(const fips_matrix &a) {
  if (!has_starts(a)) return 0;
  if (!a.row_start || a.num_starts != a.rows) return FIPS_INVALID;
  // A row that begins so early cannot end too late, whatever it keeps: only the last rows have to be looked at. Those
  // are all rows of a matrix that keeps less than a row full of values.
  const int64_t room = a.num_values - a.cols * (a.format == FIPS_BLOCK_ROWS ? a.m : 1);
  const uint32_t safe = room < 0 ? 0 : uint32_t(room);
  bool fits = true;
  with_reader(a, [&](const auto &reader) {
    for (int64_t row0 = 0; fits && row0 < a.rows; row0 += 64) {
      const int64_t end = min_of(row0 + 64, a.rows);
      uint32_t late = room < 0;
      for (int64_t row = row0; row < end; ++row) late |= a.row_start[row] > safe;
      for (int64_t row = row0; late && fits && row < end; ++row)
        fits = (room >= 0 && a.row_start[row] <= safe) || row_fits(a, reader, row);
    }
  });
  return fits ? 0 : FIPS_INVALID;
}

int fips_check_search(const fips_search &s) {
  if (s.columns < 0 || s.rows < 0 || s.columns > kMostSide || s.rows > kMostSide) return FIPS_INVALID;
  if (s.length != s.columns * s.rows || s.length > kMostEntries || s.threads < 1 || s.threads > kMostThreads) return FIPS_INVALID;
  for (const void *data : {static_cast<const void *>(s.wanted), static_cast<const void *>(s.weight),
                           static_cast<const void *>(s.codes), static_cast<const void *>(s.numbers)})
    if (!is_there(data, s.length)) return FIPS_INVALID;
  if (s.isa < FIPS_PORTABLE || s.isa > FIPS_AMX || !(s.unit > 0) || !(s.unit < 1e6f)) return FIPS_INVALID;
  return history_fits(s.levels, s.num_levels, s.history, s.num_history, s.bits, s.memory, s.run) ? 0 : FIPS_INVALID;
}

namespace {

// Numbers of every example, head and token, `strides` apart.
bool keys_fit(const fips_attention &a, const void *data, int64_t elements, const int64_t (&strides)[3]) {
  if (!is_there(data, elements) || elements > kMostEntries) return false;
  const int64_t counts[3] = {a.examples, a.key_heads, a.length};
  int64_t left = elements - a.size;
  for (int i = 0; i < 3; ++i) {
    if (strides[i] < 0 || left < 0) return false;
    if (counts[i] == 1) continue;
    if (strides[i] > left / (counts[i] - 1)) return false;
    left -= strides[i] * (counts[i] - 1);
  }
  return left >= 0;
}

// Keys left out of every example, fewer than there are.
bool hidden_fit(const int64_t *hidden, int64_t hidden_length, int64_t examples, int64_t length) {
  if (hidden_length != (hidden ? examples : 0)) return false;
  for (int64_t e = 0; e < hidden_length; ++e)
    if (hidden[e] < 0 || hidden[e] >= length) return false;
  return true;
}

bool scores_fit(float cap, int32_t rounded) { return cap >= 0 && cap < 1e6f && (rounded == 0 || rounded == 1); }

} // namespace

int fips_check_attention(const fips_attention &a) {
  for (int64_t side : {a.examples, a.heads, a.key_heads, a.length, a.size})
    if (side < 1 || side > kMostSide) return FIPS_INVALID;
  if (a.heads % a.key_heads || a.threads < 1 || a.threads > kMostThreads) return FIPS_INVALID;
  if (a.isa < FIPS_PORTABLE || a.isa > FIPS_AMX || !scores_fit(a.cap, a.rounded)) return FIPS_INVALID;
  if (a.size % 8 || a.size > 512 || (a.type != FIPS_BF16 && a.type != FIPS_F16)) return FIPS_UNSUPPORTED;
  if (a.examples > kMostEntries / (a.size * a.heads) / (a.length + 8)) return FIPS_INVALID;
  const int64_t numbers = a.examples * a.heads * a.size;
  if (!a.queries || !a.y || a.queries_length != numbers || a.y_length != numbers) return FIPS_INVALID;
  if (!hidden_fit(a.hidden, a.hidden_length, a.examples, a.length)) return FIPS_INVALID;
  const bool fit = keys_fit(a, a.keys, a.keys_length, a.key_strides) && keys_fit(a, a.values, a.values_length, a.value_strides);
  return fit ? 0 : FIPS_INVALID;
}

namespace {

// Whether every place has a matrix, but those behind one that gives what they would.
bool matrices_are_there(const fips_block &b) {
  for (int i = 0; i < FIPS_BLOCK_MATRICES; ++i)
    if (!b.matrices[i] != !b.calls[i]) return false;
  for (int i : {FIPS_QUERIES, FIPS_OUT, FIPS_GATE, FIPS_DOWN})
    if (!b.matrices[i]) return false;
  return !b.matrices[FIPS_KEYS] == !b.matrices[FIPS_VALUES_OF_KEYS];
}

bool matrices_fit(const fips_block &b, int64_t width) {
  const int64_t queries = b.heads * b.size, keys = b.key_heads * b.size, hidden = b.calls[FIPS_DOWN]->x_columns;
  if (hidden < 1 || hidden > kMostSide || hidden % 8) return false;
  const int64_t inputs[FIPS_BLOCK_MATRICES] = {width, width, width, queries, width, width, hidden};
  int64_t outputs[FIPS_BLOCK_MATRICES] = {queries, keys, keys, width, hidden, hidden, width};
  if (!b.matrices[FIPS_KEYS]) outputs[FIPS_QUERIES] += 2 * keys;
  if (!b.matrices[FIPS_UP]) outputs[FIPS_GATE] += hidden;
  for (int i = 0; i < FIPS_BLOCK_MATRICES; ++i) {
    if (!b.matrices[i]) continue;
    const fips_call &c = *b.calls[i];
    if (c.tokens != b.examples || c.x_columns != inputs[i] || c.y_columns != outputs[i]) return false;
    if (c.x_length != b.examples * inputs[i] || c.y_length != b.examples * outputs[i]) return false;
    if (c.x_type != b.type || c.y_type != b.type || c.threads != b.threads) return false;
    if (c.first_row || c.end_row != outputs[i]) return false;
  }
  return true;
}

bool norms_fit(const fips_block &b, int64_t width) {
  for (int i = 0; i < FIPS_BLOCK_NORMS; ++i) {
    const int64_t length = b.norm_lengths[i], heads = i == FIPS_NORM_QUERIES ? b.heads : b.key_heads;
    const bool of_heads = i == FIPS_NORM_QUERIES || i == FIPS_NORM_KEYS;
    const bool fits = of_heads ? length == b.size || length == heads * b.size : length == width;
    if (b.norms[i] ? !fits : length != 0) return false;
  }
  return true;
}

} // namespace

int fips_check_block_parts(const fips_block &b) {
  for (int64_t side : {b.examples, b.heads, b.key_heads, b.size})
    if (side < 1 || side > kMostSide) return FIPS_INVALID;
  if (b.isa < FIPS_PORTABLE || b.isa > FIPS_AMX || !scores_fit(b.cap, b.rounded)) return FIPS_INVALID;
  if (b.threads < 1 || b.threads > kMostThreads || (b.activation != FIPS_SILU && b.activation != FIPS_GELU_TANH)) return FIPS_INVALID;
  if (b.size % 8 || b.size > 512 || (b.type != FIPS_BF16 && b.type != FIPS_F16)) return FIPS_UNSUPPORTED;
  if (b.heads % b.key_heads || b.heads > kMostSide / b.size || !b.matrices || !b.calls) return FIPS_INVALID;
  if (!matrices_are_there(b)) return FIPS_INVALID;
  const int64_t width = b.calls[FIPS_QUERIES]->x_columns;
  if (width < 1 || width > kMostSide || b.examples > kMostEntries / kMostSide) return FIPS_INVALID;
  if (width % 8) return FIPS_UNSUPPORTED;
  return b.length == b.examples * width && matrices_fit(b, width) && norms_fit(b, width) ? 0 : FIPS_INVALID;
}

int fips_check_block(const fips_block &b) {
  if (const int status = fips_check_block_parts(b)) return status;
  if (b.before < 0 || b.before >= kMostSide) return FIPS_INVALID;
  if (b.turned < 8 || b.turned > b.size || b.turned % 8) return FIPS_INVALID;
  if (b.angles_type != FIPS_F32 && b.angles_type != b.type) return FIPS_INVALID;
  const bool angles = b.cosines && b.sines && b.angles_stride >= 0 && b.angles_stride <= kMostSide;
  if (!angles || b.angles_length < b.turned + (b.examples - 1) * b.angles_stride) return FIPS_INVALID;
  const int64_t strides[] = {b.key_strides[2], b.value_strides[2]};
  if (strides[0] < b.size || strides[1] < b.size) return FIPS_INVALID; // else a token would be written over another
  if (!hidden_fit(b.hidden, b.hidden_length, b.examples, b.before + 1)) return FIPS_INVALID;
  fips_attention a = {};
  a.examples = b.examples, a.key_heads = b.key_heads, a.length = b.before + 1, a.size = b.size;
  const bool fit = keys_fit(a, b.keys, b.keys_length, b.key_strides) && keys_fit(a, b.values, b.values_length, b.value_strides);
  return fit ? 0 : FIPS_INVALID;
}

int fips_check_norm(const fips_norm &n) {
  if (n.size < 1 || n.size > kMostSide || n.length < 1 || n.length > kMostEntries || n.length % n.size) return FIPS_INVALID;
  if (!n.x || !n.y || !n.weight || n.weight_length != n.size || n.isa < FIPS_PORTABLE || n.isa > FIPS_AMX) return FIPS_INVALID;
  if (n.kind < FIPS_NORM_ROUNDED || n.kind > FIPS_NORM_ONE_MORE) return FIPS_INVALID;
  return n.size % 8 || (n.type != FIPS_BF16 && n.type != FIPS_F16) ? FIPS_UNSUPPORTED : 0;
}

int fips_check_call(const fips_call &c, int64_t inputs, int64_t outputs) {
  if (c.tokens < 0 || c.x_columns != inputs || c.y_columns != outputs) return FIPS_INVALID;
  if (c.x_type < FIPS_F32 || c.x_type > FIPS_F16 || c.y_type < FIPS_F32 || c.y_type > FIPS_F16) return FIPS_INVALID;
  if (c.threads < 1 || c.threads > kMostThreads) return FIPS_INVALID;
  if (c.isa < FIPS_PORTABLE || c.isa > FIPS_AMX || c.path < FIPS_AUTO || c.path > FIPS_TILES) return FIPS_INVALID;
  if (c.activation_bits != 8 && c.activation_bits != 16 && c.activation_bits != 24) return FIPS_INVALID;
  if (c.first_row < 0 || c.end_row < c.first_row || c.end_row > outputs || c.first_row % FIPS_ROW_UNIT) return FIPS_INVALID;
  if (c.end_row % FIPS_ROW_UNIT && c.end_row != outputs) return FIPS_INVALID;
  if (!is_there(c.bias, c.bias_length) || c.bias_length != (c.bias ? outputs : 0)) return FIPS_INVALID;
  if (c.tokens == 0 || outputs == 0) return 0;
  const int64_t widest = inputs > outputs ? inputs : outputs;
  if (c.tokens > kMostEntries / (widest + 64)) return FIPS_INVALID;
  if (inputs > 0 && !lines_fit(c.x, c.x_length, c.tokens, c.x_stride, inputs)) return FIPS_INVALID;
  const bool apart = c.tokens == 1 || c.y_stride >= outputs; // several threads write them
  return apart && lines_fit(c.y, c.y_length, c.tokens, c.y_stride, outputs) ? 0 : FIPS_INVALID;
}
