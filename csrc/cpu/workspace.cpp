#include "workspace.h"

#include <atomic>
#include <cstdint>
#include <cstdlib>
#include <mutex>
#include <new>
#include <vector>

#ifdef __linux__
#include <sys/mman.h>
#endif

namespace fused_mos {
namespace {

struct alignas(64) Block {  // header of the memory, on a cache line of its own
  std::size_t bytes;        // requested
  std::size_t capacity;     // including this header
};

constexpr std::size_t kHugePage = std::size_t{2} << 20;
constexpr std::size_t kLargestKept = std::size_t{208} << 20;
#ifdef FUSED_MOS_SANITIZE
constexpr std::size_t kLarge = SIZE_MAX;  // never round sizes up, so that sanitizers see reads beyond a block
#else
constexpr std::size_t kLarge = 2 * kHugePage;
#endif
std::atomic<std::size_t> live{0}, peak{0};

// Large blocks that were released, up to kLargestKept bytes in total. The operating system zeroes fresh pages, which
// would take 4 % of a training step.
std::mutex mutex;
std::vector<Block*>& kept = *new std::vector<Block*>;  // never destroyed: threads may release while the process exits

// Removes the smallest kept block of at least `total` bytes and returns it, or null. Never waits for the mutex: after a
// fork, its owner may be in another process.
Block* take_kept(std::size_t total) {
  const std::unique_lock<std::mutex> lock(mutex, std::try_to_lock);
  if (!lock) return nullptr;
  auto best = kept.end();
  for (auto block = kept.begin(); block != kept.end(); ++block) {
    if ((*block)->capacity >= total && (best == kept.end() || (*block)->capacity < (*best)->capacity)) best = block;
  }
  if (best == kept.end()) return nullptr;
  Block* block = *best;
  kept.erase(best);
  return block;
}

// Keeps a block, and frees the oldest kept blocks until the rest fits. Frees the block if it is too large itself, or if
// the mutex is taken.
void keep(Block* block) {
  const std::unique_lock<std::mutex> lock(mutex, std::try_to_lock);
  if (!lock || block->capacity > kLargestKept) return std::free(block);
  kept.push_back(block);
  std::size_t bytes = 0;
  for (const Block* other : kept) bytes += other->capacity;
  while (bytes > kLargestKept) {
    bytes -= kept.front()->capacity;
    std::free(kept.front());
    kept.erase(kept.begin());
  }
}

// Uses posix_memalign, since aligned_alloc only takes sizes that are multiples of the alignment.
Block* aligned(std::size_t alignment, std::size_t bytes) {
  void* memory = nullptr;
  return posix_memalign(&memory, alignment, bytes) ? nullptr : static_cast<Block*>(memory);
}

Block* take(std::size_t total) {
  if (total < kLarge) return aligned(alignof(Block), total);
  if (Block* block = take_kept(total)) return block;
  total = (total + kHugePage - 1) / kHugePage * kHugePage;
  Block* block = aligned(kHugePage, total);
  if (!block) return nullptr;
#ifdef __linux__
  madvise(block, total, MADV_HUGEPAGE);  // one page fault per 2 MiB, not per 4 KiB; the system may ignore it
#endif
  block->capacity = total;
  return block;
}

}  // namespace

void* allocate(std::size_t bytes) {
  const std::size_t total = bytes + sizeof(Block);
  Block* block = take(total);
  if (!block) throw std::bad_alloc();
  if (total < kLarge) block->capacity = total;
  block->bytes = bytes;
  const std::size_t now = live += bytes;
  for (std::size_t seen = peak; seen < now && !peak.compare_exchange_weak(seen, now);) {
  }
  return block + 1;
}

void release(void* memory) {
  Block* block = static_cast<Block*>(memory) - 1;
  live -= block->bytes;
  block->capacity >= kLarge ? keep(block) : std::free(block);
}

std::size_t peak_bytes() { return peak; }
void reset_peak_bytes() { peak = live.load(); }

}  // namespace fused_mos
