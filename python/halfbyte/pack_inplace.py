"""pack_: layers that hold their weight once, as the kernels read it, and make the codes again when asked.

While its codes are freed, a layer has a class of its own, derived from the one it had, and a stand-in among
its buffers: a tensor of the shape of the codes on the meta device, which has no memory that could be read.
Attributes, methods of nn.Module and the tools of torch reach buffers as `layer.weight_codes` or
`layer._buffers`; in that class both make the codes first, and give the layer its class back. Only the
functions of this package that call `held` see the stand-in.
"""

from __future__ import annotations

import contextlib
import ctypes
from collections.abc import Iterator
from functools import cache
from typing import Any
from weakref import WeakSet

import torch
from torch import Tensor, nn

from . import _core
from .arrays import place_of
from .errors import HalfbyteError, ModelError
from .modules import check_module
from .pack import GpuWeight, PackedWeight
from .packed_layer import count_changes, held, weight_of
from .qlinear import WEIGHT_BUFFERS, QLinear
from .quantize import QuantizedTensor
from .torch_ops import known_pack, move_packs, pack_lock, packed_weight

_CODES = WEIGHT_BUFFERS[0]
_FREED = "_freed"  # the attribute that holds the _Freed of a layer, while it has one


def pack_(model: nn.Module) -> nn.Module:
    """Pack every QLinear of `model` now and free the memory of its codes, in place; returns the model.

    Eager inference needs the pack alone. Whatever asks for the codes has them made again from it, exactly:
    `state_dict`, `buffers`, `layer.weight_codes`, `layer.quantized`, `layer.weight.dequantize()`, assigning a
    buffer, `.to()` and its kind, `load_state_dict`, copying, pickling, a gradient of x, torch.compile, export
    and tracers. They then stay, beside the pack, in every layer that shares them, until `pack_` is called
    again. `save` and `summary` free them again themselves. A compiled model needs its codes: there `pack_`
    saves nothing, and each call of it has torch compile the model once more.

    Layers that share codes are freed together. Codes that anything else in the model has too, such as the
    QEmbedding of a tied head, which reads its rows from them, are kept; those layers are only packed.
    SparseLinear layers are left as they are, and so are layers on a GPU that torch computes from their codes.
    A tensor that was taken out of the model before, in a state_dict for one, keeps its memory and is from
    then on a copy. Forward calls in other threads give the same answers meanwhile; some wait for the end.

    An error leaves the model as it was. Raises ModelError for a model without a QLinear, DeviceError for
    layers on the meta device, and what `pack` raises, naming the layer.
    """
    check_module(model, "pack_")
    layers = {name: module for name, module in model.named_modules() if isinstance(module, QLinear)}
    if not layers:
        raise ModelError(f"pack_: this {type(model).__name__} has no QLinear; call halfbyte.quantize_ first")
    with pack_lock():
        freed_before = {layer for layer in layers.values() if is_freed(layer)}
        for name, layer in layers.items():
            with _naming(name):
                _check(layer)
        try:
            _free_all(model, layers)
        except BaseException:
            for layer in set(layers.values()) - freed_before:
                restore(layer)
            raise
    _trim()
    return model


@contextlib.contextmanager
def freed_again(model: nn.Module) -> Iterator[None]:
    """At the end of the block, the codes that were freed at its beginning are freed again."""
    layers = {name: module for name, module in model.named_modules() if is_freed(module)}
    try:
        yield
    finally:
        with pack_lock():
            _free_all(model, layers)


def is_freed(module: nn.Module) -> bool:
    """Whether it is a QLinear without its codes."""
    return _FREED in vars(module)


def tensors(model: nn.Module) -> Iterator[Tensor]:
    """The parameters and buffers of a model as they are: codes that are freed as their stand-ins."""
    for module in model.modules():
        buffers = held(module) if is_freed(module) else module._buffers
        yield from (t for t in (*module._parameters.values(), *buffers.values()) if t is not None)


def freed_bytes(model: nn.Module) -> int:
    """How much memory the codes would take that are freed."""
    stand_ins = [held(module)[_CODES] for module in model.modules() if is_freed(module)]
    return sum({id(codes): codes.nbytes for codes in stand_ins}.values())


def restore(layer: QLinear) -> dict[str, Tensor | None]:
    """The buffers of a layer, with its codes, which are made from the pack where they are freed."""
    with pack_lock():
        if is_freed(layer):
            vars(layer)[_FREED].end()
        return held(layer)


