"""Rows of floats on a GPU to int8 codes: plain, normalized (LayerNorm, RMSNorm), or silu(gate) * up."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable
from ctypes import byref
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import layer_norm, silu

from ..quantize import RowQuantized
from ..reference import quantize_rows_ref
from . import library
from .library import Rows

TYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2, torch.int32: 3, torch.int8: 4}
PLAIN, LAYERNORM, RMSNORM, SILU_MUL = range(4)  # halfbyte_cuda_rows_kind
_HERE = contextlib.nullcontext()


def on(device: torch.device) -> contextlib.AbstractContextManager:
    """Within the block the device is the current one, as the library wants it."""
    if device.type != "cuda" or torch.cuda.current_device() == device.index:
        return _HERE
    return torch.cuda.device(device)


def stream_of(device: torch.device) -> int:
    """The handle of torch's current stream."""
    return torch._C._cuda_getCurrentRawStream(device.index) if device.type == "cuda" else 0


def codes_of(
    x: Tensor,
    *,
    k_padded: int = 0,
    least_rows: int = 0,
    symmetric: bool = False,
    static: tuple[float, int] = (0.0, 0),
    kind: int = PLAIN,
    residual: Tensor | None = None,
    total: Tensor | None = None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 0.0,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """(codes, scale [m], zero [m] or None where symmetric) of rows x [m, k], m and k at least 1, by the
    library.

    codes: int8 [m, k], or with zeros to the right and below [at least least_rows, k_padded]. static: a scale
    of 0 is found per row. residual: [m, k] of the dtype of x, as is total, which becomes x + residual.
    """
    (m, k), device = x.shape, x.device
    (x, ldx), (residual, ld_residual) = _strided(x), _strided(residual)
    k_padded = max(k, k_padded)
    codes = torch.empty(max(m, least_rows), k_padded, dtype=torch.int8, device=device)
    if m < least_rows:
        codes[m:] = 0
    scale = torch.empty(m, dtype=torch.float32, device=device)
    zero = None if symmetric else torch.empty(m, dtype=torch.int32, device=device)
    call = Rows(
        x=x.data_ptr(), residual=_address(residual), sum=_address(total), weight=_address(weight),
        bias=_address(bias), codes=codes.data_ptr(), scale=scale.data_ptr(), zero=_address(zero),
        ldx=ldx, ld_residual=ld_residual, ld_sum=k, ldc=k_padded,
        m=m, k=k, k_padded=k_padded, x_type=TYPES[x.dtype], kind=kind, symmetric=symmetric,
        eps=eps, static_scale=static[0], static_zero=static[1],
    )  # fmt: skip
    found = library.library()
    with on(device):
        found.check(found.rows_run(byref(call), stream_of(device)), "rows")
    return codes, scale, zero


def quantize_rows(x: Tensor, symmetric: bool, static: tuple[float, int]) -> RowQuantized:
    """Of x [m, k]. static: as in `codes_of`."""
    rows = _matrix(x)
    return _quantized(x, lambda: rows, symmetric, static, x=rows)


def normalize_quantize(
    x: Tensor,
    rms: bool,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    residual: Tensor | None,
    return_sum: bool,
    symmetric: bool,
    static: tuple[float, int],
) -> tuple[RowQuantized, Tensor | None]:
    """(codes of x + residual normalized, and x + residual where it is wanted) of x [..., k]; weight and bias
    float32 [k].
    """
    rows, other = _matrix(x), None if residual is None else _matrix(residual)
    if other is not None and other.dtype != rows.dtype:
        rows, other = rows.float(), other.float()
    total = torch.empty(rows.shape, dtype=rows.dtype, device=x.device) if return_sum else None

    def in_torch() -> Tensor:
        h = rows.float() if other is None else rows.float() + other.float()
        if total is not None:
            total.copy_(h)
        if not rms:
            return layer_norm(h, h.shape[1:], weight, bias, eps)
        h = h * torch.rsqrt(h.square().mean(1, keepdim=True) + eps)
        return h if weight is None else h * weight

    fused = {"kind": RMSNORM if rms else LAYERNORM, "weight": weight, "bias": bias, "eps": eps}
    q = _quantized(x, in_torch, symmetric, static, x=rows, residual=other, total=total, **fused)
    return q, None if total is None else total.to(x.dtype).view(x.shape)


def silu_mul_quantize(
    gate: Tensor, up: Tensor, symmetric: bool, static: tuple[float, int]
) -> RowQuantized:
    """Of silu(gate) * up, both [..., k]."""
    rows, other = _matrix(gate), _matrix(up)
    if other.dtype != rows.dtype:
        rows, other = rows.float(), other.float()

    def in_torch() -> Tensor:
        return silu(rows.float()) * other.float()

    return _quantized(gate, in_torch, symmetric, static, x=rows, residual=other, kind=SILU_MUL)


def _quantized(
    like: Tensor,
    in_torch: Callable[[], Tensor],
    symmetric: bool,
    static: tuple[float, int],
    **call: Any,
) -> RowQuantized:
    """The codes of rows, shaped as `like`. in_torch: the floats to quantize, where no kernel runs. call: the
    arguments of `codes_of`.
    """
    shape, m = like.shape, len(call["x"])
    if m == 0:
        codes = torch.empty(shape, dtype=torch.int8, device=like.device)
        ints = torch.empty(shape[:-1], dtype=torch.int32, device=like.device)
        return RowQuantized(codes, ints.float(), ints, ints.clone())
    if library.obstacle(like.device.index or 0):
        q = quantize_rows_ref(in_torch(), symmetric=symmetric, static=static if static[0] else None)
    else:
        codes, scale, zero = codes_of(symmetric=symmetric, static=static, **call)
        zero = torch.zeros(m, dtype=torch.int32, device=like.device) if zero is None else zero
        q = RowQuantized(codes, scale, zero, codes.sum(1, dtype=torch.int32))
    return RowQuantized(q.codes.view(shape), *(part.view(shape[:-1]) for part in q[1:]))


def _matrix(x: Tensor) -> Tensor:
    return x.detach().resolve_neg().reshape(math.prod(x.shape[:-1]), x.shape[-1])


def _strided(x: Tensor | None) -> tuple[Tensor | None, int]:
    """Rows whose elements lie side by side, and the distance of rows."""
    if x is None:
        return None, 0
    m, k = x.shape
    if (x.stride(1) != 1 and k > 1) or (m > 1 and x.stride(0) < k):
        x = x.contiguous()
    return x, x.stride(0) if m > 1 else k


def _address(tensor: Tensor | None) -> int | None:
    return None if tensor is None else tensor.data_ptr()
