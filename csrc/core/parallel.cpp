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

#include <condition_variable>
#include <cstring>
#include <mutex>
#include <thread>
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

// Spins for about 20 us, then gives the core away: the partner may not have one (more threads than cores).
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

struct RegionFlag {
  RegionFlag() { inside_region = true; }
  ~RegionFlag() { inside_region = false; }
};

// ---------------------------------------------------------------- OpenMP

struct OpenMP {
  void (*parallel)(void (*)(void*), void*, unsigned, unsigned) = nullptr;
  int (*thread_num)() = nullptr;
  int (*num_threads)() = nullptr;
  int (*max_threads)() = nullptr;
  int (*in_parallel)() = nullptr;
  std::string library;
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

bool looks_like_openmp(const char* path) {
  const char* slash = std::strrchr(path, '/');
  const char* file = slash ? slash + 1 : path;
  return !std::strncmp(file, "libgomp", 7) || !std::strncmp(file, "libomp", 6) || !std::strncmp(file, "libiomp5", 8);
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

const OpenMP* find_openmp() {
  auto* omp = new OpenMP;  // found once per process and kept for good
  if (resolve_all(RTLD_DEFAULT, *omp)) {
    Dl_info info;
    if (dladdr(reinterpret_cast<void*>(omp->parallel), &info) && info.dli_fname) omp->library = info.dli_fname;
    return omp;
  }
  std::vector<std::string> paths;
  dl_iterate_phdr(
      [](dl_phdr_info* info, size_t, void* out) {
        if (info->dlpi_name && looks_like_openmp(info->dlpi_name))
          static_cast<std::vector<std::string>*>(out)->push_back(info->dlpi_name);
        return 0;
      },
      &paths);
  for (const std::string& path : paths) {
    void* handle = dlopen(path.c_str(), RTLD_NOLOAD | RTLD_LAZY);
    if (handle && resolve_all(handle, *omp)) {
      omp->library = path;
      return omp;
    }
  }
  delete omp;
  return nullptr;
}

const OpenMP* openmp() {
  static std::atomic<const OpenMP*> found{nullptr};
  static std::atomic<unsigned long long> searched_at{0};
  static std::mutex searching;
  if (forked.load(std::memory_order_relaxed)) return nullptr;
  if (const OpenMP* omp = found.load(std::memory_order_acquire)) return omp;
  const unsigned long long now = loaded_libraries();
  if (now == searched_at.load(std::memory_order_relaxed)) return nullptr;
  std::lock_guard lock(searching);
  if (!found.load()) found.store(find_openmp(), std::memory_order_release);
  searched_at.store(now, std::memory_order_relaxed);
  return found.load();
}

struct OpenMPCall {
  const OpenMP* omp;
  RegionBody body;
  void* context;
  std::atomic<int> arrived{0};
};

void openmp_member(void* data) {
  auto& call = *static_cast<OpenMPCall*>(data);
  RegionFlag flag;
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
      while (static_cast<int>(workers_.size()) < threads - 1) {
        workers_.emplace_back(&Pool::work, this, static_cast<int>(workers_.size()) + 1, generation_.load());
      }
      body_ = body, context_ = context, size_ = threads, arrived_ = &arrived;
      running_.store(threads - 1);
      generation_.fetch_add(1);
    }
    wake_.notify_all();
    {
      RegionFlag flag;
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
        RegionFlag flag;
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

std::atomic<Pool*> current_pool{nullptr};

Pool& pool() {
  static const bool registered = [] {
    current_pool.store(new Pool);  // never destroyed: its threads may outlive static destructors
    return true;
  }();
  (void)registered;
  return *current_pool.load();
}

// The child of a fork has one thread: whatever pool or OpenMP team it inherits is dead.
const int fork_handler = pthread_atfork(nullptr, nullptr, [] {
  forked.store(true);
  inside_region = false;
  if (current_pool.load()) current_pool.store(new Pool);
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
    } else if (pool().run(threads, body, context)) {
      return;
    }
  }
  std::atomic<int> arrived{0};
  Team team(0, 1, arrived);
  body(context, team);
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
