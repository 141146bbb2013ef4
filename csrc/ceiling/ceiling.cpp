// Timing of the ceilings: one parallel region, every thread works until the time is up, work / wall time.
#include "ceiling/ceiling.h"

#include <atomic>
#include <chrono>
#include <cstring>

#include "ceiling/kernel.h"
#include "core/check.h"
#include "core/cpu_features.h"
#include "core/packed_weight.h"
#include "core/parallel.h"

namespace halfbyte {
namespace {

using Clock = std::chrono::steady_clock;

constexpr const Ceiling* ceilings[] = {
#define KERNEL(isa) &ceiling_##isa,
#include "ceiling/kernels.inc"
#undef KERNEL
};

double seconds_since(Clock::time_point start) { return std::chrono::duration<double>(Clock::now() - start).count(); }

// work(rank, size) does one piece and returns how much it was.
template <class Work>
double rate(int threads, double seconds, Work work) {
  check(seconds > 0, "a ceiling is measured over a positive time, got ", seconds);
  std::atomic<int64_t> done{0};
  const Clock::time_point start = Clock::now();
  double elapsed = 0;
  parallel(threads > 0 ? threads : default_threads(), [&](Team& team) {
    int64_t mine = 0;
    do {
      mine += work(team.rank, team.size);
    } while (seconds_since(start) < seconds);
    done.fetch_add(mine);
    team.barrier();
    if (team.rank == 0) elapsed = seconds_since(start);
  });
  return static_cast<double>(done.load()) / elapsed;
}

}  // namespace

double measure_peak(const std::string& isa, int threads, double seconds) {
  const IsaInfo& info = isa_info(isa);
  check((supported_isas() & info.bit) != 0, "measure_peak: this machine lacks '", isa, "'");
  for (const Ceiling* ceiling : ceilings) {
    if (!(info.closure & ceiling->needs)) continue;  // an extension may multiply as what it extends does
    return 2 * rate(threads, seconds, [&](int, int) { return ceiling->multiply_adds(20000); });
  }
  fail("measure_peak: no multiply-add ceiling for '", isa, "'");
}

double measure_read(int64_t bytes, int threads, double seconds) {
  check(bytes >= 64 * 1024, "measure_read: the buffer must hold at least 64 KiB, got ", bytes, " bytes");
  const Ceiling* widest = nullptr;
  for (const Ceiling* ceiling : ceilings) {
    if ((supported_isas() & ceiling->needs) && ceiling->read) {
      widest = ceiling;
      break;
    }
  }
  const Buffer buffer(round_up(bytes, 4096));
  std::memset(buffer.data(), 1, buffer.size());
  std::atomic<uint64_t> sink{0};
  return rate(threads, seconds, [&](int rank, int size) {
    const int64_t lines = buffer.size() / 512;
    const int64_t begin = lines * rank / size * 512, end = lines * (rank + 1) / size * 512;
    sink.fetch_add(widest->read(buffer.data() + begin, end - begin), std::memory_order_relaxed);
    return end - begin;
  });
}

}  // namespace halfbyte
