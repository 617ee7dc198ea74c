// Recurrent part of one LSTM layer over a whole sequence. Gates are in torch's order i, f, g, o.
//
// Each thread has some of the hidden units, and packs their weights once for all steps. A step reads the packed weights
// from end to end, which takes longer than the products for a batch of some ten rows. Threads wait for one another
// after each step, since each needs all of h, or of the gates' gradients. No sum crosses threads.
#include "family.h"
#include "operands.h"
#include "threads.h"

namespace {

using fused_mos::LstmArguments;

constexpr int kGates = 4;
constexpr int kVectors = 2;  // vectors of packed weights' columns in one product
constexpr Index kColumns = kVectors * kLanes;

// most rows of the batch in one product
#if defined(__AMX_BF16__)
constexpr int kMostRows = 16;
#elif defined(__AVX512F__) || defined(__aarch64__)
constexpr int kMostRows = 12;  // sums take 24 of 32 vector registers
#else
constexpr int kMostRows = 6;  // sums take 12 of 16 vector registers
#endif

// Calls f(Count<rows>{}) with the rows of each product, so that few of them are padding: 15 rows are two times 8, not
// two times 12. Tile registers compute all rows in the same time.
template <class F>
void with_rows(Index batch, F f) {
#ifdef __AMX_BF16__
  (void)batch;
  f(Count<kMostRows>{});
#else
  constexpr int kPart = kMostRows / 6;
  switch (ceil_div(ceil_div(batch, ceil_div(batch, kMostRows)), kPart)) {
    case 1:
    case 2: return f(Count<2 * kPart>{});
    case 3: return f(Count<3 * kPart>{});
    case 4: return f(Count<4 * kPart>{});
    case 5: return f(Count<5 * kPart>{});
    default: return f(Count<6 * kPart>{});
  }
#endif
}

// Computes out (kRows, kColumns) = Σ_s a[r·a_row + s] · w[s, :], where w (steps, kColumns) are packed weights.
#ifdef __AMX_BF16__
template <int kRows>
ALWAYS_INLINE void step_product(const Pair* a, Index a_row, const Pair* w, Index steps, float* out) {
  constexpr Index kStride = kColumns * sizeof(Pair), kAhead = 4 * kTileSteps * kVectors;  // lines
  asm volatile("" ::: "memory");  // GCC 12 does not know that tile loads read memory
  _tile_zero(0);
  _tile_zero(1);
  for (Index s = 0; s < steps; s += kTileSteps, w += kTileSteps * kColumns) {
    for (Index line = 0; line < kTileSteps * kVectors; ++line) prefetch(w + (kAhead + line) * kLanes);
    _tile_loadd(2, a + s, a_row * sizeof(Pair));
    _tile_loadd(3, w, kStride);
    _tile_dpbf16ps(0, 2, 3);
    _tile_loadd(4, w + kLanes, kStride);
    _tile_dpbf16ps(1, 2, 4);
  }
  _tile_stored(0, out, kStride);
  _tile_stored(1, out + kLanes, kStride);
}
#else
template <int kRows, class Op>
ALWAYS_INLINE void step_product(const Op* a, Index a_row, const Op* w, Index steps, float* out) {
  constexpr Index kAhead = 16;  // steps
  Vector sum[kRows][kVectors] = {};
  for (Index s = 0; s < steps; ++s, w += kColumns) {
    Vector right[kVectors];
#pragma GCC unroll 2
    for (int j = 0; j < kVectors; ++j) {
      prefetch(w + kAhead * kColumns + j * kLanes);
      right[j] = Element<Op>::load_all(w + j * kLanes);
    }
#pragma GCC unroll 12
    for (int r = 0; r < kRows; ++r) {
      const Vector left = Element<Op>::load_one(a + r * a_row + s);
#pragma GCC unroll 2
      for (int j = 0; j < kVectors; ++j) sum[r][j] = Element<Op>::multiply_add(left, right[j], sum[r][j]);
    }
  }
#pragma GCC unroll 12
  for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 2
    for (int j = 0; j < kVectors; ++j) store(out + r * kColumns + j * kLanes, sum[r][j]);
  }
}
#endif

