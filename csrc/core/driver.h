// One linear op from float rows to float rows.
#pragma once
#include "core/multiply.h"

namespace halfbyte {

struct GemmCall {
  quantize_rows::Args a;  // x, ldx, x_type and the static scale are the caller's; the driver fills in the rest
  EpilogueArgs out;       // c, ldc, c_type, bias, activation and residual are the caller's
  int64_t m;
  int threads;  // 0: default
};

void gemm(const PackedWeight& packed, GemmCall call);

}  // namespace halfbyte
