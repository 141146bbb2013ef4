// embedding: gathered rows of random tables against their dequantized elements.
#include "ops/embedding/op.h"
#include "tests.h"

namespace halfbyte::truth {

void test_embedding(Rng& rng, const std::string& isa) {
  const int n = 1 + below(rng, 20), k = size_near(rng, 32, 300), m = below(rng, 12);
  const bool four = below(rng, 2), nf4 = four && below(rng, 4) == 0;
  const int64_t group = below(rng, 3) ? 32 << below(rng, 3) : 0, groups = group ? (k + group - 1) / group : 1;
  const int offset = nf4 ? 0 : below(rng, 3);  // 1: zero, 2: minimum
  const DType type = below(rng, 2) ? DType::f16 : DType::f32, out_type = floats[below(rng, 3)];
  const int64_t row_bytes = four ? (k + 1) / 2 : k, ld = row_bytes + below(rng, 5), ldo = k + below(rng, 5);
  Guarded<uint8_t> codes(rng, (n - 1) * ld + row_bytes);
  Guarded<float> scale(rng, n);
  Guarded<char> group_scale(rng, group ? n * groups * size_of(type) : 0), minimum(rng, n * groups * size_of(type));
  Guarded<int8_t> zero(rng, n * groups);
  Guarded<int64_t> ids(rng, m);
  Guarded<char> out(rng, m ? ((m - 1) * ldo + k) * size_of(out_type) : 0);
  for (int i = 0; i < n; ++i) {
    scale[i] = 0.01f + std::fabs(uniform(rng));
    for (int64_t j = 0; j < row_bytes; ++j) codes[i * ld + j] = static_cast<uint8_t>(rng());
    for (int64_t g = i * groups; g < (i + 1) * groups; ++g) {
      if (group) put(type, group_scale.data(), g, 0.01f + std::fabs(uniform(rng)));
      put(type, minimum.data(), g, uniform(rng));
      zero[g] = static_cast<int8_t>(four ? below(rng, 16) : below(rng, 256) - 128);
    }
  }
  for (int i = 0; i < m; ++i) ids[i] = below(rng, n);
  embedding::Args args{.codes = codes.data(), .n = n, .k = k, .ld = ld, .bits = four ? 4 : 8, .nf4 = nf4,
                       .scale = scale.data(), .group = group, .group_scale = group ? group_scale.data() : nullptr,
                       .group_scale_type = type, .zero = offset == 1 ? zero.data() : nullptr,
                       .minimum = offset == 2 ? minimum.data() : nullptr, .ids = ids.data(), .m = m,
                       .out = out.data(), .ldo = ldo, .out_type = out_type};
  embedding::run(args, 1 + below(rng, 3));
  const std::string where = isa + ": embedding: " + std::to_string(n) + "x" + std::to_string(k);
  if (!gaps_are_whole(out.data(), m, k, ldo, out_type)) die(where + ": wrote between the rows of its output");
  for (int i = 0; i < m; ++i) {
    for (int j = 0; j < k; ++j) {
      const int byte = codes[ids[i] * ld + (four ? j / 2 : j)], u = four ? byte >> j % 2 * 4 & 15 : byte;
      const int64_t g = ids[i] * groups + (group ? j / group : 0);
      int c = !four ? static_cast<int8_t>(u) : nf4 ? nf4_levels[u] : offset ? u : u - 8;
      if (offset == 1) c -= zero[g];
      float y = static_cast<float>(c);  // the test is compiled without contraction
      if (group) y = y * get(type, group_scale.data(), g);
      if (offset == 2) y = y + get(type, minimum.data(), g);
      y = y * scale[ids[i]];
      if (!same(get(out_type, out.data(), i * ldo + j), rounded(out_type, y))) die(where + ": wrong row");
    }
  }
  if (!m) return;
  ids[below(rng, m)] = below(rng, 2) ? -1 : n;
  try {
    embedding::run(args, 1);
  } catch (const std::out_of_range&) {
    return;
  }
  die(where + ": accepted an id outside the table");
}

}  // namespace halfbyte::truth
