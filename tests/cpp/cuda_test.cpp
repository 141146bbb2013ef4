// The linear kernels of the GPU, run on the emulated one through the C interface, against sums in double. Built apart
// from core_test, of the emulated library's sources, with or without sanitizers: cuda_test [rounds [seed]].
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <random>
#include <string>
#include <vector>

#include "cuda/api.h"
#include "cuda/ptx.cuh"
#include "cuda/layout.h"

extern "C" void halfbyte_cuda_emulate(int arch, int processors, int shared_bytes, unsigned seed);

namespace halfbyte::cuda {
namespace {

using Rng = std::mt19937;

int below(Rng& rng, int n) { return static_cast<int>(rng() % static_cast<unsigned>(n)); }
float uniform(Rng& rng) { return std::ldexp(static_cast<float>(static_cast<int>(rng() >> 8)) - (1 << 23), -23); }  // [-1, 1)

[[noreturn]] void fail(const std::string& what) {
  std::fprintf(stderr, "cuda_test: %s\n", what.c_str());
  std::exit(1);
}

float read(const void* p, int64_t i, int type) {
  if (type == HALFBYTE_F32) return static_cast<const float*>(p)[i];
  const uint16_t v = static_cast<const uint16_t*>(p)[i];
  return type == HALFBYTE_BF16 ? bf16_to_float(v) : f16_to_float(v);
}

void write(void* p, int64_t i, int type, float v) {
  if (type == HALFBYTE_F32) {
    static_cast<float*>(p)[i] = v;
  } else {
    static_cast<uint16_t*>(p)[i] = type == HALFBYTE_BF16 ? float_to_bf16(v) : float_to_f16(v);
  }
}

int size_of(int type) { return type == HALFBYTE_F32 || type == HALFBYTE_I32 ? 4 : type == HALFBYTE_I8 ? 1 : 2; }

// Memory of exactly so many bytes, 16-byte aligned, filled with 0xff: NaN in every format.
struct Memory {
  explicit Memory(int64_t bytes) : bytes(bytes), p(static_cast<char*>(std::aligned_alloc(16, (bytes + 15) / 16 * 16))) {
    std::memset(p, 0xff, (bytes + 15) / 16 * 16);
  }
  ~Memory() { std::free(p); }
  Memory(const Memory&) = delete;
  Memory& operator=(const Memory&) = delete;
  int64_t bytes;
  char* p;
};

// A packed weight [n, k] and what it means.
struct Weight {
  Weight(Rng& rng, WeightFormat f, int n, int k, int64_t tiles_there = 0)
      : packed(f.pattern == blocks ? tiles_there * f.tile_bytes() : weight_bytes(f, n, k)),
        value(int64_t{n} * k), plain(int64_t{n} * k), scale(n), sum(n), total(n) {
    if (f.pattern != dense) {
      fill_pattern(rng, f, n, k, tiles_there);
      return;
    }
    std::memset(packed.p, f.bits == 4 ? 0x88 : 0, packed.bytes);
    const int64_t tiles = n_tiles(n) * k_tiles(k);
    for (int64_t i = 0; i < tiles; ++i) {
      std::memset(packed.p + i * f.tile_bytes() + f.scales_at(), 0, f.tile_bytes() - f.scales_at());
    }
    const int all = static_cast<int>(rng() % 4);  // 0, 1: the largest codes everywhere
    for (int j = 0; j < n; ++j) {
      scale[j] = 0.01f + 0.1f * std::fabs(uniform(rng));
      double exact = 0;
      float factor = 1, offset = 0;
      for (int i = 0; i < k; ++i) {
        if (f.group && i % f.group == 0) {
          factor = f16_to_float(float_to_f16(0.05f + std::fabs(uniform(rng))));
          offset = f.offsets ? uniform(rng) * 8 : 0;
          char* at = packed.p + scale_position(f, j, i, k, false);
          write(at, 0, f.scale_bytes == 2 ? HALFBYTE_F16 : HALFBYTE_F32, factor);
          if (f.offsets) write(packed.p + scale_position(f, j, i, k, true), 0, HALFBYTE_F32, offset);
        }
        const int low = f.bits == 4 ? -8 : -128, code = all < 2 ? low * (1 - all) + all * (-low - 1) : low + below(rng, -2 * low);
        const CodePosition at = code_position(f, j, i, k);
        uint8_t& byte = reinterpret_cast<uint8_t&>(packed.p[at.byte]);
        byte = f.bits == 8 ? static_cast<uint8_t>(code)
                           : static_cast<uint8_t>((byte & ~(15 << at.shift)) | (code + 8) << at.shift);
        plain[int64_t{j} * k + i] = code;
        value[int64_t{j} * k + i] = double{factor} * code + offset;
        sum[j] += code;
        exact += value[int64_t{j} * k + i];
      }
      total[j] = static_cast<float>(exact);
    }
  }

