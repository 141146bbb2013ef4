"""A stack of transformer blocks as the C++ core runs it: what it is made of, and one call for all of it."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.utils.weak import WeakIdKeyDictionary

from .. import _core, dispatch
from ..arrays import kind_of, wraps
from ..dispatch import isa_errors
from ..ops import ACTIVATIONS
from ..pack import pack
from ..packed_layer import PackedLayer, held
from ..torch_ops import state

if TYPE_CHECKING:
    from .cache import KVCache

_FLOATS = (torch.float32, torch.bfloat16, torch.float16)
_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
_GLOBAL_HOOKS = [getattr(torch.nn.modules.module, f"_global{hooks}") for hooks in _HOOKS]
# How much of a watched value is compared: the number of keys, the object; or a tensor's version and memory.
_LENGTH, _IDENTITY = -3, -2
_LINEARS = ("q", "k", "v", "o", "gate", "up", "down")
_get_num_threads = torch.get_num_threads

# float weight -> {rows: (its state, weak reference to the pack)}: stacks of one model share what they pack.
_float_packs: WeakIdKeyDictionary = WeakIdKeyDictionary()

# Of `recording`, on this thread.
_recorder: ContextVar[Callable[[StackRun], None] | None] = ContextVar("recorder", default=None)


class CannotFuse(Exception):
    """Why something is left to its own forward, in one line."""


@dataclass(frozen=True)
class Rows:
    """Rows begin .. end-1 of a merged projection's outputs, of a float weight [n, k] or a packed layer."""

    of: Tensor | PackedLayer
    begin: int
    end: int
    bias: Tensor | None = None  # [end - begin]; that of a packed layer is taken from it


LinearLike = nn.Linear | PackedLayer | Rows


@dataclass(frozen=True)
class NormSpec:
    """A LayerNorm or RMSNorm: its own parameters."""

    weight: Tensor | None
    bias: Tensor | None
    eps: float


@dataclass(frozen=True)
class BlockSpec:
    """The parts of one block; with a gate the MLP is down(activation(gate(x)) * up(x)).

    pre-norm: the norms come before attention and MLP. post-norm: after their residual sums.
    """

    attention_norm: NormSpec
    mlp_norm: NormSpec
    q: LinearLike
    k: LinearLike
    v: LinearLike
    o: LinearLike
    up: LinearLike
    down: LinearLike
    gate: LinearLike | None = None


@dataclass(frozen=True)
class StackSpec:
    """Blocks that follow each other. rms: RMSNorm instead of LayerNorm. window: keys a query sees, 0: all.

    first_norm (post-norm blocks): of the input. last_norm (pre-norm blocks): of what the last block gives.
    modules: all whose work the stack does; a hook or the training mode of one of them is an obstacle.
    settings: (object, attribute) that the stack was made of, beside those of the modules.
    """

    hidden: int
    heads: int
    kv_heads: int
    head_size: int
    scale: float
    pre_norm: bool
    rms: bool
    causal: bool
    activation: str
    blocks: list[BlockSpec]
    window: int = 0
    rotary_dims: int = 0
    interleaved: bool = False
    first_norm: NormSpec | None = None
    last_norm: NormSpec | None = None
    modules: list[nn.Module] = field(default_factory=list)
    settings: list[tuple[object, str]] = field(default_factory=list)


@dataclass(frozen=True)
class StackRun:
    """One call of a FusedStack, and what the threads did when: (block, phase, thread, begin, end), in ns."""

    stack: FusedStack
    batch: int
    tokens: int
    past: int
    cache: KVCache | None
    dtype: torch.dtype  # of x
    blocks: tuple[int, int]
    events: list[tuple[int, int, int, int, int]]


@contextmanager
def recording(record: Callable[[StackRun], None]) -> Iterator[None]:
    """Within the block and on this thread, every call of a FusedStack is timed and told to `record`."""
    token = _recorder.set(record)
    try:
        yield
    finally:
        _recorder.reset(token)


