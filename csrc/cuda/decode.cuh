// Codes of a weight in a lane's registers -> operand A of an mma, exactly.
#pragma once
#include "cuda/api.h"
#include "cuda/ptx.cuh"

namespace halfbyte::cuda {

// 4 bits, 16-bit floats: word s of a piece -> a of m16n8k16. 0x6400 | u is 1024 + u in float16, 0x4300 | u is 128 + u in
// bfloat16; a nibble one place up counts 16 times, and the product takes that back.
template <int x_type>
HALFBYTE_DEVICE void decode4(uint32_t q, uint32_t (&a)[4]) {
  if constexpr (x_type == HALFBYTE_F16) {
    const uint32_t r = q >> 8;
    a[0] = sub_f16x2(and_or(q, 0x000f000fu, 0x64006400u), 0x64086408u);                      // - 1032
    a[1] = fma_f16x2(and_or(q, 0x00f000f0u, 0x64006400u), 0x2c002c00u, 0xd480d480u);         // / 16 - 72
    a[2] = sub_f16x2(and_or(r, 0x000f000fu, 0x64006400u), 0x64086408u);
    a[3] = fma_f16x2(and_or(r, 0x00f000f0u, 0x64006400u), 0x2c002c00u, 0xd480d480u);
  } else {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      a[i] = fma_bf16x2(and_or(q >> (4 * i), 0x000f000fu, 0x43004300u), 0x3f803f80u, 0xc308c308u);  // - 136
    }
  }
}

// 8 bits, 16-bit floats: the words of channels g and g + 8 -> a of m16n8k16.
template <int x_type>
HALFBYTE_DEVICE void decode8(uint32_t low, uint32_t high, uint32_t (&a)[4]) {
  const uint32_t words[2] = {low ^ 0x80808080u, high ^ 0x80808080u};  // code + 128
#pragma unroll
  for (int u = 0; u < 2; ++u) {
    if constexpr (x_type == HALFBYTE_F16) {
      a[u] = sub_f16x2(permute(words[u], 0x64646464u, 0x4140), 0x64806480u);  // 1024 + 128 + c, - 1152
      a[u + 2] = sub_f16x2(permute(words[u], 0x64646464u, 0x4342), 0x64806480u);
    } else {
      // 2^23 + 128 + c in float32; a code has at most 8 significant bits, so bfloat16 holds it.
      float c[4];
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        c[j] = add_rn(bits_to_float(permute(words[u], 0x4b000000u, 0x7440 + j)), -8388736.0f);
      }
      a[u] = floats_to_bf16x2(c[0], c[1]);
      a[u + 2] = floats_to_bf16x2(c[2], c[3]);
    }
  }
}

// 4 bits, int8: 16 times the codes, of the two words of k 0..3 and 4..7 -> a of m16n8k32. In each quad k comes as 0 2 1 3.
HALFBYTE_DEVICE void decode4_s8(uint32_t first, uint32_t second, uint32_t (&a)[4]) {
  a[0] = and_xor(first << 4, 0xf0f0f0f0u, 0x80808080u);
  a[1] = and_xor(first, 0xf0f0f0f0u, 0x80808080u);
  a[2] = and_xor(second << 4, 0xf0f0f0f0u, 0x80808080u);
  a[3] = and_xor(second, 0xf0f0f0f0u, 0x80808080u);
}
constexpr uint32_t quad_order4 = 0x3120;  // `permute` that brings int8 x into that order

}  // namespace halfbyte::cuda
