// Tiles of dl = ∂loss/∂logits in memory, and the two products that make gradients of them.
//
// A tile is (kPanel classes, kBlock rows); the workspace holds all blocks of some rows by a span of panels. No sum
// crosses threads: dE is summed by panel, dz by row, each in a fixed order, so the result does not depend on how many
// threads there are.
#pragma once

#include "exponentials.h"

namespace {

constexpr Index kTile = kPanel * kBlock;
constexpr Index kLine = 64;             // bytes of a cache line
constexpr Index kBlocksOfProduct = 16;  // rows of one product of dE: their tiles of a panel stay in the L2 cache

// Prefetches the part-th of `parts` shares: what is read next lies far apart, and each line's latency would be seen.
ALWAYS_INLINE void prefetch_share(const void* from, Index bytes, Index part, Index parts) {
  const Index lines = bytes / kLine;
  for (Index line = lines * part / parts; line < lines * (part + 1) / parts; ++line)
    prefetch((const char*)from + line * kLine);
}

// Where the gradients go; null where they are not needed.
template <class T>
struct Gradients {
  typename T::In* rows;
  typename T::In* weight;
  float* weight_sums;  // (V, D), for 16-bit gradients to which several chunks of rows add; else null
  float* bias;

  bool of_weight() const { return weight || weight_sums; }
};

template <class T>
class GradientTiles {
  using In = typename T::In;
  using Op = typename T::Op;
  using Stored = typename T::Stored;
  static constexpr int kDepth = Element<Op>::kDepth;
  static constexpr Index kColumnsOfProduct = 8 * kDepth * kBlock;  // of a panel of E: their copy stays in the L2 cache

 public:
  GradientTiles(const Head& head, const In* rows, const Gradients<T>& gradients, Index n_blocks, Index span)
      : head_(head),
        rows_(rows),
        gradients_(gradients),
        width_(padded_features(head)),
        tiles_(n_blocks * span * kTile),
        packed_(n_blocks * kBlock * steps_of<Op>(head.n_features)),
        lanes_(n_blocks * kBlock),
        right_block_(lanes_ / kDepth * kBlock),
        right_(gradients.of_weight() ? ceil_div(head.n_features, kBlock) * right_block_ : 0),
        row_sums_(gradients.rows ? lanes_ * round_up(head.n_features, kBlock) : 0),
        scratch_bytes_(round_up(larger(logits_scratch_bytes<T>(head), columns_scratch_bytes(head)), kLine)),
        scratch_(scratch_bytes_ * head.n_threads),
        tile_scratch_(kTile * head.n_threads),
        panel_sums_(gradients.weight && !kDirect ? kPanel * width_ * head.n_threads : 0) {}

  Stored* tile(Index panel_of_span, Index block) const { return tiles_ + (panel_of_span * n_blocks_ + block) * kTile; }
  Op* packed(Index block) const { return packed_ + block * kBlock * steps_of<Op>(head_.n_features); }
  void* scratch(int thread) const { return scratch_ + scratch_bytes_ * thread; }
  float* tile_scratch(int thread) const { return tile_scratch_ + kTile * thread; }

  // Takes blocks of rows for the logits. To be called by one thread, as all below.
  void pack(const RowBlocks& blocks) {
    n_blocks_ = blocks.n_blocks;
#pragma omp parallel for num_threads(head_.n_threads) schedule(dynamic)
    for (Index b = 0; b < blocks.n_blocks; ++b) pack_block<T>(head_, rows_, blocks, b, packed(b));
  }

  // Takes the rows whose gradients are formed: sums of dz begin.
  void begin(const RowBlocks& kept) {
#pragma omp parallel for num_threads(head_.n_threads) schedule(dynamic)
    for (Index b = 0; b < kept.n_blocks; ++b) {
      if (right_) {
        // by blocks of columns, each of which a product reads from end to end
        pack_columns<T>(rows_, kept.source + b * kBlock, kept.filled[b], head_.n_features, 0, head_.n_features,
                        right_block_, right_ + b * kBlock / kDepth * kBlock);
      }
      for (Index d = 0; row_sums_ && d < head_.n_features; d += kBlock) {
        memset(row_sums_ + d * lanes_ + b * kBlock * kBlock, 0, sizeof(float) * kBlock * kBlock);
      }
    }
  }

