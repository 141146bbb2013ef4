// quantize_rows: every layout of codes, with sums and scales per row and per group.
#include "ops/quantize_rows/op.h"
#include "tests.h"

namespace halfbyte::truth {
namespace {

struct Kind {
  bool symmetric, is_static, wide, scale_per_group;
  int bits;
  int64_t group;
};

Kind random_kind(Rng& rng) {
  Kind kind{};
  kind.group = below(rng, 2) ? 32 << below(rng, 3) : 0;
  kind.scale_per_group = kind.group && below(rng, 2);
  kind.bits = kind.scale_per_group && below(rng, 2) ? 16 : 8;
  kind.wide = below(rng, 2);
  kind.symmetric = kind.scale_per_group || below(rng, 3) == 0;
  kind.is_static = !kind.symmetric && below(rng, 3) == 0;
  return kind;
}

}  // namespace

void test_quantize_rows(Rng& rng, const std::string& isa) {
  const int m = below(rng, 12), k = size_near(rng, 64, 300);
  const Kind kind = random_kind(rng);
  const float static_scale = kind.is_static ? 0.01f + 0.1f * std::fabs(uniform(rng)) : 0;
  const int32_t static_zero = kind.is_static ? below(rng, 256) - 128 : 0;
  Matrix x(rng, m, k, floats[below(rng, 3)]);
  const int64_t padded = k + below(rng, 70), group = kind.group ? kind.group : padded;
  const int64_t groups = kind.group ? (padded + group - 1) / group : 1;
  const int64_t parts = kind.bits == 16 && !kind.wide ? 2 : 1, ldc = padded * parts + below(rng, 5);
  const int64_t scales = kind.scale_per_group ? groups : 1;
  Guarded<int8_t> codes(rng, m ? ((m - 1) * ldc + padded * parts) * (kind.wide ? 2 : 1) : 0);
  Guarded<float> scale(rng, m * scales);
  Guarded<int32_t> zero(rng, m), sum(rng, m * groups * parts);
  const quantize_rows::Args args{.x = x.bytes.data(), .ldx = x.ld, .x_type = x.type, .k = k, .k_padded = padded,
                                 .codes = codes.data(), .ldc = ldc, .bits = kind.bits, .wide = kind.wide,
                                 .group = kind.group, .scale_per_group = kind.scale_per_group, .scale = scale.data(),
                                 .zero = kind.symmetric ? nullptr : zero.data(), .sum = sum.data(),
                                 .symmetric = kind.symmetric, .static_scale = static_scale, .static_zero = static_zero};
  quantize_rows::run(args, m, 1 + below(rng, 3));
  const int32_t limit = kind.bits == 16 ? 32639 : 127;
  for (int i = 0; i < m; ++i) {
    const std::vector<float>& values = x.values[static_cast<size_t>(i)];
    const Row whole = quantize(values, kind.symmetric, static_scale, static_zero, limit);
    bool ok = kind.symmetric || zero[i] == whole.zero;
    for (int64_t g = 0; g < groups; ++g) {
      const std::vector<float> part = group_of(values, group, g);
      const int64_t here = std::min(group, padded - g * group), count = static_cast<int64_t>(part.size());
      const Row own = quantize(part, true, 0, 0, limit);
      const float want_scale = kind.scale_per_group ? own.scale : whole.scale;
      ok = ok && same(scale[i * scales + (kind.scale_per_group ? g : 0)], want_scale);
      int32_t sums[2] = {};  // high, low; or all in the first
      for (int64_t j = 0; j < here; ++j) {
        const int64_t at = g * group + j, first = i * ldc + g * group * parts + j;
        const int16_t* const coded = kind.scale_per_group ? own.codes.data() + j : whole.codes.data() + at;
        const int q = j < count ? *coded : 0, high = parts == 2 ? (q + 128) >> 8 : q;
        const int got = kind.wide ? reinterpret_cast<const int16_t*>(codes.data())[first] : codes[first];
        ok = ok && got == high;
        sums[0] += high;
        if (parts == 2) {
          ok = ok && codes[first + here] == q - 256 * high;
          sums[1] += q - 256 * high;
        }
      }
      for (int64_t p = 0; p < parts; ++p) ok = ok && sum[(i * groups + g) * parts + p] == sums[p];
    }
    if (!ok) {
      die(isa + ": quantize_rows: row " + std::to_string(i) + " of " + std::to_string(m) + "x" + std::to_string(k) +
          ", " + std::to_string(kind.bits) + " bits, groups of " + std::to_string(kind.group));
    }
  }
}

}  // namespace halfbyte::truth
