// What the 32 lanes of a warp do together: the last one to come computes for all.
#include <cstring>

#include "cuda/emulated/machine.h"

namespace halfbyte::cuda {
namespace emulated {
namespace {

// Vectors that every x86-64 and aarch64 has; of longer ones a compiler makes single numbers.
typedef float Floats __attribute__((vector_size(16), may_alias));
typedef double Doubles __attribute__((vector_size(16), may_alias));

// A row of D: 8 sums.
class FloatRow {
 public:
  explicit FloatRow(const float* from) : v0_(part(from, 0)), v1_(part(from, 1)) {}
  void add(float a, const float* b) {
    const Floats all = {a, a, a, a};
    v0_ += all * part(b, 0);
    v1_ += all * part(b, 1);
  }
  void store(float* to) const {
    std::memcpy(to, &v0_, 16);
    std::memcpy(to + 4, &v1_, 16);
  }

 private:
  static const Floats& part(const float* from, int i) { return reinterpret_cast<const Floats*>(from)[i]; }
  Floats v0_, v1_;
};
class DoubleRow {
 public:
  explicit DoubleRow(const double* from) : v0_(part(from, 0)), v1_(part(from, 1)), v2_(part(from, 2)), v3_(part(from, 3)) {}
  void add(double a, const double* b) {
    const Doubles all = {a, a};
    v0_ += all * part(b, 0);
    v1_ += all * part(b, 1);
    v2_ += all * part(b, 2);
    v3_ += all * part(b, 3);
  }
  void store(double* to) const {
    std::memcpy(to, &v0_, 16);
    std::memcpy(to + 2, &v1_, 16);
    std::memcpy(to + 4, &v2_, 16);
    std::memcpy(to + 6, &v3_, 16);
  }

