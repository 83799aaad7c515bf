// One block of a decoder for one token of every example: its matrices, norms and attention one after the other.
#include <cstring>

#include "checks.h"
#include "paths.h"

namespace {

#if defined(FIPS_HAVE_256)

// Products of one x with several matrices of the block that follow each other.
template <int COUNT> int multiply(const fips_block &b, int first, const void *x, void *const (&ys)[COUNT]) {
  return fips_multiply_together(b.matrices + first, b.calls + first, COUNT, x, ys);
}

// The same where one matrix may give what several would, `widths` numbers of every example, one behind the other. `ys` of
// one example lie likewise; of several they are parted from what the matrix gave, in `fused`.
template <int COUNT>
int multiply_fused(const fips_block &b, int first, const void *x, void *const (&ys)[COUNT], const int64_t (&widths)[COUNT],
                   uint16_t *fused) {
  if (b.matrices[first + 1]) return multiply<COUNT>(b, first, x, ys);
  if (b.examples == 1) return multiply<1>(b, first, x, {ys[0]});
  if (const int status = multiply<1>(b, first, x, {fused})) return status;
  for (int64_t e = 0; e < b.examples; ++e)
    for (int i = 0; i < COUNT; ++i) {
      std::memcpy(static_cast<uint16_t *>(ys[i]) + e * widths[i], fused, size_t(widths[i]) * 2);
      fused += widths[i];
    }
  return 0;
}

// `length` elements, normed in rows as long as the weights, or as they are.
int normalise(const fips_block &b, int which, const void *x, void *y, int64_t length) {
  const int64_t size = b.norm_lengths[which];
  if (!size) {
    if (x != y) std::memcpy(y, x, size_t(length) * 2);
    return 0;
  }
  const fips_norm norm = {x, b.norms[which], y, length, size, size, b.eps[which], b.norm_kinds[which], b.type, b.isa};
  return fips_normalise(&norm);
}

// Heads of the new token put behind those of the tokens before.
void append(const uint16_t *heads, const fips_block &b, void *cache, const int64_t (&strides)[3]) {
  for (int64_t e = 0; e < b.examples; ++e)
    for (int64_t h = 0; h < b.key_heads; ++h, heads += b.size)
      std::memcpy(static_cast<uint16_t *>(cache) + e * strides[0] + h * strides[1] + b.before * strides[2], heads,
                  size_t(b.size) * 2);
}

int attend(const fips_block &b, const void *queries, void *y) {
  const int64_t numbers = b.examples * b.heads * b.size;
  fips_attention a = {};
  a.queries = queries, a.keys = b.keys, a.values = b.values, a.y = y;
  a.hidden = b.hidden, a.hidden_length = b.hidden_length;
  a.queries_length = a.y_length = numbers, a.keys_length = b.keys_length, a.values_length = b.values_length;
  a.examples = b.examples, a.heads = b.heads, a.key_heads = b.key_heads, a.length = b.before + 1, a.size = b.size;
  std::memcpy(a.key_strides, b.key_strides, sizeof a.key_strides);
  std::memcpy(a.value_strides, b.value_strides, sizeof a.value_strides);
  a.scale = b.scale, a.cap = b.cap, a.rounded = b.rounded, a.type = b.type, a.threads = b.threads, a.isa = b.isa;
  return fips_attend(&a);
}

// Parts of the room, one behind the other.
struct Room {
  uint16_t *next;
  uint16_t *take(int64_t elements) {
    uint16_t *const part = next;
    next += elements;
    return part;
  }
};

int attention_part(const fips_block &b, Room room, const void *normed, void *out) {
  const int64_t queries = b.heads * b.size, keys = b.key_heads * b.size;
  uint16_t *q = room.take(b.examples * queries), *k = room.take(b.examples * keys), *v = room.take(b.examples * keys);
  uint16_t *attended = room.take(b.examples * queries);
  if (const int status = multiply_fused<3>(b, FIPS_QUERIES, normed, {q, k, v}, {queries, keys, keys}, room.next)) return status;
  if (const int status = normalise(b, FIPS_NORM_QUERIES, q, q, b.examples * queries)) return status;
  if (const int status = normalise(b, FIPS_NORM_KEYS, k, k, b.examples * keys)) return status;
  for (int64_t e = 0; e < b.examples; ++e) {
    const int64_t place = e * b.angles_stride * (b.angles_type == FIPS_F32 ? 4 : 2);
    const void *cosines = static_cast<const char *>(b.cosines) + place, *sines = static_cast<const char *>(b.sines) + place;
    fips_turn_256(q + e * queries, b.heads, b.size, cosines, sines, b.turned, b.angles_type, b.type);
    fips_turn_256(k + e * keys, b.key_heads, b.size, cosines, sines, b.turned, b.angles_type, b.type);
  }
  append(k, b, b.keys, b.key_strides);
  append(v, b, b.values, b.value_strides);
  if (const int status = attend(b, q, attended)) return status;
  return multiply<1>(b, FIPS_OUT, attended, {out});
}

int mlp_part(const fips_block &b, Room room, const void *normed, void *out) {
  const int64_t hidden = b.calls[FIPS_DOWN]->x_columns, numbers = b.examples * hidden;
  uint16_t *gate = room.take(numbers), *up = room.take(numbers);
  if (const int status = multiply_fused<2>(b, FIPS_GATE, normed, {gate, up}, {hidden, hidden}, room.next)) return status;
  fips_gate_256(gate, up, numbers, b.activation, b.type, b.threads);
  return multiply<1>(b, FIPS_DOWN, gate, {out});
}

int run(const fips_block &b) {
  Room room = {static_cast<uint16_t *>(b.room)};
  uint16_t *normed = room.take(b.length), *out = room.take(b.length);
  int status = normalise(b, FIPS_NORM_INPUT, b.x, normed, b.length);
  if (!status) status = attention_part(b, room, normed, out);
  if (!status) status = normalise(b, FIPS_NORM_ATTENDED, out, out, b.length);
  if (status) return status;
  fips_add_256(b.x, out, b.y, b.length, b.type);
  status = normalise(b, FIPS_NORM_MLP, b.y, normed, b.length);
  if (!status) status = mlp_part(b, room, normed, out);
  if (!status) status = normalise(b, FIPS_NORM_MADE, out, out, b.length);
  if (status) return status;
  fips_add_256(b.y, out, b.y, b.length, b.type);
  return 0;
}

#endif

// Elements that are made in between: what is normed and what goes back, beside the heads or the hidden numbers, and what
// one matrix gives in place of several.
int64_t room_of(const fips_block &b) {
  const auto fused = [&](int first) { return b.matrices[first + 1] ? 0 : b.examples * b.calls[first]->y_columns; };
  const int64_t attention = 2 * b.examples * (b.heads + b.key_heads) * b.size + fused(FIPS_QUERIES);
  const int64_t mlp = 2 * b.examples * b.calls[FIPS_DOWN]->x_columns + fused(FIPS_GATE);
  return 2 * b.length + (attention > mlp ? attention : mlp);
}

} // namespace

extern "C" {

int fips_run_block(const fips_block *block) {
  if (!block) return FIPS_INVALID;
  if (const int status = fips_check_block(*block)) return status;
  if (!block->x || !block->y || !block->room || block->room_length < room_of(*block)) return FIPS_INVALID;
#if defined(FIPS_HAVE_256)
  if (best_level(block->isa) >= FIPS_VECTORS_256) return run(*block);
#endif
  return FIPS_UNSUPPORTED;
}

int64_t fips_block_room(const fips_block *block) {
  if (!block) return FIPS_INVALID;
  const int status = fips_check_block_parts(*block);
  return status ? status : room_of(*block);
}

} // extern "C"
