// The backward pass of the negative log-likelihood, recomputing the logits (4 products), and the forward pass that forms
// the gradients at once (3 products).
#include "family.h"
#include "gradient_tiles.h"

namespace {

using fused_mos::NllArguments;
using fused_mos::RowsBackwardArguments;

constexpr Index kPanelsOfSpan = 16;  // for which a recomputing backward pass has at least room in the workspace

// The rows whose gradients are formed, lane by lane: where their exponentials are, and what makes dl of them.
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

  // `lane` is where its exponentials are, `row` which row it is.
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

  // Fills up the last block with rows that weigh nothing.
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

// Fills the tiles of a span of panels with exp(l − the panel's maximum), and the panels' maxima and sums.
template <class T>
void exponentiate_span(const Head& head, const GradientTiles<T>& tiles, const RowBlocks& blocks, Index first_panel,
                       Index n_panels, const int64_t* target, float* target_logit, float* maxima, float* totals) {
  const Index n_lanes = blocks.n_blocks * kBlock, sets = ceil_div(blocks.n_blocks, kBlocksOfProduct);
#pragma omp parallel for num_threads(head.n_threads) schedule(dynamic)
  for (Index task = 0; task < n_panels * sets; ++task) {
    const Index p = task / sets, first = task % sets * kBlocksOfProduct,
                last = smaller(first + kBlocksOfProduct, blocks.n_blocks);
    const int thread = omp_get_thread_num();
    const auto e = logits_operand<T>(head, first_panel + p, tiles.scratch(thread));
    for (Index b = first; b < last; ++b) {
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
        if (target_logit) pick_targets(tile, blocks, b, target, first_panel + p, e.n_classes, target_logit);
        exponentiate(tile, e.n_classes, largest, 1.0f, exponentials, total);
        store_lanes(maxima + p * n_lanes + b * kBlock, largest);
        if (totals) store_lanes(totals + p * n_lanes + b * kBlock, total);
      });
    }
  }
}

// Turns the exponentials of one panel into dl, in place, the kept rows moving up, and adds their sums to the bias's gradient.
// A kept row's lane never lies behind the lane it comes from, so nothing is overwritten before it is read.
template <class T>
void finish_panel(const Head& head, const GradientTiles<T>& tiles, const KeptRows& kept, const RowBlocks& blocks,
                  Index panel, Index panel_of_span, const float* maxima, float* grad_bias) {
  const Index n = classes_in(head, panel);
  float bias_sums[kPanel * kLanes];
  memset(bias_sums, 0, sizeof bias_sums);
  for (Index b = 0; b < blocks.n_blocks; ++b) {
    const Index* origin = kept.origin + b * kBlock;
    const Index filled = blocks.filled[b], n_lanes = blocks.vectors(b) * kLanes;
    auto* to = tiles.tile(panel_of_span, b);
    float factor[kBlock] = {}, moved[kBlock] = {}, at_target[kBlock];
    Index offset[kBlock];
    bool in_place = true;
    for (Index i = 0; i < filled; ++i) {
      factor[i] = maxima[origin[i]] - kept.maximum[b * kBlock + i];
      offset[i] = origin[i] / kBlock * kTile + origin[i] % kBlock;
      in_place &= origin[i] == b * kBlock + i;
    }
    for (Index j = 0; j < n_lanes; j += kLanes) {
      store(factor + j, load(kept.grad_lse + b * kBlock + j) *
                            exp_nonpositive(load(factor + j) - load(kept.log_total + b * kBlock + j)));
    }
    const auto* from = tiles.tile(panel_of_span, 0);
    for (Index i = 0; i < filled; ++i) {
      const Index v = kept.target[b * kBlock + i] - panel * kPanel;
      if (v >= 0 && v < n)
        at_target[i] = factor[i] * widen(from[offset[i] + v * kBlock]) - kept.grad_target[b * kBlock + i];
    }
    for (Index v = 0; v < n; ++v) {
      auto* row = to + v * kBlock;
      if (!in_place) {
        for (Index i = 0; i < filled; ++i) moved[i] = widen(from[offset[i] + v * kBlock]);
      }
      for (Index j = 0; j < n_lanes; j += kLanes) {
        const Vector dl = (in_place ? load(row + j) : load(moved + j)) * load(factor + j);
        store(row + j, dl);
        store(bias_sums + v * kLanes, load(bias_sums + v * kLanes) + dl);
      }
    }
    for (Index i = 0; i < filled; ++i) {
      const Index v = kept.target[b * kBlock + i] - panel * kPanel;
      if (v < 0 || v >= n) continue;
      narrow(at_target[i], to + v * kBlock + i);
      bias_sums[v * kLanes] -= kept.grad_target[b * kBlock + i];
    }
  }
  if (!grad_bias) return;
  for (Index v = 0; v < n; ++v) grad_bias[panel * kPanel + v] += sum(load(bias_sums + v * kLanes));
}

