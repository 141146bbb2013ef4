"""halfbyte::linear as a torch operator, for torch.compile, autograd and tracing; and the cache of packs.

Eager inference does not pass through the operator: layers call the core themselves.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from threading import RLock

import torch
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

from .arrays import on_gpu
from .errors import DeviceError
from .ops import run_linear
from .pack import GpuWeight, PackedWeight, pack
from .quantize import QuantizedTensor
from .quantized_tensor import unscaled
from .scheme import Scheme
from .sparse.scheme import SparseScheme
from .sparse.tensor import SparseTensor

# codes tensor -> {(scheme, shape): (states of all weight tensors, those but the codes, PackedWeight)}; an
# entry lives as long as its codes. Layers may share codes and quantize their inputs in different ways. Of
# sparse weights the values stand for the codes.
Pack = PackedWeight | GpuWeight
_Entry = tuple[list, tuple, Pack]
_packs: WeakIdKeyDictionary = WeakIdKeyDictionary()
_packs_lock = RLock()


def _unlock_in_child() -> None:
    # Another thread of the parent may have held the lock when this process was forked.
    global _packs_lock
    _packs_lock = RLock()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_unlock_in_child)


def pack_lock() -> RLock:
    """Held by whoever packs, frees codes that were packed, or makes them again."""
    return _packs_lock


def packed_weight(
    scheme: Scheme | SparseScheme, shape: tuple[int, int], codes: Tensor, *others: Tensor | None
) -> Pack:
    """The pack of a weight [n, k]: made once, and again after a tensor was changed or given other memory.

    others: scale, group_scale, zero and minimum, as in a QuantizedTensor; with a SparseScheme codes are the
    values of a SparseTensor and others its crow, columns, positions and scale. Inference tensors do not count
    their changes, so they are packed at every call.
    """

    def make() -> Pack:
        if isinstance(scheme, SparseScheme):
            return pack(SparseTensor(codes, scheme, shape, *others))
        scale, *rest = others
        return pack(QuantizedTensor(codes, scale, scheme, shape[1], *rest))

    tensors = (codes, *others)
    if any(t is not None and t.is_inference() for t in tensors):
        return make()
    with _packs_lock:
        if (packed := known_pack(scheme, shape, codes, *others)) is None:
            states = [None if t is None else state(t) for t in tensors]
            packed = make()
            if packed.shares_codes:  # the entry would keep them alive
                return packed
            _packs[codes] = _current(codes, states[0]) | {(scheme, shape): (states, others, packed)}
        return packed


def known_pack(
    scheme: Scheme | SparseScheme, shape: tuple[int, int], codes: Tensor, *others: Tensor | None
) -> Pack | None:
    """The pack of a weight where it is there and nothing has changed since: the codes are not read."""
    with _packs_lock:
        entry = _packs.get(codes, {}).get((scheme, shape))
        if entry is None or any(a is not b for a, b in zip(entry[1], others, strict=True)):
            return None
        states = [None if t is None else state(t) for t in (codes, *others)]
        return entry[2] if entry[0] == states else None


def move_packs(codes: Tensor, other: Tensor) -> None:
    """The packs of `codes` are those of `other` too, which has or stands for the same values."""
    with _packs_lock:
        _packs[other] = {
            key: ([state(other), *states[1:]], others, packed)
            for key, (states, others, packed) in _current(codes, state(codes)).items()
        }


def _current(codes: Tensor, now: tuple[int, int]) -> dict[tuple, _Entry]:
    """The packs of the values that `codes` have now."""
    return {key: entry for key, entry in _packs.get(codes, {}).items() if entry[0][0] == now}


def state(tensor: Tensor) -> tuple[int, int]:
    """What changes with the values of a tensor: its version, and its memory for `tensor.data = other`."""
    return tensor._version, tensor.data_ptr()


_library = torch.library.Library("halfbyte", "DEF")
_library.define(
    "linear(Tensor x, str scheme, Tensor codes, Tensor scale, Tensor? group_scale=None, Tensor? zero=None, "
    "Tensor? minimum=None, Tensor? bias=None, str activation='none', Tensor? residual=None, "
    "Tensor? input_scale=None, Tensor? input_zero=None) -> Tensor",
    tags=(torch.Tag.pt2_compliant_tag,),
)


def _linear(
    x: Tensor,
    scheme: str,
    codes: Tensor,
    scale: Tensor,
    group_scale: Tensor | None = None,
    zero: Tensor | None = None,
    minimum: Tensor | None = None,
    bias: Tensor | None = None,
    activation: str = "none",
    residual: Tensor | None = None,
    input_scale: Tensor | None = None,
    input_zero: Tensor | None = None,
) -> Tensor:
    parsed = Scheme.parse(scheme)
    # x says whether the last half of a byte is used; where x does not fit, run_linear explains.
    k = _features(parsed, codes)
    k -= parsed.weight_bits == 4 and x.ndim > 0 and x.shape[-1] == k - 1
    packed = packed_weight(parsed, (codes.shape[0], k), codes, scale, group_scale, zero, minimum)
    return run_linear(x, packed, bias, activation, residual, None, static_of(input_scale, input_zero))


# input_scale -> (input_zero, the states of both, the pair). Reading them from a GPU waits for it, which
# capturing a CUDA graph forbids.
_statics: WeakIdKeyDictionary = WeakIdKeyDictionary()


def static_of(input_scale: Tensor | None, input_zero: Tensor | None) -> tuple[float, int] | None:
    """The numbers of a static layer, of a GPU read once for the values that the tensors have."""
    if input_scale is None:
        return None
    if not on_gpu(input_scale) or input_scale.is_inference() or input_zero.is_inference():
        return input_scale.item(), input_zero.item()
    states = state(input_scale), state(input_zero)
    entry = _statics.get(input_scale)
    if entry is None or entry[0] is not input_zero or entry[1] != states:
        from .cuda.pack import check_not_captured

        check_not_captured(input_scale)
        pair = input_scale.item(), input_zero.item()
        entry = _statics[input_scale] = input_zero, states, pair
    return entry[2]


def _linear_fake(x: Tensor, scheme: str, codes: Tensor, *others) -> Tensor:
    check_not_meta(codes, x, "codes")
    check_one_device(codes, x, "codes")
    parsed = Scheme.parse(scheme)
    k = _features(parsed, codes)
    fits = x.shape[-1] == k or (parsed.weight_bits == 4 and x.shape[-1] == k - 1)
    torch._check(fits, lambda: f"x has the shape {tuple(x.shape)}; its last dimension must be {k}")
    return x.new_empty((*x.shape[:-1], codes.shape[0]))


def _features(scheme: Scheme, codes: Tensor) -> int:
    """The most input features that the codes have room for."""
    return codes.shape[1] * (2 if scheme.weight_bits == 4 else 1)


def _save_for_backward(ctx, inputs: tuple, output: Tensor) -> None:
    x, scheme, codes, scale, group_scale, zero, minimum, bias, activation, residual, *_ = inputs
    ctx.save_for_backward(codes, scale, group_scale, zero, minimum)
    ctx.scheme, ctx.features, ctx.activation = scheme, x.shape[-1], activation
    ctx.dtypes = [None if t is None else t.dtype for t in (x, bias, residual)]


def _backward(ctx, grad: Tensor) -> tuple:
    codes, scale, *rest = ctx.saved_tensors

    def times_weight(g: Tensor) -> Tensor:
        return (g * scale) @ unscaled(codes, Scheme.parse(ctx.scheme), ctx.features, *rest)

    return straight_through(ctx, grad, linear, "codes and scales", times_weight)


def straight_through(
    ctx, grad: Tensor, op: torch._ops.OpOverload, constant: str, times_weight: Callable[[Tensor], Tensor]
) -> tuple:
    """The gradients of a linear operator, straight through the rounding of x: those of x @ weight.T + bias +
    residual.

    ctx: has the activation and the dtypes of x, bias and residual. constant: the arguments without gradients.
    times_weight: of a float32 gradient g [..., n], g @ weight.
    """
    if ctx.activation != "none":
        raise NotImplementedError(
            f"{op.name()} has no gradient with activation={ctx.activation!r}; use activation='none' and "
            "torch's own activation after it"
        )
    arguments = [argument.name for argument in op._schema.arguments]
    needed = dict(zip(arguments, ctx.needs_input_grad, strict=False))  # trailing defaults are left out
    if any(needed.get(name) for name in arguments if name not in ("x", "bias", "residual")):
        raise NotImplementedError(f"{op.name()} has gradients for x, bias and residual, not for {constant}")
    x_dtype, bias_dtype, residual_dtype = ctx.dtypes
    grad = grad.float()
    given = dict.fromkeys(arguments)
    if needed["x"]:
        given["x"] = times_weight(grad).to(x_dtype)
    if needed.get("bias"):
        given["bias"] = grad.reshape(-1, grad.shape[-1]).sum(0).to(bias_dtype)
    if needed.get("residual"):
        given["residual"] = grad.to(residual_dtype)
    return tuple(given.values())


def check_not_meta(weight: Tensor, x: Tensor, what: str) -> None:
    """DeviceError for a weight on the meta device and an x that is not: torch asks a fake for both."""
    if weight.device.type == "meta" and x.device.type != "meta":
        raise DeviceError(f"{what} is on the meta device, without data; load its values first")


def check_one_device(weight: Tensor, x: Tensor, what: str) -> None:
    """DeviceError where x is on a GPU and the weight is not, or the other way round."""
    devices = x.device, weight.device
    if devices[0] != devices[1] and "meta" not in (device.type for device in devices):
        raise DeviceError(
            f"x is on the device {str(devices[0])!r} and {what} on {str(devices[1])!r}: move one of them"
        )


for _key in ("CPU", "CUDA"):
    _library.impl("linear", _linear, _key)
torch.library.register_fake("halfbyte::linear", _linear_fake, lib=_library)
torch.library.register_autograd("halfbyte::linear", _backward, setup_context=_save_for_backward, lib=_library)

linear = torch.ops.halfbyte.linear.default
