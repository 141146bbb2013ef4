// The linear ops: checks, choice of the kernels, hand-over to the driver.
#include "core/linear.h"

#include <cmath>

#include "core/check.h"
#include "core/driver.h"

namespace halfbyte {
namespace {

void check_args(const PackedWeight& packed, const LinearArgs& args) {
  const char* const op = packed.format.op->name;
  check(args.m >= 0, op, ": negative row count ", args.m);
  check(args.m <= 1 || args.lda >= packed.k, op, ": rows of x overlap: stride ", args.lda, " for ", packed.k, " elements");
  check(args.m <= 1 || args.ldc >= packed.n, op, ": rows of the output overlap: stride ", args.ldc, " for ", packed.n,
        " elements");
  check(args.m == 0 || packed.k == 0 || args.a, op, ": x has no memory");
  check(args.m == 0 || packed.n == 0 || args.c, op, ": the output has no memory");
  check(args.a_type != DType::i32, op, ": x must be float32, bfloat16 or float16");
  check(args.c_type != DType::i32 || !packed.grouped(), op,
        ": this weight has sums per group of k, so there is no int32 output of one raw accumulator");
  check(args.c_type != DType::i32 || (!args.bias && !args.residual && args.activation == Activation::none), op,
        ": int32 output is the raw accumulator and takes no bias, activation or residual");
  check(!args.residual || args.residual_type != DType::i32, op, ": the residual must be a float type");
  check(!args.residual || args.m <= 1 || args.ldr >= packed.n || args.ldr == 0, op,
        ": rows of the residual overlap: stride ", args.ldr, " for ", packed.n, " elements");
  check(!args.gate || (same_codes(packed, *args.gate) && packed.n == args.gate->n), op,
        ": the gate must have the shape and scheme of the weight");
  check(!args.gate || args.c_type != DType::i32, op, ": a gated product has no int32 output");
  if (args.norm) {
    check(packed.k > 0 && packed.k <= quantize_rows::max_k, op, ": a norm is of 1 to ", quantize_rows::max_k,
          " elements, not ", packed.k);
    norm::check_parameters(op, *args.norm);
  }
  if (args.static_scale == 0) return;
  check(packed.format.activation_group == 0, op, ": activations are scaled per group here; a static scale is per tensor");
  check(std::isfinite(args.static_scale) && args.static_scale >= 0x1p-100f, op,
        ": a static scale must be finite and at least 2^-100, got ", args.static_scale);
  check(args.static_zero >= -128 && args.static_zero <= 127, op, ": a static zero point must lie in [-128, 127], got ",
        args.static_zero);
}

bool same_input(const LinearArgs& a, const LinearArgs& b) {
  return a.m == b.m && a.a == b.a && a.lda == b.lda && a.a_type == b.a_type && a.norm == b.norm &&
         a.static_scale == b.static_scale && a.static_zero == b.static_zero && a.threads == b.threads;
}

quantize_rows::Args input_of(const LinearArgs& args) {
  quantize_rows::Args a{};
  a.x = args.a;
  a.ldx = args.lda;
  a.x_type = args.a_type;
  a.static_scale = args.static_scale;
  a.static_zero = args.static_zero;
  return a;
}

Product product_of(const PackedWeight& packed, const LinearArgs& args) {
  Product p{};
  p.packed = &packed;
  p.out.bias = args.bias;
  p.out.activation = args.activation;
  p.out.c = args.c;
  p.out.ldc = args.ldc;
  p.out.c_type = args.c_type;
  p.out.residual = args.residual;
  p.out.ldr = args.ldr;
  p.out.residual_type = args.residual_type;
  p.gate = args.gate;
  p.gate_bias = args.gate_bias;
  return p;
}

}  // namespace

const LinearOp& linear_op(const std::string& name) {
  std::string known;
  for (const OpTable& table : op_tables()) {
    if (!table.linear) continue;
    if (name == table.op) return *table.linear;
    known += std::string(known.empty() ? "" : ", ") + table.op;
  }
  fail("no linear op '", name, "': there are ", known);
}

void run_linear(const PackedWeight& packed, const LinearArgs& args) {
  check_args(packed, args);
  if (args.m == 0 || packed.n == 0) return;
  const Product product = product_of(packed, args);
  gemm({&product, 1}, input_of(args), args.norm, args.m, args.threads);
}

void run_linears(std::span<const LinearCall> calls) {
  check(!calls.empty() && calls.size() <= max_products, "linears: takes 1 to ", max_products, " weights, not ", calls.size());
  const LinearArgs& first = calls[0].args;
  Product products[max_products];
  int64_t columns = 0;
  for (size_t i = 0; i < calls.size(); ++i) {
    const auto& [packed, args] = calls[i];
    check(same_codes(*packed, *calls[0].packed), "linears: weight ", i,
          " is of another op or quantizes x in another way than weight 0");
    check(same_input(args, first), "linears: call ", i, " differs from call 0 in m, x, the norm, the static scale or the threads");
    check_args(*packed, args);
    products[i] = product_of(*packed, args);
    columns += packed->n;
  }
  if (first.m > 0 && columns > 0) gemm({products, calls.size()}, input_of(first), first.norm, first.m, first.threads);
}

}  // namespace halfbyte
