// Random stacks of blocks against their parts called one after the other: equal bit for bit, on any number of threads, and
// without an allocation after the first call of a size.
#include <atomic>
#include <new>

#include "core/driver.h"
#include "fused/stack.h"
#include "ops/norm/op.h"
#include "ops/rope/op.h"
#include "tests.h"

namespace {
std::atomic<long> allocations{0};
}

void* operator new(size_t size) {
  allocations.fetch_add(1, std::memory_order_relaxed);
  if (void* p = std::malloc(size ? size : 1)) return p;
  throw std::bad_alloc();
}
// The one of std::stable_sort; a sanitizer's own would not go with the delete below.
void* operator new(size_t size, const std::nothrow_t&) noexcept {
  allocations.fetch_add(1, std::memory_order_relaxed);
  return std::malloc(size ? size : 1);
}
[[gnu::noinline]] void operator delete(void* p) noexcept { std::free(p); }
[[gnu::noinline]] void operator delete(void* p, size_t) noexcept { std::free(p); }

namespace halfbyte::truth {
namespace {

using namespace fused;
using Floats = std::vector<float>;

Floats random_floats(Rng& rng, int64_t count, float magnitude = 1) {
  Floats x(static_cast<size_t>(count));
  for (float& v : x) v = uniform(rng) * magnitude;
  return x;
}

// Owns what a Stack points to.
struct Model {
  explicit Model(Rng& rng) : rng(rng) {
    const bool pre = below(rng, 2);
    s.heads = 1 + below(rng, 4);
    s.kv_heads = s.heads % 2 == 0 && below(rng, 2) ? s.heads / 2 : s.heads;
    s.head_size = 2 * (1 + below(rng, 24));
    s.hidden = below(rng, 2) ? s.heads * s.head_size : 1 + below(rng, 100);
    s.scale = 1 / std::sqrt(static_cast<float>(s.head_size));
    s.pre_norm = pre;
    rms = below(rng, 2);
    s.causal = below(rng, 2);
    s.window = s.causal && !below(rng, 3) ? 1 + below(rng, 20) : 0;
    s.activation = static_cast<Activation>(below(rng, 5));
    s.rotary_dims = below(rng, 2) ? 2 * (1 + below(rng, s.head_size / 2)) : 0;
    s.interleaved = below(rng, 2);
    if (!pre && below(rng, 2)) s.first_norm = norm();
    if (pre && below(rng, 2)) s.last_norm = norm();
    const int64_t q = int64_t{s.heads} * s.head_size, kv = int64_t{s.kv_heads} * s.head_size, mlp = 1 + below(rng, 150);
    const bool gated = below(rng, 2);
    for (int i = 1 + below(rng, 3); i > 0; --i) {
      Block b;
      b.attention_norm = norm();
      b.mlp_norm = norm();
      // Mostly of one scheme, as layers of a model are.
      const auto any = [&] { return below(rng, 2) ? below(rng, dense_kinds) : dense_kinds + below(rng, sparse_formats); };
      const int kind = any();
      const auto kind_of = [&] { return below(rng, 5) ? kind : any(); };
      b.q = linear(kind_of(), q, s.hidden);
      b.k = linear(kind_of(), kv, s.hidden);
      b.v = linear(kind_of(), kv, s.hidden);
      b.o = linear(kind_of(), s.hidden, q);
      b.up = linear(kind_of(), mlp, s.hidden);
      if (gated) b.gate = linear(kind_of(), mlp, s.hidden);
      b.down = linear(kind_of(), s.hidden, mlp);
      s.blocks.push_back(b);
    }
    check_stack(s);
  }

