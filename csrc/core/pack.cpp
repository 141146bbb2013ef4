// Packing of a StoredWeight into panels (layout: core/packed_weight.h), and back.
#include <algorithm>
#include <bit>
#include <cmath>
#include <cstring>

#include "core/check.h"
#include "core/linear.h"
#include "core/share.h"
#include "core/sparse_panel.h"

namespace halfbyte {
namespace {

constexpr int byte_offset = 128, nibble_offset = 8;

int64_t count_groups(const StoredWeight& w) { return w.group ? (w.k + w.group - 1) / w.group : 1; }

void check_weight(const LinearOp& op, const StoredWeight& w) {
  const auto valid = [&](bool ok, const auto&... what) { check(ok, "pack_linear(", op.name, "): ", what...); };
  valid(op.weight_bits <= 8, "takes a float weight: pack_float()");
  valid(op.layout == Layout::dense, "takes a weight with zeros: pack_sparse()");
  valid(w.n >= 0 && w.k >= 0, "negative shape [", w.n, ", ", w.k, "]");
  valid(w.n == 0 || (w.scale && (w.codes || w.k == 0)), "codes or scale have no memory");
  const int64_t row_bytes = op.weight_bits == 8 ? w.k : (w.k + 1) / 2;
  valid(w.n <= 1 || w.ld >= row_bytes, "row stride ", w.ld, " is below the ", row_bytes, " bytes of a row");
  valid(w.group == 0 || w.group == 32 || w.group == 64 || w.group == 128, "group ", w.group, " is none of 32, 64, 128");
  valid(w.activation_group == 0 || w.activation_group == 32 || w.activation_group == 64 || w.activation_group == 128,
        "activation group ", w.activation_group, " is none of 32, 64, 128");
  valid(w.activation_group == 0 || w.group == 0 || w.activation_group == w.group, "activation groups of ",
        w.activation_group, " do not fit weight groups of ", w.group);
  valid(w.activation_group == 0 || op.activation_bits == 8, "16-bit activations have the groups of the weight");
  valid(!w.nf4 || (op.weight_bits == 4 && op.activation_bits == 16 && !w.zero && !w.minimum),
        "NF4 codes belong to 4-bit weights with 16-bit activations, without zero points or minima");
  valid(!w.zero || !w.minimum, "give zero points or minima, not both");
  valid(!w.minimum || w.group, "minima are per group");
  valid(!w.group || w.group_scale || w.n == 0 || w.k == 0, "a weight in groups needs group scales");
  valid(w.group_scale_type == DType::f32 || w.group_scale_type == DType::f16, "group scales must be float32 or float16");
  valid(w.k <= max_k || w.group || w.activation_group || op.activation_bits == 16, "in_features ", w.k, " exceed ", max_k,
        ", the most whose sums fit int32; keep this layer in float, or use groups");
  for (int64_t i = 0; i < w.n; ++i) {
    valid(std::isfinite(w.scale[i]) && w.scale[i] > 0, "the scale of output channel ", i, " is ", w.scale[i],
          "; it must be positive and finite");
  }
}

GroupFormat group_format(const LinearOp& op, const StoredWeight& w) {
  const bool plain = op.weight_bits == 8 && op.activation_bits == 8 && !w.group && !w.activation_group && !w.zero;
  if (plain) return {};
  int64_t k = w.group ? w.group : w.activation_group;
  if (!k) k = op.activation_bits == 16 ? wide_group : std::max<int64_t>(round_up(w.k, k_multiple), k_multiple);
  const int bytes = w.group_scale_type == DType::f32 ? 128 : 64;
  // Minima of high nibbles are stored times 16, and float16 ends at 65504.
  bool large = false;
  const int64_t count = w.minimum ? w.n * count_groups(w) : 0;
  for (int64_t i = 0; i < count && !large; ++i) {
    large = !(std::fabs(load_float(w.minimum, w.group_scale_type, i)) <= 65504 / high_nibble);
  }
  return {.quads = k / quad, .scale_bytes = w.group ? bytes : 0, .zero_bytes = w.zero ? 64 : 0,
          .minimum_bytes = w.minimum ? (large ? 128 : bytes) : 0};
}

// A float whose bits are a float16 that times a power of two stays one.
void store_float(uint8_t* p, int bytes, int channel, float value) {
  if (bytes == 128) {
    std::memcpy(p + channel * 4, &value, 4);
    return;
  }
  uint16_t h = std::signbit(value) ? 0x8000 : 0;
  const float magnitude = std::fabs(value);
  if (magnitude >= 0x1p-14f) {
    int exponent;
    const float fraction = std::frexp(magnitude, &exponent);  // [0.5, 1)
    h = static_cast<uint16_t>(h | ((exponent + 14) << 10) | (static_cast<int>(std::ldexp(fraction, 11)) - 1024));
  } else {
    h = static_cast<uint16_t>(h | static_cast<int>(std::ldexp(magnitude, 24)));
  }
  std::memcpy(p + channel * 2, &h, 2);
}

// Packs one channel.
struct Channel {
  const PackedWeight& packed;
  const StoredWeight& w;
  const int64_t j;  // may be a padding channel

