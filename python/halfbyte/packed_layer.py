"""PackedLayer: what linear layers on packed weights have in common, whatever their weights are made of."""

from __future__ import annotations

from typing import Any, ClassVar, NamedTuple
from weakref import ref

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.compiler import is_compiling

from . import _core, dispatch
from .arrays import check_vector, on_gpu, place_of
from .dispatch import isa_errors
from .errors import DTypeError, HalfbyteError, ShapeError
from .ops import ACTIVATIONS, run_linear
from .pack import GpuWeight, PackedWeight
from .quantize import check_static, check_takes_static
from .quantized_tensor import QuantizedTensor
from .scheme import Scheme
from .sparse.scheme import SparseScheme
from .sparse.tensor import SparseTensor
from .torch_ops import known_pack, pack_lock, packed_weight, state, static_of
from .weight_view import WeightView

INPUT_BUFFERS = ("input_scale", "input_zero")
GROUP_DTYPES = (torch.float16, torch.float32)  # of group scales and minima

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)  # in the order of the dtype codes of the core

# True while something records or replaces tensor operations, from which a call into the core would hide.
_RECORDERS = [
    torch._C._get_tracing_state,
    torch._C._len_torch_dispatch_stack,
    torch._C._functorch.peek_interpreter_stack,
]

# Dictionaries of hooks that nn.Module's __call__ would run.
_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
_GLOBAL_HOOKS = [getattr(torch.nn.modules.module, f"_global{hooks}") for hooks in _HOOKS]

_get_num_threads = torch.get_num_threads


class _Prepared(NamedTuple):
    """What calls need of a layer, and the buffers that it was made of, as `_watched` has them: kept alive by
    nothing here, and not taken for others that come to lie where they lay.
    """

    buffers: list[tuple[ref, tuple[int, int]] | None]
    packed: PackedWeight | GpuWeight
    static: tuple[float, int] | None


