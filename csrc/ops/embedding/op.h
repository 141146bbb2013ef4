// embedding: rows of a quantized matrix [n, k], gathered by their ids and made floats again.
//
//   out[r, i] = ((c - zero[g]) * group_scale[g] + minimum[g]) * scale        of the row ids[r], g = i / group
//
// c is the int8 code; of 4-bit codes the nibble u, or nf4_levels[u]. zero is 8 for nibbles that come with no zero, no
// minimum and no nf4. Each operation is one in float32, in the order written, then one rounding to the output's type:
// what QuantizedTensor.dequantize() computes, bit for bit on every kernel. Absent parts count as group_scale 1 and
// minimum 0, which changes no bit: c - zero is +0 or at least 1 in size, so that its product with a positive scale is
// never the -0 that adding 0 would change.
#pragma once
#include "core/kernel.h"

namespace halfbyte::embedding {

struct Args {
  const void* codes;  // 8 bits: int8 [n][k]; 4 bits: bytes [n][(k + 1) / 2], even k in the low half
  int64_t n, k;
  int64_t ld;  // bytes between rows of codes
  int bits;    // 8 or 4
  bool nf4;
  const float* scale;       // [n]
  int64_t group;            // elements of k that share the following, [n][groups]; 0: one group, all of k
  const void* group_scale;  // may be null
  DType group_scale_type;   // f32 or f16; of minimum too
  const int8_t* zero;       // may be null
  const void* minimum;      // may be null
  const int64_t* ids;
  int64_t m;
  void* out;    // [m][k]
  int64_t ldo;  // elements between rows
  DType out_type;
};

struct Kernel {
  KernelInfo info;
  void (*rows)(const Args& args, int64_t begin, int64_t end);  // of the output
};

#define KERNEL(isa) extern const Kernel kernel_##isa;
#include "ops/embedding/kernels.inc"
#undef KERNEL

// On up to `threads` threads (0: default). Throws std::invalid_argument and, for an id outside [0, n),
// std::out_of_range (IndexError in Python), both before anything is written.
void run(const Args& args, int threads);

}  // namespace halfbyte::embedding
