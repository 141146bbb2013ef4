// Operands of calls in memory that is watched: what a kernel reads or writes beside them is seen.
#pragma once
#include "tests.h"

namespace halfbyte::truth {

// count elements and no byte more: from the heap, where the address sanitizer knows both ends, or beside a page that may not
// be touched, which stops instructions too that it does not see.
template <class T>
class Exact {
 public:
  Exact(Rng& rng, int64_t count)
      : heap_(below(rng, 3) ? new T[static_cast<size_t>(count)] : nullptr), guarded_(rng, heap_ ? 0 : count) {}
  const T* data() const { return heap_ ? heap_.get() : guarded_.data(); }
  T* data() { return heap_ ? heap_.get() : guarded_.data(); }
  T& operator[](int64_t i) { return data()[i]; }

 private:
  std::unique_ptr<T[]> heap_;
  Guarded<T> guarded_;
};

// A matrix of any storage type.
struct Rows {
  Rows(Rng& rng, int rows, int cols, DType type, bool finite)
      : type(type), ld(cols + below(rng, 2) * below(rng, 9)), bytes(rng, rows ? ((rows - 1) * ld + cols) * size_of(type) : 0) {
    for (int i = 0; i < rows; ++i) {
      const std::vector<float> row = fill_row(rng, cols);
      for (int j = 0; j < cols; ++j) {
        const float v = row[static_cast<size_t>(j)];
        put(type, bytes.data(), i * ld + j, finite && !std::isfinite(v) ? 0 : v);
      }
    }
  }
  float at(int64_t i, int64_t j) const { return get(type, bytes.data(), i * ld + j); }
  DType type;
  int64_t ld;
  Exact<char> bytes;
};

// The output of a call, between poison.
class Output {
 public:
  Output(int64_t m, int64_t n, int64_t ld, DType type)
      : m_(m), n_(n), ld_(ld), type_(type),
        bytes_(static_cast<size_t>(2 * margin + (m ? ((m - 1) * ld + n) * size_of(type) : 0)), '\xff') {}
  char* data() { return bytes_.data() + margin; }
  float at(int64_t i, int64_t j) const { return get(type_, bytes_.data() + margin, i * ld_ + j); }

  void check(const std::string& where) const {
    const auto untouched = [](char byte) { return byte == '\xff'; };
    const bool whole = std::all_of(bytes_.begin(), bytes_.begin() + margin, untouched) &&
                       std::all_of(bytes_.end() - margin, bytes_.end(), untouched);
    if (!whole) die(where + ": wrote before or behind the output");
    if (!gaps_are_whole(bytes_.data() + margin, m_, n_, ld_, type_)) die(where + ": wrote between the rows of its output");
  }
  bool operator==(const Output& other) const { return bytes_ == other.bytes_; }
  bool same_numbers(const Output& other) const {  // another op promises no payload of a NaN
    bool equal = *this == other || type_ != DType::i32;
    for (int64_t at = 0; at < m_ * n_ && type_ != DType::i32; ++at) {
      equal = equal && same(this->at(at / n_, at % n_), other.at(at / n_, at % n_));
    }
    return equal;
  }

 private:
  static constexpr int64_t margin = 512;
  int64_t m_, n_, ld_;
  DType type_;
  std::vector<char> bytes_;
};

}  // namespace halfbyte::truth
