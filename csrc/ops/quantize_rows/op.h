// quantize_rows: rows of floats -> int8 codes, one scale, one zero point and the sum of the codes per row.
//
//   asymmetric (activations)   lo = min(0, min x), hi = max(0, max x), s = hi/255 - lo/255
//                              z = clip(rint(-(lo/s)) - 128, -128, 127)
//                              q = clip(rint(x/s) + z, -128, 127)            x ~ (q - z) * s, zero is exact
//   symmetric (weights)        s = max|x| / 127, q = clip(rint(x/s), -127, 127), z = 0
//   static                     s and z are given
//
// x/s stands for x * (1/s) with 1/s rounded to float32; rint rounds half to even. |x - (q - z)s| <= s/2 (1 + 2^-20)
// inside the range. A row whose s is below 2^-100 counts as zeros: s = 1, codes 0. A row with a NaN or an infinity
// gives s = NaN, z = 0 and codes 0, so that whatever is computed from it is NaN.
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
  void* codes;       // int8, or int16 when `wide` (the avx2 GEMM multiplies 16-bit numbers)
  int64_t ldc;       // codes between rows
  bool wide;
  float* scale;
  int32_t* zero;  // may be null
  int32_t* sum;
  bool symmetric;
  float static_scale;  // 0: found per row
  int32_t static_zero;
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