class _Freed:
    """Codes that are in a pack alone, and the layers that share them."""

    def __init__(self, codes: Tensor, packed: PackedWeight | GpuWeight):
        # Made now, so that `end` does nothing that a mode or a tracer would see.
        with torch.inference_mode(False):
            self.stand_in = torch.empty(codes.shape, dtype=codes.dtype, device="meta")
            self.codes = torch.empty(codes.shape, dtype=codes.dtype, device=codes.device)
        place_of(self.codes, "a new tensor of codes")  # a mode or a transform may have made something else
        self.packed = packed
        self.memory = self.codes.untyped_storage()
        self.nbytes, self.row_bytes = self.memory.nbytes(), codes.shape[1]
        self.memory.resize_(0)
        self.layers: WeakSet[QLinear] = WeakSet()

    def begin(self, layer: QLinear) -> None:
        """Free the codes of one layer. Its buffers are a new dictionary: a thread may be reading the old."""
        buffers = held(layer) | {_CODES: self.stand_in}
        object.__setattr__(layer, "__class__", _without_codes(type(layer)))
        vars(layer).update({"_buffers": buffers, "_plan": None, "_prepared": None, _FREED: self})
        self.layers.add(layer)

    def end(self) -> None:
        """Make the codes, and give them to the layers."""
        self.memory.resize_(self.nbytes)
        if isinstance(self.packed, GpuWeight):
            self.packed.unpack_into(self.codes)
        else:
            _core.unpack_linear(self.packed.core, self.memory.data_ptr(), self.row_bytes)
        move_packs(self.stand_in, self.codes)
        for layer in list(self.layers):
            buffers = held(layer) | {_CODES: self.codes}
            vars(layer).update({"_buffers": buffers, "_plan": None, "_prepared": None})
            del vars(layer)[_FREED]
            object.__setattr__(layer, "__class__", type(layer)._with_codes)


@cache
def _without_codes(cls: type[QLinear]) -> type[QLinear]:
    """`cls` for layers whose codes are freed."""

    # Methods call those of `cls` by name: super() would find the class changed.
    class WithoutCodes(cls):
        _with_codes = cls

        @property
        def _buffers(self) -> dict[str, Tensor | None]:
            return restore(self)

        def __getattr__(self, name: str) -> Any:
            return restore(self)[name] if name == _CODES else cls.__getattr__(self, name)

        def __setattr__(self, name: str, value: Any) -> None:
            if name == _CODES:
                restore(self)
            cls.__setattr__(self, name, value)

        def __reduce_ex__(self, protocol: int) -> Any:
            restore(self)
            return cls.__reduce_ex__(self, protocol)

    for name in ("__name__", "__qualname__", "__module__", "__doc__"):
        setattr(WithoutCodes, name, getattr(cls, name))
    return WithoutCodes


def _check(layer: QLinear) -> None:
    """Errors where `pack` would raise one, as far as that can be told before packing."""
    count_changes(layer)
    if known_pack(*weight_of(layer)) is None:
        q: QuantizedTensor = layer.quantized
        kind = place_of(q.codes, _CODES)
        for name, part in zip(WEIGHT_BUFFERS, layer._weight(), strict=True):
            if part is not None:
                kind.check_memory(part, name)


def _free_all(model: nn.Module, layers: dict[str, QLinear]) -> None:
    """Pack layers of a model, and free the codes that nothing else in it has."""
    others = [module for module in model.modules() if not isinstance(module, QLinear)]
    kept = {id(t) for m in others for t in (*m._parameters.values(), *m._buffers.values()) if t is not None}
    groups: dict[int, dict[str, QLinear]] = {}
    for name, layer in layers.items():
        groups.setdefault(id(held(layer)[_CODES]), {})[name] = layer
    for codes, sharing in groups.items():
        _free(sharing, keep=codes in kept)


def _free(layers: dict[str, QLinear], keep: bool) -> None:
    """Pack layers that share their codes, and free those unless they are to be kept."""
    sharing = list(layers.values())
    if any(known_pack(*weight_of(layer)) is None for layer in sharing):
        restore(sharing[0])
    packs = []
    for name, layer in layers.items():
        with _naming(name):
            packs.append(packed_weight(*weight_of(layer)))
    codes = held(sharing[0])[_CODES]
    if keep or is_freed(sharing[0]) or any(pack.shares_codes for pack in packs):
        return
    freed = _Freed(codes, packs[0])
    move_packs(codes, freed.stand_in)
    for layer in sharing:
        freed.begin(layer)


def _trim() -> None:
    """Give what was freed back to the system: glibc keeps free memory that lies between blocks in use."""
    with contextlib.suppress(OSError, AttributeError, TypeError):  # another C library
        ctypes.CDLL(None).malloc_trim(0)


@contextlib.contextmanager
def _naming(name: str) -> Iterator[None]:
    try:
        yield
    except (HalfbyteError, ValueError) as error:
        error.args = (f"pack_: {name or 'the model'}: {error}",)
        raise
