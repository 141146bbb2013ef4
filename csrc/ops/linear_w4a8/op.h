// linear_w4a8: y = activation(x W^T + bias) + residual with 4-bit weights and int8 activations.
//
//   W[n][k] = ((c[n][k] - zero[n][g]) * group_scale[n][g] + minimum[n][g]) * scale[n],   g = k / group
//
// c = 0 .. 15; zero = 8 where the weight is symmetric. Per group in their order, in float32, fma rounding once:
//
//   acc = sum over k in g of qa[m][k] (c[n][k] - zero[n][g])                     exact int32
//   t = fma(float(acc), group_scale[n][g], t)
//   t = fma(float(sum over k in g of qa[m][k]), minimum[n][g], t)                where there are minima
//   t = t - float(z[m]) * total[n]                                               after the last group
//   y = t * scale[n] * a_scale[m]
//   c[m][n] = cast(activation(y + bias[n]) + residual[m][n])                    as in linear_w8a8
//
// qa and z: quantize_rows per token, asymmetric, or a static scale and zero point; total[n] is the sum of the channel's
// weights before `scale`, summed in float64. With activation groups (+ag): symmetric codes with a scale per token and group,
//   t = fma(float(acc) * group_scale[n][g], a_scale[m][g], t), and neither z nor a_scale[m].
//
// Half of the channels are kept 16 times as large in t (core/gemm.h), exactly, but for numbers at the ends of float32: they
// overflow from 2^124 on, and scales below 2^-122 lose bits. Without groups of either: one group of all k (K <= 65792) and no group_scale. Every kernel returns the same bits.
#pragma once

namespace halfbyte {
struct LinearOp;
}

namespace halfbyte::linear_w4a8 {

extern const LinearOp op;

}  // namespace halfbyte::linear_w4a8
