#include "device.cuh"
// lstm.cuh needs the headers above
#include "lstm.cuh"

namespace fused_mos {
namespace {

template <int UNITS>
__global__ void __launch_bounds__(LSTM_THREADS, 1) lstm_forward_kernel(const __grid_constant__ LstmForward arguments) {
  extern __shared__ __align__(16) float sums[];
  lstm_forward<UNITS>(arguments, sums);
}

__global__ void __launch_bounds__(LSTM_THREADS, 1)
    lstm_backward_kernel(const __grid_constant__ LstmBackward arguments) {
  extern __shared__ __align__(16) float sums[];
  lstm_backward(arguments, sums);
}

// Launches the kernel after filling `exchanged` with ABSENT.
int launch(const void* kernel, const void* arguments, int n_blocks, int shared_bytes, void* exchanged, int64_t n_bytes,
           void* stream) {
  const auto of_torch = static_cast<cudaStream_t>(stream);
  if (const auto error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, shared_bytes))
    return error;
  if (const auto error = cudaMemsetAsync(exchanged, 0xff, n_bytes, of_torch)) return error;
  void* parameters[] = {const_cast<void*>(arguments)};
  return cudaLaunchCooperativeKernel(kernel, dim3(n_blocks), dim3(LSTM_THREADS), parameters, shared_bytes, of_torch);
}

}  // namespace

int launch_lstm(const LstmForward& a, const LstmPlan& plan, void* stream) {
  const void* kernel = plan.forward_units == 8 ? reinterpret_cast<const void*>(lstm_forward_kernel<8>)
                                               : reinterpret_cast<const void*>(lstm_forward_kernel<12>);
  return launch(kernel, &a, plan.forward_blocks, plan.forward_shared_bytes, a.states,
                int64_t{2} * a.shape.n_steps * a.shape.n_rows * a.shape.padded, stream);
}

int launch_lstm(const LstmBackward& a, const LstmPlan& plan, void* stream) {
  return launch(reinterpret_cast<const void*>(lstm_backward_kernel), &a, plan.backward_blocks,
                plan.backward_shared_bytes, a.grad_gates, int64_t{8} * a.shape.n_steps * a.shape.n_rows * a.shape.width,
                stream);
}

}  // namespace fused_mos
