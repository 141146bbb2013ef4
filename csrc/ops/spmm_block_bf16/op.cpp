// The table of spmm_block_bf16.
#include "ops/spmm_block_bf16/op.h"

#include "core/linear.h"
#include "ops/spmm_block_bf16/kernel.h"

namespace halfbyte::spmm_block_bf16 {
namespace {

constexpr const GemmKernel* kernels[] = {
#define KERNEL(isa) &kernel_##isa,
#include "ops/spmm_block_bf16/kernels.inc"
#undef KERNEL
};

}  // namespace

constinit const LinearOp op = {"spmm_block_bf16", 16, 32, kernels, Layout::blocks};

OpTable table() { return op_table<GemmKernel>(op.name, kernels, &op); }

}  // namespace halfbyte::spmm_block_bf16
