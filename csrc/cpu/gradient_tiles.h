// Tiles of dl = ∂loss/∂logits in memory, and the two products that turn them into gradients.
//
// A tile is (kPanel classes, kBlock rows). The workspace holds the tiles of all blocks of some rows for a span of
// panels. No sum crosses threads: dE is summed by panel and dz by row, each in a fixed order, so the result does not
// depend on the number of threads.
#pragma once

#include "exponentials.h"
#include "rows_partition.h"
#ifdef __AMX_BF16__
#include "amx_operands.h"
#endif

namespace {

constexpr Index kLine = 64;  // bytes of a cache line
// Spans are multiples of kPanelsOfProduct panels, so that no sum depends on where a span begins.
#ifdef __AMX_BF16__
constexpr bool kTransposed = true;      // compute dzᵀ = Eᵀ·dl, not dz = dl·E
constexpr Index kBlocksOfProduct = 16;  // blocks of rows in a product of dE: their part of z takes at most 32 KiB
constexpr Index kPanelsOfProduct = 4;   // panels of classes in a product of dzᵀ: so does their part of dl
#else
constexpr bool kTransposed = false;
constexpr Index kBlocksOfProduct = 16;  // blocks of rows in a product of dE: a panel's tiles stay in the L2 cache
constexpr Index kPanelsOfProduct = 1;
#endif

// Prefetches the part-th of `parts` shares. The next reads are far away, so each line would cost its full latency.
ALWAYS_INLINE void prefetch_share(const void* from, Index bytes, Index part, Index parts) {
  const Range lines = share(bytes / kLine, part, parts);
  for (Index line = lines.begin; line < lines.end; ++line) prefetch((const char*)from + line * kLine);
}

// Destinations of the gradients; null if not needed.
template <class T>
struct Gradients {
  explicit Gradients(const fused_mos::GradientArguments& a)
      : rows((typename T::In*)a.rows), weight((typename T::In*)a.weight), weight_sums(nullptr), bias(a.bias) {}

  typename T::In* rows;
  typename T::In* weight;
  float* weight_sums;  // (V, D), for 16-bit gradients that several chunks of rows add to, else null
  float* bias;

  bool of_weight() const { return weight || weight_sums; }
};

template <class T>
class GradientTiles {
  using In = typename T::In;
  using Op = typename T::Op;
  using Stored = typename T::Stored;
  static constexpr int kDepth = Element<Op>::kDepth;
  static constexpr Index kColumnsOfProduct = 8 * kDepth * kBlock;  // columns copied at once: they stay in the L2 cache
  static constexpr Index kTransposedBytes = 1200 * 1024;           // of panels transposed at once: so do they

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
        scratch_bytes_(
            round_up(larger(kPanelsOfTask * logits_scratch_bytes<T>(head), columns_scratch_bytes(head)), kLine)),
        scratch_(scratch_bytes_ * head.n_threads),
        tile_scratch_(sizeof(Stored) == sizeof(float) ? 0 : kTile * head.n_threads),
        panel_sums_(gradients.weight && !kDirect ? kPanelsOfTask * kPanel * width_ * head.n_threads : 0) {}

  Stored* tile(Index panel_of_span, Index block) const {
    return tiles_ + ((place_ + panel_of_span) * n_blocks_ + block) * kTile;
  }
  // Sets where the current span's tiles are: those of its first panel take the place-th slot of the workspace.
  void place_span(Index place) { place_ = place; }
  Op* packed(Index block) const { return packed_ + block * kBlock * steps_of<Op>(head_.n_features); }
  void* scratch(int thread) const { return scratch_ + scratch_bytes_ * thread; }
  // Returns a thread's tile of float32 logits. It exists only if Stored is narrower.
  float* tile_scratch(int thread) const { return tile_scratch_ + kTile * thread; }
  const Gradients<T>& gradients() const { return gradients_; }

  // Packs blocks of rows for the logits. One thread must call this and all functions below except add_to_weight.
  void pack(const RowBlocks& blocks) {
    n_blocks_ = blocks.n_blocks;
#pragma omp parallel for num_threads(head_.n_threads) schedule(dynamic)
    for (Index b = 0; b < blocks.n_blocks; ++b) pack_block<T>(head_, rows_, blocks, b, packed(b));
  }

