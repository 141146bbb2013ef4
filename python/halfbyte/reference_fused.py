"""What the ops between the linear ones mean, in plain torch: a part of halfbyte.reference, and as exact."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .exact import fma, sqrt, sum16, sum16_of_squares


def norm_ref(
    x: Tensor,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    *,
    rms: bool = False,
    eps: float = 1e-5,
    residual: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Rows x [..., k] -> (y, h), both float32: h = x + residual, and y = h normalized.

    LayerNorm is fma(d * r, weight, bias), d = h - mean, r = 1 / sqrt(sum(d^2) / k + eps); RMSNorm is
    (h * r) * weight, r = 1 / sqrt(sum(h^2) / k + eps). The sums are those of halfbyte.exact.
    """
    h = x.float() if residual is None else x.float() + residual.float()
    k = torch.tensor(float(h.shape[-1]))
    d = h if rms else h - (sum16(h) / k)[..., None]
    variance = sum16_of_squares(d) / k
    y = d * (1 / sqrt(variance + torch.tensor(eps)))[..., None]
    if weight is not None and bias is not None:
        y = fma(y, weight, bias)
    elif weight is not None:
        y = y * weight
    elif bias is not None:
        y = y + bias
    return y, h


def silu_mul_ref(gate: Tensor, up: Tensor) -> Tensor:
    """silu(gate) * up, float32; silu in float64, rounded once."""
    return torch.nn.functional.silu(gate.double()).float() * up.float()


def rope_ref(
    x: Tensor,
    cos: Tensor,
    sin: Tensor,
    positions: Tensor,
    *,
    interleaved: bool = False,
    out_dtype: torch.dtype | None = None,
) -> Tensor:
    """x [..., tokens, heads, head_size], tables [table, rotary_dims / 2], positions [..., tokens].

    Pairs (i, i + rotary_dims / 2), or (2 i, 2 i + 1) where interleaved, turn by the angle of their position;
    elements from rotary_dims on stay.
    """
    half = cos.shape[1]
    cos, sin = cos[positions][..., None, :], sin[positions][..., None, :]
    turned, rest = x.float()[..., : 2 * half], x.float()[..., 2 * half :]
    shape, dim = ((half, 2), -1) if interleaved else ((2, half), -2)
    a, b = turned.unflatten(-1, shape).unbind(dim)
    turned = torch.stack((a * cos - b * sin, b * cos + a * sin), dim).flatten(-2)
    return torch.cat((turned, rest), -1).to(out_dtype or x.dtype)


_KEY_BLOCK = 64
_LOWEST = torch.finfo(torch.float32).min
# 2^r for |r| <= 1/2, the highest power first.
_POWER_OF_2 = (
    0.001326472731307149, 0.009671512991189957, 0.05550733581185341, 0.24022242426872253,
    0.6931470036506653, 1.0,
)  # fmt: skip


def attention_ref(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    mask: Tensor | None = None,
    causal: bool = False,
    window: int = 0,
    scale: float | None = None,
    k_scale: Tensor | None = None,
    v_scale: Tensor | None = None,
) -> Tensor:
    """q [batch, heads, queries, d], k and v [batch, kv heads, keys, d], scales of int8 [batch, kv heads,
    keys]: softmax(scale * q @ k.T + mask) @ v, the last query standing at the last key.

    Scores are in units of log 2 and accumulate by fma in the order of d, from 0. Keys are walked in blocks of
    64, with the maximum, the sum of the weights (sum16 within a block) and the output of the keys so far,
    which accumulates by fma in the order of the keys.
    """
    group, (queries, keys, d) = q.shape[1] // k.shape[1], (q.shape[2], k.shape[2], q.shape[3])
    k, v = (
        (x.float() if s is None else x.float() * s[..., None]).repeat_interleave(group, 1)
        for x, s in ((k, k_scale), (v, v_scale))
    )
    scale = torch.tensor(1 / math.sqrt(d) if scale is None else scale).float().item()
    t = q.float() * torch.tensor(scale * math.log2(math.e)).float()
    own, key = torch.arange(queries)[:, None] + keys - queries, torch.arange(keys)
    seen = ((key <= own) | (not causal)) & ((key > own - window) | (window == 0))
    bias = torch.zeros(())
    if mask is not None and mask.dtype == torch.bool:
        seen = seen & mask
    elif mask is not None:
        bias = mask.float() * torch.tensor(math.log2(math.e)).float()
        bias = torch.where(mask > -math.inf, bias.clamp(min=_LOWEST), mask.float())
        seen = seen & (mask != -math.inf)
    s = torch.zeros(*q.shape[:3], keys)
    for i in range(d):
        s = fma(t[..., i, None], k[:, :, None, :, i], s)
    s = torch.where(seen, s + bias, -math.inf)
    out, total = torch.zeros_like(t), torch.zeros(q.shape[:3])
    top = torch.full_like(total, _LOWEST)
    for first in range(0, keys, _KEY_BLOCK):
        block = s[..., first : first + _KEY_BLOCK]
        above = torch.maximum(top, block.nan_to_num(_LOWEST, math.inf, -math.inf).amax(-1))
        decay, weights = _power_of_2(top - above), _power_of_2(block - above[..., None])
        top, total = above, fma(total, decay, sum16(weights))
        out = out * decay[..., None]
        for j in range(block.shape[-1]):
            out = fma(weights[..., j, None], v[:, :, None, first + j], out)
    return (out * torch.where(total == 0, 0, 1 / total)[..., None]).to(q.dtype)


def _power_of_2(x: Tensor) -> Tensor:
    x = x.clamp(min=-127)
    n = x.round()
    p = torch.full_like(x, _POWER_OF_2[0])
    for coefficient in _POWER_OF_2[1:]:
        p = fma(p, x - n, torch.tensor(coefficient))
    return torch.where(n == -127, p * 0, p * torch.exp2(n))
