// Ceilings of AVX512-VNNI: 16 independent vpdpbusd chains (latency 4-5, up to two per cycle), 64-byte loads.
#include "simd/vnni512.h"

#include "ceiling/kernel.h"

namespace halfbyte::avx512_vnni {
namespace {

int64_t multiply_adds(int64_t rounds) {
  constexpr int chains = 16;
  I acc[chains];
#pragma GCC unroll 16
  for (int i = 0; i < chains; ++i) acc[i] = _mm512_setzero_si512();
  const I x = set1_i(1);
  for (int64_t n = 0; n < rounds; ++n) {
#pragma GCC unroll 16
    for (int i = 0; i < chains; ++i) dot4(acc[i], x, x);
  }
#pragma GCC unroll 16
  for (int i = 0; i < chains; ++i) asm volatile("" ::"v"(acc[i]));
  return rounds * chains * 64;
}

uint64_t read(const void* data, int64_t bytes) {
  const char* p = static_cast<const char*>(data);
  I sum[8] = {};
  for (int64_t i = 0; i < bytes; i += 512) {
#pragma GCC unroll 8
    for (int j = 0; j < 8; ++j) sum[j] = _mm512_or_si512(sum[j], _mm512_load_si512(p + i + 64 * j));
  }
  I all = sum[0];
#pragma GCC unroll 7
  for (int j = 1; j < 8; ++j) all = _mm512_or_si512(all, sum[j]);
  return static_cast<uint64_t>(_mm512_reduce_or_epi64(all));
}

}  // namespace
}  // namespace halfbyte::avx512_vnni

namespace halfbyte {
constinit const Ceiling ceiling_avx512_vnni = {
    "avx512_vnni", isa_avx512_vnni, avx512_vnni::multiply_adds, avx512_vnni::read};
}
