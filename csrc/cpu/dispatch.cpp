#include "dispatch.h"

#include <cstdlib>
#include <stdexcept>

#ifdef FUSED_MOS_X86
#include <cpuid.h>
#ifdef __linux__
#include <sys/syscall.h>
#include <unistd.h>
#endif
#endif

namespace fused_mos {

namespace generic {
extern const Kernels kernels;
}
#ifdef FUSED_MOS_X86
namespace avx2 {
extern const Kernels kernels;
}
namespace avx512 {
extern const Kernels kernels;
}
namespace avx512_bf16 {
extern const Kernels kernels;
}
namespace amx_bf16 {
extern const Kernels kernels;
}

namespace {

// Returns true if the processor has tile registers for bfloat16 and Linux lets this process use them. A process must
// ask, since they add 8 KiB to each thread's saved state.
bool has_amx() {
#ifdef __linux__
  constexpr int kRequestPermission = 0x1023, kTileData = 18;
  constexpr unsigned kTile = 1u << 24, kBf16 = 1u << 22;
  unsigned eax, ebx, ecx, edx;
  if (!__get_cpuid_count(7, 0, &eax, &ebx, &ecx, &edx) || (edx & kTile) == 0 || (edx & kBf16) == 0) return false;
  return syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
#else
  return false;
#endif
}

}  // namespace
#endif

std::vector<const Kernels*> available_kernels() {
  std::vector<const Kernels*> available{&generic::kernels};
#ifdef FUSED_MOS_X86
  __builtin_cpu_init();
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) {
    available.push_back(&avx2::kernels);
    if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl") &&
        __builtin_cpu_supports("avx512dq")) {
      const bool bf16 = __builtin_cpu_supports("avx512bf16");
      // Intel processors multiply pairs of bfloat16 at half the rate of float32, AMD processors at twice
      const bool slow_bf16 = __builtin_cpu_is("intel");
      if (bf16 && slow_bf16) available.push_back(&avx512_bf16::kernels);
      available.push_back(&avx512::kernels);
      if (bf16 && !slow_bf16) available.push_back(&avx512_bf16::kernels);
      if (bf16 && has_amx()) available.push_back(&amx_bf16::kernels);
    }
  }
#endif
  return available;
}

const Kernels& chosen_kernels() {
  static const std::vector<const Kernels*> available = available_kernels();
  const char* wanted = std::getenv("FUSED_MOS_ISA");
  if (!wanted || !*wanted) return *available.back();
  std::string names;
  for (const Kernels* kernels : available) {
    if (kernels->name == std::string(wanted)) return *kernels;
    names += (names.empty() ? "" : ", ") + std::string(kernels->name);
  }
  throw std::invalid_argument("FUSED_MOS_ISA must be one of " + names + " on this processor, got '" + wanted + "'");
}

const Kernels& kernels_for([[maybe_unused]] bool bf16) {
  const Kernels& chosen = chosen_kernels();
#ifdef FUSED_MOS_X86
  if (&chosen == &amx_bf16::kernels && !bf16) return avx512::kernels;
#endif
  return chosen;
}

}  // namespace fused_mos