// Loads the first n lanes; the others are 0.
ALWAYS_INLINE Vector load_some(const float* from, Index n) {
  if (n >= kLanes) return load(from);
  float lanes[kLanes] = {};
  memcpy(lanes, from, sizeof(float) * n);
  return load(lanes);
}

template <class To>
ALWAYS_INLINE void store_some(To* to, Index n, Vector v) {
  if (n >= kLanes) return store(to, v);
  To lanes[kLanes];
  store(lanes, v);
  memcpy((void*)to, lanes, sizeof(To) * n);
}

ALWAYS_INLINE Vector sigmoid(Vector x) {
  const Vector e = exp_nonpositive(x < 0.0f ? x : -x);
  return (x < 0.0f ? e : broadcast(1)) / (1.0f + e);
}

// State that all threads write and read: h, or the gates' gradients, as the left operand of the next step's product. It
// has two buffers: one is written while the other is read. Padding rows and steps are 0.
template <int kRows, class Op, class Stored>
class Exchange {
 public:
  Exchange(Index rows, Index width)
      : row_(steps_of<Op>(width)), size_(round_up(rows, kRows) * row_), memory_(2 * size_) {
    memset((void*)(Op*)memory_, 0, sizeof(Op) * 2 * size_);
  }
  const Op* operand(Index step, Index row) const { return memory_ + step % 2 * size_ + row * row_; }
  Stored* element(Index step, Index row, Index column) const {
    return (Stored*)(memory_ + step % 2 * size_ + row * row_) + column;
  }
  Index row() const { return row_; }

 private:
  Index row_, size_;
  Buffer<Op> memory_;
};

// Type of one number in an operand: half of a Pair, or a float.
template <class Op>
struct StoredAs {
  using type = float;
};
template <>
struct StoredAs<Pair> {
  using type = Bfloat16;
};

template <int kRows, class Op>
class Lstm {
  using Stored = typename StoredAs<Op>::type;
  using Exchanged = Exchange<kRows, Op, Stored>;
  static constexpr int kDepth = Element<Op>::kDepth;
  static constexpr Index kHalves = kGates / kVectors;  // products per unit, each for kVectors gates

 public:
  explicit Lstm(const LstmArguments& a) : a_(a) {}

  void forward() const {
    const Index groups = ceil_div(a_.width, kLanes), steps = steps_of<Op>(a_.width), block = steps * kColumns;
    const Exchanged states(a_.batch, a_.width);
    Buffer<Op> packed(groups * kHalves * block);
#pragma omp parallel num_threads(a_.n_threads)
    {
      [[maybe_unused]] const ProductRegisters registers;
      const Range mine = share(groups, omp_get_thread_num(), omp_get_num_threads());
      for (Index g = mine.begin; g < mine.end; ++g) {
        for (Index half = 0; half < kHalves; ++half) {
          pack_units(g * kLanes, half * kVectors, steps, packed + (g * kHalves + half) * block);
        }
        for (Index b = 0; b < a_.batch; ++b) {
          const Index n = units_from(g * kLanes);
          store_some(states.element(0, b, g * kLanes), n, load_some(a_.h0 + b * a_.width + g * kLanes, n));
        }
      }
      alignas(64) float sums[kHalves * kRows * kColumns];
      for (Index t = 0; t < a_.n_steps; ++t) {
#pragma omp barrier
        for (Index i = 0; i < mine.size(); ++i) {
          const Index g = group_at(t, i, mine);
          for (Index first = 0; first < a_.batch; first += kRows) {
            for (Index half = 0; half < kHalves; ++half) {
              step_product<kRows>(states.operand(t, first), states.row(), packed + (g * kHalves + half) * block, steps,
                                  sums + half * kRows * kColumns);
            }
            const Range rows = chunk_at(a_.batch, first, kRows);
            for (Index b = rows.begin; b < rows.end; ++b) {
              step_forward(t, b, g * kLanes, sums + (b - first) * kColumns, states);
            }
          }
        }
      }
    }
  }

