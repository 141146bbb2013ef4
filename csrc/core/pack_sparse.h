// What the packing of sparse panels (core/sparse_panel.h) is written with.
#pragma once
#include <cstring>
#include <vector>

#include "core/linear.h"
#include "core/sparse_panel.h"

namespace halfbyte {

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

// A panel of masks and, where lists pay and `vectors` says that there are kernels that read them, of lists too. Returns how many
// values are stored.
int64_t pack_floats(const Values<float>& value, int64_t first, int64_t k_padded, bool vectors, Bytes& out);

}  // namespace halfbyte
