// Python binding of linear_w8a8.
#include "bindings/bind.h"
#include "ops/linear_w8a8/op.h"

namespace halfbyte::linear_w8a8 {

void bind(py::module_& m) {
  m.def(
      "pack_linear_w8a8",
      [](uintptr_t codes, int64_t n, int64_t k, int64_t ld, uintptr_t scale, int threads) {
        return pack(pointer<const int8_t>(codes), n, k, ld, pointer<const float>(scale), threads);
      },
      py::arg("codes"), py::arg("n"), py::arg("k"), py::arg("ld"), py::arg("scale"), py::arg("threads") = 0,
      py::call_guard<py::gil_scoped_release>());
  m.def(
      "unpack_linear_w8a8",
      [](const PackedWeight& packed, uintptr_t codes, int64_t ld) { unpack(packed, pointer<int8_t>(codes), ld); },
      py::call_guard<py::gil_scoped_release>());
  m.def(
      "linear_w8a8",
      [](const PackedWeight& packed, int64_t rows, uintptr_t a, int64_t lda, int a_type, uintptr_t c, int64_t ldc,
         int c_type, uintptr_t bias, int activation_code, uintptr_t residual, int64_t ldr, int residual_type,
         float static_scale, int32_t static_zero, int threads) {
        run(packed, {rows, pointer<const void>(a), lda, dtype(a_type), pointer<void>(c), ldc, dtype(c_type),
                     pointer<const float>(bias), activation(activation_code), pointer<const void>(residual), ldr,
                     dtype(residual_type), static_scale, static_zero, threads});
      },
      py::call_guard<py::gil_scoped_release>());
}

}  // namespace halfbyte::linear_w8a8
