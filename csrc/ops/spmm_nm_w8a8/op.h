// spmm_nm_w8a8: linear_w8a8 with weights of which at most N of M consecutive input features are not zero, per output channel: 1:4,
// 2:4 and 4:8. N values are stored of each M, with 2 (1:4, 2:4) or 4 (4:8) bits that say where they were.
//
//   acc[m][n] = sum_k (qa[m][k] - z[m]) qw[n][k]      exact int32, over the values that are stored
//   y, c: as linear_w8a8, whose results these are bit for bit, on every instruction set
#pragma once

namespace halfbyte {
struct LinearOp;
}

namespace halfbyte::spmm_nm_w8a8 {

extern const LinearOp op;

}  // namespace halfbyte::spmm_nm_w8a8
