// Python binding of norm.
#include "bindings/bind.h"
#include "ops/norm/op.h"

namespace halfbyte::norm {

void bind(py::module_& m) {
  m.def(
      "norm",
      [](bool rms, int64_t rows, int64_t k, uintptr_t x, int64_t ldx, int x_type, uintptr_t residual, int64_t ldr,
         int residual_type, uintptr_t weight, uintptr_t bias, float eps, uintptr_t sum_out, int64_t lds, int sum_type,
         uintptr_t out, int64_t ldo, int out_type, uintptr_t codes, int64_t ldc, uintptr_t scale, uintptr_t zero,
         uintptr_t sum, bool symmetric, float static_scale, int32_t static_zero, int64_t group, bool wide16,
         int threads) {
        Args args{};
        args.kind = rms ? Kind::rms : Kind::layer;
        args.k = k;
        args.x = pointer<const void>(x);
        args.ldx = ldx;
        args.x_type = dtype(x_type);
        args.residual = pointer<const void>(residual);
        args.ldr = ldr;
        args.residual_type = dtype(residual_type);
        args.weight = pointer<const float>(weight);
        args.bias = pointer<const float>(bias);
        args.eps = eps;
        args.sum_out = pointer<void>(sum_out);
        args.lds = lds;
        args.sum_type = dtype(sum_type);
        args.out = pointer<void>(out);
        args.ldo = ldo;
        args.out_type = dtype(out_type);
        quantize_rows::Args quantized{};
        if (scale) {
          quantized.k_padded = k;
          quantized.codes = pointer<void>(codes);
          quantized.ldc = ldc;
          quantized.bits = wide16 ? 16 : 8;
          quantized.wide = wide16;
          quantized.group = group;
          quantized.scale_per_group = group > 0;
          quantized.scale = pointer<float>(scale);
          quantized.zero = pointer<int32_t>(zero);
          quantized.sum = pointer<int32_t>(sum);
          quantized.symmetric = symmetric;
          quantized.static_scale = static_scale;
          quantized.static_zero = static_zero;
          args.codes = &quantized;
        }
        run(args, rows, threads);
      },
      py::call_guard<py::gil_scoped_release>());
}

}  // namespace halfbyte::norm
