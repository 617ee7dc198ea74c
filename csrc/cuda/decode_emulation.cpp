// decode.cuh on a CPU, for tests: the plan and the launch of decode.cu without a device.
#include "emulation.h"
// decode.cuh needs the header above
#include "decode.cuh"

namespace fused_mos {
namespace {

template <class T>
void run(const DecodeArguments& arguments, const DecodePlan& plan, unsigned order) {
  device::launch(plan.n_blocks, THREADS, plan.shared_bytes, order, [&](char* shared) {
    if (plan.row_tiles == 2)
      Decoder<T, 2>{arguments, plan, shared}.run();
    else if (plan.row_tiles == 8)
      Decoder<T, 8>{arguments, plan, shared}.run();
    else
      Decoder<T, 16>{arguments, plan, shared}.run();
  });
}

}  // namespace

// `stream` is the seed for the order of the threads' turns.
int launch_decode(const DecodeArguments& arguments, const DecodePlan& plan, void* stream) {
  const auto order = static_cast<unsigned>(reinterpret_cast<uintptr_t>(stream));
  arguments.bf16 ? run<BFloat16>(arguments, plan, order) : run<Float16>(arguments, plan, order);
  return 0;
}

const char* error_text(int) { return ""; }

void cuda_versions(int& runtime, int& driver) { runtime = driver = 0; }

}  // namespace fused_mos
