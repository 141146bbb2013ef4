// The loops around the micro-kernels: activation quantization, blocking, threads, epilogue.
#pragma once
#include "core/gemm.h"
#include "core/packed_weight.h"
#include "ops/quantize_rows/op.h"

namespace halfbyte {

struct GemmCall {
  quantize_rows::Args a;  // x, ldx, x_type, k and the static scale are the caller's; the driver fills in the rest
  EpilogueArgs out;       // c, ldc, c_type, bias, activation and residual are the caller's
  int64_t m;
  int threads;  // 0: default
};

void gemm(const GemmKernel& kernel, const quantize_rows::Kernel& quantizer, const PackedWeight& packed, GemmCall call);

}  // namespace halfbyte
