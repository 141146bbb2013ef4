// Random calls of the C++ core on every kernel against triple loops, alone and from many threads at once. Built with
// sanitizers (tests/cpp/CMakeLists.txt). Operands end or begin at an inaccessible page, so that a vector load or a
// masked store one byte too far is seen even where the sanitizer does not instrument the intrinsic.
//
// core_test [calls per kernel] [seed]
#include <memory>
#include <optional>
#include <stdexcept>
#include <thread>

#include "core/cpu_features.h"
#include "ops/linear_w8a8/op.h"
#include "ops/quantize_rows/op.h"
#include "truth.h"

using namespace halfbyte;
using namespace halfbyte::truth;

namespace {

std::vector<float> fill_row(Rng& rng, int k) {
  std::vector<float> x(static_cast<size_t>(k));
  const int kind = below(rng, 10);
  const float magnitude = std::ldexp(1.0f, below(rng, 30) - 15);
  for (float& v : x) {
    v = uniform(rng) * magnitude;
    if (kind == 0) v = 0;
    if (kind == 1) v = std::fabs(v);
    if (kind == 2) v = 1.5f;
    if (kind == 3) v *= 1e-31f;
  }
  if (kind == 4 && k) x[static_cast<size_t>(below(rng, k))] = below(rng, 2) ? NAN : -INFINITY;
  return x;
}

constexpr DType floats[] = {DType::f32, DType::bf16, DType::f16};

// A matrix in guarded memory, in any storage type, its values as float32 beside it.
struct Matrix {
  Matrix(Rng& rng, int rows, int cols, DType type)
      : type(type), ld(cols + below(rng, 2) * below(rng, 9)),
        bytes(rng, rows ? ((rows - 1) * ld + cols) * size_of(type) : 0) {
    for (int i = 0; i < rows; ++i) {
      values.push_back(fill_row(rng, cols));
      for (int j = 0; j < cols; ++j) {
        put(type, bytes.data(), i * ld + j, values.back()[static_cast<size_t>(j)]);
        values.back()[static_cast<size_t>(j)] = get(type, bytes.data(), i * ld + j);
      }
    }
  }
  DType type;
  int64_t ld;
  Guarded<char> bytes;
  std::vector<std::vector<float>> values;
};

int size_near(Rng& rng, int edge, int largest) {
  const int pick = below(rng, 3);
  if (pick == 0) return 1 + below(rng, 4);
  if (pick == 1) return std::max(1, edge * (1 + below(rng, 3)) - 1 + below(rng, 3));
  return 1 + below(rng, largest);
}

// Around the tiles of 4, 6, 12, 32 and 48 rows; sometimes none.
int rows_near(Rng& rng) { return below(rng, 8) ? size_near(rng, below(rng, 2) ? 12 : 32, 70) : 0; }

void test_quantize_rows(Rng& rng, const std::string& isa) {
  const int m = below(rng, 12), k = size_near(rng, 64, 300);
  const bool symmetric = below(rng, 3) == 0, is_static = !symmetric && below(rng, 3) == 0;
  const float static_scale = is_static ? 0.01f + 0.1f * std::fabs(uniform(rng)) : 0;
  const int32_t static_zero = is_static ? below(rng, 256) - 128 : 0;
  Matrix x(rng, m, k, floats[below(rng, 3)]);
  const int64_t padded = k + below(rng, 70), ldc = padded + below(rng, 5);
  const bool wide = below(rng, 2);
  Guarded<int8_t> codes(rng, m ? ((m - 1) * ldc + padded) * (wide ? 2 : 1) : 0);
  Guarded<float> scale(rng, m);
  Guarded<int32_t> zero(rng, m), sum(rng, m);
  const quantize_rows::Args args{.x = x.bytes.data(), .ldx = x.ld, .x_type = x.type, .k = k, .k_padded = padded,
                                 .codes = codes.data(), .ldc = ldc, .wide = wide, .scale = scale.data(),
                                 .zero = symmetric ? nullptr : zero.data(), .sum = sum.data(), .symmetric = symmetric,
                                 .static_scale = static_scale, .static_zero = static_zero};
  quantize_rows::run(args, m, 1 + below(rng, 3));
  for (int i = 0; i < m; ++i) {
    const Row want = quantize(x.values[static_cast<size_t>(i)], symmetric, static_scale, static_zero);
    bool ok = same(scale[i], want.scale) && sum[i] == want.sum && (symmetric || zero[i] == want.zero);
    for (int64_t j = 0; j < padded; ++j) {
      const int q = wide ? reinterpret_cast<const int16_t*>(codes.data())[i * ldc + j] : codes[i * ldc + j];
      ok = ok && q == (j < k ? want.codes[static_cast<size_t>(j)] : 0);
    }
    const std::string shape = std::to_string(m) + "x" + std::to_string(k);
    if (!ok) die(isa + ": quantize_rows: row " + std::to_string(i) + " of " + shape);
  }
}

struct Weight {
  Weight(Rng& rng, int n, int k) : n(n), k(k), scale(rng, n) {
    const int64_t ld = k + below(rng, 5);
    Guarded<int8_t> source(rng, n ? (n - 1) * ld + k : 0);
    const int kind = below(rng, 6);
    for (int i = 0; i < n; ++i) {
      scale[i] = 0.001f + 0.01f * std::fabs(uniform(rng));
      for (int j = 0; j < k; ++j) {
        const int q = kind == 0 ? 127 : kind == 1 ? -128 : below(rng, 256) - 128;
        source[i * ld + j] = static_cast<int8_t>(q);
        codes.push_back(static_cast<int8_t>(q));
      }
    }
    packed.emplace(linear_w8a8::pack(source.data(), n, k, ld, scale.data(), 1 + below(rng, 2)));
    Guarded<int8_t> back(rng, int64_t{n} * k);
    linear_w8a8::unpack(*packed, back.data(), k);
    if (std::memcmp(back.data(), codes.data(), codes.size())) die("unpack(pack(w)) is not w");
  }
  int n, k;
  Guarded<float> scale;
  std::vector<int8_t> codes;
  std::optional<PackedWeight> packed;
};

void test_linear(Rng& rng, const Weight& w, const std::string& isa, int m, int threads) {
  const int n = w.n, k = w.k;
  Matrix x(rng, m, k, floats[below(rng, 3)]), residual(rng, m, n, floats[below(rng, 3)]);
  const bool integers = below(rng, 5) == 0, has_bias = !integers && below(rng, 2),
             has_residual = !integers && below(rng, 2), is_static = below(rng, 4) == 0;
  const auto activation = static_cast<Activation>(integers ? 0 : below(rng, 5));
  const DType c_type = integers ? DType::i32 : floats[below(rng, 3)];
  Guarded<float> bias(rng, n);
  for (int j = 0; j < n; ++j) bias[j] = uniform(rng);
  const int64_t ldc = n + below(rng, 2) * below(rng, 9);
  Guarded<char> c(rng, m ? ((m - 1) * ldc + n) * size_of(c_type) : 0);
  const float static_scale = is_static ? 0.01f + 0.1f * std::fabs(uniform(rng)) : 0;
  const int32_t static_zero = is_static ? below(rng, 256) - 128 : 0;
  const linear_w8a8::Args args{.m = m, .a = x.bytes.data(), .lda = x.ld, .a_type = x.type, .c = c.data(), .ldc = ldc,
                               .c_type = c_type, .bias = has_bias ? bias.data() : nullptr, .activation = activation,
                               .residual = has_residual ? residual.bytes.data() : nullptr, .ldr = residual.ld,
                               .residual_type = residual.type, .static_scale = static_scale,
                               .static_zero = static_zero, .threads = threads};
  linear_w8a8::run(*w.packed, args);
  for (int64_t i = 0; i + 1 < m; ++i) {
    const char* gap = c.data() + (i * ldc + n) * size_of(c_type);
    if (std::any_of(gap, gap + (ldc - n) * size_of(c_type), [](char byte) { return byte != '\xff'; })) {
      die(isa + ": linear_w8a8 wrote between the rows of its output");
    }
  }
  for (int i = 0; i < m; ++i) {
    const Row row = quantize(x.values[static_cast<size_t>(i)], false, static_scale, static_zero);
    for (int j = 0; j < n; ++j) {
      int32_t acc = 0;
      const int8_t* weights = w.codes.data() + int64_t{j} * k;
      for (int l = 0; l < k; ++l) acc += (row.codes[static_cast<size_t>(l)] - row.zero) * weights[l];
      const std::string where = isa + ": linear_w8a8: [" + std::to_string(i) + ", " + std::to_string(j) + "] of " +
                                std::to_string(m) + "x" + std::to_string(n) + "x" + std::to_string(k);
      if (integers) {
        int32_t got;
        std::memcpy(&got, c.data() + (i * ldc + j) * 4, 4);
        if (std::isfinite(row.scale) && got != acc) die(where + ": wrong accumulator");
        continue;
      }
      volatile float y = static_cast<float>(acc) * w.scale[j];  // volatile: no contraction
      y = y * row.scale;
      if (has_bias) y = y + bias[j];
      const float r = has_residual ? residual.values[static_cast<size_t>(i)][static_cast<size_t>(j)] : 0;
      const double exact = activate(activation, y);
      const float got = get(c_type, c.data(), i * ldc + j);
      if (activation == Activation::none || activation == Activation::relu) {
        const float want = has_residual ? static_cast<float>(exact) + r : static_cast<float>(exact);
        if (!same(got, rounded(c_type, want))) die(where + ": wrong output");
      } else {
        // op.h's bound, then one rounding each for the residual and the cast: monotone, so round the ends.
        const double slack = 0x1p-20 * std::fmax(1, std::fabs(double{y}));
        const float low = rounded(c_type, static_cast<float>(exact - slack) + r);
        const float high = rounded(c_type, static_cast<float>(exact + slack) + r);
        const bool near = std::isnan(exact + r) ? std::isnan(got) : got >= low && got <= high;
        if (!near) die(where + ": activation too far off");
      }
    }
  }
}

template <class Call>
void expect_invalid(const char* what, Call&& call) {
  try {
    call();
  } catch (const std::invalid_argument& error) {
    if (!error.what()[0]) die(std::string(what) + ": no message");
    return;
  }
  die(std::string(what) + " was accepted");
}

void test_errors(Rng& rng) {
  Weight w(rng, 5, 7);
  float x[7] = {}, y[5] = {};
  const linear_w8a8::Args good{.m = 1, .a = x, .lda = 7, .a_type = DType::f32, .c = y, .ldc = 5, .c_type = DType::f32,
                               .bias = nullptr, .activation = Activation::none, .residual = nullptr, .ldr = 0,
                               .residual_type = DType::f32, .static_scale = 0, .static_zero = 0, .threads = 1};
  linear_w8a8::run(*w.packed, good);
  const auto with = [&](auto&& change) {
    linear_w8a8::Args bad = good;
    change(bad);
    linear_w8a8::run(*w.packed, bad);
  };
  expect_invalid("a negative m", [&] { with([](auto& a) { a.m = -1; }); });
  expect_invalid("int32 activations", [&] { with([](auto& a) { a.a_type = DType::i32; }); });
  expect_invalid("a static zero of 128", [&] { with([](auto& a) { a.static_scale = 1, a.static_zero = 128; }); });
  expect_invalid("a negative static scale", [&] { with([](auto& a) { a.static_scale = -1; }); });
  expect_invalid("int32 output with relu",
                 [&] { with([](auto& a) { a.c_type = DType::i32, a.activation = Activation::relu; }); });
  expect_invalid("overlapping output rows", [&] { with([](auto& a) { a.m = 2, a.ldc = 4, a.lda = 0; }); });
  expect_invalid("k beyond int32", [&] {
    const std::vector<int8_t> row(linear_w8a8::max_k + 1);
    const float one = 1;
    linear_w8a8::pack(row.data(), 1, linear_w8a8::max_k + 1, linear_w8a8::max_k + 1, &one, 1);
  });
  expect_invalid("an unknown instruction set", [] { force_isa("avx1024"); });
}

std::vector<std::string> runnable() {
  std::vector<std::string> names;
  for (const IsaInfo& info : isas()) {
    if (info.bit & supported_isas() & built_isas()) names.emplace_back(info.name);
  }
  return names;
}

// Threads that share weights, force different instruction sets and each ask for a team.
void test_concurrent(unsigned seed, int calls) {
  Rng rng(seed);
  std::vector<std::unique_ptr<Weight>> weights;
  for (int i = 0; i < 3; ++i) weights.push_back(std::make_unique<Weight>(rng, 40 + 60 * i, 33 + 200 * i));
  const std::vector<std::string> names = runnable();
  std::vector<std::thread> threads;
  for (unsigned t = 0; t < 6; ++t) {
    threads.emplace_back([&, t] {
      Rng own(seed + t);
      const std::string& isa = names[t % names.size()];
      force_isa(isa);
      for (int i = 0; i < calls; ++i) {
        const Weight& w = *weights[static_cast<size_t>(below(own, 3))];
        test_linear(own, w, isa, rows_near(own), 1 + below(own, 3));
      }
    });
  }
  for (std::thread& thread : threads) thread.join();
}

}  // namespace

