// Python bindings of csrc/cpu. They take addresses and sizes instead of tensors, so that building needs no torch.
// fused_mos/_backends/cpu.py has already checked all arguments.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "cpu/dispatch.h"
#include "cpu/workspace.h"

namespace py = pybind11;
using namespace fused_mos;

namespace {

using Address = std::uintptr_t;

template <class T>
T* at(Address address) {
  return reinterpret_cast<T*>(address);
}

Head head(Address weight, Address bias, int64_t n_classes, int64_t n_features, bool bf16, int n_threads, float softcap,
          float inverse_temperature, int64_t workspace_bytes) {
  return {at<const void>(weight),         at<const float>(bias), n_classes, n_features, bf16, n_threads,
          {softcap, inverse_temperature}, workspace_bytes};
}

GradientArguments gradients(Address rows, Address weight, Address bias) {
  return {at<void>(rows), at<void>(weight), at<float>(bias)};
}

void row_statistics(const Head& head, Address rows, int64_t n_rows, Address target, Address maximum, Address log_total,
                    Address target_logit, Address entropy) {
  kernels_for(head.bf16).row_statistics(
      head, {at<const void>(rows), n_rows, at<const int64_t>(target), at<float>(maximum), at<float>(log_total),
             at<float>(target_logit), at<float>(entropy)});
}

void rows_backward(const Head& head, Address rows, int64_t n_rows, Address target, Address maximum, Address log_total,
                   Address grad_lse, Address grad_target, const GradientArguments& gradients) {
  kernels_for(head.bf16).rows_backward(
      head, {at<const void>(rows), n_rows, at<const int64_t>(target), at<const float>(maximum),
             at<const float>(log_total), at<const float>(grad_lse), at<const float>(grad_target), gradients});
}

void nll_with_gradients(const Head& head, Address latent, Address log_prior, Address target, Address valid,
                        int64_t n_tokens, int64_t n_experts, int64_t tokens_of_block, int64_t classes_held, float scale,
                        Address loss_weights, float filter_eps, Address nll, Address maximum, Address log_total,
                        Address target_logit, Address grad_prior, const GradientArguments& gradients) {
  kernels_for(head.bf16).nll_with_gradients(
      head,
      {at<const void>(latent), at<const float>(log_prior), at<const int64_t>(target), at<const bool>(valid), n_tokens,
       n_experts, tokens_of_block, classes_held, scale, at<const float>(loss_weights), filter_eps, at<float>(nll),
       at<float>(maximum), at<float>(log_total), at<float>(target_logit), at<float>(grad_prior), gradients});
}

MixtureArguments mixture_arguments(Address latent, Address log_prior, Address maximum, Address log_total,
                                   int64_t n_tokens, int64_t n_experts) {
  MixtureArguments a{};
  a.latent = at<const void>(latent);
  a.log_prior = at<const float>(log_prior);
  a.maximum = at<const float>(maximum);
  a.log_total = at<const float>(log_total);
  a.n_tokens = n_tokens;
  a.n_experts = n_experts;
  return a;
}

void mixture(const Head& head, MixtureArguments a, Address log_prob, Address best, Address mean_log_prob) {
  a.log_prob = at<float>(log_prob);
  a.best = at<int64_t>(best);
  a.mean_log_prob = at<float>(mean_log_prob);
  kernels_for(head.bf16).mixture(head, a);
}

LogProbGradient log_prob_gradient(Address dense, Address token, Address of_class, Address at_target, Address target,
                                  Address entropy) {
  return {at<const float>(dense),     at<const float>(token),    at<const float>(of_class),
          at<const float>(at_target), at<const int64_t>(target), at<const float>(entropy)};
}

void mixture_backward(const Head& head, MixtureArguments a, const LogProbGradient& grad, Address mean_gradient,
                      Address grad_prior, const GradientArguments& gradients) {
  a.grad = grad;
  a.mean_gradient = at<const float>(mean_gradient);
  a.grad_prior = at<float>(grad_prior);
  a.gradients = gradients;
  kernels_for(head.bf16).mixture_backward(head, a);
}

void mixture_in_one_sweep(const Head& head, Address latent, Address log_prior, int64_t n_tokens, int64_t n_experts,
                          int64_t tokens_of_block, Address maximum, Address log_total, Address log_prob, Address best) {
  kernels_for(head.bf16).mixture_in_one_sweep(
      head, {at<const void>(latent), at<const float>(log_prior), n_tokens, n_experts, tokens_of_block,
             at<float>(maximum), at<float>(log_total), at<float>(log_prob), at<int64_t>(best)});
}

void sample(const Head& head, Address rows, int64_t n_rows, Address uniform, Address result) {
  kernels_for(head.bf16).sample(head, {at<const void>(rows), n_rows, at<const double>(uniform), at<int64_t>(result)});
}

LstmArguments lstm(int64_t n_steps, int64_t batch, int64_t width, bool bf16, int n_threads, Address weight, Address h0,
                   Address c0, Address gates, Address cells, Address output, Address grad_output, Address grad_gates,
                   Address grad_h0, Address grad_c0) {
  return {n_steps,
          batch,
          width,
          bf16,
          n_threads,
          at<const float>(weight),
          at<const float>(h0),
          at<const float>(c0),
          at<float>(gates),
          at<float>(cells),
          at<float>(output),
          at<const float>(grad_output),
          at<float>(grad_gates),
          at<float>(grad_h0),
          at<float>(grad_c0)};
}

void matrix_product(int64_t rows, int64_t columns, int64_t depth, bool bf16, int n_threads, Address left,
                    int64_t left_stride, bool left_steps, Address right, int64_t right_stride, bool right_steps,
                    Address bias, Address out) {
  kernels_for(bf16).matrix_product({rows,
                                    columns,
                                    depth,
                                    bf16,
                                    n_threads,
                                    {at<const float>(left), left_stride, left_steps},
                                    {at<const float>(right), right_stride, right_steps},
                                    at<const float>(bias),
                                    at<float>(out)});
}

}  // namespace