  void backward() const {
    const Index groups = ceil_div(a_.width, kColumns), steps = steps_of<Op>(kGates * a_.width),
                block = steps * kColumns;
    const Exchanged gradients(a_.batch, kGates * a_.width);
    Buffer<Op> packed(groups * block);
#pragma omp parallel num_threads(a_.n_threads)
    {
      [[maybe_unused]] const ProductRegisters registers;
      const Range mine = share(groups, omp_get_thread_num(), omp_get_num_threads());
      for (Index g = mine.begin; g < mine.end; ++g) pack_gates(g * kColumns, steps, packed + g * block);
      alignas(64) float sums[kRows * kColumns];
      // the last step, −1, computes the gradient of h0
      for (Index t = a_.n_steps - 1; t >= (a_.grad_h0 ? -1 : 0); --t) {
#pragma omp barrier
        for (Index i = 0; i < mine.size(); ++i) {
          const Index g = group_at(t, i, mine);
          for (Index first = 0; first < a_.batch; first += kRows) {
            step_product<kRows>(gradients.operand(t + 1, first), gradients.row(), packed + g * block, steps, sums);
            const Range rows = chunk_at(a_.batch, first, kRows);
            for (Index b = rows.begin; b < rows.end; ++b) {
              for (Index u = g * kColumns; u < smaller((g + 1) * kColumns, a_.width); u += kLanes) {
                step_backward(t, b, u, load(sums + (b - first) * kColumns + u - g * kColumns), gradients);
              }
            }
          }
        }
      }
    }
  }

 private:
  Index units_from(Index unit) const { return smaller(kLanes, a_.width - unit); }
  // Returns the i-th of a thread's groups in step t. A step begins with the groups that the last one ended with, whose
  // weights are still in the L2 cache.
  static Index group_at(Index t, Index i, Range mine) { return t % 2 ? mine.end - 1 - i : mine.begin + i; }
  // Returns the index of `unit` at step t in row b.
  Index at(Index t, Index b, Index unit) const { return (t * a_.batch + b) * a_.width + unit; }
  Index gate_at(Index t, Index b, Index gate, Index unit) const {
    return ((t * a_.batch + b) * kGates + gate) * a_.width + unit;
  }
  const float* cell_before(Index t, Index b, Index unit) const {
    return t ? a_.cells + at(t - 1, b, unit) : a_.c0 + at(0, b, unit);
  }

  // Packs the weights of kLanes units for the gates from `gate` on: (steps, kVectors gates, kLanes).
  void pack_units(Index unit, Index gate, Index steps, Op* to) const {
    constexpr Index kPart = 16;  // elements of each row at a time, so that the writes stay in the L1 cache
    memset((void*)to, 0, sizeof(Op) * steps * kColumns);
    for (Index first = 0; first < a_.width; first += kPart) {
      const Index n = smaller(a_.width - first, kPart);
      for (Index column = 0; column < kColumns; ++column) {
        if (column % kLanes >= units_from(unit)) continue;
        const float* row = a_.weight + ((gate + column / kLanes) * a_.width + unit + column % kLanes) * a_.width;
        Stored rounded[kPart];
        Op part[kPart];
        narrow_row(row + first, n, rounded);
        copy_row(rounded, n, part);
        for (Index s = 0; s < ceil_div(n, kDepth); ++s) to[(first / kDepth + s) * kColumns + column] = part[s];
      }
    }
  }

  // Packs the weights of kColumns units as inputs of all gates: (steps, kColumns).
  void pack_gates(Index unit, Index steps, Op* to) const {
    const Index n = smaller(kColumns, a_.width - unit), n_gates = kGates * a_.width;
    memset((void*)to, 0, sizeof(Op) * steps * kColumns);
    for (Index j = 0; j < n_gates; j += kDepth, to += kColumns) {
      Stored rows[2][kColumns];
      const bool has_next = kDepth == 2 && j + 1 < n_gates;
      for (Index i = 0; i <= has_next; ++i) narrow_row(a_.weight + (j + i) * a_.width + unit, n, rows[i]);
      merge_rows(rows[0], has_next ? rows[1] : nullptr, n, to);
    }
  }