// dl, then dE, then dz, of a span whose tiles hold exponentials.
template <class T>
void add_gradients(const Head& head, GradientTiles<T>& tiles, const KeptRows& kept, const RowBlocks& blocks,
                   Index n_lanes, Index first_panel, Index n_panels, const float* maxima,
                   const Gradients<T>& gradients) {
#pragma omp parallel for num_threads(head.n_threads) schedule(dynamic)
  for (Index p = 0; p < n_panels; ++p) {
    finish_panel(head, tiles, kept, blocks, first_panel + p, p, maxima + p * n_lanes, gradients.bias);
    if (gradients.of_weight()) tiles.add_to_weight(blocks, first_panel + p, p, omp_get_thread_num());
  }
  if (gradients.rows) tiles.add_to_rows(blocks, first_panel, n_panels);
}

inline Index rows_of_chunk(const Head& head) {
  return larger(head.workspace_bytes / (kPanelsOfSpan * kPanel * Index(sizeof(float))) / kBlock, 1) * kBlock;
}

template <class T>
void rows_backward_of(const Head& head, const RowsBackwardArguments& a) {
  using In = typename T::In;
  constexpr bool kDirect = sizeof(In) == sizeof(float);
  const Gradients<T> gradients{(In*)a.grad_rows, (In*)a.grad_weight, nullptr, a.grad_bias};
  // 16-bit gradients of the weight are summed in float32 by panel, so all rows must pass while the panel is at hand
  const Index panels = panels_of(head), chunk = kDirect ? smaller(rows_of_chunk(head), a.n_rows) : a.n_rows;
  const Index max_blocks = ceil_div(chunk, kBlock);
  const Index bytes_of_panel = max_blocks * kTile * sizeof(typename T::Stored);
  const Index span = smaller(panels, larger(head.workspace_bytes / bytes_of_panel, head.n_threads));
  GradientTiles<T> tiles(head, (const In*)a.rows, gradients, max_blocks, span);
  KeptRows kept(max_blocks * kBlock);
  Buffer<float> maxima(span * max_blocks * kBlock);
  for (Index first = 0; first < a.n_rows; first += chunk) {
    const Index n = smaller(chunk, a.n_rows - first);
    kept.clear();
    for (Index i = first; i < first + n; ++i) {
      kept.add(i - first, i, a.target ? a.target[i] : -1, a.maximum[i], a.log_total[i], a.grad_lse[i],
               a.grad_target ? a.grad_target[i] : 0.0f);
    }
    const RowBlocks blocks = kept.blocks();
    tiles.pack(blocks);
    tiles.begin(blocks);
    for (Index panel = 0; panel < panels; panel += span) {
      const Index n_panels = smaller(span, panels - panel);
      exponentiate_span(head, tiles, blocks, panel, n_panels, nullptr, nullptr, maxima, nullptr);
      add_gradients(head, tiles, kept, blocks, blocks.n_blocks * kBlock, panel, n_panels, maxima, gradients);
    }
    if (gradients.rows) tiles.end(blocks);
  }
}

