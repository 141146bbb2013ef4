// PackedWeight: a weight reordered for the micro-kernels of one op. A cache: never saved, rebuilt from the
// QuantizedTensor that it came from.
//
//   panels   [panels][k_padded / 4][32 channels][4 k] bytes: 32 output channels form a panel, four consecutive k of a
//            channel lie together because one vpdpbusd lane multiplies four. k is padded to 64 (one AMX tile row),
//            channels to 32, so no kernel has a tail in k and every load of scale and sum is whole.
//   scale    [n_padded] float32;  sum [n_padded] int32, the sum of a channel's codes, for the zero point
#pragma once
#include <cstdint>
#include <memory>

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

 private:
  struct Free {
    int64_t mapped;  // bytes of a mapping of its own; 0: from the heap
    void operator()(uint8_t* p) const;
  };
  std::unique_ptr<uint8_t, Free> data_{nullptr, Free{0}};
  int64_t size_ = 0;
};

class PackedWeight {
 public:
  PackedWeight(const char* op, int64_t n, int64_t k);

  const char* const op;
  const int64_t n, k, n_padded, k_padded;

  void settle() const { buffer_.settle(); }  // the last step of packing
  int64_t panels() const { return n_padded / panel_width; }
  int64_t panel_bytes() const { return panel_width * k_padded; }
  int64_t nbytes() const { return buffer_.size(); }
  uint8_t* panel(int64_t index) const { return buffer_.data() + index * panel_bytes(); }
  float* scale() const { return reinterpret_cast<float*>(panel(panels())); }
  int32_t* sum() const { return reinterpret_cast<int32_t*>(scale() + n_padded); }

 private:
  Buffer buffer_;
};

}  // namespace halfbyte
