"""linear on a GPU: which road a call takes, and the calls of libhalfbyte_cuda and of torch that it is."""

from __future__ import annotations

import math
from ctypes import byref
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from ..errors import CudaError
from ..ops import ACTIVATIONS
from ..pack import GpuWeight
from ..scheme import Scheme
from . import library
from .library import Dequantize, Finish, Format, Linear
from .pack import CODES_K, FLOATS_K, CudaPackedWeight, format_for, kernel_name
from .rows import TYPES, codes_of, on, stream_of

# The roads, by the names that `summary` gives them.
KERNEL = "linear"  # of our own; the library says its full name
DEQUANTIZE = "dequantize + mm"
INT_MM = "_int_mm"
TORCH = "torch"

# Up to so many rows, by the bits of activations, our own kernel runs: reading the weights is what takes the
# time. Estimates, to be replaced by measurements.
KERNEL_ROWS = {16: 128, 8: 128}
INT_MM_ROWS = 17  # the least that torch._int_mm takes
# Our own kernel takes so many at once, where many come to a weight of few blocks: its partial sums take up to
# 32 bytes for each row and channel, 1 GiB at 8192 channels.
ROWS_AT_ONCE = 4096

_IN_TORCH = {
    "none": lambda y: y,
    "relu": functional.relu,
    "gelu": functional.gelu,
    "gelu_tanh": lambda y: functional.gelu(y, approximate="tanh"),
    "silu": functional.silu,
}


def road(bits: int, group: int, activation_bits: int, x_bits: int, m: int, sparse: bool = False) -> str:
    """How a packed weight is multiplied by m rows of floats of 16 or 32 bits. bits, group: of its codes.
    sparse: so few of them are stored that our kernel is the fastest for any number of rows.
    """
    if (sparse or m <= KERNEL_ROWS[activation_bits]) and (activation_bits == 8 or x_bits == 16):
        return KERNEL
    if (bits, group, activation_bits) == (8, 0, 8):
        return INT_MM
    return DEQUANTIZE if x_bits == 16 else TORCH


def road_of(weight: GpuWeight, dtype: torch.dtype, m: int) -> str:
    """The road of m rows of floats."""
    if not isinstance(weight, CudaPackedWeight):
        return TORCH
    form = weight.format
    bits = weight.activation_bits
    return road(form.bits, form.group, bits, 8 * dtype.itemsize, m, weight.few_blocks)


def roads(
    scheme: Scheme,
    shape: tuple[int, int],
    device: torch.device,
    dtype: torch.dtype,
    group_scale: Tensor | None,
) -> tuple[str, str]:
    """What runs for x of a dtype, as `summary` says it: (the kernels, why torch where it is torch). Nothing
    is packed for it.
    """
    form, why = format_for(scheme, shape, device, group_scale)
    if why:
        return TORCH, why
    return _roads(form, scheme.activation_bits, shape, device, dtype)


def roads_of(weight: GpuWeight, dtype: torch.dtype) -> tuple[str, str]:
    """`roads` of what is packed."""
    if not isinstance(weight, CudaPackedWeight):
        return TORCH, weight.why
    form, bits = weight.format, weight.activation_bits
    return _roads(form, bits, weight.shape, weight.device, dtype, weight.few_blocks)


def _roads(
    form: Format,
    activation_bits: int,
    shape: tuple[int, int],
    device: torch.device,
    dtype: torch.dtype,
    sparse: bool = False,
) -> tuple[str, str]:
    limit, x_bits = KERNEL_ROWS[activation_bits], 8 * dtype.itemsize
    few, many = (road(form.bits, form.group, activation_bits, x_bits, m, sparse) for m in (1, limit + 1))
    if few == TORCH:
        return TORCH, f"x is {str(dtype).removeprefix('torch.')}; the kernels take float16 and bfloat16"
    name = kernel_name(form, activation_bits, shape, device)
    return name if many == KERNEL else f"{name}; above {limit} rows {many}", ""


class Input:
    """x of one call or several as rows [m, k], and what the roads make of it, once."""

    def __init__(self, x: Tensor, static: tuple[float, int]):
        """static: scale and zero point of the codes; a scale of 0 is found per row."""
        self.shape = x.shape[:-1]
        x = x.detach() if x.requires_grad else x
        x = x.resolve_neg() if x.is_neg() else x
        self.rows = x if x.ndim == 2 else x.reshape(math.prod(self.shape), x.shape[-1])
        self.static = static
        self._floats: Tensor | None = None
        self._codes: tuple | None = None

    def floats(self) -> tuple[Tensor, int]:
        """Rows and their stride, k a multiple of 8 and each row 16-byte aligned; of 16-bit floats."""
        if self._floats is None:
            x, (m, k) = self.rows, self.rows.shape
            outer, inner = x.stride()
            if k % FLOATS_K:
                x = functional.pad(x, (0, -k % FLOATS_K))
            elif inner != 1 or x.data_ptr() % 16 or (m > 1 and (outer < k or outer % FLOATS_K)):
                x = x.clone(memory_format=torch.contiguous_format)
            self._floats = x
        x = self._floats
        return x, x.stride(0) if len(x) > 1 else x.shape[1]

    def codes(self, k_padded: int, least_rows: int = 0) -> tuple[tuple[Tensor, Tensor, Tensor], bool]:
        """(codes, scale, zero) as `codes_of` makes them, and whether it has just done so: it is what the GPU
        does last.
        """
        key = k_padded, least_rows
        if self._codes is not None and self._codes[0] == key:
            return self._codes[1], False
        made = codes_of(self.rows, k_padded=k_padded, least_rows=least_rows, static=self.static)
        self._codes = key, made
        return made, True


