// Exponentials of a tile of logits, their sums, and the merging of partial sums into a log-sum-exp.
#pragma once

#include "operands.h"

namespace {

// Initial maximum. It is finite, so that a logit of −inf gives exp(−inf) = 0 and never inf − inf.
constexpr float kLowest = -3.40282347e+38f;

constexpr float kSmallest = 0x1p-100f;  // a mixture below this may have lost terms to underflow
#ifdef __AMX_BF16__
constexpr Index kBlocksOfTask = 48;  // blocks of z that share one read of a panel of E
constexpr Index kPanelsOfTask = 4;   // panels of E that share one read of a block of z
#else
constexpr Index kBlocksOfTask = 16;
constexpr Index kPanelsOfTask = 1;
#endif

// Returns how many of n panels form a task: few enough to give each thread several tasks.
constexpr Index panels_of_task(Index n, Index n_threads) {
  return larger(smaller(n / (4 * n_threads), kPanelsOfTask), 1);
}

template <int NV>
ALWAYS_INLINE void fill(Vector (&v)[NV], float value) {
  for (int j = 0; j < NV; ++j) v[j] = broadcast(value);
}

template <int NV>
ALWAYS_INLINE void load_lanes(const float* from, Vector (&v)[NV]) {
  for (int j = 0; j < NV; ++j) v[j] = load(from + j * kLanes);
}

template <int NV>
ALWAYS_INLINE void store_lanes(float* to, const Vector (&v)[NV]) {
  for (int j = 0; j < NV; ++j) store(to + j * kLanes, v[j]);
}

// Sums e = exp(factor·(tile − largest)) over n classes into `total`, and passes each e to keep(index in the tile, j,
// logit, e). The factor is an inverse temperature.
template <int NV, class Keep>
ALWAYS_INLINE void exponentiate(const float* tile, Index n, const Vector (&largest)[NV], float factor,
                                Vector (&total)[NV], Keep keep) {
  fill(total, 0);
  for (Index v = 0; v < n; ++v) {
#pragma GCC unroll 4
    for (int j = 0; j < NV; ++j) {
      const Index at = v * kBlock + j * kLanes;
      const Vector logit = load(tile + at), e = exp_nonpositive((logit - largest[j]) * factor);
      total[j] += e;
      keep(at, j, logit, e);
    }
  }
}

// Statistics of each lane's logits over each part of the vocabulary, (parts, n_lanes).
struct PartialStatistics {
  Index n_lanes;
  float* maxima;
  float* totals;   // Σ exp(l − maximum), or null if only maxima are wanted
  float* moments;  // Σ exp(l − maximum) (l − maximum), or null if no entropy is wanted

