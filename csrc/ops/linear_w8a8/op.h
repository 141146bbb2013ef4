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
//
// With scales per group of k, of the weight, of the activations or of both: as linear_w4a8 (which fuses), with int8 codes.
#pragma once

namespace halfbyte {
struct LinearOp;
}

namespace halfbyte::linear_w8a8 {

extern const LinearOp op;

}  // namespace halfbyte::linear_w8a8
