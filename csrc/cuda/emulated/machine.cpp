// Who runs next, who waits for whom, and what is said where that goes wrong.
#include "cuda/emulated/machine.h"

#include <cfenv>
#include <cstdarg>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <numeric>

#include "cuda/device.h"
#include "cuda/emulated/launch.h"

namespace halfbyte::cuda {

constinit thread_local const emulated::Place* emulated::here = nullptr;

namespace emulated {
namespace {

// Bytes before and after a block's shared memory that nobody may write. AddressSanitizer watches its own instead.
#ifdef HALFBYTE_ADDRESS_SANITIZER
constexpr size_t guard_bytes = 0;
#else
constexpr size_t guard_bytes = 1024;
#endif
constexpr uint8_t guard = 0xfd;

constexpr int idle_rounds = 100;  // every waiter refused in vain that often: nobody will ever run

// The default mode of floats, whatever the process has chosen: the GPU keeps subnormal numbers and rounds to the nearest.
class FloatMode {
 public:
  FloatMode() {
    std::fegetenv(&saved_);
    std::fesetenv(FE_DFL_ENV);
  }
  ~FloatMode() { std::fesetenv(&saved_); }

 private:
  std::fenv_t saved_;
};

[[noreturn]] void end_with(const std::string& message) {
  std::fprintf(stderr, "halfbyte emulated GPU: %s\n", message.c_str());
  std::abort();
}

std::string text(const char* format, ...) __attribute__((format(printf, 1, 2)));
std::string text(const char* format, ...) {
  char buffer[256];
  va_list values;
  va_start(values, format);
  std::vsnprintf(buffer, sizeof buffer, format, values);
  va_end(values);
  return buffer;
}

// The kernel in the name of a function whose template parameter it is: "... kernel = <it>; Args = ..." (Clang: a comma).
std::string name_of_kernel(const std::string& function) {
  const std::string before = "kernel = ";
  const size_t from = function.find(before), end = function.rfind(" Args = ");
  if (from == function.npos || end == function.npos) return function;
  return function.substr(from + before.size(), end - 1 - from - before.size());
}

std::string name_of(const Place& p) { return text("block (%d, %d, %d)", p.block[0], p.block[1], p.block[2]); }

}  // namespace

const char* name_of(Collective c) {
  switch (c) {
    case Collective::sync: return "warp_sync";
    case Collective::shuffle: return "shuffle_xor";
    case Collective::mma_f16: return "mma_f16";
    case Collective::mma_bf16: return "mma_bf16";
    case Collective::mma_s8: return "mma_s8";
    case Collective::mma_sparse_s8: return "mma_sparse_s8";
  }
  return "";
}

void fail(const char* message, ...) {
  char buffer[512];
  va_list values;
  va_start(values, message);
  std::vsnprintf(buffer, sizeof buffer, message, values);
  va_end(values);
  if (!here) end_with(std::string(buffer) + ", outside a kernel");
  end_with(me().machine->describe(me()) + ": " + buffer);
}

Machine::Machine(const Launch& launch, const char* name, void (*kernel)(const void*), const void* args)
    : arch([] {
        Device device;
        device_of(-1, device);
        return device.arch;
      }()),
      how(launch),
      blocks(static_cast<size_t>(launch.cluster)),
      name_(name_of_kernel(name)),
      kernel_(kernel),
      args_(args),
      threads_(static_cast<size_t>(launch.cluster) * launch.threads),
      warps_(threads_.size() / 32),
      random_state_(order_seed()) {
  for (size_t b = 0; b < blocks.size(); ++b) {
    Block& block = blocks[b];
    void* memory = nullptr;
    if (posix_memalign(&memory, 128, how.shared_bytes + 2 * guard_bytes)) end_with("no memory");
    block.shared = static_cast<char*>(memory) + guard_bytes;
    block.shared_bytes = how.shared_bytes;
    block.count = how.threads;
    block.threads = &threads_[b * how.threads];
    for (int i = 0; i < how.threads; ++i) {
      Thread& t = block.threads[i];
      t.thread = i;
      t.threads = how.threads;
      for (int d = 0; d < 3; ++d) t.blocks[d] = static_cast<int>(how.grid[d]);
      t.rank = static_cast<int>(b);
      t.shared = block.shared;
      t.machine = this;
      t.block_of = &block;
      t.warp = &warps_[(b * how.threads + i) / 32];
    }
  }
  for (size_t w = 0; w < warps_.size(); ++w) warps_[w].lanes = &threads_[w * 32];
}

Machine::~Machine() {
  for (Block& block : blocks) std::free(block.shared - guard_bytes);
}

uint64_t Machine::random() {  // splitmix64
  uint64_t z = random_state_ += 0x9e3779b97f4a7c15;
  z = (z ^ z >> 30) * 0xbf58476d1ce4e5b9;
  z = (z ^ z >> 27) * 0x94d049bb133111eb;
  return z ^ z >> 31;
}

void Machine::run() {
  const int64_t clusters = how.grid[0] / how.cluster * how.grid[1] * how.grid[2];
  // i -> (first + i * step) mod clusters, with a step that has no divisor in common with the number of clusters.
  const int64_t first = static_cast<int64_t>(random() % clusters);
  int64_t step = static_cast<int64_t>(random() % clusters);
  while (std::gcd(step, clusters) != 1) ++step;
  for (int64_t i = 0, cluster = first; i < clusters; ++i) {
    begin(cluster);
    switch_to(next());
    end();
    cluster = (cluster + step) % clusters;
  }
}

void Machine::begin(int64_t cluster) {
  const int64_t x = how.grid[0] / how.cluster;
  for (size_t b = 0; b < blocks.size(); ++b) {
    Block& block = blocks[b];
    std::memset(block.shared - guard_bytes, guard, how.shared_bytes + 2 * guard_bytes);
    std::memset(block.shared, poison, how.shared_bytes);
    block.done = block.in_block_sync = 0;
    block.under_way.assign((how.shared_bytes + 15) / 16, false);
    block.barriers.clear();
    for (int i = 0; i < how.threads; ++i) {
      Thread& t = block.threads[i];
      t.block[0] = static_cast<int>(cluster % x * how.cluster + static_cast<int64_t>(b));
      t.block[1] = static_cast<int>(cluster / x % how.grid[1]);
      t.block[2] = static_cast<int>(cluster / x / how.grid[1]);
      t.wait = Wait::none;
      t.copies.clear();
      t.groups.clear();
      fiber_prepare(t.fiber, b * how.threads + i, entry);
    }
  }
  runnable_.clear();
  for (Warp& warp : warps_) {
    warp.ready = warp.arrived = warp.returned = 0;
    wake(warp, ~0u);
  }
  left_ = static_cast<int>(threads_.size());
  in_cluster_sync_ = idle_ = 0;
  warp_ = nullptr;
  turn_ = 0;
}

void Machine::end() {
  for (Block& block : blocks) {
    const auto who = [&] { return name_ + ", " + name_of(block.threads[0]) + ": "; };
    for (const Barrier& barrier : block.barriers) {
      if (!barrier.copies.empty()) {
        end_with(who() + text("it ended before its copies to the barrier at %u were waited for", barrier.offset));
      }
    }
    const char* const bytes = block.shared - guard_bytes;
    for (size_t i = 0; i < guard_bytes; ++i) {
      if (static_cast<uint8_t>(bytes[i]) != guard) end_with(who() + "something was written before its shared memory");
      if (static_cast<uint8_t>(block.shared[block.shared_bytes + i]) != guard) {
        end_with(who() + text("something was written %zu bytes after its shared memory", i));
      }
    }
  }
}

void Machine::entry() {
  fiber_entered();
  Thread& thread = me();
  thread.machine->kernel_(thread.machine->args_);
  thread.machine->leave(thread);
}

void Machine::leave(Thread& t) {
  Block& block = *t.block_of;
  if (block.in_block_sync) fail("it returns while %d threads of its block wait in block_sync", block.in_block_sync);
  if (in_cluster_sync_) fail("it returns while %d threads of its cluster wait in cluster_sync", in_cluster_sync_);
  if (t.warp->arrived) fail("it returns while other lanes of its warp wait in %s", name_of(t.warp->collective));
  t.wait = Wait::done;
  t.warp->returned |= 1u << t.thread % 32;
  ++block.done;
  --left_;
  progress();
  sleep(t);
  switch_to(next(), true);
}

// ---------------------------------------------------------------- waiting

void Machine::sleep(Thread& t) {
  Warp& warp = *t.warp;
  warp.ready &= ~(1u << t.thread % 32);
  if (warp.ready) return;
  runnable_[warp.position] = runnable_.back();
  runnable_[warp.position]->position = warp.position;
  runnable_.pop_back();
}

void Machine::wake(Warp& warp, uint32_t lanes) {
  if (!lanes) return;
  if (!warp.ready) {
    warp.position = runnable_.size();
    runnable_.push_back(&warp);
  }
  warp.ready |= lanes;
}

void Machine::wake(Thread& t) { wake(*t.warp, 1u << t.thread % 32); }

void Machine::block(Thread& t, Wait why) {
  t.wait = why;
  if (why != Wait::barrier) progress();
  sleep(t);
  switch_to(next());
  t.wait = Wait::none;
}

void Machine::yield() { switch_to(next()); }

void Machine::wait_for_all(Thread& t, Wait where) {
  const bool one_block = where == Wait::block;
  const char* const name = one_block ? "block_sync" : "cluster_sync";
  for (Block& block : blocks) {
    if (block.done && (!one_block || &block == t.block_of)) {
      fail("%s, but %d threads of %s have returned", name, block.done, name_of(block.threads[0]).c_str());
    }
  }
  int& waiting = one_block ? t.block_of->in_block_sync : in_cluster_sync_;
  if (++waiting < (one_block ? t.block_of->count : static_cast<int>(threads_.size()))) {
    block(t, where);
    return;
  }
  waiting = 0;
  progress();
  Thread* const from = one_block ? t.block_of->threads : threads_.data();
  const int count = one_block ? t.block_of->count : static_cast<int>(threads_.size());
  for (int i = 0; i < count; ++i) {
    if (&from[i] != &t) wake(from[i]);
  }
}

void Machine::switch_to(Thread* to, bool leave_for_good) {
  Thread* const from = running_;
  if (from == to) return;
  running_ = to;
  here = to;
  fiber_switch(from ? from->fiber : main_, to ? to->fiber : main_, leave_for_good);
}

Thread* Machine::next() {
  for (;;) {
    while (turn_) {
      // Rotated, the lanes that are left begin with first_lane_.
      const uint32_t left = turn_ >> first_lane_ | static_cast<uint32_t>(static_cast<uint64_t>(turn_) << (32 - first_lane_));
      const int lane = ((descending_ ? 31 - __builtin_clz(left) : __builtin_ctz(left)) + first_lane_) & 31;
      turn_ &= ~(1u << lane);
      if (warp_->ready >> lane & 1) return &warp_->lanes[lane];
    }
    if (left_ == 0) return nullptr;
    if (runnable_.empty()) {
      nobody_can_run();
      continue;
    }
    // Mostly the same warp: it may get far ahead of the others.
    const uint64_t drawn = random();
    if (!warp_ || !warp_->ready || (drawn & 7) == 0) warp_ = runnable_[(drawn >> 32) % runnable_.size()];
    turn_ = warp_->ready;
    first_lane_ = drawn >> 8 & 31;
    descending_ = drawn >> 16 & 1;
  }
}

// try_wait may come back empty-handed: a thread that has something else to do then does it.
void Machine::nobody_can_run() {
  bool any = false;
  if (idle_++ < idle_rounds) {
    for (Thread& t : threads_) {
      if (t.wait != Wait::barrier) continue;
      t.refused = any = true;
      wake(t);
    }
  }
  if (any) return;
  std::string message = "deadlock in " + name_;
  for (const Block& block : blocks) {
    for (int first = 0, i = 1; i <= block.count; ++i) {
      const std::string what = describe_wait(block.threads[first]);
      if (i < block.count && describe_wait(block.threads[i]) == what) continue;
      const std::string who = i - first == 1 ? text(" thread %d: ", first) : text(" threads %d .. %d: ", first, i - 1);
      message += "\n  " + name_of(block.threads[0]) + who + what;
      first = i;
    }
  }
  end_with(message);
}

std::string Machine::describe(const Thread& t) const {
  return name_ + ", " + name_of(t) + text(" thread %d", t.thread);
}

std::string Machine::describe_wait(const Thread& t) const {
  switch (t.wait) {
    case Wait::none: return "can run";
    case Wait::done: return "returned";
    case Wait::block: return text("block_sync, %d of %d there", t.block_of->in_block_sync, t.block_of->count);
    case Wait::cluster: return text("cluster_sync, %d of %zu there", in_cluster_sync_, threads_.size());
    case Wait::warp: return text("%s, lanes %#010x there", name_of(t.warp->collective), t.warp->arrived);
    case Wait::barrier:
      return text("barrier at %u, parity %d, in phase %u: %d of %d arrivals missing, %lld bytes expected, %lld under way",
                  t.barrier->offset, t.parity, t.barrier->phase, t.barrier->missing, t.barrier->arrivals,
                  static_cast<long long>(t.barrier->expected), static_cast<long long>(t.barrier->under_way));
  }
  return "";
}

int run(const Launch& how, const char* name, void (*kernel)(const void*), const void* args) {
  constexpr int invalid_value = 1;
  if (here) fail("a kernel started by a kernel");
  Device device;
  if (int error = device_of(-1, device)) return error;
  for (int d = 0; d < 3; ++d) {
    if (how.grid[d] < 1 || how.grid[d] > (d == 0 ? 0x7fffffff : 65535)) return invalid_value;
  }
  if (how.threads < 32 || how.threads > 1024 || how.threads % 32) return invalid_value;
  if (how.shared_bytes < 0 || how.shared_bytes > device.shared_bytes) return invalid_value;
  if (how.cluster < 1 || how.cluster > 8 || how.grid[0] % how.cluster) return invalid_value;
  if (how.cluster > 1 && device.arch < 90) return invalid_value;
  FloatMode mode;
  Machine(how, name, kernel, args).run();
  return 0;
}

}  // namespace emulated

void block_sync() { emulated::me().machine->wait_for_all(emulated::me(), emulated::Wait::block); }

}  // namespace halfbyte::cuda
