// The emulator of the GPU (csrc/cuda/emulated), with kernels of its own: right ones give what they should under every
// order of threads, wrong ones end the process with a message.
#include <sys/wait.h>
#include <unistd.h>

#include <algorithm>
#include <cfenv>
#include <cstring>
#include <string>
#include <thread>
#include <vector>

#include "cuda/device.h"
#include "cuda_emulator.h"

extern "C" void halfbyte_cuda_emulate(int arch, int processors, int shared_bytes, unsigned seed);

namespace halfbyte::cuda {
namespace {

constexpr int seeds = 20;
void use_seed(unsigned seed) { halfbyte_cuda_emulate(90, 132, 232448, seed); }

// ---------------------------------------------------------------- warps

HALFBYTE_KERNEL(256, 1) shuffle(int* const out) {
  const int me = thread(), lane = me % 32;
  for (int mask = 1; mask < 32; mask *= 2) {
    if (shuffle_xor(me, mask) != (me ^ mask)) ++*out;
    if (shuffle_xor(static_cast<float>(me), 3) != static_cast<float>(me ^ 3)) ++*out;
  }
  float sum = static_cast<float>(lane);
  for (int mask = 16; mask; mask /= 2) sum += shuffle_xor(sum, mask);
  if (sum != 31 * 16) ++*out;
}

// Each thread writes and reads what another one writes: right only with the barrier.
template <bool with_barrier, bool of_block>
HALFBYTE_KERNEL(256, 1) exchange(int* const wrong) {
  int* const slots = reinterpret_cast<int*>(shared_memory());
  const int me = thread(), other = of_block ? (me + 128) % threads() : me ^ 1;
  if (slots[me] != static_cast<int>(0xcdcdcdcd)) wrong[me] += 1000;  // left by another block
  slots[me] = me;
  if (with_barrier) of_block ? block_sync() : warp_sync();
  if (slots[other] != other) ++wrong[me];
}

// How many threads were wrong under some order.
template <bool with_barrier, bool of_block>
int wrong_in_exchange() {
  int wrong[256] = {};
  for (unsigned seed = 0; seed < seeds; ++seed) {
    use_seed(seed);
    const Launch how{.grid = {2, 1, 1}, .threads = 256, .shared_bytes = 1024};
    REQUIRE(launch<exchange<with_barrier, of_block>>(how, static_cast<int*>(wrong)) == 0);
  }
  REQUIRE(*std::max_element(wrong, wrong + 256) <= 2 * seeds);
  return static_cast<int>(std::count_if(wrong, wrong + 256, [](int n) { return n > 0; }));
}

void test_warps() {
  int wrong = 0;
  REQUIRE(launch<shuffle>({.grid = {3, 1, 1}, .threads = 96, .shared_bytes = 0}, &wrong) == 0 && wrong == 0);
  REQUIRE(wrong_in_exchange<true, true>() == 0 && wrong_in_exchange<true, false>() == 0);
  REQUIRE(wrong_in_exchange<false, true>() == 256 && wrong_in_exchange<false, false>() == 256);
}

// ---------------------------------------------------------------- copies

struct Buffers {
  const uint32_t* from;
  uint32_t* to;
};

// Two groups of copies; what is seen before, between and after the waits.
HALFBYTE_KERNEL(64, 1) copy_late(const Buffers b) {
  char* const mine = shared_memory() + thread() * 48;
  const char* const from = reinterpret_cast<const char*>(b.from) + thread() * 48;
  uint32_t seen[12];
  const auto look = [&](int when) {
    std::memcpy(seen, mine, 48);
    for (int i = 0; i < 3; ++i) b.to[(thread() * 4 + when) * 3 + i] = seen[i * 4];
  };
  for (int i = 0; i < 2; ++i) {
    copy_async16(shared_address(mine + i * 16), from + i * 16, evict_first_policy());
    copy_async_commit();
  }
  copy_async16(shared_address(mine + 32), from + 32, evict_first_policy());  // in no group
  look(0);
  copy_async_wait<2>();
  look(1);
  copy_async_wait<1>();
  look(2);
  copy_async_wait<0>();
  look(3);
}

// A copy of a barrier reads at the end of its phase, not before: what was there when it began is not seen.
HALFBYTE_KERNEL(32, 1) copy_bulk_late(uint32_t* const source) {
  uint32_t seen[4];
  if (thread() != 0) return;
  const SharedAddress barrier = shared_address(shared_memory()), data = shared_address(shared_memory() + 16);
  barrier_init(barrier, 1);
  barrier_init_fence();
  copy_bulk(data, source, 16, barrier, evict_first_policy());
  barrier_arrive_expect(barrier, 16);
  std::memcpy(seen, shared_memory() + 16, 16);
  source[1] = seen[1];
  while (!barrier_try_wait(barrier, 0)) {
  }
  std::memcpy(&source[4], shared_memory() + 16, 16);
}

void test_copies() {
  std::vector<uint32_t> from(64 * 12), to(64 * 12);
  for (auto& v : from) v = random_word();
  REQUIRE(launch<copy_late>({.grid = {1, 1, 1}, .threads = 64, .shared_bytes = 64 * 48}, Buffers{from.data(), to.data()}) == 0);
  for (int t = 0; t < 64; ++t) {
    for (int when = 0; when < 4; ++when) {
      for (int i = 0; i < 3; ++i) {
        REQUIRE(to[(t * 4 + when) * 3 + i] == (when >= 2 + i && i < 2 ? from[t * 12 + i * 4] : 0xcdcdcdcd));
      }
    }
  }
}

void test_bulk_copies() {
  alignas(16) uint32_t source[8] = {1, 2, 3, 4};
  REQUIRE(launch<copy_bulk_late>({.grid = {1, 1, 1}, .threads = 32, .shared_bytes = 32}, static_cast<uint32_t*>(source)) == 0);
  REQUIRE(source[1] == 0xcdcdcdcd && source[4] == 1 && source[5] == 0xcdcdcdcd && source[7] == 4);
}

// A ring of `depth` buffers: one thread copies, the other warps add up what they see; each buffer has two barriers.
constexpr int depth = 3, rounds = 17, words = 96;
struct Ring {
  const uint32_t* from;  // [blocks][rounds][words]
  uint32_t* sums;        // [blocks][threads - 32]
  bool forget_full, forget_empty;
};
HALFBYTE_KERNEL(160, 1) ring(const Ring r) {
  const auto full = [](int i) { return shared_address(shared_memory() + i % depth * 16); };
  const auto empty = [](int i) { return shared_address(shared_memory() + i % depth * 16 + 8); };
  char* const buffers = shared_memory() + 128;
  const uint32_t* const from = r.from + block_x() * rounds * words;
  if (thread() == 0) {
    for (int i = 0; i < depth; ++i) {
      barrier_init(full(i), 1);
      barrier_init(empty(i), threads() / 32 - 1);
    }
    barrier_init_fence();
  }
  block_sync();
  if (thread() < 32) {
    for (int i = 0; i < rounds && thread() == 0; ++i) {
      while (!r.forget_empty && !barrier_try_wait(empty(i), 1 ^ (i / depth & 1))) {
      }
      barrier_arrive_expect(full(i), words * 4);
      for (int half = 0; half < 2; ++half) {
        char* const to = buffers + i % depth * words * 4 + half * words * 2;
        copy_bulk(shared_address(to), from + i * words + half * words / 2, words * 2, full(i), evict_first_policy());
      }
    }
    return;
  }
  uint32_t sum = 0;
  for (int i = 0; i < rounds; ++i) {
    while (!r.forget_full && !barrier_try_wait(full(i), i / depth & 1)) {
    }
    for (int j = 0; j < words; ++j) {
      uint32_t v;
      std::memcpy(&v, buffers + (i % depth * words + j) * 4, 4);
      sum = sum * 31 + v;
    }
    warp_sync();
    if (thread() % 32 == 0) barrier_arrive_expect(empty(i), 0);
  }
  r.sums[block_x() * (threads() - 32) + thread() - 32] = sum;
}

int run_ring(bool forget_full, bool forget_empty) {  // returns how many sums are wrong
  const int blocks = 2, threads = 160;
  std::vector<uint32_t> from(blocks * rounds * words), sums(blocks * (threads - 32));
  for (auto& v : from) v = random_word();
  const Launch how{.grid = {blocks, 1, 1}, .threads = threads, .shared_bytes = 128 + depth * words * 4};
  REQUIRE(launch<ring>(how, Ring{from.data(), sums.data(), forget_full, forget_empty}) == 0);
  int wrong = 0;
  for (size_t i = 0; i < sums.size(); ++i) {
    uint32_t expected = 0;
    for (int j = 0; j < rounds * words; ++j) expected = expected * 31 + from[i / (threads - 32) * rounds * words + j];
    wrong += sums[i] != expected;
  }
  return wrong;
}

// ---------------------------------------------------------------- clusters

// Every block shows a number per thread; then each thread adds those of the whole cluster.
HALFBYTE_KERNEL(64, 1) add_cluster(uint32_t* const sums) {
  uint32_t* const mine = reinterpret_cast<uint32_t*>(shared_memory()) + thread();
  *mine = 1u << block_x() % 4 << thread() % 16;
  cluster_sync();
  uint32_t sum = 0;
  for (int rank = 0; rank < 4; ++rank) sum += load_cluster(shared_address(mine), rank);
  cluster_sync();
  sums[((block_z() * blocks_y() + block_y()) * blocks_x() + block_x()) * threads() + thread()] += sum;
}

void test_clusters() {
  for (unsigned seed = 0; seed < seeds; ++seed) {
    use_seed(seed);
    std::vector<uint32_t> sums(12 * 3 * 2 * 64);
    REQUIRE(launch<add_cluster>({.grid = {12, 3, 2}, .threads = 64, .shared_bytes = 256, .cluster = 4}, sums.data()) == 0);
    for (size_t i = 0; i < sums.size(); ++i) REQUIRE(sums[i] == 15u << i % 16);
  }
}

// ---------------------------------------------------------------- what must end the process

// Shared memory: a barrier at 0 with one arrival, the rest for copies.
template <auto body>
HALFBYTE_KERNEL(64, 1) wrong(const uint32_t* const source) {
  const auto at = [](int offset) { return shared_address(shared_memory()) + static_cast<SharedAddress>(offset); };
  if (thread() == 0) {
    barrier_init(at(0), 1);
    barrier_init_fence();
  }
  block_sync();
  body(source, at);
}

// The call does, of a child process, and says so, or the other thing.
template <class Call>
void dies(Call call, const char* what, const char* instead) {
  int ends[2];
  REQUIRE(pipe(ends) == 0);
  std::fflush(stdout);
  const pid_t child = fork();
  REQUIRE(child >= 0);
  if (child == 0) {
    dup2(ends[1], 2);
    close(ends[0]);
    call();
    _exit(0);
  }
  close(ends[1]);
  std::string said;
  char buffer[4096];
  for (ssize_t n; (n = read(ends[0], buffer, sizeof buffer)) > 0;) said.append(buffer, static_cast<size_t>(n));
  close(ends[0]);
  int status = 0;
  REQUIRE(waitpid(child, &status, 0) == child);
  if (status != 0 && (said.find(what) != said.npos || said.find(instead) != said.npos)) return;
  std::printf("expected \"%s\", status %#x, said:\n%s\n", what, static_cast<unsigned>(status), said.c_str());
  std::exit(1);
}

template <auto body>
void dies(const char* what, const char* instead = "-") {
  alignas(16) static const uint32_t source[256] = {};
  const Launch how{.grid = {2, 1, 1}, .threads = 64, .shared_bytes = 1024, .cluster = 2};
  dies([&] { launch<wrong<body>>(how, static_cast<const uint32_t*>(source)); }, what, instead);
}

#define BODY [](const uint32_t* source [[maybe_unused]], auto at [[maybe_unused]])
void wait_for(SharedAddress barrier, int parity) {
  while (!barrier_try_wait(barrier, parity)) {
  }
}

void expect(int bytes, auto at) { barrier_arrive_expect(at(0), bytes); }

void test_deaths() {
  const auto try_ring = [](bool forget_full, bool forget_empty) {
    if (run_ring(forget_full, forget_empty)) std::fputs("wrong sums", stderr), std::abort();
  };
  for (unsigned seed = 0; seed < seeds; ++seed) {
    use_seed(seed);
    dies([&] { try_ring(true, false); }, "halfbyte emulated GPU: ", "wrong sums");
    dies([&] { try_ring(false, true); }, "halfbyte emulated GPU: ", "wrong sums");
  }
  dies<BODY { if (thread() != 5) block_sync(); }>("of its block wait in block_sync", "1 threads of block");
  dies<BODY {
    for (int i = 0; i < 1000 && thread() < 32; ++i) warp_sync();
    if (thread() < 32) block_sync();
  }>("block_sync, but 32 threads of block (");
  dies<BODY { if (thread() < 32) block_sync(); else cluster_sync(); }>("cluster_sync, 64 of 128 there");
  dies<BODY { if (thread() == 40) wait_for(at(0), 0); }>("(1, 0, 0) thread 40: barrier at 0, parity 0, in phase 0: 1 of 1");
  dies<BODY { if (thread() == 40) expect(16, at), wait_for(at(0), 0); }>("16 bytes expected, 0 under way");
  dies<BODY { if (thread() == 1) expect(16, at), copy_bulk(at(16), source, 32, at(0), 0); }>("32 bytes are under way");
  dies<BODY { if (thread() == 1) expect(16, at), expect(0, at); }>("nobody waited for its bytes");
  dies<BODY { if (thread() == 1) expect(16, at), copy_bulk(at(16), source, 16, at(0), 0); }>("were waited for");
  dies<BODY { barrier_try_wait(at(8), 0); }>("no barrier at 8");
  dies<BODY { if (thread() == 0) barrier_init(at(0), 1); }>("there is a barrier at 0");
  dies<BODY { if (thread() == 0) barrier_init(at(8), 1), copy_bulk(at(16), source, 16, at(8), 0); }>("no barrier_init_fence");
  dies<BODY {
    if (thread() == 0) barrier_init(at(8), 1);
    block_sync();
    if (thread() == 1) barrier_init_fence();  // of a thread that made no barrier
    block_sync();
    if (thread() == 0) copy_bulk(at(16), source, 16, at(8), 0);
  }>("no barrier_init_fence");
  dies<BODY { if (thread() == 3) shared_memory()[4] = 1, wait_for(at(0), 0); }>("or overwritten");
  dies<BODY { copy_async16(at(1024), source, 0); }>("16 bytes at 1024 are outside the 1024 bytes");
  dies<BODY { copy_async16(at(-16), source, 0); }>("outside the 1024 bytes", "no shared address of its block");
  dies<BODY { copy_async16(16, source, 0); }>("no shared address of its block");
  dies<BODY { copy_async16(at(24), source, 0); }>("shared address 24 is no multiple of 16");
  dies<BODY { copy_async16(at(16), source + 1, 0); }>("which is no multiple of 16");
  dies<BODY { copy_async16(at(16), source, 0); }>("where another copy is under way");
  dies<BODY { if (thread() == 0) copy_bulk(at(16), source, 24, at(0), 0); }>("copy_bulk of 24 bytes");
  dies<BODY {
    if (thread() == 7) {
      copy_async16(at(16), source, 0);
      copy_async_commit();
      shared_memory()[20] = 1;
      copy_async_wait<0>();
    }
  }>("somebody wrote to 20 while a copy");
  dies<BODY { load16(source + 2); }>("a load of 16 bytes");
  dies<BODY { load8(source + 1); }>("a load of 8 bytes");
  dies<BODY { load_cluster(at(16), 2); }>("block 2 of a cluster of 2");
  dies<BODY { load_cluster(at(18), 1); }>("shared address 18 is no multiple of 4");
  dies<BODY { if (block_x() == 0) while (true) warp_sync(), load_cluster(at(16), 1); }>("which has ended");
  dies<BODY { if (thread() < 31) warp_sync(); }>("in warp_sync", "warp_sync, but the lanes 0x80000000");
  dies<BODY { if (thread() < 32) thread() < 31 ? shuffle_xor(1, 1) : (warp_sync(), 0); }>("other lanes of its warp in");
  dies<BODY { if (thread() == 0) shared_memory()[1024] = 1; }>("something was written 0 bytes after", "AddressSanitizer");
  dies<BODY { if (thread() == 0) shared_memory()[-1] = 1; }>("something was written before", "AddressSanitizer");
  dies<BODY { permute(1, 2, 0x8000); }>("permute with the selector 0x8000");
}

// ---------------------------------------------------------------- the device

HALFBYTE_KERNEL(64, 1) count(int* const visits) {
  ++visits[((block_z() * blocks_y() + block_y()) * blocks_x() + block_x()) * threads() + thread()];
}

struct Sum {
  float a, b;
  float* sum;
};
HALFBYTE_KERNEL(32, 1) add(const Sum s) {
  if (thread() == 0) *s.sum = add_rn(s.a, s.b);
}

// Whatever the process has set, which it finds again.
void test_rounding() {
  float sum = 0;
  std::fesetround(FE_UPWARD);
  REQUIRE(launch<add>({.grid = {1, 1, 1}, .threads = 32, .shared_bytes = 0}, Sum{1.0f, 0x1p-30f, &sum}) == 0);
  REQUIRE(std::fegetround() == FE_UPWARD && std::fesetround(FE_TONEAREST) == 0 && sum == 1.0f);
}

void test_launches() {
  int visits[5 * 4 * 3 * 64] = {};
  const auto try_launch = [&](Launch how) { return launch<count>(how, static_cast<int*>(visits)); };
  REQUIRE(try_launch({.grid = {5, 4, 3}, .threads = 64, .shared_bytes = 232448}) == 0);
  for (int v : visits) REQUIRE(v == 1);
  REQUIRE(try_launch({.grid = {0, 1, 1}, .threads = 32, .shared_bytes = 0}) == 1);
  REQUIRE(try_launch({.grid = {1, 65536, 1}, .threads = 32, .shared_bytes = 0}) == 1);
  REQUIRE(try_launch({.grid = {1, 1, 1}, .threads = 40, .shared_bytes = 0}) == 1);
  REQUIRE(try_launch({.grid = {1, 1, 1}, .threads = 2048, .shared_bytes = 0}) == 1);
  REQUIRE(try_launch({.grid = {1, 1, 1}, .threads = 32, .shared_bytes = 232449}) == 1);
  REQUIRE(try_launch({.grid = {3, 1, 1}, .threads = 32, .shared_bytes = 0, .cluster = 2}) == 1);
  REQUIRE(try_launch({.grid = {16, 1, 1}, .threads = 32, .shared_bytes = 0, .cluster = 16}) == 1);
  Device device{};
  REQUIRE(device_count() == 1 && device_of(-1, device) == 0 && device.arch == 90 && device.processors == 132);
  REQUIRE(device_of(0, device) == 0 && device.shared_bytes == 232448 && device_of(1, device) == 101 && *device_error(101));
  halfbyte_cuda_emulate(80, 108, 166912, 0);
  REQUIRE(device_of(0, device) == 0 && device.arch == 80 && device.processors == 108 && device.shared_bytes == 166912);
  REQUIRE(try_launch({.grid = {2, 1, 1}, .threads = 32, .shared_bytes = 0, .cluster = 2}) == 1);
  use_seed(0);
}

}  // namespace
}  // namespace halfbyte::cuda

int main() {
  using namespace halfbyte::cuda;
  test_numbers();
  test_warps();
  test_copies();
  test_bulk_copies();
  for (unsigned seed = 0; seed < seeds; ++seed) {
    use_seed(seed);
    REQUIRE(run_ring(false, false) == 0);
  }
  std::thread others[2];  // each launches on its own
  for (auto& t : others) t = std::thread([] { for (int i = 0; i < 10; ++i) test_clusters(); });
  for (auto& t : others) t.join();
  test_clusters();
  test_launches();
  test_rounding();
  test_deaths();
  std::puts("the emulated GPU does as it should");
}