  const int64_t lane = j % panel_width;
  const bool real = j < w.n, nibbles = packed.format.bits == 4, high = nibbles && lane >= half_panel;
  uint8_t* const panel = packed.panel(j / panel_width);
  const uint8_t* const row = real ? static_cast<const uint8_t*>(w.codes) + j * w.ld : nullptr;

  int code(int64_t i) const {  // int8, or nibble
    return nibbles ? row[i / 2] >> (i % 2 * 4) & 15 : static_cast<int8_t>(row[i]);
  }

  // Codes first .. first+4*quads-1 into lines; the sum of what they stand for, padding (`blank`) left out.
  int64_t lines(uint8_t* line, int64_t first, int64_t quads, int blank) const {
    int64_t sum = 0;
    const int64_t end = real ? w.k : 0;
    if (!nibbles) {
      uint8_t* out = line + lane * quad;
      int64_t i = first;
      const int64_t whole = std::min(first + quads * quad, end / quad * quad);
      for (; i < whole; i += quad, out += byte_line) {
        uint32_t word;
        std::memcpy(&word, row + i, quad);
        word ^= 0x80808080u;
        std::memcpy(out, &word, quad);
        for (int l = 0; l < quad; ++l) sum += static_cast<int8_t>(row[i + l]);
      }
      for (; i < first + quads * quad; ++i) {
        const int c = i < end ? code(i) : blank;
        out[(i - first) % quad] = static_cast<uint8_t>(c + byte_offset);
        if (i < end) sum += c;
        if (i % quad == quad - 1) out += byte_line;
      }
      return sum;
    }
    uint8_t* out = line + lane % half_panel * quad;
    for (int64_t i = first; i < first + quads * quad; ++i) {
      const int u = i < end ? code(i) : blank;
      uint8_t& byte = out[i % quad];
      byte = static_cast<uint8_t>(high ? byte | u << 4 : u);  // the low channel comes first
      if (i < end) sum += w.nf4 ? nf4_levels[u] : u;
      if (i % quad == quad - 1) out += byte_line / 2;
    }
    return sum;
  }

