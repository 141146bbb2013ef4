// linear_w8a8 on AVX2, exactly: vpmaddubsw would saturate (255 * 127 * 2 > 32767), so weights are widened to 16 bits on
// the way into the registers and multiplied by vpmaddwd. Activations arrive as int16 codes. vpmaddubsw + vpmaddwd
// multiply 32 pairs with two multiplier slots, two vpmaddwd do as well: on two 256-bit multipliers exactness is free.
//
// A vector of 16 weights is 4 channels x 4 k, so an accumulator holds two partial sums per channel, added at the end.
// 6 rows x 2 vectors (8 channels): 12 accumulators + 2 weights + 1 broadcast + 1 product = 16 registers.
#include "simd/avx2.h"

#include "core/packed_weight.h"
#include "ops/linear_w8a8/op.h"
#include "simd/epilogue.h"

namespace halfbyte::avx2 {
namespace {

constexpr int mr = 6;

HALFBYTE_INLINE I widen(const uint8_t* p) {
  return _mm256_cvtepu8_epi16(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
}
HALFBYTE_INLINE I broadcast_quad(const int16_t* p) {
  int64_t x;
  __builtin_memcpy(&x, p, 8);
  return _mm256_set1_epi64x(x);
}

// Channels of vectors v and v+1 -> their eight sums in order: hadd works per 128-bit half, the permute joins them.
HALFBYTE_INLINE I join(I first, I second) {
  return _mm256_permute4x64_epi64(_mm256_hadd_epi32(first, second), 0xd8);
}

template <int rows, int vectors>
void tile_part(const TileArgs& t, const uint8_t* b, int32_t* out) {
  const int16_t* a = static_cast<const int16_t*>(t.a);
  const int64_t lda = t.lda;
  I acc[rows][vectors];
#pragma GCC unroll 6
  for (int r = 0; r < rows; ++r)
#pragma GCC unroll 8
    for (int v = 0; v < vectors; ++v) acc[r][v] = _mm256_setzero_si256();

  for (int64_t q = 0; q < t.quads; ++q, a += quad, b += panel_width * quad) {
    if constexpr (rows <= 2) {
      I x[rows];
#pragma GCC unroll 2
      for (int r = 0; r < rows; ++r) x[r] = broadcast_quad(a + r * lda);
#pragma GCC unroll 8
      for (int v = 0; v < vectors; ++v) {
        const I w = widen(b + v * 16);
#pragma GCC unroll 2
        for (int r = 0; r < rows; ++r) acc[r][v] = add_i(acc[r][v], _mm256_madd_epi16(w, x[r]));
      }
    } else {
      I w[vectors];
#pragma GCC unroll 8
      for (int v = 0; v < vectors; ++v) w[v] = widen(b + v * 16);
#pragma GCC unroll 6
      for (int r = 0; r < rows; ++r) {
        const I x = broadcast_quad(a + r * lda);
#pragma GCC unroll 8
        for (int v = 0; v < vectors; ++v) acc[r][v] = add_i(acc[r][v], _mm256_madd_epi16(w[v], x));
      }
    }
  }
#pragma GCC unroll 6
  for (int r = 0; r < rows; ++r)
#pragma GCC unroll 8
    for (int v = 0; v < vectors; v += 2) {
      store_i(out + r * panel_width + v / 2 * width, join(acc[r][v], acc[r][v + 1]));
    }
}

template <int rows, int vectors>
void tile_of(const TileArgs& t) {
  for (int v = 0; v < 8; v += vectors) tile_part<rows, vectors>(t, t.b + v * 16, t.acc + v * 4);
}

void tile(const TileArgs& t) {
  switch (t.rows) {
    case 1: return tile_of<1, 8>(t);
    case 2: return tile_of<2, 4>(t);
    case 3: return tile_of<3, 2>(t);
    case 4: return tile_of<4, 2>(t);
    case 5: return tile_of<5, 2>(t);
    default: return tile_of<6, 2>(t);
  }
}

}  // namespace
}  // namespace halfbyte::avx2

namespace halfbyte::linear_w8a8 {

constinit const GemmKernel kernel_avx2 = {
    {"linear_w8a8", "linear_w8a8_6x8x4_avx2", "avx2", isa_avx2}, avx2::mr, true, 1, 1 << 17, avx2::tile, avx2::epilogue,
};

}  // namespace halfbyte::linear_w8a8
