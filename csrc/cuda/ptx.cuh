// What the kernels say to the GPU: one thin wrapper per instruction or special register. Kernels use C++ and these alone.
//
// With HALFBYTE_CUDA_EMULATED the same names come from emulated/ptx.h, and the kernels run on the CPU (tests).
#pragma once
#ifdef HALFBYTE_CUDA_EMULATED
#include "cuda/emulated/ptx.h"
#else
#include <cstdint>

#define HALFBYTE_DEVICE __device__ __forceinline__
#define HALFBYTE_KERNEL(most_threads, least_blocks) __global__ void __launch_bounds__(most_threads, least_blocks)

namespace halfbyte::cuda {

struct alignas(16) Word4 {
  uint32_t x, y, z, w;
};
struct alignas(8) Word2 {
  uint32_t x, y;
};

using SharedAddress = uint32_t;  // an address in the shared memory of this block

// Where a thread is.
HALFBYTE_DEVICE int thread() { return threadIdx.x; }
HALFBYTE_DEVICE int threads() { return blockDim.x; }
HALFBYTE_DEVICE int block_x() { return blockIdx.x; }
HALFBYTE_DEVICE int block_y() { return blockIdx.y; }
HALFBYTE_DEVICE int block_z() { return blockIdx.z; }
HALFBYTE_DEVICE int blocks_x() { return gridDim.x; }
HALFBYTE_DEVICE int blocks_y() { return gridDim.y; }

// The dynamic shared memory of the block, 128-byte aligned.
HALFBYTE_DEVICE char* shared_memory() {
  extern __shared__ __align__(128) char memory[];
  return memory;
}
HALFBYTE_DEVICE SharedAddress shared_address(const void* p) {
  return static_cast<SharedAddress>(__cvta_generic_to_shared(p));
}

HALFBYTE_DEVICE void block_sync() { __syncthreads(); }
HALFBYTE_DEVICE void warp_sync() { __syncwarp(); }
HALFBYTE_DEVICE float shuffle_xor(float v, int mask) { return __shfl_xor_sync(~0u, v, mask); }

// Global memory. (Not ld.global.nc: a kernel that starts early reads what another one is still writing when it starts.)
HALFBYTE_DEVICE Word4 load16(const void* p) {
  Word4 v;
  asm volatile("ld.global.v4.u32 {%0, %1, %2, %3}, [%4];" : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w) : "l"(p));
  return v;
}
HALFBYTE_DEVICE Word2 load8(const void* p) {
  Word2 v;
  asm volatile("ld.global.v2.u32 {%0, %1}, [%2];" : "=r"(v.x), "=r"(v.y) : "l"(p));
  return v;
}

// Which lines L2 gives up first: those of a stream that is read once.
HALFBYTE_DEVICE uint64_t evict_first_policy() {
  uint64_t policy;
  asm volatile("createpolicy.fractional.L2::evict_first.b64 %0, 1.0;" : "=l"(policy));
  return policy;
}

HALFBYTE_DEVICE uint64_t normal_policy() {
  uint64_t policy;
  asm volatile("createpolicy.fractional.L2::evict_normal.b64 %0, 1.0;" : "=l"(policy));
  return policy;
}
HALFBYTE_DEVICE void prefetch_into_l2(const void* p) { asm volatile("prefetch.global.L2 [%0];" ::"l"(p)); }

// Copies of 16 bytes into shared memory behind the thread's back, in groups (sm_80).
HALFBYTE_DEVICE void copy_async16(SharedAddress to, const void* from, uint64_t policy) {
  asm volatile("cp.async.cg.shared.global.L2::cache_hint [%0], [%1], 16, %2;" ::"r"(to), "l"(from), "l"(policy)
               : "memory");
}
HALFBYTE_DEVICE void copy_async_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }
template <int pending>  // waits until at most this many of the thread's latest groups are under way
HALFBYTE_DEVICE void copy_async_wait() {
  asm volatile("cp.async.wait_group %0;" ::"n"(pending) : "memory");
}

