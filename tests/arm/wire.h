// How a call of the kernels travels between two processes: the structures, then what their pointers point to.
#pragma once
#include <unistd.h>

#include <cstdint>
#include <cstdlib>
#include <type_traits>
#include <vector>

#include "../../src/fips/kernels/csrc/fips_kernels.h"

enum Function : int64_t { kIsas, kMultiply, kColumns, kSearch, kStarts, kAttend, kNormalise, kTurn, kGate, kAdd, kBytes, kFree };

// What paths.h has for blocks: `made` from two others, in place or not.
struct Numbers {
  const void *first, *second;
  void *made;
  int64_t first_length, second_length, made_length, size;
  int32_t activation, their_type, type; // of the two, and of what is made
};

struct Request {
  int64_t function = 0, arguments[3] = {};
  fips_matrix matrix = {};
  fips_call call = {};
  fips_search search = {};
  fips_attention attention = {};
  fips_norm norm = {};
  Numbers numbers = {};
};

// Every buffer of a request: `visit(pointer, bytes, whether it is written)`.
template <class Visit> void each_buffer(Request &r, Visit &&visit) {
  const auto size = [](int32_t type) { return type == FIPS_F32 ? 4 : 2; };
  visit(r.matrix.values, r.matrix.value_bytes, false);
  visit(r.matrix.pattern, r.matrix.pattern_bytes, false);
  visit(r.matrix.row_start, 4 * r.matrix.num_starts, false);
  visit(r.matrix.scales, 4 * r.matrix.num_scales, false);
  visit(r.matrix.group_scales, r.matrix.num_group_scales, false);
  visit(r.matrix.levels, r.matrix.num_levels, false);
  visit(r.matrix.history, r.matrix.num_history, false);
  visit(r.call.x, size(r.call.x_type) * r.call.x_length, false);
  visit(r.call.bias, size(r.call.y_type) * r.call.bias_length, false);
  visit(r.call.y, size(r.call.y_type) * r.call.y_length, true);
  visit(r.search.wanted, 4 * r.search.length, false);
  visit(r.search.weight, 4 * r.search.length, false);
  visit(r.search.levels, r.search.num_levels, false);
  visit(r.search.history, r.search.num_history, false);
  visit(r.search.codes, r.search.length, true);
  visit(r.search.numbers, 4 * r.search.length, true);
  visit(r.attention.queries, 2 * r.attention.queries_length, false);
  visit(r.attention.keys, 2 * r.attention.keys_length, false);
  visit(r.attention.values, 2 * r.attention.values_length, false);
  visit(r.attention.hidden, 8 * r.attention.hidden_length, false);
  visit(r.attention.y, 2 * r.attention.y_length, true);
  visit(r.norm.x, 2 * r.norm.length, false);
  visit(r.norm.weight, 2 * r.norm.weight_length, false);
  visit(r.norm.y, 2 * r.norm.length, true);
  visit(r.numbers.first, size(r.numbers.their_type) * r.numbers.first_length, false);
  visit(r.numbers.second, size(r.numbers.their_type) * r.numbers.second_length, false);
  visit(r.numbers.made, 2 * r.numbers.made_length, true);
}

inline void send(int to, const void *from, int64_t bytes) {
  for (const char *next = static_cast<const char *>(from); bytes > 0;) {
    const ssize_t done = write(to, next, size_t(bytes));
    if (done <= 0) _exit(3);
    next += done, bytes -= done;
  }
}

inline bool receive(int from, void *to, int64_t bytes) {
  for (char *next = static_cast<char *>(to); bytes > 0;) {
    const ssize_t done = read(from, next, size_t(bytes));
    if (done <= 0) return false;
    next += done, bytes -= done;
  }
  return true;
}
