// Backward pass of the negative log-likelihood, which recomputes the logits (4 products), and the forward pass that
// also forms the gradients (3 products).
#include "family.h"
#include "gradient_tiles.h"
#include "token_loss.h"

namespace {

using fused_mos::RowsBackwardArguments;

constexpr Index kPanelsOfSpan = 16;  // panels that fit in the workspace, at least, in a recomputing backward pass

// Returns how many panels form a span: as many as stay in the L3 cache between the two products with dl, but several
// for each thread. Tile registers read more of E at once, so that one span has all panels.
template <class T>
Index panels_of_gradients(const Head& head, Index n_blocks) {
  constexpr Index kBytes = 8 << 20;
  if (kTransposed) return panels_of(head);
  return larger(kBytes / (n_blocks * kTile * Index(sizeof(typename T::Stored))), 4 * head.n_threads);
}

// Rows whose gradients are formed, by lane: the lanes of their exponentials, and the terms that turn these into dl.
struct KeptRows {
  explicit KeptRows(Index max_lanes)
      : source(max_lanes),
        origin(max_lanes),
        filled(max_lanes / kBlock),
        target(max_lanes),
        maximum(max_lanes),
        log_total(max_lanes),
        grad_lse(max_lanes),
        grad_target(max_lanes) {}

  void clear() { n_rows = 0; }

  // Adds a row whose exponentials are in `lane`.
  void add(Index lane, Index row, Index class_of_target, float row_maximum, float row_log_total, float lse_weight,
           float target_weight) {
    origin[n_rows] = lane;
    source[n_rows] = row;
    target[n_rows] = class_of_target;
    maximum[n_rows] = row_maximum;
    log_total[n_rows] = row_log_total;
    grad_lse[n_rows] = lse_weight;
    grad_target[n_rows] = target_weight;
    ++n_rows;
  }

  // Returns the blocks of the rows, the last one padded with rows of weight 0.
  RowBlocks blocks() {
    const Index n_blocks = ceil_div(n_rows, kBlock), kept = n_rows;
    while (n_rows < n_blocks * kBlock) add(n_rows, -1, -1, 0, 0, 0, 0);
    n_rows = kept;
    for (Index b = 0; b < n_blocks; ++b) filled[b] = smaller(kBlock, kept - b * kBlock);
    return {n_blocks, source, filled};
  }

  Index n_rows = 0;
  Buffer<Index> source, origin, filled, target;
  Buffer<float> maximum, log_total, grad_lse, grad_target;
};

// Fills the tiles of a span of panels with exp(l − the panel's maximum), times the slope of a soft cap, as the
// gradients need it. Fills the statistics of each panel with the maxima and the sums of exp(l − maximum), without the
// slope.
template <class T>
void exponentiate_span(const Head& head, const GradientTiles<T>& tiles, const RowBlocks& blocks, Range span,
                       const Targets& targets, const PartialStatistics& statistics) {
  const Index sets = ceil_div(blocks.n_blocks, kBlocksOfTask), n_panels = panels_of_task(span.size(), head.n_threads);
  const Index groups = ceil_div(span.size(), n_panels);
#pragma omp parallel for num_threads(head.n_threads) schedule(dynamic)
  for (Index task = 0; task < groups * sets; ++task) {
    const Range panels = chunk_at(span.size(), task / sets * n_panels, n_panels);
    const Range set = chunk_at(blocks.n_blocks, task % sets * kBlocksOfTask, kBlocksOfTask);
    const int thread = omp_get_thread_num();
    [[maybe_unused]] const ProductRegisters registers;
    LogitsOperand<typename T::Op> operands[kPanelsOfTask];
    for (Index p = panels.begin; p < panels.end; ++p) {
      char* scratch = (char*)tiles.scratch(thread) + logits_scratch_bytes<T>(head) * (p - panels.begin);
      operands[p - panels.begin] = logits_operand<T>(head, span.begin + p, scratch);
    }
    for (Index i = 0; i < set.size() * panels.size(); ++i) {
      const Index b = set.begin + i / panels.size(), p = panels.begin + i % panels.size();
      const auto& e = operands[p - panels.begin];
      const Index first_lane = p * statistics.n_lanes + b * kBlock;
      auto* exponentials = tiles.tile(p, b);
      float* tile;
      if constexpr (sizeof(*exponentials) == sizeof(float)) {
        tile = exponentials;  // in place
      } else {
        tile = tiles.tile_scratch(thread);
      }
      with_vectors(blocks.vectors(b), [&](auto vectors) {
        constexpr int NV = decltype(vectors)::value;
        Vector largest[NV], total[NV];
        fill(largest, kLowest);
        logits_tile(e, tiles.packed(b), tile, largest);
        if (targets.target) pick_targets(tile, blocks, b, span.begin + p, e.n_classes, targets);
        if (e.transform.caps()) {
          exponentiate(tile, e.n_classes, largest, 1.0f, total, [&](Index at, int, Vector logit, Vector exponential) {
            store(exponentials + at, exponential * e.transform.slope(logit));
          });
        } else {
          exponentiate(tile, e.n_classes, largest, 1.0f, total,
                       [&](Index at, int, Vector, Vector exponential) { store(exponentials + at, exponential); });
        }
        store_lanes(statistics.maxima + first_lane, largest);
        if (statistics.totals) store_lanes(statistics.totals + first_lane, total);
      });
    }
  }
}

// Factors that turn a panel's exponentials into dl for one block of kept rows. Row i of dl is factor[i] times the row
// at offset[i] in the panel's tiles.
struct BlockScale {
  BlockScale(const KeptRows& kept, Index block, Index n_rows, Index n_lanes, const float* maxima) {
    const Index first = block * kBlock;
    for (Index i = 0; i < n_rows; ++i) {
      const Index lane = kept.origin[first + i];
      factor[i] = maxima[lane] - kept.maximum[first + i];
      offset[i] = lane / kBlock * kTile + lane % kBlock;
      in_place &= lane == first + i;
    }
    for (Index j = 0; j < n_lanes; j += kLanes) {
      store(factor + j,
            load(kept.grad_lse + first + j) * exp_nonpositive(load(factor + j) - load(kept.log_total + first + j)));
    }
  }

