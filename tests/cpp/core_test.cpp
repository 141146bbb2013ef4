// Random calls of the C++ core on every kernel against triple loops, alone and from many threads at once. Built with
// sanitizers (tests/cpp/CMakeLists.txt). Operands end or begin at an inaccessible page, so that a vector load or a
// masked store one byte too far is seen even where the sanitizer does not instrument the intrinsic.
//
// core_test [calls per kernel] [seed]
#include <thread>

#include "core/cpu_features.h"
#include "tests.h"

using namespace halfbyte;
using namespace halfbyte::truth;

namespace {

std::vector<std::string> runnable() {
  std::vector<std::string> names;
  for (const IsaInfo& info : isas()) {
    if (info.bit & supported_isas() & built_isas()) names.emplace_back(info.name);
  }
  return names;
}

// Threads that share weights, force different instruction sets and each ask for a team.
void test_concurrent(unsigned seed, int calls) {
  Rng rng(seed);
  std::vector<std::unique_ptr<Weight>> weights;
  for (int i = 0; i < 12; ++i) weights.push_back(std::make_unique<Weight>(rng, 40 + 60 * (i % 3), 33 + 200 * (i % 3)));
  const std::vector<std::string> names = runnable();
  std::vector<std::thread> threads;
  for (unsigned t = 0; t < 6; ++t) {
    threads.emplace_back([&, t] {
      Rng own(seed + t);
      const std::string& isa = names[t % names.size()];
      force_isa(isa);
      for (int i = 0; i < calls; ++i) {
        const Weight& w = *weights[static_cast<size_t>(below(own, 12))];
        test_linear(own, w, isa, rows_near(own), 1 + below(own, 3));
      }
    });
  }
  for (std::thread& thread : threads) thread.join();
}

}  // namespace

int main(int argc, char** argv) {
  const int calls = argc > 1 ? std::atoi(argv[1]) : 200;
  const unsigned seed = argc > 2 ? static_cast<unsigned>(std::atoi(argv[2])) : 1;
  for (const std::string& isa : runnable()) {
    force_isa(isa);
    Rng rng(seed);
    for (int i = 0; i < calls; ++i) {
      test_quantize_rows(rng, isa);
      test_embedding(rng, isa);
      test_attention(rng, isa);
      for (int repeat = 0; repeat < 3; ++repeat) {
        const Weight w(rng, size_near(rng, 32, 150), size_near(rng, 64, 200));
        test_linear(rng, w, isa, rows_near(rng), 1 + below(rng, 3));
        test_linear(rng, w, isa, 1 + below(rng, 8), 1);
      }
    }
    // Enough work that the driver uses every thread it may, and more rows than it quantizes at once.
    for (int i = 0; i < calls / 30; ++i) {
      const Weight w(rng, 128 + below(rng, 128), 256 + below(rng, 200));
      test_linear(rng, w, isa, 64 + below(rng, 64), 2 + below(rng, 3));
    }
    for (int i = 0; i < calls / 10; ++i) {
      test_stack(rng, isa);
      test_sparse(rng, isa);
    }
    test_sparse_large(rng, isa);
    for (int i = 0; i < 4; ++i) test_linear(rng, Weight(rng, 3, 16400), isa, 400, 2);
    std::printf("core_test: %s: %d rounds\n", isa.c_str(), calls);
    force_isa("");
  }
  Rng rng(seed);
  test_linear_errors(rng);
  test_sparse_errors(rng);
  expect_invalid("an unknown instruction set", [] { force_isa("avx1024"); });
  test_concurrent(seed, calls / 5);
  test_sparse_concurrent(seed, runnable(), calls / 5);
  std::printf("core_test: 6 threads at once: %d calls each\n", calls / 5);
}
