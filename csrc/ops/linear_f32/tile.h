// Tiles of float32 weights over the vector vocabulary. A panel is [k][32 channels]. Included by each ISA file after its
// simd header.
#pragma once
#include "simd/epilogue.h"

namespace halfbyte::HALFBYTE_ISA {
namespace {

// `vectors` vectors of columns from `column` on, which may span panels.
template <int rows, int vectors>
HALFBYTE_INLINE void columns(const TileArgs& t, int column) {
  constexpr int per_panel = panel_width / width;
  // Rows three by three: base, base + lda and base + 2 lda are addressing modes. The empty asm keeps gcc from deriving the
  // pointers from one another again.
  constexpr int bases = (rows + 2) / 3;
  const int64_t lda = t.lda, panel = t.panel_bytes / int64_t{sizeof(float)};
  const float* a[bases];
#pragma GCC unroll 4
  for (int i = 0; i < bases; ++i) {
    a[i] = static_cast<const float*>(t.a) + 3 * i * lda;
    asm("" : "+r"(a[i]));
  }
  const float* b = reinterpret_cast<const float*>(t.b) + column / panel_width * panel + column % panel_width;
  F acc[rows][vectors];
#pragma GCC unroll 12
  for (int r = 0; r < rows; ++r)
#pragma GCC unroll 8
    for (int v = 0; v < vectors; ++v) acc[r][v] = set1(0);
  for (int64_t q = 0; q < t.quads; ++q) {
#pragma GCC unroll 4
    for (int u = 0; u < quad; ++u) {
      F w[vectors];
#pragma GCC unroll 8
      for (int v = 0; v < vectors; ++v) {
        w[v] = load<DType::f32>(b + v / per_panel * panel + v % per_panel * width + u * panel_width);
      }
#pragma GCC unroll 12
      for (int r = 0; r < rows; ++r) {
        const F x = set1(a[r / 3][r % 3 * lda + u]);
#pragma GCC unroll 8
        for (int v = 0; v < vectors; ++v) acc[r][v] = fma(x, w[v], acc[r][v]);
      }
    }
    b += quad * panel_width;
#pragma GCC unroll 4
    for (int i = 0; i < bases; ++i) a[i] += quad;
  }
  const int64_t ld = int64_t{t.panels} * panel_width;
#pragma GCC unroll 12
  for (int r = 0; r < rows; ++r)
#pragma GCC unroll 8
    for (int v = 0; v < vectors; ++v) store<DType::f32>(t.t + r * ld + column + v * width, acc[r][v]);
}

template <int rows, int vectors>
void tile(const TileArgs& t) {
  for (int column = 0; column < t.panels * panel_width; column += vectors * width) columns<rows, vectors>(t, column);
}

}  // namespace
}  // namespace halfbyte::HALFBYTE_ISA
