#include "device.cuh"
// decode.cuh needs the headers above
#include "decode.cuh"

namespace fused_mos {
namespace {

template <class T, int ROW_TILES>
__global__ void __launch_bounds__(THREADS, 1)
    decode_kernel(const __grid_constant__ DecodeArguments arguments, const __grid_constant__ DecodePlan plan) {
  extern __shared__ __align__(16) char shared[];
  Decoder<T, ROW_TILES>{arguments, plan, shared}.run();
}

template <class T>
const void* kernel_of(int row_tiles) {
  if (row_tiles == 2) return reinterpret_cast<const void*>(decode_kernel<T, 2>);
  if (row_tiles == 8) return reinterpret_cast<const void*>(decode_kernel<T, 8>);
  return reinterpret_cast<const void*>(decode_kernel<T, 16>);
}

}  // namespace

int launch_decode(const DecodeArguments& arguments, const DecodePlan& plan, void* stream) {
  const void* kernel = arguments.bf16 ? kernel_of<BFloat16>(plan.row_tiles) : kernel_of<Float16>(plan.row_tiles);
  // always set the same limit: replaying a launch that was captured before must not find it lowered
  if (const auto error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, plan.shared_limit))
    return error;
  void* parameters[] = {const_cast<DecodeArguments*>(&arguments), const_cast<DecodePlan*>(&plan)};
  return cudaLaunchCooperativeKernel(kernel, dim3(plan.n_blocks), dim3(THREADS), parameters, plan.shared_bytes,
                                     static_cast<cudaStream_t>(stream));
}

void cuda_versions(int& runtime, int& driver) {
  if (cudaRuntimeGetVersion(&runtime)) runtime = 0;
  if (cudaDriverGetVersion(&driver)) driver = 0;
}

const char* error_text(int error) { return cudaGetErrorString(static_cast<cudaError_t>(error)); }

}  // namespace fused_mos
