// Four or eight neighbouring floats of a row: whole vectors between memory and float32 registers.
//
// Types are known when a kernel runs, only their size when it is compiled, so that one kernel serves float16 and bfloat16.
#pragma once
#include "cuda/api.h"
#include "cuda/layout.h"
#include "cuda/ptx.cuh"

namespace halfbyte::cuda {

HALFBYTE_HD constexpr int float_bytes(int type) { return type == HALFBYTE_F32 ? 4 : 2; }

// Where a row begins. Columns are added to that as an int: nvcc joins neighbouring stores only where it sees that the
// address does not wrap.
template <class Void>
HALFBYTE_DEVICE Void* row_of(Void* matrix, int64_t row, int64_t ld, int bytes) {
  return const_cast<char*>(static_cast<const char*>(matrix)) + row * ld * bytes;
}

// A pair of 16-bit floats, the first in the lower half.
HALFBYTE_DEVICE void widen_pair(uint32_t pair, int type, float& first, float& second) {
  if (type == HALFBYTE_BF16) {
    first = bits_to_float(pair << 16);
    second = bits_to_float(pair & 0xffff0000u);
  } else {
    first = f16_to_float(static_cast<uint16_t>(pair));
    second = f16_to_float(static_cast<uint16_t>(pair >> 16));
  }
}
HALFBYTE_DEVICE uint32_t narrow_pair(float first, float second, int type) {
  if (type == HALFBYTE_BF16) return floats_to_bf16x2(first, second);
  return float_to_f16(first) | static_cast<uint32_t>(float_to_f16(second)) << 16;
}

// Eight floats of 2 or 4 bytes as they lie in memory.
template <int bytes>
struct Eight {
  Word4 words[bytes / 2];
};

template <int bytes>
HALFBYTE_DEVICE Eight<bytes> load8(const void* row, int i) {
  const char* const p = static_cast<const char*>(row) + static_cast<int64_t>(i) * bytes;
  Eight<bytes> raw;
#pragma unroll
  for (int w = 0; w < bytes / 2; ++w) raw.words[w] = load16(p + 16 * w);
  return raw;
}

HALFBYTE_DEVICE void widen(const Eight<4>& raw, int, float (&v)[8]) {
#pragma unroll
  for (int w = 0; w < 2; ++w) {
    v[4 * w] = bits_to_float(raw.words[w].x);
    v[4 * w + 1] = bits_to_float(raw.words[w].y);
    v[4 * w + 2] = bits_to_float(raw.words[w].z);
    v[4 * w + 3] = bits_to_float(raw.words[w].w);
  }
}
HALFBYTE_DEVICE void widen(const Eight<2>& raw, int type, float (&v)[8]) {
  widen_pair(raw.words[0].x, type, v[0], v[1]);
  widen_pair(raw.words[0].y, type, v[2], v[3]);
  widen_pair(raw.words[0].z, type, v[4], v[5]);
  widen_pair(raw.words[0].w, type, v[6], v[7]);
}

HALFBYTE_DEVICE void store_floats4(float* p, const float* v) {
  *reinterpret_cast<Word4*>(p) =
      Word4{float_to_bits(v[0]), float_to_bits(v[1]), float_to_bits(v[2]), float_to_bits(v[3])};
}

HALFBYTE_DEVICE void store_halves8(void* row, int i, int type, const float (&v)[8]) {
  *reinterpret_cast<Word4*>(static_cast<uint16_t*>(row) + i) =
      Word4{narrow_pair(v[0], v[1], type), narrow_pair(v[2], v[3], type), narrow_pair(v[4], v[5], type),
            narrow_pair(v[6], v[7], type)};
}
HALFBYTE_DEVICE void store8(void* row, int i, int type, const float (&v)[8]) {
  if (type == HALFBYTE_F32) {
    store_floats4(static_cast<float*>(row) + i, v);
    store_floats4(static_cast<float*>(row) + i + 4, v + 4);
  } else {
    store_halves8(row, i, type, v);
  }
}

HALFBYTE_DEVICE void load4(const void* row, int i, int type, float (&v)[4]) {
  if (type == HALFBYTE_F32) {
    const Word4 raw = load16(static_cast<const float*>(row) + i);
    v[0] = bits_to_float(raw.x), v[1] = bits_to_float(raw.y), v[2] = bits_to_float(raw.z), v[3] = bits_to_float(raw.w);
  } else {
    const Word2 raw = load8(static_cast<const uint16_t*>(row) + i);
    widen_pair(raw.x, type, v[0], v[1]);
    widen_pair(raw.y, type, v[2], v[3]);
  }
}

HALFBYTE_DEVICE void store4(void* row, int i, int type, const float (&v)[4]) {
  if (type == HALFBYTE_F32) {
    store_floats4(static_cast<float*>(row) + i, v);
  } else {
    *reinterpret_cast<Word2*>(static_cast<uint16_t*>(row) + i) =
        Word2{narrow_pair(v[0], v[1], type), narrow_pair(v[2], v[3], type)};
  }
}

// Whether rows at this address and stride (in elements) begin at multiples of `to` bytes; one row needs no stride.
inline bool rows_aligned(const void* p, int64_t ld, int64_t rows, int element_bytes, int to) {
  return reinterpret_cast<uintptr_t>(p) % to == 0 && (rows <= 1 || ld * element_bytes % to == 0);
}

}  // namespace halfbyte::cuda
