// PackedWeight: a weight reordered for the micro-kernels of one op. A cache: never saved, rebuilt from the
// QuantizedTensor that it came from.
//
//   panels   32 output channels form a panel. Its codes lie in lines, one per quad of k: four consecutive k of a channel
//            lie together because one vpdpbusd lane multiplies four.
//              8 bits   [32 channels][4 k] bytes, code + 128
//              4 bits   [16 channels][4 k] bytes, channel c in the low half and c + 16 in the high half
//              float32  [4 k][32 channels]
//            With groups, each group's lines follow its scales, zero points and minima (core/gemm.h, GroupFormat), so
//            that a panel is one stream. k is padded to 64 (one AMX tile row), channels to 32, so no kernel has a tail in
//            k and every load is whole.
//   scale    [n_padded] float32
//            The panels of sparse weights: core/sparse_panel.h.
//   sum      [n_padded], for the zero point of activations: int32 sum of a channel's codes; with groups float32 `total`,
//            the sum of its weights before `scale`
#pragma once
#include <cstdint>
#include <memory>
#include <vector>

#include "core/gemm.h"

namespace halfbyte {

constexpr int64_t round_up(int64_t x, int64_t multiple) { return (x + multiple - 1) / multiple * multiple; }

// Memory aligned to a cache line, or to a huge page (and advised as such) when it is large: reading a weight once per
// token touches every page of it, and with 4 KiB pages the TLB misses.
class Buffer {
 public:
  Buffer() = default;
  explicit Buffer(int64_t bytes);
  uint8_t* data() const { return data_.get(); }
  void settle() const;  // after filling: huge pages that could not be had at first
  int64_t size() const { return size_; }
  static int64_t allocations();  // made so far, by all threads

 private:
  struct Free {
    int64_t mapped;  // bytes of a mapping of its own; 0: from the heap
    void operator()(uint8_t* p) const;
  };
  std::unique_ptr<uint8_t, Free> data_{nullptr, Free{0}};
  int64_t size_ = 0;
};

struct LinearOp;

// What the bytes of a weight mean.
struct WeightFormat {
  const LinearOp* op;
  int64_t n, k;
  int bits;                  // 8 or 4; 32: float32
  bool nf4;                  // 4-bit codes are indices into the NF4 table
  int64_t group;             // k per scale, zero point and minimum; 0: per channel
  int64_t activation_group;  // k per scale of the activations; 0: per token
  GroupFormat groups;        // quads 0: without groups
};

class PackedWeight {
 public:
  explicit PackedWeight(const WeightFormat& format);
  // Of sparse panels: where each begins, and the last one ends; how many values they hold.
  PackedWeight(const WeightFormat& format, std::vector<int64_t> offsets, int64_t stored);

  const WeightFormat format;
  const int64_t n, k, n_padded, k_padded;

  bool grouped() const { return format.groups.quads > 0; }
  int64_t groups() const { return grouped() ? (k_padded / quad + format.groups.quads - 1) / format.groups.quads : 0; }
  int line_bytes() const { return byte_line * format.bits / 8; }
  void settle() const { buffer_.settle(); }  // the last step of packing
  int64_t panels() const { return n_padded / panel_width; }
  int64_t panel_bytes() const { return panel_bytes_; }
  int64_t nbytes() const { return buffer_.size(); }
  const int64_t* offsets() const { return offsets_.data(); }  // of sparse panels
  uint8_t* panel(int64_t index) const {
    return buffer_.data() + (offsets_.empty() ? index * panel_bytes_ : offsets_[static_cast<size_t>(index)]);
  }
  int64_t stored() const { return stored_; }  // values that are multiplied, padding included
  float* scale() const { return reinterpret_cast<float*>(panel(panels())); }
  int32_t* sum() const { return reinterpret_cast<int32_t*>(scale() + n_padded); }
  float* total() const { return scale() + n_padded; }

 private:
  const int64_t panel_bytes_;
  const std::vector<int64_t> offsets_;
  const int64_t stored_;
  Buffer buffer_;
};

}  // namespace halfbyte
