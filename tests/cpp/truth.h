// What the tests compare with: the storage types by arithmetic instead of bits, and the formulas of quantize_rows and of
// the activations once more.
#pragma once
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <random>
#include <string>
#include <vector>

#include "core/kernel.h"

namespace halfbyte::truth {

using Rng = std::mt19937;

inline int below(Rng& rng, int n) { return static_cast<int>(rng() % static_cast<unsigned>(n)); }
inline float uniform(Rng& rng) { return static_cast<float>(static_cast<int32_t>(rng())) * 0x1p-30f; }  // in [-2, 2]

[[noreturn]] inline void die(const std::string& what) {
  std::fprintf(stderr, "core_test: %s\n", what.c_str());
  std::exit(1);
}

inline float from_half(uint16_t h) {
  const int exponent = (h >> 10) & 31, fraction = h & 1023;
  const float sign = h & 0x8000 ? -1.0f : 1.0f;
  if (exponent == 31) return fraction ? NAN : sign * INFINITY;
  return sign * std::ldexp(static_cast<float>(exponent ? fraction + 1024 : fraction), (exponent ? exponent : 1) - 25);
}
inline uint16_t to_half(float x) {
  if (std::isnan(x)) return 0x7e00;
  const uint16_t sign = std::signbit(x) ? 0x8000 : 0;
  const float magnitude = std::fabs(x);
  if (magnitude >= 65520) return sign | 0x7c00;
  const int exponent = std::max(magnitude > 0 ? std::ilogb(magnitude) : -14, -14);
  const int steps = static_cast<int>(std::nearbyint(std::ldexp(magnitude, 10 - exponent)));  // 2^10 .. 2^11 if normal
  return static_cast<uint16_t>(sign | (((exponent + 14) << 10) + steps));
}
inline float from_brain(uint16_t h) {
  const uint32_t bits = uint32_t{h} << 16;
  float x;
  std::memcpy(&x, &bits, 4);
  return x;
}
inline uint16_t to_brain(float x) {
  if (!std::isfinite(x)) return std::isnan(x) ? 0x7fc0 : x > 0 ? 0x7f80 : 0xff80;
  uint32_t bits;
  std::memcpy(&bits, &x, 4);
  const uint32_t rest = bits & 0xffff, up = rest > 0x8000 || (rest == 0x8000 && (bits & 0x10000));
  return static_cast<uint16_t>((bits >> 16) + up);
}

inline int64_t size_of(DType type) { return type == DType::f32 || type == DType::i32 ? 4 : 2; }
inline float get(DType type, const void* base, int64_t i) {
  if (type == DType::f32) {
    float x;
    std::memcpy(&x, static_cast<const char*>(base) + 4 * i, 4);
    return x;
  }
  uint16_t h;
  std::memcpy(&h, static_cast<const char*>(base) + 2 * i, 2);
  return type == DType::bf16 ? from_brain(h) : from_half(h);
}
inline void put(DType type, void* base, int64_t i, float x) {
  if (type == DType::f32) {
    std::memcpy(static_cast<char*>(base) + 4 * i, &x, 4);
  } else {
    const uint16_t h = type == DType::bf16 ? to_brain(x) : to_half(x);
    std::memcpy(static_cast<char*>(base) + 2 * i, &h, 2);
  }
}
inline float rounded(DType type, float x) {
  float box;
  put(type, &box, 0, x);
  return get(type, &box, 0);
}

// NormalFloat4 (Dettmers et al. 2023, appendix E) times 127, rounded.
constexpr int8_t nf4_levels[16] = {-127, -88, -67, -50, -36, -23, -12, 0, 10, 20, 31, 43, 56, 71, 92, 127};

struct Row {
  float scale;
  int32_t zero, sum;
  std::vector<int16_t> codes;
};

// Symmetric codes go up to `limit`, 127 or 32639.
inline Row quantize(const std::vector<float>& x, bool symmetric, float static_scale, int32_t static_zero,
                    int32_t limit = 127) {
  Row row{1, 0, 0, std::vector<int16_t>(x.size(), 0)};
  float lo = 0, hi = 0;
  for (const float v : x) {
    if (!std::isfinite(v)) {
      row.scale = NAN;
      return row;
    }
    lo = std::fmin(lo, v), hi = std::fmax(hi, v);
  }
  float scale = symmetric ? std::fmax(hi, -lo) / static_cast<float>(limit) : hi / 255.0f - lo / 255.0f;
  if (static_scale != 0) scale = static_scale;
  if (scale < 0x1p-100f) return row;
  const float inverse = 1.0f / scale;
  row.scale = scale;
  if (static_scale != 0) {
    row.zero = static_zero;
  } else if (!symmetric) {
    row.zero = static_cast<int32_t>(std::fmin(std::nearbyint(-(lo * inverse)) - 128.0f, 127.0f));
  }
  for (size_t i = 0; i < x.size(); ++i) {
    const double q = std::nearbyint(double{x[i] * inverse}) + row.zero;
    row.codes[i] = static_cast<int16_t>(std::fmax(std::fmin(q, limit), symmetric ? -limit : -128));
    row.sum += row.codes[i];
  }
  return row;
}

// Group g of a row; empty where the groups reach beyond the row.
inline std::vector<float> group_of(const std::vector<float>& x, int64_t group, int64_t g) {
  const int64_t k = static_cast<int64_t>(x.size()), first = std::min(g * group, k), end = std::min(first + group, k);
  return {x.begin() + first, x.begin() + end};
}

inline double activate(Activation activation, double y) {
  switch (activation) {
    case Activation::relu: return y > 0 || std::isnan(y) ? y : 0;
    case Activation::gelu: return y * 0.5 * std::erfc(-y / std::sqrt(2.0));
    case Activation::gelu_tanh: return y / (1 + std::exp(-2 * std::sqrt(2 / M_PI) * (y + 0.044715 * y * y * y)));
    case Activation::silu: return y / (1 + std::exp(-y));
    default: return y;
  }
}

inline bool same(float a, float b) { return std::isnan(a) ? std::isnan(b) : std::memcmp(&a, &b, 4) == 0; }

}  // namespace halfbyte::truth
