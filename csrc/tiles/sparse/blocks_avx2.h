// Tiles of int8 blocks of 16 channels x 4 k (core/sparse_panel.h) on AVX2, exactly: weights widened to 16 bits, activations int16
// codes, as in tiles/avx2.h, whose joining of sums this uses. 6 rows x 8 channels: 12 accumulators + 2 weights + 1 broadcast + 1
// product. Strips are [k / 4][rows][4] int16.
#pragma once
#include "core/sparse_panel.h"
#include "tiles/avx2.h"
#include "tiles/sparse/windows.h"

namespace halfbyte::avx2 {
namespace {

constexpr int block_rows = 24;  // of a tile

void arrange_words(const ArrangeArgs& args) {
  const auto* const a = static_cast<const int16_t*>(args.a);
  auto* strip = static_cast<int16_t*>(args.strip);
  for (int64_t k = 0; k < args.k_padded; k += quad) {
    for (int r = 0; r < args.rows; ++r, strip += quad) memcpy(strip, a + r * args.lda + k, quad * sizeof(int16_t));
  }
}

int64_t word_strip_bytes(int rows, int64_t k_padded) { return rows * k_padded * 2 + 64; }

struct WordList {
  const uint16_t* index;
  const uint8_t* lines;
  int64_t count;
};

// out[r][0..7] (+)= the products of 8 channels of the blocks of a half, from byte `first` of each.
template <int rows>
void word_blocks(const WordList& list, int first, const int16_t* strip, int64_t row_codes, bool add, int32_t* out, int64_t ld) {
  I acc[rows][2];
#pragma GCC unroll 6
  for (int r = 0; r < rows; ++r) acc[r][0] = acc[r][1] = _mm256_setzero_si256();
  for (int64_t i = 0; i < list.count; ++i) {
    const uint8_t* const line = list.lines + i * half_panel * quad + first;
    const int16_t* const x = strip + list.index[i] * row_codes;
    const I low = _mm256_cvtepi8_epi16(_mm_loadu_si128(reinterpret_cast<const __m128i*>(line)));
    const I high = _mm256_cvtepi8_epi16(_mm_loadu_si128(reinterpret_cast<const __m128i*>(line + 16)));
#pragma GCC unroll 6
    for (int r = 0; r < rows; ++r) {
      const I y = broadcast_quad(x + r * quad);
      accumulate(acc[r][0], _mm256_madd_epi16(low, y));
      accumulate(acc[r][1], _mm256_madd_epi16(high, y));
    }
  }
#pragma GCC unroll 6
  for (int r = 0; r < rows; ++r) {
    int32_t* const to = out + r * ld;
    const I sum = join(acc[r][0], acc[r][1]);
    store_i(to, add ? add_i(load_i(to), sum) : sum);
  }
}

using WordBlocks = void (*)(const WordList&, int, const int16_t*, int64_t, bool, int32_t*, int64_t);
constexpr WordBlocks word_rows[strip] = {word_blocks<1>, word_blocks<2>, word_blocks<3>,
                                         word_blocks<4>, word_blocks<5>, word_blocks<6>};

void multiply_lists(const TileArgs& t, const WordList (&lists)[2], bool add, int32_t* out) {
  const int strips = (t.rows + strip - 1) / strip;
  const int64_t ld = int64_t{t.panels} * panel_width;
  for (int half = 0; half < 2; ++half) {
    for (int i = 0; i < strips; ++i) {
      const Strip s = strip_of(t.rows, strips, i);
      for (int first = 0; first < half_panel; first += group_channels) {
        word_rows[s.rows - 1](lists[half], first * quad, static_cast<const int16_t*>(t.a) + s.begin * quad, int64_t{t.rows} * quad,
                              add, out + s.begin * ld + half * half_panel + first, ld);
      }
    }
  }
}

// Calls multiply(panel, its sums) for each panel.
template <class Multiply>
HALFBYTE_INLINE void for_panels(const TileArgs& t, Multiply&& multiply) {
  for (int p = 0; p < t.panels; ++p) {
    multiply(t.b + (t.panel_offsets[p] - t.panel_offsets[0]), t.acc + p * panel_width);
  }
}

[[maybe_unused]] void word_block_tile(const TileArgs& t) {
  for_panels(t, [&](const uint8_t* begin, int32_t* out) {
    const BlockPanel& panel = *reinterpret_cast<const BlockPanel*>(begin);
    WordList lists[2];
    for (int h = 0; h < 2; ++h) {
      lists[h] = {reinterpret_cast<const uint16_t*>(begin + panel.index[h]), begin + panel.lines[h], panel.count[h]};
    }
    multiply_lists(t, lists, false, out);
  });
}

[[maybe_unused]] void word_window_tile(const TileArgs& t) {
  for_panels(t, [&](const uint8_t* begin, int32_t* out) {
    ExpandedWindows source;
    source.open(begin, 0);
    WordList lists[2];
    for (bool add = false; source.next(lists); add = true) multiply_lists(t, lists, add, out);
  });
}

}  // namespace
}  // namespace halfbyte::avx2
