// spmm_unstructured_f32: linear_f32 with zeros anywhere, or N of M. Of each output channel a mask of 64 bits per 64 input features
// and the nonzero values are stored; of most panels with at most 35 % of their values, for few rows, once more in lists: lines of
// one value of each of 16 channels.
//
//   t[m][n] = sum_k a[m][k] w[n][k]      float32, one fma per product, over the values that are stored
//   c[m][n] = cast(activation(t + bias[n]) + residual[m][n])
//
// |t - exact| <= K 2^-24 (1 + 2^-10) sum_k |a w| for K < 2^14 (Higham 2002, section 3.1).
// In the order of k; but of panels without lists on AVX512 with up to four rows in 16 sums, whose halves are added until one is left: so a
// call of up to four rows may differ in the last bits from the same rows in a larger one. Independent of threads.
#pragma once

namespace halfbyte {
struct LinearOp;
}

namespace halfbyte::spmm_unstructured_f32 {

extern const LinearOp op;

}  // namespace halfbyte::spmm_unstructured_f32
