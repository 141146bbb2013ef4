// The linear ops on weights of every format, against triple loops.
#include "tests.h"

#include "core/dispatch.h"

namespace halfbyte::truth {
namespace {

constexpr const char* ops[] = {"linear_w8a8", "linear_w4a8", "linear_w8a16", "linear_w4a16"};

float factor(Rng& rng) { return std::ldexp(1 + std::fabs(uniform(rng)), -below(rng, 12)); }

}  // namespace

Weight::Weight(Rng& rng, int n, int k)
    : n(n),
      k(k),
      op(&linear_op(ops[below(rng, 4)])),
      group(below(rng, 4) ? 32 << below(rng, 3) : 0),
      activation_group(op->activation_bits == 8 && below(rng, 3) == 0 ? (group ? group : 32 << below(rng, 3)) : 0),
      groups(group ? (k + group - 1) / group : 1),
      fold(group              ? group
           : activation_group ? activation_group
           : op->activation_bits == 16 ? wide_group
                              : std::max(k, 1)),
      nf4(op->weight_bits == 4 && op->activation_bits == 16 && below(rng, 4) == 0),
      has_scale(group > 0),
      has_zero(!nf4 && below(rng, 3) == 0),
      has_minimum(!nf4 && !has_zero && group && below(rng, 2)),
      type(below(rng, 2) ? DType::f16 : DType::f32),
      scale(rng, n),
      group_scale(rng, has_scale ? n * groups * size_of(type) : 0),
      minimum(rng, has_minimum ? n * groups * size_of(type) : 0),
      zero(rng, has_zero ? n * groups : 0) {
  const bool four = op->weight_bits == 4;
  const int64_t row_bytes = four ? (k + 1) / 2 : k, ld = row_bytes + below(rng, 5);
  Guarded<uint8_t> source(rng, n ? (n - 1) * ld + row_bytes : 0);
  const int kind = below(rng, 6);
  const bool large = below(rng, 8) == 0;  // minima that times 16 leave float16
  for (int j = 0; j < n; ++j) {
    scale[j] = 0.001f + 0.01f * std::fabs(uniform(rng));
    for (int64_t g = j * groups; g < (j + 1) * groups; ++g) {
      if (has_scale) put(type, group_scale.data(), g, factor(rng));
      if (has_minimum) put(type, minimum.data(), g, uniform(rng) * (large ? 30000 : 1));
      if (!has_zero) continue;
      const int any = four ? below(rng, 16) : below(rng, 256) - 128;
      zero[g] = static_cast<int8_t>(kind == 0 ? (four ? 0 : -128) : kind == 1 ? (four ? 15 : 127) : any);
    }
    for (int64_t b = 0; b < row_bytes; ++b) {
      source[j * ld + b] = static_cast<uint8_t>(kind > 1 ? below(rng, 256) : four ? (kind ? 0 : 255) : kind ? 128 : 127);
    }
    if (four && k % 2) source[j * ld + row_bytes - 1] &= 15;
    for (int i = 0; i < k; ++i) {
      const uint8_t byte = source[j * ld + (four ? i / 2 : i)];
      const int u = byte >> i % 2 * 4 & 15, centered = has_zero || has_minimum ? u : u - 8;
      codes.push_back(static_cast<int16_t>(!four ? static_cast<int8_t>(byte) : nf4 ? nf4_levels[u] : centered));
    }
  }
  const StoredWeight stored{.n = n, .k = k, .codes = source.data(), .ld = ld, .scale = scale.data(), .group = group,
                            .group_scale = has_scale ? group_scale.data() : nullptr, .group_scale_type = type,
                            .zero = has_zero ? zero.data() : nullptr, .minimum = has_minimum ? minimum.data() : nullptr,
                            .nf4 = nf4, .activation_group = activation_group};
  packed.emplace(pack_linear(*op, stored, 1 + below(rng, 2)));
  Guarded<uint8_t> back(rng, n * row_bytes);
  unpack_linear(*packed, back.data(), row_bytes);
  for (int64_t j = 0; j < n; ++j) {
    if (std::memcmp(back.data() + j * row_bytes, source.data() + j * ld, static_cast<size_t>(row_bytes))) {
      die(std::string(op->name) + ": unpack(pack(w)) is not w");
    }
  }
}

namespace {

// The activations of one row, and the integers of one output.
struct Coded {
  Coded(const Weight& w, const std::vector<float>& x, float static_scale, int32_t static_zero) : w(w) {
    if (w.per_token()) {
      parts.push_back(quantize(x, false, static_scale, static_zero));
    } else {
      const int32_t limit = w.op->activation_bits == 16 ? 32639 : 127;
      for (int64_t g = 0; g * w.fold < w.k; ++g) parts.push_back(quantize(group_of(x, w.fold, g), true, 0, 0, limit));
    }
  }
  int code(int64_t i) const {
    return w.per_token() ? parts[0].codes[static_cast<size_t>(i)]
                         : parts[static_cast<size_t>(i / w.fold)].codes[static_cast<size_t>(i % w.fold)];
  }
  bool finite() const {
    return std::all_of(parts.begin(), parts.end(), [](const Row& part) { return std::isfinite(part.scale); });
  }

