// AMX tiles behind plain functions; with HALFBYTE_EMULATE the same functions on ordinary memory, so that the kernels can be
// tested on a CPU without AMX. Formula of tdpbsud: c[m][n] += sum over quads q and i of s8 a[m][4q+i] * u8 b[q][4n+i].
#pragma once
#include "core/kernel.h"

namespace halfbyte::HALFBYTE_ISA {
namespace {

struct alignas(64) TileConfig {
  uint8_t palette, start_row, reserved[14];
  uint16_t column_bytes[16];
  uint8_t rows[16];
};
static_assert(sizeof(TileConfig) == 64);

#if HALFBYTE_EMULATE

struct TileState {
  TileConfig config;
  uint8_t data[8][16][64];
};
thread_local constinit TileState tiles = {};

inline void tile_loadconfig(const TileConfig& config) { tiles = TileState{config, {}}; }
inline void tile_release() { tiles = TileState{}; }
template <int T>
void tile_zero() { __builtin_memset(tiles.data[T], 0, sizeof tiles.data[T]); }
template <int T>
void tile_load(const void* p, int64_t stride) {
  tile_zero<T>();
  for (int r = 0; r < tiles.config.rows[T]; ++r) {
    __builtin_memcpy(tiles.data[T][r], static_cast<const char*>(p) + r * stride, tiles.config.column_bytes[T]);
  }
}
template <int T>
void tile_store(void* p, int64_t stride) {
  for (int r = 0; r < tiles.config.rows[T]; ++r) {
    __builtin_memcpy(static_cast<char*>(p) + r * stride, tiles.data[T][r], tiles.config.column_bytes[T]);
  }
}
template <int C, int A, int B>
void tile_dot_su() {
  for (int m = 0; m < tiles.config.rows[C]; ++m) {
    for (int n = 0; n < tiles.config.column_bytes[C] / 4; ++n) {
      uint32_t sum;
      __builtin_memcpy(&sum, &tiles.data[C][m][4 * n], 4);
      for (int q = 0; q < tiles.config.column_bytes[A] / 4; ++q) {
        for (int i = 0; i < 4; ++i) {
          const int32_t a = static_cast<int8_t>(tiles.data[A][m][4 * q + i]);
          sum += static_cast<uint32_t>(a * tiles.data[B][q][4 * n + i]);
        }
      }
      __builtin_memcpy(&tiles.data[C][m][4 * n], &sum, 4);
    }
  }
}

#else

// Inline assembly because gcc's intrinsics are macros that paste the tile number and take no template parameter.
inline void tile_loadconfig(const TileConfig& config) { asm volatile("ldtilecfg %0" ::"m"(config)); }
inline void tile_release() { asm volatile("tilerelease"); }
template <int T>
void tile_zero() { asm volatile("tilezero %%tmm%c0" ::"i"(T)); }
template <int T>
void tile_load(const void* p, int64_t stride) {
  asm volatile("tileloadd (%0,%1,1), %%tmm%c2" ::"r"(p), "r"(stride), "i"(T) : "memory");
}
template <int T>
void tile_store(void* p, int64_t stride) {
  asm volatile("tilestored %%tmm%c2, (%0,%1,1)" ::"r"(p), "r"(stride), "i"(T) : "memory");
}
template <int C, int A, int B>
void tile_dot_su() { asm volatile("tdpbsud %%tmm%c2, %%tmm%c1, %%tmm%c0" ::"i"(C), "i"(A), "i"(B)); }

#endif

}  // namespace
}  // namespace halfbyte::HALFBYTE_ISA
