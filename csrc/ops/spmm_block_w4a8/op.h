// spmm_block_w4a8: linear_w4a8 in groups of k, symmetric, with weights that are zero in whole blocks of 16 output channels x 4
// input features, which are neither stored nor multiplied.
//
//   t[m][n] = sum over the groups g of float(sum_k qa[m][k] qw[n][k]) group_scale[n][g]      one fma per group, in order of g
//   y, c: as linear_w4a8, whose results these are bit for bit, on every instruction set, while 16 t and scale / 16 are normal
//         numbers
#pragma once

namespace halfbyte {
struct LinearOp;
}

namespace halfbyte::spmm_block_w4a8 {

extern const LinearOp op;

}  // namespace halfbyte::spmm_block_w4a8
