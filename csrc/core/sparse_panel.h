// The panels of sparse weights, of 32 channels each; core/pack_sparse.cpp and pack_masks.cpp write them. Every array starts on a
// cache line, at the given number of bytes from the header. A half is 16 channels.
//
//   blocks    per half the blocks of 16 channels x quad k (int8) or 16 x 1 (floats) that are not all zero, ascending in k.
//               index   uint16 (int8) or uint32 (floats): k of the block / its width in k
//               lines   [16 channels][4 k] int8, or [16 channels] floats
//   nibbles   blocks of 4-bit codes, per half and group of k (core/gemm.h, GroupFormat::quads) two to a line
//               pairs   uint8: lines of each group
//               index   [2] uint8 of each line: the blocks' k within the group / 4, ascending; where the second is missing it is 0
//                       at the k of the first
//               lines   [16 channels][4 k] bytes: of the first block in the low half, of the second in the high half, signed
//               scales  [16] float16 or float32 of each group
//   windows   per half and window of 64 k, the nonzero values of each channel in ascending k, four to a line; a line is
//             [16 channels][4] int8. What a channel lacks is 0, at the k where its window begins (N:M: where its group does).
//               counts  uint8: lines of each window; of N:M patterns all alike, `per_window`
//               index   [16 channels][4] uint8: k within the window. Of N:M patterns `bits` bits each: k within the group of M.
//                       A line of indices then serves 8 / bits lines of values: byte b of value line v is in bits
//                       64 (b / 8) + (64 bits / 8) v + bits (b % 8) of the line, so that one vpmultishiftqb takes them out
//               lines   the values
//   masks     per 64 k (a mask), the 32 channels in order of their number of values, so that loops over them end alike
//               masks   [k / 64][32] uint64, bit i: k = 64 b + i
//               order   [k / 64][32] uint8: channel of the panel
//               values  float, as the masks come
//   lists     the same once more for few rows, in a panel of which most is zero: per half and window of 64 k the values of each
//             channel in ascending k, one to a line for the 16 channels. A line lacks the channels that have no more values
//               lines   uint8: of each window
//             and of each line, and of an empty one behind an odd number of them:
//               places  uint16: the window, of two lines
//               masks   uint16, bit i: channel i has a value
//               index   [16] uint8: k within the window
//               values  float: those that are there, one after the other
#pragma once
#include <cstdint>

namespace halfbyte {

constexpr int half_panel = 16;
constexpr int window = 64;  // k of a window and of a mask

struct BlockPanel {
  int64_t count[2], index[2], lines[2];  // per half
};

struct NibblePanel {
  int64_t pairs[2], index[2], lines[2], scales[2];  // per half
};

struct WindowPanel {
  int64_t windows, per_window, bits;  // per_window 0: counts
  int64_t counts[2], index[2], lines[2];
};

struct MaskPanel {
  int64_t masks, order, values;
  int64_t lists;  // ListPanel; 0: none
};

struct ListPanel {
  int64_t pairs[2], lines[2], places[2], masks[2], index[2], values[2];  // per half; pairs of lines
};

}  // namespace halfbyte
