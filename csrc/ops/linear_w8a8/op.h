// linear_w8a8: y = activation(x W^T + bias) + residual with int8 weights per output channel and int8 activations.
//
//   acc[m][n] = sum_k (qa[m][k] - z[m]) qw[n][k]                exact int32; |acc| <= 255 * 128 * K < 2^31 for K <= 65792
//   y[m][n]   = (float(acc) * w_scale[n]) * a_scale[m] + bias[n]        float32, this order, no fused multiply-add
//   c[m][n]   = cast(activation(y) + residual[m][n])                    round to nearest even
//
// qa, z and a_scale come from quantize_rows (per token, asymmetric; or a calibrated static scale and zero point).
// Every kernel returns the same bits. Against exact arithmetic the activations are within |error| <= 2^-20 max(1, |y|):
// exp and erf are polynomial or rational fits with errors below 2^-24, followed by at most 16 float32 roundings of
// 2^-24 each on terms not larger than max(1, |y|). none and relu are exact given acc.
#pragma once
#include "core/packed_weight.h"
#include "ops/linear_w8a8/kernel.h"

namespace halfbyte::linear_w8a8 {

constexpr int64_t max_k = 65792;  // whole multiples of 64 below (2^31 - 1) / (255 * 128)

// codes: int8 [n][k] with row stride ld; scale: float32 [n]. Throws std::invalid_argument.
PackedWeight pack(const int8_t* codes, int64_t n, int64_t k, int64_t ld, const float* scale, int threads);
void unpack(const PackedWeight& packed, int8_t* codes, int64_t ld);

struct Args {
  int64_t m;
  const void* a;
  int64_t lda;  // elements between rows
  DType a_type;
  void* c;
  int64_t ldc;
  DType c_type;       // i32 returns acc and takes no bias, activation or residual
  const float* bias;  // may be null
  Activation activation;
  const void* residual;  // may be null
  int64_t ldr;
  DType residual_type;
  float static_scale;  // 0: dynamic
  int32_t static_zero;
  int threads;  // 0: default
};

// Throws std::invalid_argument.
void run(const PackedWeight& packed, const Args& args);

}  // namespace halfbyte::linear_w8a8
