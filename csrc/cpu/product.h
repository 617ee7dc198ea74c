// The micro-kernel of every product here, and the sizes that block the products. In the letters of the BLIS papers:
//
//        here                           logits = E·zᵀ     dE = dlᵀ·z                     dz = dl·E
//   MR   kTileRows                      classes           classes                        rows
//   NR   kTileVectors·kLanes = kBlock   rows              features                       features
//   MC   (by product)                   kPanel classes    kPanel classes                 kBlock rows
//   KC   (by product)                   all features      kBlocksOfProduct·kBlock rows   kPanel classes
//
// The tile (MR, NR) of sums stays in registers. `multiply` broadcasts elements of the left operand and loads vectors of
// the right one.
#pragma once

#include "simd.h"

namespace {

using Index = int64_t;

constexpr int kBlock = kTileVectors * kLanes;  // rows (n, k) of a block, one a lane; also the features of a tile
constexpr Index kPanel = 128;  // classes of a panel: a (kPanel, kBlock) tile of logits fits in the L1 cache
constexpr Index kTile = kPanel * kBlock;

// These do what std::min and std::max would, but have internal linkage. A template of the standard library that is not
// inlined is emitted once for each instruction set under one name, and the linker keeps any of them: an AVX2 machine
// could run the AVX-512 copy.
constexpr Index smaller(Index a, Index b) { return a < b ? a : b; }
constexpr Index larger(Index a, Index b) { return a > b ? a : b; }

constexpr Index round_up(Index n, Index multiple) { return (n + multiple - 1) / multiple * multiple; }
constexpr Index ceil_div(Index n, Index divisor) { return (n + divisor - 1) / divisor; }

// The integers in [begin, end).
struct Range {
  Index begin, end;

  Index size() const { return end - begin; }
};

// Cuts 0..n into `parts` shares that differ by at most one, and returns the part-th.
constexpr Range share(Index n, Index part, Index parts) { return {n * part / parts, n * (part + 1) / parts}; }

// Cuts 0..n into chunks of `size`, the last one shorter, and returns the one that starts at `begin`.
constexpr Range chunk_at(Index n, Index begin, Index size) { return {begin, smaller(begin + size, n)}; }

template <int N>
struct Count {
  static constexpr int value = N;
};

// Calls f(Count<n>{}), so that a tile of n vectors is unrolled.
template <class F>
ALWAYS_INLINE void with_vectors(Index n, F f) {
  switch (n) {
    case 1: return f(Count<1>{});
    case 2: return f(Count<2>{});
    default: return f(Count<3>{});
  }
}

template <int NV>
ALWAYS_INLINE void clear(Vector (&sum)[kTileRows][NV]) {
#pragma GCC unroll 8
  for (int i = 0; i < kTileRows; ++i) {
#pragma GCC unroll 3
    for (int j = 0; j < NV; ++j) sum[i][j] = Vector{};
  }
}

// sum[i][:] += Σ_s a[i·a_row + s·a_step] · b[s·b_step + :], the sums in registers throughout.
template <class T, int NV>
ALWAYS_INLINE void multiply(const T* a, Index a_row, Index a_step, const T* b, Index b_step, Index steps,
                            Vector (&sum)[kTileRows][NV]) {
  for (Index s = 0; s < steps; ++s) {
    Vector right[NV];
#pragma GCC unroll 3
    for (int j = 0; j < NV; ++j) right[j] = Element<T>::load_all(b + j * kLanes);
#pragma GCC unroll 8
    for (int i = 0; i < kTileRows; ++i) {
      const Vector left = Element<T>::load_one(a + i * a_row);
#pragma GCC unroll 3
      for (int j = 0; j < NV; ++j) sum[i][j] = Element<T>::multiply_add(left, right[j], sum[i][j]);
    }
    a += a_step;
    b += b_step;
  }
}

// to[i·stride + :] += sum[i][:] within (rows, columns).
template <int NV>
ALWAYS_INLINE void add_to(float* to, Index stride, Index rows, Index columns, const Vector (&sum)[kTileRows][NV]) {
  if (rows >= kTileRows && columns >= NV * kLanes) {
#pragma GCC unroll 8
    for (int i = 0; i < kTileRows; ++i) {
#pragma GCC unroll 3
      for (int j = 0; j < NV; ++j) store(to + i * stride + j * kLanes, load(to + i * stride + j * kLanes) + sum[i][j]);
    }
    return;
  }
  for (Index i = 0; i < smaller(rows, kTileRows); ++i) {
    float row[NV * kLanes];
    for (int j = 0; j < NV; ++j) store(row + j * kLanes, sum[i][j]);
    for (Index c = 0; c < smaller(columns, NV * kLanes); ++c) to[i * stride + c] += row[c];
  }
}

}  // namespace