  void put(int j, int64_t k_all, int i, int code) {
    plain[j * k_all + i] = code;
    value[j * k_all + i] = code;
    sum[j] += code;
  }

  void fill_pattern(Rng& rng, WeightFormat f, int n, int k, int64_t tiles_there) {
    std::memset(packed.p, 0, packed.bytes);
    for (float& s : scale) s = 0.01f + 0.1f * std::fabs(uniform(rng));
    if (f.pattern == two_of_four) {
      for (int64_t quad = 0; quad < n_tiles(n) * tile_n * k_tiles(k) * (tile_k / 4); ++quad) {
        const int64_t j = quad / (k_tiles(k) * (tile_k / 4)), k_all = k_tiles(k) * tile_k, i = quad % (k_all / 4) * 4;
        const int first = below(rng, 3), second = first + 1 + below(rng, 3 - first);
        for (int index = 0; index < 2; ++index) {
          const int place = index ? second : first;
          const CodePosition at = quad_position(j, i, k_all, index, false), bits = quad_position(j, i, k_all, index, true);
          packed.p[bits.byte] = static_cast<char>(packed.p[bits.byte] | place << bits.shift);
          if (j >= n || i + place >= k) continue;  // padding: code 0
          const int code = below(rng, 256) - 128;
          packed.p[at.byte] = static_cast<char>(code);
          put(static_cast<int>(j), k, static_cast<int>(i) + place, code);
        }
      }
      return;
    }
    const int64_t depth = ceil_div(k, tile_k / 2);
    int64_t left = tiles_there, places = n_tiles(n) * depth;
    starts.push_back(0);
    for (int64_t tile = 0; tile < n_tiles(n) * depth; ++tile, --places) {
      if (static_cast<int64_t>(rng() % static_cast<unsigned>(places)) < left) {
        --left;
        const WeightFormat one{8, 0, 4, false, blocks};  // a weight of this tile alone
        for (int64_t j = tile / depth * tile_n; j < std::min<int64_t>(n, (tile / depth + 1) * tile_n); ++j) {
          for (int64_t i = tile % depth * 64; i < std::min<int64_t>(k, (tile % depth + 1) * 64); ++i) {
            const int code = below(rng, 256) - 128;
            packed.p[static_cast<int64_t>(columns.size()) * one.tile_bytes() + code_position(one, j % 64, i % 64, 64).byte] =
                static_cast<char>(code);
            put(static_cast<int>(j), k, static_cast<int>(i), code);
          }
        }
        columns.push_back(static_cast<int32_t>(tile % depth));
      }
      if ((tile + 1) % depth == 0) starts.push_back(static_cast<int32_t>(columns.size()));
    }
  }

