// spmm_unstructured_w8a8: linear_w8a8 with zeros anywhere. Per 64 input features a group of 16 output channels stores as many values
// as that of them with the most, rounded up to four, each with a byte that says where it was.
//
//   acc[m][n] = sum_k (qa[m][k] - z[m]) qw[n][k]      exact int32, over the values that are stored
//   y, c: as linear_w8a8, whose results these are bit for bit, on every instruction set
#pragma once

namespace halfbyte {
struct LinearOp;
}

namespace halfbyte::spmm_unstructured_w8a8 {

extern const LinearOp op;

}  // namespace halfbyte::spmm_unstructured_w8a8
