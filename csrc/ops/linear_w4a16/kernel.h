// The kernels of linear_w4a16, declared from their list.
#pragma once
#include "core/gemm.h"

namespace halfbyte::linear_w4a16 {

#define KERNEL(isa) extern const GemmKernel kernel_##isa;
#include "ops/linear_w4a16/kernels.inc"
#undef KERNEL

}  // namespace halfbyte::linear_w4a16