int main(int argc, char** argv) {
  const int calls = argc > 1 ? std::atoi(argv[1]) : 200;
  const unsigned seed = argc > 2 ? static_cast<unsigned>(std::atoi(argv[2])) : 1;
  for (const std::string& isa : runnable()) {
    force_isa(isa);
    Rng rng(seed);
    for (int i = 0; i < calls; ++i) {
      test_quantize_rows(rng, isa);
      const Weight w(rng, size_near(rng, 32, 150), size_near(rng, 64, 200));
      for (int repeat = 0; repeat < 3; ++repeat) test_linear(rng, w, isa, rows_near(rng), 1 + below(rng, 3));
    }
    // Enough work that the driver uses every thread it may, and more rows than it quantizes at once.
    for (int i = 0; i < calls / 30; ++i) {
      const Weight w(rng, 128 + below(rng, 128), 256 + below(rng, 200));
      test_linear(rng, w, isa, 64 + below(rng, 64), 2 + below(rng, 3));
    }
    test_linear(rng, Weight(rng, 3, 16400), isa, 400, 2);
    std::printf("core_test: %s: %d rounds\n", isa.c_str(), calls);
    force_isa("");
  }
  Rng rng(seed);
  test_errors(rng);
  test_concurrent(seed, calls / 5);
  std::printf("core_test: 6 threads at once: %d calls each\n", calls / 5);
}
