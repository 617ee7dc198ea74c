// Mixture of one panel of classes for one block of tokens: its log-probabilities, and its posteriors
// q = π exp(l − L) / p.
//
// The lanes of a block are tokens of one expert, so that the sum over experts adds vectors.
#pragma once

#include "exponentials.h"

namespace {

using fused_mos::MixtureArguments;

// Terms by lane that turn logits into probabilities: log π, π, and both terms of L. Empty lanes have π = 1 and L = 0.
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

// Tokens whose blocks are in the workspace at once. Block b·K + k holds expert k of the tokens of token block b.
struct TokenChunk {
  TokenChunk(const MixtureArguments& a, Range tokens)
      : tokens(tokens),
        n_experts(a.n_experts),
        n_token_blocks(ceil_div(tokens.size(), kBlock)),
        source(n_token_blocks * n_experts * kBlock),
        filled(n_token_blocks * n_experts),
        blocks(group_tokens()),
        lanes(a, blocks) {}

  RowBlocks group_tokens() const {
    for (Index block = 0; block < n_token_blocks * n_experts; ++block) {
      const Index b = block / n_experts, k = block % n_experts;
      filled[block] = smaller(kBlock, tokens.size() - b * kBlock);
      for (Index lane = 0; lane < kBlock; ++lane) {
        source[block * kBlock + lane] = lane < filled[block] ? (first_token(b) + lane) * n_experts + k : -1;
      }
    }
    return {n_token_blocks * n_experts, source, filled};
  }

  Index first_token(Index b) const { return tokens.begin + b * kBlock; }
  Index tokens_in(Index b) const { return blocks.filled[b * n_experts]; }
  Index vectors(Index b) const { return blocks.vectors(b * n_experts); }
  Index lane(Index b, Index expert) const { return (b * n_experts + expert) * kBlock; }
  Index n_lanes() const { return blocks.n_blocks * kBlock; }

  const Range tokens;
  const Index n_experts, n_token_blocks;
  const Buffer<Index> source, filled;
  const RowBlocks blocks;
  const LaneStatistics lanes;
};

template <class T>
class MixtureTile {
  using Op = typename T::Op;

 public:
  // `packed` has all blocks of the chunk. A panel of E that cannot be read in place is copied to `scratch`.
  MixtureTile(const Head& head, const TokenChunk& chunk, const Op* packed, Index panel, Index token_block,
              void* scratch)
      : weight_(logits_operand<T>(head, panel, scratch)),
        packed_stride_(kBlock * steps_of<Op>(head.n_features)),
        packed_(packed + token_block * chunk.n_experts * packed_stride_),
        lanes_(chunk.lanes),
        first_lane_(chunk.lane(token_block, 0)),
        n_experts_(chunk.n_experts) {}

  Index n_classes() const { return weight_.n_classes; }

  // Computes log p in `mixture`. A `stride` of a tile keeps exp(l − L) of all experts in `softmax`; a stride of 0 keeps
  // none of them, and `scratch`, a tile, may then be the same memory.
  template <int NV>
  ALWAYS_INLINE void log_prob(float* mixture, float* softmax, Index stride, float* scratch) const {
    for (Index k = 0; k < n_experts_; ++k) add_expert<NV>(k, softmax + k * stride, mixture, nullptr);
    if (underflows<NV>(mixture)) return log_prob_in_logarithms<NV>(mixture, scratch);
    for (Index v = 0; v < n_classes(); ++v) {
      for (int j = 0; j < NV; ++j) {
        float* at = mixture + v * kBlock + j * kLanes;
        store(at, log_positive(load(at)));
      }
    }
  }

  // Computes for each expert k: exp(l − L) in tile k of `softmax`, q in tile k of `posterior` and, unless it is null,
  // the slope of the soft cap in tile k of `slope`.
  template <int NV>
  ALWAYS_INLINE void posteriors(float* softmax, float* posterior, float* mixture, float* slope) const {
    for (Index k = 0; k < n_experts_; ++k) {
      add_expert<NV>(k, softmax + k * kTile, mixture, slope ? slope + k * kTile : nullptr);
    }
    if (underflows<NV>(mixture)) {
      posteriors_in_logarithms<NV>(posterior);
    } else {
      divide_by_mixture<NV>(softmax, mixture, posterior);
    }
  }

