// What follows a product: scales, bias, activation, residual and the cast, for one element at a time.
#pragma once
#include <math.h>

#include "cuda/api.h"
#include "cuda/ptx.cuh"

namespace halfbyte::cuda {

HALFBYTE_DEVICE float load_as_float(const void* p, int64_t i, int type) {
  if (type == HALFBYTE_F32) return static_cast<const float*>(p)[i];
  const uint16_t v = static_cast<const uint16_t*>(p)[i];
  return type == HALFBYTE_BF16 ? bf16_to_float(v) : f16_to_float(v);
}

HALFBYTE_DEVICE void store_as(void* p, int64_t i, int type, float v) {
  if (type == HALFBYTE_F32) {
    static_cast<float*>(p)[i] = v;
  } else {
    static_cast<uint16_t*>(p)[i] = type == HALFBYTE_BF16 ? float_to_bf16(v) : float_to_f16(v);
  }
}

// NaN stays NaN.
HALFBYTE_DEVICE float activate(float v, int activation) {
  switch (activation) {
    case HALFBYTE_RELU:
      return v < 0 ? 0.0f : v;
    case HALFBYTE_GELU:
      return 0.5f * v * (1.0f + erff(v * 0.70710678118654752f));
    case HALFBYTE_GELU_TANH:
      return 0.5f * v * (1.0f + tanhf(0.79788456080286536f * (v + 0.044715f * v * v * v)));
    case HALFBYTE_SILU:
      return v / (1.0f + expf(-v));
    default:
      return v;
  }
}

// One weight's part of the epilogue: the product, as a float32 sum or an exact int32, becomes a float with its scales and
// its bias, in the order of halfbyte.reference.
struct Scales {
  const float* x_scale;   // [m], or null: x was not quantized
  const int32_t* x_zero;  // [m] or null
  const float* scale;     // [n]
  const void* total;      // [n], int32 or float; read where there is an x_zero
  const float* bias;      // [n] or null

  HALFBYTE_DEVICE float from_int(int acc, int64_t m, int64_t n) const {
    if (x_zero) acc -= x_zero[m] * static_cast<const int32_t*>(total)[n];
    return with_bias(mul_rn(mul_rn(static_cast<float>(acc), scale[n]), x_scale[m]), n);
  }
  HALFBYTE_DEVICE float from_float(float t, int64_t m, int64_t n) const {
    if (!x_scale) return with_bias(mul_rn(t, scale[n]), n);
    if (x_zero) t = add_rn(t, -mul_rn(static_cast<float>(x_zero[m]), static_cast<const float*>(total)[n]));
    return with_bias(mul_rn(mul_rn(t, scale[n]), x_scale[m]), n);
  }
  HALFBYTE_DEVICE float with_bias(float y, int64_t n) const { return bias ? add_rn(y, bias[n]) : y; }
};

struct Output {
  void* y;
  const void* residual;  // or null
  int64_t ldy, ld_residual;
  int y_type, residual_type;

  HALFBYTE_DEVICE void store(float v, int64_t m, int64_t n) const {
    if (residual) v = add_rn(v, load_as_float(residual, m * ld_residual + n, residual_type));
    store_as(y, m * ldy + n, y_type, v);
  }
};

}  // namespace halfbyte::cuda