class FusedStack:
    """A StackSpec packed for the kernels of this machine. Immutable: made anew where `unchanged` says no.

    Quantized and sparse layers share their packs; float ones are packed as float32. Raises CannotFuse.
    """

    def __init__(self, spec: StackSpec):
        self.spec = spec
        self._kept: list[object] = []  # what the core points to
        self._watched: list[tuple[dict, str, object, int]] = []
        empty = [hooks for module in spec.modules for hooks in hooks_of(module)]
        self._check_modules()
        blocks = []
        for block in spec.blocks:
            parts = {name: self._linear(getattr(block, name)) for name in _LINEARS}
            norms = {name: self._norm(getattr(block, name)) for name in ("attention_norm", "mlp_norm")}
            blocks.append(parts | norms)
        try:
            with isa_errors:
                self._stack = _core.Stack(
                    hidden=spec.hidden,
                    heads=spec.heads,
                    kv_heads=spec.kv_heads,
                    head_size=spec.head_size,
                    scale=spec.scale,
                    pre_norm=spec.pre_norm,
                    rms=spec.rms,
                    causal=spec.causal,
                    window=spec.window,
                    activation=ACTIVATIONS[spec.activation],
                    rotary_dims=spec.rotary_dims,
                    interleaved=spec.interleaved,
                    first_norm=None if spec.first_norm is None else self._norm(spec.first_norm),
                    last_norm=None if spec.last_norm is None else self._norm(spec.last_norm),
                    blocks=blocks,
                )
        except ValueError as error:
            raise CannotFuse(str(error)) from None
        self._watch = _core.Watch(self._watched, empty + _GLOBAL_HOOKS)
        self._call = _core.StackCall(self._stack)

    def unchanged(self) -> bool:
        """Whether the modules are as they were: parts, values, hooks, training mode. Takes microseconds."""
        return self._watch.unchanged()

    def __call__(
        self,
        x: Tensor,
        *,
        mask: Tensor | None = None,
        cache: KVCache | None = None,
        past: int = 0,
        positions: Tensor | None = None,
        rope: tuple[Tensor, Tensor] | None = None,
        blocks: tuple[int, int] | None = None,
        out: Tensor | None = None,
    ) -> Tensor:
        """x [batch, tokens, hidden] -> the same shape and dtype; float32, bfloat16 or float16, on the CPU.

        mask: [b, h, q, keys], where b, h and q may be 1; bool (True: attend) or float, which is added. cache:
        takes the keys and values of these tokens behind the `past` ones that are in it. positions: int64
        [batch, tokens]; None: past, past + 1, ... rope: cos and sin, float32 [positions, rotary_dims / 2].
        blocks: (first, end). Autograd sees nothing of this.
        """
        batch, tokens, hidden = x.shape
        if hidden != self.spec.hidden:
            raise ValueError(
                f"x has the shape {tuple(x.shape)}; its last dimension must be {self.spec.hidden}"
            )
        x = x.detach()
        if not x.is_contiguous():
            x = x.contiguous()
        if out is None:
            out = torch.empty_like(x)
        elif out.shape != x.shape or out.dtype != x.dtype or not out.is_contiguous():
            raise ValueError(
                f"out must be contiguous and of the shape {tuple(x.shape)} and dtype {x.dtype} of x"
            )
        if mask is not None:
            keys = past + tokens
            kind = 1
            if mask.dtype is torch.bool:
                kind = 2
            elif mask.dtype is not torch.float32:
                mask = mask.float()
            mask = mask.expand(batch, self.spec.heads, tokens, keys)
            core_mask = (mask.data_ptr(), kind, *mask.stride())
        else:
            core_mask = None
        if positions is not None:
            positions = positions.expand(batch, tokens).contiguous()
        cos, sin = rope if rope is not None else (None, None)
        call = self._call if cache is None else cache.call_of(self._stack)
        code = kind_of(x, "x").codes[x.dtype]
        blocks = blocks or (0, len(self.spec.blocks))
        threads = dispatch.thread_override or _get_num_threads()
        events = 0
        if (record := _recorder.get()) is not None:
            # At most 6 phases of a block, 1 before and 2 after all; by threads that work together, or by
            # sequences, of which one thread may take all.
            events = max(threads, batch) * (6 * len(self.spec.blocks) + 3)
        with isa_errors:
            found = call(
                x.data_ptr(),
                hidden,
                code,
                out.data_ptr(),
                hidden,
                code,
                batch,
                tokens,
                core_mask,
                past,
                0 if positions is None else positions.data_ptr(),
                0 if cos is None else cos.data_ptr(),
                0 if sin is None else sin.data_ptr(),
                0 if cos is None else cos.shape[0],
                *blocks,
                events,
                threads,
            )
        if record is not None:
            record(StackRun(self, batch, tokens, past, cache, x.dtype, blocks, found))
        return out

    def _check_modules(self) -> None:
        for module in self.spec.modules:
            if reason := obstacle(module):
                raise CannotFuse(reason)
            self._watched.append((vars(module), "forward", None, _IDENTITY))
            for attribute, value in vars(module).items():
                # What the spec may have been made of: eps, a scaling, an activation, a switch.
                if isinstance(value, (float, bool)) or callable(value):
                    self._watched.append((vars(module), attribute, value, _IDENTITY))
            self._watched.append((module._modules, "", None, _LENGTH))
            for attribute, child in module._modules.items():
                self._watched.append((module._modules, attribute, child, _IDENTITY))
            buffers = held(module)  # without making those that `pack_` has freed
            self._watched.append((vars(module), "_buffers", buffers, _IDENTITY))
            for holder in (module._parameters, buffers):
                self._watched.append((holder, "", None, _LENGTH))
                self._watched += [watched(holder, attribute) for attribute in holder]
        for owner, attribute in self.spec.settings:
            self._watched.append((vars(owner), attribute, vars(owner).get(attribute), _IDENTITY))
        if any(_GLOBAL_HOOKS):
            raise CannotFuse("there are global module hooks")

    def _norm(self, norm: NormSpec) -> tuple[int, int, float]:
        return float_vector(norm.weight, self._kept), float_vector(norm.bias, self._kept), norm.eps

    def _linear(self, linear: LinearLike | None) -> tuple | None:
        """(packed, bias, static scale, static zero) for the core."""
        if linear is None:
            return None
        static = (0.0, 0)
        if isinstance(linear, PackedLayer):
            packed, bias, static = _own_pack(linear), linear.bias, linear.static or static
        elif isinstance(linear, Rows) and isinstance(linear.of, PackedLayer):
            packed = _rows_of(linear.of, linear.begin, linear.end)
            bias = None if linear.of.bias is None else linear.of.bias[linear.begin : linear.end]
            static = linear.of.static or static
        elif isinstance(linear, Rows):
            packed, bias = _pack_float(linear.of, linear.begin, linear.end), linear.bias
        elif isinstance(linear, nn.Linear) and type(linear).forward is nn.Linear.forward:
            packed, bias = _pack_float(linear.weight, 0, linear.out_features), linear.bias
        else:
            raise CannotFuse(f"its {type(linear).__name__} is no layer that the core knows")
        self._kept.append(packed)
        return packed, float_vector(bias, self._kept), *static


