// Tiles of weights in groups (TileArgs::groups, core/gemm.h) from a function that sums one group in integers: what every
// instruction set shares but AVX512-VNNI, which keeps those sums in registers (tiles/avx512_vnni.h).
#pragma once
#include "core/gemm.h"

namespace halfbyte::HALFBYTE_ISA {
namespace {

#ifndef HALFBYTE_INLINE
#define HALFBYTE_INLINE inline
#endif

// The stored form of zero where the weight has no zero points: what the codes are off by.
inline int offset_of(const TileArgs& t, int bits, int column) {
  if (bits == 8 || t.nf4) return 128;
  if (t.groups->minimum_bytes) return 0;
  return column % panel_width < panel_width / 2 ? 8 : 8 * 16;
}

// 32 scales or minima, from channel `column` on.
HALFBYTE_INLINE F load_factors(const uint8_t* p, int bytes, int column) {
  return bytes == 128 ? load<DType::f32>(p + column * 4) : load<DType::f16>(p + column * 2);
}

// t += the group's sums, scaled; `acc` are those of the stored codes, [rows][32] per part of a 16-bit activation.
template <int bits, int parts>
void add_group(const TileArgs& t, int64_t g, const uint8_t* header, const int32_t* acc, int64_t part) {
  const GroupFormat& format = *t.groups;
  const uint8_t *const zeros = header + format.scale_bytes, *const minima = zeros + format.zero_bytes;
  for (int column = 0; column < panel_width; column += width) {
    const F scale = format.scale_bytes ? load_factors(header, format.scale_bytes, column) : set1(1);
    const F minimum = format.minimum_bytes ? load_factors(minima, format.minimum_bytes, column) : set1(0);
    const I zero = format.zero_bytes ? load_i16(reinterpret_cast<const int16_t*>(zeros) + column)
                                     : set1_i(offset_of(t, bits, column));
    for (int r = 0; r < t.rows; ++r) {
      const int32_t* const a_sum = t.a_sum + r * t.sum_stride + g * parts;
      const int32_t* const sums = acc + r * panel_width + column;
      I sum = load_i(sums), total = set1_i(a_sum[0]);
      if constexpr (parts == 2) {
        sum = add_i(shift_left<8>(sum), load_i(sums + part));
        total = add_i(shift_left<8>(total), set1_i(a_sum[1]));
      }
      F p = to_float(sub_i(sum, mul_i(zero, total))), factor = scale;
      const F a_scale = t.a_scale ? set1(t.a_scale[r * t.scale_stride + g]) : set1(1);
      if (t.a_scale) {
        if (format.scale_bytes) p = mul(p, scale);
        factor = a_scale;
      }
      float* const out = t.t + r * panel_width + column;
      F y = fma(p, factor, load<DType::f32>(out));
      if (format.minimum_bytes) {
        F s = to_float(total);
        if (t.a_scale) s = mul(s, a_scale);
        y = fma(s, minimum, y);
      }
      store<DType::f32>(out, y);
    }
  }
}

// Sums: void sums(const TileArgs&), of `bits`-bit codes, whose acc counts high nibbles 16 times. max_rows: of the kernel.
template <auto sums, int bits, int parts, int max_rows, class Code>
void tile_in_groups(const TileArgs& t) {
  alignas(64) int32_t acc[parts][max_rows * panel_width];
  memset(t.t, 0, static_cast<size_t>(t.rows) * panel_width * sizeof(float));
  TileArgs part = t;
  const Code* a = static_cast<const Code*>(t.a);
  const uint8_t* header = t.b;
  for (int64_t g = 0, left = t.quads; left > 0; ++g, left -= t.groups->quads) {
    part.quads = left < t.groups->quads ? left : t.groups->quads;
    part.b = header + t.groups->bytes();
    for (int p = 0; p < parts; ++p, a += part.quads * quad) {
      part.a = a;
      part.acc = acc[p];
      sums(part);
    }
    add_group<bits, parts>(t, g, header, acc[0], max_rows * panel_width);
    header = part.b + part.quads * (bits == 8 ? byte_line : byte_line / 2);
  }
}

// Sums of 4-bit codes through a function for 8-bit ones: the nibbles of up to 256 k become bytes in L1, the high ones as
// 16 times their value, those of NF4 as their level + 128.
template <auto byte_sums, int max_rows, class Code>
void nibble_sums(const TileArgs& t) {
  constexpr int64_t most_quads = 64;
  alignas(64) uint8_t bytes[most_quads * byte_line];
  alignas(64) int32_t more[max_rows * panel_width];
  TileArgs part = t;
  part.b = bytes;
  const uint8_t* line = t.b;
  for (int64_t q = 0; q < t.quads; q += most_quads) {
    part.quads = t.quads - q < most_quads ? t.quads - q : most_quads;
    for (int64_t i = 0; i < part.quads; ++i, line += byte_line / 2) {
      uint8_t *const low = bytes + i * byte_line, *const high = low + byte_line / 2;
      for (int c = 0; c < byte_line / 2; ++c) {
        low[c] = static_cast<uint8_t>(t.nf4 ? nf4_levels[line[c] & 15] + 128 : line[c] & 15);
        high[c] = static_cast<uint8_t>(t.nf4 ? nf4_levels[line[c] >> 4] + 128 : line[c] & 0xf0);
      }
    }
    part.acc = q ? more : t.acc;
    byte_sums(part);
    for (int i = 0; q && i < t.rows * panel_width; ++i) {
      t.acc[i] = static_cast<int32_t>(static_cast<uint32_t>(t.acc[i]) + static_cast<uint32_t>(more[i]));
    }
    part.a = static_cast<const Code*>(part.a) + part.quads * quad;
  }
}

}  // namespace
}  // namespace halfbyte::HALFBYTE_ISA
