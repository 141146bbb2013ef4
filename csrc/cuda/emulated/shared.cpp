// Shared memory: its addresses, the copies into it and their barriers.
#include <cstring>

#include "cuda/emulated/machine.h"

#ifdef HALFBYTE_ADDRESS_SANITIZER
#include <sanitizer/asan_interface.h>
#endif

namespace halfbyte::cuda {
namespace emulated {
namespace {

constexpr int most_arrivals = (1 << 20) - 1;  // of an mbarrier, and of the bytes that it expects
constexpr uint32_t barrier_mark = 0xba441e40;

void need_arch(int least, const char* what) {
  if (me().machine->arch < least) fail("%s on a device of sm_%d", what, me().machine->arch);
}

// Where `address` is in the shared memory of the block `rank`.
char* resolve(SharedAddress address, int bytes, int alignment, const char* what, int rank) {
  Thread& t = me();
  const int64_t offset = static_cast<int64_t>(address & ((1u << rank_shift) - 1)) - shared_base;
  if (static_cast<int>(address >> rank_shift) != t.rank || offset < 0) {
    fail("%s: %#x is no shared address of its block", what, address);
  }
  if (bytes < 0 || offset + bytes > t.block_of->shared_bytes) {
    fail("%s: %d bytes at %lld are outside the %d bytes of shared memory", what, bytes, static_cast<long long>(offset),
         t.block_of->shared_bytes);
  }
  if (offset % alignment) fail("%s: shared address %lld is no multiple of %d", what, static_cast<long long>(offset), alignment);
  return t.machine->blocks[rank].shared + offset;
}
char* resolve(SharedAddress address, int bytes, int alignment, const char* what) {
  return resolve(address, bytes, alignment, what, me().rank);
}

// A copy is under way: nobody else may write there, and who reads there reads poison.
Copy begin_copy(SharedAddress to, const void* from, int bytes, const char* what) {
  if (bytes < 16 || bytes % 16) fail("%s of %d bytes", what, bytes);
  if (reinterpret_cast<uintptr_t>(from) % 16) fail("%s from %p, which is no multiple of 16", what, from);
#ifdef HALFBYTE_ADDRESS_SANITIZER
  if (const void* bad = __asan_region_is_poisoned(const_cast<void*>(from), bytes)) {
    fail("%s of %d bytes from %p, but there is no memory at %p", what, bytes, from, bad);
  }
#endif
  char* const at = resolve(to, bytes, 16, what);
  Block& block = *me().block_of;
  for (int64_t i = (at - block.shared) / 16; i < (at - block.shared + bytes) / 16; ++i) {
    if (block.under_way[i]) fail("%s to %lld, where another copy is under way", what, static_cast<long long>(i * 16));
    block.under_way[i] = true;
  }
  std::memset(at, poison, bytes);
  return {at, from, bytes};
}

void end_copy(const Copy& copy) {
  Block& block = *me().block_of;
  for (int i = 0; i < copy.bytes; ++i) {
    if (static_cast<uint8_t>(copy.to[i]) == poison) continue;
    fail("somebody wrote to %lld while a copy to there was under way", static_cast<long long>(copy.to + i - block.shared));
  }
  std::memcpy(copy.to, copy.from, copy.bytes);
  for (int64_t i = (copy.to - block.shared) / 16; i < (copy.to - block.shared + copy.bytes) / 16; ++i) block.under_way[i] = false;
}

Barrier& barrier_at(SharedAddress address, const char* what) {
  uint32_t words[2];
  std::memcpy(words, resolve(address, 8, 8, what), 8);
  auto& barriers = me().block_of->barriers;
  const uint32_t offset = (address & ((1u << rank_shift) - 1)) - shared_base;
  if (words[0] != barrier_mark || words[1] >= barriers.size() || barriers[words[1]].offset != offset) {
    fail("%s: no barrier at %u: not initialized yet, or overwritten", what, offset);
  }
  return barriers[words[1]];
}

void wake_waiters(Barrier& barrier) {
  Block& block = *me().block_of;
  for (int i = 0; i < block.count; ++i) {
    Thread& t = block.threads[i];
    if (t.wait == Wait::barrier && t.barrier == &barrier) me().machine->wake(t);
  }
}

// The phase ends if it lacks nothing, and whoever waits for it can end it if it lacks nothing but copies.
void look(Barrier& b) {
  if (b.missing) return;
  if (b.expected < b.under_way) {
    fail("%lld bytes are under way to the barrier at %u, which expects %lld", static_cast<long long>(b.under_way), b.offset,
         static_cast<long long>(b.expected));
  }
  if (!b.complete_with_copies()) return;
  if (b.copies.empty()) {
    b.missing = b.arrivals;
    b.expected = 0;
    ++b.phase;
  }
  wake_waiters(b);
}

}  // namespace

void copy_async_wait_for(int pending) {
  Thread& t = me();
  if (t.groups.size() <= static_cast<size_t>(pending)) return;
  const size_t groups = t.groups.size() - pending, copies = t.groups[groups - 1];
  for (size_t i = 0; i < copies; ++i) end_copy(t.copies[i]);
  t.copies.erase(t.copies.begin(), t.copies.begin() + copies);
  t.groups.erase(t.groups.begin(), t.groups.begin() + groups);
  for (size_t& end : t.groups) end -= copies;
}

}  // namespace emulated

using namespace emulated;

SharedAddress shared_address(const void* p) {
  const int64_t offset = static_cast<const char*>(p) - here->shared;
  if (offset < 0 || offset > me().block_of->shared_bytes) fail("%p is not in its block's shared memory", p);
  return static_cast<SharedAddress>(here->rank) << rank_shift | static_cast<SharedAddress>(shared_base + offset);
}

void copy_async16(SharedAddress to, const void* from, uint64_t) { me().copies.push_back(begin_copy(to, from, 16, "copy_async16")); }

void copy_async_commit() { me().groups.push_back(me().copies.size()); }

void barrier_init(SharedAddress barrier, int arrivals) {
  need_arch(90, "barrier_init");
  if (arrivals < 1 || arrivals > most_arrivals) fail("barrier_init for %d arrivals", arrivals);
  char* const at = resolve(barrier, 8, 8, "barrier_init");
  Block& block = *me().block_of;
  const uint32_t offset = static_cast<uint32_t>(at - block.shared);
  for (const Barrier& b : block.barriers) {
    if (b.offset == offset) fail("barrier_init, but there is a barrier at %u", offset);
  }
  const uint32_t words[2] = {barrier_mark, static_cast<uint32_t>(block.barriers.size())};
  std::memcpy(at, words, 8);
  block.barriers.push_back({.offset = offset, .arrivals = arrivals, .missing = arrivals, .maker = me().thread});
}

void barrier_init_fence() {
  need_arch(90, "barrier_init_fence");
  for (Barrier& b : me().block_of->barriers) b.fenced |= b.maker == me().thread;
}

void async_proxy_fence() { need_arch(90, "async_proxy_fence"); }

void barrier_arrive_expect(SharedAddress barrier, int bytes) {
  need_arch(90, "barrier_arrive_expect");
  Barrier& b = barrier_at(barrier, "barrier_arrive_expect");
  if (b.missing == 0) {
    fail("it arrives at the barrier at %u, where all %d were: nobody waited for its bytes", b.offset, b.arrivals);
  }
  b.expected += bytes;
  if (bytes < 0 || b.expected > most_arrivals) {
    fail("the barrier at %u expects %lld bytes", b.offset, static_cast<long long>(b.expected));
  }
  --b.missing;
  me().machine->progress();
  look(b);
}

void copy_bulk(SharedAddress to, const void* from, int bytes, SharedAddress barrier, uint64_t) {
  need_arch(90, "copy_bulk");
  Barrier& b = barrier_at(barrier, "copy_bulk");
  if (!b.fenced) fail("copy_bulk with the barrier at %u, which saw no barrier_init_fence", b.offset);
  b.copies.push_back(begin_copy(to, from, bytes, "copy_bulk"));
  b.under_way += bytes;
  me().machine->progress();
  look(b);
}

bool barrier_try_wait(SharedAddress barrier, int parity) {
  need_arch(90, "barrier_try_wait");
  if (parity != 0 && parity != 1) fail("barrier_try_wait for the parity %d", parity);
  Barrier& b = barrier_at(barrier, "barrier_try_wait");
  Thread& t = me();
  if (t.machine->random() % 8 == 0) {  // the GPU too may give up early
    t.machine->yield();
    return false;
  }
  for (;;) {
    if (static_cast<int>(b.phase & 1) != parity) return true;
    if (b.complete_with_copies()) {
      for (const Copy& copy : b.copies) end_copy(copy);
      b.copies.clear();
      b.under_way = b.expected = 0;
      t.machine->progress();
      look(b);
      return true;
    }
    t.barrier = &b;
    t.parity = parity;
    t.refused = false;
    t.machine->block(t, Wait::barrier);
    if (t.refused) return false;
  }
}

void wait_for_kernel_before() { need_arch(90, "wait_for_kernel_before"); }

void cluster_sync() {
  need_arch(90, "cluster_sync");
  me().machine->wait_for_all(me(), Wait::cluster);
}

uint32_t load_cluster(SharedAddress address, int rank) {
  need_arch(90, "load_cluster");
  Machine& machine = *me().machine;
  if (rank < 0 || rank >= machine.how.cluster) fail("load_cluster from block %d of a cluster of %d", rank, machine.how.cluster);
  const Block& block = machine.blocks[rank];
  if (block.done == block.count) fail("load_cluster from block %d of its cluster, which has ended", rank);
  uint32_t v;
  std::memcpy(&v, resolve(address, 4, 4, "load_cluster", rank), 4);
  return v;
}

}  // namespace halfbyte::cuda
