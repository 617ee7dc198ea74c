#include "dispatch.h"

#include <cstdlib>
#include <stdexcept>

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
#endif

std::vector<const Kernels*> available_kernels() {
  std::vector<const Kernels*> available{&generic::kernels};
#ifdef FUSED_MOS_X86
  __builtin_cpu_init();
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) {
    available.push_back(&avx2::kernels);
    if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl") &&
        __builtin_cpu_supports("avx512dq")) {
      available.push_back(&avx512::kernels);
      if (__builtin_cpu_supports("avx512bf16")) available.push_back(&avx512_bf16::kernels);
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

}  // namespace fused_mos