class PackedLayer(nn.Module):
    """`y = activation(x @ weight.T + bias)` on weights packed for this machine: a QLinear or a SparseLinear.

    Handles the bias, the activation, static input scales, the dtype that the layer stands for, and the call:
    in eager inference straight into the C++ core or, of a layer on a GPU, to halfbyte.cuda; else through a
    torch operator. Weights are packed at the first call, and again after a buffer was replaced or changed in
    place, so that a layer works where `.to()` takes it.

    A subclass has the class variables below, the property `packable`, which is what `pack` takes, and the
    methods `_operator(x)`, which calls its torch operator, and `_other_format(state_dict, prefix, metadata)`,
    the error where a state_dict is of other numbers or of no sound weight, or None.
    """

    weight_buffers: ClassVar[tuple[str, ...]]  # the parts of `packable`, in the order that its class has them
    main_buffer: ClassVar[str]  # the weight buffer that is always there and in memory
    _made: ClassVar[tuple[str, str]]  # what is said of such a layer, and the function that makes it so
    packable: QuantizedTensor | SparseTensor

    def __init__(
        self,
        weight: QuantizedTensor | SparseTensor,
        parts: dict[str, Tensor | None],
        bias: Tensor | None,
        activation: str,
        float_dtype: torch.dtype,
        name: str,
    ):
        """parts: the weight buffers by name, in the order that they have in the state_dict."""
        super().__init__()
        self.scheme: Scheme | SparseScheme = weight.scheme
        self.out_features, self.in_features = weight.shape
        self.activation = activation
        self.float_dtype = float_dtype
        self.name = name
        buffers = parts | {"bias": None if bias is None else bias.detach().float().clone()}
        # Absent ones come last: torch.export counts buffers that are None where it numbers the others.
        names = [*(name for name in buffers if buffers[name] is not None), *INPUT_BUFFERS, *buffers]
        for name in dict.fromkeys(names):
            self.register_buffer(name, counting(buffers.get(name)))
        self._plan: _core.LinearPlan | None = None  # of a weight on the CPU
        self._prepared: _Prepared | None = None

    @property
    def weight(self) -> WeightView:
        """Stands for the float32 weight, for code that reads `layer.weight`."""
        return WeightView(self)

    @property
    def device(self) -> torch.device:
        """Where the weight is."""
        return held(self)[self.main_buffer].device

    @property
    def activation(self) -> str:
        """What follows the product and the bias: none, relu, gelu, gelu_tanh or silu. Assigning another name
        is a ValueError.
        """
        return self._activation

    @activation.setter
    def activation(self, activation: str) -> None:
        if not isinstance(activation, str) or activation not in ACTIVATIONS:
            raise ValueError(f"activation {activation!r} is none of: {', '.join(ACTIVATIONS)}")
        self._activation = activation

    @property
    def static(self) -> tuple[float, int] | None:
        """(scale, zero) that every input is quantized with, or None: found per token. Assigning them where
        the scheme has none per token is a ValueError.
        """
        return None if self.input_scale is None else (self.input_scale.item(), self.input_zero.item())

    @static.setter
    def static(self, static: tuple[float, int] | None) -> None:
        if static is None:
            held(self).update(input_scale=None, input_zero=None)
            return
        check_takes_static(self.scheme)
        scale, zero = check_static(static)
        with torch.inference_mode(False):
            held(self).update(
                input_scale=torch.tensor(scale, dtype=torch.float32, device=self.device),
                input_zero=torch.tensor(zero, dtype=torch.int32, device=self.device),
            )

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        # nn.Module's own __call__ takes longer than a small layer; it is needed for hooks and tracers, where
        # the plan declines, and for a forward that was put on the instance.
        plain = len(args) == 1 and not kwargs and "forward" not in self.__dict__
        if plain and not is_compiling() and (plan := self._plan) is not None:
            threads = dispatch.thread_override or _get_num_threads()
            y = plan(args[0], ACTIVATIONS[self._activation], threads, False)
            if y is not None:
                return y
        return super().__call__(*args, **kwargs)

    def forward(self, x: Tensor) -> Tensor:
        """y [..., out_features] of x [..., in_features]."""
        if is_compiling():
            return self._traced(x)
        if (plan := self._plan) is not None:
            threads = dispatch.thread_override or _get_num_threads()
            y = plan(x, ACTIVATIONS[self._activation], threads, True)
            if y is not None:
                return y
        return self._checked(x)

    def _checked(self, x: Tensor) -> Tensor:
        """forward with every check, for every kind of input; prepares the short way for the next call."""
        try:
            if not isinstance(x, Tensor):
                raise DTypeError(f"x must be a torch tensor, not {type(x).__name__}")
            if recorded(x):
                return self._traced(x)
            _, packed, static = self._ready()
            return run_linear(self._cast(x), packed, self.bias, self.activation, None, None, static)
        except (HalfbyteError, ValueError) as error:
            error.args = (f"{self.name}: {error}",)
            raise

    def _traced(self, x: Tensor) -> Tensor:
        # Of 4-bit codes the operator cannot tell an odd number of features from the next one.
        if not torch.jit.is_tracing() and x.shape[-1:] != (self.in_features,):
            raise ShapeError(
                f"x has the shape {tuple(x.shape)}; its last dimension must be {self.in_features}, the input "
                "features of the weight"
            )
        return self._operator(self._cast(x))

    def _cast(self, x: Tensor) -> Tensor:
        """x as torch.autocast has it for nn.Linear: on a GPU, where x is not quantized."""
        scheme = self.scheme
        quantizes = scheme.per_token or (isinstance(scheme, Scheme) and scheme.activation_group)
        if not on_gpu(x) or quantizes or x.dtype not in _DTYPES:
            return x
        kind = x.device.type
        return x.to(torch.get_autocast_dtype(kind)) if torch.is_autocast_enabled(kind) else x

    def _weight(self) -> tuple[Tensor | None, ...]:
        """The parts of `packable`, in their order."""
        buffers = self._buffers
        return tuple(buffers[name] for name in self.weight_buffers)

    def _prepare(self) -> PackedWeight | GpuWeight:
        """The pack of the weight, made where it is missing."""
        return self._ready()[1]

    def _ready(self) -> _Prepared:
        """Pack, and note what the short way of `forward` (LinearPlan) compares and passes on."""
        count_changes(self)
        if (prepared := self._prepared) is not None and self._is_of(prepared):
            return prepared
        with pack_lock():  # or the codes could be freed, or be there again, in between
            if known_pack(*weight_of(self)) is None:
                _ = self._buffers  # makes codes that `pack_` has freed: to pack them with what has changed
            return self._make_plan(held(self))

    def _make_plan(self, buffers: dict[str, Tensor | None]) -> _Prepared:
        static = static_of(self.input_scale, self.input_zero)
        static = None if static is None else check_static(static)
        if self.bias is not None:
            kind = place_of(buffers[self.main_buffer], self.main_buffer)
            check_vector(kind, self.bias, self.out_features, "bias", self.main_buffer)
            buffers["bias"] = self.bias.float().contiguous()
        made_of = self._watched()
        by_value = (*self.weight_buffers, *INPUT_BUFFERS)  # go into the plan; the bias is read in place
        watched = [
            (buffers, name, t, t._version if name in by_value and t is not None else -1)
            for name, t in buffers.items()
        ]
        prepared = _Prepared(made_of, packed_weight(*weight_of(self)), static)
        self._plan = None if isinstance(prepared.packed, GpuWeight) else self._plan_of(prepared, watched)
        self._prepared = prepared
        return prepared

    def _plan_of(self, prepared: _Prepared, watched: list[tuple]) -> _core.LinearPlan:
        with isa_errors:
            _core.select(self.scheme.op)  # a plan without a kernel would raise at every call
        return _core.LinearPlan(
            prepared.packed.core,
            watched,
            Tensor,
            _DTYPES,
            _RECORDERS,
            [getattr(self, hooks) for hooks in _HOOKS] + _GLOBAL_HOOKS,
            vars(forward_ad),
            0 if self.bias is None else self.bias.data_ptr(),
            *(prepared.static or (0.0, 0)),
        )

    def _kernels(self) -> tuple[str, str]:
        """What runs for x of `float_dtype` where the weight is, and on a GPU why torch where it is torch."""
        buffers = held(self)
        if not on_gpu(main := buffers[self.main_buffer]):
            return _core.select(self.scheme.op), ""
        from .cuda.linear import roads, roads_of

        if isinstance(self.scheme, SparseScheme):  # what runs depends on the zeros
            prepared = self._prepared
            return roads_of(prepared.packed, self.float_dtype) if prepared else ("not packed yet", "")
        shape, group_scale = (self.out_features, self.in_features), buffers.get("weight_group_scale")
        return roads(self.scheme, shape, main.device, self.float_dtype, group_scale)

    def _watched(self) -> list[tuple[ref, tuple[int, int]] | None]:
        return [None if t is None else (ref(t), state(t)) for t in held(self).values()]

    def _is_of(self, prepared: _Prepared) -> bool:
        """Whether no buffer was replaced, changed in place, or given other memory since."""
        buffers = held(self).values()
        return len(buffers) == len(prepared.buffers) and all(
            t is None if seen is None else t is not None and seen[0]() is t and seen[1] == state(t)
            for seen, t in zip(prepared.buffers, buffers, strict=True)
        )

    def _apply(self, fn: Any, recurse: bool = True) -> PackedLayer:
        kept = {name: b for name, b in self._buffers.items() if b is not None and b.is_floating_point()}
        device = self.device
        super()._apply(fn, recurse)
        if self.device != device:  # or what was packed there would keep its memory until the next call
            self._plan = self._prepared = None
        for name, buffer in kept.items():
            if (moved := self._buffers[name]).dtype != buffer.dtype:
                self._buffers[name] = buffer.to(moved.device)
        self.float_dtype = fn(torch.empty(0, dtype=self.float_dtype)).dtype
        return self

    def _save_to_state_dict(self, destination: dict, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        note_scheme(self.scheme, destination, prefix)

    def _load_from_state_dict(self, state_dict: dict, prefix: str, *args: Any) -> None:
        errors: list[str] = args[-1]
        if mismatch := self._other_format(state_dict, prefix, args[0]):
            errors.append(mismatch)
            return
        if prefix + "weight" in state_dict:
            kind, function = self._made
            errors.append(f"{prefix}weight is float and this layer is {kind}: load it before {function}")
        given = [name for name in INPUT_BUFFERS if prefix + name in state_dict]
        if len(given) == 1:
            errors.append(f"{prefix}{given[0]} comes alone: a static layer has input_scale and input_zero")
        elif prefix + self.weight_buffers[0] in state_dict:
            self._follow({name: state_dict.get(prefix + name) for name in self._buffers})
        super()._load_from_state_dict(state_dict, prefix, *args)

    def _follow(self, saved: dict[str, Tensor | None]) -> None:
        """Have the buffers that are saved where the scheme leaves a choice: whether the layer is static."""
        if self.scheme.per_token:
            self._follow_presence(saved, INPUT_BUFFERS)

    def _follow_presence(self, saved: dict[str, Tensor | None], names: tuple[str, ...]) -> None:
        for name in names:
            if (saved[name] is None) != (self._buffers[name] is None):
                value, device = saved[name], self.device
                self._buffers[name] = None if value is None else torch.empty_like(value, device=device)

    def _follow_dtype(self, saved: dict[str, Tensor | None], name: str) -> None:
        """Group scales and what belongs to them are float16 or float32."""
        buffer, value = self._buffers[name], saved[name]
        if buffer is not None and value is not None and value.dtype in GROUP_DTYPES:
            self._buffers[name] = buffer.to(value.dtype)

    def __getstate__(self) -> dict:
        return self.__dict__ | {"_buffers": self._buffers, "_plan": None, "_prepared": None}

    def extra_repr(self) -> str:
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, "
            f"bias={self.bias is not None}, scheme={self.scheme}, kernel={self._kernels()[0]}"
        ) + (f", static={self.static}" if self.scheme.per_token else "")


