// Forward pass: log-sum-exp and target logit of every row. Sampling: a search in the partial sums.
#include "exponentials.h"
#include "family.h"

namespace {

using fused_mos::StatisticsArguments;

// Groups of equally many panels, fewer in the last, so that a group's index gives its classes.
struct PanelGroups {
  explicit PanelGroups(const Head& head)
      : n_panels(panels_of(head)),
        size(ceil_div(n_panels, smaller(kGroups, n_panels))),
        n_groups(ceil_div(n_panels, size)) {}

  Range panels(Index group) const { return chunk_at(n_panels, group * size, size); }

  Index n_panels, size, n_groups;
};

// Computes the logits of one panel and block in `tile`, and updates the block's statistics (online softmax).
template <class Op>
void add_panel(const LogitsOperand<Op>& e, const Op* packed, Index vectors_of_block, float factor,
               const PartialStatistics& statistics, float* tile) {
  with_vectors(vectors_of_block, [&](auto vectors) {
    constexpr int NV = decltype(vectors)::value;
    Vector before[NV], largest[NV], old_total[NV], total[NV];
    load_lanes(statistics.maxima, before);
    load_lanes(statistics.maxima, largest);
    load_lanes(statistics.totals, old_total);
    logits_tile(e, packed, tile, largest);
    if (statistics.moments) {
      Vector moment[NV];
      load_lanes(statistics.moments, moment);
      for (int j = 0; j < NV; ++j) {
        const Vector difference = before[j] - largest[j];
        moment[j] = shifted_moment(moment[j], old_total[j], difference, exp_nonpositive(difference));
      }
      exponentiate(tile, e.n_classes, largest, factor, total, [&](Index, int j, Vector logit, Vector exponential) {
        moment[j] += exponential > 0.0f ? exponential * (logit - largest[j]) : Vector{};
      });
      store_lanes(statistics.moments, moment);
    } else {
      exponentiate(tile, e.n_classes, largest, factor, total, [](Index, int, Vector, Vector) {});
    }
    for (int j = 0; j < NV; ++j) total[j] += old_total[j] * exp_nonpositive((before[j] - largest[j]) * factor);
    store_lanes(statistics.maxima, largest);
    store_lanes(statistics.totals, total);
  });
}

// Computes the statistics of each group of panels. A task is a group and a set of blocks.
template <class T>
void partial_statistics(const Head& head, const typename T::In* rows, const RowBlocks& blocks, const Targets& targets,
                        float factor, const PartialStatistics& statistics) {
  using Op = typename T::Op;
  const PanelGroups groups(head);
  const Index steps = steps_of<Op>(head.n_features), n_lanes = blocks.n_blocks * kBlock;
  const Index sets = ceil_div(blocks.n_blocks, kBlocksOfTask);
  Buffer<Op> packed(n_lanes * steps);
  const Index scratch_bytes = round_up(logits_scratch_bytes<T>(head), 64);
  Buffer<char> scratch(scratch_bytes * head.n_threads);
  Buffer<float> tiles(kTile * head.n_threads);
#pragma omp parallel num_threads(head.n_threads)
  {
    const int thread = omp_get_thread_num();
    float* tile = tiles + kTile * thread;
#pragma omp for schedule(dynamic)
    for (Index b = 0; b < blocks.n_blocks; ++b) pack_block<T>(head, rows, blocks, b, packed + b * kBlock * steps);
#pragma omp for schedule(dynamic)
    for (Index task = 0; task < sets * groups.n_groups; ++task) {
      const Index group = task % groups.n_groups;
      const Range set = chunk_at(blocks.n_blocks, task / groups.n_groups * kBlocksOfTask, kBlocksOfTask);
      const PartialStatistics of_group = statistics.from_lane(group * n_lanes);
      for (Index lane = set.begin * kBlock; lane < set.end * kBlock; ++lane) {
        of_group.maxima[lane] = kLowest;
        of_group.totals[lane] = 0;
        if (of_group.moments) of_group.moments[lane] = 0;
      }
      [[maybe_unused]] const ProductRegisters registers;
      const Range panels = groups.panels(group);
      for (Index panel = panels.begin; panel < panels.end; ++panel) {
        const auto e = logits_operand<T>(head, panel, scratch + scratch_bytes * thread);
        for (Index b = set.begin; b < set.end; ++b) {
          add_panel(e, packed + b * kBlock * steps, blocks.vectors(b), factor, of_group.from_lane(b * kBlock), tile);
          if (targets.target) pick_targets(tile, blocks, b, panel, e.n_classes, targets);
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
  const Index n_groups = PanelGroups(head).n_groups, chunk = rows_of_chunk(head);
  for (Index i = 0; i < a.n_rows; ++i) a.target_logit[i] = NAN;
  for (Index first = 0; first < a.n_rows; first += chunk) {
    const Index n = smaller(chunk, a.n_rows - first);
    const ConsecutiveRows rows(first, n);
    const RowBlocks blocks = rows.blocks();
    const Index n_lanes = blocks.n_blocks * kBlock;
    Buffer<float> maxima(n_groups * n_lanes), totals(n_groups * n_lanes), moments(a.entropy ? n_groups * n_lanes : 0);
    const PartialStatistics statistics{n_lanes, maxima, totals, moments};
    partial_statistics<T>(head, (const typename T::In*)a.rows, blocks, {a.target, a.target_logit}, 1.0f, statistics);
#pragma omp parallel for num_threads(head.n_threads)
    for (Index b = 0; b < blocks.n_blocks; ++b) {
      const Index row = first + b * kBlock;
      merge_statistics(statistics.from_lane(b * kBlock), n_groups, blocks.filled[b], a.maximum + row, a.log_total + row,
                       a.entropy ? a.entropy + row : nullptr);
    }
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

// Returns the index where the cumulative sum of the masses first exceeds `rest`, and subtracts the masses before it
// from `rest`. Rounding never selects an index of mass 0.
template <class F>
ALWAYS_INLINE Index find_mass(Index n, double& rest, F mass_of) {
  Index found = 0;
  for (Index i = 0; i < n; ++i) {
    const double mass = mass_of(i);
    if (mass > 0) found = i;
    if (rest < mass) break;
    rest -= mass;
  }
  return found;
}

// Inverts the cumulative distribution of one row at `uniform`. The row's partial sums select the group of panels; the
// group's logits, recomputed for this row alone, select the class. Returns −1 if the row has no class to draw.
template <class T>
Index search(const Head& head, const PanelGroups& groups, const typename T::In* row, const PartialStatistics& parts,
             float factor, double uniform, float* logits) {
  const auto maximum_of = [&](Index group) { return parts.maxima[group * parts.n_lanes]; };
  float largest = kLowest;
  for (Index g = 0; g < groups.n_groups; ++g) largest = maximum_of(g) > largest ? maximum_of(g) : largest;
  double mass[kGroups], total = 0;
  for (Index g = 0; g < groups.n_groups; ++g) {
    mass[g] = parts.totals[g * parts.n_lanes] * exp((double(maximum_of(g)) - largest) * factor);
    total += mass[g];
  }
  if (!(total > 0 && total < INFINITY)) return -1;
  double rest = uniform * total;
  const Index group = find_mass(groups.n_groups, rest, [&](Index g) { return mass[g]; });

  const Range classes = chunk_at(head.n_classes, group * groups.size * kPanel, groups.size * kPanel);
  // recomputed logits round differently from those of the partial statistics, and a low temperature magnifies the
  // difference: so they get a maximum of their own, and only the share of the group's mass carries over
  float shift = kLowest;
  for (Index v = 0; v < classes.size(); ++v) logits[v] = logit<T>(head, row, classes.begin + v);
  const LogitTransform transform(head.transform);
  for (Index v = 0; v < classes.size() && !transform.is_identity(); v += kLanes) {
    store(logits + v, transform.apply(load(logits + v)));
  }
  for (Index v = 0; v < classes.size(); ++v) shift = logits[v] > shift ? logits[v] : shift;
  const auto mass_of = [&](Index v) { return exp((double(logits[v]) - shift) * factor); };
  double group_total = 0;
  for (Index v = 0; v < classes.size(); ++v) group_total += mass_of(v);
  rest *= group_total / mass[group];
  return classes.begin + find_mass(classes.size(), rest, mass_of);
}

// Divides differences of logits by the temperature, not the logits: a low temperature would make those infinite.
template <class T>
void sample_of(const Head& given, const fused_mos::SampleArguments& a) {
  Head head = given;
  head.transform.inverse_temperature = 1;
  const float factor = given.transform.inverse_temperature;
  const PanelGroups groups(head);
  const Index max_classes = groups.size * kPanel, chunk = rows_of_chunk(head);
  const auto* rows = (const typename T::In*)a.rows;
  for (Index first = 0; first < a.n_rows; first += chunk) {
    const Index n = smaller(chunk, a.n_rows - first);
    const ConsecutiveRows lanes(first, n);
    const Index n_lanes = lanes.blocks().n_blocks * kBlock;
    Buffer<float> maxima(groups.n_groups * n_lanes), totals(groups.n_groups * n_lanes);
    Buffer<float> logits(max_classes * head.n_threads);
    const PartialStatistics statistics{n_lanes, maxima, totals, nullptr};
    partial_statistics<T>(head, rows, lanes.blocks(), {nullptr, nullptr}, factor, statistics);
#pragma omp parallel for num_threads(head.n_threads) schedule(dynamic)
    for (Index i = 0; i < n; ++i) {
      a.sample[first + i] = search<T>(head, groups, rows + (first + i) * head.n_features, statistics.from_lane(i),
                                      factor, a.uniform[first + i], logits + max_classes * omp_get_thread_num());
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
