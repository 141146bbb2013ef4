// Memory of packed weights.
#include "core/packed_weight.h"

#include <atomic>
#include <cstdlib>
#include <new>
#include <utility>

#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace halfbyte {
namespace {

constexpr int64_t line = 64, huge_page = int64_t{2} << 20;

std::atomic<int64_t> allocated{0};

#if defined(__linux__)
// Not from malloc, which may hand out memory that is already there in small pages: after a program has freed a few big
// arrays, glibc serves 16 MB from its heap, and none of it was in huge pages.
uint8_t* map_huge(int64_t bytes) {
  const int64_t spare = bytes + huge_page;
  void* const whole = mmap(nullptr, spare, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (whole == MAP_FAILED) throw std::bad_alloc();
  uint8_t* const begin = static_cast<uint8_t*>(whole);
  const int64_t before = (huge_page - reinterpret_cast<intptr_t>(begin) % huge_page) % huge_page;
  if (before) munmap(begin, before);
  munmap(begin + before + bytes, spare - before - bytes);
  // Best effort: a kernel without huge pages serves the same bytes more slowly.
  (void)madvise(begin + before, bytes, MADV_HUGEPAGE);
  return begin + before;
}
#endif

}  // namespace

int64_t Buffer::allocations() { return allocated.load(); }

Buffer::Buffer(int64_t bytes) : size_(bytes) {
  allocated.fetch_add(1, std::memory_order_relaxed);
#if defined(__linux__)
  if (bytes >= huge_page) {
    const int64_t mapped = round_up(bytes, huge_page);
    data_ = {map_huge(mapped), Free{mapped}};
    return;
  }
#endif
  data_.reset(static_cast<uint8_t*>(std::aligned_alloc(line, round_up(bytes > 0 ? bytes : 1, line))));
  if (!data_) throw std::bad_alloc();
}

void Buffer::settle() const {
#if defined(__linux__)
  // Where no huge page was free at the first touch, Linux 6.1 and later makes some now. Best effort, as above.
  constexpr int collapse = 25;  // MADV_COLLAPSE, which older headers do not name
  if (data_.get_deleter().mapped) (void)madvise(data_.get(), data_.get_deleter().mapped, collapse);
#endif
}

void Buffer::Free::operator()(uint8_t* p) const {
#if defined(__linux__)
  if (mapped) {
    munmap(p, mapped);
    return;
  }
#endif
  std::free(p);
}

PackedWeight::PackedWeight(const WeightFormat& format)
    : format(format),
      n(format.n),
      k(format.k),
      n_padded(round_up(n, panel_width)),
      k_padded(round_up(k, k_multiple)),
      panel_bytes_(k_padded / quad * line_bytes() + groups() * format.groups.bytes()),
      stored_(n_padded * k_padded),
      buffer_(n_padded / panel_width * panel_bytes_ + n_padded * 8) {}

PackedWeight::PackedWeight(const WeightFormat& format, std::vector<int64_t> offsets, int64_t stored)
    : format(format),
      n(format.n),
      k(format.k),
      n_padded(round_up(n, panel_width)),
      k_padded(round_up(k, k_multiple)),
      panel_bytes_(0),
      offsets_(std::move(offsets)),
      stored_(stored),
      buffer_(offsets_.back() + n_padded * 8) {}

}  // namespace halfbyte
