// spmm_block_bf16: spmm_block_f32 with weights stored as bfloat16, half the bytes; products and sums are float32.
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

namespace halfbyte::spmm_block_bf16 {

extern const LinearOp op;

}  // namespace halfbyte::spmm_block_bf16
