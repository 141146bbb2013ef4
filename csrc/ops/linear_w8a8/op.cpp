// The table of linear_w8a8.
#include "ops/linear_w8a8/op.h"

#include "core/linear.h"
#include "ops/linear_w8a8/kernel.h"

namespace halfbyte::linear_w8a8 {
namespace {

constexpr const GemmKernel* kernels[] = {
#define KERNEL(isa) &kernel_##isa,
#include "ops/linear_w8a8/kernels.inc"
#undef KERNEL
};

}  // namespace

constinit const LinearOp op = {"linear_w8a8", 8, 8, kernels};

OpTable table() { return op_table<GemmKernel>(op.name, kernels, &op); }

}  // namespace halfbyte::linear_w8a8
