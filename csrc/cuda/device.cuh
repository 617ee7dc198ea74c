// The GPU operations that decode.cuh and lstm.cuh use. emulation.h has the same for a CPU.
#pragma once
#include <cooperative_groups.h>
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>

#define FUSED_MOS_DEVICE __device__ __forceinline__

namespace fused_mos {

struct BFloat16 {};
struct Float16 {};

namespace device {

FUSED_MOS_DEVICE int thread() { return threadIdx.x; }
FUSED_MOS_DEVICE int block() { return blockIdx.x; }
FUSED_MOS_DEVICE void sync_warp() { __syncwarp(); }
FUSED_MOS_DEVICE void sync_block() { __syncthreads(); }
FUSED_MOS_DEVICE void sync_grid() { cooperative_groups::this_grid().sync(); }

template <class Number>
FUSED_MOS_DEVICE Number shuffle_xor(Number value, int mask) {
  return __shfl_xor_sync(0xffffffffu, value, mask);
}

FUSED_MOS_DEVICE bool all_of_warp(bool value) { return __all_sync(0xffffffffu, value); }

FUSED_MOS_DEVICE float exp(float x) { return __expf(x); }
FUSED_MOS_DEVICE float log(float x) { return logf(x); }
FUSED_MOS_DEVICE float reciprocal(float x) { return __fdividef(1, x); }  // 0 for x ≥ 2^126
FUSED_MOS_DEVICE float log1p(float x) { return log1pf(x); }
FUSED_MOS_DEVICE uint32_t high_product(uint32_t a, uint32_t b) { return __umulhi(a, b); }

FUSED_MOS_DEVICE float as_float(uint16_t bits, BFloat16) { return __uint_as_float(static_cast<uint32_t>(bits) << 16); }
FUSED_MOS_DEVICE float as_float(uint16_t bits, Float16) { return __half2float(__ushort_as_half(bits)); }

FUSED_MOS_DEVICE uint32_t rounded(float x) { return __bfloat16_as_ushort(__float2bfloat16_rn(x)); }

// Words that other blocks read while the kernel runs. They bypass the L1 cache. In a vector of words, each word is
// either old or new.
FUSED_MOS_DEVICE void store_word(void* at, uint32_t word) {
  asm volatile("st.relaxed.gpu.global.u32 [%0], %1;" ::"l"(at), "r"(word) : "memory");
}
FUSED_MOS_DEVICE void load_words(uint32_t (&to)[4], const void* at) {
  asm volatile("ld.relaxed.gpu.global.v4.u32 {%0,%1,%2,%3}, [%4];"
               : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3])
               : "l"(at)
               : "memory");
}
FUSED_MOS_DEVICE void pause() {}  // called while a thread waits for such a word

// c (16 × 8) += a (16 × 16) · b (16 × 8), distributed over a warp like mma.sync.m16n8k16: lane 4·g + t has rows g and
// g + 8 of a and c, and column g of b. Of a and b it has the pairs of features that start at 2·t and 2·t + 8, of c the
// columns 2·t and 2·t + 1.
FUSED_MOS_DEVICE void multiply(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], BFloat16) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}
FUSED_MOS_DEVICE void multiply(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], Float16) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

// Copies BYTES from global to shared memory asynchronously, or writes zeros if there is nothing to copy.
template <int BYTES>
FUSED_MOS_DEVICE void copy_async(void* to, const void* from, bool there) {
  const uint32_t address = static_cast<uint32_t>(__cvta_generic_to_shared(to));
  const int n = there ? BYTES : 0;
  if constexpr (BYTES == 16)  // bypass the L1 cache, since nothing else reads it
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(address), "l"(from), "r"(n) : "memory");
  else
    asm volatile("cp.async.ca.shared.global [%0], [%1], %2, %3;" ::"r"(address), "l"(from), "n"(BYTES), "r"(n)
                 : "memory");
}
FUSED_MOS_DEVICE void commit_copies() { asm volatile("cp.async.commit_group;" ::: "memory"); }
template <int PENDING>
FUSED_MOS_DEVICE void wait_for_copies() {
  asm volatile("cp.async.wait_group %0;" ::"n"(PENDING) : "memory");
}

}  // namespace device
}  // namespace fused_mos
