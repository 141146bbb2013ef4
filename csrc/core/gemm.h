// What a GEMM micro-kernel gets and gives; shared by all linear ops, their ISA files and the driver.
#pragma once
#include "core/kernel.h"

namespace halfbyte {

// The packed weight (core/packed_weight.h) in numbers.
constexpr int panel_width = 32;
constexpr int quad = 4;
constexpr int k_multiple = 64;

// What the driver has room for.
constexpr int max_panels = 4;
constexpr int max_mr = 48;
constexpr int max_accumulators = 12;

// acc[r][c] = sum over k of a[r][k] * b[c][k] for `rows` rows and `panels` panels, exactly, in wrapping int32.
// b holds codes + 128 (the unsigned operand of vpdpbusd); the epilogue takes the 128 out again.
struct TileArgs {
  int rows;       // 1 .. Kernel::mr
  int panels;     // 1 .. max(1, min(max_panels, accumulators / rows))
  int64_t quads;  // k_padded / 4
  const void* a;  // int8 codes, or int16 where Kernel::wide; zero from k to k_padded
  int64_t lda;    // codes between rows
  const uint8_t* b;
  int64_t panel_bytes;
  int32_t* acc;  // [rows][panels * 32]
};

// c[r][n] = activation((acc - 128 a_sum - a_zero b_sum) * b_scale * a_scale + bias) + residual, cast to c_type:
//   acc - 128 sum_k(a) - z sum_k(w) = sum_k (a - z) w,  because  acc = sum_k a (w + 128).
struct EpilogueArgs {
  int rows, columns;
  const int32_t* acc;
  int64_t acc_stride;
  const float* a_scale;
  const int32_t *a_zero, *a_sum;  // per row
  const float* b_scale;           // per column, padded to whole panels
  const int32_t* b_sum;
  const float* bias;  // may be null
  Activation activation;
  void* c;
  int64_t ldc;
  DType c_type;
  const void* residual;  // may be null
  int64_t ldr;
  DType residual_type;
};

struct GemmKernel {
  KernelInfo info;
  int mr;            // most rows of a tile, up to max_mr
  int row_step;      // a tile computes its rows in steps of this many; a divisor of mr
  bool wide;         // wants int16 activation codes
  int accumulators;  // a tile of r rows may span accumulators / r panels (1 to max_panels); up to max_accumulators
  int64_t grain;     // multiplications that take about 3 us: less than that is not worth another thread
  void (*tile)(const TileArgs& args);
  void (*epilogue)(const EpilogueArgs& args);
};

}  // namespace halfbyte
