// The kernels of linear_f32, declared from their list.
#pragma once
#include "core/gemm.h"

namespace halfbyte::linear_f32 {

#define KERNEL(isa) extern const GemmKernel kernel_##isa;
#include "ops/linear_f32/kernels.inc"
#undef KERNEL

}  // namespace halfbyte::linear_f32