  void pack() const {
    float* const scale = packed.scale() + j;
    *scale = real ? w.scale[j] : 0.0f;
    if (!packed.grouped()) {
      packed.sum()[j] = static_cast<int32_t>(lines(panel, 0, packed.k_padded / quad, 0));
      return;
    }
    const float factor = high && !w.nf4 ? high_nibble : 1.0f;
    *scale /= factor;
    const GroupFormat& format = packed.format.groups;
    const int64_t stored = count_groups(w), group = format.quads * quad;
    uint8_t* p = panel;
    double total = 0;
    for (int64_t first = 0, g = 0; first < packed.k_padded; first += group, ++g) {
      // A group of padding alone, where k_padded reaches beyond the last stored group.
      const bool filled = real && first < std::max<int64_t>(w.k, 1);
      const int64_t at = j * stored + (w.group ? g : 0);
      const float s = !filled ? 0.0f : w.group ? load_float(w.group_scale, w.group_scale_type, at) : 1.0f;
      const int zero = filled && w.zero ? w.zero[at] : 0;
      const float minimum = filled && w.minimum ? load_float(w.minimum, w.group_scale_type, at) : 0.0f;
      if (format.scale_bytes) store_float(p, format.scale_bytes, lane, s);
      p += format.scale_bytes;
      if (format.zero_bytes) {
        const auto z = static_cast<int16_t>(nibbles ? zero * static_cast<int>(factor) : zero + byte_offset);
        std::memcpy(p + lane * 2, &z, 2);
      }
      p += format.zero_bytes;
      if (format.minimum_bytes) store_float(p, format.minimum_bytes, lane, minimum * factor);
      p += format.minimum_bytes;
      const int64_t quads = std::min(format.quads, (packed.k_padded - first) / quad);
      const int64_t count = std::clamp<int64_t>(w.k - first, 0, quads * quad);
      const int64_t sum = lines(p, first, quads, 0);
      p += quads * packed.line_bytes();
      const int offset = nibbles && !w.nf4 && !w.minimum && !w.zero ? nibble_offset : zero;
      total += static_cast<double>(sum - count * offset) * s + static_cast<double>(count) * minimum;
    }
    packed.total()[j] = static_cast<float>(total) * factor;
  }
};

}  // namespace

float load_float(const void* p, DType type, int64_t i) {
  if (type == DType::f32) return static_cast<const float*>(p)[i];
  const uint16_t h = static_cast<const uint16_t*>(p)[i];
  if (type == DType::bf16) return std::bit_cast<float>(uint32_t{h} << 16);
  const float magnitude = std::ldexp(static_cast<float>(h & 0x3ff) + ((h >> 10 & 31) ? 1024.0f : 0.0f),
                                     std::max(h >> 10 & 31, 1) - 25);
  const float value = (h >> 10 & 31) == 31 ? ((h & 0x3ff) ? NAN : INFINITY) : magnitude;
  return h & 0x8000 ? -value : value;
}

PackedWeight pack_linear(const LinearOp& op, const StoredWeight& w, int threads) {
  check_weight(op, w);
  PackedWeight packed({.op = &op, .n = w.n, .k = w.k, .bits = op.weight_bits, .nf4 = w.nf4, .group = w.group,
                       .activation_group = op.activation_bits == 16 ? (w.group ? w.group : wide_group) : w.activation_group,
                       .groups = group_format(op, w)});
  const int wanted = threads > 0 ? threads : default_threads();
  const int64_t useful = 1 + w.n * w.k / (256 * 1024);
  parallel(static_cast<int>(std::min<int64_t>({wanted, useful, std::max<int64_t>(1, packed.panels())})), [&](Team& team) {
    const int64_t begin = packed.panels() * team.rank / team.size * panel_width;
    const int64_t end = packed.panels() * (team.rank + 1) / team.size * panel_width;
    for (int64_t j = begin; j < end; ++j) Channel{packed, w, j}.pack();
  });
  packed.settle();
  return packed;
}

// One group of all k: its sums are floats, which the epilogue takes as they are.
PackedWeight pack_float(const void* weight, DType type, int64_t n, int64_t k, int64_t ld, int threads) {
  check(n >= 0 && k >= 0, "pack_float: negative shape [", n, ", ", k, "]");
  check(n == 0 || k == 0 || weight, "pack_float: the weight has no memory");
  check(n <= 1 || ld >= k, "pack_float: row stride ", ld, " is below the ", k, " elements of a row");
  check(type != DType::i32, "pack_float: the weight must be float32, bfloat16 or float16");
  const int64_t quads = std::max(round_up(k, k_multiple), int64_t{k_multiple}) / quad;
  PackedWeight packed({.op = &linear_op("linear_f32"), .n = n, .k = k, .bits = 32, .nf4 = false, .group = 0,
                       .activation_group = quads * quad,
                       .groups = {.quads = quads, .scale_bytes = 0, .zero_bytes = 0, .minimum_bytes = 0}});
  parallel(threads > 0 ? threads : default_threads(), [&](Team& team) {
    const Piece mine = piece(packed.panels(), team);
    for (int64_t j = mine.begin * panel_width; j < mine.end * panel_width; ++j) {
      packed.scale()[j] = 1;
      packed.total()[j] = 0;
      float* out = reinterpret_cast<float*>(packed.panel(j / panel_width)) + j % panel_width;
      for (int64_t i = 0; i < packed.k_padded; ++i, out += panel_width) {
        *out = j < n && i < k ? load_float(weight, type, j * ld + i) : 0.0f;
      }
    }
  });
  packed.settle();
  return packed;
}

void unpack_linear(const PackedWeight& packed, void* codes, int64_t ld) {
  check(packed.format.bits <= 8 && packed.format.op->layout == Layout::dense, "unpack_linear: ", packed.format.op->name,
        " has no dense codes");
  const bool nibbles = packed.format.bits == 4;
  const GroupFormat& groups = packed.format.groups;
  const int64_t per_group = packed.grouped() ? groups.quads : packed.k_padded / quad;
  for (int64_t j = 0; j < packed.n; ++j) {
    const int64_t lane = j % panel_width;
    uint8_t* const row = static_cast<uint8_t*>(codes) + j * ld;
    for (int64_t i = 0; i < packed.k; ++i) {
      const int64_t headers = packed.grouped() ? (i / quad / per_group + 1) * groups.bytes() : 0;
      const uint8_t* const line = packed.panel(j / panel_width) + headers + i / quad * packed.line_bytes();
      if (!nibbles) {
        row[i] = static_cast<uint8_t>(line[lane * quad + i % quad] - byte_offset);
        continue;
      }
      const int u = line[lane % half_panel * quad + i % quad] >> (lane >= half_panel ? 4 : 0) & 15;
      row[i / 2] = static_cast<uint8_t>(i % 2 ? row[i / 2] | u << 4 : u);
    }
  }
}

}  // namespace halfbyte
