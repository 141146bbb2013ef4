// What follows a product of int8 matrices that another library made: int32 sums -> y, as the int8 linear ops end.
#include "cuda/finish.cuh"

#include "cuda/kernels.h"
#include "cuda/layout.h"
#include "cuda/values.cuh"

namespace halfbyte::cuda {

struct FinishArgs {
  halfbyte_cuda_finish call;
  int vectors;  // all operands are aligned for four elements at once
};

// A thread has four neighbouring columns of four rows: what belongs to the columns is read once for the rows.
constexpr int finish_threads = 128, finish_columns = 4, finish_rows = 4;

HALFBYTE_KERNEL(finish_threads, 6) finish_products(const FinishArgs args) {
  const halfbyte_cuda_finish& call = args.call;
  const int n = (block_y() * finish_threads + thread()) * finish_columns;
  const int64_t first = static_cast<int64_t>(block_x()) * finish_rows;
  if (n >= call.n) return;
  if (!args.vectors || n + finish_columns > call.n) {
    const Scales scales{call.x_scale, call.x_zero, call.scale, call.total, call.bias};
    const Output output{call.y, call.residual, call.ldy, call.ld_residual, call.y_type, call.residual_type};
    for (int64_t m = first; m < first + finish_rows && m < call.m; ++m) {
      for (int j = n; j < n + finish_columns && j < call.n; ++j) {
        output.store(activate(scales.from_int(call.acc[m * call.ld_acc + j], m, j), call.activation), m, j);
      }
    }
    return;
  }

  Word4 acc[finish_rows];
  float residual[finish_rows][finish_columns];
#pragma unroll
  for (int r = 0; r < finish_rows; ++r) {
    if (first + r < call.m) acc[r] = load16(call.acc + (first + r) * call.ld_acc + n);
  }
#pragma unroll
  for (int r = 0; r < finish_rows; ++r) {
    const bool there = call.residual && first + r < call.m;
    const int type = call.residual_type;
    if (there) load4(row_of(call.residual, first + r, call.ld_residual, float_bytes(type)), n, type, residual[r]);
  }
  float scale[finish_columns], bias[finish_columns] = {};
  Word4 total{};
  load4(call.scale, n, HALFBYTE_F32, scale);
  if (call.bias) load4(call.bias, n, HALFBYTE_F32, bias);
  if (call.x_zero) total = load16(call.total + n);
  const int32_t totals[finish_columns] = {static_cast<int32_t>(total.x), static_cast<int32_t>(total.y),
                                          static_cast<int32_t>(total.z), static_cast<int32_t>(total.w)};
#pragma unroll
  for (int r = 0; r < finish_rows; ++r) {
    const int64_t m = first + r;
    if (m >= call.m) continue;
    // Of what is in registers: row 0, columns 0 .. 3. (A pointer that may be null would bring them into memory.)
    const float x_scale = call.x_scale[m];
    const int32_t x_zero = call.x_zero ? call.x_zero[m] : 0;
    const Scales scales{&x_scale, &x_zero, scale, totals, nullptr};
    const uint32_t sums[finish_columns] = {acc[r].x, acc[r].y, acc[r].z, acc[r].w};
    float y[finish_columns];
#pragma unroll
    for (int j = 0; j < finish_columns; ++j) {
      y[j] = scales.from_int(static_cast<int32_t>(sums[j]), 0, j);
      if (call.bias) y[j] = add_rn(y[j], bias[j]);
      y[j] = activate(y[j], call.activation);
      if (call.residual) y[j] = add_rn(y[j], residual[r][j]);
    }
    store4(row_of(call.y, m, call.ldy, float_bytes(call.y_type)), n, call.y_type, y);
  }
}

namespace {

bool is_float(int type) { return type >= HALFBYTE_F32 && type <= HALFBYTE_F16; }

int check(const halfbyte_cuda_finish& c) {
  const bool rows = c.m <= 1 || (c.ld_acc >= c.n && c.ldy >= c.n);
  if (c.m < 0 || c.n < 0 || !rows || !is_float(c.y_type) || (c.residual && !is_float(c.residual_type)) ||
      c.activation < HALFBYTE_NONE || c.activation > HALFBYTE_SILU) {
    return HALFBYTE_CUDA_BAD_ARGUMENT;
  }
  if (c.m == 0 || c.n == 0) return 0;
  if (!c.acc || !c.x_scale || !c.scale || !c.y || (c.x_zero && !c.total)) return HALFBYTE_CUDA_BAD_ARGUMENT;
  const auto natural = [](const void* p, int bytes) { return reinterpret_cast<uintptr_t>(p) % bytes == 0; };
  const bool all = natural(c.acc, 4) && natural(c.x_scale, 4) && natural(c.x_zero, 4) && natural(c.scale, 4) &&
                   natural(c.total, 4) && natural(c.bias, 4) && natural(c.y, float_bytes(c.y_type)) &&
                   (!c.residual || natural(c.residual, float_bytes(c.residual_type)));
  return all ? 0 : HALFBYTE_CUDA_ALIGNMENT;
}

bool takes_vectors(const halfbyte_cuda_finish& c) {
  const auto floats = [&](const void* p, int64_t ld, int type) {
    return rows_aligned(p, ld, c.m, float_bytes(type), 4 * float_bytes(type));
  };
  return rows_aligned(c.acc, c.ld_acc, c.m, 4, 16) && floats(c.y, c.ldy, c.y_type) &&
         (!c.residual || floats(c.residual, c.ld_residual, c.residual_type)) && rows_aligned(c.scale, 0, 1, 4, 16) &&
         rows_aligned(c.total, 0, 1, 4, 16) && rows_aligned(c.bias, 0, 1, 4, 16);
}

}  // namespace

int finish_run(const halfbyte_cuda_finish& call, void* stream) {
  if (const int error = check(call); error || call.m == 0 || call.n == 0) return error;
  const int64_t columns = ceil_div(call.n, finish_threads * finish_columns);
  if (columns > 65535) return HALFBYTE_CUDA_BAD_ARGUMENT;  // what a grid takes along y: n up to 33 million
  const Launch how{{ceil_div(call.m, finish_rows), columns, 1}, finish_threads, 0, 1, stream};
  return launch<finish_products>(how, FinishArgs{call, takes_vectors(call)});
}

}  // namespace halfbyte::cuda
