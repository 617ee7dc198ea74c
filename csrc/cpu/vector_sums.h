// Tile of sums in vector registers. `multiply` broadcasts elements of the left operand and loads vectors of the right.
#pragma once

#include "product.h"

namespace {

template <class T, int NV>
using Sums = Vector[kTileRows][NV];

// A thread holds one while it multiplies. Vector registers need no setup; tile registers do (amx_sums.h).
struct ProductRegisters {
  ProductRegisters() {}
};

template <int NV>
ALWAYS_INLINE void clear(Vector (&sum)[kTileRows][NV]) {
#pragma GCC unroll 8
  for (int i = 0; i < kTileRows; ++i) {
#pragma GCC unroll 4
    for (int j = 0; j < NV; ++j) sum[i][j] = Vector{};
  }
}

// sum[i][:] += Σ_s a[i·a_row + s·a_step] · b[s·b_step + :]; the sums stay in registers.
template <class T, int NV>
ALWAYS_INLINE void multiply(const T* a, Index a_row, Index a_step, const T* b, Index b_step, Index steps,
                            Vector (&sum)[kTileRows][NV]) {
  for (Index s = 0; s < steps; ++s) {
    Vector right[NV];
#pragma GCC unroll 4
    for (int j = 0; j < NV; ++j) right[j] = Element<T>::load_all(b + j * kLanes);
#pragma GCC unroll 8
    for (int i = 0; i < kTileRows; ++i) {
      const Vector left = Element<T>::load_one(a + i * a_row);
#pragma GCC unroll 4
      for (int j = 0; j < NV; ++j) sum[i][j] = Element<T>::multiply_add(left, right[j], sum[i][j]);
    }
    a += a_step;
    b += b_step;
  }
}

// to[i·stride + :] = sum[i][:] + bias[i]; a null `bias` means zeros.
template <int NV>
ALWAYS_INLINE void store_to(float* to, Index stride, const float* bias, const Vector (&sum)[kTileRows][NV]) {
#pragma GCC unroll 8
  for (int i = 0; i < kTileRows; ++i) {
    const Vector added = broadcast(bias ? bias[i] : 0.0f);
#pragma GCC unroll 4
    for (int j = 0; j < NV; ++j) store(to + i * stride + j * kLanes, sum[i][j] + added);
  }
}

// to[i·stride + :] += sum[i][:], or = if `starts`, within the first `rows` rows and `columns` columns.
template <bool starts, int NV>
ALWAYS_INLINE void add_to(float* to, Index stride, Index rows, Index columns, const Vector (&sum)[kTileRows][NV]) {
  if (rows >= kTileRows && columns >= NV * kLanes) {
#pragma GCC unroll 8
    for (int i = 0; i < kTileRows; ++i) {
#pragma GCC unroll 4
      for (int j = 0; j < NV; ++j) add_lanes<starts>(to + i * stride + j * kLanes, kLanes, sum[i][j]);
    }
    return;
  }
  // Only indices known at compile time let the compiler keep the sums in registers: from here on they are in a copy.
  Vector copy[kTileRows][NV];
#pragma GCC unroll 8
  for (int i = 0; i < kTileRows; ++i) {
#pragma GCC unroll 4
    for (int j = 0; j < NV; ++j) copy[i][j] = sum[i][j];
  }
  for (Index i = 0; i < smaller(rows, kTileRows); ++i) {
    for (int j = 0; j < NV; ++j) add_lanes<starts>(to + i * stride + j * kLanes, columns - j * kLanes, copy[i][j]);
  }
}

}  // namespace
