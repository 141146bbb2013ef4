// The ops on weights with zeros. Codes: what linear_w8a8 or linear_w4a8 give for the same, bit for bit, which linear_test.cpp
// holds to the truth. Floats: what linear_f32 gives for the same weight, bit for bit, and sums in double within the bound of op.h.
#include <thread>

#include "core/dispatch.h"
#include "core/sparse_panel.h"
#include "sparse_operands.h"

namespace halfbyte::truth {
namespace {

struct Format {
  const char* op;
  int nonzero, of, group = 0;
};
constexpr Format formats[] = {{"spmm_block_w8a8", 0, 0},        {"spmm_nm_w8a8", 1, 4},   {"spmm_nm_w8a8", 2, 4},
                              {"spmm_nm_w8a8", 4, 8},           {"spmm_block_f32", 0, 0}, {"spmm_unstructured_w8a8", 0, 0},
                              {"spmm_unstructured_w8a8", 2, 4}, {"spmm_block_bf16", 0, 0}, {"spmm_unstructured_f32", 0, 0},
                              {"spmm_block_w4a8", 0, 0, 32},    {"spmm_block_w4a8", 0, 0, 128}};
static_assert(std::size(formats) == sparse_formats);

// Which weights of [n][k] are kept: mostly as the op likes it; sometimes all or none, with rows and columns that have none.
std::vector<char> random_mask(Rng& rng, const Format& f, int n, int k) {
  const std::string op = f.op;
  const bool blocks = op.starts_with("spmm_block") && below(rng, 5);
  const int wide = blocks && op.ends_with("a8") ? 4 : 1, high = blocks ? 16 : 1, across = (k + wide - 1) / wide;
  constexpr int densities[] = {0, 256, 5, 26, 77, 128, 220};  // of 256
  const int density = densities[below(rng, 7)];
  const int empty_rows = below(rng, 3) ? 0 : 16 * below(rng, 5), empty_columns = 64 * below(rng, 3);
  std::vector<char> keep(static_cast<size_t>(n * k)), block(static_cast<size_t>((n + high - 1) / high * across));
  for (char& b : block) b = below(rng, 256) < density;
  for (int j = 0; j < n; ++j) {
    int left = 0;
    for (int i = 0; i < k; ++i) {
      bool here = block[static_cast<size_t>(j / high * across + i / wide)];
      if (f.of) {
        if (i % f.of == 0) left = density == 256 ? f.nonzero : density ? below(rng, f.nonzero + 1) : 0;
        here = below(rng, f.of - i % f.of) < left;
        left -= here;
      }
      const bool empty = (j >= 16 && j < 16 + empty_rows) || (i >= 64 && i < 64 + empty_columns);
      keep[static_cast<size_t>(j * k + i)] = here && !empty;
    }
  }
  return keep;
}

StoredWeight stored_codes(int64_t n, int64_t k, const void* codes, int64_t ld, const float* scale) {
  StoredWeight w{};
  w.n = n, w.k = k, w.codes = codes, w.ld = ld, w.scale = scale;
  return w;
}

// A weight with zeros, packed without and with them.
struct Pair {
  Pair(Rng& rng, const Format& f, int n, int k);

