// embedding on AVX2.
#include "simd/avx2.h"

#include "ops/embedding/op.h"

namespace halfbyte::HALFBYTE_ISA {
namespace {

using Bytes = __m128i;  // the lower half of it

HALFBYTE_INLINE Bytes eight_bits(const void* row, int64_t i) {
  return _mm_loadl_epi64(reinterpret_cast<const __m128i*>(static_cast<const char*>(row) + i));
}
HALFBYTE_INLINE Bytes four_bits(const void* row, int64_t i) {
  int32_t pairs;
  __builtin_memcpy(&pairs, static_cast<const char*>(row) + i / 2, 4);
  const __m128i low = _mm_cvtsi32_si128(pairs);
  return _mm_and_si128(_mm_unpacklo_epi8(low, _mm_srli_epi16(low, 4)), _mm_set1_epi8(15));
}
HALFBYTE_INLINE Bytes nf4(Bytes u) {
  return _mm_shuffle_epi8(_mm_loadu_si128(reinterpret_cast<const __m128i*>(nf4_levels)), u);
}
HALFBYTE_INLINE I widen(Bytes c) { return _mm256_cvtepi8_epi32(c); }
HALFBYTE_INLINE float half(const void* p) {
  uint16_t h;
  __builtin_memcpy(&h, p, 2);
  return _cvtsh_ss(h);
}

}  // namespace
}  // namespace halfbyte::HALFBYTE_ISA

#include "ops/embedding/tile.h"

namespace halfbyte::embedding {

constinit const Kernel kernel_avx2 = {
    {"embedding_avx2", "avx2", isa_avx2},
    HALFBYTE_ISA::rows,
};

}  // namespace halfbyte::embedding
