"""What each op means, in plain torch on unpacked data: the specification that every kernel is tested against.

Each float32 operation is written in the order in which the kernels perform it, so integers and, with the
activations none and relu, floats agree bit for bit.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .exact import fma
from .quantize import TINY, QuantizedTensor, RowQuantized
from .reference_fused import attention_ref as attention_ref
from .reference_fused import norm_ref as norm_ref
from .reference_fused import rope_ref as rope_ref
from .reference_fused import silu_mul_ref as silu_mul_ref
from .scheme import Scheme

_ACTIVATIONS = {
    "none": lambda y: y,
    "relu": torch.relu,
    "gelu": torch.nn.functional.gelu,
    "gelu_tanh": lambda y: torch.nn.functional.gelu(y, approximate="tanh"),
    "silu": torch.nn.functional.silu,
}


def quantize_rows_ref(
    x: Tensor,
    *,
    symmetric: bool = False,
    static: tuple[float, int] | None = None,
    group: int = 0,
    wide: bool = False,
) -> RowQuantized:
    """Rows x [m, k] -> codes int8 [m, k], scale float32 [m], zero int32 [m], sums int32 [m].

    group: symmetric, one scale per row and `group` elements of it, the last group may be shorter: scale, zero
    and sums are [m, groups]. wide: symmetric codes int16 of up to 32639 = 256 * 127 + 127, the largest that
    two int8 make, instead of 127.
    """
    if group:
        m, k = x.shape
        groups = -(-k // group)
        padded = torch.nn.functional.pad(x.detach().float(), (0, groups * group - k))
        q = quantize_rows_ref(padded.reshape(m * groups, group), symmetric=True, wide=wide)
        scale, zero, sums = (part.reshape(m, groups) for part in (q.scale, q.zero, q.sums))
        return RowQuantized(q.codes.reshape(m, groups * group)[:, :k], scale, zero, sums)
    x = x.detach().float()
    finite = x.isfinite().all(1, keepdim=True)
    x = x.where(finite, 0)
    low, high = x.amin(1, keepdim=True).clamp(max=0), x.amax(1, keepdim=True).clamp(min=0)
    symmetric = symmetric or wide
    limit = 32639 if wide else 127
    if static is not None:
        scale, zero = torch.full_like(low, static[0]), torch.full_like(low, static[1])
    elif symmetric:
        scale, zero = torch.maximum(-low, high) / limit, torch.zeros_like(low)
        scale = scale.where(scale >= TINY, 1)
    else:
        scale = high / 255 - low / 255
        empty, scale = scale < TINY, scale.where(scale >= TINY, 1)
        zero = ((-(low * (1 / scale))).round() - 128).clamp(-128, 127).where(~empty, 0)
    codes = (x * (1 / scale)).round().clamp(-(2**24), 2**24) + zero
    codes = codes.clamp(-limit if symmetric else -128, limit).where(finite, 0)
    codes = codes.to(torch.int16 if wide else torch.int8)
    return RowQuantized(
        codes,
        scale.where(finite, torch.nan)[:, 0],
        zero.where(finite, 0)[:, 0].int(),
        codes.sum(1, dtype=torch.int32),
    )


def linear_ref(
    x: Tensor,
    q: QuantizedTensor,
    bias: Tensor | None = None,
    *,
    activation: str = "none",
    residual: Tensor | None = None,
    out_dtype: torch.dtype | None = None,
    static: tuple[float, int] | None = None,
) -> Tensor:
    """x [m, k], weight q [n, k] -> [m, n]: activation(x @ weight.T + bias) + residual, for every scheme.

    With groups of k (of the weight, or else of the activations; without either, one group of all k) t is the
    float32 sum over the groups g, in order, of

        float32(acc) * group_scale[n, g] * a_scale[m, g],    acc = sum_k in g of qx * (c - zero[n, g])
        + (float32(sum_k in g of qx) * a_scale[m, g]) * minimum[n, g]

    with the factors and the second term that the scheme has, acc exactly. The last product of each term and
    its addition to t are one operation, fma, which rounds once. Then y = t * scale[n], where activations have
    their scales per group; and y = ((t - zero_x[m] * total[n]) * scale[n]) * scale_x[m], where they have a
    scale and zero point per token: total is the sum of the weights without `scale`, summed over the groups in
    float64 and rounded once. The scheme w8a8 has no groups: linear_w8a8_ref.
    """
    scheme = q.scheme
    if scheme == Scheme(8, 8):
        return linear_w8a8_ref(
            x, q.codes, q.scale, bias,
            activation=activation, residual=residual, out_dtype=out_dtype, static=static,
        )  # fmt: skip
    m, (n, k) = len(x), q.shape
    size = scheme.fold_group or max(k, 1)
    if scheme.per_token:
        qx = quantize_rows_ref(x if k else x.new_zeros(m, 1), static=static)
    else:
        qx = quantize_rows_ref(x, group=size, wide=scheme.activation_bits == 16)
    codes_x, codes = qx.codes.double(), q.unpacked().double()
    t, total = torch.zeros(m, n), torch.zeros(n, dtype=torch.float64)
    for g in range(-(-k // size)):
        here = slice(g * size, min((g + 1) * size, k))
        column = g if scheme.group else 0
        c = codes[:, here] if q.zero is None else codes[:, here] - q.zero[:, column, None].double()
        p, part, factors = (codes_x[:, here] @ c.T).float(), c.sum(1), []
        if q.group_scale is not None:
            factors.append(q.group_scale[:, column].float())
            part = part * q.group_scale[:, column].double()
        if not scheme.per_token:
            factors.append(qx.scale[:, g, None])
        if len(factors) == 2:
            p = p * factors.pop(0)
        t = fma(p, factors[0], t) if factors else t + p
        if q.minimum is not None:
            s = codes_x[:, here].sum(1, keepdim=True).float()
            if not scheme.per_token:
                s = s * qx.scale[:, g, None]
            t = fma(s, q.minimum[:, column].float(), t)
            part = part + c.shape[1] * q.minimum[:, column].double()
        total = total + part
    if scheme.per_token:
        t = t - qx.zero.float()[:, None] * total.float()
    y = t * q.scale
    if scheme.per_token:
        y = y * qx.scale[:, None]
    return _finish(y, x, bias, activation, residual, out_dtype)


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
    return _finish((acc.float() * scale) * qx.scale[:, None], x, bias, activation, residual, out_dtype)


def embedding_ref(ids: Tensor, q: QuantizedTensor, out_dtype: torch.dtype = torch.float32) -> Tensor:
    """Rows `ids` [...] of the dequantized table q [n, k]: [..., k]."""
    return q.dequantize()[ids].to(out_dtype)


def _finish(
    y: Tensor,
    x: Tensor,
    bias: Tensor | None,
    activation: str,
    residual: Tensor | None,
    out_dtype: torch.dtype | None,
) -> Tensor:
    """What follows the product, float32 [m, n]; the activation in float64, rounded once."""
    if bias is not None:
        y = y + bias.float()
    y = _ACTIVATIONS[activation](y.double()).float()
    if residual is not None:
        y = y + residual.float()
    return y.to(out_dtype or x.dtype)
