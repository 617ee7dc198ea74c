// Mixture over all classes with its normalisers, from logits that are computed once.
//
// A block of tokens keeps a = exp(l − m) of all its rows over all classes, where m is a row's maximum in a panel of
// classes. The sums of a give L, and a second sweep without products computes p = Σ_k π exp(m − L) a.
#include "exponentials.h"
#include "family.h"
#include "mixture_results.h"

namespace {

using fused_mos::OneSweepArguments;

template <class T>
class OneSweep {
  using Op = typename T::Op;

 public:
  OneSweep(const Head& head, const OneSweepArguments& a)
      : head_(head),
        a_(a),
        n_panels_(panels_of(head)),
        n_groups_(smaller(kGroups, n_panels_)),
        steps_(steps_of<Op>(head.n_features)),
        max_lanes_(round_up(a.tokens_of_block * a.n_experts, kBlock)),
        packed_(max_lanes_ * steps_),
        exponentials_(n_panels_ * kPanel * max_lanes_ + kBlock),
        weights_(n_panels_ * max_lanes_ + kBlock),
        totals_(n_panels_ * max_lanes_),
        maximum_(max_lanes_ + kBlock),
        log_total_(max_lanes_ + kBlock),
        log_weight_(max_lanes_ + kBlock),
        scratch_bytes_(round_up(logits_scratch_bytes<T>(head), 64)),
        scratch_(scratch_bytes_ * head.n_threads),
        tiles_(kTile * head.n_threads) {}

  void run() {
    for (Index first = 0; first < a_.n_tokens; first += a_.tokens_of_block) {
      tokens_ = chunk_at(a_.n_tokens, first, a_.tokens_of_block);
      const RowsByExpert rows(tokens_, a_.n_experts);
      n_lanes_ = rows.n_lanes;
      exponentiate(rows.blocks());
      normalise(rows.blocks());
      mix();
    }
  }

 private:
  // Returns the exponentials of a panel, (kPanel, n_lanes), in one row per class: a vector can begin at any token.
  float* exponentials_of(Index panel) const { return exponentials_ + panel * kPanel * n_lanes_; }
  // Returns π exp(m − L) of a panel, or m until L is known.
  float* weights_of(Index panel) const { return weights_ + panel * n_lanes_; }
  const Op* packed_of(Index block) const { return packed_ + block * kBlock * steps_; }
  float* tile_of_thread() const { return tiles_ + kTile * omp_get_thread_num(); }

  LogitsOperand<Op> operand(Index panel) const {
    return logits_operand<T>(head_, panel, scratch_ + scratch_bytes_ * omp_get_thread_num());
  }

  void exponentiate(const RowBlocks& blocks) const {
    const Index sets = ceil_div(blocks.n_blocks, kBlocksOfTask);
#pragma omp parallel num_threads(head_.n_threads)
    {
#pragma omp for schedule(dynamic)
      for (Index b = 0; b < blocks.n_blocks; ++b) {
        pack_block<T>(head_, (const typename T::In*)a_.latent, blocks, b, packed_ + b * kBlock * steps_);
      }
#pragma omp for schedule(dynamic)
      for (Index task = 0; task < n_panels_ * sets; ++task) {
        const Index panel = task / sets;
        const Range set = chunk_at(blocks.n_blocks, task % sets * kBlocksOfTask, kBlocksOfTask);
        [[maybe_unused]] const ProductRegisters registers;
        const auto e = operand(panel);
        for (Index b = set.begin; b < set.end; ++b) {
          with_vectors(blocks.vectors(b),
                       [&](auto vectors) { exponentiate_tile<decltype(vectors)::value>(e, panel, b); });
        }
      }
    }
  }

  // Computes a tile of logits and their maxima. Not inlined, since the constants of exp would take registers from the
  // product.
  template <int NV>
  __attribute__((noinline)) void compute_logits(const LogitsOperand<Op>& e, Index block, float* tile,
                                                float* maxima) const {
    Vector largest[NV];
    fill(largest, kLowest);
    logits_tile(e, packed_of(block), tile, largest);
    store_lanes(maxima, largest);
  }