  // Returns the number of calls of begin. dE is not written before the first.
  Index n_begun() const { return n_begun_; }

  // Packs the rows whose gradients are formed, for dE, and clears their sums of dz.
  void begin(const RowBlocks& kept) {
    ++n_begun_;
#pragma omp parallel for num_threads(head_.n_threads) schedule(dynamic)
    for (Index b = 0; b < kept.n_blocks; ++b) {
      if (right_) {
        // by blocks of columns, since a product reads one block from end to end
        pack_columns<T>(rows_, kept.source + b * kBlock, kept.filled[b], head_.n_features, 0, head_.n_features,
                        right_block_, right_ + b * kBlock / kDepth * kBlock);
      }
      for (Index d = 0; row_sums_ && d < head_.n_features; d += kBlock) {
        memset(row_sums_ + d * lanes_ + b * kBlock * kBlock, 0, sizeof(float) * kBlock * kBlock);
      }
    }
  }

  // Adds dlᵀ·z of some panels of a span to dE. First finish(panel of the span, blocks) turns the tiles of a few blocks
  // into dl, which is multiplied while it is in the L2 cache.
  template <class Finish>
  void add_to_weight(const RowBlocks& kept, Range span, Range panels, int thread, Finish finish) const {
    [[maybe_unused]] const ProductRegisters registers;
    const Index features = gradients_.of_weight() ? head_.n_features : 0;
    WeightSums sums[kPanelsOfTask] = {};
    for (Index p = panels.begin; p < panels.end && features; ++p) {
      sums[p - panels.begin] = weight_sums(span.begin + p, thread, p - panels.begin);
    }
    for (Index first = 0; first < kept.n_blocks; first += kBlocksOfProduct) {
      const Range blocks = chunk_at(kept.n_blocks, first, kBlocksOfProduct);
      for (Index p = panels.begin; p < panels.end; ++p) finish(p, blocks);
      for (Index d = 0; d < features; d += kBlock) {
        for (Index p = panels.begin; p < panels.end; ++p) {
          const bool starts = first == 0 && (n_begun_ == 1 || !sums_are_kept());
          add_weight_product(kept, blocks, p, classes_in(head_, span.begin + p), d, sums[p - panels.begin], starts);
        }
      }
      if constexpr (kTransposed) {
        for (Index i = 0; gradients_.rows && i < panels.size() * blocks.size(); ++i) {
          const Index p = panels.begin + i / blocks.size(), b = blocks.begin + i % blocks.size();
          pair_in_place(tile(p, b), classes_in(head_, span.begin + p));
        }
      }
    }
    if constexpr (!kDirect) {
      for (Index p = panels.begin; p < panels.end && gradients_.weight; ++p) {
        write_weight(span.begin + p, sums[p - panels.begin]);
      }
    }
  }

  // Adds dl·E over a span of panels to the sums of dz.
  void add_to_rows(const RowBlocks& kept, Range span) {
    if constexpr (kTransposed) {
      add_to_transposed_rows(kept.n_blocks, span);
    } else {
      add_to_rows_in_order(kept, span);
    }
  }

  // Writes the sums of dz to the rows' gradients.
  void end(const RowBlocks& kept) const {
#pragma omp parallel for num_threads(head_.n_threads) schedule(dynamic)
    for (Index b = 0; b < kept.n_blocks; ++b) {
      for (Index d = 0; kTransposed && d < head_.n_features; d += kBlock) {
        transpose_tile(row_sums_ + d * lanes_ + b * kBlock * kBlock);
      }
      for (Index lane = b * kBlock; lane < b * kBlock + kept.filled[b]; ++lane) {
        In* row = gradients_.rows + kept.source[lane] * head_.n_features;
        for (Index d = 0; d < head_.n_features; d += kBlock) {
          narrow_row(row_sums_ + d * lanes_ + lane * kBlock, smaller(kBlock, head_.n_features - d), row + d);
        }
      }
    }
  }

 private:
  static constexpr bool kDirect = sizeof(In) == sizeof(float);  // gradients are summed in the arrays that return them
  static constexpr bool kInPlace = kDirect;                     // products can read operands in place
  static constexpr Index kFewBlocks = 1, kRowsInPlace = 32;