  // Before bias and activation, of a weight in groups. The test is compiled without contraction.
  float output(int j) const {
    float t = 0;
    double total = 0;
    for (int64_t g = 0; g * w.fold < w.k; ++g) {
      const int64_t first = g * w.fold, end = std::min<int64_t>(first + w.fold, w.k), at = w.group ? g : 0;
      int64_t acc = 0, sum = 0, weights = 0;
      for (int64_t i = first; i < end; ++i) {
        const int c = w.codes[static_cast<size_t>(int64_t{j} * w.k + i)] - w.zero_of(j, at);
        acc += int64_t{code(i)} * c, sum += code(i), weights += c;
      }
      if (acc != static_cast<int32_t>(acc)) die("the test asks for sums beyond int32");
      float p = static_cast<float>(acc);
      const float a_scale = w.per_token() ? 1 : parts[static_cast<size_t>(g)].scale;
      if (w.has_scale && !w.per_token()) p = p * w.group_scale_of(j, at);
      t = std::fma(p, w.per_token() ? w.group_scale_of(j, at) : a_scale, t);
      total += static_cast<double>(weights) * w.group_scale_of(j, at);
      if (w.has_minimum) {
        t = std::fma(static_cast<float>(sum) * a_scale, w.minimum_of(j, at), t);
        total += static_cast<double>(end - first) * w.minimum_of(j, at);
      }
    }
    if (!w.per_token()) return t * w.scale[j];
    t = t - static_cast<float>(parts[0].zero) * static_cast<float>(total);
    return t * w.scale[j] * parts[0].scale;
  }

  int32_t accumulator(int j) const {  // of a weight without groups
    int32_t acc = 0;
    for (int i = 0; i < w.k; ++i) acc += (code(i) - parts[0].zero) * w.codes[static_cast<size_t>(int64_t{j} * w.k + i)];
    return acc;
  }