  template <int NV>
  void exponentiate_tile(const LogitsOperand<Op>& e, Index panel, Index block) const {
    float *tile = tile_of_thread(), *to = exponentials_of(panel) + block * kBlock;
    float* maxima = weights_of(panel) + block * kBlock;
    Vector largest[NV], total[NV];
    compute_logits<NV>(e, block, tile, maxima);
    load_lanes(maxima, largest);
    fill(total, 0);
    for (Index v = 0; v < e.n_classes; ++v) {
#pragma GCC unroll 4
      for (int j = 0; j < NV; ++j) {
        const Vector exponential = exp_nonpositive(load(tile + v * kBlock + j * kLanes) - largest[j]);
        total[j] += exponential;
        store(to + v * n_lanes_ + j * kLanes, exponential);
      }
    }
    store_lanes(totals_ + panel * n_lanes_ + block * kBlock, total);
  }

  // Merges the panels' statistics to L, and turns each m into the weight π exp(m − L).
  void normalise(const RowBlocks& blocks) const {
    const PartialStatistics statistics{n_lanes_, weights_, totals_, nullptr};
#pragma omp parallel for num_threads(head_.n_threads)
    for (Index b = 0; b < blocks.n_blocks; ++b) {
      const Index first = b * kBlock, end = first + blocks.filled[b];
      float prior[kBlock] = {};
      merge_statistics(statistics.from_lane(first), n_panels_, end - first, maximum_ + first, log_total_ + first,
                       nullptr);
      for (Index lane = first; lane < end; ++lane) {
        const Index row = blocks.source[lane];
        a_.maximum[row] = maximum_[lane];
        a_.log_total[row] = log_total_[lane];
        log_weight_[lane] = a_.log_prior[row] - log_total_[lane];
        prior[lane - first] = float(exp(double(a_.log_prior[row])));
      }
      for (Index panel = 0; panel < n_panels_; ++panel) {
        for (Index lane = 0; lane < blocks.vectors(b) * kLanes; lane += kLanes) {
          float* weight = weights_of(panel) + first + lane;
          const Vector shift = (load(weight) - load(maximum_ + first + lane)) - load(log_total_ + first + lane);
          store(weight, load(prior + lane) * exp_nonpositive(shift));
        }
      }
    }
  }

  // Computes log p and the most probable classes. A task has all tokens of some panels, so it may overwrite the panels'
  // exponentials.
  void mix() const {
    const Index n = tokens_.size();
    const BestClasses best(a_.best ? n_groups_ : 0, n);
#pragma omp parallel for num_threads(head_.n_threads) schedule(dynamic)
    for (Index group = 0; group < n_groups_; ++group) {
      const Range panels = share(n_panels_, group, n_groups_);
      for (Index panel = panels.begin; panel < panels.end; ++panel) mix_panel(panel, group, best);
    }
    if (a_.best) best.write(a_.best + tokens_.begin);
  }

  void mix_panel(Index panel, Index group, const BestClasses& best) const {
    const Index v0 = panel * kPanel, n_classes = classes_in(head_, panel);
    float* log_p = tile_of_thread();
    bool has_logits = false;
    for (Index first = 0; first < tokens_.size(); first += kBlock) {
      const Index n = chunk_at(tokens_.size(), first, kBlock).size();
      with_vectors(ceil_div(n, kLanes), [&](auto vectors) {
        constexpr int NV = decltype(vectors)::value;
        if (!has_logits && log_prob<NV>(panel, n_classes, first, n, log_p)) return;
        if (!has_logits) restore_logits(panel);
        has_logits = true;
        log_prob_in_logarithms<NV>(panel, n_classes, first, log_p);
      });
      if (a_.log_prob) {
        float* to = a_.log_prob + (tokens_.begin + first) * head_.n_classes + v0;
        write_transposed(log_p, n_classes, n, head_.n_classes, to);
      }
      if (a_.best) best.update(log_p, {v0, v0 + n_classes}, group, first, n);
    }
  }