def run(
    x: Input,
    weight: GpuWeight,
    bias: Tensor | None,
    activation: str,
    residual: Tensor | None,
    out_dtype: torch.dtype,
    gate: GpuWeight | None = None,
    gate_bias: Tensor | None = None,
) -> Tensor:
    """`activation(x @ weight.T + bias) + residual`, or with a gate `(x @ weight.T + bias) * activation(x @
    gate.T + gate_bias) + residual`, of arguments that halfbyte.ops has checked: biases are float32 and dense.
    """
    m, n = len(x.rows), weight.shape[0]
    with on(weight.device):
        if m * n == 0:
            return torch.empty(*x.shape, n, dtype=out_dtype, device=weight.device)
        if residual is not None:
            residual = residual.detach().resolve_neg().reshape(m, n)
        way = road_of(weight, x.rows.dtype, m)
        if gate is None or (way == road_of(gate, x.rows.dtype, m) == KERNEL and _pair(weight, gate)):
            y = _ROADS[way](x, weight, bias, activation, residual, out_dtype, gate, gate_bias)
        else:
            # A product of int8 is exact: it stays a float32 until it has met the gate.
            dtype = out_dtype if way in (DEQUANTIZE, TORCH) else torch.float32
            y = run(x, weight, bias, "none", None, dtype)
            y = y.mul_(run(x, gate, gate_bias, activation, None, dtype)).view(m, n)
            y = _add(y, residual, out_dtype)
    return y if len(x.shape) == 1 else y.view(*x.shape, n)


def _pair(weight: CudaPackedWeight, gate: CudaPackedWeight) -> bool:
    """Whether one kernel reads both."""
    return bytes(weight.format) == bytes(gate.format) and not weight.format.pattern


def accumulator(x: Input, weight: GpuWeight) -> Tensor:
    """int32 sums of w8a8: `sum_k (qx - zero) * qw`."""
    if not isinstance(weight, CudaPackedWeight):
        raise CudaError(f"an int32 output needs the kernels of the CUDA library: {weight.why}")
    (m, _), n = x.rows.shape, weight.shape[0]
    if m * n == 0:
        return torch.empty(*x.shape, n, dtype=torch.int32, device=weight.device)
    with on(weight.device):
        acc, _, zero = _int_product(x, weight)
        return (acc[:m, :n] - zero[:, None] * weight.total).view(*x.shape, n)


