// Micro-kernel and block sizes of the three matrix products, in the letters of the BLIS papers:
//
//        here                           logits = E·zᵀ     dE = dlᵀ·z                     dz = dl·E
//   MR   kTileRows                      classes           classes                        rows
//   NR   kTileVectors·kLanes = kBlock   rows              features                       features
//   MC   (by product)                   kPanel classes    kPanel classes                 kBlock rows
//   KC   (by product)                   all features      kBlocksOfProduct·kBlock rows   kPanelsOfProduct panels
//
// The (MR, NR) tile of sums, `Sums`, stays in registers. vector_sums.h defines it for vector registers and amx_sums.h
// for tile registers, with the functions to clear it, multiply into it and store it. Tile registers compute the third
// product as dzᵀ = Eᵀ·dl, so rows and features trade places in its column.
#pragma once

#include "simd.h"

namespace {

using Index = int64_t;

constexpr int kBlock = kTileVectors * kLanes;  // rows (n, k) in a block, one per lane; also features in a tile
constexpr Index kPanel = 128;  // classes in a panel: a (kPanel, kBlock) tile of logits fits in the L1 cache
constexpr Index kTile = kPanel * kBlock;
#ifdef __AMX_BF16__
constexpr int kTileSteps = 16;  // steps in a tile register; the steps of a product are a multiple
#else
constexpr int kTileSteps = 1;
#endif

// std::min and std::max with internal linkage. A standard-library template that is not inlined is emitted once per
// instruction set, always under the same name, and the linker keeps any one copy: an AVX2 machine could run the AVX-512
// code.
constexpr Index smaller(Index a, Index b) { return a < b ? a : b; }
constexpr Index larger(Index a, Index b) { return a > b ? a : b; }

constexpr Index round_up(Index n, Index multiple) { return (n + multiple - 1) / multiple * multiple; }
constexpr Index ceil_div(Index n, Index divisor) { return (n + divisor - 1) / divisor; }

// The integers in [begin, end).
struct Range {
  Index begin, end;

  Index size() const { return end - begin; }
};

// Returns the part-th of `parts` shares of 0..n, whose sizes differ by at most one.
constexpr Range share(Index n, Index part, Index parts) { return {n * part / parts, n * (part + 1) / parts}; }

// Returns the chunk of 0..n that starts at `begin`: `size` integers, fewer at the end.
constexpr Range chunk_at(Index n, Index begin, Index size) { return {begin, smaller(begin + size, n)}; }

template <int N>
struct Count {
  static constexpr int value = N;
};

// Calls f(Count<n>{}), n being at most kTileVectors: a compile-time count lets loops over a tile's vectors unroll.
template <class F>
ALWAYS_INLINE void with_vectors(Index n, F f) {
  if (n == 1) return f(Count<1>{});
  if (n == 2) return f(Count<2>{});
  if constexpr (kTileVectors > 3) {
    if (n == 3) return f(Count<3>{});
  }
  return f(Count<kTileVectors>{});
}

// to[:n] += sum[:n], or = if `starts`.
template <bool starts>
ALWAYS_INLINE void add_lanes(float* to, Index n, Vector sum) {
  if (n >= kLanes) return store(to, starts ? sum : load(to) + sum);
  for (Index lane = 0; lane < n; ++lane) to[lane] = (starts ? 0 : to[lane]) + sum[lane];
}

}  // namespace

#ifdef __AMX_BF16__
#include "amx_sums.h"
#else
#include "vector_sums.h"
#endif
