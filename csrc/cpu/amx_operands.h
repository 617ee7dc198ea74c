// E as the left operand of dzᵀ = Eᵀ·dl, for tile registers.
#pragma once

#include "operands.h"

namespace {

// Transposes 16 vectors of 16 elements: in step s, those bits of row and lane change places.
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

// Copies columns of some classes' rows: column d to to[d·stride + :], in pairs of classes, with zeros up to a multiple of
// kTileSteps pairs and of kTileRows columns.
inline void transpose_columns(const Bfloat16* rows, Index features, Range classes, Range columns, Index stride,
                              Pair* to) {
  for (Index first = classes.begin; first < classes.end; first += 2 * kLanes) {
    for (Index d = 0; d < round_up(columns.size(), kTileRows); d += kLanes) {
      const Index filled = larger(smaller(columns.size() - d, kLanes), 0);
      const auto halves = [&](Index v) {
        Halves row{};
        const Bfloat16* from = rows + v * features + columns.begin + d;
        if (v < classes.end) filled == kLanes ? memcpy(&row, from, sizeof row) : memcpy(&row, from, 2 * filled);
        return __builtin_convertvector(row, Bits);
      };
      __m512i pairs[kLanes];
      for (Index i = 0; i < kLanes; ++i) {
        const Index v = first + 2 * i;
        pairs[i] = (__m512i)(halves(v) | halves(v + 1) << 16);
      }
      transpose(pairs);
      Pair* block = to + d * stride + (first - classes.begin) / 2;
      for (Index i = 0; i < kLanes; ++i) _mm512_storeu_si512(block + i * stride, pairs[i]);
    }
  }
}

}  // namespace
