// spmm_block_f32: linear_f32 with weights that are zero in whole blocks of 16 output channels x 1 input feature, which are neither
// stored nor multiplied.
//
//   t[m][n] = sum_k a[m][k] w[n][k]      float32, one fma per product, in the order of k, over the blocks that are stored
//   c[m][n] = cast(activation(t + bias[n]) + residual[m][n])
//
// |t - exact| <= K 2^-24 (1 + 2^-10) sum_k |a w| for K < 2^14 (Higham 2002, section 3.1). Every kernel returns the same bits, for finite
// x those of linear_f32.
#pragma once

namespace halfbyte {
struct LinearOp;
}

namespace halfbyte::spmm_block_f32 {

extern const LinearOp op;

}  // namespace halfbyte::spmm_block_f32
