// spmm_block_w8a8: linear_w8a8 with weights that are zero in whole blocks of 16 output channels x 4 input features, which are
// neither stored nor multiplied.
//
//   acc[m][n] = sum_k (qa[m][k] - z[m]) qw[n][k]      exact int32, over the blocks that are stored
//   y, c: as linear_w8a8, whose results these are bit for bit, on every instruction set
#pragma once

namespace halfbyte {
struct LinearOp;
}

namespace halfbyte::spmm_block_w8a8 {

extern const LinearOp op;

}  // namespace halfbyte::spmm_block_w8a8