  PartialStatistics from_lane(Index lane) const {
    return {n_lanes, maxima + lane, totals + lane, moments ? moments + lane : nullptr};
  }
  PartialStatistics from_part(Index part) const { return from_lane(part * n_lanes); }
};

// Returns Σ e^y y for y = x + difference, given moment = Σ e^x x, total = Σ e^x and factor = e^difference. A factor of
// 0 gives 0, even if logits are −inf.
ALWAYS_INLINE Vector shifted_moment(Vector moment, Vector total, Vector difference, Vector factor) {
  return factor > 0.0f ? factor * (moment + total * difference) : Vector{};
}

// Merges the statistics of `n_parts` parts, for `n` lanes, into the maximum and log_total of the whole vocabulary and,
// unless it is null, the entropy.
inline void merge_statistics(const PartialStatistics& parts, Index n_parts, Index n, float* maximum_out,
                             float* log_total_out, float* entropy_out) {
  constexpr Index kTerms = 64;  // terms of an inner sum, so that rounding does not grow with the number of parts
  for (Index first = 0; first < n; first += kLanes) {
    Vector largest = broadcast(kLowest);
    for (Index p = 0; p < n_parts; ++p) largest = maximum(load(parts.maxima + p * parts.n_lanes + first), largest);
    Vector total{}, moment{};
    for (Index from = 0; from < n_parts; from += kTerms) {
      Vector terms{};
      for (Index p = from; p < smaller(from + kTerms, n_parts); ++p) {
        const Index at = p * parts.n_lanes + first;
        terms += load(parts.totals + at) * exp_nonpositive(load(parts.maxima + at) - largest);
      }
      total += terms;
    }
    for (Index p = 0; entropy_out && p < n_parts; ++p) {
      const Index at = p * parts.n_lanes + first;
      const Vector difference = load(parts.maxima + at) - largest;
      moment +=
          shifted_moment(load(parts.moments + at), load(parts.totals + at), difference, exp_nonpositive(difference));
    }
    for (Index lane = 0; lane < smaller(kLanes, n - first); ++lane) {
      maximum_out[first + lane] = largest[lane];
      const double log_total = log(double(total[lane]));
      log_total_out[first + lane] = float(log_total);
      if (entropy_out) entropy_out[first + lane] = float(log_total - double(moment[lane]) / total[lane]);
    }
  }
}

// Targets of the rows and the array that receives their logits, (R,) each; null if no logits are wanted.
struct Targets {
  const int64_t* target;
  float* logit;
};

// Returns a target's index among the classes from `first` on. Targets are arbitrary, so a signed difference could
// overflow.
inline Index place_of(int64_t target, Index first) { return Index(uint64_t(target) - uint64_t(first)); }

// Copies the logits of this panel's targets from its tile of n classes.
inline void pick_targets(const float* tile, const RowBlocks& blocks, Index block, Index panel, Index n,
                         const Targets& targets) {
  for (Index lane = 0; lane < blocks.filled[block]; ++lane) {
    const Index row = blocks.source[block * kBlock + lane], v = place_of(targets.target[row], panel * kPanel);
    if (v >= 0 && v < n) targets.logit[row] = tile[v * kBlock + lane];
  }
}

// Owns the blocks of consecutive rows.
class ConsecutiveRows {
 public:
  ConsecutiveRows(Index first, Index n_rows)
      : n_blocks_(ceil_div(n_rows, kBlock)), source_(n_blocks_ * kBlock), filled_(n_blocks_) {
    for (Index lane = 0; lane < n_blocks_ * kBlock; ++lane) source_[lane] = lane < n_rows ? first + lane : -1;
    for (Index b = 0; b < n_blocks_; ++b) filled_[b] = smaller(kBlock, n_rows - b * kBlock);
  }
  RowBlocks blocks() const { return {n_blocks_, source_, filled_}; }

 private:
  Index n_blocks_;
  Buffer<Index> source_, filled_;
};

// Owns the rows of a block of T tokens, expert by expert: lane k·T + t holds expert k of token t. A sum over experts
// thus adds vectors of tokens, and only the last lanes are empty.
class RowsByExpert {
 public:
  RowsByExpert(Range tokens, Index n_experts)
      : n_lanes(round_up(tokens.size() * n_experts, kLanes)),
        n_blocks_(ceil_div(n_lanes, kBlock)),
        source_(n_blocks_ * kBlock),
        filled_(n_blocks_) {
    const Index n = tokens.size(), n_rows = n * n_experts;
    for (Index k = 0; k < n_experts; ++k) {
      for (Index t = 0; t < n; ++t) source_[k * n + t] = (tokens.begin + t) * n_experts + k;
    }
    for (Index lane = n_rows; lane < n_blocks_ * kBlock; ++lane) source_[lane] = -1;
    for (Index b = 0; b < n_blocks_; ++b) filled_[b] = smaller(kBlock, n_rows - b * kBlock);
  }
  RowBlocks blocks() const { return {n_blocks_, source_, filled_}; }

  const Index n_lanes;  // rounded up to whole vectors

 private:
  Index n_blocks_;
  Buffer<Index> source_, filled_;
};

}  // namespace
