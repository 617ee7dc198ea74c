// Runs the kernels of every instruction set of this processor on small problems, and compares their results with loops
// in float64. The program needs neither Python nor torch, so that an emulator can run it: `make self-test`,
// `make self-test-aarch64`.
//
// self_test [THREADS] prints, for each instruction set, the errors and a digest of all results. The digest must not
// depend on the number of threads.
#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <string>

#include "dispatch.h"
#include "self_test_lstm.h"
#include "self_test_reference.h"

namespace {

using namespace fused_mos;

struct ComputedGradients {
  explicit ComputedGradients(const Problem& p) : rows(p.r * p.d, p.bf16), weight(p.v * p.d, p.bf16), bias(p.v) {}
  GradientArguments arguments() { return {rows.data(), weight.data(), bias.data()}; }

  Operand rows, weight;
  Floats bias;
};

struct Outcome {
  void add_to_digest(double x) {
    uint64_t bits;
    std::memcpy(&bits, &x, sizeof bits);
    digest = (digest ^ bits) * 0x100000001b3;  // FNV-1a, 64 bits at a time
  }

  int failures = 0;
  uint64_t digest = 0xcbf29ce484222325;
};

// Runs the kernels of one instruction set on one problem.
class Test {
 public:
  Test(const Kernels& kernels, Problem& problem, int n_threads, Outcome& outcome)
      : kernels_(kernels),
        p_(problem),
        reference_(problem),
        head_(problem.head(n_threads)),
        outcome_(outcome),
        maximum_(p_.r),
        log_total_(p_.r) {}

  void run() {
    row_statistics();  // first, since others read its results
    rows_backward();
    nll_with_gradients();
    mixture();
    mixture_backward();
    mixture_in_one_sweep();
    sample();
  }

 private:
  static constexpr double kExact = 1e-5;

  double of_gradients() const { return p_.bf16 ? 0x1p-7 : kExact; }

  // Checks the largest error, relative to the largest expected number.
  template <class A>
  void compare(const char* what, const A& computed, const Doubles& expected, double tolerance) {
    double error = 0, size = 1e-6;
    for (Index i = 0; i < Index(expected.size()); ++i) {
      outcome_.add_to_digest(computed[i]);
      const double difference = std::fabs(computed[i] - expected[i]);
      error = std::isnan(difference) ? INFINITY : std::max(error, difference);
      size = std::max(size, std::fabs(expected[i]));
    }
    check(error <= tolerance * size, what, error / size);
  }

  void check(bool right, const char* what, double error) {
    if (right) return;
    ++outcome_.failures;
    std::printf("%s, %s, N=%d K=%d D=%d V=%d: %s is wrong by %g\n", kernels_.name, p_.bf16 ? "bfloat16" : "float32",
                int(p_.n), int(p_.k), int(p_.d), int(p_.v), what, error);
  }

  void compare(const ComputedGradients& computed, const ExpectedGradients& expected, const std::string& of) {
    compare((of + " by z").c_str(), computed.rows, expected.rows, of_gradients());
    compare((of + " by E").c_str(), computed.weight, expected.weight, of_gradients());
    compare((of + " by b").c_str(), computed.bias, expected.bias, of_gradients());
  }

  void compare_lse(const char* what) {
    Doubles lse(p_.r);
    for (Index r = 0; r < p_.r; ++r) lse[r] = double(maximum_[r]) + log_total_[r];
    compare(what, lse, reference_.lse, kExact);
  }

  void compare_best(const char* what, const Classes& best) {
    Doubles found(p_.n), largest(p_.n);
    for (Index t = 0; t < p_.n; ++t) {
      const double* log_p = &reference_.log_p[t * p_.v];
      largest[t] = log_p[0];
      for (Index v = 1; v < p_.v; ++v) largest[t] = std::max(largest[t], log_p[v]);
      found[t] = best[t] >= 0 && best[t] < p_.v ? log_p[best[t]] : NAN;
    }
    compare(what, found, largest, kExact);
  }

