// parallel(): one parallel region on the OpenMP runtime that is already in the process (torch's), on our own
// std::thread pool where there is none. Never a second pool beside torch's: the idle team of each would spin on the
// other's core.
#pragma once
#include <atomic>
#include <string>

namespace halfbyte {

// The threads of one region. `size` may be smaller than what was asked for.
class Team {
 public:
  Team(int rank, int size, std::atomic<int>& arrived) : rank(rank), size(size), arrived_(arrived) {}
  void barrier();  // every member must call it equally often
  const int rank, size;

 private:
  std::atomic<int>& arrived_;  // counts all arrivals of the region; barrier number b is complete at b * size
  int passed_ = 0;
};

using RegionBody = void (*)(void* context, Team& team);
void parallel_region(int threads, RegionBody body, void* context);

// Runs body(team) on up to `threads` threads, the caller being one of them. The body must not throw.
template <class Body>
void parallel(int threads, Body&& body) {
  parallel_region(threads, [](void* context, Team& team) { (*static_cast<Body*>(context))(team); }, &body);
}

// Threads a call uses when it does not say: set_num_threads(), else the OpenMP runtime's (which torch sets), else the
// cores this process may run on.
int default_threads();
void set_num_threads(int threads);  // 0: follow the runtime again

struct ThreadRuntime {
  const char* name;  // "openmp" or "std::thread"
  std::string library;
};
ThreadRuntime thread_runtime();

}  // namespace halfbyte
