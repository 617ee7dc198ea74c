// lstm.cuh on a CPU, for tests: the launches of lstm.cu without a device.
#include "emulation.h"
// lstm.cuh needs the header above
#include "lstm.cuh"

namespace fused_mos {
namespace {

unsigned order(void* stream) { return static_cast<unsigned>(reinterpret_cast<uintptr_t>(stream)); }

}  // namespace

// `stream` is the seed for the order of the threads' turns.
int launch_lstm(const LstmForward& a, const LstmPlan& plan, void* stream) {
  std::memset(a.states, 0xff, int64_t{2} * a.shape.n_steps * a.shape.n_rows * a.shape.padded);
  device::launch(plan.forward_blocks, LSTM_THREADS, plan.forward_shared_bytes, order(stream), [&](char* shared) {
    if (plan.forward_units == 8)
      lstm_forward<8>(a, reinterpret_cast<float*>(shared));
    else
      lstm_forward<12>(a, reinterpret_cast<float*>(shared));
  });
  return 0;
}

int launch_lstm(const LstmBackward& a, const LstmPlan& plan, void* stream) {
  std::memset(a.grad_gates, 0xff, int64_t{8} * a.shape.n_steps * a.shape.n_rows * a.shape.width);
  device::launch(plan.backward_blocks, LSTM_THREADS, plan.backward_shared_bytes, order(stream),
                 [&](char* shared) { lstm_backward(a, reinterpret_cast<float*>(shared)); });
  return 0;
}

}  // namespace fused_mos
