#include "workspace.h"

#include <atomic>
#include <cstdlib>
#include <new>

#ifdef __linux__
#include <sys/mman.h>
#endif

namespace fused_mos {
namespace {

constexpr std::size_t kHeader = 64;  // holds the size; keeps the data on a cache line
constexpr std::size_t kHugePage = std::size_t{2} << 20;
std::atomic<std::size_t> live{0}, peak{0};

}  // namespace

void* allocate(std::size_t bytes) {
  const bool large = bytes >= 2 * kHugePage;
  const std::size_t alignment = large ? kHugePage : kHeader;
  const std::size_t total = (bytes + kHeader + alignment - 1) / alignment * alignment;
  char* memory = static_cast<char*>(std::aligned_alloc(alignment, total));
  if (!memory) throw std::bad_alloc();
#ifdef __linux__
  if (large) madvise(memory, total, MADV_HUGEPAGE);  // a fault for every 2 MiB, not for every 4 KiB; advice may be ignored
#endif
  *reinterpret_cast<std::size_t*>(memory) = bytes;
  const std::size_t now = live += bytes;
  for (std::size_t seen = peak; seen < now && !peak.compare_exchange_weak(seen, now);) {
  }
  return memory + kHeader;
}

void release(void* memory) {
  char* start = static_cast<char*>(memory) - kHeader;
  live -= *reinterpret_cast<std::size_t*>(start);
  std::free(start);
}

std::size_t peak_bytes() { return peak; }
void reset_peak_bytes() { peak = live.load(); }

}  // namespace fused_mos
