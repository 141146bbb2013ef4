// norm: LayerNorm and RMSNorm of rows, with a residual added before and a quantization after.
//
//   h    = x + residual                                      float32; also what sum_out gets, rounded to its type
//   layer   mean = sum(h) / k,  d = h - mean
//           r = 1 / sqrt(sum(d^2) / k + eps)
//           y = fma(d * r, weight, bias)
//   rms     r = 1 / sqrt(sum(h^2) / k + eps)
//           y = (h * r) * weight
//
// Each operation is one in float32, in the order written. A sum is 16 partial sums and a tree (simd/sum16.h), squares
// join it by fma. An absent residual, weight or bias leaves its operation out (y = d * r, (d * r) * weight,
// (d * r) + bias). y is rounded once to the output's type; codes are made of y itself, before that, by the code of
// quantize_rows. Every kernel gives the same bits, on any number of threads.
//
// Error against exact arithmetic on the float32 row h, with u = 2^-24, c = ceil(k / 16), k <= 2^17, no underflow, no
// overflow: a sum errs by (c + 3) u sum|h|, one of squares by the factor 1 + (c + 4) u. The mean, being divided, too,
// errs by e = (c + 4) u mean|h|; sum(d^2) / k by the factor 1 + (c + 7) u, since d is rounded and occurs twice, and by
// the term e^2; r by half of that, with one rounding more for eps, and by two of its own: the factor 1 + (c/2 + 6) u,
// and e^2 / (2 v) relative to v = var + eps. With t = e / sqrt(v), z = (h - mean) / sqrt(v), and the roundings of d, of
// the product and of y:
//
//   layer   |y^ - y| <= (1 + 2^-10) (|weight| (|z| ((c/2 + 8) u + t^2 / 2) + t) + u |y|)
//   rms     |y^ - y| <= (1 + 2^-10) (c/2 + 7) u |y|
//
// A NaN or an infinity in a row makes NaN of what it reaches by IEEE arithmetic: all of the row, but for the finite
// elements of an rms row with an infinity, which are 0. Other rows do not see it. Where only the squares overflow,
// r is 0: y is 0, or the bias.
#pragma once
#include "core/kernel.h"
#include "ops/quantize_rows/op.h"

namespace halfbyte::norm {

enum class Kind : int { layer = 0, rms = 1 };

struct Parameters {
  Kind kind = Kind::layer;
  const float* weight = nullptr;  // [k]; may be null
  const float* bias = nullptr;    // [k]; may be null, and is with rms
  float eps = 0;
};
void check_parameters(const char* op, const Parameters& norm);  // throws std::invalid_argument

// Strides are elements between rows. Types are f32, bf16 or f16.
struct Args : Parameters {
  int64_t k;
  const void* x;
  int64_t ldx;
  DType x_type;
  const void* residual;  // may be null
  int64_t ldr;
  DType residual_type;
  void* sum_out;  // may be null; may be x or the residual, then of its type and stride
  int64_t lds;
  DType sum_type;
  void* out;  // may be null; may be x or the residual, as above
  int64_t ldo;
  DType out_type;
  const quantize_rows::Args* codes;  // may be null; its x, ldx, x_type and k are not read
  float* scratch;                    // [k], of the calling thread; run() brings its own
};

struct Kernel {
  KernelInfo info;
  void (*rows)(const Args& args, int64_t begin, int64_t end);
};

#define KERNEL(isa) extern const Kernel kernel_##isa;
#include "ops/norm/kernels.inc"
#undef KERNEL

const Kernel& select();  // for the calling thread, now

// m rows on up to `threads` threads (0: default). Throws std::invalid_argument.
void run(const Args& args, int64_t m, int threads);

}  // namespace halfbyte::norm