  static Index columns_scratch_bytes(const Head& head) {
    if (kTransposed) return 0;
    return sizeof(Op) * steps_of<Op>(kPanel) * smaller(kColumnsOfProduct, round_up(head.n_features, kBlock));
  }

  // Returns true if the next chunk of rows adds to the same sums of dE.
  bool sums_are_kept() const { return kDirect || gradients_.weight_sums; }

  // Memory for the sums of one panel's dE, (kPanel, stride).
  struct WeightSums {
    float* rows;
    Index stride;
  };

  // Returns where a panel's dE is summed. Float32 gradients are summed in the array that returns them, others in this
  // thread's own memory or, if several chunks of rows add to them, in a float32 copy of the whole dE.
  WeightSums weight_sums(Index panel, int thread, Index panel_of_task) const {
    if (gradients_.weight_sums) {
      return {gradients_.weight_sums + panel * kPanel * head_.n_features, head_.n_features};
    }
    if constexpr (kDirect) {
      return {gradients_.weight + panel * kPanel * head_.n_features, head_.n_features};
    } else {
      return {panel_sums_ + kPanel * width_ * (thread * kPanelsOfTask + panel_of_task), width_};
    }
  }

  void write_weight(Index panel, WeightSums sums) const {
    const Index features = head_.n_features;
    for (Index v = 0; v < classes_in(head_, panel); ++v) {
      narrow_row(sums.rows + v * sums.stride, features, gradients_.weight + (panel * kPanel + v) * features);
    }
  }

  // Adds dlᵀ·z over the rows of some blocks to dE of one panel (n classes), in the columns [d, d + kBlock).
  void add_weight_product(const RowBlocks& kept, Range blocks, Index panel_of_span, Index n, Index d, WeightSums sums,
                          bool starts) const {
    with_vectors(ceil_div(head_.n_features - d, kLanes), [&](auto vectors) {
      for (Index v = 0; v < n; v += kTileRows) {
        Sums<Op, decltype(vectors)::value> sum;
        clear(sum);
        for (Index b = blocks.begin; b < blocks.end; ++b) {
          multiply((const Op*)(tile(panel_of_span, b) + v * kBlock), kBlock / kDepth, 1,
                   (const Op*)right_ + d / kBlock * right_block_ + b * kBlock / kDepth * kBlock, kBlock,
                   steps_of<Op>(kept.filled[b]), sum);
        }
        float* to = sums.rows + v * sums.stride + d;
        if (starts) {
          add_to<true>(to, sums.stride, n - v, sums.stride - d, sum);
        } else {
          add_to<false>(to, sums.stride, n - v, sums.stride - d, sum);
        }
      }
    });
  }

  // Adds dl·E over a span of panels to dz, of which each thread has a part.
  void add_to_rows_in_order(const RowBlocks& kept, Range span) {
    const RowsPartition partition(kept.n_blocks, ceil_div(head_.n_features, kBlock), head_.n_threads);
    Buffer<Op> paired(kDepth == 2 ? kTile / 2 * head_.n_threads : 0);
#pragma omp parallel for num_threads(head_.n_threads) schedule(static, 1)
    for (Index part = 0; part < partition.n_parts(); ++part) {
      const int thread = omp_get_thread_num();
      add_part_to_rows(kept, span, partition.tile_rows(part), partition.columns(part, head_.n_features),
                       (Op*)scratch(thread), kDepth == 2 ? paired + kTile / 2 * thread : nullptr);
    }
  }

