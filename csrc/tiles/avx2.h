// Tiles of the linear ops on AVX2, exactly. 8-bit weights: vpmaddubsw would saturate (255 * 127 * 2 > 32767), so they are
// widened to 16 bits and multiplied by vpmaddwd; activations, of 8 or 16 bits, arrive as int16 codes. vpmaddubsw + vpmaddwd multiply 32 pairs with two multiplier
// slots, two vpmaddwd do as well; exactness costs one more addition.
//
// A vector of 16 weights is 4 channels x 4 k, so an accumulator holds two partial sums per channel, added at the end.
// 6 rows x 2 vectors (8 channels): 12 accumulators + 2 weights + 1 broadcast + 1 product = 16 registers.
//
// The additions compete with everything else for the four vector pipes, so the widening (one shuffle per vector) is done
// once per 1024 k for up to 48 rows; up to 12 rows widen on the fly.
//
// 4-bit weights times 8-bit activations do not saturate: 15 * 128 * 2 = 3840, and eight such fit int16.
#pragma once
#include <string.h>

#include "simd/avx2.h"

#include "simd/epilogue.h"
#include "tiles/groups.h"

namespace halfbyte::avx2 {
namespace {

constexpr int mr = 48, strip = 6, on_the_fly = 12;
constexpr int groups = 4, group_channels = 8;  // a panel is walked in groups of 8 channels, two vectors

// k is walked in chunks: a widened group (16 KiB) and the activations of a strip (12 KiB) share L1; sums of a chunk go to
// memory in between.
constexpr int64_t quads_per_chunk = 256;

HALFBYTE_INLINE I widen(const uint8_t* p) {
  return _mm256_cvtepu8_epi16(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
}
HALFBYTE_INLINE I broadcast_quad(const int16_t* p) {
  int64_t x;
  __builtin_memcpy(&x, p, 8);
  return _mm256_set1_epi64x(x);
}

// acc += product in place. From _mm256_add_epi32 gcc 12 makes a chain of register copies and spills.
HALFBYTE_INLINE void accumulate(I& acc, I product) { asm("vpaddd %1, %0, %0" : "+x"(acc) : "x"(product)); }

// Channels of vectors v and v+1 -> their eight sums in order: hadd works per 128-bit half, the permute joins them.
HALFBYTE_INLINE I join(I first, I second) {
  return _mm256_permute4x64_epi64(_mm256_hadd_epi32(first, second), 0xd8);
}

// Where weights come from: the packed panel (bytes, 128 per quad) or the widened chunk (int16, one group).
struct Packed {
  static constexpr int64_t quad_bytes = panel_width * quad;
  static HALFBYTE_INLINE I load(const uint8_t* b, int v) { return widen(b + v * 16); }
};
struct Widened {
  static constexpr int64_t quad_bytes = 2 * group_channels * quad;
  static HALFBYTE_INLINE I load(const uint8_t* b, int v) {
    return _mm256_load_si256(reinterpret_cast<const __m256i*>(b) + v);
  }
};

// out[r][c] (+)= the products of `quads` quads of `vectors` vectors of 4 channels.
template <class Weights, int rows, int vectors>
void multiply(const int16_t* first_row, int64_t lda, const uint8_t* b, int64_t quads, bool add, int32_t* out) {
  // Rows three by three: base, base + lda and base + 2 lda are addressing modes (see avx512_vnni.cpp).
  constexpr int bases = (rows + 2) / 3;
  const int16_t* a[bases];
#pragma GCC unroll 2
  for (int i = 0; i < bases; ++i) {
    a[i] = first_row + 3 * i * lda;
    asm("" : "+r"(a[i]));
  }
  I acc[rows][vectors];
#pragma GCC unroll 6
  for (int r = 0; r < rows; ++r)
#pragma GCC unroll 8
    for (int v = 0; v < vectors; ++v) acc[r][v] = _mm256_setzero_si256();

  constexpr int unroll = rows <= 2 ? 1 : 4;  // k is padded to 16 quads
  for (int64_t q = 0; q < quads; q += unroll, b += unroll * Weights::quad_bytes) {
    if constexpr (rows <= 2) {
      I x[rows];
#pragma GCC unroll 2
      for (int r = 0; r < rows; ++r) x[r] = broadcast_quad(a[r / 3] + (r % 3) * lda);
#pragma GCC unroll 8
      for (int v = 0; v < vectors; ++v) {
        const I w = Weights::load(b, v);
#pragma GCC unroll 2
        for (int r = 0; r < rows; ++r) accumulate(acc[r][v], _mm256_madd_epi16(w, x[r]));
      }
    } else {
#pragma GCC unroll 4
      for (int u = 0; u < unroll; ++u) {
        I w[vectors];
#pragma GCC unroll 8
        for (int v = 0; v < vectors; ++v) w[v] = Weights::load(b + u * Weights::quad_bytes, v);
#pragma GCC unroll 6
        for (int r = 0; r < rows; ++r) {
          const I x = broadcast_quad(a[r / 3] + (r % 3) * lda + u * quad);
#pragma GCC unroll 8
          for (int v = 0; v < vectors; ++v) accumulate(acc[r][v], _mm256_madd_epi16(w[v], x));
        }
      }
    }
#pragma GCC unroll 2
    for (int i = 0; i < bases; ++i) a[i] += unroll * quad;
  }
#pragma GCC unroll 6
  for (int r = 0; r < rows; ++r)
#pragma GCC unroll 8
    for (int v = 0; v < vectors; v += 2) {
      int32_t* const sums = out + r * panel_width + v / 2 * width;
      const I sum = join(acc[r][v], acc[r][v + 1]);
      store_i(sums, add ? add_i(load_i(sums), sum) : sum);
    }
}

using Multiply = void (*)(const int16_t*, int64_t, const uint8_t*, int64_t, bool, int32_t*);

// One to six rows of a group.
template <class Weights>
constexpr Multiply of_rows[strip] = {multiply<Weights, 1, 2>, multiply<Weights, 2, 2>, multiply<Weights, 3, 2>,
                                     multiply<Weights, 4, 2>, multiply<Weights, 5, 2>, multiply<Weights, 6, 2>};

// Rows of the i-th of `strips` nearly equal strips.
struct Strip {
  int begin, rows;
};
inline Strip strip_of(int rows, int strips, int i) {
  const int begin = rows * i / strips;
  return {begin, rows * (i + 1) / strips - begin};
}

void multiply_packed(const TileArgs& t, int64_t q, int64_t quads) {
  const int strips = (t.rows + strip - 1) / strip;
  const uint8_t* b = t.b + q * panel_width * quad;
  for (int i = 0; i < strips; ++i) {
    const Strip s = strip_of(t.rows, strips, i);
    const int16_t* a = static_cast<const int16_t*>(t.a) + s.begin * t.lda + q * quad;
    int32_t* out = t.acc + s.begin * panel_width;
    if (s.rows == 1) {
      multiply<Packed, 1, 8>(a, t.lda, b, quads, q > 0, out);
      continue;
    }
    for (int g = 0; g < groups; ++g) {
      of_rows<Packed>[s.rows - 1](a, t.lda, b + g * 32, quads, q > 0, out + g * group_channels);
    }
  }
}

void multiply_widened(const TileArgs& t, int64_t q, int64_t quads) {
  alignas(64) uint8_t widened[groups][quads_per_chunk * Widened::quad_bytes];
  const uint8_t* b = t.b + q * panel_width * quad;
  for (int64_t i = 0; i < quads; ++i) {
#pragma GCC unroll 8
    for (int v = 0; v < 2 * groups; ++v) {
      uint8_t* const out = widened[v / 2] + i * Widened::quad_bytes + v % 2 * 32;
      _mm256_store_si256(reinterpret_cast<__m256i*>(out), widen(b + i * panel_width * quad + v * 16));
    }
  }
  // The next chunk comes from L3 meanwhile, a few lines per group: without it the multipliers wait 10 % of the time.
  const int64_t left = t.quads - q - quads;  // none: the next chunk is the first one of the next panel
  const int64_t next_quads = left <= 0 ? quads : left < quads_per_chunk ? left : quads_per_chunk;
  const uint8_t* next = b + quads * panel_width * quad;
  const int strips = (t.rows + strip - 1) / strip;
  const int64_t lines = (next_quads * panel_width * quad / 64 + strips * groups - 1) / (strips * groups);
  for (int i = 0; i < strips; ++i) {
    const Strip s = strip_of(t.rows, strips, i);
    const int16_t* a = static_cast<const int16_t*>(t.a) + s.begin * t.lda + q * quad;
    for (int g = 0; g < groups; ++g) {
      for (int64_t line = 0; line < lines; ++line, next += 64) {
        _mm_prefetch(reinterpret_cast<const char*>(next), _MM_HINT_T1);
      }
      of_rows<Widened>[s.rows - 1](a, t.lda, widened[g], quads, q > 0,
                                   t.acc + s.begin * panel_width + g * group_channels);
    }
  }
}

void byte_sums(const TileArgs& t) {
  int64_t q = 0;
  do {
    const int64_t quads = t.quads - q < quads_per_chunk ? t.quads - q : quads_per_chunk;
    if (t.rows <= on_the_fly) {
      multiply_packed(t, q, quads);
    } else {
      multiply_widened(t, q, quads);
    }
    q += quads;
  } while (q < t.quads);
}

constexpr int nibble_mr = 24;
constexpr int64_t quads_per_sum = 8;

// Half a line of nibbles (channels c .. c+7 low, c+16 .. c+23 high), summed in int16 for 8 quads, then in int32 in memory.
template <int rows>
void nibble_part(const int8_t* a, int64_t lda, const uint8_t* b, int64_t quads, int32_t* out) {
  const I low_mask = _mm256_set1_epi8(0x0f), ones = _mm256_set1_epi16(1);
  for (int64_t first = 0; first < quads; first += quads_per_sum) {
    I acc[rows][2];
#pragma GCC unroll 6
    for (int r = 0; r < rows; ++r) acc[r][0] = acc[r][1] = _mm256_setzero_si256();
    for (int64_t q = 0; q < quads_per_sum; ++q, a += quad, b += byte_line / 2) {
      const I x = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(b));
      const I low = _mm256_and_si256(x, low_mask), high = _mm256_and_si256(_mm256_srli_epi16(x, 4), low_mask);
#pragma GCC unroll 6
      for (int r = 0; r < rows; ++r) {
        int32_t word;
        __builtin_memcpy(&word, a + r * lda, 4);
        const I y = _mm256_set1_epi32(word);
        asm("vpaddw %1, %0, %0" : "+x"(acc[r][0]) : "x"(_mm256_maddubs_epi16(low, y)));
        asm("vpaddw %1, %0, %0" : "+x"(acc[r][1]) : "x"(_mm256_maddubs_epi16(high, y)));
      }
    }
#pragma GCC unroll 6
    for (int r = 0; r < rows; ++r) {
      I low = _mm256_madd_epi16(acc[r][0], ones), high = shift_left<4>(_mm256_madd_epi16(acc[r][1], ones));
      int32_t *const to_low = out + r * panel_width, *const to_high = to_low + 16;
      if (first) low = add_i(low, load_i(to_low)), high = add_i(high, load_i(to_high));
      store_i(to_low, low);
      store_i(to_high, high);
    }
  }
}

using NibblePart = void (*)(const int8_t*, int64_t, const uint8_t*, int64_t, int32_t*);
constexpr NibblePart nibble_parts[strip] = {nibble_part<1>, nibble_part<2>, nibble_part<3>,
                                            nibble_part<4>, nibble_part<5>, nibble_part<6>};

void int4_sums(const TileArgs& t) {
  const int strips = (t.rows + strip - 1) / strip;
  for (int half = 0; half < 2; ++half) {
    for (int i = 0; i < strips; ++i) {
      const Strip s = strip_of(t.rows, strips, i);
      nibble_parts[s.rows - 1](static_cast<const int8_t*>(t.a) + s.begin * t.lda, t.lda, t.b + half * 32, t.quads,
                               t.acc + s.begin * panel_width + half * 8);
    }
  }
}

constexpr auto bytes_a8 = tile_in_groups<byte_sums, 8, 1, mr, int16_t>;
constexpr auto bytes_a16 = tile_in_groups<byte_sums, 8, 1, mr, int16_t>;
constexpr auto nibbles_a8 = tile_in_groups<int4_sums, 4, 1, nibble_mr, int8_t>;
constexpr auto nibbles_a16 = tile_in_groups<nibble_sums<byte_sums, mr, int16_t>, 4, 1, mr, int16_t>;

}  // namespace
}  // namespace halfbyte::avx2
