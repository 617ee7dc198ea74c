// Tile of sums in four of AMX's eight tile registers. A register has 16 rows of 64 bytes: 16 float32, or 16 pairs of
// bfloat16. One instruction multiplies a register (16 rows, 16 pairs) of the left operand by a register (16 pairs,
// 16 lanes) of the right one. Two registers of each operand are loaded for four products.
#pragma once

#include "product.h"

namespace {

// The layout that _tile_loadconfig reads; all registers have their full size.
struct alignas(64) TileConfiguration {
  uint8_t palette = 1, start_row = 0, reserved[14] = {};
  uint16_t row_bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
  uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
};

// Constant, because the compiler thinks that the instruction reads only 8 bytes: it could write the others too late.
constexpr TileConfiguration kTileConfiguration;

// Configures the tile registers while a thread multiplies, then releases them: other libraries configure their own.
class ProductRegisters {
 public:
  ProductRegisters() { _tile_loadconfig(&kTileConfiguration); }
  ~ProductRegisters() { _tile_release(); }
  ProductRegisters(const ProductRegisters&) = delete;
  ProductRegisters& operator=(const ProductRegisters&) = delete;
};

// Stands for the sums (kTileRows, NV·kLanes) in registers 0 to 3. Only one such tile exists at a time.
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

// sum[i][:] += Σ_s a[i·a_row + s] · b[s·b_step + :] for kTileSteps steps at a time; `steps` is a multiple of them. Each
// time `a` advances by `a_next` elements. Row 16 of `a` starts `a_half` elements after row 0.
template <int NV>
ALWAYS_INLINE void multiply_tiles(const Pair* a, Index a_row, Index a_next, Index a_half, const Pair* b, Index b_step,
                                  Index steps, Sums<Pair, NV>&) {
  const Index a_bytes = a_row * sizeof(Pair), b_bytes = b_step * sizeof(Pair);
  asm volatile("" ::: "memory");  // GCC 12 does not know that tile loads read memory
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

// sum[i][:] += Σ_s a[i·a_row + s] · b[s·b_step + :]; `steps` is a multiple of kTileSteps.
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

// to[i·stride + :] = sum[i][:]. transform_tile adds the bias, since it reads the tile next.
template <int NV>
ALWAYS_INLINE void store_to(float* to, Index stride, const float* /* bias */, const Sums<Pair, NV>&) {
  store_registers<NV>(to, stride);
}

// to[i·stride + :] += sum[i][:], or = if `starts`, within the first `rows` rows and `columns` columns.
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
