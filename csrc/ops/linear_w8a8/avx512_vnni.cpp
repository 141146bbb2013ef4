// linear_w8a8 on AVX512-VNNI. Without groups: 12x32 tiles (24 accumulators, 2 weight vectors, 1 broadcast: 27 of 32
// registers), and for few rows up to four panels side by side, because vpdpbusd has a latency of 4-5 cycles at one or two
// per cycle and 1x32 would have two chains only. With groups: tiles/avx512_vnni.h.
//
// Per k-quad a 12x32 tile multiplies 24 times and loads 2 + 12 times; loads run beside the multiplier. B streams at
// 128 bytes per 24 products, which L2 delivers on every server core since Skylake.
//
// The first strip of a block takes its panel from L3 while the hardware prefetchers are busy with up to 12 rows of A:
// without help (prefetch_bytes) the 12x32 tile ran at 80 % of the peak (K = 4096), with 8 KiB or more ahead at 89 %.
#include "tiles/avx512_vnni.h"

#include "ops/linear_w8a8/kernel.h"

namespace halfbyte::avx512_vnni {
namespace {

constexpr int plain_mr = 12, plain_accumulators = 12;

template <int rows, int panels>
void plain(const TileArgs& t) {
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

// [rows - 1][panels - 1]; empty where the accumulators would not fit
constexpr TileFunction plain_tiles[plain_mr][max_panels] = {
    {plain<1, 1>, plain<1, 2>, plain<1, 3>, plain<1, 4>},
    {plain<2, 1>, plain<2, 2>, plain<2, 3>, plain<2, 4>},
    {plain<3, 1>, plain<3, 2>, plain<3, 3>, plain<3, 4>},
    {plain<4, 1>, plain<4, 2>, plain<4, 3>, nullptr},
    {plain<5, 1>, plain<5, 2>, nullptr, nullptr},
    {plain<6, 1>, plain<6, 2>, nullptr, nullptr},
    {plain<7, 1>, nullptr, nullptr, nullptr},
    {plain<8, 1>, nullptr, nullptr, nullptr},
    {plain<9, 1>, nullptr, nullptr, nullptr},
    {plain<10, 1>, nullptr, nullptr, nullptr},
    {plain<11, 1>, nullptr, nullptr, nullptr},
    {plain<12, 1>, nullptr, nullptr, nullptr},
};

void plain_tile(const TileArgs& t) { plain_tiles[t.rows - 1][t.panels - 1](t); }

}  // namespace
}  // namespace halfbyte::avx512_vnni

namespace halfbyte::linear_w8a8 {

constinit const GemmKernel kernel_avx512_vnni = {
    .info = {"linear_w8a8_12x32x4_avx512_vnni", "avx512_vnni", isa_avx512_vnni},
    .wide = false,
    .grain = 1 << 19,
    .grouped = {avx512_vnni::mr, avx512_vnni::alone, 1, avx512_vnni::accumulators, avx512_vnni::tile_a8<avx512_vnni::Bytes>},
    .epilogue = avx512_vnni::epilogue,
    .plain = {avx512_vnni::plain_mr, avx512_vnni::plain_mr, 1, avx512_vnni::plain_accumulators, avx512_vnni::plain_tile},
};

}  // namespace halfbyte::linear_w8a8
