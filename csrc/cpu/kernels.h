// Interface between the dispatcher and the kernels: raw pointers, sizes, and one table of functions per instruction
// set. Shape letters are those of the Python package: N tokens, K experts, R = N·K rows, D features, V classes. All
// arrays are contiguous. "Operand" arrays (rows, weight, their gradients) are bfloat16 if Head::bf16 is set, else
// float32. Classes are int64; other arrays are float32 unless declared otherwise.
#pragma once

#include <cstdint>

namespace fused_mos {

// Transforms a logit before its softmax: l' = c·tanh(l/c) / T. Below, `l` is a transformed logit.
struct Transform {
  float softcap;              // c > 0, or 0 for no cap
  float inverse_temperature;  // 1 / T
};

struct Head {
  const void* weight;  // (V, D) operand
  const float* bias;   // (V,) or null
  int64_t n_classes;
  int64_t n_features;
  bool bf16;
  int n_threads;
  Transform transform;
  int64_t workspace_bytes;  // larger problems are processed in chunks
};

// A row's log-sum-exp is stored as two terms, L = maximum + log_total: rounding a large L to one float32 would spoil
// exp(l − L).
struct StatisticsArguments {
  const void* rows;  // (R, D) operand
  int64_t n_rows;
  const int64_t* target;  // (R,) or null
  float* maximum;         // (R,)
  float* log_total;       // (R,)
  float* target_logit;    // (R,), NaN if the target is not a class
  float* entropy;         // (R,) of softmax(l), or null
};

// Gradients of the rows (N·K latent vectors) and of the head, which kernels fill; null if not needed.
struct GradientArguments {
  void* rows;    // (R, D) operand, zero on entry
  void* weight;  // (V, D) operand, overwritten, but unchanged if there are no rows
  float* bias;   // (V,), zero on entry
};

// dl = grad_lse·exp(l − L) − grad_target·1[v = target]
struct RowsBackwardArguments {
  const void* rows;  // (R, D) operand
  int64_t n_rows;
  const int64_t* target;     // (R,) or null
  const float* maximum;      // (R,)
  const float* log_total;    // (R,)
  const float* grad_lse;     // (R,)
  const float* grad_target;  // (R,) or null
  GradientArguments gradients;
};

// The loss is scale·Σ nll over the valid tokens. If loss_weights are given, with rows c, λ and ζ, it is instead the sum
// of c·nll + λ Σ_k π_k L_k + ζ Σ_k π_k L_k² over the valid tokens, and no row is filtered.
struct NllArguments {
  const void* latent;      // (N, K, D) operand
  const float* log_prior;  // (N, K)
  const int64_t* target;   // (N,)
  const bool* valid;       // (N,), true if the token counts in the loss
  int64_t n_tokens;
  int64_t n_experts;
  int64_t tokens_of_block;  // tokens whose exponentials are held at once
  int64_t classes_held;     // classes whose exponentials are held: all, unless one block has all tokens
  float scale;
  const float* loss_weights;  // (3, N) or null
  float filter_eps;
  float* nll;           // (N,)
  float* maximum;       // (N, K)
  float* log_total;     // (N, K)
  float* target_logit;  // (N, K)
  float* grad_prior;    // (N, K) or null
  GradientArguments gradients;
};

// Gradient of log p, either dense or G = token_n of_class_v + at_target_n 1[v = target_n] − entropy_n p (log p + 1).
// Null terms are 0; `of_class` requires `token`, and `at_target` requires `target`.
struct LogProbGradient {
  const float* dense;      // (N, V)
  const float* token;      // (N,)
  const float* of_class;   // (V,)
  const float* at_target;  // (N,)
  const int64_t* target;   // (N,)
  const float* entropy;    // (N,): the gradient of the entropy
};

struct MixtureArguments {
  const void* latent;      // (N, K, D) operand
  const float* log_prior;  // (N, K)
  const float* maximum;    // (N, K)
  const float* log_total;  // (N, K)
  int64_t n_tokens;
  int64_t n_experts;
  float* log_prob;             // (N, V) or null
  int64_t* best;               // (N,), the most probable class, or null
  float* mean_log_prob;        // (N, K), Σ_v exp(l − L) log p, or null
  LogProbGradient grad;        // for the backward pass
  const float* mean_gradient;  // (N, K), s = Σ_v G π exp(l − L) / p, or null to have it summed
  float* grad_prior;           // (N, K) or null
  GradientArguments gradients;
};

// The mixture over all classes and its normalisers, from logits that are computed once.
struct OneSweepArguments {
  const void* latent;      // (N, K, D) operand
  const float* log_prior;  // (N, K)
  int64_t n_tokens;
  int64_t n_experts;
  int64_t tokens_of_block;  // tokens whose exponentials over all classes are held at once
  float* maximum;           // (N, K)
  float* log_total;         // (N, K)
  float* log_prob;          // (N, V) or null
  int64_t* best;            // (N,), the most probable class, or null
};

struct SampleArguments {
  const void* rows;  // (R, D) operand
  int64_t n_rows;
  const double* uniform;  // (R,), in [0, 1)
  int64_t* sample;        // (R,)
};

// Shape letters of a layer: T steps, B rows of the batch, H hidden units. Gates are in the order i, f, g, o.
struct LstmArguments {
  int64_t n_steps, batch, width;
  bool bf16;  // round the products' operands to bfloat16 if that is faster
  int n_threads;
  const float* weight;       // (4H, H), hidden to hidden
  const float *h0, *c0;      // (B, H)
  float* gates;              // (T, B, 4H); forward: in, the terms of the input and the biases; out, the gates
  float *cells, *output;     // (T, B, H)
  const float* grad_output;  // (T, B, H) or null
  float* grad_gates;         // (T, B, 4H), of the gates before σ and tanh
  float* grad_h0;            // (B, H) or null
  float* grad_c0;            // (B, H); in, the gradient of the last cell state; out, that of c0
};

// An operand of `lanes` rows of A or columns of B, each with `depth` terms: number (lane, step) is
// data[lane · stride + step] if the steps are contiguous, else data[step · stride + lane].
struct MatrixOperand {
  const float* data;
  int64_t stride;
  bool steps_are_contiguous;
};

// out (M, N) = A (M, depth) · B (depth, N) + bias
struct ProductArguments {
  int64_t rows, columns, depth;
  bool bf16;  // round the operands to bfloat16 if that is faster
  int n_threads;
  MatrixOperand left, right;
  const float* bias;  // (N,) or null
  float* out;         // (M, N)
};

struct Kernels {
  const char* name;
  bool bf16_products;  // true if bfloat16 operands are multiplied directly, false if they are widened to float32
  void (*row_statistics)(const Head&, const StatisticsArguments&);
  void (*rows_backward)(const Head&, const RowsBackwardArguments&);
  void (*nll_with_gradients)(const Head&, const NllArguments&);
  void (*mixture)(const Head&, const MixtureArguments&);
  void (*mixture_backward)(const Head&, const MixtureArguments&);
  void (*mixture_in_one_sweep)(const Head&, const OneSweepArguments&);
  void (*sample)(const Head&, const SampleArguments&);
  void (*lstm_forward)(const LstmArguments&);
  void (*lstm_backward)(const LstmArguments&);
  void (*matrix_product)(const ProductArguments&);
  void (*exponentials)(const float*, float*, int64_t);         // exp of numbers ≤ 0, for tests
  void (*logarithms)(const float*, float*, int64_t);           // log of positive numbers, for tests
  void (*hyperbolic_tangents)(const float*, float*, int64_t);  // tanh, for tests
  double (*peak_gflops)(int n_threads, bool bf16);             // rate of multiply-adds on registers, for benchmarks
};

}  // namespace fused_mos
