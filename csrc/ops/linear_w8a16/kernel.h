// The kernels of linear_w8a16, declared from their list.
#pragma once
#include "core/gemm.h"

namespace halfbyte::linear_w8a16 {

#define KERNEL(isa) extern const GemmKernel kernel_##isa;
#include "ops/linear_w8a16/kernels.inc"
#undef KERNEL

}  // namespace halfbyte::linear_w8a16