  // Adds dl·E over a span of panels to one thread's part of dz. E is copied by blocks of columns: in place, the rows of
  // a block are far apart, fill only half of their cache lines, and map to few cache sets.
  void add_part_to_rows(const RowBlocks& kept, Range span, Range tile_rows, Range columns, Op* e, Op* paired) {
    constexpr Index kTileRowsOfBlock = RowsPartition::kTileRowsOfBlock;
    const Range blocks{tile_rows.begin / kTileRowsOfBlock, ceil_div(tile_rows.end, kTileRowsOfBlock)};
    const Index column_sets = ceil_div(columns.size(), kColumnsOfProduct);
    for (Index i = 0; i < span.size() * column_sets; ++i) {
      const Index p = i / column_sets, next_p = smaller((i + 1) / column_sets, span.size() - 1);
      const Range set = chunk_at(columns.end, columns.begin + i % column_sets * kColumnsOfProduct, kColumnsOfProduct);
      const Index n = classes_in(head_, span.begin + p), steps = ceil_div(n, kDepth);
      const auto* panel = (const In*)head_.weight + (span.begin + p) * kPanel * head_.n_features;
      // a copy does not pay for few rows: they read whole blocks of columns in place
      const Index in_place = kInPlace && kept.n_blocks <= kFewBlocks ? set.size() / kBlock * kBlock : 0;
      pack_columns<T>(panel, nullptr, n, head_.n_features, set.begin + in_place, set.end, steps * kBlock, e);
      for (Index b = blocks.begin; b < blocks.end; ++b) {
        const Op* dl;
        if constexpr (kDepth == 2) {
          dl = pair_classes(tile(p, b), n, kept.vectors(b), paired);
        } else {
          dl = tile(p, b);
        }
        const Index first_tile_row = b * kTileRowsOfBlock;
        const Range rows{larger(tile_rows.begin - first_tile_row, 0) * kTileRows,
                         smaller((tile_rows.end - first_tile_row) * kTileRows, kept.filled[b])};
        const Stored* next_tile = b + 1 < blocks.end ? tile(p, b + 1) : tile(next_p, blocks.begin);
        if constexpr (kInPlace) {
          // a few classes at a time, whose rows are read from end to end
          for (Index v = 0; v < n && in_place; v += kRowsInPlace) {
            prefetch_columns(span.begin * kPanel + p * kPanel + v + kRowsInPlace, set);
            add_rows_product(b, rows, {set.begin, set.begin + in_place}, dl + v * kBlock,
                             panel + v * head_.n_features + set.begin, kBlock, head_.n_features,
                             smaller(n - v, kRowsInPlace), nullptr);
          }
        }
        add_rows_product(b, rows, {set.begin + in_place, set.end}, dl, e, steps * kBlock, kBlock, steps, next_tile);
      }
    }
  }

  // Prefetches some columns of kRowsInPlace classes' rows: parts of rows are too short for the hardware prefetcher.
  void prefetch_columns(Index first_class, Range columns) const {
    for (Index v = first_class; v < smaller(first_class + kRowsInPlace, head_.n_classes); ++v) {
      const In* row = (const In*)head_.weight + v * head_.n_features;
      for (Index d = columns.begin; d < columns.end; d += kLine / sizeof(In)) prefetch(row + d);
    }
  }

  // Adds dl·E over one panel to dz of some rows of a block, in some columns, and meanwhile prefetches the next tile, if
  // any. Blocks of columns of E are `e_block` elements apart, and rows `e_step`.
  void add_rows_product(Index block, Range rows, Range columns, const Op* dl, const Op* e, Index e_block, Index e_step,
                        Index steps, const Stored* next_tile) {
    const Index calls = larger(ceil_div(columns.size(), kBlock) * ceil_div(rows.size(), kTileRows), 1);
    Index call = 0;
    for (Index d = columns.begin; d < columns.end; d += kBlock) {
      with_vectors(ceil_div(head_.n_features - d, kLanes), [&](auto vectors) {
        for (Index r = rows.begin; r < rows.end; r += kTileRows, ++call) {
          if (next_tile) prefetch_share(next_tile, kTile * Index(sizeof(Stored)), call, calls);
          float* to = row_sums_ + d * lanes_ + (block * kBlock + r) * kBlock;
          prefetch_share(to, kTileRows * kBlock * Index(sizeof(float)), 0, 1);
          Sums<Op, decltype(vectors)::value> sum;
          clear(sum);
          multiply(dl + r, 1, kBlock, e + (d - columns.begin) / kBlock * e_block, e_step, steps, sum);
          add_to<false>(to, kBlock, kTileRows, kBlock, sum);
        }
      });
    }
  }

  static void transpose_tile(float* tile) {
    for (Index i = 0; i < kBlock; ++i) {
      for (Index j = 0; j < i; ++j) {
        const float moved = tile[i * kBlock + j];
        tile[i * kBlock + j] = tile[j * kBlock + i];
        tile[j * kBlock + i] = moved;
      }
    }
  }

