// Loss of one token: its negative log-likelihood, its experts' responsibilities, and the gradient of its prior.
#pragma once

#include <math.h>

#include "kernels.h"
#include "product.h"

namespace {

using fused_mos::NllArguments;

// Weights in the loss of a token's nll, Σ_k π_k L_k (`lse`) and Σ_k π_k L_k² (`square`).
struct TokenWeights {
  TokenWeights(const NllArguments& a, Index token) {
    if (!a.valid[token]) return;
    if (!a.loss_weights) {
      nll = a.scale;
      return;
    }
    nll = a.loss_weights[token];
    lse = a.loss_weights[a.n_tokens + token];
    square = a.loss_weights[2 * a.n_tokens + token];
  }

  bool regularises() const { return lse != 0 || square != 0; }
  // Return the regularisation of an expert with log-sum-exp L, and its derivative with respect to L.
  double penalty(double l) const { return (lse + square * l) * l; }
  double slope(double l) const { return lse + 2 * square * l; }

  float nll = 0;
  double lse = 0, square = 0;
};

inline double prior_of(const NllArguments& a, Index row) { return exp(double(a.log_prior[row])); }
inline double lse_of(const NllArguments& a, Index row) { return double(a.maximum[row]) + a.log_total[row]; }

// Computes one token's nll and its responsibilities r (K,).
inline void mix_token(const NllArguments& a, Index token, float* responsibility) {
  const Index k = a.n_experts, first = token * k;
  const auto joint = [&](Index e) {
    return double(a.log_prior[first + e]) +
           (double(a.target_logit[first + e]) - a.maximum[first + e] - a.log_total[first + e]);
  };
  double largest = -INFINITY, total = 0;
  for (Index e = 0; e < k; ++e) largest = joint(e) > largest || joint(e) != joint(e) ? joint(e) : largest;
  // avoids −inf − −inf if no expert gives the target any probability; all responsibilities are 0 then
  const double shift = largest == -INFINITY ? 0 : largest;
  for (Index e = 0; e < k; ++e) total += exp(joint(e) - shift);
  a.nll[token] = float(-(shift + log(total)));
  for (Index e = 0; e < k; ++e) {
    responsibility[e] = !a.valid[token] || total == 0 ? 0.0f : float(exp(joint(e) - shift) / total);
  }
}

// Computes one token's da = c (π − r) + π (f − Σ_k π f), where f are the penalties of its experts.
inline void write_prior_gradient(const NllArguments& a, Index token, const float* responsibility) {
  const TokenWeights weights(a, token);
  const Range rows{token * a.n_experts, (token + 1) * a.n_experts};
  double mean = 0;
  for (Index row = rows.begin; weights.regularises() && row < rows.end; ++row) {
    mean += prior_of(a, row) * weights.penalty(lse_of(a, row));
  }
  for (Index row = rows.begin; row < rows.end; ++row) {
    const float prior = float(prior_of(a, row));
    float gradient = weights.nll == 0 ? 0.0f : weights.nll * (prior - responsibility[row - rows.begin]);
    if (weights.regularises()) gradient += float(prior * (weights.penalty(lse_of(a, row)) - mean));
    a.grad_prior[row] = gradient;
  }
}

}  // namespace
