// Packing of floats with zeros anywhere: masks and lists (core/sparse_panel.h).
#include <algorithm>
#include <array>
#include <bit>
#include <numeric>

#include "core/pack_sparse.h"

namespace halfbyte {
namespace {

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

}  // namespace

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

}  // namespace halfbyte
