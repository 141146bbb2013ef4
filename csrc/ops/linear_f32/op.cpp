// The table of linear_f32.
#include "ops/linear_f32/op.h"

#include "core/linear.h"
#include "ops/linear_f32/kernel.h"

namespace halfbyte::linear_f32 {
namespace {

constexpr const GemmKernel* kernels[] = {
#define KERNEL(isa) &kernel_##isa,
#include "ops/linear_f32/kernels.inc"
#undef KERNEL
};

}  // namespace

constinit const LinearOp op = {"linear_f32", 32, 32, kernels};

OpTable table() { return op_table<GemmKernel>(op.name, kernels, &op); }

}  // namespace halfbyte::linear_f32
