// Reads a buffer with 32-byte loads; included by the ceiling files of the 256-bit instruction sets.
#pragma once
#include "simd/avx2.h"

namespace halfbyte::HALFBYTE_ISA {
namespace {

uint64_t read(const void* data, int64_t bytes) {
  const I* p = static_cast<const I*>(data);
  I sum[8] = {};
  for (int64_t i = 0; i < bytes / 32; i += 8) {
#pragma GCC unroll 8
    for (int j = 0; j < 8; ++j) sum[j] = _mm256_or_si256(sum[j], _mm256_load_si256(p + i + j));
  }
  I all = sum[0];
#pragma GCC unroll 7
  for (int j = 1; j < 8; ++j) all = _mm256_or_si256(all, sum[j]);
  return static_cast<uint64_t>(static_cast<uint32_t>(reduce_add_i(all)));
}

}  // namespace
}  // namespace halfbyte::HALFBYTE_ISA
