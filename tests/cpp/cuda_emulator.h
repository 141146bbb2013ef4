// What the files of the emulator's test share.
#pragma once
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <random>

#include "cuda/launch.cuh"

#define REQUIRE(...) \
  if (!(__VA_ARGS__)) std::printf("%s:%d: not true: %s\n", __FILE__, __LINE__, #__VA_ARGS__), std::exit(1)

namespace halfbyte::cuda {

inline std::mt19937 generator(1);
inline uint32_t random_word() { return static_cast<uint32_t>(generator()); }
inline int random_below(int end) { return static_cast<int>(random_word() % static_cast<uint32_t>(end)); }

// A float of 1 + fraction bits, by its definition: an integer shifted, times 2^-(bias + fraction - 1).
struct Format {
  int fraction, bias;
  uint16_t infinity() const { return static_cast<uint16_t>(0x7fff >> fraction << fraction); }
  int integer_of(uint16_t v) const { return (v & ((1 << fraction) - 1)) | ((v & 0x7fff) >> fraction ? 1 << fraction : 0); }
  int shift_of(uint16_t v) const { return (v & 0x7fff) >> fraction ? ((v & 0x7fff) >> fraction) - 1 : 0; }
  int least() const { return bias + fraction - 1; }
  double value(uint16_t v) const { return std::ldexp(integer_of(v), shift_of(v) - least()) * (v & 0x8000 ? -1 : 1); }
  uint16_t random(int exponent, int exponents) const {  // 2^exponent up to 2^(exponent + exponents), of either sign
    const int biased = exponent + bias + random_below(exponents);
    return static_cast<uint16_t>(random_below(2) << 15 | biased << fraction | random_below(1 << fraction));
  }
};
constexpr Format f16{10, 15}, bf16{7, 127};

void test_numbers();

}  // namespace halfbyte::cuda