def _run_kernel(
    x: Input,
    weight: CudaPackedWeight,
    bias: Tensor | None,
    activation: str,
    residual: Tensor | None,
    out_dtype: torch.dtype,
    gate: CudaPackedWeight | None,
    gate_bias: Tensor | None,
) -> Tensor:
    n, k = weight.shape
    parts: dict[str, Any] = {}
    if weight.activation_bits == 8:
        k = -(-k // CODES_K) * CODES_K
        (rows, scale, zero), parts["after_rows"] = x.codes(k)
        ldx = k
        parts.update(x_scale=scale.data_ptr(), x_zero=zero.data_ptr(), total=weight.total.data_ptr())
    else:
        rows, ldx = x.floats()
        k = rows.shape[1]
    m, device, found = len(rows), weight.device, library.library()
    y = torch.empty(m, n, dtype=out_dtype, device=device)
    if weight.starts is not None:
        parts.update(starts=weight.starts.data_ptr(), columns=weight.columns.data_ptr())
    if bias is not None:
        parts["bias"] = bias.data_ptr()
    if gate is not None:
        parts.update(gate=gate.weight.data_ptr(), gate_scale=gate.scale.data_ptr())
        if gate.total is not None:
            parts["gate_total"] = gate.total.data_ptr()
        if gate_bias is not None:
            parts["gate_bias"] = gate_bias.data_ptr()
    if residual is not None:
        residual = _side_by_side(residual)
        parts.update(
            residual=residual.data_ptr(), ld_residual=_stride(residual), residual_type=TYPES[residual.dtype]
        )
    call = Linear(
        x=rows.data_ptr(), weight=weight.weight.data_ptr(), scale=weight.scale.data_ptr(), y=y.data_ptr(),
        ldx=ldx, ldy=n, n=n, k=k, x_type=TYPES[rows.dtype], y_type=TYPES[out_dtype],
        activation=ACTIVATIONS[activation], format=weight.format, **parts,
    )  # fmt: skip
    for left in range(m, 0, -ROWS_AT_ONCE):
        call.m = min(left, ROWS_AT_ONCE)
        if (size := found.linear_workspace(byref(call))) > 0:  # below 0: an error, which the run returns too
            workspace = torch.empty(size, dtype=torch.uint8, device=device)
            call.workspace, call.workspace_bytes = workspace.data_ptr(), size
        found.check(found.linear_run(byref(call), stream_of(device)), "linear")
        if left > ROWS_AT_ONCE:
            _to_next_rows(call, rows.itemsize, y.itemsize, 0 if residual is None else residual.itemsize)
    return y


def _to_next_rows(call: Linear, x_bytes: int, y_bytes: int, residual_bytes: int) -> None:
    """Have a call that is done start after its rows. What comes before it on the stream is then a call of its
    kind.
    """
    call.x += call.m * call.ldx * x_bytes
    call.y += call.m * call.ldy * y_bytes
    if call.x_scale:
        call.x_scale += 4 * call.m
        call.x_zero += 4 * call.m
    if call.residual:
        call.residual += call.m * call.ld_residual * residual_bytes
    call.after_rows = 0
    call.workspace, call.workspace_bytes = None, 0


def _run_int_mm(
    x: Input,
    weight: CudaPackedWeight,
    bias: Tensor | None,
    activation: str,
    residual: Tensor | None,
    out_dtype: torch.dtype,
    *_: None,
) -> Tensor:
    (m, _), n, found = x.rows.shape, weight.shape[0], library.library()
    acc, scale, zero = _int_product(x, weight)
    y = torch.empty(m, n, dtype=out_dtype, device=weight.device)
    if residual is not None:
        residual = _side_by_side(residual)
    call = Finish(
        acc=acc.data_ptr(), x_scale=scale.data_ptr(), x_zero=zero.data_ptr(), scale=weight.scale.data_ptr(),
        total=weight.total.data_ptr(), bias=None if bias is None else bias.data_ptr(),
        residual=None if residual is None else residual.data_ptr(), y=y.data_ptr(),
        ld_acc=acc.shape[1], ldy=n, ld_residual=0 if residual is None else _stride(residual), m=m, n=n,
        y_type=TYPES[out_dtype], residual_type=0 if residual is None else TYPES[residual.dtype],
        activation=ACTIVATIONS[activation],
    )  # fmt: skip
    found.check(found.finish_run(byref(call), stream_of(weight.device)), "finish")
    return y


def _int_product(x: Input, weight: CudaPackedWeight) -> tuple[Tensor, Tensor, Tensor]:
    """(sums of products of codes int32 [at least m, at least n], scale and zero [m])."""
    codes = weight.rows()
    (rows, scale, zero), _ = x.codes(codes.shape[1], INT_MM_ROWS)
    return torch._int_mm(rows, codes.t()), scale, zero


def _run_dequantized(x: Input, weight: CudaPackedWeight, *rest: Any) -> Tensor:
    n, k = weight.shape
    dtype, found = x.rows.dtype, library.library()
    k_padded = -(-k // FLOATS_K) * FLOATS_K
    floats = torch.empty(n, k_padded, dtype=dtype, device=weight.device)
    call = Dequantize(
        weight=weight.weight.data_ptr(), scale=weight.scale.data_ptr(), y=floats.data_ptr(), ldy=k_padded,
        n=n, k=k_padded, y_type=TYPES[dtype], format=weight.format,
    )  # fmt: skip
    found.check(found.dequantize_run(byref(call), stream_of(weight.device)), "dequantize")
    return _multiply(x.rows, floats[:, :k], *rest)


def _run_in_torch(x: Input, weight: GpuWeight, *rest: Any) -> Tensor:
    return _multiply(x.rows, weight.dequantize(x.rows.dtype), *rest)


def _multiply(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    activation: str,
    residual: Tensor | None,
    out_dtype: torch.dtype,
    *_: None,
) -> Tensor:
    """By floats of the dtype of x, in which torch computes."""
    y = functional.linear(x, weight, None if bias is None else bias.to(x.dtype))
    return _add(_IN_TORCH[activation](y), residual, out_dtype)


def _add(y: Tensor, residual: Tensor | None, out_dtype: torch.dtype) -> Tensor:
    if residual is not None:
        y = y.add_(residual) if residual.dtype == y.dtype else y + residual
    return y.to(out_dtype)


def _side_by_side(rows: Tensor) -> Tensor:
    """Rows that a kernel reads: without gaps in them, and none over another."""
    (m, n), (outer, inner) = rows.shape, rows.stride()
    return rows if (inner == 1 or n == 1) and (m == 1 or outer >= n) else rows.contiguous()


def _stride(rows: Tensor) -> int:
    return rows.stride(0) if len(rows) > 1 else rows.shape[1]


_ROADS = {KERNEL: _run_kernel, INT_MM: _run_int_mm, DEQUANTIZE: _run_dequantized, TORCH: _run_in_torch}
