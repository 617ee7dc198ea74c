// The micro-kernel of every product here, and the sizes that block the products. In the letters of the BLIS papers:
//
//        here                           logits = E·zᵀ     dE = dlᵀ·z                     dz = dl·E
//   MR   kTileRows                      classes           classes                        rows
//   NR   kTileVectors·kLanes = kBlock   rows              features                       features
//   MC   (by product)                   kPanel classes    kPanel classes                 kBlock rows
//   KC   (by product)                   all features      kBlocksOfProduct·kBlock rows   kPanelsOfProduct·kPanel
//
// The tile (MR, NR) of sums stays in registers: `Sums`, with what clears it, multiplies into it and stores it, in
// vector_sums.h or, for tile registers, in amx_sums.h. There the rows' gradients are dzᵀ = Eᵀ·dl, rows and features
// having changed places.
#pragma once

#include "simd.h"

namespace {

using Index = int64_t;

constexpr int kBlock = kTileVectors * kLanes;  // rows (n, k) of a block, one a lane; also the features of a tile
constexpr Index kPanel = 128;  // classes of a panel: a (kPanel, kBlock) tile of logits fits in the L1 cache
constexpr Index kTile = kPanel * kBlock;
#ifdef __AMX_BF16__
constexpr int kTileSteps = 16;  // the steps of a product are a multiple of it: a tile register's
#else
constexpr int kTileSteps = 1;
#endif

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
  if (n == 1) return f(Count<1>{});
  if (n == 2) return f(Count<2>{});
  if constexpr (kTileVectors > 3) {
    if (n == 3) return f(Count<3>{});
  }
  return f(Count<kTileVectors>{});
}

// to[:] += sum[:], or = where it `starts`, of the first n lanes.
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