  // Adds the tiles of one panel, which hold dl, to dE.
  void add_to_weight(const RowBlocks& kept, Index panel, Index panel_of_span, int thread) const {
    const Index n = classes_in(head_, panel), features = head_.n_features;
    float* out = nullptr;
    Index stride = features;
    bool padded = false;
    if (gradients_.weight_sums) {
      out = gradients_.weight_sums + panel * kPanel * features;
    } else if constexpr (kDirect) {
      out = gradients_.weight + panel * kPanel * features;
    } else {
      out = panel_sums_ + kPanel * width_ * thread;
      stride = width_;
      padded = true;
      memset(out, 0, sizeof(float) * kPanel * width_);
    }
    for (Index first = 0; first < kept.n_blocks; first += kBlocksOfProduct) {
      const Index last = smaller(first + kBlocksOfProduct, kept.n_blocks);
      for (Index d = 0; d < features; d += kBlock) {
        with_vectors(ceil_div(features - d, kLanes), [&](auto vectors) {
          for (Index v = 0; v < n; v += kTileRows) {
            Vector sum[kTileRows][decltype(vectors)::value];
            clear(sum);
            for (Index b = first; b < last; ++b) {
              multiply((const Op*)(tile(panel_of_span, b) + v * kBlock), kBlock / kDepth, 1,
                       (const Op*)right_ + d / kBlock * right_block_ + b * kBlock / kDepth * kBlock, kBlock,
                       ceil_div(kept.filled[b], kDepth), sum);
            }
            add_to(out + v * stride + d, stride, n - v, (padded ? width_ : features) - d, sum);
          }
        });
      }
    }
    if constexpr (!kDirect) {
      if (!padded) return;
      for (Index v = 0; v < n; ++v)
        narrow_row(out + v * width_, features, gradients_.weight + (panel * kPanel + v) * features);
    }
  }