  const LinearOp& op;
  const int n, k;
  const bool codes, sums;  // sums: there is one integer sum per output
  std::vector<float> values;  // of floats: those that the op multiplies with
  std::optional<PackedWeight> sparse, dense;
};

Pair::Pair(Rng& rng, const Format& f, int n, int k)
    : op(linear_op(f.op)), n(n), k(k), codes(op.activation_bits == 8), sums(codes && !f.group) {
  const std::vector<char> keep = random_mask(rng, f, n, k);
  const DType type = codes ? DType::f32 : floats[below(rng, 3)];
  const int64_t ld = k + below(rng, 2) * below(rng, 9), size = codes ? 1 : size_of(type);
  Exact<char> weight(rng, n ? ((n - 1) * ld + k) * size : 0);
  Exact<float> scale(rng, codes ? n : 0);
  const int groups = f.group ? (k + f.group - 1) / f.group : 0, range = f.group ? 16 : 256, row_bytes = f.group ? (k + 1) / 2 : k;
  const DType scale_type = below(rng, 2) ? DType::f32 : DType::f16;
  Exact<char> group_scale(rng, n * groups * size_of(scale_type));
  for (int i = 0; i < n * groups; ++i) put(scale_type, group_scale.data(), i, 0.1f * (1.5f + uniform(rng) / 4));
  std::vector<uint8_t> nibbles(static_cast<size_t>(f.group ? n * row_bytes : 0));
  const int kind = below(rng, 6);
  values.resize(keep.size());
  for (int j = 0; j < n; ++j) {
    if (codes) scale[j] = 0.002f * (1.5f + uniform(rng) / 4);
    for (int i = 0; i < k; ++i) {
      const auto at = static_cast<size_t>(j * k + i);
      if (codes) {
        const int some = kind == 0 ? 0 : kind == 1 ? range - 1 : below(rng, range), code = keep[at] ? some - range / 2 : 0;
        weight[j * ld + i] = static_cast<char>(code);
        if (f.group) {
          uint8_t& byte = nibbles[static_cast<size_t>(j * row_bytes + i / 2)];
          byte = static_cast<uint8_t>(byte | (code + 8) << i % 2 * 4);
        }
        continue;
      }
      put(type, weight.data(), j * ld + i, keep[at] ? 0.2f * uniform(rng) : below(rng, 2) ? 0.0f : -0.0f);
      const float stored = get(type, weight.data(), j * ld + i);
      values[at] = op.weight_bits == 16 ? rounded(DType::bf16, stored) : stored;
    }
  }
  const SparseWeight source{.n = n, .k = k, .weight = weight.data(), .type = type, .ld = ld,
                            .scale = codes ? scale.data() : nullptr, .nonzero = f.nonzero, .of = f.of, .group = f.group,
                            .group_scale = group_scale.data(), .group_scale_type = scale_type};
  sparse.emplace(pack_sparse(op, source, 1 + below(rng, 3)));
  if (!codes) {
    dense.emplace(pack_float(values.data(), DType::f32, n, k, k, 1));
    return;
  }
  StoredWeight w = stored_codes(n, k, weight.data(), ld, scale.data());
  if (f.group) {
    w.codes = nibbles.data(), w.ld = row_bytes;
    w.group = f.group, w.group_scale = group_scale.data(), w.group_scale_type = scale_type;
  }
  dense.emplace(pack_linear(linear_op(f.group ? "linear_w4a8" : "linear_w8a8"), w, 1));
}

std::string describe(const std::string& isa, const Pair& w, int m, const char* what) {
  const std::string shape = std::to_string(m) + "x" + std::to_string(w.n) + "x" + std::to_string(w.k);
  return isa + ": " + w.op.name + ", " + shape + ": " + what;
}

// Everything of a call but the weight.
struct Operands {
  Operands(Rng& rng, int m, int n, int k, bool codes, bool sums)  // sums: the output may be int32
      : x(rng, m, k, floats[below(rng, 3)], !codes),
        residual(rng, m, n, floats[below(rng, 3)], false),
        bias(rng, n),
        gate_bias(rng, n) {
    for (int j = 0; j < n; ++j) bias[j] = uniform(rng), gate_bias[j] = uniform(rng);
    const bool integers = sums && below(rng, 4) == 0, is_static = codes && below(rng, 4) == 0;
    args = {.m = m, .a = x.bytes.data(), .lda = x.ld, .a_type = x.type, .c = nullptr,
            .ldc = n + below(rng, 2) * below(rng, 9), .c_type = integers ? DType::i32 : floats[below(rng, 3)],
            .bias = !integers && below(rng, 2) ? bias.data() : nullptr,
            .activation = integers ? Activation::none : static_cast<Activation>(below(rng, 5)),
            .residual = !integers && below(rng, 2) ? residual.bytes.data() : nullptr, .ldr = residual.ld,
            .residual_type = residual.type, .static_scale = is_static ? 0.01f + 0.1f * std::fabs(uniform(rng)) : 0,
            .static_zero = is_static ? below(rng, 256) - 128 : 0, .threads = 1,
            .gate_bias = below(rng, 2) ? gate_bias.data() : nullptr};
  }
  Rows x, residual;
  Exact<float> bias, gate_bias;
  LinearArgs args;
};

Output run(const PackedWeight& w, LinearArgs args, int threads, const PackedWeight* gate, const std::string& where) {
  Output out(args.m, w.n, args.ldc, args.c_type);
  args.c = out.data();
  args.threads = threads;
  args.gate = gate;
  run_linear(w, args);
  out.check(where);
  return out;
}

// The exception of spmm_unstructured_f32/op.h: up to four rows in 16 sums, of panels without lists.
bool in_order(const Pair& w, int m) {
  if (m > 4 || selected_name(w.op.name, active_isas()) != "spmm_unstructured_f32_128x1x1_avx512") return true;
  for (int64_t p = 0; p < w.sparse->panels(); ++p) {
    if (reinterpret_cast<const MaskPanel*>(w.sparse->panel(p))->lists == 0) return false;
  }
  return true;
}

// A call on any number of threads against the dense one.
void test_call(Rng& rng, const Pair& w, const Pair* gate, const std::string& isa, int m) {
  const Operands operands(rng, m, w.n, w.k, w.codes, w.sums && !gate);
  const PackedWeight *const sparse_gate = gate ? &*gate->sparse : nullptr, *const dense_gate = gate ? &*gate->dense : nullptr;
  const std::string where = describe(isa, w, m, gate ? "gated" : "run_linear");
  const Output out = run(*w.sparse, operands.args, 1, sparse_gate, where);
  for (const int threads : {2, 3}) {
    if (run(*w.sparse, operands.args, threads, sparse_gate, where) != out) die(where + ": differs on " + std::to_string(threads));
  }
  if (!in_order(w, m) || (gate && !in_order(*gate, m))) return;
  if (!out.same_numbers(run(*w.dense, operands.args, 2, dense_gate, where))) die(where + ": the dense op differs");
}

// The sums of some rows of floats: |t - exact| <= K 2^-24 (1 + 2^-10) sum_k |a w|.
void test_bound(Rng& rng, const Pair& w, const std::string& isa, int m) {
  Operands operands(rng, m, w.n, w.k, false, false);
  LinearArgs& args = operands.args;
  args.bias = nullptr, args.residual = nullptr, args.c_type = DType::f32, args.activation = Activation::none;
  const std::string where = describe(isa, w, m, "sums");
  const Output out = run(*w.sparse, args, 1 + below(rng, 3), nullptr, where);
  for (int rows = std::min(m, 6); rows > 0; --rows) {
    const int i = m <= 6 ? rows - 1 : rows == 6 ? m - 1 : below(rng, m);
    for (int j = 0; j < w.n; ++j) {
      const float* const row = w.values.data() + j * w.k;
      double exact = 0, magnitude = 0;
      for (int l = 0; l < w.k; ++l) {
        const double product = double{operands.x.at(i, l)} * row[l];
        exact += product, magnitude += std::fabs(product);
      }
      const double bound = w.k * (0x1p-24 * (1 + 0x1p-10) * magnitude + 0x1p-149);  // and what is subnormal
      if (!(std::fabs(double{out.at(i, j)} - exact) <= bound)) {
        die(where + ": [" + std::to_string(i) + ", " + std::to_string(j) + "] is too far off");
      }
    }
  }
}

// Weights that share x: what each gives alone.
void test_linears(Rng& rng, const Format& f, const std::string& isa, int m, int k) {
  std::vector<std::unique_ptr<Pair>> pairs;
  for (int i = 1 + below(rng, 3); i > 0; --i) {
    pairs.push_back(std::make_unique<Pair>(rng, f, below(rng, 5) ? size_near(rng, 32, 130) : 0, k));
  }
  const Operands operands(rng, m, 130, k, pairs[0]->codes, pairs[0]->sums);
  LinearArgs args = operands.args;
  args.residual = nullptr;
  for (const int threads : {1, 2, 3}) {
    std::vector<Output> out;
    std::vector<LinearCall> calls;
    for (const auto& w : pairs) out.emplace_back(m, w->n, w->n, args.c_type);
    for (size_t i = 0; i < pairs.size(); ++i) {
      args.threads = threads, args.c = out[i].data(), args.ldc = pairs[i]->n, calls.push_back({&*pairs[i]->sparse, args});
    }
    run_linears(calls);
    for (size_t i = 0; i < pairs.size(); ++i) {
      args.ldc = pairs[i]->n;
      const std::string where = describe(isa, *pairs[i], m, "run_linears");
      out[i].check(where);
      if (out[i] != run(*pairs[i]->sparse, args, 1, nullptr, where)) die(where + " differs from run_linear");
    }
  }
}

bool has_kernel(const char* op, const std::string& isa) {
  const auto kernels = linear_op(op).kernels;
  return std::any_of(kernels.begin(), kernels.end(), [&](const GemmKernel* kernel) { return isa == kernel->info.isa; });
}

// Around the tiles of these rows.
int some_rows(Rng& rng) {
  constexpr int edges[] = {4, 8, 12, 16, 24, 32, 48, 64, 96, 128};
  const int pick = below(rng, 10);
  if (pick < 4) return pick ? 1 + below(rng, 5) : 0;
  return pick < 8 ? edges[below(rng, 10)] - 1 + below(rng, 3) : 1 + below(rng, 200);
}

}  // namespace

PackedWeight random_sparse(Rng& rng, int format, int64_t n, int64_t k) {
  return std::move(*Pair(rng, formats[format], static_cast<int>(n), static_cast<int>(k)).sparse);
}

void test_sparse(Rng& rng, const std::string& isa) {
  for (const Format& f : formats) {
    if (!has_kernel(f.op, isa)) continue;
    const int n = below(rng, 8) ? size_near(rng, 32, 200) : 0, k = below(rng, 10) ? size_near(rng, 64, 700) : 0, m = some_rows(rng);
    const Pair w(rng, f, n, k);
    test_call(rng, w, nullptr, isa, m);
    test_call(rng, w, nullptr, isa, 1 + below(rng, 6));
    if (!w.codes) test_bound(rng, w, isa, m);
    const Format& other = f.op == std::string("spmm_nm_w8a8") ? formats[1 + below(rng, 3)] : f;  // of another pattern
    const int part = below(rng, 4);
    if (part == 0) test_call(rng, w, std::make_unique<Pair>(rng, other, n, k).get(), isa, m);
    if (part == 1) test_linears(rng, other, isa, m, k);
  }
}

// As many k as the sums of int8 bear; panels side by side, of more k than a part of a strip (tiles/sparse/blocks.h) has; more
// rows than are quantized at once: 4 MiB of codes.
void test_sparse_large(Rng& rng, const std::string& isa) {
  for (const Format& f : formats) {
    if (!has_kernel(f.op, isa)) continue;
    const bool codes = linear_op(f.op).activation_bits == 8, deep = codes && !below(rng, 3);
    const int k = deep ? static_cast<int>(max_k) - below(rng, 99) : codes ? 5500 + below(rng, 7000) : 8192 + below(rng, 70);
    const Pair w(rng, f, deep ? 1 + below(rng, 20) : 33 + below(rng, 40), k);
    test_call(rng, w, nullptr, isa, deep ? 1 + below(rng, 60) : codes ? 40 + below(rng, 20) : 129 + below(rng, 4));
    test_call(rng, w, nullptr, isa, 1 + below(rng, 12));
  }
}

// Threads that call the same packed weights at once, each on an instruction set of its own.
void test_sparse_concurrent(unsigned seed, const std::vector<std::string>& names, int calls) {
  Rng rng(seed);
  std::vector<std::unique_ptr<Pair>> pairs;
  for (const Format& f : formats) pairs.push_back(std::make_unique<Pair>(rng, f, 33 + below(rng, 60), 65 + below(rng, 300)));
  std::vector<std::thread> threads;
  for (unsigned t = 0; t < 6; ++t) {
    threads.emplace_back([&, t] {
      Rng own(seed + t);
      const std::string& isa = names[t % names.size()];
      force_isa(isa);
      for (int i = 0; i < calls; ++i) {
        test_call(own, *pairs[static_cast<size_t>(i % sparse_formats)], nullptr, isa, 1 + below(own, 60));
      }
    });
  }
  for (std::thread& thread : threads) thread.join();
}

void test_sparse_errors(Rng& rng) {
  std::vector<int8_t> codes(static_cast<size_t>(max_k) + 1);
  std::vector<float> values(40);
  const float ones[2] = {1, 1};
  for (const Format& f : formats) {
    const LinearOp& op = linear_op(f.op);
    const bool is_codes = op.activation_bits == 8;
    const SparseWeight good{.n = 2, .k = 19, .weight = is_codes ? static_cast<void*>(codes.data()) : values.data(),
                            .type = DType::f32, .ld = 19, .scale = is_codes ? ones : nullptr, .nonzero = f.nonzero, .of = f.of,
                            .group = f.group, .group_scale = ones, .group_scale_type = DType::f32};
    const auto bad = [&](const char* what, auto&& change) {
      expect_invalid((std::string(f.op) + ": " + what).c_str(), [&] {
        SparseWeight weight = good;
        change(weight);
        pack_sparse(op, weight, 1);
      });
    };
    bad("a negative n", [](auto& w) { w.n = -1; });
    bad("a negative k", [](auto& w) { w.k = -1; });
    bad("a weight without memory", [](auto& w) { w.weight = nullptr; });
    bad("overlapping rows", [](auto& w) { w.ld = 18; });
    constexpr int unknown[][2] = {{2, 0}, {0, 4}, {3, 4}, {2, 8}, {-2, -4}};
    for (const auto& [nonzero, of] : unknown) bad("a pattern that is none", [&](auto& w) { w.nonzero = nonzero, w.of = of; });
    if (op.layout != Layout::windows) bad("a pattern 2:4", [](auto& w) { w.nonzero = 2, w.of = 4; });
    if (f.op == std::string("spmm_nm_w8a8")) bad("no pattern", [](auto& w) { w.nonzero = w.of = 0; });
    for (const float scale : {0.0f, -1.0f, INFINITY, NAN}) {
      const float scales[2] = {1, scale};
      if (is_codes) bad("a scale that is none", [&](auto& w) { w.scale = scales; });
    }
    if (is_codes) bad("codes without scales", [](auto& w) { w.scale = nullptr; });
    if (is_codes && !f.group) bad("k beyond int32", [](auto& w) { w.n = 1, w.k = w.ld = max_k + 1; });
    for (const int group : {16, 33, 256, -32}) bad("a group that is none", [&](auto& w) { w.group = group; });
    if (f.group) {
      const int8_t outside[38] = {8};
      const float scales[2] = {1, -1};
      bad("no group", [](auto& w) { w.group = 0; });
      bad("no group scales", [](auto& w) { w.group_scale = nullptr; });
      bad("group scales in bfloat16", [](auto& w) { w.group_scale_type = DType::bf16; });
      bad("a group scale that is none", [&](auto& w) { w.group_scale = scales; });
      bad("a code of five bits", [&](auto& w) { w.weight = outside; });
    }
    if (!is_codes) bad("an int32 weight", [](auto& w) { w.type = DType::i32; });
    std::fill_n(codes.data() + 19 + 16, 3, int8_t{1});  // all of the last group
    if (f.of && f.nonzero < 3) bad("three in a group", [](auto&) {});
    std::fill_n(codes.data() + 19 + 16, 3, int8_t{0});
    const PackedWeight packed = pack_sparse(op, good, 1);
    const StoredWeight stored = stored_codes(2, 19, codes.data(), 19, ones);
    const PackedWeight dense = is_codes ? pack_linear(linear_op("linear_w8a8"), stored, 1)
                                        : pack_float(values.data(), DType::f32, 2, 19, 19, 1);
    expect_invalid("unpacking zeros", [&] { unpack_linear(packed, codes.data(), 19); });
    expect_invalid("pack_linear with zeros", [&] { pack_linear(op, stored, 1); });
    expect_invalid("pack_sparse without zeros", [&] { pack_sparse(*dense.format.op, good, 1); });
    const Operands operands(rng, 3, 2, 19, false, false);
    const auto bad_call = [&](const char* what, auto&& call) {
      LinearArgs args = operands.args;
      Output out(3, 2, 2, DType::f32);
      const Output before = out;
      args.c = out.data(), args.ldc = 2, args.c_type = DType::f32;
      expect_invalid(what, [&] { call(args); });
      if (out != before) die(std::string(what) + " wrote to its output");
    };
    bad_call("a dense gate", [&](auto& args) { args.gate = &dense, run_linear(packed, args); });
    bad_call("a gate with zeros", [&](auto& args) { args.gate = &packed, run_linear(dense, args); });
    bad_call("linears of two ops", [&](auto& args) {
      const LinearCall calls[] = {{&packed, args}, {&dense, args}};
      run_linears(calls);
    });
    if (is_codes && !f.group) continue;
    bad_call("int32 sums of floats or groups", [&](auto& args) {
      args.c_type = DType::i32, args.bias = nullptr, args.residual = nullptr, args.activation = Activation::none;
      run_linear(packed, args);
    });
    if (is_codes) continue;
    bad_call("a static scale of floats", [&](auto& args) { args.static_scale = 1, run_linear(packed, args); });
  }
}

}  // namespace halfbyte::truth
