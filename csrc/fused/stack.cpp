// Runs a stack: sharing over threads, memory.
//
// Two ways to share the work:
//   by sequences   each thread takes sequences and runs them through all blocks alone: no barriers, and what a block
//                  passes on stays in the L2 of its core. Where there are enough of them.
//   together       all threads work on each phase, with barriers between them.
#include "fused/stack.h"

#include <algorithm>
#include <new>

#include "core/workspace.h"
#include "fused/runner.h"

namespace halfbyte::fused {
namespace {

// Rows that use a weight often enough, once it is there.
constexpr int64_t rows_of_unit = 96;

thread_local Workspace workspace;

}  // namespace

void run(const Stack& stack, const Call& call) {
  check_call(stack, call);
  if (call.batch == 0 || call.tokens == 0) return;
  const Kernels kernels;
  const int wanted = call.threads > 0 ? call.threads : default_threads();
  // By sequences, where that keeps all threads busy to the end.
  const int64_t per_unit = std::min(call.batch, ceil_div(rows_of_unit, call.tokens)), units = ceil_div(call.batch, per_unit);
  const bool apart = wanted > 1 && (units % wanted == 0 || units >= 4 * wanted);
  const int64_t batch = apart ? per_unit : call.batch;
  const Sizes sizes(stack, call, kernels, batch, apart ? 1 : wanted);
  const int64_t share_bytes = round_up(2 * wanted * int64_t{sizeof(Share)}, 64);
  uint8_t* const memory = workspace.reserve(share_bytes + (apart ? wanted : 1) * sizes.total());
  Share* const shares = new (memory) Share[2 * static_cast<size_t>(wanted)];

  parallel(wanted, [&](Team& team) {
    Shares all(shares);
    if (!apart) {
      Runner(stack, call, kernels, 0, call.batch, sizes, Room(sizes, memory + share_bytes), team, all, -1).run();
      return;
    }
    const Room room(sizes, memory + share_bytes + team.rank * sizes.total());
    std::atomic<int> arrived{0};
    Team alone(0, 1, arrived);
    Shares mine(shares + wanted + team.rank);
    all.run(team, units, [&](int64_t unit) {
      const Piece own = piece(call.batch, unit, units);  // nearly equal: float sums of sparse weights depend on whether rows are few
      Runner(stack, call, kernels, own.begin, own.end - own.begin, sizes, room, alone, mine, team.rank).run();
    });
  });
}

}  // namespace halfbyte::fused