// Copies of any multiple of 16 bytes that count on a barrier in shared memory, 8 bytes (sm_90).
HALFBYTE_DEVICE void barrier_init(SharedAddress barrier, int arrivals) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(barrier), "r"(arrivals) : "memory");
}
HALFBYTE_DEVICE void barrier_init_fence() { asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory"); }
// What the thread did to shared memory comes before what bulk copies do to it later.
HALFBYTE_DEVICE void async_proxy_fence() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }
HALFBYTE_DEVICE void barrier_arrive_expect(SharedAddress barrier, int bytes) {
  asm volatile("{ .reg .b64 state; mbarrier.arrive.expect_tx.shared::cta.b64 state, [%0], %1; }" ::"r"(barrier), "r"(bytes)
               : "memory");
}
HALFBYTE_DEVICE bool barrier_try_wait(SharedAddress barrier, int parity) {
  uint32_t done;
  asm volatile(
      "{ .reg .pred p; mbarrier.try_wait.parity.shared::cta.b64 p, [%1], %2; selp.u32 %0, 1, 0, p; }"
      : "=r"(done)
      : "r"(barrier), "r"(parity)
      : "memory");
  return done != 0;
}
HALFBYTE_DEVICE void copy_bulk(SharedAddress to, const void* from, int bytes, SharedAddress barrier, uint64_t policy) {
  asm volatile(
      "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes.L2::cache_hint [%0], [%1], %2, [%3], %4;" ::"r"(to),
      "l"(from), "r"(bytes), "r"(barrier), "l"(policy)
      : "memory");
}

// Blocks of one cluster (sm_90).
HALFBYTE_DEVICE void cluster_sync() {
  asm volatile("barrier.cluster.arrive.release.aligned;\nbarrier.cluster.wait.acquire.aligned;" ::: "memory");
}
// Only waits: what the blocks wrote before need not be seen by the others.
HALFBYTE_DEVICE void cluster_wait() {
  asm volatile("barrier.cluster.arrive.relaxed.aligned;\nbarrier.cluster.wait.aligned;" ::: "memory");
}
HALFBYTE_DEVICE uint32_t load_cluster(SharedAddress address, int rank) {  // the same address in another block of the cluster
  uint32_t there, v;
  asm volatile("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(there) : "r"(address), "r"(rank));
  asm volatile("ld.shared::cluster.u32 %0, [%1];" : "=r"(v) : "r"(there) : "memory");
  return v;
}

// A kernel that is launched early (Launch::early) waits here until the kernel before it has ended and what it wrote is there;
// the kernel before lets it start (sm_90; before that nothing starts early).
HALFBYTE_DEVICE void wait_for_kernel_before() { asm volatile("griddepcontrol.wait;" ::: "memory"); }
HALFBYTE_DEVICE void let_next_kernel_start() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}

