// Consumers of tiles of log p: the rows of the result, and the search for the most probable class.
#pragma once

#include "operands.h"

namespace {

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

// Most probable class of each token of a chunk, by group of panels. The first one wins a tie.
class BestClasses {
 public:
  BestClasses(Index n_groups, Index n_tokens)
      : n_groups_(n_groups), n_tokens_(n_tokens), log_prob_(n_groups * n_tokens), class_(n_groups * n_tokens) {
    for (Index i = 0; i < n_groups * n_tokens; ++i) log_prob_[i] = -INFINITY, class_[i] = 0;
  }

  // Updates with a tile of log p, which has `classes` of the tokens [first, first + n) of the chunk.
  void update(const float* tile, Range classes, Index group, Index first, Index n) const {
    for (Index t = 0; t < n; ++t) {
      const Index at = group * n_tokens_ + first + t;
      for (Index v = 0; v < classes.size(); ++v) {
        const float log_p = tile[v * kBlock + t];
        if (log_p > log_prob_[at]) log_prob_[at] = log_p, class_[at] = classes.begin + v;
      }
    }
  }

  void write(int64_t* to) const {
    for (Index t = 0; t < n_tokens_; ++t) {
      Index winner = t;
      for (Index at = t; at < n_groups_ * n_tokens_; at += n_tokens_) {
        if (log_prob_[at] > log_prob_[winner]) winner = at;
      }
      to[t] = class_[winner];
    }
  }

 private:
  Index n_groups_, n_tokens_;
  Buffer<float> log_prob_;
  Buffer<int64_t> class_;
};

}  // namespace