  void row_statistics() {
    Floats target_logit(p_.r), entropy(p_.r);
    kernels_.row_statistics(head_, {p_.latent.data(), p_.r, p_.row_target.data(), maximum_.data(), log_total_.data(),
                                    target_logit.data(), entropy.data()});
    Doubles expected_target(p_.r), expected_entropy(reference_.lse);
    for (Index r = 0; r < p_.r; ++r) {
      expected_target[r] = reference_.logits[r * p_.v + p_.row_target[r]];
      for (Index v = 0; v < p_.v; ++v) {
        expected_entropy[r] -= reference_.softmax(r, v) * reference_.logits[r * p_.v + v];
      }
    }
    compare_lse("log-sum-exp");
    compare("target's logit", target_logit, expected_target, kExact);
    compare("entropy", entropy, expected_entropy, kExact);
  }

  void rows_backward() {
    ComputedGradients gradients(p_);
    kernels_.rows_backward(head_, {p_.latent.data(), p_.r, p_.row_target.data(), maximum_.data(), log_total_.data(),
                                   p_.grad_lse.data(), p_.grad_target.data(), gradients.arguments()});
    const ExpectedGradients expected(reference_, [&](Index r, Index v) {
      return p_.grad_lse[r] * reference_.softmax(r, v) - (v == p_.row_target[r] ? p_.grad_target[r] : 0);
    });
    compare(gradients, expected, "backward pass of rows");
  }

  void nll_with_gradients() {
    const float scale = 1 / float(p_.n);
    const std::vector<char> valid(p_.n, true);
    Floats nll(p_.n), target_logit(p_.r), grad_prior(p_.r);
    ComputedGradients gradients(p_);
    NllArguments a{};
    a.latent = p_.latent.data();
    a.log_prior = p_.log_prior.data();
    a.target = p_.target.data();
    a.valid = (const bool*)valid.data();
    a.n_tokens = p_.n;
    a.n_experts = p_.k;
    a.tokens_of_block = p_.tokens_of_block;
    a.classes_held = p_.tokens_of_block < p_.n ? p_.v : (p_.v + 1) / 2;  // the others are recomputed
    a.scale = scale;
    a.nll = nll.data();
    a.maximum = maximum_.data();
    a.log_total = log_total_.data();
    a.target_logit = target_logit.data();
    a.grad_prior = grad_prior.data();
    a.gradients = gradients.arguments();
    kernels_.nll_with_gradients(head_, a);

    Doubles expected_nll(p_.n), expected_prior(p_.r);
    for (Index t = 0; t < p_.n; ++t) expected_nll[t] = -reference_.log_p[t * p_.v + p_.target[t]];
    const auto responsibility = [&](Index r) { return reference_.posterior(r, p_.row_target[r]); };
    for (Index r = 0; r < p_.r; ++r) expected_prior[r] = scale * (reference_.prior(r) - responsibility(r));
    const ExpectedGradients expected(reference_, [&](Index r, Index v) {
      return scale * responsibility(r) * (reference_.softmax(r, v) - (v == p_.row_target[r]));
    });
    compare_lse("log-sum-exp beside the gradients");
    compare("nll", nll, expected_nll, kExact);
    compare("nll's gradient by a", grad_prior, expected_prior, kExact);
    compare(gradients, expected, "nll's gradient");
  }

  MixtureArguments mixture_arguments() {
    MixtureArguments a{};
    a.latent = p_.latent.data();
    a.log_prior = p_.log_prior.data();
    a.maximum = maximum_.data();
    a.log_total = log_total_.data();
    a.n_tokens = p_.n;
    a.n_experts = p_.k;
    return a;
  }

  void mixture() {
    Floats log_prob(p_.n * p_.v), mean(p_.r);
    Classes best(p_.n);
    MixtureArguments a = mixture_arguments();
    a.log_prob = log_prob.data();
    a.best = best.data();
    a.mean_log_prob = mean.data();
    kernels_.mixture(head_, a);

    Doubles expected_mean(p_.r);
    for (Index r = 0; r < p_.r; ++r) {
      for (Index v = 0; v < p_.v; ++v) {
        expected_mean[r] += reference_.softmax(r, v) * reference_.log_p[r / p_.k * p_.v + v];
      }
    }
    compare("log p", log_prob, reference_.log_p, kExact);
    compare("an expert's mean log p", mean, expected_mean, kExact);
    compare_best("most probable class", best);
  }

