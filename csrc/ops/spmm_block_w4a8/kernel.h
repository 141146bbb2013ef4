// The kernels of spmm_block_w4a8, declared from their list.
#pragma once
#include "core/gemm.h"

namespace halfbyte::spmm_block_w4a8 {

#define KERNEL(isa) extern const GemmKernel kernel_##isa;
#include "ops/spmm_block_w4a8/kernels.inc"
#undef KERNEL

}  // namespace halfbyte::spmm_block_w4a8
