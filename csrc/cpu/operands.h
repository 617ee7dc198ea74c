// Packing: which operands of the three products are copied, and into which layout.
//
//   logits (V, rows) = E (V, D) · zᵀ (D, rows)   E is read in place and broadcast; zᵀ has rows in lanes, so that
//                                                maxima and sums over the classes need no shuffles
//   dE (V, D) = dlᵀ (V, rows) · z (rows, D)      dl is read from its tiles, z is copied by blocks of columns
//   dz (rows, D) = dl (rows, V) · E (V, D)       dl is read from the same tiles, E is copied by blocks of columns
//
// Each operand interleaves pairs of bfloat16 along the summed dimension.
#pragma once

#include <math.h>

#include "kernels.h"
#include "product.h"
#include "threads.h"
#include "transform.h"
#include "workspace.h"

namespace {

using fused_mos::Buffer;
using fused_mos::Head;

// Element types: In of the caller's operands, Op of the products, Stored of the tiles of exponentials.
struct Float32 {
  using In = float;
  using Op = float;
  using Stored = float;
};
struct WidenedBfloat16 {
  using In = Bfloat16;
  using Op = float;
  using Stored = float;
};
struct PairedBfloat16 {
  using In = Bfloat16;
  using Op = Pair;
  using Stored = Bfloat16;
};

template <class F>
ALWAYS_INLINE auto with_types(const Head& head, F f) {
#if defined(__AMX_BF16__)
  (void)head;  // tile registers multiply only bfloat16 (dispatch.cpp)
  return f(PairedBfloat16{});
#else
  if (!head.bf16) return f(Float32{});
#if defined(__AVX512BF16__)
  return f(PairedBfloat16{});
#else
  return f(WidenedBfloat16{});
#endif
#endif
}

template <class Op>
Index steps_of(Index depth) {
  return round_up(ceil_div(depth, Element<Op>::kDepth), kTileSteps);
}

// Returns a stride of an odd number of cache lines for tile registers: an even number maps rows to few cache sets.
template <class Op>
Index stride_of(Index steps) {
  return kTileSteps == 1 || steps / kTileSteps % 2 ? steps : steps + kTileSteps;
}

// Rounds the features up to an odd number of vectors: rows an even number of lines apart map to few cache sets.
inline Index padded_features(const Head& head) {
  const Index lines = ceil_div(head.n_features, kLanes);
  return (lines + (lines % 2 == 0)) * kLanes;
}

// Maximum number of groups of panels, each a task with sums of its own. It does not depend on the number of threads, so
// each sum has a fixed order.
constexpr Index kGroups = 16;

inline Index panels_of(const Head& head) { return ceil_div(head.n_classes, kPanel); }

inline Index classes_in(const Head& head, Index panel) { return smaller(kPanel, head.n_classes - panel * kPanel); }

// Rows (n, k) in blocks of kBlock lanes; only the last lanes of a block may be empty.
struct RowBlocks {
  Index n_blocks;
  const Index* source;  // (n_blocks · kBlock), the row in each lane, −1 if empty
  const Index* filled;  // (n_blocks), the number of rows in each block

