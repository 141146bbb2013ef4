"""halfbyte::linear_w8a8 as a torch operator, for torch.compile, autograd and tracing; and the cache of packs.

Eager inference does not pass here: QLinear calls the core itself.
"""

from __future__ import annotations

import os
from threading import Lock

import torch
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

from .ops import run_linear
from .pack import PackedWeight, pack
from .quantize import QuantizedTensor
from .scheme import Scheme

_W8A8 = Scheme.parse("w8a8")

# codes tensor -> (states of codes and scale, the scale tensor, PackedWeight); an entry lives as long as its
# codes.
_packs: WeakIdKeyDictionary = WeakIdKeyDictionary()
_packs_lock = Lock()


def _unlock_in_child() -> None:
    # Another thread of the parent may have held the lock when this process was forked.
    global _packs_lock
    _packs_lock = Lock()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_unlock_in_child)


def packed_weight(codes: Tensor, scale: Tensor) -> PackedWeight:
    """The pack of these w8a8 codes: made once, and again after a tensor was changed or given other memory.

    Inference tensors do not count their changes, so they are packed at every call.
    """
    if codes.is_inference() or scale.is_inference():
        return pack(QuantizedTensor(codes, scale, _W8A8))
    with _packs_lock:
        states = state(codes), state(scale)
        entry = _packs.get(codes)
        if entry is None or entry[0] != states or entry[1] is not scale:
            entry = states, scale, pack(QuantizedTensor(codes, scale, _W8A8))
            _packs[codes] = entry
        return entry[2]


def state(tensor: Tensor) -> tuple[int, int]:
    """What changes with the values of a tensor: its version, and its memory for `tensor.data = other`."""
    return tensor._version, tensor.data_ptr()


_library = torch.library.Library("halfbyte", "DEF")
_library.define(
    "linear_w8a8(Tensor x, Tensor codes, Tensor scale, Tensor? bias=None, str activation='none', "
    "Tensor? residual=None, Tensor? input_scale=None, Tensor? input_zero=None) -> Tensor",
    tags=(torch.Tag.pt2_compliant_tag,),
)


def _linear(
    x: Tensor,
    codes: Tensor,
    scale: Tensor,
    bias: Tensor | None = None,
    activation: str = "none",
    residual: Tensor | None = None,
    input_scale: Tensor | None = None,
    input_zero: Tensor | None = None,
) -> Tensor:
    static = None if input_scale is None else (input_scale.item(), input_zero.item())
    return run_linear(x, packed_weight(codes, scale), bias, activation, residual, None, static)


def _linear_fake(
    x: Tensor,
    codes: Tensor,
    scale: Tensor,
    bias: Tensor | None = None,
    activation: str = "none",
    residual: Tensor | None = None,
    input_scale: Tensor | None = None,
    input_zero: Tensor | None = None,
) -> Tensor:
    torch._check(
        x.shape[-1] == codes.shape[1],
        lambda: f"x has the shape {tuple(x.shape)}; its last dimension must be {codes.shape[1]}",
    )
    return x.new_empty((*x.shape[:-1], codes.shape[0]))


def _save_for_backward(ctx, inputs: tuple, output: Tensor) -> None:
    x, codes, scale, bias, activation, residual, *_ = inputs
    ctx.save_for_backward(codes, scale)
    ctx.activation = activation
    ctx.dtypes = [None if t is None else t.dtype for t in (x, bias, residual)]


def _backward(ctx, grad: Tensor) -> tuple:
    """Straight through the rounding of x: the gradient of x @ (codes * scale).T + bias + residual."""
    if ctx.activation != "none":
        raise NotImplementedError(
            f"linear_w8a8 has no gradient with activation={ctx.activation!r}; use activation="
            "'none' and torch's own activation after it"
        )
    needed = (*ctx.needs_input_grad, *[False] * 8)[
        :8
    ]  # torch leaves out trailing arguments at their defaults
    if any(needed[i] for i in (1, 2, 6, 7)):
        raise NotImplementedError(
            "linear_w8a8 has gradients for x, bias and residual, not for codes and scales"
        )
    codes, scale = ctx.saved_tensors
    x_dtype, bias_dtype, residual_dtype = ctx.dtypes
    grad = grad.float()
    grad_x = ((grad * scale) @ codes.float()).to(x_dtype) if needed[0] else None
    grad_bias = grad.reshape(-1, codes.shape[0]).sum(0).to(bias_dtype) if needed[3] else None
    grad_residual = grad.to(residual_dtype) if needed[5] else None
    return grad_x, None, None, grad_bias, None, grad_residual, None, None


_library.impl("linear_w8a8", _linear, "CPU")
torch.library.register_fake("halfbyte::linear_w8a8", _linear_fake, lib=_library)
torch.library.register_autograd(
    "halfbyte::linear_w8a8", _backward, setup_context=_save_for_backward, lib=_library
)

linear_w8a8 = torch.ops.halfbyte.linear_w8a8.default