  Memory packed;
  std::vector<int32_t> starts, columns;
  std::vector<double> value;  // without `scale`
  std::vector<int> plain;
  std::vector<float> scale;
  std::vector<int32_t> sum;
  std::vector<float> total;
};

double activated(double v, int activation) {
  switch (activation) {
    case HALFBYTE_RELU: return v > 0 ? v : 0;
    case HALFBYTE_GELU: return 0.5 * v * (1 + std::erf(v / std::sqrt(2.0)));
    case HALFBYTE_GELU_TANH: return 0.5 * v * (1 + std::tanh(std::sqrt(2 / 3.14159265358979323846) * (v + 0.044715 * v * v * v)));
    case HALFBYTE_SILU: return v / (1 + std::exp(-v));
    default: return v;
  }
}

void run(Rng& rng) {
  constexpr int groups[] = {0, 32, 64, 128}, ms[] = {1, 2, 7, 8, 9, 15, 16, 17, 31, 33, 50};
  WeightFormat f{below(rng, 2) ? 4 : 8, groups[below(rng, 4)], below(rng, 2) ? 2 : 4, false};
  f.offsets = f.group && below(rng, 2);
  if (below(rng, 5) == 0) f = {8, 0, 4, false, 1 + below(rng, 2)};
  const int x_type = f.pattern != dense || below(rng, 3) == 0 ? HALFBYTE_I8 : below(rng, 2) ? HALFBYTE_BF16 : HALFBYTE_F16;
  const bool codes = x_type == HALFBYTE_I8, exact = codes && f.bits == 8 && !f.group;
  const int m = ms[below(rng, 11)], n = 1 + below(rng, below(rng, 4) ? 70 : 200), unit = codes ? 16 : 8;
  const int k = unit * (1 + below(rng, (below(rng, 4) ? 300 : 1500) / unit));
  const bool gated = f.pattern == dense && below(rng, 4) == 0, asymmetric = codes && below(rng, 3);
  const int64_t places = n_tiles(n) * ceil_div(k, 64);
  const Weight up(rng, f, n, k, below(rng, static_cast<int>(places) + 1)), gate(rng, f, gated ? n : 1, gated ? k : unit);

  const int64_t ldx = k + unit * below(rng, 3), ldy = n + below(rng, 3);
  Memory x(((m - 1) * ldx + k) * size_of(x_type));
  std::vector<double> xs(int64_t{m} * k);
  std::vector<float> x_scale(m), bias(n), gate_bias(n);
  std::vector<int32_t> x_zero(m);
  for (int i = 0; i < m; ++i) {
    x_scale[i] = 0.01f + std::fabs(uniform(rng));
    x_zero[i] = asymmetric ? below(rng, 256) - 128 : 0;
    for (int j = 0; j < k; ++j) {
      if (codes) {
        const int c = below(rng, 256) - 128;
        x.p[i * ldx + j] = static_cast<char>(c);
        xs[int64_t{i} * k + j] = c;
      } else {
        write(x.p, i * ldx + j, x_type, uniform(rng));
        xs[int64_t{i} * k + j] = read(x.p, i * ldx + j, x_type);
      }
    }
  }
  for (float& b : bias) b = uniform(rng);
  for (float& b : gate_bias) b = uniform(rng);

  halfbyte_cuda_linear c{};
  c.x = x.p;
  if (codes) c.x_scale = x_scale.data();
  if (asymmetric) c.x_zero = x_zero.data();
  c.weight = reinterpret_cast<const uint8_t*>(up.packed.p);
  c.scale = up.scale.data();
  c.total = exact ? static_cast<const void*>(up.sum.data()) : up.total.data();
  if (f.pattern == blocks) c.starts = up.starts.data(), c.columns = up.columns.data();
  if (gated) {
    c.gate = reinterpret_cast<const uint8_t*>(gate.packed.p);
    c.gate_scale = gate.scale.data();
    c.gate_total = exact ? static_cast<const void*>(gate.sum.data()) : gate.total.data();
    if (below(rng, 2)) c.gate_bias = gate_bias.data();
  }
  if (below(rng, 2)) c.bias = bias.data();
  c.m = m, c.n = n, c.k = k, c.ldx = ldx, c.ldy = ldy, c.ld_residual = ldy;
  c.x_type = x_type, c.y_type = below(rng, 3), c.residual_type = below(rng, 3);
  c.activation = below(rng, 5);
  c.after_rows = codes && below(rng, 2);
  c.format = {f.bits, f.group, f.scale_bytes, f.offsets, f.pattern};
  c.splits = below(rng, 2) ? 1 << below(rng, 4) : 0;
  c.warps = below(rng, 3) == 0 ? 4 + 4 * below(rng, 2) : 0;
  Memory residual(((m - 1) * ldy + n) * size_of(c.residual_type));
  for (int64_t i = 0; i < (m - 1) * ldy + n; ++i) write(residual.p, i, c.residual_type, uniform(rng));
  if (below(rng, 2)) c.residual = residual.p;

  std::string name = "a call of";
  const std::pair<const char*, int> numbers[] = {{"m", m}, {"n", n}, {"k", k}, {"bits", f.bits}, {"group", f.group},
                                                 {"offsets", f.offsets}, {"pattern", f.pattern}, {"x type", x_type},
                                                 {"gate", gated}, {"splits", c.splits}, {"warps", c.warps}};
  for (const auto& [what, number] : numbers) name += std::string(" ") + what + " " + std::to_string(number);
  const int processors = 1 + below(rng, 8);
  std::vector<char> first;
  for (int variant = 0; variant < 2; ++variant) {  // one kernel, then the other in another order of its warps: equal bits
    halfbyte_cuda_emulate(90, processors, 232448, rng());
    c.arch = variant ? 80 : 90;
    const int64_t needed = halfbyte_cuda_linear_workspace(&c);
    if (needed < 0) fail(name + ": workspace " + std::to_string(needed));
    Memory workspace(needed), y(((m - 1) * ldy + n) * size_of(c.y_type));
    c.workspace = needed ? workspace.p : nullptr;
    c.workspace_bytes = needed;
    c.y = y.p;
    if (!halfbyte_cuda_linear_kernel(&c)) fail(name + ": no kernel");
    if (const int error = halfbyte_cuda_linear_run(&c, nullptr)) fail(name + ": " + halfbyte_cuda_error(error));
    if (variant == 0) {
      first.assign(y.p, y.p + y.bytes);
    } else if (std::memcmp(first.data(), y.p, y.bytes)) {
      fail(name + ": sm80 and sm90 differ");
    }
    c.workspace = nullptr;
  }

  auto product = [&](const Weight& w, const float* with, int i, int j, double& error) {
    double t = 0, size = 0;
    int64_t acc = 0;
    for (int l = 0; l < k; ++l) {
      const double a = xs[int64_t{i} * k + l], v = w.value[int64_t{j} * k + l];
      t += (a - x_zero[i]) * v;
      size += (std::fabs(a) + std::abs(x_zero[i])) * std::fabs(v) + std::fabs(a) * 8 * (f.offsets ? 2 : 1);
      if (exact) acc += static_cast<int64_t>(a - x_zero[i]) * w.plain[int64_t{j} * k + l];
    }
    if (exact) {
      error = 0;
      const float y = (static_cast<float>(static_cast<int32_t>(acc)) * w.scale[j]) * x_scale[i];
      return static_cast<double>(with ? y + with[j] : y);
    }
    // A rounding per mma and per group of each warp, then one per warp and block, of sums no larger than `size`.
    const double factor = double{w.scale[j]} * (codes ? x_scale[i] : 1);
    error = (k / 8 + 80) * std::ldexp(1.0, -24) * size * factor + 1e-6;
    return t * factor + (with ? with[j] : 0);
  };
  for (int i = 0; i < m; ++i) {
    for (int j = 0; j < ldy && i * ldy + j < (m - 1) * ldy + n; ++j) {
      const int64_t at = i * ldy + j;
      if (j >= n) {
        for (int b = 0; b < size_of(c.y_type); ++b) {
          if (static_cast<unsigned char>(first[at * size_of(c.y_type) + b]) != 0xff) fail(name + ": wrote between rows");
        }
        continue;
      }
      double error = 0, gate_error = 0;
      double v = product(up, c.bias, i, j, error);
      const bool bits_equal = exact && !gated && c.activation <= HALFBYTE_RELU;
      if (gated) {
        const double g = product(gate, c.gate_bias, i, j, gate_error);
        gate_error = 1.2 * gate_error + 3e-7 * std::fabs(g);  // gelu: 1 + erf(..) is near 0 where g is far below
        const double size = std::fabs(activated(g, c.activation)) + gate_error;
        error = error * size + std::fabs(v) * (gate_error + 1e-5 * size);
        v *= activated(g, c.activation);
      } else {
        error = 1.2 * error + 3e-7 * std::fabs(v);
        v = activated(v, c.activation);
        error += 1e-5 * std::fabs(v);
      }
      const float r = c.residual ? read(residual.p, at, c.residual_type) : 0;
      const float y = read(first.data(), at, c.y_type);
      if (bits_equal) {
        Memory expected(4);
        write(expected.p, 0, c.y_type, c.residual ? static_cast<float>(v) + r : static_cast<float>(v));
        if (std::memcmp(expected.p, first.data() + at * size_of(c.y_type), size_of(c.y_type))) fail(name + ": not exact");
        continue;
      }
      v += r;
      error += 1e-6 + std::fabs(v) * (c.y_type == HALFBYTE_F32 ? 1e-6 : c.y_type == HALFBYTE_F16 ? 0x1p-10 : 0x1p-8);
      const double most = c.y_type == HALFBYTE_F16 ? 65000 : 1e38;
      if (std::fabs(v) < most ? !(std::fabs(y - v) <= error) : std::isnan(y)) {
        fail(name + ": row " + std::to_string(i) + " channel " + std::to_string(j) + " is " + std::to_string(y) + ", not " +
             std::to_string(v) + " +- " + std::to_string(error));
      }
    }
  }
}

}  // namespace
}  // namespace halfbyte::cuda

int main(int argc, char** argv) {
  const int rounds = argc > 1 ? std::atoi(argv[1]) : 200;
  std::mt19937 rng(argc > 2 ? static_cast<unsigned>(std::atoi(argv[2])) : 1);
  for (int i = 0; i < rounds; ++i) halfbyte::cuda::run(rng);
  std::printf("cuda_test: %d calls of each linear kernel are right\n", rounds);
}
