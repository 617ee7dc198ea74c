// Vector types and functions for one instruction set. This header is compiled once per set, so everything in it, and in
// the sources that include it, has internal linkage: the linker would otherwise share one copy of a function among all
// sets, and an old processor could run AVX-512 code.
#pragma once

#include <cstdint>
#include <cstring>

#ifdef __AVX512F__
#include <immintrin.h>
#endif

namespace {

#if defined(__AMX_BF16__)
constexpr int kLanes = 16, kTileRows = 32, kTileVectors = 2;  // sums take four of eight tile registers
#elif defined(__AVX512F__)
constexpr int kLanes = 16, kTileRows = 8, kTileVectors = 3;  // sums take 24 of 32 registers
#elif defined(__AVX2__)
constexpr int kLanes = 8, kTileRows = 4, kTileVectors = 3;  // sums take 12 of 16 registers
#elif defined(__aarch64__)
constexpr int kLanes = 4, kTileRows = 4, kTileVectors = 4;  // 16 of 32: four pipes, each with a latency of four cycles
#else
constexpr int kLanes = 4, kTileRows = 4, kTileVectors = 3;
#endif

typedef float Vector __attribute__((vector_size(4 * kLanes)));
typedef int32_t Integers __attribute__((vector_size(4 * kLanes)));
typedef uint32_t Bits __attribute__((vector_size(4 * kLanes)));  // unsigned, since it may overflow
typedef uint16_t Halves __attribute__((vector_size(2 * kLanes)));

struct Bfloat16 {
  uint16_t bits;
};

// Two bfloat16 that are adjacent in the summed dimension of a product.
struct __attribute__((packed, aligned(2))) Pair {
  uint32_t bits;
};

#define ALWAYS_INLINE __attribute__((always_inline)) inline

ALWAYS_INLINE void prefetch(const void* line) { __builtin_prefetch(line, 0, 2); }

ALWAYS_INLINE Vector load(const float* from) {
  Vector v;
  memcpy(&v, from, sizeof v);
  return v;
}

ALWAYS_INLINE void store(float* to, Vector v) { memcpy(to, &v, sizeof v); }

ALWAYS_INLINE Vector broadcast(float x) { return x - Vector{}; }

ALWAYS_INLINE Vector maximum(Vector a, Vector b) { return a > b ? a : b; }

ALWAYS_INLINE Vector minimum(Vector a, Vector b) { return a < b ? a : b; }

ALWAYS_INLINE float sum(Vector v) {
  float total = 0;
  for (int i = 0; i < kLanes; ++i) total += v[i];
  return total;
}

ALWAYS_INLINE float widen(Bfloat16 x) {
  const uint32_t bits = uint32_t{x.bits} << 16;
  float f;
  memcpy(&f, &bits, sizeof f);
  return f;
}

ALWAYS_INLINE float widen(float x) { return x; }

ALWAYS_INLINE Bits to_bits(Halves halves) {
#ifdef __AVX512F__
  return (Bits)_mm512_maskz_cvtepu16_epi32(0xffff, (__m256i)halves);  // GCC 12 needs five instructions below
#else
  return __builtin_convertvector(halves, Bits);
#endif
}

ALWAYS_INLINE Vector load(const Bfloat16* from) {
  Halves halves;
  memcpy(&halves, from, sizeof halves);
  return (Vector)(to_bits(halves) << 16);
}

// Rounds to nearest, ties to even; NaN stays NaN.
ALWAYS_INLINE Halves round_to_bf16(Vector v) {
  const Bits bits = (Bits)v;
  const Bits rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
  const Bits quiet = (bits >> 16) | 0x40;
  return __builtin_convertvector(v == v ? rounded : quiet, Halves);
}

ALWAYS_INLINE void store(Bfloat16* to, Vector v) {
#ifdef __AVX512BF16__
  const __m256bh halves = _mm512_cvtneps_pbh((__m512)v);
#else
  const Halves halves = round_to_bf16(v);
#endif
  memcpy(to, &halves, sizeof halves);
}

ALWAYS_INLINE void narrow(float x, float* to) { *to = x; }

ALWAYS_INLINE void narrow(float x, Bfloat16* to) { to->bits = round_to_bf16(broadcast(x))[0]; }

template <class To>
void narrow_row(const float* from, int64_t n, To* to) {
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) store(to + i, load(from + i));
  for (; i < n; ++i) narrow(from[i], to + i);
}

// Elements that a product multiplies: float32, or pairs of bfloat16 whose two products are added.
template <class T>
struct Element;

