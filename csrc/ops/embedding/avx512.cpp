// embedding on AVX512.
#include "simd/avx512.h"

#include "ops/embedding/op.h"

namespace halfbyte::HALFBYTE_ISA {
namespace {

using Bytes = __m128i;

HALFBYTE_INLINE Bytes eight_bits(const void* row, int64_t i) {
  return _mm_loadu_si128(reinterpret_cast<const __m128i*>(static_cast<const char*>(row) + i));
}
HALFBYTE_INLINE Bytes four_bits(const void* row, int64_t i) {
  const __m128i low = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(static_cast<const char*>(row) + i / 2));
  return _mm_and_si128(_mm_unpacklo_epi8(low, _mm_srli_epi16(low, 4)), _mm_set1_epi8(15));
}
HALFBYTE_INLINE Bytes nf4(Bytes u) {
  return _mm_shuffle_epi8(_mm_loadu_si128(reinterpret_cast<const __m128i*>(nf4_levels)), u);
}
HALFBYTE_INLINE I widen(Bytes c) { return _mm512_cvtepi8_epi32(c); }
HALFBYTE_INLINE float half(const void* p) {
  uint16_t h;
  __builtin_memcpy(&h, p, 2);
  return _cvtsh_ss(h);
}

}  // namespace
}  // namespace halfbyte::HALFBYTE_ISA

#include "ops/embedding/tile.h"

namespace halfbyte::embedding {

constinit const Kernel kernel_avx512 = {
    {"embedding_avx512", "avx512", isa_avx512},
    HALFBYTE_ISA::rows,
};

}  // namespace halfbyte::embedding
