// Tiles of int8 blocks (tiles/sparse/blocks.h), with the dot product of the ISA: activations u8, a + 128, times weights s8. Weights
// in windows become blocks of all their k first, where no instruction gathers bytes.
#pragma once
#include <string.h>

#include "tiles/sparse/blocks.h"

namespace halfbyte::HALFBYTE_ISA {
namespace {

struct ByteUnits {
  using Sum = I;
  using Index = uint16_t;
  static constexpr int codes_per_unit = 4, line_bytes = half_panel * 4;
  static HALFBYTE_INLINE I zero() { return set1_i(0); }
  static HALFBYTE_INLINE I load_sum(const float* p) { return load_i(reinterpret_cast<const int32_t*>(p)); }
  static HALFBYTE_INLINE void store_sum(float* p, I x) { store_i(reinterpret_cast<int32_t*>(p), x); }
  static HALFBYTE_INLINE I vector(const uint8_t* p) { return load_i(reinterpret_cast<const int32_t*>(p)); }
  static HALFBYTE_INLINE I spread(const uint8_t* p) { return broadcast_quad(p); }
  static HALFBYTE_INLINE void multiply(I& sum, I activations, I weights) { dot4(sum, activations, weights); }
};

void arrange_bytes(const ArrangeArgs& args) { arrange_units<4, 0x80808080u>(args, lanes_of(args.rows)); }
int64_t byte_strip_bytes(int rows, int64_t k_padded) { return strip_bytes_of(k_padded / 4, rows); }

// As a GemmTile of weights in blocks or, `run` apart, of others that become such.
constexpr int block_offset = 128;  // a + 128 is unsigned

[[maybe_unused]] void block_tile(const TileArgs& t) {
  multiply_blocks<ByteUnits, PanelBlocks<ByteUnits>>(t, reinterpret_cast<float*>(t.acc));
}

}  // namespace
}  // namespace halfbyte::HALFBYTE_ISA
