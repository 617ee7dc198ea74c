// Python bindings of csrc/cuda: addresses and sizes cross the border, so that building needs no torch. The arguments
// were checked in Python (fused_mos/_backends/cuda.py); nothing here looks at a tensor.
#include <pybind11/pybind11.h>

#include <stdexcept>

#include "decode.h"

namespace py = pybind11;
using namespace fused_mos;

namespace {

using Address = std::uintptr_t;

template <class T>
T* at(Address address) {
  return reinterpret_cast<T*>(address);
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
    if (const int error = launch_decode(arguments, plan, at<void>(stream)))
      throw std::runtime_error("CUDA error " + std::to_string(error) + ": " + error_text(error));
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

}  // namespace

PYBIND11_MODULE(FUSED_MOS_MODULE, m) {
  py::enum_<DecodeMode>(m, "DecodeMode", py::module_local())  // local: the emulation's module has one of the same name
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
  m.def("versions", [] {
    int runtime, driver;
    cuda_versions(runtime, driver);
    return py::make_tuple(runtime, driver);
  });
  m.attr("MAX_ROWS") = MAX_ROWS;
  m.attr("MAX_K") = MAX_K;
}
