// quantize_rows and what is fused before it: argument checks, the choice of a kernel, its launch.
#include "cuda/rows.cuh"

#include "cuda/kernels.h"
#include "cuda/layout.h"

namespace halfbyte::cuda {
namespace {

constexpr int max_k = (1 << 24) - 1;  // as the op on the CPU

bool aligned(const void* p, int to) { return reinterpret_cast<uintptr_t>(p) % to == 0; }

int check(const halfbyte_cuda_rows& c) {
  const bool norm = is_norm(c.kind), asymmetric = !c.symmetric, fixed = c.static_scale != 0;
  const bool fits = c.m >= 0 && c.k >= 1 && c.k <= max_k && c.k_padded >= c.k &&
                    (c.m <= 1 || (c.ldc >= c.k_padded && (!c.sum || c.ld_sum >= c.k)));
  const bool known = c.x_type >= HALFBYTE_F32 && c.x_type <= HALFBYTE_F16 && c.kind >= HALFBYTE_ROWS_PLAIN &&
                     c.kind <= HALFBYTE_ROWS_SILU_MUL;
  if (!fits || !known) return HALFBYTE_CUDA_BAD_ARGUMENT;
  if ((c.sum || c.weight || c.bias) && !norm) return HALFBYTE_CUDA_BAD_ARGUMENT;
  if (c.bias && c.kind != HALFBYTE_ROWS_LAYERNORM) return HALFBYTE_CUDA_BAD_ARGUMENT;
  if (c.residual && c.kind == HALFBYTE_ROWS_PLAIN) return HALFBYTE_CUDA_BAD_ARGUMENT;
  if (norm && !(c.eps >= 0 && c.eps < infinity)) return HALFBYTE_CUDA_BAD_ARGUMENT;
  if (fixed && !(asymmetric && c.static_scale >= smallest_scale && c.static_scale < infinity && c.static_zero >= -128 &&
                 c.static_zero <= 127)) {
    return HALFBYTE_CUDA_BAD_ARGUMENT;
  }
  if (c.m == 0) return 0;
  if (!c.x || !c.codes || !c.scale || (asymmetric && !c.zero)) return HALFBYTE_CUDA_BAD_ARGUMENT;
  if (!c.residual && c.kind == HALFBYTE_ROWS_SILU_MUL) return HALFBYTE_CUDA_BAD_ARGUMENT;
  const int bytes = float_bytes(c.x_type);
  const bool natural = aligned(c.x, bytes) && aligned(c.residual, bytes) && aligned(c.sum, bytes) && aligned(c.weight, 4) &&
                       aligned(c.bias, 4) && aligned(c.scale, 4) && aligned(c.zero, 4);
  return natural ? 0 : HALFBYTE_CUDA_ALIGNMENT;
}

// Absent operands are null and have no stride that matters.
bool takes_vectors(const halfbyte_cuda_rows& c) {
  const int bytes = float_bytes(c.x_type);
  return c.k % 8 == 0 && rows_aligned(c.x, c.ldx, c.m, bytes, 16) && rows_aligned(c.codes, c.ldc, c.m, 1, 8) &&
         (!c.residual || rows_aligned(c.residual, c.ld_residual, c.m, bytes, 16)) &&
         (!c.sum || rows_aligned(c.sum, c.ld_sum, c.m, bytes, 16)) && aligned(c.weight, 16) && aligned(c.bias, 16);
}

// As few threads as hold the row in registers: a block waits less for its own threads, and more blocks fit. The number
// decides the order of the sums, hence it depends on k alone.
struct Shape {
  int values, threads;

  explicit Shape(int64_t k) {
    values = k <= rows_few * rows_threads ? rows_few : k <= rows_many * rows_threads ? rows_many : 0;
    threads = values ? static_cast<int>(32 * ceil_div(k, 32 * values)) : rows_threads;
  }
};

template <int kind, int values>
int launch_row(const Launch& how, const RowsArgs& args) {
  if (args.call.x_type == HALFBYTE_F32) return launch<quantize_row<kind, values, 4>>(how, args);
  return launch<quantize_row<kind, values, 2>>(how, args);
}

template <int kind>
int launch_rows(const Shape& shape, const Launch& how, const RowsArgs& args) {
  if (!args.vectors || shape.values == 0) return launch<quantize_long_row<kind>>(how, args);
  return shape.values == rows_few ? launch_row<kind, rows_few>(how, args) : launch_row<kind, rows_many>(how, args);
}

}  // namespace

int rows_run(const halfbyte_cuda_rows& call, void* stream) {
  if (const int error = check(call); error || call.m == 0) return error;
  const Shape shape(call.k);
  const RowsArgs args{call, takes_vectors(call)};
  const Launch how{{call.m, 1, 1}, shape.threads, rows_shared_bytes, 1, stream};
  switch (call.kind) {
    case HALFBYTE_ROWS_LAYERNORM:
      return launch_rows<HALFBYTE_ROWS_LAYERNORM>(shape, how, args);
    case HALFBYTE_ROWS_RMSNORM:
      return launch_rows<HALFBYTE_ROWS_RMSNORM>(shape, how, args);
    case HALFBYTE_ROWS_SILU_MUL:
      return launch_rows<HALFBYTE_ROWS_SILU_MUL>(shape, how, args);
    default:
      return launch_rows<HALFBYTE_ROWS_PLAIN>(shape, how, args);
  }
}

}  // namespace halfbyte::cuda
