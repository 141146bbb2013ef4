// The table of spmm_block_w4a8.
#include "ops/spmm_block_w4a8/op.h"

#include "core/linear.h"
#include "ops/spmm_block_w4a8/kernel.h"

namespace halfbyte::spmm_block_w4a8 {
namespace {

constexpr const GemmKernel* kernels[] = {
#define KERNEL(isa) &kernel_##isa,
#include "ops/spmm_block_w4a8/kernels.inc"
#undef KERNEL
};

}  // namespace

constinit const LinearOp op = {"spmm_block_w4a8", 4, 8, kernels, Layout::blocks};

OpTable table() { return op_table<GemmKernel>(op.name, kernels, &op); }

}  // namespace halfbyte::spmm_block_w4a8