  void mixture_backward() {
    Floats grad_prior(p_.r);
    ComputedGradients gradients(p_);
    MixtureArguments a = mixture_arguments();
    a.grad.dense = p_.grad_log_prob.data();
    a.grad_prior = grad_prior.data();
    a.gradients = gradients.arguments();
    kernels_.mixture_backward(head_, a);

    const auto weighted = [&](Index r, Index v) {
      return p_.grad_log_prob[r / p_.k * p_.v + v] * reference_.posterior(r, v);
    };
    Doubles s(p_.r), of_token(p_.n), expected_prior(p_.r);
    for (Index r = 0; r < p_.r; ++r) {
      for (Index v = 0; v < p_.v; ++v) s[r] += weighted(r, v);
      of_token[r / p_.k] += s[r];
    }
    for (Index r = 0; r < p_.r; ++r) expected_prior[r] = s[r] - reference_.prior(r) * of_token[r / p_.k];
    const ExpectedGradients expected(
        reference_, [&](Index r, Index v) { return weighted(r, v) - s[r] * reference_.softmax(r, v); });
    compare("log p's gradient by a", grad_prior, expected_prior, kExact);
    compare(gradients, expected, "log p's gradient");
  }

  void mixture_in_one_sweep() {
    Floats log_prob(p_.n * p_.v);
    Classes best(p_.n);
    kernels_.mixture_in_one_sweep(head_, {p_.latent.data(), p_.log_prior.data(), p_.n, p_.k, p_.tokens_of_block,
                                          maximum_.data(), log_total_.data(), log_prob.data(), best.data()});
    compare_lse("log-sum-exp of one sweep");
    compare("log p of one sweep", log_prob, reference_.log_p, kExact);
    compare_best("most probable class of one sweep", best);
  }

  // Checks that the uniform number lies in the drawn class's share of the cumulative distribution.
  void sample() {
    Classes drawn(p_.r);
    kernels_.sample(head_, {p_.latent.data(), p_.r, p_.uniform.data(), drawn.data()});
    double outside = 0;
    for (Index r = 0; r < p_.r; ++r) {
      outcome_.add_to_digest(double(drawn[r]));
      if (drawn[r] < 0 || drawn[r] >= p_.v) outside = INFINITY;
      double before = 0;
      for (Index v = 0; v < std::min(drawn[r], p_.v); ++v) before += reference_.softmax(r, v);
      const double share = reference_.softmax(r, std::clamp(drawn[r], Index{0}, p_.v - 1));
      outside = std::max({outside, before - p_.uniform[r], p_.uniform[r] - before - share});
    }
    check(outside <= kExact, "sample", outside);
  }

