// spmm_unstructured_f32 on AVX512: 128 rows. Up to four rows have channels in the lanes and look up the inputs of a list in the 64
// of its window, in four vectors; without lists, of 16 k those that have a weight move together (vcompressps), into the lanes of the
// weights.
#include "simd/avx512.h"

#include "simd/epilogue.h"
#include "tiles/sparse/lists.h"

#include "ops/spmm_unstructured_f32/kernel.h"

namespace halfbyte::avx512 {
namespace {

constexpr int few_rows_anywhere = 4;

// Two lines of a half. The channels that lack a value keep their sums: the input there may be infinite.
template <int rows>
HALFBYTE_INLINE void look_up(ListStream& s, const float* x, int64_t k_padded, F (&sum)[rows]) {
  const float* const inputs = x + *s.places++ * window;
#pragma GCC unroll 2
  for (int line = 0; line < 2; ++line, s.index += half_panel) {
    const __mmask16 stored = *s.masks++;
    const F w = expanded(stored, s.values);
    s.values += __builtin_popcount(stored);
    const I index = _mm512_cvtepu8_epi32(_mm_load_si128(reinterpret_cast<const __m128i*>(s.index)));
    const __mmask16 upper = _mm512_test_epi32_mask(index, _mm512_set1_epi32(window / 2));
#pragma GCC unroll 4
    for (int r = 0; r < rows; ++r) {
      const float* const row = inputs + r * k_padded;
      const F low = _mm512_permutex2var_ps(_mm512_loadu_ps(row), index, _mm512_loadu_ps(row + 16));
      const F high = _mm512_permutex2var_ps(_mm512_loadu_ps(row + 32), index, _mm512_loadu_ps(row + 48));
      sum[r] = _mm512_mask3_fmadd_ps(_mm512_mask_blend_ps(upper, low, high), w, sum[r], stored);
    }
  }
}

// The halves in turns: a sum waits four cycles for the one before it.
template <int rows>
HALFBYTE_INLINE void listed_panel(ListStream (&s)[2], const float* x, int64_t k_padded, float* out, int64_t ld) {
  F sum[2][rows];
#pragma GCC unroll 4
  for (int r = 0; r < rows; ++r) sum[0][r] = sum[1][r] = set1(0);
  const int64_t both = s[0].pairs < s[1].pairs ? s[0].pairs : s[1].pairs;
  for (int64_t i = 0; i < both; ++i) {
    look_up<rows>(s[0], x, k_padded, sum[0]);
    look_up<rows>(s[1], x, k_padded, sum[1]);
  }
  for (int64_t i = both; i < s[0].pairs; ++i) look_up<rows>(s[0], x, k_padded, sum[0]);
  for (int64_t i = both; i < s[1].pairs; ++i) look_up<rows>(s[1], x, k_padded, sum[1]);
#pragma GCC unroll 4
  for (int r = 0; r < rows; ++r) {
    for (int h = 0; h < 2; ++h) _mm512_storeu_ps(out + r * ld + h * half_panel, sum[h][r]);
  }
}

template <int rows>
HALFBYTE_INLINE void masked_panel(MaskStream& s, const float* x, int64_t k_padded, float* out, int64_t ld) {
  alignas(64) float sums[panel_width][rows][width] = {};
  const float* value = s.values;
  for (int64_t k = 0; k < k_padded; k += window, s.masks += panel_width, s.order += panel_width) {
    for (int i = 0; i < panel_width; ++i) {
      float(&to)[rows][width] = sums[s.order[i]];
      const uint64_t mask = s.masks[i];
      F sum[rows];
#pragma GCC unroll 4
      for (int r = 0; r < rows; ++r) sum[r] = _mm512_load_ps(to[r]);
#pragma GCC unroll 4
      for (int part = 0; part < window; part += width) {
        const auto lanes = static_cast<__mmask16>(mask >> part);
        const F w = _mm512_loadu_ps(value);  // beyond the count, finite weights meet zeros
        value += __builtin_popcount(lanes);
#pragma GCC unroll 4
        for (int r = 0; r < rows; ++r) {
          F y = _mm512_loadu_ps(x + r * k_padded + k + part);  // as in expanded()
          asm("vcompressps %0, %0%{%1%}%{z%}" : "+v"(y) : "Yk"(lanes));
          sum[r] = fma(w, y, sum[r]);
        }
      }
#pragma GCC unroll 4
      for (int r = 0; r < rows; ++r) _mm512_store_ps(to[r], sum[r]);
    }
  }
  for (int i = 0; i < panel_width; ++i) {
    for (int r = 0; r < rows; ++r) out[r * ld + i] = reduce_add(_mm512_load_ps(sums[i][r]));
  }
}

// What the next panel begins with comes from memory meanwhile: the hardware learns of a stream from its first lines.
HALFBYTE_INLINE void fetch_lists(const uint8_t* begin) {
  const MaskPanel& panel = *reinterpret_cast<const MaskPanel*>(begin);
  if (!panel.lists) return;
  const ListPanel& lists = *reinterpret_cast<const ListPanel*>(begin + panel.lists);
  for (int h = 0; h < 2; ++h) {
    const int64_t heads[] = {lists.values[h], lists.index[h], lists.masks[h], lists.places[h]};
    for (const int64_t at : heads) {
      for (int line = 0; line < 4; ++line) __builtin_prefetch(begin + at + line * 64);
    }
  }
}

template <int rows>
void few(const TileArgs& t) {
  const auto* const x = static_cast<const float*>(t.a);
  const int64_t k_padded = t.quads * quad, ld = int64_t{t.panels} * panel_width;
  MaskStream masks[max_panels];
  open_masks(t, masks);
  for (int p = 0; p < t.panels; ++p) {
    float* const out = t.t + p * panel_width;
    if (p + 1 < t.panels) fetch_lists(panel_of(t, p + 1));
    if (has_lists(panel_of(t, p))) {
      ListStream lists[2] = {list_stream(panel_of(t, p), 0), list_stream(panel_of(t, p), 1)};
      listed_panel<rows>(lists, x, k_padded, out, ld);
    } else {
      masked_panel<rows>(masks[p], x, k_padded, out, ld);
    }
  }
}

constexpr void (*few_tiles[few_rows_anywhere])(const TileArgs&) = {few<1>, few<2>, few<3>, few<4>};

void tile(const TileArgs& t) {
  if (t.all_rows <= few_rows_anywhere) return few_tiles[t.rows - 1](t);
  tile_anywhere(t);
}

void arrange(const ArrangeArgs& args) {
  if (args.all_rows > few_rows_anywhere) return arrange_anywhere(args);
  for (int r = 0; r < args.rows; ++r) {
    __builtin_memcpy(static_cast<float*>(args.strip) + r * args.k_padded, static_cast<const float*>(args.a) + r * args.lda,
                     static_cast<size_t>(args.k_padded) * sizeof(float));
  }
}

}  // namespace
}  // namespace halfbyte::avx512

namespace halfbyte::spmm_unstructured_f32 {

constinit const GemmKernel kernel_avx512 = {
    .info = {"spmm_unstructured_f32_128x1x1_avx512", "avx512", isa_avx512},
    .wide = false,
    .grain = 1 << 16,
    .grouped = {.mr = avx512::mask_mr, .alone = avx512::mask_mr, .row_step = avx512::width,
                .accumulators = max_panels * avx512::mask_mr, .run = avx512::tile,
                .arrange = avx512::arrange, .strip_bytes = avx512::float_strip_bytes},
    .epilogue = avx512::grouped_epilogue,
    .plain = {},
};

}  // namespace halfbyte::spmm_unstructured_f32