  float factor[kBlock] = {};
  Index offset[kBlock];
  bool in_place = true;  // no row changes its lane
};

// Turns the exponentials of one panel into dl, in place, for some blocks of kept rows, and adds dl to the sums of the
// bias's gradient (kPanel, kLanes). A kept row never moves to a higher lane, so nothing is overwritten before it is
// read.
template <class T>
void finish_panel(const Head& head, const GradientTiles<T>& tiles, const KeptRows& kept, const RowBlocks& blocks,
                  Range finished, Index panel, Index panel_of_span, const float* maxima, float* bias_sums) {
  const Index n = classes_in(head, panel);
  const auto* exponentials = tiles.tile(panel_of_span, 0);
  for (Index b = finished.begin; b < finished.end; ++b) {
    const Index filled = blocks.filled[b], n_lanes = blocks.vectors(b) * kLanes;
    const BlockScale scale(kept, b, filled, n_lanes, maxima);
    auto* dl = tiles.tile(panel_of_span, b);

    // the targets' entries, computed in float32 before the tile rounds them
    float at_target[kBlock];
    for (Index i = 0; i < filled; ++i) {
      const Index v = place_of(kept.target[b * kBlock + i], panel * kPanel);
      if (v < 0 || v >= n) continue;
      at_target[i] =
          scale.factor[i] * widen(exponentials[scale.offset[i] + v * kBlock]) - kept.grad_target[b * kBlock + i];
    }

    // a dropped row may have left NaN, which no factor turns into 0
    if (scale.in_place) clear_lanes(dl, n, filled);

    float moved[kBlock] = {};
    for (Index v = 0; v < n; ++v) {
      auto* row = dl + v * kBlock;
      if (!scale.in_place) {
        for (Index i = 0; i < filled; ++i) moved[i] = widen(exponentials[scale.offset[i] + v * kBlock]);
      }
      for (Index j = 0; j < n_lanes; j += kLanes) {
        const Vector scaled = (scale.in_place ? load(row + j) : load(moved + j)) * load(scale.factor + j);
        store(row + j, scaled);
        store(bias_sums + v * kLanes, load(bias_sums + v * kLanes) + scaled);
      }
    }

    if (!scale.in_place) clear_lanes(dl, n, n_lanes);

    for (Index i = 0; i < filled; ++i) {
      const Index v = place_of(kept.target[b * kBlock + i], panel * kPanel);
      if (v < 0 || v >= n) continue;
      narrow(at_target[i], dl + v * kBlock + i);
      bias_sums[v * kLanes] -= kept.grad_target[b * kBlock + i];
    }
  }
}

// Multiplies the terms subtracted at the targets in a span of panels by the slope of the soft cap there.
inline void weigh_targets(const LogitTransform& transform, Range span, const float* target_logit, KeptRows& kept) {
  for (Index i = 0; i < kept.n_rows; ++i) {
    const Index v = place_of(kept.target[i], span.begin * kPanel);
    if (v < 0 || v >= span.size() * kPanel) continue;
    kept.grad_target[i] *= transform.slope(broadcast(target_logit[kept.source[i]]))[0];
  }
}

// Forms dl of a span whose tiles hold exponentials, and adds its products to dE and dz. Only a soft cap needs
// `target_logit` (R,).
template <class T>
void add_gradients(const Head& head, GradientTiles<T>& tiles, KeptRows& kept, const RowBlocks& blocks, Range span,
                   const float* target_logit, const PartialStatistics& statistics) {
  const LogitTransform transform(head.transform);
  if (transform.caps() && target_logit) weigh_targets(transform, span, target_logit, kept);
  const Index n_panels = panels_of_task(span.size(), head.n_threads);
#pragma omp parallel for num_threads(head.n_threads) schedule(dynamic)
  for (Index first = 0; first < span.size(); first += n_panels) {
    const Range panels = chunk_at(span.size(), first, n_panels);
    float bias_sums[kPanelsOfTask * kPanel * kLanes] = {};
    tiles.add_to_weight(blocks, span, panels, omp_get_thread_num(), [&](Index p, Range finished) {
      finish_panel(head, tiles, kept, blocks, finished, span.begin + p, p, statistics.maxima + p * statistics.n_lanes,
                   bias_sums + (p - first) * kPanel * kLanes);
    });
    for (Index v = first * kPanel; tiles.gradients().bias && v < panels.end * kPanel; ++v) {
      const Index of = span.begin * kPanel + v;
      if (of < head.n_classes) tiles.gradients().bias[of] += sum(load(bias_sums + (v - first * kPanel) * kLanes));
    }
  }
  if (tiles.gradients().rows) tiles.add_to_rows(blocks, span);
}

inline Index rows_of_chunk(const Head& head) {
  return larger(head.workspace_bytes / (kPanelsOfSpan * kPanel * Index(sizeof(float))) / kBlock, 1) * kBlock;
}

template <class T>
void rows_backward_of(const Head& head, const RowsBackwardArguments& a) {
  using In = typename T::In;
  constexpr bool kDirect = sizeof(In) == sizeof(float);
  const Gradients<T> gradients(a.gradients);
  // 16-bit gradients of the weight are summed in float32, one panel at a time, so all rows must be in one chunk
  const Index panels = panels_of(head), chunk = kDirect ? smaller(rows_of_chunk(head), a.n_rows) : a.n_rows;
  const Index max_blocks = ceil_div(chunk, kBlock);
  const Index bytes_of_panel = max_blocks * kTile * sizeof(typename T::Stored);
  const Index wanted = larger(head.workspace_bytes / bytes_of_panel, head.n_threads);
  const Index max_span = smaller(panels, round_up(wanted, kPanelsOfProduct));
  GradientTiles<T> tiles(head, (const In*)a.rows, gradients, max_blocks, max_span);
  KeptRows kept(max_blocks * kBlock);
  Buffer<float> maxima(max_span * max_blocks * kBlock);
  const bool needs_targets = a.target && LogitTransform(head.transform).caps();
  const Buffer<float> target_logit(needs_targets ? a.n_rows : 0);
  const Targets targets{needs_targets ? a.target : nullptr, target_logit};
  for (Index first = 0; first < a.n_rows; first += chunk) {
    const Index n = smaller(chunk, a.n_rows - first);
    kept.clear();
    for (Index i = first; i < first + n; ++i) {
      kept.add(i - first, i, a.target ? a.target[i] : -1, a.maximum[i], a.log_total[i],
               a.grad_lse[i] * head.transform.inverse_temperature,
               a.grad_target ? a.grad_target[i] * head.transform.inverse_temperature : 0.0f);
    }
    const RowBlocks blocks = kept.blocks();
    tiles.pack(blocks);
    tiles.begin(blocks);
    const PartialStatistics statistics{blocks.n_blocks * kBlock, maxima, nullptr, nullptr};
    for (Index panel = 0; panel < panels; panel += max_span) {
      const Range span = chunk_at(panels, panel, max_span);
      exponentiate_span(head, tiles, blocks, span, targets, statistics);
      add_gradients(head, tiles, kept, blocks, span, target_logit, statistics);
    }
    if (gradients.rows) tiles.end(blocks);
  }
}

// Keeps the rows of a block of tokens whose responsibilities (one per row of the block) pass the filter, or whose
// log-sum-exp is regularised.
inline void keep_rows(const Head& head, const NllArguments& a, Range rows, const int64_t* target,
                      const float* responsibility, KeptRows& kept) {
  kept.clear();
  for (Index row = rows.begin; row < rows.end; ++row) {
    const TokenWeights weights(a, row / a.n_experts);
    const float r = responsibility[row - rows.begin];
    if (!weights.regularises() && (weights.nll == 0 || r == 0 || (!a.loss_weights && r < a.filter_eps))) continue;
    const float of_target = weights.nll == 0 ? 0.0f : weights.nll * head.transform.inverse_temperature * r;
    float of_lse = of_target;
    if (weights.regularises()) {
      of_lse += float(prior_of(a, row) * weights.slope(lse_of(a, row))) * head.transform.inverse_temperature;
    }
    kept.add(row - rows.begin, row, target[row], a.maximum[row], a.log_total[row], of_lse, of_target);
  }
}

template <class T>
void nll_with_gradients_of(const Head& head, const NllArguments& a) {
  using In = typename T::In;
  const Index k = a.n_experts, panels = panels_of(head), n_rows = a.n_tokens * k;
  const Index max_blocks = ceil_div(a.tokens_of_block * k, kBlock);
  Gradients<T> gradients(a.gradients);
  In* grad_weight = gradients.weight;
  const bool sums = sizeof(In) != sizeof(float) && grad_weight && a.tokens_of_block < a.n_tokens;
  Buffer<float> weight_sums(sums ? head.n_classes * head.n_features : 0);
  if (sums) gradients.weight = nullptr, gradients.weight_sums = weight_sums;
  // The workspace holds the exponentials of the first panels. Once these are used, the exponentials of the others are
  // recomputed in their place, so that dz is summed in the same order however many are held.
  const Index held = smaller(larger(ceil_div(a.classes_held, kPanel), 1), panels);
  const Index max_span = smaller(panels_of_gradients<T>(head, max_blocks), held);
  GradientTiles<T> tiles(head, (const In*)a.latent, gradients, max_blocks, held);
  KeptRows kept(max_blocks * kBlock);
  Buffer<float> maxima(panels * max_blocks * kBlock), totals(panels * max_blocks * kBlock),
      responsibility(a.tokens_of_block * k);
  for (Index i = 0; i < n_rows; ++i) a.target_logit[i] = NAN;
  Buffer<int64_t> target(n_rows);
  for (Index i = 0; i < n_rows; ++i) target[i] = a.target[i / k];
  for (Index token = 0; token < a.n_tokens; token += a.tokens_of_block) {
    const Range tokens = chunk_at(a.n_tokens, token, a.tokens_of_block), rows{tokens.begin * k, tokens.end * k};
    const ConsecutiveRows consecutive(rows.begin, rows.size());
    const RowBlocks all = consecutive.blocks();
    const PartialStatistics statistics{all.n_blocks * kBlock, maxima, totals, nullptr};
    tiles.pack(all);
    const auto exponentiate_panels = [&](Range span) {
      tiles.place_span(0);
      exponentiate_span(head, tiles, all, span, {target, a.target_logit}, statistics.from_part(span.begin));
    };
    for (Index p = held; p < panels; p += max_span) exponentiate_panels(chunk_at(panels, p, max_span));
    exponentiate_panels({0, held});
#pragma omp parallel num_threads(head.n_threads)
    {
#pragma omp for
      for (Index b = 0; b < all.n_blocks; ++b) {
        const Index first = rows.begin + b * kBlock;
        merge_statistics(statistics.from_lane(b * kBlock), panels, all.filled[b], a.maximum + first,
                         a.log_total + first, nullptr);
      }
#pragma omp for
      for (Index t = 0; t < tokens.size(); ++t) {
        mix_token(a, tokens.begin + t, responsibility + t * k);
        if (a.grad_prior) write_prior_gradient(a, tokens.begin + t, responsibility + t * k);
      }
    }
    keep_rows(head, a, rows, target, responsibility, kept);
    if (kept.n_rows == 0) continue;
    const RowBlocks blocks = kept.blocks();
    tiles.begin(blocks);
    for (Index p = 0; p < held; p += max_span) {
      tiles.place_span(p);
      add_gradients(head, tiles, kept, blocks, chunk_at(held, p, max_span), a.target_logit, statistics.from_part(p));
    }
    for (Index p = held; p < panels; p += max_span) {
      const Range span = chunk_at(panels, p, max_span);
      exponentiate_panels(span);
      add_gradients(head, tiles, kept, blocks, span, a.target_logit, statistics.from_part(p));
    }
    if (gradients.rows) tiles.end(blocks);
  }
  if (tiles.n_begun() == 0 && grad_weight) {
    memset((void*)grad_weight, 0, sizeof(In) * head.n_classes * head.n_features);
    return;
  }
  if (!sums) return;
#pragma omp parallel for num_threads(head.n_threads)
  for (Index v = 0; v < head.n_classes; ++v) {
    narrow_row(weight_sums + v * head.n_features, head.n_features, grad_weight + v * head.n_features);
  }
}

}  // namespace

namespace fused_mos::FUSED_MOS_NAMESPACE {

void rows_backward(const Head& head, const RowsBackwardArguments& a) {
  if (a.n_rows == 0) return;
  with_types(head, [&](auto types) { rows_backward_of<decltype(types)>(head, a); });
}

void nll_with_gradients(const Head& head, const NllArguments& a) {
  if (a.n_tokens == 0) return;
  with_types(head, [&](auto types) { nll_with_gradients_of<decltype(types)>(head, a); });
}

}  // namespace fused_mos::FUSED_MOS_NAMESPACE
