// Exponentials of a tile of logits, their sums, and the log-sum-exp that partial sums make together.
#pragma once

#include "operands.h"

namespace {

// Finite, so that a class of logit −inf gives exp(−inf) = 0 and never inf − inf.
constexpr float kLowest = -3.40282347e+38f;

constexpr float kSmallest = 0x1p-100f;  // a mixture below this has lost terms that underflowed
#ifdef __AMX_BF16__
constexpr Index kBlocksOfTask = 48;  // a panel of E is read from memory once for so many
constexpr Index kPanelsOfTask = 4;   // and a block of z for so many
#else
constexpr Index kBlocksOfTask = 16;
constexpr Index kPanelsOfTask = 1;
#endif

// How many of n panels make a task, so that each thread has several.
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

// Returns in `total` the sums of e = exp(tile − largest) over n classes, and gives each e to keep(place in the tile, j,
// its logit, e). A factor other than 1, the inverse of a temperature, multiplies the difference.
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

// Statistics of the lanes' logits over each part of the vocabulary, (parts, n_lanes).
struct PartialStatistics {
  Index n_lanes;
  float* maxima;
  float* totals;   // Σ exp(l − maximum), or null where the maxima are enough
  float* moments;  // Σ exp(l − maximum) (l − maximum), or null where no entropy is wanted

  PartialStatistics from_lane(Index lane) const {
    return {n_lanes, maxima + lane, totals + lane, moments ? moments + lane : nullptr};
  }
  PartialStatistics from_part(Index part) const { return from_lane(part * n_lanes); }
};

// Takes Σ e^x x, of the total Σ e^x, to the sum for y = x + difference: Σ e^y y, where `factor` is e^difference. What
// has no mass has no moment, be its logit −inf.
ALWAYS_INLINE Vector shifted_moment(Vector moment, Vector total, Vector difference, Vector factor) {
  return factor > 0.0f ? factor * (moment + total * difference) : Vector{};
}

// Merges the statistics of `n_parts` parts, for `n` lanes, into the maximum and log_total of the whole and, unless it
// is null, its entropy.
inline void merge_statistics(const PartialStatistics& parts, Index n_parts, Index n, float* maximum_out,
                             float* log_total_out, float* entropy_out) {
  constexpr Index kTerms = 64;  // summed apart, so that rounding does not grow with the number of parts
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

// The rows' targets and where their logits go, (R,) each; null where there are none to find.
struct Targets {
  const int64_t* target;
  float* logit;
};

// A target's place among the classes from `first` on; without overflow, whatever the target is.
inline Index place_of(int64_t target, Index first) { return Index(uint64_t(target) - uint64_t(first)); }

// Reads the logits of this panel's targets from its tile of n classes.
inline void pick_targets(const float* tile, const RowBlocks& blocks, Index block, Index panel, Index n,
                         const Targets& targets) {
  for (Index lane = 0; lane < blocks.filled[block]; ++lane) {
    const Index row = blocks.source[block * kBlock + lane], v = place_of(targets.target[row], panel * kPanel);
    if (v >= 0 && v < n) targets.logit[row] = tile[v * kBlock + lane];
  }
}

// Blocks of consecutive rows, and their memory.
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

// The rows of a block of tokens, expert by expert: expert k of token t is in lane k·T + t, so that the sum over experts
// adds vectors of tokens, and no lane but the last ones is empty.
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

  const Index n_lanes;  // up to the last vector that is not empty

 private:
  Index n_blocks_;
  Buffer<Index> source_, filled_;
};

}  // namespace