// Addresses are keyword arguments, since they all have the same type and are easily swapped.
PYBIND11_MODULE(_cpu, m) {
  using namespace py::literals;
  m.doc() = "Native CPU kernels of fused_mos; called by fused_mos._backends.cpu, which knows what the arguments mean.";
  const auto released = py::call_guard<py::gil_scoped_release>();
  const py::kw_only by_keyword;

  py::class_<Head>(m, "Head").def(py::init(&head), by_keyword, "weight"_a, "bias"_a, "n_classes"_a, "n_features"_a,
                                  "bf16"_a, "n_threads"_a, "softcap"_a, "inverse_temperature"_a, "workspace_bytes"_a);
  py::class_<GradientArguments>(m, "Gradients").def(py::init(&gradients), by_keyword, "rows"_a, "weight"_a, "bias"_a);
  py::class_<MixtureArguments>(m, "Mixture")
      .def(py::init(&mixture_arguments), by_keyword, "latent"_a, "log_prior"_a, "maximum"_a, "log_total"_a,
           "n_tokens"_a, "n_experts"_a);

  py::class_<LogProbGradient>(m, "LogProbGradient")
      .def(py::init(&log_prob_gradient), by_keyword, "dense"_a = 0, "token"_a = 0, "of_class"_a = 0, "at_target"_a = 0,
           "target"_a = 0, "entropy"_a = 0);

  m.def("row_statistics", &row_statistics, released, "head"_a, by_keyword, "rows"_a, "n_rows"_a, "target"_a,
        "maximum"_a, "log_total"_a, "target_logit"_a, "entropy"_a);
  m.def("rows_backward", &rows_backward, released, "head"_a, by_keyword, "rows"_a, "n_rows"_a, "target"_a, "maximum"_a,
        "log_total"_a, "grad_lse"_a, "grad_target"_a, "gradients"_a);
  m.def("nll_with_gradients", &nll_with_gradients, released, "head"_a, by_keyword, "latent"_a, "log_prior"_a,
        "target"_a, "valid"_a, "n_tokens"_a, "n_experts"_a, "tokens_of_block"_a, "classes_held"_a, "scale"_a,
        "loss_weights"_a, "filter_eps"_a, "nll"_a, "maximum"_a, "log_total"_a, "target_logit"_a, "grad_prior"_a,
        "gradients"_a);
  m.def("mixture", &mixture, released, "head"_a, "mixture"_a, by_keyword, "log_prob"_a, "best"_a, "mean_log_prob"_a);
  m.def("mixture_backward", &mixture_backward, released, "head"_a, "mixture"_a, by_keyword, "grad"_a, "mean_gradient"_a,
        "grad_prior"_a, "gradients"_a);
  m.def("mixture_in_one_sweep", &mixture_in_one_sweep, released, "head"_a, by_keyword, "latent"_a, "log_prior"_a,
        "n_tokens"_a, "n_experts"_a, "tokens_of_block"_a, "maximum"_a, "log_total"_a, "log_prob"_a, "best"_a);
  m.def("sample", &sample, released, "head"_a, by_keyword, "rows"_a, "n_rows"_a, "uniform"_a, "sample"_a);

  py::class_<LstmArguments>(m, "Lstm").def(py::init(&lstm), by_keyword, "n_steps"_a, "batch"_a, "width"_a, "bf16"_a,
                                           "n_threads"_a, "weight"_a, "h0"_a, "c0"_a, "gates"_a, "cells"_a,
                                           "output"_a = 0, "grad_output"_a = 0, "grad_gates"_a = 0, "grad_h0"_a = 0,
                                           "grad_c0"_a = 0);
  m.def("lstm_forward", [](const LstmArguments& a) { kernels_for(a.bf16).lstm_forward(a); }, released);
  m.def("lstm_backward", [](const LstmArguments& a) { kernels_for(a.bf16).lstm_backward(a); }, released);

  m.def("matrix_product", &matrix_product, released, by_keyword, "rows"_a, "columns"_a, "depth"_a, "bf16"_a,
        "n_threads"_a, "left"_a, "left_stride"_a, "left_steps"_a, "right"_a, "right_stride"_a, "right_steps"_a,
        "bias"_a, "out"_a);

  m.def("instruction_set", [] { return chosen_kernels().name; });
  m.def("instruction_sets", [] {
    std::vector<std::string> names;
    for (const Kernels* kernels : available_kernels()) names.push_back(kernels->name);
    return names;
  });
  m.def("bf16_products", [] { return kernels_for(true).bf16_products; });
#ifdef _OPENMP
  m.attr("threaded") = true;
#else
  m.attr("threaded") = false;
#endif
  m.def("peak_bytes", &peak_bytes);
  m.def("reset_peak_bytes", &reset_peak_bytes);
  m.def("exponentials", [](Address from, Address to, int64_t n) {
    chosen_kernels().exponentials(at<const float>(from), at<float>(to), n);
  });
  m.def("logarithms", [](Address from, Address to, int64_t n) {
    chosen_kernels().logarithms(at<const float>(from), at<float>(to), n);
  });
  m.def("hyperbolic_tangents", [](Address from, Address to, int64_t n) {
    chosen_kernels().hyperbolic_tangents(at<const float>(from), at<float>(to), n);
  });
  m.def(
      "peak_gflops", [](int n_threads, bool bf16) { return kernels_for(bf16).peak_gflops(n_threads, bf16); }, released);
}
