// linear_w4a16: y = activation(x W^T + bias) + residual with 4-bit weights and 16-bit activations: weight-only
// quantization, for float activations lose next to nothing in 16 bits per group.
//
//   qa[m][k] = rint(x[m][k] / a_scale[m][g]),  a_scale[m][g] = max over k in g of |x[m][k]| / 32639       quantize_rows
//
// W as in linear_w4a8, or with NF4 codes: c[n][k] one of 16 int8 levels, zero = 0. Per group in their order, in float32:
//
//   acc = sum over k in g of qa[m][k] (c[n][k] - zero[n][g])                     exact int32
//   t = fma(float(acc) * group_scale[n][g], a_scale[m][g], t)
//   t = fma(float(sum over k in g of qa[m][k]) * a_scale[m][g], minimum[n][g], t)                where there are minima
//   y = t * scale[n] 
//   c[m][n] = cast(activation(y + bias[n]) + residual[m][n])                    as in linear_w8a8
//
// Without groups of the weight, those of the activations have 128 k and group_scale is left out. An 8-bit multiplier
// takes qa in two parts, qa = 256 high + low. Every kernel returns the same bits. The rounding of x is the only error to
// speak of: against exact arithmetic on W,
//
//   |error of x W^T| <= 2^-15 sum_g (max over k in g of |x[m][k]|) (sum over k in g of |W[n][k]|)
//
// (2^-16 from x, the rest is room for the float32 sums of up to 256 groups). bfloat16, which keeps 8 bits of every x, errs by
// up to 2^-8 |x| |W| per product: of numbers in one group whose sizes differ by less than 2^8, this op loses less of each.
// The tests hold it below an eighth of bfloat16's own error on normally distributed numbers.
#pragma once

namespace halfbyte {
struct LinearOp;
}

namespace halfbyte::linear_w4a16 {

extern const LinearOp op;

}  // namespace halfbyte::linear_w4a16
