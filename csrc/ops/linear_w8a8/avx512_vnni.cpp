// linear_w8a8 on AVX512-VNNI: 12x32 tiles (24 accumulators, 2 weight vectors, 1 broadcast: 27 of 32 registers), and for
// few rows up to four panels side by side, because vpdpbusd has a latency of 4-5 cycles at one or two per cycle and
// 1x32 would have two chains only.
//
// Per k-quad a 12x32 tile multiplies 24 times and loads 2 + 12 times; loads run beside the multiplier. B streams at
// 128 bytes per 24 products, which L2 delivers on every server core since Skylake.
#include "simd/avx512.h"

#include "ops/linear_w8a8/kernel.h"
#include "simd/epilogue.h"
#include "simd/vnni512.h"

namespace halfbyte::avx512_vnni {
namespace {

constexpr int mr = 12, accumulators = 12, unroll = 4;

// The first strip of a block takes its panel from L3 while the hardware prefetchers are busy with up to 12 rows of A:
// without help the 12x32 tile ran at 80 % of the peak (K = 4096), with 8 KiB or more ahead at 89 %.
constexpr int prefetch_bytes = 16 * 1024;

template <int rows, int panels>
void tile_of(const TileArgs& t) {
  constexpr int vectors = 2 * panels;
  // Rows three by three: base, base + lda and base + 2 lda are addressing modes, so 12 rows take four pointers and no
  // spill. The empty asm keeps gcc from deriving the pointers from one another again.
  constexpr int bases = (rows + 2) / 3;
  const int64_t lda = t.lda;
  const int8_t* a[bases];
#pragma GCC unroll 4
  for (int i = 0; i < bases; ++i) {
    a[i] = static_cast<const int8_t*>(t.a) + 3 * i * lda;
    asm("" : "+r"(a[i]));
  }
  const uint8_t* b = t.b;
  const int64_t panel_bytes = t.panel_bytes;
  I acc[rows][vectors];
#pragma GCC unroll 24
  for (int r = 0; r < rows; ++r)
#pragma GCC unroll 8
    for (int v = 0; v < vectors; ++v) acc[r][v] = _mm512_setzero_si512();

  for (int64_t q = 0; q < t.quads; q += unroll) {
#pragma GCC unroll 4
    for (int u = 0; u < unroll; ++u) {
      I w[vectors];
#pragma GCC unroll 8
      for (int v = 0; v < vectors; ++v) {
        w[v] = _mm512_loadu_si512(b + (v / 2) * panel_bytes + (v % 2) * 64 + u * panel_width * quad);
      }
#pragma GCC unroll 24
      for (int r = 0; r < rows; ++r) {
        const I x = broadcast_quad(a[r / 3] + (r % 3) * lda + u * quad);
#pragma GCC unroll 8
        for (int v = 0; v < vectors; ++v) dot4(acc[r][v], w[v], x);
      }
    }
    if constexpr (panels == 1) {
#pragma GCC unroll 8
      for (int line = 0; line < unroll * vectors; ++line) {
        _mm_prefetch(reinterpret_cast<const char*>(b) + prefetch_bytes + 64 * line, _MM_HINT_T1);
      }
    }
    b += unroll * panel_width * quad;
#pragma GCC unroll 4
    for (int i = 0; i < bases; ++i) a[i] += unroll * quad;
  }
#pragma GCC unroll 24
  for (int r = 0; r < rows; ++r)
#pragma GCC unroll 8
    for (int v = 0; v < vectors; ++v) store_i(t.acc + (r * vectors + v) * width, acc[r][v]);
}

using TileFunction = void (*)(const TileArgs&);
// [rows - 1][panels - 1]; empty where the accumulators would not fit
constexpr TileFunction tiles[mr][max_panels] = {
    {tile_of<1, 1>, tile_of<1, 2>, tile_of<1, 3>, tile_of<1, 4>},
    {tile_of<2, 1>, tile_of<2, 2>, tile_of<2, 3>, tile_of<2, 4>},
    {tile_of<3, 1>, tile_of<3, 2>, tile_of<3, 3>, tile_of<3, 4>},
    {tile_of<4, 1>, tile_of<4, 2>, tile_of<4, 3>, nullptr},
    {tile_of<5, 1>, tile_of<5, 2>, nullptr, nullptr},
    {tile_of<6, 1>, tile_of<6, 2>, nullptr, nullptr},
    {tile_of<7, 1>, nullptr, nullptr, nullptr},
    {tile_of<8, 1>, nullptr, nullptr, nullptr},
    {tile_of<9, 1>, nullptr, nullptr, nullptr},
    {tile_of<10, 1>, nullptr, nullptr, nullptr},
    {tile_of<11, 1>, nullptr, nullptr, nullptr},
    {tile_of<12, 1>, nullptr, nullptr, nullptr},
};

void tile(const TileArgs& t) { tiles[t.rows - 1][t.panels - 1](t); }

}  // namespace
}  // namespace halfbyte::avx512_vnni

namespace halfbyte::linear_w8a8 {

constinit const GemmKernel kernel_avx512_vnni = {
    .info = {"linear_w8a8_12x32x4_avx512_vnni", "avx512_vnni", isa_avx512_vnni},
    .mr = avx512_vnni::mr,
    .row_step = 1,
    .wide = false,
    .accumulators = avx512_vnni::accumulators,
    .grain = 1 << 19,
    .tile = avx512_vnni::tile,
    .epilogue = avx512_vnni::epilogue,
};

}  // namespace halfbyte::linear_w8a8