 private:
  // Computes exp(l − L) of one expert in `softmax`, and adds π exp(l − L) to `mixture`, which expert 0 overwrites.
  template <int NV>
  ALWAYS_INLINE void add_expert(Index expert, float* softmax, float* mixture, float* slope) const {
    Vector unused[NV], shift[NV], log_total[NV], prior[NV];
    fill(unused, 0);
    load_lanes(lanes_.maximum + first_lane_ + expert * kBlock, shift);
    load_lanes(lanes_.log_total + first_lane_ + expert * kBlock, log_total);
    load_lanes(lanes_.prior + first_lane_ + expert * kBlock, prior);
    logits_tile(weight_, packed_ + expert * packed_stride_, softmax, unused);
    for (Index v = 0; slope && v < n_classes(); ++v) {
      for (int j = 0; j < NV; ++j) {
        const Index at = v * kBlock + j * kLanes;
        store(slope + at, weight_.transform.slope(load(softmax + at)));
      }
    }
    for (Index v = 0; v < n_classes(); ++v) {
#pragma GCC unroll 4
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
    for (Index v = 0; v < n_classes(); ++v) {
      for (int j = 0; j < NV; ++j) least = minimum(load(mixture + v * kBlock + j * kLanes), least);
    }
    bool any = false;
    for (int i = 0; i < kLanes; ++i) any |= !(least[i] >= kSmallest);
    return any;
  }

  // Computes l − maximum of one expert's tile.
  template <int NV>
  ALWAYS_INLINE void shifted_logits(Index expert, float* to) const {
    Vector unused[NV], shift[NV];
    fill(unused, 0);
    load_lanes(lanes_.maximum + first_lane_ + expert * kBlock, shift);
    logits_tile(weight_, packed_ + expert * packed_stride_, to, unused);
    for (Index v = 0; v < n_classes(); ++v) {
      for (int j = 0; j < NV; ++j) store(to + v * kBlock + j * kLanes, load(to + v * kBlock + j * kLanes) - shift[j]);
    }
  }

  // Returns log π − log_total: added to a shifted logit, it gives log π + l − L.
  ALWAYS_INLINE Vector log_weight(Index expert, int j) const {
    const Index lane = first_lane_ + expert * kBlock + j * kLanes;
    return load(lanes_.log_prior + lane) - load(lanes_.log_total + lane);
  }

  // log p = LSE_k(log π + l − L), with a running maximum over the experts. Rarely needed, so the logits are recomputed.
  template <int NV>
  ALWAYS_INLINE void log_prob_in_logarithms(float* mixture, float* scratch) const {
    float largest[kTile];
    for (Index i = 0; i < kTile; ++i) largest[i] = kLowest;
    for (Index k = 0; k < n_experts_; ++k) {
      shifted_logits<NV>(k, scratch);
      for (Index v = 0; v < n_classes(); ++v) {
        for (int j = 0; j < NV; ++j) {
          const Index at = v * kBlock + j * kLanes;
          const Vector joint = load(scratch + at) + log_weight(k, j);
          const Vector before = load(largest + at), now = maximum(joint, before);
          store(largest + at, now);
          store(mixture + at,
                (k ? load(mixture + at) : Vector{}) * exp_nonpositive(before - now) + exp_nonpositive(joint - now));
        }
      }
    }
    for (Index v = 0; v < n_classes(); ++v) {
      for (int j = 0; j < NV; ++j) {
        const Index at = v * kBlock + j * kLanes;
        const Vector sum = load(mixture + at);
        store(mixture + at, sum > 0 ? log_positive(sum) + load(largest + at) : sum == 0 ? broadcast(-INFINITY) : sum);
      }
    }
  }

  // q = π exp(l − L) / p. Divides instead of multiplying by 1/p: q must be exactly 1 if one expert has all the mass.
  template <int NV>
  ALWAYS_INLINE void divide_by_mixture(const float* softmax, const float* mixture, float* posterior) const {
    for (Index v = 0; v < n_classes(); ++v) {
      for (int j = 0; j < NV; ++j) {
        const Index at = v * kBlock + j * kLanes;
        const float* prior = lanes_.prior + first_lane_ + j * kLanes;
        const Vector p = load(mixture + at);
        for (Index k = 0; k < n_experts_; ++k) {
          store(posterior + k * kTile + at, load(prior + k * kBlock) * load(softmax + k * kTile + at) / p);
        }
      }
    }
  }

  // q = softmax_k(log π + l − L), from recomputed logits.
  template <int NV>
  ALWAYS_INLINE void posteriors_in_logarithms(float* posterior) const {
    for (Index k = 0; k < n_experts_; ++k) shifted_logits<NV>(k, posterior + k * kTile);
    for (Index v = 0; v < n_classes(); ++v) {
      for (int j = 0; j < NV; ++j) {
        float* at = posterior + v * kBlock + j * kLanes;
        Vector largest = broadcast(kLowest), sum{};
        for (Index k = 0; k < n_experts_; ++k) {
          const Vector joint = load(at + k * kTile) + log_weight(k, j);
          store(at + k * kTile, joint);
          largest = maximum(joint, largest);
        }
        for (Index k = 0; k < n_experts_; ++k) {
          const Vector q = exp_nonpositive(load(at + k * kTile) - largest);
          store(at + k * kTile, q);
          sum += q;
        }
        // the largest term is 1, so the sum is at least 1, except for a masked class, whose terms are all 0
        const Vector inverse = 1.0f / maximum(broadcast(1), sum);
        for (Index k = 0; k < n_experts_; ++k) store(at + k * kTile, load(at + k * kTile) * inverse);
      }
    }
  }

  [[maybe_unused]] const ProductRegisters registers_;
  LogitsOperand<Op> weight_;
  Index packed_stride_;
  const Op* packed_;  // rows of the first expert
  const LaneStatistics& lanes_;
  Index first_lane_;  // lane of the first expert
  Index n_experts_;
};

}  // namespace