  // Computes log p of the n tokens from `first` on. Returns false if p is NaN or underflows for one of them.
  template <int NV>
  bool log_prob(Index panel, Index n_classes, Index first, Index n, float* to) const {
    Integers small[NV] = {};
    for (Index v = 0; v < n_classes; ++v) {
      const float *weights = weights_of(panel) + first, *exponentials = exponentials_of(panel) + v * n_lanes_ + first;
      Vector p[NV] = {};
      for (Index k = 0; k < a_.n_experts; ++k, weights += tokens_.size(), exponentials += tokens_.size()) {
#pragma GCC unroll 4
        for (int j = 0; j < NV; ++j) p[j] += load(weights + j * kLanes) * load(exponentials + j * kLanes);
      }
      for (int j = 0; j < NV; ++j) {
        small[j] |= ~(p[j] >= kSmallest);
        store(to + v * kBlock + j * kLanes, log_positive(p[j]));
      }
    }
    bool any = false;
    for (Index t = 0; t < n; ++t) any |= small[t / kLanes][t % kLanes] != 0;
    return !any;
  }

  // Replaces a panel's exponentials by its logits. Rarely needed, so the logits are recomputed.
  void restore_logits(Index panel) const {
    [[maybe_unused]] const ProductRegisters registers;
    const auto e = operand(panel);
    float *tile = tile_of_thread(), unused[kBlock];
    for (Index block = 0; block < ceil_div(n_lanes_, kBlock); ++block) {
      const Index n = smaller(kBlock, n_lanes_ - block * kBlock);
      compute_logits<kTileVectors>(e, block, tile, unused);
      for (Index v = 0; v < e.n_classes; ++v) {
        memcpy(exponentials_of(panel) + v * n_lanes_ + block * kBlock, tile + v * kBlock, sizeof(float) * n);
      }
    }
  }

  // log p = LSE_k(log π + l − L), from logits that have replaced their exponentials.
  template <int NV>
  void log_prob_in_logarithms(Index panel, Index n_classes, Index first, float* to) const {
    for (Index v = 0; v < n_classes; ++v) {
      for (int j = 0; j < NV; ++j) {
        const float* logits = exponentials_of(panel) + v * n_lanes_;
        const auto joint = [&](Index k) {
          const Index lane = k * tokens_.size() + first + j * kLanes;
          return (load(logits + lane) - load(maximum_ + lane)) + load(log_weight_ + lane);
        };
        Vector largest = broadcast(kLowest), sum{};
        for (Index k = 0; k < a_.n_experts; ++k) largest = maximum(joint(k), largest);
        for (Index k = 0; k < a_.n_experts; ++k) sum += exp_nonpositive(joint(k) - largest);
        const Vector log_p = sum > 0 ? log_positive(sum) + largest : sum == 0 ? broadcast(-INFINITY) : sum;
        store(to + v * kBlock + j * kLanes, log_p);
      }
    }
  }

  const Head& head_;
  const OneSweepArguments& a_;
  const Index n_panels_, n_groups_, steps_, max_lanes_;
  Range tokens_{0, 0};  // tokens of the current block
  Index n_lanes_ = 0;   // lanes of the current block
  const Buffer<Op> packed_;
  // a vector of the last tokens reads beyond the last lane: kBlock more floats make that safe
  const Buffer<float> exponentials_, weights_, totals_, maximum_, log_total_, log_weight_;
  const Index scratch_bytes_;
  const Buffer<char> scratch_;
  const Buffer<float> tiles_;
};

}  // namespace

namespace fused_mos::FUSED_MOS_NAMESPACE {

void mixture_in_one_sweep(const Head& head, const OneSweepArguments& a) {
  if (a.n_tokens == 0) return;
  with_types(head, [&](auto types) { OneSweep<decltype(types)>(head, a).run(); });
}

}  // namespace fused_mos::FUSED_MOS_NAMESPACE
