// Python binding of rope.
#include <array>

#include "bindings/bind.h"
#include "ops/rope/op.h"

namespace halfbyte::rope {
namespace {

using Strides = std::array<int64_t, 3>;  // of a batch, a row and a head

Heads heads_of(uintptr_t data, int type, const Strides& strides) {
  return {pointer<void>(data), dtype(type), strides[0], strides[1], strides[2]};
}

}  // namespace

void bind(py::module_& m) {
  m.def(
      "rope",
      [](int64_t rows, int64_t tokens, int64_t heads, int64_t head_size, uintptr_t x, int x_type,
         const Strides& x_strides, uintptr_t out, int out_type, const Strides& out_strides, int64_t rotary_dims,
         bool interleaved, uintptr_t cos, uintptr_t sin, int64_t table, uintptr_t positions, int64_t first_position,
         int threads) {
        Args args{};
        args.x = heads_of(x, x_type, x_strides);
        args.out = heads_of(out, out_type, out_strides);
        args.heads = heads;
        args.head_size = head_size;
        args.tokens = tokens;
        args.rotary_dims = rotary_dims;
        args.interleaved = interleaved;
        args.cos = pointer<const float>(cos);
        args.sin = pointer<const float>(sin);
        args.table = table;
        args.positions = pointer<const int64_t>(positions);
        args.first_position = first_position;
        run(args, rows, threads);
      },
      py::call_guard<py::gil_scoped_release>());
}

}  // namespace halfbyte::rope
