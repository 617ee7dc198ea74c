// The table of one instruction set's kernels, and the functions that only tests and benchmarks call.
#include "family.h"
#include "product.h"
#include "threads.h"

namespace {

void exponentials(const float* from, float* to, int64_t n) {
  for (Index i = 0; i < n; i += kLanes) {
    float lanes[kLanes] = {};
    memcpy(lanes, from + i, sizeof(float) * smaller(n - i, kLanes));
    store(lanes, exp_nonpositive(load(lanes)));
    memcpy(to + i, lanes, sizeof(float) * smaller(n - i, kLanes));
  }
}

void logarithms(const float* from, float* to, int64_t n) {
  for (Index i = 0; i < n; i += kLanes) {
    float lanes[kLanes];
    for (float& lane : lanes) lane = 1;
    memcpy(lanes, from + i, sizeof(float) * smaller(n - i, kLanes));
    store(lanes, log_positive(load(lanes)));
    memcpy(to + i, lanes, sizeof(float) * smaller(n - i, kLanes));
  }
}

void hyperbolic_tangents(const float* from, float* to, int64_t n) {
  for (Index i = 0; i < n; i += kLanes) {
    float lanes[kLanes] = {};
    memcpy(lanes, from + i, sizeof(float) * smaller(n - i, kLanes));
    store(lanes, tanh_of(load(lanes)));
    memcpy(to + i, lanes, sizeof(float) * smaller(n - i, kLanes));
  }
}

#ifdef __AMX_BF16__
constexpr bool kBf16Products = true;

// Measures as many independent products as the tile registers allow, without memory accesses.
double peak_gflops(int n_threads, bool) {
  constexpr Index kSteps = 2000000;
  const double start = omp_get_wtime();
#pragma omp parallel num_threads(n_threads)
  {
    const ProductRegisters registers;  // all zeros
    for (Index s = 0; s < kSteps; ++s) {
      _tile_dpbf16ps(0, 4, 6);
      _tile_dpbf16ps(1, 4, 7);
      _tile_dpbf16ps(2, 5, 6);
      _tile_dpbf16ps(3, 5, 7);
    }
  }
  const double seconds = omp_get_wtime() - start;
  return 2.0 * n_threads * kSteps * kTileRows * kBlock * 2 * kTileSteps / seconds / 1e9;
}
#else
// Measures as many independent multiply-adds as the registers allow, without memory accesses.
template <class T>
double peak(int n_threads) {
  constexpr int kSums = kTileRows * kTileVectors;
  constexpr Index kSteps = 2000000;
  const double start = omp_get_wtime();
#pragma omp parallel num_threads(n_threads)
  {
    Vector sums[kSums] = {}, a = broadcast(1.0f), b = broadcast(1e-30f);
    for (Index s = 0; s < kSteps; ++s) {
#pragma GCC unroll 24
      for (int i = 0; i < kSums; ++i) {
        sums[i] = Element<T>::multiply_add(a, b, sums[i]);
        // forces the compiler to compute each sum, in a register
#if defined(__AVX512F__)
        asm volatile("" : "+v"(sums[i]));
#elif defined(__aarch64__)
        asm volatile("" : "+w"(sums[i]));
#else
        asm volatile("" : "+x"(sums[i]));
#endif
      }
    }
  }
  const double seconds = omp_get_wtime() - start;
  return 2.0 * n_threads * kSteps * kSums * kLanes * Element<T>::kDepth / seconds / 1e9;
}

#ifdef __AVX512BF16__
constexpr bool kBf16Products = true;
double peak_gflops(int n_threads, bool bf16) { return bf16 ? peak<Pair>(n_threads) : peak<float>(n_threads); }
#else
constexpr bool kBf16Products = false;
double peak_gflops(int n_threads, bool) { return peak<float>(n_threads); }
#endif
#endif

}  // namespace

namespace fused_mos::FUSED_MOS_NAMESPACE {

extern const Kernels kernels;
const Kernels kernels = {
    FUSED_MOS_ISA_NAME, kBf16Products,        row_statistics,
    rows_backward,      nll_with_gradients,   mixture,
    mixture_backward,   mixture_in_one_sweep, sample,
    lstm_forward,       lstm_backward,        matrix_product,
    exponentials,       logarithms,           hyperbolic_tangents,
    peak_gflops,
};

}  // namespace fused_mos::FUSED_MOS_NAMESPACE
