// The mixture over all classes: log-probabilities, the most probable class, and the gradients of log-probabilities.
//
// Here a block's lanes are tokens and each expert has blocks of its own, so that the sum over experts adds vectors.
#include "family.h"
#include "gradient_tiles.h"

namespace {

using fused_mos::MixtureArguments;

constexpr Index kGroups = 16;           // of panels, as tasks, however many threads there are
constexpr float kSmallest = 0x1p-100f;  // a mixture below this has lost terms that underflowed

// The blocks of some tokens: block b·K + k holds expert k of the tokens of token block b.
class ExpertBlocks {
 public:
  ExpertBlocks(Index first, Index n_tokens, Index n_experts)
      : n_token_blocks(ceil_div(n_tokens, kBlock)),
        n_experts(n_experts),
        source_(n_token_blocks * n_experts * kBlock),
        filled_(n_token_blocks * n_experts) {
    for (Index block = 0; block < n_token_blocks * n_experts; ++block) {
      const Index b = block / n_experts, k = block % n_experts;
      filled_[block] = smaller(kBlock, n_tokens - b * kBlock);
      for (Index lane = 0; lane < kBlock; ++lane) {
        source_[block * kBlock + lane] = lane < filled_[block] ? (first + b * kBlock + lane) * n_experts + k : -1;
      }
    }
  }
  RowBlocks blocks() const { return {n_token_blocks * n_experts, source_, filled_}; }

  const Index n_token_blocks, n_experts;

 private:
  Buffer<Index> source_, filled_;
};

// What makes probabilities of logits, by lane: log π, π, and the two terms of L. Empty lanes have π = 1 and L = 0.
struct LaneStatistics {
  LaneStatistics(const MixtureArguments& a, const RowBlocks& blocks)
      : log_prior(blocks.n_blocks * kBlock),
        prior(blocks.n_blocks * kBlock),
        maximum(blocks.n_blocks * kBlock),
        log_total(blocks.n_blocks * kBlock) {
    for (Index lane = 0; lane < blocks.n_blocks * kBlock; ++lane) {
      const Index row = blocks.source[lane];
      log_prior[lane] = row < 0 ? 0 : a.log_prior[row];
      prior[lane] = row < 0 ? 1 : float(exp(double(a.log_prior[row])));
      maximum[lane] = row < 0 ? 0 : a.maximum[row];
      log_total[lane] = row < 0 ? 0 : a.log_total[row];
    }
  }
  Buffer<float> log_prior, prior, maximum, log_total;
};

template <class T>
struct Tile {
  LogitsOperand<typename T::Op> weight;
  const typename T::Op* packed;  // of the first expert
  Index packed_stride;
  const LaneStatistics& lanes;
  Index first_lane;  // of the first expert
  Index n_experts;

  // l − maximum of one expert's tile.
  template <int NV>
  ALWAYS_INLINE void shifted_logits(Index expert, float* to) const {
    Vector unused[NV], shift[NV];
    fill(unused, 0);
    load_lanes(lanes.maximum + first_lane + expert * kBlock, shift);
    logits_tile(weight, packed + expert * packed_stride, to, unused);
    for (Index v = 0; v < weight.n_classes; ++v) {
      for (int j = 0; j < NV; ++j) store(to + v * kBlock + j * kLanes, load(to + v * kBlock + j * kLanes) - shift[j]);
    }
  }

  // exp(l − L) of one expert in `softmax`, and `mixture` = or += π exp(l − L).
  template <int NV>
  ALWAYS_INLINE void add_expert(Index expert, float* softmax, float* mixture) const {
    Vector unused[NV], shift[NV], log_total[NV], prior[NV];
    fill(unused, 0);
    load_lanes(lanes.maximum + first_lane + expert * kBlock, shift);
    load_lanes(lanes.log_total + first_lane + expert * kBlock, log_total);
    load_lanes(lanes.prior + first_lane + expert * kBlock, prior);
    logits_tile(weight, packed + expert * packed_stride, softmax, unused);
    for (Index v = 0; v < weight.n_classes; ++v) {
#pragma GCC unroll 3
      for (int j = 0; j < NV; ++j) {
        float* at = softmax + v * kBlock + j * kLanes;
        float* sum = mixture + v * kBlock + j * kLanes;
        const Vector e = exp_nonpositive((load(at) - shift[j]) - log_total[j]);
        store(at, e);
        store(sum, (expert ? load(sum) : Vector{}) + prior[j] * e);
      }
    }
  }

