// Python binding of attention.
#include <array>

#include "bindings/bind.h"
#include "ops/attention/op.h"

namespace halfbyte::attention {
namespace {

using Strides = std::array<int64_t, 3>;   // of sequences, rows (queries or keys) and heads, in elements
using Strides4 = std::array<int64_t, 4>;  // of sequences, heads, queries and keys

int enumerator(int code, int last, const char* what) {
  check(code >= 0 && code <= last, "attention: unknown code ", code, " of ", what);
  return code;
}

}  // namespace

void bind(py::module_& m) {
  m.def(
      "attention",
      [](int64_t batch, int64_t queries, int64_t keys, int heads, int kv_heads, int head_size, uintptr_t q,
         Strides q_strides, int q_type, uintptr_t k, Strides k_strides, uintptr_t v, Strides v_strides, int kv_type,
         uintptr_t k_scale, Strides k_scale_strides, uintptr_t v_scale, Strides v_scale_strides, float scale,
         bool causal, int64_t offset, int64_t window, uintptr_t mask, int mask_kind, Strides4 mask_strides,
         uintptr_t out, Strides out_strides, int out_type, int threads) {
        Args a{};
        a.batch = batch, a.queries = queries, a.keys = keys;
        a.heads = heads, a.kv_heads = kv_heads, a.head_size = head_size;
        a.q = pointer<const void>(q), a.q_type = dtype(q_type);
        a.q_batch = q_strides[0], a.q_row = q_strides[1], a.q_head = q_strides[2];
        a.k = pointer<const void>(k), a.v = pointer<const void>(v);
        a.kv_type = static_cast<Storage>(enumerator(kv_type, 3, "the storage of keys and values"));
        a.k_batch = k_strides[0], a.k_row = k_strides[1], a.k_head = k_strides[2];
        a.v_batch = v_strides[0], a.v_row = v_strides[1], a.v_head = v_strides[2];
        a.k_scale = pointer<const float>(k_scale), a.v_scale = pointer<const float>(v_scale);
        a.k_scale_batch = k_scale_strides[0], a.k_scale_row = k_scale_strides[1], a.k_scale_head = k_scale_strides[2];
        a.v_scale_batch = v_scale_strides[0], a.v_scale_row = v_scale_strides[1], a.v_scale_head = v_scale_strides[2];
        a.scale = scale, a.causal = causal, a.offset = offset, a.window = window;
        a.mask = pointer<const void>(mask), a.mask_kind = static_cast<Mask>(enumerator(mask_kind, 2, "the mask"));
        a.mask_batch = mask_strides[0], a.mask_head = mask_strides[1], a.mask_row = mask_strides[2];
        a.mask_key = mask_strides[3];
        a.out = pointer<void>(out), a.out_type = dtype(out_type);
        a.out_batch = out_strides[0], a.out_row = out_strides[1], a.out_head = out_strides[2];
        run(a, threads);
      },
      py::call_guard<py::gil_scoped_release>());
}

}  // namespace halfbyte::attention
