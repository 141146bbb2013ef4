// Python binding of embedding.
#include "bindings/bind.h"
#include "ops/embedding/op.h"

namespace halfbyte::embedding {

void bind(py::module_& m) {
  m.def(
      "embedding",
      [](uintptr_t codes, int64_t n, int64_t k, int64_t ld, int bits, bool nf4, uintptr_t scale, int64_t group,
         uintptr_t group_scale, int group_scale_type, uintptr_t zero, uintptr_t minimum, uintptr_t ids, int64_t rows,
         uintptr_t out, int64_t ldo, int out_type, int threads) {
        Args args{};
        args.codes = pointer<const void>(codes);
        args.n = n;
        args.k = k;
        args.ld = ld;
        args.bits = bits;
        args.nf4 = nf4;
        args.scale = pointer<const float>(scale);
        args.group = group;
        args.group_scale = pointer<const void>(group_scale);
        args.group_scale_type = dtype(group_scale_type);
        args.zero = pointer<const int8_t>(zero);
        args.minimum = pointer<const void>(minimum);
        args.ids = pointer<const int64_t>(ids);
        args.m = rows;
        args.out = pointer<void>(out);
        args.ldo = ldo;
        args.out_type = dtype(out_type);
        run(args, threads);
      },
      py::call_guard<py::gil_scoped_release>());
}

}  // namespace halfbyte::embedding
