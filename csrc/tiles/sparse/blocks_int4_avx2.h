// Tiles of int4 blocks in groups of k (core/sparse_panel.h, nibbles) on AVX2, exactly: 16 w widened to 16 bits, activations int16
// codes. 6 rows x 8 channels as with int8 (tiles/sparse/blocks_avx2.h); the scaled sums are in memory, in L1.
#pragma once
#include "tiles/sparse/blocks_avx2.h"

namespace halfbyte::avx2 {
namespace {

struct WordNibbles {
  const uint8_t *pairs, *index, *lines, *scales;
};

// out[r][0..7] = the scaled sums of 8 channels of a half, from channel `first` on.
template <int rows>
void word_nibbles(const TileArgs& t, WordNibbles half, int first, const int16_t* strip, float* out, int64_t ld) {
  const I mask = set1_i(static_cast<int32_t>(0xf0f0f0f0u));
  const int scale_bytes = t.groups->scale_bytes / 2;
  const int64_t row_codes = int64_t{t.rows} * quad;
  for (int r = 0; r < rows; ++r) store<DType::f32>(out + r * ld, set1(0));
  for (int64_t left = t.quads; left > 0; left -= t.groups->quads, strip += t.groups->quads * row_codes) {
    I acc[rows][2];
#pragma GCC unroll 6
    for (int r = 0; r < rows; ++r) acc[r][0] = acc[r][1] = _mm256_setzero_si256();
    for (int i = *half.pairs++; i > 0; --i, half.index += 2, half.lines += half_panel * quad) {
      const I both = load_i(reinterpret_cast<const int32_t*>(half.lines + first * quad));
#pragma GCC unroll 2
      for (int high = 0; high < 2; ++high) {
        const I w = and_i(high ? both : shift_left<4>(both), mask);
        const I left_half = _mm256_cvtepi8_epi16(_mm256_castsi256_si128(w));
        const I right_half = _mm256_cvtepi8_epi16(_mm256_extracti128_si256(w, 1));
        const int16_t* const x = strip + half.index[high] * row_codes;
#pragma GCC unroll 6
        for (int r = 0; r < rows; ++r) {
          const I y = broadcast_quad(x + r * quad);
          accumulate(acc[r][0], _mm256_madd_epi16(left_half, y));
          accumulate(acc[r][1], _mm256_madd_epi16(right_half, y));
        }
      }
    }
    const bool wide = scale_bytes == half_panel * 4;
    const F scale = wide ? load<DType::f32>(half.scales + first * 4) : load<DType::f16>(half.scales + first * 2);
    half.scales += scale_bytes;
#pragma GCC unroll 6
    for (int r = 0; r < rows; ++r) {
      float* const to = out + r * ld;
      const F sum = to_float(join(acc[r][0], acc[r][1]));
      store<DType::f32>(to, fma(sum, scale, load<DType::f32>(to)));
    }
  }
}

using WordNibbleRows = void (*)(const TileArgs&, WordNibbles, int, const int16_t*, float*, int64_t);
constexpr WordNibbleRows word_nibble_rows[strip] = {word_nibbles<1>, word_nibbles<2>, word_nibbles<3>,
                                                    word_nibbles<4>, word_nibbles<5>, word_nibbles<6>};

[[maybe_unused]] void word_int4_block_tile(const TileArgs& t) {
  const int strips = (t.rows + strip - 1) / strip;
  const int64_t ld = int64_t{t.panels} * panel_width;
  for (int p = 0; p < t.panels; ++p) {
    const uint8_t* const begin = t.b + (t.panel_offsets[p] - t.panel_offsets[0]);
    const NibblePanel& panel = *reinterpret_cast<const NibblePanel*>(begin);
    for (int h = 0; h < 2; ++h) {
      const WordNibbles half = {begin + panel.pairs[h], begin + panel.index[h], begin + panel.lines[h], begin + panel.scales[h]};
      for (int i = 0; i < strips; ++i) {
        const Strip s = strip_of(t.rows, strips, i);
        for (int first = 0; first < half_panel; first += group_channels) {
          word_nibble_rows[s.rows - 1](t, half, first, static_cast<const int16_t*>(t.a) + s.begin * quad,
                                       t.t + s.begin * ld + p * panel_width + h * half_panel + first, ld);
        }
      }
    }
  }
}

}  // namespace
}  // namespace halfbyte::avx2
