// A tile of sums in four of the eight tile registers of AMX, each of which has 16 rows of 64 bytes: 16 float32, or 16
// pairs of bfloat16. An instruction multiplies 16 rows of the left operand, 16 pairs of each, by 16 vectors of pairs of
// the right one. Two registers of either operand are loaded for four products.
#pragma once

#include "product.h"

namespace {

// The layout that the instruction reads; registers of full size.
struct alignas(64) TileConfiguration {
  uint8_t palette = 1, start_row = 0, reserved[14] = {};
  uint16_t row_bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
  uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
};

// A constant, since to the compiler the instruction reads the first 8 bytes alone: others would not be written in time.
constexpr TileConfiguration kTileConfiguration;

// The configuration that a thread needs while it multiplies. It is not kept: other libraries have their own.
class ProductRegisters {
 public:
  ProductRegisters() { _tile_loadconfig(&kTileConfiguration); }
  ~ProductRegisters() { _tile_release(); }
  ProductRegisters(const ProductRegisters&) = delete;
  ProductRegisters& operator=(const ProductRegisters&) = delete;
};

// Names the sums (kTileRows, NV·kLanes) that are in the registers 0 to 3: there is one such tile at a time.
template <class T, int NV>
struct Sums {};

template <int NV>
ALWAYS_INLINE void clear(Sums<Pair, NV>&) {
  _tile_zero(0);
  _tile_zero(2);
  if constexpr (NV > 1) {
    _tile_zero(1);
    _tile_zero(3);
  }
}

// sum[i][:] += Σ_s a[i·a_row + s] · b[s·b_step + :], where the number of steps is a multiple of kTileSteps: but row 0
// of the next kTileSteps of them is `a_next` further on, and row 16 `a_half`.
template <int NV>
ALWAYS_INLINE void multiply_tiles(const Pair* a, Index a_row, Index a_next, Index a_half, const Pair* b, Index b_step,
                                  Index steps, Sums<Pair, NV>&) {
  const Index a_bytes = a_row * sizeof(Pair), b_bytes = b_step * sizeof(Pair);
  asm volatile("" ::: "memory");  // GCC 12 does not know that what follows reads memory
  for (Index s = 0; s < steps; s += kTileSteps) {
    _tile_loadd(4, a, a_bytes);
    _tile_loadd(6, b, b_bytes);
    _tile_dpbf16ps(0, 4, 6);
    _tile_loadd(5, a + a_half, a_bytes);
    _tile_dpbf16ps(2, 5, 6);
    if constexpr (NV > 1) {
      _tile_loadd(7, b + kLanes, b_bytes);
      _tile_dpbf16ps(1, 4, 7);
      _tile_dpbf16ps(3, 5, 7);
    }
    a += a_next;
    b += kTileSteps * b_step;
  }
}

// sum[i][:] += Σ_s a[i·a_row + s] · b[s·b_step + :], where the number of steps is a multiple of kTileSteps.
template <int NV>
ALWAYS_INLINE void multiply(const Pair* a, Index a_row, Index /* a_step, 1 */, const Pair* b, Index b_step, Index steps,
                            Sums<Pair, NV>& sum) {
  multiply_tiles(a, a_row, kTileSteps, 16 * a_row, b, b_step, steps, sum);
}

template <int NV>
ALWAYS_INLINE void store_registers(float* to, Index stride) {
  const Index bytes = stride * sizeof(float);
  _tile_stored(0, to, bytes);
  _tile_stored(2, to + 16 * stride, bytes);
  if constexpr (NV > 1) {
    _tile_stored(1, to + kLanes, bytes);
    _tile_stored(3, to + 16 * stride + kLanes, bytes);
  }
}

// to[i·stride + :] = sum[i][:]; the bias is added where the tile is read next.
template <int NV>
ALWAYS_INLINE void store_to(float* to, Index stride, const float* /* bias */, const Sums<Pair, NV>&) {
  store_registers<NV>(to, stride);
}

// to[i·stride + :] += sum[i][:], or = where it `starts`, within (rows, columns).
template <bool starts, int NV>
ALWAYS_INLINE void add_to(float* to, Index stride, Index rows, Index columns, const Sums<Pair, NV>&) {
  if (starts && rows >= kTileRows && columns >= NV * kLanes) return store_registers<NV>(to, stride);
  alignas(64) float sums[kTileRows * NV * kLanes];
  store_registers<NV>(sums, NV * kLanes);
  for (Index i = 0; i < smaller(rows, kTileRows); ++i) {
    for (int j = 0; j < NV; ++j) {
      add_lanes<starts>(to + i * stride + j * kLanes, columns - j * kLanes, load(sums + (i * NV + j) * kLanes));
    }
  }
}

}  // namespace
