// Python bindings of csrc/cuda. They take addresses and sizes instead of tensors, so building needs no torch. The
// arguments were checked in Python (fused_mos/_backends/cuda.py).
#include <pybind11/pybind11.h>

#include <stdexcept>

#include "decode.h"
#include "lstm.h"

namespace py = pybind11;
using namespace fused_mos;

namespace {

using Address = std::uintptr_t;

template <class T>
T* at(Address address) {
  return reinterpret_cast<T*>(address);
}

void check(int error) {
  if (error) throw std::runtime_error("CUDA error " + std::to_string(error) + ": " + error_text(error));
}

struct Decode {
  DecodeArguments arguments{};
  DecodePlan plan{};

  Decode(DecodeMode mode, bool bf16, int n_tokens, int n_experts, int n_features, int64_t n_classes, Address latent,
         Address weight, Address bias, int n_multiprocessors, int shared_limit, int k) {
    arguments.mode = mode, arguments.bf16 = bf16, arguments.k = k;
    arguments.n_tokens = n_tokens, arguments.n_experts = n_experts, arguments.n_features = n_features,
    arguments.n_classes = n_classes;
    arguments.latent = at<const void>(latent), arguments.weight = at<const void>(weight),
    arguments.bias = at<const void>(bias);
    if (const char* reason = plan_decode(arguments, n_multiprocessors, shared_limit, plan))
      throw std::invalid_argument(reason);
  }

  void launch(Address workspace, Address stream) {
    arguments.workspace = at<void>(workspace);
    check(launch_decode(arguments, plan, at<void>(stream)));
  }

  void log_prob(Address log_prior, Address out, Address workspace, Address stream) {
    arguments.log_prior = at<const float>(log_prior), arguments.log_prob = at<float>(out);
    launch(workspace, stream);
  }
  void topk(Address log_prior, Address values, Address indices, Address workspace, Address stream) {
    arguments.log_prior = at<const float>(log_prior), arguments.values = at<float>(values),
    arguments.indices = at<int64_t>(indices);
    launch(workspace, stream);
  }
  void sample(float inverse_temperature, Address seed, Address indices, Address workspace, Address stream) {
    arguments.inverse_temperature = inverse_temperature;
    arguments.seed = at<const int64_t>(seed), arguments.indices = at<int64_t>(indices);
    launch(workspace, stream);
  }
};

struct Lstm {
  LstmShape shape{};
  LstmPlan plan{};

  Lstm(int n_steps, int n_rows, int width, int n_multiprocessors, int shared_limit) {
    shape.n_steps = n_steps, shape.n_rows = n_rows, shape.width = width;
    if (const char* reason = plan_lstm(shape, n_multiprocessors, shared_limit, plan))
      throw std::invalid_argument(reason);
  }

  void forward(Address recurrent, Address bias_ih, Address bias_hh, Address h0, Address c0, Address gates,
               Address states, Address cells, Address output, Address last_cell, Address stream) {
    LstmForward a{};
    a.shape = shape;
    a.recurrent = at<const uint16_t>(recurrent), a.bias_ih = at<const float>(bias_ih),
    a.bias_hh = at<const float>(bias_hh);
    a.h0 = at<const float>(h0), a.c0 = at<const float>(c0);
    a.gates = at<float>(gates), a.states = at<uint16_t>(states), a.cells = at<float>(cells);
    a.output = at<float>(output), a.last_cell = at<float>(last_cell);
    check(launch_lstm(a, plan, at<void>(stream)));
  }
  void backward(Address recurrent, Address gates, Address cells, Address c0, Address grad_output,
                Address grad_last_cell, Address grad_gates, Address grad_h0, Address grad_c0, Address stream) {
    LstmBackward a{};
    a.shape = shape;
    a.recurrent = at<const uint16_t>(recurrent);
    a.gates = at<const float>(gates), a.cells = at<const float>(cells), a.c0 = at<const float>(c0);
    a.grad_output = at<const float>(grad_output), a.grad_last_cell = at<const float>(grad_last_cell);
    a.grad_gates = at<uint16_t>(grad_gates), a.grad_h0 = at<float>(grad_h0), a.grad_c0 = at<float>(grad_c0);
    check(launch_lstm(a, plan, at<void>(stream)));
  }
};

}  // namespace

PYBIND11_MODULE(FUSED_MOS_MODULE, m) {
  py::enum_<DecodeMode>(m, "DecodeMode", py::module_local())  // local, since the emulation's module has the same
      .value("LogProb", DecodeMode::LogProb)
      .value("TopK", DecodeMode::TopK)
      .value("Sample", DecodeMode::Sample);
  py::class_<Decode>(m, "Decode", py::module_local())
      .def(py::init<DecodeMode, bool, int, int, int, int64_t, Address, Address, Address, int, int, int>())
      .def_property_readonly("workspace_bytes", [](const Decode& d) { return d.plan.workspace_bytes; })
      .def_property_readonly("shared_bytes", [](const Decode& d) { return d.plan.shared_bytes; })
      .def_property_readonly("logits_in_shared", [](const Decode& d) { return d.plan.logits_in_shared; })
      .def_property_readonly("copy_bytes", [](const Decode& d) { return d.plan.copy_bytes; })
      .def_property_readonly("n_blocks", [](const Decode& d) { return d.plan.n_blocks; })
      .def("log_prob", &Decode::log_prob)
      .def("topk", &Decode::topk)
      .def("sample", &Decode::sample);
  py::class_<Lstm>(m, "Lstm", py::module_local())
      .def(py::init<int, int, int, int, int>())
      .def_property_readonly("forward_units", [](const Lstm& l) { return l.plan.forward_units; })
      .def_property_readonly("forward_blocks", [](const Lstm& l) { return l.plan.forward_blocks; })
      .def_property_readonly("backward_blocks", [](const Lstm& l) { return l.plan.backward_blocks; })
      .def_property_readonly("padded_width", [](const Lstm& l) { return l.shape.padded; })
      .def("forward", &Lstm::forward)
      .def("backward", &Lstm::backward);
  m.def("versions", [] {
    int runtime, driver;
    cuda_versions(runtime, driver);
    return py::make_tuple(runtime, driver);
  });
  m.attr("MAX_ROWS") = MAX_ROWS;
  m.attr("MAX_K") = MAX_K;
}
