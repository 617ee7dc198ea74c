// Mixture over all classes: log-probabilities, most probable class, and the gradients of log-probabilities.
#include "family.h"
#include "gradient_tiles.h"
#include "log_prob_gradient.h"
#include "mixture_results.h"

namespace {

inline Index tokens_of_chunk(Index n_experts, Index bytes_of_row, Index bytes) {
  const Index tokens = bytes / (n_experts * (bytes_of_row + 1));
  return tokens < kBlock ? kBlock : tokens / kBlock * kBlock;
}

// Sums by lane of a chunk. Each group of panels has its own, so that their order does not depend on the threads.
class LaneSums {
 public:
  LaneSums(Index n_groups, Index n_lanes) : n_groups_(n_groups), n_lanes_(n_lanes), parts_(n_groups * n_lanes) {
    if (parts_) memset(parts_, 0, sizeof(float) * n_groups * n_lanes);
  }

  float* of_group(Index group) const { return parts_ + group * n_lanes_; }

  float total(Index lane) const {
    float sum = 0;
    for (Index g = 0; g < n_groups_; ++g) sum += of_group(g)[lane];
    return sum;
  }

 private:
  Index n_groups_, n_lanes_;
  Buffer<float> parts_;
};

// Adds Σ_v exp(l − L) log p of one tile to `sums` (K, kBlock); exp(l − L) = 0 adds 0, even if log p is −inf.
template <int NV>
void add_mean_log_prob(const float* softmax, const float* log_p, Index n_classes, Index n_experts, float* sums) {
  for (Index k = 0; k < n_experts; ++k) {
    Vector sum[NV];
    load_lanes(sums + k * kBlock, sum);
    for (Index v = 0; v < n_classes; ++v) {
      for (int j = 0; j < NV; ++j) {
        const Vector e = load(softmax + k * kTile + v * kBlock + j * kLanes);
        sum[j] += e == 0.0f ? Vector{} : e * load(log_p + v * kBlock + j * kLanes);
      }
    }
    store_lanes(sums + k * kBlock, sum);
  }
}

template <class T>
void mixture_of(const Head& head, const MixtureArguments& a) {
  using Op = typename T::Op;
  const auto* rows = (const typename T::In*)a.latent;
  const Index steps = steps_of<Op>(head.n_features), panels = panels_of(head), groups = smaller(kGroups, panels);
  const Index scratch_bytes = round_up(logits_scratch_bytes<T>(head), 64);
  Buffer<char> scratch(scratch_bytes * head.n_threads);
  // per thread: log p, scratch, and exp(l − L) of all experts, unless the scratch has one expert after the other
  const Index tiles_of_thread = a.mean_log_prob ? a.n_experts + 2 : 2, stride = a.mean_log_prob ? kTile : 0;
  Buffer<float> tiles(tiles_of_thread * kTile * head.n_threads);
  const Index max_tokens = tokens_of_chunk(a.n_experts, sizeof(Op) * steps, head.workspace_bytes / 2);
  for (Index first = 0; first < a.n_tokens; first += max_tokens) {
    const TokenChunk chunk(a, chunk_at(a.n_tokens, first, max_tokens));
    Buffer<Op> packed(chunk.n_lanes() * steps);
    const BestClasses best(a.best ? groups : 0, chunk.tokens.size());
    const LaneSums means(a.mean_log_prob ? groups : 0, chunk.n_lanes());
#pragma omp parallel num_threads(head.n_threads)
    {
      const int thread = omp_get_thread_num();
      float *log_p = tiles + tiles_of_thread * kTile * thread, *scratch_tile = log_p + kTile;
      float* softmax = scratch_tile + stride;
#pragma omp for schedule(dynamic)
      for (Index b = 0; b < chunk.blocks.n_blocks; ++b) {
        pack_block<T>(head, rows, chunk.blocks, b, packed + b * kBlock * steps);
      }
#pragma omp for schedule(dynamic)
      for (Index task = 0; task < groups * chunk.n_token_blocks; ++task) {
        const Index group = task / chunk.n_token_blocks, b = task % chunk.n_token_blocks;
        const Range panels_of_group = share(panels, group, groups);
        for (Index panel = panels_of_group.begin; panel < panels_of_group.end; ++panel) {
          const MixtureTile<T> tile(head, chunk, packed, panel, b, scratch + scratch_bytes * thread);
          with_vectors(chunk.vectors(b), [&](auto vectors) {
            constexpr int NV = decltype(vectors)::value;
            tile.template log_prob<NV>(log_p, softmax, stride, scratch_tile);
            if (!a.mean_log_prob) return;
            add_mean_log_prob<NV>(softmax, log_p, tile.n_classes(), a.n_experts,
                                  means.of_group(group) + chunk.lane(b, 0));
          });
          const Range classes = chunk_at(head.n_classes, panel * kPanel, kPanel);
          if (a.log_prob) {
            write_transposed(log_p, classes.size(), chunk.tokens_in(b), head.n_classes,
                             a.log_prob + chunk.first_token(b) * head.n_classes + classes.begin);
          }
          if (a.best) best.update(log_p, classes, group, b * kBlock, chunk.tokens_in(b));
        }
      }
    }
    if (a.best) best.write(a.best + first);
    for (Index lane = 0; a.mean_log_prob && lane < chunk.n_lanes(); ++lane) {
      if (chunk.source[lane] >= 0) a.mean_log_prob[chunk.source[lane]] = means.total(lane);
    }
  }
}

// Backward pass of log p for an arbitrary gradient G[n,v], by chunks of tokens. It takes two sweeps over the classes,
// with the posterior q[n,k,v] = π exp(l − L) / p:
//
//   s[n,k] = Σ_v G q          da = s − π Σ_k s
//   dl = G q − s exp(l − L)   dl, times the derivative of the logits' transform, gives dE, db and dz
template <class T>
class MixtureBackward {
  using In = typename T::In;
  // 16-bit gradients of the weight are summed in float32, one panel at a time, so all tokens must be in one chunk
  static constexpr bool kDirect = sizeof(In) == sizeof(float);

