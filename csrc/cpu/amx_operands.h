// Packs the operands of dzᵀ = Eᵀ·dl for tile registers.
#pragma once

#include "operands.h"

namespace {

// Transposes 16 vectors of 16 elements. Each step s = 1, 2, 4, 8 swaps that bit of the row and lane indices.
ALWAYS_INLINE void transpose(__m512i (&rows)[kLanes]) {
#pragma GCC unroll 4
  for (int s = 1; s < kLanes; s *= 2) {
    Integers low, high;
    for (int lane = 0; lane < kLanes; ++lane) {
      low[lane] = lane & s ? kLanes + lane - s : lane;
      high[lane] = lane & s ? kLanes + lane : lane + s;
    }
#pragma GCC unroll 16
    for (int i = 0; i < kLanes; ++i) {
      if (i & s) continue;
      const __m512i a = rows[i], b = rows[i + s];
      rows[i] = _mm512_permutex2var_epi32(a, (__m512i)low, b);
      rows[i + s] = _mm512_permutex2var_epi32(a, (__m512i)high, b);
    }
  }
}

// Packs columns of some classes' rows, transposed. Each group of kLanes columns has room for `steps` pairs of classes
// and is a sequence of tiles (kLanes columns, kTileSteps pairs). Zeros pad the pairs to a multiple of kTileSteps and
// the columns to a multiple of kTileRows.
inline void transpose_columns(const Bfloat16* rows, Index features, Range classes, Range columns, Index steps,
                              Pair* to) {
  for (Index first = classes.begin; first < classes.end; first += 2 * kLanes) {
    for (Index d = 0; d < round_up(columns.size(), kTileRows); d += kLanes) {
      const Index filled = larger(smaller(columns.size() - d, kLanes), 0);
      const auto halves = [&](Index v) {
        Halves row{};
        const Bfloat16* from = rows + v * features + columns.begin + d;
        if (v < classes.end) filled == kLanes ? memcpy(&row, from, sizeof row) : memcpy(&row, from, 2 * filled);
        return to_bits(row);
      };
      __m512i pairs[kLanes];
      for (Index i = 0; i < kLanes; ++i) {
        const Index v = first + 2 * i;
        pairs[i] = (__m512i)(halves(v) | halves(v + 1) << 16);
      }
      transpose(pairs);
      Pair* tile = to + d * steps + (first - classes.begin) / 2 * kLanes;
      for (Index i = 0; i < kLanes; ++i) _mm512_storeu_si512(tile + i * kTileSteps, pairs[i]);
    }
  }
}

// Interleaves a tile (n classes, kBlock) to pairs of classes (steps_of(n), kBlock), zero beyond the n classes.
inline void pair_in_place(Bfloat16* tile, Index n) {
  for (Index v = 0; v < 2 * steps_of<Pair>(n); v += 2) {
    if (v + 1 >= n) memset((void*)(tile + larger(v, n) * kBlock), 0, sizeof(*tile) * (v + 2 - larger(v, n)) * kBlock);
    Bfloat16 rows[2 * kBlock];
    memcpy(rows, tile + v * kBlock, sizeof rows);
    interleave(rows, rows + kBlock, kBlock, (Pair*)(tile + v * kBlock));
  }
}

}  // namespace
