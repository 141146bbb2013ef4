// linear_f32: y = activation(x W^T + bias) + residual with float32 weights: what a fused block runs where a layer of it is not
// quantized. x is converted to float32 first.
//
//   t[m][n] = sum_k a[m][k] w[n][k]      float32, one fma per product, in the order of k
//   c[m][n] = cast(activation(t + bias[n]) + residual[m][n])
//
// |t - exact| <= K 2^-24 (1 + 2^-10) sum_k |a w| for K < 2^14 (Higham 2002, section 3.1). Every kernel returns the same bits.
#pragma once

namespace halfbyte {
struct LinearOp;
}

namespace halfbyte::linear_f32 {

extern const LinearOp op;

}  // namespace halfbyte::linear_f32
