// linear_w8a8: checks, choice of the kernels, hand-over to the driver.
#include "ops/linear_w8a8/op.h"

#include <cmath>
#include <cstring>

#include "core/check.h"
#include "core/dispatch.h"
#include "core/driver.h"

namespace halfbyte::linear_w8a8 {
namespace {

constexpr const GemmKernel* kernels[] = {
#define KERNEL(isa) &kernel_##isa,
#include "ops/linear_w8a8/kernels.inc"
#undef KERNEL
};

void check_args(const PackedWeight& packed, const Args& args) {
  check(std::strcmp(packed.op, "linear_w8a8") == 0, "linear_w8a8: the weight was packed for ", packed.op);
  check(args.m >= 0, "linear_w8a8: negative row count ", args.m);
  check(args.m <= 1 || args.lda >= packed.k, "linear_w8a8: rows of x overlap: stride ", args.lda, " for ", packed.k,
        " elements");
  check(args.m <= 1 || args.ldc >= packed.n, "linear_w8a8: rows of the output overlap: stride ", args.ldc, " for ",
        packed.n, " elements");
  check(args.m == 0 || packed.k == 0 || args.a, "linear_w8a8: x has no memory");
  check(args.m == 0 || packed.n == 0 || args.c, "linear_w8a8: the output has no memory");
  check(args.a_type != DType::i32, "linear_w8a8: x must be float32, bfloat16 or float16");
  check(args.c_type != DType::i32 || (!args.bias && !args.residual && args.activation == Activation::none),
        "linear_w8a8: int32 output is the raw accumulator and takes no bias, activation or residual");
  check(!args.residual || args.residual_type != DType::i32, "linear_w8a8: the residual must be a float type");
  check(!args.residual || args.m <= 1 || args.ldr >= packed.n || args.ldr == 0,
        "linear_w8a8: rows of the residual overlap: stride ", args.ldr, " for ", packed.n, " elements");
  check(args.static_scale == 0 || (std::isfinite(args.static_scale) && args.static_scale >= 0x1p-100f),
        "linear_w8a8: a static scale must be finite and at least 2^-100, got ", args.static_scale);
  check(args.static_scale == 0 || (args.static_zero >= -128 && args.static_zero <= 127),
        "linear_w8a8: a static zero point must lie in [-128, 127], got ", args.static_zero);
}

}  // namespace

OpTable table() { return op_table<GemmKernel>("linear_w8a8", kernels); }

void run(const PackedWeight& packed, const Args& args) {
  check_args(packed, args);
  if (args.m == 0 || packed.n == 0) return;
  GemmCall call{};
  call.a.x = args.a;
  call.a.ldx = args.lda;
  call.a.x_type = args.a_type;
  call.a.k = packed.k;
  call.a.static_scale = args.static_scale;
  call.a.static_zero = args.static_zero;
  call.out.bias = args.bias;
  call.out.activation = args.activation;
  call.out.c = args.c;
  call.out.ldc = args.ldc;
  call.out.c_type = args.c_type;
  call.out.residual = args.residual;
  call.out.ldr = args.ldr;
  call.out.residual_type = args.residual_type;
  call.m = args.m;
  call.threads = args.threads;
  gemm(select<GemmKernel>(kernels, active_isas()), quantize_rows::select(), packed, call);
}

}  // namespace halfbyte::linear_w8a8
