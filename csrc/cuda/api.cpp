// The C interface: checks of a call, and which kernels take it.
#include "cuda/api.h"

#include <cstdio>
#include <initializer_list>

#include "cuda/device.h"
#include "cuda/kernels.h"

namespace halfbyte::cuda {

namespace {

constexpr int abi = 1;
constexpr int max_k_of_codes = 65792;  // 255 * 128 * k fits in an int32

bool known(const WeightFormat& f) {
  const bool groups = f.group == 32 || f.group == 64 || f.group == 128;
  if (f.pattern != dense) return f.bits == 8 && !f.group && !f.offsets && (f.pattern == two_of_four || f.pattern == blocks);
  return (f.bits == 4 || f.bits == 8) && (groups || (f.group == 0 && !f.offsets)) && (f.scale_bytes == 2 || f.scale_bytes == 4);
}

WeightFormat format_of(const halfbyte_cuda_format& f) { return {f.bits, f.group, f.scale_bytes, f.offsets != 0, f.pattern}; }

// A kernel that reads or writes beside the natural alignment ends the whole context.
bool natural(const void* p, int type) { return reinterpret_cast<uintptr_t>(p) % (type == HALFBYTE_F32 ? 4 : 2) == 0; }

bool aligned(const void* p, int64_t stride_bytes, int to) {
  return (reinterpret_cast<uintptr_t>(p) | static_cast<uint64_t>(stride_bytes)) % to == 0;
}

int check_numbers(const halfbyte_cuda_linear& c) {
  const bool codes = c.x_type == HALFBYTE_I8;
  if (!known(format_of(c.format)) || c.m < 1 || c.n < 1 || c.k < 1) return HALFBYTE_CUDA_BAD_ARGUMENT;
  if (c.format.pattern != HALFBYTE_DENSE && (!codes || c.gate)) return HALFBYTE_CUDA_BAD_ARGUMENT;
  if (!codes && c.x_type != HALFBYTE_F16 && c.x_type != HALFBYTE_BF16) return HALFBYTE_CUDA_BAD_ARGUMENT;
  if (codes && c.k > max_k_of_codes) return HALFBYTE_CUDA_BAD_ARGUMENT;
  // Grids: 65535 blocks of rows and of channels.
  if (ceil_div(c.m, 8) > 65535 || n_tiles(c.n) > 65535) return HALFBYTE_CUDA_BAD_ARGUMENT;
  if (c.splits && c.splits != 1 && c.splits != 2 && c.splits != 4 && c.splits != 8) return HALFBYTE_CUDA_BAD_ARGUMENT;
  if (c.warps && c.warps != 4 && c.warps != 8) return HALFBYTE_CUDA_BAD_ARGUMENT;
  if (c.arch && c.arch != 80 && c.arch != 90) return HALFBYTE_CUDA_BAD_ARGUMENT;
  return c.k % (codes ? 16 : 8) ? HALFBYTE_CUDA_ALIGNMENT : 0;
}

int check_arrays(const halfbyte_cuda_linear& c) {
  const bool codes = c.x_type == HALFBYTE_I8;
  const bool by_blocks = c.format.pattern == HALFBYTE_BLOCKS;  // of which there may be none
  if (!c.x || (!c.weight && !by_blocks) || !c.scale || !c.y || c.ldx < c.k || c.ldy < c.n) return HALFBYTE_CUDA_BAD_ARGUMENT;
  if (c.y_type < HALFBYTE_F32 || c.y_type > HALFBYTE_F16) return HALFBYTE_CUDA_BAD_ARGUMENT;
  if (c.residual && (c.residual_type < HALFBYTE_F32 || c.residual_type > HALFBYTE_F16)) return HALFBYTE_CUDA_BAD_ARGUMENT;
  if (c.activation < HALFBYTE_NONE || c.activation > HALFBYTE_SILU) return HALFBYTE_CUDA_BAD_ARGUMENT;
  if (by_blocks && !c.starts) return HALFBYTE_CUDA_BAD_ARGUMENT;
  if (codes != (c.x_scale != nullptr) || (c.x_zero && (!codes || !c.total))) return HALFBYTE_CUDA_BAD_ARGUMENT;
  if (c.gate && (!c.gate_scale || (c.x_zero && !c.gate_total))) return HALFBYTE_CUDA_BAD_ARGUMENT;
  if (c.residual && c.m > 1 && c.ld_residual < c.n) return HALFBYTE_CUDA_BAD_ARGUMENT;
  for (const void* words : {static_cast<const void*>(c.x_scale), static_cast<const void*>(c.x_zero), c.total, c.gate_total,
                            static_cast<const void*>(c.scale), static_cast<const void*>(c.gate_scale),
                            static_cast<const void*>(c.bias), static_cast<const void*>(c.gate_bias),
                            static_cast<const void*>(c.starts), static_cast<const void*>(c.columns),
                            static_cast<const void*>(c.workspace)}) {
    if (!natural(words, HALFBYTE_F32)) return HALFBYTE_CUDA_ALIGNMENT;
  }
  if (!natural(c.y, c.y_type) || (c.residual && !natural(c.residual, c.residual_type))) return HALFBYTE_CUDA_ALIGNMENT;
  const bool fits = aligned(c.x, c.m > 1 ? c.ldx * (codes ? 1 : 2) : 0, 16) && aligned(c.weight, 0, 16) && aligned(c.gate, 0, 16);
  return fits ? 0 : HALFBYTE_CUDA_ALIGNMENT;
}

// What a call becomes on the current device; 0 or an error.
int plan(const halfbyte_cuda_linear& call, LinearArgs& args) {
  if (int error = check_numbers(call)) return error;
  Device device{};
  if (int error = device_of(-1, device)) return error;
  const WeightFormat f = format_of(call.format);
  Schedule s = choose_schedule(device, f, call.m, call.n, call.k, call.gate != nullptr, call.warps, call.splits);
  if (call.arch) s.arch = call.arch;
  const bool runs = device.arch >= 80 && (s.arch == 80 || (device.arch >= 90 && device.arch < 100));
  if (!runs || shared_bytes(s, f.tile_bytes()) > device.shared_bytes) return HALFBYTE_CUDA_NO_KERNEL;
  int shift = 0;
  while (f.group >> (shift + 1)) ++shift;
  args = {call, s, f.tile_bytes(), f.scales_at(), f.offsets_at(), shift, static_cast<int>(k_tiles(call.k))};
  return 0;
}

int64_t workspace_of(const LinearArgs& args) {
  if (args.schedule.arch != 80 || args.schedule.splits == 1) return 0;
  return int64_t{4} * args.schedule.splits * (args.call.gate ? 2 : 1) * args.call.m * n_tiles(args.call.n) * tile_n;
}

}  // namespace

}  // namespace halfbyte::cuda