  template <int NV>
  ALWAYS_INLINE bool underflows(const float* mixture) const {
    Vector least = broadcast(1);
    for (Index v = 0; v < weight.n_classes; ++v) {
      for (int j = 0; j < NV; ++j) least = minimum(load(mixture + v * kBlock + j * kLanes), least);
    }
    bool any = false;
    for (int i = 0; i < kLanes; ++i) any |= !(least[i] >= kSmallest);
    return any;
  }

  // log p of the tile, in `mixture`. `scratch` is a tile too.
  template <int NV>
  ALWAYS_INLINE void log_prob(float* mixture, float* scratch) const {
    for (Index k = 0; k < n_experts; ++k) add_expert<NV>(k, scratch, mixture);
    if (!underflows<NV>(mixture)) {
      for (Index v = 0; v < weight.n_classes; ++v) {
        for (int j = 0; j < NV; ++j) {
          float* at = mixture + v * kBlock + j * kLanes;
          store(at, log_positive(load(at)));
        }
      }
      return;
    }
    // the same in logarithms, with a running maximum over the experts; rare, so the products are made once more
    float largest[kTile];
    for (Index i = 0; i < kTile; ++i) largest[i] = kLowest;
    for (Index k = 0; k < n_experts; ++k) {
      shifted_logits<NV>(k, scratch);
      for (Index v = 0; v < weight.n_classes; ++v) {
        for (int j = 0; j < NV; ++j) {
          const Index at = v * kBlock + j * kLanes, lane = first_lane + k * kBlock + j * kLanes;
          const Vector joint = load(scratch + at) + (load(lanes.log_prior + lane) - load(lanes.log_total + lane));
          const Vector before = load(largest + at), now = maximum(joint, before);
          store(largest + at, now);
          store(mixture + at,
                (k ? load(mixture + at) : Vector{}) * exp_nonpositive(before - now) + exp_nonpositive(joint - now));
        }
      }
    }
    for (Index v = 0; v < weight.n_classes; ++v) {
      for (int j = 0; j < NV; ++j) {
        const Index at = v * kBlock + j * kLanes;
        const Vector sum = load(mixture + at);
        store(mixture + at, sum > 0 ? log_positive(sum) + load(largest + at) : sum == 0 ? broadcast(-INFINITY) : sum);
      }
    }
  }