 private:
  static const Doubles& part(const double* from, int i) { return reinterpret_cast<const Doubles*>(from)[i]; }
  Doubles v0_, v1_, v2_, v3_;
};

// The 16 bits of each word above `shift`.
struct F16 {
  static void widen(float (&to)[32], const uint32_t (&words)[32], int shift) {
    for (int i = 0; i < 32; ++i) to[i] = widen_f16(static_cast<uint16_t>(words[i] >> shift));
  }
};
struct BF16 {
  static void widen(float (&to)[32], const uint32_t (&words)[32], int shift) {
    for (int i = 0; i < 32; ++i) to[i] = widen_bf16(static_cast<uint16_t>(words[i] >> shift));
  }
};

// The tables of the PTX ISA, "Matrix fragments for mma.m16n8k16 with floating point type": lane 4 g + t holds of A the rows g
// (a0, a2) and g + 8 (a1, a3), of B the column g, of both the k 2 t, 2 t + 1 (a0, a1, b0) and those + 8; of D the columns
// 2 t, 2 t + 1 of rows g and g + 8.
template <class Type>
void multiply16(Registers& r) {
  float a[4][2][32], b[2][2][32];  // word, half
  for (int j = 0; j < 2; ++j) {
    for (int i = 0; i < 4; ++i) Type::widen(a[i][j], r.a[i], 16 * j);
    for (int i = 0; i < 2; ++i) Type::widen(b[i][j], r.b[i], 16 * j);
  }
  alignas(16) double rows[2][2][4][8];  // of B: word, half, t
  for (int i = 0; i < 2; ++i) {
    for (int j = 0; j < 2; ++j) {
      for (int n = 0; n < 8; ++n) {
        for (int t = 0; t < 4; ++t) rows[i][j][t][n] = b[i][j][4 * n + t];
      }
    }
  }
  for (int g = 0; g < 8; ++g) {
    for (int lower = 0; lower < 2; ++lower) {
      alignas(16) double d[8];
      for (int t = 0; t < 4; ++t) {
        for (int j = 0; j < 2; ++j) d[2 * t + j] = std::bit_cast<float>(r.d[2 * lower + j][4 * g + t]);
      }
      DoubleRow sum(d);
      for (int i = 0; i < 2; ++i) {
        for (int j = 0; j < 2; ++j) {
          for (int t = 0; t < 4; ++t) sum.add(a[2 * i + lower][j][4 * g + t], rows[i][j][t]);
        }
      }
      sum.store(d);
      for (int t = 0; t < 4; ++t) {
        for (int j = 0; j < 2; ++j) r.d[2 * lower + j][4 * g + t] = std::bit_cast<uint32_t>(static_cast<float>(d[2 * t + j]));
      }
    }
  }
}

// "... for mma.m16n8k32": of both matrices the k 4 t .. 4 t + 3 (a0, a1, b0) and those + 16. The 32 products of a sum are
// below 2^20 together, so floats hold them.
void multiply8(Registers& r) {
  const auto code = [](uint32_t word, int j) { return static_cast<float>(static_cast<int8_t>(word >> 8 * j)); };
  alignas(16) float rows[2][4][4][8];  // of B: word, byte, t
  for (int i = 0; i < 2; ++i) {
    for (int j = 0; j < 4; ++j) {
      for (int n = 0; n < 8; ++n) {
        for (int t = 0; t < 4; ++t) rows[i][j][t][n] = code(r.b[i][4 * n + t], j);
      }
    }
  }
  for (int g = 0; g < 8; ++g) {
    for (int lower = 0; lower < 2; ++lower) {
      alignas(16) float d[8] = {};
      FloatRow sum(d);
      for (int i = 0; i < 2; ++i) {
        for (int t = 0; t < 4; ++t) {
          const uint32_t word = r.a[2 * i + lower][4 * g + t];
          for (int j = 0; j < 4; ++j) sum.add(code(word, j), rows[i][j][t]);
        }
      }
      sum.store(d);
      for (int t = 0; t < 4; ++t) {
        for (int j = 0; j < 2; ++j) r.d[2 * lower + j][4 * g + t] += static_cast<uint32_t>(static_cast<int>(d[2 * t + j]));
      }
    }
  }
}

// "... for sparse mma.m16n8k64": b[i] of lane 4 n + t are the k 16 i + 4 t ..; a[2 h + u] of lane 4 g + t are, of row
// g + 8 u, the quads 8 h + 2 t and the next, two codes each; the indices of row g + 8 u and of the quads 8 h .. 8 h + 7, four
// bits each, are in lane 4 g + 2 h + u. Of the two places in a quad the first must be the lower one.
void multiply_pairs(Registers& r) {
  const auto code = [](uint32_t word, int j) { return static_cast<int>(static_cast<int8_t>(word >> 8 * j)); };
  for (int row = 0; row < 16; ++row) {
    const int g = row % 8, u = row / 8;
    for (int quad = 0; quad < 16; ++quad) {
      const int h = quad / 8, t = quad % 8 / 2;
      const uint32_t places = r.b[4][4 * g + 2 * h + u] >> quad % 8 * 4, word = r.a[2 * h + u][4 * g + t];
      if ((places & 3) >= (places >> 2 & 3)) fail("mma_sparse_s8: the places %u and %u in a quad", places & 3, places >> 2 & 3);
      for (int i = 0; i < 2; ++i) {
        const int k = 4 * quad + static_cast<int>(places >> 2 * i & 3), a = code(word, quad % 2 * 2 + i);
        for (int n = 0; n < 8; ++n) {
          const int b = code(r.b[k / 16][4 * n + k % 16 / 4], k % 4);
          r.d[2 * u + n % 2][4 * g + n / 2] += static_cast<uint32_t>(a * b);
        }
      }
    }
  }
}

void compute(Collective collective, Registers& r) {
  switch (collective) {
    case Collective::sync: return;
    case Collective::mma_f16: return multiply16<F16>(r);
    case Collective::mma_bf16: return multiply16<BF16>(r);
    case Collective::mma_s8: return multiply8(r);
    case Collective::mma_sparse_s8: return multiply_pairs(r);
    case Collective::shuffle:
      for (int lane = 0; lane < 32; ++lane) r.d[0][lane] = r.a[0][lane ^ static_cast<int>(r.b[0][lane])];
  }
}

// Waits for the other lanes; the registers of each are filled before and read after.
void together(Collective collective) {
  Thread& t = me();
  Warp& warp = *t.warp;
  if (!warp.arrived) {
    if (warp.returned) fail("%s, but the lanes %#010x of its warp have returned", name_of(collective), warp.returned);
    warp.collective = collective;
  } else if (warp.collective != collective) {
    fail("it is in %s, other lanes of its warp in %s", name_of(collective), name_of(warp.collective));
  }
  warp.arrived |= 1u << t.thread % 32;
  if (warp.arrived != ~0u) {
    t.machine->block(t, Wait::warp);
    return;
  }
  compute(collective, warp.registers);
  warp.arrived = 0;
  t.machine->wake(warp, ~0u);
}

template <class Number>
void multiply(Collective collective, Number (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  Registers& r = me().warp->registers;
  const int lane = me().thread % 32;
  for (int i = 0; i < 4; ++i) {
    r.d[i][lane] = std::bit_cast<uint32_t>(d[i]);
    r.a[i][lane] = a[i];
  }
  r.b[0][lane] = b0;
  r.b[1][lane] = b1;
  together(collective);
  for (int i = 0; i < 4; ++i) d[i] = std::bit_cast<Number>(r.d[i][lane]);
}

uint32_t shuffle(uint32_t v, int mask) {
  if (mask < 0 || mask > 31) fail("shuffle_xor with the mask %d", mask);
  Registers& r = me().warp->registers;
  const int lane = me().thread % 32;
  r.a[0][lane] = v;
  r.b[0][lane] = static_cast<uint32_t>(mask);
  together(Collective::shuffle);
  return r.d[0][lane];
}

}  // namespace
}  // namespace emulated

using namespace emulated;

void warp_sync() { together(Collective::sync); }
float shuffle_xor(float v, int mask) { return std::bit_cast<float>(shuffle(std::bit_cast<uint32_t>(v), mask)); }

void mma_f16(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) { multiply(Collective::mma_f16, d, a, b0, b1); }
void mma_bf16(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) { multiply(Collective::mma_bf16, d, a, b0, b1); }
void mma_s8(int (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) { multiply(Collective::mma_s8, d, a, b0, b1); }
void mma_sparse_s8(int (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[4], uint32_t indices) {
  Registers& r = me().warp->registers;
  r.b[2][me().thread % 32] = b[2];
  r.b[3][me().thread % 32] = b[3];
  r.b[4][me().thread % 32] = indices;
  multiply(Collective::mma_sparse_s8, d, a, b[0], b[1]);
}

}  // namespace halfbyte::cuda
