// out (M, N) = A (M, depth) · B (depth, N) + bias, for the products of an LSTM layer over all time steps. Operands may
// be transposed, and are packed before: A by tiles of kTileRows rows, B by blocks of kBlock columns. Each number of the
// result is one sum in a fixed order.
#include "family.h"
#include "operands.h"
#include "threads.h"

#ifndef __AMX_BF16__
namespace {

using fused_mos::MatrixOperand;
using fused_mos::ProductArguments;

constexpr Index kStepsOfProduct = 512;
constexpr Index kTilesOfTask = 24;   // tiles of rows: with so many steps, they stay in the L2 cache
constexpr Index kBlocksOfTask = 6;   // blocks of columns that reuse them
constexpr Index kTasksOfThread = 4;  // at least, if there are enough blocks
constexpr Index kPart = 16;          // steps that are packed at a time

// Rounds `n` numbers of each of the rows [first, first + kDepth) of `from`, which are contiguous, and interleaves them.
// Rows from `depth` on are 0.
template <class T>
ALWAYS_INLINE void merge_steps(const MatrixOperand& from, Index first, Index depth, Index column, Index n,
                               typename T::Stored* rounded, typename T::Op* to) {
  constexpr int kDepth = Element<typename T::Op>::kDepth;
  for (Index i = 0; i < kDepth && first + i < depth; ++i) {
    narrow_row(from.data + (first + i) * from.stride + column, n, rounded + i * kBlock);
  }
  merge_rows(rounded, first + kDepth <= depth ? rounded + kBlock : nullptr, n, to);
}

template <class T>
class MatrixProduct {
  using Op = typename T::Op;
  using Stored = typename T::Stored;
  static constexpr int kDepth = Element<Op>::kDepth;

 public:
  explicit MatrixProduct(const ProductArguments& a)
      : a_(a),
        steps_(ceil_div(a.depth, kDepth)),
        tiles_(ceil_div(a.rows, kTileRows)),
        blocks_(ceil_div(a.columns, kBlock)),
        left_(tiles_ * kTileRows * steps_),
        right_(blocks_ * kBlock * steps_) {}

  void run() const {
#pragma omp parallel num_threads(a_.n_threads)
    {
#pragma omp for schedule(dynamic) nowait
      for (Index part = 0; part < parts(a_.left, tiles_); ++part) pack<kTileRows>(a_.left, a_.rows, part, left_);
#pragma omp for schedule(dynamic)
      for (Index part = 0; part < parts(a_.right, blocks_); ++part) pack<kBlock>(a_.right, a_.columns, part, right_);
      const Index sets = ceil_div(tiles_, kTilesOfTask);
      const Index size = smaller(larger(blocks_ * sets / (kTasksOfThread * a_.n_threads), 1), kBlocksOfTask);
#pragma omp for schedule(dynamic)
      for (Index task = 0; task < ceil_div(blocks_, size) * sets; ++task) {
        multiply_part(chunk_at(tiles_, task % sets * kTilesOfTask, kTilesOfTask),
                      chunk_at(blocks_, task / sets * size, size));
      }
    }
  }

 private:
  // Returns the number of parts in which an operand is packed: some steps of all groups of lanes or, if its steps are
  // contiguous in memory, all steps of one group.
  Index parts(const MatrixOperand& operand, Index groups) const {
    return operand.steps_are_contiguous ? groups : ceil_div(steps_, kPart);
  }

  // Packs one part of an operand with `n` lanes (rows of A, columns of B) as groups of kWidth lanes, (steps, kWidth)
  // each. Missing lanes are 0.
  template <Index kWidth>
  void pack(const MatrixOperand& from, Index n, Index part, Op* to) const {
    if (!from.steps_are_contiguous) {
      const Range steps = chunk_at(steps_, part * kPart, kPart);
      for (Index s = steps.begin; s < steps.end; ++s) {
        for (Index lane = 0; lane < n; lane += kBlock) {
          Stored rounded[kDepth * kBlock];
          Op merged[kBlock] = {};
          merge_steps<T>(from, s * kDepth, a_.depth, lane, smaller(kBlock, n - lane), rounded, merged);
          for (Index i = 0; i < kBlock && lane + i < n; i += kWidth) {
            memcpy((void*)(to + ((lane + i) / kWidth * steps_ + s) * kWidth), merged + i, sizeof(Op) * kWidth);
          }
        }
      }
      return;
    }
    const Range lanes = chunk_at(n, part * kWidth, kWidth);
    Op* group = to + part * steps_ * kWidth;
    for (Index first = 0; first < steps_; first += kPart) {
      const Range steps = chunk_at(steps_, first, kPart);
      const Index numbers = smaller(kPart * kDepth, a_.depth - first * kDepth);
      Op rows[kWidth][kPart] = {};
      for (Index lane = 0; lane < lanes.size(); ++lane) {
        Stored rounded[kPart * kDepth];
        narrow_row(from.data + (lanes.begin + lane) * from.stride + first * kDepth, numbers, rounded);
        copy_row(rounded, numbers, rows[lane]);
      }
      for (Index s = 0; s < steps.size(); ++s) {
        for (Index lane = 0; lane < kWidth; ++lane) group[(first + s) * kWidth + lane] = rows[lane][s];
      }
    }
  }

  // Computes some blocks of columns in the rows of some tiles.
  void multiply_part(Range tiles, Range blocks) const {
    const Range columns{blocks.begin * kBlock, smaller(blocks.end * kBlock, a_.columns)};
    for (Index r = tiles.begin * kTileRows; r < smaller(tiles.end * kTileRows, a_.rows); ++r) {
      float* to = a_.out + r * a_.columns + columns.begin;
      if (a_.bias) {
        memcpy(to, a_.bias + columns.begin, sizeof(float) * columns.size());
      } else {
        memset(to, 0, sizeof(float) * columns.size());
      }
    }
    for (Index first = 0; first < steps_; first += kStepsOfProduct) {
      const Index steps = chunk_at(steps_, first, kStepsOfProduct).size();
      for (Index block = blocks.begin; block < blocks.end; ++block) {
        const Index width = smaller(kBlock, a_.columns - block * kBlock);
        with_vectors(ceil_div(width, kLanes), [&](auto vectors) {
          for (Index tile = tiles.begin; tile < tiles.end; ++tile) {
            const Index row = tile * kTileRows;
            Sums<Op, decltype(vectors)::value> sum;
            clear(sum);
            multiply(left_ + (tile * steps_ + first) * kTileRows, 1, kTileRows,
                     right_ + (block * steps_ + first) * kBlock, kBlock, steps, sum);
            add_to<false>(a_.out + row * a_.columns + block * kBlock, a_.columns, a_.rows - row, width, sum);
          }
        });
      }
    }
  }

  const ProductArguments& a_;
  Index steps_, tiles_, blocks_;
  Buffer<Op> left_, right_;
};

}  // namespace
#else
namespace fused_mos::avx512_bf16 {
void matrix_product(const ProductArguments&);
}
#endif

namespace fused_mos::FUSED_MOS_NAMESPACE {

void matrix_product(const ProductArguments& a) {
#ifdef __AMX_BF16__
  avx512_bf16::matrix_product(a);  // tile registers would need another layout
#else
#ifdef __AVX512BF16__
  if (a.bf16) return MatrixProduct<PairedBfloat16>(a).run();
#endif
  MatrixProduct<Float32>(a).run();
#endif
}

}  // namespace fused_mos::FUSED_MOS_NAMESPACE
