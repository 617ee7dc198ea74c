// A gradient G[n,v] of log p, read by lane: as it lies in memory, or made of the few numbers that it is a formula of.
#pragma once

#include "mixture_tile.h"

namespace {

using fused_mos::LogProbGradient;

// The gradients of the tokens of one block.
class GradientLanes {
 public:
  GradientLanes(const LogProbGradient& g, const Head& head, const TokenChunk& chunk, Index token_block)
      : g_(g), n_classes_(head.n_classes), first_(chunk.first_token(token_block)), n_(chunk.tokens_in(token_block)) {
    if (g.dense) return;
    for (Index t = 0; t < n_; ++t) {
      if (g.of_class) token_[t] = g.token[first_ + t];
      if (g.entropy) entropy_[t] = g.entropy[first_ + t];
    }
  }

  // Returns G of class v in `to`; `mixture` has p of that class.
  template <int NV>
  ALWAYS_INLINE void load_class(Index v, const float* mixture, Vector (&to)[NV]) const {
    float lanes[kBlock] = {};
    if (g_.dense) {
      for (Index t = 0; t < n_; ++t) lanes[t] = g_.dense[(first_ + t) * n_classes_ + v];
    } else if (g_.at_target) {
      for (Index t = 0; t < n_; ++t) lanes[t] = g_.target[first_ + t] == v ? g_.at_target[first_ + t] : 0.0f;
    }
    for (int j = 0; j < NV; ++j) to[j] = load(lanes + j * kLanes);
    if (g_.dense) return;
    const Vector of_class = broadcast(g_.of_class ? g_.of_class[v] : 0.0f);
    for (int j = 0; j < NV; ++j) {
      to[j] += load(token_ + j * kLanes) * of_class;
      if (!g_.entropy) continue;
      const Vector p = load(mixture + j * kLanes);
      const Vector log_p = log_positive(p);  // finite where p underflows, and nothing times p
      to[j] -= load(entropy_ + j * kLanes) * p * (log_p + 1.0f);
    }
  }

 private:
  const LogProbGradient& g_;
  Index n_classes_, first_, n_;
  float token_[kBlock] = {}, entropy_[kBlock] = {};
};

}  // namespace
