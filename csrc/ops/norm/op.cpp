// norm: checks, choice of the kernel, rows split over threads.
#include "ops/norm/op.h"

#include <algorithm>
#include <cmath>

#include "core/check.h"
#include "core/dispatch.h"
#include "core/parallel.h"
#include "core/workspace.h"

namespace halfbyte::norm {
namespace {

constexpr const Kernel* kernels[] = {
#define KERNEL(isa) &kernel_##isa,
#include "ops/norm/kernels.inc"
#undef KERNEL
};

// Below this many elements (about 5 us of work) a second thread costs more than it saves.
constexpr int64_t elements_per_thread = 32 * 1024;

thread_local Workspace workspace;  // a scratch row for each thread of a call

void check_matrix(const char* what, const void* memory, int64_t ld, DType type, int64_t m, int64_t k) {
  check(memory || m == 0 || k == 0, "norm: ", what, " has no memory");
  check(type != DType::i32, "norm: ", what, " must be float32, bfloat16 or float16");
  check(m <= 1 || ld >= k, "norm: rows of ", what, " overlap: stride ", ld, " for ", k, " elements");
}

void check_codes(const Args& args, int64_t m) {
  quantize_rows::Args codes = *args.codes;
  check(args.k > 0, "norm: rows of no elements have no codes");
  check(m == 0 || (codes.codes && codes.scale && codes.sum), "norm: codes, scale or sum have no memory");
  check(m <= 1 || codes.ldc >= codes.codes_per_row(), "norm: rows of codes overlap: stride ", codes.ldc, " for ",
        codes.codes_per_row(), " codes");
  codes.k = args.k;
  codes.x_type = DType::f32;
  quantize_rows::run(codes, 0, 1);  // no rows: its other checks alone
}

}  // namespace

OpTable table() { return op_table<Kernel>("norm", kernels); }

const Kernel& select() { return halfbyte::select<Kernel>(kernels, active_isas()); }

void check_parameters(const char* op, const Parameters& norm) {
  check(norm.kind == Kind::layer || !norm.bias, op, ": an rms norm has no bias");
  check(std::isfinite(norm.eps) && norm.eps >= 0, op, ": eps must be finite and not negative, got ", norm.eps);
}

void run(const Args& args, int64_t m, int threads) {
  const int64_t k = args.k;
  check(m >= 0 && k >= 0, "norm: negative shape [", m, ", ", k, "]");
  check(k <= quantize_rows::max_k, "norm: k ", k, " exceeds ", quantize_rows::max_k);
  check_matrix("x", args.x, args.ldx, args.x_type, m, k);
  if (args.residual) check_matrix("the residual", args.residual, args.ldr, args.residual_type, m, k);
  if (args.sum_out) check_matrix("the sum", args.sum_out, args.lds, args.sum_type, m, k);
  if (args.out) check_matrix("the output", args.out, args.ldo, args.out_type, m, k);
  check(m == 0 || k == 0 || args.sum_out || args.out || args.codes, "norm: no sum, output or codes to write");
  check_parameters("norm", args);
  if (args.codes) check_codes(args, m);
  if (m == 0 || k == 0) return;
  const Kernel& kernel = select();
  const int64_t useful = 1 + m * k / elements_per_thread;
  const int wanted = static_cast<int>(std::min<int64_t>({threads > 0 ? threads : default_threads(), useful, m}));
  const int64_t row_bytes = (k + 15) / 16 * 64;
  uint8_t* const scratch = workspace.reserve(wanted * row_bytes);
  parallel(wanted, [&](Team& team) {
    Args mine = args;
    mine.scratch = reinterpret_cast<float*>(scratch + team.rank * row_bytes);
    kernel.rows(mine, m * team.rank / team.size, m * (team.rank + 1) / team.size);
  });
}

}  // namespace halfbyte::norm
