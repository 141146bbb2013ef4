// The names of cuda/ptx.cuh on the CPU. Every CUDA thread is a fiber (machine.h); copies happen as late as they may.
//
// What is wrong on a GPU or a matter of luck ends the process with a message that names the thread: addresses out of the
// block's shared memory, odd alignments, collectives without all their threads, threads that wait for each other.
#pragma once
#include "cuda/emulated/numbers.h"

#define HALFBYTE_DEVICE inline
#define HALFBYTE_KERNEL(most_threads, least_blocks) void

namespace halfbyte::cuda {

struct alignas(16) Word4 {
  uint32_t x, y, z, w;
};
struct alignas(8) Word2 {
  uint32_t x, y;
};

using SharedAddress = uint32_t;  // rank of the block in its cluster << 24 | offset in its shared memory + 1024

namespace emulated {

struct Place {
  int thread, threads;
  int block[3], blocks[3];
  int rank;
  char* shared;
};
// Of the fiber that runs on this thread of the process. "initial-exec": read without a call, in a loaded library too.
extern constinit thread_local const Place* here __attribute__((tls_model("initial-exec")));

[[noreturn]] void fail(const char* message, ...) __attribute__((format(printf, 1, 2)));  // names the running thread
void copy_async_wait_for(int pending);

inline void need_aligned(const void* p, unsigned bytes) {
  if (reinterpret_cast<uintptr_t>(p) % bytes) fail("a load of %u bytes at %p, which is not aligned", bytes, p);
}

}  // namespace emulated

inline int thread() { return emulated::here->thread; }
inline int threads() { return emulated::here->threads; }
inline int block_x() { return emulated::here->block[0]; }
inline int block_y() { return emulated::here->block[1]; }
inline int block_z() { return emulated::here->block[2]; }
inline int blocks_x() { return emulated::here->blocks[0]; }
inline int blocks_y() { return emulated::here->blocks[1]; }

inline char* shared_memory() { return emulated::here->shared; }
SharedAddress shared_address(const void* p);

void block_sync();
void warp_sync();
float shuffle_xor(float v, int mask);

inline Word4 load16(const void* p) {
  emulated::need_aligned(p, 16);
  return *static_cast<const Word4*>(__builtin_assume_aligned(p, 16));
}
inline Word2 load8(const void* p) {
  emulated::need_aligned(p, 8);
  return *static_cast<const Word2*>(__builtin_assume_aligned(p, 8));
}
inline void prefetch_into_l2(const void*) {}
inline uint64_t normal_policy() { return 0; }
inline uint64_t evict_first_policy() { return 0; }

// Copies of the thread, made when it waits for their group, not before. Until then their bytes are poison.
void copy_async16(SharedAddress to, const void* from, uint64_t policy);
void copy_async_commit();
template <int pending>
inline void copy_async_wait() {
  static_assert(pending >= 0);
  emulated::copy_async_wait_for(pending);
}

// Copies of a barrier, made when somebody waits for a phase that lacks nothing else.
void barrier_init(SharedAddress barrier, int arrivals);
void barrier_init_fence();
void async_proxy_fence();
void barrier_arrive_expect(SharedAddress barrier, int bytes);
bool barrier_try_wait(SharedAddress barrier, int parity);
void copy_bulk(SharedAddress to, const void* from, int bytes, SharedAddress barrier, uint64_t policy);

void wait_for_kernel_before();
inline void let_next_kernel_start() {}  // kernels run one after the other
void cluster_sync();
inline void cluster_wait() { cluster_sync(); }
uint32_t load_cluster(SharedAddress address, int rank);

// Sums in double, rounded once; those of mma_s8 are exact and wrap.
void mma_f16(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1);
void mma_bf16(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1);
void mma_s8(int (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1);
void mma_sparse_s8(int (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[4], uint32_t indices);

inline uint32_t and_or(uint32_t a, uint32_t b, uint32_t c) { return (a & b) | c; }
inline uint32_t and_xor(uint32_t a, uint32_t b, uint32_t c) { return (a & b) ^ c; }

inline uint32_t permute(uint32_t a, uint32_t b, uint32_t select) {
  // __byte_perm ignores the top bit of a nibble, the instruction makes copies of a sign of it: no caller can want it.
  if (select & 0x8888) emulated::fail("permute with the selector %#x", select);
  const uint64_t bytes = static_cast<uint64_t>(b) << 32 | a;
  uint32_t d = 0;
  for (int i = 0; i < 4; ++i) d |= static_cast<uint32_t>(bytes >> 8 * (select >> 4 * i & 7) & 0xff) << 8 * i;
  return d;
}

inline uint32_t sub_f16x2(uint32_t a, uint32_t b) {
  using namespace emulated;
  return pair(sub_f16(low16(a), low16(b)), sub_f16(high16(a), high16(b)));
}
inline uint32_t fma_f16x2(uint32_t a, uint32_t b, uint32_t c) {
  using namespace emulated;
  return pair(fma_f16(low16(a), low16(b), low16(c)), fma_f16(high16(a), high16(b), high16(c)));
}
inline uint32_t fma_bf16x2(uint32_t a, uint32_t b, uint32_t c) {
  using namespace emulated;
  return pair(fma_bf16(low16(a), low16(b), low16(c)), fma_bf16(high16(a), high16(b), high16(c)));
}

inline float f16_to_float(uint16_t v) { return emulated::widen_f16(v); }
inline float bf16_to_float(uint16_t v) { return emulated::widen_bf16(v); }
inline uint16_t float_to_f16(float v) { return emulated::narrow_f16(v); }
inline uint16_t float_to_bf16(float v) { return emulated::narrow_bf16(v); }
inline uint32_t floats_to_bf16x2(float low, float high) { return emulated::pair(float_to_bf16(low), float_to_bf16(high)); }
inline float bits_to_float(uint32_t v) { return std::bit_cast<float>(v); }
inline uint32_t float_to_bits(float v) { return std::bit_cast<uint32_t>(v); }

// As written only with -ffp-contract=off.
inline float add_rn(float a, float b) { return a + b; }
inline float mul_rn(float a, float b) { return a * b; }
inline float div_rn(float a, float b) { return a / b; }
inline float fma_rn(float a, float b, float c) { return std::fma(a, b, c); }
inline float rsqrt_rn(float a) { return 1.0f / std::sqrt(a); }

}  // namespace halfbyte::cuda