template <>
struct Element<float> {
  static constexpr int kDepth = 1;  // terms of the sum per element
  static ALWAYS_INLINE Vector load_all(const float* from) { return load(from); }
  static ALWAYS_INLINE Vector load_one(const float* from) { return broadcast(*from); }
  static ALWAYS_INLINE Vector multiply_add(Vector a, Vector b, Vector sum) { return a * b + sum; }
};

#ifdef __AVX512BF16__
template <>
struct Element<Pair> {
  static constexpr int kDepth = 2;
  static ALWAYS_INLINE Vector load_all(const Pair* from) { return (Vector)_mm512_loadu_si512(from); }
  static ALWAYS_INLINE Vector load_one(const Pair* from) { return (Vector)_mm512_set1_epi32(int(from->bits)); }
  static ALWAYS_INLINE Vector multiply_add(Vector a, Vector b, Vector sum) {
    return (Vector)_mm512_dpbf16_ps((__m512)sum, (__m512bh)a, (__m512bh)b);
  }
};
#endif

// Returns exp(x) for x ≤ 0, within 1.02 ulp. Results below 2⁻¹²⁶ become 0; NaN stays NaN. Splits x = n ln 2 + r with
// |r| ≤ ln 2 / 2, evaluates a polynomial in r (Remez, relative error 2⁻²⁷), and adds n to the exponent.
ALWAYS_INLINE Vector exp_nonpositive(Vector x) {
  constexpr float kLog2e = 1.44269504f, kLn2High = 0.693359375f, kLn2Low = -2.12194440e-4f;
  constexpr float kRound = 12582912.0f;  // 1.5·2²³: adding it rounds to an integer, which the low bits hold
  const Vector shifted = x * kLog2e + kRound;
  const Vector n = shifted - kRound;
  Vector r = x - n * kLn2High;
  r = r - n * kLn2Low;
  Vector p = r * 1.9875691500e-4f + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * r * r + r + 1.0f;
  const Vector scaled = (Vector)((Bits)p + ((Bits)shifted << 23));
  return x < -87.33f ? Vector{} : scaled;
}

// Returns tanh(x) within 2 ulp, also near 0; NaN stays NaN. Uses a polynomial in x² (from Cephes' tanhf) for |x| < 5/8,
// and 1 − 2e/(1 + e) with e = exp(−2|x|) elsewhere.
ALWAYS_INLINE Vector tanh_of(Vector x) {
  const Bits sign = (Bits)x & 0x80000000u;
  const Vector size = (Vector)((Bits)x ^ sign);
  const Vector square = x * x;
  Vector p = square * -5.70498872745e-3f + 2.06390887954e-2f;
  p = p * square + -5.37397155531e-2f;
  p = p * square + 1.33314422036e-1f;
  p = p * square + -3.33332819422e-1f;
  const Vector near_zero = p * square * size + size;
  const Vector e = exp_nonpositive(size * -2.0f);
  const Vector far = 1.0f - (e + e) / (1.0f + e);
  return (Vector)((Bits)(size < 0.625f ? near_zero : far) | sign);
}

// Returns log(x) for x ≥ 2⁻¹²⁶, within 1 ulp (polynomial from Cephes' logf).
ALWAYS_INLINE Vector log_positive(Vector x) {
  constexpr float kSqrtHalf = 0.707106781f, kLn2High = 0.693359375f, kLn2Low = -2.12194440e-4f;
  const Integers bits = (Integers)x;
  Vector mantissa = (Vector)((bits & 0x007fffff) | 0x3f000000);  // in [1/2, 1)
  const auto small = mantissa < kSqrtHalf;
  const Vector e = __builtin_convertvector((bits >> 23) - 126, Vector) - (small ? broadcast(1.0f) : Vector{});
  const Vector f = (small ? mantissa + mantissa : mantissa) - 1.0f;
  Vector p = f * 7.0376836292e-2f + -1.1514610310e-1f;
  p = p * f + 1.1676998740e-1f;
  p = p * f + -1.2420140846e-1f;
  p = p * f + 1.4249322787e-1f;
  p = p * f + -1.6668057665e-1f;
  p = p * f + 2.0000714765e-1f;
  p = p * f + -2.4999993993e-1f;
  p = p * f + 3.3333331174e-1f;
  const Vector square = f * f;
  const Vector tail = p * f * square + e * kLn2Low - square * 0.5f;
  return e * kLn2High + (f + tail);
}

}  // namespace
