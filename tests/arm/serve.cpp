// Answers the calls of bridge.cpp on standard input and output.
#include "../../src/fips/kernels/csrc/paths.h"
#include "wire.h"

namespace {

int64_t answer(Request &r, std::vector<uint32_t> &starts) {
  switch (r.function) {
  case kIsas: return fips_isas();
  case kMultiply: return fips_multiply(&r.matrix, &r.call);
  case kColumns: return fips_multiply_columns(&r.matrix, &r.call);
  case kSearch: return fips_search_paths(&r.search);
  case kStarts:
    starts.resize(size_t(r.arguments[0]));
    return fips_row_starts(&r.matrix, starts.empty() ? nullptr : starts.data(), r.arguments[0]);
  case kAttend: return fips_attend(&r.attention);
  case kNormalise: return fips_normalise(&r.norm);
  case kTurn: {
    const Numbers &n = r.numbers;
    const int64_t count = n.made_length / n.size;
    return fips_turn_256(n.made, count, n.size, n.first, n.second, n.first_length, n.their_type, n.type), 0;
  }
  case kGate: {
    const Numbers &n = r.numbers;
    return fips_gate_256(n.made, n.first, n.made_length, n.activation, n.type, 1), 0;
  }
  case kAdd: return fips_add_256(r.numbers.first, r.numbers.second, r.numbers.made, r.numbers.made_length, r.numbers.type), 0;
  case kBytes: return fips_scratch_bytes();
  default: return fips_free_scratch();
  }
}

} // namespace

int main() {
  Request request;
  while (receive(0, &request, sizeof request)) {
    std::vector<void *> held;
    each_buffer(request, [&](auto *&pointer, int64_t bytes, bool) {
      if (!pointer) return;
      void *room = malloc(size_t(bytes > 0 ? bytes : 1));
      if (!room || !receive(0, room, bytes)) _exit(2);
      held.push_back(room);
      pointer = static_cast<std::remove_reference_t<decltype(pointer)>>(room);
    });
    std::vector<uint32_t> starts;
    const int64_t result = answer(request, starts);
    send(1, &result, sizeof result);
    each_buffer(request, [&](const void *pointer, int64_t bytes, bool written) {
      if (pointer && written) send(1, pointer, bytes);
    });
    send(1, starts.data(), int64_t(starts.size()) * 4);
    for (void *room : held) free(room);
  }
}