  // Per expert k, in tiles `softmax` + k: exp(l − L), and in tiles `share` + k: q = π exp(l − L) / p.
  template <int NV>
  ALWAYS_INLINE void responsibilities(float* softmax, float* share, float* mixture) const {
    for (Index k = 0; k < n_experts; ++k) add_expert<NV>(k, softmax + k * kTile, mixture);
    const bool in_logarithms = underflows<NV>(mixture);
    if (in_logarithms) {
      for (Index k = 0; k < n_experts; ++k) shifted_logits<NV>(k, share + k * kTile);
    }
    for (Index v = 0; v < weight.n_classes; ++v) {
      for (int j = 0; j < NV; ++j) {
        const Index at = v * kBlock + j * kLanes, lane = first_lane + j * kLanes;
        if (!in_logarithms) {
          // divided, not multiplied by an inverse: where one expert has it all, q must be exactly 1
          const Vector p = load(mixture + at);
          for (Index k = 0; k < n_experts; ++k) {
            store(share + k * kTile + at, load(lanes.prior + lane + k * kBlock) * load(softmax + k * kTile + at) / p);
          }
          continue;
        }
        Vector largest = broadcast(kLowest), sum{};
        for (Index k = 0; k < n_experts; ++k) {
          const Vector joint = load(share + k * kTile + at) +
                               (load(lanes.log_prior + lane + k * kBlock) - load(lanes.log_total + lane + k * kBlock));
          store(share + k * kTile + at, joint);
          largest = maximum(joint, largest);
        }
        for (Index k = 0; k < n_experts; ++k) {
          const Vector q = exp_nonpositive(load(share + k * kTile + at) - largest);
          store(share + k * kTile + at, q);
          sum += q;
        }
        // the largest term is 1, so the sum is at least 1, but for a masked class, where all are 0
        const Vector inverse = 1.0f / maximum(broadcast(1), sum);
        for (Index k = 0; k < n_experts; ++k) store(share + k * kTile + at, load(share + k * kTile + at) * inverse);
      }
    }
  }
};

inline Index tokens_of_chunk(Index n_experts, Index bytes_of_row, Index bytes) {
  const Index tokens = bytes / (n_experts * (bytes_of_row + 1));
  return tokens < kBlock ? kBlock : tokens / kBlock * kBlock;
}

// to[token·V + class] = tile[class·kBlock + token]
inline void write_transposed(const float* tile, Index n_classes, Index n_tokens, Index stride, float* to) {
  constexpr Index kSquare = 16;
  for (Index v0 = 0; v0 < n_classes; v0 += kSquare) {
    for (Index t0 = 0; t0 < n_tokens; t0 += kSquare) {
      for (Index t = t0; t < smaller(t0 + kSquare, n_tokens); ++t) {
        for (Index v = v0; v < smaller(v0 + kSquare, n_classes); ++v) to[t * stride + v] = tile[v * kBlock + t];
      }
    }
  }
}

template <class T>
void mixture_of(const Head& head, const MixtureArguments& a) {
  using Op = typename T::Op;
  const auto* rows = (const typename T::In*)a.latent;
  const Index k = a.n_experts, steps = steps_of<Op>(head.n_features), panels = panels_of(head);
  const Index groups = smaller(kGroups, panels);
  const Index scratch_bytes = round_up(logits_scratch_bytes<T>(head), 64);
  Buffer<char> scratch(scratch_bytes * head.n_threads);
  Buffer<float> tiles(2 * kTile * head.n_threads);
  const Index chunk = tokens_of_chunk(k, sizeof(Op) * steps, head.workspace_bytes / 2);
  for (Index first = 0; first < a.n_tokens; first += chunk) {
    const Index n_tokens = smaller(chunk, a.n_tokens - first);
    const ExpertBlocks experts(first, n_tokens, k);
    const RowBlocks blocks = experts.blocks();
    const LaneStatistics lanes(a, blocks);
    Buffer<Op> packed(blocks.n_blocks * kBlock * steps);
    Buffer<float> best(a.best ? groups * n_tokens : 0);
    Buffer<int64_t> best_class(a.best ? groups * n_tokens : 0);
    for (Index i = 0; a.best && i < groups * n_tokens; ++i) best[i] = -INFINITY, best_class[i] = 0;
#pragma omp parallel num_threads(head.n_threads)
    {
      const int thread = omp_get_thread_num();
      float* tile = tiles + 2 * kTile * thread;
#pragma omp for schedule(dynamic)
      for (Index b = 0; b < blocks.n_blocks; ++b) pack_block<T>(head, rows, blocks, b, packed + b * kBlock * steps);
#pragma omp for schedule(dynamic)
      for (Index task = 0; task < groups * experts.n_token_blocks; ++task) {
        const Index group = task / experts.n_token_blocks, b = task % experts.n_token_blocks;
        for (Index panel = panels * group / groups; panel < panels * (group + 1) / groups; ++panel) {
          const Tile<T> problem{logits_operand<T>(head, panel, scratch + scratch_bytes * thread),
                                packed + b * k * kBlock * steps,
                                kBlock * steps,
                                lanes,
                                b * k * kBlock,
                                k};
          with_vectors(blocks.vectors(b * k),
                       [&](auto vectors) { problem.template log_prob<decltype(vectors)::value>(tile, tile + kTile); });
          const Index n = problem.weight.n_classes, filled = blocks.filled[b * k];
          if (a.log_prob) {
            write_transposed(tile, n, filled, head.n_classes,
                             a.log_prob + (first + b * kBlock) * head.n_classes + panel * kPanel);
          }
          for (Index t = 0; a.best && t < filled; ++t) {
            const Index at = group * n_tokens + b * kBlock + t;
            for (Index v = 0; v < n; ++v) {
              if (tile[v * kBlock + t] > best[at]) best[at] = tile[v * kBlock + t], best_class[at] = panel * kPanel + v;
            }
          }
        }
      }
    }
    for (Index t = 0; a.best && t < n_tokens; ++t) {
      Index winner = t;
      for (Index g = 1; g < groups; ++g) winner = best[g * n_tokens + t] > best[winner] ? g * n_tokens + t : winner;
      a.best[first + t] = best_class[winner];
    }
  }
}

// Two sweeps: the first finds s[n,k] = Σ_v G q, the second forms dl = G q − s exp(l − L).
template <class T>
void mixture_backward_of(const Head& head, const MixtureArguments& a) {
  using In = typename T::In;
  const Index k = a.n_experts, panels = panels_of(head), groups = smaller(kGroups, panels);
  // 16-bit gradients of the weight are summed in float32 by panel, so all tokens must pass while the panel is at hand
  const bool direct = sizeof(In) == sizeof(float);
  const Index chunk =
      direct ? tokens_of_chunk(k, sizeof(float) * head.n_features, head.workspace_bytes / 4) : a.n_tokens;
  const Gradients<T> gradients{(In*)a.grad_latent, (In*)a.grad_weight, nullptr, a.grad_bias};
  const bool products = gradients.rows || gradients.of_weight() || gradients.bias;
  const Index max_token_blocks = ceil_div(smaller(chunk, a.n_tokens), kBlock), max_blocks = max_token_blocks * k;
  const Index bytes_of_panel = max_blocks * kTile * sizeof(typename T::Stored);
  const Index span = products ? smaller(panels, larger(head.workspace_bytes / bytes_of_panel, 1)) : 1;
  GradientTiles<T> tiles(head, (const In*)a.latent, gradients, max_blocks, span);
  Buffer<float> scratch((2 * k + 1) * kTile * head.n_threads), partial(groups * max_blocks * kBlock),
      s(max_blocks * kBlock);
  for (Index first = 0; first < a.n_tokens; first += chunk) {
    const Index n_tokens = smaller(chunk, a.n_tokens - first);
    const ExpertBlocks experts(first, n_tokens, k);
    const RowBlocks blocks = experts.blocks();
    const LaneStatistics lanes(a, blocks);
    const Index n_lanes = blocks.n_blocks * kBlock;
    tiles.pack(blocks);
    // q and exp(l − L) of one tile in this thread's scratch, and the gradient G of a class as a vector of tokens
    auto tile_of = [&](Index panel, Index b, int thread) {
      return Tile<T>{logits_operand<T>(head, panel, tiles.scratch(thread)),
                     tiles.packed(b * k),
                     tiles.packed(1) - tiles.packed(0),
                     lanes,
                     b * k * kBlock,
                     k};
    };
    auto gradient_of = [&](Index panel, Index b, Index v, float* to) {
      for (Index t = 0; t < kBlock; ++t) {
        to[t] =
            t < blocks.filled[b * k] ? a.grad[(first + b * kBlock + t) * head.n_classes + panel * kPanel + v] : 0.0f;
      }
    };
    memset(partial, 0, sizeof(float) * groups * n_lanes);
#pragma omp parallel for num_threads(head.n_threads) schedule(dynamic)
    for (Index task = 0; task < groups * experts.n_token_blocks; ++task) {
      const Index group = task / experts.n_token_blocks, b = task % experts.n_token_blocks;
      const int thread = omp_get_thread_num();
      float *softmax = scratch + (2 * k + 1) * kTile * thread, *share = softmax + k * kTile,
            *mixture = share + k * kTile;
      float* sums_of_block = partial + group * n_lanes + b * k * kBlock;
      for (Index panel = panels * group / groups; panel < panels * (group + 1) / groups; ++panel) {
        const auto problem = tile_of(panel, b, thread);
        with_vectors(blocks.vectors(b * k), [&](auto vectors) {
          constexpr int NV = decltype(vectors)::value;
          problem.template responsibilities<NV>(softmax, share, mixture);
          for (Index v = 0; v < problem.weight.n_classes; ++v) {
            float g[kBlock];
            gradient_of(panel, b, v, g);
            for (Index e = 0; e < k; ++e) {
              for (int j = 0; j < NV; ++j) {
                float* at = sums_of_block + e * kBlock + j * kLanes;
                store(at, load(at) + load(g + j * kLanes) * load(share + e * kTile + v * kBlock + j * kLanes));
              }
            }
          }
        });
      }
    }
    for (Index lane = 0; lane < n_lanes; ++lane) {
      s[lane] = 0;
      for (Index g = 0; g < groups; ++g) s[lane] += partial[g * n_lanes + lane];
    }
    for (Index t = 0; a.grad_prior && t < n_tokens; ++t) {
      const Index lane = t / kBlock * k * kBlock + t % kBlock;
      float total = 0;
      for (Index e = 0; e < k; ++e) total += s[lane + e * kBlock];
      for (Index e = 0; e < k; ++e) {
        a.grad_prior[(first + t) * k + e] = s[lane + e * kBlock] - lanes.prior[lane + e * kBlock] * total;
      }
    }
    if (!products) continue;
    tiles.begin(blocks);
    for (Index from = 0; from < panels; from += span) {
      const Index n_panels = smaller(span, panels - from);
#pragma omp parallel for num_threads(head.n_threads) schedule(dynamic)
      for (Index task = 0; task < n_panels * experts.n_token_blocks; ++task) {
        const Index p = task / experts.n_token_blocks, b = task % experts.n_token_blocks;
        const int thread = omp_get_thread_num();
        float *softmax = scratch + (2 * k + 1) * kTile * thread, *share = softmax + k * kTile,
              *mixture = share + k * kTile;
        const auto problem = tile_of(from + p, b, thread);
        with_vectors(blocks.vectors(b * k), [&](auto vectors) {
          constexpr int NV = decltype(vectors)::value;
          problem.template responsibilities<NV>(softmax, share, mixture);
          for (Index v = 0; v < problem.weight.n_classes; ++v) {
            float g[kBlock];
            gradient_of(from + p, b, v, g);
            for (Index e = 0; e < k; ++e) {
              for (int j = 0; j < NV; ++j) {
                const Index at = v * kBlock + j * kLanes;
                const Vector total = load(s + (b * k + e) * kBlock + j * kLanes);
                const Vector dl =
                    load(g + j * kLanes) * load(share + e * kTile + at) - total * load(softmax + e * kTile + at);
                store(tiles.tile(p, b * k + e) + at, dl);
              }
            }
          }
        });
      }
#pragma omp parallel for num_threads(head.n_threads) schedule(dynamic)
      for (Index p = 0; p < n_panels; ++p) {
        if (gradients.of_weight()) tiles.add_to_weight(blocks, from + p, p, omp_get_thread_num());
        for (Index v = 0; gradients.bias && v < classes_in(head, from + p); ++v) {
          float total = 0;
          for (Index b = 0; b < blocks.n_blocks; ++b) {
            for (Index lane = 0; lane < blocks.filled[b]; ++lane) total += widen(tiles.tile(p, b)[v * kBlock + lane]);
          }
          gradients.bias[(from + p) * kPanel + v] += total;
        }
      }
      if (gradients.rows) tiles.add_to_rows(blocks, from, n_panels);
    }
    if (gradients.rows) tiles.end(blocks);
  }
}

}  // namespace

namespace fused_mos::FUSED_MOS_NAMESPACE {

void mixture(const Head& head, const MixtureArguments& a) {
  with_types(head, [&](auto types) { mixture_of<decltype(types)>(head, a); });
}

void mixture_backward(const Head& head, const MixtureArguments& a) {
  if (a.n_tokens == 0) return;
  with_types(head, [&](auto types) { mixture_backward_of<decltype(types)>(head, a); });
}

}  // namespace fused_mos::FUSED_MOS_NAMESPACE
