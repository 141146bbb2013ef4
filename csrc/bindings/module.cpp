// The extension module halfbyte._core (signatures: python/halfbyte/_core.pyi).
#include <algorithm>
#include <optional>

#include "bindings/bind.h"
#include "ceiling/ceiling.h"
#include "core/dispatch.h"
#include "core/parallel.h"

namespace halfbyte {

#define OP(name) \
  namespace name { \
  void bind(py::module_& m); \
  }
#include "bound_ops.inc"
#undef OP
void bind_linear(py::module_& m);
void bind_torch_call(py::module_& m);
void bind_fused(py::module_& m);
void bind_watch(py::module_& m);

namespace {

py::dict cpu_features() {
  py::dict features;
  for (const IsaInfo& isa : isas()) features[isa.name] = (supported_isas() & isa.bit) != 0;
  return features;
}

py::list kernels() {
  py::list rows;
  for (const OpTable& table : op_tables()) {
    for (const KernelInfo* kernel : table.best_first) {
      py::dict row;
      row["op"] = table.op;
      row["name"] = kernel->name;
      row["isa"] = kernel->isa;
      row["supported"] = (supported_isas() & kernel->needs) != 0;
      rows.append(row);
    }
  }
  return rows;
}

std::string select_for(const std::string& op, const std::optional<std::vector<std::string>>& names) {
  if (!names) return selected_name(op, active_isas());
  uint32_t available = isa_scalar;
  for (const std::string& name : *names) available |= isa_info(name).bit;
  return selected_name(op, available);
}

std::optional<std::string> force(const std::optional<std::string>& name) {
  const std::string previous = force_isa(name.value_or(""));
  return previous.empty() ? std::nullopt : std::optional(previous);
}

py::dict build_info() {
  std::vector<std::string> built, emulated;
  for (const OpTable& table : op_tables()) {
    for (const KernelInfo* kernel : table.best_first) {
      if (std::find(built.begin(), built.end(), kernel->isa) == built.end()) built.emplace_back(kernel->isa);
    }
  }
#if HALFBYTE_EMULATE
  for (const char* name : {"avx_vnni", "amx_int8"}) {
    if (supported_isas() & isa_info(name).bit) emulated.emplace_back(name);
  }
#endif
  py::dict info;
  info["version"] = HALFBYTE_VERSION;
  info["compiler"] = HALFBYTE_COMPILER;
  info["isas"] = built;
  info["emulated"] = emulated;
  return info;
}

py::dict runtime() {
  const ThreadRuntime found = thread_runtime();
  py::dict info;
  info["name"] = found.name;
  info["library"] = found.library;
  info["threads"] = default_threads();
  return info;
}

void set_threads(int threads) {
  check(threads >= 0, "set_num_threads: ", threads, " is negative; give a count, or 0 to follow the runtime");
  set_num_threads(threads);
}

}  // namespace
}  // namespace halfbyte

PYBIND11_MODULE(_core, m, pybind11::mod_gil_not_used()) {
  using namespace halfbyte;
  m.doc() = "Kernels, packing and dispatch of halfbyte.";
  m.def("cpu_features", cpu_features);
  m.def("kernels", kernels);
  m.def("select", select_for, py::arg("op"), py::arg("isas") = py::none());
  m.def("force_isa", force, py::arg("isa"));
  m.def("build_info", build_info);
  m.def("thread_runtime", runtime);
  m.def("get_num_threads", default_threads);
  m.def("set_num_threads", set_threads);
  m.def("measure_peak", measure_peak, py::call_guard<py::gil_scoped_release>());
  m.def("measure_read", measure_read, py::call_guard<py::gil_scoped_release>());
#define OP(name) name::bind(m);
#include "bound_ops.inc"
#undef OP
  bind_linear(m);
  bind_torch_call(m);
  bind_fused(m);
  bind_watch(m);
}