  const float* keep(Floats values) {
    kept.push_back(std::make_unique<Floats>(std::move(values)));
    return kept.back()->data();
  }
  Norm norm() {
    return {rms ? norm::Kind::rms : norm::Kind::layer, below(rng, 4) ? keep(random_floats(rng, s.hidden)) : nullptr,
            !rms && below(rng, 4) ? keep(random_floats(rng, s.hidden)) : nullptr, 1e-5f};
  }
  // float32, w8a8, w4a8 in groups of 32, w8a8 with activations in groups of 64; with zeros
  static constexpr int dense_kinds = 4;
  Linear linear(int kind, int64_t n, int64_t k) {
    Linear l;
    l.bias = below(rng, 3) ? keep(random_floats(rng, n)) : nullptr;
    if (kind >= dense_kinds) {
      l.packed = std::make_shared<PackedWeight>(random_sparse(rng, kind - dense_kinds, n, k));
      if (!l.packed->grouped() && !below(rng, 4)) l.static_scale = 0.05f, l.static_zero = below(rng, 9);
      return l;
    }
    if (kind == 0) {
      const Floats w = random_floats(rng, n * k, 0.2f);
      l.packed = std::make_shared<PackedWeight>(pack_float(w.data(), DType::f32, n, k, k, 1));
      return l;
    }
    const LinearOp& op = linear_op(kind == 2 ? "linear_w4a8" : "linear_w8a8");
    const int64_t ld = kind == 2 ? (k + 1) / 2 : k, group = kind == 2 ? 32 : 0;
    std::vector<int8_t> codes(static_cast<size_t>(n * ld));
    for (int8_t& c : codes) c = static_cast<int8_t>(below(rng, 256) - 128);
    Floats scale(static_cast<size_t>(n));
    for (float& v : scale) v = (kind == 2 ? 0.02f : 0.002f) * (1.5f + uniform(rng) / 4);
    Floats group_scale(static_cast<size_t>(n * ((k + 31) / 32)));
    for (float& v : group_scale) v = 1.5f + uniform(rng) / 4;
    l.packed = std::make_shared<PackedWeight>(pack_linear(
        op,
        {.n = n, .k = k, .codes = codes.data(), .ld = ld, .scale = scale.data(), .group = group,
         .group_scale = group ? group_scale.data() : nullptr, .group_scale_type = DType::f32, .zero = nullptr,
         .minimum = nullptr, .nf4 = false, .activation_group = kind == 3 ? 64 : 0},
        1));
    if (kind == 1 && !below(rng, 4)) l.static_scale = 0.05f, l.static_zero = below(rng, 9);
    return l;
  }

