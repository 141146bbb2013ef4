// quantize_rows: rows of floats -> integer codes, one scale, one zero point and the sum of the codes per row.
//
//   asymmetric (activations)   lo = min(0, min x), hi = max(0, max x), s = hi/255 - lo/255
//                              z = clip(rint(-(lo/s)) - 128, -128, 127)
//                              q = clip(rint(x/s) + z, -128, 127)            x ~ (q - z) * s, zero is exact
//   symmetric (weights)        s = max|x| / 127, q = clip(rint(x/s), -127, 127), z = 0
//   symmetric, 16 bits         s = max|x| / 32639, q = clip(rint(x/s), -32639, 32639), z = 0
//   static                     s and z are given
//
// In groups of k, each group of a row has a sum of its own and, where wanted, a scale of its own (symmetric then).
// 16-bit codes go to int16, or to int8 in two parts q = 256 high + low with low = -128 .. 127, so that |high| <= 127: per
// group all high parts, then all low ones, with a sum each.
//
// x/s stands for x * (1/s) with 1/s rounded to float32; rint rounds half to even. |x - (q - z)s| <= s/2 (1 + e)
// inside the range, where the rounding of the quotient, up to 255, 127 or 32639 codes, makes e = 2^-14 for asymmetric,
// 2^-15 for symmetric and 2^-7 for 16-bit codes. A row (group) whose s is below 2^-100 counts as zeros: s = 1,
// codes 0. One with a NaN or an infinity gives s = NaN, z = 0 and codes 0, so that whatever is computed from it is NaN.
// Every kernel performs the same float32 operations, so codes, scales and sums agree bit for bit.
#pragma once
#include "core/kernel.h"

namespace halfbyte::quantize_rows {

constexpr int64_t max_k = (int64_t{1} << 24) - 1;

struct Args {
  const void* x;
  int64_t ldx;  // elements between rows
  DType x_type;
  int64_t k;
  int64_t k_padded;  // codes k .. k_padded-1 are set to 0
  void* codes;
  int64_t ldc;  // codes between rows
  int bits;     // 8, or 16 (symmetric, in groups); 32: no codes but x itself, as float32
  bool wide;    // int16 codes (the avx2 GEMM multiplies 16-bit numbers); otherwise int8, two per element where bits is 16
  int64_t group;         // k per sum; 0: all of a row
  bool scale_per_group;  // then symmetric and without zero
  float* scale;
  int32_t* zero;  // may be null where symmetric
  int32_t* sum;
  bool symmetric;
  float static_scale;  // 0: found per row
  int32_t static_zero;

  int parts() const;  // codes per element
  int64_t code_bytes() const;
  int64_t codes_per_row() const;
  int64_t scales_per_row() const;
  int64_t sums_per_row() const;
};

struct Kernel {
  KernelInfo info;
  void (*rows)(const Args& args, int64_t begin, int64_t end);
};

#define KERNEL(isa) extern const Kernel kernel_##isa;
#include "ops/quantize_rows/kernels.inc"
#undef KERNEL

const Kernel& select();  // for the calling thread, now

// m rows of k elements on up to `threads` threads (0: default). Throws std::invalid_argument.
void run(const Args& args, int64_t m, int threads);

}  // namespace halfbyte::quantize_rows
