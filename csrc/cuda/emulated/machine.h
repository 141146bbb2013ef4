// One launch on the emulated device: clusters of blocks, one after another, each thread of them a fiber.
//
// A fiber runs until it has to wait: in a barrier, or for the other lanes of its warp. The machine then resumes the next
// lane of the warp that can run; when it has been through them, it draws the next warp. Nobody waits in real time: a wait
// is over when the thread that ends it has said so, and when nobody can run the threads wait for each other.
#pragma once
#include <cstdint>
#include <deque>
#include <string>
#include <vector>

#include "cuda/emulated/fiber.h"
#include "cuda/launch.cuh"

namespace halfbyte::cuda::emulated {

constexpr SharedAddress shared_base = 1024;  // where a block's shared memory begins on an H100: 0 is no address
constexpr int rank_shift = 24;
constexpr uint8_t poison = 0xcd;

unsigned order_seed();

struct Copy {
  char* to;
  const void* from;
  int bytes;
};

// An mbarrier. Its 8 bytes of shared memory hold only its number.
struct Barrier {
  uint32_t offset;
  int arrivals, missing;                // of a phase; of this phase
  int64_t expected = 0, under_way = 0;  // bytes of this phase; of its copies
  unsigned phase = 0;
  int maker = 0;
  bool fenced = false;
  std::vector<Copy> copies{};

  bool complete_with_copies() const { return missing == 0 && expected == under_way; }
};

enum class Wait : uint8_t { none, done, block, cluster, warp, barrier };
enum class Collective : uint8_t { sync, shuffle, mma_f16, mma_bf16, mma_s8, mma_sparse_s8 };
const char* name_of(Collective c);

// What the lanes of a warp bring to a collective; their results are in d.
struct Registers {
  alignas(16) uint32_t d[4][32], a[4][32], b[5][32];
};

struct Block;
struct Warp;
class Machine;

struct Thread : Place {
  Fiber fiber;
  Machine* machine;
  Block* block_of;
  Warp* warp;
  Wait wait;
  std::vector<Copy> copies;    // cp.async, not yet made
  std::vector<size_t> groups;  // where each of their groups ends in `copies`
  Barrier* barrier;            // that it waits for
  int parity;
  bool refused;                // it waited in vain, nobody can run
};

struct Warp {
  Thread* lanes;  // 32
  uint32_t ready, arrived, returned;  // a bit per lane
  Collective collective;
  size_t position;  // in Machine::runnable_, where ready
  Registers registers;
};

struct Block {
  char* shared;
  int shared_bytes;
  Thread* threads;
  int count, done, in_block_sync;
  std::vector<bool> under_way;   // of each 16 bytes of shared memory: a copy will write them
  std::deque<Barrier> barriers;  // in the order of their numbers
};

class Machine {
 public:
  Machine(const Launch& how, const char* name, void (*kernel)(const void*), const void* args);
  Machine(const Machine&) = delete;
  ~Machine();
  void run();

  void block(Thread& me, Wait why);  // until wake()
  void yield();
  void wake(Thread& thread);
  void wake(Warp& warp, uint32_t lanes);
  void wait_for_all(Thread& me, Wait where);  // of the block or cluster
  void progress() { idle_ = 0; }
  uint64_t random();
  std::string describe(const Thread& thread) const;

  const int arch;
  Launch how;
  std::vector<Block> blocks;  // of the cluster

 private:
  static void entry();
  void begin(int64_t cluster);
  void end();
  void leave(Thread& me);
  void sleep(Thread& thread);
  Thread* next();
  void switch_to(Thread* to, bool leave_for_good = false);
  void nobody_can_run();
  std::string describe_wait(const Thread& thread) const;

  std::string name_;
  void (*kernel_)(const void*);
  const void* args_;
  std::vector<Thread> threads_;
  std::vector<Warp> warps_;
  std::vector<Warp*> runnable_;
  Fiber main_;
  Thread* running_ = nullptr;
  Warp* warp_ = nullptr;  // whose lanes run
  uint32_t turn_ = 0;     // its lanes that have not had their turn
  int first_lane_ = 0;
  bool descending_ = false;
  int left_ = 0, in_cluster_sync_ = 0, idle_ = 0;
  uint64_t random_state_;
};

inline Thread& me() { return *const_cast<Thread*>(static_cast<const Thread*>(here)); }

}  // namespace halfbyte::cuda::emulated
