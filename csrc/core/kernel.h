// The plain data that kernels, drivers and the dispatcher share. ISA files include this header, so it holds no
// inline function and no standard container: nothing here can be compiled twice with different instructions.
#pragma once
#include <cstddef>
#include <cstdint>

namespace halfbyte {

enum class DType : int { f32 = 0, bf16 = 1, f16 = 2, i32 = 3 };
enum class Activation : int { none = 0, relu = 1, gelu = 2, gelu_tanh = 3, silu = 4 };

// One bit per instruction set that a kernel file may be named after. cpu_features.cpp says what each one implies.
enum Isa : uint32_t {
  isa_scalar = 1u << 0,
  isa_avx2 = 1u << 1,         // AVX2 + FMA + F16C + BMI1 + BMI2
  isa_avx_vnni = 1u << 2,     // vpdpbusd on ymm, VEX encoded
  isa_avx512 = 1u << 3,       // F + BW + DQ + VL + CD
  isa_avx512_vnni = 1u << 4,  // vpdpbusd on zmm
  isa_amx_int8 = 1u << 5,     // tiles, with the permission of the operating system
  isa_avx512_vbmi = 1u << 8,  // and vpermb, vpmultishiftqb
  isa_neon_dot = 1u << 6,     // sdot / udot
  isa_neon_i8mm = 1u << 7,    // smmla / usmmla
};

// The levels of NormalFloat4 (Dettmers et al. 2023, appendix E) times 127, rounded.
constexpr int8_t nf4_levels[16] = {-127, -88, -67, -50, -36, -23, -12, 0, 10, 20, 31, 43, 56, 71, 92, 127};

struct KernelInfo {
  const char* name;
  const char* isa;
  uint32_t needs;  // the Isa bit of the file that the kernel lives in
};

}  // namespace halfbyte