  Index vectors(Index block) const { return ceil_div(filled[block], kLanes); }
};

// -------------------------------------------------------------------------------------- z, right operand of the logits

inline void pack_lane(const float* row, Index features, int lane, float* to) {
  for (Index d = 0; d < features; ++d) to[d * kBlock + lane] = row[d];
}

inline void pack_lane(const Bfloat16* row, Index features, int lane, float* to) {
  for (Index d = 0; d < features; ++d) to[d * kBlock + lane] = widen(row[d]);
}

inline Pair pair(Bfloat16 low, Bfloat16 high) { return Pair{uint32_t{low.bits} | uint32_t{high.bits} << 16}; }

// to[i] = (low[i], high[i])
inline void interleave(const Bfloat16* low, const Bfloat16* high, Index n, Pair* to) {
  Index i = 0;
  for (; i + kLanes <= n; i += kLanes) {
    Halves a, b;
    memcpy(&a, low + i, sizeof a);
    memcpy(&b, high + i, sizeof b);
    const Bits pairs = to_bits(a) | to_bits(b) << 16;
    memcpy((void*)(to + i), &pairs, sizeof pairs);
  }
  for (; i < n; ++i) to[i] = pair(low[i], high[i]);
}

inline void pack_lane(const Bfloat16* row, Index features, int lane, Pair* to) {
  for (Index d = 0; d < features; d += 2) {
    to[d / 2 * kBlock + lane] = pair(row[d], d + 1 < features ? row[d + 1] : Bfloat16{0});
  }
}

// Packs zᵀ of one block, (steps, kBlock); empty lanes are zero.
template <class T>
void pack_block(const Head& head, const typename T::In* rows, const RowBlocks& blocks, Index block,
                typename T::Op* to) {
  const Index filled = blocks.filled[block], steps = steps_of<typename T::Op>(head.n_features);
  const Index used = ceil_div(head.n_features, Element<typename T::Op>::kDepth);
  for (Index lane = 0; lane < filled; ++lane) {
    pack_lane(rows + blocks.source[block * kBlock + lane] * head.n_features, head.n_features, int(lane), to);
  }
  for (Index s = 0; s < used && filled < kBlock; ++s) {
    memset((void*)(to + s * kBlock + filled), 0, sizeof(*to) * (kBlock - filled));
  }
  if (used < steps) memset((void*)(to + used * kBlock), 0, sizeof(*to) * (steps - used) * kBlock);
}

// --------------------------------------------------------------------------------------- E, left operand of the logits

template <class Op>
struct LogitsOperand {
  const Op* rows;  // as many as n_classes, rounded up to a multiple of kTileRows
  Index stride, steps;
  const float* bias;
  Index n_classes;
  LogitTransform transform;
};

template <class T>
Index logits_scratch_bytes(const Head& head) {
  using Op = typename T::Op;
  return kPanel * (sizeof(Op) * stride_of<Op>(steps_of<Op>(head.n_features)) + sizeof(float));
}

inline void copy_row(const float* from, Index n, float* to) { narrow_row(from, n, to); }

inline void copy_row(const Bfloat16* from, Index n, float* to) {
  Index i = 0;
  for (; i + kLanes <= n; i += kLanes) store(to + i, load(from + i));
  for (; i < n; ++i) to[i] = widen(from[i]);
}

inline void copy_row(const Bfloat16* from, Index n, Pair* to) {
  if (n > 1) memcpy((void*)to, from, sizeof(Pair) * (n / 2));
  if (n % 2) to[n / 2] = pair(from[n - 1], Bfloat16{0});
}

// Returns a panel of E, in place if the product can read it there, else copied to `scratch`. Classes that pad a copy
// have a bias of −inf, so that they change neither maxima nor sums.
template <class T>
LogitsOperand<typename T::Op> logits_operand(const Head& head, Index panel, void* scratch) {
  using Op = typename T::Op;
  const Index features = head.n_features, n = classes_in(head, panel), steps = steps_of<Op>(features);
  const Index stride = stride_of<Op>(steps), used = ceil_div(features, Element<Op>::kDepth);
  const auto* rows = (const typename T::In*)head.weight + panel * kPanel * features;
  const float* bias = head.bias ? head.bias + panel * kPanel : nullptr;
  const LogitTransform transform(head.transform);
  const bool in_place = sizeof(Op) * stride == sizeof(*rows) * features && n % kTileRows == 0;
  if (in_place) return {(const Op*)rows, stride, steps, bias, n, transform};
  Op* copy = (Op*)scratch;
  float* padded_bias = (float*)(copy + kPanel * stride);
  for (Index v = 0; v < n; ++v) {
    copy_row(rows + v * features, features, copy + v * stride);
    memset((void*)(copy + v * stride + used), 0, sizeof(Op) * (steps - used));
    padded_bias[v] = bias ? bias[v] : 0.0f;
  }
  for (Index v = n; v < round_up(n, kTileRows); ++v) {
    memset((void*)(copy + v * stride), 0, sizeof(Op) * steps);
    padded_bias[v] = -INFINITY;
  }
  return {copy, stride, steps, padded_bias, n, transform};
}

// Adds the bias, unless it is null, to a tile of n classes, transforms it, and raises `largest` to its maxima.
template <int NV>
ALWAYS_INLINE void transform_tile(const LogitTransform& transform, const float* bias, Index n, float* tile,
                                  Vector (&largest)[NV]) {
  const bool is_identity = transform.is_identity();
  Vector of_odd[NV];  // maxima of the odd classes: one chain of maxima would wait for each result
  for (int j = 0; j < NV; ++j) of_odd[j] = largest[j];
  for (Index v = 0; v < n; v += 2) {
#pragma GCC unroll 8
    for (int j = 0; j < 2 * NV; ++j) {
      float* at = tile + v * kBlock + j / NV * kBlock + j % NV * kLanes;
      Vector logit = load(at);
      if (bias) logit += bias[v + j / NV];
      if (!is_identity) logit = transform.apply(logit);
      if (bias || !is_identity) store(at, logit);
      Vector& maxima = j < NV ? largest[j] : of_odd[j - NV];
      maxima = maximum(logit, maxima);
    }
  }
  for (int j = 0; j < NV; ++j) largest[j] = maximum(of_odd[j], largest[j]);
}

// Computes tile (kPanel, kBlock) = transform(E·zᵀ + b) of one panel and block; raises `largest` to the maxima over the
// classes. Rows beyond the panel's classes are undefined.
template <class Op, int NV>
ALWAYS_INLINE void logits_tile(const LogitsOperand<Op>& e, const Op* z, float* tile, Vector (&largest)[NV]) {
  for (Index v = 0; v < e.n_classes; v += kTileRows) {
    Sums<Op, NV> sum;
    clear(sum);
    multiply(e.rows + v * e.stride, e.stride, 1, z, kBlock, e.steps, sum);
    store_to(tile + v * kBlock, kBlock, e.bias ? e.bias + v : nullptr, sum);
  }
  // a second pass: maxima kept in registers beside the product's sums would make the compiler spill
  transform_tile(e.transform, kTileSteps > 1 ? e.bias : nullptr, e.n_classes, tile, largest);
}

// ---------------------------------------------------------------------------- E and z, right operands of the gradients

inline void merge_rows(const float* row, const float*, Index n, float* to) { copy_row(row, n, to); }

inline void merge_rows(const Bfloat16* row, const Bfloat16*, Index n, float* to) { copy_row(row, n, to); }

// to[i] = (row[i], next[i]); a null `next` means zeros.
inline void merge_rows(const Bfloat16* row, const Bfloat16* next, Index n, Pair* to) {
  if (next) return interleave(row, next, n, to);
  for (Index i = 0; i < n; ++i) to[i] = pair(row[i], Bfloat16{0});
}

// Copies columns [start, end) of the rows source[0..n), or of the rows [0, n) if `source` is null, to blocks of kBlock
// columns. Blocks are `stride` elements apart; each is (steps_of(n), kBlock), zero beyond the rows and features.
template <class T>
void pack_columns(const typename T::In* rows, const Index* source, Index n, Index features, Index start, Index end,
                  Index stride, typename T::Op* to) {
  constexpr int kDepth = Element<typename T::Op>::kDepth;
  for (Index r = 0; r < n; r += kDepth, to += kBlock) {
    const auto* row = rows + (source ? source[r] : r) * features;
    const bool has_next = kDepth == 2 && r + 1 < n;
    const auto* next = has_next ? rows + (source ? source[r + 1] : r + 1) * features : nullptr;
    auto* block = to;
    for (Index d = start; d < end; d += kBlock, block += stride) {
      const Index width = smaller(features - d, kBlock);
      merge_rows(row + d, has_next ? next + d : nullptr, width, block);
      if (width < kBlock) memset((void*)(block + width), 0, sizeof(*to) * (kBlock - width));
    }
  }
  const Index missing = steps_of<typename T::Op>(n) - ceil_div(n, kDepth);
  for (Index d = start; missing && d < end; d += kBlock, to += stride)
    memset((void*)to, 0, sizeof(*to) * missing * kBlock);
}

// Zeroes the lanes [from, kBlock) of a tile of n classes.
template <class Stored>
void clear_lanes(Stored* tile, Index n, Index from) {
  for (Index v = 0; v < n && from < kBlock; ++v)
    memset((void*)(tile + v * kBlock + from), 0, sizeof(*tile) * (kBlock - from));
}

}  // namespace
