// The two backends of parallel_region() and the choice between them.
//
// OpenMP is called through the GNU entry points (GOMP_parallel, omp_get_*), which LLVM's and Intel's runtimes export
// too; they are looked up at run time, so the extension links no OpenMP. After fork() an OpenMP runtime's threads are
// gone and GNU's hangs, therefore a child process uses a fresh pool of our own.
#include "core/parallel.h"

#include <dlfcn.h>
#include <link.h>
#include <pthread.h>
#include <sched.h>
#if defined(__x86_64__)
#include <xmmintrin.h>
#endif

#include <condition_variable>
#include <cstring>
#include <mutex>
#include <system_error>
#include <thread>
#include <utility>
#include <vector>

namespace halfbyte {
namespace {

std::atomic<int> requested_threads{0};
std::atomic<bool> forked{false};
thread_local bool inside_region = false;  // a nested region runs on the calling thread

inline void pause() {
#if defined(__x86_64__)
  asm volatile("pause");
#elif defined(__aarch64__)
  asm volatile("yield");
#endif
}

// Spins for 20-90 us (a pause takes 40 cycles or 140), then gives the core away: the partner may not have one (more threads than cores).
class Backoff {
 public:
  void wait() {
    if (++spins_ < 2000) {
      pause();
    } else {
      sched_yield();
    }
  }

 private:
  int spins_ = 0;
};

// What holds while a thread works in a region: nested regions stay on it, and it computes with the default float mode
// (round to nearest, subnormals kept), whatever the process set on its other threads. Else a result could depend on
// which thread computed it.
class InRegion {
 public:
  InRegion() {
    inside_region = true;
#if defined(__x86_64__)
    saved_ = _mm_getcsr();
    if ((saved_ & mode_bits) != 0) _mm_setcsr(saved_ & ~mode_bits);
#endif
  }
  ~InRegion() {
#if defined(__x86_64__)
    if ((saved_ & mode_bits) != 0) _mm_setcsr(saved_);
#endif
    inside_region = false;
  }

 private:
#if defined(__x86_64__)
  static constexpr unsigned mode_bits = 0xe040;  // flush to zero, rounding mode, denormals are zeros
  unsigned saved_;
#endif
};

// ---------------------------------------------------------------- OpenMP

struct OpenMP {
  void (*parallel)(void (*)(void*), void*, unsigned, unsigned) = nullptr;
  int (*thread_num)() = nullptr;
  int (*num_threads)() = nullptr;
  int (*max_threads)() = nullptr;
  int (*in_parallel)() = nullptr;
  std::string library;
  bool torchs = false;  // the one that torch is linked to: no better one will come
};

template <class Function>
bool resolve(void* handle, const char* symbol, Function& function) {
  function = reinterpret_cast<Function>(dlsym(handle, symbol));
  return function != nullptr;
}

bool resolve_all(void* handle, OpenMP& omp) {
  return resolve(handle, "GOMP_parallel", omp.parallel) && resolve(handle, "omp_get_thread_num", omp.thread_num) &&
         resolve(handle, "omp_get_num_threads", omp.num_threads) &&
         resolve(handle, "omp_get_max_threads", omp.max_threads) &&
         resolve(handle, "omp_in_parallel", omp.in_parallel);
}

// Paths of the loaded libraries whose file name starts with one of the given ones.
std::vector<std::string> loaded(std::vector<const char*> names) {
  std::pair<std::vector<const char*>, std::vector<std::string>> search{std::move(names), {}};
  dl_iterate_phdr(
      [](dl_phdr_info* info, size_t, void* out) {
        auto& [names, paths] = *static_cast<decltype(search)*>(out);
        const char* slash = info->dlpi_name ? std::strrchr(info->dlpi_name, '/') : nullptr;
        for (const char* name : names) {
          if (slash && !std::strncmp(slash + 1, name, std::strlen(name))) paths.emplace_back(info->dlpi_name);
        }
        return 0;
      },
      &search);
  return search.second;
}

// The OpenMP functions that a loaded library defines or is linked to.
bool resolve_from(const std::string& path, OpenMP& omp) {
  void* const handle = dlopen(path.c_str(), RTLD_NOLOAD | RTLD_LAZY);
  if (!handle) return false;
  const bool complete = resolve_all(handle, omp);
  Dl_info info;
  if (complete && dladdr(reinterpret_cast<void*>(omp.parallel), &info) && info.dli_fname) omp.library = info.dli_fname;
  dlclose(handle);  // the library stays: whoever loaded it holds it, and torch cannot be unloaded
  return complete;
}

// The loader counts libraries ever loaded; comparing that number is how a torch imported after us is noticed at the
// price of one short call instead of a symbol search.
unsigned long long loaded_libraries() {
  unsigned long long count = 0;
  dl_iterate_phdr(
      [](dl_phdr_info* info, size_t, void* out) {
        *static_cast<unsigned long long*>(out) = info->dlpi_adds;
        return 1;
      },
      &count);
  return count;
}

// torch's runtime first (several may be loaded, scikit-learn brings one of its own), then any.
const OpenMP* find_openmp() {
  OpenMP omp;
  bool found = false;
  for (const std::string& path : loaded({"libtorch_cpu.so"})) found = omp.torchs = found || resolve_from(path, omp);
  for (const std::string& path : loaded({"libgomp", "libomp", "libiomp5"})) found = found || resolve_from(path, omp);
  return found ? new OpenMP(omp) : nullptr;  // a handful per process at most, kept: other threads may be using it
}

const OpenMP* openmp() {
  static std::atomic<const OpenMP*> current{nullptr};
  static std::atomic<unsigned long long> searched_at{0};
  static std::mutex searching;
  if (forked.load(std::memory_order_relaxed)) return nullptr;
  const OpenMP* const known = current.load(std::memory_order_acquire);
  if (known && known->torchs) return known;
  const unsigned long long now = loaded_libraries();
  if (now == searched_at.load(std::memory_order_relaxed)) return known;
  std::lock_guard lock(searching);
  if (const OpenMP* omp = find_openmp()) current.store(omp, std::memory_order_release);
  searched_at.store(now, std::memory_order_relaxed);
  return current.load();
}

struct OpenMPCall {
  const OpenMP* omp;
  RegionBody body;
  void* context;
  std::atomic<int> arrived{0};
};

void openmp_member(void* data) {
  auto& call = *static_cast<OpenMPCall*>(data);
  InRegion here;
  Team team(call.omp->thread_num(), call.omp->num_threads(), call.arrived);
  call.body(call.context, team);
}

// ---------------------------------------------------------------- our own pool

class Pool {
 public:
  // False when another thread's region occupies the pool: the caller then works alone rather than wait.
  bool run(int threads, RegionBody body, void* context) {
    std::unique_lock busy(busy_, std::try_to_lock);
    if (!busy) return false;
    std::atomic<int> arrived{0};
    {
      std::lock_guard lock(mutex_);
      try {
        while (static_cast<int>(workers_.size()) < threads - 1) {
          workers_.emplace_back(&Pool::work, this, static_cast<int>(workers_.size()) + 1, generation_.load());
        }
      } catch (const std::system_error&) {  // the system grants no more threads: fewer do the same work
        threads = static_cast<int>(workers_.size()) + 1;
      }
      body_ = body, context_ = context, size_ = threads, arrived_ = &arrived;
      running_.store(threads - 1);
      generation_.fetch_add(1);
    }
    wake_.notify_all();
    {
      InRegion here;
      Team team(0, threads, arrived);
      body(context, team);
    }
    Backoff backoff;
    while (running_.load(std::memory_order_acquire) != 0) backoff.wait();
    return true;
  }