 public:
  MixtureBackward(const Head& head, const MixtureArguments& a)
      : head_(head),
        a_(a),
        gradients_(a.gradients),
        n_panels_(panels_of(head)),
        n_groups_(smaller(kGroups, n_panels_)),
        max_tokens_(kDirect ? tokens_of_chunk(a.n_experts, sizeof(float) * head.n_features, head.workspace_bytes / 4)
                            : a.n_tokens),
        max_blocks_(ceil_div(smaller(max_tokens_, a.n_tokens), kBlock) * a.n_experts),
        max_span_(needs_logit_gradients() ? panels_in_workspace() : 1),
        tiles_(head, (const In*)a.latent, gradients_, max_blocks_, max_span_),
        caps_(LogitTransform(head.transform).caps()),
        scratch_(tiles_of_thread() * kTile * head.n_threads),
        s_(max_blocks_ * kBlock) {}

  void run() {
    for (Index first = 0; first < a_.n_tokens; first += max_tokens_) {
      const TokenChunk chunk(a_, chunk_at(a_.n_tokens, first, max_tokens_));
      tiles_.pack(chunk.blocks);
      if (a_.mean_gradient) {
        read_weighted_posteriors(chunk);
      } else {
        sum_weighted_posteriors(chunk);
      }
      if (a_.grad_prior) write_prior_gradient(chunk);
      if (needs_logit_gradients()) add_logit_gradients(chunk);
    }
  }

 private:
  // One thread's tiles: exp(l − L) and q of each expert, p, and the slope of the soft cap of each expert.
  struct Posteriors {
    float *softmax, *posterior, *mixture, *slope;
  };

  bool needs_logit_gradients() const { return gradients_.rows || gradients_.of_weight() || gradients_.bias; }

