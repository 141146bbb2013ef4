// What a GEMM micro-kernel gets and gives; shared by all linear ops, their ISA files and the driver.
#pragma once
#include "core/kernel.h"

namespace halfbyte {

// The packed weight (core/packed_weight.h) in numbers.
constexpr int panel_width = 32;
constexpr int quad = 4;
constexpr int k_multiple = 64;
constexpr int high_nibble = 16;  // what a 4-bit code in the high half of a byte counts
constexpr int byte_line = panel_width * quad;  // bytes of one quad of a panel of 8-bit codes; of 4-bit codes: half

// What the driver has room for.
constexpr int max_panels = 4;
constexpr int max_mr = 48;
constexpr int max_accumulators = 12;
constexpr int max_sparse_mr = 128;  // of kernels that arrange their strips

// A panel whose sums are scaled per group of k. Its bytes are, group by group, what follows here and then the codes.
struct GroupFormat {
  int64_t quads;      // k / 4 of a group; the last group of a row may be shorter
  int scale_bytes;    // of the panel's 32 scales: 64 (float16), 128 (float32), or 0: no scale per group
  int zero_bytes;     // 64 or 0: int16, the zero points of the stored codes
  int minimum_bytes;  // as scale_bytes: float offsets
  int bytes() const { return scale_bytes + zero_bytes + minimum_bytes; }
};

// Without groups: acc[r][c] = sum over k of a[r][k] * b[c][k] for `rows` rows and `panels` panels, exactly, in wrapping
// int32. b holds codes + 128 (the unsigned operand of vpdpbusd); the epilogue takes the 128 out again.
//
// With groups: t[r][c], float32, the sum over the groups g, in their order, of
//   float(sum_k a (b - zero)) * scale[c][g] * a_scale[r][g] + (float(sum_k a) * a_scale[r][g]) * minimum[c][g]
// with the factors and the second term that are there. Without zero points b is off by 128 (bytes, NF4), or by 8 (nibbles).
// Channels 16-31 of a panel of nibbles, which lie in the high halves of its bytes, count 16 times: nothing shifts them. Of sparse
// nibbles all channels do.
//
// Of sparse weights the products of the values that are stored, which are signed: acc[r][c] = sum of (a + offset) b with
// GemmTile::offset.
struct TileArgs {
  int rows;       // 1 .. GemmTile::alone
  int panels;     // 1 .. max(1, min(max_panels, accumulators / rows))
  int64_t all_rows;  // of the multiplication: what the order of a sum may depend on, as it may not on that of the strips
  int64_t quads;  // k_padded / 4
  const void* a;  // codes, zero from k to k_padded: int8, or int16 where GemmKernel::wide. Of 16-bit activations in int8: per
                  // group its high bytes, then its low ones: a = 256 high + low, both signed. Of sparse weights: the strip
                  // that GemmTile::arrange made
  int64_t lda;    // codes between rows
  const uint8_t* b;
  int64_t panel_bytes;
  const int64_t* panel_offsets;  // of sparse weights, whose panels are of different sizes: panel i is at b + [i] - [0]
  int32_t* acc;  // [rows][panels * 32]

  const GroupFormat* groups;  // null: without
  bool nf4;                   // the nibbles are indices into the NF4 table
  const int32_t* a_sum;       // [rows][groups], or [rows][groups][high, low]
  int64_t sum_stride;
  const float* a_scale;  // [rows][groups]; null: not per group
  int64_t scale_stride;
  float* t;  // [rows][panels * 32]
};

// c[r][n] = activation(y + bias) * factor + residual, cast to c_type, where without groups
//   y = (acc - 128 a_sum - a_zero b_sum) * b_scale * a_scale,
//       acc - 128 sum_k(a) - z sum_k(w) = sum_k (a - z) w,  because  acc = sum_k a (w + 128);
// and with groups
//   y = (t - a_zero b_total) * b_scale * a_scale.
// Of sparse weights a_sum is 0 and a_zero larger by GemmTile::offset: acc - z sum_k(w), summed over the stored ones.
struct EpilogueArgs {
  int rows, columns;
  const int32_t* acc;
  const float* t;  // in place of acc: with groups
  int64_t acc_stride;
  const float* a_scale;           // per row; null with groups: in t already
  const int32_t *a_zero, *a_sum;  // per row; with groups: a_zero may be null, a_sum is not read
  const float* b_scale;           // per column, padded to whole panels
  const int32_t* b_sum;
  const float* b_total;  // with groups: sum of a channel's weights
  const float* bias;     // may be null
  Activation activation;
  const float* factor;  // may be null
  int64_t factor_stride;
  void* c;
  int64_t ldc;
  DType c_type;
  const void* residual;  // may be null
  int64_t ldr;
  DType residual_type;
};

// Rows of codes that become a strip: what a kernel of sparse weights reads, since from one weight to the next it jumps
// along k, where the rows of a matrix would each cost a cache line. Each thread makes its own.
struct ArrangeArgs {
  int rows;
  int64_t all_rows;
  int64_t k_padded;
  const void* a;
  int64_t lda;
  void* strip;
};

struct GemmTile {
  int mr;            // rows of a tile where there are many, up to max_mr
  int alone;         // mr or more: so few rows make one tile, which reads the weight once; up to max_mr
  int row_step;      // computes its rows in steps of this many; a divisor of mr
  int accumulators;  // r rows may span accumulators / r panels (1 to max_panels); up to max_accumulators
  void (*run)(const TileArgs& args);

  // Of sparse weights.
  void (*arrange)(const ArrangeArgs& args) = nullptr;
  int64_t (*strip_bytes)(int rows, int64_t k_padded) = nullptr;
  int offset = 0;  // what arrange adds to the codes
};

struct GemmKernel {
  KernelInfo info;
  bool wide;      // wants int16 activation codes
  int64_t grain;  // multiplications that take about 3 us: less than that is not worth another thread
  GemmTile grouped;
  void (*epilogue)(const EpilogueArgs& args);
  GemmTile plain;  // of linear_w8a8, whose weights may be without groups; empty elsewhere
};

}  // namespace halfbyte
