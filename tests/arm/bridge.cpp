// The interface of the kernels in a process of this machine, each call answered by a library of another one (serve.cpp)
// that an emulator runs: $FIPS_BRIDGE is its command. So the tests of the kernels test what they cannot load.
#include <sys/types.h>

#include <csignal>
#include <cstdio>
#include <mutex>

#include "../../src/fips/kernels/csrc/paths.h"
#include "wire.h"

namespace {

std::mutex lock;
int to_server = -1, from_server = -1;
pid_t owner = 0; // a forked process starts a server of its own

void start() {
  int down[2], up[2];
  const char *command = getenv("FIPS_BRIDGE");
  if (!command || pipe(down) || pipe(up)) _exit(4);
  const pid_t child = fork();
  if (child == 0) {
    dup2(down[0], 0), dup2(up[1], 1);
    for (int open : {down[0], down[1], up[0], up[1]}) close(open);
    execl("/bin/sh", "sh", "-c", command, nullptr);
    _exit(5);
  }
  close(down[0]), close(up[1]);
  to_server = down[1], from_server = up[0], owner = getpid();
}

int64_t ask(Request &request, uint32_t *starts = nullptr) {
  const std::lock_guard<std::mutex> guard(lock);
  if (owner != getpid()) start();
  send(to_server, &request, sizeof request);
  each_buffer(request, [&](const void *from, int64_t bytes, bool) {
    if (from) send(to_server, from, bytes);
  });
  int64_t result;
  if (!receive(from_server, &result, sizeof result)) fprintf(stderr, "the emulated kernels died\n"), _exit(6);
  each_buffer(request, [&](const void *to, int64_t bytes, bool written) {
    if (to && written) receive(from_server, const_cast<void *>(to), bytes);
  });
  if (starts) receive(from_server, starts, 4 * request.arguments[0]);
  return result;
}

int64_t ask(Function function, const fips_matrix *matrix = nullptr, const fips_call *call = nullptr) {
  Request request;
  request.function = function;
  if (matrix) request.matrix = *matrix;
  if (call) request.call = *call;
  return ask(request);
}

int64_t ask(Function function, const Numbers &numbers) {
  Request request;
  request.function = function, request.numbers = numbers;
  return ask(request);
}

} // namespace

// What block.cpp, which is compiled for this machine, asks of the other beside the functions below.
void fips_turn_256(void *heads, int64_t count, int64_t size, const void *cosines, const void *sines, int64_t turned,
                   int32_t angles_type, int32_t type) {
  ask(kTurn, {cosines, sines, heads, turned, turned, count * size, size, 0, angles_type, type});
}
void fips_gate_256(void *gate, const void *up, int64_t count, int32_t activation, int32_t type, int) {
  ask(kGate, {up, nullptr, gate, count, 0, count, 0, activation, type, type});
}
void fips_add_256(const void *a, const void *b, void *sum, int64_t count, int32_t type) {
  ask(kAdd, {a, b, sum, count, count, count, 0, 0, type, type});
}

// checks.cpp has readers of patterns, too, which nothing calls here.
const uint16_t *fips_nm_table(int, int) { return nullptr; }

extern "C" {

int fips_abi(void) { return FIPS_ABI; }
int fips_isas(void) { return int(ask(kIsas)); }
int64_t fips_scratch_bytes(void) { return ask(kBytes); }
int64_t fips_free_scratch(void) { return ask(kFree); }
int fips_multiply(const fips_matrix *matrix, const fips_call *call) { return int(ask(kMultiply, matrix, call)); }
int fips_multiply_columns(const fips_matrix *matrix, const fips_call *call) { return int(ask(kColumns, matrix, call)); }

int fips_multiply_again(const fips_matrix *matrix, const fips_call *call, const void *x, void *y) {
  fips_call again = *call;
  again.x = x, again.y = y;
  return fips_multiply(matrix, &again);
}

int fips_multiply_together(const fips_matrix *const *matrices, const fips_call *const *calls, int64_t count, const void *x,
                           void *const *ys) {
  for (int64_t i = 0; i < count; ++i)
    if (const int status = fips_multiply_again(matrices[i], calls[i], x, ys[i])) return status;
  return 0;
}

int fips_search_paths(const fips_search *search) {
  Request request;
  request.function = kSearch, request.search = *search;
  return int(ask(request));
}

int fips_attend(const fips_attention *attention) {
  Request request;
  request.function = kAttend, request.attention = *attention;
  return int(ask(request));
}

int fips_normalise(const fips_norm *norm) {
  Request request;
  request.function = kNormalise, request.norm = *norm;
  return int(ask(request));
}

int64_t fips_row_starts(const fips_matrix *matrix, uint32_t *row_start, int64_t length) {
  Request request;
  request.function = kStarts, request.matrix = *matrix, request.arguments[0] = length;
  return ask(request, row_start);
}

} // extern "C"