  // Adds Eᵀ·dl over a span of panels, in pairs of classes, to the sums of dzᵀ. Their tiles (kBlock features, kBlock
  // rows) take the places of dz's tiles (kBlock rows, kBlock features). As many panels of E are transposed at once as
  // stay in the L2 cache.
  void add_to_transposed_rows(Index n_blocks, Range span) {
    const Index width = smaller(round_up(head_.n_features, kBlock), kColumnsOfProduct);
    const Index most = round_up(kTransposedBytes / (width * kPanel * Index(sizeof(In))) + 1, kPanelsOfProduct);
    const Index steps = most * kPanel / kDepth;  // per column of the buffer
    Buffer<Op> transposed(width * steps);
#pragma omp parallel num_threads(head_.n_threads)
    {
      [[maybe_unused]] const ProductRegisters registers;
      for (Index first = 0; first < span.size(); first += most) {
        const Range panels = chunk_at(span.size(), first, most);
        for (Index d = 0; d < head_.n_features; d += kColumnsOfProduct) {
          const Range set = chunk_at(head_.n_features, d, kColumnsOfProduct);
          const RowsPartition partition(n_blocks, ceil_div(set.size(), kBlock), head_.n_threads);
          // if there are more threads than panels, tasks are split by columns too
          const Index parts_of_panel = smaller(partition.column_blocks, ceil_div(head_.n_threads, panels.size()));
#pragma omp for schedule(static, 1)
          for (Index task = 0; task < panels.size() * parts_of_panel; ++task) {
            const Index p = panels.begin + task / parts_of_panel;
            const Range blocks = share(partition.column_blocks, task % parts_of_panel, parts_of_panel);
            const Range classes = chunk_at(head_.n_classes, (span.begin + p) * kPanel, kPanel);
            const Range columns{d + blocks.begin * kBlock, smaller(d + blocks.end * kBlock, set.end)};
            transpose_columns((const In*)head_.weight, head_.n_features, classes, columns, steps,
                              transposed + (p - first) * kPanel / kDepth * kLanes + blocks.begin * kBlock * steps);
          }
#pragma omp for schedule(static, 1)
          for (Index part = 0; part < partition.n_parts(); ++part) {
            const Range columns = partition.columns(part, set.size());
            for (Index b = partition.tile_rows(part).begin; b < partition.tile_rows(part).end; ++b) {
              for (Index p = panels.begin; p < panels.end; p += kPanelsOfProduct) {
                const Range product = chunk_at(panels.end, p, kPanelsOfProduct);
                const Op* e = transposed + (p - first) * kPanel / kDepth * kLanes;
                for (Index c = columns.begin; c < columns.end; c += kBlock) {
                  add_transposed_product(span, product, b, d + c, e + c * steps, steps * kLanes);
                }
              }
            }
          }
        }
      }
    }
  }

  // Adds Eᵀ·dl over some panels to one tile of dzᵀ. `e` has kLanes columns of E, as consecutive tiles of kTileSteps
  // pairs; the next kLanes columns start `next` elements later.
  void add_transposed_product(Range span, Range panels, Index b, Index d, const Op* e, Index next) {
    Sums<Op, kTileVectors> sum;
    clear(sum);
    for (Index p = panels.begin; p < panels.end; ++p) {
      multiply_tiles(e + (p - panels.begin) * kPanel / kDepth * kLanes, kTileSteps, kLanes * kTileSteps, next,
                     (const Op*)tile(p, b), kBlock, steps_of<Op>(classes_in(head_, span.begin + p)), sum);
    }
    add_to<false>(row_sums_ + d * lanes_ + b * kBlock * kBlock, kBlock, kTileRows, kBlock, sum);
  }

  // Interleaves bfloat16 (classes, kBlock) to pairs of classes (classes / 2, kBlock).
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
  Index n_blocks_ = 0, n_begun_ = 0, place_ = 0;
  Buffer<Stored> tiles_;
  Buffer<Op> packed_;
  Index lanes_;
  Index right_block_;  // elements in a block of columns of `right_`
  Buffer<Op> right_;
  Buffer<float> row_sums_;
  Index scratch_bytes_;
  Buffer<char> scratch_;
  Buffer<float> tile_scratch_;
  Buffer<float> panel_sums_;
};

}  // namespace
