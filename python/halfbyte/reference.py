"""What each op means, in plain torch on unpacked data: the specification that every kernel is tested against.

Each float32 operation is written in the order in which the kernels perform it, so integers and, with the
activations none and relu, floats agree bit for bit.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .quantize import TINY, RowQuantized

_ACTIVATIONS = {
    "none": lambda y: y,
    "relu": torch.relu,
    "gelu": torch.nn.functional.gelu,
    "gelu_tanh": lambda y: torch.nn.functional.gelu(y, approximate="tanh"),
    "silu": torch.nn.functional.silu,
}


def quantize_rows_ref(
    x: Tensor, *, symmetric: bool = False, static: tuple[float, int] | None = None
) -> RowQuantized:
    """Rows x [m, k] -> codes int8 [m, k], scale float32 [m], zero int32 [m], sums int32 [m]."""
    x = x.detach().float()
    finite = x.isfinite().all(1, keepdim=True)
    x = x.where(finite, 0)
    low, high = x.amin(1, keepdim=True).clamp(max=0), x.amax(1, keepdim=True).clamp(min=0)
    if static is not None:
        scale, zero = torch.full_like(low, static[0]), torch.full_like(low, static[1])
    elif symmetric:
        scale, zero = torch.maximum(-low, high) / 127, torch.zeros_like(low)
        scale = scale.where(scale >= TINY, 1)
    else:
        scale = high / 255 - low / 255
        empty, scale = scale < TINY, scale.where(scale >= TINY, 1)
        zero = ((-(low * (1 / scale))).round() - 128).clamp(-128, 127).where(~empty, 0)
    codes = (x * (1 / scale)).round().clamp(-(2**24), 2**24) + zero
    codes = codes.clamp(-127 if symmetric else -128, 127).where(finite, 0).to(torch.int8)
    return RowQuantized(
        codes,
        scale.where(finite, torch.nan)[:, 0],
        zero.where(finite, 0)[:, 0].int(),
        codes.sum(1, dtype=torch.int32),
    )


def linear_w8a8_ref(
    x: Tensor,
    codes: Tensor,
    scale: Tensor,
    bias: Tensor | None = None,
    *,
    activation: str = "none",
    residual: Tensor | None = None,
    out_dtype: torch.dtype | None = None,
    static: tuple[float, int] | None = None,
) -> Tensor:
    """x [m, k], weight codes int8 [n, k], scale float32 [n] -> [m, n]: activation(x @ weight.T + bias) +
    residual.

    acc = sum_k (qx - zero) * qw, exactly (float64 holds these integers); y = (float32(acc) * scale) *
    scale_x. Activations are evaluated in float64 and rounded once.
    """
    qx = quantize_rows_ref(x, static=static)
    acc = ((qx.codes.double() - qx.zero.double()[:, None]) @ codes.double().T).int()
    if out_dtype == torch.int32:
        return acc
    y = (acc.float() * scale) * qx.scale[:, None]
    if bias is not None:
        y = y + bias.float()
    y = _ACTIVATIONS[activation](y.double()).float()
    if residual is not None:
        y = y + residual.float()
    return y.to(out_dtype or x.dtype)
