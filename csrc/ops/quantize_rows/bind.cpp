// Python binding of quantize_rows.
#include "bindings/bind.h"
#include "ops/quantize_rows/op.h"

namespace halfbyte::quantize_rows {

void bind(py::module_& m) {
  m.def(
      "quantize_rows",
      [](int64_t rows, int64_t k, uintptr_t x, int64_t ldx, int x_type, uintptr_t codes, int64_t ldc, uintptr_t scale,
         uintptr_t zero, uintptr_t sum, bool symmetric, float static_scale, int32_t static_zero, int64_t group, bool wide16, int threads) {
        Args args{};
        args.x = pointer<const void>(x);
        args.ldx = ldx;
        args.x_type = dtype(x_type);
        args.k = k;
        args.k_padded = k;
        args.codes = pointer<void>(codes);
        args.ldc = ldc;
        args.bits = wide16 ? 16 : 8;
        args.wide = wide16;
        args.group = group;
        args.scale_per_group = group > 0;
        args.scale = pointer<float>(scale);
        args.zero = pointer<int32_t>(zero);
        args.sum = pointer<int32_t>(sum);
        args.symmetric = symmetric;
        args.static_scale = static_scale;
        args.static_zero = static_zero;
        run(args, rows, threads);
      },
      py::call_guard<py::gil_scoped_release>());
}

}  // namespace halfbyte::quantize_rows