  const Weight& w;
  std::vector<Row> parts;
};

// Through a norm, of one weight or up to three at once, with gates and residuals: what the norm and then the linear op alone
// give.
void test_normed(Rng& rng, const Weight& w, const std::string& isa, int m, int threads) {
  const int n = w.n, k = w.k, count = 1 + below(rng, 3);
  if (k == 0) return;
  const Matrix x(rng, m, k, floats[below(rng, 3)]), residual(rng, m, n, floats[below(rng, 3)]);
  const bool rms = below(rng, 2), has_weight = below(rng, 2), has_bias = !rms && below(rng, 2);
  const int64_t size = int64_t{m} * n;
  Guarded<float> weight(rng, k), bias(rng, k), normed(rng, int64_t{m} * k), c(rng, count * size), want(rng, size);
  for (int i = 0; i < k; ++i) weight[i] = 1 + uniform(rng) / 2, bias[i] = uniform(rng);
  const norm::Parameters through{rms ? norm::Kind::rms : norm::Kind::layer, has_weight ? weight.data() : nullptr,
                                 has_bias ? bias.data() : nullptr, 1e-5f};
  const float static_scale = w.per_token() && below(rng, 4) == 0 ? 0.05f : 0;
  std::vector<LinearCall> calls;
  for (int i = 0; i < count; ++i) {
    calls.push_back({&*w.packed,
                     {.m = m, .a = x.bytes.data(), .lda = x.ld, .a_type = x.type, .c = c.data() + i * size, .ldc = n,
                      .c_type = DType::f32, .bias = below(rng, 2) ? w.scale.data() : nullptr,
                      .activation = static_cast<Activation>(below(rng, 5)),
                      .residual = below(rng, 2) ? residual.bytes.data() : nullptr, .ldr = residual.ld,
                      .residual_type = residual.type, .static_scale = static_scale, .static_zero = 3, .threads = threads,
                      .gate = below(rng, 2) ? &*w.packed : nullptr, .gate_bias = below(rng, 2) ? w.scale.data() : nullptr,
                      .norm = &through}});
  }
  if (count == 1) {
    run_linear(*w.packed, calls[0].args);
  } else {
    run_linears(calls);
  }
  norm::Args alone{};
  static_cast<norm::Parameters&>(alone) = through;
  alone.k = alone.ldo = k;
  alone.x = x.bytes.data();
  alone.ldx = x.ld;
  alone.x_type = x.type;
  alone.out = normed.data();
  norm::run(alone, m, 1);
  for (int j = 0; j < count; ++j) {
    LinearArgs args = calls[static_cast<size_t>(j)].args;
    args.a = normed.data(), args.lda = k, args.a_type = DType::f32, args.c = want.data(), args.norm = nullptr, args.threads = 1;
    run_linear(*w.packed, args);
    for (int64_t i = 0; i < size; ++i) {
      if (!same(c[j * size + i], want[i])) {
        die(isa + ": " + w.op->name + " through a norm differs from norm, then " + w.op->name);
      }
    }
  }
}

}  // namespace

void test_linear(Rng& rng, const Weight& w, const std::string& isa, int m, int threads) {
  if (below(rng, 8) == 0) test_normed(rng, w, isa, m, threads);  // which multiplies up to twelve times
  const int n = w.n, k = w.k;
  Matrix x(rng, m, k, floats[below(rng, 3)]), residual(rng, m, n, floats[below(rng, 3)]);
  const bool integers = w.plain() && below(rng, 5) == 0, has_bias = !integers && below(rng, 2),
             has_residual = !integers && below(rng, 2), is_static = w.per_token() && below(rng, 4) == 0;
  const auto activation = static_cast<Activation>(integers ? 0 : below(rng, 5));
  const DType c_type = integers ? DType::i32 : floats[below(rng, 3)];
  Guarded<float> bias(rng, n);
  for (int j = 0; j < n; ++j) bias[j] = uniform(rng);
  const int64_t ldc = n + below(rng, 2) * below(rng, 9);
  Guarded<char> c(rng, m ? ((m - 1) * ldc + n) * size_of(c_type) : 0);
  const float static_scale = is_static ? 0.01f + 0.1f * std::fabs(uniform(rng)) : 0;
  const int32_t static_zero = is_static ? below(rng, 256) - 128 : 0;
  const LinearArgs args{.m = m, .a = x.bytes.data(), .lda = x.ld, .a_type = x.type, .c = c.data(), .ldc = ldc,
                        .c_type = c_type, .bias = has_bias ? bias.data() : nullptr, .activation = activation,
                        .residual = has_residual ? residual.bytes.data() : nullptr, .ldr = residual.ld,
                        .residual_type = residual.type, .static_scale = static_scale, .static_zero = static_zero,
                        .threads = threads};
  run_linear(*w.packed, args);
  const std::string op = isa + ": " + w.op->name + " of groups of " + std::to_string(w.group);
  if (!gaps_are_whole(c.data(), m, n, ldc, c_type)) die(op + " wrote between the rows of its output");
  for (int i = 0; i < m; ++i) {
    const Coded row(w, x.values[static_cast<size_t>(i)], static_scale, static_zero);
    for (int j = 0; j < n; ++j) {
      const std::string where = op + ": [" + std::to_string(i) + ", " + std::to_string(j) + "] of " + std::to_string(m) +
                                "x" + std::to_string(n) + "x" + std::to_string(k);
      if (integers) {
        int32_t got;
        std::memcpy(&got, c.data() + (i * ldc + j) * 4, 4);
        if (row.finite() && got != row.accumulator(j)) die(where + ": wrong accumulator");
        continue;
      }
      float y = w.plain() ? static_cast<float>(row.accumulator(j)) * w.scale[j] * row.parts[0].scale : row.output(j);
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

namespace {

void test_call_errors() {
  const int8_t codes[5 * 32] = {};
  const float ones[5] = {1, 1, 1, 1, 1};
  float x[7] = {}, y[5] = {};
  const StoredWeight stored{.n = 5, .k = 7, .codes = codes, .ld = 7, .scale = ones, .group = 0, .group_scale = nullptr,
                            .group_scale_type = DType::f32, .zero = nullptr, .minimum = nullptr, .nf4 = false,
                            .activation_group = 0};
  const PackedWeight w = pack_linear(linear_op("linear_w8a8"), stored, 1);
  StoredWeight grouped_weight = stored;
  grouped_weight.activation_group = 32;
  const PackedWeight grouped = pack_linear(linear_op("linear_w8a8"), grouped_weight, 1);
  const LinearArgs good{.m = 1, .a = x, .lda = 7, .a_type = DType::f32, .c = y, .ldc = 5, .c_type = DType::f32,
                        .bias = nullptr, .activation = Activation::none, .residual = nullptr, .ldr = 0,
                        .residual_type = DType::f32, .static_scale = 0, .static_zero = 0, .threads = 1};
  run_linear(w, good);
  run_linear(grouped, good);
  const auto bad = [&](const char* what, const PackedWeight& packed, auto&& change) {
    expect_invalid(what, [&] {
      LinearArgs args = good;
      change(args);
      run_linear(packed, args);
    });
  };
  bad("a negative m", w, [](auto& a) { a.m = -1; });
  bad("int32 activations", w, [](auto& a) { a.a_type = DType::i32; });
  bad("a static zero of 128", w, [](auto& a) { a.static_scale = 1, a.static_zero = 128; });
  bad("a negative static scale", w, [](auto& a) { a.static_scale = -1; });
  bad("int32 output with relu", w, [](auto& a) { a.c_type = DType::i32, a.activation = Activation::relu; });
  bad("overlapping output rows", w, [](auto& a) { a.m = 2, a.ldc = 4, a.lda = 0; });
  bad("an output without memory", w, [](auto& a) { a.c = nullptr; });
  bad("int32 output of groups", grouped, [](auto& a) { a.c_type = DType::i32; });
  bad("a static scale of groups", grouped, [](auto& a) { a.static_scale = 1; });
  norm::Parameters through;
  through.eps = -1;
  bad("a norm with a negative eps", w, [&](auto& a) { a.norm = &through; });
  through.eps = 1, through.kind = norm::Kind::rms, through.bias = x;
  bad("an rms norm with a bias", w, [&](auto& a) { a.norm = &through; });
  through = {};
  const auto apart = [&](const char* what, auto&& change) {
    expect_invalid(what, [&] {
      LinearCall calls[] = {{&w, good}, {&w, good}};
      change(calls[1].args);
      run_linears(calls);
    });
  };
  apart("linears of another x", [&](auto& a) { a.a = y; });
  apart("linears of fewer rows", [](auto& a) { a.m = 0; });
  apart("linears of another stride", [](auto& a) { a.lda = 8; });
  apart("linears of another type of x", [](auto& a) { a.a_type = DType::f16; });
  apart("linears of which one has a norm", [&](auto& a) { a.norm = &through; });
  apart("linears of another static scale", [](auto& a) { a.static_scale = 1; });
  apart("linears of another static zero", [](auto& a) { a.static_zero = 1; });
  apart("linears on other threads", [](auto& a) { a.threads = 2; });
}

void test_pack_errors() {
  const std::vector<int8_t> codes(max_k + 1);
  const float one = 1, zero_scale = 0, infinite = INFINITY;
  const int8_t zero[1] = {};
  const StoredWeight good{.n = 1, .k = 40, .codes = codes.data(), .ld = 40, .scale = &one, .group = 0,
                          .group_scale = nullptr, .group_scale_type = DType::f32, .zero = nullptr, .minimum = nullptr,
                          .nf4 = false, .activation_group = 0};
  const auto bad = [&](const char* what, const char* op, auto&& change) {
    expect_invalid(what, [&] {
      StoredWeight weight = good;
      change(weight);
      pack_linear(linear_op(op), weight, 1);
    });
  };
  bad("an unknown op", "linear_w2a8", [](auto&) {});
  bad("an op that is not linear", "quantize_rows", [](auto&) {});
  for (const char* op : {"linear_w8a8", "linear_w4a8", "linear_w8a16", "linear_w4a16"}) {
    pack_linear(linear_op(op), good, 1);
    bad("a negative n", op, [](auto& w) { w.n = -1; });
    bad("a negative k", op, [](auto& w) { w.k = -1; });
    bad("codes without memory", op, [](auto& w) { w.codes = nullptr; });
    bad("overlapping rows", op, [](auto& w) { w.n = 2, w.ld = 19; });
    bad("a scale of zero", op, [&](auto& w) { w.scale = &zero_scale; });
    bad("an infinite scale", op, [&](auto& w) { w.scale = &infinite; });
    bad("groups of 16", op, [&](auto& w) { w.group = 16, w.group_scale = &one; });
    bad("groups without scales", op, [](auto& w) { w.group = 64; });
    bad("bfloat16 group scales", op, [&](auto& w) { w.group = 64, w.group_scale = &one, w.group_scale_type = DType::bf16; });
    bad("minima without groups", op, [&](auto& w) { w.minimum = &one; });
    bad("zero points and minima", op, [&](auto& w) { w.group = 64, w.group_scale = w.minimum = &one, w.zero = zero; });
    bad("activation groups of 48", op, [](auto& w) { w.activation_group = 48; });
    bad("groups of two sizes", op, [&](auto& w) { w.group = 64, w.group_scale = &one, w.activation_group = 32; });
  }
  bad("activation groups of 16 bits", "linear_w4a16", [](auto& w) { w.activation_group = 64; });
  bad("8-bit NF4", "linear_w8a16", [](auto& w) { w.nf4 = true; });
  bad("NF4 with 8-bit activations", "linear_w4a8", [](auto& w) { w.nf4 = true; });
  bad("NF4 with zero points", "linear_w4a16", [&](auto& w) { w.nf4 = true, w.zero = zero; });
  const auto longest = [](auto& w) { w.k = w.ld = max_k + 1; };
  bad("k beyond int32", "linear_w8a8", longest);
  bad("k beyond int32 in nibbles", "linear_w4a8", longest);
  StoredWeight weight = good;
  longest(weight);
  pack_linear(linear_op("linear_w8a16"), weight, 1);  // its sums are of 128 at most
}

}  // namespace

void test_linear_errors(Rng&) {
  test_call_errors();
  test_pack_errors();
}

}  // namespace halfbyte::truth
