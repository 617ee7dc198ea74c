// Gradient G[n,v] of log p, loaded by lane: read from memory, or computed from the terms of its formula (kernels.h).
#pragma once

#include "mixture_tile.h"

namespace {

using fused_mos::LogProbGradient;

// Gradients of one block of tokens.
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

  // Loads G of class v into `to`, given p of that class in `mixture`.
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
      const Vector log_p = log_positive(p);  // finite even if p underflows, so that p·log p is 0
      to[j] -= load(entropy_ + j * kLanes) * p * (log_p + 1.0f);
    }
  }

 private:
  const LogProbGradient& g_;
  Index n_classes_, first_, n_;
  float token_[kBlock] = {}, entropy_[kBlock] = {};
};

}  // namespace