  // c = σ(f) c' + σ(i) tanh(g), h = σ(o) tanh(c), where c' is the cell state before. Stores the gates after σ and tanh.
  ALWAYS_INLINE void step_forward(Index t, Index b, Index unit, const float* sums, const Exchanged& states) const {
    const Index n = units_from(unit);
    Vector gate[kGates];
#pragma GCC unroll 4
    for (int k = 0; k < kGates; ++k) {
      float* kept = a_.gates + gate_at(t, b, k, unit);
      const Vector sum = load(sums + k / kVectors * kRows * kColumns + k % kVectors * kLanes) + load_some(kept, n);
      gate[k] = k == 2 ? tanh_of(sum) : sigmoid(sum);
      store_some(kept, n, gate[k]);
    }
    const Vector cell = gate[1] * load_some(cell_before(t, b, unit), n) + gate[0] * gate[2];
    const Vector state = gate[3] * tanh_of(cell);
    store_some(a_.cells + at(t, b, unit), n, cell);
    store_some(a_.output + at(t, b, unit), n, state);
    store_some(states.element(t + 1, b, unit), n, state);
  }

  ALWAYS_INLINE void step_backward(Index t, Index b, Index unit, Vector grad_state, const Exchanged& gradients) const {
    const Index n = units_from(unit);
    if (t < 0) return store_some(a_.grad_h0 + at(0, b, unit), n, grad_state);
    Vector gate[kGates], grad[kGates];
    for (int k = 0; k < kGates; ++k) gate[k] = load_some(a_.gates + gate_at(t, b, k, unit), n);
    if (a_.grad_output) grad_state += load_some(a_.grad_output + at(t, b, unit), n);
    const Vector tanh_of_cell = tanh_of(load_some(a_.cells + at(t, b, unit), n));
    float* carried = a_.grad_c0 + at(0, b, unit);
    const Vector grad_cell = load_some(carried, n) + grad_state * gate[3] * (1.0f - tanh_of_cell * tanh_of_cell);
    grad[0] = grad_cell * gate[2] * gate[0] * (1.0f - gate[0]);
    grad[1] = grad_cell * load_some(cell_before(t, b, unit), n) * gate[1] * (1.0f - gate[1]);
    grad[2] = grad_cell * gate[0] * (1.0f - gate[2] * gate[2]);
    grad[3] = grad_state * tanh_of_cell * gate[3] * (1.0f - gate[3]);
    store_some(carried, n, grad_cell * gate[1]);
    for (int k = 0; k < kGates; ++k) {
      store_some(a_.grad_gates + gate_at(t, b, k, unit), n, grad[k]);
      store_some(gradients.element(t, b, k * a_.width + unit), n, grad[k]);
    }
  }

  const LstmArguments& a_;
};

template <class F>
void with_products(const LstmArguments& a, F f) {
  with_rows(a.batch, [&](auto rows) {
    constexpr int kRows = decltype(rows)::value;
#if defined(__AMX_BF16__)
    f(Lstm<kRows, Pair>(a));
#elif defined(__AVX512BF16__)
    a.bf16 ? f(Lstm<kRows, Pair>(a)) : f(Lstm<kRows, float>(a));
#else
    f(Lstm<kRows, float>(a));
#endif
  });
}

}  // namespace

namespace fused_mos::FUSED_MOS_NAMESPACE {

void lstm_forward(const LstmArguments& a) {
  with_products(a, [](const auto& lstm) { lstm.forward(); });
}

void lstm_backward(const LstmArguments& a) {
  with_products(a, [](const auto& lstm) { lstm.backward(); });
}

}  // namespace fused_mos::FUSED_MOS_NAMESPACE
