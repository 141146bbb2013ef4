// How the threads of a region divide work: in nearly equal pieces, each of which its owner takes task by task while the
// others, once done with their own, help. For shared machines, where a core may lose a tenth of its time. Who computes
// what changes no result.
#pragma once
#include <atomic>
#include <cstdint>

#include "core/parallel.h"

namespace halfbyte {

constexpr int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// [0, total) in `parts` nearly equal pieces.
struct Piece {
  int64_t begin, end;
};
inline Piece piece(int64_t total, int64_t index, int64_t parts) {
  return {total * index / parts, total * (index + 1) / parts};
}
inline Piece piece(int64_t total, const Team& team) { return piece(total, team.rank, team.size); }

// The tasks of one thread that nobody has taken yet, per turn. On a cache line of its own, which nobody else touches
// until help is due.
struct alignas(64) Share {
  std::atomic<int64_t> taken[2] = {0, 0};
};

// One per thread and region. Phases take turns: one counter is set back while the other is in use.
class Shares {
 public:
  explicit Shares(Share* shares) : shares_(shares) {}

  // All threads have finished what each prepared for the coming phase, and its tasks can be taken.
  void next_phase(Team& team) {
    team.barrier();
    turn_ = 1 - turn_;
    shares_[team.rank].taken[1 - turn_].store(0, std::memory_order_relaxed);
  }

  // Calls work(task) for tasks of [0, total), once each over all threads.
  template <class Work>
  void run(const Team& team, int64_t total, Work&& work) const {
    if (total <= team.size) {  // one for each, who is at it already: to ask the others would cost more than it brings
      if (team.rank < total) work(team.rank);
      return;
    }
    for (int helped = 0; helped < team.size; ++helped) {
      const int owner = (team.rank + helped) % team.size;
      const Piece share = piece(total, owner, team.size);
      std::atomic<int64_t>& taken = shares_[owner].taken[turn_];
      for (int64_t task; (task = share.begin + taken.fetch_add(1, std::memory_order_relaxed)) < share.end;) work(task);
    }
  }

 private:
  Share* shares_;
  int turn_ = 0;
};

}  // namespace halfbyte