  // Adds the tiles of a span of panels to the sums of dz. E is copied by blocks of columns: where it lies, the rows of such a block are far
  // apart, fill their lines by half and share few sets of the cache.
  void add_to_rows(const RowBlocks& kept, Index first_panel, Index n_panels) {
    // a thread takes some tile rows of the blocks and, where these are few or E is more than they, some of the columns
    const Index groups = kept.n_blocks * (kBlock / kTileRows), column_blocks = ceil_div(head_.n_features, kBlock);
    Index column_parts = 1;
    for (Index n = 2; 2 * kept.n_blocks < column_blocks && 2 * n <= column_blocks && n <= head_.n_threads; ++n) {
      if (head_.n_threads % n == 0) column_parts = n;
    }
    const Index row_parts = smaller(groups, head_.n_threads / column_parts);
    column_parts = smaller(column_blocks, head_.n_threads / larger(row_parts, 1));
    const Index parts = row_parts * column_parts;
    Buffer<Op> paired(kDepth == 2 ? kTile / 2 * head_.n_threads : 0);
#pragma omp parallel for num_threads(head_.n_threads) schedule(static, 1)
    for (Index part = 0; part < parts; ++part) {
      const Index row_part = part / column_parts, column_part = part % column_parts;
      const Index first = groups * row_part / row_parts, last = groups * (row_part + 1) / row_parts;
      const Index first_column = column_blocks * column_part / column_parts * kBlock;
      const Index last_column = smaller(column_blocks * (column_part + 1) / column_parts * kBlock, head_.n_features);
      const int thread = omp_get_thread_num();
      const Index column_sets = ceil_div(last_column - first_column, kColumnsOfProduct);
      const Index first_block = first / (kBlock / kTileRows), end_block = ceil_div(last, kBlock / kTileRows);
      Op* e = (Op*)scratch(thread);
      for (Index i = 0; i < n_panels * column_sets; ++i) {
        const Index p = i / column_sets, start = first_column + i % column_sets * kColumnsOfProduct;
        const Index end = smaller(start + kColumnsOfProduct, last_column);
        const Index next_p = smaller((i + 1) / column_sets, n_panels - 1);
        const Index n = classes_in(head_, first_panel + p), steps = ceil_div(n, kDepth);
        const auto* panel = (const In*)head_.weight + (first_panel + p) * kPanel * head_.n_features;
        pack_columns<T>(panel, nullptr, n, head_.n_features, start, end, steps * kBlock, e);
        for (Index b = first_block; b < end_block; ++b) {
          const Op* left;
          if constexpr (kDepth == 2) {
            left = pair_classes(tile(p, b), n, kept.vectors(b), paired + kTile / 2 * thread);
          } else {
            left = tile(p, b);
          }
          const Index block_start = b * (kBlock / kTileRows);
          const Index from = larger(first - block_start, 0) * kTileRows;
          const Index to = smaller((last - block_start) * kTileRows, kept.filled[b]);
          const Stored* next_tile = b + 1 < end_block ? tile(p, b + 1) : tile(next_p, first_block);
          const Index calls = larger(ceil_div(end - start, kBlock) * ceil_div(to - from, kTileRows), 1);
          Index call = 0;
          for (Index d = start; d < end; d += kBlock) {
            with_vectors(ceil_div(head_.n_features - d, kLanes), [&](auto vectors) {
              for (Index r = from; r < to; r += kTileRows, ++call) {
                prefetch_share(next_tile, kTile * Index(sizeof(Stored)), call, calls);
                Vector sum[kTileRows][decltype(vectors)::value];
                clear(sum);
                multiply(left + r, 1, kBlock, (const Op*)e + (d - start) * steps, kBlock, steps, sum);
                add_to(row_sums_ + d * lanes_ + (b * kBlock + r) * kBlock, kBlock, kTileRows, kBlock, sum);
              }
            });
          }
        }
      }
    }
  }

  // Writes the sums of dz to the rows they belong to.
  void end(const RowBlocks& kept) const {
#pragma omp parallel for num_threads(head_.n_threads) schedule(dynamic)
    for (Index b = 0; b < kept.n_blocks; ++b) {
      for (Index lane = b * kBlock; lane < b * kBlock + kept.filled[b]; ++lane) {
        In* row = gradients_.rows + kept.source[lane] * head_.n_features;
        for (Index d = 0; d < head_.n_features; d += kBlock) {
          narrow_row(row_sums_ + d * lanes_ + lane * kBlock, smaller(kBlock, head_.n_features - d), row + d);
        }
      }
    }
  }

 private:
  static constexpr bool kDirect = sizeof(In) == sizeof(float);  // gradients are summed where they are returned

  static Index columns_scratch_bytes(const Head& head) {
    return sizeof(Op) * steps_of<Op>(kPanel) * smaller(kColumnsOfProduct, round_up(head.n_features, kBlock));
  }

  // (classes, kBlock) of bfloat16 -> (classes / 2, kBlock) of pairs of classes
  static const Op* pair_classes(const Stored* from, Index n, Index vectors, Op* to) {
    const Bfloat16 none[kBlock] = {};
    for (Index v = 0; v < n; v += 2) {
      interleave(from + v * kBlock, v + 1 < n ? from + (v + 1) * kBlock : none, vectors * kLanes, to + v / 2 * kBlock);
    }
    return to;
  }

  const Head& head_;
  const In* rows_;
  Gradients<T> gradients_;
  Index width_;
  Index n_blocks_ = 0;
  Buffer<Stored> tiles_;
  Buffer<Op> packed_;
  Index lanes_;
  Index right_block_;  // elements of a block of columns of `right_`
  Buffer<Op> right_;
  Buffer<float> row_sums_;
  Index scratch_bytes_;
  Buffer<char> scratch_;
  Buffer<float> tile_scratch_;
  Buffer<float> panel_sums_;
};

}  // namespace
