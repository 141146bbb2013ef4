// The table of spmm_block_f32.
#include "ops/spmm_block_f32/op.h"

#include "core/linear.h"
#include "ops/spmm_block_f32/kernel.h"

namespace halfbyte::spmm_block_f32 {
namespace {

constexpr const GemmKernel* kernels[] = {
#define KERNEL(isa) &kernel_##isa,
#include "ops/spmm_block_f32/kernels.inc"
#undef KERNEL
};

}  // namespace

constinit const LinearOp op = {"spmm_block_f32", 32, 32, kernels, Layout::blocks};

OpTable table() { return op_table<GemmKernel>(op.name, kernels, &op); }

}  // namespace halfbyte::spmm_block_f32
