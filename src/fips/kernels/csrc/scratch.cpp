// Memory that calls need beside their arguments: counted, bounded and given back.
#include "scratch.h"

#include <atomic>
#include <cstdlib>
#include <mutex>
#include <new>

#include "fips_kernels.h"

#if (defined(__unix__) || defined(__APPLE__)) && !defined(FIPS_SANITIZED)
#define FIPS_MAPS_MEMORY
#include <sys/mman.h>
#endif

namespace {

constexpr int kUses = int(Scratch::count);
// From this size on memory is mapped, in whole pages of this size: the allocator might not give it back to the system,
// and to fill small pages for every call takes as long as many a product.
constexpr int64_t kLargePage = 2 << 20;

struct Block {
  void *data = nullptr;
  int64_t bytes = 0;
};

std::atomic<int64_t> total{0};

#if defined(FIPS_MAPS_MEMORY)
bool is_mapped(int64_t bytes) { return bytes >= kLargePage; }

void *map(int64_t bytes) {
  const int64_t whole = bytes + kLargePage; // some of it lies before or behind whole large pages
  void *data = mmap(nullptr, size_t(whole), PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (data == MAP_FAILED) return nullptr;
  char *first = static_cast<char *>(data);
  const int64_t before = (kLargePage - int64_t(reinterpret_cast<uintptr_t>(first) % kLargePage)) % kLargePage;
  if (before) munmap(first, size_t(before));
  munmap(first + before + bytes, size_t(kLargePage - before));
#if defined(MADV_HUGEPAGE)
  madvise(first + before, size_t(bytes), MADV_HUGEPAGE);
#endif
  return first + before;
}
#endif

int64_t whole_size(int64_t bytes) {
  return bytes < kLargePage ? (bytes + 127) / 64 * 64 : (bytes + kLargePage - 1) / kLargePage * kLargePage;
}

void *allocate(int64_t bytes) {
#if defined(FIPS_MAPS_MEMORY)
  if (is_mapped(bytes)) return map(bytes);
#endif
#if defined(_WIN32)
  return _aligned_malloc(size_t(bytes), 64);
#else
  return std::aligned_alloc(64, size_t(bytes));
#endif
}

void release(Block &block) {
  total -= block.bytes;
#if defined(FIPS_MAPS_MEMORY)
  if (is_mapped(block.bytes)) {
    munmap(block.data, size_t(block.bytes));
    block = Block();
    return;
  }
#endif
#if defined(_WIN32)
  _aligned_free(block.data);
#else
  std::free(block.data);
#endif
  block = Block();
}

// What one thread holds; `busy` while it is in a call, or while another thread takes its memory away.
struct Holder {
  Block blocks[kUses];
  std::atomic_flag busy = ATOMIC_FLAG_INIT;
  Holder *previous = nullptr, *next = nullptr;

  Holder();
  ~Holder();
  int64_t bytes() const {
    int64_t sum = 0;
    for (const Block &block : blocks) sum += block.bytes;
    return sum;
  }
  void release_all() {
    for (Block &block : blocks) release(block);
  }
};

struct Holders {
  std::mutex lock;
  Holder *first = nullptr;
};

Holders &holders() {
  static auto *all = new Holders; // never destroyed: threads may end after the statics of the process
  return *all;
}

Holder::Holder() {
  const std::lock_guard<std::mutex> guard(holders().lock);
  next = holders().first;
  if (next) next->previous = this;
  holders().first = this;
}

Holder::~Holder() {
  const std::lock_guard<std::mutex> guard(holders().lock);
  release_all();
  if (next) next->previous = previous;
  (previous ? previous->next : holders().first) = next;
}

Holder &mine() {
  static thread_local Holder holder;
  return holder;
}

} // namespace

void *fips_scratch(Scratch use, int64_t bytes) {
  Block &block = mine().blocks[int(use)];
  if (bytes > block.bytes) {
    release(block);
    const int64_t whole = whole_size(bytes);
    block.data = allocate(whole);
    if (!block.data) throw std::bad_alloc();
    block.bytes = whole;
    total += whole;
  }
  return block.data;
}

ScratchOfCall::ScratchOfCall(int threads) : kept_(FIPS_KEPT_SCRATCH + threads * int64_t(FIPS_KEPT_SCRATCH_OF_THREAD)) {
  while (mine().busy.test_and_set(std::memory_order_acquire)) {
  }
}

ScratchOfCall::~ScratchOfCall() {
  Holder &holder = mine();
  if (holder.bytes() > kept_) holder.release_all();
  holder.busy.clear(std::memory_order_release);
}

extern "C" {

int64_t fips_scratch_bytes(void) { return total; }

int64_t fips_free_scratch(void) {
  const int64_t before = total;
  const std::lock_guard<std::mutex> guard(holders().lock);
  for (Holder *holder = holders().first; holder; holder = holder->next) {
    if (holder->busy.test_and_set(std::memory_order_acquire)) continue;
    holder->release_all();
    holder->busy.clear(std::memory_order_release);
  }
  return before - total;
}

} // extern "C"
