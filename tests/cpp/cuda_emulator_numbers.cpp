// The numbers of the emulated GPU: 16-bit floats compared with integer arithmetic, products of matrices with exact sums.
#include <algorithm>
#include <cmath>
#include <cstring>
#include <type_traits>

#include "cuda_emulator.h"

namespace halfbyte::cuda {
namespace {

using Wide = __int128;

bool special(const Format& f, uint16_t v) { return (v & 0x7fff) >= f.infinity(); }

// An integer times 2^-(2 * unit), rounded to the format by looking for its neighbours.
uint16_t nearest(const Format& f, Wide exact, int unit, bool negative_zero) {
  const uint16_t sign = exact < 0 || (exact == 0 && negative_zero) ? 0x8000 : 0;
  const Wide twice = 2 * (exact < 0 ? -exact : exact);  // so that midpoints are integers
  const auto twice_of = [&](int code) {                 // rounded up; infinity as the number that would follow the last
    const auto v = static_cast<uint16_t>(code);
    const int shift = f.shift_of(v) - f.least() + 2 * unit + 1;
    if (shift > 110) return static_cast<Wide>(1) << 126;
    return shift >= 0 ? static_cast<Wide>(f.integer_of(v)) << shift : static_cast<Wide>(f.integer_of(v) != 0);
  };
  int low = 0, high = f.infinity();
  while (high - low > 1) {
    const int middle = (low + high) / 2;
    (twice_of(middle) <= twice ? low : high) = middle;
  }
  const Wide down = twice - twice_of(low), up = twice_of(high) - twice;
  return sign | static_cast<uint16_t>(down < up || (down == up && low % 2 == 0) ? low : high);
}

// The number in units of 2^-unit.
Wide integer(const Format& f, uint16_t v, int unit) {
  const int shift = f.shift_of(v) - f.least() + unit;
  const Wide magnitude = static_cast<Wide>(f.integer_of(v)) << shift;
  return v & 0x8000 ? -magnitude : magnitude;
}

void test_conversions(const Format& f, float (*widen)(uint16_t), uint16_t (*narrow)(float)) {
  for (int code = 0; code < 65536; ++code) {
    const auto v = static_cast<uint16_t>(code);
    const float wide = widen(v);
    if ((v & 0x7fff) > f.infinity()) {
      REQUIRE(wide != wide && narrow(wide) == 0x7fff);
      continue;
    }
    if ((v & 0x7fff) == f.infinity()) {
      REQUIRE(std::isinf(wide) && std::signbit(wide) == (v >> 15) && narrow(wide) == v);
      continue;
    }
    REQUIRE(wide == f.value(v) && std::signbit(wide) == (v >> 15) && narrow(wide) == v);
    // The midpoint to the next number away from 0 goes to the even one of the two, its neighbours each to their side.
    const auto next = static_cast<uint16_t>(v + 1);
    const auto middle = static_cast<float>((f.value(v) + f.value(next)) / 2);
    if (std::isinf(middle)) continue;  // beyond float32
    const float outwards = v & 0x8000 ? -INFINITY : INFINITY;
    REQUIRE(narrow(middle) == (v % 2 ? next : v));
    REQUIRE(narrow(std::nextafter(middle, outwards)) == next);
    REQUIRE(narrow(std::nextafter(middle, 0.0f)) == v);
  }
  REQUIRE(narrow(3.4e38f) == f.infinity() && narrow(-INFINITY) == (f.infinity() | 0x8000));
}

void test_arithmetic() {
  // Units of 2^-24 hold every f16; of bf16 those from 2^-20 to 2^21 are tested in units of 2^-27.
  const auto random_f16 = [] { return static_cast<uint16_t>(random_word()); };
  int ties = 0;
  for (int i = 0; i < 1000000; ++i) {
    uint16_t a = random_f16(), b = random_f16(), c = random_f16();
    if (special(f16, a) || special(f16, b) || special(f16, c)) continue;
    const bool negative_zero = ((a ^ b) & c & 0x8000) != 0;  // -0 + -0
    const Wide sum = integer(f16, a, 24) * integer(f16, b, 24) + (integer(f16, c, 24) << 24);
    const uint16_t expected = nearest(f16, sum, 24, negative_zero);
    REQUIRE((fma_f16x2(a | c << 16, b | 0x3c000000u, c) & 0xffff) == expected);
    const auto high = [](uint32_t v) { return v << 16; };
    REQUIRE(fma_f16x2(high(a), high(b), high(c)) >> 16 == expected);
    const Wide difference = (integer(f16, a, 24) - integer(f16, b, 24)) << 24;
    REQUIRE((sub_f16x2(a, b) & 0xffff) == nearest(f16, difference, 24, (a & 0x8000) != 0 && a != b && (b & 0x8000) == 0));

    a = bf16.random(-20, 41), b = bf16.random(-20, 41), c = bf16.random(-20, 41);
    const Wide product = integer(bf16, a, 27) * integer(bf16, b, 27), exact = product + (integer(bf16, c, 27) << 27);
    REQUIRE((fma_bf16x2(a, b, c) & 0xffff) == nearest(bf16, exact, 27, false));
    // A product that is a tie by itself, and an addend that a double does not see next to it.
    const uint16_t tie = nearest(bf16, product, 27, false), tiny = 0x0100;
    const uint16_t up = fma_bf16x2(a, b, tiny) & 0xffff, down = fma_bf16x2(a, b, tiny | 0x8000) & 0xffff;
    if (up != down) {
      ++ties;
      REQUIRE((up == tie) != (down == tie) && (up > down ? up - down : down - up) == 1 && bf16_to_float(up) > bf16_to_float(down));
    }
  }
  REQUIRE(ties > 1000);
  REQUIRE(fma_f16x2(0x7bff, 0x7bff, 0xfc00) == 0xfc00 && fma_f16x2(0x7c00, 0, 0) == 0x7fff && sub_f16x2(0x7c00, 0x7c00) == 0x7fff);
  REQUIRE(floats_to_bf16x2(1.0f, -2.0f) == 0xc0003f80 && permute(0x33221100, 0x77665544, 0x7241) == 0x77224411);
  REQUIRE(and_or(0xff00, 0x0ff0, 0x1) == 0x0f01 && and_xor(0xff00, 0x0ff0, 0x0f01) == 0x1);
  REQUIRE(float_to_bits(rsqrt_rn(4.0f)) == 0x3f000000 && fma_rn(1 + 0x1p-12f, 1 + 0x1p-12f, -1 - 0x1p-11f) == 0x1p-24f);
}

// ---------------------------------------------------------------- matrices

struct Matrices {
  const void *a, *b;
  void* d;
};

// The formulas of the PTX ISA for a_i, b_i and c_i, element by element.
template <int k, class Element, class Number>
HALFBYTE_KERNEL(32, 1) multiply(const Matrices m) {
  constexpr int per_word = 4 / sizeof(Element);
  const auto* const a = static_cast<const Element*>(m.a);  // [16][k]
  const auto* const b = static_cast<const Element*>(m.b);  // [k][8]
  auto* const all = static_cast<Number*>(m.d);             // [16][8]
  const int group = thread() >> 2, in_group = thread() % 4;
  Element a_i[4 * per_word], b_i[2 * per_word];
  for (int i = 0; i < 4 * per_word; ++i) {
    const int row = i / per_word % 2 ? group + 8 : group;
    a_i[i] = a[row * k + in_group * per_word + i % per_word + (i >= 2 * per_word ? k / 2 : 0)];
  }
  for (int i = 0; i < 2 * per_word; ++i) b_i[i] = b[(in_group * per_word + i % per_word + (i >= per_word ? k / 2 : 0)) * 8 + group];
  uint32_t a_words[4], b_words[2];
  std::memcpy(a_words, a_i, sizeof a_words);
  std::memcpy(b_words, b_i, sizeof b_words);
  Number d[4];
  for (int i = 0; i < 4; ++i) d[i] = all[(i < 2 ? group : group + 8) * 8 + in_group * 2 + (i & 1)];
  if constexpr (sizeof(Element) == 1) mma_s8(d, a_words, b_words[0], b_words[1]);
  else if constexpr (std::is_signed_v<Element>) mma_bf16(d, a_words, b_words[0], b_words[1]);
  else mma_f16(d, a_words, b_words[0], b_words[1]);
  for (int i = 0; i < 4; ++i) all[(i < 2 ? group : group + 8) * 8 + in_group * 2 + (i & 1)] = d[i];
}

template <int k, class Element, class Number>
void test_multiply(double (*value)(Element), Element (*random_element)(), Number (*random_sum)()) {
  Element a[16 * k], b[k * 8];
  Number c[16 * 8], d[16 * 8];
  for (auto& v : a) v = random_element();
  for (auto& v : b) v = random_element();
  for (int i = 0; i < 16 * 8; ++i) c[i] = d[i] = random_sum();
  REQUIRE(launch<multiply<k, Element, Number>>({.grid = {1, 1, 1}, .threads = 32, .shared_bytes = 0}, Matrices{a, b, d}) == 0);
  for (int i = 0; i < 16 * 8; ++i) {
    double sum = c[i];  // of numbers that a double adds without rounding
    for (int j = 0; j < k; ++j) sum += value(a[i / 8 * k + j]) * value(b[j * 8 + i % 8]);
    REQUIRE(d[i] == static_cast<Number>(sum));
  }
}

struct SparseMatrices {
  const int8_t* a;        // [16][64], in every four two
  const uint8_t* places;  // [16][16]: where those two are, the first in the lower two bits
  const int8_t* b;        // [64][8]
  int* d;                 // [16][8]
};

// The formulas of the PTX ISA for mma.sp.m16n8k64. Lane 4 g + 2 h + u has the places of row g + 8 u, columns from 32 h.
HALFBYTE_KERNEL(32, 1) multiply_sparse(const SparseMatrices m) {
  const int group = thread() >> 2, in_group = thread() % 4;
  int8_t a_i[16], b_i[16];
  uint32_t a_words[4], b_words[4], indices = 0;
  for (int i = 0; i < 16; ++i) {
    const int row = i / 4 % 2 ? group + 8 : group, first = in_group * 8 + (i < 8 ? 0 : 32), quad = first / 4 + i % 4 / 2;
    a_i[i] = m.a[row * 64 + quad * 4 + (m.places[row * 16 + quad] >> i % 2 * 2 & 3)];
    b_i[i] = m.b[(in_group * 4 + i % 4 + i / 4 * 16) * 8 + group];
  }
  std::memcpy(a_words, a_i, sizeof a_words);
  std::memcpy(b_words, b_i, sizeof b_words);
  for (int i = 0; i < 8; ++i) {
    indices |= static_cast<uint32_t>(m.places[(group + in_group % 2 * 8) * 16 + in_group / 2 * 8 + i]) << 4 * i;
  }
  int d[4];
  for (int i = 0; i < 4; ++i) d[i] = m.d[(i < 2 ? group : group + 8) * 8 + in_group * 2 + (i & 1)];
  mma_sparse_s8(d, a_words, b_words, indices);
  for (int i = 0; i < 4; ++i) m.d[(i < 2 ? group : group + 8) * 8 + in_group * 2 + (i & 1)] = d[i];
}

void test_multiply_sparse() {
  int8_t a[16 * 64] = {}, b[64 * 8];
  uint8_t places[16 * 16];
  int d[16 * 8], expected[16 * 8];
  for (auto& v : b) v = static_cast<int8_t>(random_word());
  for (int i = 0; i < 16 * 16; ++i) {
    const int second = 1 + random_below(3), first = random_below(second);
    places[i] = static_cast<uint8_t>(first | second << 2);
    a[i * 4 + first] = static_cast<int8_t>(random_word());
    a[i * 4 + second] = static_cast<int8_t>(random_word());
  }
  for (int i = 0; i < 16 * 8; ++i) {
    expected[i] = d[i] = static_cast<int>(random_word()) / 2;
    for (int k = 0; k < 64; ++k) expected[i] += a[i / 8 * 64 + k] * b[k * 8 + i % 8];
  }
  const Launch how{.grid = {1, 1, 1}, .threads = 32, .shared_bytes = 0};
  REQUIRE(launch<multiply_sparse>(how, SparseMatrices{a, places, b, d}) == 0);
  REQUIRE(std::equal(d, d + 16 * 8, expected));
}

void test_multiplies() {
  for (int round = 0; round < 100; ++round) {
    const auto sum = [] { return static_cast<float>(static_cast<int>(random_word())) * 0x1p-28f; };
    test_multiply<16, uint16_t, float>([](uint16_t v) { return f16.value(v); }, [] { return f16.random(-7, 12); }, sum);
    test_multiply<16, int16_t, float>([](int16_t v) { return bf16.value(static_cast<uint16_t>(v)); },
                                      [] { return static_cast<int16_t>(bf16.random(-7, 12)); }, sum);
    test_multiply<32, int8_t, int>([](int8_t v) -> double { return v; }, [] { return static_cast<int8_t>(random_word()); },
                                   [] { return static_cast<int>(random_word()) / 2; });
    test_multiply_sparse();
  }
}

}  // namespace

void test_numbers() {
  test_conversions(f16, f16_to_float, float_to_f16);
  test_conversions(bf16, bf16_to_float, float_to_bf16);
  test_arithmetic();
  test_multiplies();
}

}  // namespace halfbyte::cuda
