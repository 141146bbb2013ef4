// Packing of int8 codes into panels of 32 channels x quads of k (layout: core/packed_weight.h), as codes + 128.
#include <algorithm>
#include <cmath>
#include <cstring>

#include "core/check.h"
#include "core/parallel.h"
#include "ops/linear_w8a8/op.h"

namespace halfbyte::linear_w8a8 {
namespace {

constexpr uint8_t zero_code = 128;

// Quads whole in k go by 4-byte words; a channel's row is read once, front to back.
void pack_channel(const int8_t* row, int64_t k, int64_t k_padded, uint8_t* out, int32_t& sum) {
  constexpr int64_t line = panel_width * quad;
  int64_t total = 0, i = 0;
  for (; i + quad <= k; i += quad) {
    uint32_t word;
    std::memcpy(&word, row + i, quad);
    word ^= 0x80808080u;
    std::memcpy(out + i / quad * line, &word, quad);
    total += row[i] + row[i + 1] + row[i + 2] + row[i + 3];
  }
  for (; i < k_padded; ++i) {
    const int8_t code = i < k ? row[i] : int8_t{0};
    out[i / quad * line + i % quad] = static_cast<uint8_t>(code + zero_code);
    total += code;
  }
  sum = static_cast<int32_t>(total);
}

}  // namespace

PackedWeight pack(const int8_t* codes, int64_t n, int64_t k, int64_t ld, const float* scale, int threads) {
  check(n >= 0 && k >= 0, "pack_linear_w8a8: negative shape [", n, ", ", k, "]");
  check(k <= max_k, "pack_linear_w8a8: in_features ", k, " exceed ", max_k,
        ", the most whose sums fit int32; keep this layer in float");
  check(n == 0 || (scale && (codes || k == 0)), "pack_linear_w8a8: codes or scale have no memory");
  check(n <= 1 || ld >= k, "pack_linear_w8a8: row stride ", ld, " is below in_features ", k);
  for (int64_t i = 0; i < n; ++i) {
    check(std::isfinite(scale[i]) && scale[i] > 0, "pack_linear_w8a8: the scale of output channel ", i, " is ",
          scale[i], "; it must be positive and finite");
  }
  PackedWeight packed("linear_w8a8", n, k);
  const int wanted = threads > 0 ? threads : default_threads();
  const int64_t useful = 1 + n * k / (256 * 1024);
  parallel(static_cast<int>(std::min<int64_t>({wanted, useful, std::max<int64_t>(1, packed.panels())})), [&](Team& team) {
    const int64_t begin = packed.panels() * team.rank / team.size * panel_width;
    const int64_t end = packed.panels() * (team.rank + 1) / team.size * panel_width;
    for (int64_t j = begin; j < end; ++j) {
      uint8_t* out = packed.panel(j / panel_width) + j % panel_width * quad;
      const bool real = j < n;
      pack_channel(real ? codes + j * ld : nullptr, real ? k : 0, packed.k_padded, out, packed.sum()[j]);
      packed.scale()[j] = real ? scale[j] : 0.0f;
    }
  });
  packed.settle();
  return packed;
}

void unpack(const PackedWeight& packed, int8_t* codes, int64_t ld) {
  for (int64_t j = 0; j < packed.n; ++j) {
    const uint8_t* in = packed.panel(j / panel_width) + j % panel_width * quad;
    for (int64_t i = 0; i < packed.k; ++i) {
      codes[j * ld + i] = static_cast<int8_t>(in[i / quad * panel_width * quad + i % quad] - zero_code);
    }
  }
}

}  // namespace halfbyte::linear_w8a8
