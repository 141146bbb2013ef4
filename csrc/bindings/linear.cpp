// Python binding of packed weights and of the linear ops.
#include "bindings/bind.h"
#include "core/linear.h"

namespace halfbyte {

void bind_linear(py::module_& m) {
  py::class_<PackedWeight, std::shared_ptr<PackedWeight>>(m, "PackedWeight")
      .def_property_readonly("op", [](const PackedWeight& p) { return p.format.op->name; })
      .def_readonly("n", &PackedWeight::n)
      .def_readonly("k", &PackedWeight::k)
      .def_property_readonly("group", [](const PackedWeight& p) { return p.format.group; })
      .def_property_readonly("activation_group", [](const PackedWeight& p) { return p.format.activation_group; })
      .def_property_readonly("nbytes", &PackedWeight::nbytes)
      .def_property_readonly("stored", &PackedWeight::stored);
  m.def(
      "pack_linear",
      [](const std::string& op, uintptr_t codes, int64_t n, int64_t k, int64_t ld, uintptr_t scale, int64_t group,
         uintptr_t group_scale, int group_scale_type, uintptr_t zero, uintptr_t minimum, bool nf4, int64_t activation_group,
         int threads) {
        return pack_linear(linear_op(op),
                           {.n = n, .k = k, .codes = pointer<const void>(codes), .ld = ld,
                            .scale = pointer<const float>(scale), .group = group,
                            .group_scale = pointer<const void>(group_scale), .group_scale_type = dtype(group_scale_type),
                            .zero = pointer<const int8_t>(zero), .minimum = pointer<const void>(minimum), .nf4 = nf4,
                            .activation_group = activation_group},
                           threads);
      },
      py::arg("op"), py::arg("codes"), py::arg("n"), py::arg("k"), py::arg("ld"), py::arg("scale"), py::arg("group") = 0,
      py::arg("group_scale") = 0, py::arg("group_scale_type") = 0, py::arg("zero") = 0, py::arg("minimum") = 0,
      py::arg("nf4") = false, py::arg("activation_group") = 0, py::arg("threads") = 0,
      py::call_guard<py::gil_scoped_release>());
  m.def(
      "pack_float",
      [](uintptr_t weight, int type, int64_t n, int64_t k, int64_t ld, int threads) {
        return pack_float(pointer<const void>(weight), dtype(type), n, k, ld, threads);
      },
      py::arg("weight"), py::arg("dtype"), py::arg("n"), py::arg("k"), py::arg("ld"), py::arg("threads") = 0,
      py::call_guard<py::gil_scoped_release>());
  m.def(
      "pack_sparse",
      [](const std::string& op, uintptr_t weight, int type, int64_t n, int64_t k, int64_t ld, uintptr_t scale, int nonzero, int of,
         int64_t group, uintptr_t group_scale, int group_scale_type, int threads) {
        return pack_sparse(linear_op(op),
                           {.n = n, .k = k, .weight = pointer<const void>(weight), .type = dtype(type), .ld = ld,
                            .scale = pointer<const float>(scale), .nonzero = nonzero, .of = of, .group = group,
                            .group_scale = pointer<const void>(group_scale), .group_scale_type = dtype(group_scale_type)},
                           threads);
      },
      py::arg("op"), py::arg("weight"), py::arg("dtype"), py::arg("n"), py::arg("k"), py::arg("ld"), py::arg("scale") = 0,
      py::arg("nonzero") = 0, py::arg("of") = 0, py::arg("group") = 0, py::arg("group_scale") = 0, py::arg("group_scale_type") = 0,
      py::arg("threads") = 0, py::call_guard<py::gil_scoped_release>());
  m.def(
      "unpack_linear",
      [](const PackedWeight& packed, uintptr_t codes, int64_t ld) { unpack_linear(packed, pointer<void>(codes), ld); },
      py::call_guard<py::gil_scoped_release>());
  m.def(
      "linear",
      [](const PackedWeight& packed, int64_t rows, uintptr_t a, int64_t lda, int a_type, uintptr_t c, int64_t ldc,
         int c_type, uintptr_t bias, int activation_code, uintptr_t residual, int64_t ldr, int residual_type,
         float static_scale, int32_t static_zero, int threads, const PackedWeight* gate, uintptr_t gate_bias) {
        run_linear(packed, {rows, pointer<const void>(a), lda, dtype(a_type), pointer<void>(c), ldc, dtype(c_type),
                            pointer<const float>(bias), activation(activation_code), pointer<const void>(residual), ldr,
                            dtype(residual_type), static_scale, static_zero, threads, gate, pointer<const float>(gate_bias)});
      },
      py::arg("packed"), py::arg("m"), py::arg("a"), py::arg("lda"), py::arg("a_dtype"), py::arg("c"), py::arg("ldc"),
      py::arg("c_dtype"), py::arg("bias"), py::arg("activation"), py::arg("residual"), py::arg("ldr"),
      py::arg("residual_dtype"), py::arg("static_scale"), py::arg("static_zero"), py::arg("threads"),
      py::arg("gate") = nullptr, py::arg("gate_bias") = 0, py::call_guard<py::gil_scoped_release>());
  m.def(
      "linears",
      [](const std::vector<std::tuple<std::shared_ptr<PackedWeight>, uintptr_t, int64_t, uintptr_t>>& weights, int64_t rows,
         uintptr_t a, int64_t lda, int a_type, int c_type, int activation_code, float static_scale, int32_t static_zero,
         int threads) {
        LinearArgs args{};
        args.m = rows;
        args.a = pointer<const void>(a);
        args.lda = lda;
        args.a_type = dtype(a_type);
        args.c_type = dtype(c_type);
        args.activation = activation(activation_code);
        args.static_scale = static_scale;
        args.static_zero = static_zero;
        args.threads = threads;
        std::vector<LinearCall> calls;
        for (const auto& [packed, c, ldc, bias] : weights) {
          args.c = pointer<void>(c);
          args.ldc = ldc;
          args.bias = pointer<const float>(bias);
          calls.push_back({packed.get(), args});
        }
        run_linears(calls);
      },
      py::call_guard<py::gil_scoped_release>());
}

}  // namespace halfbyte
