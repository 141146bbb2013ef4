// attention: random calls, their tasks run one by one in a scratch that ends at a guarded page, against float64.
#include "ops/attention/op.h"
#include "tests.h"

namespace halfbyte::truth {
namespace {

using attention::Storage;

double stored(Storage type, const void* base, int64_t i) {
  if (type == Storage::int8) return static_cast<const int8_t*>(base)[i];
  return get(static_cast<DType>(type), base, i);  // the float types have one numbering
}

void fill(Rng& rng, Storage type, void* base, int64_t count) {
  for (int64_t i = 0; i < count; ++i) {
    if (type == Storage::int8) {
      static_cast<int8_t*>(base)[i] = static_cast<int8_t>(below(rng, 255) - 127);
    } else {
      put(static_cast<DType>(type), base, i, uniform(rng));
    }
  }
}

struct Exact {
  std::vector<double> out, spread;
  double error;  // relative to spread
};

// One query of one head, and the bound of op.h.
Exact exact(const attention::Args& a, int64_t b, int64_t i, int h) {
  const double u = 0x1p-24;
  const int64_t kv = h / (a.heads / a.kv_heads), d = a.head_size, q = b * a.q_batch + i * a.q_row + h * a.q_head;
  std::vector<double> score(static_cast<size_t>(a.keys), -INFINITY);
  double top = -INFINITY, reach = 0, largest = 0, sum = 0;
  for (int64_t j = 0; j < a.keys; ++j) {
    if (a.causal && j > i + a.offset) continue;
    if (a.window && j <= i + a.offset - a.window) continue;
    const int64_t at = b * a.mask_batch + h * a.mask_head + i * a.mask_row + j * a.mask_key;
    double bias = 0;
    if (a.mask_kind == attention::Mask::boolean && !static_cast<const char*>(a.mask)[at]) continue;
    if (a.mask_kind == attention::Mask::add) bias = static_cast<const float*>(a.mask)[at];
    if (bias == -INFINITY) continue;
    double s = 0, size = 0;
    const double scale = a.k_scale ? a.k_scale[b * a.k_scale_batch + j * a.k_scale_row + kv * a.k_scale_head] : 1;
    for (int64_t c = 0; c < d; ++c) {
      const double product = get(a.q_type, a.q, q + c) * static_cast<double>(a.scale) * scale *
                             stored(a.kv_type, a.k, b * a.k_batch + j * a.k_row + kv * a.k_head + c);
      s += product, size += std::fabs(product);
    }
    reach = std::max(reach, size), largest = std::max({largest, std::fabs(bias), std::fabs(s + bias)});
    score[static_cast<size_t>(j)] = s + bias, top = std::max(top, s + bias);
  }
  Exact row{std::vector<double>(static_cast<size_t>(d)), std::vector<double>(static_cast<size_t>(d)), 0};
  for (double& s : score) sum += s = std::isinf(s) ? 0 : std::exp(s - top);
  for (int64_t j = 0; j < a.keys; ++j) {
    const double scale = a.v_scale ? a.v_scale[b * a.v_scale_batch + j * a.v_scale_row + kv * a.v_scale_head] : 1;
    for (int64_t c = 0; c < d && sum > 0; ++c) {
      const double v = scale * stored(a.kv_type, a.v, b * a.v_batch + j * a.v_row + kv * a.v_head + c);
      row.out[static_cast<size_t>(c)] += score[static_cast<size_t>(j)] / sum * v;
      row.spread[static_cast<size_t>(c)] += score[static_cast<size_t>(j)] / sum * std::fabs(v);
    }
  }
  const double blocks = std::ceil(static_cast<double>(a.keys) / attention::key_block);
  const double w = (static_cast<double>(d) + 4) * reach + 3 * largest + 3;
  row.error = (2 * w + static_cast<double>(a.keys) + 6 * blocks + 20) * u;
  return row;
}

}  // namespace

void test_attention(Rng& rng, const std::string& isa) {
  attention::Args a{};
  const int group = 1 + below(rng, 4);
  a.batch = 1 + below(rng, 2), a.kv_heads = 1 + below(rng, 2), a.heads = a.kv_heads * group;
  a.queries = below(rng, 3) ? 1 + below(rng, 4) : 1 + below(rng, 70), a.keys = below(rng, 150);
  a.head_size = below(rng, 2) ? 8 << below(rng, 5) : 1 + below(rng, 70);
  a.q_type = floats[below(rng, 3)], a.out_type = floats[below(rng, 3)], a.kv_type = static_cast<Storage>(below(rng, 4));
  a.causal = below(rng, 2), a.window = below(rng, 3) ? 0 : 1 + below(rng, 100);
  a.offset = below(rng, 3) ? a.keys - a.queries : below(rng, 200) - 100;
  a.scale = 0.3f * uniform(rng);

  const int64_t d = a.head_size, gap = below(rng, 2) * below(rng, 9);
  a.q_head = d + gap, a.q_row = a.heads * a.q_head, a.q_batch = a.queries * a.q_row;
  a.k_row = a.v_row = d + gap, a.k_head = a.v_head = a.keys * a.k_row, a.k_batch = a.v_batch = a.kv_heads * a.k_head;
  const int64_t q_count = a.batch * a.q_batch - gap, kv_count = a.keys ? a.batch * a.k_batch - gap : 0;
  const int64_t kv_bytes = a.kv_type == Storage::f32 ? 4 : a.kv_type == Storage::int8 ? 1 : 2;
  Guarded<char> q(rng, q_count * size_of(a.q_type)), k(rng, kv_count * kv_bytes), v(rng, kv_count * kv_bytes);
  fill(rng, static_cast<Storage>(a.q_type), q.data(), q_count);
  fill(rng, a.kv_type, k.data(), kv_count);
  fill(rng, a.kv_type, v.data(), kv_count);
  const int64_t scales = a.batch * a.kv_heads * a.keys;
  Guarded<float> k_scale(rng, scales), v_scale(rng, scales);
  for (int64_t i = 0; i < scales; ++i) k_scale[i] = 0.02f * uniform(rng), v_scale[i] = 0.02f * uniform(rng);
  if (a.kv_type == Storage::int8) {
    a.k_scale = k_scale.data(), a.v_scale = v_scale.data();
    a.k_scale_row = a.v_scale_row = 1, a.k_scale_head = a.v_scale_head = a.keys;
    a.k_scale_batch = a.v_scale_batch = a.kv_heads * a.keys;
  }
  a.q = q.data(), a.k = k.data(), a.v = v.data();

  a.mask_kind = a.keys ? static_cast<attention::Mask>(below(rng, 3)) : attention::Mask::none;
  const int64_t sizes[] = {a.batch, a.heads, a.queries, a.keys};
  int64_t* const strides[] = {&a.mask_batch, &a.mask_head, &a.mask_row, &a.mask_key};
  int64_t masks = 1;
  for (int i = 3; i >= 0; --i) {
    if (a.mask_kind == attention::Mask::none || below(rng, 3) == 0) continue;
    *strides[i] = masks, masks *= sizes[i];
  }
  Guarded<float> added(rng, masks);
  Guarded<char> seen(rng, masks);
  for (int64_t i = 0; i < masks; ++i) {
    added[i] = below(rng, 3) ? 3 * uniform(rng) : -INFINITY;
    seen[i] = static_cast<char>(below(rng, 3));
  }
  if (a.mask_kind == attention::Mask::add) a.mask = added.data();
  if (a.mask_kind == attention::Mask::boolean) a.mask = seen.data();

  const int64_t ldo = d + below(rng, 5), rows = a.batch * a.queries * a.heads;
  a.out_head = ldo, a.out_row = a.heads * ldo, a.out_batch = a.queries * a.out_row;
  Guarded<char> out(rng, ((rows - 1) * ldo + d) * size_of(a.out_type));
  a.out = out.data();
  if (below(rng, 2)) {
    attention::run(a, 1 + below(rng, 3));
  } else {
    attention::check_args(a);
    Guarded<char> scratch(rng, attention::scratch_bytes(a));
    for (int64_t task = attention::tasks(a); task-- > 0;) attention::select().task(a, task, scratch.data());
  }
  const std::string where = isa + ": attention: " + std::to_string(a.queries) + " x " + std::to_string(a.keys);
  if (!gaps_are_whole(out.data(), rows, d, ldo, a.out_type)) die(where + ": wrote between the rows of its output");
  for (int64_t r = 0; r < rows; ++r) {
    const int64_t b = r / a.heads / a.queries;
    const Exact want = exact(a, b, r / a.heads % a.queries, static_cast<int>(r % a.heads));
    for (int64_t c = 0; c < d; ++c) {
      const double y = want.out[static_cast<size_t>(c)], got = get(a.out_type, out.data(), r * ldo + c);
      const double rounding = a.out_type == DType::f32 ? 0x1p-24 : a.out_type == DType::bf16 ? 0x1p-8 : 0x1p-11;
      const double slack = want.error * want.spread[static_cast<size_t>(c)] * (1 + rounding) + rounding * std::fabs(y);
      if (!(std::fabs(got - y) <= slack + 0x1p-25)) {
        die(where + ": " + std::to_string(got) + " instead of " + std::to_string(y));
      }
    }
  }
}

}  // namespace halfbyte::truth
