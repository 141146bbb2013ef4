// The table of linear_w8a16.
#include "ops/linear_w8a16/op.h"

#include "core/linear.h"
#include "ops/linear_w8a16/kernel.h"

namespace halfbyte::linear_w8a16 {
namespace {

constexpr const GemmKernel* kernels[] = {
#define KERNEL(isa) &kernel_##isa,
#include "ops/linear_w8a16/kernels.inc"
#undef KERNEL
};

}  // namespace

constinit const LinearOp op = {"linear_w8a16", 8, 16, kernels};

OpTable table() { return op_table<GemmKernel>(op.name, kernels, &op); }

}  // namespace halfbyte::linear_w8a16