def note_scheme(scheme: Scheme | SparseScheme, destination: dict, prefix: str) -> None:
    """Write the scheme beside the version that torch keeps of each module in the metadata of a state_dict."""
    if (metadata := getattr(destination, "_metadata", None)) is not None:
        metadata.setdefault(prefix[:-1], {})["scheme"] = str(scheme)


def recorded(x: Tensor) -> bool:
    """Whether something has to see a call on x: a gradient, a tracer, a mode, or what kind of tensor x is."""
    if (x.requires_grad and torch.is_grad_enabled()) or x.is_meta or type(x) is not Tensor:
        return True
    return any(recorder() for recorder in _RECORDERS)


def held(layer: PackedLayer) -> dict[str, Tensor | None]:
    """The buffers as they are: where `pack_` has freed the codes, a tensor without data stands for them. What
    looks at a layer in any other way never sees it.
    """
    return vars(layer)["_buffers"]


def weight_of(layer: PackedLayer) -> tuple:
    """What `packed_weight` takes of a layer, of the buffers as they are."""
    buffers = held(layer)
    shape = layer.out_features, layer.in_features
    return layer.scheme, shape, *(buffers[name] for name in layer.weight_buffers)


def count_changes(layer: PackedLayer) -> None:
    """Replace buffers that were made in inference mode, and would not count their changes."""
    buffers = held(layer)
    for name, buffer in buffers.items():
        if (counted := counting(buffer)) is not buffer:
            buffers[name] = counted


def counting(tensor: Tensor | None) -> Tensor | None:
    """`tensor`, or a copy of one made in inference mode, which would not count its changes."""
    if tensor is None or not tensor.is_inference():
        return tensor
    with torch.inference_mode(False):
        return tensor.clone()
