// The forward pass, log-sum-exp and target logit of every row, and sampling, which is a search in the partial sums.
#include "exponentials.h"
#include "family.h"

namespace {

using fused_mos::StatisticsArguments;

constexpr Index kGroups = 16;        // of panels; a task is a group and a set of blocks, however many threads there are
constexpr Index kBlocksOfTask = 16;  // a panel of E is read from memory once for so many

inline Index panels_of_group(const Head& head) { return ceil_div(panels_of(head), smaller(kGroups, panels_of(head))); }

// Maxima and sums of (group, lane), each group of panels in order.
template <class T>
void partial_statistics(const Head& head, const typename T::In* rows, const RowBlocks& blocks, const int64_t* target,
                        float* target_logit, float factor, float* maxima, float* totals) {
  using Op = typename T::Op;
  const Index steps = steps_of<Op>(head.n_features), n_lanes = blocks.n_blocks * kBlock;
  const Index panels = panels_of(head), of_group = panels_of_group(head), groups = ceil_div(panels, of_group);
  const Index sets = ceil_div(blocks.n_blocks, kBlocksOfTask);
  Buffer<Op> packed(n_lanes * steps);
  const Index scratch_bytes = round_up(logits_scratch_bytes<T>(head), 64);
  Buffer<char> scratch(scratch_bytes * head.n_threads);
  Buffer<float> tiles(kPanel * kBlock * head.n_threads);
#pragma omp parallel num_threads(head.n_threads)
  {
    const int thread = omp_get_thread_num();
    float* tile = tiles + kPanel * kBlock * thread;
#pragma omp for schedule(dynamic)
    for (Index b = 0; b < blocks.n_blocks; ++b) pack_block<T>(head, rows, blocks, b, packed + b * kBlock * steps);
#pragma omp for schedule(dynamic)
    for (Index task = 0; task < sets * groups; ++task) {
      const Index set = task / groups, group = task % groups;
      const Index first = set * kBlocksOfTask, last = smaller(first + kBlocksOfTask, blocks.n_blocks);
      for (Index lane = group * n_lanes + first * kBlock; lane < group * n_lanes + last * kBlock; ++lane) {
        maxima[lane] = kLowest;
        totals[lane] = 0;
      }
      for (Index panel = group * of_group; panel < smaller((group + 1) * of_group, panels); ++panel) {
        const auto e = logits_operand<T>(head, panel, scratch + scratch_bytes * thread);
        for (Index b = first; b < last; ++b) {
          with_vectors(blocks.vectors(b), [&](auto vectors) {
            constexpr int NV = decltype(vectors)::value;
            float* maxima_of_block = maxima + group * n_lanes + b * kBlock;
            float* totals_of_block = totals + group * n_lanes + b * kBlock;
            Vector before[NV], largest[NV], old_total[NV], total[NV];
            load_lanes(maxima_of_block, before);
            load_lanes(maxima_of_block, largest);
            load_lanes(totals_of_block, old_total);
            logits_tile(e, packed + b * kBlock * steps, tile, largest);
            exponentiate(tile, e.n_classes, largest, factor, (float*)nullptr, total);
            for (int j = 0; j < NV; ++j) total[j] += old_total[j] * exp_nonpositive((before[j] - largest[j]) * factor);
            store_lanes(maxima_of_block, largest);
            store_lanes(totals_of_block, total);
          });
          if (target) pick_targets(tile, blocks, b, target, panel, e.n_classes, target_logit);
        }
      }
    }
  }
}

inline Index rows_of_chunk(const Head& head) {
  return larger(head.workspace_bytes / 2 / (Index(sizeof(float)) * (head.n_features + 1)) / kBlock, 1) * kBlock;
}

template <class T>
void row_statistics_of(const Head& head, const StatisticsArguments& a) {
  const Index groups = ceil_div(panels_of(head), panels_of_group(head)), chunk = rows_of_chunk(head);
  for (Index i = 0; i < a.n_rows; ++i) a.target_logit[i] = NAN;
  for (Index first = 0; first < a.n_rows; first += chunk) {
    const Index n = smaller(chunk, a.n_rows - first);
    const ConsecutiveRows rows(first, n);
    const Index n_lanes = rows.blocks().n_blocks * kBlock;
    Buffer<float> maxima(groups * n_lanes), totals(groups * n_lanes);
    partial_statistics<T>(head, (const typename T::In*)a.rows, rows.blocks(), a.target, a.target_logit, 1.0f, maxima,
                          totals);
    merge_statistics(maxima, totals, groups, n_lanes, n, a.maximum + first, a.log_total + first);
  }
}

template <class T>
float logit(const Head& head, const typename T::In* row, Index v) {
  const auto* weight = (const typename T::In*)head.weight + v * head.n_features;
  Vector sums{};
  Index d = 0;
  for (; d + kLanes <= head.n_features; d += kLanes) sums += load(row + d) * load(weight + d);
  float total = sum(sums) + (head.bias ? head.bias[v] : 0.0f);
  for (; d < head.n_features; ++d) total += widen(row[d]) * widen(weight[d]);
  return total;
}

// Inverts the cumulative distribution of one row at `uniform`: the group of panels from the partial sums, the class
// from the group's logits, computed once more for this row alone. Whatever rounding does, a class of probability 0 is
// never drawn.
template <class T>
Index search(const Head& head, const typename T::In* row, const float* maxima, const float* totals, Index groups,
             Index stride, float factor, double uniform, float* logits) {
  float largest = kLowest;
  for (Index g = 0; g < groups; ++g) largest = maxima[g * stride] > largest ? maxima[g * stride] : largest;
  double mass[kGroups], total = 0;
  Index group = 0;
  for (Index g = 0; g < groups; ++g) {
    mass[g] = totals[g * stride] * exp((double(maxima[g * stride]) - largest) * factor);
    total += mass[g];
  }
  double rest = uniform * total;
  for (Index g = 0; g < groups; ++g) {
    if (mass[g] > 0) group = g;
    if (rest < mass[g]) break;
    rest -= mass[g];
  }
  const Index start = group * panels_of_group(head) * kPanel;
  const Index n = smaller(panels_of_group(head) * kPanel, head.n_classes - start);
  const double shift = maxima[group * stride];
  double group_total = 0;
  for (Index v = 0; v < n; ++v) {
    logits[v] = logit<T>(head, row, start + v);
    group_total += exp((logits[v] - shift) * factor);
  }
  // these sums are rounded otherwise than the partial ones: what carries over is the share of the group's mass
  rest *= group_total / mass[group];
  Index chosen = 0;
  for (Index v = 0; v < n; ++v) {
    const double mass_of_class = exp((logits[v] - shift) * factor);
    if (mass_of_class > 0) chosen = v;
    if (rest < mass_of_class) break;
    rest -= mass_of_class;
  }
  return start + chosen;
}

template <class T>
void sample_of(const Head& head, const fused_mos::SampleArguments& a) {
  const Index of_group = panels_of_group(head), groups = ceil_div(panels_of(head), of_group),
              chunk = rows_of_chunk(head);
  const auto* rows = (const typename T::In*)a.rows;
  for (Index first = 0; first < a.n_rows; first += chunk) {
    const Index n = smaller(chunk, a.n_rows - first);
    const ConsecutiveRows lanes(first, n);
    const Index n_lanes = lanes.blocks().n_blocks * kBlock;
    Buffer<float> maxima(groups * n_lanes), totals(groups * n_lanes), logits(of_group * kPanel * head.n_threads);
    partial_statistics<T>(head, rows, lanes.blocks(), nullptr, nullptr, a.inverse_temperature, maxima, totals);
#pragma omp parallel for num_threads(head.n_threads) schedule(dynamic)
    for (Index i = 0; i < n; ++i) {
      a.sample[first + i] =
          search<T>(head, rows + (first + i) * head.n_features, maxima + i, totals + i, groups, n_lanes,
                    a.inverse_temperature, a.uniform[first + i], logits + of_group * kPanel * omp_get_thread_num());
    }
  }
}

}  // namespace

namespace fused_mos::FUSED_MOS_NAMESPACE {

void row_statistics(const Head& head, const StatisticsArguments& a) {
  with_types(head, [&](auto types) { row_statistics_of<decltype(types)>(head, a); });
}

void sample(const Head& head, const SampleArguments& a) {
  with_types(head, [&](auto types) { sample_of<decltype(types)>(head, a); });
}

}  // namespace fused_mos::FUSED_MOS_NAMESPACE
