// Random operands of the tests: guarded memory, matrices of every storage type, sizes beside the edges of tiles.
#pragma once
#include <sys/mman.h>
#include <unistd.h>

#include <stdexcept>

#include "truth.h"

namespace halfbyte::truth {

// count elements whose last (or first) byte touches a page that may not be read or written.
template <class T>
class Guarded {
 public:
  Guarded(Rng& rng, int64_t count) {
    const size_t page = static_cast<size_t>(sysconf(_SC_PAGESIZE));
    const size_t bytes = static_cast<size_t>(count) * sizeof(T), body = (bytes + page - 1) / page * page;
    size_ = body + 2 * page;
    map_ = static_cast<char*>(mmap(nullptr, size_, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0));
    if (map_ == MAP_FAILED) die("mmap failed");
    if (body && mprotect(map_ + page, body, PROT_READ | PROT_WRITE)) die("mprotect failed");
    std::memset(map_ + page, 0xff, body);
    data_ = reinterpret_cast<T*>(map_ + page + (below(rng, 4) ? body - bytes : 0));
  }
  Guarded(const Guarded&) = delete;
  ~Guarded() { munmap(map_, size_); }
  T* data() { return data_; }
  const T* data() const { return data_; }
  T& operator[](int64_t i) { return data_[i]; }
  const T& operator[](int64_t i) const { return data_[i]; }

 private:
  size_t size_;
  char* map_;
  T* data_;
};

inline std::vector<float> fill_row(Rng& rng, int k) {
  std::vector<float> x(static_cast<size_t>(k));
  const int kind = below(rng, 10);
  const float magnitude = std::ldexp(1.0f, below(rng, 30) - 15);
  for (float& v : x) {
    v = uniform(rng) * magnitude;
    if (kind == 0) v = 0;
    if (kind == 1) v = std::fabs(v);
    if (kind == 2) v = 1.5f;
    if (kind == 3) v *= 1e-31f;
  }
  if (kind == 4 && k) x[static_cast<size_t>(below(rng, k))] = below(rng, 2) ? NAN : -INFINITY;
  return x;
}

constexpr DType floats[] = {DType::f32, DType::bf16, DType::f16};

// A matrix in guarded memory, in any storage type, its values as float32 beside it.
struct Matrix {
  Matrix(Rng& rng, int rows, int cols, DType type)
      : type(type), ld(cols + below(rng, 2) * below(rng, 9)),
        bytes(rng, rows ? ((rows - 1) * ld + cols) * size_of(type) : 0) {
    for (int i = 0; i < rows; ++i) {
      values.push_back(fill_row(rng, cols));
      for (int j = 0; j < cols; ++j) {
        put(type, bytes.data(), i * ld + j, values.back()[static_cast<size_t>(j)]);
        values.back()[static_cast<size_t>(j)] = get(type, bytes.data(), i * ld + j);
      }
    }
  }
  DType type;
  int64_t ld;
  Guarded<char> bytes;
  std::vector<std::vector<float>> values;
};

// Whether the bytes between the rows of an output [m][n] are as they were.
inline bool gaps_are_whole(const char* c, int64_t m, int64_t n, int64_t ld, DType type) {
  for (int64_t i = 0; i + 1 < m; ++i) {
    const char* gap = c + (i * ld + n) * size_of(type);
    if (std::any_of(gap, gap + (ld - n) * size_of(type), [](char byte) { return byte != '\xff'; })) return false;
  }
  return true;
}

inline int size_near(Rng& rng, int edge, int largest) {
  const int pick = below(rng, 3);
  if (pick == 0) return 1 + below(rng, 4);
  if (pick == 1) return std::max(1, edge * (1 + below(rng, 3)) - 1 + below(rng, 3));
  return 1 + below(rng, largest);
}

// Around the tiles of 4, 6, 12, 32 and 48 rows; sometimes none.
inline int rows_near(Rng& rng) { return below(rng, 8) ? size_near(rng, below(rng, 2) ? 12 : 32, 70) : 0; }

template <class Call>
void expect_invalid(const char* what, Call&& call) {
  try {
    call();
  } catch (const std::invalid_argument& error) {
    if (!error.what()[0]) die(std::string(what) + ": no message");
    return;
  }
  die(std::string(what) + " was accepted");
}

}  // namespace halfbyte::truth