  Index panels_in_workspace() const {
    const Index bytes_of_panel = max_blocks_ * kTile * sizeof(typename T::Stored);
    return smaller(n_panels_, round_up(larger(head_.workspace_bytes / bytes_of_panel, 1), kPanelsOfProduct));
  }

  Index tiles_of_thread() const { return (caps_ ? 3 : 2) * a_.n_experts + 1; }

  Posteriors posteriors_of(int thread) const {
    float* softmax = scratch_ + tiles_of_thread() * kTile * thread;
    float* mixture = softmax + 2 * a_.n_experts * kTile;
    return {softmax, softmax + a_.n_experts * kTile, mixture, caps_ ? mixture + kTile : nullptr};
  }

  MixtureTile<T> tile(const TokenChunk& chunk, Index panel, Index b, int thread) const {
    return {head_, chunk, tiles_.packed(0), panel, b, tiles_.scratch(thread)};
  }

  void read_weighted_posteriors(const TokenChunk& chunk) const {
    for (Index lane = 0; lane < chunk.n_lanes(); ++lane) {
      s_[lane] = chunk.source[lane] < 0 ? 0.0f : a_.mean_gradient[chunk.source[lane]];
    }
  }

  void sum_weighted_posteriors(const TokenChunk& chunk) const {
    const LaneSums partial(n_groups_, chunk.n_lanes());
#pragma omp parallel for num_threads(head_.n_threads) schedule(dynamic)
    for (Index task = 0; task < n_groups_ * chunk.n_token_blocks; ++task) {
      const Index group = task / chunk.n_token_blocks, b = task % chunk.n_token_blocks;
      float* sums = partial.of_group(group) + chunk.lane(b, 0);
      const Range panels = share(n_panels_, group, n_groups_);
      for (Index panel = panels.begin; panel < panels.end; ++panel) {
        add_weighted_posteriors(chunk, panel, b, omp_get_thread_num(), sums);
      }
    }
    for (Index lane = 0; lane < chunk.n_lanes(); ++lane) s_[lane] = partial.total(lane);
  }

  // Adds one panel's share of s to `sums` (K, kBlock).
  void add_weighted_posteriors(const TokenChunk& chunk, Index panel, Index b, int thread, float* sums) const {
    const auto mixture = tile(chunk, panel, b, thread);
    const Posteriors own = posteriors_of(thread);
    const GradientLanes gradient(a_.grad, head_, chunk, b);
    with_vectors(chunk.vectors(b), [&](auto vectors) {
      constexpr int NV = decltype(vectors)::value;
      mixture.template posteriors<NV>(own.softmax, own.posterior, own.mixture, nullptr);
      for (Index v = 0; v < mixture.n_classes(); ++v) {
        Vector g[NV];
        gradient.template load_class<NV>(panel * kPanel + v, own.mixture + v * kBlock, g);
        for (Index k = 0; k < a_.n_experts; ++k) {
          for (int j = 0; j < NV; ++j) {
            float* at = sums + k * kBlock + j * kLanes;
            store(at, load(at) + g[j] * load(own.posterior + k * kTile + v * kBlock + j * kLanes));
          }
        }
      }
    });
  }

  void write_prior_gradient(const TokenChunk& chunk) const {
    const Index n_experts = a_.n_experts;
    for (Index t = 0; t < chunk.tokens.size(); ++t) {
      const Index lane = chunk.lane(t / kBlock, 0) + t % kBlock;
      float total = 0;
      for (Index k = 0; k < n_experts; ++k) total += s_[lane + k * kBlock];
      for (Index k = 0; k < n_experts; ++k) {
        a_.grad_prior[(chunk.tokens.begin + t) * n_experts + k] =
            s_[lane + k * kBlock] - chunk.lanes.prior[lane + k * kBlock] * total;
      }
    }
  }