  const Kernels& kernels_;
  Problem& p_;
  const Reference reference_;
  const Head head_;
  Outcome& outcome_;
  Floats maximum_, log_total_;
};

// Runs the LSTM's kernels of one instruction set on one layer. Each rounding to bfloat16 is off by up to 2⁻⁹.
void test_lstm(const Kernels& kernels, int64_t steps, int64_t batch, int64_t width, bool bf16, int n_threads,
               Outcome& outcome) {
  LstmProblem p(steps, batch, width);
  const LstmArguments a = p.arguments(bf16, n_threads);
  kernels.lstm_forward(a);
  kernels.lstm_backward(a);
  const auto compare = [&](const char* what, const Floats& computed, const Doubles& expected) {
    double error = 0, size = 0;
    for (size_t i = 0; i < expected.size(); ++i) {
      outcome.add_to_digest(computed[i]);
      error += (computed[i] - expected[i]) * (computed[i] - expected[i]);
      size += expected[i] * expected[i];
    }
    if (bf16) size += expected.size() / 64.0;  // rounded terms of order 1/8 can cancel
    if (std::sqrt(error / size) <= (bf16 ? 1e-2 : 1e-5)) return;
    ++outcome.failures;
    std::printf("%s, %s, T=%d B=%d H=%d: an LSTM's %s is wrong by %g\n", kernels.name, bf16 ? "bfloat16" : "float32",
                int(steps), int(batch), int(width), what, std::sqrt(error / size));
  };
  compare("output", p.output, p.expected_output);
  compare("cell state", p.cells, p.expected_cells);
  compare("gradient by its gates", p.grad_gates, p.expected_grad_gates);
  compare("gradient by h0", p.grad_h0, p.expected_grad_h0);
  compare("gradient by c0", p.grad_c0, p.expected_grad_c0);
}

// Multiplies two matrices, each in both layouts. Numbers of few bits make all products exact.
void test_product(const Kernels& kernels, int64_t rows, int64_t depth, int64_t columns, bool bf16, int n_threads,
                  Outcome& outcome) {
  Floats left(rows * depth), left_transposed(rows * depth), right(depth * columns), right_transposed(depth * columns),
      bias(columns), out(rows * columns);
  for (int64_t i = 0; i < rows; ++i) {
    for (int64_t s = 0; s < depth; ++s)
      left[i * depth + s] = left_transposed[s * rows + i] = float((3 * i + 5 * s) % 17 - 8);
  }
  for (int64_t s = 0; s < depth; ++s) {
    for (int64_t j = 0; j < columns; ++j)
      right[s * columns + j] = right_transposed[j * depth + s] = float((7 * s + 2 * j) % 13 - 6);
  }
  for (int64_t j = 0; j < columns; ++j) bias[j] = float(j % 5);
  for (const bool left_steps : {false, true}) {
    for (const bool right_steps : {false, true}) {
      kernels.matrix_product(
          {rows,
           columns,
           depth,
           bf16,
           n_threads,
           {left_steps ? left.data() : left_transposed.data(), left_steps ? depth : rows, left_steps},
           {right_steps ? right_transposed.data() : right.data(), right_steps ? depth : columns, right_steps},
           bias.data(),
           out.data()});
      for (int64_t i = 0; i < rows; ++i) {
        for (int64_t j = 0; j < columns; ++j) {
          float expected = bias[j];
          for (int64_t s = 0; s < depth; ++s) expected += left[i * depth + s] * right[s * columns + j];
          outcome.add_to_digest(out[i * columns + j]);
          if (out[i * columns + j] == expected) continue;
          ++outcome.failures;
          std::printf("%s, %s: number (%d, %d) of a product is %g, not %g\n", kernels.name,
                      bf16 ? "bfloat16" : "float32", int(i), int(j), out[i * columns + j], expected);
          return;
        }
      }
    }
  }
}

// One problem smaller than a tile, others with several blocks of rows, panels of classes and chunks of a small
// workspace, and one with a soft cap and a temperature.
const Sizes kSizes[] = {
    {1, 1, 5, 2, 1, 1 << 20, {0, 1}},       {9, 3, 37, 300, 9, 1 << 20, {0, 1}},
    {40, 3, 70, 260, 25, 1 << 14, {0, 1}},  {70, 1, 64, 128, 33, 1 << 16, {0, 1}},
    {9, 3, 37, 300, 5, 1 << 20, {3, 0.5f}},
};

}  // namespace

int main(int argc, char** argv) {
  const int n_threads = argc > 1 ? std::atoi(argv[1]) : 1;
  bool right = true;
  for (const Kernels* available : available_kernels()) {
    setenv("FUSED_MOS_ISA", available->name, 1);
    Outcome outcome;
    for (const Sizes& sizes : kSizes) {
      for (const bool bf16 : {false, true}) {
        Problem problem(sizes, bf16);
        Test(kernels_for(bf16), problem, n_threads, outcome).run();
      }
    }
    for (const bool bf16 : {false, true}) {
      test_lstm(kernels_for(bf16), 1, 1, 1, bf16, n_threads, outcome);
      test_lstm(kernels_for(bf16), 5, 13, 37, bf16, n_threads, outcome);
      test_product(kernels_for(bf16), 1, 1, 1, bf16, n_threads, outcome);
      test_product(kernels_for(bf16), 19, 1101, 103, bf16, n_threads, outcome);
    }
    std::printf("%s: %d failures, digest %016llx\n", available->name, outcome.failures,
                (unsigned long long)outcome.digest);
    right &= outcome.failures == 0;
  }
  return right ? 0 : 1;
}
