// Blocks of bfloat16 weights, which become float32 in L1, 64 at a time. Included by each ISA file after its simd header.
#pragma once
#include "tiles/sparse/blocks.h"

namespace halfbyte::HALFBYTE_ISA {
namespace {

class HalfFloatPanel {
 public:
  static constexpr bool in_place = false;  // the lists are copies

  void open(const uint8_t* begin, int64_t) {
    const BlockPanel& panel = *reinterpret_cast<const BlockPanel*>(begin);
    for (int h = 0; h < 2; ++h) {
      index_[h] = reinterpret_cast<const uint32_t*>(begin + panel.index[h]);
      values_[h] = reinterpret_cast<const uint16_t*>(begin + panel.lines[h]);
      left_[h] = panel.count[h];
    }
  }

  bool next(List<FloatUnits> (&lists)[2]) {
    if (!first_ && left_[0] == 0 && left_[1] == 0) return false;
    first_ = false;
    for (int h = 0; h < 2; ++h) {
      const int64_t count = left_[h] < blocks_at_once ? left_[h] : blocks_at_once;
      for (int64_t i = 0; i < count * half_panel; i += width) {
        __builtin_prefetch(values_[h] + i + weights_ahead / 2);
        store<DType::f32>(lines_[h] + i, load<DType::bf16>(values_[h] + i));
      }
      lists[h] = {index_[h], reinterpret_cast<const uint8_t*>(lines_[h]), count};
      index_[h] += count;
      values_[h] += count * half_panel;
      left_[h] -= count;
    }
    return true;
  }

 private:
  static constexpr int blocks_at_once = 64;
  const uint32_t* index_[2];
  const uint16_t* values_[2];
  int64_t left_[2];
  bool first_ = true;
  alignas(64) float lines_[2][blocks_at_once * half_panel];
};

}  // namespace
}  // namespace halfbyte::HALFBYTE_ISA