  Rng& rng;
  bool rms;
  Stack s{};
  std::vector<std::unique_ptr<Floats>> kept;
};

// x W^T + bias, activated, times factor (of equal shape), plus residual
Floats apply(const Linear& l, const Floats& x, int64_t rows, Activation activation, const Floats* residual) {
  Floats y(static_cast<size_t>(rows * l.packed->n));
  LinearArgs a{};
  a.m = rows;
  a.a = x.data();
  a.lda = l.packed->k;
  a.c = y.data();
  a.ldc = l.packed->n;
  a.bias = l.bias;
  a.activation = activation;
  a.residual = residual ? residual->data() : nullptr;
  a.ldr = l.packed->n;
  a.static_scale = l.static_scale;
  a.static_zero = l.static_zero;
  a.threads = 1;
  run_linear(*l.packed, a);
  return y;
}

Floats apply(const Stack& s, const Norm& n, const Floats& x, int64_t rows) {
  Floats y(x.size());
  norm::Args a{};
  static_cast<norm::Parameters&>(a) = n;
  a.k = s.hidden;
  a.x = x.data();
  a.ldx = a.ldo = s.hidden;
  a.out = y.data();
  norm::run(a, rows, 1);
  return y;
}

// Keys and values [batch][kv head][position][head_size]
struct KeysAndValues {
  Floats k, v;
};

struct Input {
  int64_t batch, tokens, past;
  Floats x, cos, sin;
  std::vector<uint8_t> mask;  // [batch][keys]
};

void rotate(const Stack& s, const Input& in, float* x, int heads) {
  if (!s.rotary_dims) return;
  const int64_t row = int64_t{heads} * s.head_size;
  rope::Args r{};
  r.x = r.out = {x, DType::f32, in.tokens * row, row, s.head_size};
  r.heads = heads;
  r.head_size = s.head_size;
  r.tokens = in.tokens;
  r.rotary_dims = s.rotary_dims;
  r.interleaved = s.interleaved;
  r.cos = in.cos.data();
  r.sin = in.sin.data();
  r.table = in.past + in.tokens;
  r.first_position = in.past;
  rope::run(r, in.batch * in.tokens, 1);
}

Floats attend(const Stack& s, const Input& in, const Floats& q, const KeysAndValues& cache) {
  Floats out(q.size());
  const int64_t keys = in.past + in.tokens, width = int64_t{s.heads} * s.head_size;
  attention::Args a{};
  a.batch = in.batch;
  a.queries = in.tokens;
  a.keys = keys;
  a.heads = s.heads;
  a.kv_heads = s.kv_heads;
  a.head_size = s.head_size;
  a.q = q.data();
  a.q_batch = a.out_batch = in.tokens * width;
  a.q_row = a.out_row = width;
  a.q_head = a.out_head = s.head_size;
  a.k = cache.k.data();
  a.v = cache.v.data();
  a.k_batch = a.v_batch = s.kv_heads * keys * s.head_size;
  a.k_head = a.v_head = keys * s.head_size;
  a.k_row = a.v_row = s.head_size;
  a.scale = s.scale;
  a.causal = s.causal;
  a.offset = in.past;
  a.window = s.window;
  if (!in.mask.empty()) {
    a.mask = in.mask.data();
    a.mask_kind = attention::Mask::boolean;
    a.mask_batch = keys;
    a.mask_key = 1;
  }
  a.out = out.data();
  attention::run(a, 1);
  return out;
}

// The parts, one after the other. `caches` hold the past and get the rest.
Floats by_parts(const Stack& s, const Input& in, std::vector<KeysAndValues>& caches) {
  const int64_t rows = in.batch * in.tokens, keys = in.past + in.tokens;
  Floats x = s.first_norm ? apply(s, *s.first_norm, in.x, rows) : in.x;
  for (size_t i = 0; i < s.blocks.size(); ++i) {
    const Block& b = s.blocks[i];
    const Floats h = s.pre_norm ? apply(s, b.attention_norm, x, rows) : x;
    Floats q = apply(b.q, h, rows, Activation::none, nullptr), k = apply(b.k, h, rows, Activation::none, nullptr);
    const Floats v = apply(b.v, h, rows, Activation::none, nullptr);
    rotate(s, in, q.data(), s.heads);
    rotate(s, in, k.data(), s.kv_heads);
    for (int64_t r = 0; r < rows; ++r) {
      for (int head = 0; head < s.kv_heads; ++head) {
        const int64_t at = ((r / in.tokens * s.kv_heads + head) * keys + in.past + r % in.tokens) * s.head_size;
        std::copy_n(k.data() + (r * s.kv_heads + head) * s.head_size, s.head_size, caches[i].k.data() + at);
        std::copy_n(v.data() + (r * s.kv_heads + head) * s.head_size, s.head_size, caches[i].v.data() + at);
      }
    }
    x = apply(b.o, attend(s, in, q, caches[i]), rows, Activation::none, &x);
    if (!s.pre_norm) x = apply(s, b.attention_norm, x, rows);
    const Floats m = s.pre_norm ? apply(s, b.mlp_norm, x, rows) : x;
    Floats up = apply(b.up, m, rows, b.gate.packed ? Activation::none : s.activation, nullptr);
    if (b.gate.packed) {
      const Floats gate = apply(b.gate, m, rows, s.activation, nullptr);
      for (size_t j = 0; j < up.size(); ++j) up[j] *= gate[j];
    }
    x = apply(b.down, up, rows, Activation::none, &x);
    if (!s.pre_norm) x = apply(s, b.mlp_norm, x, rows);
  }
  return s.last_norm ? apply(s, *s.last_norm, x, rows) : x;
}

std::string describe(const Stack& s, const Input& in, const std::string& isa, int threads) {
  return isa + ": " + std::to_string(in.batch) + "x" + std::to_string(in.tokens) + " after " + std::to_string(in.past) + ", hidden " +
         std::to_string(s.hidden) + ", " + std::to_string(s.heads) + "/" + std::to_string(s.kv_heads) + " heads of " +
         std::to_string(s.head_size) + ", " + std::to_string(s.blocks.size()) + " blocks, pre-norm " + std::to_string(s.pre_norm) +
         ", " + std::to_string(threads) + " threads";
}

}  // namespace

void test_stack(Rng& rng, const std::string& isa) {
  const Model model(rng);
  const Stack& s = model.s;
  Input in{1 + below(rng, 3), 1 + below(rng, below(rng, 4) ? 10 : 150), 0, {}, {}, {}, {}};
  const bool cached = below(rng, 2);
  if (cached) in.past = below(rng, 20);
  const int64_t rows = in.batch * in.tokens, keys = in.past + in.tokens;
  in.x = random_floats(rng, rows * s.hidden);
  in.cos = random_floats(rng, keys * s.rotary_dims / 2, 0.5f);
  in.sin = random_floats(rng, keys * s.rotary_dims / 2, 0.5f);
  if (!below(rng, 3)) {
    for (int64_t i = 0; i < in.batch * keys; ++i) in.mask.push_back(static_cast<uint8_t>(below(rng, 4) != 0));
  }
  std::vector<KeysAndValues> caches;
  const int64_t elements = in.batch * s.kv_heads * keys * s.head_size;
  for (size_t i = 0; i < s.blocks.size(); ++i) caches.push_back({random_floats(rng, elements), random_floats(rng, elements)});
  Floats all_k, all_v;
  for (const KeysAndValues& c : caches) {
    all_k.insert(all_k.end(), c.k.begin(), c.k.end());
    all_v.insert(all_v.end(), c.v.begin(), c.v.end());
  }
  const Floats expected = by_parts(s, in, caches);

  for (const int threads : {1, 2, 3}) {
    Floats got(in.x.size(), NAN), k = all_k, v = all_v;
    const Cache cache{k.data(), v.data(), attention::Storage::f32, elements, s.kv_heads * keys * s.head_size,
                      keys * s.head_size, s.head_size, keys, nullptr, nullptr, 0, 0, 0};
    Call call{};
    call.batch = in.batch;
    call.tokens = in.tokens;
    call.x = in.x.data();
    call.ldx = call.ldo = s.hidden;
    call.out = got.data();
    if (!in.mask.empty()) call.mask = {in.mask.data(), attention::Mask::boolean, keys, 0, 0, 1};
    call.last_block = static_cast<int64_t>(s.blocks.size());
    call.cos = in.cos.data();
    call.sin = in.sin.data();
    call.table_rows = keys;
    call.cache = cached ? &cache : nullptr;
    call.past = in.past;
    call.threads = threads;
    run(s, call);
    if (std::memcmp(got.data(), expected.data(), got.size() * sizeof(float)) != 0) {
      die("stack differs from its parts: " + describe(s, in, isa, threads));
    }
    for (size_t i = 0; cached && i < caches.size(); ++i) {
      const size_t bytes = caches[i].k.size() * sizeof(float);
      const int64_t at = static_cast<int64_t>(i) * elements;
      if (std::memcmp(k.data() + at, caches[i].k.data(), bytes) || std::memcmp(v.data() + at, caches[i].v.data(), bytes)) {
        die("the cache differs: " + describe(s, in, isa, threads));
      }
    }
    const long before = allocations.load();
    const int64_t buffers = Buffer::allocations();
    run(s, call);
    // With one thread, where the pool of threads makes nothing of its own.
    if (threads == 1 && allocations.load() != before) die("a second call allocates: " + describe(s, in, isa, threads));
    if (Buffer::allocations() != buffers) die("a second call grows its workspace: " + describe(s, in, isa, threads));
  }
}

}  // namespace halfbyte::truth