// d += a * b, a 16 x 16 (or 16 x 32 int8), b 16 (32) x 8, by the 32 lanes of a warp: PTX ISA, "Matrix fragments".
HALFBYTE_DEVICE void mma_f16(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}
HALFBYTE_DEVICE void mma_bf16(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}
HALFBYTE_DEVICE void mma_s8(int (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  asm("mma.sync.aligned.m16n8k32.row.col.s32.s8.s8.s32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
      : "+r"(d[0]), "+r"(d[1]), "+r"(d[2]), "+r"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

// a: 16 x 64 int8 of which every four neighbours in a row have two at most, whose places are in `indices`.
HALFBYTE_DEVICE void mma_sparse_s8(int (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[4], uint32_t indices) {
  asm("mma.sp::ordered_metadata.sync.aligned.m16n8k64.row.col.s32.s8.s8.s32 "
      "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9, %10, %11}, {%0, %1, %2, %3}, %12, 0x0;"
      : "+r"(d[0]), "+r"(d[1]), "+r"(d[2]), "+r"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]), "r"(b[2]), "r"(b[3]), "r"(indices));
}

// The bytes of {b, a} that the nibbles of `select` name: 0..3 of a, 4..7 of b.
HALFBYTE_DEVICE uint32_t permute(uint32_t a, uint32_t b, uint32_t select) { return __byte_perm(a, b, select); }

// (a & b) | c: one instruction, which the compiler does not find where b and c are both constants.
HALFBYTE_DEVICE uint32_t and_or(uint32_t a, uint32_t b, uint32_t c) {
  uint32_t d;
  asm("lop3.b32 %0, %1, %2, %3, 0xea;" : "=r"(d) : "r"(a), "r"(b), "r"(c));
  return d;
}
// (a & b) ^ c
HALFBYTE_DEVICE uint32_t and_xor(uint32_t a, uint32_t b, uint32_t c) {
  uint32_t d;
  asm("lop3.b32 %0, %1, %2, %3, 0x6a;" : "=r"(d) : "r"(a), "r"(b), "r"(c));
  return d;
}

// Pairs of 16-bit floats.
HALFBYTE_DEVICE uint32_t sub_f16x2(uint32_t a, uint32_t b) {
  uint32_t d;
  asm("sub.rn.f16x2 %0, %1, %2;" : "=r"(d) : "r"(a), "r"(b));
  return d;
}
HALFBYTE_DEVICE uint32_t fma_f16x2(uint32_t a, uint32_t b, uint32_t c) {
  uint32_t d;
  asm("fma.rn.f16x2 %0, %1, %2, %3;" : "=r"(d) : "r"(a), "r"(b), "r"(c));
  return d;
}
HALFBYTE_DEVICE uint32_t fma_bf16x2(uint32_t a, uint32_t b, uint32_t c) {
  uint32_t d;
  asm("fma.rn.bf16x2 %0, %1, %2, %3;" : "=r"(d) : "r"(a), "r"(b), "r"(c));
  return d;
}

// Conversions, to the nearest and to even between two.
HALFBYTE_DEVICE float f16_to_float(uint16_t v) {
  float d;
  asm("cvt.f32.f16 %0, %1;" : "=f"(d) : "h"(v));
  return d;
}
HALFBYTE_DEVICE float bf16_to_float(uint16_t v) { return __uint_as_float(static_cast<uint32_t>(v) << 16); }
HALFBYTE_DEVICE uint16_t float_to_f16(float v) {
  uint16_t d;
  asm("cvt.rn.f16.f32 %0, %1;" : "=h"(d) : "f"(v));
  return d;
}
HALFBYTE_DEVICE uint16_t float_to_bf16(float v) {
  uint16_t d;
  asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(d) : "f"(v));
  return d;
}
HALFBYTE_DEVICE uint32_t floats_to_bf16x2(float low, float high) {
  uint32_t d;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(d) : "f"(high), "f"(low));
  return d;
}
HALFBYTE_DEVICE float bits_to_float(uint32_t v) { return __uint_as_float(v); }
HALFBYTE_DEVICE uint32_t float_to_bits(float v) { return __float_as_uint(v); }

// float32 operations that the compiler neither contracts nor approximates.
HALFBYTE_DEVICE float add_rn(float a, float b) { return __fadd_rn(a, b); }
HALFBYTE_DEVICE float mul_rn(float a, float b) { return __fmul_rn(a, b); }
HALFBYTE_DEVICE float div_rn(float a, float b) { return __fdiv_rn(a, b); }
HALFBYTE_DEVICE float fma_rn(float a, float b, float c) { return __fmaf_rn(a, b, c); }
HALFBYTE_DEVICE float rsqrt_rn(float a) { return __fdiv_rn(1.0f, __fsqrt_rn(a)); }

}  // namespace halfbyte::cuda
#endif