// Of one token: its loss, its responsibilities r (K,), and ∂nll/∂a = π − r.
inline void mix_token(const NllArguments& a, Index token, float* responsibility) {
  const Index k = a.n_experts, first = token * k;
  double largest = -INFINITY, total = 0;
  for (Index e = 0; e < k; ++e) {
    const double joint = double(a.log_prior[first + e]) +
                         (double(a.target_logit[first + e]) - a.maximum[first + e] - a.log_total[first + e]);
    largest = joint > largest || joint != joint ? joint : largest;
    responsibility[e] = float(joint);
  }
  const double shift =
      largest == -INFINITY ? 0 : largest;  // where no expert gives it any probability, nobody is responsible
  for (Index e = 0; e < k; ++e) total += exp(responsibility[e] - shift);
  a.nll[token] = float(-(shift + log(total)));
  for (Index e = 0; e < k; ++e) {
    responsibility[e] = !a.valid[token] || total == 0 ? 0.0f : float(exp(responsibility[e] - shift) / total);
    if (a.grad_prior)
      a.grad_prior[first + e] =
          a.valid[token] ? a.scale * (float(exp(double(a.log_prior[first + e]))) - responsibility[e]) : 0.0f;
  }
}

template <class T>
void nll_with_gradients_of(const Head& head, const NllArguments& a) {
  using In = typename T::In;
  const Index k = a.n_experts, panels = panels_of(head), n_rows = a.n_tokens * k;
  const Index tokens_of_block = a.tokens_of_block;
  const Index max_blocks = ceil_div(tokens_of_block * k, kBlock);
  const bool sums = sizeof(In) != sizeof(float) && a.grad_weight && tokens_of_block < a.n_tokens;
  Buffer<float> weight_sums(sums ? head.n_classes * head.n_features : 0);
  if (sums && head.n_features) memset(weight_sums, 0, sizeof(float) * head.n_classes * head.n_features);
  const Gradients<T> gradients{(In*)a.grad_latent, sums ? nullptr : (In*)a.grad_weight, weight_sums, a.grad_bias};
  GradientTiles<T> tiles(head, (const In*)a.latent, gradients, max_blocks, panels);
  KeptRows kept(max_blocks * kBlock);
  Buffer<float> maxima(panels * max_blocks * kBlock), totals(panels * max_blocks * kBlock),
      responsibility(tokens_of_block * k);
  for (Index i = 0; i < n_rows; ++i) a.target_logit[i] = NAN;
  Buffer<int64_t> target(n_rows);
  for (Index i = 0; i < n_rows; ++i) target[i] = a.target[i / k];
  for (Index token = 0; token < a.n_tokens; token += tokens_of_block) {
    const Index n_tokens = smaller(tokens_of_block, a.n_tokens - token), first = token * k, n = n_tokens * k;
    const ConsecutiveRows rows(first, n);
    const RowBlocks all = rows.blocks();
    const Index n_lanes = all.n_blocks * kBlock;
    tiles.pack(all);
    exponentiate_span(head, tiles, all, 0, panels, target, a.target_logit, maxima, totals);
#pragma omp parallel for num_threads(head.n_threads)
    for (Index b = 0; b < all.n_blocks; ++b) {
      const Index lane = b * kBlock;
      merge_statistics(maxima + lane, totals + lane, panels, n_lanes, all.filled[b], a.maximum + first + lane,
                       a.log_total + first + lane);
    }
    for (Index t = 0; t < n_tokens; ++t) mix_token(a, token + t, responsibility + t * k);
    kept.clear();
    for (Index i = 0; i < n; ++i) {
      const float r = responsibility[i];
      if (r == 0 || r < a.filter_eps) continue;
      kept.add(i, first + i, target[first + i], a.maximum[first + i], a.log_total[first + i], a.scale * r, a.scale * r);
    }
    if (kept.n_rows == 0) continue;
    const RowBlocks blocks = kept.blocks();
    tiles.begin(blocks);
    add_gradients(head, tiles, kept, blocks, n_lanes, 0, panels, maxima, gradients);
    if (gradients.rows) tiles.end(blocks);
  }
  if (!sums) return;
  auto* grad_weight = (In*)a.grad_weight;
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
