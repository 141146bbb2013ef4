// Memory of packed weights.
#include "core/packed_weight.h"

#include <cstdlib>
#include <new>

#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace halfbyte {
namespace {

constexpr int64_t line = 64, huge_page = int64_t{2} << 20;

}  // namespace

Buffer::Buffer(int64_t bytes) : size_(bytes) {
  const int64_t alignment = bytes >= huge_page ? huge_page : line;
  const int64_t rounded = round_up(bytes > 0 ? bytes : 1, alignment);
  data_.reset(static_cast<uint8_t*>(std::aligned_alloc(alignment, rounded)));
  if (!data_) throw std::bad_alloc();
#if defined(__linux__) && defined(MADV_HUGEPAGE)
  // Best effort: a kernel without huge pages serves the same bytes more slowly.
  if (alignment == huge_page) (void)madvise(data_.get(), rounded, MADV_HUGEPAGE);
#endif
}

void Buffer::Free::operator()(uint8_t* p) const { std::free(p); }

PackedWeight::PackedWeight(const char* op, int64_t n, int64_t k)
    : op(op),
      n(n),
      k(k),
      n_padded(round_up(n, panel_width)),
      k_padded(round_up(k, k_multiple)),
      buffer_(n_padded * (k_padded + 8)) {}

}  // namespace halfbyte
