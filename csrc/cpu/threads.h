// OpenMP's functions that the kernels call. Without OpenMP, they answer for a program of one thread.
#pragma once

#ifdef _OPENMP
#include <omp.h>
#else
#include <chrono>

namespace {

inline int omp_get_thread_num() { return 0; }
inline int omp_get_num_threads() { return 1; }

inline double omp_get_wtime() {
  return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count();
}

}  // namespace
#endif
