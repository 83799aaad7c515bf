// Memory for the time of a call, 64-byte aligned. It stays with the calling thread for its next call up to a bound;
// threads of a parallel region get their parts from the thread that called.
#pragma once
#include <cstdint>

enum class Scratch { tokens, scales, sums, weights, bytes, rotated, surplus, count };

// At least so many bytes for one use; what was there before is lost. Throws std::bad_alloc.
void *fips_scratch(Scratch use, int64_t bytes);

// Around a call: only within may the calling thread ask for memory. Behind it more than may be kept is given back.
class ScratchOfCall {
public:
  explicit ScratchOfCall(int threads);
  ~ScratchOfCall();
  ScratchOfCall(const ScratchOfCall &) = delete;
  ScratchOfCall &operator=(const ScratchOfCall &) = delete;

private:
  int64_t kept_;
};