  // Adds the gradients of z, E and b, in spans of panels whose dl fits in the workspace.
  void add_logit_gradients(const TokenChunk& chunk) {
    tiles_.begin(chunk.blocks);
    for (Index first = 0; first < n_panels_; first += max_span_) {
      const Range span = chunk_at(n_panels_, first, max_span_);
#pragma omp parallel for num_threads(head_.n_threads) schedule(dynamic)
      for (Index task = 0; task < span.size() * chunk.n_token_blocks; ++task) {
        const Index p = task / chunk.n_token_blocks, b = task % chunk.n_token_blocks;
        form_logit_gradients(chunk, span.begin + p, p, b, omp_get_thread_num());
      }
#pragma omp parallel for num_threads(head_.n_threads) schedule(dynamic)
      for (Index p = 0; p < span.size(); ++p) {
        tiles_.add_to_weight(chunk.blocks, span, {p, p + 1}, omp_get_thread_num(), [&](Index, Range blocks) {
          if (gradients_.bias) add_to_bias(chunk.blocks, blocks, span.begin + p, p);
        });
      }
      if (gradients_.rows) tiles_.add_to_rows(chunk.blocks, span);
    }
    if (gradients_.rows) tiles_.end(chunk.blocks);
  }

  // Writes dl times the derivative of the transform to the experts' tiles, for one panel and block of tokens.
  void form_logit_gradients(const TokenChunk& chunk, Index panel, Index panel_of_span, Index b, int thread) const {
    const auto mixture = tile(chunk, panel, b, thread);
    const Posteriors own = posteriors_of(thread);
    const GradientLanes gradient(a_.grad, head_, chunk, b);
    with_vectors(chunk.vectors(b), [&](auto vectors) {
      constexpr int NV = decltype(vectors)::value;
      mixture.template posteriors<NV>(own.softmax, own.posterior, own.mixture, own.slope);
      for (Index v = 0; v < mixture.n_classes(); ++v) {
        Vector g[NV];
        gradient.template load_class<NV>(panel * kPanel + v, own.mixture + v * kBlock, g);
        for (Index k = 0; k < a_.n_experts; ++k) {
          for (int j = 0; j < NV; ++j) {
            const Index at = v * kBlock + j * kLanes;
            const Vector s = load(s_ + chunk.lane(b, k) + j * kLanes);
            Vector dl = g[j] * load(own.posterior + k * kTile + at) - s * load(own.softmax + k * kTile + at);
            if (own.slope) dl *= load(own.slope + k * kTile + at);
            dl *= head_.transform.inverse_temperature;
            store(tiles_.tile(panel_of_span, b * a_.n_experts + k) + at, dl);
          }
        }
      }
    });
    for (Index k = 0; k < a_.n_experts; ++k) {
      clear_lanes(tiles_.tile(panel_of_span, b * a_.n_experts + k), mixture.n_classes(), chunk.tokens_in(b));
    }
  }

  void add_to_bias(const RowBlocks& blocks, Range added, Index panel, Index panel_of_span) const {
    for (Index v = 0; v < classes_in(head_, panel); ++v) {
      float total = 0;
      for (Index b = added.begin; b < added.end; ++b) {
        const auto* dl = tiles_.tile(panel_of_span, b) + v * kBlock;
        for (Index lane = 0; lane < blocks.filled[b]; ++lane) total += widen(dl[lane]);
      }
      gradients_.bias[panel * kPanel + v] += total;
    }
  }

  const Head& head_;
  const MixtureArguments& a_;
  Gradients<T> gradients_;
  Index n_panels_, n_groups_, max_tokens_, max_blocks_, max_span_;
  GradientTiles<T> tiles_;
  bool caps_;
  Buffer<float> scratch_, s_;
};

}  // namespace

namespace fused_mos::FUSED_MOS_NAMESPACE {

void mixture(const Head& head, const MixtureArguments& a) {
  with_types(head, [&](auto types) { mixture_of<decltype(types)>(head, a); });
}

void mixture_backward(const Head& head, const MixtureArguments& a) {
  if (a.n_tokens == 0) return;
  with_types(head, [&](auto types) { MixtureBackward<decltype(types)>(head, a).run(); });
}

}  // namespace fused_mos::FUSED_MOS_NAMESPACE