using namespace halfbyte::cuda;

extern "C" {

int halfbyte_cuda_abi(void) { return abi; }

int halfbyte_cuda_devices(void) { return device_count(); }

int halfbyte_cuda_arch(int index) {
  Device device{};
  const int error = device_of(index, device);
  return error ? -error : device.arch;
}

const char* halfbyte_cuda_error(int code) {
  switch (code) {
    case 0:
      return "no error";
    case HALFBYTE_CUDA_BAD_ARGUMENT:
      return "an argument that no kernel takes";
    case HALFBYTE_CUDA_ALIGNMENT:
      return "a pointer, a stride or k is not a multiple of what the kernel reads at once";
    case HALFBYTE_CUDA_NO_KERNEL:
      return "no kernel for this device";
    case HALFBYTE_CUDA_WORKSPACE:
      return "the workspace is too small";
    default:
      return device_error(code < 0 ? -code : code);
  }
}

const char* halfbyte_cuda_linear_kernel(const struct halfbyte_cuda_linear* call) {
  thread_local char name[64];
  LinearArgs args;
  if (plan(*call, args)) return nullptr;
  const WeightFormat f = format_of(call->format);
  const char* const ops[] = {"linear", "spmm_nm", "spmm_block"};
  std::snprintf(name, sizeof name, "%s_w%da%d_%dx%dx%d_sm%d", ops[f.pattern], f.bits, call->x_type == HALFBYTE_I8 ? 8 : 16,
                args.schedule.rows(), tile_n, f.tile_depth(), args.schedule.arch);
  return name;
}

int64_t halfbyte_cuda_linear_workspace(const struct halfbyte_cuda_linear* call) {
  LinearArgs args;
  const int error = plan(*call, args);
  return error ? (error > 0 ? -error : error) : workspace_of(args);
}

int halfbyte_cuda_linear_run(const struct halfbyte_cuda_linear* call, void* stream) {
  LinearArgs args;
  if (int error = plan(*call, args)) return error;
  if (int error = check_arrays(*call)) return error;
  if (call->workspace_bytes < workspace_of(args) || (workspace_of(args) && !call->workspace)) return HALFBYTE_CUDA_WORKSPACE;
  return args.schedule.arch == 90 ? linear_sm90(args, stream) : linear_sm80(args, stream);
}

int halfbyte_cuda_rows_run(const struct halfbyte_cuda_rows* call, void* stream) { return rows_run(*call, stream); }

int halfbyte_cuda_finish_run(const struct halfbyte_cuda_finish* call, void* stream) { return finish_run(*call, stream); }

int halfbyte_cuda_dequantize_run(const struct halfbyte_cuda_dequantize* call, void* stream) {
  if (!known(format_of(call->format)) || call->format.pattern != HALFBYTE_DENSE) return HALFBYTE_CUDA_BAD_ARGUMENT;
  return dequantize_run(*call, stream);
}

int64_t halfbyte_cuda_weight_bytes(const struct halfbyte_cuda_format* format, int64_t n, int64_t k) {
  const WeightFormat f = format_of(*format);
  return known(f) && f.pattern != blocks && n >= 0 && k >= 0 ? weight_bytes(f, n, k) : -1;
}

int64_t halfbyte_cuda_code_bit(const struct halfbyte_cuda_format* format, int64_t n, int64_t k, int64_t k_all) {
  const WeightFormat f = format_of(*format);
  if (!known(f) || f.pattern != dense || n < 0 || k < 0 || k >= k_all) return -1;
  const CodePosition position = code_position(f, n, k, k_all);
  return position.byte * 8 + position.shift;
}

int64_t halfbyte_cuda_quad_bit(int64_t n, int64_t k, int64_t k_all, int index, int of_index) {
  if (n < 0 || k < 0 || k >= k_all || index < 0 || index > 1) return -1;
  const CodePosition position = quad_position(n, k, k_all, index, of_index != 0);
  return position.byte * 8 + position.shift;
}

int64_t halfbyte_cuda_scale_byte(const struct halfbyte_cuda_format* format, int64_t n, int64_t k, int64_t k_all, int offset) {
  const WeightFormat f = format_of(*format);
  if (!known(f) || !f.group || (offset && !f.offsets) || n < 0 || k < 0 || k >= k_all) return -1;
  return scale_position(f, n, k, k_all, offset != 0);
}

}  // extern "C"
