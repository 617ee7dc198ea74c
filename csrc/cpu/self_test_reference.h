// Random problems for self_test.cpp, and their expected results: every logit in float64, by the formulas in the
// headers' comments.
#pragma once

#include <cmath>
#include <cstring>
#include <random>
#include <vector>

#include "kernels.h"

namespace {

using fused_mos::Head;
using fused_mos::Transform;
using Index = int64_t;
using Floats = std::vector<float>;
using Doubles = std::vector<double>;
using Classes = std::vector<int64_t>;

// An array of float32 or bfloat16 that kernels read or fill.
class Operand {
 public:
  Operand(Index n, bool bf16) : floats_(bf16 ? 0 : n), halves_(bf16 ? n : 0) {}

  Index size() const { return Index(floats_.size() + halves_.size()); }
  void* data() { return halves_.empty() ? (void*)floats_.data() : halves_.data(); }

  double operator[](Index i) const {
    if (halves_.empty()) return floats_[i];
    const uint32_t bits = uint32_t{halves_[i]} << 16;
    float x;
    std::memcpy(&x, &bits, sizeof x);
    return x;
  }

  void set(Index i, float x) {
    if (!floats_.empty()) floats_[i] = x;
    uint32_t bits;
    std::memcpy(&bits, &x, sizeof bits);
    if (!halves_.empty()) halves_[i] = uint16_t(bits >> 16);
  }

 private:
  Floats floats_;
  std::vector<uint16_t> halves_;
};

struct Sizes {
  Index n, k, d, v;
  Index tokens_of_block;
  Index workspace_bytes;
  Transform transform;
};

// Random inputs of the head, and gradients of its results.
struct Problem : Sizes {
  Problem(const Sizes& sizes, bool bf16)
      : Sizes(sizes),
        bf16(bf16),
        r(n * k),
        latent(r * d, bf16),
        weight(v * d, bf16),
        bias(signed_numbers(v)),
        log_prior(r),
        target(n),
        row_target(r),
        grad_lse(signed_numbers(r)),
        grad_target(signed_numbers(r)),
        grad_log_prob(signed_numbers(n * v)),
        uniform(r) {
    for (Index i = 0; i < latent.size(); ++i) latent.set(i, 4 * number() - 2);
    for (Index i = 0; i < weight.size(); ++i) weight.set(i, 2 * number() - 1);
    for (double& x : uniform) x = number();
    for (Index t = 0; t < n; ++t) {
      Doubles share(k);
      double total = 0;
      for (double& x : share) total += x = number() + 0.1;
      target[t] = Index(number() * float(v));
      for (Index e = 0; e < k; ++e) {
        log_prior[t * k + e] = float(std::log(share[e] / total));
        row_target[t * k + e] = target[t];
      }
    }
  }

  Head head(int n_threads) { return {weight.data(), bias.data(), v, d, bf16, n_threads, transform, workspace_bytes}; }

 private:
  std::minstd_rand random_{1};
  float number() { return float(random_() % 65536) / 65536; }  // in [0, 1)
  Floats signed_numbers(Index count) {
    Floats result(count);
    for (float& x : result) x = 2 * number() - 1;
    return result;
  }

 public:
  bool bf16;
  Index r;  // rows
  Operand latent, weight;
  Floats bias, log_prior;
  Classes target, row_target;
  Floats grad_lse, grad_target, grad_log_prob;
  Doubles uniform;
};

// Every logit, and the results that follow from them.
struct Reference {
  explicit Reference(const Problem& p) : p(p), logits(p.r * p.v), slopes(p.r * p.v), lse(p.r), log_p(p.n * p.v) {
    const double c = p.transform.softcap, inverse_temperature = p.transform.inverse_temperature;
    for (Index r = 0; r < p.r; ++r) {
      double total = 0;
      for (Index v = 0; v < p.v; ++v) {
        double l = p.bias[v];
        for (Index i = 0; i < p.d; ++i) l += p.latent[r * p.d + i] * p.weight[v * p.d + i];
        const double tanh = c > 0 ? std::tanh(l / c) : 0;
        logits[r * p.v + v] = (c > 0 ? c * tanh : l) * inverse_temperature;
        slopes[r * p.v + v] = (1 - tanh * tanh) * inverse_temperature;
        total += std::exp(logits[r * p.v + v]);
      }
      lse[r] = std::log(total);
    }
    for (Index t = 0; t < p.n; ++t) {
      for (Index v = 0; v < p.v; ++v) {
        double total = 0;
        for (Index r = t * p.k; r < (t + 1) * p.k; ++r) total += prior(r) * softmax(r, v);
        log_p[t * p.v + v] = std::log(total);
      }
    }
  }

  double prior(Index r) const { return std::exp(double(p.log_prior[r])); }
  double softmax(Index r, Index v) const { return std::exp(logits[r * p.v + v] - lse[r]); }
  double posterior(Index r, Index v) const { return prior(r) * softmax(r, v) / std::exp(log_p[r / p.k * p.v + v]); }

  const Problem& p;
  Doubles logits, slopes;  // (R, V): transformed logits, and derivatives of the transform
  Doubles lse;             // (R,)
  Doubles log_p;           // (N, V)
};

// Gradients of z, E and b, given the gradient dl(r, v) of the logits.
struct ExpectedGradients {
  template <class F>
  ExpectedGradients(const Reference& reference, F dl)
      : rows(reference.p.r * reference.p.d), weight(reference.p.v * reference.p.d), bias(reference.p.v) {
    const Problem& p = reference.p;
    for (Index r = 0; r < p.r; ++r) {
      for (Index v = 0; v < p.v; ++v) {
        const double g = dl(r, v) * reference.slopes[r * p.v + v];
        bias[v] += g;
        for (Index i = 0; i < p.d; ++i) {
          rows[r * p.d + i] += g * p.weight[v * p.d + i];
          weight[v * p.d + i] += g * p.latent[r * p.d + i];
        }
      }
    }
  }

  Doubles rows, weight, bias;
};

}  // namespace
