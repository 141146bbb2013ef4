// Packing of weights with zeros into the panels of core/sparse_panel.h.
#include <algorithm>
#include <bit>
#include <cmath>
#include <cstring>
#include <string_view>
#include <vector>

#include "core/check.h"
#include "core/pack_sparse.h"
#include "core/share.h"

namespace halfbyte {
namespace {

// Blocks of 16 channels x `wide` k. T: as they are stored.
template <class T, int wide, class Index, class Get>
int64_t pack_blocks(const Get& value, int64_t first, int64_t k, Bytes& out, T (*store)(float)) {
  BlockPanel panel{};
  out.append(&panel, sizeof panel);
  int64_t stored = 0;
  for (int half = 0; half < 2; ++half) {
    std::vector<Index> index;
    std::vector<T> lines;
    for (int64_t i = 0; i < k; i += wide) {
      T line[half_panel * wide];
      bool any = false;
      for (int c = 0; c < half_panel; ++c) {
        for (int l = 0; l < wide; ++l) {
          const auto v = value(first + half * half_panel + c, i + l);
          any |= v != 0;
          line[c * wide + l] = store(static_cast<float>(v));
        }
      }
      if (!any) continue;
      index.push_back(static_cast<Index>(i / wide));
      lines.insert(lines.end(), line, line + half_panel * wide);
    }
    panel.count[half] = static_cast<int64_t>(index.size());
    stored += static_cast<int64_t>(lines.size());
    panel.index[half] = out.append(index);
    panel.lines[half] = out.append(lines);
  }
  out.replace(0, panel);
  return stored;
}

int64_t pack_nibbles(const Values<int8_t>& value, int64_t first, int64_t k_padded, Bytes& out) {
  NibblePanel panel{};
  out.append(&panel, sizeof panel);
  const SparseWeight& w = value.w;
  const int64_t stored_groups = ceil_div(w.k, w.group);
  const bool wide = w.group_scale_type == DType::f32;
  int64_t blocks = 0;
  for (int half = 0; half < 2; ++half) {
    const int64_t j = first + half * half_panel;
    std::vector<uint8_t> pairs, index, lines, scales;
    for (int64_t g = 0; g * w.group < k_padded; ++g) {
      int count = 0;
      for (int64_t i = g * w.group; i < std::min((g + 1) * w.group, w.k); i += quad) {
        int8_t codes[half_panel * quad];
        for (int b = 0; b < half_panel * quad; ++b) codes[b] = value(j + b / quad, i + b % quad);
        if (std::all_of(codes, codes + half_panel * quad, [](int8_t c) { return c == 0; })) continue;
        const bool second = count++ % 2;
        const auto at = static_cast<uint8_t>((i - g * w.group) / quad);
        if (second) {
          index.back() = at;
        } else {
          index.insert(index.end(), 2, at);
          lines.resize(lines.size() + half_panel * quad);
        }
        uint8_t* const line = lines.data() + lines.size() - half_panel * quad;
        for (int b = 0; b < half_panel * quad; ++b) line[b] = static_cast<uint8_t>(line[b] | (codes[b] & 15) << (second ? 4 : 0));
      }
      blocks += count;
      pairs.push_back(static_cast<uint8_t>((count + 1) / 2));
      for (int64_t c = j; c < j + half_panel; ++c) {
        uint8_t bytes[4] = {};
        const size_t size = wide ? 4 : 2;
        if (c < w.n && g < stored_groups) {
          std::memcpy(bytes, static_cast<const uint8_t*>(w.group_scale) + static_cast<size_t>(c * stored_groups + g) * size, size);
        }
        scales.insert(scales.end(), bytes, bytes + size);
      }
    }
    panel.pairs[half] = out.append(pairs);
    panel.index[half] = out.append(index);
    panel.lines[half] = out.append(lines);
    panel.scales[half] = out.append(scales);
  }
  out.replace(0, panel);
  return blocks * half_panel * quad;
}

struct Place {
  int k;  // within the window
  int8_t value;
};

// The nonzero values of a channel within a window; of N:M patterns N for each group, with zeros for those that are missing.
std::vector<Place> places(const Values<int8_t>& value, int64_t j, int64_t first, int nonzero, int of) {
  std::vector<Place> found;
  const auto fill = [&](int end) {  // the groups that end at `end`
    if (of && end % of == 0) found.resize(static_cast<size_t>(end / of * nonzero), {end - of, 0});
  };
  for (int i = 0; i < window; ++i) {
    if (i > 0) fill(i);
    if (const int8_t v = value(j, first + i)) found.push_back({i, v});
  }
  fill(window);
  return found;
}

int64_t pack_windows(const Values<int8_t>& value, int64_t first, int64_t k_padded, int nonzero, int of, Bytes& out) {
  WindowPanel panel{};
  panel.windows = k_padded / window;
  panel.bits = of == 4 ? 2 : of == 8 ? 4 : 8;
  panel.per_window = of ? window / of * nonzero / quad : 0;
  out.append(&panel, sizeof panel);
  int64_t stored = 0;
  constexpr int line = half_panel * quad;
  for (int half = 0; half < 2; ++half) {
    std::vector<uint8_t> counts, index;
    std::vector<int8_t> lines;
    for (int64_t i = 0; i < k_padded; i += window) {
      std::vector<Place> at[half_panel];
      size_t most = 0;
      for (int c = 0; c < half_panel; ++c) {
        at[c] = places(value, first + half * half_panel + c, i, nonzero, of);
        most = std::max(most, at[c].size());
      }
      const size_t count = of ? static_cast<size_t>(panel.per_window) : (most + quad - 1) / quad;
      const size_t per_index_line = static_cast<size_t>(8 / panel.bits);
      const size_t from = lines.size(), index_from = index.size();
      counts.push_back(static_cast<uint8_t>(count));
      lines.resize(from + count * line);
      index.resize(index_from + (count + per_index_line - 1) / per_index_line * line);
      for (int c = 0; c < half_panel; ++c) {
        for (size_t s = 0; s < at[c].size(); ++s) {
          const size_t v = s / quad, b = static_cast<size_t>(c * quad) + s % quad;
          lines[from + v * line + b] = at[c][s].value;
          const size_t bits = static_cast<size_t>(panel.bits), bit = v % per_index_line * 8 * bits + b % 8 * bits;
          uint8_t& byte = index[index_from + v / per_index_line * line + b / 8 * 8 + bit / 8];
          byte = static_cast<uint8_t>(byte | (of ? at[c][s].k % of : at[c][s].k) << bit % 8);
        }
      }
    }
    panel.counts[half] = out.append(counts);
    panel.index[half] = out.append(index);
    panel.lines[half] = out.append(lines);
    stored += static_cast<int64_t>(lines.size());
  }
  out.replace(0, panel);
  return stored;
}

template <class Valid>
void check_nibbles(const SparseWeight& w, const Valid& valid) {
  const Values<int8_t> code{w};
  for (int64_t j = 0; j < w.n; ++j) {
    for (int64_t i = 0; i < w.k; ++i) {
      const int c = code(j, i);
      valid(c >= -8 && c <= 7, "the code of output channel ", j, ", input feature ", i, " is ", c, "; it must be -8 to 7");
    }
    for (int64_t g = 0, groups = ceil_div(w.k, w.group); g < groups; ++g) {
      const float s = load_float(w.group_scale, w.group_scale_type, j * groups + g);
      valid(std::isfinite(s) && s > 0, "the scale of output channel ", j, ", group ", g, ", is ", s, "; it must be positive and",
            " finite");
    }
  }
}

void check_weight(const LinearOp& op, const SparseWeight& w) {
  const auto valid = [&](bool ok, const auto&... what) { check(ok, "pack_sparse(", op.name, "): ", what...); };
  valid(op.layout != Layout::dense, "packs weights without zeros: pack_linear() or pack_float()");
  valid(w.n >= 0 && w.k >= 0, "negative shape [", w.n, ", ", w.k, "]");
  valid(w.n == 0 || w.k == 0 || w.weight, "the weight has no memory");
  valid(w.n <= 1 || w.ld >= w.k, "row stride ", w.ld, " is below the ", w.k, " elements of a row");
  const bool codes = op.activation_bits == 8, windows = op.layout == Layout::windows;
  valid(codes || w.type != DType::i32, "the weight must be float32, bfloat16 or float16");
  valid(!codes || w.n == 0 || w.scale, "codes need scales");
  const bool nibbles = op.weight_bits == 4;
  valid(!codes || nibbles || w.k <= max_k, "in_features ", w.k, " exceed ", max_k, ", the most whose sums fit int32");
  valid(w.k < int64_t{1} << 31, "in_features ", w.k, " are more than 2^31");
  for (int64_t j = 0; codes && j < w.n; ++j) {
    valid(std::isfinite(w.scale[j]) && w.scale[j] > 0, "the scale of output channel ", j, " is ", w.scale[j],
          "; it must be positive and finite");
  }
  if (nibbles) {
    valid(w.group == 32 || w.group == 64 || w.group == 128, "group ", w.group, " is none of 32, 64, 128");
    valid(w.n == 0 || w.k == 0 || w.group_scale, "a weight in groups needs group scales");
    valid(w.group_scale_type != DType::i32 && w.group_scale_type != DType::bf16, "group scales must be float32 or float16");
    check_nibbles(w, valid);
  } else {
    valid(w.group == 0, "takes no groups");
  }
  if (w.of == 0) {
    valid(w.nonzero == 0, "a pattern N:M has an M");
    valid(op.name != std::string_view("spmm_nm_w8a8"), "needs the pattern N:M");
    return;
  }
  valid(windows && ((w.of == 4 && (w.nonzero == 1 || w.nonzero == 2)) || (w.of == 8 && w.nonzero == 4)), "no kernel for the pattern ",
        w.nonzero, ":", w.of);
  const Values<int8_t> value{w};
  for (int64_t j = 0; j < w.n; ++j) {
    for (int64_t i = 0; i < w.k; i += w.of) {
      int count = 0;
      for (int l = 0; l < w.of; ++l) count += value(j, i + l) != 0;
      valid(count <= w.nonzero, "output channel ", j, " has ", count, " nonzero weights among the ", w.of, " from input feature ", i,
            "; the pattern ", w.nonzero, ":", w.of, " allows ", w.nonzero);
    }
  }
}

int64_t pack_panel(const LinearOp& op, const SparseWeight& w, int64_t first, int64_t k_padded, Bytes& out) {
  const Values<int8_t> code{w};
  const Values<float> number{w};
  switch (op.layout) {
    case Layout::windows: return pack_windows(code, first, k_padded, w.nonzero, w.of, out);
    case Layout::masks: return pack_floats(number, first, k_padded, op.kernels.size() > 1, out);
    default: break;
  }
  if (op.weight_bits == 4) return pack_nibbles(code, first, k_padded, out);
  if (op.activation_bits == 8) {
    return pack_blocks<int8_t, quad, uint16_t>(code, first, w.k, out, [](float c) { return static_cast<int8_t>(c); });
  }
  if (op.weight_bits == 32) return pack_blocks<float, 1, uint32_t>(number, first, w.k, out, [](float v) { return v; });
  return pack_blocks<uint16_t, 1, uint32_t>(number, first, w.k, out, [](float v) {
    const uint32_t u = std::bit_cast<uint32_t>(v);  // to the nearest bfloat16, half to even; NaN stays NaN
    if ((u & 0x7fffffff) > 0x7f800000) return static_cast<uint16_t>(u >> 16 | 0x40);
    return static_cast<uint16_t>((u + 0x7fff + (u >> 16 & 1)) >> 16);
  });
}

int32_t sum_of(const SparseWeight& w, int64_t j) {
  const Values<int8_t> code{w};
  int32_t sum = 0;
  for (int64_t i = 0; i < w.k; ++i) sum += code(j, i);
  return sum;
}

// The sum of a channel's weights before their scale, as pack_linear has it.
float total_of(const SparseWeight& w, int64_t j) {
  const Values<int8_t> code{w};
  const int64_t groups = ceil_div(w.k, w.group);
  double total = 0;
  for (int64_t g = 0; g < groups; ++g) {
    int64_t sum = 0;
    for (int64_t i = g * w.group; i < std::min((g + 1) * w.group, w.k); ++i) sum += code(j, i);
    total += static_cast<double>(sum) * load_float(w.group_scale, w.group_scale_type, j * groups + g);
  }
  return static_cast<float>(total);
}

}  // namespace

PackedWeight pack_sparse(const LinearOp& op, const SparseWeight& w, int threads) {
  check_weight(op, w);
  const int64_t count = round_up(w.n, panel_width) / panel_width, k_padded = round_up(w.k, k_multiple);
  std::vector<Bytes> panels(static_cast<size_t>(count));
  std::vector<int64_t> stored(static_cast<size_t>(count)), offsets{0};
  const int64_t wanted = threads > 0 ? threads : default_threads();
  const int used = static_cast<int>(std::min(wanted, std::max<int64_t>(1, count)));
  parallel(used, [&](Team& team) {
    const Piece mine = piece(count, team);
    for (int64_t p = mine.begin; p < mine.end; ++p) {
      const auto at = static_cast<size_t>(p);
      stored[at] = pack_panel(op, w, p * panel_width, k_padded, panels[at]);
    }
  });
  int64_t total = 0;
  for (size_t p = 0; p < panels.size(); ++p) {
    offsets.push_back(offsets.back() + panels[p].size());
    total += stored[p];
  }
  const bool codes = op.activation_bits == 8;
  WeightFormat format{.op = &op, .n = w.n, .k = w.k, .bits = op.weight_bits, .nf4 = false, .group = w.group, .activation_group = 0,
                      .groups = {}};
  if (w.group) {
    format.groups = {.quads = w.group / quad, .scale_bytes = w.group_scale_type == DType::f32 ? 128 : 64, .zero_bytes = 0,
                     .minimum_bytes = 0};
  } else if (!codes) {  // one group of all k, as pack_float makes it
    format.groups.quads = std::max(k_padded, int64_t{k_multiple}) / quad;
    format.activation_group = format.groups.quads * quad;
  }
  PackedWeight packed(format, std::move(offsets), total);
  parallel(used, [&](Team& team) {
    const Piece mine = piece(count, team);
    for (int64_t p = mine.begin; p < mine.end; ++p) {
      const Bytes& panel = panels[static_cast<size_t>(p)];
      std::memcpy(packed.panel(p), panel.data(), static_cast<size_t>(panel.used()));
      for (int64_t j = p * panel_width; j < (p + 1) * panel_width; ++j) {
        packed.scale()[j] = codes ? (j < w.n ? w.scale[j] : 0.0f) : 1.0f;
        if (w.group) {
          packed.scale()[j] /= high_nibble;
          packed.total()[j] = j < w.n ? high_nibble * total_of(w, j) : 0.0f;
        } else {
          packed.sum()[j] = codes && j < w.n ? sum_of(w, j) : 0;  // 0.0f of floats, too
        }
      }
    }
  });
  packed.settle();
  return packed;
}

}  // namespace halfbyte
