// Weights in windows of 64 k (core/sparse_panel.h) as dense blocks of 16 channels x 4 k: for instruction sets that do not gather
// bytes within a register. Included after tiles/sparse/blocks.h or simd/avx2.h.
#pragma once
#include <string.h>

#include "core/gemm.h"
#include "core/sparse_panel.h"

namespace halfbyte::HALFBYTE_ISA {
namespace {

constexpr int windows_at_once = 4, quads_at_once = windows_at_once * window / quad, block_bytes = half_panel * quad;

// Index of byte `b` of value line `v` of a window, within the window.
inline int place_of(const WindowPanel& panel, const uint8_t* index, int v, int b) {
  const int bits = static_cast<int>(panel.bits), per_line = 8 / bits;
  const int bit = v % per_line * 8 * bits + b % 8 * bits;
  const int field = index[v / per_line * block_bytes + b / 8 * 8 + bit / 8] >> bit % 8 & ((1 << bits) - 1);
  if (bits == 8) return field;
  const int of = bits == 2 ? 4 : 8, nonzero = static_cast<int>(panel.per_window) * quad * of / window;
  return (v * quad + b % quad) / nonzero * of + field;
}

class ExpandedWindows {
 public:
  static constexpr bool in_place = false;  // the lists are copies

  void open(const uint8_t* begin, int64_t) {
    panel_ = *reinterpret_cast<const WindowPanel*>(begin);
    for (int h = 0; h < 2; ++h) {
      counts_[h] = begin + panel_.counts[h];
      index_[h] = begin + panel_.index[h];
      values_[h] = begin + panel_.lines[h];
    }
  }

  // Fills in count, lines and index of the two lists.
  template <class List>
  bool next(List (&lists)[2]) {
    if (window_ > 0 && window_ >= panel_.windows) return false;
    const int count = static_cast<int>(panel_.windows - window_ < windows_at_once ? panel_.windows - window_ : windows_at_once);
    const int quads = count * window / quad;
    for (int i = 0; i < quads; ++i) quads_[i] = static_cast<uint16_t>(window_ * window / quad + i);
    for (int h = 0; h < 2; ++h) {
      memset(lines_[h], 0, static_cast<size_t>(quads) * block_bytes);
      for (int i = 0; i < count; ++i) expand(h, window_ + i, lines_[h] + i * (window / quad) * block_bytes);
      lists[h] = {quads_, lines_[h], quads};
    }
    window_ += count > 0 ? count : 1;  // a weight without input features has an empty list
    return true;
  }

 private:
  void expand(int half, int64_t at, uint8_t* lines) {
    const int count = counts_[half][at], per_line = 8 / static_cast<int>(panel_.bits);
    for (int v = 0; v < count; ++v) {
      for (int b = 0; b < block_bytes; ++b) {
        const uint8_t value = values_[half][v * block_bytes + b];
        if (value == 0) continue;
        const int k = place_of(panel_, index_[half], v, b);
        lines[k / quad * block_bytes + b / quad * quad + k % quad] = value;
      }
    }
    values_[half] += count * block_bytes;
    index_[half] += (count + per_line - 1) / per_line * block_bytes;
  }

  WindowPanel panel_;
  const uint8_t *counts_[2], *index_[2], *values_[2];
  int64_t window_ = 0;
  alignas(64) uint8_t lines_[2][quads_at_once * block_bytes];
  uint16_t quads_[quads_at_once];
};

}  // namespace
}  // namespace halfbyte::HALFBYTE_ISA