 private:
  void work(int rank, unsigned seen) {
    for (;;) {
      for (int spin = 0; spin < 20000 && generation_.load(std::memory_order_acquire) == seen; ++spin) pause();
      std::unique_lock lock(mutex_);
      wake_.wait(lock, [&] { return generation_.load() != seen; });
      seen = generation_.load();
      if (rank >= size_) continue;
      const RegionBody body = body_;
      void* const context = context_;
      Team team(rank, size_, *arrived_);
      lock.unlock();
      {
        InRegion here;
        body(context, team);
      }
      running_.fetch_sub(1, std::memory_order_release);
    }
  }

  std::mutex busy_, mutex_;
  std::condition_variable wake_;
  std::vector<std::thread> workers_;
  std::atomic<unsigned> generation_{0};
  std::atomic<int> running_{0};
  RegionBody body_ = nullptr;
  void* context_ = nullptr;
  int size_ = 0;
  std::atomic<int>* arrived_ = nullptr;
};

// Made when the extension is loaded, so that no fork can catch it half made; never destroyed, for its threads may
// outlive static destructors.
std::atomic<Pool*> current_pool{new Pool};
bool openmp_at_fork = false;

// The child of a fork has one thread: whatever pool or OpenMP team it inherits is dead. A runtime loaded later is not.
const int fork_handler = pthread_atfork([] { openmp_at_fork = openmp() != nullptr; }, nullptr, [] {
  forked.store(forked.load() || openmp_at_fork);
  inside_region = false;
  current_pool.store(new Pool);
});

int affinity_cores() {
#if defined(__linux__)
  cpu_set_t set;
  if (sched_getaffinity(0, sizeof set, &set) == 0) return CPU_COUNT(&set);
#endif
  const unsigned cores = std::thread::hardware_concurrency();
  return cores ? static_cast<int>(cores) : 1;
}

}  // namespace

void Team::barrier() {
  ++passed_;
  if (size == 1) return;
  arrived_.fetch_add(1, std::memory_order_acq_rel);
  Backoff backoff;
  while (arrived_.load(std::memory_order_acquire) < passed_ * size) backoff.wait();
}

void parallel_region(int threads, RegionBody body, void* context) {
  if (threads > 1 && !inside_region) {
    if (const OpenMP* omp = openmp()) {
      if (!omp->in_parallel()) {
        OpenMPCall call{omp, body, context};
        omp->parallel(openmp_member, &call, static_cast<unsigned>(threads), 0);
        return;
      }
    } else if (current_pool.load()->run(threads, body, context)) {
      return;
    }
  }
  const bool nested = inside_region;
  {
    InRegion here;
    std::atomic<int> arrived{0};
    Team team(0, 1, arrived);
    body(context, team);
  }
  inside_region = nested;
}

int default_threads() {
  if (const int requested = requested_threads.load(std::memory_order_relaxed)) return requested;
  if (const OpenMP* omp = openmp()) return omp->max_threads();
  static const int cores = affinity_cores();
  return cores;
}

void set_num_threads(int threads) { requested_threads.store(threads); }

ThreadRuntime thread_runtime() {
  const OpenMP* omp = openmp();
  return omp ? ThreadRuntime{"openmp", omp->library} : ThreadRuntime{"std::thread", ""};
}

}  // namespace halfbyte
