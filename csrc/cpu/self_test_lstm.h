// An LSTM layer in float64, computed by loops that follow its definition.
#pragma once

#include <cmath>
#include <cstdint>
#include <vector>

#include "kernels.h"

namespace fused_mos {

// Inputs, the arrays that the kernels fill, and the expected results.
struct LstmProblem {
  using Index = int64_t;
  using Floats = std::vector<float>;
  using Doubles = std::vector<double>;

 private:
  uint64_t state_ = 1;  // of `random`: declared first, since members are initialised in this order

 public:
  LstmProblem(Index steps, Index batch, Index width)
      : t(steps),
        b(batch),
        h(width),
        weight(random(4 * h * h, 1 / std::sqrt(double(h)))),
        h0(random(b * h, 1)),
        c0(random(b * h, 1)),
        gates(random(t * b * 4 * h, 1)),
        grad_output(random(t * b * h, 1)),
        cells(t * b * h),
        output(t * b * h),
        grad_gates(t * b * 4 * h),
        grad_h0(b * h),
        grad_c0(random(b * h, 1)) {
    expect();
  }

  LstmArguments arguments(bool bf16, int n_threads) {
    return {t,
            b,
            h,
            bf16,
            n_threads,
            weight.data(),
            h0.data(),
            c0.data(),
            gates.data(),
            cells.data(),
            output.data(),
            grad_output.data(),
            grad_gates.data(),
            grad_h0.data(),
            grad_c0.data()};
  }

  Index t, b, h;
  Floats weight, h0, c0, gates, grad_output, cells, output, grad_gates, grad_h0, grad_c0;
  Doubles expected_output, expected_cells, expected_grad_gates, expected_grad_h0, expected_grad_c0;

 private:
  Floats random(Index n, double scale) {
    Floats numbers(n);
    for (float& x : numbers) {
      state_ = state_ * 6364136223846793005u + 1442695040888963407u;
      x = float(scale * (double(state_ >> 33) / double(1u << 30) - 1));
    }
    return numbers;
  }

  static double sigmoid(double x) { return 1 / (1 + std::exp(-x)); }

  void expect() {
    Doubles activated(t * b * 4 * h);
    expected_output.resize(t * b * h);
    expected_cells.resize(t * b * h);
    for (Index s = 0; s < t; ++s) {
      for (Index r = 0; r < b; ++r) {
        const Index row = s * b + r;
        const auto before = [&](const Doubles& kept, const Floats& first, Index u) {
          return s ? kept[(row - b) * h + u] : double(first[r * h + u]);
        };
        for (Index j = 0; j < 4 * h; ++j) {
          double sum = gates[row * 4 * h + j];
          for (Index u = 0; u < h; ++u) sum += double(weight[j * h + u]) * before(expected_output, h0, u);
          activated[row * 4 * h + j] = j / h == 2 ? std::tanh(sum) : sigmoid(sum);
        }
        for (Index u = 0; u < h; ++u) {
          const double* gate = &activated[row * 4 * h + u];
          const double cell = gate[h] * before(expected_cells, c0, u) + gate[0] * gate[2 * h];
          expected_cells[row * h + u] = cell;
          expected_output[row * h + u] = gate[3 * h] * std::tanh(cell);
        }
      }
    }
    expected_grad_gates.resize(t * b * 4 * h);
    expected_grad_h0.resize(b * h);
    expected_grad_c0.assign(grad_c0.begin(), grad_c0.end());
    for (Index s = t - 1; s >= 0; --s) {
      for (Index r = 0; r < b; ++r) {
        const Index row = s * b + r;
        double* grad = &expected_grad_gates[row * 4 * h];
        for (Index u = 0; u < h; ++u) {
          const double* gate = &activated[row * 4 * h + u];
          const double tanh_of_cell = std::tanh(expected_cells[row * h + u]);
          const double before = s ? expected_cells[(row - b) * h + u] : double(c0[r * h + u]);
          const double of_state = expected_grad_h0[r * h + u] + grad_output[row * h + u];
          double& carried = expected_grad_c0[r * h + u];
          const double of_cell = carried + of_state * gate[3 * h] * (1 - tanh_of_cell * tanh_of_cell);
          grad[u] = of_cell * gate[2 * h] * gate[0] * (1 - gate[0]);
          grad[h + u] = of_cell * before * gate[h] * (1 - gate[h]);
          grad[2 * h + u] = of_cell * gate[0] * (1 - gate[2 * h] * gate[2 * h]);
          grad[3 * h + u] = of_state * tanh_of_cell * gate[3 * h] * (1 - gate[3 * h]);
          carried = of_cell * gate[h];
        }
        for (Index u = 0; u < h; ++u) {  // gradient of the state before
          double sum = 0;
          for (Index j = 0; j < 4 * h; ++j) sum += double(weight[j * h + u]) * grad[j];
          expected_grad_h0[r * h + u] = sum;
        }
      }
    }
  }
};

}  // namespace fused_mos
