// Packing of weights with zeros into the panels of core/sparse_panel.h.
#include <algorithm>
#include <array>
#include <bit>
#include <cmath>
#include <cstring>
#include <numeric>
#include <string_view>
#include <vector>

#include "core/check.h"
#include "core/linear.h"
#include "core/share.h"
#include "core/sparse_panel.h"

namespace halfbyte {
namespace {

// A panel under construction.
class Bytes {
 public:
  int64_t append(const void* data, size_t size) {  // where it is
    const size_t at = (bytes_.size() + 63) / 64 * 64;
    bytes_.resize(at + size);
    if (size) std::memcpy(bytes_.data() + at, data, size);
    return static_cast<int64_t>(at);
  }
  template <class T>
  int64_t append(const std::vector<T>& values) { return append(values.data(), values.size() * sizeof(T)); }
  template <class T>
  void replace(int64_t at, const T& value) { std::memcpy(bytes_.data() + at, &value, sizeof value); }
  const uint8_t* data() const { return bytes_.data(); }
  int64_t size() const { return round_up(static_cast<int64_t>(bytes_.size()), 64); }
  int64_t used() const { return static_cast<int64_t>(bytes_.size()); }

 private:
  std::vector<uint8_t> bytes_;
};

// The values of a weight, 0 beyond its edges.
template <class T>
struct Values {
  const SparseWeight& w;
  T operator()(int64_t j, int64_t i) const {
    if (j >= w.n || i >= w.k) return 0;
    if constexpr (sizeof(T) == 1) {
      return static_cast<const T*>(w.weight)[j * w.ld + i];
    } else {
      return load_float(w.weight, w.type, j * w.ld + i);
    }
  }
};

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

using Masks = std::vector<uint64_t>;  // of a panel, [k / 64][32]

Masks masks_of(const Values<float>& value, int64_t first, int64_t k_padded) {
  Masks masks(static_cast<size_t>(k_padded / window * panel_width));
  for (int c = 0; c < panel_width; ++c) {
    for (int64_t i = 0; i < k_padded; ++i) {
      masks[static_cast<size_t>(i / window * panel_width + c)] |= uint64_t{value(first + c, i) != 0} << i % window;
    }
  }
  return masks;
}

// Fills in all but lists.
void pack_masks(const Values<float>& value, int64_t first, const Masks& of_k, MaskPanel& panel, Bytes& out) {
  Masks masks;
  std::vector<uint8_t> order;
  std::vector<float> values;
  for (size_t i = 0; i < of_k.size(); i += panel_width) {
    const uint64_t* const here = of_k.data() + i;
    uint8_t channels[panel_width];
    std::iota(channels, channels + panel_width, uint8_t{0});
    std::stable_sort(channels, channels + panel_width,
                     [&](int a, int b) { return std::popcount(here[a]) < std::popcount(here[b]); });
    for (const uint8_t c : channels) {
      masks.push_back(here[c]);
      order.push_back(c);
      const auto k = static_cast<int64_t>(i) / panel_width * window;
      for (uint64_t left = here[c]; left; left &= left - 1) values.push_back(value(first + c, k + std::countr_zero(left)));
    }
  }
  values.resize(values.size() + half_panel);  // kernels load whole vectors
  panel.masks = out.append(masks);
  panel.order = out.append(order);
  panel.values = out.append(values);
}

int64_t pack_lists(const Values<float>& value, int64_t first, const Masks& of_k, Bytes& out) {
  ListPanel panel{};
  const int64_t at = out.append(&panel, sizeof panel);
  for (int half = 0; half < 2; ++half) {
    std::vector<uint8_t> lines, index;
    std::vector<uint16_t> window_of, line_masks;
    std::vector<float> values;
    for (size_t i = 0; i < of_k.size(); i += panel_width) {
      std::array<uint64_t, half_panel> left;
      std::copy_n(of_k.data() + i + half * half_panel, half_panel, left.begin());
      int most = 0;
      for (const uint64_t mask : left) most = std::max(most, std::popcount(mask));
      lines.push_back(static_cast<uint8_t>(most));
      window_of.insert(window_of.end(), static_cast<size_t>(most + 1) / 2, static_cast<uint16_t>(i / panel_width));
      for (int line = 0; line < (most + 1) / 2 * 2; ++line) {
        uint16_t mask = 0;
        for (size_t c = 0; c < half_panel; left[c] &= left[c] - 1, ++c) {
          const int k = std::countr_zero(left[c]);
          index.push_back(static_cast<uint8_t>(k % window));
          if (!left[c]) continue;
          mask = static_cast<uint16_t>(mask | 1 << c);
          values.push_back(value(first + half * half_panel + static_cast<int>(c), window_of.back() * window + k));
        }
        line_masks.push_back(mask);
      }
    }
    values.resize(values.size() + half_panel);
    panel.pairs[half] = static_cast<int64_t>(window_of.size());
    panel.lines[half] = out.append(lines);
    panel.places[half] = out.append(window_of);
    panel.masks[half] = out.append(line_masks);
    panel.index[half] = out.append(index);
    panel.values[half] = out.append(values);
  }
  out.replace(at, panel);
  return at;
}

// Lists cost as many bytes again. They pay for few rows with up to 35 % of the values, unless a channel with many makes lines of
// which three quarters are empty.
bool worth_lists(const Masks& masks, int64_t stored, int64_t all) {
  int64_t places = 0;
  for (size_t i = 0; i < masks.size(); i += half_panel) {
    int most = 0;
    for (size_t c = 0; c < half_panel; ++c) most = std::max(most, std::popcount(masks[i + c]));
    places += int64_t{most} * half_panel;
  }
  return 20 * stored <= 7 * all && places <= 4 * stored && masks.size() / panel_width <= UINT16_MAX;
}

// vectors: there are kernels that read lists.
int64_t pack_floats(const Values<float>& value, int64_t first, int64_t k_padded, bool vectors, Bytes& out) {
  MaskPanel panel{};
  out.append(&panel, sizeof panel);
  const Masks masks = masks_of(value, first, k_padded);
  int64_t stored = 0;
  for (const uint64_t mask : masks) stored += std::popcount(mask);
  pack_masks(value, first, masks, panel, out);
  const int64_t all = std::min<int64_t>(panel_width, value.w.n - first) * value.w.k;
  if (vectors && worth_lists(masks, stored, all)) panel.lists = pack_lists(value, first, masks, out);
  out.replace(0, panel);
  return stored;
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
  valid(!codes || w.k <= max_k, "in_features ", w.k, " exceed ", max_k, ", the most whose sums fit int32");
  valid(w.k < int64_t{1} << 31, "in_features ", w.k, " are more than 2^31");
  for (int64_t j = 0; codes && j < w.n; ++j) {
    valid(std::isfinite(w.scale[j]) && w.scale[j] > 0, "the scale of output channel ", j, " is ", w.scale[j],
          "; it must be positive and finite");
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

}  // namespace

PackedWeight pack_sparse(const LinearOp& op, const SparseWeight& w, int threads) {
  check_weight(op, w);
  const int64_t count = round_up(w.n, panel_width) / panel_width, k_padded = round_up(w.k, k_multiple);
  std::vector<Bytes> panels(static_cast<size_t>(count));
  std::vector<int64_t> stored(static_cast<size_t>(count)), offsets{0};
  const int wanted = threads > 0 ? threads : default_threads();
  parallel(static_cast<int>(std::min<int64_t>(wanted, std::max<int64_t>(1, count))), [&](Team& team) {
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
  WeightFormat format{.op = &op, .n = w.n, .k = w.k, .bits = op.weight_bits, .nf4 = false, .group = 0, .activation_group = 0, .groups = {}};
  if (!codes) {  // one group of all k, as pack_float makes it
    format.groups.quads = std::max(k_padded, int64_t{k_multiple}) / quad;
    format.activation_group = format.groups.quads * quad;
  }
  PackedWeight packed(format, std::move(offsets), total);
  const Values<int8_t> code{w};
  for (size_t p = 0; p < panels.size(); ++p) {
    std::memcpy(packed.panel(static_cast<int64_t>(p)), panels[p].data(), static_cast<size_t>(panels[p].used()));
  }
  for (int64_t j = 0; j < packed.n_padded; ++j) {
    packed.scale()[j] = codes ? (j < w.n ? w.scale[j] : 0.0f) : 1.0f;
    int32_t sum = 0;
    for (int64_t i = 0; codes && j < w.n && i < w.k; ++i) sum += code(j, i);
    packed.sum()[j] = sum;  // 0.0f of floats, too
  }
  packed.settle();
  return packed;
}

}  // namespace halfbyte