def hooks_of(module: nn.Module) -> list[dict]:
    """The dictionaries of hooks that its call runs."""
    return [getattr(module, hooks) for hooks in _HOOKS]


def obstacle(module: nn.Module) -> str:
    """Why a module has to be called itself, as it is now; empty where nothing is in the way."""
    name = type(module).__name__
    if any(hooks_of(module)):
        return f"a hook on its {name} would not run"
    if "forward" in vars(module):
        return f"the forward of its {name} was replaced on the instance"
    if module.training and isinstance(module, nn.modules.dropout._DropoutNd) and module.p > 0:
        return "its dropout is in training mode: call .eval() first"
    return ""


def modules_of(*modules: nn.Module) -> list[nn.Module]:
    """All modules below and including these, once each."""

    def walk() -> Iterator[nn.Module]:
        for module in modules:
            yield from module.modules()

    return list(dict.fromkeys(walk()))


def watched(holder: dict, attribute: str) -> tuple[dict, str, Tensor | None, int]:
    """An entry for Watch: a tensor in a dictionary of a module, or None, and its values."""
    tensor = holder.get(attribute)
    if tensor is None:
        return holder, attribute, None, _IDENTITY
    if tensor.is_inference():
        raise CannotFuse(
            "its tensors were made under torch.inference_mode(), where changes are not counted: "
            "clone them outside of it"
        )
    return holder, attribute, tensor, tensor._version


def float_vector(tensor: Tensor | None, kept: list) -> int:
    """Address of a vector in float32, which is put into `kept`; 0 for None."""
    if tensor is None:
        return 0
    _check_tensor(tensor)
    kept.append(vector := tensor.detach().float().contiguous())
    return vector.data_ptr()


def _check_tensor(tensor: Tensor) -> None:
    if tensor.is_meta or tensor.device.type != "cpu" or tensor.layout is not torch.strided:
        raise CannotFuse(f"its values are on {tensor.device} ({tensor.layout}); the kernels run on the CPU")
    if wraps(tensor) or tensor.dtype not in _FLOATS:
        raise CannotFuse(f"it holds a {type(tensor).__name__} of {tensor.dtype}")


def _own_pack(linear: PackedLayer):
    if linear.activation != "none":
        raise CannotFuse(f"its {linear.name} has an activation of its own ({linear.activation})")
    if linear.device.type != "cpu":
        raise CannotFuse(f"its {linear.name} is on {linear.device}; the kernels run on the CPU")
    return linear._prepare().core


def _rows_of(linear: PackedLayer, begin: int, end: int):
    """Packs some rows of a quantized or sparse layer."""
    _own_pack(linear)
    return pack(linear.packable.rows(begin, end)).core


def _pack_float(weight: Tensor, begin: int, end: int):
    """Packs some rows of a float weight, once for the values it has now."""
    _check_tensor(weight)
    known, now = _float_packs.get(weight, {}), state(weight)
    then, packed_then = known.get((begin, end), (None, None))
    if packed_then is not None and then == now and (packed := packed_then()) is not None:
        return packed
    rows = weight.detach()[begin:end]
    if rows.stride(-1) != 1 and rows.shape[-1] > 1:
        rows = rows.contiguous()
    kind = kind_of(rows, "the weight")
    n, k = rows.shape
    packed = _core.pack_float(rows.data_ptr(), kind.codes[rows.dtype], n, k, max(rows.stride(0), k))
    current = {key: value for key, value in known.items() if value[0] == now}
    _float_packs[weight] = current | {(begin, end): (now, weakref.ref(packed))}
    return packed
