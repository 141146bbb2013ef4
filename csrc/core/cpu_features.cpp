// Detection by cpuid + xgetbv (x86) or hwcap (aarch64), and the forced instruction set.
#include "core/cpu_features.h"

#include <cstdlib>

#include "core/check.h"

#if defined(__x86_64__)
#include <cpuid.h>
#if defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif
#elif defined(__aarch64__) && defined(__linux__)
#include <sys/auxv.h>
#endif

namespace halfbyte {
namespace {

#if defined(__x86_64__)

constexpr uint32_t upto_avx2 = isa_scalar | isa_avx2;
constexpr uint32_t upto_avx512 = upto_avx2 | isa_avx512;
constexpr uint32_t upto_avx512_vnni = upto_avx512 | isa_avx512_vnni;
constexpr uint32_t upto_avx512_vbmi = upto_avx512_vnni | isa_avx512_vbmi;
constexpr IsaInfo isa_table[] = {
    {"scalar", isa_scalar, isa_scalar},
    {"avx2", isa_avx2, upto_avx2},
    {"avx_vnni", isa_avx_vnni, upto_avx2 | isa_avx_vnni},
    {"avx512", isa_avx512, upto_avx512},
    {"avx512_vnni", isa_avx512_vnni, upto_avx512_vnni},
    {"avx512_vbmi", isa_avx512_vbmi, upto_avx512_vbmi},
    {"amx_int8", isa_amx_int8, upto_avx512_vbmi | isa_amx_int8},
};

bool bit(uint32_t word, int index) { return (word >> index) & 1u; }

uint64_t xcr0() {
  uint32_t low, high;
  asm volatile("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
  return (uint64_t{high} << 32) | low;
}

// Linux hands out the 8 KiB of tile registers only to processes that ask (arch_prctl ARCH_REQ_XCOMP_PERM, XTILEDATA).
bool request_amx() {
#if defined(__linux__) && defined(SYS_arch_prctl)
  constexpr int arch_req_xcomp_perm = 0x1023, xtiledata = 18;
  return syscall(SYS_arch_prctl, arch_req_xcomp_perm, xtiledata) == 0;
#else
  return false;
#endif
}

uint32_t detect() {
  uint32_t found = isa_scalar;
  uint32_t a, b, c, d;
  if (!__get_cpuid(1, &a, &b, &c, &d)) return found;
  const bool osxsave = bit(c, 27), avx = bit(c, 28), fma = bit(c, 12), f16c = bit(c, 29);
  if (!osxsave) return found;
  const uint64_t state = xcr0();
  const bool ymm = (state & 0x6) == 0x6;            // SSE and AVX registers are saved
  const bool zmm = ymm && (state & 0xe0) == 0xe0;   // and opmask, upper zmm, zmm16-31
  const bool tiles = (state & 0x60000) == 0x60000;  // and tile configuration and data
  uint32_t b7, c7, d7, a71 = 0, b71, c71, d71;
  if (!__get_cpuid_count(7, 0, &a, &b7, &c7, &d7)) return found;
  if (a >= 1) __get_cpuid_count(7, 1, &a71, &b71, &c71, &d71);
  const bool bmi = bit(b7, 3) && bit(b7, 8);
  if (!(ymm && avx && fma && f16c && bmi && bit(b7, 5))) return found;
  found |= isa_avx2;
  if (bit(a71, 4)) found |= isa_avx_vnni;
  const bool avx512 = zmm && bit(b7, 16) && bit(b7, 17) && bit(b7, 28) && bit(b7, 30) && bit(b7, 31);
  if (!avx512) return found;
  found |= isa_avx512;
  if (!bit(c7, 11)) return found;
  found |= isa_avx512_vnni;
  if (bit(c7, 1)) found |= isa_avx512_vbmi;
  if (tiles && bit(d7, 24) && bit(d7, 25) && request_amx()) found |= isa_amx_int8;
  return found;
}

#elif defined(__aarch64__)

constexpr IsaInfo isa_table[] = {
    {"scalar", isa_scalar, isa_scalar},
    {"neon_dot", isa_neon_dot, isa_scalar | isa_neon_dot},
    {"neon_i8mm", isa_neon_i8mm, isa_scalar | isa_neon_dot | isa_neon_i8mm},
};

uint32_t detect() {
  uint32_t found = isa_scalar;
#if defined(__linux__)
  constexpr unsigned long hwcap_asimddp = 1ul << 20, hwcap2_i8mm = 1ul << 13;
  if (getauxval(AT_HWCAP) & hwcap_asimddp) found |= isa_neon_dot;
  if ((found & isa_neon_dot) && (getauxval(AT_HWCAP2) & hwcap2_i8mm)) found |= isa_neon_i8mm;
#endif
  return found;
}

#else

constexpr IsaInfo isa_table[] = {{"scalar", isa_scalar, isa_scalar}};
uint32_t detect() { return isa_scalar; }

#endif

// With -DHALFBYTE_EMULATE=ON (tests only) some kernels are built on emulated intrinsics; they run wherever the rest of
// what they imply does.
uint32_t with_emulated(uint32_t found) {
#if HALFBYTE_EMULATE
  for (const IsaInfo& info : isa_table) {
    const bool emulated = (info.bit & (isa_avx_vnni | isa_amx_int8)) != 0;
    const uint32_t implied = info.closure & ~info.bit;
    if (emulated && (found & implied) == implied) found |= info.bit;
  }
#endif
  return found;
}

thread_local const IsaInfo* forced = nullptr;

const IsaInfo* supported_info(const std::string& name, const char* origin) {
  const IsaInfo& info = isa_info(name);
  if (!(supported_isas() & info.bit)) {
    throw std::runtime_error(std::string(origin) + ": this machine lacks '" + name +
                             "'. `halfbyte doctor` lists what it has.");
  }
  if (!(built_isas() & info.bit)) {
    throw std::runtime_error(std::string(origin) + ": this build has no kernel for '" + name +
                             "'. `halfbyte doctor` lists what was built.");
  }
  return &info;
}

const IsaInfo* forced_by_environment() {
  const char* name = std::getenv("HALFBYTE_ISA");
  if (!name || !*name) return nullptr;
  try {
    return supported_info(name, "HALFBYTE_ISA");
  } catch (const std::invalid_argument& error) {
    throw std::runtime_error(std::string("HALFBYTE_ISA: ") + error.what());
  }
}

}  // namespace

std::span<const IsaInfo> isas() { return isa_table; }

const IsaInfo& isa_info(const std::string& name) {
  std::string known;
  for (const IsaInfo& info : isa_table) {
    if (name == info.name) return info;
    known += std::string(known.empty() ? "" : ", ") + info.name;
  }
  fail("unknown instruction set '", name, "': this architecture has ", known);
}

uint32_t built_isas() {
  return isa_scalar
#if HALFBYTE_AVX2
         | isa_avx2
#endif
#if HALFBYTE_AVX_VNNI
         | isa_avx_vnni
#endif
#if HALFBYTE_AVX512
         | isa_avx512
#endif
#if HALFBYTE_AVX512_VNNI
         | isa_avx512_vnni
#endif
#if HALFBYTE_AVX512_VBMI
         | isa_avx512_vbmi
#endif
#if HALFBYTE_AMX_INT8
         | isa_amx_int8
#endif
      ;
}

uint32_t supported_isas() {
  static const uint32_t found = with_emulated(detect());
  return found;
}

uint32_t active_isas() {
  if (forced) return supported_isas() & forced->closure;
  static const IsaInfo* const environment = forced_by_environment();
  return environment ? supported_isas() & environment->closure : supported_isas();
}

std::string force_isa(const std::string& name) {
  const std::string previous = forced ? forced->name : "";
  forced = name.empty() ? nullptr : supported_info(name, "force_isa");
  return previous;
}

}  // namespace halfbyte
